"""mosquitto's listeners, and who may do what on each of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.access.chain import Decision
from broker.access.gate import AccessGate
from broker.config.settings import load_settings
from broker.extend.auth import Client
from tests import servers
from tests.unit.importers.imported import LISTENER, PASSWORDS, RULES, Import, Imported, tls_files

LISTENERS: list[tuple[str, dict[str, Any]]] = [
    ("listener 1884 127.0.0.1", {"tcp": {"bind": "127.0.0.1:1884"}}),
    ("listener 1884 localhost", {"tcp": {"bind": "localhost:1884"}}),
    ("listener 1884 ::1", {"tcp": {"bind": "[::1]:1884"}}),
    ("listener 1884", {"tcp": {"bind": "*:1884", "allow_cleartext": True}}),
    ("port 1885", {"tcp": {"bind": "*:1885", "allow_cleartext": True}}),
    ("bind_address 127.0.0.1", {"tcp": {"bind": "127.0.0.1:1883"}}),
    ("port 1885\nbind_address 127.0.0.1", {"tcp": {"bind": "127.0.0.1:1885"}}),
    ("listener 1884\nsocket_domain ipv4", {"tcp": {"bind": "0.0.0.0:1884", "allow_cleartext": True}}),
    ("listener 1884\nsocket_domain ipv6", {"tcp": {"bind": "[::]:1884", "allow_cleartext": True}}),
    ("listener 1884 127.0.0.1\nmax_connections -1", {"tcp": {"bind": "127.0.0.1:1884", "max_connections": 10_000_000}}),
    ("listener 1884 127.0.0.1\nmax_connections 0", {"tcp": {"bind": "127.0.0.1:1884", "max_connections": 10_000_000}}),
    ("listener 1884 127.0.0.1\nrequire_certificate 0", {"tcp": {"bind": "127.0.0.1:1884"}}),
    ("listener 1884 127.0.0.1\nmax_connections 5", {"tcp": {"bind": "127.0.0.1:1884", "max_connections": 5}}),
    ("listener 9001 127.0.0.1\nprotocol websockets", {"ws": {"bind": "127.0.0.1:9001", "path": "/mqtt"}}),
    (
        "listener 9001 127.0.0.1\nprotocol websockets\nwebsockets_origin https://app.example.com",
        {"ws": {"bind": "127.0.0.1:9001", "path": "/mqtt", "origins": ["https://app.example.com"]}},
    ),
    (
        "listener 9001 127.0.0.1\nprotocol websockets\nwebsockets_origin https://a\nwebsockets_origin https://b",
        {"ws": {"bind": "127.0.0.1:9001", "path": "/mqtt", "origins": ["https://a", "https://b"]}},
    ),
    (
        "listener 1884 127.0.0.1\nlistener 1885 127.0.0.1",
        {"tcp": {"bind": "127.0.0.1:1884"}, "tcp-1885": {"kind": "tcp", "bind": "127.0.0.1:1885"}},
    ),
    (
        "port 1883\nbind_address 127.0.0.1\nlistener 9001 127.0.0.1\nprotocol websockets",
        {"tcp": {"bind": "127.0.0.1:1883"}, "ws": {"bind": "127.0.0.1:9001", "path": "/mqtt"}},
    ),
    (
        "listener 1884 127.0.0.1\nlistener_allow_anonymous true",
        {"tcp": {"bind": "127.0.0.1:1884", "allow_anonymous": True}},
    ),
]


@pytest.mark.parametrize(("text", "wanted"), LISTENERS)
def test_listeners(run: Import, text: str, wanted: dict[str, Any]) -> None:
    done = run("mosquitto", f"{text}\n")
    assert done.code == 0, done.stderr
    assert done.lost == []
    assert done.at("listeners") == {name: {**table, "allow_bridges": True} for name, table in wanted.items()}
    assert done.check() == (0, "")


def test_a_unix_socket(run: Import) -> None:
    done = run("mosquitto", "listener 0 mqtt.sock\n")
    assert done.at("listeners.unix.path") == str(done.source.parent / "mqtt.sock")
    assert done.check() == (0, "")


def test_without_a_listener_this_machine_is_served_and_everybody_on_it(run: Import) -> None:
    done = run("mosquitto", "persistence true\n")
    assert done.at("listeners") == {"tcp": {"bind": "127.0.0.1:1883"}}
    assert done.at("access") == {"allow_anonymous": True, "no_match": "allow"}
    assert done.check() == (0, "")


OPENS = [
    ("max_connections 9", True),
    ("max_connections -1", False),
    ("max_qos 2", False),
    ("protocol mqtt", False),
    ("bind_interface lo", True),
    ("use_username_as_clientid true", True),
    ("use_username_as_clientid false", False),
    ("require_certificate false", False),
    ("tls_version tlsv1.2", False),
    ("max_topic_alias 5", False),
    ("per_listener_settings true\nallow_anonymous true", False),
    ("per_listener_settings true\nacl_file rules", False),
    ("per_listener_settings true\npassword_file passwd", True),
    ("per_listener_settings true\nallow_zero_length_clientid false", True),
]


@pytest.mark.parametrize(("text", "opens"), OPENS)
def test_settings_outside_of_listeners_open_one_where_mosquitto_does(run: Import, text: str, opens: bool) -> None:
    """Else only this machine is served, and everybody on it."""
    done = run("mosquitto", f"{text}\n", {"passwd": PASSWORDS, "rules": RULES})
    assert done.code == 0, done.stderr
    assert done.at("listeners.tcp.bind") == ("*:1883" if opens else "127.0.0.1:1883")
    anonymous = done.at("listeners.tcp.allow_anonymous")
    assert (done.at("access.allow_anonymous") if anonymous is None else anonymous) is not opens
    assert not [row for row in done.lost if "not known here" in row]
    assert done.check() == (0, "")


def test_rules_outside_of_listeners_hold_on_this_machine(run: Import) -> None:
    done = run("mosquitto", "per_listener_settings true\nacl_file rules\n", {"rules": RULES})
    assert done.at("listeners.tcp.auth") == ["accounts"]
    assert done.lost == []


def test_what_stands_before_the_first_listener_and_opens_none_is_told(run: Import) -> None:
    text = f"per_listener_settings true\nallow_anonymous true\n{LISTENER}password_file passwd\n"
    done = run("mosquitto", text, {"passwd": PASSWORDS})
    assert done.lost == ["2: allow_anonymous: stands before any listener line and opens none"]
    assert done.at("listeners.tcp.allow_anonymous") is False


def test_a_kind_of_address_where_an_address_is_written_is_told(run: Import) -> None:
    done = run("mosquitto", f"{LISTENER}socket_domain ipv6\n")
    assert done.lost_at == [["2", "socket_domain"]]


@pytest.mark.parametrize("per_listener", ["", "per_listener_settings true\n"])
@pytest.mark.parametrize("security", ["password_file passwd\nacl_file rules\n", "password_file passwd\n", ""])
def test_a_certificate_needs_no_entry_in_the_file_of_passwords(
    run: Import, tls: servers.Certificates, per_listener: str, security: str
) -> None:
    """mosquitto looks up no password where use_identity_as_username holds."""
    files = tls_files(tls, "") | {"passwd": PASSWORDS, "rules": RULES}
    text = (
        f"{per_listener}listener 8883\ncertfile server.pem\nkeyfile server.key\ncafile ca.pem\n"
        f"require_certificate true\nuse_identity_as_username true\n{security}"
    )
    done = run("mosquitto", text, files)
    assert done.check() == (0, "")
    assert done.lost == []
    decision = asyncio.run(identified(done))
    assert decision.code == 0, decision.reason


async def identified(done: Imported) -> Decision:
    """What becomes of a client whose certificate the listener has verified."""
    settings = load_settings(done.conf, base=done.conf.parent)
    gate = AccessGate(settings)
    await gate.open()
    try:
        names = settings.listeners["tls"].auth
        certificate = {"username": "dev-1", "cert_common_name": "dev-1", "cert_subject": "CN=dev-1"}
        client = Client(clientid="c", username="dev-1", peerhost="10.0.0.1", listener="tls", certificate=certificate)
        return await gate.chain(None if names is None else tuple(names)).identify(client)
    finally:
        await gate.close()


def test_an_open_broker_with_names_nobody_checks_is_told(run: Import) -> None:
    done = run("mosquitto", f"allow_anonymous true\n{LISTENER}")
    assert [row.partition(": who gives")[0] for row in done.lost] == ["1: allow_anonymous"]


TLS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("", {"verify": "none"}, []),
    ("cafile ca.pem", {"verify": "none"}, []),
    ("cafile ca.pem\nrequire_certificate true", {"verify": "require", "client_ca": "ca.pem"}, []),
    (
        "cafile ca.pem\nrequire_certificate true\nuse_subject_as_username true",
        {"verify": "require", "client_ca": "ca.pem", "username_from": "dn"},
        [],
    ),
    ("use_identity_as_username true", {"verify": "none"}, ["use_identity_as_username"]),
    ("tls_version tlsv1.2", {"verify": "none", "tls_min": "1.2"}, []),
    ("tls_version tlsv1.1", {"verify": "none", "tls_min": "1.2"}, ["tls_version"]),
    ("ciphers HIGH", {"verify": "none"}, ["ciphers"]),
    ("dhparamfile dh.pem", {"verify": "none"}, ["dhparamfile"]),
    ("capath certs", {"verify": "none"}, ["capath"]),
    ("cafile ca.pem\ncapath certs", {"verify": "none"}, ["capath"]),
    ("capath certs\nrequire_certificate true", {"verify": "require", "enabled": False}, ["capath"]),
    ("protocol websockets", {"verify": "none", "kind": "wss", "path": "/mqtt"}, []),
]


@pytest.mark.parametrize(("more", "wanted", "lost"), TLS)
def test_tls(run: Import, tls: servers.Certificates, more: str, wanted: dict[str, Any], lost: list[str]) -> None:
    files = tls_files(tls, "")
    done = run("mosquitto", f"listener 8883\ncertfile server.pem\nkeyfile server.key\n{more}\n", files)
    kind = "wss" if wanted.pop("kind", "tls") == "wss" else "tls"
    table = dict(done.at(f"listeners.{kind}"))
    etc = done.source.parent
    fixed = {"bind": "*:8883", "certificate": f"{etc}/server.pem", "key": f"{etc}/server.key", "allow_bridges": True}
    if "client_ca" in wanted:
        wanted["client_ca"] = str(etc / wanted["client_ca"])
    assert table == fixed | wanted
    assert done.lost_keys == lost
    assert done.check() == (0, "")


def test_revoked_certificates(run: Import, tls: servers.Certificates) -> None:
    """A list that is not one turns the listener off: without it the revoked would come in."""
    files = tls_files(tls, "") | {"crl.pem": "no list\n"}
    text = "listener 8883\ncertfile server.pem\nkeyfile server.key\ncafile ca.pem\nrequire_certificate true\n"
    text += "crlfile crl.pem\n"
    done = run("mosquitto", text, files)
    assert done.at("listeners.tls.client_crl") == str(done.source.parent / "crl.pem")
    assert done.at("listeners.tls.enabled") is False
    assert done.lost_at == [["6", "crlfile"]]
    assert done.check() == (0, "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("mount_point devices/", "no mount points"),
        ("bind_interface eth1", "interface cannot be named"),
        ("enable_proxy_protocol true", "PROXY protocol"),
        ("cafile ca.pem", "there is no certfile"),
        ("require_certificate true", "there is no certfile"),
    ],
)
def test_a_listener_that_would_do_something_else_is_turned_off(run: Import, line: str, reason: str) -> None:
    """C-11"""
    done = run("mosquitto", f"listener 1884\n{line}\n")
    assert done.at("listeners.tcp.enabled") is False
    (row,) = done.lost
    assert row.startswith(f"2: {line.split()[0]}: ")
    assert reason in row
    assert "enabled = false" in row
    assert done.check() == (0, "")


@pytest.mark.parametrize(("line", "key"), [("psk_hint plant", "psk_hint"), ("protocol mqttsn", "protocol")])
def test_a_listener_of_a_kind_there_is_not_is_left_out(run: Import, line: str, key: str) -> None:
    done = run("mosquitto", f"{LISTENER}listener 8884\n{line}\nmax_connections 5\n")
    assert list(done.at("listeners")) == ["tcp"]
    assert done.lost_at == [["2", "listener"], ["3", key], ["4", "max_connections"]]
    assert done.check() == (0, "")


def test_where_every_listener_is_left_out_none_is_opened(run: Import) -> None:
    done = run("mosquitto", "listener 8884\npsk_hint plant\n")
    assert done.at("listeners") == {"tcp": {"bind": "127.0.0.1:1883", "enabled": False}}
    done.sound()


def test_a_missing_certificate_turns_its_listener_off_and_the_rest_works(run: Import) -> None:
    done = run("mosquitto", f"{LISTENER}listener 8883\ncertfile gone.pem\nkeyfile gone.key\n")
    assert done.at("listeners.tls.enabled") is False
    (row,) = done.lost
    assert row.startswith("3: certfile: certificate: ")
    assert "gone.pem" in row
    assert done.check() == (0, "")


def test_a_missing_file_of_users_lets_nobody_in(run: Import) -> None:
    done = run("mosquitto", f"password_file gone\nacl_file gone2\n{LISTENER}")
    assert done.at("auth.accounts.enabled") is False
    assert done.at("access") == {"allow_anonymous": False, "no_match": "deny"}
    assert done.lost[0].startswith("1: password_file: ")
    assert done.check() == (0, "")
    assert "every client is refused" in done.stderr


def test_rules_alone(run: Import) -> None:
    done = run("mosquitto", f"acl_file rules\nallow_anonymous true\n{LISTENER}", {"rules": RULES})
    assert done.at("auth.accounts") == {"kind": "file", "rules": str(done.source.parent / "rules")}
    assert done.at("access.no_match") == "deny"
    assert done.check() == (0, "")


@pytest.mark.parametrize("key", ["plugin", "auth_plugin"])
def test_where_a_plug_in_judged_nothing_is_allowed_by_default(run: Import, key: str) -> None:
    done = run("mosquitto", f"{key} /usr/lib/mosquitto_dynamic_security.so\nplugin_opt_config_file x.json\n{LISTENER}")
    assert done.at("access.no_match") == "deny"
    assert done.lost_at == [["1", key], ["2", "plugin_opt_config_file"]]
    assert done.check() == (0, "")


PER_LISTENER = """\
listener 1884 127.0.0.1
allow_anonymous true

listener 1885 127.0.0.1
password_file passwd
acl_file rules

listener 1886 127.0.0.1
password_file passwd
acl_file rules

listener 1887 127.0.0.1
password_file passwd
"""


@pytest.mark.parametrize("last", [False, True])
def test_c10_settings_of_listeners_whatever_the_order(run: Import, last: bool) -> None:
    """C-10"""
    switch = "per_listener_settings true\n"
    text = PER_LISTENER + switch if last else switch + PER_LISTENER
    done = run("mosquitto", text, {"passwd": PASSWORDS, "rules": RULES})
    assert {name: (t["auth"], t["allow_anonymous"]) for name, t in done.at("listeners").items()} == {
        "tcp": (["everything"], True),
        "tcp-1885": (["accounts"], False),
        "tcp-1886": (["accounts"], False),
        "tcp-1887": (["accounts-2", "everything"], False),
    }
    assert done.at("access") == {"allow_anonymous": False, "no_match": "deny"}
    assert done.at("auth.accounts.rules")
    assert done.at("auth.accounts-2.rules") is None
    assert done.check() == (0, "")


def test_global_settings_stay_global_wherever_they_stand(run: Import) -> None:
    """C-10"""
    files = {"passwd": PASSWORDS, "rules": RULES}
    first = run("mosquitto", f"password_file passwd\nacl_file rules\n{LISTENER}listener 1884 127.0.0.1\n", files)
    tables = first.values
    for path in first.conf.glob("*.toml"):
        path.unlink()
    last = run("mosquitto", f"{LISTENER}listener 1884 127.0.0.1\npassword_file passwd\nacl_file rules\n", files)
    assert last.values == tables
