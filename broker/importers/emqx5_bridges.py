"""Imports the MQTT bridges of EMQX 5, and since 5.4 its connectors with their actions and sources."""

from __future__ import annotations

import re
from typing import Any

from broker.importers.emqx5_rules import NO_TOPIC, OWN_FLAGS, UNCHANGED, Rules
from broker.importers.emqx_bridges import import_remote, import_tls
from broker.importers.findings import Findings, Table
from broker.importers.source import Node

_TOPIC = re.compile(r"([^${}]*)\$\{topic\}")
_RENAMED = "a topic becomes another by a prefix before ${topic} only, or one topic becomes one other"
_NOT_DIRECT = "this template has no equivalent"


def import_bridges(root: Node, found: Findings, rules: Rules) -> None:
    """`[bridges.*]`."""
    for name, node in root.below("bridges.mqtt").items():
        _old_bridge(name, node, found, rules)
    for name, node in root.below("connectors.mqtt").items():
        _new_bridge(name, node, root, found, rules)


def _old_bridge(name: str, node: Node, found: Findings, rules: Rules) -> None:
    lines: list[dict[str, Any]] = []
    table = found.instance("bridges", name, "mqtt", node)
    table.set("kind", "mqtt")
    _connection(table, node, found)
    key = f"mqtt:{name}"
    out, into = node.at("egress"), node.at("ingress")
    if out is not None:
        local = out.take("local.topic")
        filters = [local.as_text()] if local is not None else rules.filters.get(key, [])
        lines += _out(table, out.at("remote") or out, filters, out, found)
        rules.carried(key)
    if into is not None:
        target = into.text("local.topic") or rules.into.get(key, "")
        local_end = into.at("local") or Node("", into.place)
        payload = local_end.take("payload")
        if payload is not None and payload.as_text() not in ("", "${payload}"):
            found.lose(payload, _NOT_DIRECT)
        else:
            lines += _in(into.at("remote") or into, target, into, found)
        for one in (local_end.take("qos"), local_end.take("retain")):
            if one is not None and one.value not in UNCHANGED:
                found.lose(one, OWN_FLAGS)
        rules.carried(key)
    _finish(table, lines, found)


def _new_bridge(name: str, node: Node, root: Node, found: Findings, rules: Rules) -> None:
    actions = {n: a for n, a in root.below("actions.mqtt").items() if a.text("connector") == name}
    sources = {n: s for n, s in root.below("sources.mqtt").items() if s.text("connector") == name}
    if not actions and not sources:
        return
    table = found.instance("bridges", name, "mqtt", node)
    table.set("kind", "mqtt")
    _connection(table, node, found)
    lines: list[dict[str, Any]] = []
    for action_name, action in actions.items():
        if not action.truth("enable", True):
            continue
        local = action.take("local_topic")
        filters = ([local.as_text()] if local is not None else []) + rules.filters.get(f"mqtt:{action_name}", [])
        lines += _out(table, action.at("parameters") or action, filters, action, found)
        rules.carried(f"mqtt:{action_name}")
    for source_name, source in sources.items():
        if source.truth("enable", True):
            lines += _in(source.at("parameters") or source, rules.into.get(f"mqtt:{source_name}", ""), source, found)
            rules.carried(f"mqtt:{source_name}")
    _finish(table, lines, found)


def _connection(table: Table, node: Node, found: Findings) -> None:
    server = node.take("server") or node
    secure = node.truth("ssl.enable", False)
    address = server.as_text() if server is not node else "127.0.0.1"
    import_remote(table, node, server, address, secure=secure)
    if not node.truth("enable", True):
        table.set("enabled", False, node.at("enable"))
    for key, ours in (("bridge_mode", "try_private"), ("clean_start", "clean_session")):
        switch = node.take(key)
        if switch is not None and (ours != "clean_session" or not switch.as_truth()):
            table.set(ours, switch.as_truth(), switch)
    if "clean_session" not in table.values:
        table.set("clean_session", False, remark="EMQX's default true loses what the remote has for us")
    for key, ours in (("keepalive", "keep_alive"), ("retry_interval", "ack_timeout")):
        setting = node.take(key)
        if setting is not None and setting.as_seconds():
            table.set(ours, setting.as_duration("ms"), setting)
    window = node.take("max_inflight")
    if window is not None and window.as_text() != "infinity":
        table.set("receive_maximum", window.as_whole(), window)
    ssl = node.at("ssl")
    if ssl is not None:
        import_tls(table, ssl, ssl, found, secure=secure)


def _out(table: Table, remote: Node, filters: list[str], place: Node, found: Findings) -> list[dict[str, Any]]:
    payload, retain = remote.take("payload"), remote.take("retain")
    topic = remote.take("topic")
    qos = _qos(remote)
    if not filters:
        found.lose(topic or place, NO_TOPIC)
        return []
    if payload is not None and payload.as_text() not in ("", "${payload}"):
        found.lose(payload, _NOT_DIRECT)
        return []
    if retain is not None and retain.as_text() == "false":
        table.set("outgoing_retain", False, retain)
    elif retain is not None and retain.as_text() == "true":
        found.lose(retain, "messages keep their own retain flag")
    lines = []
    for one in filters:
        names = _renaming(one, topic.as_text() if topic is not None else "${topic}", "remote_prefix", "local_prefix")
        if names is None:
            found.lose(topic or place, _RENAMED)
        else:
            lines.append({**names, "direction": "out", "qos": qos})
    return lines


def _in(remote: Node, target: str, place: Node, found: Findings) -> list[dict[str, Any]]:
    topic = remote.take("topic")
    qos = _qos(remote)
    remote.take("no_local")
    names = _renaming(topic.as_text() if topic is not None else "", target, "local_prefix", "remote_prefix")
    if names is None or topic is None:
        found.lose(topic or place, _RENAMED if target else "no rule says under which topic its messages arrive here")
        return []
    return [{**names, "direction": "in", "qos": qos}]


def _renaming(filter: str, target: str, there: str, here: str) -> dict[str, str] | None:
    """The filter and prefixes of a line that gives topics of `filter` the name `target`; None when none does."""
    match = _TOPIC.fullmatch(target)
    if match is not None:
        return {"filter": filter, there: match[1]} if match[1] else {"filter": filter}
    if target and "${" not in target and "+" not in filter and "#" not in filter:
        return {"filter": "", here: filter, there: target}
    return None


def _qos(node: Node) -> int:
    qos = node.take("qos")
    return qos.as_whole() if qos is not None and qos.as_text().isdigit() else 1 if qos is None else 2


def _finish(table: Table, lines: list[dict[str, Any]], found: Findings) -> None:
    if lines:
        table.set("topics", lines)
    else:
        found.drop(table)
