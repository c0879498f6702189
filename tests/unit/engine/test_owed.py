"""Retained messages that SUBACK has promised, and what waited for a client that is back: a crash takes neither."""

from __future__ import annotations

from typing import Any

import pytest

from broker.engine import compaction, records
from broker.mqtt import packets
from tests.unit.engine import parts
from tests.unit.engine.harness import Client
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, ack
from tests.unit.engine.stores import StoredBench, check
from tests.unit.engine.test_journal import fill, got, resume, stored, subscribed

COUNT = 100
"""Retained messages; a 3.1.1 client is sent 32 at a time."""


@pytest.fixture
def bench() -> StoredBench:
    bench = StoredBench()
    p = bench.client("p")
    for n in range(COUNT):
        p.publish(f"r/{n}", b"%d" % n, 1 + n % 2, ident=n + 1, retain=True)
    p.publish("r/zero", b"zero", 0, retain=True)
    bench.commit()
    return bench


def subscribe(bench: StoredBench, filter: str = "r/#", qos: int = 1, **options: Any) -> Client:
    """A client whose SUBSCRIBE was just acknowledged; what follows SUBACK is still to be taken."""
    s = bench.client("s", clean=False, **options)
    bench.commit()
    s.take()
    s.send(packets.encode_subscribe(1, s.version, [(filter.encode(), qos)]))
    bench.store.step()
    bench.settle()
    return s


def everything(bench: StoredBench, s: Client) -> list[bytes]:
    """All it is sent while it acknowledges, QoS 1 and 2."""
    found = []
    for _ in range(20 * COUNT):
        bench.commit()
        answers = []
        for packet in s.take():
            if isinstance(packet, packets.Publish):
                found.append(packet.payload)
                if packet.qos:
                    answers.append(ack(PUBACK if packet.qos == 1 else PUBREC, packet.packet_id))
            elif isinstance(packet, packets.Ack):
                answers.append(ack(PUBCOMP, packet.packet_id))
        if not answers:
            return found
        s.send(*answers)
    raise AssertionError("it never ends")


def numbers(*ranges: range) -> list[bytes]:
    return sorted(b"%d" % n for r in ranges for n in r)


def settled(bench: StoredBench) -> None:
    """Nothing is owed, on disk neither."""
    bench.pass_time(1)
    bench.commit()
    check(bench)
    assert not bench.engine.subscriptions.owed._debts
    assert not bench.restart().engine.subscriptions.owed._debts


def test_what_suback_promised_is_sent_after_a_crash(bench: StoredBench) -> None:
    s = subscribe(bench)
    early = [m[0] for m in got(s)]
    assert 0 < len(early) < COUNT
    for _ in range(2):
        bench = bench.restart()
    s = resume(bench, "s")
    assert sorted({*early, *everything(bench, s)} - {b"zero"}) == numbers(range(COUNT))
    settled(bench)
    assert not everything(bench, resume(bench.restart(), "s"))


def test_at_qos_2_nothing_comes_twice_wherever_the_broker_is_killed(bench: StoredBench) -> None:
    s = subscribe(bench, qos=2)
    taken: list[bytes] = []
    open_: dict[int, bytes] = {}
    for turn in range(COUNT):
        bench.commit()
        for packet in s.take():
            if not isinstance(packet, packets.Publish):
                continue
            if packet.qos == 1 or open_.get(packet.packet_id) != packet.payload:
                taken.append(packet.payload)
            if packet.qos == 2:
                open_[packet.packet_id] = packet.payload
        for ident in list(open_)[: 1 + turn % 3]:
            s.send(ack(PUBREC, ident))
            bench.commit()
            s.send(ack(PUBCOMP, ident))
            del open_[ident]
        if turn % 7 == 6:
            bench.commit()
            bench = bench.restart()
            s = parts.resume(bench, "s")
    twice = numbers(range(1, COUNT, 2))  # the others were published at QoS 1
    assert max(taken.count(payload) for payload in twice) == 1


@pytest.mark.parametrize("copied", [False, True])
def test_what_was_sent_and_acknowledged_before_the_crash_is_not_sent_again(
    bench: StoredBench, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """Neither when the records that said so have gone with their segments."""
    s = subscribe(bench, qos=2)
    bench.commit()
    first = [m for m in s.take() if isinstance(m, packets.Publish) and m.qos]
    for m in first:
        s.send(ack(PUBREC if m.qos == 2 else PUBACK, m.packet_id))
    bench.commit()
    s.drop()
    bench.commit()
    if copied:
        monkeypatch.setattr(compaction, "KEEP", 1000)
        newest = max(bench.store.disk.segments)
        fill(bench, bench.client("p"), 400)
        assert min(bench.store.disk.segments) > newest, "nothing was copied"
        check(bench)
    again = bench.restart()
    found = everything(again, resume(again, "s"))
    assert not {m.payload for m in first} & set(found)
    assert {m.payload for m in first} | set(found) >= set(numbers(range(COUNT)))


def test_messages_that_came_after_the_subscription_are_not_owed(bench: StoredBench) -> None:
    s = subscribe(bench)
    early = {m[0] for m in got(s)}
    replaced, removed = sorted(set(numbers(range(COUNT))) - early)[:2]
    p = bench.client("p")
    bench.pass_time(0.5)
    p.publish("r/new", b"new", 1, retain=True)
    p.publish(f"r/{int(replaced)}", b"newer", 1, ident=2, retain=True)
    p.publish(f"r/{int(removed)}", b"", 1, ident=3, retain=True)
    bench.commit()
    s.drop()
    again = bench.restart()
    found = everything(again, resume(again, "s"))
    assert found.count(b"new") == found.count(b"newer") == 1
    assert replaced not in found
    assert removed not in found
    settled(again)


def test_what_is_owed_waits_while_the_client_is_away_and_fills_no_queue(bench: StoredBench) -> None:
    s = subscribe(bench)
    early = {m[0] for m in got(s)}
    before = len(stored(bench, records.PUT))
    s.drop()
    bench.commit()
    assert bench.engine.sessions["s"].waiting == 0
    assert len(stored(bench, records.PUT)) - before <= 32, "those in flight"
    found = everything(bench, resume(bench, "s"))
    assert sorted({*early, *found} - {b"zero"}) == numbers(range(COUNT))
    settled(bench)


def test_unsubscribing_and_the_end_of_the_session_end_it(bench: StoredBench) -> None:
    s = subscribe(bench)
    s.take()
    s.send(packets.encode_unsubscribe(2, 4, [b"r/#"]))
    bench.commit()
    settled(bench)
    s.send(ack(PUBACK, 1))
    assert not [m for m in got(s) if not m[2]]
    subscribe(bench, "r/1")
    subscribe(bench)
    bench.client("s")
    settled(bench)


def test_rights_are_asked_when_the_client_is_back(bench: StoredBench) -> None:
    subscribe(bench)
    again = bench.restart()
    for n in range(50):
        again.gate.deny_receive.add((None, f"r/{n}"))
    found = everything(again, resume(again, "s"))
    assert {int(payload) for payload in found if payload != b"zero"} <= set(range(COUNT))
    waiting = {b"%d" % n for n in range(50)}
    assert len(waiting & set(found)) <= 32, "what was in flight at most"


def test_a_subscription_that_could_not_be_written_owes_nothing(bench: StoredBench) -> None:
    s = bench.client("s", version=5, clean=False, session_expiry_interval=1000)
    bench.commit()
    s.take()
    s.send(packets.encode_subscribe(1, 5, [(b"r/#", 1)]))
    bench.store.fail(full=True)
    bench.settle()
    assert [p.codes for p in s.take()] == [[0x97]]
    bench.store.make_space()
    bench.pass_time(2)
    settled(bench)


def test_a_full_disk_holds_them_up_and_loses_none(bench: StoredBench) -> None:
    s = subscribe(bench)
    bench.store.refusing = "full"
    found = {m[0] for m in got(s)}
    for ident in range(1, 33):
        s.send(ack(PUBACK, ident))
    assert not got(s)
    bench.store.make_space()
    bench.pass_time(0.5)
    found.update(everything(bench, s))
    assert sorted(found - {b"zero"}) == numbers(range(COUNT))
    settled(bench)


def test_bad_notes_of_what_is_owed_are_left_out_alone(bench: StoredBench) -> None:
    """D-11"""
    s = subscribed(bench, "s", "t")
    s.drop()
    bench.commit()
    for owed in (-1, "soon", 1.5, None):
        record = records.encode_json(records.SUBSCRIBED, 1, {"sub": ["x", 1, 0, 0, 0], "owed": owed})
        bench.store.disk.put(record)
    again = bench.restart()
    assert again.recovery.bad == 4
    assert [x.filter for x in again.engine.sessions["s"].subscriptions or ()] == [b"t"]


def test_nothing_is_noted_where_nothing_is_owed(bench: StoredBench) -> None:
    subscribed(bench, "s", "elsewhere", "r/zero")
    assert all(b"owed" not in payload for payload in stored(bench, records.SUBSCRIBED))


# what waited for a client that is back -----------------------------------------------------------------------------


def test_what_is_sent_to_a_client_that_is_back_carries_dup_after_a_crash(bench: StoredBench) -> None:
    """[MQTT-3.3.1-1] It is sent once the journal knows that the client is back."""
    subscribed(bench, "s", "t").drop()
    p = bench.client("p")
    for n in range(3):
        p.publish("t", b"%d" % n, 1, ident=n + 1)
    bench.commit()
    s = parts.resume(bench, "s")
    early: list[bytes] = []
    for _ in range(100):
        early += [m[0] for m in got(s)]
        if early:
            break
        if bench.store.reads:
            bench.store.step_read()
        elif bench.store.commits:
            bench.store.step()
        elif bench.later:
            bench.fire()
        bench.settle()
    assert early == [b"0", b"1", b"2"]
    late = got(resume(bench.restart(), "s"))
    assert late == [(payload, 1, True) for payload in early]
