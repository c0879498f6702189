"""The broker's side of all workers: who runs what, how it goes, and who is kept from killing its neighbours."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.config.settings import Instance
from broker.extend.sink import SinkConfig
from broker.runtime import instance_log
from broker.runtime.assignment import Assignment
from broker.runtime.attach import Internal
from broker.runtime.host import Host
from broker.runtime.process import Death, Greeting, WorkerProcess
from broker.runtime.state import State, added, joined
from broker.runtime.worker import DRAIN

_log = logging.getLogger(__name__)

_TOLERATED = 3  # deaths of a worker one instance may cause
_WITHIN = 60.0  # seconds
_COUNTED = ("acked", "retried", "retries", "dead")


class Supervisor:
    """Spreads instances over worker processes and keeps those alive; with ``processes=0`` runs them in this one.

    An instance stays in its worker as long as that exists; a sink of several lanes is spread over several workers. More
    than three deaths in a minute caused by one instance park that instance: its worker goes on without it, until
    `resume` or a change of its configuration.
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
        self._lanes: dict[str, int] = {}  # of what may be spread over several workers
        self._placed: dict[str, dict[str, tuple[int, ...]]] = {}
        """By key: the workers that have it and, where there are several, the lanes of each."""
        self._workers: dict[str, WorkerProcess] = {}
        self._host: Host | None = None
        self._processes = 1
        self._paused: set[str] = set()
        self._parked: dict[str, str] = {}
        self._deaths: dict[str, deque[float]] = {}
        self._reports: dict[str, dict[str, dict[str, Any]]] = {}  # by key and worker
        self._counted: dict[str, dict[str, Any]] = {}  # by workers that are gone
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
        lanes: Mapping[str, int] | None = None,
    ) -> None:
        """Run exactly the enabled ones of these. What did not change is not touched: same process, same connections.

        ``base`` is the folder relative paths start at, ``lanes`` how many each has in the broker. Returns when what
        went is closed (bounded by seconds) and what came is on its way; a destination that does not answer never holds
        this up.
        """
        folder = Path.cwd() if base is None else base
        wanted: dict[str, Assignment] = {}
        named: dict[str, str] = {}
        spread: dict[str, int] = {}
        for instance in (*sinks.values(), *bridges.values()):
            if instance.enabled:
                assignment = Assignment.of(instance, folder, (lanes or {}).get(instance.name, 0))
                wanted[assignment.key] = assignment
                named[assignment.key] = str(getattr(instance.config, "worker", "") or "")
                if isinstance(instance.config, SinkConfig) and not instance.backend.one_process:
                    spread[assignment.key] = max(assignment.lanes, instance.config.lanes)
        async with self._lock:
            for key in self._assignments.keys() | wanted.keys():
                if self._assignments.get(key) != wanted.get(key):
                    self._forget(key, gone=key not in wanted)
            self._assignments, self._named, self._lanes, self._processes = wanted, named, spread, processes
            await self._spread()

    def status(self) -> dict[str, dict[str, dict[str, Any]]]:
        """``{"sinks": {name: {…}}, "bridges": {name: {…}}}``: state, last_error, counters, worker and its pid.

        Counters go on over restarts, short of what a killed worker had not told yet: it tells every second.
        """
        answer: dict[str, dict[str, dict[str, Any]]] = {"sinks": {}, "bridges": {}}
        inside = self._host.status() if self._host is not None else {}
        for key, assignment in self._assignments.items():
            workers = self._workers_of(key)
            entry: dict[str, Any] = {"state": State.CONNECTING.value, "last_error": None}
            reports = self._reports.get(key, {})
            if reports:
                missing = [{"state": State.CONNECTING.value} for worker in workers if worker.name not in reports]
                entry.update(joined([*reports.values(), *missing]))
            entry.update(inside.get(key, {}))
            before = self._counted.get(key, {})
            entry.update(added(({counter: entry.get(counter) for counter in before}, before)))
            if key in self._parked:
                entry.update(state=State.PARKED.value, last_error=self._parked[key])
            elif down := [self._down[worker.name] for worker in workers if worker.name in self._down]:
                entry.update(state=State.CONNECTING.value, last_error=down[0])
            if key in self._paused and key not in self._parked:
                entry["state"] = State.PAUSED.value
            if key in self._alarms and entry["state"] != State.RUNNING:
                entry["alarm"] = self._alarms[key]
            nowhere = key in self._parked
            entry["worker"] = ",".join(w.name for w in workers) or (None if nowhere else "broker")
            pids = [worker.pid for worker in workers] or [None if nowhere else os.getpid()]
            entry["pid"] = pids if len(pids) > 1 else pids[0]
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
        loads: dict[str, dict[str, Assignment]] = {}
        for key, assignment in running.items():
            for name, share in self._placed[key].items():
                loads.setdefault(name, {})[key] = replace(assignment, share=share)
        await self._retire(set(loads))
        # An instance, or a lane, that moves leaves its old worker before it enters the new one.
        for name in loads.keys() & self._workers.keys():
            before, load = self._workers[name].wanted, loads[name]
            kept = {k: a for k, a in load.items() if k in before and before[k].share == a.share}
            if before.keys() - kept.keys():
                await self._workers[name].apply(kept, self._paused & kept.keys())
        await asyncio.gather(*(self._give(name, load) for name, load in loads.items()))

    def _place(self, running: Mapping[str, Assignment]) -> None:
        pool = [str(n) for n in range(1, self._processes + 1)]
        placed: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in running:
            before = self._placed.get(key, {})
            own = self._named.get(key)
            if own:
                placed[key] = {own: ()}
            elif before and before.keys() <= set(pool) and len(before) == self._width(key):
                placed[key] = self._dealt(key, list(before))
        for key in running:
            if key not in placed:
                loads = {name: sum(name in workers for workers in placed.values()) for name in pool}
                placed[key] = self._dealt(key, sorted(pool, key=lambda name: loads[name])[: self._width(key)])
        self._placed = placed
        for key, reports in self._reports.items():
            for name in reports.keys() - placed.get(key, {}).keys():
                self._keep_count(key, name)

    def _width(self, key: str) -> int:
        """Over how many workers it is spread."""
        return min(self._processes, max(1, self._lanes.get(key, 1)))

    def _dealt(self, key: str, names: list[str]) -> dict[str, tuple[int, ...]]:
        """The lanes of each of these workers; one alone has them all."""
        if len(names) == 1:
            return {names[0]: ()}
        lanes = range(self._lanes[key])
        return {name: tuple(lanes[number :: len(names)]) for number, name in enumerate(names)}

    def _workers_of(self, key: str) -> list[WorkerProcess]:
        return [self._workers[name] for name in self._placed.get(key, {}) if name in self._workers]

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
                if worker.name not in self._placed.get(key, {}):
                    continue  # on its way out of there
                self._reports.setdefault(key, {})[worker.name] = entry
                if entry.get("state") == State.RUNNING:
                    self._alarms.pop(key, None)
        elif "alarm" in message:
            self._alarm(message["alarm"]["instance"], message["alarm"]["text"])

    def _on_death(self, worker: WorkerProcess, death: Death) -> None:
        self._down[worker.name] = f"its worker {death.reason} and is started again"
        for key in worker.wanted:
            self._keep_count(key, worker.name)
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

    def _keep_count(self, key: str, worker: str) -> None:
        """What its runner there has counted so far goes on counting when the next one starts at zero."""
        report = self._reports.get(key, {}).pop(worker, {})
        said = {counter: report[counter] for counter in _COUNTED if counter in report}
        self._counted[key] = added((self._counted.get(key, {}), said))

    def _forget(self, key: str, gone: bool = False) -> None:
        """A new start for an instance that changed, was resumed or went."""
        for worker in list(self._reports.get(key, {})):
            self._keep_count(key, worker)
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
        for worker in self._workers_of(key):
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
