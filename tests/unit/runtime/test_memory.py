"""R-06: what a broker does as its memory runs out."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from broker.runtime import memory
from broker.runtime.memory import BUSY, CALM, FULL, MemoryWatch


def test_r06_levels_rise_at_80_and_95_percent_and_fall_five_points_below(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = MemoryWatch(1000)
    seen = []
    for used in (500, 799, 801, 949, 951, 920, 899, 780, 749):
        monkeypatch.setattr(memory, "resident", lambda used=used: used)
        seen.append(watch.look())
    assert seen == [CALM, CALM, BUSY, BUSY, FULL, FULL, BUSY, BUSY, CALM]


def test_without_a_limit_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "group_limit", lambda: 0)
    monkeypatch.setattr(memory, "resident", lambda: 1 << 60)
    assert MemoryWatch(0).look() == CALM


def test_memory_in_use_is_that_of_this_process() -> None:
    before = memory.resident()
    with mmap.mmap(-1, 64 << 20) as kept:  # never pages that were freed before
        for at in range(0, len(kept), 4096):
            kept[at] = 1
        assert memory.resident() - before > 50 << 20


def groups(tmp_path: Path, membership: str, **limits: str) -> int:
    """`limits`: file below the mount, with ``__`` for ``/`` -> its text."""
    mount, said = tmp_path / "cgroup", tmp_path / "membership"
    said.write_text(membership)
    for name, text in limits.items():
        path = mount / name.replace("__", "/")
        path = path.parent / path.name.replace("memory_", "memory.", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return memory.group_limit(mount, said)


def test_a_service_has_the_least_limit_of_its_group_and_those_above(tmp_path: Path) -> None:
    limits = {"system__isthmus__memory_max": "max", "system__memory_max": "268435456"}
    assert groups(tmp_path, "0::/system/isthmus\n", **limits) == 268435456
    limits["system__isthmus__memory_max"] = "134217728"
    assert groups(tmp_path, "0::/system/isthmus\n", **limits) == 134217728


def test_in_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/\n", memory_max="1048576") == 1048576
    assert groups(tmp_path, "0::/../elsewhere\n", memory_max="1048576") == 1048576


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    membership = "5:cpu,cpuacct:/a\n4:memory:/a/b\n"
    assert groups(tmp_path, membership, memory__a__b__memory_limit_in_bytes="1048576") == 1048576
    assert groups(tmp_path, membership, memory__a__b__memory_limit_in_bytes="9223372036854771712") == 0


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory.group_limit(tmp_path, tmp_path / "absent") == 0
