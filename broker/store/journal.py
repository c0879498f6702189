"""The store as the engine's journal sees it: hands work to the writer and the reader, watches the disk."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from broker.extend.store import BackupFailed, StoreError, StoreOwner
from broker.store import backup
from broker.store.backup import Copied, Extent
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
        self._holding: asyncio.Future[Extent] | None = None
        """A backup is being made; done once nothing is deleted any more."""
        self._stopping = threading.Event()
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
        self._stopping.set()
        if self._timer is not None:
            self._timer.cancel()
        deadline = time.monotonic() + CLOSING
        done = self._writer is None or self._writer.close(deadline)
        done = (self._reader is None or self._reader.close(deadline)) and done
        if not done:
            log.error("%s: the disk did not answer within %.0f s; the end was not waited for", self._folder, CLOSING)
        self._mailbox.deliver()

    # what others call -----------------------------------------------------------------------------------------

    async def backup(self, target: Path) -> Copied:
        """Copy the store into the data folder `target`, which must not exist or be empty. Whatever was acknowledged
        before is in the copy; writing goes on. Raises BackupFailed."""
        if self._holding is not None:
            raise BackupFailed("another backup is being made")
        if self._closed or self._writer is None:
            raise BackupFailed("the store is not open")
        self._holding = self._loop.create_future()
        ended: asyncio.Future[Copied] = self._loop.create_future()
        self._writer.hold()
        try:
            extent = await self._holding
            # a thread of its own, whose end nobody waits for: the other disk may hang
            threading.Thread(target=self._copy, args=(target, extent, ended), name="store-backup", daemon=True).start()
            return await ended
        finally:
            self._holding = None
            self._writer.let_go()

    def _copy(self, target: Path, extent: Extent, ended: asyncio.Future[Copied]) -> None:
        """In the thread."""
        try:
            backup.prepare(self._folder, target)
            copied = backup.copy(self._folder, target, extent, self._stopping.is_set)
        except OSError as error:
            text = f"{error.filename or target}: {error.strerror or error}"
            self._mailbox.post(_end, ended, ended.set_exception, BackupFailed(text))
        except Exception as error:
            self._mailbox.post(_end, ended, ended.set_exception, error)
        else:
            self._mailbox.post(_end, ended, ended.set_result, copied)

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

    def on_held(self, extent: Extent) -> None:
        """Nothing is deleted any more."""
        if self._holding is not None and not self._holding.done():
            self._holding.set_result(extent)

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


def _end(future: asyncio.Future[Any], how: Callable[[Any], None], result: Any) -> None:
    if not future.done():
        how(result)
