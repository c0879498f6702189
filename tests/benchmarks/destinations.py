"""Destinations of `drain`: each a server with an empty table, the fragment of a sink into it, and a plain loop on its
driver that stores the same rows, batch by batch, beside the sink's.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from broker.extend.sink import Batch
from tests import nosql_servers, servers, sql_servers

BATCH = Batch()
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIELDS = {
    "msgid": "${msgid}", "time": "${ts}", "device": "${clientid}", "value": "${payload.value}",
    "unit": "${payload.unit}",
}  # fmt: skip
Row = tuple[str, int, str, float, str]
"""What the loop stores: message id, milliseconds, device, value, unit."""
COUNT = "select count(*), count(distinct msgid) from readings"


@dataclass
class Took:
    """What the loop needed: seconds, and seconds of processor time of its own process."""

    seconds: float
    cpu: float


@dataclass
class Target:
    """One destination: its fragment, its plain loop, how many rows and different message ids it holds."""

    fragment: str
    plain: Callable[[Sequence[Row]], Coroutine[Any, Any, Took]]
    count: Callable[[], Coroutine[Any, Any, tuple[int, int]]]


@contextlib.contextmanager
def postgresql(where: Path, more: str) -> Iterator[Target]:
    table = "create table {} (msgid char(32) unique, time timestamptz, device text, value double precision, unit text)"
    with sql_servers.postgresql() as server:
        database = asyncio.run(server.create(table.format("readings"), table.format("plain")))

        async def plain(rows: Sequence[Row]) -> Took:
            import asyncpg

            connection = await asyncpg.connect(
                host=server.host, port=server.port, user=server.user, password=server.password, database=database
            )
            ready = [(i, EPOCH + timedelta(milliseconds=t), d, v, u) for i, t, d, v, u in rows]

            async def store(part: Sequence[Any]) -> None:
                await connection.copy_records_to_table("plain", records=part, columns=list(FIELDS))

            took = await _timed(ready, store)
            await connection.close()
            return took

        async def count() -> tuple[int, int]:
            return tuple((await server.execute(COUNT, database=database))[0])

        yield Target(_of_server(server, database, more), plain, count)


@contextlib.contextmanager
def mysql(where: Path, more: str) -> Iterator[Target]:
    table = (
        "create table {} (msgid char(32) unique, time datetime(3), device varchar(200), value double, unit varchar(20))"
    )
    with sql_servers.mariadb() as server:
        database = asyncio.run(server.create(table.format("readings"), table.format("plain")))

        async def plain(rows: Sequence[Row]) -> Took:
            import asyncmy

            connection = await asyncmy.connect(
                host=server.host, port=server.port, user=server.user, password=server.password, database=database
            )
            ready = [(i, (EPOCH + timedelta(milliseconds=t)).replace(tzinfo=None), d, v, u) for i, t, d, v, u in rows]
            insert = "insert into plain (msgid, time, device, value, unit) values (%s, %s, %s, %s, %s)"

            async def store(part: Sequence[Any]) -> None:
                await cursor.executemany(insert, part)
                await connection.commit()

            async with connection.cursor() as cursor:
                took = await _timed(ready, store)
            await connection.ensure_closed()
            return took

        async def count() -> tuple[int, int]:
            return tuple((await server.execute(COUNT, database=database))[0])

        yield Target(_of_server(server, database, more), plain, count)


@contextlib.contextmanager
def sqlite(where: Path, more: str) -> Iterator[Target]:
    async def plain(rows: Sequence[Row]) -> Took:
        with contextlib.closing(sqlite3.connect(where / "plain.db", isolation_level=None)) as db:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=full")
            db.execute("create table plain (msgid text primary key, time integer, device text, value, unit text)")

            async def store(part: Sequence[Row]) -> None:
                db.execute("begin")
                db.executemany("insert into plain values (?, ?, ?, ?, ?)", part)
                db.execute("commit")

            return await _timed(rows, store)

    async def count() -> tuple[int, int]:
        with contextlib.closing(sqlite3.connect(where / "readings.db")) as db:
            return tuple(db.execute(COUNT).fetchone())

    keys = {"kind": "sqlite", "path": where / "readings.db", "table": "readings"}
    yield Target(_fragment(keys, f"columns = {_table()}", more), plain, count)


@contextlib.contextmanager
def mongodb(where: Path, more: str) -> Iterator[Target]:
    with nosql_servers.mongodb() as server:
        database = server.connect()["mqtt"]

        async def plain(rows: Sequence[Row]) -> Took:
            from pymongo import AsyncMongoClient

            client: Any = AsyncMongoClient(server.address, directConnection=True)
            ready = [
                {"_id": i, "time": EPOCH + timedelta(milliseconds=t), "device": d, "value": v, "unit": u}
                for i, t, d, v, u in rows
            ]

            async def store(part: Sequence[Any]) -> None:
                await client["mqtt"]["plain"].insert_many(part, ordered=False)

            await client["mqtt"]["readings"].drop()  # the one that lives in memory has no room for both
            took = await _timed(ready, store)
            await client.close()
            return took

        async def count() -> tuple[int, int]:
            found = await asyncio.to_thread(database["readings"].count_documents, {})
            return found, found  # _id is unique

        lines = f'servers = ["{server.address}"]\nfields = {_table(_id="${msgid}", msgid=None)}'
        yield Target(_fragment({"kind": "mongodb", "collection": "readings"}, lines, more), plain, count)
        database.client.drop_database("mqtt")


@contextlib.contextmanager
def redis(where: Path, more: str) -> Iterator[Target]:
    with nosql_servers.redis() as server:

        async def plain(rows: Sequence[Row]) -> Took:
            from redis.asyncio import Redis

            client = Redis(host=server.host, port=server.port)
            ready = [(f"{t}-{n + 1}", i, t, d, v, u) for n, (i, t, d, v, u) in enumerate(rows)]

            async def store(part: Sequence[Any]) -> None:
                pipeline = client.pipeline(transaction=False)
                for place, i, t, d, v, u in part:
                    pipeline.execute_command(
                        "XADD", f"plain:{d}", place, "msgid", i, "time", t, "device", d, "value", v, "unit", u
                    )
                await pipeline.execute()

            await client.ping()
            took = await _timed(ready, store)
            await client.aclose()
            return took

        async def count() -> tuple[int, int]:
            def look() -> tuple[int, int]:
                client = server.connect()
                ids = [
                    fields["msgid"] for key in client.scan_iter("readings:*") for _, fields in client.xrange(key)
                ]  # fmt: skip
                return len(ids), len(set(ids))

            return await asyncio.to_thread(look)

        keys = {"kind": "redis", "redis_key": "readings:${clientid}"}
        lines = f'servers = ["{server.address}"]\nmax_length = 0\nfields = {_table()}'
        yield Target(_fragment(keys, lines, more), plain, count)


@contextlib.contextmanager
def kafka(where: Path, more: str) -> Iterator[Target]:
    with servers.kafka() as server:
        for topic in ("readings", "plain"):
            asyncio.run(server.create_topic(topic, 2))

        async def plain(rows: Sequence[Row]) -> Took:
            from aiokafka import AIOKafkaProducer

            producer = AIOKafkaProducer(
                bootstrap_servers=server.bootstrap, enable_idempotence=True, acks="all", compression_type="zstd",
                max_batch_size=2 << 20,
            )  # fmt: skip
            await producer.start()
            ready = [
                (d.encode(), b'{"value": %f, "unit": "%b"}' % (v, u.encode()), t, [("mqtt-msgid", i.encode())])
                for i, t, d, v, u in rows
            ]

            async def store(part: Sequence[Any]) -> None:
                batches = [producer.create_batch() for _ in range(2)]
                for key, value, moment, headers in part:
                    batch = batches[key[-1] & 1]
                    batch.append(key=key, value=value, timestamp=moment, headers=headers)
                sent = [await producer.send_batch(b, "plain", partition=p) for p, b in enumerate(batches)]
                await asyncio.gather(*sent)

            took = await _timed(ready, store)
            await producer.stop()
            return took

        async def count() -> tuple[int, int]:
            from aiokafka import AIOKafkaConsumer, TopicPartition

            ids: list[bytes] = []
            consumer = AIOKafkaConsumer(bootstrap_servers=server.bootstrap, auto_offset_reset="earliest")
            await consumer.start()
            places = [TopicPartition("readings", number) for number in range(2)]
            consumer.assign(places)
            left = sum((await consumer.end_offsets(places)).values())
            while left:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    left -= len(records)
                    ids += [value for record in records for key, value in record.headers if key == "mqtt-msgid"]
            await consumer.stop()
            return len(ids), len(set(ids))

        lines = f'servers = ["{server.bootstrap}"]'
        yield Target(_fragment({"kind": "kafka", "topic": "readings"}, lines, more), plain, count)


TARGETS = {
    "postgresql": postgresql, "mysql": mysql, "mongodb": mongodb, "redis": redis, "sqlite": sqlite, "kafka": kafka,
}  # fmt: skip


async def _timed(ready: Sequence[Any], store: Callable[[Sequence[Any]], Coroutine[Any, Any, None]]) -> Took:
    began, used = time.perf_counter(), time.process_time()
    for start in range(0, len(ready), BATCH.max_records):
        await store(ready[start : start + BATCH.max_records])
    return Took(time.perf_counter() - began, time.process_time() - used)


def _of_server(server: sql_servers.SqlServer, database: str, more: str) -> str:
    kind = "postgresql" if server.scheme == "postgresql" else "mysql"
    keys = {"kind": kind, "dsn": server.dsn(database), "password": server.password, "table": "readings"}
    return _fragment(keys, f"columns = {_table()}", more)


def _fragment(keys: dict[str, Any], *lines: str) -> str:
    texts = [f'{key} = "{value}"' for key, value in keys.items()]
    return "\n".join(["[sinks.readings]", *texts, 'filters = ["telemetry/#"]', *lines, ""])


def _table(**changes: str | None) -> str:
    fields = {name: text for name, text in (FIELDS | changes).items() if text is not None}
    return "{ " + ", ".join(f'{name} = "{text}"' for name, text in fields.items()) + " }"
