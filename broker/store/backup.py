"""A copy of the store while it is written: closed segments are linked where that is possible, the newest is copied.

What is copied ends with a whole commit, and nothing before it may go away meanwhile: see `Writer.hold`. A segment that
was linked shares its place on the disk with the store; it is never changed there (`opening.py` mends a copy).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from broker.extend.store import BackupFailed
from broker.store import segments

UNFINISHED = "store.partial"
"""What the copy is called until it is whole."""
_BLOCK = 1 << 20
_AT_ONCE = 4 << 20
"""Bytes between two flushes: all at the end would keep the store's own writes waiting for them."""
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


class Extent(NamedTuple):
    """The store at one moment: its segments, and how much of the newest is written."""

    oldest: int
    newest: int
    size: int
    salt: int


class Copied(NamedTuple):
    """What a backup holds."""

    segments: int
    linked: int
    """So many of them share their place on the disk with the store."""
    bytes: int


def prepare(folder: Path, target: Path) -> None:
    """Make the data folder that is to hold the copy. Raises BackupFailed where something is in it, and OSError."""
    if target.resolve().is_relative_to(folder.resolve()):
        raise BackupFailed(f"{target} is inside the store")
    with contextlib.suppress(FileExistsError):
        segments.make_folder(target)
    if any(target.iterdir()):
        raise BackupFailed(f"{target}: there is something in this folder; name a new or an empty one")


def copy(folder: Path, target: Path, extent: Extent, interrupted: Callable[[], bool]) -> Copied:
    """Make `target/store`, whole or not at all. Raises BackupFailed when interrupted, and OSError."""
    unfinished = target / UNFINISHED
    segments.make_folder(unfinished)
    try:
        linked = copied = 0
        for number in range(extent.oldest, extent.newest + 1):
            last = number == extent.newest
            source = segments.segment_path(folder, number)
            size = extent.size if last else source.stat().st_size
            fresh = segments.segment_path(unfinished, number)
            if not last and _link(source, fresh):
                linked += 1
            else:
                _copy(source, fresh, size, interrupted)
            copied += size
        segments.write_range(unfinished, segments.Range(extent.oldest, extent.newest))
        segments.write_closed(unfinished, segments.Closed(extent.newest, extent.size))
        segments.write_format(unfinished, extent.salt)
        os.rename(unfinished, target / "store")
        segments.sync_folder(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Copied(extent.newest - extent.oldest + 1, linked, copied)


def _link(source: Path, fresh: Path) -> bool:
    try:
        os.link(source, fresh)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _copy(source: Path, fresh: Path, size: int, interrupted: Callable[[], bool]) -> None:
    """The first `size` bytes, on disk at the end. Raises OSError, also where the file is shorter."""
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            at = 0
            while at < size:
                if interrupted():
                    raise BackupFailed("the broker stops; the backup was not finished")
                block = os.pread(reading, min(_BLOCK, size - at), at)
                if not block:
                    raise OSError(errno.EIO, f"the file ends at {at} of {size} bytes", str(source))
                segments.put(writing, block)
                at += len(block)
                if at % _AT_ONCE == 0:
                    os.fdatasync(writing)
            os.fsync(writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
