"""Knows when file descriptors run short, so that connections leave some to the store and the log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource

LARGEST_RESERVE = 64
SMALLEST_RESERVE = 16
UNLIMITED = 1 << 31
ROOM = 65_536
"""Descriptors the kernel's table has room for from the start; 8 bytes each."""


class Descriptors:
    """The kernel hands out the lowest free number, so the newest number tells how many are in use.

    The highest `reserve` numbers are taken by no connection. Default: an eighth of the process's limit, 16 to 64. The
    limit is asked of the system each time: it may be changed while we run.
    """

    __slots__ = ("_reserve",)

    def __init__(self, reserve: int | None = None) -> None:
        self._reserve = reserve

    @property
    def limit(self) -> int:
        """How many the process may have open."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return UNLIMITED if soft == resource.RLIM_INFINITY else int(soft)

    @property
    def reserve(self) -> int:
        """How many connections leave alone."""
        return self._reserve_of(self.limit)

    @property
    def watermark(self) -> int:
        """The first number of the reserve."""
        limit = self.limit
        return limit - self._reserve_of(limit)

    def _reserve_of(self, limit: int) -> int:
        if self._reserve is not None:
            return self._reserve
        return max(SMALLEST_RESERVE, min(LARGEST_RESERVE, limit // 8))

    def available(self, fd: int, count: int = 1) -> bool:
        """Whether so many more would stay out of the reserve; `fd` is any open descriptor."""
        probes: list[int] = []
        try:
            for _ in range(count):
                probes.append(os.dup(fd))
        except OSError:
            return False
        finally:
            for probe in probes:
                os.close(probe)
        return probes[-1] < self.watermark  # the lowest free numbers come first


def make_room(count: int = ROOM) -> None:
    """Let the kernel's table grow to so many descriptors, or to the process's limit, at once.

    In a process with threads each doubling waits for every processor to pass a quiet point, some 15 ms in which a crowd
    that connects, and everybody else, is served nothing. So this belongs before the first thread.
    """
    with contextlib.suppress(OSError):
        probe = os.open(os.devnull, os.O_RDONLY)
        try:
            os.close(fcntl.fcntl(probe, fcntl.F_DUPFD_CLOEXEC, min(count, Descriptors().limit) - 1))
        finally:
            os.close(probe)
