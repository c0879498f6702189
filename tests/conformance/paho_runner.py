"""Runs the Eclipse Paho interoperability suite (3.1.1 and 5.0) against `isthmus run`: `make conformance`.

PAHO_TESTING names a checkout of eclipse-paho/paho.mqtt.testing, which is not part of this project. Each test is a
process of its own with a time-out and a broker of its own, a few at a time: some tests hang when they fail, upstream's
3.1.1 runner cannot take a port, and all use the same client ids.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.broker import Broker

HERE = Path(__file__).resolve().parent
SUITES = {"3.1.1": "client_test", "5.0": "client_test5"}
EXCUSED = {
    ("5.0", "test_server_topic_alias"): "a broker need not use topic aliases towards clients",
    ("5.0", "test_subscribe_failure"): "it wants 0x80 where 0x87, not authorized, is right",
}
DRIVER = """
import importlib, logging, sys, unittest
folder, module, name, port = sys.argv[1:]
sys.path.insert(0, folder)
suite = importlib.import_module(module)
suite.topics = ("TopicA", "TopicA/B", "Topic/C", "TopicA/C", "/TopicA")
suite.wildtopics = ("TopicA/+", "+/C", "#", "/#", "/+", "+/+", "TopicA/#")
suite.nosubscribe_topics = ("test/nosubscribe",)
suite.topic_prefix = ""
suite.host, suite.port = "127.0.0.1", int(port)
logging.getLogger().setLevel(logging.ERROR)
result = unittest.TextTestRunner(verbosity=0).run(unittest.TestSuite([suite.Test(name)]))
sys.stdout.flush()
sys.exit(0 if result.wasSuccessful() else 1)
"""
SECONDS = 60.0
"""What one test may take; the slowest well-behaved one needs about 30."""


@dataclass(frozen=True)
class Case:
    """One test of the suite and how it ended."""

    version: str
    name: str
    state: str = "waiting"
    """passed | failed | timeout | excused"""
    seconds: float = 0.0
    detail: str = ""


def checkout() -> Path | None:
    """The suite's folder, or None when PAHO_TESTING names none."""
    given = os.environ.get("PAHO_TESTING")
    if not given:
        return None
    folder = Path(given).expanduser()
    folder = folder if (folder / "client_test5.py").exists() else folder / "interoperability"
    return folder if (folder / "client_test5.py").exists() else None


def cases(folder: Path) -> list[Case]:
    """Every test of both suites, read from their source; also the one whose name hides it from unittest."""
    found = []
    for version, module in SUITES.items():
        tree = ast.parse((folder / f"{module}.py").read_text("utf-8"))
        (suite,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Test")
        names = [node.name for node in suite.body if isinstance(node, ast.FunctionDef)]
        found += [Case(version, name) for name in names if name.startswith("test") or name.endswith("_test")]
    return found


def run(case: Case, folder: Path) -> Case:
    """One test against a broker of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="isthmus-paho-") as name:
        where = Path(name)
        broker = Broker(where, options=["--log-level", "warning"])
        shutil.copy(HERE / "paho.acl", where)
        shutil.copy(HERE / "paho.toml", broker.conf / "00-paho.toml")
        try:
            broker.start()
        except RuntimeError as error:
            return Case(case.version, case.name, "failed", 0.0, str(error).splitlines()[-1][:160])
        try:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                DRIVER,
                str(folder),
                SUITES[case.version],
                case.name,
                str(broker.port),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=where)
            state, detail = (
                ("passed", "") if done.returncode == 0 else ("failed", last_error(done.stdout + done.stderr))
            )
        except subprocess.TimeoutExpired:
            state, detail = "timeout", f"not done after {SECONDS:g} s"
        finally:
            code = broker.stop()
        if code:
            state, detail = "failed", f"the broker exited with {code}: {broker.process.tail(5)}"
    if state != "passed" and (case.version, case.name) in EXCUSED:
        state, detail = "excused", EXCUSED[case.version, case.name]
    return Case(case.version, case.name, state, time.monotonic() - began, detail)


def last_error(output: str) -> str:
    """The line that says what was wrong."""
    lines = [line.strip() for line in output.splitlines() if "Error" in line or "assert" in line.lower()]
    return (lines or output.strip().splitlines() or ["no output"])[-1][:160]


def run_all(folder: Path, wanted: Sequence[str] = (), parallel: int = 6) -> list[Case]:
    """Every test (or those whose name holds one of `wanted`), in the suite's order; prints each as it ends."""
    chosen = [c for c in cases(folder) if not wanted or any(w in f"{c.version} {c.name}" for w in wanted)]
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        running = [pool.submit(run, case, folder) for case in chosen]
        for future in concurrent.futures.as_completed(running):
            case = future.result()
            print(f"  {case.state:8} {case.version:6} {case.name:32} {case.seconds:5.1f} s  {case.detail}", flush=True)
    return [future.result() for future in running]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="paho_runner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="only tests whose name holds one of these")
    parser.add_argument("--parallel", type=int, default=6)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args(arguments)
    folder = checkout()
    if folder is None:
        print("conformance: left out: PAHO_TESTING does not name a checkout of eclipse-paho/paho.mqtt.testing")
        return 0
    began = time.monotonic()
    ended = run_all(folder, given.tests, given.parallel)
    counts = {state: sum(c.state == state for c in ended) for state in ("passed", "excused", "failed", "timeout")}
    print(
        ", ".join(f"{count} {state}" for state, count in counts.items() if count),
        f"in {time.monotonic() - began:.0f} s",
    )
    if given.json:
        Path(given.json).write_text(json.dumps([case.__dict__ for case in ended], indent=1) + "\n")
    return 1 if not ended or counts["failed"] or counts["timeout"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
