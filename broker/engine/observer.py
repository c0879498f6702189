"""Who wants to know what becomes of clients and sessions. Nobody by default, and then it costs nothing."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Observer(Protocol):
    """Called by the engine at once and in the order of things; must be quick and must not raise. Workers' connections
    and sessions are told of as well: `channel.listener.privileged`, `session.spec`."""

    def session_created(self, channel: Any) -> None:
        """A client connects for which nothing is kept from before; `connected` follows."""

    def connected(self, channel: Any) -> None:
        """A client was welcomed: its CONNACK has been handed to the network."""

    def disconnected(self, channel: Any, why: int | str) -> None:
        """The connection of a session ended, also of one that was never welcomed. `why` is a reason code of MQTT 5, a
        word of the engine's, or empty when the peer or the network just closed it."""

    def session_terminated(self, session: Any) -> None:
        """A session and all it held is gone."""

    def subscribed(self, session: Any, filters: Sequence[tuple[bytes, int]], codes: Sequence[int]) -> None:
        """A SUBSCRIBE was decided: filters with their options, and a code for each."""

    def unsubscribed(self, session: Any, filters: Iterable[bytes]) -> None:
        """These subscriptions ended before their session did: the client or its rights wanted so."""
