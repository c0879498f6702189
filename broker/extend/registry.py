"""Finds a backend's code by its kind: beside the broker, or in any distribution that registers it as an entry point.
Knows no backend by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

GROUP = "isthmus.backends"
"""Entry points of backends in other distributions: ``"auth.word" = "my_module:BACKEND"``."""


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
    one_process: bool = False
    """Whether all lanes of a sink must be in one worker process, because its destination takes one writer only."""


class UnknownKind(LookupError):
    """There is no backend of this kind."""


class WrongBackend(UnknownKind):
    """A distribution registers something that cannot be used as a backend."""


class MissingDriver(ImportError):
    """The backend exists but its driver is not installed."""


def kinds(room: str) -> list[str]:
    """Names of the backends in ``auth``, ``sinks`` or ``bridges``, and of those other distributions register."""
    package = importlib.import_module(room)
    own = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")}
    others = (found.name.partition(".") for found in entry_points(group=GROUP))
    return sorted(own | {kind for where, _, kind in others if where == room and kind.isidentifier()})


def load(room: str, kind: str) -> Backend:
    """Import ``room/kind.py``, or else what a distribution registers as ``room.kind``, and return its registration.

    Raises UnknownKind with the nearest name, WrongBackend, or MissingDriver with the command that installs it.
    """
    named = kind.isidentifier() and not kind.startswith("_")
    if not named or importlib.util.find_spec(f"{room}.{kind}") is None:
        registered = sorted(entry_points(group=GROUP, name=f"{room}.{kind}"), key=_distribution) if named else []
        if registered:
            return _registered(registered)
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


def _registered(found: list[EntryPoint]) -> Backend:
    """What a distribution registered; nobody can take the place of another's, nor of ours."""
    entry = found[0]
    if len({_distribution(one) for one in found}) > 1:
        raise WrongBackend(f"{entry.name} is registered by {' and by '.join(map(_distribution, found))}; remove one")
    where = f"{entry.value} of {_distribution(entry)}"
    try:
        backend = entry.load()
    except Exception as error:  # somebody else's module: whatever it does at import must name it
        raise WrongBackend(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(backend, Backend) or backend.name != entry.name:
        raise WrongBackend(f'{where} is no registration: write BACKEND = Backend("{entry.name}", …)')
    return backend


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"


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
