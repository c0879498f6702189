"""What the bridges of every EMQX have in common: where they connect to, and as whom."""

from __future__ import annotations

from typing import Any

from broker.importers.backends import carry, set_password
from broker.importers.emqx_listeners import tls_files
from broker.importers.findings import Findings, Table
from broker.importers.servers import is_local, with_port
from broker.importers.source import Node

_VERSIONS = {"mqttv3": "3.1", "mqttv4": "3.1.1", "mqttv5": "5", "v3": "3.1", "v4": "3.1.1", "v5": "5"}


def import_tls(table: Table, ssl: Node, origin: Node | None, found: Findings, *, secure: bool) -> None:
    """`tls`, of what stands in `ssl`."""
    tls: dict[str, Any] = {ours: path for ours, path, _ in tls_files(ssl, found)}
    verify = ssl.take("verify")
    if verify is None or verify.as_text() not in ("verify_peer", "true"):
        tls["insecure"] = True
    if secure:
        table.set("tls", tls, origin, "no certificate is verified, as with EMQX" if "insecure" in tls else "")


def import_remote(table: Table, node: Node, server: Node, address: str, *, secure: bool) -> None:
    """`servers`, `protocol`, `clientid`, `username` and `password`; `address` has no scheme, and a port or none."""
    address = with_port(address, 8883 if secure else 1883)
    table.set("servers", [f"{'mqtts' if secure else 'mqtt'}://{address}"], server)
    version = node.take("proto_ver")
    table.set("protocol", _VERSIONS.get(version.as_text(), "auto") if version is not None else "3.1.1", version)
    carry(table, node, (("client_id", "clientid"), ("clientid", "clientid"), ("username", "username")))
    set_password(table, node)
    if "password" in table.values and not secure and not is_local(address):
        table.set("allow_cleartext", True, remark="the password crosses the network in the clear, as with EMQX")
