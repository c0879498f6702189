"""Builds the shim, puts it before a process, and reads the log it writes."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

from tests.servers import Absent

SOURCE = Path(__file__).with_name("shim.c")


class Kind(IntEnum):
    """What a record of the log says; numbers as in `shim.c`."""

    OPEN = 1
    WRITE = 2
    SYNC_WRITE = 3
    TRUNCATE = 4
    SYNC = 5
    DONE = 6
    RENAME = 7
    UNLINK = 8
    LINK = 9
    MKDIR = 10
    MAP = 11
    FAULT = 12


class Flag(IntFlag):
    CREATED = 1
    EMPTIED = 2
    """Of an OPEN: with O_TRUNC. Of a DONE: the data was written although the call failed."""
    FOLDER = 4
    LIE = 8


NO_FLAG = Flag(0)


@dataclass(frozen=True, slots=True)
class Event:
    """One record. `time` in ns of CLOCK_MONOTONIC; `reference` is the sequence number of what a DONE ends."""

    sequence: int
    time: int
    kind: Kind
    inode: int = 0
    path: str = ""
    target: str = ""
    data: bytes = b""
    offset: int = 0
    result: int = 0
    reference: int = 0
    flags: Flag = NO_FLAG
    mode: int = 0o600


_HEAD = struct.Struct("<IIQQQQqqBBHHHII")
_MAGIC = 0x31575049


class BrokenLog(Exception):
    """The log of the shim cannot be read."""


def read(log: Path) -> list[Event]:
    """Every whole record; one that was cut short at the end, by a kill, is left out. Raises BrokenLog."""
    raw = log.read_bytes() if log.exists() else b""
    events, at = [], 0
    while at + _HEAD.size <= len(raw):
        (magic, length, sequence, time, inode, reference, offset, result, kind, flags, path, target, mode, data, _) = (
            _HEAD.unpack_from(raw, at)
        )
        if magic != _MAGIC or length != _HEAD.size + path + target + data:
            raise BrokenLog(f"{log}: no record at byte {at}")
        if at + length > len(raw):
            break
        name = at + _HEAD.size
        events.append(
            Event(
                sequence, time, Kind(kind), inode,
                os.fsdecode(raw[name : name + path]), os.fsdecode(raw[name + path : name + path + target]),
                raw[name + path + target : at + length], offset, result, reference, Flag(flags), mode,
            )
        )  # fmt: skip
        at += length
    if any(a.sequence >= b.sequence or a.time > b.time for a, b in itertools.pairwise(events)):
        raise BrokenLog(f"{log}: records out of order")
    return events


@functools.cache
def build() -> Path:
    """The compiled shim, made once per process; raises Absent where it cannot be."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        raise Absent("the shim is for 64-bit Linux")
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        raise Absent("no C compiler for the shim (apt-get install gcc libc6-dev)")
    folder = tempfile.TemporaryDirectory(prefix="isthmus-shim-")
    _folders.append(folder)
    shim = Path(folder.name) / "shim.so"
    command = [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(shim)]
    done = subprocess.run([*command, str(SOURCE), "-pthread"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SOURCE} does not compile:\n{done.stderr}")
    return shim


_folders: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Shim:
    """The shim over one folder: `Broker(where, environment=Shim(folder, log).environment)`."""

    folder: Path
    log: Path
    lie: bool = False

    @property
    def faults(self) -> Path:
        return self.log.with_suffix(".faults")

    @property
    def environment(self) -> dict[str, str]:
        before = os.environ.get("LD_PRELOAD")
        return {
            "LD_PRELOAD": f"{build()}:{before}" if before else str(build()),
            "SHIM_ROOT": str(self.folder.resolve()),
            "SHIM_LOG": str(self.log.resolve()),
            "SHIM_FAULTS": str(self.faults.resolve()),
            "SHIM_LIE": "1" if self.lie else "0",
        }

    def inject(self, *faults: str) -> None:
        """Put these lines into force instead of those before, e.g. `eio fdatasync 1`; `shim.c` has them all."""
        draft = self.faults.with_suffix(".draft")
        draft.write_text("".join(f"{line}\n" for line in faults))
        draft.rename(self.faults)

    def events(self) -> list[Event]:
        return read(self.log)

    def injected(self) -> int:
        """Calls that have failed on demand so far."""
        return sum(event.kind is Kind.FAULT for event in self.events())
