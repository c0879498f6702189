"""Two brokers as small as MQTT allows, with the relay between them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from bridges._mqtt_relay import Relay, Target
from bridges._mqtt_topics import Routes, TopicLine
from broker.mqtt import packets
from broker.mqtt.packets import Connack, Publish
from broker.mqtt.properties import Properties


class FakeConnection:
    """What the relay needs of a connection; keeps what was sent through it, in order."""

    def __init__(self, version: int = 5, properties: Properties | None = None) -> None:
        self.version = version
        self.connack = Connack(False, 0, properties)
        self.receive_maximum = (properties.receive_maximum if properties else None) or 65_535
        self.maximum_packet_size = (properties.maximum_packet_size if properties else None) or 268_435_460
        self.congested = False
        self.sent: list[tuple[Any, ...]] = []

    def send(self, raw: bytes) -> None:
        reader = packets.decode_publish(raw[0], _body(raw), self.version)
        self.sent.append(("publish", reader))

    def ack(self, packet_type: int, packet_id: int, code: int = 0) -> None:
        self.sent.append((packet_type, packet_id))

    async def ping(self) -> float:
        pong: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.sent.append(("ping", pong))
        return await pong

    def taken(self) -> list[tuple[Any, ...]]:
        sent, self.sent = self.sent, []
        return sent


def _body(raw: bytes) -> bytes:
    position = 1
    while raw[position] & 0x80:
        position += 1
    return raw[position + 1 :]


def line(filter: str = "#", qos: int = 2, **keys: Any) -> TopicLine:
    """One `topics` line, going out unless said otherwise."""
    return TopicLine.model_validate({"filter": filter, "qos": qos, **keys})


class Bench:
    """A relay on the way out, with both connections in the test's hands."""

    def __init__(
        self,
        *lines: TopicLine,
        version: int = 5,
        properties: Properties | None = None,
        window: int = 1000,
        outward: bool = True,
        retain: bool = True,
        origin: str = "",
    ) -> None:
        self.source: Any = FakeConnection()
        self.target: Any = FakeConnection(version, properties)
        self.counts: Counter[str] = Counter()
        self.refusals: list[tuple[str, str]] = []
        self.not_kept = 0
        self.relay = Relay(
            Routes(lines or (line(),), outward),
            Target(self.target, window),
            node="node-a",
            outward=outward,
            counts=self.counts,
            retain=retain,
            origin=origin,
            refused=lambda why, detail: self.refusals.append((why, detail)),
            not_kept=None if outward else self._count_not_kept,
        )

    def _count_not_kept(self) -> None:
        self.not_kept += 1

    def publish(
        self, packet_id: int = 1, qos: int = 2, topic: bytes = b"a", payload: bytes = b"x", **keys: Any
    ) -> None:
        """A message from the source."""
        self.relay.on_publish(self.source, Publish(topic, payload, qos, packet_id=packet_id if qos else 0, **keys))

    def crossed(self) -> list[Publish]:
        """Messages the target was sent since the last call; acknowledgements among them are dropped."""
        return [item[1] for item in self.target.taken() if item[0] == "publish"]
