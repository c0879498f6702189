"""How fast long queues come back from disk beside live traffic.

A client that drains a queue of millions takes as much of the loop as it can get, and the others share the rest. So
long as the loop has time left nobody loses by that, and nothing is limited. When it has none and there are live
messages too, the rate at which queues are read back is lowered step by step, and raised again when there is time, but
never below what takes a sixth of the broker's time: live traffic keeps five sixths, and a queue is never stuck.
Everything else about a drained message (sending it, its acknowledgement) follows from its being read back, so one valve
is enough.

Time is what all threads of the process use, and what the loop's thread waits for a processor: on a busy machine a queue
that is drained at full speed takes from live traffic there too.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

SHARE = 1 / 6
"""Of the processor time of the broker, that queues from disk get in any case."""
WHOLE = 2.5
"""What a drained message costs altogether, by the time it takes from being read back to being sent (measured)."""
BUSY = 0.98
"""Used time above which the loop is short of it."""
FREE = 0.93
"""Used time below which some is left."""
SLOWER = 0.6
FASTER = 1.25
LIVE = 1000.0
"""Live messages a second, besides a twentieth of those that are drained, that are worth it."""
STEP = 0.005
"""Seconds between two looks at who may go on."""


def used() -> tuple[float, float]:
    """(seconds of processor time of all threads, seconds this thread was ready and not running) so far."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            waited = int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # not on this kernel
        waited = 0.0
    return time.process_time(), waited


class Pace:
    """Of one journal. `look` is called with every tick of the engine."""

    def __init__(
        self,
        core: Any,
        call_later: Callable[[float, Callable[[], None]], Any],
        usage: Callable[[], tuple[float, float]] = used,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self.call_later = call_later
        self.usage = usage
        self.clock = clock
        self.rate = 0.0
        """Messages a second that are read back at most; 0 while there is no limit."""
        self.drained = 0
        """Messages read back so far."""
        self.spent = 0.0
        """Seconds of processor time that handling them took."""
        self._waiting: deque[Any] = deque()
        """Spools that want to be read back, in turn."""
        self._allowed = 0.0
        """Messages that may be read back now."""
        self._stepping = False
        self._stepped = 0.0
        """When the allowance grew last."""
        self._last: tuple[float, float, float, int, float, int] | None = None
        """(now, time used, time waited, drained, spent, messages altogether) at the last look."""

    def admits(self, spool: Any) -> bool:
        """Whether this spool may read its next messages now; if not, `spool.load` is called when it may."""
        if self.rate == 0.0:
            return True
        self._waiting.append(spool)
        if not self._stepping:
            self._stepping = True
            self._stepped = self.clock()
            self.call_later(STEP, self._step)
        return False

    def handled(self, count: int, seconds: float) -> None:
        """So many messages came back, and to queue and send them took so long."""
        self.drained += count
        self.spent += seconds

    def _step(self) -> None:
        self._stepping = False
        unlimited = self.rate == 0.0
        now = self.clock()
        self._allowed += self.rate * (now - self._stepped)
        self._stepped = now
        while self._waiting and (self._allowed > 0 or unlimited):
            self._allowed -= self._waiting.popleft().go_on()
        if self._waiting:
            self._stepping = True
            self.call_later(STEP, self._step)
        else:
            self._allowed = min(self._allowed, 0.0)

    def look(self, now: float) -> None:
        """A quarter of a second later: is the loop short of time?"""
        if self._last is None and not self.drained:
            return
        if self._last is not None and self.drained == self._last[3] and not self._waiting:
            self._last = None
            self.rate = self.spent = 0.0
            self.drained = 0
            return
        last = self._last
        if last is not None and now <= last[0]:
            return
        self._last = this = (now, *self.usage(), self.drained, self.spent, self.core.received + self.core.sent)
        if last is None:
            return
        seconds, time_used, waited, drained, spent, messages = (a - b for a, b in zip(this, last, strict=True))
        if not drained:
            return
        rate = drained / seconds
        if messages - drained < LIVE * seconds + drained / 20 or (rate < self.rate / 2 and not self._waiting):
            self.rate = 0.0  # there is nobody to be spared, or the clients are slower than that by themselves
        elif time_used + waited < FREE * seconds:
            self.rate *= FASTER
        elif time_used + waited > BUSY * seconds:
            least = SHARE * time_used / seconds * drained / (WHOLE * max(spent, 1e-6))
            self.rate = max(SLOWER * (min(self.rate, rate) if self.rate else rate), least)
