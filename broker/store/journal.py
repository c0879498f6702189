"""The store as the engine's journal sees it: hands work to the writer and the reader, watches the disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from broker.extend.store import StoreError, StoreOwner
from broker.store.disk import DiskWatch, Space
from broker.store.mailbox import Mailbox
from broker.store.reader import Reader
from broker.store.writer import Durability, Writer

log = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks at the disk."""
CLOSING = 5.0
"""Seconds `close` may take."""


class FileStore:
    """`broker.extend.store.Store` in a folder. Made by `open_store`; takes writes once what it held has been read."""

    owner: StoreOwner

    def __init__(
        self,
        folder: Path,
        loop: asyncio.AbstractEventLoop,
        *,
        durability: Durability,
        interval: float,
        min_free: int,
        segment_bytes: int,
    ) -> None:
        self.refusing = ""
        self._folder = folder
        self._loop = loop
        self._durability: Durability = durability
        self._interval = interval
        self._segment_bytes = segment_bytes
        self._mailbox = Mailbox(loop)
        self._watch = DiskWatch(folder, min_free)
        self._timer: asyncio.TimerHandle | None = None
        self._sizes: dict[int, int] = {}
        self._dropping: dict[int, int] = {}
        """Sizes of segments handed to the writer to be deleted."""
        self._unreadable = 0
        """The lowest segment whose records could not be copied: it stays, and so does what follows it."""
        self._error: StoreError | None = None
        """Why commits fail at present."""
        self._probing = False
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._closed = False

    def start(self, salt: int, sizes: dict[int, int]) -> None:
        """Begin to write behind the newest of these segments. Called by `Recovered`, on any thread."""
        self._sizes = sizes
        self._writer = Writer(
            self._folder,
            self._mailbox,
            self,
            durability=self._durability,
            interval=self._interval,
            segment_bytes=self._segment_bytes,
            salt=salt,
            oldest=min(sizes),
            newest=max(sizes),
        )
        self._reader = Reader(self._folder, self._mailbox, salt, self._on_unreadable)
        self._mailbox.post(self._look)

    # what the engine calls ------------------------------------------------------------------------------------

    def write(self, number: int, frames: list[tuple[bytes, int]], clock_ms: int) -> None:
        """See `Store`."""
        assert self._writer is not None, "the store has not been read yet"
        self._writer.write(number, frames, clock_ms)

    def read(self, positions: Sequence[int], done: Callable[[list[bytes | None]], None]) -> None:
        """See `Store`."""
        assert self._reader is not None, "the store has not been read yet"
        self._reader.read(positions, done)

    def fetch(self, positions: Sequence[int]) -> list[bytes | None]:
        """See `Store`."""
        assert self._reader is not None
        return self._reader.fetch(positions)

    def read_segment(self, segment: int, done: Callable[[list[tuple[int, bytes]]], None]) -> None:
        """See `Store`."""
        assert self._reader is not None, "the store has not been read yet"
        self._reader.read_segment(segment, done)

    def drop(self, segment: int) -> None:
        """See `Store`."""
        assert self._writer is not None, "the store has not been read yet"
        if segment >= max(self._sizes):
            raise ValueError(f"segment {segment} is being written")
        if segment in self._sizes and not 0 < self._unreadable <= segment:
            self._dropping[segment] = self._sizes.pop(segment)
            self._writer.drop(segment)

    def sizes(self) -> dict[int, int]:
        """See `Store`."""
        return dict(self._sizes)

    def close(self) -> None:
        """See `Store`. Who owns commits is told how they ended before this returns."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        deadline = time.monotonic() + CLOSING
        done = self._writer is None or self._writer.close(deadline)
        done = (self._reader is None or self._reader.close(deadline)) and done
        if not done:
            log.error("%s: the disk did not answer within %.0f s; the end was not waited for", self._folder, CLOSING)
        self._mailbox.deliver()

    # what the threads report ----------------------------------------------------------------------------------

    def on_written(self, number: int, places: list[tuple[int, int]], segment: int, size: int) -> None:
        """A commit is where it should be."""
        self._sizes[segment] = size
        self.owner.written(number, places)

    def on_failed(self, number: int, error: StoreError) -> None:
        """A commit is not."""
        self.owner.failed(number, error)

    def on_trouble(self, error: StoreError) -> None:
        """From here on commits fail; for lack of space, until a probe finds some."""
        if error.full:
            log.error("%s: new messages that must be kept are refused until there is some; make space", error)
        self._error = error
        self._judge()

    def on_dropped(self, segment: int) -> None:
        """A segment was deleted."""
        del self._dropping[segment]
        assert self._reader is not None
        self._reader.forget(segment)

    def on_kept(self, segment: int) -> None:
        """A segment was not deleted."""
        self._sizes[segment] = self._dropping.pop(segment)

    def _on_unreadable(self, segment: int) -> None:
        self._unreadable = min(segment, self._unreadable or segment)

    def on_probed(self, space: bool) -> None:
        """Space can be written to again, or not."""
        self._probing = False
        if space and self._error is not None and self._error.full:
            self._error = None
            log.warning("%s: there is space on the disk again: messages are taken again", self._folder)
        self._judge()

    # the disk -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if self._closed:
            return
        self._timer = self._loop.call_later(LOOK, self._look)
        space = self._watch.look()
        if self._error is not None and self._error.full and space is not Space.SHORT and not self._probing:
            assert self._writer is not None
            self._probing = True
            self._writer.probe()
        self._judge()

    def _judge(self) -> None:
        if self._error is not None:
            self.refusing = "full" if self._error.full else "failed"
        else:
            self.refusing = "full" if self._watch.space is Space.SHORT else ""
