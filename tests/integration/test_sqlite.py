"""The SQLite sink against real files."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks.sqlite import BACKEND, Sqlite, SqliteConfig, open_sqlite

Open = Callable[..., "asyncio.Future[Sqlite]"]
COLUMNS = {name: f"${{{value}}}" for name, value in [
    ("msgid", "msgid"), ("time", "ts"), ("clientid", "clientid"), ("topic", "topic"), ("payload", "payload"),
]}  # fmt: skip


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def open_(**keys: Any) -> Sqlite:
            keys = {"filters": ["#"], "path": "t.db", "columns": COLUMNS, **keys}
            config = SqliteConfig.model_validate(keys, context={"base": tmp_path})
            sink = await open_sqlite(config.named("sqlite"))  # type: ignore[arg-type]
            stack.push_async_callback(sink.close)
            return sink

        yield open_


def records(*numbers: int, payload: bytes = b"text") -> list[Record]:
    return [Record("t/1", payload, clientid="dev", msgid=f"{n:032x}", ts=1_700_000_000_000 + n) for n in numbers]


def rows(path: Path, query: str = "SELECT * FROM messages") -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


async def test_records_become_rows_of_a_table_made_from_the_columns(opened: Any, tmp_path: Path):
    sink = await opened(path="new/folder/t.db")
    await sink.write(records(1, 2))
    path = tmp_path / "new/folder/t.db"
    assert rows(path) == [(f"{n:032x}", 1_700_000_000_000 + n, "dev", "t/1", "text") for n in (1, 2)]
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]
    [(schema,)] = rows(path, "SELECT sql FROM sqlite_master WHERE name = 'messages'")
    assert '"msgid" TEXT PRIMARY KEY, "time" INTEGER, "clientid" TEXT, "topic" TEXT, "payload"' in schema


async def test_what_is_written_is_flushed_before_write_returns(opened: Any):
    sink = await opened()
    await sink.write(records(1))
    assert sink._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert not sink._db.in_transaction


async def test_a_batch_that_comes_again_makes_no_second_row(opened: Any, tmp_path: Path):
    sink = await opened()
    await sink.write(records(1, 2, 3))
    await sink.write(records(2, 3, 4))
    assert rows(tmp_path / "t.db", "SELECT count(*), count(DISTINCT msgid) FROM messages") == [(4, 4)]


async def test_payloads_keep_their_kind(opened: Any, tmp_path: Path):
    sink = await opened(columns={"raw": "${payload}", "v": "${payload.v}", "o": "${payload.o}", "all": "${.}"})
    await sink.write(
        records(1, payload=b'{"v": 1.5, "o": [1, null]}') + records(2, payload=b"\xff\x00") + records(3, payload=b"")
    )
    assert rows(tmp_path / "t.db", "SELECT raw, v, o, typeof(raw) FROM messages") == [
        ('{"v": 1.5, "o": [1, null]}', 1.5, "[1,null]", "text"),
        (b"\xff\x00", None, None, "blob"), ("", None, None, "text"),
    ]  # fmt: skip
    assert rows(tmp_path / "t.db", "SELECT json_extract(\"all\", '$.clientid') FROM messages") == [("dev",)] * 3


async def test_a_missing_column_is_named(opened: Any, tmp_path: Path):
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute("CREATE TABLE messages (msgid TEXT PRIMARY KEY, time, clientid, topic)")
    sink = await opened()
    for verb in (sink.check(), sink.write(records(1))):
        with pytest.raises(Fatal, match="no column payload"):
            await verb
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute("ALTER TABLE messages ADD COLUMN payload")
    await sink.check()
    await sink.write(records(1))
    assert len(rows(tmp_path / "t.db")) == 1


async def test_a_message_id_that_is_not_unique_is_refused_with_the_statement_that_helps(opened: Any, tmp_path: Path):
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute("CREATE TABLE messages (msgid, time, clientid, topic, payload)")
    sink = await opened()
    with pytest.raises(Fatal) as refused:
        await sink.write(records(1))
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute(str(refused.value).partition("unique: ")[2])
    await sink.write(records(1))


async def test_s07_only_the_refused_record_fails_and_the_others_are_stored(opened: Any, tmp_path: Path):
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute("CREATE TABLE messages (msgid TEXT PRIMARY KEY, v REAL NOT NULL CHECK (v < 100))")
    sink = await opened(columns={"msgid": "${msgid}", "v": "${payload.v}"})
    batch = [*records(*range(50), payload=b'{"v":1}'), *records(50, payload=b'{"v":1000}'), *records(51, payload=b"{}"),
             *records(*range(52, 100), payload=b'{"v":2}')]  # fmt: skip
    with pytest.raises(BatchFailed) as failed:
        await sink.write(batch)
    assert sorted(failed.value.failed) == [50, 51]
    assert "CHECK" in failed.value.failed[50]
    assert "NOT NULL" in failed.value.failed[51]
    assert rows(tmp_path / "t.db", "SELECT count(*) FROM messages") == [(98,)]


@pytest.mark.parametrize("refusal", ["select raise(rollback, 'never')", "insert into marks values (1)"])
async def test_s07_a_refusal_that_ends_the_transaction_costs_no_other_record(
    opened: Any, tmp_path: Path, refusal: str
) -> None:
    """S-07."""
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.executescript(f"""
            CREATE TABLE messages (msgid TEXT PRIMARY KEY, time, clientid, topic, payload);
            CREATE TABLE marks (mark UNIQUE ON CONFLICT ROLLBACK);
            INSERT INTO marks VALUES (1);
            CREATE TRIGGER no BEFORE INSERT ON messages WHEN new.payload = 'bad' BEGIN {refusal}; END""")
    sink = await opened()
    batch = [*records(0, 1), *records(2, payload=b"bad"), *records(3), *records(4, 5, payload=b"bad"), *records(6)]
    for _ in range(2):
        with pytest.raises(BatchFailed) as failed:
            await sink.write(batch)
        assert list(failed.value.failed) == [2, 4, 5]
        assert [int(row[0], 16) for row in rows(tmp_path / "t.db", "SELECT msgid FROM messages ORDER BY rowid")] == [
            0, 1, 3, 6,
        ]  # fmt: skip


async def test_a_number_sqlite_cannot_hold_is_refused(opened: Any, tmp_path: Path):
    sink = await opened(columns={"v": "${payload.v}"})
    with pytest.raises(BatchFailed) as failed:
        await sink.write(records(0, payload=b'{"v":18446744073709551615}') + records(1, payload=b'{"v":5}'))
    assert list(failed.value.failed) == [0]
    assert rows(tmp_path / "t.db") == [(5,)]


async def test_a_file_another_process_writes_to_is_tried_again_later(opened: Any, tmp_path: Path):
    sink = await opened(busy_timeout="50ms")
    await sink.write(records(1))
    with closing(sqlite3.connect(tmp_path / "t.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(NotConnected, match="locked"):
            await sink.write(records(2))
        other.execute("COMMIT")
    await sink.write(records(2))
    assert len(rows(tmp_path / "t.db")) == 2


async def test_s06_a_full_disk_is_tried_again_later(opened: Any, tmp_path: Path):
    sink = await opened()
    await sink.write(records(1))
    full = sink._db
    full.execute("PRAGMA max_page_count = 1")  # the limit SQLite itself answers SQLITE_FULL at
    with pytest.raises(NotConnected, match="full"):
        await sink.write(records(*range(2, 200), payload=b"x" * 5000))
    await sink.write(records(*range(2, 200), payload=b"x" * 5000))  # a new connection has no such limit
    assert rows(tmp_path / "t.db", "SELECT count(*) FROM messages") == [(199,)]


async def test_something_that_is_no_database_is_fatal(opened: Any, tmp_path: Path):
    (tmp_path / "t.db").write_bytes(b"no database at all" * 1000)
    sink = await opened()
    with pytest.raises(Fatal, match=r"t\.db.*not a database"):
        await sink.write(records(1))


async def test_a_path_that_cannot_be_a_file_is_tried_again_later(opened: Any, tmp_path: Path):
    (tmp_path / "t.db").mkdir()
    sink = await opened()
    with pytest.raises(NotConnected, match=r"t\.db"):
        await sink.write(records(1))


async def test_a_file_that_was_moved_away_is_made_anew(opened: Any, tmp_path: Path):
    sink = await opened()
    await sink.write(records(1))
    for name in ("t.db", "t.db-wal", "t.db-shm"):
        (tmp_path / name).rename(tmp_path / f"old-{name}")
    await sink.write(records(2))
    assert [row[0] for row in rows(tmp_path / "t.db")] == [f"{2:032x}"]


async def test_check_changes_nothing(opened: Any, tmp_path: Path):
    sink = await opened(path="a/b/t.db")
    await sink.check()
    assert os.listdir(tmp_path) == []
    await sink.write(records(1))
    await sink.check()


async def test_the_loop_runs_on_while_sqlite_waits(opened: Any, tmp_path: Path):
    sink = await opened(busy_timeout="5s")
    await sink.write(records(1))
    with closing(sqlite3.connect(tmp_path / "t.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(sink.write(records(2)))
        turns = 0
        while turns < 50:
            await asyncio.sleep(0.001)
            turns += 1
        assert not writing.done()
        other.execute("COMMIT")
    await writing


async def test_two_lanes_write_at_once(opened: Any, tmp_path: Path):
    sink = await opened()
    await asyncio.gather(*(sink.write(records(*range(n * 100, n * 100 + 100))) for n in range(5)))
    assert rows(tmp_path / "t.db", "SELECT count(*) FROM messages") == [(500,)]


async def test_close_ends_the_thread_even_if_nothing_was_opened(opened: Any):
    sink = await opened()
    await sink.close()
    written = await opened()
    await written.write(records(1))
    await written.close()
    await written.close()
    deadline = asyncio.get_running_loop().time() + 5
    while any(t.name.startswith("sqlite-") for t in threading.enumerate()):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "keys",
    [
        {"table": 'x"; DROP TABLE y'}, {"table": "sqlite_master"}, {"columns": {"a b": "${topic}"}}, {"columns": {}},
        {"columns": {"a": "${nothing}"}}, {"columns": {"a": "x", "A": "y"}},
    ],
)  # fmt: skip
def test_names_and_templates_are_checked_when_the_configuration_is_read(keys: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValidationError):
        SqliteConfig.model_validate({"filters": ["#"], "path": "t.db", **keys}, context={"base": tmp_path})


def test_reserved_words_may_be_columns(tmp_path: Path):
    config = SqliteConfig.model_validate(
        {"filters": ["#"], "path": "t.db", "columns": {"order": "${qos}", "key": "${topic}"}}
    )
    assert BACKEND.config is SqliteConfig
    asyncio.run(_write_and_close(config.model_copy(update={"path": tmp_path / "t.db"})))
    assert rows(tmp_path / "t.db", 'SELECT "order", "key" FROM messages') == [(0, "t/1")]


async def _write_and_close(config: SqliteConfig) -> None:
    sink = await open_sqlite(config)
    await sink.write(records(1))
    await sink.close()
