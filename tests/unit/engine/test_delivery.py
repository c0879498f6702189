"""QoS 0, 1 and 2 between clients: who gets what, once, in which order, with which identifiers."""

from __future__ import annotations

import pytest

from broker.mqtt import packets
from broker.mqtt.properties import user_property
from tests.unit.engine.harness import Bench, connect_packet


@pytest.fixture
def bench() -> Bench:
    return Bench()


def ack(kind: int, ident: int) -> bytes:
    return bytes((kind, 2, ident >> 8, ident & 255))


def test_a_run_of_qos_0_packets_reaches_every_subscriber_in_order(bench: Bench) -> None:
    a, b = bench.client("a"), bench.client("b", version=5)
    a.subscribe("t/#")
    b.subscribe("t/1")
    p = bench.client("p")
    one = packets.encode_publish(b"t/1", b"1", 0, False, False, 0, 4)
    two = packets.encode_publish(b"t/1", b"2", 0, False, False, 0, 4)
    other = packets.encode_publish(b"t/2", b"3", 0, False, False, 0, 4)
    p.send(one + two + other + one)
    assert [m.payload for m in a.take()] == [b"1", b"2", b"3", b"1"]
    assert [m.payload for m in b.take()] == [b"1", b"2", b"1"]
    assert bench.engine.core.received == 4
    assert bench.engine.core.sent == 7


@pytest.mark.parametrize("version", [4, 5])
def test_bytes_split_anywhere_give_the_same_result(bench: Bench, version: int) -> None:  # P-12
    a = bench.client("a", version=version)
    a.subscribe("t", qos=2)
    p = bench.client("p", version=version)
    stream = b"".join(
        packets.encode_publish(b"t", b"%d" % i, i % 3, False, False, i + 1 if i % 3 else 0, version) for i in range(30)
    )
    p.send(*[stream[i : i + 1] for i in range(len(stream))])
    split = [m.payload for m in a.take()]
    answers = p.bytes()
    whole = Bench()
    a2 = whole.client("a", version=version)
    a2.subscribe("t", qos=2)
    p2 = whole.client("p", version=version)
    p2.send(stream)
    assert split == [m.payload for m in a2.take()] == [b"%d" % i for i in range(30)]
    assert p2.bytes() == answers


def test_qos_1_is_acknowledged_at_once_when_nobody_holds_it(bench: Bench) -> None:
    s = bench.client("s")
    s.subscribe("t", qos=1)
    p = bench.client("p")
    p.publish("t", b"m", 1, ident=7)
    assert p.bytes() == ack(0x40, 7)
    (m,) = s.take()
    assert (m.qos, m.payload, m.dup) == (1, b"m", False)


def test_unacknowledged_messages_come_again_with_dup_in_their_order_and_before_queued_ones(bench: Bench) -> None:
    s = bench.client("s", clean=False)
    s.subscribe("t", qos=1)
    p = bench.client("p")
    for i in range(3):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    sent = s.take()
    s.send(ack(0x40, sent[1].packet_id))
    s.drop()
    p.publish("t", b"3", 1, ident=4)
    s = bench.socket()
    s.send(connect_packet("s", clean=False))
    connack, *messages = s.take()
    assert connack.session_present
    assert [(m.payload, m.dup) for m in messages] == [(b"0", True), (b"2", True), (b"3", False)]
    assert [m.packet_id for m in messages[:2]] == [sent[0].packet_id, sent[2].packet_id]


def test_qos_2_is_exactly_once_in_and_out(bench: Bench) -> None:
    s = bench.client("s")
    s.subscribe("t", qos=2)
    p = bench.client("p")
    p.publish("t", b"m", 2, ident=9).publish("t", b"m", 2, ident=9, dup=True)
    assert p.bytes() == ack(0x50, 9) * 2
    (m,) = s.take()
    assert m.qos == 2
    s.send(ack(0x50, m.packet_id))
    assert s.bytes() == ack(0x62, m.packet_id)
    s.send(ack(0x70, m.packet_id))
    p.send(ack(0x62, 9))
    assert p.bytes() == ack(0x70, 9)
    p.publish("t", b"n", 2, ident=9)
    assert [x.payload for x in s.take()] == [b"n"]


def test_overlapping_subscriptions_give_one_copy_at_the_highest_qos_with_every_identifier(bench: Bench) -> None:
    s = bench.client("s", version=5)
    s.subscribe("a/#", qos=1, subscription_identifiers=[3])
    s.subscribe("a/+", qos=2, subscription_identifiers=[5])
    s.subscribe("a/b", qos=0)
    p = bench.client("p", version=5)
    p.publish("a/b", b"m", 2, ident=1)
    (m,) = s.take()
    assert m.qos == 2
    assert sorted(m.properties.subscription_identifiers) == [3, 5]


def test_no_local_keeps_a_clients_own_messages_from_it(bench: Bench) -> None:
    s = bench.client("s", version=5)
    s.subscribe(("t", 0x04 | 1))
    s.publish("t", b"own", 1, ident=1)
    assert [type(x).__name__ for x in s.take()] == ["Ack"]
    bench.client("p").publish("t", b"other")
    assert [m.payload for m in s.take()] == [b"other"]


def test_mqtt_5_properties_pass_end_to_end_and_ours_cannot_be_forged(bench: Bench) -> None:
    s = bench.client("s", version=5)
    s.subscribe("t")
    worker = bench.client("isthmus/x/0", version=5, privileged=True, clean=False, session_expiry_interval=60)
    worker.subscribe("t", qos=1)
    p = bench.client("p", version=5, username="u")
    block = user_property("a", "1") + user_property("$isthmus", "{}") + user_property("a", "2")
    p.publish("t", b"m", 1, ident=1, properties=block)
    (m,) = s.take()
    assert m.properties.user_properties == [("a", "1"), ("a", "2")]
    (w,) = worker.take()
    names = [k for k, _ in w.properties.user_properties]
    assert names == ["$isthmus", "a", "a"]
    assert '"c":"p","u":"u"' in w.properties.user_properties[0][1]


def test_a_window_of_one_never_has_two_in_flight(bench: Bench) -> None:  # P-44
    s = bench.client("s", version=5, receive_maximum=1)
    s.subscribe("t", qos=1)
    p = bench.client("p")
    for i in range(3):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    got = []
    for _ in range(3):
        (m,) = s.take()
        got.append(m.payload)
        s.send(ack(0x40, m.packet_id))
    assert got == [b"0", b"1", b"2"]
    assert not s.take()


def test_the_queue_drops_qos_0_first_then_the_oldest() -> None:
    bench = Bench(max_queued_messages=3)
    s = bench.client("s", clean=False)
    s.subscribe("t", qos=1)
    s.drop()
    p = bench.client("p")
    p.publish("t", b"zero")
    for i in range(4):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    s = bench.socket()
    s.send(connect_packet("s", clean=False))
    assert [m.payload for m in s.take()[1:]] == [b"1", b"2", b"3"]
    assert bench.engine.core.dropped == {"queue_full": 2}


def test_publish_to_nobody_says_so_to_mqtt_5_clients_only(bench: Bench) -> None:
    p5 = bench.client("p5", version=5)
    p5.publish("nobody", b"m", 1, ident=1)
    (answer,) = p5.take()
    assert answer.code == 0x10
    p4 = bench.client("p4")
    p4.publish("nobody", b"m", 1, ident=1)
    assert p4.bytes() == ack(0x40, 1)
