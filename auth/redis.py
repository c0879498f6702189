"""Users and rights in Redis hashes, laid out as EMQ does: ``mqtt_user:NAME`` and ``mqtt_acl:NAME``."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import Field, model_validator

from auth._acl import TooManyRules, action_rules, bounded, groups_of, record_rules, topic_rules, truth
from auth._stored import StoredConfig, StoredPassword, password_of
from broker.config.template import MissingValue, Placeholder, Template
from broker.connectors import redis
from broker.extend.auth import Action, Answer, Client, Grant, Refusal, Rule, Verdict, note
from broker.extend.registry import Backend

MAX_NAME = 1_024
"""Bytes of a name that is looked up."""
_PLACEHOLDERS = ("username", "clientid", "peerhost", "cert_common_name")
_READ = {"GET": 2, "HGET": 3, "HMGET": 3, "HGETALL": 2, "SMEMBERS": 2}
"""Commands that may be asked, and how many words they have at least."""


class RedisConfig(redis.RedisServer, StoredConfig):
    """`[auth.redis]`"""

    auth_cmd: str = "HMGET mqtt_user:${username} password salt is_superuser"
    """Command that finds a user: HMGET with the fields ``password`` or ``password_hash``, and maybe ``salt``,
    ``is_superuser`` and ``groups`` (names with commas between them); HGETALL, HGET of the hash alone, or GET. It is cut
    into words first and filled in then, so a name is always part of one word. EMQ's ``%u`` and ``%c`` are understood
    too."""
    super_cmd: str = ""
    """Command that tells with 1 or true whether the user may do everything: HGET or GET. Default: the field
    ``is_superuser`` of `auth_cmd`."""
    acl_cmd: str = "HGETALL mqtt_acl:${username}"
    """Command that finds a user's rights: a hash of topic filters with 1 (subscribe), 2 (publish), 3 (both), or EMQX's
    ``subscribe``, ``publish``, ``all`` and JSON. Empty: there are none here."""
    acl_sets: dict[str, Literal["subscribe", "publish", "all"]] = Field(default_factory=dict)
    """Sets of topic filters as mosquitto-go-auth keeps them: key and action, e.g.
    ``{ "${username}:racls" = "subscribe", "${username}:wacls" = "publish" }``."""
    changes: str = ""
    """Channel that tells what changed: each message is a user name, or ``*`` for everybody. Their remembered verdicts
    and rights are read again at once. Empty: they are read again after `cache_ttl` and `refresh`."""

    @model_validator(mode="after")
    def _check_commands(self) -> RedisConfig:
        if not self.auth_cmd:
            raise ValueError("auth_cmd: say how a user is found")
        for name in ("auth_cmd", "super_cmd", "acl_cmd"):
            if getattr(self, name):
                try:
                    Command(getattr(self, name))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        for key in self.acl_sets:
            Command(f"SMEMBERS {key}")
        if self.super_cmd and self.super_cmd.split()[0].upper() not in ("GET", "HGET"):
            raise ValueError("super_cmd: is GET or HGET")
        if self.acl_cmd and self.acl_cmd.split()[0].upper() != "HGETALL":
            raise ValueError("acl_cmd: is HGETALL; sets are named in acl_sets")
        if self.auth_cmd.split()[0].upper() == "SMEMBERS":
            raise ValueError("auth_cmd: a set holds no password")
        return self


class Unusable(Exception):
    """A name cannot be looked up."""


class Command:
    """One reading command whose words may hold placeholders. ValueError when it is none."""

    def __init__(self, text: str) -> None:
        words = text.split()
        self.verb = words[0].upper() if words else ""
        if self.verb not in _READ:
            raise ValueError(f"{words[0] if words else ''!r} is not among {', '.join(_READ)}")
        if len(words) < _READ[self.verb] or (len(words) > _READ[self.verb] and self.verb != "HMGET"):
            raise ValueError(f"{text!r} has too few or too many words for {self.verb}")
        self.words = tuple(Template.parse(word, percent=True) for word in words[1:])
        self.fields = tuple(word.text.lower() for word in self.words[1:])
        self.by_address = any("peerhost" in word.names for word in self.words)
        for word in self.words:
            for name in word.names:
                if name not in _PLACEHOLDERS:
                    raise ValueError(f"${{{name}}} is not known here")
        if not self.words[0].names:
            raise ValueError(f"{text!r}: the key needs a placeholder, e.g. mqtt_user:${{username}}")

    def render(self, client: Client) -> list[str | bytes]:
        """The words of the command. Raises Unusable, MissingValue."""
        return [self.verb, *(_fill(word, client) for word in self.words)]


class Redis:
    """One command for the password, one for the rights; no answer of another type than expected lets anybody in."""

    def __init__(self, config: RedisConfig, pool: redis.RedisPool) -> None:
        self._config = config
        self._pool = pool
        self._passwords = StoredPassword(config)
        self._auth = Command(config.auth_cmd)
        self._super = Command(config.super_cmd) if config.super_cmd else None
        self._acl = Command(config.acl_cmd) if config.acl_cmd else None
        self._sets: list[tuple[Command, Action]] = [
            (Command(f"SMEMBERS {key}"), action) for key, action in config.acl_sets.items()
        ]
        every = [self._auth, self._super, self._acl, *(command for command, _ in self._sets)]
        self.by_address = any(command is not None and command.by_address for command in every)
        self.on_change: Callable[[str | None], object] | None = None
        """Told which user's rights changed, None: anybody's may have."""
        self._listener: asyncio.Task[None] | None = None

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        try:
            found = await self._find(client)
            if found is None:
                return Verdict.IGNORE
            stored = password_of(found, "password", "password_hash")
            verdict = await self._passwords.verify(stored, found.get("salt"), password, client.username)
            if verdict is not Verdict.ALLOW:
                return verdict
            return await self._rights(client, found)
        except (Unusable, MissingValue, redis.WrongType, TooManyRules) as error:
            return _refused(client, error)

    async def rules(self, client: Client) -> Grant | Refusal | None:
        """The rights a user has now."""
        try:
            found = await self._find(client)
            return None if found is None else await self._rights(client, found)
        except (Unusable, MissingValue, redis.WrongType, TooManyRules) as error:
            return _refused(client, error)

    async def burn(self, password: bytes) -> None:
        """Takes as long as a wrong password takes."""
        await self._passwords.burn(password)

    def listen(self) -> None:
        """Begin to hear about changes."""
        self._listener = asyncio.get_running_loop().create_task(
            self._pool.listen(self._config.changes, self._heard), name="redis changes"
        )

    async def check(self) -> None:
        """The user's command with a name nobody has."""
        client = Client("isthmus-check", "isthmus-check", "127.0.0.1", "", {"cert_common_name": "isthmus-check"})
        with contextlib.suppress(redis.WrongType):
            await self._pool.call(*self._auth.render(client))

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait({self._listener}, timeout=1.0)
        self._passwords.close()
        await self._pool.close()

    async def _find(self, client: Client) -> Mapping[str, bytes] | None:
        """The user's fields, by name; None when there is no such user."""
        command = self._auth.render(client)
        answer = await self._pool.call(*command)
        match self._auth.verb:
            case "HMGET":
                fields = dict(zip(self._auth.fields, answer, strict=True))
            case "HGETALL":
                fields = {name.decode("utf-8", "replace").lower(): value for name, value in answer.items()}
            case _:
                fields = {"password": answer}
        found = {name: value for name, value in fields.items() if value is not None}
        note(f"{self._auth.verb} {_show(command[1])}: {', '.join(found) or 'nothing'}")
        return found or None

    async def _rights(self, client: Client, found: Mapping[str, bytes]) -> Grant:
        superuser = truth(found.get("is_superuser"))
        if self._super is not None:
            superuser = truth(await self._pool.call(*self._super.render(client)))
        if superuser:
            note("superuser")
            return Grant(superuser=True)
        rules: list[Rule] = []
        if self._acl is not None:
            command = self._acl.render(client)
            stored = await self._pool.call(*command)
            source = f"auth.{self._config.name} {_show(command[1])}"
            rules += bounded(rule for topic in stored for rule in _hash_rules(topic, stored[topic], client, source))
        for set_command, action in self._sets:
            command = set_command.render(client)
            topics = sorted(await self._pool.call(*command))
            rules += topic_rules(topics, action, f"auth.{self._config.name} {_show(command[1])}")
        note(f"{len(rules)} rules")
        return Grant(rules=tuple(bounded(rules)), groups=groups_of(found.get("groups")))

    def _heard(self, message: bytes | None) -> None:
        if self.on_change is None:
            return
        name = None if message is None else message.decode("utf-8", "replace").strip()
        self.on_change(None if name in (None, "", "*") else name)


async def open_redis(config: RedisConfig) -> Redis:
    backend = Redis(config, redis.RedisPool(config, size=config.pool, timeout=config.timeout or 3.0))
    if config.changes:
        backend.listen()
    return backend


def _hash_rules(topic: bytes, access: bytes, client: Client, source: str) -> list[Rule]:
    if not access.lstrip().startswith(b"{"):
        return action_rules(topic, access, source)
    try:
        record = json.loads(access)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):  # EMQX: a hash holds permissions, and each its topic as the field's name
        record = {"permission": "allow", **record, "topic": topic}
    return record_rules(record, client, source)


def _fill(word: Template, client: Client) -> bytes:
    """One word. Only at the end of a key that begins with fixed text is every name a key of its own; elsewhere a name
    with separators in it could reach into another key and is not filled in."""
    last = len(word.segments) - 1
    own = last > 0 and len(word.names) == 1 and isinstance(word.segments[last], Placeholder)
    text = ""
    for segment in word.segments:
        if isinstance(segment, str):
            text += segment
            continue
        value = client.get(segment.name)
        if value is None:
            raise MissingValue(segment.name)
        if len(value.encode("utf-8", "surrogatepass")) > MAX_NAME:
            raise Unusable(f"its {segment.name} is longer than {MAX_NAME} bytes")
        if not own and set(value) & set(":{}"):
            raise Unusable(f"its {segment.name} holds a separator, so it could name another key than its own")
        text += value
    return text.encode("utf-8", "surrogatepass")


def _refused(client: Client, error: Exception) -> Refusal:
    note(str(error))
    return Refusal(f"user {(client.username or '')[:100]!r}: {error}", authorized=not isinstance(error, TooManyRules))


def _show(word: str | bytes) -> str:
    return ascii(word.decode("utf-8", "replace") if isinstance(word, bytes) else word)[1:-1][:100]


BACKEND = Backend("auth.redis", RedisConfig, open_redis, extra="redis")
