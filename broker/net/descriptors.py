"""Knows when file descriptors run short, so that connections leave some to the store and the log."""

from __future__ import annotations

import os
import resource

LARGEST_RESERVE = 64
SMALLEST_RESERVE = 16
UNLIMITED = 1 << 31


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
        if self._reserve is not None:
            return self._reserve
        return max(SMALLEST_RESERVE, min(LARGEST_RESERVE, self.limit // 8))

    @property
    def watermark(self) -> int:
        """The first number of the reserve."""
        return self.limit - self.reserve

    def available(self, fd: int) -> bool:
        """Whether a further connection would stay out of the reserve; `fd` is any open descriptor."""
        try:
            probe = os.dup(fd)
        except OSError:
            return False
        os.close(probe)
        return probe < self.watermark
