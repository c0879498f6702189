"""R-06: what the engine does while memory is short."""

from __future__ import annotations

from tests.unit.engine.harness import Bench


def test_r06_publishers_are_read_less_and_newcomers_refused() -> None:
    bench = Bench()
    publisher = bench.client("p")
    subscriber = bench.client("s")
    subscriber.subscribe("#", qos=1)
    publisher.publish("t", b"1", qos=1)
    bench.engine.press(1)
    assert publisher.channel.paused
    assert not subscriber.channel.paused, "who only receives frees memory"
    for _ in range(3):
        bench.engine.press(1)
    assert not publisher.channel.paused, "a quarter of the time it is read"
    bench.engine.press(2)
    assert bench.client("late", version=5).connack.code == 0x89
    bench.engine.press(0)
    assert not publisher.channel.paused
    assert bench.client("later", version=5).connack.code == 0
