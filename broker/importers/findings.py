"""What an import finds: tables of our own vocabulary, each value with the setting it came from, and what is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.config.problems import line
from broker.importers.source import Node, Place, SourceError

ROOMS = ("listeners", "auth", "sinks", "bridges")
MAX_INSTANCES = 1_000
"""Listeners, backends, sinks and bridges together; more is certainly not a configuration."""
UNKNOWN = "is not known here"
_PROBLEM = re.compile(r"(?:\S+: )?(?P<key>[a-z]+\.[A-Za-z0-9_.-]+)\S*: (?P<text>.*)")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


_LOGIN = re.compile(r"[^\s'\"/\[]*:[^\s'\"]*@")


class Secret(str):
    """A value nobody else may read: its fragment is written for its owner alone."""

    __slots__ = ()


def secrets(value: Any) -> Iterator[str]:
    """What nobody else may read in a value: secrets, and addresses with a password before the host's name."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from secrets(one)
    elif isinstance(value, Secret):
        yield from [str(value)] if value else []
    elif isinstance(value, str):
        yield from (match[0] for match in _LOGIN.finditer(value.partition("://")[2] or value))


@dataclass(slots=True)
class Table:
    """One table of a fragment."""

    path: tuple[str, ...]
    origin: Node
    """The setting to name when the whole table cannot be used."""
    values: dict[str, Any] = field(default_factory=dict)
    """A list of dicts becomes an array of tables."""
    remarks: dict[str, str] = field(default_factory=dict)
    """What is said behind a value."""
    notes: list[str] = field(default_factory=list)
    """What is said above the table."""
    origins: dict[str, Node] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path[1]

    def set(self, key: str, value: Any, origin: Node | None = None, remark: str = "") -> None:
        """Set a value; `remark` is told behind it, `origin` is named when it turns out to be impossible."""
        self.values[key] = value
        if origin is not None:
            origin.used = True
            self.origins[key] = origin
        if remark:
            self.remarks[key] = remark


class Findings:
    """Filled by an importer; what is wrong with the result is put right by `give_up`."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.tables: list[Table] = []
        self.lost: list[tuple[Place, str, str]] = []
        self.rights: set[str] = set()
        """Names of the `[auth.*]` tables that hold rights: without them less would be denied."""
        self._by_path: dict[tuple[str, ...], Table] = {}
        self._start = Node(source.name, Place(str(source), 1))

    @property
    def folder(self) -> Path:
        """Where relative paths of the source start."""
        return self.source.absolute().parent

    def table(self, *path: str, origin: Node | None = None) -> Table:
        """The table of this path, made when it is not there."""
        if path not in self._by_path:
            self._by_path[path] = Table(path, origin or self._start)
            self.tables.append(self._by_path[path])
        return self._by_path[path]

    def drop(self, table: Table) -> None:
        """Do without a table after all."""
        self.tables.remove(table)
        del self._by_path[table.path]

    def instance(self, room: str, name: str, kind: str, origin: Node) -> Table:
        """A new `[room.NAME]`, under another name when this one is taken. SourceError when there are too many."""
        if sum(len(one.path) == 2 for one in self.tables) >= MAX_INSTANCES:
            raise SourceError(origin.place, f"more than {MAX_INSTANCES} listeners, backends, sinks and bridges")
        name = _UNSAFE.sub("-", name).strip("-_")[:48] or kind
        taken = {table.name for table in self.room(room)}
        if room in ("sinks", "bridges"):  # their queues must not be one
            taken |= {table.name for other in ("sinks", "bridges") for table in self.room(other)}
        chosen = next(one for one in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if one not in taken)
        table = self.table(room, chosen, origin=origin)
        if chosen != kind:
            table.set("kind", kind)
        return table

    def room(self, room: str) -> list[Table]:
        """The instances of a room."""
        return [table for table in self.tables if len(table.path) == 2 and table.path[0] == room]

    def has(self, *path: str) -> bool:
        """Whether there is a table of this path."""
        return path in self._by_path

    def close_default(self) -> None:
        """Where no listener is made, say so: without any table of them one would be opened."""
        if not self.room("listeners"):
            table = self.table("listeners", "tcp")
            table.notes.append(
                "The source opens no listener that there is here; without this table there would be one."
            )
            table.set("bind", "127.0.0.1:1883")
            table.set("enabled", False)

    def lose(self, what: Node, reason: str, key: str = "") -> None:
        """Say that a setting has no equivalent."""
        what.used = True
        self.lost.append((what.place, key or what.key, reason))

    def lose_rest(self, root: Node, reasons: Mapping[str, str]) -> None:
        """Say so of all that nobody used; `reasons` by the longest part of its name that is there."""
        for leaf in root.leaves():
            if not leaf.used:
                parts = leaf.key.split(".")
                names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
                self.lose(leaf, next((reasons[name] for name in names if name in reasons), UNKNOWN))

    def hold(self, table: Table, what: Node, reason: str) -> None:
        """Say so of a setting without which the whole table would do something else: it is written turned off."""
        table.set("enabled", False, remark=reason)
        self.lose(what, f"{reason}; {'.'.join(table.path[:2])} is written with enabled = false")
        if table.path[0] == "auth":
            self._leave_out(table)

    def lines(self) -> Iterator[str]:
        """One line for each that is lost, in the order of the source."""
        files = list(dict.fromkeys(place.file for place, _, _ in self.lost))
        order = sorted(self.lost, key=lambda one: (files.index(one[0].file), one[0].line))
        for place, key, reason in dict.fromkeys(order):
            yield line(f"not carried over: {place}", key, reason)

    def give_up(self, problem: str) -> bool:
        """Take back what `check` says is wrong: a value of a section, or a whole instance, which is turned off. Whether
        there was anything to take back."""
        match = _PROBLEM.match(problem)
        if match is None:
            return False
        parts, text = match["key"].split("."), match["text"]
        if parts[0] in ROOMS:
            for table in self.room(parts[0]):
                if table.name == parts[1] and table.values.get("enabled") is not False:
                    key = parts[2] if len(parts) > 2 else ""
                    for secret in secrets(table.values):
                        text = text.replace(secret, "…")
                    self.hold(table, table.origins.get(key, table.origin), f"{key}: {text}" if key else text)
                    return True
            return False
        for table in self.tables:
            key = parts[-1]
            if table.path == tuple(parts[:-1]) and key in table.values:
                del table.values[key]
                self.lose(table.origins.get(key, table.origin), text)
                return True
        return False

    def _leave_out(self, gone: Table) -> None:
        """What names an [auth.*] that is turned off must not."""
        for table in self.tables:
            for key in ("auth", "order"):
                names = table.values.get(key)
                if isinstance(names, list) and gone.name in names:
                    table.values[key] = [name for name in names if name != gone.name]
        if gone.name in self.rights:
            self.deny_the_rest(gone.origin)

    def deny_the_rest(self, what: Node) -> None:
        """Rights are lost that may have denied something: what no rule allows is denied then."""
        access = self.table("access")
        if access.values.get("no_match") == "allow":
            origin = access.origins.get("no_match", what)
            access.set("no_match", "deny", remark="was allow, but rules that may have denied something are lost")
            self.lose(origin, "what no rule covers was allowed; rules are lost, so access.no_match is deny", "no_match")
