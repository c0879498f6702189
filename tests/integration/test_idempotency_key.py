"""An event that a device publishes again as a new message is stored once: `idempotency_key` on real targets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sqlite3
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from broker.client.session import Publisher
from broker.extend import registry
from broker.extend.idempotency import compile_key
from broker.extend.sink import BatchFailed, Fatal, Record
from broker.runtime.selection import Keyed
from tests import nosql_servers, servers, sql_servers
from tests.integration.http_service import service
from tests.integration.sink_suite import CONF, fragment
from tests.integration.test_worker import isthmus
from tests.integration.test_worker_foreign import rows, settings, until, working
from tests.servers import PATIENCE, Mosquitto

KEY = "${user_property.source}:${payload.id}"
COLUMNS = {"msgid": "${msgid}", "value": "${payload.value}", "payload": "${payload}"}
_numbers = itertools.count(1)


class Place:
    """Where one kind of sink stores: `raw` is its table, `payloads` what is there."""

    kind: str
    raw: dict[str, Any]
    remembers = True
    """Whether repetitions are told however late they come."""

    async def payloads(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in await self._texts()]

    @abstractmethod
    async def _texts(self) -> list[Any]: ...


class Sql(Place):
    table = (
        "create table readings (n {number}, msgid {msgid} unique, value float not null check (value < 1000), "
        "payload {text})"
    )

    def __init__(self, kind: str, server: sql_servers.SqlServer) -> None:
        self.kind = kind
        self._server = server

    async def prepare(self, **words: str) -> Sql:
        self._database = await self._server.create(self.table.format(**words))
        self.raw = {"dsn": self._server.dsn(self._database), "password": self._server.password, "table": "readings",
                    "columns": COLUMNS}  # fmt: skip
        return self

    async def _texts(self) -> list[Any]:
        found = await self._server.execute("select payload from readings order by n", database=self._database)
        return [row[0] for row in found]

    async def index(self, *statements: str) -> None:
        await self._server.execute(*statements, database=self._database)


class Sqlite(Place):
    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.db"
        with contextlib.closing(sqlite3.connect(self._path)) as db:
            db.execute("create table messages (msgid text primary key, value real check (value < 1000), payload)")
        self.raw = {"path": str(self._path), "columns": COLUMNS}

    async def _texts(self) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self._path)) as db:
            return [row[0] for row in db.execute("select payload from messages order by rowid")]


class Mongodb(Place):
    kind = "mongodb"

    def __init__(self, server: nosql_servers.MongoServer) -> None:
        self._collection = server.connect()["mqtt"]["messages"]
        self._collection.drop()
        fields = {"_id": "${msgid}", "value": "${payload.value}", "payload": "${payload}"}
        self.raw = {"servers": [f"127.0.0.1:{server.port}"], "fields": fields, "dates": []}

    async def _texts(self) -> list[Any]:
        return await asyncio.to_thread(lambda: [found["payload"] for found in self._collection.find()])


class Redis(Place):
    kind = "redis"

    def __init__(self, server: nosql_servers.RedisServer) -> None:
        self._client = server.connect()
        self.raw = {"servers": [f"127.0.0.1:{server.port}"], "command": "HSET", "redis_key": "event:${msgid}",
                    "fields": {"payload": "${payload}"}}  # fmt: skip

    async def _texts(self) -> list[Any]:
        return await asyncio.to_thread(lambda: [self._client.hget(k, "payload") for k in self._client.keys("event:*")])


class Http(Place):
    """A service that honours `Idempotency-Key`."""

    kind = "http"

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.raw = {}

    def answer(self, request: web.Request, body: bytes) -> web.Response:
        if json.loads(body).get("value", 0) >= 1000:
            return web.Response(status=422)
        self.stored.setdefault(request.headers["Idempotency-Key"], body)
        return web.Response(status=204)

    async def _texts(self) -> list[Any]:
        return list(self.stored.values())


class Kafka(Place):
    """In one transaction and the next; a compacted topic, which refuses a record without key and its whole batch."""

    kind = "kafka"
    remembers = False

    def __init__(self, server: servers.Kafka) -> None:
        self._server = server
        self._topic = f"keyed-{os.getpid()}-{next(_numbers)}"

    async def prepare(self) -> Kafka:
        topic = self._topic
        await self._server.create_topic(topic, 1, {"cleanup.policy": "compact"})
        await self._server.create_topic(f"{topic}-progress", 1, {"cleanup.policy": "compact"})
        self.raw = {"servers": [self._server.bootstrap], "topic": topic, "transactional_id": f"id-{topic}",
                    "progress_topic": f"{topic}-progress", "key": "${payload.k}"}  # fmt: skip
        return self

    async def _texts(self) -> list[Any]:
        return [record.value for record in await self._server.everything(self._topic, committed=True)]


NUMBER = {"postgresql": "serial", "mysql": "int auto_increment primary key"}
ID = {"postgresql": "bytea", "mysql": "binary(16)"}


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Any]:
    with sql_servers.or_skip("postgresql", sql_servers.postgresql) as server:
        yield server


@pytest.fixture(scope="module")
def mysql() -> Iterator[Any]:
    with sql_servers.or_skip("mariadb", sql_servers.mariadb) as server:
        yield server


@pytest.fixture(scope="module")
def mongodb() -> Iterator[Any]:
    with nosql_servers.or_skip("mongodb", nosql_servers.mongodb) as server:
        yield server


@pytest.fixture
def redis() -> Iterator[Any]:
    with nosql_servers.or_skip("redis", nosql_servers.redis) as server:
        yield server


@pytest.fixture
def server(request: pytest.FixtureRequest, kind: str) -> Any:
    """The one of a kind, started while no loop runs."""
    return None if kind in ("sqlite", "http") else request.getfixturevalue(kind)


@pytest.fixture(params=["postgresql", "mysql", "sqlite", "mongodb", "redis", "http", "kafka"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def place(kind: str, server: Any, tmp_path: Path) -> AsyncIterator[Place]:
    if kind in NUMBER:
        yield await Sql(kind, server).prepare(number=NUMBER[kind], msgid=ID[kind], text="text")
    elif kind == "http":
        http = Http()
        async with service(http.answer) as running:
            http.raw = {"url": f"{running.url}/hook", "body": "${payload}"}
            yield http
    elif kind == "kafka":
        yield await Kafka(server).prepare()
    else:
        yield Sqlite(tmp_path) if kind == "sqlite" else Mongodb(server) if kind == "mongodb" else Redis(server)


async def publish(publisher: Publisher, *events: dict[str, Any]) -> None:
    """Each as a message of its own; returns when all are acknowledged."""
    await asyncio.gather(*(publisher.publish("telemetry/a", json.dumps(event).encode(), 1) for event in events))


async def test_s27_an_event_that_is_published_again_is_stored_once_and_all_are_acknowledged(
    place: Place, tmp_path: Path, root: Path
) -> None:
    """S-27: a new message, with a new message id, in the same batch or long after; one without a key is not lost."""
    raw = {"kind": place.kind, **place.raw, "idempotency_key": "${clientid}:${payload.id}"}
    events = [{"id": n, "k": f"k{n}", "value": n, "try": 1} for n in range(1, 31)]
    async with isthmus(tmp_path, root, CONF + fragment(raw)) as broker:
        await broker.until_sink(lambda sink: sink["state"] == "running")
        one = await Publisher.connect(broker.url, client_id="dev-1")
        await publish(one, *(again for event in events for again in (event, {**event, "try": 2})))
        count = 60
        if place.remembers:
            await broker.until_sink(lambda sink: sink["acked"] == 60 and sink["queued"] == 0)
            await publish(one, *({**event, "try": 3} for event in events))
            count += 30
        other = await Publisher.connect(broker.url, client_id="dev-2")
        await publish(other, *({**event, "k": f"o{event['id']}", "other": True} for event in events))
        await publish(one, {"k": "none", "value": 1})
        await broker.until_sink(lambda sink: sink["queued"] == 0 and sink.get("dead") == 1, 30 * PATIENCE)
        assert (await broker.sink())["acked"] == count + 31, "stored, known to be or a dead letter, each of them"
        letters = {queue["name"]: queue["queued"] for queue in await broker.command("queues.list")}
        assert letters["store/dlq"] == 1
        await one.disconnect()
        await other.disconnect()
    found = await place.payloads()
    for theirs in (False, True):
        assert sorted(event["id"] for event in found if event.get("other", False) is theirs) == list(range(1, 31))
    if place.kind != "redis":  # a hash holds the latest
        assert {event["try"] for event in found} == {1}


def record(number: int, **event: Any) -> Record:
    return Record("t", json.dumps(event).encode(), 1, clientid="dev", msgid=f"{number:032x}", ts=1_700_000_000_000,
                  user_properties=[("source", "a")])  # fmt: skip


@contextlib.asynccontextmanager
async def opened(place: Place, **more: Any) -> AsyncIterator[Any]:
    backend = registry.load("sinks", place.kind)
    config: Any = backend.config.model_validate({"filters": ["#"], "idempotency_key": KEY, **place.raw, **more})
    sink = await backend.open(config.named("store"))
    try:
        yield Keyed(sink, compile_key(config.idempotency_key))
    finally:
        await sink.close()


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "sqlite", "mongodb", "http", "kafka"])  # Redis takes any value
async def test_s07_of_two_of_one_key_in_a_batch_the_second_is_stored_where_the_first_never_can_be(
    place: Place,
) -> None:
    """S-07: neither is lost with the other, none is refused for the other, and the rest keeps its order."""
    bad = {"value": 1 << 63 if place.kind == "mongodb" else 5000}
    batch = [record(n, id=n, k=f"k{n}", value=n) for n in range(20)]
    batch[5] = record(5, id=100, **bad)
    batch[9] = record(9, id=100, k="k9", value=9)
    batch[12] = record(12, id=100, k="k12", value=12)
    batch[15] = record(15, id=7, **bad)
    async with opened(place) as sink:
        with pytest.raises(BatchFailed) as failed:
            await sink.write(batch)
        refused = sorted(failed.value.failed)
        assert refused in ([5, 15], [5]), "15 repeats 7, which some targets know before they look at its value"
        assert refused == [5] or place.kind != "kafka"
        await sink.write([record(20, id=100, k="k20", value=20), record(21, id=21, k="k21", value=21)])
    values = [event["value"] for event in await place.payloads()]
    assert sorted(values) == [n for n in range(22) if n not in (5, 12, 15, 20)]
    if place.kind != "mongodb":
        assert values == sorted(values)


@pytest.mark.parametrize("mode", ["copy-first", "staging", "unnest"])
async def test_batches_in_which_every_key_is_there_twice(postgresql: Any, mode: str) -> None:
    """Every way into a PostgreSQL table; COPY, which the first batch tries, stores nothing then."""
    words = {"number": "serial", "msgid": "uuid", "text": "text"}
    place = await Sql("postgresql", postgresql).prepare(**words)
    async with opened(place, mode="auto" if mode == "copy-first" else mode) as sink:
        for start in (0, 600):
            batch = [record(2 * n + t, id=n, value=1, attempt=t) for n in range(start, start + 700) for t in (0, 1)]
            await sink.write(batch)
    found = await place.payloads()
    assert [(event["id"], event["attempt"]) for event in found] == [(n, 0) for n in range(1300)]


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
async def test_a_unique_index_that_holds_the_time_of_arrival_is_told_with_the_check(kind: str, server: Any) -> None:
    """As a hypertable's does: under it an event published again would be another row."""
    place = Sql(kind, server)
    place.table = Sql.table.replace(" unique", "")
    await place.prepare(number=NUMBER[kind], msgid="char(32)", text="text, at timestamp null")
    await place.index("create unique index by_both on readings (at, msgid)")
    async with opened(place, columns={**COLUMNS, "at": "${ts}"}) as sink:
        for verb in (sink.check, lambda: sink.write([record(1, id=1, value=1)])):
            with pytest.raises(Fatal, match="holds at, the time of arrival"):
                await verb()
        await place.index("create unique index by_one on readings (msgid)")
        await sink.check()
    async with opened(place, columns={**COLUMNS, "at": "${payload.at}"}) as sink:
        await sink.write([record(n, id=1, value=1, at=1_700_000_000_000) for n in range(3)])
    assert len(await place.payloads()) == 1


async def test_s02_what_a_crash_made_come_again_is_known_by_its_keys(kafka: servers.Kafka) -> None:
    """S-02: the note of a transaction holds keys; the next worker gets the batch anew, with more behind it."""
    place = await Kafka(kafka).prepare()
    batch = [record(2 * n + t, id=n, k=f"k{n}-{t}", attempt=t) for n in range(50) for t in (0, 1)]
    async with opened(place) as sink:
        await sink.write(batch[:80])
    async with opened(place) as sink:
        await sink.write(batch[:30])
        await sink.write(batch[30:])
    found = await place.payloads()
    assert [(event["id"], event["attempt"]) for event in found] == [(n, 0) for n in range(50)]


async def test_beside_a_foreign_broker_events_are_told_though_it_gives_no_message_ids(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    text = '[sinks.store]\nkind = "sqlite"\npath = "telemetry.db"\nfilters = ["telemetry/#"]\n'
    config = settings(tmp_path, text + 'idempotency_key = "${payload.id}"\n')
    async with working(config, f"mqtt://127.0.0.1:{mosquitto.port}"):
        publisher = await Publisher.connect(f"mqtt://127.0.0.1:{mosquitto.port}", client_id="dev")
        for attempt in (1, 2):
            await publish(publisher, *({"id": n, "try": attempt} for n in range(10)))
        await publish(publisher, {"id": "last"})
        await until(lambda: any("last" in payload for payload in rows(tmp_path)))
        await publisher.disconnect()
    found = [json.loads(payload) for payload in rows(tmp_path)]
    assert found == [*({"id": n, "try": 1} for n in range(10)), {"id": "last"}]
    assert {len(ident) for ident in rows(tmp_path, "msgid")} == {32}
