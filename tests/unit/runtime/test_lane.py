"""A lane against a broker that keeps sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from broker.client.connection import Connection, Handler
from broker.extend.session import SessionSpec
from broker.extend.sink import Batch, BatchFailed, NotConnected
from broker.mqtt.properties import Properties, encode_properties
from broker.runtime import lane
from broker.runtime.attach import Internal
from broker.runtime.backoff import Backoff
from broker.runtime.dead_letters import DeadLetters, Refused
from broker.runtime.lane import Lane
from broker.runtime.state import State
from broker.runtime.writer import Writer
from tests.unit.runtime.fakes import FakeBroker, FakeSink, fake_broker, metadata, until

LANE = "isthmus/store/0"
SPEC = SessionSpec(filters=(("#", 2),))


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[FakeBroker]:
    async with fake_broker(tmp_path / "internal.sock") as running:
        running.session(LANE)
        yield running


class Rig:
    def __init__(self, broker: FakeBroker, *, in_order: bool = False, trusted: bool = True, **batch: object) -> None:
        self.sink = FakeSink()
        self.gate = asyncio.Event()
        self.gate.set()
        internal = Internal(broker.url)

        async def attach(handler: Handler) -> Connection:
            return await internal("store", "0", handler, SPEC)

        async def attach_in(handler: Handler) -> Connection:
            return await internal("store", "in", handler, SPEC)

        self.letters = DeadLetters("store", attach_in)
        self.lane = Lane(
            0,
            attach=attach,
            writer=Writer(self.sink, gate=self.gate),
            graveyard=self.letters,
            batch=Batch(**{"linger": 0.001, **batch}),  # type: ignore[arg-type]
            trusted=trusted,
            in_order=in_order,
        )

    async def __aenter__(self) -> Rig:
        self.lane.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.lane.close(0)
        await self.letters.close()


async def test_nothing_is_acknowledged_before_it_is_stored(broker: FakeBroker) -> None:
    async with Rig(broker) as rig:
        rig.sink.hold = asyncio.Event()
        broker.deliver(LANE, "a", b"1", properties=metadata("dev"))
        await broker.until_attached(LANE)
        await rig.sink.entered.wait()
        assert broker.session(LANE).answers == []
        assert rig.lane.in_flight == 1
        rig.sink.hold.set()
        await broker.until_answered(LANE)
        assert rig.sink.payloads == [b"1"]
        assert rig.sink.stored[0].clientid == "dev"
        assert rig.lane.acked == 1


async def test_the_whole_handshake_of_qos_2_is_completed(broker: FakeBroker) -> None:
    async with Rig(broker) as rig:
        first = broker.deliver(LANE, "a", b"1", qos=2)
        second = broker.deliver(LANE, "a", b"2", qos=1)
        session = broker.session(LANE)
        await broker.until(lambda: not session.unanswered and not session.released and len(session.answers) == 3)
        assert session.answers == [(5, first), (4, second), (7, first)]
        assert rig.sink.payloads == [b"1", b"2"]


async def test_batches_obey_the_limits_of_records_and_bytes(broker: FakeBroker) -> None:
    for i in range(25):
        broker.deliver(LANE, "a", str(i).encode())
    async with Rig(broker, max_records=10, linger=0.05) as rig:
        await broker.until_answered(LANE)
        assert rig.sink.batches == [10, 10, 5]
        assert rig.sink.payloads == [str(i).encode() for i in range(25)]
    rig = Rig(broker, max_bytes=100, linger=0.05)
    async with rig:
        for _ in range(4):
            broker.deliver(LANE, "a", b"x" * 40)
        broker.deliver(LANE, "a", b"y" * 500)
        await broker.until_answered(LANE)
        assert rig.sink.batches == [2, 2, 1], "one record above the limit is a batch of its own"


async def test_records_that_come_within_the_linger_time_make_one_batch(broker: FakeBroker) -> None:
    async with Rig(broker, linger=1.0) as rig:
        await broker.until_attached(LANE)
        broker.deliver(LANE, "a", b"1")
        await asyncio.sleep(0.02)
        broker.deliver(LANE, "a", b"2")
        await broker.until_answered(LANE)
        assert rig.sink.batches == [2]


async def test_s07_a_dead_letter_carries_its_story_and_only_then_is_the_original_acknowledged(
    broker: FakeBroker,
) -> None:  # S-07
    properties = Properties()
    properties.content_type = "text/plain"
    properties.user_properties = [("unit", "C")]
    passed_on = encode_properties(properties)[1:]
    for i in range(100):
        broker.deliver(LANE, f"a/{i}", str(i).encode(), properties=metadata("dev", msgid=f"{i:032x}") + passed_on)
    refusals = iter([0x97, 0x10])
    broker.refuse_publish = lambda publish: next(refusals, 0)
    async with Rig(broker, linger=0.2) as rig:
        rig.sink.errors = [BatchFailed({42: "NUL in text"})]
        await broker.until(lambda: len(broker.session(LANE).answers) >= 99)
        assert list(broker.session(LANE).unanswered) == [43]
        await broker.until_answered(LANE)
        assert len(broker.published) == 3, "refused, kept by nobody, kept"
        client_id, letter = broker.published[-1]
        assert client_id == "isthmus/store/in"
        assert letter.topic == b"$dlq/store"
        assert letter.payload == b"42"
        assert letter.properties is not None
        assert letter.properties.content_type == "text/plain"
        pairs = dict(letter.properties.user_properties or ())
        assert pairs["error"] == "NUL in text"
        assert pairs["sink"] == "store"
        assert pairs["attempts"] == "1"
        assert pairs["topic"] == "a/42"
        assert '"c": "dev"' in pairs["metadata"]
        assert pairs["unit"] == "C"
        assert "$isthmus" not in pairs, "only the broker writes that one"
        assert (rig.lane.acked, rig.lane.dead) == (99, 1)


async def test_s09_a_dead_letter_nobody_keeps_leaves_the_record_in_the_queue(broker: FakeBroker) -> None:  # S-09
    broker.refuse_publish = lambda publish: 0x97
    broker.deliver(LANE, "a", b"bad")
    async with Rig(broker) as rig:
        rig.sink.errors = [BatchFailed({0: "bad"})]
        await broker.until(lambda: len(broker.published) >= 3)
        assert broker.session(LANE).answers == []
        assert rig.lane.state is State.RETRYING
        assert "dead letters" in (rig.lane.last_error or "")
        assert rig.lane.writer.retries["dead_letters"] >= 2
        broker.refuse_publish = lambda publish: 0
        await broker.until_answered(LANE)
        assert rig.lane.state is State.RUNNING


async def test_in_order_nothing_overtakes_a_dead_letter(broker: FakeBroker) -> None:
    ids = [broker.deliver(LANE, "a", str(i).encode(), qos=1 + i % 2) for i in range(6)]
    async with Rig(broker, in_order=True, linger=0.1) as rig:
        rig.sink.errors = [BatchFailed({0: "bad", 3: "bad"})]
        await broker.until_answered(LANE)
        answers = [packet_id for kind, packet_id in broker.session(LANE).answers if kind != 7]
        assert answers == ids
        assert len(broker.published) == 2


async def test_what_is_written_when_the_connection_is_lost_is_not_written_twice(broker: FakeBroker) -> None:
    async with Rig(broker) as rig:
        rig.sink.hold = asyncio.Event()
        for i in range(3):
            broker.deliver(LANE, "a", str(i).encode(), qos=1 + i % 2)
        await rig.sink.entered.wait()
        broker.drop(LANE)
        await broker.until_attached(LANE, times=2)
        broker.deliver(LANE, "a", b"3")
        rig.sink.hold.set()
        await broker.until_answered(LANE)
        assert rig.sink.payloads == [b"0", b"1", b"2", b"3"]


async def test_what_only_waited_when_the_connection_was_lost_is_written_once(broker: FakeBroker) -> None:
    async with Rig(broker, max_records=1) as rig:
        rig.sink.hold = asyncio.Event()
        for i in range(5):
            broker.deliver(LANE, "a", str(i).encode())
        await rig.sink.entered.wait()
        broker.drop(LANE)
        await until(lambda: rig.lane.state is not State.RUNNING)
        rig.sink.hold.set()
        await broker.until_answered(LANE)
        assert rig.sink.payloads == [b"0", b"1", b"2", b"3", b"4"]


async def test_what_failed_unexpectedly_after_its_connection_was_lost_is_written_when_it_comes_again(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig(broker, in_order=True, linger=0.1) as rig:
        bury, failures = rig.letters.bury, iter([ValueError("odd")])

        async def fail(letters: Sequence[Refused]) -> None:
            for error in failures:
                raise error
            await bury(letters)

        monkeypatch.setattr(rig.letters, "bury", fail)
        rig.sink.hold = asyncio.Event()
        rig.sink.errors = [BatchFailed({0: "bad"})]
        for i in range(3):
            broker.deliver(LANE, "a", str(i).encode(), qos=1 + i % 2)
        await rig.sink.entered.wait()
        broker.drop(LANE)
        await broker.until_attached(LANE, times=2)
        rig.sink.hold.set()
        await broker.until_answered(LANE)
        assert rig.sink.payloads == [b"0", b"1", b"2"]


async def test_the_lane_attaches_again_within_two_seconds(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for one of them at most."""
    waits: list[float] = []

    class Noted(Backoff):
        def __init__(self, base: float, cap: float) -> None:
            super().__init__(base, cap, max)  # the longest wait it may draw

        def next(self) -> float:
            waits.append(super().next())
            return waits[-1]

    monkeypatch.setattr(lane, "Backoff", Noted)
    async with Rig(broker) as rig:
        await broker.until_attached(LANE)
        for times in range(2, 6):
            broker.drop(LANE)
            await broker.until(lambda times=times: broker.session(LANE).connects >= times, seconds=10)
        assert len(waits) == 4
        assert max(waits) <= 1.0
        broker.deliver(LANE, "a", b"1")
        await broker.until_answered(LANE)
        assert rig.lane.state is State.RUNNING


@pytest.mark.parametrize("value", ["", "no json", "[]", '{"c":1}', "null"])
async def test_metadata_that_cannot_be_read_never_stops_the_lane(broker: FakeBroker, value: str) -> None:
    from broker.mqtt.properties import user_property

    async with Rig(broker) as rig:
        broker.deliver(LANE, "a", b"1", properties=user_property("$isthmus", value))
        broker.deliver(LANE, "a", b"2", properties=metadata("dev"))
        await broker.until_answered(LANE)
        assert rig.sink.payloads == [b"1", b"2"]
        assert [record.clientid for record in rig.sink.stored] == [None, "dev"]


async def test_the_metadata_of_a_foreign_broker_is_never_believed(broker: FakeBroker) -> None:
    async with Rig(broker, trusted=False) as rig:
        broker.deliver(LANE, "a", b"1", properties=metadata("root"))
        await broker.until_answered(LANE)
        assert rig.sink.stored[0].clientid is None
        assert rig.sink.stored[0].user_properties == []


async def test_s22_closing_writes_what_was_received(broker: FakeBroker) -> None:  # S-22
    async with Rig(broker, max_records=1000) as rig:
        rig.sink.hold = asyncio.Event()
        for i in range(10_000):
            broker.deliver(LANE, "a", str(i).encode())
        await rig.sink.entered.wait()
        await until(lambda: rig.lane.in_flight == 10_000)
        closing = asyncio.create_task(rig.lane.close(10))
        await asyncio.sleep(0)
        late = broker.deliver(LANE, "a", b"late")
        rig.sink.hold.set()
        await closing
        await broker.until(lambda: broker.session(LANE).writer is None)
        assert list(broker.session(LANE).unanswered) == [late], "what comes now stays in the broker's queue"
        assert len(rig.sink.stored) == 10_000


async def test_s22_closing_ends_at_the_deadline_with_the_rest_unacknowledged(broker: FakeBroker) -> None:  # S-22
    async with Rig(broker) as rig:
        rig.sink.errors = [NotConnected("down")] * 10_000
        broker.deliver(LANE, "a", b"1")
        await rig.sink.entered.wait()
        async with asyncio.timeout(5):
            await rig.lane.close(0.1)
        assert list(broker.session(LANE).unanswered) == [1]


async def test_a_full_window_is_received_while_the_destination_is_down(broker: FakeBroker) -> None:
    async with Rig(broker) as rig:
        rig.gate.clear()
        for _ in range(65_535):
            broker.deliver(LANE, "a", b"x")
        await until(lambda: rig.lane.in_flight == 65_535, seconds=20)
        rig.gate.set()
        await broker.until_answered(LANE)
        assert max(rig.sink.batches) == 5_000


async def test_a_defect_in_the_lane_itself_is_survived(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig(broker) as rig:
        await broker.until_attached(LANE)
        real = lane.records

        def fail(batch: object, trusted: bool) -> None:
            monkeypatch.setattr(lane, "records", real)
            raise RuntimeError("defect")

        monkeypatch.setattr(lane, "records", fail)
        broker.deliver(LANE, "a", b"1")
        await broker.until_answered(LANE)
        assert rig.sink.payloads == [b"1"]
