"""MQTT over WebSocket: the upgrade, the rules for frames, and the engine's link."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from broker.engine.engine import Engine as BrokerEngine
from broker.engine.gate import OpenGate
from broker.net.listeners import Listeners
from tests.unit.net.fakes import CONNECT, Client, Engine, config, until

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3

BINARY, TEXT, CONTINUATION, CLOSE, PING, PONG = 2, 1, 0, 8, 9, 10


def request(path: str = "/mqtt", protocol: str | None = "mqtt", **headers: str) -> bytes:
    lines = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
    }
    if protocol is not None:
        lines["Sec-WebSocket-Protocol"] = protocol
    lines.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"GET {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1")


def frame(
    payload: bytes = b"",
    opcode: int = BINARY,
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x01\x02\x03\x04",
) -> bytes:
    size = len(payload)
    length = (
        bytes([size])
        if size < 126
        else struct.pack("!BH", 126, size)
        if size < 65536
        else struct.pack("!BQ", 127, size)
    )
    head = bytearray([fin << 7 | rsv << 4 | opcode]) + length
    if mask is None:
        return bytes(head) + payload
    head[1] |= 0x80
    return bytes(head) + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


async def read_frame(client: Client) -> tuple[int, bytes]:
    async with asyncio.timeout(5):
        first, size = await client.reader.readexactly(2)
        if size == 126:
            (size,) = struct.unpack("!H", await client.reader.readexactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await client.reader.readexactly(8))
        return first & 15, await client.reader.readexactly(size)


async def status(client: Client, data: bytes) -> tuple[int, dict[str, str]]:
    """Code and headers of the answer to a request."""
    await client.send(data)
    async with asyncio.timeout(5):
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    return int(first.split()[1]), {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}


@pytest.fixture
async def ws(listeners: Any) -> Any:
    return await listeners.open("browsers", config("ws"))


@pytest.fixture
async def client(ws: Any, connect: Any) -> Client:
    opened: Client = await connect(ws)
    code, _ = await status(opened, request())
    assert code == 101
    return opened


async def test_the_upgrade_is_answered_with_the_subprotocol(ws: Any, connect: Any, engine: Engine) -> None:
    client = await connect(ws)
    code, headers = await status(client, request(protocol="other, mqtt"))
    assert code == 101
    assert headers["sec-websocket-accept"] == ACCEPT
    assert headers["sec-websocket-protocol"] == "mqtt"
    assert (await engine.channel()).listener.kind == "ws"


async def test_a_browser_that_also_wants_keep_alive_is_upgraded(ws: Any, connect: Any) -> None:
    code, _ = await status(await connect(ws), request(Connection="keep-alive, Upgrade"))
    assert code == 101


async def test_a_path_may_carry_a_query(ws: Any, connect: Any) -> None:
    assert (await status(await connect(ws), request("/mqtt?x=1")))[0] == 101


async def test_p74_another_path_is_404(ws: Any, connect: Any, engine: Engine) -> None:
    client = await connect(ws)
    code, _ = await status(client, request("/other"))
    assert code == 404
    await client.closed()
    assert engine.channels == []


@pytest.mark.parametrize("protocol", [None, "mqttv3.1", "MQTT", "mqtt, caf\xe9", "", "mqtt" * 10])
async def test_p71_p74_without_a_clean_offer_of_mqtt_it_is_400(
    ws: Any, connect: Any, engine: Engine, protocol: str | None
) -> None:
    client = await connect(ws)
    code, _ = await status(client, request(protocol=protocol))
    assert code == 400
    await client.closed()
    assert engine.channels == []


async def test_p74_ten_thousand_subprotocols_are_400(ws: Any, connect: Any, engine: Engine) -> None:
    client = await connect(ws)
    code, _ = await status(client, request(protocol=", ".join(f"p{i}" for i in range(10_000))))
    assert code == 400
    await client.closed()
    assert engine.channels == []


@pytest.mark.parametrize(
    "data",
    [b"POST /mqtt HTTP/1.1\r\n\r\n", b"GET /mqtt\r\n\r\n", CONNECT + b"\r\n\r\n", request(Sec_WebSocket_Version="9")],
)
async def test_what_is_no_upgrade_is_400(ws: Any, connect: Any, engine: Engine, data: bytes) -> None:
    client = await connect(ws)
    assert (await status(client, data))[0] == 400
    await client.closed()
    assert ws.connections == 0


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        ("https://app.example.com", 101),
        ("HTTPS://APP.example.com", 101),
        ("https://evil.example.com", 403),
        ("null", 403),
        (None, 101),
    ],
)
async def test_p75_only_listed_origins_may_connect(listeners: Any, connect: Any, origin: str | None, code: int) -> None:
    ws = await listeners.open("app", config("ws", origins=["https://app.example.com"]))
    headers = {} if origin is None else {"Origin": origin}
    assert (await status(await connect(ws), request(**headers)))[0] == code


@pytest.mark.parametrize(("origin", "code"), [("https://app.example.com", 101), (None, 403)])
async def test_p75_a_listener_for_browsers_alone(listeners: Any, connect: Any, origin: str | None, code: int) -> None:
    ws = await listeners.open("app", config("ws", origin_required=True))
    headers = {} if origin is None else {"Origin": origin}
    assert (await status(await connect(ws), request(**headers)))[0] == code


async def test_p74_an_upgrade_that_never_comes_is_closed_at_the_deadline(
    listeners: Any, engine: Engine, connect: Any
) -> None:
    engine.core.limits.connect_timeout = 0.2
    ws = await listeners.open("browsers", config("ws"))
    client = await connect(ws)
    await client.send(b"GET /mqtt HTTP/1.1\r\n")
    assert await client.closed() == b""
    assert "in time" in await engine.reported("websocket")
    assert ws.connections == 0


async def test_p73_compression_is_not_agreed_on(ws: Any, connect: Any) -> None:
    _, headers = await status(await connect(ws), request(Sec_WebSocket_Extensions="permessage-deflate"))
    assert "sec-websocket-extensions" not in headers


async def test_p76_a_packet_split_over_fifty_frames_and_fifty_packets_in_one(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    packet = bytes(range(100))
    for i in range(0, 100, 2):
        await client.send(frame(packet[i : i + 2]))
    await channel.until(lambda: channel.received == packet)
    await client.send(frame(b"\xc0\x00" * 50))
    await channel.until(lambda: channel.received == packet + b"\xc0\x00" * 50)


async def test_a_fragmented_message_reaches_the_channel_piece_by_piece(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    await client.send(frame(b"ab", fin=False) + frame(b"cd", CONTINUATION, fin=False))
    await channel.until(lambda: channel.received == b"abcd")
    await client.send(frame(b"x", PING) + frame(b"ef", CONTINUATION) + frame(b"gh"))
    await channel.until(lambda: channel.received == b"abcdefgh")
    assert await read_frame(client) == (PONG, b"x")


async def test_what_the_engine_writes_is_one_binary_frame(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    for size in (4, 200, 70_000):
        channel.link.write(b"x" * size)
        assert await read_frame(client) == (BINARY, b"x" * size)


async def test_the_engine_closes_with_a_close_frame(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    channel.link.write(b"\xe0\x00")
    channel.link.close()
    assert await read_frame(client) == (BINARY, b"\xe0\x00")
    assert await read_frame(client) == (CLOSE, struct.pack("!H", 1000))
    assert await client.closed() == b""
    async with asyncio.timeout(5):
        await channel.gone


async def test_a_close_of_the_client_is_answered_and_the_channel_told(client: Client, engine: Engine, ws: Any) -> None:
    channel = await engine.channel()
    await client.send(frame(struct.pack("!H", 1001), CLOSE))
    assert await read_frame(client) == (CLOSE, struct.pack("!H", 1001))
    async with asyncio.timeout(5):
        await channel.gone
    assert ws.connections == 0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"text", TEXT), 1003),
        (frame(b"x", mask=None), 1002),
        (frame(b"x", 3), 1002),
        (frame(b"x", 11), 1002),
        (frame(b"x", CONTINUATION), 1002),
        (frame(b"x", fin=False) + frame(b"y"), 1002),
        (frame(b"x", rsv=4), 1002),
        (frame(b"x", rsv=2), 1002),
        (frame(b"x", rsv=1), 1002),
        (frame(b"x", PING, rsv=4), 1002),
        (frame(b"x" * 126, PING), 1002),
        (frame(b"x", PING, fin=False), 1002),
        (frame(struct.pack("!H", 999), CLOSE), 1002),
        (b"\x82\xff" + struct.pack("!Q", 2**63 - 1) + b"\0\0\0\0", 1009),
        (b"\x82\xff" + struct.pack("!Q", 2**63) + b"\0\0\0\0", 1002),
    ],
    ids=["text", "unmasked", "opcode-3", "opcode-11", "stray-continuation", "interleaved", "rsv1", "rsv2", "rsv3",
         "rsv-ping", "long-ping", "fragmented-ping", "close-code", "p72-huge", "p72-negative"],
)  # fmt: skip
async def test_p71_p72_a_broken_frame_closes_with_the_right_code(
    client: Client, engine: Engine, ws: Any, data: bytes, code: int
) -> None:
    channel = await engine.channel()
    await client.send(data)
    while (answer := await read_frame(client))[0] != CLOSE:
        pass
    assert struct.unpack("!H", answer[1][:2]) == (code,)
    await client.closed()
    async with asyncio.timeout(5):
        await channel.gone
    assert ws.connections == 0


async def test_nothing_after_a_broken_frame_reaches_the_channel(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    await client.send(frame(b"good") + frame(b"bad", TEXT) + frame(b"late"))
    await client.closed()
    async with asyncio.timeout(5):
        await channel.gone
    assert channel.received == b"good"


async def test_p72_before_login_no_more_than_64_kib_are_taken(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    await client.send(b"\x82\xff" + struct.pack("!Q", 1 << 20) + b"\0\0\0\0")  # allowed after login
    sending = asyncio.ensure_future(client.send(bytes(32 << 20)))  # more than all kernel buffers
    await asyncio.wait([sending], timeout=0.3)
    assert not sending.done()
    assert channel.reads == []
    sending.cancel()


async def test_p72_endless_continuations_before_login_are_no_way_around_it(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    begun = b"\x10\xe8\xfb\x03\x00\x04MQTT\x05"  # a CONNECT of 65 000 bytes
    endless = frame(begun, fin=False) + frame(bytes(100), CONTINUATION, fin=False) * 300_000
    sending = asyncio.ensure_future(client.send(endless))
    await channel.until(lambda: len(channel.received) > 50_000)
    await asyncio.wait([sending], timeout=0.3)
    assert not sending.done()
    assert len(channel.received) <= 64 * 1024 + 256
    sending.cancel()
    channel.link.abort()
    async with asyncio.timeout(5):
        await channel.gone


async def test_p72_frames_without_contents_count_too(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    endless = frame(b"", fin=False) + frame(b"", CONTINUATION, fin=False) * 5_000_000
    sending = asyncio.ensure_future(client.send(endless))
    await asyncio.wait([sending], timeout=0.5)
    assert not sending.done()
    assert channel.reads == []
    sending.cancel()


async def test_r19_an_upgrade_whose_channel_cannot_be_made_ends_alone(
    ws: Any, connect: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def injected(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "open_channel", injected)
        client = await connect(ws)
        await client.send(request())
        await client.closed()
    assert (ws.connections, ws.channels) == (0, 0)
    assert engine.events == {"internal_error": 1}
    assert (await status(await connect(ws), request()))[0] == 101
    await engine.channel()


async def test_r19_a_close_frame_that_fills_the_buffer_stops_no_clock(tmp_path: Path) -> None:
    """The transport says that it is full when the channel is closed already."""
    loop = asyncio.get_running_loop()
    broker = BrokerEngine(OpenGate(), loop.call_soon, clock=loop.time, wall_ms=0)
    listeners = Listeners(broker, tmp_path)
    listener = await listeners.open("browsers", config("ws"))
    with socket.socket() as peer:
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", listener.port))
        await loop.sock_sendall(peer, request() + frame(CONNECT))
        await until(lambda: bool(broker.sessions))
        channel: Any = next(iter(broker.sessions.values())).channel
        link = channel.link
        _, full = link.transport.get_write_buffer_limits()
        while link.get_write_buffer_size() == 0:
            link.write(bytes(full // 2))
            await asyncio.sleep(0)
        while (left := full - link.get_write_buffer_size()) > 2:
            link.write(bytes(min(left - 4, 100) if left > 6 else 0))
        assert not channel.congested
        channel.disconnect(0x98)
        assert not broker.sessions
        broker.tick(loop.time() + 1, 0)
        broker.tick(loop.time() + 10, 0)
        await until(lambda: listener.connections == 0)
    await listeners.close_all()


async def test_p06_the_largest_connect_there_may_be_fits(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    connect = b"\x10\x80\x80\x04" + bytes(65_536)
    await client.send(frame(connect[:1]) + frame(connect[1:]))
    await channel.until(lambda: len(channel.received) == len(connect))


async def test_a_large_frame_waits_for_the_login_and_then_arrives(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    await client.send(frame(CONNECT))
    await channel.until(lambda: channel.received == CONNECT)
    large = frame(bytes(500_000))
    sending = asyncio.ensure_future(client.send(large))
    await asyncio.sleep(0)
    channel.link.write(b"\x20\x02\x00\x00")
    await channel.until(lambda: len(channel.received) == len(CONNECT) + 500_000)
    await sending


async def test_a_peer_that_only_pings_does_not_fill_our_memory(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    await client.send(frame(CONNECT))
    channel.link.write(b"\x20\x02\x00\x00")
    client.reader._limit = 1  # type: ignore[attr-defined]  # read nothing more
    burst = frame(bytes(125), PING) * 4096
    for _ in range(40):
        with_room = asyncio.ensure_future(client.send(burst))
        await asyncio.wait([with_room], timeout=1)
        assert channel.link.get_write_buffer_size() <= 64 * 1024 + 256
        with_room.cancel()


async def test_headers_a_rule_may_want_are_in_the_identity_and_nothing_else_is_kept(
    ws: Any, connect: Any, engine: Engine
) -> None:
    await status(await connect(ws), request(Cookie="session=1", Origin="https://a.example"))
    channel = await engine.channel()
    assert channel.identity == {"ws_cookie": "session=1", "ws_origin": "https://a.example"}
    assert not channel.link.socket.request.headers
    assert not channel.link.socket.response.headers


async def test_reading_pauses_and_resumes(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    await client.send(frame(CONNECT))
    await channel.until(lambda: channel.received == CONNECT)
    channel.link.write(b"\x20\x02\x00\x00")
    channel.link.pause_reading()
    await client.send(frame(b"later"))
    assert await read_frame(client) == (BINARY, b"\x20\x02\x00\x00")
    assert channel.received == CONNECT
    channel.link.resume_reading()
    await channel.until(lambda: channel.received == CONNECT + b"later")


async def test_a_slow_reader_is_announced(client: Client, engine: Engine) -> None:
    channel = await engine.channel()
    while "pause_writing" not in channel.calls:
        channel.link.write(bytes(1 << 20))
    assert channel.link.get_write_buffer_size() > 0
    channel.link.abort()
    async with asyncio.timeout(5):
        await channel.gone
