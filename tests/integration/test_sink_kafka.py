"""The Kafka sink under what every sink has to do; what is Kafka's alone is in the `test_kafka` files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from broker.extend.sink import Record
from sinks.kafka import BACKEND
from tests import servers
from tests.integration.sink_suite import MOMENT, SinkSuite, msgid
from tests.proxy import Proxy

TOPIC = "suite"
LARGEST = 50_000


@dataclass
class Log:
    """A Kafka of the test's own with a topic of one partition, which shows what is committed."""

    server: servers.Kafka
    proxied: int
    """The port that Kafka names to who reaches it through the proxy."""

    @property
    def port(self) -> int:
        return self.server.port

    async def payloads(self) -> list[bytes]:
        return [record.value for record in await self.server.everything(TOPIC, committed=True)]

    async def stop(self) -> None:
        await asyncio.to_thread(self.server.stop)

    async def start(self) -> None:
        self.server.start()  # in this thread: the process ends with the one that started it


class OfKafka(SinkSuite):
    backend = BACKEND
    keeps = True
    # the driver tries again by itself, without a duplicate: `test_kafka` has its outages, frozen and killed servers
    test_s13_an_outage_and_a_return_lose_nothing_and_keep_the_order = None  # type: ignore[assignment]
    test_s14_an_answer_that_is_lost_makes_no_second_record_where_that_is_possible = None  # type: ignore[assignment]
    test_s16_a_black_hole_is_told_within_the_bound_and_the_connection_replaced = None  # type: ignore[assignment]

    @pytest.fixture
    async def target(self, start_kafka: Callable[..., servers.Kafka], free_port: Callable[[], int]) -> Log:
        proxied = free_port()
        server = start_kafka(proxy=proxied)
        await server.create_topic(TOPIC, 1, {"max.message.bytes": str(LARGEST)})
        await server.create_topic("isthmus-progress", 1, {"cleanup.policy": "compact"})
        return Log(server, proxied)

    @pytest.fixture
    async def proxy(self, target: Log) -> AsyncIterator[Proxy]:
        behind = int(target.server.listeners["PROXIED"].rpartition(":")[2])
        async with Proxy("127.0.0.1", behind, port=target.proxied) as proxy:
            yield proxy

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        more = {("request_timeout" if name == "timeout" else name): value for name, value in more.items()}
        return {"servers": [f"127.0.0.1:{port}"], "topic": TOPIC, **more}

    async def plant(self, target: Log) -> dict[str, Any]:
        return {}

    def poison(self, number: int) -> Record:
        return Record("t/large", os.urandom(LARGEST + 1_000), msgid=msgid(number), ts=MOMENT, clientid="dev")


class TestIdempotent(OfKafka):
    """What a killed worker had not heard of comes twice."""

    once = False


class TestTransactional(OfKafka):
    """Once, for who reads what is committed."""

    test_lanes_write_at_once = None  # type: ignore[assignment]

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        return super().raw(port, transactional_id="suite", **more)
