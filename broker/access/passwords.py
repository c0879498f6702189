"""Verifies password hashes: argon2id, bcrypt, mosquitto's own ``$6$`` and ``$7$``. Slow work runs in a few threads."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import re
from concurrent.futures import ThreadPoolExecutor

import argon2
import bcrypt
from argon2.low_level import Type, verify_secret

MAX_ITERATIONS = 5_000_000
"""PBKDF2 iterations of a stored hash; about three seconds."""
MAX_MEMORY_KIB = 256 * 1024
MAX_PASSES = 32
MAX_LANES = 16
MAX_COST = 15
"""bcrypt; 2^15 rounds take about two seconds."""
BCRYPT_BYTES = 72
"""bcrypt ignores what follows, so longer passwords are refused."""

_ARGON2 = re.compile(
    r"\$argon2(id|i)\$v=19\$m=(\d{1,12}),t=(\d{1,12}),p=(\d{1,12})\$[A-Za-z0-9+/]{11,128}\$[A-Za-z0-9+/]{16,256}"
)
_BCRYPT = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
_NAMES = "argon2id ($argon2id$…), bcrypt ($2b$…), mosquitto's $7$… and $6$…"


class BadHash(ValueError):
    """A stored hash that cannot be used; the text never repeats it."""


class Hash:
    """A stored hash that was found to be well formed and within bounds."""

    __slots__ = ("_digest", "_iterations", "_salt", "_text", "scheme")

    def __init__(self, text: str) -> None:
        """Raises BadHash when the scheme is unknown, the text damaged, or a parameter would take too long."""
        self._text = text
        self._iterations = 0
        self._salt = self._digest = b""
        if text.startswith("$argon2"):
            self.scheme = "argon2"
            self._check_argon2()
        elif text.startswith("$2"):
            self.scheme = "bcrypt"
            match = _BCRYPT.fullmatch(text)
            if match is None:
                raise BadHash("the bcrypt hash is damaged")
            if not 4 <= int(match[1]) <= MAX_COST:
                raise BadHash(f"bcrypt cost {match[1]} is not between 4 and {MAX_COST}")
        elif text.startswith("$7$"):
            self.scheme = "pbkdf2"
            self._read_mosquitto(4)
        elif text.startswith("$6$"):
            self.scheme = "sha512"
            self._read_mosquitto(3)
        elif not text:
            raise BadHash("the hash is empty")
        else:
            raise BadHash(f"the hash is of no known kind; there are: {_NAMES}")

    def verify(self, password: bytes) -> bool:
        """Whether this is the password. Takes up to seconds and releases the GIL: call it in a thread."""
        if self.scheme == "argon2":
            kind = Type.ID if self._text.startswith("$argon2id") else Type.I
            try:
                return verify_secret(self._text.encode(), password, kind)
            except argon2.exceptions.VerifyMismatchError:
                return False
            except argon2.exceptions.VerificationError:
                return False
        if self.scheme == "bcrypt":
            if len(password) > BCRYPT_BYTES or b"\0" in password:
                bcrypt.checkpw(b"", self._text.encode())  # the same time as any other wrong password
                return False
            return bcrypt.checkpw(password, self._text.encode())
        if b"\0" in password:
            return False  # HMAC takes "secret" and "secret\0" for the same key
        if self.scheme == "pbkdf2":
            found = hashlib.pbkdf2_hmac("sha512", password, self._salt, self._iterations, len(self._digest))
        else:
            found = hashlib.sha512(password + self._salt).digest()
        return hmac.compare_digest(found, self._digest)

    def __repr__(self) -> str:
        return f"Hash({self.scheme})"

    def _check_argon2(self) -> None:
        match = _ARGON2.fullmatch(self._text)
        if match is None:
            raise BadHash("the argon2 hash is damaged, or of a version other than 19")
        memory, passes, lanes = int(match[2]), int(match[3]), int(match[4])
        if not 8 <= memory <= MAX_MEMORY_KIB:
            raise BadHash(f"argon2 with {memory} KiB of memory; at most {MAX_MEMORY_KIB} are spent on one login")
        if not 1 <= passes <= MAX_PASSES or not 1 <= lanes <= MAX_LANES:
            raise BadHash(f"argon2 with t={passes}, p={lanes}; at most t={MAX_PASSES}, p={MAX_LANES}")

    def _read_mosquitto(self, fields: int) -> None:
        parts = self._text.split("$")[1:]
        if len(parts) != fields:
            raise BadHash(f"a ${parts[0]}$ hash has {fields} parts, not {len(parts)}")
        if fields == 4:
            if not re.fullmatch(r"\d{1,12}", parts[1]) or not 1 <= int(parts[1]) <= MAX_ITERATIONS:
                raise BadHash(f"the number of iterations is not between 1 and {MAX_ITERATIONS}")
            self._iterations = int(parts[1])
        try:
            self._salt = base64.b64decode(parts[-2], validate=True)
            self._digest = base64.b64decode(parts[-1], validate=True)
        except (binascii.Error, ValueError):
            raise BadHash(f"the ${parts[0]}$ hash is damaged") from None
        if not self._salt or len(self._digest) != 64:
            raise BadHash(f"the ${parts[0]}$ hash is damaged")


class Verifier:
    """A few threads that verify; the work of more logins waits."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), thread_name_prefix="password")

    async def verify(self, hash: Hash, password: bytes) -> bool:
        """Whether this is the password. Cancelled work that has not begun is not done."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, hash.verify, password)

    def close(self) -> None:
        """Drop what waits; does not wait for what runs."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def hash_password(password: str | bytes, scheme: str = "argon2id") -> str:
    """A new hash as one line of text: argon2id, bcrypt, or mosquitto's ``sha512-pbkdf2`` (``$7$``)."""
    secret = password.encode() if isinstance(password, str) else password
    if not secret:
        raise ValueError("an empty password cannot log in")
    if scheme == "argon2id":
        return argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1).hash(secret)
    if scheme == "bcrypt":
        if len(secret) > BCRYPT_BYTES or b"\0" in secret:
            raise ValueError(f"bcrypt takes at most {BCRYPT_BYTES} bytes without NUL; use argon2id")
        return bcrypt.hashpw(secret, bcrypt.gensalt(12)).decode()
    if scheme in ("pbkdf2", "sha512-pbkdf2"):
        salt = os.urandom(12)
        digest = hashlib.pbkdf2_hmac("sha512", secret, salt, 210_000, 64)
        return f"$7$210000${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
    raise ValueError(f"{scheme!r} is not a way to hash here; there are argon2id, bcrypt and sha512-pbkdf2")
