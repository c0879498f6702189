"""`[broker]` and `[limits]` of the keys that EMQX has had under these names since EMQX 3."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from broker.importers.findings import Findings
from broker.importers.source import Node

MANY = 100_000_000


def milliseconds(node: Node) -> Any:
    """A duration; a number alone is of milliseconds."""
    return node.as_duration("ms")


def _size(node: Node) -> Any:
    node.as_size()
    return node.value


_MQTT: dict[str, tuple[str, Callable[[Node], Any], Any]] = {
    "idle_timeout": ("connect_timeout", milliseconds, "1h"),
    "max_clientid_len": ("max_clientid_length", Node.as_whole, 65_535),
    "max_inflight": ("max_inflight", Node.as_whole, 65_535),
    "max_mqueue_len": ("max_queued_messages", Node.as_whole, MANY),
    "max_packet_size": ("max_packet_size", _size, 268_435_460),
    "max_subscriptions": ("max_subscriptions", Node.as_whole, 10_000_000),
    "max_topic_alias": ("topic_alias_maximum", Node.as_whole, 65_535),
    "max_topic_levels": ("max_topic_levels", Node.as_whole, 65_535),
    "session_expiry_interval": ("session_expiry", Node.as_duration, 4_294_967_295),
    "strict_mode": ("strict", Node.as_truth, True),
}
"""Keys of `mqtt` and of zones: ours, how they are read, and what `infinity` is."""
_UNLIMITED = ("max_inflight", "max_mqueue_len", "max_subscriptions", "max_topic_levels")
"""Keys for which 0 is infinity."""
_AS_HERE = {
    "exclusive_subscription": ("false",),
    "ignore_loop_deliver": ("false",),
    "max_qos_allowed": ("2",),
    "mqueue_default_priority": ("lowest", "highest"),
    "mqueue_priorities": ("disabled", "none"),
    "mqueue_store_qos0": ("true", "on"),
    "peer_cert_as_clientid": ("disabled",),
    "response_information": ("",),
    "retain_available": ("true",),
    "retry_interval": ("0", "0s", "infinity"),
    "server_keepalive": ("disabled", "0"),
    "shared_subscription": ("true",),
    "upgrade_qos": ("false", "off"),
    "use_username_as_clientid": ("false",),
    "wildcard_subscription": ("true",),
}
"""Values of `mqtt` that are how it works here, where there is no key."""
_STRATEGIES = {"round_robin": "round_robin", "hash_clientid": "hash", "hash": "hash"}


def import_broker(root: Node, found: Findings) -> None:
    """`[broker]`."""
    broker = found.table("broker")
    name = root.take("node.name")
    if name is not None:
        broker.set("name", re.sub(r"[^A-Za-z0-9._-]", "-", name.as_text())[:64], name)
    broker.set("data", "data", remark="a folder of its own; what EMQX keeps in its own is not read")
    broker.set("durability", "flush")


def import_limits(mqtt: Node | None, found: Findings) -> None:
    """`[limits]` of the keys that `mqtt` and zones have had in all versions since EMQX 3."""
    table = found.table("limits")
    table.set("max_subscriptions", 10_000_000, remark="EMQX sets no limit")
    table.set("max_clientid_length", 65_535, remark="EMQX's default")
    for key, (ours, read, infinity) in _MQTT.items():
        node = mqtt.take(key) if mqtt is not None else None
        if node is None:
            continue
        unlimited = node.as_text() == "infinity" or (key in _UNLIMITED and node.as_text() == "0")
        table.remarks.pop(ours, None)
        table.set(ours, infinity if unlimited else read(node), node)
    strategy = mqtt.at("shared_subscription_strategy") if mqtt is not None else None
    if strategy is not None and strategy.value in _STRATEGIES:
        table.set("shared_strategy", _STRATEGIES[strategy.as_text()], strategy)
    for key, values in _AS_HERE.items():
        node = mqtt.at(key) if mqtt is not None else None
        if node is not None and node.value is not None and node.as_text() in values:
            node.used = True
    retain = mqtt.at("retain_available") if mqtt is not None else None
    if retain is not None and not retain.used:
        table.set("max_retained_messages", 0, retain, "retain_available = false: nothing is retained")
