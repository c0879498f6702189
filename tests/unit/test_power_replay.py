"""What a power cut can leave and what it cannot, on logs made by hand: the rig is tested before it is believed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.power.record import NO_FLAG, BrokenLog, Event, Flag, Kind, read
from tests.power.replay import SECTOR, Chance, Replay, Unfollowable

SEEDS = 80
State = dict[str, bytes | None]
"""Content by path; None for a folder."""
States = Callable[..., list[State]]


class Log(list[Event]):
    """Records as the shim would write them; inodes are given by path when a file or folder comes to be."""

    def __init__(self) -> None:
        self.inodes: dict[str, int] = {"": 1}

    def note(self, kind: Kind, path: str, **fields: Any) -> int:
        number = len(self) + 1
        inode = self.inodes.setdefault(path, 100 + len(self.inodes))
        self.append(Event(number, number * 1_000, kind, inode, path, **fields))
        return number

    def create(self, path: str) -> None:
        self.inodes.pop(path, None)
        self.inodes[path] = 1_000 + len(self)
        self.note(Kind.OPEN, path, flags=Flag.CREATED)

    def open(self, path: str, flags: Flag = NO_FLAG) -> None:
        self.note(Kind.OPEN, path, flags=flags)

    def write(self, path: str, data: bytes, offset: int = 0) -> None:
        self.note(Kind.WRITE, path, data=data, offset=offset, result=len(data))

    def sync(self, path: str, result: int = 0) -> None:
        """fsync of a file, begun and done."""
        self.done(self.note(Kind.SYNC, path), path, result)

    def sync_folder(self, path: str = "", result: int = 0) -> None:
        self.open(path, Flag.FOLDER)
        self.sync(path, result)

    def dsync(self, path: str, data: bytes, offset: int = 0) -> None:
        """A write on an O_DSYNC descriptor, begun and done."""
        self.done(self.begin(path, data, offset), path, len(data), offset=offset)

    def begin(self, path: str, data: bytes, offset: int = 0) -> int:
        return self.note(Kind.SYNC_WRITE, path, data=data, offset=offset)

    def done(self, reference: int, path: str, result: int = 0, **fields: Any) -> None:
        self.note(Kind.DONE, path, reference=reference, result=result, **fields)

    def truncate(self, path: str, size: int) -> None:
        self.note(Kind.TRUNCATE, path, offset=size)

    def rename(self, old: str, new: str) -> None:
        self.note(Kind.RENAME, old, target=new)
        self.inodes[new] = self.inodes.pop(old)

    def unlink(self, path: str) -> None:
        self.note(Kind.UNLINK, path)

    def mkdir(self, path: str) -> None:
        self.note(Kind.MKDIR, path, mode=0o700)

    def file(self, path: str, content: bytes = b"") -> None:
        """A file that is on the disk with its name."""
        self.create(path)
        if content:
            self.write(path, content)
        self.sync(path)
        self.sync_folder(path.rpartition("/")[0])


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def states(tmp_path: Path) -> States:
    """`states(log)`: what a cut at its end, or after `cut` records, leaves; one state per seed."""
    place = tmp_path / "state"

    def rebuild(log: list[Event], cut: int | None = None, **options: Any) -> list[State]:
        found = []
        for seed in range(SEEDS):
            Replay(log, **options).advance(len(log) if cut is None else cut).rebuild(place, Chance(seed))
            found.append(
                {str(p.relative_to(place)): None if p.is_dir() else p.read_bytes() for p in sorted(place.rglob("*"))}
            )
            shutil.rmtree(place)
        return found

    return rebuild


def contents(states: list[State], path: str = "a") -> set[bytes]:
    return {content for state in states if (content := state.get(path)) is not None}


def sectors(*kinds: str) -> bytes:
    """A sector full of each letter."""
    return b"".join(kind.encode() * SECTOR for kind in kinds)


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_synced_write_is_in_every_state(log: Log, states: States) -> None:
    log.file("a")
    log.dsync("a", sectors("1", "2") + b"3")
    assert contents(states(log)) == {sectors("1", "2") + b"3"}


def test_a_write_that_syncs_may_be_torn_until_it_has_returned(log: Log, states: States) -> None:
    log.file("a", b"old")
    log.begin("a", sectors("1", "2", "3"), 3)
    found = contents(states(log))
    assert b"old" in found, "never lost"
    assert b"old" + sectors("1", "2", "3") in found, "never whole"
    torn = {c for c in found if len(c) == 3 + 3 * SECTOR} - {b"old" + sectors("1", "2", "3")}
    assert torn, "never torn"
    assert all(c.startswith(b"old") for c in found), "what was synced is gone"


def test_tearing_keeps_or_drops_whole_sectors(log: Log, states: States) -> None:
    log.file("a", sectors("x", "x", "x", "x"))
    log.write("a", sectors("1", "2", "3", "4")[100:-100], 100)
    written = b"x" * 100 + sectors("1", "2", "3", "4")[100:-100] + b"x" * 100
    found = contents(states(log))
    for content in found:
        assert len(content) == 4 * SECTOR
        for n in range(4):
            piece = slice(n * SECTOR, (n + 1) * SECTOR)
            assert content[piece] in (b"x" * SECTOR, written[piece])
    assert len(found) > 8, "sectors are not independent"


def test_a_file_grows_to_any_size_it_had_or_a_sector_s_end_and_to_no_other(log: Log, states: States) -> None:
    log.file("a", b"x" * 100)
    log.write("a", b"1" * 50, 100)
    log.write("a", b"2" * 1_500, 150)
    sizes = {len(c) for c in contents(states(log))}
    assert sizes == {100, 150, 512, 1_024, 1_536, 1_650}


def test_growth_without_its_data_is_zeros(log: Log, states: States) -> None:
    log.file("a")
    log.write("a", sectors("1", "2"))
    assert bytes(SECTOR) + sectors("2") in contents(states(log))


def test_a_sector_holds_any_content_it_had_since_the_sync(log: Log, states: States) -> None:
    log.file("a", b"0" * 10)
    for letter in b"12":
        log.write("a", bytes([letter]) * 5, 5 * (letter - ord("1")))
    found = contents(states(log))
    assert found == {b"0" * 10, b"1" * 5 + b"0" * 5, b"1" * 5 + b"2" * 5}  # the second half alone never existed


def test_a_sync_covers_what_was_written_before_it_began(log: Log, states: States) -> None:
    log.file("a", b"0")
    log.write("a", b"1")
    begun = log.note(Kind.SYNC, "a")
    log.write("a", b"2")
    assert contents(states(log)) == {b"0", b"1", b"2"}
    log.done(begun, "a")
    assert contents(states(log)) == {b"1", b"2"}


def test_a_synced_write_settles_its_own_range_and_the_size_and_nothing_else(log: Log, states: States) -> None:
    log.file("a", sectors("0", "0"))
    log.write("a", sectors("1"))
    log.dsync("a", sectors("2"), 2 * SECTOR)
    assert contents(states(log)) == {sectors("0", "0", "2"), sectors("1", "0", "2")}


def test_the_offset_that_a_write_really_had_counts(log: Log, states: States) -> None:
    log.file("a", b"0")
    first, second = log.begin("a", b"first", 1), log.begin("a", b"second", 1)
    log.done(second, "a", 6, offset=1)
    log.done(first, "a", 5, offset=7)
    assert contents(states(log)) == {b"0secondfirst"}


@pytest.mark.parametrize(("result", "left"), [(2, b"0ab"), (-28, b"0")])
def test_only_what_a_write_says_it_wrote_was_written(log: Log, states: States, result: int, left: bytes) -> None:
    log.file("a", b"0")
    log.done(log.begin("a", b"abc", 1), "a", result, offset=1)
    assert contents(states(log)) == {left}


def test_a_write_that_the_process_did_not_survive_may_have_happened(log: Log, states: States) -> None:
    log.file("a", b"0")
    log.begin("a", b"1", 1)
    assert contents(states(log)) == {b"0", b"0\0", b"01"}


# --- size ------------------------------------------------------------------------------------------------------------


def test_an_unsynced_truncation_is_done_or_undone(log: Log, states: States) -> None:
    log.file("a", sectors("1", "2"))
    log.truncate("a", 10)
    assert contents(states(log)) == {sectors("1", "2"), b"1" * 10}
    log.sync("a")
    assert contents(states(log)) == {b"1" * 10}


def test_what_was_cut_off_never_comes_back_behind_a_synced_write(log: Log, states: States) -> None:
    log.file("a", b"good")
    log.write("a", b"torn" * 300, 4)
    log.truncate("a", 4)
    log.dsync("a", b"next", 4)
    log.write("a", b"\1" * 2_000, 8)
    found = contents(states(log))
    assert all(c.startswith(b"goodnext") and b"torn" not in c for c in found)


def test_opening_with_o_trunc_is_a_truncation(log: Log, states: States) -> None:
    log.file("a", b"old")
    log.open("a", Flag.EMPTIED)
    log.write("a", b"new")
    assert contents(states(log)) >= {b"old", b"", b"new"}
    log.sync("a")
    assert contents(states(log)) == {b"new"}


# --- failed and pretended syncs --------------------------------------------------------------------------------------


def test_a_later_sync_does_not_save_what_a_failed_one_left(log: Log, states: States) -> None:
    log.file("a", b"0")
    log.write("a", b"1")
    log.sync("a", result=-5)
    log.sync("a")
    assert contents(states(log)) == {b"0", b"1"}
    log.write("a", b"2")
    log.sync("a")
    assert contents(states(log)) == {b"2"}


def test_data_written_by_a_failed_synced_write_stays_uncertain(log: Log, states: States) -> None:
    log.file("a", b"0")
    log.done(log.begin("a", b"1", 1), "a", -5, offset=1, flags=Flag.EMPTIED)
    log.sync("a")
    assert contents(states(log)) == {b"0\0", b"01"}


def test_a_disk_that_lies_settles_nothing(log: Log, states: States) -> None:
    log.create("a")
    log.dsync("a", b"1")
    log.sync_folder()
    assert contents(states(log)) == {b"1"}
    lost = states(log, lie=True)
    assert {} in lost
    assert contents(lost) == {b"", b"\0", b"1"}
    marked = [
        Event(e.sequence, e.time, e.kind, e.inode, e.path, e.target, e.data, e.offset, e.result, e.reference,
              e.flags | Flag.LIE) for e in log
    ]  # fmt: skip
    assert states(marked) == lost


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_new_file_is_there_for_certain_once_its_folder_was_synced(log: Log, states: States) -> None:
    log.create("a")
    log.write("a", b"1")
    log.sync("a")
    found = states(log)
    assert {} in found, "syncing a file does not settle its name"
    assert {"a": b"1"} in found
    assert len([s for s in found if s]) == len([s for s in found if s == {"a": b"1"}])
    log.sync_folder()
    assert all(s == {"a": b"1"} for s in states(log))


def test_a_rename_is_done_as_a_whole_or_not_at_all(log: Log, states: States) -> None:
    log.file("a", b"old")
    log.file("new", b"new")
    log.rename("new", "a")
    before, after = {"a": b"old", "new": b"new"}, {"a": b"new"}
    found = states(log)
    assert before in found
    assert after in found
    assert all(s in (before, after) for s in found)
    log.sync_folder()
    assert all(s == after for s in states(log))


def test_a_renamed_file_that_was_never_synced_may_be_empty(log: Log, states: States) -> None:
    log.file("a", b"old")
    log.create("new")
    log.write("new", b"new")
    log.rename("new", "a")
    assert {"a": b""} in states(log)


def test_renames_between_folders_are_settled_by_either(log: Log, states: States) -> None:
    log.mkdir("from")
    log.mkdir("to")
    log.sync_folder()
    log.file("from/a", b"1")
    log.rename("from/a", "to/b")
    before: State = {"from": None, "from/a": b"1", "to": None}
    after: State = {"from": None, "to": None, "to/b": b"1"}
    found = states(log)
    assert before in found
    assert after in found
    assert all(s in (before, after) for s in found)
    log.sync_folder("to")
    assert all(s == after for s in states(log))


def test_an_unsynced_unlink_may_be_undone_with_the_content_that_was_synced(log: Log, states: States) -> None:
    log.file("a", b"1")
    log.unlink("a")
    found = states(log)
    assert {} in found
    assert {"a": b"1"} in found
    log.sync_folder()
    assert all(s == {} for s in states(log))


def test_changes_of_one_name_happen_in_order(log: Log, states: States) -> None:
    log.file("a", b"1")
    log.unlink("a")
    log.create("a")
    log.write("a", b"2")
    log.sync("a")
    found = states(log)
    assert {s.get("a") for s in found} == {b"1", None, b"2"}


def test_changes_of_different_names_happen_in_any_order(log: Log, states: States) -> None:
    log.file("a", b"1")
    log.create("b")
    log.unlink("a")
    assert {tuple(s) for s in states(log)} == {("a",), ("a", "b"), (), ("b",)}


def test_a_folder_is_there_for_certain_once_its_parent_was_synced(log: Log, states: States) -> None:
    log.mkdir("d")
    log.file("d/a", b"1")
    found = states(log)
    assert {} in found, "syncing a folder does not settle its own name"
    assert all(s in ({}, {"d": None, "d/a": b"1"}) for s in found)
    log.sync_folder()
    assert all(s == {"d": None, "d/a": b"1"} for s in states(log))


def test_a_failed_sync_of_a_folder_settles_nothing(log: Log, states: States) -> None:
    log.create("a")
    log.sync_folder(result=-5)
    assert {} in states(log)


def test_a_hard_link_survives_its_first_name(log: Log, states: States) -> None:
    log.file("a", b"1")
    log.note(Kind.LINK, "a", target="b")
    log.unlink("a")
    log.sync_folder()
    assert all(s == {"b": b"1"} for s in states(log))


# --- the log and the cut ---------------------------------------------------------------------------------------------


def test_the_cut_decides_what_has_happened(log: Log, states: States) -> None:
    log.file("a")
    start = len(log)
    for n in range(3):
        log.dsync("a", b"%d" % n, n)
    for n in range(4):
        found = contents(states(log, cut=start + 2 * n))
        assert found == {b"012"[:n]}
        if n < 3:  # right before the sync returns
            assert contents(states(log, cut=start + 2 * n + 1)) >= {b"012"[:n], b"012"[: n + 1]}


def test_it_goes_forward_only(log: Log) -> None:
    log.file("a")
    replay = Replay(log).advance(3)
    with pytest.raises(ValueError, match="from 3 to 2"):
        replay.advance(2)


def test_the_same_seed_gives_the_same_state(log: Log, states: States) -> None:
    log.create("a")
    log.write("a", sectors(*"123456"))
    assert states(log) == states(log)


def test_what_was_there_before_the_log_is_on_the_disk(log: Log, states: States, tmp_path: Path) -> None:
    initial = tmp_path / "initial"
    (initial / "d").mkdir(parents=True)
    (initial / "d" / "a").write_bytes(b"before")
    log.open("d/a")
    log.write("d/a", b"after!")
    assert contents(states(log, initial=initial), "d/a") == {b"before", b"after!"}


def test_what_cannot_be_followed_is_refused(log: Log) -> None:
    log.file("a")
    log.note(Kind.MAP, "a")
    with pytest.raises(Unfollowable, match="a is mapped"):
        Replay(log).advance(len(log))
    with pytest.raises(Unfollowable, match="before the log"):
        Replay([Event(1, 1, Kind.WRITE, 7, "b", data=b"1", result=1)]).advance(1)


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert read(path) == []
    path.write_bytes(b"x" * 200)
    with pytest.raises(BrokenLog, match="byte 0"):
        read(path)
