"""The worker process without its broker: a channel whose other end is in the test's hand."""

from __future__ import annotations

import asyncio
import socket

import pytest

from broker.runtime.busy import BusyPage
from broker.runtime.channel import Channel
from broker.runtime.worker import Worker


class FakeHost:
    def __init__(self) -> None:
        self.drained: list[float] = []

    def status(self) -> dict[str, object]:
        return {}

    async def close(self, drain: float) -> None:
        self.drained.append(drain)


@pytest.mark.parametrize(("told", "drain"), [(b"", 0.0), (b'{"stop": 2.5}\n', 2.5)])
async def test_s02_a_worker_whose_broker_is_gone_writes_nothing_more(told: bytes, drain: float) -> None:
    """Its records come to another worker at once: written here, too, they would be stored twice."""
    broker, ours = socket.socketpair()
    page = BusyPage.create()
    channel = await Channel.over(ours)
    worker = Worker(channel, page, {"internal": "unix:///nowhere", "node": "n"})
    host = FakeHost()
    worker._host = host  # type: ignore[assignment]
    broker.sendall(told)
    if not told:
        broker.close()
    try:
        async with asyncio.timeout(2):
            await worker.run()
    finally:
        page.close()
        broker.close()
    assert host.drained == [drain]
