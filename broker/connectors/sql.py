"""Databases that are spoken to over a pool of connections: what PostgreSQL and MySQL have in common.

A connection whose caller left, that was late or on which something went wrong is closed, never reused: an answer still
under way would be taken for the answer to the next question.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote

from pydantic import Field, PrivateAttr, model_validator

from broker.config.types import Address, Duration, Secret
from broker.connectors.endpoint import Endpoint
from broker.connectors.sql_text import Refused, Rows, Statement
from broker.extend.auth import BackendUnavailable

__all__ = ["Link", "Lost", "Refused", "Rejected", "Rows", "SqlPool", "SqlServer", "Statement"]

logger = logging.getLogger(__name__)

IDLE = 120.0
"""Seconds after which an unused connection is not trusted any more: what stands in between may have dropped it."""
LIFETIME = 1_800.0
"""Seconds after which a connection is replaced, so that a name that moved is noticed."""

Values = Sequence[str | None]
T = TypeVar("T")


class Lost(Exception):
    """The connection, or what was prepared on it, is gone."""


class Rejected(BackendUnavailable):
    """The server answers and does not let us in: user, password or database are wrong."""


class SqlServer(Endpoint):
    """The keys of every table that talks to a database server."""

    dsn: str = Field(min_length=1)
    """Where the database is: ``postgresql://USER@HOST:PORT/DATABASE``, ``mysql://…``. Several (``HOST:PORT,HOST``)
    are tried in this order; ``?host=/run/postgresql`` instead of one names a Unix socket (for PostgreSQL its folder).
    The password has a key of its own."""
    password: Secret = Secret()
    """Password of the user in `dsn`."""
    cooldown: Duration = 10.0
    """Seconds for which a server that failed is asked only when no other one is left."""

    _servers: tuple[Address, ...] = PrivateAttr(default=())
    _user: str = PrivateAttr(default="")
    _database: str = PrivateAttr(default="")

    schemes: ClassVar[tuple[str, ...]] = ()
    """What `dsn` may begin with."""
    port: ClassVar[int] = 0
    """Where the server listens unless `dsn` says otherwise."""

    @property
    def servers(self) -> tuple[Address, ...]:
        """Where to connect; a host that begins with a slash is a Unix socket."""
        return self._servers

    @property
    def user(self) -> str:
        return self._user

    @property
    def database(self) -> str:
        return self._database

    @model_validator(mode="after")
    def _read_dsn(self) -> SqlServer:
        scheme, separator, rest = self.dsn.partition("://")
        if not separator or scheme not in self.schemes:
            raise ValueError(f"dsn: write {self.schemes[0]}://USER@HOST:{self.port}/DATABASE")
        rest, _, query = rest.partition("?")
        authority, _, path = rest.partition("/")
        user, _, hosts = authority.rpartition("@")
        if ":" in user:
            raise ValueError("dsn: the password stands in the key password, where it is kept secret")
        options = dict(parse_qsl(query, keep_blank_values=True))
        socket = options.pop("host", "")
        if options:
            raise ValueError(
                f"dsn: {sorted(options)[0]} is not understood; TLS and times have keys of their own: tls, ca, timeout"
            )
        self._user, self._database = unquote(user), unquote(path)
        if not self._database or "/" in self._database:
            raise ValueError(f"dsn: name the database, {self.schemes[0]}://USER@HOST/DATABASE")
        if socket and (hosts or not socket.startswith("/")):
            raise ValueError("dsn: ?host= names the folder of a Unix socket, then there is no other host")
        self._servers = (Address(socket, self.port),) if socket else tuple(map(self._address, hosts.split(",")))
        if not 1 <= len(self._servers) <= 16:
            raise ValueError("dsn: 1 to 16 hosts")
        self.check_cleartext(address for address in self._servers if not address.host.startswith("/"))
        return self

    def _address(self, text: str) -> Address:
        bare = text.endswith("]") or ":" not in text
        try:
            return Address.parse(f"{text}:{self.port}" if bare else text)
        except ValueError as error:
            raise ValueError(f"dsn: {error}") from None


class Link(Protocol):
    """One connection."""

    place: Address
    driver: Any
    """The driver's own connection, for work of more than one statement."""

    async def fetch(self, statement: Statement, values: Values) -> Rows:
        """The answer. Raises Lost, Refused, BackendUnavailable; after any but Refused and BackendUnavailable, and when
        cancelled, the connection must not be used again."""

    def kill(self) -> None:
        """Close at once, without a farewell."""


class _Idle:
    __slots__ = ("born", "link", "since")

    def __init__(self, link: Link, born: float) -> None:
        self.link = link
        self.born = born
        self.since = born


class SqlPool:
    """At most `size` connections; opens none before it is needed."""

    def __init__(
        self,
        connect: Callable[[Address], Awaitable[Link]],
        servers: Sequence[Address],
        *,
        size: int,
        timeout: float,
        cooldown: float,
    ) -> None:
        self._connect = connect
        self._servers = servers
        self._timeout = timeout
        self._cooldown = cooldown
        self._places = asyncio.Semaphore(size)
        self._idle: list[_Idle] = []
        self._links: set[Link] = set()
        self._failed_at: dict[Address, float] = {}
        self._closed = False

    async def fetch(self, statement: Statement, values: Values) -> Rows:
        """One statement on a connection of the pool. Raises Refused, BackendUnavailable."""
        return await self.run(lambda link: link.fetch(statement, values))

    async def run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """`work` with a connection that nobody else uses meanwhile; once more with a fresh one when one that was kept
        turns out to be Lost. After any error but Refused and BackendUnavailable the connection is closed.
        Raises BackendUnavailable, and what `work` raises but Lost."""
        try:
            async with asyncio.timeout(self._timeout), self._places:
                return await self._run(work)
        except TimeoutError:
            raise BackendUnavailable(f"the database gave no answer in {self._timeout:g} s") from None
        except Lost as error:
            raise BackendUnavailable(str(error)) from None

    async def close(self) -> None:
        """Ends everything at once."""
        self._closed = True
        self._idle.clear()
        for link in list(self._links):
            self._discard(link)

    async def _run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        kept = self._take()
        if kept is not None:
            try:
                return await self._use(kept, work)
            except (
                Lost
            ) as error:  # closed while it was idle, or the statement is to be prepared again: a fresh one tells
                logger.debug("%s: %s; a new connection is tried", kept.link.place, error)
        return await self._use(await self._open(), work)

    async def _use(self, kept: _Idle, work: Callable[[Any], Awaitable[T]]) -> T:
        whole = False
        began = time.monotonic()
        try:
            answer = await work(kept.link)
            whole = True
            return answer
        except (Refused, BackendUnavailable):
            whole = True  # an answer, if not the one that was wished for
            raise
        except asyncio.CancelledError:
            if time.monotonic() - began > self._timeout / 2:
                self._failed(kept.link.place)  # it is not only the caller who lost patience
            raise
        finally:
            if whole and not self._closed:
                kept.since = time.monotonic()
                self._idle.append(kept)
            else:
                self._discard(kept.link)

    def _take(self) -> _Idle | None:
        now = time.monotonic()
        while self._idle:
            kept = self._idle.pop()
            if now - kept.since < IDLE and now - kept.born < LIFETIME:
                return kept
            self._discard(kept.link)
        return None

    async def _open(self) -> _Idle:
        if self._closed:
            raise BackendUnavailable("the connections to the database were closed")
        now = time.monotonic()
        end = now + self._timeout
        order = sorted(self._servers, key=lambda place: now - self._failed_at.get(place, -1e9) < self._cooldown)
        error: Exception | None = None
        for number, place in enumerate(order):
            share = (end - time.monotonic()) / (len(order) - number)
            try:
                async with asyncio.timeout(share):
                    link = await self._connect(place)
            except TimeoutError:
                error = Lost(f"{place} did not answer in {share:.1f} s")
            except (Lost, BackendUnavailable) as failure:
                error = failure
            else:
                if self._closed:
                    link.kill()
                    raise BackendUnavailable("the connections to the database were closed")
                self._failed_at.pop(place, None)
                self._links.add(link)
                return _Idle(link, time.monotonic())
            self._failed(place)
            if number + 1 < len(order):
                logger.warning("%s; the next server is tried", error)
        raise error or Lost("there is no server")

    def _failed(self, place: Address) -> None:
        """Prefer other servers for a while, and trust no idle connection to this one."""
        self._failed_at[place] = time.monotonic()
        for kept in [kept for kept in self._idle if kept.link.place == place]:
            self._idle.remove(kept)
            self._discard(kept.link)

    def _discard(self, link: Link) -> None:
        self._links.discard(link)
        link.kill()
