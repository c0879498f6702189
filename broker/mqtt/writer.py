# cython: annotation_typing=False
# (the types are in the .pxd)
"""Values to bytes: what `reader` reads, written. Values that do not fit raise ValueError."""

from __future__ import annotations

from broker.mqtt.framing import encode_length


def uint16(n: int) -> bytes:
    """Two bytes."""
    return bytes((n >> 8, n & 0xFF))


def uint32(n: int) -> bytes:
    """Four bytes."""
    return bytes((n >> 24, n >> 16 & 0xFF, n >> 8 & 0xFF, n & 0xFF))


def binary(data: bytes) -> bytes:
    """Bytes behind a two-byte length."""
    size = len(data)
    if size > 0xFFFF:
        raise ValueError(f"{size} bytes do not fit into a field of 65535")
    return uint16(size) + data


def text(value: str) -> bytes:
    """A UTF-8 string behind a two-byte length."""
    return binary(value.encode("utf-8"))


def packet(first_byte: int, body: bytes) -> bytes:
    """A whole packet: first byte, length, body."""
    size = len(body)
    if size < 0x80:
        return bytes((first_byte, size)) + body
    return bytes((first_byte,)) + encode_length(size) + body
