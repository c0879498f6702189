"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 1000
"""Columns when the output is no terminal: nothing is cut off."""


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Rows as a table, or with `as_json` as a list of objects with every key they have."""
    rows = list(rows)
    if as_json:
        print_json(rows)
        return
    table = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(text(row.get(column)) for column in columns))
    console().print(table)


def print_record(record: Mapping[str, Any], as_json: bool) -> None:
    """One object: its keys and values line by line, nested ones indented."""
    if as_json:
        print_json(record)
        return
    for line in _lines(record, 0):
        click.echo(line)


def console() -> Console:
    """Standard output; never folded to 80 columns when it is a pipe."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def text(value: Any) -> str:
    """A value in a cell; control characters are made visible."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False) if value else "-"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _lines(value: Mapping[str, Any], depth: int) -> Iterable[str]:
    width = max((len(str(key)) for key in value), default=0)
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield f"{'  ' * depth}{key}"
            yield from _lines(inner, depth + 1)
        elif isinstance(inner, Mapping):
            yield f"{'  ' * depth}{key:<{width}}  -"
        else:
            yield f"{'  ' * depth}{key:<{width}}  {text(inner)}"
