"""R-06: what a broker does as its memory runs out."""

from __future__ import annotations

import mmap

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
