"""Keeps wrong passwords away from a directory that would lock the account after some of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from broker.connectors.ldap import BindResult

SIZE = 100_000
"""Names whose failures are remembered; those that failed longest ago go first."""


class _Record:
    """What is known about one name."""

    __slots__ = ("changed", "failed", "pending")

    def __init__(self) -> None:
        self.failed: deque[float] = deque()
        self.pending = 0
        self.changed = asyncio.Event()


class BindLimit:
    """At most `most` refused binds of one name in `window` seconds; 0: no limit. An accepted one starts over.

    Binds under way count as if they had been refused already, so others of the same name wait until they ended; and a
    bind that was sent is waited for even when its caller has left, else hanging up early would not count.
    """

    def __init__(self, most: int, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.window = window
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def reached(self, name: str) -> bool:
        """Whether nothing more is asked about this name at present."""
        record = self._records.get(name)
        return record is not None and self.most > 0 and self._failures(record) >= self.most

    async def bind(self, name: str, work: Callable[[], Awaitable[BindResult]]) -> BindResult | None:
        """The result of `work`, or None, without asking, when the limit is reached."""
        if not self.most:
            return await work()
        record = self._records.get(name)
        while record is not None and self._failures(record) + record.pending >= self.most:
            if not record.pending:
                return None
            record.changed.clear()
            await record.changed.wait()
            record = self._records.get(name)
        if record is None:
            record = self._records[name] = _Record()
        record.pending += 1
        try:
            result, cancelled = await _to_the_end(work)
            if result.accepted:
                record.failed.clear()
            else:
                record.failed.append(self._clock())
                self._records[name] = self._records.pop(name)  # the latest is the last
            if cancelled:
                raise asyncio.CancelledError
            return result
        finally:
            record.pending -= 1
            record.changed.set()
            self._tidy(name, record)

    def _failures(self, record: _Record) -> int:
        until = self._clock() - self.window
        while record.failed and record.failed[0] <= until:
            record.failed.popleft()
        return len(record.failed)

    def _tidy(self, name: str, record: _Record) -> None:
        if not record.pending and not record.failed:
            del self._records[name]
        if len(self._records) > SIZE:
            oldest = next((name for name, record in self._records.items() if not record.pending), None)
            if oldest is not None:
                del self._records[oldest]


async def _to_the_end(work: Callable[[], Awaitable[BindResult]]) -> tuple[BindResult, bool]:
    """The result, and whether this task was cancelled meanwhile; it takes as long as the connection's own deadline."""
    task = asyncio.ensure_future(work())
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled and task.exception() is not None:
        raise asyncio.CancelledError
    return task.result(), cancelled
