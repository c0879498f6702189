"""The Kafka sink and a cluster of three nodes that lose each other: leaders move, most of them stand still."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import pytest

from broker.extend.sink import NotConnected, Record
from sinks.kafka import Kafka, KafkaConfig, open_kafka
from tests import servers

SOAK = os.environ.get("ISTHMUS_SOAK") == "1"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800 if SOAK else 180)]

FREEZES, FROZEN, THAWED = (20, 45.0, 20.0) if SOAK else (2, 4.0, 3.0)
"""S-10 has the figures of the long form."""
MOVES, APART = (12, 10.0) if SOAK else (3, 1.0)
"""S-11 has a leader moved every ten seconds."""
CLIENTS = 5

_numbers = count(1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[servers.Kafka]]:
    try:
        with servers.kafka_cluster(3) as nodes:
            yield nodes
    except servers.Absent as error:
        if "kafka" in servers.required():
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


class Stream:
    """Writes batch after batch as the worker does: the same one until it is stored."""

    def __init__(self, sink: Kafka) -> None:
        self.stored = 0
        self.refused = 0
        self.over = False
        self._sink = sink

    async def run(self) -> None:
        while not self.over:
            batch = records(self.stored, 100)
            while True:
                try:
                    await self._sink.write(batch)
                    break
                except NotConnected:
                    self.refused += 1
                    await asyncio.sleep(0.1)
            self.stored += len(batch)
            await asyncio.sleep(0.005)


def records(start: int, number: int) -> list[Record]:
    return [
        Record(f"t/{n}", b"%d" % n, 1, clientid=f"dev-{n % CLIENTS}", msgid=f"{n:032x}", ts=1_700_000_000_000 + n)
        for n in range(start, start + number)
    ]


@contextlib.asynccontextmanager
async def streaming(cluster: list[servers.Kafka], topic: str, **keys: Any) -> AsyncIterator[Stream]:
    """A stream into a topic that two of three nodes have to confirm; at its end all of it is stored."""
    await cluster[0].create_topic(topic, 2, {"min.insync.replicas": "2"}, replicas=3)
    config = KafkaConfig.model_validate({
        "servers": cluster[0].bootstrap.split(","), "filters": ["#"], "topic": topic, "request_timeout": "5s", **keys,
    })  # fmt: skip
    sink = await open_kafka(config.named("kafka"))  # type: ignore[arg-type]
    stream = Stream(sink)
    writing = asyncio.create_task(stream.run())
    try:
        yield stream
        stream.over = True
        await asyncio.wait_for(writing, 90 * servers.PATIENCE)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await sink.close()


async def sequences(cluster: list[servers.Kafka], topic: str) -> dict[str, list[int]]:
    """What is committed, by key, in the order of the log; each record has the message id it was sent with."""
    found: dict[str, list[int]] = {f"dev-{n}": [] for n in range(CLIENTS)}
    for record in await cluster[0].everything(topic, 60, committed=True):
        number = int(record.value)
        assert dict(record.headers)["mqtt-msgid"] == b"%032x" % number
        found[record.key.decode()].append(number)
    return found


def once(stream: Stream) -> dict[str, list[int]]:
    """Every number in order, none twice, none missing."""
    return {f"dev-{n}": list(range(n, stream.stored, CLIENTS)) for n in range(CLIENTS)}


@pytest.mark.parametrize("transactional", [False, True], ids=["idempotent", "transactional"])
async def test_s10_two_of_three_nodes_that_freeze_again_and_again_leave_no_gap(
    cluster: list[servers.Kafka], transactional: bool
) -> None:
    """S-10: nor is anything there twice; with most nodes frozen nothing can be stored."""
    topic = f"frozen-{next(_numbers)}"
    keys = {}
    if transactional:
        await cluster[0].create_topic(f"{topic}-progress", 1, {"cleanup.policy": "compact"}, replicas=3)
        keys = {"transactional_id": topic, "progress_topic": f"{topic}-progress"}
    async with streaming(cluster, topic, **keys) as stream:
        for turn in range(FREEZES):
            before = stream.stored
            await _until(lambda before=before: stream.stored > before, "a batch")  # type: ignore[misc]
            frozen = [cluster[turn % 3], cluster[(turn + 1) % 3]]
            for node in frozen:
                node.freeze()
            try:
                await asyncio.sleep(1.0)  # what was on its way
                before = stream.stored
                await asyncio.sleep(FROZEN - 1.0)
                assert stream.stored <= before + 100, "stored by one of three"
            finally:
                for node in frozen:
                    node.thaw()
            await asyncio.sleep(THAWED)
        before = stream.stored
        await _until(lambda: stream.stored > before, "a batch after the last thaw")
    print(f"{stream.stored} stored, {stream.refused} writes refused meanwhile")
    assert await sequences(cluster, topic) == once(stream)


async def test_s11_a_leader_that_is_moved_again_and_again(cluster: list[servers.Kafka]) -> None:
    """S-11: at least once, in order for each key; what came twice has the message id of the first."""
    topic = f"moved-{next(_numbers)}"
    async with streaming(cluster, topic) as stream:
        for _ in range(MOVES):
            leader = (await cluster[0].leaders(topic))[0]
            cluster[leader - 1].freeze()
            try:
                before = stream.stored
                await _until(lambda before=before: stream.stored > before + 100, "a batch by the new leader")  # type: ignore[misc]
            finally:
                cluster[leader - 1].thaw()
            await _until_led_by_another(cluster, topic, leader)
            await asyncio.sleep(APART)
    found = await sequences(cluster, topic)
    twice = sum(len(numbers) - len(set(numbers)) for numbers in found.values())
    print(f"{stream.stored} stored, {twice} of them twice, {stream.refused} writes refused meanwhile")
    assert {key: sorted(set(numbers)) for key, numbers in found.items()} == once(stream)
    for numbers in found.values():
        firsts = list(dict.fromkeys(numbers))
        assert firsts == sorted(firsts)


async def test_a_batch_whose_only_leader_is_away_for_long_is_not_sent_as_something_new(
    cluster: list[servers.Kafka],
) -> None:
    """Its node has it, and answers when it is back: long after a request would have been given up."""
    topic = f"alone-{next(_numbers)}"
    await cluster[0].create_topic(topic, 1, replicas=1)
    config = KafkaConfig.model_validate({
        "servers": cluster[0].bootstrap.split(","), "filters": ["#"], "topic": topic, "request_timeout": "2s",
    })  # fmt: skip
    sink = await open_kafka(config.named("kafka"))  # type: ignore[arg-type]
    try:
        await _stored(sink, records(0, 1))
        node = cluster[(await cluster[0].leaders(topic))[0] - 1]
        node.freeze()
        try:
            with pytest.raises(NotConnected):
                await sink.write(records(1, 100))
            await asyncio.sleep(4.0)  # the others count it out after 1.5 s: nobody leads
            with pytest.raises(NotConnected):
                await sink.write(records(1, 100))
        finally:
            node.thaw()
        await _stored(sink, records(1, 100))
    finally:
        await sink.close()
    assert [int(record.value) for record in await cluster[0].everything(topic, 60)] == list(range(101))


async def _stored(sink: Kafka, batch: list[Record]) -> None:
    async with asyncio.timeout(60 * servers.PATIENCE):
        while True:
            try:
                return await sink.write(batch)
            except NotConnected:
                await asyncio.sleep(0.1)


async def _until(holds: Any, what: str, seconds: float = 40) -> None:
    for _ in range(int(seconds * servers.PATIENCE / 0.05)):
        if holds():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{what} did not come")


async def _until_led_by_another(cluster: list[servers.Kafka], topic: str, leader: int) -> None:
    for _ in range(int(40 * servers.PATIENCE / 0.2)):
        now = (await cluster[0].leaders(topic))[0]
        if now not in (-1, leader):
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"partition 0 is still led by {leader}")
