"""A backend that hangs never slows a client that has nothing to do with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection, Handler
from broker.client.errors import Refused
from tests import servers
from tests.broker import broker
from tests.fragments import ldap
from tests.ledger import Ledger
from tests.proxy import Proxy
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.resilience import SOAK, Stream, command, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SECONDS = 60.0 if SOAK else 12.0

KAFKA = """
[sinks.kafka]
servers = ["{bootstrap}"]
filters = ["telemetry/#"]
topic = "canary"
request_timeout = "2s"
"""

DEAD_BRIDGE = """
[bridges.hq]
kind = "mqtt"
servers = ["mqtt://no-such-host.invalid:1883"]
clientid = "region-1"
[[bridges.hq.topics]]
filter = "telemetry/#"
direction = "out"
qos = 1
"""


async def keep_trying(url: str, name: str, tries: list[tuple[float, int]], stop: asyncio.Event) -> None:
    """Log in as one of the directory's people again and again; notes how long each took and the answer."""
    loop = asyncio.get_running_loop()
    number = 0
    while not stop.is_set():
        number += 1
        began = loop.time()
        try:
            conn = await Connection.connect(
                url, client_id=f"{name}-{number}", handler=Handler(), username=name, password=servers.PEOPLE[name]
            )
        except Refused as refused:
            tries.append((loop.time() - began, refused.code))
        else:
            tries.append((loop.time() - began, 0))
            conn.abort()
        await asyncio.sleep(0.05)


async def test_the_canary_does_not_notice_a_black_holed_kafka_a_silent_directory_and_a_dead_peer_name(
    tmp_path: Path,
    start_slapd: Callable[..., servers.Slapd],
    start_kafka: Callable[..., servers.Kafka],
    record_property: Callable[[str, Any], None],
) -> None:
    directory = start_slapd()
    async with Proxy("127.0.0.1", 1) as proxy:
        kafka = start_kafka(proxy=proxy.port)
        proxy.target = int(kafka.listeners["PROXIED"].rpartition(":")[2])
        await kafka.create_topic("canary")
        fragments = {
            "00-broker.toml": resilience.OPEN,
            "20-auth-ldap.toml": ldap(directory.url, tmp_path, directory.admin_password),
            "30-kafka.toml": KAFKA.format(bootstrap=f"127.0.0.1:{proxy.port}"),
            "40-bridge.toml": DEAD_BRIDGE,
        }
        with broker(tmp_path, fragments) as running:
            ledger = Ledger()
            stream = await Stream([ledger], "device", "telemetry/device/x", 200).open(resilience.url(running))
            await stream.run(1)

            # all three at once
            proxy.black_hole = True
            directory.freeze()
            stop = asyncio.Event()
            tries: list[tuple[float, int]] = []
            logins = [
                asyncio.create_task(keep_trying(resilience.url(running), name, tries, stop)) for name in servers.PEOPLE
            ]
            try:
                async with canary_apart(resilience.url(running), 0.1) as canary:
                    await stream.run(SECONDS)
            finally:
                stop.set()
                directory.thaw()
                proxy.black_hole = False
            await asyncio.gather(*logins)
            status = await command(running, "status")

            # the faults were there
            assert proxy.counts.swallowed > 0
            assert tries
            assert {code for _, code in tries} <= {0x88, 0}
            assert sum(code == 0x88 for _, code in tries) > 4
            assert status["bridges"]["hq"]["state"] != "running"
            assert status["bridges"]["hq"]["last_error"]
            assert status["sinks"]["kafka"]["queued"] > 0
            record_property("slowest_round_trip_ms", round(canary.slowest * 1000, 1))
            print(f"canary: {len(canary.trips)} round trips, slowest {canary.slowest * 1000:.1f} ms")
            print(f"logins: {len(tries)}, slowest {max(t for t, _ in tries):.2f} s, last {tries[-1]}")
            canary.check()
            # a deadline of three seconds, and not two of them in a row
            assert max(took for took, _ in tries) <= 5.5 * servers.PATIENCE
            assert sum(took < 0.1 for took, _ in tries) > len(tries) / 2, "the breaker opened"

            # and when they end, what was promised arrives
            await stream.settle()
            await proxy.cut()

            async def all_there() -> bool:
                sink = (await command(running, "status"))["sinks"]["kafka"]
                return bool(sink["queued"] == 0 and sink["acked"] >= stream.acknowledged)

            await eventually(all_there, "the backlog in Kafka", 40, 0.2)
            for record in await kafka.everything("canary"):
                ledger.arrived(record.value)
            ledger.check(duplicates_allowed=True, redelivery=True)
            assert stream.lost == []
            stream.conn.abort()
