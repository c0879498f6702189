"""Finds a backend's code by its kind. Knows no backend by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr


class InstanceConfig(BaseModel):
    """What every `[auth.*]`, `[sinks.*]` and `[bridges.*]` table understands."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    kind: str = ""
    """Which backend this is; the table's name unless it is given."""
    enabled: bool = True
    """``false`` turns the instance off without removing its table."""

    _name: str = PrivateAttr(default="")

    @property
    def name(self) -> str:
        """The instance's name: the last part of its table's name."""
        return self._name

    def named(self, name: str) -> InstanceConfig:
        """Give this configuration its instance name (the loader does, once) and return it."""
        self._name = name
        return self


@dataclass(frozen=True, slots=True)
class Backend:
    """One registration, the last line of every backend's file: ``BACKEND = Backend(...)``."""

    name: str
    """``room.kind``, e.g. ``auth.ldap``."""
    config: type[InstanceConfig]
    open: Callable[[Any], Awaitable[Any]]
    """Takes the validated configuration, returns the opened backend."""
    extra: str | None = None
    """The optional extra that brings the driver: ``pip install 'isthmus[ldap]'``."""


class UnknownKind(LookupError):
    """There is no backend of this kind."""


class MissingDriver(ImportError):
    """The backend exists but its driver is not installed."""


def kinds(room: str) -> list[str]:
    """Names of the backends in ``auth``, ``sinks`` or ``bridges``."""
    package = importlib.import_module(room)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(room: str, kind: str) -> Backend:
    """Import ``room/kind.py`` and return its registration.

    Raises UnknownKind with the nearest name, or MissingDriver with the command that installs it.
    """
    if not kind.isidentifier() or kind.startswith("_") or importlib.util.find_spec(f"{room}.{kind}") is None:
        near = difflib.get_close_matches(kind, kinds(room), n=1)
        hint = f", did you mean {near[0]}?" if near else f"; there are: {', '.join(kinds(room))}"
        raise UnknownKind(f"no {room} backend is called {kind!r}{hint}")
    try:
        module = importlib.import_module(f"{room}.{kind}")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.split(".")[0] in ("broker", "auth", "sinks", "bridges"):
            raise
        raise MissingDriver(
            f"{room}.{kind} needs the package {missing!r}: pip install 'isthmus[{kind}]'", name=missing
        ) from error
    backend: Backend = module.BACKEND
    return backend


def check_layout() -> str | None:
    """One sentence when ``broker``, ``auth``, ``bridges`` and ``sinks`` do not lie side by side, else None.

    Other distributions install packages of such names; ours must be the ones imported.
    """
    home = Path(__file__).resolve().parent.parent.parent
    for room in ("auth", "bridges", "sinks"):
        spec = importlib.util.find_spec(room)
        places = [Path(p).resolve() for p in (spec.submodule_search_locations or [])] if spec else []
        if (home / room) not in places or places[0] != home / room:
            found = places[0] if places else (Path(spec.origin) if spec and spec.origin else None)
            return (
                f"the package {room!r} is imported from {found}, not from {home / room}: "
                "another distribution installs this name, remove it"
            )
    return None
