"""How a record becomes a Kafka record: key, value, timestamp, headers, partition. No connections."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import count
from typing import Literal

from broker.config.template import MissingValue, Template
from broker.connectors.json_text import compile_value
from broker.extend.record import compile_template, to_bytes
from broker.extend.sink import Record

Headers = list[tuple[str, bytes | None]]
Bytes = Callable[[Record], bytes | None]
Strategy = Literal["key", "topic_hash", "round_robin", "sticky"]
Partition = Callable[[Record, bytes | None, int], int]

_OWN = ("topic", "clientid", "username", "qos", "retain", "msgid", "content-type", "response-topic", "correlation-data")
OWN_HEADERS = frozenset(f"mqtt-{name}" for name in _OWN)
"""Headers we write; a user property of such a name is left out."""
PUBLISHERS = 8192
"""Of how many pairs of topic and client the headers are remembered."""
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


@lru_cache(maxsize=65_536)
def key_hash(key: bytes) -> int:
    """Java's `toPositive(murmur2(key))`, so that Java's producers and ours put a key into the same partition."""
    size = len(key)
    h = 0x9747B28C ^ size
    words = size >> 2
    for k in struct.unpack_from(f"<{words}I", key):
        k = k * _M & _MASK
        h = (h * _M & _MASK) ^ ((k ^ k >> 24) * _M & _MASK)
    tail = key[words << 2 :]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return (h ^ h >> 15) & 0x7FFFFFFF


class Partitioner:
    """Chooses partitions by one strategy; a record without a key goes round."""

    def __init__(self, strategy: Strategy | int) -> None:
        self.keyed = strategy == "key"
        """Whether records with the same key go to the same partition of a topic."""
        self._strategy = strategy
        self._turn = count()

    def for_round(self) -> Partition:
        """A function of record, key and number of partitions; under `sticky` the same for one whole round."""
        strategy, turn = self._strategy, self._turn
        if isinstance(strategy, int):
            return lambda record, key, partitions: strategy
        if strategy == "key":
            return lambda record, key, partitions: (key_hash(key) if key is not None else next(turn)) % partitions
        if strategy == "topic_hash":
            return lambda record, key, partitions: key_hash(record.topic.encode()) % partitions
        if strategy == "round_robin":
            return lambda record, key, partitions: next(turn) % partitions
        chosen = next(turn)
        return lambda record, key, partitions: chosen % partitions


class Layout:
    """The functions that make a Kafka record, and what was found out about topics."""

    def __init__(
        self,
        *,
        topic: Template,
        allowed: frozenset[str],
        key: Template | None,
        value: Template,
        timestamp: Template,
        headers: bool | Mapping[str, Template],
        partition: Strategy | int,
    ) -> None:
        self.topic = topic.literal
        """The Kafka topic; None when each record names its own."""
        self.fixed = partition if isinstance(partition, int) else None
        """The partition every record goes to, if it is configured."""
        self.topic_of = compile_template(topic)
        self.allowed = allowed
        self.key = default_key if key is None else bytes_of(key)
        self.value = value_of(value)
        self.timestamp = timestamp_of(timestamp)
        self.headers = headers_of(headers)
        self.partitioner = Partitioner(partition)
        self.limits: dict[str, int] = {}
        """Bytes a topic turned out to take at once, where that is less than we are allowed."""


def bytes_of(template: Template) -> Bytes:
    """The template's value as bytes; a template that is `${payload}` costs nothing."""
    render = compile_value(template)
    if template.text == "${payload}":
        return render
    return lambda record: to_bytes(render(record))


def value_of(template: Template) -> Bytes:
    """The same where there has to be one: a null deletes what a compacted topic holds. MissingValue without."""
    render = bytes_of(template)
    if template.text in ("${payload}", "${.}"):
        return render

    def value(record: Record) -> bytes:
        found = render(record)
        if found is None:
            raise MissingValue(template.names[0])
        return found

    return value


def default_key(record: Record) -> bytes:
    """The client id; a foreign broker does not tell it, then the topic."""
    return (record.clientid or record.topic).encode()


def timestamp_of(template: Template) -> Callable[[Record], int | None]:
    """Milliseconds since 1970; None lets the time be that of sending. ValueError when it is no such number."""
    if template.text == "${ts}":
        return lambda record: record.ts or None
    render = compile_template(template)

    def timestamp(record: Record) -> int | None:
        value = render(record)
        if value is None:
            return None
        milliseconds = int(value)
        if not 0 <= milliseconds < 1 << 63:
            raise ValueError(f"timestamp {milliseconds} is out of range")
        return milliseconds

    return timestamp


def headers_of(headers: bool | Mapping[str, Template]) -> Callable[[Record], Headers]:
    """True: the ``mqtt-`` headers and the user properties; False: none; a table: exactly those that have a value."""
    if headers is True:
        return _default_headers()
    if not headers:
        return lambda record: []
    chosen = [(name, bytes_of(template)) for name, template in headers.items()]
    return lambda record: [(name, value) for name, of in chosen if (value := of(record)) is not None]


def _default_headers() -> Callable[[Record], Headers]:
    known: dict[tuple[str, str | None, str | None, int, bool], Headers] = {}

    def headers(record: Record) -> Headers:
        publisher = (record.topic, record.clientid, record.username, record.qos, record.retain)
        found = known.get(publisher)
        if found is None:
            if len(known) >= PUBLISHERS:
                known.clear()
            found = known[publisher] = _publisher(record)
        headers = found.copy()
        if record.msgid is not None:
            headers.append(("mqtt-msgid", record.msgid.encode()))
        if record.content_type is not None:
            headers.append(("mqtt-content-type", record.content_type.encode()))
        if record.response_topic is not None:
            headers.append(("mqtt-response-topic", record.response_topic.encode()))
        if record.correlation_data is not None:
            headers.append(("mqtt-correlation-data", record.correlation_data))
        if record.user_properties:
            headers += [(k, v.encode()) for k, v in record.user_properties if k not in OWN_HEADERS]
        return headers

    return headers


def _publisher(record: Record) -> Headers:
    """The headers that all records of one client on one topic share."""
    texts = {"topic": record.topic, "clientid": record.clientid, "username": record.username, "qos": str(record.qos)}
    headers: Headers = [(f"mqtt-{name}", text.encode()) for name, text in texts.items() if text is not None]
    headers.append(("mqtt-retain", b"true" if record.retain else b"false"))
    return headers
