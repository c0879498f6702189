"""Reads the fragments of a `conf.d` folder and merges them; every value remembers where it was written."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.config import positions
from broker.config.problems import Key, line, spell

MAX_BYTES = 1 << 20
"""Bytes of one fragment; more is certainly not a configuration."""

PREFIX = "ISTHMUS__"

_IGNORED = re.compile(r"\..*|.*(~|\.bak|\.orig|\.sw[a-p]|\.dpkg-[a-z]+|\.rpm[a-z]+|\.example|\.off|\.md|\.txt)|README")
_TOML_PLACE = re.compile(r" ?\(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(slots=True)
class Tree:
    """The merged values, where each was written, and what was found wrong on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    guessed: dict[Key, str] = field(default_factory=dict)
    """Values from the environment and the command line as they were typed: they carry no type of their own."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def origin(self, key: Key) -> str:
        """``FILE:LINE``, ``env NAME`` or ``--set`` of the key, or of the nearest table above it; empty when unknown."""
        for length in range(len(key), 0, -1):
            if place := self.origins.get(key[:length]):
                return place
        return ""

    def problem(self, key: Key, text: str) -> None:
        """Remember that the value at `key` is wrong."""
        self.problems.append(line(self.origin(key), spell(key), text))

    def warning(self, key: Key, text: str) -> None:
        """Remember that the value at `key` is probably not what was meant."""
        self.warnings.append(line(self.origin(key), spell(key), text))


def read(folder: Path, sets: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Tree:
    """Merge the fragments in byte order of their names, then the environment, then ``--set``.

    Not recursive. Every problem is collected in the result: one bad file never hides the others.
    """
    tree = Tree()
    for path in _fragments(folder, tree):
        _read_fragment(tree, path, f"{folder.name}/{path.name}")
    for name in sorted(environ):
        if name.startswith(PREFIX):
            parts = name.removeprefix(PREFIX).split("__")
            override(tree, _match_case(tree.values, parts), environ[name], f"env {name}")
    for text in sets:
        _read_set(tree, text)
    return tree


def _fragments(folder: Path, tree: Tree) -> list[Path]:
    try:
        names = sorted(os.listdir(os.fsencode(folder)))
    except OSError as error:
        tree.problems.append(line(str(folder), "", f"the folder of fragments cannot be read: {error.strerror}"))
        return []
    found = []
    for name in (os.fsdecode(name) for name in names):
        if name.endswith(".toml") and not name.startswith("."):
            found.append(folder / name)
        elif not _IGNORED.fullmatch(name):
            tree.warnings.append(line(f"{folder.name}/{name}", "", "ignored: a fragment's name ends in .toml"))
    return found


def _read_fragment(tree: Tree, path: Path, name: str) -> None:
    try:
        text = _text(path)
    except OSError as error:
        tree.problems.append(line(name, "", f"cannot be read: {error.strerror or error}"))
        return
    except ValueError as error:
        tree.problems.append(line(name, "", str(error)))
        return
    try:
        positions.check_depth(text)
        values = tomllib.loads(text)
        lines = positions.find(text)
    except positions.TooDeep as error:
        tree.problems.append(line(f"{name}:{error.line}", "", str(error)))
    except tomllib.TOMLDecodeError as error:
        match = _TOML_PLACE.search(str(error))
        number = int(match[1]) if match and match[1] else text.count("\n") + 1
        reason = _TOML_PLACE.sub("", str(error))
        tree.problems.append(line(f"{name}:{number}", "", f"not valid TOML: {reason[:1].lower()}{reason[1:]}"))
    except (RecursionError, ValueError) as error:
        tree.problems.append(line(name, "", f"not valid TOML: {error}"))
    else:
        _merge(tree, tree.values, values, (), {key: f"{name}:{number}" for key, number in lines.items()}, name)


def _text(path: Path) -> str:
    """The file's text; OSError or ValueError say why there is none. Never blocks on a pipe or device."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder; a fragment is a file (folders inside are not read)")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"has {status.st_size} bytes; a fragment has at most {MAX_BYTES}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES} bytes")
    if b"\0" in data:
        raise ValueError(f"line {data[: data.index(0)].count(10) + 1} holds a NUL byte: this is not text")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {data[: error.start].count(10) + 1} is not UTF-8") from None


def _merge(
    tree: Tree, into: dict[str, Any], values: Mapping[str, Any], above: Key, places: Mapping[Key, str], name: str
) -> None:
    for part, value in values.items():
        key = (*above, part)
        place = places.get(key) or tree.origin(key) or name
        old = into.get(part)
        if isinstance(value, dict) and (isinstance(old, dict) or part not in into):
            tree.origins.setdefault(key, place)
            _merge(tree, into.setdefault(part, {}), value, key, places, name)
            continue
        if part in into:
            before = tree.origins.get(key, "")
            if isinstance(value, dict) != isinstance(old, dict):
                wants = "a table here, a value" if isinstance(value, dict) else "a value here, a table"
                tree.problems.append(line(place, spell(key), f"{wants} at {before}"))
                continue
            tree.warnings.append(line(place, spell(key), f"also set at {before}; this one wins"))
            _forget(tree, key)
        into[part] = value
        tree.origins[key] = place
        for inner in _inside(value, key):
            if where := places.get(inner):
                tree.origins[inner] = where


def _inside(value: Any, key: Key) -> Iterator[Key]:
    """The keys of everything in an array, at any depth."""
    pairs = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for part, inner in pairs:
        yield (*key, part)
        yield from _inside(inner, (*key, part))


def _forget(tree: Tree, key: Key) -> None:
    for known in [k for k in tree.origins if k[: len(key)] == key]:
        del tree.origins[known]


def _match_case(values: Mapping[str, Any], parts: list[str]) -> Key:
    """Environment names are upper case: find the key that differs only in case, else take the lower-case one."""
    key: list[str] = []
    here: Any = values
    for part in parts:
        known = list(here) if isinstance(here, dict) else []
        same = [k for k in known if k.lower() == part.lower() or k.lower() == part.lower().replace("_", "-")]
        key.append(part if part in known else same[0] if same else part.lower())
        here = here.get(key[-1]) if isinstance(here, dict) else None
    return tuple(key)


def _read_set(tree: Tree, text: str) -> None:
    name, equals, value = text.partition("=")
    try:
        table = tomllib.loads(f"{name} = 0") if equals and "\n" not in name else None
    except tomllib.TOMLDecodeError:
        table = None
    key: list[str] = []
    here: Any = table
    while isinstance(here, dict):
        ((part, here),) = here.items()
        key.append(part)
    if len(key) < 2:
        tree.problems.append(line("--set", name.strip(), "write --set section.key=value"))
        return
    override(tree, tuple(key), value.strip(), "--set")


def override(tree: Tree, key: Key, text: str, place: str) -> None:
    """Set one value from outside the fragments; it wins over what they say."""
    if not all(key) or len(key) < 2 or len(key) > positions.MAX_DEPTH:
        tree.problems.append(line(place, spell(key), f"write {PREFIX}SECTION__KEY"))
        return
    here = tree.values
    for depth, part in enumerate(key[:-1], 1):
        inner = here.setdefault(str(part), {})
        if not isinstance(inner, dict):
            tree.problems.append(line(place, spell(key), f"{spell(key[:depth])} is a value at {tree.origin(key)}"))
            return
        tree.origins.setdefault(key[:depth], place)
        here = inner
    _forget(tree, key)
    here[str(key[-1])] = _guess(text)
    tree.origins[key] = place
    tree.guessed[key] = text


def _guess(text: str) -> Any:
    """A value as TOML would read it, else the text itself."""
    if len(text) > MAX_BYTES:
        return text
    try:
        positions.check_depth(text)
        return tomllib.loads(f"value = {text}\n")["value"] if "\n" not in text else text
    except (ValueError, RecursionError):
        return text
