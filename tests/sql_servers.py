"""Starts real PostgreSQL and MariaDB servers as `servers/` starts the others: loopback, a free port, a temporary
folder, never as root.

Found in this order: an address in the environment (TEST_POSTGRESQL=postgresql://USER:PASSWORD@HOST:PORT/DATABASE,
TEST_MARIADB=mysql://…; the user must be allowed to create databases), the programs on this machine. Where there is
neither, `servers.Absent` says why and `or_skip` turns that into a skip, or a failure for the services REQUIRE names.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pytest

from tests import servers
from tests.servers import Absent, Certificates, NotOurs, Process, accepts, folder, free_port, program

T = TypeVar("T")

PACKAGES = {"postgres": "postgresql", "mariadbd": "mariadb-server"}
"""Programs and the Debian packages that bring them."""
PASSWORD = "admin-pw"
_numbers = itertools.count(1)


@contextlib.contextmanager
def or_skip(service: str, start: Callable[..., contextlib.AbstractContextManager[T]], **options: Any) -> Iterator[T]:
    """The running server; a skip with the reason where it cannot be had, a failure when REQUIRE names it."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(start(**options))
        except Absent as error:
            if service in servers.required() and not isinstance(error, NotOurs):
                pytest.fail(f"REQUIRE names {service}: {error}", pytrace=False)
            pytest.skip(f"{service}: {error}")
        yield server


@dataclass
class SqlServer:
    """A database server and an administrator's way in."""

    scheme: str
    port: int
    user: str
    password: str
    host: str = "127.0.0.1"
    database: str = ""
    ca: Path | None = None
    """Only with certificates: TLS is then on."""
    stopping: signal.Signals = signal.SIGTERM
    _command: list[str] = field(default_factory=list)
    _log: Path | None = None
    _process: Process | None = None

    def dsn(self, database: str, port: int | None = None, user: str | None = None) -> str:
        """For a table of the broker's; `port` may be a proxy's."""
        return f"{self.scheme}://{user or self.user}@{self.host}:{port or self.port}/{database}"

    @property
    def pid(self) -> int:
        return self._ours().pid

    def _ours(self) -> Process:
        if self._process is None:
            raise NotOurs("this server was not started by the tests and cannot be stopped")
        return self._process

    def stop(self) -> None:
        """End the server; the data stays and `start` brings it back on the same port."""
        self._ours().stop(self.stopping)

    def start(self) -> None:
        if self._process is not None and self._process.popen.poll() is None:
            raise RuntimeError("it runs")
        assert self._log is not None
        self._process = Process(self._command, self._log)
        self._process.wait_until(self.answers, 20, self.scheme)

    def answers(self) -> bool:
        """Whether a session can be had."""
        if not accepts(self.port):
            return False
        try:
            return asyncio.run(asyncio.wait_for(self.execute("select 1"), 5)) is not None
        except Exception:
            return False

    async def execute(self, *texts: str, database: str | None = None) -> list[Any]:
        """Run statements as the administrator; the rows of the last one."""
        raise NotImplementedError

    async def create(self, *texts: str) -> str:
        """A new database with these statements run in it; answers its name."""
        name = f"isthmus_{os.getpid()}_{next(_numbers)}"
        await self.execute(f"create database {name}")
        await self.execute(*texts, database=name)
        return name


class Postgresql(SqlServer):
    async def execute(self, *texts: str, database: str | None = None) -> list[Any]:
        import asyncpg

        connection = await asyncpg.connect(
            host=self.host, port=self.port, user=self.user, password=self.password,
            database=database or self.database, ssl=False, timeout=5,
        )  # fmt: skip
        try:
            rows: list[Any] = []
            for text in texts:
                if re.match(r"\s*(select|show)\b", text, re.IGNORECASE):
                    rows = [tuple(row) for row in await connection.fetch(text)]
                else:
                    await connection.execute(text)
            return rows
        finally:
            connection.terminate()


class Mariadb(SqlServer):
    async def execute(self, *texts: str, database: str | None = None) -> list[Any]:
        import asyncmy

        connection = await asyncmy.connect(
            host=self.host, port=self.port, user=self.user, password=self.password, database=database,
            charset="utf8mb4", autocommit=True, connect_timeout=5,
        )  # fmt: skip
        try:
            rows: list[Any] = []
            async with connection.cursor() as cursor:
                for text in texts:
                    await cursor.execute(text)
                    rows = list(await cursor.fetchall()) if cursor.description else []
            return rows
        finally:
            await connection.ensure_closed()


@contextlib.contextmanager
def postgresql(*, tls: Certificates | None = None) -> Iterator[Postgresql]:
    """A PostgreSQL server whose users log in with SCRAM passwords."""
    given = os.environ.get("TEST_POSTGRESQL")
    if given and tls is None:
        yield _given(Postgresql, given, 5432)
        return
    initdb, postgres = _tool("initdb"), _tool("postgres")
    with _own_folder("postgresql") as (where, wrapper):
        (where / "pw").write_text(PASSWORD)
        (where / "pw").chmod(0o644)
        _run([*wrapper, initdb, "-D", where / "data", "-U", "postgres", "--auth-host=scram-sha-256", "--no-sync",
              "--auth-local=trust", f"--pwfile={where / 'pw'}", "-E", "UTF8", "--locale=C.UTF-8"], where)  # fmt: skip
        server = Postgresql("postgresql", free_port(), "postgres", PASSWORD, database="postgres")
        server.stopping = signal.SIGINT  # at once, without waiting for clients
        settings = {
            "listen_addresses": "127.0.0.1", "unix_socket_directories": str(where), "fsync": "off",
            "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200",
        }  # fmt: skip
        if tls is not None:
            settings |= _tls(tls, where, {"ssl": "on"}, "ssl_cert_file", "ssl_key_file", "ssl_ca_file")
            server.ca = tls.ca
        server._command = [*wrapper, postgres, "-D", str(where / "data"), "-p", str(server.port)]
        server._command += [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        yield from _running(server, where)


@contextlib.contextmanager
def mariadb(*, tls: Certificates | None = None) -> Iterator[Mariadb]:
    """A MariaDB server; `latin1` and case-blind as many old ones are, unless a table says otherwise."""
    given = os.environ.get("TEST_MARIADB")
    if given and tls is None:
        yield _given(Mariadb, given, 3306)
        return
    install, mariadbd = _tool("mariadb-install-db"), _tool("mariadbd")
    with _own_folder("mariadb") as (where, wrapper):
        _run([*wrapper, install, "--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db",
              f"--datadir={where / 'data'}"], where)  # fmt: skip
        server = Mariadb("mysql", free_port(), "root", "")
        server._command = [
            *wrapper, mariadbd, "--no-defaults", f"--datadir={where / 'data'}", f"--port={server.port}",
            "--bind-address=127.0.0.1", f"--socket={where / 's'}", f"--pid-file={where / 'pid'}", "--skip-name-resolve",
            "--skip-log-bin", "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=64M",
            "--max-connections=200",
        ]  # fmt: skip
        if tls is not None:
            files = _tls(tls, where, {}, "--ssl-cert", "--ssl-key", "--ssl-ca")
            server._command += [f"{key}={value}" for key, value in files.items()]
            server.ca = tls.ca
        yield from _running(server, where)


def _given(kind: type[T], url: str, port: int) -> T:
    parts = urlsplit(url)
    scheme = "postgresql" if parts.scheme.startswith("postgres") else "mysql"
    return kind(  # type: ignore[call-arg]
        scheme, parts.port or port, unquote(parts.username or ""), unquote(parts.password or ""),
        host=parts.hostname or "127.0.0.1", database=parts.path.strip("/"),
    )  # fmt: skip


def _running(server: Any, where: Path) -> Iterator[Any]:
    server._log = where / "log"
    server.start()
    try:
        yield server
    finally:
        server._process.stop(signal.SIGQUIT if server.scheme == "postgresql" else signal.SIGKILL)


@contextlib.contextmanager
def _own_folder(name: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder of the user the server runs as, and what to put before its commands: these servers refuse root."""
    with folder(name) as where:
        if os.geteuid() != 0:
            yield where, []
            return
        setpriv = program("setpriv")
        if setpriv is None:
            raise Absent("started as root, the server needs setpriv to become another user: apt-get install util-linux")
        nobody = pwd.getpwnam("nobody")
        os.chown(where, nobody.pw_uid, nobody.pw_gid)
        who = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--pdeathsig", "TERM"]
        yield where, [setpriv, *who]


def _tls(certs: Certificates, where: Path, settings: dict[str, str], *keys: str) -> dict[str, str]:
    """Copies that the server's user owns; `keys` name certificate, private key and authority."""
    owner = where.stat()
    for key, source in zip(keys, (certs.server, certs.server_key, certs.ca), strict=True):
        copy = where / f"tls-{source.name}"
        shutil.copy(source, copy)
        os.chown(copy, owner.st_uid, owner.st_gid)
        copy.chmod(0o600)
        settings[key] = str(copy)
    return settings


@functools.cache
def _tool(name: str) -> str:
    found = program(name)
    if found is None:
        places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
        found = str(places[-1]) if places else None
    if found is None:
        package = next((package for tool, package in PACKAGES.items() if tool[:7] in name), "postgresql")
        variable = "TEST_MARIADB" if "mariadb" in name else "TEST_POSTGRESQL"
        raise Absent(f"{name} is not installed (apt-get install {package}) and {variable} is not set")
    return found


def _run(command: Sequence[str | Path], where: Path) -> None:
    done = subprocess.run([str(word) for word in command], cwd=where, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{command[-1]} failed: {(done.stderr or done.stdout)[-500:]}")
