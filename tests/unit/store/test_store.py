"""Appending, reading and dropping while all is well."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from broker.store import reader
from broker.store.frames import HEADER, SEGMENT
from tests.unit.store.parts import Owner, Run, bodies_in, fill, open_it, record, running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("durability", ["flush", "interval", "none"])
def test_what_is_written_comes_back_in_order_over_segments(folder: Path, durability: str) -> None:
    bodies = [record(bytes([i]) * 700) for i in range(20)]
    with running(folder, durability=durability) as run:
        for i, body in enumerate(bodies):
            run.write(body, clock_ms=i)
    assert run.owner.log == [("written", i + 1) for i in range(20)]
    with running(folder, durability=durability) as run:
        assert run.bodies == bodies
        assert [clock for _, _, _, clock, _ in run.frames] == list(range(20))
        assert (run.recovered.last_clock_ms, run.recovered.damage, run.recovered.torn) == (19, [], 0)
        assert abs(run.recovered.last_wall_ms - time.time() * 1000) < 60_000
        assert sorted(run.store.sizes()) == [1, 2, 3, 4]
        assert run.store.sizes() == {int(p.stem): p.stat().st_size for p in folder.glob("*.log")}


def test_places_are_where_the_bodies_are(folder: Path) -> None:
    with running(folder) as run:
        number = run.write(record(b"one"), record(b"two"))
        run.settle()
        places = run.owner.places[number]
    assert places == [(1, SEGMENT + HEADER), (1, SEGMENT + 2 * HEADER + 8)]
    data = (folder / "00000001.log").read_bytes()
    assert [data[at : at + 8] for _, at in places] == [record(b"one"), record(b"two")]


def test_commits_end_in_order_and_several_wake_the_loop_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as run:
        run.loop.run_until_complete(_nothing())
        woken = 0
        wake = run.loop.call_soon_threadsafe

        def counted(*arguments: Any, **keywords: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*arguments, **keywords)

        monkeypatch.setattr(run.loop, "call_soon_threadsafe", counted)
        for _ in range(50):
            run.write(record(b"x"))
        ended(run, 50)
        run.settle()
        assert woken == 1
    assert run.owner.log == [("written", i + 1) for i in range(50)]


def ended(run: Run, commits: int) -> None:
    """Wait until the thread has said so of this many, of which the loop, that stands still, has heard nothing."""
    end = time.monotonic() + 30
    while len(run.store._mailbox._calls) < commits:
        assert time.monotonic() < end
        time.sleep(0.005)


async def _nothing() -> None:
    return


def test_an_owner_that_raises_does_not_keep_others_from_hearing(folder: Path) -> None:
    class Angry(Owner):
        def written(self, number: int, places: list[tuple[int, int]]) -> None:
            super().written(number, places)
            if number == 1:
                raise RuntimeError("angry")

    with running(folder) as run:
        heard: list[str] = []
        run.loop.set_exception_handler(lambda _, context: heard.append(str(context["exception"])))
        run.store.owner = run.owner = Angry()
        run.loop.run_until_complete(_nothing())
        for _ in range(3):
            run.write(record(b"x"))
        ended(run, 3)  # all have when the loop looks, and nothing else will wake it
        run.settle()
        assert heard == ["angry"]
        assert len(run.owner.log) == 3


def test_close_finishes_what_is_queued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.store.journal.CLOSING", 60)  # a slow disk is another test's
    bodies = [record(b"%d" % i) for i in range(200)]
    run = Run(folder)
    for body in bodies:
        run.write(body)
    run.close()
    assert run.owner.log == [("written", i + 1) for i in range(200)]
    run.store.close()  # again is nothing
    assert bodies_in(folder) == bodies


def test_close_does_not_wait_for_a_disk_that_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """R-15: a stalled store does not keep the broker from ending."""
    monkeypatch.setattr("broker.store.journal.CLOSING", 0.2)
    hanging = threading.Event()
    run = Run(folder)
    real = os.write

    def write(fd: int, data: Any) -> int:
        hanging.wait(10)
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    run.write(record(b"x"))
    began = time.monotonic()
    run.store.close()
    took = time.monotonic() - began
    assert 0.15 < took < 8, "not until the disk answered"
    assert "did not answer" in caplog.text
    assert run.owner.log == []
    hanging.set()
    run.wait(lambda: run.owner.log == [("written", 1)])
    run.close()


def test_d10_files_are_the_owners_alone_under_any_umask(folder: Path) -> None:
    """D-10: 0600 and 0700 under umask 000, for everything the store ever makes."""
    before = os.umask(0)
    try:
        with running(folder) as run:
            for _ in range(13):
                run.write(record(bytes(700)))
            run.settle()
            run.store.drop(1)
        (folder / "00000002.log").write_bytes(b"")
        with running(folder, accept_loss=True):
            pass
        modes = {p.relative_to(folder.parent): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")}
        modes[folder.relative_to(folder.parent)] = stat.S_IMODE(folder.stat().st_mode)
    finally:
        os.umask(before)
    files = {str(path): mode for path, mode in modes.items() if (folder.parent / path).is_file()}
    folders = {str(path): mode for path, mode in modes.items() if (folder.parent / path).is_dir()}
    assert {"store/format", "store/range", "store/closed", "store/00000003.log", "store/damaged/00000002.log"} <= set(
        files
    )
    assert set(files.values()) == {0o600}
    assert folders == {"store": 0o700, "store/damaged": 0o700}


class Calls:
    """Counts calls of a function of `os` and goes on with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.count = 0
        self.last: tuple[Any, ...] = ()
        real = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            self.last = arguments
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)


def test_flush_writes_through_with_one_call_for_a_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Calls(monkeypatch, "open")
    with running(folder, segment_bytes=1 << 20) as run:
        assert opened.last[1] & os.O_DSYNC
        assert opened.last[1] & os.O_APPEND
        run.wait(lambda: True)
        writes, flushes = Calls(monkeypatch, "write"), Calls(monkeypatch, "fdatasync")
        for _ in range(5):
            run.write(*[record(bytes(1000))] * 10)
        run.settle()
        assert (writes.count, flushes.count) == (5, 0)


def test_interval_flushes_as_often_as_it_says_and_only_what_is_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in one segment: the end of one is a flush, too
    with running(folder, durability="interval", interval=0.1, segment_bytes=1 << 24) as run:
        flushes = Calls(monkeypatch, "fdatasync")
        began = time.monotonic()
        while time.monotonic() < began + 0.55 or not flushes.count:
            run.write(record(b"x"))
            run.settle()
        assert 1 <= flushes.count <= (time.monotonic() - began) / 0.1 + 1  # of hundreds of commits
        run.wait(lambda: run.store._writer._due is None)  # the last one of these
        quiet = flushes.count
        time.sleep(0.25)
        assert flushes.count == quiet
        run.write(record(b"y"))
        run.settle()
        run.wait(lambda: flushes.count == quiet + 1)


def test_interval_flushes_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder, durability="interval", interval=60) as run:
        flushes = Calls(monkeypatch, "fdatasync")
        run.write(record(b"x"))
        run.settle()
        assert flushes.count == 0
        run.store.close()
        assert flushes.count == 1


def test_none_flushes_only_when_a_segment_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a next segment exists is the proof that this one is on disk, so it must be."""
    with running(folder, durability="none") as run:
        flushes = Calls(monkeypatch, "fdatasync")
        for _ in range(6):
            run.write(record(bytes(700)))
        run.settle()
        assert flushes.count == 0
        run.write(record(b"in the next segment"))
        run.settle()
        assert flushes.count == 1


def test_frames_of_interval_vouch_only_for_what_was_flushed(folder: Path) -> None:
    """Without a flush between them a torn first commit is no damage; with `flush` it is."""
    for durability, damage in (("interval", 0), ("none", 0), ("flush", 1)):
        where = folder.with_name(durability)
        fill(where, record(b"first"), record(b"second"), durability=durability, interval=60)
        data = bytearray((where / "00000001.log").read_bytes())
        data[SEGMENT + HEADER] ^= 1
        (where / "00000001.log").write_bytes(data)
        with running(where) as run:
            assert run.bodies == [record(b"second")]
            assert len(run.recovered.damage) == damage


def read(run: Run, positions: list[int]) -> list[bytes | None]:
    found: list[list[bytes | None]] = []
    run.store.read(positions, found.append)
    run.wait(lambda: bool(found))
    return found[0]


def test_records_are_read_by_position_in_any_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK", 1000)
    monkeypatch.setattr(reader, "OPEN", 2)
    texts = [bytes([65 + i]) * (i * 97) for i in range(26)]
    with running(folder) as run:
        positions = []
        for i in range(0, 26, 2):
            number = run.write(record(texts[i]) + record(texts[i + 1]))
            run.settle()
            ((segment, at),) = run.owner.places[number]
            positions += [segment << 32 | at, segment << 32 | (at + 5 + len(texts[i]))]
        assert len({p >> 32 for p in positions}) > 3
        assert read(run, positions) == [record(t) for t in texts]
        assert read(run, positions[::-1]) == [record(t) for t in texts[::-1]]
        assert read(run, []) == []


def test_a_record_that_cannot_be_read_is_none_and_the_others_are_there(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(folder) as run:
        run.write(record(b"good"))
        run.settle()
        good = 1 << 32 | SEGMENT + HEADER
        absurd = 1 << 32 | SEGMENT + HEADER + 2  # the length found there leads far behind the end
        assert read(run, [good, 9 << 32 | 100, good, absurd, 1 << 32 | 1 << 20, good]) == [
            record(b"good"), None, record(b"good"), None, None, record(b"good")
        ]  # fmt: skip
        assert caplog.text.count("cannot be read") == 2


def test_an_error_of_the_disk_while_reading_costs_that_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as run:
        run.write(record(b"good"), record(b"bad!"))
        run.settle()
        monkeypatch.setattr(reader, "BLOCK", 9)
        real = os.pread

        def pread(fd: int, length: int, at: int) -> bytes:
            if at == SEGMENT + 2 * HEADER + 9:
                raise OSError(5, "Input/output error")
            return real(fd, length, at)

        monkeypatch.setattr(os, "pread", pread)
        first = 1 << 32 | SEGMENT + HEADER
        assert read(run, [first, first + HEADER + 9, first]) == [record(b"good"), None, record(b"good")]


def test_a_closed_segment_is_read_as_a_whole_without_what_is_damaged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(folder) as run:
        for i in range(8):
            run.write(record(bytes([i]) * 300) + record(b"%d" % i))
        run.settle()
        while len(run.store.sizes()) < 2:
            run.write(record(bytes(700)))
            run.settle()
        path = folder / "00000001.log"
        data = bytearray(path.read_bytes())
        second = run.owner.places[2][0][1]
        data[second + 10] ^= 1
        path.write_bytes(data)
        found: list[list[tuple[int, bytes]]] = []
        run.store.read_segment(1, found.append)
        run.store.read_segment(77, found.append)
        run.wait(lambda: len(found) == 2)
        assert found[1] == []
        assert "are damaged, 1 queue entry lost" in caplog.text
        kept = [i for i in range(8) if i != 1]
        assert found[0][:14] == [
            (1 << 32 | run.owner.places[i + 1][0][1] + at, what)
            for i in kept
            for at, what in ((0, record(bytes([i]) * 300)), (305, record(b"%d" % i)))
        ]


def segments_of(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("*.log"))


def test_the_oldest_segments_are_dropped_after_the_commits_before(folder: Path) -> None:
    with running(folder) as run:
        for i in range(20):
            run.write(record(bytes([i]) * 700))
        run.settle()
        assert segments_of(folder) == [1, 2, 3, 4]
        read(run, [1 << 32 | SEGMENT + HEADER])
        run.write(record(b"last"))
        run.store.drop(1)
        run.store.drop(2)
        run.store.drop(1)  # again is nothing
        assert sorted(run.store.sizes()) == [3, 4]
        run.settle()
        run.wait(lambda: segments_of(folder) == [3, 4])
        with pytest.raises(ValueError, match="being written"):
            run.store.drop(4)
        run.wait(lambda: not _held(folder / "00000001.log"))  # the reader has let go of it: the space is free
    with running(folder) as run:
        assert run.bodies == [record(bytes([i]) * 700) for i in range(12, 20)] + [record(b"last")]
        assert run.recovered.damage == []


def _held(path: Path) -> bool:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return f"{path} (deleted)" in names


def test_only_the_oldest_segment_is_dropped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(folder) as run:
        for _ in range(14):
            run.write(record(bytes(700)))
        run.settle()
        run.store.drop(2)
        run.wait(lambda: 2 in run.store.sizes())
        assert segments_of(folder) == [1, 2, 3]
        assert "the oldest is 1" in caplog.text


def test_a_store_takes_nothing_before_it_was_read(folder: Path) -> None:
    fill(folder, record(b"one"))
    run = Run(folder)
    store, recovered = open_it(folder, run.loop)
    frames = recovered.frames()
    next(frames)
    with pytest.raises(AssertionError, match="not been read"):
        store.write(1, [], 0)
    store.close()
    run.close()


def test_a_commit_without_frames_ends_in_its_turn(folder: Path) -> None:
    with running(folder) as run:
        run.write(record(b"one"))
        run.write()
        run.write(record(b"two"))
    assert run.owner.log == [("written", 1), ("written", 2), ("written", 3)]
    assert run.owner.places[2] == []
    assert bodies_in(folder) == [record(b"one"), record(b"two")]
