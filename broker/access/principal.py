"""Who is behind a session, and where its rights come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from broker.access.rules import RuleSet
from broker.extend.auth import Client, Rule

_NONE: Mapping[str, str] = {}


class Principal:
    """An authenticated client. Small, because every session has one; rules are shared and found lazily."""

    __slots__ = (
        "__weakref__", "_clientid", "attributes", "audit", "auth", "backend", "certificate", "expires_at",
        "generation", "listener", "origin", "own_rules", "peer", "privileged", "rendered", "sources",
        "superuser", "username",
    )  # fmt: skip

    def __init__(
        self,
        clientid: str,
        username: str | None = None,
        *,
        peer: str = "",
        listener: str = "",
        auth: tuple[str, ...] | None = None,
        backend: str | None = None,
        superuser: bool = False,
        privileged: bool = False,
        origin: str | None = None,
        attributes: Mapping[str, str] = _NONE,
        certificate: Mapping[str, str] = _NONE,
        own_rules: Sequence[Rule] = (),
        expires_at: float | None = None,
        audit: Callable[[Principal, str, str], None] | None = None,
    ) -> None:
        self._clientid = clientid
        self.username = username
        self.peer = peer
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
        self.expires_at = expires_at
        self.audit = audit
        self.generation = -1
        self.sources: tuple[RuleSet, ...] = ()
        self.rendered: dict[object, object] | None = None

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
        return Client(self._clientid, self.username, self.peerhost, self.listener, self.certificate)

    def value(self, name: str) -> str | None:
        """The value of a placeholder in a rule; None when there is none."""
        if name == "clientid":
            return self._clientid
        if name == "username":
            return self.username
        if name == "peerhost":
            return self.peerhost
        if name.startswith("attr."):
            return self.attributes.get(name[5:].lower())
        return self.certificate.get(name)

    def unsafe(self, name: str, value: str) -> None:
        """A value that may not stand in a topic made a rule not apply."""
        if self.audit is not None:
            self.audit(self, name, value)

    def __repr__(self) -> str:
        return f"Principal({self._clientid!r}, {self.username!r})"
