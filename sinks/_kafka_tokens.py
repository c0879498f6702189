"""Bearer tokens for Kafka: written down, in a file, or from an OAuth 2 server that grants them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaConnectionError, SaslAuthenticationFailed
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from broker.config.types import ConfigPath, Duration, Secret
from broker.connectors.endpoint import Trust
from broker.extend.auth import BackendUnavailable

if TYPE_CHECKING:
    from broker.connectors.http import Answer, HttpPool

_RENEW_AT = 0.8  # of a token's life
_LIFE = 300.0  # seconds of one whose server does not tell


class TokenServer(BaseModel):
    """`token_from = { … }`: the client-credentials grant, RFC 6749 section 4.4."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    url: str
    """The server's token endpoint, `https://…`."""
    client_id: str
    """Who asks."""
    client_secret: Secret
    """What proves it."""
    scope: str = ""
    """What is asked for, where the server wants to know."""
    ca: ConfigPath | None = None
    """Authorities that may vouch for the server, PEM, besides the system's."""
    allow_cleartext: bool = False
    """Whether `url` may be `http://` on another machine."""
    timeout: Duration = 5.0
    """Seconds the server has for an answer."""

    @model_validator(mode="after")
    def _usable(self) -> TokenServer:
        try:
            from broker.connectors.http import check_url
        except ImportError:
            raise ValueError("needs pip install 'isthmus[http]'") from None
        check_url(self.url, self.trust())
        return self

    @field_validator("client_id")
    @classmethod
    def _named(cls, client_id: str) -> str:
        if not client_id:
            raise ValueError("must not be empty")
        return client_id

    def trust(self) -> Trust:
        """How the server's certificate is checked."""
        return Trust.model_construct(ca=self.ca, allow_cleartext=self.allow_cleartext)


class TokenRefused(SaslAuthenticationFailed):  # type: ignore[misc]
    """There is no token for us."""


class TokenMissing(KafkaConnectionError):  # type: ignore[misc]
    """There is no token at the moment."""


class Written(AbstractTokenProvider):  # type: ignore[misc]
    """A token of the configuration, or of a file that is read for every connection, so that it may be renewed."""

    def __init__(self, token: Secret, file: Path | None) -> None:
        self._token = token
        self._file = file

    async def token(self) -> str:
        """Asked by the driver for each connection."""
        if self._file is None:
            return self._token.reveal()
        try:
            return (await asyncio.to_thread(self._file.read_text)).strip()
        except (OSError, ValueError) as error:
            raise TokenMissing(f"token_file {self._file} cannot be read: {error}") from None


class Granted(AbstractTokenProvider):  # type: ignore[misc]
    """A token of a server, kept for four fifths of its life; many connections at once ask for one."""

    def __init__(self, server: TokenServer) -> None:
        self._server = server
        self._asking = asyncio.Lock()
        self._token = ""
        self._until = 0.0

    async def token(self) -> str:
        """Asked by the driver for each connection."""
        async with self._asking:
            if time.monotonic() >= self._until:
                self._token, life = await self._ask()
                self._until = time.monotonic() + life * _RENEW_AT
            return self._token

    async def _ask(self) -> tuple[str, float]:
        from broker.connectors.http import HttpPool

        server = self._server
        try:
            pool = HttpPool(server.trust(), size=1, timeout=server.timeout)
        except ValueError as error:
            raise TokenMissing(f"token_from: {error}") from None
        try:
            answer = await self._request(pool)
        except BackendUnavailable as error:
            raise TokenMissing(f"token_from: {error}") from None
        finally:
            await pool.close()
        if answer.status in (400, 401, 403):  # RFC 6749 section 5.2
            raise TokenRefused(f"token_from: {server.url} answers {answer.status} {_reason(answer.body)}".rstrip())
        try:
            granted = json.loads(answer.body)
            token, life = granted["access_token"], float(granted.get("expires_in", _LIFE))
        except (ValueError, TypeError, KeyError, AttributeError):
            token, life = None, 0.0
        if answer.status != 200 or not isinstance(token, str):
            raise TokenMissing(f"token_from: {server.url} answers {answer.status} and no token")
        return token, life

    async def _request(self, pool: HttpPool) -> Answer:
        server = self._server
        who = f"{quote(server.client_id, safe='')}:{quote(server.client_secret.reveal(), safe='')}"
        form = {"grant_type": "client_credentials"} | ({"scope": server.scope} if server.scope else {})
        headers = {
            "Authorization": f"Basic {base64.b64encode(who.encode()).decode()}", "Accept": "application/json",
            "Content-Type": "application/x-www-form-urlencoded",
        }  # fmt: skip
        return await pool.request("POST", server.url, headers=headers, body=urlencode(form).encode())


def _reason(body: bytes) -> str:
    """The one word RFC 6749 has for it; the rest of the answer might repeat what we sent."""
    try:
        word = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        return ""
    return word if isinstance(word, str) and len(word) < 40 and word.replace("_", "").isalpha() else ""
