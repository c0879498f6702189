"""Acknowledgements over several connections of one session."""

from __future__ import annotations

from broker.mqtt.packets import Publish
from broker.runtime.receipts import Receipts


class Wire:
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, raw: bytes) -> None:
        self.sent.append(raw)

    @property
    def words(self) -> list[str]:
        raw = b"".join(self.sent).hex()
        return [raw[i : i + 8] for i in range(0, len(raw), 8)]


def one(packet_id: int, qos: int = 1, dup: bool = False, payload: bytes = b"x") -> Publish:
    return Publish(b"t", payload, qos, False, dup, packet_id)


def attached(present: bool = False) -> tuple[Receipts, Wire]:
    receipts, wire = Receipts(), Wire()
    receipts.attach(wire, present)
    return receipts, wire


def test_a_batch_is_acknowledged_in_its_order_with_one_write() -> None:
    receipts, wire = attached()
    receipts.stored([one(3), one(1), one(2)], receipts.epoch)
    assert wire.sent == [bytes.fromhex("40020003 40020001 40020002")]
    assert receipts.acknowledged == 3


def test_qos_2_is_received_then_completed_and_qos_0_is_not_answered() -> None:
    receipts, wire = attached()
    receipts.stored([one(1), one(2, qos=2), one(0, qos=0)], receipts.epoch)
    receipts.on_pubrel(2)
    receipts.flush()
    assert wire.words == ["40020001", "50020002", "70020002"]


def test_qos_2_delivered_again_after_pubrec_is_answered_and_not_written() -> None:
    receipts, wire = attached()
    receipts.stored([one(2, qos=2)], receipts.epoch)
    receipts.lost([], receipts.epoch)
    receipts.attach(wire, True)
    assert receipts.seen(one(2, qos=2, dup=True))
    assert wire.words == ["50020002", "50020002"]
    receipts.on_pubrel(2)
    receipts.flush()
    assert not receipts.seen(one(2, qos=2)), "the id is free again"


def test_an_unknown_pubrel_is_completed_all_the_same() -> None:
    receipts, wire = attached(True)
    receipts.on_pubrel(9)
    receipts.flush()
    assert wire.words == ["70020009"]


def test_what_was_stored_while_the_connection_was_lost_is_acknowledged_when_it_comes_again() -> None:
    receipts, wire = attached()
    batch = [one(1), one(2, qos=2)]
    receipts.lost(batch, receipts.epoch)
    receipts.stored(batch, receipts.epoch)
    assert wire.sent == []
    receipts.attach(wire, True)
    assert receipts.seen(one(1, dup=True))
    assert receipts.seen(one(2, qos=2, dup=True))
    assert wire.words == ["40020001", "50020002"]
    assert not receipts.seen(one(1)), "acknowledged: the id means a new message now"


def test_what_comes_again_while_it_is_written_is_acknowledged_once_it_is_stored() -> None:
    receipts, wire = attached()
    batch, epoch = [one(1), one(2)], receipts.epoch
    receipts.lost(batch, epoch)
    receipts.attach(wire, True)
    assert receipts.seen(one(1, dup=True))
    assert wire.sent == []
    receipts.stored(batch, epoch)
    assert wire.words == ["40020001"], "2 was not delivered again yet"
    assert receipts.seen(one(2, dup=True))
    assert wire.words == ["40020001", "40020002"]


def test_a_new_message_under_a_remembered_id_is_written() -> None:
    receipts, wire = attached()
    batch, epoch = [one(1)], receipts.epoch
    receipts.lost(batch, epoch)
    receipts.attach(wire, True)
    assert not receipts.seen(one(1, payload=b"new"))
    receipts.stored(batch, epoch)
    assert wire.sent == [], "an acknowledgement now would be for the new message"


def test_without_a_session_nothing_is_remembered() -> None:
    receipts, wire = attached()
    batch, epoch = [one(1), one(2, qos=2)], receipts.epoch
    receipts.lost(batch, epoch)
    receipts.attach(wire, False)
    assert not receipts.seen(one(1, dup=True))
    receipts.stored(batch, epoch)
    assert wire.sent == []
    assert not receipts.watching


def test_a_second_loss_does_not_bring_back_what_a_first_one_made_meaningless() -> None:
    receipts, wire = attached()
    batch, epoch = [one(1)], receipts.epoch
    receipts.lost(batch, epoch)
    receipts.attach(wire, False)  # another session: 1 is somebody else
    receipts.lost(batch, epoch)
    receipts.attach(wire, True)
    assert not receipts.seen(one(1, dup=True))


def test_an_acknowledged_message_is_forgotten_so_that_its_id_can_be_used_again() -> None:
    receipts, wire = attached()
    receipts.stored([one(1)], receipts.epoch)
    receipts.lost([], receipts.epoch)
    receipts.attach(wire, True)
    assert not receipts.seen(one(1, dup=True)), "lost acknowledgement or new message: a duplicate is the lesser evil"
