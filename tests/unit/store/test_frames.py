"""Frames as bytes: found where they were written, nowhere else, and never invented."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.store.frames import (
    HEADER,
    SEGMENT,
    VERSION,
    Scan,
    SegmentHeader,
    pack_header,
    pack_segment,
    pack_void,
    parse_segment,
    records,
    scan,
    seed_of,
)
from tests.unit.store.parts import record

SALT = 0x5EED
SEED = seed_of(SALT, 1)
HEAD = pack_segment(SegmentHeader(VERSION, 1, 1, 0, SALT))


def segment(*bodies: bytes, entries: int = 2) -> bytes:
    """A segment in which each body was a commit of its own."""
    data = HEAD
    for body in bodies:
        data += pack_header(body, entries, 7, 9, len(data), SEED ^ len(data)) + body
    return data


def read(data: bytes, extent: int | None = None, durable: bool = False) -> tuple[list[bytes], Scan]:
    done = Scan(SEED, extent, durable)
    return [data[piece.start + HEADER : piece.end] for piece in done.frames(data)], done


def test_headers_have_the_size_the_format_says() -> None:
    assert len(HEAD) == SEGMENT == 32
    assert len(pack_header(b"", 0, 0, 0, 0, 0)) == HEADER == 40


def test_frames_come_back_as_they_were_written() -> None:
    bodies = [record(b"one"), b"", record(b"x" * 300_000)]
    found, done = read(segment(*bodies))
    assert found == bodies
    assert done.holes == []
    (first, *_) = scan(segment(*bodies), SEED, len(segment(*bodies)))
    assert (first.entries, first.clock_ms, first.wall_ms, first.base, first.start) == (2, 7, 9, SEGMENT, SEGMENT)


def test_a_segment_header_comes_back_or_is_invalid() -> None:
    header = SegmentHeader(VERSION, 3, 2, 12_345, SALT)
    packed = pack_segment(header)
    assert parse_segment(packed + b"more") == header
    for at in range(SEGMENT):
        assert parse_segment(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]) is None
        assert parse_segment(packed[:at]) is None


def test_records_stop_at_one_that_does_not_fit() -> None:
    body = record(b"a") + record(b"")
    assert list(records(body)) == [(0, record(b"a")), (6, record(b""))]
    assert list(records(body + record(b"long")[:-1])) == list(records(body))
    assert list(records(body + b"\1")) == list(records(body))


@pytest.mark.parametrize("at", range(SEGMENT + HEADER + 8, SEGMENT + 2 * HEADER + 16))
def test_d08_a_flipped_byte_in_the_middle_is_damage_and_later_frames_are_read(at: int) -> None:
    """D-08: every byte of the middle frame in turn, header and body."""
    bodies = [record(b"one"), record(b"two"), record(b"six")]
    data = bytearray(segment(*bodies, entries=5))
    data[at] ^= 0x40
    found, done = read(bytes(data))
    assert found == [bodies[0], bodies[2]]
    (hole,) = done.holes
    start = SEGMENT + HEADER + 8
    assert (hole.start, hole.end, hole.torn) == (start, start + HEADER + 8, False)
    assert hole.entries == (5 if at >= start + HEADER else 1)  # an unreadable header does not say what it covered


def test_lost_entries_of_several_regions_are_counted() -> None:
    bodies = [record(bytes([i]) * 50) for i in range(6)]
    whole = segment(*bodies, entries=3)
    size = HEADER + len(bodies[0])
    data = bytearray(whole)
    for i in (1, 2, 4):
        data[SEGMENT + i * size + HEADER + 9] ^= 1
    data[SEGMENT + 4 * size] ^= 1
    found, done = read(bytes(data))
    assert found == [bodies[0], bodies[3], bodies[5]]
    assert [hole.entries for hole in done.holes] == [3, 3, 1]
    assert not any(hole.torn for hole in done.holes)


def test_an_invalid_end_is_torn_unless_something_says_it_was_on_disk() -> None:
    bodies = [record(b"one"), record(b"two")]
    data = segment(*bodies)[:-1]
    found, done = read(data)
    assert found == bodies[:1]
    assert [hole.torn for hole in done.holes] == [True]
    assert done.end == SEGMENT + HEADER + 8
    assert [hole.torn for hole in read(data, durable=True)[1].holes] == [False]
    assert [hole.torn for hole in read(data, len(data) + 1, True)[1].holes] == [False]


def test_a_hole_within_one_commit_is_torn_and_what_follows_is_kept() -> None:
    """The frames of one write have the same base: that the second is there proves nothing about the first."""
    first, second = record(b"first"), record(b"second")
    data = HEAD + pack_header(first, 1, 0, 0, SEGMENT, SEED ^ SEGMENT) + first
    data += pack_header(second, 1, 0, 0, SEGMENT, SEED ^ len(data)) + second
    torn = HEAD + bytes(20) + data[SEGMENT + 20 :]
    found, done = read(torn)
    assert found == [second]
    assert [hole.torn for hole in done.holes] == [True]
    assert done.end == len(data)


def test_the_header_of_a_later_frame_is_proof_though_its_body_is_torn() -> None:
    bodies = [record(b"one"), record(b"two"), record(b"three")]
    data = bytearray(segment(*bodies)[:-2])
    data[SEGMENT + HEADER + 1] ^= 1
    found, done = read(bytes(data))
    assert found == [bodies[1]]
    assert [hole.torn for hole in done.holes] == [False, True]


def test_what_is_cut_off_a_segment_of_known_length_is_damage() -> None:
    bodies = [record(b"one"), record(b"two"), record(b"three")]
    data = segment(*bodies)
    for cut in range(SEGMENT, len(data)):
        found, done = read(data[:cut], len(data), True)
        assert found == bodies[: len(found)]
        assert done.holes
        assert not any(hole.torn for hole in done.holes)
        assert done.holes[-1].end == done.end == len(data)
        assert done.holes[0].start == SEGMENT + sum(HEADER + len(b) for b in found)


def test_bytes_behind_a_known_length_are_a_failed_commit_and_do_not_count() -> None:
    data = segment(record(b"one"), record(b"failed"))
    found, done = read(data, SEGMENT + HEADER + 8, True)
    assert found == [record(b"one")]
    assert done.holes == []


def test_a_void_frame_covers_what_it_says_also_beyond_the_end() -> None:
    bodies = [record(b"one"), record(b"two"), record(b"six")]
    data = bytearray(segment(*bodies))
    at, size = SEGMENT + HEADER + 8, HEADER + 8
    data[at : at + size] = bytes(size)
    data[at : at + HEADER] = pack_void(size, SEED ^ at)
    found, done = read(bytes(data))
    assert found == [bodies[0], bodies[2]]
    assert done.holes == []
    alone = HEAD + pack_void(5_000, SEED ^ SEGMENT)
    found, done = read(alone, SEGMENT + 5_000, True)
    assert (found, done.holes, done.end) == ([], [], SEGMENT + 5_000)


def test_a_payload_that_looks_like_a_frame_is_none() -> None:
    """What clients publish lies in bodies; when the header in front of it is gone, it must not become a frame."""
    evil = record(b"evil")
    for salt in (0, SALT ^ 1):
        inner = b""
        for at in range(SEGMENT, SEGMENT + 400, 4):
            inner += pack_header(evil, 1, 0, 0, 0, seed_of(salt, 1) ^ at) + evil
        data = bytearray(segment(record(inner), record(b"last")))
        data[SEGMENT] ^= 1
        found, _ = read(bytes(data))
        assert found == [record(b"last")]


def test_a_frame_in_another_place_or_segment_is_none() -> None:
    data = segment(record(b"one"), record(b"two"))
    frame = data[SEGMENT : SEGMENT + HEADER + 8]
    assert read(data + frame)[0] == [record(b"one"), record(b"two")]
    other = Scan(seed_of(SALT, 2))
    assert list(other.frames(data)) == []


CHANGE = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 4000), st.integers(1, 255)),
    st.tuples(st.just("zero"), st.integers(0, 4000), st.integers(1, 600)),
    st.tuples(st.just("cut"), st.integers(0, 4000), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 4000), st.integers(1, 100)),
    st.tuples(st.just("copy"), st.integers(0, 4000), st.integers(1, 200)),
    st.tuples(st.just("append"), st.integers(0, 255), st.integers(1, 100)),
)


def damaged(data: bytes, change: tuple[str, int, int]) -> bytes:
    kind, at, much = change
    if kind == "append":
        return data + bytes([at]) * much
    at = min(at, len(data))
    if kind == "flip" and at < len(data):
        return data[:at] + bytes([data[at] ^ much]) + data[at + 1 :]
    if kind == "zero":
        return data[:at] + bytes(min(much, len(data) - at)) + data[at + much :]
    if kind == "cut":
        return data[:at]
    if kind == "remove":
        return data[:at] + data[at + much :]
    return data[:at] + data[:much] + data[at:]


@settings(max_examples=300, deadline=None)
@given(
    payloads=st.lists(st.one_of(st.binary(max_size=200), st.just(b"IsF1" * 20), st.just(segment(b"x"))), max_size=12),
    changes=st.lists(CHANGE, max_size=4),
    extent=st.booleans(),
)
def test_d08_random_damage_never_invents_a_frame_and_never_raises(
    payloads: list[bytes], changes: list[tuple[str, int, int]], extent: bool
) -> None:
    """D-08: whatever happens to the bytes, a frame that is read was written, in that place; pieces leave no gap."""
    data = whole = segment(*(record(p) for p in payloads))
    written = {piece.start: whole[piece.start + HEADER : piece.end] for piece in Scan(SEED).frames(whole)}
    assert list(written.values()) == [record(p) for p in payloads]
    for change in changes:
        data = damaged(data, change)
    done = Scan(SEED, len(whole) if extent else None, extent)
    found = {piece.start: data[piece.start + HEADER : piece.end] for piece in done.frames(data)}
    assert found.items() <= written.items()
    untouched = {start for start, body in written.items() if data[start : start + HEADER + len(body)]
                 == whole[start : start + HEADER + len(body)]}  # fmt: skip
    assert untouched <= found.keys()
    if extent and len(found) < len(written):
        assert any(not hole.torn for hole in done.holes)
