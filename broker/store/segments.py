"""The store's folder: segments and the small files beside them. Everything made here is the owner's alone.

format     JSON: version of the layout, the store's salt; written last when a store is created
range      lowest and highest segment that must be there; written before a segment is dropped, after one is made
closed     segment and bytes in it at a clean stop; gone while a broker runs
damaged/   copies of segments as they were when a loss was accepted
*.new      unfinished; *.log    segments
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from broker.store.frames import VERSION, SegmentHeader, pack_segment

NAME = re.compile(r"[0-9]{8}\.log")
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write ends with where there is no space."""
_BLOCK = 1 << 20
_SECTOR = 4096


class Format(NamedTuple):
    """The file `format`."""

    version: int
    salt: int


class Range(NamedTuple):
    """The file `range`."""

    oldest: int
    newest: int


class Closed(NamedTuple):
    """The file `closed`."""

    segment: int
    length: int


def segment_path(folder: Path, number: int) -> Path:
    """Where this segment is."""
    return folder / f"{number:08d}.log"


def numbers(folder: Path) -> list[int]:
    """The segments in the folder, ascending."""
    found = (int(p.stem) for p in folder.iterdir() if NAME.fullmatch(p.name))
    return sorted(n for n in found if segment_path(folder, n).exists())


def unused(wanted: Path) -> Path:
    """This name, or it with a number: nothing that was put aside is ever replaced."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def sync_folder(folder: Path) -> None:
    """Make creations, renames and deletions in it last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create the folder, 0700 whatever the umask."""
    os.mkdir(folder, 0o700)
    os.chmod(folder, 0o700)
    sync_folder(folder.parent)


def write_file(path: Path, data: bytes) -> None:
    """Create or replace a file, 0600: it is there as a whole and lasts, or it is as it was."""
    fresh = path.with_suffix(".new")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            put(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    sync_folder(path.parent)


def put(fd: int, data: bytes) -> None:
    """Write all of it; as a rule that is one call."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


def read_file(path: Path) -> bytes:
    """The whole file; zeros where the disk cannot read it."""
    parts = []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        at = 0
        while at < size:
            part = _read_block(fd, at, min(_BLOCK, size - at))
            if not part:
                break
            parts.append(part)
            at += len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def _read_block(fd: int, at: int, length: int) -> bytes:
    try:
        return os.pread(fd, length, at)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        if length <= _SECTOR:
            return bytes(length)
    return b"".join(_read_block(fd, i, min(_SECTOR, at + length - i)) for i in range(at, at + length, _SECTOR))


def create_segment(folder: Path, header: SegmentHeader) -> None:
    """Make an empty segment. It is never seen with less than its header."""
    write_file(segment_path(folder, header.number), pack_segment(header))


def open_segment(folder: Path, number: int, dsync: bool) -> int:
    """A descriptor that appends; with `dsync` a write returns when it is on disk."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    return os.open(segment_path(folder, number), flags | (os.O_DSYNC if dsync else 0))


def write_format(folder: Path, salt: int) -> None:
    """Say that this is a store and how it is laid out."""
    write_file(folder / "format", (json.dumps({"version": VERSION, "salt": salt}) + "\n").encode())


def read_format(folder: Path) -> Format | None:
    """None where the file is missing or damaged; `salt` is 0 in layouts that had none."""
    try:
        known = json.loads(_content(folder / "format"))
        return Format(int(known["version"]), int(known.get("salt", 0)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def write_range(folder: Path, bounds: Range) -> None:
    """Say which segments must be there. On a full disk the file is overwritten where it is: to drop makes space."""
    try:
        write_file(folder / "range", _pack_pair(bounds))
    except OSError as error:
        if error.errno not in FULL:
            raise
        fd = os.open(folder / "range", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, _pack_pair(bounds), 0)
            os.fdatasync(fd)
        finally:
            os.close(fd)


def read_range(folder: Path) -> Range | None:
    """None where the file is missing or damaged."""
    pair = _read_pair(folder / "range")
    return Range(*pair) if pair is not None else None


def write_closed(folder: Path, closed: Closed) -> None:
    """Say that the newest segment is on disk with this length and nobody writes it."""
    write_file(folder / "closed", _pack_pair(closed))


def read_closed(folder: Path) -> Closed | None:
    """None while a broker runs, after one was killed, and where the file is damaged."""
    pair = _read_pair(folder / "closed")
    return Closed(*pair) if pair is not None else None


def _pack_pair(pair: tuple[int, int]) -> bytes:
    """Two numbers and their checksum as text, always of the same length."""
    line = b"%010d %010d" % pair
    return line + b" %08x\n" % crc32(line)


def _read_pair(path: Path) -> tuple[int, int] | None:
    try:
        line, _, check = _content(path).strip().rpartition(b" ")
        if crc32(line) != int(check, 16):
            return None
        first, second = line.split()
        return int(first), int(second)
    except ValueError:
        return None


def _content(path: Path) -> bytes:
    """What is in a small file; nothing where it is missing or the disk cannot read it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


def drop_segment(folder: Path, bounds: Range, number: int) -> None:
    """Delete a segment, after `bounds` without it is on disk."""
    write_range(folder, bounds)
    segment_path(folder, number).unlink(missing_ok=True)
    sync_folder(folder)
