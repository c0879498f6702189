"""Which characters are refused, over all of Unicode."""

from __future__ import annotations

import pytest

from broker.mqtt.errors import MalformedPacket
from tests.packets.codec import Wire
from tests.packets.table import BAD_UTF8, ODD_TEXT


def _accepted(wire: Wire, text: str, strict: bool) -> bool:
    data = text.encode()
    try:
        assert wire.text.decode_text(data, strict) == text
    except MalformedPacket:
        with pytest.raises(MalformedPacket):
            wire.text.check_text(data, strict)
        return False
    wire.text.check_text(data, strict)
    return True


def test_p23_exactly_controls_and_non_characters_are_refused(wire: Wire) -> None:
    points = [*range(0x3000), *range(0xE000, 0x10000), *range(0x1F000, 0x20000), *range(0x10F000, 0x110000)]
    points = [point for point in points if not 0xD800 <= point < 0xE000]
    refused = {point for point in points if not _accepted(wire, f"a{chr(point)}", True)}
    controls = {*range(0x20), *range(0x7F, 0xA0)}
    non_characters = {*range(0xFDD0, 0xFDF0)} | {plane << 16 | low for plane in range(17) for low in (0xFFFE, 0xFFFF)}
    assert refused == (controls | non_characters) & set(points)


def test_without_strictness_only_nul_is_refused(wire: Wire) -> None:
    assert [point for point in (*range(0xA0), 0xFDD0, 0xFFFE, 0x1FFFF) if not _accepted(wire, chr(point), False)] == [0]


@pytest.mark.parametrize("key", BAD_UTF8)
@pytest.mark.parametrize("strict", [True, False])
def test_p22_what_is_not_utf8_is_refused(wire: Wire, key: str, strict: bool) -> None:
    with pytest.raises(MalformedPacket):
        wire.text.decode_text(BAD_UTF8[key], strict)
    with pytest.raises(MalformedPacket):
        wire.text.check_text(b"ok/" + BAD_UTF8[key], strict)


@pytest.mark.parametrize("key", ODD_TEXT)
def test_p24_unusual_text_is_kept_as_it_is(wire: Wire, key: str) -> None:
    assert wire.text.decode_text(ODD_TEXT[key]).encode() == ODD_TEXT[key]


def test_a_refused_character_is_found_wherever_it_stands(wire: Wire) -> None:
    for at in (0, 1, 17, 65_534):
        text = bytearray(b"x" * 65_535)
        text[at] = 0x1F
        with pytest.raises(MalformedPacket):
            wire.text.check_text(bytes(text))


def test_the_empty_text_is_text(wire: Wire) -> None:
    assert wire.text.decode_text(b"") == ""
