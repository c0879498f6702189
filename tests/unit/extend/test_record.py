"""Records made from PUBLISH packets, and templates rendered from records."""

from __future__ import annotations

import json

import pytest

from broker.config.template import Template
from broker.extend import record as module
from broker.extend.condition import Condition
from broker.extend.record import compile_template, payload_json, record_from_publish, to_bytes, to_text
from broker.extend.sink import Record
from broker.mqtt.packets import Publish
from broker.mqtt.properties import Properties

MSGID = "0190a1b2c3d4e5f60718293a4b5c6d7e"


def metadata(**changes: object) -> str:
    known = {"c": "dev-1", "u": "alice", "a": "10.0.0.7", "t": 1_700_000_000_123, "i": MSGID, "q": 2, "r": 1}
    return json.dumps({**known, "o": None, "h": 0, "n": "node-1", **changes})


def publish(*pairs: tuple[str, str], **properties: object) -> Publish:
    return Publish(
        b"a/b/c", b'{"v":1}', 1, False, False, 7, Properties(user_properties=list(pairs) or None, **properties)
    )


def full(**changes: object) -> Record:
    values = dict(
        topic="telemetry/dev-1/temp", payload=b'{"v": 21.5, "unit": "C", "list": [10, {"x": true}], "none": null}',
        qos=1, retain=True, clientid="dev-1", username="alice", peerhost="10.0.0.7", msgid=MSGID, ts=1_700_000_000_007,
        content_type="application/json", response_topic="answers/1", correlation_data=b"\x00\xff",
        user_properties=[("unit", "C"), ("unit", "F"), ("a.b", "dotted")], node="node-1",
    )  # fmt: skip
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def render(text: str, record: Record | None = None) -> object:
    return compile_template(Template(text))(record or full())


# --- from a PUBLISH


def test_the_broker_says_who_published_and_its_property_does_not_stay():
    record = record_from_publish(publish(("$isthmus", metadata()), ("k", "v"), content_type="text/plain"), trusted=True)
    assert (record.topic, record.payload) == ("a/b/c", b'{"v":1}')
    assert (record.clientid, record.username, record.peerhost, record.node) == ("dev-1", "alice", "10.0.0.7", "node-1")
    assert (record.msgid, record.ts, record.qos, record.retain) == (MSGID, 1_700_000_000_123, 2, True)
    assert record.content_type == "text/plain"
    assert record.user_properties == [("k", "v")]


def test_the_only_user_property_may_be_the_brokers():
    assert record_from_publish(publish(("$isthmus", metadata())), trusted=True).user_properties == []


def test_a_foreign_broker_is_not_believed_even_if_it_claims_to_know():
    record = record_from_publish(publish(("k", "v"), ("$isthmus", metadata())), trusted=False)
    assert (record.clientid, record.username, record.peerhost, record.msgid, record.node) == (None,) * 5
    assert (record.qos, record.ts, record.user_properties) == (1, 0, [("k", "v")])


def test_mqtt_3_has_no_properties_at_all():
    record = record_from_publish(Publish(b"t", b"x", 0, True, False, 0, None), trusted=True)
    assert (record.topic, record.payload, record.retain, record.user_properties) == ("t", b"x", True, [])


def test_an_anonymous_publisher_has_no_user_name():
    assert record_from_publish(publish(("$isthmus", metadata(u=None))), trusted=True).username is None


@pytest.mark.parametrize("value", ["", "{", "[]", '"text"', "{}", '{"c":"x"}'])
def test_metadata_that_cannot_be_read_is_an_error_not_a_guess(value: str):
    with pytest.raises(ValueError, match=r"\$isthmus"):
        record_from_publish(publish(("$isthmus", value)), trusted=True)


# --- templates


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${payload}", full().payload),
        ("${payload.v}", 21.5),
        ("${payload.list}", [10, {"x": True}]),
        ("${payload.list[1].x}", True),
        ("${payload.none}", None),
        ("${topic}", "telemetry/dev-1/temp"),
        ("${topic[0]}", "telemetry"),
        ("${topic[2]}", "temp"),
        ("${qos}", 1),
        ("${retain}", True),
        ("${ts}", 1_700_000_000_007),
        ("${ts_iso}", "2023-11-14T22:13:20.007Z"),
        ("${msgid}", MSGID),
        ("${clientid}", "dev-1"),
        ("${username}", "alice"),
        ("${peerhost}", "10.0.0.7"),
        ("${node}", "node-1"),
        ("${user_property.unit}", "C"),
        ("${user_property.a.b}", "dotted"),
        ("${content_type}", "application/json"),
        ("${response_topic}", "answers/1"),
        ("${correlation_data}", b"\x00\xff"),
        ("fixed", "fixed"),
        ("$${literal}", "${literal}"),
    ],
)
def test_a_template_that_is_one_placeholder_yields_the_value_itself(text: str, value: object):
    assert render(text) == value
    assert type(render(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "${payload.nowhere}",
        "${payload.v.deeper}",
        "${payload.list[9]}",
        "${payload.list.x}",
        "${topic[3]}",
        "${user_property.no}",
    ],
)
def test_what_a_record_does_not_have_is_none(text: str):
    assert render(text) is None
    assert render(f"<{text}>") == "<null>"


@pytest.mark.parametrize("text", ["${clientid}", "${ts}", "${ts_iso}", "${msgid}", "${content_type}", "${payload.x}"])
def test_a_record_of_a_foreign_broker_lacks_what_nobody_vouches_for(text: str):
    assert render(text, Record("t", b"no json")) is None


def test_a_mixed_template_is_text_with_json_for_what_has_no_text_of_its_own():
    text = "${topic[1]}|${payload.v}|${payload.list}|${retain}|${qos}|${payload.none}|${payload.unit}"
    assert render(text) == 'dev-1|21.5|[10,{"x":true}]|true|1|null|C'


def test_a_mixed_template_with_binary_stays_binary():
    assert render("${clientid}:${payload}", full(payload=b"\xff\x00")) == b"dev-1:\xff\x00"
    assert render("${clientid}:${payload}", full(payload="é".encode())) == "dev-1:é"


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff", b"[" * 100_000, b"21,5"])
def test_a_payload_that_is_no_json_has_no_fields(payload: bytes):
    assert render("${payload.v}", full(payload=payload)) is None


def test_the_payload_is_parsed_once_for_all_templates(monkeypatch: pytest.MonkeyPatch):
    parsed = []
    real = module.orjson.loads

    class Counting:
        dumps = staticmethod(module.orjson.dumps)

        @staticmethod
        def loads(data: bytes) -> object:
            parsed.append(data)
            return real(data)

    monkeypatch.setattr(module, "orjson", Counting)
    first, second = full(payload=b'{"v": 1}'), full(payload=b'{"v": 2}')
    assert [render(t, r) for r in (first, second) for t in ("${payload.v}", "${payload.w}", "x${payload.v}")] == [
        1, None, "x1", 2, None, "x2",
    ]  # fmt: skip
    assert parsed == [first.payload, second.payload]
    assert payload_json(first) == {"v": 1}
    where = Condition("payload.v != null and payload.w == null")
    batch = [full(payload=b'{"v": %d}' % n) for n in range(3)]
    parsed.clear()
    assert [record for record in batch if where(record)] == batch
    assert [render("${payload.v}", record) for record in batch] == [0, 1, 2]
    assert parsed == [record.payload for record in batch], "nor again for the templates behind a condition"


def test_the_envelope_holds_everything():
    whole = json.loads(str(render("${.}")))
    assert whole == {
        "topic": "telemetry/dev-1/temp", "payload": full().payload.decode(), "qos": 1, "retain": True,
        "clientid": "dev-1", "username": "alice", "peerhost": "10.0.0.7", "msgid": MSGID, "ts": 1_700_000_000_007,
        "node": "node-1", "content_type": "application/json", "response_topic": "answers/1",
        "correlation_data_base64": "AP8=", "user_properties": [["unit", "C"], ["unit", "F"], ["a.b", "dotted"]],
    }  # fmt: skip


def test_the_envelope_holds_a_binary_payload_in_base64_and_null_for_the_unknown():
    whole = json.loads(str(render("${.}", Record("t", b"\xff\x00"))))
    assert whole["payload_base64"] == "/wA="
    assert "payload" not in whole
    assert (whole["clientid"], whole["ts"], whole["msgid"]) == (None, None, None)
    assert "content_type" not in whole


@pytest.mark.parametrize(
    "text",
    ["${nothing}", "${clientid.x}", "${payloads}", "${user_property}", "${topic.x}", "${topic[0][1]}", "${qos[1]}"],
)
def test_a_placeholder_no_message_has_is_refused_when_the_configuration_is_read(text: str):
    with pytest.raises(ValueError, match=r"\$\{"):
        compile_template(Template(text))


@pytest.mark.parametrize(
    ("value", "text", "raw"),
    [
        ("é", "é", "é".encode()),
        (b"ok", "ok", b"ok"),
        (b"\xff", b"\xff", b"\xff"),
        (None, "null", None),
        (True, "true", b"true"),
        (1.5, "1.5", b"1.5"),
        ({"a": [1]}, '{"a":[1]}', b'{"a":[1]}'),
    ],
)
def test_values_as_text_and_as_bytes(value: object, text: str | bytes, raw: bytes | None):
    assert to_text(value) == text
    assert to_bytes(value) == raw
