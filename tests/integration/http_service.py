"""A real HTTP server whose answers a test decides, in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.servers import Certificates

Answer = Callable[[web.Request, bytes], web.StreamResponse | Awaitable[web.StreamResponse]]


@dataclass
class Seen:
    """One request as it arrived; `path` is as it was on the wire."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Service:
    """`service.answer` decides; `service.seen` holds what came."""

    answer: Answer
    port: int = 0
    scheme: str = "http"
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    most: int = 0

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request.method, request.raw_path, dict(request.headers), body))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            answer: Any = self.answer(request, body)  # type: ignore[arg-type]
            return await answer if asyncio.iscoroutine(answer) else answer
        finally:
            self.running -= 1


@contextlib.asynccontextmanager
async def service(answer: Answer, certs: Certificates | None = None, port: int = 0) -> AsyncIterator[Service]:
    """`async with service(lambda request, body: web.json_response({…})) as http:`; HTTPS with `certs`."""
    made = Service(answer, scheme="https" if certs else "http")
    runner = web.ServerRunner(web.Server(made, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    context = None
    if certs is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certs.server, certs.server_key)
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context)
    await site.start()
    made.port = runner.addresses[0][1]
    try:
        yield made
    finally:
        await runner.cleanup()
