"""Where the rules of a measured broker come from: each kind of backend with the same users and the same rules."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests import nosql_servers, servers, sql_servers

USERS = [f"load{number}" for number in range(20)]
PASSWORD = "load-pw"
TOPICS = [*(f"site{number}/%u/%c/telemetry/#" for number in range(199)), "load/%u/#"]
"""Of every user's rules the last is the one that applies."""
HASH = hashlib.sha256(PASSWORD.encode()).hexdigest()
SECRET = "the secret of tokens in measurements"

Source = Callable[[Path], contextlib.AbstractContextManager[tuple[str, str]]]
"""Answers the table `[auth.accounts]` and the password of all users."""


@contextlib.contextmanager
def static(where: Path) -> Iterator[tuple[str, str]]:
    rule = f'rules = [{{ permission = "allow", action = "all", topics = {json.dumps(TOPICS)} }}]'
    users = "".join(f'[auth.accounts.users.{user}]\npassword = "{PASSWORD}"\n' for user in USERS)
    yield f'kind = "static"\n{rule}\n{users}', PASSWORD


@contextlib.contextmanager
def jwt(where: Path) -> Iterator[tuple[str, str]]:
    claims = {"exp": int(time.time()) + 3600, "acl": {"all": TOPICS}}
    parts = [_base64(json.dumps(part, separators=(",", ":")).encode()) for part in ({"alg": "HS256"}, claims)]
    signature = hmac.digest(SECRET.encode(), ".".join(parts).encode(), "sha256")
    token = ".".join([*parts, _base64(signature)])
    yield f'kind = "jwt"\nsecret = "{SECRET}"\nclaims = {{}}\nmax_token = "16KB"\n', token


@contextlib.contextmanager
def ldap(where: Path) -> Iterator[tuple[str, str]]:
    with servers.slapd() as directory:
        connection = directory.connect()
        people = [f"uid={user},{directory.people_dn}" for user in USERS]
        for user, dn in zip(USERS, people, strict=True):
            attributes = {"uid": user, "cn": "x", "sn": "x", "userPassword": PASSWORD}
            assert connection.add(dn, ["inetOrgPerson"], attributes), connection.result
        group = f"cn=load,{directory.groups_dn}"
        assert connection.add(group, ["groupOfNames"], {"member": people}), connection.result
        connection.unbind()
        topics = json.dumps([topic.replace("%u", "${username}").replace("%c", "${clientid}") for topic in TOPICS])
        keys = {
            "servers": [directory.url], "tls": "none", "bind_dn": directory.admin_dn,
            "bind_password": directory.admin_password, "base_dn": directory.people_dn,
        }  # fmt: skip
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        rights = f'[auth.accounts.groups.load]\ndn = "{group}"\npublish = {topics}\nsubscribe = {topics}\n'
        yield f'kind = "ldap"\n{table}{rights}', PASSWORD


@contextlib.contextmanager
def http(where: Path) -> Iterator[tuple[str, str]]:
    topics = [topic.replace("%u", "${username}").replace("%c", "${clientid}") for topic in TOPICS]
    rules = [{"permission": "allow", "action": "all", "topic": topic} for topic in topics]
    body = json.dumps({"result": "allow", "acl": rules}).encode()

    class Service(BaseHTTPRequestHandler):
        """Lets everybody in. In a thread of ours: it is asked once for each user."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as service:
        thread = threading.Thread(target=service.serve_forever, daemon=True)
        thread.start()
        yield f'kind = "http"\nurl = "http://127.0.0.1:{service.server_port}/"\n', PASSWORD
        service.shutdown()


@contextlib.contextmanager
def sqlite(where: Path) -> Iterator[tuple[str, str]]:
    path = where / "accounts.db"
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        for text in _statements():
            database.execute(text)
        database.commit()
    yield f'kind = "sqlite"\npath = "{path}"\npassword_hash = "sha256"\n', PASSWORD


@contextlib.contextmanager
def postgresql(where: Path) -> Iterator[tuple[str, str]]:
    with sql_servers.postgresql() as server:
        yield _database(server, "postgresql"), PASSWORD


@contextlib.contextmanager
def mysql(where: Path) -> Iterator[tuple[str, str]]:
    with sql_servers.mariadb() as server:
        yield _database(server, "mysql"), PASSWORD


@contextlib.contextmanager
def redis(where: Path) -> Iterator[tuple[str, str]]:
    with nosql_servers.redis() as server:
        store = server.connect()
        for user in USERS:
            store.hset(f"mqtt_user:{user}", mapping={"password": HASH})
            store.hset(f"mqtt_acl:{user}", mapping=dict.fromkeys(TOPICS, "3"))
        yield f'kind = "redis"\nservers = ["{server.address}"]\npassword_hash = "sha256"\n', PASSWORD


@contextlib.contextmanager
def mongodb(where: Path) -> Iterator[tuple[str, str]]:
    with nosql_servers.mongodb() as server:
        store: Any = server.connect()["mqtt"]
        store["mqtt_user"].insert_many([{"username": user, "password": HASH} for user in USERS])
        store["mqtt_acl"].insert_many([{"username": user, "pubsub": TOPICS} for user in USERS])
        table = f'kind = "mongodb"\nservers = ["{server.address}"]\ndatabase = "mqtt"\npassword_hash = "sha256"\n'
        yield table, PASSWORD


def _statements() -> list[str]:
    users = ", ".join(f"({number}, '{user}', '{HASH}', null, 0)" for number, user in enumerate(USERS))
    rules = ", ".join(f"({number}, 1, null, '$all', null, 3, '{topic}')" for number, topic in enumerate(TOPICS))
    return [
        "create table mqtt_user (id integer primary key, username varchar(100), password varchar(100), "
        "salt varchar(40), is_superuser integer)",
        "create table mqtt_acl (id integer primary key, allow integer, ipaddr varchar(60), username varchar(100), "
        "clientid varchar(100), access integer, topic varchar(100))",
        f"insert into mqtt_user values {users}",
        f"insert into mqtt_acl values {rules}",
    ]


def _database(server: sql_servers.SqlServer, kind: str) -> str:
    name = asyncio.run(server.create(*_statements()))
    return f'kind = "{kind}"\ndsn = "{server.dsn(name)}"\npassword = "{server.password}"\npassword_hash = "sha256"\n'


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


SOURCES: dict[str, Source] = {
    "static": static, "jwt": jwt, "ldap": ldap, "http": http, "sqlite": sqlite, "postgresql": postgresql,
    "mysql": mysql, "redis": redis, "mongodb": mongodb,
}  # fmt: skip
