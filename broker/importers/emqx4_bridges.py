"""Imports the bridges of emqx_bridge_mqtt, as EMQX 3 and 4 have them."""

from __future__ import annotations

from typing import Any

from broker.importers.emqx_bridges import import_remote, import_tls
from broker.importers.findings import Findings
from broker.importers.source import Node, SourceError

_TRUTHS = {"bridge_mode": "try_private"}
_TIMES = {"keepalive": "keep_alive", "retry_interval": "ack_timeout"}


def import_bridges(root: Node, found: Findings) -> None:
    """`[bridges.*]`."""
    owner = root.text("node.name", "emqx@127.0.0.1")
    for name, node in root.below("bridge.mqtt").items():
        if node.at("address") is not None:
            _bridge(name, node, owner, found)


def _bridge(name: str, node: Node, owner: str, found: Findings) -> None:
    address = node.take("address")
    assert address is not None
    secure = node.truth("ssl", False)
    if "@" in address.as_text():
        found.lose(address, "a bridge between nodes of Erlang has no equivalent; give the broker's address and port")
        return
    table = found.instance("bridges", name, "mqtt", address)
    table.set("kind", "mqtt")
    host = address.as_text().partition("://")[2] or address.as_text()
    import_remote(table, node, address, host, secure=secure)
    clean = node.take("clean_start")
    remark = "EMQX's default true loses what the remote has for us" if clean is None or clean.as_truth() else ""
    table.set("clean_session", False, clean, remark)
    for key, ours in _TRUTHS.items():
        setting = node.take(key)
        if setting is not None:
            table.set(ours, setting.as_truth(), setting)
    for key, ours in _TIMES.items():
        setting = node.take(key)
        if setting is not None and setting.as_seconds():
            table.set(ours, setting.as_text(), setting)
    pause = node.take("reconnect_interval")
    if pause is not None:
        table.set("restart", {"base": "1s", "cap": pause.as_text() if pause.as_seconds() > 1 else "1s"}, pause)
    start = node.take("start_type")
    if start is not None and start.as_text() == "manual":
        table.set("enabled", False, start, "start_type manual")
    import_tls(table, node, node.at("ssl"), found, secure=secure)
    lines = _lines(node, owner)
    if lines:
        table.set("topics", lines)
    else:
        found.drop(table)
        found.lose(address, "no topic crosses this bridge: it has neither forwards nor subscription")


def _lines(node: Node, owner: str) -> list[dict[str, Any]]:
    forwards = node.take("forwards")
    there = _prefix(node, owner, "forward_mountpoint", "mountpoint")
    here = _prefix(node, owner, "receive_mountpoint")
    lines: list[dict[str, Any]] = []
    for filter in forwards.as_texts() if forwards is not None else []:
        lines.append({"filter": filter, "direction": "out", "qos": 1} | ({"remote_prefix": there} if there else {}))
    for one in node.below("subscription").values():
        topic, qos = one.take("topic"), one.take("qos")
        if topic is None:
            raise SourceError(one.place, f"{one.key}: the topic is missing")
        level = qos.as_whole() if qos is not None else 1
        line = {"filter": topic.as_text(), "direction": "in", "qos": level}
        lines.append(line | ({"local_prefix": here} if here else {}))
    return lines


def _prefix(node: Node, owner: str, *keys: str) -> str:
    for key in keys:
        setting = node.take(key)
        if setting is not None:
            return setting.as_text().replace("${node}", owner)
    return ""
