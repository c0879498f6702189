"""What an auth backend implements and what it is handed."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Literal, Protocol

from pydantic import ConfigDict, Field

from broker.config.template import Template
from broker.config.types import Duration
from broker.extend.registry import InstanceConfig


class Verdict(Enum):
    """The three answers of a backend; the fourth, an error, is an exception."""

    ALLOW = "allow"
    DENY = "deny"
    """The user is known here and may not log in: the chain ends."""
    IGNORE = "ignore"
    """The user is not known here: the next backend is asked."""


class BackendUnavailable(ConnectionError):
    """The backend cannot answer now. Refuses the client as "server unavailable" unless `on_error` says otherwise;
    never cached. The text is for the operator and holds no secrets."""


class Identity(Protocol):
    """Who acts: what a rule's condition may look at."""

    @property
    def clientid(self) -> str: ...
    @property
    def username(self) -> str | None: ...
    @property
    def peerhost(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Client:
    """A client that asks to log in."""

    clientid: str
    username: str | None = None
    peerhost: str = ""
    listener: str = ""
    certificate: Mapping[str, str] = field(default_factory=dict)
    """What the connection itself proved: `cert_common_name`, `cert_subject`, `cert_san`, cookies and headers."""

    def get(self, name: str) -> str | None:
        """The value of a placeholder, for `Template.render`; None when this client has none."""
        if name == "clientid":
            return self.clientid or None
        if name == "username":
            return self.username or None
        if name == "peerhost":
            return self.peerhost or None
        return self.certificate.get(name)


Action = Literal["publish", "subscribe", "all"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One right, or its denial. In a list of rules the first that applies decides."""

    allow: bool
    action: Action
    filter: Template | None = None
    """Topic filter, with placeholders `${clientid}` `${username}` `${peerhost}` `${cert_common_name}` `${attr.name}`
    or None for every topic. A value that holds `+`, `#`, `/` or NUL makes the rule not apply."""
    exact: bool = False
    """The filter is compared as text: its wildcards have no meaning."""
    user: str | None = None
    """Applies to this user name only."""
    client: str | None = None
    """Applies to this client id only."""
    when: Callable[[Identity], bool] | None = None
    """Any further condition; must be quick and never raise."""
    source: str = ""
    """Where it was written, for explanations: ``acl.conf:12`` or ``group operators``."""
    group: str | None = None
    """Applies to members of this group only, whichever backend named it in `Grant.groups`."""
    qos: frozenset[int] | None = None
    """Applies to these QoS only: of the message published, of the subscription asked for. None: to every QoS."""
    retain: bool | None = None
    """Applies to publishing retained messages only, or to all others only; has no meaning for subscriptions."""


@dataclass(frozen=True, slots=True)
class Grant:
    """ALLOW with more to say."""

    superuser: bool = False
    """Skips every rule."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Values of `${attr.name}` in rules."""
    rules: Sequence[Rule] = ()
    """This client's own rules."""
    expires_at: float | None = None
    """Unix time from which the login is no longer good; bounds the cache too."""
    username: str | None = None
    """The name the client is known by from now on, when it is not the one it gave."""
    groups: frozenset[str] = frozenset()
    """Whose member the client is: rules with such a `group` apply to it, whichever backend they come from."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """DENY with more to say. `reason` is for the operator, the client sees only the reason code."""

    reason: str
    authorized: bool = True
    """False: the password is right but this user may not connect (0x87); True: bad user name or password (0x86)."""


Answer = Verdict | Grant | Refusal


class AuthConfig(InstanceConfig):
    """What every `[auth.*]` table understands besides its own keys."""

    model_config = ConfigDict(hide_input_in_errors=True)  # the input holds passwords

    timeout: Annotated[Duration, Field(gt=0, le=60)] | None = None
    """Seconds to wait for one answer. Default: `[access] timeout` (3s)."""
    on_error: Literal["deny", "ignore"] | None = None
    """What a failure of this backend means: deny (the client is told "server unavailable") | ignore (the next
    backend is asked). Default: `[access] on_error`."""
    pool: int = Field(default=8, ge=1, le=256)
    """Connections (or threads) this backend works with at the same time."""
    max_concurrent: int | None = Field(default=None, ge=1, le=10_000)
    """Calls served at the same time; four times as many wait, the rest is told "server busy".
    Default: `[access] max_concurrent` (64)."""
    cache_ttl: Annotated[Duration, Field(le=86_400)] | None = None
    """Seconds a positive verdict is remembered, give or take a tenth; 0 asks every time.
    Default: `[access] cache_ttl`."""
    negative_cache_ttl: Annotated[Duration, Field(le=5)] | None = None
    """Seconds a refusal is remembered; errors never are. Default: `[access] negative_cache_ttl`."""
    stale_if_error: Annotated[Duration, Field(le=604_800)] = 0.0
    """Seconds after a login during which the same credentials are still let in while the backend fails; 0: never."""
    refresh: Annotated[Duration, Field(le=604_800)] = 300.0
    """Seconds after which the rights of connected clients are read again, by backends that keep rights; 0: only at
    login and when this table changes."""


class AuthBackend(Protocol):
    """Called concurrently, at most `max_concurrent` times at once, each call with a deadline and cancelled after it.

    A backend does not retry, cache, count or log-and-continue. It may also have (each is looked for, none is needed):

    - ``common_rules: Sequence[Rule]``: rules for every client, whoever let it in;
    - ``async rules(client) -> Grant | Sequence[Rule] | Refusal | None``: the rights of a client that was authenticated
      elsewhere (by certificate) or long ago; None: not known here;
    - ``by_address = True``: verdicts depend on the client's address, so cache them per address;
    - ``reopen_on_reload = True``: opened anew at each reload (it reads files);
    - ``without_password = True``: is asked about clients without a password too, with an empty one: what they prove
      themselves with is in `Client.certificate` or is the user name;
    - ``at_once(client, password) -> Answer | None``: what `authenticate` would answer, when that needs nobody and no
      thread and takes far less than a millisecond; None: ask `authenticate`. Called for each login that is not in the
      cache, without deadline or bulkhead;
    - ``screen(client) -> Refusal | None``: asked before everything else about every client that logs in, also one
      with a certificate or without any name; must be quick and never raise;
    - ``async reread()``: the accounts it keeps were edited (`Accounts`): read them again;
    - ``async burn(password)``: spend the time of one password check, called when no backend knew the user;
      BackendUnavailable from it refuses the client as one from `authenticate` does.
    """

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        """Who is this? The user name is never empty here and a password is present, possibly of zero length.
        Raises BackendUnavailable; any other exception counts as one."""

    async def check(self) -> None:
        """One real round trip; raises BackendUnavailable."""

    async def close(self) -> None:
        """Also works after a half-finished opening."""


class AccountError(ValueError):
    """An account cannot be added, changed or deleted; the text says why."""


@dataclass(frozen=True, slots=True)
class Account:
    """One user of the store of accounts. `scheme` tells how its password is kept."""

    name: str
    scheme: str
    superuser: bool = False


class Accounts(Protocol):
    """What ``isthmus user`` edits, whether or not a broker runs: a config whose users can be edited has a method
    ``accounts() -> Accounts``, which raises AccountError when they cannot, with this configuration. `str` of it names
    the file. Every verb is complete on disk when it returns and raises AccountError or OSError."""

    def users(self) -> list[Account]:
        """Every user."""

    def add(self, name: str, hash: str) -> None:
        """A new user. `hash` is argon2id."""

    def passwd(self, name: str, hash: str) -> None:
        """Another password for a user there is."""

    def delete(self, name: str) -> None:
        """Remove a user."""


_notes: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)


def note(text: str) -> None:
    """Add a step to the explanation that `isthmus auth test` prints; costs nothing otherwise. Never a secret."""
    notes = _notes.get()
    if notes is not None:
        notes.append(text)


def take_notes() -> list[str]:
    """Start collecting what `note` is told in this task and those it starts; the list fills as they run."""
    notes: list[str] = []
    _notes.set(notes)
    return notes
