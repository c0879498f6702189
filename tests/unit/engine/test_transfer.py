"""A session moves from one engine to another, whatever state it is in."""

from __future__ import annotations

import pickle

import pytest

from broker.engine.transfer import export_session, import_session
from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack, closed_with, is_empty, payloads, resume


def move(old: Bench, new: Bench, client_id: str) -> None:
    state = pickle.loads(pickle.dumps(export_session(old.engine, client_id)))
    old.settle()
    import_session(new.engine, state)


@pytest.mark.parametrize("version", [4, 5])
def test_a_session_moves_in_the_middle_of_qos_2(version: int) -> None:
    old, new = Bench(), Bench()
    new.now = 5_000_000.0
    new.engine.tick(new.now, 1_700_000_000_000)
    options = {"session_expiry_interval": 1000} if version == 5 else {}
    s = old.client("s", version=version, clean=False, username="u", **options)
    s.subscribe("t", qos=2)
    s.subscribe("u/+", qos=1)
    p = old.client("p")
    for i in range(3):
        p.publish("t", b"%d" % i, 2, ident=i + 1)
    released, published, _ = s.take()
    s.send(ack(PUBREC, released.packet_id))
    s.take()
    s.publish("own", b"m", 2, ident=77)
    s.publish("own", b"m", 2, ident=78)
    s.send(ack(PUBREL, 78))
    s.take()
    s.drop()
    for i in range(3, 5):
        p.publish("t", b"%d" % i, 1 + i % 2, ident=i + 1)
    p.drop()
    move(old, new, "s")
    assert is_empty(old.engine)
    new.client("p").publish("u/x", b"5", 1)
    s = resume(new, "s", version, username="u", **options)
    connack, release, *again = s.take()
    assert connack.session_present
    assert release.packet_id == released.packet_id
    assert [(m.payload, m.qos, m.dup) for m in again] == [
        (b"1", 2, True), (b"2", 2, True), (b"3", 2, False), (b"4", 1, False), (b"5", 1, False)
    ]  # fmt: skip
    assert again[0].packet_id == published.packet_id
    assert len({m.packet_id for m in again} | {released.packet_id}) == 6
    s.send(ack(PUBCOMP, released.packet_id))
    s.publish("own", b"m", 2, ident=77, dup=True)
    s.publish("own", b"m", 2, ident=78)
    s.send(ack(PUBREL, 77))
    answers = s.bytes()
    assert answers.startswith(ack(PUBREC, 77))
    assert answers.endswith(ack(PUBCOMP, 77))
    assert new.engine.core.received == 2, "78 is new, 77 was taken by the old engine"
    for m in again:
        s.send(ack(PUBACK, m.packet_id) if m.qos == 1 else ack(PUBREC, m.packet_id))
        s.send(*([ack(PUBCOMP, m.packet_id)] if m.qos == 2 else []))
    assert new.engine.sessions["s"].queued == 0


def test_a_live_connection_is_told_to_go_elsewhere() -> None:
    old, new = Bench(), Bench()
    s = old.client("s", version=5, session_expiry_interval=100)
    s.subscribe("t", qos=1)
    move(old, new, "s")
    assert closed_with(s, 0x9D)
    new.client("p").publish("t", b"m", 1)
    assert payloads(resume(new, "s", 5)) == [b"m"]


def test_what_is_left_of_every_expiry_moves_along() -> None:
    old, new = Bench(), Bench()
    s = old.client("s", version=5, clean=False, session_expiry_interval=100)
    s.subscribe("t", qos=1)
    s.drop()
    old.client("p", version=5).publish("t", b"m", 1, properties=b"\x02\x00\x00\x00\x1e")
    old.pass_time(10)
    move(old, new, "s")
    new.pass_time(5)
    got = resume(new, "s", 5, session_expiry_interval=100).take()[1]
    assert got.properties.message_expiry_interval == 15
    move(new, old, "s")
    old.pass_time(200)
    assert "s" not in old.engine.sessions


def test_shared_subscriptions_and_options_move_along() -> None:
    old, new = Bench(), Bench()
    s = old.client("s", version=5, session_expiry_interval=100)
    s.subscribe(("$share/g/t", 1), ("own", 4 | 8 | 1), subscription_identifiers=[7])
    move(old, new, "s")
    assert not old.engine.groups
    s = resume(new, "s", 5)
    s.take()
    s.publish("own", b"own")
    assert not s.take()
    new.client("p").publish("own", b"other", retain=True).publish("t", b"shared", 1)
    own, shared = s.take()
    assert (own.retain, own.properties.subscription_identifiers) == (True, [7])
    assert (shared.payload, shared.properties.subscription_identifiers) == (b"shared", [7])


def test_rights_hold_at_the_new_home() -> None:
    old, new = Bench(), Bench()
    s = old.client("s", clean=False, username="u")
    s.subscribe("t", "k", qos=1)
    s.drop()
    move(old, new, "s")
    new.gate.deny_receive.add(("u", "t"))
    p = new.client("p")
    p.publish("t", b"offline", 1).publish("k", b"offline", 1)
    s = resume(new, "s", username="u")
    assert [m.topic for m in s.take()[1:]] == [b"k"]
    p.publish("t", b"online", 1)
    assert not s.take()


def test_what_cannot_move_says_so() -> None:
    old, new = Bench(), Bench()
    with pytest.raises(KeyError):
        export_session(old.engine, "nobody")
    old.client("s", clean=False)
    state = export_session(old.engine, "s")
    import_session(new.engine, state)
    with pytest.raises(ValueError, match="already a session"):
        import_session(new.engine, state)
    with pytest.raises(ValueError, match="format 99"):
        import_session(Bench().engine, state | {"format": 99})
    brief = old.client("brief")
    with pytest.raises(KeyError):
        export_session(old.engine, "brief")
    assert brief.closed
