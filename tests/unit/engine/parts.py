"""Bytes and counts the engine's tests share."""

from __future__ import annotations

from typing import Any

from broker.engine.engine import Engine
from broker.mqtt import packets
from tests.unit.engine.harness import Bench, Client, Link, connect_packet

PUBACK, PUBREC, PUBREL, PUBCOMP = 0x40, 0x50, 0x62, 0x70


def ack(first: int, ident: int, *code: int) -> bytes:
    """An acknowledgement in its short form."""
    return bytes((first, 2 + len(code), ident >> 8, ident & 255, *code))


def publish(topic: str, payload: bytes = b"x", qos: int = 0, ident: int = 1, version: int = 4, **flags: Any) -> bytes:
    """The bytes of a PUBLISH."""
    return packets.encode_publish(
        topic.encode(), payload, qos, flags.get("retain", False), flags.get("dup", False), ident if qos else 0, version,
        flags.get("properties", b""),
    )  # fmt: skip


def payloads(client: Client) -> list[bytes]:
    """What the PUBLISH packets since the last look carried."""
    return [packet.payload for packet in client.take() if isinstance(packet, packets.Publish)]


def resume(bench: Bench, client_id: str, version: int = 4, **properties: Any) -> Client:
    """A client that comes back to its session; its packets are still to be taken, CONNACK first."""
    client = bench.socket()
    client.version = version
    client.send(connect_packet(client_id, version, clean=False, **properties))
    return client


def closed_with(client: Client, code: int) -> bool:
    """Whether the connection has ended as its version wants: MQTT 5 is told the reason, 3.x nothing."""
    answers = client.take()
    if not client.closed:
        return False
    if client.version == 5:
        return bool(answers) and getattr(answers[-1], "code", None) == code
    return not answers


def is_empty(engine: Engine) -> bool:
    """Whether the engine holds nothing of any client."""
    return not (
        engine.sessions or engine.groups or engine.holding or engine.router.count or engine.router.exact
        or engine.router.root.children or engine.router.root.plus or engine.router.root.below or engine.wheel.buckets
    )  # fmt: skip


class Slow(Link):
    """A transport that may say it is full: nothing is written while it is."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        super().write(data)
        self.writes.append(data)
