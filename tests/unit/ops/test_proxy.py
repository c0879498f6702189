"""The fault proxy does what tests rely on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from tests.proxy import Proxy


@pytest.fixture
async def echo() -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
            writer.write(b"<end>")
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
    return reader, writer


async def test_cut_ends_open_connections_and_takes_new_ones(echo: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        reader, writer = await connect(proxy)
        assert await proxy.cut() == 1
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        _, writer = await connect(proxy)
        writer.close()
        assert (proxy.counts.cut, proxy.counts.accepted) == (1, 2)


async def test_reset_is_seen_as_a_reset(echo: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        reader, writer = await connect(proxy)
        assert await proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
        writer.close()


async def test_the_black_hole_swallows_and_keeps_the_connection(echo: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        reader, writer = await connect(proxy)
        proxy.black_hole = True
        writer.write(b"lost")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        assert (proxy.counts.swallowed, proxy.connections) == (4, 1)
        writer.close()


async def test_cut_after_lets_exactly_that_many_bytes_through(echo: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        reader, writer = await connect(proxy)
        proxy.cut_after(3, "down")
        writer.write(b"abcdef")
        assert await asyncio.wait_for(reader.read(), 5) == b"abc"
        writer.close()
        assert proxy.counts.bytes_down == 8


async def test_half_close_leaves_the_way_back_open(echo: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        reader, writer = await connect(proxy)
        assert await proxy.half_close("up") == 1
        assert await asyncio.wait_for(reader.read(), 5) == b"<end>"
        writer.close()


async def test_delay_and_stall_hold_data_back_without_losing_it(echo: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        reader, writer = await connect(proxy)
        proxy.delay = 0.1
        began = asyncio.get_running_loop().time()
        writer.write(b"late")
        assert await asyncio.wait_for(reader.readexactly(4), 5) == b"late"
        assert asyncio.get_running_loop().time() - began >= 0.2
        proxy.delay = 0
        proxy.stall()
        writer.write(b"held")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(4), 0.1)
        proxy.flow()
        assert await asyncio.wait_for(reader.readexactly(4), 5) == b"held"
        writer.close()


async def test_down_refuses_and_up_takes_the_same_port_again(echo: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        port = proxy.port
        await proxy.down()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await proxy.up()
        assert proxy.port == port
        _, writer = await connect(proxy)
        writer.close()


@pytest.mark.parametrize("turns", range(6))
async def test_down_ends_a_connection_that_is_just_being_taken(echo: int, turns: int) -> None:
    async with Proxy("127.0.0.1", echo) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.setblocking(False)
            for _ in range(turns):
                await asyncio.sleep(0)
            await proxy.down()
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 5) == b""
