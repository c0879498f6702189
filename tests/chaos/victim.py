"""The broker under fire: started, killed, started again; its worker likewise. Counts the kills it has seen succeed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker.admin import control
from tests.broker import Broker
from tests.servers import PATIENCE

_DIES_WITHIN = 10.0 * PATIENCE
_WORKER_LEAVES_WITHIN = 10.0 * PATIENCE
"""Seconds a worker may take to notice that its broker is gone and to finish the batch under way."""
_WORKER_RETURNS_WITHIN = 45.0 * PATIENCE  # the pause before a restart grows up to 30 s
_READY_WITHIN = 60.0
_EARLIEST, _LATEST = 0.02, 0.5  # seconds into a start at which it is killed


class NoAnswer(Exception):
    """The broker did not answer a command."""


class Victim:
    """One broker on one folder and one port."""

    def __init__(self, broker: Broker, note: Callable[[str], None]) -> None:
        self.broker = broker
        self.kills: Counter[str] = Counter()
        """`broker`, `starting broker`, `worker`: seen to have died by our SIGKILL."""
        self.kill_times: list[float] = []
        """Milliseconds since 1970."""
        self.slowest_ready = 0.0
        self.left_behind: list[str] = []
        self._note = note
        self._orphans: dict[tuple[int, str], float] = {}

    async def start(self) -> None:
        """Until the `ready` line; raises RuntimeError with the end of the log."""
        began = time.monotonic()
        await asyncio.to_thread(self.broker.start, _READY_WITHIN)
        self.slowest_ready = max(self.slowest_ready, time.monotonic() - began)
        self._note("ready")

    async def start_and_kill(self, chance: random.Random) -> None:
        """Kill it while it starts."""
        before = self.broker._process
        start = asyncio.create_task(asyncio.to_thread(self.broker.start, _READY_WITHIN))
        await _until(lambda: self.broker._process is not before, "the process of a starting broker", _DIES_WITHIN)
        await asyncio.sleep(chance.uniform(_EARLIEST, _LATEST))
        await self._kill_process("starting broker")
        with contextlib.suppress(RuntimeError):  # it says that the process has ended: we have seen to that
            await start

    async def kill_broker(self) -> None:
        await self._kill_process("broker")

    async def kill_worker(self) -> bool:
        """Kill a worker, the next one when there is none at the moment; False when none comes."""
        try:
            await _until(self._workers, "a worker", _WORKER_RETURNS_WITHIN)
        except TimeoutError:
            return False
        pid, born = self._workers()[0]
        os.kill(pid, signal.SIGKILL)
        self._seen("worker")
        await _until(lambda: _born(pid) != born, f"the end of worker {pid}", _DIES_WITHIN)
        self.kills["worker"] += 1
        return True

    async def close(self) -> None:
        """Stop the broker, and look for workers that it leaves."""
        if self.broker._process is not None:
            self._remember_workers()
            await asyncio.to_thread(self.broker.stop)
        while self._orphans:
            self.look_for_orphans()
            await asyncio.sleep(0.05)

    def look_for_orphans(self) -> None:
        """Enter into `left_behind` workers that live although their time is over; those are ended."""
        now = time.monotonic()
        for (pid, born), deadline in list(self._orphans.items()):
            if _born(pid) != born:
                del self._orphans[pid, born]
            elif now > deadline:
                del self._orphans[pid, born]
                self.left_behind.append(f"worker {pid} lived {_WORKER_LEAVES_WITHIN:.0f} s longer than its broker")
                os.kill(pid, signal.SIGKILL)

    async def ask(self, command: str, **arguments: Any) -> Any:
        """A command over the control socket. Raises NoAnswer when the broker is not there or goes away meanwhile."""
        path = self.broker.data / "control.sock"
        try:
            return await asyncio.to_thread(control.request, path, command, timeout=10.0, **arguments)
        except (OSError, ValueError, control.NotRunning, control.CommandFailed) as error:
            raise NoAnswer(f"{command}: {error}") from error

    def defects(self) -> list[str]:
        """Each log line of broker or workers behind which a traceback stands: nobody expected that error."""
        lines = self.broker.log().splitlines()
        return [above for above, line in itertools.pairwise(lines) if line.startswith("Traceback (most recent")]

    async def _kill_process(self, what: str) -> None:
        self._remember_workers()
        process = self.broker.process.popen
        process.send_signal(signal.SIGKILL)
        self._seen(what)
        code = await asyncio.to_thread(process.wait, _DIES_WITHIN)
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the broker had ended by itself with {code}:\n{self.broker.process.tail()}")
        self.kills[what] += 1

    def _seen(self, what: str) -> None:
        now = time.time() * 1000
        self.kill_times.append(now)
        self._note(f"kill\t{what}\t{now:.0f}")

    def _remember_workers(self) -> None:
        deadline = time.monotonic() + _WORKER_LEAVES_WITHIN
        self._orphans.update({worker: deadline for worker in self._workers()})

    def _workers(self) -> list[tuple[int, str]]:
        """Process id and time of birth of each child."""
        return [(pid, born) for pid in self.broker.pids()[1:] if (born := _born(pid))]


def reserve_port() -> socket.socket:
    """A port of 127.0.0.1 for a listener that is gone at times: while this socket is open the kernel gives the port to
    no outgoing connection, which could otherwise even connect to itself, and a listener with SO_REUSEADDR may bind it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _born(pid: int) -> str:
    """When the process began, which tells it from a later one of the same id; empty when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


async def _until(there: Callable[[], Any], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not there after {seconds:.0f} s")
        await asyncio.sleep(0.005)
