"""Which store should keep the queues: SQLite, LMDB, RocksDB or a log of our own, on the access patterns of a broker.

`python -m tests.benchmarks.stores [--quick] [--folder ON_THE_DISK_TO_MEASURE]`

A record is 64 bytes or 1 kB of payload and about 150 bytes of metadata. A writer thread commits groups of 500 records,
which is what 100 000 messages/s bring in 5 ms, back to back; every commit is flushed to disk before the next begins. A
consumer reads 500 records at a time, in order, and deletes them in one flushed commit.

Each measurement is a process of its own; a figure is the median of the rounds, in which the candidates take turns, and
"rounds apart" says how far the slowest and the fastest lie apart. Bytes written are those that all threads of the
process handed to the kernel, background compaction included. What was read back is compared with what was written.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import queue
import random
import resource
import shutil
import sqlite3
import statistics
import struct
import sys
import tempfile
import time
import zlib
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

Record = tuple[int, int, bytes]
"""Queue, number in its queue, metadata and payload."""
Span = tuple[int, int, int]
"""Queue, first number, how many."""
Figures = dict[str, float]

GROUP = 500
CACHE = 64 << 20
"""What each candidate may use: SQLite's cache and WAL, RocksDB's memtable (its default), a segment of the log."""
SWITCH_INTERVALS = (0.0005, 0.005)


class Store(Protocol):
    """A candidate, opened on a folder that may hold earlier records. A commit is on disk when it returns."""

    def append(self, group: Sequence[Record]) -> None:
        """Add the records, in one commit."""

    def read(self, span: Span) -> list[bytes]:
        """The records of the span, which begins with the oldest of its queue."""

    def drop(self, spans: Sequence[Span]) -> None:
        """Delete them, in one commit; each begins with the oldest of its queue."""

    def holdings(self) -> Iterable[Span]:
        """What each queue holds."""

    def close(self) -> None: ...


# --- the candidates --------------------------------------------------------------------------------------------------

KEY = struct.Struct(">QQ")


def connect(folder: Path) -> sqlite3.Connection:
    db = sqlite3.connect(folder / "store.db", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA cache_size = -{CACHE // 1024}")
    db.execute(f"PRAGMA wal_autocheckpoint = {CACHE // 4096}")
    return db


class Sqlite:
    """One row a record, `executemany`."""

    def __init__(self, folder: Path) -> None:
        self._db = connect(folder)
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS records (queue INTEGER, seq INTEGER, data BLOB, PRIMARY KEY (queue, seq))"
            " WITHOUT ROWID"
        )

    def append(self, group: Sequence[Record]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO records VALUES (?, ?, ?)", group)
        self._db.execute("COMMIT")

    def read(self, span: Span) -> list[bytes]:
        rows = self._db.execute("SELECT data FROM records WHERE queue = ? AND seq >= ? ORDER BY seq LIMIT ?", span)
        return [data for (data,) in rows]

    def drop(self, spans: Sequence[Span]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany(
            "DELETE FROM records WHERE queue = ? AND seq < ?", [(q, first + count) for q, first, count in spans]
        )
        self._db.execute("COMMIT")

    def holdings(self) -> Iterable[Span]:
        return self._db.execute("SELECT queue, min(seq), count(*) FROM records GROUP BY queue")

    def close(self) -> None:
        self._db.close()


class SqliteTuned:
    """An ordinary table, whose rows may fill their page, and all rows of a group in one statement.

    sqlite3 gives up the interpreter lock once a statement here, not once a row.
    """

    BITS = 40
    """Of the row number, for the number in the queue."""

    HOLDINGS = """
        WITH RECURSIVE firsts (id) AS (
            SELECT min(id) FROM records
            UNION ALL
            SELECT (SELECT min(id) FROM records WHERE id >= ((firsts.id >> 40) + 1) << 40) FROM firsts
            WHERE firsts.id IS NOT NULL
        )
        SELECT id, (SELECT max(id) FROM records WHERE id < ((firsts.id >> 40) + 1) << 40) FROM firsts
        WHERE id IS NOT NULL
    """

    def __init__(self, folder: Path) -> None:
        self._db = connect(folder)
        self._db.execute("CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, data BLOB)")

    def append(self, group: Sequence[Record]) -> None:
        rows = ", ".join(["(?, ?)"] * len(group))
        values: list[object] = []
        for q, seq, data in group:
            values += (q << self.BITS | seq, data)
        self._db.execute(f"INSERT INTO records VALUES {rows}", values)

    def read(self, span: Span) -> list[bytes]:
        q, first, count = span
        first |= q << self.BITS
        rows = self._db.execute("SELECT data FROM records WHERE id >= ? AND id < ? ORDER BY id", (first, first + count))
        return [data for (data,) in rows]

    def drop(self, spans: Sequence[Span]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany(
            "DELETE FROM records WHERE id >= ? AND id < ?",
            [(q << self.BITS, (q << self.BITS) + first + count) for q, first, count in spans],
        )
        self._db.execute("COMMIT")

    def holdings(self) -> Iterator[Span]:
        for first, last in self._db.execute(self.HOLDINGS):
            yield first >> self.BITS, first & (1 << self.BITS) - 1, last - first + 1

    def close(self) -> None:
        self._db.close()


class Lmdb:
    """One key a record, one write transaction a commit."""

    def __init__(self, folder: Path) -> None:
        self._env: Any = importlib.import_module("lmdb").open(str(folder), map_size=64 << 30)

    def append(self, group: Sequence[Record]) -> None:
        pack = KEY.pack
        with self._env.begin(write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti([(pack(q, seq), data) for q, seq, data in group])

    def read(self, span: Span) -> list[bytes]:
        q, first, count = span
        with self._env.begin() as txn, txn.cursor() as cursor:
            cursor.set_range(KEY.pack(q, first))
            return list(islice(cursor.iternext(keys=False), count))

    def drop(self, spans: Sequence[Span]) -> None:
        with self._env.begin(write=True) as txn:
            for q, first, count in spans:
                for seq in range(first, first + count):
                    txn.delete(KEY.pack(q, seq))

    def holdings(self) -> Iterator[Span]:
        with self._env.begin() as txn, txn.cursor() as cursor:
            more = cursor.first()
            while more:
                q, first = KEY.unpack(cursor.key())
                more = cursor.set_range(KEY.pack(q + 1, 0))
                _ = cursor.prev() if more else cursor.last()
                yield q, first, KEY.unpack(cursor.key())[1] - first + 1
                more = more and cursor.next()

    def close(self) -> None:
        self._env.close()


class Rocks:
    """One key a record, one synchronous write batch a commit, ranges deleted."""

    def __init__(self, folder: Path) -> None:
        self._rocks: Any = importlib.import_module("rocksdict")
        self._db = self._rocks.Rdict(str(folder), self._rocks.Options(raw_mode=True))
        self._flushed = self._rocks.WriteOptions()
        self._flushed.sync = True

    def append(self, group: Sequence[Record]) -> None:
        batch, pack = self._rocks.WriteBatch(raw_mode=True), KEY.pack
        for q, seq, data in group:
            batch.put(pack(q, seq), data)
        self._db.write(batch, self._flushed)

    def read(self, span: Span) -> list[bytes]:
        q, first, count = span
        return list(islice(self._db.values(from_key=KEY.pack(q, first)), count))

    def drop(self, spans: Sequence[Span]) -> None:
        batch = self._rocks.WriteBatch(raw_mode=True)
        for q, first, count in spans:
            batch.delete_range(KEY.pack(q, first), KEY.pack(q, first + count))
        self._db.write(batch, self._flushed)

    def holdings(self) -> Iterator[Span]:
        for q, group in itertools.groupby(map(KEY.unpack, self._db.keys()), lambda key: int(key[0])):
            keys = list(group)
            yield q, keys[0][1], len(keys)

    def close(self) -> None:
        self._db.close()


class Log:
    """Our own: a commit is one frame in the newest segment, and where each record lies is kept in memory.

    A frame is its CRC, kind, number of entries and length, then
    - RECORDS: the queue of each record, then the records, each after its length
    - CURSORS: pairs of queue and the position of the last record deleted from it

    Opening reads and checks every frame; the log ends at the first that is not whole. A segment is removed when nothing
    in it or before it is alive. Live records are never copied on: one that stays keeps its segment and all later ones.
    """

    HEADER = struct.Struct("<IIII")
    LENGTH = struct.Struct("<I")
    RECORDS, CURSORS = 1, 2
    BLOCK = 512 << 10
    SMALL_READ = 4096

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, int] = {}
        self._alive: dict[int, int] = {}
        self._positions: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
        self._newest = self._size = 0
        for path in sorted(folder.glob("*.log")):
            self._open_segment(int(path.stem))
            self._recover(path.read_bytes())
        if not self._files:
            self._open_segment(1)

    def append(self, group: Sequence[Record]) -> None:
        self.write(self.encode(group))

    def encode(self, group: Sequence[Record]) -> tuple[int, bytearray]:
        """The file and the frame to `write`; the records have their positions from now on."""
        pack = self.LENGTH.pack
        queues = [q for q, _, _ in group]
        parts = [bytes(self.HEADER.size), array("Q", queues).tobytes()]
        for _, _, data in group:
            parts += (pack(len(data)), data)
        base = self._reserve() + len(parts[0]) + len(parts[1])
        for q, _, data in group:
            self._positions[q].append(base)
            base += 4 + len(data)
        self._alive[self._newest] += len(group)
        return self._frame(self.RECORDS, len(group), parts)

    def write(self, frame: tuple[int, bytearray]) -> None:
        file, data = frame
        if os.write(file, data) != len(data):
            raise OSError("short write")

    def read(self, span: Span) -> list[bytes]:
        wanted = self._positions[span[0]][: span[2]]
        records: list[bytes] = []
        while len(records) < len(wanted):
            at = len(records)
            first = wanted[at]
            end = bisect_right(wanted, first + self.BLOCK - self.SMALL_READ, at)
            file, offset = self._files[first >> 32], first & 0xFFFFFFFF
            block = os.pread(file, wanted[end - 1] - first + self.SMALL_READ, offset)
            (length,) = self.LENGTH.unpack_from(block)
            if len(block) < 4 + length:
                block = os.pread(file, 4 + length, offset)
            for position in wanted[at:end]:
                start = position - first + 4
                if start > len(block):
                    break
                stop = start + int.from_bytes(block[start - 4 : start], "little")
                if stop > len(block):
                    break
                records.append(block[start:stop])
        return records

    def drop(self, spans: Sequence[Span]) -> None:
        cursors = array("Q")
        for q, _, count in spans:
            cursors.extend((q, self._positions[q][count - 1]))
        self._reserve()
        self.write(self._frame(self.CURSORS, len(spans), [bytes(self.HEADER.size), cursors.tobytes()]))
        self._apply(cursors)
        self._remove_dead()

    def holdings(self) -> Iterator[Span]:
        return ((q, 0, len(positions)) for q, positions in self._positions.items() if positions)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)

    def _reserve(self) -> int:
        """The position of the next frame."""
        if self._size >= CACHE:
            self._open_segment(self._newest + 1)
        return self._newest << 32 | self._size

    def _open_segment(self, number: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_DSYNC
        self._files[number] = os.open(self._folder / f"{number:08}.log", flags, 0o600)
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self._alive[number] = self._size = 0
        self._newest = number

    def _frame(self, kind: int, count: int, parts: list[bytes]) -> tuple[int, bytearray]:
        """Fills in the header, the first of the parts."""
        frame = bytearray().join(parts)
        self.HEADER.pack_into(frame, 0, 0, kind, count, len(frame))
        self.LENGTH.pack_into(frame, 0, zlib.crc32(memoryview(frame)[4:]))
        self._size += len(frame)
        return self._files[self._newest], frame

    def _apply(self, cursors: array[int]) -> None:
        for q, last in zip(cursors[::2], cursors[1::2], strict=True):
            positions = self._positions[q]
            count = bisect_right(positions, last)
            for position in positions[:count]:
                self._alive[position >> 32] -= 1
            del positions[:count]

    def _remove_dead(self) -> None:
        for number in sorted(self._files)[:-1]:
            if self._alive[number]:
                return
            os.close(self._files.pop(number))
            os.unlink(self._folder / f"{number:08}.log")

    def _recover(self, segment: bytes) -> None:
        """Take in the frames of the newest segment; what follows the last whole one is cut off."""
        view, at = memoryview(segment), 0
        while at + self.HEADER.size <= len(view):
            crc, kind, count, size = self.HEADER.unpack_from(view, at)
            if at + size > len(view) or zlib.crc32(view[at + 4 : at + size]) != crc:
                break
            body = at + self.HEADER.size
            if kind == self.RECORDS:
                self._recover_records(view, body, count)
            else:
                self._apply(array("Q", view[body : at + size].tobytes()))
            at += size
        os.ftruncate(self._files[self._newest], at)
        self._size = at

    def _recover_records(self, view: memoryview, at: int, count: int) -> None:
        segment, unpack, positions = self._newest << 32, self.LENGTH.unpack_from, self._positions
        queues = array("Q", view[at : at + 8 * count].tobytes())
        at += 8 * count
        for q in queues:
            positions[q].append(segment | at)
            at += 4 + unpack(view, at)[0]
        self._alive[self._newest] += count


CANDIDATES: dict[str, tuple[Callable[[Path], Store], str]] = {
    "SQLite": (Sqlite, "sqlite3"),
    "SQLite, tuned": (SqliteTuned, "sqlite3"),
    "LMDB": (Lmdb, "lmdb"),
    "RocksDB": (Rocks, "rocksdict"),
    "own log": (Log, "zlib"),
}
"""By name: how it is opened, the library it needs."""
LOG_FED_BY_LOOP = "own log, frames built by the loop"


# --- the records -----------------------------------------------------------------------------------------------------


def contents(payload: int) -> list[bytes]:
    """Metadata as a broker keeps it, which compresses, before payloads that do not."""
    rng = random.Random(payload)
    return [
        b"plant/%04d/line/%02d/machine/%04d/temperature\x00application/octet-stream\x00device-%08d\x00%016x"
        b"\x01\x00trace-id\x00%032x\x00"
        % (n % 97, n % 13, rng.randrange(9999), rng.randrange(99999999), rng.getrandbits(64), rng.getrandbits(128))
        + rng.randbytes(payload)
        for n in range(4096)
    ]


def hot_groups(count: int, payload: int, queues: int = 4) -> list[list[Record]]:
    """The records take the queues in turn."""
    data = contents(payload)
    records = ((n % queues, n // queues, data[n % len(data)]) for n in range(count))
    return list(batches(records, GROUP))


def small_groups(queues: int, depth: int) -> list[list[Record]]:
    """Every queue gets a message, in random order, `depth` times."""
    data, rng = contents(64), random.Random(queues)
    order = list(range(queues))

    def records() -> Iterator[Record]:
        for seq in range(depth):
            rng.shuffle(order)
            for q in order:
                yield q, seq, data[(q + seq) % len(data)]

    return list(batches(records(), GROUP))


def batches(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while batch := list(islice(records, size)):
        yield batch


# --- measuring -------------------------------------------------------------------------------------------------------


class Meter:
    """Time, CPU time of all threads, and bytes written since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> tuple[float, float, float]:
        return tuple(b - a for a, b in zip(self._start, self._now(), strict=True))  # type: ignore[return-value]

    @staticmethod
    def _now() -> tuple[float, float, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), usage.ru_utime + usage.ru_stime, proc("io", "wchar")


def proc(file: str, key: str) -> float:
    """A number from /proc/self; 0 where there is none."""
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return 0
    return next((float(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def write(store: Store, groups: Sequence[list[Record]], seconds: float) -> tuple[int, list[float]]:
    """Commit the groups in a writer thread, for at most so long; how many groups, and how long each commit took."""
    times: list[float] = []

    def run() -> None:
        end = time.perf_counter() + seconds
        for group in groups:
            start = time.perf_counter()
            if start > end:
                return
            store.append(group)
            times.append(time.perf_counter() - start)

    with ThreadPoolExecutor(1) as writer:
        writer.submit(run).result()
    return len(times), times


def consume(store: Store, spans: Iterable[Span]) -> tuple[int, float]:
    """Read and delete the queues side by side, 500 records a turn and queue; how many, and records/s."""
    start, total = time.perf_counter(), 0
    left = list(spans)
    while left:
        taken = [(q, first, min(count, GROUP)) for q, first, count in left]
        for span in taken:
            total += len(store.read(span))
        store.drop(taken)
        left = [(q, first + GROUP, count - GROUP) for q, first, count in left if count > GROUP]
    return total, total / (time.perf_counter() - start)


def expect(what: str, found: object, written: object) -> None:
    if found != written:
        raise SystemExit(f"stores: {what}: {found!r:.200} instead of {written!r:.200}")


def hot(name: str, folder: Path, payload: int, count: int, seconds: float) -> Figures:
    """Four long queues: written, then one consumed alone, then the three others side by side."""
    groups = hot_groups(count, payload)
    store = CANDIDATES[name][0](folder)
    gc.disable()
    meter = Meter()
    commits, times = write(store, groups, seconds)
    elapsed, cpu, _ = meter.read()
    records = commits * GROUP
    each = records // 4
    sample = [data for group in groups[:8] for q, _, data in group if q == 1][:GROUP]
    expect("the first records", store.read((1, 0, len(sample))), sample)
    meter_out = Meter()
    alone, out_alone = consume(store, [(0, 0, each)])
    beside, out = consume(store, [(q, 0, each) for q in (1, 2, 3)])
    cpu_out = meter_out.read()[1]
    expect("records consumed", alone + beside, records)
    expect("records left", list(store.holdings()), [])
    store.close()  # what was left for the background is paid here
    return {
        "in": records / elapsed,
        "commit_p50": statistics.median(times),
        "commit_p99": statistics.quantiles(times, n=100)[98],
        "out": out,
        "out_alone": out_alone,
        "amplification": meter.read()[2] / (records * payload),
        "cpu_in": cpu / records * 1e6,
        "cpu_out": cpu_out / records * 1e6,
    }


def fill(name: str, folder: Path, queues: int, depth: int, seconds: float) -> Figures:
    """Many small queues, written. Fails when that takes longer than it may."""
    groups = small_groups(queues, depth)
    store = CANDIDATES[name][0](folder)
    gc.disable()
    meter = Meter()
    commits, times = write(store, groups, seconds)
    elapsed, cpu, _ = meter.read()
    expect("groups written in time", commits, len(groups))
    store.close()
    records = queues * depth
    return {
        "in": records / elapsed,
        "commit_p99": statistics.quantiles(times, n=100)[98],
        "cpu_in": cpu / records * 1e6,
        "amplification": meter.read()[2] / (records * 64),
        "disk": sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file()),
    }


def open_cold(name: str, folder: Path, queues: int, depth: int) -> Figures:
    """Open what `fill` left, without the page cache, list it, and drain a hundredth of the queues."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    importlib.import_module(CANDIDATES[name][1])
    gc.disable()
    memory, start = proc("status", "RssAnon"), time.perf_counter()
    store = CANDIDATES[name][0](folder)
    held = {q: (first, count) for q, first, count in store.holdings()}
    opened = time.perf_counter() - start
    memory = proc("status", "RssAnon") - memory
    expect("queues and records", (len(held), sum(c for _, c in held.values())), (queues, queues * depth))
    chosen = random.Random().sample(range(queues), queues // 100)
    data = contents(64)
    q = chosen[0]
    expect("a queue's records", store.read((q, *held[q])), [data[(q + n) % len(data)] for n in range(depth)])
    start, total = time.perf_counter(), 0
    at_once = GROUP // depth
    for at in range(0, len(chosen), at_once):
        taken = [(q, *held[q]) for q in chosen[at : at + at_once]]
        for span in taken:
            total += len(store.read(span))
        store.drop(taken)
    drained = total / (time.perf_counter() - start)
    expect("records drained", total, len(chosen) * depth)
    store.close()
    return {"open": opened, "memory": memory * 1024, "drain": drained}


def spin(running: Callable[[], bool], feed: Callable[[], None]) -> tuple[float, float]:
    """A loop thread that never rests; its turns a second and its longest pause."""
    turns, longest = 0, 0.0
    start = last = time.perf_counter()
    while not turns or running():
        for _ in range(500):
            pass
        feed()
        turns += 1
        now = time.perf_counter()
        longest = max(longest, now - last)
        last = now
    return turns / (last - start), longest


def write_beside(
    store: Store, groups: Sequence[list[Record]], every: float, seconds: float, by_loop: bool
) -> tuple[float, float, float]:
    """Commit a group `every` so many seconds, 0 for back to back, from a writer thread while this one spins.

    Returns records/s, turns/s and the longest pause. `by_loop`: this thread builds the frames, the writer only writes.
    """
    start = time.perf_counter()
    commits = fed = 0
    ready: queue.SimpleQueue[tuple[int, bytearray] | None] = queue.SimpleQueue()

    def append() -> None:
        nonlocal commits
        for number, group in enumerate(groups):
            if (early := start + number * every - time.perf_counter()) > 0:
                time.sleep(early)
            if time.perf_counter() - start > seconds:
                return
            store.append(group)
            commits += 1

    def write_fed() -> None:
        nonlocal commits
        while frame := ready.get():
            cast(Log, store).write(frame)
            commits += 1

    def feed() -> None:
        nonlocal fed
        elapsed = time.perf_counter() - start
        if ready.qsize() >= 2 or fed > len(groups) or elapsed < fed * every:
            return
        over = elapsed > seconds or fed == len(groups)
        ready.put(None if over else cast(Log, store).encode(groups[fed]))
        fed = len(groups) + 1 if over else fed + 1

    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(write_fed if by_loop else append)
        turns, longest = spin(lambda: not written.done(), feed if by_loop else nothing)
        written.result()
    return commits * GROUP / (time.perf_counter() - start), turns, longest


def nothing() -> None: ...


def beside_loop(name: str, folder: Path, pattern: str, interval: float, seconds: float) -> Figures:
    """Write while the loop thread computes: as much as the store takes, then 100 000 records/s."""
    sys.setswitchinterval(interval)
    groups = hot_groups(1_200_000, 64) if pattern == "hot" else small_groups(100_000, 12)
    by_loop = name == LOG_FED_BY_LOOP
    store = Log(folder) if by_loop else CANDIDATES[name][0](folder)
    gc.disable()

    def alone() -> float:
        end = time.perf_counter() + seconds / 3
        return spin(lambda: time.perf_counter() < end, nothing)[0]

    before = alone()
    most, turns_most, _ = write_beside(store, groups[:2000], 0, seconds, by_loop)
    paced, turns_paced, longest = write_beside(store, groups[2000:], 0.005, seconds, by_loop)
    full_speed = (before + alone()) / 2
    store.close()
    return {
        "in": most,
        "slowdown": 1 - turns_most / full_speed,
        "paced_in": paced,
        "paced_slowdown": 1 - turns_paced / full_speed,
        "longest": longest,
    }


# --- running and telling ---------------------------------------------------------------------------------------------


class Rounds:
    """Runs measurements, each in a process and a folder of its own, and keeps their figures."""

    def __init__(self, where: Path, rounds: int) -> None:
        self._where, self._rounds = where, rounds

    def run(
        self, names: Iterable[str], *steps: tuple[Callable[..., Figures], tuple[object, ...]]
    ) -> dict[str, Figures]:
        """By candidate: the medians of what the steps, which share a folder, measured."""
        results: defaultdict[str, list[Figures]] = defaultdict(list)
        for number, name in itertools.product(range(self._rounds), names):
            folder = Path(tempfile.mkdtemp(prefix="stores-", dir=self._where))
            figures: Figures = {}
            try:
                for step, arguments in steps:
                    figures |= fresh(step, name, folder, *arguments)
            finally:
                shutil.rmtree(folder)
            results[name].append(figures)
            shown = " ".join(f"{key}={value:.4g}" for key, value in figures.items())
            print(f"  {number + 1}. {name}: {shown}", file=sys.stderr, flush=True)
        return {name: medians(several) for name, several in results.items()}


def medians(rounds: Sequence[Figures]) -> Figures:
    figures = {key: statistics.median(f[key] for f in rounds) for key in rounds[0]}
    speeds = [f["in"] for f in rounds]
    return figures | {"apart": (max(speeds) - min(speeds)) / figures["in"]}


def fresh(step: Callable[..., Figures], *arguments: object) -> Figures:
    """The step in a new process: its memory, threads and accounts are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(step, *arguments).result(timeout=120)


def show(
    title: str, heads: Sequence[str], results: dict[str, Figures], row: Callable[[Figures], Sequence[str]]
) -> None:
    print(f"\n{title}\n\n| | {' | '.join(heads)} | rounds apart |\n|---|{'---|' * (len(heads) + 1)}")
    for name, figures in results.items():
        print(f"| {name} | {' | '.join(row(figures))} | {figures['apart']:.0%} |")


def k(rate: float) -> str:
    return f"{rate / 1000:.0f} k" if rate >= 20_000 else f"{rate / 1000:.1f} k"


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.03 else "< 3 %"  # two idle runs differ by that


def measure_hot(rounds: Rounds, names: Sequence[str], quick: bool) -> None:
    heads = ["in, records/s", "commit ms p50 / p99", "out, 3 queues side by side", "out, 1 alone",
             "bytes written per payload byte", "CPU s per million in / out"]  # fmt: skip
    for payload, count in ((64, 100_000 if quick else 600_000), (1024, 40_000 if quick else 160_000)):
        results = rounds.run(names, (hot, (payload, count, 10.0)))
        show(
            f"Four long queues, {payload}-byte payloads, up to {count:,} records in and out",
            heads,
            results,
            lambda f: [
                k(f["in"]), f"{ms(f['commit_p50'])} / {ms(f['commit_p99'])}", k(f["out"]), k(f["out_alone"]),
                f"{f['amplification']:.1f}", f"{f['cpu_in']:.1f} / {f['cpu_out']:.1f}",
            ],
        )  # fmt: skip


def measure_small(rounds: Rounds, names: Sequence[str], quick: bool) -> None:
    queues = 10_000 if quick else 100_000
    show(
        f"{queues:,} small queues of 10 messages, 64-byte payloads, written in random order; opened cold; 1 % drained",
        ["in, records/s", "commit ms p99", "CPU s per million in", "bytes written per payload byte", "on disk, MB",
         "open and list, s", "memory for it, MB", "drain, records/s"],
        rounds.run(names, (fill, (queues, 10, 60.0)), (open_cold, (queues, 10))),
        lambda f: [
            k(f["in"]), ms(f["commit_p99"]), f"{f['cpu_in']:.1f}", f"{f['amplification']:.1f}",
            f"{f['disk'] / 1e6:.0f}", f"{f['open']:.2f}", f"{f['memory'] / 1e6:.0f}", k(f["drain"]),
        ],
    )  # fmt: skip


def measure_beside_loop(rounds: Rounds, names: Sequence[str], quick: bool) -> None:
    names = [*names, LOG_FED_BY_LOOP]
    for pattern, interval in itertools.product(("hot", "small"), SWITCH_INTERVALS):
        what = "4 long queues" if pattern == "hot" else "100,000 small queues"
        show(
            f"Beside a loop thread at 100 %: {what}, 64-byte payloads, switch interval {interval * 1000:g} ms",
            ["in at most, records/s", "slows the loop by", "in of 100 k offered", "slows the loop by",
             "longest pause of the loop, ms"],
            rounds.run(names, (beside_loop, (pattern, interval, 1.0 if quick else 1.5))),
            lambda f: [
                k(f["in"]), percent(f["slowdown"]), k(f["paced_in"]), percent(f["paced_slowdown"]), ms(f["longest"]),
            ],
        )  # fmt: skip


PARTS = {"hot": measure_hot, "small": measure_small, "loop": measure_beside_loop}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures candidates for the store.")
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the records")
    parser.add_argument("--rounds", type=int, default=3, help="a figure is the median of so many")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the folder for temporary files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    names = []
    for name, (_, library) in CANDIDATES.items():
        if importlib.util.find_spec(library):
            names.append(name)
        else:
            print(f"{name}: skipped, {library} is not installed")
    with tempfile.TemporaryDirectory(prefix="isthmus-stores-", dir=options.folder) as where:
        rounds = Rounds(Path(where), 1 if options.quick else options.rounds)
        for part in options.parts:
            PARTS[part](rounds, names, options.quick)


if __name__ == "__main__":
    main()
