"""Opening, changing and closing listeners; limits on connections; who may use the internal one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.net import admission, binding
from broker.net.acceptor import Acceptor
from broker.net.descriptors import Descriptors
from broker.net.errors import ListenError
from broker.net.refusal import protocol_level
from broker.net.shortage import LONGEST_PAUSE
from tests.broker import ROOT
from tests.unit.net.fakes import CONNECT, Authority, Engine, config, until


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_port_0_gets_a_real_port_in_the_address(listeners: Any) -> None:
    listener = await listeners.open("tcp", config("tcp"))
    assert listener.port > 0
    assert listener.address == f"127.0.0.1:{listener.port}"


async def test_ipv6_is_written_in_brackets_and_served(listeners: Any, engine: Engine) -> None:
    listener = await listeners.open("six", config("tcp", bind="[::1]:0"))
    assert listener.address == f"[::1]:{listener.port}"
    with socket.create_connection(("::1", listener.port)) as client:
        channel = await engine.channel()
        assert channel.peer == f"::1:{client.getsockname()[1]}"


async def test_a_name_for_several_addresses_listens_on_one_port_on_each(listeners: Any, engine: Engine) -> None:
    listener = await listeners.open("tcp", config("tcp", bind="*:0"))
    assert {sock.getsockname()[1] for sock in listener.sockets} == {listener.port}
    for i, address in enumerate(("127.0.0.1", "::1")):
        with socket.create_connection((address, listener.port)):
            assert (await engine.channel(i)).peer.startswith(f"{address}:")


async def test_a_taken_port_is_one_sentence_with_the_address_and_the_reason(listeners: Any) -> None:
    first = await listeners.open("tcp", config("tcp"))
    with pytest.raises(ListenError, match=rf"^listeners\.other: bind {first.address}: Address already in use$"):
        await listeners.open("other", config("tcp", bind=first.address))
    assert listeners.names == ["tcp"]


async def test_an_address_of_another_machine_is_one_sentence(listeners: Any) -> None:
    with pytest.raises(ListenError, match=r"listeners\.tcp: bind 192\.0\.2\.1:1883: Cannot assign requested address"):
        await listeners.open("tcp", config("tcp", bind="192.0.2.1:1883"))


async def test_an_unknown_host_is_one_sentence(listeners: Any) -> None:
    with pytest.raises(ListenError, match=r"listeners\.tcp: bind nowhere\.invalid:1883: "):
        await listeners.open("tcp", config("tcp", bind="nowhere.invalid:1883"))


async def test_a_closed_listener_accepts_nobody_and_keeps_its_connections(
    listeners: Any, engine: Engine, connect: Any
) -> None:
    listener = await listeners.open("tcp", config("tcp"))
    port = listener.port
    client = await connect(listener)
    channel = await engine.channel()
    await listeners.close("tcp")
    await until(lambda: not _accepts(port))
    await client.send(CONNECT)
    await channel.until(lambda: channel.received == CONNECT)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# apply ----------------------------------------------------------------------------------------------------------------


async def test_apply_opens_closes_and_leaves_unchanged_sockets_alone(listeners: Any) -> None:
    first = {"a": config("tcp"), "b": config("tcp")}
    await listeners.apply(first)
    a, b = listeners["a"], listeners["b"]
    port, socks = b.port, list(a.sockets)
    await listeners.apply({"a": config("tcp"), "c": config("tcp")})
    assert listeners["a"] is a
    assert list(a.sockets) == socks
    assert sorted(listeners.names) == ["a", "c"]
    await until(lambda: not _accepts(port))
    assert _accepts(a.port)
    assert _accepts(listeners["c"].port)


async def test_apply_leaves_out_what_is_not_enabled(listeners: Any) -> None:
    await listeners.apply({"a": config("tcp"), "b": config("tcp", enabled=False)})
    assert listeners.names == ["a"]


async def test_a_changed_address_accepts_there_and_keeps_connections(
    listeners: Any, engine: Engine, connect: Any
) -> None:
    await listeners.apply({"tcp": config("tcp")})
    listener = listeners["tcp"]
    old = listener.port
    client = await connect(listener)
    channel = await engine.channel()
    new = free_port()
    await listeners.apply({"tcp": config("tcp", bind=f"127.0.0.1:{new}")})
    assert listener.port == new
    assert _accepts(new)
    await until(lambda: not _accepts(old))
    await client.send(CONNECT)
    await channel.until(lambda: channel.received == CONNECT)
    await until(lambda: listener.connections == 1)


async def test_a_changed_limit_keeps_the_socket(listeners: Any) -> None:
    await listeners.apply({"tcp": config("tcp")})
    listener = listeners["tcp"]
    before = [sock.fileno() for sock in listener.sockets]
    await listeners.apply({"tcp": config("tcp", max_connections=7, max_packet_size=1000, auth=["ldap"])})
    assert [sock.fileno() for sock in listener.sockets] == before
    assert (listener.info.max_connections, listener.info.max_packet_size, listener.info.auth) == (7, 1000, ("ldap",))
    assert _accepts(listener.port)


async def test_a_port_may_change_from_plain_to_tls_without_closing(
    listeners: Any, engine: Engine, connect: Any, authority: Authority
) -> None:
    port = free_port()
    await listeners.apply({"main": config("tcp", bind=f"127.0.0.1:{port}")})
    pair = authority.issue()
    files = {"certificate": str(pair.certificate), "key": str(pair.key)}
    await listeners.apply({"main": config("tls", bind=f"127.0.0.1:{port}", **files)})
    await connect(listeners["main"], ssl=authority.client(), server_hostname="localhost")
    assert (await engine.channel()).listener.kind == "tls"


async def test_a_renamed_listener_takes_the_port_over(listeners: Any, engine: Engine, connect: Any) -> None:
    port = free_port()
    await listeners.apply({"old": config("tcp", bind=f"127.0.0.1:{port}")})
    await listeners.apply({"new": config("tcp", bind=f"127.0.0.1:{port}")})
    assert listeners.names == ["new"]
    await connect(listeners["new"])
    assert (await engine.channel()).listener.name == "new"


async def test_a_renamed_unix_listener_keeps_its_file(
    listeners: Any, engine: Engine, connect: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m.sock"
    await listeners.apply({"old": config("unix", path=str(path))})
    await listeners.apply({"new": config("unix", path=str(path))})
    await connect(listeners["new"])
    assert (await engine.channel()).listener.name == "new"
    await listeners.close("new")
    assert not path.exists()


async def test_when_one_listener_cannot_open_nothing_changes(listeners: Any, tmp_path: Path) -> None:
    await listeners.apply({"a": config("tcp"), "b": config("unix", path=str(tmp_path / "b"))})
    a = listeners["a"]
    before, port = a.sockets, free_port()
    with pytest.raises(ListenError, match=r"listeners\.d"):
        await listeners.apply(
            {
                "a": config("tcp", bind=f"127.0.0.1:{port}"),
                "c": config("unix", path=str(tmp_path / "c")),
                "d": config("tcp", bind="192.0.2.1:1"),
            }
        )
    assert sorted(listeners.names) == ["a", "b"]
    assert a.sockets == before
    assert _accepts(a.port)
    assert not _accepts(port)
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "b").exists()


# Unix sockets ---------------------------------------------------------------------------------------------------------


async def test_a_unix_socket_has_its_mode_and_goes_with_the_listener(listeners: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    listener = await listeners.open("local", config("unix", path=str(path), mode="0600"))
    assert listener.address == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await listeners.apply({"local": config("unix", path=str(path), mode="0666")})
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    await listeners.close("local")
    assert os.listdir(tmp_path) == []


async def test_a_file_left_by_a_dead_broker_is_replaced(listeners: Any, connect: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    await connect(await listeners.open("local", config("unix", path=str(path))))


async def test_a_unix_socket_in_use_is_left_alone(listeners: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ListenError, match="Address already in use"):
            await listeners.open("local", config("unix", path=str(path)))
        assert path.exists()


async def test_a_file_that_is_no_socket_is_never_replaced(listeners: Any, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ListenError, match="no socket"):
        await listeners.open("local", config("unix", path=str(path)))
    assert path.read_text() == "data"


async def test_a_missing_folder_is_one_sentence(listeners: Any, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=r"listeners\.local: path .*: No such file or directory"):
        await listeners.open("local", config("unix", path=str(tmp_path / "none" / "m.sock")))


async def test_the_internal_listener_is_privileged_and_private(
    listeners: Any, engine: Engine, connect: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "internal.sock"
    path.parent.mkdir(mode=0o755)
    listener = await listeners.open_internal(path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await connect(listener)
    channel = await engine.channel()
    assert channel.listener.privileged
    assert channel.peer == f"unix:{os.getuid()}"
    await listeners.apply({})
    await connect(listener)
    assert (await engine.channel(1)).listener.privileged
    assert listeners.names == []


async def test_a_listener_from_the_configuration_is_never_privileged(
    listeners: Any, engine: Engine, connect: Any, tmp_path: Path
) -> None:
    await connect(await listeners.open("internal", config("unix", path=str(tmp_path / "m.sock"))))
    assert not (await engine.channel()).listener.privileged


async def test_another_user_cannot_use_the_internal_listener(
    listeners: Any, engine: Engine, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await listeners.open_internal(tmp_path / "run" / "internal.sock")
    monkeypatch.setattr(binding, "peer_uid", lambda sock: os.getuid() + 1)
    client = await connect(listener)
    assert await client.closed() == b""
    assert str(os.getuid() + 1) in await engine.reported("foreign_user")
    assert engine.channels == []
    assert listener.refused == {"foreign_user": 1}


async def test_the_internal_folder_of_another_user_is_refused(
    listeners: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding.os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(ListenError, match="not a folder of our own user"):
        await listeners.open_internal(tmp_path / "run" / "internal.sock")


async def test_a_link_in_place_of_the_internal_folder_is_refused(listeners: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(ListenError, match="not a folder of our own user"):
        await listeners.open_internal(tmp_path / "run" / "internal.sock")


async def test_an_adopted_socket_of_our_own_user_is_the_internal_listeners(
    listeners: Any, engine: Engine, tmp_path: Path
) -> None:
    await listeners.open_internal(tmp_path / "run" / "internal.sock")
    ours, theirs = socket.socketpair()
    await listeners.adopt(ours, CONNECT)
    channel = await engine.channel()
    assert channel.listener.privileged
    assert channel.received == CONNECT
    theirs.close()
    async with asyncio.timeout(5):
        await channel.gone


# limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "ws"])
async def test_r02_connections_far_beyond_the_limit_are_closed_at_once_and_counted(
    listeners: Any, engine: Engine, connect: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(admission, "SPARE", 1)
    listener = await listeners.open("small", config(kind, max_connections=2))
    kept = [await connect(listener) for _ in range(3)]
    await until(lambda: listener.connections == 3)
    for _ in range(3):
        assert await (await connect(listener)).closed() == b""
    await until(lambda: listener.connections == 3)
    assert listener.refused["max_connections"] >= 3
    assert "'small' is full (2 connections)" in await engine.reported("max_connections")
    kept[0].writer.close()
    await until(lambda: listener.connections == 2)
    await connect(listener)
    await until(lambda: listener.connections == 3)


V5 = b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x00"
V31 = b"\x10\x0e\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x00"


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (V5, b"\x20\x03\x00\x97\x00"),
        (CONNECT, b"\x20\x02\x00\x03"),
        (V31, b"\x20\x02\x00\x03"),
        (b"\xc0\x00", b""),
    ],
)
async def test_r02_the_first_clients_too_many_are_told_why(
    listeners: Any, engine: Engine, connect: Any, packet: bytes, answer: bytes
) -> None:
    listener = await listeners.open("small", config("tcp", max_connections=1))
    await connect(listener)
    await engine.channel()
    for cut in (len(packet), 3):
        client = await connect(listener)
        await client.send(packet[:cut])
        await asyncio.sleep(0)
        await client.send(packet[cut:])
        assert await client.closed() == answer
    assert len(engine.channels) == 1
    assert listener.refused == {"max_connections": 2}


def test_the_level_is_read_from_as_few_bytes_as_it_takes() -> None:
    for packet, level in ((V5, 5), (CONNECT, 4), (V31, 3), (b"\x10\xff\xff\x03\x00\x04MQTT\x84", 4)):
        at = packet.index(b"\x00\x3c") - 2 if b"\x00\x3c" in packet else len(packet) - 1
        assert protocol_level(packet[:at]) is None
        assert protocol_level(packet[: at + 1]) == level
    assert protocol_level(b"\x10\x0c\x00\x04XQTT\x04") == 0
    assert protocol_level(b"\x10\x0c\x00\x04MQTT\x09") == 0


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let the process open so many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(2)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", ["tcp", "ws"])
async def test_r01_accepting_pauses_when_descriptors_run_out_and_goes_on_within_two_seconds(
    listeners: Any, engine: Engine, caplog: pytest.LogCaptureFixture, tmp_path: Path, kind: str
) -> None:
    listener = await listeners.open("crowd", config(kind))
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.socket()) for _ in range(60)]
        stack.enter_context(descriptors_left(60))
        for peer in peers:
            peer.connect(("127.0.0.1", listener.port))  # the kernel queues them
        await until(lambda: "accepts nobody" in caplog.text)
        accepted = listener.connections
        assert 20 <= accepted < 60
        files = [stack.enter_context(open(tmp_path / str(i), "w")) for i in range(8)]  # noqa: ASYNC230
        assert len(files) == 8
        burnt, started = time.process_time(), loop.time()
        await asyncio.sleep(0.5)
        assert (time.process_time() - burnt) / (loop.time() - started) < 0.2
        assert listener.connections == accepted
        assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 1
        for file in files:
            file.close()
        for peer in peers[:accepted]:
            peer.close()
        assert LONGEST_PAUSE <= 1
        await until(lambda: listener.accepted == 60, within=10)
        for peer in peers[accepted:]:
            peer.settimeout(0)
            with pytest.raises(BlockingIOError):
                peer.recv(1)  # nobody who waited was closed
    await until(lambda: listener.connections == 0)


async def test_r01_what_a_listener_gives_back_itself_is_no_reason_to_accept_again(
    listeners: Any, caplog: pytest.LogCaptureFixture
) -> None:
    listener = await listeners.open("crowd", config("tcp"))
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.socket()) for _ in range(60)]
        stack.enter_context(descriptors_left(60))
        for peer in peers:
            peer.connect(("127.0.0.1", listener.port))
        await until(lambda: "accepts nobody" in caplog.text)
        await asyncio.sleep(0.02)
        accepted = listener.accepted
        await asyncio.sleep(0.5)  # time for three looks
        assert listener.accepted == accepted
        os.close(os.dup(2))  # the reserve is still there
    await until(lambda: listener.connections == 0)


def test_the_reserve_grows_with_the_limit_within_bounds() -> None:
    descriptors = Descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, reserve in ((64, 16), (256, 32), (4096, 64)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            assert descriptors.watermark == limit - reserve
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="about Linux's table")
@pytest.mark.parametrize("limit", [4096, 300])
def test_the_table_of_descriptors_grows_before_there_are_threads(limit: int) -> None:
    code = "from broker.net.descriptors import make_room; make_room(); print(open('/proc/self/status').read())"
    shell = ["/bin/sh", "-c", 'ulimit -n "$1"; shift; exec "$@"', "sh", str(limit)]
    done = subprocess.run([*shell, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (size,) = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("FDSize:")]
    assert size >= limit


async def test_r03_the_rate_of_accepting_is_limited(engine: Engine) -> None:
    loop = asyncio.get_running_loop()
    server = socket.create_server(("127.0.0.1", 0), backlog=128)
    server.setblocking(False)
    taken: list[float] = []

    def take(sock: socket.socket, address: Any, now: float) -> None:
        sock.close()
        taken.append(loop.time())

    acceptor = Acceptor(loop, server, "slow", take, Descriptors(), rate=50)
    peers = [socket.create_connection(server.getsockname()) for _ in range(25)]
    started = loop.time()
    acceptor.start()
    await until(lambda: len(taken) == 25)
    assert taken[-1] - started >= 0.35  # 24 of them at 50 a second, a tenth of a second's worth at once
    acceptor.stop()
    for sock in (server, *peers):
        sock.close()


async def test_shutdown_waits_for_what_is_being_sent_and_aborts_the_rest(
    listeners: Any, engine: Engine, connect: Any
) -> None:
    listener = await listeners.open("tcp", config("tcp"))
    good, stuck = await connect(listener), await connect(listener)
    first, second = await engine.channel(0), await engine.channel(1)
    await stuck.send(CONNECT)
    await second.until(lambda: bool(second.reads))
    first.link.write(b"\xe0\x00")
    first.link.close()
    await listeners.close_all(within=0.2)
    assert await good.closed() == b"\xe0\x00"
    await stuck.closed()
    async with asyncio.timeout(1):
        await first.gone
        await second.gone
    assert listeners.connections == 0


async def test_status_tells_what_an_operator_asks(listeners: Any, connect: Any, engine: Engine) -> None:
    listener = await listeners.open("tcp", config("tcp"))
    await connect(listener)
    await engine.channel()
    assert listeners.status() == {
        "tcp": {
            "kind": "tcp",
            "address": listener.address,
            "connections": 1,
            "accepted": 1,
            "refused": {},
            "alarm": None,
        }
    }
