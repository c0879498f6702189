"""Threads for short work: what is asked is answered, whoever blocks, leaves or fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from auth import _crew
from auth._crew import Closed, Crew


@pytest.fixture
def threads() -> Iterator[list[threading.Thread]]:
    """Those of a crew named "test"; they end with it."""
    found: list[threading.Thread] = []
    yield found
    for thread in found:
        thread.join(5)
        assert not thread.is_alive()


def those(threads: list[threading.Thread]) -> int:
    threads[:] = [thread for thread in threading.enumerate() if thread.name.startswith("test-")]
    return len(threads)


async def test_each_gets_its_own_answer_or_error(threads: list[threading.Thread]) -> None:
    crew = Crew(4, "test")

    def work(number: int) -> int:
        if number % 7 == 0:
            raise ValueError(str(number))
        return number

    async def one(number: int) -> int:
        await asyncio.sleep(number % 5 / 1_000)
        return await crew.do(lambda: work(number))

    answers = await asyncio.gather(*(one(number) for number in range(1_000)), return_exceptions=True)
    for number, answer in enumerate(answers):
        assert answer == number if number % 7 else str(answer) == str(number)
    assert 1 <= those(threads) <= 4
    crew.close()


async def test_quick_work_takes_one_thread(threads: list[threading.Thread], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_crew, "PACE", 5.0)  # however slowly it is done here
    crew = Crew(4, "test")
    for _ in range(50):
        await crew.do(lambda: None)
    assert those(threads) == 1
    crew.close()


async def test_who_blocks_holds_up_nobody_and_no_more_work_than_there_are_threads(
    threads: list[threading.Thread],
) -> None:
    crew = Crew(3, "test")
    go, lock = threading.Event(), threading.Lock()
    running = most = 0

    def block() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        go.wait(10)
        with lock:
            running -= 1

    blocked = [asyncio.create_task(crew.do(block)) for _ in range(2)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(crew.do(lambda n=n: n) for n in range(100))) == list(range(100))  # type: ignore[misc]
    blocked += [asyncio.create_task(crew.do(block)) for _ in range(6)]
    async with asyncio.timeout(5):
        while running < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert running == most == 3
    go.set()
    await asyncio.gather(*blocked)
    assert most == 3
    assert those(threads) == 3
    crew.close()


async def test_what_nobody_waits_for_is_not_begun(threads: list[threading.Thread]) -> None:
    crew = Crew(1, "test")
    go, done = threading.Event(), list[int]()
    first = asyncio.create_task(crew.do(lambda: go.wait(10)))
    await asyncio.sleep(0.02)
    left = [asyncio.create_task(crew.do(lambda n=n: done.append(n))) for n in range(5)]  # type: ignore[misc]
    await asyncio.sleep(0)
    for task in left[:4]:
        task.cancel()
    go.set()
    await asyncio.gather(first, *left, return_exceptions=True)
    assert done == [4]
    those(threads)
    crew.close()


async def test_closing_drops_what_waits_and_does_not_wait_for_what_runs(threads: list[threading.Thread]) -> None:
    crew = Crew(1, "test")
    begun, go = threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return go.wait(10)

    running = asyncio.create_task(crew.do(work))
    async with asyncio.timeout(5):
        while not begun.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(crew.do(lambda: None)) for _ in range(3)]
    await asyncio.sleep(0)
    began = time.monotonic()
    crew.close()
    assert time.monotonic() - began < 5, "not 10"
    for task in waiting:
        with pytest.raises(Closed):
            await task
    with pytest.raises(Closed):
        await crew.do(lambda: None)
    go.set()
    assert await running is True
    those(threads)
