"""How fast a sink empties a backlog: `python -m tests.benchmarks.drain [TARGET …] [--messages 1000000] [--latency]`.

One run measures three rates on one machine, the same records in each:

- drain: N messages queue while the sink is paused; from `sinks resume` until the last one is acknowledged. The rows are
  counted afterwards: each message once. What the worker was given before it was resumed (`held`: 65 535 a lane) comes
  from no disk, so N should be many times that.
- read: the same N messages from another durable queue of the same broker, through the same lane, into nothing.
- plain: a loop on the driver alone that stores the same rows, batch by batch, into a table like the sink's.

Exit code 1 when the drain is below 80 % of the lower of the other two, or a row is missing or there twice. On a machine
with few or busy processors the drain, which needs three processes, loses more than the other two, so the processor time
of each message is there too: of worker and broker while draining, of the reader, of the loop. Runs on the compiled
build; says so where it is not.

`--latency` measures instead how long a message takes from its PUBLISH until the destination has it: 5 000 a second by
ten devices into a sink with `ack = "delivered"`, which acknowledges no sooner. `--linger 0s` shows how much of that is
waiting for more records.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from broker.admin import control
from broker.client.connection import Handler, connect
from broker.extend.sink import Record
from broker.runtime.lane import Lane
from broker.runtime.writer import Writer
from tests import servers
from tests.benchmarks.destinations import BATCH, TARGETS, Target
from tests.broker import BASE, Broker
from tests.build import compiled

SHARE = 0.8
DEVICES = 10
LATENCY_RATE = 5_000
MESSAGES = {"mongodb": 200_000}
"""Unless said: a million; fewer where the server may be one that keeps them in a little memory."""


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


async def read(port: int, messages: int) -> tuple[float, float]:
    """Seconds from attaching until the last message was handed over, and of our processor time."""
    sink = Nowhere(messages)
    gate = asyncio.Event()
    gate.set()
    lane = Lane(0, attach=attach(port), writer=Writer(sink, gate=gate), graveyard=NoGraveyard(), batch=BATCH)
    began, used = time.perf_counter(), time.process_time()
    lane.start()
    await asyncio.wait_for(sink.done.wait(), 600)
    took = time.perf_counter() - began, time.process_time() - used
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


def queued(running: Broker, messages: int, seconds: float) -> float:
    """When that many wait for the sink; costs the broker less than its whole status."""
    end = time.monotonic() + seconds
    while True:
        queues = control.request(running.data / "control.sock", "queues.list")
        if sum(queue["queued"] for queue in queues if queue["name"] == "readings") == messages:
            return time.perf_counter()
        if time.monotonic() > end:
            raise SystemExit(f"drain: after {seconds:.0f} s {queues}\n{running.process.tail()}")
        time.sleep(0.02)


def settle(running: Broker, holds: Callable[[dict[str, Any]], bool], seconds: float) -> None:
    """Until status shows it."""
    end = time.monotonic() + seconds
    while not holds(now := entry(running)):
        if time.monotonic() > end:
            raise SystemExit(f"drain: after {seconds:.0f} s still {now}\n{running.process.tail()}")
        time.sleep(0.05)


@contextlib.contextmanager
def started(target: Target, where: Path) -> Iterator[Broker]:
    """A broker whose sink `readings` works."""
    running = Broker(where, options=["--log-level", "warning"])
    limits = "[limits]\nmax_queued_messages = 100_000_000\n"
    running.write("00.toml", f'[access]\nallow_anonymous = true\nno_match = "allow"\n{limits}{BASE}')
    running.write("30.toml", target.fragment)
    running.start()
    try:
        settle(running, lambda sink: sink["state"] == "running", 30)
        yield running
    finally:
        running.stop(signal.SIGTERM)


def drain(name: str, messages: int, where: Path, lanes: int) -> dict[str, Any]:
    """The figures of one run."""
    with TARGETS[name](where, f"lanes = {lanes}") as target:
        with started(target, where) as running:
            asyncio.run(_subscribe(running.port))
            control.request(running.data / "control.sock", "sinks.pause", name="readings")
            asyncio.run(publish(running.port, messages))
            found = entry(running)
            worker, held = found["pid"], found["in_flight"]
            queued(running, messages, 60)
            before = [cpu(pid) for pid in (worker, running.pid)]
            began = time.perf_counter()
            control.request(running.data / "control.sock", "sinks.resume", name="readings")
            taken = queued(running, 0, 600) - began
            used = [cpu(pid) - b for pid, b in zip((worker, running.pid), before, strict=True)]
            stored = asyncio.run(target.count())
            command = [sys.executable, "-m", "tests.benchmarks.drain", "--read", str(running.port)]
            command += ["--messages", str(messages)]
            done = subprocess.run(command, env=running.environ(), capture_output=True, text=True, timeout=620)
            if done.returncode:
                raise SystemExit(f"drain: the reader failed: {done.stderr}")
            reading, reader = map(float, done.stdout.split())
        now = int(time.time() * 1000)
        share = messages // DEVICES
        rows = [(f"{n:032x}", now + n, f"dev-{n // share}", n % 100 + 0.5, "C") for n in range(messages)]
        plain = asyncio.run(target.plain(rows))
    least = min(messages / reading, messages / plain.seconds)

    def each(seconds: float) -> float:
        return round(seconds / messages * 1e6, 1)

    return {
        "target": name, "messages": messages, "held": held, "lanes": lanes, "drain_per_s": round(messages / taken),
        "read_per_s": round(messages / reading), "plain_per_s": round(messages / plain.seconds),
        "share": round(messages / taken / least, 3), "worker_us": each(used[0]), "broker_us": each(used[1]),
        "reader_us": each(reader), "plain_us": each(plain.cpu), "rows": stored[0], "different": stored[1],
        "compiled": not (compiled()[1] - compiled()[0]),
    }  # fmt: skip


def latency(name: str, messages: int, where: Path, lanes: int, linger: str) -> dict[str, Any]:
    """From PUBLISH until the destination has confirmed, in milliseconds."""
    keys = f'lanes = {lanes}\nack = "delivered"\nbatch = {{ linger = "{linger}" }}'
    with TARGETS[name](where, keys) as target, started(target, where) as running:
        asyncio.run(_paced(running.port, LATENCY_RATE))  # connections, statements, the first batches
        before = entry(running)
        used = [cpu(pid) for pid in (before["pid"], running.pid)]
        times = asyncio.run(_paced(running.port, messages))
        used = [cpu(pid) - b for pid, b in zip((before["pid"], running.pid), used, strict=True)]
        stored = asyncio.run(target.count())
    times.sort()
    return {
        "target": name, "messages": len(times), "lanes": lanes, "rate": LATENCY_RATE, "linger": linger,
        "p50_ms": round(times[len(times) // 2] * 1e3, 1), "p99_ms": round(times[len(times) * 99 // 100] * 1e3, 1),
        "max_ms": round(times[-1] * 1e3, 1), "worker_us": round(used[0] / len(times) * 1e6, 1),
        "broker_us": round(used[1] / len(times) * 1e6, 1), "rows": stored[0], "different": stored[1],
    }  # fmt: skip


async def _paced(port: int, messages: int) -> list[float]:
    """Seconds each message waited for its acknowledgement."""
    waited: list[float] = []

    async def device(number: int) -> None:
        name = f"dev-{number}"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"\x00\x04MQTT\x04\x02\x00\x00" + len(name).to_bytes(2, "big") + name.encode()
        writer.write(bytes([0x10, len(head)]) + head)
        await reader.readexactly(4)
        topic = f"telemetry/{name}".encode()
        sent: deque[float] = deque()
        share = messages // DEVICES

        async def hear() -> None:
            for _ in range(share):
                await reader.readexactly(4)
                waited.append(time.perf_counter() - sent.popleft())

        hearing = asyncio.create_task(hear())
        apart = DEVICES / LATENCY_RATE
        due = time.perf_counter() + apart * number / DEVICES
        for count in range(share):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += apart
            body = len(topic).to_bytes(2, "big") + topic + (count % 65_535 + 1).to_bytes(2, "big") + payload(count)
            sent.append(time.perf_counter())
            writer.write(bytes([0x32, len(body)]) + body)
        await asyncio.wait_for(hearing, 60)
        writer.write(b"\xe0\x00")
        writer.close()

    await asyncio.gather(*(device(number) for number in range(DEVICES)))
    return waited


async def _subscribe(port: int) -> None:
    """Make the other durable queue."""
    conn = await attach(port)(Handler())
    await conn.subscribe([("telemetry/#", 1)])
    await conn.disconnect()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="drain", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: postgresql")
    parser.add_argument("--messages", type=int, default=0, help="default 1000000; with --latency 50000")
    parser.add_argument("--lanes", type=int, default=2, help="of the sink; the reading beside it has one (default 2)")
    parser.add_argument("--latency", action="store_true", help="from PUBLISH to confirmation at 5000 a second")
    parser.add_argument("--linger", default="5ms", help="with --latency: how long a batch waits for more (default 5ms)")
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS, metavar="PORT")
    options = parser.parse_args(arguments)
    if options.read:
        print(*_uvloop_run(read(options.read, options.messages)))
        return 0
    missed = 0
    for name in options.targets or ["postgresql"]:
        default = 50_000 if options.latency else MESSAGES.get(name, 1_000_000)
        messages = (options.messages or default) // DEVICES * DEVICES
        with tempfile.TemporaryDirectory(prefix="isthmus-drain-") as folder:
            try:
                if options.latency:
                    figures = latency(name, messages, Path(folder), options.lanes, options.linger)
                else:
                    figures = drain(name, messages, Path(folder), options.lanes)
            except servers.Absent as error:
                print(f"drain: {name}: {error}", file=sys.stderr)
                missed += 1
                continue
        print(json.dumps(figures))
        wanted = messages + (LATENCY_RATE if options.latency else 0)
        missed += not figures["rows"] == figures["different"] == wanted
        missed += not options.latency and figures["share"] < SHARE
    return 1 if missed else 0


def _uvloop_run(work: Any) -> Any:
    """As a worker runs: on uvloop where it is there."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(work)
    return asyncio.run(work)


if __name__ == "__main__":
    raise SystemExit(main())
