"""What runs once per packet is compiled: DESIGN's bound on Python-level calls."""

from __future__ import annotations

import pytest

from tests.benchmarks import calls
from tests.build import compiled


def test_a_thousand_messages_cause_at_most_twenty_python_calls() -> None:
    built, listed = compiled()
    if built != listed:
        pytest.skip("interpreted: the bound is the compiled build's")
    assert calls.count() <= 20


def test_the_count_sees_what_runs_once_per_read() -> None:
    """A count of zero would prove nothing: interpreted, reading, parsing and flushing are all Python calls."""
    built, _ = compiled()
    if built:
        pytest.skip("compiled code is not seen, by intention")
    seen = {name.rpartition("/")[2] for name in calls.profile()}
    assert {"channel.py:feed", "outbox.py:flush"} <= seen
