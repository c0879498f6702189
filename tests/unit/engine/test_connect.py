"""CONNECT and what it settles: identity, limits, keep-alive, session expiry, take-over, slow gates."""

from __future__ import annotations

import pytest

from broker.engine.listener import ListenerInfo
from broker.mqtt import packets
from broker.mqtt.packets import Will
from tests.unit.engine.harness import Bench, connect_packet, props
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


@pytest.mark.parametrize("version", [4, 5])
def test_p14_a_second_connect_ends_the_connection_and_its_will_is_published_once(bench: Bench, version: int) -> None:
    watcher = bench.client("w")
    watcher.subscribe("will")
    client = bench.client("c", version=version, will=Will(b"will", b"gone", 0, False, None))
    client.send(connect_packet("c", version))
    assert closed_with(client, 0x82)
    assert payloads(watcher) == [b"gone"]
    bench.pass_time(3)
    assert not watcher.take()


def test_p15_nothing_behind_a_connect_is_served_before_the_gate_says_yes(bench: Bench) -> None:
    watcher = bench.client("w")
    watcher.subscribe("#")
    bench.gate.slow.update("cd")
    bench.gate.refuse["mallory"] = 0x87
    client = bench.socket()
    client.version = 5
    client.send(connect_packet("c", 5, username="mallory") + publish("t", b"m", 1, version=5))
    bench.pass_time(2)
    assert not client.bytes()
    bench.gate.answer(*bench.gate.pending.pop("c"))
    bench.settle()
    (answer,) = client.take()
    assert answer.code == 0x87
    assert client.closed
    assert not watcher.take()
    good = bench.socket()
    good.send(connect_packet("d") + publish("t", b"1", 1), publish("t", b"2", 1, 2))
    assert not watcher.take()
    bench.gate.answer(*bench.gate.pending.pop("d"))
    bench.settle()
    assert payloads(watcher) == [b"1", b"2"]
    assert good.bytes() == b"\x20\x02\x00\x00" + ack(PUBACK, 1) + ack(PUBACK, 2)


@pytest.mark.parametrize("glued", [False, True])
def test_p16_a_client_that_goes_on_while_the_gate_thinks_is_no_longer_read(bench: Bench, glued: bool) -> None:
    bench.gate.slow.add("c")
    client = bench.socket()
    client.version = 5
    first = connect_packet("c", 5)
    flood = publish("t", b"x" * 1000, version=5) * 100
    pieces = [flood[i : i + 1000] for i in range(0, len(flood), 1000)]
    if glued:
        pieces[0] = first + pieces[0]
    else:
        client.send(first)
    for piece in pieces:
        if not client.link.reading:
            break
        client.send(piece)
        assert client.channel.have <= 65_536 + 1000
    assert not client.link.reading
    assert not client.bytes()
    bench.pass_time(9)
    assert not client.closed
    bench.pass_time(2)
    assert client.closed
    (answer,) = client.take()
    assert answer.code == 0x88
    assert client.channel.pieces is None
    assert not bench.gate.pending
    assert is_empty(bench.engine)


def test_p16_reading_goes_on_when_the_gate_has_answered(bench: Bench) -> None:
    watcher = bench.client("w")
    watcher.subscribe("t")
    bench.gate.slow.add("c")
    client = bench.socket()
    client.send(connect_packet("c"), publish("t", b"x" * 1000) * 100)
    assert not client.link.reading
    bench.gate.answer(*bench.gate.pending.pop("c"))
    bench.settle()
    assert client.link.reading
    assert len(payloads(watcher)) == 100


def test_an_answer_of_the_gate_that_comes_too_late_or_twice_changes_nothing(bench: Bench) -> None:
    bench.gate.slow.add("c")
    client = bench.socket()
    client.send(connect_packet("c"))
    channel, connect = bench.gate.pending["c"]
    client.drop()
    assert not bench.gate.pending
    bench.gate.answer(channel, connect)
    assert is_empty(bench.engine)
    live = bench.client("d")
    live.channel.refuse(0x87)
    bench.settle()
    assert not live.closed
    assert not live.bytes()


@pytest.mark.parametrize(("version", "clean", "code"), [(3, True, 2), (3, False, 2), (4, True, 0), (4, False, 2)])
def test_p21_an_empty_client_id_before_mqtt_5(bench: Bench, version: int, clean: bool, code: int) -> None:
    client, other = (bench.client("", version=version, clean=clean) for _ in range(2))
    for one in (client, other):
        assert one.connack.code == code
        assert one.closed == (code != 0)
    assert len(bench.engine.sessions) == (0 if code else 2), "each has a name of its own"
    assert all(bench.engine.sessions)


@pytest.mark.parametrize("clean", [True, False])
def test_p21_mqtt_5_is_told_the_client_id_it_was_given(bench: Bench, clean: bool) -> None:
    client = bench.client("", version=5, clean=clean)
    name = client.connack.properties.assigned_client_identifier
    assert list(bench.engine.sessions) == [name]
    assert client.channel.principal.clientid == name
    other = bench.client("", version=5, clean=clean)
    assert other.connack.properties.assigned_client_identifier not in (name, None)
    named = bench.client("n", version=5)
    assert named.connack.properties.assigned_client_identifier is None


def test_a_client_id_that_is_too_long_or_reserved_for_workers_is_refused() -> None:
    bench = Bench(max_clientid_length=8)
    assert bench.client("x" * 8, version=5).connack.code == 0
    assert bench.client("x" * 9, version=5).connack.code == 0x85
    assert bench.client("isthmus/").connack.code == 2
    assert bench.client("isthmus/", privileged=True).connack.code == 0


@pytest.mark.parametrize("version", [4, 5])
def test_a_client_id_belongs_to_the_user_whose_session_it_is(version: int) -> None:
    for shared in (False, True):
        bench = Bench(shared_client_ids=shared)
        first = bench.client("c", version=version, username="ann")
        second = bench.client("c", version=version, username="bob")
        assert first.closed == shared
        assert second.connack.code == (0 if shared else 0x85 if version == 5 else 2)
        assert any(category == "client_id_taken" for category, _ in bench.reports) != shared


def test_a_client_id_is_free_for_others_once_its_session_has_expired(bench: Bench) -> None:
    bench.client("c", version=5, username="ann", session_expiry_interval=10).drop()
    assert bench.client("c", version=5, username="bob").connack.code == 0x85
    bench.pass_time(11)
    assert bench.client("c", version=5, username="bob").connack.code == 0


@pytest.mark.parametrize(("asked", "given"), [(0, 300), (65535, 300), (301, 300), (300, None), (10, None)])
def test_p63_keep_alive_is_bounded_by_the_server(asked: int, given: int | None) -> None:
    bench = Bench(max_keepalive=300)
    five = bench.client("five", version=5, keep_alive=asked)
    assert five.connack.properties.server_keep_alive == given
    four = bench.client("four", keep_alive=asked)
    limit = (given or asked) * 1.5
    bench.pass_time(limit - 1, 1.0)
    assert not five.closed
    assert not four.closed
    bench.pass_time(3, 1.0)
    assert closed_with(five, 0x8D)
    assert closed_with(four, 0x8D)


@pytest.mark.parametrize(("asked", "code"), [(0, 2), (65_535, 2), (301, 2), (300, 0), (1, 0)])
def test_p63_a_client_of_mqtt_3_may_be_refused_instead(asked: int, code: int) -> None:
    bench = Bench(max_keepalive=300, max_keepalive_policy="refuse")
    assert bench.client("four", keep_alive=asked).connack.code == code
    assert bench.client("five", version=5, keep_alive=asked).connack.code == 0


def test_p63_without_a_bound_keep_alive_0_means_never(bench: Bench) -> None:
    client = bench.client("c", version=5)
    assert client.connack.properties.server_keep_alive is None
    bench.pass_time(200_000, 5000.0)
    assert not client.closed


def test_p64_what_the_server_sends_does_not_count_for_keep_alive(bench: Bench) -> None:
    client = bench.client("c", version=5, keep_alive=10)
    client.subscribe("t")
    busy = bench.client("busy", keep_alive=10)
    for _ in range(14):
        bench.pass_time(1)
        bench.client("p").publish("t")
        busy.send(b"\xc0\x00")
    assert not client.closed
    bench.pass_time(2)
    assert client.closed
    assert client.take()[-1].code == 0x8D
    assert not busy.closed
    assert bench.engine.core.events["keep_alive_timeout"] == 1


def test_p65_an_authentication_method_nobody_knows_is_refused(bench: Bench) -> None:
    client = bench.client("c", version=5, authentication_method="SCRAM-SHA-1", authentication_data=b"x")
    assert client.connack.code == 0x8C
    assert client.closed


def test_p65_the_deadline_of_connect_is_absolute(bench: Bench) -> None:
    silent, dripping = bench.socket(), bench.socket()
    packet = connect_packet("c", 5)
    bench.gate.slow.add("slow")
    slow = bench.socket()
    slow.version = 5
    slow.send(connect_packet("slow", 5))
    for i in range(9):
        dripping.send(packet[i : i + 1])
        bench.pass_time(1)
    assert not silent.closed
    assert not dripping.closed
    bench.pass_time(2)
    assert silent.closed
    assert dripping.closed
    assert not silent.bytes()
    assert not dripping.bytes()
    assert closed_with(slow, 0x88)


def test_p36_auth_after_login_is_refused(bench: Bench) -> None:
    five, four = bench.client("five", version=5), bench.client("four")
    for client in (five, four):
        client.send(packets.encode_auth(0x19, props(authentication_method="m")))
        assert closed_with(client, 0x82)


def test_p44_a_receive_maximum_of_0_is_refused(bench: Bench) -> None:
    client = bench.client("c", version=5, receive_maximum=0)
    assert client.connack.code == 0x82
    assert client.closed


def test_p44_what_is_sent_again_keeps_to_the_new_receive_maximum(bench: Bench) -> None:
    client = bench.client("c", version=5, clean=False, session_expiry_interval=100)
    client.subscribe("t", qos=2)
    p = bench.client("p")
    for i in range(6):
        p.publish("t", b"%d" % i, 1 + i % 2, ident=i + 1)
    assert len(payloads(client)) == 6
    client.drop()
    p.publish("t", b"6", 1, ident=7)
    client = resume(bench, "c", 5, receive_maximum=1, session_expiry_interval=100)
    got = client.take()[1:]
    seen = []
    for _ in range(7):
        (message,) = got
        seen.append((message.payload, message.dup))
        if message.qos == 1:
            client.send(ack(PUBACK, message.packet_id))
        else:
            client.send(ack(PUBREC, message.packet_id))
            assert client.bytes() == ack(PUBREL, message.packet_id)
            client.send(ack(PUBCOMP, message.packet_id))
        got = client.take()
    assert not got
    assert seen == [(b"%d" % i, i < 6) for i in range(7)]


def test_p45_what_is_larger_than_the_client_takes_is_dropped_and_counted(bench: Bench) -> None:
    client = bench.client("c", version=5, clean=False, session_expiry_interval=100)
    client.subscribe("t", qos=1)
    p = bench.client("p")
    p.publish("t", b"flight" * 100, 1, ident=1)
    assert len(client.take()) == 1
    client.drop()
    p.publish("t", b"x" * 1024, 1, ident=2)
    p.publish("t", b"small", 1, ident=3)
    client = resume(bench, "c", 5, maximum_packet_size=20, session_expiry_interval=100)
    assert [m.payload for m in client.take()[1:]] == [b"small"]
    p.publish("t", b"y" * 1024, 0)
    assert not client.take()
    assert bench.engine.core.dropped["too_large"] == 3
    assert bench.engine.sessions["c"].queued == 1


def test_p45_a_client_that_takes_not_even_a_connack_is_closed(bench: Bench) -> None:
    client = bench.client("c", version=5, maximum_packet_size=1)
    assert client.closed
    assert client.connack is None
    assert is_empty(bench.engine)
    zero = bench.client("z", version=5, maximum_packet_size=0)
    assert zero.connack.code == 0x82


def test_p56_only_the_newest_connection_owns_a_client_id_and_the_pace_is_limited(bench: Bench) -> None:
    connected = []
    for second in range(3):
        codes = []
        for i in range(50):
            client = bench.client("c", version=5, session_expiry_interval=60)
            codes.append(client.connack.code)
            if client.connack.code == 0:
                client.subscribe(f"t/{i % 3}")
                connected.append(client)
            else:
                assert client.closed
            assert len(bench.engine.sessions) == 1
            assert sum(not one.closed for one in connected) == 1
        granted = codes.count(0)
        assert granted == (11 if second == 0 else 10)
        assert set(codes) == {0, 0x9F}
        bench.pass_time(1)
    for loser in connected[:-1]:
        assert loser.take()[-1].code == 0x8E
    assert bench.engine.connected == 1
    connected[-1].drop()
    bench.pass_time(200)
    assert is_empty(bench.engine)
    assert not bench.engine._takeovers


def test_p57_qos_2_completes_once_on_the_connection_that_took_over(bench: Bench) -> None:
    s = bench.client("s", version=5, session_expiry_interval=60)
    s.subscribe(("t", 0x08 | 2))
    c = bench.client("c", version=5, session_expiry_interval=60)
    c.publish("t", b"m", 2, ident=5, retain=True)
    assert c.bytes() == ack(PUBREC, 5)
    (m,) = s.take()
    assert (m.qos, m.retain, m.dup) == (2, True, False)
    again = resume(bench, "s", 5, session_expiry_interval=60)
    assert closed_with(s, 0x8E)
    _, m2 = again.take()
    assert (m2.packet_id, m2.qos, m2.retain, m2.dup) == (m.packet_id, 2, True, True)
    again.send(ack(PUBREC, m.packet_id))
    assert again.bytes() == ack(PUBREL, m.packet_id)
    third = resume(bench, "s", 5, session_expiry_interval=60)
    assert [type(x).__name__ for x in third.take()] == ["Connack", "Ack"]
    third.send(ack(PUBCOMP, m.packet_id))
    publisher = resume(bench, "c", 5, session_expiry_interval=60)
    publisher.take()
    publisher.publish("t", b"m", 2, ident=5, retain=True, dup=True)
    assert publisher.bytes() == ack(PUBREC, 5)
    publisher.send(ack(PUBREL, 5))
    assert publisher.bytes() == ack(PUBCOMP, 5)
    assert not third.take()
    assert bench.engine.sessions["s"].queued == 0


def test_clean_start_forgets_the_session_that_was_there(bench: Bench) -> None:
    client = bench.client("c", clean=False)
    client.subscribe("t", qos=1)
    client.drop()
    bench.client("p").publish("t", b"m", 1)
    fresh = bench.client("c", clean=True)
    assert not fresh.connack.session_present
    assert not fresh.take()
    bench.client("p").publish("t", b"m", 1)
    assert not fresh.take()
    fresh.drop()
    assert bench.engine.router.count == 0
    assert not resume(bench, "c").take()[0].session_present


def test_session_expiry_is_bounded_and_the_client_told(bench: Bench) -> None:
    for asked, told, lives in ((None, None, 0), (0, None, 0), (100, None, 100), (0xFFFFFFFF, 7200, 7200)):
        values = {} if asked is None else {"session_expiry_interval": asked}
        client = bench.client("c", version=5, **values)
        assert client.connack.properties.session_expiry_interval == told
        client.drop()
        if lives:
            bench.pass_time(lives - 1, 50.0)
            assert "c" in bench.engine.sessions
            bench.pass_time(2)
        assert "c" not in bench.engine.sessions


def test_disconnect_may_change_the_session_expiry_but_not_begin_one(bench: Bench) -> None:
    def leave(expiry: int | None, **connect: int) -> bool:
        client = bench.client("c", version=5, clean=False, **connect)
        client.send(packets.encode_disconnect(5, 0, props(session_expiry_interval=expiry)))
        assert client.closed
        return "c" in bench.engine.sessions

    assert not leave(0, session_expiry_interval=100)
    assert leave(5, session_expiry_interval=100)
    bench.pass_time(6)
    assert "c" not in bench.engine.sessions
    assert leave(500, session_expiry_interval=100)
    bench.pass_time(499, 10.0)
    assert "c" in bench.engine.sessions
    bench.pass_time(10)
    assert "c" not in bench.engine.sessions
    client = bench.client("c", version=5)
    client.send(packets.encode_disconnect(5, 0, props(session_expiry_interval=10)))
    assert closed_with(client, 0x82)
    assert "c" not in bench.engine.sessions


def test_a_session_that_is_resumed_in_time_does_not_expire(bench: Bench) -> None:
    bench.client("c", version=5, session_expiry_interval=10).drop()
    bench.pass_time(8)
    client = resume(bench, "c", 5, session_expiry_interval=10)
    assert client.take()[0].session_present
    bench.pass_time(60)
    assert "c" in bench.engine.sessions
    assert not client.closed


def test_a_client_may_come_back_with_another_version_to_what_is_in_flight(bench: Bench) -> None:
    five = bench.client("c", version=5, clean=False, session_expiry_interval=100)
    five.subscribe("t", qos=1)
    bench.client("p").publish("t", b"m", 1)
    (sent,) = five.take()
    five.drop()
    four = resume(bench, "c")
    _, again = four.take()
    assert (again.topic, again.payload, again.packet_id, again.dup) == (b"t", b"m", sent.packet_id, True)
    four.drop()
    five = resume(bench, "c", 5)
    assert five.take()[1].payload == b"m"


def test_limits_of_the_server_are_announced(bench: Bench) -> None:
    bench.listener = ListenerInfo("small", max_packet_size=5000)
    answer = bench.client("c", version=5).connack.properties
    assert answer.receive_maximum == 1024
    assert answer.maximum_packet_size == 5000
    assert answer.topic_alias_maximum == 16
    assert bench.client("d").connack.properties is None
