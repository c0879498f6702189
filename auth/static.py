"""Users, client ids, groups and rules written into the configuration itself."""

from __future__ import annotations

import hmac
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from auth._acl import strict_rules
from auth._rights import Rights, in_order
from broker.access.passwords import Hash, Verifier
from broker.config.types import Secret
from broker.extend.auth import Answer, AuthConfig, Client, Grant, Rule, Verdict, note
from broker.extend.registry import Backend


class User(Rights):
    """`[auth.static.users.NAME]` and `[auth.static.clients.ID]`: a password and what its owner may do."""

    password: Secret = Secret()
    """The password, best given as ``${file:…}`` or ``${env:…}``."""
    password_hash: Secret = Secret()
    """A hash of it instead, as ``isthmus hash`` prints."""
    groups: tuple[str, ...] = ()
    """Names of groups it is a member of: of `groups` tables here, or of rules elsewhere."""
    superuser: bool = False
    """May do everything."""

    @model_validator(mode="after")
    def _check_password(self) -> User:
        if bool(self.password) == bool(self.password_hash):
            raise ValueError("give a password or a password_hash, one of them")
        if self.password_hash:
            Hash(self.password_hash.reveal())
        return self


class Group(Rights):
    """`[auth.static.groups.NAME]`: what the members of a group may do, whichever backend says who they are."""

    superuser: bool = False
    """Members may do everything."""


class StaticConfig(AuthConfig):
    """`[auth.*]` with ``kind = "static"``"""

    users: dict[str, User] = Field(default_factory=dict)
    """Tables `[auth.static.users.NAME]`: users by name."""
    clients: dict[str, User] = Field(default_factory=dict)
    """Tables `[auth.static.clients.ID]`: clients by client id. From then on the client id is the client's user name,
    whatever name it sent with the password."""
    groups: dict[str, Group] = Field(default_factory=dict)
    """Tables `[auth.static.groups.NAME]`: rights of groups."""
    rules: tuple[dict[str, Any], ...] = ()
    """Rules for all clients, the first that applies decides: ``permission`` (allow, deny), ``action`` (publish,
    subscribe, all), ``topics``, and maybe ``qos`` (a list), ``retain``, ``username``, ``clientid``, ``ipaddress`` (an
    address or network), ``group``. They come before the rights of groups."""

    @model_validator(mode="after")
    def _check_static(self) -> StaticConfig:
        if not (self.users or self.clients or self.groups or self.rules):
            raise ValueError("name somebody: users, clients, groups or rules")
        for name in (*self.users, *self.clients, *self.groups):
            if not name or "\0" in name:
                raise ValueError("a name is empty or holds a NUL character")
        for name in self.users:
            if name in self.clients:
                raise ValueError(f"clients: {name!r} would act as the user of that name")
        self.common_rules()
        return self

    def common_rules(self) -> list[Rule]:
        """What holds for every client. ValueError."""
        rules = strict_rules(self.rules, "rules")
        for name, group in self.groups.items():
            if group.superuser:
                rules.append(Rule(True, "all", source=f"group {name}", group=name))
        for name, group in self.groups.items():
            rules += [replace(rule, group=name) for rule in group.rules(False, f"group {name}")]
        for name, group in self.groups.items():
            rules += [replace(rule, group=name) for rule in group.rules(True, f"group {name}")]
        return rules


class Rules:
    """Rules alone: knows nobody."""

    def __init__(self, config: StaticConfig) -> None:
        self._config = config
        self.common_rules = config.common_rules() if config.rules or config.groups else None

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        note("there are no users here")
        return Verdict.IGNORE

    async def check(self) -> None:
        """There is nothing to reach."""

    async def close(self) -> None:
        """There is nothing to close."""


class Accounts(Rules):
    """Compares with the passwords of the tables."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self._verifier = Verifier(min(config.pool, 4))
        accounts = (*config.users.values(), *config.clients.values())
        self._hashes = {one: Hash(one.password_hash.reveal()) for one in accounts if one.password_hash}
        self._sample = next(iter(self._hashes.values()), None)

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        account = self._config.clients.get(client.clientid)
        known = f"client id {client.clientid!r}"
        grant_as = client.clientid if account is not None else None
        if account is None:
            account = self._config.users.get(client.username or "")
            known = f"user {client.username!r}"
        if account is None:
            note(f"neither client id {client.clientid!r} nor user {client.username!r} is in the table")
            return Verdict.IGNORE
        hash = self._hashes.get(account)
        if hash is not None:
            right = await self._verifier.verify(hash, password)
        else:
            right = hmac.compare_digest(account.password.reveal().encode(), password)
        note(f"{known} is in the table, the password is {'right' if right else 'another'}")
        return self._grant(account, known, grant_as) if right else Verdict.DENY

    async def rules(self, client: Client) -> Grant | None:
        """The rights of a user, or of a client that came in by its client id."""
        account = self._config.clients.get(client.clientid)
        if account is not None and client.username == client.clientid:
            return self._grant(account, f"client id {client.clientid!r}", client.clientid)
        account = self._config.users.get(client.username or "")
        return None if account is None else self._grant(account, f"user {client.username!r}", None)

    async def burn(self, password: bytes) -> None:
        """Takes as long as a wrong password takes, so that time does not tell which users exist."""
        if self._sample is not None:
            await self._verifier.verify(self._sample, password)

    async def close(self) -> None:
        self._verifier.close()

    def _grant(self, account: User, known: str, username: str | None) -> Grant:
        rules = tuple(in_order([(known, account)]))
        return Grant(account.superuser, rules=rules, username=username, groups=frozenset(account.groups))


async def open_static(config: StaticConfig) -> Rules:
    return Accounts(config) if config.users or config.clients else Rules(config)


BACKEND = Backend("auth.static", StaticConfig, open_static)
