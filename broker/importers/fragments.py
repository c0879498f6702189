"""Writes findings as fragments: readable, commented, never over a file that is there, secrets for their owner alone."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.config.problems import ConfigError
from broker.importers.findings import Findings, Table, secrets

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_REFERENCE = re.compile(r"\$\{(?=env:|file:)")
_WIDTH = 116
_COLUMN = 31
_ARRAYS = ("topics", "rules")
"""Keys whose tables are written one below the other."""
_LOCAL = ("file", "static", "sqlite")


class Taken(Exception):
    """A fragment of this name is there already; nothing was written."""

    def __init__(self, path: object) -> None:
        super().__init__(f"{path}: is there already; nothing was written")


@dataclass(slots=True)
class Fragment:
    """The text of one fragment."""

    text: str = ""
    secret: bool = False
    """Whether it holds a value that others may not read."""
    tables: list[Table] = field(default_factory=list)


def settle(found: Findings, judge: Callable[[Mapping[str, Fragment]], list[str]]) -> dict[str, Fragment]:
    """The fragments that `judge` (the verdict of `check`: its problems) has nothing against. What it does object to is
    taken back and told as lost; ConfigError when that is not a matter of these fragments."""
    for _ in range(2 * len(found.tables) + 20):
        fragments = render(found)
        problems = judge(fragments)
        if not problems:
            return fragments
        if not any([found.give_up(problem) for problem in problems]):
            break
    raise ConfigError(problems)


def render(found: Findings) -> dict[str, Fragment]:
    """The text of every fragment, by file name."""
    fragments: dict[str, Fragment] = {}
    for table in found.tables:
        if table.values:
            fragments.setdefault(_file_of(table, found), Fragment()).tables.append(table)
    for fragment in fragments.values():
        head = f"# Imported from {found.source}. Read it before you trust it: the comments say what differs."
        fragment.secret = any(any(secrets(table.values)) for table in fragment.tables)
        if fragment.secret:
            head += "\n# It holds secrets: only its owner may read it."
        fragment.text = "\n\n".join([head, *map(_table, fragment.tables)]) + "\n"
    return dict(sorted(fragments.items()))


def land(fragments: Mapping[str, Fragment], folder: Path) -> list[Path]:
    """Write all of them or none. Raises Taken when one is there already, OSError."""
    for name in fragments:
        if os.path.lexists(folder / name):
            raise Taken(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        for name, fragment in fragments.items():
            path = folder / name
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600 if fragment.secret else 0o644)
            written.append(path)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(fragment.text)
                file.flush()
                os.fsync(descriptor)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise Taken(error.filename) from None
        raise
    return written


def _file_of(table: Table, found: Findings) -> str:
    room = table.path[0]
    if room == "listeners":
        return "05-listeners.toml"
    if room == "auth":
        owner = next(one for one in found.room("auth") if one.name == table.name)
        if owner.values.get("kind", owner.name) in _LOCAL:
            return "10-accounts.toml"
        return f"20-auth-{table.name}.toml"
    if room in ("sinks", "bridges"):
        return f"{30 if room == 'sinks' else 40}-{room[:-1]}-{table.name}.toml"
    return "00-broker.toml"


def _table(table: Table) -> str:
    path = ".".join(map(_key, table.path))
    lines = [f"# {row}" for note in table.notes for row in textwrap.wrap(note, _WIDTH)]
    lines.append(f"[{path}]")
    arrays = []
    for key, value in table.values.items():
        if key in _ARRAYS and isinstance(value, list) and value and isinstance(value[0], dict):
            arrays += [_array(f"{path}.{key}", one) for one in value]
            continue
        row = f"{_key(key)} = {_value(value)}"
        remark = table.remarks.get(key, "")
        if remark and max(len(row), _COLUMN) + len(remark) + 3 > _WIDTH:
            lines += [f"# {part}" for part in textwrap.wrap(f"{key}: {remark}", _WIDTH)]
            remark = ""
        lines.append(f"{row:<{_COLUMN}} # {remark}" if remark else row)
    return "\n\n".join(["\n".join(lines), *arrays])


def _array(path: str, values: Mapping[str, Any]) -> str:
    return "\n".join([f"[[{path}]]", *(f"{_key(key)} = {_value(value)}" for key, value in values.items())])


def _key(text: str) -> str:
    return text if _BARE.fullmatch(text) else _text(text)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:_}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, float):
        return repr(value)
    return _text(_REFERENCE.sub("$${", str(value)))


def _text(text: str) -> str:
    """A TOML string; JSON's escapes are TOML's, but for the character DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
