"""Reads the rights of connected clients again: after a while, and when the backend they come from was changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from broker.access.principal import Principal
from broker.extend.auth import BackendUnavailable, Grant

if TYPE_CHECKING:
    from broker.access.gate import AccessGate

logger = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between looks at who is due."""
SETTLE = 0.05
"""Seconds in which changes are gathered before rights are read again: a table is changed row by row."""
PARALLEL = 4
"""Clients whose rights are read at the same time; logins come first."""
NOT_AUTHORIZED = 0x87


class Refresher:
    """One queue per instance, in the order of login; a client that left falls out by itself."""

    def __init__(self, gate: AccessGate) -> None:
        self._gate = gate
        self._queues: dict[str, deque[tuple[float, weakref.ref[Principal]]]] = {}
        self._live: dict[str, weakref.WeakSet[Principal]] = {}
        self._task: asyncio.Task[None] | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._due: dict[Principal, None] = {}
        self._now: asyncio.Task[None] | None = None

    def watch(self, principal: Principal) -> None:
        """A client logged in."""
        loop = asyncio.get_running_loop()
        if principal.expires_at is not None:
            self._watch_expiry(principal, loop)
        guard = self._gate.guard(principal.backend)
        if guard is None or not guard.has_rules or principal.backend is None:
            return
        self._live.setdefault(principal.backend, weakref.WeakSet()).add(principal)
        if guard.refresh:
            self._plan(principal.backend, principal, loop.time() + guard.refresh)

    def changed(self, names: set[str]) -> None:
        """These instances were opened anew: everybody who came through them is due now."""
        for name in names & self._live.keys():
            self._queues.pop(name, None)
            for principal in self._live[name]:
                self._plan(name, principal, 0.0)

    def due(self, name: str, username: str | None) -> None:
        """The rights of those who came through this instance with this user name (None: of all) changed: read them now,
        besides when they are read anyway."""
        for principal in self._live.get(name, ()):
            if username is None or principal.username == username:
                self._due[principal] = None
        if self._due and (self._now is None or self._now.done()):
            self._now = asyncio.get_running_loop().create_task(self._read_now())

    async def _read_now(self) -> None:
        while self._due:
            await asyncio.sleep(SETTLE)
            due, self._due = self._due, {}
            places = asyncio.Semaphore(PARALLEL)
            await asyncio.gather(*(self._refresh(principal, places, again=False) for principal in due))

    def _plan(self, name: str, principal: Principal, due: float) -> None:
        self._queues.setdefault(name, deque()).append((due, weakref.ref(principal)))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._now is not None:
            self._now.cancel()
            self._now = None
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    async def _run(self) -> None:
        while self._queues:
            await asyncio.sleep(TICK)
            await self.run_due()

    async def run_due(self) -> None:
        """Read the rights of everybody who is due before the next look, so that none are older than `refresh`."""
        now = asyncio.get_running_loop().time() + TICK
        due: list[Principal] = []
        for name, queue in list(self._queues.items()):
            while queue and (queue[0][0] <= now or queue[0][1]() is None):
                principal = queue.popleft()[1]()
                if principal is not None:
                    due.append(principal)
            if not queue:
                del self._queues[name]
        places = asyncio.Semaphore(PARALLEL)

        if due:
            await asyncio.gather(*(self._refresh(principal, places) for principal in due))

    async def _refresh(self, principal: Principal, places: asyncio.Semaphore, *, again: bool = True) -> None:
        async with places:
            await self._read(principal, again)

    async def _read(self, principal: Principal, again: bool) -> None:
        guard = self._gate.guard(principal.backend)
        if guard is None or principal.backend is None:
            return  # its instance was removed, and its rights with it
        try:
            answer = await guard.rules(principal.client())
        except BackendUnavailable:
            answer = Grant(principal.superuser, principal.attributes, principal.own_rules)  # keep what it has
        if isinstance(answer, Grant):
            with contextlib.suppress(Exception):
                self._gate.apply(principal, answer)
            guard = self._gate.guard(principal.backend)
            if again and guard is not None and guard.refresh:
                self._plan(principal.backend, principal, asyncio.get_running_loop().time() + guard.refresh)
            return
        logger.warning(
            "client %r: auth.%s no longer knows user %r", principal.clientid, principal.backend, principal.username
        )
        self._gate.purge(principal.username)
        self._gate.apply(principal, Grant())
        if self._gate.kick is not None:
            self._gate.kick(principal.clientid, NOT_AUTHORIZED)

    def _watch_expiry(self, principal: Principal, loop: asyncio.AbstractEventLoop) -> None:
        reference = weakref.ref(principal)

        def expired() -> None:
            self._timers.discard(timer)
            live = reference()
            if live is not None and self._gate.kick is not None:
                self._gate.kick(live.clientid, NOT_AUTHORIZED)

        timer = loop.call_later(max(0.0, (principal.expires_at or 0.0) - time.time()), expired)
        self._timers.add(timer)
