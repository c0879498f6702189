"""A copy of the store while it is written (D-20)."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.extend.store import BackupFailed
from broker.store import inspect, segments
from broker.store.backup import Copied
from tests.unit.store.parts import Run, bodies_in, record, running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def backup(run: Run, target: Path) -> Copied:
    return run.loop.run_until_complete(run.store.backup(target))


def body(number: int) -> bytes:
    return record(b"%06d" % number + bytes(700))


class Paused:
    """A function that waits on its first call until it may go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.reached = threading.Event()
        self.go = threading.Event()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(10)
        return self.function(*arguments, **keywords)


@pytest.mark.parametrize("links", [True, False])
def test_d20_what_was_written_before_is_in_the_copy(
    folder: Path, target: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-20: also on another disk, where nothing can be linked; it is what a clean stop would have left."""
    if not links:

        def refuse(*_: Any) -> None:
            raise OSError(errno.EXDEV, "another disk")

        monkeypatch.setattr(os, "link", refuse)
    bodies = [body(i) for i in range(20)]
    with running(folder) as run:
        for one in bodies:
            run.write(one)
        copied = backup(run, target)
        for i in range(20, 30):
            run.write(body(i))
        run.settle()
    assert copied.segments == 4
    assert copied.linked == (3 if links else 0)
    assert copied.bytes == sum(path.stat().st_size for path in target.rglob("*.log"))
    report = inspect.check(target / "store")
    assert report.clean
    assert not report.torn
    assert segments.read_closed(target / "store") is not None
    assert {stat.S_IMODE(p.stat().st_mode) for p in target.rglob("*") if p.is_file()} == {0o600}
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((target / "store").stat().st_mode) == 0o700
    assert bodies_in(target / "store") == bodies
    assert bodies_in(folder) == [body(i) for i in range(30)]


def test_d20_nothing_goes_away_while_it_is_copied_and_everything_afterwards(
    folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-20: segments that are dropped meanwhile are in the copy; in the store they go when it is made."""
    paused = Paused(os.link)
    monkeypatch.setattr(os, "link", paused)
    with running(folder) as run:
        for i in range(20):
            run.write(body(i))
        run.settle()
        made = run.loop.create_task(run.store.backup(target))
        run.wait(paused.reached.is_set)
        run.store.drop(1)
        run.store.drop(2)
        run.write(body(20))
        run.settle()
        assert set(run.store.sizes()) == {3, 4}
        assert segments.numbers(folder) == [1, 2, 3, 4]
        paused.go.set()
        run.loop.run_until_complete(made)
        run.wait(lambda: segments.numbers(folder) == [3, 4])
        run.store.drop(3)
        run.wait(lambda: segments.numbers(folder) == [4])
    assert bodies_in(target / "store") == [body(i) for i in range(20)]


def test_d20_a_second_one_at_the_same_time_and_one_into_a_full_folder_are_refused(
    folder: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-20"""
    paused = Paused(segments.write_closed)
    monkeypatch.setattr(segments, "write_closed", paused)
    with running(folder) as run:
        run.write(body(1))
        first = run.loop.create_task(run.store.backup(target))
        run.wait(paused.reached.is_set)
        with pytest.raises(BackupFailed, match="another backup"):
            backup(run, tmp_path / "second")
        paused.go.set()
        run.loop.run_until_complete(first)
        before = sorted(target.rglob("*"))
        for wrong, why in (
            (target, "there is something in this folder"),
            (folder / "inside", "inside the store"),
            (tmp_path / "no" / "parent", "No such file or directory"),
            (target / "store" / "format", "Not a directory"),
        ):
            with pytest.raises(BackupFailed, match=why):
                backup(run, wrong)
        assert sorted(target.rglob("*")) == before
        assert not (tmp_path / "second").exists()
        (tmp_path / "second").mkdir()
        assert backup(run, tmp_path / "second").segments == 1


@pytest.mark.parametrize("call", ["link", "write", "fsync", "rename"])
def test_d20_a_backup_that_fails_leaves_no_store_behind_and_the_store_goes_on(
    folder: Path, target: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-20: half a copy is never taken for one."""
    real = getattr(os, call)
    with running(folder) as run:
        for i in range(10):
            run.write(body(i))
        run.settle()

        def fail(*arguments: Any, **keywords: Any) -> Any:
            if threading.current_thread().name == "store-backup":
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(BackupFailed, match="Input/output error"):
            backup(run, target)
        monkeypatch.setattr(os, call, real)
        assert list(target.glob("*")) == []
        run.store.drop(1)
        run.wait(lambda: 1 not in segments.numbers(folder))
        assert backup(run, target).segments == 1
    assert bodies_in(target / "store") == bodies_in(folder)


def test_d20_a_stop_ends_a_backup(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-20: whoever asked for it is told, and nothing of it is left."""
    paused = Paused(os.link)
    monkeypatch.setattr(os, "link", paused)
    run = Run(folder)
    for i in range(10):
        run.write(body(i))
    made = run.loop.create_task(run.store.backup(target))
    run.wait(paused.reached.is_set)
    run.store.close()
    paused.go.set()
    with pytest.raises(BackupFailed, match="the broker stops"):
        run.loop.run_until_complete(asyncio.wait_for(made, 5))
    assert list(target.glob("*")) == []
    run.close()
    assert bodies_in(folder) == [body(i) for i in range(10)]


def test_mending_the_store_leaves_a_copy_that_shares_its_segments_alone(folder: Path, target: Path) -> None:
    with running(folder) as run:
        for i in range(10):
            run.write(body(i))
        run.settle()
        place = run.owner.places[2][0][1]
        backup(run, target)
    shared = segments.segment_path(target / "store", 1)
    raw = bytearray(shared.read_bytes())
    raw[place + 20] ^= 1
    shared.write_bytes(raw)
    with running(folder, accept_loss=True) as run:
        assert run.recovered.lost == 1
    assert shared.read_bytes() == raw
    assert segments.segment_path(folder, 1).read_bytes() != raw
