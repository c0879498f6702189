"""What becomes of a transaction after each of Kafka's answers. A scripted producer answers and keeps the notes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import Any

import pytest
from aiokafka import errors

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks._kafka_layout import Layout
from sinks._kafka_notes import Note, Notes, decode, encode
from sinks._kafka_transactions import Transactions
from sinks._kafka_unfinished import Unfinished
from sinks.kafka import Kafka, KafkaConfig
from tests.unit.sinks.test_kafka_delivery import Cluster, Producer, poison, records, stored


class Transactional(Producer):
    """Shows what was committed; partition 0 holds the records, the note is told apart by its topic."""

    def __init__(self, script: dict[int, Iterable[Any]] | None = None, commit: Exception | None = None) -> None:
        super().__init__(script or {})
        self.committed: list[int] = []
        self.notes: list[list[str]] = []
        self.ended: list[str] = []
        self._commit = commit
        self._note: list[str] = []

    async def begin_transaction(self) -> None:
        self.stored.clear()

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
        if topic == "t":
            return await super().send_batch(batch, topic, partition=partition)
        [note] = self._open.pop(batch)
        self._note = decode(note).ids
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def commit_transaction(self) -> None:
        if self._commit is not None:
            error, self._commit = self._commit, None
            raise error
        self.committed += stored(self)
        self.notes.append(self._note)
        self.ended.append("committed")

    async def abort_transaction(self) -> None:
        self.ended.append("aborted")


class Noted(Cluster):
    """Its producers' newest note is what the next one reads."""

    def __init__(self, *producers: Transactional) -> None:
        super().__init__(*producers, partitions=1)
        self.all = producers

    @property
    def committed(self) -> list[int]:
        return [number for producer in self.all for number in producer.committed]

    @property
    def notes(self) -> list[list[str]]:
        return [note for producer in self.all for note in producer.notes]


@pytest.fixture(autouse=True)
def _read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes are those of the producers, and every transaction has its ends."""

    async def read(notes: Notes, producer: Any) -> list[str]:
        found = notes._cluster.notes  # type: ignore[attr-defined]
        return list(found[-1]) if found else []

    async def last(notes: Notes, producer: Any) -> None:
        return None

    async def find(unfinished: Unfinished, producer: Any, places: Any) -> dict[Any, int]:
        return {}

    monkeypatch.setattr(Notes, "read", read)
    monkeypatch.setattr(Notes, "last", last)
    monkeypatch.setattr(Unfinished, "_find", find)


def opened(cluster: Noted, timeout: float = 5) -> Transactions:
    config = KafkaConfig.model_validate({"servers": ["127.0.0.1:1"], "filters": ["#"], "topic": "t"})
    layout: Layout = Kafka(config)._layout
    notes = Notes(cluster, "progress", "id", timeout)  # type: ignore[arg-type]
    return Transactions(cluster, layout, notes, timeout)  # type: ignore[arg-type]


def ids(*numbers: int) -> list[str]:
    return [f"{n:032x}" for n in numbers]


def test_a_note_is_read_as_it_was_written_and_foreign_ones_are_none():
    some = Note([os.urandom(16).hex() for _ in range(1000)], {("t", 0): 7, ("other", 31): 1 << 40})
    assert decode(encode(some)) == some
    assert decode(encode(Note())) == Note()
    mangled = (encode(some)[:-1], b"\x02" + bytes(16), b"\x02" + bytes(20))
    for foreign in (b"", bytes(3), b"\x01" + bytes(16), b'{"offset": 7}', *mangled):
        assert decode(foreign) == Note()


async def test_a_note_holds_this_write_and_the_one_before():
    cluster = Noted(Transactional())
    sink = opened(cluster)
    for batch in (records(1, 2), records(3), records(4, 5)):
        await sink.write(batch)
    assert cluster.notes == [ids(1, 2), ids(1, 2, 3), ids(3, 4, 5)]


async def test_what_comes_again_in_pieces_is_remembered_until_something_new_comes():
    """The first batch after a start may hold but a part of what was stored before it."""
    cluster = Noted(first := Transactional())
    await opened(cluster).write(records(*range(10)))
    successor = opened(cluster)
    for piece in (records(0, 1), records(2, 3, 4)):
        await successor.write(piece)
    assert first.ended == ["committed"], "nothing new, no transaction"
    await successor.write(records(5, 6, 7, 8, 9, 10))
    await successor.write(records(11))
    assert cluster.committed == list(range(12))
    assert cluster.notes[-1] == ids(5, 6, 7, 8, 9, 10, 11)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.TopicAuthorizationFailedError("t"), Fatal),
        (errors.PolicyViolationError(), Fatal),
        (errors.NotLeaderForPartitionError(), NotConnected),
        (errors.kafka_errors[89](), NotConnected),
        (errors.KafkaError("Unexpected error during batch delivery"), NotConnected),
    ],
)
async def test_what_is_no_records_fault_ends_the_transaction(error: Exception, outcome: type[Exception]):
    first, second = Transactional({0: [error]}), Transactional()
    cluster = Noted(first, second)
    sink = opened(cluster)
    with pytest.raises(outcome, match="topic t"):
        await sink.write(records(1, 2))
    assert first.ended == ["aborted"]
    assert cluster.discarded == [first]
    await sink.write(records(1, 2))
    assert cluster.committed == [1, 2]


@pytest.mark.parametrize("error", [errors.OutOfOrderSequenceNumber(), errors.ProducerFenced(), errors.ProducerClosed()])
async def test_a_spent_producer_is_replaced_in_the_same_write(error: Exception):
    cluster = Noted(Transactional({0: [error]}), Transactional())
    await opened(cluster).write(records(1, 2))
    assert cluster.committed == [1, 2]


async def test_being_fenced_at_the_end_is_no_commit():
    cluster = Noted(Transactional(commit=errors.ProducerFenced()), Transactional())
    await opened(cluster).write(records(1, 2))
    assert cluster.committed == [1, 2]


async def test_being_replaced_for_ever_is_an_alarm():
    cluster = Noted(*(Transactional({0: [errors.ProducerFenced()]}) for _ in range(10)))
    with pytest.raises(Fatal, match="transactional_id"):
        await opened(cluster).write(records(1))
    assert len(cluster.discarded) < 6


async def test_s07_refused_records_are_found_and_the_rest_stays_in_order():
    script = poison(b"20", b"21", b"63")
    cluster = Noted(*(Transactional({0: [script] * 50}) for _ in range(60)))
    with pytest.raises(BatchFailed) as failed:
        await opened(cluster).write(records(*range(64)))
    assert sorted(failed.value.failed) == [20, 21, 63]
    assert cluster.committed == [n for n in range(64) if n not in (20, 21, 63)]
    assert sorted(cluster.notes[-1]) == ids(*(n for n in range(64) if n not in (20, 21, 63)))


async def test_what_cannot_be_rendered_costs_no_other_record():
    cluster = Noted(Transactional())
    sink = opened(cluster)
    sink._layout.value = lambda record: b"%d" % int(record.payload)
    with pytest.raises(BatchFailed) as failed:
        await sink.write([*records(1), Record("t", b"no number", msgid=ids(2)[0]), *records(3)])
    assert list(failed.value.failed) == [1]
    assert cluster.committed == [1, 3]
    assert cluster.notes == [ids(1, 3)]


async def test_a_cancelled_write_is_left_to_the_next_producer():
    first, second = Transactional(), Transactional()

    async def hang() -> None:
        await asyncio.Event().wait()

    first.commit_transaction = hang  # type: ignore[method-assign]
    cluster = Noted(first, second)
    sink = opened(cluster)
    writing = asyncio.create_task(sink.write(records(1)))
    await asyncio.sleep(0.05)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert (first.ended, cluster.discarded) == ([], [first])
    await sink.write(records(1))
    assert cluster.committed == [1]


async def test_a_commit_without_an_answer_is_told_within_the_bound():
    first = Transactional()

    async def hang() -> None:
        await asyncio.Event().wait()

    first.commit_transaction = hang  # type: ignore[method-assign]
    with pytest.raises(NotConnected, match="did not end well"):
        await opened(Noted(first, Transactional()), timeout=0.1).write(records(1))


# --- records of one id, as an idempotency_key gives them to repetitions


def repeated(*pairs: tuple[int, int]) -> list[Record]:
    """(number, id) each."""
    return [Record("t", b"%d" % n, clientid="dev", msgid=f"{ident:032x}") for n, ident in pairs]


async def test_of_records_with_one_id_the_first_is_stored_and_none_fails():
    cluster = Noted(Transactional())
    sink = opened(cluster)
    await sink.write(repeated((1, 7), (2, 7), (3, 8), (4, 7)))
    assert (cluster.committed, cluster.notes) == ([1, 3], [ids(7, 8)])
    await sink.write(repeated((5, 8), (6, 9)))
    await sink.write(repeated((10, 8)))
    assert cluster.committed == [1, 3, 6], "the batch before is known"
    successor = opened(cluster)
    await successor.write(repeated((2, 7), (4, 7), (11, 10), (12, 10)))
    await successor.write(repeated((13, 7), (14, 8)))
    assert cluster.committed == [1, 3, 6, 11, 14], "8 was two batches ago"


async def test_the_next_of_an_id_takes_the_place_of_one_that_kafka_refuses():
    cluster = Noted(*(Transactional({0: [poison(b"1", b"5")] * 20}) for _ in range(20)))
    with pytest.raises(BatchFailed) as failed:
        await opened(cluster).write(repeated((1, 7), (2, 7), (3, 8), (4, 7), (5, 9)))
    assert sorted(failed.value.failed) == [0, 4]
    assert cluster.committed == [2, 3]
    assert sorted(cluster.notes[-1]) == ids(7, 8)


async def test_the_next_of_an_id_takes_the_place_of_one_that_cannot_be_rendered():
    cluster = Noted(Transactional())
    sink = opened(cluster)
    sink._layout.value = lambda record: b"%d" % int(record.payload)
    with pytest.raises(BatchFailed) as failed:
        await sink.write([Record("t", b"no number", msgid=ids(7)[0]), *repeated((2, 7), (3, 8), (4, 7))])
    assert list(failed.value.failed) == [0]
    assert cluster.committed == [3, 2]
    await sink.write(repeated((5, 7), (6, 8)))
    assert cluster.committed == [3, 2]


async def test_whatever_is_refused_each_id_is_stored_once_and_each_record_settled():
    bad = {0, 1, 17, 20, 40, 41, 57, 60, 63}
    script = poison(*(b"%d" % n for n in bad))
    spent = Transactional({0: [errors.OutOfOrderSequenceNumber()]})
    cluster = Noted(spent, *(Transactional({0: [script] * 50}) for _ in range(90)))
    with pytest.raises(BatchFailed) as failed:
        await opened(cluster).write(repeated(*((n, n % 40) for n in range(64))))
    wanted = [next((n for n in (i, i + 40) if n < 64 and n not in bad), None) for i in range(40)]
    assert sorted(cluster.committed) == sorted(n for n in wanted if n is not None)
    assert set(failed.value.failed) == {n for n in bad if n < 40 or n - 40 in bad}, (
        "a repetition of a stored one is none"
    )
