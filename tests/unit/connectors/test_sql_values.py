"""Values of records as values of columns."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from broker.config.template import Template
from broker.connectors import sql_values as to

NOON = datetime(2026, 2, 3, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("convert", "value", "expected"),
    [
        (to.text, "a\0", "a\0"), (to.text, b"\xc3\xa4", "\u00e4"), (to.text, 1.5, "1.5"), (to.text, True, "true"),
        (to.text, {"a": [None]}, '{"a":[null]}'), (to.binary, "\u00e4", b"\xc3\xa4"), (to.binary, b"\xff", b"\xff"),
        (to.Whole(-128, 127), "-128", -128), (to.Whole(0, 9), b" 7 ", 7), (to.Whole(0, 9), 4.0, 4),
        (to.Whole(0, 9), True, 1), (to.Real(), 5, 5.0), (to.Real(), ".5e1", 5.0), (to.Real(), b"-0", 0.0),
        (to.decimal, 0.1, Decimal("0.1")), (to.decimal, "1e3", Decimal("1000")), (to.decimal_text, 12.50, "12.5"),
        (to.boolean, "Yes", True), (to.boolean, 0, False), (to.boolean, b"off", False), (to.boolean, True, True),
        (to.moment, 1770120000000, NOON), (to.moment, "1770120000000", NOON), (to.moment, "2026-02-03T12:00Z", NOON),
        (to.moment, "2026-02-03T13:00:00+01:00", NOON), (to.moment, "2026-02-03 12:00", NOON),
        (to.moment_text, 1770120000001, "2026-02-03 12:00:00.001000"), (to.day, 1770120000000, date(2026, 2, 3)),
        (to.day_text, "2026-02-03T23:00-02:00", "2026-02-04"), (to.packed_hex, "00ff" * 8, b"\x00\xff" * 8),
        (to.json_value, "C", '"C"'), (to.json_value, b"x", '"x"'), (to.json_value, [1], "[1]"),
    ],
)  # fmt: skip
def test_what_fits(convert: to.Convert, value: Any, expected: Any) -> None:
    assert convert(value) == expected
    assert type(convert(value)) is type(expected)
    assert convert(None) is None


@pytest.mark.parametrize(
    ("convert", "value", "reason"),
    [
        (to.text, b"\xff", "no UTF-8"), (to.text_without_nul, "a\0b", r"U\+0000"), (to.Whole(0, 255), 256, "outside"),
        (to.Whole(0, 255), "1_0", "whole number"), (to.Whole(0, 255), 1.5, "whole number"),
        (to.Whole(0, 255), float("inf"), "whole number"), (to.Whole(0, 255), [1], r"'\[1\]' is not"),
        (to.Real(), "nan", "is not a number"), (to.Real(), "1e999", "too large"), (to.Real(3.4e38), 1e39, "too large"),
        (to.Real(), True, "is not a number"), (to.decimal, "0x1", "is not a number"),
        (to.boolean, 2, "true or false"), (to.boolean, "maybe", "true or false"), (to.moment, True, "is not a time"),
        (to.moment, "yesterday", "is not a time"), (to.moment, 1e300, "is not a time"),
        (to.moment, {}, "is not a time"), (to.packed_hex, "xyz", "."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(convert: to.Convert, value: Any, reason: str) -> None:
    with pytest.raises((ValueError, OverflowError), match=reason):
        convert(value)


def test_a_value_that_is_long_is_shown_shortened() -> None:
    with pytest.raises(ValueError, match=r"^'x{40}' is not a number$"):
        to.Real()("x" * 10_000)


@pytest.mark.parametrize(
    ("template", "whole"),
    [("${payload}", True), ("${.}", True), ('{"a": ${payload.a}}', True), ("${payload.a}", False), ("${topic}", False)],
)
def test_which_templates_yield_json(template: str, whole: bool) -> None:
    assert to.is_json_text(Template(template)) is whole
