"""Users and rules in files: passwords as ``name:hash``, rules as EMQ tuples or as mosquitto's acl_file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from pydantic import model_validator

from broker.access.acl_file import read_rules
from broker.access.password_file import PasswordFile, read_passwords
from broker.access.passwords import Hash, Verifier
from broker.config.types import ConfigPath
from broker.extend.auth import AccountError, Answer, AuthConfig, Client, Grant, Rule, Verdict, note
from broker.extend.registry import Backend


class FileConfig(AuthConfig):
    """`[auth.*]` with ``kind = "file"``"""

    passwords: ConfigPath | None = None
    """File of users, one ``name:hash`` a line: argon2id, bcrypt, or mosquitto's ``$6$`` and ``$7$``. ``isthmus hash``
    makes such lines. Without it nobody logs in here, and only `rules` count."""
    rules: ConfigPath | None = None
    """File of rules for all clients, whichever backend let them in: EMQ tuples ``{allow, …}.`` or mosquitto's
    acl_file, told apart by content. A file without rules denies everything."""
    superusers: tuple[str, ...] = ()
    """Users of `passwords` for whom no rule counts: they may do everything."""

    @model_validator(mode="after")
    def _something(self) -> FileConfig:
        if self.passwords is None and self.rules is None:
            raise ValueError("name a file: passwords, rules or both")
        if self.superusers and self.passwords is None:
            raise ValueError("superusers needs passwords")
        return self

    def accounts(self) -> PasswordFile:
        """What ``isthmus user`` edits."""
        if self.passwords is None:
            raise AccountError("it has no file of passwords")
        return PasswordFile(self.passwords, self.superusers)


class File:
    """Compares with what the files held when they were read; a reload reads them again."""

    reopen_on_reload = True

    def __init__(self, config: FileConfig, users: Mapping[str, Hash], rules: Sequence[Rule] | None) -> None:
        self._config = config
        self._users = users
        self._verifier = Verifier(min(config.pool, 4))
        self.common_rules = rules
        self.rules = self._rules if config.passwords is not None else None
        """A file of rules alone does not judge who may connect, and is not asked whom it knows."""

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        hash = self._users.get(client.username or "")
        if hash is None:
            note(f"user {client.username!r} is not in the file")
            return Verdict.IGNORE
        if not await self._verifier.verify(hash, password):
            note(f"user {client.username!r} is in the file, the password is another ({hash.scheme})")
            return Verdict.DENY
        note(f"user {client.username!r} is in the file, the password is right ({hash.scheme})")
        return Grant(superuser=True) if client.username in self._config.superusers else Verdict.ALLOW

    async def _rules(self, client: Client) -> Grant | None:
        """The rights a user has now."""
        if client.username not in self._users:
            return None
        return Grant(superuser=client.username in self._config.superusers)

    async def reread(self) -> None:
        """Take the users of the file as it is now. Raises ValueError and keeps what it has when it is not right."""
        if self._config.passwords is not None:
            self._users = await asyncio.to_thread(read_passwords, self._config.passwords)

    async def burn(self, password: bytes) -> None:
        """Takes as long as a wrong password takes, so that time does not tell which users exist."""
        hash = next(iter(self._users.values()), None)
        if hash is not None:
            await self._verifier.verify(hash, password)

    async def check(self) -> None:
        """The files were read when this was opened."""

    async def close(self) -> None:
        self._verifier.close()


async def open_file(config: FileConfig) -> File:
    users = read_passwords(config.passwords) if config.passwords is not None else {}
    rules = read_rules(config.rules) if config.rules is not None else None
    for name in config.superusers:
        if name not in users:
            raise ValueError(f"superusers: there is no user {name!r} in {config.passwords}")
    return File(config, users, rules)


BACKEND = Backend("auth.file", FileConfig, open_file)
