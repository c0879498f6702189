"""``isthmus worker --broker URL``: our sinks and bridges, fed by any MQTT 5 broker.

What differs from the internal listener: sessions and subscriptions are made here, QoS 0 messages stay QoS 0,
acknowledgements are sent strictly in order, and nobody vouches for who published, so `$isthmus` is never believed and
a template that needs it is refused. Lanes share their subscriptions (``$share``): the broker spreads messages freely.
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
from urllib.parse import unquote, urlsplit, urlunsplit

from broker.client.connection import Connection, Handler, connect
from broker.client.errors import reason
from broker.config.settings import Instance, Settings, restore
from broker.config.template import Template
from broker.extend.record import VOUCHED
from broker.extend.registry import InstanceConfig
from broker.extend.session import SessionSpec
from broker.runtime import instance_log
from broker.runtime.assignment import Assignment
from broker.runtime.attach import FOREVER
from broker.runtime.backoff import Backoff
from broker.runtime.host import Host
from broker.runtime.worker import DRAIN

_log = logging.getLogger(__name__)

_CONNECT_WITHIN = 30.0
_RETAIN_HANDLING = {"always": 0, "new": 1, "never": 2}
_NO_LOCAL, _RETAIN_AS_PUBLISHED = 4, 8


class Refused(ValueError):
    """These instances cannot run beside a foreign broker."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class _Quiet(Handler):
    """Takes nothing: what is delivered to it is delivered again to the lane."""

    receive_maximum = 1


class Foreign:
    """Attaches to somebody else's broker and subscribes there."""

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
    ) -> None:
        parts = urlsplit(url if "://" in url else f"mqtt://{url}")
        if parts.username is not None:  # mqtt://user:password@host, which the client itself does not take
            username = username or unquote(parts.username)
            password = password or (unquote(parts.password) if parts.password else None)
            url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self._url = url
        self._username = username
        self._password = password
        self._tls = tls
        self._sinks = set(sinks)
        self._kept: set[str] = set()

    async def __call__(self, instance: str, part: str, handler: Handler, spec: SessionSpec) -> Connection:
        if part == "in" and instance in self._sinks:
            await self._keep_dead_letters(instance)
        conn = await self._connect(f"isthmus/{instance}/{part}", handler)
        if part != "in" and spec.filters:
            await self._subscribe(conn, _subscriptions(instance, spec))
        return conn

    async def prepare(self, instance: str, spec: SessionSpec) -> None:
        """Make the sessions of one instance, so that the broker queues for it from now on."""
        for lane in range(spec.lanes):
            await (await self(instance, str(lane), _Quiet(), spec)).disconnect()

    async def _connect(self, client_id: str, handler: Handler) -> Connection:
        return await connect(
            self._url,
            client_id=client_id,
            handler=handler,
            clean_start=False,
            session_expiry=FOREVER,
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


def _subscriptions(instance: str, spec: SessionSpec) -> list[tuple[str, int]]:
    """Filters and option bytes; lanes share theirs, which excludes No Local [MQTT-3.8.3-4]."""
    options = _RETAIN_HANDLING[spec.retained] << 4
    if spec.retain_as_published:
        options |= _RETAIN_AS_PUBLISHED
    if spec.lanes > 1:
        return [(f"$share/isthmus-{instance}/{f}", qos | options) for f, qos in spec.filters]
    if spec.no_local:
        options |= _NO_LOCAL
    return [(f, qos | options) for f, qos in spec.filters]


def adapt(instance: Instance, settings: Settings) -> Assignment:
    """What to run of one instance, with defaults that need no metadata.

    Raises Refused with a line for each key that asks for what only our own broker knows.
    """
    assignment = Assignment.of(instance, settings.base)
    problems = [
        f"{instance.origin}: {assignment.key}.{key}: ${{{name}}} in {template.text!r}: only Isthmus itself knows it"
        for field in sorted(instance.config.model_fields_set)
        for key, template in _templates(field, getattr(instance.config, field, None))
        for name in _vouched(template)
    ]
    if any(getattr(line, "direction", None) == "both" for line in getattr(instance.config, "topics", ())):
        problems.append(
            f'{instance.origin}: {assignment.key}.topics: direction "both" needs Isthmus itself, '
            "which knows where a message came from; elsewhere it would go round in circles"
        )
    if problems:
        raise Refused(problems)
    raw = {**instance.raw, **_defaults(instance.config)}
    return replace(assignment, raw=raw)


def _defaults(config: InstanceConfig) -> dict[str, Any]:
    """In place of defaults that need metadata: the topic as key, tables without the entries in question."""
    changed: dict[str, Any] = {}
    for field in type(config).model_fields:
        value = getattr(config, field)
        if field in config.model_fields_set or not any(_vouched(t) for _, t in _templates(field, value)):
            continue
        if isinstance(value, dict):
            changed[field] = {k: t.text for k, t in value.items() if isinstance(t, Template) and not _vouched(t)}
        elif isinstance(value, Template):
            changed[field] = "${topic}"
    return changed


def _templates(key: str, value: object) -> list[tuple[str, Template]]:
    if isinstance(value, Template):
        return [(key, value)]
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in _templates(f"{key}.{name}", item)]
    if isinstance(value, list | tuple):
        return [found for item in value for found in _templates(key, item)]
    return []


def _vouched(template: Template) -> list[str]:
    return [name for name in template.names if name.partition(".")[0].partition("[")[0] in VOUCHED]


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
            for instance in instances:
                await _prepare(attach, instance, settings)
    except TimeoutError:
        _log.error("gave up: the broker could not be reached within %.0f s", connect_within)
        return 3
    names = {room: ",".join(i.name for i in instances if i.room == room) for room in ("sinks", "bridges")}
    instance_log.install()
    host = Host(attach, str(getattr(settings.broker, "name", "isthmus")))
    await host.apply(assignments)
    print(f"ready sinks={names['sinks']} bridges={names['bridges']}", file=out, flush=True)
    await stop.wait()
    await host.close(DRAIN)
    return 0


async def _prepare(attach: Foreign, instance: Instance, settings: Settings) -> None:
    config: Any = instance.config
    wait = Backoff(0.2, 5.0)
    while True:
        try:
            await attach.prepare(instance.name, config.session())
            return
        except (OSError, TimeoutError) as error:
            pause = wait.next()
            _log.warning("%s cannot attach to the broker, next try in %.1f s: %s", instance.name, pause, error)
            await asyncio.sleep(pause)


def serve(
    settings: Settings,
    url: str,
    only: Sequence[str] = (),
    *,
    username: str | None = None,
    password: str | None = None,
    tls: ssl.SSLContext | None = None,
    connect_within: float = _CONNECT_WITHIN,
    out: TextIO | None = None,
) -> int:
    """Run the configured sinks and bridges against the broker at ``url`` until SIGTERM or SIGINT.

    Returns the exit code: 0 after a stop, 2 when the configuration cannot run there (one line per problem on standard
    error), 3 when the broker was not reached in time. Prints ``ready sinks=… bridges=…``, names joined by commas, once
    the broker queues for us.
    """
    try:
        instances = select(settings, only)
        assignments = _adapt_all(instances, settings)
        attach = Foreign(
            url, username=username, password=password, tls=tls, sinks=[i.name for i in instances if i.room == "sinks"]
        )
    except Refused as error:
        print(error, file=sys.stderr)
        return 2

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


def _adapt_all(instances: Sequence[Instance], settings: Settings) -> list[Assignment]:
    adapted: list[Assignment] = []
    problems: list[str] = []
    for instance in instances:
        try:
            adapted.append(adapt(instance, settings))
            restore(instance.room, instance.name, adapted[-1].raw, settings.base)
        except Refused as error:
            problems += error.problems
        except ValueError as error:
            problems.append(f"{instance.origin}: {instance.room}.{instance.name}: {error}")
    if problems:
        raise Refused(problems)
    return adapted
