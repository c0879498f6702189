"""Properties: where each may stand, how often, with which values. P-47, P-48"""

from __future__ import annotations

import os
import sys
import time
import timeit
from itertools import pairwise

import pytest

from broker.mqtt.codes import INBOUND_PUBLISH, WILL, PacketType
from broker.mqtt.errors import ProtocolError
from tests.packets.codec import Wire

# Table 2-4 of the specification, restated: identifier, one encoded property, its packets
CONNECT, CONNACK, PUBLISH, SUBSCRIBE = 1, 2, 3, 8
SPECIFICATION: dict[int, tuple[str, set[int]]] = {
    0x01: ("01 01", {PUBLISH, WILL}),
    0x02: ("02 00000001", {PUBLISH, WILL}),
    0x03: ("03 0001 61", {PUBLISH, WILL}),
    0x08: ("08 0001 61", {PUBLISH, WILL}),
    0x09: ("09 0001 61", {PUBLISH, WILL}),
    0x0B: ("0b 01", {PUBLISH, SUBSCRIBE}),
    0x11: ("11 00000001", {CONNECT, CONNACK, 14}),
    0x12: ("12 0001 61", {CONNACK}),
    0x13: ("13 0001", {CONNACK}),
    0x15: ("15 0001 61", {CONNECT, CONNACK, 15}),
    0x16: ("16 0001 61", {CONNECT, CONNACK, 15}),
    0x17: ("17 01", {CONNECT}),
    0x18: ("18 00000001", {WILL}),
    0x19: ("19 01", {CONNECT}),
    0x1A: ("1a 0001 61", {CONNACK}),
    0x1C: ("1c 0001 61", {CONNACK, 14}),
    0x1F: ("1f 0001 61", {CONNACK, 4, 5, 6, 7, 9, 11, 14, 15}),
    0x21: ("21 0001", {CONNECT, CONNACK}),
    0x22: ("22 0001", {CONNECT, CONNACK}),
    0x23: ("23 0001", {PUBLISH}),
    0x24: ("24 01", {CONNACK}),
    0x25: ("25 01", {CONNACK}),
    0x26: ("26 0001 61 0001 62", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, WILL}),
    0x27: ("27 00000001", {CONNECT, CONNACK}),
    0x28: ("28 01", {CONNACK}),
    0x29: ("29 01", {CONNACK}),
    0x2A: ("2a 01", {CONNACK}),
}
PLACES = [int(p) for p in PacketType if p not in (12, 13)] + [WILL, INBOUND_PUBLISH]


def _allowed(number: int, place: int) -> bool:
    if place == INBOUND_PUBLISH:
        return number != 0x0B and PUBLISH in SPECIFICATION[number][1]  # [MQTT-3.3.4-6]
    return place in SPECIFICATION[number][1]


def _block(*properties: bytes) -> bytes:
    body = b"".join(properties)
    return bytes([len(body)] if len(body) < 128 else [len(body) % 128 + 128, len(body) // 128]) + body


def _refused(wire: Wire, block: bytes, place: int) -> int:
    with pytest.raises(ProtocolError) as refusal:
        wire.properties.decode_properties(block, 0, len(block), place)
    return refusal.value.code


@pytest.mark.parametrize("place", PLACES)
def test_p48_each_property_is_accepted_only_where_the_specification_has_it(wire: Wire, place: int) -> None:
    for number, (sample, _) in SPECIFICATION.items():
        block = _block(bytes.fromhex(sample))
        if _allowed(number, place):
            properties, offset = wire.properties.decode_properties(block, 0, len(block), place)
            assert offset == len(block)
            assert wire.properties.encode_properties(properties) == block
        else:
            assert _refused(wire, block, place) == 0x82, hex(number)


@pytest.mark.parametrize("place", PLACES)
def test_p47_a_repeated_property_is_refused_everywhere(wire: Wire, place: int) -> None:
    for number, (sample, _) in SPECIFICATION.items():
        if not _allowed(number, place) or number == 0x26 or (number == 0x0B and place == PUBLISH):
            continue
        assert _refused(wire, _block(bytes.fromhex(sample) * 2), place) == 0x82, hex(number)


def test_user_properties_and_delivered_subscription_identifiers_may_repeat(wire: Wire) -> None:
    block = _block(bytes.fromhex("0b01 2600016100016b 0b02 2600016100016b 0b01"))
    properties, _ = wire.properties.decode_properties(block, 0, len(block), PUBLISH)
    assert properties.subscription_identifiers == [1, 2, 1]
    assert properties.user_properties == [("a", "k"), ("a", "k")]


def test_p48_every_identifier_without_a_meaning_is_malformed(wire: Wire) -> None:
    for number in set(range(256)) - set(SPECIFICATION):
        for place in PLACES:
            assert _refused(wire, _block(bytes([number]) + bytes(8)), place) == 0x81
    for number in ("8001", "8080 01", "808080 01", "80808080 01", "a6 00"):
        assert _refused(wire, _block(bytes.fromhex(number) + bytes(8)), PUBLISH) == 0x81


def test_every_property_cut_short_is_malformed(wire: Wire) -> None:
    for sample, places in SPECIFICATION.values():
        raw = bytes.fromhex(sample)
        for cut in range(1, len(raw)):
            # the rest of the value lies in the packet, but behind the end of the block
            block = bytes([cut]) + raw
            with pytest.raises(ProtocolError) as refusal:
                wire.properties.decode_properties(block, 0, len(block), min(places))
            assert refusal.value.code == 0x81


@pytest.mark.parametrize("number", [0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A])
@pytest.mark.parametrize("value", [2, 0x80, 0xFF])
def test_a_flag_is_0_or_1(wire: Wire, number: int, value: int) -> None:
    assert _refused(wire, _block(bytes((number, value))), min(SPECIFICATION[number][1])) == 0x82


@pytest.mark.parametrize(
    ("raw", "place", "code"),
    [
        ("21 0000", CONNECT, 0x82),  # P-44
        ("21 0000", CONNACK, 0x82),
        ("27 00000000", CONNECT, 0x82),  # P-45
        ("23 0000", PUBLISH, 0x94),  # P-51
        ("0b 00", SUBSCRIBE, 0x82),  # P-52
        ("0b 00", PUBLISH, 0x82),
        ("08 0001 23", PUBLISH, 0x82),  # P-54
        ("08 0003 612f2b", WILL, 0x82),
        ("08 0000", PUBLISH, 0x82),
    ],
)
def test_impossible_values_are_refused(wire: Wire, raw: str, place: int, code: int) -> None:
    assert _refused(wire, _block(bytes.fromhex(raw)), place) == code


@pytest.mark.parametrize(
    ("raw", "name", "value"),
    [
        ("22 0000", "topic_alias_maximum", 0),
        ("11 00000000", "session_expiry_interval", 0),
        ("11 ffffffff", "session_expiry_interval", 0xFFFFFFFF),
        ("21 ffff", "receive_maximum", 0xFFFF),
        ("27 80000000", "maximum_packet_size", 0x80000000),
    ],
)
def test_the_limits_of_numbers_are_read_as_they_are(wire: Wire, raw: str, name: str, value: int) -> None:
    block = _block(bytes.fromhex(raw))
    properties, _ = wire.properties.decode_properties(block, 0, len(block), CONNECT)
    assert getattr(properties, name) == value


def test_an_empty_block_is_none_and_the_offset_moves_behind_it(wire: Wire) -> None:
    assert wire.properties.decode_properties(b"ab\x00cd", 2, 5, PUBLISH) == (None, 3)
    assert wire.properties.encode_properties(None) == b"\x00"
    assert wire.properties.encode_properties(wire.properties.Properties()) == b"\x00"


@pytest.mark.parametrize(("offset", "end"), [(3, 3), (4, 3), (-1, 3), (0, 4), (2, 1 << 40)])
def test_offsets_outside_the_data_are_refused_and_not_read(wire: Wire, offset: int, end: int) -> None:
    with pytest.raises(ProtocolError):
        wire.properties.decode_properties(b"\x02\x01\x01", offset, end, PUBLISH)


def test_forward_is_what_a_publish_passes_on_in_the_order_received(wire: Wire) -> None:
    passed = [bytes.fromhex(raw) for raw in ("26000161000162", "0101", "03000174", "08000172", "090001ff")]
    kept = [bytes.fromhex(raw) for raw in ("0200000005", "0b07", "230001")]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        mixed = [passed[0], kept[order[0]], passed[1], passed[2], kept[order[1]], passed[3], kept[order[2]], passed[4]]
        block = _block(*mixed)
        properties, _ = wire.properties.decode_properties(block, 0, len(block), PUBLISH)
        assert properties.forward == b"".join(passed)
    block = _block(kept[0])
    properties, _ = wire.properties.decode_properties(block, 0, len(block), PUBLISH)
    assert properties.forward == b""
    block = _block(passed[0], bytes.fromhex("1800000005"), passed[1])
    properties, _ = wire.properties.decode_properties(block, 0, len(block), WILL)
    assert properties.forward == passed[0] + passed[1]


def test_user_property_is_one_encoded_property(wire: Wire) -> None:
    assert wire.properties.user_property("ab", "ü") == bytes.fromhex("26 0002 6162 0002 c3bc")


# P-50 -------------------------------------------------------------------------------------------------------------


def _many(wire: Wire, count: int) -> bytes:
    body = bytes.fromhex("2600000000") * count
    return bytes(wire.framing.encode_length(len(body))) + body


def _calls(wire: Wire, block: bytes, limit: int) -> int:
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        wire.properties.decode_properties(block, 0, len(block), PUBLISH, limit)
    except ProtocolError as refusal:
        assert refusal.code == 0x97  # noqa: PT017
    finally:
        sys.setprofile(None)
    return count


def test_p50_the_cap_on_user_properties_cuts_early(wire: Wire) -> None:
    """15 000 of them cost what 3 300 cost."""
    assert _refused(wire, _many(wire, 65), PUBLISH) == 0x97
    assert _refused(wire, _many(wire, 15_000), PUBLISH) == 0x97
    more = _calls(wire, _many(wire, 15_000), 64) - _calls(wire, _many(wire, 3_300), 64)
    assert abs(more) < 500  # 11 700 more would be at least as many calls; somebody's finalizer may run in between


def test_p50_the_work_grows_with_the_count_and_not_faster(wire: Wire) -> None:
    counts = [_calls(wire, _many(wire, n), 100_000) for n in (1_000, 2_000, 4_000)]
    for less, more in pairwise(counts):
        assert more <= 2.01 * less + 100
    best = {}
    for n in (500, 16_000):
        block = _many(wire, n)
        runs = []
        for _ in range(5):
            started = time.process_time()
            wire.properties.decode_properties(block, 0, len(block), PUBLISH, 100_000)
            runs.append(time.process_time() - started)
        best[n] = min(runs)
    assert best[16_000] <= 32 * 8 * best[500]  # linear is 32, quadratic 1 024, the rest a busy machine


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("ISTHMUS_SOAK") != "1", reason="about speed: make soak")
def test_p50_fifteen_thousand_take_fifty_milliseconds_and_twice_as_many_twice_as_long(wire: Wire) -> None:
    def seconds(count: int, limit: int) -> float:
        block = _many(wire, count)

        def parse() -> None:
            try:
                wire.properties.decode_properties(block, 0, len(block), PUBLISH, limit)
            except ProtocolError as refusal:
                assert refusal.code == 0x97  # noqa: PT017

        return min(timeit.repeat(parse, repeat=40, number=1))

    times = [seconds(count, 100_000) for count in (3_750, 7_500, 15_000)]
    capped = seconds(15_000, 64)
    print(f"P-50: {[f'{t * 1e3:.2f} ms' for t in times]}, refused after {capped * 1e6:.0f} µs")
    assert max(*times, capped) <= 0.050
    for less, more in pairwise(times):
        assert more <= 2.5 * less
