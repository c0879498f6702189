"""Structure-aware fuzzing of the decoder. P-80: whatever arrives, only ProtocolError leaves, and soon."""

from __future__ import annotations

import random
import time

import pytest

from broker.mqtt.errors import ProtocolError
from broker.mqtt.framing import encode_length
from tests.packets.codec import COMPILED, Wire, decode, describe, wires
from tests.packets.table import PACKETS

_ROUNDS = 12_000
_SEEDS = [entry.data for entry in PACKETS.values() if not entry.name.startswith(("length_", "publish_topic_beyond"))]
_BODIES = [(raw[0], raw[2:] if raw[1] < 128 else raw[3:]) for raw in _SEEDS]
_CUTTERS = (b"\x00\x00", b"\xff\xff", b"\x00\x01", b"\xff\xff\xff\x7f", b"\x80", b"\x80\x00", b"\x26", b"\x0b\x00", b"")
_PROPERTIES = (b"\x01\x01", b"\x02\x00\x00\x00\x01", b"\x08\x00\x01a", b"\x0b\x01", b"\x15\x00\x01m", b"\x21\x00\x01",
               b"\x23\x00\x01", b"\x26\x00\x01k\x00\x00", b"\x1f\x00\x01r", b"\x7f", b"\x22\xff\xff")  # fmt: skip


def _mutate(chance: random.Random) -> tuple[int, bytes]:
    """A body from the table with lengths, bytes, properties or halves of two packets exchanged."""
    first, body = chance.choice(_BODIES)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(body))
        what = chance.randrange(7)
        if what == 0:
            body = body[:at]
        elif what == 1:
            body = body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :]
        elif what == 2:
            body = body[:at] + chance.choice(_CUTTERS) + body[at + chance.randint(0, 2) :]
        elif what == 3:
            block = b"".join(chance.choices(_PROPERTIES, k=chance.randint(0, 5)))
            body = body[:at] + encode_length(len(block) + chance.choice((0, 0, 0, 1, -1)) % 200) + block + body[at:]
        elif what == 4:
            body = body[:at] + chance.choice(_BODIES)[1][at:]
        elif what == 5:
            first = chance.choice((first, first ^ 1 << chance.randrange(4), chance.randrange(256)))
        else:
            body = body[:at] + chance.randbytes(chance.randint(1, 6)) + body[at:]
    return first, body


@pytest.mark.parametrize("seed", [1, 2])
def test_p80_only_protocol_error_escapes_from_mutated_packets(wire: Wire, seed: int) -> None:
    chance = random.Random(seed)
    understood = refused = 0
    slowest = 0.0
    for _ in range(_ROUNDS):
        first, body = _mutate(chance)
        stream = bytes([first]) + encode_length(len(body)) + body
        version = chance.choice((3, 4, 5))
        started = time.process_time()
        try:
            packet = decode(wire, stream, version, chance.random() < 0.5)
        except ProtocolError as refusal:
            assert refusal.code in (0x81, 0x82, 0x84, 0x90, 0x94, 0x97)  # noqa: PT017
            assert refusal.version in (0, 3, 4, 5)  # noqa: PT017
            refused += 1
        else:
            describe(packet)
            understood += 1
        slowest = max(slowest, time.process_time() - started)
    assert understood > _ROUNDS // 50, "the mutations hit too hard to reach the inner checks"
    assert refused > _ROUNDS // 4
    assert slowest < 0.1


def test_p80_only_protocol_error_escapes_from_any_bytes(wire: Wire) -> None:
    chance = random.Random(3)
    refused = 0
    for _ in range(4_000):
        first = chance.randrange(256)
        body = chance.randbytes(chance.randint(0, 24))
        for version in (4, 5):
            try:
                wire.packets.decode(first, body, version, True)
            except ProtocolError:
                refused += 1
    assert 6_000 < refused < 8_000, "noise is refused nearly always, and not for being noise"


def test_p80_only_protocol_error_escapes_from_a_broken_stream(wire: Wire) -> None:
    chance = random.Random(4)
    broken = packets = 0
    for _ in range(300):
        stream = bytearray(b"".join(chance.choices(_SEEDS, k=5)))
        for _ in range(3):
            stream[chance.randrange(len(stream))] = chance.randrange(256)
        reader = wire.framing.FrameReader(1 << 16)
        at = 0
        while at < len(stream):
            size = chance.randint(1, 40)
            try:
                packets += len(reader.feed(bytes(stream[at : at + size])))
            except ProtocolError:
                broken += 1
                break
            at += size
    assert broken > 10
    assert packets > 300


@pytest.mark.skipif(not COMPILED, reason="the room is not compiled, there is nothing to compare")
def test_both_builds_understand_and_refuse_alike() -> None:
    builds = wires()
    chance = random.Random(5)
    for _ in range(_ROUNDS):
        first, body = _mutate(chance)
        version = chance.choice((3, 4, 5))
        outcomes = {_outcome(build, first, body, version) for build in builds.values()}
        assert len(outcomes) == 1, (first, body.hex(), version, outcomes)


def _outcome(wire: Wire, first: int, body: bytes, version: int) -> str:
    try:
        return repr(describe(wire.packets.decode(first, body, version, True)))
    except ProtocolError as refusal:
        return f"{refusal.code} {refusal.version} {refusal}"
