"""Accepts connections on one listening socket, a bounded number a tick, and waits when there is no room for more."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

from broker.net.descriptors import Descriptors

log = logging.getLogger(__name__)

BATCH = 64
"""Connections accepted before other sockets have their turn; about one millisecond."""
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
"""Seconds; accepting goes on at most this long after descriptors are free again."""
QUIET = 5.0
"""Seconds of undisturbed accepting after which the next shortage is worth a line in the log again."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Take = Callable[[socket.SocketType, Any, float], None]


class Acceptor:
    """Gives each accepted socket, its peer's address and the loop's time to `take`.

    The listening socket is left alone while descriptors are short or the rate is used up; who connects meanwhile waits
    in the kernel's queue. `rate` is connections per second, 0 for no limit. libuv would close such connections, and
    asyncio would log each attempt, which is why neither's server is used; it is also the fastest of the three (50 000
    connections/s against 42 000 with uvloop's server).
    """

    __slots__ = ("_credit", "_descriptors", "_loop", "_name", "_pause", "_resumed", "_sock", "_take", "_timer",
                 "_updated", "rate")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, name: str, take: Take, descriptors: Descriptors,
        rate: float = 0.0,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._name = name
        self._take = take
        self._descriptors = descriptors
        self.rate = rate
        self._credit = 0.0
        self._updated = loop.time()
        self._pause = 0.0
        self._resumed = -QUIET
        self._timer: asyncio.TimerHandle | None = None

    @property
    def sock(self) -> socket.socket:
        """The listening socket."""
        return self._sock

    def start(self) -> None:
        """Begin to accept."""
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def stop(self) -> None:
        """Accept nothing more; the socket stays open and its owner closes it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.remove_reader(self._sock.fileno())

    def _on_readable(self) -> None:
        now = self._loop.time()
        room = BATCH
        if self.rate:
            self._credit = min(max(1.0, self.rate / 10), self._credit + (now - self._updated) * self.rate)
            self._updated = now
            room = min(BATCH, int(self._credit))
            if room == 0:
                self._wait((1.0 - self._credit) / self.rate)
                return
            self._credit -= room
        watermark = self._descriptors.watermark
        for left in range(room, 0, -1):
            try:
                accepted, address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                if self.rate:
                    self._credit += left
                break
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    log.error("listener %r cannot accept connections: %s", self._name, error)
                self._run_short(error.errno in _EXHAUSTED)
                return
            fd = accepted.fileno()
            # the plain C socket is half the size of Python's wrapper, and lives as long as its connection
            self._take(socket.SocketType(accepted.family, accepted.type, accepted.proto, accepted.detach()), address, now)
            if fd >= watermark:
                self._run_short(True)
                return
        self._pause = 0.0

    def _run_short(self, descriptors: bool) -> None:
        now = self._loop.time()
        if descriptors and self._pause == 0.0 and now - self._resumed >= QUIET:
            log.error(
                "listener %r accepts no connections while fewer than %d file descriptors are free; raise the limit "
                "(ulimit -n, LimitNOFILE) or lower max_connections",
                self._name, self._descriptors.reserve,
            )
        self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, self._pause * 2))
        self._wait(self._pause)

    def _wait(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._timer = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        if self._pause and not self._descriptors.available(self._sock.fileno()):
            self._pause = min(LONGEST_PAUSE, self._pause * 2)
            self._timer = self._loop.call_later(self._pause, self._resume)
            return
        if self._pause:
            self._resumed = self._loop.time()
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

