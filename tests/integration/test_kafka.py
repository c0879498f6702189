"""The Kafka sink against real Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import pytest

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks._kafka_layout import key_hash
from sinks.kafka import Kafka, KafkaConfig, open_kafka
from tests import servers
from tests.proxy import Proxy

_numbers = count(1)
Open = Callable[..., Any]


@pytest.fixture
def topic() -> str:
    return f"sink-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    async with contextlib.AsyncExitStack() as stack:

        async def open_(server: servers.Kafka | str, topic: str, **keys: Any) -> Kafka:
            address = server if isinstance(server, str) else server.bootstrap
            config = KafkaConfig.model_validate({"servers": [address], "filters": ["#"], "topic": topic, **keys})
            sink = await open_kafka(config.named("kafka"))  # type: ignore[arg-type]
            stack.push_async_callback(sink.close)
            return sink

        yield open_


def records(*numbers: int, clients: int = 10, payload: bytes | None = None) -> list[Record]:
    return [
        Record(
            f"t/{n}", b"%d" % n if payload is None else payload, 1, False, f"dev-{n % clients}", "alice", "10.0.0.7",
            f"{n:032x}", 1_700_000_000_000 + n,
        )
        for n in numbers
    ]  # fmt: skip


def values(stored: list[Any]) -> list[int]:
    return [int(record.value) for record in stored]


async def retry(sink: Kafka, batch: list[Record], seconds: float = 30) -> None:
    """As the worker does: the same batch until it is stored."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await sink.write(batch)
        except NotConnected:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_a_record_arrives_with_key_value_time_and_headers(kafka: servers.Kafka, topic: str, opened: Open):
    await kafka.create_topic(topic, 3)
    sink = await opened(kafka, topic)
    await sink.check()
    await sink.write(records(7))
    [stored] = await kafka.everything(topic)
    assert (stored.key, stored.value, stored.timestamp) == (b"dev-7", b"7", 1_700_000_000_007)
    assert stored.partition == key_hash(b"dev-7") % 3
    assert dict(stored.headers) == {
        "mqtt-topic": b"t/7", "mqtt-clientid": b"dev-7", "mqtt-username": b"alice", "mqtt-qos": b"1",
        "mqtt-retain": b"false", "mqtt-msgid": b"%032x" % 7,
    }  # fmt: skip


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_order_is_kept_for_each_key(kafka: servers.Kafka, topic: str, opened: Open, compression: str):
    await kafka.create_topic(topic, 3)
    sink = await opened(kafka, topic, compression=compression, max_batch_bytes="16KB")  # several rounds a write
    for start in range(0, 3000, 1000):
        await sink.write(records(*range(start, start + 1000), clients=7))
    stored = await kafka.everything(topic)
    assert sorted(values(stored)) == list(range(3000))
    for client in range(7):
        assert values([r for r in stored if r.key == b"dev-%d" % client]) == list(range(client, 3000, 7))


async def test_s07_the_record_that_is_too_large_fails_alone_and_in_order(
    kafka: servers.Kafka, topic: str, opened: Open
):
    """Poison in the middle of a batch."""
    await kafka.create_topic(topic, 1)
    sink = await opened(kafka, topic, compression="none")
    batch = records(*range(100), clients=1)
    batch[40] = records(40, clients=1, payload=bytes(2 << 20))[0]
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert list(failed.value.failed) == [40]
    assert "MessageSizeTooLarge" in failed.value.failed[40]
    assert values(await kafka.everything(topic)) == [n for n in range(100) if n != 40]
    await sink.write(records(100, clients=1))
    assert values(await kafka.everything(topic))[-1] == 100


async def test_a_topic_that_takes_less_is_found_out(kafka: servers.Kafka, topic: str, opened: Open):
    await kafka.create_topic(topic, 1, {"max.message.bytes": "20000"})
    sink = await opened(kafka, topic, compression="none")
    batch = [Record("t", b"%06d" % n + b" " * 1000, msgid=f"{n:032x}", clientid="dev") for n in range(200)]
    batch[77] = Record("t", os.urandom(30_000), msgid=f"{77:032x}", clientid="dev")
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert list(failed.value.failed) == [77]
    assert values(await kafka.everything(topic)) == [n for n in range(200) if n != 77]


async def test_a_record_the_broker_refuses_is_found_by_taking_the_batch_apart(
    kafka: servers.Kafka, topic: str, opened: Open
):
    """A compacted topic refuses a record without key, and with it the whole batch (error 87)."""
    await kafka.create_topic(topic, 1, {"cleanup.policy": "compact"})
    sink = await opened(kafka, topic, key="${payload.k}", value="${payload.n}")
    batch = [Record("t", b'{"n": %d, "k": "k%d"}' % (n, n), msgid=f"{n:032x}") for n in range(64)]
    for n in (20, 63):
        batch[n] = Record("t", b'{"n": %d}' % n, msgid=f"{n:032x}")
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert list(failed.value.failed) == [20, 63]
    assert "InvalidRecord" in failed.value.failed[20]
    assert values(await kafka.everything(topic)) == [n for n in range(64) if n not in (20, 63)]


async def test_topics_named_by_records_must_be_allowed(kafka: servers.Kafka, topic: str, opened: Open):
    for name in (f"{topic}-a", f"{topic}-b"):
        await kafka.create_topic(name, 2)
    sink = await opened(kafka, f"{topic}-${{topic[0]}}", allowed_topics=[f"{topic}-a", f"{topic}-b"])
    batch = [Record(f"{'abc'[n % 3]}/x", b"%d" % n, clientid="dev", msgid=f"{n:032x}") for n in range(9)]
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert sorted(failed.value.failed) == [2, 5, 8]
    assert "allowed_topics" in failed.value.failed[2]
    assert values(await kafka.everything(f"{topic}-a")) == [0, 3, 6]
    assert values(await kafka.everything(f"{topic}-b")) == [1, 4, 7]


async def test_s12_a_missing_topic_is_waited_for_and_then_an_alarm(
    kafka: servers.Kafka, topic: str, opened: Open, monkeypatch: pytest.MonkeyPatch
):
    sink = await opened(kafka, topic)
    with pytest.raises(Fatal, match=topic):
        await sink.check()
    with pytest.raises(NotConnected, match=topic):
        await sink.write(records(1))
    monkeypatch.setattr("sinks._kafka_client._MISSING_FOR", 0.0)
    with pytest.raises(Fatal, match=topic):
        await sink.write(records(1))
    await kafka.create_topic(topic, 1)
    await sink.check()
    await retry(sink, records(1))
    assert values(await kafka.everything(topic)) == [1]


async def test_s12_more_partitions_are_found_and_told(
    kafka: servers.Kafka, topic: str, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

    monkeypatch.setattr("sinks._kafka_client._METADATA_EVERY_MS", 200)
    await kafka.create_topic(topic, 1)
    sink = await opened(kafka, topic, partition="round_robin")
    await sink.write(records(1))
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    await admin.create_partitions({topic: NewPartitions(3)})
    await admin.close()
    deadline = time.monotonic() + 10
    sent = 1
    while "now has 3 partitions" not in caplog.text:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
        sent += 1
        await sink.write(records(sent))
    await sink.write(records(*range(sent + 1, sent + 7)))
    stored = await kafka.everything(topic)
    assert {record.partition for record in stored} == {0, 1, 2}
    assert sorted(values(stored)) == list(range(1, sent + 7))


async def test_s12_partitions_added_while_messages_flow_keep_the_order_of_each_key(
    kafka: servers.Kafka, topic: str, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """S-12: a key may move to another partition, and then everything older is in the one it had."""
    from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

    monkeypatch.setattr("sinks._kafka_client._METADATA_EVERY_MS", 200)
    await kafka.create_topic(topic, 2)
    sink = await opened(kafka, topic)
    sent = 0

    async def write(count: int) -> None:
        nonlocal sent
        await retry(sink, records(*range(sent, sent + count), clients=20))
        sent += count

    await write(400)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    await admin.create_partitions({topic: NewPartitions(7)})
    await admin.close()
    deadline = time.monotonic() + 20 * servers.PATIENCE
    while "now has 7 partitions" not in caplog.text:
        assert time.monotonic() < deadline
        await write(20)
        await asyncio.sleep(0.02)
    await write(400)
    stored = await kafka.everything(topic)
    assert sorted(values(stored)) == list(range(sent))
    moved = 0
    for client in range(20):
        places = {r.partition: [int(s.value) for s in stored if s.key == r.key and s.partition == r.partition]
                  for r in stored if r.key == b"dev-%d" % client}  # fmt: skip
        runs = sorted(places.values())
        assert len(runs) <= 2
        assert [n for run in runs for n in run] == list(range(client, sent, 20)), "in order, also over the move"
        moved += len(runs) - 1
    assert moved > 0, "no key moved"
    assert {r.partition for r in stored} - {0, 1}


async def test_s28_a_cluster_of_many_topics_is_checked_quickly(
    start_kafka: Callable[..., servers.Kafka], topic: str, opened: Open
):
    """S-28: what is answered is about our topics, however many others there are; all of these would take more. A
    hundred thousand are too many for a Kafka of one small process."""
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    async with Proxy("127.0.0.1", 1) as proxy:
        own = start_kafka(proxy=proxy.port, restarts=False)
        proxy.target = int(own.listeners["PROXIED"].rpartition(":")[2])
        await own.create_topic(topic, 1)
        await own.create_topic("isthmus-progress", 1, {"cleanup.policy": "compact"})
        admin = AIOKafkaAdminClient(bootstrap_servers=own.bootstrap, request_timeout_ms=60_000)
        await admin.start()
        names = [f"another-topic-of-a-long-name-that-is-none-of-our-business-{n}" for n in range(1_000)]
        sizes: list[int] = []
        for others in ([], names[:500], names[500:]):
            if others:
                await admin.create_topics([NewTopic(name, 1, 1) for name in others])
            for keys in ({}, {"topic": "${clientid}", "allowed_topics": [topic]}, {"transactional_id": "many"}):
                sink = await opened(f"127.0.0.1:{proxy.port}", **{"topic": topic, **keys})
                before, began = proxy.counts.bytes_down, time.monotonic()
                await sink.check()
                assert time.monotonic() - began < 10 * servers.PATIENCE
                sizes.append(proxy.counts.bytes_down - before)
        await admin.close()
    assert 0 < max(sizes) < 8 << 10 < len("".join(names))
    assert max(sizes[3:]) < max(sizes[:3]) + 1_000, f"{sizes}: the answer grows with the cluster"


async def test_a_partition_that_does_not_exist_is_fatal(kafka: servers.Kafka, topic: str, opened: Open):
    await kafka.create_topic(topic, 2)
    with pytest.raises(Fatal, match=r"partition = 2.*2 partitions"):
        await (await opened(kafka, topic, partition=2)).write(records(1))
    await (await opened(kafka, topic, partition=1)).write(records(1))
    assert (await kafka.everything(topic))[0].partition == 1


async def test_two_lanes_write_at_once(kafka: servers.Kafka, topic: str, opened: Open):
    await kafka.create_topic(topic, 2)
    sink = await opened(kafka, topic, compression="none")
    large = Record("t", bytes(2 << 20), clientid="dev-1", msgid="f" * 32)

    async def lane(first: int) -> None:
        for start in range(first, first + 1000, 100):
            batch = records(*range(start, start + 100))
            if start % 300 == 0:  # poison: the producer both lanes use is replaced
                with pytest.raises(BatchFailed):
                    await retry(sink, [*batch, large])
            else:
                await retry(sink, batch)

    await asyncio.gather(lane(0), lane(1000), lane(2000))
    assert sorted(values(await kafka.everything(topic))) == list(range(3000))


async def test_nobody_there_is_told_within_the_bound(free_port: Callable[[], int], opened: Open):
    sink = await opened(f"127.0.0.1:{free_port()}", "t", request_timeout="2s")
    for verb in (sink.write(records(1)), sink.check()):
        began = time.monotonic()
        with pytest.raises(NotConnected, match="cannot be reached"):
            await verb
        assert time.monotonic() - began < 10, "the driver's own patience is forty seconds"
    began = time.monotonic()
    await sink.close()
    assert time.monotonic() - began < 10


async def test_a_server_that_never_answers_is_told_within_the_bound(opened: Open):
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()

    silent = await asyncio.start_server(swallow, "127.0.0.1")
    port = silent.sockets[0].getsockname()[1]
    sink = await opened(f"127.0.0.1:{port}", "t", request_timeout="500ms")
    began = time.monotonic()
    with pytest.raises(NotConnected, match="does not answer"):
        await sink.write(records(1))
    assert time.monotonic() - began < 10
    await sink.close()
    silent.close()
    await silent.wait_closed()


# --- Kafka that stops


@pytest.fixture
def own(start_kafka: Callable[..., servers.Kafka]) -> Iterator[servers.Kafka]:
    return start_kafka()


@pytest.mark.timeout(180)
async def test_a_killed_broker_loses_nothing_doubles_nothing_and_keeps_order(
    own: servers.Kafka, topic: str, opened: Open
):
    """S-13."""
    await own.create_topic(topic, 2)
    sink = await opened(own, topic)
    stalls = []

    async def write_all() -> None:
        for start in range(0, 30_000, 200):
            batch = records(*range(start, start + 200), clients=5)
            began = time.monotonic()
            try:
                await sink.write(batch)
            except NotConnected:
                stalls.append(time.monotonic() - began)
                await retry(sink, batch)
            if start == 2_000:
                killed.set()

    killed = asyncio.Event()
    writing = asyncio.create_task(write_all())
    await killed.wait()
    own.kill()
    async with asyncio.timeout(20 * servers.PATIENCE):
        while not stalls:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await asyncio.to_thread(own.start)
    await asyncio.wait_for(writing, 40)
    assert stalls[0] < 5, "an outage shows within seconds"
    stored = await own.everything(topic)
    assert len(stored) == 30_000
    for client in range(5):
        assert values([r for r in stored if r.key == b"dev-%d" % client]) == list(range(client, 30_000, 5))


@pytest.mark.parametrize("acks", ["all", "leader", "none"])
async def test_fewer_guarantees_can_be_asked_for(own: servers.Kafka, topic: str, opened: Open, acks: str):
    """Without idempotence: at least once and in order for who waits for an answer, over a kill of Kafka."""
    await own.create_topic(topic, 2)
    assert await own.everything(topic) == []  # the leaders serve it: earlier, what asks for no answer is thrown away
    sink = await opened(own, topic, acks=acks, idempotent=False, request_timeout="3s")
    await sink.check()
    for start in range(0, 1_000, 100):
        await sink.write(records(*range(start, start + 100), clients=5))
    deadline = time.monotonic() + 15 * servers.PATIENCE
    while len(there := values(await own.everything(topic))) < 1_000:
        assert acks == "none", "stored, and not there"
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert sorted(there) == list(range(1_000))
    if acks == "none":
        return  # what was sent to a Kafka that dies is lost without a word
    own.kill()
    with pytest.raises(NotConnected):
        await sink.write(records(*range(1_000, 1_100), clients=5))
    await asyncio.to_thread(own.start)
    for start in range(1_000, 2_000, 100):
        await retry(sink, records(*range(start, start + 100), clients=5))
    stored = await own.everything(topic)
    for client in range(5):
        found = values([r for r in stored if r.key == b"dev-%d" % client])
        assert list(dict.fromkeys(found)) == list(range(client, 2_000, 5))


async def test_a_batch_on_its_way_is_awaited_and_not_sent_again(own: servers.Kafka, topic: str, opened: Open):
    await own.create_topic(topic, 1)
    sink = await opened(own, topic, request_timeout="1s")
    await retry(sink, records(0))
    own.freeze()
    batch = records(*range(1, 101))
    try:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(NotConnected, match="answer"):
                await sink.write(batch)
            assert time.monotonic() - began < 10
        # the broker delivered again what it had not seen acknowledged: other objects, another cut
        batch = records(*range(1, 151))
    finally:
        own.thaw()
    await retry(sink, batch)
    assert values(await own.everything(topic)) == list(range(151))
    assert sink._unsettled == {}


async def test_a_cancelled_write_is_not_sent_again_either(own: servers.Kafka, topic: str, opened: Open):
    await own.create_topic(topic, 1)
    sink = await opened(own, topic)
    await sink.write(records(0))
    own.freeze()
    writing = asyncio.create_task(sink.write(records(1, 2, 3)))
    await asyncio.sleep(0.3)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    own.thaw()
    await retry(sink, records(1, 2, 3))
    await retry(sink, records(4))
    assert values(await own.everything(topic)) == [0, 1, 2, 3, 4]


async def test_close_is_bounded_while_kafka_is_frozen(own: servers.Kafka, topic: str, opened: Open):
    await own.create_topic(topic, 1)
    sink = await opened(own, topic, request_timeout="1s")
    await retry(sink, records(0))
    own.freeze()
    with pytest.raises(NotConnected):
        await sink.write(records(1))
    began = time.monotonic()
    await sink.close()
    assert time.monotonic() - began < 10
    own.thaw()


# --- SASL and TLS


@pytest.fixture(scope="module")
def secure(certs: servers.Certificates) -> Iterator[servers.Kafka]:
    try:
        with servers.kafka(listeners=["SASL", "SASLSSL", "MTLS"], tls=certs, restarts=False) as server:
            yield server
    except servers.Absent as error:
        if "kafka" in servers.required():
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


def test_secured_listeners(secure: servers.Kafka, certs: servers.Certificates, caplog: pytest.LogCaptureFixture):
    """One Kafka, every way in and every way to be refused."""
    caplog.set_level("DEBUG")
    plain = {"mechanism": "plain", "username": secure.user, "password": secure.password}
    scram = {"username": secure.scram_user, "password": secure.scram_password}
    ca = {"ca": str(certs.ca)}
    mutual = {**ca, "certificate": str(certs.client), "key": str(certs.client_key)}
    wrong = {**plain, "password": "not-the-password"}

    async def write(listener: str, **keys: Any) -> None:
        config = {
            "servers": [secure.listeners[listener]],
            "filters": ["#"],
            "topic": "secured",
            "request_timeout": "15s",
        }
        sink = await open_kafka(KafkaConfig.model_validate({**config, **keys}))
        try:
            await sink.check()
            await sink.write(records(1))
        finally:
            await sink.close()

    async def everything() -> None:
        await secure.create_topic("secured", 1)
        await write("SASL", sasl=plain)
        await write("SASLSSL", sasl=plain, tls=ca)
        await write("SASLSSL", sasl={**scram, "mechanism": "scram-sha-256"}, tls=ca)
        await write("SASLSSL", sasl={**scram, "mechanism": "scram-sha-512"}, tls={"verify": False})
        await write("MTLS", tls=mutual)
        assert len(await secure.read("secured", 5)) == 5
        with pytest.raises(Fatal, match="refuses our credentials"):
            await write("SASLSSL", sasl=wrong, tls=ca)
        with pytest.raises(Fatal, match="refuses our credentials"):
            await write("SASL", sasl={"mechanism": "oauthbearer", "token": "not-the-password"})
        with pytest.raises(Fatal, match="not trusted"):
            await write("SASLSSL", sasl=plain, tls=True)
        with pytest.raises(NotConnected):
            await write("MTLS", tls=ca)
        with pytest.raises(Fatal, match="nowhere"):
            await write("MTLS", tls={"ca": "nowhere.pem"})

    asyncio.run(everything())
    assert secure.password not in caplog.text
    assert "not-the-password" not in caplog.text
