"""Messages become Kafka records, in order per key, each stored by all in-sync replicas before it is acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from pydantic import Field, field_validator, model_validator

from broker.config.template import Template
from broker.config.types import Address, Duration, Size
from broker.extend.record import RecordTemplate, compile_template
from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record, SinkConfig
from sinks._kafka_client import Cluster, Sasl, Tls
from sinks._kafka_errors import TOO_LARGE, Verdict, describe, verdict
from sinks._kafka_layout import Strategy, bytes_of, default_key, headers_of, partition_of, timestamp_of

_RESENDS = 3  # through a new producer each time, within one write
_LOOK_EVERY = 1.0  # seconds between two looks whether a cluster that owes us answers is there at all
_MOST_UNSETTLED = 262_144


class KafkaConfig(SinkConfig):
    """`[sinks.kafka]`"""

    servers: tuple[Address, ...] = Field(min_length=1)
    """Brokers to ask for the others, `host:port`."""
    topic: RecordTemplate
    """Kafka topic. With placeholders it needs `allowed_topics`."""
    allowed_topics: frozenset[str] = frozenset()
    """Topics that a `topic` with placeholders may name; a record for any other is a dead letter."""
    key: RecordTemplate | None = None
    """Key of a record; `${clientid}` if it is not given, `${topic}` where nobody vouches for a client id."""
    value: RecordTemplate = Template("${payload}")
    """Value of a record: the bytes as they came; `${.}` is a JSON envelope. A missing value is a null."""
    headers: bool | dict[str, RecordTemplate] = True
    """`true`: `mqtt-topic`, `mqtt-clientid`, `mqtt-username`, `mqtt-qos`, `mqtt-retain`, `mqtt-msgid`, what of
    `mqtt-content-type`, `mqtt-response-topic`, `mqtt-correlation-data` was sent, and the user properties;
    `false`: none; a table of templates: exactly those."""
    timestamp: RecordTemplate = Template("${ts}")
    """Milliseconds since 1970; the time of sending if there is no value."""
    partition: Strategy | int = Field(default="key", union_mode="left_to_right")
    """`key` (as Java's producers do) | `topic_hash` | `round_robin` | `sticky` (one for each batch) | a number."""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "zstd"
    """How batches are compressed: none | gzip | snappy | lz4 | zstd."""
    max_batch_bytes: Size | None = Field(default=None, ge=1024, le=1 << 30)
    """Bytes of one batch for one partition before compression; 896 KB uncompressed, 2 MB compressed if not given.
    A topic that takes less is found out."""
    sasl: Sasl | None = None
    """Who we are: `{ mechanism = "scram-sha-512", username = "…", password = "${file:…}" }`."""
    tls: bool | Tls = False
    """`true`, or `{ ca = "…", certificate = "…", key = "…" }`."""
    request_timeout: Duration = Field(default=30.0, ge=0.1)
    """Seconds the cluster has for an answer. A batch without one is not sent again, its answer is awaited."""

    @field_validator("partition")
    @classmethod
    def _partition_exists(cls, partition: Strategy | int) -> Strategy | int:
        if isinstance(partition, int) and (isinstance(partition, bool) or partition < 0):
            raise ValueError("a partition's number is 0 or more")
        return partition

    @model_validator(mode="after")
    def _topics_are_known(self) -> KafkaConfig:
        if self.topic.names and not self.allowed_topics:
            raise ValueError("a topic with placeholders needs allowed_topics: a publisher could name any topic")
        if not self.topic.names and not self.topic.literal:
            raise ValueError("topic must not be empty")
        return self


class _Part:
    """What one write sends to one partition at once, and how that ended."""

    __slots__ = ("append", "batch", "full", "future", "partition", "positions", "producer", "records", "size", "topic")

    def __init__(self, producer: AIOKafkaProducer, topic: str, partition: int) -> None:
        self.producer = producer
        self.topic = topic
        self.partition = partition
        self.batch = producer.create_batch()
        self.append = self.batch.append
        self.full = False
        self.positions: list[int] = []
        self.records: list[Record] = []
        self.size = 0
        self.future: asyncio.Future[Any]

    def error(self) -> BaseException | None:
        return asyncio.CancelledError() if self.future.cancelled() else self.future.exception()

    @property
    def refused(self) -> str | None:
        """Why its only record can never be stored; None otherwise."""
        error = self.error() if self.future.done() and len(self.positions) == 1 else None
        poison = error is not None and verdict(error) is Verdict.POISON
        return f"Kafka topic {self.topic}: {describe(error)}" if error is not None and poison else None

    @property
    def settled(self) -> bool:
        """Whether sending its records again would be wrong: stored, refused, or nobody knows yet."""
        return not self.future.done() or self.error() is None or self.refused is not None


class Kafka:
    """Sends a batch as one Kafka batch per partition and waits for all of them.

    Theory of operation. A write goes in rounds: each sends at most one batch to each partition and waits. Records that
    did not fit, and those of a batch that must be taken apart, are left for the next round, so order is kept. An
    idempotent producer never gives a batch up: after `request_timeout` (or when no broker can be reached) the write
    ends with NotConnected, but the batch is still on its way. It is remembered by its records' message ids, and when
    they come again its answer is awaited instead of sending them twice. A batch that failed leaves a hole in its
    producer's sequence numbers, so that producer is replaced.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._timeout = config.request_timeout
        none = config.compression == "none"
        self._limit = config.max_batch_bytes or (896 << 10 if none else 2 << 20)
        tls = Tls() if config.tls is True else config.tls or None
        self._cluster = Cluster(
            [str(server) for server in config.servers], config.sasl, tls, config.request_timeout,
            client_id=f"isthmus-{config.name}", max_batch_size=self._limit,
            compression_type=None if none else config.compression,
        )  # fmt: skip
        self._topic = config.topic.literal
        self._topic_of = compile_template(config.topic)
        self._key = default_key if config.key is None else bytes_of(config.key)
        self._value = bytes_of(config.value)
        self._timestamp = timestamp_of(config.timestamp)
        self._headers = headers_of(config.headers)
        self._partition = partition_of(config.partition)
        self._limits: dict[str, int] = {}
        """Bytes a topic turned out to take at once, where that is less than `_limit`."""
        self._unsettled: dict[str | int, _Part] = {}

    async def write(self, batch: Sequence[Record]) -> None:
        failed: dict[int, str] = {}
        todo: Sequence[int] = range(len(batch))
        if self._unsettled:
            todo = await self._resume(batch, failed)
        sent: list[_Part] = []
        rooms: dict[tuple[str, int], int] = {}
        resent = 0
        try:
            while todo:
                todo, again = await self._round(batch, todo, failed, sent, rooms)
                resent += again
                if resent > _RESENDS:
                    raise NotConnected("Kafka takes our batches out of order again and again")
        except BaseException:
            self._remember(batch, sent)
            raise
        if self._unsettled:
            for record in batch:
                self._unsettled.pop(_identity(record), None)
        if failed:
            raise BatchFailed(failed)

    async def check(self) -> None:
        await self._cluster.check(self._topic)

    async def close(self) -> None:
        await self._cluster.close()

    async def _round(
        self,
        batch: Sequence[Record],
        todo: Sequence[int],
        failed: dict[int, str],
        sent: list[_Part],
        rooms: dict[tuple[str, int], int],
    ) -> tuple[Sequence[int], bool]:
        """One batch to each partition. Answers what is left to do, and whether some of it failed to be sent in order."""
        producer = await self._cluster.producer()
        topics = await self._topics(producer, batch, todo, failed)
        parts, left = self._lay_out(producer, batch, todo, topics, failed, rooms)
        try:
            async with asyncio.timeout(self._timeout):
                for part in parts:
                    part.size = part.batch.size()
                    part.batch.close()
                    part.future = await producer.send_batch(part.batch, part.topic, partition=part.partition)
                    part.future.add_done_callback(_retrieve)
                    sent.append(part)
        except (KafkaError, TimeoutError, AssertionError) as error:  # the last: a partition that is no more
            if verdict(error) is Verdict.RESEND:  # another lane found that producer to be spent
                await self._wait(sent)
                return [p for p in todo if p not in _positions(sent)], True
            raise NotConnected(f"Kafka takes no batch: {describe(error)}") from error
        await self._wait(parts)
        again, trouble = False, None
        for part in parts:
            error = part.error()
            place = (part.topic, part.partition)
            if error is None:
                if place in rooms:
                    rooms[place] *= 2
                continue
            self._cluster.discard(producer)
            judged = verdict(error)
            if judged is Verdict.FATAL:
                trouble = Fatal(f"Kafka topic {part.topic}: {describe(error)}")
            elif judged is Verdict.RETRY:
                trouble = trouble or NotConnected(f"Kafka topic {part.topic}: {describe(error)}")
            elif judged is Verdict.RESEND:
                again = True
                left += part.positions
            elif part.refused is not None:
                failed[part.positions[0]] = part.refused
            else:
                rooms[place] = len(part.positions) // 2
                if isinstance(error, TOO_LARGE):
                    self._limits[part.topic] = part.size // 2
                left += part.positions
        if trouble is not None:
            raise trouble
        return sorted(left), again

    async def _topics(
        self, producer: AIOKafkaProducer, batch: Sequence[Record], todo: Sequence[int], failed: dict[int, str]
    ) -> dict[str, int]:
        """Number of partitions of every topic this round needs."""
        if self._topic is not None:
            named = {self._topic}
        else:
            named = {str(self._topic_of(batch[position])) for position in todo} & self._config.allowed_topics
        counts = {topic: await self._cluster.partitions(producer, topic) for topic in named}
        fixed = self._config.partition
        for topic, partitions in counts.items():
            if isinstance(fixed, int) and fixed >= partitions:
                raise Fatal(f"`partition = {fixed}`: Kafka topic {topic} has {partitions} partitions, the first is 0")
        return counts

    def _lay_out(
        self,
        producer: AIOKafkaProducer,
        batch: Sequence[Record],
        todo: Iterable[int],
        topics: dict[str, int],
        failed: dict[int, str],
        rooms: dict[tuple[str, int], int],
    ) -> tuple[list[_Part], list[int]]:
        """Append each record to the batch of its partition. Answers the batches and what did not fit."""
        key_of, value_of, timestamp_of, headers_of = self._key, self._value, self._timestamp, self._headers
        partition_of, static, topic_of = self._partition_for_batch(), self._topic, self._topic_of
        parts: dict[tuple[str, int], _Part] = {}
        left: list[int] = []
        for position in todo:
            record = batch[position]
            topic = static if static is not None else str(topic_of(record))
            try:
                partitions = topics[topic]
                key = key_of(record)
                value = value_of(record)
                timestamp = timestamp_of(record)
                headers = headers_of(record)
            except KeyError:
                failed[position] = f"Kafka topic {topic!r} is not among `allowed_topics`"
                continue
            except (TypeError, ValueError) as error:
                failed[position] = f"cannot be rendered for Kafka: {error}"
                continue
            place = (topic, partition_of(record, key, partitions))
            part = parts.get(place)
            if part is None:
                part = parts[place] = _Part(producer, *place)
            elif part.full:
                left.append(position)
                continue
            if part.append(timestamp=timestamp, key=key, value=value, headers=headers) is None:
                part.full = True
                left.append(position)
                continue
            part.positions.append(position)
            if rooms or self._limits:
                part.full = self._is_full(part, rooms)
        return list(parts.values()), left

    def _is_full(self, part: _Part, rooms: dict[tuple[str, int], int]) -> bool:
        room = rooms.get((part.topic, part.partition))
        if room is not None and len(part.positions) >= room:
            return True
        limit = self._limits.get(part.topic)
        return limit is not None and part.batch.size() >= limit

    def _partition_for_batch(self) -> Callable[[Record, bytes | None, int], int]:
        if self._config.partition != "sticky":
            return self._partition
        turn = self._partition(Record("", b""), None, 1 << 30)
        return lambda record, key, partitions: turn % partitions

    async def _wait(self, parts: Sequence[_Part]) -> None:
        """Until all have an answer. NotConnected when that takes too long or no broker can be reached."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        waiting = {part.future: part for part in parts if not part.future.done()}
        while waiting:
            left = deadline - loop.time()
            if left <= 0:
                raise NotConnected(f"Kafka has not answered for {self._timeout:g} s; the records are on their way")
            done, _ = await asyncio.wait(waiting, timeout=min(_LOOK_EVERY, left))
            for future in done:
                del waiting[future]
            left = deadline - loop.time()
            if waiting and not done and left > 0:
                producer = next(iter(waiting.values())).producer
                if not await self._cluster.reachable(producer, left):
                    raise NotConnected(f"no broker of {', '.join(map(str, self._config.servers))} can be reached")

    async def _resume(self, batch: Sequence[Record], failed: dict[int, str]) -> list[int]:
        """Await what was sent before. Answers the positions that are to be sent (again)."""
        known = [self._unsettled.get(_identity(record)) for record in batch]
        before = list(dict.fromkeys(part for part in known if part is not None))
        await self._wait(before)
        todo = []
        for position, part in enumerate(known):
            if part is None or not part.settled:
                todo.append(position)
            elif part.refused is not None:
                failed[position] = part.refused
        for part in before:
            if part.error() is not None:
                self._cluster.discard(part.producer)
        return todo

    def _remember(self, batch: Sequence[Record], sent: list[_Part]) -> None:
        if len(self._unsettled) > _MOST_UNSETTLED:  # records that never came again: their queue was dropped
            self._unsettled = {key: part for key, part in self._unsettled.items() if not part.future.done()}
        for part in sent:
            if part.settled:
                part.records = [batch[position] for position in part.positions]
                for record in part.records:
                    self._unsettled[_identity(record)] = part


def _identity(record: Record) -> str | int:
    return record.msgid or id(record)  # a part keeps its records, so no other gets this id


def _positions(parts: Iterable[_Part]) -> set[int]:
    return {position for part in parts for position in part.positions}


def _retrieve(future: asyncio.Future[Any]) -> None:
    """So that an answer nobody waits for any more is not reported as forgotten."""
    with suppress(asyncio.CancelledError):
        future.exception()


async def open_kafka(config: KafkaConfig) -> Kafka:
    return Kafka(config)


BACKEND = Backend("sinks.kafka", KafkaConfig, open_kafka, extra="kafka")
