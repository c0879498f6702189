"""Opening the store: makes it, brings it up to date, hands out what it holds, and mends what may be mended."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from broker.store import segments
from broker.store.errors import StoreDamaged
from broker.store.frames import HEADER, SEGMENT, VERSION, Hole, Scan, SegmentHeader, pack_segment, pack_void, seed_of
from broker.store.journal import FileStore
from broker.store.migrate import migrate
from broker.store.survey import Damage, Segment, Survey, explain, survey
from broker.store.writer import Durability

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 << 20
"""A segment that has reached this size is followed by the next one."""

Found = tuple[int, int, bytes, int, int]
"""Segment, offset of the body, body, store clock and wall clock (ms) of one frame."""


class Recovered:
    """What the store held. Read `frames` to the end: what is wrong is known then, and only then the store takes writes.

    Where there is `damage` and a loss was not accepted, nothing was changed and the store takes none: stop.
    """

    def __init__(self, store: FileStore, found: Survey, accept_loss: bool) -> None:
        self._store = store
        self._found = found
        self._accept_loss = accept_loss
        self.damage: list[Damage] = list(found.problems)
        self.torn = 0
        """Bytes that a commit which was never acknowledged left behind."""
        self.last_clock_ms = 0
        self.last_wall_ms = 0

    @property
    def lost(self) -> int:
        """Queue entries known to be lost; a region nobody can read counts 1."""
        return sum(damage.entries for damage in self.damage)

    def explain(self) -> str:
        """For the operator: every damage on a line, and what to do."""
        return explain(self.damage)

    def frames(self) -> Iterator[Found]:
        """Every good frame in order, one segment in memory at a time. Raises OSError where the disk cannot be read or,
        at the end, mended."""
        found = self._found
        scans: list[tuple[Segment, Scan]] = []
        for segment in found.segments:
            data = segment.read()
            scan = segment.scan(found.salt)
            for piece in scan.frames(data):
                body = piece.start + HEADER
                self.last_clock_ms = piece.clock_ms
                self.last_wall_ms = piece.wall_ms
                yield segment.number, body, data[body : piece.end], piece.clock_ms, piece.wall_ms
            self.damage += segment.damage(scan)
            self.torn += sum(hole.end - hole.start for hole in scan.holes if hole.torn)
            scans.append((segment, scan))
        if self.damage and not self._accept_loss:
            return
        self._keep_damaged(scans)
        if self.torn:
            log.warning("%s: %d bytes of a write that was cut off are left out", found.folder, self.torn)
        self._store.start(found.salt, _mend(found, scans))

    def _keep_damaged(self, scans: list[tuple[Segment, Scan]]) -> None:
        """Copy what is about to be changed: what cannot be read today may be worth something to somebody."""
        for damage in self.damage:
            log.error("loss accepted: %s", damage)
        damaged = {damage.file for damage in self.damage}
        paths = [segment.path for segment, _ in scans if str(segment.path) in damaged and not segment.missing]
        if not paths:
            return
        kept = self._found.folder / "damaged"
        if not kept.exists():
            segments.make_folder(kept)
        for path in paths:
            copy = segments.unused(kept / path.name)
            fd = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as target:
                target.write(segments.read_file(path))
                target.flush()
                os.fsync(target.fileno())
            log.error("%s: copied to %s as it was", path, copy)
        segments.sync_folder(kept)


def open_store(
    folder: Path,
    *,
    durability: Durability,
    interval: float,
    min_free: int,
    loop: asyncio.AbstractEventLoop,
    segment_bytes: int = SEGMENT_BYTES,
    accept_loss: bool = False,
) -> tuple[FileStore, Recovered]:
    """The store in this folder, made if there is none, and what it held. The data folder's lock must be held.

    `interval` is seconds between flushes, `min_free` bytes. Raises StoreDamaged when whole files are missing or
    damaged (with `accept_loss` that is in the log and in `Recovered.damage`), StoreTooNew, StoreUnusable and OSError.
    """
    migrate(folder)
    found = survey(folder)
    if found.problems and not accept_loss:
        raise StoreDamaged(explain(found.problems))
    if found.fresh:
        found = _create(folder)
    store = FileStore(
        folder, loop, durability=durability, interval=interval, min_free=min_free, segment_bytes=segment_bytes
    )
    return store, Recovered(store, found, accept_loss)


def _create(folder: Path) -> Survey:
    """An empty store. `format` comes last: without it the making was interrupted."""
    if not folder.exists():
        segments.make_folder(folder)
    salt = secrets.randbits(32)
    segments.create_segment(folder, SegmentHeader(VERSION, 1, 1, 0, salt))
    segments.write_range(folder, segments.Range(1, 1))
    segments.write_format(folder, salt)
    return survey(folder)


def _mend(found: Survey, scans: list[tuple[Segment, Scan]]) -> dict[int, int]:
    """Make every segment valid from its first to its last byte, note which there are; returns their sizes.

    Done again after being killed anywhere in it, it ends the same.
    """
    folder, salt = found.folder, found.salt
    for path in found.leftovers:
        path.unlink(missing_ok=True)
    (folder / "closed").unlink(missing_ok=True)
    sizes: dict[int, int] = {}
    oldest = scans[0][0].number if scans else found.next_segment
    previous = 0
    for segment, scan in scans:
        last = segment is scans[-1][0]
        header = SegmentHeader(VERSION, segment.number, oldest, previous, salt)
        if segment.missing:
            segments.create_segment(folder, header)
        holes = [hole for hole in scan.holes if hole.start < scan.end]
        if segment.missing or segment.header is None or holes or (last and segment.size > scan.end):
            _mend_segment(segment, header, holes, scan.end if last else None, seed_of(salt, segment.number))
        sizes[segment.number] = segment.path.stat().st_size
        previous = max(scan.end, segment.extent or 0)
    if not scans:
        segments.create_segment(folder, SegmentHeader(VERSION, oldest, oldest, 0, salt))
        sizes[oldest] = SEGMENT
    bounds = segments.Range(min(sizes), max(sizes))
    if segments.read_range(folder) != bounds:
        segments.write_range(folder, bounds)
    known = segments.read_format(folder)
    if known is None or known.salt != salt:
        segments.write_format(folder, salt)
    segments.sync_folder(folder)
    return sizes


def _mend_segment(segment: Segment, header: SegmentHeader, holes: list[Hole], cut: int | None, seed: int) -> None:
    """Cover holes with void frames, write the header again where it is damaged, cut off a torn end."""
    if segment.path.stat().st_nlink > 1:  # a backup has it too, and keeps what was there
        segments.write_file(segment.path, segment.read())
    fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for hole in holes:
            os.pwrite(fd, pack_void(hole.end - hole.start, seed ^ hole.start), hole.start)
        if segment.header is None:
            os.pwrite(fd, pack_segment(header), 0)
        if cut is not None:
            os.ftruncate(fd, cut)
        os.fsync(fd)
    finally:
        os.close(fd)
