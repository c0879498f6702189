"""Users and rights in MongoDB, as EMQ keeps them: collections ``mqtt_user`` and ``mqtt_acl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from auth._acl import MAX_RULES, TooManyRules, bounded, groups_of, record_rules, topic_rules, truth
from auth._stored import StoredConfig, StoredPassword, password_of
from broker.config.template import MissingValue, Template
from broker.connectors import mongodb
from broker.extend.auth import Answer, Client, Grant, Refusal, Rule, Verdict, note
from broker.extend.registry import Backend

MAX_NAME = 1_024
"""Bytes of a name that is looked up."""
_PLACEHOLDERS = ("username", "clientid", "peerhost", "cert_common_name")

Filter = dict[str, Any]


class MongoConfig(mongodb.MongoServer, StoredConfig):
    """`[auth.mongodb]`"""

    user_collection: str = Field(default="mqtt_user", min_length=1)
    """Collection of users."""
    user_filter: Filter = {"username": "${username}"}  # noqa: RUF012 (a field, not shared)
    """Finds a user's document: a query whose texts may hold ``${username}``, ``${clientid}``, ``${peerhost}`` (or EMQ's
    ``%u``, ``%c``). What a client calls itself is always compared as a text, never taken for a part of the query."""
    password_field: str = ""
    """Field with the password's hash. Default: ``password`` or ``password_hash``, whichever is there."""
    salt_field: str = "salt"
    """Field with the salt, for forms that keep it apart."""
    superuser_field: str = "is_superuser"
    """Field that is true for users who may do everything; empty: there are none."""
    groups_field: str = ""
    """Field with the names of the user's groups, a list or a text with commas; empty: there are none."""
    acl_collection: str = "mqtt_acl"
    """Collection of rights: documents with lists of topic filters ``publish``, ``subscribe``, ``pubsub`` (EMQ), or with
    ``permission``, ``action`` and ``topic`` or ``topics`` (EMQX 5). Empty: there are none here."""
    acl_filters: tuple[Filter, ...] = ({"username": "${username}"},)
    """Find a user's documents in `acl_collection`, all that one of these finds; a filter with a placeholder the client
    has nothing for finds none."""

    @model_validator(mode="after")
    def _check_queries(self) -> MongoConfig:
        for query in (self.user_filter, *self.acl_filters):
            if not _names(query):
                raise ValueError('a filter needs a placeholder, e.g. { username = "${username}" }')
            for name in _names(query):
                if name not in _PLACEHOLDERS:
                    raise ValueError(f"${{{name}}} is not known here")
            _check_operators(query)
        if self.acl_collection and not self.acl_filters:
            raise ValueError('acl_filters: say how a user\'s rights are found, or write acl_collection = ""')
        return self


class Unusable(Exception):
    """A name cannot be looked up."""


class Mongo:
    """One query for the user, one for the rights."""

    def __init__(self, config: MongoConfig, pool: mongodb.MongoPool) -> None:
        self._config = config
        self._pool = pool
        self._passwords = StoredPassword(config)
        self.by_address = True  # a document may hold for one address only
        self._fields = [
            name for name in (
                *((config.password_field,) if config.password_field else ("password", "password_hash")),
                config.salt_field, config.superuser_field, config.groups_field, *_equal_names(config.user_filter),
            ) if name
        ]  # fmt: skip

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        try:
            found = await self._find(client)
            if not isinstance(found, Mapping):
                return found
            config = self._config
            names = (config.password_field,) if config.password_field else ("password", "password_hash")
            stored, salt = password_of(found, *names), found.get(config.salt_field)
            verdict = await self._passwords.verify(stored, salt, password, client.username)
            return await self._rights(client, found) if verdict is Verdict.ALLOW else verdict
        except (Unusable, MissingValue, TooManyRules) as error:
            return _refused(client, error)

    async def rules(self, client: Client) -> Grant | Refusal | None:
        """The rights a user has now."""
        try:
            found = await self._find(client)
            return await self._rights(client, found) if isinstance(found, Mapping) else None
        except (Unusable, MissingValue, TooManyRules) as error:
            return _refused(client, error)

    async def burn(self, password: bytes) -> None:
        """Takes as long as a wrong password takes."""
        await self._passwords.burn(password)

    async def check(self) -> None:
        """The user's query with a name nobody has."""
        client = Client("isthmus-check", "isthmus-check", "127.0.0.1", "", {"cert_common_name": "isthmus-check"})
        query = _fill(self._config.user_filter, client)
        await self._pool.find(self._config.user_collection, query, self._fields, limit=1)

    async def close(self) -> None:
        self._passwords.close()
        await self._pool.close()

    async def _find(self, client: Client) -> Mapping[str, Any] | Verdict:
        query = _fill(self._config.user_filter, client)
        found = await self._pool.find(self._config.user_collection, query, self._fields, limit=2)
        note(f"{self._config.user_collection}: {len(found) or 'no'} document{'s' * (len(found) != 1)}")
        if not found:
            return Verdict.IGNORE
        if len(found) > 1:
            note("more than one user of this name: refused as ambiguous")
            return Verdict.DENY
        for name in _equal_names(self._config.user_filter):
            if found[0].get(name) != query[name]:  # a collation may take other spellings for the same
                note(f"{name} is spelled otherwise there")
                return Verdict.DENY
        return found[0]

    async def _rights(self, client: Client, found: Mapping[str, Any]) -> Grant:
        config = self._config
        if config.superuser_field and truth(found.get(config.superuser_field)):
            note("superuser")
            return Grant(superuser=True)
        groups = groups_of(found.get(config.groups_field)) if config.groups_field else frozenset[str]()
        if not config.acl_collection:
            return Grant(groups=groups)
        queries = []
        for template in config.acl_filters:
            try:
                queries.append(_fill(template, client))
            except MissingValue:
                continue
        rules: list[Rule] = []
        if queries:
            query = queries[0] if len(queries) == 1 else {"$or": queries}
            documents = await self._pool.find(config.acl_collection, query, limit=MAX_RULES + 1)
            source = f"auth.{config.name} {config.acl_collection}"
            rules = bounded(rule for document in documents for rule in _document_rules(document, client, source))
        note(f"{len(rules)} rules")
        return Grant(rules=tuple(rules), groups=groups)


async def open_mongodb(config: MongoConfig) -> Mongo:
    return Mongo(config, mongodb.MongoPool(config, size=config.pool, timeout=config.timeout or 3.0))


def _document_rules(document: Mapping[str, Any], client: Client, source: str) -> list[Rule]:
    if "permission" in document:
        return record_rules(document, client, source)
    return [
        *topic_rules(document.get("publish"), "publish", source),
        *topic_rules(document.get("subscribe"), "subscribe", source),
        *topic_rules(document.get("pubsub"), "all", source),
    ]


def _names(query: object) -> set[str]:
    """The placeholders in the texts of a query."""
    if isinstance(query, str):
        return set(Template.parse(query, percent=True).names)
    if isinstance(query, Mapping):
        return {name for value in query.values() for name in _names(value)}
    return {name for value in query for name in _names(value)} if isinstance(query, (list, tuple)) else set()


def _check_operators(query: object, key: str = "") -> None:
    """Operators whose text is a program or a pattern would let a name be one."""
    if key in ("$where", "$function", "$accumulator", "$expr", "$regex", "$jsonSchema", "$text") and _names(query):
        raise ValueError(f"{key} with a placeholder would let a client write a part of the query; compare for equality")
    items = query.items() if isinstance(query, Mapping) else ()
    for name, value in items:
        if "$" in name[1:] or "\0" in name:
            raise ValueError(f"{name!r}: there are no placeholders in the names of fields")
        _check_operators(value, name if name.startswith("$") else key)
    if isinstance(query, (list, tuple)):
        for value in query:
            _check_operators(value, key)


def _equal_names(query: Mapping[str, Any]) -> list[str]:
    """The fields that are compared with what a client calls itself, to compare once more here."""
    return [name for name, value in query.items() if isinstance(value, str) and "." not in name and _names(value)]


def _fill(query: Any, client: Client) -> Any:
    """The query with the client's values, each a text and nothing else. Raises Unusable, MissingValue."""
    if isinstance(query, str):
        text = Template.parse(query, percent=True).render(client.get)
        if len(text.encode("utf-8", "surrogatepass")) > MAX_NAME:
            raise Unusable(f"its name is longer than {MAX_NAME} bytes")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unusable("its name is no text") from None
        return text
    if isinstance(query, Mapping):
        return {name: _fill(value, client) for name, value in query.items()}
    return [_fill(value, client) for value in query] if isinstance(query, (list, tuple)) else query


def _refused(client: Client, error: Exception) -> Refusal:
    note(str(error))
    return Refusal(f"user {(client.username or '')[:100]!r}: {error}", authorized=not isinstance(error, TooManyRules))


BACKEND = Backend("auth.mongodb", MongoConfig, open_mongodb, extra="mongodb")
