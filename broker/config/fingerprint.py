"""Tells whether a table, or a file it reads at opening, is another one than before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_READ = {"ca", "certificate", "key", "client_ca", "client_crl"}
"""Fields of sinks and bridges that name files read at opening; the other paths there are written to."""


def of(room: str, values: Mapping[str, Any], config: BaseModel) -> str:
    """A digest; secrets cannot be read back from it in practice, but it is still shown to nobody."""
    files = [_state(path) for name, path in _paths(config) if room in ("auth", "listeners") or name in _READ]
    text = json.dumps([values, files], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _paths(value: Any, name: str = "") -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _paths(getattr(value, field), field)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _paths(inner, name)


def _state(path: Path) -> list[Any]:
    """Size, time and identity of a regular file: what changes when somebody edits or replaces it."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return [str(path)]
    if not path.is_file():
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]
