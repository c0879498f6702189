"""Stands before one backend: cache, single flight, breaker, bulkhead, deadline. Turns every ending into an answer or
BackendUnavailable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from broker.access.breaker import Breaker
from broker.access.bulkhead import Bulkhead, Busy
from broker.access.cache import Cache
from broker.access.rules import RuleSet
from broker.extend.auth import Answer, AuthBackend, BackendUnavailable, Client, Grant, Refusal, Rule, Verdict, note

logger = logging.getLogger(__name__)

QUEUE_FACTOR = 4
"""Calls that may wait, as a multiple of those that may run."""


class Open(BackendUnavailable):
    """The backend failed several times in a row and is left alone for a few seconds."""


class _Flight:
    """One call on behalf of everybody who asks the same question while it runs."""

    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Task[Answer]) -> None:
        self.task = task
        self.waiters = 0


class Guard:
    """One `[auth.*]` instance as the chain sees it."""

    def __init__(
        self,
        name: str,
        backend: AuthBackend,
        *,
        timeout: float = 3.0,
        max_concurrent: int = 64,
        cache_ttl: float = 60.0,
        negative_cache_ttl: float = 5.0,
        stale_if_error: float = 0.0,
        refresh: float = 0.0,
        on_error: Literal["deny", "ignore"] = "deny",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.backend = backend
        self.timeout = timeout
        self.refresh = refresh
        self.on_error = on_error
        self.last_error: str | None = None
        self.calls = 0
        self.errors = 0
        rules: Sequence[Rule] | None = getattr(backend, "common_rules", None)
        self.common = RuleSet(rules) if rules is not None else None
        """Rules that apply to every client, whoever let it in."""
        self.cache = Cache(cache_ttl, negative_cache_ttl, stale_if_error, clock)
        self.breaker = Breaker(clock)
        self.bulkhead = Bulkhead(max_concurrent, max_concurrent * QUEUE_FACTOR, timeout)
        self.screen: Callable[[Client], Refusal | None] | None = getattr(backend, "screen", None)
        self.without_password = bool(getattr(backend, "without_password", False))
        self._by_address = bool(getattr(backend, "by_address", False))
        self._flights: dict[bytes, _Flight] = {}
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def has_rules(self) -> bool:
        """Whether the backend can tell a user's rights without a password."""
        return getattr(self.backend, "rules", None) is not None

    def key(self, client: Client, password: bytes) -> bytes:
        """What a verdict is remembered under."""
        return self.cache.key(client, password, by_address=self._by_address)

    def cached(self, key: bytes) -> Answer | None:
        """The verdict, when it is known without asking."""
        return self.cache.get(key)

    async def authenticate(self, key: bytes, client: Client, password: bytes) -> Answer:
        """The backend's verdict; raises BackendUnavailable (Busy, Open). Cancelling the last of those who wait for
        the same answer cancels the call."""
        answer = self.cache.get(key)
        if answer is not None:
            note("answered from the cache")
            return answer
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.create_task(self._authenticate(key, client, password)))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda task, flight=flight: self._landed(key, flight))  # type: ignore[misc]
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.task.cancelled():
                raise BackendUnavailable(f"{self.name} was closed") from None
            raise
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                flight.task.cancel()
                self._forget(key, flight)

    async def rules(self, client: Client) -> Grant | Refusal | None:
        """A user's rights without a password: None when the backend does not know the user or has no rights."""
        ask: Any = getattr(self.backend, "rules", None)
        if ask is None:
            return None
        answer = await self._call(lambda: ask(client))
        if answer is None or isinstance(answer, (Grant, Refusal)):
            return answer
        if isinstance(answer, (list, tuple)) and all(isinstance(rule, Rule) for rule in answer):
            return Grant(rules=tuple(answer))
        raise self._failed(BackendUnavailable(f"answered with {type(answer).__name__}, which is no list of rules"))

    async def burn(self, password: bytes) -> None:
        """Spend the time of one password check, if the backend checks passwords by itself. Raises BackendUnavailable
        (Busy, Open) where a check would have, so that an unknown user is told what a known one is."""
        burn: Any = getattr(self.backend, "burn", None)
        if burn is not None:
            await self._call(lambda: burn(password))

    def status(self) -> dict[str, Any]:
        """For `isthmus status`; no secrets."""
        state = "open" if self.breaker.open else "failing" if self.breaker.failures else "ok"
        return {
            "state": state, "last_error": self.last_error, "calls": self.calls, "errors": self.errors,
            "running": self.bulkhead.running, "waiting": self.bulkhead.waiting, "cached": len(self.cache),
        }  # fmt: skip

    async def close(self) -> None:
        """Cancel what is under way and close the backend."""
        tasks = [flight.task for flight in self._flights.values()] + list(self._running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        async with asyncio.timeout(5):
            await self.backend.close()

    async def _authenticate(self, key: bytes, client: Client, password: bytes) -> Answer:
        try:
            answer = await self._call(lambda: self.backend.authenticate(client, password))
            if not isinstance(answer, (Verdict, Grant, Refusal)):
                raise self._failed(BackendUnavailable(f"answered with {type(answer).__name__}, which is no verdict"))
        except BackendUnavailable as error:
            stale = self.cache.get_stale(key)
            if stale is None:
                raise
            logger.warning(
                "auth.%s: user %r let in on an earlier login, because the backend fails: %s",
                self.name, client.username, error,
            )  # fmt: skip
            return stale
        self.cache.put(key, answer, client.username)
        return answer

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:
        if self.breaker.open:
            raise Open(f"left alone for a few seconds after {self.breaker.failures} failures: {self.last_error}")
        await self.bulkhead.enter()
        if not self.breaker.enter():
            self.bulkhead.leave()
            raise Open(f"left alone for a few seconds after {self.breaker.failures} failures: {self.last_error}")
        self.calls += 1
        task = asyncio.ensure_future(_start(call))
        self._running.add(task)
        task.add_done_callback(self._finished)
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout)
        except asyncio.CancelledError:
            task.cancel()
            self.breaker.abandoned()
            raise
        if not done:
            task.cancel()
            raise self._failed(BackendUnavailable(f"no answer in {self.timeout:g} s"))
        if task.cancelled():
            self.breaker.abandoned()
            raise BackendUnavailable("the call was cancelled")
        error = task.exception()
        if isinstance(error, Busy):  # it works, and has more to do than it can
            self.breaker.abandoned()
            raise error
        if error is not None:
            if not isinstance(error, BackendUnavailable):
                logger.error("auth.%s: the backend raised %s", self.name, type(error).__name__, exc_info=error)
                error = BackendUnavailable(f"internal error: {type(error).__name__}")
            raise self._failed(error)
        if self.breaker.failures:
            logger.info("auth.%s: answers again", self.name)
        self.breaker.succeeded()
        return task.result()

    def _failed(self, error: BackendUnavailable) -> BackendUnavailable:
        self.errors += 1
        self.last_error = str(error)
        was_open = self.breaker.open
        self.breaker.failed()
        if self.breaker.failures == 1:
            logger.warning("auth.%s: %s", self.name, error)
        elif self.breaker.open and not was_open:
            count = self.breaker.failures
            logger.error("auth.%s: left alone for a few seconds after %d failures: %s", self.name, count, error)
        return error

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self.bulkhead.leave()  # only now: a call that ignores its cancellation still takes its place
        if not task.cancelled():
            task.exception()  # a late failure has been reported as a timeout already

    def _landed(self, key: bytes, flight: _Flight) -> None:
        self._forget(key, flight)
        if not flight.task.cancelled():
            flight.task.exception()

    def _forget(self, key: bytes, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


async def _start(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


__all__ = ["Busy", "Guard", "Open"]
