"""How the other side of a TLS connection is verified, and who we are to it."""

from __future__ import annotations

import ssl
from pathlib import Path

_PSK_CIPHERS = "kECDHEPSK:kDHEPSK:kPSK:!eNULL"


def tls_context(
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    key_password: str | None = None,
    insecure: bool = False,
) -> ssl.SSLContext:
    """A context that verifies the server unless ``insecure``; without ``ca`` against the system's authorities.

    Raises ValueError that begins with ``ca`` or ``certificate``, whichever file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca is not None else None)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"ca: cannot use {ca}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, key_password)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"certificate: cannot use {certificate}, key {key or certificate}: {error}") from error
    return context


def knows_psk() -> bool:
    """Whether this Python can prove itself with a shared key: 3.13 and newer, with an OpenSSL built for it."""
    return bool(getattr(ssl, "HAS_PSK", False))


def psk_context(identity: str, key: bytes) -> ssl.SSLContext:
    """A context in which both sides show that they know ``key``, and no certificate is asked for.

    TLS 1.2 only, and only ciphers with a shared key: with 1.3 a server that does not know it could offer a certificate
    instead, which nothing here would verify. Needs `knows_psk`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    context.set_psk_client_callback(lambda hint: (identity, key))  # type: ignore[attr-defined, unused-ignore]
    return context
