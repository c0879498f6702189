"""What changes in a configuration that is run beside somebody else's broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sinks
from broker.config.settings import Instance, Settings, restore
from broker.config.template import Template
from broker.extend.session import SessionSpec
from broker.runtime.foreign import Refused, _subscriptions, adapt

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


def test_subscriptions_carry_the_options_of_the_session() -> None:
    spec = SessionSpec(filters=(("a/#", 2), ("b", 0)))
    assert _subscriptions("x", spec) == [("a/#", 2 | 4 | 8 | 0x20), ("b", 4 | 8 | 0x20)]
    asks = SessionSpec(filters=(("a", 1),), retained="always", no_local=False, retain_as_published=False)
    assert _subscriptions("x", asks) == [("a", 1)]
    shared = SessionSpec(filters=(("a", 1),), lanes=2, retained="new")
    assert _subscriptions("x", shared) == [("$share/isthmus-x/a", 1 | 8 | 0x10)], "never No Local [MQTT-3.8.3-4]"
