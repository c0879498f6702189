"""MySQL and MariaDB through asyncmy. Statements are prepared by the server, values are bound in binary form."""

from __future__ import annotations

import contextlib
import struct
from typing import Any, ClassVar

import asyncmy
from asyncmy import errors

from broker.config.types import Address
from broker.connectors.sql import Link, Lost, Refused, Rows, SqlPool, SqlServer, Statement, Values
from broker.extend.auth import BackendUnavailable

__all__ = ["MySqlPool", "MySqlServer"]

_GONE = frozenset(
    {1053, 1077, 1079, 1152, 1153, 1158, 1159, 1160, 1161, 1243, 1615, 1927, 2002, 2003, 2006, 2013, 2055, 4031}
)
"""Server shutting down, connection killed or lost, statement no longer known."""
_UNFIT = frozenset({1267, 1270, 1271, 1292, 1366, 1406, 1525, 3854, 3988})
"""A value that the column's character set or type cannot hold."""
_LATE = frozenset({1317, 1969, 3024})
_BROKEN = (
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
            *([] if writes else ["SET SESSION TRANSACTION READ ONLY"]),
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
            raise Lost(f"MySQL at {place}: {_say(error)}") from None
        except _BROKEN as error:
            raise Lost(f"MySQL at {place} cannot be reached: {_say(error)}") from None
        finally:
            if not whole:
                connection.close()
        return _Connection(connection, place)


class _Connection:
    """One connection and what was prepared on it."""

    def __init__(self, connection: Any, place: Address) -> None:
        self.place = place
        self._connection = connection
        self._prepared: dict[str, Any] = {}

    async def fetch(self, statement: Statement, values: Values) -> Rows:
        try:
            for value in values:
                if value is not None:
                    value.encode()
            prepared = self._prepared.get(statement.sql)
            if prepared is None:
                prepared = self._prepared[statement.sql] = await self._connection.prepare(statement.sql)
            result = await prepared.execute(tuple(values))
        except UnicodeEncodeError as error:
            raise Refused(str(error)) from None
        except errors.InterfaceError as error:
            raise Lost(f"MySQL at {self.place}: {_say(error)}") from None
        except errors.MySQLError as error:
            raise _classified(error, statement, self.place) from None
        except _BROKEN as error:
            raise Lost(f"MySQL at {self.place}: {_say(error)}") from None
        columns = tuple(str(column[0]).lower() for column in result.description or ())
        return Rows(columns, result.rows or ())

    def kill(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            transport = self._connection._transport
            if transport is not None:
                transport.abort()  # close() alone waits until what was written has left
        self._connection.close()


def _classified(error: errors.MySQLError, statement: Statement, place: Address) -> Exception:
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = f"MySQL at {place}: {_say(error)}"
    if code in _GONE:
        return Lost(text)
    if code in _UNFIT:
        return Refused(_say(error))
    if code in _LATE:
        return BackendUnavailable(f"{text}; is there an index for {statement.text[:80]!r}?")
    if code in (1044, 1045, 1054, 1064, 1142, 1143, 1146):
        return BackendUnavailable(f"{text}; correct the statement {statement.text[:80]!r}, or the user's rights")
    return BackendUnavailable(text)


def _say(error: BaseException) -> str:
    """One line: the server's words, or the name of what went wrong."""
    words = [arg for arg in error.args if isinstance(arg, str) and arg]
    return (words[-1].splitlines()[0] if words else str(error) or type(error).__name__)[:200]
