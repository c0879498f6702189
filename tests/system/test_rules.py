"""The rules of one table on every way into the broker, and under somebody who tries what is denied."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection
from broker.client.session import NotTaken, Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests.broker import Broker, broker
from tests.system.canary import Song, canary_apart
from tests.system.resilience import ask, eventually

pytestmark = pytest.mark.timeout(120)

TABLE = """
[listeners.tcp]
bind = "127.0.0.1:0"
[listeners.ws]
bind = "127.0.0.1:0"
[listeners.unix]
path = "mqtt.sock"
[auth.people]
kind = "static"
[auth.people.users.dev]
password = "pw"
publish = ["a/${clientid}/#", "eq odd/x"]
subscribe = ["a/#", "canary/#"]
deny_subscribe = ["a/secret"]
[auth.people.users.root]
password = "pw"
superuser = true
[[auth.people.rules]]
permission = "allow"
action = "publish"
topics = ["live/#"]
retain = false
username = "dev"
[[auth.people.rules]]
permission = "allow"
action = "all"
topics = ["slow/#"]
qos = [0, 1]
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with broker(tmp_path_factory.mktemp("rules"), {"00.toml": TABLE}) as running:
        yield running


def ways(running: Broker) -> dict[str, str]:
    """The same broker over TCP, WebSocket and a Unix socket."""
    return {
        "tcp": f"mqtt://{running.ready['tcp']}",
        "ws": f"ws://{running.ready['ws']}/mqtt",
        "unix": f"unix://{running.where / 'mqtt.sock'}",
    }


class Watcher(Publisher):
    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[str, bool]] = []
        self.ended = False
        self.told: int | None = None
        self.acks: list[int] = []

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        if publish.qos:
            conn.ack(PacketType.PUBACK if publish.qos == 1 else PacketType.PUBREC, publish.packet_id)
        self.got.append((publish.topic.decode(), publish.retain))

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        self.acks.append(packet_id)
        super().on_ack(conn, packet_type, packet_id, code)

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended, self.told = True, getattr(exc, "code", None)
        super().on_lost(conn, exc)


async def login(to: str, user: str, client_id: str, **more: Any) -> Watcher:
    client = Watcher()
    client.attach(
        await Connection.connect(to, client_id=client_id, handler=client, username=user, password=b"pw", **more)
    )
    return client


async def code(client: Publisher, topic: str, **more: Any) -> int:
    try:
        await client.publish(topic, b"x", **more)
    except NotTaken as refused:
        return refused.code
    return 0


async def verdicts(to: str, name: str) -> dict[str, Any]:
    """What a client may do on one way in."""
    client = await login(to, "dev", name)
    found: dict[str, Any] = {}
    for topic in (f"a/{name}/x", "a/other/x", "odd/x", "odd/y", "x"):
        found[f"publish {topic.replace(name, 'me')}"] = await code(client, topic)
    for qos in (0, 1, 2):
        found[f"slow at {qos}"] = [await code(client, "slow/x", qos=qos) if qos else None]
        found[f"slow subscribed at {qos}"] = await client.conn.subscribe([("slow/#", qos)])
    found["retained"] = [await code(client, "live/x", retain=retain) for retain in (False, True)]
    for filter in ("a/+", "a/#", "#", "+/x", "a/secret", "$share/g/a/#", "$share/g/#", "canary/x"):
        found[f"subscribe {filter}"] = await client.conn.subscribe([(filter, 1)])
    await client.disconnect()
    return found


def test_z27_the_same_rules_on_every_way_in(running: Broker) -> None:
    """Z-27: TCP, WebSocket and Unix socket."""

    async def main() -> list[dict[str, Any]]:
        return [await verdicts(to, f"dev-{way}") for way, to in ways(running).items()]

    tcp, ws, unix = asyncio.run(main())
    assert tcp == ws == unix
    assert tcp == {
        "publish a/me/x": 0, "publish a/other/x": 0x87, "publish odd/x": 0, "publish odd/y": 0x87, "publish x": 0x87,
        "slow at 0": [None], "slow at 1": [0], "slow at 2": [0x87],
        "slow subscribed at 0": [0], "slow subscribed at 1": [1], "slow subscribed at 2": [0x87],
        "retained": [0, 0x87],
        "subscribe a/+": [1], "subscribe a/#": [1], "subscribe #": [0x87], "subscribe +/x": [0x87],
        "subscribe a/secret": [0x87], "subscribe $share/g/a/#": [1], "subscribe $share/g/#": [0x87],
        "subscribe canary/x": [1],
    }  # fmt: skip


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("way", ["tcp", "ws"])
def test_z25_what_is_denied_reaches_nobody_and_is_counted(running: Broker, way: str, version: int) -> None:
    """Z-25: on every version and QoS."""

    async def main() -> None:
        to = ways(running)[way]
        watcher = await login(to, "root", f"watch-{version}-{way}")
        await watcher.conn.subscribe([("#", 2)])
        client = await login(to, "dev", "d", version=version)
        before = ask(running, "status")["messages"]["dropped"].get("unauthorized", 0)
        for qos in (0, 1, 2):
            said = await code(client, "denied", qos=qos)
            assert said == (0x87 if version == 5 and qos else 0), "3.1.1 has no way to say no"
        await code(client, "a/d/x")
        await eventually(lambda: watcher.got, "the message that is allowed")
        assert watcher.got == [("a/d/x", False)]
        assert ask(running, "status")["messages"]["dropped"]["unauthorized"] == before + 3
        await client.disconnect()
        await watcher.disconnect()

    asyncio.run(main())


def test_z29_what_may_not_be_retained_reaches_who_is_there_and_nobody_later(running: Broker) -> None:
    async def main() -> None:
        to = ways(running)["tcp"]
        watcher = await login(to, "root", "watch")
        await watcher.conn.subscribe([("live/#", 1)])
        client = await login(to, "dev", "d")
        assert await code(client, "live/x", retain=True) == 0x87
        await eventually(lambda: watcher.got, "the message")
        later = await login(to, "root", "later")
        assert await later.conn.subscribe([("live/#", 1), ("mark", 1)]) == [1, 1]
        await later.publish("mark", b"")
        await eventually(lambda: later.got, "its own message")
        assert later.got == [("mark", False)]
        for one in (watcher, client, later):
            await one.disconnect()

    asyncio.run(main())


def test_z25_nothing_denied_travels_between_what_is_allowed(running: Broker) -> None:
    """Many packets of one read leave as one slice of it; what is denied among them must not."""

    async def main(version: int) -> None:
        to = ways(running)["tcp"]
        watcher = await login(to, "root", f"watch-{version}", version=version)
        await watcher.conn.subscribe([("#", 0)])
        client = await login(to, "dev", "d", version=version)
        for topic in ("a/d/x", "denied", "a/d/x", "slow/x", "eq/no", "a/d/x", "live/x", "a/d/x", "denied"):
            client.conn.publish(topic, b"x")
        await client.publish("a/d/end", b"")
        await eventually(lambda: ("a/d/end", False) in watcher.got, "the last message")
        assert [topic for topic, _ in watcher.got] == [
            "a/d/x", "a/d/x", "slow/x", "a/d/x", "live/x", "a/d/x", "a/d/end",
        ]  # fmt: skip
        await client.disconnect()
        await watcher.disconnect()

    for version in (4, 5):
        asyncio.run(main(version))


@pytest.mark.parametrize("version", [4, 5])
def test_z25_who_is_denied_is_disconnected_where_that_is_wanted(tmp_path: Path, version: int) -> None:
    """Neither version gets an acknowledgement that could be taken for a yes; what came before is delivered."""

    async def main(running: Broker) -> None:
        to = ways(running)["tcp"]
        watcher = await login(to, "root", "watch")
        assert await watcher.conn.subscribe([("#", 2)]) == [2]
        for number, qos in enumerate((0, 1, 2)):
            client = await login(to, "dev", "d", version=version)
            client.conn.publish("a/d/before", b"")
            client.conn.publish("denied", b"x", qos, packet_id=7 if qos else 0)
            client.conn.publish("a/d/after", b"")
            await eventually(lambda c=client: c.ended, "the end of the connection")  # type: ignore[misc]
            assert client.told == (0x87 if version == 5 else None)
            assert client.acks == []
            await eventually(lambda n=number: len(watcher.got) > n, "what came before")  # type: ignore[misc]
        client = await login(to, "dev", "d", version=version)
        with pytest.raises(ConnectionError):
            await client.conn.subscribe([("a/b", 0), ("#", 0), ("a/c", 0)])
        await eventually(lambda: client.ended, "the end of the connection")
        assert client.told == (0x87 if version == 5 else None)
        assert watcher.got == [("a/d/before", False)] * 3
        status = ask(running, "status")
        assert status["messages"]["dropped"]["unauthorized"] == 3
        assert status["access"]["denied_disconnects"] == 4
        await watcher.disconnect()

    text = TABLE.replace("[auth.people]", '[access]\ndeny_action = "disconnect"\n[auth.people]', 1)
    with broker(tmp_path, {"00.toml": text}) as running:
        asyncio.run(main(running))


def test_z24_who_tries_ten_thousand_denied_topics_a_second_costs_the_others_nothing(tmp_path: Path) -> None:
    """Z-24: the backend is asked once, at the login, for topics are judged by local rules; beyond the rate nothing is
    read."""

    async def main(running: Broker) -> tuple[Song, float, dict[str, Any]]:
        loop = asyncio.get_running_loop()
        to = ways(running)["tcp"]
        client = await login(to, "dev", "flood")
        before = ask(running, "status")
        async with canary_apart(to, username="root", password="pw") as canary:
            began = loop.time()
            for start in range(0, 10_000, 100):
                for n in range(start, start + 100):
                    client.conn.publish(f"denied/{n}", b"x")
                await asyncio.sleep(0.01)  # ten thousand a second
            refused = [await code(client, f"denied/again/{n}") for n in range(5)]
            took = loop.time() - began
            assert refused == [0x87] * 5
            assert await client.conn.subscribe([(f"denied/{n}/#", 0) for n in range(100)]) == [0x87] * 100
        after = ask(running, "status")
        counts = [status["messages"]["dropped"].get("unauthorized", 0) for status in (before, after)]
        assert counts[1] - counts[0] == 10_005, "all are counted"
        assert after["auth"]["people"]["calls"] - before["auth"]["people"]["calls"] == 1, "the canary's login"
        assert canary.lost == 0
        await client.disconnect()
        return canary, took, after["access"]

    text = TABLE.replace("[auth.people]", "[access]\ndeny_rate = 2000\n[auth.people]", 1)
    with broker(tmp_path, {"00.toml": text}) as running:
        canary, took, access = asyncio.run(main(running))
    canary.check()
    assert took >= (10_000 - 2 * 2_000) / 2_000, "no more a second than deny_rate, after what may come at once"
    assert access["denied_throttles"] > 0
    assert access["denied_disconnects"] == 0


def test_z24_who_tries_too_often_is_disconnected_where_that_is_wanted(tmp_path: Path) -> None:
    async def main(running: Broker) -> None:
        client = await login(ways(running)["tcp"], "dev", "flood")
        for n in range(99):
            client.conn.publish(f"denied/{n}", b"x")
        assert await code(client, "a/flood/x") == 0
        for n in range(99):
            client.conn.publish(f"denied/{n}", b"x")
        await eventually(lambda: client.ended, "the end of the connection")
        assert client.told == 0x96
        assert ask(running, "status")["access"]["denied_disconnects"] == 1

    limit = '[access]\ndeny_rate = 100\ndeny_rate_action = "disconnect"\n[auth.people]'
    with broker(tmp_path, {"00.toml": TABLE.replace("[auth.people]", limit, 1)}) as running:
        asyncio.run(main(running))


def test_z30_case_and_slashes_make_other_topics(running: Broker) -> None:
    async def main() -> None:
        to = ways(running)["tcp"]
        names = ["case", "case/", "/case", "Case"]
        sender = await login(to, "root", "sender")
        watchers = [await login(to, "root", f"w{n}") for n in range(len(names))]
        for name, watcher in zip(names, watchers, strict=True):
            assert await watcher.conn.subscribe([(name, 1)]) == [1]
        for name in names:
            assert await sender.publish(name, b"x") == 0
        for name, watcher in zip(names, watchers, strict=True):
            await eventually(lambda w=watcher: w.got, name)  # type: ignore[misc]
            await watcher.publish("a/end", b"")
            assert watcher.got == [(name, False)]
            await watcher.disconnect()
        await sender.disconnect()

    asyncio.run(main())
