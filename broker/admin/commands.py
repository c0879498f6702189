"""What the control socket answers: status, clients, reload, queues, a backup. Knows the broker, prints nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broker import __version__
from broker.access.bans import BanError, Kind
from broker.admin.control import CommandFailed
from broker.admin.dead_letters import DeadLetters
from broker.admin.instances import Instances
from broker.config.problems import ConfigError
from broker.engine.instances import RESERVED
from broker.engine.session import Session
from broker.extend.store import BackupFailed

STORED = 10.0
"""Seconds the store has to take a ban."""


class ReloadRefused(Exception):
    """The new configuration cannot be put in force without a restart or cannot be opened; nothing has changed, unless
    the text says what has."""


class Commands:
    """One method per command; each answers plain JSON values. `broker` is the application's `Broker`."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        self._dead_letters = DeadLetters(broker)
        self._instances = Instances(broker)

    def table(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """Commands by name."""
        return {
            "status": self.status,
            "reload": self.reload,
            "config.diff": self.config_diff,
            "clients.list": self.clients_list,
            "clients.show": self.clients_show,
            "clients.kick": self.clients_kick,
            "sinks.list": self.sinks_list,
            "sinks.show": self.sinks_show,
            "sinks.pause": self.sinks_pause,
            "sinks.resume": self.sinks_resume,
            "bridges.list": self.bridges_list,
            "bridges.show": self.bridges_show,
            "bridges.pause": self.bridges_pause,
            "bridges.resume": self.bridges_resume,
            "queues.list": self.queues_list,
            "queues.drop": self.queues_drop,
            "deadletter.list": self._dead_letters.listing,
            "deadletter.show": self._dead_letters.show,
            "deadletter.replay": self._dead_letters.replay,
            "deadletter.purge": self._dead_letters.purge,
            "store.backup": self.store_backup,
            "ban.add": self.ban_add,
            "ban.del": self.ban_del,
            "ban.list": self.ban_list,
            "access.flush": self.access_flush,
            "accounts.changed": self.accounts_changed,
        }

    async def status(self) -> dict[str, Any]:
        """Everything an operator looks at first."""
        broker = self._broker
        core = broker.engine.core
        return {
            "name": broker.settings.broker.name,
            "version": __version__,
            "uptime_s": round(time.monotonic() - broker.started, 1),
            "clients": len(broker.engine.clients()),
            "sessions": sum(1 for s in broker.engine.sessions if not s.startswith(RESERVED)),
            "subscriptions": broker.engine.router.count,
            "retained": broker.engine.retained_store.count,
            "store": self._store(),
            "messages": {"in": core.received, "out": core.sent, "dropped": dict(core.dropped)},
            "events": dict(core.events),
            "listeners": broker.listeners.status(),
            "access": {**broker.gate.counters, **broker.gate.protection.status()},
            "auth": broker.gate.status(),
            **self._instances.status(),
            "orphans": [q for q in self._queues() if q["orphan"]],
            "workers": broker.supervisor.pids(),
        }

    def _store(self) -> dict[str, Any]:
        """`refusing` says why messages that must be kept are refused: full, failed (until a restart) or nothing."""
        sizes = self._broker.store.sizes()
        return {
            "refusing": self._broker.store.refusing,
            "segments": len(sizes),
            "bytes": sum(sizes.values()),
            "lost": self._broker.journal.lost,
        }

    async def reload(self) -> dict[str, Any]:
        """Read conf.d again. `orphans`: messages kept of instances that are gone, by name."""
        try:
            change = await self._broker.reload()
        except ConfigError as error:
            raise CommandFailed("\n".join(error.problems), exit=2) from None
        except ReloadRefused as error:
            raise CommandFailed(str(error), exit=2) from None
        orphans = {q["name"]: q["queued"] for q in self._queues() if q["orphan"]}
        return {
            "added": change.added,
            "removed": change.removed,
            "changed": change.changed,
            "unchanged": change.unchanged,
            "orphans": orphans,
        }

    async def config_diff(self) -> dict[str, str]:
        """What runs, by whole name; compared with a folder by the command line."""
        return dict(self._broker.settings.fingerprints)

    async def clients_list(self) -> list[dict[str, Any]]:
        """Every session that is not a worker's."""
        return [_client(s) for c, s in sorted(self._broker.engine.sessions.items()) if not c.startswith(RESERVED)]

    async def clients_show(self, id: str) -> dict[str, Any]:
        """One session with its subscriptions."""
        session = self._broker.engine.sessions.get(id)
        if session is None:
            raise CommandFailed(f"no client is called {id!r}")
        shown = _client(session)
        shown["subscriptions"] = [
            {
                "filter": s.filter.decode(),
                "qos": s.qos,
                "shared": s.group.name.decode() if s.group is not None else None,
            }
            for s in session.subscriptions or ()
        ]
        return shown

    async def clients_kick(self, id: str) -> dict[str, Any]:
        """Disconnect one client."""
        if not self._broker.engine.kick(id):
            raise CommandFailed(f"no connected client is called {id!r}")
        return {"kicked": id}

    async def sinks_list(self) -> list[dict[str, Any]]:
        """Every sink."""
        return self._instances.listing("sinks")

    async def sinks_show(self, name: str) -> dict[str, Any]:
        """One sink."""
        return self._instances.show("sinks", name)

    async def sinks_pause(self, name: str) -> dict[str, Any]:
        """Stop handing messages to a sink; they queue."""
        return await self._instances.pause("sinks", name)

    async def sinks_resume(self, name: str) -> dict[str, Any]:
        """Go on."""
        return await self._instances.resume("sinks", name)

    async def bridges_list(self) -> list[dict[str, Any]]:
        """Every bridge."""
        return self._instances.listing("bridges")

    async def bridges_show(self, name: str) -> dict[str, Any]:
        """One bridge."""
        return self._instances.show("bridges", name)

    async def bridges_pause(self, name: str) -> dict[str, Any]:
        """Cut a bridge; what it should carry queues."""
        return await self._instances.pause("bridges", name)

    async def bridges_resume(self, name: str) -> dict[str, Any]:
        """Go on."""
        return await self._instances.resume("bridges", name)

    def _queues(self) -> list[dict[str, Any]]:
        configured = {*self._broker.settings.sinks, *self._broker.settings.bridges}
        queues: dict[str, dict[str, Any]] = {}
        for client_id, session in self._broker.engine.sessions.items():
            if not client_id.startswith(RESERVED) or client_id.endswith("/in"):
                continue
            instance, _, lane = client_id[len(RESERVED) :].rpartition("/")
            name = f"{instance}/dlq" if lane == "dlq" else instance
            orphan = instance not in configured
            entry = queues.setdefault(name, {"name": name, "queued": 0, "bytes": 0, "orphan": orphan})
            entry["queued"] += session.queued
            entry["bytes"] += session.queue_bytes
        return sorted(queues.values(), key=lambda q: str(q["name"]))

    async def queues_list(self) -> list[dict[str, Any]]:
        """The durable queues of instances, orphans included."""
        return self._queues()

    async def queues_drop(self, name: str) -> dict[str, Any]:
        """Delete what queues for an instance."""
        if not any(q["name"] == name for q in self._queues()):
            raise CommandFailed(f"no queue is called {name!r}")
        if name.endswith("/dlq"):
            return {"dropped": (await self._dead_letters.purge(name.removesuffix("/dlq")))["purged"]}
        return {"dropped": self._broker.engine.instances.drop_queue(name)}

    async def store_backup(self, folder: str) -> dict[str, Any]:
        """Copy what survives a restart into a data folder of its own, while everything goes on."""
        began = time.monotonic()
        try:
            copied = await self._broker.store.backup(Path(folder))
        except BackupFailed as error:
            raise CommandFailed(str(error)) from None
        return {**copied._asdict(), "seconds": round(time.monotonic() - began, 3)}

    async def ban_add(self, kind: Kind, name: str, seconds: float = 0.0, reason: str = "") -> dict[str, Any]:
        """Refuse a client id, a user or an address (a network) and disconnect whom that hits; in the store when this
        returns."""
        stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        bans = self._broker.gate.protection.bans
        try:
            ban = bans.add(kind, name, seconds=seconds, reason=reason, stored=_settle(stored))
        except BanError as error:
            raise CommandFailed(str(error)) from None
        disconnected = await self._disconnect(lambda session: bans.hits(session.principal), kind, name)
        if not await _in_time(stored):
            raise CommandFailed(f"{ban.name} is banned, but the store could not take it: a restart forgets it")
        return {"banned": ban.name, "disconnected": disconnected}

    async def ban_del(self, kind: Kind, name: str) -> dict[str, Any]:
        """Lift a ban, and lock-outs of the same client, user or address."""
        stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        protection = self._broker.gate.protection
        try:
            ban = protection.bans.remove(kind, name, _settle(stored))
        except BanError as error:
            raise CommandFailed(str(error)) from None
        released = protection.release(kind, name)
        if ban is None and not released:
            raise CommandFailed(f"no {kind} {name!r} is banned or locked out")
        if ban is not None and not await _in_time(stored):
            raise CommandFailed(f"{ban.name} may come back, but the store could not take it: a restart bans it again")
        return {"lifted": ban is not None, "released": released}

    async def ban_list(self) -> list[dict[str, Any]]:
        """Bans, and who is refused for a while by itself."""
        now = time.monotonic()
        rows: list[dict[str, Any]] = [
            {
                ban.kind: ban.name,
                "left_s": round(ban.until - now, 1) if ban.until else None,
                "since": datetime.fromtimestamp(ban.since, UTC).isoformat(timespec="seconds"),
                "by": "operator",
                "reason": ban.reason,
            }
            for ban in self._broker.gate.protection.bans.list()
        ]
        rows.extend(self._broker.gate.protection.locked())
        return rows

    async def access_flush(
        self, user: str | None = None, client: str | None = None, all: bool = False
    ) -> dict[str, Any]:
        """Forget remembered verdicts and read rights again: of a user, of the user of a client, or of everybody."""
        if [user is not None, client is not None, all].count(True) != 1:
            raise CommandFailed("name a user, a client, or all", exit=2)
        broker = self._broker
        if client is not None:
            session = broker.engine.sessions.get(client)
            if session is None or session.principal is None or session.principal.privileged:
                raise CommandFailed(f"no client is called {client!r}")
            user = session.principal.username
        forgotten = broker.gate.flush(user) if user is not None or all else 0
        broker.engine.rights_changed(client)
        return {"forgotten": forgotten}

    async def accounts_changed(self, instance: str, file: str, user: str, disconnect: bool = False) -> dict[str, Any]:
        """An account was edited in a file that this broker uses too: it counts from now on."""
        broker = self._broker
        guard = broker.gate.guard(instance)
        if guard is None:
            raise CommandFailed(f"it runs without [auth.{instance}]; isthmus reload puts the fragments into force")
        if str(broker.settings.auth[instance].config.accounts()) != file:
            raise CommandFailed(
                f"its [auth.{instance}] uses another file; isthmus reload puts the fragments into force"
            )
        reread = getattr(guard.backend, "reread", None)
        if reread is not None:
            try:
                await reread()
            except (ValueError, OSError) as error:
                raise CommandFailed(str(error)) from None
        broker.gate.flush(user)
        broker.gate.protection.release("user", user)
        gone = await self._disconnect(lambda session: session.owner == user, "user", user) if disconnect else 0
        return {"disconnected": gone}

    async def _disconnect(self, meant: Callable[[Session], bool], kind: Kind, name: str) -> int:
        """Disconnect those sessions, as an operator's act; how many."""
        sessions = self._broker.engine.sessions
        ids = [name] if kind == "client" else list(sessions)
        count = 0
        for number, client_id in enumerate(ids, 1):
            session = sessions.get(client_id)
            there = session is not None and session.channel is not None and session.principal is not None
            if there and not session.principal.privileged and meant(session):
                count += self._broker.engine.kick(client_id)
            if number % 1_000 == 0:
                await asyncio.sleep(0)  # others have their turn
        return count


async def _in_time(stored: asyncio.Future[bool]) -> bool:
    """Whether the store took it; a disk that does not answer has not."""
    try:
        return await asyncio.wait_for(stored, STORED)
    except TimeoutError:
        return False


def _settle(answer: asyncio.Future[bool]) -> Callable[[bool], None]:
    """What sets the future, unless nobody waits any more."""

    def settle(written: bool) -> None:
        if not answer.done():
            answer.set_result(written)

    return settle


def _client(session: Session) -> dict[str, Any]:
    channel = session.channel
    return {
        "clientid": session.client_id,
        "username": session.owner,
        "connected": channel is not None,
        "peer": channel.peer if channel is not None else None,
        "listener": channel.listener.name if channel is not None else None,
        "protocol": {3: "3.1", 4: "3.1.1", 5: "5.0"}[channel.version] if channel is not None else None,
        "queued": session.queued,
        "subscriptions": len(session.subscriptions or ()),
    }
