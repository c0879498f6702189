"""A sink is away for an hour, a fleet of devices for longer: nothing is lost, memory stays, others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web

from broker.admin import control
from broker.client.connection import Connection, Handler
from broker.mqtt.packets import Publish
from tests import servers
from tests.broker import Broker, broker
from tests.integration.http_service import service
from tests.ledger import Ledger
from tests.servers import PATIENCE
from tests.system import fleet, resilience
from tests.system.canary import canary_apart
from tests.system.durability import ROOM, store_bytes
from tests.system.fleet import Flood
from tests.system.resilience import SOAK, Canary, Stream, command, eventually, rss, url

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800 if SOAK else 240)]

GROWTH = 128 << 20
"""Bytes a process may grow by during an outage."""

SINK = resilience.STORE + 'busy_timeout = "0.2s"\n'


class Growth:
    """The most that processes have grown by since this was made."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = {name: rss(pid) for name, pid in pids.items()}
        self.most = dict.fromkeys(pids, 0)

    def look(self) -> None:
        for name, pid in self._pids.items():
            self.most[name] = max(self.most[name], rss(pid) - self._before[name])

    async def watch(self) -> None:
        """Look five times a second, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(0.2)

    def __str__(self) -> str:
        return ", ".join(f"{name} +{grown / (1 << 20):.1f} MiB" for name, grown in self.most.items())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else writes to the database and does not stop."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("begin exclusive")
        yield
        db.execute("rollback")


@contextlib.asynccontextmanager
async def meanwhile(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these coroutines until the block ends."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def push(stream: Stream, count: int) -> None:
    """Send so many as fast as they are acknowledged."""
    goal = stream.sent + count
    while stream.sent < goal and not stream.lost:
        while stream.sent < goal and stream.send():
            pass
        await asyncio.sleep(0.002)
    await stream.settle(60)


async def test_s01_t14_an_hour_without_the_sink_loses_nothing_and_costs_no_memory(tmp_path: Path) -> None:
    """S-01, T14, T15: an hour of 500 messages a second (two minutes in the short form), sent as fast as they go."""
    count = 1_800_000 if SOAK else 60_000
    ledger = Ledger()
    with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": SINK}) as running:
        to = url(running)
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
        stream = await Stream([ledger], "device", "telemetry/x", 0).open(to)
        await push(stream, 5_000)
        await eventually(lambda: resilience.row_count(running) == 5_000, "the first rows", 30, 0.1)
        worker = next(pid for pid in running.pids() if pid != running.pid)
        growth = Growth({"broker": running.pid, "worker": worker})
        with locked(running.where / "telemetry.db"):
            began = time.monotonic()
            async with canary_apart(to) as away, meanwhile(growth.watch()):
                await push(stream, count)
            took = time.monotonic() - began
            status = (await command(running, "status"))["sinks"]["store"]
            assert status["queued"] >= count, status
            assert status["acked"] == 5_000, "the sink was not away"
            size = store_bytes(running)
        speed = f"{took:.1f} s ({count / took:.0f}/s)"
        print(f"{count} messages without a sink in {speed}, {size >> 20} MiB of store; {growth}")
        began = time.monotonic()
        live = stream.sent

        async def gone() -> bool:
            nonlocal began
            looked = time.monotonic()
            found = (await command(running, "status"))["sinks"]["store"]
            if found["acked"] == 5_000:  # it waits for its next attempt, up to 30 s
                began = looked
            return bool(found["queued"] <= 100)

        stream.rate = 500
        async with canary_apart(to) as back, meanwhile(growth.watch(), stream.run(3_600)):
            await eventually(gone, "the end of the backlog", 900, 0.1)
        took = time.monotonic() - began
        await stream.settle(60)
        print(f"drained in {took:.1f} s ({count / took:.0f}/s) beside {stream.sent - live} live messages; {growth}")
        slowest = {name: song.slowest for name, song in (("away", away), ("back", back))}
        print(f"canary: {len(away.trips)} and {len(back.trips)} trips, slowest {slowest} s")
        print(f"{store_bytes(running) >> 20} MiB of store at the end")
        await eventually(lambda: resilience.row_count(running) >= stream.acknowledged, "every row", 60, 0.2)
        resilience.fill(ledger, await asyncio.to_thread(resilience.rows, running))
        report = ledger.check()
        assert report.acknowledged == stream.sent >= count + 5_000
        assert max(growth.most.values()) <= GROWTH, growth
        away.check()
        back.check()
        assert count / took >= 2_500 / PATIENCE


@pytest.mark.timeout(6_000 if SOAK else 300)
async def test_s01_s27_an_outage_by_the_clock_is_survived_and_every_message_accounted_for(tmp_path: Path) -> None:
    """S-01, S-27: 500 messages a second for an hour (a minute in the short form) and no sink; then live ones beside
    the backlog. At every look what was promised is stored, dropped or queued."""
    rate, seconds = 500, 3_600 if SOAK else 60
    ledger = Ledger()
    with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": SINK}) as running:
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
        stream = await Stream([ledger], "device", "telemetry/x", rate).open(url(running))
        await stream.run(2)
        await eventually(lambda: resilience.row_count(running) == stream.sent, "the first rows", 30, 0.1)
        growth = Growth({"broker": running.pid, "worker": next(pid for pid in running.pids() if pid != running.pid)})
        looks = 0

        async def keep_books() -> None:
            nonlocal looks
            while True:
                least = stream.acknowledged
                entry = (await command(running, "status"))["sinks"]["store"]
                assert least <= entry["acked"] + sum(entry["dropped"].values()) + entry["queued"] <= stream.sent, entry
                looks += 1
                await asyncio.sleep(0.5)

        async def gone() -> bool:
            return bool((await command(running, "status"))["sinks"]["store"]["queued"] <= rate / 10)

        async with canary_apart(url(running)) as canary, meanwhile(growth.watch(), keep_books()):
            with locked(running.where / "telemetry.db"):
                began = stream.sent
                await stream.run(seconds)
                missed = stream.sent - began
            since = time.monotonic()
            async with meanwhile(stream.run(3_600)):
                await eventually(gone, "the end of the backlog", 900, 0.2)
            took = time.monotonic() - since
        await stream.settle(60)
        await eventually(lambda: resilience.row_count(running) >= stream.acknowledged, "every row", 60, 0.2)

        async def settled() -> dict[str, Any] | None:
            found: dict[str, Any] = (await command(running, "status"))["sinks"]["store"]
            return None if found["queued"] else found

        entry = await eventually(settled, "an empty queue")
        print(
            f"{missed} missed in {seconds} s, drained in {took:.1f} s; {growth}; canary at most {canary.slowest:.3f} s"
        )
        assert missed >= 0.98 * rate * seconds
        assert took <= 900
        assert max(growth.most.values()) <= GROWTH
        canary.check()
        assert looks >= seconds
        assert (entry["acked"], entry["dropped"], entry["dead_letters"], entry["queued"]) == (stream.sent, {}, 0, 0)
        resilience.fill(ledger, await asyncio.to_thread(resilience.rows, running))
        assert ledger.check().acknowledged == stream.sent


AWAY = """
[sinks.store]
kind = "http"
url = "http://127.0.0.1:{port}/"
format = "array"
filters = ["telemetry/#"]
timeout = "5s"
batch = {{ max_records = 100 }}
"""
KILLS = 20 if SOAK else 4


async def test_s02_kills_at_random_during_an_outage_and_after_it_lose_nothing(tmp_path: Path) -> None:
    """S-02: S-01 with broker and worker killed twenty times (four in the short form), half of them while there is no
    target; a kill repeats one batch at most."""
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    ledger, port, pause = Ledger(), servers.free_port(), 0.1  # a thousand a second: the backlog outlasts the kills
    stored: list[bytes] = []

    async def answer(request: web.Request, body: bytes) -> web.Response:
        stored.extend(envelope["payload"].encode() for envelope in json.loads(body))
        await asyncio.sleep(pause)
        return web.Response(status=204)

    async with contextlib.AsyncExitStack() as stack:
        with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": AWAY.format(port=port)}) as running:

            async def worker() -> int | None:
                with contextlib.suppress(OSError, control.NotRunning):
                    found = (await command(running, "status"))["workers"]["1"]
                    return found if isinstance(found, int) else None
                return None

            for turn in range(KILLS):
                if turn == KILLS // 2:
                    assert not stored
                    await stack.enter_async_context(service(answer, port=port))
                name = f"device-{turn}"
                stream = await Stream([ledger], name, f"telemetry/{name}", 1_500).open(url(running))
                load = asyncio.create_task(stream.run(2))
                await asyncio.sleep(moments.uniform(0.2, 1.8))
                pid = await eventually(worker, "a worker")
                if moments.random() < 0.5:
                    os.kill(pid, signal.SIGKILL)
                else:
                    await asyncio.to_thread(running.stop, signal.SIGKILL)
                    await asyncio.to_thread(running.start)
                await load
                if not stream.lost:
                    await stream.settle()
                stream.conn.abort()

                async def another(pid: int = pid) -> bool:
                    return await worker() not in (None, pid)

                await eventually(another, "another worker")
            queued = (await command(running, "status"))["sinks"]["store"]["queued"]
            assert queued > 0, "nothing was under way any more"
            pause = 0.0

            async def gone() -> bool:
                return bool((await command(running, "status"))["sinks"]["store"]["queued"] == 0)

            await eventually(gone, "the end of the queue", 300, 0.2)
    for payload in stored:
        ledger.arrived(payload)
    report = ledger.check(duplicates_allowed=True, redelivery=True)
    print(f"seed {seed}: {KILLS} kills, {report.acknowledged} acknowledged, {report.duplicates} twice")
    assert report.acknowledged > 200 * KILLS
    assert report.duplicates <= 100 * KILLS, "a batch for each kill"


# --- a fleet ---------------------------------------------------------------------------------------------------------


SESSIONS = 100_000 if SOAK else 10_000
GROUP = 10
EACH = 10


async def wait_for(process: subprocess.Popen[str], seconds: float) -> str:
    """The end of a fleet's process, and what it said."""
    try:
        said, _ = await asyncio.to_thread(process.communicate, timeout=seconds * PATIENCE)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, said
    return said.strip()


async def work(running: Broker, what: str, canary: Canary, seconds: float) -> str:
    """One verb of `fleet` while the canary sings; what it said and the slowest round trip."""
    before = len(canary.trips)
    async with meanwhile(canary.sing(3_600)):
        said = await wait_for(fleet.start(what, running.port, SESSIONS, GROUP, EACH), seconds)
    trips = sorted(canary.trips[before:])
    median = trips[len(trips) // 2]
    return f"{said}; canary: {len(trips)} trips, slowest {trips[-1] * 1000:.0f} ms, median {median * 1000:.1f} ms"


async def live_rate(running: Broker, seconds: float) -> float:
    """QoS 0 messages a second from one client to another, as many as go."""
    heard = 0

    class Ear(Handler):
        def on_publish(self, conn: Connection, publish: Publish) -> None:
            nonlocal heard
            heard += 1

    listening = await Connection.connect(url(running), client_id="live-ear", handler=Ear())
    await listening.subscribe([("live/#", 0)])
    speaking = await Connection.connect(url(running), client_id="live-mouth", handler=Handler())
    began = time.monotonic()
    sent = 0
    while time.monotonic() - began < seconds:
        for _ in range(100):
            speaking.publish("live/x", b"0" * 64)
        sent += 100
        await speaking.ping()
    await listening.ping()
    took = time.monotonic() - began
    listening.abort()
    speaking.abort()
    assert heard == sent
    return heard / took


async def test_d22_t20_a_fleet_that_is_away_is_kept_started_with_and_given_its_messages(tmp_path: Path) -> None:
    """D-22, T20, T12: the canary while its sessions are made and filled, the start after a kill, and the draining."""
    with broker(tmp_path, {"00-broker.toml": ROOM}) as running:
        loading = await Canary.open(url(running))
        print(await work(running, "make", loading, 600))
        made = await work(running, "fill", loading, 600)
        print(made)
        kept = ((f"kept/{n}", b"kept|%d|" % n + b"x" * 50) for n in range(SESSIONS))
        codes = await Flood().run(url(running), kept, retain=True)
        assert codes == {0: SESSIONS}
        status = await command(running, "status")
        assert status["retained"] == SESSIONS
        memory = rss(running.pid)
        print(f"{memory >> 20} MiB of memory, {store_bytes(running) >> 20} MiB of store")
        running.stop(signal.SIGKILL)
        began = time.monotonic()
        running.start(seconds=60)
        ready = time.monotonic() - began
        after = await Canary.open(url(running))
        await after.sing(10 if SOAK else 3)
        print(f"ready in {ready:.1f} s with {rss(running.pid) >> 20} MiB; then slowest {after.slowest * 1000:.0f} ms")
        found = f"sessions={SESSIONS} queued={SESSIONS * EACH} retained={SESSIONS} lost=0"
        assert found in running.log()
        alone = await live_rate(running, 5 if SOAK else 1)
        draining = fleet.start("drain", running.port, SESSIONS, GROUP, EACH)
        await asyncio.sleep(1)
        rates: list[float] = []
        while draining.poll() is None and len(rates) < 300:
            rates.append(await live_rate(running, 1))
        print(await wait_for(draining, 600))
        beside = sorted(rates)[len(rates) // 2] if rates else 0.0
        print(f"live traffic: {alone:.0f}/s alone, {beside:.0f}/s (median of {len(rates)} s) while they drain")
        status = await command(running, "status")
        left = sum(row["queued"] for row in await command(running, "clients.list"))
        assert status["sessions"] >= SESSIONS
        assert left == 0
        assert ready <= 30 * PATIENCE
        after.check()
        loading.check()
