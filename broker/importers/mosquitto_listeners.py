"""Imports mosquitto's listeners, and who may connect to them and do what there."""

from __future__ import annotations

import ipaddress

from broker.importers.findings import Findings, Table
from broker.importers.mosquitto_file import OPTIONS, Block, Mosquitto
from broker.importers.mosquitto_go_auth import import_go_auth, is_go_auth
from broker.importers.source import Node, SourceError

_TLS = ("cafile", "capath", "certfile", "keyfile")
_OPENS_DEFAULT = (
    "port", "bind_address", "bind_interface", "ciphers", "ciphers_tls1.3", "crlfile", "dhparamfile", "mount_point",
    "psk_hint", "socket_domain", "tls_engine", "tls_engine_kpass_sha1", "tls_keyform", *_TLS,
    "password_file", "psk_file", "auth_plugin", "plugin",
)  # fmt: skip
"""Settings before the first `listener` line with which mosquitto opens a listener for them."""
_OPENS_UNLESS = {
    "allow_zero_length_clientid": ("true", "1"),
    "max_connections": ("-1",),
    "max_qos": ("2",),
    "maximum_qos": ("2",),
    "protocol": ("mqtt",),
    "require_certificate": ("false", "0"),
    "use_identity_as_username": ("false", "0"),
    "use_subject_as_username": ("false", "0"),
    "use_username_as_clientid": ("false", "0"),
}
"""Settings that do so too, unless they say what holds anyway."""
_OFF = ("false", "0")
_NOTHING = {
    "accept_protocol_versions": "a listener takes MQTT 3.1, 3.1.1 and 5",
    "ciphers": "the ciphers are those of Python's TLS, which leaves weak ones out",
    "ciphers_tls1.3": "the ciphers are those of Python's TLS, which leaves weak ones out",
    "dhparamfile": "key exchange is by elliptic curves",
    "disable_client_cert_date_checks": "a certificate past its date is refused",
    "http_dir": "files are not served",
    "listener_auto_id_prefix": "ids given by the broker have no prefix to choose",
    "max_topic_alias_broker": "the broker uses no topic aliases towards clients",
    "tls_engine": "keys are read from files",
    "tls_engine_kpass_sha1": "keys are read from files",
    "tls_keyform": "keys are read from files, PEM",
    "use_username_as_clientid": "clients keep their ids; another user's id is refused (limits.shared_client_ids)",
}
_HOLDS = {
    "bind_interface": "an interface cannot be named, and every address is more than was meant; bind an address",
    "enable_proxy_protocol": "the PROXY protocol is not understood, and its first line is no MQTT",
    "mount_point": "there are no mount points: its clients would see the topics of all others",
    "proxy_protocol_v2_require_tls": "the PROXY protocol is not understood",
}
"""Settings without which a listener would do something else than was meant: it is written turned off."""


def import_listeners(conf: Mosquitto, found: Findings) -> None:
    """`[listeners.*]`, `[auth.*]` and `[access]`."""
    blocks = list(conf.listeners)
    if _opens_default(conf.default):
        blocks.insert(0, conf.default)
    access = found.table("access")
    who = _Who(conf, found)
    if not conf.per_listener:
        _everywhere(conf, found, access, bool(blocks))
    for block in blocks:
        table = _listener(block, found)
        if table is not None and conf.per_listener:
            who.at(block, table)
    if not blocks:
        table = found.table("listeners", "tcp")
        table.notes.append("mosquitto without any listener serves this machine only.")
        table.set("bind", "127.0.0.1:1883")
        if conf.per_listener:
            who.at(conf.default, table)
            if "allow_anonymous" not in conf.default.settings:
                table.set("allow_anonymous", True, remark="as mosquitto does on this machine; a name must be known")
    found.close_default()
    if conf.per_listener:
        access.set("allow_anonymous", False, remark="each listener says it for itself")
        access.set("no_match", "deny", remark="what is open without rules has [auth.everything]")
    else:
        who.everywhere(access)
    for table in found.room("listeners"):
        _cleartext(table, found)


def _opens_default(block: Block) -> bool:
    return any(
        key in _OPENS_DEFAULT or settings[-1].value not in _OPENS_UNLESS.get(key, (settings[-1].value,))
        for key, settings in block.settings.items()
    )


def _everywhere(conf: Mosquitto, found: Findings, access: Table, any_listener: bool) -> None:
    general = conf.general
    anonymous = general.get("allow_anonymous")
    if anonymous is not None:
        access.set("allow_anonymous", anonymous.as_truth(), anonymous)
    elif any_listener:
        remark = "mosquitto 2's default; mosquitto 1 let everybody in where nothing was said"
        access.set("allow_anonymous", False, remark=remark)
    else:
        access.set("allow_anonymous", True, remark="as mosquitto does on this machine; a name must be known")
    judged = _is_judged(general)
    access.set("no_match", "deny" if judged else "allow", remark="" if judged else "without an acl_file all is allowed")


def _is_judged(block: Block) -> bool:
    """Whether something says what clients may do, here or in a plug-in that is not carried over."""
    return any(key in block.settings for key in ("acl_file", "plugin", "auth_plugin", "global_plugin"))


class _Who:
    """Makes the `[auth.*]` tables, one for each pair of files."""

    def __init__(self, conf: Mosquitto, found: Findings) -> None:
        self._conf = conf
        self._found = found
        self._made: dict[tuple[str, str], str] = {}
        self._go_auth: dict[int, list[str]] = {}

    def everywhere(self, access: Table) -> None:
        """Who may connect to all listeners."""
        names = self._names(self._conf.general)
        certified = [table for table in self._found.room("listeners") if "username_from" in table.values]
        if names and certified:
            names.append(self._certificates(certified[0]))
        if is_go_auth(self._conf.general) and len(names) > 1:
            access.set("order", names, remark="as they were asked")

    def at(self, block: Block, listener: Table) -> None:
        """Who may connect to this listener."""
        names = self._names(block)
        own, anonymous = block.get("listener_allow_anonymous"), block.get("allow_anonymous")
        open_to_all = anonymous is not None and anonymous.as_truth()
        listener.set("allow_anonymous", own.as_truth() if own is not None else open_to_all, own or anonymous)
        if not _is_judged(block):
            names.append(self._everything(block.head))
        if names and "username_from" in listener.values:
            names.append(self._certificates(listener))
        listener.set("auth", names)

    def _names(self, block: Block) -> list[str]:
        """The tables that decide where this block holds."""
        passwords, rules = block.get("password_file"), block.get("acl_file")
        names = []
        if passwords is not None or rules is not None:
            names.append(self._accounts(passwords, rules))
        if is_go_auth(block):
            names += self._plugin(block)
        anonymous = block.get("allow_anonymous")
        open_to_all = anonymous is not None and anonymous.as_truth()
        if psk := block.get("psk_file"):
            self._found.lose(psk, "listeners know no shared keys (TLS-PSK), certificates take their place")
        if open_to_all and passwords is None and anonymous is not None:
            text = "who gives a user name must be known here; without an account only clients that give none are let in"
            self._found.lose(anonymous, text)
        return names

    def _plugin(self, block: Block) -> list[str]:
        """What mosquitto-go-auth is told there, or where it was told something before."""
        told = [one for one in (block, *self._conf.blocks()) if any(key.startswith(OPTIONS) for key in one.settings)]
        where = told[0] if told else block
        if id(where) not in self._go_auth:
            self._go_auth[id(where)] = import_go_auth(where, self._found)
        return list(self._go_auth[id(where)])

    def _certificates(self, listener: Table) -> str:
        """Clients whose name a certificate has proved are looked for in no file by mosquitto."""
        room = self._found.room("auth")
        name = next((table.name for table in room if table.values.get("kind") == "certificate"), "")
        if not name:
            origin = listener.origins["username_from"]
            table = self._found.instance("auth", "certificates", "certificate", origin)
            table.notes.append("Who shows a certificate of client_ca need not be in a file of passwords.")
            self._found.table("auth", table.name, "subjects", "everybody", origin=origin).set("below", "*")
            name = table.name
        return name

    def _accounts(self, passwords: Node | None, rules: Node | None) -> str:
        key = (passwords.as_text() if passwords else "", rules.as_text() if rules else "")
        if key in self._made:
            return self._made[key]
        origin = passwords or rules
        assert origin is not None
        table = self._found.instance("auth", "accounts", "file", origin)
        if passwords is not None:
            table.notes.append("mosquitto's own file; isthmus user adds, changes and deletes in it.")
            table.set("passwords", self._path(passwords), passwords)
        if rules is not None:
            table.notes.append("isthmus reload reads the rules again.")
            table.set("rules", self._path(rules), rules)
            self._found.rights.add(table.name)
        self._made[key] = table.name
        return table.name

    def _everything(self, origin: Node) -> str:
        for table in self._found.room("auth"):
            if table.name == "everything":
                return table.name
        table = self._found.instance("auth", "everything", "static", origin)
        table.notes.append("For listeners without an acl_file, where mosquitto allows everything.")
        table.set("rules", [{"permission": "allow", "action": "all", "topics": ["#"]}])
        return table.name

    def _path(self, setting: Node) -> str:
        return str(self._found.folder / setting.as_text())


def _listener(block: Block, found: Findings) -> Table | None:
    words = block.head.as_text().split() if block.head.value is not None else []
    protocol = block.get("protocol")
    said = "mqtt" if protocol is None else protocol.as_text()
    if said not in ("mqtt", "websockets") and protocol is not None:
        _drop(block, found, protocol, f"there are no listeners for {said}")
        return None
    if psk := block.get("psk_hint"):
        _drop(block, found, psk, "listeners know no shared keys (TLS-PSK); this listener is left out")
        return None
    certificate = block.get("certfile")
    if words[:1] == ["0"] and len(words) > 1:
        table = found.instance("listeners", "unix", "unix", block.head)
        table.set("path", str(found.folder / words[1]), block.head)
        table.set("mode", "0660", remark="who may use it: the socket's own user and group")
        _common(block, table, found)
        return table
    kind = ("wss" if certificate else "ws") if said == "websockets" else ("tls" if certificate else "tcp")
    port = _port(block, words)
    name = kind if all(one.name != kind for one in found.room("listeners")) else f"{kind}-{port}"
    table = found.instance("listeners", name, kind, block.head)
    table.set("bind", _bind(block, words, port, found), block.get("port") or block.head)
    if said == "websockets":
        table.set("path", "/mqtt", protocol, "mosquitto takes any path, here clients must ask for this one")
        for origin in block.settings.get("websockets_origin", ()):
            table.set("origins", [*table.values.get("origins", ()), origin.as_text()], origin)
    if certificate is not None:
        _tls(block, table, found, certificate)
    else:
        _meant_tls(block, table, found)
    _common(block, table, found)
    return table


def _drop(block: Block, found: Findings, what: Node, reason: str) -> None:
    """A listener that cannot be: its settings are lost with it."""
    found.lose(what, reason)
    if block.head.value is not None:
        found.lose(block.head, reason)
    for settings in block.settings.values():
        for setting in settings:
            if not setting.used:
                found.lose(setting, "belongs to a listener that is left out")


def _port(block: Block, words: list[str]) -> int:
    port = block.get("port")
    number = int(words[0]) if words else 1883 if port is None else port.as_whole()
    if not 1 <= number <= 65_535:
        raise SourceError(port.place if port else block.head.place, f"port {number} is not between 1 and 65535")
    return number


def _bind(block: Block, words: list[str], port: int, found: Findings) -> str:
    address = block.get("bind_address")
    domain = block.get("socket_domain")
    everywhere = {"ipv4": "0.0.0.0", "ipv6": "::"}.get(domain.as_text() if domain else "", "*")
    host = words[1] if len(words) > 1 else address.as_text() if address else everywhere
    if domain is not None and host != everywhere:
        found.lose(domain, "the address of the listener decides")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tls(block: Block, table: Table, found: Findings, certificate: Node) -> None:
    table.set("certificate", str(found.folder / certificate.as_text()), certificate)
    key = block.get("keyfile")
    if key is not None:
        table.set("key", str(found.folder / key.as_text()), key)
    authorities, folder = block.get("cafile"), block.get("capath")
    required = block.truth("require_certificate", False)
    if folder is not None and required and authorities is None:
        found.hold(table, folder, "a folder of authorities cannot be named; put them into one file, client_ca")
    elif folder is not None:
        found.lose(folder, "a folder of authorities cannot be named; client_ca is one file")
    if required:
        if authorities is not None:
            table.set("client_ca", str(found.folder / authorities.as_text()), authorities)
        table.set("verify", "require")
        revoked = block.get("crlfile")
        if revoked is not None:
            table.set("client_crl", str(found.folder / revoked.as_text()), revoked)
    else:
        table.set("verify", "none", remark="without require_certificate mosquitto asks clients for none")
        for name in ("crlfile", "use_identity_as_username", "use_subject_as_username"):
            if unused := block.get(name):
                found.lose(unused, "has no effect without require_certificate true")
    for name, part in (("use_subject_as_username", "dn"), ("use_identity_as_username", "cn")):
        setting = block.get(name)
        if required and setting is not None and setting.as_truth():
            table.set("username_from", part, setting)
    version = block.get("tls_version")
    if version is not None:
        table.set("tls_min", "1.3" if version.as_text() == "tlsv1.3" else "1.2", version)
        if version.as_text() not in ("tlsv1.3", "tlsv1.2"):
            found.lose(version, "nothing older than TLS 1.2 is spoken")


def _meant_tls(block: Block, table: Table, found: Findings) -> None:
    """Options of TLS on a listener that has no certificate: it would be open in the clear."""
    for key in ("cafile", "capath", "keyfile", "crlfile", "require_certificate", "tls_version"):
        setting = block.get(key)
        if setting is not None and setting.value not in _OFF:
            found.hold(table, setting, "is about TLS, but there is no certfile: the listener would be in the clear")


def _common(block: Block, table: Table, found: Findings) -> None:
    most = block.get("max_connections")
    if most is not None:
        table.set("max_connections", most.as_whole() if most.as_whole() > 0 else 10_000_000, most)
    anonymous = block.get("listener_allow_anonymous")
    if anonymous is not None:
        table.set("allow_anonymous", anonymous.as_truth(), anonymous)
    table.set("allow_bridges", True, remark="mosquitto always lets its own bridges announce themselves (try_private)")
    for key in ("max_qos", "maximum_qos"):
        quality = block.get(key)
        if quality is not None and quality.as_whole() < 2:
            found.lose(quality, "every listener takes QoS 0, 1 and 2; rules can have qos as a condition")
    for key, reason in (*_NOTHING.items(), *_HOLDS.items()):
        setting = block.get(key)
        if setting is None or setting.value in _OFF:
            continue
        if key in _HOLDS:
            found.hold(table, setting, reason)
        else:
            found.lose(setting, reason)


def _cleartext(table: Table, found: Findings) -> None:
    """Say what mosquitto does without a word: passwords cross the network in the clear."""
    if table.values.get("kind", table.name) in ("tcp", "ws") and not _is_loopback(str(table.values["bind"])):
        remark = "passwords cross the network in the clear, as with mosquitto; a listener of kind tls ends that"
        table.set("allow_cleartext", True, remark=remark)


def _is_loopback(bind: str) -> bool:
    host = bind.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
