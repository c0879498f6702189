"""What a store's folder holds and what is wrong with it, without changing anything."""

from __future__ import annotations

import errno
import secrets
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from broker.store import segments
from broker.store.errors import REMEDY, StoreTooNew
from broker.store.frames import SEGMENT, VERSION, Scan, SegmentHeader, describe, parse_segment, seed_of

FAR = 1_000
"""So many missing segments in a row are a stray file's doing."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A region that was on disk once and cannot be read now."""

    file: str
    offset: int
    length: int
    entries: int
    """Queue entries lost with it, 1 where nobody can say."""
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


@dataclass(slots=True)
class Segment:
    """One segment that there is or should be."""

    number: int
    path: Path
    size: int
    header: SegmentHeader | None
    """None where it cannot be read or the file is missing."""
    extent: int | None = None
    """Bytes it must have, where its successor or a clean stop says so."""
    durable: bool = False
    """All of it was on disk once."""
    missing: bool = False

    def read(self) -> bytes:
        """Its bytes; none where the file is missing. Raises OSError when it cannot be opened."""
        return b"" if self.missing else segments.read_file(self.path)

    def scan(self, salt: int) -> Scan:
        """The way through it."""
        return Scan(seed_of(salt, self.number), self.extent, self.durable)

    def damage(self, scan: Scan) -> list[Damage]:
        """What an exhausted scan says is lost."""
        if self.missing:
            return []
        return [
            Damage(str(self.path), hole.start, hole.end - hole.start, hole.entries, describe(hole))
            for hole in scan.holes
            if not hole.torn
        ]


@dataclass(slots=True)
class Survey:
    """A folder as found. `problems` are about whole files; regions inside segments show when they are scanned."""

    folder: Path
    version: int = VERSION
    salt: int = 0
    segments: list[Segment] = field(default_factory=list)
    """Ascending and without gaps, missing ones included."""
    problems: list[Damage] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    """Unfinished files and segments whose drop was interrupted."""
    fresh: bool = False
    """There is no store, or its making was interrupted."""
    next_segment: int = 1
    """The number of the first segment when there is none."""

    def problem(self, path: Path, text: str, entries: int = 0) -> None:
        """One thing that is wrong with a file."""
        self.problems.append(Damage(str(path), 0, 0, entries, text))


def version_of(folder: Path) -> int | None:
    """The layout's version, None where neither `format` nor a segment tells. Raises StoreTooNew."""
    known = segments.read_format(folder)
    said = [(known.version, folder / "format")] if known is not None else []
    for number in segments.numbers(folder):
        path = segments.segment_path(folder, number)
        header = _header(path)
        if header is not None:
            said.append((header.version, path))
    for version, path in said:
        if version > VERSION:
            raise StoreTooNew(
                f"{path}: the store has version {version}, this release knows {VERSION}: start the release that wrote "
                "it, or restore the folder from a backup made before; isthmus --version says which this is"
            )
    return said[0][0] if said else None


def survey(folder: Path) -> Survey:
    """Look at a folder of the current version. Raises StoreTooNew, and OSError where it cannot be read."""
    found = Survey(folder)
    if not folder.is_dir():
        found.fresh = True
        return found
    version_of(folder)
    found.leftovers = [p for p in folder.iterdir() if p.suffix == ".new"]
    present = {n: _look_at(folder, n) for n in segments.numbers(folder)}
    known = segments.read_format(folder)
    bounds = segments.read_range(folder)
    closed = segments.read_closed(folder)
    if known is None and _unfinished(folder, present, bounds, closed):
        found.fresh = True
        return found
    if known is None:
        found.problem(folder / "format", "the file is missing or damaged")
    found.salt = _salt(known, present)
    _bounds(found, present, bounds, closed)
    foreign = [segment for segment in found.segments if not _belongs(segment, found.salt)]
    for segment in foreign:
        segment.header = None
        segment.durable = True  # its header was, before a frame went into it
    for earlier, later in pairwise(found.segments):
        earlier.durable = True
        if later.header is not None:
            earlier.extent = max(SEGMENT, later.header.previous)
    last = found.segments[-1] if found.segments else None
    if last is not None and closed is not None and closed.segment == last.number and last.size <= closed.length:
        last.extent = closed.length  # after a clean stop it ends there
        last.durable = True
    for segment in foreign:
        unknown = segment.extent is None and segment.size <= SEGMENT  # no region will count for what is gone
        found.problem(segment.path, "the segment's header is missing or damaged", int(unknown))
    return found


def _header(path: Path) -> SegmentHeader | None:
    try:
        with path.open("rb") as file:
            return parse_segment(file.read(SEGMENT))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None


def _look_at(folder: Path, number: int) -> Segment:
    path = segments.segment_path(folder, number)
    return Segment(number, path, path.stat().st_size, _header(path))


def _unfinished(
    folder: Path, present: dict[int, Segment], bounds: segments.Range | None, closed: segments.Closed | None
) -> bool:
    """Whether a store was being made here, which ends with `format`, so that nothing was ever written."""
    if closed is not None or set(present) - {1} or (not present and (folder / "range").exists()):
        return False
    if bounds != (1, 1) and (folder / "range").exists():
        return False
    return all(segment.size == SEGMENT and segment.header is not None for segment in present.values())


def _salt(known: segments.Format | None, present: dict[int, Segment]) -> int:
    if known is not None:
        return known.salt
    return next((s.header.salt for s in reversed(present.values()) if s.header is not None), secrets.randbits(32))


def _bounds(
    found: Survey, present: dict[int, Segment], bounds: segments.Range | None, closed: segments.Closed | None
) -> None:
    """Which segments there must be: what `range`, `closed` and the newest header say, and no gap between."""
    folder = found.folder
    if bounds is None:
        found.problem(folder / "range", "the file is missing or damaged")
    for number in _strangers(present, bounds):
        found.problem(present.pop(number).path, "the segment does not belong here; it is left alone")
    newest = max(present, default=0)
    last = present[newest].header if present else None
    oldest = last.oldest if last is not None else 0
    if bounds is not None:
        oldest, newest = max(oldest, bounds.oldest), max(newest, bounds.newest)
    if closed is not None:
        newest = max(newest, closed.segment)
    for number in [n for n in present if n < oldest]:  # its drop was interrupted
        found.leftovers.append(present.pop(number).path)
    if not present:
        found.problem(folder, "there is no segment, everything is lost", 1)
        found.next_segment = newest + 1
        return
    lowest, highest = min(present), max(present)
    for number in range(oldest or lowest, newest + 1):
        path = segments.segment_path(folder, number)
        if number in present:
            found.segments.append(present[number])
            continue
        found.problem(path, "the segment is missing", 1)
        if lowest < number < highest:
            found.segments.append(Segment(number, path, 0, None, missing=True))
    found.segments[-1].durable = highest < newest  # there was a next one


def _strangers(present: dict[int, Segment], bounds: segments.Range | None) -> list[int]:
    """Segments nobody can have made: at most one is ahead of `range`, and without it none is far from the others."""
    if bounds is not None:
        return [number for number in present if number > bounds.newest + 1]
    ascending = sorted(present)
    for place, (earlier, later) in enumerate(pairwise(ascending)):
        if later - earlier > FAR:
            return ascending[place + 1 :]
    return []


def _belongs(segment: Segment, salt: int) -> bool:
    """Whether its header is valid, and this store's, and this segment's."""
    header = segment.header
    return segment.missing or (
        header is not None and (header.number, header.salt, header.version) == (segment.number, salt, VERSION)
    )


def explain(problems: list[Damage]) -> str:
    """What an operator reads when the store is not opened."""
    return "\n".join([*(str(problem) for problem in problems), f"nothing was changed: {REMEDY}"])
