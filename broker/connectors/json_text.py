"""JSON written as text around placeholders, in which what a device sends cannot leave its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import orjson

from broker.config.template import MissingValue, Placeholder, Template
from broker.extend.record import Render, compile_template, to_text
from broker.extend.sink import Record

_QUOTE = re.compile(r'\\.|"', re.DOTALL)


def compile_value(template: Template) -> Render:
    """As `compile_template`. Where a template is an object or array of JSON around its placeholders, such as
    ``{"by": "${clientid}", "v": ${payload.v}}``, so is what it yields: between quotes a value is text, escaped;
    elsewhere it is JSON, a payload as it came, null where there is none. MissingValue or ValueError for a record with
    something that cannot stand in its place."""
    if not is_json(template):
        return compile_template(template)
    parts = [
        part if isinstance(part, str) else _text(part.name) if quoted else _value(part.name)
        for part, quoted in _places(template)
    ]

    def render(record: Record) -> str:
        return "".join([part if isinstance(part, str) else part(record) for part in parts])

    return render


def is_json(template: Template) -> bool:
    """Whether text and placeholders together are an object or array of JSON."""
    if len(template.segments) < 2:
        return False
    sample = "".join(part if isinstance(part, str) else "x" if quoted else "0" for part, quoted in _places(template))
    try:
        return isinstance(orjson.loads(sample), dict | list)
    except ValueError:
        return False


def _places(template: Template) -> Iterator[tuple[str | Placeholder, bool]]:
    """The segments, and whether each begins between quotes."""
    quoted = False
    for segment in template.segments:
        yield segment, quoted
        if isinstance(segment, str):
            quoted ^= _QUOTE.findall(segment).count('"') % 2 == 1


def _text(name: str) -> Callable[[Record], str]:
    render = compile_template(Template(f"${{{name}}}"))

    def text(record: Record) -> str:
        value = render(record)
        if value is None:
            raise MissingValue(name)
        found = to_text(value)
        if isinstance(found, bytes):
            raise ValueError(f"{name} is no text, which JSON needs; ${{.}} holds it as Base64")
        return orjson.dumps(found).decode()[1:-1]

    return text


def _value(name: str) -> Callable[[Record], str]:
    render = compile_template(Template(f"${{{name}}}"))

    def value(record: Record) -> str:
        found = render(record)
        if name == ".":
            return str(found)
        if isinstance(found, bytes):
            orjson.loads(found)  # what is no JSON could be the end of ours
            return found.decode()
        return orjson.dumps(found).decode()

    return value
