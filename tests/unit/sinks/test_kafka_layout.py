"""How records are laid out for Kafka."""

from __future__ import annotations

from collections import Counter

import pytest

from broker.config.template import MissingValue, Template
from broker.extend.sink import Record
from sinks._kafka_layout import (
    OWN_HEADERS,
    PUBLISHERS,
    Partitioner,
    default_key,
    headers_of,
    key_hash,
    timestamp_of,
    value_of,
)


@pytest.mark.parametrize(
    ("key", "java"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_keys_hash_as_in_java(key: bytes, java: int):
    """The vectors of org.apache.kafka.common.utils.UtilsTest."""
    assert key_hash(key) == java & 0x7FFFFFFF


def test_keys_of_every_length_hash_as_the_driver_does():
    from aiokafka.partitioner import murmur2

    for length in range(70):
        key = bytes((length * 31 + i * 7) % 256 for i in range(length))
        assert key_hash(key) == murmur2(key) & 0x7FFFFFFF


def spread(strategy: str | int, keys: list[bytes | None], partitions: int = 3) -> list[int]:
    choose = Partitioner(strategy).for_round()  # type: ignore[arg-type]
    return [choose(Record(f"t/{i % 2}", b""), key, partitions) for i, key in enumerate(keys)]


def test_one_key_goes_to_one_partition():
    assert spread("key", [b"foobar"] * 3) == [(-790332482 & 0x7FFFFFFF) % 3] * 3


def test_records_without_a_key_go_round():
    assert sorted(spread("key", [None] * 3)) == [0, 1, 2]


def test_round_robin_is_even():
    assert Counter(spread("round_robin", [b"same"] * 9)) == {0: 3, 1: 3, 2: 3}


def test_topic_hash_keeps_a_topic_together():
    places = spread("topic_hash", [None] * 8, 1000)
    assert len(set(places[::2])) == len(set(places[1::2])) == 1
    assert places[0] == key_hash(b"t/0") % 1000


def test_sticky_is_one_partition_a_round_and_another_the_next():
    partitioner = Partitioner("sticky")
    rounds = [partitioner.for_round() for _ in range(3)]
    places = [[choose(Record("t", b""), b"k%d" % i, 3) for i in range(4)] for choose in rounds]
    assert places == [[0] * 4, [1] * 4, [2] * 4]


def test_a_number_is_that_partition():
    assert spread(2, [b"a", None]) == [2, 2]


def test_the_key_is_the_client_and_without_one_the_topic():
    assert default_key(Record("t", b"", clientid="dev-1")) == b"dev-1"
    assert default_key(Record("t", b"")) == b"t"


def test_default_headers_say_where_a_record_came_from():
    record = Record(
        "t/é",
        b"",
        1,
        True,
        "dev-1",
        "alice",
        "10.0.0.7",
        "ab" * 16,
        5,
        "text/plain",
        "answers",
        b"\x01",
        [("unit", "C")],
    )
    headers_for = headers_of(True)
    expected = [
        ("mqtt-topic", "t/é".encode()), ("mqtt-clientid", b"dev-1"), ("mqtt-username", b"alice"), ("mqtt-qos", b"1"),
        ("mqtt-retain", b"true"), ("mqtt-msgid", b"ab" * 16), ("mqtt-content-type", b"text/plain"),
        ("mqtt-response-topic", b"answers"), ("mqtt-correlation-data", b"\x01"), ("unit", b"C"),
    ]  # fmt: skip
    assert headers_for(record) == expected
    assert headers_for(record) == expected  # what is remembered of a publisher was not changed by the first
    assert {name for name, _ in expected} - {"unit"} == OWN_HEADERS


def test_unknown_values_have_no_header_and_a_publisher_cannot_write_ours():
    record = Record(
        "t", b"", user_properties=[("mqtt-clientid", "forged"), ("mqtt-other", "kept"), ("a", "1"), ("a", "2")]
    )
    assert headers_of(True)(record) == [
        ("mqtt-topic", b"t"), ("mqtt-qos", b"0"), ("mqtt-retain", b"false"), ("mqtt-other", b"kept"),
        ("a", b"1"), ("a", b"2"),
    ]  # fmt: skip


def test_headers_stay_right_when_more_publishers_come_than_are_remembered():
    headers_for = headers_of(True)
    for i in (*range(PUBLISHERS + 10), 0, PUBLISHERS):
        assert headers_for(Record(f"t/{i}", b"", i % 3))[:2] == [
            ("mqtt-topic", b"t/%d" % i),
            ("mqtt-qos", b"%d" % (i % 3)),
        ]


def test_chosen_headers_are_exactly_those_that_have_a_value():
    headers_for = headers_of({"who": Template("${clientid}"), "v": Template("${payload.v}"), "fixed": Template("x")})
    assert headers_for(Record("t", b'{"v": 1}', user_properties=[("a", "b")])) == [("v", b"1"), ("fixed", b"x")]
    assert headers_of(False)(Record("t", b"")) == []


def test_values_are_bytes():
    record = Record("t", b'\xff{"v": 1}')
    assert value_of(Template("${payload}"))(record) is record.payload
    assert value_of(Template("${payload}"))(Record("t", b"")) == b""
    assert value_of(Template("<${topic}>"))(record) == b"<t>"
    assert value_of(Template('{"by": "${topic}", "v": ${qos}}'))(Record('"', b"")) == b'{"by": "\\"", "v": 0}'
    assert value_of(Template("${payload.v}"))(Record("t", b'{"v": [1]}')) == b"[1]"


@pytest.mark.parametrize("payload", [b"{}", b'{"v": null}', b"no json", b"[]"])
def test_s25_a_record_without_its_value_is_no_null_which_would_delete_its_key(payload: bytes):
    """S-25."""
    with pytest.raises(MissingValue, match=r"\$\{payload.v\} has no value"):
        value_of(Template("${payload.v}"))(Record("t", payload))


def test_timestamps_are_the_time_of_arrival_or_what_a_template_says():
    assert timestamp_of(Template("${ts}"))(Record("t", b"", ts=17)) == 17
    assert timestamp_of(Template("${ts}"))(Record("t", b"")) is None
    assert timestamp_of(Template("${payload.at}"))(Record("t", b'{"at": 18.0}')) == 18
    assert timestamp_of(Template("${payload.at}"))(Record("t", b'{"at": "19"}')) == 19
    for bad in (b'{"at": -1}', b'{"at": "soon"}', b'{"at": 1e30}'):
        with pytest.raises(ValueError):
            timestamp_of(Template("${payload.at}"))(Record("t", bad))
