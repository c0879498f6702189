"""JSON that is written around what devices send."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.config.template import MissingValue, Template
from broker.connectors.json_text import compile_value, is_json
from broker.extend.record import compile_template
from broker.extend.sink import Record

NASTY = (
    '"', "\\", '\\"', '","admin":true,"x":"', '"}\n{"admin":true}', "a\nb", "\u0000\u001f", "\u20ac\U0001f600", "}",
    "]", "${topic}", " ", "",
)  # fmt: skip


def written(template: str, record: Record) -> str:
    assert is_json(Template(template))
    found = compile_value(Template(template))(record)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(
    "text", ["${payload}", "${.}", "a ${topic}", '{"v": ${payload.v}', '"${topic}"', "{}", "{${topic}}"]
)
def test_what_is_no_json_around_placeholders_is_written_as_any_template(text: str) -> None:
    record = Record("a", b'"', clientid="c")
    assert not is_json(Template(text))
    assert compile_value(Template(text))(record) == compile_template(Template(text))(record)


@pytest.mark.parametrize("text", NASTY)
def test_s29_what_a_device_sends_stays_in_its_place(text: str) -> None:
    """S-29: as topic, client id, user property, field and payload; one record in, one record out."""
    record = Record(
        text or "t", json.dumps({"v": text}).encode(), clientid=text, user_properties=[("unit", text)], username=None
    )
    whole = written(
        '{"t": "at ${topic}", "c": ${clientid}, "u": "${user_property.unit}", "v": ["${payload.v}", ${payload.v}], '
        '"\\"q": "${payload}", "p": ${payload}, "n": ${username}, "e": ${.}}', record,
    )  # fmt: skip
    assert "\n" not in whole
    found = json.loads(whole)
    assert found.pop("e")["payload"] == record.payload.decode()
    assert found == {
        "t": f"at {text or 't'}", "c": text, "u": text, "v": [text, text], '"q': record.payload.decode(),
        "p": {"v": text}, "n": None,
    }  # fmt: skip


@pytest.mark.parametrize("payload", [b"{", b"1,2", b'1}, {"admin": true', b"", b"\xff", b"NaN"])
def test_s29_a_payload_that_is_no_json_is_not_put_where_json_is_wanted(payload: bytes) -> None:
    """S-29."""
    with pytest.raises(ValueError, match=r"line 1 column|str is not valid UTF-8"):
        written('{"p": ${payload}}', Record("t", payload))


def test_bytes_that_are_no_text_cannot_stand_between_quotes() -> None:
    with pytest.raises(ValueError, match="payload is no text"):
        written('{"p": "${payload}"}', Record("t", b"\xff"))


def test_s25_what_is_missing_is_null_and_never_a_text() -> None:
    """S-25: where a text is wanted there is none to write."""
    assert written('{"v": ${payload.v}}', Record("t", b"{}")) == '{"v": null}'
    with pytest.raises(MissingValue, match=r"\$\{payload.v\} has no value"):
        written('{"v": "${payload.v}"}', Record("t", b"{}"))


@pytest.mark.parametrize("value", [1, 1.5, True, None, "1", [1, {"a": 2}]])
def test_values_keep_their_type_outside_quotes(value: Any) -> None:
    record = Record("t", json.dumps({"v": value}).encode(), qos=1, retain=True)
    assert json.loads(written('{"v": ${payload.v}, "q": ${qos}, "r": ${retain}}', record)) == {
        "v": value, "q": 1, "r": True,
    }  # fmt: skip
