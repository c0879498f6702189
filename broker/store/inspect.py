"""Looks into a store without a broker and without changing it: `check`, `stats` and `export`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.store import segments
from broker.store.errors import StoreUnusable
from broker.store.frames import HEADER, RECORD, VERSION
from broker.store.survey import Damage, Segment, Survey, survey, version_of


@dataclass(slots=True)
class Report:
    """What `check` found."""

    segments: int = 0
    frames: int = 0
    bytes: int = 0
    torn: int = 0
    """Bytes of an unfinished write, which the next start leaves out. No loss: nobody was told it was safe."""
    damage: list[Damage] = field(default_factory=list)
    """A start refuses because of it."""
    bad_records: list[Damage] = field(default_factory=list)
    """Records that make no sense, in frames that are as they were written. A start leaves them out."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damage and not self.bad_records

    @property
    def lost(self) -> int:
        """Queue entries, as far as known."""
        return sum(damage.entries for damage in (*self.damage, *self.bad_records))


@dataclass(slots=True)
class SegmentStats:
    """One segment in numbers."""

    segment: int
    bytes: int
    frames: int = 0
    records: dict[str, int] = field(default_factory=dict)
    """By kind."""


@dataclass(slots=True)
class Stats:
    """What `stats` counted. Messages whose time is over count until the broker notices."""

    segments: list[SegmentStats] = field(default_factory=list)
    sessions: int = 0
    queued: int = 0
    retained: int = 0


def check(folder: Path) -> Report:
    """Read everything. Raises StoreUnusable where there is no store or one of another version."""
    found = _survey(folder)
    report = Report(damage=list(found.problems))
    for segment in found.segments:
        data = segment.read()
        scan = segment.scan(found.salt)
        report.segments += not segment.missing
        report.bytes += len(data)
        for piece in scan.frames(data):
            report.frames += 1
            report.bad_records += _bad_records(segment, piece.start + HEADER, data[piece.start + HEADER : piece.end])
        report.damage += segment.damage(scan)
        report.torn += sum(hole.end - hole.start for hole in scan.holes if hole.torn)
    return report


def stats(folder: Path) -> Stats:
    """Count what is in the good frames. Raises StoreUnusable."""
    found = _survey(folder)
    counted = Stats()
    census = _Census()
    for segment in found.segments:
        row = SegmentStats(segment.number, segment.size)
        for _, body, _, _ in _frames(found, segment):
            row.frames += 1
            for _, kind, payload in _records(body):
                name = _name(kind)
                row.records[name] = row.records.get(name, 0) + 1
                census.add(kind, payload)
        counted.segments.append(row)
    counted.sessions = len(census.sessions)
    counted.queued = census.queued()
    counted.retained = len(census.retained)
    return counted


def export(folder: Path) -> Iterator[dict[str, Any]]:
    """Every record of the good frames in order, ready for JSON. Raises StoreUnusable."""
    from broker.engine.records import RecordError, describe

    found = _survey(folder)
    for segment in found.segments:
        for start, body, clock_ms, wall_ms in _frames(found, segment):
            for at, kind, payload in _records(body):
                try:
                    said = describe(kind, payload)
                except RecordError as error:
                    said = {"kind": _name(kind), "error": str(error), "hex": payload.hex()}
                yield {
                    "segment": segment.number,
                    "offset": start + at,
                    "clock_ms": clock_ms,
                    "wall_ms": wall_ms,
                    **said,
                }


def _survey(folder: Path) -> Survey:
    if not folder.is_dir():
        raise StoreUnusable(f"{folder}: there is no store")
    version = version_of(folder)
    if version is not None and version < VERSION:
        raise StoreUnusable(f"{folder}: the store has version {version}; the next start brings it to {VERSION}")
    found = survey(folder)
    if found.fresh:
        raise StoreUnusable(f"{folder}: there is no store")
    return found


def _frames(found: Survey, segment: Segment) -> Iterator[tuple[int, bytes, int, int]]:
    """(offset of the body, body, clock, wall clock) of the good frames of a segment."""
    data = segment.read()
    for piece in segment.scan(found.salt).frames(data):
        start = piece.start + HEADER
        yield start, data[start : piece.end], piece.clock_ms, piece.wall_ms


def _records(body: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The records of a body, up to one whose length does not fit; `check` names that one."""
    from broker.engine.records import RecordError, iterate

    try:
        yield from iterate(body)
    except RecordError:
        return


def _bad_records(segment: Segment, start: int, body: bytes) -> list[Damage]:
    from broker.engine.records import RecordError, describe, iterate

    found = []
    end = 0
    try:
        for at, kind, payload in iterate(body):
            end = at + RECORD.size + len(payload)
            try:
                describe(kind, payload)
            except RecordError as error:
                found.append(_bad_record(segment, start + at, end - at, str(error)))
    except RecordError as error:
        found.append(_bad_record(segment, start + end, len(body) - end, str(error)))
    return found


def _bad_record(segment: Segment, offset: int, length: int, why: str) -> Damage:
    return Damage(str(segment.path), offset, length, 1, f"the record at offset {offset} makes no sense: {why}")


def _name(kind: int) -> str:
    from broker.engine.records import KINDS

    return KINDS.get(kind, f"unknown {kind}")


class _Census:
    """What is alive after all records, counted as the engine would."""

    def __init__(self) -> None:
        self.sessions: set[int] = set()
        self.retained: set[bytes] = set()
        self._waiting: dict[int, set[int]] = {}
        """Session -> sequence numbers handed to it."""
        self._floor: dict[int, int] = {}
        self._done: dict[int, set[int]] = {}

    def add(self, kind: int, payload: bytes) -> None:
        """One record; one that makes no sense changes nothing."""
        from broker.engine import records

        try:
            if kind == records.PUT:
                self._put(payload)
            elif kind == records.META:
                self._meta(*records.decode_json(payload))
            elif kind == records.END:
                self._end(records.decode_session(payload))
            elif kind == records.ACKED:
                self._acked(*records.decode_acked(payload))
            elif kind == records.RELEASED:
                session, seq = records.decode_released(payload)
                self._acked(session, 0, (seq,))
            elif kind == records.CLEARED:
                self.retained.discard(payload)
        except records.RecordError:
            return

    def queued(self) -> int:
        """Entries in the queues of sessions."""
        count = 0
        for session, waiting in self._waiting.items():
            floor = self._floor.get(session, 0)
            count += sum(seq >= floor for seq in waiting - self._done.get(session, set()))
        return count

    def _put(self, payload: bytes) -> None:
        from broker.engine import records

        if records.put_fields(payload)[0] & records.RETAINED:
            self.retained.add(records.put_topic(payload)[0])
        for taker in records.decode_takers(payload):
            self._waiting.setdefault(taker.session, set()).add(taker.seq)

    def _meta(self, session: int, fields: dict[str, Any]) -> None:
        """A snapshot repeats what records in front of it said, for they may be gone by now."""
        self.sessions.add(session)
        try:
            self._acked(session, int(fields.get("f", 0)), [*map(int, fields.get("gone", ())), *fields.get("rel", ())])
        except (TypeError, ValueError):
            return

    def _acked(self, session: int, floor: int, seqs: Iterable[int]) -> None:
        self._floor[session] = max(floor, self._floor.get(session, 0))
        self._done.setdefault(session, set()).update(seqs)

    def _end(self, session: int) -> None:
        self.sessions.discard(session)
        for table in (self._waiting, self._floor, self._done):
            table.pop(session, None)


def size(folder: Path) -> tuple[int, int]:
    """Segments in the folder, whatever their state, and bytes of everything below it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return len(segments.numbers(folder)), sum(path.stat().st_size for path in files)
