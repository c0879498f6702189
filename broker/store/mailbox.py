"""How the store's threads reach the event loop: what they finish piles up, and one wake-up takes all of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """Calls to be made on the loop's thread, in the order they were posted."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """From any thread."""
        self._calls.append((function, arguments))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        """On the loop's thread. A call that raises does not keep the others from being made."""
        self._woken = False  # before looking: what is posted from here on wakes the loop again
        calls = self._calls
        try:
            while calls:
                function, arguments = calls.popleft()
                function(*arguments)
        finally:
            if calls:
                self._loop.call_soon(self.deliver)
