"""The engine's gate: who may connect, publish, subscribe and receive.

Answers at once whatever needs no backend: anonymous clients, refusals without credentials, cached verdicts, and every
question about topics. Everything else is a task that ends with exactly one `accept` or `refuse`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.access.chain import BAD_CREDENTIALS, BUSY, NOT_AUTHORIZED, UNAVAILABLE, Chain, Decision
from broker.access.guard import Guard
from broker.access.principal import Principal, Standing
from broker.access.protect import BANNED, QUOTA_EXCEEDED, RATE_EXCEEDED, Protection, shown
from broker.access.refresh import PARALLEL, Refresher
from broker.access.rules import EVERY, PUBLISH, SUBSCRIBE, SUBSCRIPTIONS, RuleSet, allowed, without_share
from broker.extend.auth import Client, Grant, Rule
from broker.runtime.logs import limited

logger = logging.getLogger(__name__)

RESERVED = "isthmus/"
"""Client ids of workers: ``isthmus/<instance>/<lane>``; only the internal listener lets them in."""
OWN_TOPICS = frozenset(("$SYS", "$dlq", "$events"))
"""First levels that need a rule of their own, whatever `no_match` says."""
HELD_BACK = 1.0
"""Seconds for which nothing is handled of a client that tries too often what is denied."""
COMPILED = 4_096
"""Compiled rule lists kept; users with the same groups share one."""

_SHARED = ("timeout", "max_concurrent", "cache_ttl", "negative_cache_ttl", "on_error")
"""Keys of `[access]` that are defaults of every backend."""

TURN = 500
"""Connections looked at in one turn of the loop after a reload."""
_EMPTY: Mapping[str, str] = {}
_NOTHING = Grant()
_NOBODY = Standing(expires_at=0.0)
"""Of a client that is being disconnected: it may do nothing."""


class AccessError(Exception):
    """The access configuration cannot be put into force; the text names the table and what to do."""


class AccessGate:
    """Built empty, it refuses everybody; `replace` gives it a configuration, the first time and at each reload."""

    def __init__(self, settings: Any = None) -> None:
        self.counters: Counter[str] = Counter()
        self.rights_changed: Callable[[str | None], Any] | None = None
        """Set by the application: the engine forgets cached rights of one client id, or of all."""
        self.kick: Callable[[str, int], Any] | None = None
        """Set by the application: closes a client's connection with a reason code."""
        self.present: Callable[[Any], bool] | None = None
        """Set by the application: whether this very principal is who is connected with its client id."""
        self.hold_back: Callable[[Any, float], Any] | None = None
        """Set by the application: leaves what a connection sends alone for so many seconds."""
        self.protection = Protection()
        self.generation = 0
        self._settings = settings
        self._allow_anonymous = False
        self._order_empty = False
        """`[access] order` is written and empty: it refuses every client."""
        self._no_match = 0
        self._instances: dict[str, tuple[Any, Guard]] = {}
        self._order: tuple[str, ...] = ()
        self._explicit = True
        self._chains: dict[tuple[str, ...] | None, Chain] = {}
        self._compiled: dict[tuple[Rule, ...], RuleSet] = {}
        self._sources: dict[tuple[RuleSet, ...], tuple[RuleSet, ...]] = {}
        self._common: dict[tuple[str, ...] | None, tuple[RuleSet, ...]] = {}
        """The sources of clients without rules of their own, by what their listener names."""
        self._standings: dict[tuple[str, tuple[str, ...] | None, str | None, bool], Standing] = {}
        """Those of clients with nothing of their own, by listener, its backends, backend and superuser."""
        self._pending: dict[Any, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._refresher = Refresher(self)
        self._on_unsafe = self._audit  # one bound method for all principals
        self._in_the_clear: set[str] = set()
        """Listeners on which passwords cross a network unencrypted and nobody has been told of it yet."""
        self._refused = limited(logger, "a client was refused")
        self._undecided = limited(logger, "a rule could not be judged")
        self._unsafe = limited(logger, "an identity that may not stand in a topic")

    # configuration --------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Any:
        """What is in force."""
        return self._settings

    async def open(self) -> None:
        """Put the settings given to the constructor into force."""
        await self.replace(self._settings)

    async def replace(self, settings: Any) -> None:
        """Open what is new or changed, then switch over at once. Raises AccessError and changes nothing when a backend
        cannot be opened."""
        fresh: dict[str, tuple[Any, Guard]] = {}
        opened: list[Guard] = []
        try:
            for name, instance in settings.auth.items():
                if not instance.enabled:
                    continue
                kept = self._instances.get(name)
                if kept is not None and _same(kept, instance, settings, self._settings):
                    fresh[name] = kept
                    continue
                guard = await open_guard(instance, settings.access)
                opened.append(guard)
                if hasattr(guard.backend, "on_change"):
                    guard.backend.on_change = functools.partial(self.flush, backend=name)
                fresh[name] = (instance, guard)
            order = settings.access.order
            names = tuple(fresh) if order is None else tuple(order)
            missing = [name for name in names if name not in fresh]
            if missing:
                raise AccessError(f"access.order: there is no [auth.{missing[0]}]")
        except BaseException:
            for guard in opened:
                await self._close_guard(guard)
            raise
        old = self._instances
        self._settings = settings
        self._instances = fresh
        self._order = names
        self._explicit = order is not None or bool(fresh)
        self._allow_anonymous = settings.access.allow_anonymous
        self._order_empty = order is not None and not order
        self._no_match = int(settings.access.no_match == "allow")
        self.protection.configure(settings.access)
        self._in_the_clear = _in_the_clear(settings)
        self._chains.clear()
        self._compiled.clear()
        self._sources.clear()
        self._common.clear()
        self._standings.clear()
        self.generation += 1
        self._refresher.changed({name for name, kept in fresh.items() if old.get(name, (None, None))[1] is not kept[1]})
        for name, (_, guard) in old.items():
            if name not in fresh or fresh[name][1] is not guard:
                task = asyncio.create_task(self._close_guard(guard))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        if self.rights_changed is not None:
            self.rights_changed(None)

    async def recheck(self, channels: Sequence[Any]) -> int:
        """After a reload: disconnect those of these connections that would be refused now, as far as that shows without
        their passwords; returns how many. The others get the rules of what their listener names now."""
        count = 0
        asked: list[Any] = []
        for number, channel in enumerate(channels, 1):
            if self._needs_asking(channel):
                asked.append(channel)
            elif (reason := self._unwelcome(channel)) is not None:
                count += 1
                self.revoke(channel, reason)
            if number % TURN == 0:
                await asyncio.sleep(0)
        places = asyncio.Semaphore(PARALLEL)
        for start in range(0, len(asked), TURN):
            again = (self._log_in_again(channel, places) for channel in asked[start : start + TURN])
            count += sum(await asyncio.gather(*again))
        return count

    def _needs_asking(self, channel: Any) -> bool:
        """Whether nobody but its connection vouched for the client when it came, and a login of it would be more than a
        look at whether anonymous clients are let in."""
        principal = channel.principal
        if principal is None or principal.privileged or principal.backend is not None:
            return False
        client = principal.client()
        return "username" in client.certificate or self.chain(channel.listener.auth).reads(client)

    async def _log_in_again(self, channel: Any, places: asyncio.Semaphore) -> bool:
        """Decide about a client without a password as at its login, now; whether it was disconnected."""
        async with places:
            principal = channel.principal
            if principal is None or principal.standing is _NOBODY:
                return False
            chain = self.chain(channel.listener.auth)
            client = principal.client()
            decision = await self._ask(client, chain, None)
            if channel.principal is not principal or principal.standing is _NOBODY:
                return False
            if decision.code:
                self.revoke(channel, decision.reason)
                return True
            if (decision.grant.username or client.username) != principal.username:
                self.revoke(channel, f"auth.{decision.backend} knows it by another name")
                return True
            if decision.backend is None and principal.auth == channel.listener.auth:
                return False  # nobody knows more of it than before
            given = self._principal(principal.clientid, principal.username, channel, client.certificate, decision)
            principal.standing = given.standing
            principal.forget()
            if self.rights_changed is not None:
                self.rights_changed(principal.clientid)
            self._refresher.watch(principal)
            return False

    def revoke(self, channel: Any, reason: str = "its certificate was revoked") -> None:
        """Disconnect a client that may not be here any more; its will is not published."""
        principal = channel.principal
        if principal is None or principal.privileged:
            return
        self.counters["revoked"] += 1
        self._refused.warning(
            "client %r (user %r) from %s is disconnected: %s",
            principal.clientid, shown(principal.username), channel.peer, reason,
        )  # fmt: skip
        principal.standing = _NOBODY
        principal.forget()
        channel.disconnect(NOT_AUTHORIZED)

    def _unwelcome(self, channel: Any) -> str | None:
        """Why a connected client would be refused now; None when it would not, or that cannot be told."""
        principal, listener = channel.principal, channel.listener
        if principal is None or principal.privileged or principal.standing is _NOBODY:
            return None
        chain = self.chain(listener.auth)
        refusal = chain.screened(principal.client())
        if refusal is not None:
            return refusal.reason
        if principal.backend is not None:
            if all(guard.name != principal.backend for guard in chain.guards):
                return f"auth.{principal.backend}, which let it in, does not decide here any more"
        elif not self._anonymous_on(listener):
            return "anonymous clients are not let in any more"
        if principal.auth != listener.auth:
            principal.standing = principal.standing.on(listener.auth)
            principal.forget()
            if self.rights_changed is not None:
                self.rights_changed(principal.clientid)
        return None

    async def close(self) -> None:
        """Drop pending answers and close every backend."""
        self._refresher.close()
        tasks = list(self._pending.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        self._pending.clear()
        instances, self._instances = self._instances, {}
        self._chains.clear()
        self._order = ()
        await asyncio.gather(*(self._close_guard(guard) for _, guard in instances.values()), *self._closing)

    async def _close_guard(self, guard: Guard) -> None:
        try:
            await guard.close()
        except Exception as error:
            logger.warning("auth.%s: closing failed: %s", guard.name, type(error).__name__)

    # the engine asks ------------------------------------------------------------------------------------------------

    def authenticate(self, channel: Any, connect: Any) -> None:
        """Answers `channel.accept(principal)` or `channel.refuse(code)` exactly once, now or later."""
        listener = channel.listener
        if listener.privileged:
            channel.accept(_worker(connect.client_id, channel.peerhost))
            return
        identity = channel.identity or _EMPTY
        proved = identity.get("username") if identity else None
        username = proved or connect.username
        password = connect.password
        chain = self.chain(listener.auth)
        nobody = username is None and password is None and not identity and self._anonymous_on(listener)
        if nobody and not chain.screens and not self.protection.armed:  # the cheap way of most who connect so
            self._accept(channel, self._principal(connect.client_id, None, channel, identity))
            return
        client = Client(connect.client_id, username, channel.peerhost, listener.name, identity)
        if password is not None and listener.name in self._in_the_clear:
            self._in_the_clear.discard(listener.name)
            logger.warning(
                "listener %s: passwords cross the network in the clear, the first came from %s; use TLS",
                listener.name, channel.peer,
            )  # fmt: skip
        if self.protection.armed:
            refusal = self.protection.before(connect.client_id, username, channel.peerhost)
            if refusal is not None:
                self._finish(channel, client, refusal)
                return
        refusal = chain.screened(client)
        if refusal is not None:
            self._finish(channel, client, refusal)
            return
        if proved is None and password is None and chain.reads(client):
            task = asyncio.get_running_loop().create_task(self._decide(channel, client, None))
            self._pending[channel] = task
            return
        if proved is None and username is None and password is None and self._anonymous_on(listener):
            self._accept(channel, self._principal(connect.client_id, None, channel, identity))
            return
        if password is None:
            if proved is None:
                self._finish(channel, client, _without_password(client))
                return
        elif not username:
            self._finish(channel, client, Decision(BAD_CREDENTIALS, "a password without a user name"))
            return
        else:
            decision = chain.known(client, password)
            if decision is not None:
                self._finish(channel, client, decision)
                return
        task = asyncio.get_running_loop().create_task(self._decide(channel, client, password))
        self._pending[channel] = task

    def _anonymous_on(self, listener: Any) -> bool:
        """The listener's own word, else that of `[access]`; an empty list of backends refuses anonymous clients too."""
        own: bool | None = listener.attributes.get("allow_anonymous")
        if own is not None:
            return own
        return self._allow_anonymous and (not self._order_empty if listener.auth is None else bool(listener.auth))

    def cancel(self, channel: Any) -> None:
        """The connection is gone: the answer is no longer wanted, and the call behind it neither."""
        task = self._pending.pop(channel, None)
        if task is not None:
            task.cancel()

    def may_publish(self, principal: Any, topic: str) -> int:
        """1 when everything may be published there, from local rules only; else 0, and `publishable` says what may."""
        return int(self._allowed(principal, PUBLISH, topic, EVERY) == EVERY)

    def publishable(self, principal: Any, topic: str) -> int:
        """What may be published there: bit ``qos << 1 | retain`` is set for each kind of packet."""
        return self._allowed(principal, PUBLISH, topic, EVERY)

    def may_subscribe(self, principal: Any, filter: str, qos: int | None = None) -> int:
        """1 when the whole filter is covered by an allowing rule that no earlier denying rule covers too, for this QoS
        or (None) for every QoS."""
        wanted = SUBSCRIPTIONS if qos is None else 1 << (qos << 1)
        return int(self._allowed(principal, SUBSCRIBE, without_share(filter), wanted) == wanted)

    def may_receive(self, principal: Any, topic: str) -> int:
        """1 when a message on this topic may reach the client, whatever filter it came through. The first rule that
        concerns any QoS decides: which QoS is good was asked when the client subscribed."""
        return self._allowed(principal, SUBSCRIBE, topic, 0)

    def will_terms(self, principal: Any, topic: str, qos: int, retain: bool) -> dict[str, Any]:
        """How the client came in, and whether the rules that need no backend are enough for its will. The backend's own
        rules for it are not kept: that they sufficed is what is left of them."""
        if principal.superuser:
            return {"backend": principal.backend, "superuser": True, "until": principal.expires_at}
        terms = {
            "listener": principal.listener,
            "auth": principal.auth,
            "backend": principal.backend,
            "until": principal.expires_at,
        }
        who = (principal.clientid, principal.username, principal.peerhost)
        return {**terms, "common": self._commonly(*who, terms, topic, qos, retain)}

    def may_publish_will(
        self,
        clientid: str,
        username: str | None,
        peerhost: str,
        terms: dict[str, Any],
        topic: str,
        qos: int,
        retain: bool,
    ) -> int:
        """1 unless a ban hits the client, its backend is not configured any more, its login has expired, or rules that
        need no backend allowed the will when it was judged last and do not any more."""
        backend = terms["backend"]
        bans = self.protection.bans
        if (bans and bans.find(clientid, username, peerhost)) or (
            backend is not None and backend not in self._instances
        ):
            return 0
        until = terms.get("until")
        if until is not None and time.time() >= until:
            return 0
        if terms.get("superuser"):
            return 1
        return int(not terms["common"] or self._commonly(clientid, username, peerhost, terms, topic, qos, retain))

    def _commonly(
        self,
        clientid: str,
        username: str | None,
        peerhost: str,
        terms: Mapping[str, Any],
        topic: str,
        qos: int,
        retain: bool,
    ) -> bool:
        """Whether the rules that all clients of a listener have in common let this one publish."""
        auth = terms["auth"]
        standing = Standing(listener=terms["listener"], auth=None if auth is None else tuple(auth))
        principal = Principal(clientid, username, f"{peerhost}:0", standing)
        packet = 1 << (qos << 1 | int(retain))
        return self._allowed(principal, PUBLISH, topic, packet) == packet

    def denied(self, channel: Any) -> None:
        """The engine refused a message or a filter of this connection for want of a right; called once for each, and
        once for each repetition."""
        verdict = self.protection.denied(channel.principal, channel.peer)
        if verdict:
            channel.disconnect(verdict)
        elif verdict is None and self.hold_back is not None:
            self.hold_back(channel, HELD_BACK)

    def _allowed(self, principal: Any, action: int, topic: str, packets: int) -> int:
        """Which of these packets are allowed; with none, 1 or 0 for any of them. Who is banned may publish nothing, so
        that no will of theirs is published."""
        if action == PUBLISH and self.protection.bans and self.protection.bans.hits(principal):
            return 0
        standing = principal.standing  # its properties would be a call each
        if standing.expires_at is not None and time.time() >= standing.expires_at:
            return 0
        if standing.superuser:
            return packets or 1
        try:
            return self._judged(principal, action, topic, packets)
        except Exception:  # a condition of somebody's own backend: it costs the client this right and nothing else
            self.counters["undecided"] += 1
            self._undecided.error(
                "client %r (user %r): a rule about it raised, so it is denied",
                principal.clientid, shown(principal.username), exc_info=True,
            )  # fmt: skip
            return 0

    def _judged(self, principal: Any, action: int, topic: str, packets: int) -> int:
        """The same by the rules alone."""
        if principal.generation != self.generation:
            self._look_up(principal)
        parts = topic.split("/")
        if packets:
            return allowed(principal.sources, action, topic, parts, principal, packets, self._unless_system(topic))
        for rules in principal.sources:
            found = rules.find(action, topic, parts, principal)
            if found is not None:
                return int(found.allow)
        return self._unless_system(topic)

    def _unless_system(self, topic: str) -> int:
        """`no_match`, which is not about the broker's own topics: they tell of what others did and published."""
        return 0 if topic[:1] == "$" and topic.partition("/")[0] in OWN_TOPICS else self._no_match

    # for the application --------------------------------------------------------------------------------------------

    def status(self) -> dict[str, dict[str, Any]]:
        """By instance: ``{"state": "ok|failing|open", "last_error": …, …}``, without secrets."""
        return {name: guard.status() for name, (_, guard) in self._instances.items()}

    def purge(self, username: str | None = None) -> int:
        """Forget cached verdicts about a user name (None: all); returns how many."""
        return sum(guard.cache.purge(username) for _, guard in self._instances.values())

    def flush(self, username: str | None = None, *, backend: str | None = None) -> int:
        """Rights of a user name (None: anybody's) changed: forget the verdicts, read the rights of connected clients
        again now. `backend` names the instance they changed in; returns how many verdicts were forgotten."""
        count = 0
        for name, (_, guard) in self._instances.items():
            if backend in (None, name):
                count += guard.cache.purge(username)
                self._refresher.due(name, username)
        return count

    async def check(self) -> None:
        """One real round trip to every backend; raises BackendUnavailable."""
        for _, guard in self._instances.values():
            await guard.backend.check()

    def guard(self, name: str | None) -> Guard | None:
        """The guard of an instance."""
        found = self._instances.get(name) if name is not None else None
        return found[1] if found is not None else None

    def chain(self, names: tuple[str, ...] | None) -> Chain:
        """The backends that decide where a listener names these (None: the general order)."""
        chain = self._chains.get(names)
        if chain is None:
            wanted = self._order if names is None else names
            guards = tuple(self._instances[name][1] for name in wanted if name in self._instances)
            explicit = self._explicit if names is None else True
            chain = self._chains[names] = Chain(guards, explicit=explicit)
        return chain

    def apply(self, principal: Principal, grant: Grant) -> bool:
        """Give a live client new rights; whether they differ from what it had. A grant without an end leaves the end it
        has: not every backend that tells it at login tells it again."""
        rules = tuple(grant.rules)
        attributes = _attributes(grant)
        until = principal.expires_at if grant.expires_at is None else grant.expires_at
        held = (principal.superuser, principal.attributes, principal.own_rules, principal.groups, principal.expires_at)
        given = (grant.superuser, attributes, rules, grant.groups, until)
        if given == held:
            return False
        principal.standing = principal.standing.granted(*given)
        principal.forget()
        if until != held[-1]:
            self._refresher.watch_expiry(principal)
        if self.rights_changed is not None:
            self.rights_changed(principal.clientid)
        return True

    # inside ---------------------------------------------------------------------------------------------------------

    async def _decide(self, channel: Any, client: Client, password: bytes | None) -> None:
        try:
            generation = -1
            while generation != self.generation:  # again, when a reload came between: it may have removed who said yes
                generation = self.generation
                decision = await self._ask(client, self.chain(channel.listener.auth), password)
        except Exception:
            logger.exception("deciding about a client failed")
            decision = Decision(UNAVAILABLE, "internal error")
        if self._pending.pop(channel, None) is not None:
            self._finish(channel, client, decision)

    async def _ask(self, client: Client, chain: Chain, password: bytes | None) -> Decision:
        refusal = chain.screened(client)
        if refusal is not None:
            return refusal
        if password is not None:
            return await chain.decide(client, password)
        if "username" not in client.certificate and chain.reads(client):
            return await chain.decide_without(client)
        return await chain.identify(client)

    def _finish(self, channel: Any, client: Client, decision: Decision) -> None:
        username = decision.grant.username or client.username
        if decision.guess:
            self.protection.failed(username, client.peerhost)
        elif self.protection.counts and not decision.code:
            decision = self._protect(client, username, decision)
        if decision.code:
            self.counters[_COUNTERS[decision.code]] += 1
            self._refused.warning(
                "client %r (user %r) from %s refused on listener %s: %s",
                client.clientid, shown(client.username), channel.peer, client.listener, decision.reason,
            )  # fmt: skip
            channel.refuse(decision.code)
            return
        principal = self._principal(client.clientid, username, channel, client.certificate, decision)
        self._accept(channel, principal)
        self._refresher.watch(principal)

    def _protect(self, client: Client, username: str | None, decision: Decision) -> Decision:
        """The decision, unless limits or a ban that came while the backend was asked say otherwise."""
        protection = self.protection
        return (
            protection.standing(client.clientid, username, client.peerhost)
            or protection.after(client.clientid, username, client.peerhost)
            or decision
        )

    def _accept(self, channel: Any, principal: Principal) -> None:
        self.counters["accepted"] += 1
        channel.accept(principal)
        if self.protection.counts:
            self.protection.admitted(principal, channel)

    def _principal(
        self,
        clientid: str,
        username: str | None,
        channel: Any,
        identity: Mapping[str, str],
        decision: Decision | None = None,
    ) -> Principal:
        listener = channel.listener
        backend, grant = (None, _NOTHING) if decision is None else (decision.backend, decision.grant)
        if identity or grant.rules or grant.attributes or grant.groups or grant.expires_at is not None:
            standing = self._standing(listener, backend, grant, identity)
        else:
            key = (listener.name, listener.auth, backend, grant.superuser)
            found = self._standings.get(key)
            if found is None:
                found = self._standings[key] = self._standing(listener, backend, grant, _EMPTY)
            standing = found
        return Principal(clientid, username, channel.peer, standing)

    def _standing(self, listener: Any, backend: str | None, grant: Grant, identity: Mapping[str, str]) -> Standing:
        return Standing(
            listener=listener.name, auth=listener.auth, backend=backend, superuser=grant.superuser,
            attributes=_attributes(grant), own_rules=tuple(grant.rules), groups=grant.groups,
            expires_at=grant.expires_at, certificate=identity, audit=self._on_unsafe,
        )  # fmt: skip

    def _look_up(self, principal: Principal) -> None:
        standing = principal.standing
        own = standing.own_rules
        found = None if own else self._common.get(standing.auth)
        if found is None:
            sources: list[RuleSet] = []
            for guard in self.chain(standing.auth).guards:
                if own and guard.name == standing.backend:
                    sources.append(self._compile(tuple(own)))
                if guard.common is not None:
                    sources.append(guard.common)
            found = tuple(sources)
            found = self._sources.setdefault(found, found)  # shared by all with the same
            if not own:
                self._common[standing.auth] = found
        principal.sources = found
        principal.rendered = None
        principal.generation = self.generation

    def _compile(self, rules: tuple[Rule, ...]) -> RuleSet:
        found = self._compiled.get(rules)
        if found is None:
            if len(self._compiled) >= COMPILED:
                self._compiled.clear()
                self._sources.clear()
            try:
                found = RuleSet(rules)
            except ValueError as error:
                logger.error("rules of a backend are not valid, all of them are left out: %s", error)
                found = RuleSet([Rule(False, "all", None)])
            self._compiled[rules] = found
        return found

    def _audit(self, principal: Principal, name: str, value: str) -> None:
        self.counters["unsafe_identity"] += 1
        self._unsafe.warning(
            "client %r (user %r) from %s: its %s may not stand in a topic, rules with ${%s} do not apply to it",
            principal.clientid, principal.username, principal.peerhost, name, name,
        )  # fmt: skip


_COUNTERS = {
    BAD_CREDENTIALS: "refused_credentials",
    NOT_AUTHORIZED: "refused_not_authorized",
    UNAVAILABLE: "refused_unavailable",
    BUSY: "refused_busy",
    BANNED: "refused_banned",
    QUOTA_EXCEEDED: "refused_quota",
    RATE_EXCEEDED: "refused_rate",
}


async def open_guard(instance: Any, access: Any) -> Guard:
    """Open one instance. Raises AccessError with the instance, where it is written and what is wrong."""
    config = instance.config
    try:
        backend = await instance.backend.open(config)
        return Guard(
            instance.name, backend,
            timeout=_or(config.timeout, access.timeout),
            max_concurrent=_or(config.max_concurrent, access.max_concurrent),
            cache_ttl=_or(config.cache_ttl, access.cache_ttl),
            negative_cache_ttl=_or(config.negative_cache_ttl, access.negative_cache_ttl),
            stale_if_error=config.stale_if_error,
            refresh=0.0 if getattr(backend, "reopen_on_reload", False) else config.refresh,
            on_error=_or(config.on_error, access.on_error),
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        raise AccessError(f"{instance.origin}: auth.{instance.name}: {error}") from error


def _same(kept: tuple[Any, Guard], instance: Any, settings: Any, before: Any) -> bool:
    """Whether an open backend can stay: its table, the files it names and the general settings are as before."""
    old, guard = kept
    if before is None or old.kind != instance.kind or old.raw != instance.raw:
        return False
    if any(getattr(settings.access, name) != getattr(before.access, name) for name in _SHARED):
        return False
    if instance.fingerprint:
        return bool(old.fingerprint == instance.fingerprint)
    return not getattr(guard.backend, "reopen_on_reload", False)


def _in_the_clear(settings: Any) -> set[str]:
    """Names of the listeners other machines can reach without TLS."""
    listeners = getattr(settings, "listeners", {}).items()
    return {name for name, one in listeners if not one.secure and hasattr(one, "bind") and not one.bind.loopback}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _attributes(grant: Grant) -> Mapping[str, str]:
    """With names in lower case, as rules look them up."""
    if not grant.attributes:
        return _EMPTY
    return {name.lower(): value for name, value in grant.attributes.items()}


def _without_password(client: Client) -> Decision:
    if client.username is None:
        return Decision(NOT_AUTHORIZED, "neither user name nor password, and [access] allow_anonymous is false")
    return Decision(BAD_CREDENTIALS, "a user name without a password")


def _worker(clientid: str, peerhost: str) -> Principal:
    origin = clientid.split("/")[1] if clientid.startswith(RESERVED) else None
    name = f"{RESERVED}{origin}" if origin else None
    return Principal(clientid, name, peer=f"{peerhost}:0", superuser=True, privileged=True, origin=origin)


__all__ = ["AccessError", "AccessGate", "open_guard"]
