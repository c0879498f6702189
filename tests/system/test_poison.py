"""Poison among good records: each good one is stored once, each bad one is a dead letter that says why."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import sql_servers
from tests.broker import broker
from tests.sql_servers import SqlServer
from tests.system import resilience
from tests.system.durability import ROOM
from tests.system.fleet import Flood
from tests.system.resilience import SOAK, command, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 if SOAK else 180)]

COUNT = 1_000_000 if SOAK else 20_000
ONE_IN = 1_000

SINK = """
[sinks.readings]
kind = "{kind}"
dsn = "{dsn}"
password = "{password}"
table = "readings"
filters = ["telemetry/#"]
lanes = 2
timeout = "{timeout}"
columns = {{ msgid = "${{msgid}}", value = "${{payload.value}}", unit = "${{payload.unit}}", body = "${{payload}}" }}
"""
TABLE = """create table readings (msgid char(32) unique, value {double} not null, unit varchar(8), body text,
    constraint sane check (value < 1000000))"""
FIX = {
    "postgresql": "alter table readings drop constraint sane, alter value drop not null, alter value type text, "
    "alter unit type text",
    "mysql": "alter table readings drop constraint sane, modify value text null, modify unit text",
}
REASONS = (
    "column value: must not be null, and ${payload.value} has no value",
    "column value: 'warm' is not a number",
    "sane",
    "too long",
)
"""What a letter of each kind of poison says: malformed JSON, no number, a CHECK, a text too long for its column."""


def payloads() -> Iterator[tuple[str, bytes]]:
    """Topic and payload of each message; one in a thousand is bad, in four ways in turn."""
    for n in range(COUNT):
        topic = f"telemetry/{n % 10}"
        if n % ONE_IN != ONE_IN - 1:
            yield topic, b'{"n": %d, "value": %d.5, "unit": "C"}' % (n, n % 100)
            continue
        yield (
            topic,
            (
                b'{"n": %d, "value": 1' % n,
                b'{"n": %d, "value": "warm", "unit": "C"}' % n,
                b'{"n": %d, "value": 1e9, "unit": "C"}' % n,
                b'{"n": %d, "value": 1, "unit": "Celsius-ish"}' % n,
            )[n // ONE_IN % 4],
        )


def kind_of(payload: bytes) -> int:
    """Which of the four ways."""
    if not payload.endswith(b"}"):
        return 0
    return next(kind for kind, mark in enumerate((b"warm", b"1e9", b"Celsius"), 1) if mark in payload)


@pytest.fixture(params=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[SqlServer]:
    start: Any = {"postgresql": sql_servers.postgresql, "mysql": sql_servers.mariadb}[request.param]
    with sql_servers.or_skip("mariadb" if request.param == "mysql" else "postgresql", start) as server:
        yield server


async def test_s07_every_good_record_is_stored_once_and_every_bad_one_is_a_letter_until_it_is_replayed(
    server: SqlServer, tmp_path: Path
) -> None:
    """S-07, S-09, S-27: a million records in the long form; a letter has reason, topic, time and attempts."""
    kind = "postgresql" if server.scheme == "postgresql" else "mysql"
    database = await server.create(TABLE.format(double="double precision" if kind == "postgresql" else "double"))
    dsn = server.dsn(database)

    async def rows() -> tuple[int, int, int]:
        found = await server.execute(
            "select count(*), count(distinct msgid), count(distinct body) from readings", database=database
        )
        return tuple(found[0])

    sink = SINK.format(kind=kind, dsn=dsn, password=server.password, timeout="30s")
    bad = COUNT // ONE_IN
    with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": sink}) as running:
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "readings")

        async def status() -> dict[str, Any]:
            found: dict[str, Any] = (await command(running, "status"))["sinks"]["readings"]
            return found

        async def empty() -> dict[str, Any] | None:
            found = await status()
            return found if found["queued"] == 0 and found["acked"] + sum(found["dropped"].values()) >= COUNT else None

        began, sent_at = time.monotonic(), time.time() * 1000
        codes = await Flood().run(resilience.url(running), payloads())
        assert codes == {0: COUNT}
        sent = time.monotonic() - began
        found = await eventually(empty, "the end of the queue", 600, 0.1)
        took = time.monotonic() - began
        print(f"{kind}: {COUNT} sent in {sent:.1f} s, all settled after {took:.1f} s ({COUNT / took:.0f}/s)")
        assert (found["acked"], found["dropped"], found["dead_letters"]) == (COUNT, {}, bad)
        assert await rows() == (COUNT - bad,) * 3

        letters = await command(running, "deadletter.list", name="readings", limit=bad + 1)
        assert len(letters) == len({letter["id"] for letter in letters}) == bad
        kinds: Counter[int] = Counter()
        for letter in letters:
            shown = await command(running, "deadletter.show", name="readings", id=letter["id"])
            which = kind_of(shown["payload"].encode())
            kinds[which] += 1
            assert REASONS[which].lower() in letter["error"].lower(), letter
            assert (letter["topic"], letter["clientid"]) == (f"telemetry/{(ONE_IN - 1) % 10}", "flood")
            assert 1 <= letter["attempts"] <= 5
            assert sent_at - 1_000 <= shown["published"] <= letter["time"]
        assert set(kinds.values()) == {bad // 4}, kinds

        await server.execute(FIX[kind], database=database)
        running.write("30-sink.toml", sink.replace('"30s"', '"31s"'))
        done = await asyncio.to_thread(running.reload)
        assert done.returncode == 0, done.stderr
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "readings")
        answer = await command(running, "deadletter.replay", name="readings")
        assert answer == {"replayed": bad, "left": 0, "problem": ""}

        async def complete() -> bool:
            return await rows() == (COUNT,) * 3

        await eventually(complete, "the replayed records", 60, 0.2)
        assert (await status())["dead_letters"] == 0
