"""A connection, packet by packet; the test plays the broker."""

from __future__ import annotations

import asyncio
import logging

import pytest

from broker.client.connection import Connection, Handler
from broker.client.errors import BrokenPeer, Disconnected, NoAnswer, Refused, Silent, TimedOut
from broker.mqtt import packets
from broker.mqtt.packets import Will
from broker.mqtt.properties import Properties
from tests.unit.client.fakes import FakeLink, Recorder, connected, replace_link, tick


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[FakeLink]:
    return replace_link(monkeypatch)


def publish(topic: bytes, qos: int = 0, packet_id: int = 0, version: int = 5, properties: bytes = b"") -> bytes:
    return packets.encode_publish(topic, b"p", qos, False, False, packet_id, version, properties)


async def test_connect_says_everything_it_was_told(links: list[FakeLink]) -> None:
    await connected(
        links,
        Recorder(),
        clean_start=False,
        session_expiry=3600,
        keep_alive=7,
        username="u",
        password="p",
        will=Will(b"w", b"gone", 1, True),
        receive_maximum=9,
        max_packet_size=1000,
        topic_alias_maximum=3,
        user_properties=[("k", "v")],
    )
    ((first, body),) = links[0].taken()
    connect = packets.decode_connect(body)
    assert first == 0x10
    assert (connect.client_id, connect.clean_start, connect.keep_alive) == ("c", False, 7)
    assert (connect.username, connect.password) == ("u", b"p")
    assert connect.will is not None
    assert (connect.will.topic, connect.will.payload, connect.will.qos, connect.will.retain) == (b"w", b"gone", 1, True)
    properties = connect.properties
    assert properties is not None
    assert (properties.session_expiry_interval, properties.receive_maximum) == (3600, 9)
    assert (properties.maximum_packet_size, properties.topic_alias_maximum) == (1000, 3)
    assert properties.user_properties == [("k", "v")]


async def test_the_handler_may_ask_for_less_and_for_a_will_and_a_clean_start(links: list[FakeLink]) -> None:
    handler = Recorder()
    handler.receive_maximum = 5
    handler.will = Will(b"w", b"")
    handler.clean_start = True
    await connected(links, handler, clean_start=False, receive_maximum=10)
    ((_, body),) = links[0].taken()
    connect = packets.decode_connect(body)
    assert connect.properties is not None
    assert connect.properties.receive_maximum == 5
    assert connect.will is not None
    assert connect.clean_start


async def test_the_answer_is_available_and_the_servers_keep_alive_counts(links: list[FakeLink]) -> None:
    answer = Properties(receive_maximum=20, maximum_packet_size=500, assigned_client_identifier="given")
    conn, _ = await connected(links, Recorder(), properties=answer, session_present=True)
    assert (conn.receive_maximum, conn.maximum_packet_size, conn.client_id) == (20, 500, "given")
    assert conn.session_present
    assert conn.local_address == ("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("version", "answer", "code"),
    [
        (5, packets.encode_connack(5, False, 0x87), 0x87),
        (4, packets.encode_connack(4, False, 0x86), 0x86),
        (4, b"\x20\x02\x00\x01", 0x84),
        (5, b"\x20\x02\x00\x01", 0x84),
    ],
)
async def test_a_refusal_carries_the_version_5_reason(
    links: list[FakeLink], version: int, answer: bytes, code: int
) -> None:
    task = asyncio.ensure_future(Connection.connect("mqtt://x", client_id="", handler=Recorder(), version=version))
    await tick()
    links[0].protocol.data_received(answer)
    with pytest.raises(Refused) as caught:
        await task
    assert caught.value.code == code
    assert "mqtt://x:1883" in str(caught.value)
    assert links[0].aborted


async def test_a_close_before_the_answer_is_no_answer(links: list[FakeLink]) -> None:
    handler = Recorder()
    task = asyncio.ensure_future(Connection.connect("mqtt://x", client_id="c", handler=handler))
    await tick()
    links[0].protocol.connection_lost(None)
    with pytest.raises(NoAnswer):
        await task
    assert handler.calls == []


async def test_silence_before_the_answer_times_out(links: list[FakeLink]) -> None:
    with pytest.raises(TimedOut, match=r"within 0\.02 s"):
        await Connection.connect("mqtt://x", client_id="c", handler=Recorder(), timeout=0.02)
    assert links[0].aborted


async def test_one_read_is_many_packets_and_one_batch_end(links: list[FakeLink]) -> None:
    handler = Recorder()
    _, link = await connected(links, handler)
    handler.calls.clear()
    link.protocol.data_received(publish(b"a") + publish(b"b", 1, 7) + packets.encode_ack(6, 9, 5))
    assert handler.calls == [("publish", b"a", b"p", 0, 0), ("publish", b"b", b"p", 1, 7), ("ack", 6, 9, 0), ("end",)]


async def test_messages_in_the_read_that_brings_connack_are_handed_over(links: list[FakeLink]) -> None:
    handler = Recorder()
    task = asyncio.ensure_future(Connection.connect("mqtt://x", client_id="c", handler=handler))
    await tick()
    links[0].protocol.data_received(packets.encode_connack(5, True, 0) + publish(b"a", 1, 7))
    conn = await task
    assert conn.session_present
    assert handler.calls == [("publish", b"a", b"p", 1, 7), ("end",)]


async def test_what_one_tick_sends_is_one_write(links: list[FakeLink]) -> None:
    conn, link = await connected(links, Recorder())
    link.taken()
    for packet_id in range(1, 101):
        conn.ack(4, packet_id)
    assert link.writes == []
    await tick()
    assert len(link.writes) == 1
    assert len(link.taken()) == 100


async def test_a_full_transport_collects_and_says_so(links: list[FakeLink]) -> None:
    conn, link = await connected(links, Recorder())
    link.taken()
    link.protocol.pause_writing()
    conn.publish("a", b"x")
    await tick()
    assert link.writes == []
    assert conn.congested
    drained = asyncio.ensure_future(conn.drain())
    await tick()
    assert not drained.done()
    link.protocol.resume_writing()
    await drained
    assert len(link.taken()) == 1
    assert not conn.congested


async def test_a_drain_ends_with_the_connection(links: list[FakeLink]) -> None:
    conn, link = await connected(links, Recorder())
    link.protocol.pause_writing()
    drained = asyncio.ensure_future(conn.drain())
    await tick()
    link.protocol.connection_lost(OSError("reset"))
    with pytest.raises(OSError, match="reset"):
        await drained


async def test_codes_of_acknowledgements_are_kept_for_version_5_only(links: list[FakeLink]) -> None:
    for version, body in ((5, b"\x00\x07\x97"), (4, b"\x00\x07")):
        conn, link = await connected(links, Recorder(), version=version)
        link.taken()
        conn.ack(4, 7, 0x97)
        await tick()
        assert link.taken() == [(0x40, body)]


async def test_subscribe_and_unsubscribe_give_the_codes(links: list[FakeLink]) -> None:
    conn, link = await connected(links, Recorder())
    link.taken()
    waiting = asyncio.ensure_future(conn.subscribe([("a/#", 2 | 4), ("b", 1)]))
    await tick()
    ((first, body),) = link.taken()
    request = packets.decode_subscribe(body, 5)
    assert first == 0x82
    assert request.filters == [(b"a/#", 6), (b"b", 1)]
    link.protocol.data_received(packets.encode_suback(request.packet_id, 5, [2, 0x87]))
    assert await waiting == [2, 0x87]
    leaving = asyncio.ensure_future(conn.unsubscribe(["b"]))
    await tick()
    ((_, body),) = link.taken()
    other = packets.decode_unsubscribe(body, 5)
    assert other.packet_id != request.packet_id
    link.protocol.data_received(packets.encode_unsuback(other.packet_id, 5, [0]))
    assert await leaving == [0]


async def test_a_lost_connection_answers_everybody_and_tells_the_handler_once(links: list[FakeLink]) -> None:
    handler = Recorder()
    conn, link = await connected(links, handler)
    waiting = asyncio.ensure_future(conn.subscribe([("a", 0)]))
    ping = asyncio.ensure_future(conn.ping())
    await tick()
    link.protocol.connection_lost(ConnectionResetError("reset"))
    link.protocol.connection_lost(None)
    for task in (waiting, ping):
        with pytest.raises(ConnectionError):
            await task
    assert [call[0] for call in handler.calls].count("lost") == 1
    assert isinstance(handler.calls[-1][1], ConnectionResetError)
    conn.publish("a", b"")
    await tick()
    assert not conn.open


async def test_disconnect_sends_what_is_collected_first(links: list[FakeLink]) -> None:
    handler = Recorder()
    conn, link = await connected(links, handler)
    link.taken()
    conn.publish("a", b"x")
    await conn.disconnect()
    assert [first >> 4 for first, _ in link.taken()] == [3, 14]
    assert link.closed
    assert handler.calls[-1] == ("lost", None)


async def test_the_brokers_disconnect_carries_its_reason(links: list[FakeLink]) -> None:
    handler = Recorder()
    _, link = await connected(links, handler)
    link.protocol.data_received(packets.encode_disconnect(5, 0x8E))
    error = handler.calls[-1][1]
    assert isinstance(error, Disconnected)
    assert error.code == 0x8E


@pytest.mark.parametrize(
    "data",
    [
        packets.encode_connack(5, False, 0),  # a second one
        publish(b"a", properties=b"\x23\x00\x01"),  # an alias we did not allow
        publish(b"a/+"[:2] + b"+"),  # a wildcard
        b"\xff\x00",
        b"\x30\xff\xff\xff\xff\x7f",
        b"\x82\x05\x00\x01\x00\x00\x00",  # SUBSCRIBE
    ],
    ids=["connack twice", "alias", "wildcard", "type 15 with flags", "length of five bytes", "subscribe"],
)  # B-09
async def test_b09_a_peer_that_breaks_the_rules_is_left(links: list[FakeLink], data: bytes) -> None:
    handler = Recorder()
    conn, link = await connected(links, handler)
    handler.calls.clear()
    link.protocol.data_received(data)
    assert isinstance(handler.calls[-1][1], BrokenPeer)
    assert not [call for call in handler.calls if call[0] == "publish"]
    assert not conn.open
    assert link.closed or link.aborted


async def test_allowed_aliases_are_resolved(links: list[FakeLink]) -> None:
    handler = Recorder()
    _, link = await connected(links, handler, topic_alias_maximum=2)
    handler.calls.clear()
    link.protocol.data_received(publish(b"a", properties=b"\x23\x00\x02") + publish(b"", properties=b"\x23\x00\x02"))
    assert [call[1] for call in handler.calls if call[0] == "publish"] == [b"a", b"a"]
    link.protocol.data_received(publish(b"a", properties=b"\x23\x00\x03"))
    assert isinstance(handler.calls[-1][1], BrokenPeer)


async def test_a_failing_handler_ends_the_connection_only(
    links: list[FakeLink], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Recorder):
        def on_publish(self, conn: Connection, publish: packets.Publish) -> None:
            raise KeyError("boom")

    handler = Broken()
    conn, link = await connected(links, handler)
    with caplog.at_level(logging.ERROR):
        link.protocol.data_received(publish(b"a"))
    assert isinstance(handler.calls[-1][1], ConnectionError)
    assert "boom" in caplog.text
    assert not conn.open


async def test_a_quiet_connection_pings_and_a_silent_broker_is_given_up(
    links: list[FakeLink],
) -> None:
    handler = Recorder()
    answer = Properties(server_keep_alive=1)
    conn, link = await connected(links, handler, keep_alive=1000, properties=answer)
    link.taken()
    async with asyncio.timeout(3):
        while conn.open:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (0xC0, b"") in link.taken()
    assert isinstance(handler.calls[-1][1], Silent)
    assert link.aborted


async def test_ping_measures_the_round_trip(links: list[FakeLink]) -> None:
    conn, link = await connected(links, Handler())
    ping = asyncio.ensure_future(conn.ping())
    await tick()
    link.protocol.data_received(packets.encode_pingresp())
    assert await ping == conn.round_trip
