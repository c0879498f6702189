"""The `[listeners.*]` tables: where clients may connect, one model per kind."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from broker.config.models import Section
from broker.config.types import Address, ConfigPath, Size


class ListenerConfig(Section):
    """What every `[listeners.*]` table understands."""

    kind: str = ""
    """tcp | tls | ws | wss | unix; the table's name unless it is given."""
    enabled: bool = True
    """``false`` turns the listener off without removing its table."""
    auth: tuple[str, ...] | None = None
    """Names of the `[auth.*]` instances that decide here, in this order; an empty list refuses every client. Default:
    all, in the order of `[access]`."""
    allow_anonymous: bool | None = None
    """Whether a client with neither user name nor password is let in here. Default: as `[access]` says."""
    allow_bridges: bool = False
    """Whether brokers may announce themselves as bridges (mosquitto's ``try_private``); they then get no message of
    their own back and keep the retain flag. Without it they fall back to connecting as ordinary clients."""
    max_connections: int = Field(default=100_000, ge=1, le=10_000_000)
    """Connections at the same time; more are closed at once."""
    max_connection_rate: float = Field(default=0.0, ge=0, le=1_000_000)
    """Connections accepted a second, on each address this listens on; who comes faster waits in the system's queue and
    is not refused. 0: no limit."""
    max_packet_size: Annotated[Size, Field(ge=128, le=268_435_460)] | None = None
    """Bytes of the largest packet a client may send here. Default: as `[limits]` says."""

    secure: ClassVar[bool] = False
    """Whether what passes here is hidden from others on the network."""
    _name: str = PrivateAttr(default="")

    @property
    def name(self) -> str:
        """The listener's name: the last part of its table's name."""
        return self._name

    def named(self, name: str) -> ListenerConfig:
        """Give this configuration its name (the loader does, once) and return it."""
        self._name = name
        return self


class NetworkListener(ListenerConfig):
    """What listeners on a port understand."""

    bind: Address = Address("127.0.0.1", 0)
    """``HOST:PORT``; host ``*`` is every address of this machine, port 0 any free port."""


class PlainListener(NetworkListener):
    """What listeners without TLS understand."""

    allow_cleartext: bool = False
    """Whether passwords may cross a network unencrypted; needed when ``bind`` is not a loopback address."""


class SecureListener(NetworkListener):
    """What listeners with TLS understand."""

    secure: ClassVar[bool] = True
    certificate: ConfigPath
    """PEM file with the server's certificate, followed by its chain."""
    key: ConfigPath
    """PEM file with the certificate's private key."""
    client_ca: ConfigPath | None = None
    """PEM file with the authorities whose client certificates are accepted."""
    client_crl: ConfigPath | None = None
    """PEM file with the revocation lists of those authorities. A client whose certificate is in one of them is refused,
    and so is every client of an authority that has no list here or whose list has passed its date. A new list counts
    from the next reload."""
    verify: Literal["none", "optional", "require"] | None = None
    """Whether clients show a certificate: none | optional | require. Default: require when ``client_ca`` is given."""
    username_from: Literal["off", "cn", "dn", "san"] = "off"
    """Part of the client's certificate that becomes its user name: off | cn | dn | san. Of several CNs the last counts,
    of several alternative names the first."""
    tls_min: Literal["1.2", "1.3"] = "1.2"
    """Oldest TLS version accepted: 1.2 | 1.3."""
    receive_buffer: Annotated[Size, Field(ge=16_384, le=4_194_304)] = 65_536
    """Bytes a client may be ahead of the broker, give or take half (``SO_RCVBUF``; the system allows
    ``net.core.rmem_max`` at most). More is faster over long distances: a client sends about this much each round trip.
    Less keeps one that floods with TLS messages of no use, such as key updates, from delaying others. Counts for new
    connections."""

    @property
    def verification(self) -> Literal["none", "optional", "require"]:
        """``verify``, or its default."""
        return self.verify or ("require" if self.client_ca else "none")

    @model_validator(mode="after")
    def _certificates_make_sense(self) -> SecureListener:
        if self.verification != "none" and self.client_ca is None:
            raise ValueError(f'verify = "{self.verify}" needs client_ca, the authorities to verify against')
        if self.verification == "none" and self.client_ca is not None:
            raise ValueError('client_ca has no effect with verify = "none"; write "optional" or "require"')
        if self.client_crl is not None and self.client_ca is None:
            raise ValueError("client_crl needs client_ca, the authorities whose lists these are")
        if self.username_from != "off" and self.verification == "none":
            raise ValueError(f'username_from = "{self.username_from}" needs client_ca and verify other than "none"')
        return self


class WebSocket(Section):
    """What WebSocket listeners understand."""

    path: str = Field(default="/mqtt", pattern=r"^/[^\s?#]*$")
    """Path of the URL a client must ask for."""
    origins: tuple[str, ...] = ("*",)
    """Web sites whose pages may connect, e.g. ``https://app.example.com``; ``*`` is any. Programs that send no Origin
    are not affected, see `origin_required`."""
    origin_required: bool = False
    """Whether who sends no Origin is refused: a listener for browsers alone."""

    @field_validator("origins")
    @classmethod
    def _origins_are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, separator, host = origin.partition("://")
            if origin != "*" and not (separator and scheme and host and "/" not in host):
                raise ValueError(f'{origin!r} is not an origin; write "https://app.example.com" without a path, or "*"')
        return origins


class TcpListener(PlainListener):
    """`kind = "tcp"`: MQTT over plain TCP."""

    bind: Address = Address("127.0.0.1", 1883)
    """``HOST:PORT``; host ``*`` is every address of this machine, port 0 any free port."""


class TlsListener(SecureListener):
    """`kind = "tls"`: MQTT over TLS."""

    bind: Address = Address("127.0.0.1", 8883)
    """``HOST:PORT``; host ``*`` is every address of this machine, port 0 any free port."""
    alpn: tuple[str, ...] = ("mqtt",)
    """Protocol names offered in the TLS hand-shake to clients that ask for one."""


class WsListener(PlainListener, WebSocket):
    """`kind = "ws"`: MQTT over WebSocket."""

    bind: Address = Address("127.0.0.1", 8083)
    """``HOST:PORT``; host ``*`` is every address of this machine, port 0 any free port."""


class WssListener(SecureListener, WebSocket):
    """`kind = "wss"`: MQTT over WebSocket over TLS."""

    bind: Address = Address("127.0.0.1", 8084)
    """``HOST:PORT``; host ``*`` is every address of this machine, port 0 any free port."""


class UnixListener(ListenerConfig):
    """`kind = "unix"`: MQTT over a Unix socket on this machine."""

    secure: ClassVar[bool] = True
    path: ConfigPath
    """The socket's file; at most 107 bytes long."""
    mode: str = Field(default="0660", pattern=r"^0?[0-7]{3}$")
    """Permissions of the socket's file, octal."""

    @field_validator("path")
    @classmethod
    def _path_fits(cls, path: ConfigPath) -> ConfigPath:
        if len(str(path).encode()) > 107:
            raise ValueError(f"a Unix socket's path has at most 107 bytes, {path} has {len(str(path).encode())}")
        return path


KINDS: dict[str, type[ListenerConfig]] = {
    "tcp": TcpListener,
    "tls": TlsListener,
    "ws": WsListener,
    "wss": WssListener,
    "unix": UnixListener,
}
"""Listener kinds by name."""
