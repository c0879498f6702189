"""Rows of a table in an SQLite file: telemetry anyone can query, without a server."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from broker.config.template import Template
from broker.config.types import ConfigPath, Duration
from broker.connectors.sql_rows import rows
from broker.extend.record import RecordTemplate
from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record, SinkConfig
from sinks._sqlite_retention import Retention, Trimmer
from sinks._sqlite_table import Table, identifier

_CLOSE_WITHIN = 4.0


class SqliteConfig(SinkConfig):
    """`[sinks.sqlite]`"""

    path: ConfigPath
    """The database file; it is created, with its folder, when the first record is written."""
    table: str = "messages"
    """The table; created from `columns` if it is not there."""
    columns: dict[str, RecordTemplate] = Field(
        min_length=1,
        default={
            name: Template(f"${{{value}}}")
            for name, value in {"msgid": "msgid", "time": "ts", "clientid": "clientid", "username": "username",
                                "topic": "topic", "payload": "payload"}.items()
        },
    )  # fmt: skip
    """Column -> template of its value. The column that is exactly `${msgid}` is the primary key: a record that is
    delivered twice is stored once. Without one, it may be stored twice."""
    busy_timeout: Duration = 5.0
    """Seconds to wait for another process that is writing to the file."""
    retention: Retention = Retention()
    """Which rows are removed again: `{ max_age = "30d", max_bytes = "10GB" }`."""

    @field_validator("table")
    @classmethod
    def _table_is_identifier(cls, table: str) -> str:
        return identifier(table)

    @field_validator("columns")
    @classmethod
    def _columns_are_identifiers(cls, columns: dict[str, Template]) -> dict[str, Template]:
        if len({identifier(name).lower() for name in columns}) < len(columns):
            raise ValueError("two columns differ only in upper and lower case, which SQLite takes for the same")
        return columns

    @model_validator(mode="after")
    def _retention_fits(self) -> SqliteConfig:
        Trimmer(self.table, self.columns, self.retention)
        return self

    def idempotency_problem(self) -> str | None:
        if any(template.text == "${msgid}" for template in self.columns.values()):
            return None
        return "no column is exactly `${msgid}`, which it takes the place of"


class Sqlite:
    """One connection in one thread. The file is opened by the first write and again after every failure."""

    def __init__(self, config: SqliteConfig) -> None:
        self._config = config
        self._table = Table(config.path, config.table, config.columns)
        self._trimmer = Trimmer(config.table, config.columns, config.retention)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sqlite-{config.name}")
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._closed = False

    async def write(self, batch: Sequence[Record]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, batch)

    async def check(self) -> None:
        """Changes nothing: a file that is not there yet need only be creatable."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._check)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        db = self._db
        if db is not None:
            with suppress(sqlite3.Error):  # closed meanwhile
                db.interrupt()  # what is rolled back by this was not acknowledged
        closed = asyncio.get_running_loop().run_in_executor(self._thread, self._forget)
        await asyncio.wait([closed], timeout=_CLOSE_WITHIN)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # in the thread

    def _write(self, batch: Sequence[Record]) -> None:
        positions, ready, failed = rows(self._table.cells, batch)
        try:
            db = self._current() or self._open()
            refused = self._table.store(db, positions, ready)
            self._trimmer.trim(db, len(ready))
            if not db.in_transaction:  # the table holds on to its rows, and its refusal took those of the batch along
                refused = self._table.store(db, positions, ready)
            db.execute("COMMIT")
            failed |= refused
        except sqlite3.Error as error:
            self._forget()
            raise self._table.sorted(error) from error
        except BaseException:
            self._forget()
            raise
        if failed:
            raise BatchFailed(failed)

    def _current(self) -> sqlite3.Connection | None:
        """The open connection, unless somebody removed or replaced the file: rows in a removed file are lost."""
        if self._db is not None and _inode(self._config.path) != self._inode:
            self._forget()
        return self._db

    def _open(self) -> sqlite3.Connection:
        path = self._config.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotConnected(f"cannot create the folder of {path}: {error}") from error
        db = self._connect(f"{path.as_uri()}?mode=rwc")
        self._db = db
        self._trimmer.prepare(db)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        self._table.create(db)
        self._verify(db)
        self._inode = _inode(path)
        return db

    def _check(self) -> None:
        path = self._config.path
        if not path.exists():
            folder = next(parent for parent in path.parents if parent.exists())
            if not os.access(folder, os.W_OK | os.X_OK):
                raise Fatal(f"{path} cannot be created: no permission to write into {folder}")
            return
        db = None
        try:
            db = self._connect(f"{path.as_uri()}?mode=ro")
            self._verify(db)
        except sqlite3.Error as error:
            raise self._table.sorted(error) from error
        finally:
            if db is not None:
                db.close()
        if not os.access(path, os.W_OK):
            raise Fatal(f"no permission to write to {path}")

    def _connect(self, uri: str) -> sqlite3.Connection:
        return sqlite3.connect(
            uri, uri=True, timeout=self._config.busy_timeout, isolation_level=None, check_same_thread=False
        )

    def _verify(self, db: sqlite3.Connection) -> None:
        if self._table.verify(db):
            self._trimmer.verify(db)

    def _forget(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()  # rolls back what was not committed


async def open_sqlite(config: SqliteConfig) -> Sqlite:
    return Sqlite(config)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


BACKEND = Backend("sinks.sqlite", SqliteConfig, open_sqlite, one_process=True)
