"""Reads small text files an operator wrote, and says precisely where one is wrong."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 64 << 20


class FileError(ValueError):
    """Something in a file cannot be used: ``FILE:LINE: TEXT``. The text never repeats a hash."""

    def __init__(self, path: Path, line: int, text: str) -> None:
        super().__init__(f"{path}:{line}: {text}" if line else f"{path}: {text}")
        self.path = path
        self.line = line


def read_text(path: Path) -> str:
    """The whole file as text, without byte-order mark; FileError when it is not an ordinary file of UTF-8 text."""
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(path.stat().st_mode):
                raise FileError(path, 0, "is not a file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileError(path, 0, f"cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise FileError(path, 0, f"is larger than {MAX_BYTES >> 20} MB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(path, data.count(b"\n", 0, error.start) + 1, "is not UTF-8 text") from None
    if "\0" in text:
        raise FileError(path, text.count("\n", 0, text.index("\0")) + 1, "holds a NUL character")
    return text


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and line, without line ends (LF or CR LF)."""
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield number, line.removesuffix("\r")
