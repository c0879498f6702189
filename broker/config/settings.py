"""The applied configuration: every table validated, every value with its origin. Built whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from broker.config import consistency, fingerprint, fragments, suggest, validation
from broker.config.fragments import Tree
from broker.config.listeners import KINDS, ListenerConfig
from broker.config.models import AccessConfig, BrokerConfig, EventsConfig, LimitsConfig, StoreConfig, WorkersConfig
from broker.config.problems import ConfigError, Key, arrange, line, spell
from broker.config.secrets import Substitution
from broker.config.show import Item, items
from broker.extend import registry
from broker.extend.registry import Backend, InstanceConfig

SECTIONS: dict[str, type[BaseModel]] = {
    "broker": BrokerConfig,
    "access": AccessConfig,
    "limits": LimitsConfig,
    "store": StoreConfig,
    "workers": WorkersConfig,
    "events": EventsConfig,
}
ROOMS = ("auth", "sinks", "bridges")

M = TypeVar("M", bound=BaseModel)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Instance:
    """One enabled `[auth.*]`, `[sinks.*]` or `[bridges.*]` table."""

    name: str
    kind: str
    room: str
    config: InstanceConfig
    backend: Backend
    raw: dict[str, Any] = field(repr=False)
    """The table as plain values, secrets in clear: for the worker's channel only."""
    origin: str = ""
    """Where the table begins: ``FILE:LINE``."""
    enabled: bool = True
    fingerprint: str = field(default="", repr=False)
    """Differs when the table or a file it reads at opening differs."""


@dataclass(slots=True)
class Settings:
    """What a broker runs with. Tables with ``enabled = false`` are not in it but named in `disabled`."""

    base: Path
    """The folder that holds `conf.d`; relative paths start here."""
    broker: BrokerConfig
    access: AccessConfig
    limits: LimitsConfig
    store: StoreConfig
    workers: WorkersConfig
    events: EventsConfig
    listeners: dict[str, ListenerConfig] = field(default_factory=dict)
    auth: dict[str, Instance] = field(default_factory=dict)
    sinks: dict[str, Instance] = field(default_factory=dict)
    bridges: dict[str, Instance] = field(default_factory=dict)
    disabled: list[str] = field(default_factory=list)
    """Whole names, e.g. ``sinks.kafka``."""
    warnings: list[str] = field(default_factory=list)
    """One line each: ``FILE:LINE: KEY: TEXT``."""
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    """By whole name, e.g. ``listeners.tcp`` or ``limits``."""
    tree: Tree = field(default_factory=Tree, repr=False)
    tainted: frozenset[Key] = field(default=frozenset(), repr=False)

    def origin(self, key: str) -> str:
        """Where a key, e.g. ``listeners.tcp.bind``, was set: ``FILE:LINE``, ``env NAME``, ``--set`` or ``default``."""
        return self._origins().get(key, "default")

    def problem(self, key: str, text: str) -> str:
        """The line ``FILE:LINE: KEY: TEXT`` for something found wrong with a key only when it was used."""
        origins = self._origins()
        above = key
        while above and above not in origins:
            above = above.rpartition(".")[0]
        return line(origins.get(above, "default"), key, text)

    def located(self, text: str) -> str:
        """What a room said about an instance or listener, e.g. ``listeners.tcp: bind 127.0.0.1:1883: …``, as the line
        ``FILE:LINE: KEY: TEXT``; unchanged when it begins with no key."""
        table, colon, rest = text.partition(": ")
        field, _, more = rest.partition(" ")
        if not colon or (table not in self.fingerprints):
            return text
        if f"{table}.{field.rstrip(':')}" in {item.key for item in self.items()}:
            return self.problem(f"{table}.{field.rstrip(':')}", more)
        return self.problem(table, rest)

    def items(self) -> list[Item]:
        """Every value in force, sorted by key, secrets as ``***``."""
        models: list[tuple[Key, BaseModel]] = [((name,), getattr(self, name)) for name in SECTIONS]
        models += [(("listeners", name), model) for name, model in self.listeners.items()]
        for room in ROOMS:
            models += [((room, name), instance.config) for name, instance in getattr(self, room).items()]
        return items(models, self._origins(), self.tainted)

    def _origins(self) -> dict[str, str]:
        return {spell(key): place for key, place in self.tree.origins.items()}


def load_settings(
    conf: Path,
    *,
    data: Path | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> Settings:
    """Read and validate the whole configuration; has no side effects.

    `base` is where relative paths start when it is not the folder that holds `conf`. Raises ConfigError with every
    problem found.
    """
    environ = os.environ if environ is None else environ
    folder = Path(conf).absolute()
    tree = fragments.read(folder, sets, environ)
    if data is not None:
        fragments.override(tree, ("broker", "data"), str(Path(data).absolute()), "--data")
    loader = _Loader(tree, Path(base or folder.parent).absolute(), environ)
    settings = loader.load()
    if tree.problems:
        raise ConfigError(arrange(tree.problems))
    settings.warnings = arrange(tree.warnings)
    return settings


def restore(room: str, name: str, raw: Mapping[str, Any], base: Path) -> Instance:
    """An instance from what a worker process was sent; the inverse of `Instance.raw`. Raises as the registry does."""
    kind = str(raw.get("kind") or name)
    backend = registry.load(room, kind)
    config = validation.validate(backend.config, raw, base).named(name)
    return Instance(name, kind, room, config, backend, dict(raw))


class _Loader:
    """Builds Settings from a tree; what is wrong goes into the tree's problems."""

    def __init__(self, tree: Tree, base: Path, environ: Mapping[str, str]) -> None:
        self.tree = tree
        self.base = base
        self.environ = environ
        self.tainted: set[Key] = set()
        self.disabled: list[str] = []
        self.fingerprints: dict[str, str] = {}

    def load(self) -> Settings:
        """The settings; of use only when no problem was found."""
        known = [*SECTIONS, "listeners", *ROOMS]
        for name, value in self.tree.values.items():
            if name not in known:
                self.tree.problem((name,), suggest.unknown(name, known, _elsewhere()))
            elif not isinstance(value, dict):
                self.tree.problem((name,), "expected a table")
        settings = Settings(
            base=self.base,
            broker=self._section(BrokerConfig, "broker"),
            access=self._section(AccessConfig, "access"),
            limits=self._section(LimitsConfig, "limits"),
            store=self._section(StoreConfig, "store"),
            workers=self._section(WorkersConfig, "workers"),
            events=self._section(EventsConfig, "events"),
            listeners=self._listeners(),
            auth=self._instances("auth"),
            sinks=self._instances("sinks"),
            bridges=self._instances("bridges"),
            disabled=self.disabled,
            fingerprints=self.fingerprints,
            tree=self.tree,
        )
        settings.tainted = frozenset(self.tainted)
        consistency.check(settings, self.tree)
        return settings

    def _section(self, model: type[M], name: str) -> M:
        values, unusable = self._substitute(self._table(name), (name,))
        found = self._model(model, (name,), values, unusable)
        return found or validation.validate(model, {}, self.base)

    def _table(self, name: str) -> dict[str, Any]:
        value = self.tree.values.get(name)
        return value if isinstance(value, dict) else {}

    def _tables(self, room: str) -> list[tuple[str, Key, dict[str, Any]]]:
        """The enabled instance tables of a room, checked for form."""
        found = []
        for name, table in self._table(room).items():
            key: Key = (room, name)
            if not isinstance(table, dict):
                self.tree.problem(key, f"expected a table [{room}.NAME]; a key stands inside the table of an instance")
            elif not _NAME.fullmatch(name):
                self.tree.problem(
                    key, "a name is made of letters, digits, - and _, at most 64, and starts with no - or _"
                )
            elif table.get("enabled") is False:
                self.disabled.append(spell(key))
            else:
                found.append((name, key, table))
        return found

    def _instances(self, room: str) -> dict[str, Instance]:
        found: dict[str, Instance] = {}
        for name, key, table in self._tables(room):
            kind = table.get("kind", name)
            if not isinstance(kind, str) or not kind:
                self.tree.problem((*key, "kind"), "expected text")
                continue
            backend = self._backend(room, kind, (*key, "kind"))
            if backend is None:
                continue
            values, unusable = self._substitute(table, key)
            config = self._model(backend.config, key, values, unusable)
            if config is not None:
                config.named(name)
                origin = self.tree.origin(key)
                mark = fingerprint.of(room, {**values, "kind": kind}, config)
                self.fingerprints[spell(key)] = mark
                found[name] = Instance(name, kind, room, config, backend, values, origin, True, mark)
        return found

    def _backend(self, room: str, kind: str, key: Key) -> Backend | None:
        try:
            return registry.load(room, kind)
        except (registry.UnknownKind, registry.MissingDriver) as error:
            self.tree.problem(key, str(error))
        except Exception as error:  # a backend's own module: whatever it does at import must name it
            self.tree.problem(key, f"{room}/{kind}.py cannot be loaded: {type(error).__name__}: {error}")
        return None

    def _listeners(self) -> dict[str, ListenerConfig]:
        if "listeners" not in self.tree.values:
            model = self._model(KINDS["tcp"], ("listeners", "tcp"), {"kind": "tcp"})
            return {"tcp": model.named("tcp")} if model else {}
        found: dict[str, ListenerConfig] = {}
        for name, key, table in self._tables("listeners"):
            kind = table.get("kind", name)
            if kind not in KINDS:
                near = suggest.nearest(str(kind), KINDS)
                hint = f", did you mean {near}?" if near else f"; there are: {', '.join(KINDS)}"
                self.tree.problem((*key, "kind"), f"no kind of listener is called {str(kind)!r}{hint}")
                continue
            values, unusable = self._substitute(table, key)
            model = self._model(KINDS[kind], key, {**values, "kind": kind}, unusable)
            if model is not None:
                found[name] = model.named(name)
        return found

    def _substitute(self, values: dict[str, Any], key: Key) -> tuple[dict[str, Any], set[Key]]:
        """The table with references filled in, and the keys for which that failed."""
        substitution = Substitution(self.base, self.environ)
        result: dict[str, Any] = substitution.apply(values, key)
        self.tainted |= substitution.tainted
        for where, text in substitution.problems:
            self.tree.problem(where, text)
        for where, text in substitution.warnings:
            self.tree.warning(where, text)
        return result, {where for where, _ in substitution.problems}

    def _model(self, model: type[M], key: Key, values: dict[str, Any], unusable: Set[Key] = frozenset()) -> M | None:
        """The validated table, or None when something in it is wrong; `unusable` keys are already reported."""
        while True:
            try:
                result = validation.validate(model, values, self.base)
            except ValidationError as error:
                hidden = [where[len(key) :] for where in self.tainted if where[: len(key)] == key]
                found = validation.findings(error, model, values, hidden, _elsewhere())
                if self._unguess(found, key, values):
                    continue
                for finding in found:
                    if (*key, *finding.key) not in unusable:
                        self.tree.problem((*key, *finding.key), finding.text)
                return None
            if key[0] not in ROOMS:
                self.fingerprints[spell(key)] = fingerprint.of(str(key[0]), values, result)
            return None if unusable else result

    def _unguess(self, found: list[validation.Finding], key: Key, values: dict[str, Any]) -> bool:
        """Give back their text to values of the environment that were read as something else than was wanted."""
        changed = False
        for finding in found:
            typed = self.tree.guessed.get((*key, *finding.key))
            here: Any = values
            for part in finding.key[:-1]:
                here = here[part]
            if typed is not None and finding.key and not isinstance(here[finding.key[-1]], str):
                here[finding.key[-1]] = typed
                changed = True
        return changed


def _elsewhere() -> list[str]:
    """Whole keys of the tables every broker has, for people who put one into the wrong table."""
    return [f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields]
