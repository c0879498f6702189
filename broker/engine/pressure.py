"""Who is read while memory is short (R-06): publishers get to say so many bytes and then wait for their turn.

`press` is called some twenty times a second with the bytes there is room for until the next call. When they are used
up before it and all was calm, memory is looked at at once: a hundred publishers bring more in a moment than a small
budget has. When pressure begins all publishers get into a line, which moves on while there is room; whoever speaks when
there is none goes to its end. Who only receives is read always: its acknowledgements free memory.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from broker.engine.core import Core
from broker.engine.inbox import LIVE

AT_ONCE = 8
"""Publishers let in from the line in one turn of the loop: each may bring a whole read of 256 KiB."""
RARELY = 16
"""At level 2 one is let in at one of so many calls: it may also be a subscriber with acknowledgements to say."""


class Pressure:
    """`level`: 0 none; 1 publishers have only the room there is; 2 nearly none, and new clients are refused (0x89)."""

    def __init__(
        self, core: Core, clients: Callable[[], Iterable[Any]], call_soon: Callable[[Callable[[], None]], Any]
    ) -> None:
        self.core = core
        self._clients = clients
        self.level = 0
        self.look: Callable[[], object] | None = None
        """Asks for `press` now. None where nobody watches memory."""
        self._call_soon = call_soon
        self._calls = 0
        self._moving = False
        self._line: deque[Any] = deque()

    def press(self, level: int, room: int) -> None:
        """Set the level, and the bytes publishers may bring until the next call."""
        begins = level > self.level == 0
        self.level = level
        if begins:
            for channel in self._clients():
                self._hush(channel)
        self._calls += 1
        self.core.room = max(room, 1) if level < 2 or self._calls % RARELY == 0 else 0
        self._move()

    def heard(self, channel: Any) -> None:
        """There was no room for what `channel` brought and is about to have handled."""
        if self.level == 0:
            if self.look is not None:
                self.look()
        else:
            self._hush(channel)

    def _hush(self, channel: Any) -> None:
        if channel.origin is not None and (channel.resting or not channel.paused):
            if not channel.paused:
                channel.paused = True
                channel.link.pause_reading()
            channel.resting = False
            self._line.append(channel)

    def _move(self) -> None:
        """Let the next ones speak, as far as there is room."""
        left = {0: len(self._line), 1: AT_ONCE, 2: 1}[self.level]
        while self._line and left and self.core.room > 0:
            channel = self._line.popleft()
            if channel.state == LIVE and channel.paused and not channel.suspended and not channel.congested:
                channel.paused = False
                channel.link.resume_reading()
                left -= 1
        if self._line and self.level == 1 and self.core.room > 0 and not self._moving:
            self._moving = True
            self._call_soon(self._go_on)

    def _go_on(self) -> None:
        self._moving = False
        self._move()
