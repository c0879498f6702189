"""IP addresses and networks: one way to write each, and a table that finds what covers an address."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator
from typing import Generic, TypeVar

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

T = TypeVar("T")

SITE = 64
"""Bits of an IPv6 address that one customer is given: what is counted by address is counted by these."""


@functools.lru_cache(maxsize=16_384)
def parse_address(text: str) -> Address | None:
    """The address, IPv4 also when it is written as IPv6; None for what is none, such as a Unix socket's peer."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_network(text: str) -> Network:
    """An address or a network in CIDR notation. ValueError says what is wrong with it."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        try:
            wider = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise ValueError(f"{text!r} is neither an address nor a network such as 10.0.0.0/8") from error
        raise ValueError(
            f"{text!r} names one address of a network; write {text.partition('/')[0]} or {wider}"
        ) from None
    if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped is not None:
        return ipaddress.IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network


def spelled(network: Network) -> str:
    """Shortest form: a network of one address is written as that address."""
    return str(network.network_address if network.num_addresses == 1 else network)


def site_of(address: Address) -> str:
    """Whom an address belongs to: itself, or the first 64 bits of an IPv6 address, of which one customer has all."""
    if address.version == 4:
        return str(address)
    return f"{ipaddress.IPv6Address(int(address) >> 128 - SITE << 128 - SITE)}/{SITE}"


class Networks(Generic[T]):
    """Values by network. Finding costs one look for each length of prefix there is, however many networks."""

    def __init__(self) -> None:
        self._by_length: dict[tuple[int, int], dict[int, T]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_length)

    def __setitem__(self, network: Network, value: T) -> None:
        lengths = self._by_length.setdefault((network.version, network.prefixlen), {})
        lengths[_prefix(network.network_address, network.prefixlen)] = value

    def __delitem__(self, network: Network) -> None:
        key = (network.version, network.prefixlen)
        del self._by_length[key][_prefix(network.network_address, network.prefixlen)]
        if not self._by_length[key]:
            del self._by_length[key]

    def find(self, address: Address) -> Iterator[T]:
        """The values of every network that holds the address."""
        for (version, length), values in self._by_length.items():
            if version == address.version:
                value = values.get(_prefix(address, length))
                if value is not None:
                    yield value


def _prefix(address: Address, length: int) -> int:
    return int(address) >> address.max_prefixlen - length
