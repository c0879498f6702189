"""Folders of older releases, brought up to date with a step the test brings along."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest

from broker.store import migrate
from broker.store.errors import StoreTooNew, StoreUnusable
from broker.store.inspect import check
from tests.unit.store.parts import Kills, bodies_in, fill, record, running

BODIES = [record(bytes([i]) * 700) for i in range(8)]


def older(folder: Path) -> None:
    """A store in the layout of a release that never was: version 0 called its segments otherwise."""
    fill(folder, *BODIES)
    for path in sorted(folder.glob("*.log")):
        path.rename(path.with_suffix(".segment"))
    salt = json.loads((folder / "format").read_text())["salt"]
    (folder / "format").write_text(json.dumps({"version": 0, "salt": salt}))


def step(folder: Path) -> None:
    for path in sorted(folder.glob("*.segment")):
        path.rename(path.with_suffix(".log"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    older(data / "store")
    return data


@pytest.fixture(autouse=True)
def _way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "STEPS", {0: step})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_d09_an_older_store_is_migrated_and_kept(data: Path) -> None:
    """D-09"""
    before = contents(data / "store")
    with pytest.raises(StoreUnusable, match=r"has version 0; the next start brings it to 1"):
        check(data / "store")
    assert bodies_in(data / "store") == BODIES
    assert sorted(p.name for p in data.iterdir()) == ["store", "store.v0"]
    assert contents(data / "store.v0") == before
    assert check(data / "store").damage == []
    assert {stat.S_IMODE(p.stat().st_mode) for p in (data / "store").iterdir()} == {0o600}


def test_d09_killed_anywhere_in_a_migration_the_next_start_ends_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-09: at every call that changes something, the old store or the whole new one is there."""
    before = contents(data / "store")
    kills = Kills(monkeypatch, data, tmp_path / "states")
    migrate.migrate(data / "store")
    states = kills.stop()
    assert len(states) > 20
    between = [state for state in states if not (state / "store").exists()]
    assert between
    for state in states:
        assert bodies_in(state / "store") == BODIES
        assert sorted(p.name for p in state.iterdir()) == ["store", "store.v0"]
        assert contents(state / "store.v0") == before
        with running(state / "store") as run:
            run.write(record(b"more"))
        assert bodies_in(state / "store") == [*BODIES, record(b"more")]


def test_d09_a_step_that_fails_leaves_the_old_store(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-09: half of a copy is never taken for a store, also when the old one is deleted."""

    def fails(folder: Path) -> None:
        (folder / "00000001.segment").unlink()
        raise OSError(28, "No space left on device")

    before = contents(data / "store")
    monkeypatch.setattr(migrate, "STEPS", {0: fails})
    with pytest.raises(OSError, match="No space"):
        running(data / "store").__enter__()
    assert contents(data / "store") == before
    shutil.copytree(data, data.with_name("again"))
    monkeypatch.setattr(migrate, "STEPS", {0: step})
    assert bodies_in(data / "store") == BODIES
    shutil.rmtree(data.with_name("again") / "store")
    assert bodies_in(data.with_name("again") / "store") == []


def test_d09_a_second_migration_keeps_both_old_stores(data: Path) -> None:
    """D-09: after a downgrade."""
    assert bodies_in(data / "store") == BODIES
    shutil.rmtree(data / "store")
    older(data / "store")
    assert bodies_in(data / "store") == BODIES
    assert sorted(p.name for p in data.iterdir()) == ["store", "store.v0", "store.v0-2"]


def test_d09_a_version_without_a_way_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-09"""
    before = contents(data / "store")
    monkeypatch.setattr(migrate, "STEPS", {})
    with pytest.raises(StoreUnusable, match="version 0 and this release cannot read it"):
        running(data / "store").__enter__()
    assert contents(data / "store") == before


def test_d09_a_newer_store_is_not_migrated(data: Path) -> None:
    """D-09"""
    (data / "store" / "format").write_text('{"version": 3}')
    with pytest.raises(StoreTooNew):
        migrate.migrate(data / "store")
    assert sorted(p.name for p in data.iterdir()) == ["store"]
