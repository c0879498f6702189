"""Listening for notifications where a pooler stands in between, from the start or shown later."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.config.types import Address
from broker.connectors import postgresql
from broker.connectors.postgresql import PostgresPool, PostgresServer

TOLD = "a pooler passes no notifications on"


class Connection:
    """The driver's, as far as listening needs it."""

    def __init__(self) -> None:
        self.asked = 0
        self.ended = False

    def add_termination_listener(self, call: Any) -> None: ...

    async def add_listener(self, channel: str, call: Any) -> None: ...

    async def fetchval(self, query: str) -> int:
        self.asked += 1
        return 1

    def terminate(self) -> None:
        self.ended = True


class Pool(PostgresPool):
    """Opens nothing real."""

    def __init__(self, pooler: bool) -> None:
        super().__init__(PostgresServer.model_validate({"dsn": "postgresql://127.0.0.1:1/d"}), size=1, timeout=1.0)
        self.opened: list[Connection] = []
        self._pooler = pooler

    async def _open_connection(self, place: Address, settings: dict[str, str]) -> Any:
        if settings and self._pooler:
            raise postgresql._NoSettings("unsupported startup parameter")
        self.opened.append(Connection())
        return self.opened[-1]


async def test_a_pooler_at_the_start_is_said_once_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(pooler=True)
    heard: list[str | None] = []
    async with asyncio.timeout(5):
        await pool.listen("changes", heard.append)
    assert [connection.ended for connection in pool.opened] == [True]
    async with asyncio.timeout(5):
        await pool.listen("changes", heard.append)
    assert len(pool.opened) == 1, "known by now, it is not even asked"
    assert heard == []
    assert caplog.text.count(TOLD) == 2


async def test_a_pooler_that_a_question_meets_ends_the_listening_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgresql, "QUIET", 0.01)
    pool = Pool(pooler=False)
    heard: list[str | None] = []
    listening = asyncio.create_task(pool.listen("changes", heard.append))
    async with asyncio.timeout(5):
        while not (pool.opened and pool.opened[0].asked > 1):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not listening.done()
        pool.meet_pooler(Address("127.0.0.1", 1), "another server's connection")
        await listening
    assert [connection.ended for connection in pool.opened] == [True]
    assert heard == [None]
    assert caplog.text.count(TOLD) == 1
