"""Many clients at once: all of them dying, all wanting one client id, all with nonsense in their wills."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.client.connection import Connection, Handler
from broker.mqtt import packets
from broker.mqtt.codes import PacketType
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Publish, Will
from tests.broker import broker
from tests.servers import PATIENCE
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.resilience import OPEN, SOAK, command, eventually, rss

pytestmark = [pytest.mark.timeout(600 if SOAK else 120), *([pytest.mark.slow] if SOAK else [])]

MEGABYTE = 1 << 20
PATIENT_CANARY = 2.0 * PATIENCE
"""Seconds its round trip may take while thousands of clients come or die."""


def dial(port: int) -> socket.socket:
    """Connected; closing it resets the connection, so that nothing of it stays in the kernel."""
    one = socket.create_connection(("127.0.0.1", port), timeout=10 * PATIENCE)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return one


@contextlib.contextmanager
def crowd() -> Iterator[list[socket.socket]]:
    """Sockets that are all closed at the end."""
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for one in sockets:
            one.close()


def connect_packet(client_id: str, will: Will | None = None) -> bytes:
    return packets.encode_connect(
        packets.Connect(version=5, clean_start=True, keep_alive=0, client_id=client_id, will=will)
    )


# --- P-60 ------------------------------------------------------------------------------------------------------------


class Mourner(Handler):
    """Counts the wills it gets by the client that left them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.wills: Counter[bytes] = Counter()

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        assert len(publish.payload) == self.size
        self.wills[publish.payload.rstrip(b"x")] += 1
        conn.ack(PacketType.PUBACK, publish.packet_id)


@pytest.mark.slow
async def test_p60_every_will_of_clients_that_die_together_arrives_once_and_delays_nobody(tmp_path: Path) -> None:
    count, size = (5_000 if SOAK else 1_000), 16 << 10
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < count + 200:
        pytest.skip(f"{count} connections need more descriptors than this account may have")
    limits = "[limits]\nmax_queued_messages = 20000\n[listeners.tcp]\nmax_connections = 20000\n"
    with broker(tmp_path, {"00-broker.toml": OPEN, "01-limits.toml": limits}) as running, crowd() as sockets:
        alone = rss(running.pid)
        mourner = Mourner(size)
        conn = await Connection.connect(resilience.url(running), client_id="mourner", handler=mourner)
        assert await conn.subscribe([("wills/#", 1)]) == [1]

        def gather() -> None:
            for number in range(count):
                name = b"c%d" % number
                one = dial(running.port)
                sockets.append(one)
                will = Will(topic=b"wills/" + name, payload=name.ljust(size, b"x"), qos=1, retain=False)
                one.sendall(connect_packet(name.decode(), will))
            for one in sockets:
                reply = one.recv(4096)
                assert reply[:1] == b"\x20"
                assert reply[3] == 0

        def die() -> float:
            """All of them; the seconds for which the broker stood still."""
            stopped = time.monotonic()
            os.kill(running.pid, signal.SIGSTOP)  # it looks again when all of them are gone
            try:
                for one in sockets:
                    one.close()
            finally:
                os.kill(running.pid, signal.SIGCONT)
            return time.monotonic() - stopped

        await asyncio.to_thread(gather)
        held = rss(running.pid)
        async with canary_apart(resilience.url(running)) as canary:
            began = time.monotonic()
            stood = await asyncio.to_thread(die)
            await eventually(lambda: sum(mourner.wills.values()) >= count, "the wills", 20)
            took = time.monotonic() - began
            await asyncio.sleep(0.2)
            conn.publish("wills/last", b"last".ljust(size, b"x"), 1, packet_id=1)
            await eventually(lambda: mourner.wills[b"last"], "what comes behind a second copy", 12)
        peak = rss(running.pid, "VmHWM")
        print(
            f"P-60: {count} wills of {size} bytes: +{(held - alone) / 1e6:.0f} MB while they wait, "
            f"+{(peak - held) / 1e6:.0f} MB when they are published, all there after {took:.2f} s, "
            f"canary {canary.slowest * 1000:.0f} ms, of which the broker stood still for {stood * 1000:.0f} ms"
        )
        assert mourner.wills == {b"last": 1} | {b"c%d" % number: 1 for number in range(count)}
        assert canary.slowest <= stood + PATIENT_CANARY
        assert peak - held <= count * size + 16 * MEGABYTE, "what the mourner's connection holds, once"
        status = await command(running, "status")
        assert status["messages"]["dropped"] == {}
        assert status["sessions"] == 1
        await conn.disconnect()


# --- P-56 ------------------------------------------------------------------------------------------------------------


class Contest:
    """Connections that all want the client id `contested`, and what became of each."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.over = False
        self.attempts = 0
        self.ends: Counter[str] = Counter()
        self.owners: Counter[bytes] = Counter()
        """Probe -> connections that got it."""

    async def compete(self, dice: random.Random) -> None:
        while not self.over:
            self.attempts += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                async with asyncio.timeout(30 * PATIENCE):
                    self.ends[await self._hold(reader, writer, dice)] += 1
            finally:
                writer.transport.abort()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dice: random.Random) -> str:
        """Take the session, subscribe and unsubscribe at odd moments until it is lost; how it ended."""
        frames = FrameReader(MEGABYTE)
        writer.write(connect_packet("contested"))
        owner = False
        while True:
            try:
                data = await asyncio.wait_for(reader.read(65_536), dice.uniform(0.001, 0.03) if owner else None)
            except TimeoutError:
                if self.over or dice.random() < 0.02:
                    return "left by itself"
                if dice.random() < 0.7:
                    writer.write(packets.encode_subscribe(1, 5, [(b"contested", 0)]))
                else:
                    writer.write(packets.encode_unsubscribe(1, 5, [b"contested"]))
                continue
            except ConnectionResetError:
                return "reset"
            if not data:
                return "closed without a word"
            for first, body in frames.feed(data):
                kind = first >> 4
                if kind == PacketType.CONNACK and body[1]:
                    return f"refused {body[1]:#04x}"
                if kind == PacketType.DISCONNECT:
                    return f"dismissed {packets.decode_disconnect(body, 5).code:#04x}"
                if kind == PacketType.CONNACK:
                    owner = True
                elif kind == PacketType.PUBLISH:
                    self.owners[packets.decode_publish(first, body, 5).payload] += 1


async def test_p56_a_client_id_that_twenty_want_has_one_owner_at_a_time_and_costs_the_broker_nothing(
    tmp_path: Path,
) -> None:
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running:
        prober = await Connection.connect(resilience.url(running), client_id="prober", handler=Handler())
        contest = Contest(running.port)
        seconds = 60 if SOAK else 8
        async with canary_apart(resilience.url(running), 0.1) as canary:
            competing = [asyncio.create_task(contest.compete(random.Random(seed))) for seed in range(20)]
            began = time.monotonic()
            before = probes = 0
            while (at := time.monotonic() - began) < seconds:
                if at > 2 and not before:
                    before = rss(running.pid)
                probes += 1
                prober.publish("contested", b"%d" % probes)
                await asyncio.sleep(0.01)  # the pace of the probes
            growth = rss(running.pid) - before
            contest.over = True
            await asyncio.gather(*competing)
            took = time.monotonic() - began
        got = len(contest.owners)
        print(
            f"P-56: {contest.attempts / took:.0f} attempts a second, {dict(contest.ends)}, {got} of {probes} probes "
            f"had a receiver, memory +{growth / 1e6:.1f} MB, canary {canary.slowest * 1000:.0f} ms"
        )
        assert contest.attempts / took > (1_000 if SOAK else 200) / PATIENCE
        assert set(contest.ends) <= {"dismissed 0x8e", "refused 0x9f", "left by itself"}
        assert 0 < contest.ends["dismissed 0x8e"] <= 10 * (took + 1), "takeover_rate is 10 a second"
        assert contest.ends["refused 0x9f"] > 100
        assert got > probes // 10, "the probes show nothing"
        assert set(contest.owners.values()) == {1}, "two connections owned one session"
        assert growth <= 5 * MEGABYTE
        canary.check(1.0 * PATIENCE)
        # nothing is left behind: the next one gets the session
        conn = await Connection.connect(resilience.url(running), client_id="contested", handler=Handler())
        assert [c["connected"] for c in await command(running, "clients.list") if c["clientid"] == "contested"] == [
            True
        ]
        await conn.disconnect()
        await eventually(
            lambda: resilience.ask(running, "status")["listeners"]["tcp"]["connections"] == 1, "only the prober", 8, 0.1
        )
        prober.abort()


# --- P-41 ------------------------------------------------------------------------------------------------------------


class Collector(Handler):
    """Keeps every payload; completes QoS 2 by itself."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.payloads.append(publish.payload)


async def test_p41_one_identifier_a_hundred_thousand_times_is_one_message(tmp_path: Path) -> None:
    count, batch = 100_000, 1_000
    pubrec = b"\x50\x02\x00\x07"
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running, crowd() as sockets:
        collector = Collector()
        subscriber = await Connection.connect(resilience.url(running), client_id="s", handler=collector)
        assert await subscriber.subscribe([("t", 0)]) == [0]
        publisher = dial(running.port)
        sockets.append(publisher)
        publisher.sendall(packets.encode_connect(packets.Connect(version=4, clean_start=True, client_id="p")))
        assert take(publisher, 4) == b"\x20\x02\x00\x00"

        def repeat(start: int) -> None:
            numbers = range(start, start + batch)
            publisher.sendall(b"".join(b"\x34\x0b\x00\x01t\x00\x07%06d" % n for n in numbers))
            assert take(publisher, 4 * batch) == pubrec * batch

        repeat(0)
        before = rss(running.pid)
        for start in range(batch, count, batch):
            await asyncio.to_thread(repeat, start)
        growth = rss(running.pid) - before
        publisher.sendall(b"\x62\x02\x00\x07")
        assert take(publisher, 4) == b"\x70\x02\x00\x07"
        publisher.sendall(b"\x30\x07\x00\x01tlast")
        await eventually(lambda: b"last" in collector.payloads, "what was sent behind it")
        print(f"P-41: {count} times one identifier, memory {growth / 1e6:+.1f} MB")
        assert collector.payloads == [b"000000", b"last"]
        assert growth <= 5 * MEGABYTE
        subscriber.abort()


def take(one: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    found = b""
    while len(found) < size:
        piece = one.recv(size - len(found))
        assert piece, f"closed after {len(found)} of {size} bytes"
        found += piece
    return found


# --- P-49 ------------------------------------------------------------------------------------------------------------

BAD_WILLS = {
    "unknown": b"\x7f\x00",
    "of another packet": b"\x21\x00\x01",
    "twice": b"\x01\x00\x01\x00",
    "no boolean": b"\x01\x02",
    "delay cut": b"\x18\x00\x00",
    "content type cut": b"\x03\xff\xff" + b"x" * 500,
    "content type not UTF-8": b"\x03\x00\x02\xc0\xaf",
    "response topic with a wildcard": b"\x08\x00\x03a/+",
    "correlation data cut": b"\x09\x10\x00" + b"x" * 500,
    "user property without a value": b"\x26\x00\x01a",
}
"""Will properties that MQTT forbids."""


def with_will_properties(block: bytes) -> bytes:
    """A CONNECT of MQTT 5 with this block as the properties of its will."""
    length = bytes([len(block)]) if len(block) < 128 else bytes([len(block) & 127 | 128, len(block) >> 7])
    body = b"\x00\x04MQTT\x05\x06\x00\x00\x00\x00\x03bad" + length + block + b"\x00\x01w\x00\x01x"
    size = bytes([len(body)]) if len(body) < 128 else bytes([len(body) & 127 | 128, len(body) >> 7])
    return b"\x10" + size + body


async def test_p49_wills_with_bad_properties_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    count = 100_000 if SOAK else 20_000
    kinds = [with_will_properties(block) for block in BAD_WILLS.values()]
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running:

        def flood(many: int, pause: float = 0.0) -> Counter[int]:
            """Fifty at a time, and no fifty in less than `pause` seconds."""
            codes: Counter[int] = Counter()
            for start in range(0, many, 50):
                due = time.monotonic() + pause
                with crowd() as sockets:
                    for number in range(start, start + 50):
                        one = dial(running.port)
                        sockets.append(one)
                        one.sendall(kinds[number % len(kinds)])
                    for one in sockets:
                        reply = one.recv(64)
                        assert reply[:1] == b"\x20", reply
                        codes[reply[3]] += 1
                time.sleep(max(0.0, due - time.monotonic()))
            return codes

        async with canary_apart(resilience.url(running), 0.1) as canary:
            began = time.monotonic()
            await asyncio.to_thread(flood, 10_000)
            # refused ones stay half a second: no faster than these, there are never more of them at once
            pause = (time.monotonic() - began) / (10_000 / 50)
            before = rss(running.pid)
            began = time.monotonic()
            codes = await asyncio.to_thread(flood, count, pause)
            took = time.monotonic() - began
            growth = rss(running.pid) - before
        print(
            f"P-49: {count / took:.0f} a second, codes {dict(codes)}, memory {growth / 1e6:+.1f} MB, "
            f"canary {canary.slowest * 1000:.0f} ms"
        )
        assert set(codes) == {0x81, 0x82}
        assert sum(codes.values()) == count
        assert growth <= 5 * MEGABYTE
        assert canary.slowest <= PATIENT_CANARY
        status = await command(running, "status")
        assert status["sessions"] == 0
        await eventually(
            lambda: resilience.ask(running, "status")["listeners"]["tcp"]["connections"] == 0, "nobody", 8, 0.1
        )
