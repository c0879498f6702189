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


class _Call:
    """One call of the backend, on behalf of everybody who waits for its answer."""

    __slots__ = ("begun", "key", "over", "task", "timer", "waiters")

    def __init__(self, key: bytes | None) -> None:
        self.key = key
        """What others who ask the same find it by."""
        self.waiters: set[asyncio.Future[Any]] = set()
        self.begun: float | None = None
        """When the backend was asked; until then it waits for its turn."""
        self.over = False
        """Whether it has been decided what the waiters are told; what the backend says from then on is late."""
        self.task: asyncio.Task[None]
        self.timer: asyncio.TimerHandle | None = None


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
        self._at_once: Callable[[Client, bytes], Answer | None] | None = getattr(backend, "at_once", None)
        self._rules: Callable[[Client], Awaitable[Any]] | None = getattr(backend, "rules", None)
        self._clock = clock
        self._failing_since = 0.0
        """When the first of the failures in a row happened."""
        self._calls: set[_Call] = set()
        self._shared: dict[bytes, _Call] = {}

    @property
    def has_rules(self) -> bool:
        """Whether the backend can tell a user's rights without a password."""
        return self._rules is not None

    def key(self, client: Client, password: bytes) -> bytes:
        """What a verdict is remembered under."""
        return self.cache.key(client, password, by_address=self._by_address)

    def known(self, client: Client, password: bytes) -> Answer | None:
        """The verdict, when the cache has it or the backend gives it without asking anybody; else None."""
        key = self.key(client, password)
        answer = self.cache.get(key)
        if answer is not None or self._at_once is None:
            return answer
        try:
            answer = self._at_once(client, password)
        except Exception:
            return None  # it will raise again in `authenticate`, where failures are counted and told
        if answer is not None:
            self.calls += 1
            self.cache.put(key, answer, client.username)
        return answer

    async def authenticate(self, key: bytes, client: Client, password: bytes) -> Answer:
        """The backend's verdict; raises BackendUnavailable (Busy, Open). Cancelling the last of those who wait for
        the same answer cancels the call."""
        answer = self.cache.get(key)
        if answer is not None:
            note("answered from the cache")
            return answer

        def judged(answer: Any) -> Answer:
            if not isinstance(answer, (Verdict, Grant, Refusal)):
                raise BackendUnavailable(f"answered with {type(answer).__name__}, which is no verdict")
            self.cache.put(key, answer, client.username)
            return answer

        try:
            found: Answer = await self._ask(lambda: self.backend.authenticate(client, password), judged, key)
        except BackendUnavailable as error:
            stale = self.cache.get_stale(key)
            if stale is None:
                raise
            logger.warning(
                "auth.%s: user %r let in on an earlier login, because the backend fails: %s",
                self.name, client.username, error,
            )  # fmt: skip
            return stale
        return found

    async def rules(self, client: Client) -> Grant | Refusal | None:
        """A user's rights without a password: None when the backend does not know the user or has no rights."""
        ask = self._rules
        if ask is None:
            return None
        answer: Grant | Refusal | None = await self._ask(lambda: ask(client), _rights)
        return answer

    async def burn(self, password: bytes) -> None:
        """Spend the time of one password check, if the backend checks passwords by itself. Raises BackendUnavailable
        (Busy, Open) where a check would have, so that an unknown user is told what a known one is."""
        burn: Any = getattr(self.backend, "burn", None)
        if burn is not None:
            await self._ask(lambda: burn(password), _anything)

    def status(self) -> dict[str, Any]:
        """For `isthmus status`; no secrets."""
        state = "open" if self.breaker.open else "failing" if self.breaker.failures else "ok"
        return {
            "state": state, "last_error": self.last_error, "calls": self.calls, "errors": self.errors,
            "running": self.bulkhead.running, "waiting": self.bulkhead.waiting, "cached": len(self.cache),
        }  # fmt: skip

    async def close(self) -> None:
        """Cancel what is under way and close the backend."""
        tasks = [call.task for call in self._calls]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        async with asyncio.timeout(5):
            await self.backend.close()

    async def _ask(
        self, ask: Callable[[], Awaitable[Any]], judged: Callable[[Any], Any], key: bytes | None = None
    ) -> Any:
        """What `judged` makes of the backend's answer. Raises BackendUnavailable, also when `judged` does."""
        loop = asyncio.get_running_loop()
        call = self._shared.get(key) if key is not None else None
        if call is None:
            call = _Call(key)
            call.task = loop.create_task(self._run(call, ask, judged))
            call.task.add_done_callback(lambda task: self._ended(call))
            self._calls.add(call)
            if key is not None:
                self._shared[key] = call
        waiter: asyncio.Future[Any] = loop.create_future()
        call.waiters.add(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            call.waiters.discard(waiter)
            if not waiter.cancelled():
                waiter.exception()  # answered in the same moment
            if not call.waiters and not call.over:
                self._settle(call)
                if call.begun is not None:
                    self.breaker.abandoned()
                call.task.cancel()
            raise

    async def _run(self, call: _Call, ask: Callable[[], Awaitable[Any]], judged: Callable[[Any], Any]) -> None:
        """The call itself, in a task of its own: it may outlive its deadline and its waiters, and keeps its place in
        the bulkhead until it has really ended."""
        if self.breaker.open:
            self._refuse(call, self._open())
            return
        try:
            await self.bulkhead.enter()
        except Busy as error:
            self._refuse(call, error)
            return
        try:
            if not self.breaker.enter():
                self._refuse(call, self._open())
                return
            self.calls += 1
            call.begun = self._clock()
            call.timer = asyncio.get_running_loop().call_later(self.timeout, self._late, call)
            try:
                answer = await ask()
                if call.over:  # too late: nobody waits for it, and it is not remembered
                    return
                answer = judged(answer)
            except Busy as error:  # it works, and has more to do than it can
                if not call.over:
                    self.breaker.abandoned()
                    self._refuse(call, error)
            except Exception as error:
                if not call.over:
                    call.over = True
                    self._refuse(call, self._failed(self._explained(error)))
            else:
                if self.breaker.failures:
                    logger.info("auth.%s: answers again", self.name)
                self.breaker.succeeded()
                self._tell(call, answer)
        finally:
            self.bulkhead.leave()

    def _late(self, call: _Call) -> None:
        """The deadline of a call has come."""
        if not call.over:
            call.over = True
            self._refuse(call, self._failed(BackendUnavailable(f"no answer in {self.timeout:g} s")))
            call.task.cancel()

    def _ended(self, call: _Call) -> None:
        self._calls.discard(call)
        if not call.over:  # it was cancelled, by `close` or by the backend itself
            if call.begun is not None:
                self.breaker.abandoned()
            self._refuse(call, BackendUnavailable("the call was cancelled"))

    def _tell(self, call: _Call, answer: Any) -> None:
        self._settle(call)
        for waiter in call.waiters:
            if not waiter.done():
                waiter.set_result(answer)

    def _refuse(self, call: _Call, error: BackendUnavailable) -> None:
        self._settle(call)
        for waiter in call.waiters:
            if not waiter.done():
                waiter.set_exception(error)

    def _settle(self, call: _Call) -> None:
        """What the waiters are told is decided; who asks the same from now on begins a call of its own."""
        call.over = True
        if call.timer is not None:
            call.timer.cancel()
        if call.key is not None and self._shared.get(call.key) is call:
            del self._shared[call.key]

    def _explained(self, error: Exception) -> BackendUnavailable:
        if isinstance(error, BackendUnavailable):
            return error
        logger.error("auth.%s: the backend raised %s", self.name, type(error).__name__, exc_info=error)
        return BackendUnavailable(f"internal error: {type(error).__name__}")

    def _open(self) -> Open:
        return Open(f"left alone for a few seconds after {self.breaker.failures} failures: {self.last_error}")

    def _failed(self, error: BackendUnavailable) -> BackendUnavailable:
        self.errors += 1
        self.last_error = str(error)
        was_open = self.breaker.open
        if not self.breaker.failures:
            self._failing_since = self._clock()
        self.breaker.failed()
        if self.breaker.failures == 1:
            logger.warning("auth.%s: %s", self.name, error)
        elif self.breaker.open and not was_open:
            count = self.breaker.failures
            logger.error("auth.%s: left alone for a few seconds after %d failures: %s", self.name, count, error)
            self._leave_alone()
        return error

    def _leave_alone(self) -> None:
        """Calls that began while it was failing already are not waited for: who waited in the queue before would
        otherwise wait twice."""
        for call in list(self._calls):
            if not call.over and call.begun is not None and call.begun >= self._failing_since:
                self._refuse(call, self._open())
                call.task.cancel()


def _rights(answer: Any) -> Grant | Refusal | None:
    if answer is None or isinstance(answer, (Grant, Refusal)):
        return answer
    if isinstance(answer, (list, tuple)) and all(isinstance(rule, Rule) for rule in answer):
        return Grant(rules=tuple(answer))
    raise BackendUnavailable(f"answered with {type(answer).__name__}, which is no list of rules")


def _anything(answer: Any) -> Any:
    return answer


__all__ = ["Busy", "Guard", "Open"]
