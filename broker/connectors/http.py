"""HTTP services: a pool of connections to addresses somebody wrote down. No redirects, nothing unbounded.

The host never comes from a client. Answers are read up to a limit and never compressed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from broker.config.types import Address
from broker.connectors.endpoint import Trust
from broker.connectors.outbound import Guard, WebService
from broker.extend.auth import BackendUnavailable

__all__ = ["Answer", "HttpPool", "check_header", "check_url"]

MAX_ANSWER = 64 << 10
"""Bytes of one answer's body."""
_HEADERS = {"User-Agent": "isthmus", "Accept-Encoding": "identity"}
"""A compressed answer could be of any size."""
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_UNUSED = frozenset({"host", "content-length", "transfer-encoding", "connection", "upgrade", "expect", "te", "trailer"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, in full."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def kind(self) -> str:
        """The media type without parameters, in lower case; empty when none was named."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()


class HttpPool:
    """At most `size` connections. An answer of more than `most` bytes is none, nor is a compressed one; where only the
    status counts, without `whole`, the rest is not read. `again`: what meets a closed connection is sent once more."""

    def __init__(
        self,
        service: Trust,
        *,
        size: int,
        timeout: float,
        most: int = MAX_ANSWER,
        whole: bool = True,
        again: bool = True,
    ) -> None:
        self._timeout = timeout
        self._most = most
        self._whole = whole
        self._again = again
        self._context = service.context()
        self._guard = _guard(service)
        self._size = size
        self._session: aiohttp.ClientSession | None = None

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """One exchange. Any status is an answer; BackendUnavailable when there is none, or one too long."""
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    return await self._exchange(method, url, headers or {}, body)
                except aiohttp.ClientConnectorError:
                    raise
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    if not self._again:
                        raise
                    # the service may have closed the connection while it was idle; one fresh attempt tells
                    return await self._exchange(method, url, headers or {}, body)
        except TimeoutError:
            raise BackendUnavailable(f"{_place(url)} gave no answer in {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise BackendUnavailable(f"{_place(url)}: {_say(error)}") from None

    async def close(self) -> None:
        """Ends every connection."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self._size, ssl=self._context, keepalive_timeout=30, resolver=self._guard
            )
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None), headers=_HEADERS, auto_decompress=False,
                max_line_size=8190, max_field_size=8190,
            )  # fmt: skip
        return self._session

    async def _exchange(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        # encoded=True: what was escaped stays escaped, so no value can begin a query or leave its part
        request = self._open().request(
            method, URL(url, encoded=True), headers=headers, data=body, allow_redirects=False
        )
        async with request as response:
            plain = response.headers.get("Content-Encoding", "identity").strip().lower() == "identity"
            if not plain and self._whole:
                raise ValueError("the answer is compressed, which was not asked for")
            return Answer(response.status, response.headers, await self._read(response))

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        length = response.content_length
        if length is not None and length > self._most and self._whole:
            raise ValueError(f"the answer has more than {self._most} bytes")
        found = bytearray()
        async for piece in response.content.iter_chunked(16 << 10):
            found += piece
            if len(found) > self._most:
                if not self._whole:
                    break
                raise ValueError(f"the answer has more than {self._most} bytes")
        return bytes(found[: self._most])


def check_url(text: str, service: Trust) -> str:
    """The URL, when it can be used with this service. ValueError says what is wrong."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(f"{text!r} is not a URL; write https://HOST/PATH") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is not a URL; write https://HOST/PATH")
    if parts.username is not None or parts.fragment:
        raise ValueError("a URL here has neither user nor fragment; write a header Authorization instead")
    if re.search(r"[\x00-\x20\x7f]", text):
        raise ValueError(f"{text!r} holds a blank or a control character")
    _guard(service).check(parts.hostname)
    if parts.scheme == "http" and not service.allow_cleartext:
        address = Address(parts.hostname, port or 80)
        if not address.loopback:
            raise ValueError(
                f"http://{address} would send passwords unprotected to another machine; "
                "use https://, or write allow_cleartext = true"
            )
    return text


def check_header(name: str) -> None:
    """ValueError when a header of this name may not be set."""
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a header")
    if name.lower() in _UNUSED:
        raise ValueError(f"the header {name} is set by HTTP itself")


def _guard(service: Trust) -> Guard:
    return service.guard() if isinstance(service, WebService) else Guard()


def _place(url: str) -> str:
    """Without path and query, which may hold what belongs to a client."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _say(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted; name the authority with `ca`"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot be reached: {error.os_error.strerror or error.os_error}"
    return str(error)[:200] or type(error).__name__
