"""One named listener: its sockets, its limits, and how an accepted socket becomes a connection of its kind."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from broker.config.listeners import (
    ListenerConfig,
    NetworkListener,
    SecureListener,
    TcpListener,
    UnixListener,
    WebSocket,
)
from broker.engine.listener import ListenerInfo
from broker.net import binding, tls
from broker.net.acceptor import Acceptor
from broker.net.allocation import trim_tls
from broker.net.connection import Connection, peer_of
from broker.net.descriptors import Descriptors
from broker.net.errors import ListenError
from broker.net.handshakes import Handshakes, Waiting
from broker.net.lingering import Lingering
from broker.net.refusal import Refusal
from broker.net.server import Server

log = logging.getLogger(__name__)

SHUTDOWN = 2.0
"""Seconds a peer has to answer our TLS close_notify."""
SPARE = 16
"""Connections taken beyond `max_connections` to be told why they are refused; more than that are closed at once."""


class Shared:
    """What all listeners of one broker use together."""

    __slots__ = ("descriptors", "engine", "handshakes", "live", "loop", "report", "tasks")

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop, report: Callable[[str, str], None]) -> None:
        self.engine = engine
        self.loop = loop
        self.report = report
        self.descriptors = Descriptors()
        self.handshakes = Handshakes(loop)
        self.live = Lingering(loop)
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that ends by itself."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Change:
    """A new configuration of a listener, ready to be put in force or dropped."""

    __slots__ = ("config", "context", "fingerprint", "inode", "sockets")

    def __init__(self, config: ListenerConfig) -> None:
        self.config = config
        self.context: ssl.SSLContext | None = None
        self.fingerprint = ""
        self.sockets: list[socket.socket] | None = None
        """None: those in use stay."""
        self.inode = 0
        """Of the Unix socket's file that was made for this change; 0 when there is none to remove."""


class Listener:
    """Opened by `Listeners`. `refused` counts connections that were closed before MQTT, by reason."""

    def __init__(self, name: str, shared: Shared, *, privileged: bool = False) -> None:
        self.name = name
        self.shared = shared
        self.engine = shared.engine
        self.loop = shared.loop
        self.live = shared.live
        self.report = shared.report
        self.info = ListenerInfo(name, privileged=privileged)
        self.config: ListenerConfig = ListenerConfig()
        self.context: ssl.SSLContext | None = None
        self.refused: dict[str, int] = {}
        self.accepted = 0
        self.alarm: str | None = None
        self.ws_path = ""
        self.ws_log: Any = None
        self._acceptors: list[Acceptor | Server] = []
        self._fingerprint = ""
        self._inode = 0

    # what it looks like from outside --------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """``host:port`` with the real port, or the Unix socket's path."""
        if isinstance(self.config, NetworkListener):
            host = self.config.bind.host
            return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        return str(self.config.path) if isinstance(self.config, UnixListener) else ""

    @property
    def port(self) -> int:
        """The real port; 0 for a Unix socket."""
        if not self._acceptors or not isinstance(self.config, NetworkListener):
            return 0
        return int(self._acceptors[0].sock.getsockname()[1])

    @property
    def sockets(self) -> list[socket.socket]:
        """The listening sockets."""
        return [acceptor.sock for acceptor in self._acceptors]

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

    # changing -------------------------------------------------------------------------------------------------

    def prepare(self, config: ListenerConfig, heir_of: Listener | None = None) -> Change:
        """Do everything about a new configuration that may fail, and nothing that shows. ListenError says what failed.

        `heir_of` is a listener that is about to leave the place this one moves to: its sockets are shared until then.
        """
        change = Change(config)
        if isinstance(config, SecureListener):
            change.fingerprint = tls.fingerprint(self.name, config)
            if self.context is not None and change.fingerprint == self._fingerprint and _same_tls(self.config, config):
                change.context = self.context
            else:
                change.context = tls.server_context(self.name, config)
        if heir_of is not None:
            change.sockets = [sock.dup() for sock in heir_of.sockets]
        elif not self._acceptors or not same_place(self.config, config):
            if isinstance(config, UnixListener):
                change.sockets = [binding.bind_unix(self.name, Path(config.path), int(config.mode, 8))]
                change.inode = os.lstat(config.path).st_ino
            elif isinstance(config, NetworkListener):
                change.sockets = binding.bind_tcp(self.name, config.bind.host, config.bind.port)
        return change

    def inherit(self, change: Change, heir_of: Listener) -> None:
        """From now on the Unix socket's file is this listener's to remove."""
        change.inode, heir_of._inode = heir_of._inode, 0

    def commit(self, change: Change) -> None:
        """Put a prepared configuration in force. New sockets accept before old ones close; connections stay."""
        config = change.config
        before = self.config
        self.config = config
        self.context = change.context
        self._fingerprint = change.fingerprint
        self.alarm = None
        info = self.info
        info.kind = config.kind or self.name
        info.auth = config.auth
        info.max_packet_size = config.max_packet_size or 0
        info.max_connections = config.max_connections
        info.attributes = {"allow_anonymous": config.allow_anonymous}
        if isinstance(config, WebSocket):
            from broker.net.websocket import WebSocketLog

            self.ws_path = config.path
            self.ws_log = WebSocketLog(self)
        sockets = change.sockets if change.sockets is not None else self.sockets
        old = self._acceptors
        self._acceptors = [self._acceptor(sock) for sock in sockets]
        if change.sockets is None:
            for acceptor in old:
                acceptor.stop()
        for acceptor in self._acceptors:
            acceptor.start()
        if change.sockets is not None:
            self._close_sockets(old, before)
            self._inode = change.inode
        if isinstance(config, UnixListener):
            os.chmod(config.path, int(config.mode, 8))
        if self.secure and not _is_uvloop(self.loop):
            log.warning(
                "listener %r: TLS without uvloop takes 280 kB a connection instead of 24 kB; install uvloop", self.name
            )

    def discard(self, change: Change) -> None:
        """Drop a prepared configuration."""
        for sock in change.sockets or ():
            sock.close()
        if change.inode and isinstance(change.config, UnixListener):
            binding.unlink_unix(Path(change.config.path), change.inode)

    def renew_certificate(self) -> bool:
        """Take changed certificate files for new hand-shakes. Unusable ones raise the alarm and change nothing."""
        config = self.config
        if not isinstance(config, SecureListener):
            return False
        try:
            fingerprint = tls.fingerprint(self.name, config)
            if fingerprint == self._fingerprint:
                self.alarm = None
                return False
            context = tls.server_context(self.name, config)
        except ListenError as error:
            self.alarm = str(error)
            log.error("%s; the listener goes on with the certificate it has", error)
            return False
        self.context, self._fingerprint, self.alarm = context, fingerprint, None
        log.info("listeners.%s: new hand-shakes use the renewed certificate %s", self.name, config.certificate)
        return True

    def close(self) -> None:
        """Accept nothing more. Connections stay."""
        self._close_sockets(self._acceptors, self.config)
        self._acceptors = []

    def _close_sockets(self, acceptors: list[Acceptor | Server], config: ListenerConfig) -> None:
        for acceptor in acceptors:
            acceptor.stop()
            acceptor.sock.close()
        if acceptors and self._inode and isinstance(config, UnixListener):
            binding.unlink_unix(Path(config.path), self._inode)

    # accepting ------------------------------------------------------------------------------------------------

    def _acceptor(self, sock: socket.socket) -> Acceptor | Server:
        config = self.config
        rate = float(getattr(config, "accept_rate", None) or 0)
        if isinstance(config, TcpListener) and not rate and _is_uvloop(self.loop):
            return Server(self.loop, sock, self.name, self._plain_connection, self.shared.descriptors)
        take = self._take_plain
        if isinstance(config, UnixListener):
            take = self._take_unix
        elif self.secure:
            take = self._take_secure
        return Acceptor(self.loop, sock, self.name, take, self.shared.descriptors, rate)

    def _plain_connection(self) -> Connection:
        """For uvloop's server, which accepts by itself: a connection too many is closed as soon as it is made."""
        connection = Connection(self, self.loop.time(), "")
        connection.doomed = self._full()
        self.info.connections += 1
        self.accepted += 1
        return connection

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
        self.info.connections += 1
        self.accepted += 1
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

    async def adopt(self, sock: socket.socket, data: bytes = b"") -> None:
        """Serve a plain connected socket that somebody else accepted, beginning with the bytes already read from it."""
        sock.setblocking(False)
        since = self.loop.time()
        peer = f"unix:{binding.peer_uid(sock)}" if sock.family == socket.AF_UNIX else peer_of(sock.getpeername())
        self.info.connections += 1
        self.accepted += 1
        _, protocol = await self.loop.connect_accepted_socket(partial(Connection, self, since, peer), sock)
        if data:
            protocol.data_received(data)

    # what connections call ------------------------------------------------------------------------------------

    def open_channel(self, link: Any, peer: str, since: float) -> Any:
        """The engine's channel, or one that only refuses when the listener is full."""
        info = self.info
        if info.max_connections and info.connections > info.max_connections:
            self._report_full()
            return Refusal(self.loop, link)
        return self.engine.open_channel(link, info, peer, accepted_at=since)

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
        """Whether a page from there may connect. Programs send no Origin and are not affected. RFC 6455 10.2."""
        config = self.config
        if not origins or not isinstance(config, WebSocket) or "*" in config.origins:
            return True
        return len(origins) == 1 and origins[0].lower() in {origin.lower() for origin in config.origins}

    def lost(self, connection: Any) -> None:
        """A connection that had been made is gone."""
        self.info.connections -= 1
        if connection is not None:
            self.live.discard(connection)

    def released(self, reason: str) -> None:
        """A socket that never became a connection is gone."""
        self.info.connections -= 1
        self._count(reason)

    def _count(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1


def same_place(before: ListenerConfig, after: ListenerConfig) -> bool:
    """Whether both listen on the same address or path, so that the sockets of one serve the other."""
    if isinstance(before, NetworkListener) and isinstance(after, NetworkListener):
        return before.bind == after.bind
    if isinstance(before, UnixListener) and isinstance(after, UnixListener):
        return before.path == after.path
    return False


def _is_uvloop(loop: asyncio.AbstractEventLoop) -> bool:
    return type(loop).__module__.partition(".")[0] == "uvloop"


def _same_tls(before: ListenerConfig, after: SecureListener) -> bool:
    if not isinstance(before, SecureListener):
        return False
    keys = ("certificate", "key", "client_ca", "verify", "tls_min", "alpn")
    return type(before) is type(after) and all(getattr(before, k, None) == getattr(after, k, None) for k in keys)
