"""What safety costs: QoS 1 into durable queues, each acknowledgement after the flush, and what comes back after a kill.

    python -m tests.benchmarks.durable [--quick] [--seconds S] [--json FILE]

Rows: subscribers online with persistent sessions; offline, everything queues; both at once; QoS 2 with persistent
sessions; live messages beside a client that drains a long queue; 20 000 messages a second to online subscribers for a
minute (bytes written beside bytes published); a broker killed with what the offline row left: time to `ready`, memory,
and whether every acknowledged message is still there. Exit 1 when a row misses its target or a message is missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker.mqtt import packets
from tests.benchmarks.bench import Figures, build_generator, load
from tests.broker import Broker

RATE = 100_000
"""Messages a second that must be acknowledged after their flush."""
P99 = 25_000
"""Microseconds from PUBLISH to its acknowledgement, in 99 of 100 cases."""
WINDOW = 300
"""Messages each publisher of the first row keeps unacknowledged: enough for three quarters of the highest rate, while
the wait measured is the broker's and not that behind the other publishers."""
BESIDE = 0.8
"""Of the live messages, how many are left beside a client that drains its queue."""
GROWTH = 0.1
"""Bytes written for each byte published when everybody acknowledges at once."""
CONFIGURATION = """
    [access]
    allow_anonymous = true
    no_match = "allow"
    [limits]
    max_inflight = 1000
    max_queued_messages = 100_000_000
    [listeners.tcp]
    bind = "127.0.0.1:0"
    """
TWENTY = ("--pubs", "20", "--subs", "20", "--topics", "20")


def start(where: Path) -> Broker:
    """A broker of its own."""
    running = Broker(where, options=["--log-level", "info"])
    running.write("00-broker.toml", CONFIGURATION)
    running.start()
    return running


def stored(running: Broker) -> int:
    """Bytes of the journal."""
    return sum(path.stat().st_size for path in (running.data / "store").glob("*.log"))


def resident(running: Broker) -> int:
    """Bytes of the broker process in memory."""
    text = Path(f"/proc/{running.pid}/statm").read_text()
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flow(generator: Path, where: Path, seconds: float, *options: str) -> tuple[Figures, Broker]:
    """One load on a fresh broker, which is left running."""
    running = start(where)
    figures = load(generator, "flow", running.port, running.pids(), [*TWENTY, "--seconds", str(seconds), *options])
    return figures, running


def collect(port: int, number: int, quiet: float = 3.0, tell: Callable[[int], Any] = bool) -> int:
    """Attach as the subscriber the generator left behind, acknowledge all that comes; how many messages. `tell` hears
    the number so far."""
    count = 0
    connect = packets.Connect(version=4, clean_start=False, keep_alive=0, client_id=f"load-s-{number}")
    with socket.create_connection(("127.0.0.1", port), timeout=quiet) as link:
        link.sendall(packets.encode_connect(connect))
        rest = b""
        while True:
            try:
                data = link.recv(1 << 18)
            except TimeoutError:
                return count
            if not data:
                return count
            rest += data
            at = 0
            answers = []
            while at + 2 <= len(rest):
                size, start_of_body = rest[at + 1], at + 2
                if size > 127:
                    if at + 3 > len(rest):
                        break
                    size, start_of_body = size & 127 | rest[at + 2] << 7, at + 3
                if start_of_body + size > len(rest):
                    break
                if rest[at] >> 4 == 3:
                    topic = rest[start_of_body] << 8 | rest[start_of_body + 1]
                    answers.append(b"\x40\x02" + rest[start_of_body + 2 + topic : start_of_body + 4 + topic])
                at = start_of_body + size
            rest = rest[at:]
            count += len(answers)
            tell(count)
            if answers:
                link.sendall(b"".join(answers))


def killed(running: Broker, acknowledged: int) -> tuple[str, bool]:
    """kill -9, start again, read everything back."""
    os.kill(running.pid, signal.SIGKILL)
    running.process.popen.wait(10)
    began = time.monotonic()
    running.start()
    ready = time.monotonic() - began
    memory = resident(running)
    began = time.monotonic()
    back = sum(collect(running.port, number) for number in range(20))
    took = time.monotonic() - began - 20 * 3.0
    text = (
        f"{acknowledged:,} acknowledged, {back:,} came back; ready after {ready:.1f} s with {memory >> 20} MB, "
        f"read back at {back / max(took, 0.1):,.0f}/s by one client after the other"
    )
    return text, back >= acknowledged


def processor_time(running: Broker) -> float:
    """Seconds of the broker and its workers so far."""
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in running.pids())
    return sum(int(found[11]) + int(found[12]) for found in fields) / os.sysconf("SC_CLK_TCK")


def _drain(port: int, count: Any) -> None:
    collect(port, 0, 1.0, lambda so_far: setattr(count, "value", so_far))


def beside(generator: Path, where: Path, seconds: float) -> tuple[str, bool, dict[str, Figures]]:
    """Live QoS 1 alone, and beside a client that drains a queue from disk."""
    one = ["--pubs", "20", "--subs", "1", "--topics", "1", "--qos", "1", "--offline", "--acks"]
    live = [*TWENTY, "--qos", "1", "--prefix", "live", "--seconds", str(seconds)]
    running = start(where)

    def fill(how_long: float) -> int:
        options = [*one, "--seconds", str(how_long)]
        return int(load(generator, "flow", running.port, running.pids(), options)["acked"])

    fill(max(1.0, seconds / 4))
    began, before = time.monotonic(), processor_time(running)
    drained = collect(running.port, 0, 1.0)
    rate, each = drained / (time.monotonic() - began - 1.0), (processor_time(running) - before) / drained
    alone = load(generator, "flow", running.port, running.pids(), live)
    queued = fill(2 * seconds)
    count = multiprocessing.Value("q", 0)
    drainer = multiprocessing.Process(target=_drain, args=(running.port, count))
    drainer.start()
    both = load(generator, "flow", running.port, running.pids(), live)
    drained = int(count.value)  # type: ignore[attr-defined]
    drainer.terminate()
    drainer.join()
    again = load(generator, "flow", running.port, running.pids(), live)
    running.stop()
    per_second = (alone["sent_per_s"] + again["sent_per_s"]) / 2
    part = both["sent_per_s"] / per_second
    share = 1 - drained * each / (both["broker_cpu"] * seconds)
    text = (
        f"{per_second:,.0f}/s alone (mean of before and after), {both['sent_per_s']:,.0f}/s ({part:.0%}) beside a "
        f"client that gets {drained / seconds:,.0f}/s from disk, {rate:,.0f}/s where nothing else happens; live "
        f"messages have {share:.0%} of the broker's processor time. The load generator and that client share its "
        f"{os.cpu_count()} cores"
    )
    if drained >= queued:
        text += "; the queue was too short"
    return text, part >= BESIDE and 0 < drained < queued, {"alone": alone, "beside": both}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a second each: only shows the size")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    seconds = 1.0 if chosen.quick else chosen.seconds
    results: list[tuple[str, str, bool]] = []
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="isthmus-durable-") as folder:
        where = Path(folder)
        generator, _ = build_generator(where)

        def row(name: str, text: str, *options: str, keep: bool = False) -> Broker | None:
            figures, running = flow(generator, where / name, seconds, *options)
            found[name] = figures
            good = figures["sent_per_s"] >= RATE and figures["p99_us"] <= P99
            results.append((
                text,
                f"{figures['sent_per_s']:,.0f}/s, PUBACK p50 {figures['p50_us'] / 1000:.1f} ms, "
                f"p99 {figures['p99_us'] / 1000:.1f} ms, {figures['broker_cpu']:.2f} cores",
                good,
            ))  # fmt: skip
            if keep:
                return running
            running.stop()
            return None

        online = ("--qos", "1", "--persistent", "--acks")
        row("online", f"QoS 1, online, persistent sessions, {WINDOW} in flight each", *online, "--window", str(WINDOW))
        figures, running = flow(generator, where / "saturated", seconds, *online)
        found["saturated"] = figures
        text = f"{figures['sent_per_s']:,.0f}/s, PUBACK p99 {figures['p99_us'] / 1000:.1f} ms"
        results.append(("the same with 1000 in flight each", text, figures["sent_per_s"] >= RATE))
        running.stop()
        queue = row("offline", "QoS 1, offline, all of it queues", "--qos", "1", "--offline", "--acks", keep=True)
        assert queue is not None
        text, good = killed(queue, int(found["offline"]["acked"]))
        results.append(("kill -9 with that queue", text, good))
        queue.stop()
        for qos in ("0", "1", "2"):
            rates = {}
            for name, more in (("clean", ()), ("kept", ("--persistent",))):
                options = ("--qos", qos, "--window", "3000" if qos == "2" else "1000", *more)
                figures, running = flow(generator, where / f"qos{qos}-{name}", seconds, *options)
                found[f"qos{qos}-{name}"] = figures
                rates[name] = figures["delivered_per_cpu_s"]
                running.stop()
            text = f"{rates['kept']:,.0f} a core-second, {figures['sent_per_s']:,.0f}/s"
            share = f"{rates['kept'] / rates['clean']:.0%} of sessions that end with their connection"
            results.append((f"QoS {qos}, 20→20, persistent sessions", f"{text}; {share}", True))
        text, good, figures_of = beside(generator, where / "beside", seconds)
        found |= figures_of
        results.append(("QoS 1, online, beside a draining client", text, good))
        running = start(where / "growth")
        before = stored(running)
        steady = ["--pubs", "10", "--subs", "10", "--topics", "10", "--rate", "20000", "--qos", "1", "--persistent"]
        length = "5" if chosen.quick else "60"
        figures = load(generator, "rate", running.port, running.pids(), [*steady, "--warm", "0", "--seconds", length])
        found["growth"] = figures
        payload = figures["acked"] * 64
        written = stored(running) - before
        results.append((
            "bytes written while everybody acknowledges at once",
            f"{written:,} for {payload:,.0f} published ({written / payload:.2%})",
            written <= GROWTH * payload,
        ))  # fmt: skip
        running.stop()
    for name, text, good in results:
        print(f"{'ok    ' if good else 'MISSED'}  {name}: {text}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1))
    return 0 if all(good for _, _, good in results) else 1


if __name__ == "__main__":
    sys.exit(main())
