"""`[bridges.mqtt]`: what it accepts and what session it asks for."""

from __future__ import annotations

import ssl
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bridges._mqtt_lanes import Nothing, Whole, sending
from bridges.mqtt import BACKEND, MqttConfig, open_mqtt
from broker.client.tls import knows_psk
from broker.extend.registry import load
from broker.mqtt.packets import Publish
from tests.unit.bridges.fakes import FakeConnection

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
        ({"servers": ["mqtts://a"], "tls": {"key": "k.pem"}}, "key needs certificate"),
        ({"servers": ["mqtts://a"], "tls": {"psk": "00"}}, "need each other"),
        ({"servers": ["mqtts://a"], "tls": {"psk_identity": "me"}}, "need each other"),
        ({"servers": ["mqtts://a"], "tls": {"psk": "0g", "psk_identity": "me"}}, "hexadecimal"),
        ({"servers": ["mqtts://a"], "tls": {"psk": "00", "psk_identity": "me", "ca": "a.pem"}}, "takes the place of"),
        ({"lanes": 2, "topics": [{"filter": "#", "direction": "both"}]}, "lanes = 1"),
        ({"lanes": 2, "topics": [{"filter": "a/#"}, {"filter": "a/+", "direction": "in"}]}, "share no topic"),
        ({"lanes": 0}, "greater than or equal to 1"),
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


@pytest.mark.parametrize("server", ["mqtt://far", "ws://far/mqtt", "mqtt://192.0.2.1"])
def test_a_password_crosses_no_network_in_the_clear_unless_it_is_written(server: str) -> None:
    with pytest.raises(ValidationError, match=r"in the clear; .* allow_cleartext = true"):
        make(servers=["mqtts://far", server], username="u", password="p")
    make(servers=[server], username="u", password="p", allow_cleartext=True)
    make(servers=[server], username="u")


@pytest.mark.parametrize("server", ["mqtts://far", "wss://far", "mqtt://127.0.0.2", "ws://[::1]", "unix:///run/x.sock"])
def test_a_password_goes_where_nobody_listens_in(server: str) -> None:
    make(servers=[server], username="u", password="p")


def test_b11_the_password_is_in_no_text_of_the_configuration() -> None:
    config = make(servers=["mqtts://far"], username="u", password="hunter2")
    assert "hunter2" not in repr(config) + str(config.model_dump()) + config.model_dump_json()


async def test_b10_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("")
    for ca in (empty, tmp_path / "missing.pem"):
        with pytest.raises(ValueError, match=r"bridges\.hq\.tls\.ca: cannot use .*pem"):
            await open_mqtt(make(servers=["mqtts://far"], tls={"ca": str(ca)}))
    with pytest.raises(ValueError, match=r"bridges\.hq\.tls\.certificate"):
        await open_mqtt(make(servers=["mqtts://far"], tls={"certificate": str(empty)}))


async def test_b22_a_shared_key_takes_the_place_of_certificates_where_python_can() -> None:
    keys: dict[str, Any] = {"servers": ["mqtts://far"], "tls": {"psk": "c0ffee", "psk_identity": "region-1"}}
    if not knows_psk():
        with pytest.raises(ValidationError, match=r"needs Python 3\.13"):
            make(**keys)
        return
    config = make(**keys)
    assert "c0ffee" not in repr(config) + config.model_dump_json()
    context = config.tls.context()
    names = [cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"]
    assert names
    assert all("PSK" in name and "NULL" not in name for name in names), names
    assert context.maximum_version == ssl.TLSVersion.TLSv1_2, "a 1.3 server could offer a certificate nobody verifies"


def test_lanes_are_lanes_of_the_session_by_topic() -> None:
    lines = [{"filter": "a/#"}, {"filter": "b/#", "direction": "in"}]
    spec = make(lanes=3, topics=lines).session()
    assert (spec.lanes, spec.order_key, spec.filters) == (3, "${topic}", (("a/#", 0),))


def test_lanes_behind_the_first_only_send() -> None:
    lines = [{"filter": "a/#", "qos": 1}, {"filter": "b/#", "direction": "in"}]
    behind = sending(make(lanes=2, topics=lines))
    assert [(line.filter, line.direction, line.qos) for line in behind.topics] == [("a/#", "out", 1)]
    assert not behind.notifications
    assert behind.name == "hq"


class Told:
    """The supervisor's end of a bridge."""

    node, lanes, echoes = "n", 2, False

    def __init__(self) -> None:
        self.status: dict[str, Any] = {}

    async def receive(self, handler: Any, lane: int = 0) -> Any: ...
    async def publish(self, handler: Any) -> Any: ...

    def report(self, **status: Any) -> None:
        self.status = status


def test_the_report_of_several_lanes_is_one() -> None:
    told = Told()
    one, two = Whole(told, 2).lanes
    one.report(state="connected", last_error=None, server="mqtt://a", messages_out=3, dropped_out={"loop": 1})
    assert told.status["state"] == "connecting", "until all are"
    two.report(state="connected", last_error=None, server="mqtt://b", messages_out=4, dropped_out={"loop": 1, "x": 2})
    assert told.status == {
        "state": "connected", "last_error": None, "server": "mqtt://a", "messages_out": 7,
        "dropped_out": {"loop": 2, "x": 2},
    }  # fmt: skip
    two.report(state="down", last_error="gone", messages_out=5)
    assert (told.status["state"], told.status["last_error"], told.status["messages_out"]) == ("down", "gone", 8)


def test_what_a_lane_without_a_way_in_is_sent_is_acknowledged_and_counted() -> None:
    counts: Counter[str] = Counter()
    nothing, remote = Nothing(counts), FakeConnection()
    source: Any = remote
    for qos in (0, 1, 2):
        nothing.on_publish(source, Publish(b"a", b"x", qos, packet_id=qos))
    nothing.on_release(source, 2)
    assert remote.taken() == [(4, 1), (5, 2), (7, 2)]
    assert counts == {"dropped.unmapped": 3}
