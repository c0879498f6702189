"""What every sink that speaks to another system has to do, run against the real one by `test_sink_http`,
`test_sink_mongodb` and `test_sink_redis`: through a proxy that fails, and behind a broker whose worker is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

from broker.client.session import Publisher
from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, NotConnected, Record
from broker.runtime.state import Describer
from tests.clock import clock
from tests.integration.auth_harness import isthmus as command_line
from tests.integration.test_worker import isthmus
from tests.ledger import Ledger, stamp
from tests.proxy import Proxy
from tests.servers import PATIENCE

MOMENT = 1_700_000_000_000
SECRET = "not-to-be-seen-0815"


class Target(Protocol):
    """The real system, empty at the start of a test."""

    port: int

    async def payloads(self) -> list[bytes]:
        """What is stored, in the order in which it was."""

    async def stop(self) -> None: ...

    async def start(self) -> None: ...


def msgid(number: int) -> str:
    """As the broker makes them: milliseconds, node, boot, sequence."""
    return f"{MOMENT + number:012x}00010001{number:012x}"


def records(*numbers: int, **more: Any) -> list[Record]:
    keys = {"clientid": "dev", "username": "alice", "peerhost": "10.0.0.7", **more}
    return [
        Record("t/dev", more.get("payload") or stamp("dev", n), 1, msgid=msgid(n), ts=MOMENT + n,
               **{name: value for name, value in keys.items() if name != "payload"})
        for n in numbers
    ]  # fmt: skip


async def deliver(sink: Any, batch: list[Record], seconds: float = 20) -> int:
    """As the worker does: the same batch until it is stored. Answers how often that failed."""
    end = time.monotonic() + seconds * PATIENCE
    failures = 0
    while True:
        try:
            await sink.write(batch)
            return failures
        except NotConnected:
            failures += 1
            assert time.monotonic() < end, "the target never came back"
            await asyncio.sleep(0.05)


def written(*numbers: int) -> Ledger:
    """A ledger in which these were acknowledged."""
    ledger = Ledger()
    for number in range(1, max(numbers) + 1):
        ledger.next("dev")
        if number in numbers:
            ledger.acknowledged("dev", number)
    return ledger


async def compared(target: Target, ledger: Ledger, *, duplicates_allowed: bool = False) -> int:
    """Nothing lost, nothing out of order; answers how many arrived twice."""
    for payload in await target.payloads():
        ledger.arrived(payload)
    return ledger.check(duplicates_allowed=duplicates_allowed, redelivery=True).duplicates


@contextlib.asynccontextmanager
async def opened(backend: Backend, raw: dict[str, Any]) -> AsyncIterator[Any]:
    config = backend.config.model_validate({"filters": ["#"], **raw})
    sink = await backend.open(config.named(backend.name.partition(".")[2]))
    try:
        yield sink
    finally:
        began = time.monotonic()
        await sink.close()
        assert time.monotonic() - began < 5 * PATIENCE, "close takes five seconds at most"


def fragment(raw: dict[str, Any]) -> str:
    """The keys of a table in TOML."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in item.items()) + " }"
        return json.dumps(item)

    return "\n".join(f"{key} = {value(item)}" for key, item in raw.items())


CONF = """
[broker]
data = "data"
[access]
allow_anonymous = true
no_match = "allow"
[listeners.tcp]
bind = "127.0.0.1:0"
[sinks.store]
filters = ["telemetry/#"]
"""


class SinkSuite:
    """Subclasses name the backend and have a fixture `target`."""

    backend: ClassVar[Backend]
    once: ClassVar[bool] = True
    """Whether the target can tell a record that comes again."""
    keeps: ClassVar[bool] = False
    """Whether the target has its records after a restart."""

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        """The table that reaches the target through this port."""
        raise NotImplementedError

    async def plant(self, target: Any) -> dict[str, Any]:
        """Make the target refuse what `poison` makes; answers further keys."""
        raise NotImplementedError

    def poison(self, number: int) -> Record:
        raise NotImplementedError

    @pytest.fixture
    async def proxy(self, target: Any) -> AsyncIterator[Proxy]:
        async with Proxy("127.0.0.1", target.port) as proxy:
            yield proxy

    async def test_s13_batches_are_stored_in_order(self, target: Any) -> None:
        async with opened(self.backend, self.raw(target.port)) as sink:
            await sink.check()
            for start in range(1, 2_001, 250):
                await deliver(sink, records(*range(start, start + 250)))
            await sink.write([])
        assert await compared(target, written(*range(1, 2_001))) == 0

    async def test_a_batch_that_comes_again_is_told_where_that_is_possible(self, target: Any) -> None:
        async with opened(self.backend, self.raw(target.port)) as sink:
            await deliver(sink, records(*range(1, 101)))
        async with opened(self.backend, self.raw(target.port)) as sink:  # a worker that was killed knows nothing
            await deliver(sink, records(*range(51, 151)))
        twice = await compared(target, written(*range(1, 151)), duplicates_allowed=not self.once)
        assert twice == (0 if self.once else 50)

    async def test_s07_one_poisonous_record_in_the_middle_fails_alone(self, target: Any) -> None:
        keys = await self.plant(target)
        batch = records(*range(1, 101))
        batch[41] = self.poison(42)
        async with opened(self.backend, self.raw(target.port, **keys)) as sink:
            with pytest.raises(BatchFailed) as failed:
                await deliver(sink, batch)
            assert list(failed.value.failed) == [41]
            assert len(failed.value.failed[41]) > 10
            await deliver(sink, records(101))
        assert await compared(target, written(*(n for n in range(1, 102) if n != 42))) == 0

    async def test_s08_nothing_but_poison_is_refused_one_by_one(self, target: Any) -> None:
        keys = await self.plant(target)
        async with opened(self.backend, self.raw(target.port, **keys)) as sink:
            with pytest.raises(BatchFailed) as failed:
                await deliver(sink, [self.poison(n) for n in range(1, 21)])
            assert sorted(failed.value.failed) == list(range(20))
            await deliver(sink, records(21))
        assert await compared(target, written(21)) == 0

    async def test_s13_an_outage_and_a_return_lose_nothing_and_keep_the_order(self, target: Any, proxy: Proxy) -> None:
        """S-13: with every batch tried again until it is stored."""
        async with opened(self.backend, self.raw(proxy.port)) as sink:

            async def outage() -> None:
                await asyncio.sleep(0.1)
                await proxy.reset()
                await proxy.down()
                await asyncio.sleep(0.5)
                await proxy.up()

            failing = asyncio.create_task(outage())
            failures, number = 0, 0
            while not (failures and failing.done()):
                assert number < 500_000, "the outage was never seen"
                failures += await deliver(sink, records(*range(number + 1, number + 101)))
                number += 100
                await asyncio.sleep(0)
            await failing
        twice = await compared(target, written(*range(1, number + 1)), duplicates_allowed=not self.once)
        assert twice <= (0 if self.once else 100)

    async def test_s16_a_black_hole_is_told_within_the_bound_and_the_connection_replaced(
        self, target: Any, proxy: Proxy
    ) -> None:
        """S-16: the timeout that is not configured is below fifteen seconds; here it is a shorter one."""
        assert self.backend.config.model_fields["timeout"].default <= 15
        async with opened(self.backend, self.raw(proxy.port, timeout=0.6)) as sink:
            await deliver(sink, records(1))
            proxy.black_hole = True
            for verb in (sink.write(records(2)), sink.check()):
                began = clock()
                with pytest.raises(NotConnected, match=r"no answer|timed out|cannot be reached"):
                    await verb
                assert clock() - began < 3 * PATIENCE
            assert proxy.counts.swallowed
            proxy.black_hole = False
            accepted = proxy.counts.accepted
            await deliver(sink, records(2, 3))
            assert proxy.counts.accepted > accepted
        await compared(target, written(1, 2, 3))

    async def test_s14_an_answer_that_is_lost_makes_no_second_record_where_that_is_possible(
        self, target: Any, proxy: Proxy
    ) -> None:
        async with opened(self.backend, self.raw(proxy.port)) as sink:
            await deliver(sink, records(1))
            failures, number = 0, 1
            while not failures:
                assert number < 50, "the cut was never seen"
                number += 1
                proxy.cut_after(1, "down")
                failures = await deliver(sink, records(number))
            assert proxy.counts.cut
        twice = await compared(target, written(*range(1, number + 1)), duplicates_allowed=not self.once)
        assert twice == (0 if self.once else failures)

    async def test_s17_a_slow_target_holds_nobody_else(self, target: Any, proxy: Proxy) -> None:
        async with opened(self.backend, self.raw(proxy.port)) as sink:
            proxy.delay = 0.2
            writing = asyncio.create_task(deliver(sink, records(1, 2)))
            turns = 0
            while not writing.done():
                await asyncio.sleep(0.005)
                turns += 1
            await writing
            assert turns > 20
        assert await compared(target, written(1, 2)) == 0

    async def test_the_target_starts_again(self, target: Any) -> None:
        async with opened(self.backend, self.raw(target.port)) as sink:
            await deliver(sink, records(1, 2))
            await target.stop()
            with pytest.raises(NotConnected):
                await sink.write(records(3))
            with pytest.raises(NotConnected):
                await sink.check()
            await target.start()
            await deliver(sink, records(3, 4))
        await compared(target, written(*((1, 2, 3, 4) if self.keeps else (3, 4))))

    async def test_lanes_write_at_once(self, target: Any) -> None:
        async with opened(self.backend, self.raw(target.port, lanes=3)) as sink:

            async def lane(first: int) -> None:
                for start in range(first, first + 200, 50):
                    await deliver(sink, records(*range(start, start + 50)))

            await asyncio.gather(lane(1), lane(201), lane(401))
        payloads = await target.payloads()
        assert sorted(payloads) == sorted(stamp("dev", n) for n in range(1, 601))

    async def refused(self, caplog: pytest.LogCaptureFixture, kind: type[Exception], raw: dict[str, Any]) -> str:
        """The words of a refusal to this table, which holds SECRET: none of what anybody may read does."""
        caplog.set_level("DEBUG")
        config = self.backend.config.model_validate({"filters": ["#"], **raw})
        sink = await self.backend.open(config.named("store"))
        words = ""
        try:
            for verb in (sink.write(records(1)), sink.check()):
                with pytest.raises(kind) as error:
                    await verb
                words += f"{error.value!r} {error.value.__cause__!r} {Describer(config)(error.value)}"
        finally:
            await sink.close()
        assert SECRET not in words + caplog.text + repr(config) + config.model_dump_json()
        return words

    async def test_b17_every_acknowledged_message_outlives_a_killed_worker_and_an_outage(
        self, target: Any, proxy: Proxy, tmp_path: Path, root: Path
    ) -> None:
        """S-02: lost 0; twice only where the target cannot prevent it, and then a batch for each kill and cut."""
        kind = self.backend.name.partition(".")[2]
        raw = {"kind": kind, **self.raw(proxy.port), "batch": {"max_records": 100, "linger": "5ms"}}
        ledger = Ledger()
        async with isthmus(tmp_path, root, CONF + fragment(raw)) as broker:
            await broker.until_sink(lambda sink: sink["state"] == "running")
            publisher = await Publisher.connect(broker.url, client_id="dev")
            over = False

            async def publish() -> None:
                while not over:
                    await asyncio.gather(*(one(*ledger.next("dev")) for _ in range(20)))
                    await asyncio.sleep(0.02)

            async def one(number: int, payload: bytes) -> None:
                await publisher.publish("telemetry/dev", payload, 1)
                ledger.acknowledged("dev", number)

            publishing = asyncio.create_task(publish())
            for _ in range(2):
                await asyncio.sleep(0.4)
                pid = (await broker.sink())["pid"]
                os.kill(pid, signal.SIGKILL)
                await broker.until_sink(lambda sink, pid=pid: sink["pid"] not in (None, pid))
                await broker.until_sink(lambda sink: sink["state"] == "running")
            await proxy.reset()
            await proxy.down()
            await asyncio.sleep(0.4)
            await proxy.up()
            await asyncio.sleep(0.3)
            over = True
            await publishing
            await broker.until_sink(lambda sink: sink["queued"] == 0, 30 * PATIENCE)
            await publisher.disconnect()
            assert not (await broker.sink()).get("dead")
        twice = await compared(target, ledger, duplicates_allowed=not self.once)
        print(f"{self.backend.name}: {ledger.acknowledged_count} acknowledged, lost 0, twice {twice}")
        assert ledger.acknowledged_count > 200
        assert twice <= (0 if self.once else 3 * 100)

    async def test_poison_goes_to_the_dead_letters_and_the_rest_arrives(
        self, target: Any, tmp_path: Path, root: Path
    ) -> None:
        """S-07, S-27: what was acknowledged is stored or a dead letter."""
        keys = await self.plant(target)
        kind = self.backend.name.partition(".")[2]
        async with isthmus(tmp_path, root, CONF + fragment({"kind": kind, **self.raw(target.port, **keys)})) as broker:
            publisher = await Publisher.connect(broker.url, client_id="dev")
            bad = self.poison(50)
            for n in range(1, 101):
                topic, payload = ("telemetry/dev", stamp("dev", n)) if n != 50 else (bad.topic, bad.payload)
                await publisher.publish(topic.replace("t/", "telemetry/", 1) if n == 50 else topic, payload, 1)
            await broker.until_sink(lambda sink: sink.get("dead") == 1 and sink["acked"] == 100 and sink["queued"] == 0)
            queues = {queue["name"]: queue["queued"] for queue in await broker.command("queues.list")}
            assert queues["store/dlq"] == 1
            await publisher.disconnect()
        await compared(target, written(*(n for n in range(1, 101) if n != 50)))

    def connect(self, folder: Path, raw: dict[str, Any]) -> tuple[int, str]:
        """`isthmus check --connect` with this table: its exit code and what it said."""
        kind = self.backend.name.partition(".")[2]
        (folder / "conf.d").mkdir(exist_ok=True)
        (folder / "conf.d" / "00-test.toml").write_text(CONF + fragment({"kind": kind, **raw}))
        done = command_line(folder, "check", "--connect")
        return done.returncode, done.stdout + done.stderr

    async def test_check_connect_tells_whether_the_target_answers(
        self, target: Any, tmp_path: Path, free_port: Callable[[], int]
    ) -> None:
        code, said = await asyncio.to_thread(self.connect, tmp_path, self.raw(target.port))
        assert (code, said.split()[:2]) == (0, ["sinks.store", "ok"]), said
        code, said = await asyncio.to_thread(self.connect, tmp_path, self.raw(free_port(), timeout=1))
        assert (code, said.split()[:2]) == (3, ["sinks.store", "failed"]), said
        assert await target.payloads() == [], "check stores nothing"
