"""How an accepted socket becomes a connection of its listener's kind, or is refused."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from broker.config.listeners import ListenerConfig, SecureListener, WebSocket
from broker.engine.listener import ListenerInfo
from broker.net import binding, tls
from broker.net.allocation import trim_tls
from broker.net.connection import Connection, foreign_speech, peer_of
from broker.net.handshakes import Waiting
from broker.net.refusal import Refusal
from broker.net.shared import Shared

log = logging.getLogger(__name__)

SHUTDOWN = 2.0
"""Seconds a peer has to answer our TLS close_notify."""
SPARE = 16
"""Connections taken beyond `max_connections` to be told why they are refused; more than that are closed at once."""


class Admission:
    """One listener seen from its connections. `refused` counts those that were closed before MQTT, by reason."""

    def __init__(self, name: str, shared: Shared, *, privileged: bool = False) -> None:
        self.name = name
        self.shared = shared
        self.engine = shared.engine
        self.loop = shared.loop
        self.report = shared.report
        self.info = ListenerInfo(name, privileged=privileged)
        self.info.on_lost = self.left
        self.info.speech = self.speech
        self.config: ListenerConfig = ListenerConfig()
        self.context: ssl.SSLContext | None = None
        self.refused: dict[str, int] = {}
        self.accepted = 0
        self.channels = 0
        self.ws_path = ""
        self.ws_log: Any = None

    @property
    def connections(self) -> int:
        """Sockets accepted and not yet gone, hand-shakes included."""
        return self.info.connections

    @property
    def secure(self) -> bool:
        """Whether connections begin with a TLS hand-shake."""
        return self.context is not None

    @property
    def connect_timeout(self) -> float:
        """Seconds from accept to the end of CONNECT."""
        return float(self.engine.core.limits.connect_timeout)

    @property
    def max_packet_size(self) -> int:
        """Bytes of the largest packet a client may send."""
        return int(self.info.max_packet_size or self.engine.core.limits.max_packet_size)

    # accepting ------------------------------------------------------------------------------------------------

    def _count_in(self) -> None:
        self.info.connections += 1
        self.shared.connections += 1
        self.accepted += 1

    def _full(self) -> bool:
        """Whether a further connection is closed at once; the first ones too many are refused with a reason code."""
        info = self.info
        if not info.max_connections or info.connections < info.max_connections + SPARE:
            return False
        self._report_full()
        return True

    def _report_full(self) -> None:
        self._count("max_connections")
        limit = self.info.max_connections
        self.report("max_connections", f"listener {self.name!r} is full ({limit} connections); more are refused")

    def _admit(self, sock: socket.socket) -> bool:
        if self._full():
            sock.close()
            return False
        self._count_in()
        return True

    def _take_plain(self, sock: socket.socket, address: Any, now: float) -> None:
        if self._admit(sock):
            self.shared.spawn(self._connect(sock, peer_of(address), now))

    def _take_unix(self, sock: socket.socket, address: Any, now: float) -> None:
        uid = binding.peer_uid(sock)
        if self.info.privileged and uid != os.getuid():
            sock.close()
            self._count("foreign_user")
            self.report("foreign_user", f"user id {uid} tried to reach the internal listener; closed")
        elif self._admit(sock):
            self.shared.spawn(self._connect(sock, f"unix:{uid}", now))

    def _take_secure(self, sock: socket.socket, address: Any, now: float) -> None:
        # all that has come is decrypted at once, and records without data (RFC 8446 4.6.3) are seen by no meter
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, cast(SecureListener, self.config).receive_buffer)
        if self._admit(sock):
            waiting = Waiting(self, sock, peer_of(address), now + self.connect_timeout, self._begin)
            self.shared.handshakes.add(waiting)

    def _begin(self, waiting: Waiting) -> None:
        self.shared.spawn(self._shake_hands(waiting))

    def _factory(self, peer: str, since: float) -> Callable[[], asyncio.BaseProtocol]:
        if isinstance(self.config, WebSocket):
            from broker.net.websocket import WebSocketProtocol

            return partial(WebSocketProtocol, self, since, peer)
        return partial(Connection, self, since, peer)

    async def _connect(self, sock: socket.socket, peer: str, since: float) -> None:
        try:
            await self.loop.connect_accepted_socket(self._factory(peer, since), sock)
        except OSError:  # gone before it began
            self.released("hung_up")
        except Exception as error:
            self._drop(sock, peer, error)

    async def _shake_hands(self, waiting: Waiting) -> None:
        now = self.loop.time()
        timeout = self.connect_timeout
        since = waiting.deadline - timeout
        try:
            transport, _ = await self.loop.connect_accepted_socket(
                self._factory(waiting.peer, since),
                waiting.sock,
                ssl=self.context,
                ssl_handshake_timeout=max(0.05, waiting.deadline - now),
                ssl_shutdown_timeout=SHUTDOWN,
            )
            trim_tls(transport)
        except (OSError, EOFError, asyncio.CancelledError) as error:
            self.released("handshake")
            if isinstance(error, asyncio.CancelledError):
                raise
            self.report("tls", f"{waiting.peer} {tls.failure_text(error)}, listener {self.name!r}; closed")
        except Exception as error:
            self._drop(waiting.sock, waiting.peer, error)

    def _drop(self, sock: socket.socket, peer: str, error: Exception) -> None:
        self.crashed(peer, error)
        sock.close()
        self.released("internal_error")

    async def adopt(self, sock: socket.socket, data: bytes = b"") -> None:
        """Serve a plain connected socket that somebody else accepted, beginning with the bytes already read from it."""
        sock.setblocking(False)
        since = self.loop.time()
        peer = f"unix:{binding.peer_uid(sock)}" if sock.family == socket.AF_UNIX else peer_of(sock.getpeername())
        self._count_in()
        transport, _ = await self.loop.connect_accepted_socket(partial(Connection, self, since, peer), sock)
        if data:
            protocol: Any = transport.get_protocol()
            protocol.data_received(data)

    # what connections call ------------------------------------------------------------------------------------

    def arrived(self) -> bool:
        """Count in a connection that uvloop accepted; False when it is one too many to be told so."""
        full = self._full()
        self._count_in()
        return not full

    def speech(self, data: bytes) -> str | None:
        """What a peer whose first bytes are not MQTT speaks instead, for the report; None when that is unknown."""
        return None if isinstance(self.config, WebSocket) else foreign_speech(data, self.secure)

    def open_channel(self, link: Any, peer: str, since: float) -> Any:
        """The engine's channel, or one that only refuses when the listener is full."""
        info = self.info
        if info.max_connections and self.channels >= info.max_connections:
            self._report_full()
            return Refusal(self.shared, link, self.lost)
        channel = self.engine.open_channel(link, info, peer, accepted_at=since)
        self.channels += 1
        return channel

    def identity_of(self, transport: Any, peer: str) -> dict[str, str] | None:
        """What the client certificate says; None when the connection must end because of it."""
        config = self.config
        if self.context is None or not isinstance(config, SecureListener) or config.verification == "none":
            return {}
        try:
            return tls.identity(transport.get_extra_info("peercert"), config.username_from)
        except tls.UnusableName as error:
            self._count("certificate")
            self.report("tls", f"{peer}: {error}, listener {self.name!r}; closed")
            return None

    def origin_allowed(self, origins: list[str]) -> bool:
        """Whether a page from there may connect, or a program, which sends no Origin. RFC 6455 10.2."""
        config = self.config
        if not isinstance(config, WebSocket):
            return True
        if not origins:
            return not config.origin_required
        if "*" in config.origins:
            return True
        return len(origins) == 1 and origins[0].lower() in {origin.lower() for origin in config.origins}

    def crashed(self, peer: str, error: Exception) -> None:
        """An error of ours before a connection had its channel: that connection ends, and no other."""
        log.error("internal error while %s connects to listener %r; closed", peer, self.name, exc_info=error)
        self.engine.core.count("internal_error")

    def left(self) -> None:
        """A connection that had a channel of the engine is gone."""
        self.channels -= 1
        self.lost()

    def lost(self) -> None:
        """A connection without one is gone."""
        self.info.connections -= 1
        self.shared.left()

    def released(self, reason: str) -> None:
        """A socket that never became a connection is gone."""
        self.lost()
        self._count(reason)

    def _count(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
