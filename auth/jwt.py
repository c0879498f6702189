"""Lets clients in with a signed token (JWT): an identity provider has judged them, and says what they may do."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Annotated, Any, Literal

from joserfc import jws
from joserfc.errors import JoseError
from pydantic import Field, model_validator

from auth._acl import TooManyRules, claim_rules, groups_of, truth
from auth._jwks import Keys, Registry, RemoteKeys, VerifyKey, read_jwks, read_pem, read_secret
from broker.config.template import MissingValue, Template
from broker.config.types import ConfigPath, Duration, Secret, Size
from broker.connectors.http import HttpPool, check_url
from broker.connectors.outbound import WebService
from broker.extend.auth import Answer, AuthConfig, Client, Grant, Refusal, Rule, Verdict, note
from broker.extend.registry import Backend

MAX_TOKEN = 16 << 10
MAX_LIFE = 10 * 365 * 86_400.0
"""Seconds; a token that claims to be good for longer is treated as one that is good for this long."""
MAX_JWKS = 256 << 10
_PLACEHOLDERS = ("username", "clientid", "peerhost", "cert_common_name")
_ALGORITHMS = frozenset(f"{family}{bits}" for family in ("HS", "RS", "PS", "ES") for bits in (256, 384, 512)) | {
    "EdDSA",
    "Ed25519",
}
Find = Callable[[str | None, str], Sequence[VerifyKey] | None]
"""The keys for a key id and an algorithm; None when they have to be fetched first."""
_COMPACT = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_READING = Registry(())


class JwtConfig(WebService, AuthConfig):
    """`[auth.jwt]`"""

    secret: Secret = Secret()
    """Shared secret of tokens with HS256, HS384 or HS512; at least 32 bytes. Give exactly one of `secret`,
    `public_key`, `jwks` and `jwks_url`."""
    secret_base64: bool = False
    """Whether `secret` is written as base64."""
    public_key: ConfigPath | None = None
    """File with the issuer's public key or certificate (PEM): RSA, EC or Ed25519. The key decides which algorithms are
    taken, never the token."""
    jwks: ConfigPath | None = None
    """File with a set of keys (JWK set)."""
    jwks_url: str = ""
    """Address of the issuer's set of keys. It is fetched at the first login, again after `jwks_refresh`, and when a
    token names a key that is not known, at most once in 30 seconds; known keys stay in use while it fails."""
    jwks_refresh: Annotated[Duration, Field(ge=30, le=86_400)] = 300.0
    """Seconds after which the set of keys is fetched again, at the next login."""
    algorithms: tuple[str, ...] = ()
    """Algorithms that are taken, of those the keys are good for; empty: all of these."""
    token_in: Literal["password", "username", "cookie", "header"] = "password"
    """Where the token is: password | username | cookie (see `cookie`) | header (``Authorization: Bearer``); the last
    two of the request that opened a WebSocket."""
    cookie: str = "jwt"
    """Name of the cookie that holds the token."""
    max_token: Annotated[Size, Field(ge=256, le=MAX_TOKEN)] = 8 << 10
    """Bytes of a token that is looked at."""
    issuer: str = ""
    """What the claim ``iss`` must be, exactly; empty: anything."""
    other_issuer: Literal["deny", "ignore"] = "deny"
    """What a token of another issuer means: deny | ignore (the next backend is asked, such as a second instance for
    that issuer)."""
    audience: tuple[str, ...] = ()
    """One of these must be in the claim ``aud``; empty: anything."""
    claims: dict[str, Template] | None = None
    """Claims a token must have, with the values they must equal: ``{ client_id = "${clientid}" }``. Default:
    ``{ sub = "${username}" }`` so that nobody uses a token under another name; none when the token is not the
    password."""
    require_expiry: bool = True
    """Whether a token must say when it ends (``exp``). At that time the client is disconnected."""
    leeway: Annotated[Duration, Field(le=60)] = 2.0
    """Seconds by which the clocks of issuer and broker may differ."""
    username_claim: str = ""
    """Claim with the name the client is known by from then on, e.g. ``sub``; for tokens that are not the password.
    Empty: the name it gave."""
    acl_claim: str = "acl"
    """Claim with rights: lists of topic filters ``pub``, ``sub``, ``all``, or a list of records with ``permission``,
    ``action`` and ``topic``; empty: rights never come from tokens."""
    superuser_claim: str = "is_superuser"
    """Claim that lets its bearer do everything when it is true; empty: none does."""
    groups_claim: str = ""
    """Claim with the names of the groups its bearer is a member of, e.g. ``groups`` or ``roles``; empty: none has."""
    attributes: tuple[str, ...] = ()
    """Claims whose text rules may use as ``${attr.NAME}``."""

    @model_validator(mode="after")
    def _check_jwt(self) -> JwtConfig:
        given = [n for n in ("secret", "public_key", "jwks", "jwks_url") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of secret, public_key, jwks and jwks_url, not {len(given)}")
        if self.jwks_url:
            check_url(self.jwks_url, self)
        for name in self.algorithms:
            if name not in _ALGORITHMS:
                raise ValueError(f"algorithms: {name!r} is not one of {', '.join(sorted(_ALGORITHMS))}")
        for template in (self.claims or {}).values():
            for name in template.names:
                if name not in _PLACEHOLDERS:
                    raise ValueError(f"{template.text!r}: ${{{name}}} is not known here")
        if self.other_issuer == "ignore" and not self.issuer:
            raise ValueError("other_issuer needs issuer")
        return self

    @property
    def required(self) -> Mapping[str, Template]:
        """The claims that are compared."""
        if self.claims is not None:
            return self.claims
        return {} if self.token_in != "password" else {"sub": Template("${username}")}


class Bad(Exception):
    """The token is not good; the text is for the operator and holds nothing that is secret in it."""


class OtherIssuer(Bad):
    """The token is somebody else's to judge."""


class KeyAway(Exception):
    """The token's key may be among those that have not been fetched yet."""

    def __init__(self, kid: str | None, algorithm: str) -> None:
        super().__init__(kid, algorithm)
        self.kid = kid
        self.algorithm = algorithm


class Jwt:
    """Whoever presents a token is let in by it or not at all; without a token the next backend is asked."""

    def __init__(self, config: JwtConfig, keys: Keys) -> None:
        self._config = config
        self._keys = keys
        self._required = config.required
        self._source = f"auth.{config.name}: claim {config.acl_claim}"
        self.without_password = config.token_in != "password"
        self.by_address = True  # rights in a token may hold for some addresses only

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        try:
            return self._judge(client, password, self._keys.at_hand)
        except KeyAway as away:
            await self._keys.find(away.kid, away.algorithm)
        return self._judge(client, password, self._keys.match)

    def at_once(self, client: Client, password: bytes) -> Answer | None:
        """The same, unless keys have to be fetched for it."""
        try:
            return self._judge(client, password, self._keys.at_hand)
        except KeyAway:
            return None

    def _judge(self, client: Client, password: bytes, find: Find) -> Answer:
        """Raises KeyAway."""
        token = self._token(client, password)
        if token is None:
            note("there is no token here")
            return Verdict.IGNORE
        try:
            return self._grant(self._verify(token, find), client)
        except (Bad, TooManyRules) as error:
            if isinstance(error, OtherIssuer) and self._config.other_issuer == "ignore":
                note(f"{error}: not for this backend")
                return Verdict.IGNORE
            note(f"the token is refused: {error}")
            return Refusal(f"user {self._shown(client)}: the token is refused: {error}")

    async def check(self) -> None:
        await self._keys.check()

    async def close(self) -> None:
        await self._keys.close()

    def _token(self, client: Client, password: bytes) -> bytes | None:
        """What the client presents as a token, good or bad; None when it presents something else."""
        where = self._config.token_in
        if where == "password":
            found = password
        elif where == "username":
            found = (client.username or "").encode()
        elif where == "header":
            scheme, _, value = (client.get("ws_authorization") or "").strip().partition(" ")
            return value.strip().encode() if scheme.lower() == "bearer" else None
        else:
            cookie = _cookie(client.get("ws_cookie") or "", self._config.cookie)
            return cookie.encode() if cookie else None
        return found if _is_token(found) else None

    def _verify(self, token: bytes, find: Find) -> Mapping[str, Any]:
        """The claims of a token that was signed with one of our keys."""
        if len(token) > self._config.max_token:
            raise Bad(f"it has {len(token)} bytes, more than max_token")
        if not _COMPACT.fullmatch(token):
            raise Bad("it is not of the form HEADER.CLAIMS.SIGNATURE")
        parts = _parts(token)
        header = parts.headers()
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
            raise Bad("its algorithm is none that is taken")
        if kid is not None and (not isinstance(kid, str) or len(kid) > 256):
            raise Bad("its key id is no short text")
        if "crit" in header:
            raise Bad("it asks for an extension that is not known here")  # RFC 7515 section 4.1.11
        if self._config.issuer and self._config.other_issuer == "ignore":
            _check_issuer(_object(parts.payload), self._config.issuer)
        keys = find(kid, algorithm)
        if keys is None:
            raise KeyAway(kid, algorithm)
        if not keys:
            raise Bad(f"no key is known for its key id and {algorithm}")
        if not any(_signed(parts, key, algorithm) for key in keys[:8]):
            raise Bad("its signature is wrong")
        return _object(parts.payload)

    def _grant(self, claims: Mapping[str, Any], client: Client) -> Grant:
        config = self._config
        expires_at = self._check_times(claims)
        if config.issuer:
            _check_issuer(claims, config.issuer)
        if config.audience and not set(_texts(claims.get("aud"))) & set(config.audience):
            raise Bad("its audience is another")
        for name, template in self._required.items():
            try:
                wanted = template.render(client.get)
            except MissingValue as missing:
                raise Bad(f"the claim {name} cannot be compared: {missing}") from None
            if claims.get(name) != wanted or not isinstance(claims.get(name), str):
                raise Bad(f"its claim {name} is not {template.text}")
        rules: list[Rule] = []
        if config.acl_claim:
            rules = claim_rules(claims.get(config.acl_claim), client, self._source)
        attributes = {n: claims[n] for n in config.attributes if isinstance(claims.get(n), str)}
        superuser = bool(config.superuser_claim) and truth(claims.get(config.superuser_claim))
        note(f"the token is good, with {len(rules)} rules{' and as superuser' if superuser else ''}")
        username = claims.get(config.username_claim) if config.username_claim else None
        if config.username_claim and not (isinstance(username, str) and username and "\0" not in username):
            raise Bad(f"its claim {config.username_claim} is no name")
        groups = groups_of(claims.get(config.groups_claim)) if config.groups_claim else frozenset[str]()
        return Grant(superuser, attributes, tuple(rules), expires_at, username, groups)

    def _check_times(self, claims: Mapping[str, Any]) -> float | None:
        """When the login ends. Every time that is named must be one."""
        now = time.time()
        leeway = self._config.leeway
        for name in ("exp", "nbf", "iat"):
            if name not in claims:
                continue
            value: Any = claims[name]
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise Bad(f"its {name} is no time")
        if "nbf" in claims and claims["nbf"] > now + leeway:
            raise Bad("it is not good yet")
        if "exp" not in claims:
            if self._config.require_expiry:
                raise Bad("it does not say when it ends (exp)")
            return None
        if claims["exp"] + leeway <= now:
            raise Bad("it has expired")
        return min(float(claims["exp"]) + leeway, now + MAX_LIFE)

    def _shown(self, client: Client) -> str:
        """A name that may be logged."""
        return repr(client.username) if self._config.token_in != "username" else "(named by a token)"


async def open_jwt(config: JwtConfig) -> Jwt:
    return Jwt(config, _open_keys(config))


def _open_keys(config: JwtConfig) -> Keys:
    wanted = config.algorithms
    if config.secret:
        return Keys([read_secret(_secret(config), wanted)])
    if config.jwks_url:
        pool = HttpPool(config, size=1, timeout=config.timeout or 3.0, most=MAX_JWKS)
        return RemoteKeys(config.jwks_url, pool, wanted, refresh=config.jwks_refresh)
    path = config.public_key or config.jwks
    assert path is not None
    text = path.read_bytes()
    if config.public_key is not None:
        try:
            return Keys([read_pem(text, wanted)])
        except ValueError as error:
            raise ValueError(f"public_key: {path}: {error}") from None
    return Keys(read_jwks(text, wanted, f"jwks: {path}", shared=True))


def _secret(config: JwtConfig) -> bytes:
    text = config.secret.reveal()
    if not config.secret_base64:
        return text.encode()
    try:
        return base64.b64decode(text.translate(str.maketrans("-_", "+/")) + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("secret: is not base64") from None


def _is_token(found: bytes) -> bool:
    """Whether it was meant as a token; a bad one is refused for good, anything else is for the next backend."""
    if found.startswith(b"eyJ"):  # {"
        return True
    if found.count(b".") not in (2, 4):
        return False
    try:
        return bool(_json(found.partition(b".")[0][:1_024].decode("ascii")))
    except (Bad, UnicodeDecodeError):
        return False


def _parts(token: bytes) -> jws.CompactSignature:
    """Header and claims as they are, before anything of them is believed."""
    try:
        parts = jws.extract_compact(token, registry=_READING)
    except (JoseError, ValueError, RecursionError):
        raise Bad("it is no JSON in base64") from None
    if not isinstance(parts.headers(), dict):
        raise Bad("it is no JSON object")
    return parts


def _signed(parts: jws.CompactSignature, key: VerifyKey, algorithm: str) -> bool:
    try:
        return jws.validate_compact(parts, key.key, [algorithm], key.registry)
    except (JoseError, ValueError, TypeError):
        return False


def _json(segment: str) -> Mapping[str, Any]:
    try:
        data = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        raise Bad("it is no JSON in base64") from None
    return _object(data)


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Bad("it is no JSON in base64") from None
    if not isinstance(found, dict):
        raise Bad("it is no JSON object")
    return found


def _check_issuer(claims: Mapping[str, Any], issuer: str) -> None:
    found = claims.get("iss")
    if not isinstance(found, str) or found != issuer:
        raise OtherIssuer("its issuer is another")


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str)]


def _cookie(header: str, name: str) -> str | None:
    try:
        morsel = SimpleCookie(header[: 2 * MAX_TOKEN]).get(name)
    except CookieError:
        return None
    return morsel.value if morsel is not None else None


BACKEND = Backend("auth.jwt", JwtConfig, open_jwt, extra="jwt")
