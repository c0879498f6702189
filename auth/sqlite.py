"""Users and rights in an SQLite file on this machine: EMQ's tables, EMQX's, or a query of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from pydantic import Field

from auth._crew import Closed, Crew
from auth._sql import SqlAuth, SqlConfig
from broker.access.passwords import BadHash, Hash, describes_itself
from broker.config.types import ConfigPath, Duration
from broker.connectors.sql_text import Dialect, Refused, Rows, Statement
from broker.extend.auth import Account, AccountError, BackendUnavailable
from broker.extend.registry import Backend

T = TypeVar("T")

STEPS = 10_000
"""Instructions of SQLite between looks at the clock; well under a millisecond."""

LOCKED = 10.0
"""Seconds an edit of an account waits for others who write."""

_EMQ = """
create table if not exists mqtt_user (id integer primary key, username text not null unique, password text,
    salt text, is_superuser integer not null default 0, created text default current_timestamp);
create table if not exists mqtt_acl (id integer primary key, allow integer not null default 1, ipaddr text,
    username text, clientid text, access integer not null, topic text not null);
create index if not exists mqtt_acl_username on mqtt_acl (username);
create index if not exists mqtt_acl_clientid on mqtt_acl (clientid);
create index if not exists mqtt_acl_ipaddr on mqtt_acl (ipaddr);
"""
_EMQX = """
create table if not exists mqtt_user (id integer primary key, username text not null unique, password_hash text,
    salt text not null default '', is_superuser integer not null default 0, created text default current_timestamp);
create table if not exists mqtt_acl (id integer primary key, ipaddress text, permission text not null,
    action text not null, username text, clientid text, topic text not null, qos text, retain integer);
create index if not exists mqtt_acl_username on mqtt_acl (username);
"""
_SCHEMAS = {"emq": _EMQ, "emqx": _EMQX}


class SqliteConfig(SqlConfig):
    """`[auth.sqlite]`"""

    path: ConfigPath
    """The file. It may be replaced while the broker runs."""
    create: bool = False
    """Makes the file and the tables of `tables` when they are not there."""
    watch: Annotated[Duration, Field(le=3_600)] = 0.5
    """Seconds between looks whether somebody changed the file; then remembered verdicts and rights are read again at
    once. 0: they are read again after `cache_ttl` and `refresh`."""

    dialect: ClassVar[Dialect] = "sqlite"

    def accounts(self) -> SqliteAccounts:
        """What ``isthmus user`` edits."""
        if self.authenticate is not None:
            raise AccountError("authenticate is a statement of its own, whose table is not known; edit that table")
        return SqliteAccounts(self)


class SqliteAccounts:
    """`broker.extend.auth.Accounts` in the table `mqtt_user`."""

    def __init__(self, config: SqliteConfig) -> None:
        self._path = config.path
        self._create = _SCHEMAS[config.tables] if config.create else None
        self._password = "password" if config.tables == "emq" else "password_hash"
        self._salt = None if config.tables == "emq" else ""

    def __str__(self) -> str:
        return str(self._path)

    def users(self) -> list[Account]:
        with self._open() as connection:
            rows = connection.execute(
                f"select username, {self._password}, is_superuser from mqtt_user order by username"
            ).fetchall()
        return [Account(str(name), _scheme(hash), superuser in (1, "1", "true")) for name, hash, superuser in rows]

    def add(self, name: str, hash: str) -> None:
        with self._open() as connection:
            if connection.execute("select 1 from mqtt_user where username = ?", (name,)).fetchone():
                raise AccountError(f"there is a user {name!r} already")
            connection.execute(
                f"insert into mqtt_user (username, {self._password}, salt) values (?, ?, ?)", (name, hash, self._salt)
            )

    def passwd(self, name: str, hash: str) -> None:
        with self._open() as connection:
            changed = connection.execute(
                f"update mqtt_user set {self._password} = ?, salt = ? where username = ?", (hash, self._salt, name)
            )
            _one(changed.rowcount, name)

    def delete(self, name: str) -> None:
        with self._open() as connection:
            _one(connection.execute("delete from mqtt_user where username = ?", (name,)).rowcount, name)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction, committed at the end."""
        try:
            if self._create is not None:
                _make(self._path, self._create, LOCKED)
            url = f"{self._path.as_uri()}?mode=rw"
            with contextlib.closing(sqlite3.connect(url, uri=True, timeout=LOCKED, isolation_level=None)) as connection:
                connection.execute("begin immediate")
                yield connection
                connection.execute("commit")
        except sqlite3.Error as error:
            raise AccountError(f"{self._path}: {error}") from None


def _one(count: int, name: str) -> None:
    if not count:
        raise AccountError(f"there is no user {name!r}")


def _scheme(stored: object) -> str:
    text = stored.decode("utf-8", "replace") if isinstance(stored, bytes) else str(stored or "")
    try:
        return Hash(text).scheme if describes_itself(text) else "as password_hash says"
    except BadHash:
        return "damaged"


class SqliteFile:
    """A few threads, each with a connection while it works. What is late or no longer wanted is interrupted."""

    def __init__(self, path: Path, *, size: int, timeout: float, writes: bool = False) -> None:
        self._path = path
        self._timeout = timeout
        self._mode = "rw" if writes else "ro"
        self._crew = Crew(size, "sqlite")
        self._idle: list[_Open] = []
        self._watching: _Open | None = None
        self._looking = False
        self._closed = False

    async def fetch(self, statement: Statement, values: Sequence[str | None]) -> Rows:
        """One statement. Raises Refused, BackendUnavailable."""
        job = _Job(time.monotonic() + self._timeout)
        try:
            return await self._run(lambda: self._fetch(job, statement, values))
        finally:
            job.wanted = False

    async def create(self, schema: str) -> None:
        """Make the file and what `schema` names. Raises BackendUnavailable."""
        await self._run(lambda: self._create(schema))

    async def version(self) -> object:
        """Something else whenever another connection changed the file or the file is another; None: it cannot be
        read. Not to be called twice at once."""
        return await self._run(self._version)

    async def close(self) -> None:
        self._closed = True
        self._crew.close()
        while self._idle:
            self._idle.pop().connection.close()
        if not self._looking:
            self._look_no_more()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await self._crew.do(work)
        except Closed:
            raise BackendUnavailable(f"{self._path} was closed") from None

    def _fetch(self, job: _Job, statement: Statement, values: Sequence[str | None]) -> Rows:
        opened: _Open | None = None
        try:
            opened = self._take()
            opened.connection.set_progress_handler(job.over, STEPS)
            cursor = opened.connection.execute(statement.sql, tuple(values))
            rows = cursor.fetchall()
            columns = tuple(str(column[0]).lower() for column in cursor.description or ())
            if not self._closed:
                self._idle.append(opened)
                opened = None
            return Rows(columns, rows)
        except UnicodeEncodeError as error:
            raise Refused(str(error)) from None
        except sqlite3.Error as error:
            if job.over():
                raise BackendUnavailable(f"{self._path}: no answer in {self._timeout:g} s") from None
            raise BackendUnavailable(f"{self._path}: {error} ({statement.text[:80]!r})") from None
        finally:
            if opened is not None:
                opened.connection.close()

    def _take(self) -> _Open:
        inode = _inode(self._path)
        while self._idle:
            try:
                opened = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            if opened.inode == inode:
                return opened
            opened.connection.close()
        return self._open(self._mode)

    def _open(self, mode: str) -> _Open:
        inode = _inode(self._path)
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode={mode}",
            uri=True,
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        return _Open(connection, inode)

    def _create(self, schema: str) -> None:
        try:
            _make(self._path, schema, self._timeout)
        except (OSError, sqlite3.Error) as error:
            raise BackendUnavailable(f"{self._path} cannot be made: {error}") from None

    def _version(self) -> object:
        self._looking = True
        inode = _inode(self._path)
        try:
            if self._watching is None or self._watching.inode != inode:
                self._look_no_more()
                if inode is None:
                    return None
                self._watching = self._open("ro")
            (number,) = self._watching.connection.execute("pragma data_version").fetchone()
            return inode, id(self._watching), number
        except sqlite3.Error:
            return None
        finally:
            self._looking = False
            if self._closed:
                self._look_no_more()

    def _look_no_more(self) -> None:
        opened, self._watching = self._watching, None
        if opened is not None:
            opened.connection.close()


class _Open:
    """A connection, and which file it was opened on."""

    __slots__ = ("connection", "inode")

    def __init__(self, connection: sqlite3.Connection, inode: tuple[int, int] | None) -> None:
        self.connection = connection
        self.inode = inode


class _Job:
    __slots__ = ("deadline", "wanted")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.wanted = True

    def over(self) -> int:
        return int(not self.wanted or time.monotonic() > self.deadline)


class Sqlite(SqlAuth):
    """Asks the file; notices when somebody changed it."""

    def __init__(self, config: SqliteConfig, file: SqliteFile) -> None:
        super().__init__(config, file)
        self._file = file
        self.on_change: Callable[[str | None], object] | None = None
        """Told that anybody's rights may have changed."""
        self._watcher: asyncio.Task[None] | None = None
        if config.watch:
            self._watcher = asyncio.get_running_loop().create_task(self._watch(config.watch), name="sqlite changes")

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher}, timeout=1.0)
        await super().close()

    async def _watch(self, seconds: float) -> None:
        seen = await self._file.version()
        while True:
            await asyncio.sleep(seconds)
            version = await self._file.version()
            if version != seen and version is not None:
                seen = version
                if self.on_change is not None:
                    self.on_change(None)


async def open_sqlite(config: SqliteConfig) -> Sqlite:
    writes = config.upgrade_to is not None
    file = SqliteFile(config.path, size=config.pool, timeout=config.timeout or 3.0, writes=writes)
    if config.create:
        await file.create(_SCHEMAS[config.tables])
    return Sqlite(config, file)


def _make(path: Path, schema: str, timeout: float) -> None:
    """The file and its tables, where they are not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    with contextlib.closing(sqlite3.connect(path, timeout=timeout, isolation_level=None)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.executescript(schema)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


BACKEND = Backend("auth.sqlite", SqliteConfig, open_sqlite)
