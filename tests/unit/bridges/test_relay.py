"""The relay: one to one where it can be, and what it does where it cannot."""

from __future__ import annotations

import asyncio

import pytest

from broker.mqtt.properties import Properties
from tests.unit.bridges.fakes import Bench, line

PUBACK, PUBREC, PUBREL, PUBCOMP = 4, 5, 6, 7


async def test_qos_1_crosses_under_the_same_identifier() -> None:
    bench = Bench()
    bench.publish(7, qos=1, dup=True)
    (message,) = bench.crossed()
    assert (message.packet_id, message.qos, message.dup, message.topic) == (7, 1, True, b"a")
    assert bench.source.taken() == []
    bench.relay.on_answer(PUBACK, 7, 0)
    assert bench.source.taken() == [(PUBACK, 7)]
    assert bench.relay.open == 0
    assert bench.counts == {"messages": 1}


async def test_qos_2_passes_every_step_through_one_to_one() -> None:
    bench = Bench()
    bench.publish(7)
    assert bench.crossed()[0].packet_id == 7
    bench.relay.on_answer(PUBREC, 7, 0)
    assert bench.source.taken() == [(PUBREC, 7)]
    bench.relay.on_release(bench.source, 7)
    assert bench.target.taken() == [(PUBREL, 7)]
    bench.relay.on_answer(PUBCOMP, 7, 0)
    assert bench.source.taken() == [(PUBCOMP, 7)]
    assert bench.relay.open == 0


async def test_b03_a_pubrel_of_the_connection_before_is_passed_on_and_not_found_is_success() -> None:
    bench = Bench()
    bench.relay.on_release(bench.source, 9)
    assert bench.target.taken() == [(PUBREL, 9)]
    bench.relay.on_answer(PUBCOMP, 9, 0x92)
    assert bench.source.taken() == [(PUBCOMP, 9)]


async def test_a_repetition_on_a_live_connection_is_not_sent_twice() -> None:
    bench = Bench()
    bench.publish(7)
    bench.publish(7, dup=True)
    assert len(bench.crossed()) == 1


async def test_b03_a_message_under_an_open_identifier_waits_until_the_source_has_read_the_last_answer() -> None:
    """mosquitto up to 2.0.12 gives an identifier away twice when more than 65 535 messages are behind."""
    bench = Bench(line(direction="in"), outward=False)
    bench.publish(7, payload=b"first")
    bench.publish(7, payload=b"second")
    bench.publish(8, payload=b"behind")
    bench.publish(0, qos=0, payload=b"at the end")
    assert [m.payload for m in bench.crossed()] == [b"first"]
    assert bench.relay.open == 4
    bench.relay.on_answer(PUBREC, 7, 0)
    bench.relay.on_release(bench.source, 7)
    bench.target.taken()
    bench.relay.on_answer(PUBCOMP, 7, 0)
    await asyncio.sleep(0)
    *answers, (ping, pong) = bench.source.taken()
    assert [*answers, ping] == [(PUBREC, 7), (PUBCOMP, 7), "ping"]
    assert bench.crossed() == [], "a cut could bring PUBREL again, which would free what the second is known by"
    pong.set_result(0.0)
    await asyncio.sleep(0.001)
    assert [m.payload for m in bench.crossed()] == [b"second", b"behind", b"at the end"]
    assert bench.relay.stalled() is None
    bench.publish(7, payload=b"second", dup=True)
    assert bench.relay.open == 2, "that is a repetition"


async def test_a_source_that_uses_an_identifier_twice_and_ends_neither_message_is_noticed() -> None:
    bench = Bench(line(direction="in"), outward=False)
    began = asyncio.get_running_loop().time()
    assert bench.relay.stalled() is None
    bench.publish(7, payload=b"first")
    bench.publish(7, payload=b"second")
    since = bench.relay.stalled()
    assert since is not None
    assert since >= began
    bench.relay.close()
    assert bench.relay.stalled() is None


async def test_a_source_that_reads_our_answers_is_not_taken_for_one_that_does_nothing() -> None:
    """At QoS 1 it has nothing else to say about a message."""
    bench = Bench(line(direction="in", qos=1), outward=False)
    for payload in (b"first", b"second", b"third"):
        bench.publish(7, qos=1, payload=payload)
    began = bench.relay.stalled()
    await asyncio.sleep(0.005)
    bench.relay.on_answer(PUBACK, 7, 0)
    await asyncio.sleep(0)
    bench.source.taken()[-1][1].set_result(0.0)
    await asyncio.sleep(0.001)
    assert [m.payload for m in bench.crossed()] == [b"first", b"second"]
    now = bench.relay.stalled()
    assert began is not None
    assert now is not None
    assert now > began
    bench.relay.close()


async def test_qos_is_the_lower_of_message_and_line() -> None:
    bench = Bench(line("one", 1), line("zero", 0), line("two", 2))
    bench.publish(1, qos=1, topic=b"two")
    bench.publish(2, qos=2, topic=b"one")
    bench.publish(3, qos=2, topic=b"zero")
    bench.publish(0, qos=0, topic=b"two")
    assert [(m.topic, m.qos) for m in bench.crossed()] == [(b"two", 1), (b"one", 1), (b"zero", 0), (b"two", 0)]


async def test_qos_2_lowered_to_1_is_ended_here_towards_the_source() -> None:
    bench = Bench(line(qos=1))
    bench.publish(7)
    bench.relay.on_answer(PUBACK, 7, 0)
    assert bench.source.taken() == [(PUBREC, 7)]
    bench.target.taken()
    bench.relay.on_release(bench.source, 7)
    assert bench.source.taken() == [(PUBCOMP, 7)]
    assert bench.target.taken() == []


@pytest.mark.parametrize(("maximum", "qos"), [(0, 0), (1, 1)])
async def test_b15_the_targets_maximum_qos_is_kept(maximum: int, qos: int) -> None:
    bench = Bench(properties=Properties(maximum_qos=maximum))
    bench.publish(7)
    assert bench.crossed()[0].qos == qos
    if maximum == 0:
        assert bench.source.taken() == [(PUBREC, 7)]


async def test_b15_a_target_without_retained_messages_gets_none() -> None:
    bench = Bench(properties=Properties(retain_available=0))
    bench.publish(7, retain=True)
    assert bench.crossed()[0].retain is False
    assert bench.counts["retain_cleared"] == 1


async def test_the_retain_flag_crosses_unless_it_is_turned_off() -> None:
    for keep in (True, False):
        bench = Bench(retain=keep)
        bench.publish(7, retain=True)
        assert bench.crossed()[0].retain is keep


@pytest.mark.parametrize(("qos", "answer"), [(1, PUBACK), (2, PUBREC)])
async def test_b15_what_is_too_large_is_acknowledged_counted_and_reported(qos: int, answer: int) -> None:
    bench = Bench(properties=Properties(maximum_packet_size=30))
    bench.relay.on_publish(bench.source, _large(7, qos))
    assert bench.crossed() == []
    assert bench.source.taken() == [(answer, 7)]
    assert bench.counts == {"dropped.too_large": 1}
    assert bench.refusals[0][0] == "too_large"
    if qos == 2:
        bench.relay.on_release(bench.source, 7)
        assert bench.source.taken() == [(PUBCOMP, 7)]


def _large(packet_id: int, qos: int):  # type: ignore[no-untyped-def]
    from broker.mqtt.packets import Publish

    return Publish(b"a", b"x" * 100, qos, packet_id=packet_id)


@pytest.mark.parametrize(("qos", "refusal", "answer"), [(1, PUBACK, PUBACK), (2, PUBREC, PUBREC)])
async def test_a_refused_message_is_acknowledged_counted_and_reported(qos: int, refusal: int, answer: int) -> None:
    bench = Bench()
    bench.publish(7, qos=qos)
    bench.relay.on_answer(refusal, 7, 0x87)
    assert bench.source.taken() == [(answer, 7)]
    assert bench.counts == {"dropped.refused": 1}
    assert bench.refusals == [("refused", "not authorized (0x87)")]
    assert bench.relay.open == 0


@pytest.mark.parametrize(("qos", "answer"), [(1, PUBACK), (2, PUBREC)])
async def test_quota_exceeded_is_tried_again_and_never_acknowledged_meanwhile(qos: int, answer: int) -> None:
    bench = Bench()
    bench.publish(7, qos=qos, dup=True)
    bench.crossed()
    bench.relay.on_answer(answer, 7, 0x97)
    assert bench.source.taken() == []
    assert bench.relay.open == 1
    async with asyncio.timeout(3):
        while not (again := bench.crossed()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (again[0].packet_id, again[0].qos, again[0].dup, again[0].payload) == (7, qos, False, b"x")
    bench.relay.on_answer(answer, 7, 0)
    assert bench.source.taken() == [(answer, 7)]
    bench.relay.close()


@pytest.mark.parametrize(("qos", "answer"), [(1, PUBACK), (2, PUBREC)])
async def test_d05_what_our_own_broker_could_not_store_is_not_acknowledged_to_the_remote(qos: int, answer: int) -> None:
    bench = Bench(line(direction="in"), outward=False)
    bench.publish(7, qos=qos)
    bench.relay.on_answer(answer, 7, 0x83)
    assert bench.not_kept == 1
    assert bench.source.taken() == []
    assert not bench.counts


async def test_an_identifier_in_use_is_freed_before_the_message_is_sent_again() -> None:
    bench = Bench()
    bench.publish(7)
    bench.target.taken()
    bench.relay.on_answer(PUBREC, 7, 0x91)
    assert bench.target.taken() == [(PUBREL, 7)]
    bench.relay.on_answer(PUBCOMP, 7, 0)
    assert bench.source.taken() == []
    bench.relay.close()


async def test_no_more_than_the_targets_receive_maximum_is_under_way() -> None:
    bench = Bench(properties=Properties(receive_maximum=2))
    for packet_id in range(1, 6):
        bench.publish(packet_id, qos=1)
    assert [m.packet_id for m in bench.crossed()] == [1, 2]
    assert bench.relay.open == 5
    bench.relay.on_answer(PUBACK, 2, 0)
    assert [m.packet_id for m in bench.crossed()] == [3]


async def test_a_congested_target_loses_qos_0_only() -> None:
    bench = Bench()
    bench.target.congested = True
    bench.publish(0, qos=0)
    bench.publish(1, qos=1)
    assert [m.qos for m in bench.crossed()] == [1]
    assert bench.counts["dropped.congested"] == 1


async def test_b08_what_no_line_covers_is_acknowledged_and_counted() -> None:
    bench = Bench(line("in/#", 2, direction="in", remote_prefix="far/"), outward=False)
    for number, topic in enumerate((b"other", b"far/else", b"far/"), 1):
        bench.publish(number, qos=1, topic=topic)
    assert bench.crossed() == []
    assert bench.source.taken() == [(PUBACK, 1), (PUBACK, 2), (PUBACK, 3)]
    assert bench.counts == {"dropped.unmapped": 3}


async def test_an_answer_to_nothing_is_left_alone() -> None:
    bench = Bench()
    for packet_type in (PUBACK, PUBREC, PUBCOMP):
        bench.relay.on_answer(packet_type, 5, 0)
    assert bench.source.taken() == []
    assert bench.target.taken() == []


@pytest.mark.parametrize("version", [3, 4, 5])
async def test_b06_what_the_bridge_brought_to_a_foreign_broker_is_not_sent_back(version: int) -> None:
    bench = Bench(version=version, origin="node-a/hq")
    mark = Properties(user_properties=[("x-bridge-origin", "node-a/hq")], forward=b"")
    for qos in (0, 1, 2):
        bench.publish(qos, qos=qos, properties=mark)
    bench.relay.on_release(bench.source, 2)
    assert bench.target.taken() == []
    assert bench.source.taken() == [(PUBACK, 1), (PUBREC, 2), (PUBCOMP, 2)]
    assert bench.counts == {"returned": 3}
    assert bench.refusals == [], "this is no loss"
    bench.publish(3, properties=Properties(user_properties=[("x-bridge-origin", "node-a/other")], forward=b""))
    assert len(bench.crossed()) == 1, "what another bridge brought crosses"
