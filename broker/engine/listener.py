"""What the engine knows of the listener a connection came through."""

from collections.abc import Callable
from typing import Any


def _uncounted() -> None:
    """Nobody counts the connections."""


def _unknown(data: bytes) -> str | None:
    """Nobody knows other protocols."""
    return None


class ListenerInfo:
    """`auth` names the backends that decide here (None: all); `privileged` marks the internal listener of workers.
    `on_lost` is called when one of its connections is gone; `speech` says what bytes that are no MQTT are."""

    __slots__ = (
        "attributes",
        "auth",
        "bridge_bit",
        "connections",
        "kind",
        "max_connections",
        "max_packet_size",
        "name",
        "on_lost",
        "privileged",
        "speech",
    )

    def __init__(
        self,
        name: str,
        kind: str = "tcp",
        *,
        auth: tuple[str, ...] | None = None,
        max_packet_size: int = 0,
        max_connections: int = 0,
        privileged: bool = False,
        bridge_bit: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.auth = auth
        self.max_packet_size = max_packet_size
        self.max_connections = max_connections
        self.privileged = privileged
        self.bridge_bit = bridge_bit
        self.attributes = attributes or {}
        self.connections = 0
        self.on_lost: Callable[[], None] = _uncounted
        self.speech: Callable[[bytes], str | None] = _unknown
