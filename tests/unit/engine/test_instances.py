"""Sessions of sinks and bridges: made before their worker comes, bounded, ordered per key, kept when it goes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.engine.message import Message
from broker.extend.session import SessionSpec
from broker.mqtt import packets
from broker.mqtt.properties import user_property
from tests.unit.engine.harness import Bench, Client, connect_packet, props
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, ack, closed_with, payloads, publish


@pytest.fixture
def bench() -> Bench:
    return Bench(ack_timeout=30)


def spec(*filters: tuple[str, int], **values: Any) -> SessionSpec:
    return SessionSpec(filters=filters or (("t/#", 2),), **values)


def by_client(message: Message) -> str:
    return message.origin.client_id if message.origin is not None else ""


def worker(bench: Bench, name: str = "x/0") -> Client:
    """What a worker attaches; its packets are still to be taken, CONNACK first."""
    client = bench.socket(privileged=True)
    client.version = 5
    client.send(connect_packet(f"isthmus/{name}", 5, clean=False, receive_maximum=65535))
    return client


def meta(message: Any) -> dict[str, Any]:
    (raw,) = [v for k, v in message.properties.user_properties if k == "$isthmus"]
    found: dict[str, Any] = json.loads(raw)
    return found


def test_nothing_is_missed_before_the_worker_attaches(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    p = bench.client("p", version=5, username="u")
    p.publish("t/0", b"0", 0).publish("t/1", b"1", 1, ident=1).publish("t/2", b"2", 2, ident=2, retain=True)
    assert p.bytes() == ack(PUBACK, 1) + ack(PUBREC, 2)
    connack, *got = worker(bench).take()
    assert connack.session_present
    assert [(m.payload, m.qos, m.retain) for m in got] == [(b"0", 1, False), (b"1", 1, False), (b"2", 2, True)]
    told = meta(got[2])
    assert (told["c"], told["u"], told["a"], told["q"], told["r"], told["o"]) == ("p", "u", "127.0.0.1", 2, 1, None)
    assert len({meta(m)["i"] for m in got}) == 3


def test_an_instance_is_told_how_many_bridges_a_message_has_crossed(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    p = bench.client("p", version=5)
    p.publish("t/0", b"here", properties=user_property("a", "b"))
    for path in ("one", "one,two"):
        p.publish("t/0", path.encode(), properties=user_property("a", "b") + user_property("x-bridge-path", path))
    _, *got = worker(bench).take()
    assert [(m.payload, meta(m)["h"]) for m in got] == [(b"here", 0), (b"one", 1), (b"one,two", 2)]


def test_without_upgrade_qos_0_stays_0(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(upgrade_qos=False))
    bench.client("p").publish("t/0", b"m")
    assert worker(bench).take()[1].qos == 0
    bench.engine.instances.ensure("y", spec(("t/#", 0)))
    bench.client("p").publish("t/0", b"m")
    assert worker(bench, "y/0").take()[1].qos == 0


def test_acknowledgements_in_any_order_free_their_slots(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    w = worker(bench)
    w.take()
    p = bench.client("p")
    for i in range(100):
        p.publish("t/1", b"%d" % i, 1)
    got = w.take()
    for m in got[:0:-1]:
        w.send(ack(PUBACK, m.packet_id))
    session = bench.engine.sessions["isthmus/x/0"]
    assert session.queued == 1
    assert session.acked == 99
    w.drop()
    (again,) = worker(bench).take()[1:]
    assert (again.payload, again.packet_id, again.dup) == (b"0", got[0].packet_id, True)


def test_what_is_sent_again_keeps_its_order(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    w = worker(bench)
    p = bench.client("p")
    for i in range(300):
        p.publish("t/1", b"%d" % i, 1)
    for m in w.take()[1:]:
        if int(m.payload) % 3:
            w.send(ack(PUBACK, m.packet_id))
    w.drop()
    p.publish("t/1", b"300", 1)
    assert [int(m.payload) for m in worker(bench).take()[1:]] == [*range(0, 300, 3), 300]


def test_an_instance_never_gets_back_what_it_published(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(("#", 1), retained="always"))
    bench.engine.instances.ensure("y", spec(("#", 1)))
    w = worker(bench)
    into = worker(bench, "x/in")
    into.take()
    into.publish("t/1", b"own", 1, retain=True)
    assert len(into.take()) == 1
    assert len(w.take()) == 1, "only CONNACK"
    w.drop()
    into.publish("t/1", b"own", 1)
    bench.client("p").publish("t/1", b"other")
    assert payloads(worker(bench)) == [b"other"]
    assert [meta(m)["o"] for m in worker(bench, "y/0").take()[1:]] == ["x", "x", None]
    bench.engine.instances.ensure("x", spec(("t/1", 1), retained="always"))
    assert bench.engine.sessions["isthmus/x/0"].queued == 1, "the retained one is its own too"


def test_lanes_keep_the_order_of_each_key(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(lanes=3), by_client)
    workers = [worker(bench, f"x/{n}") for n in range(3)]
    for i in range(10):
        for n in range(12):
            bench.client(f"p{n}").publish("t/1", b"%d %d" % (n, i), 1)
    seen = [[m.payload.split() for m in w.take()[1:]] for w in workers]
    keys = [{k for k, _ in lane} for lane in seen]
    assert all(keys)
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]
    for lane in seen:
        for key in {k for k, _ in lane}:
            assert [int(i) for k, i in lane if k == key] == list(range(10))
    assert len(bench.engine.instances.lanes("x")) == 3


def test_lanes_are_held_back_from_their_own_instance(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(lanes=2), by_client)
    into = worker(bench, "x/in")
    into.publish("t/1", b"own", 1)
    assert sum(s.queued for s in bench.engine.instances.lanes("x")) == 0


def test_retained_messages_are_sent_when_the_instance_asks(bench: Bench) -> None:
    p = bench.client("p")
    for i in range(8):
        p.publish(f"t/{i}", b"m", i % 3, ident=i + 1, retain=True)

    def queued(name: str, **values: Any) -> int:
        bench.engine.instances.ensure(name, spec(**values), by_client)
        return sum(s.queued for s in bench.engine.instances.lanes(name))

    assert queued("never") == 0
    assert queued("new", retained="new") == 8
    assert queued("new", retained="new") == 8, "only when the session is made"
    assert queued("always", retained="always") == 8
    assert queued("always", retained="always") == 8, "the same subscription is not a new one"
    bench.engine.instances.ensure("always", spec(("t/1", 1), retained="always"))
    assert sum(s.queued for s in bench.engine.instances.lanes("always")) == 9
    assert queued("lanes", retained="new", lanes=4) == 8, "each to one lane"
    got = worker(bench, "new/0").take()[1:]
    assert all(m.retain for m in got)
    assert {m.qos for m in got} == {1, 2}


def test_changed_filters_apply_and_what_queues_is_still_delivered(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(("a", 1)))
    p = bench.client("p")
    p.publish("a", b"1", 1)
    bench.engine.instances.ensure("x", spec(("b", 1)))
    p.publish("a", b"2", 1).publish("b", b"3", 1)
    assert payloads(worker(bench)) == [b"1", b"3"]


def test_a_full_queue_refuses(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(max_bytes=30, overflow="reject"))
    five, four = bench.client("five", version=5), bench.client("four")
    s = bench.client("s")
    s.subscribe("t/1")
    for i in range(3):
        five.publish("t/1", b"%08d" % i, 1, ident=i + 1)
    assert [a.code for a in five.take()] == [0, 0, 0x97]
    four.publish("t/1", b"%08d" % 3, 1)
    assert four.closed
    assert len(payloads(s)) == 2
    five.publish("t/1", b"%08d" % 4)
    assert bench.engine.core.dropped["queue_full"] == 3
    assert bench.engine.core.refused == {"isthmus/x/0": 3}
    w = worker(bench)
    assert len(w.take()) == 3
    five.publish("t/1", b"%08d" % 5, 1)
    assert [a.code for a in five.take()] == [0]


@pytest.mark.parametrize(
    ("overflow", "kept"), [("drop_oldest", [b"3", b"4", b"5"]), ("drop_newest", [b"0", b"1", b"2"])]
)
def test_a_queue_may_drop_instead(bench: Bench, overflow: Any, kept: list[bytes]) -> None:
    bench.engine.instances.ensure("x", spec(max_bytes=12, overflow=overflow))
    p = bench.client("p", version=5)
    for i in range(6):
        p.publish("t/1", b"%d" % i, 1, ident=i + 1)
    assert len(p.take()) == 6
    assert bench.engine.core.dropped == {"queue_full": 3}
    assert bench.engine.sessions["isthmus/x/0"].dropped == {"queue_full": 3}
    assert payloads(worker(bench)) == kept


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [1, 2])
def test_a_blocking_queue_suspends_its_publisher_and_wakes_it_again(bench: Bench, version: int, qos: int) -> None:
    bench.engine.instances.ensure("x", spec(max_bytes=12, overflow="block"))
    first = PUBACK if qos == 1 else PUBREC
    p = bench.client("p", version=version, keep_alive=10)
    other = bench.client("other")
    frames = [publish("t/1", b"%d" % i, qos, i + 1, version) for i in range(6)]
    p.send(b"".join(frames) + b"\xc0\x00")
    assert p.bytes() == b"".join(ack(first, i + 1) for i in range(3))
    bench.pass_time(100)
    assert not p.closed, "its keep-alive stands still while it is not read"
    other.publish("t/1", b"zero")
    assert bench.engine.core.dropped == {"queue_full": 1}
    p.send(publish("t/1", b"6", qos, 7, version))
    assert not p.bytes()
    w = worker(bench)
    assert payloads(w) == [b"%d" % i for i in range(7)]
    assert p.bytes().replace(b"\xd0\x00", b"") == b"".join(ack(first, i + 1) for i in range(3, 7))
    assert not p.channel.suspended


def test_a_blocked_publisher_with_much_to_say_is_not_read(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(max_bytes=3000, overflow="block"))
    p = bench.client("p")
    p.send(publish("t/1", b"x" * 1000, 1) * 100)
    assert not p.link.reading
    w = worker(bench)
    w.bytes()
    assert p.link.reading
    assert bench.engine.sessions["isthmus/x/0"].queued == 100


def test_blocked_publishers_go_on_however_the_queue_gets_room(bench: Bench) -> None:
    def blocked(name: str) -> Client:
        bench.engine.instances.ensure("x", spec(max_bytes=8, overflow="block"))
        p = bench.client(name, version=5)
        for i in range(4):
            p.publish("t/1", b"%d" % i, 1, ident=i + 1)
        assert p.channel.suspended
        return p

    p = blocked("a")
    assert bench.engine.instances.drop_queue("x") == 2
    bench.settle()
    assert not p.channel.suspended
    bench.engine.instances.drop_queue("x")
    p = blocked("b")
    bench.engine.instances.ensure("x", spec(max_bytes=100, overflow="block"))
    bench.settle()
    assert not p.channel.suspended
    bench.engine.instances.drop_queue("x")
    p = blocked("c")
    bench.engine.instances.ensure("x", spec(max_bytes=8, overflow="drop_oldest"))
    bench.settle()
    assert not p.channel.suspended
    bench.engine.instances.drop_queue("x")
    p = blocked("d")
    assert bench.engine.instances.remove("x") == 2
    bench.settle()
    assert not p.channel.suspended
    assert p.take()[-1].code == 0x10


def test_a_message_larger_than_a_blocking_queue_is_refused_and_nobody_waits_for_ever(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(max_bytes=100, overflow="block"))
    p = bench.client("p", version=5)
    p.publish("t/1", b"x" * 200, 1)
    assert p.bytes() == ack(PUBACK, 1, 0x97)
    assert not p.channel.suspended


def test_a_blocked_publisher_may_go_away(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(max_bytes=8, overflow="block", lanes=2), by_client)
    p = bench.client("p")
    for i in range(4):
        p.publish("t/1", b"%d" % i, 1, ident=i + 1)
    assert p.channel.suspended
    p.drop()
    for n in range(2):
        worker(bench, f"x/{n}")
    assert sum(s.queued for s in bench.engine.instances.lanes("x")) == 2


@pytest.mark.parametrize("lanes", [1, 2])
def test_delivered_holds_the_publisher_until_the_worker_has_acknowledged(bench: Bench, lanes: int) -> None:
    bench.engine.instances.ensure("x", spec(ack="delivered", lanes=lanes), by_client)
    p = bench.client("p", version=5)
    p.publish("t/1", b"1", 1, ident=1).publish("t/1", b"2", 2, ident=2).publish("t/1", b"3", 0).publish(
        "u", b"4", 1, ident=4
    )
    assert not p.bytes()
    got = [m for n in range(lanes) for w in [worker(bench, f"x/{n}")] for m in w.take()[1:]]
    lane = next(s for s in bench.engine.instances.lanes("x") if s.queued)
    assert [m.payload for m in got] == [b"1", b"2", b"3"]
    assert not p.bytes()
    link = lane.channel
    link.feed(ack(PUBREC, got[1].packet_id))
    bench.settle()
    assert not p.bytes()
    link.feed(ack(PUBACK, got[0].packet_id))
    bench.settle()
    assert p.bytes() == ack(PUBACK, 1) + ack(PUBREC, 2) + ack(PUBACK, 4, 0x10)
    link.feed(ack(PUBCOMP, got[1].packet_id) + ack(PUBACK, got[2].packet_id))
    bench.settle()
    assert lane.queued == 0


def test_delivered_that_takes_too_long_fails_but_stays_queued(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(ack="delivered"))
    p = bench.client("p", version=5)
    p.publish("t/1", b"1", 1)
    bench.pass_time(31)
    assert p.bytes() == ack(PUBACK, 1, 0x83)
    w = worker(bench)
    (m,) = w.take()[1:]
    assert m.payload == b"1"
    w.send(ack(PUBACK, m.packet_id))
    assert not p.bytes()


def test_delivered_survives_a_restart_of_the_worker(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(ack="delivered"))
    w = worker(bench)
    p = bench.client("p")
    p.publish("t/1", b"1", 1)
    w.drop()
    assert not p.bytes()
    w = worker(bench)
    m = w.take()[-1]
    assert m.dup
    w.send(ack(PUBACK, m.packet_id))
    assert p.bytes() == ack(PUBACK, 1)


def test_a_removed_instance_leaves_an_orphan_until_it_is_dropped(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    w = worker(bench)
    p = bench.client("p", version=5)
    p.publish("t/1", b"1", 1)
    assert bench.engine.instances.remove("x") == 1
    bench.settle()
    assert closed_with(w, 0x98)
    p.publish("t/1", b"2", 1)
    assert p.take()[-1].code == 0x10
    assert [s.client_id for s in bench.engine.instances.sessions("x")] == ["isthmus/x/0"]
    bench.pass_time(100_000, 5000)
    assert bench.engine.instances.drop_queue("x") == 1
    assert not bench.engine.instances.sessions("x")
    assert bench.engine.router.count == 0


def test_an_orphan_is_taken_up_again(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    p = bench.client("p")
    p.publish("t/1", b"1", 1)
    bench.engine.instances.remove("x")
    p.publish("t/1", b"missed", 1)
    bench.engine.instances.ensure("x", spec())
    p.publish("t/1", b"2", 1)
    assert payloads(worker(bench)) == [b"1", b"2"]


def test_an_empty_instance_leaves_nothing(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(lanes=3), by_client)
    assert bench.engine.instances.remove("x") == 0
    assert not bench.engine.sessions
    assert bench.engine.router.count == 0


def test_fewer_lanes_leave_what_they_had_and_get_nothing_new(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec(lanes=3), by_client)
    for n in range(12):
        bench.client(f"p{n}").publish("t/1", b"%d" % n, 1)
    bench.engine.instances.ensure("x", spec(lanes=1), by_client)
    for n in range(12):
        bench.client(f"p{n}").publish("t/1", b"%d" % n, 1)
    assert sum(s.queued for s in bench.engine.instances.lanes("x")) == 24
    assert bench.engine.sessions["isthmus/x/0"].queued > 12
    assert bench.engine.router.count == 1


def test_dropping_the_queue_of_a_running_instance_leaves_it_running(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    into = worker(bench, "x/in")
    into.publish("other", b"m", 2, ident=5)
    p = bench.client("p")
    p.publish("t/1", b"1", 1)
    assert bench.engine.instances.drop_queue("x") == 1
    p.publish("t/1", b"2", 1)
    assert payloads(worker(bench)) == [b"2"]
    assert bench.engine.sessions["isthmus/x/in"].seen(5)
    assert not into.closed


def test_dead_letters_are_kept_and_never_enter_their_own_instance(bench: Bench) -> None:
    letters = spec(("$dlq/x", 1))
    bench.engine.instances.ensure("x", spec(("#", 1), ("$dlq/#", 1)), None, letters)
    bench.engine.instances.ensure("x", spec(("#", 1), ("$dlq/#", 1)), None, letters)
    into = worker(bench, "x/in")
    into.publish("$dlq/x", b"bad", 1, ident=1)
    assert into.take()[-1].code == 0
    assert bench.engine.sessions["isthmus/x/dlq"].queued == 1
    assert bench.engine.sessions["isthmus/x/0"].queued == 0
    watcher = bench.client("w")
    watcher.subscribe("$dlq/x")
    bench.client("p").publish("$dlq/x", b"forged", 1)
    assert bench.engine.sessions["isthmus/x/dlq"].queued == 1


def test_a_worker_cannot_end_its_session(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    w = worker(bench)
    w.send(packets.encode_disconnect(5, 0, props(session_expiry_interval=0)))
    bench.pass_time(100_000, 5000)
    bench.client("p").publish("t/1", b"1", 1)
    again = bench.socket(privileged=True)
    again.version = 5
    again.send(connect_packet("isthmus/x/0", 5, clean=True))
    assert payloads(again) == [b"1"]


def test_rights_of_devices_do_not_bind_workers(bench: Bench) -> None:
    bench.engine.instances.ensure("x", spec())
    bench.gate.deny_receive.add(("isthmus/x", "t/1"))
    bench.gate.deny_subscribe.add(("isthmus/x", "t/#"))
    bench.engine.rights_changed()
    bench.client("p").publish("t/1", b"1", 1)
    assert payloads(worker(bench)) == [b"1"]
