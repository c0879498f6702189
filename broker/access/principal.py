"""Who is behind a session, and where its rights come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.access.rules import RuleSet
from broker.extend.auth import Client, Rule

_NONE: Mapping[str, str] = {}


class Standing:
    """How a client came in and what that gives it. Never changed: one object serves all clients it is true of."""

    __slots__ = (
        "attributes", "audit", "auth", "backend", "certificate", "expires_at", "groups", "listener", "origin",
        "own_rules", "privileged", "superuser",
    )  # fmt: skip

    def __init__(
        self,
        *,
        listener: str = "",
        auth: tuple[str, ...] | None = None,
        backend: str | None = None,
        superuser: bool = False,
        privileged: bool = False,
        origin: str | None = None,
        attributes: Mapping[str, str] = _NONE,
        certificate: Mapping[str, str] = _NONE,
        own_rules: Sequence[Rule] = (),
        groups: frozenset[str] = frozenset(),
        expires_at: float | None = None,
        audit: Callable[[Principal, str, str], None] | None = None,
    ) -> None:
        self.listener = listener
        self.auth = auth
        """Names of the backends that decide on its listener; None: all."""
        self.backend = backend
        """Name of the instance that let it in; None: anonymous, or a certificate."""
        self.superuser = superuser
        self.privileged = privileged
        self.origin = origin
        """Name of the sink or bridge a worker's connection acts for."""
        self.attributes = attributes
        self.certificate = certificate
        self.own_rules = own_rules
        self.groups = groups
        self.expires_at = expires_at
        self.audit = audit

    def granted(
        self,
        superuser: bool,
        attributes: Mapping[str, str],
        own_rules: Sequence[Rule],
        groups: frozenset[str],
        expires_at: float | None,
    ) -> Standing:
        """The same with other rights."""
        return Standing(
            listener=self.listener, auth=self.auth, backend=self.backend, superuser=superuser,
            privileged=self.privileged, origin=self.origin, attributes=attributes, certificate=self.certificate,
            own_rules=own_rules, groups=groups, expires_at=expires_at, audit=self.audit,
        )  # fmt: skip

    def on(self, auth: tuple[str, ...] | None) -> Standing:
        """The same where other backends decide."""
        return Standing(
            listener=self.listener, auth=auth, backend=self.backend, superuser=self.superuser,
            privileged=self.privileged, origin=self.origin, attributes=self.attributes, certificate=self.certificate,
            own_rules=self.own_rules, groups=self.groups, expires_at=self.expires_at, audit=self.audit,
        )  # fmt: skip


class Principal:
    """An authenticated client. Small, because every session has one; rules are shared and found lazily."""

    __slots__ = (
        "__weakref__", "_clientid", "generation", "peer", "rendered", "sources", "standing", "username",
    )  # fmt: skip

    def __init__(
        self,
        clientid: str,
        username: str | None = None,
        peer: str = "",
        standing: Standing | None = None,
        **own: Any,
    ) -> None:
        """`own` are the fields of a standing that is this client's alone."""
        self._clientid = clientid
        self.username = username
        self.peer = peer
        self.standing = Standing(**own) if standing is None else standing
        self.generation = -1
        self.sources: tuple[RuleSet, ...] = ()
        self.rendered: dict[object, object] | None = None

    @property
    def listener(self) -> str:
        """Name of the listener it came through."""
        return self.standing.listener

    @property
    def auth(self) -> tuple[str, ...] | None:
        """As in its standing."""
        return self.standing.auth

    @property
    def backend(self) -> str | None:
        """As in its standing."""
        return self.standing.backend

    @property
    def superuser(self) -> bool:
        """Whether no rule counts for it."""
        return self.standing.superuser

    @property
    def privileged(self) -> bool:
        """Whether it is a worker."""
        return self.standing.privileged

    @property
    def origin(self) -> str | None:
        """As in its standing."""
        return self.standing.origin

    @property
    def attributes(self) -> Mapping[str, str]:
        """What the backend told of it, with names in lower case."""
        return self.standing.attributes

    @property
    def own_rules(self) -> Sequence[Rule]:
        """The rules its backend gave for it."""
        return self.standing.own_rules

    @property
    def groups(self) -> frozenset[str]:
        """Groups and roles its backend knows it by."""
        return self.standing.groups

    @property
    def expires_at(self) -> float | None:
        """Wall clock until which it may do anything; None: for ever."""
        return self.standing.expires_at

    @property
    def clientid(self) -> str:
        """The client id; may be set once more, when the server has assigned one."""
        return self._clientid

    @clientid.setter
    def clientid(self, clientid: str) -> None:
        self._clientid = clientid
        self.rendered = None

    @property
    def peerhost(self) -> str:
        """The peer's address without its port."""
        host, colon, _ = self.peer.rpartition(":")
        return host if colon else self.peer

    def forget(self) -> None:
        """Look up the sources of rules again, and fill in their placeholders again."""
        self.generation = -1
        self.rendered = None

    def client(self) -> Client:
        """As the backends know it."""
        return Client(self._clientid, self.username, self.peerhost, self.standing.listener, self.standing.certificate)

    def value(self, name: str) -> str | None:
        """The value of a placeholder in a rule; None when there is none."""
        if name == "clientid":
            return self._clientid
        if name == "username":
            return self.username
        if name == "peerhost":
            return self.peerhost
        if name.startswith("attr."):
            return self.standing.attributes.get(name[5:].lower())
        return self.standing.certificate.get(name)

    def unsafe(self, name: str, value: str) -> None:
        """A value that may not stand in a topic made a rule not apply."""
        audit = self.standing.audit
        if audit is not None:
            audit(self, name, value)

    def __repr__(self) -> str:
        return f"Principal({self._clientid!r}, {self.username!r})"
