"""Whether a listener's certificate, key and authorities can be used, found out before its port is opened."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from broker.config.listeners import SecureListener

FEW_DAYS = 14 * 86_400
"""Seconds before its end at which a certificate is worth a warning."""


def problems(listener: SecureListener) -> Iterator[tuple[str, str]]:
    """Field and sentence for each file that would keep the listener from opening."""
    readable = True
    for field in ("certificate", "key", "client_ca", "client_crl"):
        path: Path | None = getattr(listener, field)
        if path is not None and (text := _unreadable(path)):
            readable = False
            yield field, text
    if not readable:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(listener.certificate, listener.key, password="")
    except (ssl.SSLError, ValueError) as error:
        yield "certificate", _explain(error, listener)
    if listener.client_ca is not None:
        try:
            context.load_verify_locations(listener.client_ca)
        except ssl.SSLError:
            yield "client_ca", f"{listener.client_ca} holds no certificate in PEM form"
    if listener.client_crl is not None:
        try:
            load_revocations(context, listener.client_crl)
        except ValueError as error:
            yield "client_crl", f"{listener.client_crl} {error}"


def load_revocations(context: ssl.SSLContext, path: Path) -> None:
    """Refuse certificates that the lists in a PEM file name. ValueError when there is none in it; OSError."""
    if "-----BEGIN X509 CRL-----" not in path.read_text("ascii", "replace"):
        raise ValueError("holds no revocation list in PEM form")
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"holds a damaged revocation list: {error.reason or error}") from None
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def warnings(listener: SecureListener) -> Iterator[tuple[str, str]]:
    """A certificate that has expired or soon will."""
    end = expiry(listener.certificate)
    if end is None:
        return
    day = time.strftime("%Y-%m-%d", time.gmtime(end))
    if end <= time.time():
        yield "certificate", f"{listener.certificate} expired on {day}: clients will refuse it"
    elif end - time.time() < FEW_DAYS:
        yield "certificate", f"{listener.certificate} expires on {day}"


def expiry(certificate: Path) -> float | None:
    """Seconds since 1970 at which the first certificate of a PEM file ends; None when that cannot be found out."""
    decode = getattr(getattr(ssl, "_ssl", None), "_test_decode_cert", None)  # the only reader of PEM files ssl has
    if decode is None:
        return None
    try:
        return float(ssl.cert_time_to_seconds(decode(str(certificate))["notAfter"]))
    except (OSError, ValueError, KeyError):
        return None


def _unreadable(path: Path) -> str | None:
    if path.is_dir():
        return f"{path} is a folder, not a file"
    if path.exists() and not path.is_file():
        return f"{path} is not a regular file"
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"


def _explain(error: Exception, listener: SecureListener) -> str:
    """OpenSSL's own words differ from version to version: look at the files for what is usually wrong."""
    reason = getattr(error, "reason", None) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return f"{listener.certificate} and {listener.key} do not belong together"
    for path, word in ((listener.certificate, b"CERTIFICATE-----"), (listener.key, b"PRIVATE KEY-----")):
        if word not in path.read_bytes():
            return f"{path} is not in PEM form: it has no line -----BEGIN … {word.decode()}"
    if b"ENCRYPTED" in listener.key.read_bytes():
        return f"{listener.key} is protected by a password; give the key without one, readable by the broker alone"
    return f"{listener.certificate} and {listener.key} cannot be used: {reason or error}"
