"""Two brokers in one process share nothing but the interpreter."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.app import Broker
from broker.client.session import Publisher
from broker.config.settings import Settings, load_settings
from broker.identity import DataFolderBusy
from tests.ledger import Ledger
from tests.system.resilience import OPEN, Listening, eventually

SINK = """
[workers]
processes = 0
[sinks.store]
kind = "sqlite"
path = "telemetry.db"
filters = ["telemetry/#"]
"""


@contextlib.asynccontextmanager
async def running(where: Path, name: str) -> AsyncIterator[Broker]:
    """A broker on this test's own loop."""
    conf = where / name / "conf.d"
    conf.mkdir(parents=True)
    (conf / "00.toml").write_text(f'[broker]\nname = "{name}"\n' + OPEN + SINK)

    def load() -> Settings:
        return load_settings(conf, environ={})

    broker = Broker(load(), load, log_format="text", log_level="info")
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


def url(broker: Broker) -> str:
    return f"mqtt://{broker.listeners['tcp'].address}"


async def test_two_brokers_on_one_loop_both_work_and_exchange_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, "one") as one, running(tmp_path, "two") as two:
        ledgers = {broker: Ledger() for broker in (one, two)}
        # the same client ids, the same topics
        ears = {b: await Listening.open(ledgers[b], url(b), "telemetry/#", "ear") for b in (one, two)}
        mouths = {b: await Publisher.connect(url(b), client_id="mouth") for b in (one, two)}
        for broker, mouth in mouths.items():
            for _ in range(100):
                stream = broker.settings.broker.name
                number, payload = ledgers[broker].next(stream)
                await mouth.publish("telemetry/x", payload)
                ledgers[broker].acknowledged(stream, number)
            await mouth.publish("kept", stream.encode(), retain=True)
        for broker in (one, two):
            await eventually(lambda broker=broker: not ledgers[broker].missing(), "every message")
            ledgers[broker].check()  # a message of the other would be a stranger
            assert broker.engine.core.received == 101
            assert broker.engine.retained_store.count == 1
            await eventually(lambda broker=broker: broker.engine.instances.lanes("store")[0].acked == 100, "every row")
            assert broker.engine.instances.lanes("store")[0].queued == 0
        # one reloads and stops, the other does not notice
        (tmp_path / "one" / "conf.d" / "01.toml").write_text("[limits]\nmax_inflight = 5\n")
        assert (await one.reload()).changed == ["limits"]
        assert (one.engine.core.limits.max_inflight, two.engine.core.limits.max_inflight) == (5, 32)
        await one.stop()
        await eventually(lambda: ears[one].lost, "the end of the first")
        await mouths[two].publish("telemetry/x", ledgers[two].next("two")[1])
        await eventually(lambda: ears[two].count == 101, "the message after the other's end")
        assert ears[two].lost == []
        for ear in ears.values():
            ear.conn.abort()
        for mouth in mouths.values():
            mouth.conn.abort()
        await asyncio.sleep(0)


async def test_two_brokers_refuse_to_share_a_data_folder(tmp_path: Path) -> None:
    async with running(tmp_path, "one") as one:
        with pytest.raises(DataFolderBusy, match="another broker uses this data folder"):
            Broker(one.settings, lambda: one.settings, log_format="text", log_level="info")
