"""The targets beside mosquitto, in one run on one machine: `make bench ARGS="--quick --rows qos0-1-1,latency"`.

Both brokers run side by side and are measured in turn (A B A B …); a figure is the median of the rounds. Throughput is
messages delivered per second of CPU time of all processes of the installation, kernel included, which stays comparable
on a noisy machine. mosquitto runs with its default socket options, unlimited in-flight and queue; Isthmus compiled,
with `max_inflight = 1000`; both with an ACL file. Exit code 1 when a row misses its target or a message was lost.

`--source postgresql,redis` (or `all`) measures our broker alone, with 200 rules a user from each of these backends
beside none; it starts the servers they need.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks import calls
from tests.benchmarks.sources import SOURCES
from tests.broker import Broker
from tests.build import compiled
from tests.servers import Certificates, Process, accepts, certificates, free_port, program

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "mqttload.c"
USERS = 20
RULES = 200
Figures = dict[str, float]


# --- the generator ---------------------------------------------------------------------------------------------------


def build_generator(target: Path) -> tuple[Path, bool]:
    """Compile the load generator; with TLS where OpenSSL's headers are here. Returns it and whether it speaks TLS."""
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        raise SystemExit("bench: no C compiler for the load generator (apt-get install gcc libc6-dev)")
    generator = target / "mqttload"
    base = [compiler, "-O2", "-o", str(generator)]
    secure = subprocess.run([*base, "-DWITH_TLS", str(SOURCE), "-lssl", "-lcrypto"], capture_output=True)
    if secure.returncode == 0:
        return generator, True
    plain = subprocess.run([*base, str(SOURCE)], capture_output=True, text=True)
    if plain.returncode:
        raise SystemExit(f"bench: {SOURCE} does not compile:\n{plain.stderr}")
    return generator, False


class Lost(Exception):
    """The generator lost or reordered a message, or a connection was closed."""


def load(generator: Path, mode: str, port: int, pids: Sequence[int], options: Sequence[str]) -> Figures:
    """One run of the generator; its `key=value` figures."""
    command = [str(generator), mode, "--port", str(port), *(a for p in pids for a in ("--pid", str(p))), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    figures: Figures = {}
    for word in done.stdout.split():
        key, _, value = word.partition("=")
        with contextlib.suppress(ValueError):
            figures[key] = float(value)
    if done.returncode:
        raise Lost((done.stderr or done.stdout).strip() or f"exit {done.returncode}")
    return figures


# --- the two brokers -------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A running broker under measurement."""

    name: str
    port: int
    tls_port: int | None
    pids: Callable[[], list[int]]
    close: Callable[[], None]
    password: str = ""
    """Of every user, where it is another than the rows say."""


def passwords(where: Path) -> Path:
    """The users load0 … of the ACL row, in mosquitto's own file, which both brokers read."""
    path = where / "passwords"
    if not path.exists():
        tool = program("mosquitto_passwd")
        if tool is None:
            raise SystemExit("bench: mosquitto is not installed (make servers)")
        path.write_text("".join(f"load{n}:load-pw\n" for n in range(USERS)))
        subprocess.run([tool, "-U", str(path)], check=True, capture_output=True)
        path.chmod(0o644)
    return path


def rules(where: Path, kind: str) -> Path:
    """`small`: two rules for everybody; `large`: 200 rules a user, placeholders in all, the one that matches last."""
    path = where / f"acl-{kind}"
    lines = ["topic readwrite load/#", "topic readwrite canary/#"]
    if kind == "large":
        lines = [f"pattern readwrite site{n}/%u/%c/telemetry/#" for n in range(RULES - 1)]
        lines.append("pattern readwrite load/%u/#")
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o644)
    return path


def start_mosquitto(where: Path, certs: Certificates, acl: str = "small") -> Target:
    binary = program("mosquitto")
    if binary is None:
        raise SystemExit("bench: mosquitto is not installed (make servers)")
    folder = Path(tempfile.mkdtemp(prefix="mosquitto-", dir=where))
    port, tls_port = free_port(), free_port()
    lines = ["per_listener_settings false", "log_type error", "max_inflight_messages 0", "max_queued_messages 0",
             f"acl_file {rules(where, acl)}", "user root" if os.geteuid() == 0 else "",
             f"listener {port} 127.0.0.1", f"listener {tls_port} 127.0.0.1", f"cafile {certs.ca}",
             f"certfile {certs.server}", f"keyfile {certs.server_key}"]  # fmt: skip
    anonymous = (
        [f"password_file {passwords(where)}", "allow_anonymous false"] if acl == "large" else ["allow_anonymous true"]
    )
    (folder / "mosquitto.conf").write_text("\n".join([*anonymous, *lines]) + "\n")
    process = Process([binary, "-c", folder / "mosquitto.conf"], folder / "log")
    process.wait_until(lambda: accepts(port), 10, "mosquitto")
    return Target("mosquitto", port, tls_port, lambda: [process.pid], lambda: void(process.stop()))


def start_isthmus(where: Path, certs: Certificates, acl: str = "small") -> Target:
    """`acl`: small | large | none (users, but everything allowed), or one of SOURCES."""
    folder = Path(tempfile.mkdtemp(prefix="isthmus-", dir=where))
    running = Broker(folder, options=["--log-level", "warning"])
    stack = contextlib.ExitStack()
    password = ""
    if acl in SOURCES:
        sources, password = stack.enter_context(SOURCES[acl](folder))
    else:
        sources = 'kind = "file"\n'
        sources += f'passwords = "{passwords(where)}"\n' if acl != "small" else ""
        sources += f'rules = "{rules(where, acl)}"\n' if acl != "none" else ""
    stack.callback(running.stop)
    running.write("00-broker.toml", f"""
        [access]
        allow_anonymous = {"true" if acl == "small" else "false"}
        no_match = "{"allow" if acl == "none" else "deny"}"
        [limits]
        max_inflight = 1000
        [listeners.tcp]
        bind = "127.0.0.1:0"
        [listeners.tls]
        bind = "127.0.0.1:0"
        certificate = "{certs.server}"
        key = "{certs.server_key}"
        [auth.accounts]
        {sources}
        """)  # fmt: skip
    running.start()
    tls_port = int(running.ready["tls"].rpartition(":")[2])
    return Target("isthmus", running.port, tls_port, running.pids, stack.close, password)


def void(_: object) -> None:
    """Drops a result where only the effect counts."""


# --- rows ------------------------------------------------------------------------------------------------------------


MOSQUITTO_CONNECTION = 25
"""Microseconds of CPU a connection costs mosquitto on the machine for which 20 000 a second are wanted of us."""


@dataclass
class Row:
    """One line of the table. `target` says what the verdict compares; see `verdict`."""

    name: str
    text: str
    mode: str = "flow"
    options: tuple[str, ...] = ()
    figure: str = "delivered_per_cpu_s"
    ratio: float | None = None
    """At least this many times mosquitto."""
    kind: str = "ratio"
    base: Row | None = None
    """What this one is compared with (`kind` share), measured in turn with it on our broker."""
    share: float = 0.0
    acl: str = "small"
    tls: bool = False
    fresh: bool = False
    """A new broker process for every measurement (memory)."""
    churn: bool = False


def flow(pubs: int, subs: int, topics: int, *more: str) -> tuple[str, ...]:
    return ("--pubs", str(pubs), "--subs", str(subs), "--topics", str(topics), *more)


GROUPS = ("--groups", str(USERS))
LOGIN = (*GROUPS, "--user", "load", "--pass", "load-pw")
TEN_K, HUNDRED_K = flow(20, 20, 10_000), flow(20, 20, 100_000)
# fmt: off
ROWS = [
    Row("qos0-1-1", "QoS 0, 1→1", options=flow(1, 1, 1), ratio=15),
    Row("qos0-20-20", "QoS 0, 20→20", options=flow(20, 20, 20), ratio=10),
    Row("qos0-1-100", "QoS 0, 1→100", options=flow(1, 100, 1), ratio=50),
    Row("qos0-1k", "QoS 0, 20→20, 1 kB", options=flow(20, 20, 20, "--size", "1024"), ratio=7),
    Row("qos0-plus", "QoS 0, 10→10, +, 1000 topics", options=flow(10, 10, 1000, "--all"), ratio=25),
    Row("qos1-20-20", "QoS 1, 20→20", options=flow(20, 20, 20, "--qos", "1"), ratio=12),
    Row("qos1-fan-in", "QoS 1, 1000→1", options=flow(1000, 1, 1, "--qos", "1"), ratio=1.8),
    Row("qos2-20-20", "QoS 2, 20→20", options=flow(20, 20, 20, "--qos", "2"), ratio=18),
    Row("tls-1-1", "QoS 0, 1→1 over TLS", options=flow(1, 1, 1, "--tls"), tls=True),
    Row("tls-20-20", "QoS 0, 20→20 over TLS", options=flow(20, 20, 20, "--tls"), tls=True),
    Row("latency", "p50 µs at 10 k msg/s, 50→50", "rate", flow(50, 50, 50, "--rate", "10000"), "p50_us",
        kind="latency"),
    Row("idle", "bytes per idle subscribed connection", "idle", ("--subscribe",), "bytes_per_conn",
        kind="idle", fresh=True),
    Row("idle-tls", "bytes per idle connection over TLS", "idle", ("--subscribe", "--tls"), "bytes_per_conn",
        kind="idle-tls", fresh=True, tls=True),
    Row("acl", "20→20, 10 000 topics, 200 rules a user", options=(*TEN_K, *LOGIN), acl="large", kind="share", share=0.8,
        base=Row("acl-none", "no rules", options=(*TEN_K, *LOGIN), acl="none")),
    Row("churn", "20→20 beside 1000 (un)subscribes/s", options=flow(20, 20, 20), churn=True, kind="share", share=0.8,
        base=Row("qos0-20-20", "without them", options=flow(20, 20, 20))),
    Row("topics", "20→20, 100 000 topics in turn", options=(*HUNDRED_K, *GROUPS), kind="share", share=0.5,
        base=Row("topics-20", "20 topics", options=(*flow(20, 20, 20), *GROUPS))),
]
# fmt: on


def source_row(name: str) -> Row:
    """The row of `acl` with the rules from another backend than the file."""
    base = Row("acl-none", "no rules", options=(*TEN_K, *LOGIN), acl="none")
    text = f"20→20, 10 000 topics, 200 rules a user, {name}"
    return Row(name, text, options=(*TEN_K, *LOGIN), acl=name, kind="share", share=0.8, base=base)


@dataclass
class Result:
    """What was measured for one row; figures of each round, per broker."""

    row: Row
    ours: list[Figures] = field(default_factory=list)
    theirs: list[Figures] = field(default_factory=list)
    base: list[Figures] = field(default_factory=list)
    error: str = ""

    def median(self, whose: list[Figures], figure: str | None = None) -> float | None:
        values = [f[figure or self.row.figure] for f in whose if (figure or self.row.figure) in f]
        return statistics.median(values) if values else None

    def best(self, whose: list[Figures], figure: str) -> float | None:
        values = [f[figure] for f in whose if figure in f]
        return min(values) if values else None


def verdict(result: Result) -> tuple[str, str, bool | None]:
    """(ratio, target, met) of a row; met is None where there is no target or nothing to compare with."""
    row, ours, theirs = result.row, result.median(result.ours), result.median(result.theirs)
    if result.error or ours is None:
        return "-", "-", False
    ratio = f"{ours / theirs:.2f} x" if theirs else "-"
    if row.kind == "ratio":
        return (
            ratio,
            f">= {row.ratio:g} x" if row.ratio else "",
            ours >= row.ratio * theirs if row.ratio and theirs else None,
        )
    if row.kind == "latency":
        mine, other = result.best(result.ours, "p99_us"), result.best(result.theirs, "p99_us")
        if not theirs or not other or mine is None:
            return "-", "-", None
        met = ours <= 1.2 * theirs and mine <= 2.5 * other
        return f"{ratio}; p99 {mine / other:.2f} x", "p50 <= 1.2 x, p99 <= 2.5 x", met
    if row.kind == "idle":
        rate, cpu = result.median(result.ours, "conn_per_s") or 0, result.median(result.ours, "cpu_us_per_conn") or 0
        theirs_rate = result.median(result.theirs, "conn_per_s") or 0
        theirs_cpu = result.median(result.theirs, "cpu_us_per_conn") or 0
        text = f"{figure(rate)}/s ({figure(theirs_rate)}), {cpu:.0f} us ({theirs_cpu:.0f})"
        if not theirs_rate or not theirs_cpu:
            return text, "<= 2500 B, >= 20 k/s, <= 45 us", ours <= 2500 and rate >= 20_000 and cpu <= 45
        # mosquitto's rate is that of a timer of the kernel, its CPU that of the machine (ARCHITECTURE.md, Measured)
        wanted = 20_000 * MOSQUITTO_CONNECTION / theirs_cpu
        text = f"{rate / theirs_rate:.2f} x conn/s, {cpu / theirs_cpu:.2f} x CPU: {text}"
        return (
            text,
            f"<= 2500 B, >= {figure(wanted)}/s, <= 1.8 x",
            ours <= 2500 and rate >= wanted and cpu <= 1.8 * theirs_cpu,
        )
    if row.kind == "idle-tls":
        return ratio, "<= 32 kB", ours <= 32 * 1024
    base = result.median(result.base)
    if not base or row.base is None:
        return ratio, f">= {row.share:.0%}", None
    text = f"{ratio}; {ours / base:.0%} of: {row.base.text}"
    return text, f">= {row.share:.0%}", ours >= row.share * base


class Bench:
    """Holds the brokers of one run; each is started when a row first needs it."""

    def __init__(self, where: Path, generator: Path, seconds: float, connections: int) -> None:
        self.where, self.generator, self.seconds, self.connections = where, generator, seconds, connections
        self.certs = certificates(where / "tls")
        self._running: dict[tuple[str, str], Target] = {}

    def target(self, name: str, acl: str) -> Target:
        if (name, acl) not in self._running:
            start = start_mosquitto if name == "mosquitto" else start_isthmus
            self._running[name, acl] = start(self.where, self.certs, acl)
        return self._running[name, acl]

    def close(self) -> None:
        for target in self._running.values():
            target.close()

    @contextlib.contextmanager
    def churning(self, port: int) -> Iterator[None]:
        command = [
            self.generator,
            "churn",
            "--port",
            str(port),
            "--rate",
            "1000",
            "--seconds",
            str(self.seconds + 3),
            "--prefix",
            "load",
        ]
        process = Process(command, self.where / "churn.log")
        try:
            yield
            if process.popen.poll() not in (None, 0):
                raise Lost(f"the churning client failed: {process.tail()}")
        finally:
            process.kill()

    def measure(self, row: Row, name: str) -> Figures:
        """One round of a row on one broker."""
        if row.fresh:
            target = (start_mosquitto if name == "mosquitto" else start_isthmus)(self.where, self.certs)
        else:
            target = self.target(name, row.acl)
        try:
            port = target.tls_port if row.tls else target.port
            assert port is not None
            options = [*row.options, "--seconds", str(self.seconds)]
            if target.password:
                options += ["--pass", target.password]
            if row.mode == "idle":
                count = min(self.connections, 2000) if row.tls else self.connections
                options = [*row.options, "--seconds", "1.5", "--conns", str(count)]
            with self.churning(port) if row.churn else contextlib.nullcontext():
                return load(self.generator, row.mode, port, target.pids(), options)
        finally:
            if row.fresh:
                target.close()


def table(results: Sequence[Result]) -> tuple[str, int]:
    """The closing table and how many rows missed their target."""
    lines = [f"{'row':42} {'mosquitto':>11} {'isthmus':>11}  {'ratio':42} {'target':34} "]
    missed = 0
    for result in results:
        ratio, target, met = verdict(result)
        ours, theirs = result.median(result.ours), result.median(result.theirs)
        word = {True: "ok", False: "MISSED", None: ""}[met]
        missed += met is False
        left = f"{result.row.text:42} {figure(theirs):>11} {figure(ours):>11}"
        lines.append(f"{left}  {ratio:42} {target:34} {result.error or word}")
    return "\n".join(lines), missed


def figure(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or (unit == "M" and value >= size):
            return f"{value / size:.2f} {unit}" if unit == "M" else f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of one second: only shows the size")
    parser.add_argument("--rows", default="", help="comma-separated names; calls counts Python calls; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one measurement")
    parser.add_argument("--json", metavar="FILE", help="write every figure there; - is standard output")
    parser.add_argument("--alone", action="store_true", help="leave mosquitto out")
    parser.add_argument("--source", default="", help="backends the rules come from, or all; instead of the rows")
    given = parser.parse_args(arguments)
    rounds, seconds = (1, 1.0) if given.quick else (given.rounds, given.seconds)
    wanted = [name.strip() for name in given.rows.split(",") if name.strip()]
    known = {row.name for row in ROWS} | {"calls"}
    if unknown := [name for name in wanted if name not in known]:
        print(f"bench: no row {', '.join(unknown)}; there are: {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    rows = [row for row in ROWS if not wanted or row.name in wanted]
    sources = [name.strip() for name in given.source.split(",") if name.strip()]
    if sources:
        if unknown := [name for name in sources if name not in SOURCES and name != "all"]:
            print(f"bench: no source {', '.join(unknown)}; there are: {', '.join(SOURCES)}", file=sys.stderr)
            return 2
        rows = [source_row(name) for name in SOURCES if name in sources or "all" in sources]
    built, listed = compiled()
    if built != listed:
        print(f"bench: not the compiled build ({len(built)} of {len(listed)} modules): make compile", file=sys.stderr)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    connections = min(2000 if given.quick else 10_000, (hard if hard > 0 else 1 << 20) - 1000)
    began = time.monotonic()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder:
        where = Path(folder)
        where.chmod(0o755)
        generator, secure = build_generator(where)
        bench = Bench(where, generator, seconds, connections)
        try:
            for row in rows:
                if row.tls and not secure:
                    print(f"bench: {row.name} left out: OpenSSL's headers are not here (apt-get install libssl-dev)")
                    continue
                result = Result(row)
                results.append(result)
                for _ in range(rounds):
                    try:
                        if not given.alone and not sources:
                            result.theirs.append(bench.measure(row, "mosquitto"))
                        if row.base is not None:
                            result.base.append(bench.measure(row.base, "isthmus"))
                        result.ours.append(bench.measure(row, "isthmus"))
                    except (Lost, RuntimeError, subprocess.TimeoutExpired) as error:
                        result.error = str(error).splitlines()[-1][:120]
                        break
                ratio, _, met = verdict(result)
                word = {True: "ok", False: "MISSED", None: ""}[met]
                print(
                    f"  {row.name:12} {figure(result.median(result.ours)):>10}  {ratio:36} {result.error or word}",
                    flush=True,
                )
        finally:
            bench.close()
    text, missed = table(results)
    print(f"\n{text}")
    count = calls.count() if "calls" in wanted or not (wanted or sources) else None
    if count is not None:
        met = count <= 20
        missed += not met
        left = f"{'Python calls for 1000 QoS 0 messages':42} {'':>11} {count:>11}"
        print(f"{left}  {'':42} {'<= 20':32} {'ok' if met else 'MISSED'}")
    print(f"\n{rounds} rounds of {seconds:g} s, {time.monotonic() - began:.0f} s in all.")
    print("Throughput is messages delivered per second of CPU time of all processes, kernel included.")
    if given.json:
        answer = {
            "rounds": rounds, "seconds": seconds, "python_calls": count, "missed": missed,
            "rows": {r.row.name: {k: v for k, v in vars(r).items() if k != "row"} for r in results},
        }  # fmt: skip
        text = json.dumps(answer, indent=1)
        print(text) if given.json == "-" else Path(given.json).write_text(text + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
