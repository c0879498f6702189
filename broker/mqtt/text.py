# cython: annotation_typing=False
# (the types are in the .pxd)
"""Strings on the wire: strict UTF-8, and which characters are refused."""

from __future__ import annotations

from broker.mqtt.errors import MalformedPacket


def decode_text(data: bytes, strict: bool = True) -> str:
    """The text of a UTF-8 string without its length prefix.

    Raises `MalformedPacket` for ill-formed UTF-8, surrogates and U+0000, and when ``strict`` also for the other control
    characters and for non-characters, which the specification lets a receiver refuse.
    """
    try:
        text = data.decode("utf-8")  # [MQTT-1.5.4-1]
    except UnicodeDecodeError:
        raise MalformedPacket("a string is not valid UTF-8") from None
    if not text.isprintable():  # true for nearly every string, and then there is nothing to look for
        _check_characters(text, strict)
    return text


def check_text(data: bytes, strict: bool = True) -> None:
    """Raises what `decode_text` would raise."""
    decode_text(data, strict)


def _check_characters(text: str, strict: bool) -> None:
    if "\0" in text:  # [MQTT-1.5.4-2]
        raise MalformedPacket("a string contains U+0000")
    if strict and not all(map(_is_allowed, text)):
        raise MalformedPacket("a string contains a control character or a non-character")


def _is_allowed(character: str) -> bool:
    point = ord(character)
    if point < 0xA0:
        return 0x20 <= point < 0x7F
    return not (0xFDD0 <= point <= 0xFDEF or point & 0xFFFE == 0xFFFE)
