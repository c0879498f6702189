"""Logins against a real MariaDB, also through a faulty network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from auth.mysql import BACKEND
from broker.connectors.sql_text import Statement
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from broker.extend.registry import Backend
from tests.integration.sql_suite import SqlSuite, may, sha256
from tests.sql_servers import Mariadb, mariadb, or_skip


@pytest.fixture(scope="module")
def server() -> Iterator[Mariadb]:
    with or_skip("mariadb", mariadb) as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[Mariadb]:
    with or_skip("mariadb", mariadb) as server:
        server.pid  # noqa: B018 (a server given by address cannot be stopped)
        yield server


@pytest.fixture(scope="module")
def tls_server(certs: Any) -> Iterator[Mariadb]:
    with or_skip("mariadb", mariadb, tls=certs) as server:
        yield server


EMQ = (  # as emq-auth-mysql's documentation has them
    "create table mqtt_user (id int(11) unsigned not null auto_increment, username varchar(100) default null, "
    "password varchar(100) default null, salt varchar(35) default null, is_superuser tinyint(1) default 0, "
    "created datetime default null, primary key (id), unique key mqtt_username (username)) "
    "engine=InnoDB default charset=utf8",
    "create table mqtt_acl (id int(11) unsigned not null auto_increment, allow int(1) default 1, "
    "ipaddr varchar(60) default null, username varchar(100) default null, clientid varchar(100) default null, "
    "access int(2) not null default 3, topic varchar(100) not null default '', primary key (id)) "
    "engine=InnoDB default charset=utf8",
)


class TestMysql(SqlSuite):
    backend: ClassVar[Backend] = BACKEND
    emq: ClassVar[tuple[str, ...]] = EMQ
    emqx: ClassVar[tuple[str, ...]] = (
        "create table mqtt_user (id int(11) unsigned not null auto_increment, username varchar(100) default null, "
        "password_hash varchar(100) default null, salt varchar(35) default null, is_superuser tinyint(1) default 0, "
        "created datetime default null, primary key (id), unique key mqtt_username (username)) default charset=utf8mb4",
        "create table mqtt_acl (id int(11) unsigned not null auto_increment, ipaddress varchar(60) not null default '',"
        " username varchar(255) not null default '', clientid varchar(255) not null default '', "
        "action enum('publish', 'subscribe', 'all') not null, permission enum('allow', 'deny') not null, "
        "topic varchar(255) not null default '', qos varchar(10), retain tinyint(1), primary key (id)) "
        "default charset=utf8mb4",
    )
    yes: ClassVar[str] = "1"
    no: ClassVar[str] = "0"
    narrow: ClassVar[bool] = True
    retype: ClassVar[str] = "alter table mqtt_user modify is_superuser varchar(10)"

    def _cipher(self, backend: Any) -> Statement:
        return Statement(
            "select variable_value from information_schema.session_status where variable_name = 'ssl_cipher' "
            "and variable_value <> ''", "mysql", (),
        )  # fmt: skip

    @pytest.mark.parametrize("charset", ["latin1", "utf8mb3", "utf8mb4", "utf8mb4 collate utf8mb4_bin"])
    async def test_a19_names_the_database_takes_for_one(self, open: Any, server: Mariadb, charset: str) -> None:
        """A-19: the name in the row is compared byte for byte."""
        database = await server.create(
            f"create table mqtt_user (username varchar(100), password varchar(100), salt varchar(35), "
            f"is_superuser tinyint(1)) default charset={charset}",
            f"insert into mqtt_user values ('alice', '{sha256('pw')}', null, 0)",
            "create table mqtt_acl (id int, allow int, ipaddr varchar(60), username varchar(100), "
            f"clientid varchar(100), access int, topic varchar(100)) default charset={charset}",
            "insert into mqtt_acl values (1, 1, null, 'Alice', null, 3, 'a'), (2, 1, null, 'alice', null, 3, 'b')",
        )
        backend = await open(database)
        for name in ("Alice", "alice ", "álice", "ALICE", "ａlice", "alice\u0000", "alic€", "😀"):
            answer = await backend.authenticate(Client("c", name), b"pw")
            assert answer is Verdict.IGNORE or isinstance(answer, Refusal), name
        grant = await backend.authenticate(Client("c", "alice"), b"pw")
        assert may(grant, "publish", "b", Client("c", "alice"))
        assert not may(grant, "publish", "a", Client("c", "alice")), "that is Alice's"
        query = "select password from mqtt_user where username = '%u' limit 1"  # EMQ's own words
        backend = await open(database, authenticate=query)
        for call in (backend.check(), backend.authenticate(Client("c", "alice"), b"pw")):
            with pytest.raises(BackendUnavailable, match="exact_name = false"):
                await call
        backend = await open(database, authenticate=query, exact_name=False, superuser="select 1 where '%u' = 'root'")
        await backend.check()
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"pw"), Grant)

    async def test_types_of_mysql(self, open: Any, server: Mariadb) -> None:
        database = await server.create(
            "create table mqtt_user (id int primary key, username varbinary(100), password varbinary(100), "
            "salt binary(2), is_superuser bit(1), big bigint unsigned, exact decimal(5,2), fixed char(20))",
            f"insert into mqtt_user values "
            f"(1, 'alice', '{sha256('s1pw')}', 's1', b'1', 18446744073709551615, 1.00, 'f'), "
            f"(0, 'zero', '{sha256('s1pw')}', 's1', b'0', 0, 0.50, 'g')",
            "create table mqtt_acl (id int, allow bit(1), ipaddr varchar(60), username varbinary(100), "
            "clientid varchar(100), access decimal(2,0), topic varbinary(100))",
            "insert into mqtt_acl values (1, b'0', '', 'zero', '', 3, 'a/b'), (2, b'1', '', 'zero', '', 3, 'a/#'), "
            "(3, b'1', '', 'zero', '', 1, 0x612fff)",
        )
        backend = await open(database)
        assert (await backend.authenticate(Client("c", "alice"), b"pw")).superuser
        grant = await backend.authenticate(Client("c", "zero"), b"pw")
        assert not grant.superuser
        assert may(grant, "publish", "a/c", Client("c", "zero"))
        assert not may(grant, "publish", "a/b", Client("c", "zero"))
        columns = "select {} as username, password, salt, {} as is_superuser from mqtt_user where {} = ${{username}}"
        for column, flag, good, superuser, bad in (
            ("id", "exact", "1", True, ("1abc", "01", " 1", "1.0", "abc", "")),  # MySQL finds 1 for 1abc, 0 for abc
            ("id", "exact", "0", False, ("abc", "0abc", "-0")),
            ("big", "0", "18446744073709551615", False, ("18446744073709551616", "1.8446744073709552e19")),
            ("fixed", "big", "f", False, ("F", "f ")),
        ):
            backend = await open(database, authenticate=columns.format(column, flag, column), authorize="")
            grant = await backend.authenticate(Client("c", good), b"pw")
            assert grant.superuser is superuser, column
            for name in bad:
                answer = await backend.authenticate(Client("c", name), b"pw")
                assert answer is Verdict.IGNORE or isinstance(answer, Refusal), (column, name)
            await backend.check()

    async def test_a16_backslashes_are_text_in_every_mode(self, open: Any, server: Mariadb) -> None:
        name = "a\\' OR 1=1 -- "
        for mode in ("NO_BACKSLASH_ESCAPES", "ANSI_QUOTES", ""):
            await server.execute(f"set global sql_mode = '{mode}'")
            database = await server.create(
                *EMQ, f"insert into mqtt_user (username, password) values ('alice', '{sha256('pw')}')",
            )  # fmt: skip
            backend = await open(database)
            assert await backend.authenticate(Client(name, name), b"pw") is Verdict.IGNORE
            assert isinstance(await backend.authenticate(Client(name, "alice"), b"pw"), Grant)
        await server.execute("set global sql_mode = default")

    async def test_users_with_other_ways_to_log_in(self, open: Any, server: Mariadb, database: str) -> None:
        await server.execute(
            "drop user if exists mqtt@'127.0.0.1'", "create user mqtt@'127.0.0.1' identified by 'pä-pw'",
            f"grant select on {database}.* to mqtt@'127.0.0.1'",
        )  # fmt: skip
        backend = await open(database, dsn=server.dsn(database, user="mqtt"), password="pä-pw")
        await backend.check()
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
        backend = await open(database, dsn=server.dsn(database, user="mqtt"), password="x")
        with pytest.raises(BackendUnavailable, match="Access denied"):
            await backend.check()

    async def test_the_slow_statement_is_given_up_there_too(self, open: Any, server: Mariadb, database: str) -> None:
        backend = await open(database, timeout=0.5)
        statement = Statement("select @@max_statement_time, @@tx_read_only", "mysql", ())
        ((seconds, read_only),) = (await backend._database.fetch(statement, [])).rows
        assert (float(seconds), int(read_only)) == (0.5, 1)
