"""Every test runs on uvloop and on plain asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvloop

from broker.net.listeners import Listeners
from tests.unit.net.fakes import Authority, Client, Engine


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def listeners(engine: Engine, tmp_path: Path) -> AsyncIterator[Listeners]:
    opened = Listeners(engine, tmp_path)
    yield opened
    await opened.close_all(within=0.05)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Any]]:
    """`client = await connect(listener)`: connected to it, closed with the test."""
    clients: list[Client] = []

    async def connect_to(listener: Any, **options: Any) -> Client:
        if listener.port:
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, **options)
        else:
            reader, writer = await asyncio.open_unix_connection(listener.address, **options)
        clients.append(Client(reader, writer))
        return clients[-1]

    yield connect_to
    for client in clients:
        client.writer.transport.abort()
    await asyncio.sleep(0)
