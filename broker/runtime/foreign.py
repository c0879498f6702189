"""``isthmus worker --broker URL``: our sinks and bridges, fed by any MQTT 5 broker.

What differs from the internal listener: sessions and subscriptions are made here, and taken back when the
configuration does not ask for them any more; QoS 0 messages stay QoS 0, acknowledgements are sent strictly in order,
and nobody vouches for who published, so `$isthmus` is never believed and a template that needs it is refused (`adapt`).
Lanes share their subscriptions (``$share``): the broker spreads messages freely. A bridge knows what it brought in by a
mark of its own.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TextIO

from broker.client import address
from broker.client.connection import Connection, Handler, connect
from broker.client.errors import reason
from broker.config.settings import Instance, Settings
from broker.extend.session import SessionSpec
from broker.mqtt.packets import Publish
from broker.runtime import instance_log
from broker.runtime.adapt import Refused, adapt_all, without_effect
from broker.runtime.assignment import Assignment
from broker.runtime.attach import FOREVER
from broker.runtime.backoff import Backoff
from broker.runtime.footprint import Footprint
from broker.runtime.host import Host
from broker.runtime.worker import DRAIN

_log = logging.getLogger(__name__)

_CONNECT_WITHIN = 30.0
_LOOK = 1.0  # seconds a broker has, behind its answer to a ping, to begin with what it queues
_NO_LOCAL, _RETAIN_AS_PUBLISHED = 4, 8
_RETAINED_ALL, _RETAINED_NEW, _RETAINED_NONE = 0x00, 0x10, 0x20  # [MQTT-3.3.1-9] to [MQTT-3.3.1-11]


class _Quiet(Handler):
    """Takes nothing: what is delivered to it is delivered again to the lane."""

    receive_maximum = 1
    empty = True
    """Whether nothing was delivered that somebody must acknowledge."""

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.empty = self.empty and not publish.qos


class Foreign:
    """Attaches to somebody else's broker and subscribes there.

    ``sinks`` names the instances that have dead letters; ``footprint`` remembers what is left behind.
    """

    trusted = False
    in_order = True
    longest_wait = 30.0

    def __init__(
        self,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        sinks: Iterable[str] = (),
        footprint: Footprint | None = None,
    ) -> None:
        self._url = url
        self._username = username
        self._password = password
        self._tls = tls
        self._sinks = set(sinks)
        self._footprint = footprint
        self._kept: set[str] = set()
        self._fresh: set[str] = set()
        """Sessions that are new and have not been sent retained messages."""

    async def __call__(self, instance: str, part: str, handler: Handler, spec: SessionSpec) -> Connection:
        if part == "in":
            if instance in self._sinks:
                await self._keep_dead_letters(instance)
            return await self._connect(f"isthmus/{instance}/in", handler)
        client_id = f"isthmus/{instance}/{part}"
        conn = await self._connect(client_id, handler)
        if spec.filters and int(part) < spec.lanes:
            new = client_id in self._fresh or not conn.session_present
            await self._subscribe(conn, _subscriptions(instance, spec, _retained(spec, new)))
            self._fresh.discard(client_id)
        return conn

    async def prepare(self, instance: str, spec: SessionSpec) -> int:
        """Make the sessions of one instance, so that the broker queues for it from now on, and end subscriptions it no
        longer has. Returns how many lanes there are: some of a time before may still hold messages."""
        known = self._footprint.of(instance) if self._footprint is not None else {}
        for lane in range(spec.lanes):
            await self._prepare_lane(instance, str(lane), spec, known.get(str(lane), []))
        lanes = spec.lanes
        for part in (part for part in known if int(part) >= spec.lanes):
            if await self._retire(instance, part, known[part]):
                lanes = max(lanes, int(part) + 1)
        return lanes

    def left_behind(self) -> list[str]:
        """Names of the instances that have sessions there."""
        return self._footprint.instances() if self._footprint is not None else []

    async def forget(self, instance: str) -> bool:
        """End the subscriptions of an instance that is not configured any more; whether a queue of it is left."""
        known = self._footprint.of(instance) if self._footprint is not None else {}
        return any([await self._retire(instance, part, filters) for part, filters in known.items()])

    async def _prepare_lane(self, instance: str, lane: str, spec: SessionSpec, known: Sequence[str]) -> None:
        conn = await self._connect(f"isthmus/{instance}/{lane}", _Quiet())
        try:
            new = not conn.session_present
            if new:
                self._fresh.add(conn.client_id)  # what is sent at QoS 0 would be lost on who is here now
            wanted = _subscriptions(instance, spec, _RETAINED_NONE if new else _retained(spec, False))
            names = [name for name, _ in wanted]
            if gone := [name for name in known if name not in names]:
                await conn.unsubscribe(gone)
            if wanted:
                await self._subscribe(conn, wanted)
            if self._footprint is not None:
                self._footprint.note(instance, lane, names)
        finally:
            await conn.disconnect()

    async def _retire(self, instance: str, part: str, filters: Sequence[str]) -> bool:
        """End the subscriptions of a session that is not wanted, and the session when nothing queues in it; whether it
        is still there."""
        client_id, quiet = f"isthmus/{instance}/{part}", _Quiet()
        conn = await self._connect(client_id, quiet)
        try:
            left = conn.session_present
            if left:
                if filters:
                    await conn.unsubscribe(filters)
                await conn.ping()
                await asyncio.sleep(_LOOK)
                left = not quiet.empty
        finally:
            await conn.disconnect()
        if not left:
            await (await self._connect(client_id, _Quiet(), expiry=0)).disconnect()
        if self._footprint is not None:
            self._footprint.note(instance, part, [] if left else None)
        return left

    async def _connect(self, client_id: str, handler: Handler, expiry: int = FOREVER) -> Connection:
        return await connect(
            self._url,
            client_id=client_id,
            handler=handler,
            clean_start=False,
            session_expiry=expiry,
            keep_alive=10,
            username=self._username,
            password=self._password,
            tls=self._tls,
        )

    async def _subscribe(self, conn: Connection, filters: Sequence[tuple[str, int]]) -> None:
        """Raises ConnectionError when the broker grants none of them; says in the log what it does not grant."""
        codes = await conn.subscribe(filters)
        refused = [(f, code) for (f, _), code in zip(filters, codes, strict=True) if code >= 0x80]
        for topic_filter, code in refused:
            _log.error("the broker refuses the subscription to %s: %s", topic_filter, reason(code))
        if len(refused) == len(filters):
            await conn.disconnect()
            raise ConnectionError(f"the broker refuses the subscription to {refused[0][0]}: {reason(refused[0][1])}")

    async def _keep_dead_letters(self, instance: str) -> None:
        """A session that is subscribed and never read: the queue in which dead letters wait for somebody to look."""
        if instance in self._kept:
            return
        conn = await self._connect(f"isthmus/{instance}/dlq", _Quiet())
        try:
            await self._subscribe(conn, [(f"$dlq/{instance}", 1)])
        finally:
            await conn.disconnect()
        self._kept.add(instance)


def _retained(spec: SessionSpec, new: bool) -> int:
    """Which retained messages the subscriptions of a session ask for: an existing one never gets them again."""
    if spec.retained == "never":
        return _RETAINED_NONE
    if new:
        return _RETAINED_ALL
    return _RETAINED_NEW if spec.retained == "always" else _RETAINED_NONE


def _subscriptions(instance: str, spec: SessionSpec, options: int) -> list[tuple[str, int]]:
    """Filters and option bytes; lanes share theirs, which excludes No Local [MQTT-3.8.3-4]."""
    if spec.retain_as_published:
        options |= _RETAIN_AS_PUBLISHED
    if spec.lanes > 1:
        return [(f"$share/isthmus-{instance}/{f}", qos | options) for f, qos in spec.filters]
    if spec.no_local:
        options |= _NO_LOCAL
    return [(f, qos | options) for f, qos in spec.filters]


def select(settings: Settings, only: Sequence[str] = ()) -> list[Instance]:
    """The enabled sinks and bridges, or those named in ``only``; Refused for a name that is not there."""
    everything = [i for i in (*settings.sinks.values(), *settings.bridges.values()) if i.enabled]
    names = {name for i in everything for name in (i.name, f"{i.room}.{i.name}")}
    if unknown := [name for name in only if name not in names]:
        raise Refused([f"--only {name}: there is no such sink or bridge" for name in unknown])
    chosen = [i for i in everything if not only or i.name in only or f"{i.room}.{i.name}" in only]
    if not chosen:
        raise Refused(["no sink or bridge is configured, there is nothing to run"])
    return chosen


async def work(
    settings: Settings,
    attach: Foreign,
    assignments: Sequence[Assignment],
    instances: Sequence[Instance],
    stop: asyncio.Event,
    out: TextIO,
    connect_within: float = _CONNECT_WITHIN,
) -> int:
    """Make the sessions, say ``ready``, run until ``stop``; 3 when the broker was never reached."""
    try:
        async with asyncio.timeout(connect_within):
            lanes = {instance.name: await _prepare(attach, instance) for instance in instances}
    except TimeoutError:
        _log.error("gave up: the broker could not be reached within %.0f s", connect_within)
        return 3
    names = {room: ",".join(i.name for i in instances if i.room == room) for room in ("sinks", "bridges")}
    instance_log.install()
    host = Host(attach, str(getattr(settings.broker, "name", "isthmus")))
    await host.apply(replace(assignment, lanes=lanes[assignment.name]) for assignment in assignments)
    print(f"ready sinks={names['sinks']} bridges={names['bridges']}", file=out, flush=True)
    forgetting = asyncio.create_task(_forget(attach, settings))
    await stop.wait()
    forgetting.cancel()
    await asyncio.gather(forgetting, return_exceptions=True)
    await host.close(DRAIN)
    return 0


async def _prepare(attach: Foreign, instance: Instance) -> int:
    config: Any = instance.config
    wait = Backoff(0.2, 5.0)
    while True:
        try:
            return await attach.prepare(instance.name, config.session())
        except (OSError, TimeoutError) as error:
            pause = wait.next()
            _log.warning("%s cannot attach to the broker, next try in %.1f s: %s", instance.name, pause, error)
            await asyncio.sleep(pause)


async def _forget(attach: Foreign, settings: Settings) -> None:
    """Instances whose tables are gone take nothing any more; what queues for them stays until somebody deletes it."""
    for name in attach.left_behind():
        if name in settings.sinks or name in settings.bridges:
            continue
        try:
            if await attach.forget(name):
                _log.warning(
                    "%s is not configured any more; what queues for it stays in the sessions isthmus/%s/…", name, name
                )
        except (OSError, TimeoutError) as error:
            _log.warning("the subscriptions of %s, which is not configured any more, stay: %s", name, error)


def serve(
    settings: Settings,
    url: str,
    only: Sequence[str] = (),
    *,
    username: str | None = None,
    password: str | None = None,
    tls: ssl.SSLContext | None = None,
    insecure: bool = False,
    connect_within: float = _CONNECT_WITHIN,
    out: TextIO | None = None,
) -> int:
    """Run the configured sinks and bridges against the broker at ``url`` until SIGTERM or SIGINT.

    Returns the exit code: 0 after a stop, 2 when the configuration cannot run there (one line per problem on standard
    error), 3 when the broker was not reached in time. Prints ``ready sinks=… bridges=…``, names joined by commas, once
    the broker queues for us. ``insecure`` lets a password cross the network in the clear. ValueError: a bad ``url``.
    """
    broker = address.parse(url)
    if password and not (insecure or broker.secure or broker.local):
        print(
            f"--broker {broker}: the password would cross the network in the clear: use mqtts:// or wss://, or say "
            "--insecure",
            file=sys.stderr,
        )
        return 2
    try:
        instances = select(settings, only)
        assignments = adapt_all(instances, settings)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    for instance in instances:
        for sentence in without_effect(instance, settings):
            _log.warning("%s", sentence)
    attach = Foreign(
        url,
        username=username,
        password=password,
        tls=tls,
        sinks=[i.name for i in instances if i.room == "sinks"],
        footprint=Footprint(settings.broker.data, url),
    )

    async def main() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
                loop.add_signal_handler(number, stop.set)
        job = asyncio.create_task(
            work(settings, attach, assignments, instances, stop, out or sys.stdout, connect_within)
        )
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((job, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not job.done():
            _, pending = await asyncio.wait((job,), timeout=DRAIN * 2)
            if pending:  # still waiting for the broker
                job.cancel()
                await asyncio.gather(job, return_exceptions=True)
                return 0
        return job.result()

    try:
        import uvloop
    except ImportError:
        return asyncio.run(main())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
