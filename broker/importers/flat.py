"""Reads the `key = value` files of EMQ 2 to EMQX 4: one setting a line, names with dots."""

from __future__ import annotations

import re
from pathlib import Path

from broker.importers.source import Node, Place, SourceError, read_source

_SETTING = re.compile(r"([A-Za-z_$][^\s=]*)\s*=\s*(.*)")
_INCLUDE = re.compile(r"include\s+(?P<path>\S+)")
_COMMENT = re.compile(r"(?:^|\s)#.*")

MAX_INCLUDES = 10


def read_flat(path: Path, into: Node | None = None, depth: int = 0) -> Node:
    """The settings of a file, those of `into` among them; of a setting that is there twice the later counts. Raises
    SourceError."""
    root = into if into is not None else Node("", Place(str(path), 1))
    for number, row in enumerate(read_source(path).split("\n"), 1):
        text = row.strip()
        if not text or text.startswith(("#", "%%")):
            continue
        place = Place(str(path), number)
        include = _INCLUDE.fullmatch(text)
        if include and "=" not in text:
            if depth == MAX_INCLUDES:
                raise SourceError(place, "included too deeply")
            for one in _included(path.parent, include["path"].strip("\"'"), place):
                read_flat(one, root, depth + 1)
            continue
        match = _SETTING.fullmatch(text)
        if match is None:
            raise SourceError(place, "expected NAME = VALUE")
        node = root
        for part in match[1].split("."):
            if not part:
                raise SourceError(place, f"{match[1]} is no name of a setting")
            node = node.child(part, place)
        node.place = place
        node.value = _value(match[2])
    return root


def _included(folder: Path, pattern: str, place: Place) -> list[Path]:
    """The files that are meant; there may be none for a pattern with * or ?."""
    wanted = folder / pattern
    if not pattern or "**" in pattern:
        raise SourceError(place, "include: the name of a file is expected, * and ? in its last part")
    if not any(mark in wanted.name for mark in "*?["):
        return [wanted]
    return sorted(wanted.parent.glob(wanted.name))


def _value(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text.count(text[0]) == 2:
        return text[1:-1]
    return _COMMENT.sub("", text).strip()
