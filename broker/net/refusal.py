"""Says no to the clients a full listener has no room for, in the version of MQTT they speak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.mqtt.packets import encode_connack
from broker.net.shared import Shared

PATIENCE = 5.0
"""Seconds such a client has for its CONNECT."""
QUOTA_EXCEEDED = 0x97
SERVER_UNAVAILABLE = 3
"""The return code of MQTT 3.x that comes nearest."""


class Refusal:
    """Stands where the engine's channel would: reads only as far as the protocol level, answers, closes."""

    __slots__ = ("_head", "_link", "_on_lost", "_stranger", "_strangers", "_timer", "identity")

    def __init__(self, shared: Shared, link: Any, on_lost: Callable[[], None]) -> None:
        self._link = link
        self._stranger = link
        self._strangers = shared.strangers
        self._strangers.add(link)
        self._on_lost = on_lost
        self._head = b""
        self._timer = shared.loop.call_later(PATIENCE, link.abort)
        self.identity: dict[str, str] | None = None

    def feed(self, data: bytes) -> None:
        """Handle the bytes of one read."""
        if self._link is None:
            return
        self._head = (self._head + data)[:16]
        version = protocol_level(self._head)
        if version is None:
            return
        if version:
            code = QUOTA_EXCEEDED if version == 5 else SERVER_UNAVAILABLE
            self._link.write(encode_connack(version, False, code))
        self._link.close()
        self._link = None

    def lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self._timer.cancel()
        self._link = None
        self._strangers.discard(self._stranger)

    data_received = feed

    def connection_lost(self, error: Exception | None) -> None:
        """What a transport calls in the place of `lost`."""
        self.lost(error)
        self._on_lost()

    def eof_received(self) -> None:
        """The transport closes by itself."""

    def pause_writing(self) -> None:
        """There is nothing more to write."""

    def resume_writing(self) -> None:
        """There is nothing more to write."""


def protocol_level(head: bytes) -> int | None:
    """The level in the first bytes of a CONNECT: 3, 4 or 5; 0 when it is something else, None when more is needed."""
    if not head:
        return None
    if head[0] != 0x10:
        return 0
    at = 1
    while at < len(head) and head[at] & 0x80 and at < 4:
        at += 1
    name = head[at + 1 :]
    for known, levels in ((b"\x00\x04MQTT", (4, 5)), (b"\x00\x06MQIsdp", (3,))):
        if name.startswith(known) and len(name) > len(known):
            level = name[len(known)] & 0x7F  # the highest bit marks a bridge
            return level if level in levels else 0
        if known.startswith(name[: len(known)]) and len(name) <= len(known):
            return None
    return 0
