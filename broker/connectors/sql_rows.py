"""Rows of records. A batch of well-formed records is made column by column, which costs a third of making each row; any
other row by row, which finds out who is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import orjson

from broker.config.template import Placeholder, Template
from broker.connectors import sql_values as to
from broker.connectors.json_text import compile_value
from broker.extend.record import Render
from broker.extend.sink import UNREAD, Record

Row = tuple[Any, ...]

_PLAIN = frozenset({"msgid", "clientid", "username", "topic", "peerhost", "node"})
"""Texts that MQTT itself keeps free of U+0000: as they are, they are text for every column."""
_ATTRIBUTES = _PLAIN | {"ts", "qos", "payload"}
_TIMES = frozenset({to.moment, to.local_moment, to.moment_text, to.day, to.day_text})
_TEXTS: set[type] = {str}
_UNFIT = (LookupError, ValueError, TypeError, OverflowError)


class Cell:
    """One column: how its value comes out of a record. `get` raises LookupError, ValueError, TypeError or
    OverflowError."""

    __slots__ = ("_attribute", "_convert", "_fits", "_is_time", "_literal", "_required", "get", "name", "path")

    def __init__(self, name: str, template: Template, convert: to.Convert, required: bool) -> None:
        self.name = name
        self.path: tuple[str, ...] = ()
        """Keys to the template's value, where that is a value in the payload."""
        self._attribute: Callable[[Record], Any] | None = None
        self._literal = template.literal is not None
        self._convert = convert
        self._fits: Callable[[set[type], list[Any]], bool] | None = getattr(convert, "fits", None)
        """Tells whether values are what they would be converted to."""
        self._required = required
        only = template.segments[0] if len(template.segments) == 1 else None
        root = only.root if isinstance(only, Placeholder) else ""
        self._is_time = root == "ts"
        if isinstance(only, Placeholder):
            if root == "payload" and all(isinstance(step, str) for step in only.path):
                self.path = tuple(map(str, only.path))
            if not only.path and root in _ATTRIBUTES:
                self._attribute = attrgetter(root)
        render = compile_value(template)
        self.get: Render
        if required:
            self.get = _required(render, convert, template)
        elif convert in (to.text, to.text_without_nul) and root in _PLAIN:
            self.get = render
        else:
            self.get = lambda record: convert(render(record))

    @property
    def whole(self) -> bool:
        """Whether `column` knows how."""
        return self._attribute is not None or bool(self.path) or self._literal

    def column(self, records: Sequence[Record], objects: list[Any]) -> list[Any]:
        """What `get` makes of each; `objects` are the payloads read as JSON. Raises what `get` does, and also where it
        does not: for a record that is not like the others."""
        if self._literal:
            return [self.get(records[0])] * len(records)
        if self._attribute is not None:
            values = list(map(self._attribute, records))
            if self._is_time and 0 in values:
                raise ValueError("no time")
        else:
            values = objects
            for key in self.path:
                values = [found.get(key) for found in values]
        convert = self._convert
        kinds = set(map(type, values))
        if self._required and type(None) in kinds:
            raise ValueError("null")
        if convert is to.text or convert is to.text_without_nul:
            if kinds == _TEXTS and (convert is to.text or "\0" not in "".join(values)):
                return values
        elif self._fits is not None:
            if self._fits(kinds, values):
                return values
        elif convert in _TIMES and len(kinds) == 1:
            made = {value: convert(value) for value in set(values)}  # many come in the same millisecond
            return [made[value] for value in values]
        return [convert(value) for value in values]


def _required(render: Render, convert: to.Convert, template: Template) -> Render:
    def get(record: Record) -> Any:
        value = render(record)
        if value is None:
            raise ValueError(f"must not be null, and {template.text} has no value")
        return convert(value)

    return get


def rows(cells: Sequence[Cell], records: Sequence[Record]) -> tuple[list[int], list[Row], dict[int, str]]:
    """Positions of records, the row of each, and position -> why there is none."""
    if len(records) > 1 and all(cell.whole for cell in cells):
        try:
            objects = []
            if any(cell.path for cell in cells):
                objects = [orjson.loads(r.payload) if r.json is UNREAD else r.json for r in records]
            columns = [cell.column(records, objects) for cell in cells]
        except (*_UNFIT, AttributeError, RecursionError):
            pass
        else:
            return list(range(len(records))), list(zip(*columns, strict=True)), {}
    return _row_by_row(cells, records)


def _row_by_row(cells: Sequence[Cell], records: Sequence[Record]) -> tuple[list[int], list[Row], dict[int, str]]:
    gets = [cell.get for cell in cells]
    positions: list[int] = []
    made: list[Row] = []
    failed: dict[int, str] = {}
    for position, record in enumerate(records):
        try:
            made.append(tuple([get(record) for get in gets]))
            positions.append(position)
        except _UNFIT:
            failed[position] = _blame(cells, record)
    return positions, made, failed


def _blame(cells: Sequence[Cell], record: Record) -> str:
    for cell in cells:
        try:
            cell.get(record)
        except _UNFIT as error:
            return f"column {cell.name}: {error}"
    return "cannot be rendered"
