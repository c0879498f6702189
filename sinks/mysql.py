"""Rows of a table in MySQL or MariaDB: typed columns, a message delivered twice is stored once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from asyncmy import errors

from broker.connectors.mysql import BROKEN, GONE, MySqlPool, MySqlServer, describe, say
from broker.connectors.sql import Link, Lost
from broker.connectors.sql_rows import Cell, Row
from broker.connectors.sql_sink import Poison, TableConfig, TableSink, choose_key
from broker.extend.auth import BackendUnavailable
from broker.extend.registry import Backend
from broker.extend.sink import Fatal
from sinks._mysql_statements import Statements
from sinks._mysql_types import converter, length

_SIZES = (4096, 512, 64, 8, 1)  # rows of the statements that are prepared
_MOST_VALUES = 65_535  # of one statement: its protocol counts them in two bytes
_POISON = frozenset({1048, 1062, 1216, 1264, 1265, 1292, 1366, 1367, 1406, 1411, 1416, 1452, 1526, 1644, 1690, 3140,
                     3141, 3156, 3819, 3903, 4025})  # fmt: skip
"""A null, a value out of range or too long, no JSON, a CHECK, a foreign key, a trigger that says no."""
_LATER = frozenset({3, 1021, 1028, 1030, 1037, 1038, 1040, 1041, 1114, 1180, 1203, 1205, 1206, 1213, 1226, 1317, 1969,
                    3024})  # fmt: skip
"""No room, no memory, a lock, a deadlock, too late."""
_ELSEWHERE = frozenset({1290, 1792, 1836})
"""A server that only reads: after a switch another one is asked."""
_FATAL = frozenset({1044, 1045, 1046, 1049, 1054, 1064, 1142, 1143, 1146, 1227, 1347, 1348, 1364, 1471})
_ROW = re.compile(r"at row ([0-9]+)$")
_DUPLICATE = 1062
_OTHER = "another unique index holds such a row already"


class MysqlConfig(TableConfig, MySqlServer):
    """`[sinks.mysql]`"""


class Mysql(TableSink):
    """Reads the table's columns once, then one transaction of multi-row INSERTs for a batch. Row by row where a row is
    to be updated and could be found by another unique index than that of the key."""

    def __init__(self, config: MysqlConfig, pool: MySqlPool) -> None:
        super().__init__(config, pool)
        self._config = config
        schema, _, self._name = config.table.rpartition(".")
        self._schema = schema or None
        self._names = list(config.columns)
        self._key: tuple[str, ...] = ()
        self._look_again = self._singly = False
        self._sql = Statements(config.table, self._names, (), ())
        self._insert = self._sql.insert
        self._largest = 1 << 20

    async def _plan(self, link: Any, explain: bool) -> list[Cell]:
        config = self._config
        try:
            found, unique, other = await describe(link, self._schema, self._name)
            cells = self._cells_of(found)
            self._key = choose_key(config, unique)
            counted = {name for name, column in found.items() if "auto_increment" in column[3]} - set(self._names)
            self._look_again = bool(self._key) and any(
                index != frozenset(self._key) and not index & counted for index in [*unique, *other]
            )
            rest = [name for name in self._names if name not in self._key]
            changed = rest if config.on_conflict == "update" else []
            self._sql = Statements(config.table, self._names, self._key, changed)
            # two rows may be meant, and MySQL would change the one whose index it looks at first
            self._singly = bool(changed) and self._look_again
            plain = self._singly or config.on_conflict == "error"
            self._insert = self._sql.insert if plain else self._sql.upsert
            [[self._largest]] = await link.ask("SELECT @@max_allowed_packet")
            if explain:  # which also looks at the rights
                await link.ask(f"EXPLAIN {self._insert(1)}", (None,) * len(cells))
                if self._singly:
                    await link.ask(f"EXPLAIN {self._sql.update()}", (None,) * len(cells))
        except (errors.MySQLError, *BROKEN) as error:
            raise self._sorted(error, link, 0) from None
        return cells

    def _cells_of(self, found: dict[str, Any]) -> list[Cell]:
        table = self._config.table
        if not found:
            raise Fatal(f"there is no table {table}, or it is not ours to see")
        cells = []
        for name, template in self._config.columns.items():
            if name not in found:
                raise Fatal(f"table {table} has no column {name}: add it or change `columns`")
            kind, whole_type, nullable, extra = found[name]
            if "GENERATED" in extra.upper() and "DEFAULT_GENERATED" not in extra.upper():
                raise Fatal(f"the database itself makes the values of column {name} of table {table}")
            required = nullable == "NO" and "auto_increment" not in extra
            cells.append(Cell(name, template, converter(kind, whole_type, template), required))
        return cells

    async def _put(self, link: Any, rows: Sequence[Row]) -> None:
        parts = list(self._parts(rows))
        together = len(parts) > 1 or self._look_again
        start = 0
        try:
            if together:
                await link.driver.begin()
            try:
                for part in parts:
                    if self._singly:
                        await self._put_one(link, part[0], start)
                    else:
                        await self._put_part(link, part, start)
                    start += len(part)
                if together:
                    await link.driver.commit()
            except (Poison, errors.MySQLError):
                await link.driver.rollback()
                raise
        except (errors.MySQLError, *BROKEN) as error:
            raise self._sorted(error, link, start) from None

    async def _put_part(self, link: Any, part: Sequence[Row], start: int) -> None:
        statement = await link.prepared(self._insert(len(part)))
        result = await statement.execute([value for row in part for value in row])
        if self._look_again and result.affected_rows < len(part):
            await self._must_be_there(link, part, start)

    async def _put_one(self, link: Any, row: Row, position: int) -> None:
        """A new row, or the one of its key is changed. Poison where another unique index holds what it should hold."""
        try:
            await (await link.prepared(self._insert(1))).execute(list(row))
            return
        except errors.MySQLError as error:
            if _code(error) != _DUPLICATE:
                raise
        values = dict(zip(self._names, row, strict=True))
        keys = [values.pop(name) for name in self._key]
        try:
            result = await (await link.prepared(self._sql.update())).execute([*values.values(), *keys])
        except errors.MySQLError as error:
            if _code(error) != _DUPLICATE:
                raise
            raise Poison(f"{_OTHER}: {say(error)}", position) from None
        if not result.affected_rows:  # nothing new, or no such row
            await self._must_be_there(link, [row], position)

    def _parts(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Parts of as many rows as there are statements for, each below the server's largest packet."""
        sizes = [1] if self._singly else [size for size in _SIZES if size * len(self._names) <= _MOST_VALUES]
        lengths = [sum(map(length, row)) for row in rows]
        room = self._largest - 4096 - 16 * len(self._names) * sizes[0]
        start = 0
        while start < len(rows):
            size = next(size for size in sizes if size <= len(rows) - start)
            while size > 1 and sum(lengths[start : start + size]) > room:
                size = sizes[sizes.index(size) + 1]
            if size == 1 and lengths[start] > self._largest - 1024:
                raise Poison(f"{lengths[start]} bytes are more than the server's max_allowed_packet", start)
            yield rows[start : start + size]
            start += size

    async def _must_be_there(self, link: Any, part: Sequence[Row], start: int) -> None:
        """Poison for a row whose key is not in the table: another unique index refused it, silently."""
        places = [self._names.index(name) for name in self._key]
        keys = [[row[i] for i in places] for row in part]
        [[there]] = await link.ask(self._sql.count(len(part)), [value for key in keys for value in key])
        if there == len(set(map(tuple, keys))):
            return
        for number, key in enumerate(keys):
            if not await link.ask(self._sql.find(), key):
                raise Poison(_OTHER, start + number)

    def _sorted(self, error: BaseException, link: Link, start: int) -> Exception:
        where = f"MySQL at {link.place}: {say(error)}"
        code = _code(error)
        if not isinstance(error, errors.MySQLError) or isinstance(error, errors.InterfaceError):
            return Lost(where)
        if code in GONE or code in _ELSEWHERE:
            return Lost(where)
        if code in _POISON:
            row = _ROW.search(say(error))
            return Poison(say(error), start + int(row[1]) - 1 if row else None)
        if code in _LATER:
            return BackendUnavailable(where)
        return Fatal(f"{where} ({self._config.table})") if code in _FATAL else RuntimeError(where)


def _code(error: BaseException) -> int:
    return error.args[0] if error.args and isinstance(error.args[0], int) else 0


async def open_mysql(config: MysqlConfig) -> Mysql:
    return Mysql(config, MySqlPool(config, size=config.lanes + 1, timeout=config.timeout, writes=True))


BACKEND = Backend("sinks.mysql", MysqlConfig, open_mysql, extra="mysql")
