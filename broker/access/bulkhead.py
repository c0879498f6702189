"""Limits how many calls of one backend run and wait, so that a slow one cannot take the broker's memory."""

from __future__ import annotations

import asyncio
from collections import deque

from broker.extend.auth import BackendUnavailable


class Busy(BackendUnavailable):
    """More calls are waiting than this backend may have."""


class Bulkhead:
    """At most `size` calls run; `queue` wait, in order of arrival, for at most `patience` seconds."""

    def __init__(self, size: int, queue: int, patience: float) -> None:
        self.size = size
        self.queue = queue
        self.patience = patience
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Take a place; raises Busy when the queue is full or took too long. Give it back with `leave`."""
        if self.running < self.size and not self._waiting:
            self.running += 1
            return
        if len(self._waiting) >= self.queue:
            raise Busy(f"{self.running} calls are running and {len(self._waiting)} waiting")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self.patience):
                await turn
        except TimeoutError:
            self._give_up(turn)
            raise Busy(f"no place became free in {self.patience:g} s") from None
        except asyncio.CancelledError:
            self._give_up(turn)
            raise

    def leave(self) -> None:
        """Give the place to the next in the queue."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)  # the place changes hands, `running` stays
                return
        self.running -= 1

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self.leave()  # the place was given to us in the same moment
        elif turn in self._waiting:
            self._waiting.remove(turn)
