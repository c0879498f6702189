"""How much of the memory this process may use is used: what a broker does before the system ends it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

CALM = 0
BUSY = 1
"""Above 80 % of the limit: publishers are read a part of the time only."""
FULL = 2
"""Above 95 %: publishers are not read and new clients are refused."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class MemoryWatch:
    """`limit` in bytes; 0 takes the control group's, and without one nothing is watched."""

    def __init__(self, limit: int) -> None:
        self.limit = limit or group_limit()
        self.used = 0
        self.level = CALM

    def look(self) -> int:
        """The level now. It falls only five points below where it rose, so that it does not flutter."""
        if not self.limit:
            return CALM
        self.used = resident()
        share = self.used / self.limit
        slack = 0.05 if self.level else 0.0
        if share > 0.95 or (self.level == FULL and share > 0.95 - slack):
            self.level = FULL
        elif share > 0.80 or (self.level >= BUSY and share > 0.80 - slack):
            self.level = BUSY
        else:
            self.level = CALM
        return self.level


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE


def group_limit() -> int:
    """Bytes the control group of this process may use, 0 for no limit."""
    total = os.sysconf("SC_PHYS_PAGES") * _PAGE
    for path in _GROUPS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < total:
            return int(text)
    return 0


def give_back() -> None:
    """Return what the C library keeps for later to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
