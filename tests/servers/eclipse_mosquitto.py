"""Eclipse mosquitto, the other broker."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from tests.servers.authority import Certificates
from tests.servers.containers import Container, docker_answers
from tests.servers.processes import Absent, Server, accepts, folder, free_port, program


@dataclass
class Mosquitto(Server):
    """A mosquitto broker with its own configuration file; sessions survive `stop` with `persistence`, `log` tells each
    packet."""

    port: int
    url: str
    host: str = "127.0.0.1"
    username: str | None = None
    password: str | None = None
    tls_port: int | None = None
    what: ClassVar[str] = "mosquitto"

    def answers(self) -> bool:
        return accepts(self.port)


@contextlib.contextmanager
def mosquitto(
    *,
    port: int | None = None,
    username: str | None = None,
    password: str | None = None,
    connection: str = "",
    extra: str = "",
    tls: Certificates | None = None,
    tls_extra: str = "",
    persistence: bool = False,
    verbose: bool = True,
) -> Iterator[Mosquitto]:
    """A mosquitto on a free port.

    `username`/`password` are then required of every client; `connection` holds whole `connection NAME` blocks for its
    bridges (appended last); `extra` holds global options; `tls` adds a TLS listener, `tls_extra` its options;
    `persistence` keeps sessions over `stop` and `start`.
    """
    given = os.environ.get("TEST_MOSQUITTO")
    if given and not any((port, username, connection, extra, tls, persistence)):
        parts = urlsplit(given)
        yield Mosquitto(parts.port or 1883, given, parts.hostname or "127.0.0.1", parts.username, parts.password)
        return
    binary = program("mosquitto")
    port = port or free_port()
    server = Mosquitto(port, f"mqtt://127.0.0.1:{port}", username=username, password=password)
    if binary is None:
        if any((username, connection, extra, tls, persistence)) or not docker_answers():
            raise Absent("mosquitto is not installed (make servers), TEST_MOSQUITTO unset, no Docker engine answers")
        container = Container("mosquitto", MOSQUITTO_PORT=str(port))
        try:
            yield server
        finally:
            container.remove()
        return
    with folder("mosquitto") as where:
        lines = ["per_listener_settings false", "log_type all", "connection_messages true"]
        if os.geteuid() == 0:
            lines.append("user root")  # else it gives up the rights to read its own folder
        if username is not None:
            tool = program("mosquitto_passwd")
            assert tool is not None, "mosquitto_passwd is missing beside mosquitto"
            subprocess.run(
                [tool, "-b", "-c", where / "passwords", username, password or ""], check=True, capture_output=True
            )
            lines += ["allow_anonymous false", f"password_file {where}/passwords"]
        else:
            lines.append("allow_anonymous true")
        if persistence:
            lines += ["persistence true", f"persistence_location {where}/", "autosave_interval 1"]
        lines += [extra] if extra else []
        lines.append(f"listener {port} 127.0.0.1")
        if tls is not None:
            server.tls_port = free_port()
            lines += [f"listener {server.tls_port} 127.0.0.1", f"cafile {tls.ca}", f"certfile {tls.server}",
                      f"keyfile {tls.server_key}", tls_extra]  # fmt: skip
        lines += [connection] if connection else []
        conf = where / "mosquitto.conf"
        conf.write_text("\n".join(lines) + "\n")
        with server._running([binary, "-c", str(conf), *(["-v"] if verbose else [])], where / "log"):
            yield server
