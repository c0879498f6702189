"""A transport that goes nowhere, and a connection that runs on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.client import connection
from broker.client.connection import Connection, Handler
from broker.mqtt import packets
from broker.mqtt.framing import FrameReader
from broker.mqtt.properties import Properties


class FakeLink:
    """Collects what is written; the test plays the broker."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self.protocol = protocol
        self.writes: list[bytes] = []
        self.closed = False
        self.aborted = False
        self._frames = FrameReader(1 << 28)

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        if not self.aborted:
            self.aborted = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "sockname" else default

    def taken(self) -> list[tuple[int, bytes]]:
        """The packets written since the last call: first byte and body."""
        writes, self.writes = self.writes, []
        return self._frames.feed(b"".join(writes))


class Recorder(Handler):
    """Remembers every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_publish(self, conn: Connection, publish: packets.Publish) -> None:
        self.calls.append(("publish", publish.topic, publish.payload, publish.qos, publish.packet_id))

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        self.calls.append(("ack", packet_type, packet_id, code))

    def on_batch_end(self, conn: Connection) -> None:
        self.calls.append(("end",))

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.calls.append(("lost", exc))


async def tick() -> None:
    """Let what was put off to the end of this tick happen."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def replace_link(monkeypatch: pytest.MonkeyPatch) -> list[FakeLink]:
    """From here on `connect` opens fake links, which are added to the list."""
    links: list[FakeLink] = []

    async def open_link(address: object, protocol: asyncio.Protocol, tls: object, bind: object) -> FakeLink:
        link = FakeLink(protocol)
        links.append(link)
        protocol.connection_made(link)  # type: ignore[arg-type]
        return link

    monkeypatch.setattr(connection, "open_link", open_link)
    return links


async def connected(
    links: list[FakeLink],
    handler: Handler,
    *,
    version: int = 5,
    properties: Properties | None = None,
    session_present: bool = False,
    **options: Any,
) -> tuple[Connection, FakeLink]:
    """A connection whose CONNACK has come; its CONNECT stays in the link to be `taken`."""
    task = asyncio.ensure_future(
        Connection.connect("mqtt://x", client_id="c", handler=handler, version=version, **options)
    )
    while not links or not links[-1].writes:  # noqa: ASYNC110
        await asyncio.sleep(0)
    link = links[-1]
    link.protocol.data_received(packets.encode_connack(version, session_present, 0, properties))
    return await task, link
