"""Lets clients connect from some networks only, and gives rights by network. Judges nobody's password."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

from pydantic import Field, field_validator, model_validator

from auth._rights import Rights, in_order
from broker.access.rules import within
from broker.extend.auth import AuthConfig, Client, Refusal, Rule, Verdict
from broker.extend.registry import Backend


class Network(Rights):
    """`[auth.address.networks.NAME]`: what clients from there may do, besides their other rights."""

    addresses: tuple[str, ...] = Field(min_length=1)
    """Addresses and networks, e.g. ``10.1.0.0/16``, ``2001:db8::/32``, ``127.0.0.1``."""

    @field_validator("addresses")
    @classmethod
    def _are_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        return _checked(addresses)


class AddressConfig(AuthConfig):
    """`[auth.*]` with ``kind = "address"``"""

    allow: tuple[str, ...] = ()
    """Networks from which clients may connect; whoever comes from elsewhere is refused, whatever it can prove. Empty:
    from everywhere. Who connects over a Unix socket comes from nowhere and is not refused."""
    deny: tuple[str, ...] = ()
    """Networks from which no client may connect."""
    networks: dict[str, Network] = Field(default_factory=dict)
    """Tables `[auth.address.networks.NAME]`: rights by network."""

    @field_validator("allow", "deny")
    @classmethod
    def _are_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        return _checked(addresses)

    @model_validator(mode="after")
    def _something(self) -> AddressConfig:
        if not (self.allow or self.deny or self.networks):
            raise ValueError("name a network: allow, deny or networks")
        return self


class Address:
    """Looks at where every client comes from before it is asked for anything."""

    def __init__(self, config: AddressConfig) -> None:
        self._allow = within(*config.allow) if config.allow else None
        self._deny = within(*config.deny) if config.deny else None
        self.common_rules = _rules(config) if config.networks else None

    def screen(self, client: Client) -> Refusal | None:
        """Refuses clients from where nobody may connect."""
        try:
            ip_address(client.peerhost.strip("[]").partition("%")[0])
        except ValueError:
            return None  # a Unix socket has no address, the permissions of its file decide
        if self._deny is not None and self._deny(client):
            return Refusal(f"nobody may connect from {client.peerhost} (deny)", authorized=False)
        if self._allow is not None and not self._allow(client):
            return Refusal(f"{client.peerhost} is in none of the networks of allow", authorized=False)
        return None

    async def authenticate(self, client: Client, password: bytes) -> Verdict:
        """An address proves nobody's name."""
        return Verdict.IGNORE

    async def check(self) -> None:
        """There is nothing to reach."""

    async def close(self) -> None:
        """There is nothing to close."""


def _rules(config: AddressConfig) -> list[Rule]:
    conditions = {f"network {name}": within(*network.addresses) for name, network in config.networks.items()}
    rules = in_order((f"network {name}", network) for name, network in config.networks.items())
    return [replace(rule, when=conditions[rule.source]) for rule in rules]


def _checked(addresses: Iterable[str]) -> tuple[str, ...]:
    for text in addresses:
        try:
            within(text)
        except ValueError:
            raise ValueError(f"{text!r} is neither an address nor a network such as 10.0.0.0/8") from None
    return tuple(addresses)


async def open_address(config: AddressConfig) -> Address:
    return Address(config)


BACKEND = Backend("auth.address", AddressConfig, open_address)
