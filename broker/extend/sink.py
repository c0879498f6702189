"""What a sink implements and what it is handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from broker.config.template import Template
from broker.config.types import Duration, Size
from broker.extend.condition import Condition
from broker.extend.idempotency import KeyTemplate
from broker.extend.registry import InstanceConfig
from broker.extend.session import Ack, Overflow, SessionSpec


class Queue(BaseModel):
    """`queue = { … }`: the durable session's limits."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    max_bytes: Size = 1 << 30
    """Bytes the queue may hold before `overflow` decides."""
    overflow: Overflow = "reject"
    """What happens to a message that does not fit: reject | block | drop_oldest | drop_newest."""
    max_age: Duration = 0.0
    """Seconds after which a message that still queues is dropped; 0 for never."""


class Batch(BaseModel):
    """`batch = { … }`: how many records go to the destination at once."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    max_records: int = Field(default=5_000, ge=1, le=1_000_000)
    """Records in one batch at most."""
    max_bytes: Size = 896 * 1024
    """Bytes (topics and payloads) in one batch at most."""
    linger: Duration = 0.005
    """Seconds a batch waits for more records before it is sent."""


class SinkConfig(InstanceConfig):
    """What every `[sinks.*]` table understands besides its own keys."""

    filters: tuple[str, ...] = Field(min_length=1)
    """MQTT topic filters of the messages to take."""
    where: Condition | None = None
    """Which of them: `payload.value != null and payload.value < 1000`. Knows `and or not ( )`, `== != < <= > >=`,
    `in [1, "a"]`, and the names that templates know. A message of which it can say neither yes nor no, such as one
    whose payload is no JSON, is a dead letter."""
    idempotency_key: KeyTemplate | None = None
    """Template by whose values repetitions are told instead of by the message id, so that an event that a device
    publishes anew, because the acknowledgement was lost, is stored once: `${clientid}:${payload.id}`. Wherever this
    sink writes or compares `${msgid}` it takes a digest of the values, which has the same form (32 hex digits).
    `${clientid}` belongs in it unless ids are unique among all devices. A message without one of the values, or with an
    empty one, is a dead letter. It is refused where nothing could be told by it: in a Redis stream, a time series of
    MongoDB, columns without `${msgid}`. There is no packet identifier to put in: most clients use it for another
    message at once, which would be lost as a repetition."""
    ack: Ack = "spool"
    """When the publisher's acknowledgement is sent: accept | spool | delivered."""
    queue: Queue = Queue()
    """Limits of the durable queue that feeds this sink."""
    lanes: int = Field(default=1, ge=1, le=64)
    """Parallel sessions; order is kept per `order_key`."""
    order_key: str = "${clientid}"
    """Template whose value decides the lane of a message."""
    batch: Batch = Batch()
    """How records are grouped on their way out."""
    retained: bool = False
    """Whether retained messages are taken when the subscription is made."""
    worker: str = ""
    """Name of the worker process that runs this instance; empty: any."""

    @model_validator(mode="after")
    def _key_has_an_effect(self) -> SinkConfig:
        if self.idempotency_key is not None and (problem := self.idempotency_problem()):
            raise ValueError(f"idempotency_key: {problem}")
        return self

    def idempotency_problem(self) -> str | None:
        """Why an `idempotency_key` would keep nothing from being stored twice; None where it does. Sinks that need
        other keys for it say so here."""
        return None

    def session(self) -> SessionSpec:
        """The durable session the broker keeps for this instance."""
        return SessionSpec(
            filters=tuple((f, 2) for f in self.filters),
            lanes=self.lanes,
            order_key=self.order_key,
            ack=self.ack,
            retained="always" if self.retained else "never",
            max_bytes=self.queue.max_bytes,
            overflow=self.queue.overflow,
            max_age=self.queue.max_age,
        )


def shows_msgid(*values: object) -> bool:
    """Whether one of these, templates or tables of templates, holds `${msgid}`, alone or in an envelope."""
    return any(
        shows_msgid(*value.values()) if isinstance(value, dict)
        else isinstance(value, Template) and not {"msgid", "."}.isdisjoint(value.names)
        for value in values
    )  # fmt: skip


UNREAD: Any = object()
"""Stands for JSON that nobody has asked for yet."""


@dataclass(slots=True)
class Record:
    """One message on its way into a sink. Values are what the broker vouches for (or None from a foreign broker)."""

    topic: str
    payload: bytes
    qos: int = 0
    """QoS of the publisher, not of the delivery."""
    retain: bool = False
    clientid: str | None = None
    username: str | None = None
    peerhost: str | None = None
    msgid: str | None = None
    """32 hex digits, sortable by time, the same on every redelivery; under an `idempotency_key` a digest, which a later
    message may have, too."""
    ts: int = 0
    """Milliseconds since 1970 when the broker took the message."""
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_properties: list[tuple[str, str]] = field(default_factory=list)
    node: str | None = None
    json: Any = field(default=UNREAD, init=False, repr=False, compare=False)
    """The payload read as JSON, once somebody asked `payload_json` for it; None when it is none."""
    keyed: Record | None = field(default=None, init=False, repr=False, compare=False)
    """The same under the sink's `idempotency_key`, made once: a batch that comes again holds the same objects."""

    @property
    def identity(self) -> str | int:
        """Tells this record from every other, also from one of the same `msgid`, as long as it is kept."""
        return self.msgid or id(self)

    def under(self, key: str) -> Record:
        """The same with another `msgid` and its own identity."""
        other = _Keyed(
            self.topic, self.payload, self.qos, self.retain, self.clientid, self.username, self.peerhost, key, self.ts,
            self.content_type, self.response_topic, self.correlation_data, self.user_properties, self.node,
        )  # fmt: skip
        other.json = self.json
        other.identity = self.msgid or id(other)
        return other


@dataclass(slots=True)
class _Keyed(Record):
    identity: str | int = field(default=0, init=False, repr=False, compare=False)


class NotConnected(ConnectionError):
    """The destination cannot be reached or asks to come back later; the same batch is sent again."""


class Fatal(Exception):
    """The destination refuses this configuration (credentials, missing topic or table); the sink pauses and probes."""


class BatchFailed(Exception):
    """Some records can never be stored.

    `failed` maps the position in the batch to the reason; every other record **is stored** when this is raised.
    """

    def __init__(self, failed: dict[int, str]) -> None:
        super().__init__(f"{len(failed)} records refused: {next(iter(failed.values()), '')}")
        self.failed = failed


class Sink(Protocol):
    """Called by one worker task per lane; `write` never runs twice at once for the same lane."""

    async def write(self, batch: Sequence[Record]) -> None:
        """Returning means stored. Raises NotConnected (batch is retried), BatchFailed (those go to the dead
        letters) or Fatal (the sink pauses and probes)."""

    async def check(self) -> None:
        """One real round trip; raises NotConnected or Fatal."""

    async def close(self) -> None:
        """Also works after a half-finished opening; never takes more than five seconds."""


Outcome = Literal["ok", "retry", "dead"]
