"""Imports EMQX 5's emqx.conf: what holds for all clients, and the listeners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker.importers.chain import Chain
from broker.importers.emqx5_access import import_access
from broker.importers.emqx5_bridges import import_bridges
from broker.importers.emqx5_rules import read_rules
from broker.importers.emqx5_sinks import import_sinks
from broker.importers.emqx_limits import import_broker, import_limits, milliseconds
from broker.importers.emqx_listeners import BY_CERTIFICATE, KINDS, address_rules, import_listener
from broker.importers.findings import Findings, Table
from broker.importers.hocon import read_hocon
from broker.importers.source import Node

TOMBSTONE = "marked_for_deletion"
"""What EMQX writes in place of a table that was deleted in its dashboard."""


_FLAPPING: dict[str, Callable[[Node], Any]] = {
    "enable": Node.as_truth,
    "max_count": Node.as_whole,
    "window_time": milliseconds,
    "ban_time": milliseconds,
}
_SECTIONS = {
    "actions": "this key of the action has no equivalent",
    "alarm": "there are no alarms; isthmus status and the log tell what fails",
    "api_key": "there is no HTTP API; isthmus has a control socket",
    "authentication": "this key of the backend has no equivalent",
    "authorization": "rights are read anew every refresh, see [auth.*]",
    "auto_subscribe": "clients are not subscribed by the broker",
    "bridges": "this key of the bridge has no equivalent",
    "broker": "how the broker works inside cannot be set",
    "cluster": "there is one node; brokers are joined by bridges",
    "conn_congestion": "a client that does not read is disconnected after limits.stall_timeout",
    "connectors": "this key of the connector has no equivalent",
    "dashboard": "there is no dashboard; isthmus status and its --json tell the same",
    "delayed": "messages are not delayed",
    "durable_sessions": "sessions and queues are always on disk",
    "exhook": "hooks of other programs are not called",
    "force_gc": "memory is managed by Python",
    "force_shutdown": "queues have limits of their own (limits.max_queued_messages, max_queued_bytes)",
    "gateway": "there are no gateways for other protocols",
    "license": "no licence is needed",
    "listeners": "this key of the listener has no equivalent",
    "log": "logs go to standard error, see --log-level and --log-format",
    "mqtt": "there is no such key in [limits]",
    "node": "this belongs to Erlang; broker.name names the node",
    "overload_protection": "broker.max_memory does that",
    "plugins": "plug-ins of EMQX are not run",
    "prometheus": "there is no endpoint for Prometheus; isthmus status --json has the numbers",
    "psk_authentication": "listeners know no shared keys (TLS-PSK)",
    "retainer": "there is no such key in [limits]",
    "rewrite": "topics are not rewritten",
    "rpc": "there is one node",
    "rule_engine": "only rules of the form SELECT * FROM topics have an equivalent: filters of a sink or bridge",
    "sources": "this key of the source has no equivalent",
    "slow_subs": "there is no list of slow subscriptions",
    "sys_topics": "there is no $SYS tree; isthmus status --json has the numbers",
    "sysmon": "the system is not watched",
    "telemetry": "nothing is sent to anybody",
    "topic_metrics": "topics are not counted one by one",
    "zones": "there are no zones; what differs by listener stands in its table",
}


def import_emqx5(source: Path) -> Findings:
    """What is in the file and in those it includes. Raises SourceError."""
    root = read_hocon(source)
    _bury(root)
    found = Findings(source)
    chain = Chain(found)
    import_broker(root, found)
    found.table("access", origin=root.at("authorization"))
    import_limits(root.at("mqtt"), found)
    _retainer(root, found.table("limits"), found)
    _flapping(root, found)
    listeners = _listeners(root, found, chain)
    found.close_default()
    import_access(root, found, chain, listeners)
    _identity(root, found)
    rules = read_rules(root)
    import_bridges(root, found, rules)
    import_sinks(root, found, rules)
    rules.finish(found)
    chain.finish()
    found.lose_rest(root, _SECTIONS)
    return found


def _bury(node: Node) -> None:
    """Take out what is marked as deleted. A listener becomes one that is turned off: EMQX's own is not meant then."""
    for name, child in list(node.children.items()):
        if child.value != TOMBSTONE:
            _bury(child)
        elif node.key.startswith("listeners."):
            child.value, child.children = None, {"enable": Node(f"{child.key}.enable", child.place, False)}
        else:
            del node.children[name]


def _retainer(root: Node, table: Table, found: Findings) -> None:
    if not root.truth("retainer.enable", True):
        table.set("max_retained_messages", 0, root.at("retainer.enable"), "nothing is retained")
    most = root.take("retainer.backend.max_retained_messages")
    if most is not None and most.as_whole():
        table.set("max_retained_messages", most.as_whole(), most)
    for key, usual in (("type", ("built_in_database",)), ("storage_type", ("disc", "disk"))):
        kept = root.at(f"retainer.backend.{key}")
        if kept is not None and kept.value in usual:
            kept.used = True
    for key in ("retainer.msg_expiry_interval", "retainer.msg_clear_interval"):
        never = root.at(key)
        if never is not None and never.value is not None and never.as_seconds() == 0:
            never.used = True


def _flapping(root: Node, found: Findings) -> None:
    node = root.at("flapping_detect")
    if node is None:
        return
    table = found.table("access", "flapping_detect", origin=node)
    for key in _FLAPPING:
        setting = node.take(key)
        if setting is not None and setting.value not in ("disable", "disabled"):
            table.set(key, _FLAPPING[key](setting), setting)


def _listeners(root: Node, found: Findings, chain: Chain) -> list[tuple[Table, Node]]:
    made = []
    nothing = Node("", found.table("broker").origin.place)
    for kind in KINDS:
        for name, node in root.below(f"listeners.{kind}").items():
            if node.at("bind") is None and not (node.truth("enable", True) and node.truth("enabled", True)):
                node.use()  # one of EMQX's own that is turned off
                continue
            tls, web = node.at("ssl_options") or nothing, node.at("websocket") or nothing
            table = import_listener(found, kind, name, node, tls, web)
            rules = node.at("access_rules")
            gate = address_rules(found, table, [rules]) if rules is not None and rules.value else None
            if gate is not None:
                chain.gates.append((table, gate))
            zone = node.take("zone")
            if zone is not None and zone.as_text() != "default":
                found.lose(zone, _SECTIONS["zones"])
            made.append((table, node))
    for kind, bind in (("tcp", "*:1883"), ("ws", "*:8083")):
        if not root.below(f"listeners.{kind}"):
            table = found.table("listeners", kind)
            table.notes.append("EMQX opens it unless told otherwise, as it does 8883 and 8084 with a test certificate.")
            table.set("bind", bind)
            table.set("allow_cleartext", True, remark="passwords cross the network in the clear, as with EMQX")
    return made


def _identity(root: Node, found: Findings) -> None:
    """`mqtt.peer_cert_as_username` holds for every listener that asks for certificates."""
    part = root.take("mqtt.peer_cert_as_username")
    if part is None or part.as_text() == "disabled":
        return
    if part.as_text() not in ("cn", "dn"):
        found.lose(part, "a user name is made of a certificate's cn, dn or san")
        return
    for table in found.room("listeners"):
        if table.values.get("verify") in ("require", "optional"):
            table.set("username_from", part.as_text(), part, BY_CERTIFICATE)
