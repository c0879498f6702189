"""Byte-exact packets, valid and malformed, addressed by name.

`PACKETS["publish_qos1_v5"]` is an entry, `data("publish_qos1_v5")` its bytes; `valid(5, CLIENT)` and
`malformed(5, CLIENT)` are those of a version and a direction. `codec` decodes and encodes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CLIENT = "client"
"""From a client to a server."""
SERVER = "server"
"""From a server to a client."""
BOTH = "both"


@dataclass(frozen=True)
class Entry:
    """One packet. ``values`` is what decoding gives; ``code`` the reason it is refused with; one of them is None."""

    name: str
    data: bytes
    versions: tuple[int, ...]
    direction: str
    values: dict[str, Any] | None = None
    code: int | None = None
    canonical: bool = True
    """Whether encoding the values gives ``data`` again."""
    case: str = ""
    """The reliability case it belongs to."""

    def __str__(self) -> str:
        return self.name


PACKETS: dict[str, Entry] = {}

ALL = (3, 4, 5)
V3X = (3, 4)
V5 = (5,)


def data(name: str) -> bytes:
    """The bytes of the entry ``name``."""
    return PACKETS[name].data


def valid(version: int | None = None, direction: str | None = None) -> Iterator[Entry]:
    """Entries that are decoded."""
    return (e for e in PACKETS.values() if e.code is None and _fits(e, version, direction))


def malformed(version: int | None = None, direction: str | None = None) -> Iterator[Entry]:
    """Entries that are refused."""
    return (e for e in PACKETS.values() if e.code is not None and _fits(e, version, direction))


def _fits(entry: Entry, version: int | None, direction: str | None) -> bool:
    return (version is None or version in entry.versions) and (
        direction is None or entry.direction in (direction, BOTH)
    )


def _bytes(*parts: str | bytes) -> bytes:
    """Text is hexadecimal, bytes are themselves."""
    return b"".join(bytes.fromhex(part) if isinstance(part, str) else part for part in parts)


def _frame(first: int, *parts: str | bytes) -> bytes:
    """A packet of fewer than 16 384 bytes; the length is counted here, independently of the codec."""
    body = _bytes(*parts)
    length = [len(body)] if len(body) < 128 else [len(body) % 128 + 128, len(body) // 128]
    return bytes([first, *length]) + body


def _text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return len(raw).to_bytes(2, "big") + raw


def _block(*parts: str | bytes) -> bytes:
    """Properties of fewer than 128 bytes behind their length."""
    raw = _bytes(*parts)
    return bytes([len(raw)]) + raw


def _good(
    name: str,
    raw: bytes,
    versions: tuple[int, ...],
    direction: str,
    *,
    canonical: bool = True,
    case: str = "",
    **values: Any,
) -> None:
    assert name not in PACKETS, name
    PACKETS[name] = Entry(name, raw, versions, direction, values=values, canonical=canonical, case=case)


def _bad(name: str, raw: bytes, versions: tuple[int, ...], direction: str, code: int, case: str = "") -> None:
    assert name not in PACKETS, name
    PACKETS[name] = Entry(name, raw, versions, direction, code=code, case=case)


_NAME = {3: _text("MQIsdp") + b"\x03", 4: _text("MQTT") + b"\x04", 5: _text("MQTT") + b"\x05"}


def _connect(
    version: int, flags: str, *rest: str | bytes, keep_alive: str = "003c", properties: str | bytes = "00"
) -> bytes:
    block = properties if version == 5 else ""
    return _frame(0x10, _NAME[version], flags, keep_alive, block, *rest)


# CONNECT ----------------------------------------------------------------------------------------------------------

for _v in ALL:
    _good(f"connect_minimal_v{_v}", _connect(_v, "02", _text("c")), (_v,), CLIENT,
          version=_v, client_id="c", clean_start=True, keep_alive=60)  # fmt: skip
    _good(f"connect_resume_v{_v}", _connect(_v, "00", _text("c"), keep_alive="0000"), (_v,), CLIENT,
          version=_v, client_id="c", clean_start=False, keep_alive=0)  # fmt: skip
    _good(f"connect_password_v{_v}", _connect(_v, "c2", _text("c"), _text("user"), _text(b"\xff\x00")), (_v,), CLIENT,
          version=_v, client_id="c", username="user", password=b"\xff\x00")  # fmt: skip
    _good(f"connect_username_v{_v}", _connect(_v, "82", _text("c"), _text("")), (_v,), CLIENT,
          version=_v, username="")  # fmt: skip
    _good(f"connect_empty_client_id_v{_v}", _connect(_v, "02", _text("")), (_v,), CLIENT, case="P-21",
          version=_v, client_id="")  # fmt: skip
    _good(f"connect_will_v{_v}",
          _connect(_v, "2e", _text("c"), "00" if _v == 5 else "", _text("w/t"), _text(b"gone")), (_v,), CLIENT,
          version=_v, will={"topic": b"w/t", "payload": b"gone", "qos": 1, "retain": True})  # fmt: skip
    _good(f"connect_everything_v{_v}",
          _connect(_v, "d6", _text("c"), "00" if _v == 5 else "", _text("w"), _text(b""), _text("ü"), _text("p")),
          (_v,), CLIENT, version=_v, username="ü", password=b"p",
          will={"topic": b"w", "payload": b"", "qos": 2, "retain": False})  # fmt: skip
    _bad(f"connect_reserved_flag_v{_v}", _connect(_v, "03", _text("c")), (_v,), CLIENT, 0x81, "P-18")
    _bad(f"connect_will_qos_without_will_v{_v}", _connect(_v, "0a", _text("c")), (_v,), CLIENT, 0x81, "P-19")
    _bad(f"connect_will_retain_without_will_v{_v}", _connect(_v, "22", _text("c")), (_v,), CLIENT, 0x81, "P-19")
    _bad(f"connect_will_qos_3_v{_v}",
         _connect(_v, "1e", _text("c"), "00" if _v == 5 else "", _text("w"), _text("")), (_v,), CLIENT, 0x81,
         "P-19")  # fmt: skip
    _bad(f"connect_will_wildcard_v{_v}",
         _connect(_v, "06", _text("c"), "00" if _v == 5 else "", _text("w/#"), _text("")), (_v,), CLIENT, 0x90,
         "P-54")  # fmt: skip
    _bad(f"connect_will_empty_topic_v{_v}",
         _connect(_v, "06", _text("c"), "00" if _v == 5 else "", _text(""), _text("")), (_v,), CLIENT,
         0x90)  # fmt: skip
    _bad(f"connect_will_missing_v{_v}", _connect(_v, "06", _text("c")), (_v,), CLIENT, 0x81)
    _bad(f"connect_password_missing_v{_v}", _connect(_v, "c2", _text("c"), _text("u")), (_v,), CLIENT, 0x81)
    _bad(f"connect_trailing_v{_v}", _connect(_v, "02", _text("c"), "00"), (_v,), CLIENT, 0x81)
    _bad(f"connect_client_id_too_long_v{_v}", _connect(_v, "02", "ffff", b"abc"), (_v,), CLIENT, 0x81, "P-09")
    _bad(f"connect_without_client_id_v{_v}", _connect(_v, "02"), (_v,), CLIENT, 0x81)
    _bad(f"connect_without_keep_alive_v{_v}", _frame(0x10, _NAME[_v], "02"), (_v,), CLIENT, 0x81)
    _bad(f"connect_without_flags_v{_v}", _frame(0x10, _NAME[_v]), (_v,), CLIENT, 0x81)
    _bad(f"connect_header_flags_v{_v}", b"\x11" + _connect(_v, "02", _text("c"))[1:], (_v,), CLIENT, 0x81)

for _v in V3X:
    _bad(f"connect_password_alone_v{_v}", _connect(_v, "42", _text("c"), _text("p")), (_v,), CLIENT, 0x81, "P-20")
_good("connect_password_alone_v5", _connect(5, "42", _text("c"), _text("p")), V5, CLIENT, case="P-20",
      version=5, username=None, password=b"p")  # fmt: skip
_good("connect_bridge_v3", _frame(0x10, _text("MQIsdp"), "83 02 003c", _text("b")), (3,), CLIENT, case="P-17",
      version=3, bridge=True, client_id="b")  # fmt: skip
_good("connect_bridge_v4", _frame(0x10, _text("MQTT"), "84 02 003c", _text("b")), (4,), CLIENT, case="P-17",
      version=4, bridge=True, client_id="b")  # fmt: skip
_bad("connect_level_6", _frame(0x10, _text("MQTT"), "06 02 003c 00", _text("c")), V5, CLIENT, 0x84, "P-17")
_bad("connect_level_133", _frame(0x10, _text("MQTT"), "85 02 003c 00", _text("c")), V5, CLIENT, 0x84, "P-17")
_bad("connect_mqtt_level_3", _frame(0x10, _text("MQTT"), "03 02 003c", _text("c")), (4,), CLIENT, 0x84, "P-17")
_bad("connect_mqtt_level_0", _frame(0x10, _text("MQTT"), "00 02 003c", _text("c")), (4,), CLIENT, 0x84, "P-17")
_bad("connect_mqisdp_level_4", _frame(0x10, _text("MQIsdp"), "04 02 003c", _text("c")), (3,), CLIENT, 0x84, "P-17")
_bad("connect_lower_case_name", _frame(0x10, _text("mqtt"), "04 02 003c", _text("c")), (4,), CLIENT, 0x81, "P-17")
_bad("connect_empty", _frame(0x10), (4,), CLIENT, 0x81)
_bad("connect_name_only", _frame(0x10, _text("MQTT")), (4,), CLIENT, 0x81)
_bad("connect_name_too_long", _frame(0x10, "ffff", b"MQTT"), (4,), CLIENT, 0x81)

_good("connect_properties_v5",
      _connect(5, "02", _text("c"),
               properties=_block("11 0000000a 15 0001 6d 16 0002 00ff 17 00 19 01 21 0014 22 0005",
                                 "26 0001 6b 0001 76 27 00001000")),
      V5, CLIENT, version=5,
      properties={"session_expiry_interval": 10, "authentication_method": "m", "authentication_data": b"\x00\xff",
                  "request_problem_information": 0, "request_response_information": 1, "receive_maximum": 20,
                  "topic_alias_maximum": 5, "user_properties": [("k", "v")],
                  "maximum_packet_size": 4096})  # fmt: skip
_good("connect_will_properties_v5",
      _connect(5, "06", _text("c"),
               _block("01 01 02 00000005 03 0001 74 08 0001 72 09 0001 2a 18 00000007 26 0001 61 0001 62"),
               _text("w"), _text("x")),
      V5, CLIENT, version=5,
      will={"topic": b"w", "payload": b"x",
            "properties": {"payload_format_indicator": 1, "message_expiry_interval": 5, "content_type": "t",
                           "response_topic": "r", "correlation_data": b"*", "will_delay_interval": 7,
                           "user_properties": [("a", "b")],
                           "forward": _bytes("01 01 03 0001 74 08 0001 72 09 0001 2a",
                                             "26 0001 61 0001 62")}})  # fmt: skip
_bad("connect_property_length_five_bytes",
     _connect(5, "02", _text("c"), properties="8080808001"), V5, CLIENT, 0x81, "P-04")  # fmt: skip
_bad("connect_property_length_too_long", _connect(5, "02", properties="7f"), V5, CLIENT, 0x81, "P-04")
_bad("connect_property_length_not_minimal",
     _connect(5, "02", _text("c"), properties="8000"), V5, CLIENT, 0x81, "P-03")  # fmt: skip
_bad("connect_property_cut", _connect(5, "02", _text("c"), properties="02 21 00"), V5, CLIENT, 0x81)
_bad("connect_receive_maximum_0", _connect(5, "02", _text("c"), properties="03 21 0000"), V5, CLIENT, 0x82, "P-44")
_bad("connect_maximum_packet_size_0",
     _connect(5, "02", _text("c"), properties="05 27 00000000"), V5, CLIENT, 0x82, "P-45")  # fmt: skip
_bad("connect_request_problem_2", _connect(5, "02", _text("c"), properties="02 17 02"), V5, CLIENT, 0x82)
_bad("connect_authentication_data_alone",
     _connect(5, "02", _text("c"), properties="04 16 0001 00"), V5, CLIENT, 0x82)  # fmt: skip
_bad("connect_unknown_property_00", _connect(5, "02", _text("c"), properties="02 00 00"), V5, CLIENT, 0x81, "P-48")
_bad("connect_unknown_property_04", _connect(5, "02", _text("c"), properties="02 04 00"), V5, CLIENT, 0x81, "P-48")
_bad("connect_unknown_property_7f", _connect(5, "02", _text("c"), properties="02 7f 00"), V5, CLIENT, 0x81, "P-48")
_bad("connect_property_id_two_bytes",
     _connect(5, "02", _text("c"), properties="04 a100 0001"), V5, CLIENT, 0x81, "P-48")  # fmt: skip
_bad("connect_property_id_five_bytes",
     _connect(5, "02", _text("c"), properties="05 ffffffff7f"), V5, CLIENT, 0x81, "P-48")  # fmt: skip
_bad("connect_will_unknown_property",
     _connect(5, "06", _text("c"), "02 7f 00", _text("w"), _text("x")), V5, CLIENT, 0x81, "P-49")  # fmt: skip
_bad("connect_will_misplaced_property",
     _connect(5, "06", _text("c"), "03 21 0001", _text("w"), _text("x")), V5, CLIENT, 0x82, "P-49")  # fmt: skip
_bad("connect_will_response_wildcard",
     _connect(5, "06", _text("c"), "06 08 0003", b"a/+", _text("w"), _text("x")), V5, CLIENT, 0x82, "P-54")  # fmt: skip
_bad("connect_user_properties_65",
     _connect(5, "02", "c502", bytes.fromhex("2600000000") * 65, _text("c"), properties=""), V5, CLIENT, 0x97,
     "P-50")  # fmt: skip
_good("connect_user_properties_64",
      _connect(5, "02", "c002", bytes.fromhex("2600000000") * 64, _text("c"), properties=""), V5, CLIENT,
      case="P-50", version=5, properties={"user_properties": [("", "")] * 64})  # fmt: skip

# strings, in every field that holds one ---------------------------------------------------------------------------

BAD_UTF8 = {
    "overlong": b"\xc0\xaf",
    "surrogate": b"\xed\xa0\x80",
    "nul": b"a\x00b",
    "lone_80": b"\x80",
    "truncated": b"\xe2\x82",
    "beyond_unicode": b"\xf4\x90\x80\x80",
}
"""P-22: refused always."""
CONTROLS = {
    "u0001": b"\x01",
    "u001f": b"a\x1f",
    "u007f": b"\x7f",
    "u0080": b"\xc2\x80",
    "u009f": b"\xc2\x9fz",
    "ufffe": b"\xef\xbf\xbe",
    "uffff": b"\xef\xbf\xbf",
    "ufdd0": b"\xef\xb7\x90",
    "u1ffff": b"\xf0\x9f\xbf\xbf",
}
"""P-23: refused unless strictness is switched off."""
ODD_TEXT = {
    "byte_order_mark": b"\xef\xbb\xbfa",
    "nfc": b"\xc3\xa9",
    "nfd": b"e\xcc\x81",
    "no_break_space": b"\xc2\xa0",
    "private_use": b"\xee\x80\x80",
    "joined_emoji": b"\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x94\xac",
    "last": b"\xf4\x8f\xbf\xbd",
}
"""P-24: kept as it is."""

for _case, _samples in (("P-22", BAD_UTF8), ("P-23", CONTROLS)):
    for _key, _raw in _samples.items():
        for _v in ALL:
            _p = "00" if _v == 5 else ""
            _bad(f"connect_client_id_{_key}_v{_v}", _connect(_v, "02", _text(_raw)), (_v,), CLIENT, 0x81, _case)
            _bad(f"connect_username_{_key}_v{_v}",
                 _connect(_v, "82", _text("c"), _text(_raw)), (_v,), CLIENT, 0x81, _case)  # fmt: skip
            _bad(f"connect_will_topic_{_key}_v{_v}",
                 _connect(_v, "06", _text("c"), _p, _text(_raw), _text("")), (_v,), CLIENT, 0x81, _case)  # fmt: skip
            _bad(f"publish_topic_{_key}_v{_v}", _frame(0x30, _text(_raw), _p), (_v,), BOTH, 0x81, _case)
            _bad(f"subscribe_filter_{_key}_v{_v}",
                 _frame(0x82, "0001", _p, _text(_raw), "00"), (_v,), CLIENT, 0x81, _case)  # fmt: skip
            _bad(f"unsubscribe_filter_{_key}_v{_v}",
                 _frame(0xA2, "0001", _p, _text(_raw)), (_v,), CLIENT, 0x81, _case)  # fmt: skip
        _pair = b"\x26" + _text("k") + _text(_raw)
        _bad(f"publish_user_property_{_key}",
             _frame(0x30, _text("t"), bytes([len(_pair)]), _pair), V5, BOTH, 0x81, _case)  # fmt: skip
        _pair = b"\x26" + _text(_raw) + _text("v")
        _bad(f"publish_user_property_key_{_key}",
             _frame(0x30, _text("t"), bytes([len(_pair)]), _pair), V5, BOTH, 0x81, _case)  # fmt: skip
        _string = _text(_raw)
        for _name, _block_of in (("user_property", _block(_pair)), ("content_type", _block("03", _string)),
                                 ("response_topic", _block("08", _string))):  # fmt: skip
            _bad(f"connect_will_{_name}_{_key}",
                 _connect(5, "06", _text("c"), _block_of, _text("w"), _text("")), V5, CLIENT, 0x81, _case)  # fmt: skip
            if _name != "user_property":
                _bad(f"publish_{_name}_{_key}", _frame(0x30, _text("t"), _block_of), V5, BOTH, 0x81, _case)
        _bad(f"connect_user_property_{_key}", _connect(5, "02", _text("c"), properties=_block(_pair)), V5, CLIENT,
             0x81, _case)  # fmt: skip
        _bad(f"connect_authentication_method_{_key}",
             _connect(5, "02", _text("c"), properties=_block("15", _string)), V5, CLIENT, 0x81, _case)  # fmt: skip
        _bad(f"subscribe_user_property_{_key}",
             _frame(0x82, "0001", _block(_pair), _text("t"), "00"), V5, CLIENT, 0x81, _case)  # fmt: skip
        _bad(f"unsubscribe_user_property_{_key}",
             _frame(0xA2, "0001", _block(_pair), _text("t")), V5, CLIENT, 0x81, _case)  # fmt: skip
        for _first, _name in ((0x40, "puback"), (0x50, "pubrec"), (0x62, "pubrel"), (0x70, "pubcomp")):
            _bad(f"{_name}_reason_string_{_key}",
                 _frame(_first, "0001 00", _block("1f", _string)), V5, BOTH, 0x81, _case)  # fmt: skip
        _bad(f"disconnect_reason_string_{_key}",
             _frame(0xE0, "00", _block("1f", _string)), V5, CLIENT, 0x81, _case)  # fmt: skip
        _bad(f"auth_reason_string_{_key}",
             _frame(0xF0, "18", _block("15 0001 6d 1f", _string)), V5, BOTH, 0x81, _case)  # fmt: skip
for _key, _raw in ODD_TEXT.items():
    _good(f"publish_topic_{_key}", _frame(0x30, _text(_raw), "00"), V5, BOTH, case="P-24", topic=_raw)
    _good(f"connect_client_id_{_key}", _connect(4, "02", _text(_raw)), (4,), CLIENT, case="P-24",
          version=4, client_id=_raw.decode())  # fmt: skip

# CONNACK ----------------------------------------------------------------------------------------------------------

_good("connack_v3x", _frame(0x20, "0000"), V3X, SERVER, session_present=False, code=0)
_good("connack_present_v3x", _frame(0x20, "0100"), V3X, SERVER, session_present=True, code=0)
_good("connack_refused_v3x", _frame(0x20, "0005"), V3X, SERVER, session_present=False, code=5)
_good("connack_v5", _frame(0x20, "000000"), V5, SERVER, session_present=False, code=0, properties=None)
_good("connack_refused_v5", _frame(0x20, "008700"), V5, SERVER, session_present=False, code=0x87)
_good("connack_refused_by_an_old_server", _frame(0x20, "0001"), V5, SERVER, canonical=False,
      session_present=False, code=0x84)  # fmt: skip
_good("connack_properties_v5",
      _frame(0x20, "0100",
             _block("11 00000001 12 0002", b"id", "13 001e 15 0001 6d 16 0001 00 1a 0001 69 1c 0001 72 1f 0002", b"ok",
                    "21 0400 22 000a 24 01 25 00 26 0001 6b 0000 27 00100000 28 01 29 00 2a 01")),
      V5, SERVER, session_present=True, code=0,
      properties={"session_expiry_interval": 1, "assigned_client_identifier": "id", "server_keep_alive": 30,
                  "authentication_method": "m", "authentication_data": b"\x00", "response_information": "i",
                  "server_reference": "r", "reason_string": "ok", "receive_maximum": 1024, "topic_alias_maximum": 10,
                  "maximum_qos": 1, "retain_available": 0, "user_properties": [("k", "")],
                  "maximum_packet_size": 1 << 20, "wildcard_subscription_available": 1,
                  "subscription_identifier_available": 0, "shared_subscription_available": 1})  # fmt: skip
_bad("connack_reserved_flags", _frame(0x20, "0200"), V3X, SERVER, 0x81)
_bad("connack_unknown_code_v3x", _frame(0x20, "0006"), V3X, SERVER, 0x82)
_bad("connack_unknown_code_v5", _frame(0x20, "000100"), V5, SERVER, 0x82)
_bad("connack_present_and_refused", _frame(0x20, "018700"), V5, SERVER, 0x82)
_bad("connack_short", _frame(0x20, "00"), ALL, SERVER, 0x81)
_bad("connack_without_properties_v5", _frame(0x20, "0000"), V5, SERVER, 0x81)
_bad("connack_trailing_v3x", _frame(0x20, "000000"), V3X, SERVER, 0x81)
_bad("connack_trailing_v5", _frame(0x20, "00000000"), V5, SERVER, 0x81)
_bad("connack_header_flags", _frame(0x22, "0000"), V3X, SERVER, 0x81)

# PUBLISH ----------------------------------------------------------------------------------------------------------

_good("publish_v3x", _frame(0x30, _text("a/b"), b"hi"), V3X, BOTH,
      topic=b"a/b", payload=b"hi", qos=0, retain=False, dup=False, packet_id=0)  # fmt: skip
_good("publish_empty_v3x", _frame(0x30, _text("a")), V3X, BOTH, topic=b"a", payload=b"")
_good("publish_qos1_v3x", _frame(0x33, _text("a"), "000a", b"x"), V3X, BOTH,
      topic=b"a", payload=b"x", qos=1, retain=True, packet_id=10)  # fmt: skip
_good("publish_qos2_dup_v3x", _frame(0x3C, _text("a"), "ffff", b"x"), V3X, BOTH,
      qos=2, dup=True, packet_id=65535, payload=b"x")  # fmt: skip
_good("publish_v5", _frame(0x31, _text("a/b"), "00", b"hi"), V5, BOTH,
      topic=b"a/b", payload=b"hi", retain=True, properties=None)  # fmt: skip
_good("publish_qos1_v5", _frame(0x32, _text("a"), "0001 00", b"x"), V5, BOTH, qos=1, packet_id=1, payload=b"x")
_good("publish_qos2_dup_v5", _frame(0x3C, _text("a"), "0001 00"), V5, BOTH, qos=2, dup=True, packet_id=1)
_good("publish_properties_v5",
      _frame(0x32, _text("a"), "0001",
             _block("01 01 02 0000003c 03 0001 74 08 0001 72 09 0002 0001 23 0004 26 0001 6b 0001 76 26 0000 0000"),
             b"x"),
      V5, BOTH, payload=b"x",
      properties={"payload_format_indicator": 1, "message_expiry_interval": 60, "content_type": "t",
                  "response_topic": "r", "correlation_data": b"\x00\x01", "topic_alias": 4,
                  "user_properties": [("k", "v"), ("", "")],
                  "forward": _bytes("01 01 03 0001 74 08 0001 72 09 0002 0001 26 0001 6b 0001 76 26 0000 0000")},
      )  # fmt: skip
_good("publish_properties_in_odd_order",
      _frame(0x30, _text("a"), _block("26 0001 62 0000 23 0001 26 0001 61 0000 02 00000001 01 00")),
      V5, BOTH, canonical=False,
      properties={"user_properties": [("b", ""), ("a", "")], "topic_alias": 1, "message_expiry_interval": 1,
                  "payload_format_indicator": 0,
                  "forward": _bytes("26 0001 62 0000 26 0001 61 0000 01 00")})  # fmt: skip
_good("publish_alias_only", _frame(0x30, "0000 03 23 0001", b"x"), V5, BOTH, case="P-51",
      topic=b"", payload=b"x", properties={"topic_alias": 1, "forward": b""})  # fmt: skip
_good("publish_subscription_identifiers", _frame(0x30, _text("a"), "07 0b 01 0b ffffff7f"), V5, SERVER,
      properties={"subscription_identifiers": [1, 268_435_455]})  # fmt: skip
_bad("publish_topic_beyond_the_packet", _bytes("30 05 ffff 616263"), ALL, BOTH, 0x81, "P-09")
_bad("publish_qos1_without_packet_id", _bytes("32 03 0001 61"), ALL, BOTH, 0x81, "P-10")
_bad("publish_qos1_half_a_packet_id", _bytes("32 04 0001 61 00"), ALL, BOTH, 0x81, "P-10")
_bad("publish_empty_body", _bytes("30 00"), ALL, BOTH, 0x81, "P-09")
_bad("publish_one_byte", _bytes("30 01 00"), ALL, BOTH, 0x81, "P-09")
_bad("publish_wildcard_hash_v3x", _frame(0x30, _text("a/#")), V3X, BOTH, 0x90, "P-25")
_bad("publish_wildcard_hash_v5", _frame(0x30, _text("a/#"), "00"), V5, BOTH, 0x90, "P-25")
_bad("publish_wildcard_plus_v3x", _frame(0x30, _text("+/a")), V3X, BOTH, 0x90, "P-25")
_bad("publish_wildcard_plus_v5", _frame(0x30, _text("+/a"), "00"), V5, BOTH, 0x90, "P-25")
_bad("publish_empty_topic_v3x", _frame(0x30, "0000", b"x"), V3X, BOTH, 0x82, "P-26")
_bad("publish_empty_topic_v5", _frame(0x30, "0000 00", b"x"), V5, BOTH, 0x82, "P-26")
_bad("publish_packet_id_0_v3x", _frame(0x32, _text("a"), "0000"), V3X, BOTH, 0x82, "P-33")
_bad("publish_packet_id_0_v5", _frame(0x34, _text("a"), "0000 00"), V5, BOTH, 0x82, "P-33")
_bad("publish_qos_3", _frame(0x36, _text("a"), "0001 00"), ALL, BOTH, 0x81, "P-33")
_bad("publish_dup_qos_0", _frame(0x38, _text("a"), "00"), ALL, BOTH, 0x81, "P-33")
_bad("publish_without_properties_v5", _frame(0x30, _text("a")), V5, BOTH, 0x81)
_bad("publish_property_length_too_long", _frame(0x30, _text("a"), "03 01 00"), V5, BOTH, 0x81, "P-04")
_bad("publish_property_length_not_minimal", _frame(0x30, _text("a"), "8000"), V5, BOTH, 0x81, "P-03")
_bad("publish_payload_format_2", _frame(0x30, _text("a"), "02 01 02"), V5, BOTH, 0x82)
_bad("publish_alias_0", _frame(0x30, _text("a"), "03 23 0000"), V5, BOTH, 0x94, "P-51")
_bad("publish_subscription_identifier_0", _frame(0x30, _text("a"), "02 0b 00"), V5, SERVER, 0x82, "P-52")
_bad("publish_subscription_identifier_five_bytes",
     _frame(0x30, _text("a"), "06 0b 8080808001"), V5, SERVER, 0x81)  # fmt: skip
_bad("publish_subscription_identifier_not_minimal", _frame(0x30, _text("a"), "03 0b 8100"), V5, SERVER, 0x81)
_bad("publish_subscription_identifier_from_a_client", _frame(0x30, _text("a"), "02 0b 01"), V5, CLIENT, 0x82)
_bad("publish_response_topic_wildcard", _frame(0x30, _text("a"), "06 08 0003", b"b/#"), V5, BOTH, 0x82, "P-54")
_bad("publish_response_topic_empty", _frame(0x30, _text("a"), "03 08 0000"), V5, BOTH, 0x82)
_bad("publish_text_property_beyond_the_block", _frame(0x30, _text("a"), "04 03 0005 61", b"aaaaaa"), V5, BOTH, 0x81)

# PUBACK, PUBREC, PUBREL, PUBCOMP ----------------------------------------------------------------------------------

for _first, _ack, _failed in (
    (0x40, "puback", 0x87),
    (0x50, "pubrec", 0x97),
    (0x62, "pubrel", 0x92),
    (0x70, "pubcomp", 0x92),
):
    _c = f"{_failed:02x}"
    _good(_ack, _frame(_first, "0102"), ALL, BOTH, packet_id=258, code=0)
    _good(f"{_ack}_code", _frame(_first, "0102", _c), V5, BOTH, packet_id=258, code=_failed)
    _good(f"{_ack}_code_and_empty_block", _frame(_first, "0102", _c, "00"), V5, BOTH, canonical=False,
          packet_id=258, code=_failed, properties=None)  # fmt: skip
    _good(f"{_ack}_code_0", _frame(_first, "0102 00"), V5, BOTH, canonical=False, packet_id=258, code=0)
    _good(f"{_ack}_properties", _frame(_first, "0001", _c, "0b 1f 0001 72 26 0001 6b 0001 76"), V5, BOTH,
          packet_id=1, code=_failed,
          properties={"reason_string": "r", "user_properties": [("k", "v")]})  # fmt: skip
    _bad(f"{_ack}_empty", _frame(_first), ALL, BOTH, 0x81)
    _bad(f"{_ack}_half", _frame(_first, "01"), ALL, BOTH, 0x81)
    _bad(f"{_ack}_packet_id_0", _frame(_first, "0000"), ALL, BOTH, 0x82)
    _bad(f"{_ack}_trailing_v3x", _frame(_first, "0001 00"), V3X, BOTH, 0x81)
    _bad(f"{_ack}_trailing_v5", _frame(_first, "0001 00 00 00"), V5, BOTH, 0x81)
    _bad(f"{_ack}_unknown_code", _frame(_first, "0001 01"), V5, BOTH, 0x82)
    _bad(f"{_ack}_property_cut", _frame(_first, "0001 00 02 1f 00"), V5, BOTH, 0x81)
    _bad(f"{_ack}_flags", _frame(_first ^ 0x02, "0001"), ALL, BOTH, 0x81, "P-34")
_good("pubrel_dup_v3", _frame(0x6A, "0001"), (3,), BOTH, canonical=False, packet_id=1)
_bad("pubrel_dup", _frame(0x6A, "0001"), (4, 5), BOTH, 0x81, "P-34")

# SUBSCRIBE, SUBACK ------------------------------------------------------------------------------------------------

_good("subscribe_v3x", _frame(0x82, "0001", _text("a/+"), "01", _text("b/#"), "02"), V3X, CLIENT,
      packet_id=1, filters=[(b"a/+", 1), (b"b/#", 2)])  # fmt: skip
_good("subscribe_v5", _frame(0x82, "0001 00", _text("a"), "2d", _text("b"), "12"), V5, CLIENT,
      packet_id=1, filters=[(b"a", 0x2D), (b"b", 0x12)], properties=None)  # fmt: skip
_good("subscribe_shared_v5", _frame(0x82, "0001 00", _text("$share/g/a"), "01"), V5, CLIENT,
      filters=[(b"$share/g/a", 1)])  # fmt: skip
_good("subscribe_properties_v5",
      _frame(0x82, "0001 09 0b 8001 26 0001 61 0000", _text("a"), "00"), V5, CLIENT,
      filters=[(b"a", 0)],
      properties={"subscription_identifiers": [128], "user_properties": [("a", "")]})  # fmt: skip
_good("subscribe_empty_filter", _frame(0x82, "0001", _text(""), "00"), V3X, CLIENT, case="P-28", filters=[(b"", 0)])
_good("subscribe_dup_v3", _frame(0x8A, "0001", _text("a"), "00"), (3,), CLIENT, canonical=False, filters=[(b"a", 0)])
for _v in ALL:
    _p = "00" if _v == 5 else ""
    _bad(f"subscribe_packet_id_0_v{_v}", _frame(0x82, "0000", _p, _text("a"), "00"), (_v,), CLIENT, 0x82, "P-31")
    _bad(f"subscribe_no_filter_v{_v}", _frame(0x82, "0001", _p), (_v,), CLIENT, 0x82, "P-31")
    _bad(f"subscribe_qos_3_v{_v}", _frame(0x82, "0001", _p, _text("a"), "03"), (_v,), CLIENT, 0x82, "P-31")
    _bad(f"subscribe_reserved_40_v{_v}", _frame(0x82, "0001", _p, _text("a"), "40"), (_v,), CLIENT, 0x81, "P-31")
    _bad(f"subscribe_reserved_80_v{_v}", _frame(0x82, "0001", _p, _text("a"), "80"), (_v,), CLIENT, 0x81, "P-31")
    _bad(f"subscribe_without_options_v{_v}", _frame(0x82, "0001", _p, _text("a")), (_v,), CLIENT, 0x81)
    _bad(f"subscribe_filter_cut_v{_v}", _frame(0x82, "0001", _p, "0005 61"), (_v,), CLIENT, 0x81)
    _bad(f"subscribe_empty_body_v{_v}", _frame(0x82), (_v,), CLIENT, 0x81)
    _bad(f"unsubscribe_packet_id_0_v{_v}", _frame(0xA2, "0000", _p, _text("a")), (_v,), CLIENT, 0x82, "P-31")
    _bad(f"unsubscribe_no_filter_v{_v}", _frame(0xA2, "0001", _p), (_v,), CLIENT, 0x82, "P-31")
    _bad(f"unsubscribe_filter_cut_v{_v}", _frame(0xA2, "0001", _p, "0005 61"), (_v,), CLIENT, 0x81)
    for _flags in (0, 1, 3, 4, 6):
        _bad(f"subscribe_flags_{_flags}_v{_v}",
             _frame(0x80 | _flags, "0001", _p, _text("a"), "00"), (_v,), CLIENT, 0x81, "P-31")  # fmt: skip
        _bad(f"unsubscribe_flags_{_flags}_v{_v}",
             _frame(0xA0 | _flags, "0001", _p, _text("a")), (_v,), CLIENT, 0x81, "P-31")  # fmt: skip
_bad("subscribe_options_of_v5", _frame(0x82, "0001", _text("a"), "04"), V3X, CLIENT, 0x81, "P-31")
_bad("subscribe_retain_handling_3", _frame(0x82, "0001 00", _text("a"), "30"), V5, CLIENT, 0x82, "P-31")
_bad("subscribe_shared_no_local", _frame(0x82, "0001 00", _text("$share/g/x"), "04"), V5, CLIENT, 0x82, "P-30")
_bad("subscribe_identifier_0", _frame(0x82, "0001 02 0b 00", _text("a"), "00"), V5, CLIENT, 0x82, "P-52")
_bad("subscribe_identifier_twice", _frame(0x82, "0001 04 0b01 0b02", _text("a"), "00"), V5, CLIENT, 0x82, "P-47")
_good("suback_v3x", _frame(0x90, "0001 00 01 02 80"), V3X, SERVER, packet_id=1, codes=[0, 1, 2, 0x80])
_good("suback_v5", _frame(0x90, "0001 00 02 8f"), V5, SERVER, packet_id=1, codes=[2, 0x8F])
_good("suback_properties", _frame(0x90, "0001 04 1f 0001 72 00"), V5, SERVER,
      codes=[0], properties={"reason_string": "r"})  # fmt: skip
_bad("suback_without_codes", _frame(0x90, "0001"), V3X, SERVER, 0x81)
_bad("suback_without_codes_v5", _frame(0x90, "0001 00"), V5, SERVER, 0x81)
_bad("suback_unknown_code", _frame(0x90, "0001 03"), V3X, SERVER, 0x82)
_bad("suback_unknown_code_v5", _frame(0x90, "0001 00 03"), V5, SERVER, 0x82)

# UNSUBSCRIBE, UNSUBACK --------------------------------------------------------------------------------------------

_good("unsubscribe_v3x", _frame(0xA2, "0001", _text("a"), _text("b/#")), V3X, CLIENT,
      packet_id=1, filters=[b"a", b"b/#"])  # fmt: skip
_good("unsubscribe_v5", _frame(0xA2, "0001 00", _text("a")), V5, CLIENT, packet_id=1, filters=[b"a"])
_good("unsubscribe_properties", _frame(0xA2, "0001 06 26 0001 61 0000", _text("a")), V5, CLIENT,
      filters=[b"a"], properties={"user_properties": [("a", "")]})  # fmt: skip
_good("unsuback_v3x", _frame(0xB0, "0001"), V3X, SERVER, packet_id=1, codes=[])
_good("unsuback_v5", _frame(0xB0, "0001 00 00 11"), V5, SERVER, packet_id=1, codes=[0, 0x11])
_bad("unsuback_trailing_v3x", _frame(0xB0, "0001 00"), V3X, SERVER, 0x81)
_bad("unsuback_without_codes_v5", _frame(0xB0, "0001 00"), V5, SERVER, 0x81)
_bad("unsuback_unknown_code_v5", _frame(0xB0, "0001 00 01"), V5, SERVER, 0x82)

# PINGREQ, PINGRESP, DISCONNECT, AUTH ------------------------------------------------------------------------------

_good("pingreq", _bytes("c0 00"), ALL, CLIENT)
_good("pingresp", _bytes("d0 00"), ALL, SERVER)
_bad("pingreq_body", _bytes("c0 01 00"), ALL, CLIENT, 0x81)
_bad("pingresp_body", _bytes("d0 02 00 00"), ALL, SERVER, 0x81)
_bad("pingreq_flags", _bytes("c1 00"), ALL, CLIENT, 0x81)
_good("disconnect", _bytes("e0 00"), ALL, CLIENT)
_good("disconnect_with_will", _bytes("e0 01 04"), V5, CLIENT, code=4, properties=None)
_good("disconnect_code_0", _bytes("e0 01 00"), V5, CLIENT, canonical=False, code=0)
_good("disconnect_taken_over", _bytes("e0 01 8e"), V5, SERVER, code=0x8E)
_good("disconnect_properties", _bytes("e0 0b 00 09 11 00000005 1f 0001 72"), V5, CLIENT,
      code=0, properties={"session_expiry_interval": 5, "reason_string": "r"})  # fmt: skip
_good("disconnect_server_moved", _bytes("e0 06 9d 04 1c 0001 68"), V5, SERVER,
      code=0x9D, properties={"server_reference": "h"})  # fmt: skip
_bad("disconnect_body_v3x", _bytes("e0 01 00"), V3X, CLIENT, 0x81)
_bad("disconnect_unknown_code", _bytes("e0 01 01"), V5, BOTH, 0x82)
_bad("disconnect_trailing", _bytes("e0 03 00 00 00"), V5, BOTH, 0x81)
_bad("disconnect_flags", _bytes("e8 00"), ALL, CLIENT, 0x81)
_good("auth", _bytes("f0 0a 18 08 15 0001 6d 16 0001 ff"), V5, BOTH,
      code=0x18, properties={"authentication_method": "m", "authentication_data": b"\xff"})  # fmt: skip
_bad("auth_empty", _bytes("f0 00"), V5, BOTH, 0x82, "P-36")
_bad("auth_without_method", _bytes("f0 02 18 00"), V5, BOTH, 0x82, "P-36")
_bad("auth_before_v5", _bytes("f0 00"), V3X, BOTH, 0x82, "P-36")
_bad("auth_unknown_code", _bytes("f0 06 01 04 15 0001 6d"), V5, BOTH, 0x82)
_bad("auth_flags", _bytes("f2 00"), V5, BOTH, 0x81)
_bad("type_0", _bytes("00 00"), ALL, BOTH, 0x81)

# the length field -------------------------------------------------------------------------------------------------

_bad("length_five_bytes_ff", _bytes("10 ffffffff 7f"), ALL, CLIENT, 0x81, "P-01")
_bad("length_five_bytes_80", _bytes("10 80808080 01"), ALL, CLIENT, 0x81, "P-01")
_bad("length_five_bytes_then_publish",
     _bytes("c0 80808080 00") + _frame(0x30, _text("watched"), "00", b"x"), ALL, CLIENT, 0x81, "P-02")  # fmt: skip
_bad("length_not_minimal_2", _bytes("c0 80 00"), ALL, CLIENT, 0x81, "P-03")
_bad("length_not_minimal_3", _bytes("e0 8080 00"), ALL, CLIENT, 0x81, "P-03")
_bad("length_not_minimal_4", _bytes("e0 808080 00"), ALL, CLIENT, 0x81, "P-03")
