"""A master that is no master any more, with real sentinels: logins, and what is stored, follow to the new one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("redis")

from auth.redis import BACKEND as AUTH
from broker.connectors.redis import RedisPool, RedisServer
from broker.extend.auth import BackendUnavailable
from sinks.redis import BACKEND as SINK
from tests import nosql_servers
from tests.integration.auth_harness import digest, instance, logins
from tests.integration.sink_suite import deliver, opened, records
from tests.nosql_servers import MASTER, Sentinels, or_skip
from tests.servers import PATIENCE

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def group() -> Iterator[Sentinels]:
    # what is failed over here is failed over by command or by hand, and else by nobody
    with or_skip("redis", nosql_servers.redis_sentinel, down_after=5_000) as made:
        yield made


def table(group: Sentinels, **more: Any) -> dict[str, Any]:
    return {"mode": "sentinel", "servers": group.addresses, "master": MASTER, "timeout": 1.5, **more}


async def demote(group: Sentinels) -> None:
    """The master becomes a replica of its replica while clients are connected to it: they are not disconnected, and
    are told READONLY."""

    def change() -> None:
        old, new = group.master.connect(), group.replica.connect()
        new.replicaof("NO", "ONE")
        old.replicaof("127.0.0.1", str(group.replica.port))
        assert old.role()[0] == "slave"

    await asyncio.to_thread(change)


async def elect(group: Sentinels) -> None:
    def told() -> bool:
        return all(s.connect().sentinel_master(MASTER)["port"] == group.replica.port for s in group.sentinels)

    def change() -> None:
        deadline = time.monotonic() + 30 * PATIENCE
        while not told():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    group.sentinels[0].connect().execute_command("SENTINEL", "FAILOVER", MASTER)
    await asyncio.to_thread(change)


async def test_what_is_stored_follows_to_the_new_master(group: Sentinels) -> None:
    """Batches go on while the sentinels fail over, and the first master lives on as a replica. Each batch is offered
    until it is stored; from the moment the old master is told, all of it is in the new one, once and in order. What the
    old one acknowledged before and had not passed on is lost, as with any client of Redis."""
    keys = {"mode": "sentinel", "master": MASTER, "servers": group.addresses, "redis_key": "t:dev", "timeout": "2s"}
    async with opened(SINK, keys) as sink:
        await deliver(sink, records(1, 2), 10)
        assert group.master.connect().xlen("t:dev") == 2
        await replicated(group)
        electing = asyncio.create_task(elect(group))
        number, told = 2, 0
        began = time.monotonic()
        while not told or number < told + 100:
            assert time.monotonic() - began < 60 * PATIENCE
            await deliver(sink, records(number + 1, number + 2), 30)
            number += 2
            if not told and electing.done() and group.master.connect().role()[0] == "slave":
                told = number
            await asyncio.sleep(0.02)
        await electing
    stored = [fields["payload"].split("|")[1] for _, fields in group.replica.connect().xrange("t:dev")]
    assert stored == sorted(set(stored), key=int)
    assert stored[:2] == ["1", "2"]
    assert [n for n in map(int, stored) if n > told] == list(range(told + 1, number + 1))


async def replicated(group: Sentinels) -> None:
    """Until the replica has what the master has."""

    def change() -> None:
        deadline = time.monotonic() + 10 * PATIENCE
        while group.replica.connect().info("replication").get("master_link_status") != "up":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        group.master.connect().wait(1, 5_000)

    await asyncio.to_thread(change)


@pytest.mark.parametrize("verb", ["call", "pipeline", "store"])
async def test_a_write_to_a_demoted_master_is_an_error_and_the_next_finds_the_new_one(
    group: Sentinels, verb: str
) -> None:
    """Connections that are open stay open when a master is demoted by hand; READONLY must not be taken for a fault of
    the command, nor the connection be kept."""
    config = RedisServer.model_validate({key: value for key, value in table(group).items() if key != "timeout"})
    pool = RedisPool(config, size=4, timeout=1.5)

    async def write(value: str) -> bool:
        command = ("SET", "key", value)
        try:
            if verb == "call":
                await pool.call(*command)
                return True
            answers = await getattr(pool, verb)([command])
        except BackendUnavailable:
            return False
        return not isinstance(answers[0], Exception)

    try:
        assert await write("first")
        await replicated(group)
        await demote(group)
        assert not await write("lost"), "a replica takes nothing"
        await elect_by_hand(group)
        began = time.monotonic()
        while not await write("second"):
            assert time.monotonic() - began < 10 * PATIENCE
            await asyncio.sleep(0.05)
        assert group.replica.connect().get("key") == "second"
    finally:
        await pool.close()


async def elect_by_hand(group: Sentinels) -> None:
    """The sentinels forget the old master and watch the new one."""

    def change() -> None:
        for sentinel in group.sentinels:
            client = sentinel.connect()
            client.execute_command("SENTINEL", "REMOVE", MASTER)
            client.execute_command("SENTINEL", "MONITOR", MASTER, "127.0.0.1", str(group.replica.port), "2")

    await asyncio.to_thread(change)


async def test_logins_follow_to_the_new_master_and_see_what_changed_there(group: Sentinels) -> None:
    """A password that is changed after the fail-over counts, and the old one does not: nobody goes on asking the old
    master, which answers reads as a replica."""
    people = {f"u{n}": digest(b"old-pw") for n in range(10)}
    for name, stored in people.items():
        group.master.connect().hset(f"mqtt_user:{name}", mapping={"password": stored})
    raw = table(group, password_hash="sha256", cache_ttl=0, negative_cache_ttl=0)
    async with logins(instance(AUTH, raw)) as log:
        assert {(await log(name, b"old-pw", name)).code for name in people} == {0}
        codes: list[int | None] = []
        stop = asyncio.Event()

        async def load(worker: int) -> None:
            while not stop.is_set():
                codes.append((await log(f"u{worker}", b"old-pw", f"w{worker}-{len(codes)}")).code)
                await asyncio.sleep(0.01)

        workers = [asyncio.create_task(load(number)) for number in range(4)]
        began = time.monotonic()
        await replicated(group)
        await elect(group)
        stop.set()
        await asyncio.gather(*workers)
        assert set(codes) <= {0, 0x88}, "an outage is never a wrong password"
        for name in people:
            group.replica.connect().hset(f"mqtt_user:{name}", mapping={"password": digest(b"new-pw")})
        while (await log("u1", b"new-pw", f"n{time.monotonic()}")).code:
            assert time.monotonic() - began < 40 * PATIENCE
            await asyncio.sleep(0.05)
        deadline = time.monotonic() + 30 * PATIENCE
        while group.master.connect().role()[0] != "slave":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        for name in people:
            assert (await log(name, b"new-pw", f"x{name}")).code == 0
            assert (await log(name, b"old-pw", f"y{name}")).code == 0x86
