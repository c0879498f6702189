"""Imports the backends of EMQX 5's `authentication`, each as one `[auth.*]`."""

from __future__ import annotations

from collections.abc import Callable

from broker.importers.backends import (
    NO_CLAIMS,
    TOKEN,
    address,
    addresses,
    carry,
    directory,
    plain,
    set_password,
    set_pool,
    set_sql,
    set_statement,
    set_tls,
)
from broker.importers.emqx_listeners import locate
from broker.importers.findings import Findings, Secret, Table
from broker.importers.servers import is_local
from broker.importers.source import Node

_METHODS = ("POST", "GET")
_REDIS = (
    ("redis_type", "mode"), ("sentinel", "master"), ("username", "username"),
    ("sentinel_username", "sentinel_username"), ("cmd", "auth_cmd"),
)  # fmt: skip


def _built_in(node: Node, found: Findings) -> Table:
    origin = node.at("backend") or node
    table = found.instance("auth", "accounts", "sqlite", origin)
    table.notes.append("In place of EMQX's built-in database; isthmus user add makes its users anew.")
    table.set("path", "data/accounts.db")
    table.set("create", True)
    table.set("tables", "emqx")
    table.set("authorize", "", remark="rights stand in rules")
    table.set("password_hash", {"name": "sha256", "salt_position": "suffix"}, remark="EMQX's default")
    found.lose(origin, "the users of the built-in database are not in this file; isthmus user add makes them anew")
    kind = node.take("user_id_type")
    if kind is not None and kind.as_text() != "username":
        found.lose(kind, "accounts are found by user name")
    return table


def _sql(node: Node, found: Findings) -> Table:
    backend = node.text("backend")
    table = found.instance("auth", backend, backend, node)
    server = node.text("server", "127.0.0.1")
    set_sql(table, backend, node, server)
    set_pool(table, node.take("pool_size"), node.take("query_timeout"))
    set_tls(table, node.at("ssl"), server.split(","), found, node.truth("ssl.enable", False))
    table.set("tables", "emqx")
    query = node.take("query")
    if query is not None:
        set_statement(table, "authenticate", query)
    table.set("authorize", "", remark="no rights come from here")
    return table


def _mongodb(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "mongodb", "mongodb", node)
    place = node.take("servers") or node.take("server")
    servers = addresses(place, 27017)
    table.set("servers", servers, place)
    node.take("mongo_type")
    for key, ours in (
        ("replica_set_name", "replica_set"),
        ("database", "database"),
        ("username", "username"),
        ("auth_source", "auth_source"),
        ("collection", "user_collection"),
        ("password_hash_field", "password_field"),
        ("salt_field", "salt_field"),
        ("is_superuser_field", "superuser_field"),
    ):
        setting = node.take(key)
        if setting is not None:
            table.set(ours, setting.as_text(), setting)
    if "username" in table.values and "auth_source" not in table.values:
        table.set("auth_source", table.values.get("database", "mqtt"), remark="EMQX logs in at the database itself")
    set_password(table, node)
    set_pool(table, node.take("pool_size"), None)
    set_tls(table, node.at("ssl"), servers, found, node.truth("ssl.enable", False))
    query = node.at("filter")
    if query is not None:
        table.set("user_filter", plain(query), query)
        query.use()
    table.set("acl_collection", "", remark="no rights come from here")
    return table


def _redis(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "redis", "redis", node)
    place = node.take("servers") or node.take("server")
    servers = addresses(place, 6379)
    table.set("servers", servers, place)
    carry(table, node, _REDIS)
    database = node.take("database")
    if database is not None:
        table.set("database", database.as_whole(), database)
    set_password(table, node)
    set_password(table, node, "sentinel_password", "sentinel_password")
    set_pool(table, node.take("pool_size"), None)
    set_tls(table, node.at("ssl"), servers, found, node.truth("ssl.enable", False))
    table.set("acl_cmd", "", remark="no rights come from here")
    return table


def _ldap(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "ldap", "ldap", node)
    secure = node.truth("ssl.enable", False)
    place = node.take("server")
    servers = addresses(place, 636 if secure else 389)
    table.set("servers", [f"{'ldaps' if secure else 'ldap'}://{one}" for one in servers], place)
    set_tls(table, node.at("ssl"), servers, found, secure)
    table.values.pop("tls", None)
    if not secure:
        table.set("tls", "none", remark="not encrypted, as with EMQX; starttls ends that")
    carry(table, node, (("username", "bind_dn"),))
    set_password(table, node, "password", "bind_password")
    set_pool(table, node.take("pool_size"), node.take("query_timeout"))
    directory(table, node.text("base_dn"), node.text("filter", "(objectClass=mqttUser)"))
    if node.text("method.type", "hash") == "bind":
        table.set("mode", "search_bind", node.at("method.type"))
        node.take("method.bind_password")
    else:
        table.set("mode", "hash", node.at("method.type"))
        for key, ours, usual in (
            ("password_attribute", "password_attribute", "userPassword"),
            ("is_superuser_attribute", "superuser_attribute", "isSuperuser"),
        ):
            setting = node.take(f"method.{key}") or node.take(key)
            table.set(ours, setting.as_text() if setting is not None else usual, setting)
    return table


def _http(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "http", "http", node)
    place = node.take("url") or node
    method = node.take("method")
    verb = method.as_text().upper() if method is not None else "POST"
    if place is not node:
        table.set("url", address(place.as_text()), place)
    table.set("method", verb if verb in _METHODS else "POST", method)
    headers = node.at("headers")
    body = node.at("body")
    kind = "application/json"
    if headers is not None:
        given = {name: child.as_text() for name, child in headers.children.items() if child.value is not None}
        headers.use()
        kind = next((value for name, value in given.items() if name.lower() == "content-type"), kind)
        own = {name: Secret(value) for name, value in given.items() if name.lower() not in ("content-type", "accept")}
        if own:
            table.set("headers", own, headers)
    table.set("format", "form" if "urlencoded" in kind else "json")
    if body is not None and body.children:
        texts = {name: child.as_text() for name, child in body.children.items()}
        table.set("body", {name: one if "${" in one else Secret(one) for name, one in texts.items()}, body)
        body.use()
        if verb == "GET" and any("${password}" in one for one in table.values["body"].values()):
            table.set("password_in_url", True, remark="as with EMQX; proxies and the service may log it")
    set_pool(table, node.take("pool_size"), node.take("request_timeout"))
    url = str(table.values.get("url", ""))
    set_tls(table, node.at("ssl"), [url] if url.startswith("http://") else [], found, node.truth("ssl.enable", False))
    table.values.pop("tls", None)
    return table


def _jwt(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "jwt", "jwt", node)
    node.take("use_jwks")
    node.take("algorithm")
    secret, public, jwks = node.take("secret"), node.take("public_key"), node.take("endpoint")
    if secret is not None:
        table.set("secret", Secret(secret.as_text()), secret)
        encoded = node.take("secret_base64_encoded")
        if encoded is not None and encoded.as_truth():
            table.set("secret_base64", True, encoded)
    if public is not None:
        table.set("public_key", locate(found, public.as_text()), public)
    if jwks is not None:
        table.set("jwks_url", address(jwks.as_text()), jwks)
        set_tls(table, node.at("ssl"), [], found, node.truth("ssl.enable", False))
        table.values.pop("tls", None)
        if jwks.as_text().startswith("http://") and not is_local(jwks.as_text()):
            table.set("allow_cleartext", True, remark="as with EMQX")
        refresh = node.take("refresh_interval")
        if refresh is not None:
            seconds = f"{refresh.value}s" if isinstance(refresh.value, int) else refresh.as_text()
            table.set("jwks_refresh", seconds, refresh)
    carry(table, node, TOKEN)
    claims = node.at("verify_claims")
    wanted = {}
    for one in claims.items if claims is not None else []:
        wanted[one.text("name")] = one.text("value")
    for name, child in (claims.children if claims is not None else {}).items():
        wanted[name] = child.as_text()
    if claims is not None:
        claims.use()
    table.set("claims", wanted, claims, "" if wanted else NO_CLAIMS)
    table.set("require_expiry", False, remark="as with EMQX")
    kick = node.at("disconnect_after_expire")
    if kick is not None and kick.value is True:
        kick.used = True
    found.rights.add(table.name)
    return table


BACKENDS: dict[str, Callable[[Node, Findings], Table]] = {
    "built_in_database": _built_in,
    "http": _http,
    "jwt": _jwt,
    "ldap": _ldap,
    "mongodb": _mongodb,
    "mysql": _sql,
    "postgresql": _sql,
    "redis": _redis,
}
