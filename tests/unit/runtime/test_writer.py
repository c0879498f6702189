"""One batch into a sink that fails in every way a sink can."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest
from pydantic import BaseModel

from broker.config.types import Secret
from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from broker.runtime import writer as module
from broker.runtime.backoff import FullJitter
from broker.runtime.state import Describer, State
from broker.runtime.writer import Writer
from tests.unit.runtime.fakes import FakeSink, until


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FullJitter", lambda: FullJitter(0.0001, 0.001))


def records(count: int) -> list[Record]:
    return [Record("t", str(i).encode()) for i in range(count)]


def writer(sink: FakeSink, **options: object) -> Writer:
    gate = asyncio.Event()
    gate.set()
    return Writer(sink, gate=gate, **options)  # type: ignore[arg-type]


async def test_an_unreachable_destination_gets_the_same_batch_again_until_it_takes_it() -> None:
    sink = FakeSink()
    sink.errors = [NotConnected("down"), OSError("reset"), TimeoutError()]
    states: list[State | None] = []
    w = writer(sink, changed=lambda: states.append(w.trouble))
    assert await w.write(records(3)) == {}
    assert sink.payloads == [b"0", b"1", b"2"]
    assert (w.retried, w.retries) == (3, {"unreachable": 3})
    assert states == [State.RETRYING, None]
    assert w.last_error is None


async def test_s07_one_poisonous_record_of_a_hundred_is_refused_with_its_reason() -> None:  # S-07
    sink = FakeSink()
    sink.errors = [BatchFailed({42: "too large"})]
    assert await writer(sink).write(records(100)) == {42: ("too large", 1)}


async def test_s07_a_batch_that_fails_for_a_reason_unknown_to_the_sink_is_taken_apart() -> None:  # S-07
    sink = FakeSink()

    def judge(batch: Sequence[Record]) -> None:
        if any(record.payload == b"77" for record in batch):
            raise OverflowError("numeric overflow")

    sink.judge = judge
    refused = await writer(sink).write(records(100))
    assert list(refused) == [77]
    reason, attempts = refused[77]
    assert reason == "OverflowError: numeric overflow"
    assert attempts <= 5
    assert sink.payloads == [str(i).encode() for i in range(100) if i != 77], "order is kept"


async def test_a_record_is_not_blamed_while_the_destination_does_not_answer() -> None:
    sink = FakeSink()
    sink.errors = [KeyError("odd")] * 4
    sink.check_error = NotConnected("down")
    assert await writer(sink).write(records(1)) == {}
    assert sink.payloads == [b"0"]
    assert sink.checks == 3


async def test_s07_an_outage_is_no_evidence_against_a_record() -> None:
    """S-07: one defect after an outage is the first, however often was tried before."""
    sink = FakeSink()
    sink.errors = [NotConnected("down"), NotConnected("down"), KeyError("odd")]
    assert await writer(sink).write(records(1)) == {}
    assert sink.payloads == [b"0"]


async def test_s08_every_record_is_poison_and_all_are_refused() -> None:  # S-08
    sink = FakeSink()

    def judge(batch: Sequence[Record]) -> None:
        raise ValueError("never")

    sink.judge = judge
    refused = await writer(sink).write(records(40))
    assert sorted(refused) == list(range(40))
    assert sink.stored == []


async def test_a_destination_that_refuses_the_configuration_is_probed_and_then_gets_the_batch() -> None:
    sink = FakeSink()
    sink.errors = [Fatal("table messages does not exist")]
    alarms: list[str] = []
    states: list[tuple[State | None, str | None]] = []
    w = writer(sink, probe_every=0.01, alarm=alarms.append, changed=lambda: states.append((w.trouble, w.last_error)))
    assert await w.write(records(1)) == {}
    assert sink.checks == 1
    assert alarms == ["table messages does not exist"]
    assert states == [(State.PAUSED, "table messages does not exist"), (None, None)]


async def test_retries_are_counted_by_reason() -> None:
    sink = FakeSink()
    sink.errors = [NotConnected("down"), KeyError("odd"), Fatal("no"), OSError("reset"), Fatal("still no")]
    w = writer(sink, probe_every=0.001)
    assert await w.write(records(1)) == {}
    assert w.retries == {"unreachable": 2, "unexpected": 1, "refused": 2}
    assert w.retried == 5


async def test_resuming_does_not_wait_for_the_next_probe() -> None:
    sink = FakeSink()
    sink.errors = [Fatal("no")]
    w = writer(sink, probe_every=3600)
    writing = asyncio.create_task(w.write(records(1)))
    await until(lambda: w.trouble is not None)
    w.kick()
    assert await asyncio.wait_for(writing, 5) == {}


async def test_resuming_while_the_destination_is_asked_counts_when_the_answer_is_no() -> None:
    class Asked(FakeSink):
        async def check(self) -> None:
            self.checks += 1
            w.kick()
            raise NotConnected("down")

    sink = Asked()
    sink.errors = [Fatal("no")]
    w = writer(sink, probe_every=0.01)
    assert await asyncio.wait_for(w.write(records(1)), 5) == {}
    assert sink.checks == 1


async def test_resuming_while_a_write_is_under_way_counts_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullJitter, "next", lambda self: 3600.0)
    sink = FakeSink()
    sink.hold = asyncio.Event()
    w = writer(sink)
    writing = asyncio.create_task(w.write(records(1)))
    await sink.entered.wait()
    sink.errors = [NotConnected("down")]
    w.kick()
    sink.hold.set()
    assert await asyncio.wait_for(writing, 5) == {}
    assert w.retries == {"unreachable": 1}


async def test_resuming_what_works_shortens_no_later_wait() -> None:
    sink = FakeSink()
    w = writer(sink, probe_every=0.01)
    w.kick()
    assert await w.write(records(1)) == {}
    sink.errors = [Fatal("no")]
    assert await w.write(records(1)) == {}
    assert sink.checks == 1


async def test_a_pause_holds_the_next_attempt() -> None:
    sink = FakeSink()
    gate = asyncio.Event()
    w = Writer(sink, gate=gate)
    writing = asyncio.create_task(w.write(records(1)))
    await asyncio.sleep(0.01)
    assert not sink.entered.is_set()
    assert w.trouble is State.PAUSED
    gate.set()
    await asyncio.wait_for(writing, 5)
    assert sink.payloads == [b"0"]


async def test_s16_a_write_without_an_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:  # S-16
    monkeypatch.setattr(module, "_SLOW", 0.01)
    sink = FakeSink()
    sink.hold = asyncio.Event()
    w = writer(sink)
    writing = asyncio.create_task(w.write(records(1)))
    await until(lambda: w.trouble is State.RETRYING)
    assert "not answered" in (w.last_error or "")
    sink.hold.set()
    await writing
    assert w.trouble is None


class Config(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    password: Secret
    nested: dict[str, list[Secret]]


async def test_s21_a_secret_that_an_error_repeats_reaches_neither_status_nor_log(
    caplog: pytest.LogCaptureFixture,
) -> None:  # S-21
    describe = Describer(Config(password=Secret("hunter2"), nested={"a": [Secret("token-9")]}))
    sink = FakeSink()
    sink.errors = [NotConnected("cannot log in with hunter2\nand token-9"), BatchFailed({0: "bad hunter2"})]
    seen: list[str | None] = []
    w = writer(sink, describe=describe, changed=lambda: seen.append(w.last_error))
    with caplog.at_level(logging.DEBUG):
        refused = await w.write(records(1))
    assert seen[0] == "cannot log in with *** and ***"
    assert refused[0][0] == "bad ***"
    assert "hunter2" not in caplog.text
