"""One record as one BSON document: kinds of values, dates, nested documents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

import bson
import orjson
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError

from broker.config.template import Template
from broker.extend.record import Render, compile_template
from broker.extend.sink import Record

_LARGEST = 16 << 20
"""Bytes of a document MongoDB takes."""


class Documents:
    """Renders records. Raises ValueError for one that no server would take: it is known before anything is sent."""

    def __init__(self, fields: Mapping[str, Template], *, dates: Collection[str], documents: Collection[str]) -> None:
        self._fields: list[tuple[str, Render, Callable[[Any], Any]]] = [
            (name, compile_template(template), _date if name in dates else _nested if name in documents else _plain)
            for name, template in fields.items()
        ]

    def values(self, record: Record) -> dict[str, Any]:
        """Field -> value."""
        found = {}
        for name, render, convert in self._fields:
            value = render(record)
            if value is not None:
                try:
                    value = convert(value)
                except (ValueError, OverflowError) as error:
                    raise ValueError(f"{name}: {error}") from None
            found[name] = value
        if found.get("_id", 0) is None:
            del found["_id"]  # nobody vouches for a message id: the server makes one
        return found


def encoded(values: Mapping[str, Any]) -> bytes:
    """The document in BSON; ValueError when it cannot be one."""
    try:
        document = bson.encode(values)
    except (BSONError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if len(document) > _LARGEST:
        raise ValueError(f"it has {len(document)} bytes, MongoDB takes {_LARGEST}")
    return document


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
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
