"""Programs started as children and found on this machine; what is said when a server cannot be had."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tests.clock import clock

CACHE = Path(os.environ.get("ISTHMUS_TEST_CACHE", "~/.cache/isthmus-tests")).expanduser()
"""What is fetched or made once is kept here."""
PATIENCE = float(os.environ.get("ISTHMUS_TEST_PATIENCE", "1"))
"""Every start timeout is multiplied by this; a loaded machine may want 4."""


class Absent(Exception):
    """The service can neither be found nor started here; the message says why and what to do."""


class NotOurs(Absent):
    """The server was given by address: it cannot be stopped or configured by a test."""


def required() -> set[str]:
    """The services whose absence is a failure: REQUIRE=slapd,kafka."""
    return {name.strip() for name in os.environ.get("REQUIRE", "").split(",") if name.strip()}


_given: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago; never the same one twice."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port: int = s.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


def _die_with_parent() -> None:
    """In the child: a killed test run leaves nothing behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Process:
    """A child whose output goes to a file; stopped by its own pid and nothing else."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ):
        self.command = [str(c) for c in command]
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_until(self, answers: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll `answers` until it says yes; raises RuntimeError with the end of the log when the process dies first."""
        deadline = clock() + seconds * PATIENCE
        while True:
            if answers():
                return
            if self.popen.poll() is not None:
                raise RuntimeError(f"{what} ended with {self.popen.returncode}:\n{self.tail()}")
            if clock() > deadline:
                self.stop()
                raise RuntimeError(f"{what} did not answer within {seconds * PATIENCE:.0f} s:\n{self.tail()}")
            time.sleep(0.01)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 15) -> int:
        """Send the signal, wait, kill if it does not end; returns the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(how)
            try:
                self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait(10)
        return self.popen.returncode

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP; returns when each of its threads stands still."""
        self.popen.send_signal(signal.SIGSTOP)
        deadline = clock() + 5 * PATIENCE
        while _runs(self.pid):
            if clock() > deadline:
                raise RuntimeError(f"process {self.pid} was stopped and runs on")
            time.sleep(0.001)


def _runs(pid: int) -> bool:
    """Whether a thread of it is neither stopped nor gone; only Linux tells."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if thread.read_text().rpartition(") ")[2][0] not in "TtZX":
                return True
    return False


@dataclass(kw_only=True)
class Server:
    """A server whose process is ours, or one that was given by address and cannot be touched: `_process` is None."""

    what: ClassVar[str]
    """What it is called when it does not start."""
    _command: list[str] = field(default_factory=list)
    _log: Path = Path()
    _process: Process | None = None

    def answers(self) -> bool:
        """Whether it has finished starting."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        return self._ours().pid

    def log(self) -> str:
        """Everything it printed so far."""
        self._ours()
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """End it; the data stays and `start` brings it back on the same port."""
        self._ours().stop()

    def kill(self) -> None:
        """End it without a warning."""
        self._ours().kill()

    def start(self) -> None:
        """Bring it back."""
        self._ours()
        self._launch()

    def freeze(self) -> None:
        """Accept connections but never answer, until `thaw`."""
        self._ours().freeze()

    def thaw(self) -> None:
        os.kill(self._ours().pid, signal.SIGCONT)

    def _ours(self) -> Process:
        if self._process is None:
            raise NotOurs(f"this {self.what} was not started by the tests and cannot be stopped or configured")
        return self._process

    def _launch(self) -> None:
        self._process = Process(self._command, self._log)
        self._process.wait_until(self.answers, 10, self.what)

    @contextlib.contextmanager
    def _running(self, command: Sequence[str], log: Path) -> Iterator[None]:
        """Started from ``command``, and ended whatever state a test left it in."""
        self._command, self._log = list(command), log
        try:
            self._launch()
            yield
        finally:
            if self._process is not None:
                if self._process.popen.poll() is None:
                    self.thaw()
                self._process.stop()


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens there."""
    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex((host, port)) == 0


def program(name: str) -> str | None:
    """Path of a program, also where an ordinary user's PATH does not look."""
    folders = [os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"]
    folders += sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return shutil.which(name, path=":".join(folders))


@contextlib.contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """A temporary folder, removed whatever happens."""
    path = Path(tempfile.mkdtemp(prefix=f"isthmus-{prefix}-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
