# cython: annotation_typing=False
# (the types are in the .pxd)
"""SUBSCRIBE, UNSUBSCRIBE and their answers."""

from __future__ import annotations

from broker.mqtt import writer
from broker.mqtt.codes import ReasonCode
from broker.mqtt.errors import MalformedPacket, ProtocolError
from broker.mqtt.properties import Properties, encode_properties, read_properties
from broker.mqtt.reader import Reader
from broker.mqtt.text import check_text

_SUBSCRIBE, _SUBACK, _UNSUBSCRIBE, _UNSUBACK = 8, 9, 10, 11
_NO_LOCAL = 0x04
_SUBACK_CODES = frozenset((0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2))
_SUBACK_CODES_V3 = frozenset((0x00, 0x01, 0x02, 0x80))
_UNSUBACK_CODES = frozenset((0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91))


class Subscribe:
    """A SUBSCRIBE. ``filters`` pairs each filter with its option byte, which is the QoS alone for 3.x.

    Filters are text, but whether they are well-formed filters is not checked here: a wrong one is answered alone.
    """

    __slots__ = ("filters", "packet_id", "properties")

    def __init__(self, packet_id: int, filters: list[tuple[bytes, int]], properties: Properties | None = None) -> None:
        self.packet_id = packet_id
        self.filters = filters
        self.properties = properties


class Unsubscribe:
    """An UNSUBSCRIBE; its filters are text and not checked further."""

    __slots__ = ("filters", "packet_id", "properties")

    def __init__(self, packet_id: int, filters: list[bytes], properties: Properties | None = None) -> None:
        self.packet_id = packet_id
        self.filters = filters
        self.properties = properties


class Suback:
    """A SUBACK or an UNSUBACK: one code per filter, in order; an UNSUBACK of 3.x has none."""

    __slots__ = ("codes", "packet_id", "properties")

    def __init__(self, packet_id: int, codes: list[int], properties: Properties | None = None) -> None:
        self.packet_id = packet_id
        self.codes = codes
        self.properties = properties


def decode_subscribe(body: bytes, version: int, strict: bool = True, max_user_properties: int = 64) -> Subscribe:
    """Raises `ProtocolError`."""
    reader = Reader(body, 0, len(body))
    packet_id = _read_packet_id(reader)
    properties = read_properties(reader, _SUBSCRIBE, max_user_properties, strict) if version == 5 else None
    filters: list[tuple[bytes, int]] = []
    while reader.position < reader.end:
        name = reader.binary()
        check_text(name, strict)  # [MQTT-3.8.3-1]
        options = reader.byte()
        _check_options(name, options, version)
        filters.append((name, options))
    if not filters:  # [MQTT-3.8.3-2]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "a SUBSCRIBE without a filter")
    return Subscribe(packet_id, filters, properties)


def _read_packet_id(reader: Reader) -> int:
    packet_id = reader.uint16()
    if packet_id == 0:  # [MQTT-2.2.1-3]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "packet identifier 0")
    return packet_id


def _check_options(name: bytes, options: int, version: int) -> None:
    if options & (0xC0 if version == 5 else 0xFC):  # [MQTT-3.8.3-5]
        raise MalformedPacket("reserved subscription options are set")
    if options & 0x03 == 0x03:  # [MQTT-3.8.3-4] of 3.1.1
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "subscription with QoS 3")
    if options & 0x30 == 0x30:
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "subscription with retain handling 3")
    if options & _NO_LOCAL and name.startswith(b"$share/"):  # [MQTT-3.8.3-4]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "No Local on a shared subscription")


def encode_subscribe(
    packet_id: int, version: int, filters: list[tuple[bytes, int]], properties: Properties | None = None
) -> bytes:
    """``filters`` as in `Subscribe`. Raises ValueError for a field that does not fit."""
    parts = [writer.uint16(packet_id)]
    if version == 5:
        parts.append(encode_properties(properties))
    for name, options in filters:
        parts.append(writer.binary(name))
        parts.append(bytes((options,)))
    return writer.packet(0x82, b"".join(parts))


def encode_suback(packet_id: int, version: int, codes: list[int], properties: Properties | None = None) -> bytes:
    """``codes`` are MQTT 5 reason codes; for 3.x every failure becomes 0x80."""
    if version < 5:
        return writer.packet(0x90, writer.uint16(packet_id) + bytes([min(code, 0x80) for code in codes]))
    return writer.packet(0x90, writer.uint16(packet_id) + encode_properties(properties) + bytes(codes))


def decode_suback(body: bytes, version: int, strict: bool = True) -> Suback:
    """Raises `ProtocolError`."""
    reader = Reader(body, 0, len(body))
    packet_id = _read_packet_id(reader)
    properties = read_properties(reader, _SUBACK, 64, strict) if version == 5 else None
    codes = _read_codes(reader, _SUBACK_CODES if version == 5 else _SUBACK_CODES_V3)  # [MQTT-3.9.3-2]
    return Suback(packet_id, codes, properties)


def _read_codes(reader: Reader, allowed: frozenset[int]) -> list[int]:
    codes = list(reader.rest())
    if not codes:
        raise MalformedPacket("an answer without a code")
    if not allowed.issuperset(codes):
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "unknown reason code in an answer")
    return codes


def decode_unsubscribe(body: bytes, version: int, strict: bool = True, max_user_properties: int = 64) -> Unsubscribe:
    """Raises `ProtocolError`."""
    reader = Reader(body, 0, len(body))
    packet_id = _read_packet_id(reader)
    properties = read_properties(reader, _UNSUBSCRIBE, max_user_properties, strict) if version == 5 else None
    filters: list[bytes] = []
    while reader.position < reader.end:
        name = reader.binary()
        check_text(name, strict)  # [MQTT-3.10.3-1]
        filters.append(name)
    if not filters:  # [MQTT-3.10.3-2]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "an UNSUBSCRIBE without a filter")
    return Unsubscribe(packet_id, filters, properties)


def encode_unsubscribe(
    packet_id: int, version: int, filters: list[bytes], properties: Properties | None = None
) -> bytes:
    """Raises ValueError for a field that does not fit."""
    parts = [writer.uint16(packet_id)]
    if version == 5:
        parts.append(encode_properties(properties))
    for name in filters:
        parts.append(writer.binary(name))
    return writer.packet(0xA2, b"".join(parts))


def encode_unsuback(packet_id: int, version: int, codes: list[int], properties: Properties | None = None) -> bytes:
    """3.x has neither codes nor properties."""
    if version < 5:
        return bytes((0xB0, 2, packet_id >> 8, packet_id & 0xFF))
    return writer.packet(0xB0, writer.uint16(packet_id) + encode_properties(properties) + bytes(codes))


def decode_unsuback(body: bytes, version: int, strict: bool = True) -> Suback:
    """Raises `ProtocolError`."""
    reader = Reader(body, 0, len(body))
    packet_id = _read_packet_id(reader)
    if version < 5:
        reader.finish()
        return Suback(packet_id, [])
    properties = read_properties(reader, _UNSUBACK, 64, strict)
    return Suback(packet_id, _read_codes(reader, _UNSUBACK_CODES), properties)  # [MQTT-3.11.3-2]
