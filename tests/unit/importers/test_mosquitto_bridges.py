"""The `connection` blocks of mosquitto."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.importers.imported import BRIDGE, LISTENER, Import

TOPICS: list[tuple[str, dict[str, Any]]] = [
    ("a/#", {"filter": "a/#", "direction": "out", "qos": 0}),
    ("a/# in", {"filter": "a/#", "direction": "in", "qos": 0}),
    ("a/# both 2", {"filter": "a/#", "direction": "both", "qos": 2}),
    ("a/# out 1 l/", {"filter": "a/#", "direction": "out", "qos": 1, "local_prefix": "l/"}),
    ("a/# OUT 1", {"filter": "a/#", "direction": "out", "qos": 1}),
    ('a/# in 1 "" r/', {"filter": "a/#", "direction": "in", "qos": 1, "remote_prefix": "r/"}),
    (
        "a/# both 1 l/ r/",
        {"filter": "a/#", "direction": "both", "qos": 1, "local_prefix": "l/", "remote_prefix": "r/"},
    ),
    (
        '"" in 1 here/x there/y',
        {"filter": "", "direction": "in", "qos": 1, "local_prefix": "here/x", "remote_prefix": "there/y"},
    ),
]
BRIDGES: list[tuple[str, str, Any]] = [
    ("round_robin true", "round_robin", True),
    ("bridge_protocol_version mqttv31", "protocol", "3.1"),
    ("bridge_protocol_version mqttv311", "protocol", "3.1.1"),
    ("clientid rsmb", "clientid", "rsmb"),
    ("username u", "username", "u"),
    ("cleansession true", "clean_session", True),
    ("keepalive_interval 15", "keep_alive", "15s"),
    ("restart_timeout 20", "restart", {"base": "20s", "cap": "20s"}),
    ("restart_timeout 0", "restart", {"base": "1s", "cap": "1s"}),
    ("notifications false", "notifications", False),
    ("notification_topic state/b", "notification_topic", "state/b"),
    ("try_private false", "try_private", False),
    ("bridge_attempt_unsubscribe false", "attempt_unsubscribe", False),
    ("bridge_outgoing_retain false", "outgoing_retain", False),
    ("bridge_max_packet_size 1000", "max_packet_size", 1000),
    ("bridge_receive_maximum 10", "receive_maximum", 10),
    ("bridge_session_expiry_interval 60", "session_expiry", 60),
    ("bridge_bind_address 127.0.0.1", "bind_address", "127.0.0.1"),
    ("start_type manual", "enabled", False),
    ("bridge_tls_use_os_certs true", "servers", ["mqtts://127.0.0.1:1884"]),
]


@pytest.mark.parametrize(("text", "wanted"), TOPICS)
def test_topics_of_bridges(run: Import, text: str, wanted: dict[str, Any]) -> None:
    done = run("mosquitto", f"{LISTENER}connection b\naddress 127.0.0.1:1884\ntopic {text}\n")
    assert done.at("bridges.b.topics") == [wanted]
    assert done.check() == (0, "")


@pytest.mark.parametrize(("line", "key", "value"), BRIDGES)
def test_bridges(run: Import, line: str, key: str, value: Any) -> None:
    done = run("mosquitto", f"{BRIDGE}{line}\n")
    assert done.code == 0, done.stderr
    assert done.lost == []
    assert done.at(f"bridges.b.{key}") == value
    assert done.check() == (0, "")


def test_a_name_that_was_not_verified_does_not_make_the_certificate_worthless(run: Import) -> None:
    """bridge_insecure still verified the certificate; tls.insecure would not."""
    done = run("mosquitto", f"{BRIDGE}bridge_tls_use_os_certs true\nbridge_insecure true\n")
    assert done.at("bridges.b.tls") is None
    assert done.lost_at == [["6", "bridge_insecure"]]
    assert done.check() == (0, "")


def test_certificates_of_a_bridge_that_does_not_speak_tls_are_told(run: Import) -> None:
    done = run("mosquitto", f"{BRIDGE}bridge_certfile a.pem\nbridge_keyfile a.key\n")
    assert done.at("bridges.b.servers") == ["mqtt://127.0.0.1:1884"]
    assert done.lost_at == [["5", "bridge_certfile"], ["6", "bridge_keyfile"]]
    assert done.check() == (0, "")


def test_the_client_id_mosquitto_makes_up_is_another_here(run: Import) -> None:
    assert "HOST.NAME" in run("mosquitto", BRIDGE).written["40-bridge-b.toml"]


@pytest.mark.parametrize(
    ("addresses", "servers"),
    [
        ("address 127.0.0.1", ["mqtt://127.0.0.1:1883"]),
        ("addresses 127.0.0.1:1 [::1]:2 hq", ["mqtt://127.0.0.1:1", "mqtt://[::1]:2", "mqtt://hq:1883"]),
    ],
)
def test_addresses_of_bridges(run: Import, addresses: str, servers: list[str]) -> None:
    assert run("mosquitto", f"{LISTENER}connection b\n{addresses}\ntopic #\n").at("bridges.b.servers") == servers


def test_a_password_that_crosses_the_network_in_the_clear_is_said_to(run: Import) -> None:
    text = (
        f"{LISTENER}connection b\naddress hq.example.com\ntopic a\nremote_username u\nremote_password ${{env:HOME}}x\n"
    )
    done = run("mosquitto", text)
    assert done.at("bridges.b.allow_cleartext") is True
    assert done.at("bridges.b.password") == "$${env:HOME}x", "what is no reference in mosquitto is none here"
    assert done.check() == (0, "")


def test_a_bridge_and_its_shared_key(run: Import) -> None:
    done = run("mosquitto", f"{BRIDGE}bridge_identity plant\nbridge_psk 00ff\n")
    assert done.at("bridges.b.tls") == {"psk_identity": "plant", "psk": "00ff"}
    assert done.mode("40-bridge-b.toml") == 0o600
    assert "00ff" not in done.stdout
    assert done.check() == (0, "")


def test_a_password_before_the_name_of_a_host_is_hidden(run: Import) -> None:
    done = run("mosquitto", f"{LISTENER}connection b\naddress u:s3cret@hq:1884\ntopic a\n")
    assert done.at("bridges.b.enabled") is False
    done.hides("s3cret", "40-bridge-b.toml")


def test_bridges_of_one_name_are_two(run: Import) -> None:
    block = "connection plant / one\naddress 127.0.0.1:1884\ntopic a/#\n"
    done = run("mosquitto", LISTENER + block + block)
    assert set(done.at("bridges")) == {"plant-one", "plant-one-2"}
    assert done.check() == (0, "")
