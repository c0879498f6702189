"""Properties on their way across."""

from __future__ import annotations

import pytest

from bridges._mqtt_path import LONGEST, Loops, carry, is_marked
from broker.mqtt.codes import PacketType
from broker.mqtt.errors import ProtocolError
from broker.mqtt.packets import Publish, decode_publish, encode_publish
from broker.mqtt.properties import Properties, decode_properties, encode_properties, user_property

CARRIED = (
    b"\x01\x01"
    + b"\x03\x00\x0atext/plain"
    + b"\x08\x00\x05reply"
    + b"\x09\x00\x03\x00\x26\xff"
    + user_property("k", "1")
    + user_property("k", "2")
)


def message(block: bytes) -> Publish:
    raw = encode_publish(b"a", b"", 0, False, False, 0, 5, block)
    return decode_publish(raw[0], raw[2:] if raw[1] < 0x80 else raw[3:], 5)


def read(block: bytes) -> Properties:
    from broker.mqtt.framing import encode_length

    whole = encode_length(len(block)) + block
    properties, _ = decode_properties(whole, 0, len(whole), PacketType.PUBLISH)
    assert properties is not None
    return properties


def test_everything_else_crosses_as_it_came() -> None:
    out = read(carry(message(CARRIED + b"\x02\x00\x00\x00\x3c"), "node-a", outward=True))
    assert (out.payload_format_indicator, out.content_type, out.response_topic) == (1, "text/plain", "reply")
    assert out.correlation_data == b"\x00\x26\xff"
    assert out.message_expiry_interval == 60
    assert out.user_properties == [("k", "1"), ("k", "2"), ("x-bridge-path", "node-a")]


def test_our_metadata_never_leaves_and_never_enters() -> None:
    block = user_property("$isthmus", '{"c":"forged"}') + user_property("k", "v")
    for outward in (True, False):
        properties = read(carry(message(block), "node-a", outward))
        assert properties.user_properties is not None
        assert ("k", "v") in properties.user_properties
        assert not [key for key, _ in properties.user_properties if key == "$isthmus"]


def test_metadata_hidden_in_another_property_is_not_mistaken_for_ours() -> None:
    inner = user_property("$isthmus", "{}")
    block = b"\x09" + len(inner).to_bytes(2, "big") + inner
    assert read(carry(message(block), "node-a", outward=False)).correlation_data == inner


def test_the_path_grows_on_the_way_out_only() -> None:
    came = user_property("x-bridge-path", "b,c")
    assert read(carry(message(came), "a", outward=True)).user_properties == [("x-bridge-path", "b,c,a")]
    assert read(carry(message(came), "a", outward=False)).user_properties == [("x-bridge-path", "b,c")]
    assert carry(Publish(b"a", b""), "a", outward=True) == user_property("x-bridge-path", "a")
    assert carry(Publish(b"a", b""), "a", outward=False) == b""


@pytest.mark.parametrize("outward", [True, False])
@pytest.mark.parametrize(
    "block",
    [
        user_property("x-bridge-path", "b,a,c"),
        user_property("x-bridge-path", "b") + user_property("x-bridge-path", "a"),
        user_property("x-bridge-path", ",".join(f"n{n}" for n in range(LONGEST + 1))),
    ],
    ids=["our name", "our name in a second property", "too many hops"],
)
def test_b06_a_message_that_runs_in_a_circle_is_stopped(block: bytes, outward: bool) -> None:
    with pytest.raises(Loops):
        carry(message(block), "a", outward)


def test_the_longest_path_still_crosses() -> None:
    carry(message(user_property("x-bridge-path", ",".join(f"n{n}" for n in range(LONGEST)))), "a", True)


def test_text_a_strict_broker_refuses_is_found_before_it_is_sent() -> None:
    lenient = Publish(b"a", b"", properties=Properties(forward=user_property("k", "bell\x07")))
    with pytest.raises(ProtocolError):
        carry(lenient, "a", outward=False)


def test_encoding_is_what_the_codec_writes() -> None:
    assert encode_properties(Properties(user_properties=[("x-bridge-path", "a")]))[1:] == carry(
        Publish(b"a", b""), "a", outward=True
    )


def test_what_comes_in_is_marked_where_the_broker_does_not_know_it_again() -> None:
    forged = user_property("x-bridge-origin", "n/other") + user_property("k", "v")
    block = carry(message(forged), "n", outward=False, origin="n/hq")
    assert read(block).user_properties == [("k", "v"), ("x-bridge-origin", "n/hq")]
    assert carry(Publish(b"a", b""), "n", outward=False, origin="n/hq") == user_property("x-bridge-origin", "n/hq")
    assert is_marked(message(block), "n/hq")
    assert not is_marked(message(block), "n/other")
    assert not is_marked(Publish(b"a", b""), "n/hq")


def test_a_mark_never_leaves() -> None:
    came = user_property("x-bridge-origin", "n/other") + user_property("k", "v")
    assert read(carry(message(came), "n", outward=True, origin="n/hq")).user_properties == [
        ("k", "v"),
        ("x-bridge-path", "n"),
    ]
