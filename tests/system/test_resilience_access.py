"""Who is let in when the ones who decide are missing, broken, down or back again."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from broker.client.connection import Connection, Handler
from broker.mqtt import packets
from tests import servers
from tests.broker import Broker, broker
from tests.clients import Device
from tests.fragments import ldap
from tests.integration.http_service import service
from tests.servers import PATIENCE
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.resilience import ask

pytestmark = pytest.mark.timeout(120)

BASE = '[listeners.tcp]\nbind = "127.0.0.1:0"\n'


async def login(to: str, name: str, version: int = 5, password: str | None = None) -> tuple[int, float]:
    """The CONNACK's code as it was sent, 0 for success, and how long it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    connect = packets.Connect(
        version=version,
        clean_start=True,
        keep_alive=60,
        client_id=f"{name}-{began}",
        username=name,
        password=(password or servers.PEOPLE.get(name, "x")).encode(),
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", int(to.rpartition(":")[2]))
    try:
        writer.write(packets.encode_connect(connect))
        async with asyncio.timeout(15):
            answer = await reader.readexactly(4)
        assert answer[0] == 0x20
        return answer[3], loop.time() - began
    finally:
        writer.transport.abort()


# --- what starts -----------------------------------------------------------------------------------------------------


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens, as /proc writes them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        found = re.match(r"socket:\[(\d+)\]", str(link.readlink()))
        if found:
            inodes.add(found[1])
    addresses = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].rpartition(":")[0])
    return addresses


def test_a01_without_configuration_it_listens_on_loopback_alone_and_lets_nobody_unknown_in(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Broker(tmp_path, ["--set", f"listeners.tcp.bind=127.0.0.1:{free_port()}"])
    try:
        running.start()
        assert listening(running.pid) == {"0100007F"}
        assert asyncio.run(login(resilience.url(running), "nobody"))[0] in (0x86, 0x87)
        with pytest.raises(Exception, match=r"(?i)not authorized|bad user"):
            Device(running.port).connect()
    finally:
        running.stop()


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "*:0"])
def test_a01_a_listener_others_can_reach_needs_somebody_who_decides(tmp_path: Path, bind: str) -> None:
    running = Broker(tmp_path)
    running.write("00.toml", f'[listeners.tcp]\nbind = "{bind}"\nallow_cleartext = true\n')
    done = running.isthmus("run")
    assert done.returncode == 2
    assert re.search(r"00\.toml:\d: listeners\.tcp\b.*allow_anonymous", done.stderr), done.stderr
    running.write("01.toml", "[access]\nallow_anonymous = true\n")
    assert running.isthmus("check").returncode == 0


def test_a02_an_empty_list_of_backends_refuses_everybody(tmp_path: Path) -> None:
    (tmp_path / "users").write_text("")
    people = '[auth.people]\nkind = "file"\npasswords = "users"\n'
    for order in ("[access]\norder = []\n", "[listeners.tcp]\nauth = []\n"):
        with broker(tmp_path, {"00.toml": BASE, "10.toml": people, "20.toml": order}) as running:
            to = resilience.url(running)
            assert asyncio.run(login(to, "alice"))[0] in (0x86, 0x87)
            assert asyncio.run(login(to, "alice", 4))[0] in (4, 5)


@pytest.mark.parametrize(
    ("fragment", "named"),
    [
        ('[auth.people]\nkind = "file"\npasswords = "nowhere"\n', "nowhere"),
        ('[auth.people]\nkind = "file"\nrules = "broken"\n', "broken:2"),
        ('[auth.people]\nkind = "nosuchkind"\n', "nosuchkind"),
    ],
    ids=["missing-file", "broken-file", "no-module"],
)
def test_a03_a_backend_that_cannot_be_made_stops_the_start_and_is_named(
    tmp_path: Path, fragment: str, named: str
) -> None:
    running = Broker(tmp_path)
    (tmp_path / "broken").write_text("{allow, nonsense\n")
    running.write("00.toml", BASE)
    running.write("10.toml", fragment)
    done = running.isthmus("run")
    assert done.returncode == 2
    assert "auth.people" in done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


# --- the directory goes and comes ------------------------------------------------------------------------------------


def code_of(version: int) -> int:
    """Server unavailable, in the words of each version."""
    return 0x88 if version == 5 else 3


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_a15_a39_a_directory_that_is_gone_is_said_quickly_and_its_return_is_noticed(
    how: str,
    tmp_path: Path,
    start_slapd: Callable[..., servers.Slapd],
    record_property: Callable[[str, Any], None],
) -> None:
    directory = start_slapd()
    fragments = {
        "00.toml": BASE + "[access]\nallow_anonymous = true\nno_match = 'allow'\ncache_ttl = 0\n",
        "20.toml": ldap(directory.url, tmp_path, directory.admin_password),
    }
    with broker(tmp_path, fragments) as running:
        to = resilience.url(running)
        pid = running.pid
        session = await Connection.connect(
            to, client_id="alice-live", handler=Handler(), username="alice", password=servers.PEOPLE["alice"]
        )
        assert (await login(to, "bob"))[0] == 0
        await asyncio.to_thread(directory.stop if how == "stopped" else directory.freeze)
        async with canary_apart(to) as canary:
            # the first answers take the backend's deadline at most, three seconds, and not two of them in a row
            first = await asyncio.gather(*(login(to, name, v) for name in ("alice", "bob", "carol") for v in (5, 4)))
            assert [code for code, _ in first] == [code_of(v) for _ in range(3) for v in (5, 4)]
            assert max(took for _, took in first) <= 5.5 * PATIENCE
            # then the breaker is open: at once, a wrong password like a right one
            began = time.monotonic()
            quick: list[float] = []
            while len(quick) < 20 and time.monotonic() - began < 20 * PATIENCE:
                for version in (5, 4):
                    code, took = await login(to, "dave", version, "wrong" if len(quick) % 3 else None)
                    assert code == code_of(version)
                    if took < 0.1:
                        quick.append(took)
            assert len(quick) >= 20, "the breaker never opened"
            assert sorted(quick)[len(quick) // 2] <= 0.05 * PATIENCE
            assert session.open, "who is in stays in"

            # and it comes back without us
            await asyncio.to_thread(directory.start if how == "stopped" else directory.thaw)
            began = time.monotonic()
            while (await login(to, "bob"))[0] != 0:
                assert time.monotonic() - began <= 10 * PATIENCE, ask(running, "status")["auth"]
                await asyncio.sleep(0.1)
            took = time.monotonic() - began
        print(
            f"directory {how}: first {max(t for _, t in first):.2f} s, then at most {max(quick) * 1000:.1f} ms, "
            f"back after {took:.1f} s, canary {canary.slowest * 1000:.1f} ms"
        )
        record_property("recovery_s", round(took, 1))
        assert (await login(to, "bob", password="wrong"))[0] in (0x86, 0x87)
        canary.check()
        assert session.open
        assert running.pid == pid
        session.abort()


async def test_a15_a_directory_restarted_under_load_costs_no_more_than_its_absence(
    tmp_path: Path, start_slapd: Callable[..., servers.Slapd]
) -> None:
    """Pooled connections that died with it are not handed out as answers."""
    directory = start_slapd()
    fragments = {
        "00.toml": BASE + "[access]\ncache_ttl = 0\n",
        "20.toml": ldap(directory.url, tmp_path, directory.admin_password),
    }
    with broker(tmp_path, fragments) as running:
        to = resilience.url(running)
        codes: list[tuple[float, int]] = []
        stop = asyncio.Event()

        async def keep_on(name: str) -> None:
            while not stop.is_set():
                code, _ = await login(to, name)
                codes.append((time.monotonic(), code))
                await asyncio.sleep(0.02)

        tasks = [asyncio.create_task(keep_on(name)) for name in servers.PEOPLE]
        await asyncio.sleep(1)
        await asyncio.to_thread(directory.stop)
        await asyncio.sleep(1)
        await asyncio.to_thread(directory.start)
        back = time.monotonic()
        while time.monotonic() - back < 12 * PATIENCE:
            await asyncio.sleep(0.1)
            recent = [code for at, code in codes if at > time.monotonic() - 1]
            if len(recent) > 20 and not any(recent):
                break
        took = time.monotonic() - back
        stop.set()
        await asyncio.gather(*tasks)
        print(f"restart under load: all logins work again {took:.1f} s after it (one second of them seen)")
        assert took <= 11 * PATIENCE
        # down is "server unavailable", never "wrong password"
        assert {code for _, code in codes} == {0, 0x88}


# --- who does not wait to be let in ----------------------------------------------------------------------------------


async def raw(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that says all of this at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


def hasty(version: int, client_id: str) -> bytes:
    """CONNECT, and behind it in the same segment what only an accepted client may send."""
    connect = packets.Connect(
        version=version, clean_start=True, keep_alive=60, client_id=client_id, username="mallory", password=b"x"
    )
    return packets.encode_connect(connect) + packets.encode_publish(b"t", b"smuggled", 1, False, False, 1, version)


class Heard(Handler):
    """Every payload that came."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def on_publish(self, conn: Connection, publish: packets.Publish) -> None:
        self.payloads.append(publish.payload)


@contextlib.asynccontextmanager
async def judged(where: Path, seconds: float) -> AsyncIterator[tuple[Broker, Heard, Connection]]:
    """A broker that asks a service which takes so long and denies, a listener, and its connection."""

    async def deny(request: web.Request, body: bytes) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return web.json_response({"result": "deny"})

    async with service(deny) as http:
        text = f"[access]\nallow_anonymous = true\nno_match = 'allow'\n[auth.http]\nurl = '{http.url}/'\n"
        with broker(where, {"00.toml": BASE + text}) as running:
            heard = Heard()
            conn = await Connection.connect(resilience.url(running), client_id="watcher", handler=heard)
            assert await conn.subscribe([("t/#", 0)]) == [0]
            yield running, heard, conn
            assert "Traceback" not in running.log()
            assert http.seen, "nobody was asked"
            conn.abort()


@pytest.mark.parametrize("version", [4, 5])
async def test_p15_nothing_that_comes_with_a_connect_is_served_when_it_is_denied(tmp_path: Path, version: int) -> None:
    async with judged(tmp_path, 1.0) as (running, heard, conn):
        began = time.monotonic()
        reader, writer = await raw(running.port, hasty(version, "mallory"))
        async with asyncio.timeout(10 * PATIENCE):
            answer = await reader.read()
        assert time.monotonic() - began >= 0.9, "the service was not waited for"
        if version == 5:
            assert (answer[:3], answer[3] in (0x86, 0x87), len(answer)) == (b"\x20\x03\x00", True, 5)
        else:
            assert answer in (b"\x20\x02\x00\x04", b"\x20\x02\x00\x05")
        conn.publish("t", b"mine", 0)
        await resilience.eventually(lambda: b"mine" in heard.payloads, "what was published afterwards")
        assert heard.payloads == [b"mine"]
        writer.close()


async def test_p16_who_floods_while_its_login_hangs_is_not_read_and_closed_at_the_deadline(tmp_path: Path) -> None:
    """Twenty of them, ten megabytes each."""
    async with judged(tmp_path, 60.0) as (running, heard, _):
        loop = asyncio.get_running_loop()
        async with canary_apart(resilience.url(running)) as canary:
            await asyncio.sleep(0.5)
            before = resilience.rss(running.pid)
            began = time.monotonic()
            flood = packets.encode_publish(b"t", bytes(1_000), 0, False, False, 0, 5) * 10_000

            async def one(number: int) -> float:
                with socket.socket() as sock:
                    sock.setblocking(False)
                    await loop.sock_connect(sock, ("127.0.0.1", running.port))
                    await loop.sock_sendall(sock, hasty(5, f"m{number}"))
                    flooding = asyncio.create_task(loop.sock_sendall(sock, flood))
                    async with asyncio.timeout(30 * PATIENCE):
                        with contextlib.suppress(ConnectionError):
                            while await loop.sock_recv(sock, 4096):
                                pass
                    assert not flooding.done() or flooding.exception(), "all of it was read"
                    flooding.cancel()
                    await asyncio.wait([flooding])
                    return time.monotonic() - began

            times = await asyncio.gather(*(one(number) for number in range(20)))
            peak = resilience.rss(running.pid, "VmHWM") - before
        print(
            f"P-16: memory +{peak / 1e6:.1f} MB for twenty, closed after {min(times):.1f} to {max(times):.1f} s, "
            f"canary {canary.slowest * 1000:.0f} ms"
        )
        assert peak <= 20 * (65_536 + 262_144) + (2 << 20), "64 KiB, and what a loop reads at once"
        assert max(times) <= 10.0 * PATIENCE, "the deadline of CONNECT, or the service's if it is shorter"
        canary.check()
        assert heard.payloads == []
