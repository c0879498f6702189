"""Time without a timer per connection: one wheel for deadlines of connections, one heap for everything rare."""

import heapq
from collections.abc import Callable
from typing import Any

BUCKETS_PER_SECOND = 4
"""As fine as the engine's tick: a deadline is noticed at most half a second late."""


class Wheel:
    """Connections by the moment at which they are looked at again."""

    def __init__(self, now: float) -> None:
        self.buckets: dict[int, set[Any]] = {}
        self.next = int(now * BUCKETS_PER_SECOND)

    def put(self, channel: Any, when: float) -> None:
        """Look at the channel at this time, not earlier than the next tick."""
        bucket = max(int(when * BUCKETS_PER_SECOND) + 1, self.next)
        if channel.bucket == bucket:
            return
        self.remove(channel)
        channel.bucket = bucket
        held = self.buckets.get(bucket)
        if held is None:
            self.buckets[bucket] = {channel}
        else:
            held.add(channel)

    def remove(self, channel: Any) -> None:
        """Forget the channel."""
        held = self.buckets.get(channel.bucket)
        if held is not None:
            held.discard(channel)
            if not held:
                del self.buckets[channel.bucket]
        channel.bucket = -1

    def channels(self) -> list[Any]:
        """Everybody who is to be looked at."""
        return [channel for held in self.buckets.values() for channel in held]

    def due(self, now: float) -> list[Any]:
        """Take out every channel whose time has come."""
        found: list[Any] = []
        last = int(now * BUCKETS_PER_SECOND)
        if last - self.next > len(self.buckets):
            for bucket in [b for b in self.buckets if b <= last]:
                found.extend(self.buckets.pop(bucket))
        else:
            for bucket in range(self.next, last + 1):
                found.extend(self.buckets.pop(bucket, ()))
        self.next = last + 1
        for channel in found:
            channel.bucket = -1
        return found


class Timer:
    """One entry of the heap; `cancel` is cheap."""

    __slots__ = ("action", "number", "when")

    def __init__(self, when: float, number: int, action: Callable[[], None] | None) -> None:
        self.when = when
        self.number = number
        self.action = action

    def __lt__(self, other: "Timer") -> bool:
        return (self.when, self.number) < (other.when, other.number)

    def cancel(self) -> None:
        """Do not run any more."""
        self.action = None


class Timers:
    """Session expiry, will delay and the like."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._number = 0

    def at(self, when: float, action: Callable[[], None]) -> Timer:
        """Run `action` at this time of the engine's clock."""
        self._number += 1
        timer = Timer(when, self._number, action)
        heapq.heappush(self._heap, timer)
        return timer

    def run(self, now: float, failed: Callable[[Exception], None]) -> None:
        """Run everything due; one that raises never stops the others."""
        while self._heap and (self._heap[0].action is None or self._heap[0].when <= now):
            action = heapq.heappop(self._heap).action
            if action is not None:
                try:
                    action()
                except Exception as error:
                    failed(error)
