"""What all listeners of one broker use together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from broker.net.descriptors import Descriptors
from broker.net.handshakes import Handshakes


class Shared:
    """One object per broker; `report(category, text)` limits the lines of each category."""

    __slots__ = (
        "_empty", "connections", "descriptors", "engine", "handshakes", "loop", "report", "revoke", "strangers",
        "tasks",
    )  # fmt: skip

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop, report: Callable[[str, str], None]) -> None:
        self.engine = engine
        self.loop = loop
        self.report = report
        self.revoke: Callable[[Any], None] | None = None
        """Ends a connection whose certificate was revoked; None: they stay."""
        self.descriptors = Descriptors()
        self.handshakes = Handshakes(loop)
        self.connections = 0
        """Sockets accepted and not yet gone, of all listeners."""
        self.strangers: set[Any] = set()
        """Transports the engine does not know: of refused clients, and before the upgrade to WebSocket."""
        self._empty = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    def left(self) -> None:
        """A connection is gone."""
        self.connections -= 1
        if self.connections == 0:
            self._empty.set()

    async def wait_empty(self, seconds: float) -> None:
        """Until no connection is left, or that long."""
        if self.connections:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that ends by itself."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
