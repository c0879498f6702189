"""Publishing with acknowledgement: packet identifiers, the window, and who waits for which answer."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from broker.client.connection import Connection, Handler
from broker.client.errors import reason
from broker.mqtt.codes import PacketType

_PUBREC, _PUBREL, _PUBCOMP = PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP


class NotTaken(Exception):
    """The broker answered a PUBLISH with a refusal; `code` is its reason."""

    def __init__(self, topic: str, code: int) -> None:
        self.code = code
        super().__init__(f"the broker refused a message to {topic}: {reason(code)}")


class Publisher(Handler):
    """Publishes over one connection and waits for what the broker says.

    It is the connection's handler, so it is made first: ``publisher = await Publisher.connect(url, client_id=…)``, or
    ``publisher = Publisher(); publisher.attach(await open_somehow(publisher))``. It holds no session state: when the
    connection ends, everything unanswered fails with ConnectionError and the caller decides what to send again.
    """

    def __init__(self) -> None:
        self._conn: Connection | None = None
        self._waiting: dict[int, tuple[asyncio.Future[int], str]] = {}
        self._slots: deque[asyncio.Future[None]] = deque()
        self._last_id = 0

    @classmethod
    async def connect(cls, url: str, **options: Any) -> Publisher:
        """`Connection.connect` with this as its handler; the same arguments, the same errors."""
        publisher = cls()
        publisher.attach(await Connection.connect(url, handler=publisher, **options))
        return publisher

    def attach(self, conn: Connection) -> None:
        """Use ``conn``, which was opened with this as its handler."""
        self._conn = conn

    @property
    def conn(self) -> Connection:
        """The connection; raises ConnectionError before `attach`."""
        if self._conn is None:
            raise ConnectionError("the publisher has no connection")
        return self._conn

    @property
    def in_flight(self) -> int:
        """Messages the broker has not acknowledged yet."""
        return len(self._waiting)

    async def publish(
        self, topic: str, payload: bytes, qos: int = 1, retain: bool = False, properties: bytes = b""
    ) -> int:
        """Returns the reason code (below 0x80) once the broker is responsible for the message; QoS 0: once written.

        Waits while the broker's Receive Maximum is used up. Raises NotTaken when the broker refuses the message and
        ConnectionError when the connection ends first: the message may have arrived all the same.
        """
        conn = self.conn
        if qos == 0:
            conn.publish(topic, payload, 0, retain, properties)
            await conn.drain()
            return 0
        while len(self._waiting) >= conn.receive_maximum:  # [MQTT-3.3.4-9]
            slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._slots.append(slot)
            try:
                await slot
            except asyncio.CancelledError:
                if slot.done():
                    self._wake_one()  # it was ours, somebody else may use it
                raise
        if not conn.open:
            raise ConnectionError("the connection is closed")
        packet_id = self._take_id()
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[packet_id] = (answer, topic)
        conn.publish(topic, payload, qos, retain, properties, packet_id)
        return await answer

    async def disconnect(self) -> None:
        """Leave with DISCONNECT."""
        if self._conn is not None:
            await self._conn.disconnect()

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == _PUBREC and code < 0x80:
            conn.ack(_PUBREL, packet_id)  # [MQTT-4.3.3-4]
            return
        waiting = self._waiting.pop(packet_id, None)
        if waiting is not None:
            answer, topic = waiting
            if not answer.done():
                if code >= 0x80:
                    answer.set_exception(NotTaken(topic, code))
                else:
                    answer.set_result(code)
            self._wake_one()

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        waiting, self._waiting = self._waiting, {}
        error = f"the connection ended before the acknowledgement: {exc or 'closed'}"
        for answer, _ in waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionError(error))
        while self._slots:
            self._wake_one()

    def _wake_one(self) -> None:
        while self._slots:
            slot = self._slots.popleft()
            if not slot.done():
                slot.set_result(None)
                return

    def _take_id(self) -> int:
        while True:
            self._last_id = self._last_id % 65_535 + 1
            if self._last_id not in self._waiting:
                return self._last_id  # [MQTT-2.2.1-3]
