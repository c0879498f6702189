"""Frames and segment headers as bytes, and how they are found again in a damaged segment. No files, no threads.

Theory of operation. A segment is a header and frames back to back; a frame is what one append wrote, a header and a
body. The checksum of a frame's header starts from a seed made of the store's salt, the segment and the offset, so a
header is valid in the place it was written to and nowhere else: what a client puts into a payload, a block of
another file or a moved frame never passes for one.

What is invalid was either on disk once (damage) or never got there completely (torn, and so never acknowledged).
Frames carry their proof: `base` is how far the segment was on disk when the frame was written. An invalid region that
starts below a later base is damage, and so is one in a segment that has a successor, because a segment is on disk
before the next is begun. What was given up is covered by a void frame, which makes the segment valid again.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple
from zlib import crc32

VERSION = 1
"""Of the layout of the store's folder and everything in it."""

FRAME = b"IsF1"
VOID = b"IsV1"
_MAGIC = re.compile(rb"Is[FV]1")
_HEADER = struct.Struct("<4sIIIQQI")
_CHECKED = struct.Struct("<4sIIIQQII")
HEADER = _CHECKED.size
"""Bytes of a frame's header."""

_SEGMENT = struct.Struct("<8sIIIII")
SEGMENT = _SEGMENT.size + 4
"""Bytes of a segment's header."""
SEGMENT_MAGIC = b"ISTHMUS\0"

RECORD = struct.Struct("<BI")
"""Kind of a record and bytes of what follows."""


class SegmentHeader(NamedTuple):
    """What a segment says of itself and its predecessors."""

    version: int
    number: int
    oldest: int
    """Lowest segment that existed when this one was created."""
    previous: int
    """Bytes of the segment before it that count; 0 for the first."""
    salt: int
    """The store's own number, the same in all its segments."""


class Kind(Enum):
    """What `scan` found."""

    FRAME = 1
    VOID = 2
    """A region given up earlier."""
    BROKEN = 3
    """The header is valid, the body is not."""
    UNREADABLE = 4


class Piece(NamedTuple):
    """A stretch of a segment, from `start` up to `end`; the body of a frame begins at `start + HEADER`."""

    kind: Kind
    start: int
    end: int
    entries: int
    """Queue entries in it, as far as known."""
    clock_ms: int
    wall_ms: int
    base: int


class Hole(NamedTuple):
    """An invalid region."""

    start: int
    end: int
    entries: int
    torn: bool
    """Never acknowledged; otherwise it was on disk once."""


def describe(hole: Hole) -> str:
    """Damage in words."""
    entries = f"{hole.entries} queue {'entry' if hole.entries == 1 else 'entries'}"
    return f"{hole.end - hole.start} bytes at offset {hole.start} are damaged, {entries} lost"


def seed_of(salt: int, number: int) -> int:
    """Where the checksums of a segment's frames start; XOR with the offset of the frame."""
    return crc32(number.to_bytes(4, "little"), salt)


def pack_segment(header: SegmentHeader) -> bytes:
    """The first bytes of a segment."""
    packed = _SEGMENT.pack(SEGMENT_MAGIC, *header)
    return packed + crc32(packed).to_bytes(4, "little")


def parse_segment(data: bytes) -> SegmentHeader | None:
    """The header at the beginning of `data`, None where it is invalid."""
    if len(data) < SEGMENT or data[:8] != SEGMENT_MAGIC:
        return None
    if crc32(data[: _SEGMENT.size]) != int.from_bytes(data[_SEGMENT.size : SEGMENT], "little"):
        return None
    return SegmentHeader(*_SEGMENT.unpack_from(data)[1:])


def pack_header(body: bytes, entries: int, clock_ms: int, wall_ms: int, base: int, seed: int) -> bytes:
    """The header of a frame; `seed` is the segment's XOR the frame's offset."""
    packed = _HEADER.pack(FRAME, len(body), entries, crc32(body), clock_ms, wall_ms, base)
    return packed + crc32(packed, seed).to_bytes(4, "little")


def pack_void(length: int, seed: int) -> bytes:
    """The header of a void frame that covers `length` bytes, the header included; it proves nothing about others."""
    packed = _HEADER.pack(VOID, length - HEADER, 0, 0, 0, 0, 0)
    return packed + crc32(packed, seed).to_bytes(4, "little")


def records(body: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, whole record) of every record in a body, up to one that does not fit."""
    at = 0
    end = len(body)
    while at + RECORD.size <= end:
        following = at + RECORD.size + RECORD.unpack_from(body, at)[1]
        if following > end:
            return
        yield at, body[at:following]
        at = following


def scan(data: bytes, seed: int, end: int) -> Iterator[Piece]:
    """What the bytes from the segment's header up to `end` hold, in order and without gaps."""
    at = SEGMENT
    while at < end:
        piece = _piece(data, at, end, seed)
        if piece is None:
            found = _resume(data, at + 1, end, seed)
            piece = Piece(Kind.UNREADABLE, at, found, 1, 0, 0, 0)
        yield piece
        at = piece.end


def _piece(data: bytes, at: int, end: int, seed: int) -> Piece | None:
    """What the header at this offset announces, None where there is no valid one."""
    if at + HEADER > end:
        return None
    magic, length, entries, check, clock_ms, wall_ms, base, header_check = _CHECKED.unpack_from(data, at)
    if magic not in (FRAME, VOID) or crc32(data[at : at + HEADER - 4], seed ^ at) != header_check:
        return None
    stop = at + HEADER + length
    if magic == VOID:
        kind = Kind.VOID
    elif stop <= end and crc32(memoryview(data)[at + HEADER : stop]) == check:
        kind = Kind.FRAME
    else:
        kind = Kind.BROKEN
    return Piece(kind, at, stop, entries, clock_ms, wall_ms, base)


def _resume(data: bytes, at: int, end: int, seed: int) -> int:
    """Where the next valid header is, or the end."""
    for match in _MAGIC.finditer(data, at, end):
        if _piece(data, match.start(), end, seed) is not None:
            return match.start()
    return end


class Scan:
    """The way through one segment from front to back, and afterwards what is wrong with it.

    `extent` is how many bytes the segment must have, where its successor or a clean stop says so; `durable` says that
    all of it was on disk once. Bytes beyond a known extent are of a commit that failed and do not count.
    """

    def __init__(self, seed: int, extent: int | None = None, durable: bool = False) -> None:
        self._seed = seed
        self._extent = extent
        self._durable = durable
        self.holes: list[Hole] = []
        self.end = SEGMENT
        """Up to where frames, void frames and damage reach; what follows is torn and may be cut off."""

    def frames(self, data: bytes) -> Iterator[Piece]:
        """The valid frames in order. `holes` and `end` are complete when it is exhausted."""
        limit = len(data) if self._extent is None else min(len(data), self._extent)
        invalid: list[Piece] = []
        proof = at = SEGMENT
        for piece in scan(data, self._seed, limit):
            at = piece.end
            proof = max(proof, piece.base)
            if piece.kind is Kind.FRAME:
                self.end = at
                yield piece
            elif piece.kind is Kind.VOID:
                self.end = at
            else:
                invalid.append(piece)
        if self._extent is not None and at < self._extent:  # it has been cut short
            if invalid and invalid[-1].end == at and invalid[-1].kind is Kind.UNREADABLE:
                invalid[-1] = invalid[-1]._replace(end=self._extent)
            else:
                invalid.append(Piece(Kind.UNREADABLE, at, self._extent, 1, 0, 0, 0))
        for piece in invalid:
            torn = not self._durable and piece.start >= proof
            # damage needs room for a void frame; what is torn ends with the file
            end = min(piece.end, limit) if torn else max(piece.end, piece.start + HEADER)
            self.holes.append(Hole(piece.start, end, piece.entries, torn))
            if not torn:
                self.end = max(self.end, end)
