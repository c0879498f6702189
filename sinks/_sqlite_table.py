"""A table in an SQLite file: its names, its declaration, its statement, what fits into a cell, what it refuses."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from broker.config.template import Placeholder, Template
from broker.connectors.sql_rows import Cell, Row
from broker.extend.sink import Fatal, NotConnected

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_INTEGERS = {"ts", "qos", "retain"}
_ANY_TYPE = {"payload", "correlation_data"}  # stored as what it is: TEXT, BLOB, INTEGER, REAL
_PLAIN: set[type] = {str, int, float, bool, type(None)}
_POISON = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
_LATER = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_SCHEMA,
}  # fmt: skip


class Table:
    """Knows the statements; every method but `sorted` is told the connection."""

    def __init__(self, path: object, name: str, columns: Mapping[str, Template]) -> None:
        value = Value()
        self.cells = [Cell(column, template, value, False) for column, template in columns.items()]
        self._path = path
        self._name = name
        self._columns = columns
        self._key = next((column for column, template in columns.items() if template.text == "${msgid}"), None)
        self._insert = insert(name, list(columns), self._key)

    def create(self, db: sqlite3.Connection) -> None:
        """Where it is not there."""
        columns = ", ".join(declare(name, template, name == self._key) for name, template in self._columns.items())
        db.execute(f'CREATE TABLE IF NOT EXISTS "{self._name}" ({columns})')

    def verify(self, db: sqlite3.Connection) -> bool:
        """Whether it is there. Fatal names the first column it lacks; sqlite3.Error when the key is not unique."""
        there = {row[1].lower() for row in db.execute(f'PRAGMA table_info("{self._name}")')}
        missing = [name for name in self._columns if name.lower() not in there]
        if there and missing:
            raise Fatal(f"table {self._name} in {self._path} has no column {missing[0]}: add it or change `columns`")
        if there:
            db.execute(f"EXPLAIN {self._insert}", (None,) * len(self.cells))
        return bool(there)

    def store(self, db: sqlite3.Connection, positions: Sequence[int], ready: Sequence[Row]) -> dict[int, str]:
        """Into a transaction, which is open afterwards: all at once; one by one when a row is refused, so that the
        others are stored. Answers the refused ones."""
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(self._insert, ready)
            return {}
        except Exception as error:
            if not is_poison(error):
                raise
        refused: dict[int, str] = {}
        while not self._store_each(db, positions, ready, refused):
            pass
        return refused

    def _store_each(
        self, db: sqlite3.Connection, positions: Sequence[int], ready: Sequence[Row], refused: dict[int, str]
    ) -> bool:
        """Anew, without the refused. False after one whose refusal took the rows before it along, as RAISE(ROLLBACK)
        does."""
        db.rollback()
        db.execute("BEGIN IMMEDIATE")
        for position, row in zip(positions, ready, strict=True):
            if position in refused:
                continue
            try:
                db.execute(self._insert, row)
            except Exception as error:
                if not is_poison(error):
                    raise
                refused[position] = f"{self._name}: {error}"
                if not db.in_transaction:
                    return False
        return True

    def sorted(self, error: sqlite3.Error) -> Exception:
        """What the sink raises for it."""
        code = getattr(error, "sqlite_errorcode", 1) & 0xFF
        if code in _LATER:
            return NotConnected(f"{self._path}: {error}")
        if "ON CONFLICT clause does not match" in str(error):
            table, key = self._name, self._key
            return Fatal(f"{key} of table {table} is not unique: CREATE UNIQUE INDEX {table}_{key} ON {table}({key})")
        return Fatal(f"{self._path}: table {self._name}: {error}")


def identifier(name: str) -> str:
    """The name as it is; ValueError when it is none."""
    if not _IDENTIFIER.fullmatch(name) or name.lower().startswith("sqlite_"):
        raise ValueError(f"{name!r} is not a name for a table or column: letters, digits and _, at most 63")
    return name


def insert(table: str, columns: list[str], key: str | None) -> str:
    """The statement that stores one row, once per value of the column `key`."""
    names = ", ".join(f'"{name}"' for name in columns)
    again = f' ON CONFLICT("{key}") DO NOTHING' if key else ""  # OR IGNORE would also hide NOT NULL and CHECK
    return f'INSERT INTO "{table}" ({names}) VALUES ({", ".join("?" * len(columns))}){again}'


def declare(name: str, template: Template, key: bool) -> str:
    """A column of CREATE TABLE whose affinity leaves the template's values as they are."""
    only = template.segments[0] if len(template.segments) == 1 else None
    root = only.root if isinstance(only, Placeholder) else ""
    kind = "INTEGER" if root in _INTEGERS else "" if root in _ANY_TYPE else "TEXT"
    return f'"{name}" {kind}'.strip() + (" PRIMARY KEY" if key else "")


class Value:
    """Text where the bytes are UTF-8, a BLOB where they are not; lists and objects as JSON."""

    def __call__(self, value: Any) -> Any:
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value
        return orjson.dumps(value).decode() if isinstance(value, dict | list) else value

    def fits(self, kinds: set[type], values: list[Any]) -> bool:
        """Whether all of these are what they would be converted to."""
        return kinds <= _PLAIN


def is_poison(error: Exception) -> bool:
    """Whether the row is to blame, and would be at every further try."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return isinstance(error, sqlite3.DataError | sqlite3.InterfaceError) if code is None else code & 0xFF in _POISON
    return isinstance(error, OverflowError | UnicodeError | ValueError)
