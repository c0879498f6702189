"""Imports the authentication plug-ins of EMQ 2 to EMQX 4, which keep users in databases, directories and services."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.importers.backends import (
    LDAP_RIGHTS,
    NO_CLAIMS,
    TOKEN,
    address,
    addresses,
    carry,
    set_password,
    set_pool,
    set_sql,
    set_statement,
    set_tls,
)
from broker.importers.chain import Chain
from broker.importers.emqx_listeners import locate, tls_files
from broker.importers.findings import Findings, Secret, Table
from broker.importers.servers import is_local
from broker.importers.source import Node, SourceError

_PERCENT = {
    "%u": "${username}",
    "%c": "${clientid}",
    "%P": "${password}",
    "%a": "${peerhost}",
    "%C": "${cert_common_name}",
    "%d": "${cert_subject}",
}
_REVERSED = "EMQ looked at the last row first"
_ELSEWHERE = "the accounts themselves are not in this file; isthmus user add makes them anew"
_NONE = "no rights come from here"


def import_backends(root: Node, found: Findings, chain: Chain) -> None:
    """`[auth.*]`."""
    for name, node in root.below("auth").items():  # in the order in which their files were read
        if name in ("user", "client") and not found.has("auth", "static"):
            _static(root, found, chain)
        elif name in _PLUGINS and any(leaf.value not in (None, "") for leaf in node.leaves()):
            table = _PLUGINS[name](node, found)
            stored = node.take("password_hash")
            if stored is not None:
                table.set("password_hash", ",".join(stored.as_texts()), stored)
            chain.add(table, rights=name in ("mysql", "pgsql", "mongo", "redis", "ldap", "jwt"))
    others = root.take("auth.mnesia.password_hash")
    if others is not None:
        found.lose(others, _ELSEWHERE)


def _ssl(node: Node, table: Table, servers: list[str], found: Findings) -> None:
    on = node.truth("ssl.enable", node.truth("ssl", False))
    ssl = node.at("ssl") if node.below("ssl") else node.at("ssl_opts") or node.at("ssl")
    set_tls(table, ssl, servers, found, on)


def _sql(node: Node, found: Findings) -> Table:
    kind = "mysql" if node.key == "auth.mysql" else "postgresql"
    table = found.instance("auth", kind, kind, node)
    server = node.text("server", "127.0.0.1")
    set_sql(table, kind, node, server)
    set_pool(table, node.take("pool"), node.take("query_timeout"))
    _ssl(node, table, server.split(","), found)
    table.set("tables", "emq")
    for key, ours in (("auth_query", "authenticate"), ("super_query", "superuser"), ("acl_query", "authorize")):
        query = node.take(key)
        if query is not None and query.as_text():
            set_statement(table, ours, query)
    if "authorize" in table.values:
        table.set("acl_order", "reversed", remark=_REVERSED)
    else:
        table.set("authorize", "", remark=_NONE)
    return table


def _redis(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "redis", "redis", node)
    carry(table, node, (("type", "mode"), ("sentinel", "master")))
    server = node.take("server")
    servers = addresses(server, 6379)
    table.set("servers", servers, server)
    database = node.take("database")
    if database is not None:
        table.set("database", database.as_whole(), database)
    set_password(table, node)
    set_pool(table, node.take("pool"), node.take("query_timeout"))
    _ssl(node, table, servers, found)
    carry(table, node, (("auth_cmd", "auth_cmd"), ("super_cmd", "super_cmd")))
    rights = node.take("acl_cmd")
    table.set("acl_cmd", rights.as_text() if rights is not None else "", rights, "" if rights else _NONE)
    return table


def _mongo(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "mongodb", "mongodb", node)
    server, replica = node.take("server"), node.take("rs_set_name")
    kind = node.text("type")
    servers = addresses(server, 27017)
    table.set("servers", servers, server)
    if kind == "rs" and replica is not None:
        table.set("replica_set", replica.as_text(), replica)
    user = node.take("username") or node.take("login")
    if user is not None and user.as_text():
        table.set("username", user.as_text(), user)
        table.set("auth_source", "mqtt", remark="EMQX's default")
    set_password(table, node)
    carry(table, node, (("database", "database"), ("auth_source", "auth_source")))
    set_pool(table, node.take("pool"), node.take("query_timeout"))
    _ssl(node, table, servers, found)
    users, powers = node.take("auth_query.collection"), node.take("super_query.super_field")
    if users is not None:
        table.set("user_collection", users.as_text(), users)
    if not node.truth("super_query", bool(node.below("super_query"))):
        table.set("superuser_field", "", powers, "super_query is off")
    elif powers is not None:
        table.set("superuser_field", powers.as_text(), powers)
    fields = node.take("auth_query.password_field")
    if fields is not None:
        names = fields.as_texts()
        table.set("password_field", names[0], fields)
        if len(names) > 1:
            table.set("salt_field", names[1], fields)
    stored = node.take("auth_query.password_hash")
    if stored is not None:
        table.set("password_hash", ",".join(stored.as_texts()), stored)
    selector = node.take("auth_query.selector")
    if selector is not None:
        table.set("user_filter", _selector(selector), selector)
    for path in ("super_query.collection", "super_query.selector"):
        same = node.at(path)
        if same is not None and same.value == node.text(path.replace("super", "auth")):
            same.used = True
    collection = node.take("acl_query.collection")
    if not node.truth("acl_query", True):
        collection = None
    table.set("acl_collection", collection.as_text() if collection else "", collection, "" if collection else _NONE)
    one, several = node.take("acl_query.selector"), node.below("acl_query.selector")
    filters = [_selector(each) for each in ([one] if one is not None else []) + list(several.values())]
    if filters:
        table.set("acl_filters", filters, one)
        for each in several.values():
            each.used = True
    return table


def _selector(node: Node) -> dict[str, str]:
    """``username=%u, clientid=%c``"""
    pairs = [text.partition("=") for text in node.as_texts()]
    if not all(equals for _, equals, _ in pairs):
        raise SourceError(node.place, f"{node.key} is written FIELD=%u")
    return {field.strip(): _placeholders(value.strip()) for field, _, value in pairs}


def _placeholders(text: str) -> str:
    for short, long in _PERCENT.items():
        text = text.replace(short, long)
    return text


def _ldap(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "ldap", "ldap", node)
    servers, port = node.take("servers"), node.take("port")
    secure = node.truth("ssl.enable", node.truth("ssl", False))
    number = port.as_whole() if port is not None else 636 if secure else 389
    hosts = addresses(servers, number)
    table.set("servers", [f"{'ldaps' if secure else 'ldap'}://{host}" for host in hosts], servers)
    _ssl(node, table, hosts, found)
    table.values.pop("tls", None)
    if not secure:
        table.set("tls", "none", remark="not encrypted, as with EMQX; starttls ends that")
    carry(table, node, (("bind_dn", "bind_dn"), ("device_dn", "base_dn"), ("user_dn", "base_dn")))
    set_password(table, node, "bind_password", "bind_password")
    set_pool(table, node.take("pool"), node.take("timeout"))
    bind = node.take("bind_as_user")
    table.set("mode", "search_bind" if bind is not None and bind.as_truth() else "hash", bind)
    stored = node.take("password.attributetype")
    if table.values["mode"] == "hash" and stored is not None:
        table.set("password_attribute", stored.as_text(), stored)
    shape = node.text("match_objectclass", "mqttUser")
    name = node.text("username.attributetype", "uid")
    table.set("user_filter", f"(&(objectClass={shape})({name}=${{username}}))")
    table.set("enabled_attribute", "isEnabled")
    for key, attribute in LDAP_RIGHTS.items():
        table.set(key, attribute)
    return table


def _http(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "http", "http", node)
    url = node.take("auth_req") or node.take("auth_req.url")
    superuser = node.take("super_req") or node.take("super_req.url")
    if url is not None:
        table.set("url", address(_placeholders(url.as_text())), url)
    method = node.take("auth_req.method")
    table.set("method", method.as_text().upper() if method is not None else "POST", method)
    kind = node.text("auth_req.headers.content_type") or node.text("auth_req.headers.content-type")
    table.set("format", "json" if "json" in kind else "form")
    params = node.take("auth_req.params")
    if params is not None:
        table.set("body", _body(params, found), params)
        if table.values["method"] == "GET" and "${password}" in str(table.values["body"]):
            table.set("password_in_url", True, remark="as with EMQX; proxies and the service may log it")
    table.set("answers", "status")
    if superuser is not None and superuser.as_text():
        table.set("super_url", address(_placeholders(superuser.as_text())), superuser)
        for key in ("super_req.method", "super_req.params"):
            node.take(key)
    headers = {name: Secret(one.as_text()) for name, one in node.below("header").items() if one.value is not None}
    if headers:
        table.set("headers", headers, node.at("header"))
        for one in node.below("header").values():
            one.used = True
    set_pool(table, node.take("pool_size"), node.take("request.timeout") or node.take("timeout"))
    text = str(table.values.get("url", ""))
    if text.startswith("http://") and not is_local(text.partition("${")[0]):
        table.set("allow_cleartext", True, remark="not encrypted, as with EMQX")
    ssl = node.at("ssl")
    for ours, path, setting in tls_files(ssl, found) if ssl is not None else ():
        if text.startswith("https://"):
            table.set(ours, path, setting)
    return table


def _body(params: Node, found: Findings) -> dict[str, str]:
    body = {}
    for text in params.as_texts():
        name, _, value = text.partition("=")
        template = _placeholders(value.strip())
        if "%" in template:
            found.lose(params, f"{name.strip()} is not told to the service")
        else:
            body[name.strip()] = template if "${" in template else Secret(template)
    return body


def _jwt(node: Node, found: Findings) -> Table:
    table = found.instance("auth", "jwt", "jwt", node)
    secret, public, jwks = node.take("secret"), node.take("pubkey"), node.take("jwks")
    if jwks is not None and jwks.as_text():
        table.set("jwks_url", address(jwks.as_text()), jwks)
    elif public is not None and public.as_text():
        table.set("public_key", locate(found, public.as_text()), public)
    elif secret is not None:
        table.set("secret", Secret(secret.as_text()), secret)
    refresh = node.take("jwks.refresh_interval")
    if refresh is not None and jwks is not None:
        table.set("jwks_refresh", refresh.as_text(), refresh)
    carry(table, node, TOKEN)
    claims: dict[str, Any] = {}
    checked = node.truth("verify_claims", False)
    for name, one in node.below("verify_claims").items():
        one.used = True
        if checked:
            claims[name] = _placeholders(one.as_text())
    table.set("claims", claims, remark="" if claims else NO_CLAIMS)
    table.set("require_expiry", False, remark="as with EMQX")
    return table


_PLUGINS: dict[str, Callable[[Node, Findings], Table]] = {
    "mysql": _sql,
    "pgsql": _sql,
    "mongo": _mongo,
    "redis": _redis,
    "ldap": _ldap,
    "http": _http,
    "jwt": _jwt,
}


def _static(root: Node, found: Findings, chain: Chain) -> None:
    """The lists of users and client ids of `auth.user.N` and `auth.client.N`."""
    made: Table | None = None
    for room, key in (("user", "username"), ("client", "clientid")):
        for number, node in root.below(f"auth.{room}").items():
            if not number.isdigit():
                continue
            name, password = node.take(key) or node.take("login"), node.take("password")
            if name is None or password is None:
                raise SourceError(node.place, f"{node.key}: {key} and password belong together")
            if made is None:
                made = found.instance("auth", "static", "static", name)
                made.set("kind", "static")
                chain.add(made)
            account = found.table("auth", made.name, f"{room}s", name.as_text(), origin=name)
            account.set("password", Secret(password.as_text()), password)
        stored = root.take(f"auth.{room}.password_hash")
        if stored is not None and made is None:
            found.lose(stored, _ELSEWHERE)
