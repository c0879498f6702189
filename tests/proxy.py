"""A TCP proxy that breaks connections on purpose, in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

Direction = Literal["up", "down"]
"""`up`: from the client to the server; `down`: back."""


@dataclass
class Counts:
    """What the proxy did so far; a test asserts them, so that a fault that never happened cannot pass."""

    accepted: int = 0
    refused: int = 0
    cut: int = 0
    reset: int = 0
    half_closed: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    swallowed: int = 0
    """Bytes that went into the black hole."""


class Pair:
    """One client connection and its twin towards the server."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.client = (reader, writer)
        self.server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        try:
            self.server = await asyncio.open_connection(self.proxy.host, self.proxy.target)
        except OSError:
            self.proxy.counts.refused += 1
            self.abort()
            return
        pumps = [
            asyncio.ensure_future(self._pump(self.client[0], self.server[1], "up")),
            asyncio.ensure_future(self._pump(self.server[0], self.client[1], "down")),
        ]
        try:
            await asyncio.gather(*pumps)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        proxy = self.proxy
        while data := await reader.read(65536):
            if proxy.delay:
                await asyncio.sleep(proxy.delay)
            await proxy._flowing.wait()
            if proxy.black_hole:
                proxy.counts.swallowed += len(data)
                continue
            limit = proxy._limits.get(direction)
            if limit is not None:
                data, last = data[:limit], len(data) >= limit
                proxy._limits[direction] = limit - len(data)
            else:
                last = False
            if direction == "up":
                proxy.counts.bytes_up += len(data)
            else:
                proxy.counts.bytes_down += len(data)
            writer.write(data)
            await writer.drain()
            if last:
                proxy._limits.pop(direction, None)
                proxy.counts.cut += 1
                writer.close()  # what was written still leaves
                raise ConnectionAbortedError
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()

    def abort(self, *, reset: bool = False) -> None:
        """Close both sides now; with `reset` the peers see RST instead of FIN."""
        for side in (self.client, self.server):
            if side is None:
                continue
            transport = side[1].transport
            sock = transport.get_extra_info("socket")
            if reset and sock is not None and sock.fileno() != -1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if reset:
                transport.abort()
            else:
                transport.close()


class Proxy:
    """Listens on a free loopback port and forwards to `host:target`.

    `async with Proxy("127.0.0.1", port) as proxy:` then connect to `proxy.port`. Every verb acts at once on the live
    connections; `up` and `down` switch whether new ones are taken.
    """

    def __init__(self, host: str, target: int, *, port: int = 0) -> None:
        self.host = host
        self.target = target
        self.port = port
        self.counts = Counts()
        self.delay = 0.0
        """Seconds every piece of data waits, in both directions."""
        self.black_hole = False
        """Connections are taken and stay open, nothing passes, in either direction."""
        self._pairs: dict[Pair, asyncio.Task[None]] = {}
        self._limits: dict[Direction, int] = {}
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def __aenter__(self) -> Proxy:
        await self.up()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.down()

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._pairs)

    async def up(self) -> None:
        """Take connections (again), on the same port as before."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse new connections and cut the open ones."""
        if (server := self._server) is not None:
            self._server = None
            for sock in server.sockets:
                asyncio.get_running_loop().remove_reader(sock.fileno())
            # asyncio takes a connection in one turn of the loop and hands it over in the third; closed in between, the
            # server leaves it open and unheard, and the client waits for as long as it likes
            for _ in range(2):
                await asyncio.sleep(0)
            server.close()
        await self.cut()

    async def cut(self) -> int:
        """Close every open connection (FIN); new ones are taken. Returns how many."""
        return await self._end(reset=False)

    async def reset(self) -> int:
        """The same with RST: the peers get ConnectionResetError."""
        return await self._end(reset=True)

    async def half_close(self, direction: Direction) -> int:
        """End one direction of every open connection: `up` shuts the way to the server, the way back stays open."""
        done = 0
        for pair in self._pairs:
            if pair.server is not None:
                writer = pair.server[1] if direction == "up" else pair.client[1]
                with contextlib.suppress(OSError, RuntimeError):
                    writer.write_eof()
                    done += 1
        self.counts.half_closed += done
        return done

    def cut_after(self, count: int, direction: Direction = "up") -> None:
        """Let exactly `count` more bytes through in that direction, then cut the connection with the last one."""
        if count <= 0:
            raise ValueError("at least one byte must pass")
        self._limits[direction] = count

    def stall(self) -> None:
        """Stop reading: data piles up in the peers' buffers until `flow`. Nothing is lost."""
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    async def _end(self, *, reset: bool) -> int:
        pairs = dict(self._pairs)
        for pair, task in pairs.items():
            pair.abort(reset=reset)
            task.cancel()
        await asyncio.gather(*pairs.values(), return_exceptions=True)
        if reset:
            self.counts.reset += len(pairs)
        else:
            self.counts.cut += len(pairs)
        return len(pairs)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.accepted += 1
        pair = Pair(self, reader, writer)
        task = asyncio.ensure_future(pair.run())
        self._pairs[pair] = task
        task.add_done_callback(lambda _: self._pairs.pop(pair, None))
