"""A right or a user is taken away in a database: how soon a connected client feels it.

With an event (NOTIFY, publish) at once; without one within `refresh`. Measured from before the change is written, with
a stream of messages towards the client and a publish of its own every few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection
from broker.client.session import NotTaken, Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests import nosql_servers, sql_servers
from tests.broker import broker
from tests.servers import PATIENCE
from tests.system.resilience import OPEN, eventually, url

pytestmark = pytest.mark.timeout(120)

AGE = 3.0
"""Seconds of `refresh` where there is no event."""
SOON = 3.0
"""Seconds within which an event must have had its effect; without it that would take the 300 s of `refresh`."""
SLACK = 2.0
"""Seconds that the database and the way to it may add to an age."""
HASH = hashlib.sha256(b"dev-pw").hexdigest()


@dataclass
class Place:
    """A database in which `dev` may publish and subscribe to ``a/#`` and `source` may do everything."""

    table: str
    revoke: Callable[[], Awaitable[object]]
    """Takes the right away."""
    restore: Callable[[], Awaitable[object]]
    remove: Callable[[], Awaitable[object]]
    """Takes the user away."""
    within: float


SQL = (
    "create table mqtt_user (id integer primary key, username varchar(100), password varchar(100), salt varchar(40), "
    "is_superuser integer)",
    "create table mqtt_acl (id integer primary key, allow integer, ipaddr varchar(60), username varchar(100), "
    "clientid varchar(100), access integer, topic varchar(100))",
    f"insert into mqtt_user values (1, 'dev', '{HASH}', null, 0), (2, 'source', '{HASH}', null, 1)",
    "insert into mqtt_acl values (1, 1, null, 'dev', null, 3, 'a/#')",
)
NOTIFY = (
    "create function told() returns trigger language plpgsql as $$ begin "
    "perform pg_notify('mqtt_changes', coalesce(new.username, old.username)); return null; end $$",
    "create trigger told after insert or update or delete on mqtt_acl for each row execute function told()",
    "create trigger told after insert or update or delete on mqtt_user for each row execute function told()",
)


@contextlib.contextmanager
def sql(name: str, kind: str, *, event: bool) -> Iterator[Place]:
    start = sql_servers.postgresql if kind == "postgresql" else sql_servers.mariadb
    with sql_servers.or_skip(name, start) as server:
        database = asyncio.run(server.create(*SQL, *(NOTIFY if event else ())))

        def run(text: str) -> Callable[[], Awaitable[object]]:
            return lambda: server.execute(text, database=database)

        more = 'changes = "mqtt_changes"\nrefresh = 300' if event else f"refresh = {AGE}"
        yield Place(
            f'[auth.people]\nkind = "{kind}"\ndsn = "{server.dsn(database)}"\npassword = "{server.password}"\n'
            f'password_hash = "sha256"\n{more}\n',
            run("delete from mqtt_acl"), run(SQL[-1]), run("delete from mqtt_user where username = 'dev'"),
            SOON if event else AGE + SLACK,
        )  # fmt: skip


@contextlib.contextmanager
def redis(*, event: bool) -> Iterator[Place]:
    with nosql_servers.or_skip("redis", nosql_servers.redis) as server:
        store = server.connect()
        store.hset("mqtt_user:dev", mapping={"password": HASH})
        store.hset("mqtt_user:source", mapping={"password": HASH, "is_superuser": "1"})
        store.hset("mqtt_acl:dev", "a/#", "3")

        def run(change: Callable[[], object]) -> Callable[[], Awaitable[object]]:
            async def both() -> None:
                change()
                if event:
                    store.publish("mqtt_changes", "dev")

            return both

        more = 'changes = "mqtt_changes"\nrefresh = 300' if event else f"refresh = {AGE}"
        yield Place(
            f'[auth.people]\nkind = "redis"\nservers = ["{server.address}"]\npassword_hash = "sha256"\n{more}\n',
            run(lambda: store.hdel("mqtt_acl:dev", "a/#")), run(lambda: store.hset("mqtt_acl:dev", "a/#", "3")),
            run(lambda: store.delete("mqtt_user:dev")), SOON if event else AGE + SLACK,
        )  # fmt: skip


@contextlib.contextmanager
def mongodb() -> Iterator[Place]:
    with nosql_servers.or_skip("mongodb", nosql_servers.mongodb) as server:
        store = server.connect()["mqtt"]
        store["mqtt_user"].insert_many(
            [{"username": "dev", "password": HASH}, {"username": "source", "password": HASH, "is_superuser": True}]
        )
        right = {"username": "dev", "pubsub": ["a/#"]}
        store["mqtt_acl"].insert_one(dict(right))

        def run(change: Callable[[], object]) -> Callable[[], Awaitable[object]]:
            async def changed() -> None:
                change()

            return changed

        yield Place(
            f'[auth.people]\nkind = "mongodb"\nservers = ["{server.address}"]\ndatabase = "mqtt"\n'
            f'password_hash = "sha256"\nrefresh = {AGE}\n',
            run(lambda: store["mqtt_acl"].delete_many({})), run(lambda: store["mqtt_acl"].insert_one(dict(right))),
            run(lambda: store["mqtt_user"].delete_one({"username": "dev"})), AGE + SLACK,
        )  # fmt: skip


PLACES: dict[str, Callable[[], contextlib.AbstractContextManager[Place]]] = {
    "postgresql-notify": lambda: sql("postgresql", "postgresql", event=True),
    "redis-publish": lambda: redis(event=True),
    "postgresql-age": lambda: sql("postgresql", "postgresql", event=False),
    "mariadb-age": lambda: sql("mariadb", "mysql", event=False),
    "redis-age": lambda: redis(event=False),
    "mongodb-age": mongodb,
}


class Dev(Publisher):
    """Notes when each message came and when the connection ended."""

    def __init__(self) -> None:
        super().__init__()
        self.last = 0.0
        self.ended = 0.0

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.last = asyncio.get_running_loop().time()
        if publish.qos:
            conn.ack(PacketType.PUBACK, publish.packet_id)

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended = asyncio.get_running_loop().time()
        super().on_lost(conn, exc)

    async def may(self, topic: str) -> bool:
        try:
            await self.publish(topic, b"mine")
        except NotTaken as refused:
            if refused.code != 0x87:
                raise
            return False
        return True


@pytest.mark.parametrize("name", PLACES)
def test_z23_a_change_in_the_database_reaches_who_is_connected(tmp_path: Path, name: str) -> None:
    """Z-23: as soon as the event, or the age, says."""
    with PLACES[name]() as place:
        base = OPEN.replace("allow_anonymous = true", "").replace('no_match = "allow"', "")
        with broker(tmp_path, {"00.toml": base, "10.toml": place.table}) as running:
            figures = asyncio.run(_measure(url(running), place))
    print(f"\n{name}: " + ", ".join(f"{what} {seconds * 1000:.0f} ms" for what, seconds in figures.items()))
    for what, seconds in figures.items():
        assert 0 <= seconds <= place.within * PATIENCE, f"{what} took {seconds:.2f} s"


async def _measure(to: str, place: Place) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    dev, source = Dev(), Dev()
    for client, user in ((dev, "dev"), (source, "source")):
        client.attach(await Connection.connect(to, client_id=user, handler=client, username=user, password=b"dev-pw"))
    assert await dev.conn.subscribe([("a/#", 1)]) == [1]
    assert await dev.may("a/mine")

    async def stream() -> None:
        while True:
            await source.publish("a/theirs", b"x")
            await asyncio.sleep(0.005)

    async def until(can: bool) -> float:
        async with asyncio.timeout(20):
            while await dev.may("a/mine") is not can:  # noqa: ASYNC110 (nothing tells a client of its rights)
                await asyncio.sleep(0.005)
        return loop.time()

    streaming = asyncio.create_task(stream())
    try:
        await eventually(lambda: dev.last, "the stream")
        figures: dict[str, Any] = {}
        began = loop.time()
        await place.revoke()
        figures["publish refused after"] = await until(False) - began
        await asyncio.sleep(0.5)
        await eventually(lambda: loop.time() - dev.last > 0.3, "the end of what it receives")
        figures["last message after"] = max(0.0, dev.last - began)
        began = loop.time()
        await place.restore()
        figures["publish allowed again after"] = await until(True) - began
        assert await dev.conn.subscribe([("a/#", 1)]) == [1]
        began = loop.time()
        await place.remove()
        await eventually(lambda: dev.ended, "the end of the connection", 20, 0.005)
        figures["disconnected after"] = dev.ended - began
        assert not streaming.done()
        return figures
    finally:
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        await dev.disconnect()
        await source.disconnect()
