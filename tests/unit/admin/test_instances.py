"""What is told about instances: the average of a throughput, and losses added up."""

from __future__ import annotations

import asyncio
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from broker.admin import instances
from broker.admin.instances import QUIET, WINDOW, Instances, Losses, Throughput, merged


def test_a_throughput_is_the_average_of_the_last_looks() -> None:
    throughput = Throughput()
    assert throughput.rate("a") == 0.0
    throughput.look(100.0, {"a": 1_000})
    assert throughput.rate("a") == 0.0
    throughput.look(102.0, {"a": 1_400})
    assert throughput.rate("a") == 200.0
    for second in range(WINDOW):
        throughput.look(103.0 + second, {"a": 1_400})
    assert throughput.rate("a") == 0.0, "what is long past does not count"


def test_a_counter_that_starts_anew_starts_a_new_average() -> None:
    throughput = Throughput()
    for now, count in ((1.0, 5_000), (2.0, 6_000), (3.0, 0)):
        throughput.look(now, {"a": count})
    assert throughput.rate("a") == 0.0
    throughput.look(4.0, {"a": 70})
    assert throughput.rate("a") == 70.0


def test_an_instance_that_went_is_forgotten() -> None:
    throughput = Throughput()
    throughput.look(1.0, {"a": 1, "b": 1})
    throughput.look(2.0, {"b": 2})
    throughput.look(3.0, {"a": 9, "b": 3})
    assert (throughput.rate("a"), throughput.rate("b")) == (0.0, 1.0)


def test_losses_are_added_up_by_reason() -> None:
    assert merged([{"expired": 1, "full": 2}, None, {"full": 3}]) == {"expired": 1, "full": 5}


def test_s05_a_queue_that_begins_to_lose_is_told_once_and_how_much_when_it_has_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """S-05."""
    losses = Losses()
    for count in (0, 0, 3, 5, 5, 9):
        losses.look({"sinks.a": count, "sinks.b": 0})
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["sinks.a: its queue is full"]
    for _ in range(2 * QUIET):
        losses.look({"sinks.a": 9, "sinks.b": 0})
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "sinks.a: 9 messages were dropped or refused, none for a while"
    ]
    losses.look({"sinks.a": 10, "sinks.b": 0})
    assert len(caplog.records) == 3
    losses.look({"sinks.b": 0})
    losses.look({"sinks.a": 1, "sinks.b": 0})
    assert len(caplog.records) == 4, "removed and made anew, it begins anew"


async def test_counters_are_looked_at_every_second_until_the_broker_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "EVERY", 0.01)
    looks = 0

    class Supervisor:
        def status(self) -> dict[str, Any]:
            nonlocal looks
            looks += 1
            return {"sinks": {}, "bridges": {}}

    watched = Instances(SimpleNamespace(supervisor=Supervisor()))
    gone = weakref.ref(watched)
    async with asyncio.timeout(5):
        while looks < 3:  # noqa: ASYNC110 - the watched object knows no event
            await asyncio.sleep(0.005)
    del watched
    gc.collect()
    await asyncio.sleep(0.03)
    assert gone() is None
    seen = looks
    await asyncio.sleep(0.05)
    assert looks == seen
