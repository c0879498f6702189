"""Pipelines of the Redis pool against servers that end a connection, or cannot be written to any more."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest

pytest.importorskip("redis")

from redis import exceptions
from redis.crc import key_slot

from broker.connectors.redis import RedisPool, RedisServer

HALF = 8192
LOW = next(f"k{n}" for n in range(100) if key_slot(b"k%d" % n) < HALF)
HIGH = next(f"k{n}" for n in range(100) if key_slot(b"k%d" % n) >= HALF)


class Node:
    """Answers a command by its name, +OK where nothing is said; None ends the connection with a reset."""

    def __init__(self) -> None:
        self.answers: dict[bytes, bytes | None] = {}
        self.port = 0
        self.writers: list[asyncio.StreamWriter] = []
        """Connections on which something was written."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Node]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self.writers:
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readline():
                words = []
                for _ in range(int(head[1:])):
                    size = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(size + 2))[:-2])
                if words[0] == b"SET" and writer not in self.writers:
                    self.writers.append(writer)
                answer = self.answers.get(words[0], b"+OK\r\n")
                if answer is None:
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                    return
                writer.write(answer)
        writer.close()


async def test_a_node_that_resets_its_connection_is_a_lost_node_and_the_others_are_written() -> None:
    """Only what it was sent comes again."""
    async with Node().running() as first, Node().running() as second:
        ranges = [(0, HALF - 1, first.port), (HALF, 16383, second.port)]
        slots = b"*2\r\n" + b"".join(
            b"*3\r\n:%d\r\n:%d\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % entry for entry in ranges
        )
        first.answers = {b"CLUSTER": slots}
        second.answers = {b"CLUSTER": slots, b"SET": None}
        keys = {"mode": "cluster", "servers": [f"127.0.0.1:{first.port}"]}
        pool = RedisPool(RedisServer.model_validate(keys), size=2, timeout=5.0, again=0)
        try:
            answers = await pool.store([("SET", LOW, "1"), ("SET", HIGH, "2"), ("SET", LOW, "3")])
        finally:
            await pool.close()
    assert [answers[0], answers[2]] == [b"OK", b"OK"]
    assert isinstance(answers[1], exceptions.ConnectionError)


async def test_a_master_that_only_reads_is_looked_up_anew() -> None:
    """A connection sentinels led to is made again, and they name the new master."""
    async with Node().running() as node:
        node.answers = {b"SET": b"-READONLY You can't write against a read only replica.\r\n"}
        keys = {"servers": [f"127.0.0.1:{node.port}"]}
        pool = RedisPool(RedisServer.model_validate(keys), size=1, timeout=5.0, again=0)
        try:
            for _ in range(2):
                [answer] = await pool.store([("SET", "a", "1")])
                assert isinstance(answer, exceptions.ReadOnlyError)
            assert len(node.writers) == 2
            node.answers = {}
            for _ in range(2):
                assert await pool.store([("SET", "a", "1")]) == [b"OK"]
            assert len(node.writers) == 3, "one that works is kept"
        finally:
            await pool.close()
