"""The thread that writes: commits in order, new segments, drops, and what becomes of a write that fails.

Theory of operation. A commit is one buffer and one write, to a descriptor that writes through (`flush`) or to the
kernel's memory (`interval`: made durable so often; `none`: when a segment ends). After a failed write the segment is
cut back to where the commit began. No space is a state that passes: commits are refused until the owner asks for
another try and a probe can be written. Any other error ends writing for good: after a failed flush nobody knows what is
on disk, and a second flush would answer for pages the kernel has already given up.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

from broker.extend.store import StoreError
from broker.store import segments
from broker.store.backup import Extent
from broker.store.frames import HEADER, SEGMENT, VERSION, SegmentHeader, pack_header, seed_of
from broker.store.mailbox import Mailbox

log = logging.getLogger(__name__)

Durability = Literal["flush", "interval", "none"]

PROBE = 512 * 1024
"""Bytes that must find space after there was none: more than a full frame."""


class WriterOwner(Protocol):
    """Who is told, on the loop's thread."""

    def on_written(self, number: int, places: list[tuple[int, int]], segment: int, size: int) -> None:
        """A commit is where it should be; the segment now has this size."""

    def on_failed(self, number: int, error: StoreError) -> None:
        """A commit is not."""

    def on_trouble(self, error: StoreError) -> None:
        """From here on commits fail."""

    def on_dropped(self, segment: int) -> None:
        """A segment was deleted."""

    def on_kept(self, segment: int) -> None:
        """A segment was not deleted; the log says why."""

    def on_probed(self, space: bool) -> None:
        """The end of `probe`."""

    def on_held(self, extent: Extent) -> None:
        """The end of `hold`."""


class Writer:
    """Owns the newest segment. Public methods belong to the loop's thread, cost a queue entry and return at once."""

    def __init__(
        self,
        folder: Path,
        mailbox: Mailbox,
        owner: WriterOwner,
        *,
        durability: Durability,
        interval: float,
        segment_bytes: int,
        salt: int,
        oldest: int,
        newest: int,
    ) -> None:
        """The newest segment must exist and end where the next frame is to go. Raises OSError when it cannot be
        opened or made durable."""
        self._folder = folder
        self._mailbox = mailbox
        self._owner = owner
        self._durability = durability
        self._interval = interval
        self._segment_bytes = segment_bytes
        self._salt = salt
        self._oldest = oldest
        self._number = newest
        self._seed = seed_of(salt, newest)
        self._fd = segments.open_segment(folder, newest, durability == "flush")
        self._size = os.fstat(self._fd).st_size
        os.fsync(self._fd)  # after a kill the last bytes may be the kernel's alone, and new frames vouch for them
        self._synced = self._size
        self._due: float | None = None
        """When what was written first since the last flush must be flushed."""
        self._trouble: StoreError | None = None
        self._uncut = False
        """The segment ends with a part of a failed commit that could not be cut off."""
        self._ending = False
        """The next segment may exist already and say how long this one is: nothing more goes in here."""
        self._held: list[tuple[int, bool]] | None = None
        """Drops that wait for `let_go`, and whether a commit had failed meanwhile; None while nobody holds."""
        self._failures = 0
        self._failures_known = 0
        self._jobs: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def write(self, number: int, frames: list[tuple[bytes, int]], clock_ms: int) -> None:
        """Append one commit; ends in `on_written` or `on_failed`."""
        self._jobs.put((self._commit, (number, frames, clock_ms, time.time_ns() // 1_000_000)))

    def drop(self, segment: int) -> None:
        """Delete the oldest segment, unless a commit fails that its caller does not know of yet."""
        self._jobs.put((self._drop, (segment, self._failures_known)))

    def hold(self) -> None:
        """Delete no segment until `let_go`; ends in `on_held` with what the commits handed over so far have made."""
        self._jobs.put((self._hold, ()))

    def let_go(self) -> None:
        """Delete what waited."""
        self._jobs.put((self._let_go, ()))

    def probe(self) -> None:
        """Find out whether there is space again; ends in `on_probed`."""
        self._jobs.put((self._probe, ()))

    def close(self, deadline: float) -> bool:
        """Finish the queue, make everything durable, note the clean stop. False when that takes beyond `deadline` (on
        the monotonic clock)."""
        self._jobs.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    # in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            wait = None if self._due is None else max(0.0, self._due - time.monotonic())
            try:
                job = self._jobs.get(timeout=wait)
            except Empty:
                self._flush()
                continue
            if job is None:
                break
            function, arguments = job
            function(*arguments)
            if self._due is not None and time.monotonic() >= self._due:
                self._flush()
        self._end()

    def _commit(self, number: int, frames: list[tuple[bytes, int]], clock_ms: int, wall_ms: int) -> None:
        if self._trouble is None:
            try:
                places = self._append(frames, clock_ms, wall_ms)
            except OSError as error:
                self._stumble(error)
            except Exception as error:  # this thread must answer every commit, whatever is wrong with one
                log.exception("a commit could not be built")
                self._stop(StoreError(f"{self._folder}: {type(error).__name__}: {error}"))
            else:
                self._mailbox.post(self._owner.on_written, number, places, self._number, self._size)
                return
        self._failures += 1
        self._mailbox.post(self._fail, number, self._trouble)

    def _fail(self, number: int, error: StoreError) -> None:
        """On the loop's thread."""
        self._failures_known += 1
        self._owner.on_failed(number, error)

    def _append(self, frames: list[tuple[bytes, int]], clock_ms: int, wall_ms: int) -> list[tuple[int, int]]:
        if self._size >= self._segment_bytes or self._ending:
            self._roll()
        flush = self._durability == "flush"
        base = self._size if flush else self._synced
        at = self._size
        parts: list[bytes] = []
        places = []
        for body, entries in frames:
            parts.append(pack_header(body, entries, clock_ms, wall_ms, base, self._seed ^ at))
            parts.append(body)
            at += HEADER
            places.append((self._number, at))
            at += len(body)
        if parts:
            segments.put(self._fd, b"".join(parts))
            self._size = at
            if flush:
                self._synced = at
            elif self._durability == "interval" and self._due is None:
                self._due = time.monotonic() + self._interval
        return places

    def _roll(self) -> None:
        """Begin the next segment. That it exists says that this one is on disk."""
        self._sync()
        self._ending = True
        number = self._number + 1
        header = SegmentHeader(VERSION, number, self._oldest, self._size, self._salt)
        segments.create_segment(self._folder, header)
        segments.write_range(self._folder, segments.Range(self._oldest, number))
        fd = segments.open_segment(self._folder, number, self._durability == "flush")
        os.close(self._fd)
        self._fd = fd
        self._number = number
        self._seed = seed_of(self._salt, number)
        self._size = self._synced = SEGMENT
        self._uncut = self._ending = False

    def _sync(self) -> None:
        if self._synced < self._size:
            try:
                os.fdatasync(self._fd)
            except OSError as error:  # also for lack of space: what was written may be gone
                raise OSError(errno.EIO, f"flush failed: {error.strerror}") from error
            self._synced = self._size
        self._due = None

    def _flush(self) -> None:
        """The regular one of `interval`."""
        if self._trouble is not None and not self._trouble.full:
            self._due = None
            return
        try:
            self._sync()
        except OSError as error:
            self._stumble(error)

    def _stumble(self, error: OSError) -> None:
        """After an error of the disk: cut off what a commit left behind and decide whether this can pass."""
        try:
            os.ftruncate(self._fd, self._size)
            self._uncut = False
        except OSError:
            self._uncut = True
        if error.errno in segments.FULL:
            self._trouble = StoreError(f"{self._folder}: no space left on the disk", full=True)
            self._mailbox.post(self._owner.on_trouble, self._trouble)
            return
        self._stop(StoreError(f"{self._folder}: {error.strerror or error}"))

    def _stop(self, error: StoreError) -> None:
        self._trouble = error
        self._due = None
        self._mailbox.post(self._owner.on_trouble, error)
        log.error(
            "the store cannot write any more: %s. Messages that must be kept are refused until a restart: check the "
            "disk, stop the broker, run isthmus store check, start it again",
            error,
        )

    def _probe(self) -> None:
        if self._trouble is not None and self._trouble.full:
            try:
                self._try_space()
                if self._uncut:
                    self._mend()
                self._trouble = None
            except OSError as error:
                if error.errno not in segments.FULL:
                    self._stop(StoreError(f"{self._folder}: {error.strerror or error}"))
        self._mailbox.post(self._owner.on_probed, self._trouble is None)

    def _try_space(self) -> None:
        path = self._folder / "probe.new"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            segments.put(fd, bytes(PROBE))
            os.fsync(fd)
        finally:
            os.close(fd)
            path.unlink()

    def _mend(self) -> None:
        """Get rid of the rest of a failed commit; where it cannot be cut off, the next segment says where this ends."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._size)
            self._uncut = False
        if self._uncut:
            self._roll()

    def _hold(self) -> None:
        self._held = []
        self._mailbox.post(self._owner.on_held, Extent(self._oldest, self._number, self._size, self._salt))

    def _let_go(self) -> None:
        held, self._held = self._held or [], None
        for segment, failed in held:
            self._delete(segment, failed)

    def _drop(self, segment: int, failures_known: int) -> None:
        failed = failures_known != self._failures
        if self._held is None:
            self._delete(segment, failed)
        else:
            self._held.append((segment, failed))

    def _delete(self, segment: int, failed: bool) -> None:
        why = ""
        if failed or (self._trouble is not None and not self._trouble.full):
            why = "a commit failed meanwhile"
        elif segment != self._oldest or segment >= self._number:
            why = f"the oldest is {self._oldest}, {self._number} is written"
        else:
            try:
                segments.drop_segment(self._folder, segments.Range(segment + 1, self._number), segment)
            except OSError as error:
                why = str(error)
        if why:
            log.warning("%s is kept: %s", segments.segment_path(self._folder, segment), why)
            self._mailbox.post(self._owner.on_kept, segment)
        else:
            self._oldest = segment + 1
            self._mailbox.post(self._owner.on_dropped, segment)

    def _end(self) -> None:
        """Whole commits only lie in the segment, unless one could not be cut off: then the next start sees to it."""
        if self._trouble is None or (self._trouble.full and not self._uncut):
            try:
                self._sync()
                segments.write_closed(self._folder, segments.Closed(self._number, self._size))
            except OSError as error:
                log.error("the store's end could not be written: %s", error)
        with contextlib.suppress(OSError):
            os.close(self._fd)
