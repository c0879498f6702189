"""Groups and rights by the subject of a client's certificate. The listener has verified the certificate by then and
taken the user name from it (`username_from`)."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from auth._rights import Rights, in_order
from broker.extend.auth import AuthConfig, Client, Grant, Verdict
from broker.extend.registry import Backend

_PAIR = re.compile(r"((?:[^\\,+]|\\.)*)([,+]|$)", re.DOTALL)

Names = tuple[frozenset[str], ...]
"""The relative names of a subject in the order they are written, the most special one first."""


class Subject(Rights):
    """`[auth.certificate.subjects.NAME]`: who lies below a name, and what these may do."""

    below: str
    """The end of the subjects that are meant, as RFC 4514 writes them: ``OU=devices,O=Example,C=DE``. Compared whole
    name by whole name and letter by letter; ``*`` is every certificate the listener accepts."""
    groups: tuple[str, ...] = ()
    """Names of groups these clients are members of."""
    superuser: bool = False
    """May do everything."""

    @field_validator("below")
    @classmethod
    def _is_name(cls, below: str) -> str:
        if below != "*":
            split_subject(below)
        return below


class CertificateConfig(AuthConfig):
    """`[auth.*]` with ``kind = "certificate"``: for listeners with `username_from`"""

    subjects: dict[str, Subject] = Field(min_length=1)
    """Tables `[auth.certificate.subjects.NAME]`. A client gets the rights of all that its certificate lies below; one
    that lies below none is unknown here, and may be known to another backend."""


class Certificate:
    """Compares the subject with names."""

    def __init__(self, config: CertificateConfig) -> None:
        self._subjects = [
            (f"subject {name}", subject, () if subject.below == "*" else split_subject(subject.below))
            for name, subject in config.subjects.items()
        ]

    async def authenticate(self, client: Client, password: bytes) -> Verdict:
        """Whoever has to show a password is not known by its certificate."""
        return Verdict.IGNORE

    async def rules(self, client: Client) -> Grant | None:
        """The rights of a client whose user name its certificate has proved."""
        text = client.certificate.get("cert_subject")
        if not text or "username" not in client.certificate:
            return None
        names = split_subject(text)
        found = [
            (name, subject)
            for name, subject, below in self._subjects
            if not below or (len(names) >= len(below) and names[-len(below) :] == below)
        ]
        if not found:
            return None
        return Grant(
            any(subject.superuser for _, subject in found),
            rules=tuple(in_order(found)),
            groups=frozenset(group for _, subject in found for group in subject.groups),
        )

    async def check(self) -> None:
        """There is nothing to reach."""

    async def close(self) -> None:
        """There is nothing to close."""


def split_subject(text: str) -> Names:
    """A subject as RFC 4514 writes it. Escaped separators do not separate, and the parts of one relative name have no
    order. ValueError."""
    names: list[frozenset[str]] = []
    level: list[str] = []
    at = 0
    while True:
        match = _PAIR.match(text, at)
        kind, equals, value = match[1].partition("=") if match is not None else ("", "", "")
        if match is None or not equals or not kind.strip() or not value.strip():
            raise ValueError(f"{text!r} is not a name such as OU=devices,O=Example")
        level.append(f"{kind.strip()}={value.strip()}")
        if match[2] != "+":
            names.append(frozenset(level))
            level = []
        at = match.end()
        if not match[2]:
            return tuple(names)


async def open_certificate(config: CertificateConfig) -> Certificate:
    return Certificate(config)


BACKEND = Backend("auth.certificate", CertificateConfig, open_certificate)
