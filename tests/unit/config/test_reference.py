"""The reference is complete, says what the models say, and the file in the repository is the one that is printed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from broker.config import reference
from broker.config.settings import ROOMS, SECTIONS
from broker.config.template import Template
from broker.config.types import Address, ConfigPath, Duration, Secret, Size
from broker.extend import registry

ROOT = Path(__file__).resolve().parent.parent.parent.parent


@pytest.fixture(autouse=True)
def _backends() -> None:
    """The real ones, not the doubles of this folder's other tests."""


def test_the_file_is_the_one_that_is_printed_now() -> None:
    written = (ROOT / "REFERENCE.md").read_text("utf-8")
    assert written == reference.reference(), "REFERENCE.md is stale: run make reference"


def models() -> Iterator[type[BaseModel]]:
    yield from SECTIONS.values()
    yield from reference.COMMON.values()
    yield from (registry.load(room, kind).config for room in ROOMS for kind in registry.kinds(room))


def test_every_key_has_a_meaning() -> None:
    assert [(model.__name__, row.key) for model in models() for row in reference.rows(model) if not row.meaning] == []


def test_every_key_has_a_type() -> None:
    """What is said to hold any value does: filters of MongoDB, and rules, whose keys decide about each other."""
    loose = {(model.__name__, row.key) for model in models() for row in reference.rows(model) if "any" in row.type}
    assert loose == {("MongoConfig", "user_filter"), ("MongoConfig", "acl_filters"), ("StaticConfig", "rules")}


class Inner(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    size: Size = 1 << 20
    """Bytes."""
    deep: str
    """Text."""


class Outer(BaseModel):
    """A model with one key of each type."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    word: Literal["a", "b"] = "a"
    """One of
    two."""
    many: int = Field(default=10_000, ge=1, le=20_000)
    time: Annotated[Duration, Field(gt=0, le=60)] | None = None
    rate: float = 0.5
    switch: bool = True
    path: ConfigPath
    secret: Secret = Secret()
    texts: tuple[Template, ...] = (Template("${clientid}"),)
    place: Address = Address("::1", 1)
    inner: Inner = Inner(size=2048, deep="x")
    named: dict[str, Inner] = {}
    listed: tuple[Inner, ...] = ()
    either: bool | Inner = False


def test_types_defaults_and_nested_tables_are_put_into_words() -> None:
    found: dict[str, Any] = {row.key: row[1:3] for row in reference.rows(Outer)}
    assert found == {
        "word": ('`"a"` | `"b"`', '`"a"`'),
        "many": ("whole number, 1 to 20_000", "`10_000`"),
        "time": ("duration, over 0s to 1m", ""),
        "rate": ("number", "`0.5`"),
        "switch": ("boolean", "`true`"),
        "path": ("path", "**required**"),
        "secret": ("secret", '`""`'),
        "texts": ("list of templates", '`["${clientid}"]`'),
        "place": ("address `HOST:PORT`", '`"[::1]:1"`'),
        "inner": ("table", ""),
        "inner.size": ("size", '`"2KB"`'),
        "inner.deep": ("text", '`"x"`'),
        "named": ("table of tables", "`{}`"),
        "named.NAME.size": ("size", '`"1MB"`'),
        "named.NAME.deep": ("text", "**required**"),
        "listed": ("list of tables", "`[]`"),
        "listed[].size": ("size", '`"1MB"`'),
        "listed[].deep": ("text", "**required**"),
        "either": ("boolean or table", "`false`"),
        "either.size": ("size", '`"1MB"`'),
        "either.deep": ("text", "**required**"),
    }
    assert next(reference.rows(Outer)).meaning == "One of two."


def test_a_pipe_in_a_cell_does_not_end_it() -> None:
    lines = [line for line in reference.reference("store").splitlines() + reference.reference("broker").splitlines()]
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) >= 10
    assert {line.replace(r"\|", "").count("|") for line in tables} == {5}


@pytest.mark.parametrize(
    ("topic", "headings"),
    [
        ("limits", ["## limits"]),
        ("auth.ldap", ["### auth.ldap"]),
        ("mongodb", ["### auth.mongodb", "### sinks.mongodb"]),
        ("listeners.tls", ["### listeners.tls"]),
        ("bridges", ["## bridges", "### bridges.mqtt"]),
    ],
)
def test_one_topic_is_printed_alone(topic: str, headings: list[str]) -> None:
    lines = reference.reference(topic).splitlines()
    inside = False
    found = []
    for line in lines:
        inside ^= line.startswith("```")
        if line.startswith("##") and not inside:
            found.append(line)
    assert found == headings


def test_a_kind_shows_its_own_keys_and_not_those_of_its_room() -> None:
    text = reference.reference("sinks.kafka")
    assert "| `servers` |" in text
    assert "| `lanes` |" not in text
    assert "| `lanes` |" in reference.reference("sinks")
    assert "| `batch.max_records` | whole number, 1 to 1_000_000 | `500` |" in reference.reference("sinks.http")


@pytest.mark.parametrize(
    ("topic", "text"),
    [
        ("auth.ldpa", "did you mean ldap?"),
        ("limit", "did you mean limits?"),
        ("listeners.quic", "tcp, tls"),
        ("", "access"),
    ],
)
def test_an_unknown_topic_names_the_nearest(topic: str, text: str) -> None:
    with pytest.raises(reference.UnknownTopic) as caught:
        reference.reference(topic)
    assert text in str(caught.value)


def test_examples_in_the_text_are_whole_fragments() -> None:
    parts = reference.reference().split("```toml\n")[1:]
    assert len(parts) == len(reference.fragments())
    for part in parts:
        assert tomllib.loads(part.partition("```\n")[0])


def test_without_a_checkout_examples_are_taken_from_where_fragments_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHECKOUT", tmp_path / "nowhere")
    monkeypatch.setattr(reference, "SYSTEM", tmp_path / "etc")
    monkeypatch.chdir(tmp_path)
    assert reference.fragments() == []
    assert reference.reference("sinks.kafka").startswith("### sinks.kafka\n"), "the keys are told all the same"
    for folder in ("etc", "conf.d"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "30.toml.example").write_text(f'[sinks.{folder.replace(".", "")}]\nkind = "kafka"\n')
        assert f"[sinks.{folder.replace('.', '')}]" in reference.reference("sinks.kafka")


def test_fragments_in_force_are_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold secrets, also those with the name of a shipped one."""
    monkeypatch.setattr(reference, "CHECKOUT", tmp_path / "conf.d")
    (tmp_path / "conf.d").mkdir()
    names = ("00-broker.toml", "10-accounts.toml", "30-sink-kafka.toml", "90-own.local.toml")
    for number, name in enumerate(names):
        secret = f'[sinks.s{number}]\nkind = "kafka"\nservers = ["hunter2:1"]\n'
        (tmp_path / "conf.d" / name).write_text(secret)
    (tmp_path / "conf.d" / "30-sink-kafka.toml.example").write_text('[sinks.shown]\nkind = "kafka"\n')
    shipped = sorted(path.name for path in (ROOT / "broker" / "defaults" / "conf.d").iterdir())
    found = [path.name for path in reference.fragments()]
    assert found == sorted([*shipped, "30-sink-kafka.toml.example"])
    for text in (reference.reference(), reference.reference("sinks.kafka")):
        assert "hunter2" not in text
        assert "[sinks.shown]" in text


def test_every_shipped_fragment_is_in_the_reference() -> None:
    """And as it is in the folder of a checkout."""
    conf = ROOT / "conf.d"
    examples = [path for path in conf.iterdir() if path.suffix == ".example"]
    packaged = list((ROOT / "broker" / "defaults" / "conf.d").iterdir())
    assert {path.name for path in reference.fragments()} == {path.name for path in (*examples, *packaged)}
    for path in packaged:
        assert path.read_text("utf-8") == (conf / path.name).read_text("utf-8"), path.name


def test_a_kind_whose_driver_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(room: str, kind: str) -> registry.Backend:
        raise registry.MissingDriver(f"{room}.{kind} needs the package 'x': pip install 'isthmus[{kind}]'")

    monkeypatch.setattr(registry, "load", load)
    assert "Cannot be described here: sinks.kafka needs" in reference.reference("sinks.kafka")
