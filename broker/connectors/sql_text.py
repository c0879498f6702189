"""SQL with placeholders of clients, compiled to statements with bound parameters. Knows no driver.

A placeholder is a value and nothing else: ``${username}`` or EMQ's ``%u``, by itself or alone in quotes (``'%u'``).
Inside a longer text, a name or a comment it would be pasted, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from broker.config.template import MissingValue

Dialect = Literal["postgresql", "mysql", "sqlite"]

_PERCENT = {"u": "username", "c": "clientid", "a": "peerhost", "C": "cert_common_name", "d": "cert_subject"}
_PLACEHOLDER = r"\$\{[^{}]*\}|%[ucaCdP](?![A-Za-z0-9_])"
_WRITES = frozenset({
    "insert", "update", "delete", "replace", "merge", "create", "drop", "alter", "truncate", "grant", "revoke", "copy",
    "load", "attach", "pragma", "set",
})  # fmt: skip
_BEFORE_A_NAME = frozenset({"from", "join", "into", "update", "table"})


def _pattern(
    own: str, *, string: str = r"'(?:[^']|'')*'", comment: str = "(?!)", dollar: str = "(?!)"
) -> re.Pattern[str]:
    return re.compile(
        rf"""(?P<comment>--[^\n]*|/\*.*?\*/|{comment})|(?P<dollar>{dollar})|(?P<string>{string})"""
        rf"""|(?P<name>"(?:[^"]|"")*"|`(?:[^`]|``)*`)|(?P<placeholder>{_PLACEHOLDER})|(?P<own>{own})"""
        r"""|(?P<word>[A-Za-z_\x80-\U0010ffff](?:\w|\$(?!\{))*|[0-9][\w.]*)|(?P<space>\s+)|(?P<other>.)""",
        re.DOTALL,
    )


_PATTERNS: dict[Dialect, re.Pattern[str]] = {
    "postgresql": _pattern(
        r"\$[0-9]+",
        string=r"[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'",
        dollar=r"\$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$",
    ),
    "mysql": _pattern(r"\?", string=r"'(?:[^'\\]|\\.|'')*'", comment=r"\#[^\n]*"),
    "sqlite": _pattern(r"\?[0-9]*|[:@$][A-Za-z_]\w*"),
}


class Refused(Exception):
    """The database cannot take one of the values: no row can hold it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """An answer. Column names are in lower case."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


class Statement:
    """One compiled statement. ValueError, with what to write instead, when it cannot be one."""

    __slots__ = ("names", "sql", "text")

    def __init__(self, text: str, dialect: Dialect, known: Sequence[str], *, writes: bool = False) -> None:
        self.text = text
        """As it was written."""
        names: list[str] = []
        parts: list[str] = []
        words: list[str] = []
        before = ""
        stripped = text.strip().rstrip(";").rstrip()
        for match in _PATTERNS[dialect].finditer(stripped):
            kind, token = match.lastgroup or "", match[0]
            quoted = kind == "string" and re.fullmatch(f"'({_PLACEHOLDER})'", token)
            if kind == "placeholder" or quoted:
                name = _name(token.strip("'"), known)
                after = stripped[match.end() : match.end() + 1]
                if (before and (before[-1].isalnum() or before[-1] in "_.$'\"`}")) or _touches(after):
                    raise ValueError(
                        f"{token} touches what stands beside it; a placeholder is one whole value, join texts in SQL: "
                        f"concat('a', {token})"
                    )
                if words and words[-1] in _BEFORE_A_NAME:
                    raise ValueError(f"{token} stands where a table belongs; a placeholder is a value, write the name")
                names.append(name)
                parts.append(f"${len(names)}" if dialect == "postgresql" else "?")
                before = "}"
                continue
            if kind in ("string", "name", "dollar", "comment") and re.search(_PLACEHOLDER, token):
                raise ValueError(
                    f"{token[:60]} holds a placeholder inside other text, where it cannot be bound; write it outside "
                    "the quotes and join texts in SQL: concat('a', ${username})"
                )
            if kind == "own":
                raise ValueError(f"{token} is the driver's own placeholder; write ${{username}}, ${{clientid}} …")
            if kind == "other" and token == ";":
                raise ValueError("one statement is wanted, this is more than one")
            if kind == "other" and token in "'\"`":
                raise ValueError(f"a quote {token} is opened and never closed")
            if kind == "word":
                words.append(token.lower())
            before = "" if kind in ("space", "comment") else token
            parts.append(" " if kind == "comment" else token)
        if not words:
            raise ValueError("there is no statement")
        if not writes and words[0] in _WRITES:
            raise ValueError(f"it begins with {words[0]}; a statement that reads is wanted")
        self.names = tuple(names)
        self.sql = "".join(parts)
        """As the driver wants it: ``$1`` for PostgreSQL, ``?`` for the others, one number for each place."""

    def bind(self, find: Callable[[str], str | None], *, missing: bool = False) -> list[str | None]:
        """The values in order. A name without a value is NULL if that may be `missing`, else raises MissingValue."""
        values = [find(name) for name in self.names]
        if not missing and None in values:
            raise MissingValue(self.names[values.index(None)])
        return values

    def __repr__(self) -> str:
        return f"Statement({self.text!r})"


def _name(token: str, known: Sequence[str]) -> str:
    name = _PERCENT.get(token[1:], token) if token.startswith("%") else token[2:-1]
    if name in ("password", "%P"):
        raise ValueError("the password is compared here (see password_hash) and never sent to the database")
    if name not in known:
        raise ValueError(f"{token} is not known here; there are {', '.join(f'${{{one}}}' for one in known)}")
    return name


def _touches(after: str) -> bool:
    return after.isalnum() or after in ("_", "$", "'", '"', "`", "%")
