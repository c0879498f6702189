"""Runs one sink instance: opens it, gives it its lanes, tells how it goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from broker.client.connection import Connection, Handler
from broker.extend.idempotency import compile_key
from broker.extend.registry import Backend
from broker.extend.sink import Fatal, Sink, SinkConfig
from broker.runtime.attach import Attach
from broker.runtime.backoff import FullJitter
from broker.runtime.busy import Marker
from broker.runtime.dead_letters import DeadLetters
from broker.runtime.instance_log import speak_for
from broker.runtime.lane import Lane
from broker.runtime.selection import Keyed, Selection
from broker.runtime.state import Describer, State, added, worst
from broker.runtime.writer import PROBE_EVERY, Writer

_log = logging.getLogger(__name__)

_OPEN_WITHIN = 60.0
_CLOSE_WITHIN = 5.0


class SinkRunner:
    """One sink: `start` once, `close` once; `pause` and `resume` between."""

    def __init__(
        self,
        backend: Backend,
        config: SinkConfig,
        attach: Attach,
        *,
        lanes: Sequence[int] | None = None,
        marker: Marker | None = None,
        changed: Callable[[], None] = lambda: None,
        alarm: Callable[[str], None] = lambda text: None,
        probe_every: float = PROBE_EVERY,
    ) -> None:
        self.name = config.name
        self.lanes: list[Lane] = []
        self._backend = backend
        self._config = config
        self._lanes = range(config.lanes) if lanes is None else lanes
        self._attach = attach
        self._marker = marker or Marker()
        self._changed = changed
        self._alarm = alarm
        self._probe_every = probe_every
        self._describe = Describer(config)
        self._spec = config.session()
        self._gate = asyncio.Event()
        self._gate.set()
        self._kick = asyncio.Event()
        self._sink: Sink | None = None
        self._opening: State = State.CONNECTING
        self._error: str | None = None
        publishing = "in" if 0 in self._lanes else f"in-{self._lanes[0]}"  # of each worker that has a part of it
        self._dead_letters = DeadLetters(self.name, lambda handler: attach(self.name, publishing, handler, self._spec))
        self._task: asyncio.Task[None] | None = None

    def start(self, paused: bool = False) -> None:
        """Open the sink, then attach its lanes; returns at once."""
        if paused:
            self._gate.clear()
        self._task = asyncio.create_task(self._run(), name=f"sinks.{self.name}")

    def pause(self) -> None:
        """Finish the write that is under way, then take no more; the broker's queue keeps the rest."""
        self._gate.clear()
        self._changed()

    def resume(self) -> None:
        """Go on, at once also where the next try would have come later."""
        self._gate.set()
        self._kick.set()
        for lane in self.lanes:
            lane.writer.kick()
        self._changed()

    async def close(self, drain: float) -> None:
        """Write what was received for ``drain`` seconds at most, then leave broker and destination."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(lane.close(drain) for lane in self.lanes))
        await self._dead_letters.close()
        if self._sink is not None:
            try:
                async with asyncio.timeout(_CLOSE_WITHIN):
                    await self._sink.close()
            except Exception as error:
                _log.warning("the sink did not close: %s", self._describe(error))

    def status(self) -> dict[str, Any]:
        """Plain values: state, last_error and what was counted since the start of this worker."""
        lanes = self.lanes
        if not self._gate.is_set():
            state = State.PAUSED
        elif lanes:
            state = worst(lane.state for lane in lanes)
        else:
            state = self._opening
        errors = [error for lane in lanes if (error := lane.last_error)]
        status: dict[str, Any] = {
            "state": state.value,
            "last_error": errors[0] if errors else self._error,
            "acked": sum(lane.acked for lane in lanes),
            "retried": sum(lane.writer.retried for lane in lanes),
            "retries": added(lane.writer.retries for lane in lanes),
            "dead": sum(lane.dead for lane in lanes),
            "in_flight": sum(lane.in_flight for lane in lanes),
            "lanes": len(self._lanes),
        }
        if dropped := sum(lane.dropped for lane in lanes):
            status["dropped"] = {"unqueued": dropped}
        return status

    async def _run(self) -> None:
        speak_for(f"sinks.{self.name}")
        sink = await self._open()
        if self._config.idempotency_key is not None:
            sink = Keyed(sink, compile_key(self._config.idempotency_key))
        if self._config.where is not None:
            sink = Selection(sink, self._config.where)
        for number in self._lanes:
            lane = self._lane(sink, number)
            self.lanes.append(lane)
            lane.start()
        self._changed()

    async def _open(self) -> Sink:
        """The opened sink, however often that has to be tried."""
        wait = FullJitter()
        while True:
            pause: float
            try:
                async with asyncio.timeout(_OPEN_WITHIN):
                    with self._marker:
                        self._sink = await self._backend.open(self._config)
            except Fatal as error:
                self._alarm(self._describe(error))
                self._stumble(State.PAUSED, error)
                pause = self._probe_every
            except (OSError, TimeoutError) as error:
                self._stumble(State.RETRYING, error)
                pause = wait.next()
            except Exception as error:
                _log.exception("the sink cannot be opened")
                self._stumble(State.RETRYING, error)
                pause = max(1.0, wait.next())
            else:
                self._error = None
                assert self._sink is not None
                return self._sink
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._kick.wait()
            self._kick.clear()

    def _stumble(self, state: State, error: Exception) -> None:
        text = f"cannot open: {self._describe(error)}"
        if self._opening is not state:
            _log.warning("%s: %s", state, text)
        self._opening, self._error = state, text
        self._changed()

    def _lane(self, sink: Sink, number: int) -> Lane:
        def attach(handler: Handler) -> Awaitable[Connection]:
            return self._attach(self.name, str(number), handler, self._spec)

        writer = Writer(
            sink,
            gate=self._gate,
            marker=self._marker,
            describe=self._describe,
            probe_every=self._probe_every,
            changed=self._changed,
            alarm=self._alarm,
        )
        return Lane(
            number,
            attach=attach,
            writer=writer,
            graveyard=self._dead_letters,
            batch=self._config.batch,
            trusted=self._attach.trusted,
            in_order=self._attach.in_order,
            longest_wait=self._attach.longest_wait,
            describe=self._describe,
            changed=self._changed,
        )
