"""Records: made from what a worker receives, and rendered by templates such as ``${payload.room}`` or ``${.}``.

A template is compiled once into a function of a record. A template that is exactly one placeholder yields the value
itself (bytes, number, list …), any other yields text. What a record does not have is None, ``null`` inside text.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from operator import attrgetter
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator

from broker.config.template import Placeholder, Template
from broker.extend.sink import UNREAD, Record
from broker.mqtt.packets import Publish

METADATA = "$isthmus"
"""The user property in which the broker tells a worker who published; never a record's user property."""

VOUCHED = frozenset(("clientid", "username", "peerhost", "msgid", "ts", "ts_iso", "node"))
"""Roots only our own broker knows: None in every record from a foreign one."""

_PLAIN = {"topic", "payload", "qos", "retain", "clientid", "username", "peerhost", "msgid", "node"}
_PLAIN |= {"content_type", "response_topic", "correlation_data"}
_ROOTS = sorted(_PLAIN | {"ts", "ts_iso", "user_property", "."})
_DEEP = frozenset(("payload", "topic", "user_property"))

Render = Callable[[Record], Any]


def record_from_publish(publish: Publish, trusted: bool) -> Record:
    """One record from a PUBLISH; ``trusted`` when it came from our own broker, which then says who published.

    ValueError when a trusted one carries metadata that cannot be read.
    """
    properties = publish.properties
    if properties is None:
        return Record(publish.topic.decode(), publish.payload, publish.qos, publish.retain)
    pairs = properties.user_properties
    metadata: str | None = None
    if not pairs:
        pairs = []
    elif pairs[0][0] == METADATA and len(pairs) == 1:
        metadata = pairs[0][1]
        pairs = []
    else:
        metadata = next((value for key, value in pairs if key == METADATA), None)
        if metadata is not None:
            pairs = [pair for pair in pairs if pair[0] != METADATA]
    if metadata is None or not trusted:
        return Record(
            publish.topic.decode(), publish.payload, publish.qos, publish.retain, None, None, None, None, 0,
            properties.content_type, properties.response_topic, properties.correlation_data, pairs,
        )  # fmt: skip
    try:
        who = orjson.loads(metadata)
        return Record(
            publish.topic.decode(), publish.payload, who["q"], who["r"] == 1, who["c"], who["u"], who["a"],
            who["i"] or None, who["t"],
            properties.content_type, properties.response_topic, properties.correlation_data, pairs, who["n"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the property {METADATA} is not what our broker writes: {error!r}") from None


def compile_template(template: Template) -> Render:
    """A function of a record. ValueError names a placeholder no record has."""
    segments = template.segments
    if len(segments) == 1 and isinstance(segments[0], Placeholder):
        return _placeholder(segments[0])
    literal = template.literal
    if literal is not None:
        return lambda record: literal
    parts = [s if isinstance(s, str) else _placeholder(s) for s in segments]

    def render(record: Record) -> str | bytes:
        texts = [part if isinstance(part, str) else to_text(part(record)) for part in parts]
        try:
            return "".join(texts)  # type: ignore[arg-type]
        except TypeError:  # bytes that are no text, such as a binary payload: so is the whole
            return b"".join(text if isinstance(text, bytes) else text.encode() for text in texts)

    return render


def _check(template: Template) -> Template:
    compile_template(template)
    return template


RecordTemplate = Annotated[Template, AfterValidator(_check)]
"""A template whose placeholders are those of a record: the type of a sink's configuration keys."""


def to_text(value: object) -> str | bytes:
    """How a value is written into text: text as it is, bytes as UTF-8 if they are, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return orjson.dumps(value).decode()


def to_bytes(value: object) -> bytes | None:
    """How a value is written where bytes are wanted: None stays None, text is UTF-8, the rest is JSON."""
    if isinstance(value, bytes) or value is None:
        return value
    return value.encode() if isinstance(value, str) else orjson.dumps(value)


def _placeholder(placeholder: Placeholder) -> Render:
    root, path = placeholder.root, placeholder.path
    if (path and root not in _DEEP) or root not in _ROOTS:
        raise ValueError(f"{placeholder!r}: a message has no such value; there are: {', '.join(_ROOTS)}")
    if root == "user_property":
        if not placeholder.rest:
            raise ValueError("${user_property} needs a name, as in ${user_property.unit}")
        return _user_property(placeholder.rest)
    if path:
        return _level(path, placeholder) if root == "topic" else _field(path)
    if root == ".":
        return envelope
    if root == "ts":
        return lambda record: record.ts or None
    if root == "ts_iso":
        return _iso
    render: Render = attrgetter(root)
    return render


def _user_property(key: str) -> Render:
    return lambda record: next((v for k, v in record.user_properties if k == key), None)


def _level(path: tuple[str | int, ...], placeholder: Placeholder) -> Render:
    index = path[0]
    if len(path) != 1 or not isinstance(index, int):
        raise ValueError(f"{placeholder!r}: write ${{topic[0]}} for the first level of a topic")

    def level(record: Record) -> str | None:
        levels = record.topic.split("/", index + 1)
        return levels[index] if index < len(levels) else None

    return level


def _field(path: tuple[str | int, ...]) -> Render:
    def find(record: Record) -> Any:
        value = payload_json(record)
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    return find


def payload_json(record: Record) -> Any:
    """The payload read as JSON, None when it is none. Parsed once for all conditions and templates."""
    value = record.json
    if value is UNREAD:
        try:
            value = orjson.loads(record.payload)
        except (ValueError, RecursionError):
            value = None
        record.json = value
    return value


def _iso(record: Record) -> str | None:
    if not record.ts:
        return None
    moment = datetime.fromtimestamp(record.ts // 1000, UTC).replace(tzinfo=None)
    return f"{moment.isoformat()}.{record.ts % 1000:03d}Z"


def envelope(record: Record) -> str:
    """The whole record as one JSON object: ``payload`` if it is UTF-8, else ``payload_base64``.

    What a publisher may leave out (content type and the like) is there only if it was sent.
    """
    whole: dict[str, Any] = {"topic": record.topic}
    try:
        whole["payload"] = record.payload.decode()
    except UnicodeDecodeError:
        whole["payload_base64"] = b64encode(record.payload).decode()
    whole |= {
        "qos": record.qos, "retain": record.retain, "clientid": record.clientid, "username": record.username,
        "peerhost": record.peerhost, "msgid": record.msgid, "ts": record.ts or None, "node": record.node,
    }  # fmt: skip
    if record.content_type is not None:
        whole["content_type"] = record.content_type
    if record.response_topic is not None:
        whole["response_topic"] = record.response_topic
    if record.correlation_data is not None:
        whole["correlation_data_base64"] = b64encode(record.correlation_data).decode()
    if record.user_properties:
        whole["user_properties"] = record.user_properties
    return orjson.dumps(whole).decode()
