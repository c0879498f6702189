"""Imports the `connection` blocks of mosquitto, which are RSMB's too."""

from __future__ import annotations

import re
from typing import Any

from broker.importers.findings import Findings, Secret, Table
from broker.importers.mosquitto_file import Block
from broker.importers.servers import is_local, with_port
from broker.importers.source import Node, SourceError

_VERSIONS = {"mqttv31": "3.1", "mqttv311": "3.1.1", "mqttv50": "5"}
_SWITCHES = {
    "bridge_attempt_unsubscribe": "attempt_unsubscribe",
    "bridge_outgoing_retain": "outgoing_retain",
    "cleansession": "clean_session",
    "notifications": "notifications",
    "notifications_local_only": "notifications_local_only",
    "round_robin": "round_robin",
    "try_private": "try_private",
}
_NUMBERS = {
    "bridge_max_packet_size": "max_packet_size",
    "bridge_receive_maximum": "receive_maximum",
    "bridge_session_expiry_interval": "session_expiry",
}
_SECURE = ("bridge_cafile", "bridge_capath", "bridge_identity", "bridge_tls_use_os_certs")
"""Settings that make mosquitto speak TLS."""
_NOT_SECURE = "mosquitto speaks TLS only where bridge_cafile, bridge_capath or bridge_identity says so"
_NAME = "the name in the certificate is verified too; tls.insecure = true would take any certificate from anybody"
_LOST = {
    "bridge_alpn": "no protocol name is offered in the hand-shake",
    "bridge_capath": "a folder of authorities cannot be named; tls.ca is one file",
    "bridge_ciphers": "the ciphers are those of Python's TLS",
    "bridge_ciphers_tls1.3": "the ciphers are those of Python's TLS",
    "bridge_clean_start": "the remote session is kept unless clean_session is true",
    "bridge_dhparamfile": "key exchange is by elliptic curves",
    "bridge_max_topic_alias": "a bridge uses no topic aliases",
    "bridge_reload_type": "isthmus reload restarts the bridges whose tables differ, and no other",
    "bridge_require_ocsp": "certificates are not looked up with their issuer",
    "bridge_tcp_keepalive": "keep_alive finds a dead link",
    "bridge_tcp_user_timeout": "keep_alive and ack_timeout find a dead link",
    "bridge_tls_version": "TLS 1.2 or newer is spoken, whatever the remote broker knows best",
    "idle_timeout": "the link is kept as long as it can be",
    "local_cleansession": "what waits for a bridge is always kept, see queue",
    "local_clientid": "a bridge is no client of this broker",
    "local_password": "a bridge is no client of this broker and needs no rights here",
    "local_username": "a bridge is no client of this broker and needs no rights here",
    "threshold": "the link is kept as long as it can be",
}


def import_bridge(block: Block, found: Findings) -> None:
    """`[bridges.NAME]`."""
    table = found.instance("bridges", block.head.as_text(), "mqtt", block.head)
    table.set("kind", "mqtt")
    secure = _servers(block, table)
    _identity(block, table)
    _tls(block, table, found, secure)
    for key, ours in _SWITCHES.items():
        setting = block.get(key)
        if setting is not None:
            table.set(ours, setting.as_truth(), setting)
    for key, ours in _NUMBERS.items():
        setting = block.get(key)
        if setting is not None:
            table.set(ours, setting.as_whole(), setting)
    _life(block, table, found)
    remark = "mosquitto dropped what exceeded max_queued_messages; here it waits on disk, and a full queue refuses"
    table.set("queue", {"max_bytes": "1GB", "overflow": "reject"}, remark=remark)
    table.set("topics", [_line(topic) for topic in block.settings.get("topic", ())])
    for topic in block.settings.get("topic", ()):
        topic.used = True
    for key, reason in _LOST.items():
        setting = block.get(key)
        if setting is not None:
            found.lose(setting, reason)


def _servers(block: Block, table: Table) -> bool:
    """`servers`; whether TLS is spoken with them."""
    addresses = block.first("address", "addresses")
    if addresses is None:
        raise SourceError(block.head.place, "connection: there is no address")
    secure = any(key in block.settings for key in _SECURE)
    scheme = "mqtts" if secure else "mqtt"
    servers = [f"{scheme}://{with_port(text, 1883)}" for text in addresses.as_text().split()]
    table.set("servers", servers, addresses)
    if not secure and block.first("remote_password", "password") and not all(map(is_local, servers)):
        table.set("allow_cleartext", True, remark="the password crosses the network in the clear, as with mosquitto")
    return secure


def _identity(block: Block, table: Table) -> None:
    version = block.get("bridge_protocol_version")
    if version is None:
        table.set("protocol", "auto", remark="mosquitto's default is 3.1.1; 5 ends circles and is tried first")
    elif version.as_text() in _VERSIONS:
        table.set("protocol", _VERSIONS[version.as_text()], version)
    else:
        raise SourceError(version.place, f"bridge_protocol_version is one of {', '.join(_VERSIONS)}")
    for keys, ours in (
        (("remote_clientid", "clientid"), "clientid"),
        (("remote_username", "username"), "username"),
        (("bridge_bind_address",), "bind_address"),
        (("notification_topic",), "notification_topic"),
    ):
        setting = block.first(*keys)
        if setting is not None:
            table.set(ours, setting.as_text(), setting)
    if "clientid" not in table.values:
        table.notes.append("Without remote_clientid mosquitto was HOST.NAME to the remote broker; here see clientid.")
    password = block.first("remote_password", "password")
    if password is not None:
        table.set("password", Secret(password.as_text()), password)


def _tls(block: Block, table: Table, found: Findings, secure: bool) -> None:
    tls: dict[str, Any] = {}
    origin = None
    for key, ours in (("bridge_cafile", "ca"), ("bridge_certfile", "certificate"), ("bridge_keyfile", "key")):
        setting = block.get(key)
        if setting is not None and not secure:
            found.lose(setting, _NOT_SECURE)
        elif setting is not None:
            origin = origin or setting
            tls[ours] = str(found.folder / setting.as_text())
    insecure, identity, shared = (block.get(f"bridge_{name}") for name in ("insecure", "identity", "psk"))
    if insecure is not None and insecure.as_truth() and secure:
        found.lose(insecure, _NAME)
    if identity is not None and shared is not None:
        origin = origin or identity
        tls.update(psk_identity=identity.as_text(), psk=Secret(shared.as_text()))
    elif identity is not None or shared is not None:
        raise SourceError((identity or shared or block.head).place, "bridge_identity and bridge_psk need each other")
    block.get("bridge_tls_use_os_certs")  # the system's authorities are the default
    if tls:
        table.set("tls", tls, origin)


def _life(block: Block, table: Table, found: Findings) -> None:
    alive = block.get("keepalive_interval")
    if alive is not None:
        table.set("keep_alive", f"{alive.as_whole()}s", alive)
    pause = block.get("restart_timeout")
    if pause is not None:
        words = pause.as_text().split()
        if not 1 <= len(words) <= 2 or not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
            raise SourceError(pause.place, "restart_timeout is a number of seconds, or the shortest and the longest")
        table.set("restart", {"base": f"{max(int(words[0]), 1)}s", "cap": f"{max(int(words[-1]), 1)}s"}, pause)
    start = block.get("start_type")
    if start is not None and start.as_text() == "manual":
        table.set("enabled", False, start, "start_type manual")
    elif start is not None and start.as_text() != "automatic":
        found.lose(start, "a bridge starts with the broker and connects until it succeeds")


def _line(topic: Node) -> dict[str, Any]:
    """``topic PATTERN [out|in|both] [QOS] [LOCAL-PREFIX] [REMOTE-PREFIX]``"""
    words = ["" if word == '""' else word for word in topic.as_text().split()]
    pattern, direction, qos, local, remote, *more = (*words, *("out", "0", "", "")[max(len(words) - 1, 0) :])
    if more:
        raise SourceError(topic.place, "topic: write PATTERN DIRECTION QOS LOCAL-PREFIX REMOTE-PREFIX")
    direction = direction.lower()
    if direction not in ("out", "in", "both"):
        raise SourceError(topic.place, "topic: the direction is out, in or both")
    if qos not in ("0", "1", "2"):
        raise SourceError(topic.place, "topic: the QoS is 0, 1 or 2")
    line: dict[str, Any] = {"filter": pattern, "direction": direction, "qos": int(qos)}
    return line | {key: value for key, value in (("local_prefix", local), ("remote_prefix", remote)) if value}
