"""A listener's certificate is renewed while the broker runs."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from broker.mqtt import packets
from tests import servers
from tests.broker import Broker, broker
from tests.system.resilience import OPEN, ask

SECURE = """
[listeners.devices]
kind = "tls"
bind = "127.0.0.1:0"
certificate = "{0.server}"
key = "{0.server_key}"
"""
CONNECT = packets.encode_connect(packets.Connect(version=4, clean_start=True, keep_alive=0, client_id="device"))
CONNACK = b"\x20\x02\x00\x00"
PING, PONG = b"\xc0\x00", b"\xd0\x00"


def expired(certs: servers.Certificates) -> Path:
    """The server's certificate once more, for the same key, but of yesterday."""
    path = certs.server.with_name("expired.pem")
    subprocess.run(
        ["openssl", "x509", "-req", "-in", "server.csr", "-CA", certs.ca.name, "-CAkey", "ca.key", "-CAcreateserial",
         "-days", "-1", "-extfile", "server.ext", "-out", path.name],
        check=True, capture_output=True, cwd=path.parent,
    )  # fmt: skip
    return path


def port_of(running: Broker) -> int:
    return int(running.ready["devices"].rpartition(":")[2])


def served(running: Broker) -> bytes:
    """The certificate a new hand-shake shows."""
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port_of(running)), timeout=10))


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


def alarm(running: Broker) -> str | None:
    found: str | None = ask(running, "status")["listeners"]["devices"]["alarm"]
    return found


def answers(connection: ssl.SSLSocket) -> bool:
    connection.sendall(PING)
    return connection.recv(2) == PONG


def test_c18_a_reload_takes_only_a_valid_certificate_with_its_own_key_and_drops_no_connection(tmp_path: Path) -> None:
    try:
        first = servers.certificates(tmp_path / "first")
        second = servers.certificates(tmp_path / "second")
    except servers.Absent as error:
        pytest.skip(str(error))
    live = servers.Certificates(**{**vars(first), "server": tmp_path / "live.pem", "server_key": tmp_path / "live.key"})
    shutil.copy(first.server, live.server)
    shutil.copy(first.server_key, live.server_key)
    context = ssl.create_default_context(cafile=str(first.ca))
    with broker(tmp_path / "broker", {"00-broker.toml": OPEN, "01-tls.toml": SECURE.format(live)}) as running:
        plain = socket.create_connection(("127.0.0.1", port_of(running)), timeout=10)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as old:
            old.sendall(CONNECT)
            assert old.recv(4) == CONNACK
            assert served(running) == der(first.server)
            assert alarm(running) is None

            shutil.copy(second.server, live.server)  # its key does not come along
            done = running.reload()
            assert done.returncode == 2
            assert "01-tls.toml" in done.stderr
            assert "live.pem" in done.stderr
            assert "does not belong to" in (alarm(running) or "")
            assert str(live.server_key) in (alarm(running) or "")
            assert "goes on with the certificate it has" in running.log()
            assert served(running) == der(first.server)
            assert answers(old)

            shutil.copy(expired(second), live.server)
            shutil.copy(second.server_key, live.server_key)
            assert running.reload().returncode == 0  # nothing is wrong with the fragments
            assert "expired on" in (alarm(running) or "")
            assert served(running) == der(first.server)
            assert answers(old)

            shutil.copy(second.server, live.server)
            assert running.reload().returncode == 0
            assert alarm(running) is None
            assert served(running) == der(second.server)
            assert answers(old), "a connection was dropped for a new certificate"
            assert ask(running, "clients.show", id="device")["connected"]
