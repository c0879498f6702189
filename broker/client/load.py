"""Puts measured load on a broker: who publishes how much, what arrived, how long it took.

The load is a closed loop: a publisher waits when `window` of its messages are still under way to their subscribers, so
the figures are what the broker delivers, and a message that is missing at the end was lost, not refused in a flood.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.client.connection import Connection, Handler
from broker.mqtt.packets import Publish

Shape = Literal["publish", "subscribe", "fanout", "latency"]

_STAMP = struct.Struct(">Q")
SMALLEST = _STAMP.size
"""Bytes of the shortest payload: the time it was sent."""
_BURST = 100  # messages a publisher sends before the others get their turn
_PATIENCE = 5.0  # seconds for what is still under way when the time is up
_PUBREC, _PUBREL, _PUBCOMP = 5, 6, 7


@dataclass
class Load:
    """What to do. Rates are messages a second of all publishers together; 0 is as fast as it goes."""

    shape: Shape
    seconds: float
    clients: int
    qos: int = 0
    size: int = 64
    window: int = 1_000
    rate: float = 0.0
    topic: str = "bench"


@dataclass
class Result:
    """What happened. ``lost`` are deliveries, or for publishers alone acknowledgements, that never came."""

    seconds: float = 0.0
    sent: int = 0
    received: int = 0
    lost: int = 0
    failed: int = 0
    """Connections that could not be opened, or ended before the end."""
    times: list[float] = field(default_factory=list)
    """Seconds from sending to arrival, or of connecting, in no order."""

    def figures(self) -> dict[str, Any]:
        """The closing table: counts, rates and the distribution of times in milliseconds."""
        seconds = max(self.seconds, 1e-9)
        figures: dict[str, Any] = {
            "seconds": round(self.seconds, 3),
            "sent": self.sent,
            "sent_per_second": round(self.sent / seconds),
            "received": self.received,
            "received_per_second": round(self.received / seconds),
            "lost": self.lost,
            "failed": self.failed,
        }
        if self.times:
            ordered = sorted(self.times)
            for name, share in (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99), ("max_ms", 1.0)):
                position = min(len(ordered) - 1, int(share * len(ordered)))
                figures[name] = round(ordered[position] * 1000, 3)
        return figures


class _Publisher(Handler):
    """Publishes to one topic within a window; acknowledgements free it, or what its subscribers report."""

    def __init__(self, load: Load, receivers: int) -> None:
        self.sent = 0
        self.acknowledged = 0
        self.delivered = 0
        """Deliveries its subscribers have seen."""
        self.lost = False
        self._load = load
        self._receivers = receivers
        self._window = load.window
        self._next_id = 0
        self._room = asyncio.Event()

    @property
    def under_way(self) -> int:
        """Messages not acknowledged, or not yet with every subscriber."""
        waiting = self.sent - self.acknowledged if self._load.qos else 0
        if self._receivers:
            waiting = max(waiting, self.sent - self.delivered // self._receivers)
        return waiting

    def note(self) -> None:
        """Something arrived; goes on publishing when there is room."""
        if not self._room.is_set() and self.under_way < self._window:
            self._room.set()

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == _PUBREC and code < 0x80:
            conn.ack(_PUBREL, packet_id)
        elif code < 0x80:
            self.acknowledged += 1
            self.note()

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.lost = exc is not None
        self._room.set()

    async def run(self, conn: Connection, topic: str, until: float, rate: float) -> None:
        """Publish until the loop's clock shows ``until``."""
        loop = asyncio.get_running_loop()
        if self._load.qos:
            self._window = min(self._window, conn.receive_maximum)
        filler = b"x" * (self._load.size - SMALLEST)
        name = topic.encode()
        start = loop.time()
        while (now := loop.time()) < until and not self.lost:
            room = min(_BURST, self._window - self.under_way)
            if rate:
                room = min(room, int((now - start) * rate) + 1 - self.sent)
            for _ in range(room):
                self._send(conn, name, filler)
            if rate:
                await asyncio.sleep(max(0.0, start + self.sent / rate - loop.time()))
            elif self.under_way >= self._window:
                await self._wait(until - now)
            elif conn.congested:
                await conn.drain()
            else:
                await asyncio.sleep(0)

    def _send(self, conn: Connection, topic: bytes, filler: bytes) -> None:
        self._next_id = self._next_id % 65_535 + 1
        payload = _STAMP.pack(time.monotonic_ns()) + filler
        conn.publish(topic, payload, self._load.qos, packet_id=self._next_id if self._load.qos else 0)
        self.sent += 1

    async def _wait(self, seconds: float) -> None:
        self._room.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._room.wait()
        except TimeoutError:
            pass


class _Subscriber(Handler):
    """Counts what arrives, acknowledges it, and keeps the times when asked to."""

    def __init__(self, publisher: _Publisher, times: list[float] | None) -> None:
        self.received = 0
        self.lost = False
        self._publisher = publisher
        self._times = times

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.received += 1
        self._publisher.delivered += 1
        if self._times is not None:
            (sent,) = _STAMP.unpack_from(publish.payload)
            self._times.append((time.monotonic_ns() - sent) / 1e9)
        if publish.qos:
            conn.ack(3 + publish.qos, publish.packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == _PUBREL:
            conn.ack(_PUBCOMP, packet_id)

    def on_batch_end(self, conn: Connection) -> None:
        self._publisher.note()

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.lost = exc is not None


Progress = Callable[[float, int], None]
"""Told now and then: share of the time that is over, messages so far."""


async def put(load: Load, url: str, progress: Progress = lambda share, count: None, **options: Any) -> Result:
    """Run one load; ``options`` go to every `Connection.connect`. Raises ConnectionError when the start fails."""
    result = Result()
    receivers = {"publish": 0, "subscribe": 1, "latency": 1, "fanout": load.clients}[load.shape]
    senders = 1 if load.shape == "fanout" else load.clients
    mark = f"{time.time_ns():x}"
    connections: list[Connection] = []
    publishers: list[tuple[_Publisher, Connection, str]] = []
    subscribers: list[_Subscriber] = []
    try:
        for number in range(senders):
            topic = f"{load.topic}/{mark}/{number}"
            publisher = _Publisher(load, receivers)
            for place in range(receivers):
                subscriber = _Subscriber(publisher, result.times if load.shape == "latency" else None)
                name = f"bench-{mark}-s{number}-{place}"
                conn = await Connection.connect(url, client_id=name, handler=subscriber, **options)
                connections.append(conn)
                (code,) = await conn.subscribe([(topic, load.qos)])
                if code >= 0x80:
                    raise ConnectionError(f"the broker refuses the subscription to {topic}")
                subscribers.append(subscriber)
            conn = await Connection.connect(url, client_id=f"bench-{mark}-p{number}", handler=publisher, **options)
            connections.append(conn)
            publishers.append((publisher, conn, topic))
        await _run(load, result, publishers, subscribers, progress)
    finally:
        await asyncio.gather(*(conn.disconnect() for conn in connections))
    result.failed = sum(p.lost for p, _, _ in publishers) + sum(s.lost for s in subscribers)
    return result


async def _run(
    load: Load,
    result: Result,
    publishers: list[tuple[_Publisher, Connection, str]],
    subscribers: list[_Subscriber],
    progress: Progress,
) -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    until = start + load.seconds
    rate = load.rate / len(publishers)
    tasks = [asyncio.create_task(p.run(conn, topic, until, rate)) for p, conn, topic in publishers]
    watch = asyncio.create_task(_watch(progress, start, load.seconds, publishers))
    try:
        await asyncio.gather(*tasks)
        end = loop.time() + _PATIENCE
        while any(p.under_way for p, _, _ in publishers) and loop.time() < end:
            if any(p.lost for p, _, _ in publishers) or any(s.lost for s in subscribers):
                break
            await asyncio.sleep(0.005)
    finally:
        for task in (watch, *tasks):
            task.cancel()
    result.seconds = loop.time() - start
    for publisher, _, _ in publishers:
        result.sent += publisher.sent
        if load.shape != "publish":
            result.lost += max(0, publisher.sent * len(subscribers) // len(publishers) - publisher.delivered)
        elif load.qos:
            result.lost += publisher.sent - publisher.acknowledged
    result.received = sum(s.received for s in subscribers)


async def _watch(
    progress: Progress, start: float, seconds: float, publishers: list[tuple[_Publisher, Connection, str]]
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        count = sum(max(p.delivered, p.sent if not p._receivers else 0) for p, _, _ in publishers)
        progress(min(1.0, (loop.time() - start) / seconds), count)
        await asyncio.sleep(0.1)


async def connect_many(
    seconds: float, clients: int, url: str, progress: Progress = lambda share, count: None, **options: Any
) -> Result:
    """Connect and leave again and again, ``clients`` at a time. Raises ConnectionError when the first one fails."""
    loop = asyncio.get_running_loop()
    result = Result()
    first = await Connection.connect(url, client_id=f"bench-{time.time_ns():x}", handler=Handler(), **options)
    await first.disconnect()
    start = loop.time()
    until = start + seconds

    async def one(number: int) -> None:
        mark = f"bench-{time.time_ns():x}-{number}"
        count = 0
        while loop.time() < until:
            begin = time.monotonic()
            count += 1
            try:
                conn = await Connection.connect(url, client_id=f"{mark}-{count}", handler=Handler(), **options)
            except ConnectionError:
                result.failed += 1
                await asyncio.sleep(0.01)
                continue
            result.times.append(time.monotonic() - begin)
            result.sent += 1
            await conn.disconnect()
            progress(min(1.0, (loop.time() - start) / seconds), result.sent)

    await asyncio.gather(*(one(number) for number in range(clients)))
    result.seconds = loop.time() - start
    return result
