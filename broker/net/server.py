"""Accepts plain TCP through uvloop's own server, which saves 180 bytes a connection against `Acceptor`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from broker.net.binding import BACKLOG
from broker.net.descriptors import Descriptors
from broker.net.shortage import Shortage

LOOK_EVERY = 8
"""Connections between two looks at the descriptors; uvloop accepts one a tick, so the reserve loses no more to them."""


class Server:
    """Makes a protocol with `factory` for each connection.

    uvloop gets a duplicate of the listening socket. While descriptors are short that duplicate is closed: the kernel
    goes on queueing connections, where libuv would accept and close them.
    """

    __slots__ = ("_descriptors", "_factory", "_loop", "_opening", "_seen", "_server", "_shortage", "sock")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        name: str,
        factory: Callable[[], asyncio.BaseProtocol],
        descriptors: Descriptors,
    ) -> None:
        self.sock = sock
        self._loop = loop
        self._factory = factory
        self._descriptors = descriptors
        self._server: asyncio.AbstractServer | None = None
        self._opening: asyncio.Task[None] | None = None
        self._seen = 0
        self._shortage = Shortage(loop, descriptors, name, sock.fileno(), self.start)

    def start(self) -> None:
        """Begin to accept."""
        self._seen = 0
        self._opening = self._loop.create_task(self._serve())

    def stop(self) -> None:
        """Accept nothing more; the socket stays open and its owner closes it."""
        self._shortage.cancel()
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self) -> None:
        try:
            duplicate = self.sock.dup()
        except OSError:
            self._shortage.begin()
            return
        self._server = await self._loop.create_server(self._make, sock=duplicate, backlog=BACKLOG)

    def _make(self) -> asyncio.BaseProtocol:
        self._seen += 1
        if self._seen % LOOK_EVERY == 1:
            if not self._descriptors.available(self.sock.fileno()):
                self._loop.call_soon(self._run_short)
            elif self._seen > LOOK_EVERY:
                self._shortage.over()
        return self._factory()

    def _run_short(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            self._shortage.begin()
