"""Logins judged by an HTTP service."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl

import pytest
from pydantic import ValidationError

pytest.importorskip("aiohttp")

from aiohttp import web

from auth.http import BACKEND, HttpConfig
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from tests.integration.auth_harness import (
    PEOPLE,
    NetworkSuite,
    allowed,
    instance,
    logins,
    opened,
    unavailable,
)
from tests.integration.http_service import Seen, Service, service
from tests.servers import PATIENCE, Certificates

DENY, IGNORE = Verdict.DENY, Verdict.IGNORE


def judge(request: web.Request, body: bytes) -> web.StreamResponse:
    """EMQX 5's answers about PEOPLE and root."""
    asked = json.loads(body)
    name, password = asked["username"], asked.get("password", "").encode()
    if name == "root":
        return web.json_response({"result": "allow", "is_superuser": True})
    if name not in PEOPLE:
        return web.json_response({"result": "ignore"})
    if PEOPLE[name] != password:
        return web.json_response({"result": "deny"})
    acl = [
        {"permission": "deny", "action": "publish", "topic": f"own/{name}/secret"},
        {"permission": "allow", "action": "publish", "topic": f"own/{name}/#"},
        {"permission": "allow", "action": "subscribe", "topic": "in/${clientid}"},
    ]
    return web.json_response({"result": "allow", "acl": acl, "client_attrs": {"line": "4"}})


@pytest.fixture
async def http() -> AsyncIterator[Service]:
    async with service(judge) as made:
        yield made


@pytest.fixture
def server(http: Service) -> Service:
    """As the suite calls it."""
    return http


def table(server: Any, **more: Any) -> dict[str, Any]:
    return {"url": f"http://127.0.0.1:{server.port}/mqtt", "timeout": 5, **more}


async def ask(server: Any, username: str = "dev1", password: bytes = b"pw-1", clientid: str = "c", **more: Any) -> Any:
    async with opened(BACKEND, table(server, **more)) as backend:
        return await backend.authenticate(Client(clientid, username, "10.1.2.3"), password)


async def test_emqxs_answers(http: Service) -> None:
    async with logins(instance(BACKEND, table(http))) as log:
        dev1 = (await log("dev1", b"pw-1", "c1")).principal
        assert log.gate.may_publish(dev1, "own/dev1/x") == 1
        assert log.gate.may_publish(dev1, "own/dev1/secret") == 0
        assert log.gate.may_subscribe(dev1, "in/c1") == 1
        assert log.gate.may_subscribe(dev1, "in/+") == 0
        assert dev1.attributes == {"line": "4"}
        assert (await log("root", b"x", "c2")).principal.superuser
        for name, password in (("dev1", b"no"), ("nobody", b"pw-1")):
            assert (await log(name, password, "c3")).code == 0x86


async def test_what_is_sent(http: Service) -> None:
    body = {"u": "${username}", "p": "${password}", "a": "${peerhost}", "fixed": "x", "cn": "${cert_common_name}"}
    headers = {"Authorization": "Bearer s3cret", "X-Client": "c/${clientid}"}
    http.answer = lambda request, body: web.Response(status=204)
    assert allowed(await ask(http, body=body, headers=headers))
    (seen,) = http.seen
    assert seen.method == "POST"
    assert json.loads(seen.body) == {"u": "dev1", "p": "pw-1", "a": "10.1.2.3", "fixed": "x"}
    assert seen.headers["Authorization"] == "Bearer s3cret"
    assert seen.headers["X-Client"] == "c/c"
    assert seen.headers["Content-Type"] == "application/json"
    http.seen.clear()
    assert allowed(await ask(http, password=b"\xff&=", body=body, format="form"))
    sent = http.seen[0].body.decode()
    assert sent == "u=dev1&p=%FF%26%3D&a=10.1.2.3&fixed=x"
    http.seen.clear()
    body = {"username": "${username}", "clientid": "${clientid}"}
    assert allowed(await ask(http, clientid="x y", method="GET", body=body, url=f"{http.url}/a?b=c"))
    assert http.seen[0].path == "/a?b=c&username=dev1&clientid=x+y"
    assert http.seen[0].body == b""


async def test_emq_2s_answers(http: Service) -> None:
    """Status codes; parameters as a form; superusers asked about apart."""

    def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        asked = {k: v[0] for k, v in parse_qs(body.decode()).items()}
        if request.path == "/super":
            return web.Response(status=200 if asked["username"] == "root" else 401)
        if asked["username"] == "unknown":
            return web.Response(text="ignore")
        return web.Response(status=200 if asked["password"] == "right" else 401)

    http.answer = answer
    more = {"answers": "status", "format": "form", "super_url": f"{http.url}/super"}
    granted = await ask(http, "dev1", b"right", **more)
    assert isinstance(granted, Grant)
    assert not granted.superuser
    assert (await ask(http, "root", b"right", **more)).superuser
    assert await ask(http, "root", b"wrong", **more) is DENY
    assert await ask(http, "unknown", b"right", **more) is IGNORE


JSON = "application/json"
ODD = [
    ("status", 200, "", None, "allow"),
    ("status", 200, "anything", None, "allow"),
    ("status", 200, "Ignore ", None, "ignore"),
    ("status", 401, "", None, "deny"),
    ("status", 404, "", None, "deny"),
    ("status", 204, "", None, "error"),
    ("status", 302, "", None, "error"),
    ("status", 500, "", None, "error"),
    ("status", 503, "ignore", None, "error"),
    ("json", 200, '{"result": "allow"}', JSON, "allow"),
    ("json", 200, '{"result": "allow"}', f"{JSON}; charset=utf-8", "allow"),
    ("json", 200, '{"result": "allow"}', "application/problem+json", "allow"),
    ("json", 200, '{"result": "deny"}', JSON, "deny"),
    ("json", 200, '{"result": "ignore"}', JSON, "ignore"),
    ("json", 204, "", None, "allow"),
    ("json", 401, "", None, "deny"),
    ("json", 403, "{}", JSON, "deny"),
    ("json", 404, "", None, "error"),
    ("json", 500, '{"result": "allow"}', JSON, "error"),
    ("json", 302, '{"result": "allow"}', JSON, "error"),
    ("json", 201, '{"result": "allow"}', JSON, "error"),
    ("json", 200, '{"result": "allow"}', "text/html", "error"),
    ("json", 200, "<html>allow</html>", "text/html", "error"),
    ("json", 200, '{"result": "allow"}', None, "error"),
    ("json", 200, "", JSON, "error"),
    ("json", 200, '{"result": "Allow"}', JSON, "error"),
    ("json", 200, "{}", JSON, "error"),
    ("json", 200, '{"result": true}', JSON, "error"),
    ("json", 200, '"allow"', JSON, "error"),
    ("json", 200, '["allow"]', JSON, "error"),
    ("json", 200, '{"result": "allow"', JSON, "error"),
    ("json", 200, "[" * 50_000, JSON, "error"),
    ("json", 200, "\ufeff{}", JSON, "error"),
    ("json", 200, '{"result": "allow", "expire_at": "soon"}', JSON, "error"),
    ("json", 200, '{"result": "allow", "expire_at": 1e400}', JSON, "error"),
    ("json", 200, '{"result": "allow", "expire_at": 1}', JSON, "deny"),
]


@pytest.mark.parametrize(("answers", "status", "text", "kind", "verdict"), ODD)
async def test_a24_only_the_documented_form_allows(
    http: Service, answers: str, status: int, text: str, kind: str | None, verdict: str
) -> None:
    """A-24: everything else is a no or an error."""
    headers = {"Location": f"{http.url}/elsewhere"} | ({"Content-Type": kind} if kind else {})

    def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        if request.path == "/elsewhere":
            return web.json_response({"result": "allow"})
        response = web.Response(status=status, body=text.encode(), headers=headers)
        if kind is None:
            response.headers["Content-Type"] = ""
        return response

    http.answer = answer
    try:
        found = await ask(http, answers=answers)
    except BackendUnavailable:
        found = "error"
    shown = "allow" if allowed(found) else "ignore" if found is IGNORE else found if found == "error" else "deny"
    assert shown == verdict
    assert [seen.path for seen in http.seen] == ["/mqtt"], "a redirect is not followed"


async def test_a24_answers_of_any_size_and_speed_are_cut_off(http: Service) -> None:
    """A-24: everything else is a no or an error."""
    sent = 0

    async def big(request: web.Request, body: bytes) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        try:
            for _ in range(1_600):
                await response.write(b'{"result": "allow", "x": "' + b"x" * 65_536)
                sent += 65_536
        except ConnectionError:
            pass
        return response

    async def drip(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for byte in b'{"result": "allow"}' + b" " * 100:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.2)
        return response

    def bomb(request: web.Request, body: bytes) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return web.Response(body=gzip.compress(b'{"result": "allow"}' + b" " * (20 << 20)), headers=headers)

    def told(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(body=b'{"result": "allow"}' + b" " * (10 << 20), content_type="application/json")

    for answer in (big, drip, bomb, told):
        http.answer = answer
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await ask(http, timeout=1)
        assert time.monotonic() - began < 1 + 4 * PATIENCE
    assert sent < 64 << 20, "what is not read fills the kernel's buffers only"


NAMES = [
    "a\r\nX-Evil: 1", "a\nb", "a\0b", "%2e%2e", "../../admin", "..", ".", "a?admin=1", "a#x", 'a"b', "a'b", "a&b=c",
    "a\\b", "a/b", "//evil.example/x", "@evil.example", "ü", "a b", "{}", '","result":"allow', "x" * 65_536,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
async def test_a23_what_a_client_calls_itself_is_one_value(http: Service, name: str) -> None:
    """A-23: in the body, the path, the query and a header; or nothing is sent."""
    http.answer = lambda request, body: web.Response(status=204)
    await ask(http, "dev1", clientid=name, body={"c": "${clientid}"})
    assert json.loads(http.seen[0].body) == {"c": name}
    http.seen.clear()
    await ask(http, "dev1", clientid=name, body={"c": "${clientid}", "z": "1"}, format="form")
    form = parse_qsl(http.seen[0].body.decode(), strict_parsing=True)
    assert form == [("c", name), ("z", "1")]
    http.seen.clear()
    url = f"{http.url}/users/${{clientid}}/login?c=${{clientid}}&z=1"
    answer = await ask(http, "dev1", clientid=name, url=url)
    if isinstance(answer, Refusal):
        assert http.seen == []
        assert "\0" in name or name in (".", "..") or len(name) > 8_000
    else:
        path, _, query = http.seen[0].path.partition("?")
        assert path.count("/") == 3
        assert path.startswith("/users/")
        assert path.endswith("/login")
        assert dict(parse_qsl(query)) == {"c": name, "z": "1"}
    http.seen.clear()
    answer = await ask(http, "dev1", clientid=name, headers={"X-Id": "${clientid}", "X-Last": "yes"})
    if isinstance(answer, Refusal):
        assert http.seen == []
        return
    _only_ours(http.seen[0], name)


def _only_ours(seen: Seen, name: str) -> None:
    assert "X-Evil" not in seen.headers
    assert seen.headers["X-Last"] == "yes"
    assert seen.headers["X-Id"] == name.strip()


@pytest.mark.parametrize(
    ("more", "say"),
    [
        ({"url": "https://${clientid}.example.com/x"}, "path and the query"),
        ({"url": "https://${username}/x"}, "path and the query"),
        ({"url": "https://auth.example.com:${clientid}/x"}, "path and the query"),
        ({"url": "https://auth.example.com${clientid}"}, "path and the query"),
        ({"url": "${clientid}"}, "path and the query"),
        ({"url": "https://auth.example.com/${password}"}, "password"),
        ({"url": "https://auth.example.com/${nope}"}, "nope"),
        ({"url": "http://auth.example.com/"}, "allow_cleartext"),
        ({"url": "https://u:hush@auth.example.com/"}, "neither user nor fragment"),
        ({"url": "ftp://auth.example.com/"}, "not a URL"),
        ({"url": "https://auth.example.com/a b"}, "blank"),
        ({"method": "GET"}, "password_in_url"),
        ({"headers": {"Host": "x"}}, "Host"),
        ({"headers": {"Content-Length": "1"}}, "Content-Length"),
        ({"headers": {"X Y": "1"}}, "name of a header"),
        ({"headers": {"X": "${password}"}}, "password"),
        ({"headers": {"X": "${nope}hush"}}, "not known"),
        ({"super_url": "https://x/"}, "status"),
        ({"body": {"x": "${nope}"}}, "nope"),
        ({"urll": "x"}, "urll"),
    ],
)  # fmt: skip
def test_tables_that_cannot_work_are_refused(more: dict[str, Any], say: str) -> None:
    """A-25: no client chooses whom its password is sent to."""
    with pytest.raises(ValidationError) as caught:
        HttpConfig.model_validate({"url": "https://auth.example.com/", "headers": {"X": "hush"}, **more})
    assert say in str(caught.value)


def test_headers_are_secret() -> None:
    config = HttpConfig.model_validate({"url": "https://x/", "headers": {"Authorization": "Bearer hush"}})
    assert "hush" not in repr(config)
    assert "hush" not in config.model_dump_json()


async def test_rights_of_a_service_that_tells_them_apart(http: Service) -> None:
    """Asked after the login, again after `refresh`, and for clients with a certificate."""
    rights = {"acl": [{"permission": "allow", "action": "publish", "topic": "a"}]}

    def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        if request.path.startswith("/rules/"):
            assert b"pw-1" not in body
            return web.json_response(rights) if request.path == "/rules/dev1" else web.Response(status=404)
        return web.Response(status=204)

    http.answer = answer
    raw = table(http, rules_url=f"{http.url}/rules/${{username}}", refresh=0.001)
    async with logins(instance(BACKEND, raw)) as log:
        dev1 = (await log("dev1", b"pw-1", "c")).principal
        assert log.gate.may_publish(dev1, "a") == 1
        rights["acl"][0]["topic"] = "b"
        await asyncio.sleep(0.002)
        await log.gate._refresher.run_due()
        assert (log.gate.may_publish(dev1, "a"), log.gate.may_publish(dev1, "b")) == (0, 1)
        proved = await log(None, None, "c2", username="dev1")
        assert proved.code == 0
        assert log.gate.may_publish(proved.principal, "b") == 1
        assert (await log(None, None, "c3", username="other")).code == 0x87


async def test_tls_is_verified(certs: Certificates) -> None:
    async with service(judge, certs) as https:
        raw = {"url": f"{https.url}/mqtt", "timeout": 2}
        async with opened(BACKEND, {**raw, "ca": str(certs.ca)}) as backend:
            assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
        for wrong in ({}, {"ca": str(certs.stranger_ca)}):
            async with opened(BACKEND, {**raw, **wrong}) as backend:
                with pytest.raises(BackendUnavailable, match="not trusted"):
                    await backend.authenticate(Client("c", "dev1"), b"pw-1")
        assert len(https.seen) == 1, "nothing was sent to a service nobody vouches for"


class TestNetwork(NetworkSuite):
    backend = BACKEND
    table = staticmethod(table)

    async def test_the_example_on_the_command_line(self, server: Service, tmp_path: Path, free_port: Any) -> None:
        old, dead = "https://127.0.0.1:8443/mqtt/auth", f"http://127.0.0.1:{free_port()}/"
        says = f"POST 127.0.0.1:{server.port}: status 200"
        await asyncio.to_thread(
            self.on_the_command_line, tmp_path, "26-auth-http", old, f"{server.url}/mqtt/auth", dead, says
        )


async def test_a_connection_the_service_closed_is_replaced_without_an_error(http: Service, start_proxy: Any) -> None:
    proxy = await start_proxy(http.port)
    async with opened(BACKEND, table(proxy)) as backend:
        for cut in (proxy.cut, proxy.reset, proxy.cut):
            answers = await asyncio.gather(*(backend.authenticate(Client("c", n), pw) for n, pw in PEOPLE.items()))
            assert all(map(allowed, answers))
            assert await cut() > 0


async def test_an_answer_that_breaks_off(http: Service, start_proxy: Any) -> None:
    """An error or the right verdict, never another."""
    proxy = await start_proxy(http.port)
    async with opened(BACKEND, table(proxy)) as backend:
        for count in range(20, 500, 40):
            assert allowed(await backend.authenticate(Client("c", "dev1"), b"pw-1"))
            proxy.cut_after(count, "down")
            with contextlib.suppress(BackendUnavailable):
                assert await backend.authenticate(Client("c", "dev2"), b"no") is DENY
            proxy._limits.clear()
    assert proxy.counts.cut >= 3


async def test_a40_slow_answers_and_many_clients(http: Service) -> None:
    """Never more at once than allowed; those that cannot wait are told so, the others are served."""

    async def slow(request: web.Request, body: bytes) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        return judge(request, body)

    http.answer = slow
    raw = table(http, pool=16, max_concurrent=16, timeout=8)
    async with logins(instance(BACKEND, raw)) as log:
        channels = await asyncio.gather(*(log("dev1", b"pw-1", f"c{number}") for number in range(200)))
        codes = [channel.code for channel in channels]
        assert http.most <= 16
        assert set(codes) == {0, 0x89}
        assert codes.count(0) == 80, "those that ran and those that waited"
        assert log.gate.status()["http"]["running"] == 0


async def test_a_hanging_service_is_left_in_time(http: Service) -> None:
    async def never(request: web.Request, body: bytes) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    http.answer = never
    async with opened(BACKEND, table(http, timeout=0.5)) as backend:
        await unavailable(backend, "dev1", b"pw-1", 0.5 + 4 * PATIENCE)
