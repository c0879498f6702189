"""Writes values the way a fragment would, with secrets hidden."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from broker.config.problems import Key, spell
from broker.config.types import MASK, Secret, format_duration, format_size, parse_duration, parse_size

_URL_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):([^/\s]*)@")


class Item(NamedTuple):
    """One value in force."""

    key: str
    value: str
    """As TOML."""
    origin: str


def items(
    models: Sequence[tuple[Key, BaseModel]], origins: Mapping[str, str], tainted: frozenset[Key] = frozenset()
) -> list[Item]:
    """The values of all models, sorted by key; a value is hidden when it or its elements came from a secret."""
    found = []
    for above, model in models:
        for key, value in flatten(model, above):
            hidden = any(taint[: len(key)] == key or key[: len(taint)] == taint for taint in tainted)
            name = spell(key)
            found.append(Item(name, json.dumps(MASK) if hidden else value, origins.get(name, "default")))
    return sorted(found)


def flatten(model: BaseModel, above: Key = ()) -> Iterator[tuple[Key, str]]:
    """Every key of a model that has a value, with the value as TOML."""
    for name, field in type(model).model_fields.items():
        yield from _flatten(getattr(model, name), (*above, name), unit(field))


def _flatten(value: Any, key: Key, unit: str) -> Iterator[tuple[Key, str]]:
    if isinstance(value, BaseModel):
        yield from flatten(value, key)
    elif isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _flatten(inner, (*key, str(part)), unit)
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, BaseModel) for inner in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, (*key, index), unit)
    elif value is not None:
        yield key, to_toml(value, unit)


def to_toml(value: Any, unit: str = "") -> str:
    """One value as TOML; `unit` is ``duration``, ``size`` or empty."""
    if isinstance(value, Secret):
        return json.dumps(MASK)
    if isinstance(value, bool):
        return "true" if value else "false"
    if unit and isinstance(value, (int, float)):
        return json.dumps(format_duration(value) if unit == "duration" else format_size(int(value)))
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return "[" + ", ".join(to_toml(inner, unit) for inner in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{spell((str(k),))} = {to_toml(v, unit)}" for k, v in value.items()) + " }"
    text = value.value if hasattr(value, "value") and not isinstance(value, Path) else value
    return json.dumps(_URL_PASSWORD.sub(rf"\1:{MASK}@", str(text)), ensure_ascii=False)


def unit(field: FieldInfo) -> str:
    """Whether a field is a duration or a size."""
    found = [*field.metadata, *_nested(field.annotation)]
    functions = [entry.func for entry in found if isinstance(entry, BeforeValidator)]
    return "duration" if parse_duration in functions else "size" if parse_size in functions else ""


def _nested(annotation: Any) -> list[Any]:
    return [
        entry
        for argument in get_args(annotation)
        for entry in (*getattr(argument, "__metadata__", ()), *_nested(argument))
    ]
