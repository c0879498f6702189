"""Runs sink and bridge instances in one event loop: in a worker process, or in the broker itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from broker.config.settings import restore
from broker.extend.bridge import BridgeConfig
from broker.extend.registry import MissingDriver, UnknownKind
from broker.extend.sink import SinkConfig
from broker.runtime.assignment import Assignment
from broker.runtime.attach import Attach
from broker.runtime.bridge_runner import BridgeRunner
from broker.runtime.busy import Marker
from broker.runtime.sink_runner import SinkRunner
from broker.runtime.state import State

_log = logging.getLogger(__name__)

_CHANGE_WITHIN = 5.0
_CHANGE_DRAIN = 2.0


class _Unrunnable:
    """Stands where an instance would run that cannot: keeps saying why."""

    def __init__(self, error: str) -> None:
        self._error = error

    def resume(self) -> None:
        """Only a changed configuration helps."""

    async def close(self, drain: float) -> None:
        """There is nothing to close."""

    def status(self) -> dict[str, Any]:
        return {"state": State.FATAL.value, "last_error": self._error}


Runner = SinkRunner | BridgeRunner | _Unrunnable


class Host:
    """Owns the instances it is given. `apply` changes only what differs; instances never disturb each other."""

    def __init__(
        self,
        attach: Attach,
        node: str,
        *,
        changed: Callable[[], None] = lambda: None,
        alarm: Callable[[str, str], None] = lambda key, text: None,
        marker: Callable[[str], Marker] = lambda key: Marker(),
    ) -> None:
        self._attach = attach
        self._node = node
        self._changed = changed
        self._alarm = alarm
        self._marker = marker
        self._assigned: dict[str, Assignment] = {}
        self._runners: dict[str, Runner] = {}
        self._lock = asyncio.Lock()

    async def apply(self, assignments: Iterable[Assignment], paused: Iterable[str] = ()) -> None:
        """Run exactly these. Returns when what went is closed (bounded) and what came is started, not yet connected."""
        async with self._lock:
            wanted = {a.key: a for a in assignments}
            held = set(paused)
            gone = [key for key, old in self._assigned.items() if wanted.get(key) != old]
            await asyncio.gather(*(self._remove(key, _CHANGE_DRAIN, _CHANGE_WITHIN) for key in gone))
            for key, assignment in wanted.items():
                if key not in self._assigned:
                    self._assigned[key] = assignment
                    self._runners[key] = self._start(assignment, key in held)
        self._changed()

    async def pause(self, key: str) -> None:
        """Hold one instance; LookupError when it is not here."""
        runner = self._runners[key]
        if isinstance(runner, SinkRunner):
            runner.pause()
        elif isinstance(runner, BridgeRunner):
            await runner.pause()

    async def resume(self, key: str) -> None:
        """Let one instance go on, or try again at once; LookupError when it is not here."""
        self._runners[key].resume()

    def status(self) -> dict[str, dict[str, Any]]:
        """By key, ``sinks.kafka``: what each instance says about itself."""
        return {key: runner.status() for key, runner in self._runners.items()}

    async def close(self, drain: float) -> None:
        """Write what was received for ``drain`` seconds at most, then close everything."""
        async with self._lock:
            await asyncio.gather(*(self._remove(key, drain, drain + _CHANGE_WITHIN) for key in list(self._assigned)))

    def _start(self, assignment: Assignment, paused: bool) -> Runner:
        def alarm(text: str) -> None:
            self._alarm(assignment.key, text)

        try:
            instance = restore(assignment.room, assignment.name, assignment.raw, Path(assignment.base))
        except (MissingDriver, UnknownKind, ValidationError, ValueError, TypeError, ImportError) as error:
            text = _explain(error)
            _log.error("%s cannot run: %s", assignment.key, text)
            alarm(text)
            return _Unrunnable(text)
        backend, config = instance.backend, instance.config
        marker, lanes = self._marker(assignment.key), assignment.lanes
        runner: SinkRunner | BridgeRunner
        if isinstance(config, SinkConfig):
            runner = SinkRunner(
                backend,
                config,
                self._attach,
                lanes=assignment.share or range(max(lanes, config.lanes)),
                marker=marker,
                changed=self._changed,
                alarm=alarm,
            )
        elif isinstance(config, BridgeConfig):
            runner = BridgeRunner(
                backend, config, self._attach, self._node, lanes=lanes, marker=marker, changed=self._changed
            )
        else:
            return _Unrunnable(f"{assignment.room}.{assignment.kind} is neither a sink nor a bridge")
        runner.start(paused)
        return runner

    async def _remove(self, key: str, drain: float, within: float) -> None:
        del self._assigned[key]
        runner = self._runners.pop(key)
        try:
            async with asyncio.timeout(within):
                await runner.close(drain)
        except TimeoutError:
            _log.warning("%s did not close within %.0f s and is left behind; its queue keeps what is open", key, within)
        except Exception:
            _log.exception("%s failed while it was closed; its queue keeps what is open", key)


def _explain(error: Exception) -> str:
    """Why an instance cannot run, without the values it was given: a secret may be among them."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
    return str(error)
