"""What is on disk when somebody hears that it is, and what a crash at the wrong moment leaves."""

from __future__ import annotations

from typing import Any

import pytest

from broker.engine import compaction, records
from broker.mqtt import packets
from tests.unit.engine import parts
from tests.unit.engine.harness import Client
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack, publish
from tests.unit.engine.stores import StoredBench, check
from tests.unit.engine.test_instances import spec, worker


@pytest.fixture
def bench() -> StoredBench:
    return StoredBench()


def subscribed(bench: StoredBench, client_id: str, *filters: str, qos: int = 1, **options: Any) -> Client:
    """A persistent client with its subscriptions on disk."""
    client = bench.client(client_id, clean=False, **options)
    client.send(packets.encode_subscribe(1, client.version, [(f.encode(), qos) for f in filters]))
    bench.commit()
    client.take()
    return client


def resume(bench: StoredBench, client_id: str, version: int = 4, **properties: Any) -> Client:
    """A client that is back and has been sent what waited on disk, CONNACK first."""
    client = parts.resume(bench, client_id, version, **properties)
    bench.commit()
    return client


def got(client: Client) -> list[tuple[bytes, int, bool]]:
    """(payload, QoS, DUP) of the messages since the last look."""
    return [(p.payload, p.qos, p.dup) for p in client.take() if isinstance(p, packets.Publish)]


def stored(bench: StoredBench, kind: int) -> list[bytes]:
    """The payloads of all records of a kind."""
    return [payload for _, found, payload in bench.store.disk.records() if found == kind]


@pytest.fixture
def compact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every journal that is mostly dead is worth copying."""
    monkeypatch.setattr(compaction, "KEEP", 1000)


# when somebody hears ------------------------------------------------------------------------------------------


def test_what_is_acknowledged_before_it_is_written_never_is(bench: StoredBench) -> None:
    s = subscribed(bench, "s", "t")
    p = bench.client("p", clean=False)
    bench.commit()
    before = bench.store.bytes
    for i in range(50):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
        (message,) = [m for m in s.take() if isinstance(m, packets.Publish)]
        assert not p.take(), "nobody has it safe"
        s.send(ack(PUBACK, message.packet_id))
        assert p.bytes() == ack(PUBACK, i + 1)
    bench.pass_time(1)
    assert bench.store.bytes == before
    assert bench.journal.idle


# compaction ---------------------------------------------------------------------------------------------------


def fill(bench: StoredBench, client: Client, count: int) -> None:
    """Traffic that is dead at once: a retained message set again and again."""
    for _ in range(count):
        client.publish("filler", b"f" * 300, 1, retain=True)
        bench.commit()
    client.take()


@pytest.mark.usefixtures("compact")
def test_a_message_in_flight_to_many_survives_being_copied(bench: StoredBench) -> None:
    receivers = [subscribed(bench, f"s{i}", "t") for i in range(3)]
    p = bench.client("p")
    p.publish("t", b"kept", 1, retain=True)
    bench.commit()
    fill(bench, p, 60)
    assert min(bench.store.disk.segments) > 1, "the first segment was copied"
    check(bench)
    receivers[0].send(ack(PUBACK, 1))
    fill(bench, p, 60)
    check(bench)
    again = bench.restart()
    assert [got(resume(again, f"s{i}")) for i in range(3)] == [[], [(b"kept", 1, True)], [(b"kept", 1, True)]]
    assert [m.payload for m in again.engine.retained_store.matching(b"t", again.now)] == [b"kept"]


@pytest.mark.usefixtures("compact")
@pytest.mark.parametrize("payload", [b"", b"new"])
def test_a_retained_message_replaced_while_it_is_copied_stays_replaced(bench: StoredBench, payload: bytes) -> None:
    p = bench.client("p")
    p.publish("t", b"old", 1, retain=True)
    bench.commit()
    for _ in range(200):
        p.publish("filler", b"f" * 300, 1, retain=True)
        while bench.store.commits or bench.later:
            bench.settle()
            if bench.store.commits:
                bench.store.step()
            elif bench.later:
                bench.fire()
        bench.settle()
        if bench.store.reads:
            break
    assert bench.store.reads, "copying began"
    bench.store.step_read()
    p.publish("t", payload, 1, retain=True)
    bench.commit()
    check(bench)
    again = bench.restart()
    assert [m.payload for m in again.engine.retained_store.matching(b"t", again.now)] == ([payload] if payload else [])


@pytest.mark.usefixtures("compact")
def test_a_bad_record_does_not_end_copying(bench: StoredBench) -> None:
    """D-11: what cannot be read is not copied; the rest is, and the segment goes."""
    bench.store.disk.put(records.encode_put(_broken(), True, 0, 0, 0, 0, b"", b"{"))
    again = bench.restart()
    p = again.client("p")
    fill(again, p, 60)
    assert min(again.store.disk.segments) > 1
    check(again)


def _broken() -> Any:
    from broker.engine.message import Message

    return Message(b"bad", b"m", 1, True, b"", 0.0, None)


# what a publisher sends again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5])
def test_a_retained_message_sent_again_after_a_crash_does_not_take_the_place_of_a_later_one(
    bench: StoredBench, count: int
) -> None:
    """All were on disk, no PUBREC was heard: replaced before it was written, a message is still one that was taken."""
    p = bench.client("p", clean=False, session_expiry_interval=1000)
    bench.commit()
    p.take()
    for i in range(count):
        p.publish("t", b"%d" % i, 2, ident=i + 1, retain=True)
    bench.commit()
    assert len(p.take()) == count, "one PUBREC each"
    again = bench.restart()
    p = resume(again, "p")
    p.take()
    for i in range(count):
        p.publish("t", b"%d" % i, 2, ident=i + 1, retain=True, dup=True)
    again.commit()
    assert len(p.take()) == count
    assert [m.payload for m in again.engine.retained_store.matching(b"t", again.now)] == [b"%d" % (count - 1)]


def test_a_message_that_everybody_had_before_it_was_written_is_not_taken_twice(bench: StoredBench) -> None:
    """At QoS 2, though no PUBREC was heard."""
    s = subscribed(bench, "s", "t", qos=1)
    p = bench.client("p", clean=False, session_expiry_interval=1000)
    bench.commit()
    p.take()
    p.publish("t", b"m", 2, ident=7)
    assert got(s) == [(b"m", 1, False)]
    s.send(ack(PUBACK, 1))
    bench.commit()
    assert len(p.take()) == 1, "PUBREC"
    again = bench.restart()
    s, p = resume(again, "s"), resume(again, "p")
    s.take()
    p.publish("t", b"m", 2, ident=7, dup=True)
    again.commit()
    assert got(s) == []


# failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("gone", [False, True])
def test_a_qos_2_message_that_could_not_be_written_is_taken_when_it_comes_again(version: int, gone: bool) -> None:
    """The publisher never heard PUBREC: sent again, the message must not pass for one that has been taken."""
    bench = StoredBench()
    options: dict[str, Any] = {"session_expiry_interval": 1000} if version == 5 else {}
    s = subscribed(bench, "s", "t", qos=2)
    p = bench.client("p", version=version, clean=False, **options)
    bench.commit()
    p.take()
    p.publish("t", b"m", 2, ident=7)
    if gone:
        p.drop()
    bench.store.fail(full=True)
    bench.settle()
    if not gone:
        assert p.closed if version == 4 else p.bytes() == bytes((0x50, 3, 0, 7, 0x97))
        p.drop()
    bench.store.make_space()
    bench.pass_time(2)
    bench.commit()
    p = resume(bench, "p", version, **options)
    p.take()
    p.publish("t", b"m", 2, ident=7, dup=True)
    bench.commit()
    assert p.bytes() == ack(PUBREC, 7)
    assert [m[0] for m in got(s)] == [b"m"]


def test_a_number_whose_message_was_not_written_is_not_given_to_one_that_is_lost_then(bench: StoredBench) -> None:
    """What is noted as done must not hit the message that has its number after a restart."""
    s = subscribed(bench, "s", "t", "u")
    p = bench.client("p", version=5)
    p.publish("t", b"0", 1, ident=1)
    bench.commit()
    p.publish("t", b"1", 1, ident=2)
    bench.fire()
    while not bench.store.commits:
        bench.fire()
    s.send(ack(PUBACK, 2))
    bench.store.fail(full=True)
    bench.settle()
    bench.store.make_space()
    bench.pass_time(3)
    bench.commit()
    again = bench.restart()
    q = again.client("q")
    q.publish("u", b"new", 1)
    again.commit()
    assert q.bytes() == ack(PUBACK, 1)
    third = again.restart()
    assert [m[0] for m in got(resume(third, "s"))] == [b"0", b"new"]


def test_a_shared_message_is_not_given_up_before_it_is_safe_elsewhere(bench: StoredBench) -> None:
    """P-79: a member goes; a crash before the next commit is finished does not lose what moved."""
    a = subscribed(bench, "a", "$share/g/t")
    subscribed(bench, "b", "$share/g/t")
    p = bench.client("p")
    fill(bench, p, 30)
    p.publish("t", b"m", 1)
    bench.commit()
    assert p.bytes() == ack(PUBACK, 1)
    for name in ("a", "b"):
        spool = bench.engine.sessions[name].spool
        assert spool is not None
        bench.journal.snapshot(spool)
    fill(bench, p, 30)
    p.publish("other", b"x", 1, retain=True)  # a commit on its way
    assert bench.store.commits
    holder = "a" if got(a) else "b"
    bench.engine.sessions[holder].channel.lost(None)
    bench.store.step()
    again = bench.restart()
    found = [m[0] for name in ("a", "b") for m in got(resume(again, name))]
    assert found == [b"m"]


def test_a_full_store_keeps_shared_messages_where_they_are(bench: StoredBench) -> None:
    """P-79: what was acknowledged is not lost because it cannot be stored once more."""
    subscribed(bench, "a", "$share/g/t")
    subscribed(bench, "b", "$share/g/t")
    p = bench.client("p")
    for i in range(6):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    assert len(p.bytes()) == 24
    bench.store.refusing = "full"
    bench.engine.sessions["a"].channel.lost(None)
    bench.store.refusing = ""
    bench.pass_time(2)
    bench.commit()
    again = bench.restart()
    found = {m[0] for name in ("a", "b") for m in got(resume(again, name))}
    assert found == {b"%d" % i for i in range(6)}


def test_a_retained_message_is_not_given_up_before_its_successor_is_safe(bench: StoredBench) -> None:
    p = bench.client("p")
    p.publish("t", b"old", 1, retain=True)
    bench.commit()
    fill(bench, p, 30)
    p.publish("other", b"x", 1, retain=True)
    p.publish("t", b"new", 0, retain=True)
    bench.store.step()
    again = bench.restart()
    assert [m.payload for m in again.engine.retained_store.matching(b"t", again.now)] in ([b"old"], [b"new"])


def test_a_second_clear_waits_for_the_first(bench: StoredBench) -> None:
    """D-12: the topic has no retained message any more, but that is not on disk yet."""
    p = bench.client("p")
    q = bench.client("q")
    p.publish("t", b"m", 1, retain=True)
    bench.commit()
    p.take()
    p.publish("t", b"", 1, retain=True)
    q.publish("t", b"", 1, retain=True)
    assert not p.take()
    heard = q.bytes() == ack(PUBACK, 1)
    assert not (heard and bench.restart().engine.retained_store.count)
    bench.commit()
    assert q.bytes() == (b"" if heard else ack(PUBACK, 1))
    assert not bench.restart().engine.retained_store.count


def test_unsuback_to_a_client_that_takes_no_code_is_not_sent_for_a_failure(bench: StoredBench) -> None:
    """D-13: a 3.x UNSUBACK always says yes."""
    s = subscribed(bench, "s", "t")
    s.send(packets.encode_unsubscribe(2, 4, [b"t"]))
    bench.store.fail(full=True)
    bench.settle()
    assert bench.restart().engine.sessions["s"].subscriptions, "the subscription is there again"
    assert s.closed
    assert not s.take()


# QoS 2 from the client ----------------------------------------------------------------------------------------


def test_pubcomp_to_a_repeated_pubrel_waits_as_the_first_does(bench: StoredBench) -> None:
    """D-02: whoever has PUBCOMP uses the identifier again; its new message must be known after a crash."""
    subscribed(bench, "s", "t", qos=2)
    p = bench.client("p", version=5, clean=False, session_expiry_interval=1000)
    p.publish("t", b"1", 2, ident=7)
    bench.commit()
    assert p.bytes().endswith(ack(PUBREC, 7))
    bench.client("q").publish("x", b"", 1, retain=True).publish("x", b"m", 1, retain=True)  # a commit on its way
    assert bench.store.commits
    p.send(ack(PUBREL, 7))
    assert not p.bytes()
    p.drop()
    p = parts.resume(bench, "p", 5, session_expiry_interval=1000)
    p.take()
    p.send(ack(PUBREL, 7))
    while not p.bytes():
        bench.store.step()
        bench.settle()
    p.publish("t", b"2", 2, ident=7)
    bench.commit()
    again = bench.restart()
    p = resume(again, "p", 5, session_expiry_interval=1000)
    p.take()
    p.publish("t", b"2", 2, ident=7, dup=True)
    again.commit()
    assert sorted(m[0] for m in got(resume(again, "s"))) == [b"1", b"2"]


def test_an_identifier_freed_before_its_message_is_written_is_free_after_a_crash(bench: StoredBench) -> None:
    """D-02: the publisher's exchange is over before the message is on disk; the next one under its number is new."""
    bench.engine.instances.ensure("x", spec(ack="accept"))
    p = bench.client("p", version=5, clean=False, session_expiry_interval=1000)
    bench.commit()
    p.take()
    p.publish("t/1", b"1", 2, ident=7)
    assert bench.store.commits
    p.send(ack(PUBREL, 7))
    heard = p.bytes()
    while not heard.endswith(ack(PUBCOMP, 7)):
        bench.store.step()
        bench.settle()
        heard += p.bytes()
    if bench.store.commits:
        bench.store.step()
    again = bench.restart()
    again.engine.instances.ensure("x", spec(ack="accept"))
    p = resume(again, "p", 5, session_expiry_interval=1000)
    p.take()
    p.publish("t/1", b"2", 2, ident=7)
    again.commit()
    assert again.engine.sessions["isthmus/x/0"].waiting == 2


# order --------------------------------------------------------------------------------------------------------


def test_order_survives_a_connection_that_ends_while_its_queue_is_read(bench: StoredBench) -> None:
    s = subscribed(bench, "s", "t")
    s.drop()
    p = bench.client("p", version=5)
    for i in range(700):
        p.send(publish("t", b"%d" % i, 1, ident=i + 1, version=5))
        if i % 50 == 0:
            bench.commit()
    bench.commit()
    s = parts.resume(bench, "s")
    bench.store.step()
    bench.settle()
    bench.store.step_read()
    bench.settle()
    assert bench.store.reads, "more is being read while some queues"
    s.drop()
    bench.commit()
    check(bench)
    s = resume(bench, "s")
    seen: list[int] = []
    for _ in range(100):
        bench.commit()
        for m in s.take():
            if isinstance(m, packets.Publish):
                if not m.dup:
                    seen.append(int(m.payload))
                s.send(ack(PUBACK, m.packet_id))
    assert seen == list(range(32, 700))


def test_a_queue_dropped_while_it_is_read(bench: StoredBench) -> None:
    bench.engine.instances.ensure("x", spec())
    p = bench.client("p", version=5)
    for i in range(20):
        p.publish("t/1", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    w = worker(bench)
    bench.store.step()
    bench.settle()
    assert bench.store.reads
    assert bench.engine.instances.drop_queue("x") == 20
    p.publish("t/1", b"new", 1, ident=99)
    bench.commit()
    check(bench)
    assert [m[0] for m in got(w)] == [b"new"]
    assert bench.engine.sessions["isthmus/x/0"].queue_bytes == 0


def test_bytes_of_a_queue_are_the_same_after_a_restart(bench: StoredBench) -> None:
    bench.engine.instances.ensure("x", spec())
    p = bench.client("p")
    for i in range(20):
        p.publish("t/1", b"%d" % i, 1, ident=i + 1)
    bench.commit()
    before = bench.engine.sessions["isthmus/x/0"].queue_bytes
    again = bench.restart()
    assert again.engine.sessions["isthmus/x/0"].queue_bytes == before
    again.engine.instances.ensure("x", spec())
    w = worker(again)
    again.commit()
    assert len(got(w)) == 20
    assert again.engine.sessions["isthmus/x/0"].queue_bytes == 0
