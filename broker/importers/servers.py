"""Addresses of other servers as sources write them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_local(text: str) -> bool:
    """Whether what is sent to this host, address with port, or URL stays on this machine."""
    try:
        host = urlsplit(text if "://" in text else f"//{text}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_port(text: str, port: int) -> str:
    """``HOST:PORT``, with this port unless there is one."""
    text = text.strip()
    host, colon, given = text.rpartition(":")
    if colon and given.isdigit() and (":" not in host or host.startswith("[")):
        return text
    return f"[{text}]:{port}" if ":" in text and not text.startswith("[") else f"{text}:{port}"
