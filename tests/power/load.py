"""Clients that use every promise of a broker, and the notes of what was promised when. Knows nothing of power.

Publishers at QoS 1 and 2 with persistent sessions, two persistent subscribers that are away and two that are there,
retained messages set and cleared, a persistent session that subscribes and unsubscribes. Times are
`time.monotonic_ns()`, the clock of the shim's log: what a client noted before event k happened before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field

from broker.client.connection import Connection, Handler
from broker.client.errors import NoAnswer, Refused, Unreachable
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests.ledger import read_stamp, stamp

OPEN = """
[access]
allow_anonymous = true
no_match = "allow"
[limits]
max_queued_messages = 1000000
[listeners.tcp]
bind = "127.0.0.1:0"
"""

AWAY = {"away-1": 1, "away-2": 2}
"""Persistent subscribers that are offline while the load runs, and their QoS."""
THERE = {"there-1": 1, "there-2": 2}
SUBSCRIBERS = AWAY | THERE
PUBLISHERS = {"one-a": 1, "one-b": 1, "two-a": 2, "two-b": 2}
TOGGLER = "toggler"
TOPICS = "power/#"
FENCE = "power/fence"
"""Published last: whoever has it has everything before it."""
TOGGLES = 10
SHELVES = 20  # topics with retained messages
EXPIRY = 7_200
GONE = (ConnectionError, NoAnswer, Refused, Unreachable, TimeoutError)
"""How a client learns that its broker has no power."""

Name = tuple[str, int]
"""A message: its stream and number."""


@dataclass(slots=True)
class Message:
    """Times are 0 until the thing has happened."""

    packet_id: int
    qos: int
    size: int
    sent: int
    promised: int = 0
    """PUBACK or PUBREC arrived."""
    completed: int = 0
    """PUBACK or PUBCOMP arrived."""
    refused: bool = False
    """The broker said no: it owes nothing, and the publisher does not ask again."""


@dataclass(slots=True)
class Receipt:
    """One delivery to a subscriber that was there."""

    name: Name
    qos: int
    packet_id: int
    received: int
    released: int = 0
    """QoS 2: PUBREL arrived, from here on a repetition would not be recognised."""


@dataclass(slots=True)
class Setting:
    """A retained message of a topic (0: cleared), or a subscription (0: gone)."""

    value: int
    sent: int
    promised: int = 0


@dataclass
class Notes:
    """Everything the clients know."""

    sessions: dict[str, int] = field(default_factory=dict)
    """When a persistent session was promised, with its subscription if it has one."""
    messages: dict[Name, Message] = field(default_factory=dict)
    receipts: dict[str, list[Receipt]] = field(default_factory=lambda: {name: [] for name in THERE})
    retained: dict[str, list[Setting]] = field(default_factory=dict)
    subscriptions: dict[str, list[Setting]] = field(default_factory=dict)
    refused: int = 0

    def promises(self, before: int) -> int:
        """How many acknowledgements of any kind arrived before that time."""
        settings = [s for kind in (self.retained, self.subscriptions) for changes in kind.values() for s in changes]
        times = [t for m in self.messages.values() for t in (m.promised, m.completed if m.qos == 2 else 0)]
        times += [s.promised for s in settings] + list(self.sessions.values())
        return sum(0 < t < before for t in times)


def now() -> int:
    return time.monotonic_ns()


# --- clients ---------------------------------------------------------------------------------------------------------


class _Client(Handler):
    """Remembers that its connection has ended."""

    receive_maximum = 1_000

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.lost = False

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.lost = True


class Producer(_Client):
    """Publishes one stream; a window of ten, identifiers used again as soon as they are free."""

    def __init__(self, notes: Notes, stream: str, qos: int) -> None:
        super().__init__(notes)
        self.stream, self.qos = stream, qos
        self._number = 0
        self._flying: dict[int, Message] = {}

    @property
    def busy(self) -> bool:
        return len(self._flying) >= 10

    @property
    def idle(self) -> bool:
        return not self._flying

    def send(self, conn: Connection, size: int) -> None:
        self._number += 1
        packet_id = next(n for n in range(1, 12) if n not in self._flying)
        message = self._flying[packet_id] = Message(packet_id, self.qos, size, now())
        self.notes.messages[self.stream, self._number] = message
        conn.publish(topic(self.stream), stamp(self.stream, self._number, size), self.qos, packet_id=packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        at = now()
        message = self._flying[packet_id]
        if code >= 0x80:
            self.notes.refused += 1
            message.refused = True
            del self._flying[packet_id]
            return
        message.promised = message.promised or at
        self.notes.sessions.setdefault(self.stream, at)  # CONNACK promised nothing yet: the session was empty
        if packet_type == PacketType.PUBREC:
            conn.ack(PacketType.PUBREL, packet_id)
        else:
            message.completed = at
            del self._flying[packet_id]


class Consumer(_Client):
    """A subscriber that is there; QoS 2 exactly as the specification has it."""

    def __init__(self, notes: Notes, name: str) -> None:
        super().__init__(notes)
        self._receipts = notes.receipts[name]
        self._unreleased: dict[int, Receipt] = {}

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        if publish.qos == 2 and publish.packet_id in self._unreleased:
            conn.ack(PacketType.PUBREC, publish.packet_id)
            return
        receipt = Receipt(read_stamp(publish.payload), publish.qos, publish.packet_id, now())
        self._receipts.append(receipt)
        if publish.qos == 2:
            self._unreleased[publish.packet_id] = receipt
        conn.ack(PacketType.PUBREC if publish.qos == 2 else PacketType.PUBACK, publish.packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == PacketType.PUBREL:
            self._unreleased.pop(packet_id).released = now()
            conn.ack(PacketType.PUBCOMP, packet_id)


class Librarian(_Client):
    """Sets and clears retained messages."""

    def __init__(self, notes: Notes) -> None:
        super().__init__(notes)
        self._flying: dict[int, Setting] = {}
        self._number = 0

    @property
    def idle(self) -> bool:
        return not self._flying

    def change(self, conn: Connection, chance: random.Random) -> None:
        """One change of a shelf that has none under way; nothing when all of a handful have."""
        packet_id = chance.randrange(1, SHELVES + 1)
        if packet_id in self._flying or len(self._flying) >= 5:
            return
        name = shelf(packet_id)
        self._number += 1
        value = self._number if chance.random() < 0.7 else 0
        setting = self._flying[packet_id] = Setting(value, now())
        self.notes.retained.setdefault(name, []).append(setting)
        payload = stamp(name, value, chance.choice((0, 100, 900))) if value else b""
        conn.publish(name, payload, 1, True, packet_id=packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        setting = self._flying.pop(packet_id)
        if code < 0x80:
            setting.promised = now()
        else:
            self.notes.refused += 1


def topic(stream: str) -> str:
    return f"power/{stream}"


def shelf(number: int) -> str:
    return f"retained/{number}"


def toggle(number: int) -> str:
    return f"toggle/{number}"


# --- the load --------------------------------------------------------------------------------------------------------


async def connect(url: str, name: str, handler: Handler, *, fresh: bool = False) -> Connection:
    """A client with a persistent session."""
    return await Connection.connect(
        url, client_id=name, handler=handler, clean_start=fresh, session_expiry=EXPIRY, receive_maximum=1_000
    )


async def run(url: str, notes: Notes, *, seconds: float, rate: float = 200, seed: int = 0) -> bool:
    """Every publisher at `rate` messages a second as far as its window lets it, then until all is acknowledged.

    False when the broker went first or stopped answering; every other failure is raised. Afterwards no client is
    connected.
    """
    load = _Load(url, notes, seconds, rate, random.Random(seed))
    with contextlib.suppress(*GONE):
        try:
            async with asyncio.timeout(seconds + 30):
                await load.run()
                return True
        finally:
            for conn in load.connections:
                conn.abort()
    return False


class _Load:
    """The clients, one method each."""

    def __init__(self, url: str, notes: Notes, seconds: float, rate: float, chance: random.Random) -> None:
        self.connections: list[Connection] = []
        self._url, self._notes, self._chance = url, notes, chance
        self._seconds, self._rate = seconds, rate
        self._end = 0.0

    async def run(self) -> None:
        for name, qos in AWAY.items():
            conn = await self._connect(name, Handler())
            await self._subscribe(conn, name, TOPICS, qos)
            await conn.disconnect()
        consumers = {}
        for name, qos in THERE.items():
            consumers[name] = await self._connect(name, Consumer(self._notes, name))
            await self._subscribe(consumers[name], name, TOPICS, qos)
        self._end = time.monotonic() + self._seconds
        await asyncio.gather(*(self._produce(*item) for item in PUBLISHERS.items()), self._shelve(), self._toggle())
        for name, conn in consumers.items():
            while len(self._notes.receipts[name]) < len(self._notes.messages) - self._notes.refused:
                await _breath(conn)

    async def _connect(self, name: str, handler: Handler) -> Connection:
        conn = await connect(self._url, name, handler, fresh=True)
        self.connections.append(conn)
        return conn

    async def _subscribe(self, conn: Connection, name: str, filter: str, qos: int) -> None:
        if (codes := await conn.subscribe([(filter, qos)])) != [qos]:
            self._notes.refused += 1
            raise ConnectionError(f"{filter}: {codes}")
        self._notes.sessions[name] = now()

    async def _produce(self, stream: str, qos: int) -> None:
        producer, chance = Producer(self._notes, stream, qos), self._chance
        conn = await self._connect(stream, producer)
        sent, began = 0, time.monotonic()
        while (at := time.monotonic()) < self._end and not producer.lost:
            while sent < (at - began) * self._rate and not producer.busy:
                producer.send(conn, chance.choice((40, 200, 511, 513, 1_500, 5_000)))
                sent += 1
            await asyncio.sleep(chance.uniform(0.001, 0.01))
        while not producer.idle:
            await _breath(conn)
        await conn.disconnect()

    async def _shelve(self) -> None:
        librarian = Librarian(self._notes)
        conn = await self._connect("librarian", librarian)
        while time.monotonic() < self._end and not librarian.lost:
            librarian.change(conn, self._chance)
            await asyncio.sleep(self._chance.uniform(0.001, 0.02))
        while not librarian.idle:
            await _breath(conn)
        await conn.disconnect()

    async def _toggle(self) -> None:
        conn = await self._connect(TOGGLER, Handler())
        await self._subscribe(conn, TOGGLER, FENCE, 1)
        present: dict[str, int] = {}
        while time.monotonic() < self._end:
            name = toggle(self._chance.randrange(TOGGLES))
            present[name] = value = 1 - present.get(name, 0)
            setting = Setting(value, now())
            self._notes.subscriptions.setdefault(name, []).append(setting)
            codes = await (conn.subscribe([(name, 1)]) if value else conn.unsubscribe([name]))
            if codes != ([1] if value else [0]):
                self._notes.refused += 1
                raise ConnectionError(f"{name}: {codes}")
            setting.promised = now()
            await asyncio.sleep(self._chance.uniform(0.005, 0.03))
        await conn.disconnect()


async def _breath(conn: Connection) -> None:
    """A moment; raises ConnectionError once the connection has ended."""
    await conn.ping()
    await asyncio.sleep(0.005)
