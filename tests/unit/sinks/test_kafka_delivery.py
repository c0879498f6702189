"""What follows from each of Kafka's answers. A scripted producer answers; its batches are the driver's own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from aiokafka import errors
from aiokafka.producer.message_accumulator import BatchBuilder
from pydantic import ValidationError

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks._kafka_client import _SILENT
from sinks._kafka_delivery import _LOOK_EVERY, _LOOK_WITHIN
from sinks._kafka_errors import Verdict, about_topic, describe, refusal, verdict
from sinks.kafka import Kafka, KafkaConfig

OK = None
NEVER = object()


class Producer:
    """Answers the batches of a partition from its script, then with success. Stores what it answered well."""

    def __init__(self, script: dict[int, Iterable[Any]]) -> None:
        self.script = {partition: deque(answers) for partition, answers in script.items()}
        self.stored: list[tuple[int, list[bytes]]] = []
        self.sent: list[tuple[int, int]] = []
        self.pending: list[tuple[int, list[bytes], asyncio.Future[Any]]] = []
        self._open: dict[BatchBuilder, list[bytes]] = {}

    def create_batch(self) -> BatchBuilder:
        builder = BatchBuilder(1 << 20, 0)
        values: list[bytes] = []
        self._open[builder] = values
        append = builder.append

        def remember(**record: Any) -> Any:
            answer = append(**record)
            if answer is not None:
                values.append(record["value"])
            return answer

        builder.append = remember
        return builder

    async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
        answers = self.script.get(partition)
        answer = answers.popleft() if answers else OK
        if isinstance(answer, errors.ProducerClosed):
            raise answer
        values = self._open.pop(batch)
        self.sent.append((partition, len(values)))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if callable(answer):
            answer = answer(values)
        if answer is NEVER:
            self.pending.append((partition, values, future))
        elif answer is OK:
            self.stored.append((partition, values))
            future.set_result(None)
        else:
            future.set_exception(answer)
        return future

    def answer_pending(self, error: Exception | None = None) -> None:
        for partition, values, future in self.pending:
            if error is None:
                self.stored.append((partition, values))
                future.set_result(None)
            else:
                future.set_exception(error)
        self.pending.clear()


class Cluster:
    """Hands out the producers of a list, one after the other is discarded."""

    def __init__(self, *producers: Producer, partitions: int = 2, reachable: bool = True) -> None:
        self.producers = list(producers)
        self.discarded: list[Producer] = []
        self.count = partitions
        self.reachable = reachable

    async def producer(self) -> Producer:
        return self.producers[0]

    def discard(self, producer: Producer) -> None:
        if self.producers[0] is producer:
            self.discarded.append(self.producers.pop(0))

    async def partitions(self, producer: Producer, topic: str) -> int:
        return self.count

    async def look(self, producer: Producer, timeout: float) -> None:
        if not self.reachable:
            raise NotConnected("no broker")


def sink_on(cluster: Cluster, **keys: Any) -> Kafka:
    sink = Kafka(KafkaConfig.model_validate({"servers": ["127.0.0.1:1"], "filters": ["#"], "topic": "t", **keys}))
    sink._cluster = cluster  # type: ignore[assignment]
    return sink


def records(*numbers: int) -> list[Record]:
    """Record n goes to partition n mod 2 when `key` is chosen by hand below."""
    return [Record("t", b"%d" % n, clientid="dev", msgid=f"{n:032x}") for n in numbers]


def stored(*producers: Producer) -> list[int]:
    return [int(value) for producer in producers for _, values in producer.stored for value in values]


def poison(*values: bytes) -> Callable[[list[bytes]], Exception | None]:
    return lambda sent: errors.kafka_errors[87]() if set(values) & set(sent) else OK


@pytest.mark.parametrize(
    "error", [errors.OutOfOrderSequenceNumber(), errors.UnknownProducerId(), errors.ProducerFenced()]
)
async def test_a_producer_that_lost_its_place_is_replaced_and_the_batch_sent_again(error: Exception):
    first, second = Producer({0: [error]}), Producer({})
    cluster = Cluster(first, second, partitions=1)
    await sink_on(cluster).write(records(1, 2, 3))
    assert cluster.discarded == [first]
    assert stored(second) == [1, 2, 3]


async def test_only_what_failed_is_sent_again():
    first, second = Producer({1: [errors.OutOfOrderSequenceNumber()]}), Producer({})
    await sink_on(Cluster(first, second), partition="round_robin").write(records(*range(10)))
    assert sorted(stored(first, second)) == list(range(10))
    assert len(stored(second)) == 5


async def test_a_producer_another_lane_gave_up_is_left_at_once():
    first, second = Producer({0: [errors.ProducerClosed()]}), Producer({})
    await sink_on(Cluster(first, second, partitions=1)).write(records(1, 2))
    assert stored(first, second) == [1, 2]


async def test_a_cluster_that_never_takes_our_order_is_not_asked_for_ever():
    producers = [Producer({0: [errors.OutOfOrderSequenceNumber()]}) for _ in range(30)]
    with pytest.raises(NotConnected, match="out of order"):
        await sink_on(Cluster(*producers, partitions=1)).write(records(1))
    assert sum(len(producer.sent) for producer in producers) < 15


@pytest.mark.parametrize(
    "error",
    [
        errors.TopicAuthorizationFailedError("t"),
        errors.PolicyViolationError(),
        errors.ClusterAuthorizationFailedError(),
    ],
)
async def test_a_refusal_of_the_configuration_is_fatal(error: Exception):
    first, second = Producer({0: [error]}), Producer({})
    cluster = Cluster(first, second, partitions=1)
    with pytest.raises(Fatal, match="Kafka topic t"):
        await sink_on(cluster).write(records(1))
    assert cluster.discarded == [first]


@pytest.mark.parametrize(
    "error",
    [
        errors.NotEnoughReplicasError(),
        errors.NotLeaderForPartitionError(),
        errors.KafkaError("x"),
        errors.UnknownError(),
        errors.kafka_errors[89](),
        errors.CorruptRecordException(),
    ],
)
async def test_anything_else_comes_again_and_what_was_stored_is_not_sent_twice(error: Exception):
    first, second = Producer({1: [error]}), Producer({})
    sink = sink_on(Cluster(first, second), partition="round_robin")
    batch = records(*range(10))
    with pytest.raises(NotConnected):
        await sink.write(batch)
    await sink.write(batch)
    assert sorted(stored(first, second)) == list(range(10))
    assert sink._unsettled == {}


async def test_one_poisonous_record_is_found_and_order_is_kept():
    bad = poison(b"61")
    producers = [Producer({0: [bad] * 50}) for _ in range(50)]
    with pytest.raises(BatchFailed) as failed:
        await sink_on(Cluster(*producers, partitions=1)).write(records(*range(100)))
    assert list(failed.value.failed) == [61]
    assert "87" in failed.value.failed[61]
    assert stored(*producers) == [n for n in range(100) if n != 61]
    assert sum(len(producer.sent) for producer in producers) < 30


async def test_every_record_poisonous_is_every_record_refused():
    """S-08."""
    producers = [Producer({0: [poison(*(b"%d" % n for n in range(8)))] * 50}) for _ in range(50)]
    with pytest.raises(BatchFailed) as failed:
        await sink_on(Cluster(*producers, partitions=1)).write(records(*range(8)))
    assert list(failed.value.failed) == list(range(8))
    assert stored(*producers) == []


async def test_the_answer_to_a_pending_batch_is_awaited_by_later_writes():
    producer = Producer({0: [NEVER]})
    sink = sink_on(Cluster(producer, partitions=1), request_timeout="100ms")
    for _ in range(2):
        with pytest.raises(NotConnected, match="on their way"):
            await sink.write(records(1, 2, 3))
    assert producer.sent == [(0, 3)]
    producer.answer_pending()
    await sink.write(records(2, 3, 4))  # cut differently
    assert stored(producer) == [1, 2, 3, 4]


async def test_a_pending_batch_that_fails_after_all_is_sent_again():
    first, second = Producer({0: [NEVER]}), Producer({})
    sink = sink_on(Cluster(first, second, partitions=1), request_timeout="100ms")
    with pytest.raises(NotConnected):
        await sink.write(records(1, 2))
    first.answer_pending(errors.NotLeaderForPartitionError())
    await sink.write(records(1, 2))
    assert stored(first, second) == [1, 2]


async def test_a_pending_record_that_turns_out_to_be_poison_is_refused_without_sending_it_again():
    first, second = Producer({0: [NEVER]}), Producer({})
    sink = sink_on(Cluster(first, second, partitions=1), request_timeout="100ms")
    with pytest.raises(NotConnected):
        await sink.write(records(1))
    first.answer_pending(errors.MessageSizeTooLargeError())
    with pytest.raises(BatchFailed) as failed:
        await sink.write(records(1, 2))
    assert list(failed.value.failed) == [0]
    assert stored(first, second) == [2]


async def test_records_without_a_message_id_are_told_by_identity():
    producer = Producer({0: [NEVER]})
    sink = sink_on(Cluster(producer, partitions=1), request_timeout="100ms")
    batch = [Record("t", b"1"), Record("t", b"1")]
    with pytest.raises(NotConnected):
        await sink.write(batch)
    producer.answer_pending()
    await sink.write([*batch, Record("t", b"2")])
    assert stored(producer) == [1, 1, 2]


async def test_an_unreachable_cluster_is_told_before_the_timeout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sinks._kafka_delivery._LOOK_EVERY", 0.02)
    sink = sink_on(Cluster(Producer({0: [NEVER]}), partitions=1, reachable=False), request_timeout="20s")
    async with asyncio.timeout(2):
        with pytest.raises(NotConnected, match="no broker"):
            await sink.write(records(1))


async def test_a_record_that_cannot_be_rendered_fails_alone():
    producer = Producer({})
    sink = sink_on(Cluster(producer, partitions=1), timestamp="${payload.at}")
    batch = [Record("t", payload) for payload in (b'{"at": 1}', b'{"at": "never"}', b'{"at": 2}')]
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert list(failed.value.failed) == [1]
    assert producer.sent == [(0, 2)]


def test_errors_the_driver_does_not_know_keep_their_number():
    assert "87" in describe(errors.for_code(87)())
    assert verdict(errors.for_code(87)()) is Verdict.POISON
    assert errors.for_code(89)().retriable


async def test_s25_a_record_without_its_value_fails_alone():
    """S-25: not a null, which would delete what a compacted topic holds under its key."""
    producer = Producer({})
    sink = sink_on(Cluster(producer, partitions=1), value="${payload.v}")
    with pytest.raises(BatchFailed) as failed:
        await sink.write([Record("t", payload) for payload in (b'{"v": 1}', b'{"w": 1}', b"no json", b'{"v": 2}')])
    assert failed.value.failed == dict.fromkeys((1, 2), "cannot be rendered for Kafka: ${payload.v} has no value")
    assert producer.stored == [(0, [b"1", b"2"])]


async def test_s16_a_cluster_is_not_asked_longer_than_silence_lasts(monkeypatch: pytest.MonkeyPatch):
    """S-16: an answer may take as long as it is told to; a cluster that answers nothing at all is another matter."""
    monkeypatch.setattr("sinks._kafka_delivery._LOOK_EVERY", 0.02)
    asked: list[float] = []

    class Silent(Cluster):
        async def look(self, producer: Producer, timeout: float) -> None:
            asked.append(timeout)
            raise NotConnected("no answer")

    sink = sink_on(Silent(Producer({0: [NEVER]}), partitions=1), request_timeout="10m")
    with pytest.raises(NotConnected, match="no answer"):
        await sink.write(records(1))
    assert asked == [_LOOK_WITHIN]
    assert max(_LOOK_EVERY + _LOOK_WITHIN, _SILENT) < 15


@pytest.mark.parametrize(
    ("error", "outcome", "words"),
    [
        (None, Fatal, "has no topic 't', or we may not see it"),
        (errors.UnknownTopicOrPartitionError, Fatal, "has no topic 't'"),
        (errors.TopicAuthorizationFailedError, Fatal, "does not let us write to topic 't'"),
        (errors.InvalidTopicError, Fatal, "InvalidTopic"),
        (errors.LeaderNotAvailableError, NotConnected, "LeaderNotAvailable"),
        (errors.NoError, type(None), "None"),
    ],
)
def test_s12_what_the_cluster_says_of_a_topic_decides_what_follows(
    error: type[errors.KafkaError] | None, outcome: type, words: str
):
    """S-12."""
    reason = about_topic("t", error)
    assert type(reason) is outcome
    assert words in str(reason)


def test_why_a_connection_was_refused_decides_what_follows():
    assert isinstance(refusal("h:1", errors.SaslAuthenticationFailed("no")), Fatal)
    assert isinstance(refusal("h:1", ConnectionRefusedError(111, "refused")), NotConnected)
    assert "does not answer" in str(refusal("h:1", TimeoutError()))


@pytest.mark.parametrize(
    "keys",
    [
        {"topic": "t-${clientid}"},
        {"topic": ""},
        {"partition": -1},
        {"partition": True},
        {"partition": "random"},
        {"servers": []},
        {"servers": ["no-port"]},
        {"key": "${nothing}"},
        {"headers": {"x": "${payload"}},
        {"compression": "brotli"},
        {"acks": "leader"},
        {"acks": 1, "idempotent": False},
        {"transactional_id": "t", "idempotent": False},
        {"transactional_id": "t", "acks": "none", "idempotent": False},
        {"sasl": {"mechanism": "plain", "username": "u"}},
        {"sasl": {"mechanism": "oauthbearer"}},
        {"sasl": {"mechanism": "gssapi", "username": "u", "password": "p"}},
        {"tls": {"verifi": False}},
        {"request_timeout": "1ms"},
    ],
)
def test_a_wrong_configuration_is_refused(keys: dict[str, Any]):
    with pytest.raises(ValidationError):
        KafkaConfig.model_validate({"servers": ["127.0.0.1:1"], "filters": ["#"], "topic": "t", **keys})


def test_a_right_configuration_is_taken_and_hides_its_secrets():
    config = KafkaConfig.model_validate(
        {
            "servers": ["a:1", "[::1]:2"], "filters": ["#"], "topic": "t-${topic[0]}", "allowed_topics": ["t-a"],
            "partition": 3,
            "headers": {"x": "${clientid}"}, "tls": True, "sasl": {"username": "u", "password": "hidden-word"},
        }
    )  # fmt: skip
    assert config.partition == 3
    assert "hidden-word" not in repr(config) + config.model_dump_json()
