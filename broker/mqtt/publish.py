# cython: annotation_typing=False
# (the types are in the .pxd)
"""PUBLISH and the four packets that acknowledge it."""

from __future__ import annotations

from broker.mqtt import writer
from broker.mqtt.codes import ReasonCode
from broker.mqtt.errors import MalformedPacket, ProtocolError
from broker.mqtt.framing import encode_length
from broker.mqtt.properties import Properties, encode_properties, read_properties
from broker.mqtt.reader import Reader
from broker.mqtt.text import check_text

_PUBLISH, _INBOUND = 3, 17
_PUBREL, _PUBCOMP = 6, 7
_ACK_CODES = frozenset((0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99))
_RELEASE_CODES = frozenset((0x00, 0x92))


class Publish:
    """A PUBLISH; ``packet_id`` is 0 for QoS 0, ``topic`` is empty when only an alias was sent."""

    __slots__ = ("dup", "packet_id", "payload", "properties", "qos", "retain", "topic")

    def __init__(
        self,
        topic: bytes,
        payload: bytes,
        qos: int = 0,
        retain: bool = False,
        dup: bool = False,
        packet_id: int = 0,
        properties: Properties | None = None,
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.dup = dup
        self.packet_id = packet_id
        self.properties = properties


class Ack:
    """A PUBACK, PUBREC, PUBREL or PUBCOMP."""

    __slots__ = ("code", "packet_id", "properties")

    def __init__(self, packet_id: int, code: int = 0, properties: Properties | None = None) -> None:
        self.packet_id = packet_id
        self.code = code
        self.properties = properties


def decode_publish(
    first_byte: int,
    body: bytes,
    version: int,
    max_user_properties: int = 64,
    strict: bool = True,
    from_client: bool = False,
) -> Publish:
    """``from_client`` also refuses what only a server may send. Raises `ProtocolError`."""
    qos = first_byte >> 1 & 3
    dup = first_byte & 0x08 != 0
    if qos == 3:  # [MQTT-3.3.1-4]
        raise MalformedPacket("QoS 3")
    if dup and qos == 0:  # [MQTT-3.3.1-2]
        raise MalformedPacket("DUP with QoS 0")
    reader = Reader(body, 0, len(body))
    topic = reader.binary()
    check_text(topic, strict)  # [MQTT-3.3.2-1]
    if b"+" in topic or b"#" in topic:  # [MQTT-3.3.2-2]
        raise ProtocolError(ReasonCode.TOPIC_NAME_INVALID, "a wildcard in the topic of a PUBLISH")
    packet_id = 0
    if qos:
        packet_id = _read_packet_id(reader)
    properties = None
    if version == 5:
        properties = read_properties(reader, _INBOUND if from_client else _PUBLISH, max_user_properties, strict)
    if not topic and (properties is None or properties.topic_alias is None):  # [MQTT-4.7.3-1]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "a PUBLISH without a topic")
    return Publish(topic, reader.rest(), qos, first_byte & 0x01 != 0, dup, packet_id, properties)


def _read_packet_id(reader: Reader) -> int:
    packet_id = reader.uint16()
    if packet_id == 0:  # [MQTT-2.2.1-3]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "packet identifier 0")
    return packet_id


def encode_publish(
    topic: bytes,
    payload: bytes,
    qos: int,
    retain: bool,
    dup: bool,
    packet_id: int,
    version: int,
    properties: bytes = b"",
) -> bytes:
    """``properties`` is an encoded block without its length and is ignored for 3.x, as ``packet_id`` is for QoS 0."""
    head = writer.binary(topic)
    if qos:
        head += writer.uint16(packet_id)
    if version == 5:
        head += encode_length(len(properties)) + properties
    first = 0x30 | (0x08 if dup and qos else 0) | qos << 1 | (0x01 if retain else 0)
    return b"".join((bytes((first,)), encode_length(len(head) + len(payload)), head, payload))


def decode_ack(body: bytes, version: int, packet_type: int, strict: bool = True) -> Ack:
    """``packet_type`` is PUBACK, PUBREC, PUBREL or PUBCOMP. Raises `ProtocolError`."""
    reader = Reader(body, 0, len(body))
    packet_id = _read_packet_id(reader)
    code = 0
    properties = None
    if version == 5 and len(body) > 2:
        code = reader.byte()
        if code and code not in (_RELEASE_CODES if packet_type >= _PUBREL else _ACK_CODES):  # [MQTT-3.4.2-1]
            raise ProtocolError(ReasonCode.PROTOCOL_ERROR, f"unknown reason code {code:#04x} in an acknowledgement")
        if len(body) > 3:
            properties = read_properties(reader, packet_type, 64, strict)
    reader.finish()
    return Ack(packet_id, code, properties)


def encode_ack(
    packet_type: int, packet_id: int, version: int, code: int = 0, properties: Properties | None = None
) -> bytes:
    """In the shortest form that holds ``code`` and ``properties``; 3.x has neither."""
    first = packet_type << 4 | (0x02 if packet_type == _PUBREL else 0)  # [MQTT-3.6.1-1]
    if version < 5 or (code == 0 and properties is None):
        return bytes((first, 2, packet_id >> 8, packet_id & 0xFF))
    if properties is None:
        return bytes((first, 3, packet_id >> 8, packet_id & 0xFF, code))
    return writer.packet(first, bytes((packet_id >> 8, packet_id & 0xFF, code)) + encode_properties(properties))
