"""What the resilience tests share: an open broker, a canary, a stream that keeps its books, a look at a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from broker.admin import control
from broker.client.connection import Connection, Handler
from broker.client.session import Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests.broker import Broker
from tests.clock import Trip, clock
from tests.ledger import Ledger, read_stamp
from tests.servers import PATIENCE

SOAK = os.environ.get("ISTHMUS_SOAK") == "1"
"""Whether the long forms run (`make soak`)."""

OPEN = """
[access]
allow_anonymous = true
no_match = "allow"
[listeners.tcp]
bind = "127.0.0.1:0"
"""
"""Anybody may do anything: these tests are about something else."""

STORE = """
[sinks.store]
kind = "sqlite"
path = "telemetry.db"
filters = ["telemetry/#"]
"""

SLOWEST = 0.1 * PATIENCE
"""Seconds a well-behaved client's round trip may take at most, whatever is broken elsewhere."""
PAUSES = 2
"""Round trips for which the machine, and not the broker, may be the cause."""
LONGEST = 2.0 * PATIENCE
"""Seconds such a round trip may take."""


def url(broker: Broker) -> str:
    return f"mqtt://127.0.0.1:{broker.port}"


def ask(broker: Broker, command: str, /, **arguments: Any) -> Any:
    """A command over the control socket, without starting a process for it."""
    return control.request(broker.data / "control.sock", command, **arguments)


async def command(broker: Broker, verb: str, /, **arguments: Any) -> Any:
    """The same without stopping this loop."""
    return await asyncio.to_thread(ask, broker, verb, **arguments)


def until(there: Callable[[], Any], what: str, seconds: float = 15, every: float = 0.02) -> Any:
    """Poll until something is there; fails with `what` otherwise."""
    deadline = clock() + seconds * PATIENCE
    while not (found := there()):
        assert clock() < deadline, f"{what}: not there after {seconds} s"
        time.sleep(every)
    return found


async def eventually(there: Callable[[], Any], what: str, seconds: float = 15, every: float = 0.02) -> Any:
    """The same for a test with a loop; `there` may answer an awaitable."""
    deadline = clock() + seconds * PATIENCE
    while True:
        found = there()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert clock() < deadline, f"{what}: not there after {seconds} s"
        await asyncio.sleep(every)


def wait_running(broker: Broker, room: str, name: str, seconds: float = 15) -> None:
    """Until `status` shows that instance running; unlike `Broker.wait_for` without a process for every look."""
    until(lambda: ask(broker, "status")[room].get(name, {}).get("state") == "running", f"{room}.{name}", seconds)


# --- clients ---------------------------------------------------------------------------------------------------------


class Trips:
    """What a canary knows of its round trips, in seconds as `Trip` measures them; one begins when the one before has
    ended."""

    trips: list[float]

    @property
    def slowest(self) -> float:
        assert self.trips, "the canary never sang"
        return max(self.trips)

    def check(self, limit: float = SLOWEST) -> None:
        """Raise AssertionError when it was kept waiting for longer than `limit`.

        A process that is not given the processor for a moment is one slow trip, however long the song: `PAUSES` of
        them are let pass. A broker that is overloaded makes one after the other, and a call that blocks it lasts as
        long as the broken thing takes to answer: seconds.
        """
        slow = sorted((took for took in self.trips if took > limit), reverse=True)
        assert self.slowest <= LONGEST, f"a round trip of {self.slowest:.2f} s"
        assert len(slow) <= PAUSES, f"{len(slow)} of {len(self.trips)} round trips above {limit} s: {slow[:20]}"


class Canary(Trips, Publisher):
    """A well-behaved client that hears itself: a round trip ends when the message is back and acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.trips: list[float] = []
        self.longest = 0.0
        """Seconds of the longest by the wall, for a benchmark."""
        self.lost = 0
        self._back: dict[bytes, asyncio.Future[None]] = {}

    @classmethod
    async def open(cls, to: str, client_id: str = "canary", **options: Any) -> Canary:
        canary = cls()
        canary.attach(await Connection.connect(to, client_id=client_id, handler=canary, **options))
        assert await canary.conn.subscribe([(f"canary/{client_id}", 1)]) == [1]
        return canary

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        conn.ack(PacketType.PUBACK, publish.packet_id)
        back = self._back.pop(publish.payload, None)
        if back is not None and not back.done():
            back.set_result(None)

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.lost += 1
        super().on_lost(conn, exc)

    async def sing(self, seconds: float, every: float = 0.1) -> None:
        """One round trip each `every` seconds; raises TimeoutError when one takes ten seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            trip = Trip()
            payload = b"%d" % len(self.trips)
            back = self._back[payload] = loop.create_future()
            async with asyncio.timeout(10):
                await asyncio.gather(self.publish(f"canary/{self.conn.client_id}", payload), back)
            self.trips.append(trip.took)
            self.longest = max(self.longest, time.monotonic() - trip.began)
            await asyncio.sleep(max(0.0, trip.began + every - time.monotonic()))


class Stream(Handler):
    """A publisher at a steady rate. Every ledger learns what was sent and what the broker promised.

    QoS 0 has no promise: what was written before `settle` counts as one, because the connection stayed.
    """

    def __init__(self, ledgers: list[Ledger], name: str, topic: str, rate: float, qos: int = 1, size: int = 64) -> None:
        self.name, self.topic, self.rate, self.qos, self.size = name, topic, rate, qos, size
        self.ledgers = ledgers
        self.sent = self.acknowledged = self.refused = 0
        self.lost: list[Exception | None] = []
        self._flying: dict[int, int] = {}
        self._ident = 0
        self.conn: Connection

    async def open(self, to: str, **options: Any) -> Stream:
        self.conn = await Connection.connect(to, client_id=self.name, handler=self, **options)
        return self

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        number = self._flying.pop(packet_id)
        if code < 0x80:
            self._promised(number)
        else:
            self.refused += 1

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.lost.append(exc)

    def _promised(self, number: int) -> None:
        self.acknowledged += 1
        for ledger in self.ledgers:
            ledger.acknowledged(self.name, number)

    def send(self) -> bool:
        """One message; False when the broker's window is used up."""
        if self.qos and len(self._flying) >= min(1_000, self.conn.receive_maximum):
            return False
        number, payload = 0, b""
        for ledger in self.ledgers:
            number, payload = ledger.next(self.name, self.size)
        ident = 0
        if self.qos:
            ident = self._ident = self._ident % 60_000 + 1
            self._flying[ident] = number
        self.conn.publish(self.topic, payload, self.qos, packet_id=ident)
        self.sent += 1
        if not self.qos:
            self._promised(number)
        return True

    async def run(self, seconds: float) -> None:
        """Keep the rate as far as the broker's window lets it; stops when the connection ends."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        start = self.sent
        while (now := loop.time() - began) < seconds and not self.lost:
            due = int(now * self.rate)
            while self.sent - start < due and self.send():
                pass
            await asyncio.sleep(0.01)

    async def settle(self, seconds: float = 20) -> None:
        """Until everything sent is answered and written."""
        await eventually(lambda: not self._flying or self.lost, f"acknowledgements for {self.name}", seconds)
        await self.conn.drain()


class Listening(Handler):
    """A subscriber that enters what it gets into a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.count = 0
        self.lost: list[Exception | None] = []
        self.conn: Connection

    @classmethod
    async def open(
        cls, ledger: Ledger, to: str, filter: str, client_id: str, qos: int = 1, **options: Any
    ) -> Listening:
        self = cls(ledger)
        self.conn = await Connection.connect(to, client_id=client_id, handler=self, **options)
        assert await self.conn.subscribe([(filter, qos)]) == [qos]
        return self

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.count += 1
        self.ledger.arrived(publish.payload)
        if publish.qos:
            conn.ack(PacketType.PUBACK, publish.packet_id)

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.lost.append(exc)


# --- what came out ---------------------------------------------------------------------------------------------------


def rows(broker: Broker, table: str = "messages") -> list[bytes]:
    """Payloads in the SQLite sink of `STORE`, oldest first."""
    path = broker.where / "telemetry.db"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        try:
            return [row[0] for row in db.execute(f"select cast(payload as blob) from {table} order by rowid")]
        except sqlite3.OperationalError:
            return []


def row_count(broker: Broker) -> int:
    path = broker.where / "telemetry.db"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        try:
            return int(db.execute("select count(*) from messages").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def fill(ledger: Ledger, payloads: list[bytes]) -> None:
    for payload in payloads:
        read_stamp(payload)
        ledger.arrived(payload)


# --- a process from outside ------------------------------------------------------------------------------------------


def rss(pid: int, field: str = "VmRSS") -> int:
    """Bytes of memory it holds now; `VmHWM` for its peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def cpu(pid: int) -> float:
    """Seconds of processor time it has used, its children not included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
