"""One life of a bridge: three connections that begin together and end together.

The inlet publishes what comes in, the remote side is the other broker, the outlet receives what goes out. They are
opened in this order, each before anything can need it, because a broker may deliver in the same read that brings its
CONNACK. The first to end takes the others with it; `_mqtt_relay` says why that is enough to lose nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from broker.client.connection import Connection, Handler
from broker.mqtt.packets import Publish, Will

_PUBREL = 6


class Relays(Protocol):
    """What a link needs of a direction."""

    def on_publish(self, source: Connection, publish: Publish) -> None: ...
    def on_release(self, source: Connection, packet_id: int) -> None: ...
    def on_answer(self, packet_type: int, packet_id: int, code: int) -> None: ...


class Again(ConnectionError):
    """The link is cut on purpose and begun anew at once: the two sides' sessions did not belong together."""


class Link:
    """Knows when the first of the three connections has ended, and ends the others."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connections: list[Connection] = []

    def fail(self, error: Exception) -> None:
        """End this life; `lost` raises ``error``."""
        if not self.lost.done():
            self.lost.set_exception(error)
            self.lost.exception()  # read here: whoever opens the connections may fail before anybody waits

    def cut(self) -> None:
        """End every connection now, without DISCONNECT; the brokers publish the wills."""
        if not self.lost.done():
            self.lost.cancel()
        for conn in self.connections:
            conn.abort()

    async def leave(self) -> None:
        """End every connection with DISCONNECT; the brokers publish no will."""
        if not self.lost.done():
            self.lost.cancel()
        await asyncio.gather(*(conn.disconnect() for conn in self.connections), return_exceptions=True)

    async def add(self, opening: asyncio.Future[Connection]) -> Connection:
        """Wait for one more connection while those before must hold; raises ConnectionError of the first to end."""
        waiting: set[asyncio.Future[Any]] = {opening, self.lost}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _give_up(opening)
            raise
        if self.lost.done():
            await _give_up(opening)
            await self.lost
        conn = await opening
        self.connections.append(conn)
        return conn


async def _give_up(opening: asyncio.Future[Connection]) -> None:
    """Whatever comes of it: no connection stays and no error is left unread."""
    opening.cancel()
    (result,) = await asyncio.gather(opening, return_exceptions=True)
    if isinstance(result, Connection):
        result.abort()


class _Side(Handler):
    def __init__(self, link: Link, name: str) -> None:
        self._link = link
        self._name = name

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self._link.fail(ConnectionError(f"the {self._name} was lost: {exc or 'closed by us'}"))


class Inlet(_Side):
    """The local connection that publishes: only answers come from it."""

    def __init__(self, link: Link, will: Will | None, clean_start: bool) -> None:
        super().__init__(link, "local connection that publishes")
        self.will = will
        self.clean_start = clean_start
        self.relay: Relays | None = None

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if self.relay is not None and packet_type != _PUBREL:
            self.relay.on_answer(packet_type, packet_id, code)


class RemoteSide(_Side):
    """The remote connection: messages and PUBREL come in, answers belong to what went out."""

    def __init__(self, link: Link, receive_maximum: int, begin: Callable[[Connection], tuple[Relays, Relays]]) -> None:
        super().__init__(link, "connection to the remote broker")
        self.receive_maximum = receive_maximum
        self._begin = begin
        self._relays: tuple[Relays, Relays] | None = None

    def begin(self, conn: Connection) -> tuple[Relays, Relays] | None:
        """The relays in and out, made when the first packet after CONNACK needs them; None when the link has failed."""
        if self._relays is None and not self._link.lost.done():
            try:
                self._relays = self._begin(conn)
            except Again as error:
                self._link.fail(error)
        return self._relays

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        relays = self.begin(conn)
        if relays is not None:
            relays[0].on_publish(conn, publish)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        relays = self.begin(conn)
        if relays is None:
            return
        into, out = relays
        if packet_type == _PUBREL:
            into.on_release(conn, packet_id)
        else:
            out.on_answer(packet_type, packet_id, code)


class Outlet(_Side):
    """The local connection that receives: messages and PUBREL come from it."""

    def __init__(self, link: Link, receive_maximum: int, relay: Relays, begin: Callable[[Connection], None]) -> None:
        super().__init__(link, "local connection that receives")
        self.receive_maximum = receive_maximum
        self._relay = relay
        self._begin: Callable[[Connection], None] | None = begin

    def begin(self, conn: Connection) -> None:
        """What its CONNACK said is looked at before its first packet."""
        if self._begin is not None:
            begin, self._begin = self._begin, None
            try:
                begin(conn)
            except Again as error:
                self._link.fail(error)

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.begin(conn)
        if not self._link.lost.done():
            self._relay.on_publish(conn, publish)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        self.begin(conn)
        if packet_type == _PUBREL and not self._link.lost.done():
            self._relay.on_release(conn, packet_id)
