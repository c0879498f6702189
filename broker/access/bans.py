"""Who an operator has banned: client ids, user names, addresses and networks. Kept in the store, over restarts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from broker.access.addresses import Network, Networks, parse_address, parse_network, spelled
from broker.extend.auth import Identity

logger = logging.getLogger(__name__)

Kind = Literal["client", "user", "address"]

KINDS: tuple[Kind, ...] = ("client", "user", "address")
MOST = 100_000
"""Bans at the same time."""
LONGEST_NAME = 4_096
"""Bytes of a name that can be banned."""
LONGEST_REASON = 500
PREFIX = b"ban/"
"""Keys of the store's table that are bans: ``ban/KIND/NAME``."""


class BanError(ValueError):
    """This cannot be banned; the text says why."""


class Store(Protocol):
    """The key-value table of what survives a restart, and its clock, which no jump of the wall clock moves."""

    values: dict[bytes, bytes]

    def put_value(self, key: bytes, value: bytes, callback: Callable[[bool], None] | None = None) -> None:
        """Set an entry; an empty value removes it. `callback` hears whether it is on disk."""

    def clock_ms(self) -> int:
        """Milliseconds."""


@dataclass(frozen=True, slots=True)
class Ban:
    """One ban. `until` is monotonic seconds, 0 for ever; `since` is Unix time, to be shown."""

    kind: Kind
    name: str
    reason: str
    since: float
    until: float

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} is banned" + (f" ({self.reason})" if self.reason else "")


class Bans:
    """Every ban in force. `changed` is called whenever the first came or the last went."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, changed: Callable[[], object] = bool) -> None:
        self._clock = clock
        self._changed = changed
        self._store: Store | None = None
        self._names: dict[tuple[str, str | None], Ban] = {}
        self._networks: Networks[Ban] = Networks()
        self._next = 0.0
        """When to look for bans that are over; 0: never."""

    def __len__(self) -> int:
        return len(self._names)

    def keep(self, store: Store) -> None:
        """Take what the store holds, and tell it of changes from now on."""
        self._store = store
        now, clock = self._clock(), store.clock_ms()
        for key, value in [(key, value) for key, value in store.values.items() if key.startswith(PREFIX)]:
            ban = _read(key, value, now, clock)
            if ban is None:
                logger.error("the store holds a ban that cannot be read, it is not in force: %r", key[:100])
            elif ban.until and ban.until <= now:
                store.put_value(key, b"")
            else:
                self._put(ban)

    def add(
        self,
        kind: Kind,
        name: str,
        *,
        seconds: float = 0.0,
        reason: str = "",
        stored: Callable[[bool], None] | None = None,
    ) -> Ban:
        """Ban from now on, for `seconds` or (0) for ever; one that is banned already is banned anew. `stored` hears
        whether it survives a restart. Raises BanError."""
        self.expire()
        name = _checked(kind, name)
        if len(self._names) >= MOST and (kind, name) not in self._names:
            raise BanError(f"there are {MOST} bans already; ban a network, or lift some")
        if len(reason) > LONGEST_REASON or not reason.isprintable():
            raise BanError(f"a reason is one line of at most {LONGEST_REASON} characters")
        ban = Ban(kind, name, reason, time.time(), self._clock() + seconds if seconds else 0.0)
        self._put(ban)
        if self._store is not None:
            self._store.put_value(_key(kind, name), self._value(ban, self._store), stored)
        elif stored is not None:
            stored(False)
        return ban

    def remove(self, kind: Kind, name: str, stored: Callable[[bool], None] | None = None) -> Ban | None:
        """Lift a ban; None when there is none. Raises BanError for a name that cannot be banned."""
        self.expire()
        ban = self._drop((kind, _checked(kind, name)))
        if ban is not None and self._store is not None:
            self._store.put_value(_key(kind, ban.name), b"", stored)
        elif stored is not None:
            stored(ban is not None)
        return ban

    def list(self) -> list[Ban]:
        """Those in force, oldest first."""
        self.expire()
        return sorted(self._names.values(), key=lambda ban: ban.since)

    def find(self, clientid: str, username: str | None, host: str) -> Ban | None:
        """The ban that hits this client, if one does."""
        now = self._clock()
        if self._next and now >= self._next:
            self.expire()
        for key in (("client", clientid), ("user", username)):
            found = self._names.get(key)
            if found is not None and (not found.until or now < found.until):
                return found
        return self.find_address(host) if self._networks else None

    def hits(self, client: Identity) -> bool:
        """Whether a ban hits this client."""
        return self.find(client.clientid, client.username, client.peerhost) is not None

    def find_address(self, host: str) -> Ban | None:
        """The ban that hits everybody at this address, if one does."""
        address = parse_address(host)
        if address is None:
            return None
        now = self._clock()
        return next((ban for ban in self._networks.find(address) if not ban.until or now < ban.until), None)

    def expire(self) -> None:
        """Forget those that are over, in the store too."""
        now = self._clock()
        if not self._next or now < self._next:
            return
        for key, ban in list(self._names.items()):
            if ban.until and ban.until <= now:
                self._drop(key)
                if self._store is not None:
                    self._store.put_value(_key(ban.kind, ban.name), b"")
        # at most once a second: looking through all of them for each that ends would add up
        ends = [ban.until for ban in self._names.values() if ban.until]
        self._next = max(min(ends), now + 1.0) if ends else 0.0

    def _put(self, ban: Ban) -> None:
        key = (ban.kind, ban.name)
        self._names[key] = ban
        if ban.kind == "address":
            self._networks[parse_network(ban.name)] = ban
        if ban.until:
            self._next = min(self._next or ban.until, ban.until)
        if len(self._names) == 1:
            self._changed()

    def _drop(self, key: tuple[str, str | None]) -> Ban | None:
        ban = self._names.pop(key, None)
        if ban is None:
            return None
        if ban.kind == "address":
            del self._networks[parse_network(ban.name)]
        if not self._names:
            self._changed()
        return ban

    def _value(self, ban: Ban, store: Store) -> bytes:
        until = max(1, store.clock_ms() + int((ban.until - self._clock()) * 1000)) if ban.until else 0
        return json.dumps({"until": until, "since": round(ban.since, 3), "reason": ban.reason}).encode()


def _checked(kind: Kind, name: str) -> str:
    """The name as it is compared."""
    if kind == "address":
        try:
            network: Network = parse_network(name)
        except ValueError as error:
            raise BanError(str(error)) from None
        if not network.prefixlen:
            raise BanError(f"{name} is everybody; close the listener instead")
        return spelled(network)
    if not name:
        raise BanError(f"the {kind} to ban is empty")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise BanError("the name is not UTF-8") from None
    if size > LONGEST_NAME:
        raise BanError(f"a name has at most {LONGEST_NAME} bytes")
    return name


def _key(kind: Kind, name: str) -> bytes:
    return PREFIX + kind.encode() + b"/" + name.encode()


def _read(key: bytes, value: bytes, now: float, clock: int) -> Ban | None:
    kind, _, name = key.removeprefix(PREFIX).decode("utf-8", "replace").partition("/")
    try:
        fields: Mapping[str, Any] = json.loads(value)
        until, since, reason = int(fields["until"]), float(fields["since"]), str(fields["reason"])
        for known in KINDS:
            if known == kind and _checked(known, name) == name:
                return Ban(known, name, reason, since, max(0.001, now + (until - clock) / 1000) if until else 0.0)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return None
