"""Retained messages: stored, bounded, expired, and sent to new subscriptions at the pace they take them."""

from __future__ import annotations

import pytest

from broker.engine.core import Limits
from broker.engine.message import Message
from broker.mqtt import packets
from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import PUBACK, PUBREC, ack, payloads, resume
from tests.unit.engine.stores import StoredBench, check


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_retained_message_greets_new_subscriptions_until_it_is_cleared(bench: Bench) -> None:
    live = bench.client("live")
    live.subscribe("a/#")
    p = bench.client("p")
    p.publish("a/b", b"1", retain=True).publish("a/b", b"2", 1, retain=True).publish("a/c", b"3", 2, ident=2)
    assert [(m.payload, m.retain) for m in live.take()] == [(b"1", False), (b"2", False), (b"3", False)]
    s = bench.client("s")
    for filter in ("a/b", "a/+", "#", "+/b", "a/b/#"):
        s.subscribe(filter, qos=2)
        ((payload, qos, retain),) = [(m.payload, m.qos, m.retain) for m in s.after_suback]
        assert (payload, qos, retain) == (b"2", 1, True)
    s.subscribe("a/c", "a", "b/#", "a/b/c", "$share/g/a/b")
    assert not s.after_suback
    p.publish("a/b", b"", retain=True)
    assert live.take()[-1].payload == b""
    assert payloads(s) == [b"", b""], "one copy for the shared subscription, one for all others together"
    s.subscribe("#")
    assert not s.after_suback
    assert bench.engine.retained_store.count == 0
    assert bench.engine.retained_store.bytes == 0
    assert bench.engine.retained_store._root.children is None


def test_retain_handling_0_1_and_2(bench: Bench) -> None:
    bench.client("p").publish("t", b"m", retain=True)
    s = bench.client("s", version=5)

    def greeted(options: int, filter: str = "t") -> bool:
        s.subscribe((filter, options))
        return bool(s.after_suback)

    assert not greeted(0x20)
    assert not greeted(0x10), "the subscription is there already"
    assert greeted(0x00)
    assert greeted(0x00)
    s.send(packets.encode_unsubscribe(1, 5, [b"t"]))
    s.take()
    assert greeted(0x10)
    assert not greeted(0x10)


def test_retain_as_published(bench: Bench) -> None:
    s = bench.client("s", version=5)
    s.subscribe(("kept", 0x08 | 1), ("plain", 1))
    worker = bench.client("isthmus/x/in", version=5, privileged=True)
    p = bench.client("p")
    for qos in (0, 1):
        for topic in ("kept", "plain"):
            p.publish(topic, b"r", qos, retain=True)
            p.publish(topic, b"n", qos)
    assert [(m.topic, m.payload, m.retain) for m in s.take()] == [
        (b"kept", b"r", True), (b"kept", b"n", False), (b"plain", b"r", False), (b"plain", b"n", False)
    ] * 2  # fmt: skip
    worker.subscribe(("kept", 0x08))
    assert worker.after_suback[0].retain


def test_retained_messages_have_the_subscription_identifier(bench: Bench) -> None:
    bench.client("p").publish("t", b"m", retain=True)
    s = bench.client("s", version=5)
    s.subscribe("t", subscription_identifiers=[7])
    assert s.after_suback[0].properties.subscription_identifiers == [7]


def test_r07_the_number_of_retained_messages_is_bounded() -> None:
    bench = Bench(max_retained_messages=3)
    s = bench.client("s")
    s.subscribe("#")
    five, four = bench.client("five", version=5), bench.client("four")
    for i in range(3):
        five.publish(f"t/{i}", b"m", retain=True)
    five.publish("t/3", b"m", 1, ident=1, retain=True).publish("t/3", b"m", 2, ident=2, retain=True)
    assert five.bytes() == ack(PUBACK, 1, 0x97) + ack(PUBREC, 2, 0x97)
    four.publish("t/3", b"m", 1, ident=1, retain=True)
    assert four.bytes() == ack(PUBACK, 1)
    assert bench.engine.core.dropped == {"retained_full": 3}
    five.publish("t/1", b"replaced", 1, ident=1, retain=True)
    five.publish("t/0", b"", 1, ident=2, retain=True)
    five.publish("t/9", b"m", 1, ident=3, retain=True)
    assert {a.code for a in five.take()} == {0}
    new = bench.client("new")
    new.subscribe("#")
    assert sorted((m.topic, m.payload) for m in new.after_suback) == [
        (b"t/1", b"replaced"),
        (b"t/2", b"m"),
        (b"t/9", b"m"),
    ]


@pytest.mark.parametrize(("qos", "answer"), [(1, PUBACK), (2, PUBREC)])
def test_r07_what_a_bridge_brings_in_beyond_the_bound_is_given_out_once(qos: int, answer: int) -> None:
    bench = Bench(max_retained_messages=1)
    s = bench.client("s")
    s.subscribe("#")
    inlet = bench.client("isthmus/x/in", version=5, privileged=True)
    inlet.publish("t/0", b"m", qos, ident=1, retain=True).publish("t/1", b"m", qos, ident=2, retain=True)
    assert inlet.bytes() == ack(answer, 1) + ack(answer, 2), "0x97 would have it sent again"
    assert [m.topic for m in s.take()] == [b"t/0", b"t/1"]
    assert bench.engine.core.dropped == {"retained_full": 1}


def test_r07_one_client_has_a_quota_of_retained_messages() -> None:
    bench = Bench(max_retained_per_client=2)
    five, other = bench.client("five", version=5), bench.client("other", version=5)
    for i in range(3):
        five.publish(f"t/{i}", b"m", 1, ident=i + 1, retain=True)
    assert five.bytes() == b"".join(ack(PUBACK, n, *([0x10] if n < 3 else [0x97])) for n in (1, 2, 3))
    assert bench.engine.core.dropped == {"retained_quota": 1}
    assert [category for category, _ in bench.reports] == ["retained_quota"]
    five.publish("t/1", b"replaced", 1, ident=1, retain=True)
    assert bench.engine.core.dropped == {"retained_quota": 1}, "its own may be replaced"
    other.publish("t/1", b"other", 1, retain=True)
    five.publish("t/2", b"m", 1, retain=True)
    assert bench.engine.core.dropped == {"retained_quota": 1}, "the topic is another client's now"
    five.publish("t/1", b"five", 1, retain=True)
    assert bench.engine.core.dropped == {"retained_quota": 2}
    five.publish("t/0", b"", 1, retain=True).publish("t/1", b"five", 1, retain=True)
    assert bench.engine.core.dropped == {"retained_quota": 2}
    assert bench.engine.retained_store._owned == {"five": 2}
    five.publish("t/1", b"", retain=True).publish("t/2", b"", retain=True)
    assert bench.engine.retained_store._owned == {}
    assert bench.engine.retained_store._root.children is None


def test_r07_a_quota_that_comes_later_counts_what_is_there_and_keeps_it() -> None:
    bench = StoredBench()
    p = bench.client("p", version=5)
    for i in range(3):
        p.publish(f"t/{i}", b"m", 1, ident=i + 1, retain=True, properties=b"\x02\x00\x00\x00\x0a" * (i == 2))
    bench.commit()
    bench.engine.configure(Limits(max_retained_per_client=1))
    again = bench.restart(max_retained_per_client=1)
    for one in (bench, again):
        p = one.client("p", version=5)
        p.publish("t/9", b"m", 1, retain=True)
        one.pass_time(61, 1)
        assert one.engine.core.dropped == {"retained_quota": 1}
        assert one.engine.retained_store._owned == {"p": 2}, "one has expired"
        p.publish("t/0", b"", retain=True).publish("t/1", b"", retain=True).publish("t/9", b"m", 1, retain=True)
        assert one.engine.core.dropped == {"retained_quota": 1}
        one.commit()
        check(one)


def test_r07_sinks_bridges_and_the_broker_have_no_quota() -> None:
    bench = Bench(max_retained_per_client=1)
    w = bench.client("isthmus/hq/in", privileged=True)
    w.publish("t/1", b"m", 1, retain=True).publish("t/2", b"m", 1, retain=True)
    for n in range(3):
        bench.engine.publish(Message(b"$SYS/%d" % n, b"m", 0, True, b"", 0.0, None))
    assert bench.engine.retained_store.count == 5


def test_r07_a_qos_2_message_that_could_not_be_retained_is_still_taken_once_from_mqtt_3() -> None:
    bench = Bench(max_retained_messages=0)
    s = bench.client("s")
    s.subscribe("t")
    four = bench.client("four")
    four.publish("t", b"m", 2, retain=True).publish("t", b"m", 2, retain=True, dup=True)
    assert four.bytes() == ack(PUBREC, 1) * 2
    assert payloads(s) == [b"m"]


def test_r07_the_bytes_of_retained_messages_are_bounded() -> None:
    bench = Bench(max_retained_bytes=10_000)
    p = bench.client("p", version=5)
    for i in range(20):
        p.publish(f"t/{i}", b"x" * 700, 1, ident=i + 1, retain=True)
    codes = [a.code for a in p.take()]
    assert codes == [0x10] * 9 + [0x97] * 11
    assert bench.engine.retained_store.bytes <= 10_000
    p.publish("t/0", b"y", 1, retain=True)
    assert p.take()[0].code == 0x10


def test_p55_a_retained_message_counts_its_expiry_down_and_goes(bench: Bench) -> None:
    p = bench.client("p", version=5)
    p.publish("t", b"m", 1, retain=True, properties=b"\x02\x00\x00\x00\x0a")
    for left in (10, 7, 4, 1):
        s = bench.client("s", version=5)
        s.subscribe("t")
        assert s.after_suback[0].properties.message_expiry_interval == left
        bench.pass_time(3)
    s = bench.client("s", version=5)
    s.subscribe("t")
    assert not s.after_suback
    assert bench.engine.retained_store.count == 0


def test_expired_retained_messages_are_swept_though_nobody_asks(bench: Bench) -> None:
    p = bench.client("p", version=5)
    for i in range(10):
        p.publish(f"t/{i}", b"m", retain=True, properties=b"\x02\x00\x00\x00\x05")
    bench.pass_time(61)
    assert bench.engine.retained_store.count == 0
    assert bench.engine.retained_store.bytes == 0


def test_many_retained_messages_come_at_the_pace_of_the_subscriber(bench: Bench) -> None:
    p = bench.client("p")
    for i in range(200):
        p.publish(f"t/{i:03}", b"m", 1, retain=True)
    s = bench.client("s", version=5, receive_maximum=10)
    s.subscribe("t/#", qos=1)
    batch = s.after_suback
    seen = []
    while batch:
        assert len(batch) <= 10
        seen += [m.topic for m in batch]
        s.send(b"".join(ack(PUBACK, m.packet_id) for m in batch))
        batch = s.take()
    assert sorted(seen) == [b"t/%03d" % i for i in range(200)]
    assert bench.engine.sessions["s"].retained is None


def test_retained_messages_wait_while_the_transport_is_full(bench: Bench) -> None:
    p = bench.client("p")
    for i in range(50):
        p.publish(f"t/{i}", b"m", retain=True)
    s = bench.client("s")
    s.channel.pause_writing()
    s.send(packets.encode_subscribe(1, 4, [(b"t/#", 0)]))
    assert not s.bytes()
    assert len(bench.engine.sessions["s"].retained) == 50
    s.channel.resume_writing()
    bench.settle()
    assert len(payloads(s)) == 50


def test_a_waiting_retained_message_gives_way_to_a_newer_one(bench: Bench) -> None:
    p = bench.client("p")
    for i in range(6):
        p.publish(f"t/{i}", b"old", 1, retain=True)
    s = bench.client("s", version=5, receive_maximum=1)
    s.subscribe("t/#", qos=1)
    (first,) = s.after_suback
    for i in range(6):
        p.publish(f"t/{i}", b"new", 1, retain=True)
    latest = {first.topic: first.payload}
    batch = [first]
    while batch:
        s.send(ack(PUBACK, batch[0].packet_id))
        batch = s.take()
        latest.update((m.topic, m.payload) for m in batch)
    assert set(latest.values()) == {b"new"}
    assert len(latest) == 6


def test_waiting_retained_messages_end_with_the_right_or_the_subscription(bench: Bench) -> None:
    p = bench.client("p")
    for i in range(6):
        p.publish(f"t/{i}", b"m", 1, retain=True)
    for revoke in (True, False):
        s = bench.client("s", version=5, username="u", receive_maximum=1)
        s.subscribe("t/#", qos=1)
        (first,) = s.after_suback
        if revoke:
            bench.gate.deny_receive.update(("u", f"t/{i}") for i in range(6))
            bench.engine.rights_changed("s")
        else:
            s.send(packets.encode_unsubscribe(1, 5, [b"t/#"]))
            s.take()
        s.send(ack(PUBACK, first.packet_id))
        assert not s.take()
        bench.gate.deny_receive.clear()


def test_retained_messages_a_durable_client_had_no_time_for_wait_in_its_queue(bench: Bench) -> None:
    p = bench.client("p")
    for i in range(5):
        p.publish(f"t/{i}", b"m", 1, retain=True)
    s = bench.client("s", version=5, receive_maximum=2, session_expiry_interval=60)
    s.subscribe("t/#", qos=1)
    got = {m.topic for m in s.after_suback}
    s.drop()
    s = resume(bench, "s", 5)
    again = s.take()[1:]
    assert {m.topic for m in again} | got == {b"t/%d" % i for i in range(5)}
    assert all(m.retain for m in again)
