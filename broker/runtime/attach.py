"""How an instance attaches to its durable sessions. The internal listener's way; `foreign` has its own."""

from __future__ import annotations

from typing import Protocol

from broker.client.connection import Connection, Handler, connect
from broker.extend.session import SessionSpec

FOREVER = 0xFFFFFFFF
"""A session expiry that never comes [MQTT-3.1.2-23]."""


class Attach(Protocol):
    """Opens one connection of an instance; both the lanes of sinks and the two sides of bridges use it."""

    trusted: bool
    """Whether `$isthmus` of what is received was written by our broker."""
    in_order: bool
    """Whether acknowledgements must be sent in the order of the deliveries [MQTT-4.6.0-2]."""
    longest_wait: float
    """Seconds between two tries to attach, at most."""

    async def __call__(self, instance: str, part: str, handler: Handler, spec: SessionSpec) -> Connection:
        """Attach to ``isthmus/<instance>/<part>``: a lane's number, or ``in``, which only publishes (``in-2``: beside
        lane 2 and others, in a worker of their own).

        Raises ConnectionError, which is tried again, or ValueError for what will never work.
        """


class Internal:
    """The broker's own listener: sessions and subscriptions are there already, so a worker only attaches."""

    trusted = True
    in_order = False
    longest_wait = 1.0

    def __init__(self, url: str) -> None:
        self._url = url

    async def __call__(self, instance: str, part: str, handler: Handler, spec: SessionSpec) -> Connection:
        return await connect(
            self._url,
            client_id=f"isthmus/{instance}/{part}",
            handler=handler,
            clean_start=False,
            session_expiry=FOREVER,
            keep_alive=60,
            receive_maximum=65_535,
            timeout=10.0,
        )
