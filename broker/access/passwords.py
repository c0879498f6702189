"""Verifies stored passwords: hashes that say themselves what they are, and columns of a database whose form is told.
Slow work runs in a few threads."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Self

import argon2
import bcrypt
from argon2.low_level import Type, verify_secret

from broker.access.bulkhead import Busy
from broker.config.types import CompiledText

MAX_ITERATIONS = 5_000_000
"""PBKDF2 iterations of a stored hash; about three seconds."""
MAX_MEMORY_KIB = 256 * 1024
MAX_PASSES = 32
MAX_LANES = 16
MAX_COST = 15
"""bcrypt; 2^15 rounds take about two seconds."""
MAX_DIGEST = 128
"""Bytes PBKDF2 or scrypt may be asked for."""
BCRYPT_BYTES = 72
"""bcrypt ignores what follows, so longer passwords are refused."""

PATIENCE = 2.0
"""Seconds for which a password may wait to be verified: less than a login may take."""

PASSES, MEMORY_KIB, LANES = 2, 19 * 1024, 1
"""What new argon2id hashes cost."""

_ARGON2 = re.compile(
    r"\$argon2(id|i)\$v=19\$m=(\d{1,12}),t=(\d{1,12}),p=(\d{1,12})\$[A-Za-z0-9+/]{11,128}\$[A-Za-z0-9+/]{16,256}"
)
_BCRYPT = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
_DIGESTS = {"md5": "md5", "sha": "sha1", "sha1": "sha1", "sha256": "sha256", "sha512": "sha512"}
_MACS = {**_DIGESTS, "sha224": "sha224", "sha384": "sha384"}
_NAMES = (
    "argon2id ($argon2id$…), bcrypt ($2b$…), mosquitto's $7$… and $6$…, PBKDF2$… of mosquitto-go-auth, Django's, "
    "Werkzeug's, passlib's pbkdf2 and scrypt, LDAP's {SSHA}…"
)

Check = Callable[[bytes], bool]


class BadHash(ValueError):
    """A stored hash that cannot be used; the text never repeats it."""


class Hash:
    """A stored hash that was found to be well formed and within bounds."""

    __slots__ = ("_check", "current", "quick", "scheme")

    def __init__(self, text: str) -> None:
        """Reads a hash that says itself what it is. Raises BadHash when the scheme is unknown, the text damaged, or a
        parameter would take too long."""
        if not text:
            raise BadHash("the hash is empty")
        for prefix, scheme, read in _READERS:
            if text.startswith(prefix):
                self._check = read(text)
                self.scheme = scheme
                break
        else:
            raise BadHash(f"the hash is of no known kind; there are: {_NAMES}")
        self.quick = scheme in ("sha512", "ldap")
        """Takes microseconds: not worth a thread."""
        self.current = text.startswith(f"$argon2id$v=19$m={MEMORY_KIB},t={PASSES},p={LANES}$")
        """As `hash_password` would make it today."""

    @classmethod
    def of(cls, scheme: str, check: Check, *, quick: bool = False) -> Hash:
        """A hash whose form was known from elsewhere."""
        self = cls.__new__(cls)
        self.scheme, self._check, self.quick, self.current = scheme, check, quick, False
        return self

    def verify(self, password: bytes) -> bool:
        """Whether this is the password; an empty one never is. Unless `quick` it takes up to seconds and releases the
        GIL: call it in a thread."""
        return self._check(password) and bool(password)

    def __repr__(self) -> str:
        return f"Hash({self.scheme})"


def describes_itself(text: str) -> bool:
    """Whether this begins as one of the hashes `Hash` reads."""
    return text.startswith(_PREFIXES)


# the forms, one function each: from text to check ---------------------------------------------------------------------


def _read_argon2(text: str) -> Check:
    match = _ARGON2.fullmatch(text)
    if match is None:
        raise BadHash("the argon2 hash is damaged, or of a version other than 19")
    memory, passes, lanes = int(match[2]), int(match[3]), int(match[4])
    if not 8 <= memory <= MAX_MEMORY_KIB:
        raise BadHash(f"argon2 with {memory} KiB of memory; at most {MAX_MEMORY_KIB} are spent on one login")
    if not 1 <= passes <= MAX_PASSES or not 1 <= lanes <= MAX_LANES:
        raise BadHash(f"argon2 with t={passes}, p={lanes}; at most t={MAX_PASSES}, p={MAX_LANES}")
    encoded, kind = text.encode(), Type.ID if match[1] == "id" else Type.I

    def check(password: bytes) -> bool:
        try:
            return verify_secret(encoded, password, kind)
        except argon2.exceptions.VerificationError:
            return False

    return check


def _read_bcrypt(text: str) -> Check:
    match = _BCRYPT.fullmatch(text)
    if match is None:
        raise BadHash("the bcrypt hash is damaged")
    if not 4 <= int(match[1]) <= MAX_COST:
        raise BadHash(f"bcrypt cost {match[1]} is not between 4 and {MAX_COST}")
    encoded = text.encode()

    def check(password: bytes) -> bool:
        if len(password) > BCRYPT_BYTES or b"\0" in password:
            bcrypt.checkpw(b"", encoded)  # the same time as any other wrong password
            return False
        return bcrypt.checkpw(password, encoded)

    return check


def _read_bcrypt_sha256(text: str) -> Check:
    inner = _read_bcrypt(text)
    return lambda password: inner(hashlib.sha256(password).hexdigest().encode())


def _read_mosquitto(text: str) -> Check:
    parts = text.split("$")[1:]
    kind, fields = parts[0], 4 if parts[0] == "7" else 3
    if len(parts) != fields:
        raise BadHash(f"a ${kind}$ hash has {fields} parts, not {len(parts)}")
    iterations = _number(parts[1], MAX_ITERATIONS, "iterations") if fields == 4 else 0
    salt, digest = _base64(parts[-2], f"${kind}$"), _base64(parts[-1], f"${kind}$")
    if not salt or len(digest) != 64:
        raise BadHash(f"the ${kind}$ hash is damaged")
    return _pbkdf2("sha512", salt, iterations, digest) if iterations else _digest("sha512", b"", salt, digest)


def _read_go_auth(text: str) -> Check:
    """``PBKDF2$sha512$100000$salt$digest``; mosquitto-go-auth means the bytes its salt stands for, its predecessor
    mosquitto-auth-plug the text of the salt: both are tried."""
    parts = text.split("$")
    if len(parts) != 5 or parts[1] not in _MACS:
        raise BadHash("a PBKDF2$ hash is PBKDF2$sha512$ITERATIONS$SALT$DIGEST")
    iterations, digest = _number(parts[2], MAX_ITERATIONS // 2, "iterations"), _base64(parts[4], "PBKDF2$")
    salts = [parts[3].encode()]
    with contextlib.suppress(binascii.Error, ValueError):  # if it cannot be decoded, it can only be the text
        salts.insert(0, base64.b64decode(parts[3], validate=True))
    checks = [_pbkdf2(_MACS[parts[1]], salt, iterations, digest) for salt in salts]
    return lambda password: any([check(password) for check in checks])  # each time all of them: the same time


def _read_django_pbkdf2(text: str) -> Check:
    name, *parts = text.split("$")
    mac = name.removeprefix("pbkdf2_")
    if len(parts) != 3 or mac not in _MACS:
        raise BadHash("the Django hash is damaged")
    digest = _base64(parts[2], "Django")
    return _pbkdf2(_MACS[mac], parts[1].encode(), _number(parts[0], MAX_ITERATIONS, "iterations"), digest)


def _read_django_scrypt(text: str) -> Check:
    parts = text.split("$")
    if len(parts) != 6:
        raise BadHash("the Django hash is damaged")
    return _scrypt(parts[2].encode(), parts[1], parts[3], parts[4], _base64(parts[5], "Django"))


def _read_werkzeug(text: str) -> Check:
    method, *parts = text.split("$")
    kind, *numbers = method.split(":")
    if len(parts) != 2:
        raise BadHash(f"the {kind} hash is damaged")
    salt, digest = parts[0].encode(), _hex(parts[1], f"the {kind} hash")
    if kind == "pbkdf2" and len(numbers) == 2 and numbers[0] in _MACS:
        return _pbkdf2(_MACS[numbers[0]], salt, _number(numbers[1], MAX_ITERATIONS, "iterations"), digest)
    if kind == "scrypt" and len(numbers) == 3:
        return _scrypt(salt, numbers[0], numbers[1], numbers[2], digest)
    raise BadHash(f"the {kind} hash is damaged")


def _read_passlib_pbkdf2(text: str) -> Check:
    name, *parts = text.split("$")[1:]
    mac = name.removeprefix("pbkdf2-")
    if len(parts) != 3 or mac not in _MACS:
        raise BadHash("the $pbkdf2 hash is damaged")
    iterations = _number(parts[0], MAX_ITERATIONS, "iterations")
    return _pbkdf2(_MACS[mac], _adapted(parts[1]), iterations, _adapted(parts[2]))


def _read_passlib_scrypt(text: str) -> Check:
    match = re.fullmatch(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,4}),p=(\d{1,4})\$([^$]+)\$([^$]+)", text)
    if match is None:
        raise BadHash("the $scrypt$ hash is damaged")
    return _scrypt(_adapted(match[4], "-"), str(1 << int(match[1])), match[2], match[3], _adapted(match[5], "-"))


def _read_ldap(text: str) -> Check:
    scheme, _, rest = text[1:].partition("}")
    scheme = scheme.upper()
    if scheme in ("CRYPT", "BCRYPT") and rest.startswith("$2"):
        return _read_bcrypt(rest)
    if scheme == "ARGON2":
        return _read_argon2(rest)
    if scheme.startswith("PBKDF2"):
        iterations, salt, digest = [*rest.split("$"), "", "", ""][:3]
        mac = scheme[7:].lower() or "sha1"
        if mac not in _MACS:
            raise BadHash("the {PBKDF2} hash is of an unknown kind")
        return _pbkdf2(_MACS[mac], _adapted(salt), _number(iterations, MAX_ITERATIONS, "iterations"), _adapted(digest))
    salted = scheme.startswith("SS") or scheme == "SMD5"
    name = (scheme[1:] if salted else scheme).lower()
    if name not in _DIGESTS:
        raise BadHash("the {…} hash is of no known kind; there are {SSHA…}, {SHA…}, {SMD5}, {MD5}, {CRYPT} of bcrypt")
    data = _base64(rest, "{…}")
    size = hashlib.new(_DIGESTS[name], usedforsecurity=False).digest_size
    if len(data) < size or (len(data) > size) != salted:
        raise BadHash(f"the {{{scheme}}} hash is damaged")
    return _digest(_DIGESTS[name], b"", data[size:], data[:size])


_READERS: tuple[tuple[str, str, Callable[[str], Check]], ...] = (
    ("$argon2", "argon2", _read_argon2),
    ("argon2$argon2", "argon2", lambda text: _read_argon2(text.removeprefix("argon2"))),
    ("$2", "bcrypt", _read_bcrypt),
    ("bcrypt$$2", "bcrypt", lambda text: _read_bcrypt(text.removeprefix("bcrypt$"))),
    ("bcrypt_sha256$$2", "bcrypt", lambda text: _read_bcrypt_sha256(text.removeprefix("bcrypt_sha256$"))),
    ("$7$", "pbkdf2", _read_mosquitto),
    ("$6$", "sha512", _read_mosquitto),
    ("PBKDF2$", "pbkdf2", _read_go_auth),
    ("pbkdf2_", "pbkdf2", _read_django_pbkdf2),
    ("pbkdf2:", "pbkdf2", _read_werkzeug),
    ("$pbkdf2-", "pbkdf2", _read_passlib_pbkdf2),
    ("scrypt$", "scrypt", _read_django_scrypt),
    ("scrypt:", "scrypt", _read_werkzeug),
    ("$scrypt$", "scrypt", _read_passlib_scrypt),
    ("{SSHA", "ldap", _read_ldap),
    ("{SHA", "ldap", _read_ldap),
    ("{SMD5}", "ldap", _read_ldap),
    ("{MD5}", "ldap", _read_ldap),
    ("{PBKDF2", "pbkdf2", _read_ldap),
    ("{ARGON2}", "argon2", _read_ldap),
    ("{CRYPT}", "bcrypt", _read_ldap),
    ("{BCRYPT}", "bcrypt", _read_ldap),
)
_PREFIXES = tuple(prefix for prefix, _, _ in _READERS)


def _pbkdf2(mac: str, salt: bytes, iterations: int, digest: bytes) -> Check:
    size = hashlib.new(mac, usedforsecurity=False).digest_size
    if not 8 <= len(digest) <= MAX_DIGEST:
        raise BadHash(f"a PBKDF2 digest of {len(digest)} bytes; there are 8 to {MAX_DIGEST}")
    if not 1 <= iterations * -(-len(digest) // size) <= MAX_ITERATIONS:
        raise BadHash(f"the number of iterations is not between 1 and {MAX_ITERATIONS}")

    def check(password: bytes) -> bool:
        found = hashlib.pbkdf2_hmac(mac, password, salt, iterations, len(digest))
        # HMAC takes "secret" and "secret\0" for the same key
        return hmac.compare_digest(found, digest) and b"\0" not in password

    return check


def _scrypt(salt: bytes, cost: str, block: str, lanes: str, digest: bytes) -> Check:
    n, r, p = _number(cost, 1 << 24, "N"), _number(block, 1 << 10, "r"), _number(lanes, MAX_LANES, "p")
    memory = 128 * n * r
    if n < 2 or n & (n - 1):
        raise BadHash("scrypt's N is not a power of two")
    if memory > MAX_MEMORY_KIB * 1024:
        raise BadHash(f"scrypt with {memory // 1024} KiB of memory; at most {MAX_MEMORY_KIB} are spent on one login")
    if not 8 <= len(digest) <= MAX_DIGEST:
        raise BadHash(f"a scrypt digest of {len(digest)} bytes; there are 8 to {MAX_DIGEST}")
    limit = memory + 128 * r * (p + 2) + (1 << 20)

    def check(password: bytes) -> bool:
        found = hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=limit, dklen=len(digest))
        return hmac.compare_digest(found, digest) and b"\0" not in password

    return check


def _digest(name: str, prefix: bytes, suffix: bytes, digest: bytes) -> Check:
    def check(password: bytes) -> bool:
        found = hashlib.new(name, prefix + password + suffix, usedforsecurity=False).digest()
        return hmac.compare_digest(found, digest)

    return check


def _number(text: str, most: int, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or not 1 <= int(text) <= most:
        raise BadHash(f"the number of {what} is not between 1 and {most}")
    return int(text)


def _base64(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadHash(f"the {kind} hash is damaged") from None


def _adapted(text: str, kind: str = "pbkdf2") -> bytes:
    """passlib's base64: a dot for the plus, no padding."""
    return _base64(text.replace(".", "+"), kind)


def _hex(text: str, what: str) -> bytes:
    try:
        return binascii.unhexlify(text)
    except (binascii.Error, ValueError):
        raise BadHash(f"{what} is not hexadecimal") from None


# columns of a database ------------------------------------------------------------------------------------------------

_FORMS = (
    'write plain, md5, sha, sha256 or sha512, with the salt before it ("salt,sha256") or after it ("sha256,salt"), '
    '"pbkdf2,MAC,ITERATIONS,LENGTH", bcrypt, argon2id, scrypt or auto'
)


class Form(CompiledText):
    """How the columns `password` and `salt` of a table are made: EMQ's ``hash``, ``salt,hash``, ``hash,salt``,
    ``pbkdf2,MAC,ITERATIONS,LENGTH`` (with commas or colons), EMQX 5's table ``{name = …}``. ValueError if it is none.
    """

    __slots__ = ("iterations", "length", "mac", "name", "salt")
    expected = _FORMS
    json_schema: ClassVar[dict[str, Any]] = {
        "anyOf": [{"type": "string"}, {"type": "object"}],
        "examples": ["salt,sha256", "bcrypt", "auto"],
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        parts = [part.strip() for part in re.split("[,:]", text)]
        self.salt: str | None = None
        self.mac, self.iterations, self.length = "", 0, 0
        if parts[0] == "pbkdf2" or (parts[0] == "salt" and parts[1:2] == ["pbkdf2"]):
            self._read_pbkdf2(parts[parts.index("pbkdf2") + 1 :])
            return
        if "salt" in parts[:2] and len(parts) == 2:
            self.salt = "prefix" if parts[0] == "salt" else "suffix"
            parts.remove("salt")
        name = parts[0] if len(parts) == 1 else ""
        self.name = {"sha1": "sha", "argon2id": "argon2", "argon2i": "argon2"}.get(name, name)
        if self.name == "bcrypt":
            self.salt = None  # it is a part of the hash
        known = self.name in _DIGESTS or (self.name in ("plain", "bcrypt", "argon2", "scrypt", "auto"))
        if not known or (self.salt is not None and self.name not in _DIGESTS):
            raise ValueError(f"{text!r} is no form of a password; {_FORMS}")

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """EMQX 5's ``password_hash_algorithm``: name, and what belongs to it."""
        fields = dict(table)
        name = fields.pop("name", None)
        if name == "pbkdf2":
            mac, iterations = fields.pop("mac_fun", None), fields.pop("iterations", None)
            length = fields.pop("dk_length", None)
            parts = [name, mac, iterations] + ([] if length is None else [length])
            text = ",".join(map(str, parts))
        else:
            position = fields.pop("salt_position", "disable" if name in ("plain", "bcrypt") else "prefix")
            texts = {"prefix": f"salt,{name}", "suffix": f"{name},salt", "disable": f"{name}"}
            if position not in texts:
                raise ValueError(f"salt_position is prefix, suffix or disable, not {position!r}")
            fields.pop("salt_rounds", None)  # of new hashes; a stored one says it itself
            text = texts[position]
        if fields:
            raise ValueError(f"{sorted(fields)[0]} does not belong to {name}")
        return cls(text)

    @property
    def weak(self) -> str:
        """What an operator should know about this form; empty: nothing."""
        if self.name == "plain":
            return "passwords are stored as they are"
        if self.name in ("md5", "sha") or (self.name in _DIGESTS and self.salt is None):
            return f"passwords stored as {self.text} are guessed by the million a second"
        return ""

    def read(self, stored: object, salt: object = None) -> Hash:
        """The hash in a row. A value that says itself what it is counts as that, so that a table may hold old and new
        ones (of plain passwords only argon2id). Raises BadHash."""
        if not isinstance(stored, (str, bytes)) or not stored:
            raise BadHash("there is no password in the row")
        try:
            text = stored if isinstance(stored, str) else stored.decode()
        except UnicodeDecodeError:
            raise BadHash("the password in the row is no text; digests are stored in hexadecimal") from None
        if self.name == "plain":
            if _ARGON2.fullmatch(text):
                return Hash(text)
            secret = text.encode()
            return Hash.of("plain", lambda password: hmac.compare_digest(password, secret), quick=True)
        if self.name not in _DIGESTS and self.name != "pbkdf2":
            return Hash(text)
        if describes_itself(text):
            return Hash(text)
        digest = _hex(text.strip(), "the password in the row")
        grain = _bytes(salt)
        if self.name == "pbkdf2":
            if not grain:
                raise BadHash("pbkdf2 needs a salt, and there is none in the row")
            if self.length and len(digest) != self.length:
                raise BadHash(f"the password in the row is not a pbkdf2 digest of {self.length} bytes")
            return Hash.of("pbkdf2", _pbkdf2(self.mac, grain, self.iterations, digest))
        name = _DIGESTS[self.name]
        if len(digest) != hashlib.new(name, usedforsecurity=False).digest_size:
            raise BadHash(f"the password in the row is not a {self.name} digest")
        before = grain if self.salt == "prefix" else b""
        after = grain if self.salt == "suffix" else b""
        return Hash.of(self.name, _digest(name, before, after, digest), quick=True)

    def sample(self) -> Hash:
        """A hash of this form that no password has, to spend the time of a check on."""
        if self.name == "pbkdf2":
            size = self.length or hashlib.new(self.mac, usedforsecurity=False).digest_size
            return self.read("00" * size, "salt")
        if self.name == "bcrypt":
            return Hash("$2b$10$" + "." * 53)
        if self.name == "scrypt":
            return Hash("scrypt:32768:8:1$salt$" + "00" * 64)
        if self.name == "plain" or self.name in _DIGESTS:
            return Hash.of(self.name, _digest("sha256", b"", b"", b""), quick=True)
        return Hash(f"$argon2id$v=19$m={MEMORY_KIB},t={PASSES},p={LANES}${'A' * 22}${'A' * 43}")

    def _read_pbkdf2(self, parts: list[str]) -> None:
        self.name, self.salt = "pbkdf2", "prefix"
        numbers = parts[1:]
        good = parts and parts[0] in _MACS and len(numbers) in (1, 2) and all(n.isdecimal() for n in numbers)
        if not good:
            macs = ", ".join(_MACS)
            raise ValueError(f"{self.text!r}: pbkdf2 is written pbkdf2,MAC,ITERATIONS,LENGTH; MAC is one of {macs}")
        self.mac = _MACS[parts[0]]
        self.iterations, self.length = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
        if not 1 <= self.iterations <= MAX_ITERATIONS or not (self.length == 0 or 8 <= self.length <= MAX_DIGEST):
            raise ValueError(f"{self.text!r}: up to {MAX_ITERATIONS} iterations, 8 to {MAX_DIGEST} bytes")

    @classmethod
    def _validate(cls, value: object) -> Self:
        return cls.of(value) if isinstance(value, Mapping) else super()._validate(value)


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    return b"" if value is None else str(value).encode()


# work -----------------------------------------------------------------------------------------------------------------


class Verifier:
    """A few threads that verify and hash; the work of more logins waits, but not longer than a login may take."""

    def __init__(self, threads: int = 4) -> None:
        self._count = min(threads, os.cpu_count() or 1)  # more would take processors from the loop and hash no faster
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="password")
        self._pending = 0
        self._took = 0.0
        """Seconds of the last verification, the wait for a processor included."""

    async def verify(self, hash: Hash, password: bytes) -> bool:
        """Whether this is the password. Cancelled work that has not begun is not done. Raises Busy when that would take
        too long, because too many wait already."""
        if hash.quick:
            return hash.verify(password)
        if self._pending >= self._count and self._pending * self._took / self._count > PATIENCE:
            raise Busy(f"{self._pending} passwords are being verified, {self._took:.2f} s each")
        self._pending += 1
        try:
            latest = time.monotonic() + PATIENCE
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._timed, hash, password, latest)
        finally:
            self._pending -= 1

    def _timed(self, hash: Hash, password: bytes, latest: float) -> bool:
        began = time.monotonic()
        if began > latest:  # the last one was no measure: somebody else took the processors
            raise Busy(f"more passwords are being verified than {PATIENCE:g} s are enough for")
        try:
            return hash.verify(password)
        finally:
            self._took = time.monotonic() - began

    async def hash(self, password: bytes) -> str:
        """A new argon2id hash. Raises ValueError for an empty password."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, hash_password, password)

    def close(self) -> None:
        """Drop what waits; does not wait for what runs."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def hash_password(password: str | bytes, scheme: str = "argon2id") -> str:
    """A new hash as one line of text: argon2id, bcrypt, or mosquitto's ``sha512-pbkdf2`` (``$7$``)."""
    secret = password.encode() if isinstance(password, str) else password
    if not secret:
        raise ValueError("an empty password cannot log in")
    if scheme == "argon2id":
        return argon2.PasswordHasher(time_cost=PASSES, memory_cost=MEMORY_KIB, parallelism=LANES).hash(secret)
    if scheme == "bcrypt":
        if len(secret) > BCRYPT_BYTES or b"\0" in secret:
            raise ValueError(f"bcrypt takes at most {BCRYPT_BYTES} bytes without NUL; use argon2id")
        return bcrypt.hashpw(secret, bcrypt.gensalt(12)).decode()
    if scheme in ("pbkdf2", "sha512-pbkdf2"):
        salt = os.urandom(12)
        digest = hashlib.pbkdf2_hmac("sha512", secret, salt, 210_000, 64)
        return f"$7$210000${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
    raise ValueError(f"{scheme!r} is not a way to hash here; there are argon2id, bcrypt and sha512-pbkdf2")
