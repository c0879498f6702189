"""The keys tokens are checked with: written down, or fetched from an identity provider and fetched again.

A key says which algorithms it is good for; what a token says about algorithms only chooses among those. Nothing in a
token leads to a request elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import ECKey, JWKRegistry, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from broker.connectors.http import HttpPool
from broker.extend.auth import BackendUnavailable

logger = logging.getLogger(__name__)

AnyKey = OctKey | RSAKey | ECKey | OKPKey

REFETCH = 30.0
"""Seconds between two fetches that unknown key ids may cause."""
RETRY = 4.0
"""Seconds between two fetches while there are no keys at all; less than the shortest pause of a breaker, whose one
call in between would otherwise ask nobody and fail."""
MAX_KEYS = 100
MIN_SECRET = 32
"""Bytes of a shared secret, RFC 7518 section 3.2."""
MIN_RSA = 2_048
MAX_RSA = 8_192
"""Bits; verifying with a key of any size could take any time."""
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}


class Registry(JWSRegistry):
    """The library's algorithms, those asked for and no other; headers it does not know are of no meaning."""

    max_header_length = 8_192

    def __init__(self, allowed: Sequence[str]) -> None:
        super().__init__(algorithms=allowed, strict_check_header=False)

    def get_alg(self, name: str) -> Any:
        return self.algorithms[name]  # `VerifyKey` let no other name through


class VerifyKey:
    """One key and the algorithms it may be used with. ValueError when it is no good."""

    __slots__ = ("algorithms", "key", "kid", "registry")

    def __init__(self, key: AnyKey, wanted: Sequence[str] = ()) -> None:
        self.key = key
        self.kid = key.kid
        named = key.alg
        fitting = _fitting(key)
        allowed = tuple(a for a in fitting if (not wanted or a in wanted) and named in (None, a, _older(a)))
        if not allowed:
            raise ValueError(f"a key of type {key.key_type} is good for {', '.join(fitting)}, none of which is wanted")
        self.algorithms = frozenset(allowed)
        self.registry = Registry(allowed)


class Keys:
    """Keys that stay the same. A single one without an id serves every key id."""

    def __init__(self, keys: Iterable[VerifyKey]) -> None:
        self.replace(keys)

    def replace(self, keys: Iterable[VerifyKey]) -> None:
        self._all = tuple(keys)

    def __len__(self) -> int:
        return len(self._all)

    def match(self, kid: str | None, algorithm: str) -> list[VerifyKey]:
        """The keys a token with this id and algorithm may have been signed with."""
        return [
            one
            for one in self._all
            if algorithm in one.algorithms and (kid is None or one.kid is None or one.kid == kid)
        ]

    def at_hand(self, kid: str | None, algorithm: str) -> list[VerifyKey] | None:
        """The same; None when `find` has to be waited for."""
        return self.match(kid, algorithm)

    async def find(self, kid: str | None, algorithm: str) -> list[VerifyKey]:
        """The same; may fetch."""
        return self.match(kid, algorithm)

    async def check(self) -> None:
        """The keys were read when this was opened."""

    async def close(self) -> None:
        """There is nothing to end."""


class RemoteKeys(Keys):
    """Keys of an identity provider. Those once fetched stay good while it cannot be reached."""

    def __init__(
        self,
        url: str,
        pool: HttpPool,
        wanted: Sequence[str],
        *,
        refresh: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(())
        self._url = url
        self._pool = pool
        self._wanted = wanted
        self._refresh = refresh
        self._clock = clock
        self._fetched = self._tried = -1e9
        self._task: asyncio.Task[None] | None = None
        self._error = ""
        self.fetches = 0

    def at_hand(self, kid: str | None, algorithm: str) -> list[VerifyKey] | None:
        """Those that are known serve although they are to be fetched again, which is begun here."""
        if not len(self):
            return None
        now = self._clock()
        if now - self._fetched >= self._refresh and now - self._tried >= min(REFETCH, self._refresh):
            self._start()
        found = self.match(kid, algorithm)
        if found or kid is None:
            return found
        return None if self._task is not None or now - self._tried >= REFETCH else found

    async def find(self, kid: str | None, algorithm: str) -> list[VerifyKey]:
        found = self.at_hand(kid, algorithm)
        if found is not None:
            return found
        if self._clock() - self._tried >= (REFETCH if len(self) else RETRY):
            self._start()
        await self._done()
        if not len(self):
            raise BackendUnavailable(f"there are no keys: {self._error}")
        return self.match(kid, algorithm)

    async def check(self) -> None:
        self._start()
        await self._done()
        if self._error:
            raise BackendUnavailable(self._error)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=1.0)
        await self._pool.close()

    def _start(self) -> None:
        """One fetch at a time, on behalf of everybody who waits."""
        if self._task is None:
            self._tried = self._clock()
            self._task = asyncio.get_running_loop().create_task(self._fetch())
            self._task.add_done_callback(self._ended)

    async def _done(self) -> None:
        if self._task is not None:
            await asyncio.wait({self._task})  # who leaves does not end the fetch

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = f"internal error: {type(error).__name__}"
            logger.error("the keys of %s were not read", self._url, exc_info=error)

    async def _fetch(self) -> None:
        self.fetches += 1
        try:
            answer = await self._pool.request("GET", self._url, headers={"Accept": "application/json"})
            if answer.status != 200:
                raise ValueError(f"{self._url} answered with status {answer.status}")
            keys = read_jwks(answer.body, self._wanted, self._url, shared=False)
        except (BackendUnavailable, ValueError) as error:
            self._error = str(error)
            logger.warning(
                "the keys for tokens cannot be fetched, %s: %s",
                f"the {len(self)} known ones stay in use" if len(self) else "no token can be checked", error,
            )  # fmt: skip
            return
        self.replace(keys)
        self._fetched = self._clock()
        self._error = ""


def read_secret(secret: bytes, wanted: Sequence[str]) -> VerifyKey:
    """A shared secret. ValueError when it is short, or a public key by mistake."""
    if len(secret) < MIN_SECRET:
        raise ValueError(f"secret: has {len(secret)} bytes, at least {MIN_SECRET} are needed (RFC 7518 section 3.2)")
    if secret.lstrip().startswith((b"-----BEGIN", b"---- BEGIN", b"ssh-", b"ecdsa-", b"{")):
        raise ValueError("secret: is a key of another kind; write public_key or jwks")
    try:
        with _quietly():
            return VerifyKey(OctKey.import_key(secret), wanted)
    except (JoseError, ValueError) as error:
        raise ValueError(f"secret: {error}") from None


def read_pem(text: bytes, wanted: Sequence[str]) -> VerifyKey:
    """A public key or certificate as PEM: RSA, EC or Ed25519. ValueError."""
    problem = "is no public key"
    for kind in (RSAKey, ECKey, OKPKey):
        try:
            with _quietly():
                key = kind.import_key(text)
        except (JoseError, ValueError, TypeError, AttributeError) as error:
            problem = str(error) or problem
            continue
        return VerifyKey(_public(key), wanted)
    raise ValueError(problem)


def read_jwks(text: bytes, wanted: Sequence[str], source: str, *, shared: bool) -> list[VerifyKey]:
    """The usable keys of a JWK set, or of a single JWK; `shared`: secrets too. ValueError when none is left."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{source} is no JSON") from None
    if not isinstance(document, Mapping):
        raise ValueError(f"{source} is no set of keys")
    entries = document.get("keys", [document])
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ValueError(f"{source} is no set of at most {MAX_KEYS} keys")
    keys = []
    problem = "it is empty"
    for number, entry in enumerate(entries):
        try:
            keys.append(_read_jwk(entry, wanted, shared=shared))
        except (JoseError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            problem = f"key {number}: {str(error) or type(error).__name__}"
            logger.info("%s: %s; it is left out", source, problem)
    if not keys:
        raise ValueError(f"{source} has no key that can be used: {problem}")
    return keys


def _read_jwk(entry: Any, wanted: Sequence[str], *, shared: bool) -> VerifyKey:
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(n, ""), str) for n in ("kty", "kid", "alg")):
        raise ValueError("is no key")
    if entry.get("kty") == "oct" and not shared:
        raise ValueError("a shared secret does not come from a public place")
    if entry.get("use", "sig") != "sig":
        raise ValueError("is not for signatures")
    if "verify" not in entry.get("key_ops", ("verify",)):
        raise ValueError("is not for verifying")
    with _quietly():
        key = JWKRegistry.import_key(dict(entry))
    if isinstance(key, OctKey) and len(key.raw_value) < MIN_SECRET:
        raise ValueError(f"a secret needs at least {MIN_SECRET} bytes")
    return VerifyKey(key if isinstance(key, OctKey) else _public(key), wanted)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The library warns of keys that are refused here anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        yield


def _public(key: AnyKey) -> AnyKey:
    """Without what only the issuer should have; the key's numbers are looked at on the way."""
    if not key.is_private:
        key.public_key  # noqa: B018 (builds it: a point that is not on the curve is found here)
        return key
    return type(key).import_key(key.as_dict(private=False))


def _fitting(key: AnyKey) -> tuple[str, ...]:
    if isinstance(key, OctKey):
        return "HS256", "HS384", "HS512"
    if isinstance(key, RSAKey):
        bits = key.public_key.key_size
        if not MIN_RSA <= bits <= MAX_RSA:
            raise ValueError(f"an RSA key of {bits} bits; between {MIN_RSA} and {MAX_RSA} are used")
        return "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"
    if isinstance(key, ECKey) and key.curve_name in _CURVES:
        return (_CURVES[key.curve_name],)
    if isinstance(key, OKPKey) and key.curve_name == "Ed25519":
        return "EdDSA", "Ed25519"
    raise ValueError(f"curve {key.curve_name} is not supported here")


def _older(algorithm: str) -> str:
    """RFC 9864 gave a new name to what is still mostly called EdDSA."""
    return {"EdDSA": "Ed25519", "Ed25519": "EdDSA"}.get(algorithm, algorithm)
