"""Exchanges of clients with persistent sessions, cut by kills and take-overs at the steps where state is made."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection, Handler
from broker.client.session import Publisher
from broker.mqtt import packets
from broker.mqtt.codes import PacketType
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Publish
from broker.mqtt.properties import Properties
from tests.power.rounds import Machine
from tests.servers import PATIENCE
from tests.system.durability import intact, keep, machine
from tests.system.resilience import SOAK, ask, command, eventually, rss, url

pytestmark = pytest.mark.timeout(900 if SOAK else 180)

ROUNDS = 20 if SOAK else 2
PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, PINGRESP, DISCONNECT = 3, 4, 5, 6, 7, 13, 14


class Wire:
    """A client that sends what a test says and nothing else."""

    def __init__(self, running: Machine, name: str, version: int = 4, window: int = 0) -> None:
        properties = Properties()
        properties.session_expiry_interval = 7_200
        properties.receive_maximum = window or None
        self.version = version
        self.socket = socket.create_connection(("127.0.0.1", running.port), timeout=20 * PATIENCE)
        self._frames = FrameReader(1 << 24)
        self._packets: deque[tuple[int, bytes]] = deque()
        self.send(
            packets.encode_connect(
                packets.Connect(
                    version=version, clean_start=False, keep_alive=0, client_id=name,
                    properties=properties if version == 5 else None,
                )
            )
        )  # fmt: skip
        connack = self.take()
        assert connack.code == 0
        self.present = bool(connack.session_present)

    def send(self, *raw: bytes) -> None:
        self.socket.sendall(b"".join(raw))

    def publish(self, payload: bytes, qos: int, ident: int, **flags: Any) -> bytes:
        """The bytes of a PUBLISH to `data/x`."""
        retain, dup = flags.get("retain", False), flags.get("dup", False)
        return packets.encode_publish(b"data/x", payload, qos, retain, dup, ident, self.version, b"")

    def ack(self, kind: int, ident: int) -> bytes:
        return packets.encode_ack(kind, ident, self.version, 0)

    def take(self, kind: int = 0) -> Any:
        """The next packet, which must be of this kind; raises ConnectionError at the end of the connection."""
        first, body = self._next()
        assert not kind or first >> 4 == kind, f"{first >> 4} instead of {kind}"
        return packets.decode(first, body, self.version)

    def until(self, kind: int, ident: int) -> None:
        """Past everything up to this acknowledgement."""
        while True:
            first, body = self._next()
            if first >> 4 == kind and packets.decode_ack(body, self.version, kind).packet_id == ident:
                return

    def rest(self, seconds: float = 0.5) -> list[Any]:
        """What still comes until nothing has for a while."""
        self.socket.settimeout(seconds * PATIENCE)
        found = []
        with suppress(TimeoutError, ConnectionError):
            while True:
                found.append(self.take())
        return found

    def _next(self) -> tuple[int, bytes]:
        while not self._packets:
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the broker ended the connection")
            self._packets.extend(self._frames.feed(data))
        return self._packets.popleft()

    def close(self) -> None:
        """Without DISCONNECT."""
        self.socket.close()


def kill(running: Machine) -> None:
    """kill -9 and a start."""
    running.stop(signal.SIGKILL)
    running.start()


async def stored(to: str) -> None:
    """Returns when the disk has whatever the broker has read by now: its store is written in order."""
    await keep(to, "fence", "fence/#")
    publisher = await Publisher.connect(to, client_id="fencer")
    await publisher.publish("fence/x", b"")
    await publisher.disconnect()


def messages(found: list[Any]) -> list[bytes]:
    return [packet.payload for packet in found if isinstance(packet, Publish)]


# --- right after an acknowledgement ----------------------------------------------------------------------------------


class Taker(Handler):
    """A subscriber that answers at once, and knows what it has completed."""

    def __init__(self) -> None:
        self.got: list[Publish] = []
        self.completed: set[bytes] = set()
        self._open: dict[int, bytes] = {}

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        if publish.qos == 2 and publish.packet_id in self._open:
            assert publish.dup
            conn.ack(PacketType.PUBREC, publish.packet_id)
            return
        self.got.append(publish)
        if publish.qos == 1:
            conn.ack(PacketType.PUBACK, publish.packet_id)
            self.completed.add(publish.payload)
        else:
            self._open[publish.packet_id] = publish.payload
            conn.ack(PacketType.PUBREC, publish.packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        assert packet_type == PacketType.PUBREL
        if packet_id in self._open:  # else it comes once more: that its PUBCOMP has arrived was not stored
            self.completed.add(self._open.pop(packet_id))
        conn.ack(PacketType.PUBCOMP, packet_id)

    def has_completed(self, count: int) -> bool:
        return len(self.completed) >= count

    async def back(self, to: str, name: str, least: int = 0, quiet: float = 0.4) -> list[Publish]:
        """What comes when it is there again: at least so many messages, and more for a while after them."""
        before = len(self.got)
        conn = await Connection.connect(to, client_id=name, handler=self, clean_start=False, session_expiry=7_200)
        assert conn.session_present
        await eventually(lambda: len(self.got) >= before + least, f"{least} messages for {name}", 10)
        await asyncio.sleep(quiet * PATIENCE)
        conn.abort()
        return self.got[before:]


@pytest.mark.parametrize("wait", [False, True], ids=["at once", "stored"])
async def test_d03_what_a_subscriber_has_completed_does_not_come_again(tmp_path: Path, wait: bool) -> None:
    """D-03: killed as soon as the last PUBCOMP and PUBACK are on their way: nothing at QoS 2 comes again, at QoS 1 only
    what was not stored, with DUP; a moment later nothing does."""
    count = 200
    with machine(tmp_path) as running:
        takers = {f"qos-{qos}": Taker() for qos in (1, 2)}
        for qos, name in enumerate(takers, 1):
            await keep(url(running), name, "data/#", qos)
        for number in range(1, ROUNDS + 1):
            conns = [
                await Connection.connect(
                    url(running), client_id=name, handler=taker, clean_start=False, session_expiry=7_200
                )
                for name, taker in takers.items()
            ]
            publisher = await Publisher.connect(url(running), client_id="device")
            sent = range((number - 1) * count, number * count)
            await asyncio.gather(*(publisher.publish("data/x", b"%d" % n, 2) for n in sent))
            for taker in takers.values():
                await eventually(partial(taker.has_completed, number * count), "every handshake", 20)
            for conn in conns:
                await conn.drain()
            if wait:
                for conn in conns:
                    await conn.ping()
                await stored(url(running))
            running.stop(signal.SIGKILL)
            for conn in (*conns, publisher.conn):
                conn.abort()
            running.start()
            twice = await takers["qos-2"].back(url(running), "qos-2")
            assert not twice, f"{len(twice)} came again at QoS 2"
            again = await takers["qos-1"].back(url(running), "qos-1")
            assert all(publish.dup for publish in again)
            assert not (again and wait), f"{len(again)} came again although their PUBACK was stored"
        assert Counter(p.payload for p in takers["qos-2"].got) == {b"%d" % n: 1 for n in range(ROUNDS * count)}


async def retained_now(to: str, least: int) -> list[bytes]:
    """What a new subscriber is sent: at least so many messages, and more for a moment after them."""
    taker = Taker()
    conn = await Connection.connect(to, client_id="new", handler=taker)
    assert await conn.subscribe([("kept/#", 1)]) == [1]
    await conn.ping()
    await eventually(lambda: len(taker.got) >= least, f"{least} retained messages", 10)
    await asyncio.sleep(0.1 * PATIENCE)
    conn.abort()
    return [publish.payload for publish in taker.got]


async def test_d12_a_kill_right_after_the_puback_of_a_retained_message_or_of_its_removal(tmp_path: Path) -> None:
    """D-12: it is there; it is gone."""
    with machine(tmp_path) as running:
        for number in range(ROUNDS):
            for payload in (b"first %d" % number, b"second %d" % number, b""):
                publisher = await Publisher.connect(url(running), client_id="device")
                await publisher.publish("kept/x", payload, 1 + number % 2, retain=True)
                running.stop(signal.SIGKILL)
                publisher.conn.abort()
                running.start()
                wanted = [payload] if payload else []
                assert await retained_now(url(running), len(wanted)) == wanted


async def test_d13_a_kill_right_after_suback_and_after_unsuback(tmp_path: Path) -> None:
    """D-13: the subscription is there, its QoS too; it is gone."""
    with machine(tmp_path) as running:
        taker = Taker()

        async def connected() -> Connection:
            return await Connection.connect(
                url(running), client_id="s", handler=taker, clean_start=False, session_expiry=7_200
            )

        for number in range(ROUNDS):
            for change in ("subscribe", "raise", "unsubscribe"):
                conn = await connected()
                assert conn.session_present == (number > 0 or change != "subscribe")
                qos = 1 if change == "subscribe" else 2
                if change == "unsubscribe":
                    assert await conn.unsubscribe(["data/#"]) == [0]
                else:
                    assert await conn.subscribe([("data/#", qos)]) == [qos]
                running.stop(signal.SIGKILL)
                conn.abort()
                running.start()
                publisher = await Publisher.connect(url(running), client_id="device")
                payload = b"%d %s" % (number, change.encode())
                await publisher.publish("data/x", payload, 2)
                publisher.conn.abort()
                wanted = [] if change == "unsubscribe" else [(payload, qos)]
                came = await taker.back(url(running), "s", len(wanted))
                assert [(publish.payload, publish.qos) for publish in came] == wanted


def test_retained_messages_that_suback_has_promised_come_after_a_kill(tmp_path: Path) -> None:
    """Its client had taken and acknowledged some of them."""
    count, taken = 2_000, 100
    with machine(tmp_path) as running:

        async def shelve() -> None:
            publisher = await Publisher.connect(url(running), client_id="device")
            await asyncio.gather(
                *(publisher.publish(f"kept/{n}", b"%d" % n, 1 + n % 2, retain=True) for n in range(count))
            )
            await publisher.disconnect()

        asyncio.run(shelve())
        found: list[bytes] = []
        with closing(Wire(running, "s")) as one:
            one.send(packets.encode_subscribe(1, 4, [(b"kept/#", 1)]))
            assert one.take().codes == [1]
            for _ in range(taken):
                packet = one.take(PUBLISH)
                found.append(packet.payload)
                one.send(one.ack(PUBACK, packet.packet_id))
            kill(running)
        with closing(Wire(running, "s")) as one:
            assert one.present
            while len(set(found)) < count:
                packet = one.take(PUBLISH)
                found.append(packet.payload)
                one.send(one.ack(PUBACK, packet.packet_id))
            assert not one.rest(0.3)
        assert set(found) == {b"%d" % n for n in range(count)}
        assert len(found) <= count + 200, "what was acknowledged a moment before the kill may come again"
        time.sleep(2)
        kill(running)
        with closing(Wire(running, "s")) as one:
            assert not one.rest(), "they are owed no more"


# --- acknowledgements ------------------------------------------------------------------------------------------------


async def fill(to: str, count: int, qos: int = 1) -> None:
    """So many messages, numbered."""
    publisher = await Publisher.connect(to, client_id="filler")
    await asyncio.gather(*(publisher.publish("data/x", b"%d" % n, qos) for n in range(count)))
    await publisher.disconnect()


def test_p39_a_puback_in_the_segment_that_ends_the_connection_counts(tmp_path: Path) -> None:
    """P-39: with 1,000 messages queued; also after a kill."""
    count = 1_000
    with machine(tmp_path) as running:
        asyncio.run(keep(url(running), "s", "data/#"))
        asyncio.run(fill(url(running), count))
        for number in range(3):
            with closing(Wire(running, "s")) as one:
                assert one.present
                first = one.take(PUBLISH)
                assert first.payload == b"%d" % number
                one.socket.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_CORK, 1
                )  # or the end would be a segment of its own
                one.send(one.ack(PUBACK, first.packet_id))
                one.socket.shutdown(socket.SHUT_WR)
                one.rest(5.0)
                with pytest.raises(ConnectionError):
                    one.take()
            if number == 1:
                asyncio.run(stored(url(running)))
                kill(running)
        with closing(Wire(running, "s", 5, 60_000)) as one:
            found = messages([one.take(PUBLISH) for _ in range(count - 3)] + one.rest(0.2))
        assert found == [b"%d" % n for n in range(3, count)]


# --- QoS 2 -----------------------------------------------------------------------------------------------------------


def test_p41_one_identifier_a_hundred_thousand_times_into_a_durable_queue(tmp_path: Path) -> None:
    """P-41: different payloads, 100,000 PUBRECs, memory stays; after PUBREL and a kill the first payload is there and
    no other."""
    count, batch = 100_000, 1_000
    with machine(tmp_path) as running:
        asyncio.run(keep(url(running), "s", "data/#", 2))
        with closing(Wire(running, "p")) as one:

            def repeat(start: int) -> None:
                one.send(*(one.publish(b"%06d" % n, 2, 7) for n in range(start, start + batch)))
                for _ in range(batch):
                    assert one.take(PUBREC).packet_id == 7

            repeat(0)
            before = rss(running.pid)
            for start in range(batch, count, batch):
                repeat(start)
            growth = rss(running.pid) - before
            print(f"{count} times one identifier, memory {growth / 1e6:+.1f} MB")
            assert growth <= 8 << 20
            one.send(one.ack(PUBREL, 7))
            assert one.take(PUBCOMP).packet_id == 7
        kill(running)
        with closing(Wire(running, "s")) as one:
            assert messages([one.take(), *one.rest()]) == [b"000000"]


def test_p42_every_identifier_without_a_pubrel(tmp_path: Path) -> None:
    """P-42: 3.1.1 may have all 65,535 open, and is read all the time; a kill forgets none of them. 5.0 has its Receive
    Maximum."""
    every = range(1, 65_536)
    with machine(tmp_path) as running:
        asyncio.run(keep(url(running), "s", "data/#", 2))
        with closing(Wire(running, "p")) as one:
            for start in range(1, 65_536, 5_000):
                some = [n for n in every if start <= n < start + 5_000]
                one.send(*(one.publish(b"%d" % n, 2, n) for n in some), packets.encode_pingreq())
                answers = [one.take() for _ in range(len(some) + 1)]
                assert sorted(a.packet_id for a in answers if isinstance(a, packets.Ack)) == some
        assert ask(running, "clients.show", id="s")["queued"] == len(every)
        kill(running)
        with closing(Wire(running, "p")) as one:
            assert one.present
            again = [1, 2, 1_024, 1_025, 40_000, 65_535]
            one.send(*(one.publish(b"%d" % n, 2, n, dup=True) for n in again))
            assert [one.take(PUBREC).packet_id for _ in again] == again
            one.send(one.ack(PUBREL, 5))
            one.until(PUBCOMP, 5)
            one.send(one.publish(b"new", 2, 5))
            one.until(PUBREC, 5)
        assert ask(running, "clients.show", id="s")["queued"] == len(every) + 1
        with closing(Wire(running, "five", 5)) as one:
            one.send(*(one.publish(b"%d" % n, 2, n) for n in range(1, 1_025)))
            for n in range(1, 1_025):
                assert one.take(PUBREC).packet_id == n
            one.send(one.publish(b"", 2, 1_025))
            assert one.take(DISCONNECT).code == 0x93
            with pytest.raises(ConnectionError):
                one.take()


@pytest.mark.parametrize("between", [lambda running: None, kill], ids=["take-over", "kill"])
def test_p57_a_publisher_that_is_taken_over_before_pubrel_completes_once(
    tmp_path: Path, between: Callable[[Machine], None]
) -> None:
    """P-57: QoS and retain stay as they were."""
    with machine(tmp_path) as running:
        with closing(Wire(running, "s", 5)) as one:
            one.send(packets.encode_subscribe(1, 5, [(b"data/#", 2 | 8)]))  # retain as published
            assert one.take().codes == [2]
        with closing(Wire(running, "p")) as older:
            older.send(older.publish(b"it", 2, 7, retain=True))
            assert older.take(PUBREC).packet_id == 7
            between(running)
            with closing(Wire(running, "p")) as newer:
                assert newer.present
                with pytest.raises(ConnectionError):
                    older.take()
                newer.send(newer.publish(b"it", 2, 7, retain=True, dup=True))
                assert newer.take(PUBREC).packet_id == 7
                newer.send(newer.ack(PUBREL, 7))
                assert newer.take(PUBCOMP).packet_id == 7
        with closing(Wire(running, "s", 5)) as one:
            found = [packet for packet in (one.take(), *one.rest()) if isinstance(packet, Publish)]
        assert [(p.payload, p.qos, p.retain, p.dup) for p in found] == [(b"it", 2, True, False)]


@pytest.mark.parametrize("between", [lambda running: None, kill], ids=["take-over", "kill"])
def test_p57_a_subscriber_that_is_taken_over_between_the_steps_gets_each_message_once(
    tmp_path: Path, between: Callable[[Machine], None]
) -> None:
    """P-57: one message was sent, of one PUBREC was sent, of one PUBREL came; QoS and retain stay as they were."""
    with machine(tmp_path) as running:
        with closing(Wire(running, "s", 5)) as one:
            one.send(packets.encode_subscribe(1, 5, [(b"data/#", 2 | 8)]))
            assert one.take().codes == [2]
        with closing(Wire(running, "p")) as one:
            for n in (1, 2, 3):
                one.send(one.publish(b"%d" % n, 2, n, retain=True), one.ack(PUBREL, n))
                one.until(PUBCOMP, n)
        with closing(Wire(running, "s", 5)) as older:
            first, second, third = (older.take(PUBLISH) for _ in range(3))
            assert [m.payload for m in (first, second, third)] == [b"1", b"2", b"3"]
            older.send(older.ack(PUBREC, second.packet_id), older.ack(PUBREC, third.packet_id))
            older.until(PUBREL, third.packet_id)
            older.send(older.ack(PUBCOMP, third.packet_id), packets.encode_pingreq())
            older.take(PINGRESP)
            asyncio.run(stored(url(running)))
            between(running)
            with closing(Wire(running, "s", 5)) as newer:
                assert newer.present
                found = [newer.take(), newer.take(), *newer.rest()]
                again = [p for p in found if isinstance(p, Publish)]
                assert [(p.payload, p.packet_id, p.qos, p.retain, p.dup) for p in again] == [
                    (b"1", first.packet_id, 2, True, True)
                ]
                assert [p.packet_id for p in found if isinstance(p, packets.Ack)] == [second.packet_id]
                newer.send(newer.ack(PUBREC, first.packet_id), newer.ack(PUBCOMP, second.packet_id))
                newer.until(PUBREL, first.packet_id)
                newer.send(newer.ack(PUBCOMP, first.packet_id), packets.encode_pingreq())
                newer.take(PINGRESP)
        asyncio.run(stored(url(running)))
        between(running)
        with closing(Wire(running, "s", 5)) as one:
            assert not one.rest()
        assert running.stop() == 0
        intact(running)


# --- shared subscriptions --------------------------------------------------------------------------------------------


async def test_p79_what_a_killed_member_had_in_flight_reaches_the_others(tmp_path: Path) -> None:
    """P-79: three members with persistent sessions, fifty in flight to the one that is killed; a broker that is killed
    afterwards has lost none of them."""
    with machine(tmp_path) as running:

        class Deaf(Taker):
            """Acknowledges nothing."""

            def on_publish(self, conn: Connection, publish: Publish) -> None:
                self.got.append(publish)

        deaf, others = Deaf(), [Deaf(), Deaf()]
        conns = []
        for number, member in enumerate((deaf, *others)):
            conn = await Connection.connect(
                url(running), client_id=f"m{number}", handler=member, clean_start=False, session_expiry=7_200,
                receive_maximum=100,
            )  # fmt: skip
            assert await conn.subscribe([("$share/g/data/#", 1)]) == [1]
            conns.append(conn)
        await fill(url(running), 150)
        await eventually(lambda: sum(len(m.got) for m in (deaf, *others)) == 150, "150 messages in flight")
        assert len(deaf.got) == 50
        conns[0].abort()
        await eventually(lambda: sum(len(m.got) for m in others) == 150, "the fifty at the others", 5)
        there = {publish.payload for member in others for publish in member.got}
        assert there == {b"%d" % n for n in range(150)}
        assert {publish.qos for member in others for publish in member.got} == {1}
        assert (await command(running, "clients.show", id="m0"))["queued"] == 0
        await conns[1].ping()
        running.stop(signal.SIGKILL)
        for conn in conns:
            conn.abort()
        running.start()
        taker = Taker()
        conns = [
            await Connection.connect(
                url(running), client_id=f"m{number}", handler=taker, clean_start=False, session_expiry=7_200
            )
            for number in range(3)
        ]
        await eventually(lambda: {p.payload for p in taker.got} >= there, "what had moved before the kill")
        assert {p.payload for p in taker.got} == there
        for conn in conns:
            conn.abort()
