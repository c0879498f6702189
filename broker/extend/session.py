"""What an instance asks of the broker: the durable session that feeds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ack = Literal["accept", "spool", "delivered"]
Overflow = Literal["reject", "block", "drop_oldest", "drop_newest"]


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """The session(s) ``isthmus/<instance>/<lane>`` the broker creates when a configuration is applied."""

    filters: tuple[tuple[str, int], ...]
    """MQTT topic filters and the QoS each is subscribed at."""
    lanes: int = 1
    order_key: str = "${clientid}"
    """A message goes to lane hash(order_key) mod lanes."""
    ack: Ack = "spool"
    upgrade_qos: bool = True
    """QoS 0 publishes are queued as QoS 1."""
    retained: Literal["never", "new", "always"] = "never"
    """Whether retained messages are sent: not at all, on a new session only, on every new subscription."""
    no_local: bool = True
    retain_as_published: bool = True
    max_bytes: int = 1 << 30
    overflow: Overflow = "reject"
    max_age: float = 0.0
    """Seconds after which a message that still queues is dropped; 0 for never."""
