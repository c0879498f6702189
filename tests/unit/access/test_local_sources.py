"""Users, networks and certificates that the configuration itself names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from auth.address import AddressConfig, open_address
from auth.certificate import CertificateConfig, open_certificate, split_subject
from auth.static import StaticConfig, open_static
from broker.access.gate import AccessGate
from broker.access.passwords import hash_password
from broker.access.rules import EVERY
from broker.config.settings import load_settings
from broker.config.template import Template
from broker.extend.auth import Client, Grant, Rule, Verdict
from broker.net.tls import identity
from tests.unit.access.doubles import Channel, Fake, Login, instance
from tests.unit.access.test_rules import decide, rule

HASH = hash_password("secret", "pbkdf2")
STATIC = f"""
[auth.devices]
kind = "static"
[auth.devices.users.alice]
password_hash = "{HASH}"
publish = ["a/${{username}}/#", "eq odd/+"]
deny_publish = ["a/alice/secret"]
[auth.devices.users.op]
password = "op-pw"
groups = ["operators"]
[auth.devices.clients."sensor-1"]
password = "s1"
publish = ["up/${{clientid}}"]
[auth.devices.groups.operators]
publish = ["commands/#"]
[auth.devices.groups.admins]
superuser = true
[[auth.devices.rules]]
permission = "deny"
action = "publish"
topics = ["commands/stop"]
qos = [0]
[[auth.devices.rules]]
permission = "allow"
action = "subscribe"
topics = ["local/#"]
ipaddress = "10.0.0.0/8"
"""


@pytest.fixture
async def gate(tmp_path: Path) -> Any:
    gates: list[AccessGate] = []

    async def open(text: str) -> AccessGate:
        folder = tmp_path / "conf.d"
        folder.mkdir(exist_ok=True)
        (folder / "10.toml").write_text(text)
        if not gates:
            gates.append(AccessGate())
        await gates[0].replace(load_settings(folder))
        return gates[0]

    yield open
    for one in gates:
        await one.close()


# --- users and client ids in the configuration -----------------------------------------------------------------------


async def test_users_client_ids_groups_and_rules_of_a_table(gate: Any) -> None:
    it = await gate(STATIC)
    log = Login(it)
    alice = await log("alice", b"secret")
    assert it.may_publish(alice.principal, "a/alice/x") == 1
    assert it.may_publish(alice.principal, "a/alice/secret") == 0
    assert it.may_publish(alice.principal, "odd/+") == 1
    assert it.may_publish(alice.principal, "odd/x") == 0
    operator = (await log("op", b"op-pw")).principal
    assert it.may_publish(operator, "commands/go") == 1
    assert it.publishable(operator, "commands/stop") == EVERY & ~0b11
    assert it.may_publish(alice.principal, "commands/go") == 0
    assert it.may_subscribe(alice.principal, "local/#") == 0, "it comes from 127.0.0.1"
    for name, password in (("alice", b"other"), ("alice", b""), ("op", b"op-pw2"), ("op", b""), ("nobody", b"x")):
        assert (await log(name, password)).code == 0x86, name


async def test_a_client_id_is_the_user_name_of_who_proves_it(gate: Any) -> None:
    """The password of a client id is no key to a user's rights."""
    it = await gate(STATIC)
    log = Login(it)
    sensor = await log("alice", b"s1", "sensor-1")
    assert sensor.code == 0
    assert sensor.principal.username == "sensor-1"
    assert it.may_publish(sensor.principal, "a/alice/x") == 0
    assert it.may_publish(sensor.principal, "up/sensor-1") == 1
    assert (await log("alice", b"secret", "sensor-1")).code == 0x86, "the client id is taken"
    assert (await log("sensor-1", b"s1", "sensor-2")).code == 0x86


async def test_a_table_that_changes_reaches_who_is_connected(gate: Any) -> None:
    """Z-23: at a reload rights are read again; who is no longer in the table is disconnected."""
    it = await gate(STATIC)
    kicked: list[tuple[str, int]] = []
    it.kick = lambda clientid, code: kicked.append((clientid, code))
    log = Login(it)
    alice = (await log("alice", b"secret", "one")).principal
    sensor = (await log("x", b"s1", "sensor-1")).principal
    assert it.may_publish(alice, "a/alice/x") == 1
    await gate(STATIC.replace("a/${username}/#", "b/#").replace('clients."sensor-1"', 'clients."sensor-9"'))
    await it._refresher.run_due()
    assert (it.may_publish(alice, "a/alice/x"), it.may_publish(alice, "b/x")) == (0, 1)
    assert kicked == [("sensor-1", 0x87)]
    assert it.may_publish(sensor, "up/sensor-1") == 0


async def test_rules_alone_let_nobody_in_and_keep_nobody_out(gate: Any) -> None:
    rules = '[auth.rules]\nkind = "static"\nrules = [{permission = "allow", topics = ["a"]}]\n'
    it = await gate(rules)
    log = Login(it)
    assert (await log("alice", b"x")).code == 0x86
    certified = await log("cam", None, username="cam", cert_subject="CN=cam")
    assert certified.code == 0
    assert it.may_publish(certified.principal, "a") == 1
    it = await gate(rules + STATIC)
    assert (await log("cam", None, username="cam", cert_subject="CN=cam")).code == 0x87, "the other table knows users"
    known = await log("alice", None, username="alice", cert_subject="CN=alice")
    assert it.may_publish(known.principal, "a/alice/x") == 1


async def test_the_time_of_an_unknown_user_is_that_of_a_wrong_password() -> None:
    config = StaticConfig.model_validate({"users": {"a": {"password_hash": HASH}, "b": {"password": "x"}}})
    backend: Any = await open_static(config.named("t"))  # type: ignore[arg-type]
    seen: list[bytes] = []

    async def verify(hash: Any, password: bytes) -> bool:
        seen.append(password)
        return False

    backend._verifier.verify = verify
    await backend.burn(b"guess")
    assert seen == [b"guess"]
    await backend.close()


@pytest.mark.parametrize(
    ("table", "say"),
    [
        ({}, "name somebody"),
        ({"users": {"a": {}}}, "one of them"),
        ({"users": {"a": {"password": "x", "password_hash": HASH}}}, "one of them"),
        ({"users": {"a": {"password_hash": "secret"}}}, "no known kind"),
        ({"users": {"a": {"password": "x"}}, "clients": {"a": {"password": "y"}}}, "would act as the user"),
        ({"users": {"": {"password": "x"}}}, "empty"),
        ({"users": {"a": {"password": "x", "publish": ["a/#/b"]}}}, "last level"),
        ({"groups": {"g": {"subscribe": ["${nobody}"]}}}, "nobody"),
        ({"rules": [{"permission": "allow", "topic": "a", "Qos": 1}]}, "rules 1: 'Qos'"),
    ],
)
def test_tables_that_are_not_understood(table: dict[str, Any], say: str) -> None:
    with pytest.raises(ValidationError, match=say) as caught:
        StaticConfig.model_validate(table)
    assert "secret" not in str(caught.value)


# --- networks --------------------------------------------------------------------------------------------------------

ADDRESS = """
[access]
allow_anonymous = true
[auth.address]
allow = ["10.0.0.0/8", "2001:db8::/32", "127.0.0.1"]
deny = ["10.6.0.0/16"]
[auth.address.networks.plant]
addresses = ["10.1.0.0/16", "10.2.0.1"]
publish = ["plant/${clientid}/#"]
deny_subscribe = ["plant/secret"]
subscribe = ["plant/#"]
"""


def at(log: Login, peerhost: str, *arguments: Any, **more: Any) -> Any:
    """A login from an address that the caches alone decide."""
    channel = Channel(**more)
    channel.peerhost, channel.peer = peerhost, f"{peerhost}:5000"
    username, password, clientid = arguments or (None, None, "c")
    log.gate.authenticate(channel, SimpleNamespace(client_id=clientid, username=username, password=password))
    return channel


@pytest.mark.parametrize(
    ("peer", "code"),
    [
        ("10.3.4.5", 0), ("::ffff:10.3.4.5", 0), ("[2001:db8::1]", 0), ("fe80::1%eth0", 0x87), ("11.0.0.1", 0x87),
        ("10.6.0.1", 0x87), ("::ffff:10.6.0.1", 0x87), ("127.0.0.1", 0), ("127.0.0.2", 0x87), ("unix", 0),
    ],
)  # fmt: skip
async def test_who_comes_from_elsewhere_is_refused_whatever_it_proves(gate: Any, peer: str, code: int) -> None:
    it = await gate(ADDRESS + STATIC)
    log = Login(it)
    assert (await log("alice", b"secret")).code == 0
    assert at(log, peer).code == code, "anonymous"
    assert at(log, peer, "alice", b"secret", "c").code == code, "although its verdict is in the cache"
    if code:
        assert at(log, peer, "alice", None, "c", username="alice").code == code, "with a certificate"


async def test_rights_by_network(gate: Any) -> None:
    it = await gate(ADDRESS)
    log = Login(it)
    inside, other = at(log, "10.1.9.9", None, None, "m1").principal, at(log, "10.3.0.1", None, None, "m1").principal
    assert it.may_publish(inside, "plant/m1/x") == 1
    assert it.may_publish(other, "plant/m1/x") == 0
    assert it.may_subscribe(inside, "plant/#") == 1
    assert it.may_receive(inside, "plant/secret") == 0
    assert it.may_subscribe(at(log, "10.2.0.1").principal, "plant/#") == 1


async def test_z28_to_come_from_this_machine_gives_no_rights(gate: Any) -> None:
    """Z-28: nor does it need no password."""
    it = await gate("[access]\nallow_anonymous = true\n" + STATIC)
    log = Login(it)
    for peer in ("127.0.0.1", "::1", "unix"):
        who = at(log, peer).principal
        assert not who.superuser
        assert it.publishable(who, "x") == it.may_subscribe(who, "$SYS/#") == it.may_subscribe(who, "#") == 0
    refused = await gate(STATIC)
    assert at(Login(refused), "127.0.0.1").code == 0x87


@pytest.mark.parametrize(
    ("table", "say"),
    [
        ({}, "name a network"),
        ({"allow": ["10.0.0.0/33"]}, "10.0.0.0/33"),
        ({"deny": ["example.org"]}, "example.org"),
        ({"networks": {"x": {"addresses": []}}}, "addresses"),
        ({"networks": {"x": {"addresses": [""]}}}, "neither an address"),
    ],
)
def test_networks_that_are_none(table: dict[str, Any], say: str) -> None:
    with pytest.raises(ValidationError, match=say):
        AddressConfig.model_validate(table)


async def test_an_address_proves_no_name() -> None:
    backend = await open_address(AddressConfig(allow=("127.0.0.1",)).named("a"))  # type: ignore[arg-type]
    assert await backend.authenticate(Client("c", "u", "127.0.0.1"), b"x") is Verdict.IGNORE


# --- certificates ----------------------------------------------------------------------------------------------------

CERTIFICATE = """
[auth.certificate.subjects.devices]
below = "OU=devices, O=Example"
groups = ["devices"]
publish = ["up/${cert_common_name}/#"]
[auth.certificate.subjects.all]
below = "*"
subscribe = ["news"]
"""


def shown(**names: str) -> dict[str, str]:
    """What a listener with `username_from = "cn"` makes of a certificate."""
    kinds = {"CN": "commonName", "OU": "organizationalUnitName", "O": "organizationName"}
    relative = tuple(((kinds[kind], value),) for kind, value in reversed(names.items()))
    return identity({"subject": relative}, "cn")


async def test_the_subject_of_a_certificate_gives_groups_and_rights(gate: Any) -> None:
    rules = '[auth.x]\nkind = "static"\n[auth.x.groups.devices]\npublish = ["shared"]\n'
    it = await gate(CERTIFICATE + rules)
    log = Login(it)
    device = (await log(None, None, "c", **shown(CN="cam7", OU="devices", O="Example"))).principal
    assert device.username == "cam7"
    assert [it.may_publish(device, topic) for topic in ("up/cam7/x", "up/cam8/x", "shared")] == [1, 0, 1]
    other = (await log(None, None, "d", **shown(CN="cam7", OU="guests", O="Example"))).principal
    assert [it.may_publish(other, topic) for topic in ("up/cam7/x", "shared")] == [0, 0]
    assert it.may_subscribe(other, "news") == 1
    assert (await log("cam7", b"password", "e", cert_subject="CN=cam7,OU=devices,O=Example")).code == 0x86


@pytest.mark.parametrize(
    ("names", "inside"),
    [
        ({"CN": "a", "OU": "devices", "O": "Example"}, True),
        ({"OU": "devices", "O": "Example"}, True),
        ({"CN": "a", "O": "Example", "OU": "devices"}, False),  # the order of the names is part of the name
        ({"CN": "a,OU=devices,O=Example"}, False),
        ({"CN": "a", "OU": "x,OU=devices", "O": "Example"}, False),
        ({"CN": "a", "OU": "devices", "O": "Example "}, False),
        ({"CN": "a", "OU": "DEVICES", "O": "Example"}, False),
        ({"CN": "a", "OU": "devices+x", "O": "Example"}, False),
        ({"CN": "a", "OU": "more devices", "O": "Example"}, False),
    ],
)
async def test_a52_a_name_is_compared_whole_and_its_separators_are_escaped(names: dict[str, str], inside: bool) -> None:
    table = {"subjects": {"devices": {"below": "OU=devices,O=Example", "superuser": True}}}
    backend = await open_certificate(CertificateConfig.model_validate(table).named("c"))  # type: ignore[arg-type]
    certificate = {**shown(**names), "username": "a"}
    found = await backend.rules(Client("c", "a", certificate=certificate))
    assert (found == Grant(True, rules=())) is inside, certificate["cert_subject"]


@pytest.mark.parametrize("name", ["+", "#", "a/+", "a/#", "/", "a/b"])
async def test_a52_a_common_name_with_wildcards_widens_nothing(gate: Any, name: str) -> None:
    it = await gate(CERTIFICATE)
    who = (await Login(it)(None, None, "c", **shown(CN=name, OU="devices", O="Example"))).principal
    for topic in (f"up/{name}/x", "up/any/x", "up/a/x"):
        assert it.publishable(who, topic) == 0


@pytest.mark.parametrize("text", ["", "CN", "CN=", "=x", "CN=a,,O=b", "CN=a,", "a\\"])
def test_subjects_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        split_subject(text)
    with pytest.raises(ValidationError):
        CertificateConfig.model_validate({"subjects": {"x": {"below": text}}})


def test_parts_of_one_relative_name_have_no_order() -> None:
    assert split_subject("CN=a+UID=1,O=b") == split_subject("UID=1+CN=a, O=b")
    assert split_subject(r"CN=a\+UID\=1,O=b") != split_subject("CN=a+UID=1,O=b")


# --- listeners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
async def test_z26_each_listener_keeps_its_own_rules(login: Any, turned: bool) -> None:
    """Z-26: in whichever order they are written."""

    class With(Fake):
        def __init__(self, topic: str) -> None:
            super().__init__(Verdict.ALLOW)
            self.common_rules = [Rule(True, "all", Template(topic))]

    tables = [instance("one", With("one/#")), instance("two", With("two/#"))]
    log = await login(*(reversed(tables) if turned else tables))
    first = (await log("u", b"p", "a", auth=("one",))).principal
    second = (await log("u", b"p", "b", auth=("two",))).principal
    assert [log.gate.may_publish(first, t) for t in ("one/x", "two/x")] == [1, 0]
    assert [log.gate.may_publish(second, t) for t in ("one/x", "two/x")] == [0, 1]


def test_z30_case_and_slashes_make_other_topics() -> None:
    """Z-30: four of them."""
    topics = ["a", "a/", "/a", "A"]
    for right in topics:
        for topic in topics:
            for action in (0, 1):
                assert decide([rule(f"allow all {right}")], action, topic) is (True if topic == right else None)
