"""What a start makes of a folder in which something is missing, changed or unfinished."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.store import segments
from broker.store.errors import StoreDamaged, StoreTooNew
from broker.store.frames import HEADER, SEGMENT, pack_segment, parse_segment
from broker.store.inspect import check
from tests.unit.store.parts import Kills, bodies_in, fill, record, running

ONE, TWO, SIX = record(b"one"), record(b"two"), record(b"six")
STEP = HEADER + len(ONE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def first(folder: Path) -> Path:
    return folder / "00000001.log"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# torn ends ----------------------------------------------------------------------------------------------------


def test_a_torn_end_is_cut_off_wherever_it_was_torn(folder: Path) -> None:
    """Every cut through the last frame: the frames before it are there, nothing is damage, writing goes on."""
    fill(folder, ONE, TWO, SIX)
    whole = first(folder).read_bytes()
    for cut in range(SEGMENT + 2 * STEP, len(whole)):
        first(folder).write_bytes(whole[:cut])
        with running(folder) as run:
            assert run.bodies == [ONE, TWO]
            assert run.recovered.damage == []
            assert run.recovered.torn == cut - SEGMENT - 2 * STEP
            assert first(folder).stat().st_size == SEGMENT + 2 * STEP
            run.write(SIX)
        assert check(folder).damage == []
        assert bodies_in(folder) == [ONE, TWO, SIX]
        (folder / "closed").unlink()


def test_sectors_of_the_last_commit_may_be_missing_in_any_combination(folder: Path) -> None:
    """A write of several frames, of which any 512-byte sectors did not get to the disk: nothing of it was
    acknowledged, so nothing is damage; the frames that are whole are kept and later starts see a clean store."""
    last = [record(bytes([i]) * 380) for i in range(4)]
    with running(folder) as run:
        run.write(ONE)
        run.write(*last)
    (folder / "closed").unlink()
    whole = first(folder).read_bytes()
    begin = SEGMENT + STEP
    sectors = [(max(begin, at), min(at + 512, len(whole))) for at in range(0, len(whole), 512)]
    for gone in range(1, 1 << len(sectors)):
        data = bytearray(whole)
        for bit, (start, end) in enumerate(sectors):
            if gone >> bit & 1:
                data[start:end] = bytes(end - start)
        first(folder).write_bytes(data)
        with running(folder) as run:
            assert run.bodies[0] == ONE
            assert set(run.bodies[1:]) < set(last)
            assert run.recovered.damage == []
            assert run.recovered.torn > 0
            kept = run.bodies
            run.write(TWO)
        report = check(folder)
        assert (report.damage, report.torn) == ([], 0)
        assert bodies_in(folder) == [*kept, TWO]
        (folder / "closed").unlink()


def test_check_names_a_torn_end_and_leaves_it(folder: Path) -> None:
    fill(folder, ONE, TWO)
    with first(folder).open("ab") as file:
        file.write(b"IsF1 something")
    before = contents(folder)
    report = check(folder)
    assert (report.torn, report.damage, report.frames) == (14, [], 2)
    assert contents(folder) == before


# damage -------------------------------------------------------------------------------------------------------


def damage(folder: Path, *texts: str, lost: int | None = None) -> None:
    """A start refuses, says these, and has changed nothing; `check` says the same."""
    before = contents(folder)
    try:
        with running(folder) as run:
            assert run.recovered.damage
            said, found = run.recovered.explain(), run.recovered.lost
            with pytest.raises(AssertionError):
                run.write(b"")
    except StoreDamaged as error:
        said, found = str(error), None
    report = check(folder)
    for text in (*texts, "isthmus store check", "--accept-loss"):
        assert text in said
    assert report.damage
    assert all(text in "\n".join(map(str, report.damage)) for text in texts)
    if lost is not None:
        assert report.lost == lost
        assert found in (None, lost)
    assert contents(folder) == before


def accepted(folder: Path, bodies: list[bytes], lost: int) -> None:
    """With the loss accepted: what is good is read, writing goes on, and from then on the store is clean."""
    with running(folder, accept_loss=True) as run:
        assert run.bodies == bodies
        assert run.recovered.lost == lost
        run.write(record(b"after"))
    assert [kind for kind, _ in run.owner.log] == ["written"]
    assert check(folder).damage == []
    (folder / "closed").unlink()
    with running(folder) as run:
        assert run.bodies == [*bodies, record(b"after")]
        assert run.recovered.torn == 0
        run.write(record(b"more"))
    assert bodies_in(folder) == [*bodies, record(b"after"), record(b"more")]


def test_d08_a_flipped_byte_in_the_middle(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """D-08: refused, and with the loss accepted the segment is kept as it was."""
    fill(folder, ONE, TWO, SIX, entries=7)
    data = bytearray(first(folder).read_bytes())
    data[SEGMENT + STEP + HEADER + 6] ^= 1
    first(folder).write_bytes(data)
    damage(folder, "00000001.log", f"{STEP} bytes at offset {SEGMENT + STEP}", "7 queue entries lost", lost=7)
    accepted(folder, [ONE, SIX], 7)
    assert (folder / "damaged" / "00000001.log").read_bytes() == data
    assert sum("loss accepted" in r.message for r in caplog.records) == 1


def several(folder: Path) -> list[bytes]:
    """A store of four segments after a kill."""
    bodies = [record(bytes([i]) * 700) for i in range(20)]
    fill(folder, *bodies)
    assert segments.numbers(folder) == [1, 2, 3, 4]
    return bodies


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def headless(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("harm", [zeros, empty, headless, Path.unlink])
def test_d08_a_segment_that_is_gone_or_no_segment(folder: Path, number: int, harm: Callable[[Path], None]) -> None:
    """D-08: all zeros, zero length, wrong magic, missing; the first, a middle one and the newest."""
    bodies = several(folder)
    harm(folder / f"{number:08d}.log")
    damage(folder, f"{number:08d}.log")
    good = [body for i, body in enumerate(bodies) if i // 6 + 1 != number or harm is headless]
    accepted(folder, good, 0 if harm is headless else 1)
    if harm is not Path.unlink:
        assert (folder / "damaged" / f"{number:08d}.log").exists()


def test_d08_every_cut_of_a_segment_that_has_a_successor_is_seen(folder: Path) -> None:
    """D-08: also one between two frames, which leaves a file without a flaw."""
    several(folder)
    path = folder / "00000002.log"
    whole = path.read_bytes()
    frame = HEADER + 705
    for cut in (0, 10, SEGMENT, SEGMENT + 1, SEGMENT + frame, SEGMENT + frame + 50, len(whole) - frame, len(whole) - 1):
        path.write_bytes(whole[:cut])
        damage(folder, "00000002.log")
    path.write_bytes(whole)
    assert check(folder).damage == []


def test_d08_a_cut_end_is_seen_after_a_clean_stop(folder: Path) -> None:
    """D-08: after a kill an end without its last frames looks like a write that never was; after a stop it does not."""
    fill(folder, ONE, TWO)
    with running(folder):
        pass
    whole = first(folder).read_bytes()
    for cut in (SEGMENT, SEGMENT + STEP, SEGMENT + STEP + 3, len(whole) - 1):
        first(folder).write_bytes(whole[:cut])
        damage(folder, "00000001.log", lost=1)
    accepted(folder, [ONE], 1)


def test_a_flipped_byte_in_the_last_frame_is_seen_after_a_clean_stop(folder: Path) -> None:
    with running(folder) as run:
        run.write(ONE, entries=3)
    data = bytearray(first(folder).read_bytes())
    data[-1] ^= 1
    first(folder).write_bytes(data)
    damage(folder, lost=3)
    accepted(folder, [], 3)


def test_d08_segments_without_their_front_are_not_taken_for_a_store(folder: Path) -> None:
    """D-08: what was dropped is not missed, what was not is."""
    with running(folder) as run:
        bodies = [record(bytes([i]) * 700) for i in range(20)]
        for body in bodies:
            run.write(body)
        run.settle()
        run.store.drop(1)
    assert bodies_in(folder) == bodies[6:]
    (folder / "00000002.log").unlink()
    damage(folder, "00000002.log: the segment is missing", lost=1)
    accepted(folder, bodies[12:], 1)


def test_d08_a_missing_newest_segment_is_accepted_once_and_proves_what_was_before_it(folder: Path) -> None:
    """D-08: the end of the one before it was on disk, so what is torn there is damage, too."""
    several(folder)
    with running(folder):
        pass
    (folder / "00000004.log").unlink()
    path = folder / "00000003.log"
    path.write_bytes(path.read_bytes()[:-1])
    damage(folder, "00000004.log: the segment is missing")
    assert check(folder).lost == 2
    with running(folder, accept_loss=True):
        shutil.copytree(folder, folder.with_name("killed"))
    report = check(folder.with_name("killed"))
    assert (report.damage, report.frames) == ([], 17)


def test_d08_no_segment_where_there_was_a_store_is_not_a_new_one(folder: Path) -> None:
    """D-08: never a silent empty start."""
    several(folder)
    for path in folder.glob("*.log"):
        path.unlink()
    damage(folder, "everything is lost", lost=1)
    (folder / "format").unlink()
    damage(folder, "everything is lost")
    accepted(folder, [], 1)
    assert segments.numbers(folder) == [5]


@pytest.mark.parametrize("name", ["format", "range"])
@pytest.mark.parametrize("content", [None, b"", b"\0" * 40, b"{}", b"[1]", b"nonsense"])
def test_a_control_file_that_is_missing_or_damaged_costs_nothing_but_the_question(
    folder: Path, name: str, content: bytes | None
) -> None:
    bodies = several(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    damage(folder, f"{name}: the file is missing or damaged", lost=0)
    accepted(folder, bodies, 0)


def test_a_segment_of_another_store_is_not_read(folder: Path, tmp_path: Path) -> None:
    bodies = several(folder)
    other = tmp_path / "other"
    several(other)
    shutil.copy(other / "00000002.log", folder / "00000002.log")
    damage(folder, "00000002.log")
    accepted(folder, bodies[:6] + bodies[12:], 1)


def test_a_stray_segment_far_ahead_is_left_alone(folder: Path) -> None:
    bodies = several(folder)
    stray = folder / "99999999.log"
    stray.write_bytes(b"stray")
    damage(folder, "99999999.log: the segment does not belong here", lost=0)
    (folder / "range").unlink()
    damage(folder, "99999999.log: the segment does not belong here", lost=0)
    stray.unlink()
    accepted(folder, bodies, 0)


def test_all_at_once(folder: Path) -> None:
    bodies = several(folder)
    (folder / "00000001.log").unlink()
    zeros(folder / "00000002.log")
    headless(folder / "00000003.log")
    with (folder / "00000004.log").open("r+b") as file:
        file.seek(SEGMENT + HEADER + 20)
        file.write(b"!")
        file.seek(0, os.SEEK_END)
        file.write(b"torn")
    (folder / "range").unlink()
    (folder / "format").write_bytes(b"?")
    damage(folder, "format", "range", "00000002.log", "00000003.log")
    assert any("00000004.log" in str(found) for found in check(folder).damage)
    accepted(folder, bodies[12:18] + bodies[19:], 3)


def test_sectors_the_disk_cannot_read_are_damage_and_the_rest_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [record(bytes([i]) * 5000) for i in range(6)]
    fill(folder, *bodies, segment_bytes=1 << 20)
    real = os.pread

    def pread(fd: int, length: int, at: int) -> bytes:
        if at <= 9000 < at + length:
            raise OSError(5, "Input/output error")
        return real(fd, length, at)

    monkeypatch.setattr(os, "pread", pread)
    with running(folder) as run:
        assert run.bodies == [bodies[0], *bodies[3:]]  # the sector holds the end of one and the beginning of another
        assert run.recovered.lost == 2


# versions -----------------------------------------------------------------------------------------------------


def test_d09_a_newer_store_is_refused_and_left_alone(folder: Path) -> None:
    """D-09: also when the loss of what this release cannot read would be accepted."""
    several(folder)
    (folder / "format").write_text('{"version": 2, "salt": 1}')
    before = contents(folder)
    for accept in (False, True):
        with pytest.raises(StoreTooNew, match=r"format: the store has version 2, this release knows 1: start the"):
            running(folder, accept_loss=accept).__enter__()
    with pytest.raises(StoreTooNew):
        check(folder)
    assert contents(folder) == before


def test_d09_a_newer_segment_is_refused(folder: Path) -> None:
    """D-09"""
    several(folder)
    path = folder / "00000003.log"
    header = parse_segment(path.read_bytes())
    assert header is not None
    path.write_bytes(pack_segment(header._replace(version=7)))
    with pytest.raises(StoreTooNew, match=r"00000003.log: the store has version 7"):
        running(folder, accept_loss=True).__enter__()


# killed -------------------------------------------------------------------------------------------------------


def test_killed_anywhere_while_it_is_made_the_next_start_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    kills = Kills(monkeypatch, data, tmp_path / "states")
    with running(data / "store"):
        states = kills.stop()
    assert len(states) > 12
    for state in states:
        with running(state / "store") as run:
            assert run.frames == []
            run.write(ONE)
        assert bodies_in(state / "store") == [ONE]


def test_killed_anywhere_while_segments_begin_and_go_nothing_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S-03: every state in between opens, without damage and with every commit that had ended."""
    data = tmp_path / "data"
    data.mkdir()
    bodies = [record(bytes([i]) * 1400) for i in range(8)]
    with running(data / "store") as run:
        for body in bodies[:3]:
            run.write(body)
        run.settle()
        kills = Kills(monkeypatch, data, tmp_path / "states")
        for body in bodies[3:]:
            run.write(body)
        run.settle()
        run.store.drop(1)
        run.store.drop(2)
        run.settle()
        run.store.close()
        states = kills.stop()
    assert segments.numbers(data / "store") == [3]
    most = 0
    for state in states:
        present = segments.numbers(state / "store")
        found = bodies_in(state / "store")
        skipped = bodies.index(found[0])
        assert found == bodies[skipped : skipped + len(found)]
        assert skipped + len(found) >= most
        most = skipped + len(found)
        assert skipped == 0 or (max(present) == 3 and most == 8)
        assert check(state / "store").damage == []
    assert most == 8


def test_killed_anywhere_while_a_loss_is_accepted_it_can_be_accepted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    bodies = several(data / "store")
    (data / "store" / "00000002.log").unlink()
    headless(data / "store" / "00000003.log")
    with (data / "store" / "00000004.log").open("r+b") as file:
        file.seek(SEGMENT + 5)
        file.write(b"!")
    good = bodies[:6] + bodies[12:18] + bodies[19:]
    kills = Kills(monkeypatch, data, tmp_path / "states")
    with running(data / "store", accept_loss=True) as run:
        assert run.bodies == good
        states = kills.stop()
    assert len(states) > 15
    for state in states:
        with running(state / "store", accept_loss=True) as run:
            assert run.bodies == good
        assert check(state / "store").damage == []


# anything -----------------------------------------------------------------------------------------------------

HARM = st.lists(
    st.tuples(
        st.sampled_from(["00000001.log", "00000002.log", "00000003.log", "format", "range", "closed"]),
        st.sampled_from(["flip", "zero", "cut", "remove", "append", "unlink"]),
        st.integers(0, 5000),
        st.integers(1, 255),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 1200), min_size=1, max_size=14), harm=HARM, clean=st.booleans())
def test_d08_whatever_happens_to_the_files_only_declared_errors_and_only_written_frames(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], harm: list[tuple[str, str, int, int]], clean: bool
) -> None:
    """D-08: and with the loss accepted the store is clean afterwards and takes writes."""
    folder = tmp_path_factory.mktemp("any") / "store"
    bodies = [record(bytes([i]) * size) for i, size in enumerate(sizes)]
    with running(folder, durability="none") as run:
        for body in bodies:
            run.write(body)
        run.settle()
        written = set(bodies)
    if not clean:
        (folder / "closed").unlink()
    for name, kind, at, much in harm:
        path = folder / name
        if not path.exists():
            continue
        data = path.read_bytes()
        at = min(at, len(data))
        if kind == "flip" and at < len(data):
            path.write_bytes(data[:at] + bytes([data[at] ^ much]) + data[at + 1 :])
        elif kind == "zero":
            path.write_bytes(data[:at] + bytes(min(much, len(data) - at)) + data[at + much :])
        elif kind == "cut":
            path.write_bytes(data[:at])
        elif kind == "remove":
            path.write_bytes(data[:at] + data[at + much :])
        elif kind == "append":
            path.write_bytes(data + bytes([at & 255]) * much)
        elif kind == "unlink":
            path.unlink()
    logging.disable(logging.CRITICAL)
    try:
        try:
            with running(folder) as run:
                assert set(run.bodies) <= written
                refused = bool(run.recovered.damage)
        except StoreDamaged:
            refused = True
        except StoreTooNew:
            return
        if not refused:
            assert check(folder).damage == []
            return
        with running(folder, accept_loss=True) as run:
            assert set(run.bodies) <= written
            found = run.bodies
            run.write(record(b"after"))
        assert [kind for kind, _ in run.owner.log] == ["written"]
        stray = [d for d in check(folder).damage if "does not belong here" not in str(d)]
        assert stray == []
        assert bodies_in(folder, accept_loss=True) == [*found, record(b"after")]
    finally:
        logging.disable(logging.NOTSET)
