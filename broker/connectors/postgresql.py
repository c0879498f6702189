"""PostgreSQL through asyncpg. Statements are prepared once a connection, values are bound in binary form.

A pooler in between that gives each transaction another connection to the server, such as PgBouncer, knows nothing of
what was prepared and takes no settings at the start. Where one shows itself, each question is a transaction of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
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

POOLED = (exceptions.InvalidSQLStatementNameError, exceptions.DuplicatePreparedStatementError)
"""A pooler in between gave us another server's connection."""
REMADE = (exceptions.InvalidCachedStatementError, exceptions.OutdatedSchemaCacheError, *POOLED)
"""What was prepared on this connection is not valid (any more), in the first two cases because a table was altered."""
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
        milliseconds = int(timeout * 1000)  # what we gave up, the server gives up too
        self._settings = {
            "statement_timeout": str(milliseconds), "default_transaction_read_only": "off" if writes else "on",
        }  # fmt: skip
        self.begin = f"begin{'' if writes else ' read only'}; set local statement_timeout = {milliseconds}"
        """How a transaction begins where there are no settings."""
        self.pooled = False
        """Whether a pooler has shown itself."""

    def meet_pooler(self, place: Address, sign: str) -> None:
        """From now on each question is a transaction of its own."""
        if not self.pooled:
            self.pooled = True
            logger.info("%s: a pooler stands in between (%s); each question is a transaction of its own", place, sign)

    async def listen(self, channel: str, heard: Callable[[str | None], object]) -> None:
        """Tell `heard` the payload of every notification, and None whenever some may have been missed: each time the
        connection is there (again). Returns when a pooler has shown itself, which passes none on, or when cancelled."""
        wait = Backoff(0.1, 5.0)
        for place in itertools.cycle(self._servers):
            if self.pooled:
                break
            connection: asyncpg.Connection[Any] | None = None
            ended = asyncio.Event()
            try:
                async with asyncio.timeout(self._timeout):
                    connection = await self._connection(place)
                    if self.pooled:
                        break
                    connection.add_termination_listener(lambda _, ended=ended: ended.set())
                    await connection.add_listener(channel, lambda *about: heard(about[3] or None))
                heard(None)
                while not self.pooled:
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
            if not self.pooled:
                await asyncio.sleep(wait.next())
        logger.warning(
            "not listening to %r, so changes are noticed late: a pooler passes no notifications on; name the database",
            channel,
        )

    async def _link(self, place: Address) -> Link:
        return _Connection(self, await self._connection(place), place)

    async def _connection(self, place: Address) -> asyncpg.Connection[Any]:
        if not self.pooled:
            try:
                return await self._open_connection(place, self._settings)
            except _NoSettings as error:
                self.meet_pooler(place, str(error))
        return await self._open_connection(place, {})

    async def _open_connection(self, place: Address, settings: dict[str, str]) -> asyncpg.Connection[Any]:
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
                server_settings={"application_name": "isthmus", **settings},
            )
        except (exceptions.InvalidAuthorizationSpecificationError, exceptions.InvalidCatalogNameError) as error:
            raise Rejected(f"PostgreSQL at {place}: {say(error)}") from None
        except exceptions.PostgresError as error:
            if settings and "startup parameter" in say(error):
                raise _NoSettings(say(error)) from None
            raise Lost(f"PostgreSQL at {place}: {say(error)}") from None
        except (*GONE, ValueError) as error:
            raise Lost(f"PostgreSQL at {place} cannot be reached: {say(error)}") from None


class _NoSettings(Exception):
    """What answers takes no settings at the start of a session."""


Prepared = tuple[Any, tuple[str, ...], list[bool], list[int]]
"""The driver's statement, columns, which values are whole numbers, which columns are filled up with blanks."""


class _Connection:
    """One connection and what was prepared on it."""

    def __init__(self, pool: PostgresPool, connection: asyncpg.Connection[Any], place: Address) -> None:
        self._pool = pool
        self.place = place
        self.driver = connection
        self._prepared: dict[str, Prepared] = {}

    async def fetch(self, statement: Statement, values: Values) -> Rows:
        try:
            if self._pool.pooled:
                return await self._fetch_in_transaction(statement, values)
            try:
                return await self._fetch(statement, values)
            except POOLED as error:
                self._pool.meet_pooler(self.place, say(error))
                return await self._fetch_in_transaction(statement, values)
        except REMADE as error:
            raise Lost(f"PostgreSQL at {self.place}: {say(error)}") from None
        except exceptions.PostgresError as error:
            raise _classified(error, statement, self.place) from None
        except (exceptions.DataError, UnicodeEncodeError, _Unfit) as error:
            raise Refused(str(error)) from None
        except GONE as error:
            raise Lost(f"PostgreSQL at {self.place}: {say(error)}") from None

    async def _fetch(self, statement: Statement, values: Values) -> Rows:
        prepared = self._prepared.get(statement.sql)
        if prepared is None:
            # by name: what asyncpg prepares without one is overwritten by the next. By what it says: a pooler may hand
            # us a connection on which another of ours has prepared something
            name = f"isthmus_{hashlib.sha256(statement.sql.encode()).hexdigest()[:32]}"
            prepared = self._prepared[statement.sql] = await self._prepare(statement, name)
        return await _ask(prepared, values)

    async def _fetch_in_transaction(self, statement: Statement, values: Values) -> Rows:
        await self.driver.execute(self._pool.begin)
        try:
            answer = await _ask(await self._prepare(statement, False), values)
        except GONE:
            raise
        except Exception:
            await self.driver.execute("rollback")
            raise
        await self.driver.execute("commit")
        return answer

    def kill(self) -> None:
        self.driver.terminate()

    async def _prepare(self, statement: Statement, name: str | bool) -> Prepared:
        query = await self.driver.prepare(statement.sql, name=name)
        attributes = query.get_attributes()
        return (
            query,
            tuple(attribute.name.lower() for attribute in attributes),
            [parameter.name in _WHOLE_NUMBERS for parameter in query.get_parameters()],
            [i for i, attribute in enumerate(attributes) if attribute.type.name == "bpchar"],  # filled up with blanks
        )


async def _ask(prepared: Prepared, values: Values) -> Rows:
    query, columns, whole_numbers, padded = prepared
    rows: list[Any] = await query.fetch(*map(_bindable, values, whole_numbers))
    if padded:
        rows = [[v.rstrip(" ") if i in padded and v else v for i, v in enumerate(row)] for row in rows]
    return Rows(columns, rows)


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
