"""Records of what a lane received."""

from __future__ import annotations

import logging

import orjson
import pytest

from broker.client.delivery import Delivery, decode_delivery
from broker.extend.record import record_from_publish
from broker.extend.sink import Record
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Publish, decode_publish, encode_publish
from broker.mqtt.properties import user_property
from broker.runtime.records import records

WHO = {"c": "dev-1", "u": None, "a": "127.0.0.1", "o": None, "n": "node-1", "t": 5, "i": "a" * 32, "q": 0, "r": 1}


def both(topic: bytes, metadata: bytes) -> tuple[Publish, Publish]:
    """A packet read the short and the long way."""
    packet = encode_publish(topic, b"x", 1, False, False, 7, 5, user_property("$isthmus", metadata.decode()))
    ((first, body),) = FrameReader(1 << 20).feed(packet)
    delivery = decode_delivery(first, body)
    assert type(delivery) is Delivery
    return delivery, decode_publish(first, body, 5)


def test_a_delivery_gives_the_record_a_publish_gives() -> None:
    delivery, publish = both("t/\u00e4".encode(), orjson.dumps(WHO))
    assert records([delivery, delivery], True) == [record_from_publish(publish, True)] * 2
    assert records([delivery], True)[0].user_properties == []


@pytest.mark.parametrize("metadata", [b"no json", b"{}", b"[]"])
def test_metadata_that_cannot_be_read_is_left_out_and_the_others_keep_theirs(
    metadata: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    broken, _ = both(b"t/b", metadata)
    whole, _ = both(b"t/a", orjson.dumps(WHO))
    with caplog.at_level(logging.WARNING):
        first, second = records([broken, whole], True)
    assert (first.topic, first.payload, first.clientid, first.msgid) == ("t/b", b"x", None, None)
    assert (second.clientid, second.msgid) == ("dev-1", "a" * 32)
    assert "cannot be read" in caplog.text


def test_a_topic_that_is_no_text_is_passed_on_as_far_as_it_can_be_read() -> None:
    delivery, _ = both(b"t/b", orjson.dumps(WHO))
    delivery.topic = b"t/\xff"
    assert records([delivery], True) == [Record(topic="t/\ufffd", payload=b"x")]


def test_topics_are_remembered_in_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.runtime.records._MOST_TOPICS", 3)
    batch = [both(b"t/%d" % n, orjson.dumps(WHO))[0] for n in range(20)]
    assert [record.topic for record in records(batch, True)] == [f"t/{n}" for n in range(20)]
    from broker.runtime.records import _topics

    assert len(_topics) <= 3
