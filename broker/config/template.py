"""Templates with placeholders of messages and clients, such as ``telemetry/${username}/${payload.room}``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from broker.config.types import CompiledText

_TOKEN = re.compile(r"\$\$\{|\$\{")
_TOKEN_PERCENT = re.compile(r"\$\$\{|\$\{|%[uc%]")
_NAME = re.compile(r"\.|[A-Za-z_][A-Za-z0-9_]*(?:\[\d{1,6}\]|\.[^.\[\]{}$\s][^.\[\]{}]*)*")
_STEP = re.compile(r"\[(\d+)\]|\.([^.\[\]]+)")
_ROOT = re.compile(r"\.|[A-Za-z_][A-Za-z0-9_]*")
_PERCENT = {"%u": "username", "%c": "clientid"}
_SUBSTITUTIONS = ("env:", "file:")


class MissingValue(LookupError):
    """A placeholder has no value."""

    def __init__(self, name: str) -> None:
        super().__init__(f"${{{name}}} has no value")
        self.name = name


class Placeholder:
    """One ``${name}``: ``payload.a.b`` has root ``payload`` and path ``("a", "b")``; ``topic[2]`` has path ``(2,)``."""

    __slots__ = ("name", "path", "rest", "root")

    def __init__(self, name: str) -> None:
        root = _ROOT.match(name)
        if root is None or not _NAME.fullmatch(name):
            raise ValueError(f"${{{name}}} is not a placeholder; write a name such as ${{clientid}} or ${{payload.a}}")
        self.name = name
        self.root = root[0]
        self.rest = name[root.end() :].removeprefix(".")
        """What follows the root as it was written, for keys that may hold dots."""
        self.path: tuple[str | int, ...] = tuple(
            int(step[1]) if step[1] is not None else step[2] for step in _STEP.finditer(name, root.end())
        )

    def __repr__(self) -> str:
        return f"${{{self.name}}}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placeholder) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Template(CompiledText):
    """Text with placeholders. ``$${`` stands for a literal ``${``. ValueError when it cannot be read."""

    __slots__ = ("names", "segments")
    expected = "expected text, which may hold placeholders such as ${clientid}"
    json_schema: ClassVar[dict[str, Any]] = {"type": "string", "format": "template"}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.segments: tuple[str | Placeholder, ...] = _segments(text, _TOKEN)
        """Literal text and placeholders in order; neighbouring literals are joined, none is empty."""
        self.names: tuple[str, ...] = tuple(s.name for s in self.segments if isinstance(s, Placeholder))

    @classmethod
    def parse(cls, text: str, *, percent: bool = False) -> Template:
        """Like the constructor; ``percent`` also accepts ``%u`` (user name), ``%c`` (client id) and ``%%``."""
        template = cls(text)
        if percent:
            template.segments = _segments(text, _TOKEN_PERCENT)
            template.names = tuple(s.name for s in template.segments if isinstance(s, Placeholder))
        return template

    @property
    def literal(self) -> str | None:
        """The whole text when there is no placeholder in it, else None."""
        if self.names:
            return None
        return "".join(s for s in self.segments if isinstance(s, str))

    def render(
        self,
        values: Mapping[str, object] | Callable[[str], object],
        escape: Callable[[str], str] | None = None,
    ) -> str:
        """Fill in the placeholders; ``escape`` is applied to each value, never to the text around it.

        ``values`` is asked with the whole name (``payload.a.b``). Raises MissingValue when it has none.
        """
        find = values.get if isinstance(values, Mapping) else values
        parts = []
        for segment in self.segments:
            if isinstance(segment, str):
                parts.append(segment)
                continue
            value = find(segment.name)
            if value is None:
                raise MissingValue(segment.name)
            text = value if isinstance(value, str) else to_text(value)
            parts.append(escape(text) if escape else text)
        return "".join(parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and other.segments == self.segments

    def __hash__(self) -> int:
        return hash(self.segments)


def to_text(value: object) -> str:
    """How a value is written into text: bytes as UTF-8 (UnicodeDecodeError if they are not), the rest as JSON would."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _segments(text: str, token: re.Pattern[str]) -> tuple[str | Placeholder, ...]:
    found: list[str | Placeholder] = []
    literal = ""
    position = 0
    while match := token.search(text, position):
        literal += text[position : match.start()]
        position = match.end()
        if match[0] == "$${":
            literal += "${"
        elif match[0] == "%%":
            literal += "%"
        elif match[0] == "${" and text.startswith(_SUBSTITUTIONS, position):
            literal += "${"  # the loader has substituted what was to be: this one was written "$${env:…}"
        else:
            if match[0] == "${":
                end = text.find("}", position)
                if end < 0:
                    raise ValueError(f"{text!r}: ${{ without }}; a literal ${{ is written $${{")
                placeholder = Placeholder(text[position:end])
                position = end + 1
            else:
                placeholder = Placeholder(_PERCENT[match[0]])
            if literal:
                found.append(literal)
                literal = ""
            found.append(placeholder)
    literal += text[position:]
    if literal:
        found.append(literal)
    return tuple(found)
