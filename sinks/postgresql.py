"""Rows of a table in PostgreSQL, TimescaleDB too: typed columns, a message delivered twice is stored once."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any, Literal

from asyncpg import exceptions
from pydantic import model_validator

from broker.connectors import sql_values as to
from broker.connectors.postgresql import GONE, REMADE, PostgresPool, PostgresServer, describe, say
from broker.connectors.sql import Link, Lost
from broker.connectors.sql_rows import Cell, Row
from broker.connectors.sql_sink import Poison, TableConfig, TableSink, choose_key
from broker.extend.auth import BackendUnavailable
from broker.extend.registry import Backend
from broker.extend.sink import Fatal
from sinks._postgresql_types import TYPES

_AFTER_CONFLICT = 20  # batches for which rows that are there already are expected
_FEW = 500  # rows below which one statement is quicker than a transaction of four
_POISON = ("22", "23", "21000", "44000", "54000", "P0001")
_FATAL = ("0A", "28", "2F", "3D", "3F", "42")
_LATER = ("08", "40", "53", "55", "57", "58", "XX")
_ELSEWHERE = ("25006", "57P01", "57P02", "57P03", "57P05", "08")  # a standby after a switch, a server that goes down
_CHECKS = "ExecWithCheckOptions"  # refuses a row for the policies of a table, with the code of a missing right
_LINE = re.compile(r"COPY [^\n]*, line ([0-9]+)")


class PostgresqlConfig(TableConfig, PostgresServer):
    """`[sinks.postgresql]`"""

    mode: Literal["auto", "copy", "staging", "unnest"] = "auto"
    """How rows get into the table: `unnest` (one INSERT of arrays), `staging` (COPY into a temporary table, then
    INSERT … SELECT; needs the right to make temporary tables), `copy` (straight into the table; a message delivered
    twice is stored twice unless a unique index refuses it), `auto` (unnest below 500 rows, else copy as long as no row
    of a batch is there already, else staging)."""

    @model_validator(mode="after")
    def _copy_sees_no_conflicts(self) -> PostgresqlConfig:
        if self.mode == "copy" and self.on_conflict != "error":
            raise ValueError('mode = "copy" looks for no conflicts; write on_conflict = "error", or mode = "staging"')
        return self


class Postgresql(TableSink):
    """Reads the table's columns once, then one transaction for a batch."""

    def __init__(self, config: PostgresqlConfig, pool: PostgresPool) -> None:
        super().__init__(config, pool)
        self._config = config
        schema, _, self._name = config.table.rpartition(".")
        self._schema = schema or None
        self._table = ".".join(map(_quoted, config.table.split(".")))
        self._names = list(config.columns)
        self._staging = self._begin = self._merge = self._insert = ""
        self._key: list[int] = []
        self._straight, self._conflicts = False, 0

    async def _plan(self, link: Link, explain: bool) -> list[Cell]:
        config = self._config
        try:
            found, unique = await describe(link.driver, self._table)
            cells, sent, chosen = self._columns(found)
            key = choose_key(config, unique)
            update = config.on_conflict == "update"
            self._straight = config.mode == "auto" and not update and not any("::" in value for value in chosen)
            self._key = [self._names.index(name) for name in key] if update else []
            again = self._on_conflict(key)
            names = ", ".join(map(_quoted, self._names))
            declared = ", ".join(f"{_quoted(name)} {kind}" for name, kind in zip(self._names, sent, strict=True))
            self._staging = f"isthmus_{zlib.crc32(f'{self._table} {declared}'.encode()):08x}"
            self._begin = f"BEGIN; CREATE TEMP TABLE IF NOT EXISTS {self._staging} ({declared}) ON COMMIT DELETE ROWS"
            into = f"INSERT INTO {self._table} ({names}) SELECT {', '.join(chosen)} FROM"
            self._merge = f"{into} {self._staging}{again}; COMMIT"
            arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(sent, 1))
            self._insert = f"{into} unnest({arrays}) AS r({names}){again}"
            if explain:  # which also looks at the rights
                await link.driver.fetch(f"EXPLAIN {self._insert}", *([] for _ in sent))
        except (exceptions.PostgresError, *GONE) as error:
            raise self._sorted(error, link) from None
        return cells

    def _columns(self, found: dict[str, Any]) -> tuple[list[Cell], list[str], list[str]]:
        """What makes the values, what they are sent as, how they are cast."""
        table = self._config.table
        if not found:
            raise Fatal(f"there is no table {table}, or it is not ours to see")
        cells, sent, chosen = [], [], []
        for name, template in self._config.columns.items():
            if name not in found:
                raise Fatal(f"table {table} has no column {name}: add it or change `columns`")
            base, shown, required, generated = found[name]
            if generated:
                raise Fatal(f"the database itself makes the values of column {name} of table {table}")
            kind, convert = TYPES.get(base, ("", to.text_without_nul))
            if not kind and self._config.mode == "copy":
                raise Fatal(f'column {name} is {shown}, which cannot be copied: write mode = "staging"')
            if base in ("json", "jsonb") and not to.is_json_text(template):
                convert = to.json_value
            elif base == "bytea" and template.text == "${msgid}":
                convert = to.packed_hex
            cells.append(Cell(name, template, convert, required))
            sent.append(kind or "text")
            chosen.append(_quoted(name) if kind else f"{_quoted(name)}::{shown}")
        return cells, sent, chosen

    def _on_conflict(self, key: tuple[str, ...]) -> str:
        if self._config.on_conflict == "error":
            return ""
        target = f" ({', '.join(map(_quoted, key))})" if key else ""
        rest = [_quoted(name) for name in self._names if name not in key]
        if self._config.on_conflict == "ignore" or not rest:
            return f" ON CONFLICT{target} DO NOTHING"
        return f" ON CONFLICT{target} DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in rest)}"

    async def _put(self, link: Link, rows: Sequence[Row]) -> None:
        if self._key:  # one statement must not touch a row twice: the last one wins
            rows = list({tuple([row[i] for i in self._key]): row for row in rows}.values())
        mode = self._config.mode
        try:
            if mode == "copy":
                await self._copy(link.driver, rows)
            elif mode == "unnest" or (mode == "auto" and len(rows) < _FEW):
                await link.driver.fetch(self._insert, *zip(*rows, strict=True))
            elif not (self._straight and not self._conflicts and await self._copied(link.driver, rows)):
                self._conflicts = max(0, self._conflicts - 1)
                await self._stage(link.driver, rows)
        except (exceptions.PostgresError, *GONE) as error:
            raise self._sorted(error, link) from None

    async def _copy(self, driver: Any, rows: Sequence[Row]) -> None:
        await driver.copy_records_to_table(self._name, records=rows, columns=self._names, schema_name=self._schema)

    async def _copied(self, driver: Any, rows: Sequence[Row]) -> bool:
        """False when a row is there already, or COPY cannot write into this table: nothing is stored then."""
        try:
            await self._copy(driver, rows)
        except exceptions.UniqueViolationError:
            if self._config.on_conflict == "error":
                raise
            self._conflicts = _AFTER_CONFLICT
        except (exceptions.FeatureNotSupportedError, exceptions.WrongObjectTypeError):  # row security, a view
            self._straight = False
        else:
            return True
        return False

    async def _stage(self, driver: Any, rows: Sequence[Row]) -> None:
        try:
            await driver.execute(self._begin)
            await driver.copy_records_to_table(self._staging, records=rows, columns=self._names)
            await driver.execute(self._merge)
        except exceptions.PostgresError:
            await driver.execute("ROLLBACK")
            raise

    def _sorted(self, error: BaseException, link: Link) -> Exception:
        where = f"PostgreSQL at {link.place}: {say(error)}"
        state = getattr(error, "sqlstate", None) or ""
        if isinstance(error, (*REMADE, *GONE)) or state.startswith(_ELSEWHERE):
            return Lost(where)
        if state.startswith(_POISON) or getattr(error, "server_source_function", None) == _CHECKS:
            line = _LINE.search(getattr(error, "context", None) or "")
            return Poison(say(error), int(line[1]) - 1 if line and not self._key else None)
        if state.startswith(_LATER):
            return BackendUnavailable(where)
        return Fatal(f"{where} ({self._config.table})") if state.startswith(_FATAL) else RuntimeError(where)


def _quoted(name: str) -> str:
    return f'"{name}"'


async def open_postgresql(config: PostgresqlConfig) -> Postgresql:
    return Postgresql(config, PostgresPool(config, size=config.lanes + 1, timeout=config.timeout, writes=True))


BACKEND = Backend("sinks.postgresql", PostgresqlConfig, open_postgresql, extra="postgresql")
