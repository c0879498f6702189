"""Imports mosquitto.conf: what holds for all clients. Listeners and bridges have modules of their own."""

from __future__ import annotations

import re
from pathlib import Path

from broker.config.types import format_duration
from broker.importers.findings import UNKNOWN, Findings, Table
from broker.importers.mosquitto_bridges import import_bridge
from broker.importers.mosquitto_file import OPTIONS, REPEATED, Block, Mosquitto, read_mosquitto
from broker.importers.mosquitto_listeners import import_listeners
from broker.importers.source import Node, SourceError

NEVER = 4_294_967_295
"""Seconds that MQTT takes for: never."""
MANY = 100_000_000
ROOM_FOR_TOPIC = 8_192
"""Bytes that topic and properties may take besides the payload `message_size_limit` speaks of."""

_LOGS = "logs go to standard error, see --log-level and --log-format; the service manager keeps them"
_LOST = {
    "auto_id_prefix": "ids given by the broker have no prefix to choose",
    "autosave_interval": "nothing waits for an interval: what is acknowledged is on disk (broker.durability)",
    "autosave_on_changes": "nothing waits for an interval: what is acknowledged is on disk (broker.durability)",
    "clientid_prefixes": "client ids are not judged by prefix; rules can name them",
    "connection_messages": _LOGS,
    "enable_control_api": "isthmus has a control socket of its own",
    "global_max_clients": "there is max_connections for each listener, and access.quota",
    "global_max_connections": "there is max_connections for each listener, and access.quota",
    "http_dir": "files are not served",
    "include_dir": "mosquitto includes from its main file alone",
    "log_dest": _LOGS,
    "log_facility": _LOGS,
    "log_timestamp": _LOGS,
    "log_timestamp_format": _LOGS,
    "log_type": _LOGS,
    "max_inflight_bytes": "what is in flight is limited by number (limits.max_inflight)",
    "packet_buffer_size": "buffers grow as they are needed",
    "persistence_file": "mosquitto.db is not read: sessions and retained messages begin anew in broker.data",
    "persistence_location": "mosquitto.db is not read: sessions and retained messages begin anew in broker.data",
    "pid_file": "there is no file of the process id; the service manager knows it",
    "retain_expiry_interval": "retained messages expire when their publisher says so (MQTT 5 message expiry)",
    "retry_interval": "messages are sent again when a client comes back, as MQTT 3.1.1 and 5 ask",
    "store_clean_interval": "memory is given back at once",
    "sys_interval": "there is no $SYS tree; isthmus status --json has the numbers",
    "use_identity_as_username": "has no effect without certfile and require_certificate true",
    "use_subject_as_username": "has no effect without certfile and require_certificate true",
    "user": "the broker stays who it was started as; name the user in the service unit",
    "websockets_headers_size": "the size of headers is fixed",
    "websockets_log_level": _LOGS,
    "websockets_origin": "has no effect without protocol websockets",
}
_PLUGINS = ("plugin", "auth_plugin", "global_plugin", "plugin_load", "plugin_use")
_PLUGIN = "plug-ins of mosquitto are not run; what they do may be one of [auth.*], see REFERENCE.md"
_AS_HERE = {
    "allow_duplicate_messages": "true",
    "allow_zero_length_clientid": "true",
    "auth_plugin_deny_special_chars": "true",
    "queue_qos0_messages": "true",
    "set_tcp_nodelay": "true",
    "upgrade_outgoing_qos": "false",
}
"""Settings that have no key here, but one value that is how it works here."""
_UNLIKE = {
    "allow_duplicate_messages": "a client gets a message once for each of its subscriptions that covers it",
    "allow_zero_length_clientid": "MQTT 3.1.1 and 5 let a client leave its id to the broker; there is no switch",
    "auth_plugin_deny_special_chars": "names with + # / are never put into rules with placeholders",
    "set_tcp_nodelay": "small packets are never held back here",
    "queue_qos0_messages": "QoS 0 waits for a client that is away as QoS 1 does, and is the first to go",
    "upgrade_outgoing_qos": "a message is never sent at a higher QoS than it was published with",
}


def import_mosquitto(source: Path) -> Findings:
    """What is in the file and in those it includes. Raises SourceError."""
    conf = read_mosquitto(source)
    found = Findings(source)
    _sections(conf, found)
    import_listeners(conf, found)
    for bridge in conf.bridges:
        import_bridge(bridge, found)
    _limits(conf, found.table("limits"))
    _remains(conf, found)
    return found


def _sections(conf: Mosquitto, found: Findings) -> None:
    broker = found.table("broker")
    broker.set("data", "data", remark="a folder of its own: mosquitto.db is not read")
    saved = conf.general.get("persistence")
    kept = saved is not None and saved.as_truth()
    remark = "" if kept else "mosquitto forgot all at a restart (persistence false); none comes nearest"
    broker.set("durability", "flush", saved, remark)
    memory = conf.general.get("memory_limit")
    if memory is not None and memory.as_whole() > 0:
        broker.set("max_memory", memory.as_whole(), memory, "publishers are held back above 80 % of it")


def _limits(conf: Mosquitto, limits: Table) -> None:
    general = conf.general
    _packet_size(general, limits)
    flight = general.get("max_inflight_messages")
    most = 20 if flight is None else flight.as_whole() or 65_535
    limits.set("max_inflight", most, flight, "mosquitto's default" if flight is None else "")
    queue = general.get("max_queued_messages")
    waiting = 1_000 if queue is None else queue.as_whole() or MANY
    limits.set("max_queued_messages", waiting, queue, "mosquitto's default" if queue is None else "")
    size = general.get("max_queued_bytes")
    if size is not None:
        limits.set("max_queued_bytes", size.as_whole(), size)
    remark = "mosquitto drops the newest; here QoS 0 waits too and is the first to go"
    limits.set("queue_overflow", "drop_oldest", remark=remark)
    _session_expiry(general, limits)
    alive = general.get("max_keepalive")
    if alive is not None and alive.as_whole():
        limits.set("max_keepalive", f"{alive.as_whole()}s", alive)
        limits.set("max_keepalive_policy", "refuse", remark="as mosquitto does with clients of MQTT 3")
    aliases = [one for block in (conf.default, *conf.listeners) if (one := block.get("max_topic_alias")) is not None]
    if aliases:
        largest = max(aliases, key=Node.as_whole)
        limits.set("topic_alias_maximum", largest.as_whole(), largest)
    retain = general.get("retain_available")
    if retain is not None and not retain.as_truth():
        limits.set("max_retained_messages", 0, retain, "retain_available false: nothing is retained")
    check = general.get("check_retain_source")
    if check is not None:
        limits.set("check_retain_source", check.as_truth(), check)


def _packet_size(general: Block, limits: Table) -> None:
    packet, payload = general.get("max_packet_size"), general.get("message_size_limit")
    whole = packet.as_whole() if packet is not None else 0
    part = min(payload.as_whole() + ROOM_FOR_TOPIC, 268_435_460) if payload is not None and payload.as_whole() else 0
    if whole and (not part or whole <= part):
        limits.set("max_packet_size", whole, packet, "less than message_size_limit allows" if part else "")
    elif part:
        remark = "message_size_limit, which is of the payload, and 8 KB for the rest of the packet"
        limits.set("max_packet_size", part, payload, remark)
    elif packet is not None or payload is not None:
        limits.set("max_packet_size", 268_435_460, packet or payload, "no limit but MQTT's own")
    else:
        limits.set("max_packet_size", 2_000_000, remark="mosquitto 2.1's default; before it there was no limit")


def _session_expiry(general: Block, limits: Table) -> None:
    expiry = general.get("persistent_client_expiration")
    if expiry is None:
        remark = "never, as with mosquitto; 30d would free what devices leave that never return"
        limits.set("session_expiry", NEVER, remark=remark)
        return
    match = re.fullmatch(r"(\d{1,9})([hdwmy])", expiry.as_text())
    if match is None or not int(match[1]):
        raise SourceError(expiry.place, "persistent_client_expiration is a number with h, d, w, m or y, such as 14d")
    hours = int(match[1]) * {"h": 1, "d": 24, "w": 168, "m": 720, "y": 8_760}[match[2]]
    limits.set("session_expiry", format_duration(min(hours * 3_600, NEVER)), expiry)


def _remains(conf: Mosquitto, found: Findings) -> None:
    """Every setting nobody asked for."""
    for block in conf.blocks():
        for key, settings in block.settings.items():
            for setting in settings:
                if setting.used:
                    continue
                if block is conf.default and key not in _LOST:
                    found.lose(setting, "stands before any listener line and opens none")
                elif key in REPEATED or setting is settings[-1]:
                    _lose(found, key, setting)
                else:
                    found.lose(setting, f"it is written again in {settings[-1].place}, which counts")
    saved = conf.general.get("persistence")
    if saved is not None and not saved.as_truth():
        found.lose(saved, "what must survive a restart always does (see broker.durability)")


def _lose(found: Findings, key: str, setting: Node) -> None:
    if key in _AS_HERE:
        if setting.as_truth() != (_AS_HERE[key] == "true"):
            found.lose(setting, _UNLIKE[key])
    elif key == "per_listener_settings" or (key == "sys_interval" and setting.as_whole() == 0):
        setting.used = True
    elif key in ("plugin", "auth_plugin") and "go-auth" in setting.as_text():
        setting.used = True  # its backends are [auth.*] here
    elif key in _PLUGINS or key.startswith(OPTIONS):
        found.lose(setting, _PLUGIN)
    else:
        found.lose(setting, _LOST.get(key, UNKNOWN))
