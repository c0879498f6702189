"""Logins against a real PostgreSQL, also through a faulty network."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from auth.postgresql import BACKEND
from broker.config.settings import load_settings
from broker.connectors.sql_text import Statement
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from broker.extend.registry import Backend
from tests.fragments import shipped
from tests.integration.auth_harness import opened
from tests.integration.sql_suite import RIGHTS, USERS, SqlSuite, may, sha256
from tests.proxy import Proxy
from tests.servers import PATIENCE, Absent, Process, accepts, free_port, program
from tests.sql_servers import Postgresql, _own_folder, or_skip, postgresql


@pytest.fixture(scope="module")
def server() -> Iterator[Postgresql]:
    with or_skip("postgresql", postgresql) as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[Postgresql]:
    with or_skip("postgresql", postgresql) as server:
        server.pid  # noqa: B018 (a server given by address cannot be stopped)
        yield server


@pytest.fixture(scope="module")
def tls_server(certs: Any) -> Iterator[Postgresql]:
    with or_skip("postgresql", postgresql, tls=certs) as server:
        yield server


EMQ = (  # as emq-auth-pgsql's documentation has them
    "create table mqtt_user (id serial primary key, is_superuser boolean, username character varying(100) unique, "
    "password character varying(100), salt character varying(40))",
    "create table mqtt_acl (id serial primary key, allow integer, ipaddr character varying(60), "
    "username character varying(100), clientid character varying(100), access integer, topic character varying(100))",
)


class TestPostgresql(SqlSuite):
    backend: ClassVar[Backend] = BACKEND
    emq: ClassVar[tuple[str, ...]] = EMQ
    emqx: ClassVar[tuple[str, ...]] = (
        "create table mqtt_user (id serial primary key, username text not null unique, password_hash text not null, "
        "salt text not null, is_superuser boolean default false, created timestamp with time zone default now())",
        "create type ACTION as enum ('publish', 'subscribe', 'all')",
        "create type PERMISSION as enum ('allow', 'deny')",
        "create table mqtt_acl (id serial primary key, ipaddress character varying(60), permission PERMISSION, "
        "action ACTION, username character varying(100), clientid character varying(100), topic text, qos text, "
        "retain smallint)",
    )
    yes: ClassVar[str] = "true"
    no: ClassVar[str] = "false"
    retype: ClassVar[str] = "alter table mqtt_user alter column is_superuser type text using is_superuser::int::text"

    def _cipher(self, backend: Any) -> Statement:
        return Statement("select cipher from pg_stat_ssl where pid = pg_backend_pid() and ssl", "postgresql", ())

    async def test_types_of_postgresql(self, open: Any, server: Postgresql) -> None:
        database = await server.create(
            "create extension citext",
            "create domain flag as boolean",
            "create table mqtt_user (id uuid, number bigint, username citext, name char(20), password bytea, "
            "salt varchar(40), is_superuser flag, address inet)",
            f"insert into mqtt_user values ('00000000-0000-0000-0000-00000000000a', 42, 'Alice', 'padded', "
            f"'{sha256('s1pw')}', 's1', true, '10.0.0.1')",
            "create table mqtt_acl (id serial, allow boolean, ipaddr inet, username citext, clientid text, "
            "access numeric, topic char(30))",
            "insert into mqtt_acl (allow, username, access, topic) values (false, 'Alice', 3.0, 'a/b'), "
            "(true, 'Alice', 3, 'a/#')",
        )
        columns = "select {} as username, password, salt from mqtt_user where"
        own = "select allow, access, topic from mqtt_acl where username = ${username} order by id"
        cases = [
            ("username", "username = ${username}", "Alice", "alice"),  # citext finds both, A-19
            ("name", "name = ${username}", "padded", "padded2"),  # char(20) is filled up with blanks
            ("number", "number = ${username}", "42", "42a"),
            ("number", "number = ${username}", "42", "042"),
            ("id", "id = ${username}", "00000000-0000-0000-0000-00000000000a", "no-uuid"),
            ("host(address)", "address = ${username}", "10.0.0.1", "10.0.0.1.2"),
            ("username", "lower(username::text) = lower(${username})", "Alice", "ALICE"),
            ("username", "username = ${username}::text", "Alice", "alice "),
        ]
        for name, where, good, bad in cases:
            backend = await open(database, authenticate=f"{columns.format(name)} {where}", authorize=own)
            assert isinstance(await backend.authenticate(Client("c", good), b"pw"), Grant), where
            answer = await backend.authenticate(Client("c", bad), b"pw")
            assert answer is Verdict.IGNORE or isinstance(answer, Refusal), where
            assert await backend.authenticate(Client("c", good), b"no") is Verdict.DENY
            await backend.check()
        whole = "select allow, ipaddr, username, clientid, access, topic from mqtt_acl where username = ${username}"
        backend = await open(
            database,
            authenticate="select * from mqtt_user where username = ${username}",
            authorize=f"{whole} order by id",
        )
        grant = await backend.authenticate(Client("c", "Alice"), b"pw")
        assert grant.superuser
        ask = "select username, password, salt from mqtt_user where username = ${username}"
        backend = await open(database, authenticate=ask, authorize=f"{whole} order by id")
        grant = await backend.authenticate(Client("c", "Alice"), b"pw")
        assert may(grant, "publish", "a/c", Client("c", "Alice"))
        assert not may(grant, "publish", "a/b", Client("c", "Alice"))
        backend = await open(database, authenticate=ask, superuser="select true where concat(${username}) = 'Alice'")
        with pytest.raises(BackendUnavailable, match="::text"):
            await backend.authenticate(Client("c", "Alice"), b"pw")

    async def test_a_value_the_encoding_cannot_hold_is_no_failure(self, open: Any, server: Postgresql) -> None:
        """A user name must not open the breaker for everybody."""
        name = "isthmus_latin1"
        await server.execute(
            f"drop database if exists {name}",
            f"create database {name} encoding 'LATIN1' locale 'C' template template0",
        )
        await server.execute(*EMQ, USERS.format(yes="true", no="false"), database=name)
        backend = await open(name)
        for _ in range(6):
            answer = await backend.authenticate(Client("c", "😀"), b"pw")
            assert isinstance(answer, Refusal)
            assert answer.authorized
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)

    async def test_a_statement_that_takes_too_long_is_given_up_there_too(
        self, open: Any, server: Postgresql, database: str
    ) -> None:
        slow = "select username, password, pg_sleep(30)::text as x from mqtt_user where username = ${username}"
        backend = await open(database, authenticate=slow, timeout=0.4)
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await backend.authenticate(Client("c", "alice"), b"alice-pw")
        assert time.monotonic() - began < 0.4 + 4 * PATIENCE
        count = f"select count(*) from pg_stat_activity where datname = '{database}' and state = 'active'"
        end = time.monotonic() + 5
        while (await server.execute(count))[0][0]:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)

    async def test_notify_tells_whose_rights_changed(
        self, open: Any, server: Postgresql, proxy: Proxy, database: str
    ) -> None:
        await server.execute(
            "create function tell() returns trigger language plpgsql as $$ begin "
            "perform pg_notify('mqtt_changes', coalesce(new.username, old.username)); return null; end $$",
            "create trigger tell after insert or update or delete on mqtt_acl for each row execute function tell()",
            database=database,
        )
        backend = await open(database, proxy.port, changes="mqtt_changes")
        heard: asyncio.Queue[str | None] = asyncio.Queue()
        backend.on_change = heard.put_nowait
        assert await asyncio.wait_for(heard.get(), 5) is None, "listening: what came before was not heard"
        took = []
        for _ in range(3):
            began = time.monotonic()
            await server.execute(
                "insert into mqtt_acl (allow, username, access, topic) values (1, 'alice', 3, 'new')", database=database
            )
            assert await asyncio.wait_for(heard.get(), 5) == "alice"
            took.append(time.monotonic() - began)
        assert min(took) < 1
        await server.execute("notify mqtt_changes, '*'", "notify mqtt_changes", database=database)
        assert [await asyncio.wait_for(heard.get(), 5) for _ in range(2)] == [None, None]
        assert await proxy.cut() >= 1
        assert await asyncio.wait_for(heard.get(), 10) is None, "something may have been missed"
        await server.execute("notify mqtt_changes, 'bob'", database=database)
        assert await asyncio.wait_for(heard.get(), 5) == "bob"

    async def test_a_lost_listener_is_noticed(
        self, open: Any, server: Postgresql, proxy: Proxy, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("broker.connectors.postgresql.QUIET", 0.2)
        backend = await open(database, proxy.port, changes="mqtt_changes", timeout=0.5)
        heard: asyncio.Queue[str | None] = asyncio.Queue()
        backend.on_change = heard.put_nowait
        assert await asyncio.wait_for(heard.get(), 5) is None
        accepted = proxy.counts.accepted
        proxy.black_hole = True
        async with asyncio.timeout(10 * PATIENCE):
            while proxy.counts.accepted == accepted:  # noqa: ASYNC110 (the proxy does not tell)
                await asyncio.sleep(0.01)
        while not heard.empty():
            heard.get_nowait()
        proxy.black_hole = False
        assert await asyncio.wait_for(heard.get(), 10) is None

    async def test_one_prepared_statement_with_bound_values(self, open: Any, server: Postgresql, database: str) -> None:
        """A-16 as the server sees it."""
        backend = await open(database, pool=1)
        for name in ("alice", "' OR '1'='1' -- ", "eve"):
            await backend.authenticate(Client("c", name), b"alice-pw")
        statement = Statement(
            "select count(*) from pg_prepared_statements where statement like '%mqtt_user%'", "postgresql", ()
        )
        ((count,),) = (await backend._database.fetch(statement, [])).rows
        assert count == 2, "that of the user, and this one"


def test_the_shared_example_loads(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    text = shipped("21-auth-postgresql.toml")
    (tmp_path / "conf.d" / "21-auth-postgresql.toml").write_text(text)
    settings = load_settings(tmp_path / "conf.d", environ={})
    (instance,) = settings.auth.values()
    assert instance.kind == "postgresql"
    assert [str(address) for address in instance.config.servers] == ["127.0.0.1:5432"]


async def test_the_example_works_as_it_stands(server: Postgresql, tmp_path: Path) -> None:
    """With EMQ's tables, but for the port and the password in the environment."""
    await server.execute("drop database if exists mqtt", "drop role if exists mqtt")
    await server.execute("create role mqtt login password 'mqtt-pw'", "create database mqtt owner mqtt")
    await server.execute(*EMQ, "grant select on mqtt_user, mqtt_acl to mqtt", RIGHTS, database="mqtt")
    await server.execute(
        f"insert into mqtt_user (username, password, salt, is_superuser) values "
        f"('alice', '{sha256('alice-pw' + 's1')}', 's1', false)",
        database="mqtt",
    )
    folder = tmp_path / "conf.d"
    folder.mkdir()
    text = shipped("21-auth-postgresql.toml", ("127.0.0.1:5432", f"127.0.0.1:{server.port}"))
    (folder / "21-auth-postgresql.toml").write_text(text)
    (instance,) = load_settings(folder, environ={"MQTT_PG_PASSWORD": "mqtt-pw"}).auth.values()
    backend = await BACKEND.open(instance.config)
    try:
        await backend.check()
        grant = await backend.authenticate(Client("c-1", "alice"), b"alice-pw")
        assert may(grant, "publish", "telemetry/alice/x")
        assert await backend.authenticate(Client("c-1", "alice"), b"no") is Verdict.DENY
    finally:
        await backend.close()
        await server.execute("drop database mqtt with (force)", "drop role mqtt")


# --- behind PgBouncer ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pgbouncer(server: Postgresql, **settings: str) -> Iterator[int]:
    """The port of a pooler that gives each transaction one of three connections to the server."""
    binary = program("pgbouncer")
    if binary is None:
        raise Absent("pgbouncer is not installed (apt-get install pgbouncer)")
    with _own_folder("pgbouncer") as (where, wrapper):
        port = free_port()
        (where / "users").write_text(f'"{server.user}" "{server.password}"\n')
        options = {
            "listen_addr": "127.0.0.1", "listen_port": str(port), "unix_socket_dir": "", "auth_type": "plain",
            "auth_file": str(where / "users"), "pool_mode": "transaction", "default_pool_size": "3",
            "pidfile": str(where / "pid"), **settings,
        }  # fmt: skip
        lines = ["[databases]", f"* = host=127.0.0.1 port={server.port}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in options.items()]
        (where / "ini").write_text("\n".join(lines) + "\n")
        for name in ("users", "ini"):
            (where / name).chmod(0o644)
        process = Process([*wrapper, binary, str(where / "ini")], where / "log")
        try:
            process.wait_until(lambda: accepts(port), 10, "pgbouncer")
            yield port
        finally:
            process.stop()


@pytest.mark.parametrize("ignored", ["", "statement_timeout,default_transaction_read_only"])
async def test_a_pooler_of_transactions_mixes_nothing_up(server: Postgresql, ignored: str) -> None:
    """Whether it refuses our settings or swallows them; with two backends whose statements differ behind it."""
    database = await server.create(*EMQ, USERS.format(yes="true", no="false"), RIGHTS)
    more = {"ignore_startup_parameters": ignored} if ignored else {}
    with or_skip("pgbouncer", functools.partial(pgbouncer, server), **more) as port:
        table = {"dsn": server.dsn(database, port), "password": server.password, "timeout": 5}
        only_bob = "select username, password, salt from mqtt_user where username = ${username} and username = 'bob'"
        async with opened(BACKEND, table) as backend, opened(BACKEND, {**table, "authenticate": only_bob}) as other:
            await backend.check()

            async def login(number: int) -> None:
                asked, name = (backend, other)[number % 2], ("alice", "bob", "nobody")[number % 3]
                password = f"{name}-pw".encode() if number % 5 else b"wrong"
                answer = await asked.authenticate(Client("c-1", name, "10.9.9.9"), password)
                if name == "nobody" or (asked is other and name == "alice"):
                    assert answer is Verdict.IGNORE
                elif password == b"wrong":
                    assert answer is Verdict.DENY
                else:
                    assert isinstance(answer, Grant)
                    assert answer.superuser == (asked is backend and name == "bob")
                    assert answer.superuser or may(answer, "publish", f"telemetry/{name}/x") == (name == "alice")

            for start in range(0, 300, 30):
                await asyncio.gather(*(login(number) for number in range(start, start + 30)))
            pool = backend._database
            assert pool.pooled
            settings = "select current_setting('transaction_read_only'), current_setting('statement_timeout')"
            (row,) = (await pool.fetch(Statement(settings, "postgresql", ()), [])).rows
            assert tuple(row) == ("on", "5s")
            with pytest.raises(BackendUnavailable, match="read-only"):
                await pool.fetch(Statement("select nextval('mqtt_user_id_seq')", "postgresql", ()), [])
            (row,) = (await pool.fetch(Statement(settings, "postgresql", ()), [])).rows
            assert tuple(row) == ("on", "5s"), "what went wrong is over"


async def test_notifications_do_not_come_through_a_pooler_and_that_is_said(
    server: Postgresql, caplog: pytest.LogCaptureFixture
) -> None:
    database = await server.create(*EMQ)
    with or_skip("pgbouncer", functools.partial(pgbouncer, server)) as port:
        table = {"dsn": server.dsn(database, port), "password": server.password, "changes": "mqtt_changes"}
        async with opened(BACKEND, table), asyncio.timeout(5 * PATIENCE):
            while "a pooler passes no notifications on" not in caplog.text:  # noqa: ASYNC110 (nothing tells of a log)
                await asyncio.sleep(0.02)
