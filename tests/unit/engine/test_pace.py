"""Long queues that come back from disk beside live traffic: who gets how much of the loop."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from broker.engine.pace import SHARE, WHOLE, Pace
from broker.engine.spool import LOAD
from tests.unit.engine import parts
from tests.unit.engine.parts import PUBACK, ack
from tests.unit.engine.stores import StoredBench
from tests.unit.engine.test_journal import subscribed

TICK = 0.25
LIVE = 1e-6
"""Seconds of the loop for a live message."""
DRAINED = WHOLE * 2e-6
"""Seconds for one from disk, of which the pace sees 2 µs."""


class Loop:
    """A loop that has a second a second for live messages and for those from disk, which get what they can."""

    def __init__(self) -> None:
        self.core = SimpleNamespace(received=0, sent=0)
        self.now = self.used = 0.0
        self.pace = Pace(self.core, self.call_later, lambda: (self.used, 0.0), lambda: self.now)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        raise AssertionError("nobody waits here")

    def tick(self, live: float, drain: bool = True) -> tuple[float, float]:
        """`live` is the part of the loop that live messages want. What live messages and those from disk take of it:
        without a limit both get the same chances."""
        rate = self.pace.rate
        wanted = (rate * DRAINED if rate else 1.0) if drain else 0.0
        drained = min(wanted, max(0.5, 1.0 - live))
        taken = min(live, 1.0 - drained)
        count = int(drained * TICK / DRAINED)
        self.pace.handled(count, count * DRAINED / WHOLE)
        self.core.received += int(taken * TICK / LIVE)
        self.core.sent += count
        self.used += (drained + taken) * TICK
        self.now += TICK
        self.pace.look(self.now)
        return taken, drained


def test_live_traffic_keeps_five_sixths_of_a_busy_loop() -> None:
    loop = Loop()
    shares = [loop.tick(live=1.0) for _ in range(40)]
    assert shares[0][0] == 0.5, "as long as nobody has looked"
    assert all(live > 0.8 for live, _ in shares[8:]), "two seconds later at the latest"
    assert all(drained > 0.9 * SHARE for _, drained in shares), "the queue is never stuck"


def test_a_queue_comes_back_at_full_speed_where_nothing_else_happens() -> None:
    loop = Loop()
    for live in (0.0, 0.002):
        assert all(loop.tick(live)[1] > 0.99 for _ in range(20))
        assert loop.pace.rate == 0.0


def test_beside_moderate_traffic_nothing_of_the_loop_is_left_unused() -> None:
    loop = Loop()
    shares = [loop.tick(live=0.4) for _ in range(60)][20:]
    assert all(live > 0.39 for live, _ in shares)
    assert sum(drained for _, drained in shares) / len(shares) > 0.5


def test_the_limit_ends_with_the_traffic() -> None:
    loop = Loop()
    for _ in range(20):
        loop.tick(live=1.0)
    assert loop.pace.rate
    loop.tick(live=0.0)
    assert loop.tick(live=0.0)[1] == 1.0


def test_the_limit_ends_with_the_queue() -> None:
    loop = Loop()
    for _ in range(20):
        loop.tick(live=1.0)
    assert loop.pace.rate
    for _ in range(2):
        loop.tick(live=1.0, drain=False)
    assert loop.pace.rate == 0.0


@pytest.fixture
def bench() -> StoredBench:
    """A queue of 3 000 on disk, and a pace in the test's hand."""
    bench = StoredBench(max_queued_messages=10_000)
    subscribed(bench, "s", "t").drop()
    p = bench.client("p")
    for n in range(3000):
        p.publish("t", b"%d" % n, 1, ident=n % 1000 + 1)
    bench.commit()
    bench.journal.pace.clock = lambda: bench.now
    return bench


def read(bench: StoredBench, seconds: float) -> int:
    """The messages that `s` gets within this time, each acknowledged at once."""
    count = 0
    client = bench.engine.sessions["s"].channel
    for _ in range(int(seconds / 0.01)):
        while bench.store.commits or bench.store.reads:
            (bench.store.step if bench.store.commits else bench.store.step_read)()
            bench.settle()
        inflight = bench.engine.sessions["s"].inflight
        for ident, *_ in inflight.entries() if inflight is not None else ():
            count += 1
            client.feed(ack(PUBACK, ident))
        bench.settle()
        bench.pass_time(0.01, 0.01)
    return count


def test_messages_are_read_back_at_the_rate_that_is_left(bench: StoredBench) -> None:
    bench.engine.core.received = 0
    pace = bench.journal.pace
    pace.look = lambda now: None  # type: ignore[method-assign]
    pace.rate = 1000.0
    parts.resume(bench, "s")
    assert 1000 - LOAD <= read(bench, 1.0) <= 1000 + 3 * LOAD
    pace.rate = 0.0
    assert read(bench, 1.0) > 1000, "whoever waited goes on when the limit is gone"


def test_a_client_that_leaves_while_it_waits_gets_the_rest_when_it_is_back(bench: StoredBench) -> None:
    pace = bench.journal.pace
    pace.look = lambda now: None  # type: ignore[method-assign]
    pace.rate = 100.0
    client = parts.resume(bench, "s")
    first = read(bench, 0.1)
    assert bench.engine.sessions["s"].spool.paused
    client.drop()
    bench.pass_time(10)
    parts.resume(bench, "s")
    assert first + read(bench, 40.0) == 3000
    bench.commit()
    assert bench.engine.sessions["s"].queued == 0
