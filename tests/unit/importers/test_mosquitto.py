"""A mosquitto.conf becomes fragments that mean the same, or it is said line by line what they do not."""

from __future__ import annotations

from typing import Any

import pytest

from broker.access.passwords import Hash
from broker.importers import mosquitto_file
from tests import servers
from tests.unit.importers.imported import BRIDGE, LISTENER, PASSWORDS, RULES, Import, Imported, number_of, tls_files

PLANT = """\
# The broker of the plant, mosquitto 2.0.
per_listener_settings false

persistence true
persistence_location /var/lib/mosquitto/
autosave_interval 300

allow_anonymous false
password_file passwd
acl_file rules.acl

max_inflight_messages 50
max_queued_messages 5000
max_queued_bytes 10485760
message_size_limit 262144
max_keepalive 3600
persistent_client_expiration 30d
retain_available true
check_retain_source false
queue_qos0_messages false
memory_limit 536870912
set_tcp_nodelay true
sys_interval 10

log_dest syslog
log_type error
log_type warning
user mosquitto
pid_file /run/mosquitto/mosquitto.pid

listener 1883 127.0.0.1
max_connections 200

listener 8883
certfile tls/server.pem
keyfile tls/server.key
cafile tls/ca.pem
require_certificate true
use_identity_as_username true
tls_version tlsv1.3
ciphers_tls1.3 TLS_AES_256_GCM_SHA384

listener 9001 127.0.0.1
protocol websockets

connection headquarters
address hq.example.com:8883 hq2.example.com:8883
bridge_cafile tls/ca.pem
bridge_protocol_version mqttv50
bridge_session_expiry_interval 86400
remote_clientid plant-7
remote_username plant
remote_password very/s3cret "pass" word
topic telemetry/# out 1 "" plant-7/
topic commands/# in 2 "" plant-7/
topic shared/state both 1
restart_timeout 5 60
keepalive_interval 30
cleansession false
notifications_local_only true
try_private false
local_clientid bridge-hq
"""


@pytest.fixture
def plant(run: Import, tls: servers.Certificates) -> Imported:
    return run("mosquitto", PLANT, {"passwd": PASSWORDS, "rules.acl": RULES, **tls_files(tls, "tls/")})


def test_the_password_of_these_tests_is_one() -> None:
    assert Hash(PASSWORDS.partition(":")[2].strip()).verify(b"alice-pw")


def test_a_whole_configuration_passes_check_and_means_the_same(plant: Imported) -> None:
    etc = plant.sound()
    assert plant.values == {
        "broker": {"data": "data", "durability": "flush", "max_memory": 536870912},
        "access": {"allow_anonymous": False, "no_match": "deny"},
        "limits": {
            "max_packet_size": 262144 + 8192,
            "max_inflight": 50,
            "max_queued_messages": 5000,
            "max_queued_bytes": 10485760,
            "queue_overflow": "drop_oldest",
            "session_expiry": "30d",
            "max_keepalive": "3600s",
            "max_keepalive_policy": "refuse",
            "check_retain_source": False,
        },
        "listeners": {
            "tcp": {"bind": "127.0.0.1:1883", "max_connections": 200, "allow_bridges": True},
            "tls": {
                "bind": "*:8883",
                "certificate": f"{etc}/tls/server.pem",
                "key": f"{etc}/tls/server.key",
                "client_ca": f"{etc}/tls/ca.pem",
                "verify": "require",
                "username_from": "cn",
                "tls_min": "1.3",
                "allow_bridges": True,
            },
            "ws": {"bind": "127.0.0.1:9001", "path": "/mqtt", "allow_bridges": True},
        },
        "auth": {
            "accounts": {"kind": "file", "passwords": f"{etc}/passwd", "rules": f"{etc}/rules.acl"},
            "certificates": {"kind": "certificate", "subjects": {"everybody": {"below": "*"}}},
        },
        "bridges": {
            "headquarters": {
                "kind": "mqtt",
                "servers": ["mqtts://hq.example.com:8883", "mqtts://hq2.example.com:8883"],
                "protocol": "5",
                "clientid": "plant-7",
                "username": "plant",
                "password": 'very/s3cret "pass" word',
                "tls": {"ca": f"{etc}/tls/ca.pem"},
                "clean_session": False,
                "notifications_local_only": True,
                "try_private": False,
                "session_expiry": 86400,
                "keep_alive": "30s",
                "restart": {"base": "5s", "cap": "60s"},
                "queue": {"max_bytes": "1GB", "overflow": "reject"},
                "topics": [
                    {"filter": "telemetry/#", "direction": "out", "qos": 1, "remote_prefix": "plant-7/"},
                    {"filter": "commands/#", "direction": "in", "qos": 2, "remote_prefix": "plant-7/"},
                    {"filter": "shared/state", "direction": "both", "qos": 1},
                ],
            }
        },
    }


def test_what_has_no_equivalent_is_named_with_its_line_and_nothing_else(plant: Imported) -> None:
    wanted = [
        "persistence_location", "autosave_interval", "queue_qos0_messages", "sys_interval", "log_dest",
        "log_type error", "log_type warning", "user", "pid_file", "ciphers_tls1.3", "local_clientid",
    ]  # fmt: skip
    assert plant.lost_at == [[str(number_of(PLANT, f"^{start}")), start.split()[0]] for start in wanted]
    assert all(row.count(": ") >= 2 and row.split(": ", 2)[2] for row in plant.lost)


def test_secrets_are_for_the_owner_alone_and_never_printed(plant: Imported) -> None:
    plant.hides("s3cret", "40-bridge-headquarters.toml")
    assert plant.mode("05-listeners.toml") & 0o044, "what holds no secret need not be hidden"


def test_what_differs_is_said_in_the_fragments(plant: Imported) -> None:
    assert "mosquitto.db is not read" in plant.written["00-broker.toml"]
    assert "QoS 0 waits too" in plant.written["00-broker.toml"]
    assert "mosquitto takes any path" in plant.written["05-listeners.toml"]


LIMITS: list[tuple[str, str, Any]] = [
    ("max_inflight_messages 0", "limits.max_inflight", 65535),
    ("max_inflight_messages 7", "limits.max_inflight", 7),
    ("max_queued_messages 0", "limits.max_queued_messages", 100_000_000),
    ("max_queued_messages 7", "limits.max_queued_messages", 7),
    ("max_queued_bytes 4096", "limits.max_queued_bytes", 4096),
    ("max_packet_size 5000", "limits.max_packet_size", 5000),
    ("max_packet_size 0", "limits.max_packet_size", 268435460),
    ("message_size_limit 0", "limits.max_packet_size", 268435460),
    ("message_size_limit 1000", "limits.max_packet_size", 9192),
    ("message_size_limit 268435455", "limits.max_packet_size", 268435460),
    ("max_packet_size 50000\nmessage_size_limit 1000", "limits.max_packet_size", 9192),
    ("max_packet_size 5000\nmessage_size_limit 1000", "limits.max_packet_size", 5000),
    ("max_packet_size 5000\nmessage_size_limit 0", "limits.max_packet_size", 5000),
    ("max_queued_messages 7 # each", "limits.max_queued_messages", 7),
    ("allow_anonymous true # for now", "access.allow_anonymous", True),
    ("persistent_client_expiration 14d # two weeks", "limits.session_expiry", "14d"),
    ("persistent_client_expiration 2h", "limits.session_expiry", "2h"),
    ("persistent_client_expiration 1w", "limits.session_expiry", "7d"),
    ("persistent_client_expiration 1m", "limits.session_expiry", "30d"),
    ("persistent_client_expiration 1y", "limits.session_expiry", "365d"),
    ("persistent_client_expiration 900y", "limits.session_expiry", "4294967295s"),
    ("max_keepalive 0", "limits.max_keepalive", None),
    ("retain_available false", "limits.max_retained_messages", 0),
    ("retain_available true", "limits.max_retained_messages", None),
    ("check_retain_source true", "limits.check_retain_source", True),
    ("memory_limit 0", "broker.max_memory", None),
    ("persistence true", "broker.durability", "flush"),
    ("allow_anonymous true", "access.allow_anonymous", True),
]
DEFAULTS = [
    ("limits.max_inflight", 20),
    ("limits.max_queued_messages", 1000),
    ("limits.max_packet_size", 2_000_000),
    ("limits.session_expiry", 4_294_967_295),
    ("limits.queue_overflow", "drop_oldest"),
    ("access.allow_anonymous", False),
    ("access.no_match", "allow"),
    ("broker.durability", "flush"),
]


@pytest.mark.parametrize(("line", "path", "value"), LIMITS)
def test_limits(run: Import, line: str, path: str, value: Any) -> None:
    done = run("mosquitto", f"{line}\n{LISTENER}")
    assert done.code == 0, done.stderr
    assert done.at(path) == value
    assert done.check() == (0, "")


@pytest.mark.parametrize(("path", "value"), DEFAULTS)
def test_defaults_that_differ_are_written_down(run: Import, path: str, value: Any) -> None:
    assert run("mosquitto", LISTENER).at(path) == value


def test_a_value_we_cannot_take_is_told_and_left_out(run: Import) -> None:
    """C-20"""
    done = run("mosquitto", f"max_inflight_messages 70000\n{LISTENER}")
    assert done.lost == ["1: max_inflight_messages: must be between 1 and 65535, not 70000"]
    assert done.at("limits.max_inflight") is None
    assert done.check() == (0, "")


# every setting mosquitto has ------------------------------------------------------------------------------------------

VALUES = {
    "address": "127.0.0.1:1", "addresses": "127.0.0.1:1", "bridge_identity": "me\nbridge_psk 00",
    "bridge_psk": "00\nbridge_identity me",
    "bridge_protocol_version": "mqttv50", "persistent_client_expiration": "1d", "restart_timeout": "5",
    "start_type": "lazy", "topic": "a/#", "protocol": "mqtt", "listener": "1885", "bridge_alpn": "mqtt",
    "bridge_bind_address": "127.0.0.1", "bind_address": "127.0.0.1", "port": "1885", "socket_domain": "ipv4",
}  # fmt: skip
"""A sample where `true` or 5 is none."""
OTHERS = [
    "allow_duplicate_messages", "autosave_interval", "autosave_on_changes", "check_retain_source", "clientid_prefixes",
    "connection_messages", "enable_control_api", "global_max_clients", "global_max_connections", "global_plugin",
    "log_dest", "log_facility", "log_timestamp", "log_timestamp_format", "log_type", "max_inflight_bytes",
    "max_inflight_messages", "max_keepalive", "max_packet_size", "max_queued_bytes", "max_queued_messages",
    "memory_limit", "message_size_limit", "packet_buffer_size", "persistence", "persistence_file",
    "persistence_location", "persistent_client_expiration", "pid_file", "plugin_load", "plugin_opt_x", "plugin_use",
    "queue_qos0_messages", "retain_available", "retain_expiry_interval", "retry_interval", "set_tcp_nodelay",
    "store_clean_interval", "sys_interval", "upgrade_outgoing_qos", "user", "websockets_headers_size",
    "websockets_log_level",
]  # fmt: skip
EVERY = sorted(
    {*OTHERS, *mosquitto_file.SECURITY, *mosquitto_file.LISTENER, *mosquitto_file.BRIDGE, "port", "bind_address"}
)


@pytest.mark.parametrize("key", EVERY)
def test_every_setting_is_known(run: Import, key: str) -> None:
    """Carried over or told, with a reason of its own."""
    value = VALUES.get(key, "true" if key in mosquitto_file._SWITCHES else "5")
    if key in ("address", "addresses"):
        text = f"{LISTENER}connection b\n{key} {value}\ntopic a/#\n"
    elif key in mosquitto_file.BRIDGE:
        text = f"{BRIDGE}{key} {value}\n"
    else:
        text = f"{LISTENER}{key} {value}\n{BRIDGE.removeprefix(LISTENER)}"
    done = run("mosquitto", text)
    assert done.code == 0, done.stderr
    assert not [row for row in done.lost if "not known here" in row]
    assert done.check() == (0, "")


@pytest.mark.parametrize(
    "line",
    [
        "allow_duplicate_messages true", "allow_zero_length_clientid true", "auth_plugin_deny_special_chars true",
        "queue_qos0_messages true", "set_tcp_nodelay 1", "upgrade_outgoing_qos 0", "use_username_as_clientid 0",
        "enable_proxy_protocol 0", "max_topic_alias_broker 0",
    ],
)  # fmt: skip
def test_what_is_so_here_anyway_is_no_loss(run: Import, line: str) -> None:
    done = run("mosquitto", f"{LISTENER}{line}\n")
    assert done.lost == []
    assert done.at("listeners.tcp.enabled") is None


def test_a_number_or_word_that_is_there_twice_counts_as_it_stands_last(run: Import) -> None:
    """As with mosquitto, which refuses only texts that are there twice."""
    text = "allow_anonymous true\nmax_inflight_messages 5\npersistent_client_expiration 2d\n"
    done = run("mosquitto", f"{LISTENER}{text}allow_anonymous false\nmax_inflight_messages 6\n"
               "persistent_client_expiration 3d\n")  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.at("access.allow_anonymous") is False
    assert done.at("limits.max_inflight") == 6
    assert done.at("limits.session_expiry") == "3d"
    assert done.lost == [
        f"{line}: {key}: it is written again in {done.source}:{line + 3}, which counts"
        for line, key in ((2, "allow_anonymous"), (3, "max_inflight_messages"), (4, "persistent_client_expiration"))
    ]


def test_what_nobody_knows_is_told(run: Import) -> None:
    assert run("mosquitto", f"{LISTENER}frobnicate 5\n").lost == ["2: frobnicate: is not known here"]
