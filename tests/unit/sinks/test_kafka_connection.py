"""A connection that broke while nobody looked is a broken connection to the driver, on uvloop as on asyncio."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.conn import create_conn
from aiokafka.errors import IncompatibleBrokerVersion, KafkaConnectionError, KafkaError
from aiokafka.protocol.admin import ApiVersionRequest
from aiokafka.protocol.metadata import MetadataRequest

import sinks._kafka_client  # noqa: F401 (installs it)
from sinks._kafka_connection import Connection

_VERSIONS = b"\x00\x00\x00\x10\x00\x00\x00\x01\x00\x00\x00\x00\x00\x01\x00\x03\x00\x00\x00\x00"
"""The answer to ApiVersions of a broker that knows one request: Metadata, in its first version."""


class Closed:
    """A writer on uvloop whose transport has ended."""

    def write(self, data: bytes) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    def close(self) -> None:
        """It is."""


async def test_a_write_after_the_end_is_a_broken_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(_VERSIONS)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        connection = await create_conn("127.0.0.1", server.sockets[0].getsockname()[1])
        assert type(connection) is Connection
        with pytest.raises(IncompatibleBrokerVersion):  # said before anything is sent; the connection is as it was
            connection.send(Unknown())
        assert connection.connected()
        connection._writer.close()
        connection._writer = Closed()
        with pytest.raises(KafkaConnectionError, match="handler is closed"):
            connection.send(MetadataRequest([]))
        assert not connection.connected()
        await connection.close()


async def test_the_drivers_own_lets_another_error_through() -> None:
    """When this fails the driver has learnt it, and `Connection` can go."""
    connection = Connection.__base__("127.0.0.1", 1)  # `aiokafka.conn` has ours by now
    connection._versions = {3: (0, 0)}
    connection._writer = Closed()
    with pytest.raises(RuntimeError, match="handler is closed") as error:
        connection.send(MetadataRequest([]))
    assert not isinstance(error.value, KafkaError)


class Unknown(ApiVersionRequest):
    API_KEY = 9999
    ALLOW_UNKNOWN_API_VERSION = False
