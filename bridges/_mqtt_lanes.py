"""Several links of one bridge to the same remote broker, for links where the way there and back is long.

Each lane has a durable session of its own on our side and a client id of its own on the other; the broker gives it
the messages of its topics, so the order within a topic is kept. The first lane is the whole bridge as it would be
alone; the others only send.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from broker.client.connection import Connection, Handler
from broker.config.loops import intersection
from broker.extend.bridge import Local
from broker.mqtt.packets import Publish
from broker.runtime.state import added

if TYPE_CHECKING:
    from bridges.mqtt import MqttConfig

_PUBACK, _PUBREC, _PUBCOMP = 4, 5, 7
_STATES = ("down", "connecting", "connected")


def overlap(config: MqttConfig) -> tuple[str, str] | None:
    """Remote filters of a line out and a line in that share topics; None when there are none."""
    for out in config.topics:
        for into in config.topics:
            if out.out and into.into and intersection(out.remote, into.remote) is not None:
                return out.remote, into.remote
    return None


def sending(config: MqttConfig) -> MqttConfig:
    """What lanes behind the first do of ``config``."""
    lines = tuple(line.model_copy(update={"direction": "out"}) for line in config.topics if line.out)
    return config.model_copy(update={"topics": lines, "notifications": False})


class Lane:
    """The broker's side as one of several links sees it; what it reports becomes part of one report."""

    def __init__(self, number: int, whole: Whole) -> None:
        self.number = number
        self.node = whole.local.node
        self.echoes = whole.local.echoes
        self._whole = whole

    async def receive(self, handler: Handler) -> Connection:
        """See `extend.bridge.Local`."""
        return await self._whole.local.receive(handler, self.number)

    async def publish(self, handler: Handler) -> Connection:
        """See `extend.bridge.Local`."""
        return await self._whole.local.publish(handler)

    def report(self, **status: Any) -> None:
        """See `extend.bridge.Local`."""
        self._whole.merge(self.number, status)


class Whole:
    """All lanes of a bridge in one report: the worst state, the sum of what is counted, else what the first says."""

    def __init__(self, local: Local, lanes: int) -> None:
        self.local = local
        self.lanes = [Lane(number, self) for number in range(lanes)]
        self._said: list[dict[str, Any]] = [{"state": "connecting"} for _ in self.lanes]

    def merge(self, number: int, status: dict[str, Any]) -> None:
        """One lane has news."""
        self._said[number].update(status)
        if len(self._said) == 1:
            self.local.report(**status)
            return
        state = min((said["state"] for said in self._said), key=_STATES.index)
        self.local.report(**{**added(self._said), "state": state})


class Nothing:
    """Stands where a lane that only sends has no way in: what a remote session still delivers is acknowledged here."""

    open = 0

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def on_publish(self, source: Connection, publish: Publish) -> None:
        """A message of a subscription from before."""
        self._counts["dropped.unmapped"] += 1
        if publish.qos:
            source.ack(_PUBACK if publish.qos == 1 else _PUBREC, publish.packet_id)

    def on_release(self, source: Connection, packet_id: int) -> None:
        """The end of its handshake."""
        source.ack(_PUBCOMP, packet_id)

    def on_answer(self, packet_type: int, packet_id: int, code: int) -> None:
        """Nothing was sent that could be answered."""

    def stalled(self) -> float | None:
        """Nothing waits."""
        return None

    def close(self) -> None:
        """Nothing is kept."""
