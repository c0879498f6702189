"""Runs one bridge instance: hands it the broker's side, starts it again when either side is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from broker.client.connection import Connection, Handler
from broker.extend.bridge import Bridge, BridgeConfig
from broker.extend.registry import Backend
from broker.runtime.attach import Attach
from broker.runtime.backoff import Backoff
from broker.runtime.busy import Marker
from broker.runtime.instance_log import speak_for
from broker.runtime.state import Describer, State

_log = logging.getLogger(__name__)

_OPEN_WITHIN = 60.0
_CLOSE_WITHIN = 5.0
_BASE, _CAP = 1.0, 30.0
_STATES = {"connected": State.RUNNING, "connecting": State.CONNECTING, "down": State.RETRYING}


class BridgeRunner:
    """One bridge, and the `extend.bridge.Local` it sees. `start` once, `close` once; `pause` and `resume` between."""

    def __init__(
        self,
        backend: Backend,
        config: BridgeConfig,
        attach: Attach,
        node: str,
        *,
        lanes: int = 0,
        marker: Marker | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = config.name
        self.node = node
        """The broker's node name."""
        self.lanes = lanes
        """The lanes the broker has for it: more than configured when some of a time before still hold messages."""
        self.echoes = not attach.trusted
        """Whether the broker gives the bridge back what it published: only our own knows better."""
        self._backend = backend
        self._config = config
        self._attach = attach
        self._marker = marker or Marker()
        self._changed = changed
        self._describe = Describer(config)
        self._spec = config.session()
        self._state: State = State.CONNECTING
        self._error: str | None = None
        self._counters: dict[str, Any] = {}
        self._connections: list[Connection] = []
        self._running_since: float | None = None
        self._paused = False
        self._kick = asyncio.Event()
        self._bridge: Bridge | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, paused: bool = False) -> None:
        """Open and run the bridge; returns at once."""
        self._paused = paused
        if not paused:
            self._task = asyncio.create_task(self._run(), name=f"bridges.{self.name}")

    async def pause(self) -> None:
        """Leave both sides; the broker's queue keeps what comes."""
        self._paused = True
        await self._stop()
        self._changed()

    def resume(self) -> None:
        """Run again, at once also where the next try would have come later."""
        self._paused = False
        if self._task is None:
            self.start()
        self._kick.set()
        self._changed()

    async def close(self, drain: float) -> None:
        """Leave both sides. A bridge holds nothing that could be drained."""
        await self._stop()
        if self._bridge is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_WITHIN):
                    await self._bridge.close()

    def status(self) -> dict[str, Any]:
        """Plain values: state, last_error and the bridge's own counters."""
        state = State.PAUSED if self._paused else self._state
        return {"state": state.value, "last_error": self._error, **self._counters}

    # extend.bridge.Local

    async def receive(self, handler: Handler, lane: int = 0) -> Connection:
        """See `extend.bridge.Local`."""
        return await self._connect(str(lane), handler)

    async def publish(self, handler: Handler) -> Connection:
        """See `extend.bridge.Local`."""
        return await self._connect("in", handler)

    def report(self, **status: Any) -> None:
        """See `extend.bridge.Local`."""
        before = (self._state, self._error)
        word = status.pop("state", None)
        if word is not None:
            self._state = _STATES.get(str(word), self._state)
            if self._state is State.RUNNING:
                self._error = None
                self._kick.clear()
                if self._running_since is None:
                    self._running_since = asyncio.get_running_loop().time()
        if "last_error" in status:
            error = status.pop("last_error")
            self._error = None if error is None else self._describe(error)
        self._counters.update(status)
        if before != (self._state, self._error):
            self._changed()

    # private

    async def _connect(self, part: str, handler: Handler) -> Connection:
        conn = await self._attach(self.name, part, handler, self._spec)
        self._connections = [c for c in self._connections if c.open]
        self._connections.append(conn)
        return conn

    async def _run(self) -> None:
        speak_for(f"bridges.{self.name}")
        loop = asyncio.get_running_loop()
        base, cap = self._restart_times()
        wait = Backoff(base, cap)
        while True:
            self._running_since = None
            try:
                await self._run_once()
                error: Exception = ConnectionError("the bridge ended by itself")
            except (OSError, TimeoutError) as lost:
                error = lost
            except Exception as defect:
                _log.exception("the bridge failed for a reason it does not know")
                error = defect
            finally:
                for conn in self._connections:
                    conn.abort()
                self._connections.clear()
            if self._running_since is not None and loop.time() - self._running_since >= base:
                wait.reset()  # it did connect: only a peer that drops us at once makes us wait longer and longer
            pause = wait.next()
            text = self._describe(error)
            _log.warning("the bridge is down, it starts again in %.1f s: %s", pause, text)
            self.report(state="down", last_error=text)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._kick.wait()
            self._kick.clear()

    async def _run_once(self) -> None:
        if self._bridge is None:
            async with asyncio.timeout(_OPEN_WITHIN):
                with self._marker:
                    self._bridge = await self._backend.open(self._config)
        await self._bridge.run(self)

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_WITHIN):
                    await asyncio.gather(task, return_exceptions=True)

    def _restart_times(self) -> tuple[float, float]:
        """The bridge's own ``restart = { base, cap }``, where it has one."""
        restart = getattr(self._config, "restart", None)
        base = float(getattr(restart, "base", _BASE)) or _BASE
        return base, max(base, float(getattr(restart, "cap", _CAP)))
