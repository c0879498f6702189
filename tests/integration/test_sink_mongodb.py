"""The MongoDB sink against MongoDB, or what speaks as one; what that cannot do, against a double on the wire."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("pymongo")

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from broker.runtime.writer import Writer
from sinks.mongodb import BACKEND, MongodbConfig
from tests import nosql_servers
from tests.clock import clock
from tests.integration.fake_mongo import FakeMongo
from tests.integration.sink_suite import MOMENT, SECRET, SinkSuite, deliver, msgid, opened, records
from tests.integration.sql_sink_suite import LONG
from tests.nosql_servers import MongoServer, or_skip
from tests.proxy import Proxy
from tests.servers import PATIENCE, program

MANY = 100_000 if program("mongod") or os.environ.get("TEST_MONGODB") else 20_000
"""Collections of the long form. mongo-java-server takes the longer for each the more it has: these are what it makes in
ten minutes, a hundred thousand would take three hours."""


@dataclass
class Documents:
    """The collection `mqtt.messages` of a server of the tests' own."""

    server: MongoServer

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def collection(self) -> Any:
        return self.server.connect()["mqtt"]["messages"]

    async def payloads(self) -> list[bytes]:
        return await asyncio.to_thread(
            lambda: [d["payload"].encode() for d in self.collection.find() if "payload" in d]
        )

    async def stop(self) -> None:
        self.server.stop()

    async def start(self) -> None:
        self.server.start(30)  # in this thread: the process ends with the one that started it


@pytest.fixture(scope="module")
def server() -> Iterator[MongoServer]:
    with or_skip("mongodb", nosql_servers.mongodb) as server:
        yield server


@pytest.fixture
def target(server: MongoServer) -> Documents:
    server.connect().drop_database("mqtt")
    return Documents(server)


class TestDocuments(SinkSuite):
    backend = BACKEND

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        return {"servers": [f"127.0.0.1:{port}"], **more}

    async def plant(self, target: Documents) -> dict[str, Any]:
        target.collection.create_index("mark", unique=True)
        target.collection.insert_one({"mark": "poison"})
        return {"fields": {"_id": "${msgid}", "payload": "${payload}", "mark": "${payload}"}}

    def poison(self, number: int) -> Record:
        return records(number, payload=b"poison")[0]

    async def test_fields_keep_their_kind(self, target: Documents) -> None:
        fields = {
            "_id": "${msgid}", "time": "${ts}", "raw": "${payload}", "value": "${payload.v}", "list": "${payload.l}",
            "text": "n=${payload.v}", "none": "${payload.none}", "whole": "${payload}", "at": "${payload.at}",
        }  # fmt: skip
        keys = self.raw(target.port, fields=fields, dates=["time", "at"], documents=["whole"])
        sent = b'{"v": 1.5, "l": [1, {"a.b": null, "$c": true}], "at": "2026-11-21T08:00:00.250Z"}'
        async with opened(BACKEND, keys) as sink:
            await sink.write(records(7, payload=sent))
        found = target.collection.find_one({})
        assert found.pop("time") == datetime.fromtimestamp(MOMENT / 1000, UTC).replace(tzinfo=None) + timedelta(
            milliseconds=7
        )
        assert found.pop("at") == datetime(2026, 11, 21, 8, 0, 0, 250_000)
        assert found.pop("whole") == {"v": 1.5, "l": [1, {"a.b": None, "$c": True}], "at": "2026-11-21T08:00:00.250Z"}
        assert found == {"_id": msgid(7), "raw": sent.decode(), "value": 1.5, "list": [1, {"a.b": None, "$c": True}],
                         "text": "n=1.5", "none": None}  # fmt: skip

    async def test_bytes_that_are_no_text_are_binary(self, target: Documents) -> None:
        async with opened(BACKEND, self.raw(target.port)) as sink:
            await sink.write(records(1, payload=b"\xff\x00"))
        assert target.collection.find_one({})["payload"] == b"\xff\x00"

    async def test_what_is_no_document_is_a_dead_letter(self, target: Documents) -> None:
        keys = self.raw(target.port, documents=["payload"], fields={
            "_id": "${msgid}", "payload": "${payload}", "time": "${payload.t}", "number": "${payload.n}"
        })  # fmt: skip
        bad = {1: b"{", 2: b'{"n": 18446744073709551615}', 3: b'{"t": "noon"}', 4: b'{"t": [1]}', 5: b'{"a\\u0000": 1}'}
        good = records(0, payload=b'{"n": 5, "t": 1}')
        async with opened(BACKEND, keys) as sink:
            with pytest.raises(BatchFailed) as failed:
                await sink.write(good + [r for n, payload in bad.items() for r in records(n, payload=payload)])
        assert sorted(failed.value.failed) == list(bad)
        assert "payload: the text is no JSON" in failed.value.failed[1]
        assert "8-byte" in failed.value.failed[2]
        assert "time:" in failed.value.failed[3]
        assert target.collection.count_documents({}) == 1

    async def test_another_unique_index_refuses_one_record(self, target: Documents) -> None:
        """Code 11000 means stored only where it is about `_id`."""
        target.collection.create_index("serial", unique=True)
        keys = self.raw(target.port, fields={"_id": "${msgid}", "serial": "${payload.s}", "payload": "${payload}"})
        batch = [r for n in range(1, 11) for r in records(n, payload=b'{"s": %d}' % (n if n != 6 else 2))]
        async with opened(BACKEND, keys) as sink:
            for _ in range(2):
                with pytest.raises(BatchFailed) as failed:
                    await sink.write(batch)
                assert list(failed.value.failed) == [5]
                assert "11000" in failed.value.failed[5]
        assert target.collection.count_documents({}) == 9

    async def test_upsert_keeps_the_latest_of_each_device(self, target: Documents) -> None:
        keys = self.raw(target.port, mode="upsert", upsert_by=["clientid"],
                        fields={"clientid": "${clientid}", "value": "${payload.v}", "time": "${ts}"})  # fmt: skip
        target.collection.insert_one({"clientid": "dev-1", "place": "hall"})
        batch = [r for n in range(1, 51) for r in records(n, payload=b'{"v": %d}' % n, clientid=f"dev-{n % 5}")]
        async with opened(BACKEND, keys) as sink:
            await sink.write(batch)
            await sink.write(batch)
            with pytest.raises(BatchFailed) as failed:
                await sink.write(records(51, clientid=None))
        assert "clientid has no value" in failed.value.failed[0]
        found = {d["clientid"]: (d["value"], d.get("place")) for d in target.collection.find()}
        assert found == {f"dev-{n}": (n + 45 if n else 50, "hall" if n == 1 else None) for n in range(5)}

    async def test_an_upsert_whose_latest_is_refused_keeps_the_one_before(self, target: Documents) -> None:
        target.collection.create_index("value", unique=True)
        target.collection.insert_one({"clientid": "other", "value": 3})
        keys = self.raw(target.port, mode="upsert", upsert_by=["clientid"],
                        fields={"clientid": "${clientid}", "value": "${payload.v}"})  # fmt: skip
        async with opened(BACKEND, keys) as sink:
            with pytest.raises(BatchFailed) as failed:
                await sink.write([r for n in (1, 2, 3) for r in records(n, payload=b'{"v": %d}' % n)])
        assert list(failed.value.failed) == [2]
        assert target.collection.find_one({"clientid": "dev"})["value"] == 2

    @pytest.mark.parametrize(
        "collections", [pytest.param(1_000, marks=pytest.mark.timeout(240)), pytest.param(MANY, marks=LONG)]
    )
    async def test_s28_a_database_of_many_collections_is_checked_quickly(self, collections: int) -> None:
        """S-28: a hundred thousand in the long form, where the server can."""
        upsert = {"mode": "upsert", "upsert_by": ["clientid"], "fields": {"clientid": "${clientid}", "v": "1"},
                  "dates": []}  # fmt: skip
        with or_skip("mongodb", nosql_servers.mongodb) as server:  # its own: to drop so many takes minutes
            client = server.connect()
            client.drop_database("many")
            for number in range(collections):
                await asyncio.to_thread(client["many"].command, "create", f"c{number}")
            async with Proxy("127.0.0.1", server.port) as proxy:
                for mode in ({}, upsert):
                    keys = self.raw(proxy.port, database="many", collection="c7", **mode)
                    times: dict[str, list[float]] = {"check": [], "write": []}
                    for _ in range(3):  # a sink that was just opened knows nothing
                        async with opened(BACKEND, keys) as sink:
                            for name, verb in (
                                ("check", sink.check), ("write", lambda sink=sink: sink.write(records(1))),
                            ):  # fmt: skip
                                before, began = proxy.counts.bytes_down, time.monotonic()
                                await verb()
                                took, bytes_down = time.monotonic() - began, proxy.counts.bytes_down - before
                                print(f"{collections} collections: {name} {took * 1000:.1f} ms, {bytes_down} bytes")
                                times[name].append(took)
                                assert 0 < bytes_down < 64 << 10
                    assert max(map(min, times.values())) < PATIENCE, "the best of three"
            assert [document["v"] for document in client["many"]["c7"].find()] == ["1"], "inserted, then updated"
            if os.environ.get("TEST_MONGODB"):
                client.drop_database("many")

    async def test_s29_what_a_device_sends_is_compared_and_never_a_condition(self, target: Documents) -> None:
        keys = self.raw(target.port, mode="upsert", upsert_by=["device"],
                        fields={"device": "${payload.device}", "value": "${payload.v}"})  # fmt: skip
        target.collection.insert_one({"device": "victim", "value": 1})
        async with opened(BACKEND, keys) as sink:
            await sink.write(records(1, payload=b'{"device": {"$ne": 0}, "v": 666}'))
        assert target.collection.find_one({"device": "victim"})["value"] == 1


@pytest.mark.parametrize("keys", [
    {"fields": {"a.b": "x"}}, {"fields": {"$a": "x"}}, {"fields": {}}, {"collection": "$x"}, {"mode": "upsert"},
    {"upsert_by": ["clientid"]}, {"mode": "upsert", "upsert_by": ["nothing"]}, {"mode": "time_series", "dates": []},
    {"mode": "upsert", "upsert_by": ["clientid"]}, {"servers": ["192.0.2.1:27017"]}, {"fields": {"a": "${nothing}"}},
])  # fmt: skip
def test_a_configuration_that_cannot_work_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MongodbConfig.model_validate({"filters": ["#"], **keys})


class Member(FakeMongo):
    """A primary that keeps what it is told, and answers an insert as it is told to."""

    def __init__(self) -> None:
        super().__init__({})
        self.commands: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.collections: list[dict[str, Any]] = []

    async def __aenter__(self) -> Member:
        await super().__aenter__()
        self.primary, self.hosts = self.address, [self.address]
        return self

    def _answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        name = next(iter(command))
        if name in ("insert", "create", "listCollections", "update"):
            self.commands.append(dict(command))
        if name == "listCollections":
            batch = [c for c in self.collections if c["name"] == command["filter"]["name"]]
            return {"ok": 1.0, "cursor": {"id": 0, "ns": "mqtt.$cmd", "firstBatch": batch}}
        if name == "create":
            self.collections.append({"name": command["create"], "type": "timeseries"})
        if name == "insert":
            return self.answers.pop(0) if self.answers else {"ok": 1.0, "n": 1}
        return super()._answer(command)

    @property
    def raw(self) -> dict[str, Any]:
        return {"servers": [self.address], "replica_set": "rs0", "timeout": "2s"}


async def test_a_time_series_is_made_and_no_other_collection_is_taken_for_one() -> None:
    async with Member() as member:
        keys = {**member.raw, "mode": "time_series", "collection": "series", "expire": "30d"}
        async with opened(BACKEND, keys) as sink:
            await sink.check()
            assert [next(iter(c)) for c in member.commands] == ["listCollections"], "check makes nothing"
            await sink.write(records(1))
            await sink.write(records(2))
        made = [c for c in member.commands if "create" in c]
        assert len(made) == 1
        assert made[0]["timeseries"] == {"timeField": "time", "metaField": "clientid"}
        assert made[0]["expireAfterSeconds"] == 30 * 86_400
        member.collections = [{"name": "series", "type": "collection"}]
        async with opened(BACKEND, keys) as sink:
            for verb in (sink.check(), sink.write(records(3))):
                with pytest.raises(Fatal, match="no time series"):
                    await verb


async def test_s28_of_many_collections_a_time_series_asks_for_its_own() -> None:
    """S-28: by its name, so that a server tells of one; mongo-java-server tells of all whatever it is asked."""
    async with Member() as member:
        member.collections = [{"name": f"c{n}", "type": "timeseries"} for n in range(100_000)]
        keys = {**member.raw, "mode": "time_series", "collection": "c99999"}
        async with opened(BACKEND, keys) as sink:
            for verb in (sink.check, lambda: sink.write(records(1))):
                began = clock()
                await verb()
                assert clock() - began < PATIENCE
        assert [c.get("filter") for c in member.commands if "insert" not in c] == [{"name": "c99999"}] * 2


@pytest.mark.parametrize(("code", "outcome"), [
    (10107, NotConnected), (91, NotConnected), (112, NotConnected), (13, Fatal), (121, BatchFailed), (2, BatchFailed),
    (10334, BatchFailed),
])  # fmt: skip
async def test_what_follows_from_the_code_of_a_refused_document(code: int, outcome: type[Exception]) -> None:
    async with Member() as member, opened(BACKEND, member.raw) as sink:
        error = {"index": 1, "code": code, "errmsg": "because"}
        member.answers = [{"ok": 1.0, "n": 1, "writeErrors": [error]}]
        with pytest.raises(outcome, match="because"):
            await sink.write(records(1, 2))
        assert member.commands[0]["writeConcern"] == {"w": "majority"}


@pytest.mark.parametrize("code", [2, 22, 10334])
async def test_s07_a_command_refused_as_a_whole_is_taken_apart(code: int) -> None:
    """S-07: the server does not say which document it was; whoever writes finds out."""

    class Judge(Member):
        def _answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
            answer = super()._answer(command)
            if "insert" in command and any(document["clientid"] == "bad" for document in command["documents"]):
                return {"ok": 0.0, "code": code, "codeName": "Bad", "errmsg": "because"}
            return answer

    async with Judge() as member, opened(BACKEND, member.raw) as sink:
        gate = asyncio.Event()
        gate.set()
        batch = [*records(*range(1, 10)), *records(10, clientid="bad"), *records(*range(11, 20))]
        refused = await asyncio.wait_for(Writer(sink, gate=gate).write(batch), 30)
        assert list(refused) == [9]
        assert "because" in refused[9][0]


async def test_what_a_device_sends_cannot_leave_its_place_in_a_document_written_as_json() -> None:
    async with Member() as member:
        fields = {"_id": "${msgid}", "doc": '{"by": "${clientid}"}'}
        async with opened(BACKEND, {**member.raw, "fields": fields, "dates": [], "documents": ["doc"]}) as sink:
            await sink.write(records(1, clientid='a", "admin": "yes'))
        assert member.commands[0]["documents"][0]["doc"] == {"by": 'a", "admin": "yes'}


async def test_what_is_too_much_for_one_command_is_sent_in_several() -> None:
    """A server ends the connection at such a command: the next attempt is the driver's, which knows the limits."""

    class Small(Member):
        def _answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
            if "insert" in command and len(command["documents"]) > 2:
                raise ConnectionError
            answer = super()._answer(command)
            return {**answer, "maxWriteBatchSize": 2} if "setName" in answer else answer

    async with Small() as member, opened(BACKEND, member.raw) as sink:
        with pytest.raises(NotConnected):
            await sink.write(records(1, 2, 3))
        assert not member.commands
        await sink.write(records(1, 2, 3))
        await sink.write(records(4, 5))
        assert [len(command["documents"]) for command in member.commands] == [2, 1, 2]


async def test_what_no_majority_has_comes_again() -> None:
    async with Member() as member, opened(BACKEND, member.raw) as sink:
        member.answers = [{"ok": 1.0, "n": 1, "writeConcernError": {"code": 64, "errmsg": "waiting timed out"}}]
        with pytest.raises(NotConnected, match="waiting timed out"):
            await sink.write(records(1))
        await sink.write(records(1))


async def test_s21_a_refused_login_stops_the_sink_and_says_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    async with Member() as member:
        words = await SinkOfMember().refused(caplog, Fatal, {**member.raw, "username": "isthmus", "password": SECRET})
        assert "login is refused" in words
        assert member.logins


class SinkOfMember(TestDocuments):
    __test__ = False


async def test_a_primary_that_steps_down_is_waited_for() -> None:
    async with Member() as member, opened(BACKEND, member.raw) as sink:
        member.answers = [{"ok": 0.0, "code": 10107, "codeName": "NotWritablePrimary", "errmsg": "not primary"}]
        assert await deliver(sink, records(1)) <= 2
        assert len([c for c in member.commands if "insert" in c]) >= 2
