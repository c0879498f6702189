"""What the durability tests share: sessions that are away, a broker on a disk of its own, one that does not start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection, Handler
from broker.client.session import NotTaken, Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests.broker import Broker
from tests.ledger import Ledger
from tests.power.record import Shim
from tests.power.rounds import Machine
from tests.servers import PATIENCE, Absent, required
from tests.system.resilience import OPEN, eventually, until

ROOM = OPEN + "[limits]\nmax_queued_messages = 10000000\n"
"""Anybody may do anything, and queues hold what the tests put in."""

MB = 1_000_000
OFFER = b"offer|"
"""What `offer` publishes is in no ledger."""


def absent(error: Absent) -> None:
    """Skip with the reason, or fail where REQUIRE names `power`."""
    if "power" in required():
        pytest.fail(f"REQUIRE names power: {error}", pytrace=False)
    pytest.skip(str(error))


# --- clients ---------------------------------------------------------------------------------------------------------


async def keep(to: str, name: str, filter: str, qos: int = 1, expiry: int = 7_200) -> None:
    """Make a session with a subscription and leave it."""
    conn = await Connection.connect(to, client_id=name, handler=Handler(), clean_start=False, session_expiry=expiry)
    assert await conn.subscribe([(filter, qos)]) == [qos]
    await conn.disconnect()


class Collector(Handler):
    """The client of a session that was away: enters what waits for it into a ledger."""

    def __init__(self, ledger: Ledger, acknowledge: bool = True) -> None:
        self.ledger = ledger
        self.acknowledge = acknowledge
        self.count = 0
        self.last = time.monotonic()

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.count += 1
        self.last = time.monotonic()
        if not publish.payload.startswith(OFFER):
            self.ledger.arrived(publish.payload)
        if publish.qos and self.acknowledge:
            conn.ack(PacketType.PUBACK if publish.qos == 1 else PacketType.PUBREC, publish.packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == PacketType.PUBREL:
            conn.ack(PacketType.PUBCOMP, packet_id)


async def fetch(
    to: str,
    name: str,
    ledger: Ledger,
    *,
    least: int = 0,
    acknowledge: bool = True,
    quiet: float = 0.3,
    seconds: float = 60,
) -> int:
    """What waits for this session, until nothing came for a while, `least` messages are there and nothing acknowledged
    is missing, or time is up; returns how many messages that were."""
    collector = Collector(ledger, acknowledge)
    conn = await Connection.connect(
        to, client_id=name, handler=collector, clean_start=False, session_expiry=7_200, receive_maximum=60_000
    )
    assert conn.session_present, f"the session of {name} is gone"
    collector.last = time.monotonic()
    end = time.monotonic() + seconds * PATIENCE
    while time.monotonic() < end:
        await asyncio.sleep(0.05)
        if time.monotonic() - collector.last > quiet and collector.count >= least and not ledger.missing():
            break
        if time.monotonic() - collector.last > 10 * PATIENCE:
            break
    await conn.disconnect()
    return collector.count


async def offer(to: str, topic: str, qos: int = 1, version: int = 5, seconds: float = 5) -> int | None:
    """Publish one message: the code of the answer, None where the connection ended without one."""
    publisher = await Publisher.connect(to, client_id=f"offer-{version}-{qos}", version=version)
    try:
        return await asyncio.wait_for(publisher.publish(topic, OFFER, qos), seconds * PATIENCE)
    except NotTaken as error:
        return error.code
    except ConnectionError:
        return None
    finally:
        publisher.conn.abort()


async def says_live(to: str, seconds: float = 5) -> float:
    """Seconds a QoS 0 message takes to somebody who is there."""

    heard = asyncio.Event()

    class Ear(Handler):
        def on_publish(self, conn: Connection, publish: Publish) -> None:
            heard.set()

    listening = await Connection.connect(to, client_id="ear", handler=Ear())
    assert await listening.subscribe([("live/#", 0)]) == [0]
    speaking = await Connection.connect(to, client_id="mouth", handler=Handler())
    began = time.monotonic()
    speaking.publish("live/x", b"0")
    await asyncio.wait_for(heard.wait(), seconds * PATIENCE)
    took = time.monotonic() - began
    listening.abort()
    speaking.abort()
    return took


class Sender:
    """A publisher that enters what it was promised; `size` bytes a message."""

    def __init__(self, ledger: Ledger, stream: str, topic: str, qos: int = 1, size: int = 64) -> None:
        self.ledger, self.stream, self.topic, self.qos, self.size = ledger, stream, topic, qos, size
        self.refused: list[int] = []
        self.publisher: Publisher

    async def open(self, to: str) -> Sender:
        self.publisher = await Publisher.connect(to, client_id=self.stream)
        return self

    async def send(self) -> bool:
        """One message; False when it was refused."""
        number, payload = self.ledger.next(self.stream, self.size)
        try:
            await self.publisher.publish(self.topic, payload, self.qos)
        except NotTaken as error:
            self.refused.append(error.code)
            return False
        self.ledger.acknowledged(self.stream, number)
        return True

    async def many(self, count: int, window: int = 200) -> None:
        """So many, several at a time; all are taken."""
        for first in range(0, count, window):
            taken = await asyncio.gather(*(self.send() for _ in range(min(window, count - first))))
            assert all(taken), f"refused: {self.refused[:5]}"

    def close(self) -> None:
        self.publisher.conn.abort()


async def recovered(to: str, topic: str, seconds: float = 10) -> None:
    """Until a message that must be kept is taken again."""

    async def taken() -> bool:
        return await offer(to, topic) == 0

    await eventually(taken, "messages taken again", seconds, 0.2)


# --- brokers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machine(where: Path, configuration: str = ROOM, *, start: bool = True, **fields: Any) -> Iterator[Machine]:
    """A broker whose data folder lies on a disk of its own, `where/disk`; stopped at the end."""
    one = Machine(where, **fields)
    one.write("00-broker.toml", configuration)
    one.disk.mkdir(exist_ok=True)
    try:
        if start:
            one.start()
        yield one
    finally:
        if one._process is not None:
            one.stop()


@contextlib.contextmanager
def faulty(where: Path, configuration: str = ROOM) -> Iterator[tuple[Machine, Shim]]:
    """The same with the shim between it and its disk."""
    shim = Shim(where / "disk", where / "disk.log")
    try:
        environment = shim.environment
    except Absent as error:
        absent(error)
        raise
    with machine(where, configuration, environment=environment) as one:
        yield one, shim


@contextlib.contextmanager
def small_disk(where: Path, size: int) -> Iterator[Path]:
    """A file system of that many bytes at `where/disk`."""
    disk = where / "disk"
    disk.mkdir()
    if os.geteuid():
        absent(Absent("only root can mount a disk"))
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "isthmus-test", str(disk)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        absent(Absent(f"mount: {done.stderr.strip()}"))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class Ballast:
    """Fills a disk up to a share of it."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._path = disk / "ballast"

    def fill(self, share: float) -> None:
        """Until this share of the disk is used, everything counted."""
        self._path.unlink(missing_ok=True)
        stat = os.statvfs(self._disk)
        wanted = int(share * stat.f_blocks) - (stat.f_blocks - stat.f_bavail)
        assert wanted >= 0, "the disk is fuller than that"
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, 0, max(1, wanted * stat.f_frsize))
        finally:
            os.close(fd)

    def leave(self, free: int) -> None:
        """Until only so many bytes are free."""
        stat = os.statvfs(self._disk)
        self.fill(1 - free / (stat.f_blocks * stat.f_frsize))

    def drop(self) -> None:
        """Give the space back."""
        self._path.unlink(missing_ok=True)


def refused_start(running: Broker, *options: str) -> str:
    """Start it where it must not start: exit code 1; returns what it said."""
    done = running.isthmus("run", *options)
    assert done.returncode == 1, f"exit {done.returncode}: {done.stderr}"
    assert "ready" not in done.stdout
    return done.stderr


def says(running: Broker, text: str, seconds: float = 15) -> None:
    """Until the log has these words."""
    until(lambda: text in running.log(), f"{text!r} in the log", seconds)


def intact(running: Broker) -> None:
    """`isthmus store check` finds nothing wrong; the broker must not be running."""
    done = running.isthmus("store", "check")
    assert done.returncode == 0, done.stderr


def store_bytes(running: Broker) -> int:
    """Bytes of all segments."""
    total = 0
    for path in (running.data / "store").glob("*.log"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
