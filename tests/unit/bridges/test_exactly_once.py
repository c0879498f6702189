"""B-03: QoS 2 between two model brokers, cut before and after every packet.

The model brokers keep what MQTT asks them to keep and nothing else. Each run counts the packets that pass between the
three parties and cuts both connections before the n-th arrives, for every n there is, and for every pair of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from itertools import combinations
from typing import Any

import pytest

from bridges._mqtt_relay import Relay, Target
from bridges._mqtt_topics import Routes
from broker.mqtt.packets import Publish
from tests.unit.bridges.fakes import FakeConnection, line

PUBACK, PUBREC, PUBREL, PUBCOMP = 4, 5, 6, 7
MESSAGES = 3


class Source:
    """A session that sends: identifiers come back as soon as they are free."""

    def __init__(self, qos: int) -> None:
        self.qos = qos
        self.todo = deque(range(MESSAGES))
        self.open: dict[int, tuple[int, bool]] = {}  # identifier -> message, PUBREC seen

    def begin(self) -> list[tuple[Any, ...]]:
        """What is sent on a new connection: everything open, then what fits."""
        again = [(PUBREL, n) if released else self._publish(n, m, True) for n, (m, released) in self.open.items()]
        return again + self.fill()

    def fill(self) -> list[tuple[Any, ...]]:
        new = []
        while self.todo and len(self.open) < 2:
            packet_id = next(n for n in (1, 2) if n not in self.open)
            self.open[packet_id] = (self.todo.popleft(), False)
            new.append(self._publish(packet_id, self.open[packet_id][0], False))
        return new

    def take(self, packet: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        packet_type, packet_id = packet
        if packet_id not in self.open:
            return []
        message, released = self.open[packet_id]
        if packet_type == PUBREC:
            self.open[packet_id] = (message, True)
            return [(PUBREL, packet_id)]
        if packet_type == PUBACK or released:
            del self.open[packet_id]
        return self.fill()

    def _publish(self, packet_id: int, message: int, dup: bool) -> tuple[Any, ...]:
        return ("publish", Publish(b"a", b"%d" % message, self.qos, packet_id=packet_id, dup=dup))


class Careless(Source):
    """As mosquitto up to 2.0.12 behind a long queue: everything is in flight, under identifiers that come again, and an
    answer is taken for that of the oldest message it can belong to."""

    def __init__(self, qos: int) -> None:
        super().__init__(qos)
        self.list: list[list[Any]] = [[n % 2 + 1, n, "new"] for n in range(2 * MESSAGES)]  # identifier, message, state
        self.broken = False

    def begin(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for entry in self.list:
            packet_id, message, state = entry
            if state == "release":
                found.append((PUBREL, packet_id))
            else:
                found.append(self._publish(packet_id, message, state == "sent"))
                entry[2] = "sent"
        return found

    def take(self, packet: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        packet_type, packet_id = packet
        entry = next((entry for entry in self.list if entry[0] == packet_id), None)
        if entry is None:
            return []
        if packet_type == PUBREC:
            entry[2] = "release"
            return [(PUBREL, packet_id)]
        assert entry[2] == "release", "it would end the connection"
        self.list.remove(entry)
        return []


class Sink:
    """A session that receives; delivers a message when it first sees its identifier."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.delivered: list[int] = []

    def take(self, packet: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if packet[0] == "publish":
            publish = packet[1]
            if publish.qos == 1:
                self.delivered.append(int(publish.payload))
                return [(PUBACK, publish.packet_id)]
            if publish.packet_id not in self.held:
                self.held.add(publish.packet_id)
                self.delivered.append(int(publish.payload))
            return [(PUBREC, publish.packet_id)]
        self.held.discard(packet[1])
        return [(PUBCOMP, packet[1])]


class World:
    """Source, relay and sink with the packets between them; `cuts` are counts of passed packets."""

    def __init__(self, qos: int, cuts: tuple[int, ...], source: type[Source] = Source) -> None:
        self.qos = qos
        self.source, self.sink = source(qos), Sink()
        self.cuts = set(cuts)
        self.passed = 0
        self.connect()

    def connect(self) -> None:
        self.near: Any = FakeConnection()
        self.far: Any = FakeConnection()
        self.relay = Relay(
            Routes((line(qos=2),), True),
            Target(self.far, 100),
            node="n",
            outward=True,
            counts=Counter(),
            refused=lambda why, detail: None,
        )
        self.to_relay: deque[tuple[Any, ...]] = deque(self.source.begin())
        self.from_sink: deque[tuple[Any, ...]] = deque()

    def step(self) -> bool:
        """Pass one packet on, or cut everything just before; False when nothing is under way."""
        legs = [self.from_sink, self.near.sent, self.far.sent, self.to_relay]
        if not any(legs):
            return False
        self.passed += 1
        if self.passed in self.cuts:
            self.relay.close()
            self.connect()  # whatever was under way is lost
            return True
        if self.far.sent:
            self.from_sink.extend(self.sink.take(self.far.sent.pop(0)))
        elif self.near.sent and self.near.sent[0][0] == "ping":
            self.near.sent.pop(0)[1].set_result(0.0)
        elif self.near.sent:
            self.to_relay.extend(self.source.take(self.near.sent.pop(0)))
        elif self.from_sink:
            packet_type, packet_id = self.from_sink.popleft()
            self.relay.on_answer(packet_type, packet_id, 0)
        else:
            packet = self.to_relay.popleft()
            if packet[0] == "publish":
                self.relay.on_publish(self.near, packet[1])
            else:
                self.relay.on_release(self.near, packet[1])
        return True

    def run(self) -> int:
        for _ in range(1000):
            if not self.step():
                return self.passed
        raise AssertionError("the exchange never ends")

    async def run_with_pings(self) -> int:
        for _ in range(1000):
            if not self.step():
                for _ in range(4):  # a ping, or what waits for its answer
                    await asyncio.sleep(0)
                if not self.step():
                    return self.passed
        raise AssertionError("the exchange never ends")


async def test_b03_every_cut_and_every_pair_of_cuts_is_exactly_once() -> None:
    length = World(2, ()).run()
    assert length >= 8 * MESSAGES  # four packets on two legs each
    cuts = [(n,) for n in range(1, length + 1)] + list(combinations(range(1, length + 12), 2))
    for cut in cuts:
        world = World(2, cut)
        world.run()
        assert sorted(world.sink.delivered) == list(range(MESSAGES)), f"cut before packets {cut}"
        assert not world.source.open, f"cut before packets {cut}: {world.source.open}"
        assert not world.sink.held, f"cut before packets {cut}: {world.sink.held}"


@pytest.mark.parametrize("qos", [1])
async def test_every_cut_at_qos_1_is_at_least_once(qos: int) -> None:
    length = World(qos, ()).run()
    for cut in range(1, length + 1):
        world = World(qos, (cut,))
        world.run()
        assert set(world.sink.delivered) == set(range(MESSAGES)), f"cut before packet {cut}"
        assert not world.source.open


async def test_b03_a_source_that_uses_open_identifiers_again_is_exactly_once_and_in_order() -> None:
    length = await World(2, (), Careless).run_with_pings()
    assert length >= 8 * 2 * MESSAGES
    cuts = [(n,) for n in range(1, length + 1)] + list(combinations(range(1, length + 12, 2), 2))
    for cut in [(), *cuts]:
        world = World(2, cut, Careless)
        await world.run_with_pings()
        assert world.sink.delivered == list(range(2 * MESSAGES)), f"cut before packets {cut}"
        assert not world.sink.held, f"cut before packets {cut}: {world.sink.held}"
