"""EMQX 5's emqx.conf becomes fragments that mean the same, or it is said line by line what they do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests import servers
from tests.unit.importers.imported import EMQX5, EMQX_BROKER, Import, Imported, number_of, tls_files

ACL = """\
{allow, {user, "dashboard"}, subscribe, ["$SYS/#"]}.
{allow, {ipaddr, "127.0.0.1"}, all, ["$SYS/#", "#"]}.
{deny, all, subscribe, ["$SYS/#", {eq, "#"}]}.
{allow, all}.
"""

PLANT = """\
## EMQX 5.8, the plant
node {
  name = "emqx@10.20.0.5"
  cookie = "kept-out-of-sight"
}
cluster.name = plant

listeners.tcp.default {
  bind = "127.0.0.1:1883"
  max_connections = 50000
  max_conn_rate = "200/s"
  acceptors = 16
}
listeners.ssl.default {
  bind = "0.0.0.0:8883"
  ssl_options {
    certfile = "etc/certs/server.pem"
    keyfile = "etc/certs/server.key"
    cacertfile = "${EMQX_ETC_DIR}/certs/ca.pem"
    verify = verify_peer
    fail_if_no_peer_cert = true
    versions = ["tlsv1.3"]
  }
}
listeners.ws.default {
  bind = "127.0.0.1:8083"
  websocket.mqtt_path = "/mqtt"
}
listeners.wss.default.enable = false

mqtt {
  max_packet_size = 4MB
  max_mqueue_len = infinity
  max_inflight = 64
  session_expiry_interval = 12h
  max_topic_levels = 64
  peer_cert_as_username = cn
  upgrade_qos = true
  mqueue_store_qos0 = true
}
retainer.backend.max_retained_messages = 7000
flapping_detect { enable = true, max_count = 20, window_time = 2m, ban_time = 10m }

authentication = [
  {
    mechanism = password_based
    backend = postgresql
    server = "db.plant.example:5432"
    database = mqtt
    username = emqx
    password = "db-s3cret"
    query = "SELECT password_hash, salt, is_superuser FROM mqtt_user WHERE username = ${username} LIMIT 1"
    password_hash_algorithm { name = sha256, salt_position = suffix }
    pool_size = 4
    query_timeout = 5s
    ssl { enable = true, verify = verify_peer }
  }
  {
    mechanism = jwt
    from = password
    use_jwks = false
    algorithm = hmac-based
    secret = "0123456789-jwt-s3cret-0123456789"
    verify_claims { sub = "${username}" }
  }
]
authorization {
  no_match = deny
  deny_action = disconnect
  sources = [
    { type = file, path = "etc/acl.conf" }
    {
      type = postgresql
      server = "db.plant.example:5432"
      database = mqtt
      username = emqx
      password = "db-s3cret"
      query = "SELECT permission, action, topic FROM mqtt_acl WHERE username = ${username}"
    }
  ]
}

connectors.mqtt.hq {
  server = "hq.example.com:1883"
  proto_ver = v5
  username = plant
  password = "hq-s3cret"
  keepalive = 30s
}
actions.mqtt.to_hq { connector = hq, parameters { topic = "plant/${topic}", qos = 1, payload = "${payload}" } }
connectors.kafka_producer.store { bootstrap_hosts = "127.0.0.1:9092", authentication = none }
actions.kafka_producer.readings {
  connector = store
  parameters { topic = readings, message { key = "${clientid}", value = "${payload}" } }
}
rule_engine.rules.out { sql = "SELECT * FROM \\"telemetry/#\\"", actions = ["mqtt:to_hq", "kafka_producer:readings"] }
rule_engine.rules.hot { sql = "SELECT payload.t as t FROM \\"telemetry/#\\" WHERE t > 90", actions = ["console"] }
dashboard.listeners.http.bind = 18083
"""


@pytest.fixture
def plant(run: Import, tls: servers.Certificates) -> Imported:
    return run("emqx", PLANT, {"acl.conf": ACL, **tls_files(tls, "certs/")})


def test_a_whole_configuration_passes_check_and_means_the_same(plant: Imported) -> None:
    etc = plant.sound()
    assert plant.values == {
        "broker": EMQX_BROKER,
        "access": {
            "allow_anonymous": False,
            "no_match": "deny",
            "deny_action": "disconnect",
            "order": ["rules", "postgresql", "jwt"],
            "flapping_detect": {"enable": True, "max_count": 20, "window_time": "2m", "ban_time": "10m"},
        },
        "limits": {
            "max_packet_size": "4MB",
            "max_queued_messages": 100_000_000,
            "max_inflight": 64,
            "session_expiry": "12h",
            "max_topic_levels": 64,
            "max_subscriptions": 10_000_000,
            "max_clientid_length": 65_535,
            "max_retained_messages": 7000,
        },
        "listeners": {
            "tcp": {"bind": "127.0.0.1:1883", "max_connections": 50000, "max_connection_rate": 200.0},
            "tls": {
                "bind": "0.0.0.0:8883",
                "certificate": f"{etc}/certs/server.pem",
                "key": f"{etc}/certs/server.key",
                "client_ca": f"{etc}/certs/ca.pem",
                "verify": "require",
                "tls_min": "1.3",
                "username_from": "cn",
            },
            "ws": {"bind": "127.0.0.1:8083", "path": "/mqtt"},
        },
        "auth": {
            "postgresql": {
                "dsn": "postgresql://emqx@db.plant.example:5432/mqtt",
                "password": "db-s3cret",
                "tls": True,
                "tables": "emqx",
                "authenticate": "SELECT password_hash, salt, is_superuser FROM mqtt_user WHERE username = ${username} "
                "LIMIT 1",
                "authorize": "SELECT permission, action, topic FROM mqtt_acl WHERE username = ${username}",
                "password_hash": {"name": "sha256", "salt_position": "suffix"},
                "pool": 4,
                "timeout": "5s",
            },
            "jwt": {
                "secret": "0123456789-jwt-s3cret-0123456789",
                "token_in": "password",
                "claims": {"sub": "${username}"},
                "require_expiry": False,
            },
            "rules": {"kind": "file", "rules": f"{etc}/acl.conf"},
        },
        "bridges": {
            "hq": {
                "kind": "mqtt",
                "servers": ["mqtt://hq.example.com:1883"],
                "protocol": "5",
                "username": "plant",
                "password": "hq-s3cret",
                "allow_cleartext": True,
                "clean_session": False,
                "keep_alive": "30s",
                "topics": [{"filter": "telemetry/#", "remote_prefix": "plant/", "direction": "out", "qos": 1}],
            }
        },
        "sinks": {
            "readings": {
                "kind": "kafka",
                "filters": ["telemetry/#"],
                "servers": ["127.0.0.1:9092"],
                "topic": "readings",
                "key": "${clientid}",
                "value": "${payload}",
            }
        },
    }


def test_what_has_no_equivalent_is_named_with_its_line_and_nothing_else(plant: Imported) -> None:
    hot = number_of(PLANT, "rules.hot")
    wanted = [
        (number_of(PLANT, "cookie"), "node.cookie"),
        (number_of(PLANT, "cluster.name"), "cluster.name"),
        (number_of(PLANT, "acceptors"), "listeners.tcp.default.acceptors"),
        (number_of(PLANT, "upgrade_qos"), "mqtt.upgrade_qos"),
        (hot, "rule_engine.rules.hot.sql"),
        (hot, "rule_engine.rules.hot.actions"),
        (number_of(PLANT, "dashboard"), "dashboard.listeners.http.bind"),
    ]
    assert plant.lost_at == [[str(line), key] for line, key in wanted]


def test_secrets_are_for_the_owner_alone_and_never_printed(plant: Imported) -> None:
    plant.hides("s3cret", "20-auth-postgresql.toml", "20-auth-jwt.toml", "40-bridge-hq.toml")
    assert "kept-out-of-sight" not in plant.stdout + "".join(plant.written.values())


LISTENERS: list[tuple[str, str, Any]] = [
    ('listeners.tcp.default.bind = "127.0.0.1:1884"', "tcp.bind", "127.0.0.1:1884"),
    ("listeners.tcp.default.bind = 1884", "tcp.bind", "*:1884"),
    ('listeners.tcp.default.bind = ":1884"', "tcp.bind", "*:1884"),
    ('listeners.tcp.default.bind = "[::1]:1884"', "tcp.bind", "[::1]:1884"),
    ("listeners.tcp.default.bind = 1884", "tcp.allow_cleartext", True),
    ('listeners.tcp.two { bind = "127.0.0.1:2" }', "tcp-two.kind", "tcp"),
    ('listeners.tcp.two { bind = "127.0.0.1:2", max_connections = infinity }', "tcp-two.max_connections", 10_000_000),
    ('listeners.tcp.two { bind = "127.0.0.1:2", max_conn_rate = infinity }', "tcp-two.max_connection_rate", None),
    ('listeners.tcp.two { bind = "127.0.0.1:2", max_conn_rate = "60/m" }', "tcp-two.max_connection_rate", 1.0),
    ('listeners.tcp.two { bind = "127.0.0.1:2", max_conn_rate = "5/10s" }', "tcp-two.max_connection_rate", 0.5),
    ('listeners.tcp.two { bind = "127.0.0.1:2", enable = false }', "tcp-two.enabled", False),
    (
        'listeners.tcp.two { bind = "127.0.0.1:2", enable_authn = quick_deny_anonymous }',
        "tcp-two.allow_anonymous",
        False,
    ),
    ('listeners.tcp.two { bind = "127.0.0.1:2", enable_authn = false }', "tcp-two.allow_anonymous", True),
    ('listeners.ws.two { bind = "127.0.0.1:2", websocket.mqtt_path = "/x" }', "ws-two.path", "/x"),
    (
        'listeners.ws.two { bind = "127.0.0.1:2", websocket { check_origin_enable = true, '
        'check_origins = "https://a.example, https://b.example", allow_origin_absence = false } }',
        "ws-two.origins",
        ["https://a.example", "https://b.example"],
    ),
]


@pytest.mark.parametrize(("text", "path", "value"), LISTENERS)
def test_listeners(run: Import, text: str, path: str, value: Any) -> None:
    done = run("emqx", text if "default" in text else f"{EMQX5}{text}\n")
    assert done.code == 0, done.stderr
    assert done.at(f"listeners.{path}") == value
    assert done.check() == (0, "")


def test_listeners_that_were_deleted_in_the_dashboard_are_not_opened(run: Import) -> None:
    text = (
        'listeners.tcp { default = marked_for_deletion, two { bind = "127.0.0.1:2" } }\n'
        "listeners.ws.default = marked_for_deletion\nconnectors.mqtt.hq = marked_for_deletion\n"
    )
    done = run("emqx", text)
    assert done.code == 0, done.stderr
    assert list(done.at("listeners")) == ["tcp-two"]
    assert done.lost_keys == ["authentication"]
    assert done.check() == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "listeners.tcp.default = marked_for_deletion\nlisteners.ws.default = marked_for_deletion\n",
        "listeners.tcp.default.enable = false\nlisteners.ws.default.enable = false\n",
    ],
)
def test_where_every_listener_is_off_none_is_opened(run: Import, text: str) -> None:
    done = run("emqx", text)
    assert done.at("listeners") == {"tcp": {"bind": "127.0.0.1:1883", "enabled": False}}
    done.sound()


def test_listeners_nobody_wrote_are_those_emqx_opens(run: Import) -> None:
    done = run("emqx", "mqtt.max_packet_size = 2MB\n")
    assert done.at("listeners") == {
        "tcp": {"bind": "*:1883", "allow_cleartext": True},
        "ws": {"bind": "*:8083", "allow_cleartext": True},
    }
    assert done.check() == (0, "")


@pytest.mark.parametrize(
    "line",
    ['mountpoint = "dev/"', "proxy_protocol = true", 'access_rules = ["deny all"]'],
)
def test_a_listener_that_would_do_something_else_is_turned_off(run: Import, line: str) -> None:
    done = run("emqx", f'{EMQX5}listeners.tcp.two {{ bind = "127.0.0.1:2"\n{line} }}\n')
    assert done.at("listeners.tcp-two.enabled") is False
    key = line.split(" =")[0]
    assert [row.split(": ")[:2] for row in done.lost if key in row] == [["4", f"listeners.tcp.two.{key}"]]
    assert done.check() == (0, "")


def test_an_encrypted_key_turns_its_listener_off(run: Import, tls: servers.Certificates) -> None:
    files = {"cert.pem": tls.server.read_text(), "key.pem": tls.server_key.read_text()}
    options = 'ssl_options { certfile = "cert.pem", keyfile = "key.pem", password = "key-s3cret" }'
    done = run("emqx", f"{EMQX5}listeners.ssl.default {{ bind = 8883\n{options} }}\n", files)
    assert done.at("listeners.tls.enabled") is False
    assert "s3cret" not in done.stdout
    assert done.check() == (0, "")


ADDRESSES = [
    ('["allow all"]', None),
    ('["deny 10.6.0.0/16", "allow all"]', {"kind": "address", "deny": ["10.6.0.0/16"]}),
    ('["allow 10.0.0.0/8", "deny all"]', {"kind": "address", "allow": ["10.0.0.0/8"]}),
    (
        '["allow 10.6.0.0/17", "deny 10.6.0.0/16", "allow all"]',
        {"kind": "address", "deny": ["10.6.128.0/17"]},
    ),
    (
        '["allow 10.6.0.0/16", "deny 10.6.1.0/24", "allow all"]',
        None,
    ),
    (
        '["deny 10.6.0.0/16", "allow 10.0.0.0/8", "deny all"]',
        {"kind": "address", "allow": ["10.0.0.0/8"], "deny": ["10.6.0.0/16"]},
    ),
]


@pytest.mark.parametrize(("rules", "wanted"), ADDRESSES)
def test_rules_about_addresses_hold_for_their_listener(run: Import, rules: str, wanted: dict[str, Any] | None) -> None:
    database = "authentication = [{ mechanism = password_based, backend = mysql, server = localhost, username = u }]\n"
    done = run("emqx", f'{EMQX5}{database}listeners.tcp.two {{ bind = "127.0.0.1:2", access_rules = {rules} }}\n')
    assert done.at("auth.tcp-two-addresses") == wanted
    assert done.at("listeners.tcp-two.auth") == (["tcp-two-addresses", "mysql"] if wanted else None)
    assert done.at("access.order") == ["mysql"]
    assert done.check() == (0, "")


def test_a_rule_about_no_network_does_not_open_its_listener(run: Import) -> None:
    done = run("emqx", f'{EMQX5}listeners.tcp.two {{ bind = "127.0.0.1:2", access_rules = ["deny 10.0.0.0/99"] }}\n')
    assert done.at("listeners.tcp-two.enabled") is False
    assert done.check() == (0, "")


LIMITS: list[tuple[str, str, Any]] = [
    ("mqtt.idle_timeout = 20s", "limits.connect_timeout", "20s"),
    ("mqtt.max_clientid_len = 100", "limits.max_clientid_length", 100),
    ("mqtt.max_inflight = 5", "limits.max_inflight", 5),
    ("mqtt.max_inflight = 0", "limits.max_inflight", 65_535),
    ('flapping_detect.enable = "true"', "access.flapping_detect.enable", True),
    ("mqtt.max_mqueue_len = 0", "limits.max_queued_messages", 100_000_000),
    ("mqtt.max_mqueue_len = 5", "limits.max_queued_messages", 5),
    ("mqtt.max_subscriptions = infinity", "limits.max_subscriptions", 10_000_000),
    ("mqtt.max_subscriptions = 5", "limits.max_subscriptions", 5),
    ("mqtt.max_topic_alias = 5", "limits.topic_alias_maximum", 5),
    ("mqtt.session_expiry_interval = 1d", "limits.session_expiry", "1d"),
    ("mqtt.strict_mode = false", "limits.strict", False),
    ("mqtt.shared_subscription_strategy = hash_clientid", "limits.shared_strategy", "hash"),
    ("mqtt.retain_available = false", "limits.max_retained_messages", 0),
    ("retainer.enable = false", "limits.max_retained_messages", 0),
    ("retainer.backend.max_retained_messages = 0", "limits.max_retained_messages", None),
    ("authorization.no_match = deny", "access.no_match", "deny"),
    ("authorization.deny_action = ignore", "access.deny_action", "ignore"),
]


@pytest.mark.parametrize(("line", "path", "value"), LIMITS)
def test_limits(run: Import, line: str, path: str, value: Any) -> None:
    done = run("emqx", f"{EMQX5}{line}\n")
    assert done.code == 0, done.stderr
    assert done.at(path) == value
    assert not [row for row in done.lost if line.split(" =")[0] in row]
    assert done.check() == (0, "")


def test_a_value_we_cannot_take_is_told_and_left_out(run: Import) -> None:
    """C-20"""
    done = run("emqx", f"{EMQX5}mqtt.max_clientid_len = 5\n")
    assert [row for row in done.lost if "max_clientid_len" in row] == [
        "3: mqtt.max_clientid_len: must be between 23 and 65535, not 5"
    ]
    assert done.check() == (0, "")


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("listeners {", "1: a brace { is opened and never closed"),
        ("mqtt.max_inflight = many", "1: mqtt.max_inflight is a whole number"),
        ("mqtt.max_packet_size = big", "1: mqtt.max_packet_size is a size such as 1MB"),
        ("\nmqtt.session_expiry_interval = long", "2: mqtt.session_expiry_interval is a duration such as 30s"),
        ("listeners.tcp.default.bind = here", "1: listeners.tcp.default.bind is a port or an address with a port"),
        ("listeners.tcp.default.enable = perhaps", "1: listeners.tcp.default.enable is true or false"),
        (
            'listeners.tcp.default { bind = 1883, max_conn_rate = "fast" }',
            "1: listeners.tcp.default.max_conn_rate is a rate such as 1000/s",
        ),
        (
            'listeners.tcp.default { bind = 1883, max_conn_rate = "1/0s" }',
            "1: listeners.tcp.default.max_conn_rate is a rate such as 1000/s",
        ),
    ],
)
def test_what_cannot_be_understood_is_named_with_file_and_line(run: Import, text: str, wanted: str) -> None:
    run("emqx", f"{text}\n").refused(wanted)


def test_nothing_is_overwritten(run: Import) -> None:
    first = run("emqx", EMQX5)
    before = first.written
    again = run("emqx", EMQX5)
    assert (first.code, again.code) == (0, 2)
    assert again.stderr == f"{again.conf}/00-broker.toml: is there already; nothing was written\n"
    assert again.written == before
