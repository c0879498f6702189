"""Remembers verdicts for a while. Never errors, never longer than from the moment they were given."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import time
from collections.abc import Callable

from broker.extend.auth import Answer, Client, Grant, Verdict

SIZE = 100_000
"""Verdicts one backend's cache holds; the oldest goes first."""
_LENGTH = struct.Struct(">Q").pack
_NONE = b"\xff" * 8
"""In place of a length: there is no such field."""


class Entry:
    """One verdict and the monotonic times until which it is good, and good when the backend fails."""

    __slots__ = ("answer", "expires", "stale", "username")

    def __init__(self, answer: Answer, expires: float, stale: float, username: str | None) -> None:
        self.answer = answer
        self.expires = expires
        self.stale = stale
        self.username = username


class Cache:
    """Verdicts by a keyed digest of everything they depend on; no password is kept, in any form that can be tried
    outside this process."""

    def __init__(
        self, ttl: float, negative_ttl: float, stale: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ttl = ttl
        self.negative_ttl = negative_ttl
        self.stale = stale
        self._clock = clock
        self._secret = os.urandom(32)
        self._entries: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, client: Client, password: bytes, *, by_address: bool = False) -> bytes:
        """Digest over length-prefixed fields: no two different logins share one, however the text is cut."""
        fields = [client.listener, client.username, client.clientid, client.peerhost if by_address else None]
        for name in sorted(client.certificate):
            fields += (name, client.certificate[name])
        parts: list[bytes] = []
        for field in fields:
            if field is None:
                parts.append(_NONE)
            else:
                data = field.encode("utf-8", "surrogatepass")
                parts += (_LENGTH(len(data)), data)
        parts += (_LENGTH(len(password)), password)
        return hashlib.blake2b(b"".join(parts), key=self._secret, digest_size=24).digest()

    def get(self, key: bytes) -> Answer | None:
        """The verdict, when it is still good."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = self._clock()
        if now < entry.expires:
            return entry.answer
        if now >= entry.stale:
            del self._entries[key]
        return None

    def get_stale(self, key: bytes) -> Answer | None:
        """A permission that may still be used because the backend fails (`stale_if_error`)."""
        entry = self._entries.get(key)
        return entry.answer if entry is not None and self._clock() < entry.stale else None

    def put(self, key: bytes, answer: Answer, username: str | None) -> None:
        """Remember a verdict, from now."""
        positive = answer is Verdict.ALLOW or isinstance(answer, Grant)
        ttl = self.ttl * random.uniform(0.9, 1.1) if positive else self.negative_ttl
        stale = self.stale if positive else 0.0
        if isinstance(answer, Grant) and answer.expires_at is not None:
            left = answer.expires_at - time.time()
            ttl, stale = min(ttl, left), min(stale, left)
        self._entries.pop(key, None)
        if ttl <= 0 and stale <= 0:
            return
        now = self._clock()
        if len(self._entries) >= SIZE:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = Entry(answer, now + ttl, now + stale, username)

    def purge(self, username: str | None = None) -> int:
        """Forget every verdict about one user name (None: all); returns how many."""
        if username is None:
            count = len(self._entries)
            self._entries.clear()
            return count
        keys = [key for key, entry in self._entries.items() if entry.username == username]
        for key in keys:
            del self._entries[key]
        return len(keys)
