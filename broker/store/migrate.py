"""Brings the folder of an older release to the layout of this one. Killed anywhere, the next start goes on (D-09).

The steps work on a copy, `store.new`. It gets the new version's number last; then the old folder becomes `store.v<n>`
and the copy takes its place. So at any moment there is either the old store or a whole copy, and `format` in the copy
tells which.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from broker.store import segments
from broker.store.errors import StoreUnusable
from broker.store.frames import VERSION
from broker.store.survey import version_of

log = logging.getLogger(__name__)

STEPS: dict[int, Callable[[Path], None]] = {}
"""Version -> what turns a folder of it into one of the next. This release is the first: there is none."""


def migrate(folder: Path) -> None:
    """Do what is to be done, if anything. Raises StoreTooNew, StoreUnusable without a way, OSError."""
    fresh = folder.with_name(f"{folder.name}.new")
    if not folder.exists():
        if fresh.is_dir() and _version(fresh) == VERSION:  # stopped between the two renames
            _rename(fresh, folder)
        return
    version = version_of(folder)
    if version is None or version == VERSION:
        if fresh.exists():
            shutil.rmtree(fresh)
        return
    missing = [n for n in range(version, VERSION) if n not in STEPS]
    if missing:
        raise StoreUnusable(
            f"{folder}: the store has version {version} and this release cannot read it; start a release between first"
        )
    log.warning("%s: migrating from version %d to %d", folder, version, VERSION)
    if fresh.exists():
        shutil.rmtree(fresh)
    shutil.copytree(folder, fresh)
    for number in range(version, VERSION):
        STEPS[number](fresh)
    known = segments.read_format(fresh)
    _sync(fresh)
    segments.write_format(fresh, known.salt if known is not None else 0)
    segments.sync_folder(folder.parent)
    old = segments.unused(folder.with_name(f"{folder.name}.v{version}"))
    _rename(folder, old)
    _rename(fresh, folder)
    log.warning("%s: now version %d; the old one is %s and may be deleted", folder, VERSION, old)


def _version(folder: Path) -> int | None:
    known = segments.read_format(folder)
    return known.version if known is not None else None


def _rename(old: Path, new: Path) -> None:
    os.rename(old, new)
    segments.sync_folder(new.parent)


def _sync(folder: Path) -> None:
    """Make everything below last, with the modes everything in the store has."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            os.chmod(path, 0o700)
            segments.sync_folder(path)
            continue
        os.chmod(path, 0o600)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
