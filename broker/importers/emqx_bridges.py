"""What the bridges of every EMQX have in common: where they connect to, and as whom."""

from __future__ import annotations

from broker.importers.findings import Secret, Table
from broker.importers.servers import is_local, with_port
from broker.importers.source import Node

_VERSIONS = {"mqttv3": "3.1", "mqttv4": "3.1.1", "mqttv5": "5", "v3": "3.1", "v4": "3.1.1", "v5": "5"}


def import_remote(table: Table, node: Node, server: Node, address: str, *, secure: bool) -> None:
    """`servers`, `protocol`, `clientid`, `username` and `password`; `address` has no scheme, and a port or none."""
    address = with_port(address, 8883 if secure else 1883)
    table.set("servers", [f"{'mqtts' if secure else 'mqtt'}://{address}"], server)
    version = node.take("proto_ver")
    table.set("protocol", _VERSIONS.get(version.as_text(), "auto") if version is not None else "3.1.1", version)
    for key, ours in (("client_id", "clientid"), ("clientid", "clientid"), ("username", "username")):
        setting = node.take(key)
        if setting is not None and setting.as_text():
            table.set(ours, setting.as_text(), setting)
    password = node.take("password")
    if password is not None and password.as_text():
        table.set("password", Secret(password.as_text()), password)
        if not secure and not is_local(address):
            table.set("allow_cleartext", True, remark="the password crosses the network in the clear, as with EMQX")
