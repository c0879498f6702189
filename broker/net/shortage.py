"""Waits until file descriptors are free again, on behalf of something that accepts connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from broker.net.descriptors import Descriptors

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
"""Seconds; accepting goes on at most this long after descriptors are free again."""
QUIET = 5.0
"""Seconds of undisturbed accepting after which the next shortage is worth a line in the log again."""


class Shortage:
    """Calls `resume` once `needed` more descriptors leave the reserve alone. `fd` is any that stays open."""

    __slots__ = ("_descriptors", "_fd", "_loop", "_name", "_needed", "_pause", "_resume", "_resumed", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        descriptors: Descriptors,
        name: str,
        fd: int,
        resume: Callable[[], None],
        needed: int = 1,
    ) -> None:
        self._loop = loop
        self._descriptors = descriptors
        self._name = name
        self._fd = fd
        self._resume = resume
        self._needed = needed
        self._pause = 0.0
        self._resumed = -QUIET
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Nothing is accepted from now on: look again after a pause that grows. One line in the log for all of it."""
        if self._pause == 0.0 and self._loop.time() - self._resumed >= QUIET:
            log.error(
                "listener %r accepts nobody while fewer than %d file descriptors are free; raise the limit "
                "(ulimit -n, LimitNOFILE) or lower max_connections",
                self._name,
                self._descriptors.reserve,
            )
        self._wait()

    def over(self) -> None:
        """Accepting went well for a while."""
        self._pause = 0.0

    def cancel(self) -> None:
        """Do not resume."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, self._pause * 2))
        self._timer = self._loop.call_later(self._pause, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._descriptors.available(self._fd, self._needed):
            self._resumed = self._loop.time()
            self._resume()
        else:
            self._wait()
