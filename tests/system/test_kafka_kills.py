"""Broker, worker and Kafka are killed while messages flow into Kafka; and a Kafka that says nothing holds up nobody."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.broker import Broker, broker
from tests.ledger import Ledger
from tests.proxy import Proxy
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.resilience import LONGEST, SLOWEST, SOAK, Stream, command, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 if SOAK else 240)]

TOPIC, BATCH = "kills", 500
KAFKA = f"""
[sinks.kafka]
servers = ["{{bootstrap}}"]
filters = ["telemetry/#"]
topic = "{TOPIC}"
batch = {{{{ max_records = {BATCH} }}}}
request_timeout = "5s"
"""
ONCE = 'transactional_id = "isthmus-1-kafka"\n'
KILLS = ["worker", "kafka", "broker", "worker", "broker", "kafka"] * (5 if SOAK else 1)
"""S-02 has twenty of broker and worker."""
DETECTED = 15.0
"""Seconds after which a cluster that swallows everything is known to, by S-16."""


async def kill(what: str, running: Broker, kafka: servers.Kafka) -> None:
    if what == "worker":
        os.kill((await command(running, "status"))["workers"]["1"], signal.SIGKILL)
    elif what == "kafka":
        await asyncio.to_thread(kafka.kill)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(kafka.start)
    else:
        await asyncio.to_thread(running.stop, signal.SIGKILL)
        await asyncio.to_thread(running.start)


@pytest.mark.parametrize("once", [False, True], ids=["idempotent", "transactional"])
async def test_s02_kills_of_everything_lose_nothing_and_double_a_batch_at_most(
    once: bool, tmp_path: Path, start_kafka: Callable[..., servers.Kafka], record_property: Callable[[str, Any], None]
) -> None:
    """S-02: with transactions, who reads what is committed gets each message once; else a kill of the broker or the
    worker repeats one batch at most, and one of Kafka nothing."""
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    print(f"seed {seed}")
    kafka = start_kafka()
    await kafka.create_topic(TOPIC, 2)
    await kafka.create_topic("isthmus-progress", 1, {"cleanup.policy": "compact"})
    sink = KAFKA.format(bootstrap=kafka.bootstrap) + (ONCE if once else "")
    with broker(tmp_path, {"00-broker.toml": resilience.OPEN, "30-kafka.toml": sink}) as running:
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "kafka")
        ledger = Ledger()
        for number, what in enumerate(KILLS):
            name = f"device-{number}"
            stream = await Stream([ledger], name, f"telemetry/{name}/x", 3_000).open(resilience.url(running))
            load = asyncio.create_task(stream.run(3.0))
            await asyncio.sleep(moments.uniform(0.5, 1.5))
            await kill(what, running, kafka)
            await load
            if not stream.lost:
                await stream.settle()
            stream.conn.abort()
        sent = ledger.acknowledged_count

        async def drained() -> bool:
            return (await command(running, "status"))["sinks"]["kafka"]["queued"] == 0

        await eventually(drained, "an empty queue", 60, 0.2)
        for record in await kafka.everything(TOPIC, 60, committed=True):
            ledger.arrived(record.value)
        report = ledger.check(duplicates_allowed=not once, redelivery=not once)
        print(f"{len(KILLS)} kills, {sent} acknowledged, {report.duplicates} twice")
        record_property("twice", report.duplicates)
        assert sent > 1_000 * len(KILLS)
        assert report.duplicates <= BATCH * sum(what != "kafka" for what in KILLS)


async def test_a_black_holed_kafka_holds_up_no_other_sink_of_its_worker(
    tmp_path: Path, start_kafka: Callable[..., servers.Kafka], record_property: Callable[[str, Any], None]
) -> None:
    """S-16, S-30: what goes to Kafka is swallowed without a word; the sink beside it and the canary do not notice. With
    the times of a configuration that names none."""
    rate, seconds = 2_000.0, 60.0 if SOAK else 18.0
    async with Proxy("127.0.0.1", 1) as proxy:
        kafka = start_kafka(proxy=proxy.port, restarts=False)
        proxy.target = int(kafka.listeners["PROXIED"].rpartition(":")[2])
        await kafka.create_topic(TOPIC, 2)
        fragments = {
            "00-broker.toml": resilience.OPEN,
            "30-kafka.toml": KAFKA.format(bootstrap=f"127.0.0.1:{proxy.port}").replace('request_timeout = "5s"\n', ""),
            "31-store.toml": resilience.STORE,
        }
        with broker(tmp_path, fragments) as running:
            for name in ("kafka", "store"):
                await asyncio.to_thread(resilience.wait_running, running, "sinks", name)
            stored, sunk = Ledger(), Ledger()
            stream = await Stream([stored, sunk], "device", "telemetry/device/x", rate).open(resilience.url(running))
            await stream.run(1)
            proxy.black_hole = True
            behind: list[int] = []
            detected: list[float] = []
            began = time.monotonic()

            async def watch() -> None:
                for _ in range(int(seconds * 2)):
                    await asyncio.sleep(0.5)
                    sinks = (await command(running, "status"))["sinks"]
                    behind.append(sinks["store"]["queued"])
                    if sinks["kafka"]["state"] == "retrying":
                        detected.append(time.monotonic() - began)

            async with canary_apart(resilience.url(running)) as canary:
                await asyncio.gather(stream.run(seconds), watch())
            status = await command(running, "status")
            proxy.black_hole = False
            accepted = proxy.counts.accepted
            await stream.settle()
            print(f"the other sink at most {max(behind)} behind, canary at most {canary.slowest * 1000:.1f} ms")
            record_property("slowest_round_trip_ms", round(canary.slowest * 1000, 1))
            print(f"Kafka was known to be silent after {detected[:1]} s")
            assert proxy.counts.swallowed > 0
            assert detected
            assert detected[0] <= DETECTED * servers.PATIENCE
            assert status["sinks"]["kafka"]["state"] == "retrying"
            assert status["sinks"]["kafka"]["queued"] > rate * seconds / 2
            assert status["sinks"]["store"]["state"] == "running"
            assert max(behind) <= 5 * rate * servers.PATIENCE  # held up with Kafka, all of it
            # a broker that is held up shows in most trips, and not for a moment only
            assert sum(trip > SLOWEST for trip in canary.trips) <= len(canary.trips) / 20
            assert canary.slowest <= LONGEST

            async def drained() -> bool:
                sinks = (await command(running, "status"))["sinks"]
                return sinks["kafka"]["queued"] == sinks["store"]["queued"] == 0

            await eventually(drained, "the backlog in Kafka", 60, 0.2)
            assert proxy.counts.accepted > accepted, "the connections were not replaced"
            resilience.fill(stored, resilience.rows(running))
            stored.check()
            for record in await kafka.everything(TOPIC):
                sunk.arrived(record.value)
            sunk.check(duplicates_allowed=True, redelivery=True)
            stream.conn.abort()
