"""One record as one BSON document: kinds of values, dates, nested documents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

import bson
import orjson
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from pymongo import UpdateOne

from broker.config.template import Template
from broker.connectors.json_text import compile_value
from broker.extend.record import Render
from broker.extend.sink import Record

_LARGEST = 16 << 20
"""Bytes of a document MongoDB takes."""
UNFIT = (BSONError, OverflowError, RecursionError, UnicodeEncodeError)
"""What the driver raises for a document that BSON cannot hold."""
_NEVER_BYTES = frozenset(f"${{{name}}}" for name in ("topic", "clientid", "username", "peerhost", "msgid", "qos", "ts"))


class Documents:
    """Renders records. Raises ValueError for one that no server would take: it is known before anything is sent."""

    def __init__(self, fields: Mapping[str, Template], *, dates: Collection[str], documents: Collection[str]) -> None:
        self._fields: list[tuple[str, Render]] = [
            (name, _converted(template, _date if name in dates else _nested if name in documents else None))
            for name, template in fields.items()
        ]

    def values(self, record: Record) -> dict[str, Any]:
        """Field -> value."""
        try:
            found = {name: find(record) for name, find in self._fields}
        except (ValueError, OverflowError):
            raise ValueError(self._why_not(record)) from None
        if found.get("_id", 0) is None:
            del found["_id"]  # nobody vouches for a message id: the server makes one
        return found

    def update(self, record: Record, by: Iterable[str]) -> tuple[bytes, UpdateOne]:
        """The key of the document that is meant, in BSON, and what becomes of it; `by` are the fields of the key."""
        values = self.values(record)
        encoded(values)
        keys = {name: values.pop(name) for name in by}
        for name, value in keys.items():
            if value is None:
                raise ValueError(f"{name} has no value")
        # $eq: what a device sent is compared, never read as a condition
        wanted = {name: {"$eq": value} for name, value in keys.items()}
        return encoded(keys), UpdateOne(wanted, {"$set": values}, upsert=True)

    def _why_not(self, record: Record) -> str:
        for name, find in self._fields:
            try:
                find(record)
            except (ValueError, OverflowError) as error:
                return f"{name}: {error}"
        return "a value cannot be converted"


def encoded(values: Mapping[str, Any]) -> bytes:
    """The document in BSON; ValueError when it cannot be one."""
    try:
        document = bson.encode(values)
    except UNFIT as error:
        raise ValueError(str(error)) from None
    if len(document) > _LARGEST:
        raise ValueError(f"it has {len(document)} bytes, MongoDB takes {_LARGEST}")
    return document


def _converted(template: Template, convert: Callable[[Any], Any] | None) -> Render:
    """A missing value stays None."""
    render = compile_value(template)
    if convert is None:
        if template.text in _NEVER_BYTES:
            return render
        convert = _plain

    def value(record: Record) -> Any:
        found = render(record)
        return None if found is None else convert(found)

    return value


def _plain(value: Any) -> Any:
    if type(value) is bytes:
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _date(value: Any) -> DatetimeMS:
    if isinstance(value, str):
        return DatetimeMS(datetime.fromisoformat(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{type(value).__name__} is no date")
    return DatetimeMS(int(value))


def _nested(value: Any) -> Any:
    try:
        return orjson.loads(value) if isinstance(value, (bytes, str)) else value
    except ValueError:
        raise ValueError("the text is no JSON") from None
