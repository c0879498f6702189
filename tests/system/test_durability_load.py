"""The store under load that does not end: it is bounded, gives space and memory back, and a stop leaves it whole."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from pathlib import Path

import pytest

from broker.client.connection import Connection, Handler
from broker.client.errors import Disconnected
from broker.engine.compaction import KEEP
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from broker.store.opening import SEGMENT_BYTES
from tests.clock import clock
from tests.ledger import Ledger
from tests.servers import PATIENCE
from tests.system.durability import ROOM, Sender, fetch, intact, keep, machine, store_bytes
from tests.system.fleet import Flood
from tests.system.resilience import OPEN, SOAK, Canary, Stream, command, eventually, rss, url

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800 if SOAK else 180)]

MIB = 1 << 20
SPARED = KEEP + 2 * SEGMENT_BYTES
"""Bytes of a store in which next to nothing lives: below, no room is made."""


class SlowReader(Handler):
    """Acknowledges so many a second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.count = 0
        self._waiting: deque[int] = deque()
        self.conn: Connection

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.count += 1
        self._waiting.append(publish.packet_id)

    async def read(self) -> None:
        """Until cancelled."""
        while True:
            while self._waiting:
                self.conn.ack(PacketType.PUBACK, self._waiting.popleft())
                if self.rate:
                    await asyncio.sleep(1 / self.rate)
            await asyncio.sleep(0.005)


async def test_d19_a_slow_reader_does_not_make_the_store_grow_without_end(tmp_path: Path) -> None:
    """D-19: 1,000 messages a second for one who takes 100 and has a queue of 1,000; when he has caught up the store
    shrinks. Messages of 40 kB stand for the length of a day; the long form writes as many bytes as a day of small ones
    with their records (14 GB)."""
    seconds = 360 if SOAK else 5
    with machine(tmp_path, OPEN) as running:
        to = url(running)
        reader = SlowReader(100)
        reader.conn = await Connection.connect(
            to, client_id="slow", handler=reader, clean_start=False, session_expiry=3_600, receive_maximum=20
        )
        await reader.conn.subscribe([("data/#", 1)])
        reading = asyncio.create_task(reader.read())
        ledger = Ledger()
        stream = await Stream([ledger], "device", "data/x", 1_000, size=40_000).open(to)
        enough = max(seconds * 500 / PATIENCE, SPARED / 40_000)

        async def press() -> None:
            await stream.run(seconds)
            deadline = time.monotonic() + 60
            while stream.acknowledged <= enough and time.monotonic() < deadline:
                await stream.run(0.5)

        load = asyncio.create_task(press())
        sizes = []
        memory = rss(running.pid)
        while not load.done():
            sizes.append(store_bytes(running))
            await asyncio.sleep(0.1)
        await load
        await stream.settle()
        grown = rss(running.pid) - memory
        queued = (await command(running, "clients.show", id="slow"))["queued"]
        assert stream.acknowledged > enough, "there was no load, or less was stored than is worth making room for"
        reader.rate = 0

        async def empty() -> bool:
            return bool((await command(running, "clients.show", id="slow"))["queued"] == 0)

        await eventually(empty, "the end of the queue", 30, 0.1)
        await eventually(lambda: store_bytes(running) <= SPARED, "a smaller store", 15)
        print(
            f"{stream.acknowledged} messages, {reader.count} read, {queued} queued at the end: store at most "
            f"{max(sizes) >> 20} MiB, drained {store_bytes(running) >> 20} MiB, memory +{grown >> 20} MiB"
        )
        assert max(sizes) <= 256 * MIB
        assert grown <= 128 * MIB
        reading.cancel()
        reader.conn.abort()
        stream.conn.abort()


async def test_r07_retained_topics_have_a_limit_and_what_is_deleted_gives_memory_and_disk_back(tmp_path: Path) -> None:
    """R-07: from one client; above the limit 0x97, topics that are there may still change."""
    limit = 1_000_000 if SOAK else 20_000
    size = 100 if SOAK else 9_000
    with machine(tmp_path, f"{ROOM}max_retained_messages = {limit}\n") as running:
        to = url(running)
        before = rss(running.pid)

        def topics(first: int, last: int) -> list[tuple[str, bytes]]:
            return [(f"kept/{n}", b"kept|%d|" % n + b"x" * size) for n in range(first, last)]

        began = time.monotonic()
        assert await Flood().run(to, topics(0, limit), retain=True) == {0: limit}
        took = time.monotonic() - began
        assert await Flood().run(to, topics(limit, limit + 200), retain=True) == {0x97: 200}
        assert await Flood().run(to, topics(0, 10), retain=True) == {0: 10}
        assert (await command(running, "status"))["retained"] == limit
        full, disk = rss(running.pid) - before, store_bytes(running)
        canary = await Canary.open(to)
        singing = asyncio.create_task(canary.sing(3_600))
        deleted = await Flood().run(to, ((f"kept/{n}", b"") for n in range(limit)), retain=True)
        assert deleted == {0: limit}
        assert (await command(running, "status"))["retained"] == 0
        await eventually(lambda: store_bytes(running) <= SPARED, "the space on disk", 30, 0.1)
        singing.cancel()
        empty = rss(running.pid) - before
        # an allocator keeps what it was given back; that it is free shows when as much is needed once more
        assert await Flood().run(to, topics(limit, 2 * limit), retain=True) == {0: limit}
        again = rss(running.pid) - before
        assert again <= full * 1.2 + 8 * MIB, f"+{again >> 20} MiB, the first time +{full >> 20} MiB"
        await Flood().run(to, ((f"kept/{n}", b"") for n in range(limit, 2 * limit)), retain=True)
        print(
            f"{limit} topics in {took:.1f} s: +{full >> 20} MiB of memory, {disk >> 20} MiB of store; deleted: "
            f"+{empty >> 20} MiB, {store_bytes(running) >> 20} MiB; filled once more +{again >> 20} MiB; "
            f"canary {canary.slowest * 1000:.0f} ms"
        )
        assert disk > SPARED, "the store had nothing to give back"
        assert canary.slowest <= 1 * PATIENCE
        assert running.stop(seconds=30) == 0
        running.start(60)
        assert (await command(running, "status"))["retained"] == 0


CLIENTS = 10_000 if SOAK else 300
FLYING = 5_000 if SOAK else 600


class Holder(Handler):
    """Takes messages and acknowledges none; remembers how it ended."""

    def __init__(self) -> None:
        self.held = 0
        self.ended: Exception | None = None

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.held += 1

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended = exc


@pytest.mark.parametrize("signals", [1, 2])
async def test_r14_a_stop_with_messages_in_flight_leaves_a_whole_store(tmp_path: Path, signals: int) -> None:
    """R-14: persistent sessions, thousands of messages sent and not acknowledged, publishers at work. A second signal
    ends it at once; what was acknowledged is there in both cases."""
    ledger = Ledger()
    with machine(tmp_path, ROOM) as running:
        to = url(running)
        await keep(to, "kept", "data/#")
        holders = []
        for number in range(CLIENTS):
            holder = Holder()
            holders.append(holder)
            conn = await Connection.connect(
                to, client_id=f"c{number}", handler=holder, clean_start=False, session_expiry=3_600
            )
            if number < FLYING // 30:  # max_inflight is 32
                await conn.subscribe([("data/#", 1)])
        stream = await Stream([ledger], "device", "data/x", 1_000).open(to)
        load = asyncio.create_task(stream.run(60))
        await eventually(
            lambda: sum(h.held for h in holders) >= FLYING and stream.acknowledged > 100, "messages in flight", 30
        )
        process = running.process.popen
        began = clock()
        process.send_signal(signal.SIGTERM)
        if signals == 2:
            await asyncio.sleep(0.02)  # two at once are one
            process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 30)
        took = clock() - began
        await load
        flying = sum(h.held for h in holders)
        print(f"{CLIENTS} clients, {flying} in flight, {signals} signals: {took:.2f} s, exit code {code}")
        intact(running)
        if signals == 1:
            assert code == 0
            assert took <= 10 * PATIENCE
            codes = {h.ended.code if isinstance(h.ended, Disconnected) else h.ended for h in holders}
            assert codes == {0x8B}
        else:
            assert code in (0, 1, -signal.SIGTERM)  # the last: it was over, but for the interpreter's own end
            assert took <= 4 * PATIENCE
        running.start(60)
        await fetch(url(running), "kept", ledger)
        ledger.check(redelivery=True)
        collected = Ledger()
        collected._sent = ledger._sent
        collected._acknowledged = ledger._acknowledged
        await fetch(url(running), "c0", collected)  # what it held comes again, the rest for the first time
        collected.check(redelivery=True)


@pytest.mark.skipif(not SOAK, reason="`make soak`; the short form is in test_outage.py")
async def test_t20_a_store_of_long_queues_is_started_with_quickly(tmp_path: Path) -> None:
    """D-22, T20: a million messages in one queue ; its client gets them all, in order."""
    count = 1_000_000
    with machine(tmp_path, ROOM) as running:
        await keep(url(running), "kept", "data/#")
        sent = ((f"data/{n % 100}", b"device|%d|" % (n + 1)) for n in range(count))
        assert await Flood().run(url(running), sent) == {0: count}
        running.stop(signal.SIGKILL)
        began = time.monotonic()
        running.start(60)
        ready = time.monotonic() - began
        ledger = Ledger()
        for _ in range(count):
            ledger.acknowledged("device", ledger.next("device")[0])
        canary = await Canary.open(url(running))
        singing = asyncio.create_task(canary.sing(3_600))
        began = time.monotonic()
        await fetch(url(running), "kept", ledger, quiet=1.0, seconds=300)
        took = time.monotonic() - began
        singing.cancel()
        print(
            f"{count} messages: ready in {ready:.1f} s, given out in {took:.1f} s, {rss(running.pid) >> 20} MiB, "
            f"canary {canary.slowest * 1000:.0f} ms"
        )
        ledger.check(redelivery=True)
        assert ready <= 30 * PATIENCE


async def test_d20_a_backup_does_not_hold_up_anybody(tmp_path: Path) -> None:
    """D-20: nor does it let the store grow afterwards: what was dropped meanwhile goes when it is made."""
    with machine(tmp_path, ROOM) as running:
        to = url(running)
        await keep(to, "kept", "data/#")
        ledger = Ledger()
        sender = await Sender(ledger, "big", "data/x", size=500_000).open(to)
        await sender.many(500 if SOAK else 100, window=8)
        canary = await Canary.open(to)
        singing = asyncio.create_task(canary.sing(3_600))
        fetching = asyncio.create_task(fetch(to, "kept", ledger, quiet=0.5))
        copied = [
            await command(running, "store.backup", folder=str(running.where / f"copy-{number}")) for number in range(3)
        ]
        await fetching
        singing.cancel()
        print(copied, f"canary {canary.slowest * 1000:.0f} ms")
        ledger.check(redelivery=True)
        await eventually(lambda: store_bytes(running) <= SPARED, "the space on disk", 15)
        assert canary.slowest <= 1 * PATIENCE
        sender.close()
