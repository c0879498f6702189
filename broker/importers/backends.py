"""Keys that the tables of databases, directories and services have in common, from whatever source they are made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from broker.config.types import parse_duration
from broker.importers.emqx_listeners import tls_files
from broker.importers.findings import Findings, Secret, Table
from broker.importers.servers import is_local, with_port
from broker.importers.source import Node

LDAP_RIGHTS = {
    "publish_attribute": "mqttPublishTopic",
    "subscribe_attribute": "mqttSubscriptionTopic",
    "all_attribute": "mqttPubSubTopic",
}
"""What EMQX's schema of a directory calls the topics of a user."""

TOKEN = (("from", "token_in"), ("acl_claim_name", "acl_claim"))
"""Keys of `[auth.jwt]` that only have another name."""
NO_CLAIMS = "none, as with EMQX: a token is good under any user name"

_CLEAR = "not encrypted, as it was; tls = true ends that"
_SELECT = re.compile(
    r"(?P<select>\s*select\s+)(?P<columns>[\w\s,.`]+?)(?P<rest>\s+from\s+.*\bwhere\s+username\s*=\s*'?(?:%u|\$\{username\}).*)",
    re.IGNORECASE | re.DOTALL,
)


def set_sql(table: Table, scheme: str, node: Node, server: str) -> None:
    """`dsn` and `password` of a database."""
    user, database = node.take("username"), node.take("database")
    port = 3306 if scheme == "mysql" else 5432
    hosts = ",".join(with_port(host, port) for host in server.split(","))
    name = user.as_text() if user is not None else "root" if scheme == "mysql" else ""
    place = node.at("server") or node
    where = quote(database.as_text() if database else "mqtt", safe="")
    table.set("dsn", f"{scheme}://{quote(name, safe='')}{'@' if name else ''}{hosts}/{where}", place)
    set_password(table, node)


def address(url: str) -> str:
    """A URL, as a secret when there may be one in it, behind a question mark."""
    return Secret(url) if "?" in url else url


def addresses(place: Node | None, port: int) -> list[str]:
    """Host and port of each server; this machine when none is named."""
    return [with_port(one, port) for one in (place.as_texts() if place is not None else ["127.0.0.1"])]


def carry(table: Table, node: Node, names: Iterable[tuple[str, str]]) -> None:
    """Texts that only have another name here, theirs and ours; an empty one says nothing."""
    for key, ours in names:
        setting = node.take(key)
        if setting is not None and setting.as_text():
            table.remarks.pop(ours, None)
            table.set(ours, setting.as_text(), setting)


def set_password(table: Table, node: Node, key: str = "password", ours: str = "password") -> None:
    """A secret, when there is one."""
    password = node.take(key)
    if password is not None and password.as_text():
        table.set(ours, Secret(password.as_text()), password)


def set_tls(table: Table, ssl: Node | None, servers: Iterable[str], found: Findings, on: bool) -> None:
    """TLS with a server; without it, that passwords go in the clear."""
    if not on or ssl is None:
        if ssl is not None:
            ssl.use()
        if not all(map(is_local, servers)):
            table.set("allow_cleartext", True, remark=_CLEAR)
        return
    table.set("tls", True)
    for ours, path, setting in tls_files(ssl, found):
        table.set(ours, path, setting)
    verify = ssl.take("verify")
    if verify is None or verify.as_text() in ("verify_none", "false"):
        table.remarks["tls"] = "certificates are always verified, which they were not: ca must vouch for the server"
        if verify is not None:
            found.lose(verify, "certificates of servers are always verified")


def set_pool(table: Table, size: Node | None, timeout: Node | None) -> None:
    """`pool` and `timeout`."""
    if size is not None:
        wanted = size.as_whole()
        table.set("pool", min(max(wanted, 1), 256), size, f"was {wanted}" if wanted > 256 else "")
    if timeout is not None and timeout.as_text() != "infinity":
        text = timeout.as_duration("ms")
        long = parse_duration(text) > 60
        table.set("timeout", "1m" if long else text, timeout, f"was {text}" if long else "")


def set_statement(table: Table, key: str, query: Node) -> None:
    """A statement of EMQX. MySQL takes Alice for alice, so that the name is asked for where the statement allows."""
    text = " ".join(query.as_text().split())
    if key == "authenticate" and table.values.get("kind", table.name) == "mysql":
        match = _SELECT.fullmatch(text)
        columns = [one.strip() for one in match["columns"].split(",")] if match else []
        if match and "username" not in columns:
            text = f"{match['select']}username, {match['columns']}{match['rest']}"
            table.set(key, text, query, "username is selected too, so that Alice is not let in as alice")
            return
        if not match:
            table.set("exact_name", False, remark="the statement does not tell how the name is spelled there")
    table.set(key, text, query)


def hash_of(node: Node | None) -> Any:
    """EMQX 5's table, or the text of its elders."""
    if node is None:
        return None
    node.use()
    return {key: one.value for key, one in node.children.items() if key != "salt_rounds"}


def plain(node: Node) -> Any:
    """The values below a node as they are."""
    node.used = True
    if node.items:
        return [plain(one) for one in node.items]
    if node.value is not None:
        return node.value
    return {key: plain(one) for key, one in node.children.items()}


def directory(table: Table, base: str, wanted: str) -> None:
    """`base_dn` and `user_filter`; EMQX writes the user's name into the base, where it means one entry below."""
    parts = re.split(r"(?<!\\),", base)
    own = [part.strip() for part in parts if "${" in part]
    below = ",".join(part.strip() for part in parts if "${" not in part)
    table.set("base_dn", below)
    if "${username}" not in wanted:
        names = [f"({part})" for part in own] or ["(uid=${username})"]
        wanted = f"(&{wanted}{''.join(names)})" if wanted else names[0]
    table.set("user_filter", wanted)
