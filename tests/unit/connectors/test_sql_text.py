"""SQL with placeholders: what is bound, and what is refused because it could only be pasted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from auth.mysql import MySqlConfig
from auth.postgresql import PostgresConfig
from auth.sqlite import SqliteConfig
from broker.config.template import MissingValue
from broker.connectors.sql_text import Dialect, Statement

NAMES = ("username", "clientid", "peerhost", "cert_common_name")
DIALECTS: tuple[Dialect, ...] = ("postgresql", "mysql", "sqlite")


@pytest.mark.parametrize(
    ("text", "sql", "names"),
    [
        ("select a from t where u = ${username}", "select a from t where u = ?", ["username"]),
        ("select a from t where u = '%u'", "select a from t where u = ?", ["username"]),
        ("select a from t where u = '${username}' limit 1", "select a from t where u = ? limit 1", ["username"]),
        ("select a from t where u=%u and c=%c;", "select a from t where u=? and c=?", ["username", "clientid"]),
        ("select a from t where i = '%a' or n='%C'", "select a from t where i = ? or n=?",
         ["peerhost", "cert_common_name"]),
        ("select '$all' from t where u = %u", "select '$all' from t where u = ?", ["username"]),
        ("select a from t where b like '%cold%' and u in (%u,%u)",
         "select a from t where b like '%cold%' and u in (?,?)", ["username", "username"]),
        ("select 'it''s', \"a b\", `c` from t where u = %u",
         "select 'it''s', \"a b\", `c` from t where u = ?", ["username"]),
        ("select a -- of the user\nfrom t /* all; */ where u = %u", "select a  \nfrom t   where u = ?", ["username"]),
        ("  select 1 where 5 % 3 = 2 ; ", "select 1 where 5 % 3 = 2", []),
        ("with x as (select 1) select a from x where u=lower(${username})",
         "with x as (select 1) select a from x where u=lower(?)", ["username"]),
    ],
)  # fmt: skip
def test_placeholders_become_bound_values(text: str, sql: str, names: list[str]) -> None:
    for dialect in DIALECTS:
        statement = Statement(text, dialect, NAMES)
        expected = sql
        if dialect == "postgresql":
            for number in range(1, len(names) + 1):
                expected = expected.replace("?", f"${number}", 1)
        assert (statement.sql.replace("   ", "  "), list(statement.names)) == (expected.replace("   ", "  "), names)


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("select a from t where u = 'x-%u'", "concat"), ("select a from t where u like '%u%'", "concat"),
        ("select a from t where u like '%${username}%'", "concat"), ("select a from ${username}", "table"),
        ("select a from '%u'", "table"), ("select a from t join %c on 1", "table"),
        ("select a from mqtt_${username} where 1", "touches"), ("select a from t where ${username}_x = 1", "touches"),
        ("select a from t where u = ${username}${clientid}", "touches"), ("select a from t where u = 'a'%u", "touches"),
        ('select a from t where "${username}" = 1', "quotes"), ("select a from t where `%u` = 1", "quotes"),
        ("select a from t -- ${username}\nwhere 1", "quotes"), ("select a /* %u */ from t", "quotes"),
        ("select a from t where u = ${nope}", "${username}, ${clientid}"),
        ("select a from t where u = ${}", "not known"),
        ("select a from t where u = ${password}", "password_hash"), ("select a from t where p = '%P'", "password_hash"),
        ("select 1; drop table t", "more than one"), ("select a from t where u = 'x", "never closed"),
        ("", "no statement"), (";", "no statement"), ("delete from t where u = %u", "reads"),
        ("DROP table t", "reads"), ("/* x */ update t set u = %u", "reads"),
    ],
)  # fmt: skip
def test_a17_what_would_be_pasted_is_refused_and_the_fix_is_named(text: str, say: str) -> None:
    for dialect in DIALECTS:
        with pytest.raises(ValueError) as caught:
            Statement(text, dialect, NAMES)
        assert say in str(caught.value), dialect


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("postgresql", "select $1"), ("mysql", "select ?"), ("sqlite", "select ?1"), ("sqlite", "select :u"),
        ("sqlite", "select @u"),
    ],
)  # fmt: skip
def test_a_drivers_own_placeholders_are_refused(dialect: Dialect, text: str) -> None:
    with pytest.raises(ValueError, match=r"write \$\{username\}"):
        Statement(text, dialect, NAMES)


def test_what_only_one_of_them_understands() -> None:
    assert Statement("select j ? 'a', x::text from t where u = %u::text", "postgresql", NAMES).names == ("username",)
    assert Statement("select $$ it's ; $$, $q$ ' $q$ where u = %u", "postgresql", NAMES).names == ("username",)
    assert Statement(r"select E'it\'s' where u = %u", "postgresql", NAMES).names == ("username",)
    assert Statement(r"select '\\' where u = '%u'", "postgresql", NAMES).names == ("username",)
    assert Statement(r"select 'it\'s ;' where u = '%u'", "mysql", NAMES).names == ("username",)
    assert Statement("select @@version, @x where u = %u # all; of it", "mysql", NAMES).names == ("username",)
    with pytest.raises(ValueError, match="holds a placeholder"):
        Statement("select $$ ${username} $$", "postgresql", NAMES)


def test_values_that_are_missing() -> None:
    statement = Statement("select 1 where %u = %c", "sqlite", NAMES)
    values = {"username": "alice"}
    assert statement.bind(values.get, missing=True) == ["alice", None]
    with pytest.raises(MissingValue, match="clientid"):
        statement.bind(values.get)


@given(st.text(alphabet="su'\"`%{}$\\;-/*# \n=?:@cP1", max_size=30))
def test_a_text_is_understood_or_refused_and_never_pasted(text: str) -> None:
    for dialect in DIALECTS:
        try:
            statement = Statement(f"select 1 where a = {text}", dialect, ("u", "username", "clientid"))
        except ValueError:
            continue
        assert "${u}" not in statement.sql
        own = statement.sql.count("$") if dialect == "postgresql" else statement.sql.count("?")
        assert own >= len(statement.names)


@pytest.mark.parametrize(
    ("options", "say"),
    [
        ({"dsn": "mysql://x/y"}, "postgresql://USER@HOST:5432/DATABASE"),
        ({"dsn": "postgresql://u:hush@127.0.0.1/m"}, "key password"),
        ({"dsn": "postgresql://u@127.0.0.1"}, "name the database"),
        ({"dsn": "postgresql://u@127.0.0.1:x/m"}, "not an address"),
        ({"dsn": "postgresql://u@127.0.0.1/m?sslmode=require"}, "sslmode"),
        ({"dsn": "postgresql://u@db.example.com/m"}, "allow_cleartext"),
        ({"dsn": "postgresql://u@127.0.0.1,db.example.com/m"}, "db.example.com:5432"),
        ({"authenticate": "select password from u"}, "authenticate: needs a placeholder"),
        ({"authenticate": ""}, "authenticate: there is no statement"),
        ({"authorize": "select topic from t where u = '%u/x'"}, "authorize:"),
        ({"password_hash": "rot13"}, "rot13"),
        ({"update": "update u set p = 1 where username = ${username}"}, "upgrade_to"),
        ({"update": "update u set p = 1 where u = ${username}", "upgrade_to": "argon2id"}, "${old_password_hash}"),
        ({"ca": "x.pem", "key": "y.pem"}, "key without certificate"),
        ({"dns": "x"}, "dns"),
    ],
)  # fmt: skip
def test_tables_that_cannot_work_are_refused(options: dict[str, Any], say: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PostgresConfig.model_validate({"dsn": "postgresql://u@127.0.0.1/m", "password": "hush", **options})
    assert say in str(caught.value)
    assert "hush" not in str(caught.value)


def test_where_databases_are() -> None:
    config = PostgresConfig.model_validate({"dsn": "postgresql://m%40x@db1.example.com:5433,db2.example.com,[::1]/m%20q",
                                            "tls": True})  # fmt: skip
    assert [str(server) for server in config.servers] == ["db1.example.com:5433", "db2.example.com:5432", "[::1]:5432"]
    assert (config.user, config.database) == ("m@x", "m q")
    local = MySqlConfig.model_validate({"dsn": "mysql:///m?host=/run/mysqld/mysqld.sock"})
    assert [server.host for server in local.servers] == ["/run/mysqld/mysqld.sock"]
    for loopback in ("localhost", "127.0.0.2", "[::1]"):
        MySqlConfig.model_validate({"dsn": f"mysql://u@{loopback}/m"})
    MySqlConfig.model_validate({"dsn": "mariadb://u@db.example.com/m", "allow_cleartext": True})


def test_defaults_are_statements_in_every_dialect(tmp_path: Any) -> None:
    for kind, way in ((PostgresConfig, {"dsn": "postgresql://u@127.0.0.1/m"}), (MySqlConfig, {"dsn": "mysql://u@127.0.0.1/m"}),
                      (SqliteConfig, {"path": str(tmp_path / "x")})):  # fmt: skip
        for tables in ("emq", "emqx"):
            statements = kind.model_validate({**way, "tables": tables, "upgrade_to": "argon2id"}).statements()
            assert set(statements) == {"authenticate", "authorize", "update"}
            assert statements["update"].names == ("password_hash", "username", "old_password_hash")
