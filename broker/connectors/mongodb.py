"""MongoDB: one server, a replica set or a sharded cluster, on PyMongo's own asyncio client.

Nothing that was sent is cancelled: the driver's own deadline ends it, and no answer is taken for another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator
from pymongo import AsyncMongoClient, ReadPreference, UpdateOne, WriteConcern
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
)

from broker.config.types import Address, Secret
from broker.connectors.endpoint import Endpoint
from broker.extend.auth import BackendUnavailable

__all__ = ["REJECTED", "MongoPool", "MongoServer", "Rejected"]

T = TypeVar("T")


class Rejected(BackendUnavailable):
    """The server is there and refuses us: the login, a right, a command."""


_READ = {
    "primary": ReadPreference.PRIMARY,
    "primary_preferred": ReadPreference.PRIMARY_PREFERRED,
    "secondary_preferred": ReadPreference.SECONDARY_PREFERRED,
    "nearest": ReadPreference.NEAREST,
}

_SAFE = WriteConcern("majority")
REJECTED = {13, 18, 20, 26, 59, 72, 73, 8000}
"""Unauthorized, AuthenticationFailed, IllegalOperation, NamespaceNotFound, CommandNotFound,
InvalidOptions, InvalidNamespace, Atlas' own refusal."""

_UNFIT = frozenset({2, 9, 14, 15, 22, 10334})
"""BadValue, FailedToParse, TypeMismatch, Overflow, InvalidBSON, BSONObjectTooLarge: of a whole command, in which
some document is to blame, nobody says which."""


class MongoServer(Endpoint):
    """The keys of every table that talks to MongoDB."""

    servers: tuple[Address, ...] = Field(default=(Address("127.0.0.1", 27017),), min_length=1, max_length=50)
    """Addresses ``host:port``: one server, some members of the replica set, or the routers of a sharded cluster."""
    replica_set: str = ""
    """Name of the replica set; empty: there is none, or routers are named."""
    read_preference: Literal["primary", "primary_preferred", "secondary_preferred", "nearest"] = "primary_preferred"
    """Which member of a replica set is read: primary (nothing without one) | primary_preferred | secondary_preferred |
    nearest. All but the first may give answers some seconds old."""
    database: str = Field(default="mqtt", min_length=1, max_length=63)
    """Name of the database."""
    username: str = ""
    """User of the server; empty: no login."""
    password: Secret = Secret()
    """Password of the server."""
    auth_source: str = "admin"
    """Database that knows `username`."""
    auth_mechanism: Literal["", "SCRAM-SHA-1", "SCRAM-SHA-256", "MONGODB-X509"] = ""
    """How to log in; empty: the best the server offers. MONGODB-X509 uses `certificate`."""

    @model_validator(mode="after")
    def _check_server(self) -> MongoServer:
        if bool(self.username) != bool(self.password) and self.auth_mechanism != "MONGODB-X509":
            raise ValueError("username and password belong together")
        if self.auth_mechanism == "MONGODB-X509" and not (self.tls and self.certificate):
            raise ValueError("auth_mechanism = MONGODB-X509 needs tls = true and a certificate")
        if self.key is not None:
            raise ValueError("key: MongoDB's driver reads certificate and private key from one file, `certificate`")
        if set(self.database) & set('/\\. "$\0'):
            raise ValueError(f"database: {self.database!r} is no name of a database")
        self.check_cleartext(self.servers)
        return self


class MongoPool:
    """At most `size` connections to each server; opens none before it is needed."""

    def __init__(self, config: MongoServer, *, size: int, timeout: float) -> None:
        self._config = config
        self._timeout = timeout
        self._places = asyncio.Semaphore(size)
        self._running: set[asyncio.Task[Any]] = set()
        milliseconds = int(timeout * 900)  # the driver's own deadline comes first and says more
        options: dict[str, Any] = {
            "maxPoolSize": size, "timeoutMS": milliseconds, "serverSelectionTimeoutMS": milliseconds // 2,
            "connectTimeoutMS": milliseconds, "socketTimeoutMS": milliseconds, "heartbeatFrequencyMS": 5_000,
            "appname": "isthmus", "read_preference": _READ[config.read_preference], "connect": False,
        }  # fmt: skip
        if config.replica_set:
            options["replicaSet"] = config.replica_set
        elif len(config.servers) == 1:
            options["directConnection"] = True  # the server that was named, whatever it says about others
        if config.auth_mechanism:
            options["authMechanism"] = config.auth_mechanism
        if config.username:
            options["username"] = config.username
        if config.password:
            options |= {"password": config.password.reveal(), "authSource": config.auth_source}
        if config.tls:
            config.context()  # files that cannot be used are named now
            options["tls"] = True
            if config.ca is not None:
                options["tlsCAFile"] = str(config.ca)
            if config.certificate is not None:
                options["tlsCertificateKeyFile"] = str(config.certificate)
        hosts = [str(address) for address in config.servers]
        try:
            self._client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(hosts, **options)
        except (ConfigurationError, InvalidURI) as error:
            raise ValueError(str(error)) from None
        self._database = self._client[config.database]

    async def find(
        self, collection: str, query: Mapping[str, Any], fields: Sequence[str] | None = None, *, limit: int
    ) -> list[dict[str, Any]]:
        """At most `limit` documents, with these fields or all. Raises BackendUnavailable."""

        async def ask() -> list[dict[str, Any]]:
            cursor = self._database[collection].find(query, fields, limit=limit)
            try:
                return await cursor.to_list(limit)
            finally:
                await cursor.close()

        return await self._run(ask)

    async def insert(self, collection: str, documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """As `write`, of new documents; one without ``_id`` gets one. The driver raises where BSON cannot hold one."""
        return await self._write(collection, lambda target: target.insert_many(documents, ordered=False))

    async def insert_at_once(self, collection: str, documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """As `insert`, in a fifth less of our time: one command, which the driver neither splits nor sends again. A
        server takes 100 000 documents and 48 MB in one and ends the connection at more."""
        insert = {"insert": collection, "documents": documents, "ordered": False, "writeConcern": _SAFE.document}

        async def ask() -> list[dict[str, Any]]:
            answer = await self._fitting(self._database.command(insert))
            unsafe = answer.get("writeConcernError")
            if unsafe:
                raise BackendUnavailable(f"{self}: not on a majority: {unsafe.get('errmsg')}")
            refused: list[dict[str, Any]] = answer.get("writeErrors", [])
            return refused

        return await self._run(ask)

    async def write(self, collection: str, writes: Sequence[UpdateOne]) -> list[dict[str, Any]]:
        """All of them, in no order, on the disks of a majority. Answers what the server says about each document it
        refused (``index``, ``code``, ``errmsg``); all others are stored. Raises Rejected, BackendUnavailable: then
        nobody knows which are; RuntimeError when the server cannot take them in one command because of one of them."""
        return await self._write(collection, lambda target: target.bulk_write(writes, ordered=False))

    async def _write(self, collection: str, send: Callable[[Any], Awaitable[Any]]) -> list[dict[str, Any]]:
        target = self._database.get_collection(collection, write_concern=_SAFE)

        async def ask() -> list[dict[str, Any]]:
            try:
                await self._fitting(send(target))
            except BulkWriteError as error:
                unsafe = error.details.get("writeConcernErrors")
                if unsafe:
                    raise BackendUnavailable(f"{self}: not on a majority: {unsafe[0].get('errmsg')}") from None
                refused: list[dict[str, Any]] = error.details["writeErrors"]
                return refused
            return []

        return await self._run(ask)

    async def _fitting(self, question: Awaitable[T]) -> T:
        try:
            return await question
        except OperationFailure as error:
            if error.code in _UNFIT:
                raise RuntimeError(f"{self}: {_say(error)}") from None
            raise

    async def command(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer of the primary to a command about the database. Raises Rejected, BackendUnavailable."""

        async def ask() -> dict[str, Any]:
            return await self._database.command(command)

        return await self._run(ask)

    async def ping(self) -> None:
        """One round trip."""
        await self.command({"ping": 1})

    async def close(self) -> None:
        """Ends every connection."""
        if self._running:
            await asyncio.wait(self._running, timeout=1.0)
        await self._client.close()

    async def _run(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What was sent is waited for, by itself when its caller has left: a connection that is given up half made
        would be lost. It holds its place until then, so that callers who leave do not pile up work."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._places.acquire()
                task = asyncio.get_running_loop().create_task(ask())
                self._running.add(task)
                task.add_done_callback(self._ended)
                return await asyncio.shield(task)
        except TimeoutError:
            raise BackendUnavailable(f"{self} gave no answer in {self._timeout:g} s") from None
        except (PyMongoError, OSError) as error:
            refused = isinstance(error, OperationFailure) and error.code in REJECTED
            raise (Rejected if refused else BackendUnavailable)(f"{self}: {_say(error)}") from None

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._places.release()
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left

    def __str__(self) -> str:
        return f"MongoDB at {', '.join(map(str, self._config.servers))}"


def _say(error: BaseException) -> str:
    if isinstance(error, OperationFailure):
        if error.code in (18, 8000):
            return "the login is refused; correct username, password or auth_source"
        return f"refused with code {error.code}: {error.details.get('errmsg') if error.details else error}"
    text = str(error).partition(", Timeout:")[0].partition(" (configured timeouts")[0]
    return f"cannot be reached: {text}" if isinstance(error, AutoReconnect) else text or type(error).__name__
