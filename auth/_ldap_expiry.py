"""When an account of a directory ends, in the ways directories write it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

from broker.connectors.ldap import Entry

NEVER = (0, 0x7FFFFFFFFFFFFFFF)
"""What Active Directory writes for accounts without an end."""
EPOCH = 11_644_473_600
"""Seconds from 1601, where Active Directory begins to count, to 1970."""
_GENERALIZED = re.compile(r"(\d{4})(\d\d)(\d\d)(\d\d)(?:(\d\d)(\d\d)?)?(?:[.,]\d+)?(?:Z|([+-])(\d\d)(\d\d)?)")


def expiry_of(entry: Entry, name: str) -> float | None:
    """Seconds since 1970; None when the entry does not end. ValueError when that cannot be read."""
    values = entry.texts(name)
    if not values:
        if entry.attributes.get(name.lower()):
            raise ValueError("is no text")
        return None
    if len(values) > 1:
        raise ValueError("has several values")
    text = values[0].strip()
    if name.lower() == "accountexpires":
        ticks = _number(text)
        return None if ticks in NEVER else ticks / 10_000_000 - EPOCH
    if name.lower() == "shadowexpire":
        days = _number(text)
        return None if days < 0 else days * 86_400.0
    return generalized_time(text)


def generalized_time(text: str) -> float:
    """Seconds since 1970 of a time such as ``20271231235959Z``. ValueError. RFC 4517 3.3.13."""
    match = _GENERALIZED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is no generalized time such as 20271231235959Z")
    *date, sign, hours, minutes = match.groups()
    shift = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    zone = UTC if sign is None else timezone(-shift if sign == "-" else shift)
    return datetime(*(int(part or 0) for part in date), tzinfo=zone).timestamp()  # type: ignore[misc, arg-type]


def _number(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text):
        raise ValueError(f"{text[:40]!r} is no number")
    return int(text)
