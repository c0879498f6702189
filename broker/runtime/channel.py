"""JSON lines between the broker and one worker, over the socket pair the worker inherited.

Broker to worker: ``{"hello": {…}}`` once, ``{"apply": {"number": n, "instances": {key: {…}}, "slots": {key: n},
"paused": [key]}}``, ``{"pause": key}``, ``{"resume": key}``, ``{"stop": seconds}``. Worker to broker:
``{"status": {key: {…}}}`` every second and on every change, ``{"applied": n}``,
``{"alarm": {"instance": key, "text": …}}``. The end of the stream means the other process is gone.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any

_LONGEST = 64 << 20  # a line; the configuration of every instance of a worker is one


class Channel:
    """One end of the pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Channel:
        """Take over ``sock``, which is closed with the channel."""
        sock.setblocking(False)
        return cls(*await asyncio.open_connection(sock=sock, limit=_LONGEST))

    def send(self, message: dict[str, Any]) -> None:
        """Queue one message; without effect when the other side is gone."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message, separators=(",", ":"), default=str).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message, None when the other side is gone (also when it stopped making sense)."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):
            return None
        if not line.endswith(b"\n"):
            return None
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    async def flush(self) -> None:
        """Let what was sent leave this process, for a second at most."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.drain()

    def close(self) -> None:
        """Close our end."""
        self._writer.close()
