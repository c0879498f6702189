"""The `key = value` files of EMQ 2 to EMQX 4, plug-ins included, become fragments that mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.importers.flat import read_flat
from tests import servers
from tests.unit.importers.imported import EMQX_BROKER, Import, Imported, number_of, tls_files

ACL = """\
{allow, {user, "dashboard"}, subscribe, ["$SYS/#"]}.
{deny, all, subscribe, ["$SYS/#", {eq, "#"}]}.
{allow, all}.
"""

PLANT = """\
##--------------------------------------------------------------------
## EMQX 4.4, the plant
##--------------------------------------------------------------------
node.name = emqx@10.20.0.5
node.cookie = kept-out-of-sight
cluster.discovery = manual
log.level = warning

allow_anonymous = false
acl_nomatch = deny
acl_file = etc/acl.conf
enable_acl_cache = on
acl_deny_action = disconnect
flapping_detect_policy = 30, 1m, 5m

mqtt.max_packet_size = 2MB
mqtt.max_clientid_len = 1024
mqtt.max_topic_levels = 0
mqtt.max_qos_allowed = 2
mqtt.retain_available = true

zone.external.idle_timeout = 15s
zone.external.max_inflight = 16
zone.external.max_mqueue_len = 500
zone.external.mqueue_store_qos0 = true
zone.external.session_expiry_interval = 4h
zone.external.enable_flapping_detect = on
zone.external.upgrade_qos = on
zone.internal.allow_anonymous = true

listener.tcp.external = 127.0.0.1:1883
listener.tcp.external.acceptors = 8
listener.tcp.external.max_connections = 1000
listener.tcp.external.max_conn_rate = 500
listener.tcp.external.zone = external
listener.tcp.external.access.1 = deny 10.6.0.0/16
listener.tcp.external.access.2 = allow all
listener.tcp.internal = 127.0.0.1:11883
listener.tcp.internal.zone = internal
listener.ssl.external = 8883
listener.ssl.external.keyfile = etc/certs/server.key
listener.ssl.external.certfile = etc/certs/server.pem
listener.ssl.external.cacertfile = etc/certs/ca.pem
listener.ssl.external.verify = verify_peer
listener.ssl.external.fail_if_no_peer_cert = true
listener.ssl.external.peer_cert_as_username = cn
listener.ssl.external.tls_versions = tlsv1.3,tlsv1.2
listener.ws.external = 127.0.0.1:8083
listener.ws.external.mqtt_path = /mqtt

plugins.etc_dir = etc/plugins/
plugins.loaded_file = data/loaded_plugins
"""

MYSQL = """\
auth.mysql.server = 10.1.2.3:3306
auth.mysql.pool = 8
auth.mysql.username = emq
auth.mysql.password = my#s3cret
auth.mysql.database = mqtt
auth.mysql.auth_query = select password, salt from mqtt_user where username = '%u' limit 1
auth.mysql.password_hash = sha256,salt
auth.mysql.super_query = select is_superuser from mqtt_user where username = '%u' limit 1
auth.mysql.acl_query = select allow, ipaddr, username, clientid, access, topic from mqtt_acl where username = '%u'
auth.mysql.query_timeout = 5s
"""

BRIDGE = """\
bridge.mqtt.hq.address = 127.0.0.1:1884
bridge.mqtt.hq.proto_ver = mqttv4
bridge.mqtt.hq.start_type = auto
bridge.mqtt.hq.client_id = plant-7
bridge.mqtt.hq.clean_start = true
bridge.mqtt.hq.username = plant
bridge.mqtt.hq.password = hq-s3cret
bridge.mqtt.hq.forwards = telemetry/#,events/#
bridge.mqtt.hq.forward_mountpoint = from/${node}/
bridge.mqtt.hq.subscription.1.topic = commands/#
bridge.mqtt.hq.subscription.1.qos = 2
bridge.mqtt.hq.receive_mountpoint = hq/
bridge.mqtt.hq.keepalive = 30s
bridge.mqtt.hq.reconnect_interval = 20s
bridge.mqtt.hq.retry_interval = 10s
bridge.mqtt.hq.max_inflight_size = 32
bridge.mqtt.hq.ssl = off
"""


@pytest.fixture
def plant(run: Import, tls: servers.Certificates) -> Imported:
    files = {
        "acl.conf": ACL,
        "plugins/emqx_auth_mysql.conf": MYSQL,
        "plugins/emqx_auth_http.conf": "auth.http.auth_req = http://127.0.0.1:80/mqtt/auth\n",
        "plugins/emqx_bridge_mqtt.conf": BRIDGE,
        "plugins/emqx_retainer.conf": "retainer.storage_type = disc\nretainer.max_retained_messages = 9000\n",
        "../data/loaded_plugins": (
            "{emqx_auth_mysql, true}.\n{emqx_auth_http, false}.\n{emqx_bridge_mqtt, true}.\nemqx_retainer.\n"
        ),
        **tls_files(tls, "certs/"),
    }
    return run("emqx", PLANT, files)


def test_a_whole_configuration_passes_check_and_means_the_same(plant: Imported) -> None:
    etc = plant.sound()
    assert plant.values == {
        "broker": EMQX_BROKER,
        "access": {
            "allow_anonymous": False,
            "no_match": "deny",
            "deny_action": "disconnect",
            "order": ["mysql", "rules"],
            "flapping_detect": {"enable": True, "max_count": 30, "window_time": "1m", "ban_time": "5m"},
        },
        "limits": {
            "max_packet_size": "2MB",
            "max_clientid_length": 1024,
            "max_topic_levels": 65535,
            "max_inflight": 16,
            "max_queued_messages": 500,
            "connect_timeout": "15s",
            "session_expiry": "4h",
            "max_subscriptions": 10_000_000,
            "max_retained_messages": 9000,
        },
        "listeners": {
            "tcp": {
                "bind": "127.0.0.1:1883",
                "max_connections": 1000,
                "max_connection_rate": 500.0,
                "auth": ["tcp-addresses", "mysql", "rules"],
            },
            "tcp-internal": {"kind": "tcp", "bind": "127.0.0.1:11883", "allow_anonymous": True},
            "tls": {
                "bind": "*:8883",
                "certificate": f"{etc}/certs/server.pem",
                "key": f"{etc}/certs/server.key",
                "client_ca": f"{etc}/certs/ca.pem",
                "verify": "require",
                "tls_min": "1.2",
                "username_from": "cn",
            },
            "ws": {"bind": "127.0.0.1:8083", "path": "/mqtt"},
        },
        "auth": {
            "mysql": {
                "dsn": "mysql://emq@10.1.2.3:3306/mqtt",
                "password": "my#s3cret",
                "allow_cleartext": True,
                "tables": "emq",
                "authenticate": "select username, password, salt from mqtt_user where username = '%u' limit 1",
                "superuser": "select is_superuser from mqtt_user where username = '%u' limit 1",
                "authorize": "select allow, ipaddr, username, clientid, access, topic from mqtt_acl "
                "where username = '%u'",
                "acl_order": "reversed",
                "password_hash": "sha256,salt",
                "pool": 8,
                "timeout": "5s",
            },
            "rules": {"kind": "file", "rules": f"{etc}/acl.conf"},
            "tcp-addresses": {"kind": "address", "deny": ["10.6.0.0/16"]},
        },
        "bridges": {
            "hq": {
                "kind": "mqtt",
                "servers": ["mqtt://127.0.0.1:1884"],
                "protocol": "3.1.1",
                "clientid": "plant-7",
                "username": "plant",
                "password": "hq-s3cret",
                "clean_session": False,
                "keep_alive": "30s",
                "ack_timeout": "10s",
                "restart": {"base": "1s", "cap": "20s"},
                "topics": [
                    {"filter": "telemetry/#", "direction": "out", "qos": 1, "remote_prefix": "from/emqx@10.20.0.5/"},
                    {"filter": "events/#", "direction": "out", "qos": 1, "remote_prefix": "from/emqx@10.20.0.5/"},
                    {"filter": "commands/#", "direction": "in", "qos": 2, "local_prefix": "hq/"},
                ],
            }
        },
    }


def test_what_has_no_equivalent_is_named_with_its_line_and_nothing_else(plant: Imported) -> None:
    wanted = ["node.cookie", "cluster.discovery", "log.level", "enable_acl_cache", "zone.external.upgrade_qos",
              "listener.tcp.external.acceptors"]  # fmt: skip
    own = [row for row in plant.lost if not row.startswith("/")]
    assert [row.split(": ")[:2] for row in own] == [[str(number_of(PLANT, f"^{key} ")), key] for key in wanted]
    (plugin,) = [row for row in plant.lost if row.startswith("/")]
    line = number_of(BRIDGE, "max_inflight_size")
    path = plant.source.parent / "plugins" / "emqx_bridge_mqtt.conf"
    assert plugin.startswith(f"{path}:{line}: bridge.mqtt.hq.max_inflight_size: ")


def test_secrets_are_for_the_owner_alone_and_never_printed(plant: Imported) -> None:
    plant.hides("s3cret", "20-auth-mysql.toml", "40-bridge-hq.toml")


def test_emq_2_says_the_same_in_other_words(run: Import) -> None:
    text = """\
node.name = emq@127.0.0.1
mqtt.allow_anonymous = true
mqtt.acl_nomatch = allow
mqtt.acl_file = etc/acl.conf
mqtt.max_packet_size = 64KB
mqtt.client.idle_timeout = 30s
mqtt.session.max_inflight = 8
mqtt.session.expiry_interval = 3h
mqtt.session.max_subscriptions = 0
mqtt.mqueue.max_length = 300
mqtt.mqueue.store_qos0 = true
mqtt.broker.sys_interval = 1m
listener.tcp.external = 127.0.0.1:1883
listener.tcp.external.max_clients = 1024
"""
    done = run("emqx", text, {"acl.conf": ACL})
    assert done.code == 0, done.stderr
    assert done.at("limits") == {
        "max_packet_size": "64KB",
        "connect_timeout": "30s",
        "max_inflight": 8,
        "session_expiry": "3h",
        "max_subscriptions": 10_000_000,
        "max_queued_messages": 300,
        "max_clientid_length": 65_535,
    }
    assert done.at("access") == {"allow_anonymous": True, "no_match": "allow", "order": ["rules"]}
    assert done.at("listeners.tcp.max_connections") == 1024
    assert done.lost_keys == ["mqtt.allow_anonymous", "mqtt.broker.sys_interval"]
    assert done.check() == (0, "")


# plug-ins -------------------------------------------------------------------------------------------------------------

LOCAL = "listener.tcp.external = 127.0.0.1:1883\n"
PLUGINS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "auth.pgsql.server = 127.0.0.1:5432\nauth.pgsql.username = root\nauth.pgsql.password = p\n"
        "auth.pgsql.database = mqtt\nauth.pgsql.ssl = false\nauth.pgsql.password_hash = pbkdf2,sha256,1000,20\n"
        "auth.pgsql.auth_query = select password from mqtt_user where username = '%u' limit 1\n",
        "postgresql",
        {
            "dsn": "postgresql://root@127.0.0.1:5432/mqtt",
            "password": "p",
            "tables": "emq",
            "authenticate": "select password from mqtt_user where username = '%u' limit 1",
            "authorize": "",
            "password_hash": "pbkdf2,sha256,1000,20",
        },
    ),
    (
        "auth.redis.type = cluster\nauth.redis.server = 127.0.0.1:6379,127.0.0.1:6380\nauth.redis.database = 0\n"
        "auth.redis.auth_cmd = HMGET mqtt_user:%u password\nauth.redis.password_hash = plain\n"
        "auth.redis.super_cmd = HGET mqtt_user:%u is_superuser\nauth.redis.acl_cmd = HGETALL mqtt_acl:%u\n",
        "redis",
        {
            "mode": "cluster",
            "servers": ["127.0.0.1:6379", "127.0.0.1:6380"],
            "database": 0,
            "auth_cmd": "HMGET mqtt_user:%u password",
            "super_cmd": "HGET mqtt_user:%u is_superuser",
            "acl_cmd": "HGETALL mqtt_acl:%u",
            "password_hash": "plain",
        },
    ),
    (
        "auth.mongo.type = single\nauth.mongo.server = 127.0.0.1:27017\nauth.mongo.login = u\nauth.mongo.password = p\n"
        "auth.mongo.auth_source = admin\nauth.mongo.database = mqtt\nauth.mongo.auth_query.collection = mqtt_user\n"
        "auth.mongo.auth_query.password_field = password,salt\nauth.mongo.auth_query.password_hash = sha256,salt\n"
        "auth.mongo.auth_query.selector = username=%u, clientid=%c\nauth.mongo.super_query.collection = mqtt_user\n"
        "auth.mongo.super_query.super_field = is_superuser\nauth.mongo.acl_query.collection = mqtt_acl\n"
        "auth.mongo.acl_query.selector = username=%u\n",
        "mongodb",
        {
            "servers": ["127.0.0.1:27017"],
            "username": "u",
            "password": "p",
            "auth_source": "admin",
            "database": "mqtt",
            "user_collection": "mqtt_user",
            "password_field": "password",
            "salt_field": "salt",
            "password_hash": "sha256,salt",
            "user_filter": {"username": "${username}", "clientid": "${clientid}"},
            "superuser_field": "is_superuser",
            "acl_collection": "mqtt_acl",
            "acl_filters": [{"username": "${username}"}],
        },
    ),
    (
        "auth.ldap.servers = 127.0.0.1\nauth.ldap.port = 1389\nauth.ldap.bind_dn = cn=root,dc=emqx,dc=io\n"
        "auth.ldap.bind_password = p\nauth.ldap.timeout = 30s\nauth.ldap.device_dn = ou=device,dc=emqx,dc=io\n"
        "auth.ldap.match_objectclass = mqttUser\nauth.ldap.username.attributetype = uid\n"
        "auth.ldap.password.attributetype = userPassword\nauth.ldap.ssl = false\n",
        "ldap",
        {
            "servers": ["ldap://127.0.0.1:1389"],
            "tls": "none",
            "bind_dn": "cn=root,dc=emqx,dc=io",
            "bind_password": "p",
            "base_dn": "ou=device,dc=emqx,dc=io",
            "mode": "hash",
            "user_filter": "(&(objectClass=mqttUser)(uid=${username}))",
            "password_attribute": "userPassword",
            "enabled_attribute": "isEnabled",
            "publish_attribute": "mqttPublishTopic",
            "subscribe_attribute": "mqttSubscriptionTopic",
            "all_attribute": "mqttPubSubTopic",
            "timeout": "30s",
        },
    ),
    (
        "auth.http.auth_req = http://127.0.0.1:80/mqtt/auth\nauth.http.auth_req.method = post\n"
        "auth.http.auth_req.params = clientid=%c,username=%u,password=%P\n"
        "auth.http.super_req = http://127.0.0.1:80/mqtt/superuser\n"
        "auth.http.super_req.method = post\nauth.http.super_req.params = clientid=%c,username=%u\n",
        "http",
        {
            "url": "http://127.0.0.1:80/mqtt/auth",
            "method": "POST",
            "format": "form",
            "body": {"clientid": "${clientid}", "username": "${username}", "password": "${password}"},
            "answers": "status",
            "super_url": "http://127.0.0.1:80/mqtt/superuser",
        },
    ),
    (
        "auth.jwt.secret = 0123456789-0123456789-0123456789\nauth.jwt.from = password\n"
        "auth.jwt.verify_claims = on\nauth.jwt.verify_claims.sub = %u\n",
        "jwt",
        {
            "secret": "0123456789-0123456789-0123456789",
            "token_in": "password",
            "claims": {"sub": "${username}"},
            "require_expiry": False,
        },
    ),
    (
        "auth.user.1.username = panel\nauth.user.1.password = p1\nauth.client.1.clientid = dev-1\n"
        "auth.client.1.password = p2\nauth.user.password_hash = sha256\n",
        "static",
        {"kind": "static", "users": {"panel": {"password": "p1"}}, "clients": {"dev-1": {"password": "p2"}}},
    ),
]


@pytest.mark.parametrize(("text", "name", "wanted"), PLUGINS)
def test_plug_ins(run: Import, text: str, name: str, wanted: dict[str, Any]) -> None:
    done = run("emqx", LOCAL, {"plugins/emqx_auth.conf": text})
    assert done.code == 0, done.stderr
    assert done.at(f"auth.{name}") == wanted
    assert done.lost == []
    assert done.at("access") == {"allow_anonymous": False, "no_match": "deny", "order": [name]}
    assert done.check() == (0, "")


def test_backends_are_asked_in_the_order_in_which_they_were_loaded(run: Import) -> None:
    files = {
        f"plugins/emqx_auth_{name}.conf": f"auth.{name}.server = 127.0.0.1\nauth.{name}.username = u\n"
        for name in ("mysql", "pgsql", "mongo")
    }
    files["loaded_plugins"] = "{emqx_auth_pgsql, true}.\n{emqx_auth_mongo, false}.\n{emqx_auth_mysql, true}.\n"
    done = run("emqx", LOCAL, files)
    assert done.at("access.order") == ["postgresql", "mysql"]
    assert done.check() == (0, "")


def test_a_plug_in_whose_file_is_missing_is_told(run: Import) -> None:
    done = run("emqx", LOCAL, {"loaded_plugins": "emqx_retainer.\n\nemqx_auth_mysql.\n"})
    where = done.source.parent / "loaded_plugins"
    assert done.lost == [
        f"{where}:3: emqx_auth_mysql: is loaded, but there is no plugins/emqx_auth_mysql.conf beside the source"
    ]


MONGO = "auth.mongo.server = 127.0.0.1\nauth.mongo.username = u\nauth.mongo.password = p\n"
MONGOS = [
    ("", "superuser_field", ""),
    ("auth.mongo.super_query.super_field = root\n", "superuser_field", "root"),
    ("auth.mongo.super_query = off\nauth.mongo.super_query.super_field = root\n", "superuser_field", ""),
    ("auth.mongo.super_query = on\n", "superuser_field", None),
    ("auth.mongo.acl_query.collection = acl\n", "acl_collection", "acl"),
    ("auth.mongo.acl_query = off\nauth.mongo.acl_query.collection = acl\n", "acl_collection", ""),
    ("", "auth_source", "mqtt"),
    ("auth.mongo.auth_source = admin\n", "auth_source", "admin"),
]


@pytest.mark.parametrize(("text", "key", "value"), MONGOS)
def test_mongodb_is_asked_what_it_was_asked(run: Import, text: str, key: str, value: str | None) -> None:
    done = run("emqx", LOCAL, {"plugins/emqx_auth_mongo.conf": MONGO + text})
    assert done.at(f"auth.mongodb.{key}") == value
    assert done.lost == []
    assert done.check() == (0, "")


def test_accounts_that_are_in_a_database_of_emqx_are_missed(run: Import) -> None:
    text = "auth.mnesia.password_hash = sha256\nauth.user.1.username = panel\nauth.user.1.password = p\n"
    done = run("emqx", LOCAL, {"plugins/emqx_auth_mnesia.conf": text})
    assert done.lost_keys == ["auth.mnesia.password_hash"]


def test_what_a_service_is_told_is_not_printed(run: Import) -> None:
    text = "auth.http.auth_req = http://127.0.0.1/a?key=s3cret\nauth.http.auth_req.params = user=%u,key=s3%zcret\n"
    done = run("emqx", LOCAL, {"plugins/emqx_auth_http.conf": text})
    assert [row.split(": ", 1)[1] for row in done.lost] == ["auth.http.auth_req.params: key is not told to the service"]
    assert done.mode("20-auth-http.toml") == 0o600
    assert "cret" not in done.stdout + done.stderr


def test_rules_about_addresses_are_numbered(run: Import) -> None:
    rows = {10: "allow all", 9: "deny 10.6.0.0/16", 1: "allow 10.6.0.0/17"}
    text = "".join(f"listener.tcp.external.access.{number} = {rule}\n" for number, rule in rows.items())
    done = run("emqx", LOCAL + text)
    assert done.at("auth.tcp-addresses.deny") == ["10.6.128.0/17"]


def test_flapping_is_detected_by_the_usual_policy_where_none_is_written(run: Import) -> None:
    done = run("emqx", f"{LOCAL}zone.external.enable_flapping_detect = on\n")
    assert done.at("access.flapping_detect") == {
        "enable": True, "max_count": 30, "window_time": "1m", "ban_time": "5m",
    }  # fmt: skip


def test_shared_subscriptions_keep_their_strategy(run: Import) -> None:
    done = run("emqx", f"{LOCAL}broker.shared_subscription_strategy = hash\nmqtt.session.max_inflight = 0\n")
    assert done.at("limits.shared_strategy") == "hash"
    assert done.at("limits.max_inflight") == 65_535
    assert done.lost == []


def test_rights_a_service_judged_topic_by_topic_are_told(run: Import) -> None:
    text = "auth.http.auth_req = http://127.0.0.1/a\nauth.http.acl_req = http://127.0.0.1/b\n"
    done = run("emqx", f"acl_nomatch = allow\n{LOCAL}", {"plugins/emqx_auth_http.conf": text})
    assert done.at("access.no_match") == "deny"
    assert done.lost_keys == ["no_match", "auth.http.acl_req"]
    assert done.check() == (0, "")


def test_a_bridge_between_nodes_is_told(run: Import) -> None:
    done = run("emqx", LOCAL, {"plugins/emqx_bridge_mqtt.conf": "bridge.mqtt.a.address = emqx@10.0.0.1\n"})
    assert done.at("bridges") is None
    assert done.lost_keys == ["bridge.mqtt.a.address"]
    assert done.check() == (0, "")


@pytest.mark.parametrize("absolute", [False, True])
def test_included_files_by_pattern(run: Import, tmp_path: Path, absolute: bool) -> None:
    start = f"{tmp_path}/etc/" if absolute else ""
    done = run("emqx", f"{LOCAL}include {start}more/*.conf\n", {"more/a.conf": "mqtt.max_packet_size = 3MB\n"})
    assert done.at("limits.max_packet_size") == "3MB"


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("gone.conf", "{etc}/gone.conf: cannot be read: No such file or directory"),
        ('""', "{etc}/emqx.conf:2: include: the name of a file is expected, * and ? in its last part"),
        ("**", "{etc}/emqx.conf:2: include: the name of a file is expected, * and ? in its last part"),
        ("emqx.conf", "{etc}/emqx.conf:2: included too deeply"),
    ],
)
def test_what_cannot_be_included(run: Import, what: str, wanted: str) -> None:
    done = run("emqx", f"{LOCAL}include {what}\n")
    assert (done.code, done.stderr) == (2, wanted.format(etc=done.source.parent) + "\n")


def test_included_files(run: Import) -> None:
    done = run("emqx", f"{LOCAL}include limits.conf\n", {"limits.conf": "mqtt.max_packet_size = 3MB\n"})
    assert done.at("limits.max_packet_size") == "3MB"


# the form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("a.b = c", "c"),
        ("a.b=c", "c"),
        ("a.b = c d # comment", "c d"),
        ("a.b = topic/#,other/#", "topic/#,other/#"),
        ('a.b = "quoted # text"', "quoted # text"),
        ("a.b =", ""),
    ],
)
def test_lines(tmp_path: Path, row: str, value: str) -> None:
    path = tmp_path / "emqx.conf"
    path.write_text(f"## head\n\n{row}\n")
    (leaf,) = read_flat(path).leaves()
    assert (leaf.key, leaf.value, leaf.place.line) == ("a.b", value, 3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"{LOCAL}nonsense", "2: expected NAME = VALUE"),
        (f"{LOCAL}a..b = 1", "2: a..b is no name of a setting"),
        ("listener.tcp.external.acceptors = 8", "1: listener.tcp.external: the address of the listener is missing"),
        (
            f"{LOCAL}listener.tcp.external.access.1 = perhaps",
            "2: listener.tcp.external.access.1: write allow or deny, and a network or all",
        ),
        (
            f"{LOCAL}flapping_detect_policy = often",
            "2: flapping_detect_policy is a number and two durations, such as 30, 1m, 5m",
        ),
    ],
)
def test_what_cannot_be_understood_is_named_with_file_and_line(run: Import, text: str, wanted: str) -> None:
    run("emqx", f"{text}\n").refused(wanted)


FORMS = [
    ("zone.external.max_inflight = 5\nlistener.tcp.external = 127.0.0.1:1883\n", True),
    ("mqtt.session.max_inflight = 5\nlistener.tcp.external = 127.0.0.1:1883\n", True),
    ('mqtt.max_inflight = 5\nlisteners.tcp.default.bind = "127.0.0.1:1883"\nlisteners.ws.a.enable = false\n', False),
    (
        'mqtt { max_inflight = 5 }\nlisteners.tcp.default { bind = "127.0.0.1:1883" }\nlisteners.ws.a.enable = false\n',
        False,
    ),
]


@pytest.mark.parametrize(("text", "old"), FORMS)
def test_the_form_is_told_from_the_text(run: Import, text: str, old: bool) -> None:
    done = run("emqx", text)
    assert done.code == 0, done.stderr
    assert done.at("limits.max_inflight") == 5
    assert done.at("listeners.tcp.bind") == "127.0.0.1:1883"
    assert done.at("access.allow_anonymous") is not old, "EMQX 5 lets everybody in where nothing is said"
