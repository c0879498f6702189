"""One worker process as the broker sees it: started, told what to run, listened to, started again when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.runtime.assignment import Assignment
from broker.runtime.backoff import Backoff
from broker.runtime.busy import SLOTS, BusyPage
from broker.runtime.channel import Channel

_log = logging.getLogger(__name__)

_APPLY_WITHIN = 8.0
_EXIT_WITHIN = 5.0
_SILENT = 60.0  # a worker reports every second; one that has not for so long hangs in a driver's code
_STEADY = 1.0  # a worker that reported and then lived so long may be started again at once
_HOME = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Greeting:
    """What every worker is told before anything else."""

    internal: str
    """Address of the internal listener."""
    node: str
    log_format: str
    log_level: str


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended without being asked to."""

    reason: str
    suspect: str | None
    """Key of the instance whose code it was in, when that is what killed it."""


class WorkerProcess:
    """Keeps one worker alive until `close`."""

    def __init__(
        self,
        name: str,
        greeting: Greeting,
        *,
        on_message: Callable[[WorkerProcess, dict[str, Any]], None],
        on_death: Callable[[WorkerProcess, Death], None],
        silent: float = _SILENT,
    ) -> None:
        self.name = name
        self.pid: int | None = None
        """Of the process that runs now; None between two."""
        self.restarts = 0
        self.wanted: dict[str, Assignment] = {}
        self.paused: set[str] = set()
        self._greeting = greeting
        self._on_message = on_message
        self._on_death = on_death
        self._silent = silent
        self._channel: Channel | None = None
        self._page = BusyPage.create()
        self._slots: dict[str, int] = {}
        self._number = 0
        self._applied = asyncio.Condition()
        self._applied_number = 0
        self._closing = False
        self._end = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process and keep it; returns at once."""
        self._task = asyncio.create_task(self._live(), name=f"worker {self.name}")

    async def apply(self, wanted: dict[str, Assignment], paused: set[str]) -> None:
        """Run exactly these; returns when the worker has let go of what went (bounded), at once while it is down."""
        unchanged = wanted == self.wanted and paused == self.paused
        self.wanted, self.paused = wanted, paused
        channel = self._channel
        if unchanged or channel is None:
            return
        number = self._send_apply(channel)
        with suppress(TimeoutError):
            async with asyncio.timeout(_APPLY_WITHIN), self._applied:
                await self._applied.wait_for(lambda: self._applied_number >= number or self._channel is not channel)

    def tell(self, message: dict[str, Any]) -> None:
        """Send one order, if the worker lives."""
        if self._channel is not None:
            self._channel.send(message)

    async def close(self, drain: float) -> None:
        """Let it write what it received for ``drain`` seconds at most, then see that it is gone."""
        self._closing = True
        self._end.set()
        self.tell({"stop": drain})
        if self._task is not None:
            try:
                _, pending = await asyncio.wait((self._task,), timeout=drain + _EXIT_WITHIN)
            except asyncio.CancelledError:  # the broker's own stop is over
                self._kill()
                raise
            if pending:
                _log.warning("worker %s does not leave, it is killed; queues keep what is open", self.name)
                self._kill()
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
        self._page.close()

    # private

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        wait = Backoff(0.2, 30.0)
        deaths = 0
        while not self._closing:
            began = loop.time()
            try:
                reason, suspect, reported = await self._live_once()
            except OSError as error:
                reason, suspect, reported = f"cannot be started: {error}", None, False
            if self._closing:
                return
            self._on_death(self, Death(reason, suspect))
            if reported and loop.time() - began > _STEADY:
                wait.reset()
                deaths = 0
            pause = wait.next() if deaths else 0.0  # the first time at once
            deaths += 1
            self.restarts += 1
            _log.error("worker %s %s; it starts again in %.1f s", self.name, reason, pause)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._end.wait()

    async def _live_once(self) -> tuple[str, str | None, bool]:
        """From start to end: why it ended, the suspect, whether it ever reported."""
        ours, theirs = socket.socketpair()
        self._page.clear()
        kills = _out_of_memory_kills()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "broker.runtime.worker", str(theirs.fileno()), str(self._page.fileno),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # standard output belongs to the broker's one line
                pass_fds=(theirs.fileno(), self._page.fileno),
                env=_environment(),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = process.pid
        hung = reported = False
        channel = await Channel.over(ours)
        try:
            greeting = self._greeting
            channel.send(
                {
                    "hello": {
                        "internal": greeting.internal,
                        "node": greeting.node,
                        "log_format": greeting.log_format,
                        "log_level": greeting.log_level,
                    }
                }
            )
            self._channel = channel
            if self._closing:
                channel.send({"stop": 0})
            self._send_apply(channel)
            reported, hung = await self._listen(channel)
        finally:
            self._channel = None
            async with self._applied:
                self._applied.notify_all()
            if hung:
                self._kill()
            try:
                code = await asyncio.wait_for(process.wait(), _EXIT_WITHIN)
            except (TimeoutError, asyncio.CancelledError):
                with suppress(ProcessLookupError):
                    process.kill()
                code = await process.wait()
            self.pid = None
            channel.close()
        if hung:
            return f"was silent for {self._silent:.0f} s and killed", self._suspect(), reported
        outside = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) and _out_of_memory_kills() == kills
        return _describe_exit(code), None if outside or code == 0 else self._suspect(), reported

    async def _listen(self, channel: Channel) -> tuple[bool, bool]:
        """Until the worker's end of the channel closes: (it reported, it hangs)."""
        reported = False
        while True:
            try:
                async with asyncio.timeout(self._silent):
                    message = await channel.receive()
            except TimeoutError:
                return reported, True
            if message is None:
                return reported, False
            if "applied" in message:
                async with self._applied:
                    self._applied_number = max(self._applied_number, int(message["applied"]))
                    self._applied.notify_all()
            else:
                reported = reported or "status" in message
                self._on_message(self, message)

    def _send_apply(self, channel: Channel) -> int:
        self._number += 1
        self._slots = {key: slot for key, slot in self._slots.items() if key in self.wanted}
        free = (slot for slot in range(SLOTS) if slot not in set(self._slots.values()))
        for key in self.wanted:
            if key not in self._slots:
                self._slots[key] = next(free, -1)
        channel.send(
            {
                "apply": {
                    "number": self._number,
                    "instances": {key: assignment.to_json() for key, assignment in self.wanted.items()},
                    "slots": self._slots,
                    "paused": sorted(self.paused),
                }
            }
        )
        return self._number

    def _suspect(self) -> str | None:
        if len(self.wanted) == 1:
            return next(iter(self.wanted))
        slot = self._page.last()
        return next((key for key, owned in self._slots.items() if owned == slot), None)

    def _kill(self) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """Ours, so that the worker imports the same ``broker``, also when that lies beside the current folder."""
    environment = dict(os.environ)
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if _HOME not in installed:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{_HOME}{os.pathsep}{before}" if before else str(_HOME)
    return environment


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended by itself with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _out_of_memory_kills() -> int:
    """How many processes this machine's kernel has killed for want of memory; 0 where it does not say."""
    with suppress(OSError, ValueError), open("/proc/vmstat", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
