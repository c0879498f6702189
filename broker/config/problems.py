"""What is wrong with a configuration, said in one form: ``FILE:LINE: KEY: TEXT``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Key = tuple[str | int, ...]
"""Where a value stands: ``("bridges", "hq", "topics", 0, "filter")``."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PLACE = re.compile(r"(.*?)(?::(\d+))?")


class ConfigError(Exception):
    """The configuration is wrong; nothing was started or changed."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems) or self.__doc__)
        self.problems = list(problems)
        """One line each: ``FILE:LINE: KEY: TEXT``."""


def spell(key: Key) -> str:
    """A key as it is written: ``bridges.hq.topics[0].filter``."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            part = part if _BARE.fullmatch(part) else '"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"'
            text += f".{part}" if text else part
    return text


def line(place: str, key: str, text: str) -> str:
    """One problem as one line; control characters in it are made visible."""
    whole = ": ".join(part for part in (place, key, text) if part)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in whole.replace("\n", " "))


def arrange(problems: Iterable[str]) -> list[str]:
    """Problems without repetition, in the order of files and lines."""

    def place(problem: str) -> tuple[str, int]:
        match = re.match(r"(\S+?):(\d+): ", problem)
        return (match[1], int(match[2])) if match else (problem.partition(": ")[0], 0)

    return sorted(dict.fromkeys(problems), key=place)
