"""Whatever is encoded is decoded to the same, for every packet and version."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.packets.codec import Wire, decode, describe, encode

_SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

_texts = st.text(st.characters(min_codepoint=0x20, exclude_categories=("Cc", "Cs", "Cn")), max_size=40)
_topics = _texts.map(lambda text: text.replace("+", "").replace("#", "")).filter(bool)
_uint16 = st.integers(0, 0xFFFF)
_ids = st.integers(1, 0xFFFF)
_uint32 = st.integers(0, 0xFFFFFFFF)
_flags = st.integers(0, 1)
_binaries = st.binary(max_size=40)
_pairs = st.lists(st.tuples(_texts, _texts), min_size=1, max_size=5)

_FORMS: dict[str, st.SearchStrategy[Any]] = {
    "payload_format_indicator": _flags,
    "message_expiry_interval": _uint32,
    "content_type": _texts,
    "response_topic": _topics,
    "correlation_data": _binaries,
    "subscription_identifiers": st.lists(st.integers(1, 268_435_455), min_size=1, max_size=4),
    "session_expiry_interval": _uint32,
    "assigned_client_identifier": _texts,
    "server_keep_alive": _uint16,
    "authentication_method": _texts,
    "authentication_data": _binaries,
    "request_problem_information": _flags,
    "will_delay_interval": _uint32,
    "request_response_information": _flags,
    "response_information": _texts,
    "server_reference": _texts,
    "reason_string": _texts,
    "receive_maximum": _ids,
    "topic_alias_maximum": _uint16,
    "topic_alias": _ids,
    "maximum_qos": _flags,
    "retain_available": _flags,
    "user_properties": _pairs,
    "maximum_packet_size": st.integers(1, 0xFFFFFFFF),
    "wildcard_subscription_available": _flags,
    "subscription_identifier_available": _flags,
    "shared_subscription_available": _flags,
}
_WHERE = {
    "connect": "session_expiry_interval authentication_method request_problem_information receive_maximum "
    "request_response_information topic_alias_maximum user_properties maximum_packet_size",
    "will": "payload_format_indicator message_expiry_interval content_type response_topic correlation_data "
    "will_delay_interval user_properties",
    "connack": "session_expiry_interval assigned_client_identifier server_keep_alive authentication_method "
    "authentication_data response_information server_reference reason_string receive_maximum topic_alias_maximum "
    "maximum_qos retain_available user_properties maximum_packet_size wildcard_subscription_available "
    "subscription_identifier_available shared_subscription_available",
    "publish": "payload_format_indicator message_expiry_interval content_type response_topic correlation_data "
    "subscription_identifiers topic_alias user_properties",
    "answer": "reason_string user_properties",
    "unsubscribe": "user_properties",
    "disconnect": "session_expiry_interval server_reference reason_string user_properties",
    "auth": "authentication_data reason_string user_properties",
}


def _properties(wire: Wire, where: str, version: int, **always: Any) -> st.SearchStrategy[Any]:
    if version < 5:
        return st.none()
    optional = {name: _FORMS[name] for name in _WHERE[where].split()}
    made = st.fixed_dictionaries(always, optional=optional).filter(bool)
    some = made.map(lambda values: wire.properties.Properties(**values))
    return some if always else st.none() | some


def _same(wire: Wire, packet: Any, first: int, version: int) -> None:
    raw = encode(wire, packet, first, version)
    again = decode(wire, raw, version, False)
    assert _plain(again) == _plain(packet)
    assert encode(wire, again, first, version) == raw


def _plain(packet: Any) -> dict[str, Any]:
    fields = describe(packet)
    for holder in (fields, fields.get("will") or {}):
        if isinstance(holder.get("properties"), dict):
            holder["properties"].pop("forward", None)
    return fields


@pytest.mark.parametrize("version", [3, 4, 5])
@given(draw=st.data())
@_SETTINGS
def test_connect(wire: Wire, version: int, draw: st.DataObject) -> None:
    p = wire.packets
    username = draw.draw(st.none() | _texts)
    will = draw.draw(
        st.none()
        | st.builds(
            p.Will,
            topic=_topics.map(str.encode),
            payload=_binaries,
            qos=st.integers(0, 2),
            retain=st.booleans(),
            properties=_properties(wire, "will", version),
        )
    )
    connect = p.Connect(
        version=version,
        client_id=draw.draw(_texts),
        clean_start=draw.draw(st.booleans()),
        keep_alive=draw.draw(_uint16),
        username=username,
        password=draw.draw(st.none() | _binaries) if username is not None or version == 5 else None,
        will=will,
        properties=draw.draw(_properties(wire, "connect", version)),
        bridge=draw.draw(st.booleans()) if version < 5 else False,
    )
    _same(wire, connect, 0x10, version)


@pytest.mark.parametrize("version", [3, 4, 5])
@given(draw=st.data())
@_SETTINGS
def test_connack(wire: Wire, version: int, draw: st.DataObject) -> None:
    code = draw.draw(st.sampled_from((0, 0x80, 0x87, 0x9F) if version == 5 else (0, 1, 2, 3, 4, 5)))
    present = draw.draw(st.booleans()) and code == 0
    _same(wire, wire.packets.Connack(present, code, draw.draw(_properties(wire, "connack", version))), 0x20, version)


@pytest.mark.parametrize("version", [3, 4, 5])
@given(draw=st.data())
@_SETTINGS
def test_publish(wire: Wire, version: int, draw: st.DataObject) -> None:
    qos = draw.draw(st.integers(0, 2))
    publish = wire.packets.Publish(
        draw.draw(_topics).encode(),
        draw.draw(st.binary(max_size=300)),
        qos,
        draw.draw(st.booleans()),
        draw.draw(st.booleans()) and qos > 0,
        draw.draw(_ids) if qos else 0,
        draw.draw(_properties(wire, "publish", version)),
    )
    _same(wire, publish, 0x30, version)


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("first", [0x40, 0x50, 0x62, 0x70])
@given(draw=st.data())
@_SETTINGS
def test_acknowledgements(wire: Wire, version: int, first: int, draw: st.DataObject) -> None:
    codes = (0, 0x92) if first >= 0x60 else (0, 0x10, 0x80, 0x87, 0x99)
    code = draw.draw(st.sampled_from(codes)) if version == 5 else 0
    ack = wire.packets.Ack(draw.draw(_ids), code, draw.draw(_properties(wire, "answer", version)))
    _same(wire, ack, first, version)


@pytest.mark.parametrize("version", [3, 4, 5])
@given(draw=st.data())
@_SETTINGS
def test_subscribe_and_unsubscribe(wire: Wire, version: int, draw: st.DataObject) -> None:
    options = st.sampled_from([0, 1, 2, 0x09, 0x1A, 0x2D] if version == 5 else [0, 1, 2])
    names = st.lists(_texts.filter(lambda text: not text.startswith("$share/")).map(str.encode), min_size=1, max_size=6)
    filters = [(name, draw.draw(options)) for name in draw.draw(names)]
    properties = draw.draw(_properties(wire, "unsubscribe", version))
    _same(wire, wire.packets.Subscribe(draw.draw(_ids), filters, properties), 0x82, version)
    _same(wire, wire.packets.Unsubscribe(draw.draw(_ids), [name for name, _ in filters], properties), 0xA2, version)


@pytest.mark.parametrize("version", [3, 4, 5])
@given(draw=st.data())
@_SETTINGS
def test_suback_and_unsuback(wire: Wire, version: int, draw: st.DataObject) -> None:
    codes = draw.draw(st.lists(st.sampled_from((0, 1, 2, 0x80)), min_size=1, max_size=8))
    properties = draw.draw(_properties(wire, "answer", version))
    _same(wire, wire.packets.Suback(draw.draw(_ids), codes, properties), 0x90, version)
    plain = [0x11 if code in (1, 2) else code for code in codes] if version == 5 else []
    _same(wire, wire.packets.Suback(draw.draw(_ids), plain, properties), 0xB0, version)


@pytest.mark.parametrize("version", [3, 4, 5])
@given(draw=st.data())
@_SETTINGS
def test_disconnect(wire: Wire, version: int, draw: st.DataObject) -> None:
    code = draw.draw(st.sampled_from((0, 4, 0x8E, 0x93, 0xA2))) if version == 5 else 0
    disconnect = wire.packets.Disconnect(code, draw.draw(_properties(wire, "disconnect", version)))
    _same(wire, disconnect, 0xE0, version)


@given(draw=st.data())
@_SETTINGS
def test_auth(wire: Wire, draw: st.DataObject) -> None:
    code = draw.draw(st.sampled_from((0, 0x18, 0x19)))
    properties = draw.draw(_properties(wire, "auth", 5, authentication_method=_texts))
    _same(wire, wire.packets.Auth(code, properties), 0xF0, 5)
