"""The Kafka sink and a cluster with access control: what is not allowed stops the sink, and nothing is lost meanwhile.

S-12 speaks of a dead letter for a topic that is denied. A record is not to blame for that, and a right can be given:
the sink pauses and probes, as for wrong credentials, and its queue keeps everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.admin import CreateAclsRequest

from broker.extend.sink import Fatal, NotConnected, Record
from sinks.kafka import Kafka, KafkaConfig, open_kafka
from tests import servers

ALLOW, LITERAL = 3, 3
TOPIC, TRANSACTIONAL_ID = 2, 5
READ, WRITE, DESCRIBE = 3, 4, 8
"""Kafka's numbers for permissions, patterns, resources and operations."""

pytestmark = pytest.mark.timeout(180)

_numbers = count(1)


@pytest.fixture(scope="module")
def guarded() -> Iterator[servers.Kafka]:
    """A Kafka in which alice, who logs in, may do what `allow` says, and who comes without a name everything."""
    try:
        with servers.kafka(listeners=["SASL"]) as server:
            server.stop()
            properties = Path(server._command[-1])
            properties.write_text(
                properties.read_text() + "super.users=User:ANONYMOUS\n"
                "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n"
            )
            server.start()
            yield server
    except servers.Absent as error:
        if "kafka" in servers.required():
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@pytest.fixture
async def topic(guarded: servers.Kafka) -> str:
    name = f"guarded-{next(_numbers)}"
    await guarded.create_topic(name, 1)
    return name


async def allow(server: servers.Kafka, kind: int, name: str, *operations: int) -> None:
    """From now on, or a moment later."""
    client = AIOKafkaClient(bootstrap_servers=server.bootstrap)
    await client.bootstrap()
    try:
        for operation in operations:
            question = CreateAclsRequest(kind, name, LITERAL, f"User:{server.user}", "*", operation, ALLOW)
            answer = await client.send(client.get_random_node(), question)
            assert [code for code, _ in answer.creation_responses] == [0]
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def opened(server: servers.Kafka, topic: str, **keys: Any) -> AsyncIterator[Kafka]:
    sasl = {"mechanism": "plain", "username": server.user, "password": server.password}
    config = {"servers": [server.listeners["SASL"]], "filters": ["#"], "topic": topic, "request_timeout": "5s"}
    sink = await open_kafka(KafkaConfig.model_validate({**config, "sasl": sasl, **keys}).named("kafka"))  # type: ignore[arg-type]
    try:
        yield sink
    finally:
        await sink.close()


def records(*numbers: int, name: str = "t") -> list[Record]:
    return [Record(name, b"%d" % n, clientid="dev", msgid=f"{n:032x}", ts=1_700_000_000_000) for n in numbers]


async def allowed(sink: Kafka, batch: list[Record]) -> None:
    """As the worker does, with less patience: the same batch until it is stored."""
    deadline = time.monotonic() + 15 * servers.PATIENCE
    while True:
        try:
            return await sink.write(batch)
        except (Fatal, NotConnected):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def values(server: servers.Kafka, topic: str) -> list[int]:
    return [int(record.value) for record in await server.everything(topic, committed=True)]


async def test_s12_a_topic_that_is_denied_stops_the_sink_until_it_is_allowed(
    guarded: servers.Kafka, topic: str
) -> None:
    """S-12: without any right, with the right to see the topic, and with one to write elsewhere."""
    other = f"{topic}-other"
    await guarded.create_topic(other, 1)
    async with opened(guarded, topic) as sink:
        for verb in (sink.check, lambda: sink.write(records(1, 2))):
            with pytest.raises(Fatal, match=r"does not let us write"):
                await verb()
        await allow(guarded, TOPIC, topic, DESCRIBE)
        with pytest.raises(Fatal, match=r"does not let us write"):
            await sink.write(records(1, 2))
        await allow(guarded, TOPIC, other, WRITE)
        deadline = time.monotonic() + 15 * servers.PATIENCE
        while True:
            with pytest.raises(Fatal) as refused:
                await sink.write(records(1, 2))
            if topic in str(refused.value):
                break
            assert time.monotonic() < deadline, "the right to write elsewhere never arrived"
            await asyncio.sleep(0.1)
        await sink.check()
        assert await values(guarded, topic) == []
        await allow(guarded, TOPIC, topic, WRITE)
        await allowed(sink, records(1, 2))
        await sink.write(records(3))
    assert await values(guarded, topic) == [1, 2, 3]


async def test_s12_what_went_into_an_allowed_topic_is_not_sent_again_for_one_that_is_denied(
    guarded: servers.Kafka, topic: str
) -> None:
    """S-12: one batch into two topics."""
    names = [f"{topic}-a", f"{topic}-b"]
    for name in names:
        await guarded.create_topic(name, 1)
    await allow(guarded, TOPIC, names[0], WRITE)
    await allow(guarded, TOPIC, names[1], DESCRIBE)
    async with opened(guarded, f"{topic}-${{topic}}", allowed_topics=names) as sink:
        await allowed(sink, records(0, name="a"))
        batch = records(1, 2, name="a") + records(3, name="b") + records(4, name="a")
        for _ in range(3):
            with pytest.raises(Fatal, match=names[1]):
                await sink.write(batch)
        await allow(guarded, TOPIC, names[1], WRITE)
        await allowed(sink, batch)
    assert [await values(guarded, name) for name in names] == [[0, 1, 2, 4], [3]]


async def test_s12_a_transaction_that_is_denied_stops_the_sink_until_it_is_allowed(
    guarded: servers.Kafka, topic: str
) -> None:
    """S-12: the name of the transactions, the topic and the notes each need a right."""
    await guarded.create_topic(f"{topic}-notes", 1, {"cleanup.policy": "compact"})
    keys = {"transactional_id": topic, "progress_topic": f"{topic}-notes"}
    async with opened(guarded, topic, **keys) as sink:
        with pytest.raises(Fatal, match="does not let us write"):
            await sink.write(records(1, 2))
        await allow(guarded, TRANSACTIONAL_ID, topic, WRITE, DESCRIBE)
        await allow(guarded, TOPIC, f"{topic}-notes", READ, WRITE)
        await allow(guarded, TOPIC, topic, DESCRIBE)
        deadline = time.monotonic() + 15 * servers.PATIENCE
        while True:
            with pytest.raises((Fatal, NotConnected)) as refused:
                await sink.write(records(1, 2))
            if isinstance(refused.value, Fatal) and "Topic" in str(refused.value):
                break
            assert time.monotonic() < deadline, f"the last word was {refused.value!r}"
            await asyncio.sleep(0.1)
        await allow(guarded, TOPIC, topic, WRITE)
        await allowed(sink, records(1, 2))
        await sink.write(records(3))
    assert await values(guarded, topic) == [1, 2, 3]
