"""The bridge between two real brokers; mosquitto plays our side too, with the durable sessions we would keep."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridges.mqtt import open_mqtt
from broker.client.connection import connect
from broker.client.tls import knows_psk
from broker.mqtt.properties import user_property
from tests.integration.bridge_harness import (
    Receiver,
    configure,
    connected,
    receiver,
    running,
    sender,
    stream,
    until,
)
from tests.ledger import Ledger
from tests.proxy import Proxy
from tests.servers import PATIENCE, Certificates, Mosquitto
from tests.servers.processes import free_port

Start = Callable[..., Mosquitto]
UNLIMITED = "max_queued_messages 0\nmax_inflight_messages 0"

LINES = [
    {"filter": "telemetry/#", "direction": "out", "qos": 1, "remote_prefix": "region-1/"},
    {"filter": "commands/#", "direction": "in", "qos": 1, "remote_prefix": "region-1/"},
]


@pytest.fixture
def near(start_mosquitto: Start) -> Mosquitto:
    return start_mosquitto(extra=UNLIMITED)


@pytest.fixture
def far(start_mosquitto: Start) -> Mosquitto:
    return start_mosquitto(extra=UNLIMITED)


@pytest.mark.parametrize("protocol", ["auto", "3.1.1", "3.1"])
async def test_messages_cross_both_ways_under_their_prefixes(near: Mosquitto, far: Mosquitto, protocol: str) -> None:
    config = configure(servers=[far.url], protocol=protocol, topics=LINES)
    async with (
        running(config, near.url) as bridge,
        receiver(far.url, "#") as there,
        receiver(near.url, "commands/#") as here,
        sender(near.url) as near_sender,
        sender(far.url) as far_sender,
    ):
        await connected(bridge)
        await near_sender.publish("telemetry/a", b"1")
        await near_sender.publish("private/a", b"2")
        await far_sender.publish("region-1/commands/b", b"3")
        await until(lambda: bool(there.messages and here.messages), "one message on each side")
        await asyncio.sleep(0.1)
        assert sorted(there.seen) == [("region-1/commands/b", b"3"), ("region-1/telemetry/a", b"1")]
        assert here.seen == [("commands/b", b"3")]
        assert bridge.status()["protocol"] == {"auto": "5"}.get(protocol, protocol)


async def test_properties_and_retain_flags_are_kept_between_version_5_brokers(near: Mosquitto, far: Mosquitto) -> None:
    block = (
        b"\x01\x01\x02\x00\x00\x0e\x10\x03\x00\x04json\x08\x00\x02re\x09\x00\x02id"
        + user_property("k", "v")
        + user_property("$isthmus", "{}")
    )
    config = configure(servers=[far.url], protocol="5", topics=[("a/#", "out", 2)])
    async with running(config, near.url) as bridge, receiver(far.url, "a/#") as there, sender(near.url) as out:
        await connected(bridge)
        await out.publish("a/b", b"x", 1, True, block)
        await until(lambda: bool(there.messages), "the message")
        (message,) = there.messages
        properties = message.properties
        assert properties is not None
        assert (properties.payload_format_indicator, properties.content_type) == (1, "json")
        assert (properties.response_topic, properties.correlation_data) == ("re", b"id")
        assert properties.message_expiry_interval is not None
        assert 3590 <= properties.message_expiry_interval <= 3600
        assert properties.user_properties == [("k", "v"), ("x-bridge-path", "node-a")]
        assert message.retain


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_both_ways_on_everything_shows_each_message_once(
    near: Mosquitto, far: Mosquitto, protocol: str
) -> None:  # B-06
    """No Local on a 5.0 link and the private bit on a 3.1.1 link keep the remote broker from sending things back. On
    our side mosquitto has no origin instances, so the two prefixes stand in for them."""
    lines = [
        {"filter": "#", "direction": "out", "qos": 1, "local_prefix": "o/"},
        {"filter": "#", "direction": "in", "qos": 1, "local_prefix": "i/"},
    ]
    config = configure(servers=[far.url], protocol=protocol, topics=lines)
    async with (
        running(config, near.url) as bridge,
        receiver(near.url, "#") as here,
        receiver(far.url, "#") as there,
        sender(near.url) as near_sender,
        sender(far.url) as far_sender,
    ):
        await connected(bridge)
        await near_sender.publish("o/x", b"1")
        await far_sender.publish("y", b"2")
        await until(lambda: len(here.messages) >= 2 and len(there.messages) >= 2, "both messages on both sides")
        await asyncio.sleep(0.2)
        assert sorted(here.seen) == [("i/y", b"2"), ("o/x", b"1")]
        assert sorted(there.seen) == [("x", b"1"), ("y", b"2")]


async def test_b06_two_bridges_in_a_circle_stop_after_one_turn(near: Mosquitto, far: Mosquitto) -> None:
    """The peer mosquitto sends everything straight back through a rule of its own, as a second bridge would."""
    config = configure(
        servers=[far.url],
        protocol="5",
        topics=[("ring/#", "out", 1), {"filter": "back/#", "direction": "in", "qos": 1}],
    )

    class Mirror(Receiver):
        def on_publish(self, conn: Any, publish: Any) -> None:
            super().on_publish(conn, publish)
            back.conn.publish(
                publish.topic.replace(b"ring", b"back"), publish.payload, 0, False, publish.properties.forward
            )

    mirror = Mirror()
    async with (
        running(config, near.url) as bridge,
        receiver(near.url, "back/#") as here,
        sender(near.url) as out,
        sender(far.url) as back,
    ):
        reader = await connect(far.url, client_id="mirror", handler=mirror)
        await reader.subscribe([("ring/#", 1)])
        await connected(bridge)
        await out.publish("ring/1", b"x")
        await until(lambda: bridge.status().get("dropped_in", {}).get("loop") == 1, "the loop is noticed")
        assert here.messages == []
        await reader.disconnect()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_b03_qos_2_with_both_links_cut_at_random_loses_and_duplicates_nothing(
    near: Mosquitto, far: Mosquitto, start_proxy: Callable[[int], Any], protocol: str
) -> None:
    near_proxy, far_proxy = await start_proxy(near.port), await start_proxy(far.port)
    config = configure(
        servers=[f"mqtt://127.0.0.1:{far_proxy.port}"],
        protocol=protocol,
        topics=[("up/#", "out", 2), ("down/#", "in", 2)],
    )
    chance = random.Random(20)
    up, down = Ledger(), Ledger()
    over = False
    async with (
        running(config, f"mqtt://127.0.0.1:{near_proxy.port}", created_at=near.url) as bridge,
        receiver(far.url, "up/#", ledger=up),
        receiver(near.url, "down/#", ledger=down),
        sender(near.url) as near_sender,
        sender(far.url) as far_sender,
    ):
        await connected(bridge)

        async def pace() -> bool:
            await asyncio.sleep(0.002)
            return not over

        def broken(proxy: Proxy) -> int:
            return proxy.counts.cut + proxy.counts.reset

        async def cut() -> None:
            nonlocal over
            cuts = 0
            while cuts < 20 or (cuts < 60 and min(broken(near_proxy), broken(far_proxy)) < 4):
                await asyncio.sleep(chance.uniform(0.02, 0.3))
                proxy = chance.choice((near_proxy, far_proxy))
                await until(lambda proxy=proxy: proxy.connections > 0, "a connection to cut")  # type: ignore[misc]
                kind = chance.randrange(4)
                if kind == 0:
                    await proxy.cut()
                elif kind == 1:
                    await proxy.reset()
                else:
                    proxy.cut_after(chance.randint(1, 600), chance.choice(("up", "down")))
                cuts += 1
            over = True

        await asyncio.gather(
            stream(near_sender, up, "up", "up/x", 2, pace), stream(far_sender, down, "down", "down/x", 2, pace), cut()
        )
        await until(lambda: not up.missing() and not down.missing(), "everything arrives", 30)
        await until(lambda: bridge.status()["open_out"] == bridge.status()["open_in"] == 0, "every handshake ends", 15)
        assert broken(near_proxy) >= 4
        assert broken(far_proxy) >= 4
        assert bridge.status()["connects"] >= 5
    assert up.check().arrived > 100
    assert down.check().arrived > 100


async def test_b02_qos_1_over_a_link_that_goes_silent_loses_nothing(
    near: Mosquitto, far: Mosquitto, start_proxy: Callable[[int], Any]
) -> None:
    proxy = await start_proxy(far.port)
    config = configure(
        servers=[f"mqtt://127.0.0.1:{proxy.port}"], protocol="5", keep_alive=1, connect_timeout="1s",
        topics=[("up/#", "out", 1)],
    )  # fmt: skip
    ledger = Ledger()
    sent = 0
    async with (
        running(config, near.url) as bridge,
        receiver(far.url, "up/#", ledger=ledger),
        sender(near.url) as out,
    ):
        await connected(bridge)
        before = bridge.status()["connects"]
        proxy.black_hole = True

        async def pace() -> bool:
            nonlocal sent
            sent += 1
            await asyncio.sleep(0.002)
            return sent <= 100

        await stream(out, ledger, "up", "up/x", 1, pace)
        await until(lambda: bridge.status()["state"] != "running", "the silence is noticed", 5)
        proxy.black_hole = False
        await proxy.cut()
        await until(lambda: not ledger.missing(), "everything arrives", 15)
        assert bridge.status()["connects"] > before
    ledger.check(duplicates_allowed=True, redelivery=True)


async def test_b13_what_is_sent_while_the_remote_is_down_arrives_in_order(near: Mosquitto, far: Mosquitto) -> None:
    config = configure(servers=[far.url], topics=[("up/#", "out", 1)])
    async with running(config, near.url) as bridge, sender(near.url) as out:
        await connected(bridge)
        far.stop()
        for number in range(200):
            await out.publish("up/x", b"%d" % number)
        far.start()
        async with receiver(far.url, "up/#") as there:
            await connected_again(bridge)
            await until(lambda: len(there.messages) >= 200, "the backlog", 10)
            assert [int(payload) for _, payload in there.seen][:200] == list(range(200))


async def connected_again(bridge: Any) -> None:
    await until(lambda: bridge.status()["state"] == "running", f"reconnected: {bridge.status()}", 10)


@pytest.mark.timeout(300)
async def test_a_bridge_moves_to_the_next_server_and_back(
    near: Mosquitto, far: Mosquitto, start_mosquitto: Start, start_proxy: Callable[[int], Any], monkeypatch: Any
) -> None:
    from bridges import _mqtt_life

    monkeypatch.setattr(_mqtt_life, "_PROBE", 0.1)
    monkeypatch.setattr(_mqtt_life, "_TICK", 0.1)
    freed = 30 * PATIENCE  # with each server 65 535 identifiers are freed first
    second = start_mosquitto(extra=UNLIMITED)
    proxy = await start_proxy(far.port)
    first_url = f"mqtt://127.0.0.1:{proxy.port}"
    config = configure(
        servers=[first_url, second.url], protocol="5", connect_timeout="30s",
        topics=[("up/#", "out", 2), ("down/#", "in", 2)],
    )  # fmt: skip
    async with (
        running(config, near.url) as bridge,
        receiver(far.url, "up/#") as at_first,
        receiver(second.url, "up/#") as at_second,
        receiver(near.url, "down/#") as here,
        sender(near.url) as out,
        sender(second.url) as back,
    ):
        await connected(bridge, freed)
        await out.publish("up/1", b"", 2)
        await until(lambda: at_first.seen == [("up/1", b"")], "the first server has it")
        await proxy.down()
        await until(lambda: bridge.status().get("server") == second.url, "moved to the second", freed)
        await out.publish("up/2", b"", 2)
        await back.publish("down/3", b"", 2)
        await until(lambda: at_second.seen == [("up/2", b"")], "the second server has it", freed)
        await until(lambda: here.seen == [("down/3", b"")], "and sends to us")
        await proxy.up()
        await until(lambda: bridge.status().get("server") == first_url, "moved back", freed)
        await out.publish("up/4", b"", 2)  # an identifier the first server may know from before
        await until(lambda: ("up/4", b"") in at_first.seen, "the first server has it again", freed)


async def test_b14_the_state_of_the_link_is_kept_on_both_brokers(near: Mosquitto, far: Mosquitto) -> None:
    config = configure(servers=[far.url], notifications=True, notification_topic="state/hq", topics=LINES)
    async with receiver(far.url, "state/hq") as there, receiver(near.url, "state/hq") as here:
        async with running(config, near.url) as bridge:
            await connected(bridge)
            await until(lambda: ("state/hq", b"1") in there.seen and ("state/hq", b"1") in here.seen, "both say 1")
        await until(lambda: there.seen[-1][1] == b"0" and here.seen[-1][1] == b"0", "both say 0 after it left")
        async with running(config, near.url) as bridge:
            await connected(bridge)
            await until(lambda: there.seen[-1][1] == b"1", "it says 1 again")
            bridge._connections[0].abort()
            await until(lambda: [p for _, p in there.seen][-2:] == [b"0", b"1"], "a broken link shows 0, then 1")
        late = await late_value(far.url, "state/hq")
        assert late == b"0"


async def late_value(url: str, topic: str) -> bytes:
    async with receiver(url, topic) as late:
        await until(lambda: bool(late.messages), "the retained value")
        assert late.messages[0].retain
        return late.messages[0].payload


async def test_b20_retained_messages_of_the_remote_come_once_and_cleared_ones_stay_cleared(
    near: Mosquitto, far: Mosquitto, start_proxy: Callable[[int], Any]
) -> None:
    proxy = await start_proxy(far.port)
    config = configure(
        servers=[f"mqtt://127.0.0.1:{proxy.port}"],
        protocol="5",
        topics=[{"filter": "r/#", "direction": "in", "qos": 1}],
    )
    async with sender(far.url) as remote, receiver(near.url, "r/#") as here:
        await remote.publish("r/kept", b"1", 1, True)
        await remote.publish("r/cleared", b"2", 1, True)
        async with running(config, near.url) as bridge:
            await until(lambda: len(here.messages) == 2, "both retained messages")
            await remote.publish("r/cleared", b"", 1, True)
            await until(lambda: len(here.messages) == 3, "the clearing")
            await asyncio.sleep(0.3)  # until it is acknowledged: at QoS 1 it would rightly come again
            count = bridge.status()["connects"]
            await proxy.cut()
            await until(lambda: bridge.status().get("connects", 0) > count, "reconnected")
            await connected(bridge)
            await remote.publish("r/end", b"", 1)
            await until(lambda: here.seen[-1][0] == "r/end", "the marker")
            assert [topic for topic, _ in here.seen].count("r/cleared") == 2
            assert [topic for topic, _ in here.seen].count("r/kept") == 1


async def test_b10_tls_is_verified_on_every_attempt(
    start_mosquitto: Start, near: Mosquitto, certs: Certificates
) -> None:
    far = start_mosquitto(tls=certs, extra=UNLIMITED)
    url = f"mqtts://localhost:{far.tls_port}"
    trusted = configure(servers=[url], tls={"ca": str(certs.ca)}, topics=LINES)
    async with running(trusted, near.url) as bridge:
        await connected(bridge)
    for keys in ({}, {"tls": {"ca": str(certs.ca)}, "servers": [f"mqtts://127.0.0.2:{far.tls_port}"]}):
        config = configure(**{"servers": [url], "topics": LINES, **keys})
        opened = await open_mqtt(config)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await opened.check()


async def test_b10_the_bridge_shows_its_certificate_where_the_server_asks_for_one(
    start_mosquitto: Start, near: Mosquitto, certs: Certificates
) -> None:
    far = start_mosquitto(tls=certs, tls_extra="require_certificate true\nuse_identity_as_username true")
    url = f"mqtts://localhost:{far.tls_port}"
    mine = {"ca": str(certs.ca), "certificate": str(certs.client), "key": str(certs.client_key)}
    async with running(configure(servers=[url], tls=mine, topics=LINES), near.url) as bridge:
        await connected(bridge)
    assert "u'device-1'" in far.log(), "it came as who the certificate says"
    with pytest.raises(ConnectionError):
        await (await open_mqtt(configure(servers=[url], tls={"ca": str(certs.ca)}, topics=LINES))).check()


async def test_b22_a_shared_key_is_who_we_are(start_mosquitto: Start, near: Mosquitto, tmp_path: Path) -> None:
    if not knows_psk():
        pytest.skip("Python 3.13 and newer can do this")
    (tmp_path / "psk").write_text("region-1:c0ffee\n")
    port = free_port()
    far = start_mosquitto(
        extra=UNLIMITED,
        connection=f"listener {port} 127.0.0.1\npsk_file {tmp_path}/psk\npsk_hint isthmus\nallow_anonymous true",
    )
    url = f"mqtts://127.0.0.1:{port}"
    good = configure(servers=[url], tls={"psk": "c0ffee", "psk_identity": "region-1"}, topics=LINES)
    async with running(good, near.url) as bridge, receiver(far.url, "#") as there, sender(near.url) as out:
        await connected(bridge)
        await out.publish("telemetry/a", b"1", 1)
        await until(lambda: there.seen == [("region-1/telemetry/a", b"1")], "the message")
    for wrong in ({"psk": "c0ffef", "psk_identity": "region-1"}, {"psk": "c0ffee", "psk_identity": "region-2"}):
        with pytest.raises(ConnectionError):
            await (await open_mqtt(configure(servers=[url], tls=wrong, topics=LINES))).check()


async def test_check_tells_a_wrong_password_and_leaves_a_running_bridge_alone(
    near: Mosquitto, start_mosquitto: Start
) -> None:
    far = start_mosquitto(username="u", password="hunter2", extra=UNLIMITED)
    good = configure(servers=[far.url], username="u", password="hunter2", topics=LINES)
    async with running(good, near.url) as bridge:
        await connected(bridge)
        await (await open_mqtt(good)).check()
        bad = await open_mqtt(configure(servers=[far.url], username="u", password="wrong-pw", topics=LINES))
        with pytest.raises(ConnectionError, match=r"bridges\.hq: .*(not authorized|bad user name)") as caught:
            await bad.check()
        assert "wrong-pw" not in str(caught.value)
        assert bridge.status()["connects"] == 1


async def test_b12_b15_a_remote_with_small_packets_gets_the_others(near: Mosquitto, start_mosquitto: Start) -> None:
    far = start_mosquitto(extra=UNLIMITED + "\nmax_packet_size 200")
    config = configure(servers=[far.url], protocol="5", topics=[("up/#", "out", 2)])
    async with running(config, near.url) as bridge, receiver(far.url, "up/#") as there, sender(near.url) as out:
        await connected(bridge)
        await out.publish("up/large", b"x" * 1000, 2)
        await out.publish("up/small", b"x", 2)
        await until(lambda: there.seen == [("up/small", b"x")], "the small one")
        await until(lambda: bridge.status()["dropped_out"] == {"too_large": 1}, "the large one is counted")
        assert bridge.status()["connects"] == 1
