# cython: annotation_typing=False
# (the types are in the .pxd)
"""The one form of PUBLISH a worker gets millions of from its own broker, decoded in one step."""

from __future__ import annotations

from broker.mqtt.publish import Publish

_ONLY = b"\x26\x00\x08$isthmus"  # a user property of this name
_NAMED = len(_ONLY)


class Delivery(Publish):
    """A PUBLISH at QoS 1 whose only property is `$isthmus`; its `properties` are None, the value is in `metadata`."""

    __slots__ = ("metadata",)
    metadata: bytes


def decode_delivery(first: int, body: bytes) -> Publish | None:
    """None for a packet of any other form, well or ill: `decode_publish` knows what is wrong with it.

    Topic and value are not looked at: our own broker has looked, and who makes text of them notices what is none.
    """
    size = len(body)
    if first & 0xF6 != 0x32 or size < 2:
        return None
    view = body
    named = view[0] << 8 | view[1]
    at = named + 4  # behind topic and packet identifier
    if not named or at + 2 > size:
        return None
    length = view[at]
    at += 1
    if length >= 0x80:
        length = length & 0x7F | view[at] << 7
        at += 1
        if length >= 0x4000:  # a third byte, or too long a value
            return None
    end = at + length
    start = at + _NAMED + 2
    if start > end or end > size or body[at : start - 2] != _ONLY:
        return None
    if view[start - 2] << 8 | view[start - 1] != end - start:
        return None
    packet_id = view[named + 2] << 8 | view[named + 3]
    if not packet_id:
        return None
    delivery = Delivery.__new__(Delivery)
    delivery.topic = body[2 : named + 2]
    delivery.payload = body[end:]
    delivery.qos = 1
    delivery.retain = first & 0x01 != 0
    delivery.dup = first & 0x08 != 0
    delivery.packet_id = packet_id
    delivery.properties = None
    delivery.metadata = body[start:end]
    return delivery
