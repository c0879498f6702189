"""Puts the rooms together: one broker from start to stop. The only file that knows every room."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from broker import identity
from broker.access.gate import AccessError, AccessGate
from broker.access.principal import Principal
from broker.admin.commands import Commands, ReloadRefused
from broker.admin.control import ControlServer
from broker.config import firstrun
from broker.config.difference import Difference, diff
from broker.config.problems import ConfigError
from broker.config.settings import Instance, Settings
from broker.config.template import Template
from broker.engine.core import Limits
from broker.engine.engine import Engine
from broker.engine.journal import Journal
from broker.engine.message import Message
from broker.engine.recovery import Recovery
from broker.extend import registry
from broker.extend.record import compile_template
from broker.extend.session import SessionSpec
from broker.extend.sink import Record
from broker.features.client_events import ClientEvents
from broker.net.descriptors import make_room
from broker.net.errors import ListenError
from broker.net.listeners import Listeners
from broker.runtime import logs, memory
from broker.runtime.supervisor import Supervisor
from broker.store.errors import REMEDY, StoreDamaged, StoreUnusable
from broker.store.journal import FileStore
from broker.store.opening import open_store

log = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between two looks at keep-alives, deadlines and expiries."""
MEMORY = 0.05
"""Seconds between two looks at the memory in use: publishers at line rate fill a gigabyte a second."""
DRAIN = 10.0
"""Seconds a stop may take."""
WRITING = 3.0
"""Seconds of them for the journal to be on disk."""
PROGRESS = 5.0
"""Seconds between two lines about a store that takes long to read."""
LONGEST_PAUSE = 30 * 86_400
"""Seconds a broker is believed to have been down at most: a clock that is years off must not end every session."""
RESTART_ONLY = ("broker.name", "broker.data", "broker.durability", "store.interval", "store.min_free")
"""What a reload cannot change."""


SWITCH = 0.0005
"""Seconds the loop may keep the interpreter from the store: at Python's 5 ms a commit takes ten times longer."""

LOSS = {
    "flush": "what is acknowledged is on disk: neither a crash nor a power cut loses it",
    "interval": "a crash loses nothing that was acknowledged, a power cut the last {interval:g} s (store.interval)",
    "none": "a crash of the broker loses nothing that was acknowledged; a power cut may lose everything recent",
}
"""The loss window of each `broker.durability`, for the log."""


PRESSURE = (
    "clients are read as usual again",
    "publishers are read as far as there is room (broker.max_memory)",
    "publishers are hardly read and new clients are refused (broker.max_memory)",
)
"""What each level of memory pressure means, for the log."""

DEAD_LETTERS = SessionSpec(filters=(), upgrade_qos=True, max_bytes=256 << 20)
"""The session that keeps `$dlq/<instance>`; when it is full the record stays where it is, in the sink's queue."""


class Broker:
    """One running broker. Several may live in one process: nothing is kept outside this object."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        *,
        log_format: str,
        log_level: str,
        accept_loss: bool = False,
    ) -> None:
        self.settings = settings
        self._accept_loss = accept_loss
        self.store: FileStore | None = None
        self.journal: Journal | None = None
        self.started = time.monotonic()
        self.stopping = asyncio.Event()
        self._load = load
        self._reloading = asyncio.Lock()
        self._data = Path(settings.broker.data)
        self._limited: dict[str, logs.Limited] = {}
        self._node = identity.take(self._data)
        loop = asyncio.get_running_loop()
        self._loop = loop
        self.gate = AccessGate(settings)
        self.engine = Engine(
            self.gate,
            loop.call_soon,
            clock=loop.time,
            wall_ms=int(time.time() * 1000),
            limits=limits_of(settings),
            node=settings.broker.name,
            node_id=self._node.number,
            boot=self._node.boot,
            report=self._report,
        )
        self.gate.rights_changed = self.engine.rights_changed
        self.gate.kick = self.engine.kick
        self.gate.present = self._is_present
        self.gate.hold_back = self.engine.hold_back
        self.engine.on_denied = self.gate.denied
        self.engine.on_disconnected = self.gate.protection.disconnected
        self._events = ClientEvents(self.engine)
        self.listeners = Listeners(self.engine, settings.base)
        self.listeners.on_revoked(self.gate.revoke)
        self.internal = self._data / "run" / "workers.sock"
        self.supervisor = Supervisor(self.internal, settings.broker.name, log_format, log_level)
        self.control_path = self._data / "control.sock"
        self._control = ControlServer(self.control_path, Commands(self).table())
        self._ticker: asyncio.TimerHandle | None = None
        self._watcher: asyncio.TimerHandle | None = None
        self._memory = memory.MemoryWatch(settings.broker.max_memory)

    def _report(self, category: str, text: str) -> None:
        limited = self._limited.get(category)
        if limited is None:
            limited = self._limited[category] = logs.limited(log, category)
        limited.info("%s", text)

    def _is_present(self, principal: Principal) -> bool:
        """Whether this very principal is who is connected with its client id."""
        session = self.engine.sessions.get(principal.clientid)
        return session is not None and session.channel is not None and session.principal is principal

    # life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open everything: sessions of sinks and bridges exist before the first listener accepts."""
        settings = self.settings
        for warning in settings.warnings:
            log.warning("%s", warning)
        self._open_store()
        await self.gate.open()
        for instance in (*settings.sinks.values(), *settings.bridges.values()):
            self._ensure(instance)
        self._events.watch(settings.events.publish)
        for name, left in self.engine.instances.find_orphans().items():
            self._warn_of_orphan(name, left)
        await self.listeners.open_internal(self.internal)
        await self._run_instances(settings)
        await self.listeners.apply(settings.listeners)
        await self._control.start()
        self._tick()
        self.engine.pressure.look = self._look_at_memory
        self._watch_memory()
        gc.collect()
        memory.give_back()  # what reading a long journal took
        gc.freeze()
        window = LOSS[settings.broker.durability].format(interval=settings.store.interval)
        log.info("broker %s is up; %s", settings.broker.name, window)

    def _open_store(self) -> None:
        """Read what survived into the engine. Raises StoreUnusable when something would be lost."""
        settings = self.settings
        folder = self._data / "store"
        self.store, recovered = open_store(
            folder,
            durability=settings.broker.durability,
            interval=settings.store.interval,
            min_free=settings.store.min_free,
            loop=self._loop,
            accept_loss=self._accept_loss,
        )
        recovery = Recovery()
        said = time.monotonic()
        done = 0
        for segment, offset, body, _, _ in recovered.frames():
            recovery.read(segment, offset, body)
            done += len(body)
            if time.monotonic() - said > PROGRESS:
                said = time.monotonic()
                log.info("reading the store: %d MB so far", done >> 20)
        if recovered.damage and not self._accept_loss:
            raise StoreDamaged(recovered.explain())
        if recovery.bad and not self._accept_loss:
            raise StoreDamaged(f"{folder}: {recovery.bad} records make no sense, see the log; {REMEDY}")
        engine = self.engine
        passed = int(time.time() * 1000) - recovered.last_wall_ms if recovered.last_wall_ms else 0
        if passed > LONGEST_PAUSE * 1000:
            log.warning(
                "by the clock the broker was down for %d days; expiries count %d of them",
                passed // 86_400_000,
                LONGEST_PAUSE // 86_400,
            )
        clock_ms = recovered.last_clock_ms + min(max(passed, 0), LONGEST_PAUSE * 1000) + 1
        journal = Journal(engine.core, self.store, self._loop.call_later, self._scratch, clock_ms)
        journal.lost = recovered.lost
        self.journal = journal
        engine.use_journal(journal)
        recovery.install(engine, journal)
        self.gate.protection.bans.keep(journal)
        log.info(
            "store: sessions=%d queued=%d retained=%d lost=%d",
            len(engine.sessions),
            recovery.queued,
            engine.retained_store.count,
            recovered.lost + recovery.bad,
        )

    def _scratch(self) -> IO[bytes]:
        """A file without a name, for what need not survive."""
        return tempfile.TemporaryFile(dir=self._data / "store")

    def _warn_of_orphan(self, name: str, left: int) -> None:
        log.warning(
            "the queue of %s is an orphan with %d messages; isthmus queues drop %s deletes it", name, left, name
        )

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(TICK, self._tick)  # first: a tick that fails is not the last one
        self.engine.tick(self._loop.time(), int(time.time() * 1000))

    def _watch_memory(self) -> None:
        self._watcher = self._loop.call_later(MEMORY, self._watch_memory)
        if self._look_at_memory():
            memory.give_back()

    def _look_at_memory(self) -> int:
        """Tell the engine how much publishers may bring; the level of pressure."""
        before = self._memory.level
        level = self._memory.look()
        if level != before:
            log.warning(
                "memory: %d of %d MB used: %s", self._memory.used >> 20, self._memory.limit >> 20, PRESSURE[level]
            )
        self.engine.pressure.press(level, self._memory.room)
        return level

    async def stop(self) -> bool:
        """Stop accepting, tell clients, put everything on disk. Bounded by ten seconds; False when that ran out or
        something could not be written."""
        clean = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN - WRITING - 1):
                await self.listeners.stop_accepting()
                for number, channel in enumerate(self.engine.clients()):
                    channel.disconnect(0x8B)
                    if number % 500 == 499:
                        await asyncio.sleep(0)
                await self.supervisor.close()
                await self.listeners.close_all()
                await self.gate.close()
                clean = True
        if not clean:
            log.error("not everything could be stopped in time; the store is closed as it should be")
        for name, left in self._waiting().items():
            log.info("%d messages for %s wait in the store until the next start", left, name)
        clean = await self._close_store() and clean
        await self._control.close()
        for timer in (self._ticker, self._watcher):
            if timer is not None:
                timer.cancel()
        self._node.release()
        return clean

    def _waiting(self) -> dict[str, int]:
        """Messages that wait for a sink or bridge, by its name."""
        names = (*self.settings.sinks, *self.settings.bridges)
        counts = {name: sum(s.queued for s in self.engine.instances.lanes(name)) for name in names}
        return {name: count for name, count in counts.items() if count}

    async def _close_store(self) -> bool:
        """Let what is in memory reach the disk; False when it did not."""
        if self.journal is None or self.store is None:
            return True
        end = self._loop.time() + WRITING
        self.journal.flush()
        while not self.journal.idle and self._loop.time() < end:  # noqa: ASYNC110 - a few milliseconds, once
            await asyncio.sleep(0.005)
        if not self.journal.idle:  # its thread ends with the process
            log.error("the disk did not take everything within %.0f s; nothing of it was acknowledged", WRITING)
            return False
        self.store.close()
        return not self.store.refusing

    # configuration --------------------------------------------------------------------------------------------

    def _ensure(self, instance: Instance) -> None:
        spec = instance.config.session()  # type: ignore[attr-defined]
        key = None
        if spec.lanes > 1:
            key = order_key(spec.order_key)
        self.engine.instances.ensure(instance.name, spec, key, DEAD_LETTERS if instance.room == "sinks" else None)

    async def _run_instances(self, settings: Settings) -> None:
        """Hand the workers their part. A lane that is no longer configured is attached to as well: it may hold
        messages."""
        lanes = {name: len(self.engine.instances.lanes(name)) for name in (*settings.sinks, *settings.bridges)}
        await self.supervisor.apply(settings.sinks, settings.bridges, settings.workers.processes, settings.base, lanes)

    async def reload(self) -> Difference:
        """Read the whole configuration again and change only what differs.

        Raises ConfigError or ReloadRefused; then nothing has changed, unless the latter says so, though other listeners
        may have taken a renewed certificate. Returns when new subscriptions exist and new listeners accept.
        """
        async with self._reloading:
            try:
                new = await asyncio.to_thread(self._load)
            except ConfigError:
                self.listeners.renew_certificates()  # where a certificate is the reason, its listener shows the alarm
                raise
            old = self.settings
            for key in RESTART_ONLY:
                section, name = key.split(".")
                if getattr(getattr(old, section), name) != getattr(getattr(new, section), name):
                    raise ReloadRefused(f"{new.origin(key)}: {key}: needs a restart to change; nothing was changed")
            change = diff(old, new)
            if change.empty and self.gate.settings is old:
                self.listeners.renew_certificates()
                return change
            try:
                await self.gate.replace(new)
            except AccessError as error:
                raise ReloadRefused(f"{new.located(str(error))}; nothing was changed") from error
            try:
                await self.listeners.apply(new.listeners)
            except ListenError as error:
                raise ReloadRefused(f"{new.located(str(error))}; {await self._undo(old, new)}") from error
            self.engine.configure(limits_of(new))
            await self.gate.recheck(self.engine.clients())
            self._memory.limit = new.broker.max_memory or memory.group_limit()
            touched = set(change.added) | set(change.changed)
            for room, instances in (("sinks", new.sinks), ("bridges", new.bridges)):
                for name, instance in instances.items():
                    if f"{room}.{name}" in touched:
                        self._ensure(instance)
            gone = {*old.sinks, *old.bridges} - {*new.sinks, *new.bridges}
            for name in gone:
                self.engine.instances.mute(name)
            self._events.watch(new.events.publish)
            self.settings = new
            await self._run_instances(new)
            for name in gone:  # only now: what left took its leave by itself
                left = self.engine.instances.remove(name)
                if left:
                    self._warn_of_orphan(name, left)
            for warning in new.warnings:
                log.warning("%s", warning)
            log.info(
                "configuration reloaded: added %s, removed %s, changed %s",
                ", ".join(change.added) or "nothing",
                ", ".join(change.removed) or "nothing",
                ", ".join(change.changed) or "nothing",
            )
            return change

    async def _undo(self, old: Settings, new: Settings) -> str:
        """Put the access rules of `old` back into force, after those of `new` were for a moment; says what is. Where
        they cannot be (a file of theirs was moved), those of `new` stay, and the next reload takes them up again."""
        told = "nothing was changed"
        try:
            await self.gate.replace(old)
        except AccessError as error:
            told = (
                f"the access rules from before cannot be put back either: {old.located(str(error))}; those of the new "
                "configuration are in force, all else is as before; correct it and reload again"
            )
        await self.gate.recheck(self.engine.clients())
        return told

    async def reload_logged(self) -> None:
        """SIGHUP: as `reload`, errors go to the log."""
        try:
            await self.reload()
        except ConfigError as error:
            log.error("reload refused, nothing was changed:\n%s", "\n".join(error.problems))
        except ReloadRefused as error:
            log.error("reload refused: %s", error)
        except Exception as error:
            log.error("reload failed: %s", error)


def limits_of(settings: Settings) -> Limits:
    """The engine's limits from `[limits]`."""
    return Limits(**settings.limits.model_dump())


def order_key(text: str) -> Callable[[Message], str]:
    """A function of a message from the `order_key` template of an instance with several lanes."""
    render = compile_template(Template(text))

    def key(message: Message) -> str:
        origin = message.origin
        record = Record(
            message.topic.decode(),
            message.payload,
            message.qos,
            message.retain,
            origin.client_id if origin is not None else None,
            origin.username if origin is not None else None,
            origin.peerhost if origin is not None else None,
        )
        return str(render(record))

    return key


def tune_process() -> None:
    """Descriptors up to the hard limit, memory returned in large pieces only, rare garbage collections."""
    gc.set_threshold(
        100_000, 50, 100
    )  # core classes form no cycles: a collection finds nothing and costs every connection
    sys.setswitchinterval(SWITCH)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # uvloop reads into 256 000-byte buffers, above glibc's thresholds: without these lines every read costs page faults
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter, value in ((-1, 64 << 20), (-2, 1 << 20), (-3, 32 << 20)):
            libc.mallopt(parameter, value)


def serve(
    load: Callable[[], Settings], *, log_format: str = "text", log_level: str = "info", accept_loss: bool = False
) -> int:
    """`isthmus run`: load, start, serve until a signal, drain. Returns the exit code."""
    intruder = registry.check_layout()
    if intruder is not None:
        print(intruder, file=sys.stderr)
        return 2
    logs.configure(log_format, log_level)
    try:
        settings = load()
        hints = firstrun.prepare(settings)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    os.umask(0o077)
    tune_process()
    make_room()
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_serve(settings, load, hints, log_format, log_level, accept_loss))
    return uvloop.run(_serve(settings, load, hints, log_format, log_level, accept_loss))


async def _serve(
    settings: Settings,
    load: Callable[[], Settings],
    hints: list[str],
    log_format: str,
    log_level: str,
    accept_loss: bool,
) -> int:
    try:
        broker = Broker(settings, load, log_format=log_format, log_level=log_level, accept_loss=accept_loss)
    except identity.DataFolderBusy as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{settings.origin('broker.data')}: broker.data: {error}", file=sys.stderr)
        return 1
    loop = asyncio.get_running_loop()
    signals = 0
    tasks: set[asyncio.Task[None]] = set()

    def on_stop() -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(1)
        broker.stopping.set()

    asked = reloading = False

    async def reload_while_asked() -> None:
        nonlocal asked, reloading
        while asked:  # a signal during a reload may be about files it has already read
            asked = False
            await broker.reload_logged()
        reloading = False

    def on_reload() -> None:
        nonlocal asked, reloading
        asked = True
        if not reloading:
            reloading = True
            task = loop.create_task(reload_while_asked())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_reload)
    try:
        await broker.start()
    except StoreUnusable as error:
        print(error, file=sys.stderr)
        await broker.stop()
        return 1
    except (ListenError, AccessError, ConfigError) as error:
        text = "\n".join(error.problems) if isinstance(error, ConfigError) else settings.located(str(error))
        print(text, file=sys.stderr)
        await broker.stop()
        return 2
    addresses = " ".join(f"{name}={broker.listeners[name].address}" for name in broker.listeners.names)
    print(f"ready {addresses} control={broker.control_path}", flush=True)
    for line in hints:
        print(line, file=sys.stderr, flush=True)
    await broker.stopping.wait()
    began = loop.time()
    clean = await broker.stop()
    log.info("stopped in %.1f s", loop.time() - began)
    return 0 if clean else 1
