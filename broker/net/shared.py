"""What all listeners of one broker use together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from broker.net.descriptors import Descriptors
from broker.net.handshakes import Handshakes
from broker.net.lingering import Lingering


class Shared:
    """One object per broker; `report(category, text)` limits the lines of each category."""

    __slots__ = ("descriptors", "engine", "handshakes", "live", "loop", "report", "tasks")

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop, report: Callable[[str, str], None]) -> None:
        self.engine = engine
        self.loop = loop
        self.report = report
        self.descriptors = Descriptors()
        self.handshakes = Handshakes(loop)
        self.live = Lingering(loop)
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that ends by itself."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
