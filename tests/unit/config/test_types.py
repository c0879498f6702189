"""Durations, sizes, secrets, paths, addresses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from broker.access.passwords import Form
from broker.config.template import Template
from broker.config.types import (
    Address,
    CompiledText,
    ConfigPath,
    Duration,
    Secret,
    Size,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from broker.extend.condition import Condition


class Model(BaseModel):
    wait: Duration = 1.0
    room: Size = 1
    word: Secret = Secret()
    place: ConfigPath | None = None
    bind: Address | None = None


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("5s", 5),
        ("250ms", 0.25),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1.5 s", 1.5),
        ("0s", 0),
        ("7d", 604800),
        (3, 3),
        (0.5, 0.5),
        ("10", 10),
    ],
)
def test_durations_are_read_in_units(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written", ["5MB", "", "s", "-1s", -1, "5 apples", "1e400", float("inf"), float("nan"), True, 2**80, "٣s", None, []]
)
def test_c20_what_is_no_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"duration|between"):
        parse_duration(written)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("64MB", 64 << 20),
        ("896KB", 896 * 1024),
        ("1GB", 1 << 30),
        ("1.5MiB", 1572864),
        ("10", 10),
        ("7B", 7),
        (0, 0),
        ("2g", 2 << 30),
    ],
)
def test_sizes_are_powers_of_1024(written: object, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["5s", "", "MB", "-1MB", -1, 2**63, 1.5, True, "1MB2KB", "9000000000000TB", None])
def test_c20_what_is_no_size_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"size|between"):
        parse_size(written)


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_a_size_survives_being_written_and_read(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(min_value=0, max_value=10**9))
def test_a_duration_survives_being_written_and_read(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


def test_a_secret_shows_in_no_way_but_reveal() -> None:
    model = Model.model_validate({"word": "hunter2"})
    shown = [repr(model), str(model), str(model.model_dump()), model.model_dump_json(), f"{model.word}"]
    assert not any("hunter2" in text for text in shown)
    assert model.word.reveal() == "hunter2"


def test_a_secret_of_the_wrong_type_is_not_quoted_in_the_error() -> None:
    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"word": 4711})
    assert "expected text" in str(caught.value.errors(include_input=False))


def test_relative_paths_start_at_the_base_and_absolute_ones_stay() -> None:
    def path(text: str) -> Path | None:
        return Model.model_validate({"place": text}, context={"base": "/etc/isthmus"}).place

    assert path("tls/ca.pem") == Path("/etc/isthmus/tls/ca.pem")
    assert path("/run/x") == Path("/run/x")
    assert Model.model_validate({"place": "x"}).place == Path.cwd() / "x"


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_c12_an_impossible_path_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Model.model_validate({"place": text})


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:1883", "127.0.0.1", 1883, True),
        ("[::1]:0", "::1", 0, True),
        ("0.0.0.0:1", "0.0.0.0", 1, False),
        ("*:1883", "*", 1883, False),
        ("localhost:1883", "localhost", 1883, True),
        ("broker.example.com:8883", "broker.example.com", 8883, False),
    ],
)
def test_addresses_know_whether_they_can_be_reached_from_elsewhere(
    text: str, host: str, port: int, loopback: bool
) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, address.loopback, str(address)) == (host, port, loopback, text)


@pytest.mark.parametrize(
    "text", ["1883", ":1883", "host", "host:", "host:65536", "::1:1883", "[::1", "[x]:1", "host:-1", "h:1a"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|port|brackets"):
        Address.parse(text)


def test_every_type_has_a_json_schema() -> None:
    assert set(Model.model_json_schema()["properties"]) == {"wait", "room", "word", "place", "bind"}
    assert json.loads(Model(bind=Address("h", 1)).model_dump_json())["bind"] == "h:1"


@pytest.mark.parametrize(
    ("kind", "text", "wrong", "sentence"),
    [
        (Template, "a/${username}", "${", "without }"),
        (Condition, "payload.value > 10", "payload.value >", "a value is expected here"),
        (Form, "sha256,salt", "md6", "is no form of a password"),
    ],
)
def test_what_is_compiled_from_text_is_written_back_as_it_was_read(
    kind: type[CompiledText], text: str, wrong: str, sentence: str
) -> None:
    adapter: TypeAdapter[CompiledText] = TypeAdapter(kind)
    value = adapter.validate_python(text)
    assert type(value) is kind
    assert adapter.validate_python(value) is value
    assert (str(value), repr(value)) == (text, f"{kind.__name__}({text!r})")
    assert adapter.dump_json(value) == json.dumps(text).encode()
    assert value == kind(text)
    assert hash(value) == hash(kind(text))
    assert value not in (kind("auto" if kind is Form else "qos"), text)
    assert "string" in str(adapter.json_schema())
    with pytest.raises(ValidationError) as caught:
        adapter.validate_python(wrong)
    assert sentence in str(caught.value)
    with pytest.raises(ValidationError) as caught:
        adapter.validate_python(7)
    assert kind.expected in str(caught.value)


def test_a_form_of_passwords_may_be_a_table_too() -> None:
    adapter = TypeAdapter(Form)
    assert adapter.validate_python({"name": "sha256", "salt_position": "prefix"}) == Form("salt,sha256")
