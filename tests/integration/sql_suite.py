"""What every SQL backend must do, run against the real server by `test_auth_postgresql` and `test_auth_mysql`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import bcrypt
import pytest

from auth._sql import SqlAuth
from broker.access.chain import Chain
from broker.access.guard import Guard
from broker.access.principal import Principal
from broker.access.rules import EVERY, PUBLISH, SUBSCRIBE, SUBSCRIPTIONS, RuleSet, allowed
from broker.connectors.sql_text import Statement
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from broker.extend.registry import Backend
from tests import servers
from tests.clock import clock
from tests.proxy import Proxy
from tests.sql_servers import SqlServer

ALLOW, DENY, IGNORE = Verdict.ALLOW, Verdict.DENY, Verdict.IGNORE
PATIENCE = servers.PATIENCE


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


BCRYPT = bcrypt.hashpw(b"carol-pw", bcrypt.gensalt(4)).decode()
DJANGO = "pbkdf2_sha256$1000$c2FsdA$" + (
    base64.b64encode(hashlib.pbkdf2_hmac("sha256", b"dave-pw", b"c2FsdA", 1000)).decode()
)
USERS = (
    f"insert into mqtt_user (username, password, salt, is_superuser) values "
    f"('alice', '{sha256('s1alice-pw')}', 's1', {{no}}), ('bob', '{sha256('bob-pw')}', null, {{yes}}), "
    f"('carol', '{BCRYPT}', null, {{no}}), ('dave', '{DJANGO}', '', {{no}})"
)
RIGHTS = (
    "insert into mqtt_acl (allow, ipaddr, username, clientid, access, topic) values "
    "(0, null, '$all', null, 1, 'eq #'), (1, null, 'alice', null, 2, 'telemetry/%u/+'), "
    "(1, null, 'alice', null, 1, 'commands/%c/#'), (1, null, null, 'c-1', 3, 'own/%c'), "
    "(1, '10.0.0.7', null, null, 3, 'local/#'), (1, '10.0.0.0/8', 'alice', null, 2, 'lan/#'), "
    "(1, null, '$all', null, 1, 'news/#')"
)
NOBODY = (
    "'", "' OR '1'='1' -- ", "x'); DROP TABLE mqtt_user; --", "%", "_", "\\'", "\\", "\ubf27", '"; --', "?", "$1", ":a",
    "%s", "%(a)s", "{0}", "alice\\0", "ALICE;--", "😀", "\uffff", "a" * 1000,
)  # fmt: skip
ALICE = Client("c-1", "alice", "10.9.9.9")


def may(grant: Any, action: str, topic: str, client: Client = ALICE) -> bool:
    """Whether the rules allow it, at every QoS and retained or not."""
    return packets(grant, action, topic, client) == (EVERY if action == "publish" else SUBSCRIPTIONS)


def packets(grant: Any, action: str, topic: str, client: Client = ALICE) -> int:
    """What the rules allow: bit ``qos << 1 | retain``."""
    assert isinstance(grant, Grant), grant
    who = Principal(
        client.clientid, client.username, peer=f"{client.peerhost}:1", attributes=grant.attributes, groups=grant.groups
    )
    kind, every = (PUBLISH, EVERY) if action == "publish" else (SUBSCRIBE, SUBSCRIPTIONS)
    return allowed([RuleSet(grant.rules)], kind, topic, topic.split("/"), who, every, 0)


class SqlSuite:
    """Subclasses name the backend and how its database spells things."""

    backend: ClassVar[Backend]
    emq: ClassVar[tuple[str, ...]]
    emqx: ClassVar[tuple[str, ...]]
    yes: ClassVar[str]
    no: ClassVar[str]
    text: ClassVar[str] = "varchar(200)"
    narrow: ClassVar[bool] = False
    """Whether EMQ's tables there hold three bytes a character only."""

    @pytest.fixture
    async def database(self, server: SqlServer) -> str:
        """EMQ's tables with four users."""
        return await server.create(*self.emq, USERS.format(yes=self.yes, no=self.no), RIGHTS)

    @pytest.fixture
    async def proxy(self, server: SqlServer) -> AsyncIterator[Proxy]:
        async with Proxy("127.0.0.1", server.port) as proxy:
            yield proxy

    @pytest.fixture
    async def open(self, server: SqlServer) -> AsyncIterator[Callable[..., Any]]:
        """`await open(database, timeout=1)`: a backend, closed with the test."""
        async with contextlib.AsyncExitStack() as stack:

            async def opened(database: str, port: int | None = None, **more: Any) -> SqlAuth:
                options = {"dsn": server.dsn(database, port), "password": server.password, "timeout": 5, **more}
                config = self.backend.config.model_validate(options)
                backend = await self.backend.open(config.named("sql"))
                stack.push_async_callback(backend.close)
                return backend  # type: ignore[no-any-return]

            yield opened

    # users and rights ------------------------------------------------------------------------------------------------

    async def test_emqs_database_works_unchanged(self, open: Any, database: str) -> None:
        backend = await open(database)
        await backend.check()
        alice = Client("c-1", "alice", "10.9.9.9")
        grant = await backend.authenticate(alice, b"alice-pw")
        assert isinstance(grant, Grant)
        assert not grant.superuser
        for action, topic, expected in (
            ("publish", "telemetry/alice/x", True), ("publish", "telemetry/bob/x", False),
            ("publish", "telemetry/alice/x/y", False), ("subscribe", "commands/c-1/#", True),
            ("subscribe", "#", False), ("subscribe", "news/#", True), ("publish", "news/a", False),
            ("publish", "own/c-1", True), ("subscribe", "own/c-1", True), ("publish", "lan/a", True),
            ("subscribe", "lan/a", False), ("publish", "local/a", False),
        ):  # fmt: skip
            assert may(grant, action, topic, alice) is expected, (action, topic)
        assert await backend.authenticate(alice, b"bob-pw") is DENY
        assert await backend.authenticate(alice, b"") is DENY
        for name in ("bob", "carol", "dave"):
            assert isinstance(await backend.authenticate(Client("c", name), f"{name}-pw".encode()), Grant), name
            assert await backend.authenticate(Client("c", name), b"alice-pw") is DENY
        assert await backend.authenticate(Client("c", "eve"), b"alice-pw") is IGNORE
        assert (await backend.authenticate(Client("c", "bob"), b"bob-pw")).superuser
        again = await backend.rules(alice)
        assert (again.rules, again.superuser) == (grant.rules, False), "equal, so a refresh changes nothing"
        assert await backend.rules(Client("c", "eve")) is None

    async def test_rights_depend_on_client_and_address(self, open: Any, database: str) -> None:
        backend = await open(database)
        assert backend.by_address
        other = Client("c-2", "alice", "10.0.0.7")
        grant = await backend.authenticate(other, b"alice-pw")
        assert may(grant, "publish", "local/a", other)
        assert not may(grant, "publish", "own/c-2", other)
        outside = Client("c-2", "alice", "192.0.2.1")
        grant = await backend.authenticate(outside, b"alice-pw")
        assert not may(grant, "publish", "lan/a", outside)
        unix = Client("", "alice", "")
        assert not may(await backend.authenticate(unix, b"alice-pw"), "publish", "lan/a", unix)

    async def test_emqx_5_tables_work_unchanged(self, open: Any, server: SqlServer) -> None:
        database = await server.create(
            *self.emqx,
            f"insert into mqtt_user (username, password_hash, salt, is_superuser) values "
            f"('alice', '{sha256('s1alice-pw')}', 's1', {self.no}), ('bob', '{sha256('bob-pw')}', '', {self.yes})",
            "insert into mqtt_acl (permission, action, topic, username, qos, retain) values "
            "('deny', 'all', 'a/secret', 'alice', null, null), ('allow', 'publish', 'a/+', 'alice', null, null), "
            "('allow', 'subscribe', 'b/${clientid}', 'alice', '0,1,2', null), "
            "('allow', 'publish', 'q/1', 'alice', '0', null), ('allow', 'publish', 'r/1', 'alice', null, 0)",
        )
        backend = await open(database, tables="emqx", password_hash={"name": "sha256", "salt_position": "prefix"})
        await backend.check()
        grant = await backend.authenticate(Client("c-1", "alice"), b"alice-pw")
        expected = {("publish", "a/b"): True, ("publish", "a/secret"): False, ("subscribe", "b/c-1"): True}
        assert {key: may(grant, *key) for key in expected} == expected
        assert packets(grant, "publish", "q/1") == 0b000011, "QoS 0, retained or not"
        assert packets(grant, "publish", "r/1") == 0b010101, "every QoS, not retained"
        assert (await backend.authenticate(Client("c", "bob"), b"bob-pw")).superuser

    async def test_queries_of_mosquitto_go_auth(self, open: Any, server: SqlServer) -> None:
        database = await server.create(
            f"create table account (id int primary key, username {self.text}, pw {self.text}, is_admin int)",
            "create table acl (account_id int, topic varchar(100), rw int)",
            "insert into account values (1, 'alice', 'PBKDF2$sha512$1000$c2FsdA==$"
            + base64.b64encode(hashlib.pbkdf2_hmac("sha512", b"alice-pw", b"salt", 1000)).decode()
            + f"', 0), (2, 'root', '{BCRYPT}', 1)",
            "insert into acl values (1, 'r/%u', 1), (1, 'w/%c', 2), (1, 'rw', 3), (1, 's', 4)",
        )
        backend = await open(
            database, password_hash="auto", acc_style="go-auth",
            authenticate="select username, pw as password from account where username = ${username} limit 2",
            superuser="select count(*) from account where username = ${username} and is_admin = 1",
            authorize="select topic, rw as access from acl join account on id = account_id where username = %u",
        )  # fmt: skip
        await backend.check()
        grant = await backend.authenticate(Client("c-1", "alice"), b"alice-pw")
        expected = {("subscribe", "r/alice"): True, ("publish", "r/alice"): False, ("publish", "w/c-1"): True,
                    ("subscribe", "w/c-1"): False, ("publish", "rw"): True, ("subscribe", "s"): True}  # fmt: skip
        assert {key: may(grant, *key) for key in expected} == expected
        assert (await backend.authenticate(Client("c", "root"), b"carol-pw")).superuser

    async def test_the_last_row_may_come_first_and_rights_may_end_here(self, open: Any, server: SqlServer) -> None:
        database = await server.create(*self.emq, USERS.format(yes=self.yes, no=self.no))
        await server.execute(
            "insert into mqtt_acl (allow, username, access, topic) "
            "values (0, 'alice', 3, 'a/b'), (1, 'alice', 3, 'a/#')",
            database=database,
        )
        for options, expected in (
            ({}, False), ({"acl_order": "reversed"}, True),
            ({"no_match": "allow"}, False), ({"acl_order": "reversed", "no_match": "deny"}, True),
        ):  # fmt: skip
            backend = await open(database, **options)
            grant = await backend.authenticate(Client("c", "alice"), b"alice-pw")
            assert may(grant, "publish", "a/b") is expected
            assert may(grant, "publish", "z") is (options.get("no_match") == "allow")
        backend = await open(database, authorize="")
        assert (await backend.authenticate(Client("c", "alice"), b"alice-pw")).rules == ()

    async def test_other_columns_become_attributes(self, open: Any, server: SqlServer) -> None:
        database = await server.create(
            f"create table u (name {self.text}, password {self.text}, tenant {self.text}, floor int, nothing int)",
            f"insert into u values ('alice', '{sha256('pw')}', 'acme', 3, null)",
            "create table r (topic varchar(100))",
            "insert into r values ('${attr.tenant}/${attr.floor}/#'), ('${attr.nothing}/x')",
        )
        backend = await open(
            database,
            authenticate="select name as username, password, tenant, floor, nothing from u where name = '%u'",
            authorize="select topic from r where 'x' <> ${username}",
        )
        grant = await backend.authenticate(Client("c", "alice"), b"pw")
        assert grant.attributes == {"tenant": "acme", "floor": "3"}
        assert may(grant, "publish", "acme/3/x")
        assert not may(grant, "publish", "/x")

    # what must not let anybody in -------------------------------------------------------------------------------------

    async def test_a16_a_name_is_a_value_whatever_is_in_it(self, open: Any, server: SqlServer, database: str) -> None:
        """A-16: bound to one prepared statement; the tables stay."""
        backend = await open(database)
        for name in NOBODY:
            answer = await backend.authenticate(Client(name, name, name[:20]), b"alice-pw")
            unfit = self.narrow and "😀" in name  # no row of this table can hold it
            assert isinstance(answer, Refusal) if unfit else answer is IGNORE, name
        for name in ("a\0b", "\ud800", "a" * 1025):
            answer = await backend.authenticate(Client("c", name), b"alice-pw")
            assert answer is IGNORE or isinstance(answer, Refusal), name
        for clientid in NOBODY:  # in the second statement
            answer = await backend.authenticate(Client(clientid, "alice", "%"), b"alice-pw")
            assert isinstance(answer, Refusal if self.narrow and "😀" in clientid else Grant), clientid
        ((count,),) = await server.execute("select count(*) from mqtt_user", database=database)
        assert count == 4
        assert isinstance(await backend.authenticate(Client("c", "bob"), b"bob-pw"), Grant)

    async def test_a18_rows_that_let_nobody_in(self, open: Any, server: SqlServer) -> None:
        """A-18: no row, two, no hash, an unknown one."""
        database = await server.create(
            f"create table mqtt_user (username {self.text}, password {self.text}, salt {self.text}, is_superuser int)",
            f"insert into mqtt_user values ('two', '{sha256('pw')}', null, 0), ('two', '{sha256('pw')}', null, 0), "
            "('null', null, null, 1), ('empty', '', '', 1), ('unknown', '$1$abc$def', null, 1), "
            "('short', 'abcd', '', 1), "
            f"('plain', 'pw', null, 1), ('upper', '{sha256('pw').upper()}', null, 0)",
        )
        backend = await open(database, authorize="")
        for name in ("two", "null", "empty", "unknown", "short", "plain"):
            for password in (b"pw", b"", b"$1$abc$def"):
                answer = await backend.authenticate(Client("c", name), password)
                assert answer is DENY or isinstance(answer, Refusal), name
        assert isinstance(await backend.authenticate(Client("c", "upper"), b"pw"), Grant)

    async def test_a20_plain_passwords_must_be_asked_for(self, open: Any, server: SqlServer) -> None:
        """A-20: and compared byte for byte."""
        database = await server.create(
            f"create table mqtt_user (username {self.text}, password {self.text}, salt {self.text}, is_superuser int)",
            "insert into mqtt_user values ('alice', 'Secret', null, 0)",
        )
        for options, verdict in (({}, DENY), ({"password_hash": "plain"}, Grant)):
            backend = await open(database, authorize="", **options)
            answer = await backend.authenticate(Client("c", "alice"), b"Secret")
            assert answer is verdict or isinstance(answer, Grant) is (verdict is Grant)
            for wrong in (b"secret", b"Secret ", b"", b"SECRET", b"Secret\0"):
                assert await backend.authenticate(Client("c", "alice"), wrong) is DENY

    async def test_z22_only_a_yes_makes_a_superuser(self, open: Any, server: SqlServer) -> None:
        values = {"1": True, "true": True, "TRUE": True, "false": False, "0": False, " ": False, "": False,
                  "yes please": False, "[]": False, "2": False, "-1": False}  # fmt: skip
        rows = ", ".join(f"('u{i}', '{sha256('pw')}', '{value}')" for i, value in enumerate(values))
        database = await server.create(
            f"create table u (username {self.text}, password {self.text}, flag {self.text})",
            f"insert into u values {rows}, ('none', '{sha256('pw')}', null)",
        )
        query = "select username, password, flag as is_superuser from u where username = ${username}"
        backend = await open(database, authenticate=query, authorize="")
        found = {
            value: (await backend.authenticate(Client("c", f"u{i}"), b"pw")).superuser for i, value in enumerate(values)
        }
        assert found == values
        assert not (await backend.authenticate(Client("c", "none"), b"pw")).superuser
        for number in ("0", "1", "2", "1.0", "0.5", "null"):
            query = f"select username, password, {number} as is_superuser from u where username = ${{username}}"
            backend = await open(database, authenticate=query, authorize="")
            expected = number in ("1", "1.0")
            assert (await backend.authenticate(Client("c", "none"), b"pw")).superuser is expected, number

    async def test_rights_that_cannot_be_understood(self, open: Any, server: SqlServer) -> None:
        database = await server.create(*self.emq, USERS.format(yes=self.yes, no=self.no))
        await server.execute(
            "insert into mqtt_acl (allow, username, ipaddr, access, topic) values (1, 'alice', null, 7, 'seven'), "
            "(1, 'alice', null, 3, 'a#'), (1, 'alice', 'nonsense', 3, 'b'), (1, 'alice', null, 3, '%u/${nope}'), "
            "(1, 'alice', null, 3, 'good'), (null, 'alice', null, 3, 'nulled'), (2, 'alice', null, 3, 'two')",
            database=database,
        )
        backend = await open(database)
        grant = await backend.authenticate(Client("c", "alice"), b"alice-pw")
        assert {topic for topic in ("seven", "a#", "b", "alice/x", "good", "nulled", "two", "other")
                if may(grant, "publish", topic)} == {"good"}  # fmt: skip

    async def test_what_is_wrong_with_a_statement_is_said(self, open: Any, server: SqlServer, database: str) -> None:
        for options, say in (
            ({"authenticate": "select nope from mqtt_user where username = ${username}"}, "nope"),
            ({"authenticate": "select username from mqtt_user where username = ${username}"}, "no column password"),
            ({"authenticate": "select username, password frm mqtt_user where username = ${username}"}, "correct the"),
            ({"authenticate": "select username, password from missing where username = ${username}"}, "missing"),
            ({"authorize": "select access from mqtt_acl where username = ${username}"}, "no column topic"),
            ({"superuser": "select x from mqtt_user where username = ${username}"}, "x"),
        ):
            backend = await open(database, **options)
            with pytest.raises(BackendUnavailable) as caught:
                await backend.check()
            assert say in str(caught.value)
            if "authorize" not in options:
                with pytest.raises(BackendUnavailable):
                    await backend.authenticate(Client("c", "alice"), b"alice-pw")
        backend = await open("isthmus_nowhere")
        with pytest.raises(BackendUnavailable, match="isthmus_nowhere"):
            await backend.check()
        wrong = self.backend.config.model_validate({"dsn": server.dsn(database), "password": "wrong-pw"})
        backend = await self.backend.open(wrong)
        with pytest.raises(BackendUnavailable) as caught:
            await backend.check()
        assert "wrong-pw" not in str(caught.value)
        await backend.close()

    async def test_a_session_cannot_write(self, open: Any, server: SqlServer, database: str) -> None:
        for more in ({}, {"upgrade_to": "argon2id"}):
            backend = await open(database, **more)
            connection = await backend._database._open()
            write = Statement(
                "update mqtt_user set salt = ${username}", backend._config.dialect, ("username",), writes=True
            )
            if more:
                await connection.link.fetch(write, ["s1"])
            else:
                with pytest.raises(BackendUnavailable, match=r"(?i)read.only"):
                    await connection.link.fetch(write, ["s1"])

    # changes ---------------------------------------------------------------------------------------------------------

    async def test_a46_changes_in_the_database_take_effect(self, open: Any, server: SqlServer, database: str) -> None:
        backend = await open(database)
        now = [0.0]
        guard = Guard("sql", backend, cache_ttl=60, clock=lambda: now[0])
        alice = Client("c", "alice")

        async def login(password: bytes) -> Any:
            return await guard.authenticate(guard.key(alice, password), alice, password)

        assert isinstance(await login(b"alice-pw"), Grant)
        await server.execute(
            f"update mqtt_user set password = '{sha256('s1new')}' where username = 'alice'", database=database
        )
        assert isinstance(await login(b"alice-pw"), Grant), "until the verdict is too old"
        assert isinstance(await login(b"new"), Grant)
        now[0] = 66.1
        assert await login(b"alice-pw") is DENY, "60 s and a tenth at most, however often it was used"
        assert isinstance(await login(b"new"), Grant)
        await server.execute(
            f"update mqtt_user set password = '{sha256('s1newer')}' where username = 'alice'", database=database
        )
        assert isinstance(await login(b"new"), Grant)
        guard.cache.purge("alice")
        assert await login(b"new") is DENY, "at once after a purge"
        await server.execute("delete from mqtt_user where username = 'alice'", database=database)
        assert await backend.rules(alice) is None
        guard.cache.purge("alice")
        assert await login(b"newer") is IGNORE

    async def test_a_password_is_stored_anew_at_login(self, open: Any, server: SqlServer, database: str) -> None:
        backend = await open(database, upgrade_to="argon2id")
        await backend.check()
        for name in ("alice", "carol", "dave"):
            client, password = Client("c", name), f"{name}-pw".encode()
            assert await backend.authenticate(client, b"wrong") is DENY
            ((before,),) = await self._stored(server, database, name)
            assert not before.startswith("$argon2id$"), "only the right password is stored"
            assert isinstance(await backend.authenticate(client, password), Grant)
            ((after,),) = await self._stored(server, database, name)
            assert after.startswith("$argon2id$"), name
            assert isinstance(await backend.authenticate(client, password), Grant)
            assert await backend.authenticate(client, b"wrong") is DENY
            ((same,),) = await self._stored(server, database, name)
            assert same == after
        narrow = await server.create(
            f"create table mqtt_user (username {self.text}, password varchar(64), salt {self.text}, is_superuser int)",
            f"insert into mqtt_user values ('alice', '{sha256('pw')}', null, 0)",
        )
        backend = await open(narrow, upgrade_to="argon2id", authorize="")
        for _ in range(2):
            assert isinstance(await backend.authenticate(Client("c", "alice"), b"pw"), Grant), "the login is good"

    async def _stored(self, server: SqlServer, database: str, name: str) -> list[Any]:
        return await server.execute(f"select password from mqtt_user where username = '{name}'", database=database)

    async def test_a_table_that_is_altered_under_prepared_statements(
        self, open: Any, server: SqlServer, database: str
    ) -> None:
        query = "select * from mqtt_user where username = ${username}"
        backend = await open(database, pool=1, authenticate=query)
        for change in (
            None, "alter table mqtt_user add column x int", f"alter table mqtt_user add column y {self.text}",
            "alter table mqtt_user drop column x", self.retype, "alter table mqtt_acl add column z int",
        ):  # fmt: skip
            if change:
                await server.execute(change, database=database)
            for _ in range(2):
                assert (await backend.authenticate(Client("c", "bob"), b"bob-pw")).superuser, change
                grant = await backend.authenticate(Client("c-1", "alice"), b"alice-pw")
                assert not grant.superuser
                assert may(grant, "publish", "telemetry/alice/x"), change

    retype: ClassVar[str]

    # outage ----------------------------------------------------------------------------------------------------------

    async def test_a39_outage_and_return(self, open: Any, proxy: Proxy, database: str) -> None:
        backend = await open(database, proxy.port, pool=4)
        guard = Guard("sql", backend, timeout=5, cache_ttl=0, negative_cache_ttl=0)
        alice = Client("c", "alice")

        async def login() -> tuple[Any, float]:
            began = clock()
            try:
                answer = await guard.authenticate(os.urandom(8), alice, b"alice-pw")
            except BackendUnavailable:
                answer = None
            return answer, clock() - began

        assert isinstance((await login())[0], Grant)
        await proxy.down()
        first, seconds = await login()
        assert first is None
        assert seconds <= 3
        for _ in range(5):
            await login()
        assert guard.breaker.open
        calls = guard.calls
        answers, times = zip(*[await login() for _ in range(20)], strict=True)
        assert set(answers) == {None}
        assert guard.calls == calls, "it is left alone"
        assert statistics.median(times) <= 0.010 * PATIENCE
        await proxy.up()
        back, errors = time.monotonic(), guard.errors
        while (await login())[0] is None:  # another pause of the breaker for a probe that fails
            assert time.monotonic() - back < min(10 + 6 * (guard.errors - errors), 25) * PATIENCE
            await asyncio.sleep(0.1)
        assert isinstance((await login())[0], Grant)

    async def test_a_black_hole_costs_the_timeout_and_not_more(self, open: Any, proxy: Proxy, database: str) -> None:
        backend = await open(database, proxy.port, timeout=3)
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
        proxy.black_hole = True
        for _ in range(2):  # on the connection that is there, on a new one
            began = time.monotonic()
            with pytest.raises(BackendUnavailable, match="no answer in"):
                await backend.authenticate(Client("c", "alice"), b"alice-pw")
            assert 2.9 < time.monotonic() - began < 3 + 2 * PATIENCE
        assert proxy.counts.swallowed
        proxy.black_hole = False
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)

    async def test_slow_answers_are_waited_for(self, open: Any, proxy: Proxy, database: str) -> None:
        backend = await open(database, proxy.port, timeout=5)
        proxy.delay = 0.05
        answers = await asyncio.gather(
            *(backend.authenticate(Client("c", "alice"), b"alice-pw" if i % 2 else b"no") for i in range(16))
        )
        assert [isinstance(answer, Grant) for answer in answers] == [bool(i % 2) for i in range(16)]
        assert proxy.connections <= backend._config.pool

    @pytest.mark.parametrize("way", ["cut", "reset"])
    async def test_connections_that_were_closed_while_idle_are_replaced(
        self, open: Any, proxy: Proxy, database: str, way: str
    ) -> None:
        backend = await open(database, proxy.port, pool=4)
        login = lambda: backend.authenticate(Client("c", "alice"), b"alice-pw")  # noqa: E731
        await asyncio.gather(*(login() for _ in range(4)))
        assert await getattr(proxy, way)() == 4
        answers = await asyncio.gather(*(login() for _ in range(8)))
        assert all(isinstance(answer, Grant) for answer in answers)

    async def test_an_answer_that_breaks_off_is_no_verdict(self, open: Any, proxy: Proxy, database: str) -> None:
        backend = await open(database, proxy.port, pool=1)
        await backend.authenticate(Client("c", "alice"), b"alice-pw")
        for count in (1, 5, 20, 60, 120, 200):
            proxy.cut_after(count, "down")
            with contextlib.suppress(BackendUnavailable):
                assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
            proxy._limits.clear()
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)

    async def test_the_next_server_is_asked(self, open: Any, server: SqlServer, proxy: Proxy, database: str) -> None:
        dead = servers.free_port()
        dsn = server.dsn(database).replace(f":{server.port}", f":{dead},127.0.0.1:{server.port}")
        backend = await open(database, dsn=dsn)
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
        proxy.black_hole = True
        dsn = server.dsn(database).replace(f":{server.port}", f":{proxy.port},127.0.0.1:{server.port}")
        backend = await open(database, dsn=dsn, timeout=4)
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
        assert proxy.counts.accepted == 1
        await asyncio.gather(*(backend.authenticate(Client("c", "alice"), b"alice-pw") for _ in range(8)))
        assert proxy.counts.accepted == 1, "the one that failed is left alone"

    async def test_restart_under_load(self, open: Any, own_server: SqlServer) -> None:
        """Every login ends with the right verdict or an error, and all is well soon after."""
        database = await own_server.create(*self.emq, USERS.format(yes=self.yes, no=self.no), RIGHTS)
        way = {"dsn": own_server.dsn(database), "password": own_server.password}
        backend = await open(database, **way, pool=8, timeout=2)
        verdicts = {"right": 0, "wrong": 0, "error": 0}
        last_error = [0.0]
        stop = asyncio.Event()

        async def client(number: int) -> None:
            name = ("alice", "bob", "eve")[number % 3]
            good = number % 2 == 0
            while not stop.is_set():
                try:
                    answer = await backend.authenticate(Client("c", name), f"{name if good else 'x'}-pw".encode())
                except BackendUnavailable:
                    verdicts["error"] += 1
                    last_error[0] = time.monotonic()
                    await asyncio.sleep(0.02)
                    continue
                right = answer is IGNORE if name == "eve" else isinstance(answer, Grant) if good else answer is DENY
                verdicts["right" if right else "wrong"] += 1

        clients = [asyncio.create_task(client(number)) for number in range(12)]
        await asyncio.sleep(0.3)
        for _ in range(2):
            await asyncio.to_thread(own_server.stop)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(own_server.start)
            back = time.monotonic()
            before = verdicts["right"]
            while verdicts["right"] < before + 50:
                assert time.monotonic() - back < 10 * PATIENCE
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*clients)
        assert verdicts["wrong"] == 0
        assert verdicts["error"] > 0, "the outage was real"
        assert last_error[0] - back < 2 * PATIENCE

    async def test_a40_a_slow_database_gets_as_many_calls_as_the_pool_has(
        self, open: Any, proxy: Proxy, database: str
    ) -> None:
        backend = await open(database, proxy.port, pool=4)
        guard = Guard("sql", backend, timeout=5, max_concurrent=16, cache_ttl=0, negative_cache_ttl=0)
        await backend.authenticate(Client("c", "alice"), b"alice-pw")  # opening the first connection takes its time
        proxy.delay = 0.02
        chain = Chain((guard,))
        answers = asyncio.gather(*(chain.decide(Client(f"c{i}", "alice"), b"alice-pw") for i in range(300)))
        most, turns, busy = 0, [], 0.0
        while not answers.done():
            most = max(most, len(backend._database._links))
            began, worked = time.monotonic(), time.thread_time()
            await asyncio.sleep(0.01)
            turns.append(time.monotonic() - began)
            busy = max(busy, time.thread_time() - worked)
        codes = [decision.code for decision in await answers]
        assert set(codes) <= {0, 0x88, 0x89}
        assert codes.count(0x89) >= 300 - 16 * 5
        assert codes.count(0) > 0
        assert most <= 4
        assert proxy.counts.accepted <= 4 * (1 + codes.count(0x88)), "only what was late is replaced"
        assert statistics.median(turns) < 2 * proxy.delay, "whoever blocks takes a statement's time out of every turn"
        assert busy < 0.1 * PATIENCE + 0.4, "nobody computes that long at a time"

    async def test_a41_who_leaves_leaves_nothing_behind(self, open: Any, proxy: Proxy, database: str) -> None:
        backend = await open(database, proxy.port, pool=4, timeout=2)
        await backend.authenticate(Client("c", "alice"), b"alice-pw")
        before = len(asyncio.all_tasks())
        proxy.black_hole = True
        logins = [asyncio.create_task(backend.authenticate(Client("c", "alice"), b"alice-pw")) for _ in range(200)]
        await asyncio.sleep(0.1)
        for login in logins:
            login.cancel()
        await asyncio.gather(*logins, return_exceptions=True)
        end = time.monotonic() + 5
        while proxy.connections or len(asyncio.all_tasks()) > before:
            assert time.monotonic() < end, [task for task in asyncio.all_tasks()]
            await asyncio.sleep(0.01)
        assert not backend._database._links

    @pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
    async def test_a42_cancelled_and_interleaved_logins(
        self, open: Any, proxy: Proxy, server: SqlServer, count: int
    ) -> None:
        """No verdict ever belongs to another request."""
        rows = ", ".join(f"('u{i}', '{sha256(f'pw{i}')}', null, {self.no})" for i in range(50))
        rights = ", ".join(f"(1, 'u{i}', 3, 'only/u{i}')" for i in range(50))
        database = await server.create(
            *self.emq,
            f"insert into mqtt_user (username, password, salt, is_superuser) values {rows}",
            f"insert into mqtt_acl (allow, username, access, topic) values {rights}",
        )
        backend = await open(database, proxy.port, pool=6, timeout=5)
        rng = random.Random(42)
        wrong: list[Any] = []
        tally = {"done": 0, "cancelled": 0}

        async def login(i: int, good: bool) -> None:
            client = Client("c", f"u{i}")
            try:
                answer = await backend.authenticate(client, f"pw{i if good else i + 1}".encode())
            except BackendUnavailable as error:
                wrong.append(error)
                return
            tally["done"] += 1
            if not good and answer is not DENY:
                wrong.append((i, answer))
            if good and not (isinstance(answer, Grant) and may(answer, "publish", f"only/u{i}", client)
                             and not may(answer, "publish", f"only/u{(i + 1) % 50}", client)):  # fmt: skip
                wrong.append((i, answer))

        running: set[asyncio.Task[None]] = set()
        for number in range(count):
            task = asyncio.create_task(login(rng.randrange(50), rng.random() < 0.7))
            running.add(task)
            task.add_done_callback(running.discard)
            if rng.random() < 0.3:
                delay = rng.choice([0, 0, rng.random() * 0.003, rng.random() * 0.02])
                asyncio.get_running_loop().call_later(delay, task.cancel)
                tally["cancelled"] += 1
            if number % 97 == 0:
                await proxy.cut()
            if len(running) > 24:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*running, return_exceptions=True)
        lost = [problem for problem in wrong if isinstance(problem, BackendUnavailable)]
        assert [problem for problem in wrong if problem not in lost] == []
        assert len(lost) < count / 20, lost[:3]
        assert tally["done"] > count / 2
        assert tally["cancelled"] > count / 5
        client = Client("c", "u7")
        assert may(await backend.authenticate(client, b"pw7"), "publish", "only/u7", client)

    async def test_a50_time_does_not_tell_who_exists(self, open: Any, server: SqlServer) -> None:
        """A-50: an unknown user beside a wrong password, the median of many; within a tenth in the long form."""
        slow = bcrypt.hashpw(b"pw", bcrypt.gensalt(8)).decode()
        database = await server.create(
            *self.emq, f"insert into mqtt_user (username, password) values ('alice', '{slow}')"
        )
        chain = Chain((Guard("sql", await open(database), cache_ttl=0, negative_cache_ttl=0),))
        times: dict[str, list[float]] = {"alice": [], "eve": []}
        await chain.decide(Client("c", "alice"), b"wrong")
        soak = os.environ.get("ISTHMUS_SOAK") == "1"
        for number in range(1_000 if soak else 40):
            for name, taken in times.items():
                began = time.perf_counter()
                decision = await chain.decide(Client(f"c{number}", name), b"wrong")
                taken.append(time.perf_counter() - began)
                assert decision.code == 0x86
        ratio = statistics.median(unknown / known for known, unknown in zip(*times.values(), strict=True))
        assert abs(ratio - 1) < (0.1 if soak else 0.25)

    # TLS and several of them -----------------------------------------------------------------------------------------

    async def test_tls_is_verified(self, open: Any, server: SqlServer, tls_server: SqlServer, certs: Any) -> None:
        database = await tls_server.create(*self.emq, USERS.format(yes=self.yes, no=self.no))
        way = {"dsn": tls_server.dsn(database), "password": tls_server.password, "tls": True}
        backend = await open(database, **way, ca=str(certs.ca))
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
        ((answer,),) = (await backend._database.fetch(self._cipher(backend), [])).rows
        assert answer
        for more in ({"ca": str(certs.stranger_ca)}, {}):
            backend = await open(database, **way, **more)
            with pytest.raises(BackendUnavailable, match=r"(?i)certificate"):
                await backend.check()
        elsewhere = tls_server.dsn(database).replace("127.0.0.1", "127.0.0.2")
        async with Proxy("127.0.0.1", tls_server.port):
            backend = await open(database, **{**way, "dsn": elsewhere}, ca=str(certs.ca))
            with pytest.raises(BackendUnavailable):
                await backend.check()
        plain = await server.create(*self.emq)
        backend = await open(plain, tls=True, ca=str(certs.ca), timeout=1)
        with pytest.raises(BackendUnavailable):
            await backend.check()

    def _cipher(self, backend: Any) -> Any:
        raise NotImplementedError

    async def test_two_of_them_side_by_side(self, open: Any, server: SqlServer, database: str) -> None:
        other = await server.create(
            *self.emq, f"insert into mqtt_user (username, password) values ('zoe', '{sha256('zoe-pw')}')"
        )
        guards = (Guard(database, await open(database)), Guard(other, await open(other)))
        for name, backend in (("alice", database), ("zoe", other)):
            decision = await Chain(guards).decide(Client("c", name), f"{name}-pw".encode())
            assert (decision.code, decision.backend) == (0, backend)
        assert (await Chain(guards).decide(Client("c", "eve"), b"x")).code == 0x86

    async def test_closing_ends_what_is_under_way(self, open: Any, proxy: Proxy, database: str) -> None:
        backend = await open(database, proxy.port)
        await backend.authenticate(Client("c", "alice"), b"alice-pw")
        await backend.close()
        with pytest.raises(BackendUnavailable, match="closed"):
            await backend.authenticate(Client("c", "alice"), b"alice-pw")
        end = time.monotonic() + 5
        while proxy.connections:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
