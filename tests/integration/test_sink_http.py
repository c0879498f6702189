"""The HTTP sink against a real HTTP server whose answers a test decides."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from email.utils import formatdate
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("aiohttp")

from aiohttp import web

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks.http import BACKEND, HttpConfig
from tests.clock import clock
from tests.integration.http_service import Service, service
from tests.integration.sink_suite import MOMENT, SECRET, SinkSuite, deliver, msgid, opened, records
from tests.ledger import stamp
from tests.servers import Certificates


class Webhook:
    """A service that stores what it is sent, in `format`; one that `remembers` stores a request's key once."""

    def __init__(self, form: str, remembers: bool) -> None:
        self.form = form
        self.remembers = remembers
        self.port = 0
        self.stored: list[bytes] = []
        self.keys: set[str] = set()
        self.ids: set[str] = set()
        self.statuses: list[int] = []
        self._stack = AsyncExitStack()
        self.http: Service

    async def start(self) -> None:
        self.http = await self._stack.enter_async_context(service(self.answer, port=self.port))
        self.port = self.http.port

    async def stop(self) -> None:
        await self._stack.aclose()

    async def payloads(self) -> list[bytes]:
        return self.stored

    def answer(self, request: web.Request, body: bytes) -> web.StreamResponse:
        if request.method == "HEAD":
            return web.Response(status=405)
        documents = [json.loads(body)] if self.form == "single" else (
            json.loads(body) if self.form == "array" else [json.loads(line) for line in body.splitlines()]
        )  # fmt: skip
        if any(document["payload"] == "poison" for document in documents):
            return web.json_response({"error": "no poison here"}, status=422)
        for document in documents:
            if not (self.remembers and document["msgid"] in self.ids):
                self.ids.add(document["msgid"])
                self.stored.append(document["payload"].encode())
        return web.Response(status=204)


class OfHttp(SinkSuite):
    backend = BACKEND
    keeps = True
    form = "single"

    @pytest.fixture
    async def target(self) -> AsyncIterator[Webhook]:
        webhook = Webhook(self.form, self.once)
        await webhook.start()
        yield webhook
        await webhook.stop()

    def raw(self, port: int, **more: Any) -> dict[str, Any]:
        return {"url": f"http://127.0.0.1:{port}/hook", "format": self.form, **more}

    async def plant(self, target: Webhook) -> dict[str, Any]:
        return {}

    def poison(self, number: int) -> Record:
        return records(number, payload=b"poison")[0]


class TestSingle(OfHttp):
    """A service that knows messages by their id."""


class TestForgetful(OfHttp):
    """A service that does not."""

    once = False


class TestArray(OfHttp):
    form = "array"


class TestLines(OfHttp):
    form = "lines"


Answers = list[tuple[int, dict[str, str], bytes]]


class Scripted:
    """Answers as a test says, then 200."""

    def __init__(self) -> None:
        self.answers: Answers = []
        self.at: list[float] = []
        """When the requests came."""

    def __call__(self, request: web.Request, body: bytes) -> web.StreamResponse:
        self.at.append(time.time())
        status, headers, text = self.answers.pop(0) if self.answers else (200, {}, b"")
        return web.Response(status=status, headers=headers, body=text)


@pytest.fixture
async def script() -> Scripted:
    return Scripted()


@pytest.fixture
async def http(script: Scripted) -> AsyncIterator[Service]:
    async with service(script) as made:
        yield made


def raw(http: Service, **more: Any) -> dict[str, Any]:
    return {"url": f"{http.url}/hook", **more}


async def test_a_request_says_who_published_what(http: Service) -> None:
    keys = raw(http, url=f"{http.url}/d/${{clientid}}/x?t=${{topic}}", headers={
        "Authorization": "Bearer 0815", "X-Trace": "${user_property.trace}", "X-Topic": "in ${topic}",
    })  # fmt: skip
    batch = records(1, clientid="a/b ü", user_properties=[("trace", "00-1")]) + records(2)
    async with opened(BACKEND, keys) as sink:
        await sink.write(batch)
    first, second = http.seen
    assert (first.method, first.path) == ("POST", "/d/a%2Fb%20%C3%BC/x?t=t%2Fdev")
    assert first.headers["Authorization"] == "Bearer 0815"
    assert first.headers["Idempotency-Key"] == msgid(1)
    assert first.headers["Content-Type"] == "application/json"
    assert (first.headers["X-Trace"], first.headers["X-Topic"]) == ("00-1", "in t/dev")
    assert "X-Trace" not in second.headers
    body = json.loads(first.body)
    assert (body["payload"], body["clientid"], body["ts"], body["qos"]) == ("dev|1|", "a/b ü", MOMENT + 1, 1)


async def test_bodies_are_what_the_templates_say(http: Service) -> None:
    async with opened(BACKEND, raw(http, body="${payload}", content_type="application/octet-stream")) as sink:
        await sink.write(records(1, payload=b"\xff\x00"))
    assert (http.seen[0].body, http.seen[0].headers["Content-Type"]) == (b"\xff\x00", "application/octet-stream")
    fields = {"device": "${clientid}", "value": "${payload.v}", "none": "${payload.x}"}
    async with opened(BACKEND, raw(http, body=fields, format="array", method="PUT")) as sink:
        await sink.write([*records(1, payload=b'{"v": 1.5}'), *records(2, payload=b'{"v": [1]}'),
                          *records(3, clientid=None, payload=b"\xff")])  # fmt: skip
    assert json.loads(http.seen[1].body) == [
        {"device": "dev", "value": 1.5, "none": None}, {"device": "dev", "value": [1], "none": None},
        {"device": None, "value": None, "none": None},
    ]  # fmt: skip
    async with opened(BACKEND, raw(http, body="${payload}", format="lines")) as sink:
        with pytest.raises(BatchFailed) as failed:
            await sink.write([*records(1, payload=b'{\n"v": 1}'), *records(2, payload=b"{"), *records(3, payload=b"3")])
        assert list(failed.value.failed) == [1]
    assert http.seen[2].body == b'{"v":1}\n3'
    assert http.seen[2].headers["Content-Type"] == "application/x-ndjson"


@pytest.mark.parametrize(("status", "outcome"), [
    (200, None), (201, None), (202, None), (204, None), (203, Fatal), (206, Fatal), (400, BatchFailed),
    (409, BatchFailed), (413, BatchFailed), (422, BatchFailed), (401, Fatal), (403, Fatal), (404, Fatal), (302, Fatal),
    (307, Fatal), (408, NotConnected), (429, NotConnected), (500, NotConnected), (503, NotConnected),
    (599, NotConnected),
])  # fmt: skip
async def test_s18_what_follows_from_a_status(
    http: Service, script: Scripted, status: int, outcome: type[Exception] | None
) -> None:
    script.answers = [(status, {"Location": f"{http.url}/elsewhere"}, b"because of that" if status != 204 else b"")]
    async with opened(BACKEND, raw(http)) as sink:
        if outcome is None:
            await sink.write(records(1))
        else:
            with pytest.raises(outcome, match=str(status)):
                await sink.write(records(1))
    assert [seen.path for seen in http.seen] == ["/hook"], "no redirect is followed, nothing is sent twice"


async def test_statuses_can_be_given_another_meaning(http: Service, script: Scripted) -> None:
    script.answers = [(409, {}, b""), (404, {}, b""), (418, {}, b"")]
    async with opened(BACKEND, raw(http, success=[200, 409], fatal=[418])) as sink:
        await sink.write(records(1))
        with pytest.raises(BatchFailed, match="404"):
            await sink.write(records(2))
        with pytest.raises(Fatal, match="418"):
            await sink.write(records(3))


async def test_one_missing_page_is_a_dead_letter_where_devices_name_it(http: Service, script: Scripted) -> None:
    script.answers = [(404, {}, b"")]
    async with opened(BACKEND, raw(http, url=f"{http.url}/${{clientid}}")) as sink:
        with pytest.raises(BatchFailed):
            await sink.write(records(1, 2))
    assert len(http.seen) == 2


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_s18_retry_after_is_obeyed(http: Service, script: Scripted, form: str) -> None:
    then = int(time.time()) + 4
    after = "3" if form == "seconds" else formatdate(then, usegmt=True)
    script.answers = [(200, {}, b""), (429, {"Retry-After": after}, b"")]
    async with opened(BACKEND, raw(http)) as sink:
        batch = records(1, 2, 3)
        with pytest.raises(NotConnected, match="429"):
            await sink.write(batch)
        with pytest.raises(NotConnected, match="asked us to wait"):
            await sink.write(batch)
        assert len(http.seen) == 2, "nothing is sent before its time"
        await deliver(sink, batch)
        assert script.at[2] > (script.at[1] + 3 if form == "seconds" else then) - 0.2
    sent = [json.loads(seen.body)["payload"] for seen in http.seen]
    assert sent == ["dev|1|", "dev|2|", "dev|2|", "dev|3|"], "what is stored is not sent again with the rest"


async def test_a_wait_without_end_is_cut(http: Service, script: Scripted) -> None:
    script.answers = [(503, {"Retry-After": "999999999999"}, b"")]
    async with opened(BACKEND, raw(http, longest_wait="200ms")) as sink:
        with pytest.raises(NotConnected):
            await sink.write(records(1))
        await deliver(sink, records(1), 5)


async def test_a_batch_has_the_same_key_when_it_comes_again(http: Service, script: Scripted) -> None:
    script.answers = [(500, {}, b"")]
    async with opened(BACKEND, raw(http, format="array")) as sink:
        await deliver(sink, records(1, 2, 3))
        await sink.write(records(4, 5))
    keys = [seen.headers["Idempotency-Key"] for seen in http.seen]
    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == 32


@pytest.mark.parametrize(("clientid", "headers"), [
    ("a\r\nX-Admin: 1", {"X-Client": "${clientid}"}), ("a\0", {"X-Client": "${clientid}"}),
    ("x" * 5_000, {"X-Client": "${clientid}"}), (None, {"X-Client": "is ${clientid}"}),
])  # fmt: skip
async def test_s20_what_cannot_stand_in_a_header_is_not_sent(
    http: Service, clientid: str | None, headers: dict[str, str]
) -> None:
    async with opened(BACKEND, raw(http, headers=headers)) as sink:
        with pytest.raises(BatchFailed) as failed:
            await sink.write([*records(1, clientid=clientid), *records(2)])
    assert list(failed.value.failed) == [0]
    assert len(http.seen) == 1


@pytest.mark.parametrize("clientid", ["..", ".", "a\0b", None])
async def test_s29_what_cannot_stand_in_an_address_is_not_sent(http: Service, clientid: str | None) -> None:
    async with opened(BACKEND, raw(http, url=f"{http.url}/devices/${{clientid}}/data")) as sink:
        with pytest.raises(BatchFailed):
            await sink.write(records(1, clientid=clientid))
        await sink.write(records(2, clientid="../../admin?x=1#y"))
    assert [seen.path for seen in http.seen] == ["/devices/..%2F..%2Fadmin%3Fx%3D1%23y/data"]


@pytest.mark.parametrize("form", ["single", "array", "lines"])
async def test_s29_what_a_device_sends_cannot_leave_its_place_in_a_body(http: Service, form: str) -> None:
    """S-29: one record in, one record out, whatever is written around it."""
    nasty = '","admin":true},\n{"device":"'
    body = '{"device": "${clientid}", "text": "${payload.text}", "value": ${payload.value}}'
    payload = json.dumps({"text": nasty, "value": {"a": nasty}}).encode()
    async with opened(BACKEND, raw(http, body=body, format=form)) as sink:
        with pytest.raises(BatchFailed) as failed:
            await sink.write([*records(1, 2, clientid=nasty, payload=payload), *records(3, payload=b"{}")])
    assert failed.value.failed == {2: "cannot be rendered for HTTP: ${payload.text} has no value"}
    if form == "array":
        found = [one for seen in http.seen for one in json.loads(seen.body)]
    else:
        found = [json.loads(line) for seen in http.seen for line in seen.body.splitlines()]
    assert found == [{"device": nasty, "text": nasty, "value": {"a": nasty}}] * 2


async def test_text_that_is_no_json_is_sent_as_it_is_written(http: Service) -> None:
    async with opened(BACKEND, raw(http, body="${clientid}: ${payload}", content_type="text/plain")) as sink:
        await sink.write(records(1, payload=b'say "hi"'))
    assert http.seen[0].body == b'dev: say "hi"'


async def test_s18_an_answer_without_end_is_not_read_to_its_end(http: Service, script: Scripted) -> None:
    sent = 0

    async def endless(request: web.Request, body: bytes) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(65_536))
                sent += 65_536
        except ConnectionError:
            return response

    async with service(endless) as endless_http, opened(BACKEND, raw(endless_http, timeout=5)) as sink:
        began = clock()
        await sink.write(records(1))
        assert clock() - began < 3
        assert len(endless_http.seen) == 1
        before = sent
        await asyncio.sleep(0.1)
        assert sent == before < 16 << 20, "what the kernel holds, and nothing more"
    script.answers = [(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b" + bytes(1000))]
    async with opened(BACKEND, raw(http)) as sink:
        await sink.write(records(1))


async def test_s21_no_secret_is_shown(http: Service, script: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    """Not even when the service sends it back, and not the address, which may be one."""
    headers = {"Authorization": f"Bearer {SECRET}"}
    script.answers = [(401, {}, f"the token {SECRET} is wrong".encode()), (401, {}, SECRET.encode())]
    words = await TestSingle().refused(caplog, Fatal, raw(http, headers=headers))
    assert "the token *** is wrong" in words
    script.answers = [(422, {}, f"the token {SECRET}".encode())]
    async with opened(BACKEND, raw(http, url=f"{http.url}/{SECRET}", headers=headers)) as sink:
        with pytest.raises(BatchFailed) as failed:
            await sink.write(records(1))
        script.answers = [(500, {}, b"")]
        with pytest.raises(NotConnected) as later:
            await sink.write(records(1))
    assert SECRET not in str(failed.value.failed) + str(later.value) + caplog.text


async def test_certificates_are_checked(certs: Certificates) -> None:
    async with service(lambda request, body: web.Response(), certs) as http:
        async with opened(BACKEND, raw(http)) as sink:
            with pytest.raises(NotConnected, match="not trusted"):
                await sink.write(records(1))
        async with opened(BACKEND, raw(http, ca=str(certs.ca))) as sink:
            await sink.write(records(1))
        assert len(http.seen) == 1


async def test_check_sends_no_message(http: Service, script: Scripted) -> None:
    script.answers = [(status, {}, b"") for status in (405, 200, 404, 401, 302, 503)]
    async with opened(BACKEND, raw(http, headers={"Authorization": "x"})) as sink:
        for _ in range(3):
            await sink.check()
        for kind in (Fatal, Fatal, NotConnected):
            with pytest.raises(kind):
                await sink.check()
    assert {(seen.method, seen.body, seen.headers["Authorization"]) for seen in http.seen} == {("HEAD", b"", "x")}


@pytest.mark.parametrize("keys", [
    {"url": "http://192.0.2.1/x"}, {"url": "ftp://127.0.0.1/"}, {"url": "http://${clientid}/x"},
    {"url": "http://user:pw@127.0.0.1/"}, {"url": "http://127.0.0.1/${clientid}", "format": "array"},
    {"headers": {"Host": "x"}}, {"headers": {"X": "${clientid}"}, "format": "lines"}, {"headers": {"a b": "x"}},
    {"success": [200, 429]}, {"body": "${nothing}"}, {"url": "http://127.0.0.1/${nothing}"}, {"fatal": [200]},
    {"headers": {"X": "${nothing}"}},
])  # fmt: skip
def test_a_configuration_that_cannot_work_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HttpConfig.model_validate({"filters": ["#"], "url": "http://127.0.0.1:1/", **keys})


async def test_an_empty_and_a_large_batch(http: Service) -> None:
    async with opened(BACKEND, raw(http, format="lines")) as sink:
        await asyncio.gather(sink.write([]), sink.write(records(*range(1, 5_001))))
    [seen] = http.seen
    assert [json.loads(line)["payload"].encode() for line in seen.body.splitlines()] == [
        stamp("dev", n) for n in range(1, 5_001)
    ]


@pytest.mark.parametrize(
    ("url", "networks"),
    [
        ("http://169.254.169.254/latest", []), ("https://[fd00:ec2::254]/", []), ("https://[::ffff:169.254.1.1]/", []),
        ("https://10.1.2.3/", ["10.2.0.0/16"]), ("http://127.0.0.1/", ["10.2.0.0/16"]),
    ],
)  # fmt: skip
def test_s19_an_address_that_is_not_allowed_is_refused_with_the_configuration(url: str, networks: list[str]) -> None:
    """S-19."""
    with pytest.raises(ValidationError, match="no connection may go to"):
        HttpConfig.model_validate({"filters": ["#"], "url": url, "networks": networks, "allow_cleartext": True})


async def test_s19_a_name_that_means_a_forbidden_address_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """S-19: it meant another one when the configuration was read; nobody asks twice between judging and connecting."""
    asked: list[str] = []
    meaning = "169.254.169.254"

    def getaddrinfo(host: str, port: int, *more: Any, **keys: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (meaning, port))]

    async with service(lambda request, body: web.Response(status=204)) as http:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        raw = {"url": f"http://hooks.example.com:{http.port}/", "allow_cleartext": True}
        async with opened(BACKEND, raw) as sink:
            with pytest.raises(NotConnected, match="where no connection may go"):
                await sink.write(records(1))
            meaning = "127.0.0.1"
            await sink.write(records(1))
        async with opened(BACKEND, {**raw, "networks": ["10.0.0.0/8"]}) as sink:
            with pytest.raises(NotConnected, match="where no connection may go"):
                await sink.write(records(2))
        assert len(http.seen) == 1
        assert asked == ["hooks.example.com"] * 3
