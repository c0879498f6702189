# cython: annotation_typing=False
# (the types are in the .pxd)
"""Packet boundaries: the length field, and a reader that cuts a byte stream into packets."""

from __future__ import annotations

from broker.mqtt.codes import ReasonCode
from broker.mqtt.errors import MalformedPacket, ProtocolError

_LARGEST = 268_435_455


def encode_length(n: int) -> bytes:
    """A variable byte integer; raises ValueError outside 0..268 435 455."""
    if n < 0 or n > _LARGEST:
        raise ValueError(f"{n} does not fit into a length field")
    if n < 0x80:
        return bytes((n,))
    if n < 0x4000:
        return bytes((n & 0x7F | 0x80, n >> 7))
    if n < 0x200000:
        return bytes((n & 0x7F | 0x80, n >> 7 & 0x7F | 0x80, n >> 14))
    return bytes((n & 0x7F | 0x80, n >> 7 & 0x7F | 0x80, n >> 14 & 0x7F | 0x80, n >> 21))


class FrameReader:
    """Cuts a byte stream into packets of at most ``max_size`` bytes, header included."""

    __slots__ = ("_broken", "_first", "_missing", "_pieces", "_tail", "max_size")

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._tail = b""  # an incomplete fixed header
        self._first = 0  # of the packet whose body is being collected
        self._missing = 0  # bytes that its body still lacks; 0 when no body is being collected
        self._pieces: list[bytes] = []
        self._broken = False

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The packets completed by ``data``, each as its first byte and its body.

        Raises `ProtocolError` as soon as a length field is malformed or announces too much; nothing after it is read,
        and every later call raises again.
        """
        if self._broken:
            raise MalformedPacket("the stream is broken")
        packets: list[tuple[int, bytes]] = []
        position = 0
        if self._missing:
            position = min(self._missing, len(data))
            self._pieces.append(data[:position])
            self._missing -= position
            if self._missing:
                return packets
            packets.append((self._first, b"".join(self._pieces)))
            self._pieces = []
        elif self._tail:
            data = self._tail + data
            self._tail = b""
        try:
            self._split(data, position, packets)
        except ProtocolError:
            self._broken = True
            raise
        return packets

    def _split(self, data: bytes, position: int, packets: list[tuple[int, bytes]]) -> None:
        """Cuts ``data`` from ``position`` on; keeps what is incomplete for the next call."""
        size = len(data)
        view = data
        while position < size:
            start = position
            length = 0
            shift = 0
            while True:
                position += 1
                if position >= size:
                    self._tail = data[start:]
                    return
                byte = view[position]
                length |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift > 21:
                    raise MalformedPacket("a length field is longer than four bytes")
            position += 1
            if byte == 0 and shift > 0:  # [MQTT-1.5.5-1]
                raise MalformedPacket("a length field is not in its shortest form")
            if position - start + length > self.max_size:
                raise ProtocolError(ReasonCode.PACKET_TOO_LARGE, "a packet exceeds the maximum packet size")
            first = view[start]
            if length > size - position:
                self._first = first
                self._missing = length - (size - position)
                self._pieces.append(view[position:size])
                return
            packets.append((first, view[position : position + length]))
            position += length
