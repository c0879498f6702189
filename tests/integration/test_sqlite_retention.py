"""What the SQLite sink removes again, against real files."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from broker.extend.sink import Fatal, Record
from sinks.sqlite import Sqlite, SqliteConfig, open_sqlite

DAY = 86_400_000


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:

        async def open_(**keys: Any) -> Sqlite:
            keys = {"filters": ["#"], "path": "t.db", **keys}
            config = SqliteConfig.model_validate(keys, context={"base": tmp_path})
            sink = await open_sqlite(config.named("sqlite"))  # type: ignore[arg-type]
            stack.push_async_callback(sink.close)
            return sink

        yield open_


def records(*numbers: int, ago: int = 0, size: int = 10) -> list[Record]:
    now = int(time.time() * 1000)
    return [Record("t/1", b"x" * size, clientid="dev", msgid=f"{n:032x}", ts=now - ago) for n in numbers]


def ask(folder: Path, query: str) -> Any:
    with closing(sqlite3.connect(folder / "t.db")) as db:
        return db.execute(query).fetchall()


def numbers(folder: Path) -> list[int]:
    return [int(row[0], 16) for row in ask(folder, "select msgid from messages order by rowid")]


async def test_rows_older_than_the_limit_go_with_the_next_batch(opened: Any, tmp_path: Path) -> None:
    sink = await opened(retention={"max_age": "1d"})
    await sink.write(records(1, 2, ago=DAY - 60_000))
    await sink.write(records(3, 4, ago=DAY + 60_000))
    assert numbers(tmp_path) == [1, 2], "what is too old when it comes is not kept either"
    await sink.write(records(5))
    assert numbers(tmp_path) == [1, 2, 5]


async def test_a_long_past_is_removed_in_bounded_steps_and_only_its_front_is_looked_at(
    opened: Any, tmp_path: Path
) -> None:
    sink = await opened()
    await sink.write(records(*range(5_000), ago=2 * DAY))
    await sink.close()
    sink = await opened(retention={"max_age": "1d"})
    for step in range(1, 5):
        await sink.write(records(10_000 + step))
        assert len(numbers(tmp_path)) == 5_000 - 1_000 * step + step
    await sink.write(records(*range(20_000, 21_000)))
    assert len(numbers(tmp_path)) == 1_004, "a batch removes twice what it brings"


async def test_the_oldest_rows_go_where_the_file_would_grow_beyond_its_limit(opened: Any, tmp_path: Path) -> None:
    sink = await opened(retention={"max_bytes": "1MB"})
    sizes = []
    for batch in range(60):
        await sink.write(records(*range(batch * 100, batch * 100 + 100), size=1_000))
        sizes.append(ask(tmp_path, "pragma page_count")[0][0] * ask(tmp_path, "pragma page_size")[0][0])
    kept = numbers(tmp_path)
    assert kept == list(range(kept[0], 6_000)), "the newest, without a hole"
    assert kept[0] >= 4_000
    assert max(sizes) <= 1_000_000 + 250_000, "one batch beyond the limit"
    assert ask(tmp_path, "pragma auto_vacuum") == [(2,)], "free room is given back"


async def test_a_row_removed_is_not_stored_again_by_a_repeated_batch_of_kept_ones(opened: Any, tmp_path: Path) -> None:
    sink = await opened(retention={"max_age": "1d"})
    batch = records(1, 2)
    await sink.write(batch)
    await sink.write(batch)
    assert numbers(tmp_path) == [1, 2]


async def test_rows_without_a_time_are_kept_and_a_table_that_holds_on_to_its_rows_is_still_written(
    opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = await opened(retention={"max_age": "1d"})
    await sink.write([Record("t/1", b"x", msgid="a" * 32)])
    await sink.write(records(1))
    assert ask(tmp_path, "select count(*) from messages") == [(2,)]
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute("create trigger no before delete on messages begin select raise(abort, 'never'); end")
    await sink.write(records(2, ago=2 * DAY))
    await sink.write(records(3))
    assert numbers(tmp_path)[1:] == [1, 2, 3]
    assert [r.getMessage() for r in caplog.records] == ["old rows cannot be removed: never"], "said once"


@pytest.mark.parametrize("ts", [None, int(time.time() * 1000) + 365 * DAY])
async def test_rows_without_a_time_or_with_one_to_come_do_not_keep_those_behind_them(
    opened: Any, tmp_path: Path, ts: int | None
) -> None:
    sink = await opened(retention={"max_age": "1d"})
    await sink.write([Record("t/1", b"x", msgid=f"{n:032x}", ts=ts) for n in range(2_500)])
    with closing(sqlite3.connect(tmp_path / "t.db")) as db, db:
        old = [(f"{n:032x}", int(time.time() * 1000) - 2 * DAY) for n in range(3_000, 4_000)]
        db.executemany("insert into messages (msgid, time) values (?, ?)", old)
    for n in range(5_000, 5_005):
        await sink.write(records(n))
    assert numbers(tmp_path) == [*range(2_500), *range(5_000, 5_005)]


async def test_a_table_that_was_emptied_is_trimmed_from_its_first_row(opened: Any, tmp_path: Path) -> None:
    sink = await opened(retention={"max_age": "1d"})
    await sink.write([Record("t/1", b"x", msgid=f"{n:032x}") for n in range(1_500)])
    await sink.write(records(2_000))
    with closing(sqlite3.connect(tmp_path / "t.db")) as db, db:
        db.execute("delete from messages")
    await sink.write(records(2_001))
    await sink.write(records(2_002, ago=2 * DAY))
    assert numbers(tmp_path) == [2_001]


async def test_a_table_that_rolls_a_removal_back_is_still_written(opened: Any, tmp_path: Path) -> None:
    sink = await opened(retention={"max_age": "1d"})
    await sink.write(records(1))
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute("create trigger no before delete on messages begin select raise(rollback, 'never'); end")
    await sink.write(records(2, ago=2 * DAY))
    await sink.write(records(3))
    assert numbers(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    "keys",
    [
        {"retention": {"max_age": "1d"}, "columns": {"time": "${ts_iso}"}},
        {"retention": {"max_age": "-1d"}},
        {"retention": {"max_rows": 5}},
    ],
)
def test_a_retention_that_cannot_work_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SqliteConfig.model_validate({"filters": ["#"], "path": "t.db", **keys})


async def test_a_table_without_row_numbers_is_refused(opened: Any, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "t.db")) as db:
        db.execute(
            "create table messages (msgid text primary key, time, clientid, username, topic, payload) without rowid"
        )
    sink = await opened(retention={"max_bytes": "1MB"})
    for verb in (sink.write(records(1)), sink.check()):
        with pytest.raises(Fatal, match="rowid"):
            await verb
