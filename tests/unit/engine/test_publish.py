"""What a client may publish and in which state: topics, identifiers, windows, aliases, expiry."""

from __future__ import annotations

import pytest

from broker.mqtt import packets
from broker.mqtt.properties import user_property
from tests.unit.engine.harness import Bench, Client, connect_packet, props
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack, closed_with, payloads, publish, resume


@pytest.fixture
def bench() -> Bench:
    return Bench()


def alias(number: int) -> bytes:
    return b"\x23" + number.to_bytes(2, "big")


def expiry(seconds: int) -> bytes:
    return b"\x02" + seconds.to_bytes(4, "big")


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("topic", ["a/#", "#", "+", "a/+/b", "a+"])
def test_p25_a_topic_name_has_no_wildcards(bench: Bench, version: int, qos: int, topic: str) -> None:
    client = bench.client("c", version=version)
    client.publish(topic, qos=qos)
    assert closed_with(client, 0x90)


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_p26_a_topic_name_is_not_empty(bench: Bench, version: int, qos: int) -> None:
    client = bench.client("c", version=version)
    client.publish("", qos=qos)
    assert closed_with(client, 0x82)


@pytest.mark.parametrize("topic", ["x" * 65535, "/" * 65535, "a/" * 128 + "a", "x" * 4097])
def test_p27_a_topic_over_the_limits_is_refused_and_counted(bench: Bench, topic: str) -> None:
    watcher = bench.client("w")
    watcher.subscribe("#")
    five, four = bench.client("five", version=5), bench.client("four")
    for qos, first in ((1, PUBACK), (2, PUBREC)):
        five.publish(topic, qos=qos, ident=qos)
        assert five.bytes() == ack(first, qos, 0x90)
        four.publish(topic, qos=qos, ident=qos)
        assert four.bytes() == ack(first, qos)
    four.publish(topic)
    assert bench.engine.core.dropped == {"invalid_topic": 5}
    assert five.subscribe(topic) == [0x8F]
    assert four.subscribe(topic) == [0x80]
    assert not watcher.take()
    assert not bench.engine.sessions["five"].rights, "what is refused for its length is not kept"
    assert not bench.engine.router.entries


def test_p27_a_topic_at_the_limits_is_served(bench: Bench) -> None:
    watcher = bench.client("w")
    assert watcher.subscribe("+/" * 127 + "+", "#") == [0, 0]
    client = bench.client("c")
    client.publish("a/" * 127 + "a")
    client.publish("x" * 4096)
    assert len(watcher.take()) == 2


def test_rights_kept_for_a_session_are_bounded_in_bytes(bench: Bench) -> None:
    bench.gate.deny_publish.update((None, f"{i:04}/" + "x" * 4000) for i in range(5000))
    client = bench.client("c")
    for i in range(5000):
        client.channel.feed(publish(f"{i:04}/" + "x" * 4000))
    held = bench.engine.sessions["c"].rights
    assert held is not None
    assert sum(map(len, held)) <= 17 << 20
    assert bench.engine.core.dropped == {"unauthorized": 5000}


@pytest.mark.parametrize(
    "raw", ["34 05 00 01 61 00 00", "36 05 00 01 61 00 01", "38 03 00 01 61", "3a 05 00 01 61 00 00"]
)
def test_p33_impossible_flags_and_identifiers_end_the_connection(bench: Bench, raw: str) -> None:
    for version in (3, 4):
        client = bench.client("c", version=version)
        client.send(bytes.fromhex(raw))
        assert closed_with(client, 0)
    five = bench.client("five", version=5)
    data = bytes.fromhex(raw)
    five.send(data[:1] + bytes((data[1] + 1,)) + data[2:] + b"\x00")
    assert five.closed
    assert five.take()[-1].code in (0x81, 0x82)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("qos", "answers"), [(1, (PUBREC,)), (1, (PUBCOMP,)), (2, (PUBACK,)), (2, (PUBCOMP,)), (2, (PUBREC, PUBACK))]
)
def test_p37_an_acknowledgement_of_the_wrong_kind_ends_the_connection(
    bench: Bench, version: int, qos: int, answers: tuple[int, ...]
) -> None:
    s = bench.client("s", version=version, clean=False, **({"session_expiry_interval": 60} if version == 5 else {}))
    s.subscribe("t", qos=2)
    bench.client("p").publish("t", b"m", qos)
    (m,) = s.take()
    for first in answers[:-1]:
        s.send(ack(first, m.packet_id))
        s.take()
    s.send(ack(answers[-1], m.packet_id))
    assert closed_with(s, 0x82)
    assert bench.engine.sessions["s"].queued == 1
    again = resume(bench, "s", version)
    assert again.take()[1].packet_id == m.packet_id


def test_p38_acknowledgements_of_unknown_identifiers(bench: Bench) -> None:
    five, four = bench.client("five", version=5), bench.client("four")
    five.send(ack(PUBREC, 9))
    assert five.bytes() == ack(PUBREL, 9, 0x92)
    five.send(ack(PUBREL, 9))
    assert five.bytes() == ack(PUBCOMP, 9, 0x92)
    four.send(ack(PUBREC, 9))
    assert four.bytes() == ack(PUBREL, 9)
    four.send(ack(PUBREL, 9))
    assert four.bytes() == ack(PUBCOMP, 9)
    for client in (five, four):
        client.send(ack(PUBACK, 9), ack(PUBCOMP, 9))
        assert not client.bytes()
        assert not client.closed
        assert bench.engine.sessions[client.channel.client_id].queued == 0
    five.send(ack(PUBACK, 9, 0x10), ack(PUBREC, 9, 0x80))
    assert not five.bytes()
    assert bench.engine.core.events["unknown_ack"] == 5


@pytest.mark.parametrize("version", [4, 5])
def test_p38_they_free_no_place_in_either_window(version: int) -> None:
    bench = Bench(receive_maximum=2, max_inflight=2)
    s = bench.client("s", version=version, **({"receive_maximum": 2} if version == 5 else {}))
    s.subscribe("t", qos=2)
    p = bench.client("p")
    for i in range(4):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    one, two = s.take()
    unknown = next(i for i in range(1, 9) if i not in (one.packet_id, two.packet_id))
    s.send(*(ack(first, unknown) for first in (PUBACK, PUBREC, PUBCOMP, PUBREL)))
    assert not payloads(s)
    s.send(ack(PUBACK, one.packet_id))
    assert payloads(s) == [b"2"]
    s.send(*(publish("x", b"", 2, i, version) for i in (1, 2)), ack(PUBREL, 3), publish("x", b"", 2, 3, version))
    if version == 5:
        assert closed_with(s, 0x93), "only the identifiers it has used give their places back"
    else:
        assert bench.engine.sessions["s"].received_count == 3


def test_p39_an_acknowledgement_just_before_the_end_counts(bench: Bench) -> None:
    s = bench.client("s", clean=False)
    s.subscribe("t", qos=1)
    p = bench.client("p")
    for i in range(1000):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    sent = s.take()
    assert len(sent) == 32
    s.channel.feed(ack(PUBACK, sent[0].packet_id))
    s.drop()
    assert payloads(resume(bench, "s"))[:32] == [b"%d" % i for i in range(1, 33)]


def test_p40_identifiers_are_not_used_again_within_a_burst(bench: Bench) -> None:
    s = bench.client("s", version=5, receive_maximum=100)
    s.subscribe("t", qos=1)
    p = bench.client("p")
    seen: list[int] = []
    for _ in range(7):
        p.send(b"".join(publish("t", qos=1, ident=i + 1) for i in range(100)))
        idents = [m.packet_id for m in s.take()]
        assert len(idents) == 100
        seen += idents
        s.send(b"".join(ack(PUBACK, i) for i in reversed(idents)))
    assert len(set(seen)) == 700


def test_identifiers_wrap_around_and_spare_those_still_in_flight(bench: Bench) -> None:
    s = bench.client("s", version=5, receive_maximum=3)
    s.subscribe("t", qos=1)
    p = bench.client("p")
    p.publish("t", b"stuck", 1)
    (stuck,) = s.take()
    seen = set()
    frames = publish("t", qos=1) * 2
    for _ in range(32768):
        p.channel.feed(frames)
        bench.settle()
        data = s.bytes()
        half = len(data) // 2
        idents = {data[5] << 8 | data[6], data[half + 5] << 8 | data[half + 6]}
        seen |= idents
        s.channel.feed(b"".join(ack(PUBACK, i) for i in idents))
    assert stuck.packet_id not in seen
    assert 0 not in seen
    assert max(seen) == 65535
    assert len(seen) > 50_000


@pytest.mark.parametrize("version", [4, 5])
def test_p41_a_repeated_qos_2_publish_is_routed_once(bench: Bench, version: int) -> None:
    s = bench.client("s")
    s.subscribe("t", qos=2)
    p = bench.client("p", version=version)
    burst = b"".join(publish("t", b"%d" % i, 2, 7, version) for i in range(1000))
    for _ in range(20):
        p.send(burst)
        assert p.bytes() == ack(PUBREC, 7) * 1000
    assert payloads(s) == [b"0"]
    assert bench.engine.sessions["p"].received_count == 1
    p.send(ack(PUBREL, 7))
    assert p.bytes() == ack(PUBCOMP, 7)
    assert bench.engine.sessions["p"].received_count == 0


def test_p42_mqtt_3_may_leave_every_qos_2_identifier_unreleased(bench: Bench) -> None:
    s = bench.client("s")
    s.subscribe("t")
    p = bench.client("p")
    for start in range(1, 65536, 5000):
        p.send(b"".join(publish("t", b"m", 2, i) for i in range(start, min(start + 5000, 65536))))
        assert p.link.reading
    assert not p.closed
    assert len(p.bytes()) == 4 * 65535
    assert bench.engine.sessions["p"].received_count == 65535
    p.send(publish("t", b"n", 1, 1))
    assert p.bytes() == ack(PUBACK, 1)


@pytest.mark.parametrize("glued", [False, True])
def test_p42_mqtt_5_keeps_to_the_receive_maximum(bench: Bench, glued: bool) -> None:
    p = bench.client("p", version=5)
    bench.client("s").subscribe("t")
    frames = [publish("t", b"m", 2, i, 5) for i in range(1, 1025)]
    p.send(*([b"".join(frames)] if glued else frames))
    assert p.bytes() == b"".join(ack(PUBREC, i) for i in range(1, 1025))
    p.send(ack(PUBREL, 1), publish("t", b"m", 2, 1, 5))
    assert p.bytes() == ack(PUBCOMP, 1) + ack(PUBREC, 1)
    p.publish("t", b"m", 2, ident=1025)
    assert closed_with(p, 0x93)


@pytest.mark.parametrize("subscribed", [False, True])
def test_p43_a_window_of_qos_1_in_one_read_is_allowed_and_one_more_is_not(bench: Bench, subscribed: bool) -> None:
    if subscribed:
        bench.client("s").subscribe("t")
    p = bench.client("p", version=5)
    p.send(b"".join(publish("t", b"m", 1, i, 5) for i in range(1, 1025)))
    assert not p.closed
    assert len(p.take()) == 1024
    p.send(b"".join(publish("t", b"m", 1, i, 5) for i in range(1, 1026)))
    assert closed_with(p, 0x93)


def test_p43_the_window_of_a_new_connection_starts_full(bench: Bench) -> None:
    p = bench.client("p", version=5, clean=False, session_expiry_interval=100)
    bench.client("s").subscribe("t")
    p.send(b"".join(publish("t", b"m", 2, i, 5) for i in range(1, 1025)))
    p.drop()
    p = resume(bench, "p", 5)
    p.send(publish("t", b"m", 2, 2000, 5))
    assert p.take()[-1].packet_id == 2000
    assert not p.closed


def test_p43_refused_messages_do_not_use_up_the_window(bench: Bench) -> None:
    bench.gate.deny_publish.add((None, "secret"))
    p = bench.client("p", version=5)
    for i in range(1, 3000):
        p.publish("secret", b"m", 1 + i % 2, ident=i)
    assert not p.closed
    assert {a.code for a in p.take()} == {0x87}


def test_p51_topic_aliases_of_a_client(bench: Bench) -> None:
    s = bench.client("s")
    s.subscribe("#")
    p = bench.client("p", version=5, clean=False, session_expiry_interval=60)
    p.publish("a", b"1", properties=alias(1))
    p.publish("", b"2", properties=alias(1))
    p.publish("", b"3", 1, properties=alias(1))
    p.publish("b", b"4", properties=alias(1))
    p.publish("", b"5", properties=alias(1))
    assert [(m.topic, m.payload) for m in s.take()] == [
        (b"a", b"1"), (b"a", b"2"), (b"a", b"3"), (b"b", b"4"), (b"b", b"5")
    ]  # fmt: skip
    p.drop()
    again = resume(bench, "p", 5, session_expiry_interval=60)
    again.take()
    again.publish("", b"6", properties=alias(1))
    assert closed_with(again, 0x82)
    for number, topic, code in ((0, "a", 0x94), (17, "a", 0x94), (16, "", 0x82)):
        client = bench.client("x", version=5)
        client.publish(topic, b"m", properties=alias(number))
        assert closed_with(client, code)
    assert not s.take()


def test_topic_aliases_towards_a_client_stay_within_its_maximum(bench: Bench) -> None:
    s = bench.client("s", version=5, topic_alias_maximum=2)
    s.subscribe("#", qos=1)
    p = bench.client("p")

    def sent(topic: str, qos: int) -> tuple[bytes, int | None]:
        p.publish(topic, b"m", qos)
        (m,) = s.take()
        if qos:
            s.send(ack(PUBACK, m.packet_id))
        return m.topic, m.properties.topic_alias if m.properties else None

    assert sent("a", 0) == (b"a", 1)
    assert sent("a", 0) == (b"", 1)
    assert sent("b", 1) == (b"b", 2)
    assert sent("b", 1) == (b"", 2)
    assert sent("c", 1) == (b"c", None)
    assert sent("c", 0) == (b"c", None)
    assert sent("a", 1) == (b"", 1)


def test_a_message_sent_again_after_a_reconnect_uses_no_alias_of_the_old_connection(bench: Bench) -> None:
    s = bench.client("s", version=5, clean=False, topic_alias_maximum=5, session_expiry_interval=60)
    s.subscribe("a", qos=1)
    p = bench.client("p", version=5)
    p.publish("a", b"1", 1, ident=1, properties=expiry(100))
    p.publish("a", b"2", 1, ident=2)
    assert [m.topic for m in s.take()] == [b"a", b""]
    s.drop()
    again = resume(bench, "s", 5, topic_alias_maximum=5)
    assert [(m.topic, m.payload) for m in again.take()[1:]] == [(b"a", b"1"), (b"a", b"2")]


def test_p53_a_payload_that_is_said_to_be_text_is_text(bench: Bench) -> None:
    s = bench.client("s", version=5)
    s.subscribe("t", qos=1)
    p = bench.client("p", version=5)
    p.publish("t", b"\xff", 1, ident=1, properties=b"\x01\x01")
    p.publish("t", b"\xff", 2, ident=2, properties=b"\x01\x01")
    p.publish("t", b"\xff", 0, properties=b"\x01\x01")
    assert p.bytes() == ack(PUBACK, 1, 0x99) + ack(PUBREC, 2, 0x99)
    assert not s.take()
    p.publish("t", "ü".encode(), 1, ident=1, properties=b"\x01\x01")
    p.publish("t", b"\xff", 1, ident=2, properties=b"\x01\x00")
    assert [(m.payload, m.properties.payload_format_indicator) for m in s.take()] == [("ü".encode(), 1), (b"\xff", 0)]


def test_p54_a_response_topic_has_no_wildcards(bench: Bench) -> None:
    for topic in (b"a/#", b"+"):
        client = bench.client("c", version=5)
        client.publish("t", properties=b"\x08" + len(topic).to_bytes(2, "big") + topic)
        assert closed_with(client, 0x82)


def test_request_and_response_properties_pass_unchanged(bench: Bench) -> None:
    responder = bench.client("r", version=5)
    responder.subscribe("req", qos=1)
    asker = bench.client("a", version=5, request_response_information=1, request_problem_information=0)
    assert asker.connack.properties.reason_string is None
    asker.subscribe("resp/a")
    block = b"\x08\x00\x06resp/a" + b"\x09\x00\x02\x00\xff" + b"\x03\x00\x04text" + user_property("k", "v")
    asker.publish("req", b"?", 1, properties=block)
    (request,) = responder.take()
    assert request.properties.forward == block
    responder.publish(request.properties.response_topic, b"!", properties=b"\x09\x00\x02\x00\xff")
    answer = asker.take()[-1]
    assert (answer.payload, answer.properties.correlation_data) == (b"!", b"\x00\xff")


def test_p55_what_has_expired_is_dropped_and_what_has_not_says_how_long_it_lives(bench: Bench) -> None:
    s = bench.client("s", version=5, clean=False, session_expiry_interval=100)
    s.subscribe("t", qos=1)
    s.drop()
    p = bench.client("p", version=5)
    for i, seconds in enumerate((0, 1, 2, 10)):
        p.publish("t", b"%d" % seconds, 1, ident=i + 1, properties=expiry(seconds))
    p.publish("t", b"never", 1, ident=9)
    bench.pass_time(3)
    s = resume(bench, "s", 5)
    got = s.take()[1:]
    assert [m.payload for m in got] == [b"10", b"never"]
    assert got[0].properties.message_expiry_interval == 7
    assert got[1].properties is None
    assert bench.engine.core.dropped == {"expired": 3}


def test_p55_an_expiry_of_a_message_delivered_at_once_passes_on(bench: Bench) -> None:
    five, four = bench.client("five", version=5), bench.client("four")
    five.subscribe("t")
    four.subscribe("t")
    bench.client("p", version=5).publish("t", b"m", properties=expiry(30))
    assert five.take()[0].properties.message_expiry_interval == 30
    assert four.take()[0].payload == b"m"


@pytest.mark.parametrize("topic", ["$SYS/x", "$CONTROL/x", "$unknown/x", "$", "$share/g/x"])
def test_p61_only_the_broker_publishes_below_dollar(bench: Bench, topic: str) -> None:
    worker = bench.client("isthmus/w/in", version=5, privileged=True)
    watcher = bench.client("w")
    watcher.subscribe("$SYS/#", "$CONTROL/#", "$unknown/#", "$")
    five, four = bench.client("five", version=5), bench.client("four")
    five.publish(topic, qos=1)
    assert five.bytes() == ack(PUBACK, 1, 0x87)
    four.publish(topic, qos=2).publish(topic)
    assert four.bytes() == ack(PUBREC, 1)
    assert not watcher.take()
    assert bench.engine.core.dropped == {"unauthorized": 3}
    will = packets.Will(topic.encode(), b"w", 0, False, None)
    assert bench.client("v5", version=5, will=will).connack.code == 0x87
    assert bench.client("v4", will=will).connack.code == 5
    assert not {"v4", "v5"} & set(bench.engine.sessions)
    if not topic.startswith("$share"):
        worker.publish(topic)
        assert len(watcher.take()) == 1


def test_p62_wildcards_at_the_root_do_not_see_dollar_topics(bench: Bench) -> None:
    watcher = bench.client("w")
    watcher.subscribe("#", "+/#", "+/broker/#", "+/x")
    system = bench.client("s")
    system.subscribe("$SYS/#", "$SYS/+/x")
    worker = bench.client("isthmus/w/in", version=5, privileged=True)
    worker.publish("$SYS/x", retain=True)
    worker.publish("$SYS/broker/x", retain=True)
    assert not watcher.take()
    assert len(system.take()) == 2
    watcher.subscribe("#", "+/#", "+/broker/#", "+/x")
    assert not watcher.after_suback
    system.subscribe("$SYS/#")
    assert len(system.after_suback) == 2


@pytest.mark.parametrize("version", [4, 5])
def test_p12_a_thousand_packets_cut_in_any_way(version: int) -> None:
    kinds = [publish("t", b"%d" % i, i % 3, i % 50 + 1, version) for i in range(950)]
    released = [ack(PUBREL, i + 1) for i in range(50)]
    stream = b"".join(kinds[:500] + released + kinds[500:])
    results = []
    for size in (len(stream), 1, 7, 1000):
        bench = Bench()
        s = bench.client("s", version=version)
        s.subscribe("t", qos=2)
        p = bench.client("p", version=version)
        p.send(*[stream[i : i + size] for i in range(0, len(stream), size)])
        results.append((p.bytes(), s.bytes(), bench.engine.core.received))
        assert not p.closed
    assert results.count(results[0]) == 4


def _offline(bench: Bench) -> Client:
    s = bench.client("s", version=5, clean=False, session_expiry_interval=100, receive_maximum=2)
    s.subscribe("t", qos=2)
    s.subscribe("u", qos=2)
    return s


def test_p58_after_unsubscribing_what_is_in_flight_finishes_and_what_waits_goes(bench: Bench) -> None:
    s = _offline(bench)
    p = bench.client("p")
    for i in range(6):
        p.publish("u" if i == 5 else "t", b"%d" % i, 1 + i % 2, ident=i + 1)
    one, two = s.take()
    s.send(packets.encode_unsubscribe(9, 5, [b"t", b"nothing"]))
    assert s.take()[0].codes == [0, 0x11]
    assert bench.engine.sessions["s"].queued == 3
    s.send(ack(PUBACK, one.packet_id), ack(PUBREC, two.packet_id))
    last, release = s.take()
    assert (last.payload, release.packet_id) == (b"5", two.packet_id)
    s.send(ack(PUBCOMP, two.packet_id), ack(PUBREC, last.packet_id), ack(PUBCOMP, last.packet_id))
    s.take()
    assert bench.engine.sessions["s"].queued == 0
    assert bench.engine.core.dropped == {"unsubscribed": 3}


def test_p58_resubscribing_at_qos_0_finishes_what_is_in_flight_and_loses_nothing_that_waits(bench: Bench) -> None:
    """What waits is not dropped here: a subscription may be replaced without losing messages, [MQTT-3.8.4-4]."""
    s = _offline(bench)
    p = bench.client("p")
    for i in range(4):
        p.publish("t", b"%d" % i, 1 + i % 2, ident=i + 1)
    one, two = s.take()
    assert s.subscribe("t", qos=0) == [0]
    p.publish("t", b"live", 1, ident=9)
    (live,) = s.take()
    assert (live.qos, live.payload) == (0, b"live")
    s.send(ack(PUBACK, one.packet_id), ack(PUBREC, two.packet_id), ack(PUBCOMP, two.packet_id))
    (waited, release, last) = s.take()
    assert (waited.payload, release.packet_id, last.payload) == (b"2", two.packet_id, b"3")
    s.send(ack(PUBACK, waited.packet_id), ack(PUBREC, last.packet_id), ack(PUBCOMP, last.packet_id))
    session = bench.engine.sessions["s"]
    assert session.queued == 0
    assert session.inflight.count == 0, "every place is free again"
    assert not bench.engine.core.dropped


def test_connect_and_everything_else_may_share_one_segment(bench: Bench) -> None:
    s = bench.socket()
    subscribe = packets.encode_subscribe(3, 4, [(b"t", 1)])
    s.send(connect_packet("s") + subscribe + publish("t", b"m", 1, 5) + b"\xc0\x00" + b"\xe0\x00")
    assert [type(x).__name__ for x in s.take()][:2] == ["Connack", "Suback"]
    assert s.closed


def test_reason_codes_of_a_failed_release_are_understood(bench: Bench) -> None:
    s = bench.client("s", version=5)
    s.subscribe("t", qos=2)
    p = bench.client("p")
    for i in range(2):
        p.publish("t", b"m", 2, ident=i + 1)
    one, two = s.take()
    s.send(packets.encode_ack(5, one.packet_id, 5, 0x97, props(reason_string="full")))
    assert not s.bytes()
    s.send(packets.encode_ack(5, two.packet_id, 5, 0x10))
    assert s.bytes() == ack(PUBREL, two.packet_id)
    assert bench.engine.sessions["s"].queued == 1


def test_p43_in_warn_mode_the_excess_is_only_logged_and_counted() -> None:
    bench = Bench(receive_maximum=1, receive_maximum_policy="warn")
    p = bench.client("p", version=5)
    s = bench.client("s")
    s.subscribe("t")
    p.publish("t", b"1", 2, ident=1).publish("t", b"2", 2, ident=2)
    assert p.bytes() == ack(PUBREC, 1) + ack(PUBREC, 2)
    assert payloads(s) == [b"1", b"2"]
    assert not p.closed
    assert bench.engine.core.events["receive_maximum_exceeded"] == 1
    assert [category for category, _ in bench.reports] == ["receive_maximum"]
