"""Imports listeners of EMQX, whose keys stayed the same over its versions, and what they say about addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from broker.importers.findings import Findings, Table
from broker.importers.servers import is_local
from broker.importers.source import Node, SourceError

Network = IPv4Network | IPv6Network

KINDS = {"tcp": "tcp", "ssl": "tls", "ws": "ws", "wss": "wss"}
_USUAL = {"tcp": "*:1883", "ssl": "*:8883", "ws": "*:8083", "wss": "*:8084"}
_RATE = re.compile(r"([0-9]{1,9})\s*/\s*([1-9][0-9]{0,8})?\s*(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
_HOLDS = {
    "mountpoint": "there are no mount points: its clients would see the topics of all others",
    "proxy_protocol": "the PROXY protocol is not understood, and its first line is no MQTT",
}
BY_CERTIFICATE = "a certificate is enough here; EMQX asked for the password of its user too"
_ENCRYPTED = "the private key is encrypted, and there is no place for its password; write it without one"


def locate(found: Findings, text: str) -> str:
    """The absolute path that EMQX means; its own folders are found from where the source is."""
    folder = found.folder
    text = re.sub(r"\$\{EMQX_ETC_DIR\}|\{\{\s*platform_etc_dir\s*\}\}", str(folder), text)
    text = re.sub(r"\$\{EMQX_DATA_DIR\}|\{\{\s*platform_data_dir\s*\}\}", str(folder.parent / "data"), text)
    path = Path(text)
    if path.is_absolute():
        return str(path)
    places = [folder / path, folder.parent / path]
    if path.parts[:1] == ("etc",):  # EMQX starts at its own root; the source may have been taken out of its etc/
        places.append(folder / Path(*path.parts[1:]))
    return str(next((place for place in places if place.exists()), places[-1]))


def tls_files(ssl: Node, found: Findings) -> Iterator[tuple[str, str, Node]]:
    """What we call each file of TLS that is named there, its path, and the setting."""
    for key, ours in (("cacertfile", "ca"), ("certfile", "certificate"), ("keyfile", "key")):
        setting = ssl.take(key)
        if setting is not None and setting.as_text():
            yield ours, locate(found, setting.as_text()), setting


def import_listener(found: Findings, kind: str, name: str, node: Node, tls: Node, web: Node) -> Table:
    """One `[listeners.*]`; `tls` and `web` are where the keys of TLS and WebSocket stand, maybe `node` itself."""
    ours = KINDS[kind]
    table = found.instance("listeners", ours if name in ("default", "external") else f"{ours}-{name}", ours, node)
    bind = node.take("bind") or (node if node.value is not None else None)
    table.set("bind", _bind(bind) if bind is not None else _USUAL[kind], bind)
    for key in ("enable", "enabled"):
        switch = node.take(key)
        if switch is not None and not switch.as_truth():
            table.set("enabled", False, switch)
    most = node.take("max_connections") or node.take("max_clients")
    if most is not None:
        table.set("max_connections", 10_000_000 if most.as_text() == "infinity" else most.as_whole(), most)
    rate = node.take("max_conn_rate")
    if rate is not None and rate.as_text() != "infinity":
        table.set("max_connection_rate", _rate(rate), rate)
    if ours in ("tls", "wss"):
        _tls(found, table, tls)
    elif not is_local(str(table.values["bind"])):
        remark = "passwords cross the network in the clear, as with EMQX; a listener of kind tls ends that"
        table.set("allow_cleartext", True, remark=remark)
    if ours in ("ws", "wss"):
        _web(table, web)
    for key, reason in _HOLDS.items():
        setting = node.take(key)
        if setting is not None and setting.as_text() not in ("", "false", "off"):
            found.hold(table, setting, reason)
    return table


def address_rules(found: Findings, table: Table, rules: list[Node]) -> str | None:
    """The name of an [auth.*] that lets clients come from where EMQX's rules of this listener let them; None when that
    is everywhere."""
    allowed: list[Network] = []
    denied: list[Network] = []
    closed = False
    for node in rules:
        node.used = True
        for text in [node.value] if isinstance(node.value, str) else node.as_texts():
            word, _, network = str(text).strip().partition(" ")
            if word not in ("allow", "deny") or not network:
                raise SourceError(node.place, f"{node.key}: write allow or deny, and a network or all")
            if network.strip() == "all":
                closed = word == "deny"
                break
            try:
                one = ip_network(network.strip(), strict=False)
            except ValueError:
                found.hold(table, node, "a rule about addresses names no network")
                return None
            if word == "allow":
                allowed.append(one)
            else:
                denied += _without(one, allowed)  # the first rule that applies decides
    if not closed:
        allowed = []  # who is in no rule may come
    if not closed and not denied:
        return None
    if closed and not allowed:
        found.hold(table, rules[0], "nobody may connect")
        return None
    auth = found.instance("auth", f"{table.name}-addresses", "address", rules[0])
    auth.notes.append(f"From where clients may come to listeners.{table.name}.")
    if closed:
        auth.set("allow", list(map(str, allowed)), rules[0])
    if denied:
        auth.set("deny", list(map(str, denied)), rules[0])
    return auth.name


def _without(network: Network, others: list[Network]) -> list[Network]:
    """What is left of a network without others."""
    left = [network]
    for other in others:
        left = [part for one in left for part in _minus(one, other)]
    return left


def _minus(one: Network, other: Network) -> list[Network]:
    if isinstance(one, IPv4Network) and isinstance(other, IPv4Network):
        if one.subnet_of(other):
            return []
        return list(one.address_exclude(other)) if other.subnet_of(one) else [one]
    if isinstance(one, IPv6Network) and isinstance(other, IPv6Network):
        if one.subnet_of(other):
            return []
        return list(one.address_exclude(other)) if other.subnet_of(one) else [one]
    return [one]


def _bind(node: Node) -> str:
    text = node.as_text()
    if text.isdigit():
        return f"*:{text}"
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise SourceError(node.place, f"{node.key} is a port or an address with a port")
    host = host or "*"
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _rate(node: Node) -> float:
    text = node.as_text()
    match = _RATE.fullmatch(text)
    if match is not None:
        return round(int(match[1]) / (int(match[2] or 1) * _UNITS[match[3]]), 3)
    if text.replace("/s", "").isdigit():
        return float(text.replace("/s", ""))
    raise SourceError(node.place, f"{node.key} is a rate such as 1000/s")


def _tls(found: Findings, table: Table, tls: Node) -> None:
    for key, ours in (("certfile", "certificate"), ("keyfile", "key")):
        path = tls.take(key)
        if path is not None:
            table.set(ours, locate(found, path.as_text()), path)
    authorities, verify = tls.take("cacertfile"), tls.take("verify")
    required = tls.truth("fail_if_no_peer_cert", False)
    if verify is not None and verify.as_text() == "verify_peer":
        if authorities is not None:
            table.set("client_ca", locate(found, authorities.as_text()), authorities)
        table.set("verify", "require" if required else "optional", verify)
    else:
        table.set("verify", "none", verify)
    versions = tls.take("versions") or tls.take("tls_versions")
    if versions is not None:
        names = versions.as_texts()
        table.set("tls_min", "1.3" if names == ["tlsv1.3"] else "1.2", versions)
        if {"tlsv1.1", "tlsv1"} & set(names):
            found.lose(versions, "nothing older than TLS 1.2 is spoken")
    password = tls.take("password") or tls.take("key_password")
    if password is not None and password.as_text():
        found.hold(table, password, _ENCRYPTED)


def _web(table: Table, web: Node) -> None:
    path = web.take("mqtt_path")
    table.set("path", path.as_text() if path is not None else "/mqtt", path)
    checked = web.take("check_origin_enable")
    origins = web.take("check_origins")
    if checked is not None and checked.as_truth() and origins is not None:
        table.set("origins", origins.as_texts(), origins)
        absent = web.take("allow_origin_absence")
        if absent is not None:
            table.set("origin_required", not absent.as_truth(), absent)
