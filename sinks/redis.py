"""Messages become entries of Redis streams, items of lists, hashes, values, or messages of channels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, repeat
from typing import Any, Literal

from pydantic import Field, model_validator

from broker.config.template import Template
from broker.config.types import Duration
from broker.connectors import redis
from broker.extend.auth import BackendUnavailable
from broker.extend.record import RecordTemplate
from broker.extend.registry import Backend
from broker.extend.sink import Fatal, NotConnected, Record, SinkConfig, shows_msgid
from sinks._progress import Progress, Work
from sinks._redis_commands import Commands
from sinks._redis_errors import text_of, verdict

_TYPES = {"XADD": "stream", "HSET": "hash", "RPUSH": "list", "LPUSH": "list"}
_LATE = "equal or smaller than the target stream top item"
_PLACES = 5  # times late entries are given places behind the newest


class RedisConfig(redis.RedisServer, SinkConfig):
    """`[sinks.redis]`"""

    command: Literal["XADD", "HSET", "RPUSH", "LPUSH", "SET", "PUBLISH"] = "XADD"
    """XADD: an entry of a stream, stored once even if it is delivered twice | HSET: fields of a hash, the latest values
    | RPUSH, LPUSH: an item at the end or the beginning of a list | SET: the latest value | PUBLISH: a message to
    whoever listens to a channel now, kept for nobody. Lists and channels may get a message twice after a crash."""
    redis_key: RecordTemplate
    """The stream, hash, list, key or channel; with placeholders it begins with fixed text: ``device:${clientid}``."""
    fields: dict[str, RecordTemplate] = Field(
        min_length=1,
        default={
            name: Template(f"${{{name}}}") for name in ("msgid", "ts", "clientid", "username", "topic", "payload")
        },
    )
    """XADD and HSET: field -> template of its value. A field without a value is left out."""
    value: RecordTemplate = Template("${payload}")
    """RPUSH, LPUSH, SET and PUBLISH: the bytes as they came; ``${.}`` is a JSON envelope."""
    max_length: int = Field(default=1_000_000, ge=0, lt=1 << 63)
    """Entries a stream, items a list keeps, the newest, about; 0 for all. Not less than a batch: what is cut off
    cannot be recognised when it comes again."""
    expire: Duration = 0.0
    """Seconds after which a key that is not written again goes away; 0 for never."""
    timeout: Duration = Field(default=10.0, ge=0.1)
    """Seconds Redis has for one batch."""

    @model_validator(mode="after")
    def _check_key(self) -> RedisConfig:
        if not self.redis_key.text or (self.redis_key.names and not isinstance(self.redis_key.segments[0], str)):
            raise ValueError("redis_key must begin with fixed text: else a device could name any key")
        if 0 < self.expire < 0.001:
            raise ValueError("expire is less than a millisecond")
        return self

    def idempotency_problem(self) -> str | None:
        if self.command == "XADD":
            return (
                "entries of a stream have ids that rise with time, so Redis would not tell a repetition; "
                'write command = "HSET" with `${msgid}` in redis_key, or put the value itself into fields'
            )
        if shows_msgid(self.redis_key, self.fields if self.command == "HSET" else self.value):
            return None
        return "nothing here holds `${msgid}`, which it takes the place of; put it into redis_key"


class Redis:
    """One pipeline for a batch.

    A stream entry gets the message's own id, which rises with time, so Redis refuses one that comes again. An id that
    is late for another reason (clocks, another writer) is looked for, and the entry stored behind the newest.
    """

    def __init__(self, config: RedisConfig, pool: redis.RedisPool) -> None:
        self._config = config
        self._pool = pool
        # a stream has one writer when all its messages come through the same lane
        one_writer = config.lanes == 1 or config.order_key in config.redis_key.text
        self._commands = Commands(
            config.command, key=config.redis_key, fields=config.fields, value=config.value,
            max_length=config.max_length, expire=config.expire, own_ids=one_writer,
        )  # fmt: skip
        self._progress = Progress()
        self._placing = asyncio.Lock()

    async def write(self, batch: Sequence[Record]) -> None:
        with self._progress.of(batch) as work:
            commands: dict[int, redis.Command] = {}
            for position in work.todo:
                try:
                    commands[position] = self._commands.store(batch[position])
                except (LookupError, TypeError, ValueError) as error:
                    work.refuse(position, f"cannot be rendered for Redis: {error}")
            upkeep = self._commands.upkeep({command[1] for command in commands.values()})
            answers = await self._send([*commands.values(), *upkeep])
            late = self._judge(work, commands, answers)
            if late:
                await self._place(work, late)

    async def check(self) -> None:
        key, wanted = self._config.redis_key.literal, _TYPES.get(self._config.command)
        [found] = await self._send([("PING",) if key is None else ("TYPE", key)])
        if isinstance(found, Exception):
            raise (verdict(found) or Fatal)(f"Redis: {found}")
        if wanted is not None and key is not None and text_of(found) not in (wanted, "none"):
            raise Fatal(f"{key} holds a {text_of(found)}; {self._config.command} needs a {wanted}")

    async def close(self) -> None:
        await self._pool.close()

    # answers

    async def _send(self, commands: Sequence[redis.Command]) -> list[Any]:
        try:
            return await self._pool.store(commands) if commands else []
        except redis.Rejected as error:
            raise Fatal(str(error)) from None
        except BackendUnavailable as error:
            raise NotConnected(str(error)) from None

    def _judge(
        self, work: Work, commands: Mapping[int, redis.Command], answers: Sequence[Any]
    ) -> dict[int, redis.Command]:
        """What became of each command; answers the stream entries whose id is not above the newest."""
        late = {}
        trouble: Exception | None = None
        for (position, command), answer in zip(commands.items(), answers, strict=False):
            if not isinstance(answer, Exception):
                work.stored((position,))
                continue
            if _LATE in str(answer):
                late[position] = command
                continue
            said = f"Redis: {command[0]!s} {text_of(command[1])}: {answer}"
            kind = verdict(answer)
            if kind is None and self._config.redis_key.literal is not None and "WRONGTYPE" in str(answer):
                kind = Fatal
            if kind is None:
                work.refuse(position, said)
            else:
                trouble = trouble or kind(said)
        for answer in answers[len(commands) :]:
            if isinstance(answer, Exception) and verdict(answer) is Fatal:
                trouble = trouble or Fatal(f"Redis: {answer}")
        if trouble is not None:
            raise trouble
        return late

    async def _place(self, work: Work, late: Mapping[int, redis.Command]) -> None:
        """Entries that are there came before; the others get places behind the newest."""
        at = self._commands.id_at
        async with self._placing:
            there = await self._send([("XRANGE", command[1], command[at], command[at]) for command in late.values()])
            before = {p for p, found in zip(late, there, strict=True) if found and not isinstance(found, Exception)}
            work.stored(list(before))
            left = {position: command for position, command in late.items() if position not in before}
            for _ in range(_PLACES):
                if not left:
                    return
                keys = list({command[1] for command in left.values()})
                newest = await self._send([("XREVRANGE", key, "+", "-", "COUNT", "1") for key in keys])
                places = {key: _behind(entries) for key, entries in zip(keys, newest, strict=True)}
                commands = {p: (*c[:at], next(places[c[1]]), *c[at + 1 :]) for p, c in left.items()}
                left = self._judge(work, commands, await self._send(list(commands.values())))
        if left:
            raise NotConnected("Redis: others write to the stream faster than our late entries find a place")


async def open_redis(config: RedisConfig) -> Redis:
    return Redis(config, redis.RedisPool(config, size=config.lanes, timeout=config.timeout, again=0))


def _behind(newest: Any) -> Iterator[str]:
    """Ids above that of the newest entry; the server's own where there is none."""
    if isinstance(newest, Exception) or not newest:
        return repeat("*")
    milliseconds, _, sequence = newest[0][0].decode().partition("-")
    return (f"{milliseconds}-{number}" for number in count(int(sequence) + 1))


BACKEND = Backend("sinks.redis", RedisConfig, open_redis, extra="redis")
