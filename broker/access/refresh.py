"""Reads the rights of connected clients again: after a while, and when the backend they come from was changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from broker.access.principal import Principal
from broker.extend.auth import BackendUnavailable, Grant, Refusal

if TYPE_CHECKING:
    from broker.access.gate import AccessGate

logger = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between looks at who is due."""
SETTLE = 0.05
"""Seconds in which changes are gathered before rights are read again: a table is changed row by row."""
PARALLEL = 4
"""Clients whose rights are read at the same time; logins come first."""
LONGEST = 86_400.0
"""Seconds a timer waits for the end of a login at most: loops do not wait for years, and clocks are set meanwhile."""
NOT_AUTHORIZED = 0x87


class Refresher:
    """One queue per instance, in the order of login; a client that left falls out by itself."""

    def __init__(self, gate: AccessGate) -> None:
        self._gate = gate
        self._queues: dict[str, deque[tuple[float, weakref.ref[Principal]]]] = {}
        self._live: dict[str, weakref.WeakSet[Principal]] = {}
        self._task: asyncio.Task[None] | None = None
        self._timers: dict[weakref.ref[Principal], asyncio.TimerHandle] = {}
        self._due: dict[Principal, None] = {}
        self._now: asyncio.Task[None] | None = None

    def watch(self, principal: Principal) -> None:
        """A client logged in."""
        self.watch_expiry(principal)
        guard = self._gate.guard(principal.backend)
        if guard is None or not guard.has_rules or principal.backend is None:
            return
        self._live.setdefault(principal.backend, weakref.WeakSet()).add(principal)
        if guard.refresh:
            self._plan(principal.backend, principal, asyncio.get_running_loop().time() + guard.refresh)

    def watch_expiry(self, principal: Principal) -> None:
        """Disconnect it when its login ends; called again whenever that time has changed."""
        self._forget(weakref.ref(principal))
        if principal.expires_at is None:
            return
        loop = asyncio.get_running_loop()
        here = threading.get_ident()

        def gone(reference: weakref.ref[Principal]) -> None:
            if threading.get_ident() == here:
                self._forget(reference)
            elif reference in self._timers:  # the last reference may go in any thread
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._forget, reference)

        reference = weakref.ref(principal, gone)
        left = principal.expires_at - time.time()
        self._timers[reference] = loop.call_later(min(max(0.0, left), LONGEST), self._expired, reference)

    def _expired(self, reference: weakref.ref[Principal]) -> None:
        self._timers.pop(reference, None)
        principal = reference()
        if principal is None or principal.expires_at is None:
            return
        if principal.expires_at > time.time():
            self.watch_expiry(principal)
        else:
            self._kick(principal)

    def _forget(self, reference: weakref.ref[Principal]) -> None:
        timer = self._timers.pop(reference, None)
        if timer is not None:
            timer.cancel()

    def _kick(self, principal: Principal) -> None:
        """Its messages may outlive its connection, and it with them: then somebody else may have its client id."""
        present = self._gate.present
        if self._gate.kick is not None and (present is None or present(principal)):
            self._gate.kick(principal.clientid, NOT_AUTHORIZED)

    def changed(self, names: set[str]) -> None:
        """These instances were opened anew: everybody who came through them is due now."""
        now = asyncio.get_running_loop().time() if names else 0.0
        for name in names & self._live.keys():
            self._queues.pop(name, None)
            guard = self._gate.guard(name)
            if guard is not None and guard.refresh:
                for principal in self._live[name]:
                    self._plan(name, principal, now + guard.refresh)
            self.due(name, None)

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
        for timer in list(self._timers.values()):
            timer.cancel()
        self._timers.clear()

    async def _run(self) -> None:
        while self._queues:
            await asyncio.sleep(TICK)
            await self.run_due()

    async def run_due(self) -> None:
        """Read the rights of everybody who is due before the next look, so that none are older than `refresh`, and of
        those whose rights changed."""
        now = asyncio.get_running_loop().time() + TICK
        due: list[Principal] = []
        for name, queue in list(self._queues.items()):
            while queue and (queue[0][0] <= now or queue[0][1]() is None):
                principal = queue.popleft()[1]()
                if principal is not None:
                    due.append(principal)
            if not queue:
                del self._queues[name]
        changed, self._due = self._due, {}
        if due or changed:
            places = asyncio.Semaphore(PARALLEL)
            now_and_again = (self._refresh(principal, places) for principal in due)
            await asyncio.gather(*now_and_again, *(self._refresh(one, places, again=False) for one in changed))

    async def _refresh(self, principal: Principal, places: asyncio.Semaphore, *, again: bool = True) -> None:
        async with places:
            await self._read(principal, again)

    async def _read(self, principal: Principal, again: bool) -> None:
        name = principal.backend
        guard = self._gate.guard(name)
        if guard is None or name is None:
            return  # its instance was removed, and its rights with it
        answer: Grant | Refusal | None = None
        failed = False
        try:
            answer = await guard.rules(principal.client())
        except BackendUnavailable:
            failed = True  # it keeps what it has
        if principal.backend != name or self._gate.guard(name) is not guard:
            return  # meanwhile it was disconnected, or the instance opened anew, and then everybody is due again
        if isinstance(answer, Grant):
            with contextlib.suppress(Exception):
                self._gate.apply(principal, answer)
        elif not failed:
            logger.warning("client %r: auth.%s no longer knows user %r", principal.clientid, name, principal.username)
            self._gate.purge(principal.username)
            self._gate.apply(principal, Grant())
            self._kick(principal)
            return
        if again and guard.refresh:
            self._plan(name, principal, asyncio.get_running_loop().time() + guard.refresh)
