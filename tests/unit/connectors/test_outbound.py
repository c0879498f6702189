"""Which addresses a web service may have."""

from __future__ import annotations

import socket
from ipaddress import ip_network
from typing import Any

import pytest

from broker.connectors.outbound import Guard


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "100.100.100.200", "192.0.0.192",
        "0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "ff02::1", "::ffff:169.254.169.254", "2002:a9fe:a9fe::1",
        "64:ff9b::a9fe:a9fe", "2001:0:4136:e378:8000:63bf:5601:5601", "metadata", "", "2852039166",
    ],
)  # fmt: skip
def test_s19_link_local_and_metadata_addresses_are_forbidden_in_every_spelling(address: str) -> None:
    """S-19."""
    assert not Guard().allows(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "10.1.2.3", "192.168.0.1", "fd12::1", "100.64.0.1", "8.8.8.8", "2001:db8::1"]
)
def test_private_networks_are_allowed_unless_others_are_named(address: str) -> None:
    assert Guard().allows(address)
    assert not Guard((ip_network("203.0.113.0/24"),)).allows(address)
    assert Guard((ip_network("203.0.113.0/24"), ip_network("::/0"), ip_network("0.0.0.0/0"))).allows(address)


def test_what_is_named_is_allowed_even_where_it_is_forbidden_otherwise() -> None:
    assert Guard((ip_network("169.254.0.0/16"),)).allows("169.254.169.254")


def test_only_addresses_are_judged_before_they_are_looked_up() -> None:
    guard = Guard()
    guard.check("hooks.example.com")
    guard.check("10.0.0.1")
    with pytest.raises(ValueError, match="no connection may go to 169"):
        guard.check("169.254.169.254")


@pytest.mark.parametrize(
    "host",
    [
        "2852039166", "169.254.43518", "0251.0376.0251.0376", "0xa9fea9fe", "0xA9.0xfe.0xa9.0xfe", "169.254.169.254.",
        "１６９.254.169.254", "169。254。169。254", "169．254．169．254", "２８５２０３９１６６", "fe80::1%eth0",
    ],
)  # fmt: skip
def test_s19_what_only_some_take_for_an_address_is_no_name(host: str) -> None:
    """S-19: getaddrinfo, or whatever makes the host ready for it, may see the metadata service here."""
    with pytest.raises(ValueError, match="no connection may go to"):
        Guard().check(host)


def test_names_with_numbers_are_names() -> None:
    for name in ("4711.example", "0xbad.example.com", "dead.beef", "web1", "metadata", "0x1g"):
        Guard().check(name)


async def test_s19_a_name_is_looked_up_once_and_only_its_allowed_addresses_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S-19: the address that was judged is the one that is connected to, whatever the name says next."""
    answers = [["169.254.169.254", "203.0.113.7"], ["169.254.169.254"]]

    def getaddrinfo(host: str, port: int, *more: Any, **keys: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    guard = Guard()
    found = await guard.resolve("rebound.example.com", 443)
    assert [one["host"] for one in found] == ["203.0.113.7"]
    with pytest.raises(OSError, match="where no connection may go"):
        await guard.resolve("rebound.example.com", 443)
    await guard.close()
