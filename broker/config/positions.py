"""Finds the line of every key in a TOML text, which `tomllib` does not tell. Values are not its business."""

from __future__ import annotations

import re
import tomllib

import tree_sitter
import tree_sitter_toml

from broker.config.problems import Key

MAX_DEPTH = 32
"""Nesting of arrays and inline tables, and parts of a dotted key."""

_LANGUAGE = tree_sitter.Language(tree_sitter_toml.language())
_SIMPLE = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_TOKEN = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[\[\]{}\n]""",
    re.DOTALL,
)


class TooDeep(ValueError):
    """The nesting is deeper than any configuration needs."""

    def __init__(self, number: int) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} levels deep")
        self.line = number


def check_depth(text: str) -> None:
    """Raise TooDeep before a parser meets what was written to exhaust it. Linear in the length of the text."""
    depth, number = 0, 1
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise TooDeep(number)
        elif token in "]}":
            depth = max(0, depth - 1)
        else:
            number += token.count("\n")
    for number, row in enumerate(text.split("\n"), 1):
        if row.count(".") > MAX_DEPTH and _parts(row) > MAX_DEPTH:
            raise TooDeep(number)


def _parts(row: str) -> int:
    """Most dots in what may be a key of this line."""
    bare = re.sub(r"\"(?:\\.|[^\"\\])*\"|'[^']*'|#.*", "", row)
    return max((piece.count(".") for piece in re.split(r"[=,{}\]]", bare)), default=0)


def find(text: str) -> dict[Key, int]:
    """The line (from 1) of every table, key and array element, by its path."""
    tree = tree_sitter.Parser(_LANGUAGE).parse(text.encode())
    lines: dict[Key, int] = {}
    arrays: dict[Key, int] = {}
    for node in tree.root_node.children:
        if node.type == "pair":
            _pair(node, (), lines)
        elif node.type in ("table", "table_array_element"):
            _table(node, lines, arrays)
    return lines


def _table(node: tree_sitter.Node, lines: dict[Key, int], arrays: dict[Key, int]) -> None:
    parts = next((_key(child) for child in node.children if child.type.endswith("key")), None)
    if not parts:
        return
    path: Key = ()
    for position, part in enumerate(parts):
        path = (*path, part)
        last = position == len(parts) - 1
        lines.setdefault(path, node.start_point.row + 1)
        if last and node.type == "table_array_element":
            arrays[path] = arrays.get(path, -1) + 1
        if path in arrays:
            path = (*path, arrays[path])
            lines.setdefault(path, node.start_point.row + 1)
    for child in node.children:
        if child.type == "pair":
            _pair(child, path, lines)


def _pair(node: tree_sitter.Node, above: Key, lines: dict[Key, int]) -> None:
    todo = [(node, above)]
    while todo:
        node, path = todo.pop()
        named = node.named_children
        number = node.start_point.row + 1
        if node.type == "pair" and len(named) >= 2:
            for part in _key(named[0]):
                path = (*path, part)
                lines.setdefault(path, number)
            node = named[-1] if named[-1].type != "comment" else named[1]
        if node.type == "inline_table":
            todo += [(child, path) for child in node.named_children if child.type == "pair"]
        elif node.type == "array":
            elements = [child for child in node.named_children if child.type != "comment"]
            for index, child in enumerate(elements):
                lines.setdefault((*path, index), child.start_point.row + 1)
                todo.append((child, (*path, index)))


def _key(node: tree_sitter.Node) -> list[str]:
    """The parts of a bare, quoted or dotted key; empty when it is none."""
    text = (node.text or b"").decode()
    if _SIMPLE.fullmatch(text):
        return text.split(".")
    try:
        table = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return []
    parts: list[str] = []
    here: object = table
    while isinstance(here, dict):
        ((part, here),) = here.items()
        parts.append(part)
    return parts
