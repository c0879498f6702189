"""Rights that are denied or taken away, on every path: live, queued, retained, shared, half acknowledged, as a will."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection
from broker.client.errors import Refused
from broker.client.session import Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish, Will
from tests.broker import Broker, broker
from tests.servers import PATIENCE
from tests.system.resilience import command, eventually, url

pytestmark = pytest.mark.timeout(120)

TABLE = """
[listeners.tcp]
bind = "127.0.0.1:0"
[auth.people]
kind = "static"
[auth.people.users.root]
password = "pw"
superuser = true
[auth.people.users.dev]
password = "pw"
publish = [{publish}]
subscribe = [{subscribe}]
deny_subscribe = [{deny}]
"""
SOON = 1.0
"""Seconds within which a reload must have had its effect; 5 would do."""
NO_MATCH = 0x10
"""What MQTT 5 is told when nobody subscribes to what it published."""


def table(publish: str = '"a/#", "b/#"', subscribe: str = '"a/#", "b/#"', deny: str = "") -> dict[str, str]:
    return {"00.toml": TABLE.format(publish=publish, subscribe=subscribe, deny=deny)}


async def reload(running: Broker, **rights: str) -> float:
    """Put these rights into force; when that was asked for."""
    for name, text in table(**rights).items():
        running.write(name, text)
    began = time.monotonic()
    await command(running, "reload")
    return began


async def lose(running: Broker, **rights: str) -> None:
    """The same, until it must have had its effect."""
    await reload(running, **rights)
    await asyncio.sleep(SOON * PATIENCE)


class Client(Publisher):
    """Notes what it gets and when, and every acknowledgement."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[str, bytes]] = []
        self.last = 0.0
        self.ended = 0.0
        self.acks: list[tuple[int, int, int]] = []
        self.by_hand = False
        """Acknowledgements are the test's own."""

    @classmethod
    async def login(cls, to: str, username: str, client_id: str, *, by_hand: bool = False, **more: Any) -> Client:
        client = cls()
        client.by_hand = by_hand
        client.attach(
            await Connection.connect(
                to, client_id=client_id, handler=client, username=username, password=b"pw", **more
            )
        )  # fmt: skip
        return client

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        if publish.qos:
            conn.ack(PacketType.PUBACK if publish.qos == 1 else PacketType.PUBREC, publish.packet_id)
        self.got.append((publish.topic.decode(), publish.payload))
        self.last = time.monotonic()

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if self.by_hand:
            self.acks.append((packet_type, packet_id, code))
        elif packet_type == PacketType.PUBREL:
            conn.ack(PacketType.PUBCOMP, packet_id)
        else:
            super().on_ack(conn, packet_type, packet_id, code)

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended = time.monotonic()
        super().on_lost(conn, exc)


KEPT: dict[str, Any] = {"clean_start": False, "session_expiry": 600}


def run(where: Path, main: Callable[[Broker], Coroutine[Any, Any, None]], **rights: str) -> None:
    with broker(where, table(**rights)) as running:
        asyncio.run(main(running))


def test_z14_a_durable_subscriber_loses_the_right_to_read(tmp_path: Path) -> None:
    """Z-14: online no message reaches it 5 s after the reload (here: one); away, what queues is withheld and the
    subscription is gone when it comes back. What it may still read it gets, both times."""

    async def main(running: Broker) -> None:
        to = url(running)
        root = await Client.login(to, "root", "root")
        here, away = [await Client.login(to, "dev", name, **KEPT) for name in ("here", "away")]
        for one in (here, away):
            assert await one.conn.subscribe([("a/#", 1), ("b/#", 1)]) == [1, 1]
        away.conn.abort()
        await eventually(lambda: away.ended, "its absence")

        async def stream() -> None:
            while True:
                for topic in ("a/live", "b/live"):
                    await root.publish(topic, b"x")
                await asyncio.sleep(0.01)

        streaming = asyncio.create_task(stream())
        await eventually(lambda: len(here.got) > 20, "the stream")
        began = await reload(running, subscribe='"a/#"')
        await asyncio.sleep(min(5.0, SOON * PATIENCE))
        await here.conn.ping()  # what was on its way has come
        denied = [topic for topic, _ in here.got].count("b/live")
        here.got.clear()
        await eventually(lambda: len(here.got) >= 20, "what it may read")
        assert {topic for topic, _ in here.got} == {"a/live"}
        assert here.last - began > SOON, "what it may read goes on"
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        assert denied > 0
        assert not here.ended
        again = await Client.login(to, "dev", "away", **KEPT)
        await root.publish("a/end", b"")
        await eventually(lambda: ("a/end", b"") in again.got, "the end of its queue")
        assert {topic for topic, _ in again.got} == {"a/live", "a/end"}
        assert await root.publish("b/later", b"") == NO_MATCH, "both subscriptions are gone"
        assert await again.conn.subscribe([("b/#", 1), ("a/#", 1)]) == [0x87, 1]
        for one in (root, here, again):
            await one.disconnect()

    run(tmp_path, main)


def test_z13_what_its_publisher_may_no_longer_write_is_not_handed_out(tmp_path: Path) -> None:
    """Z-13: the retained message of one that lost the right is withheld from new subscribers, others' are not."""

    async def main(running: Broker) -> None:
        to = url(running)
        root, dev = await Client.login(to, "root", "root"), await Client.login(to, "dev", "dev")
        await dev.publish("b/dev", b"x", retain=True)
        await dev.publish("a/dev", b"x", retain=True)
        await root.publish("b/root", b"x", retain=True)
        for rights, there in (({}, {"a/dev", "b/dev", "b/root"}), ({"publish": '"a/#"'}, {"a/dev", "b/root"})):
            if rights:
                await lose(running, **rights)
            new = await Client.login(to, "root", "new")
            await new.conn.subscribe([("+/dev", 1), ("+/root", 1), ("mark", 1)])
            await new.publish("mark", b"")
            await eventually(lambda n=new: ("mark", b"") in n.got, "the mark")  # type: ignore[misc]
            assert {topic for topic, _ in new.got} - {"mark"} == there
            await new.disconnect()
        for one in (root, dev):
            await one.disconnect()

    run(tmp_path, main)


@pytest.mark.parametrize("reconnect", [False, True])
def test_z15_a_message_of_qos_2_was_judged_when_it_was_published(tmp_path: Path, reconnect: bool) -> None:
    """Z-15: the right goes between PUBLISH and PUBREL: the message stays delivered, once, PUBREL gets PUBCOMP, on this
    connection or the next, and the next PUBLISH is refused."""

    async def main(running: Broker) -> None:
        to = url(running)
        root = await Client.login(to, "root", "root")
        assert await root.conn.subscribe([("b/#", 2)]) == [2]
        dev = await Client.login(to, "dev", "dev", by_hand=True, **KEPT)
        dev.conn.publish("b/x", b"1", 2, packet_id=7)
        await eventually(lambda: dev.acks == [(PacketType.PUBREC, 7, 0)], "PUBREC")
        await lose(running, publish='"a/#"')
        if reconnect:
            dev.conn.abort()
            dev = await Client.login(to, "dev", "dev", by_hand=True, **KEPT)
        dev.acks.clear()
        dev.conn.ack(PacketType.PUBREL, 7)
        await eventually(lambda: dev.acks == [(PacketType.PUBCOMP, 7, 0)], "PUBCOMP")
        dev.conn.publish("b/x", b"2", 2, packet_id=8)
        await eventually(lambda: len(dev.acks) > 1, "the refusal")
        assert dev.acks[1:] == [(PacketType.PUBREC, 8, 0x87)]
        await root.publish("b/end", b"")
        await eventually(lambda: ("b/end", b"") in root.got, "the end")
        assert root.got == [("b/x", b"1"), ("b/end", b"")]
        for one in (root, dev):
            await one.disconnect()

    run(tmp_path, main)


@pytest.mark.parametrize("version", [4, 5])
def test_z11_z12_a_will_needs_its_right_at_connect_and_when_it_is_due(tmp_path: Path, version: int) -> None:
    """Z-11: refused at CONNECT with 0x87 (3.1.1: 5), without taking over who is there. Z-12: published after an abrupt
    end while the right lasts, and not after it was taken away, with a delay or without."""

    async def main(running: Broker) -> None:
        to = url(running)
        root = await Client.login(to, "root", "root")
        await root.conn.subscribe([("#", 1)])
        there = await Client.login(to, "dev", "dev", version=version)
        with pytest.raises(Refused) as refused:
            await Client.login(to, "dev", "dev", version=version, will=Will(b"c/will", b"no", 1))
        assert refused.value.code == 0x87, "5 in 3.1.1, which our client translates"
        assert not there.ended
        one = await Client.login(to, "dev", "one", version=version, will=Will(b"b/will", b"one", 1))
        two = await Client.login(to, "dev", "two", version=version, will=Will(b"b/will", b"two", 1, True))
        one.conn.abort()
        await eventually(lambda: root.got == [("b/will", b"one")], "the first will")
        await lose(running, publish='"a/#"')
        two.conn.abort()
        await eventually(lambda: two.ended, "its end")
        await asyncio.sleep(0.3)
        await root.publish("b/end", b"")
        await eventually(lambda: ("b/end", b"") in root.got, "the end")
        assert root.got == [("b/will", b"one"), ("b/end", b"")]
        late = await Client.login(to, "root", "late")
        assert await late.conn.subscribe([("b/#", 1)]) == [1]
        await late.publish("b/end2", b"")
        await eventually(lambda: late.got, "the end")
        assert late.got == [("b/end2", b"")], "nor is it retained"
        for client in (root, there, late):
            await client.disconnect()

    run(tmp_path, main)


@pytest.mark.parametrize("version", [4, 5])
def test_z07_z09_denied_filters_and_denied_topics_below_an_allowed_filter(tmp_path: Path, version: int) -> None:
    """Z-07: one SUBSCRIBE, a code for each filter in its place, only the allowed ones active. Z-09: below an allowed
    filter a denied topic is delivered neither live, nor retained, nor from the queue, nor through a shared group."""
    refusal = 0x87 if version == 5 else 0x80

    async def main(running: Broker) -> None:
        to = url(running)
        root = await Client.login(to, "root", "root")
        for topic in ("a/secret", "a/open", "x/secret/deep"):
            await root.publish(topic, b"retained", retain=True)
        orders = [["a/ok", "c/no", "a/too"], ["c/no", "a/ok", "a/too"], ["a/ok", "a/too", "c/no"]]
        for number, filters in enumerate(orders):
            dev = await Client.login(to, "dev", f"order{number}", version=version)
            codes = await dev.conn.subscribe([(one, 1) for one in filters])
            assert codes == [refusal if one == "c/no" else 1 for one in filters]
            for one in ("c/no", "a/ok", "a/too"):
                await root.publish(one, b"")
            await eventually(lambda d=dev: len(d.got) == 2, "both")  # type: ignore[misc]
            assert {topic for topic, _ in dev.got} == {"a/ok", "a/too"}
            await dev.disconnect()
        kept: dict[str, Any] = {"clean_start": False} | ({"session_expiry": 600} if version == 5 else {})
        live = await Client.login(to, "dev", "live", version=version)
        assert await live.conn.subscribe([("a/#", 1)]) == [1]
        away = await Client.login(to, "dev", "away", version=version, **kept)
        assert await away.conn.subscribe([("a/#", 1)]) == [1]
        shared = await Client.login(to, "dev", "shared", version=version)
        assert await shared.conn.subscribe([("$share/g/a/#", 1)]) == [1]
        away.conn.abort()
        await eventually(lambda: away.ended, "its absence")
        for topic in ("a/secret", "a/open", "a/secret", "a/end"):
            await root.publish(topic, b"live")
        again = await Client.login(to, "dev", "away", version=version, **kept)
        for client in (live, again, shared):
            await eventually(lambda c=client: ("a/end", b"live") in c.got, "the end")  # type: ignore[misc]
            assert {topic for topic, _ in client.got} == {"a/open", "a/end"}
        assert ("a/open", b"retained") in live.got
        for client in (root, live, again, shared):
            await client.disconnect()

    run(tmp_path, main, deny='"a/secret", "+/secret/#"')
