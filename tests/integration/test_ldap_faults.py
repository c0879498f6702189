"""Logins against a directory that does what no real one should."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from auth.ldap import LdapConfig, open_ldap
from broker.connectors.ldap_link import MAX_ANSWER
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from tests.integration.fake_ldap import FakeLdap, children, entry, reference, tlv
from tests.servers import PATIENCE

DENY, IGNORE = Verdict.DENY, Verdict.IGNORE


@pytest.fixture
async def fake() -> AsyncIterator[FakeLdap]:
    async with FakeLdap() as server:
        yield server


def config(fake: FakeLdap, **more: Any) -> LdapConfig:
    base = {
        "servers": [fake.url],
        "tls": "none",
        "bind_dn": "cn=svc",
        "bind_password": "svc-pw",
        "base_dn": "dc=x",
        "timeout": 5,
    }
    return LdapConfig.model_validate({**base, **more})


async def authenticate(fake: FakeLdap, username: str = "u", password: bytes = b"pw", **more: Any) -> Any:
    backend = await open_ldap(config(fake, **more))
    try:
        return await backend.authenticate(Client("c", username), password)
    finally:
        await backend.close()


async def test_a07_an_empty_password_is_not_even_sent(fake: FakeLdap) -> None:
    """A-07: although this directory would take it for a success."""
    for more in ({}, {"mode": "direct_bind", "user_dn": "uid=${username},dc=x"}):
        assert await authenticate(fake, password=b"", **more) is DENY
    assert fake.binds == []
    assert fake.connections == 0
    assert isinstance(await authenticate(fake, password="\u00ad".encode()), Grant), "this server lets everybody in"
    assert fake.binds[-1] == ("uid=u,dc=x", "\u00ad".encode()), "as it is, not prepared to nothing"


async def test_a_password_that_is_no_text_is_refused_and_is_no_failure(fake: FakeLdap) -> None:
    assert await authenticate(fake, password=b"\xff\xfe") is DENY
    assert fake.binds == []


async def test_a08_an_entry_without_a_name_is_refused(fake: FakeLdap) -> None:
    """A-08: and nobody is bound without a name."""
    for name in ("", " "):
        fake.found = [entry(name, uid="u")]
        assert await authenticate(fake) is DENY
    assert {name for name, _ in fake.binds} == {"cn=svc"}


@pytest.mark.parametrize(
    ("more", "say"),
    [
        ({"bind_password": ""}, "bind_password is empty"),
        ({"bind_dn": ""}, "without bind_dn"),
        ({"servers": ["ldap://ldap.example.com"]}, "allow_cleartext"),
        ({"servers": ["ldap://10.0.0.1:389"]}, "allow_cleartext"),
        ({"servers": []}, "servers"),
        ({"servers": ["http://x"]}, "ldap://HOST:PORT"),
        ({"servers": ["ldap://127.0.0.1:99999"]}, "ldap://HOST:PORT"),
        ({"tls": "maybe"}, "starttls"),
        ({"base_dn": ""}, "base_dn"),
        ({"user_filter": "(uid=x)"}, "placeholder"),
        ({"user_filter": "(uid=${nope})"}, "nope"),
        ({"user_filter": "((uid=${username})"}, "search filter"),
        ({"mode": "direct_bind"}, "user_dn"),
        ({"mode": "direct_bind", "user_dn": "${username}@corp", "base_dn": ""}, "base_dn"),
        ({"require_group": ["x"]}, "groups.x"),
        ({"groups": {"g": {"dn": "cn=g", "publish": ["ie#"]}}}, "ie#"),
        ({"groups": {"g": {"dn": "nonsense"}}}, "distinguished name"),
        ({"urll": "x"}, "urll"),
    ],
)  # fmt: skip
def test_tables_that_cannot_work_are_refused(more: dict[str, Any], say: str) -> None:
    base = {
        "servers": ["ldap://127.0.0.1"],
        "tls": "none",
        "bind_dn": "cn=svc",
        "bind_password": "hush",
        "base_dn": "dc=x",
    }
    with pytest.raises(ValidationError) as caught:
        LdapConfig.model_validate({**base, **more})
    assert say in str(caught.value)
    assert "hush" not in str(caught.value)


def test_cleartext_is_for_loopback_or_for_those_who_write_it() -> None:
    base = {"tls": "none", "base_dn": "dc=x"}
    for url in ("ldap://127.0.0.1", "ldap://localhost:3389", "ldap://[::1]:389", "ldaps://ldap.example.com"):
        LdapConfig.model_validate({**base, "servers": [url]})
    LdapConfig.model_validate({**base, "servers": ["ldap://ldap.example.com"], "allow_cleartext": True})
    LdapConfig.model_validate({"base_dn": "dc=x", "servers": ["ldap://ldap.example.com"]})


@pytest.mark.parametrize("name", ["*", "*)(uid=*", "x)(|(uid=*)", "a\\", "(", "\\2a", "a&b", "ü", "a" * 256])
async def test_a09_on_the_wire_the_name_is_one_value(fake: FakeLdap, name: str) -> None:
    """A-09: escaped as RFC 4515 says."""
    fake.found = []
    assert await authenticate(fake, name) is IGNORE
    ((tag, parts),) = fake.filters
    assert tag == 0xA3, "one equality match"
    assert parts == [(0x04, b"uid"), (0x04, name.encode())]


async def test_a09_names_that_are_not_looked_up(fake: FakeLdap) -> None:
    for name in ("a\0b", "a" * 257, "ü" * 200):
        assert await authenticate(fake, name) is DENY
    assert fake.connections == 0


@pytest.mark.parametrize(
    ("name", "dn"),
    [
        ("bob,ou=admins", r"uid=bob\,ou\=admins,dc=x"), ("#bob", r"uid=\#bob,dc=x"), (" bob ", r"uid=\ bob\ ,dc=x"),
        ("a+b", r"uid=a\+b,dc=x"), ('a"b', r"uid=a\"b,dc=x"), ("a;b", r"uid=a\;b,dc=x"), ("<b>", r"uid=\<b\>,dc=x"),
        ("a\\b", r"uid=a\\b,dc=x"), ("a\nb", r"uid=a\0ab,dc=x"), (" ", "uid=\\ ,dc=x"),
    ],
)  # fmt: skip
async def test_a10_on_the_wire_the_name_is_one_value(fake: FakeLdap, name: str, dn: str) -> None:
    """A-10: escaped as RFC 4514 says, below the base."""
    fake.bind = lambda dn, password: 49
    assert await authenticate(fake, name, mode="direct_bind", user_dn="uid=${username},dc=x") is DENY
    assert fake.binds == [(dn, b"pw")]


async def test_a10_a_name_with_nul_is_not_put_into_a_dn(fake: FakeLdap) -> None:
    """A-10: NUL can be escaped, but what comes behind it is not what a directory written in C compares."""
    for name in ("bob\0", "\0", "bob\0,ou=admins"):
        assert await authenticate(fake, name, mode="direct_bind", user_dn="uid=${username},dc=x") is DENY
    assert fake.connections == 0


async def test_a10_logon_names_hold_no_special_characters(fake: FakeLdap) -> None:
    options = {"mode": "direct_bind", "user_dn": "${username}@corp.example"}
    for name in ("a@other.example", "CORP\\bob", "a/b", "a,b", 'a"b', "a\0b"):
        assert await authenticate(fake, name, **options) is DENY
    assert fake.binds == []
    assert isinstance(await authenticate(fake, "u", **options), Grant)
    assert fake.binds == [("u@corp.example", b"pw")]


async def test_a11_nothing_two_or_elsewhere(fake: FakeLdap) -> None:
    """A-11: a referral is not followed, least of all with credentials."""
    async with FakeLdap() as elsewhere:
        fake.found = []
        assert await authenticate(fake) is IGNORE
        fake.found = [entry("uid=u,dc=x", uid="u"), entry("uid=u,dc=y", uid="u")]
        assert await authenticate(fake) is DENY
        fake.found, fake.search_code = [], 10
        assert await authenticate(fake) is IGNORE
        fake.found, fake.search_code = [reference(f"ldap://127.0.0.1:{elsewhere.port}/dc=y")], 0
        assert await authenticate(fake) is IGNORE
        fake.found = [reference(f"ldap://127.0.0.1:{elsewhere.port}/dc=y"), entry("uid=u,dc=x", uid="u")]
        assert isinstance(await authenticate(fake), Grant), "a reference beside the entry is left alone"
        assert elsewhere.connections == 0


async def test_a12_no_password_without_tls(fake: FakeLdap) -> None:
    """A-12: or there is no login."""
    for code in (0, 52):  # StartTLS answered with yes and then no TLS; refused
        fake.starttls_code = code
        with pytest.raises(BackendUnavailable):
            await authenticate(fake, tls="starttls", timeout=0.3)
    assert fake.binds == []
    assert set(fake.cleartext) <= {0x77, 0x16, 0x42}, "nothing but StartTLS requests were readable"


async def test_a13_searches_run_as_the_service_account_only(fake: FakeLdap) -> None:
    """A-13: over a pool of four, every other password wrong."""
    fake.bind = lambda dn, password: 0 if password in (b"svc-pw", b"pw") else 49
    backend = await open_ldap(config(fake, pool=4, timeout=10, groups={"g": {"dn": "cn=g,dc=x"}}, max_bind_failures=0))
    results = await asyncio.gather(
        *(backend.authenticate(Client("c", "u"), b"pw" if n % 2 else b"no") for n in range(100))
    )
    await backend.close()
    assert [isinstance(result, Grant) for result in results] == [bool(n % 2) for n in range(100)]
    assert set(fake.identities) == {"cn=svc"}
    assert fake.connections <= 8


@pytest.mark.parametrize("kind", ["bind", "search"])
async def test_a14_an_answer_that_does_not_come(fake: FakeLdap, kind: str) -> None:
    async def before(what: str) -> None:
        if what == kind:
            await asyncio.sleep(30)

    fake.before = before
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        await authenticate(fake, timeout=0.3)
    assert time.monotonic() - began < 0.3 + 4 * PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bind", "search"])
async def test_a14_the_deadline_as_it_is_shipped(fake: FakeLdap, kind: str) -> None:
    """A-14: an error after 3 s, from a directory that would answer after 30 s, and its connection is not used again."""

    async def before(what: str) -> None:
        if what == kind:
            await asyncio.sleep(30)

    fake.before = before
    backend = await open_ldap(LdapConfig.model_validate({**config(fake).model_dump(), "timeout": None}))
    try:
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=r"no answer in 3 s|no complete answer in time|timed out"):
            await backend.authenticate(Client("c", "u"), b"pw")
        assert 2.5 < time.monotonic() - began <= 3.0 + 2 * PATIENCE
        fake.before = None
        before_that = fake.connections
        assert isinstance(await backend.authenticate(Client("c", "u"), b"pw"), Grant)
        assert fake.connections > before_that
    finally:
        await backend.close()


async def test_a14_our_side_hangs_up(fake: FakeLdap) -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        gone.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    silent = FakeLdap()
    silent.port = server.sockets[0].getsockname()[1]
    with pytest.raises(BackendUnavailable):
        await authenticate(silent, timeout=0.3)
    async with asyncio.timeout(5):
        await gone.wait()
    server.close()


async def test_a14_an_answer_that_drips(fake: FakeLdap) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        try:
            for byte in tlv(0x30, b"x" * 1000):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    dripping = FakeLdap()
    dripping.port = server.sockets[0].getsockname()[1]
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        await authenticate(dripping, timeout=0.4)
    assert time.monotonic() - began < 0.4 + 4 * PATIENCE
    server.close()


async def test_a14_a_connection_lost_in_the_middle_of_an_answer(fake: FakeLdap) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(tlv(0x30, b"x" * 100)[:20])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    broken = FakeLdap()
    broken.port = server.sockets[0].getsockname()[1]
    with pytest.raises(BackendUnavailable):
        await authenticate(broken)
    server.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shape", ["one", "many", "endless"])
async def test_a14_an_answer_of_any_size_is_cut_off(fake: FakeLdap, shape: str) -> None:
    """A-14: a hundred megabytes, one at a time or without end."""
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        (_, request), *_ = children(await reader.read(1000))
        if shape == "many":
            piece = tlv(0x30, tlv(*children(request)[0]) + entry("uid=u,dc=x", uid="u" * 4_000)) * 25
        else:
            size = 100 << 20 if shape == "one" else (1 << 31) - 1
            piece = b"\x30\x84" + size.to_bytes(4, "big") + b"x" * 100_000
        try:
            for _ in range(2000):
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    huge = FakeLdap()
    huge.port = server.sockets[0].getsockname()[1]
    with pytest.raises(BackendUnavailable, match=f"larger than {MAX_ANSWER >> 20} MB"):
        await authenticate(huge, timeout=50, bind_dn="", bind_password="")
    server.close()
    assert sent < 64 << 20, "not much more than the limit and the kernel's buffers were taken"


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x30\x05\x02\x01\x01\x61\x00", b"\x30\x00", b"\x00" * 64]
)
async def test_an_answer_that_is_not_ldap(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    odd = FakeLdap()
    odd.port = server.sockets[0].getsockname()[1]
    with pytest.raises(BackendUnavailable):
        await authenticate(odd)
    server.close()


@pytest.mark.parametrize(("code", "verdict"), [(49, DENY), (53, DENY), (48, DENY), (32, DENY), (19, DENY)])
async def test_refusals_of_a_bind(fake: FakeLdap, code: int, verdict: Verdict) -> None:
    fake.bind = lambda dn, password: 0 if dn == "cn=svc" else code
    assert await authenticate(fake) is verdict


@pytest.mark.parametrize("code", [1, 2, 8, 10, 13, 51, 52, 80])
async def test_failures_of_a_bind_are_errors_not_refusals(fake: FakeLdap, code: int) -> None:
    fake.bind = lambda dn, password: 0 if dn == "cn=svc" else code
    with pytest.raises(BackendUnavailable):
        await authenticate(fake)


@pytest.mark.parametrize("code", [8, 13])
async def test_a_directory_that_wants_tls_says_so(fake: FakeLdap, code: int) -> None:
    fake.bind = lambda dn, password: code
    with pytest.raises(BackendUnavailable, match=r"only over TLS.*starttls"):
        await authenticate(fake)


async def test_a_base_that_is_not_there_is_an_error_and_no_unknown_user(fake: FakeLdap) -> None:
    fake.found, fake.search_code = [], 32
    with pytest.raises(BackendUnavailable, match=r"no entry 'dc=x'.*correct base_dn"):
        await authenticate(fake)
    for code in (0, 10, 32):
        fake.search_code = code
        backend = await open_ldap(config(fake))
        with pytest.raises(BackendUnavailable, match="correct base_dn"):
            await backend.check()
        await backend.close()


async def test_a_list_of_groups_that_is_cut_off_is_refused(fake: FakeLdap) -> None:
    """More values than a server gives at once: a group whose denial counts may be among the others."""
    groups = {"g": {"dn": "cn=g,dc=x", "publish": ["a"]}}
    options = {"nested_groups": "memberof", "groups": groups}
    fake.found = [entry("uid=u,dc=x", uid="u", memberOf=["cn=g,dc=x"])]
    assert isinstance(await authenticate(fake, **options), Grant)
    fake.found = [entry("uid=u,dc=x", **{"uid": "u", "memberOf": [], "memberOf;range=0-1499": ["cn=g,dc=x"]})]
    answer = await authenticate(fake, **options)
    assert isinstance(answer, Refusal)
    assert not answer.authorized


@pytest.mark.parametrize("mode", ["search_bind", "direct_bind"])
async def test_wrong_passwords_reach_the_directory_three_times(fake: FakeLdap, mode: str) -> None:
    fake.bind = lambda dn, password: 0 if password in (b"svc-pw", b"pw") else 49
    user_dn = {"user_dn": "uid=${username},dc=x"} if mode == "direct_bind" else {}
    backend = await open_ldap(config(fake, mode=mode, exact_name=False, **user_dn))

    async def login(name: str, password: bytes) -> Any:
        return await backend.authenticate(Client("c", name), password)

    try:
        for _ in range(3):
            for _ in range(2):
                assert await login("u", b"no") is DENY
            assert isinstance(await login("u", b"pw"), Grant), "which starts over"
        fake.binds.clear()
        for name in ("u", "U", "u "):
            assert await login(name, b"no") is DENY
        asked = len(fake.binds), len(fake.bases)
        for name, password in (("u", b"no"), ("U", b"no"), ("u", b"pw")):
            answer = await login(name, password)
            assert isinstance(answer, Refusal)
            assert answer.authorized, "0x86 for the client"
            assert "no" not in answer.reason.split()
        assert (len(fake.binds), len(fake.bases)) == asked, "nothing at all is asked"
        assert isinstance(await login("v", b"pw"), Grant)
    finally:
        await backend.close()


async def test_the_service_account_is_bound_once_a_connection(fake: FakeLdap) -> None:
    backend = await open_ldap(config(fake))
    for _ in range(5):
        assert isinstance(await backend.authenticate(Client("c", "u"), b"pw"), Grant)
    await backend.close()
    assert [name for name, _ in fake.binds].count("cn=svc") == 1
    assert fake.connections == 2
    with pytest.raises(BackendUnavailable, match="closed"):
        await backend.authenticate(Client("c", "u"), b"pw")


# --- compare ---------------------------------------------------------------------------------------------------------

COMPARE = {"mode": "compare"}


async def test_the_directory_compares_and_nobody_binds_as_the_user(fake: FakeLdap) -> None:
    """The value goes as it is, asked by the service account about the entry that was found."""
    odd = "p\\2aw*(ü".encode()
    fake.compare = lambda value: 6 if value == odd else 5
    assert isinstance(await authenticate(fake, password=odd, **COMPARE), Grant)
    assert await authenticate(fake, password=b"pw", **COMPARE) is DENY
    assert {name for name, _ in fake.binds} == {"cn=svc"}
    assert {one[:3] for one in fake.compared} == {("cn=svc", "uid=u,dc=x", "userPassword")}
    assert await authenticate(fake, password=b"pw", password_attribute="mqttPassword", **COMPARE) is DENY
    assert fake.compared[-1] == ("cn=svc", "uid=u,dc=x", "mqttPassword", b"pw")


@pytest.mark.parametrize(
    "password",
    [b"", b"\xff\xfe", b"{SSHA}AAAA", b" {ssha}AAAA", b"{}x", b"$2b$10$abc", b"$argon2id$v=19", b"{CRYPT}$6$x"],
)
async def test_what_is_empty_or_looks_like_a_stored_hash_is_never_compared(fake: FakeLdap, password: bytes) -> None:
    """A-07 for this mode; and a directory that compares letters would let in whoever stole the hash."""
    fake.compare = lambda value: 6
    assert await authenticate(fake, password=password, **COMPARE) is DENY
    assert fake.compared == []


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        (5, "deny"), (16, "deny"), (32, "deny"), (50, "right to compare"), (0, "result 0"), (18, "result 18"),
        (51, "result 51"), (80, "result 80"),
    ],
)  # fmt: skip
async def test_only_a_clear_yes_of_a_comparison_lets_anybody_in(fake: FakeLdap, code: int, ends: str) -> None:
    fake.compare = lambda value: code
    if ends == "deny":
        assert await authenticate(fake, **COMPARE) is DENY
    else:
        with pytest.raises(BackendUnavailable, match=ends):
            await authenticate(fake, **COMPARE)


async def test_who_is_not_found_is_not_compared(fake: FakeLdap) -> None:
    fake.compare = lambda value: 6
    fake.found = []
    assert await authenticate(fake, **COMPARE) is IGNORE
    fake.found = [entry("uid=u,dc=x", uid="u"), entry("uid=u,dc=y", uid="u")]
    assert await authenticate(fake, **COMPARE) is DENY
    fake.found = [entry(" ", uid="u")]
    assert await authenticate(fake, **COMPARE) is DENY
    assert fake.compared == []
    with pytest.raises(ValidationError, match="nobody binds"):
        config(fake, max_bind_failures=3, **COMPARE)
    with pytest.raises(ValidationError, match="needs one"):
        config(fake, password_attribute="", **COMPARE)
