"""A table in SQL: its names, its declaration, its statement, what fits into a cell."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

import orjson

from broker.config.template import Placeholder, Template

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_INTEGERS = {"ts", "qos", "retain"}
_ANY_TYPE = {"payload", "correlation_data"}  # stored as what it is: TEXT, BLOB, INTEGER, REAL
_PLAIN: set[type] = {str, int, float, bool, type(None)}
_POISON = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}


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
