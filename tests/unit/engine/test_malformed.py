"""Every packet of the shared table, sent to a live engine: what is valid is served, what is not ends the connection."""

from __future__ import annotations

import pytest

from broker.engine.core import Limits
from broker.mqtt import packets
from tests.packets.table import CLIENT, SERVER, Entry, data, malformed, valid
from tests.unit.engine.harness import Bench, Client, connect_packet
from tests.unit.engine.parts import closed_with, is_empty, publish

MALFORMED = [
    pytest.param(entry, version, id=f"{entry}-{version}")
    for entry in malformed(direction=CLIENT)
    for version in entry.versions
]
VALID = [
    pytest.param(entry, version, id=f"{entry}-{version}")
    for entry in valid(direction=CLIENT)
    for version in entry.versions
]


def _version_of(stream: bytes, version: int, **limits: int) -> Client:
    bench = Bench(max_queued_messages=10, **limits)
    if stream[0] >> 4 == 1:
        client = bench.socket()
        client.version = version
        return client
    client = bench.client("c", version=version)
    client.take()
    return client


def _end(entry: Entry, version: int, pieces: list[bytes]) -> None:
    client = _version_of(entry.data, version)
    bench = client.bench
    watcher = bench.client("watcher", version=5)
    watcher.subscribe("#")
    client.send(*pieces, publish("watched", version=version))
    assert client.closed
    assert not watcher.take()
    answers = client.bytes()
    if entry.data[0] >> 4 == 1 and entry.code == 0x84:  # in the form of the version that was asked for
        assert answers == (b"\x20\x03\x00\x84\x00" if version == 5 else b"\x20\x02\x00\x01")
    elif version == 5 and entry.data[0] >> 4 != 1:
        assert answers[0] == 0xE0
        assert answers[2] == entry.code
    elif version == 5 and entry.name not in MUTE:
        assert answers == bytes((0x20, 3, 0, entry.code or 0, 0))
    else:
        assert not answers
    watcher.send(b"\xe0\x00")
    assert is_empty(bench.engine)


MUTE = {"connect_header_flags_v5", "length_five_bytes_ff", "length_five_bytes_80"}
"""Broken before a version is known: nobody can say in which form to answer."""


@pytest.mark.parametrize(("entry", "version"), MALFORMED)
def test_a_malformed_packet_ends_the_connection_with_its_reason(entry: Entry, version: int) -> None:
    """P-01 to P-04, P-09, P-10, P-17 to P-20, P-22, P-23, P-25, P-26, P-31, P-33, P-34, P-36, P-44, P-45, P-47 to P-49,
    P-52, P-54."""
    _end(entry, version, [entry.data])


@pytest.mark.parametrize(("entry", "version"), MALFORMED)
def test_it_makes_no_difference_how_a_malformed_packet_is_cut(entry: Entry, version: int) -> None:
    """P-12."""
    if len(entry.data) > 200:
        pieces = [entry.data[:1], entry.data[1:100], entry.data[100:]]
    else:
        pieces = [entry.data[i : i + 1] for i in range(len(entry.data))]
    _end(entry, version, pieces)


@pytest.mark.parametrize(("entry", "version"), VALID)
def test_a_valid_packet_is_served(entry: Entry, version: int) -> None:
    client = _version_of(entry.data, version)
    client.send(entry.data)
    answers = client.take()
    kind = entry.data[0] >> 4
    if kind == 1:
        code = {"P-17": 0x84, "P-21": 0}.get(entry.case, 0)
        if entry.name == "connect_properties_v5":
            code = 0x8C  # P-65: it names an authentication method
        if entry.name == "connect_empty_client_id_v3":
            code = 2
        assert answers[0].code == (code if version == 5 or code < 3 else 1)
        assert client.closed == (code != 0)
    elif kind == 14:
        assert client.closed
        # a session expiry where CONNECT had none
        assert [answer.code for answer in answers] == ([0x82] if entry.name == "disconnect_properties" else [])
    elif kind == 15 or entry.name == "publish_alias_only":
        assert client.closed
        assert [answer.code for answer in answers] == [0x82]
    elif entry.name == "subscribe_empty_filter":
        assert client.closed  # P-28
    else:
        assert not client.closed
        client.send(b"\xc0\x00")
        assert client.bytes().endswith(b"\xd0\x00")


@pytest.mark.parametrize(("entry", "version"), [p for p in MALFORMED if p.values[0].case == "P-23"])  # type: ignore[attr-defined]
def test_p23_with_strictness_off_the_same_packets_are_served(entry: Entry, version: int) -> None:
    client = _version_of(entry.data, version, strict=False)
    client.send(entry.data)
    answers = client.take()
    kind = entry.data[0] >> 4
    if kind == 1:
        code = 0x8C if "authentication_method" in entry.name else 0
        assert [answer.code for answer in answers] == [code]
        assert client.closed == (code != 0)
    elif kind == 14:
        assert client.closed
        assert not answers
    elif kind == 15:
        assert client.closed  # nobody agreed on a method
    else:
        assert not client.closed
        client.send(b"\xc0\x00")
        assert client.bytes().endswith(b"\xd0\x00")


@pytest.mark.parametrize("stream", [b"\x10\xff\xff\xff\xff\x7f", b"\x10\x80\x80\x80\x80\x01"])
@pytest.mark.parametrize("live", [False, True])
def test_p01_the_fifth_byte_closes_and_nothing_is_kept_or_read_on(stream: bytes, live: bool) -> None:
    for cut in (True, False):
        bench = Bench()
        watcher = bench.client("watcher")
        watcher.subscribe("#")
        client = bench.client("c") if live else bench.socket()
        client.bytes()
        if cut:
            for i in range(4):
                client.send(stream[i : i + 1])
                assert not client.closed
            client.send(stream[4:5])
            assert client.closed
            client.send(stream[5:], publish("watched"), bytes(100_000))
        else:
            client.send(stream + publish("watched"))
        assert client.closed
        assert client.channel.pieces is None
        assert not client.bytes()
        assert not watcher.take()


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("first", [b for b in range(256) if b >> 4 != 1])
def test_p13_only_connect_may_come_first(first: int, version: int) -> None:
    bench = Bench()
    client = bench.socket()
    client.send(bytes((first, 2)) + b"\x00\x01" + connect_packet("c", version))
    assert client.closed
    assert not client.bytes()
    assert is_empty(bench.engine)


@pytest.mark.parametrize("first", [b for b in range(0x20, 0x100, 0x10)])
def test_p05_a_large_first_packet_of_another_type_is_closed_after_its_header(first: int) -> None:
    bench = Bench()
    client = bench.socket()
    client.send(bytes((first,)))
    assert not client.closed
    client.send(b"\xff\xff\xff\x7f")
    assert client.closed
    client.send(b"x" * 100_000)
    assert client.channel.pieces is None
    assert not client.bytes()


def test_p06_a_connect_above_the_limit_before_login_is_closed_after_its_header() -> None:
    bench = Bench()
    small, large = bench.socket(), bench.socket()
    small.send(b"\x10\x80\x80\x04")  # 65 536
    assert not small.closed
    large.send(b"\x10\x81\x80\x04")
    assert large.closed
    assert bench.engine.core.events["connect_too_large"] == 1


def test_p02_nothing_behind_a_broken_length_is_taken_for_a_packet() -> None:
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("#")
    client = bench.client("c")
    client.send(data("length_five_bytes_then_publish") + publish("watched"))
    assert client.closed
    assert not watcher.take()


@pytest.mark.parametrize("version", [4, 5])
def test_what_came_before_a_malformed_packet_is_still_delivered(version: int) -> None:
    """P-12: whether both came in one segment or not."""
    for cut in (False, True):
        bench = Bench()
        watcher = bench.client("w")
        watcher.subscribe("#")
        client = bench.client("c", version=version)
        good, bad = publish("a", version=version) * 3, publish("a/#", version=version)
        client.send(*((good, bad) if cut else (good + bad,)))
        assert len(watcher.take()) == 3
        assert closed_with(client, 0x90)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("packet", [b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x00", b"\xb0\x02\x00\x01", b"\xd0\x00"])
def test_p35_packets_only_servers_send_end_the_connection(version: int, packet: bytes) -> None:
    bench = Bench()
    client = bench.client("c", version=version)
    client.send(packet)
    assert closed_with(client, 0x82)


@pytest.mark.parametrize("entry", [e for e in valid(5, SERVER) if e.data[0] >> 4 in (2, 9, 11, 13)], ids=str)
def test_p35_neither_do_their_properties_help(entry: Entry) -> None:
    client = Bench().client("c", version=5)
    client.send(entry.data)
    assert closed_with(client, 0x82)


def test_p46_a_packet_above_the_maximum_is_refused_after_its_header() -> None:
    bench = Bench(max_packet_size=1000)
    five = bench.client("five", version=5)
    assert five.connack.properties.maximum_packet_size == 1000
    five.publish("t", b"x" * 900)
    assert not five.closed
    five.send(b"\x30\xe6\x07")  # 998 bytes and the header's three
    assert closed_with(five, 0x95)
    four = bench.client("four")
    four.send(b"\x30\xe6\x07")
    assert closed_with(four, 0x95)
    exact = bench.client("exact", version=5)
    exact.send(b"\x30\xe5\x07")
    assert not exact.closed


@pytest.mark.parametrize("version", [4, 5])
def test_p46_a_megabyte_is_the_limit_and_nothing_above_it_is_kept(version: int) -> None:
    assert Limits().max_packet_size == 1 << 20
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("#")
    within = bench.client("within", version=version)
    within.publish("t", bytes((1 << 20) - 4 - 3 - (version == 5)))
    assert not within.closed
    assert len(watcher.take()) == 1
    beyond = bench.client("beyond", version=version)
    beyond.send(b"\x30\xfd\xff\x3f")  # a byte more than a megabyte, with the four of the header
    assert closed_with(beyond, 0x95)
    beyond.send(bytes(100_000))
    assert beyond.channel.pieces is None
    assert not watcher.take()


def test_p49_bad_will_properties_leave_nothing_behind() -> None:
    bench = Bench()
    for name in ("connect_will_unknown_property", "connect_will_misplaced_property", "connect_will_response_wildcard"):
        for _ in range(200):
            client = bench.socket()
            client.version = 5
            client.send(data(name))
            (answer,) = client.take()
            assert answer.code in (0x81, 0x82)
    assert is_empty(bench.engine)
    assert not bench.soon


@pytest.mark.parametrize("version", [3, 4, 5])
def test_p17_the_bridge_bit_needs_a_listener_that_allows_it(version: int) -> None:
    bench = Bench()
    raw = {3: data("connect_bridge_v3"), 4: data("connect_bridge_v4"), 5: data("connect_level_133")}[version]
    client = bench.socket()
    client.version = version
    client.send(raw)
    assert client.closed
    bench.listener.bridge_bit = True
    client = bench.socket()
    client.version = version
    client.send(raw)
    assert client.closed == (version == 5)


@pytest.mark.parametrize("version", [3, 4, 5])
def test_p20_a_password_alone_reaches_the_gate_from_mqtt_5(version: int) -> None:
    bench = Bench()
    bench.gate.slow.add("c")
    client = bench.socket()
    client.version = version
    client.send(data(f"connect_password_alone_v{version}"))
    assert client.closed == (version != 5)
    if version == 5:
        _, connect = bench.gate.pending["c"]
        assert (connect.username, connect.password) == (None, b"p")


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfa", "é".encode(), "e\u0301".encode()])
def test_p24_text_is_never_normalised(text: bytes) -> None:
    bench = Bench()
    watcher = bench.client("w", version=5)
    watcher.subscribe("#")
    others = {}
    for name in ("\ufeffa", "a", "é", "e\u0301"):
        others[name] = bench.client(f"s-{name.encode().hex()}")
        others[name].subscribe(name)
    client = bench.client("c")
    client.send(packets.encode_publish(text, b"x", 0, False, False, 0, 4))
    (message,) = watcher.take()
    assert message.topic == text
    assert [name.encode() for name, other in others.items() if other.take()] == [text]
    bench.gate.deny_publish.add((None, text.decode()))
    bench.engine.rights_changed()
    client.send(packets.encode_publish(text, b"x", 0, False, False, 0, 4))
    assert not watcher.take()
    client.publish("é" if text != "é".encode() else "a")
    assert watcher.take()


def test_p23_control_characters_pass_only_where_strictness_is_off() -> None:
    bench = Bench(strict=False)
    watcher = bench.client("w")
    watcher.subscribe("#")
    client = bench.client("c")
    client.send(packets.encode_publish(b"a\x01b", b"x", 0, False, False, 0, 4))
    assert watcher.bytes() == packets.encode_publish(b"a\x01b", b"x", 0, False, False, 0, 4)
    client.send(packets.encode_publish(b"a\x00b", b"x", 0, False, False, 0, 4))
    assert client.closed


PROPERTIES = {
    0x01: b"\x01", 0x02: b"\0\0\0\x05", 0x03: b"\0\x01t", 0x08: b"\0\x01r", 0x09: b"\0\x01c", 0x0B: b"\x05",
    0x11: b"\0\0\0\x05", 0x12: b"\0\x01i", 0x13: b"\0\x05", 0x15: b"\0\x01m", 0x16: b"\0\x01d", 0x17: b"\x01",
    0x18: b"\0\0\0\x05", 0x19: b"\x01", 0x1A: b"\0\x01i", 0x1C: b"\0\x01s", 0x1F: b"\0\x01r", 0x21: b"\0\x05",
    0x22: b"\0\x05", 0x23: b"\0\x05", 0x24: b"\x01", 0x25: b"\x01", 0x27: b"\0\0\x10\0", 0x28: b"\x01", 0x29: b"\x01",
    0x2A: b"\x01",
}  # fmt: skip
"""One valid value of every property but the user property, which may be repeated and stands almost everywhere."""
PLACES = {
    "connect": (0x10, b"\0\x04MQTT\x05\x02\0\0", b"\0\x01c", {0x11, 0x15, 0x16, 0x17, 0x19, 0x21, 0x22, 0x27}),
    "will": (0x10, b"\0\x04MQTT\x05\x06\0\0\0\0\x01c", b"\0\x01w\0\0", {0x01, 0x02, 0x03, 0x08, 0x09, 0x18}),
    "publish": (0x32, b"\0\x01t\0\x01", b"p", {0x01, 0x02, 0x03, 0x08, 0x09, 0x23}),
    "puback": (0x40, b"\0\x01\0", b"", {0x1F}),
    "pubrec": (0x50, b"\0\x01\0", b"", {0x1F}),
    "pubrel": (0x62, b"\0\x01\0", b"", {0x1F}),
    "pubcomp": (0x70, b"\0\x01\0", b"", {0x1F}),
    "subscribe": (0x82, b"\0\x01", b"\0\x01f\0", {0x0B}),
    "unsubscribe": (0xA2, b"\0\x01", b"\0\x01f", set()),
    "disconnect": (0xE0, b"\0", b"", {0x11, 0x1F, 0x1C}),
}
"""Where properties stand in what a client sends, and which are allowed there."""


def _with(place: str, block: bytes) -> Client:
    first, before, after, _ = PLACES[place]
    body = before + bytes((len(block),)) + block + after
    bench = Bench()
    if first == 0x10:
        client = bench.socket()
        client.version = 5
    else:
        client = bench.client("c", version=5, session_expiry_interval=9)
        client.take()
    client.send(bytes((first, len(body))) + body)
    return client


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", PROPERTIES, ids=hex)
def test_p47_p48_a_property_stands_where_it_belongs_and_once(place: str, number: int) -> None:
    one = bytes((number,)) + PROPERTIES[number]
    allowed = number in PLACES[place][3]
    if not allowed:
        assert closed_with(_with(place, one), 0x82)
        return
    if number == 0x15:
        assert closed_with(_with(place, one), 0x8C)
    elif number == 0x16:
        assert closed_with(_with(place, one), 0x82), "data without a method"
    elif number != 0x1C and place != "disconnect":
        assert not _with(place, one).closed
    assert closed_with(_with(place, one + one), 0x82)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "number", [b"\x00", b"\x04", b"\x7f", b"\x81\x01", b"\xa1\x00", b"\xff\xff\x01", b"\xff\xff\xff\xff\x7f"]
)
def test_p48_unknown_properties_end_the_connection(place: str, number: bytes) -> None:
    assert closed_with(_with(place, number + b"\x01"), 0x81)


@pytest.mark.parametrize("place", PLACES)
def test_p50_too_many_user_properties_end_the_connection(place: str) -> None:
    pair = b"\x26\0\0\0\0"
    few = _with(place, pair * 20)
    assert few.closed == (place == "disconnect")
    assert not [answer for answer in few.take() if getattr(answer, "code", None) == 0x97]
    first, before, after, _ = PLACES[place]
    block = pair * 65
    body = before + b"\xc5\x02" + block + after
    client = _with("publish", b"") if first != 0x10 else Bench().socket()
    client.version = 5
    client.take()
    client.send(bytes((first,)) + bytes((len(body) & 127 | 128, len(body) >> 7)) + body)
    assert closed_with(client, 0x97)
