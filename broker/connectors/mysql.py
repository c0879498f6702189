"""MySQL and MariaDB through asyncmy. Statements are prepared by the server, values are bound in binary form."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

import asyncmy
from asyncmy import errors

from broker.config.types import Address
from broker.connectors.sql import Link, Lost, Refused, Rejected, Rows, SqlPool, SqlServer, Statement, Values
from broker.extend.auth import BackendUnavailable

__all__ = ["BROKEN", "GONE", "MySqlPool", "MySqlServer", "describe", "say"]

GONE = frozenset(
    {1053, 1077, 1079, 1152, 1153, 1158, 1159, 1160, 1161, 1243, 1615, 1927, 2002, 2003, 2006, 2013, 2055, 4031}
)
"""Server shutting down, connection killed or lost, statement no longer known."""
_UNFIT = frozenset({1267, 1270, 1271, 1292, 1366, 1406, 1525, 3854, 3988})
"""A value that the column's character set or type cannot hold."""
_NOT_LET_IN = frozenset({1044, 1045, 1049, 1698})
_LATE = frozenset({1317, 1969, 3024})
BROKEN = (
    OSError,
    errors.InterfaceError,
    RuntimeError,
    ValueError,
    LookupError,
    AssertionError,
    struct.error,
    AttributeError,
)
"""What the driver raises when the stream ends or makes no sense."""

_COLUMNS = (
    "SELECT column_name, data_type, column_type, is_nullable, extra FROM information_schema.columns "
    "WHERE table_schema = coalesce(?, database()) AND table_name = ?"
)
_UNIQUE = (
    "SELECT index_name, column_name, sub_part FROM information_schema.statistics "
    "WHERE table_schema = coalesce(?, database()) AND table_name = ? AND non_unique = 0"
)


class MySqlServer(SqlServer):
    """The keys of every table that talks to MySQL or MariaDB."""

    schemes: ClassVar[tuple[str, ...]] = ("mysql", "mariadb")
    port: ClassVar[int] = 3306


class MySqlPool(SqlPool):
    """Opens nothing before it is needed. Its sessions cannot write unless they are to."""

    def __init__(self, config: MySqlServer, *, size: int, timeout: float, writes: bool = False) -> None:
        super().__init__(self._link, config.servers, size=size, timeout=timeout, cooldown=config.cooldown)
        self._config = config
        self._ssl = config.context() if config.tls else None
        # each server reads only its own of the two comments; what we gave up, the server gives up too
        self._setup = [
            f"SET SESSION autocommit = 1 /*M!100101 , max_statement_time = {timeout:.3f} */"
            f" /*!50708 , max_execution_time = {int(timeout * 1000)} */",
            # strict: a value that does not fit is an error, not a warning and something else in the table
            "SET SESSION time_zone = '+00:00', sql_mode = concat(@@sql_mode, ',STRICT_ALL_TABLES,NO_ZERO_DATE')"
            if writes
            else "SET SESSION TRANSACTION READ ONLY",
        ]

    async def _link(self, place: Address) -> Link:
        config = self._config
        local = place.host.startswith("/")
        make: Any = asyncmy.connection.Connection  # without types
        connection = make(
            host=None if local else place.host,
            port=place.port,
            unix_socket=place.host if local else None,
            user=config.user,
            password=config.password.reveal().encode(),
            database=config.database,
            charset="utf8mb4",
            autocommit=None,
            connect_timeout=self._timeout,
            ssl=None if local else self._ssl,
        )
        whole = False
        try:
            await connection.connect()
            for text in self._setup:
                await connection.query(text)
            whole = True
        except errors.MySQLError as error:
            kind = Rejected if error.args and error.args[0] in _NOT_LET_IN else Lost
            raise kind(f"MySQL at {place}: {say(error)}") from None
        except BROKEN as error:
            raise Lost(f"MySQL at {place} cannot be reached: {say(error)}") from None
        finally:
            if not whole:
                connection.close()
        return _Connection(connection, place)


class _Connection:
    """One connection and what was prepared on it."""

    def __init__(self, connection: Any, place: Address) -> None:
        self.place = place
        self.driver = connection
        self._prepared: dict[str, Any] = {}

    async def fetch(self, statement: Statement, values: Values) -> Rows:
        try:
            for value in values:
                if value is not None:
                    value.encode()
            result = await (await self.prepared(statement.sql)).execute(tuple(values))
        except UnicodeEncodeError as error:
            raise Refused(str(error)) from None
        except errors.InterfaceError as error:
            raise Lost(f"MySQL at {self.place}: {say(error)}") from None
        except errors.MySQLError as error:
            raise _classified(error, statement, self.place) from None
        except BROKEN as error:
            raise Lost(f"MySQL at {self.place}: {say(error)}") from None
        columns = tuple(str(column[0]).lower() for column in result.description or ())
        return Rows(columns, result.rows or ())

    async def prepared(self, sql: str) -> Any:
        """The driver's statement, prepared by the first who asks for it."""
        found = self._prepared.get(sql)
        if found is None:
            found = self._prepared[sql] = await self.driver.prepare(sql)
        return found

    async def ask(self, sql: str, values: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
        """Rows of a statement of our own. The driver's errors are the caller's to sort."""
        return (await (await self.prepared(sql)).execute(tuple(values))).rows or ()

    def kill(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            transport = self.driver._transport
            if transport is not None:
                transport.abort()  # close() alone waits until what was written has left
        self.driver.close()


async def describe(
    link: Any, schema: str | None, table: str
) -> tuple[dict[str, tuple[str, str, str, str]], list[frozenset[str]], list[frozenset[str]]]:
    """Columns by name (type, type as SQL writes it, YES or NO for null, extra), none if there is no such table; the
    columns of its unique indexes, those apart that are over a prefix or an expression."""
    columns = {row[0]: (row[1], row[2], row[3], row[4]) for row in await link.ask(_COLUMNS, (schema, table))}
    indexes: dict[str, set[str]] = {}
    partly = set()
    for index, column, prefix in await link.ask(_UNIQUE, (schema, table)):
        indexes.setdefault(index, set()).add(column or "")
        if prefix is not None or column is None:
            partly.add(index)
    whole = [frozenset(names) for index, names in indexes.items() if index not in partly]
    return columns, whole, [frozenset(indexes[index]) for index in partly]


def _classified(error: errors.MySQLError, statement: Statement, place: Address) -> Exception:
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = f"MySQL at {place}: {say(error)}"
    if code in GONE:
        return Lost(text)
    if code in _UNFIT:
        return Refused(say(error))
    if code in _LATE:
        return BackendUnavailable(f"{text}; is there an index for {statement.text[:80]!r}?")
    if code in (1044, 1045, 1054, 1064, 1142, 1143, 1146):
        return BackendUnavailable(f"{text}; correct the statement {statement.text[:80]!r}, or the user's rights")
    return BackendUnavailable(text)


def say(error: BaseException) -> str:
    """One line: the server's words, or the name of what went wrong."""
    words = [arg for arg in error.args if isinstance(arg, str) and arg]
    return (words[-1].splitlines()[0] if words else str(error) or type(error).__name__)[:200]
