"""Records of the journal: all that survives a restart, as bytes. Little endian; JSON where speed does not matter.

A record is `kind u8, length u32` and its payload. Times in records are on the store's clock, milliseconds that only
count while the broker runs plus the time it was down (see `Journal.clock_ms`), so no jump of the wall clock ends
anything early.
"""

import struct
from collections.abc import Iterator
from typing import Any

import orjson

from broker.engine.message import Message, Origin

PUT = 1
"""One message and who must get it."""
META = 2
"""A session as a whole; what later records say of it counts on top."""
END = 3
SUBSCRIBED = 4
"""One subscription. `owed`: retained messages that came up to this moment are still to be sent; see `owed.py`."""
UNSUBSCRIBED = 5
ACKED = 6
"""Everything of a session below a sequence number is done, and single ones above it."""
RELEASED = 7
"""QoS 2: the client has this message; only its packet identifier is still in use."""
FREED = 8
"""QoS 2 identifiers of a publishing session that PUBREL has freed."""
CLEARED = 9
"""A topic's retained message was removed."""
LIFE = 10
"""A session's connection came or went."""
VALUE = 11
"""An entry of the key-value table; an empty value removes it."""

KINDS = {
    PUT: "message",
    META: "session",
    END: "session-end",
    SUBSCRIBED: "subscribe",
    UNSUBSCRIBED: "unsubscribe",
    ACKED: "acknowledged",
    RELEASED: "released",
    FREED: "freed",
    CLEARED: "retained-clear",
    LIFE: "connection",
    VALUE: "value",
}

LAST_SEQ = 1 << 62
"""No session gets this far."""
HEADER = 5
"""Bytes before a record's payload."""

RETAIN = 1
"""The publisher set the retain flag."""
RETAINED = 2
"""This is the retained message of its topic."""

CLOCKED = 4
"""The time of arrival is on the store's clock; by the wall clock it is in the message's identifier."""

TAKER_RETAIN = 4
TAKER_IDENTS = 8
TAKER_GROUP = 16
"""It came through a `$share` group, whose mark follows."""
TAKER_MOVED = 32
"""Not a receiver: the session had the message under this number and has given it to those of this record."""

_HEAD = struct.Struct("<BI")
_PUT = struct.Struct("<BBQQIH16sHHII")
"""flags, qos, arrival (ms), expiry (store clock, ms, 0 for never), publishing session and its QoS 2 identifier,
message id, number of takers, lengths of topic, origin and properties."""
_TAKER = struct.Struct("<IQB")
"""session, sequence number, QoS with TAKER_ bits."""
_SESSION = struct.Struct("<I")
_ACKED = struct.Struct("<IQI")
_RELEASED = struct.Struct("<IQ")
PUT_FIXED = _PUT.size
NO_IDENT = bytes(16)


class RecordError(ValueError):
    """A record that cannot be what its kind says."""


class Taker:
    """One session that must get a stored message: where in its order, at which QoS, with which extras. `group` is the
    mark of the `$share` group it came through, 0 for none."""

    def __init__(
        self, session: int, seq: int, qos: int, retain: bool, idents: tuple[int, ...] | None, group: int, moved: bool
    ) -> None:
        self.session = session
        self.seq = seq
        self.qos = qos
        self.retain = retain
        self.idents = idents
        self.group = group
        self.moved = moved


def encode_put(
    message: Message,
    retained: bool,
    expires_ms: int,
    publisher: int,
    publisher_ident: int,
    count: int,
    takers: bytes,
    origin: bytes,
) -> bytes:
    """A PUT. `takers` is `count` results of `encode_taker`; `publisher` is 0 without a QoS 2 identifier to keep."""
    properties = message.properties
    ident = bytes.fromhex(message.ident) if message.ident else NO_IDENT
    flags = (RETAIN if message.retain else 0) | (RETAINED if retained else 0)
    arrival = message.time_ms
    if message.clock_ms and message.time_ms == int.from_bytes(ident[:6], "big"):
        flags |= CLOCKED
        arrival = message.clock_ms
    fixed = _PUT.pack(
        flags,
        message.qos,
        arrival,
        expires_ms,
        publisher,
        publisher_ident,
        ident,
        count,
        len(message.topic),
        len(origin),
        len(properties),
    )
    size = len(fixed) + len(takers) + len(message.topic) + len(origin) + len(properties) + len(message.payload)
    return b"".join((_HEAD.pack(PUT, size), fixed, takers, message.topic, origin, properties, message.payload))


def encode_taker(
    session: int, seq: int, qos: int, retain: bool, idents: tuple[int, ...] | None, group: int = 0
) -> bytes:
    """One receiver of a PUT."""
    bits = qos | (TAKER_RETAIN if retain else 0) | (TAKER_GROUP if group else 0)
    if idents is None:
        fixed = _TAKER.pack(session, seq, bits)
    else:
        fixed = _TAKER.pack(session, seq, bits | TAKER_IDENTS) + struct.pack(f"<B{len(idents)}I", len(idents), *idents)
    return fixed + group.to_bytes(4, "little") if group else fixed


def encode_moved(session: int, seq: int) -> bytes:
    """Who had a PUT's message before, among its receivers and counted with them."""
    return _TAKER.pack(session, seq, TAKER_MOVED)


def decode_takers(payload: bytes) -> list[Taker]:
    """The takers of a PUT's payload. Raises RecordError."""
    return [taker for taker in decode_all_takers(payload) if not taker.moved]


def decode_all_takers(payload: bytes) -> list[Taker]:
    """As `decode_takers`, with those that are `moved`. Raises RecordError."""
    try:
        count = payload[40] | payload[41] << 8
        at = PUT_FIXED
        found = []
        for _ in range(count):
            session, seq, bits = _TAKER.unpack_from(payload, at)
            at += 13
            if seq > LAST_SEQ:
                raise RecordError("an impossible sequence number")
            idents = None
            if bits & TAKER_IDENTS:
                n = payload[at]
                idents = struct.unpack_from(f"<{n}I", payload, at + 1)
                at += 1 + 4 * n
            group = 0
            if bits & TAKER_GROUP:
                group = int.from_bytes(payload[at : at + 4], "little")
                at += 4
            retain, moved = bits & TAKER_RETAIN != 0, bits & TAKER_MOVED != 0
            found.append(Taker(session, seq, bits & 3, retain, idents, group, moved))
        return found
    except (struct.error, IndexError) as error:
        raise RecordError(f"the receivers of a message cannot be read: {error}") from None


def decode_message(payload: bytes, now: float, clock_ms: int, origins: dict[bytes, Origin]) -> Message:
    """The message of a PUT's payload; `now` and `clock_ms` are this moment on the engine's and the store's clock.

    `origins` keeps what messages of one publisher share. Raises RecordError.
    """
    try:
        flags, qos, time_ms, expires_ms, _, _, ident, count, n_topic, n_origin, n_props = _PUT.unpack_from(payload, 0)
        at = PUT_FIXED
        for _ in range(count):
            bits = payload[at + 12]
            at += 13
            if bits & TAKER_IDENTS:
                at += 1 + 4 * payload[at]
            if bits & TAKER_GROUP:
                at += 4
        if at + n_topic + n_origin + n_props > len(payload) or qos > 2 or n_topic == 0:
            raise RecordError("lengths of a message do not fit its record")
        topic = payload[at : at + n_topic]
        at += n_topic
        raw = payload[at : at + n_origin]
        at += n_origin
        origin = origins.get(raw)
        if origin is None and raw:
            origin = decode_origin(raw)
            if len(origins) > 4096:
                origins.clear()
            origins[raw] = origin
        topic.decode()
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise RecordError(f"a message cannot be read: {error}") from None
    expires = 0.0
    if expires_ms:
        expires = now + (expires_ms - clock_ms) / 1000.0
        if expires == 0.0:
            expires = -1.0
    message = Message(
        topic, payload[at + n_props :], qos, flags & RETAIN != 0, payload[at : at + n_props], expires, origin
    )
    message.ident = ident.hex() if ident != NO_IDENT else ""
    message.time_ms, message.clock_ms = _arrival(flags, time_ms, ident)
    if message.clock_ms == 0:  # of an older release: its age counts from now on
        message.clock_ms = clock_ms
    return message


def _arrival(flags: int, arrival: int, ident: bytes) -> tuple[int, int]:
    """When a message came by the wall clock, and by the store's (0 where the record does not say)."""
    return (int.from_bytes(ident[:6], "big"), arrival) if flags & CLOCKED else (arrival, 0)


def number_at(data: bytes, at: int, size: int) -> int:
    """The little-endian number in these bytes, which must be there: compiled, nobody looks."""
    value = 0
    while size:
        size -= 1
        value = value << 8 | data[at + size]
    return value


def put_fields(payload: bytes) -> tuple[int, tuple[int, int], int, int, int]:
    """(flags, arrival in ms by the wall clock and by the store's, expiry in ms, publishing session, its QoS 2
    identifier) of a PUT. Raises RecordError."""
    try:
        fields = _PUT.unpack_from(payload, 0)
    except struct.error as error:
        raise RecordError(f"a message cannot be read: {error}") from None
    return fields[0], _arrival(fields[0], fields[2], fields[6]), fields[3], fields[4], fields[5]


def put_ident(payload: bytes) -> bytes:
    """The message id of a PUT whose fields could be read."""
    return payload[24:40]


def put_topic(payload: bytes) -> tuple[bytes, int]:
    """The topic of a PUT, and what its message counts for in a queue. Raises RecordError."""
    try:
        at = PUT_FIXED
        for _ in range(payload[40] | payload[41] << 8):
            bits = payload[at + 12]
            at += 13
            if bits & TAKER_IDENTS:
                at += 1 + 4 * payload[at]
            if bits & TAKER_GROUP:
                at += 4
        n = payload[42] | payload[43] << 8
        size = len(payload) - at - int.from_bytes(payload[44:48], "little")
        if size < n:
            raise RecordError("a topic does not fit its record")
        return payload[at : at + n], size
    except IndexError as error:
        raise RecordError(f"a message cannot be read: {error}") from None


def encode_origin(origin: Origin | None) -> bytes:
    """What is kept of a publisher."""
    return (origin.prefix() + "}").encode() if origin is not None else b""


def decode_origin(raw: bytes) -> Origin:
    """The publisher of a message. Raises RecordError."""
    fields = _json(raw, "a publisher")
    try:
        return Origin(fields["c"], fields["u"], fields["a"], fields["o"], None, fields["n"])
    except KeyError as error:
        raise RecordError(f"a publisher without {error}") from None


def encode_json(kind: int, session: int, fields: Any) -> bytes:
    """META, SUBSCRIBED, LIFE: JSON about a session."""
    text = orjson.dumps(fields)
    return _HEAD.pack(kind, 4 + len(text)) + _SESSION.pack(session) + text


def decode_json(payload: bytes) -> tuple[int, dict[str, Any]]:
    """(session, fields). Raises RecordError."""
    return decode_session(payload), _json(payload[4:], "a session")


def _json(raw: bytes, what: str) -> dict[str, Any]:
    try:
        fields = orjson.loads(raw)
    except ValueError as error:
        raise RecordError(f"{what} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise RecordError(f"{what} is not an object")
    return fields


def encode_session(kind: int, session: int, rest: bytes = b"") -> bytes:
    """END; UNSUBSCRIBED with the filter."""
    return _HEAD.pack(kind, 4 + len(rest)) + _SESSION.pack(session) + rest


def decode_session(payload: bytes) -> int:
    """The session a record is about. Raises RecordError."""
    if len(payload) < 4:
        raise RecordError("a record without its session")
    return int.from_bytes(payload[:4], "little")


def encode_acked(session: int, floor: int, seqs: list[int]) -> bytes:
    """ACKED."""
    n = len(seqs)
    return _HEAD.pack(ACKED, 16 + 8 * n) + _ACKED.pack(session, floor, n) + struct.pack(f"<{n}Q", *seqs)


def decode_acked(payload: bytes) -> tuple[int, int, tuple[int, ...]]:
    """(session, floor, single ones). Raises RecordError."""
    try:
        session, floor, n = _ACKED.unpack_from(payload, 0)
        seqs = struct.unpack_from(f"<{n}Q", payload, 16)
    except struct.error as error:
        raise RecordError(f"acknowledgements cannot be read: {error}") from None
    if floor > LAST_SEQ or any(seq > LAST_SEQ for seq in seqs):
        raise RecordError("an impossible sequence number")
    return session, floor, seqs


def encode_released(session: int, seq: int) -> bytes:
    """RELEASED."""
    return _HEAD.pack(RELEASED, 12) + _RELEASED.pack(session, seq)


def decode_released(payload: bytes) -> tuple[int, int]:
    """(session, sequence number). Raises RecordError."""
    try:
        session, seq = _RELEASED.unpack(payload)
    except struct.error as error:
        raise RecordError(f"a release cannot be read: {error}") from None
    if seq > LAST_SEQ:
        raise RecordError("an impossible sequence number")
    return session, seq


def encode_freed(session: int, idents: list[int]) -> bytes:
    """FREED."""
    n = len(idents)
    return _HEAD.pack(FREED, 4 + 2 * n) + _SESSION.pack(session) + struct.pack(f"<{n}H", *idents)


def decode_freed(payload: bytes) -> tuple[int, tuple[int, ...]]:
    """(session, identifiers). Raises RecordError."""
    session = decode_session(payload)
    if len(payload) % 2:
        raise RecordError("freed identifiers cannot be read")
    return session, struct.unpack_from(f"<{(len(payload) - 4) // 2}H", payload, 4)


def encode_cleared(topic: bytes) -> bytes:
    """CLEARED."""
    return _HEAD.pack(CLEARED, len(topic)) + topic


def encode_value(key: bytes, value: bytes) -> bytes:
    """VALUE."""
    return _HEAD.pack(VALUE, 2 + len(key) + len(value)) + len(key).to_bytes(2, "little") + key + value


def decode_value(payload: bytes) -> tuple[bytes, bytes]:
    """(key, value). Raises RecordError."""
    n = int.from_bytes(payload[:2], "little")
    if len(payload) < 2 + n:
        raise RecordError("an entry of the table does not fit its record")
    return payload[2 : 2 + n], payload[2 + n :]


def iterate(body: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(offset, kind, payload) of every record in the body of a frame. Raises RecordError where lengths do not fit."""
    at = 0
    n = len(body)
    while at < n:
        if at + HEADER > n:
            raise RecordError("a record is cut off")
        kind, size = _HEAD.unpack_from(body, at)
        if at + HEADER + size > n:
            raise RecordError("a record is longer than its frame")
        yield at, kind, body[at + HEADER : at + HEADER + size]
        at += HEADER + size


def describe(kind: int, payload: bytes) -> dict[str, Any]:
    """A record for people, ready for JSON; payloads of messages as their length. Raises RecordError."""
    found: dict[str, Any] = {"kind": KINDS.get(kind, f"unknown {kind}")}
    if kind == PUT:
        flags, (time_ms, _), expires_ms, publisher, ident = put_fields(payload)
        message = decode_message(payload, 0.0, 0, {})
        found |= {
            "id": message.ident,
            "topic": message.topic.decode(),
            "bytes": len(message.payload),
            "payload": message.payload.decode("utf-8", "backslashreplace"),
            "qos": message.qos,
            "retained": flags & RETAINED != 0,
            "arrived_ms": time_ms,
            "expires_ms": expires_ms,
            "clientid": message.origin.client_id if message.origin is not None else None,
            "receivers": [{"session": t.session, "seq": t.seq, "qos": t.qos} for t in decode_takers(payload)],
        }
        moved = [{"session": t.session, "seq": t.seq} for t in decode_all_takers(payload) if t.moved]
        if moved:
            found["moved_from"] = moved
        if publisher:
            found["published_as"] = {"session": publisher, "packet_id": ident}
    elif kind in (META, SUBSCRIBED, LIFE):
        session, fields = decode_json(payload)
        found |= {"session": session, **fields}
    elif kind == END:
        found["session"] = decode_session(payload)
    elif kind == UNSUBSCRIBED:
        found |= {"session": decode_session(payload), "filter": payload[4:].decode("utf-8", "replace")}
    elif kind == ACKED:
        session, floor, seqs = decode_acked(payload)
        found |= {"session": session, "below": floor, "also": list(seqs)}
    elif kind == RELEASED:
        session, seq = decode_released(payload)
        found |= {"session": session, "seq": seq}
    elif kind == FREED:
        session, idents = decode_freed(payload)
        found |= {"session": session, "packet_ids": list(idents)}
    elif kind == CLEARED:
        found["topic"] = payload.decode("utf-8", "replace")
    elif kind == VALUE:
        key, value = decode_value(payload)
        found |= {"key": key.decode("utf-8", "replace"), "bytes": len(value)}
    return found
