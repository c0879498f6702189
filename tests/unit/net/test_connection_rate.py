"""`max_connection_rate`: a listener takes so many connections a second, whatever its kind and loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.unit.net.fakes import Engine, config, until

PEERS = 20


@pytest.fixture
def crowd() -> Iterator[Any]:
    """`crowd(address)`: twenty peers that connect at once."""
    with ExitStack() as stack:

        def come(address: Any) -> None:
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            for _ in range(PEERS):
                peer = stack.enter_context(socket.socket(family))
                peer.connect(address)

        yield come


async def seconds(engine: Engine, before: int = 0) -> float:
    """How long it takes until all of a crowd are there."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await until(lambda: len(engine.channels) == before + PEERS)
    return loop.time() - began


async def test_r03_a_limited_listener_takes_its_time_and_refuses_nobody(
    listeners: Any, engine: Engine, crowd: Any
) -> None:
    listener = await listeners.open("tcp", config("tcp", max_connection_rate=40))
    crowd(("127.0.0.1", listener.port))
    assert await seconds(engine) >= 0.3  # 19 of them at 40 a second, a tenth of a second's worth at once


async def test_a_unix_listener_is_limited_too(listeners: Any, engine: Engine, crowd: Any, tmp_path: Any) -> None:
    await listeners.open("unix", config("unix", path=str(tmp_path / "s"), max_connection_rate=40))
    crowd(str(tmp_path / "s"))
    assert await seconds(engine) >= 0.3


async def test_the_limit_comes_and_goes_with_a_reload(listeners: Any, engine: Engine, crowd: Any) -> None:
    await listeners.apply({"a": config("tcp")})
    listener = listeners["a"]
    sockets = list(listener.sockets)
    crowd(("127.0.0.1", listener.port))
    await seconds(engine)
    await listeners.apply({"a": config("tcp", max_connection_rate=40)})
    crowd(("127.0.0.1", listener.port))
    assert await seconds(engine, PEERS) >= 0.3
    await listeners.apply({"a": config("tcp")})
    unlimited = []
    for there in range(2 * PEERS, 5 * PEERS, PEERS):
        crowd(("127.0.0.1", listener.port))
        unlimited.append(await seconds(engine, there))
    assert min(unlimited) < 0.3
    assert list(listener.sockets) == sockets
