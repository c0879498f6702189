"""All listeners of one broker, changed by difference."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from broker.config.listeners import ListenerConfig, NetworkListener, UnixListener
from broker.net import binding
from broker.net.errors import ListenError
from broker.net.listener import Change, Listener, same_place
from broker.net.shared import Shared

log = logging.getLogger(__name__)

INTERNAL = "internal"
"""Name of the workers' listener; `apply` never touches it."""
LOOK_AGAIN = 60.0
"""Seconds between two looks for renewed certificate files; `apply` looks at once."""


class Listeners:
    """Belongs to the running loop. `report(category, text)` gets lines for the operator, to be limited by category."""

    def __init__(
        self, engine: Any, settings_base: Path | None = None, *, report: Callable[[str, str], None] | None = None
    ) -> None:
        self.base = settings_base or Path.cwd()
        self._shared = Shared(engine, asyncio.get_running_loop(), report or engine.report)
        self._open: dict[str, Listener] = {}
        self._internal: Listener | None = None
        self._timer: asyncio.TimerHandle | None = None

    def on_revoked(self, revoke: Callable[[Any], None]) -> None:
        """Call this with the channel of every client whose certificate a new `client_crl` names."""
        self._shared.revoke = revoke

    def __getitem__(self, name: str) -> Listener:
        return self._open[name]

    @property
    def names(self) -> list[str]:
        """Names of the open listeners, without the internal one."""
        return list(self._open)

    @property
    def connections(self) -> int:
        """Connections of all listeners, those that were closed meanwhile included."""
        return self._shared.connections

    async def open(self, name: str, config: ListenerConfig) -> Listener:
        """Open one more listener. ListenError names the address or file and the system's reason."""
        if name in self._open:
            raise ListenError(f"listeners.{name}: is open already")
        listener = Listener(name, self._shared)
        listener.commit(listener.prepare(config))
        self._open[name] = listener
        self._watch()
        return listener

    async def open_internal(self, path: Path) -> Listener:
        """Open the workers' Unix socket in a folder only our user may enter. Its peers must be our own user."""
        path = Path(path)
        binding.private_folder(INTERNAL, path.parent)
        listener = Listener(INTERNAL, self._shared, privileged=True)
        listener.commit(listener.prepare(UnixListener(kind="unix", path=path, mode="0600")))
        self._internal = listener
        return listener

    async def close(self, name: str) -> None:
        """Accept nothing more there; connections stay."""
        self._open.pop(name).close()

    async def apply(self, configs: Mapping[str, ListenerConfig]) -> None:
        """Make these the open listeners. On ListenError nothing has changed.

        Unchanged ones keep their sockets, changed ones accept on new ones before old ones close, connections stay.
        Renewed certificate files are taken over; unusable ones raise the listener's alarm.
        """
        wanted = {name: config for name, config in configs.items() if config.enabled}
        changes: list[tuple[Listener, Change, Listener | None]] = []
        try:
            for name, config in wanted.items():
                listener = self._open.get(name)
                if listener is None:
                    listener = Listener(name, self._shared)
                elif listener.config == config:
                    continue
                heir_of = self._leaving(name, config, wanted)
                changes.append((listener, listener.prepare(config, heir_of), heir_of))
        except BaseException:
            for listener, change, _ in changes:
                listener.discard(change)
            raise
        for listener, change, heir_of in changes:
            if heir_of is not None:
                listener.inherit(change, heir_of)
        for listener, change, _ in changes:
            listener.commit(change)
            self._open[listener.name] = listener
        for name in [name for name in self._open if name not in wanted]:
            self._open.pop(name).close()
        changed = {listener.name for listener, _, _ in changes}
        for name, listener in self._open.items():
            if name not in changed:
                listener.renew_certificate()
        self._watch()

    def _leaving(self, name: str, config: ListenerConfig, wanted: Mapping[str, ListenerConfig]) -> Listener | None:
        """The listener that holds the place `config` names and will not hold it any more."""
        for other, listener in self._open.items():
            if other != name and same_place(listener.config, config):
                if isinstance(config, NetworkListener) and config.bind.port == 0:
                    continue
                after = wanted.get(other)
                if after is None or not same_place(listener.config, after):
                    return listener
        return None

    def renew_certificates(self) -> list[str]:
        """Take renewed certificate files over now; names of the listeners that did."""
        return [name for name, listener in self._open.items() if listener.renew_certificate()]

    async def adopt(self, sock: socket.socket, data: bytes = b"", *, name: str | None = None) -> None:
        """Serve a connected socket with bytes already read from it, as if it had come through this listener.

        Default: the internal one for a Unix socket of our own user, else the first that is open.
        """
        if name is not None:
            listener: Listener | None = self._open[name]
        elif sock.family == socket.AF_UNIX and self._internal is not None and binding.peer_uid(sock) == os.getuid():
            listener = self._internal
        else:
            listener = next(iter(self._open.values()), None)
        if listener is None:
            raise ListenError("no listener is open that could adopt a connection")
        await listener.adopt(sock, data)

    def status(self) -> dict[str, dict[str, Any]]:
        """For `status`: address, kind, counts, and the alarm of a certificate that could not be renewed."""
        return {
            name: {
                "kind": listener.info.kind,
                "address": listener.address,
                "connections": listener.connections,
                "accepted": listener.accepted,
                "refused": dict(listener.refused),
                "alarm": listener.alarm,
            }
            for name, listener in self._open.items()
        }

    async def stop_accepting(self) -> None:
        """Close every listening socket but the internal one: the first step of a shutdown."""
        for name in list(self._open):
            await self.close(name)
        self._shared.handshakes.close()

    async def close_all(self, within: float = 5.0) -> None:
        """Stop accepting, wait until the connections the engine has closed are gone, and abort what is left by then."""
        await self.stop_accepting()
        if self._internal is not None:
            self._internal.close()
            self._internal = None
        if self._timer is not None:
            self._timer.cancel()
        shared = self._shared
        await asyncio.sleep(0)  # what uvloop accepted in the last turn is counted then
        for transport in tuple(shared.strangers):
            transport.abort()
        for task in tuple(shared.tasks):
            task.cancel()
        if shared.tasks:
            await asyncio.wait(tuple(shared.tasks), timeout=1.0)
        await shared.wait_empty(within)
        for link in shared.engine.links():
            link.abort()
        await asyncio.sleep(0)

    def _watch(self) -> None:
        if self._timer is None and any(listener.secure for listener in self._open.values()):
            self._timer = self._shared.loop.call_later(LOOK_AGAIN, self._look)

    def _look(self) -> None:
        self._timer = None
        self.renew_certificates()
        self._watch()
