"""Records one run of the broker under load, cuts it at many points, and starts the broker on what would be left."""

from __future__ import annotations

import asyncio
import bisect
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.broker import Broker
from tests.power import load
from tests.power.load import Notes
from tests.power.record import Event, Kind, Shim
from tests.power.replay import Chance, Everything, Replay
from tests.power.verify import Finding, verify


@dataclass
class Machine(Broker):
    """A broker whose data folder lies in `disk/`, which is empty at first: making it is part of what is tested."""

    @property
    def disk(self) -> Path:
        return self.where / "disk"

    @property
    def data(self) -> Path:
        return self.disk / "data"

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Recording:
    """What the disk was asked to do and what the clients were promised meanwhile."""

    events: Sequence[Event]
    notes: Notes
    started: int
    ended: int

    @property
    def syncs(self) -> int:
        """Writes to the store's files that were synced, and syncs."""
        return sum(event.kind is Kind.DONE for event in self.events)


@dataclass(frozen=True)
class Cut:
    """The first `at` records have happened; `seed` decides what of the unsynced is left."""

    at: int
    seed: int
    recovery: bool = False
    """Whether the power fails once more, while the broker starts."""


@dataclass
class Outcome:
    """The findings of all states."""

    recording: Recording
    found: list[tuple[Cut, Finding]] = field(default_factory=list)

    @property
    def bad(self) -> list[tuple[Cut, Finding]]:
        return [(cut, finding) for cut, finding in self.found if finding]

    @property
    def lost(self) -> int:
        return sum(finding.lost for _, finding in self.found)

    @property
    def due(self) -> int:
        return sum(finding.due for _, finding in self.found)

    @property
    def refused(self) -> int:
        return sum(bool(finding.refused) for _, finding in self.found)

    def problem(self) -> str:
        """What is wrong, several lines; nothing due at all is wrong too, it would prove nothing."""
        lines = []
        if not self.due:
            lines.append("no delivery was due in any state, so nothing was tested")
        if not self.recording.syncs:
            lines.append("the broker never synced anything")
        for cut, finding in self.bad[:10]:
            lines.append(f"{self.where(cut)}: {finding}")
        if lines:
            lines.insert(0, self.summary())
        return "\n".join(lines)

    def where(self, cut: Cut) -> str:
        events = self.recording.events
        before = f"{events[cut.at].kind.name} {events[cut.at].path}" if cut.at < len(events) else "the end"
        again = ", again while starting" if cut.recovery else ""
        return f"cut {cut.at} of {len(events)}, before {before}, seed {cut.seed}{again}"

    def summary(self) -> str:
        kinds = ("sessions", "retained", "subscriptions", "repeated", "reordered")
        others = ", ".join(f"{sum(getattr(f, k) for _, f in self.found)} {k}" for k in kinds)
        return (
            f"{len(self.found)} states ({len({cut.at for cut, _ in self.found})} points of {len(self.recording.events)}"
            f" records, {self.recording.syncs} syncs): {self.lost} of {self.due} deliveries lost, {others} wrong,"
            f" {self.refused} did not start, {len(self.bad)} states bad"
        )


# --- recording -------------------------------------------------------------------------------------------------------


def record(
    where: Path, *, seconds: float, rate: float, seed: int, configuration: str = "", lie: bool = False
) -> Recording:
    """Run the broker with the shim under load, then stop it."""
    machine = Machine(where)
    machine.write("00-power.toml", load.OPEN)
    if configuration:
        machine.write("50-power.toml", configuration)
    machine.disk.mkdir()
    shim = Shim(machine.disk, where / "disk.log", lie)
    machine.environment = shim.environment
    notes = Notes()
    started = time.monotonic_ns()
    try:
        machine.start()
        if not asyncio.run(load.run(machine.url, notes, seconds=seconds, rate=rate, seed=seed)):
            raise RuntimeError(f"the broker went away or fell silent under load:\n{machine.process.tail()}")
        if notes.refused:
            raise RuntimeError(f"the broker refused {notes.refused} messages:\n{machine.process.tail()}")
    finally:
        if machine._process is not None:
            machine.stop()
    recording = Recording(shim.events(), notes, started, time.monotonic_ns())
    check(recording.events, machine.disk, where / "seen")
    return recording


def check(events: Sequence[Event], disk: Path, scratch: Path) -> None:
    """Raises RuntimeError where the log does not tell how the folder became what it is: something got past the shim."""
    Replay(events).advance(len(events)).rebuild(scratch, Everything())
    seen, real = contents(scratch), contents(disk)
    shutil.rmtree(scratch)
    wrong = sorted(name for name in seen.keys() | real.keys() if seen.get(name, "") != real.get(name, ""))
    if wrong:
        raise RuntimeError(f"the log of the shim does not explain {wrong[:5]}")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Of every file, None for a folder, by path; sockets and the like left out."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_dir() or path.is_file()
    }


def cuts(recording: Recording, count: int, seed: int, *, recovery: int = 0) -> list[Cut]:
    """Half of them right before a sync returns, a quarter at any record, a quarter at any time; the end is one of them.

    Of every `recovery` states, one loses power again while the broker starts on it.
    """
    chance = random.Random(seed)
    events = recording.events
    times = [event.time for event in events]
    ends = [n for n, event in enumerate(events) if event.kind is Kind.DONE] or list(range(len(events) + 1))
    found = [len(events)]
    while len(found) < count:
        match len(found) % 4:
            case 1 | 3:
                found.append(chance.choice(ends))
            case 2:
                found.append(chance.randrange(len(events) + 1))
            case _:
                found.append(bisect.bisect(times, chance.uniform(recording.started, recording.ended)))
    # every kind of place meets every kind of fate
    seeds = [seed * 1_000 + n // 4 + n % 4 * 251 for n in range(count)]
    return [
        Cut(at, s, bool(recovery) and n % recovery == recovery - 1)
        for n, (at, s) in enumerate(zip(found, seeds, strict=True))
    ]


# --- states ----------------------------------------------------------------------------------------------------------


def survey(
    where: Path,
    recording: Recording,
    chosen: Sequence[Cut],
    *,
    lie: bool = False,
    configuration: str = "",
    window: float = 0.0,
    jobs: int = 2,
) -> Outcome:
    """Rebuild every state, start the broker on it and compare; states that are fine are removed again. `window` is how
    many seconds of promises the power cut may take."""
    return asyncio.run(_survey(where, recording, chosen, lie, configuration, int(window * 1e9), jobs))


async def _survey(
    where: Path, recording: Recording, chosen: Sequence[Cut], lie: bool, configuration: str, window: int, jobs: int
) -> Outcome:
    outcome = Outcome(recording)
    replay = Replay(recording.events, lie=lie)
    gate = asyncio.Semaphore(jobs)

    async def look(machine: Machine, cut: Cut) -> None:
        try:
            at = recording.events[cut.at].time if cut.at < len(recording.events) else sys.maxsize
            finding = await _read(machine, cut, recording.notes, at, window)
            outcome.found.append((cut, finding))
            if not finding:
                shutil.rmtree(machine.where)
        finally:
            gate.release()

    async with asyncio.TaskGroup() as group:
        for number, cut in enumerate(sorted(chosen, key=lambda c: c.at)):
            await gate.acquire()
            machine = Machine(where / f"{number:04}")
            machine.write("00-power.toml", load.OPEN)
            if configuration:
                machine.write("50-power.toml", configuration)
            replay.advance(cut.at).rebuild(machine.disk, Chance(cut.seed))
            group.create_task(look(machine, cut))
    outcome.found.sort(key=lambda pair: pair[0].at)
    return outcome


async def _read(machine: Machine, cut: Cut, notes: Notes, at: int, window: int) -> Finding:
    if cut.recovery:
        refused = await asyncio.to_thread(_cut_again, machine, cut)
        if refused:
            return Finding(notes.promises(at), refused=refused)
    return await read(machine, notes, at, window)


async def read(machine: Machine, notes: Notes, at: int, window: int = 0) -> Finding:
    """Start the broker on what is there and compare; it is killed afterwards."""
    try:
        await asyncio.to_thread(machine.start)
    except RuntimeError as error:
        return Finding(notes.promises(at), refused=str(error))
    try:
        return await verify(machine.url, notes, at, window)
    except Exception as error:
        return Finding(notes.promises(at), refused=f"{type(error).__name__}: {error}\n{machine.process.tail()}")
    finally:
        await asyncio.to_thread(machine.stop, signal.SIGKILL)


def _cut_again(machine: Machine, cut: Cut) -> str:
    """Start the broker, kill it, and leave what a power cut at some point of its start would have left."""
    first, shim = machine.where / "first", Shim(machine.disk, machine.where / "again.log")
    shutil.copytree(machine.disk, first)
    machine.environment = shim.environment
    try:
        machine.start()
        machine.stop(signal.SIGKILL)
    except RuntimeError as error:
        return str(error)
    finally:
        machine.environment = {}
    events = shim.events()
    shutil.rmtree(machine.disk)
    point = random.Random(cut.seed).randrange(len(events) + 1)
    Replay(events, first).advance(point).rebuild(machine.disk, Chance(cut.seed + 1))
    return ""
