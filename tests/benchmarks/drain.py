"""How fast a sink empties a backlog: `python -m tests.benchmarks.drain postgresql|mysql|sqlite [--messages 200000]`.

One run measures three rates on one machine, the same records in each:

- drain: N messages queue while the sink is paused; from `sinks resume` until the last one is acknowledged. The rows are
  counted afterwards: each message once.
- read: the same N messages from another durable queue of the same broker, through the same lane, into nothing.
- plain: a loop on the driver alone that stores the same rows, batch by batch, into a table like the sink's.

Exit code 1 when the drain is below 80 % of the lower of the other two, or a row is missing or there twice. Runs on the
compiled build; says so where it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from broker.admin import control
from broker.client.connection import Handler, connect
from broker.extend.sink import Batch, Record
from broker.runtime.lane import Lane
from broker.runtime.writer import Writer
from tests import servers, sql_servers
from tests.broker import BASE, Broker
from tests.build import compiled

SHARE = 0.8
DEVICES = 10
BATCH = Batch()
COLUMNS = (
    '{ msgid = "${msgid}", time = "${ts}", device = "${clientid}", value = "${payload.value}", '
    'unit = "${payload.unit}" }'
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Row = tuple[str, int, str, float, str]
"""What the loop stores: message id, milliseconds, device, value, unit."""


@dataclass
class Target:
    """One destination: its fragment, its plain loop, how many rows and different message ids it holds."""

    fragment: str
    plain: Callable[[Sequence[Row]], Coroutine[Any, Any, float]]
    count: Callable[[], Coroutine[Any, Any, tuple[int, int]]]


# --- destinations ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def postgresql(where: Path, more: str) -> Iterator[Target]:
    table = "create table {} (msgid char(32) unique, time timestamptz, device text, value double precision, unit text)"
    with sql_servers.postgresql() as server:
        database = asyncio.run(server.create(table.format("readings"), table.format("plain")))

        async def plain(rows: Sequence[Row]) -> float:
            import asyncpg

            connection = await asyncpg.connect(
                host=server.host, port=server.port, user=server.user, password=server.password, database=database
            )
            ready = [(i, EPOCH + timedelta(milliseconds=t), d, v, u) for i, t, d, v, u in rows]
            names = ["msgid", "time", "device", "value", "unit"]
            began = time.perf_counter()
            for start in range(0, len(ready), BATCH.max_records):
                part = ready[start : start + BATCH.max_records]
                await connection.copy_records_to_table("plain", records=part, columns=names)
            took = time.perf_counter() - began
            await connection.close()
            return took

        async def count() -> tuple[int, int]:
            return tuple((await server.execute(_COUNT, database=database))[0])

        yield Target(_fragment(server, database, more), plain, count)


@contextlib.contextmanager
def mysql(where: Path, more: str) -> Iterator[Target]:
    table = (
        "create table {} (msgid char(32) unique, time datetime(3), device varchar(200), value double, unit varchar(20))"
    )
    with sql_servers.mariadb() as server:
        database = asyncio.run(server.create(table.format("readings"), table.format("plain")))

        async def plain(rows: Sequence[Row]) -> float:
            import asyncmy

            connection = await asyncmy.connect(
                host=server.host, port=server.port, user=server.user, password=server.password, database=database
            )
            ready = [(i, (EPOCH + timedelta(milliseconds=t)).replace(tzinfo=None), d, v, u) for i, t, d, v, u in rows]
            insert = "insert into plain (msgid, time, device, value, unit) values (%s, %s, %s, %s, %s)"
            began = time.perf_counter()
            async with connection.cursor() as cursor:
                for start in range(0, len(ready), BATCH.max_records):
                    await cursor.executemany(insert, ready[start : start + BATCH.max_records])
                    await connection.commit()
            took = time.perf_counter() - began
            await connection.ensure_closed()
            return took

        async def count() -> tuple[int, int]:
            return tuple((await server.execute(_COUNT, database=database))[0])

        yield Target(_fragment(server, database, more), plain, count)


@contextlib.contextmanager
def sqlite(where: Path, more: str) -> Iterator[Target]:
    async def plain(rows: Sequence[Row]) -> float:
        return await asyncio.to_thread(_sqlite_plain, where / "plain.db", rows)

    async def count() -> tuple[int, int]:
        with contextlib.closing(sqlite3.connect(where / "readings.db")) as db:
            return tuple(db.execute(_COUNT).fetchone())

    path = f'[sinks.readings]\nkind = "sqlite"\npath = "{where / "readings.db"}"\ntable = "readings"\n'
    yield Target(f'{path}filters = ["telemetry/#"]\ncolumns = {COLUMNS}\n{more}\n', plain, count)


def _sqlite_plain(path: Path, rows: Sequence[Row]) -> float:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("pragma journal_mode=wal")
        db.execute("pragma synchronous=full")
        db.execute("create table plain (msgid text primary key, time integer, device text, value, unit text)")
        began = time.perf_counter()
        for start in range(0, len(rows), BATCH.max_records):
            db.execute("begin")
            db.executemany("insert into plain values (?, ?, ?, ?, ?)", rows[start : start + BATCH.max_records])
            db.execute("commit")
        return time.perf_counter() - began


_COUNT = "select count(*), count(distinct msgid) from readings"
TARGETS = {"postgresql": postgresql, "mysql": mysql, "sqlite": sqlite}


def _fragment(server: sql_servers.SqlServer, database: str, more: str) -> str:
    kind = "postgresql" if server.scheme == "postgresql" else "mysql"
    where = f'kind = "{kind}"\ndsn = "{server.dsn(database)}"\npassword = "{server.password}"\ntable = "readings"\n'
    return f'[sinks.readings]\n{where}filters = ["telemetry/#"]\ncolumns = {COLUMNS}\n{more}\n'


# --- the load --------------------------------------------------------------------------------------------------------


def payload(number: int) -> bytes:
    return b'{"value": %d.5, "unit": "C", "n": %d}' % (number % 100, number)


async def publish(port: int, messages: int) -> None:
    """DEVICES clients publish together, QoS 1, each with a thousand under way."""

    async def device(name: str, numbers: range) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"\x00\x04MQTT\x04\x02\x00\x00" + len(name).to_bytes(2, "big") + name.encode()
        writer.write(bytes([0x10, len(head)]) + head)
        await reader.readexactly(4)
        topic = f"telemetry/{name}".encode()
        for start in range(0, len(numbers), 1000):
            some = numbers[start : start + 1000]
            for packet_id, number in enumerate(some, 1):
                body = len(topic).to_bytes(2, "big") + topic + packet_id.to_bytes(2, "big") + payload(number)
                writer.write(bytes([0x32, len(body)]) + body)
            await reader.readexactly(4 * len(some))
        writer.write(b"\xe0\x00")
        writer.close()

    share = messages // DEVICES
    await asyncio.gather(*(device(f"dev-{n}", range(n * share, n * share + share)) for n in range(DEVICES)))


class Nowhere:
    """A sink that stores nothing, and notes when it has had everything."""

    def __init__(self, wanted: int) -> None:
        self.left = wanted
        self.done = asyncio.Event()

    async def write(self, batch: Sequence[Record]) -> None:
        self.left -= len(batch)
        if self.left <= 0:
            self.done.set()

    async def check(self) -> None:
        """Always there."""

    async def close(self) -> None:
        """Nothing is open."""


class NoGraveyard:
    async def bury(self, refused: list[Any]) -> None:
        raise AssertionError("nothing is refused")


def attach(port: int, expiry: int = 3600) -> Callable[[Handler], Awaitable[Any]]:
    return lambda handler: connect(
        f"mqtt://127.0.0.1:{port}", client_id="reader", handler=handler, clean_start=False, session_expiry=expiry,
        receive_maximum=65_534,
    )  # fmt: skip


async def read(port: int, messages: int) -> float:
    """Seconds from attaching until the last message was handed over."""
    sink = Nowhere(messages)
    gate = asyncio.Event()
    gate.set()
    lane = Lane(0, attach=attach(port), writer=Writer(sink, gate=gate), graveyard=NoGraveyard(), batch=BATCH)
    began = time.perf_counter()
    lane.start()
    await asyncio.wait_for(sink.done.wait(), 600)
    took = time.perf_counter() - began
    await lane.close(1)
    return took


# --- one run ---------------------------------------------------------------------------------------------------------


def cpu(pid: int) -> float:
    """Seconds of processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def entry(running: Broker) -> dict[str, Any]:
    found: dict[str, Any] = control.request(running.data / "control.sock", "status")["sinks"]["readings"]
    return found


def settle(running: Broker, holds: Callable[[dict[str, Any]], bool], seconds: float, every: float = 0.05) -> float:
    """Until status shows it; when it did."""
    end = time.monotonic() + seconds
    while not holds(now := entry(running)):
        if time.monotonic() > end:
            raise SystemExit(f"drain: after {seconds:.0f} s still {now}\n{running.process.tail()}")
        time.sleep(every)
    return time.perf_counter()


def run(name: str, messages: int, where: Path, lanes: int) -> dict[str, Any]:
    with TARGETS[name](where, f"lanes = {lanes}") as target:
        running = Broker(where, options=["--log-level", "warning"])
        limits = "[limits]\nmax_queued_messages = 100_000_000\n"
        running.write("00.toml", f'[access]\nallow_anonymous = true\nno_match = "allow"\n{limits}{BASE}')
        running.write("30.toml", target.fragment)
        running.start()
        try:
            settle(running, lambda sink: sink["state"] == "running", 30)
            asyncio.run(_subscribe(running.port))
            control.request(running.data / "control.sock", "sinks.pause", name="readings")
            asyncio.run(publish(running.port, messages))
            worker = entry(running)["pid"]
            settle(running, lambda sink: sink["queued"] == messages, 60)
            before = [cpu(pid) for pid in (worker, running.pid)]
            began = time.perf_counter()
            control.request(running.data / "control.sock", "sinks.resume", name="readings")
            taken = settle(running, lambda sink: sink["queued"] == 0, 600) - began
            used = [cpu(pid) - b for pid, b in zip((worker, running.pid), before, strict=True)]
            stored = asyncio.run(target.count())
            command = [sys.executable, "-m", "tests.benchmarks.drain", "--read", str(running.port)]
            command += ["--messages", str(messages)]
            done = subprocess.run(command, env=running.environ(), capture_output=True, text=True, timeout=620)
            if done.returncode:
                raise SystemExit(f"drain: the reader failed: {done.stderr}")
            reading = float(done.stdout)
        finally:
            running.stop(signal.SIGTERM)
        now = int(time.time() * 1000)
        share = messages // DEVICES
        rows = [(f"{n:032x}", now + n, f"dev-{n // share}", n % 100 + 0.5, "C") for n in range(messages)]
        plain = asyncio.run(target.plain(rows))
    least = min(messages / reading, messages / plain)
    return {
        "target": name, "messages": messages, "lanes": lanes, "drain_per_s": round(messages / taken),
        "read_per_s": round(messages / reading), "plain_per_s": round(messages / plain),
        "share": round(messages / taken / least, 3), "worker_us": round(used[0] / messages * 1e6, 1),
        "broker_us": round(used[1] / messages * 1e6, 1), "rows": stored[0], "different": stored[1],
        "compiled": not (compiled()[1] - compiled()[0]),
    }  # fmt: skip


async def _subscribe(port: int) -> None:
    """Make the other durable queue."""
    conn = await attach(port)(Handler())
    await conn.subscribe([("telemetry/#", 1)])
    await conn.disconnect()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="drain", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: postgresql")
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--lanes", type=int, default=2, help="of the sink; the reading beside it has one (default 2)")
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS, metavar="PORT")
    options = parser.parse_args(arguments)
    if options.read:
        print(_uvloop_run(read(options.read, options.messages)))
        return 0
    missed = 0
    for name in options.targets or ["postgresql"]:
        with tempfile.TemporaryDirectory(prefix="isthmus-drain-") as folder:
            try:
                figures = run(name, options.messages // DEVICES * DEVICES, Path(folder), options.lanes)
            except servers.Absent as error:
                print(f"drain: {name}: {error}", file=sys.stderr)
                missed += 1
                continue
        print(json.dumps(figures))
        whole = figures["rows"] == figures["different"] == figures["messages"]
        missed += not whole or figures["share"] < SHARE
    return 1 if missed else 0


def _uvloop_run(work: Any) -> Any:
    """As a worker runs: on uvloop where it is there."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(work)
    return asyncio.run(work)


if __name__ == "__main__":
    raise SystemExit(main())
