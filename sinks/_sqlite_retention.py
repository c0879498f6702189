"""What an SQLite table does not keep: the oldest rows, a bounded number with each batch."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from broker.config.template import Template
from broker.config.types import Duration, Size

_log = logging.getLogger("sinks.sqlite")

_FIRST = -1 << 63
_ROUND = 86_400.0
"""Seconds after which rows that were passed over are looked at again: their time may have come."""
_LEAST = 1_000
_PAGES = 1_000
"""Pages given back to the file system with one batch."""


class Retention(BaseModel):
    """`retention = { … }`: which rows are removed, oldest first, at most twice as many as a batch brings (or 1000).
    They are removed with the batches: where none comes, nothing goes."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    max_age: Duration = 0.0
    """Seconds a row is kept, by the column that is exactly `${ts}`; 0 for ever. Rows without a time are kept."""
    max_bytes: Size = 0
    """Bytes the rows and indexes of the file may take; 0 for any number. A file made without a limit keeps its size on
    disk, and its free room is used again."""


class Trimmer:
    """Knows the statements; `prepare` before the table is made, `trim` inside the transaction of a batch."""

    def __init__(self, table: str, columns: Mapping[str, Template], retention: Retention) -> None:
        self._max_age = retention.max_age
        self._max_bytes = retention.max_bytes
        when = next((name for name, template in columns.items() if template.text == "${ts}"), None)
        if self._max_age and when is None:
            raise ValueError('retention.max_age needs a column that is exactly "${ts}"')
        # rows are numbered as they come, so the oldest are found without an index on the time, behind those that have
        # none or one that is to come: these are passed over, as a filter in the statement might look at the whole table
        oldest = f'SELECT rowid FROM "{table}" ORDER BY rowid LIMIT ?'
        first = f'SELECT rowid AS number, "{when}" AS moment FROM "{table}" WHERE rowid > ? ORDER BY rowid LIMIT ?'
        young = "min(CASE WHEN moment >= ? AND moment <= ? THEN number END)"
        self._look = f"SELECT max(number), {young} FROM ({first})"
        self._by_age = f'DELETE FROM "{table}" WHERE rowid > ? AND rowid <= ? AND "{when}" < ?'
        self._passed = _FIRST
        self._round = 0.0
        self._by_size = f'DELETE FROM "{table}" WHERE rowid IN ({oldest})'
        self._refused = False

    def prepare(self, db: sqlite3.Connection) -> None:
        """A new file learns to give room back; of one that was there nothing is known."""
        self._passed = _FIRST
        if self._max_age or self._max_bytes:
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")

    def verify(self, db: sqlite3.Connection) -> None:
        """Raises sqlite3.Error where the statements do not fit the table."""
        if self._max_age:
            db.execute(f"EXPLAIN {self._look}", (0, 0, 0, 0))
            db.execute(f"EXPLAIN {self._by_age}", (0, 0, 0))
        if self._max_bytes:
            db.execute(f"EXPLAIN {self._by_size}", (0,))

    def trim(self, db: sqlite3.Connection, stored: int) -> None:
        """After so many rows were stored. A table that does not let rows go is written to all the same."""
        most = max(_LEAST, 2 * stored)
        removed = 0
        try:
            if self._max_age:
                removed = self._trim_by_age(db, most)
            if self._max_bytes and removed < most and self._size(db) > self._max_bytes:
                removed += db.execute(self._by_size, (most - removed,)).rowcount
        except sqlite3.IntegrityError as error:
            if not self._refused:
                _log.warning("old rows cannot be removed: %s", error)
            self._refused = True
        if removed:
            db.execute(f"PRAGMA incremental_vacuum({_PAGES})").fetchall()

    def _trim_by_age(self, db: sqlite3.Connection, most: int) -> int:
        now = time.time()
        if not 0 <= now - self._round < _ROUND:
            self._passed, self._round = _FIRST, now
        oldest, latest = int((now - self._max_age) * 1000), int(now * 1000)
        last, young = db.execute(self._look, (oldest, latest, self._passed, most)).fetchone()
        if last is None:  # numbers begin again in a table that was emptied
            self._passed = _FIRST
            return 0
        removed = db.execute(self._by_age, (self._passed, last, oldest)).rowcount
        self._passed = last if young is None else young - 1
        return removed

    @staticmethod
    def _size(db: sqlite3.Connection) -> int:
        (pages,), (free,), (size,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size  # type: ignore[no-any-return]
