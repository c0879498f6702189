"""Logins against an SQLite file that others write, replace, lock and damage."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from auth.sqlite import BACKEND
from broker.access.passwords import hash_password
from broker.config.settings import load_settings
from broker.connectors.sql_text import Statement
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from tests.fragments import shipped
from tests.integration.sql_suite import NOBODY, RIGHTS, USERS, may, packets, sha256
from tests.servers import PATIENCE

Open = Callable[..., Any]


def run(path: Path, *texts: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
        rows: list[Any] = []
        for text in texts:
            rows = connection.execute(text).fetchall()
        connection.commit()
        return rows


@pytest.fixture
async def open(tmp_path: Path) -> AsyncIterator[Open]:
    async with contextlib.AsyncExitStack() as stack:

        async def opened(**more: Any) -> Any:
            options = {"path": str(tmp_path / "users.db"), "create": True, "timeout": 5, "watch": 0, **more}
            backend = await BACKEND.open(BACKEND.config.model_validate(options).named("file"))
            stack.push_async_callback(backend.close)
            return backend

        yield opened


@pytest.fixture
async def path(open: Open, tmp_path: Path) -> Path:
    await open()
    run(tmp_path / "users.db", USERS.format(yes=1, no=0), RIGHTS)
    return tmp_path / "users.db"


async def test_emqs_tables(open: Open, path: Path) -> None:
    backend = await open()
    await backend.check()
    grant = await backend.authenticate(Client("c-1", "alice", "10.9.9.9"), b"alice-pw")
    for action, topic, expected in (
        ("publish", "telemetry/alice/x", True), ("publish", "telemetry/bob/x", False), ("subscribe", "#", False),
        ("subscribe", "commands/c-1/#", True), ("publish", "own/c-1", True), ("publish", "lan/a", True),
    ):  # fmt: skip
        assert may(grant, action, topic) is expected, topic
    assert (await backend.authenticate(Client("c", "bob"), b"bob-pw")).superuser
    for name in ("carol", "dave"):
        assert isinstance(await backend.authenticate(Client("c", name), f"{name}-pw".encode()), Grant)
        assert await backend.authenticate(Client("c", name), b"no") is Verdict.DENY
    assert await backend.authenticate(Client("c", "eve"), b"x") is Verdict.IGNORE
    assert os.stat(path).st_mode & 0o777 == 0o600


async def test_emqx_5_tables(open: Open, tmp_path: Path) -> None:
    backend = await open(tables="emqx")
    run(
        tmp_path / "users.db",
        f"insert into mqtt_user (username, password_hash, salt) values ('alice', '{sha256('s1pw')}', 's1')",
        "insert into mqtt_acl (permission, action, topic, username, qos) values "
        "('allow', 'publish', 'a/+', 'alice', null), ('allow', 'publish', 'q', 'alice', '0')",
    )
    await backend.check()
    grant = await backend.authenticate(Client("c", "alice"), b"pw")
    assert may(grant, "publish", "a/b")
    assert packets(grant, "publish", "q") == 0b000011, "QoS 0, retained or not"


async def test_groups_of_a_user_and_rules_of_groups(open: Open, tmp_path: Path) -> None:
    backend = await open(
        tables="emqx",
        authenticate="select username, password_hash, salt, groups from mqtt_user where username = ${username}",
        authorize='select permission, action, topic, "group" from mqtt_acl order by id',
    )
    run(
        tmp_path / "users.db",
        "alter table mqtt_user add column groups text",
        'alter table mqtt_acl add column "group" text',
        f"insert into mqtt_user (username, password_hash, salt, groups) values "
        f"('alice', '{sha256('s1pw')}', 's1', 'operators,guests'), ('bob', '{sha256('s1pw')}', 's1', null)",
        'insert into mqtt_acl (permission, action, topic, "group") values '
        "('deny', 'publish', 'a/secret', 'guests'), ('allow', 'publish', 'a/+', 'operators')",
    )
    rights = {name: await backend.rules(Client("c", name)) for name in ("alice", "bob")}
    for name, can in (("alice", (True, False)), ("bob", (False, False))):
        assert tuple(may(rights[name], "publish", topic, Client("c", name)) for topic in ("a/x", "a/secret")) == can


async def test_a16_a_name_is_a_value_whatever_is_in_it(open: Open, path: Path) -> None:
    backend = await open()
    for name in NOBODY:
        assert await backend.authenticate(Client(name, name, name[:20]), b"alice-pw") is Verdict.IGNORE, name
        assert isinstance(await backend.authenticate(Client(name, "alice", name[:20]), b"alice-pw"), Grant), name
    for name in ("a\0b", "\ud800", "a" * 1025):
        assert isinstance(await backend.authenticate(Client("c", name), b"alice-pw"), Refusal)
    assert run(path, "select count(*) from mqtt_user") == [(4,)]


async def test_a19_a_column_that_takes_names_for_one(open: Open, tmp_path: Path) -> None:
    run(
        tmp_path / "users.db",
        "create table u (username text collate nocase, password text)",
        f"insert into u values ('alice', '{sha256('pw')}')",
    )
    query = "select username, password from u where username = ${username} limit 2"
    backend = await open(create=False, authenticate=query, authorize="")
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"pw"), Grant)
    assert isinstance(await backend.authenticate(Client("c", "ALICE"), b"pw"), Refusal)
    backend = await open(create=False, authenticate=query, authorize="", exact_name=False)
    assert isinstance(await backend.authenticate(Client("c", "ALICE"), b"pw"), Grant)


@pytest.mark.parametrize(
    ("statement", "say"),
    [
        ("select password from mqtt_user where username = 'x${username}'", "outside the quotes"),
        ("select password from mqtt_user where username like '%u-%'", "outside the quotes"),
        ('select password from mqtt_user where "${username}" = 1', "outside the quotes"),
        ("select password from ${username}", "write the name"),
        ("select password from mqtt_${clientid} where username = '%u'", "join texts"),
        ("select password from mqtt_user where username = '%u' and password = '%P'", "never sent"),
        ("select password from mqtt_user where username = ${nope}", "not known"),
        ("select password from mqtt_user where username = '%u'; drop table mqtt_user", "more than one"),
    ],
)
def test_a17_what_would_be_pasted_is_refused_when_the_table_is_read(statement: str, say: str) -> None:
    """A-17: a placeholder is one bound value; the error names the key and the fix."""
    for key in ("authenticate", "superuser", "authorize"):
        with pytest.raises(ValueError, match=key) as caught:
            BACKEND.config.model_validate({"path": "x.db", key: statement})
        assert say in str(caught.value)


async def test_types_of_sqlite(open: Open, tmp_path: Path) -> None:
    """Columns hold what was put into them, whatever they were declared as."""
    run(
        tmp_path / "users.db",
        "create table mqtt_user (username, password, salt, is_superuser)",
        f"insert into mqtt_user values ('text', '{sha256('s1pw')}', 's1', '1'), "
        f"('blob', cast('{sha256('s1pw')}' as blob), x'7331', 1.0), ('real', '{sha256('pw')}', null, 0.5), "
        f"(7, '{sha256('pw')}', '', 2), ('number', 12345, '', 0)",
    )
    backend = await open(create=False, authorize="")
    found = {}
    for name in ("text", "blob", "real", "7", "number"):
        answer = await backend.authenticate(Client("c", name), b"pw")
        found[name] = answer.superuser if isinstance(answer, Grant) else answer
    assert found == {"text": True, "blob": False, "real": False, "7": Verdict.IGNORE, "number": Verdict.DENY}


async def test_what_is_wrong_with_the_file_is_said_and_passes(open: Open, tmp_path: Path) -> None:
    backend = await open(create=False)
    with pytest.raises(BackendUnavailable, match="unable to open"):
        await backend.check()
    assert not (tmp_path / "users.db").exists(), "looking does not make it"
    (tmp_path / "users.db").write_bytes(b"no database" * 100)
    with pytest.raises(BackendUnavailable, match="not a database"):
        await backend.authenticate(Client("c", "alice"), b"alice-pw")
    (tmp_path / "users.db").unlink()
    await open()
    run(tmp_path / "users.db", USERS.format(yes=1, no=0))
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
    backend = await open(authenticate="select nope from mqtt_user where username = ${username}")
    with pytest.raises(BackendUnavailable, match="nope"):
        await backend.check()


async def test_a_file_that_is_replaced_is_noticed(open: Open, path: Path) -> None:
    backend = await open()
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
    other = path.with_name("new.db")
    await open(path=str(other))
    run(
        other,
        f"insert into mqtt_user (username, password) values ('alice', '{sha256('new')}')",
        "pragma journal_mode = delete",
    )
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    other.rename(path)
    assert await backend.authenticate(Client("c", "alice"), b"alice-pw") is Verdict.DENY
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"new"), Grant)


async def test_a_lock_costs_the_timeout_and_not_more(open: Open, path: Path) -> None:
    run(path, "pragma journal_mode = delete")
    backend = await open(create=False, timeout=0.4)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await backend.authenticate(Client("c", "alice"), b"alice-pw")
        assert time.monotonic() - began < 0.4 + 3 * PATIENCE
        writer.execute("rollback")
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)


async def test_a_statement_that_takes_too_long_is_interrupted(open: Open, path: Path) -> None:
    endless = (
        "with recursive n(i) as (select 1 union all select i + 1 from n) "
        "select username, password from mqtt_user where username = ${username} and (select count(*) from n) > 0"
    )
    backend = await open(authenticate=endless, timeout=0.3, pool=1)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match="no answer in"):
        await backend.authenticate(Client("c", "alice"), b"alice-pw")
    left = asyncio.create_task(backend.authenticate(Client("c", "alice"), b"alice-pw"))
    await asyncio.sleep(0.05)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    answer = Statement("select 1", "sqlite", ())
    assert (await backend._database.fetch(answer, [])).rows == [(1,)], "the thread is free"
    assert time.monotonic() - began < 0.3 + 4 * PATIENCE


async def test_changes_are_noticed_at_once(open: Open, path: Path) -> None:
    backend = await open(watch=0.05)
    heard: asyncio.Queue[str | None] = asyncio.Queue()
    backend.on_change = heard.put_nowait
    await asyncio.sleep(0.2)
    await backend.authenticate(Client("c", "alice"), b"alice-pw")
    assert heard.empty(), "nobody changed anything"
    run(path, "delete from mqtt_acl where username = 'alice'")
    assert await asyncio.wait_for(heard.get(), 3 * PATIENCE) is None
    assert (await backend.rules(Client("c", "alice"))).rules != ()
    other = path.with_name("new.db")
    await open(path=str(other))
    other.rename(path)
    assert await asyncio.wait_for(heard.get(), 5) is None


async def test_a_password_is_stored_anew_at_login(open: Open, path: Path) -> None:
    backend = await open(upgrade_to="argon2id")
    await backend.check()
    assert await backend.authenticate(Client("c", "alice"), b"no") is Verdict.DENY
    for _ in range(2):
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
    ((stored, salt),) = run(path, "select password, salt from mqtt_user where username = 'alice'")
    assert stored.startswith("$argon2id$")
    assert salt is None
    assert await backend.authenticate(Client("c", "alice"), b"no") is Verdict.DENY


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_a42_cancelled_and_interleaved_logins(open: Open, tmp_path: Path, count: int) -> None:
    backend = await open(pool=4, timeout=10)
    rows = ", ".join(f"('u{i}', '{sha256(f'pw{i}')}')" for i in range(50))
    rights = ", ".join(f"(1, 'u{i}', 3, 'only/u{i}')" for i in range(50))
    run(
        tmp_path / "users.db",
        f"insert into mqtt_user (username, password) values {rows}",
        f"insert into mqtt_acl (allow, username, access, topic) values {rights}",
    )
    wrong: list[Any] = []
    tally = {"done": 0, "cancelled": 0}

    async def login(i: int, good: bool) -> None:
        answer = await backend.authenticate(Client("c", f"u{i}"), f"pw{i if good else i + 1}".encode())
        tally["done"] += 1
        right = may(answer, "publish", f"only/u{i}", Client("c", f"u{i}")) if good else answer is Verdict.DENY
        if not right:
            wrong.append((i, answer))

    running: set[asyncio.Task[None]] = set()
    for number in range(count):
        task = asyncio.create_task(login(number * 7 % 50, number % 3 != 0))
        running.add(task)
        task.add_done_callback(running.discard)
        if number % 4 == 0:
            asyncio.get_running_loop().call_later(number % 5 / 2000, task.cancel)
            tally["cancelled"] += 1
        if len(running) > 24:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*running, return_exceptions=True)
    assert wrong == []
    assert tally["done"] > count / 2


async def test_closing_ends_what_is_under_way(open: Open, path: Path) -> None:
    backend = await open(watch=0.05)
    await backend.authenticate(Client("c", "alice"), b"alice-pw")
    await backend.close()
    with pytest.raises(BackendUnavailable, match="closed"):
        await backend.authenticate(Client("c", "alice"), b"alice-pw")


async def test_the_example_works_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "23-auth-sqlite.toml").write_text(shipped("23-auth-sqlite.toml"))
    (instance,) = load_settings(tmp_path / "conf.d", environ={}).auth.values()
    backend = await BACKEND.open(instance.config)
    try:
        await backend.check()
        values = f"('alice', '{hash_password('pw')}')"
        run(tmp_path / "data" / "accounts.db", f"insert into mqtt_user (username, password) values {values}")
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"pw"), Grant)
        assert await backend.authenticate(Client("c", "alice"), b"no") is Verdict.DENY
    finally:
        await backend.close()
