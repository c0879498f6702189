"""Passwords as EMQ and its relatives keep them in a record: a hash, and perhaps a salt beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from broker.access.passwords import BadHash, Form, Verifier
from broker.extend.auth import AuthConfig, Verdict, note
from broker.runtime.logs import limited

logger = logging.getLogger(__name__)


class StoredConfig(AuthConfig):
    """The keys of every table whose records hold password hashes."""

    password_hash: Form = Form("salt,sha256")
    """How passwords are stored: ``sha256`` or ``salt,sha256`` (the salt before the password), ``sha256,salt`` (after
    it), likewise md5, sha, sha512; ``pbkdf2,sha256,10000,32``; bcrypt; argon2id; scrypt; plain; auto. EMQX 5's table
    ``{ name = "sha256", salt_position = "prefix" }`` is understood too. A value that says itself what it is, such as
    ``$argon2id$…``, counts as that."""


class StoredPassword:
    """Compares passwords with records, the slow ones in a few threads."""

    def __init__(self, config: StoredConfig) -> None:
        self._form = config.password_hash
        self._name = config.name
        self._verifier = Verifier(min(config.pool, 4))
        self._damaged = limited(logger, "a stored password cannot be used")

    async def verify(self, stored: object, salt: object, password: bytes, username: str | None) -> Verdict:
        """ALLOW or DENY; a record without a usable password lets nobody in."""
        try:
            hash = self._form.read(stored, salt)
        except BadHash as error:
            note(f"the stored password cannot be used: {error}")
            self._damaged.warning(
                "auth.%s: the stored password of user %r cannot be used: %s", self._name, username, error
            )
            return Verdict.DENY
        right = await self._verifier.verify(hash, password)
        note(f"the password is {'right' if right else 'another'} ({hash.scheme})")
        return Verdict.ALLOW if right else Verdict.DENY

    async def burn(self, password: bytes) -> None:
        """Takes as long as a wrong password takes."""
        await self._verifier.verify(self._form.sample(), password)

    def close(self) -> None:
        """Drop what waits."""
        self._verifier.close()


def password_of(fields: Mapping[str, object], *names: str) -> object:
    """The first of the fields that is there."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)
