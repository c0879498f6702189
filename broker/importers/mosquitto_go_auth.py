"""Imports the options of mosquitto-go-auth, the plug-in most mosquittos with a database had: its backends are ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from broker.importers.backends import set_password, set_tls
from broker.importers.findings import Findings, Table
from broker.importers.mosquitto_file import OPTIONS, Block
from broker.importers.servers import is_local, with_port
from broker.importers.source import Node

_SELECT = re.compile(r"(?is)\s*select\s+(?P<column>[\w.\"`]+)\s+from\s+(?P<rest>.+?)\s*;?\s*")
_RIGHTS = re.compile(
    r"(?is)\s*select\s+(?P<topic>[\w.]+)\s+from\s+(?P<table>[\w.\"`]+)\s+where\s+(?P<who>\(?\s*[\w.]+\s*=\s*(?:\$1|\?)\s*\)?)"
    r"\s+and\s+\(?\s*(?P<access>[\w.]+)\s*>?=\s*(?:\$2|\?)(?:\s+or\s+[\w.]+\s*=\s*3)?\s*\)?\s*;?\s*"
)
"""Who, and the access that is asked for; ours asks for all of a user's rights at once."""
_MARK = re.compile(r"\$1|\?")
_RIGHTS_LOST = "rights are asked for all at once here; write authorize as REFERENCE.md shows for mosquitto-go-auth"
_SETS = {
    "${username}:racls": "subscribe",
    "${username}:wacls": "publish",
    "${username}:rwacls": "all",
    "${username}:sacls": "subscribe",
}


def is_go_auth(block: Block) -> bool:
    """Whether this loads the plug-in."""
    plugins = [one for key in ("auth_plugin", "plugin") for one in block.settings.get(key, ())]
    return any("go-auth" in one.as_text() for one in plugins)


def import_go_auth(block: Block, found: Findings) -> list[str]:
    """The names of the `[auth.*]` tables for its backends, in their order; `block` is where its options stand."""
    options = Node("", block.head.place)
    for key, settings in block.settings.items():
        for prefix in OPTIONS:
            if key.startswith(prefix):
                options.children[key.removeprefix(prefix)] = settings[-1]
    backends = options.take("backends")
    names = []
    for backend in backends.as_texts() if backends is not None else []:
        make = _BACKENDS.get(backend)
        if make is None or backends is None:
            found.lose(backends or options, f"there is no equivalent of its backend {backend}")
            continue
        table = make(options, found)
        found.rights.add(table.name)
        names.append(table.name)
    options.take("hasher")  # a hash says itself what it is
    return names


def _files(options: Node, found: Findings) -> Table:
    passwords = options.take("files_password_path") or options.take("password_path")
    rules = options.take("files_acl_path") or options.take("acl_path")
    table = found.instance("auth", "files", "file", passwords or rules or options)
    if passwords is not None:
        table.set("passwords", str(found.folder / passwords.as_text()), passwords)
    if rules is not None:
        table.set("rules", str(found.folder / rules.as_text()), rules)
    return table


def _postgres(options: Node, found: Findings) -> Table:
    return _sql(options, found, "pg", "postgresql", 5432)


def _mysql(options: Node, found: Findings) -> Table:
    return _sql(options, found, "mysql", "mysql", 3306)


def _sql(options: Node, found: Findings, prefix: str, kind: str, port: int) -> Table:
    host, number = options.text(f"{prefix}_host", "localhost"), options.take(f"{prefix}_port")
    place = options.at(f"{prefix}_dbname") or options
    table = found.instance("auth", kind, kind, place)
    where = with_port(host, port if number is None else number.as_whole())
    user = quote(options.text(f"{prefix}_user"), safe="")
    database = quote(options.text(f"{prefix}_dbname", "mqtt"), safe="")
    table.set("dsn", f"{kind}://{f'{user}@' if user else ''}{where}/{database}", place)
    set_password(table, options, f"{prefix}_password")
    mode = options.take(f"{prefix}_sslmode")
    said = mode.as_text() if mode is not None else "disable"
    files = Node("ssl", place.place)
    for theirs, key in (("sslrootcert", "cacertfile"), ("sslcert", "certfile"), ("sslkey", "keyfile")):
        file = options.take(f"{prefix}_{theirs}")
        if file is not None:
            files.children[key] = file
    if mode is not None:
        verified = said in ("true", "custom", "verify-ca", "verify-full")
        files.children["verify"] = Node(mode.key, mode.place, "verify_peer" if verified else "verify_none")
    set_tls(table, files, [host], found, said not in ("disable", "false", "allow", "prefer"))
    _statements(options, found, table, prefix, kind)
    return table


def _sqlite(options: Node, found: Findings) -> Table:
    source = options.take("sqlite_source")
    table = found.instance("auth", "sqlite", "sqlite", source or options)
    if source is not None:
        table.set("path", str(found.folder / source.as_text()), source)
    _statements(options, found, table, "sqlite", "sqlite")
    return table


def _statements(options: Node, found: Findings, table: Table, prefix: str, kind: str) -> None:
    table.set("password_hash", "auto", remark="a hash says itself what it is")
    query = options.take(f"{prefix}_userquery")
    if query is not None:
        match = _SELECT.fullmatch(query.as_text())
        text = query.as_text()
        if match is not None:
            column = match["column"]
            known = column.rpartition(".")[2].strip('"`') in ("password", "password_hash")
            text = f"select {column}{'' if known else ' as password'} from {match['rest']}"
        table.set("authenticate", _MARK.sub("${username}", text), query)
        if kind == "mysql":
            table.set("exact_name", False, remark="select username too, and Alice is not let in as alice")
    query = options.take(f"{prefix}_superquery")
    if query is not None and not _no_superusers(options, prefix):
        table.set("superuser", _MARK.sub("${username}", query.as_text()), query)
    query = options.take(f"{prefix}_aclquery")
    match = _RIGHTS.fullmatch(query.as_text()) if query is not None else None
    if match is not None:
        who = _MARK.sub("${username}", match["who"])
        text = f"select {match['topic']} as topic, {match['access']} as access from {match['table']} where {who}"
        table.set("authorize", text, query)
        wide = ">=" in match[0]
        table.set("acc_style", "go-auth", remark="2 is writing alone here, although >= let it read too" if wide else "")
        return
    table.set("authorize", "", remark="no rights come from here")
    if query is not None:
        found.lose(query, _RIGHTS_LOST)


def _no_superusers(options: Node, prefix: str) -> bool:
    return any([options.truth(name, False) for name in ("disable_superuser", f"{prefix}_disable_superuser")])


def _redis(options: Node, found: Findings) -> Table:
    table = found.instance("auth", "redis", "redis", options.at("redis_host") or options)
    addresses = options.take("redis_cluster_addresses")
    mode = options.text("redis_mode", "single")
    number = options.take("redis_port")
    one = with_port(options.text("redis_host", "localhost"), 6379 if number is None else number.as_whole())
    servers = addresses.as_texts() if addresses is not None else [one]
    table.set("mode", "cluster" if mode == "cluster" else "single")
    table.set("servers", servers, addresses)
    database = options.take("redis_db")
    if database is not None and mode != "cluster":
        table.set("database", database.as_whole(), database)
    set_password(table, options, "redis_password")
    if not all(map(is_local, servers)):
        table.set("allow_cleartext", True, remark="not encrypted, as with mosquitto-go-auth")
    table.set("password_hash", "auto", remark="a hash says itself what it is")
    table.set("auth_cmd", "GET ${username}")
    if not _no_superusers(options, "redis"):
        table.set("super_cmd", "GET ${username}:su")
    table.set("acl_cmd", "")
    table.set("acl_sets", dict(_SETS))
    common = options.at("redis_host") or options.at("backends") or options
    found.lose(common, "rights of everybody (common:racls …) belong into a file of rules; those of users are read")
    return table


_BACKENDS: dict[str, Callable[[Node, Findings], Table]] = {
    "files": _files,
    "mysql": _mysql,
    "postgres": _postgres,
    "redis": _redis,
    "sqlite": _sqlite,
}
