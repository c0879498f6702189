"""What mosquitto-go-auth was told becomes `[auth.*]` on the same tables."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.importers.imported import LISTENER, PASSWORDS, RULES, Import

POSTGRES = """\
auth_opt_pg_host 127.0.0.1
auth_opt_pg_port 5433
auth_opt_pg_dbname plant
auth_opt_pg_user mosquitto
auth_opt_pg_password db-s3cret
auth_opt_pg_userquery SELECT password_hash FROM account WHERE username = $1 limit 1
auth_opt_pg_superquery SELECT COUNT(*) FROM account WHERE username = $1 AND super = 1
auth_opt_pg_aclquery SELECT topic FROM acl WHERE (username = $1) AND rw = $2
auth_opt_hasher pbkdf2
"""
MYSQL = """\
auth_opt_mysql_host db.example.com
auth_opt_mysql_dbname plant
auth_opt_mysql_user mosquitto
auth_opt_mysql_password db-s3cret
auth_opt_mysql_sslmode true
auth_opt_mysql_userquery SELECT pw FROM users WHERE username = ? limit 1
auth_opt_mysql_aclquery SELECT topic FROM acls WHERE username = ? AND rw >= ?
"""
BACKENDS: list[tuple[str, str, dict[str, Any]]] = [
    (
        f"auth_opt_backends postgres\n{POSTGRES}",
        "postgresql",
        {
            "dsn": "postgresql://mosquitto@127.0.0.1:5433/plant",
            "password": "db-s3cret",
            "password_hash": "auto",
            "authenticate": "select password_hash from account WHERE username = ${username} limit 1",
            "superuser": "SELECT COUNT(*) FROM account WHERE username = ${username} AND super = 1",
            "authorize": "select topic as topic, rw as access from acl where (username = ${username})",
            "acc_style": "go-auth",
        },
    ),
    (
        f"plugin_opt_backends mysql\n{MYSQL.replace('auth_opt', 'plugin_opt')}",
        "mysql",
        {
            "dsn": "mysql://mosquitto@db.example.com:3306/plant",
            "password": "db-s3cret",
            "tls": True,
            "password_hash": "auto",
            "authenticate": "select pw as password from users WHERE username = ${username} limit 1",
            "exact_name": False,
            "authorize": "select topic as topic, rw as access from acls where username = ${username}",
            "acc_style": "go-auth",
        },
    ),
    (
        "auth_opt_backends sqlite\nauth_opt_sqlite_source users.db\n"
        "auth_opt_sqlite_userquery select password from account where username = ?\n",
        "sqlite",
        {
            "path": "users.db",
            "password_hash": "auto",
            "authenticate": "select password from account where username = ${username}",
            "authorize": "",
        },
    ),
    (
        "auth_opt_backends files\nauth_opt_files_password_path passwd\nauth_opt_files_acl_path rules\n",
        "files",
        {"kind": "file", "passwords": "passwd", "rules": "rules"},
    ),
]


@pytest.mark.parametrize(("options", "name", "wanted"), BACKENDS)
def test_backends(run: Import, options: str, name: str, wanted: dict[str, Any]) -> None:
    files = {"passwd": PASSWORDS, "rules": RULES}
    done = run("mosquitto", f"plugin /usr/lib/go-auth.so\n{options}{LISTENER}", files)
    assert done.code == 0, done.stderr
    etc = done.source.parent
    paths = {key: str(etc / wanted[key]) for key in ("path", "passwords", "rules") if key in wanted}
    assert done.at(f"auth.{name}") == wanted | paths
    assert done.lost == []
    assert done.at("access") == {"allow_anonymous": False, "no_match": "deny"}
    assert "s3cret" not in done.stdout
    assert done.check() == (0, "")


def test_redis(run: Import) -> None:
    options = "auth_opt_backends redis\nauth_opt_redis_port 6380\nauth_opt_redis_db 2\nauth_opt_redis_password p\n"
    done = run("mosquitto", f"auth_plugin /usr/lib/go-auth.so\n{options}{LISTENER}")
    assert done.at("auth.redis") == {
        "mode": "single",
        "servers": ["localhost:6380"],
        "database": 2,
        "password": "p",
        "password_hash": "auto",
        "auth_cmd": "GET ${username}",
        "super_cmd": "GET ${username}:su",
        "acl_cmd": "",
        "acl_sets": {
            "${username}:racls": "subscribe",
            "${username}:wacls": "publish",
            "${username}:rwacls": "all",
            "${username}:sacls": "subscribe",
        },
    }
    assert done.lost_at == [["2", "auth_opt_backends"]]
    assert done.check() == (0, "")


def test_backends_are_asked_in_their_order_after_the_files(run: Import) -> None:
    options = f"auth_opt_backends redis, postgres\n{POSTGRES}"
    text = f"plugin /usr/lib/go-auth.so\n{options}password_file passwd\n{LISTENER}"
    done = run("mosquitto", text, {"passwd": PASSWORDS})
    assert done.at("access.order") == ["accounts", "redis", "postgresql"]
    assert done.check() == (0, "")


@pytest.mark.parametrize("name", ["disable_superuser", "pg_disable_superuser"])
def test_where_nobody_was_a_superuser_nobody_is(run: Import, name: str) -> None:
    options = f"auth_opt_backends postgres, redis\n{POSTGRES}auth_opt_{name} true\n"
    done = run("mosquitto", f"plugin /usr/lib/go-auth.so\n{options}{LISTENER}")
    assert done.at("auth.postgresql.superuser") is None
    assert (done.at("auth.redis.super_cmd") is None) is (name == "disable_superuser")
    assert not [row for row in done.lost if "superuser" in row]
    assert done.check() == (0, "")


@pytest.mark.parametrize(("mode", "told"), [("require", True), ("verify-ca", False), ("verify-full", False)])
def test_a_certificate_that_was_not_verified_is_now_and_that_is_told(run: Import, mode: str, told: bool) -> None:
    options = f"auth_opt_backends postgres\nauth_opt_pg_host db.example\nauth_opt_pg_sslmode {mode}\n"
    done = run("mosquitto", f"plugin /usr/lib/go-auth.so\n{options}{LISTENER}")
    assert done.at("auth.postgresql.tls") is True
    assert done.lost_at == ([["4", "auth_opt_pg_sslmode"]] if told else [])
    assert done.check() == (0, "")


def test_backends_there_are_not_and_other_options_are_told(run: Import) -> None:
    options = "auth_opt_backends grpc, files\nauth_opt_grpc_host x\nauth_opt_files_password_path passwd\n"
    text = f"auth_plugin /usr/lib/go-auth.so\n{options}auth_opt_cache true\n{LISTENER}"
    done = run("mosquitto", text, {"passwd": PASSWORDS})
    assert list(done.at("auth")) == ["files"]
    assert done.lost_at == [
        ["2", "auth_opt_backends"],
        ["3", "auth_opt_grpc_host"],
        ["5", "auth_opt_cache"],
    ]
    assert done.check() == (0, "")


def test_rights_asked_for_in_another_way_are_told(run: Import) -> None:
    query = "auth_opt_pg_aclquery SELECT topic FROM acl JOIN account USING (id) WHERE username = $1 AND rw >= $2"
    options = f"auth_opt_backends postgres\n{POSTGRES.splitlines()[0]}\n{query}\n"
    done = run("mosquitto", f"auth_plugin /usr/lib/go-auth.so\n{options}{LISTENER}")
    assert done.at("auth.postgresql.authorize") == ""
    assert done.lost_at == [["4", "auth_opt_pg_aclquery"]]


def test_a_listener_that_loads_it_asks_it(run: Import) -> None:
    text = (
        "per_listener_settings true\nlistener 1883 127.0.0.1\nplugin /usr/lib/go-auth.so\n"
        f"auth_opt_backends postgres\n{POSTGRES}listener 1884 127.0.0.1\nallow_anonymous true\n"
    )
    done = run("mosquitto", text)
    assert {name: table["auth"] for name, table in done.at("listeners").items()} == {
        "tcp": ["postgresql"],
        "tcp-1884": ["everything"],
    }
    assert done.check() == (0, "")


def test_listeners_that_tell_it_different_things_ask_different_backends(run: Import) -> None:
    """C-10"""
    text = (
        "per_listener_settings true\nlistener 1883 127.0.0.1\nplugin /usr/lib/go-auth.so\n"
        f"auth_opt_backends postgres\n{POSTGRES}listener 1884 127.0.0.1\nplugin /usr/lib/go-auth.so\n"
        "auth_opt_backends redis\n"
    )
    done = run("mosquitto", text)
    assert done.at("listeners.tcp.auth") == ["postgresql"]
    assert done.at("listeners.tcp-1884.auth") == ["redis"]
    assert done.check() == (0, "")
