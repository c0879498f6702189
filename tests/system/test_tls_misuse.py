"""Clients that misuse TLS after the hand-shake: renegotiation, floods of key updates."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.mqtt import packets
from tests import servers
from tests.broker import Broker, broker
from tests.servers import PATIENCE
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.resilience import OPEN, Canary, command, cpu, eventually, rss

pytestmark = pytest.mark.timeout(120)

SECURE = """
[listeners.devices]
kind = "tls"
bind = "127.0.0.1:0"
certificate = "{0.server}"
key = "{0.server_key}"
"""
CONNECT = packets.encode_connect(packets.Connect(version=4, clean_start=True, keep_alive=0, client_id="device"))
CONNACK = b"\x20\x02\x00\x00"
KEY_UPDATE = 5 + 5 + 1 + 16
"""Bytes of a record that holds nothing but a KeyUpdate: header, message, content type, tag. RFC 8446 4.6.3."""
MEGABYTE = 1 << 20


def port_of(running: Broker, name: str = "devices") -> int:
    return int(running.ready[name].rpartition(":")[2])


@dataclass
class Session:
    """`openssl s_client`, told what to do by single letters; each `say` is one read for it, and so one command."""

    process: subprocess.Popen[bytes]
    commands: socket.socket
    output: Path

    def say(self, text: bytes) -> None:
        self.commands.send(text)

    def heard(self, what: bytes) -> bool:
        return what in self.output.read_bytes()


@contextlib.contextmanager
def s_client(where: Path, port: int, certs: servers.Certificates, *options: str) -> Iterator[Session]:
    """An MQTT session over TLS that is about to misbehave."""
    openssl = servers.program("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output = where / f"s_client-{port}"
    with output.open("wb") as out, theirs:
        process = subprocess.Popen(
            [openssl, "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", str(certs.ca), *options],
            stdin=theirs, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    ours.settimeout(10)
    try:
        yield Session(process, ours, output)
    finally:
        ours.close()
        process.kill()
        process.wait()


async def log_in(session: Session) -> None:
    session.say(CONNECT)
    await eventually(lambda: session.heard(CONNACK), "the CONNACK through s_client", 10)


class OneWay:
    """A relay that counts what the client sends and, once it is `deaf`, takes nothing more from the broker."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.sent = 0
        self.deaf = threading.Event()
        self.ended = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(10)
        self.port: int = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> OneWay:
        threading.Thread(target=self._up, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.deaf.set()
        for one in (self._listening, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.ended.wait(5)

    def _up(self) -> None:
        try:
            client, _ = self._listening.accept()
            broker_side = socket.socket()
            self._sockets += [client, broker_side]
            broker_side.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            broker_side.connect(("127.0.0.1", self.target))
            threading.Thread(target=self._down, args=(broker_side, client), daemon=True).start()
            while data := client.recv(65_536):
                broker_side.sendall(data)
                self.sent += len(data)
        except OSError:
            pass
        finally:
            for one in self._sockets:
                one.close()
            self.ended.set()

    def _down(self, broker_side: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self.deaf.is_set() and (data := broker_side.recv(65_536)):
                client.sendall(data)


def flood(
    session: Session, letter: bytes, seconds: float, enough: Callable[[], bool] = lambda: True, longest: float = 30
) -> int:
    """Key updates asked for until then, and on until it is `enough`, or until s_client has ended; to those of `K` it
    wants the broker's own."""
    began, count = time.monotonic(), 0
    with contextlib.suppress(OSError):
        while (now := time.monotonic() - began) < seconds or (now < longest * PATIENCE and not enough()):
            session.say(letter + b"\n")
            count += 1
    return count


def kept_waiting(pid: int) -> float:
    """Seconds for which its main thread was ready and other processes had the processors."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


async def test_p68_a_tls_1_2_client_with_a_session_cannot_renegotiate(
    tmp_path: Path, certs: servers.Certificates
) -> None:
    with broker(tmp_path, {"00-broker.toml": OPEN, "01-tls.toml": SECURE.format(certs)}) as running:
        canary = await Canary.open(resilience.url(running))
        used = cpu(running.pid)
        with s_client(tmp_path, port_of(running), certs, "-tls1_2") as session:
            await log_in(session)
            session.say(b"R\n")
            await eventually(lambda: session.heard(b"RENEGOTIATING"), "s_client's attempt", 10)
            await eventually(lambda: session.heard(b"no renegotiation"), "the broker's refusal", 10)
        await canary.sing(0.5)
        print(f"P-68: renegotiation refused, {cpu(running.pid) - used:.2f} s of a processor")
        assert canary.slowest <= 1.0 * PATIENCE
        canary.conn.abort()


@pytest.mark.parametrize("letter", [b"K", b"k"], ids=["answered", "unanswered"])
async def test_p68_a_flood_of_key_updates_costs_no_memory_and_delays_nobody(
    tmp_path: Path, certs: servers.Certificates, letter: bytes
) -> None:
    with (
        broker(tmp_path, {"00-broker.toml": OPEN, "01-tls.toml": SECURE.format(certs)}) as running,
        OneWay(port_of(running)) as relay,
        s_client(tmp_path, relay.port, certs, "-tls1_3") as session,
    ):
        await log_in(session)
        await asyncio.to_thread(flood, session, letter, 1)  # the buffers of this connection are there
        before, start, used = rss(running.pid), relay.sent, cpu(running.pid)
        enough, waited = start + 30_000 * KEY_UPDATE, kept_waiting(running.pid)
        async with canary_apart(resilience.url(running)) as canary:
            began = time.monotonic()
            count = await asyncio.to_thread(flood, session, letter, 3, lambda: relay.sent >= enough)
            took = time.monotonic() - began
            await asyncio.sleep(0.5)
        waited = kept_waiting(running.pid) - waited
        sent = (relay.sent - start) // KEY_UPDATE
        growth = rss(running.pid, "VmHWM") - before
        print(
            f"P-68: {sent / took:.0f} key updates a second ({count} asked for), {cpu(running.pid) - used:.1f} s of "
            f"a processor, memory +{growth / 1e6:.2f} MB, canary {canary.slowest * 1000:.0f} ms, "
            f"of which others had the processors for {waited * 1000:.0f} ms at most"
        )
        assert sent >= 30_000, "that is no flood"
        assert growth <= 5 * MEGABYTE
        assert canary.slowest <= 2.0 * PATIENCE + waited


async def test_p68_a_flood_of_key_updates_whose_answers_are_not_read_ends_with_the_stall_timeout(
    tmp_path: Path, certs: servers.Certificates
) -> None:
    limits = '[limits]\nstall_timeout = "1s"\n'
    fragments = {"00-broker.toml": OPEN, "01-tls.toml": SECURE.format(certs), "02-limits.toml": limits}
    with (
        broker(tmp_path, fragments) as running,
        OneWay(port_of(running)) as relay,
        s_client(tmp_path, relay.port, certs, "-tls1_3") as session,
    ):
        await log_in(session)
        await asyncio.to_thread(flood, session, b"K", 1)
        before = rss(running.pid)
        async with canary_apart(resilience.url(running)) as canary:
            relay.deaf.set()
            began, waited = time.monotonic(), kept_waiting(running.pid)
            flooding = asyncio.create_task(asyncio.to_thread(flood, session, b"K", 60))
            await eventually(relay.ended.is_set, "the end of a client that reads nothing", 60)
            took = time.monotonic() - began
            growth = rss(running.pid, "VmHWM") - before
            status = await command(running, "status")
        waited = kept_waiting(running.pid) - waited
        session.process.kill()
        await flooding
        print(
            f"P-68 deaf: cut after {took:.1f} s, memory +{growth / 1e6:.1f} MB, canary {canary.slowest * 1000:.0f} ms, "
            f"of which others had the processors for {waited * 1000:.0f} ms at most"
        )
        assert status["events"]["stalled"] == 1
        assert growth <= 24 * MEGABYTE, "a second of answers"
        assert canary.slowest <= 2.0 * PATIENCE + waited


def taken_unread(running: Broker, certs: servers.Certificates) -> int:
    """Bytes the system takes for a broker that stands still, on a connection it has accepted."""
    context = ssl.create_default_context(cafile=str(certs.ca))
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", port_of(running)))
        with (
            context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
            socket.socket(fileno=os.dup(tls.fileno())) as one,
        ):
            os.kill(running.pid, signal.SIGSTOP)
            try:
                one.settimeout(0.5)
                taken = 0
                with contextlib.suppress(TimeoutError):
                    while taken < 16 * MEGABYTE:
                        taken += one.send(bytes(16_384))
            finally:
                os.kill(running.pid, signal.SIGCONT)
    return taken


async def test_p68_what_a_client_may_be_ahead_is_bounded_as_configured(
    tmp_path: Path, certs: servers.Certificates
) -> None:
    """All of it would be decrypted in one tick of the loop; a reload counts for those who connect afterwards."""
    tls = SECURE.format(certs)
    with broker(tmp_path, {"00-broker.toml": OPEN, "01-tls.toml": tls + 'receive_buffer = "128KB"\n'}) as running:
        much = await asyncio.to_thread(taken_unread, running, certs)
        running.write("01-tls.toml", tls + 'receive_buffer = "16KB"\n')
        done = await asyncio.to_thread(running.reload)
        assert done.returncode == 0, done.stderr
        little = await asyncio.to_thread(taken_unread, running, certs)
    assert 3 * little < much < MEGABYTE
