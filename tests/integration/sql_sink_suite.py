"""What every sink into an SQL server must do, run against the real server by `test_sink_postgresql` and
`test_sink_mysql`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from broker.client.connection import Connection, Handler, connect
from broker.client.session import Publisher
from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from broker.mqtt.packets import Publish
from broker.runtime.state import Describer
from tests import servers
from tests.broker import BASE, Broker
from tests.ledger import Ledger
from tests.proxy import Proxy
from tests.sql_servers import SqlServer

PATIENCE = servers.PATIENCE
SOAK = os.environ.get("ISTHMUS_SOAK") == "1"
LONG = (
    pytest.mark.slow, pytest.mark.timeout(3_600), pytest.mark.skipif(not SOAK, reason="a long form: make soak"),
)  # fmt: skip
COLUMNS = {
    "msgid": "${msgid}", "time": "${ts}", "device": "${clientid}", "value": "${payload.value}",
    "unit": "${payload.unit}",
}  # fmt: skip
NASTY = (
    "'", "'); DROP TABLE readings; --", "%s", "$1", "?", "\\", "\\'", "\u00e4\u20ac\U0001f600", "a\tb\nc",
    '"', "`", ";--", "\\N", "{}", " ",
)  # fmt: skip


def record(number: int, payload: Any = None, **more: Any) -> Record:
    body = {"value": number, "unit": "C"} if payload is None else payload
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    keys: dict[str, Any] = {
        "clientid": f"dev-{number % 10}",
        "msgid": f"{number:032x}",
        "ts": 1_700_000_000_000 + number,
    }
    return Record(f"telemetry/{number}", raw, 1, **{**keys, **more})


def records(*numbers: int, **more: Any) -> list[Record]:
    return [record(number, **more) for number in numbers]


async def deliver(sink: Any, batch: list[Record], seconds: float = 30) -> int:
    """As the worker does: the same batch until it is stored. Answers how often that failed."""
    end = time.monotonic() + seconds * PATIENCE
    failures = 0
    while True:
        try:
            await sink.write(batch)
            return failures
        except NotConnected:
            failures += 1
            assert time.monotonic() < end
            await asyncio.sleep(0.02)


class SqlSinkSuite:
    """Subclasses name the backend and how its database spells things."""

    backend: ClassVar[Backend]
    readings: ClassVar[str]
    """A table `readings` with a sequence `n`, the columns of COLUMNS, `msgid` its unique key, `value` NOT NULL and
    below 1000, `unit` of eight characters."""
    number: ClassVar[str] = "n"

    @pytest.fixture
    async def database(self, server: SqlServer) -> str:
        return await server.create(self.readings)

    @pytest.fixture
    async def proxy(self, server: SqlServer) -> AsyncIterator[Proxy]:
        async with Proxy("127.0.0.1", server.port) as proxy:
            yield proxy

    @pytest.fixture
    async def open(self, server: SqlServer) -> AsyncIterator[Callable[..., Any]]:
        """`await open(database, timeout=1)`: a sink, closed with the test."""
        async with contextlib.AsyncExitStack() as stack:

            async def opened(database: str, port: int | None = None, **more: Any) -> Any:
                keys = {"dsn": server.dsn(database, port), "password": server.password, "filters": ["#"], "timeout": 5,
                        "table": "readings", "columns": COLUMNS, **more}  # fmt: skip
                sink = await self.backend.open(self.backend.config.model_validate(keys).named("sql"))
                stack.push_async_callback(sink.close)
                return sink

            yield opened

    async def stored(self, server: SqlServer, database: str, what: str = "device, value, unit") -> list[Any]:
        return await server.execute(f"select {what} from readings order by n", database=database)

    async def values(self, server: SqlServer, database: str) -> list[int]:
        return [int(row[0]) for row in await self.stored(server, database, "value")]

    # what arrives ----------------------------------------------------------------------------------------------------

    async def test_records_become_rows(self, open: Any, server: SqlServer, database: str) -> None:
        sink = await open(database)
        await sink.check()
        await sink.write([record(7, {"value": 21.5, "unit": "C"}), record(8, {"value": "4e1"}, clientid=None)])
        assert await self.stored(server, database) == [("dev-7", 21.5, "C"), (None, 40.0, None)]
        [(when,)] = await server.execute("select min(time) from readings", database=database)
        assert (when.timestamp(), when.microsecond) == (1_700_000_000.007, 7000)

    @pytest.mark.parametrize("count", [1, 2, 499, 500, 513, 5000])
    async def test_batches_of_any_size_are_stored_in_order(
        self, open: Any, server: SqlServer, database: str, count: int
    ) -> None:
        sink = await open(database)
        await sink.write([record(n, {"value": n / 8}) for n in range(count)])
        await sink.write([record(n, {"value": n / 8}) for n in range(count, count + 3)])
        rows = await self.stored(server, database, "value")
        assert [float(row[0]) for row in rows] == [n / 8 for n in range(count + 3)]

    async def test_a_batch_that_comes_again_makes_no_second_row(
        self, open: Any, server: SqlServer, database: str
    ) -> None:
        sink = await open(database)
        for start, count in ((0, 3), (1, 4), (0, 700), (300, 690), (999, 1)):
            await sink.write(records(*range(start, start + count)))
        assert await self.values(server, database) == [*range(990), 999]

    async def test_two_lanes_write_at_once(self, open: Any, server: SqlServer, database: str) -> None:
        sink = await open(database, lanes=4)
        await asyncio.gather(*(sink.write(records(*range(n * 200, n * 200 + 200))) for n in range(5)))
        assert sorted(await self.values(server, database)) == list(range(1000))

    async def test_the_latest_value_wins(self, open: Any, server: SqlServer, database: str) -> None:
        await server.execute("create unique index by_device on readings (device)", database=database)
        sink = await open(database, key=["device"], on_conflict="update")
        await sink.check()
        for start, count in ((0, 30), (30, 900), (935, 5)):
            await sink.write(records(*range(start, start + count)))
        rows = await server.execute("select device, value from readings order by device", database=database)
        assert [(name, int(value)) for name, value in rows] == [
            (f"dev-{n}", 935 + n - 5 if n >= 5 else 920 + n) for n in range(10)
        ]

    async def test_a_bad_latest_value_leaves_the_good_one_before_it(
        self, open: Any, server: SqlServer, database: str
    ) -> None:
        await server.execute("create unique index by_device on readings (device)", database=database)
        sink = await open(database, key=["device"], on_conflict="update")
        with pytest.raises(BatchFailed) as failed:
            await sink.write([record(1), record(11), record(21, {"value": 5000})])
        assert list(failed.value.failed) == [2]
        assert await self.values(server, database) == [11]

    @pytest.mark.parametrize("place", ["${payload.text}", "${topic}", "${user_property.text}", "at ${topic[1]}"])
    async def test_s15_values_are_bound(self, open: Any, server: SqlServer, database: str, place: str) -> None:
        """S-15, S-29: wherever in a message the text comes from; one record in, one row out."""
        sink = await open(database, columns={**COLUMNS, "device": place})
        for some in (NASTY, NASTY * 40):
            await server.execute("delete from readings", database=database)
            batch = [record(n, {"value": n, "text": text}) for n, text in enumerate(some)]
            for one, text in zip(batch, some, strict=True):
                one.topic, one.user_properties = f"telemetry/{text}", [("text", text)]
            await sink.write(batch)
            head = {"${topic}": "telemetry/", "at ${topic[1]}": "at "}.get(place, "")
            assert [row[0] for row in await self.stored(server, database)] == [head + text for text in some]

    @pytest.mark.parametrize(
        "keys",
        [
            {"table": "${topic}"}, {"table": 'a"; drop table b'}, {"table": "a.b.c"}, {"table": ""}, {"columns": {}},
            {"columns": {"${payload.name}": "x"}}, {"columns": {"a": "${nothing}"}}, {"key": ["nothing"]},
            {"on_conflict": "update"}, {"columns": {"a`b": "x"}},
        ],
    )  # fmt: skip
    async def test_s15_a_message_chooses_neither_tables_nor_columns(self, open: Any, keys: Any) -> None:
        with pytest.raises(ValidationError):
            await open("nowhere", **keys)

    # poison ----------------------------------------------------------------------------------------------------------

    POISON: ClassVar[list[tuple[Any, str]]] = [
        ({"value": 5000, "unit": "C"}, "(?i)check|constraint"),
        ({"value": 1, "unit": "much too long"}, "(?i)too long"),
        ({"value": "warm"}, "column value: 'warm' is not a number"),
        ({"value": True}, "column value: 'true' is not a number"),
        ({"value": [1]}, r"column value: '\[1\]' is not a number"),
        ({"value": 1e300}, "(?i)large|range|check|constraint"),
        ({"unit": "C"}, r"column value: must not be null, and \$\{payload.value\} has no value"),
        ({"value": None}, "column value: must not be null"),
        (b"{no json", "column value: must not be null"),
        (b"\xff\xfe", "column value: must not be null"),
    ]

    @pytest.mark.parametrize("count", [20, 1200])
    async def test_s07_each_bad_record_is_found_and_the_others_are_stored(
        self, open: Any, server: SqlServer, database: str, count: int
    ) -> None:
        """S-07, S-25: constraints, lengths, types, ranges, nulls and missing fields, no JSON."""
        sink = await open(database)
        batch = [record(n, {"value": n / 2}) for n in range(count)]
        step = count // (len(self.POISON) + 1)
        bad = {(number + 1) * step: about for number, about in enumerate(self.POISON)}
        for position, (payload, _) in bad.items():
            batch[position] = record(position, payload)
        with pytest.raises(BatchFailed) as failed:
            await sink.write(batch)
        assert list(failed.value.failed) == sorted(bad)
        for position, (_, reason) in bad.items():
            assert re.search(reason, failed.value.failed[position]), (position, failed.value.failed[position])
        rows = await self.stored(server, database, "value")
        assert [float(row[0]) for row in rows] == [n / 2 for n in range(count) if n not in bad], "in order"
        await sink.write([record(count, {"value": 1})])
        assert len(await self.stored(server, database)) == count - len(bad) + 1

    @pytest.mark.parametrize("payload", [{"value": 5000}, {"value": 1, "unit": "much too long"}])
    async def test_s08_every_record_is_bad(self, open: Any, server: SqlServer, database: str, payload: Any) -> None:
        sink = await open(database)
        began = time.monotonic()
        with pytest.raises(BatchFailed) as failed:
            await sink.write([record(n, payload) for n in range(600)])
        assert list(failed.value.failed) == list(range(600))
        assert time.monotonic() - began < 10 * PATIENCE
        assert await self.stored(server, database) == []

    async def test_a_duplicate_is_a_dead_letter_where_it_is_to_be_an_error(
        self, open: Any, server: SqlServer, database: str
    ) -> None:
        sink = await open(database, on_conflict="error")
        await sink.write(records(*range(600)))
        with pytest.raises(BatchFailed) as failed:
            await sink.write(records(*range(595, 1000)))
        assert list(failed.value.failed) == [0, 1, 2, 3, 4]
        assert await self.values(server, database) == list(range(1000))

    async def test_another_unique_index_never_swallows_a_record(
        self, open: Any, server: SqlServer, database: str
    ) -> None:
        await server.execute("create unique index by_time on readings (time)", database=database)
        sink = await open(database, key=["msgid"])
        await sink.write(records(*range(10)))
        with pytest.raises(BatchFailed) as failed:
            await sink.write([*records(8, 9, 10), record(11, ts=1_700_000_000_003), record(12)])
        assert list(failed.value.failed) == [3]
        assert await self.values(server, database) == [*range(11), 12]

    # outages ---------------------------------------------------------------------------------------------------------

    async def test_outage_and_return(self, open: Any, server: SqlServer, proxy: Proxy, database: str) -> None:
        sink = await open(database, proxy.port)
        await sink.write(records(0))
        await proxy.down()
        for verb in (sink.write(records(1)), sink.check()):
            with pytest.raises(NotConnected):
                await verb
        await proxy.up()
        await deliver(sink, records(1))
        for way in (proxy.cut, proxy.reset):
            await way()
            await deliver(sink, records(1, 2))
        assert await self.values(server, database) == [0, 1, 2]

    async def test_s14_a_connection_cut_at_any_byte_of_the_answers_makes_one_row(
        self, open: Any, server: SqlServer, proxy: Proxy, database: str
    ) -> None:
        """S-14: also after COMMIT, before the answer."""
        sink = await open(database, proxy.port)
        done = 0

        def more(count: int) -> list[Record]:
            return [record(n, {"value": n % 1000}) for n in range(done, done + count)]

        for count in (3, 700):
            for _ in range(2):  # the first one also reads the table
                before = proxy.counts.bytes_down
                await sink.write(more(count))
                done += count
            answers = proxy.counts.bytes_down - before
            cuts = proxy.counts.cut
            for limit in range(1, answers + 1, max(1, answers // 30)):
                proxy.cut_after(limit, "down")
                await deliver(sink, more(count))
                proxy._limits.clear()
                done += count
            assert proxy.counts.cut - cuts >= 20
        rows = await server.execute("select count(*), count(distinct msgid) from readings", database=database)
        assert rows == [(done, done)]
        assert await self.values(server, database) == [n % 1000 for n in range(done)]

    async def test_s16_a_black_hole_is_noticed_and_the_connection_replaced(
        self, open: Any, server: SqlServer, proxy: Proxy, database: str
    ) -> None:
        assert self.backend.config.model_fields["timeout"].default <= 15
        sink = await open(database, proxy.port, timeout=0.5)
        await deliver(sink, records(0))
        proxy.black_hole = True
        began = time.monotonic()
        with pytest.raises(NotConnected, match="no answer in"):
            await sink.write(records(1))
        assert time.monotonic() - began < 0.5 + 3 * PATIENCE
        proxy.black_hole = False
        accepted = proxy.counts.accepted
        await deliver(sink, records(1))
        assert proxy.counts.accepted > accepted
        assert await self.values(server, database) == [0, 1]

    async def test_a_slow_target_is_waited_for(self, open: Any, server: SqlServer, proxy: Proxy, database: str) -> None:
        sink = await open(database, proxy.port, timeout=20)
        proxy.delay = 0.05
        await sink.write(records(*range(600)))
        await sink.write(records(*range(600, 605)))
        assert await self.values(server, database) == list(range(605))

    async def test_a_locked_table_is_waited_for(self, open: Any, server: SqlServer, database: str) -> None:
        sink = await open(database, timeout=0.5)
        await deliver(sink, records(0))
        async with self.locked(server, database):
            with pytest.raises(NotConnected):
                await sink.write(records(1))
        await deliver(sink, records(1))
        assert await self.values(server, database) == [0, 1]

    def locked(self, server: SqlServer, database: str) -> contextlib.AbstractAsyncContextManager[None]:
        """While it lasts, nobody else may use the table."""
        raise NotImplementedError

    async def test_restart_of_the_server_under_load(self, open: Any, own_server: SqlServer) -> None:
        database = await own_server.create(self.readings)
        sink = await open(database, dsn=own_server.dsn(database), password=own_server.password)
        done = failures = 0
        stop = False

        async def load() -> None:
            nonlocal done, failures
            while not stop:
                failures += await deliver(sink, [record(n, {"value": n % 1000}) for n in range(done, done + 20)])
                done += 20

        loading = asyncio.create_task(load())
        for _ in range(2):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_server.stop)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(own_server.start)
            before, end = done, time.monotonic() + 10 * PATIENCE
            while done < before + 60:
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
        stop = True
        await loading
        assert failures > 0, "the outage was real"
        rows = await own_server.execute("select count(*), count(distinct msgid) from readings", database=database)
        assert rows == [(done, done)]
        values = await self.values(own_server, database)
        assert values == [n % 1000 for n in range(done)]

    async def test_the_next_server_is_asked(self, open: Any, server: SqlServer, database: str) -> None:
        dead = servers.free_port()
        dsn = server.dsn(database).replace(f":{server.port}", f":{dead},127.0.0.1:{server.port}")
        sink = await open(database, dsn=dsn)
        await sink.write(records(0))
        assert await self.values(server, database) == [0]

    # what only a person can mend -------------------------------------------------------------------------------------

    async def test_what_is_wrong_with_the_table_is_said_and_found_mended(
        self, open: Any, server: SqlServer, database: str
    ) -> None:
        sink = await open(database, table="elsewhere")
        for mend, reason in (
            (self.readings.replace("readings", "elsewhere"), "there is no table elsewhere"),
            (None, None),
            ("alter table elsewhere add column unit varchar(8)", "no column unit"),
            (
                "create unique index by_msgid on elsewhere (msgid)",
                r"CREATE UNIQUE INDEX elsewhere_msgid ON elsewhere \(msgid\)",
            ),
        ):
            if mend is None:
                await sink.check()
                await sink.write(records(0))
                await server.execute("drop table elsewhere", database=database)
                bare = self.readings.replace("readings", "elsewhere").replace(self.unique, "").replace(self.unit, "")
                await server.execute(bare, database=database)
                with pytest.raises(Fatal):
                    await sink.write(records(0))
                continue
            for verb in (sink.check, lambda: sink.write(records(0))):
                with pytest.raises(Fatal, match=reason):
                    await verb()
            await server.execute(mend, database=database)
        await sink.check()
        await sink.write(records(0))

    unique: ClassVar[str] = " unique"
    unit: ClassVar[str] = ", unit varchar(8)"

    async def test_s21_who_is_not_let_in_is_told_without_the_password(
        self, open: Any, server: SqlServer, database: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """S-21: neither in the error nor in what is logged about it."""
        secret = "s3cret-of-nobody"
        caplog.set_level("DEBUG")
        sink = await open(database, password=secret)
        nowhere = await open(database, dsn=server.dsn("isthmus_nowhere"), password=server.password)
        for one in (sink, nowhere):
            for verb in (one.check, lambda one=one: one.write(records(0))):
                with pytest.raises(Fatal) as refused:
                    await verb()
                error = refused.value
                assert secret not in f"{error!r} {error.__cause__!r} {Describer(one._config)(error)}"
        assert secret not in caplog.text + repr(sink._config) + sink._config.model_dump_json()

    async def test_a_table_without_rights_is_fatal_when_it_is_checked(
        self, open: Any, server: SqlServer, database: str
    ) -> None:
        await server.execute(*self.reader(database), database=database)
        sink = await open(database, dsn=server.dsn(database, user="reader"), password="reader-pw")
        with pytest.raises(Fatal, match=r"(?i)denied"):
            await sink.check()

    def reader(self, database: str) -> tuple[str, ...]:
        raise NotImplementedError

    async def test_check_changes_nothing(self, open: Any, server: SqlServer, database: str) -> None:
        sink = await open(database)
        await sink.check()
        await sink.write(records(0))
        await sink.check()
        assert await self.values(server, database) == [0]

    @pytest.mark.parametrize(
        "tables", [pytest.param(1_000, marks=pytest.mark.timeout(240)), pytest.param(100_000, marks=LONG)]
    )
    async def test_s28_a_database_of_many_tables_is_checked_quickly(
        self, open: Any, server: SqlServer, proxy: Proxy, database: str, tables: int
    ) -> None:
        """S-28: a hundred thousand in the long form."""
        for first in range(0, tables, 500):
            statements = (f"create table t{n} (a int)" for n in range(first, first + 500))
            await server.execute(*statements, database=database)
        times: dict[str, list[float]] = {"check": [], "write": []}
        for _ in range(3):  # a sink that was just opened knows nothing
            sink = await open(database, proxy.port)
            for name, verb in (("check", sink.check), ("write", lambda sink=sink: sink.write(records(0)))):
                before, began = proxy.counts.bytes_down, time.monotonic()
                await verb()
                took, bytes_down = time.monotonic() - began, proxy.counts.bytes_down - before
                print(f"{tables} tables: {name} {took * 1000:.1f} ms, {bytes_down} bytes")
                times[name].append(took)
                assert 0 < bytes_down < 64 << 10
        assert max(map(min, times.values())) < PATIENCE, "the best of three"

    async def test_closing_ends_what_is_under_way(
        self, open: Any, server: SqlServer, proxy: Proxy, database: str
    ) -> None:
        sink = await open(database, proxy.port)
        await sink.write(records(0))
        await sink.close()
        with pytest.raises(NotConnected, match="closed"):
            await sink.write(records(1))
        end = time.monotonic() + 5
        while proxy.connections:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    # the whole way ---------------------------------------------------------------------------------------------------

    def fragment(self, server: SqlServer, database: str, port: int | None = None, **changes: str) -> str:
        keys = {
            "kind": f'"{self.backend.name.removeprefix("sinks.")}"', "dsn": f'"{server.dsn(database, port)}"',
            "password": f'"{server.password}"', "table": '"readings"', "filters": '["telemetry/#"]',
            "columns": '{ msgid = "${msgid}", device = "${payload.stamp}", value = "${payload.value}" }', **changes,
        }  # fmt: skip
        return "[sinks.readings]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())

    @pytest.fixture
    def isthmus(self, tmp_path: Path) -> Iterator[Broker]:
        running = Broker(tmp_path)
        running.write("00-test.toml", '[access]\nallow_anonymous = true\nno_match = "allow"\n' + BASE)
        rule = '[[auth.anybody.rules]]\npermission = "allow"\naction = "subscribe"\ntopics = ["$dlq/#"]\n'
        running.write("20-rule.toml", '[auth.anybody]\nkind = "static"\n' + rule)
        yield running
        with contextlib.suppress(RuntimeError):
            running.process.kill()

    async def until(
        self, isthmus: Broker, holds: Callable[[dict[str, Any]], bool], seconds: float = 30
    ) -> dict[str, Any]:
        end = time.monotonic() + seconds * PATIENCE
        while True:
            entry = (await asyncio.to_thread(isthmus.status))["sinks"]["readings"]
            if holds(entry):
                return entry  # type: ignore[no-any-return]
            assert time.monotonic() < end, entry
            await asyncio.sleep(0.1)

    async def test_s02_every_acknowledged_message_is_stored_once_though_the_worker_is_killed(
        self, isthmus: Broker, server: SqlServer, proxy: Proxy, database: str
    ) -> None:
        """S-02, S-27: four devices, the worker killed three times, the connections reset in between."""
        isthmus.write("32-sink.toml", self.fragment(server, database, proxy.port))
        await asyncio.to_thread(isthmus.start)
        await self.until(isthmus, lambda sink: sink["state"] == "running")
        ledger = Ledger()
        stop = False

        async def device(name: str) -> None:
            publisher = await Publisher.connect(f"mqtt://127.0.0.1:{isthmus.port}", client_id=name)
            while not stop:
                numbered = [ledger.next(name) for _ in range(20)]
                await asyncio.gather(*(
                    publisher.publish(f"telemetry/{name}", b'{"stamp": "%s", "value": 1}' % stamp, 1)
                    for _, stamp in numbered
                ))  # fmt: skip
                for number, _ in numbered:
                    ledger.acknowledged(name, number)
                await asyncio.sleep(0.01)
            await publisher.disconnect()

        devices = [asyncio.create_task(device(f"dev-{n}")) for n in range(4)]
        for _ in range(3):
            await asyncio.sleep(0.4)
            entry = await self.until(isthmus, lambda sink: sink["state"] == "running")
            os.kill(entry["pid"], signal.SIGKILL)
            await self.until(isthmus, lambda sink, pid=entry["pid"]: sink["pid"] not in (None, pid))  # type: ignore[misc]
            await self.until(isthmus, lambda sink: sink["state"] == "running")
            await asyncio.sleep(0.3)
            await proxy.reset()
        stop = True
        await asyncio.gather(*devices)
        await self.until(isthmus, lambda sink: sink["queued"] == 0 and sink["state"] == "running")
        for (text,) in await server.execute("select device from readings order by n", database=database):
            ledger.arrived(text.encode())
        report = ledger.compare()
        assert report.problem() == ""
        assert report.acknowledged > 500
        assert proxy.counts.reset >= 1
        assert await asyncio.to_thread(isthmus.stop) == 0

    async def test_s01_an_outage_queues_and_the_dead_letters_keep_what_does_not_fit(
        self, isthmus: Broker, server: SqlServer, proxy: Proxy, database: str
    ) -> None:
        """S-01, S-07, S-17: the publisher notices nothing; every message is stored, passed over or a dead letter."""
        await proxy.down()
        where = '"payload.value != null and payload.value < 5000"'
        isthmus.write("32-sink.toml", self.fragment(server, database, proxy.port, where=where))
        await asyncio.to_thread(isthmus.start)
        letters: list[Publish] = []
        url = f"mqtt://127.0.0.1:{isthmus.port}"

        class Reader(Handler):
            def on_publish(self, conn: Connection, publish: Publish) -> None:
                letters.append(publish)
                conn.ack(4, publish.packet_id)

        reader = await connect(url, client_id="reader", handler=Reader(), clean_start=False, session_expiry=600)
        await reader.subscribe([("$dlq/readings", 1)])
        publisher = await Publisher.connect(url, client_id="dev-1")
        payloads = [b'{"stamp": "%d", "value": %d}' % (n, n % 900) for n in range(1000)]
        payloads[100:103] = [b'{"stamp": "a", "value": 2000}', b"{no json", b'{"stamp": "b", "value": "warm"}']
        payloads[500:502] = [b'{"stamp": "c", "value": 7000}', b'{"stamp": "d"}']
        began = time.monotonic()
        await asyncio.gather(*(publisher.publish("telemetry/a", payload, 1) for payload in payloads))
        assert time.monotonic() - began < 5 * PATIENCE
        entry = await self.until(isthmus, lambda sink: sink["state"] == "retrying" and sink["queued"] == 1000)
        assert entry["last_error"]
        await proxy.up()
        entry = await self.until(isthmus, lambda sink: sink.get("acked") == 1000 and sink["dead"] == 3, 40)
        assert (entry["acked"], entry["dead"]) == (1000, 3), "what is in the dead letters is acknowledged too"
        await self.until(isthmus, lambda sink: sink["queued"] == 0 and sink["state"] == "running")
        rows = await server.execute("select device from readings order by n", database=database)
        good = [str(n) for n in range(1000) if n not in (100, 101, 102, 500, 501)]
        assert [row[0] for row in rows] == good
        end = time.monotonic() + 10
        while len(letters) < 3:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        assert sorted(letter.payload for letter in letters) == sorted(payloads[100:103])
        reasons = " ".join(
            dict(letter.properties.user_properties or ())["error"] for letter in letters if letter.properties
        )
        assert "the payload is no JSON" in reasons
        assert "'warm' and '5000' have no order" in reasons
        assert re.search("(?i)check|constraint", reasons)
        await publisher.disconnect()
        await reader.disconnect()
        assert await asyncio.to_thread(isthmus.stop) == 0

    async def test_check_connect_says_what_would_not_work(
        self, isthmus: Broker, server: SqlServer, database: str
    ) -> None:
        async def checked(**changes: str) -> tuple[int, str]:
            isthmus.write("32-sink.toml", self.fragment(server, database, None, **changes))
            done = await asyncio.to_thread(isthmus.isthmus, "check", "--connect")
            return done.returncode, done.stdout + done.stderr

        code, said = await checked()
        assert (code, "sinks.readings ok" in said) == (0, True), said
        for changes, word in (
            ({"table": '"elsewhere"'}, "there is no table elsewhere"),
            ({"columns": '{ msgid = "${msgid}", wrong = "x" }'}, "no column wrong"),
            ({"key": '["device"]', "on_conflict": '"update"'}, "CREATE UNIQUE INDEX readings_device"),
            ({"password": '"s3cret"'}, "(?i)password|denied"),
            ({"dsn": f'"{server.dsn(database, servers.free_port())}"'}, "(?i)cannot be reached|refused|connect"),
        ):
            code, said = await checked(**changes)
            assert (code, "s3cret" in said) == (3, False), said
            assert re.search(word, said), said
        code, said = await checked(dsn=f'"{server.dsn(database, user="mqtt:s3cret")}"')
        assert (code, "s3cret" in said) == (2, False), said
        assert "the password stands in the key password" in said
        assert await server.execute("select count(*) from readings", database=database) == [(0,)]
