"""The Kafka sink's transactions against real Kafka: who reads what is committed gets each record once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import pytest
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks._kafka_notes import decode
from sinks._kafka_unfinished import Unfinished
from sinks.kafka import Kafka, KafkaConfig, open_kafka
from tests import servers

_numbers = count(1)
Open = Callable[..., Any]


@pytest.fixture
def topic() -> str:
    return f"once-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens sinks of one transactional id on one topic; both topics are made."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_(server: servers.Kafka, topic: str, partitions: int = 2, **keys: Any) -> Kafka:
            await server.create_topic(topic, partitions, keys.pop("configs", None))
            await server.create_topic(f"{topic}-progress", 1, {"cleanup.policy": "compact"})
            config = KafkaConfig.model_validate({
                "servers": [server.bootstrap], "filters": ["#"], "topic": topic, "transactional_id": f"id-{topic}",
                "progress_topic": f"{topic}-progress", **keys,
            })  # fmt: skip
            sink = await open_kafka(config.named("kafka"))  # type: ignore[arg-type]
            stack.push_async_callback(sink.close)
            return sink

        yield open_


def records(*numbers: int, clients: int = 10) -> list[Record]:
    return [Record("t", b"%d" % n, 1, False, f"dev-{n % clients}", msgid=f"{n:032x}", ts=1) for n in numbers]


async def committed(server: servers.Kafka, topic: str) -> list[int]:
    """What those who read what is committed get."""
    return [int(record.value) for record in await server.everything(topic, committed=True)]


async def retry(sink: Kafka, batch: list[Record], seconds: float = 40) -> None:
    """As the worker does: the same batch until it is stored."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await sink.write(batch)
        except NotConnected:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_a_batch_is_one_transaction_with_its_note(kafka: servers.Kafka, topic: str, opened: Open):
    sink = await opened(kafka, topic)
    await sink.check()
    for start in (0, 100, 200):
        await sink.write(records(*range(start, start + 100)))
    assert sorted(await committed(kafka, topic)) == list(range(300))
    notes = await kafka.everything(f"{topic}-progress", committed=True)
    assert [len(decode(note.value).ids) for note in notes] == [100, 200, 200]
    assert sorted(int(ident, 16) for ident in decode(notes[-1].value).ids) == list(range(100, 300))


async def test_order_is_kept_also_over_several_rounds(kafka: servers.Kafka, topic: str, opened: Open):
    sink = await opened(kafka, topic, max_batch_bytes="16KB", compression="none")
    await sink.write(records(*range(3000), clients=7))
    stored = await kafka.everything(topic, committed=True)
    for client in range(7):
        assert [int(r.value) for r in stored if r.key == b"dev-%d" % client] == list(range(client, 3000, 7))


async def test_s02_what_a_crash_made_come_again_is_stored_once(kafka: servers.Kafka, topic: str, opened: Open):
    """The worker had stored a batch and died before the broker had its acknowledgement; the next one gets it anew, cut
    differently and with more behind it."""
    await (await opened(kafka, topic)).write(records(*range(100)))
    successor = await opened(kafka, topic)
    await successor.write(records(*range(30)))
    await successor.write(records(*range(30, 150)))
    third = await opened(kafka, topic)
    await third.write(records(*range(30, 200)))
    assert sorted(await committed(kafka, topic)) == list(range(200))


async def test_s02_what_a_crash_left_open_is_never_seen(kafka: servers.Kafka, topic: str, opened: Open):
    crashed = await opened(kafka, topic, transaction_timeout="60s")
    producer = await crashed._cluster.producer()
    reached = asyncio.Event()

    async def vanish() -> None:
        reached.set()
        await asyncio.Event().wait()

    producer.commit_transaction = vanish
    writing = asyncio.create_task(crashed.write(records(*range(50))))
    await asyncio.wait_for(reached.wait(), 10)
    successor = await opened(kafka, topic)
    began = time.monotonic()
    await retry(successor, records(*range(60)))
    assert time.monotonic() - began < 10, "it did not have to wait for the transaction's timeout"
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    assert sorted(await committed(kafka, topic)) == list(range(60))
    assert len(await kafka.everything(topic)) == 110, "the open one's records are in the log, aborted"


async def test_s02_what_is_noted_is_found_behind_the_open_transaction_of_another_sink(
    kafka: servers.Kafka, topic: str, opened: Open
):
    """Both note in one topic, and what is committed there can be read up to the first open transaction only."""
    ours = await opened(kafka, topic)
    await ours.write(records(*range(5)))
    other = await opened(kafka, topic, transactional_id=f"other-{topic}")
    producer = await other._cluster.producer()
    commit, reached, released = producer.commit_transaction, asyncio.Event(), asyncio.Event()

    async def late() -> None:
        reached.set()
        await released.wait()
        await commit()

    producer.commit_transaction = late
    writing = asyncio.create_task(other.write(records(100)))
    await asyncio.wait_for(reached.wait(), 10 * servers.PATIENCE)
    await ours.write(records(*range(5, 10)))
    successor = await opened(kafka, topic, request_timeout="2s")
    deadline = time.monotonic() + 20 * servers.PATIENCE
    while True:
        with pytest.raises(NotConnected) as refused:
            await successor.write(records(*range(12)))
        if "another sink's transaction" in str(refused.value):
            break
        assert time.monotonic() < deadline, f"the last word was {refused.value!r}"
    released.set()
    await writing
    await retry(successor, records(*range(12)))
    assert sorted(await committed(kafka, topic)) == [*range(12), 100]


async def test_s14_a_commit_whose_answer_is_lost_is_not_made_again(kafka: servers.Kafka, topic: str, opened: Open):
    sink = await opened(kafka, topic)
    producer = await sink._cluster.producer()
    commit = producer.commit_transaction

    async def commit_and_lose_the_answer() -> None:
        await commit()
        raise KafkaError("injected: the connection broke")

    producer.commit_transaction = commit_and_lose_the_answer
    with pytest.raises(NotConnected, match="injected"):
        await sink.write(records(*range(100)))
    await retry(sink, records(*range(100)))
    await retry(sink, records(*range(100, 120)))
    assert sorted(await committed(kafka, topic)) == list(range(120))


async def test_a_commit_that_failed_is_made_again(kafka: servers.Kafka, topic: str, opened: Open):
    sink = await opened(kafka, topic)
    producer = await sink._cluster.producer()

    async def fail() -> None:
        raise KafkaError("injected: nobody answers")

    producer.commit_transaction = fail
    with pytest.raises(NotConnected, match="injected"):
        await sink.write(records(*range(100)))
    await retry(sink, records(*range(100)))
    assert sorted(await committed(kafka, topic)) == list(range(100))


async def test_who_comes_later_takes_the_place_and_nothing_is_twice(kafka: servers.Kafka, topic: str, opened: Open):
    """Two workers of one sink, as after a restart that the older one outlived: each fences the other."""
    one, two = await opened(kafka, topic), await opened(kafka, topic)
    for start in range(0, 100, 20):
        await retry(one, records(*range(start, start + 10)))
        await retry(two, records(*range(start + 10, start + 20)))
    assert sorted(await committed(kafka, topic)) == list(range(100))


async def test_a_check_does_not_take_the_place_of_the_sink_that_runs(kafka: servers.Kafka, topic: str, opened: Open):
    """`isthmus check --connect` opens a sink of its own beside it."""
    running, beside = await opened(kafka, topic), await opened(kafka, topic)
    await running.write(records(1))
    producer = await running._cluster.producer()
    await beside.check()
    await running.write(records(2))
    assert await running._cluster.producer() is producer
    assert sorted(await committed(kafka, topic)) == [1, 2]


async def test_somebody_who_takes_the_place_again_and_again_is_an_alarm(
    kafka: servers.Kafka, topic: str, opened: Open, monkeypatch: pytest.MonkeyPatch
):
    sink, rival = await opened(kafka, topic), await opened(kafka, topic)
    await rival.write(records(999))
    begin = sink._transactions._notes.part

    async def late(*arguments: Any) -> Any:
        rival._cluster.discard(await rival._cluster.producer())
        await rival._cluster.producer()
        return await begin(*arguments)

    monkeypatch.setattr(sink._transactions._notes, "part", late)
    with pytest.raises(Fatal, match="transactional_id"):
        await sink.write(records(1))
    monkeypatch.undo()
    await retry(sink, records(1))
    assert sorted(await committed(kafka, topic)) == [1, 999]


async def test_s07_a_record_that_is_too_large_fails_alone(kafka: servers.Kafka, topic: str, opened: Open):
    sink = await opened(kafka, topic, partitions=1, compression="none")
    batch = records(*range(60), clients=1)
    batch[40] = Record("t", bytes(2 << 20), clientid="dev-0", msgid=f"{40:032x}")
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert list(failed.value.failed) == [40]
    assert await committed(kafka, topic) == [n for n in range(60) if n != 40]
    with pytest.raises(BatchFailed) as failed:  # it had not been buried yet when the worker died
        await (await opened(kafka, topic, partitions=1, compression="none")).write(batch)
    assert list(failed.value.failed) == [40]
    assert len(await committed(kafka, topic)) == 59


async def test_s07_refused_records_are_found_by_halves_and_order_is_kept(
    kafka: servers.Kafka, topic: str, opened: Open
):
    """A compacted topic refuses a record without key, and with it the whole batch (error 87)."""
    configs = {"cleanup.policy": "compact"}
    sink = await opened(kafka, topic, 1, configs=configs, key="${payload.k}", value="${payload.n}")
    batch = [Record("t", b'{"n": %d, "k": "k%d"}' % (n, n), msgid=f"{n:032x}") for n in range(64)]
    for n in (20, 63):
        batch[n] = Record("t", b'{"n": %d}' % n, msgid=f"{n:032x}")
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert sorted(failed.value.failed) == [20, 63]
    assert await committed(kafka, topic) == [n for n in range(64) if n not in (20, 63)]
    await sink.write([Record("t", b'{"n": 64, "k": "k"}', msgid=f"{64:032x}")])
    assert (await committed(kafka, topic))[-1] == 64


async def test_a_record_without_an_id_is_sent_each_time(kafka: servers.Kafka, topic: str, opened: Open):
    """A foreign broker gives messages none, so nobody can know them again."""
    sink = await opened(kafka, topic)
    for _ in range(2):
        await sink.write([Record("t", b"1")])
    assert await committed(kafka, topic) == [1, 1]


async def test_s12_a_missing_progress_topic_is_named(kafka: servers.Kafka, topic: str, opened: Open):
    sink = await opened(kafka, topic, progress_topic=f"{topic}-nowhere")
    with pytest.raises(Fatal, match=f"{topic}-nowhere"):
        await sink.check()
    with pytest.raises(NotConnected, match=f"{topic}-nowhere"):
        await sink.write(records(1))
    await kafka.create_topic(f"{topic}-nowhere", 1, {"cleanup.policy": "compact"})
    await retry(sink, records(1))
    assert await committed(kafka, topic) == [1]


async def test_the_newest_note_is_found_behind_those_of_others(kafka: servers.Kafka, topic: str, opened: Open):
    await (await opened(kafka, topic)).write(records(*range(10)))
    noisy = await opened(kafka, topic, transactional_id=f"other-{topic}")
    for n in range(100, 140):  # a transaction's end takes a place in the log, too
        await noisy.write(records(n))
    await (await opened(kafka, topic)).write(records(*range(12)))
    assert sorted(await committed(kafka, topic)) == [*range(12), *range(100, 140)]


def test_what_transactions_cannot_do_is_refused():
    base = {"servers": ["a:1"], "filters": ["#"], "topic": "t", "transactional_id": "x"}
    with pytest.raises(ValidationError, match="lanes = 1"):
        KafkaConfig.model_validate({**base, "lanes": 2})
    with pytest.raises(ValidationError, match="max_records"):
        KafkaConfig.model_validate({**base, "batch": {"max_records": 50_000}})
    KafkaConfig.model_validate(base)


# --- Kafka that stops


@pytest.fixture
def own(start_kafka: Callable[..., servers.Kafka]) -> Iterator[servers.Kafka]:
    return start_kafka()


@pytest.mark.timeout(180)
async def test_s10_killed_brokers_lose_nothing_and_double_nothing(own: servers.Kafka, topic: str, opened: Open):
    sink = await opened(own, topic, request_timeout="5s")
    wrote = asyncio.Event()

    async def write_all() -> None:
        for start in range(0, 20_000, 200):
            await retry(sink, records(*range(start, start + 200), clients=5))
            wrote.set()

    writing = asyncio.create_task(write_all())
    for _ in range(2):
        wrote.clear()
        await asyncio.wait_for(wrote.wait(), 40)
        await asyncio.sleep(0.3)
        own.kill()
        await asyncio.to_thread(own.start)
    await asyncio.wait_for(writing, 90)
    found = await own.everything(topic, committed=True)
    assert len(found) == 20_000
    for client in range(5):
        assert [int(r.value) for r in found if r.key == b"dev-%d" % client] == list(range(client, 20_000, 5))


@pytest.mark.timeout(180)
async def test_s02_a_restart_that_swallows_the_ends_of_a_commit_loses_nothing_and_doubles_nothing(
    own: servers.Kafka, topic: str, opened: Open, monkeypatch: pytest.MonkeyPatch
):
    """Kafka leaves them out where a partition has no leader while its coordinator starts, which is about every other
    time when it is stopped right after the commit; the sink has not called the batch stored then."""
    settled = Unfinished.settled
    sink = await opened(own, topic, request_timeout="10s")
    for start in range(0, 40, 10):

        async def stopped(*arguments: Any) -> None:
            own.stop()  # without a thread: the sink waits for five seconds at most, and Kafka is started again then
            raise TimeoutError

        monkeypatch.setattr(Unfinished, "settled", stopped)
        with pytest.raises(NotConnected):
            await sink.write(records(*range(start, start + 10)))
        monkeypatch.setattr(Unfinished, "settled", settled)
        await asyncio.to_thread(own.start)
        await retry(sink, records(*range(start, start + 10)))
        assert sorted(await committed(own, topic)) == list(range(start + 10))


async def test_close_is_bounded_in_the_middle_of_a_transaction(own: servers.Kafka, topic: str, opened: Open):
    sink = await opened(own, topic, request_timeout="2s")
    await retry(sink, records(0))
    own.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(NotConnected):
            await sink.write(records(1))
        assert time.monotonic() - began < 15
        began = time.monotonic()
        await sink.close()
        assert time.monotonic() - began < 10
    finally:
        own.thaw()
