"""Messages become Kafka records, in order per key, each stored by all in-sync replicas before it is acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from broker.config.template import Template
from broker.config.types import Address, Duration, Size
from broker.extend.record import RecordTemplate
from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, Record, SinkConfig, shows_msgid
from sinks._kafka_client import Cluster
from sinks._kafka_delivery import Delivery
from sinks._kafka_layout import Layout, Strategy
from sinks._kafka_notes import Notes
from sinks._kafka_part import Part
from sinks._kafka_security import Sasl, Tls
from sinks._kafka_transactions import Transactions

_MOST_UNSETTLED = 262_144
_MOST_NOTED = 20_000
_ACKS = {"all": "all", "leader": 1, "none": 0}


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
    """Value of a record: the bytes as they came; `${.}` is a JSON envelope. Without a value it is a dead letter."""
    headers: bool | dict[str, RecordTemplate] = True
    """`true`: `mqtt-topic`, `mqtt-clientid`, `mqtt-username`, `mqtt-qos`, `mqtt-retain`, `mqtt-msgid`, what of
    `mqtt-content-type`, `mqtt-response-topic`, `mqtt-correlation-data` was sent, and the user properties;
    `false`: none; a table of templates: exactly those."""
    timestamp: RecordTemplate = Template("${ts}")
    """Milliseconds since 1970; the time of sending if there is no value."""
    partition: Strategy | Annotated[int, Field(strict=True, ge=0)] = "key"
    """`key` (as Java's producers do) | `topic_hash` | `round_robin` | `sticky` (one for each batch) | a number."""
    acks: Literal["all", "leader", "none"] = "all"
    """Who has to have a record before it counts as stored: all (in-sync replicas) | leader (lost with it) | none (it
    was sent; whether it arrived nobody knows). All but `all` need `idempotent = false`."""
    idempotent: bool = True
    """Whether Kafka recognises what is sent again after an error; `false` stores it twice then."""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "zstd"
    """How batches are compressed: none | gzip | snappy | lz4 | zstd."""
    max_batch_bytes: Size | None = Field(default=None, ge=1024, le=1 << 30)
    """Bytes of one batch for one partition before compression; 896 KB uncompressed, 2 MB compressed if not given.
    A topic that takes less is found out."""
    transactional_id: str = Field(default="", max_length=249)
    """Makes each batch a transaction under this name, which no other sink of any broker may have: who reads only what
    is committed gets each record once, also after a crash. Wants `lanes = 1` and the topic `progress_topic`. By an
    `idempotency_key` a repetition is left out in the same batch and the next; a later one is told by `mqtt-msgid`."""
    progress_topic: str = Field(default="isthmus-progress", pattern=r"^[A-Za-z0-9._-]{1,249}$")
    """Topic in which transactions note what is stored; make it with one partition and `cleanup.policy=compact`."""
    transaction_timeout: Duration = Field(default=60.0, ge=1, le=900)
    """Seconds after which the cluster aborts a transaction whose sink has vanished; readers may have to wait for it."""
    sasl: Sasl | None = None
    """Who we are: `{ mechanism = "scram-sha-512", username = "…", password = "${file:…}" }`."""
    tls: bool | Tls = False
    """`true`, or `{ ca = "…", certificate = "…", key = "…" }`."""
    request_timeout: Duration = Field(default=30.0, ge=0.1)
    """Seconds the cluster has for an answer. A batch without one is not sent again, its answer is awaited."""

    @model_validator(mode="after")
    def _topics_are_known(self) -> KafkaConfig:
        if self.topic.names and not self.allowed_topics:
            raise ValueError("a topic with placeholders needs allowed_topics: a publisher could name any topic")
        if not self.topic.names and not self.topic.literal:
            raise ValueError("topic must not be empty")
        return self

    @model_validator(mode="after")
    def _idempotence_is_possible(self) -> KafkaConfig:
        if self.acks != "all" and self.idempotent:
            raise ValueError(f'acks = "{self.acks}" needs idempotent = false')
        if self.transactional_id and not self.idempotent:
            raise ValueError('transactional_id needs acks = "all" and idempotent = true')
        return self

    @model_validator(mode="after")
    def _transactions_are_small_and_in_order(self) -> KafkaConfig:
        if self.transactional_id and self.lanes != 1:
            raise ValueError("transactional_id needs lanes = 1: a transaction holds one batch")
        if self.transactional_id and self.batch.max_records > _MOST_NOTED:
            raise ValueError(f"transactional_id needs batch.max_records of {_MOST_NOTED} at most: they are all noted")
        return self

    def idempotency_problem(self) -> str | None:
        if self.transactional_id or self.headers is True or shows_msgid(self.key, self.value, self.headers):
            return None
        return "neither headers nor value hold `${msgid}`: who reads the topic could tell no repetition"


class Kafka:
    """Sends a batch as one Kafka batch per partition and waits for all of them.

    An idempotent producer never gives a batch up: after `request_timeout`, or when no broker can be reached, a write
    ends with NotConnected while its batch is still on its way. It is remembered by its records' message ids, and when
    they come again its answer is awaited instead of sending them twice.
    """

    def __init__(self, config: KafkaConfig) -> None:
        tls = Tls() if config.tls is True else config.tls or None
        none = config.compression == "none"
        limit = config.max_batch_bytes or (896 << 10 if none else 2 << 20)
        self._cluster = Cluster(
            [str(server) for server in config.servers], config.sasl, tls, config.request_timeout,
            client_id=f"isthmus-{config.name}", max_batch_size=limit,
            acks=_ACKS[config.acks], enable_idempotence=config.idempotent,
            compression_type=None if none else config.compression, transactional_id=config.transactional_id or None,
            transaction_timeout_ms=int(config.transaction_timeout * 1000),
        )  # fmt: skip
        self._layout = Layout(
            topic=config.topic, allowed=config.allowed_topics, key=config.key, value=config.value,
            timestamp=config.timestamp, headers=config.headers, partition=config.partition,
        )  # fmt: skip
        self._timeout = config.request_timeout
        self._unsettled: dict[str | int, Part] = {}  # a part keeps its records: no other gets their identity
        self._transactions: Transactions | None = None
        self._topics = [config.topic.literal] if config.topic.literal is not None else []
        if config.transactional_id:
            notes = Notes(self._cluster, config.progress_topic, config.transactional_id, config.request_timeout)
            self._transactions = Transactions(self._cluster, self._layout, notes, config.request_timeout)
            self._topics.append(config.progress_topic)

    async def write(self, batch: Sequence[Record]) -> None:
        if self._transactions is not None:
            await self._transactions.write(batch)
            return
        delivery = Delivery(self._cluster, self._layout, batch, self._timeout)
        try:
            todo = await self._resume(delivery) if self._unsettled else range(len(batch))
            await delivery.run(todo)
        except BaseException:
            self._remember(delivery)
            raise
        if self._unsettled:
            for record in batch:
                self._unsettled.pop(record.identity, None)
        if delivery.failed:
            raise BatchFailed(delivery.failed)

    async def check(self) -> None:
        await self._cluster.check(*self._topics)

    async def close(self) -> None:
        await self._cluster.close()

    async def _resume(self, delivery: Delivery) -> list[int]:
        """Await what earlier writes sent. Answers the positions that are to be sent (again)."""
        known = [self._unsettled.get(record.identity) for record in delivery.batch]
        before = list(dict.fromkeys(part for part in known if part is not None))
        await delivery.wait(before)
        todo = []
        for position, part in enumerate(known):
            if part is None or not part.settled:
                todo.append(position)
            elif part.refused is not None:
                delivery.failed[position] = part.refused
        for part in before:
            if part.error is not None:
                self._cluster.discard(part.producer)
        return todo

    def _remember(self, delivery: Delivery) -> None:
        if len(self._unsettled) > _MOST_UNSETTLED:  # records that never came again: their queue was dropped
            self._unsettled = {key: part for key, part in self._unsettled.items() if not part.answered}
        for part in delivery.sent:
            if part.settled:
                part.records = [delivery.batch[position] for position in part.positions]
                self._unsettled.update((record.identity, part) for record in part.records)


async def open_kafka(config: KafkaConfig) -> Kafka:
    return Kafka(config)


BACKEND = Backend("sinks.kafka", KafkaConfig, open_kafka, extra="kafka")
