"""A bridge under test: its runner, a real broker as its local side, and clients that keep a ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from bridges.mqtt import BACKEND, MqttConfig
from broker.client.connection import Connection, Handler, connect
from broker.client.session import Publisher
from broker.extend.session import SessionSpec
from broker.mqtt.packets import Publish
from broker.runtime.bridge_runner import BridgeRunner
from tests.ledger import Ledger

FOREVER = 0xFFFFFFFF
NAME = "hq"


def configure(**keys: Any) -> MqttConfig:
    """A bridge's configuration named `hq` with quick restarts; `topics` as dictionaries or (filter, direction, qos)."""
    lines = [
        line if isinstance(line, dict) else dict(zip(("filter", "direction", "qos"), line, strict=False))
        for line in keys.pop("topics", [("#", "out", 2)])
    ]
    values = {"restart": {"base": "50ms", "cap": "100ms"}, "clientid": "region-1", "notifications": False, **keys}
    config = MqttConfig.model_validate({**values, "topics": lines})
    config.named(NAME)
    return config


class Attach:
    """Attaches to sessions that a foreign MQTT 5 broker keeps, as the internal listener would."""

    trusted = False
    in_order = True
    longest_wait = 0.2

    def __init__(self, url: str) -> None:
        self.url = url

    async def __call__(self, instance: str, part: str, handler: Handler, spec: SessionSpec) -> Connection:
        return await connect(
            self.url,
            client_id=f"isthmus/{instance}/{part}",
            handler=handler,
            clean_start=False,
            session_expiry=FOREVER,
            timeout=5.0,
        )


async def create_sessions(url: str, spec: SessionSpec) -> None:
    """What the broker does when a configuration is applied: the sessions and the subscriptions of the instance."""
    attach = Attach(url)
    inlet = await attach(NAME, "in", Handler(), spec)
    await inlet.disconnect()
    outlet = await attach(NAME, "0", Handler(), spec)
    if spec.filters:
        codes = await outlet.subscribe([(f, qos | 4 | 8) for f, qos in spec.filters])
        assert codes == [qos for _, qos in spec.filters]
    await outlet.disconnect()


@asynccontextmanager
async def running(config: MqttConfig, url: str, *, created_at: str | None = None) -> AsyncIterator[BridgeRunner]:
    """The bridge between the broker at ``url`` and its remote; sessions are made directly at ``created_at``."""
    await create_sessions(created_at or url, config.session())
    runner = BridgeRunner(BACKEND, config, Attach(url), "node-a")
    runner.start()
    try:
        yield runner
    finally:
        await runner.close(0)


async def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait for ``condition``; the failure says what never happened."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        assert loop.time() < end, f"never happened within {seconds} s: {what}"
        await asyncio.sleep(0.01)


async def connected(runner: BridgeRunner, seconds: float = 10.0) -> None:
    """Wait until both sides are joined."""
    await until(lambda: runner.status()["state"] == "running", f"connected, but: {runner.status()}", seconds)


class Receiver(Handler):
    """Acknowledges everything and keeps it."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.messages: list[Publish] = []
        self.ledger = ledger

    @property
    def seen(self) -> list[tuple[str, bytes]]:
        """Topic and payload of every message, in order."""
        return [(m.topic.decode(), m.payload) for m in self.messages]

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.messages.append(publish)
        if self.ledger is not None:
            self.ledger.arrived(publish.payload)
        if publish.qos:
            conn.ack(3 + publish.qos, publish.packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == 6:
            conn.ack(7, packet_id)


@asynccontextmanager
async def receiver(
    url: str, *filters: str, qos: int = 2, ledger: Ledger | None = None, **options: Any
) -> AsyncIterator[Receiver]:
    """A subscriber at ``url``; retain flags come as published."""
    handler = Receiver(ledger)
    conn = await connect(url, client_id=f"receiver-{id(handler)}", handler=handler, **options)
    await conn.subscribe([(f, qos | 8) for f in filters])
    try:
        yield handler
    finally:
        await conn.disconnect()


@asynccontextmanager
async def sender(url: str, **options: Any) -> AsyncIterator[Publisher]:
    """A publisher at ``url``."""
    publisher = Publisher()
    publisher.attach(await connect(url, client_id=f"sender-{id(publisher)}", handler=publisher, **options))
    try:
        yield publisher
    finally:
        await publisher.disconnect()


async def stream(
    publisher: Publisher, ledger: Ledger, name: str, topic: str, qos: int, pace: Callable[[], Awaitable[bool]]
) -> None:
    """Publish numbered messages until ``pace`` says stop, and note which were acknowledged."""
    pending: set[asyncio.Task[None]] = set()

    async def one(number: int, payload: bytes) -> None:
        await publisher.publish(topic, payload, qos)
        ledger.acknowledged(name, number)

    while await pace():
        number, payload = ledger.next(name)
        task = asyncio.create_task(one(number, payload))
        pending.add(task)
        task.add_done_callback(pending.discard)
    await asyncio.gather(*pending)
