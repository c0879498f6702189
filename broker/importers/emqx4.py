"""Imports emqx.conf of EMQ 2 to EMQX 4, `key = value`, with the files of the plug-ins beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from broker.importers.chain import Chain
from broker.importers.emqx4_access import import_backends
from broker.importers.emqx4_bridges import import_bridges
from broker.importers.emqx_limits import import_broker, import_limits
from broker.importers.emqx_listeners import BY_CERTIFICATE, KINDS, address_rules, import_listener, locate
from broker.importers.findings import Findings, Table
from broker.importers.flat import read_flat
from broker.importers.source import Node, Place, SourceError, read_source

_ELDER = {
    "broker.shared_subscription_strategy": "shared_subscription_strategy",
    "mqtt.client.idle_timeout": "idle_timeout",
    "mqtt.conn.idle_timeout": "idle_timeout",
    "mqtt.mqueue.max_length": "max_mqueue_len",
    "mqtt.mqueue.store_qos0": "mqueue_store_qos0",
    "mqtt.session.expiry_interval": "session_expiry_interval",
    "mqtt.session.max_inflight": "max_inflight",
    "mqtt.session.max_subscriptions": "max_subscriptions",
    "mqtt.session.upgrade_qos": "upgrade_qos",
}
"""What EMQ 2 to EMQX 4 called keys that EMQX 5 has below `mqtt`."""
_ASKED = re.compile(r"emqx?_(?:auth|bridge)_")
_LOADED = re.compile(r"\{?\s*(emqx?_\w+)\s*(?:,\s*(true|false)\s*\})?\s*\.")
_LOST = {
    "acl_cache": "rights are read anew every refresh, see [auth.*]",
    "auth": "this key of the backend has no equivalent",
    "auth.http.acl_req": "a service that judges each topic is not asked; rules_url tells all rights of a user at once",
    "bridge": "this key of the bridge has no equivalent",
    "broker": "how the broker works inside cannot be set",
    "broker.sys_interval": "there is no $SYS tree; isthmus status --json has the numbers",
    "cluster": "there is one node; brokers are joined by bridges",
    "dashboard": "there is no dashboard; isthmus status and its --json tell the same",
    "enable_acl_cache": "rights are read anew every refresh, see [auth.*]",
    "listener": "this key of the listener has no equivalent",
    "log": "logs go to standard error, see --log-level and --log-format",
    "management": "there is no HTTP API; isthmus has a control socket",
    "module": "modules of EMQX are not run",
    "mqtt": "there is no such key in [limits]",
    "mqtt.acl_cache": "rights are read anew every refresh, see [auth.*]",
    "mqtt.broker": "there is no $SYS tree; isthmus status --json has the numbers",
    "mqtt.cache_acl": "rights are read anew every refresh, see [auth.*]",
    "node": "this belongs to Erlang; broker.name names the node",
    "plugins": "plug-ins of EMQX are not run",
    "prometheus": "there is no endpoint for Prometheus; isthmus status --json has the numbers",
    "psk": "listeners know no shared keys (TLS-PSK)",
    "retainer": "there is no such key in [limits]",
    "rpc": "there is one node",
    "sysmon": "the system is not watched",
    "vm_mon": "the system is not watched",
    "os_mon": "the system is not watched",
    "web": "hooks are not called; [sinks.http] and [events] send messages and what becomes of clients",
    "zone": "there is no such key in [limits], and one set of limits for all listeners",
}


def import_emqx4(source: Path) -> Findings:
    """What is in the file and in those of the plug-ins that are loaded. Raises SourceError."""
    root = read_flat(source)
    found = Findings(source)
    for plugin in _plugins(root, found):
        read_flat(plugin, root)
    chain = Chain(found)
    import_broker(root, found)
    access = found.table("access")
    zone = _main_zone(root)
    import_limits(_mqtt(root, zone), found)
    _listeners(root, found, chain)
    found.close_default()
    import_backends(root, found, chain)
    _access(root, zone, found, chain, access)
    _retainer(root, found.table("limits"))
    import_bridges(root, found)
    chain.finish()
    found.lose_rest(root, _LOST)
    return found


def _plugins(root: Node, found: Findings) -> list[Path]:
    """The files of plug-ins: of those that are loaded, when that is written somewhere, else of all that are there."""
    folder = root.take("plugins.etc_dir")
    where = Path(locate(found, folder.as_text())) if folder is not None else found.folder / "plugins"
    if not where.is_dir():
        where = found.folder / "plugins"
    files = sorted(where.glob("*.conf")) if where.is_dir() else []
    written = root.take("plugins.loaded_file")
    places = [Path(locate(found, written.as_text()))] if written is not None else []
    places += [found.folder / "loaded_plugins", found.folder.parent / "data" / "loaded_plugins"]
    for place in places:
        if place.is_file():
            return list(_loaded(place, files, found))
    return files


def _loaded(place: Path, files: list[Path], found: Findings) -> Iterator[Path]:
    """Those of the files that this list of plug-ins names, in its order, which is that in which they are asked."""
    text = read_source(place)
    for match in _LOADED.finditer(text):
        if match[2] == "false":
            continue
        file = next((file for file in files if file.stem == match[1]), None)
        if file is not None:
            yield file
        elif _ASKED.match(match[1]):
            where = Place(str(place), text.count("\n", 0, match.start(1)) + 1)
            found.lose(Node(match[1], where), f"is loaded, but there is no plugins/{match[1]}.conf beside the source")


def _main_zone(root: Node) -> Node | None:
    """The zone whose settings become those of all: that of the listener `external`, else the first."""
    zones = root.below("zone")
    named = root.at("listener.tcp.external.zone")
    wanted = named.as_text() if named is not None and named.value is not None else "external"
    return zones.get(wanted) or next(iter(zones.values()), None)


def _mqtt(root: Node, zone: Node | None) -> Node:
    """The settings of `mqtt`, those of the zone before them, under the names they have in EMQX 5."""
    view = Node("mqtt", root.place)
    for name, node in root.below("mqtt").items():
        if node.value is not None:
            view.children[name] = node
    for old, name in _ELDER.items():
        before = root.at(old)
        if before is not None and before.value is not None:
            view.children[name] = before
    for name, node in (zone.children if zone is not None else {}).items():
        if node.value is not None:
            view.children[name] = node
    return view


def _listeners(root: Node, found: Findings, chain: Chain) -> None:
    for kind in KINDS:
        for name, node in root.below(f"listener.{kind}").items():
            if node.value is None:
                raise SourceError(node.place, f"{node.key}: the address of the listener is missing")
            table = import_listener(found, kind, name, node, node, node)
            node.used = True
            rules = [rule for _, rule in sorted(node.below("access").items(), key=_by_number)]
            gate = address_rules(found, table, rules) if rules else None
            if gate is not None:
                chain.gates.append((table, gate))
            _identity(table, node, found)
            _zone(table, node, root, found)


def _by_number(item: tuple[str, Node]) -> tuple[int, str]:
    return len(item[0]), item[0]


def _identity(table: Table, node: Node, found: Findings) -> None:
    part = node.take("peer_cert_as_username")
    if part is not None and part.as_text() in ("cn", "dn") and table.values.get("verify") in ("require", "optional"):
        table.set("username_from", part.as_text(), part, BY_CERTIFICATE)
    elif part is not None:
        found.lose(part, "a user name is made of the cn, dn or san of a certificate that was asked for (verify)")


def _zone(table: Table, node: Node, root: Node, found: Findings) -> None:
    """What the listener's zone says and a listener can say here."""
    name = node.text("zone")
    anonymous = root.take(f"zone.{name}.allow_anonymous") if name else None
    if anonymous is not None:
        table.set("allow_anonymous", anonymous.as_truth(), anonymous)
    mountpoint = root.take(f"zone.{name}.mountpoint") if name else None
    if mountpoint is not None and mountpoint.as_text():
        found.hold(table, mountpoint, "there are no mount points: its clients would see the topics of all others")


def _access(root: Node, zone: Node | None, found: Findings, chain: Chain, access: Table) -> None:
    anonymous = root.take("allow_anonymous") or root.take("mqtt.allow_anonymous")
    open_to_all = anonymous is not None and anonymous.as_truth()
    access.set("allow_anonymous", open_to_all, anonymous)
    if open_to_all and anonymous is not None:
        text = "who gives a user name must be known to a backend; EMQX let in whom none of them knew"
        found.lose(anonymous, text)
    unmatched = root.take("acl_nomatch") or root.take("mqtt.acl_nomatch")
    access.set("no_match", unmatched.as_text() if unmatched is not None else "deny", unmatched)
    action = root.take("acl_deny_action") or (zone.take("acl_deny_action") if zone is not None else None)
    if action is not None:
        access.set("deny_action", action.as_text(), action)
    file = root.take("acl_file") or root.take("mqtt.acl_file")
    usual = found.folder / "acl.conf"
    if file is not None or usual.exists():
        table = found.instance("auth", "rules", "file", file or access.origin)
        table.set("rules", locate(found, file.as_text()) if file is not None else str(usual), file)
        chain.add(table, rights=True, common=True)
    if root.at("auth.http.acl_req") is not None:
        found.deny_the_rest(root.at("auth.http.acl_req") or access.origin)
    _flapping(root, zone, found)


def _flapping(root: Node, zone: Node | None, found: Findings) -> None:
    policy = root.take("flapping_detect_policy")
    switch = zone.take("enable_flapping_detect") if zone is not None else None
    if policy is None:
        if switch is None or not switch.as_truth():
            return
        policy = Node("flapping_detect_policy", switch.place, "30, 1m, 5m")  # the default
    words = policy.as_texts()
    if len(words) != 3 or not re.fullmatch(r"[0-9]{1,9}", words[0]):
        raise SourceError(policy.place, "flapping_detect_policy is a number and two durations, such as 30, 1m, 5m")
    table = found.table("access", "flapping_detect", origin=policy)
    table.set("enable", switch is not None and switch.as_truth(), switch)
    table.set("max_count", int(words[0]), policy)
    table.set("window_time", words[1], policy)
    table.set("ban_time", words[2], policy)


def _retainer(root: Node, table: Table) -> None:
    most = root.take("retainer.max_retained_messages")
    if most is not None and most.as_whole():
        table.set("max_retained_messages", most.as_whole(), most)
    never = root.at("retainer.expiry_interval")
    if never is not None and never.value in ("0", "0s", "0m"):
        never.used = True
    kept = root.at("retainer.storage_type")
    if kept is not None and kept.value in ("disc", "disc_only"):
        kept.used = True
