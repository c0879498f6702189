"""What an operator sees of each sink and bridge, and how it is held: state, queue, throughput, losses, last error."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from broker.admin.control import CommandFailed
from broker.engine.instances import RESERVED

_log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two looks at the counters."""
WINDOW = 10
"""Looks a throughput is the average of."""
QUIET = 60
"""Looks without a loss after which the next one is said again."""


class Throughput:
    """Messages a second of each instance, averaged over the last `WINDOW` looks at its counter."""

    def __init__(self) -> None:
        self._looks: dict[str, deque[tuple[float, int]]] = {}

    def look(self, now: float, counters: Mapping[str, int]) -> None:
        """One look at all counters, by name. One that fell was started anew: so is its average."""
        self._looks = {name: self._looks.get(name) or deque(maxlen=WINDOW + 1) for name in counters}
        for name, count in counters.items():
            looks = self._looks[name]
            if looks and looks[-1][1] > count:
                looks.clear()
            looks.append((now, count))

    def rate(self, name: str) -> float:
        """Messages a second; 0 for what has not been looked at twice."""
        looks = self._looks.get(name)
        if not looks or len(looks) < 2:
            return 0.0
        (since, before), (now, count) = looks[0], looks[-1]
        return round((count - before) / (now - since), 1)


class Losses:
    """Says in the log when the queue of an instance begins to lose or refuse messages, and how many it were."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._begun: dict[str, tuple[int, int]] = {}
        """How many were known when it began, and looks since the last one."""

    def look(self, counters: Mapping[str, int]) -> None:
        """One look at all counters, by name."""
        for name, count in counters.items():
            before = min(self._known.get(name, 0), count)
            since, quiet = self._begun.get(name, (before, QUIET))
            if count > before:
                if name not in self._begun:
                    _log.warning("%s: its queue is full, messages are dropped or refused; status counts them", name)
                self._begun[name] = since, 0
            elif quiet + 1 < QUIET:
                self._begun[name] = since, quiet + 1
            elif self._begun.pop(name, None):
                _log.warning("%s: %d messages were dropped or refused, none for a while", name, count - since)
        self._known = dict(counters)
        self._begun = {name: begun for name, begun in self._begun.items() if name in counters}


class Instances:
    """One method per command, for both rooms. `broker` is the application's `Broker`."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        self._throughput = Throughput()
        self._losses = Losses()
        asyncio.get_running_loop().call_later(EVERY, _look, weakref.ref(self))

    def status(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Every sink and bridge by room and name."""
        reports = self._broker.supervisor.status()
        return {
            room: {name: self._describe(room, name, report) for name, report in reports[room].items()}
            for room in ("sinks", "bridges")
        }

    def listing(self, room: str) -> list[dict[str, Any]]:
        """Those of one room, each with its name."""
        return [{"name": name, **entry} for name, entry in self.status()[room].items()]

    def show(self, room: str, name: str) -> dict[str, Any]:
        """One of them."""
        report = self._broker.supervisor.status()[room].get(name)
        if report is None:
            raise CommandFailed(f"no {room[:-1]} is called {name!r}")
        return {"name": name, **self._describe(room, name, report)}

    async def pause(self, room: str, name: str) -> dict[str, Any]:
        """Hand it no more messages; they queue."""
        self.show(room, name)
        await self._broker.supervisor.pause(f"{room}.{name}")
        return {"paused": name}

    async def resume(self, room: str, name: str) -> dict[str, Any]:
        """Let it go on."""
        self.show(room, name)
        await self._broker.supervisor.resume(f"{room}.{name}")
        return {"resumed": name}

    def look(self) -> None:
        """Remember how far everything is, for the throughput, and say what was lost."""
        reports = self._broker.supervisor.status()
        counters = {f"{room}.{name}": _count(report) for room in reports for name, report in reports[room].items()}
        self._throughput.look(time.monotonic(), counters)
        self._losses.look({f"{room}.{name}": self._lost(name) for room in reports for name in reports[room]})

    def _lost(self, name: str) -> int:
        """Messages the queues of an instance dropped or refused. Its lanes are found by name, as clients are many."""
        engine = self._broker.engine
        count = number = 0
        while (lane := engine.sessions.get(client_id := f"{RESERVED}{name}/{number}")) is not None:
            count += engine.core.refused.get(client_id, 0) + (lane.dropped or {}).get("queue_full", 0)
            number += 1
        return count

    def _describe(self, room: str, name: str, report: Mapping[str, Any]) -> dict[str, Any]:
        """What its worker tells, and what the broker knows of the sessions that feed it."""
        engine = self._broker.engine
        lanes = engine.instances.lanes(name)
        oldest = [t for t in (s.oldest_ms() for s in lanes) if t]
        letters = engine.sessions.get(f"{RESERVED}{name}/dlq")
        instance = getattr(self._broker.settings, room).get(name)  # None: a reload is about to end it
        losses = [report.get(key) for key in ("dropped", "dropped_in", "dropped_out")]
        return {
            **report,
            "queued": sum(s.queued for s in lanes),
            "queued_bytes": sum(s.queue_bytes for s in lanes),
            "oldest_s": round(max(0.0, time.time() - min(oldest) / 1000), 1) if oldest else 0.0,
            "per_second": self._throughput.rate(f"{room}.{name}"),
            "acked": sum(s.acked for s in lanes),
            "retried": sum(report.get(key, 0) for key in ("retried", "retried_in", "retried_out")),
            "dropped": merged([*losses, *(s.dropped for s in lanes)]),
            "refused": sum(engine.core.refused.get(s.client_id, 0) for s in lanes),
            "dead_letters": letters.queued if letters is not None else 0,
            "attached": all(s.channel is not None for s in lanes),
            "configured": instance.origin if instance is not None else None,
        }


def merged(counts: Iterable[Mapping[str, int] | None]) -> dict[str, int]:
    """Counts by reason, added up."""
    total: dict[str, int] = {}
    for one in counts:
        for reason, count in (one or {}).items():
            total[reason] = total.get(reason, 0) + count
    return total


def _count(report: Mapping[str, Any]) -> int:
    """What a worker says has crossed: stored by a sink, carried by a bridge in either direction. To look at the
    sessions themselves would take as long as there are clients."""
    return sum(report.get(key, 0) for key in ("acked", "messages_in", "messages_out"))


def _look(instances: weakref.ref[Instances]) -> None:
    """Look, and again in a while; ends with the broker whose instances these are."""
    there = instances()
    if there is not None:
        asyncio.get_running_loop().call_later(EVERY, _look, instances)
        there.look()
