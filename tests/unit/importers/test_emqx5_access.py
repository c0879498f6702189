"""Who may connect and what they may do, as EMQX 5 says it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.importers.imported import EMQX5, Import

BACKENDS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "backend = mysql, server = localhost, username = u, password = p, database = d\n"
        'query = "SELECT password_hash, salt FROM mqtt_user where username = ${username} LIMIT 1"\n'
        "password_hash_algorithm { name = bcrypt, salt_rounds = 10 }",
        "mysql",
        {
            "dsn": "mysql://u@localhost:3306/d",
            "password": "p",
            "tables": "emqx",
            "authenticate": "SELECT username, password_hash, salt FROM mqtt_user where username = ${username} LIMIT 1",
            "authorize": "",
            "password_hash": {"name": "bcrypt"},
        },
    ),
    (
        'backend = mysql, server = "db.example:3307", username = "u@x", database = d\n'
        'query = "SELECT password_hash FROM t WHERE concat(username, ${clientid}) = 1"',
        "mysql",
        {
            "dsn": "mysql://u%40x@db.example:3307/d",
            "allow_cleartext": True,
            "tables": "emqx",
            "exact_name": False,
            "authenticate": "SELECT password_hash FROM t WHERE concat(username, ${clientid}) = 1",
            "authorize": "",
        },
    ),
    (
        "backend = mongodb, mongo_type = rs, servers = \"127.0.0.1:27017,[::1]:27018\", replica_set_name = rs0\n"
        "database = mqtt, collection = users, filter { username = \"${username}\" }\n"
        "username = u, password = p, password_hash_field = hash, salt_field = grain, is_superuser_field = super\n"
        "password_hash_algorithm { name = pbkdf2, mac_fun = sha256, iterations = 1000, dk_length = 32 }",
        "mongodb",
        {
            "servers": ["127.0.0.1:27017", "[::1]:27018"],
            "replica_set": "rs0",
            "database": "mqtt",
            "username": "u",
            "password": "p",
            "auth_source": "mqtt",
            "user_collection": "users",
            "user_filter": {"username": "${username}"},
            "password_field": "hash",
            "salt_field": "grain",
            "superuser_field": "super",
            "acl_collection": "",
            "password_hash": {"name": "pbkdf2", "mac_fun": "sha256", "iterations": 1000, "dk_length": 32},
        },
    ),
    (
        "backend = redis, redis_type = sentinel, servers = \"127.0.0.1:26379\", sentinel = mymaster, database = 1\n"
        'password = p, cmd = "HMGET mqtt_user:${username} password_hash salt"\n'
        "password_hash_algorithm { name = plain, salt_position = disable }",
        "redis",
        {
            "mode": "sentinel",
            "servers": ["127.0.0.1:26379"],
            "master": "mymaster",
            "database": 1,
            "password": "p",
            "auth_cmd": "HMGET mqtt_user:${username} password_hash salt",
            "acl_cmd": "",
            "password_hash": {"name": "plain", "salt_position": "disable"},
        },
    ),
    (
        'backend = ldap, server = "127.0.0.1", username = "cn=root,dc=x", password = p\n'
        'base_dn = "uid=${username},ou=dev,dc=x", filter = "(objectClass=mqttUser)"\n'
        "method { type = hash, password_attribute = userPassword, is_superuser_attribute = isSuperuser }",
        "ldap",
        {
            "servers": ["ldap://127.0.0.1:389"],
            "tls": "none",
            "bind_dn": "cn=root,dc=x",
            "bind_password": "p",
            "base_dn": "ou=dev,dc=x",
            "user_filter": "(&(objectClass=mqttUser)(uid=${username}))",
            "mode": "hash",
            "password_attribute": "userPassword",
            "superuser_attribute": "isSuperuser",
        },
    ),
    (
        'backend = ldap, server = "ad.example", ssl { enable = true, verify = verify_peer }\n'
        'username = "cn=root,dc=x", password = p\n'
        'base_dn = "ou=dev,dc=x", filter = "(sAMAccountName=${username})"\n'
        'method { type = bind, bind_password = "${password}" }',
        "ldap",
        {
            "servers": ["ldaps://ad.example:636"],
            "bind_dn": "cn=root,dc=x",
            "bind_password": "p",
            "base_dn": "ou=dev,dc=x",
            "user_filter": "(sAMAccountName=${username})",
            "mode": "search_bind",
        },
    ),
    (
        'backend = http, method = post, url = "http://127.0.0.1:8080/auth", request_timeout = 5s, pool_size = 2\n'
        'headers { content-type = "application/x-www-form-urlencoded", X-Key = "k-s3cret" }\n'
        'body { username = "${username}", password = "${password}" }',
        "http",
        {
            "url": "http://127.0.0.1:8080/auth",
            "method": "POST",
            "format": "form",
            "headers": {"X-Key": "k-s3cret"},
            "body": {"username": "${username}", "password": "${password}"},
            "timeout": "5s",
            "pool": 2,
        },
    ),
    (
        'backend = http, method = get, url = "https://auth.example/mqtt"\n'
        'body { username = "${username}", password = "${password}" }',
        "http",
        {
            "url": "https://auth.example/mqtt",
            "method": "GET",
            "format": "json",
            "body": {"username": "${username}", "password": "${password}"},
            "password_in_url": True,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "wanted"), BACKENDS)
def test_backends(run: Import, text: str, name: str, wanted: dict[str, Any]) -> None:
    done = run("emqx", f"{EMQX5}authentication = [{{ mechanism = password_based\n{text} }}]\n")
    assert done.code == 0, done.stderr
    assert done.at(f"auth.{name}") == wanted
    assert done.lost == []
    assert done.at("access.allow_anonymous") is False
    assert done.check() == (0, "")


JWTS: list[tuple[str, dict[str, Any]]] = [
    (
        'secret = "MDEyMzQ1Njc4OS1qd3Qtc2VjcmV0LTAxMjM0NTY3ODk=", secret_base64_encoded = true, from = username',
        {
            "secret": "MDEyMzQ1Njc4OS1qd3Qtc2VjcmV0LTAxMjM0NTY3ODk=",
            "secret_base64": True,
            "token_in": "username",
            "claims": {},
        },
    ),
    (
        'use_jwks = true, endpoint = "https://id.example/certs", refresh_interval = 60, acl_claim_name = rights\n'
        'verify_claims = [{ name = sub, value = "${username}" }, { name = iss, value = plant }]',
        {
            "jwks_url": "https://id.example/certs",
            "jwks_refresh": "60s",
            "claims": {"sub": "${username}", "iss": "plant"},
            "acl_claim": "rights",
        },
    ),
]


@pytest.mark.parametrize(("text", "wanted"), JWTS)
def test_tokens(run: Import, text: str, wanted: dict[str, Any]) -> None:
    done = run("emqx", f"{EMQX5}authentication = [{{ mechanism = jwt\n{text} }}]\n")
    assert done.at("auth.jwt") == {**wanted, "require_expiry": False}
    assert done.lost == []
    assert done.check() == (0, "")


def test_the_built_in_database_becomes_a_file_of_accounts_and_its_users_are_missed(run: Import) -> None:
    text = "authentication = [{ mechanism = password_based, backend = built_in_database, user_id_type = username }]\n"
    done = run("emqx", EMQX5 + text)
    assert done.at("auth.accounts") == {
        "kind": "sqlite",
        "path": "data/accounts.db",
        "create": True,
        "tables": "emqx",
        "authorize": "",
        "password_hash": {"name": "sha256", "salt_position": "suffix"},
    }
    assert done.lost_at == [["3", "authentication.1.backend"]]
    assert done.check() == (0, "")


def test_an_authenticator_there_is_not_lets_nobody_in(run: Import) -> None:
    done = run("emqx", f"{EMQX5}authentication = [{{ mechanism = scram, backend = built_in_database }}]\n")
    assert done.lost_at == [["3", "authentication.1.mechanism"]]
    assert done.at("access.allow_anonymous") is False
    assert done.at("auth") is None
    assert done.check() == (0, "")


@pytest.mark.parametrize("text", ["", "authentication = []\n"])
def test_without_authentication_everybody_is_let_in_that_gives_no_name(run: Import, text: str) -> None:
    done = run("emqx", EMQX5 + text)
    assert done.at("access.allow_anonymous") is True
    assert done.lost_keys == ["authentication"]
    assert done.check() == (0, "")


# rights ---------------------------------------------------------------------------------------------------------------

ACCOUNTS = "authentication = [{ mechanism = password_based, backend = redis, server = localhost }]\n"


def test_rights_of_the_same_server_go_to_its_table(run: Import) -> None:
    source = 'authorization.sources = [{ type = redis, server = localhost, cmd = "HGETALL acl:${username}" }]\n'
    done = run("emqx", EMQX5 + ACCOUNTS + source)
    assert done.at("auth.redis.acl_cmd") == "HGETALL acl:${username}"
    assert done.lost == []
    assert done.at("access.no_match") == "allow"
    assert done.check() == (0, "")


@pytest.mark.parametrize(
    "source",
    [
        'type = redis, server = elsewhere, cmd = "HGETALL acl:${username}"',
        'type = http, url = "http://localhost/acl"',
        "type = built_in_database",
        'type = file, rules = "{allow, all}."',
    ],
)
def test_where_rights_are_lost_what_no_rule_covers_is_denied(run: Import, source: str) -> None:
    done = run("emqx", f"{EMQX5}{ACCOUNTS}authorization {{\nno_match = allow\nsources = [{{ {source} }}] }}\n")
    assert done.at("access.no_match") == "deny"
    assert set(done.lost_keys) >= {"authorization.sources.1.type", "no_match"}
    assert done.check() == (0, "")


def test_rules_that_cannot_be_read_are_not_left_out_silently(run: Import) -> None:
    files = {"acl.conf": '{allow, {username, {re, "^dev-[0-9]+$"}}, all, ["#"]}.\n'}
    done = run("emqx", EMQX5 + ACCOUNTS, files)
    assert done.at("auth.rules.enabled") is False
    assert done.at("access.order") == ["redis"]
    assert done.at("access.no_match") == "deny"
    assert any("regular expressions are not supported" in row for row in done.lost)
    assert done.check() == (0, "")


def test_a_source_that_is_off_is_none(run: Import) -> None:
    done = run("emqx", f"{EMQX5}{ACCOUNTS}authorization.sources = [{{ type = http, enable = false }}]\n")
    assert done.lost == []
    assert done.at("access.no_match") == "allow"


FILE_FIRST = """
authentication = [
  { mechanism = password_based, backend = redis, server = localhost }
  { mechanism = password_based, backend = mysql, server = localhost, username = u }
]
authorization.sources = [%s]
"""
FILE = "{ type = file, path = acl.conf }"
REDIS = '{ type = redis, server = localhost, cmd = "HGETALL acl:${username}" }'
MYSQL = '{ type = mysql, server = localhost, query = "select permission, action, topic from mqtt_acl" }'
ORDERS = [
    ([FILE, REDIS, MYSQL], ["rules", "redis", "mysql"]),
    ([REDIS, FILE, MYSQL], ["redis", "rules", "mysql"]),
    ([REDIS, MYSQL, FILE], ["redis", "mysql", "rules"]),
    ([MYSQL, REDIS, FILE], ["redis", "mysql", "rules"]),
    ([FILE], ["redis", "mysql", "rules"]),
]


@pytest.mark.parametrize(("sources", "order"), ORDERS)
def test_rules_are_asked_where_they_were_asked(run: Import, sources: list[str], order: list[str]) -> None:
    """The first source with an answer decides, with EMQX and here."""
    done = run("emqx", EMQX5 + FILE_FIRST % ", ".join(sources), {"acl.conf": "{allow, all}.\n"})
    assert done.at("access.order") == order
    assert done.lost == []
    assert done.check() == (0, "")


def test_an_order_that_cannot_be_kept_is_told(run: Import) -> None:
    done = run("emqx", EMQX5 + FILE_FIRST % f"{MYSQL}, {FILE}, {REDIS}", {"acl.conf": "{allow, all}.\n"})
    assert done.at("access.order") == ["rules", "redis", "mysql"]
    assert done.lost_keys == ["authorization.sources.2.path"]
    assert "after those of mysql" in done.lost[0]


SECRETS = [
    'backend = http, url = "https://u:very-s3cret@auth.example/a", body { username = "${username}" }',
    'backend = http, url = "https://auth.example/a?key=very-s3cret", body { username = "${username}" }',
    'backend = http, url = "https://auth.example/a", body { username = "${username}", key = very-s3cret }',
]


@pytest.mark.parametrize("url", ["ftp://u:very-s3cret@h/", "http://u:very-s3cret@h/${nothing}", "ftp://h/?very-s3cret"])
def test_what_check_says_of_an_address_does_not_show_its_secret(run: Import, url: str) -> None:
    text = f'backend = http, url = "{url}", body {{ username = "${{username}}" }}'
    done = run("emqx", f"{EMQX5}authentication = [{{ mechanism = password_based, {text} }}]\n")
    assert done.at("auth.http.enabled") is False
    done.hides("very-s3cret", "20-auth-http.toml")


@pytest.mark.parametrize("text", SECRETS)
def test_addresses_and_bodies_may_hold_secrets(run: Import, text: str) -> None:
    done = run("emqx", f"{EMQX5}authentication = [{{ mechanism = password_based, {text} }}]\n")
    done.hides("very-s3cret", "20-auth-http.toml")


# listeners that ask others --------------------------------------------------------------------------------------------

OWN = """\
listeners.tcp.panel {
  bind = "127.0.0.1:1884"
  authentication = [{ mechanism = password_based, backend = mysql, server = localhost, username = u }]
}
"""


def test_a_listener_with_authentication_of_its_own_asks_nobody_else(run: Import) -> None:
    done = run("emqx", EMQX5 + ACCOUNTS + OWN, {"acl.conf": "{allow, all}.\n"})
    assert done.at("access.order") == ["redis", "rules"]
    assert done.at("listeners.tcp-panel.auth") == ["mysql", "rules"]
    assert done.at("listeners.tcp.auth") is None
    assert done.check() == (0, "")


def test_and_where_nobody_else_is_asked_the_others_stay_open(run: Import) -> None:
    done = run("emqx", EMQX5 + OWN)
    assert done.at("access.order") == []
    assert done.at("listeners.tcp-panel.auth") == ["mysql"]
    assert done.at("listeners.tcp-panel.allow_anonymous") is False
    assert done.at("listeners.tcp.allow_anonymous") is True
    assert done.check() == (0, "")


def test_durations_that_are_numbers_are_milliseconds(run: Import) -> None:
    text = "mqtt.idle_timeout = 15000\nmqtt.session_expiry_interval = 7200\n"
    done = run("emqx", EMQX5 + text + "flapping_detect { enable = true, window_time = 60000, ban_time = 300000 }\n")
    assert done.at("limits.connect_timeout") == "15000ms"
    assert done.at("limits.session_expiry") == "7200s"
    assert done.at("access.flapping_detect") == {"enable": True, "window_time": "60000ms", "ban_time": "300000ms"}
    assert done.check() == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "authentication = [{ mechanism = password_based, backend = redis, server = 127.0.0.1:6380 }]\n",
        "authentication { mechanism = password_based, backend = redis, server = 127.0.0.1:6380 }\n",
        "authentication.1 { mechanism = password_based, backend = redis, server = 127.0.0.1:6380 }\n",
        "authentication.1.mechanism = password_based\nauthentication.1.backend = redis\n"
        "authentication.1.server = 127.0.0.1:6380\n",
    ],
)
def test_authentication_in_all_its_spellings(run: Import, text: str) -> None:
    done = run("emqx", EMQX5 + text)
    assert done.at("auth.redis") == {"servers": ["127.0.0.1:6380"], "acl_cmd": ""}
    assert done.at("access.allow_anonymous") is False
    assert done.lost == []
    assert done.check() == (0, "")
