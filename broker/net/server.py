"""Accepts plain TCP through uvloop's own server, which saves 180 bytes a connection against `Acceptor`."""

from __future__ import annotations

import asyncio
import socket

from broker.net.binding import BACKLOG
from broker.net.descriptors import Descriptors
from broker.net.shortage import Shortage

PER_TICK = 8
"""Connections accepted in one turn of the loop. libuv takes one for each descriptor it listens on, so there are as many
of the one socket; what a turn costs (two system calls and more) is then shared by them."""
LOOK_EVERY = 8
"""Connections between two looks at the descriptors; with those of the same turn the reserve loses no more to them."""


class Server:
    """Gives each connection's transport `protocol`, which has to replace itself.

    uvloop gets duplicates of the listening socket. While descriptors are short they are closed: the kernel goes on
    queueing connections, where libuv would accept and close them.
    """

    __slots__ = ("_descriptors", "_loop", "_opening", "_protocol", "_seen", "_servers", "_shortage", "sock")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        name: str,
        protocol: asyncio.BaseProtocol,
        descriptors: Descriptors,
    ) -> None:
        self.sock = sock
        self._loop = loop
        self._protocol = protocol
        self._descriptors = descriptors
        self._servers: list[asyncio.AbstractServer] = []
        self._opening: asyncio.Task[None] | None = None
        self._seen = 0
        needed = PER_TICK + LOOK_EVERY  # its own, which it gave back, and the first connections
        self._shortage = Shortage(loop, descriptors, name, sock.fileno(), self.start, needed)

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
        self._close()

    async def _serve(self) -> None:
        for _ in range(PER_TICK):
            try:
                duplicate = self.sock.dup()
            except OSError:
                self._close()
                self._shortage.begin()
                return
            self._servers.append(await self._loop.create_server(self._make, sock=duplicate, backlog=BACKLOG))

    def _make(self) -> asyncio.BaseProtocol:
        self._seen += 1
        if self._seen % LOOK_EVERY == 1:
            if not self._descriptors.available(self.sock.fileno()):
                self._loop.call_soon(self._run_short)
            elif self._seen > LOOK_EVERY:
                self._shortage.over()
        return self._protocol

    def _run_short(self) -> None:
        if self._servers:
            self._close()
            self._shortage.begin()

    def _close(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
