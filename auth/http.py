"""Asks an HTTP service whether a client may log in, and what it may do."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote, quote_plus, urlsplit

from pydantic import model_validator

from auth._acl import TooManyRules, claim_rules, groups_of, truth
from broker.config.template import MissingValue, Placeholder, Template
from broker.config.types import Secret
from broker.connectors.endpoint import Trust
from broker.connectors.http import Answer as HttpAnswer
from broker.connectors.http import HttpPool, check_header, check_url
from broker.connectors.outbound import WebService
from broker.extend.auth import Answer, AuthConfig, BackendUnavailable, Client, Grant, Refusal, Rule, Verdict, note
from broker.extend.registry import Backend

MAX_URL = 8_000
MAX_VALUE = 4_000
"""Bytes of a value in a header."""
_PLACEHOLDERS = ("username", "clientid", "peerhost", "cert_common_name", "cert_subject")


class HttpConfig(WebService, AuthConfig):
    """`[auth.http]`"""

    url: str
    """Address that judges a login, e.g. ``https://auth.example.com/mqtt``; path and query may hold placeholders, which
    are percent-encoded: ``…/users/${username}``. Never ``${password}``: addresses are logged by everybody."""
    method: Literal["POST", "GET"] = "POST"
    """POST sends `body`; GET adds it to the query."""
    password_in_url: bool = False
    """Whether GET may put ``${password}`` into the query, where proxies and services log it."""
    format: Literal["json", "form"] = "json"
    """How `body` is written: json | form (as a browser does)."""
    body: dict[str, Template] = {  # noqa: RUF012 (a field, not shared)
        "clientid": Template("${clientid}"),
        "username": Template("${username}"),
        "password": Template("${password}"),
    }
    """What is sent: names and values with ``${username}``, ``${password}``, ``${clientid}``, ``${peerhost}`` and
    ``${cert_common_name}``. A value with a placeholder the client has nothing for is left out."""
    headers: dict[str, Secret] = {}  # noqa: RUF012
    """Headers sent with each request, e.g. ``Authorization``; may hold the same placeholders."""
    answers: Literal["json", "status"] = "json"
    """How answers are read. json (EMQX 5): status 200 with ``{"result": "allow" | "deny" | "ignore"}``, maybe with
    ``is_superuser``, ``acl``, ``groups``, ``expire_at`` and ``client_attrs``; status 204 allows, 401 and 403 deny.
    status (EMQ 2 to 4): 200 allows, but with the body ``ignore`` the next backend is asked; 400 to 499 deny. Anything
    else, a redirect too, is a failure of the service."""
    super_url: str = ""
    """With status: address that answers 200 for superusers, asked after a login; empty: there are none."""
    rules_url: str = ""
    """Address that tells a user's rights without a password: 200 with ``{"acl": […]}`` as above, 404 for an unknown
    user. It is asked after a login that brought no rights, and again after `refresh`; empty: rights come with the
    login only."""

    @model_validator(mode="after")
    def _check_http(self) -> HttpConfig:
        for text in (self.url, self.super_url, self.rules_url):
            if text:
                _check_target(text, self)
        for template in self.body.values():
            _check_names(template, password=True)
            if self.method == "GET" and "password" in template.names and not self.password_in_url:
                raise ValueError(
                    'method = "GET" would put the password into the address, where it is logged; use POST, a body '
                    "without ${password}, or write password_in_url = true"
                )
        for name, value in self.headers.items():
            check_header(name)
            _check_names(Template(value.reveal()), password=False)
        if self.super_url and self.answers != "status":
            raise ValueError('super_url needs answers = "status"; json says is_superuser with the login')
        return self


class Unsendable(Exception):
    """Something the client sent cannot be put into a request."""


class Http:
    """One request for each login; the service's word is final."""

    def __init__(self, config: HttpConfig, pool: HttpPool) -> None:
        self._config = config
        self._pool = pool
        self._url = Template(config.url)
        self._super_url = Template(config.super_url)
        self._rules_url = Template(config.rules_url)
        self._headers = {name: Template(value.reveal()) for name, value in config.headers.items()}
        self.by_address = True  # what a service answers may depend on all it was told, rights on the address anyway

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        try:
            answer = await self._ask(self._url, client, password)
            found = _read_status(answer) if self._config.answers == "status" else _read_json(answer, client, self._name)
            if not isinstance(found, Grant):
                return found
            if self._config.super_url:
                asked = await self._ask(self._super_url, client, None)
                found = Grant(_is_superuser(asked), found.attributes, found.rules, found.expires_at)
            if self._config.rules_url and not found.rules and not found.superuser:
                rights = await self.rights(client)
                if isinstance(rights, Grant):
                    attributes = {**found.attributes, **rights.attributes}
                    found = Grant(rights.superuser, attributes, rights.rules, found.expires_at)
            return found
        except Unsendable as error:
            note(str(error))
            return Refusal(f"user {(client.username or '')[:100]!r}: {error}")
        except TooManyRules as error:
            return Refusal(f"user {client.username!r} {error}", authorized=False)

    async def rights(self, client: Client) -> Grant | Refusal | None:
        """What `rules_url` says about a user; None when it knows none of this name."""
        try:
            answer = await self._ask(self._rules_url, client, None)
        except Unsendable as error:
            note(str(error))
            return None
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise BackendUnavailable(f"rules_url answered with status {answer.status}")
        try:
            return _grant(_document(answer), client, self._name)
        except TooManyRules as error:
            return Refusal(f"user {client.username!r} {error}", authorized=False)

    async def check(self) -> None:
        """Asks about a user nobody is; any answer that can be understood is a good one."""
        answer = await self._ask(self._url, Client("isthmus-check", "isthmus-check", "127.0.0.1"), b"isthmus-check")
        if self._config.answers == "status":
            _read_status(answer)
        else:
            _read_json(answer, Client("isthmus-check"), self._name)

    async def close(self) -> None:
        await self._pool.close()

    @property
    def _name(self) -> str:
        return f"auth.{self._config.name}"

    async def _ask(self, target: Template, client: Client, password: bytes | None) -> HttpAnswer:
        config = self._config
        values = self._body(client, password)
        headers = {name: _header(name, template, client) for name, template in self._headers.items()}
        url = _render_url(target, client)
        body: bytes | None = None
        if config.method == "GET":
            if values:
                url += ("&" if urlsplit(url).query else "?") + _form(values)
        elif config.format == "form":
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            body = _form(values).encode()
        else:
            headers["Content-Type"] = "application/json"
            body = json.dumps({name: _text(name, value) for name, value in values.items()}).encode()
        if config.answers == "json":
            headers.setdefault("Accept", "application/json")
        if len(url) > MAX_URL:
            raise Unsendable(f"the address would have {len(url)} bytes")
        answer = await self._pool.request(config.method, url, headers=headers, body=body)
        note(f"{config.method} {urlsplit(url).netloc}: status {answer.status}")
        return answer

    def _body(self, client: Client, password: bytes | None) -> dict[str, bytes]:
        values = {}
        for name, template in self._config.body.items():
            parts: list[bytes | None] = []
            for segment in template.segments:
                if isinstance(segment, str):
                    parts.append(segment.encode())
                elif segment.name == "password":
                    parts.append(password)
                else:
                    value = client.get(segment.name)
                    parts.append(None if value is None else value.encode("utf-8", "surrogatepass"))
            if None not in parts:
                values[name] = b"".join(part for part in parts if part is not None)
        return values


class HttpWithRules(Http):
    """A service that also tells rights without a password."""

    async def rules(self, client: Client) -> Grant | Refusal | None:
        """The rights a user has now."""
        return await self.rights(client)


async def open_http(config: HttpConfig) -> Http:
    pool = HttpPool(config, size=config.pool, timeout=config.timeout or 3.0)
    return HttpWithRules(config, pool) if config.rules_url else Http(config, pool)


def _check_target(text: str, service: Trust) -> None:
    """Host and port are what somebody wrote; only what follows may come from clients."""
    template = Template(text)
    head = template.segments[0] if template.segments and isinstance(template.segments[0], str) else ""
    scheme, _, rest = head.partition("://")
    if template.names and not (scheme and "/" in rest):
        raise ValueError(f"{text!r}: placeholders may stand in the path and the query only")
    _check_names(template, password=False)
    check_url(template.render(lambda name: "x"), service)


def _check_names(template: Template, *, password: bool) -> None:
    for name in template.names:
        if name == "password" and not password:
            raise ValueError("${password} may stand in `body` only: addresses and headers are logged by everybody")
        if name not in _PLACEHOLDERS and name != "password":
            raise ValueError(f"{template.text!r}: ${{{name}}} is not known here")


def _render_url(template: Template, client: Client) -> str:
    text = ""
    for segment in template.segments:
        if isinstance(segment, Placeholder):
            value = client.get(segment.name)
            if value is None:
                raise Unsendable(str(MissingValue(segment.name)))
            if value in (".", "..") or "\0" in value:
                raise Unsendable(f"its {segment.name} may not stand in an address")  # servers resolve dots, encoded too
            text += quote(value, safe="", errors="surrogatepass")
        else:
            text += segment
    return text


def _header(name: str, template: Template, client: Client) -> str:
    try:
        value = template.render(client.get)
    except MissingValue:
        return ""
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in value):
        raise Unsendable(f"a control character may not stand in the header {name}")
    if len(value.encode("utf-8", "surrogatepass")) > MAX_VALUE:
        raise Unsendable(f"the header {name} would be longer than {MAX_VALUE} bytes")
    return value


def _form(values: Mapping[str, bytes]) -> str:
    return "&".join(f"{quote_plus(name)}={quote_plus(value)}" for name, value in values.items())


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Unsendable(f'its {name} is not UTF-8 text, which format = "form" could send') from None


def _read_status(answer: HttpAnswer) -> Answer:
    if answer.status == 200:
        return Verdict.IGNORE if answer.body.strip().lower() == b"ignore" else Grant()
    if 400 <= answer.status < 500:
        return Verdict.DENY
    raise BackendUnavailable(f"answered with status {answer.status}")


def _is_superuser(answer: HttpAnswer) -> bool:
    if answer.status == 200:
        return answer.body.strip().lower() != b"ignore"
    if 400 <= answer.status < 500:
        return False
    raise BackendUnavailable(f"super_url answered with status {answer.status}")


def _read_json(answer: HttpAnswer, client: Client, source: str) -> Answer:
    if answer.status == 204:
        return Grant()
    if answer.status in (401, 403):
        return Verdict.DENY
    if answer.status != 200:
        raise BackendUnavailable(f"answered with status {answer.status}")
    document = _document(answer)
    match document.get("result"):
        case "allow":
            grant = _grant(document, client, source)
            if grant.expires_at is not None and grant.expires_at <= time.time():
                return Refusal(f"user {client.username!r}: the service says the login ended already (expire_at)")
            return grant
        case "deny":
            return Verdict.DENY
        case "ignore":
            return Verdict.IGNORE
    raise BackendUnavailable("answered without result = allow, deny or ignore")


def _document(answer: HttpAnswer) -> Mapping[str, Any]:
    if answer.kind != "application/json" and not answer.kind.endswith("+json"):
        raise BackendUnavailable(f"answered with {answer.kind or 'no content type'}, not with application/json")
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError):
        raise BackendUnavailable("answered with something that is no JSON") from None
    if not isinstance(document, dict):
        raise BackendUnavailable("answered with JSON that is no object")
    return document


def _grant(document: Mapping[str, Any], client: Client, source: str) -> Grant:
    expires_at = document.get("expire_at")
    if expires_at is not None and (type(expires_at) not in (int, float) or not math.isfinite(expires_at)):
        raise BackendUnavailable("answered with an expire_at that is no time")
    attributes = document.get("client_attrs")
    if not isinstance(attributes, dict):
        attributes = {}
    rules: list[Rule] = claim_rules(document.get("acl"), client, source)
    texts = {name: value for name, value in attributes.items() if isinstance(value, str)}
    until = None if expires_at is None else min(float(expires_at), 2.0**40)
    groups = groups_of(document.get("groups"))
    return Grant(truth(document.get("is_superuser")), texts, tuple(rules), until, groups=groups)


BACKEND = Backend("auth.http", HttpConfig, open_http, extra="http")
