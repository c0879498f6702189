"""Reads mosquitto.conf with what it includes: which setting belongs to which listener, bridge, or to all.

mosquitto's file is read from top to bottom. `listener` and `connection` open a block, and settings that listeners or
bridges have belong to the block that is open; a file that is included starts outside of any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from broker.importers.source import Node, Place, SourceError, read_source

SECURITY = frozenset({
    "acl_file", "allow_anonymous", "allow_zero_length_clientid", "auth_plugin", "auth_plugin_deny_special_chars",
    "auto_id_prefix", "password_file", "plugin", "psk_file",
})  # fmt: skip
"""Settings that belong to a listener with `per_listener_settings true`, else to all."""
LISTENER = frozenset({
    "accept_protocol_versions", "allow_duplicate_messages", "bind_interface", "cafile", "capath", "certfile", "ciphers",
    "ciphers_tls1.3", "crlfile", "dhparamfile", "disable_client_cert_date_checks", "enable_proxy_protocol", "http_dir",
    "keyfile", "listener_allow_anonymous", "listener_auto_id_prefix", "max_connections", "max_qos", "max_topic_alias",
    "max_topic_alias_broker", "maximum_qos", "mount_point", "protocol", "proxy_protocol_v2_require_tls", "psk_hint",
    "require_certificate", "socket_domain", "tls_engine", "tls_engine_kpass_sha1", "tls_keyform", "tls_version",
    "use_identity_as_username", "use_subject_as_username", "use_username_as_clientid", "websockets_origin",
})  # fmt: skip
BRIDGE = frozenset({
    "address", "addresses", "bridge_alpn", "bridge_attempt_unsubscribe", "bridge_bind_address", "bridge_cafile",
    "bridge_capath", "bridge_certfile", "bridge_ciphers", "bridge_ciphers_tls1.3", "bridge_clean_start",
    "bridge_dhparamfile", "bridge_identity", "bridge_insecure", "bridge_keyfile", "bridge_max_packet_size",
    "bridge_max_topic_alias", "bridge_outgoing_retain", "bridge_protocol_version", "bridge_psk",
    "bridge_receive_maximum", "bridge_reload_type", "bridge_require_ocsp", "bridge_session_expiry_interval",
    "bridge_tcp_keepalive", "bridge_tcp_user_timeout", "bridge_tls_use_os_certs", "bridge_tls_version",
    "cleansession", "clientid", "idle_timeout", "keepalive_interval", "local_cleansession", "local_clientid",
    "local_password", "local_username", "notification_topic", "notifications", "notifications_local_only", "password",
    "remote_clientid", "remote_password", "remote_username", "restart_timeout", "round_robin", "start_type",
    "threshold", "topic", "try_private", "username",
})  # fmt: skip
REPEATED = frozenset({
    "topic", "plugin", "auth_plugin", "include_dir", "log_dest", "log_type", "plugin_load", "plugin_use",
    "websockets_origin",
})  # fmt: skip
"""Settings that may stand in a block several times."""

_SWITCHES = frozenset({
    "allow_anonymous", "allow_duplicate_messages", "allow_zero_length_clientid", "auth_plugin_deny_special_chars",
    "autosave_on_changes", "bridge_attempt_unsubscribe", "bridge_clean_start", "bridge_insecure",
    "bridge_outgoing_retain",
    "bridge_require_ocsp", "bridge_tls_use_os_certs", "check_retain_source", "cleansession", "connection_messages",
    "disable_client_cert_date_checks", "enable_control_api", "enable_proxy_protocol", "listener_allow_anonymous",
    "local_cleansession", "log_timestamp", "notifications", "notifications_local_only", "per_listener_settings",
    "persistence", "queue_qos0_messages", "require_certificate", "retain_available", "round_robin", "set_tcp_nodelay",
    "try_private", "upgrade_outgoing_qos", "use_identity_as_username", "use_subject_as_username",
    "use_username_as_clientid",
})  # fmt: skip
_NUMBERS = frozenset({
    "autosave_interval", "bridge_max_packet_size", "bridge_max_topic_alias", "bridge_receive_maximum",
    "bridge_session_expiry_interval", "global_max_clients", "global_max_connections", "idle_timeout",
    "keepalive_interval", "max_connections", "max_inflight_bytes", "max_inflight_messages", "max_keepalive",
    "max_packet_size", "max_qos", "max_queued_bytes", "max_queued_messages", "max_topic_alias",
    "max_topic_alias_broker", "maximum_qos", "memory_limit", "message_size_limit", "port", "retain_expiry_interval",
    "sys_interval", "threshold",
})  # fmt: skip
_WORDS = _SWITCHES | _NUMBERS | {
    "bridge_protocol_version", "log_facility", "persistent_client_expiration", "protocol", "retry_interval",
    "socket_domain", "start_type", "store_clean_interval", "websockets_headers_size", "websockets_log_level",
}  # fmt: skip
"""Settings of which mosquitto reads the first word, `# …` behind it does no harm; the last of several counts."""
OPTIONS = ("auth_opt_", "plugin_opt_")
"""What settings that belong to a plug-in begin with."""


@dataclass(slots=True)
class Block:
    """A listener, a bridge, or what stands outside of both."""

    head: Node
    """The line that opened it; its value is what the line says."""
    settings: dict[str, list[Node]] = field(default_factory=dict)

    def get(self, key: str) -> Node | None:
        """The setting of this name, which counts as used from now on."""
        found = self.settings.get(key)
        if not found:
            return None
        found[-1].used = True
        return found[-1]

    def first(self, *keys: str) -> Node | None:
        """The first of several names for one setting that is there."""
        return next((found for key in keys if (found := self.get(key)) is not None), None)

    def truth(self, key: str, default: bool) -> bool:
        found = self.get(key)
        return default if found is None else found.as_truth()


@dataclass(slots=True)
class Mosquitto:
    """A whole configuration."""

    general: Block
    default: Block
    """The listener that `port` and settings before the first `listener` line speak of."""
    listeners: list[Block] = field(default_factory=list)
    bridges: list[Block] = field(default_factory=list)
    per_listener: bool = False

    def security(self, listener: Block) -> Block:
        """Where this listener's passwords and rights are said."""
        return listener if self.per_listener else self.general

    def blocks(self) -> list[Block]:
        return [self.general, self.default, *self.listeners, *self.bridges]


def read_mosquitto(path: Path) -> Mosquitto:
    """The configuration in this file and in those it includes. Raises SourceError."""
    settings = _settings(path)
    nowhere = Node("listener", Place(str(path), 1))
    found = Mosquitto(Block(nowhere), Block(nowhere))
    for setting in _flat(settings):
        if setting.key == "per_listener_settings":
            found.per_listener = setting.as_truth()
    _sort(found, settings)
    return found


def _settings(path: Path, main: bool = True) -> list[Node]:
    """The settings of a file; those of an included file are items of an item of the line that includes it. As with
    mosquitto only the main file includes others."""
    found = []
    for number, row in enumerate(read_source(path).split("\n"), 1):
        text = row.strip()
        if not text or text.startswith("#"):
            continue
        key, *rest = text.split(None, 1)
        setting = Node(key, Place(str(path), number), rest[0] if rest else None)
        if setting.value is None:
            known = key in SECURITY | LISTENER | BRIDGE | _WORDS | {"connection", "include_dir", "listener", "port"}
            # else the space may be what is missing, before a secret
            raise SourceError(setting.place, f"{key} needs a value" if known else "expected NAME VALUE")
        if key in _WORDS:
            setting.value = rest[0].split()[0]
        _check(setting)
        found.append(setting)
        if key == "include_dir" and main:
            setting.used = True
            for file in _included(setting):
                if file.resolve() == path.resolve():
                    raise SourceError(setting.place, "include_dir: this file itself is in that folder")
                setting.items.append(Node("", Place(str(file), 1), items=_settings(file, main=False)))
    return found


def _included(setting: Node) -> list[Path]:
    folder = Path(setting.place.file).parent / setting.as_text()
    try:
        names = [one.name for one in folder.iterdir() if one.name.endswith(".conf")]
    except OSError as error:
        raise SourceError(setting.place, f"include_dir {folder}: {error.strerror or error}") from None
    return [folder / name for name in sorted(names, key=lambda name: [(one.upper(), one) for one in name])]


def _flat(settings: list[Node]) -> Iterator[Node]:
    for setting in settings:
        yield setting
        for file in setting.items:
            yield from _flat(file.items)


def _sort(found: Mosquitto, settings: list[Node]) -> None:
    """Give each setting of one file to the block it belongs to."""
    listener, bridge = found.default, None
    for setting in settings:
        key = setting.key
        if key == "include_dir" and setting.used:
            for file in setting.items:
                _sort(found, file.items)
        elif key == "listener":
            listener = Block(setting)
            found.listeners.append(listener)
        elif key == "connection":
            bridge = Block(setting)
            found.bridges.append(bridge)
        elif key in BRIDGE:
            if bridge is None:
                raise SourceError(setting.place, f"{key} stands before any connection")
            _add(bridge, setting)
        elif key in ("port", "bind_address"):
            _add(found.default, setting)
        elif key in LISTENER or (found.per_listener and (key in SECURITY or key.startswith(OPTIONS))):
            _add(listener, setting)
        else:
            _add(found.general, setting)


def _add(block: Block, setting: Node) -> None:
    before = block.settings.setdefault(setting.key, [])
    if before and setting.key not in REPEATED | _WORDS and not setting.key.startswith(OPTIONS):
        raise SourceError(setting.place, f"{setting.key} stands in {before[-1].place} already")
    before.append(setting)


def _check(setting: Node) -> None:
    """SourceError for what mosquitto itself would not start with."""
    if setting.key in _SWITCHES:
        setting.as_truth()
    elif setting.key in _NUMBERS:
        setting.as_whole()
    elif setting.key == "listener" and not re.fullmatch(r"[0-9]{1,9}", str(setting.value).split()[0]):
        raise SourceError(setting.place, "listener begins with a port")
