"""Gets one batch at a time into a sink, however long that takes: tries again, probes, isolates what poisons a batch."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from broker.extend.sink import BatchFailed, Fatal, Record, Sink
from broker.runtime.backoff import FullJitter
from broker.runtime.busy import Marker
from broker.runtime.state import Describer, State

_log = logging.getLogger(__name__)

PROBE_EVERY = 30.0
"""Seconds between two questions to a destination that refuses our configuration."""
_CHECK_WITHIN = 30.0
_SLOW = 15.0
_DEFECTS = 2  # times a whole batch may fail for an unknown reason before it is taken apart


class Writer:
    """One lane's way into its sink; `write` never runs twice at once."""

    def __init__(
        self,
        sink: Sink,
        *,
        gate: asyncio.Event,
        marker: Marker | None = None,
        describe: Describer | None = None,
        probe_every: float = PROBE_EVERY,
        changed: Callable[[], None] = lambda: None,
        alarm: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.retries: dict[str, int] = {}
        """Writes that failed and were made again, by reason: unreachable, refused (what is configured), unexpected; and
        dead_letters that nobody kept."""
        self._sink = sink
        self._gate = gate
        self._marker = marker or Marker()
        self._describe = describe or Describer()
        self._probe_every = probe_every
        self._changed = changed
        self._alarm = alarm
        self._trouble: State | None = None
        self._error: str | None = None
        self._since: float | None = None
        self._kick = asyncio.Event()

    # what an operator sees and does

    @property
    def open(self) -> bool:
        """Whether nobody paused the instance."""
        return self._gate.is_set()

    @property
    def trouble(self) -> State | None:
        """PAUSED or RETRYING; None while all is well."""
        if not self.open:
            return State.PAUSED
        return State.RETRYING if self._trouble is None and self._stalled() else self._trouble

    @property
    def last_error(self) -> str | None:
        """Why `trouble` is not None."""
        stalled = self._stalled()
        return self._error or (f"the destination has not answered for {stalled:.0f} s" if stalled else None)

    @property
    def retried(self) -> int:
        """All of `retries`."""
        return sum(self.retries.values())

    def kick(self) -> None:
        """Try again now instead of at the end of the wait, also if what is tried at present fails."""
        self._kick.set()

    async def opened(self) -> None:
        """Returns while nobody paused the instance."""
        await self._gate.wait()

    # work

    async def write(self, records: Sequence[Record]) -> dict[int, tuple[str, int]]:
        """Returns when every record is stored or refused for good: position -> (reason, attempts).

        An error the sink should have sorted is tried again, then the batch is taken apart: a single record that fails
        while the destination answers `check` is refused, so that one poisonous record never stops the rest.
        """
        refused: dict[int, tuple[str, int]] = {}
        wait = FullJitter()
        parts = [(0, len(records), 1, 0)]
        while parts:
            low, high, attempt, defects = parts.pop()
            part = records if high - low == len(records) else records[low:high]
            await self.opened()
            again = (low, high, attempt + 1, defects)
            try:
                await self._write_once(part)
            except BatchFailed as error:
                for position, reason in error.failed.items():
                    if 0 <= position < high - low:
                        refused[low + position] = (self._describe(reason), attempt)
            except Fatal as error:
                parts.append(again)
                await self._probe(error)
                continue
            except (OSError, TimeoutError) as error:  # NotConnected is one of them
                parts.append(again)
                await self._retry("unreachable", error, wait)
                continue
            except Exception as error:
                defects += 1  # apart from the attempts: an outage says nothing about a record
                if high - low == 1 and defects >= _DEFECTS and await self._answers():
                    _log.error("a record fails for a reason the sink does not know", exc_info=error)
                    refused[low] = (self._describe(f"{type(error).__name__}: {error}"), attempt)
                elif defects < _DEFECTS or high - low == 1:
                    _log.error("write failed for a reason the sink does not know", exc_info=error)
                    parts.append((low, high, attempt + 1, defects))
                    await self._retry("unexpected", error, wait)
                    continue
                else:
                    parts.extend(_split(low, high, attempt + 1, defects))
                    continue
            wait.reset()
            self.recover()
        return refused

    async def _write_once(self, part: Sequence[Record]) -> None:
        self._since = asyncio.get_running_loop().time()
        try:
            with self._marker:
                await self._sink.write(part)
        finally:
            self._since = None

    async def _retry(self, reason: str, error: Exception, wait: FullJitter) -> None:
        self.stumble(State.RETRYING, self._describe(error), reason)
        await self.nap(wait.next())

    async def _probe(self, error: Exception) -> None:
        """Until the destination answers again, or somebody resumes the instance."""
        text = self._describe(error)
        self._alarm(text)
        self.stumble(State.PAUSED, text, "refused")
        while not await self.nap(self._probe_every):
            with suppress(Exception):
                async with asyncio.timeout(_CHECK_WITHIN):
                    with self._marker:
                        await self._sink.check()
                return

    async def _answers(self) -> bool:
        """Whether the destination works, so that a failing record is to blame."""
        try:
            async with asyncio.timeout(_CHECK_WITHIN):
                with self._marker:
                    await self._sink.check()
        except Exception:
            return False
        return True

    async def nap(self, seconds: float) -> bool:
        """Wait; true when `kick` ended it early, or came since the last wait."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._kick.wait()
        kicked = self._kick.is_set()
        self._kick.clear()
        return kicked

    def stumble(self, state: State, error: str, reason: str) -> None:
        """Something does not work and will be tried again; said in the log once per state."""
        self.retries[reason] = self.retries.get(reason, 0) + 1
        if self._trouble is not state:
            _log.warning("%s: %s", state, error)
            self._trouble = state
            self._error = error
            self._changed()
        self._error = error

    def recover(self) -> None:
        """It works (again)."""
        self._kick.clear()
        if self._trouble is not None:
            _log.info("works again after: %s", self._error)
            self._trouble = self._error = None
            self._changed()

    def _stalled(self) -> float:
        """Seconds the destination has owed an answer for too long, else 0."""
        if self._since is None:
            return 0.0
        waited = asyncio.get_running_loop().time() - self._since
        return waited if waited > _SLOW else 0.0


def _split(low: int, high: int, attempt: int, defects: int) -> list[tuple[int, int, int, int]]:
    """About the square root of the records per part: two rounds reach single records. The last part comes first."""
    step = max(1, math.isqrt(high - low) if high - low > 8 else 1)
    return [(start, min(start + step, high), attempt, defects) for start in range(low, high, step)][::-1]
