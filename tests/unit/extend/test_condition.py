"""Conditions on records: what they say, what they cannot say, what cannot be read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from broker.extend.condition import Condition, Unclear
from broker.extend.sink import BatchFailed, NotConnected, Record, SinkConfig
from broker.runtime.selection import Selection

RECORD = Record(
    "plant/line-3/temp", b'{"value": 21.5, "unit": "C", "on": true, "list": [1, {"a": "x"}], "none": null, "n": 1}',
    1, False, "dev-1", "alice", user_properties=[("unit", "K")],
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("payload.value != null and payload.value < 1000", True), ("payload.value < 21.5", False),
        ("payload.value <= 21.5 and payload.value >= 2.15e1", True), ("payload.value > -1", True),
        ("payload.missing == null", True), ("payload.none == null", True), ("payload.value == null", False),
        ("payload.missing < 5", False), ("payload.missing >= 5", False), ("not payload.missing < 5", True),
        ("payload.unit == 'C'", True), ('payload.unit == "C"', True), ('payload.unit == "\\u0043"', True),
        ("payload.unit < 'D'", True), ("payload.on", True), ("payload.on == true", True), ("payload.n", False),
        ("payload.n == true", False), ("payload.n == 1", True), ("payload.n == 1.0", True), ("payload.n == '1'", False),
        ("payload.list[1].a == 'x'", True), ("payload.unit in ['F', 'C']", True), ("payload.n in [2, true]", False),
        ("topic[1] == 'line-3'", True), ("topic == 'plant/line-3/temp'", True), ("qos >= 1 and not retain", True),
        ("clientid == 'dev-1' and username in ['bob', 'alice']", True), ("user_property.unit == 'K'", True),
        ("false and true or true", True), ("true or true and false", True), ("false and (true or true)", False),
        ("not (false or false)", True), ("not not true", True), ("((true))", True), ("null == null", True),
        ("peerhost == null", True), ("'and' == 'and'", True), ("payload.on!=false", True), ("1<2", True),
    ],
)  # fmt: skip
def test_what_holds(text: str, holds: bool) -> None:
    assert Condition(text)(RECORD) is holds


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        ("payload.value < 1000", b'{"value": "warm"}'), ("payload.value < 1000", b'{"value": [1]}'),
        ("payload.value < 1000", b'{"value": true}'), ("payload.value < 1000", b"{no json"),
        ("payload.value == null", b"\xff"), ("payload.value == null", b""), ("qos < 'a'", b"{}"),
    ],
)  # fmt: skip
def test_what_cannot_be_said(text: str, payload: bytes) -> None:
    with pytest.raises(Unclear):
        Condition(text)(Record("t", payload))


def test_a_payload_that_is_null_has_no_fields() -> None:
    assert Condition("payload.value == null")(Record("t", b" null"))
    assert Condition("payload == 'no json'")(Record("t", b"no json"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "character 1"), ("payload.value <", "character 16"), ("payload.value = 5", "character 15"),
        ("a.b.c", "a message has no such value"), ("__import__('os')", "character 11|no such value"),
        ("(true", r"\) is expected"), ("true)", "character 5"), ("topic in 'a'", r"\[ is expected"),
        ("topic in []", "a value"), ("true true", "and, or, or the end"), ("1 == 2 == 3", "character 8"),
        ("payload.a; drop", "character 10"), ("'open", "character 1"), ("(" * 60 + "true" + ")" * 60, "fewer"),
        ("not " * 60 + "true", "fewer"), ("12abc", "character 1"), ("and", "a value"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(text: str, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        Condition(text)


class Store:
    """A sink that keeps what it is handed and refuses the topic `bad`."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.calls = 0
        self.error: Exception | None = None

    async def write(self, batch: Sequence[Record]) -> None:
        self.calls += 1
        if self.error:
            raise self.error
        self.stored += [record.topic for record in batch if record.topic != "bad"]
        if failed := {i: "refused" for i, record in enumerate(batch) if record.topic == "bad"}:
            raise BatchFailed(failed)

    async def check(self) -> None:
        raise NotConnected("no")

    async def close(self) -> None:
        self.stored.clear()


def test_a_sink_is_handed_what_its_condition_takes_and_the_positions_stay_right() -> None:
    config = SinkConfig.model_validate({"filters": ["#"], "where": "payload.v > 1"})
    assert config.where is not None
    assert config.model_dump()["where"] == "payload.v > 1"
    store = Store()
    selection = Selection(store, config.where)
    batch = [Record(topic, payload) for topic, payload in [
        ("a", b'{"v": 1}'), ("b", b'{"v": 2}'), ("c", b"no"), ("bad", b'{"v": 3}'), ("d", b'{"v": null}'),
        ("e", b'{"v": 9}'),
    ]]  # fmt: skip
    with pytest.raises(BatchFailed) as failed:
        asyncio.run(selection.write(batch))
    assert failed.value.failed == {2: "where: the payload is no JSON", 3: "refused"}
    assert store.stored == ["b", "e"]
    asyncio.run(selection.write(batch[:1]))
    assert store.calls == 1, "nothing was taken, nothing is written"
    store.error = NotConnected("gone")
    with pytest.raises(NotConnected):
        asyncio.run(selection.write(batch))
    with pytest.raises(NotConnected):
        asyncio.run(selection.check())
