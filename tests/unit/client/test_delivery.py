"""The short way of decoding a PUBLISH says what the long one says, or nothing."""

from __future__ import annotations

import random

import pytest

from broker.client.delivery import Delivery, decode_delivery
from broker.mqtt.errors import ProtocolError
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Publish, decode_publish, encode_publish
from broker.mqtt.properties import user_property

METADATA = '{"c":"dev-1","u":null,"t":1}'


def frame(
    topic: bytes = b"t/a", payload: bytes = b"x", qos: int = 1, properties: bytes = b"", packet_id: int = 7,
    retain: bool = False, dup: bool = False,
) -> tuple[int, bytes]:  # fmt: skip
    packet = encode_publish(topic, payload, qos, retain, dup, packet_id, 5, properties)
    ((first, body),) = FrameReader(1 << 20).feed(packet)
    return first, body


def own(value: str = METADATA) -> bytes:
    return user_property("$isthmus", value)


def seen(publish: Publish) -> tuple[object, ...]:
    metadata = publish.metadata.decode() if isinstance(publish, Delivery) else None
    if metadata is None and publish.properties is not None:
        pairs = publish.properties.user_properties
        assert pairs is not None
        assert [key for key, _ in pairs] == ["$isthmus"]
        metadata = pairs[0][1]
    return (
        publish.topic, publish.payload, publish.qos, publish.retain, publish.dup, publish.packet_id, metadata,
    )  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 100, 113, 114, 115, 116, 117, 127, 128, 300, 16_000, 16_369, 16_370, 16_371])
@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
def test_a_publish_with_nothing_but_metadata_is_a_delivery(size: int, flags: tuple[bool, bool]) -> None:
    first, body = frame(b"t/\xc3\xa4", b"p" * 40, 1, own("v" * size), 65_535, *flags)
    delivery = decode_delivery(first, body)
    assert isinstance(delivery, Delivery) == (size <= 16_370), (
        "a property block of three length bytes goes the long way"
    )
    if delivery is not None:
        assert seen(delivery) == seen(decode_publish(first, body, 5))
        assert delivery.properties is None


def test_an_empty_payload_is_one() -> None:
    delivery = decode_delivery(*frame(payload=b"", properties=own()))
    assert delivery is not None
    assert delivery.payload == b""


@pytest.mark.parametrize(
    ("first", "body"),
    [
        frame(qos=0, properties=own()), frame(qos=2, properties=own()), frame(), frame(topic=b"", properties=own()),
        frame(properties=own() + user_property("k", "v")), frame(properties=user_property("k", "v") + own()),
        frame(properties=user_property("$isthmus2", METADATA)), frame(properties=b"\x01\x01" + own()),
        frame(properties=user_property("$isthmu", METADATA)), (0x40, b"\x00\x07"), (0x32, b""), (0x32, b"\x00"),
        frame(packet_id=0, properties=own()), (0x32, b"\xff\xff"), (0x36, frame(properties=own())[1]),
    ],
)  # fmt: skip
def test_every_other_packet_goes_the_long_way(first: int, body: bytes) -> None:
    assert decode_delivery(first, body) is None


def test_a_packet_cut_or_changed_anywhere_means_the_same_to_both_or_is_left_to_the_long_way() -> None:
    chance = random.Random(5)
    first, body = frame(b"t/abc", b'{"v": 1}', 1, own())
    told = 0
    refusals = set()
    for cut in range(len(body)):
        assert decode_delivery(first, body[:cut]) is None or decode_publish(first, body[:cut], 5)
    for _ in range(20_000):
        changed = bytearray(body)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] = chance.choice(
                (0, 1, 0x26, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
        delivery = decode_delivery(first, bytes(changed))
        if delivery is None:
            continue
        told += 1
        try:
            publish = decode_publish(first, bytes(changed), 5, strict=False)
        except ProtocolError as error:
            refusals.add(str(error))
        else:
            assert seen(delivery) == seen(publish)
    assert told > 5_000
    assert refusals <= {
        "a string is not valid UTF-8", "a string contains U+0000", "a wildcard in the topic of a PUBLISH",
    }, "texts: who makes them notices"  # fmt: skip
