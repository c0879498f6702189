"""Puts refused records where people can look at them: published to ``$dlq/<instance>``, kept by a durable queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from broker.client.connection import Connection, Handler
from broker.client.delivery import Delivery
from broker.client.session import NotTaken, Publisher
from broker.mqtt.packets import Publish
from broker.mqtt.properties import Properties, encode_properties, user_property

_log = logging.getLogger(__name__)

_METADATA = "$isthmus"
_NOBODY = 0x10  # PUBACK: no matching subscribers
_LONGEST_ERROR = 2_000
_AT_ONCE = 500


@dataclass(slots=True)
class Refused:
    """A record a destination will never take."""

    publish: Publish
    error: str
    attempts: int


class NotKept(ConnectionError):
    """A dead letter reached no durable queue; the record stays in the sink's own queue."""


class Graveyard(Protocol):
    """Where a lane sends its refused records."""

    async def bury(self, refused: list[Refused]) -> None:
        """Returns when all are kept; takes out of ``refused`` what is. Raises ConnectionError when some are left."""


class DeadLetters:
    """The publish connection of one sink. Opened for the first dead letter, shared by the sink's lanes."""

    def __init__(self, instance: str, attach: Callable[[Handler], Awaitable[Connection]]) -> None:
        self.topic = f"$dlq/{instance}"
        self._instance = instance
        self._attach = attach
        self._publisher: Publisher | None = None
        self._opening = asyncio.Lock()

    async def bury(self, refused: list[Refused]) -> None:
        """See `Graveyard`."""
        publisher = await self._open()
        while refused:
            some = refused[:_AT_ONCE]
            outcomes = await asyncio.gather(*(self._publish(publisher, r) for r in some), return_exceptions=True)
            refused[:_AT_ONCE] = [r for r, outcome in zip(some, outcomes, strict=True) if not _kept(outcome)]
            for outcome in outcomes:
                if isinstance(outcome, NotTaken):
                    raise NotKept(f"a dead letter was not kept: {outcome}") from outcome
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome == _NOBODY:
                    raise NotKept(f"no durable session is subscribed to {self.topic}, nobody would keep it")

    async def close(self) -> None:
        """Leave the broker."""
        if self._publisher is not None:
            await self._publisher.disconnect()

    async def _open(self) -> Publisher:
        async with self._opening:
            if self._publisher is None or not self._publisher.conn.open:
                publisher = Publisher()
                publisher.attach(await self._attach(publisher))
                self._publisher = publisher
            return self._publisher

    async def _publish(self, publisher: Publisher, letter: Refused) -> int:
        payload, properties = self._compose(letter, publisher.conn.maximum_packet_size)
        return await publisher.publish(self.topic, payload, 1, False, properties)

    def _compose(self, letter: Refused, room: int) -> tuple[bytes, bytes]:
        """Our properties first, so that a reader who looks for the first ``error`` finds ours."""
        publish = letter.publish
        own = [
            ("error", letter.error[:_LONGEST_ERROR]),
            ("sink", self._instance),
            ("attempts", str(letter.attempts)),
            ("topic", publish.topic.decode("utf-8", "replace")),
        ]
        theirs = publish.properties
        if isinstance(publish, Delivery):
            metadata: str | None = publish.metadata.decode("utf-8", "replace")
        else:
            metadata = next((v for k, v in (theirs and theirs.user_properties) or () if k == _METADATA), None)
        if metadata is not None:
            own.append(("metadata", metadata))
        ours = b"".join(user_property(k, v) for k, v in own)
        passed_on = _forwarded(theirs) if theirs is not None else b""
        spare = room - len(self.topic) - len(ours) - 16  # fixed header, lengths, packet id
        if len(publish.payload) + len(passed_on) <= spare:
            return publish.payload, ours + passed_on
        if len(publish.payload) <= spare:
            return publish.payload, ours
        _log.error(
            "the payload of a dead letter is cut from %d to %d bytes: the broker takes packets of %d bytes at most",
            len(publish.payload), spare, room,
        )  # fmt: skip
        ours += user_property("truncated", str(len(publish.payload)))
        return publish.payload[: max(0, spare - 32)], ours


def _kept(outcome: int | BaseException) -> bool:
    return not isinstance(outcome, BaseException) and outcome != _NOBODY


def _forwarded(properties: Properties) -> bytes:
    """What the publisher sent along, encoded again without what only our broker may write."""
    kept = Properties()
    kept.payload_format_indicator = properties.payload_format_indicator
    kept.content_type = properties.content_type
    kept.response_topic = properties.response_topic
    kept.correlation_data = properties.correlation_data
    kept.user_properties = [(k, v) for k, v in properties.user_properties or () if k != _METADATA] or None
    block = encode_properties(kept)
    start = 1
    while block[start - 1] & 0x80:
        start += 1
    return block[start:]
