"""The packets about the connection itself: PINGREQ, PINGRESP, DISCONNECT, AUTH; and the flags of all packets."""

from __future__ import annotations

from broker.mqtt import writer
from broker.mqtt.codes import ReasonCode
from broker.mqtt.errors import MalformedPacket, ProtocolError
from broker.mqtt.properties import Properties, encode_properties, read_properties
from broker.mqtt.reader import Reader

_PUBLISH, _PUBREL, _SUBSCRIBE, _UNSUBSCRIBE, _DISCONNECT, _AUTH = 3, 6, 8, 10, 14, 15
_DISCONNECT_CODES = frozenset(bytes.fromhex("0004808182838789 8b8c8d8e8f 90939495969798999a9b9c9d9e9f a0a1a2"))
_AUTH_CODES = frozenset((0x00, 0x18, 0x19))


class Disconnect:
    """A DISCONNECT; 3.x has no code and no properties."""

    __slots__ = ("code", "properties")

    def __init__(self, code: int = 0, properties: Properties | None = None) -> None:
        self.code = code
        self.properties = properties


class Auth:
    """An AUTH, which only version 5 has; its properties always hold a method."""

    __slots__ = ("code", "properties")

    def __init__(self, code: int, properties: Properties | None) -> None:
        self.code = code
        self.properties = properties


def check_flags(first_byte: int, version: int) -> None:
    """Raises `ProtocolError` unless the first byte names a packet of this version and its reserved bits are right."""
    packet_type = first_byte >> 4
    flags = first_byte & 0x0F
    if packet_type == _PUBLISH:
        if flags & 0x06 == 0x06:  # [MQTT-3.3.1-4]
            raise MalformedPacket("QoS 3")
        if flags & 0x0E == 0x08:  # [MQTT-3.3.1-2]
            raise MalformedPacket("DUP with QoS 0")
        return
    if packet_type in (_PUBREL, _SUBSCRIBE, _UNSUBSCRIBE):
        if flags == 0x02:  # [MQTT-3.8.1-1] [MQTT-3.10.1-1] [MQTT-3.6.1-1]
            return
        if flags == 0x0A and version == 3:  # 3.1 lets these three be repeated with DUP
            return
    elif flags == 0 and packet_type != 0:
        if packet_type == _AUTH and version < 5:
            raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "AUTH before version 5")
        return
    raise MalformedPacket("wrong packet type or reserved flags")  # [MQTT-2.1.3-1]


def encode_pingreq() -> bytes:
    """Always the same two bytes."""
    return b"\xc0\x00"


def encode_pingresp() -> bytes:
    """Always the same two bytes."""
    return b"\xd0\x00"


def decode_ping(body: bytes) -> None:
    """A PINGREQ or PINGRESP has no body; raises `MalformedPacket` when it has."""
    if body:
        raise MalformedPacket("a ping with a body")


def decode_disconnect(body: bytes, version: int, strict: bool = True) -> Disconnect:
    """Raises `ProtocolError`."""
    if not body:
        return Disconnect()
    if version < 5:
        raise MalformedPacket("a DISCONNECT with a body")
    reader = Reader(body, 0, len(body))
    code = reader.byte()
    if code not in _DISCONNECT_CODES:  # [MQTT-3.14.2-1]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, f"unknown reason code {code:#04x} in DISCONNECT")
    properties = read_properties(reader, _DISCONNECT, 64, strict) if len(body) > 1 else None
    reader.finish()
    return Disconnect(code, properties)


def encode_disconnect(version: int, code: int = 0, properties: Properties | None = None) -> bytes:
    """In the shortest form; for 3.x always the two bytes of a client that leaves."""
    if version < 5 or (code == 0 and properties is None):
        return b"\xe0\x00"
    if properties is None:
        return bytes((0xE0, 1, code))
    return writer.packet(0xE0, bytes((code,)) + encode_properties(properties))


def decode_auth(body: bytes, version: int = 5, strict: bool = True) -> Auth:
    """Raises `ProtocolError`; also 0x82 when the method is missing."""
    if version < 5:
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "AUTH before version 5")
    reader = Reader(body, 0, len(body))
    code = 0
    properties = None
    if body:
        code = reader.byte()
        if code not in _AUTH_CODES:  # [MQTT-3.15.2-1]
            raise ProtocolError(ReasonCode.PROTOCOL_ERROR, f"unknown reason code {code:#04x} in AUTH")
        if len(body) > 1:
            properties = read_properties(reader, _AUTH, 64, strict)
    reader.finish()
    if properties is None or properties.authentication_method is None:
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "AUTH without a method")
    return Auth(code, properties)


def encode_auth(code: int, properties: Properties | None = None) -> bytes:
    """Properties must hold the method."""
    return writer.packet(0xF0, bytes((code,)) + encode_properties(properties))
