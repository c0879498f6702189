"""Hostile and ordinary peers on every kind of listener of a running broker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import socket
import ssl
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from broker.client.connection import Connection, Handler
from broker.mqtt import packets
from broker.mqtt.packets import Publish
from tests import servers
from tests.broker import Broker, broker
from tests.clock import Trip
from tests.packets.table import CLIENT, Entry, malformed
from tests.system.resilience import SOAK, Trips, eventually, rss, until
from tests.unit.engine.harness import connect_packet
from tests.unit.engine.test_malformed import MUTE

pytestmark = [pytest.mark.timeout(120), *([pytest.mark.slow] if SOAK else [])]

DEADLINE = 10.0 if SOAK else 2.0
"""Seconds from accept to CONNECT in this broker; the default is ten."""
MEGABYTE = 1 << 20

CONNECT = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01%c"
CONNACK = b"\x20\x02\x00\x00"

FRAGMENT = """
[broker]
data = "data"

[access]
allow_anonymous = true
no_match = "allow"

[limits]
connect_timeout = "2s"

[listeners.tcp]
bind = "127.0.0.1:0"

[listeners.devices]
kind = "tls"
bind = "127.0.0.1:0"
certificate = "{0.server}"
key = "{0.server_key}"

[listeners.browsers]
kind = "ws"
bind = "127.0.0.1:0"

[listeners.secure-browsers]
kind = "wss"
bind = "127.0.0.1:0"
certificate = "{0.server}"
key = "{0.server_key}"

[listeners.local]
kind = "unix"
path = "mqtt.sock"
"""


@contextlib.contextmanager
def listening(where: Path, certs: servers.Certificates, deadline: float) -> Iterator[Broker]:
    text = FRAGMENT.format(certs).replace('"2s"', f'"{deadline:.0f}s"')
    with broker(where, {"00-all.toml": text}) as started:
        for name in ("tcp", "devices", "browsers"):  # what a first connection imports counts for no test
            with dial(started, name) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                closed_after(sock)
        yield started


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, certs: servers.Certificates) -> Iterator[Broker]:
    with listening(tmp_path_factory.mktemp("b"), certs, DEADLINE) as started:
        yield started


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, certs: servers.Certificates) -> Iterator[Broker]:
    """One that closes no connection because of its age while a test looks: it had another reason."""
    with listening(tmp_path_factory.mktemp("p"), certs, 60) as started:
        yield started


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Five seconds after each case the broker has the sockets it had before, and no error in its log. (The store may
    have opened a file, and memory that was used once stays with the allocator: cases about memory measure it.)"""
    used = [name for name in ("running", "patient") if name in request.fixturenames]
    if not used:
        yield
        return
    running: Broker = request.getfixturevalue(used[0])
    pid = running.pid
    before = open_sockets(pid)
    said = len(running.log())
    yield
    until = time.monotonic() + 5.0 * servers.PATIENCE
    while open_sockets(pid) > before and time.monotonic() < until:
        time.sleep(0.05)
    assert open_sockets(pid) <= before
    log = running.log()[said:]
    assert "Traceback" not in log, log
    assert "never retrieved" not in log, log


def open_sockets(pid: int) -> int:
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            count += os.readlink(link).startswith("socket:")
    return count


def port_of(running: Broker, name: str) -> int:
    return int(running.ready[name].rpartition(":")[2])


def dial(running: Broker, name: str = "tcp") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(running, name)), timeout=5)


def closed_after(sock: socket.socket, seconds: float = 5.0) -> float:
    """Seconds until the broker closed the connection; fails when it does not."""
    started = time.monotonic()
    sock.settimeout(seconds)
    with contextlib.suppress(ConnectionError):
        while sock.recv(65536):
            pass
    return time.monotonic() - started


def all_closed(socks: list[socket.socket], seconds: float) -> bool:
    """Whether the broker closes every one of them within that time. They are closed on our side too then."""
    waiting = selectors.DefaultSelector()
    for sock in socks:
        sock.setblocking(False)
        waiting.register(sock, selectors.EVENT_READ)
    until = time.monotonic() + seconds
    while waiting.get_map() and time.monotonic() < until:
        for key, _ in waiting.select(0.1):
            try:
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            except ConnectionError:
                data = b""
            except BlockingIOError:
                continue
            if not data:
                waiting.unregister(key.fileobj)
    left = len(waiting.get_map())
    waiting.close()
    for sock in socks:
        sock.close()
    return left == 0


def any_closed(socks: list[socket.socket]) -> bool:
    """Whether the broker has closed one of them or said something."""
    with selectors.DefaultSelector() as waiting:
        for sock in socks:
            waiting.register(sock, selectors.EVENT_READ)
        return bool(waiting.select(0))


def resident(pid: int) -> int:
    """Bytes of the process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def flush_peak(pid: int) -> None:
    """The peak of its memory counts from now. proc(5), clear_refs"""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_resident(pid: int) -> int:
    """The most bytes of the process that were in memory at once."""
    return rss(pid, "VmHWM")


class Canary(Trips):
    """A well-behaved client; its round trips are pings."""

    def __init__(self, running: Broker) -> None:
        self._sock = dial(running)
        self._sock.sendall(CONNECT % b"y"[0])
        assert self._sock.recv(4) == CONNACK
        self.trips: list[float] = []

    def ping(self) -> None:
        trip = Trip()
        self._sock.sendall(b"\xc0\x00")
        assert self._sock.recv(2) == b"\xd0\x00"
        self.trips.append(trip.took)

    def close(self) -> None:
        self._sock.close()


@pytest.mark.parametrize("name", ["tcp", "devices", "browsers", "secure-browsers", "local"])
def test_an_independent_client_publishes_to_itself_over_every_kind(
    running: Broker, certs: servers.Certificates, name: str
) -> None:
    transport = {"browsers": "websockets", "secure-browsers": "websockets", "local": "unix"}.get(name, "tcp")
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, f"kind-{name}", transport=transport)  # type: ignore[arg-type]
    got: list[bytes] = []
    client.on_message = lambda _client, _data, message: got.append(message.payload)
    client.on_connect = lambda c, *_: c.subscribe("kinds/" + name, 1)
    client.on_subscribe = lambda c, *_: c.publish("kinds/" + name, b"x" * 70_000, 1)
    if name in ("devices", "secure-browsers"):
        client.tls_set(str(certs.ca))
    if name == "local":
        client.connect(running.ready["local"])
    else:
        client.connect("localhost" if "devices" in name or "secure" in name else "127.0.0.1", port_of(running, name))
    until = time.monotonic() + 10
    while not got and time.monotonic() < until:
        client.loop(0.1)
    client.disconnect()
    assert got == [b"x" * 70_000]


def test_p05_other_packets_first_are_closed_after_their_header_without_memory(patient: Broker) -> None:
    """Fourteen peers at once, each with a hundred megabytes to come."""
    flush_peak(patient.pid)
    before = resident(patient.pid)
    socks = [dial(patient) for _ in range(2, 16)]
    for kind, sock in enumerate(socks, 2):
        sock.sendall(bytes([kind << 4 | (2 if kind in (6, 8, 10) else 0)]) + b"\xff\xff\xff\x7f")
    for sock in socks:  # nothing more is needed to be closed
        closed_after(sock)
        sock.close()
    for kind in range(2, 16):
        with dial(patient) as sock:
            sock.settimeout(5)
            first = bytes([kind << 4 | (2 if kind in (6, 8, 10) else 0)]) + b"\xff\xff\xff\x7f"
            with contextlib.suppress(ConnectionError):
                sock.sendall(first + bytes(MEGABYTE))
                for _ in range(99):
                    sock.sendall(bytes(MEGABYTE))
                pytest.fail(f"packet type {kind} was read on and on")
    peak = peak_resident(patient.pid)
    print(f"P-05: memory +{(peak - before) / 1e6:.2f} MB")
    assert peak - before <= 2 * MEGABYTE


def test_p06_a_connect_above_the_limit_before_login_is_closed_after_its_header(patient: Broker) -> None:
    with dial(patient) as sock:
        sock.sendall(b"\x10\x81\x80\x04")  # 65 537
        closed_after(sock)


def test_p07_connects_that_stop_one_byte_before_their_end_are_closed_at_the_deadline(running: Broker) -> None:
    before, canary = resident(running.pid), Canary(running)
    head = b"\x10\xe8\xfb\x03"  # 65 000
    started = time.monotonic()
    socks = [dial(running) for _ in range(200)]
    for sock in socks:
        sock.sendall(head + b"\x00\x04MQTT\x05\x02\x00\x3c" + bytes(64_999 - 10))
    peak = 0
    while time.monotonic() < started + DEADLINE - 0.2:
        canary.ping()
        peak = max(peak, resident(running.pid))
        time.sleep(0.05)
    early = any_closed(socks)
    assert not early or time.monotonic() >= started + DEADLINE, "before the deadline"
    assert peak - before <= 200 * 65_536 + (8 << 20)
    assert all_closed(socks, 3.0)
    canary.check()
    canary.close()
    print(f"P-07: {len(canary.trips)} pings, the slowest {canary.slowest * 1000:.0f} ms")


def test_p08_the_deadline_is_absolute_for_peers_that_drip(running: Broker) -> None:
    started = time.monotonic()
    socks = [dial(running) for _ in range(100)]
    body = connect_packet("z" * 64)
    for i in range(int(DEADLINE / 0.4) + 1):
        early = any_closed(socks)
        assert not early or time.monotonic() >= started + DEADLINE, "before the deadline"
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                sock.sendall(body[i : i + 1])
        time.sleep(0.4)
    assert all_closed(socks, 2.0)
    assert time.monotonic() - started < DEADLINE + 2.5
    Canary(running).close()


UPGRADE = (
    b"GET /mqtt HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
)


def upgraded(running: Broker) -> socket.socket:
    sock = dial(running, "browsers")
    sock.sendall(UPGRADE)
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += sock.recv(1)
    assert answer.startswith(b"HTTP/1.1 101")
    return sock


def frame(payload: bytes) -> bytes:
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else struct.pack("!BH", 0xFE, len(payload))
    return b"\x82" + length + bytes(4) + payload


def test_p11_half_a_publish_in_a_frame_waits_and_ends_with_the_keep_alive(running: Broker) -> None:
    with upgraded(running) as sock, dial(running) as watcher:
        sock.settimeout(10)
        watcher.sendall(CONNECT % b"w"[0] + b"\x82\x06\x00\x01\x00\x01#\x00")
        assert exactly(watcher, 4 + 5) == CONNACK + b"\x90\x03\x00\x01\x00"
        started, said = time.monotonic(), b""
        sock.sendall(frame(b"\x10\x0f\x00\x04MQTT\x05\x02\x00\x01\x00\x00\x02ka"))
        kind, size = exactly(sock, 2)
        assert (kind, exactly(sock, size)[:4:3]) == (0x82, b"\x20\x00")
        sock.sendall(frame(b"\x30\x80\x20" + b"\x00\x01t"))
        with contextlib.suppress(ConnectionError):
            while more := sock.recv(65_536):
                said += more
        seconds = time.monotonic() - started
        assert said.startswith(b"\x82\x03\xe0\x01\x8d"), "the keep-alive ended it"
        watcher.sendall(b"\x30\x06\x00\x01tend")
        assert exactly(watcher, 8) == b"\x30\x06\x00\x01tend", "nothing else was routed"
    assert 1.0 <= seconds <= 6.0


def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes."""
    found = b""
    while len(found) < size:
        more = sock.recv(size - len(found))
        assert more, f"closed after {found!r}"
        found += more
    return found


def test_p74_after_the_upgrade_silence_ends_at_the_same_deadline(running: Broker) -> None:
    started = time.monotonic()
    with upgraded(running) as sock:
        closed_after(sock, DEADLINE + 10)
    assert DEADLINE - 0.5 <= time.monotonic() - started <= DEADLINE + 4.0 * servers.PATIENCE


def test_p72_endless_continuations_before_login_end_at_the_same_deadline(running: Broker) -> None:
    flush_peak(running.pid)
    before = resident(running.pid)
    piece = b"\x00\xe4" + bytes(4 + 100)  # FIN is not set: there is always one more
    started = time.monotonic()
    with upgraded(running) as sock:
        sock.settimeout(0.2)
        sock.sendall(b"\x02\x8b" + bytes(4) + b"\x10\xe8\xfb\x03\x00\x04MQTT\x05")
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < started + DEADLINE + 10:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(piece * 1000)
        seconds = time.monotonic() - started
    assert DEADLINE - 0.5 <= seconds <= DEADLINE + 4.0 * servers.PATIENCE
    assert peak_resident(running.pid) - before <= MEGABYTE


def test_p12_a_thousand_packets_at_once_and_byte_by_byte_have_the_same_answers(running: Broker) -> None:
    answers = []
    packets = CONNECT % b"p"[0]
    packets += b"\x82\x08\x00\x01\x00\x03p12\x00"
    packets += b"".join(b"\x32\x0a\x00\x03p12" + struct.pack("!H", i) + b"%03d" % (i % 1000) for i in range(1, 799))
    packets += b"\xc0\x00" * 200 + b"\x30\x08\x00\x03p12end"
    for step in (len(packets), 1):
        with dial(running) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            got = b""
            for i in range(0, len(packets), step):
                sock.sendall(packets[i : i + step])
            while len(got) < 4 + 5 + 798 * (10 + 4) + 200 * 2 + 10:
                got += sock.recv(65536)
            answers.append(got)
            sock.sendall(b"\xe0\x00")
    whole, dripped = (parsed(answer) for answer in answers)
    for kind in (2, 9, 4, 3, 13):
        assert [p for p in whole if p[0] >> 4 == kind] == [p for p in dripped if p[0] >> 4 == kind]
    assert len(whole) == 1 + 1 + 798 + 798 + 200 + 1


def test_p39_a_puback_and_the_end_in_one_segment_count(running: Broker) -> None:
    """Linux puts both into one segment: the socket is corked until it is shut down."""
    connect = b"\x10\x0e\x00\x04MQTT\x04\x00\x00\x3c\x00\x02p9"
    with dial(running) as sock:
        sock.sendall(connect + b"\x82\x08\x00\x01\x00\x03p39\x01")
        assert exactly(sock, 4 + 5)[:3] == CONNACK[:3]
        with dial(running) as publisher:
            publisher.sendall(CONNECT % b"q"[0])
            publish = [b"\x32\x0b\x00\x03p39" + struct.pack("!H", i) + b"%04d" % i for i in range(1, 1001)]
            publisher.sendall(b"".join(publish))
            assert len(exactly(publisher, 4 + 4 * 1000)) == 4004
        first = exactly(sock, 13)
        assert first[9:] == b"0001"
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        sock.sendall(b"\x40\x02" + first[7:9])
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65_536):
            pass
    with dial(running) as sock:
        sock.sendall(connect)
        assert exactly(sock, 4) == b"\x20\x02\x01\x00"
        assert exactly(sock, 13)[9:] == b"0002"
        sock.sendall(b"\xe0\x00")
    with dial(running) as sock:  # nothing of the session stays
        sock.sendall(connect.replace(b"\x04\x00\x00\x3c", b"\x04\x02\x00\x3c") + b"\xe0\x00")
        closed_after(sock)


def parsed(data: bytes) -> list[bytes]:
    """Packets of a stream of short ones."""
    packets = []
    while data:
        assert data[1] < 128
        packets.append(data[: 2 + data[1]])
        data = data[2 + data[1] :]
    return packets


def test_p67_a_thousand_silent_tls_peers_are_closed_at_the_deadline(running: Broker) -> None:
    """Half of them say nothing, half begin a ClientHello."""
    canary, started = Canary(running), time.monotonic()
    socks = []
    for number in range(1_000):
        sock = dial(running, "devices")
        socks.append(sock)
        if number % 2:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        if number % 20 == 0:
            canary.ping()
    last = time.monotonic()
    while time.monotonic() < started + DEADLINE - 0.5:
        canary.ping()
        time.sleep(0.05)
    early = any_closed(socks)
    assert not early or time.monotonic() >= started + DEADLINE, "before the deadline"
    assert all_closed(socks, DEADLINE + 5.0 * servers.PATIENCE)
    assert time.monotonic() - last <= DEADLINE + 2.0 * servers.PATIENCE
    canary.ping()
    canary.check()
    canary.close()
    print(f"P-67: {len(canary.trips)} pings, the slowest {canary.slowest * 1000:.0f} ms")


def test_p68_a_client_cannot_renegotiate(running: Broker, certs: servers.Certificates) -> None:
    openssl = servers.program("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    address = f"127.0.0.1:{port_of(running, 'devices')}"
    done = subprocess.run(
        [openssl, "s_client", "-connect", address, "-tls1_2", "-CAfile", str(certs.ca)],
        input="R\n", capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert "RENEGOTIATING" in done.stdout + done.stderr
    assert "no renegotiation" in (done.stdout + done.stderr).lower()


def test_p77_a_flood_of_http_requests_writes_few_lines(running: Broker) -> None:
    before = len(running.log().splitlines())
    started = time.monotonic()
    for _ in range(1_000):
        with dial(running) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            sock.settimeout(5)
            with contextlib.suppress(ConnectionError):
                assert sock.recv(100) == b"", "closed without a word"
    seconds = time.monotonic() - started
    time.sleep(1.2)  # the last summary
    until(lambda: "more lines like this" in "\n".join(running.log().splitlines()[before:]), "a summary", 10)
    lines = running.log().splitlines()[before:]
    print(f"P-77: {1_000 / seconds:.0f} a second, {len(lines)} lines")
    assert any("HTTP request" in line for line in lines)
    # ten and their summary, of each second the flood has touched
    assert len(lines) <= 11 * (seconds + 2)
    assert max(Counter(line[:19] for line in lines).values()) <= 22, "the seconds of the limit are its own"


def test_p66_each_mistake_about_tls_has_its_line(patient: Broker) -> None:
    for name, data, line in (
        ("devices", CONNECT % b"q"[0], "sent plain bytes to a TLS port, listener 'devices'"),
        ("tcp", b"\x16\x03\x01\x02\x00", "sent a TLS hand-shake to a port without TLS, listener 'tcp'"),
    ):
        until = time.monotonic() + 10  # other tests may have used up the lines of this second
        while line not in patient.log() and time.monotonic() < until:
            with dial(patient, name) as sock:
                sock.sendall(data)
                closed_after(sock)
            time.sleep(0.1)
        assert line in patient.log()


def test_tls_clients_of_both_versions_connect(running: Broker, certs: servers.Certificates) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=str(certs.ca))
        context.minimum_version = context.maximum_version = version
        with context.wrap_socket(dial(running, "devices"), server_hostname="localhost") as sock:
            sock.sendall(CONNECT % b"v"[0])
            assert sock.recv(4) == CONNACK


def test_r01_with_256_descriptors_400_peers_cost_nothing_but_waiting(tmp_path: Path) -> None:
    prlimit = servers.program("prlimit")
    if prlimit is None:
        pytest.skip("prlimit (util-linux) is not installed")
    tight = Broker(tmp_path, wrapper=[prlimit, "--nofile=256:256"])
    tight.write("00-all.toml", FRAGMENT[: FRAGMENT.index("[listeners.devices]")].replace('"2s"', '"60s"'))
    socks: list[socket.socket] = []
    try:
        tight.start()
        early = Canary(tight)
        socks = [dial(tight) for _ in range(400)]
        until = time.monotonic() + 5
        while "accepts nobody" not in tight.log() and time.monotonic() < until:
            time.sleep(0.05)
        assert "accepts nobody" in tight.log()
        burnt, started = cpu_seconds(tight.pid), time.monotonic()
        time.sleep(1.0)
        assert (cpu_seconds(tight.pid) - burnt) / (time.monotonic() - started) <= 0.2
        early.ping()
        assert tight.status()["listeners"]["tcp"]["connections"] <= 256  # the control socket still gets descriptors
        assert tight.log().count("accepts nobody") == 1
        for sock in socks[:300]:
            sock.close()
        freed = time.monotonic()
        late = Canary(tight)
        assert time.monotonic() - freed <= 5.0 * servers.PATIENCE  # the others wait for 60 s
        late.close()
        early.close()
    finally:
        for sock in socks:
            sock.close()
        tight.stop()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# every malformed packet over every transport --------------------------------------------------------------------------

TRANSPORTS = ["tcp", "devices", "browsers"]
FRAMINGS = ["whole", "bytes", "glued"]


class Wire(asyncio.Protocol):
    """A raw client of any kind of listener: bytes of MQTT out, bytes of MQTT in, also those a reset follows."""

    def __init__(self, framed: bool) -> None:
        self._framed = framed
        self._upgraded = not framed
        self._raw = b""
        self._heard = b""
        self._ended = False
        self._changed = asyncio.Event()
        self._transport: asyncio.WriteTransport

    @classmethod
    async def open(cls, running: Broker, name: str, context: ssl.SSLContext | None) -> Wire:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(
            lambda: cls(name == "browsers"),
            "127.0.0.1",
            port_of(running, name),
            ssl=context,
            server_hostname="localhost" if context is not None else None,
        )
        if wire._framed:
            wire._transport.write(UPGRADE)
        return wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._raw += data
        if not self._upgraded:
            head, end, rest = self._raw.partition(b"\r\n\r\n")
            if end:
                assert head.startswith(b"HTTP/1.1 101")
                self._upgraded, self._raw = True, rest
        if self._upgraded:
            self._take()
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._changed.set()

    def _take(self) -> None:
        if not self._framed:
            self._heard, self._raw = self._heard + self._raw, b""
        while len(self._raw) >= 2 and len(self._raw) >= 2 + self._raw[1]:
            end = 2 + self._raw[1]
            if self._raw[0] == 0x82:
                self._heard += self._raw[2:end]
            self._raw = self._raw[end:]

    def send(self, data: bytes) -> None:
        """In a segment of its own."""
        self._transport.write(frame(data) if self._framed else data)

    async def heard(self, size: int | None = None) -> bytes:
        """So many bytes, or all until the broker closes."""
        while not self._ended and (not self._upgraded or size is None or len(self._heard) < size):
            self._changed.clear()
            await self._changed.wait()
        found = self._heard[:size]
        self._heard = self._heard[len(found) :]
        return found

    def close(self) -> None:
        self._transport.abort()


def expected(entry: Entry, version: int) -> bytes:
    """What the broker says to it, behind the CONNACK of a client that was let in."""
    assert entry.code is not None
    if entry.data[0] >> 4 != 1:
        return bytes((0xE0, 1, entry.code)) if version == 5 else b""
    if entry.name in MUTE:
        return b""
    if version == 5:
        return bytes((0x20, 3, 0, entry.code, 0))
    return b"\x20\x02\x00\x01" if entry.code == 0x84 else b""


async def ends(
    running: Broker, name: str, framing: str, context: ssl.SSLContext | None, entry: Entry, version: int, number: int
) -> str:
    """Send a malformed packet, and one behind it that would be seen; what is wrong with the answer, or nothing."""
    login = b"" if entry.data[0] >> 4 == 1 else connect_packet(f"{name}-{framing}-{number}", version)
    behind = packets.encode_publish(b"seen", b"x", 0, False, False, 0, version)
    pieces = {
        "glued": [login + entry.data + behind],
        "whole": [login, entry.data, behind],
        "bytes": [login, *(entry.data[i : i + 1] for i in range(len(entry.data))), behind],
    }[framing]
    wire = await Wire.open(running, name, context)
    try:
        async with asyncio.timeout(10 * servers.PATIENCE):
            await wire.heard(0)
            for piece in filter(None, pieces):
                wire.send(piece)
                await asyncio.sleep(0)
            answer = await wire.heard()
    except TimeoutError:
        return "not closed"
    finally:
        wire.close()
    wanted = expected(entry, version)
    if not login or (version < 5 and not answer):  # what is closed without a word may be closed before its CONNACK left
        return "" if answer == wanted else f"{answer!r}, not {wanted!r}"
    size = 2 + answer[1] if len(answer) > 1 else 0
    if answer[:1] + answer[3:4] != b"\x20\x00" or answer[size:] != wanted:
        return f"{answer!r}, not CONNACK and {wanted!r}"
    return ""


class Watcher(Handler):
    """Whoever sees what was smuggled in."""

    def __init__(self) -> None:
        self.topics: list[bytes] = []

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.topics.append(publish.topic)


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_every_malformed_packet_ends_its_connection_over_every_transport(
    patient: Broker, certs: servers.Certificates, name: str, framing: str
) -> None:
    """P-01 to P-04, P-09, P-10, P-17 to P-20, P-22, P-23, P-25, P-26, P-31, P-33, P-34, P-36, P-44, P-45, P-47 to P-50,
    P-52, P-54, each whole, byte by byte, and glued to what stands before and behind it."""
    context = ssl.create_default_context(cafile=str(certs.ca)) if name == "devices" else None
    cases = [(entry, version) for entry in malformed(direction=CLIENT) for version in entry.versions]
    assert len(cases) > 700
    watcher = Watcher()
    conn = await Connection.connect(
        f"mqtt://127.0.0.1:{port_of(patient, 'tcp')}", client_id=f"watcher-{name}-{framing}", handler=watcher
    )
    assert await conn.subscribe([("#", 0)]) == [0]
    slots = asyncio.Semaphore(30)

    async def one(number: int, entry: Entry, version: int) -> str:
        async with slots:
            wrong = await ends(patient, name, framing, context, entry, version, number)
        return f"{entry}-{version}: {wrong}" if wrong else ""

    began = time.monotonic()
    found = await asyncio.gather(*(one(number, *case) for number, case in enumerate(cases)))
    print(f"{len(cases)} packets, {name}, {framing}: {time.monotonic() - began:.1f} s")
    assert not [wrong for wrong in found if wrong]
    conn.publish("end", b"", 0)
    await eventually(lambda: b"end" in watcher.topics, "what was published behind all of them")
    assert watcher.topics == [b"end"]
    await conn.disconnect()
