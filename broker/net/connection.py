"""A byte-stream connection until its first read: TCP, TLS or a Unix socket. Then the channel is the protocol."""

from __future__ import annotations

import asyncio
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
    """Opens the channel and judges the first read; a connection with a channel in charge needs nothing of ours."""

    __slots__ = ("channel", "doomed", "listener", "peer", "since", "transport")

    def __init__(self, listener: Admission, since: float, peer: str) -> None:
        """`since` is when the kernel gave us the connection; an empty `peer` is asked of the transport."""
        self.listener = listener
        self.since = since
        self.peer = peer
        self.channel: Any = None
        self.transport: Any = None
        self.doomed = False

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

    def data_received(self, data: bytes) -> None:
        """The first bytes: hand the connection over, unless they cannot be MQTT."""
        channel = self.channel
        if channel is None:
            return
        speech = foreign_speech(data, self.listener.secure)
        if speech is not None:
            name = self.listener.name
            self.listener.report("not_mqtt", f"{self.peer} {speech}, listener {name!r}; closed")
            self.transport.abort()
            return
        self.transport.set_protocol(channel)
        channel.data_received(data)

    def pause_writing(self) -> None:
        """The transport holds more than the peer takes."""
        if self.channel is not None:
            self.channel.pause_writing()

    def resume_writing(self) -> None:
        """The transport takes bytes again."""
        if self.channel is not None:
            self.channel.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone before it said anything."""
        channel = self.channel
        self.channel = None
        if channel is not None:
            channel.lost(exc)
        self.listener.lost()
