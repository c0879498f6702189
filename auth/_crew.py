"""A few threads for work that takes microseconds: what costs there is the way to a thread and back.

One thread takes all that is waiting and reports it together, once a millisecond at most; another one is called when
something has waited that long. So one thread does what it can, and what blocks keeps nothing else waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

PACE = 0.001
"""Seconds after which finished work is reported, and after which work that waits gets a thread of its own."""


class Closed(Exception):
    """The crew does not work any more."""


class _Job:
    __slots__ = ("error", "future", "result", "work")

    def __init__(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.work = work
        self.future = future
        self.result: Any = None
        self.error: Exception | None = None


class Crew:
    """At most `size` threads, started when they are needed. Belongs to the loop that runs when it is made; every method
    is called there."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._jobs: deque[_Job] = deque()
        self._called = threading.Semaphore(0)
        self._threads = 0
        self._working = 0
        """Threads that were called and have not yet said that nothing is left. Counted here alone."""
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def do(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, from one of the threads. Work whose caller has left is not begun. Raises
        Closed."""
        if self._closed:
            raise Closed
        job = _Job(work, self._loop.create_future())
        self._jobs.append(job)
        if not self._working:
            self._call()
        elif self._timer is None:
            self._timer = self._loop.call_later(PACE, self._look)
        result: T = await job.future
        return result

    def close(self) -> None:
        """Drop what waits; does not wait for what runs."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        while self._jobs:
            with contextlib.suppress(IndexError):  # a thread was quicker
                job = self._jobs.popleft()
                if not job.future.done():
                    job.future.set_exception(Closed())
        self._called.release(self._threads or 1)

    def _look(self) -> None:
        """Something has waited for a while."""
        self._timer = None
        if self._jobs and not self._closed:
            self._call()
            self._timer = self._loop.call_later(PACE, self._look)

    def _call(self) -> None:
        if self._working == self._size:
            return
        self._working += 1
        if self._working > self._threads:
            self._threads += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._called.release()

    def _work(self) -> None:
        """A thread's life."""
        while True:
            self._called.acquire()
            done: list[_Job] = []
            report = time.monotonic() + PACE
            while not self._closed:
                try:
                    job = self._jobs.popleft()
                except IndexError:
                    break
                if job.future.cancelled():
                    continue
                try:
                    job.result = job.work()
                except Exception as error:
                    job.error = error
                done.append(job)
                if time.monotonic() >= report:
                    self._send(done, False)
                    done = []
                    report = time.monotonic() + PACE
            self._send(done, True)
            if self._closed:
                return

    def _send(self, done: list[_Job], idle: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._report, done, idle)

    def _report(self, done: list[_Job], idle: bool) -> None:
        for job in done:
            if job.future.done():
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)
        if idle:
            self._working -= 1
            if self._jobs and not self._closed:  # they came after the thread had looked
                self._call()
