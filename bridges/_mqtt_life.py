"""One life of a bridge, from the first connection to the first that ends, and what outlives it."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from typing import TYPE_CHECKING, Any

from bridges._mqtt_lanes import Lane, Nothing
from bridges._mqtt_link import Again, Inlet, Link, Outlet, RemoteSide
from bridges._mqtt_relay import Relay, Target
from bridges._mqtt_remote import Dialect, Remote, reachable
from bridges._mqtt_topics import Routes
from broker.client.connection import Connection, Handler
from broker.client.errors import reason
from broker.mqtt.packets import Will

if TYPE_CHECKING:
    from bridges.mqtt import MqttConfig

_log = logging.getLogger(__name__)

_PUBREL = 6
_FOREVER = 0xFFFFFFFF  # [MQTT-3.1.2-23]
_NO_LOCAL, _AS_PUBLISHED, _ONLY_NEW = 0x04, 0x08, 0x10
_TICK = 1.0  # seconds between two looks at counters and clocks
_PROBE, _PROBE_CAP = 5.0, 300.0  # seconds between two looks at the first server, while on another
_RESUBSCRIBE = 60.0  # seconds until a refused subscription is asked for again
_LOG_EVERY = 10_000  # messages of one kind that do not cross, between two lines in the log


class Memory:
    """What a bridge knows from one life to the next: counters, and which server our identifiers belong to."""

    def __init__(self, config: MqttConfig, remote: Remote, origin: str = "") -> None:
        self.config = config
        self.origin = origin
        """What marks a message that came in, where the broker itself does not know it again."""
        self.remote = remote
        self.routes_out = Routes(config.topics, outward=True)
        self.routes_in = Routes(config.topics, outward=False)
        self.counts_out: Counter[str] = Counter()
        self.counts_in: Counter[str] = Counter()
        self.connects = 0
        only = config.servers[0] if len(config.servers) == 1 else None  # unknown after a start with several
        self.server = only
        """The server of the current life, or of the last one."""
        self.inlet_of = only
        """The server whose packet identifiers the inlet's session knows."""
        self.outlet_of = only
        """The server that knows the outlet's packet identifiers, or none it must not know."""
        self.clean_inlet = config.clean_session
        self.subscribed: dict[str, int] = {}
        """What `server` has accepted."""
        self.exactly_in = any(line.into and line.qos == 2 for line in config.topics)
        self.exactly_out = any(line.out and line.qos == 2 for line in config.topics)
        self.start = 0
        """Position of the server to try first."""
        self.probe = _PROBE
        self.kicked = 0
        """Links that ended right behind the notification, one after the other."""
        self.last_refusal = ""

    def arrive(self, url: str, present: bool, inlet_present: bool) -> None:
        """A server has accepted us and has our session, or not. Raises Again when the inlet must be begun anew first:
        it may hold packet identifiers that mean other messages now."""
        if url != self.server or not present:
            self.subscribed = {}
        self.server = url
        if not present:
            self.outlet_of = url  # it holds no identifier at all
        if self.exactly_in and inlet_present and not self.clean_inlet and (url != self.inlet_of or not present):
            self.clean_inlet = True
            raise Again("the remote broker's session is not the one our inlet knows")
        self.inlet_of = url
        self.clean_inlet = self.config.clean_session

    def refuse(self, direction: str, counts: Counter[str], why: str, detail: str) -> None:
        """A message did not cross. Counted already; the operator is told the first time and then rarely."""
        self.last_refusal = f"{direction}: {why}: {detail}"
        if counts[f"dropped.{why}"] % _LOG_EVERY == 1:
            _log.warning("bridges.%s: a message %s did not cross: %s: %s", self.config.name, direction, why, detail)


async def dial(
    config: MqttConfig,
    tls: ssl.SSLContext | None,
    handler: Handler,
    url: str,
    dialect: Dialect,
    client_id: str,
    will: Will | None,
    temporary: bool = False,
) -> Connection:
    """Open one connection to a remote server as the configuration says; ``temporary`` ones leave no session behind."""
    clean = temporary or config.clean_session
    expiry = 0 if clean else _FOREVER if config.session_expiry is None else int(config.session_expiry)
    return await Connection.connect(
        url,
        client_id=client_id,
        handler=handler,
        version=dialect[0],
        bridge_bit=dialect[1],
        clean_start=clean,
        session_expiry=expiry,
        keep_alive=int(config.keep_alive),
        username=config.username,
        password=config.password.reveal() if config.password is not None else None,
        will=will,
        receive_maximum=config.receive_maximum,
        max_packet_size=config.max_packet_size or None,
        tls=tls,
        bind=config.bind_address,
        timeout=config.connect_timeout,
    )


class Life:
    """Opens inlet, remote and outlet, watches over them, and ends them together."""

    def __init__(self, memory: Memory, local: Lane, tls: ssl.SSLContext | None) -> None:
        self._memory = memory
        self._config = memory.config
        self._local = local
        self._tls = tls
        self._link = Link()
        self._inlet: Connection | None = None
        self._far: Connection | None = None
        self._into: Relay | Nothing | None = None
        self._out: Relay | None = None
        self._refused: dict[str, int] = {}
        self._topic = self._config.notification_topic or f"$SYS/broker/connection/{memory.remote.full_client_id}/state"
        will = Will(self._topic.encode(), b"0", 0, True) if self._config.notifications else None
        self._inlet_side = Inlet(self._link, will, memory.clean_inlet)

    async def live(self) -> None:
        """Returns to have the bridge move back to its first server; raises ConnectionError when a side is lost."""
        self._local.report(state="connecting")
        try:
            await self._open()
            self._report(state="connected", last_error=None, server=self._memory.server)
            await self._stay()
        except asyncio.CancelledError:
            await self._leave()
            raise
        except ConnectionError as error:
            if self._config.round_robin and self._far is not None and not isinstance(error, Again):
                self._memory.start = (self._memory.start + 1) % len(self._memory.remote.servers)
            raise
        else:
            await self._leave()
        finally:
            self._link.cut()
            for relay in (self._into, self._out):
                if relay is not None:
                    relay.close()
            self._report(open_in=0, open_out=0)

    # opening

    async def _open(self) -> None:
        if self._local.number == 0:
            self._inlet = await self._add(self._local.publish(self._inlet_side), "the broker's own listener")
            self._notify(self._inlet, b"0")
        self._far = await self._find_server()
        await self._greet(self._far)
        if self._memory.routes_out:
            await self._attach_outlet(self._far)
        if self._inlet is not None:
            self._notify(self._inlet, b"1")
        self._memory.connects += 1

    async def _add(self, opening: Any, whom: str) -> Connection:
        try:
            return await self._link.add(asyncio.ensure_future(opening))
        except ConnectionError as error:
            raise ConnectionError(f"{whom}: {error}") from error

    async def _find_server(self) -> Connection:
        servers = self._memory.remote.servers
        start = self._memory.start if self._config.round_robin else 0
        problems = []
        for step in range(len(servers)):
            position = (start + step) % len(servers)
            try:
                conn = await self._link.add(asyncio.ensure_future(self._dial(servers[position])))
            except ConnectionError as error:
                if self._link.lost.done():
                    raise
                problems.append(str(error))
                continue
            self._memory.start = position
            self._memory.probe = _PROBE if position == 0 else min(_PROBE_CAP, self._memory.probe * 2)
            return conn
        raise ConnectionError("; ".join(problems))

    async def _dial(self, url: str) -> Connection:
        will = None
        if self._config.notifications and not self._config.notifications_local_only:
            will = Will(self._topic.encode(), b"0", 1, True)
        side: RemoteSide | None = None

        async def attempt(url: str, dialect: Dialect, client_id: str, will: Will | None) -> Connection:
            nonlocal side
            side = RemoteSide(self._link, self._window_in(), lambda conn: self._begin(url, conn))
            return await dial(self._config, self._tls, side, url, dialect, client_id, will)

        conn = await self._memory.remote.open(attempt, url, will)
        if side is None or side.begin(conn) is None:
            conn.abort()
        return conn

    def _window_in(self) -> int:
        inlet = self._inlet
        return min(self._config.receive_maximum, inlet.receive_maximum if inlet is not None else 65_535)

    def _begin(self, url: str, conn: Connection) -> tuple[Relay | Nothing, Relay]:
        """Called once, before the first packet behind CONNACK."""
        memory = self._memory
        inlet = self._inlet
        memory.arrive(url, conn.session_present, inlet is not None and inlet.session_present)
        node = self._local.node
        into: Relay | Nothing = Nothing(memory.counts_in)
        if inlet is not None:
            into = self._inlet_side.relay = Relay(
                memory.routes_in,
                Target(inlet, 65_535),
                node=node,
                outward=False,
                counts=memory.counts_in,
                origin=memory.origin,
                refused=lambda why, detail: memory.refuse("in", memory.counts_in, why, detail),
                not_kept=self._not_kept if not self._local.echoes else None,
            )
        self._into = into
        out = self._out = Relay(
            memory.routes_out,
            Target(conn, self._config.receive_maximum),
            node=node,
            outward=True,
            counts=memory.counts_out,
            retain=self._config.outgoing_retain,
            origin=memory.origin,
            refused=lambda why, detail: memory.refuse("out", memory.counts_out, why, detail),
        )
        return into, out

    def _not_kept(self) -> None:
        self._link.fail(ConnectionError("our own broker has not got a message to disk; the remote sends it again"))

    async def _greet(self, far: Connection) -> None:
        """Notification, subscriptions, and the end of subscriptions that no line asks for any more. What queues for our
        session comes before the answers, so a server that sends may take its time."""
        counts = self._memory.counts_in
        greeting = asyncio.create_task(self._introduce(far))
        try:
            before = -1
            while not greeting.done():
                heard = counts.total()
                if heard == before:
                    raise ConnectionError(f"{self._memory.server}: no answer to SUBSCRIBE or UNSUBSCRIBE")
                before = heard
                await asyncio.wait({greeting}, timeout=self._config.connect_timeout)
            greeting.result()
        finally:
            greeting.cancel()

    async def _introduce(self, far: Connection) -> None:
        await self._notify_remote(far)
        await self._subscribe(far)
        gone = [line.remote for line in self._config.topics if not line.into]
        gone = [f for f in dict.fromkeys(gone) if f not in self._wanted()]
        if gone and self._config.attempt_unsubscribe:
            await far.unsubscribe(gone)

    async def _notify_remote(self, far: Connection) -> None:
        """A server that hangs up because of the notification, twice, is not told any more."""
        manner = self._memory.remote.manner(self._memory.server or "")
        if not self._config.notifications or self._config.notifications_local_only or not manner.notify:
            return
        self._notify(far, b"1")
        try:
            await far.ping()
        except ConnectionError:
            self._memory.kicked += 1
            if self._memory.kicked >= 2:
                manner.notify = False
                _log.warning(
                    "bridges.%s: %s hangs up behind our notification on %s: it stays on this side. "
                    "notifications_local_only = true says so from the start",
                    self._config.name, self._memory.server, self._topic,
                )  # fmt: skip
            raise
        self._memory.kicked = 0

    def _wanted(self) -> dict[str, int]:
        wanted: dict[str, int] = {}
        for line in self._config.topics:
            if line.into:
                wanted[line.remote] = max(line.qos, wanted.get(line.remote, 0))
        return wanted

    async def _subscribe(self, far: Connection) -> None:
        """Ask for every `in` filter; what is refused is reported and asked for again later, the rest works."""
        wanted = self._wanted()
        if far.version < 5 and far.session_present:  # 3.x would send retained messages again with each SUBSCRIBE
            wanted = {f: qos for f, qos in wanted.items() if self._memory.subscribed.get(f) != qos}
        if not wanted:
            return
        options = _NO_LOCAL | _AS_PUBLISHED | (_ONLY_NEW if far.session_present else 0)
        codes = await far.subscribe([(f, qos | options) for f, qos in wanted.items()])
        self._refused = {}
        for (name, qos), code in zip(wanted.items(), codes, strict=False):
            if code >= 0x80:
                self._refused[name] = code
                _log.warning(
                    "bridges.%s: %s refuses the subscription to %s: %s",
                    self._config.name, self._memory.server, name, reason(code),
                )  # fmt: skip
            else:
                self._memory.subscribed[name] = qos

    async def _attach_outlet(self, far: Connection) -> None:
        out = self._out
        if out is None:
            raise ConnectionError("the remote broker was lost")

        memory = self._memory
        if memory.outlet_of != memory.server:
            if memory.exactly_out:
                await self._free_identifiers(far)
            memory.outlet_of = memory.server

        def begin(conn: Connection) -> None:
            if not conn.session_present and far.session_present and memory.exactly_out:
                memory.outlet_of = None
                raise Again("our own session is new, the remote broker's is not")

        window = min(self._config.receive_maximum, far.receive_maximum)
        outlet = Outlet(self._link, window, out, begin)
        outlet.begin(await self._add(self._local.receive(outlet), "the broker's own listener"))

    async def _free_identifiers(self, far: Connection) -> None:
        """The server may hold any packet identifier for a message of another time; have it let go of all of them."""
        for packet_id in range(1, 65_536):
            far.ack(_PUBREL, packet_id)
        async with asyncio.timeout(self._config.connect_timeout):
            await far.ping()  # answered behind all of them; their PUBCOMPs belong to nothing and are left alone

    # staying

    async def _stay(self) -> None:
        loop = asyncio.get_running_loop()
        subscribe_at = loop.time() + _RESUBSCRIBE
        probe_at = loop.time() + self._memory.probe
        while True:
            await asyncio.wait({self._link.lost}, timeout=_TICK)
            if self._link.lost.done():
                await self._link.lost
            now = loop.time()
            self._watch(now)
            self._report()
            if self._refused and now >= subscribe_at and self._far is not None:
                subscribe_at = now + _RESUBSCRIBE
                await self._greet(self._far)
            if self._memory.start > 0 and not self._config.round_robin and now >= probe_at:
                probe_at = now + self._memory.probe
                if await reachable(self._memory.remote.servers[0], self._config.connect_timeout):
                    _log.info("bridges.%s: moving back to %s", self._config.name, self._memory.remote.servers[0])
                    return

    def _watch(self, now: float) -> None:
        oldest = self._out.oldest() if self._out is not None else None
        if oldest is not None and now - oldest > self._config.ack_timeout:
            self._link.fail(
                ConnectionError(f"{self._memory.server}: a message is not acknowledged for {now - oldest:.0f} s")
            )
        since = self._into.stalled() if self._into is not None else None
        if since is not None and now - since > self._config.ack_timeout:
            self._link.fail(
                ConnectionError(f"{self._memory.server}: it uses a packet identifier twice and ends neither message")
            )

    def _report(self, **more: Any) -> None:
        memory = self._memory
        counters: dict[str, Any] = {"connects": memory.connects, "last_refusal": memory.last_refusal}
        for name, counts, relay in (("in", memory.counts_in, self._into), ("out", memory.counts_out, self._out)):
            counters[f"messages_{name}"] = counts["messages"]
            counters[f"retried_{name}"] = counts["retried"]
            counters[f"dropped_{name}"] = {
                key.partition(".")[2]: value for key, value in counts.items() if key.startswith("dropped.")
            }
            counters[f"open_{name}"] = relay.open if relay is not None else 0
        if memory.origin:
            counters["returned"] = memory.counts_out["returned"]
        counters["refused_subscriptions"] = {name: reason(code) for name, code in self._refused.items()}
        if self._far is not None:
            counters["protocol"] = {3: "3.1", 4: "3.1.1", 5: "5"}[self._far.version]
            if self._far.round_trip is not None:
                counters["round_trip_ms"] = round(self._far.round_trip * 1000, 3)
        self._local.report(**{**counters, **more})

    # leaving

    async def _leave(self) -> None:
        """On purpose: no will is published, so the state is."""
        if self._far is not None and self._memory.server is not None:
            manner = self._memory.remote.manner(self._memory.server)
            if manner.notify and not self._config.notifications_local_only:
                self._notify(self._far, b"0")
        if self._inlet is not None:
            self._notify(self._inlet, b"0")
        await self._link.leave()

    def _notify(self, conn: Connection, state: bytes) -> None:
        if self._config.notifications:
            properties = conn.connack.properties
            retain = properties is None or properties.retain_available != 0
            conn.publish(self._topic, state, 0, retain)
