"""A byte-stream connection until it has its channel: TCP, TLS or a Unix socket. Then the channel is the protocol."""

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
    """Opens the channel as soon as the connection is made; from then on the channel is the transport's protocol.

    The exchange comes before the first read is asked for: made later it costs two more system calls a connection.
    """

    __slots__ = ("listener", "peer", "since")

    def __init__(self, listener: Admission, since: float, peer: str) -> None:
        """`since` is when the kernel gave us the connection."""
        self.listener = listener
        self.since = since
        self.peer = peer

    def connection_made(self, transport: Any) -> None:
        """Open the channel; its deadline counts from the accept."""
        listener = self.listener
        try:
            identity = listener.identity_of(transport, self.peer)
            if identity is None:
                transport.abort()
                return
            channel = listener.open_channel(transport, self.peer, self.since)
        except Exception as error:
            listener.crashed(self.peer, error)
            transport.abort()
            return
        if identity:
            channel.identity = identity
        transport.set_protocol(channel)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone before it had a channel."""
        self.listener.lost()


class Arrivals(asyncio.Protocol):
    """Does the same for uvloop's server, which accepts by itself: one object for all connections of a listener.

    A connection too many is closed as soon as it is made.
    """

    __slots__ = ("_listener",)

    def __init__(self, listener: Admission) -> None:
        self._listener = listener

    def connection_made(self, transport: Any) -> None:
        """Count the connection in and open its channel."""
        listener = self._listener
        if not listener.arrived():
            transport.abort()
            return
        peer = peer_of(transport.get_extra_info("peername"))
        try:
            channel = listener.open_channel(transport, peer, listener.loop.time())
        except Exception as error:
            listener.crashed(peer, error)
            transport.abort()
            return
        transport.set_protocol(channel)

    def connection_lost(self, exc: Exception | None) -> None:
        """A connection that was one too many is gone."""
        self._listener.lost()
