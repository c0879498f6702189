"""A byte-stream connection: TCP, TLS or a Unix socket. It only forwards; the protocol is the channel's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from broker.net.admission import Admission

TLS_HANDSHAKE = 0x16
HTTP_METHODS = (b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"CONN", b"PRI ")


def foreign_speech(data: bytes, secure: bool) -> str | None:
    """What a peer speaks instead of MQTT, judged by its first bytes; None when it may be MQTT."""
    if data[0] == TLS_HANDSHAKE and not secure:
        return "sent a TLS hand-shake to a port without TLS"
    if data[:4] in HTTP_METHODS:
        return "sent an HTTP request to an MQTT port"
    return None


def peer_of(address: Any) -> str:
    """``ip:port``; IPv6 without brackets, so that what precedes the last colon is the address."""
    if not isinstance(address, tuple) or len(address) < 2:
        return "unknown:0"
    return f"{address[0]}:{address[1]}"


class Connection(asyncio.Protocol):
    """The transport is handed to the engine as it is, and after the first read calls `channel.feed` without us."""

    __slots__ = ("channel", "data_received", "doomed", "listener", "peer", "since", "transport")

    channel: Any
    data_received: Callable[[bytes], None]  # type: ignore[assignment]  # a slot, so that it can become the channel's
    transport: Any

    def __init__(self, listener: Admission, since: float, peer: str) -> None:
        """`since` is when the kernel gave us the connection; an empty `peer` is asked of the transport."""
        self.listener = listener
        self.since = since
        self.peer = peer
        self.channel = None
        self.doomed = False
        self.data_received = self._on_first_read

    def connection_made(self, transport: Any) -> None:
        """Open the channel; its deadline counts from the accept. A connection doomed from the start is one too many."""
        self.transport = transport
        if self.doomed:
            transport.abort()
            return
        listener = self.listener
        if not self.peer:
            self.peer = peer_of(transport.get_extra_info("peername"))
        identity = listener.identity_of(transport, self.peer)
        if identity is None:
            transport.abort()
            return
        channel = listener.open_channel(transport, self.peer, self.since)
        if identity:
            channel.identity = identity
        self.channel = channel
        self.since = 0.0
        listener.live.add(self)

    def _on_first_read(self, data: bytes) -> None:
        channel = self.channel
        speech = foreign_speech(data, self.listener.secure)
        if speech is not None:
            name = self.listener.name
            self.listener.report("not_mqtt", f"{self.peer} {speech}, listener {name!r}; closed")
            self.transport.abort()
            return
        self.data_received = channel.feed
        self.transport.set_protocol(self)  # uvloop keeps the bound method: from here it calls the channel itself
        channel.feed(data)

    def pause_writing(self) -> None:
        """The transport holds more than the peer takes."""
        if self.channel is not None:
            self.channel.pause_writing()

    def resume_writing(self) -> None:
        """The transport takes bytes again."""
        if self.channel is not None:
            self.channel.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        channel = self.channel
        self.listener.lost(self)
        self.data_received = _nothing
        self.channel = None
        if channel is not None:
            channel.lost(exc)


def _nothing(data: bytes) -> None:
    """Bytes after the end are dropped."""
