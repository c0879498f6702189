"""MQTT clients that keep their side of the promises: what a session holds outlives the connection, nothing else does.

A publisher sends again what was not acknowledged, under the same packet identifier while the broker still has the
session, and PUBREL for what was received; a subscriber remembers the QoS 2 identifiers between PUBREC and PUBREL. Both
come back until they are told to stay away, and enter into the books what they were promised and what they got. Their
own answers often wait a little, so that a kill finds handshakes at every step.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.client.connection import Connection, Handler, connect
from broker.client.errors import BrokenPeer, Disconnected, Refused
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests.chaos.ledger import Books, Stream

FOREVER = 0xFFFF_FFFF
_AGAIN = 0.03  # seconds between two tries to connect
_MOST_ERRORS = 50
_SIZES = (40, 64, 64, 64, 100, 200)
_LARGE = 8_192
_LARGE_ONE_IN = 300
_SLOWEST_ANSWER = 0.15
_SLOW_SHARE = 0.5

_PUBACK, _PUBREC, _PUBREL, _PUBCOMP = PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP


@dataclass
class Incidents:
    """What clients met that must not be; shared by all of a run."""

    refused: int = 0
    """Messages answered with a reason of 0x80 or more."""
    sessions_lost: Counter[str] = field(default_factory=Counter)
    """By whose session it was."""
    errors: list[str] = field(default_factory=list)

    def error(self, text: str) -> None:
        if len(self.errors) < _MOST_ERRORS:
            self.errors.append(text)


class Device(Handler):
    """A persistent session and its connection, as long as there is one."""

    whose = "clients"

    def __init__(
        self, name: str, url: str, version: int, books: Books, incidents: Incidents, chance: random.Random
    ) -> None:
        self.name, self.url, self.version = name, url, version
        self.books = books
        self.incidents = incidents
        self.chance = chance
        self.conn: Connection | None = None
        self.known = False
        """Whether the broker has answered for the session."""
        self._wanted = asyncio.Event()
        self._ended = asyncio.Event()
        self._answers: list[tuple[int, int]] = []

    def online(self) -> None:
        """Connect, and again whenever the connection ends."""
        self._wanted.set()

    async def offline(self, politely: bool) -> None:
        """Stay away until `online`; the session stays."""
        self._wanted.clear()
        if (conn := self.conn) is not None:
            if politely:
                await conn.disconnect()
            else:
                conn.abort()

    def cut(self) -> None:
        """End the connection without DISCONNECT; it comes back at once."""
        if self.conn is not None:
            self.conn.abort()

    async def live(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._wanted.wait()
                self._ended.clear()
                try:
                    conn = await self._connect()
                except Refused as error:
                    self.incidents.error(f"{self.name}: {error}")
                    await asyncio.sleep(0.5)
                except (OSError, TimeoutError):
                    await asyncio.sleep(_AGAIN)
                else:
                    self._attached(conn)
                    await self._ended.wait()
        finally:
            if self.conn is not None:
                self.conn.abort()

    async def _connect(self) -> Connection:
        return await connect(
            self.url,
            client_id=self.name,
            handler=self,
            version=self.version,
            clean_start=False,
            session_expiry=FOREVER if self.version == 5 else 0,
            timeout=5.0,
        )

    def _attached(self, conn: Connection) -> None:
        """The first thing heard on a new connection, which may be a message in the same read as CONNACK."""
        if conn is self.conn or not conn.open:
            return
        self.conn = conn
        if self.known and not conn.session_present:
            self.incidents.sessions_lost[self.whose] += 1
        self.known = True
        self.resume(conn, conn.session_present)

    def resume(self, conn: Connection, present: bool) -> None:
        """Do what the session demands on a new connection."""
        raise NotImplementedError

    def answer(self, conn: Connection, packet_type: int, packet_id: int) -> None:
        """At once or after a while, with all that is to be answered until then, in order [MQTT-4.6.0-2]."""
        self._answers.append((packet_type, packet_id))
        if len(self._answers) == 1:
            slow = self.chance.random() < _SLOW_SHARE
            delay = self.chance.uniform(0.0, _SLOWEST_ANSWER) if slow else 0.0
            asyncio.get_running_loop().call_later(delay, self._give_answers, conn)

    def _give_answers(self, conn: Connection) -> None:
        if conn is self.conn:
            for packet_type, packet_id in self._answers:
                conn.ack(packet_type, packet_id)
            self._answers.clear()

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        if self.conn is conn or self.conn is None:
            self.conn = None
            self._answers.clear()
            self._ended.set()
        if isinstance(exc, BrokenPeer | Disconnected):
            self.incidents.error(f"{self.name}: {exc}")


@dataclass(slots=True)
class _Flight:
    """A message without its first answer."""

    stream: Stream
    number: int
    topic: bytes
    payload: bytes


class Publisher(Device):
    """Publishes at one QoS to several topics, each a stream of its own."""

    whose = "publishers"

    def __init__(
        self,
        name: str,
        url: str,
        version: int,
        books: Books,
        incidents: Incidents,
        chance: random.Random,
        streams: Sequence[tuple[str, Stream]],
        weights: Sequence[int],
        window: int = 100,
        retain: frozenset[Stream] = frozenset(),
    ) -> None:
        super().__init__(name, url, version, books, incidents, chance)
        self.qos = streams[0][1].qos
        self.window = window
        self._streams = [(topic.encode(), stream) for topic, stream in streams]
        self._weights = weights
        self._retain = retain
        self._flying: dict[int, _Flight] = {}  # in the order in which they were sent
        self._released: dict[int, None] = {}  # PUBREC came, PUBCOMP did not
        self._last_id = 0

    @property
    def in_flight(self) -> int:
        """Handshakes that are not at their end."""
        return len(self._flying) + len(self._released)

    def burst(self, most: int) -> int:
        """Publish up to so many messages to one of the topics; answers how many the window let through."""
        if (conn := self.conn) is None:
            return 0
        topic, stream = self.chance.choices(self._streams, self._weights)[0]
        count = min(most, self.window - self.in_flight, conn.receive_maximum - self.in_flight)
        for _ in range(count):
            size = _LARGE if self.chance.randrange(_LARGE_ONE_IN) == 0 else self.chance.choice(_SIZES)
            number, payload = self.books.next(stream, size)
            self._send(conn, self._take_id(), _Flight(stream, number, topic, payload), False)
        return max(count, 0)

    def resume(self, conn: Connection, present: bool) -> None:
        if present:
            for packet_id in self._released:
                conn.ack(_PUBREL, packet_id)  # [MQTT-4.4.0-1]
            for packet_id, flight in self._flying.items():
                self._send(conn, packet_id, flight, True)
            return
        self._released.clear()
        flying, self._flying = self._flying, {}
        for flight in flying.values():
            self._send(conn, self._take_id(), flight, False)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        self._attached(conn)
        if packet_type == _PUBCOMP:
            if packet_id not in self._released:
                self.incidents.error(f"{self.name}: PUBCOMP for {packet_id}, which was not released")
            self._released.pop(packet_id, None)
            return
        flight = self._flying.pop(packet_id, None)
        if flight is None or packet_type != (_PUBREC if self.qos == 2 else _PUBACK):
            self.incidents.error(f"{self.name}: packet {packet_type} for {packet_id}, which waits for none")
            return
        if code >= 0x80:
            self.incidents.refused += 1
            self.incidents.error(f"{self.name}: {flight.stream.name}|{flight.number} was refused with 0x{code:02x}")
            return
        self.books.promised(flight.stream, flight.number)
        if packet_type == _PUBREC:
            self._released[packet_id] = None
            self.answer(conn, _PUBREL, packet_id)  # [MQTT-4.3.3-4]

    def _send(self, conn: Connection, packet_id: int, flight: _Flight, again: bool) -> None:
        self._flying[packet_id] = flight
        self.books.sent(flight.stream, flight.number)
        retain = flight.stream in self._retain
        conn.publish(flight.topic, flight.payload, self.qos, retain, packet_id=packet_id, dup=again)

    def _take_id(self) -> int:
        while True:
            self._last_id = self._last_id % 65_535 + 1
            if self._last_id not in self._flying and self._last_id not in self._released:
                return self._last_id  # [MQTT-2.2.1-3]


class Subscriber(Device):
    """Enters what it gets at `path`; QoS 2 messages once, as the handshake demands."""

    whose = "subscribers"

    def __init__(
        self,
        name: str,
        url: str,
        version: int,
        books: Books,
        incidents: Incidents,
        chance: random.Random,
        filter: str,
        qos: int,
        path: str,
    ) -> None:
        super().__init__(name, url, version, books, incidents, chance)
        self.filter, self.qos, self.path = filter, qos, path
        self.subscribed = asyncio.Event()
        self._held: set[int] = set()  # PUBREC was sent, PUBREL did not come
        self._subscribing: asyncio.Task[None] | None = None

    def resume(self, conn: Connection, present: bool) -> None:
        if not present:
            self._held.clear()
            self.subscribed.clear()
        if not self.subscribed.is_set():
            self._subscribing = asyncio.create_task(self._subscribe(conn))

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self._attached(conn)
        packet_id = publish.packet_id
        if publish.qos == 2:
            if packet_id not in self._held:
                self._held.add(packet_id)
                self.books.arrived(self.path, publish.payload)
            self.answer(conn, _PUBREC, packet_id)
        else:
            self.books.arrived(self.path, publish.payload)
            if publish.qos:
                self.answer(conn, _PUBACK, packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        self._attached(conn)
        if packet_type != _PUBREL:
            self.incidents.error(f"{self.name}: packet {packet_type} for a subscriber")
            return
        self._held.discard(packet_id)
        self.answer(conn, _PUBCOMP, packet_id)

    async def _subscribe(self, conn: Connection) -> None:
        try:
            codes = await conn.subscribe([(self.filter, self.qos)])
        except ConnectionError:
            return  # on the next connection again
        if codes != [self.qos]:
            self.incidents.error(f"{self.name}: SUBACK {codes} for {self.filter} at QoS {self.qos}")
        self.subscribed.set()


class Reader(Handler):
    """Enters the retained messages of a filter at `path`."""

    def __init__(self, books: Books, path: str) -> None:
        self._books = books
        self._path = path
        self._last = 0.0

    @classmethod
    async def read(cls, books: Books, path: str, url: str, filter: str, quiet: float, longest: float) -> None:
        """Until none has come for ``quiet`` seconds; while some are missing, for ``longest`` seconds."""
        reader = cls(books, path)
        loop = asyncio.get_running_loop()
        conn = await connect(url, client_id="reader", handler=reader)
        await conn.subscribe([(filter, 1)])
        reader._last = loop.time()
        while (now := loop.time() - reader._last) < quiet or (now < longest and books.missing([path])):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await conn.disconnect()

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self._last = asyncio.get_running_loop().time()
        self._books.arrived(self._path, publish.payload)
        conn.ack(_PUBACK, publish.packet_id)


async def roam(subscriber: Subscriber, chance: random.Random) -> None:
    """Go away and come back until cancelled, as often with DISCONNECT as without."""
    while True:
        await asyncio.sleep(chance.uniform(0.4, 3.0))
        await subscriber.offline(chance.random() < 0.5)
        await asyncio.sleep(chance.uniform(0.2, 2.5))
        subscriber.online()
