# cython: annotation_typing=False
# (the types are in the .pxd)
"""A cursor over the body of one packet. Every read checks that the bytes are there before it looks at them."""

from __future__ import annotations

from broker.mqtt.errors import MalformedPacket
from broker.mqtt.text import decode_text


class Reader:
    """Reads ``data`` from ``position`` up to ``end``; a read beyond ``end`` raises `MalformedPacket`."""

    __slots__ = ("_data", "_view", "end", "position")

    def __init__(self, data: bytes, position: int, end: int) -> None:
        if not 0 <= position <= end <= len(data):
            raise MalformedPacket("a length exceeds the packet")
        self._data = data  # keeps the bytes alive: compiled, _view is a pointer into them
        self._view = data
        self.position = position
        self.end = end

    def _take(self, size: int) -> int:
        """Moves on by ``size`` bytes and answers where they start."""
        start = self.position
        if size > self.end - start:
            raise MalformedPacket("the packet ends too early")
        self.position = start + size
        return start

    def byte(self) -> int:
        """One byte."""
        start = self._take(1)
        return self._view[start]

    def uint16(self) -> int:
        """A two-byte integer."""
        start = self._take(2)
        return self._view[start] << 8 | self._view[start + 1]

    def uint32(self) -> int:
        """A four-byte integer."""
        high = self.uint16()
        return high << 16 | self.uint16()

    def varint(self) -> int:
        """A variable byte integer in at most four bytes and in its shortest form."""
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift > 0:  # [MQTT-1.5.5-1]
                    raise MalformedPacket("a variable byte integer is not in its shortest form")
                return value
        raise MalformedPacket("a variable byte integer is longer than four bytes")

    def binary(self) -> bytes:
        """Bytes behind a two-byte length."""
        size = self.uint16()
        start = self._take(size)
        return self._view[start : start + size]

    def text(self, strict: bool) -> str:
        """A UTF-8 string behind a two-byte length."""
        return decode_text(self.binary(), strict)

    def slice(self, start: int, end: int) -> bytes:
        """Bytes already read, again; the caller vouches for the offsets."""
        return self._view[start:end]

    def rest(self) -> bytes:
        """All that is left."""
        start = self.position
        self.position = self.end
        return self._view[start : self.end]

    def finish(self) -> None:
        """Raises `MalformedPacket` when bytes are left."""
        if self.position != self.end:
            raise MalformedPacket("the packet is longer than its contents")
