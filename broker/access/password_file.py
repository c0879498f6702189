"""Reads a file of users: ``name:hash`` a line. mosquitto's password files are read as they are."""

from __future__ import annotations

from pathlib import Path

from broker.access.passwords import BadHash, Hash
from broker.access.text_file import FileError, read_lines

__all__ = ["FileError", "read_passwords"]


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
