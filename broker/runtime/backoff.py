"""How long to wait before trying again. Knows no clock and no task, only numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

Uniform = Callable[[float, float], float]


class Backoff:
    """Decorrelated jitter: each wait is drawn between `base` and three times the wait before, never above `cap`.

    Many instances that lose the same peer at once spread out instead of returning together.
    """

    __slots__ = ("_base", "_cap", "_last", "_uniform")

    def __init__(self, base: float, cap: float, uniform: Uniform = random.uniform) -> None:
        if not 0 < base <= cap:
            raise ValueError(f"a back-off needs 0 < base <= cap, not base {base} and cap {cap}")
        self._base = base
        self._cap = cap
        self._last = base
        self._uniform = uniform

    def next(self) -> float:
        """Seconds to wait before the next try."""
        self._last = min(self._cap, self._uniform(self._base, self._last * 3))
        return self._last

    def reset(self) -> None:
        """The last try worked: start from `base` again."""
        self._last = self._base


class FullJitter:
    """Exponential back-off with full jitter: a wait between zero and a bound that doubles from `base` to `cap`."""

    __slots__ = ("_base", "_bound", "_cap", "_uniform")

    def __init__(self, base: float = 0.1, cap: float = 30.0, uniform: Uniform = random.uniform) -> None:
        if not 0 < base <= cap:
            raise ValueError(f"a back-off needs 0 < base <= cap, not base {base} and cap {cap}")
        self._base = base
        self._cap = cap
        self._bound = base
        self._uniform = uniform

    def next(self) -> float:
        """Seconds to wait before the next try."""
        wait = self._uniform(0.0, self._bound)
        self._bound = min(self._cap, self._bound * 2)
        return wait

    def reset(self) -> None:
        """The last try worked: start from `base` again."""
        self._bound = self._base
