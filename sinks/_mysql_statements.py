"""The statements of one table in MySQL or MariaDB; values are bound, names are quoted."""

from __future__ import annotations

from collections.abc import Sequence


class Statements:
    """`key` decides about conflicts, `changed` are the columns that a row of this key then gets anew."""

    def __init__(self, table: str, names: Sequence[str], key: Sequence[str], changed: Sequence[str]) -> None:
        self._table = ".".join(map(_quoted, table.split(".")))
        self._names = [_quoted(name) for name in names]
        self._key = [_quoted(name) for name in key]
        self._changed = [_quoted(name) for name in changed]

    def insert(self, count: int) -> str:
        """So many rows; an error where a unique index has one of them."""
        row = f"({', '.join('?' * len(self._names))})"
        return f"INSERT INTO {self._table} ({', '.join(self._names)}) VALUES {', '.join([row] * count)}"

    def upsert(self, count: int) -> str:
        """So many rows; one that a unique index has is changed, or left alone."""
        # not INSERT IGNORE, which would hide values that do not fit
        same = (self._key or self._names)[0]
        news = [f"{name} = VALUES({name})" for name in self._changed] or [f"{same} = {same}"]
        return f"{self.insert(count)} ON DUPLICATE KEY UPDATE {', '.join(news)}"

    def update(self) -> str:
        """The row of one key; the values of `changed` come first."""
        news = ", ".join(f"{name} = ?" for name in self._changed)
        return f"UPDATE {self._table} SET {news} WHERE {self._meant()}"

    def count(self, keys: int) -> str:
        """How many of so many keys are there; what others stored since the transaction began counts, too."""
        marks = f"({', '.join('?' * len(self._key))})"
        wanted = ", ".join([marks] * keys)
        names = ", ".join(self._key)
        return f"SELECT COUNT(*) FROM {self._table} WHERE ({names}) IN ({wanted}) LOCK IN SHARE MODE"

    def find(self) -> str:
        """A row if one of this key is there, seen as by `count`."""
        return f"SELECT 1 FROM {self._table} WHERE {self._meant()} LIMIT 1 LOCK IN SHARE MODE"

    def _meant(self) -> str:
        return " AND ".join(f"{name} <=> ?" for name in self._key)


def _quoted(name: str) -> str:
    return f"`{name}`"
