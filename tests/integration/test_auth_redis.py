"""Logins against a real Redis: one server, sentinels, a cluster."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("redis")

from auth.redis import BACKEND, RedisConfig
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from tests import nosql_servers
from tests.integration.auth_harness import (
    PEOPLE,
    NetworkSuite,
    allowed,
    cancelled_and_interleaved,
    digest,
    instance,
    logins,
    opened,
    recovers,
    unavailable,
)
from tests.nosql_servers import MASTER, Cluster, RedisServer, Sentinels, or_skip
from tests.servers import PATIENCE, Certificates

DENY, IGNORE = Verdict.DENY, Verdict.IGNORE


def fill(client: Any) -> None:
    """EMQ's keys: hashes of users and of rights."""
    for name, password in PEOPLE.items():
        client.hset(f"mqtt_user:{name}", mapping={"password": digest(password, "pepper"), "salt": "pepper"})
        client.hset(f"mqtt_acl:{name}", mapping={f"own/{name}/#": "3", "news/+": "1", "in/%c": "2", "eq #": "1"})
    client.hset("mqtt_user:root", mapping={"password": digest(b"root-pw"), "is_superuser": "1"})
    client.hset("mqtt_user:emqx", mapping={"password_hash": digest(b"emqx-pw", "s"), "salt": "s"})
    client.hset("mqtt_acl:emqx", mapping={
        "a/${username}": "publish", "b/#": "subscribe", "c": "all", "d": '{"action": "publish", "qos": [0, 1, 2]}',
        "e": '{"action": "publish", "qos": [1], "retain": true}', "f": "9", "g/#/x": "3",
    })  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Read only."""
    with or_skip("redis", nosql_servers.redis) as server:
        fill(server.connect())
        yield server


@pytest.fixture
def own() -> Iterator[RedisServer]:
    """To change and to stop."""
    with or_skip("redis", nosql_servers.redis) as server:
        fill(server.connect())
        yield server


def table(server: Any, **more: Any) -> dict[str, Any]:
    return {"servers": [f"127.0.0.1:{server.port}"], "timeout": 5, **more}


async def test_emqs_keys_work_unchanged(server: RedisServer) -> None:
    async with logins(instance(BACKEND, table(server))) as log:
        may, dev1 = log.gate, await log("dev1", b"pw-1", "c1")
        assert dev1.code == 0
        assert may.may_publish(dev1.principal, "own/dev1/x") == 1
        assert may.may_publish(dev1.principal, "own/dev2/x") == 0
        assert may.may_subscribe(dev1.principal, "own/dev1/#") == 1
        assert may.may_subscribe(dev1.principal, "news/+") == 1
        assert may.may_publish(dev1.principal, "news/a") == 0
        assert may.may_publish(dev1.principal, "in/c1") == 1
        assert may.may_publish(dev1.principal, "in/c2") == 0
        assert may.may_subscribe(dev1.principal, "#") == 1, "eq: that filter as it is written"
        assert may.may_receive(dev1.principal, "else") == 0, "and nothing it would match"
        root = await log("root", b"root-pw", "c2")
        assert root.principal.superuser
        for name, password in (("dev1", b"pw-2"), ("dev1", b""), ("nobody", b"pw-1"), ("root", b"ROOT-PW")):
            assert (await log(name, password, "c3")).code == 0x86


async def test_emqxs_keys_work_unchanged(server: RedisServer) -> None:
    command = "HMGET mqtt_user:${username} password_hash salt is_superuser"
    form = {"name": "sha256", "salt_position": "prefix"}
    async with logins(instance(BACKEND, table(server, auth_cmd=command, password_hash=form))) as log:
        may, emqx = log.gate, (await log("emqx", b"emqx-pw", "c")).principal
        assert may.may_publish(emqx, "a/emqx") == 1
        assert may.may_subscribe(emqx, "b/x/y") == 1
        assert may.may_publish(emqx, "b/x") == 0
        assert may.may_publish(emqx, "c") == may.may_subscribe(emqx, "c") == 1
        assert may.may_publish(emqx, "d") == 1
        assert may.publishable(emqx, "e") == 0b001000, "QoS 1, retained"
        for topic in ("f", "g/1/x"):
            assert may.publishable(emqx, topic) == 0, "a permission that cannot be understood is none"


async def test_the_keys_of_mosquitto_go_auth(own: RedisServer) -> None:
    client = own.connect()
    client.set("alice", "$2b$04$abcdefghijklmnopqrstuu5PnJjBGjHaGMEjlxcXx4nJsJ3fKDWpG")  # of no password we know
    client.set("bob", "PBKDF2$sha512$1000$c2FsdA==$" + _pbkdf2(b"bob-pw", b"salt"))
    client.set("bob:su", "false")
    client.set("carol", "PBKDF2$sha512$1000$c2FsdA==$" + _pbkdf2(b"carol-pw", b"salt"))
    client.set("carol:su", "true")
    client.sadd("bob:racls", "read/#")
    client.sadd("bob:wacls", "write/%u")
    more = {
        "auth_cmd": "GET ${username}", "super_cmd": "GET ${username}:su", "acl_cmd": "", "password_hash": "auto",
        "acl_sets": {"${username}:racls": "subscribe", "${username}:wacls": "publish"},
    }  # fmt: skip
    async with logins(instance(BACKEND, table(own, **more))) as log:
        bob = (await log("bob", b"bob-pw", "c1")).principal
        assert not bob.superuser
        assert log.gate.may_subscribe(bob, "read/x") == 1
        assert log.gate.may_publish(bob, "write/bob") == 1
        assert log.gate.may_publish(bob, "read/x") == 0
        assert (await log("carol", b"carol-pw", "c2")).principal.superuser
        assert (await log("alice", b"x", "c3")).code == 0x86
        # these would name other keys than their own
        for name in ("carol:su", "bob:racls", "common", "{bob}"):
            assert (await log(name, b"true", "c4")).code == 0x86
            assert (await log(name, b"bob-pw", "c4")).code == 0x86


def _pbkdf2(password: bytes, salt: bytes) -> str:
    import base64

    return base64.b64encode(hashlib.pbkdf2_hmac("sha512", password, salt, 1000)).decode()


@pytest.mark.parametrize(
    "name",
    [
        "dev1:su", "common", "dev1 x", "dev1\r\nGET mqtt_user:root", "{dev1}", " dev1", "dev1\n", "DEV1", "*", "?",
        "dev1\tpassword", "${username}", "%u", "\x01", "d\x00ev1", "dev1\x00", "\ud800", "x" * 2_000,
    ],
)  # fmt: skip
async def test_a21_a_name_is_one_key_and_nothing_else(server: RedisServer, name: str) -> None:
    """A-21: separators, line ends, NUL, braces."""
    monitor = server.connect()
    before = monitor.info("commandstats").get("cmdstat_hgetall", {}).get("calls", 0)
    async with opened(BACKEND, table(server)) as backend:
        answer = await backend.authenticate(Client("c", name, "127.0.0.1"), b"pw-1")
        assert answer is IGNORE or isinstance(answer, Refusal)
    assert monitor.info("commandstats").get("cmdstat_hgetall", {}).get("calls", 0) == before, "no rights were read"


async def test_a21_a_name_with_separators_has_a_key_of_its_own(own: RedisServer) -> None:
    client = own.connect()
    for name in ("aa:bb:cc", "{tag}", "a b", "ü", "a\r\nb"):
        client.hset(f"mqtt_user:{name}", mapping={"password": digest(b"pw")})
    async with opened(BACKEND, table(own)) as backend:
        for name in ("aa:bb:cc", "{tag}", "a b", "ü", "a\r\nb"):
            assert allowed(await backend.authenticate(Client("c", name), b"pw"))


async def test_a21_a_value_of_another_type_or_none_denies(own: RedisServer) -> None:
    client = own.connect()
    client.set("mqtt_user:text", digest(b"pw"))
    client.rpush("mqtt_user:list", digest(b"pw"))
    client.hset("mqtt_user:bare", mapping={"is_superuser": "1"})
    client.hset("mqtt_user:empty", mapping={"password": "", "is_superuser": "1"})
    client.hset("mqtt_user:odd", mapping={"password": "$9$what", "is_superuser": "1"})
    client.hset("mqtt_user:acl", mapping={"password": digest(b"pw")})
    client.set("mqtt_acl:acl", "3")
    async with opened(BACKEND, table(own)) as backend:
        for name in ("text", "list", "bare", "empty", "odd", "acl"):
            for password in (b"pw", b"", b"1", b"None"):
                answer = await backend.authenticate(Client("c", name), password)
                assert answer is DENY or isinstance(answer, Refusal), name


@pytest.mark.parametrize(
    ("stored", "superuser"),
    [("1", True), ("true", True), ("True", True), ("0", False), ("false", False), (" ", False), ("", False),
     ("null", False), ("[]", False), ("yes", False), ("2", False)],
)  # fmt: skip
async def test_z22_only_a_clear_yes_makes_a_superuser(own: RedisServer, stored: str, superuser: bool) -> None:
    own.connect().hset("mqtt_user:flag", mapping={"password": digest(b"pw"), "is_superuser": stored})
    async with opened(BACKEND, table(own)) as backend:
        answer = await backend.authenticate(Client("c", "flag"), b"pw")
    assert isinstance(answer, Grant)
    assert answer.superuser is superuser


@pytest.mark.parametrize(
    ("more", "say"),
    [
        ({"auth_cmd": "FLUSHALL"}, "is not among"),
        ({"auth_cmd": "EVAL x 0 ${username}"}, "is not among"),
        ({"auth_cmd": "HMGET mqtt_user password"}, "needs a placeholder"),
        ({"auth_cmd": "HMGET mqtt_user:${username}"}, "too few"),
        ({"auth_cmd": "GET ${username} x"}, "too many"),
        ({"auth_cmd": "GET ${password}"}, "not known"),
        ({"auth_cmd": ""}, "auth_cmd"),
        ({"acl_cmd": "GET ${username}"}, "HGETALL"),
        ({"super_cmd": "HGETALL ${username}"}, "super_cmd"),
        ({"servers": ["redis.example.com:6379"]}, "allow_cleartext"),
        ({"servers": ["127.0.0.1:1", "127.0.0.1:2"]}, "sentinel"),
        ({"mode": "cluster", "database": 1}, "database 0"),
        ({"password_hash": "rot13"}, "rot13"),
        ({"key": "x.pem"}, "without certificate"),
        ({"urll": 1}, "urll"),
    ],
)  # fmt: skip
def test_tables_that_cannot_work_are_refused(more: dict[str, Any], say: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RedisConfig.model_validate({"password": "hush", **more})
    assert say in str(caught.value)
    assert "hush" not in str(caught.value)


class TestNetwork(NetworkSuite):
    backend = BACKEND
    table = staticmethod(table)

    def test_the_example_on_the_command_line(self, server: RedisServer, tmp_path: Path, free_port: Any) -> None:
        dead = f"127.0.0.1:{free_port()}"
        self.on_the_command_line(
            tmp_path, "24-auth-redis", "127.0.0.1:6379", server.address, dead, "auth.redis mqtt_acl:dev1: allow",
            digest(b"pw-1", "pepper"),
        )  # fmt: skip


async def test_a_reset_connection_is_replaced_without_an_error(server: RedisServer, start_proxy: Any) -> None:
    proxy = await start_proxy(server.port)
    async with opened(BACKEND, table(proxy)) as backend:
        for _ in range(5):
            answers = await asyncio.gather(*(backend.authenticate(Client("c", n), pw) for n, pw in PEOPLE.items()))
            assert all(map(allowed, answers))
            assert await proxy.reset() > 0


async def test_slow_answers_are_waited_for_until_the_deadline(server: RedisServer, start_proxy: Any) -> None:
    proxy = await start_proxy(server.port)
    proxy.delay = 0.05
    async with opened(BACKEND, table(proxy, timeout=2)) as backend:
        assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
        proxy.delay = 1.5
        await unavailable(backend, "dev1", b"pw-1", 2 + 4 * PATIENCE)
        proxy.delay = 0.0
        await proxy.cut()
        assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))


async def test_an_answer_that_breaks_off(server: RedisServer, start_proxy: Any) -> None:
    """Cut within the answer to each command in turn: an error or the right verdict, never another."""
    proxy = await start_proxy(server.port)
    failed = 0
    async with opened(BACKEND, table(proxy)) as backend:
        for count in range(1, 60, 7):
            assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
            proxy.cut_after(count, "down")
            try:
                assert allowed(await backend.authenticate(Client("c", "dev2"), b"pw-2"))
            except BackendUnavailable:
                failed += 1
            assert await backend.authenticate(Client("c", "dev2"), b"pw-1") is DENY
    assert proxy.counts.cut >= 5


async def test_a_server_that_is_started_again_under_load(own: RedisServer) -> None:
    async with logins(instance(BACKEND, table(own))) as log:
        codes: list[int | None] = []
        stopped = asyncio.Event()

        async def load(worker: int) -> None:
            number = 0
            while not stopped.is_set() and number < 5_000:
                number += 1
                name, good = f"dev{number % 20}", number % 2
                channel = await log(name, PEOPLE[name] if good else b"no", f"w{worker}-{number}")
                assert channel.code in ((0, 0x88) if good else (0x86, 0x88))
                codes.append(channel.code)
                await asyncio.sleep(0.002)

        workers = [asyncio.create_task(load(number)) for number in range(4)]
        await asyncio.sleep(0.3)
        own.stop()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(own.start)
        fill(own.connect())
        await recovers(log, "dev1", b"pw-1", "redis")
        stopped.set()
        await asyncio.gather(*workers)
    assert {0, 0x86, 0x88} <= set(codes)


async def test_tls_is_verified(certs: Certificates) -> None:
    with or_skip("redis", nosql_servers.redis, tls=certs) as server:
        fill(server.connect())
        tls = {"servers": [f"127.0.0.1:{server.tls_port}"], "tls": True, "timeout": 2}
        async with opened(BACKEND, {**tls, "ca": str(certs.ca)}) as backend:
            assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
        own = {"certificate": str(certs.client), "key": str(certs.client_key)}
        async with opened(BACKEND, {**tls, "ca": str(certs.ca), **own}) as backend:
            assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
        for wrong in ({"ca": str(certs.stranger_ca)}, {}):
            async with opened(BACKEND, {**tls, **wrong}) as backend:
                await unavailable(backend, "dev1", b"pw-1", 3.0)
    with pytest.raises(ValueError, match="ca: "):
        async with opened(BACKEND, {**tls, "ca": str(certs.server_key)}):
            pass


async def test_the_servers_own_password() -> None:
    with or_skip("redis", nosql_servers.redis, password="server-pw") as server:
        fill(server.connect())
        async with opened(BACKEND, table(server, password="server-pw")) as backend:
            await backend.check()
            assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
        for wrong in ({}, {"password": "other"}):
            async with opened(BACKEND, table(server, **wrong)) as backend:
                with pytest.raises(BackendUnavailable) as caught:
                    await backend.check()
                assert "server-pw" not in str(caught.value)
                assert "other" not in str(caught.value)


async def test_rights_follow_the_database(own: RedisServer) -> None:
    async with logins(instance(BACKEND, table(own, refresh=0.001))) as log:
        dev1 = (await log("dev1", b"pw-1", "c")).principal
        assert log.gate.may_publish(dev1, "more/x") == 0
        own.connect().hset("mqtt_acl:dev1", "more/x", "2")
        await asyncio.sleep(0.002)
        await log.gate._refresher.run_due()
        assert log.gate.may_publish(dev1, "more/x") == 1
        kicked: list[Any] = []
        log.gate.kick = lambda clientid, code: kicked.append((clientid, code))
        own.connect().delete("mqtt_user:dev1")
        await asyncio.sleep(0.002)
        await log.gate._refresher.run_due()
        assert kicked == [("c", 0x87)]
        assert log.gate.may_publish(dev1, "more/x") == 0


async def test_changes_are_told_within_a_second_also_after_an_outage(own: RedisServer, start_proxy: Any) -> None:
    proxy = await start_proxy(own.port)
    heard: list[str | None] = []
    async with opened(BACKEND, table(proxy, changes="mqtt_changes")) as backend:
        backend.on_change = heard.append

        async def until(reached: Callable[[], bool], seconds: float) -> None:
            async with asyncio.timeout(seconds):
                while not reached():  # noqa: ASYNC110 (the list is filled from elsewhere)
                    await asyncio.sleep(0.01)

        await until(lambda: own.connect().pubsub_numsub("mqtt_changes")[0][1] == 1, 10)
        took = []
        for message in ("dev1", "*", "ü"):
            began = time.monotonic()
            own.connect().publish("mqtt_changes", message)
            await until(lambda m=message: heard[-1:] == [None if m == "*" else m], 5)  # type: ignore[misc]
            took.append(time.monotonic() - began)
        assert min(took) < 1
        await proxy.down()
        heard.clear()
        own.connect().publish("mqtt_changes", "missed")
        await proxy.up()
        await until(lambda: heard == [None], 10)
        assert "missed" not in heard, "what was missed counts as everything"


async def test_a_client_with_more_rules_than_are_read_is_refused(own: RedisServer) -> None:
    own.connect().hset("mqtt_acl:dev1", mapping={f"t/{number}": "1" for number in range(1_001)})
    async with opened(BACKEND, table(own)) as backend:
        answer = await backend.authenticate(Client("c", "dev1"), b"pw-1")
    assert isinstance(answer, Refusal)
    assert not answer.authorized


@pytest.mark.timeout(120)
async def test_sentinels_lead_to_the_master_and_to_the_next_one() -> None:
    with or_skip("redis", nosql_servers.redis_sentinel) as group:
        await _fail_over(group)


async def _fail_over(group: Sentinels) -> None:
    fill(group.master.connect())
    raw = {"mode": "sentinel", "servers": group.addresses, "master": MASTER, "timeout": 3}
    async with logins(instance(BACKEND, raw)) as log:
        await recovers(log, "dev1", b"pw-1", "redis")
        deadline = time.monotonic() + 5 * PATIENCE
        while not group.replica.connect().exists("mqtt_user:dev1"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        group.sentinels[0].freeze()
        assert (await log("dev2", b"pw-2", "c1")).code == 0, "one sentinel that hangs is not asked for ever"
        group.sentinels[0].thaw()
        group.master.stop()
        deadline, number = time.monotonic() + 60 * PATIENCE, 0
        while not all(one.connect().sentinel_master(MASTER)["port"] == group.replica.port for one in group.sentinels):
            assert time.monotonic() < deadline
            assert (await log("dev1", b"pw-1", f"d{number}")).code in (0, 0x88)
            number += 1
            await asyncio.sleep(0.1)
        await recovers(log, "dev1", b"pw-1", "redis")
        assert (await log("dev2", b"no", "c2")).code == 0x86
    async with opened(BACKEND, {**raw, "master": "other"}) as backend:
        await unavailable(backend, "dev1", b"pw-1", 3 + 4 * PATIENCE)


async def test_a_cluster_is_asked_where_the_key_is() -> None:
    with or_skip("redis", nosql_servers.redis_cluster) as cluster:
        await _slots(cluster)


async def _slots(cluster: Cluster) -> None:
    await asyncio.to_thread(lambda: fill(cluster.connect()))
    raw = {"mode": "cluster", "servers": cluster.addresses[:2], "timeout": 3}

    def right(name: str, answer: Grant) -> bool:
        return f"own/{name}/#" in {rule.filter.text for rule in answer.rules if rule.filter is not None}

    heard: list[str | None] = []
    async with opened(BACKEND, {**raw, "changes": "ch"}) as backend:
        backend.on_change = heard.append
        judged, cancelled = await cancelled_and_interleaved(backend, PEOPLE, right, count=300)
        assert judged > 150
        assert cancelled > 0
        cluster.nodes[2].connect().publish("ch", "dev1")  # every node repeats it
        async with asyncio.timeout(5):
            while "dev1" not in heard:  # noqa: ASYNC110 (the list is filled from elsewhere)
                await asyncio.sleep(0.01)
    async with logins(instance(BACKEND, raw)) as log:
        assert (await log("dev1", b"pw-1", "c")).code == 0
        cluster.nodes[0].stop()
        codes = {name: (await log(name, pw, f"x-{name}")).code for name, pw in list(PEOPLE.items())[:4]}
        assert set(codes.values()) <= {0, 0x88}
        await asyncio.to_thread(cluster.nodes[0].start)
        deadline = time.monotonic() + 15 * PATIENCE
        while not all(node.connect().cluster("info")["cluster_state"] == "ok" for node in cluster.nodes):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        await asyncio.to_thread(lambda: fill(cluster.connect()))
        await recovers(log, "dev1", b"pw-1", "redis")
        for name, password in PEOPLE.items():
            assert (await log(name, password, f"y-{name}")).code == 0


async def test_a46_a_change_reaches_connected_clients_within_a_second(own: RedisServer) -> None:
    async with logins(instance(BACKEND, table(own, changes="mqtt_changes"))) as log:
        kicked: list[Any] = []
        log.gate.kick = lambda clientid, code: kicked.append((clientid, code))
        dev1, dev2 = [(await log(f"dev{n}", PEOPLE[f"dev{n}"], f"c{n}")).principal for n in (1, 2)]
        client = own.connect()
        async with asyncio.timeout(10):
            while client.pubsub_numsub("mqtt_changes")[0][1] < 1:  # noqa: ASYNC110 (Redis does not tell)
                await asyncio.sleep(0.01)

        async def until(reached: Callable[[], bool]) -> float:
            began = time.monotonic()
            async with asyncio.timeout(5):
                while not reached():  # noqa: ASYNC110 (the gate does not tell)
                    await asyncio.sleep(0.01)
            return time.monotonic() - began

        client.hset("mqtt_acl:dev1", "new/x", "2")
        client.hset("mqtt_acl:dev2", "new/x", "2")
        client.publish("mqtt_changes", "dev1")
        first = await until(lambda: log.gate.may_publish(dev1, "new/x") == 1)
        assert log.gate.may_publish(dev2, "new/x") == 0, "who was not named waits for `refresh`"
        client.hset("mqtt_user:dev1", "password", digest(b"other", "pepper"))
        client.delete("mqtt_user:dev2")
        client.publish("mqtt_changes", "*")
        second = await until(lambda: kicked == [("c2", 0x87)])
        assert min(first, second) < 1
        for name, number in (("dev1", 1), ("dev2", 2)):
            assert (await log(name, PEOPLE[name], f"c{number}")).code == 0x86, "not from the cache"
