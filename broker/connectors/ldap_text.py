"""Filters and distinguished names as text: escaping values, comparing, checking. No connections."""

from __future__ import annotations

from ldap3.core.exceptions import LDAPExceptionError, LDAPInvalidDnError
from ldap3.operation.search import parse_filter
from ldap3.utils.dn import parse_dn


def escape(value: str) -> str:
    """A value inside a search filter, RFC 4515 section 3."""
    return "".join(f"\\{ord(c):02x}" if c in "\\*()\0" else c for c in value)


def escape_dn(value: str) -> str:
    """A value inside a distinguished name, RFC 4514 section 2.4."""
    text = "".join(f"\\{c}" if c in ',+"\\<>;=' else f"\\{ord(c):02x}" if ord(c) < 32 else c for c in value)
    if text.startswith(("#", " ")):
        text = "\\" + text
    if text.endswith(" ") and len(value) > 1:
        text = text[:-1] + "\\ "
    return text


def check_filter(text: str) -> None:
    """ValueError when this is not a search filter."""
    try:
        parse_filter(text, None, True, None, None, False)
    except (LDAPExceptionError, IndexError, ValueError):
        raise ValueError(f"{text!r} is not an LDAP search filter such as (uid=x)") from None


def normalize_dn(dn: str) -> str:
    """A form in which two spellings of one DN are equal; text that is no DN is only folded."""
    try:
        parts = parse_dn(dn, strip=True)
    except (LDAPInvalidDnError, IndexError, ValueError):
        return dn.strip().casefold()
    return "".join(f"{name.strip().casefold()}={_plain(value).casefold()}{end}" for name, value, end in parts)


def split_dn(dn: str) -> list[str]:
    """The relative names of a DN, the entry's own first; ValueError when it is none."""
    try:
        parts = parse_dn(dn, strip=True)
    except (LDAPInvalidDnError, IndexError):
        raise ValueError(f"{dn!r} is not a distinguished name such as cn=sensors,ou=groups,dc=example") from None
    names: list[str] = []
    joined = False
    for name, value, end in parts:
        if joined:
            names[-1] += f"+{name}={value}"
        else:
            names.append(f"{name}={value}")
        joined = end == "+"
    return names


def _plain(value: str) -> str:
    """A DN value with its escapes resolved, and runs of spaces as one."""
    out = bytearray()
    at = 0
    while at < len(value):
        if value[at] != "\\":
            out += value[at].encode()
            at += 1
        elif len(value) >= at + 3 and all(c in "0123456789abcdefABCDEF" for c in value[at + 1 : at + 3]):
            out.append(int(value[at + 1 : at + 3], 16))
            at += 3
        else:
            out += value[at + 1 : at + 2].encode()
            at += 2
    text = " ".join(out.decode("utf-8", "replace").split())
    return "".join(f"\\{c}" if c in ",+\\=" else c for c in text)
