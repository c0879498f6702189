"""Promises that outlive a crash or a failing disk, one by one; `test_survival.py` mixes them."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine import backlog, records
from broker.engine.backlog import Backlog
from broker.engine.message import Message, Origin
from broker.engine.spool import IN_MEMORY, LOAD
from broker.engine.transfer import export_session, import_session
from broker.mqtt import packets
from broker.mqtt.packets import Will
from tests.unit.engine import parts
from tests.unit.engine.harness import Bench, connect_packet, props
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack, publish
from tests.unit.engine.stores import StoredBench, check
from tests.unit.engine.test_instances import spec, worker
from tests.unit.engine.test_journal import got, resume, subscribed


@pytest.fixture
def bench() -> StoredBench:
    return StoredBench()


def retained(bench: StoredBench, topic: bytes = b"t") -> bytes | None:
    message = bench.engine.retained_store.get(topic)
    return message.payload if message is not None else None


def fail(bench: StoredBench, full: bool = True) -> None:
    bench.store.fail(full)
    bench.settle()


# connections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [False, True])
def test_of_two_connects_during_one_commit_the_newer_wins(bench: StoredBench, clean: bool) -> None:
    s = subscribed(bench, "s", "t")
    watcher = subscribed(bench, "w", "gone", qos=0)
    s.drop()
    bench.commit()
    older = bench.socket().send(connect_packet("s", 4, True, will=Will(topic=b"gone", payload=b"will")))
    newer = bench.socket().send(connect_packet("s", 4, clean))
    assert not older.take()
    assert older.closed
    assert not newer.take(), "nobody has it on disk"
    bench.commit()
    assert [p.session_present for p in newer.take()] == [False]
    assert [m[0] for m in got(watcher)] == [b"will"]
    assert bench.engine.connected == 2
    assert not bench.engine._claims
    newer.publish("x", b"m", 1)
    assert newer.bytes() == ack(PUBACK, 1)


def test_a_client_that_goes_while_its_connack_waits_leaves_its_will(bench: StoredBench) -> None:
    subscribed(bench, "s", "t").drop()
    watcher = subscribed(bench, "w", "gone", qos=0)
    early = bench.socket().send(connect_packet("s", 4, True, will=Will(topic=b"gone", payload=b"will")))
    early.drop()
    assert [m[0] for m in got(watcher)] == [b"will"]
    bench.commit()
    assert "s" not in bench.engine.sessions
    assert bench.engine.connected == 1


def test_connack_without_a_session_waits_until_the_old_one_is_over_on_disk(bench: StoredBench) -> None:
    s = subscribed(bench, "s", "t", version=5, session_expiry_interval=1000)
    s.send(packets.encode_disconnect(5, 0, props(session_expiry_interval=0)))
    s = parts.resume(bench, "s", 5, session_expiry_interval=1000)
    assert not s.take()
    assert bench.restart().engine.sessions["s"].subscriptions, "the old session is still on disk"
    bench.commit()
    assert not s.take()[0].session_present
    assert not bench.restart().engine.sessions["s"].subscriptions


# retained messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("old", [b"old", b""])
def test_a_retained_message_that_could_not_be_written_is_not_served(bench: StoredBench, full: bool, old: bytes) -> None:
    """D-06: the one before it was acknowledged, and counts again."""
    p = bench.client("p", version=5)
    if old:
        p.publish("t", old, 1, retain=True)
        bench.commit()
        p.take()
    p.publish("t", b"new", 1, retain=True, ident=2)
    fail(bench, full)
    assert p.take()[-1].code == (0x97 if full else 0x83)
    assert retained(bench) == (old or None)
    assert retained(bench.restart()) == (old or None)
    if full:
        bench.store.make_space()
        bench.pass_time(2)
        bench.commit()
        check(bench)
        assert retained(bench.restart()) == (old or None)


def test_a_chain_of_retained_messages_falls_back_to_the_last_that_is_safe(bench: StoredBench) -> None:
    p = bench.client("p", version=5)
    p.publish("t", b"0", 1, retain=True)
    bench.commit()
    p.publish("t", b"1", 1, ident=1, retain=True)
    assert bench.store.commits
    p.publish("t", b"2", 1, ident=2, retain=True)
    p.publish("t", b"3", 1, ident=3, retain=True)
    assert retained(bench) == b"3"
    fail(bench)
    bench.store.make_space()
    bench.pass_time(1.1)
    assert bench.store.commits
    p.take()
    fail(bench)
    assert [a.code for a in p.take()] == [0x97, 0x97], "2 is only as safe as 3, which took its place"
    assert retained(bench) == retained(bench.restart()) == b"0"
    bench.store.make_space()
    p.publish("t", b"4", 1, retain=True)
    bench.pass_time(2)
    bench.commit()
    check(bench)
    assert retained(bench) == retained(bench.restart()) == b"4"


def test_a_retained_message_replaced_before_it_is_written_is_not_acknowledged_before_its_successor(
    bench: StoredBench,
) -> None:
    """D-12: whoever has PUBACK finds this message or a later one."""
    p, q = bench.client("p"), bench.client("q")
    p.publish("other", b"x", 1, retain=True)
    p.publish("t", b"1", 1, ident=2, retain=True)
    q.publish("t", b"2", 1, retain=True)
    assert not p.take()
    while not p.bytes().endswith(ack(PUBACK, 2)):
        assert retained(bench.restart()) is None
        bench.store.step()
        bench.settle()
    assert retained(bench.restart()) == b"2"


def test_a_retained_message_and_its_removal_survive_the_acknowledgement(bench: StoredBench) -> None:
    """D-12"""
    p = bench.client("p")
    p.publish("t", b"m", 1, retain=True)
    assert not p.take()
    bench.commit()
    assert p.bytes() == ack(PUBACK, 1)
    assert retained(bench.restart()) == b"m"
    p.publish("t", b"", 1, ident=2, retain=True)
    assert not p.take()
    bench.commit()
    assert p.bytes() == ack(PUBACK, 2)
    assert retained(bench.restart()) is None


# subscriptions ----------------------------------------------------------------------------------------------------


def test_subscriptions_survive_suback_and_unsuback(bench: StoredBench) -> None:
    """D-13"""
    s = bench.client("s", version=5, clean=False, session_expiry_interval=1000)
    s.send(packets.encode_subscribe(1, 5, [(b"t", 1), (b"u", 2)]))
    assert not s.take()
    bench.commit()
    assert s.take()[0].codes == [1, 2]
    again = bench.restart()
    assert sorted((x.filter, x.qos) for x in again.engine.sessions["s"].subscriptions or ()) == [(b"t", 1), (b"u", 2)]
    s.send(packets.encode_unsubscribe(2, 5, [b"t"]))
    assert not s.take()
    bench.commit()
    assert s.take()[0].codes == [0]
    assert [x.filter for x in bench.restart().engine.sessions["s"].subscriptions or ()] == [b"u"]


@pytest.mark.parametrize("filter", ["t", "$share/g/t"])
def test_a_failed_subscription_leaves_the_acknowledged_one(bench: StoredBench, filter: str) -> None:
    """D-13: what SUBACK has promised once stays."""
    s = subscribed(bench, "s", filter, version=5, session_expiry_interval=1000)
    s.send(packets.encode_subscribe(2, 5, [(filter.encode(), 0), (b"new", 1), (filter.encode(), 2)]))
    fail(bench)
    assert s.take()[0].codes == [0x97] * 3
    bench.store.make_space()
    bench.pass_time(2)
    bench.commit()
    p = bench.client("p", version=5)
    for engine in (bench.engine, bench.restart().engine):
        found = engine.sessions["s"].subscriptions or []
        assert [(x.filter, x.qos) for x in found] == [(b"t", 1)]
    p.publish("t", b"m", 2)
    bench.commit()
    assert [m[:2] for m in got(s)] == [(b"m", 1)]
    assert not bench.engine.subscriptions._unwritten


def test_the_later_of_two_subscriptions_on_their_way_outlives_the_failure_of_the_first(bench: StoredBench) -> None:
    s = subscribed(bench, "s", "t", version=5, session_expiry_interval=1000)
    s.send(packets.encode_subscribe(2, 5, [(b"t", 0)]))
    assert bench.store.commits
    s.send(packets.encode_subscribe(3, 5, [(b"t", 2)]))
    fail(bench)
    assert [x.qos for x in bench.engine.sessions["s"].subscriptions or ()] == [2]
    bench.store.make_space()
    bench.pass_time(1.1)
    fail(bench)
    assert [x.qos for x in bench.engine.sessions["s"].subscriptions or ()] == [1]


def test_unsubscribing_drops_what_is_still_on_its_way_to_disk(bench: StoredBench) -> None:
    """P-58: what is in flight finishes, the rest is gone and its space too."""
    s = subscribed(bench, "s", "t")
    s.channel.pause_writing()
    p = bench.client("p")
    for i in range(3):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    session = bench.engine.sessions["s"]
    spool = session.spool
    assert spool is not None
    spool.tail, session.queue = session.queue, None  # as behind what is being read back
    bench.engine.subscriptions.unsubscribe(session, [b"t"])
    assert session.queued == 0
    assert session.queue_bytes == 0
    bench.commit()
    assert p.bytes() == b"".join(ack(PUBACK, i + 1) for i in range(3))
    check(bench)


# groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_what_moves_within_a_group_is_not_lost_when_it_cannot_be_written_there(bench: StoredBench, full: bool) -> None:
    """P-79, D-06: acknowledged at one member, on its way to another, and the disk fails."""
    members = {name: subscribed(bench, name, "$share/g/t") for name in ("a", "b")}
    p = bench.client("p")
    for i in range(6):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    assert len(p.bytes()) == 24
    members["a"].drop()
    assert bench.journal.due or bench.store.commits
    bench.fire()
    while not bench.store.commits:
        bench.fire()
    fail(bench, full)
    if full:
        bench.store.make_space()
        bench.pass_time(2)
        bench.commit()
        check(bench)
    again = bench.restart()
    found = {m[0] for name in members for m in got(resume(again, name))}
    assert found == {b"%d" % i for i in range(6)}


def test_what_queues_for_a_member_that_leaves_goes_to_another(bench: StoredBench) -> None:
    """P-79"""
    a = subscribed(bench, "a", "$share/g/t")
    a.channel.pause_writing()
    p = bench.client("p")
    for i in range(3):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    assert len(p.bytes()) == 12
    b = subscribed(bench, "b", "$share/g/t")
    bench.engine.subscriptions.unsubscribe(bench.engine.sessions["a"], [b"$share/g/t"])
    bench.commit()
    check(bench)
    assert [m[0] for m in got(b)] == [b"0", b"1", b"2"]
    assert [m[0] for m in got(resume(bench.restart(), "b"))] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("moment", range(8))
def test_what_a_gone_member_had_in_flight_is_lost_at_no_moment(moment: int) -> None:
    """P-79: three members, fifty in flight to the one that goes; the broker is killed while they move."""
    bench = StoredBench(segment_bytes=1 << 20)
    options: dict[str, Any] = {"version": 5, "session_expiry_interval": 1000, "receive_maximum": 200}
    members = [subscribed(bench, f"m{n}", "$share/g/t", **options) for n in range(3)]
    p = bench.client("p", version=5)
    p.send(b"".join(publish("t", b"%d" % i, 1, i + 1, 5) for i in range(150)))
    bench.commit()
    had = [{m[0] for m in got(member)} for member in members]
    assert [len(payloads) for payloads in had] == [50, 50, 50]
    members[0].drop()
    moved = [{m[0] for m in got(member)} for member in members[1:]]
    for _ in range(moment):
        if bench.store.commits:
            bench.store.step()
        elif bench.later:
            bench.fire()
        bench.settle()
    again = bench.restart()
    everything = {b"%d" % i for i in range(150)}
    found = [{m[0] for m in got(resume(again, f"m{n}", **options))} for n in range(3)]
    assert set().union(*found) == everything, "none is lost"
    bench.commit()
    assert set().union(*moved) | had[1] | had[2] == everything, "the others have them"
    assert bench.engine.sessions["m0"].queued == 0
    check(bench)


# QoS 2 ------------------------------------------------------------------------------------------------------------


def test_qos_2_is_delivered_from_disk_only_and_qos_1_at_once(bench: StoredBench) -> None:
    """D-02, D-03"""
    s = subscribed(bench, "s", "t", qos=2)
    p = bench.client("p")
    p.publish("t", b"1", 1, ident=1)
    assert [m[0] for m in got(s)] == [b"1"]
    p.publish("t", b"2", 2, ident=2)
    assert not got(s)
    assert not p.bytes()
    bench.store.step()
    bench.settle()
    (two,) = s.take()
    assert two.payload == b"2"
    bench.commit()
    assert p.bytes() == ack(PUBACK, 1) + ack(PUBREC, 2)
    s.send(ack(PUBREC, two.packet_id))
    assert not s.take(), "PUBREL waits: else a crash delivers it again"
    bench.commit()
    assert s.bytes() == ack(PUBREL, two.packet_id)
    s.send(ack(PUBCOMP, two.packet_id), ack(PUBACK, 1))
    bench.pass_time(1)
    bench.commit()
    again = bench.restart()
    assert not got(resume(again, "s")), "D-03: neither comes again"


def test_a_repeated_publish_is_not_acknowledged_when_the_first_could_not_be_written(bench: StoredBench) -> None:
    """D-02, P-57: the connection that sent it first is gone, the next one asks."""
    s = subscribed(bench, "s", "t", qos=2)
    p = bench.client("p", version=5, clean=False, session_expiry_interval=1000)
    bench.commit()
    p.publish("t", b"m", 2, ident=7)
    assert bench.store.commits
    p = parts.resume(bench, "p", 5, session_expiry_interval=1000)
    p.take()
    p.publish("t", b"m", 2, ident=7, dup=True)
    fail(bench)
    bench.store.make_space()
    bench.pass_time(2)
    bench.commit()
    (answer,) = p.take()
    assert answer.code == 0x97
    assert not got(s)


@pytest.mark.parametrize("version", [4, 5])
def test_a_late_commit_does_not_make_a_message_new(bench: StoredBench, version: int) -> None:
    """D-02: the broker gave up waiting; the message is stored all the same, and 3.x sends it again."""
    s = subscribed(bench, "s", "t", qos=2)
    options: dict[str, Any] = {"session_expiry_interval": 1000} if version == 5 else {}
    p = bench.client("p", version=version, clean=False, **options)
    bench.commit()
    p.take()
    p.publish("t", b"m", 2, ident=7)
    bench.pass_time(31)
    if version == 5:
        assert p.take()[-1].code == 0x83
        return
    assert p.closed
    p = parts.resume(bench, "p", 4)
    p.publish("t", b"m", 2, ident=7, dup=True)
    bench.commit()
    assert p.bytes().endswith(ack(PUBREC, 7))
    assert [m[0] for m in got(s)] == [b"m"]


@pytest.mark.parametrize("retain", [False, True])
def test_a_takeover_between_pubrec_and_pubrel(bench: StoredBench, retain: bool) -> None:
    """P-57: it completes once, on the new connection, a crash in between or not; QoS and retain stay as they were."""
    s = subscribed(bench, "s", "t", qos=2 | 8, version=5, session_expiry_interval=1000)
    p = bench.client("p", clean=False)
    bench.commit()
    p.publish("t", b"m", 2, ident=7, retain=retain)
    bench.commit()
    assert p.bytes().endswith(ack(PUBREC, 7))
    (m,) = s.take()
    assert (m.qos, m.retain) == (2, retain)
    s.send(ack(PUBREC, m.packet_id))
    for again in (bench, bench.restart()):
        p, s = resume(again, "p"), resume(again, "s", 5, session_expiry_interval=1000)
        p.take()
        again.commit()
        left = [x for x in s.take() if isinstance(x, packets.Publish)]
        assert all((x.packet_id, x.dup, x.qos, x.retain) == (m.packet_id, True, 2, retain) for x in left)
        p.publish("t", b"m", 2, ident=7, dup=True, retain=retain)
        again.commit()
        assert p.bytes() == ack(PUBREC, 7)
        assert not got(s)
        p.send(ack(PUBREL, 7))
        again.commit()
        assert p.bytes() == ack(PUBCOMP, 7)


def test_the_same_identifier_again_and_again(bench: StoredBench) -> None:
    """P-41"""
    s = subscribed(bench, "s", "t", qos=2)
    p = bench.client("p", clean=False)
    bench.commit()
    for i in range(500):
        p.send(publish("t", b"%d" % i, 2, 7))
    bench.commit()
    assert p.bytes() == ack(PUBREC, 7) * 500
    assert [m[0] for m in got(s)] == [b"0"]


def test_identifiers_without_pubrel_are_bounded_for_5_and_not_for_3() -> None:
    """P-42, P-43: 5.0 has its Receive Maximum, 3.x every identifier, and a crash forgets none of them."""
    bench = StoredBench(segment_bytes=1 << 20, max_queued_messages=100_000)
    subscribed(bench, "s", "t", qos=2).drop()
    five = bench.client("five", version=5, session_expiry_interval=1000)
    bench.commit()
    five.take()
    five.send(b"".join(publish("t", b"", 2, i, 5) for i in range(1, 1025)))
    bench.commit()
    assert [a.packet_id for a in five.take()] == list(range(1, 1025))
    assert not five.closed
    five.send(publish("t", b"", 2, 1025, 5))
    assert five.take()[-1].code == 0x93
    assert five.closed
    four = bench.client("four", clean=False)
    bench.commit()
    four.take()
    for start in range(1, 65_536, 5_000):
        some = range(start, min(start + 5_000, 65_536))
        four.send(b"".join(publish("t", b"", 2, i) for i in some))
        bench.commit()
        assert four.bytes() == b"".join(ack(PUBREC, i) for i in some)
        assert four.link.reading
    for again in (bench, bench.restart()):
        four = parts.resume(again, "four")
        four.take()
        some = range(1, 65_536, 97)
        four.send(b"".join(publish("t", b"", 2, i, dup=True) for i in some))
        again.commit()
        assert four.bytes() == b"".join(ack(PUBREC, i) for i in some)
        assert again.engine.sessions["s"].queued == 1024 + 65_535


@pytest.mark.parametrize("qos", [1, 2])
def test_what_waits_for_the_disk_counts_for_the_receive_maximum(qos: int) -> None:
    """P-43: PUBACK and PUBREC have not been sent, so the messages are unacknowledged."""
    bench = StoredBench(segment_bytes=1 << 20, max_queued_messages=2000)
    subscribed(bench, "s", "t", qos=qos).drop()
    p = bench.client("p", version=5)
    p.send(b"".join(publish("t", b"%d" % i, qos, i + 1, 5) for i in range(1024)))
    assert not p.take()
    assert not p.closed
    p.send(publish("t", b"", qos, 1025, 5))
    assert [a.code for a in p.take()] == [0x93]
    assert p.closed
    bench.commit()
    assert bench.engine.sessions["s"].queued == 1024, "those that were within it"


# acknowledgements of receivers ------------------------------------------------------------------------------------


def test_puback_and_the_end_of_the_connection_in_one_segment(bench: StoredBench) -> None:
    """P-39"""
    s = subscribed(bench, "s", "t")
    p = bench.client("p", version=5)
    for i in range(1000):
        p.send(publish("t", b"%d" % i, 1, i + 1, 5))
        if i % 100 == 0:
            bench.commit()
    bench.commit()
    messages = [m for m in s.take() if isinstance(m, packets.Publish)]
    assert len(messages) == 32
    s.channel.feed(ack(PUBACK, messages[0].packet_id))
    s.channel.eof_received()
    bench.settle()
    first = got(resume(bench, "s"))[0]
    assert first[0] == b"1"


def test_identifiers_are_not_used_again_inside_a_burst() -> None:
    """P-40: acknowledgements in one read, the next delivery burst behind them; also where identifiers begin again."""
    bench = StoredBench(segment_bytes=1 << 20, max_queued_messages=100_000)
    s = subscribed(bench, "s", "t")
    p = bench.client("p", version=5)
    seen: list[int] = []
    for start in range(0, 66_000, 1000):
        p.send(b"".join(publish("t", b"x", 1, i + 1, 5) for i in range(1000)))
        for _ in range(200):
            bench.commit()
            burst = [m.packet_id for m in s.take() if isinstance(m, packets.Publish)]
            seen += burst
            if not burst:
                break
            # the first stays open while the others are acknowledged, in one read and in another order
            s.send(b"".join(ack(PUBACK, ident) for ident in reversed(burst[1:])))
            s.send(ack(PUBACK, burst[0]))
        assert len(seen) == start + 1000
    assert seen == [n % 65_535 + 1 for n in range(66_000)]


def test_acknowledgements_leave_in_order_and_in_bulk(bench: StoredBench) -> None:
    subscribed(bench, "s", "t", qos=2).drop()
    p = bench.client("p")
    bench.commit()
    p.send(b"".join(publish("t", b"%d" % i, 1 + i % 2, i + 1) for i in range(100)))
    assert not p.bytes()
    bench.store.step()
    bench.settle()
    assert p.bytes() == b"".join(ack(PUBREC if i % 2 else PUBACK, i + 1) for i in range(100))


def test_a_message_for_an_absent_qos_0_subscriber_keeps_nobody_waiting(bench: StoredBench) -> None:
    subscribed(bench, "s", "t", qos=0).drop()
    bench.commit()
    p = bench.client("p")
    p.publish("t", b"m", 1)
    assert p.bytes() == ack(PUBACK, 1)
    assert [m[:2] for m in got(parts.resume(bench, "s"))] == [(b"m", 0)]


def test_delivered_waits_for_the_worker_also_when_the_message_went_to_disk(bench: StoredBench) -> None:
    bench.engine.instances.ensure("x", spec(ack="delivered"))
    p = bench.client("p")
    for i in range(3):
        p.publish("t/1", b"%d" % i, 1 + i % 2, ident=i + 1)
    bench.commit()
    assert not p.bytes()
    w = worker(bench)
    bench.commit()
    messages = [m for m in w.take() if isinstance(m, packets.Publish)]
    assert not p.bytes()
    for m in messages:
        w.send(ack(PUBACK if m.qos == 1 else PUBREC, m.packet_id))
    assert p.bytes() == ack(PUBACK, 1) + ack(PUBREC, 2) + ack(PUBACK, 3)
    p.publish("t/1", b"in flight", 1, ident=4)
    (m,) = w.take()
    w.drop()
    p.publish("t/1", b"given up", 1, ident=5)
    bench.commit()
    assert bench.engine.instances.drop_queue("x") == 1
    w = worker(bench)
    w.send(ack(PUBACK, m.packet_id))
    assert p.bytes() == ack(PUBACK, 4) + ack(PUBACK, 5)


# queues -----------------------------------------------------------------------------------------------------------


def test_a_long_queue_stays_on_disk_and_comes_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "CHUNK", 4096)
    bench = StoredBench(segment_bytes=1 << 20, max_queued_messages=100_000, receive_maximum=65535)
    subscribed(bench, "s", "t").drop()
    p = bench.client("p", version=5)
    n = 50_000
    for start in range(0, n, 1000):
        p.send(b"".join(publish("t", b"%d" % i, 1, i % 60_000 + 1, 5) for i in range(start, start + 1000)))
        bench.commit()
    session = bench.engine.sessions["s"]
    assert session.spool is not None
    assert session.queue is None
    assert session.spool.tail is None
    assert session.waiting == n
    assert bench.scratches, "its places are not all in memory either"
    s = parts.resume(bench, "s", 4)
    seen: list[int] = []
    most = 0
    for _ in range(2 * n):
        bench.settle()
        if bench.store.reads:
            bench.store.step_read()
        elif bench.store.commits:
            bench.store.step()
        acks = []
        for m in s.take():
            if isinstance(m, packets.Publish):
                seen.append(int(m.payload))
                acks.append(ack(PUBACK, m.packet_id))
        most = max(most, len(session.queue or ()))
        if acks:
            s.send(b"".join(acks))
        if len(seen) == n:
            break
    assert seen == list(range(n))
    assert most <= IN_MEMORY + LOAD
    bench.pass_time(1)
    bench.commit()
    assert session.queued == 0
    check(bench)


def test_places_come_back_from_the_scratch_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "CHUNK", 16)
    reads = 0

    class Scratch(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            nonlocal reads
            reads += 1
            return super().read(*size)

    places = Backlog(Scratch)
    for seq in range(1, 1001):
        places.append(seq, seq * 10, seq % 7, seq % 11)
    assert len(places) == 1000
    for seq in range(100, 900):
        assert places.place_of(seq) == seq * 10
        assert places.relocate(seq, seq * 10 + 1)
        assert places.place_of(seq) == seq * 10 + 1
    assert reads < 800 / 16 + 3, "a chunk is read once"
    assert places.place_of(1001) == -1
    assert not places.relocate(1001, 5)
    taken = places.take(3)
    places.push_front(taken)
    assert places.first() == (1, 10, 1, 1)
    found: list[Any] = []
    while batch := places.take(7):
        found.extend(batch)
    assert found == [(seq, seq * 10 + (100 <= seq < 900), seq % 7, seq % 11) for seq in range(1, 1001)]
    assert not len(places)
    places.close()


@pytest.mark.parametrize(
    ("limits", "kept", "reason"),
    [
        ({"max_queued_messages": 3}, [b"3", b"4", b"5"], "queue_full"),
        ({"max_queued_messages": 3, "queue_overflow": "drop_newest"}, [b"0", b"1", b"2"], "queue_full"),
        ({"max_queued_bytes": 6}, [b"3", b"4", b"5"], "queue_full"),
    ],
)
def test_limits_of_a_stored_queue(limits: dict[str, Any], kept: list[bytes], reason: str) -> None:
    """What is dropped is counted, and dropped for good."""
    bench = StoredBench(**limits)
    subscribed(bench, "s", "t").drop()
    p = bench.client("p")
    for i in range(6):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    assert len(p.bytes()) == 24
    assert bench.engine.core.dropped[reason] == 3
    bench.pass_time(1)
    bench.commit()
    check(bench)
    assert [m[0] for m in got(resume(bench.restart(), "s"))] == kept
    assert [m[0] for m in got(resume(bench, "s"))] == kept


def test_a_full_stored_queue_may_refuse() -> None:
    bench = StoredBench(max_queued_messages=2, queue_overflow="reject")
    subscribed(bench, "s", "t").drop()
    bench.commit()
    bench = bench.restart()
    p = bench.client("p", version=5)
    for i in range(3):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    assert [a.code for a in p.take()] == [0, 0, 0x97]
    assert bench.engine.core.dropped == {"queue_full": 1}


def test_a_full_stored_queue_may_block() -> None:
    bench = StoredBench()
    bench.engine.instances.ensure("x", spec(max_bytes=12, overflow="block"))
    p = bench.client("p")
    p.send(b"".join(publish("t/1", b"%d" % i, 1, i + 1) for i in range(6)))
    bench.commit()
    assert p.bytes() == b"".join(ack(PUBACK, i + 1) for i in range(3))
    w = worker(bench)
    bench.commit()
    messages = got(w)
    assert [m[0] for m in messages] == [b"%d" % i for i in range(6)]
    bench.commit()
    assert p.bytes() == b"".join(ack(PUBACK, i + 1) for i in range(3, 6))


@pytest.mark.parametrize("more", [1, 100, LOAD, LOAD + 100, 4 * LOAD])
def test_s05_a_queue_that_is_being_read_back_keeps_to_its_quota_too(more: int) -> None:
    """S-05: the oldest go, those that are being read among them."""
    bench = StoredBench()
    count = 3 * LOAD
    bench.engine.instances.ensure("x", spec(max_bytes=8 * count, overflow="drop_oldest"))
    session = bench.engine.sessions["isthmus/x/0"]
    p = bench.client("p")
    for i in range(count):
        p.publish("t/1", b"%05d" % i, 1, ident=i + 1)
    bench.commit()
    w = worker(bench)
    while not bench.store.reads:
        bench.store.step() if bench.store.commits else bench.fire()
        bench.settle()
    for i in range(count, count + more):
        p.publish("t/1", b"%05d" % i, 1, ident=i + 1)
        assert session.queue_bytes <= 8 * count
    assert session.dropped == {"queue_full": more}
    bench.commit()
    messages = [packet for packet in w.take() if isinstance(packet, packets.Publish)]
    assert [int(m.payload) for m in messages] == list(range(more, count + more))
    w.send(b"".join(ack(PUBACK, m.packet_id) for m in messages))
    bench.commit()
    check(bench)
    assert (session.queued, session.queue_bytes) == (0, 0)
    assert not bench.restart().engine.sessions["isthmus/x/0"].queued


def test_what_waits_in_memory_grows_too_old_as_well() -> None:
    bench = StoredBench(max_queued_age=10.0, max_inflight=1)
    s = subscribed(bench, "s", "t")
    clean = bench.client("clean")
    clean.subscribe("t", qos=1)
    p = bench.client("p")
    p.publish("t", b"0", 1, ident=1).publish("t", b"1", 1, ident=2)
    bench.commit()
    bench.pass_time(8)
    p.publish("t", b"2", 1, ident=3)
    bench.commit()
    bench.pass_time(4)
    for client in (s, clean):
        assert [m[0] for m in got(client)] == [b"0"]
        client.send(ack(PUBACK, 1))
        bench.commit()
        assert [m[0] for m in got(client)] == [b"2"]
    assert bench.engine.core.dropped == {"too_old": 2}
    bench.pass_time(1)
    bench.commit()
    check(bench)


def test_a_queue_given_up_leaves_no_bytes_and_no_segments(bench: StoredBench) -> None:
    bench.engine.instances.ensure("x", spec())
    p = bench.client("p")
    for i in range(20):
        p.publish("t/1", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    assert bench.engine.sessions["isthmus/x/0"].spool.backlog is not None  # type: ignore[union-attr]
    assert bench.engine.instances.drop_queue("x") == 20
    assert bench.engine.sessions["isthmus/x/0"].queue_bytes == 0
    bench.commit()
    check(bench)


@pytest.mark.parametrize("kind", [Bench, StoredBench])
def test_a_publisher_that_goes_on_while_a_queue_is_given_up_loses_nothing(kind: type[Bench]) -> None:
    bench = kind(receive_maximum=2)
    bench.engine.instances.ensure("x", spec(ack="delivered"))
    p = bench.client("p")
    p.send(b"".join(publish("t/1", b"%d" % i, 1, i + 1) for i in range(5)))
    if isinstance(bench, StoredBench):
        bench.store.step()
        bench.settle()
    session = bench.engine.sessions["isthmus/x/0"]
    assert p.channel.suspended
    assert session.waiting == 2
    assert bench.engine.instances.drop_queue("x") == 2
    bench.settle()
    assert p.bytes() == ack(PUBACK, 1) + ack(PUBACK, 2)
    assert session.waiting == 2, "those it had not read yet"
    assert session.queue_bytes == 8


def test_the_records_of_a_session_that_ends_in_mid_flight_are_dead(bench: StoredBench) -> None:
    s = subscribed(bench, "s", "t")
    p = bench.client("p")
    for i in range(5):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    bench.fire()
    bench.fire()
    assert bench.store.commits, "they are on their way"
    s.drop()
    bench.client("s")
    bench.commit()
    check(bench)
    assert not any(bench.journal.live.values())


def test_a_session_whose_queue_is_on_disk_moves(bench: StoredBench) -> None:
    subscribed(bench, "s", "t", qos=2).drop()
    p = bench.client("p")
    for i in range(10):
        p.publish("t", b"%d" % i, 1 + i % 2, ident=i + 1)
    bench.commit()
    state = export_session(bench.engine, "s")
    bench.commit()
    assert not any(bench.journal.live.values())
    assert "s" not in bench.restart().engine.sessions
    other = StoredBench()
    import_session(other.engine, state)
    other.commit()
    check(other)
    for again in (other.restart(), other):
        assert [m[:2] for m in got(resume(again, "s"))] == [(b"%d" % i, 1 + i % 2) for i in range(10)]


# time -------------------------------------------------------------------------------------------------------------


def test_sessions_end_while_the_broker_is_down(bench: StoredBench) -> None:
    """D-14"""
    for name, expiry in (("brief", 60), ("long", 1000)):
        subscribed(bench, name, "t", version=5, session_expiry_interval=expiry).drop()
    bench.client("p").publish("t", b"m", 1)
    bench.commit()
    again = bench.restart(down=120)
    again.pass_time(0.25)
    assert set(again.engine.sessions) == {"long"}
    assert [m[0] for m in got(resume(again, "long", 5, session_expiry_interval=1000))] == [b"m"]
    again.commit()
    check(again)
    again = bench.restart(down=30)
    again.pass_time(0.25)
    assert set(again.engine.sessions) == {"brief", "long"}


def test_a_message_expires_across_restarts(bench: StoredBench) -> None:
    """D-15"""
    subscribed(bench, "s", "t", version=5, session_expiry_interval=10_000).drop()
    p = bench.client("p", version=5)
    p.publish("t", b"m", 1, retain=True, properties=b"\x02\x00\x00\x00\x64")
    bench.commit()
    for left in (70, 40, 10):
        bench = bench.restart(down=30)
        bench.commit()
        message = bench.engine.retained_store.get(b"t")
        assert message is not None
        assert abs(message.expires - bench.now - left) < 1
    (found,) = [m for m in resume(bench, "s", 5, session_expiry_interval=10_000).take() if hasattr(m, "payload")]
    assert 8 <= found.properties.message_expiry_interval <= 10
    bench = bench.restart(down=30)
    assert retained(bench) is None
    assert not got(resume(bench, "s", 5, session_expiry_interval=10_000))


def test_a_delayed_will_is_published_once(bench: StoredBench) -> None:
    """D-16"""
    watcher = subscribed(bench, "w", "gone", qos=2)
    watcher.drop()
    will = Will(topic=b"gone", payload=b"will", qos=1, properties=props(will_delay_interval=60))
    s = bench.client("s", version=5, clean=False, will=will, session_expiry_interval=1000)
    bench.commit()
    s.drop()
    bench.pass_time(1)
    bench.commit()
    bench = bench.restart(down=30)
    bench.pass_time(20, 1)
    bench.commit()
    assert not got(resume(bench, "w"))
    bench = bench.restart()
    bench.pass_time(20, 1)
    bench.commit()
    assert [m[0] for m in got(resume(bench, "w"))] == [b"will"]
    bench.commit()
    bench = bench.restart(down=100)
    bench.pass_time(100, 1)
    bench.commit()
    assert bench.engine.sessions["w"].queued == 1, "the one that was not acknowledged, and no other"


def test_one_session_that_cannot_end_does_not_keep_the_others(
    bench: StoredBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-23"""
    for name in ("a", "bad", "c"):
        subscribed(bench, name, "t", version=5, session_expiry_interval=60).drop()
    owed = bench.engine.subscriptions.owed
    forget = owed.forget

    def broken(session: Any) -> None:
        if session.client_id == "bad":
            raise ValueError("a bad record")
        forget(session)

    monkeypatch.setattr(owed, "forget", broken)
    bench.pass_time(100, 1)
    assert not bench.engine.sessions
    assert bench.engine.core.events["internal_error"] == 1


# damage and names -------------------------------------------------------------------------------------------------


def bad_records() -> list[bytes]:
    def session(**changes: Any) -> bytes:
        fields = {
            "c": "x", "o": None, "k": 1, "on": False, "x": 0, "e": 10.0, "w": 5, "v5": False, "will": None,
            "n": 1, "f": 1, "s": 1, "open": [], "rel": [], "gone": [], "marks": [], "subs": [],
        } | changes  # fmt: skip
        return records.encode_json(records.META, 900, {k: v for k, v in fields.items() if v != "absent"})

    return [
        session(c=None), session(c=""), session(c="absent"), session(c=5), session(o=7), session(e="soon"),
        session(e=-1), session(w=0), session(x=-5), session(n="1"), session(f=5, s=1), session(s=10**9),
        session(open=[-1]), session(open=None), session(marks=[70_000]), session(subs=[["a/#/b", 1, 0, 0, 0]]),
        session(subs=[["t", 9, 0, 0, 0]]), session(subs=[None]), session(subs=[["t", 1, 0, 0, -1]]),
        session(will={"topic": "#"}), session(will=5),
        records.encode_json(records.META, 900, [1, 2]),
        records.encode_json(records.SUBSCRIBED, 900, {}),
        records.encode_json(records.SUBSCRIBED, 900, {"sub": ["$share/g", 1, 0, 0, 0]}),
        bytes((records.META,)) + (8).to_bytes(4, "little") + b"\x84\x03\0\0\xff\xfe{}",
        bytes((records.META,)) + (2).to_bytes(4, "little") + b"\0\0",
        records.encode_acked(900, 1 << 63, []), records.encode_acked(900, 1, [1 << 63]),
        records.encode_released(900, 1 << 63),
        records.encode_put(
            Message(b"t", b"", 1, False, b"", 0.0, None), False, 0, 0, 0, 1,
            records.encode_taker(900, 1 << 63, 1, False, None), b"",
        ),
        bytes((records.PUT,)) + (3).to_bytes(4, "little") + b"\1\2\3",
        bytes((records.PUT,)) + (60).to_bytes(4, "little") + b"\xff" * 60,
        bytes((records.ACKED,)) + (5).to_bytes(4, "little") + b"\1\0\0\0\0",
        bytes((records.ACKED,)) + (16).to_bytes(4, "little") + b"\1\0\0\0" + b"\xff" * 12,
        bytes((records.RELEASED,)) + (1).to_bytes(4, "little") + b"\1",
        bytes((records.FREED,)) + (5).to_bytes(4, "little") + b"\1\0\0\0\0",
        bytes((records.UNSUBSCRIBED,)) + (6).to_bytes(4, "little") + b"\1\0\0\0\xff\xff",
        bytes((records.VALUE,)) + (2).to_bytes(4, "little") + b"\xff\xff",
        bytes((99,)) + (0).to_bytes(4, "little"),
    ]  # fmt: skip


def test_releases_are_repeated_in_their_order_however_much_waits_behind_them() -> None:
    """[MQTT-4.6.0-4] Identifiers begin again after 65 535: their order cannot be told from what was queued last."""
    disk = StoredBench().store.disk
    fields = {
        "c": "s", "o": None, "k": 1, "on": False, "x": 0, "e": 10.0, "w": 50, "v5": False, "will": None,
        "n": 65_546, "f": 1, "s": 21, "open": [], "rel": list(range(1, 21)), "gone": [], "marks": [], "subs": [],
    }  # fmt: skip
    disk.put(records.encode_json(records.META, 900, fields))
    bench = StoredBench(disk)
    s = resume(bench, "s")
    assert s.bytes().endswith(b"".join(ack(PUBREL, ident) for ident in range(1, 21)))


@pytest.mark.parametrize("number", range(len(bad_records())))
def test_a_bad_record_is_left_out_alone(bench: StoredBench, number: int) -> None:
    """D-11"""
    subscribed(bench, "s", "t").drop()
    p = bench.client("p")
    p.publish("t", b"1", 1, retain=True)
    bench.commit()
    bench.store.disk.put(bad_records()[number])
    p.publish("t", b"2", 1, ident=2)
    bench.commit()
    again = bench.restart()
    assert again.recovery.bad >= 1
    assert set(again.engine.sessions) == {"s"}
    assert retained(again) == b"1"
    assert [m[0] for m in got(resume(again, "s"))] == [b"1", b"2"]


LONGEST = "x" * 65_500


def test_client_ids_are_only_names() -> None:
    """D-24: whatever they hold and up to the longest there can be."""
    names = [
        "a",
        "A",
        "a/../b",
        ".",
        "..",
        "a\\0",
        "a\\u0000",
        "%00",
        "%2e%2e/b",
        "ä",
        LONGEST,
        LONGEST[1:] + "y",
    ]
    bench = StoredBench(max_clientid_length=65_535)
    for name in names:
        subscribed(bench, name, f"t/{names.index(name)}").drop()
    p = bench.client("p")
    for i in range(len(names)):
        p.publish(f"t/{i}", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    again = bench.restart()
    assert set(again.engine.sessions) == set(names)
    for i, name in enumerate(names):
        assert [m[0] for m in got(resume(again, name))] == [b"%d" % i]
    assert again.client("x" * 65_535).closed, "with that a CONNECT is longer than 64 KiB"
    assert not [name for name in again.engine.sessions if len(name) == 65_535]


@pytest.mark.parametrize("frames", [0, 1, 3, 100])
def test_a_commit_that_fails_half_way_tears_no_session(
    bench: StoredBench, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    """D-25: a thousand sessions; each is as before or as after."""
    from broker.engine import journal

    monkeypatch.setattr(journal, "FRAME", 3000)
    sessions = [
        bench.client(f"s{i}", clean=False).send(packets.encode_subscribe(1, 4, [(b"old", 1)])) for i in range(1000)
    ]
    bench.commit()
    assert all(s.take() for s in sessions)
    for s in sessions:
        s.channel.feed(packets.encode_subscribe(2, 4, [(b"old", 2), (b"new", 2)]))
    bench.settle()
    if not bench.store.commits:
        bench.fire()
    again = bench.restart(partial=frames)
    assert len(again.engine.sessions) == 1000
    states = Counter(len(session.subscriptions or ()) for session in again.engine.sessions.values())
    assert set(states) == ({1} if frames == 0 else {1, 2} if frames < 100 else {2}), states
    for session in again.engine.sessions.values():
        found = sorted((s.filter, s.qos) for s in session.subscriptions or ())
        assert found in ([(b"old", 1)], [(b"old", 2)], [(b"new", 2), (b"old", 2)])
    assert not any(s.take() for s in sessions)


# records ----------------------------------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
numbers = st.integers(1, 1 << 40)
takers = st.lists(
    st.tuples(
        st.integers(1, 1 << 31), numbers, st.integers(0, 2), st.booleans(),
        st.none() | st.lists(st.integers(1, (1 << 28) - 1), min_size=1, max_size=9).map(tuple),
        st.integers(0, 2**32 - 1),
    ),
    max_size=5,
)  # fmt: skip


@given(names, st.binary(max_size=50), st.integers(0, 2), st.booleans(), st.binary(max_size=20), takers, names)
def test_messages_come_back_as_they_were(
    topic: str, payload: bytes, qos: int, retain: bool, properties: bytes, who: list[Any], client_id: str
) -> None:
    origin = Origin(client_id, None, "127.0.0.1", None, None, "n")
    message = Message(topic.encode(), payload, qos, retain, properties, 1010.0, origin)
    message.ident, message.time_ms, message.clock_ms = "0123456789abcdef" * 2, 0x0123456789AB, 4321
    lines = b"".join(records.encode_taker(*taker) for taker in who)
    record = records.encode_put(message, True, 15_000, 7, 9, len(who), lines, records.encode_origin(origin))
    ((at, kind, body),) = records.iterate(record)
    assert (at, kind) == (0, records.PUT)
    found = records.decode_message(body, 2000.0, 5000, {})
    for name in ("topic", "payload", "qos", "retain", "properties", "ident", "time_ms", "clock_ms"):
        assert getattr(found, name) == getattr(message, name)
    assert found.expires == 2010.0
    assert found.origin.prefix() == origin.prefix()
    found_takers = records.decode_takers(body)
    assert [(t.session, t.seq, t.qos, t.retain, t.idents, t.group) for t in found_takers] == who
    flags, arrival, expires_ms, publisher, ident = records.put_fields(body)
    assert flags & records.RETAINED
    assert (arrival, expires_ms, publisher, ident) == ((message.time_ms, 4321), 15_000, 7, 9)
    assert records.put_topic(body) == (message.topic, message.size)
    assert records.describe(kind, body)["topic"] == topic


@pytest.mark.parametrize("count", [1, 2, 300, 65_535])
@pytest.mark.parametrize("bits", [b"\x01", b"\x09", b"\xff"])
def test_a_message_that_claims_more_receivers_than_it_holds_is_refused(count: int, bits: bytes) -> None:
    """D-11: never read beyond a record, on the compiled build neither."""
    message = Message(b"t", b"", 1, False, b"", 0.0, None)
    taker = records.encode_taker(1, 1, 1, False, None)[:-1] + bits
    record = records.encode_put(message, False, 0, 0, 0, count, taker * (count // 2), b"")
    ((_, _, body),) = records.iterate(record)
    with pytest.raises(records.RecordError):
        records.put_topic(body)
    with pytest.raises(records.RecordError):
        records.decode_takers(body)
    with pytest.raises(records.RecordError):
        records.decode_message(body, 0.0, 0, {})


@given(st.integers(1, 1 << 31), numbers, st.lists(numbers, max_size=9), st.lists(st.integers(1, 65535)), names)
def test_small_records_come_back_as_they_were(
    session: int, floor: int, seqs: list[int], idents: list[int], name: str
) -> None:
    body = b"".join(
        (
            records.encode_acked(session, floor, seqs),
            records.encode_released(session, floor),
            records.encode_freed(session, idents),
            records.encode_cleared(name.encode()),
            records.encode_value(name.encode(), b"v"),
            records.encode_session(records.UNSUBSCRIBED, session, name.encode()),
            records.encode_json(records.LIFE, session, {"a": name}),
        )
    )
    found = {kind: payload for _, kind, payload in records.iterate(body)}
    assert records.decode_acked(found[records.ACKED]) == (session, floor, tuple(seqs))
    assert records.decode_released(found[records.RELEASED]) == (session, floor)
    assert records.decode_freed(found[records.FREED]) == (session, tuple(idents))
    assert found[records.CLEARED] == name.encode()
    assert records.decode_value(found[records.VALUE]) == (name.encode(), b"v")
    assert records.decode_session(found[records.UNSUBSCRIBED]) == session
    assert records.decode_json(found[records.LIFE]) == (session, {"a": name})


@given(st.sampled_from(sorted(records.KINDS)), st.binary(max_size=120))
def test_what_is_no_record_is_told_in_one_way(kind: int, payload: bytes) -> None:
    """D-11, P-80"""
    with contextlib.suppress(records.RecordError):
        records.describe(kind, payload)
