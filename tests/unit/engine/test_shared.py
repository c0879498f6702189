"""`$share`: each message to one member, and none lost when a member goes."""

from __future__ import annotations

from collections import Counter

import pytest

from broker.mqtt import packets
from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, ack, payloads, resume


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_messages_go_to_the_members_in_turn(bench: Bench) -> None:
    members = [bench.client(f"m{i}", version=5 if i else 4) for i in range(3)]
    plain = bench.client("plain")
    plain.subscribe("t/#")
    for member in members:
        member.subscribe("$share/g/t/+", qos=1)
    other = bench.client("other")
    other.subscribe("$share/h/t/+")
    p = bench.client("p")
    for i in range(9):
        p.publish("t/x", b"%d" % i, i % 2)
    got = [payloads(member) for member in members]
    assert [len(one) for one in got] == [3, 3, 3]
    assert sorted(payload for one in got for payload in one) == [b"%d" % i for i in range(9)]
    assert payloads(plain) == payloads(other) == [b"%d" % i for i in range(9)]


def test_by_hash_a_publisher_keeps_to_its_member() -> None:
    bench = Bench(shared_strategy="hash")
    members = [bench.client(f"m{i}", version=5, receive_maximum=1000) for i in range(4)]
    for member in members:
        member.subscribe("$share/g/t", qos=1)
    for n in range(20):
        p = bench.client(f"p{n}")
        for _ in range(5):
            p.publish("t", b"%d" % n, 1)
    owners: dict[bytes, set[int]] = {}
    for i, member in enumerate(members):
        for payload in payloads(member):
            owners.setdefault(payload, set()).add(i)
    assert len(owners) == 20
    assert all(len(where) == 1 for where in owners.values())
    assert len(set.union(*owners.values())) > 1


def test_a_member_has_its_own_options_and_may_be_in_a_group_once(bench: Bench) -> None:
    s = bench.client("s", version=5)
    s.subscribe("$share/g/t", qos=0, subscription_identifiers=[1])
    s.subscribe("$share/g/t", qos=1, subscription_identifiers=[2])
    bench.client("p").publish("t", qos=2)
    (m,) = s.take()
    assert (m.qos, m.properties.subscription_identifiers) == (1, [2])
    s.send(packets.encode_unsubscribe(1, 5, [b"$share/g/t"]))
    assert s.take()[0].codes == [0]
    bench.client("p").publish("t", qos=2)
    assert not s.take()
    assert not bench.engine.groups


def test_connected_members_come_before_durable_absent_ones(bench: Bench) -> None:
    away = bench.client("away", clean=False)
    away.subscribe("$share/g/t", qos=1)
    here = bench.client("here")
    here.subscribe("$share/g/t", qos=1)
    away.drop()
    p = bench.client("p")
    for i in range(4):
        p.publish("t", b"%d" % i, 1)
    assert len(payloads(here)) == 4
    here.drop()
    p.publish("t", b"4", 1)
    assert [m.payload for m in resume(bench, "away").take()[1:]][-1] == b"4"


def test_a_member_that_reads_nothing_is_passed_over(bench: Bench) -> None:
    stuck, good = bench.client("stuck"), bench.client("good")
    for member in (stuck, good):
        member.subscribe("$share/g/t", qos=1)
    stuck.channel.pause_writing()
    p = bench.client("p")
    for i in range(6):
        p.publish("t", b"%d" % i, 1)
    assert len(payloads(good)) == 6


@pytest.mark.parametrize("persistent", [False, True])
def test_p79_what_a_gone_member_had_not_acknowledged_goes_to_the_others(bench: Bench, persistent: bool) -> None:
    members = []
    for i in range(3):
        member = bench.client(
            f"m{i}", version=5, clean=False, receive_maximum=50, session_expiry_interval=60 * persistent
        )
        member.subscribe("$share/g/t", qos=1)
        members.append(member)
    p = bench.client("p")
    for i in range(240):
        p.publish("t", b"%d" % i, 1)
    seen: Counter[bytes] = Counter()
    first = members[0].take()
    assert len(first) == 50
    assert bench.engine.sessions["m0"].queued == 80
    for m in first[:10]:
        seen[m.payload] += 1
        members[0].send(ack(PUBACK, m.packet_id))
    members[0].take()
    members[0].drop()
    if persistent:
        assert bench.engine.sessions["m0"].queued == 0
    busy = True
    while busy:
        busy = False
        for member in members[1:]:
            for m in member.take():
                busy = True
                seen[m.payload] += 1
                member.send(ack(PUBACK, m.packet_id))
    assert seen == Counter({b"%d" % i: 1 for i in range(240)})


def test_p79_without_another_member_it_waits_for_the_same_one(bench: Bench) -> None:
    s = bench.client("s", version=5, clean=False, receive_maximum=2, session_expiry_interval=60)
    s.subscribe("$share/g/t", qos=1)
    p = bench.client("p")
    for i in range(4):
        p.publish("t", b"%d" % i, 1)
    sent = s.take()
    s.drop()
    s = resume(bench, "s", 5, receive_maximum=10, session_expiry_interval=60)
    again = s.take()[1:]
    assert [(m.payload, m.dup) for m in again] == [(b"0", True), (b"1", True), (b"2", False), (b"3", False)]
    assert [m.packet_id for m in again[:2]] == [m.packet_id for m in sent]


def test_p79_qos_2_waits_for_the_member_it_was_sent_to(bench: Bench) -> None:
    s = bench.client("s", version=5, clean=False, session_expiry_interval=60)
    other = bench.client("o", version=5)
    for member in (s, other):
        member.subscribe("$share/g/t", qos=2)
    p = bench.client("p")
    for i in range(4):
        p.publish("t", b"%d" % i, 2, ident=i + 1)
    mine, theirs = s.take(), other.take()
    assert (len(mine), len(theirs)) == (2, 2)
    s.send(ack(PUBREC, mine[0].packet_id))
    s.drop()
    assert not other.take()
    s = resume(bench, "s", 5)
    _, release, again = s.take()
    assert (release.packet_id, again.packet_id, again.dup) == (mine[0].packet_id, mine[1].packet_id, True)
    s.send(ack(PUBCOMP, mine[0].packet_id), ack(PUBREC, mine[1].packet_id), ack(PUBCOMP, mine[1].packet_id))
    assert bench.engine.sessions["s"].queued == 0


def test_p79_rights_hold_for_what_is_given_to_another_member(bench: Bench) -> None:
    s = bench.client("s", version=5)
    denied, allowed = bench.client("d", username="u"), bench.client("a")
    s.subscribe("$share/g/t/#", qos=1)
    p = bench.client("p")
    p.publish("t/secret", b"m", 1)
    bench.gate.deny_receive.add(("u", "t/secret"))
    denied.subscribe("$share/g/t/#", qos=1)
    allowed.subscribe("$share/g/t/#", qos=1)
    s.drop()
    assert not denied.take()
    assert payloads(allowed) == [b"m"]
