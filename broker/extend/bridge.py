"""What a bridge implements and what it is handed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from broker.extend.registry import InstanceConfig
from broker.extend.session import SessionSpec
from broker.extend.sink import Queue

if TYPE_CHECKING:
    from broker.client.connection import Connection, Handler


class BridgeConfig(InstanceConfig):
    """What every `[bridges.*]` table understands besides its own keys."""

    queue: Queue = Queue()
    """Limits of the durable queue that feeds this bridge."""
    worker: str = ""
    """Name of the worker process that runs this instance; empty: any."""

    def session(self) -> SessionSpec:
        """The durable session the broker keeps for this instance."""
        raise NotImplementedError


class Local(Protocol):
    """The broker's side of a bridge, handed to `run`."""

    node: str
    """The broker's node name."""
    lanes: int
    """The lanes the broker has for this instance: those configured, or more when some of a time before may still hold
    messages."""
    echoes: bool
    """Whether what `publish` brings comes back through `receive`: a foreign broker does not know that they are one."""

    async def receive(self, handler: Handler, lane: int = 0) -> Connection:
        """Attach to the durable session `isthmus/<instance>/<lane>`: gets PUBLISH, sends acknowledgements, never
        paused."""

    async def publish(self, handler: Handler) -> Connection:
        """Attach to the durable session `isthmus/<instance>/in`, which only publishes."""

    def report(self, **status: Any) -> None:
        """Tell the supervisor: state="connected"|"connecting"|"down", last_error=…, counters."""


class Bridge(Protocol):
    async def run(self, local: Local) -> None:
        """Lives until cancelled; raises ConnectionError when either side is lost and the supervisor starts it
        again with back-off (the bridge's own `restart` times)."""

    async def check(self) -> None:
        """One connection to the remote broker and back; raises ConnectionError."""

    async def close(self) -> None: ...
