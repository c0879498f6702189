"""This node's own facts, kept in the data folder: its number, how often it started, and the lock that makes it one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO


class DataFolderBusy(RuntimeError):
    """Another broker uses this data folder."""


@dataclass(slots=True)
class Node:
    """`number` is allotted once and goes into message ids; `boot` counts starts."""

    number: int
    boot: int
    lock: IO[str]

    def release(self) -> None:
        """Let another broker use the folder."""
        self.lock.close()


def take(data: Path) -> Node:
    """Create the data folder (0700) if needed, lock it, count this start.

    Raises DataFolderBusy while another broker holds the lock, OSError when the folder cannot be written.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # its parent may be closed to us: then somebody else made the folder
        _sync(data.parent)
    lock = open(data / "isthmus.lock", "a", encoding="utf-8")  # noqa: SIM115 - held for the life of the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise DataFolderBusy(f"{data}: another broker uses this data folder; stop it or set broker.data") from None
    path = data / "node.json"
    number, boot = secrets.randbelow(65_535) + 1, 0
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        number, boot = int(known["number"]), int(known["boot"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        lock.close()
        raise OSError(f"{path} is damaged; restore it, or delete it to be given a new node number") from None
    boot += 1
    fresh = path.with_suffix(".new")
    with open(fresh, "w", encoding="utf-8", opener=_private) as file:
        file.write(json.dumps({"number": number, "boot": boot}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _sync(data)
    return Node(number, boot, lock)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync(folder: Path) -> None:
    """Make the names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
