"""What has an end keeps it over restarts, clocks that jump and a process that stands still."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.client.connection import Connection, Handler
from broker.client.session import Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish, Will
from broker.mqtt.properties import Properties
from tests.ledger import Ledger
from tests.power.rounds import Machine
from tests.servers import PATIENCE, Absent
from tests.system.durability import Sender, absent, fetch, intact, keep, machine
from tests.system.resilience import SOAK, Canary, ask, command, eventually, until, url

pytestmark = pytest.mark.timeout(900 if SOAK else 180)

YEAR = 365 * 86_400


class Ear(Handler):
    """Remembers what came; acknowledges it."""

    def __init__(self) -> None:
        self.heard: list[Publish] = []
        self.lost: list[Exception | None] = []

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.heard.append(publish)
        if publish.qos:
            conn.ack(PacketType.PUBACK, publish.packet_id)

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.lost.append(exc)


def expiring(seconds: int) -> bytes:
    """The encoded properties of a message that lives so long."""
    return b"\x02" + seconds.to_bytes(4, "big")


async def listen(
    to: str, name: str, least: int = 0, *, quiet: float = 0.4, filter: str = ""
) -> tuple[bool, list[Publish]]:
    """Whether this client has a session, and what it is sent: at least so many messages, and what comes in that time
    after them; a `filter` is subscribed to at first."""
    ear = Ear()
    conn = await Connection.connect(to, client_id=name, handler=ear, clean_start=bool(filter), session_expiry=3_600)
    present = conn.session_present
    if filter:
        await conn.subscribe([(filter, 1)])
    await eventually(lambda: len(ear.heard) >= least, f"{least} messages for {name}", 10)
    await asyncio.sleep(quiet * PATIENCE)
    await conn.disconnect()
    return present, ear.heard


def start(running: Machine) -> float:
    """Seconds it took."""
    began = time.monotonic()
    running.start()
    return time.monotonic() - began


def restart(running: Machine, how: signal.Signals = signal.SIGKILL) -> None:
    running.stop(how)
    running.start()


# --- over restarts ---------------------------------------------------------------------------------------------------


async def test_d14_a_session_ends_while_the_broker_is_down_and_others_do_not(tmp_path: Path) -> None:
    """D-14: its queue goes with it, on disk too."""
    short = round(3 * PATIENCE)
    with machine(tmp_path) as running:
        await keep(url(running), "long", "data/#")
        await keep(url(running), "short", "data/#", expiry=short)
        left = time.monotonic()
        publisher = await Publisher.connect(url(running), client_id="device")
        await asyncio.gather(*(publisher.publish("data/x", b"device|%d|" % number) for number in range(20)))
        publisher.conn.abort()
        assert ask(running, "clients.show", id="short")["queued"] == 20
        running.stop(signal.SIGKILL)
        await asyncio.sleep(left + short + 1 - time.monotonic())
        running.start()
        names = {row["clientid"]: row["queued"] for row in ask(running, "clients.list")}
        assert names == {"long": 20}
        assert await listen(url(running), "short") == (False, [])
        present, heard = await listen(url(running), "long", 20)
        assert present
        assert len(heard) == 20


async def test_d15_a_message_counts_down_over_three_restarts_and_is_gone(tmp_path: Path) -> None:
    """D-15: queued and retained, after kills and a clean stop; what is told to receivers falls with it."""
    with machine(tmp_path, start=False) as running:
        life = round(7 * PATIENCE + 4 * start(running))
        for number in range(4):
            await keep(url(running), f"away-{number}", "data/#")
        publisher = await Publisher.connect(url(running), client_id="device")
        began = time.monotonic()
        await publisher.publish("data/x", b"it", properties=expiring(life))
        await publisher.publish("kept/x", b"it", retain=True, properties=expiring(life))
        await publisher.publish("kept/y", b"it", retain=True)
        publisher.conn.abort()
        told = []
        for number, how in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
            restart(running, how)
            passed = time.monotonic() - began
            _, queued = await listen(url(running), f"away-{number}", 1, quiet=0.1)
            _, kept = await listen(url(running), "new", 1, quiet=0.1, filter="kept/x")
            for heard in (queued, kept):
                assert len(heard) == 1, f"after {passed:.1f} of {life} s"
                assert heard[0].properties is not None
                left = heard[0].properties.message_expiry_interval
                assert left is not None
                assert life - (time.monotonic() - began) - 1.5 <= left <= life - passed + 1.5
                told.append(left)
        assert told[0] > told[-1]
        await asyncio.sleep(max(0.0, began + life + 1 - time.monotonic()))
        restart(running)
        assert await listen(url(running), "away-3") == (True, [])
        _, kept = await listen(url(running), "new", 1, filter="kept/#")
        assert [publish.topic for publish in kept] == [b"kept/y"]


async def test_d16_a_will_that_waits_is_published_once_though_the_broker_is_restarted(tmp_path: Path) -> None:
    """D-16: after its delay, not before, and not again after the next restart."""
    with machine(tmp_path, start=False) as running:
        delay = round(3 * PATIENCE + 4 * start(running))
        properties = Properties()
        properties.will_delay_interval = delay
        will = Will(b"wills/device", b"farewell", 1, properties=properties)
        await keep(url(running), "heir", "wills/#")
        conn = await Connection.connect(
            url(running), client_id="device", handler=Handler(), clean_start=False, session_expiry=3_600, will=will
        )
        conn.abort()
        await asyncio.to_thread(
            until, lambda: not ask(running, "clients.show", id="device")["connected"], "the end of the connection"
        )
        broke = time.monotonic()
        await asyncio.sleep(0.3)
        restart(running)
        assert time.monotonic() - broke < delay, "the restart took longer than the delay: nothing was tested"
        ear = Ear()
        conn = await Connection.connect(
            url(running), client_id="heir", handler=ear, clean_start=False, session_expiry=3_600
        )
        assert not ear.heard
        await eventually(lambda: ear.heard, "the will", delay + 2)
        assert time.monotonic() - broke >= delay - 0.5
        await asyncio.sleep(1)
        await conn.disconnect()
        restart(running)
        present, again = await listen(url(running), "heir", quiet=1.5)
        assert present
        assert [publish.payload for publish in ear.heard + again] == [b"farewell"]


# --- clocks ----------------------------------------------------------------------------------------------------------


class FakeClock:
    """The wall clock of a process: `set` moves it while it runs. The monotonic clock stays as it is."""

    def __init__(self, where: Path) -> None:
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not found:
            raise Absent("no libfaketime (apt-get install libfaketime)")
        self._offset = where / "clock"
        self.set(0)
        self.environment = {
            "LD_PRELOAD": str(found[0]), "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip

    def set(self, seconds: int) -> None:
        """So far from the real time."""
        draft = self._offset.with_suffix(".draft")
        draft.write_text(f"{seconds:+d}\n")
        draft.rename(self._offset)


@contextmanager
def off_the_clock(where: Path) -> Iterator[tuple[Machine, FakeClock]]:
    try:
        clock = FakeClock(where)
    except Absent as error:
        absent(error)
        raise
    with machine(where, environment=clock.environment) as running:
        yield running, clock


async def test_d17_a_wall_clock_that_jumps_ends_nothing(tmp_path: Path) -> None:
    """D-17: keep-alives, sessions, queues, expiries; a year ahead, a year back, to and fro, and back over a restart."""
    with off_the_clock(tmp_path) as (running, clock):
        to = url(running)
        for name in ("first", "second"):
            await keep(to, name, "data/#", expiry=3_600)
        publisher = await Publisher.connect(to, client_id="device")
        for number in range(50):
            await publisher.publish("data/x", b"device|%d|" % number, properties=expiring(1_800))
        await publisher.publish("kept/x", b"it", retain=True, properties=expiring(1_800))
        ears = [Ear() for _ in range(20)]
        for number, ear in enumerate(ears):
            await Connection.connect(to, client_id=f"alive-{number}", handler=ear, keep_alive=2)
        canary = await Canary.open(to, keep_alive=2)
        before = running.log()
        for offset in (YEAR, -YEAR, 0):
            clock.set(offset)
            await canary.sing(30.0 if SOAK else 1.0)
        for number in range(60 if SOAK else 3):
            clock.set(-5 if number % 2 else 5)
            await canary.sing(1.0)
        written = Ledger()
        sender = await Sender(written, "later", "data/x").open(to)
        clock.set(YEAR)
        await sender.many(20)
        log = running.log()[len(before) :]
        year = time.gmtime(time.time() + YEAR - 86_400).tm_year
        assert f"{year}-" in running.log() or not log, "the log is stamped with the real time: nothing was tested"
        assert ask(running, "status")["uptime_s"] < 600
        assert not [ear.lost for ear in ears if ear.lost]
        assert not canary.lost
        assert canary.slowest <= 1 * PATIENCE
        present, heard = await listen(to, "first", 70)
        assert present
        assert len(heard) == 70
        _, kept = await listen(to, "new", 1, filter="kept/#")
        assert len(kept) == 1
        running.stop(signal.SIGKILL)
        clock.set(-YEAR)
        running.start()
        present, heard = await listen(url(running), "second", 70)
        assert present
        assert len(heard) == 70
        _, kept = await listen(url(running), "new", 1, filter="kept/#")
        assert len(kept) == 1
        assert running.stop() == 0
        intact(running)


def test_d17_the_clock_of_these_tests_moves(tmp_path: Path) -> None:
    """A message's time is the wall clock's: it follows a jump."""
    with off_the_clock(tmp_path) as (running, clock):
        clock.set(YEAR)
        running.stop(signal.SIGKILL)
        running.start()
        line = running.log().splitlines()[-1]
        assert line.startswith(time.strftime("%Y-%m", time.gmtime(time.time() + YEAR))), line


async def test_d18_a_process_that_stood_still_times_clients_out_once(tmp_path: Path) -> None:
    """D-18: one end and one will for each; the others and what is stored come through."""
    still = 300.0 if SOAK else 3.5
    ledger = Ledger()
    with machine(tmp_path) as running:
        to = url(running)
        await keep(to, "kept", "data/#")
        heir = Ear()
        watching = await Connection.connect(to, client_id="heir", handler=heir, keep_alive=0)
        await watching.subscribe([("wills/#", 1)])
        ears = [Ear() for _ in range(50)]
        for number, ear in enumerate(ears):
            await Connection.connect(
                to, client_id=f"c{number}", handler=ear, keep_alive=1, will=Will(b"wills/%d" % number, b"", 1)
            )
        sender = await Sender(ledger, "device", "data/x").open(to)
        await sender.many(500)
        os.kill(running.pid, signal.SIGSTOP)
        try:
            waiting = [asyncio.create_task(sender.send()) for _ in range(10)]
            await asyncio.sleep(still)
            assert not any(task.done() and not task.exception() for task in waiting)
        finally:
            os.kill(running.pid, signal.SIGCONT)
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(lambda: len(heir.heard) >= len(ears), "every will", 10)
        await asyncio.sleep(1.0)
        assert Counter(publish.topic for publish in heir.heard) == {b"wills/%d" % n: 1 for n in range(len(ears))}
        assert all(len(ear.lost) == 1 for ear in ears)
        assert not heir.lost
        status = await command(running, "status")
        assert status["clients"] <= 2, "the heir and the sender"
        for number, ear in enumerate(ears):  # they come back, once more
            await Connection.connect(to, client_id=f"c{number}", handler=ear, keep_alive=30)
        later = await Sender(ledger, "later", "data/x").open(to)
        await later.many(100)
        assert running.stop() == 0
        intact(running)
        running.start()
        await fetch(url(running), "kept", ledger)
    report = ledger.compare(redelivery=True)
    assert not report.lost, report.problem()
    assert not report.duplicates
