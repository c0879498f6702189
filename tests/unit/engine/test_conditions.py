"""Topics to which a client may publish at some QoS, or not retained, only."""

from __future__ import annotations

from typing import Any

import pytest

from broker.mqtt.connect import Will
from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import PUBACK, PUBREC, ack, payloads, publish

QOS0, QOS0_RETAINED, QOS1, QOS1_RETAINED, QOS2, QOS2_RETAINED = (1 << bit for bit in range(6))
NOT_RETAINED = QOS0 | QOS1 | QOS2
FIRST = {1: PUBACK, 2: PUBREC}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def refused(qos: int, ident: int, version: int) -> bytes:
    """What the publisher is answered: 3.x knows no reasons."""
    return ack(FIRST[qos], ident, *((0x87,) if version == 5 else ())) if qos else b""


def watch(bench: Bench, *filters: str) -> Any:
    watcher = bench.client("watcher", version=5)
    watcher.subscribe(*(filters or ("#",)), qos=2)
    return watcher


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("may", [0, 1, 2])
def test_z25_a_qos_that_is_not_allowed_is_refused_and_counted(bench: Bench, version: int, qos: int, may: int) -> None:
    bench.gate.partly["u", "a"] = 0b11 << (may << 1)
    watcher = watch(bench)
    client = bench.client("c", version=version, username="u")
    client.publish("a", qos=qos, ident=7)
    if qos == may:
        assert payloads(watcher) == [b"x"]
        assert client.bytes() == (ack(FIRST[qos], 7) if qos else b"")
        assert not bench.engine.core.dropped
        return
    assert payloads(watcher) == []
    assert client.bytes() == refused(qos, 7, version)
    assert bench.engine.core.dropped == {"unauthorized": 1}


def test_order_is_kept_between_topics_with_and_without_conditions(bench: Bench) -> None:
    bench.gate.partly["u", "some"] = QOS0
    bench.gate.partly["u", "none"] = QOS1
    watcher = watch(bench, "all", "some", "none")
    client = bench.client("c", username="u")
    topics = ["all", "some", "none", "all", "all", "some", "some", "none", "all"]
    client.send(b"".join(publish(topic, b"%d" % n) for n, topic in enumerate(topics)))
    assert payloads(watcher) == [b"%d" % n for n, topic in enumerate(topics) if topic != "none"]
    assert bench.engine.core.dropped == {"unauthorized": 2}
    asked = bench.gate.asked
    client.publish("some").publish("none").publish("all")
    assert bench.gate.asked == asked, "what may be published is asked once a topic"


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_z29_what_may_not_be_retained_is_routed_and_not_stored(bench: Bench, version: int, qos: int) -> None:
    bench.gate.partly["u", "a"] = NOT_RETAINED
    watcher = watch(bench)
    client = bench.client("c", version=version, username="u")
    client.publish("a", b"now", qos=qos, ident=3, retain=True)
    assert payloads(watcher) == [b"now"]
    assert client.bytes() == refused(qos, 3, version)
    late = bench.client("late", version=5)
    late.subscribe("#")
    assert late.after_suback == [], "nothing was stored"
    assert bench.engine.core.events["retain_denied"] == 1
    client.publish("a", b"then", qos=qos, ident=4)
    assert payloads(watcher) == [b"then"]


def test_z29_nor_is_what_was_retained_before_cleared(bench: Bench) -> None:
    bench.client("owner", username="owner").publish("a", b"kept", retain=True)
    bench.gate.partly["u", "a"] = NOT_RETAINED
    bench.client("c", username="u").publish("a", b"", retain=True)
    late = bench.client("late", version=5)
    late.subscribe("a")
    assert [message.payload for message in late.after_suback] == [b"kept"]


def test_what_may_only_be_retained_is_stored(bench: Bench) -> None:
    bench.gate.partly["u", "a"] = QOS1_RETAINED
    client = bench.client("c", version=5, username="u")
    client.publish("a", b"no", qos=1, ident=1)
    assert client.bytes() == ack(PUBACK, 1, 0x87)
    client.publish("a", b"yes", qos=1, ident=2, retain=True)
    late = bench.client("late", version=5)
    late.subscribe("a")
    assert [message.payload for message in late.after_suback] == [b"yes"]


def test_an_alias_stands_for_its_topic(bench: Bench) -> None:
    bench.gate.partly["u", "a"] = QOS1
    watcher = watch(bench)
    client = bench.client("c", version=5, username="u")
    client.publish("a", b"1", qos=1, ident=1, properties=b"\x23\x00\x01")
    client.publish("", b"2", qos=1, ident=2, properties=b"\x23\x00\x01")
    client.publish("", b"3", properties=b"\x23\x00\x01")
    assert payloads(watcher) == [b"1", b"2"]
    assert bench.engine.core.dropped == {"unauthorized": 1}


@pytest.mark.parametrize(("qos", "retain", "code"), [(0, False, 0), (0, True, 0x87), (1, False, 0x87)])
def test_z11_a_will_is_one_packet(bench: Bench, qos: int, retain: bool, code: int) -> None:
    bench.gate.partly["u", "a"] = QOS0
    watcher = watch(bench)
    client = bench.client("c", version=5, username="u", will=Will(b"a", b"gone", qos, retain))
    assert client.connack.code == code
    client.drop()
    assert payloads(watcher) == ([b"gone"] if code == 0 else [])


def test_z12_a_will_that_may_no_longer_be_retained_is_not_published(bench: Bench) -> None:
    watcher = watch(bench)
    client = bench.client("c", version=5, username="u", will=Will(b"a", b"gone", 0, True))
    bench.gate.partly["u", "a"] = NOT_RETAINED
    client.drop()
    assert payloads(watcher) == []


def test_a_subscription_needs_the_qos_it_asks_for(bench: Bench) -> None:
    bench.gate.subscribe_qos["u", "a"] = {0, 1}
    client = bench.client("c", version=5, username="u")
    assert client.subscribe(("a", 1), ("a", 2), ("$share/g/a", 2), ("$share/g/a", 0)) == [1, 0x87, 0x87, 0]
    assert bench.client("d", username="u").subscribe(("a", 2)) == [0x80]


def test_z14_a_subscription_whose_qos_is_no_longer_allowed_ends(bench: Bench) -> None:
    client = bench.client("c", version=5, username="u")
    assert client.subscribe(("a", 2), ("b", 0)) == [2, 0]
    bench.gate.subscribe_qos["u", "a"] = {0}
    bench.gate.subscribe_qos["u", "b"] = {0}
    bench.engine.rights_changed("c")
    bench.client("p").publish("a").publish("b")
    assert [message.topic for message in client.take()] == [b"b"]


def test_z13_what_its_publisher_may_no_longer_retain_is_not_sent(bench: Bench) -> None:
    owner = bench.client("owner", username="owner")
    owner.publish("a", b"kept", retain=True)
    for allowed, sent in ((QOS0_RETAINED, 1), (QOS0, 0)):
        bench.gate.partly["owner", "a"] = allowed
        late = bench.client("late", version=5)
        late.subscribe("a")
        assert len(late.after_suback) == sent
