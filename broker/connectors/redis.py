"""Redis: one server, a master found by sentinels, or a cluster. Commands, one or many at once, and channels.

A connection whose caller left or lost patience is closed, never reused: an answer that is still under way would be
taken for the answer to the next question.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from redis import exceptions
from redis.asyncio import Redis, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from broker.config.types import Address, Secret
from broker.connectors.endpoint import Endpoint
from broker.extend.auth import BackendUnavailable
from broker.runtime.backoff import Backoff

__all__ = ["Command", "RedisPool", "RedisServer", "Rejected", "WrongType"]

logger = logging.getLogger(__name__)

Command = tuple[str | bytes, ...]
"""The command, the key it is about, the rest."""


class Rejected(BackendUnavailable):
    """The server refuses our login."""


class WrongType(Exception):
    """The key holds another type of value than the command reads."""


class RedisServer(Endpoint):
    """The keys of every table that talks to Redis."""

    mode: Literal["single", "sentinel", "cluster"] = "single"
    """single: one server | sentinel: `servers` are sentinels that know the master | cluster: `servers` are some nodes
    of a cluster, which know the others."""
    servers: tuple[Address, ...] = Field(default=(Address("127.0.0.1", 6379),), min_length=1, max_length=16)
    """Addresses ``host:port``; with sentinel and cluster they are asked in turn."""
    master: str = Field(default="mymaster", min_length=1)
    """With sentinel: the name of the master."""
    database: int = Field(default=0, ge=0, le=10_000)
    """Number of the database; a cluster has only 0."""
    username: str = ""
    """User of the server's access control list; empty: its default user."""
    password: Secret = Secret()
    """Password of the server."""
    sentinel_username: str = ""
    """User the sentinels ask for, if they do."""
    sentinel_password: Secret = Secret()
    """Password the sentinels ask for, if they do."""

    @model_validator(mode="after")
    def _check_server(self) -> RedisServer:
        if self.mode == "single" and len(self.servers) > 1:
            raise ValueError('several servers need mode = "sentinel" or mode = "cluster"')
        if self.mode == "cluster" and self.database:
            raise ValueError("a cluster has only database 0")
        if self.mode != "sentinel" and (self.sentinel_password or self.sentinel_username):
            raise ValueError('sentinel_username and sentinel_password need mode = "sentinel"')
        self.check_cleartext(self.servers)
        return self


class RedisPool:
    """At most `size` connections (to each node of a cluster); opens none before it is needed.

    What meets a broken connection is sent once more, `again` times at most.
    """

    def __init__(self, config: RedisServer, *, size: int, timeout: float, again: int = 1) -> None:
        self._config = config
        self._timeout = timeout
        self._again = again
        self._places = asyncio.Semaphore(size)
        if config.tls:
            config.context()  # files that cannot be used are named now
        self._sentinel: Sentinel | None = None
        self._client: Redis | _Cluster = self._connect(size)

    async def call(self, *command: str | bytes) -> Any:
        """The answer, of the type the command gives. Raises WrongType, BackendUnavailable."""
        try:
            async with asyncio.timeout(self._timeout), self._places:
                return await self._client.execute_command(*command)
        except exceptions.ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                raise WrongType(str(error)) from None
            raise BackendUnavailable(f"{self}: {command[0]!r} was refused: {error}") from None
        except (TimeoutError, exceptions.TimeoutError):
            raise BackendUnavailable(f"{self} gave no answer in {self._timeout:g} s") from None
        except (exceptions.RedisError, OSError) as error:
            raise BackendUnavailable(f"{self}: {_say(error)}") from None

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Many commands in one round trip. Answers in their order; a command that was refused has the driver's
        ResponseError in its place, and one that found its node of a cluster gone the ConnectionError.

        Raises Rejected, or BackendUnavailable: then nobody knows which were carried out.
        """
        return await self._together(commands, _pipeline)

    async def store(self, commands: Sequence[Command]) -> list[Any]:
        """`pipeline` for thousands of commands whose answers say little: they are given as they come."""
        return await self._together(commands, _exchange)

    async def _together(self, commands: Sequence[Command], way: _Way) -> list[Any]:
        try:
            async with asyncio.timeout(self._timeout), self._places:
                if isinstance(self._client, _Cluster):
                    return await self._client.execute_pipeline(commands, way)
                return await way(self._client, commands)
        except exceptions.AuthenticationError as error:
            raise Rejected(f"{self}: {_say(error)}") from None
        except (TimeoutError, exceptions.TimeoutError):
            raise BackendUnavailable(f"{self} gave no answer in {self._timeout:g} s") from None
        except (exceptions.RedisError, OSError) as error:
            raise BackendUnavailable(f"{self}: {_say(error)}") from None

    async def ping(self) -> None:
        """One round trip."""
        await self.call("PING")

    async def listen(self, channel: str, heard: Callable[[bytes | None], object]) -> None:
        """Tell `heard` every message of the channel, and None whenever some may have been missed: each time the
        connection is there (again). Returns only by being cancelled."""
        wait = Backoff(0.1, 5.0)
        for attempt in itertools.count():
            client = self._single(self._config.servers[attempt % len(self._config.servers)])
            listener = client.pubsub()
            try:
                async with asyncio.timeout(self._timeout):
                    await listener.subscribe(channel)
                while True:
                    await self._hear(listener, heard)
                    wait.reset()
            except (TimeoutError, exceptions.RedisError, OSError) as error:
                logger.warning("%s: not listening to %r, changes are noticed late: %s", self, channel, _say(error))
            finally:
                with contextlib.suppress(exceptions.RedisError, OSError):
                    await listener.aclose()  # type: ignore[no-untyped-call]
                    if client is not self._client:
                        await client.aclose()
            await asyncio.sleep(wait.next())

    def _single(self, address: Address) -> Redis:
        """A client that can listen: ours, or in a cluster, where every node repeats every message, one of this node."""
        if isinstance(self._client, Redis):
            return self._client
        return Redis(host=address.host, port=address.port, retry=Retry(NoBackoff(), 0), **self._options())

    async def close(self) -> None:
        """Ends every connection."""
        clients: list[Any] = [self._client, *(self._sentinel.sentinels if self._sentinel is not None else ())]
        for client in clients:
            with contextlib.suppress(exceptions.RedisError, OSError):
                await client.aclose()

    async def _hear(self, listener: PubSub, heard: Callable[[bytes | None], object]) -> None:
        message = await listener.get_message(timeout=_QUIET)
        if message is None:  # nothing in a while: is the connection alive?
            await listener.ping()
            async with asyncio.timeout(self._timeout):
                while message is None:
                    message = await listener.get_message(timeout=self._timeout)
        if message["type"] == "subscribe":
            heard(None)
        elif message["type"] == "message":
            heard(message["data"])

    def _connect(self, size: int) -> Redis | _Cluster:
        config = self._config
        # one fresh attempt: the server may have closed a connection while it was idle
        again = Retry(NoBackoff(), self._again, supported_errors=(exceptions.ConnectionError,))
        options = {**self._options(), "db": config.database, "max_connections": size + 1, "retry": again}
        if config.mode == "cluster":
            return _Cluster(config, options)
        if config.mode == "single":
            (address,) = config.servers
            return Redis(host=address.host, port=address.port, **options)
        sentinel_options = {
            "username": config.sentinel_username or None,
            "password": config.sentinel_password.reveal() or None,
            "retry": Retry(NoBackoff(), 0),
            **self._wire(share=len(config.servers)),
        }
        addresses = [(address.host, address.port) for address in config.servers]
        self._sentinel = _Sentinel(config, addresses, sentinel_options)
        return self._sentinel.master_for(config.master, **options)  # type: ignore[no-any-return]

    def _options(self) -> dict[str, Any]:
        config = self._config
        return {
            "username": config.username or None,
            "password": config.password.reveal() or None,
            **self._wire(),
        }

    def _wire(self, share: int = 1) -> dict[str, Any]:
        """What every connection is made with; a sentinel gets its share of the time, so that the next can be asked."""
        config = self._config
        seconds = self._timeout / share
        options: dict[str, Any] = {"protocol": 2, "socket_timeout": seconds, "socket_connect_timeout": seconds}
        if config.tls:
            options |= {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
            options |= {"ssl_ca_certs": _path(config.ca), "ssl_certfile": _path(config.certificate)}
            options["ssl_keyfile"] = _path(config.key or config.certificate)
        return options

    def __str__(self) -> str:
        config = self._config
        where = ", ".join(map(str, config.servers))
        return {"single": f"Redis at {where}", "sentinel": f"Redis master {config.master!r} (sentinels {where})"}.get(
            config.mode, f"Redis cluster ({where})"
        )


class _Sentinel(Sentinel):
    """Sentinels whose word about the master's address is looked at."""

    def __init__(self, config: RedisServer, addresses: list[tuple[str, int]], options: dict[str, Any]) -> None:
        super().__init__(addresses, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self._config = config

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        host, port = await super().discover_master(service_name)
        _check_place(self._config, host, port)
        return host, port


class _Cluster:
    """Asks the node that has the key. The driver's own cluster client shares one connection between two callers when
    a third is cancelled, so here each node has a client of its own, which does not."""

    def __init__(self, config: RedisServer, options: dict[str, Any]) -> None:
        self._config = config
        self._options = options
        self._nodes: dict[tuple[str, int], Redis] = {}
        self._slots: list[tuple[int, int, tuple[str, int]]] = []
        self._looking: asyncio.Task[None] | None = None

    async def execute_command(self, *command: str | bytes) -> Any:
        """The answer of the node that has the key; follows where the cluster sends it, and is bounded by the caller."""
        slot = _slot(command)
        place = await self._place(slot)
        for attempt in range(_MOVES):
            try:
                return await self._node(place).execute_command(*command)
            except exceptions.AskError as error:
                pipeline = self._node((error.host, error.port)).pipeline(transaction=False)
                pipeline.execute_command("ASKING")
                pipeline.execute_command(*command)
                return (await pipeline.execute())[1]
            except exceptions.MovedError:
                await self._look()
            except (exceptions.TryAgainError, exceptions.ClusterDownError):
                if attempt == _MOVES - 1:
                    raise
                await asyncio.sleep(0.1)
                await self._look()
            except exceptions.ConnectionError:
                await self._look()
                if await self._place(slot) == place:  # nobody has taken over
                    raise
            place = await self._place(slot)
        raise exceptions.ClusterError("the key was sent around without end")

    async def execute_pipeline(self, commands: Sequence[Command], way: _Way) -> list[Any]:
        """As `RedisPool.pipeline`: each node gets its share at once, what has moved is sent after it one by one."""
        shares: dict[tuple[str, int], list[int]] = {}
        for position, command in enumerate(commands):
            shares.setdefault(await self._place(_slot(command)), []).append(position)
        answers: list[Any] = [None] * len(commands)

        async def ask(place: tuple[str, int], positions: list[int]) -> None:
            try:
                found = await way(self._node(place), [commands[position] for position in positions])
            except exceptions.AuthenticationError:
                raise
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                found = [error] * len(positions)
            for position, answer in zip(positions, found, strict=True):
                answers[position] = answer

        await asyncio.gather(*(ask(place, positions) for place, positions in shares.items()))
        if any(isinstance(answer, exceptions.ConnectionError) for answer in answers):
            await self._look()  # somebody may have taken over until the caller comes again
        for position, answer in enumerate(answers):
            if isinstance(answer, (exceptions.AskError, exceptions.TryAgainError, exceptions.ClusterDownError)):
                try:
                    answers[position] = await self.execute_command(*commands[position])
                except exceptions.ResponseError as error:
                    answers[position] = error
        return answers

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            await node.aclose()

    async def _place(self, slot: int) -> tuple[str, int]:
        if not self._slots:
            await self._look()
        for first, last, place in self._slots:
            if first <= slot <= last:
                return place
        raise exceptions.ClusterDownError(f"no node has slot {slot}")

    def _node(self, place: tuple[str, int]) -> Any:
        node = self._nodes.get(place)
        if node is None:
            _check_place(self._config, *place)
            node = self._nodes[place] = Redis(host=place[0], port=place[1], **self._options)
        return node

    async def _look(self) -> None:
        """Learn which node has what; once for everybody who wants to know at the same time."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._ask_around())
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled():
            task.exception()  # told to those who waited

    async def _ask_around(self) -> None:
        seeds = [(address.host, address.port) for address in self._config.servers]
        problem: Exception = exceptions.ClusterError("no node answers")
        for place in dict.fromkeys([*self._nodes, *seeds]):
            try:
                async with asyncio.timeout(self._options["socket_timeout"] / 2):
                    answer = await self._node(place).execute_command("CLUSTER", "SLOTS")
            except (TimeoutError, exceptions.RedisError, OSError) as error:
                problem = error
                continue
            slots = [(int(e[0]), int(e[1]), (e[2][0].decode() or place[0], int(e[2][1]))) for e in answer]
            if slots:
                self._slots = slots
                used = {owner for _, _, owner in slots} | set(seeds)
                for gone in self._nodes.keys() - used:
                    await self._nodes.pop(gone).aclose()
                return
        raise problem


def _check_place(config: RedisServer, host: str, port: int) -> None:
    """A server we were sent to is held to the same rule as one that was written down."""
    try:
        config.check_cleartext([Address(host, port)])
    except ValueError as error:
        raise exceptions.ConnectionError(str(error)) from None


_MOVES = 5
"""Times one command may be sent to another node."""
_QUIET = 10.0
"""Seconds without a message after which a listening connection is asked whether it is alive."""


_Way = Callable[[Any, Sequence[Command]], Coroutine[Any, Any, list[Any]]]
"""How commands are exchanged with one node."""


async def _pipeline(client: Any, commands: Sequence[Command]) -> list[Any]:
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    answers: list[Any] = await pipeline.execute(raise_on_error=False)
    return answers


async def _exchange(client: Any, commands: Sequence[Command]) -> list[Any]:
    """As `_pipeline`, for a quarter of the driver's time, which looks at the clock for every answer."""
    connection = await client.connection_pool.get_connection()
    try:
        await connection.send_packed_command([_packed(commands)])
        read = connection._parser.read_response  # the public one sets a timer; our caller has one for all
        answers = [await read() for _ in commands]
        if any(isinstance(answer, exceptions.ReadOnlyError) for answer in answers):
            await connection.disconnect(nowait=True)  # no master any more: the sentinels are asked for the new one
        return answers
    except OSError as error:
        await connection.disconnect(nowait=True)
        raise exceptions.ConnectionError(_say(error)) from None
    except BaseException:
        await connection.disconnect(nowait=True)  # an answer under way is not the next caller's
        raise
    finally:
        await client.connection_pool.release(connection)


def _packed(commands: Sequence[Command]) -> bytes:
    out: list[bytes] = []
    for command in commands:
        out.append(b"*%d\r\n" % len(command))
        for part in command:
            data = part.encode() if isinstance(part, str) else part
            out.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(out)


def _slot(command: Sequence[str | bytes]) -> int:
    if len(command) < 2:
        return 0
    key = command[1]
    slot: int = key_slot(key.encode() if isinstance(key, str) else key)
    return slot


def _path(path: object) -> str | None:
    return None if path is None else str(path)


def _say(error: BaseException) -> str:
    if isinstance(error, exceptions.AuthenticationError):
        return f"the password is refused ({error}); correct username or password"
    return str(error) or type(error).__name__
