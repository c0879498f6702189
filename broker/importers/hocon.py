"""Reads HOCON as EMQX 5 writes it: nested and dotted keys, lists, comments, includes, references to other keys.

Values keep the line they were written in, which the HOCON libraries for Python do not tell; that is why this is here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from broker.importers.source import Node, Place, SourceError, read_source

MAX_DEPTH = 32
MAX_DIGITS = 32
"""Characters of a number; what is longer stays a text."""

_GAP = re.compile(r"[ \t\r]+|(?:#|//)[^\n]*")
_SPACE = re.compile(r"[\s,]+|(?:#|//)[^\n]*")
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_KEY = re.compile(r"[^\s\"{}\[\]:=,+#.$]+")
_WORD = re.compile(r"(?:(?!\s//)[^\n\"{}\[\],#$])+")
_REFERENCE = re.compile(r"\$\{(\??)([^}\n]+)\}")
_INCLUDE = re.compile(r'include\s+(required\s*\(\s*)?(?:file\s*\(\s*)?"([^"\n]+)"[ \t)]*')
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


class _Reference:
    """``${a.b}`` in place of a value."""

    def __init__(self, path: str, optional: bool) -> None:
        self.path = path
        self.optional = optional


def read_hocon(path: Path) -> Node:
    """The settings of a file and of those it includes, as one tree. Raises SourceError."""
    root = Node("", Place(str(path), 1))
    _Parser(path, root, 0).file()
    _resolve(root, root)
    return root


class _Parser:
    def __init__(self, path: Path, root: Node, depth: int) -> None:
        self.path = path
        self.root = root
        self.text = read_source(path)
        self.at = 0
        self.line = 1
        self.depth = depth

    def file(self) -> None:
        self.skip(_SPACE)
        braces = self.peek("{")
        if braces:
            self.at += 1
        self.fields(self.root, self.place() if braces else None)
        self.skip(_SPACE)
        if self.at < len(self.text):
            raise self.error(f"{self.text[self.at]!r} is out of place")

    def fields(self, into: Node, opened: Place | None) -> None:
        """Fields up to the brace that closes what was opened there, or to the end of the file."""
        while True:
            self.skip(_SPACE)
            if opened and self.peek("}"):
                self.at += 1
                return
            if self.at == len(self.text):
                if opened:
                    raise SourceError(opened, "a brace { is opened and never closed")
                return
            include = _INCLUDE.match(self.text, self.at)
            if include:
                self.move(include.end())
                self.include(include[2], into, bool(include[1]))
            else:
                self.setting(into)

    def setting(self, into: Node) -> None:
        place = self.place()
        node = into
        while True:
            plain = not self.peek('"')  # who forgot the sign between name and value may have written a secret
            node = node.child(self.key(), place)
            if not self.peek("."):
                break
            self.at += 1
        self.skip(_GAP)
        added = self.text.startswith("+=", self.at)
        if added:
            self.at += 2
        elif self.peek("=") or self.peek(":"):
            self.at += 1
        elif not self.peek("{"):
            raise self.error(f"{f'{node.key}: ' if plain else ''}expected = or {{ after the key")
        self.skip(_SPACE if self.text[self.at - 1] in "=:" else _GAP)
        if added:
            self.append(node, place)
        else:
            node.place = place
            self.value(node)

    def append(self, node: Node, place: Place) -> None:
        """One more element of a list: ``key += value``."""
        if isinstance(node.value, _Reference):
            raise self.error(f"{node.key}: adding to a reference is not understood here; write the list out")
        before = node.value if isinstance(node.value, list) else []
        element = Node(f"{node.key}.{len(before) + len(node.items) + 1}", place)
        self.value(element)
        if element.value is not None:
            before.append(element.value)
            node.value = before
        else:
            node.items.append(element)

    def key(self) -> str:
        string = _STRING.match(self.text, self.at)
        if string:
            self.move(string.end())
            return self.unescape(string[1])
        word = _KEY.match(self.text, self.at)
        if word is None:
            found = self.text[self.at : self.at + 1]
            raise self.error(f"expected the name of a setting before {found!r}" if found else "the file ends too early")
        self.move(word.end())
        return word[0]

    def value(self, node: Node) -> None:
        """One value, or several side by side, which are joined."""
        parts: list[object] = []
        while True:
            if self.peek("{"):
                self.at += 1
                self.table(node)
                parts.append(None)
            elif self.peek("["):
                self.at += 1
                self.elements(node)
                parts.append(None)
            elif self.text.startswith('"""', self.at):
                parts.append(self.long_string())
            elif string := _STRING.match(self.text, self.at):
                self.move(string.end())
                parts.append(self.unescape(string[1]))
            elif reference := _REFERENCE.match(self.text, self.at):
                self.move(reference.end())
                parts.append(_Reference(reference[2].strip(), bool(reference[1])))
            elif word := _WORD.match(self.text, self.at):
                self.move(word.end())
                parts.append(_Bare(word[0]))
            else:
                break
        self.join(node, parts)

    def join(self, node: Node, parts: list[object]) -> None:
        if not parts:
            raise self.error(f"{node.key}: the value is missing")
        texts = [part for part in parts if part is not None and not (isinstance(part, _Bare) and not part.strip())]
        if len(texts) < len(parts) and texts and None in parts:
            raise self.error(f"{node.key}: a table or list and a text stand side by side")
        if not texts:
            return
        node.children, node.items = {}, []
        if len(texts) == 1:
            only = texts[0]
            node.value = _scalar(only.strip()) if isinstance(only, _Bare) else only
        elif any(isinstance(part, _Reference) for part in texts):
            raise self.error(f"{node.key}: a reference inside a text is not understood here; write the text out")
        else:
            node.value = "".join(str(part) for part in parts).strip()

    def table(self, node: Node) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error("nested too deeply")
        node.value, node.items = None, []
        self.fields(node, self.place())
        self.depth -= 1

    def elements(self, node: Node) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error("nested too deeply")
        opened = self.place()
        values: list[Any] = []
        items: list[Node] = []
        node.children = {}
        while True:
            self.skip(_SPACE)
            if self.peek("]"):
                self.at += 1
                break
            if self.at == len(self.text):
                raise SourceError(opened, "a bracket [ is opened and never closed")
            element = Node(f"{node.key}.{len(values) + len(items) + 1}", self.place())
            self.value(element)
            if element.value is not None:
                values.append(element.value)
            else:
                items.append(element)
        node.items = items
        node.value = values if values or not items else None
        self.depth -= 1

    def unescape(self, text: str) -> str:
        """What is meant by the text between quotes."""
        try:
            found = _ESCAPE.sub(_unescaped, text).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise self.error("a text holds half a character") from None
        if "\0" in found:
            raise self.error("a text holds a NUL character")
        return found

    def long_string(self) -> str:
        end = self.text.find('"""', self.at + 3)
        if end < 0:
            raise self.error('a text begins with """ and never ends')
        while self.text.startswith('"', end + 3):
            end += 1
        found = self.text[self.at + 3 : end]
        self.move(end + 3)
        return found.removeprefix("~\n").removesuffix("~")

    def include(self, name: str, into: Node, required: bool) -> None:
        path = self.path.parent / name
        if self.depth > MAX_DEPTH:
            raise self.error("included too deeply")
        if required or path.exists():
            inner = _Parser(path, into, self.depth + 1)
            inner.file()

    # where we are -----------------------------------------------------------------------------------------------------

    def place(self) -> Place:
        return Place(str(self.path), self.line)

    def error(self, text: str) -> SourceError:
        return SourceError(self.place(), text)

    def peek(self, mark: str) -> bool:
        return self.text.startswith(mark, self.at)

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def skip(self, gap: re.Pattern[str]) -> None:
        while match := gap.match(self.text, self.at):
            self.move(match.end())


class _Bare(str):
    """A value without quotes: what it looks like is what it is."""

    __slots__ = ()


def _scalar(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    if text == "null":
        return None
    if (match := _NUMBER.fullmatch(text)) and len(text) < MAX_DIGITS:
        return float(text) if match[1] else int(text)
    return text


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1][1:], 16)) if len(match[1]) > 1 else _ESCAPES.get(match[1], match[1])


def _resolve(root: Node, node: Node) -> None:
    """Put the value of another key, written before or after, in the place of each reference to it."""
    for one in (*node.children.values(), *node.items):
        _resolve(root, one)
    if isinstance(node.value, _Reference):
        reference, seen = node.value, 0
        target = root.at(reference.path)
        while target is not None and isinstance(target.value, _Reference) and seen < MAX_DEPTH:
            target, seen = root.at(target.value.path), seen + 1
        known = target is not None and not isinstance(target.value, _Reference)
        if not known and not reference.optional:
            raise SourceError(node.place, f"{node.key}: there is no {reference.path} to refer to")
        if known and target is not None:
            node.value, node.children, node.items = target.value, target.children, target.items
        else:
            node.value = None
