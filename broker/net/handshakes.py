"""Starts TLS hand-shakes: only when the peer has spoken, a bounded number a tick, all within the connect deadline.

A hand-shake costs the server a signature, about half a millisecond, when the ClientHello is there. So an accepted
socket waits without any TLS state until it is readable, then queues for its turn: a thousand reconnecting devices delay
everybody else by a few milliseconds a tick, and a thousand silent ones cost a descriptor each.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

from broker.net.connection import HTTP_METHODS, TLS_HANDSHAKE
from broker.net.tls import acceptable_server_name, hello_server_name

PER_TICK = 8
"""Hand-shakes started a tick; about four milliseconds with RSA 2048."""
LOOK = 0.25
"""Seconds between two looks for sockets whose deadline has passed in silence."""
HELLO = 4096
"""Bytes of a ClientHello that are examined."""


class Secure(Protocol):
    """The listener a socket came through."""

    name: str

    def report(self, category: str, text: str) -> None:
        """One line for the operator, limited by category."""
        ...

    def released(self, reason: str) -> None:
        """A socket is gone that never became a connection."""
        ...

    def crashed(self, peer: str, error: Exception) -> None:
        """An error of ours ends this socket."""
        ...


class Waiting:
    """A socket that has not spoken yet, or whose turn has not come."""

    __slots__ = ("begin", "deadline", "listener", "peer", "sock")

    def __init__(
        self, listener: Secure, sock: socket.socket, peer: str, deadline: float, begin: Callable[[Waiting], None]
    ) -> None:
        self.listener = listener
        self.sock = sock
        self.peer = peer
        self.deadline = deadline
        self.begin = begin


class Handshakes:
    """All sockets of all TLS listeners that are on their way to a hand-shake."""

    __slots__ = ("_loop", "_ready", "_silent", "_starting", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._silent: OrderedDict[int, Waiting] = OrderedDict()
        self._ready: deque[Waiting] = deque()
        self._starting = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._silent) + len(self._ready)

    def add(self, waiting: Waiting) -> None:
        """Wait for the peer's first bytes, then call ``waiting.begin`` in its turn."""
        fd = waiting.sock.fileno()
        self._silent[fd] = waiting
        self._loop.add_reader(fd, self._on_readable, fd)
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK, self._look)

    def close(self) -> None:
        """Drop everything that waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for fd in list(self._silent):
            self._drop(self._forget(fd), "closed", None)
        while self._ready:
            self._drop(self._ready.popleft(), "closed", None)

    def _on_readable(self, fd: int) -> None:
        self._ready.append(self._forget(fd))
        if not self._starting:
            self._starting = True
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        for _ in range(min(PER_TICK, len(self._ready))):
            waiting = self._ready.popleft()
            try:
                self._examine(waiting)
            except Exception as error:  # those behind it are still to have their turn
                waiting.listener.crashed(waiting.peer, error)
                self._drop(waiting, "internal_error", None)
        self._starting = bool(self._ready)
        if self._starting:
            self._loop.call_soon(self._start)

    def _examine(self, waiting: Waiting) -> None:
        try:
            hello = waiting.sock.recv(HELLO, socket.MSG_PEEK)
        except BlockingIOError:
            self.add(waiting)
            return
        except OSError:
            hello = b""
        if waiting.deadline <= self._loop.time():
            self._drop(waiting, "deadline", "did not begin the TLS hand-shake in time")
        elif not hello:
            self._drop(waiting, "hung_up", None)
        elif hello[0] != TLS_HANDSHAKE:
            what = "an HTTP request" if hello[:4] in HTTP_METHODS else "plain bytes"
            self._drop(waiting, "not_tls", f"sent {what} to a TLS port")
        else:
            name = hello_server_name(hello)
            if name is not None and not acceptable_server_name(name.decode("latin-1")):
                self._drop(waiting, "server_name", "asked for an impossible server name")
            else:
                waiting.begin(waiting)

    def _look(self) -> None:
        now = self._loop.time()
        late = []
        for fd, waiting in self._silent.items():  # in the order of their deadlines, but for a change of the limit
            if waiting.deadline > now:
                break
            late.append(fd)
        for fd in late:
            waiting = self._forget(fd)
            try:
                self._drop(waiting, "deadline", "said nothing to a TLS port until the connect deadline")
            except Exception as error:
                waiting.listener.crashed(waiting.peer, error)
        self._timer = self._loop.call_later(LOOK, self._look) if self._silent else None

    def _forget(self, fd: int) -> Waiting:
        self._loop.remove_reader(fd)
        return self._silent.pop(fd)

    def _drop(self, waiting: Waiting, reason: str, text: str | None) -> None:
        waiting.sock.close()
        waiting.listener.released(reason)
        if text is not None:
            waiting.listener.report("tls", f"{waiting.peer} {text}, listener {waiting.listener.name!r}; closed")
