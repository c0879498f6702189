"""Starts the broker as a process, the way a user does, and speaks to it through its command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers import PATIENCE, Process

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "broker"]

BASE = """
[listeners.tcp]
bind = "127.0.0.1:0"
"""
"""The least a test needs: one listener on a free port."""


@dataclass
class Broker:
    """One broker in a folder of its own: `conf.d/`, `data/` and its log lie in `where`."""

    where: Path
    options: Sequence[str] = ()
    """Further options of `isthmus run`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    wrapper: Sequence[str] = ()
    """A program put before the command, e.g. ``["taskset", "-c", "0"]``."""
    ready: dict[str, str] = field(default_factory=dict)
    """What the `ready` line said: listener -> address, `control` -> path."""
    _process: Process | None = None

    def __post_init__(self) -> None:
        self.conf.mkdir(parents=True, exist_ok=True)

    @property
    def conf(self) -> Path:
        return self.where / "conf.d"

    @property
    def data(self) -> Path:
        return self.where / "data"

    @property
    def port(self) -> int:
        """Port of the listener `tcp`, else of the first that has one."""
        address = self.ready.get("tcp") or next(a for n, a in self.ready.items() if n != "control" and ":" in a)
        return int(address.rpartition(":")[2])

    @property
    def process(self) -> Process:
        if self._process is None:
            raise RuntimeError("the broker was not started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def pids(self) -> list[int]:
        """The broker and its worker processes."""
        found, queue = [], [self.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    queue += [int(child) for child in (task / "children").read_text().split()]
        return found

    def log(self) -> str:
        return self.process.log.read_text(errors="replace")

    def write(self, name: str, text: str) -> Path:
        """Put a fragment into `conf.d`; complete or not there at all."""
        path = self.conf / name
        draft = self.where / f"{name}.draft"
        draft.write_text(text)
        draft.rename(path)
        return path

    def environ(self) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment}

    def start(self, seconds: float = 20) -> Broker:
        """Run until the `ready` line is there; raises RuntimeError with the log otherwise."""
        out = self.where / "stdout"
        out.unlink(missing_ok=True)
        command = [*self.wrapper, *COMMAND, "run", "--conf", str(self.conf), "--data", str(self.data), *self.options]
        # stdout holds the one line and stays apart from the log
        shell = ["/bin/sh", "-c", 'out=$1; shift; exec "$@" >"$out"', "sh", str(out), *command]
        self._process = Process(shell, self.where / "log", env=self.environ(), cwd=self.where)
        self._process.wait_until(lambda: out.exists() and out.read_text().endswith("\n"), seconds, "isthmus run")
        words = out.read_text().split()
        if words[0] != "ready":
            raise RuntimeError(f"isthmus run printed {words} instead of its ready line")
        self.ready = dict(word.split("=", 1) for word in words[1:])
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 15) -> int:
        """End it and return its exit code."""
        return self.process.stop(how, seconds)

    def isthmus(
        self, *arguments: str, stdin: str | None = None, seconds: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with this broker's folders and return what it printed and its exit code."""
        return subprocess.run(
            [*COMMAND, *arguments, "--conf", str(self.conf), "--data", str(self.data)],
            input=stdin, capture_output=True, text=True, timeout=seconds * PATIENCE, env=self.environ(), cwd=self.where,
        )  # fmt: skip

    def reload(self) -> subprocess.CompletedProcess[str]:
        return self.isthmus("reload")

    def status(self) -> dict[str, Any]:
        done = self.isthmus("status", "--json")
        if done.returncode:
            raise RuntimeError(f"isthmus status: exit {done.returncode}: {done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def wait_for(self, room: str, name: str, state: str, seconds: float = 15) -> None:
        """Until `status` shows that instance in that state."""
        deadline = time.monotonic() + seconds * PATIENCE
        seen: Any = None
        while time.monotonic() < deadline:
            seen = self.status().get(room, {}).get(name)
            if seen and seen.get("state") == state:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{room}.{name} is {seen}, not {state}, after {seconds} s; log:\n{self.process.tail()}")


@contextlib.contextmanager
def broker(
    where: Path,
    fragments: Mapping[str, str] | None = None,
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    seconds: float = 20,
) -> Iterator[Broker]:
    """A running broker with these fragments; stopped at the end."""
    running = Broker(where, options, environment or {})
    for name, text in (fragments or {"00-broker.toml": BASE}).items():
        running.write(name, text)
    try:
        yield running.start(seconds)
    finally:
        if running._process is not None:
            running.stop()


@contextlib.contextmanager
def starting(where: Path, base: str) -> Iterator[Callable[..., Broker]]:
    """`start(a=…)`: a broker of 00-base.toml, which holds `base`, and of these; stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(**fragments: str) -> Broker:
            texts = {"00-base.toml": base, **{f"{name}.toml": text for name, text in fragments.items()}}
            return stack.enter_context(broker(where, texts))

        yield start
