"""`isthmus deadletter`: what a destination refuses can be looked at, replayed after the fix, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.admin.control import CommandFailed
from broker.client.session import Publisher
from broker.mqtt.properties import user_property
from tests.integration.auth_harness import isthmus as command_line
from tests.integration.test_worker import CONF, Isthmus, isthmus

COLUMNS = "msgid text primary key, time, clientid, username, topic, payload"


def define(folder: Path, check: str) -> None:
    """The sink's table, anew, with this rule."""
    with contextlib.closing(sqlite3.connect(folder / "telemetry.db")) as db:
        db.execute("create table if not exists messages (msgid, time, clientid, username, topic, payload)")
        db.execute("alter table messages rename to old")
        db.execute(f"create table messages ({COLUMNS} {check})")
        db.execute("insert into messages select * from old")
        db.execute("drop table old")
        db.commit()


@pytest.fixture
async def broker(tmp_path: Path, root: Path) -> AsyncIterator[Isthmus]:
    define(tmp_path, "check (payload not like 'bad%')")
    async with isthmus(tmp_path, root) as running:
        yield running


async def publish(broker: Isthmus, *payloads: bytes, properties: bytes = b"") -> None:
    publisher = await Publisher.connect(broker.url, client_id="dev-1")
    await asyncio.gather(*(publisher.publish("telemetry/a", p, 1, False, properties) for p in payloads))
    await publisher.disconnect()


async def letters(broker: Isthmus, count: int, **arguments: Any) -> list[dict[str, Any]]:
    """The dead letters, once there are so many."""
    async with asyncio.timeout(20):
        while True:
            queues = {queue["name"]: queue["queued"] for queue in await broker.command("queues.list")}
            if queues.get("store/dlq", 0) == count:
                break
            await asyncio.sleep(0.05)
    rows: list[dict[str, Any]] = await broker.command("deadletter.list", name="store", **arguments)
    return rows


async def test_a_letter_says_what_happened_and_looking_changes_nothing(broker: Isthmus) -> None:
    await publish(broker, b"good", b"bad-1", b"bad-2", properties=user_property("unit", "C"))
    for _ in range(2):
        first, second = await letters(broker, 2)
        assert {first["topic"], first["clientid"], first["bytes"]} == {"telemetry/a", "dev-1", 5}
        assert "CHECK" in first["error"]
        assert len(first["id"]) == 32
        assert first["id"] < second["id"]
    shown = await broker.command("deadletter.show", name="store", id=second["id"])
    assert (shown["payload"], shown["user_properties"]) == ("bad-2", [["unit", "C"]])
    await publish(broker, b"bad-3")
    assert len(await letters(broker, 3)) == 3, "a letter is kept after somebody looked, too"
    assert len(await letters(broker, 3, limit=2)) == 2
    for command, arguments in (("show", {"id": "0"}), ("list", {}), ("replay", {}), ("purge", {})):
        name = "store" if command == "show" else "nothing"
        with pytest.raises(CommandFailed):
            await broker.command(f"deadletter.{command}", name=name, **arguments)


async def test_s09_a_replay_that_fails_again_is_bounded_and_one_after_the_fix_stores_each_once(broker: Isthmus) -> None:
    bad = [b"bad-%04d" % n for n in range(1_200)]  # more than one window
    await publish(broker, *bad, b"good")
    before = {row["id"] for row in await letters(broker, 1_200, limit=5_000)}
    assert len(before) == 1_200
    answer = await broker.command("deadletter.replay", name="store")
    assert (answer["replayed"], answer["problem"]) == (1_200, "")
    assert {row["id"] for row in await letters(broker, 1_200, limit=5_000)} == before, "ids stay what they were"
    define(broker.folder, "")
    answer = await broker.command("deadletter.replay", name="store")
    assert answer == {"replayed": 1_200, "left": 0, "problem": ""}
    rows = await broker.until_rows(1_201)
    assert sorted(rows) == sorted([*(p.decode() for p in bad), "good"])
    with contextlib.closing(sqlite3.connect(broker.folder / "telemetry.db")) as db:
        stored = db.execute("select msgid from messages where clientid = 'dev-1' and payload like 'bad%'")
        assert {row[0] for row in stored.fetchall()} == before


async def test_letters_can_be_chosen_by_id(broker: Isthmus) -> None:
    await publish(broker, b"bad-1", b"bad-2", b"bad-3")
    ids = [row["id"] for row in await letters(broker, 3)]
    assert await broker.command("deadletter.purge", name="store", ids=[ids[1]]) == {"purged": 1, "left": 2}
    assert [row["id"] for row in await letters(broker, 2)] == [ids[0], ids[2]]
    define(broker.folder, "")
    answer = await broker.command("deadletter.replay", name="store", ids=[ids[2]])
    assert answer == {"replayed": 1, "left": 1, "problem": ""}
    assert await broker.until_rows(1) == ["bad-3"]
    assert await broker.command("queues.drop", name="store/dlq") == {"dropped": 1}
    assert await letters(broker, 0) == []


async def test_letters_outlive_a_restart_and_the_command_line_shows_them(tmp_path: Path, root: Path) -> None:
    define(tmp_path, "check (payload not like 'bad%' and typeof(payload) = 'text')")
    async with isthmus(tmp_path, root) as broker:
        await publish(broker, b"bad-1", b"bad-\xff")
        assert len(await letters(broker, 2)) == 2
    (tmp_path / "conf.d" / "00-test.toml").unlink()
    (tmp_path / "conf.d").rmdir()
    async with isthmus(tmp_path, root, CONF) as broker:
        done = await asyncio.to_thread(command_line, tmp_path, "deadletter", "list", "store", "--json")
        rows = json.loads(done.stdout)
        assert len(rows) == 2, done.stderr
        shown = await asyncio.to_thread(command_line, tmp_path, "deadletter", "show", "store", rows[1]["id"], "--json")
        assert json.loads(shown.stdout)["payload_base64"] == "YmFkLf8="
        table = await asyncio.to_thread(command_line, tmp_path, "deadletter", "list", "store")
        assert rows[0]["id"] in table.stdout
        define(tmp_path, "")
        replayed = await asyncio.to_thread(command_line, tmp_path, "deadletter", "replay", "store", rows[0]["id"])
        assert (replayed.returncode, replayed.stdout) == (0, "1 replayed, 1 left\n"), replayed.stderr
        purged = await asyncio.to_thread(command_line, tmp_path, "deadletter", "purge", "store")
        assert (purged.returncode, purged.stdout) == (0, "1 deleted, 0 left\n")
        assert await broker.until_rows(1) == ["bad-1"]
        wrong = await asyncio.to_thread(command_line, tmp_path, "deadletter", "list", "nothing")
        assert (wrong.returncode, "no sink is called 'nothing'" in wrong.stderr) == (1, True)
