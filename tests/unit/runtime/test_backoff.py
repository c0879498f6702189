"""Waits between tries."""

from __future__ import annotations

import pytest

from broker.runtime.backoff import Backoff, FullJitter


def test_decorrelated_waits_stay_between_base_and_cap_and_grow_from_the_wait_before() -> None:
    asked: list[tuple[float, float]] = []

    def highest(low: float, high: float) -> float:
        asked.append((low, high))
        return high

    wait = Backoff(1, 30, highest)
    assert [wait.next() for _ in range(5)] == [3, 9, 27, 30, 30]
    assert asked[-1] == (1, 90)
    wait.reset()
    assert wait.next() == 3


def test_b16_a_hundred_bridges_to_a_dead_host_make_at_most_five_attempts_a_second() -> None:  # B-16
    waits = [Backoff(1, 60) for _ in range(100)]
    due = [wait.next() for wait in waits]
    attempts = 0
    for i, wait in enumerate(waits):
        while due[i] < 660:  # the first minute spreads them
            attempts += due[i] >= 60
            due[i] += wait.next()
    assert attempts / 600 <= 5
    assert len(set(due)) == 100


def test_full_jitter_draws_between_zero_and_a_bound_that_doubles_to_the_cap() -> None:
    """S-18: what a sink waits before it tries again."""
    bounds: list[float] = []

    def note(low: float, high: float) -> float:
        assert low == 0
        bounds.append(high)
        return high

    wait = FullJitter(0.1, 30, note)
    for _ in range(10):
        wait.next()
    assert bounds[:3] == [0.1, 0.2, 0.4]
    assert bounds[-1] == 30
    wait.reset()
    wait.next()
    assert bounds[-1] == 0.1


@pytest.mark.parametrize("kind", [Backoff, FullJitter])
@pytest.mark.parametrize(("base", "cap"), [(0, 1), (2, 1), (-1, 1)])
def test_impossible_times_are_refused(kind: type[Backoff] | type[FullJitter], base: float, cap: float) -> None:
    with pytest.raises(ValueError, match="base"):
        kind(base, cap)
