"""TCP and Unix connections: what reaches the channel, and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from broker.engine.engine import Engine as BrokerEngine
from broker.engine.gate import OpenGate
from broker.net.admission import SPARE
from broker.net.connection import foreign_speech, peer_of
from broker.net.listeners import Listeners
from broker.net.server import PER_TICK
from tests.unit.net.fakes import CONNECT, Channel, Engine, config, until

READ = 256 * 1024
"""Bytes a loop may take from a socket at once."""


async def test_every_read_reaches_the_channel_in_order(listeners: Any, engine: Engine, connect: Any) -> None:
    client = await connect(await listeners.open("tcp", config("tcp")))
    channel = await engine.channel()
    sent = b""
    for part in (CONNECT, b"\xc0\x00", bytes(range(256)) * 40):
        await client.send(part)
        sent += part
        await channel.until(lambda: channel.received == sent)  # noqa: B023
    assert channel.listener.name == "tcp"
    assert channel.listener.kind == "tcp"


async def test_the_transport_calls_the_channel_itself_from_the_first_read_on(
    listeners: Any, engine: Engine, connect: Any
) -> None:
    client = await connect(await listeners.open("tcp", config("tcp")))
    channel = await engine.channel()
    await until(lambda: channel.link.get_protocol() is channel)
    assert channel.reads == []
    await client.send(CONNECT)
    await channel.until(lambda: channel.received == CONNECT)


async def test_r04_a_crowd_is_accepted_many_a_turn_of_the_loop_and_each_peer_is_named_exactly(
    listeners: Any, engine: Engine
) -> None:
    listener = await listeners.open("tcp", config("tcp"))
    await asyncio.sleep(0.01)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(("127.0.0.1", listener.port))) for _ in range(64)]
        turns = 0
        while len(engine.channels) < len(peers):
            await asyncio.sleep(0)
            turns += 1
            assert turns <= 64 // PER_TICK + 6
        assert {channel.peer for channel in engine.channels} == {"{}:{}".format(*peer.getsockname()) for peer in peers}
        assert (listener.connections, listener.accepted) == (64, 64)
    await until(lambda: listener.connections == 0)


async def test_r02_a_crowd_at_once_meets_the_same_limit(listeners: Any, engine: Engine) -> None:
    """On plain asyncio a whole batch is accepted and counted before its first channel opens."""
    listener = await listeners.open("tcp", config("tcp", max_connections=3))
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(("127.0.0.1", listener.port))) for _ in range(40)]
        for peer in peers:
            peer.setblocking(False)
        await until(lambda: sum(map(_is_closed, peers)) == 40 - 3 - SPARE)
        await until(lambda: len(engine.channels) == 3)
        assert listener.connections == 3 + SPARE
    await until(lambda: listener.connections == 0)


def _is_closed(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


async def test_the_engine_is_given_the_transport_itself(listeners: Any, engine: Engine, connect: Any) -> None:
    client = await connect(await listeners.open("tcp", config("tcp")))
    channel = await engine.channel()
    assert isinstance(channel.link, asyncio.Transport) or type(channel.link).__module__.startswith("uvloop")
    channel.link.write(b"\x20\x02\x00\x00")
    assert await client.reader.readexactly(4) == b"\x20\x02\x00\x00"


async def test_the_peer_is_named_by_address_and_port(listeners: Any, engine: Engine, connect: Any) -> None:
    client = await connect(await listeners.open("tcp", config("tcp")))
    channel = await engine.channel()
    assert channel.peer == "127.0.0.1:{}".format(client.writer.get_extra_info("sockname")[1])


def test_an_ipv6_peer_has_no_brackets_so_that_its_address_precedes_the_last_colon() -> None:
    assert peer_of(("::1", 1234, 0, 0)) == "::1:1234"
    assert peer_of(None) == "unknown:0"


async def test_the_deadline_counts_from_the_accept(listeners: Any, engine: Engine, connect: Any) -> None:
    before = asyncio.get_running_loop().time()
    await connect(await listeners.open("tcp", config("tcp")))
    channel = await engine.channel()
    assert before - 0.002 <= channel.accepted_at <= asyncio.get_running_loop().time()


async def test_small_packets_are_not_delayed_by_the_kernel(listeners: Any, engine: Engine, connect: Any) -> None:
    await connect(await listeners.open("tcp", config("tcp")))
    sock = (await engine.channel()).link.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_a_client_that_hangs_up_is_reported_to_the_channel_and_no_longer_counted(
    listeners: Any, engine: Engine, connect: Any
) -> None:
    listener = await listeners.open("tcp", config("tcp"))
    client = await connect(listener)
    channel = await engine.channel()
    assert (listener.connections, listeners.connections) == (1, 1)
    client.writer.close()
    async with asyncio.timeout(5):
        await channel.gone
    assert (listener.connections, listeners.connections) == (0, 0)


async def test_a_client_that_ends_its_sending_side_is_closed(listeners: Any, engine: Engine, connect: Any) -> None:
    client = await connect(await listeners.open("tcp", config("tcp")))
    await engine.channel()
    client.writer.write_eof()
    assert await client.closed() == b""


async def test_a_slow_reader_is_announced_and_its_recovery_too(
    listeners: Any, engine: Engine, connect: Any
) -> None:
    client = await connect(await listeners.open("tcp", config("tcp")), limit=1024)
    channel = await engine.channel()
    while "pause_writing" not in channel.calls:
        channel.link.write(bytes(1 << 20))
    client.reader._limit = 1 << 30  # the client reads again
    reading = asyncio.ensure_future(client.reader.read(-1))
    await channel.until(lambda: channel.calls == ["pause_writing", "resume_writing"])
    reading.cancel()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_r19_a_connection_whose_channel_cannot_be_made_is_closed_and_no_other(
    listeners: Any, engine: Engine, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    where = {"path": str(tmp_path / "m.sock")} if kind == "unix" else {}
    listener = await listeners.open("any", config(kind, max_connections=2, **where))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "open_channel", _injected)
        for _ in range(5):
            assert await (await connect(listener)).closed(within=2) == b""
    assert (listener.connections, listener.channels) == (0, 0)
    assert engine.events == {"internal_error": 5}
    client = await connect(listener)
    channel = await engine.channel()
    await client.send(CONNECT)
    await channel.until(lambda: channel.received == CONNECT)


def _injected(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")


async def test_r19_a_socket_that_cannot_be_taken_does_not_stop_the_acceptor(
    listeners: Any, engine: Engine, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await listeners.open("local", config("unix", path=str(tmp_path / "m.sock")))
    with monkeypatch.context() as patch:
        patch.setattr(listener, "_admit", _injected)
        assert await (await connect(listener)).closed(within=2) == b""
    await connect(listener)
    await engine.channel()
    assert listener.connections == 1


class Thinking(OpenGate):
    """Never answers."""

    def __init__(self) -> None:
        self.channels: list[Any] = []

    def authenticate(self, channel: Any, connect: Any) -> None:
        self.channels.append(channel)

    def cancel(self, channel: Any) -> None:
        self.channels.remove(channel)


async def test_p16_ten_megabytes_behind_a_connect_stay_outside_while_the_gate_thinks(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    gate = Thinking()
    engine = BrokerEngine(gate, loop.call_soon, clock=loop.time, wall_ms=0)
    listeners = Listeners(engine, tmp_path)
    listener = await listeners.open("tcp", config("tcp"))
    with socket.socket() as peer:
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", listener.port))
        await loop.sock_sendall(peer, CONNECT)
        await until(lambda: bool(gate.channels))
        (channel,) = gate.channels
        publish = b"\x30\xe8\x07\x00\x01t" + bytes(997)
        flood = asyncio.ensure_future(loop.sock_sendall(peer, publish * 10_000))
        await until(lambda: bool(channel.paused))
        await asyncio.wait([flood], timeout=0.2)
        assert not flood.done(), "it was read on"
        assert channel.have <= 65_536 + READ
        flood.cancel()
        engine.tick(loop.time() + 10.5, 0)
        await until(lambda: not gate.channels)
        engine.tick(loop.time() + 16, 0)
        await until(lambda: listener.connections == 0)
    assert not engine.sessions
    await listeners.close_all()


async def test_r05_a_peer_that_never_reads_is_cut_four_seconds_after_the_close(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    engine = BrokerEngine(OpenGate(), loop.call_soon, clock=loop.time, wall_ms=0)
    listeners = Listeners(engine, tmp_path)
    listener = await listeners.open("tcp", config("tcp"))
    with socket.socket() as peer:
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", listener.port))
        await loop.sock_sendall(peer, CONNECT)
        await until(lambda: bool(engine.sessions))
        channel: Any = next(iter(engine.sessions.values())).channel
        while not channel.congested:
            channel.link.write(bytes(1 << 20))
        channel.disconnect(0x98)
        closed = loop.time()
        engine.tick(closed + 3.5, 0)
        await asyncio.sleep(0.05)
        assert listener.connections == 1
        engine.tick(closed + 4.5, 0)
        await until(lambda: listener.connections == 0)
    assert listeners.connections == 0
    await listeners.close_all()


async def test_r05_a_peer_that_ends_its_side_and_never_reads_is_cut_too(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    engine = BrokerEngine(OpenGate(), loop.call_soon, clock=loop.time, wall_ms=0)
    listeners = Listeners(engine, tmp_path)
    listener = await listeners.open("tcp", config("tcp"))
    with socket.socket() as peer:
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", listener.port))
        await loop.sock_sendall(peer, CONNECT)
        await until(lambda: bool(engine.sessions))
        channel: Any = next(iter(engine.sessions.values())).channel
        while not channel.congested:
            channel.link.write(bytes(1 << 20))
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: not engine.sessions)
        engine.tick(loop.time() + 4.5, 0)
        await until(lambda: listener.connections == 0)
    await listeners.close_all()


async def test_closing_all_cuts_what_has_not_ended_by_then(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    engine = BrokerEngine(OpenGate(), loop.call_soon, clock=loop.time, wall_ms=0)
    listeners = Listeners(engine, tmp_path)
    listener = await listeners.open("tcp", config("tcp"))
    with socket.socket() as silent, socket.socket() as client, socket.socket() as closing:
        for peer in (silent, client, closing):
            peer.setblocking(False)
            await loop.sock_connect(peer, ("127.0.0.1", listener.port))
        await loop.sock_sendall(client, CONNECT)
        await until(lambda: len(engine.sessions) == 1)
        await loop.sock_sendall(closing, CONNECT)
        await until(lambda: len(engine.sessions) == 2)
        channel: Any = list(engine.sessions.values())[1].channel
        while not channel.congested:
            channel.link.write(bytes(1 << 20))
        channel.disconnect(0x98)
        await until(lambda: listeners.connections == 3)
        await listeners.close_all(within=0.05)
        await until(lambda: listeners.connections == 0)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
        (b"POST /mqtt HTTP/1.1\r\n\r\n", "HTTP"),
    ],
)
async def test_p66_p77_what_is_not_mqtt_is_closed_with_one_line(
    tmp_path: Path, connect: Any, data: bytes, word: str
) -> None:
    loop = asyncio.get_running_loop()
    reports: list[tuple[str, str]] = []
    engine = BrokerEngine(
        OpenGate(), loop.call_soon, clock=loop.time, wall_ms=0, report=lambda *line: reports.append(line)
    )
    listeners = Listeners(engine, tmp_path)
    client = await connect(await listeners.open("tcp", config("tcp")))
    await client.send(data)
    assert await client.closed() == b""
    port = client.writer.get_extra_info("sockname")[1]
    ((category, text),) = reports
    assert category == "not_mqtt"
    assert word in text
    assert text.startswith(f"127.0.0.1:{port} ")
    assert text.endswith(", listener 'tcp'; closed")
    assert engine.core.events == {"not_mqtt": 1}
    await listeners.close_all()


async def test_a_payload_may_look_like_another_protocol(tmp_path: Path, connect: Any) -> None:
    loop = asyncio.get_running_loop()
    engine = BrokerEngine(OpenGate(), loop.call_soon, clock=loop.time, wall_ms=0)
    listeners = Listeners(engine, tmp_path)
    client = await connect(await listeners.open("tcp", config("tcp")))
    body = b"\x00\x01tGET / HTTP/1.1\r\n\r\n"
    packet = b"\x30" + bytes([len(body)]) + body
    await client.send(CONNECT)
    assert await client.reader.readexactly(4) == b"\x20\x02\x00\x00"
    await client.send(packet[:5])
    await asyncio.sleep(0.02)
    await client.send(packet[5:] + b"\xc0\x00")  # this read begins with GET
    assert await client.reader.readexactly(2) == b"\xd0\x00"
    assert engine.core.events == {}
    await listeners.close_all()


async def test_what_is_inside_a_websocket_is_not_taken_for_another_protocol(listeners: Any) -> None:
    tcp, ws = await listeners.open("tcp", config("tcp")), await listeners.open("ws", config("ws"))
    assert tcp.info.speech(b"GET / HTTP/1.1") == "sent an HTTP request to an MQTT port"
    assert ws.info.speech(b"GET / HTTP/1.1") is None


def test_a_connect_packet_is_no_foreign_speech() -> None:
    assert foreign_speech(CONNECT, secure=False) is None
    assert foreign_speech(b"\x16\x03\x01", secure=True) is None


async def test_a_unix_peer_is_named_by_its_user_id(
    listeners: Any, engine: Engine, connect: Any, tmp_path: Path
) -> None:
    client = await connect(await listeners.open("local", config("unix", path=str(tmp_path / "m.sock"))))
    channel = await engine.channel()
    assert channel.peer == f"unix:{os.getuid()}"
    await client.send(CONNECT)
    await channel.until(lambda: channel.received == CONNECT)


async def test_a_socket_accepted_elsewhere_is_adopted_with_the_bytes_already_read(
    listeners: Any, engine: Engine
) -> None:
    listener = await listeners.open("tcp", config("tcp"))
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    server.close()
    await listeners.adopt(accepted, CONNECT[:5], name="tcp")
    channel: Channel = await engine.channel()
    assert channel.received == CONNECT[:5]
    client.sendall(CONNECT[5:])
    await channel.until(lambda: channel.received == CONNECT)
    assert channel.peer == f"127.0.0.1:{client.getsockname()[1]}"
    assert listener.connections == 1
    client.close()
    async with asyncio.timeout(5):
        await channel.gone
    assert listener.connections == 0
