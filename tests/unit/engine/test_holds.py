"""Receivers that answer later: acknowledgements wait for them, stay in order, and leave in bulk."""

from __future__ import annotations

from typing import Any

import pytest

from broker.engine.receiver import DONE, LATER, REFUSED, Hold, Receiver, Subscription
from broker.mqtt import packets
from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack, closed_with, payloads, publish, resume


class Late(Receiver):
    """Takes a message now and says when it is safe later. `full` makes it refuse, `waits` makes the publisher wait."""

    def __init__(self, bench: Bench, filter: bytes = b"t/#", qos: int = 2) -> None:
        super().__init__()
        self.bench = bench
        self.durable = True
        self.held: list[Hold] = []
        self.got: list[bytes] = []
        self.answer = LATER
        self.room = DONE
        bench.engine.router.add(Subscription(self, filter, qos, False, False, 0))

    def deliver(self, message: Any, target: Any, hold: Hold | None) -> int:
        self.got.append(message.payload)
        if self.answer == LATER and hold is not None:
            hold.count += 1
            self.held.append(hold)
            return LATER
        return DONE

    def refuses(self, size: int) -> int:
        return self.room

    def release(self, index: int = 0) -> None:
        self.held.pop(index).release()
        self.bench.settle()


@pytest.fixture
def bench() -> Bench:
    return Bench(ack_timeout=30)


@pytest.mark.parametrize(("qos", "first"), [(1, PUBACK), (2, PUBREC)])
@pytest.mark.parametrize("version", [4, 5])
def test_an_acknowledgement_waits_until_the_message_is_safe(bench: Bench, qos: int, first: int, version: int) -> None:
    late = Late(bench)
    p = bench.client("p", version=version)
    p.publish("t/1", b"m", qos, ident=7)
    assert not p.bytes()
    late.release()
    assert p.bytes() == ack(first, 7)
    assert not bench.engine.holding


def test_acknowledgements_stay_in_order_and_are_released_in_bulk(bench: Bench) -> None:
    late = Late(bench)
    p = bench.client("p", version=5)
    p.send(b"".join(publish("t/1", b"%d" % i, 1 + i % 2, i + 1, 5) for i in range(6)))
    p.publish("free", b"m", 1, ident=7)
    for index in (5, 4, 2, 1):
        late.release(index)
    assert not p.bytes()
    p.link.written.clear()
    p.read = 0
    late.release(0)
    assert p.bytes() == ack(PUBACK, 1) + ack(PUBREC, 2) + ack(PUBACK, 3)
    late.release(0)
    assert p.bytes() == ack(PUBREC, 4) + ack(PUBACK, 5) + ack(PUBREC, 6) + ack(PUBACK, 7, 0x10)
    assert p.channel.held is None


def test_what_was_acknowledged_before_in_the_same_read_leaves_first(bench: Bench) -> None:
    late = Late(bench)
    bench.client("s").subscribe("free")
    p = bench.client("p")
    p.send(publish("free", b"m", 1, 1) + publish("t/1", b"m", 1, 2) + publish("free", b"m", 2, 3))
    assert p.bytes() == ack(PUBACK, 1)
    late.release()
    assert p.bytes() == ack(PUBACK, 2) + ack(PUBREC, 3)


def test_every_late_receiver_is_waited_for(bench: Bench) -> None:
    one, two = Late(bench), Late(bench, b"t/1")
    p = bench.client("p")
    p.publish("t/1", b"m", 1)
    one.release()
    assert not p.bytes()
    two.release()
    assert p.bytes() == ack(PUBACK, 1)


def test_a_receiver_that_is_done_at_once_holds_nothing(bench: Bench) -> None:
    late = Late(bench)
    late.answer = DONE
    p = bench.client("p")
    p.publish("t/1", b"m", 1).publish("t/1", b"m", 2, ident=2).publish("t/1", b"m")
    assert p.bytes() == ack(PUBACK, 1) + ack(PUBREC, 2)
    assert len(late.got) == 3


def test_pings_and_the_clients_own_acknowledgements_are_served_while_one_is_held(bench: Bench) -> None:
    Late(bench)
    p = bench.client("p")
    p.subscribe("own", qos=2)
    p.publish("t/1", b"m", 1)
    bench.client("q").publish("own", b"x", 2)
    (m,) = p.take()
    p.send(b"\xc0\x00" + ack(PUBREC, m.packet_id) + ack(PUBCOMP, m.packet_id))
    assert sorted(p.bytes()) == sorted(b"\xd0\x00" + ack(PUBREL, m.packet_id))
    assert bench.engine.sessions["p"].queued == 0


@pytest.mark.parametrize("qos", [1, 2])
def test_held_messages_count_once_for_the_receive_maximum(qos: int) -> None:
    bench = Bench(receive_maximum=10)
    late = Late(bench)
    p = bench.client("p", version=5)
    for i in range(10):
        p.publish("t/1", b"m", qos, ident=i + 1)
    assert not p.closed
    late.release()
    assert p.take()
    if qos == 2:
        p.send(ack(PUBREL, 1))
        p.take()
    p.publish("t/1", b"m", qos, ident=1)
    assert not p.closed
    p.publish("t/1", b"m", qos, ident=11)
    assert closed_with(p, 0x93)


def test_a_hold_that_takes_too_long_fails(bench: Bench) -> None:
    late = Late(bench)
    five, four = bench.client("five", version=5), bench.client("four", clean=False)
    five.publish("t/1", b"a", 1, ident=1).publish("t/1", b"b", 2, ident=2)
    bench.pass_time(20)
    five.publish("t/1", b"c", 1, ident=3)
    four.publish("t/1", b"d", 1, ident=1)
    assert not five.bytes()
    bench.pass_time(11)
    assert five.bytes() == ack(PUBACK, 1, 0x83) + ack(PUBREC, 2, 0x83)
    late.held[2].release()
    bench.settle()
    assert five.bytes() == ack(PUBACK, 3)
    bench.pass_time(20)
    assert four.closed
    assert not four.bytes()
    assert not five.closed
    for hold in late.held:
        hold.release()
    assert not five.bytes()
    assert bench.engine.core.events["ack_timeout"] == 3


def test_a_failed_qos_2_identifier_is_free_for_the_next_message(bench: Bench) -> None:
    late = Late(bench)
    p = bench.client("p", version=5)
    p.publish("t/1", b"a", 2, ident=1)
    bench.pass_time(31)
    assert p.bytes() == ack(PUBREC, 1, 0x83)
    late.answer = DONE
    p.publish("t/1", b"b", 2, ident=1)
    assert p.bytes() == ack(PUBREC, 1)
    assert late.got == [b"a", b"b"]


def test_a_repeated_qos_2_message_is_not_acknowledged_before_the_first(bench: Bench) -> None:
    late = Late(bench)
    p = bench.client("p")
    p.publish("t/1", b"a", 2, ident=1).publish("t/1", b"a", 2, ident=1, dup=True)
    assert not p.bytes()
    late.release()
    assert p.bytes() == ack(PUBREC, 1) * 2
    assert late.got == [b"a"]


def test_a_publisher_that_goes_away_is_not_acknowledged_later(bench: Bench) -> None:
    late = Late(bench)
    p = bench.client("p", clean=False)
    p.publish("t/1", b"a", 1)
    p.drop()
    late.release()
    assert not p.bytes()
    assert not bench.engine.holding
    again = resume(bench, "p")
    again.take()
    again.publish("t/1", b"a", 1, dup=True)
    late.release()
    assert again.bytes() == ack(PUBACK, 1)


@pytest.mark.parametrize(("qos", "first"), [(0, 0), (1, PUBACK), (2, PUBREC)])
def test_nobody_gets_a_message_that_one_durable_receiver_refuses(bench: Bench, qos: int, first: int) -> None:
    s = bench.client("s")
    s.subscribe("t/#", qos=2)
    one, two = Late(bench), Late(bench)
    one.answer = two.answer = DONE
    two.room = REFUSED
    five, four = bench.client("five", version=5), bench.client("four")
    five.publish("t/1", b"m", qos)
    assert five.bytes() == (ack(first, 1, 0x97) if qos else b"")
    four.publish("t/1", b"m", qos)
    assert not four.bytes()
    assert four.closed == (qos > 0)
    assert not one.got
    assert not s.take()
    assert bench.engine.core.dropped == {"queue_full": 2}
    two.room = DONE
    five.publish("t/1", b"n", qos)
    assert one.got == two.got == payloads(s) == [b"n"]


def test_a_refused_qos_2_identifier_may_be_used_again(bench: Bench) -> None:
    late = Late(bench)
    late.room, late.answer = REFUSED, DONE
    p = bench.client("p", version=5)
    p.publish("t/1", b"m", 2)
    late.room = DONE
    p.publish("t/1", b"m", 2)
    assert p.bytes() == ack(PUBREC, 1, 0x97) + ack(PUBREC, 1)
    assert late.got == [b"m"]


def test_a_retained_message_that_is_refused_is_not_kept(bench: Bench) -> None:
    late = Late(bench)
    late.room = REFUSED
    bench.client("p", version=5).publish("t/1", b"m", 1, retain=True)
    assert bench.engine.retained_store.count == 0


def test_a_will_nobody_has_room_for_is_counted(bench: Bench) -> None:
    late = Late(bench)
    late.room = REFUSED
    bench.client("p", will=packets.Will(b"t/w", b"m", 1, False, None)).drop()
    assert bench.engine.core.dropped == {"queue_full": 1}
    assert not late.got


def test_a_client_of_3_x_is_not_read_while_too_many_acknowledgements_are_held() -> None:
    bench = Bench(receive_maximum=3)
    late = Late(bench)
    p = bench.client("p")
    p.send(b"".join(publish("t/1", b"%d" % i, 1, i + 1, 4) for i in range(5)))
    assert late.got == [b"0", b"1", b"2"]
    late.release()
    assert late.got == [b"0", b"1", b"2", b"3"]
    for _ in range(4):
        late.release()
    assert p.bytes() == b"".join(ack(PUBACK, i + 1) for i in range(5))
