"""D-17: how long a message has waited does not depend on what the wall clock says."""

from __future__ import annotations

import pytest

from broker.engine import records
from broker.engine.message import Message
from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import payloads, resume
from tests.unit.engine.stores import StoredBench, check
from tests.unit.engine.test_instances import spec
from tests.unit.engine.test_journal import resume as back
from tests.unit.engine.test_journal import subscribed

YEAR = 31_536_000_000


def jump(bench: Bench, milliseconds: int) -> None:
    """The wall clock is set."""
    wall = 1_700_000_000_000 + int(bench.now * 1000) + milliseconds
    bench.engine.tick(bench.now, wall)
    bench.settle()


@pytest.mark.parametrize("by", [YEAR, -YEAR])
def test_d17_a_jump_of_the_wall_clock_drops_nothing_that_queues(by: int) -> None:
    for bench in (Bench(max_queued_age=60.0), StoredBench(max_queued_age=60.0)):
        s = bench.client("s", version=5, clean=False, session_expiry_interval=1000)
        s.send(b"\x82\x07\x00\x01\x00\x00\x01t\x01")
        if isinstance(bench, StoredBench):
            bench.commit()
        s.drop()
        bench.client("p").publish("t", b"m", 1)
        if isinstance(bench, StoredBench):
            bench.commit()
        jump(bench, by)
        s = resume(bench, "s", 5, session_expiry_interval=1000)
        if isinstance(bench, StoredBench):
            bench.commit()
        assert payloads(s) == [b"m"]


def test_d17_a_message_ages_while_the_broker_is_down_too() -> None:
    bench = StoredBench(max_queued_age=60.0)
    subscribed(bench, "s", "t", version=5, session_expiry_interval=1000).drop()
    bench.client("p").publish("t", b"old", 1)
    bench.commit()
    bench = bench.restart(down=40)
    bench.client("p").publish("t", b"new", 1)
    bench.commit()
    bench = bench.restart(down=30)
    jump(bench, -YEAR)
    assert payloads(back(bench, "s", 5, session_expiry_interval=1000)) == [b"new"]
    assert bench.engine.core.dropped == {"too_old": 1}
    check(bench)


@pytest.mark.parametrize("by", [YEAR, -YEAR])
def test_d17_an_instance_keeps_what_is_younger_than_its_max_age(by: int) -> None:
    bench = StoredBench()
    bench.engine.instances.ensure("x", spec(max_age=60.0))
    bench.commit()
    bench.client("p").publish("t", b"m", 1)
    bench.commit()
    jump(bench, by)
    bench.pass_time(2)
    (lane,) = bench.engine.instances.lanes("x")
    assert lane.queued == 1
    assert abs(bench.engine.core.wall_ms - lane.oldest_ms() - 2000) < 1000, "the age that is shown"
    bench.pass_time(70)
    assert lane.queued == 0


def test_records_of_an_older_release_begin_to_age_when_they_are_read() -> None:
    message = Message(b"t", b"m", 1, False, b"", 0.0, None)
    message.ident, message.time_ms = "00" * 15 + "01", 1_700_000_000_123
    ((_, _, body),) = records.iterate(records.encode_put(message, False, 0, 0, 0, 0, b"", b""))
    assert not records.put_fields(body)[0] & records.CLOCKED
    found = records.decode_message(body, 0.0, 5000, {})
    assert (found.time_ms, found.clock_ms) == (1_700_000_000_123, 5000)
