"""Where connections may go that somebody's URL asks for: never to what only this machine is meant to reach.

A name is looked up once; what is checked is the address, and that address is connected to. A name that means something
else a moment later changes nothing.
"""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from unicodedata import normalize

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from broker.connectors.endpoint import Trust

Network = IPv4Network | IPv6Network

_FORBIDDEN: tuple[Network, ...] = tuple(map(ip_network, (
    "169.254.0.0/16", "fe80::/10",  # link-local, the metadata services of most clouds among them
    "fd00:ec2::/32", "100.100.100.200/32", "192.0.0.192/32",  # those of the others
    "0.0.0.0/8", "::/128", "224.0.0.0/4", "255.255.255.255/32", "ff00::/8",
)))  # fmt: skip
_TRANSLATED = ip_network("64:ff9b::/96")
"""IPv4 addresses behind a translator (RFC 6052)."""


class WebService(Trust):
    """The keys of every table that names a web service."""

    networks: tuple[Network, ...] = ()
    """Networks connections may go to, e.g. ``["10.20.0.0/16"]``; none: anywhere but link-local addresses and the
    metadata services of clouds, which hand out credentials."""

    def guard(self) -> Guard:
        """What looks names up for it."""
        return Guard(self.networks)


class Guard(AbstractResolver):
    """A resolver that answers only addresses one may connect to."""

    def __init__(self, networks: tuple[Network, ...] = ()) -> None:
        self._networks = networks
        self._names: aiohttp.ThreadedResolver | None = None

    def allows(self, address: str) -> bool:
        """Whether connections may go there; false for what is no address."""
        try:
            found = _meant(ip_address(address))
        except ValueError:
            return False
        if self._networks:
            return any(found in network for network in self._networks)
        return not any(found in network for network in _FORBIDDEN)

    def check(self, host: str) -> None:
        """ValueError where the host is an address that is not allowed, or written so that only some take it for one; a
        name is looked at when it is looked up."""
        if _is_numeric(host) and not self.allows(host):
            raise ValueError(f"no connection may go to {host}; `networks` can name what is allowed")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The allowed addresses of the name; OSError where there are others only."""
        if self._names is None:
            self._names = aiohttp.ThreadedResolver()
        found = await self._names.resolve(host, port, family)
        allowed = [one for one in found if self.allows(one["host"])]
        if found and not allowed:
            raise OSError(None, f"{host} is {found[0]['host']}, where no connection may go (see `networks`)")
        return allowed

    async def close(self) -> None:
        if self._names is not None:
            await self._names.close()


def _is_numeric(host: str) -> bool:
    """Whether somebody may take it for an address: its last part is a number, which no name ends with. That is so of
    `2852039166`, `0251.0376.0251.0376` and `0xa9fea9fe`, whatever digits and dots of Unicode they are written with."""
    last = normalize("NFKC", host).replace("\u3002", ".").rstrip(".").rpartition(".")[2]
    return ":" in host or last.isdigit() or re.fullmatch("0[xX][0-9a-fA-F]*", last) is not None


def _meant(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that is written as an IPv6 address."""
    if isinstance(address, IPv4Address):
        return address
    inside = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
    if inside is None and address in _TRANSLATED:
        inside = IPv4Address(int(address) & 0xFFFFFFFF)
    return inside or address
