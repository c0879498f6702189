"""The JSON Schema of the whole configuration, printed from the models, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_jsonable_python

from broker.config.listeners import KINDS
from broker.config.settings import ROOMS, SECTIONS
from broker.config.types import TextValue
from broker.extend import registry


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of what fragments may hold; kinds that cannot be loaded accept any key."""
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {name: _reference(model, definitions) for name, model in SECTIONS.items()}
    properties["listeners"] = _instances({kind: _reference(model, definitions) for kind, model in KINDS.items()})
    for room in ROOMS:
        kinds: dict[str, Any] = {}
        for kind in registry.kinds(room):
            try:
                kinds[kind] = _reference(registry.load(room, kind).config, definitions)
            except (registry.MissingDriver, registry.WrongBackend):
                kinds[kind] = {"type": "object"}
        properties[room] = _instances(kinds)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Isthmus",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": definitions,
    }


class _Generator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        """Defaults as they would be written in a fragment."""
        if isinstance(dft, Mapping):
            return {key: self.encode_default(value) for key, value in dft.items()}
        return str(dft) if isinstance(dft, TextValue) else to_jsonable_python(dft, fallback=str)


def _reference(model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    found = model.model_json_schema(ref_template="#/$defs/{model}", schema_generator=_Generator)
    definitions.update(found.pop("$defs", {}))
    definitions[model.__name__] = found
    return {"$ref": f"#/$defs/{model.__name__}"}


def _instances(kinds: dict[str, Any]) -> dict[str, Any]:
    """A table of tables: the one named like a kind is of that kind, unless it has a `kind` of its own."""
    choices = [
        {
            "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
            "then": target,
        }
        for kind, target in kinds.items()
    ]
    by_name = {
        kind: {"if": {"required": ["kind"]}, "then": {"allOf": choices}, "else": target}
        for kind, target in kinds.items()
    }
    other = {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": list(kinds)}}, "allOf": choices}
    return {"type": "object", "properties": by_name, "additionalProperties": other}
