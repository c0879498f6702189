"""Lanes of bridges and sinks: each keeps the order of what it is given, and nothing stays behind in one."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import broker as brokers
from tests.broker import Broker
from tests.clients import Device
from tests.servers import Mosquitto
from tests.system.resilience import until

BASE = """
[access]
allow_anonymous = true
no_match = "allow"
[listeners.tcp]
bind = "127.0.0.1:0"
"""
BRIDGE = """
[bridges.hq]
kind = "mqtt"
servers = ["{url}"]
clientid = "region-1"
lanes = {lanes}
restart = {{ base = "100ms", cap = "300ms" }}
topics = [
    {{ filter = "t/#", qos = 2 }},
    {{ filter = "c/#", direction = "in", qos = 1 }},
]
"""
SINK = """
[sinks.store]
kind = "sqlite"
path = "store.db"
filters = ["t/#"]
lanes = {lanes}
order_key = "${{topic}}"
columns = {{ msgid = "${{msgid}}", payload = "${{payload}}" }}
"""
TOPICS = [f"t/{name}" for name in "abcdefgh"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """`start(a=…)`: a running broker whose fragments are 00-base.toml and these."""
    with brokers.starting(tmp_path, BASE) as start:
        yield start


def publish(broker: Broker, numbers: range) -> None:
    with Device(broker.port) as device:
        for number in numbers:
            for topic in TOPICS:
                device.publish(topic, str(number), qos=1)


def arrived(device: Device, count: int) -> dict[str, list[int]]:
    """The numbers of each topic in the order they came: so many, and then no more."""
    until(lambda: device.messages.qsize() >= count, f"{count} arrive", 20)
    time.sleep(0.3)
    seen: dict[str, list[int]] = defaultdict(list)
    while not device.messages.empty():
        message = device.messages.get()
        seen[message.topic].append(int(message.payload))
    return seen


def test_lanes_of_a_bridge_share_the_topics_and_keep_the_order_of_each(
    start: Callable[..., Broker], start_mosquitto: Callable[..., Mosquitto]
) -> None:
    far = start_mosquitto(extra="max_queued_messages 0")
    broker = start(bridge=BRIDGE.format(url=far.url, lanes=4))
    broker.wait_for("bridges", "hq", "running")
    with Device(far.port) as there, Device(broker.port) as here:
        there.subscribe("t/#", qos=2)
        here.subscribe("c/#", qos=1)
        publish(broker, range(50))
        assert arrived(there, 400) == {topic: list(range(50)) for topic in TOPICS}
        there.publish("c/x", "7", qos=1)
        assert arrived(here, 1) == {"c/x": [7]}, "what comes in comes once, over the first"
    carried = [c for c in ("region-1", *(f"region-1-{n}" for n in (1, 2, 3))) if f"PUBLISH from {c} " in far.log()]
    assert len(carried) >= 3, f"eight topics were spread over {carried}"
    until(lambda: broker.status()["bridges"]["hq"]["messages_out"] == 400, "each is counted once")


def test_messages_of_a_lane_of_a_bridge_that_is_no_more_still_arrive(
    start: Callable[..., Broker], start_mosquitto: Callable[..., Mosquitto]
) -> None:
    far = start_mosquitto(extra="max_queued_messages 0", persistence=True)
    broker = start(bridge=BRIDGE.format(url=far.url, lanes=4))
    broker.wait_for("bridges", "hq", "running")
    with Device(far.port, client_id="there", clean=False, expiry=3600) as there:
        there.subscribe("t/#", qos=2)
    far.stop()
    publish(broker, range(10))
    broker.write("bridge.toml", BRIDGE.format(url=far.url, lanes=1))
    done = broker.reload()
    assert done.returncode == 0, done.stderr
    publish(broker, range(10, 20))
    far.start()
    with Device(far.port, client_id="there", clean=False, expiry=3600) as there:
        seen = arrived(there, 160)
        assert {topic: sorted(numbers) for topic, numbers in seen.items()} == {t: list(range(20)) for t in TOPICS}


def test_messages_of_a_lane_of_a_sink_that_is_no_more_are_still_stored(start: Callable[..., Broker]) -> None:
    broker = start(sink=SINK.format(lanes=4))
    broker.wait_for("sinks", "store", "running")
    assert broker.isthmus("sinks", "pause", "store").returncode == 0
    publish(broker, range(10))
    broker.write("sink.toml", SINK.format(lanes=1))
    done = broker.reload()
    assert done.returncode == 0, done.stderr
    assert broker.isthmus("sinks", "resume", "store").returncode == 0
    publish(broker, range(10, 20))

    def rows() -> list[int]:
        with contextlib.closing(sqlite3.connect(broker.where / "store.db", timeout=10)) as db:
            try:
                return [int(row[0]) for row in db.execute("select payload from messages")]
            except sqlite3.OperationalError:  # not made yet
                return []

    until(lambda: len(rows()) >= 160, "what queued in four lanes", 20)
    assert sorted(rows()) == sorted(list(range(20)) * len(TOPICS))
    until(lambda: broker.status()["sinks"]["store"]["queued"] == 0, "nothing is left", 20)
