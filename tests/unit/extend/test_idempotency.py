"""What repetitions are told by instead of message ids: which templates may, what they yield, who gets it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from broker.config.problems import ConfigError
from broker.config.settings import Settings, load_settings
from broker.config.template import MissingValue, Template
from broker.extend.condition import Condition
from broker.extend.idempotency import compile_key
from broker.extend.record import compile_template, payload_json
from broker.extend.sink import BatchFailed, NotConnected, Record
from broker.runtime.selection import Keyed, Selection
from sinks._progress import Progress


def record(payload: bytes = b'{"id": 7}', msgid: str | None = "0" * 32, **more: Any) -> Record:
    return Record("t/1", payload, 1, clientid="dev", msgid=msgid, ts=5, **more)


def key(text: str, of: Record) -> str:
    return compile_key(Template(text))(of)


def test_a_key_has_the_form_of_a_message_id_however_long_its_values_are() -> None:
    for payload in (b'{"id": 7}', b'{"id": "%s"}' % (b"x" * 100_000), b'{"id": {"a": [1, null]}}', b'{"id": 0}'):
        assert re.fullmatch("[0-9a-f]{32}", key("${payload.id}", record(payload)))
    assert re.fullmatch("[0-9a-f]{32}", key("${payload}", record(b"\xff\x00")))


def test_the_same_values_are_the_same_key_in_every_process_and_others_are_not() -> None:
    again = record(b'{"try": 2, "id": 7}', msgid="f" * 32)
    assert key("${clientid}:${payload.id}", record()) == key("${clientid}:${payload.id}", again)
    assert key("${clientid}:${payload.id}", again) == "657c71ce5d9fbe5fe70ed6340c366d66", "of another release, too"
    assert key("${payload.id}", record()) != key("${payload.id}", record(b'{"id": 8}'))
    assert key("a:${payload.id}", record()) != key("b:${payload.id}", record()), "two plants in one table"
    sent = record(user_properties=[("id", "7")], correlation_data=b"\x00\x07")
    assert len({key(text, sent) for text in ("${user_property.id}", "${correlation_data}", "${topic[1]}")}) == 3


def test_a_device_cannot_write_what_looks_like_the_key_of_another() -> None:
    """S-29: text of a device never leaves its place."""
    mine = Record("t", b'{"id": "b-c"}', clientid="a")
    theirs = Record("t", b'{"id": "c"}', clientid="a-b")
    assert compile_template(Template("${clientid}-${payload.id}"))(mine) == "a-b-c"
    assert compile_template(Template("${clientid}-${payload.id}"))(theirs) == "a-b-c"
    assert key("${clientid}-${payload.id}", mine) != key("${clientid}-${payload.id}", theirs)


@pytest.mark.parametrize("payload", [b"no json", b"{}", b'{"id": null}', b'{"id": ""}', b"[1]", b""])
def test_there_is_no_key_where_a_value_is_missing_null_or_empty(payload: bytes) -> None:
    with pytest.raises(MissingValue, match=r"\$\{payload.id} has no value"):
        key("${clientid}:${payload.id}", record(payload))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("${payload.id", "without }"),
        ("${packet_id}", "a message has no such value"),
        ("${clientid}:${session_epoch}", "a message has no such value"),
        ("${msgid}", "is another each time"),
        ("${payload.id}:${ts}", "is another each time"),
        ("${.}", "is another each time"),
        ("", "does not tell a client's messages apart"),
        ("fixed", "does not tell a client's messages apart"),
        ("${clientid}/${qos}", "does not tell a client's messages apart"),
    ],
)
def test_a_template_that_could_not_tell_a_repetition_is_refused_with_file_and_line(
    tmp_path: Path, text: str, reason: str
) -> None:
    """What is no key would lose messages, or keep every repetition."""
    [problem] = problems(tmp_path, f'path = "t.db"\nidempotency_key = "{text}"')
    assert problem.startswith("conf.d/30.toml:5: sinks.store.idempotency_key: ")
    assert reason in problem


SQL = 'dsn = "KIND://u@127.0.0.1/d"\npassword = "p"\ntable = "t"\n'


@pytest.mark.parametrize(
    ("kind", "keys", "reason"),
    [
        ("sqlite", 'path = "t.db"\ncolumns = { a = "${payload}" }', "no column is exactly"),
        ("sqlite", 'path = "t.db"', ""),
        ("postgresql", SQL + 'columns = { id = "x-${msgid}" }', "no column is exactly"),
        ("postgresql", SQL + 'columns = { id = "${msgid}", b = "${clientid}" }\nkey = ["b"]', "key does not hold id"),
        ("mysql", SQL + 'key = ["msgid", "time"]', "key holds time, the time of arrival"),
        ("mysql", SQL + 'key = ["msgid"]', ""),
        ("postgresql", SQL, ""),
        ("mongodb", 'servers = ["127.0.0.1:1"]\nfields = { _id = "${payload.id}" }', "_id of fields should hold"),
        ("mongodb", 'servers = ["127.0.0.1:1"]\nmode = "time_series"', "time series"),
        ("mongodb", 'servers = ["127.0.0.1:1"]\nmode = "upsert"\nupsert_by = ["clientid"]\n'
                    'fields = { clientid = "${clientid}", v = "${payload}" }', "clientid of fields should hold"),
        ("mongodb", 'servers = ["127.0.0.1:1"]\nmode = "upsert"\nupsert_by = ["_id"]', ""),
        ("mongodb", 'servers = ["127.0.0.1:1"]', ""),
        ("redis", 'servers = ["127.0.0.1:1"]\nredis_key = "s"', "entries of a stream have ids that rise with time"),
        ("redis", 'servers = ["127.0.0.1:1"]\ncommand = "SET"\nredis_key = "s:${clientid}"', "nothing here holds"),
        ("redis", 'servers = ["127.0.0.1:1"]\ncommand = "HSET"\nredis_key = "s:${msgid}"', ""),
        ("redis", 'servers = ["127.0.0.1:1"]\ncommand = "PUBLISH"\nredis_key = "s"\nvalue = "${.}"', ""),
        ("http", 'url = "https://a/"\nidempotency_header = ""\nbody = "${payload}"', "the service could tell no"),
        ("http", 'url = "https://a/"\nidempotency_header = ""\nbody = { id = "${msgid}" }', ""),
        ("http", 'url = "https://a/"\nbody = "${payload}"', ""),
        ("kafka", 'servers = ["127.0.0.1:1"]\ntopic = "t"\nheaders = false', "who reads the topic could tell"),
        ("kafka", 'servers = ["127.0.0.1:1"]\ntopic = "t"\nheaders = { id = "${msgid}" }', ""),
        ("kafka", 'servers = ["127.0.0.1:1"]\ntopic = "t"\nheaders = false\ntransactional_id = "x"', ""),
        ("kafka", 'servers = ["127.0.0.1:1"]\ntopic = "t"', ""),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_refused(tmp_path: Path, kind: str, keys: str, reason: str) -> None:
    pytest.importorskip({"postgresql": "asyncpg", "mysql": "asyncmy", "mongodb": "pymongo", "http": "aiohttp",
                         "kafka": "aiokafka"}.get(kind, kind if kind == "redis" else "sqlite3"))  # fmt: skip
    text = f'{keys.replace("KIND", kind)}\nidempotency_key = "${{payload.id}}"'
    if reason:
        [problem] = problems(tmp_path, text, kind)
        assert problem.startswith("conf.d/30.toml:1: sinks.store: idempotency_key: ")
        assert reason in problem
    else:
        assert load(tmp_path, text, kind).sinks["store"].config.idempotency_key == Template("${payload.id}")  # type: ignore[attr-defined]


def load(folder: Path, keys: str, kind: str = "sqlite") -> Settings:
    (folder / "conf.d").mkdir()
    (folder / "conf.d" / "30.toml").write_text(f'[sinks.store]\nkind = "{kind}"\nfilters = ["#"]\n{keys}\n')
    return load_settings(folder / "conf.d")


def problems(folder: Path, keys: str, kind: str = "sqlite") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, keys, kind)
    return caught.value.problems


class Store:
    """A sink that keeps what it is handed and fails as it is told."""

    def __init__(self) -> None:
        self.batches: list[list[Record]] = []
        self.error: Exception | None = None

    async def write(self, batch: Sequence[Record]) -> None:
        self.batches.append(list(batch))
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    async def check(self) -> None:
        raise NotConnected("no")

    async def close(self) -> None:
        self.batches.clear()


def batch() -> list[Record]:
    """Two of one key, one without, one of another key."""
    return [
        record(payload, msgid=f"{number:032x}")
        for number, payload in enumerate((b'{"id": 1}', b'{"id": 1, "try": 2}', b'{"try": 3}', b'{"id": 4}'))
    ]


async def test_a_sink_gets_the_key_for_the_message_id_and_what_has_none_is_refused() -> None:
    store, made = Store(), batch()
    with pytest.raises(BatchFailed) as failed:
        await Keyed(store, compile_key(Template("${payload.id}"))).write(made)
    assert failed.value.failed == {2: "idempotency_key: ${payload.id} has no value"}
    [first, again, other] = store.batches[0]
    assert first.msgid == again.msgid == key("${payload.id}", made[0]) != other.msgid
    assert [first.payload, again.payload, other.ts, other.clientid] == [b'{"id": 1}', b'{"id": 1, "try": 2}', 5, "dev"]
    assert payload_json(again) is payload_json(made[1]), "read as JSON once"
    assert [r.msgid for r in made] == [f"{n:032x}" for n in range(4)], "the records of the worker stay as they are"


async def test_what_the_sink_refuses_keeps_its_position() -> None:
    store, made = Store(), batch()
    store.error = BatchFailed({1: "no", 2: "never"})
    with pytest.raises(BatchFailed) as failed:
        await Keyed(store, compile_key(Template("${payload.id}"))).write(made)
    assert failed.value.failed == {1: "no", 2: "idempotency_key: ${payload.id} has no value", 3: "never"}
    with pytest.raises(BatchFailed):
        await Keyed(store, compile_key(Template("${payload.id}"))).write(made[2:3])
    assert len(store.batches) == 1, "nothing has a key, nothing is written"


@pytest.mark.parametrize("vouched", [True, False])
async def test_records_of_one_key_are_told_apart_and_known_again_when_the_batch_comes_again(vouched: bool) -> None:
    """A foreign broker gives no message ids: then it is the same objects that come again."""
    store, made = Store(), batch()
    if not vouched:
        made = [record(r.payload, msgid=None) for r in made]
    keyed = Keyed(store, compile_key(Template("${payload.id}")))
    store.error = NotConnected("gone")
    with pytest.raises(NotConnected):
        await keyed.write(made)
    with pytest.raises(BatchFailed):
        await keyed.write(made)
    assert [r.identity for r in store.batches[0]] == [r.identity for r in store.batches[1]]
    assert len({r.identity for r in store.batches[0]}) == 3
    if vouched:
        assert store.batches[0][1].identity == made[1].identity == f"{1:032x}"


async def test_a_condition_asks_for_the_message_id_of_the_broker_at_every_try_and_comes_first() -> None:
    store, made = Store(), batch()
    keyed = Keyed(store, compile_key(Template("${payload.id}")))
    selection = Selection(keyed, Condition(f'msgid > "{1:032x}" and payload.id != null'))
    store.error = NotConnected("gone")
    with pytest.raises(NotConnected):
        await selection.write(made)
    await selection.write(made)
    assert [[r.payload for r in written] for written in store.batches] == [[b'{"id": 4}']] * 2
    with pytest.raises(NotConnected):
        await selection.check()
    await selection.close()
    assert store.batches == []


async def test_of_two_records_of_one_key_each_is_settled_for_itself_though_the_batch_comes_again() -> None:
    """The first was refused, the second stored, and then the target went away."""
    first, again, left_out, other = (record(b'{"id": %d}' % n, msgid=f"{n:032x}").under("f" * 32) for n in range(4))
    progress = Progress()
    work = progress.of([first, again, left_out, other])
    work.refuse(0, "poison")
    work.stored([1])
    work.__exit__(NotConnected, NotConnected("gone"), None)
    work = progress.of([first, again, left_out, other])
    assert list(work.todo) == [2, 3]
    work.stored([2, 3])
    with pytest.raises(BatchFailed) as failed:
        work.__exit__(None, None, None)
    assert failed.value.failed == {0: "poison"}
    assert list(progress.of([other]).todo) == [0], "nothing is remembered once all are settled"
