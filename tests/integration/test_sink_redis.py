"""The Redis sink against a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("redis")

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks.redis import BACKEND, RedisConfig
from tests import nosql_servers
from tests.clock import clock
from tests.integration.sink_suite import MOMENT, SECRET, SinkSuite, deliver, msgid, opened, records
from tests.ledger import stamp
from tests.nosql_servers import RedisServer, or_skip
from tests.proxy import Proxy
from tests.servers import PATIENCE


@dataclass
class Streams:
    """A Redis of the test's own; what is stored is in the stream, or list, `t:dev`."""

    server: RedisServer

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def client(self) -> Any:
        return self.server.connect()

    async def payloads(self) -> list[bytes]:
        def read() -> list[bytes]:
            kind = self.client.type("t:dev")
            if kind == "list":
                return [item.encode() for item in self.client.lrange("t:dev", 0, -1)]
            return [fields["payload"].encode() for _, fields in self.client.xrange("t:dev")]

        return await asyncio.to_thread(read)

    async def stop(self) -> None:
        self.server.stop()

    async def start(self) -> None:
        self.server.start()  # in this thread: the process ends with the one that started it


@pytest.fixture
def target() -> Iterator[Streams]:
    with or_skip("redis", nosql_servers.redis) as server:
        yield Streams(server)


class OfRedis(SinkSuite):
    backend = BACKEND

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        return {"servers": [f"127.0.0.1:{port}"], "redis_key": "t:${topic[1]}", **more}

    async def plant(self, target: Streams) -> dict[str, Any]:
        target.client.set("t:other", "neither a stream nor a list")
        return {}

    def poison(self, number: int) -> Record:
        return Record("t/other", stamp("dev", number), msgid=msgid(number), ts=MOMENT, clientid="dev")


class TestStreams(OfRedis):
    """`XADD`: once, by the message's own id."""

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        return super().raw(port, **{"order_key": "${topic[1]}", **more})

    async def test_an_entry_has_the_messages_id_and_its_fields(self, target: Streams) -> None:
        async with opened(BACKEND, {**self.raw(target.port), "fields": {
            "p": "${payload}", "q": "${qos}", "v": "${payload.v}", "none": "${payload.none}", "u": "${username}",
        }}) as sink:  # fmt: skip
            await sink.write(records(7, payload=b'{"v": [1, null]}'))
        [(ident, fields)] = target.client.xrange("t:dev")
        assert ident == f"{MOMENT + 7}-{(1 << 48) + 7}"
        assert fields == {"p": '{"v": [1, null]}', "q": "1", "v": "[1,null]", "u": "alice"}

    async def test_a_late_id_is_stored_behind_the_newest_and_never_taken_for_a_duplicate(self, target: Streams) -> None:
        """Another writer, or a clock, is ahead of the ids of messages."""
        target.client.xadd("t:dev", {"payload": stamp("other", 1)}, id=f"{MOMENT + 1_000_000}-5")
        async with opened(BACKEND, self.raw(target.port)) as sink:
            await sink.write(records(1, 2, 3))
        ids = [ident for ident, _ in target.client.xrange("t:dev")]
        assert ids == [f"{MOMENT + 1_000_000}-{n}" for n in (5, 6, 7, 8)]
        assert (await target.payloads())[1:] == [stamp("dev", n) for n in (1, 2, 3)]

    async def test_an_emptied_stream_takes_late_entries_too(self, target: Streams) -> None:
        target.client.xadd("t:dev", {"payload": "x"}, id="99999999999999-5")
        target.client.xdel("t:dev", "99999999999999-5")
        async with opened(BACKEND, self.raw(target.port)) as sink:
            await sink.write(records(1, 2))
        assert await target.payloads() == [stamp("dev", 1), stamp("dev", 2)]

    async def test_a_stream_keeps_its_newest_entries(self, target: Streams) -> None:
        async with opened(BACKEND, self.raw(target.port, max_length=500)) as sink:
            for start in range(1, 2_001, 200):
                await sink.write(records(*range(start, start + 200)))
        payloads = await target.payloads()
        assert 500 <= len(payloads) < 800
        assert payloads[-1] == stamp("dev", 2_000)

    async def test_messages_nobody_vouches_for_get_ids_of_the_server(self, target: Streams) -> None:
        async with opened(BACKEND, self.raw(target.port)) as sink:
            await sink.write([Record("t/dev", stamp("dev", n)) for n in (1, 2)])
        assert await target.payloads() == [stamp("dev", 1), stamp("dev", 2)]

    async def test_full_memory_is_waited_for(self, target: Streams) -> None:
        async with opened(BACKEND, self.raw(target.port)) as sink:
            await sink.write(records(1))
            target.client.config_set("maxmemory", "1")
            with pytest.raises(NotConnected, match=r"OOM|memory"):
                await sink.write(records(2, 3))
            target.client.config_set("maxmemory", "0")
            await deliver(sink, records(2, 3))
        assert await target.payloads() == [stamp("dev", n) for n in (1, 2, 3)]

    async def test_a_key_of_another_type_is_fatal_where_it_is_fixed(self, target: Streams) -> None:
        target.client.set("fixed", "text")
        async with opened(BACKEND, {**self.raw(target.port), "redis_key": "fixed"}) as sink:
            for verb in (sink.write(records(1)), sink.check()):
                with pytest.raises(Fatal, match="fixed"):
                    await verb
            target.client.delete("fixed")
            await sink.check()
            await sink.write(records(1))

    async def test_s21_a_wrong_password_and_a_missing_right_stop_the_sink(
        self, target: Streams, caplog: pytest.LogCaptureFixture
    ) -> None:
        target.client.acl_setuser("writer", enabled=True, passwords=["+right"], keys=["t:*"], commands=["+ping"])
        keys = {**self.raw(target.port), "username": "writer"}
        assert "password" in await self.refused(caplog, Fatal, {**keys, "password": SECRET})
        async with opened(BACKEND, {**keys, "password": "right"}) as sink:
            await sink.check()
            with pytest.raises(Fatal, match="permission"):
                await sink.write(records(1))
            target.client.acl_setuser("writer", enabled=True, commands=["+xadd"])
            await sink.write(records(1))


class TestLists(OfRedis):
    """`RPUSH`: Redis cannot tell what comes again."""

    once = False

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        return super().raw(port, command="RPUSH", **more)

    async def test_what_is_stored_is_not_sent_again_with_the_rest(self, target: Streams) -> None:
        """A batch of which one record has to come again."""
        async with opened(BACKEND, self.raw(target.port)) as sink:
            target.client.execute_command("ACL", "SETUSER", "default", "resetkeys", "~t:dev")
            batch = [*records(1, 2), self.poison(3), *records(4)]
            for _ in range(3):
                with pytest.raises(Fatal):
                    await sink.write(batch)
            assert await target.payloads() == [stamp("dev", n) for n in (1, 2, 4)]

    async def test_a_list_keeps_its_newest_items(self, target: Streams) -> None:
        for command, kept in (("RPUSH", range(91, 101)), ("LPUSH", range(100, 90, -1))):
            target.client.delete("t:dev")
            async with opened(BACKEND, {**self.raw(target.port, max_length=10), "command": command}) as sink:
                await sink.write(records(*range(1, 51)))
                await sink.write(records(*range(51, 101)))
            assert await target.payloads() == [stamp("dev", n) for n in kept]


async def test_hashes_and_values_hold_the_latest_and_expire(target: Streams) -> None:
    keys = {"filters": ["#"], "servers": [f"127.0.0.1:{target.port}"], "expire": "90s"}
    fields = {"value": "${payload.v}", "time": "${ts}"}
    batch = [r for n in range(1, 51) for r in records(n, payload=b'{"v": %d}' % n, clientid=f"dev-{n % 5}")]
    for command in ("HSET", "SET"):
        async with opened(BACKEND, {**keys, "command": command, "redis_key": command + ":${clientid}",
                                    "fields": fields, "value": "${payload.v}"}) as sink:  # fmt: skip
            await sink.write(batch)
            await sink.write(batch)
    for n in range(5):
        newest = n + 45 if n else 50
        assert target.client.hgetall(f"HSET:dev-{n}") == {"value": str(newest), "time": str(MOMENT + newest)}
        assert target.client.get(f"SET:dev-{n}") == str(newest)
        assert 80 < target.client.ttl(f"HSET:dev-{n}") <= 90
        assert 80 < target.client.ttl(f"SET:dev-{n}") <= 90


async def test_who_listens_gets_what_is_published(target: Streams) -> None:
    listener = target.client.pubsub()
    listener.subscribe("live:dev")
    assert listener.get_message(timeout=5)["type"] == "subscribe"
    keys = {"servers": [f"127.0.0.1:{target.port}"], "command": "PUBLISH", "redis_key": "live:${clientid}"}
    async with opened(BACKEND, {**keys, "value": "${.}"}) as sink:
        await sink.check()
        await sink.write(records(1, 2))
    heard = [listener.get_message(timeout=5)["data"] for _ in range(2)]
    assert ['"payload":"dev|1|"' in heard[0], '"payload":"dev|2|"' in heard[1]] == [True, True]
    listener.close()


async def test_s25_a_key_without_its_value_is_a_dead_letter(target: Streams) -> None:
    keys = {"servers": [f"127.0.0.1:{target.port}"], "redis_key": "t:${payload.room}"}
    async with opened(BACKEND, keys) as sink:
        with pytest.raises(BatchFailed) as failed:
            await sink.write(records(1, payload=b'{"room": "a"}') + records(2, payload=b"{}"))
    assert failed.value.failed == {1: "cannot be rendered for Redis: ${payload.room} has no value"}
    assert target.client.keys("*") == ["t:a"]


async def test_s28_a_server_of_many_keys_is_checked_quickly(target: Streams) -> None:
    """S-28."""
    await asyncio.to_thread(target.client.mset, {f"device:{n}": n for n in range(100_000)})
    async with Proxy("127.0.0.1", target.port) as proxy:
        for key in ("t:dev", "t:${clientid}"):
            keys = {"servers": [f"127.0.0.1:{proxy.port}"], "redis_key": key}
            async with opened(BACKEND, keys) as sink:
                before, began = proxy.counts.bytes_down, clock()
                await sink.check()
                assert clock() - began < PATIENCE
                assert 0 < proxy.counts.bytes_down - before < 64 << 10


async def test_s29_what_a_device_sends_is_one_argument(target: Streams) -> None:
    nasty = "a\r\n*1\r\n$8\r\nFLUSHALL\r\n \0'\""
    keys = {"servers": [f"127.0.0.1:{target.port}"], "redis_key": "t:${clientid}", "command": "HSET"}
    async with opened(BACKEND, {**keys, "fields": {"x": "${payload}"}}) as sink:
        await sink.write(records(1, clientid=nasty, payload=nasty.encode()))
    assert target.client.hgetall(f"t:{nasty}") == {"x": nasty}


@pytest.mark.parametrize("keys", [
    {"redis_key": ""}, {"redis_key": "${topic}"}, {"redis_key": "a", "fields": {}}, {"redis_key": "a${nothing}"},
    {"redis_key": "a", "command": "FLUSHALL"}, {"redis_key": "a", "servers": ["192.0.2.1:6379"]},
])  # fmt: skip
def test_a_configuration_that_cannot_work_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RedisConfig.model_validate({"filters": ["#"], **keys})


async def test_a_cluster_stores_each_key_at_its_node() -> None:
    with or_skip("redis", nosql_servers.redis_cluster) as cluster:
        keys = {"mode": "cluster", "servers": cluster.addresses, "redis_key": "t:${clientid}", "timeout": "3s"}
        batch = [r for n in range(1, 301) for r in records(n, clientid=f"dev-{n % 30}")]
        async with opened(BACKEND, keys) as sink:
            await sink.check()
            await sink.write(batch)
            await sink.write(batch)
            client = cluster.connect()
            lengths = {client.xlen(f"t:dev-{n}") for n in range(30)}
            assert lengths == {10}
            await asyncio.to_thread(cluster.nodes[1].stop)
            with pytest.raises(NotConnected):
                await sink.write(batch)
        client.close()


async def test_sentinels_lead_to_the_new_master() -> None:
    with or_skip("redis", nosql_servers.redis_sentinel) as group:
        keys = {"mode": "sentinel", "master": nosql_servers.MASTER, "servers": group.addresses, "redis_key": "t:dev"}
        async with opened(BACKEND, {**keys, "timeout": "2s"}) as sink:
            await deliver(sink, records(1))
            await asyncio.to_thread(group.master.stop)
            await deliver(sink, records(2), 30)
        assert group.replica.connect().xlen("t:dev") >= 1
