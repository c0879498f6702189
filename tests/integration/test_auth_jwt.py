"""Logins with tokens: forged ones, expired ones, and those of an identity provider that comes and goes."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("joserfc")
pytest.importorskip("aiohttp")

from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512

from auth import _jwks
from auth.file import BACKEND as FILE
from auth.jwt import BACKEND, JwtConfig
from broker.access.breaker import PAUSE
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from tests.integration.auth_harness import (
    LOGINS,
    allowed,
    cancelled_and_interleaved,
    example,
    instance,
    isthmus,
    logins,
    opened,
    recovers,
)
from tests.integration.http_service import Service, service
from tests.servers import PATIENCE, Certificates

DENY, IGNORE = Verdict.DENY, Verdict.IGNORE
SECRET = "0123456789abcdef0123456789abcdef"
HASHES = {"256": SHA256(), "384": SHA384(), "512": SHA512()}
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(data: bytes, algorithm: str, key: Any) -> bytes:
    """By hand, so that what is wrong can be signed too."""
    if algorithm.startswith("HS"):
        return hmac.new(key, data, f"sha{algorithm[2:]}").digest()
    if isinstance(key, rsa.RSAPrivateKey):
        kind = HASHES[algorithm[2:]]
        pad = padding.PSS(padding.MGF1(kind), kind.digest_size) if algorithm[0] == "P" else padding.PKCS1v15()
        return key.sign(data, pad, kind)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(HASHES[algorithm[2:]])))
        size = (key.curve.key_size + 7) // 8
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")
    return bytes(key.sign(data))


def token(claims: Any = None, algorithm: str = "HS256", key: Any = None, header: Any = None, **more: Any) -> bytes:
    """A token of alice's, good for a minute, unless told otherwise."""
    head = {"alg": algorithm, "typ": "JWT", **more} if header is None else header
    body = {"sub": "alice", "exp": int(time.time()) + 60} if claims is None else claims
    texts = [part if isinstance(part, str) else json.dumps(part) for part in (head, body)]
    signed = ".".join(b64(text.encode()) for text in texts)
    return f"{signed}.{b64(sign(signed.encode(), algorithm, SECRET.encode() if key is None else key))}".encode()


def good(**claims: Any) -> dict[str, Any]:
    return {"sub": "alice", "exp": int(time.time()) + 60, **claims}


def pem(key: Any, form: Any = serialization.PublicFormat.SubjectPublicKeyInfo) -> bytes:
    return bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def jwk(key: Any, kid: str = "k1", **more: Any) -> dict[str, Any]:
    """The public JWK of a private key."""
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        numbers = public.public_numbers()
        return {"kty": "RSA", "kid": kid, "n": number(numbers.n), "e": number(numbers.e), **more}
    if isinstance(public, ec.EllipticCurvePublicKey):
        point = public.public_numbers()
        x, y = b64(point.x.to_bytes(32, "big")), b64(point.y.to_bytes(32, "big"))
        return {"kty": "EC", "kid": kid, "crv": "P-256", "x": x, "y": y, **more}
    return {"kty": "OKP", "kid": kid, "crv": "Ed25519", "x": b64(public.public_bytes_raw()), **more}


@pytest.fixture
def rsa_table(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rsa.pem").write_bytes(pem(RSA))
    return {"public_key": str(tmp_path / "rsa.pem")}


async def ask(raw: dict[str, Any], presented: bytes, username: str = "alice", clientid: str = "c", **more: Any) -> Any:
    async with opened(BACKEND, raw) as backend:
        return await backend.authenticate(Client(clientid, username, "10.1.2.3", "", more), presented)


HMAC = {"secret": SECRET}


@pytest.mark.parametrize(
    ("key", "algorithm", "name"),
    [(RSA, f"{family}{bits}", "rsa") for family in ("RS", "PS") for bits in (256, 384, 512)]
    + [(EC, "ES256", "ec"), (ec.generate_private_key(ec.SECP384R1()), "ES384", "ec")]
    + [(ec.generate_private_key(ec.SECP521R1()), "ES512", "ec"), (ED, "EdDSA", "ed"), (ED, "Ed25519", "ed")],
)  # fmt: skip
async def test_every_algorithm_with_its_key_and_no_other(tmp_path: Path, key: Any, algorithm: str, name: str) -> None:
    (tmp_path / "key.pem").write_bytes(pem(key))
    raw = {"public_key": str(tmp_path / "key.pem")}
    assert isinstance(await ask(raw, token(algorithm=algorithm, key=key)), Grant)
    stranger = {"rsa": OTHER_RSA, "ec": ec.generate_private_key(getattr(key, "curve", ec.SECP256R1()))}.get(
        name, ed25519.Ed25519PrivateKey.generate()
    )
    assert isinstance(await ask(raw, token(algorithm=algorithm, key=stranger)), Refusal)
    signed, _, signature = token(algorithm=algorithm, key=key).rpartition(b".")
    assert isinstance(await ask(raw, signed + b"." + signature[:-4] + b"AAAA"), Refusal)
    other = {**raw, "algorithms": ["RS256" if algorithm != "RS256" else "RS512"]}
    if name == "rsa":
        assert isinstance(await ask(other, token(algorithm=algorithm, key=key)), Refusal)
    else:
        with pytest.raises(ValueError, match="none of which is wanted"):
            await ask(other, b"")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_shared_secrets(algorithm: str) -> None:
    granted = await ask(HMAC, token(algorithm=algorithm))
    assert isinstance(granted, Grant)
    assert granted.expires_at == pytest.approx(time.time() + 62, abs=2)
    assert isinstance(await ask(HMAC, token(algorithm=algorithm, key=b"x" * 32)), Refusal)
    encoded = {"secret": base64.b64encode(SECRET.encode()).decode(), "secret_base64": True}
    assert isinstance(await ask(encoded, token(algorithm=algorithm)), Grant)


async def test_what_is_no_token_is_for_the_next_backend() -> None:
    for password in (
        b"secret",
        b"a.b.c",
        b"a.b",
        b"",
        b"\xff\xfe",
        b"1.2.3.4.5",
        b"..",
        b'{"alg":"none"}',
        b"ey.ey.ey",
    ):
        assert await ask(HMAC, password) is IGNORE


def bare(header: Any, signature: str = "") -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return f"{b64(text.encode())}.{b64(json.dumps(good()).encode())}.{signature}".encode()


@pytest.mark.parametrize("kind", ["secret", "rsa"])
@pytest.mark.parametrize(
    "presented",
    [
        bare({"alg": "none"}), bare({"alg": "None"}), bare({"alg": "nOnE"}), bare({"alg": "NONE", "typ": "JWT"}),
        bare({"typ": "JWT"}), bare({"alg": ""}), bare({"alg": None}), bare({"alg": ["HS256"]}), bare({"alg": "HS256"}),
        bare({"alg": "RS256"}), bare({"alg": "none"}, "AAAA"), bare({"alg": "HS256"}, "AAAA"), bare({"alg": "HS256 "}),
        bare({"alg": "hs256"}, "AAAA"), bare({"alg": "dir"}, "AAAA"), bare({"alg": {"x": 1}}),
    ],
)  # fmt: skip
async def test_a26_no_algorithm_no_signature(rsa_table: dict[str, Any], kind: str, presented: bytes) -> None:
    """A-26: on no spelling of none."""
    assert isinstance(await ask(HMAC if kind == "secret" else rsa_table, presented), Refusal)


def confusions() -> list[bytes]:
    """Everything that is public about the keys, as somebody may try it as a shared secret."""
    texts = [
        pem(RSA), pem(RSA, serialization.PublicFormat.PKCS1), pem(EC), pem(ED),
        *(key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
          for key in (RSA, EC, ED)),
        *(key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
          for key in (RSA, EC, ED)),
        json.dumps(jwk(RSA)).encode(), json.dumps(jwk(ED)).encode(), ED.public_key().public_bytes_raw(),
    ]  # fmt: skip
    return texts + [t.strip() for t in texts] + [t.replace(b"\n", b"\r\n") for t in texts] + [b"", b"\0"]


@pytest.mark.parametrize("name", ["rsa", "ec", "ed"])
async def test_a27_a_public_key_is_no_shared_secret(tmp_path: Path, name: str) -> None:
    """A-27: in whatever form it is given: the key says which algorithms it is for."""
    key = {"rsa": RSA, "ec": EC, "ed": ED}[name]
    (tmp_path / "key.pem").write_bytes(pem(key))
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [jwk(key)]}))
    for raw in ({"public_key": str(tmp_path / "key.pem")}, {"jwks": str(tmp_path / "jwks.json")}):
        async with opened(BACKEND, raw) as backend:
            for secret in confusions():
                for algorithm in ("HS256", "HS384", "HS512"):
                    for more in ({}, {"kid": "k1"}):
                        forged = token(algorithm=algorithm, key=secret, **more)
                        answer = await backend.authenticate(Client("c", "alice"), forged)
                        assert isinstance(answer, Refusal)


@pytest.mark.parametrize("text", [pem(RSA), pem(EC), pem(ED), json.dumps(jwk(RSA)).encode()])
async def test_a27_a_public_key_is_refused_as_a_secret(text: bytes) -> None:
    with pytest.raises(ValueError, match="secret: "):
        await ask({"secret": text.decode()}, b"")


async def test_a28_keys_and_addresses_in_a_token_mean_nothing(rsa_table: dict[str, Any]) -> None:
    """A-28: nobody is asked for them, and a key id only chooses among ours."""
    async with service(lambda request, body: web.json_response({"keys": [jwk(OTHER_RSA)]})) as evil:
        async with opened(BACKEND, rsa_table) as backend:
            for more in (
                {"jwk": jwk(OTHER_RSA)}, {"jku": f"{evil.url}/jwks"}, {"x5u": f"{evil.url}/cert"},
                {"x5c": [b64(pem(OTHER_RSA))]}, {"kid": "../../etc/passwd"}, {"kid": "' OR 1=1 --"},
                {"kid": "k" * 7_000}, {"kid": ["k1"]}, {"kid": {"$ne": 1}}, {"kid": f"{evil.url}/k"}, {"kid": "\0"},
            ):  # fmt: skip
                forged = token(algorithm="RS256", key=OTHER_RSA, **more)
                assert isinstance(await backend.authenticate(Client("c", "alice"), forged), Refusal)
            assert evil.seen == [], "nobody was asked"
            for more in ({"jku": f"{evil.url}/jwks"}, {"jwk": jwk(OTHER_RSA)}, {"kid": "anything"}):
                honest = token(algorithm="RS256", key=RSA, **more)
                assert isinstance(await backend.authenticate(Client("c", "alice"), honest), Grant)
            assert evil.seen == []
        huge = token(algorithm="RS256", key=OTHER_RSA, kid="k" * 1_000_000)
        assert isinstance(await ask(rsa_table, huge), Refusal)


class Provider:
    """An identity provider with keys that can be rotated."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = [jwk(RSA)]
        self.status = 200

    def __call__(self, request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"keys": self.keys}, status=self.status)


@pytest.fixture
async def provider() -> AsyncIterator[tuple[Provider, Service]]:
    made = Provider()
    async with service(made) as http:
        yield made, http


def remote(http: Any, **more: Any) -> dict[str, Any]:
    return {"jwks_url": f"http://127.0.0.1:{http.port}/jwks", "timeout": 5, **more}


async def test_a29_unknown_key_ids_cause_one_request(provider: tuple[Provider, Service]) -> None:
    """A-29: 10,000 random key ids, with the provider up and then failing: the known keys stay in use."""
    keys, http = provider
    honest = token(algorithm="RS256", key=RSA, kid="k1")
    began = time.monotonic()
    async with opened(BACKEND, remote(http)) as backend:
        assert isinstance(await backend.authenticate(Client("c", "alice"), honest), Grant)
        for status in (200, 500):
            keys.status = status
            for start in range(0, 5_000, 100):
                forged = [
                    token(header={"alg": "RS256", "kid": f"x{start + n}"}, key=SECRET.encode()) for n in range(100)
                ]
                answers = await asyncio.gather(*(backend.authenticate(Client("c", "alice"), f) for f in forged))
                assert all(isinstance(answer, Refusal) for answer in answers)
            assert isinstance(await backend.authenticate(Client("c", "alice"), honest), Grant)
        assert len(http.seen) <= 1 + (time.monotonic() - began) // _jwks.REFETCH


async def test_a29_a_new_key_is_found_after_the_pause_and_an_old_one_is_gone(
    provider: tuple[Provider, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, http = provider
    old, new = token(algorithm="RS256", key=RSA, kid="k1"), token(algorithm="EdDSA", key=ED, kid="k2")
    async with opened(BACKEND, remote(http)) as backend:
        clock = SimpleNamespace(now=1_000.0)
        monkeypatch.setattr(backend._keys, "_clock", lambda: clock.now)
        assert isinstance(await backend.authenticate(Client("c", "alice"), old), Grant)
        keys.keys = [jwk(ED, "k2")]
        clock.now += _jwks.REFETCH - 1
        assert isinstance(await backend.authenticate(Client("c", "alice"), new), Refusal)
        assert len(http.seen) == 1
        clock.now += 2
        answers = await asyncio.gather(*(backend.authenticate(Client("c", "alice"), new) for _ in range(20)))
        assert all(isinstance(answer, Grant) for answer in answers)
        assert len(http.seen) == 2
        assert isinstance(await backend.authenticate(Client("c", "alice"), old), Refusal)


async def test_a_token_is_judged_at_once_when_its_key_is_at_hand(
    provider: tuple[Provider, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only who needs a key that was not fetched yet waits, and nobody waits for keys that are fetched again."""
    keys, http = provider
    old, new = token(algorithm="RS256", key=RSA, kid="k1"), token(algorithm="EdDSA", key=ED, kid="k2")
    alice = Client("c", "alice")
    async with opened(BACKEND, remote(http)) as backend:
        clock = SimpleNamespace(now=1_000.0)
        monkeypatch.setattr(backend._keys, "_clock", lambda: clock.now)
        assert backend.at_once(alice, old) is None
        assert backend.at_once(alice, b"a password") is IGNORE
        assert isinstance(await backend.authenticate(alice, old), Grant)
        assert isinstance(backend.at_once(alice, old), Grant)
        assert isinstance(backend.at_once(alice, token(algorithm="RS256", key=OTHER_RSA, kid="k1")), Refusal)
        assert isinstance(backend.at_once(alice, new), Refusal), "it was fetched a moment ago"
        keys.keys.append(jwk(ED, "k2"))
        clock.now += _jwks.REFETCH
        assert backend.at_once(alice, new) is None
        assert isinstance(await backend.authenticate(alice, new), Grant)
        clock.now += 301
        assert isinstance(backend.at_once(alice, old), Grant)
        assert len(http.seen) == 2
        async with asyncio.timeout(5):
            while len(http.seen) < 3:  # noqa: ASYNC110 (it is fetched behind our back)
                await asyncio.sleep(0.01)
    async with logins(instance(BACKEND, HMAC)) as log:
        assert log.start("alice", token(), "c").code == 0, "before the call returns"
        assert log.start("bob", token(), "c").code == 0x86


async def test_a30_no_keys_no_login_and_recovery(provider: tuple[Provider, Service], start_proxy: Any) -> None:
    """A-30: tokens are refused until there are keys, and those once known stay."""
    _, http = provider
    proxy = await start_proxy(http.port)
    await proxy.down()
    honest = token(algorithm="RS256", key=RSA, kid="k1")
    async with logins(instance(BACKEND, remote(proxy))) as log:
        assert (await log("alice", honest, "c0")).code == 0x88
        assert (await log("alice", b"password", "c1")).code == 0x86, "who has no token is not kept waiting"
        await proxy.up()
        await recovers(log, "alice", honest, "jwt")
        assert 0.9 * PAUSE > _jwks.RETRY, "the breaker's one call in between asks for them"
        await proxy.down()
        assert (await log("alice", honest, "e")).code == 0, "the keys stay"


async def test_a30_a_black_hole_at_the_start(provider: tuple[Provider, Service], start_proxy: Any) -> None:
    proxy = await start_proxy(provider[1].port)
    proxy.black_hole = True
    async with opened(BACKEND, remote(proxy, timeout=0.5)) as backend:
        presented = token(algorithm="RS256", key=RSA)
        for verb in (backend.authenticate(Client("c", "alice"), presented), backend.check()):
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                await verb
            assert time.monotonic() - began < 0.5 + 4 * PATIENCE
    assert proxy.counts.swallowed > 0


async def test_a30_keys_come_over_tls_that_is_verified(certs: Certificates) -> None:
    honest = token(algorithm="RS256", key=RSA, kid="k1")
    async with service(Provider(), certs) as https:
        raw = {"jwks_url": f"{https.url}/jwks", "timeout": 2}
        assert isinstance(await ask({**raw, "ca": str(certs.ca)}, honest), Grant)
        for wrong in ({}, {"ca": str(certs.stranger_ca)}):
            with pytest.raises(BackendUnavailable, match="not trusted"):
                await ask({**raw, **wrong}, honest)


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=302, headers={"Location": "/elsewhere"}), web.Response(text="<html>"),
        web.json_response({}), web.json_response([]), web.json_response({"keys": []}), web.json_response({"keys": 7}),
        web.json_response({"keys": [{"kty": "oct", "k": b64(SECRET.encode()), "kid": "k1"}]}),
        web.json_response({"keys": [jwk(RSA)] * 101}), web.json_response({"keys": [{**jwk(RSA), "use": "enc"}]}),
        web.Response(body=b'{"keys": [' + b" " * (300 << 10) + b"]}", content_type="application/json"),
    ],
)  # fmt: skip
async def test_sets_of_keys_that_are_none(answer: web.Response) -> None:
    async def answers(request: web.Request, body: bytes) -> web.StreamResponse:
        if request.path == "/elsewhere":
            return web.json_response({"keys": [jwk(RSA)]})
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    async with service(answers) as http, opened(BACKEND, remote(http)) as backend:
        for presented in (token(algorithm="RS256", key=RSA, kid="k1"), token(kid="k1")):
            with pytest.raises(BackendUnavailable):
                await backend.authenticate(Client("c", "alice"), presented)
        assert len(http.seen) == 1


NOW = time.time


@pytest.mark.parametrize(
    ("claims", "say"),
    [
        (lambda: {"sub": "alice"}, "does not say when it ends"),
        (lambda: good(exp=None), "no time"),
        (lambda: good(exp="9999999999"), "no time"),
        (lambda: good(exp=True), "no time"),
        (lambda: good(exp=-1), "no time"),
        (lambda: good(exp=[NOW() + 60]), "no time"),
        (lambda: '{"sub": "alice", "exp": 1e400}', "no time"),
        (lambda: '{"sub": "alice", "exp": NaN}', "no time"),
        (lambda: '{"sub": "alice", "exp": Infinity}', "no time"),
        (lambda: good(exp=NOW() - 2.1), "expired"),
        (lambda: good(exp=0), "expired"),
        (lambda: good(nbf=NOW() + 5), "not good yet"),
        (lambda: good(nbf="1"), "no time"),
        (lambda: good(nbf=True), "no time"),
        (lambda: good(iat="yesterday"), "no time"),
        (lambda: good(iss="https://id.example"), "issuer"),
        (lambda: good(iss="https://id.example.co"), "issuer"),
        (lambda: good(iss="https://id.example.com/"), "issuer"),
        (lambda: good(iss=["https://id.example.com"]), "issuer"),
        (lambda: good(iss=None), "issuer"),
        (lambda: good(iss="https://id.example.com"), "audience"),
        (lambda: good(iss="https://id.example.com", aud="mqt"), "audience"),
        (lambda: good(iss="https://id.example.com", aud={"mqtt": 1}), "audience"),
        (lambda: good(iss="https://id.example.com", aud=["MQTT", 1]), "audience"),
        (lambda: [good()], "JSON object"),
        (lambda: '"alice"', "JSON object"),
        (lambda: "{" * 3_000, "JSON"),
        (lambda: "[" * 5_000, "JSON"),
    ],
)  # fmt: skip
async def test_a31_claims_that_are_not_good(claims: Callable[[], Any], say: str) -> None:
    """A-31: each is refused, with the reason for the operator."""
    raw = {**HMAC, "issuer": "https://id.example.com", "audience": ["mqtt", "other"]}
    answer = await ask(raw, token(claims()))
    assert isinstance(answer, Refusal)
    assert say in answer.reason


async def test_a31_claims_that_are_good_and_the_edges_of_the_leeway() -> None:
    raw = {**HMAC, "issuer": "https://id.example.com", "audience": ["mqtt"]}
    base = {"iss": "https://id.example.com", "aud": "mqtt"}
    assert JwtConfig.model_fields["leeway"].default == 2
    for more in ({}, {"aud": ["x", "mqtt"]}, {"nbf": 0, "iat": 1.5}):
        assert isinstance(await ask(raw, token(good(**{**base, **more}))), Grant)
    for leeway, early, late in ((10, 9, 4), (60, 59, 54)):
        lenient = {**raw, "leeway": leeway}
        assert isinstance(await ask(lenient, token(good(**base, nbf=NOW() + early))), Grant)
        assert isinstance(await ask(lenient, token(good(**{**base, "exp": NOW() - late}))), Grant)
    assert isinstance(await ask({**HMAC, "leeway": 0}, token(good(exp=NOW() - 0.1))), Refusal)
    assert isinstance(await ask({**HMAC, "require_expiry": False}, token({"sub": "alice"})), Grant)
    with pytest.raises(ValidationError):
        JwtConfig.model_validate({**HMAC, "leeway": 61})
    far = await ask(HMAC, token(good(exp=1e300)))
    assert far.expires_at < NOW() + 11 * 365 * 86_400


@pytest.mark.parametrize(
    "header", [{"crit": ["exp"], "exp": 1}, {"crit": ["b64"], "b64": False}, {"crit": []}, {"crit": 1}]
)
async def test_a31_an_extension_nobody_knows_is_refused(header: dict[str, Any]) -> None:
    assert isinstance(await ask(HMAC, token(**header)), Refusal)


async def test_a32_what_is_encrypted_or_too_long_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A-32: no compression, no iterations."""
    decoded: list[Any] = []

    def signed(*arguments: Any) -> bool:
        decoded.append(arguments)
        return True

    monkeypatch.setattr("auth.jwt._signed", signed)
    parts = [b64(json.dumps(h).encode()) for h in (
        {"alg": "dir", "enc": "A256GCM", "zip": "DEF"}, {"alg": "PBES2-HS256+A128KW", "enc": "A128GCM", "p2c": 10**9},
    )]  # fmt: skip
    for part in parts:
        for presented in (f"{part}..aaaa.bbbb.cccc", f"{part}.aaaa.aaaa.bbbb.cccc"):
            assert isinstance(await ask(HMAC, presented.encode()), Refusal)
    for size in (8_193, 16_385, 60_000):
        long = token(good(pad="x" * size))
        assert isinstance(await ask(HMAC, long), Refusal)
        if size > 16_384:
            assert isinstance(await ask({**HMAC, "max_token": "16KB"}, long), Refusal)
    assert decoded == []


@pytest.mark.parametrize("presented", ["{} ", "{}=", "{}==", " {}", "{}\n", "{}.", "{}.x", "{}+", "Bearer {}"])
async def test_forms_that_are_not_the_compact_one(presented: str) -> None:
    answer = await ask(HMAC, presented.format(token().decode()).encode())
    assert not allowed(answer)


async def test_a33_a_client_is_disconnected_when_its_token_ends() -> None:
    """Also when the verdict came from the cache."""
    async with logins(instance(BACKEND, {**HMAC, "leeway": 0})) as log:
        kicked: list[Any] = []
        log.gate.kick = lambda clientid, code: kicked.append((clientid, code, time.time()))
        ends = time.time() + 4
        presented = token(good(exp=ends, acl={"pub": ["a/#"]}))
        first = await log("alice", presented, "c1")
        await asyncio.sleep(0.3)
        again = await log("alice", presented, "c1")
        assert first.code == again.code == 0
        assert log.gate.guard("jwt").calls == 1, "from the cache"
        assert log.gate.may_publish(again.principal, "a/b") == 1
        async with asyncio.timeout(max(0.0, ends - time.time()) + 3 * PATIENCE):
            while len(kicked) < 2:  # noqa: ASYNC110 (the gate does not tell)
                await asyncio.sleep(0.01)
        assert [(c, code) for c, code, _ in kicked] == [("c1", 0x87)] * 2
        assert all(0 <= at - ends < 3 * PATIENCE for *_, at in kicked)
        assert log.gate.may_publish(again.principal, "a/b") == 0
        assert (await log("alice", presented, "c2")).code == 0x86, "and does not come back with it"


async def test_a34_claims_belong_to_who_presents_them() -> None:
    """A-34: where the rule asks for it."""
    assert isinstance(await ask(HMAC, token(), username="bob"), Refusal), "sub is compared unless told otherwise"
    assert isinstance(await ask(HMAC, token(), username="Alice"), Refusal)
    raw = {**HMAC, "claims": {"client": "dev-${clientid}", "u": "${username}"}}
    assert isinstance(await ask(raw, token(good(client="dev-c", u="alice"))), Grant)
    for wrong in ({}, {"client": "dev-c"}, {"client": "dev-d", "u": "alice"}, {"client": ["dev-c"], "u": "alice"},
                  {"client": "dev-c", "u": True}, {"client": "dev-${clientid}", "u": "${username}"}):  # fmt: skip
        assert isinstance(await ask(raw, token(good(**wrong))), Refusal)
    assert isinstance(await ask({**HMAC, "claims": {"n": "1"}}, token(good(n=1))), Refusal), "a number is no text"
    raw = {**HMAC, "claims": {"cn": "${cert_common_name}"}}
    assert isinstance(await ask(raw, token(good(cn="x"))), Refusal), "nothing to compare with"
    assert isinstance(await ask(raw, token(good(cn="x")), cert_common_name="x"), Grant)
    assert isinstance(await ask({**HMAC, "claims": {}}, token(), username="bob"), Grant)


SHORT_RSA = rsa.generate_private_key(65537, 1024)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("public_key", pem(RSA)[:200]), ("public_key", b""), ("public_key", b"\0" * 100),
        ("public_key", SECRET.encode()),
        ("public_key", pem(SHORT_RSA)), ("public_key", pem(ec.generate_private_key(ec.SECP256K1()))),
        ("public_key", pem(RSA).replace(b"A", b"B")), ("jwks", b""), ("jwks", b"{}"), ("jwks", b"[]"),
        ("jwks", b"\xff"),
        ("jwks", json.dumps({"keys": [jwk(SHORT_RSA)]}).encode()),
        ("jwks", json.dumps({"keys": [{"kty": "oct", "k": b64(b"short")}]}).encode()),
        ("jwks", json.dumps({"keys": [{**jwk(EC), "x": jwk(EC)["x"][:10]}]}).encode()),
        ("jwks", json.dumps({"keys": [{**jwk(EC), "y": jwk(EC)["x"]}]}).encode()),
        ("jwks", json.dumps({"keys": [{**jwk(ED), "x": "AAAA"}]}).encode()),
        ("jwks", json.dumps({"keys": [{**jwk(RSA), "n": ""}]}).encode()),
        ("jwks", json.dumps({"keys": [{**jwk(RSA), "n": 7}]}).encode()),
        ("jwks", json.dumps({"keys": [{**jwk(RSA), "alg": "HS256"}]}).encode()),
        ("jwks", json.dumps({"keys": [{**jwk(RSA), "kid": {"a": 1}}]}).encode()),
        ("jwks", json.dumps({"keys": ["x", None, 7, {}]}).encode()),
    ],
)  # fmt: skip
async def test_a35_damaged_keys_are_found_when_they_are_read(tmp_path: Path, key: str, text: bytes) -> None:
    """A-35: at the start, never at a login."""
    (tmp_path / "key").write_bytes(text)
    with pytest.raises(ValueError, match=key):
        await ask({key: str(tmp_path / "key")}, token())


@pytest.mark.parametrize("secret", ["short", "x" * 31, "not base64!" * 4])
async def test_a35_secrets_that_are_too_short_or_damaged(secret: str) -> None:
    with pytest.raises(ValueError, match="secret: ") as caught:
        await ask({"secret": secret, "secret_base64": "!" in secret}, token())
    assert secret not in str(caught.value)


async def test_a35_one_damaged_key_does_not_spoil_the_others(tmp_path: Path) -> None:
    keys = [{**jwk(EC, "bad"), "x": "AAAA"}, jwk(RSA, "k1", use="sig", alg="RS256"), jwk(ED, "k2", key_ops=["verify"])]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": keys}))
    raw = {"jwks": str(tmp_path / "jwks.json")}
    assert isinstance(await ask(raw, token(algorithm="RS256", key=RSA, kid="k1")), Grant)
    assert isinstance(await ask(raw, token(algorithm="EdDSA", key=ED, kid="k2")), Grant)
    assert isinstance(await ask(raw, token(algorithm="EdDSA", key=ED)), Grant), "without an id every key is tried"
    assert isinstance(await ask(raw, token(algorithm="RS512", key=RSA, kid="k1")), Refusal), "the key names another"
    assert isinstance(await ask(raw, token(algorithm="RS256", key=RSA, kid="k2")), Refusal)


async def test_a36_a_bad_token_is_final_although_another_backend_would_take_it(tmp_path: Path) -> None:
    """A-36: a password that is a token goes to nobody else; any other password does."""
    from broker.access.passwords import hash_password

    bad = token(key=b"x" * 32)
    digest = hash_password(bad, "sha512-pbkdf2")
    plain = hash_password("plain", "sha512-pbkdf2")
    (tmp_path / "passwords").write_text(f"alice:{digest}\nbob:{plain}\n")
    accounts = instance(FILE, {"passwords": str(tmp_path / "passwords")}, "accounts")
    async with logins(instance(BACKEND, HMAC), accounts) as log:
        assert (await log("alice", bad, "c1")).code == 0x86
        assert (await log("bob", b"plain", "c2")).code == 0
        assert (await log("alice", token(), "c3")).code == 0
    async with logins(accounts) as log:
        assert (await log("alice", bad, "c1")).code == 0, "the other would have"


async def test_two_issuers_are_two_instances() -> None:
    one = {**HMAC, "issuer": "one", "other_issuer": "ignore"}
    two = {"secret": "y" * 32, "issuer": "two"}
    async with logins(instance(BACKEND, one, "one"), instance(BACKEND, two, "two")) as log:
        good_ones = {("one", SECRET), ("two", "y" * 32)}
        for issuer, key in [*good_ones, ("one", "y" * 32), ("two", SECRET), ("three", SECRET)]:
            code = 0 if (issuer, key) in good_ones else 0x86
            presented = token(good(iss=issuer), key=key.encode())
            assert (await log("alice", presented, f"{issuer}-{key[0]}")).code == code


async def test_rights_in_a_token() -> None:
    lists = {"pub": ["out/${username}/#", "x"], "sub": ["in/%c"], "all": ["both"], "fly": ["no"]}
    records = [
        {"permission": "deny", "action": "publish", "topic": "out/alice/secret"},
        {"permission": "allow", "action": "publish", "topic": "out/${username}/#"},
        {"permission": "allow", "action": "subscribe", "topics": ["in/${clientid}"]},
        {"permission": "allow", "action": "all", "topic": "both", "qos": "0,1,2"},
        {"permission": "allow", "action": "publish", "topic": "here", "ipaddress": "127.0.0.0/8"},
        {"permission": "allow", "action": "publish", "topic": "there", "ipaddress": "10.0.0.0/8"},
        {"permission": "allow", "action": "publish", "topic": "no", "retain": True},
    ]
    for acl in (lists, records):
        async with logins(instance(BACKEND, {**HMAC, "attributes": ["line"]})) as log:
            alice = (await log("alice", token(good(acl=acl, line="4", n=7)), "c1")).principal
            assert log.gate.may_publish(alice, "out/alice/x") == 1
            assert log.gate.may_publish(alice, "out/bob/x") == 0
            assert log.gate.may_subscribe(alice, "in/c1") == 1
            assert log.gate.may_subscribe(alice, "in/#") == 0
            assert log.gate.may_publish(alice, "both") == log.gate.may_subscribe(alice, "both") == 1
            assert log.gate.publishable(alice, "no") == (0b101010 if acl is records else 0)
            assert alice.attributes == {"line": "4"}
            if acl is records:
                assert log.gate.may_publish(alice, "out/alice/secret") == 0
                assert (log.gate.may_publish(alice, "here"), log.gate.may_publish(alice, "there")) == (1, 0)
    member = await ask({**HMAC, "groups_claim": "roles"}, token(good(roles=["operators", "night shift"])))
    assert member.groups == {"operators", "night shift"}
    assert (await ask(HMAC, token(good(groups=["operators"])))).groups == frozenset(), "no claim was named"
    none = await ask({**HMAC, "acl_claim": ""}, token(good(acl=lists)))
    assert none.rules == ()
    many = await ask(HMAC, token(good(acl={"pub": [f"t{n}" for n in range(1_001)]})))
    assert isinstance(many, Refusal)


@pytest.mark.parametrize(
    ("value", "superuser"),
    [(True, True), ("true", True), (1, True), ("1", True), (False, False), ("false", False), ("0", False), (" ", False),
     (0, False), (None, False), ([], False), ([True], False), ({}, False), ("yes", False), (1.0, False)],
)  # fmt: skip
async def test_z22_only_a_clear_yes_makes_a_superuser(value: Any, superuser: bool) -> None:
    granted = await ask(HMAC, token(good(is_superuser=value)))
    assert isinstance(granted, Grant)
    assert granted.superuser is superuser
    assert not (await ask({**HMAC, "superuser_claim": ""}, token(good(is_superuser=value)))).superuser


async def test_tokens_in_a_browsers_request() -> None:
    presented = token().decode()
    header, cookie = {**HMAC, "token_in": "header"}, {**HMAC, "token_in": "cookie", "cookie": "mqtt"}
    assert isinstance(await ask(header, b"x", ws_authorization=f"Bearer {presented}"), Grant)
    assert isinstance(await ask(header, b"x", ws_authorization=f"bearer  {presented} "), Grant)
    assert await ask(header, presented.encode(), ws_authorization="Basic eDp5") is IGNORE
    assert await ask(header, presented.encode()) is IGNORE
    assert isinstance(await ask(header, b"x", ws_authorization="Bearer nonsense"), Refusal)
    assert isinstance(await ask(cookie, b"x", ws_cookie=f"a=b; mqtt={presented}; c=d"), Grant)
    assert await ask(cookie, b"x", ws_cookie=f"jwt={presented}") is IGNORE
    assert isinstance(await ask(cookie, b"x", ws_cookie="mqtt=nonsense"), Refusal)


async def test_a_token_as_user_name_is_never_shown() -> None:
    presented = token()
    raw = {**HMAC, "token_in": "username"}
    assert isinstance(await ask(raw, b"x", username=presented.decode()), Grant)
    refused = await ask(raw, b"x", username=presented.decode() + "x")
    assert isinstance(refused, Refusal)
    assert presented.decode()[:40] not in refused.reason


@pytest.mark.parametrize(
    ("raw", "say"),
    [
        ({}, "exactly one"), ({"secret": SECRET, "jwks_url": "https://x/"}, "exactly one"),
        ({"secret": SECRET, "algorithms": ["none"]}, "none"), ({"secret": SECRET, "algorithms": ["HS1"]}, "HS1"),
        ({"jwks_url": "http://id.example.com/jwks"}, "allow_cleartext"), ({"jwks_url": "id.example.com"}, "not a URL"),
        ({"secret": SECRET, "claims": {"a": "${nope}"}}, "nope"),
        ({"secret": SECRET, "other_issuer": "ignore"}, "issuer"),
        ({"secret": SECRET, "max_token": "1MB"}, "max_token"), ({"secret": SECRET, "urll": 1}, "urll"),
    ],
)  # fmt: skip
def test_tables_that_cannot_work_are_refused(raw: dict[str, Any], say: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JwtConfig.model_validate(raw)
    assert say in str(caught.value)
    assert SECRET not in str(caught.value)


async def test_a42_cancelled_and_interleaved_logins(provider: tuple[Provider, Service], start_proxy: Any) -> None:
    """While the keys are fetched and afterwards."""
    proxy = await start_proxy(provider[1].port)
    proxy.delay = 0.01
    people = {
        f"dev{n}": token(good(sub=f"dev{n}", acl={"pub": [f"own/dev{n}"]}), algorithm="RS256", key=RSA, kid="k1")
        for n in range(20)
    }

    def right(name: str, answer: Grant) -> bool:
        return [rule.filter.text for rule in answer.rules if rule.filter is not None] == [f"own/{name}"]

    async with opened(BACKEND, remote(proxy)) as backend:
        judged, cancelled = await cancelled_and_interleaved(backend, people, right, count=LOGINS)
        assert backend._keys.fetches == 1
    assert judged > 300
    assert cancelled > 0


async def test_the_example_on_the_command_line(provider: tuple[Provider, Service], tmp_path: Path) -> None:
    keys, http = provider
    realm = "https://id.example.com/realms/plant"
    url = f"{realm}/protocol/openid-connect/certs"
    folder = example(tmp_path, "27-auth-jwt", (url, f"{http.url}/jwks"))
    assert (await asyncio.to_thread(isthmus, folder, "check", "--connect")).returncode == 0
    ask = ("auth", "test", "--user", "alice", "--client", "c1", "--publish")
    claims = good(iss=realm, aud="mqtt", acl={"pub": ["own/${username}/#"]})
    presented = token(claims, "RS256", RSA, kid="k1").decode()
    right = await asyncio.to_thread(isthmus, folder, *ask, "own/alice/x", stdin=f"{presented}\n")
    assert right.returncode == 0, right.stdout + right.stderr
    assert "the token is good, with 1 rules" in right.stdout
    assert presented not in right.stdout
    forged = token(claims, "RS256", OTHER_RSA, kid="k1").decode()
    wrong = await asyncio.to_thread(isthmus, folder, *ask, "own/alice/x", stdin=f"{forged}\n")
    assert wrong.returncode == 1
    assert "its signature is wrong" in wrong.stdout
    keys.status = 500
    down = await asyncio.to_thread(isthmus, folder, "check", "--connect")
    assert down.returncode != 0
    assert "answered with status 500" in down.stdout + down.stderr
