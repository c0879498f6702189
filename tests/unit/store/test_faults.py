"""A disk that is full, fails or hangs: what is acknowledged, what is refused, and what a later start finds."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.extend.store import StoreError
from broker.store import journal, segments
from broker.store.disk import DiskWatch, Space
from broker.store.frames import HEADER, SEGMENT
from broker.store.inspect import check
from tests.unit.store.parts import Run, bodies_in, record, running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LOOK", 0.02)


class Fault:
    """Makes functions of `os` fail: the `nth` call, and with `lasting` all after it, while `on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, *names: str, nth: int = 1, lasting: bool = True):
        self.on = True
        self.calls = 0
        self.failed = 0
        self._code = code
        self._nth = nth
        self._lasting = lasting
        for name in names:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), name))

    def _failing(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.on:
                self.calls += 1
                if self.calls == self._nth or (self._lasting and self.calls > self._nth):
                    self.failed += 1
                    if name == "write" and len(arguments[1]) > 30:  # some of it still finds its place
                        function(arguments[0], bytes(arguments[1][:30]))
                    raise OSError(self._code, os.strerror(self._code))
            return function(*arguments, **keywords)

        return call


def refuses(run: Run, word: str) -> None:
    run.wait(lambda: run.store.refusing == word)


# no space -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True, timeout=10)


@pytest.mark.parametrize("durability", ["flush", "interval"])
def test_d06_a_full_disk_refuses_and_recovers(small_disk: Path, durability: str) -> None:
    """D-06: on a real file system; nothing acknowledged is missing, nothing refused is there, the store is intact."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_400_000))
    folder = small_disk / "store"
    bodies = [record(bytes([i]) * 60_000) for i in range(20)]
    with running(folder, durability=durability, segment_bytes=200_000) as run:
        for body in bodies:
            run.write(body)
        run.settle()
        ended = dict((number, kind) for kind, number in run.owner.log)
        assert set(ended.values()) == {"written", "failed"}
        assert all(error.full for error in run.owner.errors.values())
        assert run.store.refusing == "full"
        assert sum(p.stat().st_size for p in folder.glob("*.log")) == sum(run.store.sizes().values())
        safe = [body for i, body in enumerate(bodies) if ended[i + 1] == "written"]
        ballast.unlink()
        refuses(run, "")
        number = run.write(bodies[-1])
        run.settle()
        assert run.owner.log[-1] == ("written", number)
    assert bodies_in(folder) == [*safe, bodies[-1]]
    assert check(folder).damage == []


def test_d06_a_store_on_a_disk_without_any_space_opens_and_can_be_emptied(small_disk: Path) -> None:
    """D-06: started again while the disk is full; dropping what nobody needs makes the space."""
    folder = small_disk / "store"
    with running(folder, segment_bytes=200_000) as run:
        for i in range(40):
            run.write(record(bytes([i]) * 60_000))
        run.settle()
        assert run.store.refusing == "full"
    safe = sum(kind == "written" for kind, _ in run.owner.log)
    ballast = os.open(small_disk / "ballast", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        fill_up(ballast)
    os.close(ballast)
    with running(folder, segment_bytes=200_000) as run:
        assert len(run.bodies) == safe
        run.write(record(bytes(60_000)))
        refuses(run, "full")
        run.settle()
        for segment in sorted(run.store.sizes())[:-1]:
            run.store.drop(segment)
        refuses(run, "")
        run.write(record(b"there is space"))
        run.settle()
        assert run.owner.log[-1][0] == "written"
    assert bodies_in(folder)[-1] == record(b"there is space")


def test_d06_a_segment_is_dropped_although_no_file_can_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-06: to drop makes space, so it must not need any."""
    bodies = [record(bytes([i]) * 700) for i in range(8)]
    with running(folder) as run:
        for body in bodies:
            run.write(body)
        run.settle()
        with monkeypatch.context() as patched:
            fault = Fault(patched, errno.ENOSPC, "write")
            run.store.drop(1)
            run.wait(lambda: not (folder / "00000001.log").exists())
            assert fault.failed == 1
    (folder / "closed").unlink()
    assert bodies_in(folder) == bodies[6:]


def fill_up(fd: int) -> None:
    for _ in range(1000):
        os.write(fd, bytes(4096))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_d06_commits_queued_behind_one_without_space_fail_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """D-06: nothing behind it is written in front of it; the operator gets one line, and one when it is over."""
    with running(folder) as run:
        run.write(record(b"safe"))
        run.settle()
        fault = Fault(monkeypatch, code, "write")
        for _ in range(3):
            run.write(record(b"lost"))
        run.settle()
        assert run.owner.log[1:] == [("failed", 2), ("failed", 3), ("failed", 4)]
        assert fault.failed >= 1
        assert (folder / "00000001.log").stat().st_size == SEGMENT + HEADER + 9
        run.wait(lambda: fault.failed > 4)  # probes
        assert run.store.refusing == "full"
        fault.on = False
        refuses(run, "")
        run.write(record(b"again"))
    assert bodies_in(folder) == [record(b"safe"), record(b"again")]
    assert sum("refused until there is some" in r.message for r in caplog.records) == 1
    assert sum("messages are taken again" in r.message for r in caplog.records) == 1
    assert not (folder / "probe.new").exists()


def through(run: Run, bodies: list[bytes]) -> list[bytes]:
    """Write like the engine: one commit after the other, again after a refusal. Returns what was acknowledged."""
    safe = []
    for i, body in enumerate(bodies):
        for _ in range(3):
            run.write(body)
            run.settle()
            if run.owner.log[-1][0] == "written":
                safe.append(body)
                break
            if run.store.refusing == "failed":
                return safe
            refuses(run, "")
        if i == len(bodies) - 2:
            run.store.drop(1)
    return safe


SITES = ("write", "fsync", "open", "replace", "unlink")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("durability", ["flush", "interval"])
def test_d06_no_space_at_every_call_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    """D-06: the n-th call that could want space finds none, for every n of a run that begins segments and drops one."""
    bodies = [record(bytes([i]) * 1500) for i in range(9)]
    hits = 0
    for nth in range(1, 200):
        where = folder.with_name(f"store{nth}")
        with monkeypatch.context() as patched, running(where, durability=durability, interval=60) as run:
            fault = Fault(patched, errno.ENOSPC, *SITES, nth=nth, lasting=False)
            assert through(run, bodies) == bodies
            assert run.store.refusing == ""
            run.store.close()
            fault.on = False
        hits += fault.failed
        with running(where) as run:
            assert [body for body in bodies if body in run.bodies] == run.bodies
            assert run.bodies[-6:] == bodies[-6:]
            assert run.recovered.damage == []
        assert check(where).damage == []
        if not fault.failed:
            break
    assert not fault.failed
    assert hits == nth - 1 > 15


def test_what_cannot_be_cut_off_ends_the_segment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the failed commit stays in the file; neither it nor what follows it is mistaken for anything."""
    with running(folder) as run:
        run.write(record(b"safe"))
        run.settle()
        with monkeypatch.context() as patched:
            fault = Fault(patched, errno.ENOSPC, "write", lasting=False)
            cut = Fault(patched, errno.EIO, "ftruncate")
            run.write(record(bytes(100)))
            run.settle()
            refuses(run, "")
            run.write(record(b"next"))
            run.settle()
        assert (fault.failed, cut.failed) == (1, 2)
        assert run.owner.places[3][0][0] == 2
    assert (folder / "00000001.log").stat().st_size == SEGMENT + HEADER + 9 + 30
    assert bodies_in(folder) == [record(b"safe"), record(b"next")]
    report = check(folder)
    assert (report.damage, report.torn) == ([], 0)


def test_a_segment_that_may_have_a_successor_takes_nothing_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next segment was made and says how long this one is, then making it failed: what would be appended here now
    would not count."""
    with running(folder) as run:
        run.write(record(b"safe"))
        run.settle()
        with monkeypatch.context() as patched:
            Fault(patched, errno.ENOSPC, "write", lasting=False)
            cut = Fault(patched, errno.EIO, "ftruncate")
            after = Fault(patched, errno.ENOSPC, "open")
            after.on = False
            made = segments.create_segment

            def create(*arguments: Any) -> None:
                made(*arguments)
                after.on = cut.on
                cut.on = False

            patched.setattr(segments, "create_segment", create)
            run.write(record(bytes(100)))
            run.settle()
            run.wait(lambda: after.failed > 2)
            after.on = False
            refuses(run, "")
            run.write(record(b"next"))
            run.settle()
    assert bodies_in(folder) == [record(b"safe"), record(b"next")]


# errors -------------------------------------------------------------------------------------------------------


def test_d05_a_failed_write_is_never_acknowledged_and_never_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D-05: one error, although the next write would succeed; it is said once, with what to do."""
    with running(folder) as run:
        run.write(record(b"safe"))
        run.settle()
        with monkeypatch.context() as patched:
            fault = Fault(patched, errno.EIO, "write", lasting=False)
            for _ in range(4):
                run.write(record(b"lost"))
            run.settle()
            refuses(run, "failed")
            calls = fault.calls
            run.loop.run_until_complete(_while(0.2))
            run.write(record(b"lost"))
            run.settle()
            assert fault.calls == calls
        assert run.store.refusing == "failed"
        assert [kind for kind, _ in run.owner.log] == ["written"] + ["failed"] * 5
        error = run.owner.errors[2]
        assert isinstance(error, StoreError)
        assert not error.full
        assert "Input/output error" in str(error)
    lines = [r.message for r in caplog.records if "cannot write any more" in r.message]
    assert len(lines) == 1
    assert "stop the broker, run isthmus store check" in lines[0]
    assert bodies_in(folder) == [record(b"safe")]


async def _while(seconds: float) -> None:
    await asyncio.sleep(seconds)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_d05_a_failed_flush_ends_writing_though_nobody_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """D-05: also when it fails for lack of space: what was written before it may be gone."""
    with running(folder, durability="interval", interval=0.05) as run:
        with monkeypatch.context() as patched:
            fault = Fault(patched, code, "fdatasync", lasting=False)
            run.write(record(b"handed over"))
            refuses(run, "failed")
            assert fault.failed == 1
        run.write(record(b"later"))
        run.settle()
        assert run.owner.log == [("written", 1), ("failed", 2)]
        run.store.close()
        assert not (folder / "closed").exists()


@pytest.mark.timeout(300)
def test_an_error_at_every_call_in_turn_loses_nothing_acknowledged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-05: the n-th call fails, for every n of a run that begins segments and drops one."""
    bodies = [record(bytes([i]) * 1500) for i in range(9)]
    hits = failures = 0
    for nth in range(1, 200):
        where = folder.with_name(f"store{nth}")
        with monkeypatch.context() as patched, running(where) as run:
            fault = Fault(patched, errno.EIO, *SITES, nth=nth, lasting=False)
            safe = through(run, bodies)
            run.store.close()
            fault.on = False
        hits += fault.failed
        failures += run.store.refusing == "failed"
        with running(where) as run:
            dropped = bodies.index(run.bodies[0]) if run.bodies else 0
            assert run.bodies == bodies[dropped : len(safe)]
            assert dropped in (0, 3)
            assert run.recovered.damage == []
        assert check(where).damage == []
        if not fault.failed:
            break
    assert not fault.failed
    assert hits == nth - 1 > 15
    assert failures > 10


def test_a_write_that_takes_only_some_is_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with running(folder) as run:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:7])))
            run.write(record(b"a" * 50), record(b"b" * 50))
            run.settle()
        run.write(record(b"c"))
    assert bodies_in(folder) == [record(b"a" * 50), record(b"b" * 50), record(b"c")]


def test_a_segment_is_kept_when_a_commit_before_its_drop_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was copied forward is not on disk, so the original must stay."""
    with running(folder) as run:
        for i in range(8):
            run.write(record(bytes([i]) * 700))
        run.settle()
        fault = Fault(monkeypatch, errno.ENOSPC, "write", lasting=False)
        run.write(record(b"a copy of what is in segment 1"))
        run.store.drop(1)
        assert 1 not in run.store.sizes()
        run.settle()
        run.wait(lambda: 1 in run.store.sizes())
        assert fault.failed == 1
        assert "00000001.log is kept: a commit failed meanwhile" in caplog.text
        assert (folder / "00000001.log").exists()
        refuses(run, "")
        run.write(record(b"the copy again"))
        run.store.drop(1)
        run.settle()
        run.wait(lambda: not (folder / "00000001.log").exists())


def test_a_segment_that_cannot_be_read_now_is_not_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short of descriptors, say: what should have been copied out of it is still there at the next start."""
    bodies = [record(bytes([i]) * 700) for i in range(14)]
    with running(folder) as run:
        for body in bodies:
            run.write(body)
        run.settle()
        found: list[Any] = []
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", _no_descriptors)
            run.store.read_segment(1, found.append)
            run.wait(lambda: found == [[]])
        for _ in range(2):
            run.store.drop(1)
            run.store.drop(2)
        assert sorted(run.store.sizes()) == [1, 2, 3]
    assert bodies_in(folder) == bodies


def _no_descriptors(*arguments: Any, **keywords: Any) -> int:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_commit_that_cannot_be_built_is_answered(folder: Path) -> None:
    with running(folder) as run:
        run.store.write(1, [(None, 0)], 0)  # type: ignore[list-item]
        run.wait(lambda: run.owner.log == [("failed", 1)])
        assert run.store.refusing == "failed"


# the watch ----------------------------------------------------------------------------------------------------


class Disk:
    """Says how much space there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
        self.total = total
        self.free = free
        self.gone = False
        monkeypatch.setattr(os, "statvfs", self._statvfs)

    def _statvfs(self, path: Any) -> os.statvfs_result:
        if self.gone:
            raise OSError(errno.EIO, "gone")
        blocks, free = self.total // 4096, self.free // 4096
        return os.statvfs_result((4096, 4096, blocks, free + 1000, free, 0, 0, 0, 0, 255))


GIB = 1 << 30


def test_d07_the_disk_is_watched_with_one_line_for_each_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D-07: a warning at three times the limit, an alarm below it, and when it is over."""
    caplog.set_level("INFO")
    disk = Disk(monkeypatch, 100 * GIB, 50 * GIB)
    watch = DiskWatch(tmp_path, GIB)
    expected = [
        (50, Space.PLENTY, ""),
        (3, Space.PLENTY, ""),
        (2.9, Space.LOW, "below 1024 new messages"),
        (1, Space.LOW, ""),
        (0.9, Space.SHORT, "refused until there is more"),
        (0.1, Space.SHORT, ""),
        (1.5, Space.LOW, "taken again"),
        (2.5, Space.LOW, ""),
        (3.5, Space.PLENTY, "are enough"),
    ]
    for free, space, line in expected:
        disk.free = int(free * GIB)
        caplog.clear()
        assert watch.look() is space
        assert watch.look() is space
        assert len(caplog.records) == bool(line), free
        assert line in caplog.text
    disk.gone = True
    assert watch.look() is Space.PLENTY


def test_d07_the_limit_is_never_more_than_a_twentieth_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-07: a small disk is not full from the start."""
    share = 25_000 * 4096
    disk = Disk(monkeypatch, 20 * share, share)
    watch = DiskWatch(tmp_path, GIB)
    assert watch.look() is Space.LOW
    disk.free -= 4096
    assert watch.look() is Space.SHORT


def test_d07_below_the_limit_new_messages_are_refused_while_the_store_itself_still_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-07: what makes space (acknowledgements, copies, drops) needs to be written."""
    disk = Disk(monkeypatch, 100 * GIB, 50 * GIB)
    with running(folder, min_free=GIB) as run:
        run.loop.run_until_complete(_while(0.05))
        assert run.store.refusing == ""
        disk.free = GIB // 2
        refuses(run, "full")
        run.write(record(b"an acknowledgement"))
        run.settle()
        assert run.owner.log == [("written", 1)]
        disk.free = GIB
        refuses(run, "")
