"""What an entry of a real OpenLDAP says about its user: hashes, rights, its end; and what the password policy says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from pydantic import ValidationError

from auth._ldap_expiry import expiry_of, generalized_time
from auth.ldap import BACKEND, LdapConfig
from broker.access.explain import explain
from broker.access.passwords import hash_password
from broker.connectors.ldap import Entry
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from tests.integration.auth_harness import PEOPLE, NetworkSuite, instance, logins, opened
from tests.servers import PATIENCE, Certificates, Slapd, slapd
from tests.sql_servers import or_skip
from tests.unit.access.doubles import settings

DENY = Verdict.DENY
TEXT, FLAG, TIME = (f"SYNTAX 1.3.6.1.4.1.1466.115.121.1.{number}" for number in (15, 7, 24))
SCHEMA = "\n".join([
    f"attributetype ( 1.3.6.1.4.1.99999.1.{number} NAME '{name}' EQUALITY {match} {syntax} )"
    for number, (name, match, syntax) in enumerate([
        ("mqttPublishTopic", "caseExactMatch", TEXT), ("mqttSubscriptionTopic", "caseExactMatch", TEXT),
        ("mqttPubSubTopic", "caseExactMatch", TEXT), ("isEnabled", "booleanMatch", FLAG),
        ("isSuperuser", "booleanMatch", FLAG), ("ends", "generalizedTimeMatch", TIME),
    ], 1)
] + [
    "objectclass ( 1.3.6.1.4.1.99999.2.1 NAME 'mqttUser' AUXILIARY MAY ( mqttPublishTopic $ mqttSubscriptionTopic $ "
    "mqttPubSubTopic $ isEnabled $ isSuperuser $ ends ) )",
])  # fmt: skip
ATTRIBUTES = {
    "publish_attribute": "mqttPublishTopic", "subscribe_attribute": "mqttSubscriptionTopic",
    "all_attribute": "mqttPubSubTopic", "superuser_attribute": "isSuperuser", "enabled_attribute": "isEnabled",
    "expiry_attribute": "ends",
}  # fmt: skip


def table(directory: Slapd, **more: Any) -> dict[str, Any]:
    return {
        "servers": [directory.url], "tls": "none", "bind_dn": directory.admin_dn,
        "bind_password": directory.admin_password, "base_dn": directory.people_dn, **more,
    }  # fmt: skip


def connected(directory: Slapd, **more: Any) -> AbstractAsyncContextManager[Any]:
    return opened(BACKEND, table(directory, **more))


@contextmanager
def administrator(directory: Slapd) -> Iterator[Any]:
    connection = directory.connect()
    try:
        yield connection
    finally:
        connection.unbind()


def add(directory: Slapd, name: str, **attributes: Any) -> None:
    with administrator(directory) as admin:
        more = {"uid": name, "cn": name, "sn": name, **attributes}
        classes = ["inetOrgPerson", "mqttUser"] if attributes.keys() - {"userPassword"} else ["inetOrgPerson"]
        assert admin.add(f"uid={name},{directory.people_dn}", classes, more), admin.result


def change(directory: Slapd, name: str, **attributes: Any) -> None:
    with administrator(directory) as admin:
        values = {key: [("MODIFY_REPLACE", [value])] for key, value in attributes.items()}
        assert admin.modify(f"uid={name},{directory.people_dn}", values), admin.result


# --- hashes ----------------------------------------------------------------------------------------------------------


async def test_hashes_are_compared_here(start_slapd: Callable[..., Slapd]) -> None:
    directory = start_slapd()
    digest = base64.b64encode(hashlib.sha1(b"secret" + b"salt").digest() + b"salt").decode()
    stored = {
        "ssha": "{SSHA}" + digest, "argon": "{ARGON2}" + hash_password("secret"),
        "bcrypt": "{CRYPT}" + bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode(),
        "several": ["{SSHA}" + digest, "{ARGON2}" + hash_password("another")],
    }  # fmt: skip
    for name, value in stored.items():
        add(directory, name, userPassword=value)
    add(directory, "plain", userPassword="secret")
    add(directory, "unknown", userPassword="{SASL}secret")
    add(directory, "empty")
    async with connected(directory, mode="hash") as backend:
        await backend.check()
        for name in stored:
            assert isinstance(await backend.authenticate(Client("c", name), b"secret"), Grant), name
            assert await backend.authenticate(Client("c", name), b"wrong") is DENY, name
        assert isinstance(await backend.authenticate(Client("c", "several"), b"another"), Grant)
        for name in ("plain", "unknown", "empty"):
            assert await backend.authenticate(Client("c", name), b"secret") is DENY, name
            assert await backend.authenticate(Client("c", name), b"") is DENY, name
        assert await backend.authenticate(Client("c", "nobody"), b"secret") is Verdict.IGNORE


async def test_a_hash_that_may_not_be_read_lets_nobody_in_and_the_operator_sees_why(
    start_slapd: Callable[..., Slapd],
) -> None:
    directory = start_slapd(extra="access to attrs=userPassword by anonymous auth by * none\naccess to * by * read")
    add(directory, "ssha", userPassword="{SSHA}" + base64.b64encode(hashlib.sha1(b"secret").digest()).decode())
    anonymous = {"mode": "hash", "bind_dn": "", "bind_password": ""}
    async with connected(directory, **anonymous) as backend:
        assert await backend.authenticate(Client("c", "ssha"), b"secret") is DENY
    told = await explain(
        settings(instance(BACKEND, table(directory, **anonymous))), username="ssha", password=b"secret", clientid="c"
    )
    assert told.verdict == "deny"
    assert any("whoever searches may not read it" in line for line in told.lines)


# --- rights and ends of the entry itself -----------------------------------------------------------------------------


async def test_attributes_of_the_entry_are_rights(start_slapd: Callable[..., Slapd]) -> None:
    directory = start_slapd(extra=SCHEMA)
    add(
        directory, "device", userPassword="pw", mqttPublishTopic=["a/%u/#", "eq b/+"],
        mqttSubscriptionTopic="c/${clientid}", mqttPubSubTopic=["d", "wrong/#/filter"],
    )  # fmt: skip
    add(directory, "boss", userPassword="pw", isSuperuser="TRUE")
    add(directory, "clerk", userPassword="pw", isSuperuser="FALSE")
    groups = {"all": {"dn": f"cn=sensors,{directory.groups_dn}", "deny_publish": ["a/device/no"]}}
    with administrator(directory) as admin:
        member = [("MODIFY_ADD", [f"uid=device,{directory.people_dn}"])]
        assert admin.modify(f"cn=sensors,{directory.groups_dn}", {"member": member})
    made = instance(BACKEND, table(directory, groups=groups, **ATTRIBUTES))
    async with logins(made) as log:
        device, boss, clerk = [await log(name, b"pw", f"c-{name}") for name in ("device", "boss", "clerk")]
        may = log.gate
        topics = {"a/device/x": 1, "a/other/x": 0, "b/+": 1, "b/x": 0, "d": 1, "c/c-device": 0}
        assert {topic: may.may_publish(device.principal, topic) for topic in topics} == topics
        assert may.may_publish(device.principal, "a/device/no") == 0, "a group denies before the entry allows"
        assert [may.may_subscribe(device.principal, t) for t in ("c/c-device", "d", "a/device/x")] == [1, 1, 0]
        assert may.may_publish(boss.principal, "anything") == 1
        assert may.may_publish(clerk.principal, "anything") == 0, "Z-22"


async def test_a_user_that_is_shut_out_is_refused_and_disconnected(start_slapd: Callable[..., Slapd]) -> None:
    directory = start_slapd(extra=SCHEMA)
    add(directory, "device", userPassword="pw", isEnabled="TRUE")
    made = instance(BACKEND, table(directory, refresh=0.2, cache_ttl=0.0, **ATTRIBUTES))
    async with logins(made) as log:
        kicked: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        log.gate.kick = lambda clientid, code: kicked.put_nowait((clientid, code))
        live = await log("device", b"pw", "c1")
        assert live.code == 0
        change(directory, "device", isEnabled="FALSE")
        assert await asyncio.wait_for(kicked.get(), 5 * PATIENCE) == ("c1", 0x87)
        assert (await log("device", b"pw", "c2")).code == 0x86


async def test_an_account_that_ends_takes_its_clients_with_it(start_slapd: Callable[..., Slapd]) -> None:
    directory = start_slapd(extra=SCHEMA)
    add(directory, "guest", userPassword="pw", ends="20990101000000Z")
    add(directory, "gone", userPassword="pw", ends="20200101000000Z")
    add(directory, "stays", userPassword="pw")
    made = instance(BACKEND, table(directory, **ATTRIBUTES))
    async with logins(made) as log:
        kicked: asyncio.Queue[str] = asyncio.Queue()
        log.gate.kick = lambda clientid, code: kicked.put_nowait(clientid)
        assert (await log("gone", b"pw")).code == 0x87
        soon = datetime.now(UTC) + timedelta(seconds=5)
        change(directory, "guest", ends=f"{soon:%Y%m%d%H%M%SZ}")
        live = [await log(name, b"pw", name) for name in ("guest", "stays")]
        assert [channel.code for channel in live] == [0, 0]
        assert await asyncio.wait_for(kicked.get(), 10 * PATIENCE) == "guest"
        assert time.time() >= int(soon.timestamp())
        assert kicked.empty()
        assert (await log("guest", b"pw")).code == 0x87, "no verdict outlives it"


@pytest.mark.parametrize(
    ("name", "text", "at"),
    [
        ("accountExpires", "0", None), ("accountExpires", "9223372036854775807", None),
        ("accountExpires", "133485408000000000", 1_704_067_200.0), ("shadowExpire", "-1", None),
        ("shadowExpire", "19723", 1_704_067_200.0), ("ends", "20240101000000Z", 1_704_067_200.0),
        ("ends", "2024010101+0100", 1_704_067_200.0), ("ends", "20231231193000.5-0430", 1_704_067_200.0),
    ],
)  # fmt: skip
def test_ends_as_directories_write_them(name: str, text: str, at: float | None) -> None:
    assert expiry_of(Entry("cn=x", {name.lower(): [text.encode()]}), name) == at


@pytest.mark.parametrize("text", ["", "soon", "2024", "20241301000000Z", "20240101000000", "1e400", "\\x00"])
def test_an_end_that_cannot_be_read_is_none_that_is_far(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        generalized_time(text)
    for name in ("accountExpires", "shadowExpire", "ends"):
        with pytest.raises(ValueError, match=r".+"):
            expiry_of(Entry("cn=x", {name.lower(): [text.encode(), b"1"]}), name)
    assert expiry_of(Entry("cn=x", {}), "ends") is None


# --- the directory's password policy ---------------------------------------------------------------------------------

POLICY = """moduleload ppolicy
database mdb
suffix "dc=policy"
rootdn "cn=admin,dc=policy"
rootpw admin-pw
directory {folder}
overlay ppolicy
ppolicy_default "cn=default,dc=policy"
ppolicy_use_lockout
"""


async def test_what_the_password_policy_says_is_heard(start_slapd: Callable[..., Slapd], tmp_path: Path) -> None:
    directory = start_slapd(extra=POLICY.format(folder=tmp_path))
    import ldap3

    admin = ldap3.Connection(ldap3.Server(directory.url), "cn=admin,dc=policy", "admin-pw", auto_bind=True)

    def must(done: bool) -> None:
        assert done, admin.result

    must(admin.add("dc=policy", ["dcObject", "organization"], {"dc": "policy", "o": "x"}))
    policy = {
        "sn": "x", "pwdAttribute": "userPassword", "pwdLockout": "TRUE", "pwdMaxFailure": "2", "pwdMustChange": "TRUE",
        "pwdMaxAge": "3600", "pwdGraceAuthNLimit": "3",
    }  # fmt: skip
    must(admin.add("cn=default,dc=policy", ["person", "pwdPolicy"], policy))
    old = {"pwdChangedTime": "20200101000000Z"}
    for name, more in (("good", {}), ("locked", {}), ("reset", {"pwdReset": "TRUE"}), ("grace", old)):
        entry = {"uid": name, "cn": name, "sn": name, "userPassword": "pw"}
        must(admin.add(f"uid={name},dc=policy", ["inetOrgPerson"], entry))
        for key, value in more.items():
            relax = [("1.3.6.1.4.1.4203.666.5.12", True, None)]  # the overlay's own attributes
            controls = relax if key == "pwdChangedTime" else None
            must(admin.modify(f"uid={name},dc=policy", {key: [("MODIFY_REPLACE", [value])]}, controls))
    admin.unbind()
    raw = table(
        directory, bind_dn="cn=admin,dc=policy", bind_password="admin-pw", base_dn="dc=policy", max_bind_failures=0
    )

    async def told(name: str, password: str = "pw") -> tuple[str, bool]:
        async with opened(BACKEND, raw) as backend:
            result = await backend._pool.bind(f"uid={name},dc=policy", password.encode())
            answer = await backend.authenticate(Client("c", name), password.encode())
            return result.text, "in" if isinstance(answer, Grant) else answer.value if isinstance(
                answer, Verdict
            ) else ""

    assert await told("good") == ("accepted", "in")
    assert await told("reset") == ("the password must be changed first", DENY.value)
    text, answer = await told("grace")
    assert text == "accepted; expired, 2 logins are left"
    assert answer == "in"
    await told("locked", "wrong")
    text, answer = await told("locked")
    assert "the account is locked" in text
    assert answer == DENY.value


# --- over a network that fails ---------------------------------------------------------------------------------------


def through(place: Any, **more: Any) -> dict[str, Any]:
    """The table for a proxy in front of the fixture `server`."""
    return {
        "servers": [f"ldap://127.0.0.1:{place.port}"], "tls": "none", "bind_dn": Slapd.admin_dn,
        "bind_password": Slapd.admin_password, "base_dn": Slapd.people_dn, "timeout": 5,
        "max_bind_failures": 0, "publish_attribute": "mqttPublishTopic", **more,
    }  # fmt: skip


@pytest.fixture(scope="class")
def server() -> Iterator[Slapd]:
    with or_skip("slapd", slapd, extra=SCHEMA) as directory:
        for name, password in PEOPLE.items():
            add(directory, name, userPassword=password.decode(), mqttPublishTopic=f"own/{name}/#")
        yield directory


class TestNetwork(NetworkSuite):
    backend = BACKEND
    table = staticmethod(through)


# --- who the service account is --------------------------------------------------------------------------------------


def subject_of(certificate: Path) -> str:
    """As slapd names whoever shows it."""
    command = ["openssl", "x509", "-in", str(certificate), "-noout", "-subject", "-nameopt", "RFC2253"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("=")[2].strip()


async def test_the_service_account_may_be_a_certificate(start_slapd: Callable[..., Slapd], certs: Certificates) -> None:
    subject = subject_of(certs.client)
    extra = (
        "TLSVerifyClient try\naccess to attrs=userPassword by anonymous auth by * none\n"
        f'access to * by dn.exact="{subject}" read by * none'
    )
    directory = start_slapd(tls=certs, extra=extra)
    raw = {
        "servers": [f"ldap://localhost:{directory.port}"], "ca": str(certs.ca), "base_dn": directory.people_dn,
    }  # fmt: skip
    async with opened(BACKEND, {**raw, "certificate": str(certs.client), "key": str(certs.client_key)}) as backend:
        await backend.check()
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"alice-pw"), Grant)
        assert await backend.authenticate(Client("c", "alice"), b"wrong") is DENY
    async with opened(BACKEND, raw) as backend:
        with pytest.raises(BackendUnavailable):
            await backend.check()


@pytest.mark.parametrize(
    ("more", "say"),
    [
        ({"key": "k"}, "key without certificate"), ({"certificate": "c", "tls": "none"}, "there is none"),
        ({"publish_attribute": "a)(b"}, "publish_attribute"), ({"mode": "hash", "base_dn": ""}, "base_dn"),
    ],
)  # fmt: skip
def test_tables_that_cannot_work(more: dict[str, Any], say: str) -> None:
    raw = {"servers": ["ldap://127.0.0.1"], "base_dn": "dc=x", **more}
    with pytest.raises(ValidationError, match=say):
        LdapConfig.model_validate(raw)
    assert Refusal is not None
