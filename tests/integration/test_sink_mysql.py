"""Rows in a real MariaDB, also through a faulty network."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any, ClassVar

import asyncmy
import pytest

from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks.mysql import BACKEND
from tests.integration.sql_sink_suite import SqlSinkSuite, deliver, record, records
from tests.sql_servers import Mariadb, SqlServer, mariadb, or_skip


@pytest.fixture(scope="module")
def server() -> Iterator[Mariadb]:
    with or_skip("mariadb", mariadb) as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[Mariadb]:
    with or_skip("mariadb", mariadb) as server:
        server.pid  # noqa: B018 (a server given by address cannot be stopped)
        yield server


class TestMysql(SqlSinkSuite):
    backend: ClassVar[Backend] = BACKEND
    readings: ClassVar[str] = (
        "create table readings (n int auto_increment primary key, msgid char(32) unique, time datetime(3), "
        "device varchar(200), value float not null check (value < 1000), unit varchar(8)) default charset=utf8mb4"
    )

    @contextlib.asynccontextmanager
    async def locked(self, server: SqlServer, database: str) -> AsyncIterator[None]:
        connection = await asyncmy.connect(
            host=server.host, port=server.port, user=server.user, password=server.password, database=database
        )
        try:
            async with connection.cursor() as cursor:
                await cursor.execute("lock tables readings write")
                yield
        finally:
            await connection.ensure_closed()

    def reader(self, database: str) -> tuple[str, ...]:
        return (
            "create or replace user reader@'%' identified by 'reader-pw'",
            f"grant select on {database}.readings to reader@'%'",
        )

    async def test_types_of_mysql(self, open: Any, server: Mariadb) -> None:
        database = await server.create(
            "create table t (id binary(16) primary key, small tinyint unsigned, big bigint unsigned, "
            "exact decimal(10, 2), yes boolean, raw blob, whole json, at datetime(6), day date, "
            "feeling enum('good', 'bad'), words text, "
            "name varchar(200)) default charset=utf8mb4"
        )
        columns = {
            "id": "${msgid}", "small": "${qos}", "big": "${payload.big}", "exact": "${payload.exact}",
            "yes": "${retain}", "raw": "${payload}", "whole": "${payload}", "at": "${payload.at}", "day": "${ts}",
            "feeling": "${payload.mood}", "words": "${payload.words}", "name": "${topic[0]}/${clientid}",
        }  # fmt: skip
        sink = await open(database, table=f"{database}.t", columns=columns)
        await sink.check()
        payload = {
            "big": (1 << 64) - 1,
            "exact": 0.25,
            "at": "2026-02-03T04:05:06.5+01:00",
            "mood": "bad",
            "words": [1, "x"],
        }
        await sink.write([record(255, payload), record(256, {}, clientid=None)])
        await sink.write([record(255, payload)])
        [first, second] = [dict(zip(columns, row, strict=True)) for row in await server.execute(
            f"select {', '.join(columns)} from t order by id", database=database)]  # fmt: skip
        assert (first["id"], first["small"], first["big"]) == ((255).to_bytes(16, "big"), 1, (1 << 64) - 1)
        assert (first["exact"], first["yes"], first["raw"][:6]) == (Decimal("0.25"), 0, b'{"big"')
        assert '"exact": 0.25' in first["whole"]
        assert (first["at"], first["day"]) == (datetime(2026, 2, 3, 3, 5, 6, 500_000), date(2023, 11, 14))
        assert (first["feeling"], first["words"], first["name"]) == ("bad", '[1,"x"]', "telemetry/dev-5")
        assert {name for name, value in second.items() if value is None} == {"big", "exact", "at", "feeling", "words"}

    async def test_s07_what_only_the_server_can_refuse(self, open: Any, server: Mariadb, database: str) -> None:
        """S-07: no JSON, no such member of an enumeration, a number out of range, a text its character set lacks. None
        of it is stored as something else with a warning."""
        await server.execute(
            "alter table readings add column body json, add column mood enum('good', 'bad'), "
            "add column narrow decimal(4, 1), add column old varchar(20) character set latin1",
            database=database,
        )
        columns = {"msgid": "${msgid}", "value": "1", "body": "${payload}", "mood": "${user_property.mood}",
                   "narrow": "${user_property.narrow}", "old": "${user_property.old}"}  # fmt: skip
        sink = await open(database, columns=columns)
        for count in (12, 900):
            await server.execute("delete from readings", database=database)
            batch = records(*range(count))
            batch[4] = record(4, b"{no json")
            batch[7].user_properties = [("mood", "indifferent")]
            batch[8].user_properties = [("narrow", "123456")]
            batch[9].user_properties = [("mood", "good"), ("narrow", "12.3"), ("old", "\u00e4")]
            batch[10].user_properties = [("old", "\u4e2d")]
            with pytest.raises(BatchFailed) as failed:
                await sink.write(batch)
            assert list(failed.value.failed) == [4, 7, 8, 10], failed.value.failed
            rows = await server.execute("select mood, narrow, old from readings order by msgid", database=database)
            assert len(rows) == count - 4
            assert rows[6] == ("good", Decimal("12.3"), "\u00e4")

    async def test_a_batch_larger_than_a_packet_is_sent_in_parts(
        self, open: Any, server: Mariadb, database: str
    ) -> None:
        [(before,)] = await server.execute("select @@max_allowed_packet")
        await server.execute("alter table readings add column body mediumtext", database=database)
        await server.execute("set global max_allowed_packet = 1048576")
        try:
            sink = await open(database, columns={"msgid": "${msgid}", "value": "1", "body": "${payload}"})
            await sink.write(records(*range(40), payload=b"x" * 100_000))
            assert len(await self.stored(server, database)) == 40
            batch = records(*range(40, 60), payload=b"y")
            batch[7] = record(47, b"z" * (3 << 20))
            with pytest.raises(BatchFailed) as failed:
                await sink.write(batch)
            assert list(failed.value.failed) == [7]
            assert len(await self.stored(server, database)) == 59
        finally:
            await server.execute(f"set global max_allowed_packet = {before}")

    async def test_what_the_driver_would_send_differently_is_sent_as_it_is(
        self, open: Any, server: Mariadb, database: str
    ) -> None:
        """One column, nulls and values in turn, in statements of several sizes."""
        sink = await open(database, columns={"msgid": "${msgid}", "value": "1", "device": "${payload.a}"})
        values = [None, "x", 5, True, 1.5, None, {"b": None}, "", "0"] * 80
        await sink.write([record(n, {"a": value}) for n, value in enumerate(values)])
        rows = await self.stored(server, database)
        assert [row[0] for row in rows] == [None, "x", "5", "true", "1.5", None, '{"b":null}', "", "0"] * 80

    @pytest.mark.parametrize("order", [("clientid", "serial"), ("serial", "clientid")])
    async def test_s07_an_update_never_overwrites_what_another_unique_index_found(
        self, open: Any, server: Mariadb, order: tuple[str, str]
    ) -> None:
        """S-07: neither the row of another device is changed, nor the refused one taken for stored."""
        unique = ", ".join(f"unique ({name})" for name in order)
        database = await server.create(
            f"create table readings (n int auto_increment primary key, clientid varchar(40) not null, "
            f"serial varchar(40) not null, value int, {unique})"
        )
        columns = {"clientid": "${clientid}", "serial": "${payload.serial}", "value": "${payload.value}"}
        sink = await open(database, columns=columns, key=["clientid"], on_conflict="update")

        def told(number: int, device: str, serial: str) -> Record:
            return record(number, {"serial": serial, "value": number}, clientid=device)

        await sink.check()
        await sink.write([told(1, "a", "s1"), told(2, "b", "s2")])
        batch = [told(3, "a", "s1"), told(4, "c", "s2"), told(5, "d", "s5"), told(6, "a", "s1"), told(7, "a", "s2")]
        with pytest.raises(BatchFailed, match="another unique index") as failed:
            await sink.write(batch)
        assert list(failed.value.failed) == [1, 4]
        rows = await server.execute("select clientid, serial, value from readings order by clientid", database=database)
        assert rows == [("a", "s1", 6), ("b", "s2", 2), ("d", "s5", 5)]
        await sink.write([told(8, "b", "s8"), told(9, "a", "s2"), told(9, "a", "s2")])
        rows = await server.execute("select clientid, serial, value from readings order by clientid", database=database)
        assert rows == [("a", "s2", 9), ("b", "s8", 8), ("d", "s5", 5)]
        many = [told(n, f"dev-{n % 300}", f"s-{n % 300}") for n in range(1000)]
        await sink.write(many)
        assert (await server.execute("select count(*), max(value) from readings", database=database)) == [(303, 999)]

    async def test_s07_an_index_of_columns_that_are_not_ours_refuses_a_row_aloud(
        self, open: Any, server: Mariadb
    ) -> None:
        """S-07: its default value makes the second row a conflict, which must not become an update of the first."""
        database = await server.create(
            "create table readings (clientid varchar(40) primary key, site int not null default 1, value int, "
            "unique (site))"
        )
        columns = {"clientid": "${clientid}", "value": "${payload.value}"}
        for mode in ("update", "ignore"):
            await server.execute("delete from readings", database=database)
            sink = await open(database, columns=columns, key=["clientid"], on_conflict=mode)
            with pytest.raises(BatchFailed, match="another unique index") as failed:
                await sink.write([record(n, {"value": n}, clientid=f"dev-{n}") for n in range(3)])
            assert sorted(failed.value.failed) == [1, 2]
            rows = await server.execute("select clientid, value from readings", database=database)
            assert rows == [("dev-0", 0)]

    async def test_a_generated_column_is_refused(self, open: Any, server: Mariadb) -> None:
        database = await server.create("create table readings (msgid char(32) primary key, n int as (1 + 1))")
        sink = await open(database, columns={"msgid": "${msgid}", "n": "1"})
        with pytest.raises(Fatal, match="makes the values of column n"):
            await sink.check()

    async def test_an_index_of_a_prefix_is_no_key(self, open: Any, server: Mariadb) -> None:
        database = await server.create("create table readings (msgid varchar(40), value float, unique (msgid(8)))")
        sink = await open(database, columns={"msgid": "${msgid}", "value": "1"})
        with pytest.raises(Fatal, match="is not unique"):
            await sink.check()

    async def test_a_server_that_only_reads_is_tried_again(self, open: Any, server: Mariadb, database: str) -> None:
        await server.execute(
            "create or replace user writer@'%' identified by 'writer-pw'",
            f"grant all on {database}.* to writer@'%'",
            "set global read_only = 1",
        )
        try:
            sink = await open(database, dsn=server.dsn(database, user="writer"), password="writer-pw")
            with pytest.raises(NotConnected, match="read-only"):
                await sink.write(records(0))
        finally:
            await server.execute("set global read_only = 0")
        await deliver(sink, records(0))
        assert await self.values(server, database) == [0]
