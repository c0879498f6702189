"""Rows in a real PostgreSQL, also through a faulty network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

import asyncpg
import pytest
from pydantic import ValidationError

from broker.client.session import Publisher
from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, Fatal, NotConnected
from sinks.postgresql import BACKEND
from tests.broker import Broker
from tests.fragments import shipped
from tests.integration.sql_sink_suite import SqlSinkSuite, deliver, record, records
from tests.sql_servers import Postgresql, SqlServer, or_skip, postgresql


@pytest.fixture(scope="module")
def server() -> Iterator[Postgresql]:
    with or_skip("postgresql", postgresql) as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[Postgresql]:
    with or_skip("postgresql", postgresql) as server:
        server.pid  # noqa: B018 (a server given by address cannot be stopped)
        yield server


class TestPostgresql(SqlSinkSuite):
    backend: ClassVar[Backend] = BACKEND
    readings: ClassVar[str] = (
        "create table readings (n serial primary key, msgid char(32) unique, time timestamptz, device text, "
        "value real not null check (value < 1000), unit varchar(8))"
    )

    @contextlib.asynccontextmanager
    async def locked(self, server: SqlServer, database: str) -> AsyncIterator[None]:
        connection = await asyncpg.connect(server.dsn(database), password=server.password, ssl=False)
        try:
            async with connection.transaction():
                await connection.execute("lock table readings")
                yield
        finally:
            connection.terminate()

    def reader(self, database: str) -> tuple[str, ...]:
        return (
            "do $$ begin create user reader password 'reader-pw'; exception when duplicate_object then null; end $$",
            "grant select on readings to reader",
        )

    @pytest.mark.parametrize("mode", ["unnest", "staging"])
    async def test_both_ways_convert_alike(self, open: Any, server: Postgresql, mode: str) -> None:
        database = await server.create(
            "create type mood as enum ('good', 'bad')",
            "create table t (id uuid primary key, small smallint, big bigint, exact numeric(10, 2), yes boolean, "
            "raw bytea, packed bytea, whole jsonb, field jsonb, around jsonb, env json, at timestamp, day date, "
            "addr inet, feeling mood, words text, name varchar(200), list int[])",
        )
        columns = {
            "id": "${msgid}", "small": "${qos}", "big": "${payload.big}", "exact": "${payload.exact}",
            "yes": "${retain}", "raw": "${payload}", "packed": "${msgid}", "whole": "${payload}",
            "field": "${payload.unit}", "around": '{"u": ${payload.big}, "m": ${payload.missing}}', "env": "${.}",
            "at": "${payload.at}", "day": "${ts}", "addr": "${peerhost}", "feeling": "${payload.mood}",
            "words": "${payload.words}", "name": "${topic[0]}/${clientid}", "list": "${payload.list}",
        }  # fmt: skip
        sink = await open(database, table="public.t", columns=columns, mode=mode)
        await sink.check()
        payload = {"big": 1 << 60, "exact": 0.125, "unit": "C", "at": "2026-02-03T04:05:06.5+01:00", "mood": "bad",
                   "words": [1, "x"], "list": "{1,2}"}  # fmt: skip
        await sink.write([record(255, payload, peerhost="10.0.0.7"), record(256, {}, clientid=None)])
        [first, second] = [dict(zip(columns, row, strict=True)) for row in await server.execute(
            f"select {', '.join(columns)} from t order by id", database=database)]  # fmt: skip
        assert first["id"] == UUID(int=255)
        assert (first["small"], first["big"], first["exact"], first["yes"]) == (1, 1 << 60, Decimal("0.13"), False)
        assert first["packed"] == (255).to_bytes(16, "big")
        assert first["raw"].startswith(b'{"big"')
        assert '"exact": 0.125' in first["whole"]
        assert (first["field"], first["around"]) == ('"C"', f'{{"m": null, "u": {1 << 60}}}')
        assert '"clientid":"dev-5"' in first["env"]
        assert (first["at"], first["day"]) == (datetime(2026, 2, 3, 3, 5, 6, 500_000), date(2023, 11, 14))
        assert (str(first["addr"]), first["feeling"], first["words"]) == ("10.0.0.7", "bad", '[1,"x"]')
        assert (first["name"], first["list"]) == ("telemetry/dev-5", [1, 2])
        nulls = {name for name, value in second.items() if value is None}
        assert nulls == {"big", "exact", "field", "at", "addr", "feeling", "words", "list"}

    async def test_s07_what_only_the_server_can_refuse(self, open: Any, server: Postgresql, database: str) -> None:
        """S-07: U+0000 in jsonb, no JSON, no such member of an enumeration, a number that is too exact."""
        await server.execute(
            "create type mood as enum ('good', 'bad')",
            "alter table readings add column body jsonb, add column mood mood, add column narrow numeric(4, 1)",
            database=database,
        )
        columns = {"msgid": "${msgid}", "value": "1", "body": "${payload}", "mood": "${user_property.mood}",
                   "narrow": "${user_property.narrow}"}  # fmt: skip
        sink = await open(database, columns=columns)
        for count in (10, 900):
            await server.execute("delete from readings", database=database)
            batch = records(*range(count))
            batch[3] = record(3, b'{"a": "\\u0000"}')
            batch[4] = record(4, b"{no json")
            batch[7].user_properties = [("mood", "indifferent")]
            batch[8].user_properties = [("narrow", "123456")]
            batch[9].user_properties = [("mood", "good"), ("narrow", "12.34")]
            with pytest.raises(BatchFailed) as failed:
                await sink.write(batch)
            reasons = failed.value.failed
            assert list(reasons) == [3, 4, 7, 8]
            assert "json" in reasons[4]
            assert "enum" in reasons[7]
            assert "overflow" in reasons[8]
            rows = await server.execute("select mood, narrow from readings order by msgid", database=database)
            assert len(rows) == count - 4
            assert rows[5] == ("good", Decimal("12.3"))

    async def test_s29_json_around_placeholders_is_one_value_whatever_a_device_sends(
        self, open: Any, server: Postgresql, database: str
    ) -> None:
        """S-29, S-25."""
        await server.execute("alter table readings add column body jsonb", database=database)
        body = '{"by": "${clientid}", "said": "${payload.text}", "all": ${payload}}'
        sink = await open(database, columns={"msgid": "${msgid}", "value": "1", "body": body})
        nasty = '","admin":true,"x":"'
        batch = [record(n, {"text": nasty}, clientid=nasty) for n in range(2)]
        with pytest.raises(BatchFailed) as failed:
            await sink.write([*batch, record(2, {}), record(3, b"no json")])
        assert list(failed.value.failed) == [2, 3]
        assert "${payload.text} has no value" in failed.value.failed[2]
        looks = "select body->>'by', body->>'said', body ? 'admin' from readings"
        assert await server.execute(looks, database=database) == [(nasty, nasty, False)] * 2

    async def test_a_text_with_nul_is_refused(self, open: Any, server: Postgresql, database: str) -> None:
        sink = await open(database, columns={"msgid": "${msgid}", "value": "1", "device": "${payload.name}"})
        with pytest.raises(BatchFailed, match=r"column device: a text with U\+0000"):
            await sink.write([record(1, {"name": "a\0b"}), record(2, {"name": "a"})])
        assert [row[0] for row in await self.stored(server, database)] == ["a"]

    async def test_timescale_a_unique_index_that_holds_the_time_is_found(self, open: Any, server: Postgresql) -> None:
        """A hypertable's unique indexes must contain the column it is cut by, as those of a partitioned table must."""
        database = await server.create(
            "create table readings (n serial, msgid char(32), time timestamptz not null, device text, value real, "
            "unit text, unique (time, msgid)) partition by range (time)",
            "create table readings_2023 partition of readings for values from ('2023-01-01') to ('2024-01-01')",
            "create unique index too_wide on readings (time, msgid, n)",
        )
        sink = await open(database)
        await sink.check()
        for count in (10, 700):
            await sink.write(records(*range(count)))
            await sink.write(records(*range(count)))
        assert len(await self.stored(server, database)) == 700
        with pytest.raises(BatchFailed, match="no partition"):
            await sink.write([*records(701), record(702, ts=1_900_000_000_000)])
        assert len(await self.stored(server, database)) == 701

    async def test_copy_goes_straight_into_the_table(self, open: Any, server: Postgresql, database: str) -> None:
        sink = await open(database, mode="copy", on_conflict="error")
        await sink.check()
        batch = [record(n, {"value": n % 900}) for n in range(3000)]
        batch[1234] = record(1234, {"value": 1, "unit": "much too long"})
        batch[2345] = record(2345, {"value": 5000})
        with pytest.raises(BatchFailed) as failed:
            await sink.write(batch)
        assert list(failed.value.failed) == [1234, 2345]
        assert await self.values(server, database) == [n % 900 for n in range(3000) if n not in (1234, 2345)]
        await server.execute("alter table readings add column addr inet", database=database)
        other = await open(database, mode="copy", on_conflict="error", columns={"addr": "${peerhost}", "value": "1"})
        with pytest.raises(Fatal, match='inet, which cannot be copied: write mode = "staging"'):
            await other.check()
        with pytest.raises(ValidationError, match="looks for no conflicts"):
            await open(database, mode="copy")

    async def test_a_column_that_changed_its_type_is_found_mended(
        self, open: Any, server: Postgresql, database: str
    ) -> None:
        sink = await open(database)
        await sink.write(records(*range(600)))
        await server.execute("alter table readings alter device type bytea using device::bytea", database=database)
        with pytest.raises(Fatal, match="bytea"):
            await sink.write(records(*range(600, 900)))
        await sink.write(records(*range(600, 900)))
        assert len(await self.stored(server, database)) == 900

    async def test_what_copy_cannot_write_into_is_written_otherwise(
        self, open: Any, server: Postgresql, database: str
    ) -> None:
        """A table with row security, and a view."""
        await server.execute(
            "do $$ begin create user writer password 'writer-pw'; exception when duplicate_object then null; end $$",
            "grant all on readings to writer", "grant all on sequence readings_n_seq to writer",
            "alter table readings enable row level security",
            "create policy theirs on readings to writer using (true) with check (true)",
            database=database,
        )  # fmt: skip
        sink = await open(database, dsn=server.dsn(database, user="writer"), password="writer-pw")
        await sink.write(records(*range(600)))
        assert await self.values(server, database) == list(range(600))
        await server.execute(
            "create view plain as select msgid, time, device, value, unit from readings", database=database,
        )  # fmt: skip
        view = await open(database, table="plain", key=[], on_conflict="error")
        await view.check()
        await view.write([record(n, {"value": n % 900}) for n in range(600, 1200)])
        assert len(await self.values(server, database)) == 1200

    async def test_s07_a_row_that_a_policy_refuses_stops_no_other(
        self, open: Any, server: Postgresql, database: str
    ) -> None:
        """S-07; a right that is missing still stops the sink."""
        await server.execute(
            "do $$ begin create user writer password 'writer-pw'; exception when duplicate_object then null; end $$",
            "grant all on readings to writer", "grant all on sequence readings_n_seq to writer",
            "alter table readings enable row level security",
            "create policy small on readings to writer using (true) with check (value <> 7 and value <> 600)",
            database=database,
        )  # fmt: skip
        sink = await open(database, dsn=server.dsn(database, user="writer"), password="writer-pw")
        for count, bad in ((20, [7]), (800, [7, 600])):
            with pytest.raises(BatchFailed, match="row-level security") as failed:
                await sink.write(records(*range(count)))
            assert list(failed.value.failed) == bad
        assert await self.values(server, database) == [n for n in range(800) if n not in (7, 600)]
        await server.execute("revoke insert on readings from writer", database=database)
        with pytest.raises(Fatal, match="permission denied"):
            await sink.write(records(900))

    async def test_a_transaction_that_could_not_begin_is_ended(
        self, open: Any, server: Postgresql, database: str
    ) -> None:
        """The connection is used again, which an aborted transaction would not allow."""
        sink = await open(database, mode="staging")
        await server.execute(
            "create function full() returns event_trigger language plpgsql as "
            "$$ begin raise exception 'could not extend file' using errcode = '53100'; end $$",
            "create event trigger no_room on ddl_command_start execute function full()",
            database=database,
        )
        for _ in range(2):
            with pytest.raises(NotConnected, match="could not extend file"):
                await sink.write(records(1))
        await server.execute("drop event trigger no_room", database=database)
        await sink.write(records(1))
        assert await self.values(server, database) == [1]

    async def test_a_generated_column_is_refused(self, open: Any, server: Postgresql) -> None:
        database = await server.create(
            "create table readings (msgid text primary key, n bigint generated always as identity)"
        )
        sink = await open(database, columns={"msgid": "${msgid}", "n": "1"})
        with pytest.raises(Fatal, match="makes the values of column n"):
            await sink.check()

    async def test_a_deadlock_is_tried_again(self, open: Any, server: Postgresql, database: str) -> None:
        await server.execute("create unique index by_device on readings (device)", database=database)
        sink = await open(database, key=["device"], on_conflict="update", lanes=4)
        batches = [[record(n, {"value": n}) for n in order] for order in (range(10), range(9, -1, -1))]
        await asyncio.gather(*(deliver(sink, batches[n % 2]) for n in range(40)))
        assert sorted(await self.values(server, database)) == list(range(10))

    async def test_the_shipped_example_works_as_it_stands(
        self, isthmus: Broker, server: Postgresql, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the table its comment creates."""
        text = shipped("32-sink-postgresql.toml")
        database = await server.create(next(line for line in text.splitlines() if "create table" in line).lstrip("# "))
        monkeypatch.setenv("MQTT_PG_PASSWORD", server.password)
        dsn = ("postgresql://mqtt@127.0.0.1:5432/plant", server.dsn(database))
        isthmus.write("32-sink-postgresql.toml", shipped("32-sink-postgresql.toml", dsn))
        await asyncio.to_thread(isthmus.start)
        publisher = await Publisher.connect(f"mqtt://127.0.0.1:{isthmus.port}", client_id="dev-1")
        for value in (b"21.5", b"1000", b"null", b'"7"', b"-1"):
            await publisher.publish("telemetry/a/temperature", b'{"value": %s, "unit": "C"}' % value, 1)
        await publisher.publish("telemetry/a/humidity", b'{"value": 5}', 1)
        await publisher.disconnect()
        await self.until(isthmus, lambda sink: sink.get("acked") == 5)
        query = "select device, value, unit, length(msgid::text), time > '2026-01-01' from readings order by msgid"
        rows = await server.execute(query, database=database)
        assert rows == [("dev-1", 21.5, "C", 36, True), ("dev-1", -1.0, "C", 36, True)]
