"""The thread that reads: records at known positions, and whole segments to be copied forward."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from broker.store import segments
from broker.store.frames import HEADER, RECORD, Scan, describe, records, seed_of
from broker.store.mailbox import Mailbox

log = logging.getLogger(__name__)

BLOCK = 512 * 1024
"""Bytes read at once."""
FETCH = 10.0
"""Seconds `fetch` waits."""
OPEN = 8
"""Segments kept open at most."""

Records = list[bytes | None]
Positions = list[tuple[int, bytes]]


class Reader:
    """The methods belong to the loop's thread, cost a queue entry and return at once; answers come in order."""

    def __init__(self, folder: Path, mailbox: Mailbox, salt: int, on_unreadable: Callable[[int], None]) -> None:
        """`on_unreadable` hears on the loop of a segment that could not be read as a whole, before its reader does."""
        self._folder = folder
        self._mailbox = mailbox
        self._salt = salt
        self._on_unreadable = on_unreadable
        self._files: dict[int, int] = {}
        """Segment -> descriptor; the one used last is last."""
        self._closing = False
        self._jobs: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-reader", daemon=True)
        self._thread.start()

    def read(self, positions: Sequence[int], done: Callable[[Records], None]) -> None:
        """One whole record per position, None where there is none to be read."""
        self._jobs.put((self._read, (positions, done)))

    def fetch(self, positions: Sequence[int]) -> Records:
        """As `read`, waiting for the answer. Raises TimeoutError when the disk gives none."""
        answer: SimpleQueue[Records] = SimpleQueue()
        self._jobs.put((self._hand_over, (positions, answer.put)))
        try:
            return answer.get(timeout=FETCH)
        except Empty:
            raise TimeoutError(f"{self._folder}: the disk does not answer") from None

    def read_segment(self, segment: int, done: Callable[[Positions], None]) -> None:
        """(position, record) of every record in a valid frame of a segment that is no longer written."""
        self._jobs.put((self._read_segment, (segment, done)))

    def forget(self, segment: int) -> None:
        """Close a segment that was deleted: its space is free only then."""
        self._jobs.put((self._forget, (segment,)))

    def close(self, deadline: float) -> bool:
        """Drop what is queued. False when the thread is still busy at `deadline`, on the monotonic clock."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    # in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closing:
            function, arguments = job
            function(*arguments)
        for fd in self._files.values():
            os.close(fd)

    def _read(self, positions: Sequence[int], done: Callable[[Records], None]) -> None:
        self._mailbox.post(done, self._records(positions))

    def _hand_over(self, positions: Sequence[int], take: Callable[[Records], None]) -> None:
        take(self._records(positions))

    def _records(self, positions: Sequence[int]) -> Records:
        found: Records = []
        segment = start = -1
        block = b""
        for position in positions:
            number, offset = position >> 32, position & 0xFFFFFFFF
            try:
                if number != segment or not start <= offset <= start + len(block) - RECORD.size:
                    block = self._block(number, offset, BLOCK)
                    segment, start = number, offset
                at = offset - start
                end = at + RECORD.size + RECORD.unpack_from(block, at)[1] if at + RECORD.size <= len(block) else -1
                if end > len(block):
                    self._must_hold(number, start + end)
                    block = self._block(number, offset, max(BLOCK, end - at))
                    start, at, end = offset, 0, end - at
                found.append(block[at:end] if 0 <= end <= len(block) else None)
            except OSError as error:
                log.error("a record cannot be read: %s offset %d: %s", self._path(number), offset, error)
                segment, block = -1, b""
                found.append(None)
        return found

    def _block(self, segment: int, offset: int, length: int) -> bytes:
        return os.pread(self._file(segment), length, offset)

    def _must_hold(self, segment: int, end: int) -> None:
        """A length that leaves the file is no length; it must not decide how much memory a read takes."""
        if end > os.fstat(self._file(segment)).st_size:
            raise OSError("the record leaves the segment")

    def _file(self, segment: int) -> int:
        fd = self._files.pop(segment, None)
        if fd is None:
            if len(self._files) >= OPEN:
                self._forget(next(iter(self._files)))
            fd = os.open(self._path(segment), os.O_RDONLY | os.O_CLOEXEC)
        self._files[segment] = fd
        return fd

    def _path(self, segment: int) -> Path:
        return segments.segment_path(self._folder, segment)

    def _forget(self, segment: int) -> None:
        fd = self._files.pop(segment, None)
        if fd is not None:
            os.close(fd)

    def _read_segment(self, segment: int, done: Callable[[Positions], None]) -> None:
        found: Positions = []
        path = self._path(segment)
        try:
            data = segments.read_file(path)
        except OSError as error:
            log.error("%s cannot be read and is kept; the store does not shrink until a restart: %s", path, error)
            self._mailbox.post(self._on_unreadable, segment)
        else:
            first = segment << 32
            scan = Scan(seed_of(self._salt, segment), durable=True)
            for frame in scan.frames(data):
                body = frame.start + HEADER
                found.extend((first + body + at, record) for at, record in records(data[body : frame.end]))
            for hole in scan.holes:
                log.error("%s: %s", path, describe(hole))
        self._mailbox.post(done, found)
