"""What waits to be written to one connection, and when it is written.

Many packets leave in one write: an outbox with unsent bytes is flushed after at most 16 reads, else at the end of the
loop's tick. While the transport is congested nothing is handed to it: QoS 0 beyond `limit` is dropped and counted,
QoS 1 and 2 stay in the session's queue.
"""

from collections.abc import Callable
from typing import Any

READS_PER_FLUSH = 16
DIRECT = 524_288
"""Bytes after which an outbox is handed to its transport without waiting for the end of the tick."""


class Flusher:
    """Outboxes with unsent bytes, and the two moments at which they are written."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], Any]) -> None:
        self.call_soon = call_soon
        self.dirty: list[Any] = []
        self.reads = 0
        self.scheduled = False
        self.limit = 1 << 20
        """QoS 0 bytes a congested outbox may hold."""

    def add(self, box: Any) -> None:
        """Note an outbox that has just got its first unsent byte."""
        self.dirty.append(box)
        if not self.scheduled:
            self.scheduled = True
            self.call_soon(self.run)

    def after_read(self) -> None:
        """Called once at the end of every read of any connection."""
        self.reads += 1
        if self.reads >= READS_PER_FLUSH:
            self.flush()

    def run(self) -> None:
        """The end of the tick."""
        self.scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write everything that waits."""
        self.reads = 0
        while self.dirty:
            dirty = self.dirty
            self.dirty = []
            for box in dirty:
                box.flush()


class Outbox:
    """Unsent bytes of one connection. `link` is anything with a transport's `write`."""

    def __init__(self, link: Any, flusher: Flusher) -> None:
        self.link = link
        self.flusher = flusher
        self.size = 0
        self.first: bytes | None = None
        self.more: list[bytes] | None = None
        self.congested = False

    def push(self, data: bytes) -> None:
        """Append bytes that must be sent."""
        if self.more is not None:
            self.more.append(data)
        elif self.first is not None:
            self.more = [self.first, data]
        else:
            self.first = data
            if not self.congested:
                self.flusher.add(self)
        self.size += len(data)
        if self.size > DIRECT and not self.congested:
            self.flush()

    def push_parts(self, head: bytes, ident: bytes, body: bytes) -> None:
        """Append a PUBLISH made of three pieces."""
        more = self.more
        if more is None:
            more = self.more = []
            if self.first is not None:
                more.append(self.first)
            else:
                self.first = head
                if not self.congested:
                    self.flusher.add(self)
        more.append(head)
        more.append(ident)
        more.append(body)
        self.size += len(head) + len(body) + 2
        if self.size > DIRECT and not self.congested:
            self.flush()

    def offer(self, data: bytes) -> bool:
        """Append QoS 0 bytes unless the receiver is slow and has too much waiting; False when dropped."""
        if self.congested and self.size + len(data) > self.flusher.limit:
            return False
        self.push(data)
        return True

    def flush(self) -> None:
        """Hand everything to the transport, unless it is congested."""
        if self.congested or self.first is None:
            return
        more = self.more
        data = self.first if more is None else b"".join(more)
        self.first = None
        self.more = None
        self.size = 0
        if self.link is not None:
            try:
                self.link.write(data)
            except Exception as error:  # those whose turn comes after this one are not to suffer from it
                self.broken(error)

    def broken(self, error: Exception) -> None:
        """The transport failed to take bytes: it gets no more of them."""
        self.drop_unsent()

    def drop_unsent(self) -> None:
        """Forget the transport and what waits."""
        self.link = None
        self.first = None
        self.more = None
        self.size = 0
