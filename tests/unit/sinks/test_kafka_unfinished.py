"""Transactions without an end in some partition: which are ended how. A scripted Kafka answers DescribeProducers."""

from __future__ import annotations

from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from sinks._kafka_describe import DescribeProducers
from sinks._kafka_notes import Note
from sinks._kafka_part import Place
from sinks._kafka_unfinished import Unfinished

OURS, OTHERS = 7, 8
NOTES: Place = ("progress", 0)


class Kafka:
    """A producer and its cluster: `open` says where a transaction of whom is open since when."""

    def __init__(self, open: dict[Place, tuple[int, int]], leaders: dict[Place, int] | None = None) -> None:
        self.open = open
        self.leaders = leaders or {}
        self.errors: dict[Place, int] = {}
        self.ended: list[tuple[str, list[Place]]] = []
        self.asked: list[int] = []
        self.client = self
        self.cluster = self
        self._txn_manager = SimpleNamespace(
            producer_id=OURS, maybe_add_partition_to_txn=lambda place: self._added.append(tuple(place))
        )
        self._added: list[Any] = []

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return None if topic == "gone" else {0, 1}

    def leader_for_partition(self, place: TopicPartition) -> int:
        return self.leaders.get(tuple(place), 1)

    def add_topic(self, topic: str) -> None:
        """Nothing to learn."""

    async def force_metadata_update(self) -> bool:
        return True

    async def send(self, node: int, request: DescribeProducers) -> Any:
        self.asked.append(node)
        raw = request.prepare({61: (0, 0)})
        [sent, _] = type(raw).SCHEMA.decode(BytesIO(raw.encode()))
        topics = []
        for topic, numbers, _ in sent:
            described = []
            for number in numbers:
                place = (topic, number)
                found = [(*self.open[place][:1], 0, 0, 0, 0, self.open[place][1], {})] if place in self.open else []
                described.append((number, self.errors.get(place, 0), None, [*found, (OTHERS, 0, 0, 0, 0, 3, {})], {}))
            topics.append((topic, described, {}))
        answer = type(raw).RESPONSE_TYPE(0, topics, {})
        return type(raw).RESPONSE_TYPE.decode(BytesIO(answer.encode()))

    async def begin_transaction(self) -> None:
        self._added = []

    async def commit_transaction(self) -> None:
        self._end("committed")

    async def abort_transaction(self) -> None:
        self._end("aborted")

    def _end(self, how: str) -> None:
        self.ended.append((how, sorted(self._added)))
        for place in self._added:
            self.open.pop(place, None)


class Notes:
    """The last note, and whether what is decided of its transaction was committed."""

    place = NOTES

    def __init__(self, last: tuple[Note, int] | None, committed: bool = True) -> None:
        self._last = last
        self._committed = committed
        self.looked: list[Place] = []

    async def last(self, producer: Any) -> tuple[Note, int] | None:
        return self._last

    async def committed(self, producer: Any, places: dict[Place, int]) -> bool:
        self.looked = sorted(places)
        return self._committed if places else True


LAST = (Note(["00" * 16], {("t", 0): 10, ("t", 1): 20}), 5)


async def finished(kafka: Kafka, notes: Notes) -> Unfinished:
    unfinished = Unfinished(notes)  # type: ignore[arg-type]
    await unfinished.finish(kafka)  # type: ignore[arg-type]
    return unfinished


async def test_where_everything_has_its_end_nothing_is_done():
    kafka = Kafka({})
    await finished(kafka, Notes(LAST))
    await finished(kafka, Notes(None))
    assert kafka.ended == []


async def test_a_transaction_without_any_end_is_committed_for_its_note_was_the_last():
    kafka = Kafka({("t", 0): (OURS, 10), ("t", 1): (OURS, 20), NOTES: (OURS, 5)})
    await finished(kafka, notes := Notes(LAST))
    assert kafka.ended == [("committed", [NOTES, ("t", 0), ("t", 1)])]
    assert notes.looked == []


@pytest.mark.parametrize(("committed", "how"), [(True, "committed"), (False, "aborted")])
async def test_a_transaction_with_some_ends_gets_the_same_everywhere(committed: bool, how: str):
    kafka = Kafka({NOTES: (OURS, 5), ("t", 1): (OURS, 20)})
    await finished(kafka, notes := Notes(LAST, committed))
    assert kafka.ended == [(how, [NOTES, ("t", 1)])]
    assert notes.looked == [("t", 0)]


async def test_what_began_later_than_the_last_note_is_aborted_before_the_partition_is_used():
    """It never came to its note; to commit it would make records visible that come again."""
    kafka = Kafka({("t", 1): (OURS, 21)})
    unfinished = await finished(kafka, Notes(LAST))
    assert kafka.ended == []
    await unfinished.make_sound(kafka, {"t": 2})  # type: ignore[arg-type]
    assert kafka.ended == [("aborted", [("t", 1)])]
    asked = len(kafka.asked)
    await unfinished.make_sound(kafka, {"t": 2})  # type: ignore[arg-type]
    assert len(kafka.asked) == asked, "once for each producer"


async def test_transactions_of_others_are_theirs():
    kafka = Kafka({("t", 0): (OTHERS, 10)})
    unfinished = await finished(kafka, Notes(LAST))
    await unfinished.make_sound(kafka, {"t": 2})  # type: ignore[arg-type]
    await unfinished.settled(kafka, [("t", 0)])  # type: ignore[arg-type]
    assert kafka.ended == []


async def test_each_leader_is_asked_and_one_that_is_missing_is_waited_for():
    kafka = Kafka({}, {("t", 0): 1, ("t", 1): 2})
    await finished(kafka, Notes(LAST))
    assert sorted(kafka.asked) == [1, 2]
    kafka.leaders[("t", 1)] = -1
    with pytest.raises(KafkaError, match="no leader"):
        await finished(kafka, Notes(LAST))


async def test_a_topic_that_is_no_more_is_not_asked_for():
    await finished(kafka := Kafka({}), Notes((Note([], {("gone", 0): 3}), 5)))
    assert kafka.asked == [1]


async def test_who_may_not_ask_writes_all_the_same(caplog: pytest.LogCaptureFixture):
    kafka = Kafka({})
    kafka.errors[("t", 0)] = 29
    unfinished = await finished(kafka, Notes(LAST))
    await unfinished.settled(kafka, [("t", 0)])  # type: ignore[arg-type]
    assert caplog.text.count("does not tell") == 1
    kafka.errors[NOTES] = 6
    with pytest.raises(KafkaError):
        await finished(kafka, Notes(LAST))
