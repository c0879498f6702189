"""What a well-behaved client feels while others flood the broker: `make canary ARGS="--seconds 10 --rows line"`.

A canary publishes at QoS 1 ten times a second and hears itself; its slowest round trip is the figure. Isthmus is
measured beside mosquitto, each alone with the flood. Exit code 1 when one of ours is slower than 100 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.bench import Target, build_generator, flow, load, start_isthmus, start_mosquitto
from tests.build import compiled
from tests.servers import Certificates, certificates
from tests.system import fleet
from tests.system.resilience import Canary

SLOWEST = 0.1
OFFLINE = 100_000
RECONNECTS = 5_000
ROWS = {
    "alone": "nobody else",
    "line": "one publisher at line rate into 1→100",
    "half": "100 publishers at half of what they reach",
    "offline": "the same beside 100 000 sessions that are away",
    "tls": "5 000 TLS connections come at once, again and again",
}


class Flood:
    """The generator against one broker, run again until the canary has sung its time."""

    def __init__(self, generator: Path, target: Target, seconds: float) -> None:
        self.generator, self.target, self.seconds = generator, target, seconds

    def options(self, row: str) -> tuple[str, list[str]]:
        """Mode and options of the generator in a row; measures first what 100 publishers reach, where it asks that."""
        if row == "line":
            return "flow", [*flow(1, 100, 1), "--seconds", f"{self.seconds + 2:g}"]
        if row == "tls":
            return "idle", ["--subscribe", "--tls", "--conns", str(RECONNECTS), "--seconds", "0.1"]
        crowd = flow(100, 100, 100)
        most = load(self.generator, "flow", self.target.port, self.target.pids(), [*crowd, "--seconds", "2"])
        rate = str(int(most["sent_per_s"] / 2))
        return "rate", [*crowd, "--rate", rate, "--seconds", f"{self.seconds + 2:g}"]

    async def beside(self, row: str) -> tuple[float, str]:
        """The slowest round trip in seconds, and what the flood did."""
        if row == "offline":
            making = fleet.start("make", self.target.port, OFFLINE, 10, 1)
            said, _ = await asyncio.to_thread(making.communicate, timeout=600)
            if making.returncode:
                raise SystemExit(f"canary: the sessions could not be made: {said}")
        mode, options = ("", []) if row == "alone" else await asyncio.to_thread(self.options, row)
        port = self.target.tls_port if row == "tls" else self.target.port
        canary = await Canary.open(f"mqtt://127.0.0.1:{self.target.port}", client_id=f"canary-{row}")
        command = [str(self.generator), mode, "--port", str(port), *options]
        end = time.monotonic() + self.seconds
        singing = asyncio.create_task(canary.sing(self.seconds))
        rounds, last = 0, ""
        while mode and time.monotonic() < end:
            flood = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                async with asyncio.timeout(max(1.0, end - time.monotonic()) + 60):
                    out, err = await flood.communicate()
            finally:
                if flood.returncode is None:
                    flood.kill()
            if flood.returncode:
                raise SystemExit(f"canary: the flood of {row} failed: {err.decode().strip() or flood.returncode}")
            rounds, last = rounds + 1, out.decode()
        await singing
        await canary.disconnect()
        return canary.longest, summary(row, rounds, last)


def summary(row: str, rounds: int, said: str) -> str:
    """What the generator reached, in a few words."""
    figures = dict(word.partition("=")[::2] for word in said.split() if "=" in word)
    if row == "tls":
        return f"{rounds} times {RECONNECTS} connections, {figures['conn_per_s']}/s"
    return f"{float(figures['delivered_per_s']) / 1000:.0f} k/s delivered" if figures else ""


def measure(
    generator: Path, where: Path, certs: Certificates, row: str, name: str, seconds: float
) -> tuple[float, str]:
    """One row on one broker, started for it."""
    target = (start_mosquitto if name == "mosquitto" else start_isthmus)(where, certs)
    try:
        return asyncio.run(Flood(generator, target, seconds).beside(row))
    finally:
        target.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="canary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated names (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the canary sings in each row")
    parser.add_argument("--alone", action="store_true", help="leave mosquitto out")
    given = parser.parse_args(arguments)
    rows = [name.strip() for name in given.rows.split(",") if name.strip()]
    if unknown := [name for name in rows if name not in ROWS]:
        print(f"canary: no row {', '.join(unknown)}; there are: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    built, listed = compiled()
    if built != listed:
        print(f"canary: not the compiled build ({len(built)} of {len(listed)} modules): make compile", file=sys.stderr)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    missed = 0
    with tempfile.TemporaryDirectory(prefix="isthmus-canary-") as folder:
        where = Path(folder)
        where.chmod(0o755)
        generator, secure = build_generator(where)
        certs = certificates(where / "tls")
        print(f"{'slowest round trip while':52} {'mosquitto':>11} {'isthmus':>11}")
        for row in rows:
            if row == "tls" and not secure:
                print(f"{ROWS[row]:52} left out: OpenSSL's headers are not here (apt-get install libssl-dev)")
                continue
            texts = []
            said = ""
            for name in ("isthmus",) if given.alone else ("mosquitto", "isthmus"):
                slowest, said = measure(generator, where, certs, row, name, given.seconds)
                texts.append(f"{slowest * 1000:8.1f} ms")
            met = slowest <= SLOWEST
            missed += not met
            both = ["-", *texts] if given.alone else texts
            print(f"{ROWS[row]:52} {both[0]:>11} {both[1]:>11}  {'ok' if met else 'MISSED'}  {said}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
