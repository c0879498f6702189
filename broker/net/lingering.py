"""Cuts connections that were closed but cannot end because the peer does not read what is still to be sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Protocol

BUCKETS = 16
STEP = 0.125
"""Seconds between two buckets: each connection is looked at every two seconds, a sixteenth of all at a time."""


class Link(Protocol):
    """What is asked of a connection's transport here."""

    def is_closing(self) -> bool:
        """Whether `close` was called."""
        ...

    def abort(self) -> None:
        """End it without sending what is left."""
        ...


class Lingerer(Protocol):
    """A live connection. `doomed` is True once it was seen closing."""

    transport: Link
    doomed: bool


class Lingering:
    """All live connections; a closed one that is still here at the second look is aborted, so after 2 to 4 seconds.

    One timer for all of them, 40 bytes each. The engine closes transports without telling us, so they are looked at.
    """

    __slots__ = ("_buckets", "_empty", "_loop", "_next", "_timer", "aborted", "count")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: tuple[set[Lingerer], ...] = tuple(set() for _ in range(BUCKETS))
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self.count = 0
        self.aborted = 0

    def __iter__(self) -> Iterator[Lingerer]:
        for bucket in self._buckets:
            yield from tuple(bucket)

    def add(self, connection: Lingerer) -> None:
        """A connection was made."""
        self._buckets[id(connection) // 64 % BUCKETS].add(connection)
        self.count += 1
        if self._timer is None:
            self._timer = self._loop.call_later(STEP, self._look)

    def discard(self, connection: Lingerer) -> None:
        """A connection is gone."""
        bucket = self._buckets[id(connection) // 64 % BUCKETS]
        if connection in bucket:
            bucket.remove(connection)
            self.count -= 1
            if self.count == 0:
                self._empty.set()

    async def wait_empty(self, seconds: float) -> None:
        """Until no connection is left, or that long."""
        if self.count:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        bucket = self._buckets[self._next]
        self._next = (self._next + 1) % BUCKETS
        closing = [connection for connection in bucket if connection.transport.is_closing()]
        for connection in closing:
            if connection.doomed:
                self.aborted += 1
                connection.transport.abort()
            connection.doomed = True
        self._timer = self._loop.call_later(STEP, self._look) if self.count else None
