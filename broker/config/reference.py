"""The manual of every key as Markdown, printed from the models, with the shipped fragments as examples."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from broker.config import suggest
from broker.config.listeners import KINDS, ListenerConfig
from broker.config.options import PACKAGED, SYSTEM
from broker.config.settings import SECTIONS
from broker.config.show import to_toml
from broker.config.types import (
    Address,
    CompiledText,
    Secret,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from broker.extend import registry
from broker.extend.auth import AuthConfig
from broker.extend.bridge import BridgeConfig
from broker.extend.sink import SinkConfig

CHECKOUT = Path(__file__).resolve().parent.parent.parent / "conf.d"
COMMON: dict[str, type[BaseModel]] = {
    "listeners": ListenerConfig,
    "auth": AuthConfig,
    "sinks": SinkConfig,
    "bridges": BridgeConfig,
}
"""What every table of a room understands."""

INTRODUCTION = """\
# Reference

Every key of every fragment. This page is printed by `isthmus config reference`, from the same models that read the
fragments; `isthmus config reference KIND` prints one kind, such as `auth.ldap`, as installed.

- **duration**: `"250ms"`, `"5s"`, `"1h30m"`, or seconds as a number.
- **size**: `"896KB"`, `"4GB"` (powers of 1024), or bytes as a number.
- **path**: relative ones start at the folder that holds `conf.d`.
- **secret**: text; best written `"${file:secrets/NAME}"` or `"${env:NAME}"`, which works in every value.
- **template**: text with placeholders such as `${clientid}` or `${payload.value}`; `$${` is a plain `${`.
- **condition**: such as `payload.value > 10 and topic[1] in ["a", "b"]`.
- `NAME` stands for a name you choose, `[]` for each element of a list. Where no default is given, the key is off or
  its meaning says what happens without it.
"""

_COUNTED = re.compile(r"^(whole number|number|table|template|path|secret|duration|size|address|any value)")


class Row(NamedTuple):
    """One key."""

    key: str
    type: str
    default: str
    meaning: str


class UnknownTopic(LookupError):
    """There is no such table or kind."""


def reference(topic: str | None = None) -> str:
    """Markdown of everything, or of one topic: a table (``limits``), a room (``auth``), a kind (``auth.ldap``, or
    ``ldap`` in every room that has one). UnknownTopic names the nearest. Kinds of other distributions are described
    only when they are asked for by name."""
    if topic is None:
        shown: dict[str, str] = {}
        rooms = (text for room in COMMON for text in _room(room, shown))
        return "\n".join([INTRODUCTION, _contents(), *map(_section, SECTIONS), *rooms])
    return "\n".join(_of(topic))


def rows(model: type[BaseModel], given: BaseModel | None = None, above: str = "") -> Iterator[Row]:
    """The keys of a model and of the tables in it. `given` is the value it has by default, where that is known."""
    for name, field in model.model_fields.items():
        key = f"{above}{name}"
        default = getattr(given, name) if given is not None else field.get_default(call_default_factory=True)
        required = given is None and field.is_required()
        yield Row(
            key,
            _type(field.annotation, field.metadata),
            "**required**" if required else _default(default, field),
            " ".join((field.description or "").split()),
        )
        for inner, below in _tables(field.annotation, key):
            yield from rows(inner, default if type(default) is inner else None, f"{below}.")


def examples(room: str, kind: str) -> Iterator[Path]:
    """The shipped fragments that show a kind, in the order of their names; none where they are not installed."""
    for path in fragments():
        tables = tomllib.loads(path.read_text("utf-8")).get(room, {})
        if any(table.get("kind", name) == kind for name, table in tables.items()):
            yield path


def fragments() -> list[Path]:
    """The shipped fragments in the order of their names: those of a new installation as they are in the package, with
    the examples of a checkout, else of where fragments are looked for. Never one that is in force: it may hold secrets.
    """
    for folder in (CHECKOUT, Path("conf.d"), SYSTEM):
        found = list(folder.glob("*.toml.example"))
        if found:
            return sorted([*PACKAGED.glob("*.toml"), *found], key=lambda path: path.name)
    return []


# topics ---------------------------------------------------------------------------------------------------------------


def _of(topic: str) -> Iterator[str]:
    room, _, kind = topic.partition(".")
    if topic in SECTIONS:
        yield _section(topic)
    elif topic in COMMON:
        yield from _room(topic, {})
    elif room in COMMON and kind:
        yield _kind(room, kind, {})
    else:
        found = [one for one in COMMON if topic in _kinds(one, others=True)]
        if not found:
            known = [*SECTIONS, *COMMON, *(f"{one}.{kind}" for one in COMMON for kind in _kinds(one, others=True))]
            bare = {name.partition(".")[2]: name for name in known if "." in name}
            near = suggest.nearest(topic, [*known, *bare])
            hint = f", did you mean {bare.get(near, near)}?" if near else f"; there are: {', '.join(known)}"
            raise UnknownTopic(f"no table or kind is called {topic!r}{hint}")
        yield from (_kind(one, topic, {}) for one in found)


def _contents() -> str:
    lines = [f"- [{name}](#{name})" for name in SECTIONS]
    for room in COMMON:
        kinds = " · ".join(f"[{kind}](#{room}{kind})" for kind in _kinds(room))
        lines.append(f"- [{room}](#{room}): {kinds}")
    return "\n".join([*lines, ""])


def _section(name: str) -> str:
    model = SECTIONS[name]
    lines = [f"## {name}", "", _sentence(model), "", *_table(rows(model)), ""]
    for path in fragments():
        text = path.read_text("utf-8")
        if set(tomllib.loads(text)) == {name}:
            lines += _shown(path.name, text)
    return "\n".join(lines)


def _room(room: str, shown: dict[str, str]) -> Iterator[str]:
    base = COMMON[room]
    yield "\n".join([f"## {room}", "", _sentence(base), "", *_table(rows(base)), ""])
    for kind in _kinds(room):
        yield _kind(room, kind, shown)


def _kinds(room: str, others: bool = False) -> list[str]:
    if room == "listeners":
        return list(KINDS)
    return [kind for kind in registry.kinds(room) if others or importlib.util.find_spec(f"{room}.{kind}") is not None]


def _kind(room: str, kind: str, shown: dict[str, str]) -> str:
    """`shown` says under which kind an example stands already."""
    lines = [f"### {room}.{kind}", ""]
    try:
        if room == "listeners":
            if kind not in KINDS:
                raise UnknownTopic(f"no kind of listener is called {kind!r}; there are: {', '.join(KINDS)}")
            model: type[BaseModel] = KINDS[kind]
            lines += [_sentence(model), ""]
        else:
            backend = registry.load(room, kind)
            model = backend.config
            lines += [_purpose(room, kind, model), ""]
            if backend.extra is not None:
                lines += [f"Needs `pip install 'isthmus[{backend.extra}]'`.", ""]
    except registry.MissingDriver as error:
        return "\n".join([*lines, f"Cannot be described here: {error}.", ""])
    except registry.UnknownKind as error:
        raise UnknownTopic(str(error)) from None
    own = [name for name, field in model.model_fields.items() if not _same(field, COMMON[room].model_fields.get(name))]
    if own:
        lines += [*_table(row for row in rows(model) if row.key.partition(".")[0].removesuffix("[]") in own), ""]
    for path in examples(room, kind):
        place = shown.setdefault(path.name, f"{room}.{kind}")
        if place == f"{room}.{kind}":
            lines += _shown(path.name, path.read_text("utf-8"))
        else:
            lines += [f"`conf.d/{path.name}` stands under [{place}](#{place.replace('.', '')}).", ""]
    return "\n".join(lines)


def _shown(name: str, fragment: str) -> list[str]:
    return [f"`conf.d/{name}`:", "", "```toml", fragment.rstrip(), "```", ""]


def _same(field: FieldInfo, common: FieldInfo | None) -> bool:
    """Whether a key means what it means in every table of the room."""
    if common is None or field.description != common.description:
        return False
    default, usual = (one.get_default(call_default_factory=True) for one in (field, common))
    return bool(default == usual)


def _purpose(room: str, kind: str, model: type[BaseModel]) -> str:
    """What the backend's own module says it does."""
    own = importlib.util.find_spec(f"{room}.{kind}") is not None
    module = importlib.import_module(f"{room}.{kind}") if own else sys.modules[model.__module__]
    return (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ")


def _sentence(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").replace("\n", " ")


# cells ----------------------------------------------------------------------------------------------------------------


def _table(found: Iterable[Row]) -> Iterator[str]:
    yield "| Key | Type | Default | Meaning |"
    yield "|---|---|---|---|"
    for row in found:
        cells = (f"`{row.key}`", row.type, row.default, row.meaning)
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words, with its bounds."""
    noted = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        noted += (entry for one in more for entry in (one.metadata if isinstance(one, FieldInfo) else [one]))
    functions = {getattr(entry, "func", None) for entry in noted}
    if parse_duration in functions:
        return f"duration{_bounds(noted, format_duration)}"
    if parse_size in functions:
        return f"size{_bounds(noted, lambda size: format_size(int(size)))}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(one, noted) for one in arguments if one is not NoneType))
    if origin is Literal:
        return " | ".join(f"`{to_toml(one)}`" for one in arguments)
    if origin in (tuple, frozenset):
        return f"list of {_many(_type(arguments[0]))}"
    if origin is dict:
        return f"table of {_many(_type(arguments[1]))}"
    return _plain(annotation, noted)


def _many(words: str) -> str:
    return _COUNTED.sub(lambda word: f"{word[0]}es" if word[0].endswith("s") else f"{word[0]}s", words)


def _plain(annotation: Any, noted: list[Any]) -> str:
    if annotation is Any or not isinstance(annotation, type):
        return "any value"
    if issubclass(annotation, BaseModel):
        return "table"
    if annotation is bool:
        return "boolean"
    if annotation in (int, float):
        return f"{'whole ' if annotation is int else ''}number{_bounds(noted, lambda value: f'{value:_}')}"
    if issubclass(annotation, CompiledText):
        return "form of passwords" if annotation.__name__ == "Form" else annotation.__name__.lower()
    return {Path: "path", Secret: "secret", Address: "address `HOST:PORT`"}.get(annotation, "text")


def _bounds(noted: list[Any], write: Any) -> str:
    found: dict[str, Any] = {}
    for entry in noted:
        found.update({name: getattr(entry, name) for name in ("ge", "gt", "le", "lt") if hasattr(entry, name)})
    low = f"{write(found['ge'])}" if "ge" in found else f"over {write(found['gt'])}" if "gt" in found else ""
    high = f"{write(found['le'])}" if "le" in found else ""
    if low and high:
        return f", {low} to {high}"
    return f", at least {low}" if "ge" in found else f", {low}" if low else f", up to {high}" if high else ""


def _default(value: Any, field: FieldInfo) -> str:
    if value is None or isinstance(value, BaseModel):
        return ""
    functions = {getattr(entry, "func", None) for entry in field.metadata}
    unit = "duration" if parse_duration in functions else "size" if parse_size in functions else ""
    if isinstance(value, Secret) and not value:
        return '`""`'
    if unit and not value:
        return "`0`"
    if isinstance(value, frozenset):
        value = sorted(value)
    if type(value) is int and not unit:
        return f"`{value:_}`"
    return f"`{to_toml(value, unit)}`" if value != {} else "`{}`"


def _tables(annotation: Any, key: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The models inside a type, and how the keys below them begin."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, key
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType, Annotated):
        for one in arguments:
            yield from _tables(one, key)
    elif origin in (tuple, frozenset):
        yield from _tables(arguments[0], f"{key}[]")
    elif origin is dict:
        yield from _tables(arguments[1], f"{key}.NAME")
