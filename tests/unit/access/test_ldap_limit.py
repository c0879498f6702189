"""Wrong passwords are kept from a directory that would lock the account."""

from __future__ import annotations

import asyncio

import pytest

from auth import _ldap_limit
from auth._ldap_limit import BindLimit
from broker.connectors.ldap import BindResult
from broker.extend.auth import BackendUnavailable

RIGHT = BindResult(True, 0, "accepted")
WRONG = BindResult(False, 49, "wrong password")


class Directory:
    """Counts what it is asked; answers when told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.now = 0.0
        self.answer: BindResult | Exception = WRONG
        self.gate = asyncio.Event()
        self.gate.set()

    async def bind(self) -> BindResult:
        self.asked += 1
        answer = self.answer
        await self.gate.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def limit(directory: Directory) -> BindLimit:
    return BindLimit(3, 300, lambda: directory.now)


async def test_the_fourth_wrong_password_is_not_asked_about(limit: BindLimit, directory: Directory) -> None:
    answers = [await limit.bind("alice", directory.bind) for _ in range(5)]
    assert answers == [WRONG, WRONG, WRONG, None, None]
    assert directory.asked == 3
    assert limit.reached("alice")
    assert await limit.bind("bob", directory.bind) is WRONG, "another user is another account"


async def test_it_is_asked_again_when_the_first_is_old_enough(limit: BindLimit, directory: Directory) -> None:
    for _ in range(3):
        await limit.bind("alice", directory.bind)
        directory.now += 100
    assert await limit.bind("alice", directory.bind) is WRONG, "the first was 300 s ago"
    assert await limit.bind("alice", directory.bind) is None, "three in the last 300 s again"


async def test_a_success_starts_over(limit: BindLimit, directory: Directory) -> None:
    for _ in range(3):
        for _ in range(2):
            assert await limit.bind("alice", directory.bind) is WRONG
        directory.answer = RIGHT
        assert await limit.bind("alice", directory.bind) is RIGHT
        directory.answer = WRONG
    assert len(limit) == 0


async def test_those_at_the_same_time_are_counted_too(limit: BindLimit, directory: Directory) -> None:
    directory.gate.clear()
    tasks = [asyncio.create_task(limit.bind("alice", directory.bind)) for _ in range(20)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert directory.asked == 3
    directory.gate.set()
    answers = await asyncio.gather(*tasks)
    assert answers.count(None) == 17
    assert directory.asked == 3


async def test_many_devices_with_one_name_and_the_right_password_all_get_in(
    limit: BindLimit, directory: Directory
) -> None:
    directory.answer = RIGHT
    assert await asyncio.gather(*(limit.bind("alice", directory.bind) for _ in range(50))) == [RIGHT] * 50


async def test_hanging_up_does_not_keep_an_attempt_from_counting(limit: BindLimit, directory: Directory) -> None:
    for _ in range(3):
        directory.gate.clear()
        task = asyncio.create_task(limit.bind("alice", directory.bind))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        directory.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await limit.bind("alice", directory.bind) is None
    assert directory.asked == 3


async def test_one_who_leaves_the_queue_takes_no_place(limit: BindLimit, directory: Directory) -> None:
    directory.gate.clear()
    tasks = [asyncio.create_task(limit.bind("alice", directory.bind)) for _ in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks[3].cancel()
    directory.answer = RIGHT
    directory.gate.set()
    assert (await asyncio.gather(*tasks[:3])) == [WRONG] * 3
    with pytest.raises(asyncio.CancelledError):
        await tasks[3]
    assert directory.asked == 3


async def test_a_directory_that_fails_is_not_a_wrong_password(limit: BindLimit, directory: Directory) -> None:
    directory.answer = BackendUnavailable("down")
    for _ in range(5):
        with pytest.raises(BackendUnavailable):
            await limit.bind("alice", directory.bind)
    assert len(limit) == 0


async def test_without_a_limit_everything_is_asked(directory: Directory) -> None:
    limit = BindLimit(0, 300)
    assert [await limit.bind("alice", directory.bind) for _ in range(20)] == [WRONG] * 20
    assert not limit.reached("alice")


async def test_what_is_remembered_is_bounded(
    limit: BindLimit, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ldap_limit, "SIZE", 10)
    for number in range(50):
        await limit.bind(f"user{number}", directory.bind)
    assert len(limit) == 10
    for _ in range(2):
        await limit.bind("user49", directory.bind)
    assert limit.reached("user49"), "the latest are kept"
