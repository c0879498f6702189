"""Imports what EMQX 5 sends to services and databases, where one of our sinks does the same."""

from __future__ import annotations

import re
from typing import Any

from broker.importers.backends import address, set_sql
from broker.importers.emqx5_rules import NO_TOPIC, Rules
from broker.importers.emqx_listeners import tls_files
from broker.importers.findings import Findings, Secret, Table
from broker.importers.servers import is_local, with_port
from broker.importers.source import Node

_INSERT = re.compile(
    r"\s*insert\s+into\s+([\w.\"`]+)\s*\(([^()]+)\)\s*values\s*\((.+)\)\s*;?\s*", re.IGNORECASE | re.DOTALL
)
_NAME = re.compile(r"\$\{([^{}]+)\}")
_NAMES = {"id": "msgid", "timestamp": "ts", "publish_received_at": "ts", "flags.retain": "retain"}
_KNOWN = ("msgid", "ts", "retain", "clientid", "username", "topic", "qos", "payload", ".")
_SINKS = {
    "http": "http", "webhook": "http", "kafka": "kafka", "kafka_producer": "kafka", "mysql": "mysql",
    "pgsql": "postgresql",
}  # fmt: skip
_NOT_DIRECT = "this template has no equivalent"
_ENVELOPE = "A whole message is sent as JSON, with other names of fields than EMQX has: see ${.} in REFERENCE.md."


def import_sinks(root: Node, found: Findings, rules: Rules) -> None:
    """`[sinks.*]`."""
    for kind, ours in _SINKS.items():
        for name, node in root.below(f"bridges.{kind}").items():
            inner = node.at("kafka") or node.at("producer.kafka") or node
            _sink(f"{kind}:{name}", ours, name, node, node, inner, found, rules)
        for name, node in root.below(f"actions.{kind}").items():
            connector = root.at(f"connectors.{kind}.{node.text('connector')}")
            if connector is not None:
                _sink(f"{kind}:{name}", ours, name, node, connector, node.at("parameters") or node, found, rules)


def _sink(
    key: str, kind: str, name: str, node: Node, connector: Node, inner: Node, found: Findings, rules: Rules
) -> None:
    local = node.take("local_topic")
    filters = ([local.as_text()] if local is not None else []) + rules.filters.get(key, [])
    if not filters:
        found.lose(node, NO_TOPIC, node.key)
        return
    table = found.instance("sinks", name, kind, node)
    table.set("kind", kind)
    for one in (node, connector):
        if not one.truth("enable", True):
            table.set("enabled", False, one.at("enable"))
    table.set("filters", list(dict.fromkeys(filters)))
    fill = {"http": _http, "kafka": _kafka, "mysql": _sql, "postgresql": _sql}[kind]
    hindrance = fill(table, connector, inner, found)
    if hindrance is not None:
        found.drop(table)
        found.lose(hindrance, _NOT_DIRECT)
        return
    table.notes.append("EMQX told publishers that a message was taken before it was there; here it is on disk by then.")
    rules.carried(key)


def _template(text: str) -> str | None:
    """In our names; None when EMQX knows something here that we do not."""
    names = {name: _ours(name) for name in _NAME.findall(text)}
    if any(ours != "." and ours.split(".")[0] not in _KNOWN for ours in names.values()):
        return None
    return _NAME.sub(lambda match: f"${{{names[match[1]]}}}", text)


def _ours(name: str) -> str:
    """``${.clientid}`` is ``${clientid}``, and ``${.}`` the whole message."""
    plain = name.removeprefix(".") or "."
    return _NAMES.get(plain, plain)


def _ssl(table: Table, connector: Node, found: Findings, inline: bool) -> bool:
    """TLS of a destination; whether there is any."""
    on = connector.truth("ssl.enable", False)
    ssl = connector.at("ssl")
    files: dict[str, Any] = {ours: path for ours, path, _ in tls_files(ssl, found)} if ssl is not None else {}
    verify = ssl.take("verify") if ssl is not None else None
    if on and verify is not None and verify.as_text() == "verify_none":
        if inline:
            files["verify"] = False
        else:
            found.lose(verify, "certificates of servers are always verified")
    if inline and on:
        table.set("tls", files or True)
    elif on:
        table.values.update(files)
    return on


def _http(table: Table, connector: Node, inner: Node, found: Findings) -> Node | None:
    url, path = connector.take("url"), inner.take("path")
    text = (url.as_text() if url is not None else "").rstrip("/") + (f"/{path.as_text().lstrip('/')}" if path else "")
    target = _template(text)
    if target is None or url is None:
        return path or url or inner
    table.set("url", address(target), url)
    method = inner.take("method")
    if method is not None:
        table.set("method", method.as_text().upper(), method)
    headers = inner.at("headers") or connector.at("headers")
    if headers is not None:
        headers.use()
        own = {name: child.as_text() for name, child in headers.children.items() if child.value is not None}
        kinds = [value for header, value in own.items() if header.lower() == "content-type"]
        if kinds:
            table.set("content_type", kinds[0])
        rest = {header: Secret(value) for header, value in own.items() if header.lower() != "content-type"}
        if rest:
            table.set("headers", rest, headers)
    body = inner.take("body")
    if body is not None and body.as_text():
        template = _template(body.as_text())
        if template is None:
            return body
        table.set("body", template, body)
    elif "body" not in table.values:
        table.notes.append(_ENVELOPE)
    secure = _ssl(table, connector, found, False)
    if target.startswith("http://") and not is_local(target.partition("${")[0]) and not secure:
        table.set("allow_cleartext", True, remark="not encrypted, as with EMQX")
    return None


def _kafka(table: Table, connector: Node, inner: Node, found: Findings) -> Node | None:
    hosts, topic = connector.take("bootstrap_hosts"), inner.take("topic")
    if hosts is None or topic is None:
        return connector
    table.set("servers", [with_port(one, 9092) for one in hosts.as_texts()], hosts)
    for path, ours, node in (("topic", "topic", topic), ("message.key", "key", None), ("message.value", "value", None)):
        setting = node or inner.take(path)
        if setting is not None:
            template = _template(setting.as_text())
            if template is None:
                return setting
            table.set(ours, template, setting)
    if "value" not in table.values:
        table.set("value", "${.}", remark="EMQX's default")
        table.notes.append(_ENVELOPE)
    stamp = inner.at("message.timestamp")
    if stamp is not None and stamp.value in ("${timestamp}", "${.timestamp}"):
        stamp.used = True
    compression = inner.take("compression")
    if compression is not None:
        table.set("compression", compression.as_text().replace("no_compression", "none"), compression)
    login = connector.at("authentication")
    if login is not None and login.children:
        password = login.take("password")
        mechanism = login.text("mechanism", "plain").replace("_", "-")
        sasl = {"mechanism": mechanism, "username": login.text("username")}
        table.set("sasl", {**sasl, "password": Secret(password.as_text() if password else "")}, login.at("mechanism"))
    elif login is not None and login.value == "none":
        login.used = True
    _ssl(table, connector, found, True)
    return None


def _sql(table: Table, connector: Node, inner: Node, found: Findings) -> Node | None:
    sql = inner.take("sql")
    match = _INSERT.fullmatch(sql.as_text()) if sql is not None else None
    if match is None or sql is None:
        return sql or inner
    names = [one.strip().strip('"`') for one in match[2].split(",")]
    values = [_template(one.strip().strip("'")) for one in match[3].split(",")]
    if len(names) != len(values) or not all(one is not None and _NAME.fullmatch(one) for one in values):
        return sql
    server = connector.text("server", "127.0.0.1")
    set_sql(table, str(table.values["kind"]), connector, server)
    if _ssl(table, connector, found, False):
        table.set("tls", True)
    elif not all(map(is_local, server.split(","))):
        table.set("allow_cleartext", True, remark="not encrypted, as with EMQX")
    table.set("table", match[1].strip('"`'), sql)
    table.set("columns", dict(zip(names, values, strict=True)), sql)
    return None
