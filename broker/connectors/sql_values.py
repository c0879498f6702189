"""How values of records become values of columns. A converter takes None for NULL and raises ValueError, in words fit
for a dead letter, for what its column cannot hold. Knows no driver.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import orjson

from broker.config.template import Placeholder, Template
from broker.extend.record import to_bytes, to_text

Convert = Callable[[Any], Any]

_INTEGERS: set[type] = {int}
_FLOATS: set[type] = {float}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,5})?")
_YES = frozenset({"true", "t", "yes", "on", "1"})
_NO = frozenset({"false", "f", "no", "off", "0"})


def text(value: Any) -> str | None:
    """Text as it is, bytes as UTF-8, the rest as JSON."""
    if type(value) is str or value is None:
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("bytes that are no UTF-8 do not fit into text") from None
    return orjson.dumps(value).decode()


def text_without_nul(value: Any) -> str | None:
    """The same for a database whose text cannot hold U+0000."""
    out = text(value)
    if out is not None and "\0" in out:
        raise ValueError("a text with U+0000 does not fit")
    return out


def binary(value: Any) -> bytes | None:
    """Bytes as they are, text as UTF-8, the rest as JSON."""
    return to_bytes(value)


def packed_hex(value: Any) -> bytes | None:
    """A message id as its sixteen bytes."""
    return None if value is None else bytes.fromhex(value)


class Whole:
    """Whole numbers of a range; true and false are 1 and 0."""

    def __init__(self, low: int, high: int) -> None:
        self._low = low
        self._high = high

    def __call__(self, value: Any) -> int | None:
        if value is None:
            return None
        number = value
        if isinstance(value, str | bytes):
            words = _words(value)
            number = int(words) if _WHOLE.fullmatch(words) else _wrong(value, "a whole number")
        elif isinstance(value, float) and value.is_integer():
            number = int(value)
        elif not isinstance(value, int):
            _wrong(value, "a whole number")
        if not self._low <= number <= self._high:
            raise ValueError(f"{number} is outside {self._low} … {self._high}")
        return int(number)

    def fits(self, kinds: set[type], values: list[Any]) -> bool:
        """Whether all of these are what they would be converted to."""
        return kinds == _INTEGERS and self._low <= min(values) and max(values) <= self._high


class Real:
    """Floating point numbers up to `most`."""

    def __init__(self, most: float = math.inf) -> None:
        self._most = most

    def __call__(self, value: Any) -> float | None:
        if type(value) is float and -self._most <= value <= self._most:
            return value
        if value is None:
            return None
        number = float(_number(value))
        if not -self._most <= number <= self._most or math.isinf(number):
            raise ValueError(f"{_short(value)} is too large a number")
        return number

    def fits(self, kinds: set[type], values: list[Any]) -> bool:
        """Whether all of these are what they would be converted to."""
        return kinds == _FLOATS and -self._most <= min(values) and max(values) <= self._most


def decimal(value: Any) -> Decimal | None:
    """Numbers as they are written."""
    return None if value is None else Decimal(_number(value))


def decimal_text(value: Any) -> str | None:
    """The same as text."""
    return None if value is None else _number(value)


def boolean(value: Any) -> bool | None:
    """true and false, 1 and 0, and their words."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return value == 1
    if isinstance(value, str | bytes) and (word := _words(value).lower()) in _YES | _NO:
        return word in _YES
    return _wrong(value, "true or false")  # type: ignore[no-any-return]


def moment(value: Any) -> datetime | None:
    """Numbers are milliseconds since 1970, text is ISO 8601, in UTC unless it says otherwise."""
    if value is None:
        return None
    try:
        if type(value) is int:
            return _EPOCH + timedelta(0, 0, 0, value)
        if isinstance(value, float):
            return _EPOCH + timedelta(milliseconds=value)
        if isinstance(value, str | bytes):
            words = _words(value)
            if _NUMBER.fullmatch(words) and "-" not in words:
                return _EPOCH + timedelta(milliseconds=float(words))
            found = datetime.fromisoformat(words)
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        pass
    return _wrong(value, "a time: milliseconds since 1970, or ISO 8601")  # type: ignore[no-any-return]


def local_moment(value: Any) -> datetime | None:
    """The same for a column without a time zone: UTC."""
    found = moment(value)
    return None if found is None else found.replace(tzinfo=None)


def day(value: Any) -> date | None:
    """The day of a moment in UTC."""
    found = moment(value)
    return None if found is None else found.date()


def moment_text(value: Any) -> str | None:
    """A moment in UTC as SQL writes it."""
    found = local_moment(value)
    return None if found is None else found.isoformat(" ")


def day_text(value: Any) -> str | None:
    """A day as SQL writes it."""
    found = day(value)
    return None if found is None else found.isoformat()


def json_value(value: Any) -> str | None:
    """A value as JSON text."""
    return None if value is None else orjson.dumps(value.decode() if isinstance(value, bytes) else value).decode()


def is_json_text(template: Template) -> bool:
    """Whether what the template yields is JSON already: a whole payload, an envelope, or JSON written around values."""
    if len(template.segments) != 1 or not isinstance(template.segments[0], Placeholder):
        return True
    return template.segments[0].name in ("payload", ".")


def _words(value: str | bytes) -> str:
    return (value if isinstance(value, str) else value.decode("utf-8", "replace")).strip()


def _number(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    if isinstance(value, str | bytes) and _NUMBER.fullmatch(words := _words(value)):
        return words
    return _wrong(value, "a number")  # type: ignore[no-any-return]


def _wrong(value: Any, wanted: str) -> Any:
    raise ValueError(f"{_short(value)} is not {wanted}")


def _short(value: Any) -> str:
    shown = to_text(value)
    return repr(shown if len(shown) <= 40 else shown[:40])
