"""What the engine asks of access control. The room `access` implements it; the engine imports none of it."""

from typing import Any, Protocol

DENY = 0
ALLOW = 1


class Principal(Protocol):
    """Who a connection turned out to be."""

    username: str | None
    clientid: str
    privileged: bool
    superuser: bool
    origin: str | None


class Gate(Protocol):
    """Every answer but the first is synchronous and comes from local rules."""

    def authenticate(self, channel: Any, connect: Any) -> None:
        """Called once a CONNECT: answer `channel.accept(principal)` or `channel.refuse(code)`, at once or later."""

    def cancel(self, channel: Any) -> None:
        """The connection went away while its answer was pending."""

    def may_publish(self, principal: Any, topic: str) -> int:
        """Whether everything may be published there. Asked once per session and topic; the answer is kept until
        `rights_changed`."""

    def publishable(self, principal: Any, topic: str) -> int:
        """Asked after a 0, and kept like it: bit ``qos << 1 | retain`` is set for what may be published."""

    def may_subscribe(self, principal: Any, filter: str, qos: int) -> int:
        """Whether the whole filter is covered, with this QoS."""

    def may_receive(self, principal: Any, topic: str) -> int:
        """Asked when a route is filled."""

    def will_terms(self, principal: Any, topic: str, qos: int, retain: bool) -> dict[str, Any]:
        """What is kept on disk, as JSON, with the will of a client that may publish it now: `may_publish_will` gets it
        back after a restart."""

    def may_publish_will(
        self,
        clientid: str,
        username: str | None,
        peerhost: str,
        terms: dict[str, Any],
        topic: str,
        qos: int,
        retain: bool,
    ) -> int:
        """Whether the will of a client that connected before a restart may be published now that it is due. A ban and a
        right that was taken away meanwhile count; what cannot be established is a no."""


class InternalPrincipal:
    """The broker itself and the workers it started."""

    superuser = True
    privileged = True

    def __init__(self, clientid: str, username: str | None = None, origin: str | None = None) -> None:
        self.clientid = clientid
        self.username = username
        self.origin = origin


class OpenGate:
    """Lets everybody in and allows everything: for tests and embedding."""

    def authenticate(self, channel: Any, connect: Any) -> None:
        """Accept at once."""
        principal = InternalPrincipal(connect.client_id, connect.username)
        principal.privileged = channel.listener.privileged
        channel.accept(principal)

    def cancel(self, channel: Any) -> None:
        """Nothing is ever pending."""

    def may_publish(self, principal: Any, topic: str) -> int:
        """Always."""
        return ALLOW

    def publishable(self, principal: Any, topic: str) -> int:
        """Everything."""
        return 0b111111

    def may_subscribe(self, principal: Any, filter: str, qos: int) -> int:
        """Always."""
        return ALLOW

    def may_receive(self, principal: Any, topic: str) -> int:
        """Always."""
        return ALLOW

    def will_terms(self, principal: Any, topic: str, qos: int, retain: bool) -> dict[str, Any]:
        """None."""
        return {}

    def may_publish_will(
        self,
        clientid: str,
        username: str | None,
        peerhost: str,
        terms: dict[str, Any],
        topic: str,
        qos: int,
        retain: bool,
    ) -> int:
        """Always."""
        return ALLOW
