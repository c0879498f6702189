"""One blocking connection to one LDAP server, on ldap3. Used by one thread at a time; any other may `kill` it.

Everything that arrives is bounded in size, everything that is waited for by a deadline. Certificates and host names are
checked by Python's own ssl module. Passwords are sent as the bytes they are and never empty.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ldap3
from ldap3.core.exceptions import LDAPExceptionError
from ldap3.protocol.controls import build_control
from ldap3.protocol.rfc4511 import (
    LDAPDN,
    AssertionValue,
    AttributeDescription,
    AttributeValueAssertion,
    AuthenticationChoice,
    BindRequest,
    CompareRequest,
    SaslCredentials,
    Simple,
    Version,
)

MAX_ANSWER = 4 << 20
"""Bytes one operation may receive: a directory that sends more is not answering our question."""

SUCCESS = 0
OPERATIONS_ERROR = 1
"""Active Directory's answer to a search without a bind."""
SIZE_LIMIT_EXCEEDED = 4
COMPARE_FALSE = 5
COMPARE_TRUE = 6
STRONGER_AUTH_REQUIRED = 8
REFERRAL = 10
CONFIDENTIALITY_REQUIRED = 13
NO_SUCH_ATTRIBUTE = 16
NO_SUCH_OBJECT = 32
NO_RIGHTS = 50

PASSWORD_POLICY = "1.3.6.1.4.1.42.2.27.8.5.1"
"""The control that asks for the reason of a refusal, and for what a directory lets pass once more."""
MUST_CHANGE = 2
_POLICY = (
    "the password has expired", "the account is locked", "the password must be changed first",
    "the password may not be changed", "the old password is missing", "the password is too simple",
    "the password is too short", "the password is too young", "the password was used before",
)  # fmt: skip
"""Errors of the password policy, by number."""

REFUSED = {
    19: "a constraint of the directory, for example a locked account",
    32: "no such entry",
    34: "not a valid DN",
    48: "the entry has no password",
    49: "wrong password",
    50: "insufficient rights",
    53: "the directory is unwilling",
}
"""Bind results that say no to this user. Any other result than success is a failure of the service."""


class LinkError(ConnectionError):
    """The server cannot be reached, or did not answer as an LDAP server should."""


class TooMany(LinkError):
    """A search found more entries than it may."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server is and how to talk to it."""

    host: str
    port: int
    tls: str
    """starttls | ldaps | none"""
    context: ssl.SSLContext | None = field(default=None, compare=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'ldaps' if self.tls == 'ldaps' else 'ldap'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a search found. Attribute names are in lower case."""

    dn: str
    attributes: dict[str, list[bytes]]

    def texts(self, name: str) -> list[str]:
        """The values of an attribute that are text."""
        found = []
        for value in self.attributes.get(name.lower(), ()):
            with contextlib.suppress(UnicodeDecodeError):
                found.append(value.decode())
        return found


@dataclass(frozen=True, slots=True)
class BindResult:
    """How a bind ended: `accepted`, or why not."""

    accepted: bool
    code: int
    text: str


class _Bounded:
    """A socket with a deadline and a limit on what it receives."""

    def __init__(self, inner: socket.socket) -> None:
        self.inner = inner
        self.deadline = 0.0
        self.left = MAX_ANSWER

    def allow(self, deadline: float) -> None:
        self.deadline = deadline
        self.left = MAX_ANSWER

    def recv(self, size: int) -> bytes:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("no complete answer in time")
        self.inner.settimeout(remaining)
        data = self.inner.recv(size)
        self.left -= len(data)
        if self.left < 0:
            raise OSError(f"the answer is larger than {MAX_ANSWER >> 20} MB")
        return data

    def sendall(self, data: bytes) -> None:
        self.inner.settimeout(max(0.01, self.deadline - time.monotonic()))
        self.inner.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Tls(ldap3.Tls):  # type: ignore[misc]
    """Wraps the socket with our own context, which checks certificate and host name."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        super().__init__(validate=ssl.CERT_REQUIRED)
        self._context = context
        self._host = host

    def wrap_socket(self, connection: Any, do_handshake: bool = False) -> None:
        bounded = connection.socket if isinstance(connection.socket, _Bounded) else None
        plain = bounded.inner if bounded else connection.socket
        if bounded:
            plain.settimeout(max(0.01, bounded.deadline - time.monotonic()))
        wrapped = self._context.wrap_socket(plain, do_handshake_on_connect=do_handshake, server_hostname=self._host)
        if bounded:
            bounded.inner = wrapped
        else:
            connection.socket = wrapped


class Link:
    """One connection. Every method blocks, and raises LinkError; a link that did must not be used again."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.idle_since = 0.0
        self.uses = 0
        self._connection: Any = None
        self._killed = False

    def open(self, deadline: float) -> None:
        """Connect, with TLS as configured: without TLS nothing else is ever sent."""
        tls = _Tls(self.place.context, self.place.host) if self.place.context else None
        server = ldap3.Server(
            self.place.host, self.place.port, use_ssl=self.place.tls == "ldaps", tls=tls, get_info=ldap3.NONE,
            allowed_referral_hosts=[], connect_timeout=max(0.01, deadline - time.monotonic()),
        )  # fmt: skip
        self._connection = ldap3.Connection(
            server, client_strategy=ldap3.SYNC, auto_referrals=False, auto_range=False, check_names=False,
            raise_exceptions=False, return_empty_attributes=False, auto_bind=ldap3.AUTO_BIND_NONE,
        )  # fmt: skip
        try:
            self._connection.open(read_server_info=False)
            self._connection.socket = _Bounded(self._connection.socket)
            self._connection.socket.allow(deadline)
            if self._killed:
                raise LinkError(f"{self.place}: given up")
            if self.place.tls == "starttls":
                if not self._connection.start_tls(read_server_info=False):
                    raise LinkError(f"{self.place}: StartTLS was refused: {self._connection.result}")
                if not isinstance(self._connection.socket.inner, ssl.SSLSocket):
                    raise LinkError(f"{self.place}: StartTLS did not start")
        except LinkError:
            self.close()
            raise
        except (LDAPExceptionError, OSError, ValueError) as error:
            self.close()
            raise LinkError(f"{self.place}: {_why_not_open(error)}") from None

    def bind(self, dn: str, password: bytes, deadline: float) -> BindResult:
        """A simple bind. Refuses an empty name or password before anything is sent (RFC 4513 section 5.1.2)."""
        if not dn or not password:
            return BindResult(False, 49, "an empty name or password is never sent")
        return self._bind(dn, AuthenticationChoice().setComponentByName("simple", Simple(password)), deadline)

    def bind_external(self, deadline: float) -> BindResult:
        """As whom our certificate names, by SASL EXTERNAL."""
        credentials = SaslCredentials()
        credentials["mechanism"] = "EXTERNAL"
        credentials["credentials"] = b""  # none at all would ask the server to say something first
        return self._bind("", AuthenticationChoice().setComponentByName("sasl", credentials), deadline)

    def _bind(self, dn: str, authentication: Any, deadline: float) -> BindResult:
        request = BindRequest()
        request["version"] = Version(3)
        request["name"] = dn
        request["authentication"] = authentication
        policy = build_control(PASSWORD_POLICY, False, None, encode_control_value=False)
        result = self._send("bindRequest", request, deadline, [policy])
        code = int(result["result"])
        wrong, left = _password_policy(result)
        if code == SUCCESS and wrong == MUST_CHANGE:  # all it may do is change the password
            return BindResult(False, code, _POLICY[MUST_CHANGE])
        if code == SUCCESS:
            return BindResult(True, code, "accepted" if left is None else f"accepted; expired, {left} logins are left")
        text = REFUSED.get(code)
        detail = _active_directory(str(result.get("message") or ""))
        if wrong is not None and wrong < len(_POLICY):
            detail += f", {_POLICY[wrong]}"
        if code in (STRONGER_AUTH_REQUIRED, CONFIDENTIALITY_REQUIRED) and self.place.tls == "none":
            raise LinkError(
                f"{self.place}: the directory takes passwords only over TLS (result {code}): "
                'write tls = "starttls", or an ldaps:// address, and `ca`'
            )
        if text is None:
            raise LinkError(f"{self.place}: bind failed with result {code} {result.get('description')}{detail}")
        return BindResult(False, code, f"{text} (result {code}{detail})")

    def compare(self, dn: str, attribute: str, value: bytes, deadline: float) -> bool:
        """Whether the entry's attribute has this value, as the directory compares; no when there is no such entry or
        attribute. The value is sent as it is."""
        assertion = AttributeValueAssertion()
        assertion["attributeDesc"] = AttributeDescription(attribute)
        assertion["assertionValue"] = AssertionValue(value)
        request = CompareRequest()
        request["entry"] = LDAPDN(dn)
        request["ava"] = assertion
        result = self._send("compareRequest", request, deadline)
        code = int(result["result"])
        if code == COMPARE_TRUE:
            return True
        if code in (COMPARE_FALSE, NO_SUCH_ATTRIBUTE, NO_SUCH_OBJECT):
            return False
        advice = "; give the service account the right to compare it" if code in (OPERATIONS_ERROR, NO_RIGHTS) else ""
        raise LinkError(
            f"{self.place}: comparing {attribute} failed with result {code} {result.get('description')}{advice}"
        )

    def search(
        self,
        base: str,
        filter: str,
        attributes: Sequence[str],
        deadline: float,
        *,
        scope: str,
        limit: int,
        must_exist: bool = False,
    ) -> list[Entry]:
        """The entries found; referrals are left alone. TooMany when there are more than `limit`."""
        seconds = max(1, int(deadline - time.monotonic()) + 1)
        connection = self._begin(deadline)
        try:
            connection.search(
                base, filter, search_scope=_SCOPES[scope], dereference_aliases=ldap3.DEREF_NEVER,
                attributes=list(attributes) or [ldap3.NO_ATTRIBUTES], size_limit=limit + 1, time_limit=seconds,
            )  # fmt: skip
        except (LDAPExceptionError, OSError, ValueError, AttributeError, IndexError, KeyError, TypeError) as error:
            self.close()
            raise LinkError(f"{self.place}: {_reason(error)}") from None
        result, response = connection.result, connection.response or []
        code = int(result["result"])
        found = [
            Entry(
                str(item["dn"]), {name.lower(): list(values or ()) for name, values in item["raw_attributes"].items()}
            )
            for item in response
            if item.get("type") == "searchResEntry"
        ]
        if len(found) > limit or code == SIZE_LIMIT_EXCEEDED:
            raise TooMany(f"{self.place}: more than {limit} entries below {base!r}")
        if must_exist and (code == NO_SUCH_OBJECT or (scope == "base" and not found and code in (SUCCESS, REFERRAL))):
            raise LinkError(
                f"{self.place}: there is no entry {base!r}, or whoever searches may not see it; correct base_dn"
            )
        if code in (NO_SUCH_OBJECT, REFERRAL):
            return []
        if code != SUCCESS:
            advice = "; set bind_dn, or give it the right to read" if code in (OPERATIONS_ERROR, NO_RIGHTS) else ""
            raise LinkError(f"{self.place}: the search failed with result {code} {result.get('description')}{advice}")
        return found

    def kill(self) -> None:
        """From another thread: whatever the link waits for ends now."""
        self._killed = True
        connection = self._connection
        inner = getattr(connection, "socket", None) if connection is not None else None
        if isinstance(inner, _Bounded):
            inner = inner.inner
        if inner is not None:
            with contextlib.suppress(OSError, ValueError):
                # not SSLSocket.shutdown: it takes TLS away from a thread that may be about to send
                socket.socket.shutdown(inner, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket without ceremony."""
        connection, self._connection = self._connection, None
        inner = getattr(connection, "socket", None) if connection is not None else None
        if inner is not None:
            with contextlib.suppress(OSError, ValueError):
                inner.close()

    def _begin(self, deadline: float) -> Any:
        connection = self._connection
        if connection is None or self._killed or connection.socket is None:
            raise LinkError(f"{self.place}: the connection was closed")
        connection.socket.allow(deadline)
        self.uses += 1
        return connection

    def _send(self, kind: str, request: Any, deadline: float, controls: list[Any] | None = None) -> dict[str, Any]:
        connection = self._begin(deadline)
        try:
            connection.post_send_single_response(connection.send(kind, request, controls))
            result: dict[str, Any] = connection.result
            if not isinstance(result, dict) or "result" not in result:
                raise OSError("no result in the answer")
        except (LDAPExceptionError, OSError, ValueError, AttributeError, IndexError, KeyError, TypeError) as error:
            self.close()
            raise LinkError(f"{self.place}: {_reason(error)}") from None
        finally:
            connection.request = None  # it holds the password
        return result


_SCOPES = {"base": ldap3.BASE, "one": ldap3.LEVEL, "sub": ldap3.SUBTREE}


def _active_directory(message: str) -> str:
    """The sub-code of Active Directory (``52e`` wrong password, ``533`` disabled, ``775`` locked …), nothing else."""
    _, found, rest = message.partition(", data ")
    code = rest.split(",")[0].strip()
    return f", data {code}" if found and code.isalnum() and len(code) <= 4 else ""


def _password_policy(result: dict[str, Any]) -> tuple[int | None, int | None]:
    """Error and number of logins that are left after the password's end, as the control tells them; nothing of one that
    cannot be read. draft-behera-ldap-password-policy-10, 6.2."""
    control = (result.get("controls") or {}).get(PASSWORD_POLICY)
    value = control.get("value") if isinstance(control, dict) else None
    if not isinstance(value, bytes):
        return None, None
    wrong = left = None
    try:
        fields = _content(value, 0)[1]
        at = 0
        while at < len(fields):
            tag, content, at = _content(fields, at)
            if tag == 0x81:
                wrong = int.from_bytes(content, "big")
            elif tag == 0xA0:
                kind, number, _ = _content(content, 0)
                left = int.from_bytes(number, "big") if kind == 0x81 else None
    except IndexError:
        return None, None
    return wrong, left


def _content(data: bytes, at: int) -> tuple[int, bytes, int]:
    """Tag, content and where the next element begins. These controls are a few bytes, never a long form of length."""
    end = at + 2 + data[at + 1]
    if end > len(data):
        raise IndexError
    return data[at], data[at + 2 : end], end


def _why_not_open(error: BaseException) -> str:
    """What ldap3 says about a failed opening, readable, and what to do about it."""
    text = _reason(error)
    tls = re.search(r"\[SSL: (\w+)\] ([^(]*)", text)
    if tls is not None and "CERTIFICATE" in tls[1]:
        return f"{tls[2].strip()}; name the authority in `ca`, and the server in `servers` as its certificate does"
    if tls is not None:
        return f"TLS failed: {tls[2].strip()}; does this port speak ldaps://, and does the server have a certificate?"
    if text.startswith("startTLS failed"):
        return f"StartTLS was refused ({text.rpartition(' ')[2]}); the server needs a certificate for it"
    if text == "invalid server address":
        return "the host name is not known; correct `servers`"
    if "Errno" in text or "timed out" in text:
        return f"{text}; is the directory running, and is `servers` right?"
    return text


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
