"""Records as HTTP requests: address, headers and body. No connection."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import orjson

from broker.config.template import MissingValue, Placeholder, Template
from broker.connectors.endpoint import Trust
from broker.connectors.http import check_url
from broker.connectors.json_text import compile_value
from broker.extend.record import Render, compile_template, to_bytes, to_text
from broker.extend.sink import Record
from sinks._progress import naming

Form = Literal["single", "array", "lines"]

_LONGEST_URL = 8_000
_LONGEST_VALUE = 4_000
"""Bytes of a value in a header."""


@dataclass(frozen=True, slots=True)
class Request:
    """Ready to be sent."""

    url: str
    headers: Mapping[str, str]
    body: bytes


class Requests:
    """Raises LookupError, TypeError or ValueError for a record that gives no request."""

    def __init__(
        self, url: str, *, form: Form, body: Template | Mapping[str, Template], content_type: str,
        headers: Mapping[str, str], idempotency_header: str,
    ) -> None:  # fmt: skip
        self._form = form
        self._url = _url(Template(url))
        self._body = _object(body) if isinstance(body, Mapping) else _text(body)
        self._is_json = isinstance(body, Mapping) or body.text == "${.}"
        content_type = content_type or ("application/x-ndjson" if form == "lines" else "application/json")
        templates = {name: Template(value) for name, value in headers.items()}
        self.fixed = {"Content-Type": content_type} | {
            n: t.literal for n, t in templates.items() if t.literal is not None
        }
        """Headers that are the same for all records."""
        self._headers = [(name, _header(name, template)) for name, template in templates.items() if template.names]
        self._idempotency_header = idempotency_header

    def piece(self, record: Record) -> bytes:
        """What the body says about one record."""
        piece = self._body(record)
        if self._form == "single" or self._is_json:
            return piece
        value = orjson.loads(piece)  # what is no JSON would make all the others unreadable
        return orjson.dumps(value) if b"\n" in piece else piece

    def request(self, records: Sequence[Record], pieces: Sequence[bytes]) -> Request:
        """One request for all of these."""
        first = records[0]
        headers = dict(self.fixed)
        for name, render in self._headers:
            value = render(first)
            if value is not None:
                headers[name] = value
        ids = [record.msgid for record in records]
        if self._idempotency_header and None not in ids:
            headers[self._idempotency_header] = str(ids[0]) if len(ids) == 1 else _digest(ids)
        body = b"[" + b",".join(pieces) + b"]" if self._form == "array" else b"\n".join(pieces)
        return Request(self._url(first), headers, body)


def check_target(text: str, service: Trust) -> None:
    """Host and port are what somebody wrote; only what follows may come from a message."""
    template = Template(text)
    head = template.segments[0] if template.segments and isinstance(template.segments[0], str) else ""
    scheme, _, rest = head.partition("://")
    if template.names and not (scheme and "/" in rest):
        raise ValueError("url: placeholders may stand in the path and the query only")
    compile_template(template)
    check_url(template.render(lambda name: "x"), service)


def origin(url: str) -> str:
    """Scheme and host; what follows may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _url(template: Template) -> Callable[[Record], str]:
    if template.literal is not None:
        fixed = template.literal
        return lambda record: fixed
    parts = [s if isinstance(s, str) else (s.name, _one(s)) for s in template.segments]

    def render(record: Record) -> str:
        text = "".join(part if isinstance(part, str) else _escaped(part[0], part[1](record)) for part in parts)
        if len(text) > _LONGEST_URL:
            raise ValueError(f"the address would have {len(text)} bytes")
        return text

    return render


def _one(placeholder: Placeholder) -> Render:
    return compile_template(Template(f"${{{placeholder.name}}}"))


def _escaped(name: str, value: Any) -> str:
    if value is None:
        raise MissingValue(name)
    text = to_text(value)
    if text in (".", "..", b".", b"..") or (isinstance(text, str) and "\0" in text):
        raise ValueError(f"its {name} may not stand in an address")  # servers resolve dots, encoded too
    return quote(text, safe="")


def _header(name: str, template: Template) -> Callable[[Record], str | None]:
    render = naming(template)
    alone = len(template.segments) == 1

    def header(record: Record) -> str | None:
        try:
            value = render(record)
        except MissingValue:
            if alone:
                return None
            raise
        if any(ord(c) < 0x20 or ord(c) == 0x7F for c in value):
            raise ValueError(f"a control character may not stand in the header {name}")
        if len(value.encode()) > _LONGEST_VALUE:
            raise ValueError(f"the header {name} would be longer than {_LONGEST_VALUE} bytes")
        return value

    return header


def _text(template: Template) -> Callable[[Record], bytes]:
    render = compile_value(template)

    def body(record: Record) -> bytes:
        value = to_bytes(render(record))
        if value is None:
            raise ValueError(f"{template.text} has no value")
        return value

    return body


def _object(fields: Mapping[str, Template]) -> Callable[[Record], bytes]:
    renders = [(name, compile_template(template)) for name, template in fields.items()]

    def body(record: Record) -> bytes:
        found = {}
        for name, render in renders:
            value = render(record)
            if isinstance(value, bytes):
                try:
                    value = value.decode()
                except UnicodeDecodeError:
                    raise ValueError(f"{name} is no text, which JSON needs; ${{.}} holds it as Base64") from None
            found[name] = value
        return orjson.dumps(found)

    return body


def _digest(ids: Sequence[str | None]) -> str:
    return hashlib.sha256("".join(map(str, ids)).encode()).hexdigest()[:32]


def retry_after(text: str) -> float:
    """Seconds from now; 0 where nothing useful is said (RFC 9110, 10.2.3)."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
