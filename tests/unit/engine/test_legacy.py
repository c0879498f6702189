"""What a member of a `$share` group leaves on disk when its session ends."""

from __future__ import annotations

from collections import Counter

import pytest

from broker.engine import compaction
from broker.engine.spool import LOAD
from broker.mqtt import packets
from tests.unit.engine import parts
from tests.unit.engine.harness import Client, props
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack
from tests.unit.engine.stores import StoredBench, check
from tests.unit.engine.test_journal import resume, subscribed

SHARED = "$share/g/t/#"


def left_behind(count: int = 4, qos: int = 1, **limits: int) -> StoredBench:
    """A group whose only member is away; what was published since is on disk."""
    bench = StoredBench(**{"max_queued_messages": 10_000, **limits})
    a = subscribed(bench, "a", SHARED, "plain", qos=2, version=5, session_expiry_interval=100)
    a.drop()
    publish(bench, count, qos)
    return bench


def publish(bench: StoredBench, count: int, qos: int, topic: str = "t/x") -> None:
    p = bench.client("p")
    for n in range(count):
        p.publish(topic, b"%d" % n, qos, ident=n % 1000 + 1)
        if n % 100 == 99:
            bench.commit()
    bench.commit()
    p.send(packets.encode_disconnect(4, 0, None))


def everything(bench: StoredBench, client: Client) -> list[bytes]:
    """All that a client gets, acknowledged as it comes."""
    found = []
    for _ in range(1000):
        bench.commit()
        bench.pass_time(0.25)
        bench.commit()
        frames = client.reader.feed(client.bytes())
        if not frames:
            return found
        for first, body in frames:
            if first >> 4 == 3:
                packet = packets.decode(first, body, client.version)
                found.append(packet.payload)
                client.send(ack(PUBACK if packet.qos == 1 else PUBREC, packet.packet_id))
            elif first == PUBREL:
                client.send(ack(PUBCOMP, int.from_bytes(body[:2], "big")))
    raise AssertionError("it never ends")


def numbers(count: int) -> list[bytes]:
    return sorted(b"%d" % n for n in range(count))


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("count", [3, 2 * LOAD + 7])
@pytest.mark.parametrize("end", ["expiry", "clean"])
def test_p79_another_member_gets_what_is_on_disk(qos: int, count: int, end: str) -> None:
    bench = left_behind(count, qos)
    publish(bench, 2, 1, "plain")
    b = subscribed(bench, "b", SHARED, qos=2)
    if end == "expiry":
        bench.pass_time(101, 1)
    else:
        a = bench.client("a", version=5, clean=True)
        bench.store.step()
        bench.settle()
        assert not a.take()[0].session_present, "its CONNACK does not wait until everything is given away"
    assert sorted(everything(bench, b)) == numbers(count)
    assert not bench.engine.legacies.sessions
    assert list(bench.journal.spools.values()) == [bench.engine.sessions["b"].spool]
    check(bench)
    again = bench.restart()
    assert set(again.engine.sessions) == {"b"}
    assert everything(again, resume(again, "b")) == []


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("partial", [0, 1])
def test_d01_a_crash_while_it_is_given_away_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, qos: int, partial: int
) -> None:
    """After every commit, whole or torn: each message is with one of the two, and with one only."""
    monkeypatch.setattr("broker.engine.legacy.LOAD", 3)
    monkeypatch.setattr("broker.engine.journal.FRAME", 200)
    count = 10
    bench = left_behind(count, qos)
    subscribed(bench, "b", SHARED, qos=2).drop()
    bench.pass_time(101, 1)
    states = 0
    for _ in range(200):
        again = bench.restart(partial=partial)
        again.pass_time(102, 1)
        assert Counter(everything(again, resume(again, "b"))) == Counter(numbers(count))
        assert not again.engine.legacies.sessions
        check(again)
        states += 1
        bench.settle()
        if bench.store.commits:
            bench.store.step()
        elif bench.store.reads:
            bench.store.step_read()
        elif bench.engine.legacies.sessions or not bench.journal.idle:
            bench.pass_time(0.25)
        else:
            break
    assert states > 10
    assert not bench.engine.legacies.sessions


def test_p79_a_member_that_comes_back_begins_anew_while_its_legacy_waits() -> None:
    bench = left_behind(4)
    subscribed(bench, "b", SHARED, qos=1).drop()
    bench.engine.configure(type(bench.engine.core.limits)(max_queued_messages=0))
    bench.pass_time(101, 1)
    bench.commit()
    assert bench.engine.legacies.sessions, "an absent member without a queue takes nothing"
    bench.engine.configure(type(bench.engine.core.limits)(max_queued_messages=100))
    a = subscribed(bench, "a", "other", version=5, session_expiry_interval=100)
    again = bench.restart()
    assert set(again.engine.sessions) == {"a", "b"}
    assert [s.filter for s in again.engine.sessions["a"].subscriptions or ()] == [b"other"]
    assert sorted(everything(again, resume(again, "b"))) == numbers(4)
    assert everything(again, resume(again, "a", 5, session_expiry_interval=100)) == []
    assert everything(bench, a) == []


def test_p79_what_waits_is_given_at_the_pace_of_the_others() -> None:
    """Their queues are short: nothing is dropped for it."""
    bench = left_behind(300)
    b = subscribed(bench, "b", SHARED, qos=1)
    bench.engine.configure(type(bench.engine.core.limits)(max_queued_messages=10, max_inflight=5))
    bench.pass_time(101, 1)
    bench.commit()
    assert bench.engine.legacies.sessions
    assert bench.engine.sessions["b"].waiting <= 10
    assert sorted(everything(bench, b)) == numbers(300)
    assert not bench.engine.core.dropped
    check(bench)


def test_p79_qos_2_that_may_have_been_sent_goes_to_nobody() -> None:
    """[MQTT-4.8.2-5]: what was in flight when the broker died may have been taken by the client."""
    bench = left_behind(6, qos=2)
    a = parts.resume(bench, "a", 5, receive_maximum=3, session_expiry_interval=100)
    bench.commit()
    assert len(a.take()) == 1 + 3
    bench.commit()
    again = bench.restart()
    b = subscribed(again, "b", SHARED, qos=2)
    again.pass_time(101, 1)
    assert sorted(everything(again, b)) == [b"3", b"4", b"5"]
    check(again)


def test_p79_qos_1_in_flight_goes_to_a_member_that_is_away_too() -> None:
    bench = left_behind(6)
    subscribed(bench, "b", SHARED, qos=1).drop()
    a = resume(bench, "a", 5, receive_maximum=3, session_expiry_interval=100)
    assert len(a.take()) == 1 + 3
    a.drop()
    bench.pass_time(101, 1)
    bench.commit()
    assert sorted(everything(bench, resume(bench, "b"))) == numbers(6)
    check(bench)


def test_z09_a_member_without_the_right_gets_nothing() -> None:
    bench = left_behind(4)
    subscribed(bench, "b", SHARED, qos=1, username="u").drop()
    bench.gate.deny_receive.add(("u", "t/x"))
    bench.pass_time(101, 1)
    bench.commit()
    assert bench.engine.sessions["b"].queued == 0
    assert bench.engine.core.dropped == {"unauthorized": 4}
    assert not bench.engine.legacies.sessions


def test_p79_without_another_member_the_messages_end_with_the_session() -> None:
    bench = left_behind(4)
    subscribed(bench, "b", "$share/other/t/#", "t/#", qos=1).drop()
    bench.pass_time(101, 1)
    bench.commit()
    assert not bench.engine.legacies.sessions
    assert bench.engine.sessions["b"].queued == 0
    assert not bench.restart().engine.legacies.sessions


def test_p79_members_that_leave_while_it_is_given_away_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.engine.legacy.LOAD", 2)
    bench = left_behind(10)
    b = subscribed(bench, "b", SHARED, qos=1)
    bench.pass_time(101, 1)
    bench.store.step()
    bench.settle()
    b.send(packets.encode_unsubscribe(9, 4, [SHARED.encode()]))
    bench.commit()
    bench.pass_time(1)
    bench.commit()
    assert not bench.engine.legacies.sessions
    assert 0 < bench.engine.core.dropped["no_member"] <= 10
    check(bench)


def test_p79_a_member_that_unsubscribes_leaves_what_is_on_disk_to_the_others() -> None:
    """When it is read back, in order."""
    bench = left_behind(700)
    b = subscribed(bench, "b", SHARED, qos=1)
    a = parts.resume(bench, "a", 5, receive_maximum=10, session_expiry_interval=100)
    a.send(packets.encode_unsubscribe(9, 5, [SHARED.encode()]))
    mine, theirs = everything(bench, a), everything(bench, b)
    assert sorted(mine + theirs) == numbers(700)
    assert len(mine) <= 10
    check(bench)


def test_messages_that_came_back_from_disk_are_of_their_group_again() -> None:
    """P-79: also over a restart, and when the record was copied."""
    bench = left_behind(5).restart()
    b = subscribed(bench, "b", SHARED, qos=1)
    a = resume(bench, "a", 5, session_expiry_interval=100)
    assert len(a.take()) == 1 + 5
    a.drop()
    assert sorted(everything(bench, b)) == numbers(5)
    assert bench.engine.sessions["a"].queued == 0
    check(bench)


def test_d03_a_legacy_survives_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "KEEP", 1000)
    bench = left_behind(30)
    subscribed(bench, "b", SHARED, qos=1).drop()
    bench.engine.configure(type(bench.engine.core.limits)(max_queued_messages=0))
    bench.pass_time(101, 1)
    bench.commit()
    assert bench.engine.legacies.sessions
    bench.engine.configure(type(bench.engine.core.limits)(max_queued_messages=1000))
    bench.engine.legacies._busy = True
    last = max(bench.store.disk.segments)
    c = subscribed(bench, "c", "noise", qos=1)
    c.drop()
    for _ in range(20):
        publish(bench, 30, 1, "noise")
        everything(bench, c := resume(bench, "c"))
        c.drop()
    bench.commit()
    assert min(bench.store.disk.segments) > last, "every old segment was copied"
    check(bench)
    again = bench.restart()
    assert sorted(everything(again, resume(again, "b"))) == numbers(30)


@pytest.mark.parametrize("crash", [False, True])
def test_p79_unsubscribing_and_leaving_at_once_leaves_it_to_the_others_too(crash: bool) -> None:
    """What any consumer does that stops in an orderly way: UNSUBSCRIBE, then the end of the session."""
    count = 3 * LOAD
    bench = left_behind(count)
    subscribed(bench, "b", SHARED, qos=2).drop()
    a = parts.resume(bench, "a", 5, receive_maximum=10, session_expiry_interval=100)
    a.send(packets.encode_unsubscribe(9, 5, [SHARED.encode()]))
    if crash:
        bench.commit()
        bench = bench.restart()
        bench.pass_time(101, 1)
    else:
        a.send(packets.encode_disconnect(5, 0, props(session_expiry_interval=0)))
    got = Counter(everything(bench, resume(bench, "b")))
    assert not Counter(numbers(count)) - got
    check(bench)


def test_d01_the_session_is_forgotten_last_in_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn commit may keep its first frames only: what was in flight must be with the other member by then."""
    monkeypatch.setattr("broker.engine.journal.FRAME", 200)
    bench = left_behind(LOAD)
    subscribed(bench, "b", SHARED, qos=2).drop()
    a = parts.resume(bench, "a", 5, session_expiry_interval=100, receive_maximum=5)
    bench.commit()
    bench.commit()
    a.send(packets.encode_disconnect(5, 0, props(session_expiry_interval=0)))
    bench.settle()
    for partial in range(12):
        again = bench.restart(partial=partial)
        again.pass_time(102, 1)
        got = Counter(everything(again, resume(again, "b")))
        assert not Counter(numbers(LOAD)) - got, f"lost after {partial} frames"


def test_a_legacy_leaves_no_cycle_behind() -> None:
    bench = left_behind()
    session = bench.engine.sessions["a"]
    b = subscribed(bench, "b", SHARED, qos=2)
    bench.pass_time(101, 1)
    everything(bench, b)
    assert session.spool is None


def test_too_old_is_not_given_away() -> None:
    bench = left_behind(max_queued_age=50)
    bench.pass_time(10)
    b = subscribed(bench, "b", SHARED, qos=2)
    bench.pass_time(101, 1)
    assert everything(bench, b) == []


def test_a_group_with_the_same_mark_is_another_group() -> None:
    bench = left_behind()
    subscribed(bench, "b", SHARED, qos=2).drop()
    stranger = subscribed(bench, "c", "$share/other/u", qos=2)
    mark = bench.engine.groups[(b"g", b"t/#")].mark
    del bench.engine.groups[(b"g", b"t/#")]
    bench.engine.groups[(b"other", b"u")].mark = mark
    bench.pass_time(101, 1)
    assert everything(bench, stranger) == []
    assert bench.engine.core.dropped["no_member"] == 4
