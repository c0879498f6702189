"""TLS contexts of listeners, their renewal, and who a client certificate says the peer is."""

from __future__ import annotations

import hashlib
import logging
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broker.config.certificates import load_revocations
from broker.config.listeners import SecureListener
from broker.net.der import validity
from broker.net.errors import ListenError

log = logging.getLogger(__name__)

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aNULL:!eNULL:!PSK:!SRP"
"""Of TLS 1.2: forward secrecy and authenticated encryption only; those of TLS 1.3 are all of that kind."""

LONGEST_SERVER_NAME = 255

_SHORT = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "stateOrProvinceName": "ST",
    "localityName": "L",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "emailAddress",
    "serialNumber": "serialNumber",
}
_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "require": ssl.CERT_REQUIRED}


def fingerprint(name: str, config: SecureListener) -> str:
    """Changes whenever the content of the listener's certificate files changes. ListenError when one is unreadable."""
    digest = hashlib.sha256()
    for key, path in _files(config):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ListenError(f"listeners.{name}: {key} {path}: {error.strerror}") from None
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def server_context(name: str, config: SecureListener) -> ssl.SSLContext:
    """A context for new hand-shakes. ListenError names the key and file that is wrong, or the date that has passed."""
    fingerprint(name, config)
    name = f"listeners.{name}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if config.tls_min == "1.3" else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers(CIPHERS)
    try:
        first, last = validity(
            ssl.PEM_cert_to_DER_cert(_first_certificate(Path(config.certificate).read_text("ascii")))
        )
    except (ValueError, OSError):
        raise ListenError(f"{name}: certificate {config.certificate}: no PEM certificate in it") from None
    now = datetime.now(UTC)
    if last < now:
        raise ListenError(f"{name}: certificate {config.certificate}: expired on {last:%Y-%m-%d %H:%M} UTC")
    if first > now:
        raise ListenError(f"{name}: certificate {config.certificate}: not valid before {first:%Y-%m-%d %H:%M} UTC")
    try:
        context.load_cert_chain(config.certificate, config.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"key {config.key} does not belong to certificate {config.certificate}"
        else:
            text = f"certificate {config.certificate} with key {config.key}: {error.reason or 'unreadable PEM'}"
        raise ListenError(f"{name}: {text}") from None
    except ValueError as error:
        raise ListenError(f"{name}: key {config.key}: {error}") from None
    if config.client_ca is not None:
        try:
            context.load_verify_locations(config.client_ca)
        except ssl.SSLError as error:
            reason = error.reason or "no PEM certificate in it"
            raise ListenError(f"{name}: client_ca {config.client_ca}: {reason}") from None
    if config.client_crl is not None:
        try:
            load_revocations(context, config.client_crl)
        except ValueError as error:
            raise ListenError(f"{name}: client_crl {config.client_crl}: {error}") from None
    context.verify_mode = _VERIFY[config.verification]
    alpn = getattr(config, "alpn", ("http/1.1",))  # a WebSocket starts as HTTP
    if alpn:
        context.set_alpn_protocols(list(alpn))
    context.sni_callback = _check_server_name
    return context


def _files(config: SecureListener) -> list[tuple[str, Path]]:
    files = [("certificate", config.certificate), ("key", config.key)]
    if config.client_ca is not None:
        files.append(("client_ca", config.client_ca))
    if config.client_crl is not None:
        files.append(("client_crl", config.client_crl))
    return files


def _first_certificate(text: str) -> str:
    start = text.find("-----BEGIN CERTIFICATE-----")
    end = text.find("-----END CERTIFICATE-----", start)
    if start < 0 or end < 0:
        raise ValueError("no PEM certificate")
    return text[start : end + len("-----END CERTIFICATE-----")] + "\n"


def _no_password() -> str:
    raise ValueError("is encrypted with a passphrase; store it without one, readable by the broker only")


def _check_server_name(
    connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext
) -> int | None:
    if name is not None and not acceptable_server_name(name):
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    return None


def acceptable_server_name(name: str) -> bool:
    """Whether a name from a ClientHello may appear in a log and in rules. RFC 6066 3."""
    return 0 < len(name) <= LONGEST_SERVER_NAME and name.isascii() and name.isprintable() and " " not in name


def hello_server_name(hello: bytes) -> bytes | None:
    """The server name in a connection's first bytes, if its ClientHello is there whole and has one. RFC 8446 4.1.2."""
    try:
        if hello[0] != 0x16 or hello[5] != 0x01:
            return None
        end = 5 + int.from_bytes(hello[3:5], "big")
        at = 9 + 2 + 32
        at += 1 + hello[at]  # session id
        at += 2 + int.from_bytes(hello[at : at + 2], "big")  # cipher suites
        at += 1 + hello[at]  # compression methods
        at += 2
        while at + 4 <= min(end, len(hello)):
            kind = int.from_bytes(hello[at : at + 2], "big")
            size = int.from_bytes(hello[at + 2 : at + 4], "big")
            at += 4
            if kind == 0 and size >= 5 and hello[at + 2] == 0:
                length = int.from_bytes(hello[at + 3 : at + 5], "big")
                return hello[at + 5 : at + 5 + length]
            at += size
    except IndexError:
        pass
    return None


class UnusableName(ValueError):
    """The client certificate's subject holds control characters."""


def identity(certificate: dict[str, Any] | None, username_from: str) -> dict[str, str]:
    """What a verified client certificate (`getpeercert`) says of its owner; empty without one.

    Keys cert_common_name, cert_subject (RFC 4514), cert_san, and username as `username_from` says. UnusableName when a
    name holds control characters.
    """
    if not certificate:
        return {}
    pairs = [pair for relative in certificate.get("subject", ()) for pair in relative]
    common = [value for kind, value in pairs if kind == "commonName"]
    subject = ",".join(
        "+".join(f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in relative)
        for relative in reversed(certificate.get("subject", ()))
    )
    alternatives = [str(value) for _, value in certificate.get("subjectAltName", ())]
    found = {"cert_subject": subject}
    if common:
        found["cert_common_name"] = common[-1]
    if alternatives:
        found["cert_san"] = alternatives[0]
    source = {"cn": "cert_common_name", "dn": "cert_subject", "san": "cert_san"}.get(username_from)
    if source is not None and found.get(source):
        found["username"] = found[source]
    for value in found.values():
        if not value.isprintable():
            raise UnusableName("its client certificate's name holds control characters")
    return found


def _escaped(value: str) -> str:
    escaped = "".join("\\" + c if c in ',+"\\<>;' else c for c in value)
    if escaped[:1] in ("#", " "):
        escaped = "\\" + escaped
    if escaped.endswith(" ") and len(escaped) > 1:
        escaped = escaped[:-1] + "\\ "
    return escaped


_REASONS = {
    "WRONG_VERSION_NUMBER": "does not speak TLS",
    "HTTP_REQUEST": "sent an HTTP request to a TLS port",
    "UNSUPPORTED_PROTOCOL": "offers no TLS version we accept (1.2 and 1.3)",
    "VERSION_TOO_LOW": "offers no TLS version we accept (1.2 and 1.3)",
    "NO_SHARED_CIPHER": "offers no cipher we accept",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "showed no client certificate",
    "CERTIFICATE_VERIFY_FAILED": "showed a client certificate that was not accepted",
    "UNEXPECTED_EOF_WHILE_READING": "hung up during the TLS hand-shake",
    "TLSV1_ALERT_UNKNOWN_CA": "does not trust our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not trust our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "does not trust our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "finds our certificate expired",
}


def failure_text(error: BaseException) -> str:
    """One clause for the log about a failed hand-shake."""
    if isinstance(error, ssl.SSLError):
        text = _REASONS.get(error.reason or "", f"failed the TLS hand-shake ({error.reason or 'no reason given'})")
        message = getattr(error, "verify_message", "")
        return f"{text} ({message})" if message else text
    if isinstance(error, (ConnectionResetError, ConnectionAbortedError)) and "handshake" in str(error):
        return "did not finish the TLS hand-shake in time"
    if isinstance(error, TimeoutError):
        return "did not finish the TLS hand-shake in time"
    if isinstance(error, ConnectionError):
        return "hung up during the TLS hand-shake"
    return f"failed the TLS hand-shake ({type(error).__name__})"
