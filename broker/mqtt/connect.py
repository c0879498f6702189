# cython: annotation_typing=False
# (the types are in the .pxd)
"""CONNECT and CONNACK."""

from __future__ import annotations

from broker.mqtt import writer
from broker.mqtt.codes import ReasonCode, connack_v3
from broker.mqtt.errors import MalformedPacket, ProtocolError
from broker.mqtt.properties import Properties, encode_properties, read_properties
from broker.mqtt.reader import Reader
from broker.mqtt.text import check_text

_CONNECT, _CONNACK, _WILL = 1, 2, 16
_BRIDGE = 0x80  # in the protocol level: mosquitto's way of saying "I am a bridge"
_CONNACK_CODES = frozenset(bytes.fromhex("0080818283848586878889 8a8c909597999a9b9c9d9f"))


class Will:
    """What is published in the client's name when its connection breaks."""

    __slots__ = ("payload", "properties", "qos", "retain", "topic")

    def __init__(
        self, topic: bytes, payload: bytes, qos: int = 0, retain: bool = False, properties: Properties | None = None
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.properties = properties


class Connect:
    """A CONNECT. ``bridge`` is mosquitto's bridge bit; an empty ``client_id`` asks for one to be assigned."""

    __slots__ = (
        "bridge", "clean_start", "client_id", "keep_alive", "password", "properties", "username", "version", "will",
    )  # fmt: skip

    def __init__(
        self,
        *,
        version: int,
        client_id: str,
        clean_start: bool = True,
        keep_alive: int = 60,
        username: str | None = None,
        password: bytes | None = None,
        will: Will | None = None,
        properties: Properties | None = None,
        bridge: bool = False,
    ) -> None:
        self.version = version
        self.client_id = client_id
        self.clean_start = clean_start
        self.keep_alive = keep_alive
        self.username = username
        self.password = password
        self.will = will
        self.properties = properties
        self.bridge = bridge


class Connack:
    """A CONNACK. ``code`` is a reason code for version 5 and a return code (0 to 5) for 3.x."""

    __slots__ = ("code", "properties", "session_present")

    def __init__(self, session_present: bool, code: int, properties: Properties | None = None) -> None:
        self.session_present = session_present
        self.code = code
        self.properties = properties


def decode_connect(body: bytes, strict: bool = True, max_user_properties: int = 64) -> Connect:
    """Raises `ProtocolError`, whose ``version`` says in which form to refuse; 0: close without an answer."""
    reader = Reader(body, 0, len(body))
    level = _read_level(reader)
    version = level & 0x7F
    try:
        return _read_connect(reader, version, level >= _BRIDGE, strict, max_user_properties)
    except ProtocolError as error:
        error.version = version
        raise


def _read_level(reader: Reader) -> int:
    """The protocol level, bridge bit included, once name and level are known to be ours."""
    name = reader.binary()
    if name != b"MQTT" and name != b"MQIsdp":
        raise MalformedPacket("the protocol name is not MQTT")  # [MQTT-3.1.2-1]
    level = reader.byte()
    if name == b"MQTT":
        if level == 4 or level == 5 or level == _BRIDGE | 4:
            return level
        version = 5 if level & 0x7F >= 5 else 4
    else:
        if level == 3 or level == _BRIDGE | 3:
            return level
        version = 3
    raise ProtocolError(
        ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, f"protocol level {level} is not supported", version
    )  # [MQTT-3.1.2-2]


def _read_connect(reader: Reader, version: int, bridge: bool, strict: bool, max_user_properties: int) -> Connect:
    flags = reader.byte()
    _check_connect_flags(flags, version)
    keep_alive = reader.uint16()
    properties = None
    if version == 5:
        properties = read_properties(reader, _CONNECT, max_user_properties, strict)
        if (
            properties is not None
            and properties.authentication_data is not None
            and properties.authentication_method is None
        ):
            raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "authentication data without a method")
    client_id = reader.text(strict)
    will = _read_will(reader, flags, version, strict, max_user_properties) if flags & 0x04 else None
    username = reader.text(strict) if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    reader.finish()
    return Connect(
        version=version,
        client_id=client_id,
        clean_start=flags & 0x02 != 0,
        keep_alive=keep_alive,
        username=username,
        password=password,
        will=will,
        properties=properties,
        bridge=bridge,
    )


def _check_connect_flags(flags: int, version: int) -> None:
    if flags & 0x01:  # [MQTT-3.1.2-3]
        raise MalformedPacket("the reserved flag of CONNECT is set")
    if flags & 0x04:
        if flags & 0x18 == 0x18:  # [MQTT-3.1.2-12]
            raise MalformedPacket("will QoS 3")
    elif flags & 0x38:  # [MQTT-3.1.2-11] [MQTT-3.1.2-13]
        raise MalformedPacket("will flags without a will")
    if flags & 0xC0 == 0x40 and version < 5:  # [MQTT-3.1.2-22] of 3.1.1
        raise MalformedPacket("a password without a user name")


def _read_will(reader: Reader, flags: int, version: int, strict: bool, max_user_properties: int) -> Will:
    properties = read_properties(reader, _WILL, max_user_properties, strict) if version == 5 else None
    topic = reader.binary()
    check_text(topic, strict)
    if not topic or b"+" in topic or b"#" in topic:  # [MQTT-4.7.1-1] [MQTT-4.7.3-1]
        raise ProtocolError(ReasonCode.TOPIC_NAME_INVALID, "the will topic is empty or has a wildcard")
    payload = reader.binary()
    return Will(topic, payload, flags >> 3 & 3, flags & 0x20 != 0, properties)


def encode_connect(connect: Connect) -> bytes:
    """Raises ValueError for a field that does not fit."""
    version = connect.version
    will = connect.will
    flags = 0x02 if connect.clean_start else 0
    parts = [
        b"\x00\x06MQIsdp" if version == 3 else b"\x00\x04MQTT",
        bytes((version | (_BRIDGE if connect.bridge else 0),)),
        b"",  # the flags
        writer.uint16(connect.keep_alive),
    ]
    if version == 5:
        parts.append(encode_properties(connect.properties))
    parts.append(writer.text(connect.client_id))
    if will is not None:
        flags |= 0x04 | will.qos << 3 | (0x20 if will.retain else 0)
        if version == 5:
            parts.append(encode_properties(will.properties))
        parts.append(writer.binary(will.topic))
        parts.append(writer.binary(will.payload))
    if connect.username is not None:
        flags |= 0x80
        parts.append(writer.text(connect.username))
    if connect.password is not None:
        flags |= 0x40
        parts.append(writer.binary(connect.password))
    parts[2] = bytes((flags,))
    return writer.packet(0x10, b"".join(parts))


def encode_connack(version: int, session_present: bool, code: int, properties: Properties | None = None) -> bytes:
    """``code`` is an MQTT 5 reason code; 3.x gets the nearest return code, or ``code`` below 6 as it is."""
    flags = 1 if session_present and code == 0 else 0  # [MQTT-3.2.2-6]
    if version < 5:
        return bytes((0x20, 2, flags, code if code <= 5 else connack_v3(code)))
    if properties is None:
        return bytes((0x20, 3, flags, code, 0))
    return writer.packet(0x20, bytes((flags, code)) + encode_properties(properties))


def decode_connack(body: bytes, version: int, strict: bool = True) -> Connack:
    """Raises `ProtocolError`."""
    reader = Reader(body, 0, len(body))
    flags = reader.byte()
    if flags > 1:  # [MQTT-3.2.2-1]
        raise MalformedPacket("reserved flags of CONNACK are set")
    code = reader.byte()
    properties = None
    if version < 5:
        if code > 5:
            raise ProtocolError(ReasonCode.PROTOCOL_ERROR, f"unknown return code {code} in CONNACK")
    elif code == 1 and len(body) == 2:  # a server of 3.x answers in its own form, MQTT 5 section 3.1.2.2
        code = 0x84
    else:
        if code not in _CONNACK_CODES:  # [MQTT-3.2.2-8]
            raise ProtocolError(ReasonCode.PROTOCOL_ERROR, f"unknown reason code {code:#04x} in CONNACK")
        properties = read_properties(reader, _CONNACK, 64, strict)
    reader.finish()
    if flags and code:  # [MQTT-3.2.2-6]
        raise ProtocolError(ReasonCode.PROTOCOL_ERROR, "session present in a refusal")
    return Connack(flags == 1, code, properties)
