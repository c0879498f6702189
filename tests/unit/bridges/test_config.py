"""`[bridges.mqtt]`: what it accepts and what session it asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bridges.mqtt import BACKEND, MqttConfig, open_mqtt
from broker.extend.registry import load

EXAMPLE = """
kind = "mqtt"
servers = ["mqtt://127.0.0.1:1884"]
protocol = "auto"
clientid = "region-1"
username = "region-1"
password = "secret"
restart = { base = "1s", cap = "30s" }
queue = { max_bytes = "1GB", overflow = "reject", max_age = "1d" }
[[topics]]
filter = "telemetry/#"
direction = "out"
qos = 1
remote_prefix = "region-1/"
[[topics]]
filter = "commands/#"
direction = "in"
qos = 1
remote_prefix = "region-1/"
"""


def make(**keys: Any) -> MqttConfig:
    config = MqttConfig.model_validate({"servers": ["mqtt://far"], "topics": [{"filter": "#"}], **keys})
    config.named("hq")
    return config


def test_the_shipped_example_is_understood_key_by_key() -> None:
    config = MqttConfig.model_validate(tomllib.loads(EXAMPLE))
    assert config.servers == ("mqtt://127.0.0.1:1884",)
    assert (config.restart.base, config.restart.cap) == (1.0, 30.0)
    spec = config.session()
    assert spec.filters == (("telemetry/#", 1),)
    assert (spec.max_bytes, spec.overflow, spec.max_age) == (1 << 30, "reject", 86_400.0)
    assert (spec.retained, spec.upgrade_qos) == ("new", False)
    assert spec.no_local
    assert spec.retain_as_published


def test_the_session_holds_out_and_both_with_their_local_prefix() -> None:
    lines = [
        {"filter": "a", "qos": 1, "local_prefix": "x/"},
        {"filter": "b", "qos": 2, "direction": "both"},
        {"filter": "c", "qos": 2, "direction": "in"},
        {"filter": "b", "qos": 0},
    ]
    assert make(topics=lines).session().filters == (("x/a", 1), ("b", 2))


def test_the_registry_finds_it() -> None:
    assert load("bridges", "mqtt") is BACKEND


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"servers": []}, "at least 1"),
        ({"servers": ["mqtt://a", "mqtt://a:1883"]}, "twice"),
        ({"servers": ["http://a"]}, "unknown scheme"),
        ({"topics": []}, "at least 1"),
        ({"tls": {"insecure": True}}, "no server uses it"),
        ({"servers": ["mqtts://a"], "tls": {"key": "k.pem"}}, "needs tls.certificate"),
        ({"clean_session": True, "session_expiry": "1h"}, "no meaning"),
        ({"restart": {"base": "5s", "cap": "1s"}}, "shorter"),
        ({"notification_topic": "a/#"}, "wildcard"),
        ({"password": "p", "protocol": "3.1.1"}, "needs username"),
        ({"receive_maximum": 0}, "greater than or equal to 1"),
        ({"round_robbin": True}, "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make(**keys)


def test_b11_the_password_is_in_no_text_of_the_configuration() -> None:
    config = make(username="u", password="hunter2")
    assert "hunter2" not in repr(config) + str(config.model_dump()) + config.model_dump_json()


async def test_b10_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("")
    for ca in (empty, tmp_path / "missing.pem"):
        with pytest.raises(ValueError, match=r"bridges\.hq\.tls\.ca: cannot use .*pem"):
            await open_mqtt(make(servers=["mqtts://far"], tls={"ca": str(ca)}))
    with pytest.raises(ValueError, match=r"bridges\.hq\.tls\.certificate"):
        await open_mqtt(make(servers=["mqtts://far"], tls={"certificate": str(empty)}))
