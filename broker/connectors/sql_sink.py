"""Tables in a database server that records are stored in: what the sinks of PostgreSQL and MySQL have in common.

A batch is stored at once. When the database refuses it because of a row, the batch is taken apart: every part is a
transaction of its own, in order, until the rows to blame stand alone; all others are stored. A crash between two parts
makes the broker deliver the stored ones again, which the unique index of the key turns into nothing.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from broker.config.template import Template
from broker.config.types import Duration
from broker.connectors.sql import Link, Rejected, SqlPool
from broker.connectors.sql_rows import Cell, Row, rows
from broker.extend.auth import BackendUnavailable
from broker.extend.record import RecordTemplate
from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record, SinkConfig

_NAME = re.compile(r"[^\x00-\x1f\x7f\"`.]{1,63}")
_DEFAULT = {"msgid": "msgid", "time": "ts", "clientid": "clientid", "username": "username", "topic": "topic",
            "payload": "payload"}  # fmt: skip
_RENEWED = frozenset({"ts", "ts_iso"})
_NO_TELLING = "the time of arrival, which is another when an event is published again; take one from the payload"
_ONE_BY_ONE = 8  # rows in a part below which halving it takes longer than trying each
_HINTS = 16  # times the database is believed which row of a batch it was: where all are bad, halving is shorter


class TableConfig(SinkConfig):
    """The keys of every sink whose records become rows of a table that is there already."""

    table: str = Field(min_length=1)
    """The table, `NAME` or `SCHEMA.NAME`. It must be there."""
    columns: dict[str, RecordTemplate] = Field(
        min_length=1, default={name: Template(f"${{{value}}}") for name, value in _DEFAULT.items()}
    )
    """Column -> template of its value, converted to the column's type. What a message does not have is NULL; where the
    column is NOT NULL the record is a dead letter, like one whose value does not fit."""
    key: tuple[str, ...] = ()
    """Columns whose unique index decides whether a row is there already. Default: the smallest unique index that
    holds the column which is exactly `${msgid}`, so that a message delivered twice is stored once."""
    on_conflict: Literal["ignore", "update", "error"] = "ignore"
    """What happens to a row whose key is there already: ignore | update (the latest value wins) | error (a dead letter,
    also where the message was only delivered twice). Without a key, `ignore` looks at every unique index."""
    timeout: Duration = Field(default=10.0, ge=0.1, le=600.0)
    """Seconds the database has to store a batch."""

    @field_validator("table")
    @classmethod
    def _check_table(cls, table: str) -> str:
        parts = table.split(".")
        if len(parts) > 2 or not all(map(_NAME.fullmatch, parts)):
            raise ValueError(f"{table!r} is not the name of a table; it cannot hold placeholders, quotes or blanks")
        return cls._check_name(parts[-1]) and table

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, Template]) -> dict[str, Template]:
        for name in columns:
            cls._check_name(name)
        return columns

    @staticmethod
    def _check_name(name: str) -> str:
        if not _NAME.fullmatch(name) or "${" in name:
            raise ValueError(f"{name!r} is not a name; a message cannot choose tables and columns")
        return name

    @model_validator(mode="after")
    def _check_key(self) -> TableConfig:
        for name in self.key:
            if name not in self.columns:
                raise ValueError(f"key: {name} is not one of the columns")
        if self.on_conflict == "update" and not self.key:
            raise ValueError('on_conflict = "update" needs a key, such as key = ["clientid"]')
        return self

    @property
    def msgid(self) -> str | None:
        """The column of the message id."""
        return next((name for name, template in self.columns.items() if template.text == "${msgid}"), None)

    @property
    def renewed(self) -> frozenset[str]:
        """Columns that are another each time the same event is published."""
        return frozenset(name for name, template in self.columns.items() if not _RENEWED.isdisjoint(template.names))

    def idempotency_problem(self) -> str | None:
        if self.msgid is None:
            return "no column is exactly `${msgid}`, which it takes the place of"
        if self.key and self.msgid not in self.key:
            return f"key does not hold {self.msgid}, the column of `${{msgid}}`, which it takes the place of"
        if self.key and (renewed := self.renewed.intersection(self.key)):
            return f"key holds {min(renewed)}, {_NO_TELLING}"
        return None


class Poison(Exception):
    """A row, the one at position `at` if that is known, can never be stored; nothing of this part is."""

    def __init__(self, reason: str, at: int | None = None) -> None:
        super().__init__(reason)
        self.at = at


class TableSink:
    """Subclasses know the database: `_plan` reads the table, `_put` stores rows, both on a connection of the pool.

    They raise Lost, BackendUnavailable (later again), Fatal, and `_put` Poison.
    """

    def __init__(self, config: TableConfig, pool: SqlPool) -> None:
        self._table_config = config
        self._pool = pool
        self._cells: list[Cell] | None = None

    @abstractmethod
    async def _plan(self, link: Link, explain: bool) -> list[Cell]:
        """Find out how to write into the table; with `explain` the database is asked whether the statements work."""

    @abstractmethod
    async def _put(self, link: Link, rows: Sequence[Row]) -> None:
        """Store all or none."""

    async def write(self, batch: Sequence[Record]) -> None:
        if self._cells is None:
            self._cells = await self._run(lambda link: self._plan(link, False))
        positions, ready, failed = rows(self._cells, batch)
        for index, reason in (await self._store(ready)).items():
            failed[positions[index]] = f"{self._table_config.table}: {reason}"
        if failed:
            raise BatchFailed(dict(sorted(failed.items())))

    async def check(self) -> None:
        """Reads the table's columns anew and has the statements prepared; writes nothing."""
        self._cells = await self._run(lambda link: self._plan(link, True))

    async def close(self) -> None:
        await self._pool.close()

    async def _store(self, ready: list[Row]) -> dict[int, str]:
        refused: dict[int, str] = {}
        parts = [(0, len(ready), _HINTS)] if ready else []
        while parts:
            low, high, hints = parts.pop()
            poison = await self._try(ready[low:high])
            if poison is None:
                continue
            if high - low == 1:
                refused[low] = str(poison)
            elif poison.at is not None and hints and low + poison.at < high:
                bad = low + poison.at
                refused[bad] = str(poison)
                parts += [(start, end, hints - 1) for start, end in ((bad + 1, high), (low, bad)) if start < end]
            else:
                step = 1 if high - low <= _ONE_BY_ONE else (high - low + 1) // 2
                parts += [(start, min(start + step, high), 0) for start in range(low, high, step)][::-1]
        return refused

    async def _try(self, part: list[Row]) -> Poison | None:
        async def put(link: Link) -> Poison | None:
            try:
                await self._put(link, part)
            except Poison as poison:  # an answer like another: the connection is kept
                return poison
            return None

        return await self._run(put)  # type: ignore[no-any-return]

    async def _run(self, work: Callable[[Link], Awaitable[Any]]) -> Any:
        try:
            return await self._pool.run(work)
        except Rejected as error:
            raise Fatal(str(error)) from None
        except Fatal:
            self._cells = None  # the table is read anew when somebody corrected it
            raise
        except BackendUnavailable as error:
            raise NotConnected(str(error)) from None


def no_unique_index(table: str, columns: Sequence[str]) -> Fatal:
    """What to do where nothing keeps a message that comes twice from being stored twice."""
    names = ", ".join(columns)
    index = f"{table.rpartition('.')[2]}_{'_'.join(columns)}"
    return Fatal(f"({names}) of table {table} is not unique: CREATE UNIQUE INDEX {index} ON {table} ({names})")


def choose_key(config: TableConfig, unique: list[frozenset[str]]) -> tuple[str, ...]:
    """The columns of the unique index that decides about conflicts; none where only the database can tell.

    Raises Fatal when the wanted index is not there.
    """
    if config.on_conflict == "error":
        return ()
    if config.key:
        if frozenset(config.key) not in unique:
            raise no_unique_index(config.table, config.key)
        return config.key
    if config.msgid is None:
        return ()
    fitting = [index for index in unique if config.msgid in index and index <= config.columns.keys()]
    if not fitting:
        raise no_unique_index(config.table, (config.msgid,))
    if config.idempotency_key is not None:
        renewed = [min(index & config.renewed, default="") for index in fitting]
        if all(renewed):
            raise Fatal(f"idempotency_key: the unique index of table {config.table} holds {renewed[0]}, {_NO_TELLING}")
        fitting = [index for index, name in zip(fitting, renewed, strict=True) if not name]
    return min((len(index), tuple(sorted(index))) for index in fitting)[1]
