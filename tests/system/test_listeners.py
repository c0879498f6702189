"""Hostile and ordinary peers on every kind of listener of a running broker."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from tests import servers
from tests.broker import Broker, broker

DEADLINE = 2.0
"""Seconds from accept to CONNECT in this broker."""

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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, certs: servers.Certificates) -> Iterator[Broker]:
    with broker(tmp_path_factory.mktemp("b"), {"00-all.toml": FRAGMENT.format(certs)}) as started:
        yield started


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


def resident(pid: int) -> int:
    """Bytes of the process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Canary:
    """A well-behaved client; `slowest` is its longest ping so far, in seconds."""

    def __init__(self, running: Broker) -> None:
        self._sock = dial(running)
        self._sock.sendall(CONNECT % b"y"[0])
        assert self._sock.recv(4) == CONNACK
        self.slowest = 0.0

    def ping(self) -> None:
        started = time.monotonic()
        self._sock.sendall(b"\xc0\x00")
        assert self._sock.recv(2) == b"\xd0\x00"
        self.slowest = max(self.slowest, time.monotonic() - started)

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


def test_p05_other_packets_first_are_closed_after_their_header_without_memory(running: Broker) -> None:
    before = resident(running.pid)
    for kind in range(2, 16):
        with dial(running) as sock:
            sock.sendall(bytes([kind << 4 | (2 if kind in (6, 8, 10) else 0)]) + b"\xff\xff\xff\x7f")
            sock.settimeout(2)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    sock.sendall(bytes(1 << 20))
                pytest.fail(f"packet type {kind} was read on and on")
    assert resident(running.pid) - before <= 2 << 20


def test_p06_a_connect_above_the_limit_before_login_is_closed_after_its_header(running: Broker) -> None:
    with dial(running) as sock:
        sock.sendall(b"\x10\x81\x80\x04")  # 65 537
        assert closed_after(sock) < 1.0


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
    assert peak - before <= 200 * 65_536 + (8 << 20)
    assert all_closed(socks, 3.0)
    assert canary.slowest <= 0.1 * servers.PATIENCE
    canary.close()


def test_p08_the_deadline_is_absolute_for_peers_that_drip(running: Broker) -> None:
    started = time.monotonic()
    socks = [dial(running) for _ in range(100)]
    body = CONNECT % b"z"[0]
    for i in range(int(DEADLINE / 0.4) + 1):
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                sock.sendall(body[i : i + 1])
        time.sleep(0.4)
    assert all_closed(socks, 2.0)
    assert time.monotonic() - started < DEADLINE + 2.5
    Canary(running).close()


def upgraded(running: Broker) -> socket.socket:
    sock = dial(running, "browsers")
    sock.sendall(
        b"GET /mqtt HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
    )
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += sock.recv(1)
    assert answer.startswith(b"HTTP/1.1 101")
    return sock


def frame(payload: bytes) -> bytes:
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else struct.pack("!BH", 0xFE, len(payload))
    return b"\x82" + length + bytes(4) + payload


def test_p11_half_a_publish_in_a_frame_waits_and_ends_with_the_keep_alive(running: Broker) -> None:
    with upgraded(running) as sock:
        sock.sendall(frame(b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x01\x00\x02ka"))
        assert sock.recv(6) == b"\x82\x04" + CONNACK
        sock.sendall(frame(b"\x30\x80\x20" + b"\x00\x01t"))
        seconds = closed_after(sock, 5)
    assert 1.0 <= seconds <= 3.0


def test_p72_after_the_upgrade_silence_ends_at_the_same_deadline(running: Broker) -> None:
    with upgraded(running) as sock:
        assert closed_after(sock, 5) <= DEADLINE + 1.5


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


def parsed(data: bytes) -> list[bytes]:
    """Packets of a stream of short ones."""
    packets = []
    while data:
        assert data[1] < 128
        packets.append(data[: 2 + data[1]])
        data = data[2 + data[1] :]
    return packets


def test_p67_silent_tls_peers_are_closed_at_the_deadline(running: Broker) -> None:
    silent = [dial(running, "devices") for _ in range(150)]
    half = [dial(running, "devices") for _ in range(50)]
    for sock in half:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    canary = Canary(running)
    canary.ping()
    assert all_closed(silent + half, DEADLINE + 1.5)
    canary.ping()
    assert canary.slowest <= 0.1 * servers.PATIENCE
    canary.close()


def test_p68_a_client_cannot_renegotiate(running: Broker, certs: servers.Certificates) -> None:
    openssl = servers.program("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    import subprocess

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
    for _ in range(300):
        with dial(running) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            closed_after(sock)
    seconds = time.monotonic() - started
    lines = running.log().splitlines()[before:]
    assert any("HTTP request" in line for line in lines)
    assert len(lines) <= 12 * (seconds + 2)


def test_p66_each_mistake_about_tls_has_its_line(running: Broker) -> None:
    for name, data, line in (
        ("devices", CONNECT % b"q"[0], "sent plain bytes to a TLS port, listener 'devices'"),
        ("tcp", b"\x16\x03\x01\x02\x00", "sent a TLS hand-shake to a port without TLS, listener 'tcp'"),
    ):
        until = time.monotonic() + 10  # other tests may have used up the lines of this second
        while line not in running.log() and time.monotonic() < until:
            with dial(running, name) as sock:
                sock.sendall(data)
                assert closed_after(sock) < 1
            time.sleep(0.1)
        assert line in running.log()


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
        assert time.monotonic() - freed <= 2.0
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
