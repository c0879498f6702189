"""The broker as a process with its worker: what a device was acknowledged reaches the sink, whoever dies on the way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from broker.admin import control
from broker.client.connection import Handler, connect
from broker.client.session import Publisher
from broker.mqtt.packets import Publish

CONF = """
[broker]
data = "data"
[access]
allow_anonymous = true
no_match = "allow"
[auth.anybody]
kind = "static"
[[auth.anybody.rules]]
permission = "allow"
action = "subscribe"
topics = ["$dlq/#"]
[listeners.tcp]
bind = "127.0.0.1:0"
[sinks.store]
kind = "sqlite"
path = "telemetry.db"
filters = ["telemetry/#"]
"""


class Isthmus:
    """A running broker and what a test asks of it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url

    async def command(self, verb: str, /, **arguments: Any) -> Any:
        return await asyncio.to_thread(control.request, self.folder / "data" / "control.sock", verb, **arguments)

    async def sink(self, name: str = "store") -> dict[str, Any]:
        entry: dict[str, Any] = (await self.command("status"))["sinks"][name]
        return entry

    async def until_sink(self, holds: Callable[[dict[str, Any]], bool], seconds: float = 20) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while not holds(entry := await self.sink()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            return entry

    def rows(self) -> list[tuple[str, ...]]:
        if not (self.folder / "telemetry.db").exists():
            return []
        with contextlib.closing(sqlite3.connect(self.folder / "telemetry.db")) as db:
            try:
                return db.execute("select payload from messages order by rowid").fetchall()
            except sqlite3.OperationalError:
                return []

    async def until_rows(self, count: int, seconds: float = 30) -> list[str]:
        async with asyncio.timeout(seconds):
            while len(self.rows()) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return [row[0] for row in self.rows()]


@contextlib.asynccontextmanager
async def isthmus(folder: Path, root: Path, conf: str = CONF) -> AsyncIterator[Isthmus]:
    (folder / "conf.d").mkdir()
    (folder / "conf.d" / "00-test.toml").write_text(conf)
    with open(folder / "log", "wb") as log:  # noqa: ASYNC230
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "broker", "run", "--conf", str(folder / "conf.d"),
            cwd=root, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 45)).decode()
        assert line.startswith("ready "), (folder / "log").read_text()
        address = next(word for word in line.split() if word.startswith("tcp=")).removeprefix("tcp=")
        yield Isthmus(folder, f"mqtt://{address}")
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 15) == 0, (folder / "log").read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        transport: Any = getattr(process, "_transport", None)
        transport.close()


@pytest.fixture
async def broker(tmp_path: Path, root: Path) -> AsyncIterator[Isthmus]:
    async with isthmus(tmp_path, root) as running:
        yield running


async def test_records_carry_what_the_broker_vouches_for(broker: Isthmus) -> None:
    publisher = await Publisher.connect(broker.url, client_id="dev-1")
    for qos in (0, 1, 2):
        await publisher.publish("telemetry/a", str(qos).encode(), qos=qos)
    await publisher.disconnect()
    assert sorted(await broker.until_rows(3)) == ["0", "1", "2"]
    with contextlib.closing(sqlite3.connect(broker.folder / "telemetry.db")) as db:
        found = db.execute("select distinct clientid, topic, length(msgid), time > 1600000000000 from messages")
        assert found.fetchall() == [("dev-1", "telemetry/a", 32, 1)]


async def test_b17_every_acknowledged_message_outlives_a_killed_worker(broker: Isthmus) -> None:  # B-17, S-02
    await broker.until_sink(lambda sink: sink["state"] == "running")
    publisher = await Publisher.connect(broker.url, client_id="dev-1")
    acknowledged: list[int] = []
    over = False

    async def publish() -> None:
        for start in itertools.count(0, 40):
            if over:
                return
            numbers = range(start, start + 40)
            await asyncio.gather(*(publisher.publish("telemetry/a", str(n).encode(), 1 + n % 2) for n in numbers))
            acknowledged.extend(numbers)
            await asyncio.sleep(0.02)

    publishing = asyncio.create_task(publish())
    loop = asyncio.get_running_loop()
    times = []
    for _ in range(3):
        await asyncio.sleep(1.2)  # one that lived for a second is started again at once
        pid = (await broker.sink())["pid"]
        os.kill(pid, signal.SIGKILL)
        killed = loop.time()
        await broker.until_sink(lambda sink, pid=pid: sink["pid"] not in (None, pid) and sink["state"] == "running")
        times.append(loop.time() - killed)
    over = True
    await publishing
    assert min(times) <= 2.5  # two seconds, and how long asking takes
    assert max(times) <= 10
    await publisher.disconnect()
    rows = await broker.until_rows(len(acknowledged))
    assert sorted({int(row) for row in rows}) == acknowledged
    assert len(rows) == len(set(rows)), "a message that was delivered twice has one id and one row"


async def test_a_paused_sink_queues_and_goes_on(broker: Isthmus) -> None:
    await broker.until_sink(lambda sink: sink["state"] == "running")
    await broker.command("sinks.pause", name="store")
    assert (await broker.sink())["state"] == "paused"
    publisher = await Publisher.connect(broker.url, client_id="dev-1")
    for i in range(50):
        await publisher.publish("telemetry/a", str(i).encode(), 1)
    assert broker.rows() == []
    await broker.command("sinks.resume", name="store")
    assert await broker.until_rows(50) == [str(i) for i in range(50)]
    await publisher.disconnect()


class Collect(Handler):
    def __init__(self) -> None:
        self.got: list[Publish] = []

    def on_publish(self, conn: Any, publish: Publish) -> None:
        self.got.append(publish)
        conn.ack(4, publish.packet_id)


async def test_s07_one_poisonous_record_goes_to_the_dead_letters_with_its_story(broker: Isthmus) -> None:  # S-07
    with contextlib.closing(sqlite3.connect(broker.folder / "telemetry.db")) as db:
        columns = "msgid text primary key, time, clientid, username, topic, payload check (payload <> 'poison')"
        db.execute(f"create table messages ({columns})")
        db.commit()
    reader = Collect()
    conn = await connect(broker.url, client_id="reader", handler=reader, clean_start=False, session_expiry=600)
    await conn.subscribe([("$dlq/store", 1)])
    publisher = await Publisher.connect(broker.url, client_id="dev-1")
    payloads = [b"poison" if i == 42 else str(i).encode() for i in range(100)]
    await asyncio.gather(*(publisher.publish("telemetry/a", payload) for payload in payloads))
    rows = await broker.until_rows(99)
    assert len(rows) == 99
    await broker.until_sink(lambda sink: sink["dead"] == 1 and sink["queued"] == 0)
    async with asyncio.timeout(10):
        while not reader.got:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    letter = reader.got[0]
    assert letter.payload == b"poison"
    assert letter.properties is not None
    pairs = dict(letter.properties.user_properties or ())
    assert "CHECK constraint" in pairs["error"]
    assert (pairs["sink"], pairs["topic"]) == ("store", "telemetry/a")
    assert int(pairs["attempts"]) <= 5
    assert json.loads(pairs["metadata"])["c"] == "dev-1"
    await publisher.disconnect()
    await conn.disconnect()
