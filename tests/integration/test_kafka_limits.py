"""A Kafka that slows us down, and one that vanishes without a word."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from broker.extend.sink import NotConnected, Record
from sinks.kafka import Kafka, KafkaConfig, open_kafka
from tests import servers

pytestmark = pytest.mark.timeout(180)

TOPIC = "limited"


@pytest.fixture
def own(start_kafka: Callable[..., servers.Kafka]) -> Iterator[servers.Kafka]:
    return start_kafka(restarts=False)


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Any]]:
    async with contextlib.AsyncExitStack() as stack:

        async def open_(server: servers.Kafka, **keys: Any) -> Kafka:
            config = {"servers": [server.bootstrap], "filters": ["#"], "topic": TOPIC, "compression": "none", **keys}
            sink = await open_kafka(KafkaConfig.model_validate(config).named("kafka"))  # type: ignore[arg-type]
            stack.push_async_callback(sink.close)
            return sink

        yield open_


def records(start: int, count: int, size: int = 500) -> list[Record]:
    return [
        Record("t", b"%08d" % n + os.urandom(size - 8), clientid=f"dev-{n % 5}", msgid=f"{n:032x}")
        for n in range(start, start + count)
    ]


def configure(server: servers.Kafka, *arguments: str) -> None:
    """Kafka's own tool for what no client library can set."""
    java = server._command[: server._command.index("kafka.Kafka")]
    command = [*java, "kafka.admin.ConfigCommand", "--bootstrap-server", server.bootstrap, "--alter", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=60 * servers.PATIENCE)


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_quota_slows_the_sink_and_costs_no_record(
    own: servers.Kafka, opened: Callable[..., Any], transactional: bool
):
    """Kafka answers late and stops reading from us (`producer_byte_rate`); lateness is no failure."""
    await own.create_topic(TOPIC, 2)
    await own.create_topic("isthmus-progress", 1, {"cleanup.policy": "compact"})
    configure(own, "--add-config", "producer_byte_rate=140000", "--entity-type", "clients", "--entity-default")
    sink = await opened(own, request_timeout="30s", **({"transactional_id": "limited"} if transactional else {}))
    began = time.monotonic()
    refused: list[str] = []
    # two megabytes at 140 kB/s, measured over ten seconds; little by little: nine seconds without a word are too many
    for start in range(0, 3000, 100):
        for _ in range(60):
            try:
                await sink.write(records(start, 100))
                break
            except NotConnected as error:
                refused.append(f"{time.monotonic() - began:.1f} s: {error}")
                await asyncio.sleep(0.1)
    took = time.monotonic() - began
    stored = [int(record.value[:8]) for record in await own.everything(TOPIC, committed=True)]
    assert sorted(stored) == list(range(3000))
    assert took > 3, "the quota was felt"
    assert refused == []
    configure(own, "--delete-config", "producer_byte_rate", "--entity-type", "clients", "--entity-default")
    began = time.monotonic()
    await sink.write(records(3000, 500))
    assert time.monotonic() - began < 12, "and goes with what was owed"


async def test_a_quota_longer_than_our_patience_costs_and_doubles_no_record(
    own: servers.Kafka, opened: Callable[..., Any]
):
    await own.create_topic(TOPIC, 1)
    configure(own, "--add-config", "producer_byte_rate=20000", "--entity-type", "clients", "--entity-default")
    sink = await opened(own, request_timeout="1s")
    refused = 0
    deadline = time.monotonic() + 90
    for start in range(0, 800, 200):  # four hundred kilobytes, two hundred of them above the quota
        while True:
            try:
                await sink.write(records(start, 200))
                break
            except NotConnected:
                refused += 1
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
    assert refused, "the throttle was longer than request_timeout"
    stored = [int(record.value[:8]) for record in await own.everything(TOPIC)]
    assert stored == list(range(800))
