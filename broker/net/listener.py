"""One named listener: its sockets, its configuration and how that changes, its certificate."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from pathlib import Path

from broker.config.listeners import (
    ListenerConfig,
    NetworkListener,
    SecureListener,
    TcpListener,
    UnixListener,
    WebSocket,
)
from broker.net import binding, revocation, tls
from broker.net.acceptor import Acceptor
from broker.net.admission import Admission
from broker.net.connection import Arrivals
from broker.net.errors import ListenError
from broker.net.server import Server
from broker.net.shared import Shared

log = logging.getLogger(__name__)

LOGIN = 5.0
"""Seconds a login may take beyond the deadline of its CONNECT."""


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


class Listener(Admission):
    """Opened by `Listeners`. `alarm` says why a renewed certificate is not in use."""

    def __init__(self, name: str, shared: Shared, *, privileged: bool = False) -> None:
        super().__init__(name, shared, privileged=privileged)
        self.alarm: str | None = None
        self._acceptors: list[Acceptor | Server] = []
        self._fingerprint = ""
        self._inode = 0

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
        renewed, self._fingerprint = change.fingerprint != self._fingerprint, change.fingerprint
        self.alarm = None
        info = self.info
        info.kind = config.kind or self.name
        info.auth = config.auth
        info.bridge_bit = config.allow_bridges
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
        if renewed:
            self._end_revoked()
        if isinstance(config, SecureListener):
            granted = binding.granted_receive_buffer(config.receive_buffer)
            if granted < config.receive_buffer:
                log.warning(
                    "listeners.%s: receive_buffer is %d, the system allows %d; raise net.core.rmem_max",
                    self.name, config.receive_buffer, granted,
                )  # fmt: skip
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
        self._end_revoked()
        return True

    def _end_revoked(self) -> None:
        config, shared = self.config, self.shared
        if isinstance(config, SecureListener) and config.client_crl is not None and shared.revoke is not None:
            path = Path(config.client_crl)
            shared.spawn(
                revocation.end_revoked(self.engine, self.info, path, shared.revoke, self.connect_timeout + LOGIN)
            )

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

    def _acceptor(self, sock: socket.socket) -> Acceptor | Server:
        config = self.config
        rate = config.max_connection_rate
        if isinstance(config, TcpListener) and not rate and _is_uvloop(self.loop):
            return Server(self.loop, sock, self.name, Arrivals(self), self.shared.descriptors)
        take = self._take_plain
        if isinstance(config, UnixListener):
            take = self._take_unix
        elif self.secure:
            take = self._take_secure
        return Acceptor(self.loop, sock, self.name, take, self.shared.descriptors, rate)


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
    keys = ("certificate", "key", "client_ca", "client_crl", "verify", "tls_min", "alpn")
    return type(before) is type(after) and all(getattr(before, k, None) == getattr(after, k, None) for k in keys)
