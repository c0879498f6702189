"""Ends connections whose certificate was revoked since: a hand-shake refuses only those that come later."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker.net.der import listed, named

log = logging.getLogger(__name__)

TURN = 500
"""Connections looked at in one turn of the loop."""
_LIST = re.compile(r"-----BEGIN X509 CRL-----(.*?)-----END X509 CRL-----", re.DOTALL)


async def end_revoked(engine: Any, listener: Any, path: Path, revoke: Callable[[Any], None], settle: float) -> None:
    """Call `revoke` with every channel of this listener whose certificate the lists in the file name; once more after
    `settle` seconds for those whose hand-shake was under way."""
    try:
        revoked = await asyncio.to_thread(_read, path)
    except (OSError, ValueError) as error:
        log.error("listeners.%s: client_crl %s: %s; nobody is disconnected for it", listener.name, path, error)
        return
    for pause in (settle, 0.0):
        for number, channel in enumerate(engine.clients(), 1):
            if channel.listener is listener and channel.link is not None and _certificate(channel.link) in revoked:
                revoke(channel)
            if number % TURN == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(pause)


def _read(path: Path) -> frozenset[tuple[bytes, bytes]]:
    """Issuer and serial number of every revoked certificate."""
    lists = _LIST.findall(path.read_text("ascii", "replace"))
    return frozenset(pair for text in lists for pair in listed(_der(text)))


def _der(text: str) -> bytes:
    # PEM_cert_to_DER_cert wants the word CERTIFICATE; the armour is the same
    return ssl.PEM_cert_to_DER_cert(f"-----BEGIN CERTIFICATE-----{text}-----END CERTIFICATE-----")


def _certificate(link: Any) -> tuple[bytes, bytes] | None:
    tls = link.get_extra_info("ssl_object")
    der = tls.getpeercert(True) if tls is not None else None
    return named(der) if der else None
