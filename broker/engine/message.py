"""One application message as a value: what was published, by whom, and its encodings, made once and shared.

No references to connections or sessions. Bytes of the same version and QoS are encoded on first use and handed to
every receiver.
"""

import json
from typing import Any

from broker.mqtt.framing import encode_length
from broker.mqtt.properties import BRIDGE_PATH, user_property

METADATA = "$isthmus"
_PATH = b"\x26" + len(BRIDGE_PATH).to_bytes(2, "big") + BRIDGE_PATH


class Origin:
    """Who published: constant for the life of a connection, shared by all its messages."""

    def __init__(
        self, client_id: str, username: str | None, peerhost: str, instance: str | None, principal: Any, node: str
    ) -> None:
        self.client_id = client_id
        self.username = username
        self.peerhost = peerhost
        self.instance = instance
        self.principal = principal
        self.node = node
        self._prefix: str | None = None

    def prefix(self) -> str:
        """The constant part of the metadata, JSON without its closing brace."""
        if self._prefix is None:
            head = {"c": self.client_id, "u": self.username, "a": self.peerhost, "o": self.instance, "n": self.node}
            self._prefix = json.dumps(head, separators=(",", ":"), ensure_ascii=False)[:-1]
        return self._prefix


class Message:
    """`properties` is the raw block a PUBLISH passes on unchanged; `expires` is on the engine's clock, 0 for never."""

    def __init__(
        self, topic: bytes, payload: bytes, qos: int, retain: bool, properties: bytes, expires: float, origin: Any
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.properties = properties
        self.expires = expires
        self.origin = origin
        self.ident = ""
        self.time_ms = 0
        """When it arrived, by the wall clock; as its identifier says."""
        self.clock_ms = 0
        """When it arrived, by `Core.clock`; 0 for nobody knows."""
        self.packet4: bytes | None = None
        self.packet5: bytes | None = None
        self.head4: bytes | None = None
        self.head5: bytes | None = None
        self.body5: bytes | None = None
        self.pending: Any = None
        """The record of a message that must survive, until it is written and after."""
        self.kept: Any = None
        """The record that keeps it as its topic's retained message."""

    @property
    def size(self) -> int:
        """Bytes this message counts for in queues."""
        return len(self.topic) + len(self.payload) + len(self.properties)

    def publish0(self, v5: bool) -> bytes:
        """The whole PUBLISH at QoS 0 without extras."""
        if v5:
            if self.packet5 is None:
                self.packet5 = encode_head(self.topic, 0x30, len(self.body(True))) + self.body(True)
            return self.packet5
        if self.packet4 is None:
            self.packet4 = encode_head(self.topic, 0x30, len(self.payload)) + self.payload
        return self.packet4

    def head(self, v5: bool, qos: int) -> bytes:
        """What stands before the packet identifier of a PUBLISH at this QoS, without retain."""
        if qos != self.qos:
            return encode_head(self.topic, 0x30 | qos << 1, 2 + len(self.body(v5)))
        if v5:
            if self.head5 is None:
                self.head5 = encode_head(self.topic, 0x30 | qos << 1, 2 + len(self.body(True)))
            return self.head5
        if self.head4 is None:
            self.head4 = encode_head(self.topic, 0x30 | qos << 1, 2 + len(self.payload))
        return self.head4

    def body(self, v5: bool) -> bytes:
        """What stands after the packet identifier."""
        if not v5:
            return self.payload
        if self.body5 is None:
            if self.properties:
                self.body5 = encode_length(len(self.properties)) + self.properties + self.payload
            else:
                self.body5 = b"\x00" + self.payload
        return self.body5

    def body_with(self, extra: bytes) -> bytes:
        """The MQTT 5 body with more properties in front of those passed on."""
        block = extra + self.properties
        return encode_length(len(block)) + block + self.payload

    def metadata(self) -> bytes:
        """The `$isthmus` property towards privileged receivers. `ident` and `time_ms` must be set."""
        origin = self.origin
        prefix = origin.prefix() if origin is not None else "{"
        comma = "," if len(prefix) > 1 else ""
        hops = bridges_crossed(self.properties) if self.properties else 0
        own = f'"t":{self.time_ms},"i":"{self.ident}","q":{self.qos},"r":{int(self.retain)},"h":{hops}'
        return user_property(METADATA, f"{prefix}{comma}{own}}}")


def bridges_crossed(properties: bytes) -> int:
    """Nodes named in the bridge path of a property block; 0 for a message that was published here."""
    at = properties.find(_PATH)
    if at < 0:
        return 0
    at += len(_PATH)
    path = properties[at + 2 : at + 2 + int.from_bytes(properties[at : at + 2], "big")]
    return path.count(b",") + 1


def encode_head(topic: bytes, first: int, rest: int) -> bytes:
    """Fixed header and topic name; `rest` is the number of bytes that follow the topic."""
    n = len(topic)
    return bytes((first,)) + encode_length(2 + n + rest) + n.to_bytes(2, "big") + topic


def split_head(head: bytes) -> bytes:
    """The topic of the first piece of a PUBLISH."""
    at = 1
    while head[at] & 128:
        at += 1
    return head[at + 3 :]


def split_body(body: bytes) -> tuple[bytes, bytes]:
    """(properties, payload) of the second piece of an MQTT 5 PUBLISH."""
    size = 0
    shift = 0
    at = 0
    while True:
        byte = body[at]
        at += 1
        size |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return body[at : at + size], body[at + size :]


def convert_packet(head: bytes, body: bytes, v5: bool) -> tuple[bytes, bytes]:
    """The two pieces of a PUBLISH for the other protocol version: a client may come back with another one."""
    body = b"\x00" + body if v5 else split_body(body)[1]
    return encode_head(split_head(head), head[0], len(body) + 2), body
