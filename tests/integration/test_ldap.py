"""Logins against a real OpenLDAP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from auth.ldap import LdapConfig, open_ldap
from broker.access.explain import explain
from broker.access.gate import AccessGate
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from broker.extend.registry import Backend
from tests.integration.auth_harness import LOGINS, cancelled_and_interleaved, recovers
from tests.servers import PATIENCE, Certificates, Slapd
from tests.unit.access.doubles import Login, settings

DENY, IGNORE = Verdict.DENY, Verdict.IGNORE
Open = Callable[..., Awaitable[Any]]


def table(directory: Slapd, **more: Any) -> dict[str, Any]:
    """`[auth.ldap]` as in the example fragment."""
    groups = directory.groups_dn
    return {
        "servers": [directory.url], "tls": "none", "bind_dn": directory.admin_dn,
        "bind_password": directory.admin_password, "base_dn": directory.people_dn, "nested_groups": "walk",
        "groups": {
            "sensors": {
                "dn": f"cn=sensors,{groups}", "publish": ["telemetry/${username}/#", "line/${attr.departmentNumber}"],
                "subscribe": ["commands/${username}/#"],
            },
            "operators": {
                "dn": f"cn=Operators , {groups}", "publish": ["commands/#"], "subscribe": ["telemetry/#"],
                "deny_subscribe": ["telemetry/secret/#"],
            },
        },
        **more,
    }  # fmt: skip


@pytest.fixture
async def connect() -> AsyncIterator[Open]:
    """`backend = await connect(slapd, nested_groups="off")`"""
    opened: list[Any] = []

    async def connect(directory: Slapd, **more: Any) -> Any:
        backend = await open_ldap(LdapConfig.model_validate(table(directory, **more)))
        opened.append(backend)
        return backend

    yield connect
    for backend in opened:
        await backend.close()


@pytest.fixture
async def gate() -> AsyncIterator[Callable[..., Awaitable[Login]]]:
    """`log = await gate(slapd)`: an access gate in front of the directory."""
    gates: list[AccessGate] = []

    async def make(directory: Slapd, **more: Any) -> Login:
        made = AccessGate(configured(directory, **more))
        gates.append(made)
        await made.open()
        return Login(made)

    yield make
    for made in gates:
        await made.close()


def configured(directory: Slapd, **more: Any) -> SimpleNamespace:
    raw = table(directory, **more)
    instance = SimpleNamespace(
        name="ldap", kind="ldap", enabled=True, raw=raw, origin="conf.d/20-auth-ldap.toml:3", fingerprint="",
        config=LdapConfig.model_validate(raw).named("ldap"), backend=Backend("auth.ldap", LdapConfig, open_ldap),
    )  # fmt: skip
    return settings(instance)


def names(grant: Any) -> set[str]:
    assert isinstance(grant, Grant)
    return {rule.source.removeprefix("group ") for rule in grant.rules}


async def test_a_user_finds_its_rights(slapd: Slapd, gate: Any) -> None:
    log = await gate(slapd)
    alice = await log("alice", b"alice-pw", "c1")
    assert alice.code == 0
    may = log.gate
    assert may.may_publish(alice.principal, "telemetry/alice/t") == 1
    assert may.may_publish(alice.principal, "telemetry/bob/t") == 0
    assert may.may_publish(alice.principal, "line/line-1") == 1
    assert may.may_publish(alice.principal, "line/line-2") == 0
    assert may.may_subscribe(alice.principal, "commands/alice/#") == 1
    assert may.may_subscribe(alice.principal, "commands/+/x") == 0
    bob = await log("bob", b"bob-pw", "c2")
    assert may.may_subscribe(bob.principal, "telemetry/#") == 1
    assert may.may_receive(bob.principal, "telemetry/alice/t") == 1
    assert may.may_receive(bob.principal, "telemetry/secret/t") == 0  # Z-09
    dave = await log("dave", b"dave-pw", "c3")
    assert dave.code == 0
    assert may.may_publish(dave.principal, "telemetry/dave/t") == 0
    for username, password in (("alice", b"bob-pw"), ("nobody", b"alice-pw"), ("alice", b"alice-pw ")):
        assert (await log(username, password)).code == 0x86
    assert may.status()["ldap"]["state"] == "ok"


@pytest.mark.parametrize(("mode", "carol"), [("off", set()), ("walk", {"operators"}), ("memberof", {"operators"})])
async def test_groups_in_groups(slapd: Slapd, connect: Open, mode: str, carol: set[str]) -> None:
    backend = await connect(slapd, nested_groups=mode)
    assert names(await backend.authenticate(Client("c", "carol"), b"carol-pw")) == carol
    assert names(await backend.authenticate(Client("c", "bob"), b"bob-pw")) == {"operators"}
    assert names(await backend.rules(Client("c", "alice"))) == {"sensors"}


async def test_the_rule_of_active_directory_is_an_error_elsewhere(slapd: Slapd, connect: Open) -> None:
    backend = await connect(slapd, nested_groups="ad")
    with pytest.raises(BackendUnavailable, match="no Active Directory"):
        await backend.authenticate(Client("c", "alice"), b"alice-pw")


async def test_groups_that_contain_each_other_end(start_slapd: Any, connect: Open) -> None:
    directory = start_slapd()
    admin = directory.connect()
    admin.modify(
        f"cn=sensors,{directory.groups_dn}", {"member": [("MODIFY_ADD", [f"cn=operators,{directory.groups_dn}"])]}
    )
    admin.modify(
        f"cn=operators,{directory.groups_dn}", {"member": [("MODIFY_ADD", [f"cn=sensors,{directory.groups_dn}"])]}
    )
    admin.unbind()
    for mode in ("walk", "memberof"):
        backend = await connect(directory, nested_groups=mode)
        assert names(await backend.authenticate(Client("c", "alice"), b"alice-pw")) == {"sensors", "operators"}


async def test_a_required_group(slapd: Slapd, connect: Open, gate: Any) -> None:
    backend = await connect(slapd, require_group=["operators"])
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Refusal)
    assert names(await backend.authenticate(Client("c", "carol"), b"carol-pw")) == {"operators"}
    log = await gate(slapd, require_group=["operators"])
    assert (await log("alice", b"alice-pw")).code == 0x87
    assert (await log("alice", b"wrong")).code == 0x86


async def test_superusers_by_group(slapd: Slapd, connect: Open) -> None:
    groups = {"admins": {"dn": f"cn=night-shift,{slapd.groups_dn}", "superuser": True}}
    backend = await connect(slapd, groups=groups)
    assert (await backend.authenticate(Client("c", "carol"), b"carol-pw")).superuser
    assert not (await backend.authenticate(Client("c", "bob"), b"bob-pw")).superuser


async def test_direct_bind(slapd: Slapd, connect: Open) -> None:
    options = {"mode": "direct_bind", "user_dn": "uid=${username},ou=people,dc=example,dc=com"}
    backend = await connect(slapd, **options, bind_dn="", bind_password="")
    assert names(await backend.authenticate(Client("c", "carol"), b"carol-pw")) == {"operators"}
    grant = await backend.authenticate(Client("c", "alice"), b"alice-pw")
    assert grant.attributes["departmentnumber"] == "line-1"
    for username, password in (("alice", b"x"), ("nobody", b"x"), ("alice", b""), ("ALICE", b"alice-pw")):
        assert await backend.authenticate(Client("c", username), password) is DENY
    assert getattr(backend, "rules", None) is None, "nobody but the user can read them"


@pytest.mark.parametrize(
    "name", ["bob,ou=admins", "#bob", " zoe", "zoe ", "bob+cn=x", 'b"b', "b;b", "<bob>", "b\\b", "b=b"]
)
async def test_a10_a_name_in_a_dn_template_stays_a_value(connect: Open, name: str, slapd: Slapd) -> None:
    """The entry whose name holds the characters logs in: the DN arrived escaped and below the base."""
    admin = slapd.connect()
    rdn = "".join(f"\\{ord(c):02x}" if not c.isalnum() else c for c in name)
    dn = f"uid={rdn},{slapd.people_dn}"
    assert admin.add(dn, ["inetOrgPerson"], {"cn": "x", "sn": "x", "userPassword": "pw"}), admin.result
    try:
        backend = await connect(slapd, mode="direct_bind", user_dn="uid=${username},ou=people,dc=example,dc=com")
        assert isinstance(await backend.authenticate(Client("c", name), b"pw"), Grant)
        assert await backend.authenticate(Client("c", name), b"wrong") is DENY
        searching = await connect(slapd)
        assert isinstance(await searching.authenticate(Client("c", name), b"pw"), Grant), "A-09"
    finally:
        admin.delete(dn)
        admin.unbind()


@pytest.mark.parametrize(
    "name",
    ["*", "*)(uid=*", "x)(|(uid=*)", "a\\", "a%00b", "(", "al*", "alice)(objectClass=*", "\\2a", "a" * 4096, "a\0b"],
)
async def test_a09_a_name_never_becomes_part_of_the_filter(slapd: Slapd, connect: Open, name: str) -> None:
    backend = await connect(slapd)
    assert await backend.authenticate(Client("c", name), b"alice-pw") in (IGNORE, DENY)


async def test_a09_more_than_one_entry_is_refused(slapd: Slapd, connect: Open) -> None:
    backend = await connect(slapd, user_filter="(|(uid=${username})(objectClass=inetOrgPerson))", exact_name=False)
    assert await backend.authenticate(Client("c", "alice"), b"alice-pw") is DENY


async def test_a_name_spelled_otherwise_is_another_name(slapd: Slapd, connect: Open) -> None:
    backend = await connect(slapd)
    for name in ("Alice", "ALICE", "alice ", " alice"):
        assert await backend.authenticate(Client("c", name), b"alice-pw") in (DENY, IGNORE)
    lenient = await connect(slapd, exact_name=False)
    assert isinstance(await lenient.authenticate(Client("c", "Alice"), b"alice-pw"), Grant)


async def test_a05_a_user_without_a_password_never_logs_in(slapd: Slapd, connect: Open) -> None:
    """A-05: an entry for certificates alone."""
    admin = slapd.connect()
    dn = f"uid=certonly,{slapd.people_dn}"
    assert admin.add(dn, ["inetOrgPerson"], {"cn": "x", "sn": "x"})
    try:
        backend = await connect(slapd)
        for password in (b"", b"x", b"\0"):
            assert await backend.authenticate(Client("c", "certonly"), password) is DENY
    finally:
        admin.delete(dn)
        admin.unbind()


async def test_a07_a_directory_that_lets_empty_passwords_in_is_not_asked(start_slapd: Any, connect: Open) -> None:
    directory = start_slapd(extra="allow bind_anon_dn")
    for options in ({}, {"mode": "direct_bind", "user_dn": "uid=${username},ou=people,dc=example,dc=com"}):
        backend = await connect(directory, **options)
        assert await backend.authenticate(Client("c", "alice"), b"") is DENY
        assert await backend.authenticate(Client("c", "alice"), "\u00ad".encode()) is DENY, "nothing, once prepared"
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)


async def test_a08_a_wrong_service_password_is_an_error_that_does_not_show_it(slapd: Slapd, connect: Open) -> None:
    backend = await connect(slapd, bind_password="not-this-one")
    with pytest.raises(BackendUnavailable, match="service account") as caught:
        await backend.check()
    assert "not-this-one" not in str(caught.value)
    with pytest.raises(BackendUnavailable):
        await backend.authenticate(Client("c", "alice"), b"alice-pw")


async def test_a12_tls_is_verified(start_slapd: Any, connect: Open, certs: Certificates) -> None:
    """A-12: or there is no login."""
    directory = start_slapd(tls=certs)
    for url in (directory.url, directory.ldaps_url, directory.ldaps_url.replace("127.0.0.1", "localhost")):
        backend = await connect(directory, servers=[url], tls="starttls", ca=certs.ca)
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
        assert await backend.authenticate(Client("c", "alice"), b"wrong") is DENY
        await backend.check()
        for ca in (certs.stranger_ca, None):
            backend = await connect(directory, servers=[url], tls="starttls", ca=ca)
            with pytest.raises(BackendUnavailable, match=r"(?i)certificate"):
                await backend.authenticate(Client("c", "alice"), b"alice-pw")


async def test_a12_a_certificate_for_another_host(start_slapd: Any, connect: Open, certs: Certificates) -> None:
    directory = start_slapd(tls=certs)
    other = directory.url.replace("127.0.0.1", "127.0.0.2")
    ldaps = directory.ldaps_url.replace("127.0.0.1", "127.0.0.2")
    async with forwarder("127.0.0.2", directory.port), forwarder("127.0.0.2", int(ldaps.rpartition(":")[2])):
        for url in (other, ldaps):
            backend = await connect(directory, servers=[url], tls="starttls", ca=certs.ca)
            with pytest.raises(BackendUnavailable, match=r"(?i)certificate|mismatch"):
                await backend.authenticate(Client("c", "alice"), b"alice-pw")


class forwarder:
    """The same port on another loopback address."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.server: asyncio.Server | None = None

    async def __aenter__(self) -> None:
        self.server = await asyncio.start_server(self.serve, self.host, self.port)

    async def __aexit__(self, *_: object) -> None:
        assert self.server is not None
        self.server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
            except ConnectionError:
                pass
            finally:
                target.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))


async def test_a12_starttls_that_is_refused_sends_no_password(slapd: Slapd, connect: Open) -> None:
    backend = await connect(slapd, tls="starttls")  # this server has no certificate
    with pytest.raises(BackendUnavailable, match="TLS"):
        await backend.authenticate(Client("c", "alice"), b"alice-pw")


async def test_a13_parallel_logins_are_never_mixed_up(slapd: Slapd, connect: Open) -> None:
    """A-13: over a pool of four, every other password wrong."""
    backend = await connect(slapd, pool=4, timeout=30, max_bind_failures=0)

    async def one(number: int) -> tuple[Any, bool]:
        name = ("alice", "bob", "carol", "dave")[number % 4]
        good = number % 8 < 4
        password = f"{name}-pw" if good else "wrong"
        return await backend.authenticate(Client(f"c{number}", name), password.encode()), good

    expected = [{"sensors"}, {"operators"}, {"operators"}, set()]
    results = await asyncio.gather(*map(one, range(200)))
    for number, (answer, good) in enumerate(results):
        if good:
            assert names(answer) == expected[number % 4]
        else:
            assert answer is DENY


def _right(name: str, answer: Grant) -> bool:
    """Whether these are the rights of the user's own entry and groups."""
    return answer.attributes.get("uid") == name and names(answer) == ({"sensors"} if name in SENSORS else {"operators"})


SENSORS = {f"s{number}" for number in range(10)}
OPERATORS = {f"o{number}" for number in range(10)}


@pytest.mark.parametrize("mode", ["search_bind", "direct_bind"])
@pytest.mark.timeout(600)
async def test_a42_cancelled_and_interleaved_logins(
    start_slapd: Any, connect: Open, start_proxy: Any, mode: str
) -> None:
    """A-42: 10,000 in the long form, over a pool of eight and a network that is cut now and then: no verdict and no
    right is ever another's, and nothing is left of those that were cancelled."""
    directory = start_slapd()
    admin = directory.connect()
    for group, members in (("sensors", SENSORS), ("operators", OPERATORS)):
        for name in sorted(members):
            dn = f"uid={name},{directory.people_dn}"
            attributes = {"cn": "x", "sn": "x", "userPassword": f"{name}-pw"}
            assert admin.add(dn, ["inetOrgPerson"], attributes), admin.result
            assert admin.modify(f"cn={group},{directory.groups_dn}", {"member": [("MODIFY_ADD", [dn])]}), admin.result
    admin.unbind()
    proxy = await start_proxy(directory.port)
    people = {name: f"{name}-pw".encode() for name in sorted(SENSORS | OPERATORS)}
    way = {"user_dn": "uid=${username},ou=people,dc=example,dc=com", "bind_dn": "", "bind_password": ""}
    groups = {
        "sensors": {"dn": f"cn=sensors,{directory.groups_dn}", "publish": ["own/${attr.uid}"]},
        "operators": {"dn": f"cn=operators,{directory.groups_dn}", "publish": ["own/${attr.uid}"]},
    }
    backend = await connect(
        directory, servers=[f"ldap://127.0.0.1:{proxy.port}"], mode=mode, pool=8, timeout=20, groups=groups,
        **(way if mode == "direct_bind" else {}), max_bind_failures=0,
    )  # fmt: skip
    judged = cancelled = 0
    for start in range(0, LOGINS, 500):
        found = await cancelled_and_interleaved(backend, people, _right, count=500, seed=start)
        judged, cancelled = judged + found[0], cancelled + found[1]
        await proxy.cut()
    assert judged > LOGINS * 0.6
    assert cancelled > LOGINS / 10
    pool = backend._pool
    async with asyncio.timeout(5):
        while len(pool._links) > len(pool._service) + len(pool._users):  # noqa: ASYNC110 (threads end by themselves)
            await asyncio.sleep(0.01)
    assert len(pool._service) <= 8
    assert len(pool._users) <= 8


async def test_a_directory_compares_for_the_service_account(start_slapd: Any, connect: Open) -> None:
    """What it stores as text, it compares; what it hashed it does not find again, and its hash is no password."""
    directory = start_slapd()
    backend = await connect(directory, mode="compare")
    assert names(await backend.authenticate(Client("c", "carol"), b"carol-pw")) == {"operators"}
    assert names(await backend.rules(Client("c", "alice"))) == {"sensors"}
    for username, password in (("carol", b"alice-pw"), ("carol", b""), ("carol", b"CAROL-PW"), ("carol", b"carol-pw ")):
        assert await backend.authenticate(Client("c", username), password) is DENY
    assert await backend.authenticate(Client("c", "nobody"), b"x") is IGNORE
    stored = "{SSHA}" + base64.b64encode(hashlib.sha1(b"hashed-pwsalt").digest() + b"salt").decode()
    admin = directory.connect()
    dn = f"uid=hashed,{directory.people_dn}"
    assert admin.add(dn, ["inetOrgPerson"], {"cn": "x", "sn": "x", "userPassword": stored})
    assert admin.compare(dn, "userPassword", stored), "the directory would say yes"
    admin.unbind()
    for password in (b"hashed-pw", stored.encode()):
        assert await backend.authenticate(Client("c", "hashed"), password) is DENY


async def test_a14_a_directory_that_falls_silent(start_slapd: Any, gate: Any) -> None:
    directory = start_slapd()
    log = await gate(directory, timeout=2)
    client = await recovers(log, "alice", b"alice-pw", "ldap")
    directory.freeze()
    began = time.monotonic()
    assert (await log("bob", b"bob-pw")).code == 0x88
    assert time.monotonic() - began < 2 + 3 * PATIENCE
    assert (await log("alice", b"alice-pw", client)).code == 0, "cached"
    directory.thaw()
    await recovers(log, "bob", b"bob-pw", "ldap")


async def test_a15_a_directory_that_is_started_again(start_slapd: Any, gate: Any) -> None:
    """A-15: within 10 s, without a restart of ours."""
    directory = start_slapd()
    log = await gate(directory)
    assert (await log("alice", b"alice-pw", "c0")).code == 0
    directory.stop()
    assert (await log("bob", b"bob-pw", "c1")).code == 0x88
    for number in range(6):
        assert (await log("bob", b"bob-pw", f"d{number}")).code == 0x88
    assert log.gate.status()["ldap"]["state"] == "open"
    directory.start()
    await recovers(log, "bob", b"bob-pw", "ldap")


async def test_idle_connections_that_the_server_closed_are_replaced_without_an_error(
    start_slapd: Any, connect: Open
) -> None:
    directory = start_slapd()
    backend = await connect(directory)
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
    directory.stop()
    directory.start()
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)


async def test_the_next_server_is_asked_when_the_first_is_gone(
    slapd: Slapd, connect: Open, free_port: Callable[[], int]
) -> None:
    backend = await connect(slapd, servers=[f"ldap://127.0.0.1:{free_port()}", slapd.url])
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)


async def test_a_first_server_that_hangs_costs_half_the_time_once(
    slapd: Slapd, start_slapd: Any, start_proxy: Any, connect: Open
) -> None:
    silent = start_slapd()
    silent.freeze()
    proxy = await start_proxy(silent.port)
    backend = await connect(slapd, servers=[f"ldap://127.0.0.1:{proxy.port}", slapd.url], timeout=4)
    began = time.monotonic()
    assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
    assert 1.9 < time.monotonic() - began < 2 + 4 * PATIENCE
    assert isinstance(await backend.authenticate(Client("c", "bob"), b"bob-pw"), Grant)
    assert proxy.counts.accepted == 1, "it cools down"


async def test_rights_follow_the_directory(start_slapd: Any, gate: Any) -> None:
    directory = start_slapd()
    log = await gate(directory, refresh=0.001)
    kicked: list[Any] = []
    log.gate.kick = lambda clientid, code: kicked.append((clientid, code))
    dave = (await log("dave", b"dave-pw")).principal
    assert log.gate.may_publish(dave, "commands/x") == 0
    admin = directory.connect()
    member = f"uid=dave,{directory.people_dn}"
    admin.modify(f"cn=operators,{directory.groups_dn}", {"member": [("MODIFY_ADD", [member])]})
    await asyncio.sleep(0.002)
    await log.gate._refresher.run_due()
    assert log.gate.may_publish(dave, "commands/x") == 1
    admin.delete(member)
    admin.unbind()
    await asyncio.sleep(0.002)
    await log.gate._refresher.run_due()
    assert log.gate.may_publish(dave, "commands/x") == 0
    assert kicked == [("c", 0x87)]
    assert (await log("dave", b"dave-pw")).code == 0x86, "not from the cache"


async def test_auth_test_tells_the_steps(slapd: Slapd) -> None:
    told = await explain(
        configured(slapd), username="alice", password=b"alice-pw", clientid="c", publish="telemetry/alice/x"
    )
    text = "\n".join(told.lines)
    assert told.verdict == "allow"
    assert "(uid=alice) finds uid=alice,ou=people,dc=example,dc=com" in text
    assert "groups: sensors" in text
    assert "group sensors: allow publish telemetry/${username}/#: applies" in text
    assert "alice-pw" not in text
    told = await explain(configured(slapd), username="alice", password=b"x", clientid="c")
    assert told.verdict == "deny"
    assert any("wrong password" in line for line in told.lines)
