"""Reading the journal at start takes short ways for what there is most of; they lead to where the long ones do."""

from __future__ import annotations

import io
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine import backlog, records
from broker.engine.backlog import Backlog
from broker.engine.message import Message, Origin
from broker.engine.recovery import Recovery

takers = st.lists(
    st.tuples(
        st.integers(1, 5), st.integers(1, 50), st.integers(0, 2), st.booleans(),
        st.none() | st.lists(st.integers(1, (1 << 28) - 1), min_size=1, max_size=3).map(tuple),
        st.integers(0, 2**32 - 1),
    ),
    max_size=6,
)  # fmt: skip


def put(topic: str, payload: bytes, who: list[Any], moved: list[tuple[int, int]], publisher: int) -> bytes:
    """A record as the journal writes it."""
    message = Message(topic.encode(), payload, 1, True, b"p", 0.0, Origin("c", None, "a", None, None, "n"))
    message.ident, message.time_ms, message.clock_ms = "00000000002a" + "cd" * 10, 42, 98_765
    lines = b"".join([records.encode_taker(*taker) for taker in who] + [records.encode_moved(*one) for one in moved])
    count = len(who) + len(moved)
    origin = records.encode_origin(message.origin)
    return records.encode_put(message, True, 0, publisher, 9, count, lines, origin)


@given(st.text("ab/ä", min_size=1), st.binary(max_size=30), takers, st.integers(0, 3))
def test_a_message_is_entered_for_everybody_it_names(
    topic: str, payload: bytes, who: list[Any], publisher: int
) -> None:
    moved = [(number, seq + 100) for number, seq, *_ in who[:2]]
    recovery = Recovery()
    record = put(topic, payload, who, moved, publisher)
    recovery.read(7, 32, record + records.encode_cleared(b"x") + record[:-1] + b"!" if payload else record)
    assert not recovery.bad
    body = record[records.HEADER :]
    size = records.put_topic(body)[1]
    places = [7 << 32 | 32]
    if payload:
        places.append(places[0] + len(record) + records.HEADER + 1)
    wanted: dict[int, list[int]] = {}
    for place in places:
        for taker in records.decode_takers(body):
            wanted.setdefault(taker.session, []).extend((taker.seq, place, size << 32 | 99))
    assert {n: list(found.entries) for n, found in recovery.sessions.items() if found.entries} == wanted
    assert {n: found.done for n, found in recovery.sessions.items() if found.done} == {
        n: {seq for number, seq in moved if number == n} for n, _ in moved
    }
    assert {n for n, found in recovery.sessions.items() if found.marks == {9}} == ({publisher} if publisher else set())
    assert recovery.retained[topic.encode()][0] == places[-1]


@given(takers, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4), st.integers(0, 40))
def test_a_damaged_message_is_left_out_where_the_careful_way_leaves_it_out(
    who: list[Any], changes: list[tuple[int, int]], cut: int
) -> None:
    """D-11: bytes changed and cut off at the end."""
    raw = bytearray(put("t/1", b"payload", who, [], 3)[records.HEADER :])
    raw = raw[: max(0, len(raw) - cut)]
    for at, value in changes:
        if raw:
            raw[at % len(raw)] = value
    body = bytes(raw)
    good = True
    try:
        records.put_fields(body)
        records.put_topic(body)
        good = all(taker.session for taker in records.decode_all_takers(body))
    except records.RecordError:
        good = False
    recovery = Recovery()
    recovery.read(1, 32, bytes((records.PUT,)) + len(body).to_bytes(4, "little") + body)
    assert recovery.bad == (not good)


@pytest.mark.parametrize("cut", [1, 4, 5, 30])
def test_a_frame_that_ends_in_a_record_gives_up_that_record(cut: int) -> None:
    record = put("t", b"m", [(1, 1, 1, False, None, 0)], [], 0)
    recovery = Recovery()
    recovery.read(1, 32, record + record[:cut])
    assert recovery.bad == 1
    assert len(recovery.sessions[1].entries) == 3


@pytest.mark.parametrize("count", [1, 7, 8, 9, 12, 15, 16, 17, 40])
def test_a_backlog_that_begins_with_many_entries_is_one_they_were_added_to(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(backlog, "CHUNK", 4)
    entries = [(seq, seq * 10, seq % 7, seq % 11) for seq in range(1, count + 1)]
    added, filled = Backlog(io.BytesIO), Backlog(io.BytesIO)
    for entry in entries[:-1]:
        added.append(*entry)
    filled.fill(array("Q", [n for seq, place, size, time in entries[:-1] for n in (seq, place, size << 32 | time)]))
    for one in (added, filled):
        one.append(*entries[-1])
        assert len(one) == count
        assert [one.place_of(seq) for seq, *_ in entries] == [place for _, place, *_ in entries]
        assert one.relocate(count // 2 + 1, 5)
        found: list[Any] = []
        while batch := one.take(3):
            found.extend(batch)
        assert [entry[0] for entry in found] == [entry[0] for entry in entries]
        assert found[count // 2][1] == 5
