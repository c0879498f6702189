"""R-06: a hundred fast publishers and consumers that do not keep up, in a process that may not grow. That newcomers are
refused at the second level is tested with the engine alone: here the first one should do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from broker.client.connection import Connection, Handler
from broker.client.errors import Refused
from tests.broker import broker
from tests.system import resilience
from tests.system.resilience import OPEN, rss

pytestmark = pytest.mark.timeout(120)

BUDGET = 256 << 20
PUBLISHERS = 100
PAYLOAD = bytes(60_000)


class Deaf(Handler):
    """Subscribes and then acknowledges nothing."""


async def test_r06_publishers_are_held_back_before_memory_runs_out(tmp_path: Path) -> None:
    limits = (
        f'[broker]\nmax_memory = "{BUDGET >> 20}MB"\n'
        "[limits]\nmax_inflight = 1000\nmax_queued_messages = 10_000\n"  # not what ends the growth here
    )
    with broker(tmp_path, {"00-broker.toml": OPEN, "01-limits.toml": limits}) as running:
        to = resilience.url(running)
        consumers = []
        for number in range(20):
            consumer = await Connection.connect(to, client_id=f"deaf-{number}", handler=Deaf(), receive_maximum=1000)
            await consumer.subscribe([("data/#", 1)])
            consumers.append(consumer)
        stop = asyncio.Event()

        async def publish(number: int) -> None:
            with contextlib.suppress(OSError, ConnectionError):
                conn = await Connection.connect(to, client_id=f"loud-{number}", handler=Handler())
                ident = 0
                try:
                    while not stop.is_set():
                        ident = ident % 60_000 + 1
                        conn.publish(b"data/x", PAYLOAD, qos=1, packet_id=ident)
                        await conn.drain()
                        await asyncio.sleep(0)
                finally:
                    conn.abort()

        loud = [asyncio.create_task(publish(number)) for number in range(PUBLISHERS)]
        most, refused = 0, False
        end = time.monotonic() + 8
        while time.monotonic() < end:
            await asyncio.sleep(0.2)
            most = rss(running.pid, "VmHWM")
            try:
                late = await asyncio.wait_for(Connection.connect(to, client_id="late", handler=Handler()), 5)
                await late.disconnect()
            except Refused as error:
                assert error.code == 0x89  # noqa: PT017 - it came to the second level
                refused = True
            except (OSError, TimeoutError):
                pass
        stop.set()
        for task in loud:
            task.cancel()
        await asyncio.gather(*loud, return_exceptions=True)
        print(f"at most {most >> 20} MB of {BUDGET >> 20}, newcomers refused: {refused}")
        assert running.process.popen.poll() is None, "the broker ended"
        assert "broker.max_memory" in running.log()
        assert most < BUDGET
        for consumer in consumers:
            consumer.abort()
        await asyncio.sleep(0.1)  # until their transports are closed
