"""Time as this machine was given it: what a busy host keeps from a virtual machine is no program's fault."""

from __future__ import annotations

import os
import time

_TICKS = os.sysconf("SC_CLK_TCK")
_PROCESSORS = os.cpu_count() or 1


def stolen() -> float:
    """Seconds since the start for which a processor had work and the host let another machine run, all processors
    together (`steal` of proc_stat(5)); 0.0 where nobody tells."""
    try:
        with open("/proc/stat", "rb") as file:
            return int(file.readline().split()[8]) / _TICKS
    except (OSError, IndexError):
        return 0.0


def clock() -> float:
    """Seconds as `time.monotonic`, less the mean of what was stolen from each processor: to hold against a limit.
    How long something took at least is asked of `time.monotonic`."""
    return time.monotonic() - stolen() / _PROCESSORS


class Trip:
    """Measures something short on one processor at a time: `took` is what it lasted less everything that was stolen
    meanwhile, at least 0.0 seconds."""

    def __init__(self) -> None:
        self._stolen = stolen()
        self.began = time.monotonic()

    @property
    def took(self) -> float:
        return max(0.0, time.monotonic() - self.began - (stolen() - self._stolen))
