"""Refuses clients by what they did: wrong passwords, coming and going, too many at once. Bans are looked at here too.

Nothing here asks a backend or waits. Everything counted is bounded: `TRACKED` keys of each sort, the one that was heard
of longest ago is forgotten first.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from broker.access.addresses import Networks, parse_address, parse_network, site_of
from broker.access.bans import Bans
from broker.access.chain import Decision
from broker.config.models import AccessConfig
from broker.runtime.logs import limited

logger = logging.getLogger(__name__)

NOT_AUTHORIZED = 0x87
BANNED = 0x8A
MESSAGE_RATE = 0x96
QUOTA_EXCEEDED = 0x97
RATE_EXCEEDED = 0x9F

TRACKED = 16_384
"""Users, addresses and clients about which something is remembered, of each sort."""
LONGEST_NAME = 256
"""Characters of a name that is remembered; nothing is counted about longer ones."""
SHARED = 10
"""How many clients' worth of denials one user and one address may cause: else many client ids would be many limits."""

Key = tuple[str | None, str | None]


class Jail:
    """Counts what happens under a key; too often within the window, and the key is locked up for a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = 0
        """Times within the window that are too often; 0: nothing is counted."""
        self._clock = clock
        self._window = self._ban = 0.0
        self._times: dict[Key, array[float]] = {}
        self._locked: dict[Key, float] = {}

    def configure(self, limit: int, window: float, ban: float) -> None:
        """New values; who is locked up stays so for the old time, unless nothing is counted any more."""
        self.limit, self._window, self._ban = limit, window, ban
        self._times.clear()
        if not limit:
            self._locked.clear()

    def note(self, key: Key) -> bool:
        """It happened once more; whether that was once too often."""
        if not self.limit or key in self._locked or max(map(len, filter(None, key)), default=0) > LONGEST_NAME:
            return False
        now = self._clock()
        times = array("d", (at for at in self._times.pop(key, ()) if at > now - self._window))
        times.append(now)
        if len(times) < self.limit:
            _bounded(self._times)[key] = times
            return False
        _bounded(self._locked)[key] = now + self._ban
        return True

    def holds(self, key: Key) -> bool:
        """Whether this key is locked up."""
        until = self._locked.get(key)
        if until is None:
            return False
        if self._clock() < until:
            return True
        del self._locked[key]
        return False

    def forget(self, key: Key) -> None:
        """What has been counted under the key counts no more."""
        self._times.pop(key, None)

    def release(self, first: str | None = None, second: str | None = None) -> int:
        """Set free every key with this first or second half; returns how many were locked up."""

        def meant(key: Key) -> bool:
            return (first is not None and key[0] == first) or (second is not None and key[1] == second)

        for key in [key for key in self._times if meant(key)]:
            del self._times[key]
        keys = [key for key in self._locked if meant(key) and self.holds(key)]
        for key in keys:
            del self._locked[key]
        return len(keys)

    def rows(self) -> Iterator[tuple[Key, float]]:
        """Who is locked up, and for how many seconds still."""
        now = self._clock()
        self.expire()
        for key, until in self._locked.items():
            yield key, until - now

    @property
    def counting(self) -> bool:
        """Whether something has been counted."""
        return bool(self._times)

    def expire(self) -> None:
        """Set free those whose time is over."""
        now = self._clock()
        for key in [key for key, until in self._locked.items() if until <= now]:
            del self._locked[key]

    def __len__(self) -> int:
        """How many are locked up."""
        return len(self._locked)


class Rate:
    """How often a second something may happen under a key, on average over a window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = 0.0
        self._most = 0.0
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def configure(self, rate: float, window: float) -> None:
        """`rate` a second, 0 for no limit."""
        self.rate, self._most = rate, max(1.0, rate * window)
        self._left.clear()

    def take(self, key: str) -> bool:
        """Once more: whether it may."""
        now = self._clock()
        left, at = self._left.pop(key, (self._most, now))
        left = min(self._most, left + (now - at) * self.rate)
        may = left >= 1.0
        _bounded(self._left)[key] = (left - 1.0 if may else left, now)
        return may


class Places:
    """Who is connected under a key, up to a limit."""

    def __init__(self) -> None:
        self.limit = 0
        self._taken: dict[str, dict[str, Any]] = {}

    def configure(self, limit: int) -> None:
        """So many, 0 for no limit. Who was connected before there was one is not counted."""
        self.limit = limit
        if not limit:
            self._taken.clear()

    def full(self, key: str, clientid: str) -> bool:
        """Whether one client more is too many; one that takes over its own connection is not one more."""
        taken = self._taken.get(key)
        if taken is None or len(taken) < self.limit or clientid in taken:
            return False
        for gone in [client for client, channel in taken.items() if channel.link is None]:
            del taken[gone]  # it ended while its session was being written down, which nobody is told
        return len(taken) >= self.limit

    def take(self, key: str, clientid: str, channel: Any) -> None:
        """This client is connected."""
        self._taken.setdefault(key, {})[clientid] = channel

    def leave(self, key: str, clientid: str, channel: Any) -> None:
        """This connection of the client has ended."""
        taken = self._taken.get(key)
        if taken is not None and taken.get(clientid) is channel:
            del taken[clientid]
            if not taken:
                del self._taken[key]


class Protection:
    """What the gate asks besides the backends. `armed` tells whether `before` could refuse anybody, `counts` whether
    `after` and `admitted` have anything to do; a broker without bans and limits looks at these two and no further."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.armed = False
        self.counts = False
        self.counters: Counter[str] = Counter()
        self.bans = Bans(clock, self._rearm)
        self._logins = Jail(clock)
        """(user, address)"""
        self._addresses = Jail(clock)
        """(None, address)"""
        self._users = Jail(clock)
        """(user, None)"""
        self._flapping = Jail(clock)
        """(user, client id)"""
        self._connects_by_address = Rate(clock)
        self._connects_by_user = Rate(clock)
        self._denials = Rate(clock)
        """By client id."""
        self._denials_by_user = Rate(clock)
        self._denials_by_address = Rate(clock)
        self._places_by_address = Places()
        self._places_by_user = Places()
        self._exempt: Networks[bool] = Networks()
        self._config = AccessConfig()
        self._jailed = limited(logger, "somebody is refused for a while")
        self._denied = limited(logger, "a client tries what it has no right to")

    def configure(self, access: AccessConfig) -> None:
        """Put `[access]` into force. What did not change keeps its counts."""
        old, self._config = self._config, access
        if access.exempt != old.exempt:
            self._exempt = Networks()
            for text in access.exempt:
                self._exempt[parse_network(text)] = True
        lockout = access.lockout
        times = lockout.window_time, lockout.ban_time
        if lockout != old.lockout or not self._logins.limit:
            self._logins.configure(lockout.max_failures, *times)
            self._addresses.configure(lockout.max_failures_per_address, *times)
            self._users.configure(lockout.max_failures_per_user, *times)
        flapping = access.flapping_detect
        if flapping != old.flapping_detect:
            limit = flapping.max_count if flapping.enable else 0
            self._flapping.configure(limit, flapping.window_time, flapping.ban_time)
        quota = access.quota
        if quota != old.quota:
            self._places_by_user.configure(quota.max_connections_per_user)
            self._places_by_address.configure(quota.max_connections_per_address)
            self._connects_by_user.configure(quota.connect_rate_per_user, quota.rate_window)
            self._connects_by_address.configure(quota.connect_rate_per_address, quota.rate_window)
        if access.deny_rate != self._denials.rate:
            self._denials.configure(access.deny_rate, 1.0)
            self._denials_by_user.configure(SHARED * access.deny_rate, 1.0)
            self._denials_by_address.configure(SHARED * access.deny_rate, 1.0)
        self._rearm()

    # the gate asks ----------------------------------------------------------------------------------------------------

    def before(self, clientid: str, username: str | None, host: str) -> Decision | None:
        """The refusal of a CONNECT, before any backend is asked; None: go on."""
        refusal = self.standing(clientid, username, host)
        if refusal is not None:
            return refusal
        site = self._site(host)
        if site is None:
            return None
        if self._connects_by_address.rate and not self._connects_by_address.take(site):
            return self._refuse(RATE_EXCEEDED, "connect_rate_per_address", f"too many CONNECTs a second from {site}")
        if self._places_by_address.limit and self._places_by_address.full(site, clientid):
            return self._refuse(
                QUOTA_EXCEEDED, "max_connections_per_address", f"{site} has all connections it may have"
            )
        return None

    def standing(self, clientid: str, username: str | None, host: str) -> Decision | None:
        """The part of `before` that counts nothing: whether this client is banned or locked out. Asked again when a
        backend has answered, for meanwhile it may have become so."""
        if self.bans:
            ban = self.bans.find(clientid, username, host)
            if ban is not None:
                return self._refuse(BANNED, "banned", str(ban))
        if self._logins or self._addresses or self._users:
            site = self._site(host)
            locked = (
                self._logins.holds((username, site))
                or (site is not None and self._addresses.holds((None, site)))
                or self._users.holds((username, None))
            )
            if locked:
                return self._refuse(BANNED, "locked_out", "locked out after too many wrong passwords")
        if self._flapping and self._flapping.holds((username, clientid)):
            return self._refuse(BANNED, "flapping", "it comes and goes too often")
        return None

    def after(self, clientid: str, username: str | None, host: str) -> Decision | None:
        """The refusal of a client whose user name has been proved; None: let it in."""
        if username is None:
            return None
        if self._logins.limit:
            self._logins.forget((username, self._site(host)))
        if self._connects_by_user.rate and not self._connects_by_user.take(username):
            return self._refuse(RATE_EXCEEDED, "connect_rate_per_user", "too many logins of this user a second")
        if self._places_by_user.limit and self._places_by_user.full(username, clientid):
            return self._refuse(QUOTA_EXCEEDED, "max_connections_per_user", "its user has all connections it may have")
        return None

    def failed(self, username: str | None, host: str) -> None:
        """A wrong password, or an unknown user: which of them is told to nobody."""
        site = self._site(host)
        newly: list[str] = []
        if username is not None and site is not None and self._logins.note((username, site)):
            newly.append(f"user {shown(username)!r} from {site}")
        if site is not None and self._addresses.note((None, site)):
            newly.append(f"everybody from {site}")
        if username is not None and self._users.note((username, None)):
            newly.append(f"user {shown(username)!r}")
        for who in newly:
            self.counters["lockouts"] += 1
            self._jailed.warning(
                "%s is refused for %.0f s after too many wrong passwords", who, self._config.lockout.ban_time
            )
        self._rearm()

    def admitted(self, principal: Any, channel: Any) -> None:
        """A client was let in, and has a session unless the engine found something against it."""
        if not (self._places_by_user.limit or self._places_by_address.limit):
            return
        if channel.session is None or channel.link is None:
            return
        if self._places_by_user.limit and principal.username is not None:
            self._places_by_user.take(principal.username, principal.clientid, channel)
        if self._places_by_address.limit:
            site = self._site(channel.peerhost)
            if site is not None:
                self._places_by_address.take(site, principal.clientid, channel)

    def denied(self, principal: Any, peer: str) -> int | None:
        """What follows for a client that was denied something: the reason code to disconnect it with, 0 for nothing,
        None to leave what it sends alone for a while."""
        access = self._config
        if access.deny_action == "disconnect":
            self.counters["denied_disconnects"] += 1
            self._denied.warning(
                "client %r (user %r) from %s is disconnected for what it has no right to (deny_action)",
                principal.clientid, shown(principal.username), peer,
            )  # fmt: skip
            return NOT_AUTHORIZED
        if not access.deny_rate or self._may_be_denied(principal, peer):
            return 0
        throttle = access.deny_rate_action == "throttle"
        self.counters["denied_throttles" if throttle else "denied_disconnects"] += 1
        then = "not read for a while" if throttle else "disconnected"
        self._denied.warning(
            "client %r (user %r) from %s is %s: over %g denials a second, or %g of its user or address (deny_rate)",
            principal.clientid, shown(principal.username), peer, then, access.deny_rate, SHARED * access.deny_rate,
        )  # fmt: skip
        return None if throttle else MESSAGE_RATE

    def disconnected(self, channel: Any) -> None:
        """The engine tells the end of every connection that had a session."""
        principal = channel.principal
        if principal is None or principal.privileged:
            return
        if self._places_by_user.limit and principal.username is not None:
            self._places_by_user.leave(principal.username, principal.clientid, channel)
        if self._places_by_address.limit:
            site = self._site(channel.peerhost)
            if site is not None:
                self._places_by_address.leave(site, principal.clientid, channel)
        if self._flapping.limit and self._flapping.note((principal.username, principal.clientid)):
            self.counters["flapping_bans"] += 1
            self._jailed.warning(
                "client %r (user %r) from %s is refused for %.0f s: it comes and goes too often",
                principal.clientid, shown(principal.username), channel.peer, self._config.flapping_detect.ban_time,
            )  # fmt: skip
            self._rearm()

    # the operator asks ------------------------------------------------------------------------------------------------

    def locked(self) -> list[dict[str, Any]]:
        """Who is refused for a while, and why, as `isthmus ban list` shows it."""
        rows: list[dict[str, Any]] = []
        for jail in (self._logins, self._addresses, self._users):
            for (user, site), left in jail.rows():
                rows.append({"user": shown(user), "address": site, "left_s": round(left, 1), "by": "lockout"})
        for (user, clientid), left in self._flapping.rows():
            rows.append({"client": clientid, "user": shown(user), "left_s": round(left, 1), "by": "flapping"})
        self._rearm()
        return rows

    def release(self, kind: str, name: str) -> int:
        """Set free who is refused for a while; returns how many were."""
        if kind == "client":
            count = self._flapping.release(second=name)
        elif kind == "user":
            count = sum(jail.release(first=name) for jail in (self._logins, self._users, self._flapping))
        else:
            address = parse_address(name.partition("/")[0])
            site = site_of(address) if address is not None else name
            count = sum(jail.release(second=site) for jail in (self._logins, self._addresses))
        self._rearm()
        return count

    def status(self) -> dict[str, Any]:
        """For `isthmus status`: how many are refused at present, and what was counted since the start."""
        for jail in (self._logins, self._addresses, self._users, self._flapping):
            jail.expire()
        self.bans.expire()
        self._rearm()
        return {
            "bans": len(self.bans),
            "locked_out": len(self._logins) + len(self._addresses) + len(self._users),
            "flapping": len(self._flapping),
            "refused": {name: self.counters[name] for name in _REFUSALS if self.counters[name]},
            "lockouts": self.counters["lockouts"],
            "flapping_bans": self.counters["flapping_bans"],
            "denied_disconnects": self.counters["denied_disconnects"],
            "denied_throttles": self.counters["denied_throttles"],
        }

    # inside -----------------------------------------------------------------------------------------------------------

    def _may_be_denied(self, principal: Any, peer: str) -> bool:
        """Once more: whether that is within the rates of the client, its user and its address, each of which counts."""
        within = self._denials.take(principal.clientid)
        if principal.username is not None and not self._denials_by_user.take(principal.username):
            within = False
        site = self._site(peer.rpartition(":")[0])
        if site is not None and not self._denials_by_address.take(site):
            within = False
        return within

    def _rearm(self) -> None:
        quotas = self._config.quota
        self.armed = bool(
            self.bans or self._logins or self._addresses or self._users or self._flapping
            or quotas.connect_rate_per_address or quotas.max_connections_per_address
        )  # fmt: skip
        self.counts = self.armed or bool(
            self._logins.counting or quotas.max_connections_per_user or quotas.connect_rate_per_user
        )

    def _site(self, host: str) -> str | None:
        """Under what an address is counted; None when it is not: it is none, or exempt."""
        address = parse_address(host)
        if address is None or (self._exempt and any(self._exempt.find(address))):
            return None
        return site_of(address)

    def _refuse(self, code: int, counter: str, reason: str) -> Decision:
        self.counters[counter] += 1
        return Decision(code, reason)


_REFUSALS = (
    "banned", "locked_out", "flapping", "connect_rate_per_address", "max_connections_per_address",
    "connect_rate_per_user", "max_connections_per_user",
)  # fmt: skip


def shown(username: str | None) -> str | None:
    """A user name as it may be logged: some clients give a token as theirs."""
    return "(a token)" if username is not None and username.startswith("eyJ") else username


def _bounded(table: dict[Any, Any]) -> dict[Any, Any]:
    """The table with room for one more."""
    if len(table) >= TRACKED:
        del table[next(iter(table))]
    return table
