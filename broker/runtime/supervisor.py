"""The broker's side of all workers: who runs what, how it goes, and who is kept from killing its neighbours."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from broker.config.settings import Instance
from broker.runtime import instance_log
from broker.runtime.assignment import Assignment
from broker.runtime.attach import Internal
from broker.runtime.host import Host
from broker.runtime.process import Death, Greeting, WorkerProcess
from broker.runtime.state import State
from broker.runtime.worker import DRAIN

_log = logging.getLogger(__name__)

_TOLERATED = 3  # deaths of a worker one instance may cause
_WITHIN = 60.0  # seconds
_COUNTED = ("acked", "retried", "dead")


class Supervisor:
    """Spreads instances over worker processes and keeps those alive; with ``processes=0`` runs them in this one.

    An instance stays in its worker as long as that exists. More than three deaths in a minute caused by one instance
    park that instance: its worker goes on without it, until `resume` or a change of its configuration.
    """

    def __init__(
        self,
        internal: Path,
        node: str,
        log_format: str = "text",
        log_level: str = "info",
        *,
        on_alarm: Callable[[str, str], None] = lambda key, text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._greeting = Greeting(f"unix://{Path(internal).absolute()}", node, log_format, log_level)
        self._on_alarm = on_alarm
        self._clock = clock
        self._assignments: dict[str, Assignment] = {}
        self._named: dict[str, str] = {}
        self._placed: dict[str, str] = {}
        self._workers: dict[str, WorkerProcess] = {}
        self._host: Host | None = None
        self._processes = 1
        self._paused: set[str] = set()
        self._parked: dict[str, str] = {}
        self._deaths: dict[str, deque[float]] = {}
        self._reports: dict[str, dict[str, Any]] = {}
        self._counted: dict[str, dict[str, int]] = {}  # by workers that are gone
        self._down: dict[str, str] = {}
        self._alarms: dict[str, str] = {}
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def apply(
        self,
        sinks: Mapping[str, Instance],
        bridges: Mapping[str, Instance],
        processes: int,
        base: Path | None = None,
    ) -> None:
        """Run exactly the enabled ones of these. What did not change is not touched: same process, same connections.

        ``base`` is the folder relative paths start at. Returns when what went is closed (bounded by seconds) and what
        came is on its way; a destination that does not answer never holds this up.
        """
        folder = Path.cwd() if base is None else base
        wanted: dict[str, Assignment] = {}
        named: dict[str, str] = {}
        for instance in (*sinks.values(), *bridges.values()):
            if instance.enabled:
                assignment = Assignment.of(instance, folder)
                wanted[assignment.key] = assignment
                named[assignment.key] = str(getattr(instance.config, "worker", "") or "")
        async with self._lock:
            for key in self._assignments.keys() | wanted.keys():
                if self._assignments.get(key) != wanted.get(key):
                    self._forget(key, gone=key not in wanted)
            self._assignments, self._named, self._processes = wanted, named, processes
            await self._spread()

    def status(self) -> dict[str, dict[str, dict[str, Any]]]:
        """``{"sinks": {name: {…}}, "bridges": {name: {…}}}``: state, last_error, counters, worker and its pid.

        Counters go on over restarts, short of what a killed worker had not told yet: it tells every second.
        """
        answer: dict[str, dict[str, dict[str, Any]]] = {"sinks": {}, "bridges": {}}
        inside = self._host.status() if self._host is not None else {}
        for key, assignment in self._assignments.items():
            worker = self._workers.get(self._placed.get(key, ""))
            entry: dict[str, Any] = {"state": State.CONNECTING.value, "last_error": None}
            entry.update(self._reports.get(key, {}))
            entry.update(inside.get(key, {}))
            for counter, before in self._counted.get(key, {}).items():
                entry[counter] = entry.get(counter, 0) + before
            if key in self._parked:
                entry.update(state=State.PARKED.value, last_error=self._parked[key])
            elif worker is not None and worker.name in self._down:
                entry.update(state=State.CONNECTING.value, last_error=self._down[worker.name])
            if key in self._paused and key not in self._parked:
                entry["state"] = State.PAUSED.value
            if key in self._alarms and entry["state"] != State.RUNNING:
                entry["alarm"] = self._alarms[key]
            entry["worker"] = worker.name if worker is not None else None if key in self._parked else "broker"
            entry["pid"] = worker.pid if worker is not None else None if key in self._parked else os.getpid()
            answer[assignment.room][assignment.name] = entry
        return answer

    def pids(self) -> dict[str, int | None]:
        """The worker processes by name."""
        return {name: worker.pid for name, worker in self._workers.items()}

    async def pause(self, name: str) -> None:
        """Hold an instance (``kafka`` or ``sinks.kafka``); its queue keeps what comes. LookupError: there is none."""
        key = self._key(name)
        self._paused.add(key)
        await self._order(key, "pause")

    async def resume(self, name: str) -> None:
        """Let an instance go on: paused, parked, or waiting for its next try. LookupError when there is none."""
        key = self._key(name)
        self._paused.discard(key)
        if key in self._parked:
            async with self._lock:
                self._forget(key)
                await self._spread()
        else:
            await self._order(key, "resume")

    async def close(self, drain: float = DRAIN) -> None:
        """Let every instance write what it received, for ``drain`` seconds at most, and end all workers."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        async with self._lock:
            inside = [self._host.close(drain)] if self._host is not None else []
            await asyncio.gather(*inside, *(worker.close(drain) for worker in self._workers.values()))
            self._host = None
            self._workers.clear()

    # placing

    async def _spread(self) -> None:
        """Give each instance its worker, moving as few as possible, and tell the workers that differ."""
        running = {key: a for key, a in self._assignments.items() if key not in self._parked}
        if self._processes <= 0:
            await self._retire(set())
            self._placed.clear()
            if self._host is None:
                instance_log.install()
                self._host = Host(Internal(self._greeting.internal), self._greeting.node, alarm=self._alarm)
            await self._host.apply(running.values(), self._paused)
            return
        if self._host is not None:
            host, self._host = self._host, None
            await host.close(DRAIN)
        self._place(running)
        loads = {name: {k: a for k, a in running.items() if self._placed[k] == name} for name in self._placed.values()}
        await self._retire(set(loads))
        # An instance that moves leaves its old worker before it enters the new one.
        shrinking = [n for n in loads if n in self._workers and self._workers[n].wanted.keys() - loads[n].keys()]
        for name in shrinking:
            kept = {k: a for k, a in loads[name].items() if k in self._workers[name].wanted}
            await self._workers[name].apply(kept, self._paused & kept.keys())
        await asyncio.gather(*(self._give(name, load) for name, load in loads.items()))

    def _place(self, running: Mapping[str, Assignment]) -> None:
        pool = [str(n) for n in range(1, self._processes + 1)]
        placed = {}
        for key in running:
            before = self._placed.get(key)
            own = self._named.get(key)
            if own:
                placed[key] = own
            elif before in pool:
                placed[key] = before
        for key in running:
            if key not in placed:
                placed[key] = min(pool, key=lambda name: (sum(p == name for p in placed.values()), int(name)))
        self._placed = placed

    async def _give(self, name: str, load: dict[str, Assignment]) -> None:
        paused = self._paused & load.keys()
        worker = self._workers.get(name)
        if worker is not None:
            await worker.apply(load, paused)
            return
        worker = WorkerProcess(name, self._greeting, on_message=self._on_message, on_death=self._on_death)
        self._workers[name] = worker
        await worker.apply(load, paused)
        worker.start()

    async def _retire(self, kept: set[str]) -> None:
        gone = [self._workers.pop(name) for name in list(self._workers) if name not in kept]
        await asyncio.gather(*(worker.close(DRAIN) for worker in gone))
        for worker in gone:
            self._down.pop(worker.name, None)

    # listening

    def _on_message(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        if "status" in message:
            self._down.pop(worker.name, None)
            for key, entry in message["status"].items():
                if self._placed.get(key) != worker.name:
                    continue  # on its way out of there
                self._reports[key] = entry
                if entry.get("state") == State.RUNNING:
                    self._alarms.pop(key, None)
        elif "alarm" in message:
            self._alarm(message["alarm"]["instance"], message["alarm"]["text"])

    def _on_death(self, worker: WorkerProcess, death: Death) -> None:
        self._down[worker.name] = f"its worker {death.reason} and is started again"
        for key in worker.wanted:
            self._keep_count(key)
        suspect = death.suspect
        if suspect is None or suspect not in self._assignments:
            return
        now = self._clock()
        deaths = self._deaths.setdefault(suspect, deque())
        deaths.append(now)
        while deaths[0] < now - _WITHIN:
            deaths.popleft()
        _log.error("%s was running when its worker %s (%d in the last minute)", suspect, death.reason, len(deaths))
        if len(deaths) > _TOLERATED:
            self._park(worker, suspect, death)

    def _park(self, worker: WorkerProcess, key: str, death: Death) -> None:
        text = f"parked: its worker {death.reason}, {_TOLERATED + 1} times within a minute; resume it or change it"
        self._parked[key] = text
        self._placed.pop(key, None)
        # The next process starts without it; `_spread` then only makes this the rule for the whole.
        worker.wanted = {k: a for k, a in worker.wanted.items() if k != key}
        self._alarm(key, text)
        task = asyncio.create_task(self._respread())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _respread(self) -> None:
        async with self._lock:
            if not self._closed:
                await self._spread()

    def _alarm(self, key: str, text: str) -> None:
        if self._alarms.get(key) != text:
            _log.error("alarm: %s: %s", key, text)
        self._alarms[key] = text
        self._on_alarm(key, text)

    # private

    def _keep_count(self, key: str) -> None:
        """What its runner has counted so far goes on counting when the next one starts at zero."""
        report = self._reports.pop(key, {})
        counted = self._counted.setdefault(key, {})
        for counter in _COUNTED:
            if isinstance(report.get(counter), int):
                counted[counter] = counted.get(counter, 0) + report[counter]

    def _forget(self, key: str, gone: bool = False) -> None:
        """A new start for an instance that changed, was resumed or went."""
        self._keep_count(key)
        for remembered in (self._parked, self._deaths, self._alarms):
            remembered.pop(key, None)
        if gone:
            self._counted.pop(key, None)
            self._paused.discard(key)
            self._placed.pop(key, None)

    async def _order(self, key: str, verb: str) -> None:
        if self._host is not None:
            await (self._host.pause(key) if verb == "pause" else self._host.resume(key))
            return
        worker = self._workers.get(self._placed.get(key, ""))
        if worker is not None:
            worker.paused = self._paused & worker.wanted.keys()
            worker.tell({verb: key})

    def _key(self, name: str) -> str:
        if name in self._assignments:
            return name
        found = [key for key, assignment in self._assignments.items() if assignment.name == name]
        if not found:
            raise LookupError(f"no sink or bridge is called {name!r}")
        if len(found) > 1:
            raise LookupError(f"{name!r} is both a sink and a bridge: say {' or '.join(found)}")
        return found[0]
