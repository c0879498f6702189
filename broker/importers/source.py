"""What every source has: settings with the line they stand in, and values of the kinds that other brokers write."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.config.problems import line
from broker.config.types import parse_duration, parse_size

MAX_BYTES = 4 << 20
"""Bytes of one file; more is certainly not a configuration."""

_TRUE, _FALSE = ("true", "on", "yes", "1"), ("false", "off", "no", "0")


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, as it is named to whoever asked for the import."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class SourceError(Exception):
    """The source cannot be understood: ``FILE:LINE: TEXT``. The text never repeats a value that may be secret."""

    def __init__(self, place: Place | str, text: str) -> None:
        super().__init__(line(str(place), "", text))


@dataclass(slots=True)
class Node:
    """A setting, a table of settings, or both: ``listener.tcp.external = 1883`` and ``listener.tcp.external.zone``."""

    key: str
    """Its whole name, as the source spells it."""
    place: Place
    value: Any = None
    """Text, number, boolean, a list of these, or None when only its children say something."""
    children: dict[str, Node] = field(default_factory=dict)
    items: list[Node] = field(default_factory=list)
    """The elements of a list of tables."""
    used: bool = False

    def child(self, name: str, place: Place) -> Node:
        """The child of this name, made when it is not there."""
        if name not in self.children:
            self.children[name] = Node(f"{self.key}.{name}" if self.key else name, place)
        return self.children[name]

    def at(self, path: str) -> Node | None:
        """What stands below under this dotted name; looking at it does not count as using it."""
        here: Node | None = self
        for part in path.split("."):
            here = here.children.get(part) if here is not None else None
        return here

    def below(self, path: str) -> dict[str, Node]:
        """The children of what stands there; none when nothing does."""
        found = self.at(path)
        return found.children if found is not None else {}

    def take(self, path: str) -> Node | None:
        """The setting of this name if it has a value; it counts as used from now on."""
        found = self.at(path)
        if found is None or found.value is None:
            return None
        found.used = True
        return found

    def text(self, path: str, default: str = "") -> str:
        """Its value as text."""
        found = self.take(path)
        return default if found is None else found.as_text()

    def truth(self, path: str, default: bool) -> bool:
        """Its value as a boolean; SourceError when it is none."""
        found = self.take(path)
        return default if found is None else found.as_truth()

    def as_text(self) -> str:
        """A number or boolean as it is written; SourceError for a list."""
        if isinstance(self.value, list):
            raise SourceError(self.place, f"{self.key}: one value is expected, not a list")
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)

    def as_texts(self) -> list[str]:
        """A list, or text with commas between."""
        values = self.value if isinstance(self.value, list) else self.as_text().split(",")
        return [text for value in values if (text := str(value).strip())]

    def as_truth(self) -> bool:
        text = self.as_text().lower()
        if text not in _TRUE + _FALSE:
            raise SourceError(self.place, f"{self.key} is true or false")
        return text in _TRUE

    def as_whole(self) -> int:
        """A whole number; SourceError when it is none."""
        try:
            return int(self.as_text())
        except ValueError:
            raise SourceError(self.place, f"{self.key} is a whole number") from None

    def as_size(self) -> int:
        """Bytes; SourceError when it is no size."""
        try:
            return parse_size(self.value)
        except ValueError:
            raise SourceError(self.place, f"{self.key} is a size such as 1MB") from None

    def as_seconds(self) -> float:
        """Seconds; SourceError when it is no duration."""
        return parse_duration(self.as_duration())

    def as_duration(self, bare: str = "s") -> str:
        """As our fragments write it; a number alone is counted in `bare`. SourceError when it is no duration."""
        text = f"{self.value}{bare}" if type(self.value) is int else self.as_text()
        try:
            parse_duration(text)
        except ValueError:
            raise SourceError(self.place, f"{self.key} is a duration such as 30s") from None
        return text

    def leaves(self) -> Iterator[Node]:
        """Every setting with a value, in the order they were written."""
        if self.value is not None:
            yield self
        for one in (*self.children.values(), *self.items):
            yield from one.leaves()

    def use(self) -> None:
        """Count everything below as used."""
        for leaf in self.leaves():
            leaf.used = True


def read_source(path: Path) -> str:
    """The text of a file; SourceError says why there is none."""
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(path.stat().st_mode):
                raise SourceError(str(path), "is not a file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SourceError(str(path), f"cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise SourceError(str(path), f"is larger than {MAX_BYTES >> 20} MB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(Place(str(path), data.count(b"\n", 0, error.start) + 1), "is not UTF-8 text") from None
    if "\0" in text:
        raise SourceError(Place(str(path), text.count("\n", 0, text.index("\0")) + 1), "holds a NUL character")
    return text.replace("\r\n", "\n")
