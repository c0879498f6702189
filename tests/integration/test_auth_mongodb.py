"""Logins against a MongoDB over TCP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("pymongo")

from auth.mongodb import BACKEND, MongoConfig
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from tests import nosql_servers
from tests.integration.auth_harness import (
    PEOPLE,
    NetworkSuite,
    allowed,
    digest,
    instance,
    logins,
    opened,
    recovers,
    unavailable,
)
from tests.integration.fake_mongo import FakeMongo
from tests.nosql_servers import MongoServer, or_skip
from tests.servers import PATIENCE

DENY, IGNORE = Verdict.DENY, Verdict.IGNORE


def fill(client: Any) -> None:
    """EMQ's collections."""
    database = client.mqtt
    for collection in ("mqtt_user", "mqtt_acl"):
        database[collection].drop()
    database.mqtt_user.create_index("username")
    users = [
        {"username": name, "password": digest(password, "pepper"), "salt": "pepper", "is_superuser": False}
        for name, password in PEOPLE.items()
    ]
    database.mqtt_user.insert_many(
        [
            *users,
            {"username": "root", "password": digest(b"root-pw"), "is_superuser": True},
            {"username": "emqx", "password_hash": digest(b"emqx-pw", "s"), "salt": "s"},
            {"username": "twin", "password": digest(b"one")},
            {"username": "twin", "password": digest(b"two")},
        ]
    )
    database.mqtt_acl.insert_many(
        [
            {"username": name, "clientid": "any", "publish": [f"own/{name}/#", "in/%c"], "subscribe": ["news/+"],
             "pubsub": ["both/%u"]}
            for name in PEOPLE
        ]
        + [
            {"username": "emqx", "permission": "deny", "action": "publish", "topic": "t/secret"},
            {"username": "emqx", "permission": "allow", "action": "publish", "topics": ["t/+", "eq x/#"]},
            {"username": "emqx", "permission": "allow", "action": "all", "topic": "near", "ipaddress": "127.0.0.0/8"},
            {"username": "emqx", "permission": "allow", "action": "all", "topic": "far", "ipaddress": "10.0.0.0/8"},
            {"username": "emqx", "permission": "allow", "action": "all", "topics": ["q1"], "qos": [1]},
            {"username": "emqx", "permission": "allow", "action": "all", "topics": ["qa"], "qos": [0, 1, 2]},
            {"clientid": "c9", "permission": "allow", "action": "subscribe", "topic": "by-client"},
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[MongoServer]:
    """Read only."""
    with or_skip("mongodb", nosql_servers.mongodb) as server:
        fill(server.connect())
        yield server


@pytest.fixture
def own() -> Iterator[MongoServer]:
    """To change and to stop."""
    with or_skip("mongodb", nosql_servers.mongodb) as server:
        fill(server.connect())
        yield server


def table(server: Any, **more: Any) -> dict[str, Any]:
    return {"servers": [f"127.0.0.1:{server.port}"], "timeout": 5, **more}


async def test_emqs_collections_work_unchanged(server: MongoServer) -> None:
    async with logins(instance(BACKEND, table(server))) as log:
        may, dev1 = log.gate, (await log("dev1", b"pw-1", "c1")).principal
        assert may.may_publish(dev1, "own/dev1/x") == may.may_publish(dev1, "in/c1") == 1
        assert may.may_publish(dev1, "own/dev2/x") == may.may_publish(dev1, "in/c2") == 0
        assert may.may_subscribe(dev1, "news/+") == 1
        assert may.may_publish(dev1, "news/x") == 0
        assert may.may_publish(dev1, "both/dev1") == may.may_subscribe(dev1, "both/dev1") == 1
        assert (await log("root", b"root-pw", "c2")).principal.superuser
        for name, password in (
            ("dev1", b"pw-2"),
            ("dev1", b""),
            ("nobody", b"pw-1"),
            ("twin", b"one"),
            ("DEV1", b"pw-1"),
        ):
            assert (await log(name, password, "c3")).code == 0x86


async def test_emqxs_documents_work_unchanged(server: MongoServer) -> None:
    more = {"acl_filters": [{"username": "${username}"}, {"clientid": "${clientid}"}]}
    async with logins(instance(BACKEND, table(server, **more))) as log:
        may, emqx = log.gate, (await log("emqx", b"emqx-pw", "c9")).principal
        assert may.may_publish(emqx, "t/x") == 1
        assert may.may_publish(emqx, "t/secret") == 0
        assert may.may_publish(emqx, "x/#") == 1, "eq: as it is written"
        assert may.may_publish(emqx, "x/y") == 0
        assert may.may_publish(emqx, "near") == 1
        assert may.may_publish(emqx, "far") == 0
        assert may.publishable(emqx, "q1") == 0b001100, "QoS 1, retained or not"
        assert [may.may_subscribe(emqx, "q1", qos) for qos in (0, 1, 2)] == [0, 1, 0]
        assert may.may_publish(emqx, "qa") == 1
        assert may.may_subscribe(emqx, "by-client") == 1
        other = (await log("emqx", b"emqx-pw", "c8")).principal
        assert may.may_subscribe(other, "by-client") == 0


@pytest.mark.parametrize(
    "name",
    [
        '{"$ne": null}', '{"$gt": ""}', '{"$regex": ".*"}', "{'$where': 'sleep(1000)'}", "$where", "$username", "[]",
        "dev1' || '1'=='1", "';return true;var x='", "dev1\x00", "\x00", "dev1 ", "DEV1", ".*", "1", "true", "null",
        "\ud800", "x" * 2_000, "this.password", "${username}", "%u",
    ],
)  # fmt: skip
async def test_a22_a_name_is_a_text_and_nothing_else(server: MongoServer, name: str) -> None:
    """A-22: operators in it mean nothing."""
    async with opened(BACKEND, table(server)) as backend:
        for password in (b"pw-1", b"", name.encode("utf-8", "surrogatepass")):
            answer = await backend.authenticate(Client(name, name, "127.0.0.1"), password)
            assert answer is IGNORE or isinstance(answer, Refusal)
        rights = await backend.rules(Client(name, name, "127.0.0.1"))
        assert rights is None or isinstance(rights, Refusal)


async def test_a22_what_looks_like_a_query_can_be_a_name(own: MongoServer) -> None:
    for name in ('{"$ne":1}', "$where", "a.b"):
        own.connect().mqtt.mqtt_user.insert_one({"username": name, "password": digest(b"pw")})
    async with opened(BACKEND, table(own)) as backend:
        for name in ('{"$ne":1}', "$where", "a.b"):
            assert allowed(await backend.authenticate(Client("c", name), b"pw"))


async def test_a18_documents_that_let_nobody_in(own: MongoServer) -> None:
    odd = [None, "", 0, 1, True, [], {}, {"$ne": None}, [digest(b"pw")], "short", "$9$what", digest(b"pw")[:-1]]
    collection = own.connect().mqtt.mqtt_user
    for number, stored in enumerate(odd):
        collection.insert_one({"username": f"odd{number}", "password": stored, "is_superuser": True})
    collection.insert_one({"username": "odd-none", "is_superuser": True})
    async with opened(BACKEND, table(own)) as backend:
        for name in [*(f"odd{number}" for number in range(len(odd))), "odd-none"]:
            for password in (b"pw", b"", b"1", b"None", b"True"):
                assert await backend.authenticate(Client("c", name), password) is DENY, name


@pytest.mark.parametrize(
    ("stored", "superuser"),
    [(True, True), (1, True), ("true", True), ("1", True), (False, False), (0, False), ("false", False), ("0", False),
     (" ", False), (None, False), ([], False), ([1], False), ({}, False), (2, False), (1.0, False)],
)  # fmt: skip
async def test_z22_only_a_clear_yes_makes_a_superuser(own: MongoServer, stored: Any, superuser: bool) -> None:
    own.connect().mqtt.mqtt_user.insert_one({"username": "flag", "password": digest(b"pw"), "is_superuser": stored})
    async with opened(BACKEND, table(own)) as backend:
        answer = await backend.authenticate(Client("c", "flag"), b"pw")
    assert isinstance(answer, Grant)
    assert answer.superuser is superuser


async def test_rules_that_cannot_be_understood_never_widen(own: MongoServer) -> None:
    bad = [
        {"publish": "a/#/b", "subscribe": 7, "pubsub": None},
        {"publish": {"$ne": 1}},
        {"permission": "allow", "action": "fly", "topic": "b"},
        {"permission": "allow", "topic": "c", "when": "monday"},
        {"permission": "allow", "topic": "good"},
    ]
    acl = own.connect().mqtt.mqtt_acl
    acl.delete_many({"username": "dev1"})
    acl.insert_many([{"username": "dev1", **document} for document in bad])
    async with logins(instance(BACKEND, table(own))) as log:
        dev1 = (await log("dev1", b"pw-1", "c")).principal
        assert log.gate.may_publish(dev1, "good") == 1
        for topic in ("a/x/b", "a", "b", "c", "7"):
            assert log.gate.may_publish(dev1, topic) == log.gate.may_subscribe(dev1, topic) == 0
    unclear = [
        ({"permission": "denny", "topic": "x"}, None),
        ({"permission": "deny", "topic": "a/#/b"}, None),
        ({"permission": "deny", "topic": "x", "action": "fly"}, None),
        ({"permission": "deny", "topic": "x", "when": "monday", "qos": [1]}, "x"),
        ({"permission": "deny", "topic": "x", "ipaddress": "10.0.0"}, "x"),
        ({"permission": "deny", "topic": "x", "clientid": {"$ne": 1}}, "x"),
    ]
    async with opened(BACKEND, table(own)) as backend:
        for document, denied in unclear:
            added = acl.insert_one({"username": "dev1", **document}).inserted_id
            answer = await backend.authenticate(Client("c", "dev1", "127.0.0.1"), b"pw-1")
            acl.delete_one({"_id": added})
            assert isinstance(answer, Grant)
            denials = [rule.filter and rule.filter.text for rule in answer.rules if not rule.allow]
            assert denials == [denied], document


@pytest.mark.parametrize(
    ("more", "say"),
    [
        ({"user_filter": {"username": "alice"}}, "placeholder"),
        ({"user_filter": {"$where": "this.username == '${username}'"}}, "$where"),
        ({"user_filter": {"username": {"$regex": "^${username}$"}}}, "$regex"),
        ({"user_filter": {"$or": [{"x": "${username}"}, {"$expr": {"$eq": ["$x", "${clientid}"]}}]}}, "$expr"),
        ({"user_filter": {"a${username}": "${username}"}}, "names of fields"),
        ({"user_filter": {"username": "${password}"}}, "password"),
        ({"acl_filters": [{"x": "y"}]}, "placeholder"),
        ({"acl_filters": []}, "acl_filters"),
        ({"servers": ["mongo.example.com:27017"]}, "allow_cleartext"),
        ({"database": "a.b"}, "database"),
        ({"username": "", "password": "hush"}, "belong together"),
        ({"key": "x.pem", "certificate": "y.pem"}, "one file"),
        ({"urll": 1}, "urll"),
    ],
)  # fmt: skip
def test_tables_that_cannot_work_are_refused(more: dict[str, Any], say: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MongoConfig.model_validate({"username": "svc", "password": "hush", **more})
    assert say in str(caught.value)
    assert "hush" not in str(caught.value)


class TestNetwork(NetworkSuite):
    backend = BACKEND
    table = staticmethod(table)

    def test_the_example_on_the_command_line(self, server: MongoServer, tmp_path: Path, free_port: Any) -> None:
        dead = f"127.0.0.1:{free_port()}"
        self.on_the_command_line(
            tmp_path, "25-auth-mongodb", "127.0.0.1:27017", server.address, dead, "mqtt_user: 1 document",
            digest(b"pw-1", "pepper"),
        )  # fmt: skip


async def test_a_reset_connection_is_replaced_without_an_error(server: MongoServer, start_proxy: Any) -> None:
    proxy = await start_proxy(server.port)
    async with opened(BACKEND, table(proxy, timeout=3)) as backend:
        for _ in range(3):
            answers = await asyncio.gather(*(backend.authenticate(Client("c", n), pw) for n, pw in PEOPLE.items()))
            assert all(map(allowed, answers))
            assert await proxy.reset() > 0


async def test_slow_answers_are_waited_for_until_the_deadline(server: MongoServer, start_proxy: Any) -> None:
    proxy = await start_proxy(server.port)
    async with opened(BACKEND, table(proxy, timeout=2)) as backend:
        assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
        proxy.delay = 0.1
        assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
        proxy.delay = 1.5
        await unavailable(backend, "dev1", b"pw-1", 2 + 4 * PATIENCE)
        proxy.delay = 0.0
        await proxy.cut()
        assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))


async def test_an_answer_that_breaks_off(server: MongoServer, start_proxy: Any) -> None:
    """An error or the right verdict, never another."""
    proxy = await start_proxy(server.port)
    async with opened(BACKEND, table(proxy, timeout=2)) as backend:
        for count in range(1, 200, 29):
            assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
            proxy.cut_after(count, "down")
            with contextlib.suppress(BackendUnavailable):
                assert allowed(await backend.authenticate(Client("c", "dev2"), b"pw-2"))
            assert await backend.authenticate(Client("c", "dev2"), b"pw-1") is DENY
    assert proxy.counts.cut >= 5


async def test_a_server_that_is_started_again(own: MongoServer) -> None:
    async with logins(instance(BACKEND, table(own, timeout=2))) as log:
        await recovers(log, "dev1", b"pw-1", "mongodb")
        own.stop()
        for number in range(3):
            assert (await log("dev1", b"pw-1", f"d{number}")).code == 0x88
        await asyncio.to_thread(own.start, 30)
        await asyncio.to_thread(lambda: fill(own.connect()))
        await recovers(log, "dev1", b"pw-1", "mongodb")
        assert (await log("dev1", b"no", "c2")).code == 0x86


async def test_a_server_that_is_down_at_the_start(free_port: Any) -> None:
    raw = {"servers": [f"127.0.0.1:{free_port()}"], "timeout": 0.5}
    async with opened(BACKEND, raw) as backend:
        await unavailable(backend, "dev1", b"pw-1", 0.5 + 4 * PATIENCE)
        with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1"):
            await backend.check()


async def test_rights_follow_the_database(own: MongoServer) -> None:
    async with logins(instance(BACKEND, table(own, refresh=0.001))) as log:
        dev1 = (await log("dev1", b"pw-1", "c")).principal
        assert log.gate.may_publish(dev1, "more/x") == 0
        own.connect().mqtt.mqtt_acl.update_one({"username": "dev1"}, {"$set": {"publish": ["more/x"]}})
        await asyncio.sleep(0.002)
        await log.gate._refresher.run_due()
        assert log.gate.may_publish(dev1, "more/x") == 1
        kicked: list[Any] = []
        log.gate.kick = lambda clientid, code: kicked.append((clientid, code))
        own.connect().mqtt.mqtt_user.delete_many({"username": "dev1"})
        await asyncio.sleep(0.002)
        await log.gate._refresher.run_due()
        assert kicked == [("c", 0x87)]


async def test_a_client_with_more_rules_than_are_read_is_refused(own: MongoServer) -> None:
    topics = [f"t/{number}" for number in range(1_001)]
    own.connect().mqtt.mqtt_acl.update_one({"username": "dev1"}, {"$set": {"publish": topics}})
    async with opened(BACKEND, table(own)) as backend:
        answer = await backend.authenticate(Client("c", "dev1"), b"pw-1")
    assert isinstance(answer, Refusal)
    assert not answer.authorized


DOCUMENTS = {
    "mqtt_user": [{"username": name, "password": digest(password)} for name, password in PEOPLE.items()],
    "mqtt_acl": [{"username": name, "publish": [f"own/{name}/#"]} for name in PEOPLE],
}


@contextlib.asynccontextmanager
async def replica_set(count: int = 3) -> AsyncIterator[list[FakeMongo]]:
    """Members that agree on the first as primary."""
    async with contextlib.AsyncExitStack() as stack:
        members = [await stack.enter_async_context(FakeMongo(DOCUMENTS)) for _ in range(count)]
        for member in members:
            member.hosts = [one.address for one in members]
            member.primary = members[0].address
        yield members


async def test_a_replica_set_is_found_from_one_member_and_outlives_its_primary() -> None:
    async with replica_set() as members:
        raw = {"servers": [members[1].address], "replica_set": "rs0", "timeout": 2}
        async with logins(instance(BACKEND, raw)) as log:
            assert (await log("dev1", b"pw-1", "c1")).code == 0
            for number in range(100):  # until the others are known, the first may answer
                assert (await log("dev1", b"pw-1", f"d{number}")).code == 0
                if members[0].finds:
                    break
                await asyncio.sleep(0.02)
            members[1].finds.clear()
            assert (await log("dev1", b"pw-1", "c")).code == 0
            assert not members[1].finds, "the primary is asked, which nobody wrote down"
            for member in members[1:]:
                member.primary = None
            await members[0].die()
            await recovers(log, "dev2", b"pw-2", "mongodb")
            assert members[1].finds or members[2].finds, "a secondary answers until there is a primary"
            for member in members[1:]:
                member.primary = members[2].address
            await recovers(log, "dev3", b"pw-3", "mongodb")
            assert (await log("dev3", b"no", "c2")).code == 0x86


async def test_another_set_than_the_one_that_was_named_is_not_asked() -> None:
    async with replica_set(1) as members:
        members[0].set_name = "elsewhere"
        async with opened(BACKEND, {"servers": [members[0].address], "replica_set": "rs0", "timeout": 1}) as backend:
            await unavailable(backend, "dev1", b"pw-1", 1 + 4 * PATIENCE)
        assert not members[0].finds


@pytest.mark.parametrize(
    ("code", "name", "fatal"),
    [(10107, "NotWritablePrimary", False), (11600, "InterruptedAtShutdown", False), (13, "Unauthorized", True),
     (50, "MaxTimeMSExpired", True), (2, "BadValue", True), (26, "NamespaceNotFound", True)],
)  # fmt: skip
async def test_errors_of_the_server_are_errors_and_no_verdicts(code: int, name: str, fatal: bool) -> None:
    """The driver asks once more after those that say that another member has taken over."""
    async with replica_set() as members:
        raw = {"servers": [members[0].address], "replica_set": "rs0", "timeout": 2}
        async with opened(BACKEND, raw) as backend:
            for _ in range(2):
                members[0].errors = [(code, name)]
                if fatal:
                    with pytest.raises(BackendUnavailable, match=name):
                        await backend.authenticate(Client("c", "dev1"), b"pw-1")
                else:
                    assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
                assert await backend.authenticate(Client("c", "dev1"), b"no") is DENY


async def test_a_login_the_server_refuses_is_told_without_the_password() -> None:
    async with replica_set() as members:
        raw = {"servers": [members[0].address], "replica_set": "rs0", "timeout": 2}
        for mechanism in ("SCRAM-SHA-1", "SCRAM-SHA-256"):
            login = {"username": "svc", "password": "hush-hush", "auth_mechanism": mechanism}
            async with opened(BACKEND, {**raw, **login}) as backend:
                with pytest.raises(BackendUnavailable, match="login is refused") as caught:
                    await backend.check()
                assert "hush-hush" not in str(caught.value)
        assert members[0].logins >= 2
        assert not members[0].finds
