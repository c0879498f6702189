# cython: annotation_typing=False
# (the types are in the .pxd)
"""The properties of MQTT 5: what they are called, where they may stand, how they are written."""

from __future__ import annotations

from broker.mqtt import writer
from broker.mqtt.codes import ReasonCode
from broker.mqtt.errors import MalformedPacket, ProtocolError
from broker.mqtt.framing import encode_length
from broker.mqtt.reader import Reader

_FLAG, _UINT16, _UINT32, _VARINT, _TEXT, _BINARY, _PAIR = range(7)  # how a value is written

_CONNECT, _CONNACK, _PUBLISH, _SUBSCRIBE, _DISCONNECT, _AUTH = 1, 2, 3, 8, 14, 15  # where it may stand
_WILL, _INBOUND = 16, 17  # a will; a PUBLISH on its way to a server
_ANSWERS = (2, 4, 5, 6, 7, 9, 11, 14, 15)  # packets with a reason code
_EVERYWHERE = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, _WILL, _INBOUND)

# identifier, attribute, form, packets that may carry it
_TABLE: tuple[tuple[int, str, int, tuple[int, ...]], ...] = (
    (0x01, "payload_format_indicator", _FLAG, (_PUBLISH, _INBOUND, _WILL)),
    (0x02, "message_expiry_interval", _UINT32, (_PUBLISH, _INBOUND, _WILL)),
    (0x03, "content_type", _TEXT, (_PUBLISH, _INBOUND, _WILL)),
    (0x08, "response_topic", _TEXT, (_PUBLISH, _INBOUND, _WILL)),
    (0x09, "correlation_data", _BINARY, (_PUBLISH, _INBOUND, _WILL)),
    (0x0B, "subscription_identifiers", _VARINT, (_PUBLISH, _SUBSCRIBE)),
    (0x11, "session_expiry_interval", _UINT32, (_CONNECT, _CONNACK, _DISCONNECT)),
    (0x12, "assigned_client_identifier", _TEXT, (_CONNACK,)),
    (0x13, "server_keep_alive", _UINT16, (_CONNACK,)),
    (0x15, "authentication_method", _TEXT, (_CONNECT, _CONNACK, _AUTH)),
    (0x16, "authentication_data", _BINARY, (_CONNECT, _CONNACK, _AUTH)),
    (0x17, "request_problem_information", _FLAG, (_CONNECT,)),
    (0x18, "will_delay_interval", _UINT32, (_WILL,)),
    (0x19, "request_response_information", _FLAG, (_CONNECT,)),
    (0x1A, "response_information", _TEXT, (_CONNACK,)),
    (0x1C, "server_reference", _TEXT, (_CONNACK, _DISCONNECT)),
    (0x1F, "reason_string", _TEXT, _ANSWERS),
    (0x21, "receive_maximum", _UINT16, (_CONNECT, _CONNACK)),
    (0x22, "topic_alias_maximum", _UINT16, (_CONNECT, _CONNACK)),
    (0x23, "topic_alias", _UINT16, (_PUBLISH, _INBOUND)),
    (0x24, "maximum_qos", _FLAG, (_CONNACK,)),
    (0x25, "retain_available", _FLAG, (_CONNACK,)),
    (0x26, "user_properties", _PAIR, _EVERYWHERE),
    (0x27, "maximum_packet_size", _UINT32, (_CONNECT, _CONNACK)),
    (0x28, "wildcard_subscription_available", _FLAG, (_CONNACK,)),
    (0x29, "subscription_identifier_available", _FLAG, (_CONNACK,)),
    (0x2A, "shared_subscription_available", _FLAG, (_CONNACK,)),
)

BRIDGE_PATH = b"x-bridge-path"
"""User property of bridges: the names of the nodes a message has left, separated by commas."""

_UNKNOWN = 0xFF
_LAST = 0x2A
_FORMS = bytes(next((row[2] for row in _TABLE if row[0] == number), _UNKNOWN) for number in range(_LAST + 1))
_NAMES = tuple(next((row[1] for row in _TABLE if row[0] == number), "") for number in range(_LAST + 1))
_PLACES = tuple(
    sum(1 << packet for row in _TABLE if row[0] == number for packet in row[3]) for number in range(_LAST + 1)
)  # one bit per packet type
_FORWARDED = sum(1 << number for number in (0x01, 0x03, 0x08, 0x09, 0x26))  # [MQTT-3.3.2-17] and its siblings
_NOT_ZERO = sum(1 << number for number in (0x21, 0x23, 0x27))
_BIT = 1  # compiled, wide enough to be shifted by every identifier
_RESPONSE_TOPIC = 0x08
_SUBSCRIPTION_IDENTIFIER = 0x0B
_TOPIC_ALIAS = 0x23


class Properties:
    """The properties of one packet; None is an absent property.

    ``forward`` holds, as received and in order, the encoded properties which a PUBLISH or a will passes on unchanged.
    """

    __slots__ = (
        "assigned_client_identifier",
        "authentication_data",
        "authentication_method",
        "content_type",
        "correlation_data",
        "forward",
        "maximum_packet_size",
        "maximum_qos",
        "message_expiry_interval",
        "payload_format_indicator",
        "reason_string",
        "receive_maximum",
        "request_problem_information",
        "request_response_information",
        "response_information",
        "response_topic",
        "retain_available",
        "server_keep_alive",
        "server_reference",
        "session_expiry_interval",
        "shared_subscription_available",
        "subscription_identifier_available",
        "subscription_identifiers",
        "topic_alias",
        "topic_alias_maximum",
        "user_properties",
        "wildcard_subscription_available",
        "will_delay_interval",
    )

    def __init__(
        self,
        *,
        payload_format_indicator: int | None = None,
        message_expiry_interval: int | None = None,
        content_type: str | None = None,
        response_topic: str | None = None,
        correlation_data: bytes | None = None,
        subscription_identifiers: list[int] | None = None,
        session_expiry_interval: int | None = None,
        assigned_client_identifier: str | None = None,
        server_keep_alive: int | None = None,
        authentication_method: str | None = None,
        authentication_data: bytes | None = None,
        request_problem_information: int | None = None,
        will_delay_interval: int | None = None,
        request_response_information: int | None = None,
        response_information: str | None = None,
        server_reference: str | None = None,
        reason_string: str | None = None,
        receive_maximum: int | None = None,
        topic_alias_maximum: int | None = None,
        topic_alias: int | None = None,
        maximum_qos: int | None = None,
        retain_available: int | None = None,
        user_properties: list[tuple[str, str]] | None = None,
        maximum_packet_size: int | None = None,
        wildcard_subscription_available: int | None = None,
        subscription_identifier_available: int | None = None,
        shared_subscription_available: int | None = None,
        forward: bytes = b"",
    ) -> None:
        self.payload_format_indicator = payload_format_indicator
        self.message_expiry_interval = message_expiry_interval
        self.content_type = content_type
        self.response_topic = response_topic
        self.correlation_data = correlation_data
        self.subscription_identifiers = subscription_identifiers
        self.session_expiry_interval = session_expiry_interval
        self.assigned_client_identifier = assigned_client_identifier
        self.server_keep_alive = server_keep_alive
        self.authentication_method = authentication_method
        self.authentication_data = authentication_data
        self.request_problem_information = request_problem_information
        self.will_delay_interval = will_delay_interval
        self.request_response_information = request_response_information
        self.response_information = response_information
        self.server_reference = server_reference
        self.reason_string = reason_string
        self.receive_maximum = receive_maximum
        self.topic_alias_maximum = topic_alias_maximum
        self.topic_alias = topic_alias
        self.maximum_qos = maximum_qos
        self.retain_available = retain_available
        self.user_properties = user_properties
        self.maximum_packet_size = maximum_packet_size
        self.wildcard_subscription_available = wildcard_subscription_available
        self.subscription_identifier_available = subscription_identifier_available
        self.shared_subscription_available = shared_subscription_available
        self.forward = forward


def decode_properties(
    data: bytes, offset: int, end: int, packet_type: int, max_user_properties: int = 64, strict: bool = True
) -> tuple[Properties | None, int]:
    """The property block that starts with its length at ``offset``, and the offset behind it; None for an empty block.

    ``packet_type`` is a `PacketType` or `WILL`. Raises `ProtocolError`: 0x81 for what cannot be read and unknown
    identifiers, 0x82 for misplaced, repeated or impossible properties, 0x94 for topic alias 0, 0x97 for more than
    ``max_user_properties``.
    """
    reader = Reader(data, offset, end)
    properties = read_properties(reader, packet_type, max_user_properties, strict)
    return properties, reader.position


def read_properties(reader: Reader, packet_type: int, max_user_properties: int, strict: bool) -> Properties | None:
    """`decode_properties` at the position of ``reader``, which moves behind the block."""
    length = reader.varint()
    if length == 0:
        return None
    outer = reader.end
    end = reader.position + length
    if end > outer:
        raise MalformedPacket("the property length exceeds the packet")
    reader.end = end
    properties = Properties()
    forwards = packet_type == _PUBLISH or packet_type >= _WILL
    pieces = b""
    run = reader.position  # where the current run of forwarded properties starts
    seen = 0
    while reader.position < end:
        start = reader.position
        number = reader.byte()
        form = _FORMS[number] if number <= _LAST else _UNKNOWN
        if form == _UNKNOWN:
            raise MalformedPacket("unknown property")
        place = _PLACES[number]
        if not place >> packet_type & 1:  # [MQTT-2.2.2-2] and the tables of chapter 3
            raise _refusal(number, "does not belong here")
        repeated = seen >> number & 1
        seen |= _BIT << number
        if form == _PAIR:
            _read_pair(reader, properties, max_user_properties, strict)
        elif form == _VARINT:
            if repeated and packet_type != _PUBLISH:
                raise _refusal(number, "is repeated")
            _read_subscription_identifier(reader, properties)
        elif repeated:
            raise _refusal(number, "is repeated")
        else:
            setattr(properties, _NAMES[number], _read_value(reader, number, form, strict))
        if forwards and not _FORWARDED >> number & 1:
            pieces += reader.slice(run, start)
            run = reader.position
    if forwards:
        properties.forward = pieces + reader.slice(run, end)
    reader.end = outer
    return properties


def _refusal(number: int, text: str) -> ProtocolError:
    return ProtocolError(ReasonCode.PROTOCOL_ERROR, f"property {_NAMES[number]} {text}")


def _read_value(reader: Reader, number: int, form: int, strict: bool) -> object:
    """The value of a property that may stand only once."""
    if form == _TEXT:
        text = reader.text(strict)
        if number == _RESPONSE_TOPIC and (not text or "+" in text or "#" in text):  # [MQTT-3.3.2-14]
            raise _refusal(number, "is not a topic name")
        return text
    if form == _BINARY:
        return reader.binary()
    if form == _FLAG:
        value = reader.byte()
        if value > 1:
            raise _refusal(number, "is neither 0 nor 1")
        return value
    value = reader.uint16() if form == _UINT16 else reader.uint32()
    if value == 0 and _NOT_ZERO >> number & 1:
        if number == _TOPIC_ALIAS:  # [MQTT-3.3.2-8]
            raise ProtocolError(ReasonCode.TOPIC_ALIAS_INVALID, "topic alias 0")
        raise _refusal(number, "is 0")
    return value


def _read_pair(reader: Reader, properties: Properties, limit: int, strict: bool) -> None:
    pairs = properties.user_properties
    if pairs is None:
        pairs = properties.user_properties = []
    if len(pairs) >= limit:
        raise ProtocolError(ReasonCode.QUOTA_EXCEEDED, f"more than {limit} user properties")
    key = reader.text(strict)
    pairs.append((key, reader.text(strict)))


def _read_subscription_identifier(reader: Reader, properties: Properties) -> None:
    value = reader.varint()
    if value == 0:
        raise _refusal(_SUBSCRIPTION_IDENTIFIER, "is 0")
    if properties.subscription_identifiers is None:
        properties.subscription_identifiers = []
    properties.subscription_identifiers.append(value)


def encode_properties(p: Properties | None) -> bytes:
    """The property block with its length; ``forward`` is not written. Raises ValueError for what does not fit."""
    if p is None:
        return b"\x00"
    out: list[bytes] = []
    _put_flag(out, b"\x01", p.payload_format_indicator)
    _put_uint32(out, b"\x02", p.message_expiry_interval)
    _put_text(out, b"\x03", p.content_type)
    _put_text(out, b"\x08", p.response_topic)
    _put_binary(out, b"\x09", p.correlation_data)
    for identifier in p.subscription_identifiers or ():
        out.append(b"\x0b" + encode_length(identifier))
    _put_uint32(out, b"\x11", p.session_expiry_interval)
    _put_text(out, b"\x12", p.assigned_client_identifier)
    _put_uint16(out, b"\x13", p.server_keep_alive)
    _put_text(out, b"\x15", p.authentication_method)
    _put_binary(out, b"\x16", p.authentication_data)
    _put_flag(out, b"\x17", p.request_problem_information)
    _put_uint32(out, b"\x18", p.will_delay_interval)
    _put_flag(out, b"\x19", p.request_response_information)
    _put_text(out, b"\x1a", p.response_information)
    _put_text(out, b"\x1c", p.server_reference)
    _put_text(out, b"\x1f", p.reason_string)
    _put_uint16(out, b"\x21", p.receive_maximum)
    _put_uint16(out, b"\x22", p.topic_alias_maximum)
    _put_uint16(out, b"\x23", p.topic_alias)
    _put_flag(out, b"\x24", p.maximum_qos)
    _put_flag(out, b"\x25", p.retain_available)
    for key, value in p.user_properties or ():
        out.append(user_property(key, value))
    _put_uint32(out, b"\x27", p.maximum_packet_size)
    _put_flag(out, b"\x28", p.wildcard_subscription_available)
    _put_flag(out, b"\x29", p.subscription_identifier_available)
    _put_flag(out, b"\x2a", p.shared_subscription_available)
    block = b"".join(out)
    return encode_length(len(block)) + block


def user_property(key: str, value: str) -> bytes:
    """One encoded user property, to be put into a block."""
    return b"\x26" + writer.text(key) + writer.text(value)


def _put_flag(out: list[bytes], number: bytes, value: int | None) -> None:
    if value is not None:
        out.append(number + (b"\x01" if value else b"\x00"))


def _put_uint16(out: list[bytes], number: bytes, value: int | None) -> None:
    if value is not None:
        out.append(number + writer.uint16(value))


def _put_uint32(out: list[bytes], number: bytes, value: int | None) -> None:
    if value is not None:
        out.append(number + writer.uint32(value))


def _put_text(out: list[bytes], number: bytes, value: str | None) -> None:
    if value is not None:
        out.append(number + writer.text(value))


def _put_binary(out: list[bytes], number: bytes, value: bytes | None) -> None:
    if value is not None:
        out.append(number + writer.binary(value))
