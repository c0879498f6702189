"""TLS listeners: what is accepted, who the peer is, deadlines, and renewal of certificates."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from broker.net import binding
from broker.net.allocation import trim_tls
from broker.net.errors import ListenError
from broker.net.tls import UnusableName, acceptable_server_name, hello_server_name, identity
from tests.unit.net.fakes import CONNECT, Authority, Engine, Pair, config, until


def secure(pair: Pair, kind: str = "tls", **values: Any) -> Any:
    return config(kind, certificate=str(pair.certificate), key=str(pair.key), **values)


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue()


async def hello(connect: Any, listener: Any, context: ssl.SSLContext) -> Any:
    return await connect(listener, ssl=context, server_hostname="localhost")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_p69_tls_1_2_and_1_3_reach_the_channel(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair, version: ssl.TLSVersion
) -> None:
    listener = await listeners.open("devices", secure(pair))
    context = authority.client()
    context.minimum_version = context.maximum_version = version
    client = await hello(connect, listener, context)
    channel = await engine.channel()
    await client.send(CONNECT)
    await channel.until(lambda: channel.received == CONNECT)
    channel.link.write(b"\x20\x02\x00\x00")
    assert await client.reader.readexactly(4) == b"\x20\x02\x00\x00"
    assert client.writer.get_extra_info("compression") is None
    assert channel.peer == "127.0.0.1:{}".format(client.writer.get_extra_info("sockname")[1])
    client.writer.close()
    async with asyncio.timeout(5):
        await channel.gone
    assert listener.connections == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_p69_older_versions_are_refused(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair, version: ssl.TLSVersion
) -> None:
    listener = await listeners.open("devices", secure(pair))
    context = authority.client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await hello(connect, listener, context)
    assert "no TLS version we accept" in await engine.reported("tls")
    assert engine.channels == []
    assert listener.connections == 0


@pytest.mark.parametrize("ciphers", ["AES128-SHA", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-NULL-SHA", "aNULL"])
async def test_p69_weak_ciphers_are_refused(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair, ciphers: str
) -> None:
    listener = await listeners.open("devices", secure(pair))
    context = authority.client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers + ":@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await hello(connect, listener, context)
    assert "no cipher we accept" in await engine.reported("tls")


async def test_a_listener_may_insist_on_tls_1_3(listeners: Any, connect: Any, authority: Authority, pair: Pair) -> None:
    listener = await listeners.open("devices", secure(pair, tls_min="1.3"))
    context = authority.client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await hello(connect, listener, context)


def test_p68_renegotiation_and_compression_are_off(authority: Authority, pair: Pair) -> None:
    from broker.net.tls import server_context

    options = server_context("devices", secure(pair)).options
    assert options & ssl.OP_NO_RENEGOTIATION
    assert options & ssl.OP_NO_COMPRESSION


async def test_p66_plain_mqtt_to_the_tls_port_is_closed_with_one_line(
    listeners: Any, engine: Engine, connect: Any, pair: Pair
) -> None:
    listener = await listeners.open("devices", secure(pair))
    for data, word in ((CONNECT, "plain bytes"), (b"GET / HTTP/1.1\r\n\r\n", "HTTP")):
        engine.reports.clear()
        client = await connect(listener)
        await client.send(data)
        assert await client.closed() == b""
        ((category, text),) = engine.reports
        assert category == "tls"
        assert word in text
        assert "'devices'" in text
    assert engine.channels == []
    assert listener.connections == 0


async def test_r19_an_error_about_one_hello_leaves_the_others_their_turn(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await listeners.open("devices", secure(pair))
    begin = listener._begin
    broken: list[Any] = []

    def injected(waiting: Any) -> None:
        if len(broken) < 3:
            broken.append(waiting)
            raise RuntimeError("injected")
        begin(waiting)

    monkeypatch.setattr(listener, "_begin", injected)
    for _ in range(3):
        client = await connect(listener)
        await client.send(client_hello(b"localhost"))
        assert await client.closed() == b""
    assert listener.connections == 0
    assert listener.refused == {"internal_error": 3}
    assert engine.events == {"internal_error": 3}
    await hello(connect, listener, authority.client())
    await engine.channel()


async def test_r19_an_error_about_a_silent_peer_leaves_the_others_their_deadline(
    listeners: Any, engine: Engine, connect: Any, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.core.limits.connect_timeout = 0.2
    listener = await listeners.open("devices", secure(pair))
    report = listener.report
    said: list[str] = []

    def injected(category: str, text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise RuntimeError("injected")
        report(category, text)

    monkeypatch.setattr(listener, "report", injected)
    clients = [await connect(listener) for _ in range(3)]
    for client in clients:
        assert await client.closed() == b""
    late = await connect(listener)
    assert await late.closed() == b""
    assert listener.connections == 0
    assert engine.events == {"internal_error": 1}


async def test_r19_a_hand_shake_that_fails_in_us_is_counted_out(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def injected(transport: Any) -> int:
        raise RuntimeError("injected")

    listener = await listeners.open("devices", secure(pair))
    with monkeypatch.context() as patch:
        patch.setattr(listener, "_factory", lambda peer, since: injected)
        client = await connect(listener)
        await client.send(client_hello(b"localhost"))
        await client.closed()
    await until(lambda: listener.connections == 0)
    assert engine.events == {"internal_error": 1}
    await hello(connect, listener, authority.client())
    await engine.channel()


async def test_p67_silence_and_half_a_hello_end_at_the_connect_deadline(
    listeners: Any, engine: Engine, connect: Any, pair: Pair
) -> None:
    engine.core.limits.connect_timeout = 0.4
    listener = await listeners.open("devices", secure(pair))
    silent = await connect(listener)
    half = await connect(listener)
    await half.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert listener.connections >= 1
    await silent.closed()
    await half.closed()
    await until(lambda: listener.connections == 0)
    assert [category for category, _ in engine.reports] == ["tls", "tls"]


async def test_the_channels_deadline_counts_from_the_accept_not_from_the_handshake(
    listeners: Any, engine: Engine, authority: Authority, pair: Pair
) -> None:
    listener = await listeners.open("devices", secure(pair))
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", listener.port)) as raw:
        await until(lambda: listener.connections == 1)
        accepted = loop.time()
        await asyncio.sleep(0.2)
        raw.setblocking(False)
        _, writer = await asyncio.open_connection(sock=raw, ssl=authority.client(), server_hostname="localhost")
        channel = await engine.channel()
        assert channel.accepted_at <= accepted
        writer.transport.abort()
        await channel.gone


async def test_at_most_so_many_handshakes_start_in_one_tick(
    listeners: Any, engine: Engine, authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await listeners.open("devices", secure(pair))
    loop = asyncio.get_running_loop()
    tick = 0
    begun: dict[int, int] = {}
    begin = listener._begin

    def count(waiting: Any) -> None:
        begun[tick] = begun.get(tick, 0) + 1
        begin(waiting)

    monkeypatch.setattr(listener, "_begin", count)
    peers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(40)]
    for peer in peers:
        peer.sendall(b"\x16\x03\x01\x00\xa0\x01" + bytes(30))
    until = loop.time() + 5
    while sum(begun.values()) < 40 and loop.time() < until:
        tick += 1
        await asyncio.sleep(0)
    assert sum(begun.values()) == 40
    assert max(begun.values()) <= 8
    for peer in peers:
        peer.close()


ECDHE_ECDSA_AES128_GCM = 0xC02B


def client_hello(name: bytes, suite: int = ECDHE_ECDSA_AES128_GCM, compression: bytes = b"\x00") -> bytes:
    """A TLS 1.2 ClientHello that asks for this server name and offers one cipher suite."""
    entry = b"\x00" + len(name).to_bytes(2, "big") + name
    extensions = b"\x00\x00" + (len(entry) + 2).to_bytes(2, "big") + len(entry).to_bytes(2, "big") + entry
    extensions += bytes.fromhex("000a 0004 0002 0017  000b 0002 0100  000d 0004 0002 0403")  # P-256 with SHA-256
    body = (
        b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02" + suite.to_bytes(2, "big")
        + bytes([len(compression)]) + compression + len(extensions).to_bytes(2, "big") + extensions
    )  # fmt: skip
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


@pytest.mark.parametrize(
    "suite",
    [0x0001, 0x0002, 0x0003, 0x0004, 0x0005, 0x0006, 0x0008, 0x0009, 0x000A, 0x0018, 0x001B, 0x002F, 0x0034, 0xC006,
     0xC007, 0xC008, 0xC009, 0xC015, 0xC016],
    ids=["null-md5", "null-sha", "export-rc4", "rc4-md5", "rc4-sha", "export-rc2", "export-des", "des", "3des",
         "anon-rc4", "anon-3des", "rsa-aes", "anon-aes", "ecdhe-null", "ecdhe-rc4", "ecdhe-3des", "ecdhe-cbc",
         "ecdh-anon-null", "ecdh-anon-rc4"],
)  # fmt: skip
async def test_p69_what_openssl_no_longer_offers_is_refused_too(
    listeners: Any, engine: Engine, connect: Any, pair: Pair, suite: int
) -> None:
    client = await connect(await listeners.open("devices", secure(pair)))
    await client.send(client_hello(b"localhost", suite))
    assert b"\x16" not in (await client.closed())[:1], "not a ServerHello, at most an alert"
    assert "no cipher we accept" in await engine.reported("tls")
    assert engine.channels == []


@pytest.mark.parametrize("offered", [b"\x00", b"\x01\x00", b"\x40\x01\x00"])
async def test_p69_nothing_is_compressed_whatever_is_offered(
    listeners: Any, connect: Any, pair: Pair, offered: bytes
) -> None:
    client = await connect(await listeners.open("devices", secure(pair)))
    await client.send(client_hello(b"localhost", compression=offered))
    async with asyncio.timeout(5):
        head = await client.reader.readexactly(5 + 4 + 2 + 32)
        assert (head[0], head[5]) == (0x16, 2), "a ServerHello"
        session = (await client.reader.readexactly(1))[0]
        rest = await client.reader.readexactly(session + 3)
    assert int.from_bytes(rest[session : session + 2], "big") == ECDHE_ECDSA_AES128_GCM
    assert rest[session + 2] == 0


@pytest.mark.parametrize("name", [b"a\nb", b"a\x00b", b"a" * 300, b"caf\xe9", b"a b"])
async def test_p70_an_impossible_server_name_is_refused(
    listeners: Any, engine: Engine, connect: Any, pair: Pair, name: bytes
) -> None:
    listener = await listeners.open("devices", secure(pair))
    client = await connect(listener)
    await client.send(client_hello(name))
    await client.closed()
    assert "impossible server name" in await engine.reported("tls")
    assert listener.refused == {"server_name": 1}
    assert listener.connections == 0


def test_a_server_name_is_found_where_it_stands() -> None:
    assert hello_server_name(client_hello(b"broker.example")) == b"broker.example"
    assert hello_server_name(client_hello(b"broker.example")[:40]) is None
    assert hello_server_name(b"\x16\x03\x01") is None
    assert hello_server_name(CONNECT) is None
    assert acceptable_server_name("broker.example")


async def test_a_required_client_certificate_names_the_user(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair
) -> None:
    device = authority.issue("device-1", organization="plant")
    for source, username in (
        ("off", None),
        ("cn", "device-1"),
        ("dn", "CN=device-1,O=plant"),
        ("san", "localhost"),
    ):
        name = f"devices-{source}"
        listener = await listeners.open(name, secure(pair, client_ca=str(authority.ca), username_from=source))
        client = await hello(connect, listener, authority.client(device))
        await client.send(CONNECT)
        channel = await engine.channel(len(engine.channels))
        assert channel.identity is not None
        assert channel.identity["cert_common_name"] == "device-1"
        assert channel.identity["cert_subject"] == "CN=device-1,O=plant"
        assert channel.identity["cert_san"] == "localhost"
        assert channel.identity.get("username") == username


async def test_without_the_required_certificate_nobody_gets_in(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair
) -> None:
    listener = await listeners.open("devices", secure(pair, client_ca=str(authority.ca)))
    client = await hello(connect, listener, authority.client())  # TLS 1.3: the client hears of it afterwards
    await client.closed()
    assert "no client certificate" in await engine.reported("tls")
    assert engine.channels == []


async def test_a_certificate_of_another_authority_is_refused(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path)
    listener = await listeners.open("devices", secure(pair, client_ca=str(authority.ca)))
    context = authority.client(stranger.issue("device-1"))
    client = await hello(connect, listener, context)
    await client.closed()
    assert "not accepted" in await engine.reported("tls")
    assert engine.channels == []


async def test_an_expired_client_certificate_is_refused(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair
) -> None:
    listener = await listeners.open("devices", secure(pair, client_ca=str(authority.ca)))
    client = await hello(connect, listener, authority.client(authority.issue("device-1", days=(-2, -1))))
    await client.closed()
    assert "expired" in await engine.reported("tls")


async def test_an_optional_certificate_may_be_missing(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair
) -> None:
    table = secure(pair, client_ca=str(authority.ca), verify="optional", username_from="cn")
    listener = await listeners.open("devices", table)
    await hello(connect, listener, authority.client())
    assert (await engine.channel(0)).identity is None
    await hello(connect, listener, authority.client(authority.issue("device-2")))
    assert ((await engine.channel(1)).identity or {})["username"] == "device-2"


def test_a_common_name_with_control_characters_is_no_identity() -> None:
    with pytest.raises(UnusableName):
        identity({"subject": ((("commonName", "admin\nroot"),),)}, "off")


def test_a_subject_is_written_as_rfc_4514_says() -> None:
    subject = ((("countryName", "DE"),), (("organizationName", "A, B"),), (("commonName", "#x "),))
    assert identity({"subject": subject}, "dn")["username"] == r"CN=\#x\ ,O=A\, B,C=DE"


async def test_c18_a_key_that_does_not_fit_keeps_the_old_certificate_and_raises_the_alarm(
    listeners: Any, connect: Any, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = _copy(authority.issue("first"), tmp_path)
    listener = await listeners.open("devices", secure(live))
    shutil.copy(authority.issue("second").certificate, live.certificate)
    with caplog.at_level(logging.ERROR):
        await listeners.apply({"devices": listener.config})
    assert "does not belong to certificate" in caplog.text
    assert "goes on with the certificate it has" in caplog.text
    assert "does not belong" in listeners.status()["devices"]["alarm"]
    assert await _served(connect, listener, authority) == "first"


async def test_c18_an_expired_certificate_keeps_the_old_one(
    listeners: Any, connect: Any, authority: Authority, tmp_path: Path
) -> None:
    live = _copy(authority.issue("first"), tmp_path)
    listener = await listeners.open("devices", secure(live))
    _copy(authority.issue("second", days=(-2, -1)), tmp_path)
    assert listeners.renew_certificates() == []
    assert "expired on" in listener.alarm
    assert await _served(connect, listener, authority) == "first"


async def test_c18_a_good_pair_serves_new_handshakes_and_drops_no_connection(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, tmp_path: Path
) -> None:
    live = _copy(authority.issue("first"), tmp_path)
    listener = await listeners.open("devices", secure(live))
    old = await hello(connect, listener, authority.client())
    channel = await engine.channel()
    _copy(authority.issue("second"), tmp_path)
    assert listeners.renew_certificates() == ["devices"]
    assert listener.alarm is None
    assert await _served(connect, listener, authority) == "second"
    await old.send(CONNECT)
    await channel.until(lambda: channel.received == CONNECT)
    assert listeners.renew_certificates() == []


def _copy(pair: Pair, where: Path) -> Pair:
    live = Pair(where / "live.pem", where / "live.key")
    shutil.copy(pair.certificate, live.certificate)
    shutil.copy(pair.key, live.key)
    return live


async def _served(connect: Any, listener: Any, authority: Authority) -> str:
    client = await hello(connect, listener, authority.client())
    subject = client.writer.get_extra_info("peercert")["subject"]
    client.writer.transport.abort()
    return str(dict(pair for relative in subject for pair in relative)["commonName"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("missing", "No such file"),
        ("not-pem", "no PEM certificate"),
        ("expired", "expired on"),
        ("future", "not valid before"),
        ("mismatch", "does not belong to certificate"),
        ("garbage-key", "with key"),
        ("garbage-ca", "client_ca"),
    ],
)
async def test_a_listener_with_unusable_files_does_not_open_and_says_which(
    listeners: Any, authority: Authority, tmp_path: Path, change: str, text: str
) -> None:
    days = {"expired": (-2, -1), "future": (1, 2)}.get(change, (-1, 1))
    live = _copy(authority.issue(days=days), tmp_path)
    values = {}
    if change == "missing":
        live.certificate.unlink()
    elif change == "not-pem":
        live.certificate.write_text("hello")
    elif change == "mismatch":
        shutil.copy(authority.issue().key, live.key)
    elif change == "garbage-key":
        live.key.write_text("hello")
    elif change == "garbage-ca":
        values["client_ca"] = str(live.key)
    with pytest.raises(ListenError, match=text) as caught:
        await listeners.open("devices", secure(live, **values))
    assert str(caught.value).startswith("listeners.devices: ")
    assert listeners.names == []


async def test_without_uvloop_a_tls_listener_warns_of_its_memory(
    listeners: Any, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    await listeners.open("devices", secure(pair))
    plain = "uvloop" not in type(asyncio.get_running_loop()).__module__
    assert ("install uvloop" in caplog.text) == plain


def test_no_more_receive_buffer_is_granted_than_the_system_gives() -> None:
    most = int(Path("/proc/sys/net/core/rmem_max").read_text())
    assert binding.granted_receive_buffer(65_536) == min(65_536, most)
    assert binding.granted_receive_buffer(most + 4096) == most


async def test_a_receive_buffer_the_system_does_not_give_is_warned_of(
    listeners: Any, pair: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await listeners.open("devices", secure(pair))
    assert "receive_buffer" not in caplog.text
    monkeypatch.setattr(binding, "granted_receive_buffer", lambda wanted: 32_768)
    await listeners.open("others", secure(pair))
    assert "listeners.others: receive_buffer is 65536, the system allows 32768" in caplog.text


async def test_mqtt_over_websocket_over_tls_reaches_the_channel(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair
) -> None:
    from tests.unit.net.test_websocket import BINARY, frame, read_frame, request, status

    table = secure(pair, "wss", client_ca=str(authority.ca), username_from="cn")
    listener = await listeners.open("browsers", table)
    client = await hello(connect, listener, authority.client(authority.issue("device-3")))
    assert (await status(client, request()))[0] == 101
    channel = await engine.channel()
    assert (channel.identity or {})["username"] == "device-3"
    await client.send(frame(CONNECT))
    await channel.until(lambda: channel.received == CONNECT)
    channel.link.write(b"\x20\x02\x00\x00")
    assert await read_frame(client) == (BINARY, b"\x20\x02\x00\x00")
    large = bytes(300_000)
    await client.send(frame(large))
    await channel.until(lambda: len(channel.received) == len(CONNECT) + len(large))
    client.writer.transport.abort()
    async with asyncio.timeout(5):
        await channel.gone
    assert listener.connections == 0


async def test_r05_a_tls_peer_that_never_reads_is_aborted_within_five_seconds(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair
) -> None:
    listener = await listeners.open("devices", secure(pair))
    client = await connect(listener, ssl=authority.client(), server_hostname="localhost", limit=1024)
    channel = await engine.channel()
    while "pause_writing" not in channel.calls:
        channel.link.write(bytes(1 << 20))
    client.writer.transport.pause_reading()
    channel.link.close()
    async with asyncio.timeout(5):
        await channel.gone
    assert listener.connections == 0


async def test_an_idle_tls_connection_keeps_no_pages_of_its_read_buffer(
    listeners: Any, engine: Engine, connect: Any, authority: Authority, pair: Pair
) -> None:
    client = await hello(connect, await listeners.open("devices", secure(pair)), authority.client())
    channel = await engine.channel()
    await client.send(bytes(100_000))
    await channel.until(lambda: len(channel.received) == 100_000)
    on_uvloop = "uvloop" in type(asyncio.get_running_loop()).__module__
    assert trim_tls(channel.link) >= (240_000 if on_uvloop else 0)
    await client.send(CONNECT)
    await channel.until(lambda: channel.received.endswith(CONNECT))
