"""Clients that take too much, never speak, never read or talk nonsense cost the others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection, Handler
from broker.mqtt import packets
from broker.mqtt.properties import Properties
from tests.broker import Broker, broker
from tests.ledger import Ledger
from tests.servers import PATIENCE
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.resilience import OPEN, SOAK, Stream, ask, command, cpu, eventually, rss, until

pytestmark = [pytest.mark.timeout(300 if SOAK else 120), *([pytest.mark.slow] if SOAK else [])]

DEADLINE = 10 if SOAK else 3
"""Seconds a connection has for its CONNECT; the default is ten."""
HASTY = OPEN + f'[limits]\nconnect_timeout = "{DEADLINE}s"\n'
CONNACK_OK = b"\x20\x03\x00\x00\x00"


def connect_packet(client_id: str, version: int = 5, receive_maximum: int | None = None) -> bytes:
    properties = None
    if receive_maximum is not None:
        properties = Properties()
        properties.receive_maximum = receive_maximum
    return packets.encode_connect(
        packets.Connect(version=version, clean_start=True, keep_alive=0, client_id=client_id, properties=properties)
    )


@contextlib.contextmanager
def crowd() -> Iterator[list[socket.socket]]:
    """Sockets that are all closed at the end."""
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for one in sockets:
            one.close()


def dial(port: int, buffer: int | None = None) -> socket.socket:
    one = socket.socket()
    if buffer is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    one.settimeout(10)
    one.connect(("127.0.0.1", port))
    return one


def answered(one: socket.socket, seconds: float) -> bytes | None:
    """The first bytes that came, b"" when the broker has closed it, None when nothing has come by then."""
    poll = select.poll()  # select takes no descriptor above 1 023
    poll.register(one, select.POLLIN)
    if not poll.poll(seconds * 1000):
        return None
    try:
        return one.recv(4096)
    except ConnectionResetError:
        return b""


def closed_at(sockets: list[socket.socket], seconds: float) -> dict[int, float]:
    """When each was closed, by its place in the list; those still open after so many seconds are left out."""
    began = time.monotonic()
    poll = select.poll()
    places = {one.fileno(): place for place, one in enumerate(sockets)}
    by_number = {one.fileno(): one for one in sockets}
    for number in by_number:
        poll.register(number, select.POLLIN | select.POLLHUP | select.POLLERR)
    times: dict[int, float] = {}
    while by_number and (left := began + seconds - time.monotonic()) > 0:
        for number, _ in poll.poll(left * 1000):
            one = by_number[number]
            try:
                more = one.recv(4096)
            except OSError:
                more = b""
            if not more:
                times[places[number]] = time.monotonic()
                poll.unregister(number)
                del by_number[number]
    return times


# --- too many --------------------------------------------------------------------------------------------------------


def test_r01_without_free_descriptors_accepting_pauses_and_goes_on_by_itself(tmp_path: Path) -> None:
    running = Broker(tmp_path, wrapper=["prlimit", "--nofile=256:256"])
    running.write("00-broker.toml", OPEN)
    running.write("30-sink.toml", resilience.STORE)
    try:
        running.start()
        resilience.wait_running(running, "sinks", "store")
        with crowd() as sockets:
            for number in range(400):
                one = dial(running.port)
                sockets.append(one)
                one.sendall(connect_packet(f"c{number}"))
            time.sleep(0.5)  # the rest waits in the kernel's queue
            before, began = cpu(running.pid), time.monotonic()
            time.sleep(3)
            share = (cpu(running.pid) - before) / (time.monotonic() - began)
            status = ask(running, "status")
            let_in = status["listeners"]["tcp"]["connections"]
            print(f"descriptors: {let_in} of 400 let in, {share:.1%} of a processor while waiting")
            assert 100 <= let_in < 256
            assert share <= 0.20
            assert resilience.descriptors(running.pid) <= 256 - 16, "a reserve is left"
            assert running.log().count("accepts nobody") == 1
            # those who are in are served, the sink still stores
            sockets[0].sendall(packets.encode_publish(b"telemetry/x", b"y", 1, False, False, 1, 5))
            until(lambda: resilience.row_count(running) == 1, "the row")
            # room again: those who waited are served
            for one in sockets[:300]:
                one.close()
            began = time.monotonic()
            waiting = sockets[300:]
            for one in waiting:
                reply = answered(one, 5 * PATIENCE)
                assert reply, "a client in the queue got no answer"
                assert reply[:1] == b"\x20"
            took = time.monotonic() - began
            print(f"descriptors: the last of those who waited was served after {took:.2f} s")
            assert took <= 4.0 * PATIENCE
    finally:
        running.stop()


def test_r02_a_full_listener_refuses_with_a_reason_counts_it_and_leaves_others_alone(tmp_path: Path) -> None:
    more = '[listeners.small]\nkind = "tcp"\nbind = "127.0.0.1:0"\nmax_connections = 3\n'
    with broker(tmp_path, {"00-broker.toml": OPEN + more}) as running, crowd() as sockets:
        small = int(running.ready["small"].rpartition(":")[2])

        def attempt(port: int, version: int) -> bytes | None:
            one = dial(port)
            sockets.append(one)
            one.sendall(connect_packet(f"c{len(sockets)}", version))
            return answered(one, 10)

        for _ in range(3):
            reply = attempt(small, 5)
            assert reply is not None
            assert reply[3] == 0
        five, three = attempt(small, 5), attempt(small, 4)
        assert five is not None
        assert five[0] == 0x20
        assert five[3] in (0x97, 0x9F)
        assert three == b"\x20\x02\x00\x03"
        assert [answered(one, 5) for one in sockets[3:]] == [b"", b""], "the refused ones are closed"
        assert attempt(running.port, 5)[3] == 0  # type: ignore[index]
        status = ask(running, "status")
        assert status["listeners"]["small"]["connections"] == 3
        assert status["listeners"]["small"]["refused"] == {"max_connections": 2}
        # far too many at once: closed without a word, and counted
        for _ in range(40):
            sockets.append(dial(small))
        until(lambda: ask(running, "status")["listeners"]["small"]["refused"]["max_connections"] > 2, "the count")
        for one in sockets[:3]:
            one.close()
        until(lambda: (attempt(small, 5) or b"")[3:4] == b"\x00", "a place that became free", 10, 0.1)


# --- silent and slow -------------------------------------------------------------------------------------------------


async def test_p07_five_hundred_unfinished_logins_are_closed_in_time_and_cost_little(tmp_path: Path) -> None:
    """CONNECT announces 65 000 bytes, 64 999 come."""
    with broker(tmp_path, {"00-broker.toml": HASTY}) as running, crowd() as sockets:
        before = rss(running.pid)

        def attack() -> list[float]:
            piece = b"\x10\xe8\xfb\x03" + (b"\x00\x04MQTT\x05\x02\x00\x00" + bytes(65_000))[:64_999]
            opened: list[float] = []
            for _ in range(500):
                one = dial(running.port)
                sockets.append(one)
                opened.append(time.monotonic())
                one.sendall(piece)
            return [at - opened[place] for place, at in closed_at(sockets, (DEADLINE + 5) * PATIENCE).items()]

        async with canary_apart(resilience.url(running)) as canary:
            times = await asyncio.to_thread(attack)
        peak = rss(running.pid, "VmHWM") - before
        print(
            f"P-07: closed {min(times):.1f} to {max(times):.1f} s after their accept, memory +{peak / 1e6:.0f} MB, "
            f"canary {canary.slowest * 1000:.0f} ms"
        )
        assert len(times) == 500
        assert min(times) >= DEADLINE - 0.5
        assert max(times) <= DEADLINE + 3 * PATIENCE
        assert peak <= 500 * 65_536 + (8 << 20)
        canary.check()


async def test_p08_dripping_bytes_do_not_move_the_deadline_and_others_still_connect(tmp_path: Path) -> None:
    with broker(tmp_path, {"00-broker.toml": HASTY}) as running, crowd() as sockets:
        packet = connect_packet("a-client-id-long-enough-to-drip")
        assert len(packet) > 2 * DEADLINE + 8

        def attack() -> list[float]:
            opened: list[float] = []
            for _ in range(500):
                sockets.append(dial(running.port))
                opened.append(time.monotonic())
            times: dict[int, float] = {}
            for step in range(2 * DEADLINE + 8):  # a byte every half second, beyond the deadline
                for number, one in enumerate(sockets):
                    if number in times:
                        continue
                    try:
                        one.setblocking(False)
                        with contextlib.suppress(BlockingIOError):
                            if one.recv(1) == b"":
                                raise ConnectionResetError
                        one.send(packet[step : step + 1])
                    except OSError:
                        times[number] = time.monotonic() - opened[number]
                if len(times) == len(sockets):
                    break
                time.sleep(0.5)
            return list(times.values())

        async def newcomers() -> int:
            for number in range(20):
                conn = await Connection.connect(resilience.url(running), client_id=f"new{number}", handler=Handler())
                conn.abort()
                await asyncio.sleep(0.2)
            return 20

        async with canary_apart(resilience.url(running)) as canary:
            times, count = await asyncio.gather(asyncio.to_thread(attack), newcomers())
        print(
            f"P-08: {len(times)} closed {min(times):.1f} to {max(times):.1f} s after accept, "
            f"canary {canary.slowest * 1000:.0f} ms"
        )
        assert len(times) == 500
        assert count == 20
        assert min(times) >= DEADLINE - 0.5
        assert max(times) <= (DEADLINE + 3.5) * PATIENCE
        canary.check()


@pytest.mark.parametrize(("qos", "size", "rate"), [(0, 4_096, 1_000), (1, 4_096, 1_000), (0, 48, 20_000)])
async def test_r04_a_subscriber_that_reads_a_kilobyte_a_second_is_bounded_counted_and_cut(
    qos: int, size: int, rate: int, tmp_path: Path
) -> None:
    """The last with hundreds of small writes a flush."""
    stall = 60 if SOAK else 4
    limits = f'[limits]\nstall_timeout = "{stall}s"\nmax_packet_size = "64KB"\n'
    with broker(tmp_path, {"00-broker.toml": OPEN + limits}) as running, crowd() as sockets:
        slow = dial(running.port, 4096)
        sockets.append(slow)
        slow.sendall(connect_packet("slow", receive_maximum=65_535))
        assert (answered(slow, 5) or b"")[3:4] == b"\x00"
        slow.sendall(packets.encode_subscribe(1, 5, [(b"data/#", qos)]))
        assert answered(slow, 5)
        ledger = Ledger()
        stream = await Stream([ledger], "fast", "data/x", rate, qos=qos, size=size).open(resilience.url(running))
        before = rss(running.pid)
        began = time.monotonic()
        cut: list[float] = []

        async def sip() -> None:
            slow.settimeout(0)
            while time.monotonic() - began < (stall + 30) * PATIENCE:
                try:
                    if slow.recv(100) == b"":
                        break
                except BlockingIOError:
                    pass
                except OSError:
                    break
                status = await command(running, "status")
                if status["events"].get("stalled"):
                    break
                await asyncio.sleep(0.1)
            cut.append(time.monotonic() - began)

        async with canary_apart(resilience.url(running)) as canary:
            load = asyncio.create_task(stream.run(120))
            await sip()
            peak = rss(running.pid, "VmHWM") - before
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        status = await command(running, "status")
        dropped = status["messages"]["dropped"]
        print(
            f"R-04 QoS {qos}, {size} bytes: cut after {cut[0]:.1f} s, memory +{peak / 1e6:.1f} MB, dropped {dropped}, "
            f"{stream.sent} sent, canary {canary.slowest * 1000:.0f} ms"
        )
        assert status["events"]["stalled"] == 1
        assert cut[0] >= stall - 0.5
        assert peak <= 24 << 20
        assert sum(dropped.values()) > 100
        assert "slow_receiver" in dropped if qos == 0 else any("queue" in reason for reason in dropped)
        assert stream.lost == []
        canary.check()
        await eventually(
            lambda: slow.fileno() == -1 or _gone(running, "slow"), "the slow client's connection ended", 8, 0.1
        )
        stream.conn.abort()


def _gone(running: Broker, client_id: str) -> bool:
    return not any(c["clientid"] == client_id and c["connected"] for c in ask(running, "clients.list"))


def test_r05_a_client_that_never_reads_is_gone_five_seconds_after_the_broker_closes_it(tmp_path: Path) -> None:
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running, crowd() as sockets:
        deaf = dial(running.port, 4096)
        sockets.append(deaf)
        deaf.sendall(connect_packet("deaf"))
        assert (answered(deaf, 5) or b"")[3:4] == b"\x00"
        deaf.sendall(packets.encode_subscribe(1, 5, [(b"data/#", 0)]))
        assert answered(deaf, 5)
        loud = dial(running.port)
        sockets.append(loud)
        loud.sendall(connect_packet("loud"))
        assert answered(loud, 5)
        for _ in range(200):  # 13 MB: far beyond what the kernel takes for it
            loud.sendall(packets.encode_publish(b"data/x", bytes(65_536), 0, False, False, 0, 5))
        loud.sendall(packets.encode_pingreq())
        assert answered(loud, 10) == b"\xd0\x00"
        assert running.isthmus("clients", "kick", "deaf").returncode == 0
        began = time.monotonic()
        # what it holds here is given back; the kernel goes on by itself with what it had taken
        until(lambda: ask(running, "status")["listeners"]["tcp"]["connections"] == 1, "its place is free", 10)
        took = time.monotonic() - began
        print(f"R-05: aborted {took:.1f} s after the kick")
        assert took <= 7.0 * PATIENCE


# --- many receivers, much nonsense -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_r11_one_payload_for_thousands_of_subscribers_is_one_copy(tmp_path: Path) -> None:
    count = 10_000 if SOAK else 3_000
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < count + 200:
        pytest.skip(f"{count} connections need more descriptors than this account may have")
    limits = "[listeners.tcp]\nmax_connections = 20000\n"
    with broker(tmp_path, {"00-broker.toml": OPEN, "01.toml": limits}) as running, crowd() as sockets:
        for number in range(count):
            one = dial(running.port)
            sockets.append(one)
            one.sendall(connect_packet(f"s{number}") + packets.encode_subscribe(1, 5, [(b"all", 1)]))
        for one in sockets:
            got = b""
            while got[-6:-4] != b"\x90\x04":
                more = answered(one, 20)
                assert more, "no SUBACK"
                got += more
        before = rss(running.pid)
        sender = dial(running.port)
        sockets.append(sender)
        sender.sendall(connect_packet("sender") + packets.encode_publish(b"all", bytes(1_024), 1, False, False, 1, 5))
        began = time.monotonic()
        for one in sockets[:count]:
            got = b""
            while len(got) < 1_024:
                more = answered(one, 20)
                assert more, "a subscriber got nothing"
                got += more
        growth = rss(running.pid, "VmHWM") - before
        print(f"R-11: {count} subscribers served in {time.monotonic() - began:.2f} s, memory +{growth / 1e6:.1f} MB")
        assert growth <= 64 << 20


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4",
        b"\x30\x05\x00\x01xyz",
        b"\x10\x0c\x00\x04MQTT\x05\x03\x00\x00\x00\x00",
        b"\x10\xff\xff\xff\xff\xff",
    ],
    ids=["http", "tls", "publish-first", "reserved-flag", "endless-length"],
)
async def test_r12_a_flood_of_nonsense_writes_ten_lines_a_second(nonsense: bytes, tmp_path: Path) -> None:
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running:
        seconds, enough = (6.0, 1_000) if SOAK else (1.6, 200)
        where = len(running.log())

        def flood() -> int:
            end, sent = time.monotonic() + seconds, 0
            while time.monotonic() < end or sent <= enough:
                with crowd() as sockets:
                    for _ in range(50):
                        one = dial(running.port)
                        sockets.append(one)
                        one.sendall(nonsense)
                    for one in sockets:
                        assert answered(one, 10) is not None, "not closed"
                        sent += 1
            return sent

        async with canary_apart(resilience.url(running)) as canary:
            began = time.monotonic()
            sent = await asyncio.to_thread(flood)
            took = time.monotonic() - began
        await asyncio.sleep(1.3)  # the last summary
        lines = running.log()[where:].splitlines()
        by_second = Counter(line[:19] for line in lines)
        print(
            f"R-12: {sent / took:.0f} connections a second, {len(lines)} lines, "
            f"at most {max(by_second.values())} in one"
        )
        assert lines, "not a word about it"
        # its own clock seconds need not be those of the log's time stamps
        assert max(by_second.values()) <= 22, by_second
        assert len(lines) <= (took + 2) * 11
        assert any(re.search(r"\d+ more lines like this", line) for line in lines)
        canary.check()


async def test_r03_connections_that_never_speak_do_not_slow_the_canary(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """As many new connections as one client can make, half of them silent."""
    with broker(tmp_path, {"00-broker.toml": HASTY}) as running, crowd() as sockets:

        def storm() -> int:
            end = time.monotonic() + 3
            while time.monotonic() < end and len(sockets) < 6_000:
                one = dial(running.port)
                sockets.append(one)
                if len(sockets) % 2:
                    one.sendall(connect_packet(f"c{len(sockets)}"))
            return len(sockets)

        async with canary_apart(resilience.url(running)) as canary:
            count = await asyncio.to_thread(storm)

            async def silent_gone() -> bool:
                return bool((await command(running, "status"))["listeners"]["tcp"]["connections"] <= count // 2 + 2)

            await eventually(silent_gone, "the end of the silent half", DEADLINE + 7, 0.2)
        print(f"R-03: {count} connections, canary {canary.slowest * 1000:.0f} ms")
        record_property("slowest_round_trip_ms", round(canary.slowest * 1000, 1))
        canary.check()
