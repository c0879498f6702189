"""Filters: which are valid, what they lead to, and that rights hold on every path a message may take."""

from __future__ import annotations

import gc
import sys
from collections import Counter

import pytest

from broker.mqtt import packets
from broker.mqtt.packets import Will
from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import (
    PUBACK,
    PUBCOMP,
    PUBREC,
    PUBREL,
    ack,
    closed_with,
    is_empty,
    payloads,
    publish,
    resume,
)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("filter", ["a#", "a/#/b", "a+", "+a/b", "#/", "", "#/a", "a/b+"])
def test_p28_an_invalid_filter_is_refused_alone_or_ends_the_connection(bench: Bench, filter: str) -> None:
    five = bench.client("five", version=5)
    assert five.subscribe("good", filter, "also/+") == [0, 0x8F, 0]
    for version in (3, 4):
        old = bench.client("old", version=version)
        old.send(packets.encode_subscribe(1, version, [(filter.encode(), 0)]))
        assert closed_with(old, 0)
    bench.client("p").publish("good")
    assert len(five.take()) == 1


@pytest.mark.parametrize(
    "filter", ["$share", "$share/ab", "$share//x", "$share/+/x", "$share/#/x", "$share/g/", "$share/a+/x"]
)
def test_p29_an_invalid_shared_filter_is_refused_and_the_broker_goes_on(bench: Bench, filter: str) -> None:
    five = bench.client("five", version=5)
    assert five.subscribe(filter) == [0x8F]
    for topic in ("x", "ab", "a/b"):
        bench.client("p").publish(topic, qos=1)
    assert not five.take()
    assert not bench.engine.groups
    assert bench.client("four").subscribe(filter) == [0x80]


def test_p30_no_local_on_a_shared_subscription_ends_the_connection(bench: Bench) -> None:
    client = bench.client("c", version=5)
    client.send(packets.encode_subscribe(1, 5, [(b"$share/g/x", 4)]))
    assert closed_with(client, 0x82)


@pytest.mark.parametrize("ends", [True, False], ids=["unsubscribed", "left-there"])
@pytest.mark.parametrize(
    ("first", "second"), [(b"$share/g/x/#", b"x/#"), (b"x/#", b"$share/g/x/#"), (b"$share/g/x", b"x")]
)
def test_p32_shared_and_plain_filters_are_different_subscriptions_and_leave_nothing(
    bench: Bench, first: bytes, second: bytes, ends: bool
) -> None:
    client = bench.client("c", version=5)
    subscribe, wrong = packets.encode_subscribe(1, 5, [(first, 1)]), packets.encode_unsubscribe(2, 5, [second])
    right = packets.encode_unsubscribe(3, 5, [first])

    def alternate(times: int) -> int:
        """How many blocks of memory are in use afterwards."""
        for _ in range(times):
            client.send(subscribe, wrong)
            assert bench.engine.router.count == 1
            if ends:
                client.send(right)
                assert bench.engine.router.count == 0
            client.link.written.clear()
        gc.collect()
        return sys.getallocatedblocks()

    before = alternate(1_000)
    assert alternate(10_000) - before < 500, "memory is flat"
    client.send(right)
    assert bench.engine.router.count == 0
    assert not bench.engine.groups
    assert bench.engine.sessions["c"].subscriptions is None
    assert not bench.engine.router.root.children
    client.drop()
    assert is_empty(bench.engine)


def test_r08_subscriptions_of_one_client_are_bounded() -> None:
    bench = Bench(max_subscriptions=10)
    five, four = bench.client("five", version=5), bench.client("four")
    assert five.subscribe(*[f"t/{i}" for i in range(12)]) == [0] * 10 + [0x97] * 2
    assert four.subscribe(*[f"t/{i}" for i in range(12)]) == [0] * 10 + [0x80] * 2
    assert five.subscribe("t/3", qos=1) == [1]
    five.send(packets.encode_unsubscribe(2, 5, [b"t/1"]))
    five.take()
    assert five.subscribe("new") == [0]


def test_r08_a_hundred_thousand_subscriptions_of_one_client_end_at_the_limit(bench: Bench) -> None:
    limit = bench.engine.core.limits.max_subscriptions
    assert limit == 1000
    client = bench.client("c", version=5)
    codes: Counter[int] = Counter()
    before = 0
    for start in range(0, 100_000, 500):
        codes.update(client.subscribe(*[f"a/+/{i}/#" for i in range(start, start + 500)], qos=1))
        client.link.written.clear()
        client.read = 0
        if start == 2_000:
            before = sys.getallocatedblocks()
    assert codes == {1: limit, 0x97: 100_000 - limit}
    assert bench.engine.router.count == limit
    assert sys.getallocatedblocks() - before < 2_000, "what is refused is not kept"
    assert not client.closed


@pytest.mark.parametrize("known", [False, True])
def test_r08_a_packet_of_a_hundred_thousand_filters_keeps_nobody_waiting(bench: Bench, known: bool) -> None:
    """The work is counted: a thousand comparisons for each filter would be a hundred million calls."""
    client = bench.client("c", version=5)
    assert client.subscribe(*[f"{i:05}" for i in range(1000)]) == [0] * 1000
    filters = [f"{i % 1000 if known else i + 1000:05}".encode() for i in range(100_000)]
    calls = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for packet in (
        packets.encode_subscribe(1, 5, [(filter, 1) for filter in filters]),
        packets.encode_unsubscribe(2, 5, filters),
    ):
        calls = 0
        sys.setprofile(profile)
        try:
            client.send(packet)
        finally:
            sys.setprofile(None)
        assert calls < 60 * len(filters)
    granted, gone = client.take()
    assert Counter(granted.codes) == ({1: 1000, 0x97: 99_000} if known else {0x97: 100_000})
    assert Counter(gone.codes) == ({0: 1000, 0x11: 99_000} if known else {0x11: 100_000})
    assert bench.engine.router.count == (0 if known else 1000)


def test_subscribing_again_replaces_the_subscription(bench: Bench) -> None:
    s = bench.client("s", version=5)
    assert s.subscribe("t", qos=2, subscription_identifiers=[1]) == [2]
    assert s.subscribe("t", qos=1, subscription_identifiers=[2]) == [1]
    bench.client("p").publish("t", qos=2)
    (m,) = s.take()
    assert (m.qos, m.properties.subscription_identifiers) == (1, [2])
    assert bench.engine.router.count == 1


def test_a_cached_route_notices_every_change_of_subscriptions(bench: Bench) -> None:
    p = bench.client("p")
    s = bench.client("s")
    got = []
    for filter in ("a/b", "a/+", "+/b", "#", "a/#", "+/+", "a/b/#", "+/#"):
        p.publish("a/b")
        assert not s.take()
        s.subscribe(filter)
        p.publish("a/b")
        got.append(len(s.take()))
        s.send(packets.encode_unsubscribe(1, 4, [filter.encode()]))
        s.take()
    assert got == [1] * 8
    p.publish("a/b")
    assert not s.take()


@pytest.mark.parametrize("order", [("a", "b", "c"), ("b", "a", "c"), ("b", "c", "a"), ("c", "b", "a")])
def test_z07_every_filter_of_a_subscribe_is_judged_alone(bench: Bench, order: tuple[str, ...]) -> None:
    bench.gate.deny_subscribe.add(("u", "b"))
    for version, refused in ((5, 0x87), (4, 0x80)):
        client = bench.client("c", version=version, username="u")
        assert client.subscribe(*order, qos=1) == [refused if f == "b" else 1 for f in order]
        p = bench.client("p")
        for topic in order:
            p.publish(topic, topic.encode())
        assert sorted(payloads(client)) == [b"a", b"c"]


def test_z09_a_denied_topic_below_an_allowed_filter_is_never_delivered_on_any_path(bench: Bench) -> None:
    bench.gate.deny_receive.add(("u", "a/secret"))
    p = bench.client("p")
    p.publish("a/secret", b"retained", retain=True)
    p.publish("a/open", b"retained", retain=True)
    live = bench.client("live", version=5, username="u")
    assert live.subscribe("a/#", qos=1) == [1]
    assert [m.topic for m in live.after_suback] == [b"a/open"]
    durable = bench.client("durable", username="u", clean=False)
    durable.subscribe("a/#", qos=1)
    durable.take()
    durable.drop()
    member = bench.client("member", version=5, username="u")
    assert member.subscribe("$share/g/a/#", qos=1) == [1]
    for topic in ("a/secret", "a/open", "a/secret"):
        p.publish(topic, b"live", 1)
    assert [m.topic for m in live.take()] == [b"a/open"]
    assert [m.topic for m in member.take()] == [b"a/open"]
    again = resume(bench, "durable", username="u")
    assert [m.topic for m in again.take()[1:]] == [b"a/open"]


def test_z09_a_shared_message_goes_to_a_member_that_may_have_it(bench: Bench) -> None:
    bench.gate.deny_receive.add(("u", "a/secret"))
    denied = [bench.client(f"d{i}", version=5, username="u") for i in range(3)]
    allowed = bench.client("x", version=5)
    for client in (*denied, allowed):
        client.subscribe("$share/g/a/#", qos=1)
    p = bench.client("p")
    for i in range(8):
        p.publish("a/secret", b"%d" % i, 1)
    assert payloads(allowed) == [b"%d" % i for i in range(8)]
    assert not any(client.take() for client in denied)


def test_z10_a_shared_filter_is_judged_by_what_it_shares(bench: Bench) -> None:
    bench.gate.deny_subscribe.add(("u", "denied"))
    client = bench.client("c", version=5, username="u")
    assert client.subscribe("$share/g/denied", "$share/g/other") == [0x87, 0]
    assert list(bench.engine.groups) == [(b"g", b"other")]


def test_z11_a_will_its_client_may_not_write_is_refused_at_connect(bench: Bench) -> None:
    bench.gate.deny_publish.add(("u", "w"))
    will = Will(b"w", b"x", 0, False, None)
    old = bench.client("c", version=5, username="u", session_expiry_interval=100)
    assert bench.client("c", version=5, username="u", will=will).connack.code == 0x87
    assert not old.closed, "a refused CONNECT does not take the client id over"
    assert bench.client("d", username="u", will=will).connack.code == 5
    assert bench.client("e", username="v", will=will).connack.code == 0


def test_z12_a_will_is_not_published_when_the_right_to_it_is_gone(bench: Bench) -> None:
    watcher = bench.client("watcher")
    watcher.subscribe("w")
    banned = bench.client("b", username="u", will=Will(b"w", b"x", 0, True, None))
    cut = bench.client("c", username="u", will=Will(b"w", b"x", 0, True, None))
    bench.gate.deny_publish.add(("u", "w"))
    bench.engine.rights_changed()
    assert bench.engine.kick("b")
    bench.settle()
    cut.drop()
    assert banned.closed
    assert not watcher.take()
    assert bench.engine.retained_store.count == 0
    assert bench.engine.core.dropped == {"unauthorized": 2}


def test_z13_a_retained_message_is_withheld_when_its_publisher_lost_the_right_to_write() -> None:
    for check in (True, False):
        bench = Bench(check_retain_source=check)
        bench.client("p", username="u").publish("t", b"m", retain=True)
        bench.client("q").publish("t/q", b"m", retain=True)
        bench.gate.deny_publish.add(("u", "t"))
        bench.engine.rights_changed()
        s = bench.client("s")
        s.subscribe("t/#")
        assert sorted(m.topic for m in s.after_suback) == ([b"t/q"] if check else [b"t", b"t/q"])


@pytest.mark.parametrize("one", [True, False])
def test_z14_rights_taken_away_hold_at_once_online(bench: Bench, one: bool) -> None:
    s = bench.client("s", version=5, username="u")
    s.subscribe("t", "a/#", qos=1)
    p = bench.client("p")
    p.publish("t", b"1")
    p.publish("a/b", b"1")
    assert len(s.take()) == 2
    bench.gate.deny_subscribe.add(("u", "t"))
    bench.gate.deny_receive.update({("u", "a/b"), ("u", "t")})
    bench.engine.rights_changed("s" if one else None)
    p.publish("t", b"2")
    p.publish("a/b", b"2")
    p.publish("a/c", b"2")
    assert [m.topic for m in s.take()] == [b"a/c"]
    assert [sub.filter for sub in bench.engine.sessions["s"].subscriptions or ()] == [b"a/#"]
    assert bench.engine.core.events["subscription_revoked"] == 1


def test_z14_what_queues_for_an_offline_client_is_withheld(bench: Bench) -> None:
    s = bench.client("s", username="u", clean=False)
    s.subscribe("t", "k", qos=1)
    s.drop()
    p = bench.client("p")
    for topic in ("t", "k", "t"):
        p.publish(topic, topic.encode(), 1)
    bench.gate.deny_subscribe.add(("u", "t"))
    bench.gate.deny_receive.add(("u", "t"))
    bench.engine.rights_changed("s")
    assert bench.engine.sessions["s"].queued == 1
    s = resume(bench, "s", username="u")
    assert [m.topic for m in s.take()[1:]] == [b"k"]
    p.publish("t", b"later", 1)
    assert not s.take()


def test_z14_rights_are_looked_at_again_when_a_session_is_resumed(bench: Bench) -> None:
    """Without a word of the gate: the user has other rights at the new login."""
    bench.engine.core.limits.shared_client_ids = True
    s = bench.client("s", username="u", clean=False)
    s.subscribe("t", "k", "a/#", qos=1)
    s.drop()
    p = bench.client("p")
    for topic in ("t", "k", "a/b"):
        p.publish(topic, b"offline", 1)
    bench.gate.deny_subscribe.add(("v", "t"))
    bench.gate.deny_receive.update({("v", "t"), ("v", "a/b")})
    s = resume(bench, "s", username="v")
    assert [m.topic for m in s.take()[1:]] == [b"k"]
    for topic in ("t", "k", "a/b", "a/c"):
        p.publish(topic, b"online")
    assert [m.topic for m in s.take()] == [b"k", b"a/c"]


def test_z14_a_right_to_publish_is_asked_once_and_again_after_a_change(bench: Bench) -> None:
    s = bench.client("s")
    s.subscribe("t")
    p = bench.client("p", version=5, username="u")
    for _ in range(50):
        p.publish("t").publish("t", qos=1)
    assert bench.gate.asked == 1
    p.take()
    bench.gate.deny_publish.add(("u", "t"))
    bench.engine.rights_changed("p")
    s.take()
    p.publish("t").publish("t", qos=1)
    assert p.bytes() == ack(PUBACK, 1, 0x87)
    assert not s.take()
    assert bench.gate.asked == 2


@pytest.mark.parametrize("reconnect", [False, True])
def test_z15_a_qos_2_message_is_judged_when_it_is_published(bench: Bench, reconnect: bool) -> None:
    s = bench.client("s")
    s.subscribe("t", qos=2)
    p = bench.client("p", version=5, username="u", clean=False, session_expiry_interval=60)
    p.publish("t", b"1", 2, ident=1)
    assert p.bytes() == ack(PUBREC, 1)
    bench.gate.deny_publish.add(("u", "t"))
    bench.engine.rights_changed("p")
    if reconnect:
        p.drop()
        p = resume(bench, "p", 5, username="u")
        p.take()
        p.publish("t", b"1", 2, ident=1, dup=True)
        assert p.bytes() == ack(PUBREC, 1)
    p.send(ack(PUBREL, 1))
    assert p.bytes() == ack(PUBCOMP, 1)
    p.publish("t", b"2", 2, ident=1)
    assert p.bytes() == ack(PUBREC, 1, 0x87)
    p.send(ack(PUBREL, 1))
    assert p.bytes() == ack(PUBCOMP, 1, 0x92)
    assert payloads(s) == [b"1"]


def test_z16_a_rebound_alias_is_judged_by_its_new_topic(bench: Bench) -> None:
    bench.gate.deny_publish.add((None, "denied"))
    s = bench.client("s")
    s.subscribe("#")
    p = bench.client("p", version=5)
    alias = b"\x23\x00\x01"
    p.send(publish("open", b"1", 1, 1, 5, properties=alias), publish("", b"2", 1, 2, 5, properties=alias))
    p.send(publish("denied", b"3", 1, 3, 5, properties=alias), publish("", b"4", 1, 4, 5, properties=alias))
    p.send(publish("open", b"5", 1, 5, 5, properties=alias), publish("", b"6", 1, 6, 5, properties=alias))
    assert payloads(s) == [b"1", b"2", b"5", b"6"]
    assert [a.code for a in p.take()] == [0, 0, 0x87, 0x87, 0, 0]


def test_several_sessions_of_one_user_are_judged_each_for_itself(bench: Bench) -> None:
    bench.gate.deny_receive.add(("u", "t"))
    denied, allowed = bench.client("d", username="u"), bench.client("a", username="v")
    for client in (denied, allowed):
        client.subscribe("t")
    bench.client("p").publish("t")
    assert not denied.take()
    assert allowed.take()
