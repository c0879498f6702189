"""Lets an LDAP directory judge the password, and turns groups and attributes of an entry into rights."""

from __future__ import annotations

import re
import time
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from auth._acl import TooManyRules, bounded, topic_rules, truth
from auth._ldap_expiry import expiry_of
from auth._ldap_groups import PRIMARY_GROUP, TooManyGroups, find_groups
from auth._ldap_limit import BindLimit
from auth._rights import Rights, in_order
from broker.access.passwords import BadHash, Hash, Verifier
from broker.config.template import MissingValue, Template
from broker.config.types import Duration
from broker.connectors import ldap
from broker.extend.auth import Action, Answer, Client, Grant, Refusal, Rule, Verdict, note
from broker.extend.registry import Backend

_PLACEHOLDERS = ("username", "clientid", "peerhost", "cert_common_name")

MAX_NAME = 256
"""Bytes of a user name that is looked up."""
HASHES = 4
"""Stored passwords of one entry that are compared."""
_HASHED = re.compile(rb"\s*\{[A-Za-z0-9./_-]*\}|\s*\$[0-9a-z]")
"""How stored hashes begin: ``{SSHA}``, ``$2b$``, ``$argon2id$``."""


def _attribute(default: str = "") -> Any:
    """The name of an attribute of an entry, or nothing."""
    return Field(default=default, max_length=100, pattern=r"^([A-Za-z][A-Za-z0-9-]*)?$")


class LdapGroup(Rights):
    """`[auth.ldap.groups.NAME]`: what the members of a group may do. Denials count before permissions, then the order
    of the tables. Rules elsewhere may name the table as their group."""

    dn: str = Field(min_length=1)
    """Distinguished name of the group."""
    superuser: bool = False
    """Members may do everything."""

    @model_validator(mode="after")
    def _check_dn(self) -> LdapGroup:
        ldap.split_dn(self.dn)
        return self


class LdapConfig(ldap.LdapServer):
    """`[auth.ldap]`"""

    mode: Literal["search_bind", "direct_bind", "hash", "compare"] = "search_bind"
    """search_bind: the service account finds the user's entry, another connection binds as it. direct_bind: the user's
    name is put into `user_dn` and bound at once; no service account is needed. hash: the service account reads
    `password_attribute`, and the broker compares; the directory's own password policy then has no say. compare: the
    directory compares the password with `password_attribute` for the service account, where users may not bind; only
    for a directory that hashes before it compares, others (OpenLDAP) compare letter by letter with what is stored."""
    base_dn: str = ""
    """Where the search for a user starts, e.g. ``ou=people,dc=example,dc=com``."""
    user_filter: Template = Template("(uid=${username})")
    """Finds the user's entry; placeholders are escaped before use."""
    exact_name: bool = True
    """Whether the name must be spelled as in the directory: ``Alice`` is then not ``alice``, although a directory finds
    either. Applies to the attributes `user_filter` compares with ``${username}``."""
    user_dn: Template | None = None
    """With direct_bind: the user's DN, e.g. ``uid=${username},ou=people,dc=example,dc=com``, or for Active Directory
    ``${username}@corp.example``."""
    password_attribute: str = _attribute("userPassword")
    """With hash: attribute that holds the password's hash, such as ``{SSHA}…``, ``{CRYPT}$2b$…`` or ``{ARGON2}…``; one
    that fits is enough. Passwords that are not hashed let nobody in. With compare: the attribute to compare with."""
    publish_attribute: str = _attribute()
    """Attribute of the user's entry with topic filters to which may be published, placeholders and all. EMQ's schema
    has ``mqttPublishTopic``. Whoever may write the attribute gives rights with it. Empty: none."""
    subscribe_attribute: str = _attribute()
    """The same for what may be subscribed to; EMQ: ``mqttSubscriptionTopic``."""
    all_attribute: str = _attribute()
    """The same for both; EMQ: ``mqttPubSubTopic``."""
    superuser_attribute: str = _attribute()
    """Attribute whose value TRUE makes a superuser; EMQX: ``isSuperuser``. Empty: none does."""
    enabled_attribute: str = _attribute()
    """Attribute whose value FALSE shuts a user out, and disconnects it within `refresh` (not with direct_bind, where
    only the user itself reads its entry: it is refused at its next login); EMQ: ``isEnabled``. For others add to
    `user_filter`: ``(!(pwdAccountLockedTime=*))``, or what the example for Active Directory has."""
    expiry_attribute: str = _attribute()
    """Attribute with the time at which the account ends and its clients are disconnected: ``accountExpires`` of Active
    Directory, ``shadowExpire`` in days, any other as a generalized time such as ``20271231235959Z``. An entry without
    it does not end. Another time counts within `refresh`, with direct_bind at the next login."""
    groups: dict[str, LdapGroup] = Field(default_factory=dict)
    """Tables `[auth.ldap.groups.NAME]`: group → rights."""
    require_group: tuple[str, ...] = ()
    """Names of `groups` tables; a user who is in none of these may not connect."""
    nested_groups: Literal["off", "walk", "memberof", "ad"] = "off"
    """How groups in groups are found: off (direct members only) | walk (search upwards, at most ten levels) | memberof
    (follow the memberOf attribute) | ad (Active Directory's own rule; the primary group counts too)."""
    group_base_dn: str = ""
    """Where groups are searched. Default: what the DNs in `groups` have in common."""
    group_filter: Template = Template("(|(member=${dn})(uniqueMember=${dn})(memberUid=${username}))")
    """Finds the groups of an entry, for off and walk; ``${dn}`` is the entry, ``${username}`` the user."""
    max_bind_failures: int = Field(default=3, ge=0, le=1_000)
    """Wrong passwords of one user in `bind_failure_window` after which the directory is not asked about that user any
    more, so that a device with an old password does not lock the account there; 0: no limit. Cached logins go on. Not
    with hash and compare, which bind as nobody, so that no account is locked."""
    bind_failure_window: Annotated[Duration, Field(gt=0, le=86_400)] = 300.0
    """Seconds for which a wrong password counts. Directories count longer than this: `max_bind_failures` times their
    time divided by this one must stay below their own limit."""

    @model_validator(mode="after")
    def _check_mode(self) -> LdapConfig:
        if self.mode != "direct_bind" and not self.base_dn:
            raise ValueError("base_dn: say where users are, e.g. ou=people,dc=example,dc=com")
        if self.mode != "direct_bind" and not self.user_filter.names:
            raise ValueError("user_filter needs a placeholder, e.g. (uid=${username})")
        if self.mode == "direct_bind" and (self.user_dn is None or "username" not in self.user_dn.names):
            raise ValueError("direct_bind needs user_dn with ${username}, e.g. uid=${username},ou=people,dc=example")
        if self.mode == "direct_bind" and self.user_dn is not None and not _is_dn(self.user_dn) and not self.base_dn:
            raise ValueError("base_dn: say where the user finds its own entry, e.g. dc=corp,dc=example")
        for name in ("max_bind_failures", "bind_failure_window"):
            if self.mode in ("hash", "compare") and name in self.model_fields_set:
                raise ValueError(f"{name}: leave it out, with {self.mode} nobody binds with a wrong password")
        if self.mode in ("hash", "compare") and not self.password_attribute:
            raise ValueError(f"password_attribute: {self.mode} needs one")
        for name in self.require_group:
            if name not in self.groups:
                raise ValueError(f"require_group: there is no table groups.{name}")
        for template in (self.user_filter, self.group_filter, self.user_dn or self.user_filter):
            for name in template.names:
                if name not in _PLACEHOLDERS and not (name == "dn" and template is self.group_filter):
                    raise ValueError(f"{template.text!r}: ${{{name}}} is not known here")
        ldap.check_filter(self.user_filter.render(lambda name: "x"))
        ldap.check_filter(self.group_filter.render(lambda name: "x"))
        return self


class _Directory:
    """What all modes share: from an entry to rights."""

    def __init__(self, config: LdapConfig, pool: ldap.LdapPool) -> None:
        self._config = config
        self._pool = pool
        self._names = _compared_with_username(config.user_filter) if config.exact_name else []
        self._attributes = _attributes(config)
        self._secret = config.password_attribute.lower() if config.mode == "hash" else ""
        """Attribute nobody but the comparison is to see."""
        self._limit = BindLimit(config.max_bind_failures, config.bind_failure_window)
        self.by_address = any("peerhost" in t.names for t in (config.user_filter, config.user_dn or config.user_filter))

    async def check(self) -> None:
        await self._pool.ping(self._config.base_dn if self._config.mode != "direct_bind" else "")

    async def close(self) -> None:
        await self._pool.close()

    def _limited(self, username: str | None) -> Refusal:
        config = self._config
        seconds = f"{config.bind_failure_window:g} s"
        note(f"{config.max_bind_failures} refused binds in {seconds} (max_bind_failures): the directory is not asked")
        return Refusal(
            f"user {username!r}: {config.max_bind_failures} wrong passwords in {seconds}, not asked again yet"
        )

    def _may_be(self, client: Client, entry: ldap.Entry) -> bool:
        """Whether this entry is the user's, and lets it in at all."""
        if self._names and client.username not in [text for name in self._names for text in entry.texts(name)]:
            note(f"{client.username!r} is not how {' or '.join(self._names)} is spelled there (exact_name = true)")
            return False
        enabled = self._config.enabled_attribute
        if enabled and any(text.strip().lower() in ("false", "0") for text in entry.texts(enabled)):
            note(f"{enabled} is FALSE")
            return False
        return True

    def _own_rules(self, entry: ldap.Entry) -> list[Rule]:
        """What the entry itself allows."""
        config = self._config
        kinds: tuple[tuple[Action, str], ...] = (
            ("publish", config.publish_attribute), ("subscribe", config.subscribe_attribute),
            ("all", config.all_attribute),
        )  # fmt: skip
        return bounded(
            rule
            for action, name in kinds
            if name
            for rule in topic_rules(entry.texts(name), action, f"attribute {name}")
        )

    async def _rights(self, client: Client, entry: ldap.Entry, searcher: ldap.Searcher) -> Grant | Refusal:
        config = self._config
        try:
            expires_at = expiry_of(entry, config.expiry_attribute) if config.expiry_attribute else None
        except ValueError as error:
            return Refusal(f"user {client.username!r}: {config.expiry_attribute}: {error}", authorized=False)
        if expires_at is not None and expires_at <= time.time():
            return Refusal(f"user {client.username!r} has expired ({config.expiry_attribute})", authorized=False)
        try:
            names = await find_groups(config, searcher, entry, client.username or "") if config.groups else []
            own = self._own_rules(entry)
        except (TooManyGroups, TooManyRules) as error:
            return Refusal(f"user {client.username!r}: {error}", authorized=False)
        if config.groups:
            note(f"groups: {', '.join(names) or 'none'}")
        if config.require_group and not set(names) & set(config.require_group):
            return Refusal(f"user {client.username!r} is in none of the groups of require_group", authorized=False)
        groups = [(f"group {name}", config.groups[name]) for name in names]
        attributes = {}
        for name in self._attributes:
            values = entry.texts(name)
            if len(values) == 1 and name.lower() != self._secret:  # of several values none is the right one
                attributes[name.lower()] = values[0]
        superuser = any(group.superuser for _, group in groups) or (
            bool(config.superuser_attribute) and any(map(truth, entry.texts(config.superuser_attribute)))
        )
        return Grant(superuser, attributes, (*in_order(groups), *own), expires_at, groups=frozenset(names))


class SearchBind(_Directory):
    """Finds the user's entry, lets the directory judge the password, then reads the groups."""

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        if not _usable(client.username, password):
            return Verdict.DENY
        if self._limit.reached(_counted(client)):
            return self._limited(client.username)
        entry = await self._find_user(client)
        if not isinstance(entry, ldap.Entry):
            return entry
        dn = entry.dn
        result = await self._limit.bind(_counted(client), lambda: self._pool.bind(dn, password))
        if result is None:
            return self._limited(client.username)
        note(f"bind as {dn}: {result.text}")
        if not result.accepted:
            return Verdict.DENY
        return await self._rights(client, entry, self._pool)

    async def rules(self, client: Client) -> Grant | Refusal | None:
        """The rights a user has now."""
        if not _usable(client.username):
            return None
        entry = await self._find_user(client)
        return await self._rights(client, entry, self._pool) if isinstance(entry, ldap.Entry) else None

    async def _find_user(self, client: Client) -> ldap.Entry | Verdict:
        try:
            query = self._config.user_filter.render(client.get, escape=ldap.escape)
        except MissingValue as missing:
            note(f"{missing}: the user cannot be looked up")
            return Verdict.IGNORE
        try:
            found = await self._pool.find(self._config.base_dn, query, self._attributes, limit=1, must_exist=True)
        except ldap.TooMany:
            note(f"{query} finds more than one entry below {self._config.base_dn}: refused as ambiguous")
            return Verdict.DENY
        if not found:
            note(f"{query} finds nothing below {self._config.base_dn}")
            return Verdict.IGNORE
        entry = found[0]
        note(f"{query} finds {entry.dn or 'an entry without a name'}")
        if not entry.dn.strip():
            return Verdict.DENY  # a bind with an empty name is anonymous
        return entry if self._may_be(client, entry) else Verdict.DENY


class HashCompare(SearchBind):
    """Reads what the directory stores of the password, and compares here."""

    def __init__(self, config: LdapConfig, pool: ldap.LdapPool) -> None:
        super().__init__(config, pool)
        self._attributes = list(dict.fromkeys((*self._attributes, config.password_attribute)))
        self._verifier = Verifier(min(config.pool, 4))
        self._sample: Hash | None = None

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        if not _usable(client.username, password):
            return Verdict.DENY
        entry = await self._find_user(client)
        if not isinstance(entry, ldap.Entry):
            return entry
        stored = entry.texts(self._config.password_attribute)
        if not stored:
            note(f"the entry has no {self._config.password_attribute}, or whoever searches may not read it")
        for text in stored[:HASHES]:
            try:
                hash = Hash(text)
            except BadHash as error:
                note(f"a stored password cannot be used: {error}")
                continue
            self._sample = hash
            right = await self._verifier.verify(hash, password)
            note(f"the password is {'right' if right else 'another'} ({hash.scheme})")
            if right:
                return await self._rights(client, entry, self._pool)
        return Verdict.DENY

    async def burn(self, password: bytes) -> None:
        """Takes as long as a wrong password took the last time."""
        if self._sample is not None:
            await self._verifier.verify(self._sample, password)

    async def close(self) -> None:
        self._verifier.close()
        await super().close()


class DirectoryCompare(SearchBind):
    """Finds the user's entry and has the directory compare the password; nobody binds as the user."""

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        if not _usable(client.username, password):
            return Verdict.DENY
        if _HASHED.match(password):  # a directory that compares letters would take the stolen hash for the password
            note("the password looks like a stored hash, which is never sent to be compared")
            return Verdict.DENY
        entry = await self._find_user(client)
        if not isinstance(entry, ldap.Entry):
            return entry
        name = self._config.password_attribute
        same = await self._pool.compare(entry.dn, name, password)
        note(f"compare with {name} of {entry.dn}: {'the same' if same else 'another password, or none'}")
        return await self._rights(client, entry, self._pool) if same else Verdict.DENY


class DirectBind(_Directory):
    """Binds as the user at once; only the user itself can read its rights."""

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        template = self._config.user_dn
        if template is None or not _usable(client.username, password):
            return Verdict.DENY
        is_dn = _is_dn(template)
        if not is_dn and re.search(r'[\x00-\x1f"/\\\[\]:;|=,+*?<>@]', client.username or ""):
            note("the user name holds characters that may not stand in a logon name")
            return Verdict.DENY
        try:
            dn = template.render(client.get, escape=ldap.escape_dn if is_dn else None)
        except MissingValue as missing:
            note(f"{missing}: the user cannot be looked up")
            return Verdict.IGNORE
        users: list[ldap.Searcher] = []

        async def bind() -> ldap.BindResult:
            result, user = await stack.enter_async_context(self._pool.user(dn, password))
            users.append(user)
            return result

        async with AsyncExitStack() as stack:
            result = await self._limit.bind(_counted(client), bind)
            if result is None:
                return self._limited(client.username)
            note(f"bind as {dn}: {result.text}")
            if not result.accepted:
                return Verdict.DENY
            entry = await self._own_entry(client, dn if is_dn else None, users[0])
            return Verdict.DENY if entry is None else await self._rights(client, entry, users[0])

    async def _own_entry(self, client: Client, dn: str | None, user: ldap.Searcher) -> ldap.Entry | None:
        if dn is not None:
            found = await user.find(dn, "(objectClass=*)", self._attributes, scope="base", limit=1)
        else:
            query = self._config.user_filter.render(client.get, escape=ldap.escape)
            found = await user.find(self._config.base_dn, query, self._attributes, limit=1, must_exist=True)
        note(f"the user's own entry: {found[0].dn if found else 'cannot be read'}")
        if not found or not found[0].dn.strip():
            return None
        return found[0] if self._may_be(client, found[0]) else None


async def open_ldap(config: LdapConfig) -> SearchBind | DirectBind:
    pool = ldap.LdapPool(config)
    if config.mode == "direct_bind":
        return DirectBind(config, pool)
    ways = {"search_bind": SearchBind, "hash": HashCompare, "compare": DirectoryCompare}
    return ways[config.mode](config, pool)


def _is_dn(template: Template) -> bool:
    return "=" in template.text.partition("${")[0]


def _usable(username: str | None, password: bytes | None = None) -> bool:
    """Whether these may be sent to a directory at all."""
    if password is not None and not password:
        note("an empty password is never sent to a directory")
        return False  # an unauthenticated bind may succeed, RFC 4513 section 5.1.2
    if password is not None and not _is_text(password):
        note("the password is not UTF-8 text")
        return False  # RFC 4513 section 5.1.3; no directory holds such a one
    usable = bool(username) and "\0" not in (username or "") and len((username or "").encode()) <= MAX_NAME
    if not usable:
        note(f"a user name is 1 to {MAX_NAME} bytes without NUL")
    return usable


def _counted(client: Client) -> str:
    """The name refused binds are counted under: a directory takes both spellings for one user."""
    return (client.username or "").strip().casefold()


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _compared_with_username(filter: Template) -> list[str]:
    return re.findall(r"\(([A-Za-z][A-Za-z0-9-]*)=\$\{username\}\)", filter.text)


def _attributes(config: LdapConfig) -> list[str]:
    """What is read of the user's entry: names to compare, and attributes that occur in topics."""
    wanted: dict[str, Any] = dict.fromkeys(_compared_with_username(config.user_filter) if config.exact_name else ())
    for group in config.groups.values():
        for text in (*group.publish, *group.subscribe, *group.deny_publish, *group.deny_subscribe):
            for name in Template.parse(text, percent=True).names:
                if name.startswith("attr."):
                    wanted[name[5:]] = None
    own = (
        config.publish_attribute, config.subscribe_attribute, config.all_attribute, config.superuser_attribute,
        config.enabled_attribute, config.expiry_attribute,
    )  # fmt: skip
    wanted |= dict.fromkeys(name for name in own if name)
    if config.groups and config.nested_groups == "memberof":
        wanted["memberOf"] = None
    if config.groups and config.nested_groups == "ad":
        wanted |= dict.fromkeys(PRIMARY_GROUP)
    return list(wanted)


BACKEND = Backend("auth.ldap", LdapConfig, open_ldap, extra="ldap")
