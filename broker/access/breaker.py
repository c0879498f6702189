"""A circuit breaker: after several failures in a row a backend is left alone for a while, then probed by one call."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

THRESHOLD = 5
"""Consecutive failures that open it."""
PAUSE = 5.0
"""Seconds it stays open, give or take a tenth so that many brokers do not probe at once."""


class Breaker:
    """Closed, open, or half-open while one probe is under way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = 0.0
        self._probing = False
        self.failures = 0
        """Failures since the last success."""

    @property
    def open(self) -> bool:
        """Whether calls are turned away at present."""
        return self.failures >= THRESHOLD and (self._probing or self._clock() < self._until)

    def enter(self) -> bool:
        """Whether a call may start now; each call let in must end with `succeeded`, `failed` or `abandoned`."""
        if self.failures < THRESHOLD:
            return True
        if self.open:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """The backend answered, whatever the answer."""
        self.failures = 0
        self._probing = False

    def failed(self) -> None:
        """The backend did not answer."""
        self.failures += 1
        self._probing = False
        if self.failures >= THRESHOLD:
            self._until = self._clock() + PAUSE * random.uniform(0.9, 1.1)

    def abandoned(self) -> None:
        """The caller went away before the backend answered: nothing was learned."""
        self._probing = False
