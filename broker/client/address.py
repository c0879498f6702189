"""What a broker's URL says: transport, host, port, path."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import unquote, urlsplit, urlunsplit

_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_ALIASES = {"tcp": "mqtt", "ssl": "mqtts", "tls": "mqtts"}


class Address:
    """One of ``mqtt://host:port``, ``mqtts://…``, ``ws://host:port/path``, ``wss://…`` or ``unix:///path``."""

    __slots__ = ("host", "path", "port", "scheme")

    def __init__(self, scheme: str, host: str, port: int, path: str) -> None:
        self.scheme = scheme
        self.host = host
        self.port = port
        self.path = path

    @property
    def secure(self) -> bool:
        """Whether the transport is TLS."""
        return self.scheme in ("mqtts", "wss")

    @property
    def local(self) -> bool:
        """Whether what is sent there stays on this machine."""
        if self.scheme == "unix" or self.host == "localhost":
            return True
        try:
            return ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def parse(url: str) -> Address:
    """Raises ValueError, without repeating a password, when ``url`` is none of the known forms."""
    text = url if "://" in url else f"mqtt://{url}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not a broker address: {error}") from None
    scheme = _ALIASES.get(parts.scheme, parts.scheme)
    if parts.username is not None or parts.password is not None:
        raise ValueError("a broker address holds no user name or password; they have keys of their own")
    if scheme == "unix":
        if not parts.path:
            raise ValueError("a unix address needs a path: unix:///run/broker.sock")
        return Address(scheme, "", 0, parts.netloc + parts.path)
    if scheme not in _PORTS:
        raise ValueError(f"unknown scheme {scheme!r} in {url!r}: use mqtt, mqtts, ws, wss or unix")
    if not parts.hostname:
        raise ValueError(f"no host in {url!r}")
    path = parts.path if scheme in ("ws", "wss") else ""
    if scheme in ("ws", "wss") and parts.query:
        path += f"?{parts.query}"
    return Address(scheme, parts.hostname, port if port is not None else _PORTS[scheme], path)


def split_login(url: str) -> tuple[str, str | None, str | None]:
    """The address alone, and the user name and password that ``mqtt://user:password@host`` holds, where people write
    it like that. ValueError as `parse`."""
    try:
        parts = urlsplit(url if "://" in url else f"mqtt://{url}")
        if parts.username is None and parts.password is None:
            return url, None, None
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        return bare, unquote(parts.username or "") or None, unquote(parts.password or "") or None
    except ValueError as error:
        raise ValueError(f"not a broker address: {error}") from None
