"""OAUTHBEARER against real Kafka, with each source of tokens. Kafka's own validator of unsigned tokens judges them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from broker.extend.sink import Fatal, NotConnected, Record
from sinks.kafka import KafkaConfig, open_kafka
from tests import servers
from tests.integration.http_service import Service, service

TOPIC = "granted"


@pytest.fixture(scope="module")
def bearer() -> Iterator[servers.Kafka]:
    """A Kafka whose SASL listener takes OAUTHBEARER, and lets no connection live longer than its token."""
    try:
        with servers.kafka(listeners=["SASL"]) as server:
            server.stop()
            properties = Path(server._command[-1])
            module = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required"
            properties.write_text(
                properties.read_text() + "sasl.enabled.mechanisms=OAUTHBEARER\n"
                f'listener.name.sasl.oauthbearer.sasl.jaas.config={module} unsecuredLoginStringClaim_sub="kafka";\n'
                "listener.name.sasl.oauthbearer.connections.max.reauth.ms=3600000\n"
            )
            server.start()
            asyncio.run(server.create_topic(TOPIC, 1))
            yield server
    except servers.Absent as error:
        if "kafka" in servers.required():
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


def token(life: float = 600, **claims: Any) -> str:
    """An unsigned JSON Web Token as Kafka's validator for tests wants it."""
    now = time.time()
    parts = ({"alg": "none"}, {"sub": "isthmus", "iat": now - 1, "exp": now + life, **claims})
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + "."


@contextlib.asynccontextmanager
async def opened(server: servers.Kafka, **sasl: Any) -> AsyncIterator[Any]:
    config = KafkaConfig.model_validate({
        "servers": [server.listeners["SASL"]], "filters": ["#"], "topic": TOPIC, "request_timeout": "15s",
        "sasl": {"mechanism": "oauthbearer", **sasl},
    })  # fmt: skip
    sink = await open_kafka(config.named("kafka"))  # type: ignore[arg-type]
    try:
        yield sink
    finally:
        await sink.close()


def record(number: int) -> Record:
    return Record("t", b"%d" % number, clientid="dev", msgid=f"{number:032x}")


def source(http: Service, **more: Any) -> dict[str, Any]:
    return {"url": f"{http.url}/token", "client_id": "isthmus", "client_secret": "s3cret&more", "scope": "a b", **more}


async def test_a_token_of_the_configuration_or_of_a_file(bearer: servers.Kafka, tmp_path: Path):
    file = tmp_path / "token"
    file.write_text(token() + "\n")
    for sasl in ({"token": token()}, {"token_file": str(file)}):
        async with opened(bearer, **sasl) as sink:
            await sink.check()
            await sink.write([record(1)])
    file.unlink()
    async with opened(bearer, token_file=str(file)) as sink:
        with pytest.raises(NotConnected, match="token_file"):
            await sink.write([record(1)])
        file.write_text(token())
        await sink.write([record(1)])


async def test_a_server_grants_one_token_for_all_connections(bearer: servers.Kafka):
    def answer(request: web.Request, body: bytes) -> web.Response:
        return web.json_response({"access_token": token(), "expires_in": 600, "token_type": "bearer"})

    async with service(answer) as http, opened(bearer, token_from=source(http)) as sink:
        await sink.check()
        for number in range(3):
            await sink.write([record(number)])
            sink._cluster.discard(await sink._cluster.producer())
        [seen] = http.seen
        assert seen.method == "POST"
        assert seen.body == b"grant_type=client_credentials&scope=a+b"
        assert base64.b64decode(seen.headers["Authorization"].removeprefix("Basic ")) == b"isthmus:s3cret%26more"


async def test_a_token_is_asked_for_again_before_it_ends_and_no_record_is_lost(bearer: servers.Kafka):
    """Kafka ends a connection with its token; the driver connects anew and gets a newer one."""

    def answer(request: web.Request, body: bytes) -> web.Response:
        return web.json_response({"access_token": token(2), "expires_in": 2})

    before = len(await bearer.everything(TOPIC))
    async with service(answer) as http, opened(bearer, token_from=source(http)) as sink:
        began = time.monotonic()
        number = 1000
        while len(http.seen) < 4 or number <= 1030:
            assert time.monotonic() < began + 30 * servers.PATIENCE
            with contextlib.suppress(NotConnected):
                await sink.write([record(number)])
                number += 1
            await asyncio.sleep(0.05)
        assert len(http.seen) <= 2 + 2 * (time.monotonic() - began), "one for each time that it is needed"
    values = [int(r.value) for r in (await bearer.everything(TOPIC))[before:]]
    assert values == list(range(1000, number))


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (401, '{"error": "invalid_client", "error_description": "s3cret&more"}', Fatal, "401 invalid_client"),
        (400, "s3cret&more", Fatal, "400"),
        (503, "later", NotConnected, "503 and no token"),
        (200, "{}", NotConnected, "no token"),
        (200, "[]", NotConnected, "no token"),
        (302, "", NotConnected, "302"),
    ],
)
async def test_a_server_that_grants_nothing(
    bearer: servers.Kafka, status: int, body: str, error: type[Exception], says: str
):
    def answer(request: web.Request, sent: bytes) -> web.Response:
        return web.Response(status=status, text=body)

    async with service(answer) as http, opened(bearer, token_from=source(http)) as sink:
        with pytest.raises(error, match=says) as told:
            await sink.write([record(1)])
        assert "s3cret" not in str(told.value)


async def test_a_server_that_is_not_there(bearer: servers.Kafka, free_port: Any):
    gone = {"url": f"http://127.0.0.1:{free_port()}/t", "client_id": "a", "client_secret": "s3cret"}
    async with opened(bearer, token_from=gone) as sink:
        with pytest.raises(NotConnected, match="token_from"):
            await sink.check()


async def test_a_token_that_kafka_refuses_is_an_alarm(bearer: servers.Kafka):
    async with opened(bearer, token=token(-60)) as sink:
        began = time.monotonic()
        with pytest.raises(Fatal, match="refuses our credentials"):
            await sink.check()
        with pytest.raises(Fatal, match="refuses our credentials"):
            await sink.write([record(1)])
        assert time.monotonic() - began < 10


def test_sources_of_tokens_are_told_apart():
    base = {"servers": ["a:1"], "filters": ["#"], "topic": "t"}
    server = {"url": "https://id.example.com/token", "client_id": "a", "client_secret": "b"}
    KafkaConfig.model_validate({**base, "sasl": {"mechanism": "oauthbearer", "token_from": server}})
    for sasl, says in [
        ({"token": "x", "token_from": server}, "either"),
        ({}, "either"),
        ({"token_from": {**server, "url": "http://id.example.com/token"}}, "allow_cleartext"),
        ({"token_from": {**server, "url": "https://u:p@id.example.com/"}}, "neither user"),
        ({"token_from": {**server, "client_id": ""}}, "empty"),
    ]:
        with pytest.raises(ValidationError, match=says):
            KafkaConfig.model_validate({**base, "sasl": {"mechanism": "oauthbearer", **sasl}})
