"""Power is cut while the broker works; whatever it had acknowledged is there afterwards (D-04, T2, D-12, D-13).

The states come from `tests/power`: rebuilt from a log of every write and sync, and, for root, from an ext4 that is shut
down in mid-flight. The first half of this file tests that rig.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from broker.store.errors import StoreUnusable
from broker.store.opening import open_store
from tests.broker import ROOT, broker
from tests.power import ext4, load, programs, record, rounds
from tests.power.load import Notes
from tests.power.record import Event, Kind, Shim
from tests.power.replay import Chance, Replay
from tests.power.verify import verify
from tests.servers import PATIENCE, Absent, required
from tests.system.resilience import SOAK, eventually

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
STATES = 200 if SOAK else 12
ROUNDS = 50 if SOAK else 3

pytestmark = pytest.mark.timeout(900 if SOAK else 180)


def absent(error: Absent) -> None:
    """Skip with the reason, or fail where REQUIRE names `power`."""
    if "power" in required():
        pytest.fail(f"REQUIRE names power: {error}", pytrace=False)
    pytest.skip(str(error))


@pytest.fixture(scope="module")
def shim() -> Path:
    """The compiled shim."""
    try:
        return record.build()
    except Absent as error:
        absent(error)
        raise


# --- the rig itself --------------------------------------------------------------------------------------------------


def run(name: str, where: Path, *, lie: bool = False) -> tuple[list[Event], str]:
    """One of `programs` under the shim: the log and what it printed."""
    folder = where / "disk"
    folder.mkdir(exist_ok=True)
    watch = Shim(folder, where / "disk.log", lie)
    done = subprocess.run(
        [sys.executable, programs.__file__, name, str(folder)], env={**ENVIRONMENT, **watch.environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return watch.events(), done.stdout


def test_the_log_explains_the_folder_byte_for_byte(shim: Path, tmp_path: Path) -> None:
    events, _ = run("everything", tmp_path)
    assert {event.kind for event in events} >= set(Kind) - {Kind.MAP, Kind.FAULT}
    assert len(rounds.contents(tmp_path / "disk")) > 10
    rounds.check(events, tmp_path / "disk", tmp_path / "seen")
    left_out = next(event for event in reversed(events) if event.kind is Kind.WRITE)
    with pytest.raises(RuntimeError, match="does not explain"):
        rounds.check([e for e in events if e is not left_out], tmp_path / "disk", tmp_path / "seen")


def lost_lines(where: Path, program: str, *, lie: bool = False) -> int:
    """Lines that the journal had promised and that some state lacks, over every cut."""
    events, printed = run(program, where, lie=lie)
    promised = {int(number): int(at) for number, at in map(str.split, printed.splitlines())}
    assert len(promised) == 120
    lost, replay = 0, Replay(events)
    for cut in range(len(events) + 1):
        state = where / f"state-{cut}"
        replay.advance(cut).rebuild(state, Chance(cut // 2))
        whole = b"".join(path.read_bytes() for path in sorted(state.iterdir()))
        there = {int(line.split()[0]) for line in whole.split(b"\n") if line.endswith(b".") and line[:1].isdigit()}
        before = events[cut].time if cut < len(events) else sys.maxsize
        lost += sum(at < before and number not in there for number, at in promised.items())
    return lost


def test_a_careful_journal_loses_nothing_at_any_point(shim: Path, tmp_path: Path) -> None:
    assert lost_lines(tmp_path, "journal") == 0


def test_a_journal_whose_folder_is_not_synced_loses_lines(shim: Path, tmp_path: Path) -> None:
    assert lost_lines(tmp_path, "careless") > 100


def test_a_careful_journal_on_a_disk_that_lies_loses_lines(shim: Path, tmp_path: Path) -> None:
    assert lost_lines(tmp_path, "journal", lie=True) > 100


class Calls:
    """The program `calls` under the shim, asked one call at a time."""

    def __init__(self, where: Path) -> None:
        folder = where / "disk"
        folder.mkdir()
        self.shim = Shim(folder, where / "disk.log")
        self._process = subprocess.Popen(
            [sys.executable, programs.__file__, "calls", str(folder)], env={**ENVIRONMENT, **self.shim.environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def __call__(self, call: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(f"{call}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=10)


@pytest.fixture
def calls(shim: Path, tmp_path: Path) -> Iterator[Calls]:
    one = Calls(tmp_path)
    yield one
    one.close()


NO_SPACE, IO_ERROR = "No space left on device", "Input/output error"


def test_the_nth_call_fails_once_or_from_then_on(calls: Calls) -> None:
    assert calls("write") == "1000"
    calls.shim.inject("enospc write 2", "eio fdatasync 1!")
    assert [calls("write") for _ in range(3)] == ["1000", NO_SPACE, "1000"]
    assert calls("size") == "3000"
    assert [calls("fdatasync") for _ in range(3)] == [IO_ERROR] * 3
    assert calls("fsync") == "ok"
    calls.shim.inject("enospc write 1!")
    assert [calls("synced"), calls("write"), calls("fdatasync")] == [NO_SPACE, NO_SPACE, "ok"]
    calls.shim.inject()
    assert calls("synced") == "1000"
    assert calls.shim.injected() == 6


@pytest.mark.parametrize("call", ["ftruncate", "fsync", "open", "rename", "unlink", "mkdir"])
def test_every_kind_of_call_can_fail_and_then_does_nothing(calls: Calls, call: str) -> None:
    calls.shim.inject(f"erofs {call} 1")
    for one in ("write", "ftruncate", "fsync", "open", "rename", "unlink", "mkdir"):
        if one == call:
            assert calls(one) == "Read-only file system"
        assert calls(one) in ("ok", "1000")


def test_a_fault_can_be_kept_to_one_file(calls: Calls) -> None:
    calls.shim.inject("eio open 1 elsewhere", "eio mkdir 1 d")
    assert calls("open") == "ok"
    assert calls("mkdir") == IO_ERROR


def test_a_write_can_be_cut_short_or_fail_after_it_was_done(calls: Calls) -> None:
    calls.shim.inject("short write 1")
    assert [calls("synced"), calls("size")] == ["500", "500"]
    calls.shim.inject("late write 1")
    assert [calls("synced"), calls("size")] == [IO_ERROR, "1500"]
    assert [calls("write"), calls("size")] == ["1000", "2500"]


def test_a_disk_can_seem_full(calls: Calls) -> None:
    real = int(calls("free"))
    calls.shim.inject("free 1048576")
    assert calls("free") == "1048576"
    calls.shim.inject()
    assert abs(int(calls("free")) - real) < 1 << 30


@pytest.mark.parametrize("seconds", [0.3, 1.0, None])
async def test_the_comparison_finds_nothing_missing_where_only_the_clients_went_away(
    tmp_path: Path, seconds: float | None
) -> None:
    """The broker lives on with all it knows; the clients are cut off, mostly in the middle of their handshakes, or come
    to their end."""
    notes = Notes()
    with broker(tmp_path, {"00-broker.toml": load.OPEN}) as running:
        to = f"mqtt://127.0.0.1:{running.port}"
        clients = asyncio.create_task(load.run(to, notes, seconds=1.5 if seconds is None else 60, rate=2_000))
        if seconds is None:
            assert await asyncio.wait_for(clients, 30 * PATIENCE), "the broker went away"
        else:
            await asyncio.sleep(seconds)
            await eventually(lambda: notes.promises(sys.maxsize) > 600, "promises", 30)
            assert clients.cancel(), "they were at their end"
            await asyncio.wait([clients])
        finding = await verify(to, notes, load.now())
    print(finding)
    assert not finding, finding
    assert finding.due > 300


# --- the store by itself ---------------------------------------------------------------------------------------------


class Promised:
    """What the program `store` said: bodies by when they were promised, without those it let go later."""

    def __init__(self, printed: str) -> None:
        words = [line.split() for line in printed.splitlines()]
        dropped = {segment for verb, segment, *_ in words if verb == "drop"}
        self.bodies = {int(w[1]): int(w[3]) for w in words if w[0] == "written" and w[2] not in dropped}
        self.segments = {w[2] for w in words if w[0] == "written"} - dropped
        self.dropped = len(dropped)

    def missing(self, folder: Path, before: int) -> set[int]:
        """Bodies promised before that time that the store in this folder does not give back; all if it stays shut."""
        due = {body for body, at in self.bodies.items() if at < before}
        try:
            return due - asyncio.run(_bodies(folder / "store"))
        except (StoreUnusable, OSError) as error:
            print(f"{folder}: {error}")
            return due | {0}


async def _bodies(folder: Path) -> set[int]:
    loop = asyncio.get_running_loop()
    opened, recovered = open_store(folder, durability="flush", interval=1, min_free=0, loop=loop)
    found = {int(body[5:].split(b"|", 1)[0]) for _, _, body, _, _ in recovered.frames()}
    opened.close()
    if recovered.damage:
        raise StoreUnusable(recovered.explain())
    return found


def at(events: list[Event], cut: int) -> int:
    """The time up to which promises count."""
    return events[cut].time if cut < len(events) else sys.maxsize


def test_t02_the_store_gives_back_what_it_promised_after_a_cut_anywhere(shim: Path, tmp_path: Path) -> None:
    events, printed = run("store", tmp_path)
    promised = Promised(printed)
    assert promised.dropped > 5
    assert len(promised.segments) > 3
    replay = Replay(events)
    bad = []
    for cut in range(0, len(events) + 1, 1 if SOAK else 3):
        state = tmp_path / f"state-{cut}"
        replay.advance(cut).rebuild(state / "disk", Chance(cut // 3))
        if missing := promised.missing(state / "disk", at(events, cut)):
            bad.append((cut, sorted(missing)))
        shutil.rmtree(state)
    assert not bad, f"{len(bad)} cuts of {len(events)} records lost something, first {bad[0]}"


def test_t02_the_store_survives_cuts_while_it_mends_itself(shim: Path, tmp_path: Path) -> None:
    events, printed = run("store", tmp_path)
    promised = Promised(printed)
    writes = {event.sequence for event in events if event.kind is Kind.SYNC_WRITE and len(event.data) > 2_000}
    ends = [n for n, event in enumerate(events) if event.kind is Kind.DONE and event.reference in writes]
    chance = random.Random(3)
    mended = 0
    bad = []
    for number in range(60 if SOAK else 12):
        cut = chance.choice(ends)
        state = tmp_path / f"state-{number}"
        for name in ("first", "disk"):
            Replay(events).advance(cut).rebuild(state / name, Chance(number))
        again, _ = run("reopen", state)
        mended += any(event.kind is Kind.TRUNCATE for event in again)
        replay = Replay(again, state / "first")
        for second in range(len(again) + 1):
            replay.advance(second).rebuild(state / "left", Chance(second))
            if missing := promised.missing(state / "left", at(events, cut)):
                bad.append((cut, number, second, sorted(missing)))
            shutil.rmtree(state / "left")
        shutil.rmtree(state)
    assert mended, "nothing was torn in any state"
    assert not bad, f"{len(bad)} states lost something, first {bad[0]}"


def test_t02_the_store_on_a_disk_that_lies_loses(shim: Path, tmp_path: Path) -> None:
    events, printed = run("store", tmp_path, lie=True)
    lost = 0
    for seed in (0, 2, 3, 4):
        Replay(events).advance(len(events)).rebuild(tmp_path / "state", Chance(seed))
        lost += len(Promised(printed).missing(tmp_path / "state", sys.maxsize))
        shutil.rmtree(tmp_path / "state")
    assert lost > 100


# --- the broker ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> rounds.Recording:
    """One run of the broker under load, stopped at the end."""
    made = rounds.record(tmp_path_factory.mktemp("power"), seconds=3 if SOAK else 1.5, rate=150, seed=STATES)
    assert made.notes.promises(sys.maxsize) > 500
    return made


@pytest.mark.slow
def test_d04_d12_d13_a_power_cut_loses_nothing_acknowledged(recording: rounds.Recording, tmp_path: Path) -> None:
    chosen = rounds.cuts(recording, STATES, seed=STATES, recovery=4)
    outcome = rounds.survey(tmp_path, recording, chosen)
    print(outcome.summary())
    assert len(outcome.found) == STATES
    assert not outcome.problem(), outcome.problem()


def test_d04_a_disk_that_lies_makes_it_lose(recording: rounds.Recording, tmp_path: Path) -> None:
    """The same comparison finds losses as soon as no sync counts, so it would have found them above."""
    assert recording.syncs > 50, "the broker never synced: there is nothing to lie about"
    # the seeds lose everything unsynced, or tear it
    chosen = [rounds.Cut(len(recording.events), seed) for seed in (0, 2, 3)]
    outcome = rounds.survey(tmp_path, recording, chosen, lie=True)
    print(outcome.summary())
    assert outcome.lost or outcome.refused
    assert len(outcome.bad) == len(chosen)


INTERVAL = 0.3
LATE = 0.3 * PATIENCE
"""Seconds the thread that flushes comes late at most, as a rule."""


def waits(events: Sequence[Event]) -> list[float]:
    """Of each flush of the journal: the seconds for which the oldest of what it made durable had waited."""
    found: list[float] = []
    oldest = 0
    begun: dict[int, int] = {}
    for event in events:
        if event.reference in begun:
            found.append((event.time - begun.pop(event.reference)) / 1e9)
        elif "store/0" in event.path:
            if event.kind is Kind.WRITE:
                oldest = oldest or event.time
            elif event.kind is Kind.SYNC and oldest:
                begun[event.sequence], oldest = oldest, 0
    return found


@pytest.mark.slow
def test_d04_with_a_flush_now_and_then_only_the_last_moments_are_lost(shim: Path, tmp_path: Path) -> None:
    """D-04: `durability = "interval"` loses nothing older than the window that the broker states at start."""
    relaxed = f'[broker]\ndurability = "interval"\n[store]\ninterval = {INTERVAL}\n'
    made = rounds.record(tmp_path / "run", seconds=4, rate=150, seed=STATES, configuration=relaxed)
    assert made.notes.promises(sys.maxsize) > 500
    assert f"the last {INTERVAL:g} s (store.interval)" in (tmp_path / "run" / "log").read_text()
    chosen = [cut for cut in rounds.cuts(made, STATES, seed=STATES) if cut.at < len(made.events)]
    waited = waits(made.events)
    assert INTERVAL <= statistics.median(waited) <= INTERVAL + LATE
    # a machine that stands still is late, and what waits then is what a cut may take
    outcome = rounds.survey(tmp_path, made, chosen, configuration=relaxed, window=max(waited))
    print(f"{outcome.summary()}; flushed after {statistics.median(waited):.2f} s, at most {max(waited):.2f} s")
    assert len(outcome.found) == len(chosen)
    assert not outcome.problem(), outcome.problem()


def test_d04_what_is_younger_than_the_flush_is_lost(shim: Path, tmp_path: Path) -> None:
    """So the window above is not wider than it has to be: without one the same comparison finds losses."""
    relaxed = f'[broker]\ndurability = "interval"\n[store]\ninterval = {INTERVAL}\n'
    made = rounds.record(tmp_path / "run", seconds=1, rate=150, seed=1, configuration=relaxed)
    syncs = [n for n, event in enumerate(made.events) if event.kind is Kind.SYNC and "store/0" in event.path]
    assert syncs, "nothing was flushed"
    # the seeds lose everything unsynced
    chosen = [rounds.Cut(at, 0) for at in syncs[len(syncs) // 2 :][:2]]
    outcome = rounds.survey(tmp_path, made, chosen, configuration=relaxed)
    print(outcome.summary())
    assert outcome.lost


@pytest.mark.slow
def test_d04_a_real_file_system_shut_down_in_mid_flight_loses_nothing_acknowledged(tmp_path: Path) -> None:
    try:
        outcome = ext4.rounds(tmp_path, ROUNDS, seed=1)
    except Absent as error:
        absent(error)
        raise
    print(outcome.summary())
    assert not outcome.problem(), outcome.problem()
