"""Records as rows: by column and by row it is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from broker.config.template import Template
from broker.connectors import sql_values as to
from broker.connectors.sql_rows import Cell, _row_by_row, rows
from broker.extend.sink import Record

CONVERTERS: list[to.Convert] = [
    to.text, to.text_without_nul, to.binary, to.Whole(-100, 1 << 60), to.Real(), to.Real(10.0), to.decimal, to.boolean,
    to.moment, to.local_moment, to.day_text, to.moment_text, to.json_value,
]  # fmt: skip
TEMPLATES = (
    "${msgid}", "${ts}", "${qos}", "${retain}", "${username}", "${topic}", "${topic[1]}", "${payload}", "${payload.v}",
    "${payload.a.b}", "${payload.l[0]}", "fixed", "17", "at ${topic}", "${user_property.x}", "${.}",
)  # fmt: skip
GOOD = Record(
    "t/a", b'{"v": 1.5, "a": {"b": 3}, "l": [1]}', 1, False, "c", "u", "127.0.0.1", "a" * 32, 1_770_000_000_000
)


def like(**changes: Any) -> Record:
    return replace(GOOD, **changes)


ODD = [
    like(payload=b"no json"), like(payload=b"[1, 2]"), like(payload=b'"v"'), like(payload=b"null"), like(payload=b"{}"),
    like(payload=b'{"v": null, "a": null}'), like(payload=b'{"v": "x\\u0000y", "a": {}}'), like(payload=b'{"v": true}'),
    like(payload=b'{"v": 1}'), like(payload=b'{"v": 11.5}'), like(payload=b'{"v": [1], "a": {"b": {}}}'),
    like(payload=b'{"v": 99999999999999999999}'), like(payload=b"\xff"), like(ts=0), like(ts=1_770_000_000_001),
    like(msgid=None), like(username=None), like(payload=b"["  * 3_000),
]  # fmt: skip


@pytest.mark.parametrize(
    "convert", CONVERTERS, ids=lambda convert: getattr(convert, "__name__", type(convert).__name__)
)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("required", [False, True])
def test_a_batch_becomes_what_each_of_its_records_becomes(template: str, convert: to.Convert, required: bool) -> None:
    cells = [Cell("id", Template("${msgid}"), to.text, False), Cell("x", Template(template), convert, required)]
    for odd in ODD:
        for batch in ([GOOD, odd, GOOD], [odd, odd], [GOOD, GOOD]):
            assert repr(rows(cells, batch)) == repr(_row_by_row(cells, batch))


def test_rows_keep_their_positions_and_name_the_column() -> None:
    cells = [
        Cell("id", Template("${msgid}"), to.text_without_nul, True),
        Cell("v", Template("${payload.v}"), to.Real(), False),
        Cell("where", Template("at ${topic}"), to.text_without_nul, False),
    ]
    records = [
        Record("t", b'{"v": 1}', msgid="a"), Record("t", b'{"v": "x"}', msgid="b"), Record("t", b'{"v": 2}'),
        Record("u", b"no json", msgid="c"),
    ]  # fmt: skip
    positions, made, failed = rows(cells, records)
    assert (positions, made) == ([0, 3], [("a", 1.0, "at t"), ("c", None, "at u")])
    assert failed == {
        1: "column v: 'x' is not a number", 2: "column id: must not be null, and ${msgid} has no value",
    }  # fmt: skip


def test_well_formed_batches_are_made_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.connectors.sql_rows._row_by_row", lambda cells, records: pytest.fail("row by row"))
    cells = [
        Cell("id", Template("${msgid}"), to.text_without_nul, True),
        Cell("time", Template("${ts}"), to.moment, True),
        Cell("v", Template("${payload.v}"), to.Real(), False),
        Cell("none", Template("${payload.none}"), to.Whole(0, 1), False),
    ]
    positions, made, failed = rows(cells, [GOOD, like(ts=1_770_000_000_001)])
    assert (positions, failed) == ([0, 1], {})
    assert [row[2:] for row in made] == [(1.5, None), (1.5, None)]
