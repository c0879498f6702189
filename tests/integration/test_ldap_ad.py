"""Logins against a domain controller that speaks as Active Directory does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from auth.ldap import LdapConfig, open_ldap
from broker.access.explain import explain
from broker.access.gate import AccessGate
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict, take_notes
from broker.extend.registry import Backend
from tests.servers import AD_LOCKOUT, Samba
from tests.unit.access.doubles import Login, settings

DENY, IGNORE = Verdict.DENY, Verdict.IGNORE
ENABLED_USER = "(&(objectClass=user)(sAMAccountName=${username})(!(userAccountControl:1.2.840.113556.1.4.803:=2)))"
ANY_USER = "(&(objectClass=user)(sAMAccountName=${username}))"
Open = Callable[..., Awaitable[Any]]


def table(directory: Samba, **more: Any) -> dict[str, Any]:
    """`[auth.ldap]` for Active Directory: the search starts at the top, over StartTLS."""
    groups = directory.groups_dn
    return {
        "servers": [directory.url], "ca": directory.ca, "bind_dn": directory.service_dn,
        "bind_password": directory.service_password, "base_dn": directory.base_dn, "user_filter": ENABLED_USER,
        "nested_groups": "ad", "timeout": 10,
        "groups": {
            "sensors": {"dn": f"CN=sensors,{groups}", "publish": ["telemetry/${username}/#"]},
            "staff": {"dn": f"cn=Staff,{groups}", "subscribe": ["notices/#"]},
            "operators": {"dn": f"CN=operators,{groups}", "publish": ["commands/#"]},
        },
        **more,
    }  # fmt: skip


def upn(directory: Samba, **more: Any) -> dict[str, Any]:
    """The same without a service account: the user logs on as name@domain and reads its own groups."""
    direct = {"mode": "direct_bind", "user_dn": f"${{username}}@{directory.domain}", "bind_dn": "", "bind_password": ""}
    return table(directory, **direct, user_filter=ANY_USER, **more)


@pytest.fixture
async def connect() -> AsyncIterator[Open]:
    """`backend = await connect(table(samba))`"""
    opened: list[Any] = []

    async def connect(raw: dict[str, Any]) -> Any:
        backend = await open_ldap(LdapConfig.model_validate(raw))
        opened.append(backend)
        return backend

    yield connect
    for backend in opened:
        await backend.close()


def configured(raw: dict[str, Any]) -> SimpleNamespace:
    instance = SimpleNamespace(
        name="ldap", kind="ldap", enabled=True, raw=raw, origin="conf.d/20-auth-ldap.toml:3", fingerprint="",
        config=LdapConfig.model_validate(raw).named("ldap"), backend=Backend("auth.ldap", LdapConfig, open_ldap),
    )  # fmt: skip
    return settings(instance)


def names(grant: Any) -> set[str]:
    assert isinstance(grant, Grant), grant
    return {rule.source.removeprefix("group ") for rule in grant.rules}


async def login(backend: Any, name: str, password: str | None = None) -> Any:
    return await backend.authenticate(Client("c", name), (password or f"{name}-pw").encode())


async def test_a_user_logs_in_by_its_logon_name_and_finds_its_rights(samba: Samba) -> None:
    gate = AccessGate(configured(table(samba)))
    await gate.open()
    try:
        log = Login(gate)
        alice = await log("alice", b"alice-pw", "c1")
        assert alice.code == 0
        assert gate.may_publish(alice.principal, "telemetry/alice/t") == 1
        assert gate.may_publish(alice.principal, "telemetry/bob/t") == 0
        carol = await log("carol", b"carol-pw", "c2")
        assert gate.may_subscribe(carol.principal, "notices/#") == 1
        assert gate.may_publish(carol.principal, "commands/x") == 1
        for username, password in (("alice", b"bob-pw"), ("nobody", b"alice-pw"), ("disabled", b"disabled-pw")):
            assert (await log(username, password)).code == 0x86
    finally:
        await gate.close()


@pytest.mark.parametrize("mode", ["ad", "walk", "memberof"])
async def test_groups_in_groups_over_three_levels(samba: Samba, connect: Open, mode: str) -> None:
    backend = await connect(table(samba, nested_groups=mode))
    assert names(await login(backend, "carol")) == {"operators", "staff"}
    assert names(await login(backend, "bob")) == {"operators", "staff"}
    assert names(await login(backend, "alice")) == {"sensors"}
    assert names(await login(backend, "dave")) == set()
    assert names(await backend.rules(Client("c", "carol"))) == {"operators", "staff"}


async def test_without_nesting_only_direct_members_count(samba: Samba, connect: Open) -> None:
    backend = await connect(table(samba, nested_groups="off"))
    assert names(await login(backend, "bob")) == {"operators"}
    assert names(await login(backend, "carol")) == set()


async def test_the_primary_group_counts_and_the_groups_it_is_in(samba: Samba, connect: Open) -> None:
    groups = {
        "everybody": {"dn": f"CN=Domain Users,{samba.people_dn}", "publish": ["a"]},
        "built-in": {"dn": f"CN=Users,CN=Builtin,{samba.base_dn}", "publish": ["b"]},
        "guests": {"dn": f"CN=Domain Guests,{samba.people_dn}", "publish": ["c"]},
    }
    for raw in (table, upn):
        backend = await connect(raw(samba, groups=groups))
        assert names(await login(backend, "dave")) == {"everybody", "built-in"}
    strict = await connect(table(samba, groups=groups, require_group=["guests"]))
    assert isinstance(await login(strict, "dave"), Refusal)


async def test_direct_bind_by_user_principal_name(samba: Samba, connect: Open) -> None:
    backend = await connect(upn(samba))
    assert names(await login(backend, "carol")) == {"operators", "staff"}
    for name, password in (("alice", "wrong"), ("nobody", "x"), ("ALICE", "alice-pw"), ("TEST\\alice", "alice-pw")):
        assert await login(backend, name, password) is DENY
    domain = await connect(upn(samba) | {"user_dn": "TEST\\${username}"})
    assert names(await login(domain, "alice")) == {"sensors"}


async def test_attributes_of_the_entry_stand_in_topics(samba: Samba, connect: Open) -> None:
    groups = {"all": {"dn": f"CN=sensors,{samba.groups_dn}", "publish": ["line/${attr.departmentNumber}"]}}
    backend = await connect(table(samba, groups=groups))
    assert (await login(backend, "alice")).attributes["departmentnumber"] == "line-1"


@pytest.mark.parametrize(
    ("name", "code"), [("disabled", "533"), ("expired", "701"), ("renew", "773"), ("alice", "52e")]
)
async def test_every_refusal_is_one_answer_and_the_reason_is_for_the_operator(
    samba: Samba, connect: Open, name: str, code: str
) -> None:
    password = "wrong" if name == "alice" else f"{name}-pw"
    for raw in (table(samba, user_filter=ANY_USER), upn(samba)):
        backend = await connect(raw)
        notes = take_notes()
        assert await login(backend, name, password) is DENY
        assert f"data {code}" in "\n".join(notes)
    told = await explain(
        configured(table(samba, user_filter=ANY_USER)), username=name, password=password.encode(), clientid="c"
    )
    assert told.verdict == "deny"
    assert password not in "\n".join(told.lines).replace("wrong password", "")


async def test_the_documented_filter_does_not_even_find_disabled_users(samba: Samba, connect: Open) -> None:
    assert await login(await connect(table(samba)), "disabled") is IGNORE


async def test_referrals_of_a_search_from_the_top_are_left_alone(samba: Samba, connect: Open) -> None:
    admin = samba.connect()
    admin.search(samba.base_dn, "(sAMAccountName=alice)")
    assert any(item["type"] == "searchResRef" for item in admin.response), "there are some"
    admin.unbind()
    backend = await connect(table(samba))
    assert names(await login(backend, "alice")) == {"sensors"}
    assert await login(backend, "nobody") is IGNORE
    assert {link.place.host for link in backend._pool._links} == {samba.host}


async def test_a_password_without_tls_is_refused_and_the_error_says_what_to_do(samba: Samba, connect: Open) -> None:
    for raw in (table, upn):
        backend = await connect(raw(samba, tls="none"))
        with pytest.raises(BackendUnavailable, match=r"only over TLS.*starttls") as caught:
            await login(backend, "alice")
        assert samba.url in str(caught.value)
    backend = await connect(table(samba, tls="none"))
    with pytest.raises(BackendUnavailable, match=r"only over TLS"):
        await backend.check()


async def test_a12_tls_is_verified(samba: Samba, connect: Open) -> None:
    for url in (samba.url, samba.ldaps_url):
        backend = await connect(table(samba, servers=[url]))
        assert names(await login(backend, "alice")) == {"sensors"}
        await backend.check()
        for ca in (samba.stranger_ca, None):
            backend = await connect(table(samba, servers=[url], ca=ca))
            with pytest.raises(BackendUnavailable, match=r"(?i)certificate"):
                await login(backend, "alice")


async def test_a_search_without_a_service_account_is_an_error(samba: Samba, connect: Open) -> None:
    backend = await connect(table(samba, bind_dn="", bind_password=""))
    with pytest.raises(BackendUnavailable, match="bind_dn"):
        await login(backend, "alice")


@pytest.mark.parametrize("base", ["OU=nowhere,DC=test,DC=lan", "DC=elsewhere,DC=lan"])
async def test_a_wrong_base_is_found_by_the_check(samba: Samba, connect: Open, base: str) -> None:
    backend = await connect(table(samba, base_dn=base))
    with pytest.raises(BackendUnavailable, match="base_dn"):
        await backend.check()


async def test_a_device_with_an_old_password_does_not_lock_its_account(samba: Samba, connect: Open) -> None:
    """The directory locks after five wrong passwords; forty arrive at once and one after the other."""
    backend = await connect(table(samba))
    passwords = [f"old-{number}" for number in range(20)]
    at_once = await asyncio.gather(*(login(backend, "victim", password) for password in passwords))
    one_by_one = [await login(backend, "victim", password) for password in passwords]
    assert at_once.count(DENY) == 3
    assert all(isinstance(answer, Refusal) and answer.authorized for answer in one_by_one), "0x86 as well"
    admin = samba.connect()
    import ldap3

    admin.search(samba.people_dn, "(sAMAccountName=victim)", attributes=[ldap3.ALL_ATTRIBUTES])
    assert int(admin.response[0]["attributes"]["badPwdCount"][0]) == 3 < AD_LOCKOUT
    fresh = await connect(table(samba))
    assert isinstance(await login(fresh, "victim"), Grant), "not locked"

    unlimited = await connect(table(samba, max_bind_failures=0))
    for password in passwords[:AD_LOCKOUT]:
        assert await login(unlimited, "victim", password) is DENY
    notes = take_notes()
    assert await login(unlimited, "victim") is DENY, "now it is: the test can fail"
    assert "data 775" in "\n".join(notes)
    admin.modify(f"CN=victim,{samba.people_dn}", {"lockoutTime": [("MODIFY_REPLACE", ["0"])]})
    admin.unbind()
