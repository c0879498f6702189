"""Pulls the plug of a real file system: ext4 on a loop device, shut down in mid-flight. Linux, root.

EXT4_IOC_SHUTDOWN without flushing the journal leaves the image as a power cut would: what was not synced is gone, and
every write and sync afterwards fails with EIO. One that is on its way at that moment may be reported done without being
so (seen on Linux 6.18: a thread that appends with O_DSYNC, one write lost in 13 of 120 shut-downs, never one that had
returned before). No machine without power says anything, so what counts is what was acknowledged before.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.power import load
from tests.power.load import Notes
from tests.power.rounds import Machine, read
from tests.power.verify import Finding
from tests.servers import Absent, program

_SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125  # EXT4_IOC_SHUTDOWN = _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2


@dataclass
class Outcome:
    """The findings of all rounds."""

    found: list[Finding] = field(default_factory=list)
    acknowledged: int = 0

    def problem(self) -> str:
        bad = [f"round {n}: {finding}" for n, finding in enumerate(self.found, 1) if finding]
        if not self.acknowledged:
            bad.insert(0, "nothing was acknowledged, so nothing was tested")
        return "\n".join([self.summary(), *bad[:10]]) if bad else ""

    def summary(self) -> str:
        lost, due = sum(f.lost for f in self.found), sum(f.due for f in self.found)
        return (
            f"ext4 shut down {len(self.found)} times, {self.acknowledged} acknowledgements: {lost} of {due} deliveries"
            f" lost, {sum(bool(f) for f in self.found)} rounds bad"
        )


class Volume:
    """An image and where it is mounted."""

    def __init__(self, where: Path, megabytes: int = 96) -> None:
        self.image, self.mounted = where / "image", where / "disk"
        self.mounted.mkdir(parents=True)
        with self.image.open("wb") as image:
            image.truncate(megabytes << 20)
        _command("mkfs.ext4", "-q", "-F", str(self.image))

    def mount(self) -> None:
        """Raises Absent where that is not allowed. The loop device goes with the mount."""
        _command("mount", "-o", "loop", str(self.image), str(self.mounted))

    def shut_down(self) -> None:
        """No power from now on."""
        folder = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        except OSError as error:
            raise Absent(f"EXT4_IOC_SHUTDOWN: {error.strerror}") from None
        finally:
            os.close(folder)

    def unmount(self) -> None:
        """However busy it is, and also when it is not mounted."""
        for options in ([], [], ["-l"]):
            if not os.path.ismount(self.mounted):
                break
            if _quiet("umount", *options, str(self.mounted)):
                time.sleep(0.2)
        for line in subprocess.run(
            [_needed("losetup"), "-j", str(self.image)], capture_output=True, text=True
        ).stdout.splitlines():
            _quiet("losetup", "-d", line.partition(":")[0])


def _needed(name: str) -> str:
    found = program(name)
    if found is None:
        raise Absent(f"the program {name} is not installed")
    return found


def _command(name: str, *arguments: str) -> None:
    done = subprocess.run([_needed(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Absent(f"{name} {' '.join(arguments)}: {done.stderr.strip()}")


def _quiet(name: str, *arguments: str) -> int:
    return subprocess.run([_needed(name), *arguments], capture_output=True).returncode


@contextlib.contextmanager
def volume(where: Path) -> Iterator[Volume]:
    """A mounted ext4; unmounted and its loop device freed whatever happens. Raises Absent with the reason."""
    if sys.platform != "linux" or os.geteuid():
        raise Absent("mounting needs Linux and root")
    made = Volume(where)
    try:
        made.mount()
        yield made
    finally:
        made.unmount()
        made.image.unlink()


def rounds(where: Path, count: int, seed: int, *, configuration: str = "") -> Outcome:
    """So many plugs pulled, each after a random time of load on a new file system. Raises Absent."""
    outcome = Outcome()
    for number in range(count):
        place = where / f"{number:03}"
        with volume(place) as disk:
            finding = _round(place, disk, random.Random(seed * 1_000 + number), configuration)
        outcome.acknowledged += finding.promises
        outcome.found.append(finding)
    return outcome


def _round(place: Path, disk: Volume, chance: random.Random, configuration: str) -> Finding:
    machine, notes = Machine(place), Notes()
    machine.write("00-power.toml", load.OPEN)
    if configuration:
        machine.write("50-power.toml", configuration)
    try:
        machine.start()
        cut = asyncio.run(_pull(machine, disk, notes, chance))
    finally:
        if machine._process is not None:
            machine.stop(signal.SIGKILL)
    disk.unmount()
    disk.mount()
    return asyncio.run(read(machine, notes, cut))


async def _pull(machine: Machine, disk: Volume, notes: Notes, chance: random.Random) -> int:
    """Load, plug pulled in the middle of it, a moment for what the broker says then, and its end. Returns when."""
    running = asyncio.create_task(load.run(machine.url, notes, seconds=5, rate=400, seed=chance.randrange(1 << 30)))
    await asyncio.sleep(chance.uniform(0.2, 1.2))
    if running.done():
        raise RuntimeError(f"the load ended before the cut:\n{machine.process.tail()}")
    cut = load.now()  # what the clients have read by now: nothing of theirs runs until the plug is pulled
    disk.shut_down()
    await asyncio.sleep(0.1)
    machine.process.popen.kill()
    await running
    return cut
