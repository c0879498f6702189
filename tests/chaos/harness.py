"""One run: load on every path, kills at random moments, then rest, then the books are compared.

Where messages go: every device publishes to eight topics. Two reach subscribers that are always there, two reach some
that come and go, one each the Kafka sink, the SQLite sink and, over the bridge, a subscriber on mosquitto, one is
retained; a publisher on mosquitto reaches a subscriber here. Sinks and bridge are paused now and then, so that they
have queues to lose, and connections of publishers are cut. Nothing in the broker's configuration may drop a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.broker import Broker
from tests.chaos import outlets
from tests.chaos.devices import Incidents, Publisher, Reader, Subscriber, roam
from tests.chaos.ledger import Books, Copies, KafkaReport, Report, Stored, compare_kafka
from tests.chaos.victim import NoAnswer, Victim, reserve_port
from tests.servers import PATIENCE, Kafka, Mosquitto

CONFIGURATION = """
[access]
allow_anonymous = true
no_match = "allow"
[listeners.tcp]
bind = "127.0.0.1:{port}"
[limits]
receive_maximum = 65_535
max_inflight = 1_000
max_queued_messages = 100_000_000
session_expiry = "30d"
takeover_rate = 100_000
[sinks.kafka]
servers = ["{bootstrap}"]
topic = "{topic}"
filters = ["chaos/kafka/#"]
queue = {{ max_bytes = "1TB" }}
[sinks.sqlite]
path = "telemetry.db"
filters = ["chaos/sqlite/#"]
queue = {{ max_bytes = "1TB" }}
[bridges.hq]
kind = "mqtt"
servers = ["{remote}"]
clientid = "chaos"
restart = {{ base = "50ms", cap = "200ms" }}
queue = {{ max_bytes = "1TB" }}
topics = [
    {{ filter = "chaos/up/#", direction = "out", qos = 2 }},
    {{ filter = "chaos/down/#", direction = "in", qos = 2 }},
]
"""
MOSQUITTO = "max_queued_messages 0\nmax_inflight_messages 0"
"""Global options of a mosquitto that drops nothing."""

Only = Literal["both", "broker", "worker"]

_FAR = "mosquitto at QoS 2"
_FAR_BEHIND = 30_000
"""Messages that may wait on mosquitto for the bridge. It gives a message its packet identifier when it comes, and up to
2.0.12 no window bounds what it has in flight: of more than 65 535 two would have the same."""
_TICK = 0.005
_BURST = 10
_WORKERS_SHARE = 0.3
_STARTING_SHARE = 0.1
_FIRST_WITHIN = 30.0 * PATIENCE
_HANDSHAKES_WITHIN = 60.0 * PATIENCE
_QUIET = 5.0 * PATIENCE
"""Seconds without any change, all queues empty, after which what has not arrived is lost."""
_STUCK = 60.0 * PATIENCE
"""Seconds without any change after which a queue that is not empty will never be."""
_ON_ITS_WAY = 2_000 * PATIENCE
"""Milliseconds for which Kafka may have had the request of a worker that was killed before it appends the batch."""
_PATHS = {
    "online 5.0 QoS 1": Copies.ANY,
    "online 5.0 QoS 2": Copies.ONCE,
    "online 3.1.1 QoS 1": Copies.ANY,
    "online 3.1.1 QoS 2": Copies.ONCE,
    "roaming 5.0 QoS 1": Copies.ANY,
    "roaming 5.0 QoS 2": Copies.ONCE,
    "roaming 3.1.1 QoS 1": Copies.ANY,
    "roaming 3.1.1 QoS 2": Copies.ONCE,
    "bridge out": Copies.ONCE,
    "bridge in": Copies.ONCE,
    "Kafka": Copies.ANY,  # `compare_kafka` counts what is stored twice
    "SQLite": Copies.AS_SENT,
    "retained": Copies.LATEST,
}
_LIVE = [path for path in _PATHS if path not in ("Kafka", "SQLite", "retained")]
"""Where messages are seen as they come out; the others are read at the end."""
_INSTANCES = (("sinks", "kafka"), ("sinks", "sqlite"), ("bridges", "hq"))
_VERSIONS = {"5.0": 5, "3.1.1": 4}


@dataclass(frozen=True)
class Route:
    """A topic of every publisher, and where its messages come out."""

    name: str
    paths: tuple[str, ...]
    weight: int
    """Its share of the messages."""


_ROUTES = (
    Route("online5", ("online 5.0 QoS 1", "online 5.0 QoS 2"), 12),
    Route("online3", ("online 3.1.1 QoS 1", "online 3.1.1 QoS 2"), 12),
    Route("roaming5", ("roaming 5.0 QoS 1", "roaming 5.0 QoS 2"), 10),
    Route("roaming3", ("roaming 3.1.1 QoS 1", "roaming 3.1.1 QoS 2"), 10),
    Route("kafka", ("Kafka",), 22),
    Route("sqlite", ("SQLite",), 16),
    Route("up", ("bridge out",), 18),
    Route("retained", ("retained",), 4),
)


@dataclass(frozen=True)
class Plan:
    """How a run goes."""

    rounds: int
    seed: int
    only: Only = "both"
    publishers: tuple[int, int] = (50, 20)
    """Devices that publish at QoS 1, at QoS 2."""
    rate: int = 9_000
    """Messages per second from all devices together, at most."""
    far_rate: int = 500
    """Messages per second from the publisher on mosquitto, at most."""
    shortest: float = 0.3
    """Seconds between the first acknowledgement after a start and the next kill."""
    longest: float = 1.5


class Run:
    """The pieces of one run; `Run(…).report()` does it."""

    def __init__(
        self, plan: Plan, where: Path, kafka: Kafka, far: Mosquitto, books: Books, say: Callable[[str], None]
    ) -> None:
        self.plan = plan
        self.chance = random.Random(plan.seed)
        self.books = books
        self.incidents = Incidents()
        self.kafka = kafka
        self.far = far
        self.topic = f"chaos-{time.time_ns()}"
        self.unfinished: list[str] = []
        self._say = say
        self._reserved = reserve_port()
        port = self._reserved.getsockname()[1]
        broker = Broker(where)
        broker.write(
            "00-chaos.toml",
            CONFIGURATION.format(port=port, bootstrap=kafka.bootstrap, topic=self.topic, remote=far.url),
        )
        self.victim = Victim(broker, books.note)
        self.near_url = f"mqtt://127.0.0.1:{port}"
        for path, copies in _PATHS.items():
            books.path(path, copies)
        self.publishers = self._publishers()
        self.far_publisher = self._far_publisher()
        self.subscribers = self._subscribers()

    async def report(self) -> Report:
        """Do it and say what was found."""
        await self.kafka.create_topic(self.topic, outlets.PARTITIONS, outlets.LOG_APPEND_TIME)
        clients = [*self.subscribers, *self.publishers, self.far_publisher]
        tasks: list[asyncio.Task[None]] = []
        load: list[asyncio.Task[None]] = []
        began = time.monotonic()
        try:
            await self.victim.start()
            tasks += [asyncio.create_task(client.live()) for client in clients]
            for client in clients:
                client.online()
            async with asyncio.timeout(_FIRST_WITHIN):
                for subscriber in self.subscribers:
                    await subscriber.subscribed.wait()
            await self._attached()
            away = [s for s in self.subscribers if s.path.startswith("roaming") or s.path == "bridge in"]
            load += [asyncio.create_task(roam(s, random.Random(self.chance.random()))) for s in away]
            load.append(asyncio.create_task(self._drive(self.publishers, self.plan.rate)))
            load.append(asyncio.create_task(self._drive([self.far_publisher], self.plan.far_rate, self._far_has_room)))
            load.append(asyncio.create_task(self._hinder(random.Random(self.chance.random()))))
            load.append(asyncio.create_task(self._cut(random.Random(self.chance.random()))))
            began = time.monotonic()
            await self._rounds(load)
            seconds = time.monotonic() - began
            await _end(load)
            for subscriber in away:
                subscriber.online()
            for room, name in _INSTANCES:
                await self.victim.ask(f"{room}.resume", name=name)
            await self._come_to_rest()
            await Reader.read(self.books, "retained", self.near_url, "chaos/retained/#", _QUIET / 5, 6 * _QUIET)
        finally:
            await _end(load)
            await _end(tasks)
            await self.victim.close()
            self._reserved.close()
        return Report(
            seed=self.plan.seed,
            rounds=self.plan.rounds,
            kafka=await self._read_outlets(),
            acknowledged=dict(self.books.acknowledged),
            elsewhere=_FAR,
            kills=dict(self.victim.kills),
            paths=self.books.compare(),
            refused=self.incidents.refused,
            sessions_lost=dict(self.incidents.sessions_lost),
            left_behind=self.victim.left_behind,
            unfinished=self.unfinished,
            defects=self.victim.defects(),
            errors=self.incidents.errors,
            seconds=seconds,
            slowest_ready=self.victim.slowest_ready,
        )

    # who takes part

    def _publishers(self) -> list[Publisher]:
        found = []
        for qos, count in zip((1, 2), self.plan.publishers, strict=True):
            for number in range(count):
                name = f"q{qos}-{number}"
                streams = [
                    (
                        f"chaos/{route.name}/{name}",
                        self.books.stream(f"{name}/{route.name}", qos, route.paths, f"devices at QoS {qos}"),
                    )
                    for route in _ROUTES
                ]
                weights = [route.weight for route in _ROUTES]
                chance = random.Random(self.chance.random())
                version = 5 if number % 2 else 4
                retain = frozenset(stream for _, stream in streams if stream.paths == ("retained",))
                found.append(
                    Publisher(
                        name, self.near_url, version, self.books, self.incidents, chance, streams, weights,
                        retain=retain,
                    )
                )  # fmt: skip
        self.chance.shuffle(found)
        return found

    def _far_publisher(self) -> Publisher:
        stream = self.books.stream("far", 2, ("bridge in",), _FAR)
        chance = random.Random(self.chance.random())
        return Publisher(
            "far", self.far.url, 5, self.books, self.incidents, chance, [("chaos/down/far", stream)], [1], 500
        )

    def _subscribers(self) -> list[Subscriber]:
        def subscriber(path: str, url: str, version: int, filter: str, qos: int) -> Subscriber:
            name = "sub-" + path.replace(" ", "-")
            chance = random.Random(self.chance.random())
            return Subscriber(name, url, version, self.books, self.incidents, chance, filter, qos, path)

        found = [
            subscriber("bridge out", self.far.url, 5, "chaos/up/#", 2),
            subscriber("bridge in", self.near_url, 5, "chaos/down/#", 2),
        ]
        for route in _ROUTES:
            for path in route.paths:
                kind, _, rest = path.partition(" ")
                if kind in ("online", "roaming"):
                    version = _VERSIONS[rest.split()[0]]
                    found.append(subscriber(path, self.near_url, version, f"chaos/{route.name}/#", int(path[-1])))
        return found

    # load and kills

    def _far_has_room(self) -> bool:
        return self.books.behind("bridge in", "far") < _FAR_BEHIND

    async def _drive(self, publishers: Sequence[Publisher], rate: int, may: Callable[[], bool] = lambda: True) -> None:
        """Let them publish in bursts, in turn, up to the rate; whoever has no connection or no window is passed by."""
        turn = itertools.cycle(publishers)
        due = 0.0
        then = time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            due = min(due + (now - then) * rate, rate * 0.05)
            then = now
            if not may():
                continue
            for publisher in itertools.islice(turn, len(publishers)):
                if due < 1:
                    break
                due -= publisher.burst(min(_BURST, int(due)))

    async def _hinder(self, chance: random.Random) -> None:
        """Pause a sink or the bridge for a while, again and again; a broker that is gone meanwhile is no trouble."""
        while True:
            await asyncio.sleep(chance.uniform(0.1, 1.0))
            room, name = chance.choice(_INSTANCES)
            for verb in ("pause", "resume"):
                with contextlib.suppress(NoAnswer):
                    await self.victim.ask(f"{room}.{verb}", name=name)
                await asyncio.sleep(chance.uniform(0.3, 2.0))

    async def _cut(self, chance: random.Random) -> None:
        """Cut a publisher's connection shortly after it has sent something, again and again."""
        while True:
            await asyncio.sleep(chance.uniform(0.05, 0.4))
            publisher = chance.choice(self.publishers)
            publisher.burst(_BURST)
            await asyncio.sleep(chance.uniform(0.0, 0.004))
            publisher.cut()

    async def _rounds(self, load: Sequence[asyncio.Task[None]]) -> None:
        for number in range(1, self.plan.rounds + 1):
            self.books.round = number
            before = sum(self.books.acknowledged.values())
            await self._first_acknowledgement(before)
            await asyncio.sleep(self.chance.uniform(self.plan.shortest, self.plan.longest))
            for task in load:
                if task.done():
                    task.result()
            try:
                killed = await self._kill(number)
            except (RuntimeError, TimeoutError) as error:
                raise RuntimeError(f"round {number}, after the kills {dict(self.victim.kills)}: {error}") from error
            self.victim.look_for_orphans()
            counted = sum(self.books.acknowledged.values())
            if number % 10 == 0 or number == self.plan.rounds or self.plan.rounds <= 10:
                self._say(f"round {number}: {killed}; {counted - before:,} acknowledged, {counted:,} in all")

    async def _first_acknowledgement(self, before: int) -> None:
        deadline = time.monotonic() + _FIRST_WITHIN
        while sum(self.books.acknowledged.values()) == before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing was acknowledged for {_FIRST_WITHIN:.0f} s")
            await asyncio.sleep(0.005)

    async def _kill(self, number: int) -> str:
        """In this round; the first two of "both" are one of each, so that no run is without."""
        chosen = number == 2 if number <= 2 else self.chance.random() < _WORKERS_SHARE
        if self.plan.only == "worker" or (self.plan.only == "both" and chosen):
            if not await self.victim.kill_worker():
                self.unfinished.append("no worker came back")
            return "worker"
        await self.victim.kill_broker()
        killed = "broker"
        while self.chance.random() < _STARTING_SHARE:
            await self.victim.start_and_kill(self.chance)
            killed = "broker, again while it started"
        await self.victim.start()
        return killed

    # rest

    async def _attached(self) -> None:
        """Until every sink and the bridge run."""
        deadline = time.monotonic() + _FIRST_WITHIN
        while True:
            instances = _instances(await self.victim.ask("status"))
            if all(i["state"] == "running" and i["attached"] for i in instances.values()):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"not running: {instances}")
            await asyncio.sleep(0.05)

    async def _come_to_rest(self) -> None:
        """Until every handshake has ended and everything is where it should be, or nothing changes any more."""
        publishers = [*self.publishers, self.far_publisher]
        deadline = time.monotonic() + _HANDSHAKES_WITHIN
        while any(p.in_flight for p in publishers) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        self.unfinished += [f"{p.name}: {p.in_flight} handshakes" for p in publishers if p.in_flight]
        before: object = None
        since = time.monotonic()
        while True:
            queued = await self._queued()
            missing = self.books.missing(_LIVE)
            if queued == {} and not missing:
                return
            now = (queued, missing, self.books.received)
            if now != before:
                before, since = now, time.monotonic()
            if time.monotonic() - since > (_STUCK if queued else _QUIET):
                if queued:
                    self.unfinished.append(f"queued: {queued}")
                return
            await asyncio.sleep(0.25)

    async def _queued(self) -> dict[str, str]:
        """What each sink or bridge still has to do, none of those that are done."""
        try:
            instances = _instances(await self.victim.ask("status"))
        except NoAnswer as error:
            return {"status": str(error)}
        return {
            name: f"{i['queued']} queued, {'' if i['attached'] else 'not '}attached"
            for name, i in instances.items()
            if i["queued"] or not i["attached"]
        }

    async def _read_outlets(self) -> KafkaReport:
        for payload in outlets.rows(self.victim.broker.where / "telemetry.db"):
            self.books.arrived("SQLite", payload)
        stored: list[Stored] = []
        async for value, record in outlets.records(self.kafka.bootstrap, self.topic):
            self.books.arrived("Kafka", value)
            stored.append(record)
            self.books.note(f"kafka\t{record.partition}\t{record.appended}\t{record.msgid}")
        return compare_kafka(stored, self.victim.kill_times, self.books, _ON_ITS_WAY)


async def run(
    plan: Plan,
    where: Path,
    kafka: Kafka,
    far: Mosquitto,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Everything in the folder `where`: the broker's, and `ledger`, a line for each acknowledgement and receipt."""
    with (where / "ledger").open("wb", buffering=1 << 20) as lines:
        return await Run(plan, where, kafka, far, Books(lines), say).report()


def _instances(status: dict[str, Any]) -> dict[str, Any]:
    return {**status["sinks"], **status["bridges"]}


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()
