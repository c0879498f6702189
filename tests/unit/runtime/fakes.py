"""A broker that keeps sessions and nothing else, on a Unix socket, and sinks whose behaviour a test writes down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from broker.extend.sink import Record
from broker.mqtt import packets
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Publish
from broker.mqtt.properties import user_property


async def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that tells nobody when it happens."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Session:
    """What the broker remembers of one client id."""

    def __init__(self) -> None:
        self.unanswered: dict[int, tuple[bytes, bytes, int, bytes]] = {}
        self.released: set[int] = set()
        self.answers: list[tuple[int, int]] = []
        """(packet type, packet id) in the order they came."""
        self.writer: asyncio.StreamWriter | None = None
        self.last_id = 0
        self.connects = 0


class FakeBroker:
    """Delivers what the test says, answers what is published, counts who comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"unix://{path}"
        self.sessions: dict[str, Session] = {}
        self.published: list[tuple[str, Publish]] = []
        self.refuse_publish: Callable[[Publish], int] = lambda publish: 0
        self.ids_in_order: list[str] = []
        self.news = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for session in self.sessions.values():
            if session.writer is not None:
                session.writer.close()

    def session(self, client_id: str) -> Session:
        return self.sessions.setdefault(client_id, Session())

    def deliver(self, client_id: str, topic: str, payload: bytes, qos: int = 1, properties: bytes = b"") -> int:
        session = self.session(client_id)
        session.last_id = session.last_id % 65_535 + 1 if qos else session.last_id
        packet_id = session.last_id if qos else 0
        if qos:
            session.unanswered[packet_id] = (topic.encode(), payload, qos, properties)
        if session.writer is not None:
            session.writer.write(
                packets.encode_publish(topic.encode(), payload, qos, False, False, packet_id, 5, properties)
            )
        return packet_id

    def drop(self, client_id: str) -> None:
        """Cut the connection; the session stays."""
        writer = self.session(client_id).writer
        assert writer is not None
        writer.transport.abort()

    async def until(self, happened: Callable[[], bool], seconds: float = 10) -> None:
        """Wait for something a packet brings about."""
        async with asyncio.timeout(seconds), self.news:
            await self.news.wait_for(happened)

    async def until_attached(self, client_id: str, times: int = 1) -> None:
        await self.until(
            lambda: self.session(client_id).connects >= times and self.session(client_id).writer is not None
        )

    async def until_answered(self, client_id: str) -> None:
        await self.until(lambda: client_id in self.sessions and not self.sessions[client_id].unanswered)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        frames = FrameReader(1 << 28)
        session: Session | None = None
        client_id = ""
        try:
            while data := await reader.read(1 << 16):
                for first, body in frames.feed(data):
                    if first >> 4 == 1:
                        client_id = packets.decode_connect(body).client_id
                        session = self._attach(client_id, writer)
                    elif session is not None:
                        self._on_packet(client_id, session, first, body)
                async with self.news:
                    self.news.notify_all()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            if session is not None and session.writer is writer:
                session.writer = None
            writer.close()
            with contextlib.suppress(RuntimeError):
                async with self.news:
                    self.news.notify_all()

    def _attach(self, client_id: str, writer: asyncio.StreamWriter) -> Session:
        present = client_id in self.sessions
        session = self.session(client_id)
        session.connects += 1
        self.ids_in_order.append(client_id)
        if session.writer is not None:
            session.writer.close()
        session.writer = writer
        writer.write(packets.encode_connack(5, present, 0))
        for packet_id, (topic, payload, qos, properties) in session.unanswered.items():
            again = session.connects > 1
            writer.write(packets.encode_publish(topic, payload, qos, False, again, packet_id, 5, properties))
        for packet_id in session.released:
            writer.write(packets.encode_ack(6, packet_id, 5))
        return session

    def _on_packet(self, client_id: str, session: Session, first: int, body: bytes) -> None:
        kind = first >> 4
        assert session.writer is not None
        if kind == 3:
            publish = packets.decode_publish(first, body, 5)
            self.published.append((client_id, publish))
            if publish.qos == 1:
                session.writer.write(packets.encode_ack(4, publish.packet_id, 5, self.refuse_publish(publish)))
        elif 4 <= kind <= 7:
            packet_id = packets.decode_ack(body, 5, kind).packet_id
            session.answers.append((kind, packet_id))
            if kind == 5:
                session.unanswered.pop(packet_id, None)
                session.released.add(packet_id)
                session.writer.write(packets.encode_ack(6, packet_id, 5))
            elif kind == 7:
                session.released.discard(packet_id)
            else:
                session.unanswered.pop(packet_id, None)
        elif kind == 8:
            subscribe = packets.decode_subscribe(body, 5)
            session.writer.write(packets.encode_suback(subscribe.packet_id, 5, [f[1] & 3 for f in subscribe.filters]))
        elif kind == 12:
            session.writer.write(packets.encode_pingresp())


@contextlib.asynccontextmanager
async def fake_broker(path: Path) -> AsyncIterator[FakeBroker]:
    broker = FakeBroker(path)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


def metadata(clientid: str = "device", msgid: str = "0" * 32, **more: Any) -> bytes:
    """What our broker adds to a message."""
    import json

    value = {
        "c": clientid,
        "u": None,
        "a": "127.0.0.1",
        "t": 1,
        "i": msgid,
        "q": 1,
        "r": 0,
        "o": None,
        "h": 0,
        "n": "n",
    }
    return user_property("$isthmus", json.dumps(value | more))


class FakeSink:
    """Remembers what it stored; `errors` are raised first, one a write."""

    def __init__(self) -> None:
        self.stored: list[Record] = []
        self.batches: list[int] = []
        self.errors: list[Exception] = []
        self.judge: Callable[[Sequence[Record]], None] = lambda batch: None
        self.check_error: Exception | None = None
        self.checks = 0
        self.closed = False
        self.hold: asyncio.Event | None = None
        self.entered = asyncio.Event()

    @property
    def payloads(self) -> list[bytes]:
        return [record.payload for record in self.stored]

    async def write(self, batch: Sequence[Record]) -> None:
        self.entered.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.judge(batch)
        self.batches.append(len(batch))
        self.stored.extend(batch)

    async def check(self) -> None:
        self.checks += 1
        if self.check_error is not None:
            raise self.check_error

    async def close(self) -> None:
        self.closed = True
