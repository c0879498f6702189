"""PostgreSQL through asyncpg. Statements are prepared once a connection, values are bound in binary form."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any, ClassVar

import asyncpg
from asyncpg import exceptions

from broker.config.types import Address
from broker.connectors.sql import Link, Lost, Refused, Rejected, Rows, SqlPool, SqlServer, Statement, Values
from broker.extend.auth import BackendUnavailable
from broker.runtime.backoff import Backoff

__all__ = ["GONE", "REMADE", "PostgresPool", "PostgresServer", "describe", "say"]

logger = logging.getLogger(__name__)

QUIET = 10.0
"""Seconds without a notification after which a listening connection is asked whether it is alive."""

REMADE = (
    exceptions.InvalidCachedStatementError,  # a table was altered
    exceptions.InvalidSQLStatementNameError,  # a pooler in between gave us another server's connection
    exceptions.DuplicatePreparedStatementError,
    exceptions.OutdatedSchemaCacheError,
)
"""What was prepared on this connection is not valid (any more)."""
GONE = (exceptions.InterfaceError, exceptions.InternalClientError, exceptions.PostgresConnectionError, OSError)
"""The connection is gone, or what came over it makes no sense."""
_WHOLE_NUMBERS = frozenset({"int2", "int4", "int8"})

_COLUMNS = """
select a.attname::text,
       case when t.typtype = 'b' and t.typnamespace = 'pg_catalog'::regnamespace then t.typname::text else '' end,
       format_type(a.atttypid, null), a.attnotnull, a.attidentity = 'a' or a.attgenerated <> ''
from pg_attribute a join pg_type t on t.oid = a.atttypid
where a.attrelid = to_regclass($1) and a.attnum > 0 and not a.attisdropped
"""
_UNIQUE = """
select array(select a.attname::text from pg_attribute a where a.attrelid = i.indrelid and a.attnum = any(
       (i.indkey::int2[])[0:i.indnkeyatts - 1]))
from pg_index i
where i.indrelid = to_regclass($1) and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
"""

Column = tuple[str, str, bool, bool]
"""Name of its type if that is one of PostgreSQL's own, the type as SQL writes it, NOT NULL, made by the database."""


class PostgresServer(SqlServer):
    """The keys of every table that talks to PostgreSQL."""

    schemes: ClassVar[tuple[str, ...]] = ("postgresql", "postgres")
    port: ClassVar[int] = 5432


class PostgresPool(SqlPool):
    """Opens nothing before it is needed. Its sessions cannot write unless they are to."""

    def __init__(self, config: PostgresServer, *, size: int, timeout: float, writes: bool = False) -> None:
        super().__init__(self._link, config.servers, size=size, timeout=timeout, cooldown=config.cooldown)
        self._config = config
        self._ssl: Any = config.context() if config.tls else False
        self._settings = {
            "application_name": "isthmus",
            "statement_timeout": str(int(timeout * 1000)),  # what we gave up, the server gives up too
            "default_transaction_read_only": "off" if writes else "on",
        }

    async def listen(self, channel: str, heard: Callable[[str | None], object]) -> None:
        """Tell `heard` the payload of every notification, and None whenever some may have been missed: each time the
        connection is there (again). Returns only by being cancelled."""
        wait = Backoff(0.1, 5.0)
        servers = self._servers
        for attempt in itertools.count():
            place = servers[attempt % len(servers)]
            connection: asyncpg.Connection[Any] | None = None
            ended = asyncio.Event()
            try:
                async with asyncio.timeout(self._timeout):
                    connection = await self._connection(place)
                    connection.add_termination_listener(lambda _, ended=ended: ended.set())
                    await connection.add_listener(channel, lambda *about: heard(about[3] or None))
                heard(None)
                while True:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ended.wait(), QUIET)
                    async with asyncio.timeout(self._timeout):
                        await connection.fetchval("select 1")
                    wait.reset()
            except (TimeoutError, Lost, BackendUnavailable, exceptions.PostgresError, *GONE) as error:
                logger.warning("%s: not listening to %r, changes are noticed late: %s", place, channel, say(error))
            finally:
                if connection is not None:
                    connection.terminate()
            await asyncio.sleep(wait.next())

    async def _link(self, place: Address) -> Link:
        return _Connection(await self._connection(place), place)

    async def _connection(self, place: Address) -> asyncpg.Connection[Any]:
        config = self._config
        try:
            return await asyncpg.connect(
                host=place.host,
                port=place.port,
                user=config.user or None,
                password=config.password.reveal(),  # never None: the environment and ~/.pgpass have no say here
                database=config.database,
                ssl=self._ssl if not place.host.startswith("/") else False,
                timeout=self._timeout,
                statement_cache_size=0,
                server_settings=self._settings,
            )
        except (exceptions.InvalidAuthorizationSpecificationError, exceptions.InvalidCatalogNameError) as error:
            raise Rejected(f"PostgreSQL at {place}: {say(error)}") from None
        except exceptions.PostgresError as error:
            raise Lost(f"PostgreSQL at {place}: {say(error)}") from None
        except (*GONE, ValueError) as error:
            raise Lost(f"PostgreSQL at {place} cannot be reached: {say(error)}") from None


class _Connection:
    """One connection and what was prepared on it."""

    def __init__(self, connection: asyncpg.Connection[Any], place: Address) -> None:
        self.place = place
        self.driver = connection
        self._prepared: dict[str, tuple[Any, tuple[str, ...], list[bool], list[int]]] = {}

    async def fetch(self, statement: Statement, values: Values) -> Rows:
        try:
            prepared = self._prepared.get(statement.sql)
            if prepared is None:
                prepared = self._prepared[statement.sql] = await self._prepare(statement)
            query, columns, whole_numbers, padded = prepared
            rows: list[Any] = await query.fetch(*map(_bindable, values, whole_numbers))
        except REMADE as error:
            raise Lost(f"PostgreSQL at {self.place}: {say(error)}") from None
        except exceptions.PostgresError as error:
            raise _classified(error, statement, self.place) from None
        except (exceptions.DataError, UnicodeEncodeError, _Unfit) as error:
            raise Refused(str(error)) from None
        except GONE as error:
            raise Lost(f"PostgreSQL at {self.place}: {say(error)}") from None
        if padded:
            rows = [[v.rstrip(" ") if i in padded and v else v for i, v in enumerate(row)] for row in rows]
        return Rows(columns, rows)

    def kill(self) -> None:
        self.driver.terminate()

    async def _prepare(self, statement: Statement) -> tuple[Any, tuple[str, ...], list[bool], list[int]]:
        # by name: what asyncpg prepares without one is overwritten by the next
        query = await self.driver.prepare(statement.sql, name=f"isthmus_{len(self._prepared)}")
        attributes = query.get_attributes()
        return (
            query,
            tuple(attribute.name.lower() for attribute in attributes),
            [parameter.name in _WHOLE_NUMBERS for parameter in query.get_parameters()],
            [i for i, attribute in enumerate(attributes) if attribute.type.name == "bpchar"],  # filled up with blanks
        )


async def describe(driver: asyncpg.Connection[Any], table: str) -> tuple[dict[str, Column], list[frozenset[str]]]:
    """Columns of a table by name, none if there is no such table, and the columns of its unique indexes."""
    columns = {row[0]: (row[1], row[2], row[3], row[4]) for row in await driver.fetch(_COLUMNS, table)}
    return columns, [frozenset(row[0]) for row in await driver.fetch(_UNIQUE, table)]


class _Unfit(ValueError):
    """A text stands where a whole number is compared."""


def _bindable(value: str | None, whole_number: bool) -> Any:
    if value is None or not whole_number:
        return value
    if not re.fullmatch(r"0|-?[1-9][0-9]{0,18}", value):
        raise _Unfit(f"{value[:40]!r} is compared with a column of numbers")
    return int(value)


def _classified(error: exceptions.PostgresError, statement: Statement, place: Address) -> Exception:
    state = error.sqlstate or ""
    text = f"PostgreSQL at {place}: {say(error)}"
    if state.startswith("22"):  # data exception: the value has no form the database could compare
        return Refused(say(error))
    if state.startswith("08") or state in ("57P01", "57P02", "57P03", "57P05"):
        return Lost(text)
    if state == "57014":
        return BackendUnavailable(f"{text}; is there an index for {statement.text[:80]!r}?")
    if state == "42P18":
        return BackendUnavailable(f"{text}; say what a placeholder is, e.g. ${{username}}::text")
    if state.startswith("42"):
        return BackendUnavailable(f"{text}; correct the statement {statement.text[:80]!r}, or the user's rights")
    return BackendUnavailable(text)


def say(error: BaseException) -> str:
    """One line; only the message, for the detail may hold a row."""
    words = [arg for arg in error.args if isinstance(arg, str) and arg] or [str(error)]
    return (words[-1].splitlines() or [type(error).__name__])[0][:200]
