"""Where the messages of a long queue lie on disk: three numbers a message, and for very long queues not even those.

In memory are the first and the last few thousand entries; what lies between is in a scratch file without a name, which
a crash may take: the journal says it all again. While the journal is copied, the part looked at last is in memory too.
"""

from array import array
from collections import deque
from collections.abc import Callable
from typing import IO, Any

STRIDE = 3
"""An entry is its sequence number, its position in the journal, and its size (upper half) with its time of arrival in
seconds of the store's clock (lower half)."""
CHUNK = 16_384
"""Entries moved to and from the scratch file at once."""
ENTRY_BYTES = STRIDE * 8

Entry = tuple[int, int, int, int]
"""(sequence number, position, size, time of arrival in seconds)"""


class Backlog:
    """Entries in the order of their sequence numbers. `scratch()` opens a temporary file, on the first need."""

    def __init__(self, scratch: Callable[[], IO[bytes]]) -> None:
        self._scratch = scratch
        self._head = array("Q")
        self._at = 0
        """Index in `_head` of the first entry not yet taken."""
        self._tail: array[int] | None = None
        """Set once there is more than `_head`: what comes behind the chunks."""
        self._chunks: deque[tuple[int, int]] | None = None
        """(offset in the file, first sequence number) of each chunk."""
        self._file: IO[bytes] | None = None
        self._end = 0
        self._seen: array[int] | None = None
        """The chunk that was looked at last: records are copied in order, thousands of them from one chunk."""
        self._seen_at = -1

    def __len__(self) -> int:
        count = (len(self._head) - self._at) // STRIDE
        if self._chunks:
            count += len(self._chunks) * CHUNK
        if self._tail is not None:
            count += len(self._tail) // STRIDE
        return count

    def append(self, seq: int, position: int, size: int, time: int) -> None:
        """Add behind the last entry."""
        target = self._head if self._tail is None else self._tail
        target.extend((seq, position, size << 32 | time & 0xFFFFFFFF))
        if len(target) >= 2 * CHUNK * STRIDE:
            self._spill()

    def fill(self, entries: "array[int]") -> None:
        """Begin with these, three numbers each and in order; the array is this object's from now on."""
        last = len(entries) - 2 * CHUNK * STRIDE
        if last <= 2 * CHUNK * STRIDE:
            self._head = entries
            return
        self._head = entries[: CHUNK * STRIDE]
        self._tail = array("Q")
        at = CHUNK * STRIDE
        while at < last:
            self._write(entries[at : at + CHUNK * STRIDE])
            at += CHUNK * STRIDE
        self._tail = entries[at:]

    def _spill(self) -> None:
        if self._tail is None:
            self._tail = array("Q")
            return
        self._write(self._tail[: CHUNK * STRIDE])
        self._tail = self._tail[CHUNK * STRIDE :]

    def _write(self, full: "array[int]") -> None:
        """One chunk behind the others."""
        if self._file is None:
            self._file = self._scratch()
        self._file.seek(self._end)
        self._file.write(full.tobytes())
        if self._chunks is None:
            self._chunks = deque()
        self._chunks.append((self._end, full[0]))
        self._end += CHUNK * ENTRY_BYTES

    def push_front(self, entries: list[Entry]) -> None:
        """Put entries back before the first one."""
        front = array("Q")
        for seq, position, size, time in entries:
            front.extend((seq, position, size << 32 | time & 0xFFFFFFFF))
        front.extend(self._head[self._at :])
        self._head = front
        self._at = 0

    def first(self) -> Entry | None:
        """The oldest entry, None when there is none."""
        if not self._fill():
            return None
        seq, position, both = self._head[self._at : self._at + STRIDE]
        return seq, position, both >> 32, both & 0xFFFFFFFF

    def take(self, count: int, size: int = 1 << 62) -> list[Entry]:
        """Remove and return up to this many of the oldest entries, and no more of them than reach `size` bytes."""
        found: list[Entry] = []
        while len(found) < count and size > 0 and self._fill():
            head, at = self._head, self._at
            end = min(len(head), at + (count - len(found)) * STRIDE)
            while at < end and size > 0:
                found.append((head[at], head[at + 1], head[at + 2] >> 32, head[at + 2] & 0xFFFFFFFF))
                size -= head[at + 2] >> 32
                at += STRIDE
            self._at = at
        if self._at > 4096 * STRIDE:
            del self._head[: self._at]
            self._at = 0
        return found

    def _fill(self) -> bool:
        """See to it that `_head` holds the oldest entry; False when there is none."""
        if self._at < len(self._head):
            return True
        self._at = 0
        if self._chunks and self._file is not None:
            offset, _ = self._chunks.popleft()
            self._head = self._read(offset)
            self._seen, self._seen_at = None, -1
            if not self._chunks:
                self._chunks = None
                self._file.close()
                self._file, self._end = None, 0
            return True
        if self._tail is not None:
            self._head, self._tail = self._tail, None
            return len(self._head) > 0
        if len(self._head):
            self._head = array("Q")
        return False

    def _read(self, offset: int) -> "array[int]":
        assert self._file is not None
        self._file.seek(offset)
        found = array("Q")
        found.frombytes(self._file.read(CHUNK * ENTRY_BYTES))
        return found

    def relocate(self, seq: int, position: int) -> bool:
        """The entry with this sequence number has moved; False when it is not here."""
        at = _find(self._head, self._at, seq)
        if at >= 0:
            self._head[at + 1] = position
            return True
        if self._tail is not None:
            at = _find(self._tail, 0, seq)
            if at >= 0:
                self._tail[at + 1] = position
                return True
        offset = self._chunk_of(seq)
        if offset < 0 or self._file is None:
            return False
        entries = self._look(offset)
        at = _find(entries, 0, seq)
        if at < 0:
            return False
        entries[at + 1] = position
        self._file.seek(offset + (at + 1) * 8)
        self._file.write(position.to_bytes(8, "little"))
        return True

    def place_of(self, seq: int) -> int:
        """The position of the entry with this sequence number, -1 when it does not wait here."""
        at = _find(self._head, self._at, seq)
        if at >= 0:
            return self._head[at + 1]
        if self._tail is not None:
            at = _find(self._tail, 0, seq)
            if at >= 0:
                return self._tail[at + 1]
        offset = self._chunk_of(seq)
        if offset < 0:
            return -1
        entries = self._look(offset)
        at = _find(entries, 0, seq)
        return entries[at + 1] if at >= 0 else -1

    def _look(self, offset: int) -> "array[int]":
        if self._seen is None or self._seen_at != offset:
            self._seen, self._seen_at = self._read(offset), offset
        return self._seen

    def _chunk_of(self, seq: int) -> int:
        """Offset of the chunk that would hold the number, -1 for none."""
        found = -1
        for offset, first in self._chunks or ():
            if first > seq:
                break
            found = offset
        return found

    def clear(self, each: Callable[[int, int], Any]) -> None:
        """Remove everything, telling `each(sequence number, position)`."""
        while taken := self.take(4096):
            for seq, position, _, _ in taken:
                each(seq, position)

    def close(self) -> None:
        """Give the scratch file back."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._seen, self._seen_at = None, -1


def _find(entries: "array[int]", start: int, seq: int) -> int:
    low, high = start // STRIDE, len(entries) // STRIDE
    while low < high:
        middle = (low + high) // 2
        if entries[middle * STRIDE] < seq:
            low = middle + 1
        else:
            high = middle
    at = low * STRIDE
    return at if at < len(entries) and entries[at] == seq else -1
