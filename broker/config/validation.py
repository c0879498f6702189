"""Turns a table of plain values into its model, and what pydantic says about it into sentences about keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from broker.config import suggest
from broker.config.problems import Key
from broker.config.types import Secret

M = TypeVar("M", bound=BaseModel)

_WORDS = {
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "model_attributes_type": "expected a table",
    "too_short": "is empty",
    "string_too_short": "is empty",
    "missing": "is required",
    "finite_number": "expected a finite number",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong inside a table."""

    key: Key
    """Relative to the table."""
    text: str
    type: str


def validate(model: type[M], values: Mapping[str, Any], base: Path) -> M:
    """The model of a table. Strict: text is no number and 1 is no boolean. Raises pydantic's ValidationError."""
    return model.model_validate_json(json.dumps(values, default=str), strict=True, context={"base": base})


def findings(
    error: ValidationError,
    model: type[BaseModel],
    values: Mapping[str, Any],
    hidden: Iterable[Key] = (),
    elsewhere: Sequence[str] = (),
) -> list[Finding]:
    """What is wrong, key by key. Values at `hidden` keys and of secret fields never appear in a text."""
    secret = set(hidden)
    found: dict[tuple[Key, str], Finding] = {}
    for detail in error.errors(include_url=False):
        key = _key(detail["loc"], values)
        text = _text(detail, model, key, values, elsewhere)
        if any(key[:length] in secret for length in range(1, len(key) + 1)) or _is_secret(model, key):
            text = _WORDS.get(detail["type"], "the value is not valid here (it is secret and not shown)")
        found.setdefault((key, text), Finding(key, text, detail["type"]))
    return list(found.values())


def _key(location: Sequence[str | int], values: Any) -> Key:
    """Pydantic's location without the names of union members, which stand for no key."""
    key: list[str | int] = []
    here = values
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(here, dict) and isinstance(part, str) and (part in here or last):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            continue
        key.append(part)
    return tuple(key)


def _text(
    detail: ErrorDetails, model: type[BaseModel], key: Key, values: Mapping[str, Any], elsewhere: Sequence[str]
) -> str:
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden" and key:
        valid = [name for owner in suggest.models_at(model, key[:-1]) for name in owner.model_fields]
        return suggest.unknown(str(key[-1]), valid, elsewhere if len(key) == 1 else ())
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error") or detail["msg"])
    if kind == "literal_error":
        return f"expected {context['expected']}{_shown(detail['input'])}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{_range(model, key) or detail['msg'].replace('Input should', 'must')}{_shown(detail['input'])}"
    if kind in _WORDS:
        return _WORDS[kind] + ("" if kind in ("missing", "too_short", "string_too_short") else _shown(detail["input"]))
    if kind == "string_pattern_mismatch":
        return f"does not have the form {context['pattern']}{_shown(detail['input'])}"
    message = detail["msg"]
    return message[:1].lower() + message[1:] + _shown(detail["input"])


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)) or value is None:
        return ""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f", not {text}" if len(text) <= 80 else ""


def _field(model: type[BaseModel], key: Key) -> FieldInfo | None:
    if not key or not isinstance(key[-1], str):
        return _field(model, key[:-1]) if key else None
    for owner in suggest.models_at(model, key[:-1]):
        if field := owner.model_fields.get(key[-1]):
            return field
    return None


def _is_secret(model: type[BaseModel], key: Key) -> bool:
    field = _field(model, key)
    return field is not None and _mentions_secret(field.annotation)


def _mentions_secret(annotation: Any) -> bool:
    return annotation is Secret or any(_mentions_secret(argument) for argument in get_args(annotation))


def _range(model: type[BaseModel], key: Key) -> str:
    """``must be between 1 and 64`` when the field says so."""
    field = _field(model, key)
    bounds: dict[str, object] = {}
    for constraint in field.metadata if field else ():
        for name in ("ge", "gt", "le", "lt"):
            if isinstance(constraint, annotated_types.BaseMetadata) and hasattr(constraint, name):
                bounds[name] = getattr(constraint, name)
    if "ge" in bounds and "le" in bounds:
        return f"must be between {bounds['ge']} and {bounds['le']}"
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return "must be " + " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items()) if bounds else ""
