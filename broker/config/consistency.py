"""What no table can know alone: names that must exist, ports that clash, listeners nobody should open like that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from broker.config import certificates, firstrun, loops
from broker.config.listeners import ListenerConfig, NetworkListener, PlainListener, SecureListener, UnixListener
from broker.config.problems import Key
from broker.config.template import Template
from broker.config.topics import check_filter

if TYPE_CHECKING:
    from broker.config.fragments import Tree
    from broker.config.settings import Settings

SOCKETS = ("control.sock", "run/workers.sock")
"""The broker's own sockets in the data folder."""
ORDERING = ("clientid", "username", "peerhost", "topic", "payload", "qos", "retain")
"""What a message tells by itself when it is given to a lane."""


def check(settings: Settings, tree: Tree) -> None:
    """Add to the tree's problems and warnings. Opens no backend and no port; reads certificates."""
    _check_data(settings, tree)
    _check_order(settings, tree)
    for name, listener in settings.listeners.items():
        _check_access(name, listener, settings, tree)
        if isinstance(listener, SecureListener):
            for field, text in certificates.problems(listener):
                tree.problem(("listeners", name, field), text)
            for field, text in certificates.warnings(listener):
                tree.warning(("listeners", name, field), text)
    _check_addresses(settings, tree)
    _check_sessions(settings, tree)
    bridges = {name: instance.config for name, instance in settings.bridges.items()}
    for name, text in loops.warnings(bridges, settings.listeners):
        tree.warning(("bridges", name), text)
    _ask_models(settings, tree)


def _check_data(settings: Settings, tree: Tree) -> None:
    data = settings.broker.data
    place = next((path for path in (data, *data.parents) if path.exists()), data)
    if place.exists() and not place.is_dir():
        tree.problem(("broker", "data"), f"{place} is not a folder")
    if max(len(str(data / socket).encode()) for socket in SOCKETS) > 107:
        tree.problem(("broker", "data"), f"{data} is too long: the sockets in it would have paths of over 107 bytes")


def _declared(tree: Tree, room: str) -> dict[str, bool]:
    """Names of the tables of a room, and whether each is enabled."""
    tables = tree.values.get(room)
    if not isinstance(tables, dict):
        return {}
    return {name: table.get("enabled") is not False for name, table in tables.items() if isinstance(table, dict)}


def _check_order(settings: Settings, tree: Tree) -> None:
    declared = _declared(tree, "auth")
    lists: list[tuple[Key, Iterable[str] | None]] = [(("access", "order"), settings.access.order)]
    lists += [(("listeners", name, "auth"), listener.auth) for name, listener in settings.listeners.items()]
    for key, names in lists:
        seen: set[str] = set()
        for name in names or ():
            if name not in declared:
                there = f"; there are: {', '.join(declared)}" if declared else ""
                tree.problem(key, f"there is no [auth.{name}]{there}")
            elif not declared[name]:
                tree.problem(key, f"[auth.{name}] has enabled = false")
            if name in seen:
                tree.problem(key, f"{name!r} stands in the list twice")
            seen.add(name)
    asked = {name for _, names in lists for name in names or ()}
    for name in settings.auth:
        if settings.access.order is not None and name not in asked:
            tree.warning(("auth", name), "is never asked: it is not in access.order nor in any listener's auth")


def _deciders(listener: ListenerConfig, settings: Settings, tree: Tree) -> list[str]:
    if listener.auth is not None:
        return list(listener.auth)
    if settings.access.order is not None:
        return list(settings.access.order)
    return [name for name, enabled in _declared(tree, "auth").items() if enabled]


def _check_access(name: str, listener: ListenerConfig, settings: Settings, tree: Tree) -> None:
    key: Key = ("listeners", name, "bind")
    deciders = _deciders(listener, settings, tree)
    anonymous = settings.access.allow_anonymous if listener.allow_anonymous is None else listener.allow_anonymous
    written = ("access", "allow_anonymous") in tree.origins or listener.allow_anonymous is not None
    listed = listener.auth is not None or settings.access.order is not None
    certified = isinstance(listener, SecureListener) and listener.verification == "require"
    remote = isinstance(listener, NetworkListener) and not listener.bind.loopback
    if remote and not deciders and not (written or listed or certified):
        text = "other machines can reach it and no [auth.*] decides who may connect: add one, or write allow_anonymous"
        tree.problem(key, text)
    elif not deciders and not anonymous and not certified:
        tree.warning(
            ("listeners", name), "every client is refused: no [auth.*] decides here and allow_anonymous is false"
        )
    if remote and deciders and isinstance(listener, PlainListener) and not listener.allow_cleartext:
        secure = "tls" if listener.kind == "tcp" else "wss"
        text = f'passwords would cross the network in the clear: kind = "{secure}", or write allow_cleartext = true'
        tree.problem(key, text)


def _check_addresses(settings: Settings, tree: Tree) -> None:
    own = {str(settings.broker.data / socket): "the broker itself" for socket in SOCKETS}
    taken: list[tuple[str, NetworkListener]] = []
    for name, listener in settings.listeners.items():
        if isinstance(listener, UnixListener):
            path = str(listener.path)
            if path in own:
                tree.problem(("listeners", name, "path"), f"is already used by {own[path]}")
            own[path] = f"listeners.{name}"
        elif isinstance(listener, NetworkListener) and listener.bind.port:
            bind = listener.bind
            for other, before in taken:
                same = bind.host == before.bind.host or bind.any or before.bind.any
                if same and bind.port == before.bind.port:
                    tree.problem(("listeners", name, "bind"), f"port {bind.port} is already used by listeners.{other}")
            taken.append((name, listener))


def _check_sessions(settings: Settings, tree: Tree) -> None:
    for name in settings.bridges:
        if name in settings.sinks:
            where = tree.origin(("sinks", name))
            tree.problem(("bridges", name), f"a sink has the same name at {where}: their queues would be one")
    for room in ("sinks", "bridges"):
        for name, instance in getattr(settings, room).items():
            key: Key = (room, name)
            try:
                spec = instance.config.session()
            except ValueError as error:
                tree.problem(key, str(error))
                continue
            for text, _ in spec.filters:
                try:
                    check_filter(text)
                except ValueError as error:
                    tree.problem(next(_places(instance.raw, text, key), key), str(error))
            try:
                _check_order_key(spec.order_key)
            except ValueError as error:
                tree.problem((*key, "order_key"), str(error))


def _check_order_key(text: str) -> None:
    """ValueError for a template that cannot be read, or that asks for what is not known when a lane is chosen: all its
    messages would go to one."""
    for name in Template(text).names:
        if name.partition(".")[0].partition("[")[0] not in ORDERING:
            raise ValueError(f"${{{name}}}: lanes are chosen by {', '.join(ORDERING)}")


def _ask_models(settings: Settings, tree: Tree) -> None:
    """Let the models that have a method `problems()` look at what they name, e.g. parse a file of rules.

    It yields pairs of key and sentence and has no side effects. Files that the first run will make are not asked for.
    """
    new = firstrun.pending(settings)
    for room in ("auth", "sinks", "bridges"):
        for name, instance in getattr(settings, room).items():
            ask = getattr(instance.config, "problems", None)
            if callable(ask) and instance is not new:
                for key, text in ask():
                    tree.problem((room, name, *([key] if key else [])), text)


def _places(values: Any, wanted: str, key: Key) -> Iterator[Key]:
    """Where a text stands in a table; a filter is found although its model may have put a prefix before it."""
    pairs = enumerate(values) if isinstance(values, list) else values.items() if isinstance(values, dict) else ()
    for part, value in pairs:
        if (
            isinstance(value, str)
            and value
            and wanted.endswith(value)
            and ("filter" in str((*key, part)[-1:] + key[-1:]))
        ):
            yield (*key, part)
        yield from _places(value, wanted, (*key, part))
