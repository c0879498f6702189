"""Accepts connections on one listening socket, a bounded number a tick, and waits when there is no room for more."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

from broker.net.descriptors import Descriptors
from broker.net.shortage import Shortage

log = logging.getLogger(__name__)

BATCH = 64
"""Connections accepted before other sockets have their turn; about one millisecond."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Take = Callable[[socket.socket, Any, float], None]


class Acceptor:
    """Gives each accepted socket, its peer's address and the loop's time to `take`.

    The listening socket is left alone while descriptors are short or the rate is used up; who connects meanwhile waits
    in the kernel's queue. `rate` is connections per second, 0 for no limit.
    """

    __slots__ = (
        "_credit",
        "_descriptors",
        "_loop",
        "_name",
        "_rate",
        "_shortage",
        "_take",
        "_timer",
        "_updated",
        "sock",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        name: str,
        take: Take,
        descriptors: Descriptors,
        rate: float = 0.0,
    ) -> None:
        self.sock = sock
        self._loop = loop
        self._name = name
        self._take = take
        self._descriptors = descriptors
        self._rate = rate
        self._credit = 1.0
        self._updated = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._shortage = Shortage(loop, descriptors, name, sock.fileno(), self.start)

    def start(self) -> None:
        """Begin to accept."""
        self._timer = None
        self._loop.add_reader(self.sock.fileno(), self._on_readable)

    def stop(self) -> None:
        """Accept nothing more; the socket stays open and its owner closes it."""
        self._shortage.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.remove_reader(self.sock.fileno())

    def _on_readable(self) -> None:
        room = self._room()
        watermark = self._descriptors.watermark
        now = self._loop.time()
        for _ in range(room):
            try:
                accepted, address = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    log.error("listener %r cannot accept connections: %s", self._name, error)
                self._run_short()
                return
            self._credit -= 1.0
            accepted_fd = accepted.fileno()
            try:
                self._take(accepted, address, now)
            except Exception:  # those who wait in the queue are still to be accepted
                log.exception("internal error while listener %r accepts a connection; it is closed", self._name)
                accepted.close()
            if accepted_fd + 1 >= watermark:
                self._run_short()
                return
        self._shortage.over()

    def _room(self) -> int:
        """Connections that may be accepted now; 0 after having arranged for a later try."""
        if not self._rate:
            return BATCH
        now = self._loop.time()
        burst = max(1.0, self._rate / 10)
        self._credit = min(burst, self._credit + (now - self._updated) * self._rate)
        self._updated = now
        if self._credit < 1.0:
            self._loop.remove_reader(self.sock.fileno())
            self._timer = self._loop.call_later((1.0 - self._credit) / self._rate, self.start)
            return 0
        return min(BATCH, int(self._credit))

    def _run_short(self) -> None:
        self._loop.remove_reader(self.sock.fileno())
        self._shortage.begin()
