"""Every packet under one name: what the modules of this room export, and `decode` for any packet."""

from __future__ import annotations

from collections.abc import Callable

from broker.mqtt.connect import (
    Connack,
    Connect,
    Will,
    decode_connack,
    decode_connect,
    encode_connack,
    encode_connect,
)
from broker.mqtt.control import (
    Auth,
    Disconnect,
    check_flags,
    decode_auth,
    decode_disconnect,
    decode_ping,
    encode_auth,
    encode_disconnect,
    encode_pingreq,
    encode_pingresp,
)
from broker.mqtt.publish import Ack, Publish, decode_ack, decode_publish, encode_ack, encode_publish
from broker.mqtt.subscribe import (
    Suback,
    Subscribe,
    Unsubscribe,
    decode_suback,
    decode_subscribe,
    decode_unsuback,
    decode_unsubscribe,
    encode_suback,
    encode_subscribe,
    encode_unsuback,
    encode_unsubscribe,
)

Packet = Connect | Connack | Publish | Ack | Subscribe | Suback | Unsubscribe | Disconnect | Auth

__all__ = [
    "Ack",
    "Auth",
    "Connack",
    "Connect",
    "Disconnect",
    "Packet",
    "Publish",
    "Suback",
    "Subscribe",
    "Unsubscribe",
    "Will",
    "check_flags",
    "decode",
    "decode_ack",
    "decode_auth",
    "decode_connack",
    "decode_connect",
    "decode_disconnect",
    "decode_ping",
    "decode_publish",
    "decode_suback",
    "decode_subscribe",
    "decode_unsuback",
    "decode_unsubscribe",
    "encode_ack",
    "encode_auth",
    "encode_connack",
    "encode_connect",
    "encode_disconnect",
    "encode_pingreq",
    "encode_pingresp",
    "encode_publish",
    "encode_suback",
    "encode_subscribe",
    "encode_unsuback",
    "encode_unsubscribe",
]


def decode(first_byte: int, body: bytes, version: int, from_client: bool = False) -> Packet | None:
    """Any packet, None for a ping. Raises `ProtocolError`."""
    check_flags(first_byte, version)
    packet_type = first_byte >> 4
    if packet_type == 3:
        return decode_publish(first_byte, body, version, from_client=from_client)
    if packet_type in (4, 5, 6, 7):
        return decode_ack(body, version, packet_type)
    if packet_type == 1:
        return decode_connect(body)
    if packet_type in (12, 13):
        decode_ping(body)
        return None
    return _DECODERS[packet_type](body, version)


_DECODERS: dict[int, Callable[[bytes, int], Packet]] = {
    2: decode_connack,
    8: decode_subscribe,
    9: decode_suback,
    10: decode_unsubscribe,
    11: decode_unsuback,
    14: decode_disconnect,
    15: decode_auth,
}
