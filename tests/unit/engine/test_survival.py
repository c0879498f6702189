"""Random programs against the ledger of `survival.py`: whatever happens in whatever order, promises are kept."""

from __future__ import annotations

import random

import pytest

from broker.engine import backlog, compaction, journal, session, spool
from tests.unit.engine.survival import World

PROGRAMS = 320
STEPS = 60


@pytest.mark.parametrize("first", range(0, PROGRAMS, 20))
def test_promises_are_kept_whatever_happens(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """D-01, D-02, D-03, D-05, D-06, D-12, D-13, D-25, P-57, P-79: crashes, failing and torn commits, take-overs,
    expiries, groups and instances in random order; what is usually counted in thousands is so small that it happens at
    once."""
    for seed in range(first, first + 20):
        run(monkeypatch, seed)


def run(monkeypatch: pytest.MonkeyPatch, seed: int, steps: int = STEPS) -> None:
    """One program; its failure names the seed."""
    sizes = random.Random(-seed - 1)
    monkeypatch.setattr(compaction, "KEEP", sizes.choice((1000, 3000, 1 << 30)))
    monkeypatch.setattr(compaction, "SLICE", sizes.choice((1, 3, 400)))
    monkeypatch.setattr(journal, "FRAME", sizes.choice((100, 500, 262_144)))
    in_memory, load = sizes.choice(((2, 1), (4, 2), (512, 256)))
    for module in (spool, session):
        monkeypatch.setattr(module, "IN_MEMORY", in_memory)
        monkeypatch.setattr(module, "LOAD", load)
    monkeypatch.setattr(backlog, "CHUNK", sizes.choice((2, 16_384)))
    try:
        World(seed).run(steps)
    except Exception as error:
        raise AssertionError(f"program {seed} failed") from error
