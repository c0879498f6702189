"""The publisher: identifiers, window, answers."""

from __future__ import annotations

import asyncio

import pytest

from broker.client.session import NotTaken, Publisher
from broker.mqtt import packets
from broker.mqtt.properties import Properties
from tests.unit.client.fakes import FakeLink, connected, replace_link, tick


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[FakeLink]:
    return replace_link(monkeypatch)


async def open_publisher(links: list[FakeLink], window: int | None = None) -> tuple[Publisher, FakeLink]:
    publisher = Publisher()
    conn, link = await connected(links, publisher, properties=Properties(receive_maximum=window))
    publisher.attach(conn)
    link.taken()
    return publisher, link


async def test_qos_1_resolves_with_the_acknowledgement(links: list[FakeLink]) -> None:
    publisher, link = await open_publisher(links)
    task = asyncio.ensure_future(publisher.publish("a", b"x", properties=b"\x01\x01"))
    await tick()
    ((first, body),) = link.taken()
    message = packets.decode_publish(first, body, 5)
    assert (message.topic, message.qos, publisher.in_flight) == (b"a", 1, 1)
    assert not task.done()
    link.protocol.data_received(packets.encode_ack(4, message.packet_id, 5, 0x10))
    assert await task == 0x10
    assert publisher.in_flight == 0


async def test_qos_2_goes_all_the_way(links: list[FakeLink]) -> None:
    publisher, link = await open_publisher(links)
    task = asyncio.ensure_future(publisher.publish("a", b"x", qos=2))
    await tick()
    link.taken()
    link.protocol.data_received(packets.encode_ack(5, 1, 5))
    await tick()
    assert link.taken() == [(0x62, b"\x00\x01")]
    assert not task.done()
    link.protocol.data_received(packets.encode_ack(7, 1, 5))
    assert await task == 0


@pytest.mark.parametrize(("qos", "packet_type"), [(1, 4), (2, 5)])
async def test_a_refusal_is_raised_with_its_reason(links: list[FakeLink], qos: int, packet_type: int) -> None:
    publisher, link = await open_publisher(links)
    task = asyncio.ensure_future(publisher.publish("a", b"x", qos=qos))
    await tick()
    link.protocol.data_received(packets.encode_ack(packet_type, 1, 5, 0x97))
    with pytest.raises(NotTaken, match="quota exceeded") as caught:
        await task
    assert caught.value.code == 0x97


async def test_the_brokers_receive_maximum_is_kept(links: list[FakeLink]) -> None:
    publisher, link = await open_publisher(links, window=2)
    tasks = [asyncio.ensure_future(publisher.publish("a", b"%d" % n)) for n in range(5)]
    await tick()
    assert len(link.taken()) == 2
    tasks[2].cancel()  # it waits for a slot; the next must get it
    link.protocol.data_received(packets.encode_ack(4, 1, 5))
    await tick()
    ((first, body),) = link.taken()
    assert packets.decode_publish(first, body, 5).payload == b"3"
    for packet_id in (2, 3):
        link.protocol.data_received(packets.encode_ack(4, packet_id, 5))
        await tick()
    link.protocol.data_received(packets.encode_ack(4, 4, 5))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[0] == results[1] == results[3] == results[4] == 0


async def test_the_end_of_the_connection_fails_what_waits(links: list[FakeLink]) -> None:
    publisher, link = await open_publisher(links, window=1)
    tasks = [asyncio.ensure_future(publisher.publish("a", b"x")) for _ in range(2)]
    await tick()
    link.protocol.connection_lost(ConnectionResetError("reset"))
    for task in tasks:
        with pytest.raises(ConnectionError):
            await task
    with pytest.raises(ConnectionError):
        await publisher.publish("a", b"x")
