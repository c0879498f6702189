"""Messages become requests to an HTTP service, one for each or many in one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from broker.config.template import Template
from broker.config.types import MASK, Duration, Secret
from broker.connectors.http import Answer, HttpPool, check_header
from broker.connectors.outbound import WebService
from broker.extend.auth import BackendUnavailable
from broker.extend.record import RecordTemplate, compile_template
from broker.extend.registry import Backend
from broker.extend.sink import Batch, Fatal, NotConnected, Record, SinkConfig, shows_msgid
from sinks._http_requests import Request, Requests, check_target, origin, retry_after
from sinks._progress import Progress

_ANSWER = 2_000
"""Bytes of an answer that are read: only the status counts."""
_SHOWN, _LONG = 300, 6  # characters: of an answer that are shown, of a word that may be a secret
_CREDENTIALS = frozenset({401, 403, 407})


class HttpConfig(WebService, SinkConfig):
    """`[sinks.http]`"""

    url: str
    """Where to, e.g. ``https://hooks.example.com/mqtt``; with format = "single", path and query may hold placeholders,
    which are percent-encoded: ``…/devices/${clientid}``."""
    method: Literal["POST", "PUT", "PATCH"] = "POST"
    """How it is sent: POST | PUT | PATCH."""
    format: Literal["single", "array", "lines"] = "single"
    """single: a request for each message | array: many in one request, as a JSON array | lines: the same as lines of
    JSON. Of many that are refused, the one to blame is found by taking them apart."""
    body: RecordTemplate | dict[str, RecordTemplate] = Template("${.}")
    """What is sent of each message: ``${.}`` is a JSON envelope, ``${payload}`` the bytes as they came (JSON where many
    go in one request), a table of templates a JSON object, in which a missing value is null."""
    content_type: str = ""
    """Media type of the body; default: application/json, with lines application/x-ndjson."""
    headers: dict[str, Secret] = {}  # noqa: RUF012 (a field, not shared)
    """Headers of each request, e.g. ``Authorization``; with format = "single" they may hold placeholders. A header that
    is nothing but a placeholder without a value is left out."""
    idempotency_header: str = "Idempotency-Key"
    """Header that is the same when the same request is sent again: the message id, or a digest of many; empty: none.
    After a crash messages may go in other company: a service that takes many at once tells them by their ``msgid``."""
    success: frozenset[int] = frozenset({200, 201, 202, 204})
    """Statuses that mean: stored. No other does."""
    retry: frozenset[int] = frozenset({408, 425, 429, 500, 502, 503, 504})
    """Statuses that mean: the same again later, not before ``Retry-After``. Every other from 500 does, too."""
    fatal: frozenset[int] | None = None
    """Statuses that mean: wrong address or credentials. The sink pauses and probes. Default: 401, 403 and 407; 404, 405
    and 410 where `url` has no placeholders. Any other below 400 does, too; no redirect is followed. Any other from 400
    means that the message can never be stored: a dead letter."""
    longest_wait: Duration = 300.0
    """Seconds of a ``Retry-After`` that are obeyed at most."""
    check_method: Literal["HEAD", "GET", "OPTIONS"] = "HEAD"
    """How `isthmus check --connect`, and a sink that pauses, ask whether the service is there: HEAD | GET | OPTIONS."""
    timeout: Duration = Field(default=10.0, ge=0.1)
    """Seconds the service has for one answer."""
    batch: Batch = Batch(max_records=500)
    """How records are grouped on their way out."""

    @model_validator(mode="after")
    def _check_http(self) -> HttpConfig:
        many = self.format != "single"
        check_target(self.url, self)
        if many and Template(self.url).names:
            raise ValueError('url: placeholders need format = "single"')
        for name, value in self.headers.items():
            check_header(name)
            compile_template(Template(value.reveal()))
            if many and Template(value.reveal()).names:
                raise ValueError(f'headers: {name}: placeholders need format = "single"')
        twice = self.success & self.retry | (self.success | self.retry) & self.stops
        if twice:
            raise ValueError(f"status {min(twice)} cannot mean two things")
        if self.idempotency_header:
            check_header(self.idempotency_header)
        return self

    def idempotency_problem(self) -> str | None:
        texts = (self.url, *(value.reveal() for value in self.headers.values()))
        if self.idempotency_header or shows_msgid(self.body, *map(Template, texts)):
            return None
        return "without idempotency_header and `${msgid}` the service could tell no repetition"

    @property
    def stops(self) -> frozenset[int]:
        """`fatal` with its default."""
        if self.fatal is not None:
            return self.fatal
        return _CREDENTIALS if Template(self.url).names else _CREDENTIALS | {404, 405, 410}


class Http:
    """One request after the other, so that order is kept; lanes are what makes it faster. Many that had to be taken
    apart, and then met an outage, are cut differently next time: their requests have other digests."""

    def __init__(self, config: HttpConfig, pool: HttpPool) -> None:
        self._config = config
        self._pool = pool
        self._requests = Requests(
            config.url, form=config.format, body=config.body, content_type=config.content_type,
            headers={name: value.reveal() for name, value in config.headers.items()},
            idempotency_header=config.idempotency_header,
        )  # fmt: skip
        self._place = origin(config.url)
        self._secrets = [w for value in config.headers.values() for w in value.reveal().split() if len(w) >= _LONG]
        self._fatal = config.stops
        self._not_before = 0.0
        self._progress = Progress()

    async def write(self, batch: Sequence[Record]) -> None:
        with self._progress.of(batch) as work:
            pieces: dict[int, bytes] = {}
            for position in work.todo:
                try:
                    pieces[position] = self._requests.piece(batch[position])
                except (LookupError, TypeError, ValueError) as error:
                    work.refuse(position, f"cannot be rendered for HTTP: {error}")
            single = self._config.format == "single"
            parts = [[position] for position in reversed(pieces)] if single else [list(pieces)] * bool(pieces)
            while parts:
                part = parts.pop()
                try:
                    request = self._requests.request([batch[p] for p in part], [pieces[p] for p in part])
                except (LookupError, TypeError, ValueError) as error:
                    work.refuse(part[0], f"cannot be rendered for HTTP: {error}")
                    continue
                refused = await self._send(request)
                if refused is None:
                    work.stored(part)
                elif len(part) == 1:
                    work.refuse(part[0], refused)
                else:
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]

    async def check(self) -> None:
        """Sends no message. Any status will do but those of wrong credentials and of a service in trouble: few services
        say something useful to a HEAD where they expect a POST."""
        url = self._config.url if not Template(self._config.url).names else f"{self._place}/"
        answer = await self._ask(self._config.check_method, Request(url, self._requests.fixed, b""))
        if answer.status in _CREDENTIALS or 300 <= answer.status < 400:
            raise Fatal(self._say(answer))
        if answer.status >= 500 and answer.status != 501:
            raise NotConnected(self._say(answer))

    async def close(self) -> None:
        await self._pool.close()

    async def _send(self, request: Request) -> str | None:
        """None when it is stored, else why it never can be; raises for what is to come again."""
        config = self._config
        wait = self._not_before - asyncio.get_running_loop().time()
        if wait > 0:
            raise NotConnected(f"{self._place} asked us to wait, {wait:.1f} s are left")
        answer = await self._ask(config.method, request)
        status = answer.status
        if status in config.success:
            return None
        if status in config.retry or status >= 500:
            pause = min(retry_after(answer.headers.get("Retry-After", "")), config.longest_wait)
            self._not_before = asyncio.get_running_loop().time() + pause
            raise NotConnected(self._say(answer))
        if status in self._fatal or status < 400:
            raise Fatal(self._say(answer))
        return self._say(answer)

    async def _ask(self, method: str, request: Request) -> Answer:
        try:
            return await self._pool.request(method, request.url, headers=request.headers, body=request.body or None)
        except BackendUnavailable as error:
            raise NotConnected(str(error)) from None

    def _say(self, answer: Answer) -> str:
        """The status and the beginning of what came with it, in which no word of a header is shown."""
        text = " ".join(answer.body.decode("utf-8", "replace").split())
        for word in self._secrets:
            text = text.replace(word, MASK)
        hint = "; no redirect is followed, correct url" if 300 <= answer.status < 400 else ""
        return f"{self._place} answered with status {answer.status}{hint}{': ' if text else ''}{text[:_SHOWN]}"


async def open_http(config: HttpConfig) -> Http:
    pool = HttpPool(config, size=config.lanes, timeout=config.timeout, most=_ANSWER, whole=False, again=False)
    return Http(config, pool)


BACKEND = Backend("sinks.http", HttpConfig, open_http, extra="http")
