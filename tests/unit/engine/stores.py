"""A store in memory whose disk is in the test's hand, and engines that are restarted from it."""

from __future__ import annotations

import io
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from broker.engine import records
from broker.engine.engine import Engine
from broker.engine.journal import Journal
from broker.engine.recovery import Recovery
from broker.engine.spool import STORED, Spool
from broker.extend.store import StoreError, StoreOwner
from tests.unit.engine.harness import Bench

SEGMENT = 1200
"""Bytes of a segment here: segments are rolled, dropped and copied all the time."""
HEAD = 16
"""What stands before the first body of a segment and before every body, so that no offset is 0."""


class Waiting:
    """A commit that is not finished."""

    def __init__(self, number: int, frames: list[tuple[bytes, int]], clock_ms: int) -> None:
        self.number = number
        self.frames = frames
        self.clock_ms = clock_ms
        self.drops: list[tuple[int, list[tuple[int, bytes]]]] = []
        """Segments to delete once this commit is written."""


class Disk:
    """What is left after a crash."""

    def __init__(self) -> None:
        self.segments: dict[int, list[tuple[int, bytes]]] = {1: []}
        """(offset, body) of every frame."""
        self.clock_ms = 0

    def frames(self) -> list[tuple[int, int, bytes]]:
        """(segment, offset, body), in the order of writing."""
        return [(segment, *frame) for segment in sorted(self.segments) for frame in self.segments[segment]]

    def put(self, body: bytes, limit: int = SEGMENT) -> tuple[int, int]:
        """Append one frame, in a new segment where the newest is full."""
        newest = max(self.segments)
        frames = self.segments[newest]
        at = frames[-1][0] + len(frames[-1][1]) + HEAD if frames else HEAD
        if frames and at + len(body) > limit:
            newest, at = newest + 1, HEAD
            frames = self.segments[newest] = []
        frames.append((at, body))
        return newest, at

    def find(self, position: int) -> bytes | None:
        """The whole record at a position."""
        offset = position & 0xFFFFFFFF
        for at, body in self.segments.get(position >> 32, ()):
            if at <= offset < at + len(body):
                size = int.from_bytes(body[offset - at + 1 : offset - at + 5], "little")
                return body[offset - at : offset - at + records.HEADER + size]
        return None

    def records(self, segment: int | None = None) -> list[tuple[int, int, bytes]]:
        """(position, kind, payload) of every record, of one segment or of all."""
        found = []
        for number in sorted(self.segments) if segment is None else [segment]:
            for offset, body in self.segments.get(number, ()):
                for at, kind, payload in records.iterate(body):
                    found.append((number << 32 | offset + at, kind, payload))
        return found

    def copy(self) -> Disk:
        """The same once more."""
        other = Disk()
        other.segments = {number: list(frames) for number, frames in self.segments.items()}
        other.clock_ms = self.clock_ms
        return other


class MemoryStore:
    """`broker.extend.store.Store` without a disk: `step` finishes the oldest commit, `fail` fails it, `step_read`
    answers the oldest read."""

    owner: StoreOwner

    def __init__(self, disk: Disk | None = None, segment_bytes: int = SEGMENT) -> None:
        self.refusing = ""
        self.disk = disk or Disk()
        if self.disk.segments[max(self.disk.segments)]:
            self.disk.segments[max(self.disk.segments) + 1] = []
        self.segment_bytes = segment_bytes
        self.commits: deque[Waiting] = deque()
        self.reads: deque[Callable[[], None]] = deque()
        self.bytes = 0
        """Bytes of all commits handed over."""
        self.dropped: list[int] = []
        self._hidden: set[int] = set()

    # what the engine calls ------------------------------------------------------------------------------------

    def write(self, number: int, frames: list[tuple[bytes, int]], clock_ms: int) -> None:
        """See `Store`."""
        assert frames
        assert not self.commits or number > self.commits[-1].number
        self.bytes += sum(len(body) for body, _ in frames)
        self.commits.append(Waiting(number, frames, clock_ms))

    def read(self, positions: Sequence[int], done: Callable[[list[bytes | None]], None]) -> None:
        """See `Store`."""
        wanted = list(positions)
        self.reads.append(lambda: done([self.disk.find(position) for position in wanted]))

    def fetch(self, positions: Sequence[int]) -> list[bytes | None]:
        """As `read`, at once."""
        return [self.disk.find(position) for position in positions]

    def read_segment(self, segment: int, done: Callable[[list[tuple[int, bytes]]], None]) -> None:
        """See `Store`."""
        assert segment < max(self.disk.segments)

        def answer() -> None:
            done([(at, records_of(kind, payload)) for at, kind, payload in self.disk.records(segment)])

        self.reads.append(answer)

    def drop(self, segment: int) -> None:
        """See `Store`."""
        sizes = self.sizes()
        if segment not in sizes:
            return
        if segment == max(sizes):
            raise ValueError(f"segment {segment} is being written")
        assert segment == min(sizes), "only the oldest may go"
        self.dropped.append(segment)
        if self.commits:
            self.commits[-1].drops.append((segment, self.disk.segments[segment]))
            self._hidden.add(segment)
        else:
            del self.disk.segments[segment]

    def sizes(self) -> dict[int, int]:
        """See `Store`."""
        found = {}
        for number, frames in self.disk.segments.items():
            if number not in self._hidden:
                found[number] = frames[-1][0] + len(frames[-1][1]) if frames else HEAD
        return found

    def close(self) -> None:
        """See `Store`."""
        while self.commits:
            self.step()

    # what the test calls --------------------------------------------------------------------------------------

    def step(self) -> None:
        """The oldest commit is on disk."""
        commit = self.commits.popleft()
        places = [self.disk.put(body, self.segment_bytes) for body, _ in commit.frames]
        self.disk.clock_ms = max(self.disk.clock_ms, commit.clock_ms)
        for segment, _ in commit.drops:
            del self.disk.segments[segment]
            self._hidden.discard(segment)
        self.owner.written(commit.number, places)

    def fail(self, full: bool = True) -> None:
        """The oldest commit cannot be written; until `make_space` (or for ever) nothing can."""
        commit = self.commits.popleft()
        self._hidden.difference_update(segment for segment, _ in commit.drops)
        self.refusing = "full" if full else "failed"
        self.owner.failed(commit.number, StoreError("no space" if full else "broken", full=full))

    def make_space(self) -> None:
        """The disk takes bytes again."""
        assert self.refusing in ("", "full")
        self.refusing = ""

    def step_read(self) -> None:
        """The oldest read is answered."""
        self.reads.popleft()()

    def crash(self, partial: int = 0) -> Disk:
        """What a restart finds: every finished commit and this many frames of those that are not."""
        disk = self.disk.copy()
        for commit in self.commits:
            for body, _ in commit.frames:
                if partial == 0:
                    return disk
                partial -= 1
                disk.put(body, self.segment_bytes)
                disk.clock_ms = max(disk.clock_ms, commit.clock_ms)
        return disk


def records_of(kind: int, payload: bytes) -> bytes:
    """A record, kind and length included."""
    return bytes((kind,)) + len(payload).to_bytes(4, "little") + payload


class StoredBench(Bench):
    """A bench whose sessions survive: `restart` gives the next one. Timers fire with `pass_time` or `fire`."""

    def __init__(
        self, disk: Disk | None = None, segment_bytes: int = SEGMENT, down: float = 0.0, **limits: Any
    ) -> None:
        super().__init__(**limits)
        self.limits = limits
        self.later: list[tuple[float, int, Callable[[], None]]] = []
        self.scratches: list[io.BytesIO] = []
        self._timers = 0
        recovered = disk or Disk()
        clock_ms = recovered.clock_ms = recovered.clock_ms + int(down * 1000) + 1
        recovery = Recovery()
        for segment, offset, body in recovered.frames():
            recovery.read(segment, offset, body)
        self.recovery = recovery
        self.store = MemoryStore(recovered, segment_bytes)
        self.journal = Journal(self.engine.core, self.store, self._call_later, self._scratch, clock_ms)
        self.engine.use_journal(self.journal)
        recovery.install(self.engine, self.journal)

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._timers += 1
        self.later.append((self.now + seconds, self._timers, callback))

    def _scratch(self) -> io.BytesIO:
        self.scratches.append(io.BytesIO())
        return self.scratches[-1]

    def fire(self, index: int = 0) -> None:
        """A timer of the journal fires, the earliest or another one."""
        self.later.sort(key=lambda timer: timer[:2])
        when, _, callback = self.later.pop(index)
        self.now = max(self.now, when)
        callback()
        self.settle()

    def pass_time(self, seconds: float, step: float = 0.25) -> None:
        """Let time go by; the journal's timers fire on the way, commits do not finish."""
        end = self.now + seconds
        while True:
            self.later.sort(key=lambda timer: timer[:2])
            if not self.later or self.later[0][0] > end:
                break
            super().pass_time(max(0.0, self.later[0][0] - self.now), step)
            self.fire()
        super().pass_time(end - self.now, step)

    def commit(self) -> None:
        """Let everything reach the disk, and everything be read that is asked for."""
        for _ in range(10_000):
            self.settle()
            if self.store.commits:
                self.store.step()
            elif self.store.reads:
                self.store.step_read()
            elif not self.journal.idle and self.later:
                self.fire()
            else:
                return
        raise AssertionError("the journal never comes to rest")

    def restart(self, *, down: float = 0.0, partial: int = 0, **limits: Any) -> StoredBench:
        """A new engine with what a crash at this moment leaves, after some time; the clock of this one stands still."""
        disk = self.store.crash(partial)
        return StoredBench(disk, self.store.segment_bytes, down, **{**self.limits, **limits})


# what must be true at any moment --------------------------------------------------------------------------------


def places(spool: Spool) -> list[tuple[int, int]]:
    """(sequence number, position) of every message a session keeps on disk."""
    session = spool.session
    found = []
    inflight = session.inflight
    if inflight is not None:
        for ident, _, _, _, _ in inflight.entries():
            pending = inflight.stored_of(ident)
            if pending is not None and pending.state == STORED:
                found.append((session._seq_of(ident), pending.position))
    for entry in (*(session.queue or ()), *(spool.tail or ())):
        if entry[7] is not None and entry[7].state == STORED:
            found.append((entry[6], entry[7].position))
    found.extend((seq, position) for seq, position, _, _ in spool.waiting_on_disk())
    return found


def recount(engine: Engine, store: MemoryStore) -> dict[int, int]:
    """Records alive in each segment as sessions, retained messages and the table see it. Every place is checked: there
    must be the record that belongs there."""
    journal = engine.core.journal
    alive: Counter[int] = Counter()
    snapshots: dict[int, int] = {}
    values: dict[bytes, int] = {}
    for position, kind, payload in store.disk.records():
        if kind == records.META:
            snapshots[records.decode_session(payload)] = position >> 32
        elif kind == records.VALUE:
            values[records.decode_value(payload)[0]] = position >> 32
    for spool in journal.spools.values():
        assert spool.session.spool is spool
        if spool.over:
            assert spool.session in engine.legacies.sessions
        else:
            assert engine.sessions[spool.session.client_id] is spool.session
        for seq, position in places(spool):
            record = store.disk.find(position)
            assert record is not None, f"nothing at the place of {spool.session.client_id} {seq}"
            assert record[0] == records.PUT
            takers = [(t.session, t.seq) for t in records.decode_takers(record[records.HEADER :])]
            assert (spool.number, seq) in takers, (spool.session.client_id, spool.number, seq, takers)
            alive[position >> 32] += 1
        if spool.segment:
            assert snapshots.get(spool.number) == spool.segment, "the last snapshot is elsewhere"
            alive[spool.segment] += 1
    for message in engine.retained_store.all():
        while message is not None and message.kept is not None:  # and the one on disk whose place it is about to take
            if message.kept.state == STORED:
                record = store.disk.find(message.kept.position)
                assert record is not None, f"nothing at the place of the retained message of {message.topic!r}"
                assert records.put_topic(record[records.HEADER :])[0] == message.topic
                alive[message.kept.position >> 32] += 1
            message = message.kept.replaces
    for key in journal.values:
        if key in journal._value_segments:
            assert values[key] == journal._value_segments[key]
            alive[values[key]] += 1
    return dict(alive)


def check(bench: StoredBench) -> None:
    """The account of space is right, and what is accounted for is there."""
    counted = {segment: n for segment, n in bench.journal.live.items() if n}
    found = recount(bench.engine, bench.store)
    assert counted == found, f"counted {counted}, found {found}"
