"""Imports EMQX 5's `authentication` and `authorization`: who may connect, and what they may do."""

from __future__ import annotations

from broker.importers.backends import LDAP_RIGHTS, hash_of, plain, set_statement
from broker.importers.chain import Chain
from broker.importers.emqx5_backends import BACKENDS
from broker.importers.emqx_listeners import locate
from broker.importers.findings import Findings, Table
from broker.importers.source import Node

_ANY_NAME = "who gives a user name must be known here; without [auth.*] only clients that give none are let in"
_ALONE = "rights come from where clients are let in; no authenticator here asks the same server"


def import_access(root: Node, found: Findings, chain: Chain, listeners: list[tuple[Table, Node]]) -> None:
    """`[auth.*]` and `[access]`."""
    access = found.table("access")
    everybody = root.at("authentication")
    elements = _elements(everybody)
    for node in elements:
        _authenticator(node, found, chain)
    if elements:
        access.set("allow_anonymous", False, everybody)
    else:
        access.set("allow_anonymous", True, everybody, "without authentication EMQX lets everybody in")
        found.lose(everybody or Node("authentication", access.origin.place), _ANY_NAME)
    for table, node in listeners:
        _own_chain(table, node, found, chain)
    _authorization(root, found, chain, access)


def _own_chain(table: Table, node: Node, found: Findings, chain: Chain) -> None:
    """What a listener says for itself."""
    own = _elements(node.at("authentication"))
    if own:
        inner = Chain(found)
        for one in own:
            _authenticator(one, found, inner)
        table.set("auth", inner.names)
        table.set("allow_anonymous", False, remark="who asks for names asks everybody")
        chain.own.append(table)
    asked = node.take("enable_authn")
    if asked is not None and asked.as_text() == "quick_deny_anonymous":
        table.set("allow_anonymous", False, asked)
    if asked is not None and asked.as_text() == "false":
        table.set("allow_anonymous", True, asked)
        found.lose(asked, "clients that give a user name are still judged; those that give none are let in")


def _elements(node: Node | None) -> list[Node]:
    """The tables of a list, of a numbered table, or the one table that stands in place of a list."""
    if node is None:
        return []
    if node.items:
        return node.items
    numbered = [child for name, child in node.children.items() if name.isdigit()]
    return numbered or ([node] if node.children else [])


def _authenticator(node: Node, found: Findings, chain: Chain) -> None:
    mechanism = node.text("mechanism", "password_based")
    backend = "jwt" if mechanism == "jwt" else node.text("backend")
    make = BACKENDS.get(backend)
    if mechanism not in ("jwt", "password_based") or make is None:
        found.lose(node.at("mechanism") or node, "there is no such authentication here")
        node.use()
        return
    table = make(node, found)
    algorithm = hash_of(node.at("password_hash_algorithm"))
    if algorithm:
        table.set("password_hash", algorithm, node.at("password_hash_algorithm"))
    if not node.truth("enable", True):
        table.set("enabled", False, node.at("enable"))
    chain.add(table)


def _authorization(root: Node, found: Findings, chain: Chain, access: Table) -> None:
    unmatched = root.take("authorization.no_match")
    answer = unmatched.as_text() if unmatched is not None else "allow"
    access.set("no_match", answer, unmatched, "" if unmatched else "EMQX's default")
    action = root.take("authorization.deny_action")
    if action is not None:
        access.set("deny_action", action.as_text(), action)
    sources = root.at("authorization.sources")
    usual = found.folder / "acl.conf"
    if sources is None and usual.exists():
        table = found.instance("auth", "rules", "file", root.at("authorization") or access.origin)
        table.notes.append("EMQX reads this file unless authorization.sources says otherwise.")
        table.set("rules", str(usual))
        chain.add(table, rights=True, common=True)
    for node in _elements(sources):
        on = node.at("enable")
        if on is not None and not on.as_truth():
            node.use()
            continue
        node.truth("enable", True)
        _source(node, node.text("type"), found, chain)


def _source(node: Node, kind: str, found: Findings, chain: Chain) -> None:
    origin = node.at("type") or node
    if kind == "file":
        _rules_file(node, origin, found, chain)
        return
    table = _same_server(node, kind, found)
    if table is None or kind not in ("mysql", "postgresql", "mongodb", "redis", "ldap"):
        found.lose(origin, _ALONE if kind in BACKENDS and kind != "http" else "there is no such source of rights here")
        node.use()
        found.deny_the_rest(origin)
        return
    _rights(node, kind, table, found)
    chain.add(table, rights=True)
    node.use()  # the server was said with the authenticator


def _rules_file(node: Node, origin: Node, found: Findings, chain: Chain) -> None:
    table = found.instance("auth", "rules", "file", origin)
    path = node.take("path")
    chain.add(table, rights=True, common=True)
    if path is not None:
        table.set("rules", locate(found, path.as_text()), path)
    else:
        node.use()
        found.hold(table, origin, "rules that stand in the configuration itself belong into a file")


def _same_server(node: Node, kind: str, found: Findings) -> Table | None:
    """The table of an authenticator that asks where this source asks."""
    for table in found.room("auth"):
        same = table.values.get("kind", table.name) == kind and _where(table.origin) == _where(node)
        if same and table.values.get("enabled") is not False:
            return table
    return None


def _where(node: Node) -> list[str]:
    place = node.at("servers") or node.at("server")
    database = node.at("database")
    texts = sorted(place.as_texts()) if place is not None and place.value is not None else []
    return [*texts, str(database.value) if database is not None else ""]


def _rights(node: Node, kind: str, table: Table, found: Findings) -> None:
    """Put the rights a source tells of into the table of the authenticator that asks the same server."""
    if kind in ("mysql", "postgresql"):
        query = node.take("query")
        table.remarks.pop("authorize", None)
        if query is None:
            table.values.pop("authorize", None)
        else:
            set_statement(table, "authorize", query)
    elif kind == "mongodb":
        table.remarks.pop("acl_collection", None)
        table.set("acl_collection", node.text("collection", "mqtt_acl"), node.at("collection"))
        query = node.at("filter")
        table.set("acl_filters", [plain(query)] if query is not None else [{"username": "${username}"}], query)
    elif kind == "redis":
        command = node.take("cmd")
        table.remarks.pop("acl_cmd", None)
        table.set("acl_cmd", command.as_text() if command is not None else "HGETALL mqtt_acl:${username}", command)
    else:
        for key, usual in LDAP_RIGHTS.items():
            setting = node.take(key)
            table.set(key, setting.as_text() if setting is not None else usual, setting)
