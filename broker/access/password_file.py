"""Reads and edits a file of users: ``name:hash`` a line. mosquitto's password files are read as they are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from broker.access.passwords import BadHash, Hash
from broker.access.text_file import FileError, read_lines
from broker.extend.auth import Account, AccountError

__all__ = ["FileError", "PasswordFile", "read_passwords"]

LOCKED = 10.0
"""Seconds an edit waits for others who edit."""


def read_passwords(path: Path) -> dict[str, Hash]:
    """Hashes by user name. Raises FileError with the line: a line that is blank, has no separator, an empty name, an
    empty or unusable hash, or a name that was there before is an error, never a user. Lines that start with ``#`` are
    comments."""
    users: dict[str, Hash] = {}
    places: dict[str, int] = {}
    for number, line in read_lines(path):
        if line.startswith("#"):
            continue
        if not line.strip():
            raise FileError(path, number, "a blank line; remove it")
        name, colon, text = line.partition(":")
        if not colon:
            raise FileError(path, number, "there is no colon; write NAME:HASH")
        if not name:
            raise FileError(path, number, "the user name is empty")
        if name in users:
            raise FileError(path, number, f"user {name!r} is in line {places[name]} already")
        try:
            users[name] = Hash(text.strip())
        except BadHash as error:
            raise FileError(path, number, f"user {name!r}: {error}") from None
        places[name] = number
    return users


class PasswordFile:
    """`broker.extend.auth.Accounts` in such a file. Comments and the order of lines stay; whoever reads it meanwhile
    sees the old file or the new one, and two that edit it wait for each other."""

    def __init__(self, path: Path, superusers: tuple[str, ...] = ()) -> None:
        self._path = path
        self._superusers = superusers

    def __str__(self) -> str:
        return str(self._path)

    def users(self) -> list[Account]:
        if not self._path.exists():
            return []
        users = read_passwords(self._path)
        return [Account(name, hash.scheme, name in self._superusers) for name, hash in users.items()]

    def add(self, name: str, hash: str) -> None:
        if not name or name.startswith("#") or ":" in name or not name.isprintable():
            raise AccountError(f"{name!r} cannot stand in a file of users: no colon, no # in front, printable")

        def edit(lines: list[str], at: int | None) -> None:
            if at is not None:
                raise AccountError(f"there is a user {name!r} already")
            lines.append(f"{name}:{hash}")

        self._edit(name, edit)

    def passwd(self, name: str, hash: str) -> None:
        def edit(lines: list[str], at: int | None) -> None:
            lines[_known(name, at)] = f"{name}:{hash}"

        self._edit(name, edit)

    def delete(self, name: str) -> None:
        if name in self._superusers:
            raise AccountError(f"user {name!r} stands in superusers; take it out there first")

        def edit(lines: list[str], at: int | None) -> None:
            del lines[_known(name, at)]

        self._edit(name, edit)

    def _edit(self, name: str, edit: Callable[[list[str], int | None], None]) -> None:
        path = self._path.resolve()  # a link stays a link
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone_in(path.parent):
            there = path.exists()
            if there:
                read_passwords(path)  # what is not understood is not written anew
            lines = [line for _, line in read_lines(path)] if there else []
            at = next((n for n, line in enumerate(lines) if line.partition(":")[0] == name), None)
            edit(lines, at)
            _replace(path, "".join(f"{line}\n" for line in lines), path.stat() if there else None)


def _known(name: str, at: int | None) -> int:
    if at is None:
        raise AccountError(f"there is no user {name!r}")
    return at


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While no other command edits an account in this folder. The folder is locked: the file itself is replaced."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + LOCKED
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise AccountError(f"{folder} has been locked by another program for {LOCKED:.0f} s") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str, old: os.stat_result | None) -> None:
    """The whole text on disk or the old file, with the old file's owner and permissions."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            if old is not None:
                os.fchmod(descriptor, old.st_mode & 0o777)
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
