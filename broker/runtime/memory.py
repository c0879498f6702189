"""How much of the memory this process may use is used: what a broker does before the system ends it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

CALM = 0
BUSY = 1
"""Above 80 % of the limit: publishers are read as far as there is room."""
FULL = 2
"""Above 95 %: publishers are hardly read and new clients are refused."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_MOUNT = Path("/sys/fs/cgroup")


class MemoryWatch:
    """`limit` in bytes; 0 takes the control group's, and without one nothing is watched."""

    def __init__(self, limit: int) -> None:
        self.limit = limit or group_limit()
        self.used = 0
        self.level = CALM

    @property
    def room(self) -> int:
        """Bytes that may be taken in until the next look: an eighth of what is left below 95 %, because a message may
        be held in several forms at a time."""
        return max(0, int(self.limit * 0.95) - self.used) // 8 if self.limit else 1 << 62

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


@functools.cache
def _statm() -> int:
    """The descriptor through which this process sees its own memory: kept, so that it is there when no other is to be
    had."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(os.pread(_statm(), 256, 0).split()[1]) * _PAGE


def group_limit(mount: Path = _MOUNT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes the control group of this process or one above it may use, the least of them; 0 for no limit. Both versions
    of control groups; in a container with its own view of them the mount itself is the group."""
    total = os.sysconf("SC_PHYS_PAGES") * _PAGE
    least = 0
    for path in _limit_files(mount, membership):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and 0 < int(text) < (least or total):
            least = int(text)
    return least


def _limit_files(mount: Path, membership: Path) -> Iterator[Path]:
    """Where a limit may stand, see cgroups(7): `0::PATH` (version 2), `N:memory:PATH` (version 1)."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            root, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth], name)


def give_back() -> None:
    """Return what the C library keeps for later to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
