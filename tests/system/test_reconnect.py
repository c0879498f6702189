"""Everybody comes back at once after a restart of the broker, and the directory is not trampled down."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.mqtt import packets
from tests.broker import Broker
from tests.integration.fake_ldap import FakeLdap
from tests.servers import PATIENCE

pytestmark = pytest.mark.timeout(180)

CLIENTS = 2_000
SPREAD = 6.0
"""Seconds over which they come: as many a second as 10 000 in half a minute."""
LATENCY = 0.01
"""Seconds the directory takes for each answer."""

FRAGMENT = """
[access]
no_match = "allow"
[auth.ldap]
servers = ["{url}"]
tls = "none"
bind_dn = "cn=svc"
bind_password = "svc-pw"
base_dn = "dc=x"
exact_name = false
[listeners.tcp]
bind = "127.0.0.1:0"
"""


async def connect(port: int, number: int, retry: Callable[[int], None]) -> asyncio.StreamWriter:
    """A client that tries again after a moment until it is let in."""
    packet = packets.encode_connect(
        packets.Connect(
            version=5, clean_start=False, keep_alive=0, client_id=f"c{number}", username=f"u{number}", password=b"pw"
        )
    )
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(packet)
        answer = await reader.readexactly(4)
        if answer[3] == 0:
            return writer
        retry(answer[3])
        writer.close()
        await asyncio.sleep(random.uniform(0.2, 1.0))


async def test_r18_everybody_is_back_in_time_and_the_directory_sees_64_at_most(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """R-18: at the rate of 10 000 clients in 30 s, none waits twice as long as they take to come."""
    busy = most = 0

    async def before(kind: str) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(LATENCY)
        busy -= 1

    async with FakeLdap() as directory:
        directory.before = before
        running = Broker(tmp_path)
        running.write("10.toml", FRAGMENT.format(url=directory.url))
        await asyncio.to_thread(running.start)
        try:
            first = await asyncio.wait_for(connect(running.port, 0, lambda code: None), 10)
            first.close()
            await asyncio.to_thread(running.stop)
            await asyncio.to_thread(running.start)
            refused: Counter[int] = Counter()
            began = time.monotonic()

            async def come_back(number: int) -> asyncio.StreamWriter:
                await asyncio.sleep(SPREAD * number / CLIENTS)
                return await connect(running.port, number, lambda code: refused.update((code,)))

            async with asyncio.timeout(2 * SPREAD * PATIENCE):
                writers = await asyncio.gather(*(come_back(number) for number in range(CLIENTS)))
            took = time.monotonic() - began
            status = await asyncio.to_thread(running.status)
            for writer in writers:
                writer.close()
        finally:
            await asyncio.to_thread(running.stop)
    print(f"{CLIENTS} clients back after {took:.1f} s, {most} calls at once, refusals {dict(refused)}")
    record_property("back_s", round(took, 1))
    assert status["clients"] == CLIENTS
    assert 1 < most <= 64
    assert directory.open <= 64
    assert set(refused) <= {0x89}, "busy is the only reason to wait"
    assert status["auth"]["ldap"]["state"] == "ok"
