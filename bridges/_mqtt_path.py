"""What a message's property block loses and gains on its way across a bridge."""

from __future__ import annotations

from broker.mqtt.errors import ProtocolError
from broker.mqtt.packets import Publish
from broker.mqtt.properties import BRIDGE_PATH, user_property
from broker.mqtt.text import check_text

PATH = BRIDGE_PATH.decode()
LONGEST = 8
"""Hops after which a message is taken to run in a circle."""
ORIGIN = "x-bridge-origin"
"""User property beside a foreign broker: the bridge a message came in over. Isthmus itself knows without it."""
_ORIGIN = ORIGIN.encode()
_METADATA = b"$isthmus"  # written by our own broker towards us; neither side may see the other's

_FLAG, _CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION, _PAIR = 0x01, 0x03, 0x08, 0x09, 0x26


class Loops(Exception):
    """The message has been here before."""


def carry(publish: Publish, node: str, outward: bool, origin: str = "") -> bytes:
    """The property block, without its length, that ``publish`` has on the other side; both sides speak 5.0.

    Takes our metadata off, in both directions, adds ``node`` to the path on the way out, and marks what comes in with
    ``origin`` unless that is empty. What the property reader of a strict broker would refuse raises ProtocolError; a
    message that runs in a circle raises Loops.
    """
    properties = publish.properties
    mark = user_property(ORIGIN, origin) if origin and not outward else b""
    if properties is None:
        return user_property(PATH, node) if outward else mark
    kept = b""
    path = ""
    if properties.forward:
        kept, path = _filter(properties.forward)
    hops = path.split(",") if path else []
    if node in hops or len(hops) > LONGEST:
        raise Loops
    if properties.message_expiry_interval is not None:
        kept += b"\x02" + properties.message_expiry_interval.to_bytes(4, "big")  # [MQTT-3.3.2-6]
    if outward:
        kept += user_property(PATH, f"{path},{node}" if path else node)
    elif path:
        kept += user_property(PATH, path)
    return kept + mark


def is_marked(publish: Publish, origin: str) -> bool:
    """Whether the message came in over the bridge that marks with ``origin``."""
    properties = publish.properties
    return properties is not None and (ORIGIN, origin) in (properties.user_properties or ())


def _filter(block: bytes) -> tuple[bytes, str]:
    """The block without what brokers wrote for themselves, and the path."""
    kept = []
    path = ""
    position, end = 0, len(block)
    while position < end:
        start = position
        kind = block[position]
        if kind == _FLAG:
            position += 2
        elif kind in (_CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION):
            first = position + 3
            position = first + int.from_bytes(block[position + 1 : first], "big")
            if kind != _CORRELATION:
                check_text(block[first:position])
        elif kind == _PAIR:
            first = position + 3
            middle = first + int.from_bytes(block[position + 1 : first], "big")
            position = middle + 2 + int.from_bytes(block[middle : middle + 2], "big")
            key = block[first:middle]
            if key in (_METADATA, _ORIGIN):
                continue
            if key == BRIDGE_PATH:
                more = block[middle + 2 : position].decode()
                path = f"{path},{more}" if path else more
                continue
            check_text(key)
            check_text(block[middle + 2 : position])
        else:
            raise ProtocolError(0x82, f"property {kind:#04x} in a block to be forwarded")
        kept.append(block[start:position])
    return b"".join(kept), path
