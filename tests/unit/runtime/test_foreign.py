"""What changes in a configuration that is run beside somebody else's broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sinks
from broker.config.settings import Instance, Settings, restore
from broker.config.template import Template
from broker.extend.session import SessionSpec
from broker.runtime.adapt import Refused, adapt, without_effect
from broker.runtime.footprint import Footprint
from broker.runtime.foreign import _retained, _subscriptions

CODE = """
from pydantic import Field
from broker.config.template import Template
from broker.extend.record import RecordTemplate
from broker.extend.registry import Backend
from broker.extend.sink import SinkConfig
class Config(SinkConfig):
    key: RecordTemplate = Template("${clientid}")
    columns: dict[str, RecordTemplate] = Field(default={"a": Template("${msgid}"), "b": Template("${payload.x}")})
async def open_sink(config): ...
BACKEND = Backend("sinks.keyed", Config, open_sink)
"""


@pytest.fixture(autouse=True)
def _kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keyed.py").write_text(CODE)
    monkeypatch.setattr(sinks, "__path__", [*sinks.__path__, str(tmp_path)])


def instance(tmp_path: Path, **raw: Any) -> Instance:
    return restore("sinks", "k", {"kind": "keyed", "filters": ["#"], **raw}, tmp_path)


class Base(Settings):
    def __init__(self, base: Path) -> None:
        self.base = base

    def problem(self, key: str, text: str) -> str:
        return f"{key}: {text}"


def test_the_key_becomes_the_topic_and_columns_nobody_can_fill_go(tmp_path: Path) -> None:
    adapted = adapt(instance(tmp_path), Base(tmp_path))
    assert adapted.raw["key"] == "${topic}"
    assert adapted.raw["columns"] == {"b": "${payload.x}"}
    config: Any = restore("sinks", "k", adapted.raw, tmp_path).config
    assert config.key == Template("${topic}")


@pytest.mark.parametrize("name", ["clientid", "username", "peerhost", "msgid", "ts", "ts_iso", "node"])
def test_what_was_written_on_purpose_is_refused_not_replaced(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused) as caught:
        adapt(instance(tmp_path, key=f"x-${{{name}}}", columns={"c": f"${{{name}}}"}), Base(tmp_path))
    assert len(caught.value.problems) == 2
    assert "sinks.k.key" in caught.value.problems[1]
    assert "sinks.k.columns.c" in caught.value.problems[0]


def test_what_any_broker_tells_is_kept(tmp_path: Path) -> None:
    raw = {"key": "${topic[1]}", "columns": {"c": "${user_property.ts}", "d": "${payload.clientid}"}}
    adapted = adapt(instance(tmp_path, **raw), Base(tmp_path))
    assert {key: adapted.raw[key] for key in raw} == raw


def test_an_idempotency_key_gives_messages_an_id_that_nobody_has_to_vouch_for(tmp_path: Path) -> None:
    key = {"idempotency_key": "${payload.id}"}
    assert adapt(instance(tmp_path, **key), Base(tmp_path)).raw.get("columns") is None, "all of them can be filled"
    raw = {"key": "${msgid}", "columns": {"c": "${msgid}", "d": "${payload.x}"}, **key}
    assert adapt(instance(tmp_path, **raw), Base(tmp_path)).raw["columns"] == raw["columns"]
    with pytest.raises(Refused) as caught:
        adapt(instance(tmp_path, where="msgid != null", key="${ts}", **key), Base(tmp_path))
    assert ["sinks.k.key" in caught.value.problems[0], "sinks.k.where" in caught.value.problems[1]] == [True, True]
    with pytest.raises(Refused, match=r"sinks\.k\.idempotency_key: \${clientid} .*only Isthmus itself knows it"):
        adapt(instance(tmp_path, idempotency_key="${clientid}:${payload.id}"), Base(tmp_path))


def test_subscriptions_carry_the_options_of_the_session() -> None:
    spec = SessionSpec(filters=(("a/#", 2), ("b", 0)))
    assert _subscriptions("x", spec, 0x20) == [("a/#", 2 | 4 | 8 | 0x20), ("b", 4 | 8 | 0x20)]
    asks = SessionSpec(filters=(("a", 1),), no_local=False, retain_as_published=False)
    assert _subscriptions("x", asks, 0) == [("a", 1)]
    shared = SessionSpec(filters=(("a", 1),), lanes=2)
    assert _subscriptions("x", shared, 0x10) == [("$share/isthmus-x/a", 1 | 8 | 0x10)], "never No Local [MQTT-3.8.3-4]"


@pytest.mark.parametrize(
    ("retained", "of_a_new_session", "of_an_old_one"),
    [("never", 0x20, 0x20), ("new", 0x00, 0x20), ("always", 0x00, 0x10)],
)
def test_retained_messages_are_asked_for_once(retained: Any, of_a_new_session: int, of_an_old_one: int) -> None:
    spec = SessionSpec(filters=(("a", 1),), retained=retained)
    assert _retained(spec, True) == of_a_new_session
    assert _retained(spec, False) == of_an_old_one


def test_a_condition_that_asks_who_published_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"sinks\.k\.where: \${clientid} in .*only Isthmus itself knows it"):
        adapt(instance(tmp_path, where="payload.x > 1 and clientid == 'a'"), Base(tmp_path))
    adapt(instance(tmp_path, where="payload.clientid == 'username' and topic[0] != \"ts\""), Base(tmp_path))


def test_an_order_key_is_refused_where_the_broker_spreads_messages_as_it_likes(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"sinks\.k\.order_key"):
        adapt(instance(tmp_path, lanes=2, order_key="${topic}"), Base(tmp_path))
    adapt(instance(tmp_path, lanes=1, order_key="${topic}"), Base(tmp_path))
    adapt(instance(tmp_path, lanes=2), Base(tmp_path))


def test_keys_only_our_own_broker_obeys_are_told(tmp_path: Path) -> None:
    sentences = without_effect(instance(tmp_path, ack="delivered", queue={"max_bytes": "1MB"}), Base(tmp_path))
    assert ["sinks.k.ack" in sentences[0], "sinks.k.queue" in sentences[1], len(sentences)] == [True, True, 2]
    assert without_effect(instance(tmp_path), Base(tmp_path)) == []


def test_what_was_left_is_known_to_the_next_process_and_to_no_other_broker(tmp_path: Path) -> None:
    one, other = Footprint(tmp_path, "mqtt://one"), Footprint(tmp_path, "mqtt://other")
    one.note("k", "0", ["b", "a"])
    other.note("k", "0", ["c"])
    other.note("k", "1", ["c"])
    assert Footprint(tmp_path, "mqtt://one").of("k") == {"0": ["a", "b"]}
    other.note("k", "1", None)
    assert Footprint(tmp_path, "mqtt://other").of("k") == {"0": ["c"]}
    one.note("k", "0", None)
    assert one.instances() == []
    assert other.instances() == ["k"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mqtt://one": 3}'])
def test_a_damaged_note_is_taken_for_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "k.json").write_text(text)
    footprint = Footprint(tmp_path, "mqtt://one")
    assert footprint.of("k") == {}
    footprint.note("k", "0", ["a"])
    assert footprint.of("k") == {"0": ["a"]}


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "worker").write_text("a file")
    Footprint(tmp_path, "mqtt://one").note("k", "0", ["a"])
