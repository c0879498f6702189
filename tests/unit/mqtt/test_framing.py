"""Packet boundaries in a byte stream."""

from __future__ import annotations

import time

import pytest

from broker.mqtt.errors import ProtocolError
from tests.packets.codec import Wire
from tests.packets.table import data, malformed, valid

LENGTHS = {
    0: "00",
    127: "7f",
    128: "8001",
    16_383: "ff7f",
    16_384: "808001",
    2_097_151: "ffff7f",
    2_097_152: "80808001",
    268_435_455: "ffffff7f",
}  # MQTT 5, table 1-1


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_is_written_in_its_shortest_form(wire: Wire, length: int) -> None:
    assert wire.framing.encode_length(length) == bytes.fromhex(LENGTHS[length])


@pytest.mark.parametrize("length", [-1, 268_435_456, 1 << 40])
def test_a_length_beyond_the_field_is_a_value_error(wire: Wire, length: int) -> None:
    with pytest.raises(ValueError):
        wire.framing.encode_length(length)


@pytest.mark.parametrize("version", [4, 5])
def test_p12_one_segment_and_single_bytes_give_the_same_packets(wire: Wire, version: int) -> None:
    stream = b"".join(entry.data for entry in valid(version)) + b"\x30\x82\x02\x00\x01t" + bytes(255)
    whole = wire.framing.FrameReader(1 << 20).feed(stream)
    reader = wire.framing.FrameReader(1 << 20)
    single = [packet for i in range(len(stream)) for packet in reader.feed(stream[i : i + 1])]
    assert single == whole
    assert len(whole) == len(list(valid(version))) + 1
    for size in (2, 3, 7, 64, 1000):
        reader = wire.framing.FrameReader(1 << 20)
        assert [p for i in range(0, len(stream), size) for p in reader.feed(stream[i : i + size])] == whole


def test_p01_an_overlong_length_is_refused_at_its_fourth_byte(wire: Wire) -> None:
    reader = wire.framing.FrameReader(1 << 28)
    assert reader.feed(b"\x10\xff\xff\xff") == []
    with pytest.raises(ProtocolError) as refusal:
        reader.feed(b"\xff")
    assert refusal.value.code == 0x81


def test_p02_nothing_behind_a_malformed_length_is_ever_read(wire: Wire) -> None:
    reader = wire.framing.FrameReader(1 << 28)
    with pytest.raises(ProtocolError):
        reader.feed(data("length_five_bytes_then_publish"))
    with pytest.raises(ProtocolError):
        reader.feed(data("publish_v5"))


@pytest.mark.parametrize("name", [e.name for e in malformed() if e.name.startswith("length_")])
def test_p03_malformed_lengths_are_refused_byte_by_byte_too(wire: Wire, name: str) -> None:
    reader = wire.framing.FrameReader(1 << 28)
    stream = data(name)
    code = 0
    for i in range(5):
        try:
            assert reader.feed(stream[i : i + 1]) == []
        except ProtocolError as refusal:
            code = refusal.code
            break
    assert code == 0x81


def test_p06_a_packet_above_the_limit_is_refused_by_its_header(wire: Wire) -> None:
    limit = 65_536
    body = limit - 4
    fits = b"\x10" + wire.framing.encode_length(body)
    assert wire.framing.FrameReader(limit).feed(fits + bytes(body)) == [(0x10, bytes(body))]
    with pytest.raises(ProtocolError) as refusal:
        wire.framing.FrameReader(limit).feed(b"\x10" + wire.framing.encode_length(body + 1))
    assert refusal.value.code == 0x95


def test_a_huge_packet_in_small_reads_is_not_copied_again_and_again(wire: Wire) -> None:
    """The pieces are joined once: the bytes copied do not grow with the square of the reads."""

    def collect(reads: int) -> float:
        reader = wire.framing.FrameReader(1 << 28)
        assert reader.feed(b"\x30" + wire.framing.encode_length(reads << 10)) == []
        piece = bytes(1 << 10)
        started = time.process_time()
        found = [packet for _ in range(reads) for packet in reader.feed(piece)]
        took = time.process_time() - started
        assert [(first, len(body)) for first, body in found] == [(0x30, reads << 10)]
        return took

    small = min(collect(256) for _ in range(5))
    # 64 times the reads: linear is 64, quadratic 4 096, the rest a busy machine
    assert min(collect(16 << 10) for _ in range(2)) <= 64 * 12 * max(small, 1e-5)


def test_bytes_of_the_next_packet_behind_a_long_body_are_kept(wire: Wire) -> None:
    reader = wire.framing.FrameReader(1 << 20)
    long = wire.packets.encode_publish(b"t", bytes(1000), 0, False, False, 0, 4)
    assert reader.feed(long[:500]) == []
    assert len(reader.feed(long[500:] + b"\xc0")) == 1
    assert reader.feed(b"\x00\xd0\x00") == [(0xC0, b""), (0xD0, b"")]
