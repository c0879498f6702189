"""Small programs that write to a folder; under the shim they test the rig itself: `python programs.py NAME FOLDER`."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from broker.store.opening import open_store

_SEGMENT = 4_000


def journal(folder: Path, *, careful: bool = True) -> None:
    """Appends 120 lines, one synced write each, rolling over to new files; prints number and time of what it promises.

    Without care it forgets to sync the folder, as a defect would.
    """
    chance = random.Random(1)
    place = os.open(folder, os.O_RDONLY)
    descriptor, size, segment = -1, _SEGMENT, 0
    for number in range(120):
        if size >= _SEGMENT:
            if descriptor >= 0:
                os.close(descriptor)
            segment += 1
            descriptor = os.open(
                folder / f"{segment:04}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_DSYNC, 0o600
            )
            size = 0
            if careful:
                os.fsync(place)
        line = b"%d %s.\n" % (number, b"x" * chance.randrange(900))
        assert os.write(descriptor, line) == len(line)
        size += len(line)
        print(number, time.monotonic_ns(), flush=True)


def careless(folder: Path) -> None:
    journal(folder, careful=False)


def everything(folder: Path) -> None:
    """Every call that the shim follows, from three threads."""
    workers = [threading.Thread(target=_mix, args=(folder / str(n), n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.chdir(folder / "1")
    Path("relative").write_text("by a relative path")
    here = os.open(folder / "2", os.O_RDONLY)
    descriptor = os.open("beside", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=here)
    os.write(descriptor, b"by a descriptor of its folder")
    os.rename("beside", "moved", src_dir_fd=here, dst_dir_fd=here)
    twin = os.dup(descriptor)
    os.close(descriptor)
    os.write(twin, b", then by a copy of its own")
    os.fsync(twin)
    os.close(twin)
    shutil.move(folder / "1" / "relative", folder / "0" / "relative")
    os.link(folder / "0" / "relative", folder / "0" / "link")
    shutil.copyfile(folder / "0" / "relative", folder / "0" / "copy")
    shutil.rmtree(folder / "2" / "tree")


def _mix(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    (folder / "tree" / "deep").mkdir(parents=True)
    (folder / "tree" / "deep" / "file").write_bytes(b"deep")
    for name in ("plain", "append", "synced"):
        flags = {"plain": 0, "append": os.O_APPEND, "synced": os.O_APPEND | os.O_DSYNC}[name]
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | flags, 0o600)
        for _ in range(40):
            data = chance.randbytes(chance.randrange(1, 3_000))
            match chance.randrange(7):
                case 0 | 1:
                    os.write(descriptor, data)
                case 2:
                    os.pwrite(descriptor, data, chance.randrange(20_000))
                case 3:
                    os.writev(descriptor, [data[:7], data[7:]])
                case 4:
                    os.pwritev(descriptor, [data, data], chance.randrange(20_000), os.RWF_DSYNC)
                case 5:
                    os.ftruncate(descriptor, chance.randrange(20_000))
                case _:
                    os.lseek(descriptor, chance.randrange(20_000), os.SEEK_SET)
        os.fdatasync(descriptor)
        os.posix_fallocate(descriptor, 0, 21_000)
        os.close(descriptor)
    with open(folder / "plain", "r+b") as file:
        file.seek(100)
        file.write(b"buffered" * 5_000)
    os.truncate(folder / "append", 77)
    (folder / "plain").write_text("emptied first")
    os.replace(folder / "append", folder / "synced")
    (folder / "gone").touch()
    (folder / "gone").unlink()
    (folder / "empty").mkdir()
    (folder / "empty").rmdir()


def calls(folder: Path) -> None:
    """Makes calls that may fail and prints how each ended: `ok`, the number of bytes, or the name of the error."""
    descriptor = os.open(folder / "a", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    synced = os.open(folder / "a", os.O_WRONLY | os.O_APPEND | os.O_DSYNC)
    tries: dict[str, Callable[[], object]] = {
        "write": lambda: os.write(descriptor, b"x" * 1_000),
        "synced": lambda: os.write(synced, b"y" * 1_000),
        "ftruncate": lambda: os.ftruncate(descriptor, 100),
        "fsync": lambda: os.fsync(descriptor),
        "fdatasync": lambda: os.fdatasync(descriptor),
        "open": lambda: os.close(os.open(folder / "b", os.O_WRONLY | os.O_CREAT)),
        "rename": lambda: os.rename(folder / "b", folder / "c"),
        "unlink": lambda: os.unlink(folder / "c"),
        "mkdir": lambda: os.mkdir(folder / "d"),
        "free": lambda: _free(folder),
        "size": lambda: os.stat(folder / "a").st_size,
    }
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            result = tries[line.strip()]()
        except OSError as error:
            result = error.strerror
        print("ok" if result is None else result, flush=True)


def store(folder: Path) -> None:
    """The broker's store by itself: 150 commits over many small segments, the oldest dropped as it goes. Prints
    `written BODY SEGMENT TIME` for each frame that is promised and `drop SEGMENT` before it lets one go."""
    asyncio.run(_commits(folder / "store"))


def reopen(folder: Path) -> None:
    """Opens that store and closes it: what was torn is mended."""
    asyncio.run(_commits(folder / "store", 0))


class _Owner:
    """Prints what was written; at most two commits are under way."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(2)
        self.bodies: dict[int, list[int]] = {}

    def written(self, number: int, places: list[tuple[int, int]]) -> None:
        for body, (segment, _) in zip(self.bodies[number], places, strict=True):
            print("written", body, segment, time.monotonic_ns(), flush=True)
        self.free.release()

    def failed(self, number: int, error: Exception) -> None:
        raise error


async def _commits(folder: Path, count: int = 150) -> None:
    chance = random.Random(2)
    made, recovered = open_store(
        folder, durability="flush", interval=1, min_free=0, loop=asyncio.get_running_loop(), segment_bytes=20_000
    )
    for _ in recovered.frames():
        pass
    made.owner = owner = _Owner()
    body = 0
    for number in range(count):
        await owner.free.acquire()
        frames = []
        for _ in range(chance.randrange(1, 4)):
            body += 1
            payload = b"%d|" % body + chance.randbytes(chance.choice((10, 400, 3_000)))
            frames.append((struct.pack("<BI", 1, len(payload)) + payload, 1))
        owner.bodies[number] = list(range(body - len(frames) + 1, body + 1))
        made.write(number, frames, number)
        oldest, *later = sorted(made.sizes())
        if len(later) > 4:
            print("drop", oldest, flush=True)
            made.drop(oldest)
    for _ in range(2):
        await owner.free.acquire()
    made.close()


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


if __name__ == "__main__":
    every = (journal, careless, everything, store, reopen, calls)
    {program.__name__: program for program in every}[sys.argv[1]](Path(sys.argv[2]))
