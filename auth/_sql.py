"""Users and rights in SQL tables, whichever database holds them: EMQ's and EMQX's tables, or a query of one's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar, Literal, Protocol

from pydantic import model_validator

from auth._acl import TooManyRules, bounded, groups_of, record_rules, truth
from auth._stored import StoredConfig, password_of
from broker.access.passwords import BadHash, Hash, Verifier
from broker.config.template import MissingValue
from broker.connectors.sql_text import Dialect, Refused, Rows, Statement
from broker.extend.auth import Answer, BackendUnavailable, Client, Grant, Refusal, Rule, Verdict, note
from broker.runtime.logs import limited

logger = logging.getLogger(__name__)

MAX_NAME = 1_024
"""Bytes of a name that is looked up."""
CHECK = "isthmus-check"
"""The name nobody has, which `check` asks for."""

_NAMES = ("username", "clientid", "peerhost", "cert_common_name", "cert_subject", "cert_san")
_UPDATE_NAMES = ("username", "password_hash", "old_password_hash")
_QUERIES = {
    "emq": (
        "select username, password, salt, is_superuser from mqtt_user where username = ${username} limit 2",
        "select allow, ipaddr, username, clientid, access, topic from mqtt_acl where ipaddr = ${peerhost} "
        "or username = ${username} or username = '$all' or clientid = ${clientid} order by id",
        "update mqtt_user set password = ${password_hash}, salt = null "
        "where username = ${username} and password = ${old_password_hash}",
    ),
    "emqx": (
        "select username, password_hash, salt, is_superuser from mqtt_user where username = ${username} limit 2",
        # whatever columns there are: a permission whose condition was not read would be a wider one
        "select * from mqtt_acl where username = ${username} order by id",
        "update mqtt_user set password_hash = ${password_hash}, salt = '' "
        "where username = ${username} and password_hash = ${old_password_hash}",
    ),
}
_OWN_COLUMNS = frozenset({"username", "password", "password_hash", "salt", "is_superuser"})
_CONDITIONS = ("ipaddr", "ipaddress", "username", "clientid", "group")
_GO_AUTH = {"1": "subscribe", "2": "publish", "3": "all", "4": "subscribe", "5": "subscribe", "6": "all", "7": "all"}


class Database(Protocol):
    """What a statement is asked of."""

    async def fetch(self, statement: Statement, values: Sequence[str | None]) -> Rows:
        """Raises Refused, BackendUnavailable."""

    async def close(self) -> None: ...


class SqlConfig(StoredConfig):
    """The keys of every table whose users are rows of a database."""

    tables: Literal["emq", "emqx"] = "emq"
    """Whose tables `mqtt_user` and `mqtt_acl` are: emq (2.x to 4.x: password, access 1 to 3) | emqx (5.x:
    password_hash, permission and action). Sets what the statements below are unless they are written."""
    authenticate: str | None = None
    """Statement that finds a user: the columns ``password`` or ``password_hash``, and maybe ``username`` (compared
    letter by letter), ``salt``, ``is_superuser``, ``groups`` (an array, or names with commas between them: rules with
    such a group apply); any other column is ``${attr.COLUMN}`` in topics. More than one row is a refusal. Placeholders
    ``${username}``, ``${clientid}``, ``${peerhost}``, ``${cert_common_name}`` (EMQ's ``%u``, ``%c``, ``%a``, ``%C``)
    are bound, never pasted. For mosquitto-go-auth's `userquery`: ``select username, password_hash from account where
    username = ${username} limit 2``."""
    superuser: str = ""
    """Statement whose first column tells with 1 or true whether the user may do everything; empty: the column
    ``is_superuser`` does. EMQ's `super_query`, mosquitto-go-auth's `superquery`."""
    authorize: str | None = None
    """Statement that finds the rights, read at login and every `refresh`: ``topic`` (``eq TOPIC``: as text), ``allow``
    or ``permission``, ``access`` or ``action``, and conditions ``ipaddr``, ``username`` (``$all``: everybody),
    ``clientid``, ``group``, ``qos``, ``retain``. The first row that applies decides, so give it an order. Empty: there
    are no rights here. For mosquitto-go-auth's `aclquery`: ``select topic, rw as access from acl where username =
    ${username}`` and ``acc_style = "go-auth"``."""
    acc_style: Literal["emq", "go-auth"] = "emq"
    """What the numbers of ``access`` mean: emq (1 subscribe, 2 publish, 3 both) | go-auth (1 read and 4 subscribe,
    which are one right here, 2 write, 3 both)."""
    acl_order: Literal["rows", "reversed"] = "rows"
    """Which row is looked at first: the first, or the last as EMQ 2.x to 4.x did."""
    no_match: Literal["next", "allow", "deny"] = "next"
    """What holds where no row applies: next (other sources of rules, then `[access] no_match`) | allow | deny."""
    exact_name: bool = True
    """Whether the name must be spelled as in the database, although some take ``Alice``, ``alice`` and ``alice `` for
    one. Needs the column ``username`` where the database does so by itself (MySQL)."""
    upgrade_to: Literal["argon2id"] | None = None
    """Replaces a stored password that is of an older form at the next login with it, by `update`. The user of the
    database must be allowed to write; the column must hold 97 characters."""
    update: str | None = None
    """Statement that stores the new ``${password_hash}`` of ``${username}`` in place of ``${old_password_hash}``."""

    dialect: ClassVar[Dialect]

    @model_validator(mode="after")
    def _check_statements(self) -> SqlConfig:
        self.statements()
        return self

    def statements(self) -> dict[str, Statement]:
        """By key, those that are there. ValueError."""
        authenticate, authorize, update = _QUERIES[self.tables]
        texts = {
            "authenticate": authenticate if self.authenticate is None else self.authenticate,
            "superuser": self.superuser,
            "authorize": authorize if self.authorize is None else self.authorize,
            "update": (update if self.update is None else self.update) if self.upgrade_to else "",
        }
        found = {}
        for key, text in texts.items():
            if not text and key != "authenticate":
                continue
            writes = key == "update"
            try:
                found[key] = Statement(text, self.dialect, _UPDATE_NAMES if writes else _NAMES, writes=writes)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        for key in ("authenticate", "superuser"):
            if key in found and not found[key].names:
                raise ValueError(f"{key}: needs a placeholder, e.g. where username = ${{username}}")
        if "update" in found and set(found["update"].names) != set(_UPDATE_NAMES):
            raise ValueError("update: needs ${username}, ${password_hash} and ${old_password_hash}")
        if self.update is not None and not self.upgrade_to:
            raise ValueError('update: is used with upgrade_to = "argon2id"')
        return found


class SqlAuth:
    """One statement finds the user, one the rights; rows that are not what was expected let nobody in."""

    def __init__(self, config: SqlConfig, database: Database) -> None:
        self._config = config
        self._database = database
        self._statements = config.statements()
        self._name = f"auth.{config.name}"
        self._verifier = Verifier(min(config.pool, 4))
        self._sample: Hash = config.password_hash.sample()
        authorize = self._statements.get("authorize")
        by_address = any("peerhost" in statement.names for statement in self._statements.values())
        self.by_address = by_address or (authorize is not None and bool(re.search(r"ipaddr|\*", authorize.sql)))
        self._damaged = limited(logger, "a stored password cannot be used")
        if config.password_hash.weak:
            logger.warning("auth.%s: %s", config.name, config.password_hash.weak)

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        found = await self._find(client)
        if not isinstance(found, dict):
            return Verdict.IGNORE if found is None else found
        stored = password_of(found, "password", "password_hash")
        try:
            hash = self._config.password_hash.read(stored, found.get("salt"))
        except BadHash as error:
            note(f"the stored password cannot be used: {error}")
            self._damaged.warning(
                "auth.%s: the stored password of user %r cannot be used: %s", self._config.name, client.username, error
            )
            return Verdict.DENY
        self._sample = hash
        right = await self._verifier.verify(hash, password)
        note(f"the password is {'right' if right else 'another'} ({hash.scheme})")
        if not right:
            return Verdict.DENY
        if "update" in self._statements and not hash.current:
            await self._upgrade(client, password, stored)
        return await self._rights(client, found)

    async def rules(self, client: Client) -> Grant | Refusal | None:
        """The rights a user has now."""
        found = await self._find(client)
        return await self._rights(client, found) if isinstance(found, dict) else found

    async def burn(self, password: bytes) -> None:
        """Takes as long as a wrong password took the last time."""
        await self._verifier.verify(self._sample, password)

    async def check(self) -> None:
        """Every statement with a name nobody has. Raises BackendUnavailable, also when a column is missing."""
        for key, statement in self._statements.items():
            try:
                rows = await self._database.fetch(statement, [CHECK] * len(statement.names))
            except Refused:
                continue  # it is compared with numbers, which this name is none of
            if key == "authenticate":
                self._check_columns(rows.columns)
            elif key == "authorize" and "topic" not in rows.columns:
                raise BackendUnavailable("authorize: the answer has no column topic")

    async def close(self) -> None:
        self._verifier.close()
        await self._database.close()

    async def _find(self, client: Client) -> dict[str, Any] | Refusal | None:
        """The user's row; None when there is no such user."""
        statement = self._statements["authenticate"]
        try:
            rows = await self._fetch("authenticate", client, missing=False)
        except MissingValue as error:
            note(f"{error}: the user cannot be looked up")
            return None
        except Refused as error:
            note(f"the database cannot take the name: {error}")
            return Refusal(f"user {_short(client.username)}: the database cannot take the name")
        note(f"{statement.text[:100]!r} finds {len(rows.rows)} rows")
        self._check_columns(rows.columns)
        if not rows.rows:
            return None
        if len(rows.rows) > 1:
            return Refusal(f"user {_short(client.username)} is in more than one row")
        found = dict(zip(rows.columns, map(_plain, rows.rows[0]), strict=True))
        name = _text(found.get("username", client.username))
        if self._config.exact_name and name != client.username:
            note(f"{client.username!r} is spelled {name!r} there (exact_name = true)")
            return Refusal(f"user {_short(client.username)} is spelled {_short(name)} in the database")
        return found

    def _check_columns(self, columns: Sequence[str]) -> None:
        if not {"password", "password_hash"} & set(columns):
            raise BackendUnavailable("authenticate: the answer has no column password or password_hash")
        if self._config.dialect == "mysql" and self._config.exact_name and "username" not in columns:
            raise BackendUnavailable(
                "authenticate: select username too, for the database takes Alice and alice for one; "
                "or write exact_name = false"
            )

    async def _rights(self, client: Client, found: Mapping[str, Any]) -> Grant | Refusal:
        try:
            superuser = truth(found.get("is_superuser"))
            if "superuser" in self._statements:
                answer = await self._fetch("superuser", client)
                superuser = len(answer.rows) == 1 and truth(_plain(answer.rows[0][0]))
            attributes = {
                name: _text(value)
                for name, value in found.items()
                if name not in _OWN_COLUMNS and type(value) in (str, bytes, int) and value not in ("", b"")
            }
            groups = groups_of(found.get("groups"))
            if superuser or "authorize" not in self._statements:
                note("superuser" if superuser else "no statement for rights")
                return Grant(superuser, attributes, groups=groups)
            answer = await self._fetch("authorize", client)
            return Grant(False, attributes, self._rules(client, answer), groups=groups)
        except TooManyRules as error:
            return Refusal(f"user {_short(client.username)} {error}", authorized=False)
        except Refused as error:
            return Refusal(f"user {_short(client.username)}: its rights cannot be looked up: {error}", authorized=False)

    def _rules(self, client: Client, answer: Rows) -> tuple[Rule, ...]:
        rows = list(enumerate(answer.rows, 1))
        if self._config.acl_order == "reversed":
            rows.reverse()
        rules = bounded(
            rule
            for number, row in rows
            for rule in record_rules(
                self._record(dict(zip(answer.columns, map(_plain, row), strict=True))),
                client,
                f"{self._name} row {number}",
            )
        )
        note(f"{len(rows)} rows, {len(rules)} rules")
        if self._config.no_match != "next":
            rules.append(Rule(self._config.no_match == "allow", "all", source=f"{self._name} no_match"))
        return tuple(rules)

    def _record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as EMQX's record. What allows is said with 1 or true or ``allow``; everything else denies."""
        record: dict[str, Any] = {"topic": row.get("topic")}
        if "permission" in row:
            record["permission"] = _text(row["permission"]).lower()
        else:
            record["permission"] = "allow" if "allow" not in row or truth(row["allow"]) else "deny"
        action = row.get("access", row.get("action", row.get("acc", "all")))
        text = _text(action).lower()
        record["action"] = _GO_AUTH.get(text, text) if self._config.acc_style == "go-auth" else text
        for name in _CONDITIONS:
            if row.get(name) not in (None, ""):
                record[name] = _text(row[name])
        for name in ("qos", "retain"):
            if row.get(name) not in (None, ""):
                record[name] = row[name]
        return record

    async def _fetch(self, key: str, client: Client, *, missing: bool = True) -> Rows:
        statement = self._statements[key]
        values = statement.bind(client.get, missing=missing)
        for value in values:
            if value is not None and ("\0" in value or len(value.encode("utf-8", "surrogatepass")) > MAX_NAME):
                raise Refused(f"a name is at most {MAX_NAME} bytes without NUL")
        return await self._database.fetch(statement, values)

    async def _upgrade(self, client: Client, password: bytes, stored: Any) -> None:
        """Store the password in today's form. The login is good whether or not this works."""
        values: dict[str, str | None] = {
            "username": client.username,
            "password_hash": await self._verifier.hash(password),
            "old_password_hash": _text(stored),
        }
        statement = self._statements["update"]
        try:
            await self._database.fetch(statement, statement.bind(values.get))
        except (BackendUnavailable, Refused) as error:
            note(f"the password could not be stored anew: {error}")
            self._damaged.warning("auth.%s: a password could not be stored anew: %s", self._config.name, error)
        else:
            note("the password was stored anew (upgrade_to)")


def _plain(value: Any) -> Any:
    """Text, bytes, numbers and truth as they are; what drivers make of bits, numerics, addresses and the like as
    numbers or text."""
    if value is None or isinstance(value, (str, bool, int, list, tuple)):
        return value
    if isinstance(value, (bytes, bytearray)):
        if len(value) == 1 and value[0] < 2:
            return value[0]  # MySQL's BIT(1)
        return bytes(value)
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)
    return str(value)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _short(name: str | None) -> str:
    return repr((name or "")[:100])
