"""The bridge against remote brokers that no package installs: each is a script that does one thing on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bridges.mqtt import open_mqtt
from broker.client.connection import Handler, connect
from broker.mqtt import packets
from broker.mqtt.errors import ProtocolError
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Connect, Publish
from broker.mqtt.properties import Properties
from tests.integration.bridge_harness import NAME, configure, connected, create_sessions, running, sender, until
from tests.servers import PATIENCE, Mosquitto

Start = Callable[..., Mosquitto]


class Peer:
    """A broker that takes everything and forwards nothing; a test replaces the verb it is about."""

    def __init__(self) -> None:
        self.url = ""
        self.connects: list[Connect] = []
        self.taken: list[Publish] = []
        self.subscribed: list[tuple[bytes, int]] = []
        self.held: set[int] = set()
        """QoS 2 identifiers taken and not released; a PUBLISH under one of them is a repetition."""
        self.released = 0
        self.known: set[str] = set()
        self.answer: Properties | None = None

    def on_connect(self, connect: Connect) -> int | None:
        """A CONNACK code, or None to close without one."""
        return 0

    def on_subscribe(self, filter: bytes, options: int) -> int:
        return options & 3

    def on_publish(self, publish: Publish) -> int | None:
        """A code for PUBACK or PUBREC; None hangs up."""
        return 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader(1 << 20)
        self.version = 5
        try:
            while data := await reader.read(65_536):
                for first, body in frames.feed(data):
                    answer = self._answer(first, body)
                    if answer is None:
                        return
                    writer.write(answer)
        except (ConnectionError, ProtocolError):
            pass
        finally:
            writer.close()

    def _answer(self, first: int, body: bytes) -> bytes | None:
        kind = first >> 4
        if kind == 1:
            return self._connack(body)
        if kind == 3:
            return self._on_publish(packets.decode_publish(first, body, self.version))
        if kind == 6:
            self.released += 1
            packet_id = packets.decode_ack(body, self.version, 6).packet_id
            code = 0 if packet_id in self.held else 0x92
            self.held.discard(packet_id)
            return packets.encode_ack(7, packet_id, self.version, code)
        if kind == 8:
            subscribe = packets.decode_subscribe(body, self.version)
            self.subscribed += subscribe.filters
            codes = [self.on_subscribe(f, o) for f, o in subscribe.filters]
            return packets.encode_suback(subscribe.packet_id, self.version, codes)
        if kind == 10:
            unsubscribe = packets.decode_unsubscribe(body, self.version)
            return packets.encode_unsuback(unsubscribe.packet_id, self.version, [0] * len(unsubscribe.filters))
        if kind == 12:
            return packets.encode_pingresp()
        return None

    def _connack(self, body: bytes) -> bytes | None:
        try:
            connect = packets.decode_connect(body)
        except ProtocolError:
            return None
        self.connects.append(connect)
        self.version = connect.version
        code = self.on_connect(connect)
        if code is None:
            return None
        present = connect.client_id in self.known and not connect.clean_start
        if code == 0:
            self.known.add(connect.client_id)
        return packets.encode_connack(connect.version, present, code, self.answer)

    def _on_publish(self, publish: Publish) -> bytes | None:
        code = self.on_publish(publish)
        if code is None:
            return None
        if (publish.qos < 2 or publish.packet_id not in self.held) and code < 0x80:
            self.taken.append(publish)
            if publish.qos == 2:
                self.held.add(publish.packet_id)
        if not publish.qos:
            return b""
        return packets.encode_ack(3 + publish.qos, publish.packet_id, self.version, code)


@asynccontextmanager
async def playing(peer: Peer) -> AsyncIterator[Peer]:
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        await peer.serve(reader, writer)
        writers.discard(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    peer.url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield peer
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


UP = [("up/#", "out", 2)]
_FREED = 30 * PATIENCE
"""Seconds in which the peer has answered 65 535 PUBRELs."""


async def test_b07_a_server_of_3_1_and_3_1_1_without_private_bit_is_found_and_remembered(mosquitto: Mosquitto) -> None:
    class Old(Peer):
        def on_connect(self, connect: Connect) -> int | None:
            if connect.version == 5 or connect.bridge:
                return None
            return 0x85 if len(connect.client_id) > 23 else 0

    async with playing(Old()) as peer:
        config = configure(servers=[peer.url], clientid="a-name-that-is-longer-than-23", topics=UP)
        async with running(config, mosquitto.url) as bridge, sender(mosquitto.url) as out:
            await connected(bridge)
            await out.publish("up/x", b"1", 2)
            await until(lambda: len(peer.taken) == 1, "the message")
            asked = [(c.version, c.bridge) for c in peer.connects]
            assert asked == [(5, False)] * 2 + [(4, True)] * 2 + [(4, False)] * 2
            assert len(peer.connects[-1].client_id) <= 23
            bridge._connections[0].abort()
            await until(lambda: bridge.status()["connects"] == 2, "connected again")
            assert len(peer.connects) == len(asked) + 1


async def test_b23_a_refused_subscription_is_reported_and_the_others_work(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridges import _mqtt_life

    monkeypatch.setattr(_mqtt_life, "_TICK", 0.05)
    monkeypatch.setattr(_mqtt_life, "_RESUBSCRIBE", 0.2)

    class Picky(Peer):
        def on_subscribe(self, filter: bytes, options: int) -> int:
            if filter == b"secret/#" and [f for f, _ in self.subscribed].count(filter) < 3:
                return 0x87
            return options & 3

    async with playing(Picky()) as peer:
        lines = [("secret/#", "in", 1), ("open/#", "in", 2)]
        async with running(configure(servers=[peer.url], protocol="5", topics=lines), mosquitto.url) as bridge:
            await connected(bridge)
            assert bridge.status()["refused_subscriptions"] == {"secret/#": "not authorized (0x87)"}
            no_local_as_published = 4 | 8
            assert [(f, options & 15) for f, options in peer.subscribed[:2]] == [
                (b"secret/#", 1 | no_local_as_published),
                (b"open/#", 2 | no_local_as_published),
            ]
            await until(lambda: not bridge.status()["refused_subscriptions"], "asked again, and granted")
            assert bridge.status()["connects"] == 1


async def test_quota_exceeded_at_the_remote_broker_loses_nothing(mosquitto: Mosquitto) -> None:
    class Full(Peer):
        refusals = 3

        def on_publish(self, publish: Publish) -> int | None:
            if self.refusals:
                self.refusals -= 1
                return 0x97
            return 0

    async with playing(Full()) as peer:
        config = configure(servers=[peer.url], protocol="5", topics=UP)
        async with running(config, mosquitto.url) as bridge, sender(mosquitto.url) as out:
            await connected(bridge)
            for number in range(3):
                await out.publish("up/x", b"%d" % number, 1 + number % 2)
            await until(lambda: len(peer.taken) == 3, "all three")
            assert sorted(p.payload for p in peer.taken) == [b"0", b"1", b"2"]
            await until(lambda: bridge.status()["retried_out"] == 3, "the refusals are counted")
            assert bridge.status()["connects"] == 1


@pytest.mark.parametrize("qos", [1, 2])
async def test_b12_b15_a_refused_message_is_counted_reported_and_not_sent_for_ever(
    mosquitto: Mosquitto, qos: int
) -> None:
    class Strict(Peer):
        def on_publish(self, publish: Publish) -> int | None:
            return 0x87 if publish.topic == b"up/forbidden" else 0

    async with playing(Strict()) as peer:
        config = configure(servers=[peer.url], protocol="5", topics=UP)
        async with running(config, mosquitto.url) as bridge, sender(mosquitto.url) as out:
            await connected(bridge)
            await out.publish("up/forbidden", b"", qos)
            await out.publish("up/allowed", b"", qos)
            await until(lambda: [p.topic for p in peer.taken] == [b"up/allowed"], "the allowed one")
            await until(lambda: bridge.status()["dropped_out"] == {"refused": 1}, "the other is counted")
            await until(lambda: bridge.status()["open_out"] == 0, "nothing is left over")
            assert "not authorized" in bridge.status()["last_refusal"]


async def test_b04_a_message_that_is_never_acknowledged_recycles_the_link(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridges import _mqtt_life

    monkeypatch.setattr(_mqtt_life, "_TICK", 0.05)

    class Forgetful(Peer):
        def _on_publish(self, publish: Publish) -> bytes | None:
            if len(self.connects) == 1:
                return b""  # and no acknowledgement, ever
            return super()._on_publish(publish)

    async with playing(Forgetful()) as peer:
        peer.answer = Properties(receive_maximum=1)
        config = configure(servers=[peer.url], protocol="5", ack_timeout="300ms", topics=UP)
        async with running(config, mosquitto.url) as bridge, sender(mosquitto.url) as out:
            await connected(bridge)
            for number in range(5):
                await out.publish("up/x", b"%d" % number, 1)
            await until(lambda: len(peer.taken) == 5, "the queue moves")
            assert [p.payload for p in peer.taken] == [b"0", b"1", b"2", b"3", b"4"]
            assert peer.taken[0].dup
            assert bridge.status()["connects"] == 2


async def test_b15_a_server_without_retained_messages_and_with_qos_0_only_is_adapted_to(mosquitto: Mosquitto) -> None:
    class Small(Peer):
        def on_connect(self, connect: Connect) -> int | None:
            if connect.will is not None and connect.will.retain:
                return 0x9A
            return 0x9B if connect.will is not None and connect.will.qos else 0

    async with playing(Small()) as peer:
        peer.answer = Properties(maximum_qos=0, retain_available=0)
        config = configure(
            servers=[peer.url], protocol="5", notifications=True, notification_topic="state/hq", topics=UP
        )
        async with running(config, mosquitto.url) as bridge, sender(mosquitto.url) as out:
            await connected(bridge)
            await out.publish("up/x", b"1", 2, True)
            await until(lambda: any(p.topic == b"up/x" for p in peer.taken), "the message")
            assert [(p.topic, p.qos, p.retain) for p in peer.taken] == [(b"state/hq", 0, False), (b"up/x", 0, False)]
            await until(lambda: bridge.status()["open_out"] == 0, "and it is finished with our side")
            assert len(peer.connects) == 3


async def test_a_server_that_hangs_up_behind_the_notification_is_not_told_any_more(mosquitto: Mosquitto) -> None:
    class Touchy(Peer):
        def on_publish(self, publish: Publish) -> int | None:
            return None if publish.topic.startswith(b"$SYS") else 0

    async with playing(Touchy()) as peer:
        config = configure(servers=[peer.url], protocol="5", notifications=True, topics=UP)
        async with running(config, mosquitto.url) as bridge, sender(mosquitto.url) as out:
            await until(lambda: bridge.status()["state"] == "running", "joined in spite of it")
            await out.publish("up/x", b"1", 1)
            await until(lambda: len(peer.taken) == 1, "the message")
            assert len(peer.connects) == 3
            assert peer.connects[0].will is not None
            assert peer.connects[0].will.topic == b"$SYS/broker/connection/region-1/state"
            assert peer.connects[-1].will is None


@pytest.mark.timeout(180)
@pytest.mark.parametrize("lost", ["our session", "another server"])
async def test_old_identifiers_at_the_remote_broker_never_swallow_a_new_message(
    mosquitto: Mosquitto, lost: str
) -> None:
    """The peer holds identifiers 1 to 20 of messages that ended elsewhere; new messages get the same ones."""
    async with playing(Peer()) as peer, playing(Peer()) as other:
        peer.known.add("region-1")
        peer.held = set(range(1, 21))
        servers = [peer.url] if lost == "our session" else [peer.url, other.url]
        config = configure(servers=servers, protocol="5", connect_timeout="30s", topics=UP)
        if lost == "our session":
            await create_sessions(mosquitto.url, config.session())
            outlet = await connect(mosquitto.url, client_id=f"isthmus/{NAME}/0", handler=Handler())  # ends it
            await outlet.disconnect()
        sent = await _send_through(config, mosquitto, recreate=lost != "our session")
        assert sorted(p.payload for p in peer.taken) == sorted(sent)
        assert peer.released >= 65_535


async def _send_through(config: Any, near: Mosquitto, recreate: bool) -> list[bytes]:
    from bridges.mqtt import BACKEND
    from broker.runtime.bridge_runner import BridgeRunner
    from tests.integration.bridge_harness import Attach

    if recreate:
        await create_sessions(near.url, config.session())
    bridge = BridgeRunner(BACKEND, config, Attach(near.url), "node-a")
    bridge.start()
    try:
        await connected(bridge, _FREED)
        if not recreate:
            await bridge.pause()
            await create_sessions(near.url, config.session())  # the subscription, in the session just attached to
            bridge.resume()
            await until(
                lambda: bridge.status()["connects"] >= 2 and bridge.status()["state"] == "running", "resumed", _FREED
            )
        payloads = [b"%d" % number for number in range(5)]
        async with sender(near.url) as out:
            for payload in payloads:
                await out.publish("up/x", payload, 2)
        await until(lambda: bridge.status()["messages_out"] == 5, "all five are taken", _FREED)
        return payloads
    finally:
        await bridge.close(0)


async def test_a_lost_remote_session_begins_the_inlet_anew(mosquitto: Mosquitto) -> None:
    """The inlet's session holds identifier 1; the remote broker has forgotten us and uses 1 for a new message."""

    class Talker(Peer):
        def _answer(self, first: int, body: bytes) -> bytes | None:
            answer = super()._answer(first, body)
            if first >> 4 == 8 and answer is not None:
                answer += packets.encode_publish(b"down/x", b"new", 2, False, False, 1, self.version)
            return answer

    async with playing(Talker()) as peer:
        config = configure(servers=[peer.url], protocol="5", topics=[("down/#", "in", 2)])
        await create_sessions(mosquitto.url, config.session())
        stale = await connect(
            mosquitto.url, client_id=f"isthmus/{NAME}/in", handler=Handler(), clean_start=False, session_expiry=600
        )
        stale.publish("down/x", b"old", 2, packet_id=1)
        await stale.ping()
        stale.abort()
        async with running(config, mosquitto.url) as bridge:
            await until(lambda: bridge.status().get("messages_in") == 1, "the message is taken")
            assert len(peer.connects) == 2
            begun = [line for line in mosquitto.log().splitlines() if f"as isthmus/{NAME}/in (" in line]
            assert "c0," in begun[-2]
            assert "c1," in begun[-1]  # the second attempt asked for a clean start: identifier 1 means nothing there


class Laden(Peer):
    """Answers SUBSCRIBE only behind what it has queued, which it sends slowly."""

    def __init__(self, queued: int) -> None:
        super().__init__()
        self.queued = queued
        self.sending: asyncio.Task[None] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        await super().serve(reader, writer)

    def _answer(self, first: int, body: bytes) -> bytes | None:
        answer = super()._answer(first, body)
        if first >> 4 == 8 and answer is not None:
            self.sending = asyncio.create_task(self._send(answer))
            return b""
        return answer

    async def _send(self, suback: bytes) -> None:
        for number in range(self.queued):
            self.writer.write(packets.encode_publish(b"down/x", b"%d" % number, 0, False, False, 0, self.version, b""))
            await asyncio.sleep(0.2)
        if self.queued:
            self.writer.write(suback)


async def test_the_answer_to_subscribe_may_come_behind_a_long_queue(mosquitto: Mosquitto) -> None:
    async with playing(Laden(queued=25)) as peer:  # 5 s
        config = configure(
            servers=[peer.url], protocol="5", connect_timeout="3s", topics=[("down/#", "in", 0)], notifications=False
        )
        async with running(config, mosquitto.url) as bridge:
            await until(lambda: bridge.status()["state"] == "running", "the answer is waited for", 20)
            assert bridge.status()["messages_in"] == 25
            assert len(peer.connects) == 1


async def test_an_answer_to_subscribe_that_never_comes_ends_the_attempt(mosquitto: Mosquitto) -> None:
    async with playing(Laden(queued=0)) as peer:
        config = configure(
            servers=[peer.url], protocol="5", connect_timeout="1s", topics=[("down/#", "in", 0)], notifications=False
        )
        async with running(config, mosquitto.url) as bridge:
            await until(lambda: len(peer.connects) > 1, "another attempt", 15)
            assert "no answer to SUBSCRIBE" in bridge.status()["last_error"]


async def test_b16_a_dead_server_is_left_to_the_supervisor_with_a_clear_error(
    mosquitto: Mosquitto, free_port: Callable[[], int]
) -> None:
    port = free_port()
    config = configure(servers=[f"mqtt://127.0.0.1:{port}", "mqtt://no-such-host.invalid:1"], topics=UP)
    async with running(config, mosquitto.url) as bridge:
        await until(lambda: bridge.status()["last_error"] is not None, "an error")
        assert f"127.0.0.1:{port}" in bridge.status()["last_error"]
        assert "no-such-host.invalid" in bridge.status()["last_error"]
    with pytest.raises(ConnectionError, match="no-such-host"):
        await (await open_mqtt(config)).check()
