"""The whole table: valid packets are understood and written back, malformed ones are refused with their reason."""

from __future__ import annotations

import pytest

from broker.mqtt.errors import ProtocolError
from tests.packets.codec import Wire, decode, describe, encode
from tests.packets.table import BAD_UTF8, CLIENT, CONTROLS, PACKETS, SERVER, Entry, data, malformed, valid

VALID = [pytest.param(entry, version, id=f"{entry}-{version}") for entry in valid() for version in entry.versions]
MALFORMED = [
    pytest.param(entry, version, id=f"{entry}-{version}") for entry in malformed() for version in entry.versions
]


def _first_difference(expected: dict[str, object], found: dict[str, object]) -> str:
    for name, value in expected.items():
        if isinstance(value, dict):
            inner = found[name]
            assert isinstance(inner, dict), f"{name} is {inner!r}"
            if name == "properties" and "forward" not in value:
                inner = {key: item for key, item in inner.items() if key != "forward"}
            if name == "properties" and set(inner) - set(value) - {"forward"}:
                return f"unexpected {set(inner) - set(value)}"
            difference = _first_difference(value, inner)
            if difference:
                return difference
        elif found.get(name, b"" if name == "forward" else None) != value:
            return f"{name} is {found.get(name)!r}, not {value!r}"
    return ""


@pytest.mark.parametrize(("entry", "version"), VALID)
def test_a_valid_packet_is_understood(wire: Wire, entry: Entry, version: int) -> None:
    packet = decode(wire, entry.data, version, entry.direction == CLIENT)
    assert entry.values is not None
    assert _first_difference(entry.values, describe(packet)) == ""


@pytest.mark.parametrize(("entry", "version"), [p for p in VALID if p.values[0].canonical])  # type: ignore[attr-defined]
def test_a_decoded_packet_is_written_back_byte_for_byte(wire: Wire, entry: Entry, version: int) -> None:
    packet = decode(wire, entry.data, version, entry.direction == CLIENT)
    assert encode(wire, packet, entry.data[0], version) == entry.data


@pytest.mark.parametrize(("entry", "version"), MALFORMED)
def test_a_malformed_packet_is_refused_with_its_reason(wire: Wire, entry: Entry, version: int) -> None:
    with pytest.raises(ProtocolError) as refusal:
        decode(wire, entry.data, version, entry.direction == CLIENT)
    assert refusal.value.code == entry.code, str(refusal.value)


@pytest.mark.parametrize(("entry", "version"), VALID)
def test_every_valid_packet_cut_short_is_refused_or_means_less(wire: Wire, entry: Entry, version: int) -> None:
    """P-09, P-10: no byte beyond the body is ever taken for part of it."""
    size = len(entry.data) - 2 if len(entry.data) < 130 else len(entry.data) - 3
    body = entry.data[len(entry.data) - size :]
    for cut in range(size):
        shorter = body[:cut]
        try:
            packet = wire.packets.decode(entry.data[0], shorter, version, entry.direction == CLIENT)
        except ProtocolError:
            continue
        alone = wire.packets.decode(entry.data[0], bytes(bytearray(shorter)), version, entry.direction == CLIENT)
        assert describe(packet) == describe(alone)
        if packet is not None and entry.canonical and entry.data[0] >> 4 != 1:
            written = encode(wire, packet, entry.data[0], version)
            assert len(written) <= len(entry.data)


REFUSED_CONNECTS = [e for e in malformed() if e.name.startswith("connect_") and e.data[0] == 0x10]


@pytest.mark.parametrize("entry", REFUSED_CONNECTS, ids=str)
def test_a_refused_connect_says_in_which_version_to_answer(wire: Wire, entry: Entry) -> None:
    body = entry.data[2:] if entry.data[1] < 128 else entry.data[3:]
    with pytest.raises(ProtocolError) as refusal:
        wire.packets.decode_connect(body)
    unknown = ("connect_lower_case_name", "connect_empty", "connect_name_only", "connect_name_too_long")
    assert refusal.value.version == (0 if entry.name in unknown else entry.versions[0])


@pytest.mark.parametrize("key", CONTROLS)
@pytest.mark.parametrize("version", [3, 4, 5])
def test_p23_control_characters_pass_when_strictness_is_off(wire: Wire, key: str, version: int) -> None:
    p = wire.packets
    name = CONTROLS[key]
    assert p.decode_connect(data(f"connect_client_id_{key}_v{version}")[2:], strict=False).client_id == name.decode()
    assert p.decode_connect(data(f"connect_username_{key}_v{version}")[2:], strict=False).username == name.decode()
    assert p.decode_connect(data(f"connect_will_topic_{key}_v{version}")[2:], strict=False).will.topic == name
    assert p.decode_publish(0x30, data(f"publish_topic_{key}_v{version}")[2:], version, strict=False).topic == name
    subscribe = p.decode_subscribe(data(f"subscribe_filter_{key}_v{version}")[2:], version, strict=False)
    assert subscribe.filters == [(name, 0)]
    unsubscribe = p.decode_unsubscribe(data(f"unsubscribe_filter_{key}_v{version}")[2:], version, strict=False)
    assert unsubscribe.filters == [name]


@pytest.mark.parametrize("key", BAD_UTF8)
def test_p22_invalid_utf8_is_refused_even_when_strictness_is_off(wire: Wire, key: str) -> None:
    with pytest.raises(ProtocolError):
        wire.packets.decode_connect(data(f"connect_client_id_{key}_v5")[2:], strict=False)
    with pytest.raises(ProtocolError):
        wire.packets.decode_publish(0x30, data(f"publish_user_property_{key}")[2:], 5, strict=False)


@pytest.mark.parametrize("version", [3, 4, 5])
def test_check_flags_accepts_exactly_the_first_bytes_of_the_specification(wire: Wire, version: int) -> None:
    """Chapter 2.1.3, over all 256 bytes. P-13, P-31, P-33, P-34"""
    fixed = {kind << 4 for kind in (1, 2, 4, 5, 7, 9, 11, 12, 13, 14)} | {0x62, 0x82, 0xA2}
    publish = {0x30, 0x31, *range(0x32, 0x36), *range(0x3A, 0x3E)}
    extra = {3: {0x6A, 0x8A, 0xAA}, 4: set(), 5: {0xF0}}[version]
    accepted = set()
    for first in range(256):
        try:
            wire.packets.check_flags(first, version)
        except ProtocolError as refusal:
            assert refusal.code in (0x81, 0x82)  # noqa: PT017
        else:
            accepted.add(first)
    assert accepted == fixed | publish | extra


@pytest.mark.parametrize(
    ("code", "answer"),
    [(0, 0), (0x84, 1), (0x85, 2), (0x88, 3), (0x89, 3), (0x86, 4), (0x87, 5), (0x8A, 5), (0x97, 3), (0x9F, 3), (2, 2)],
)
def test_a_connack_of_3x_carries_the_nearest_return_code(wire: Wire, code: int, answer: int) -> None:
    assert wire.packets.encode_connack(4, False, code) == bytes((0x20, 2, 0, answer))


def test_a_refusal_never_says_that_a_session_is_present(wire: Wire) -> None:
    assert wire.packets.encode_connack(5, True, 0x87) == bytes.fromhex("2003008700")  # [MQTT-3.2.2-6]


def test_a_suback_of_3x_turns_every_failure_into_0x80(wire: Wire) -> None:
    assert wire.packets.encode_suback(1, 4, [2, 0x87, 0x8F, 0]) == bytes.fromhex("9006000102808000")


def test_3x_acknowledgements_have_no_code_and_no_properties(wire: Wire) -> None:
    properties = wire.properties.Properties(reason_string="because")
    assert wire.packets.encode_ack(4, 7, 4, 0x87, properties) == bytes.fromhex("40020007")
    assert wire.packets.encode_disconnect(4, 0x8E, properties) == bytes.fromhex("e000")
    assert wire.packets.encode_unsuback(7, 3, [0x11], properties) == bytes.fromhex("b0020007")
    assert wire.packets.encode_connack(3, False, 0, properties) == bytes.fromhex("20020000")


def test_long_packets_get_a_length_of_two_to_four_bytes(wire: Wire) -> None:
    for size in (127, 128, 16_383, 16_384, 2_097_151, 2_097_152):
        payload = bytes(size - 3)
        raw = wire.packets.encode_publish(b"t", payload, 0, False, False, 0, 4)
        [(first, body)] = wire.framing.FrameReader(1 << 28).feed(raw)
        assert (first, len(body)) == (0x30, size)
        assert wire.packets.decode_publish(first, body, 4).payload == payload


@pytest.mark.parametrize("version", [3, 4, 5])
def test_values_that_do_not_fit_raise_value_error(wire: Wire, version: int) -> None:
    p = wire.packets
    long = "x" * 65_536
    with pytest.raises(ValueError):
        p.encode_connect(p.Connect(version=version, client_id=long))
    with pytest.raises(ValueError):
        p.encode_publish(long.encode(), b"", 0, False, False, 0, version)
    with pytest.raises(ValueError):
        p.encode_subscribe(65_536, version, [(b"a", 0)])
    with pytest.raises(ValueError):
        wire.properties.encode_properties(wire.properties.Properties(receive_maximum=65_536))
    with pytest.raises(ValueError):
        wire.properties.encode_properties(wire.properties.Properties(maximum_packet_size=1 << 32))
    with pytest.raises(ValueError):
        wire.properties.user_property("k", long)


def test_the_table_covers_every_packet_type_in_both_forms() -> None:
    for entries in (valid, malformed):
        assert {e.data[0] >> 4 for e in entries(direction=CLIENT)} >= {1, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15}
        assert {e.data[0] >> 4 for e in entries(direction=SERVER)} >= {2, 3, 4, 5, 6, 7, 9, 11, 13, 14, 15}
    assert len(PACKETS) > 300
