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
        # rows are numbered as they come, so the oldest are found without an index on the time
        oldest = f'SELECT rowid FROM "{table}" ORDER BY rowid LIMIT ?'
        first = f'SELECT rowid AS number, "{when}" AS moment FROM "{table}" ORDER BY rowid LIMIT ?'
        self._by_age = f'DELETE FROM "{table}" WHERE rowid IN (SELECT number FROM ({first}) WHERE moment < ?)'
        self._by_size = f'DELETE FROM "{table}" WHERE rowid IN ({oldest})'
        self._refused = False

    def prepare(self, db: sqlite3.Connection) -> None:
        """A new file learns to give room back."""
        if self._max_age or self._max_bytes:
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")

    def verify(self, db: sqlite3.Connection) -> None:
        """Raises sqlite3.Error where the statements do not fit the table."""
        if self._max_age:
            db.execute(f"EXPLAIN {self._by_age}", (0, 0))
        if self._max_bytes:
            db.execute(f"EXPLAIN {self._by_size}", (0,))

    def trim(self, db: sqlite3.Connection, stored: int) -> None:
        """After so many rows were stored. A table that does not let rows go is written to all the same."""
        most = max(_LEAST, 2 * stored)
        removed = 0
        try:
            if self._max_age:
                moment = int((time.time() - self._max_age) * 1000)
                removed = db.execute(self._by_age, (most, moment)).rowcount
            if self._max_bytes and removed < most and self._size(db) > self._max_bytes:
                removed += db.execute(self._by_size, (most - removed,)).rowcount
        except sqlite3.IntegrityError as error:
            if not self._refused:
                _log.warning("old rows cannot be removed: %s", error)
            self._refused = True
        if removed:
            db.execute(f"PRAGMA incremental_vacuum({_PAGES})").fetchall()

    @staticmethod
    def _size(db: sqlite3.Connection) -> int:
        (pages,), (free,), (size,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size  # type: ignore[no-any-return]
