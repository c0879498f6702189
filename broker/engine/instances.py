"""The durable sessions of sinks and bridges: made, changed and ended as the configuration says.

An instance `kafka` has its lanes `isthmus/kafka/0` and on, `isthmus/kafka/in` to publish with, and, a sink,
`isthmus/kafka/dlq` for what it could not write. What still queues when it is taken out of the configuration stays, as
an orphan, until somebody decides.
"""

from collections.abc import Callable
from typing import Any

from broker.engine.core import Core
from broker.engine.gate import InternalPrincipal
from broker.engine.groups import Lanes
from broker.engine.message import Message
from broker.engine.receiver import Subscription
from broker.engine.router import Router
from broker.engine.session import NEVER, Session
from broker.engine.subscriptions import Subscriptions

RESERVED = "isthmus/"
"""Client ids of workers; nobody else may use them."""


class Instances:
    """Of one engine, whose `sessions` these are and which ends them."""

    def __init__(
        self,
        core: Core,
        router: Router,
        subscriptions: Subscriptions,
        sessions: dict[str, Session],
        end_session: Callable[[Session], None],
    ) -> None:
        self.core = core
        self.router = router
        self._subscriptions = subscriptions
        self._sessions = sessions
        self._end_session = end_session
        self._orphans: set[str] = set()
        """Instances removed from the configuration whose queues are still here."""
        self._aging: list[Session] = []
        """Lanes whose messages have a `max_age`."""

    def ensure(
        self, name: str, spec: Any, order_key: Callable[[Message], str] | None = None, dead_letters: Any = None
    ) -> None:
        """Create or change the durable sessions of a sink or bridge: before anything can be published to them.

        `dead_letters` is the spec of the session that keeps `$dlq/<name>`, for sinks.
        """
        principal = InternalPrincipal(f"{RESERVED}{name}", f"{RESERVED}{name}", name)
        known = f"{RESERVED}{name}/0" in self._sessions
        lanes = [self._ensure_session(f"{RESERVED}{name}/{n}", spec, principal, True) for n in range(spec.lanes)]
        before = {subscription.filter for session in lanes for subscription in session.subscriptions or ()}
        self._orphans.discard(name)
        self._ensure_session(f"{RESERVED}{name}/in", spec, principal, False)
        for session in lanes:
            self._clear(session)
        n = spec.lanes
        while f"{RESERVED}{name}/{n}" in self._sessions:
            extra = self._sessions[f"{RESERVED}{name}/{n}"]
            self._clear(extra)
            extra.spec = spec
            n += 1
        for filter, qos in {f.encode(): qos for f, qos in spec.filters}.items():
            group = self._subscribe(lanes, filter, qos, spec, order_key)
            if (spec.retained == "always" and filter not in before) or (spec.retained == "new" and not known):
                self._offer_retained(lanes, group, filter, qos, spec)
        if dead_letters is not None:
            self._keep_dead_letters(name, dead_letters)
        self.router.forget_all()
        if self.core.journal is not None:
            for session in self.sessions(name):
                if session.spool is not None:
                    self.core.journal.snapshot(session.spool)
        self._aging = [s for s in self._aging if s not in lanes]
        if spec.max_age:
            self._aging.extend(lanes)
        for session in lanes:
            if session.blocked is not None:
                session.unblock()  # the limits or what they do may have changed

    def mute(self, name: str) -> None:
        """End the subscriptions of an instance; its worker may finish what it has received."""
        for session in self.sessions(name):
            self._clear(session)
            if session.spool is not None:
                self.core.journal.snapshot(session.spool)
        self.router.forget_all()

    def remove(self, name: str) -> int:
        """Cut an instance off; returns how many messages stay behind as an orphan queue."""
        self.mute(name)
        left = 0
        for session in self.sessions(name):
            if session.channel is not None:
                session.channel.disconnect(0x98)
            left += session.queued
            self.core.refused.pop(session.client_id, None)
            if not session.queued:
                self._end_session(session)
            elif session.blocked is not None:
                session.unblock()
        self._orphans.add(name)
        return left

    def sessions(self, name: str) -> list[Session]:
        """The lanes (and the publishing session) of an instance."""
        prefix = f"{RESERVED}{name}/"
        return [s for c, s in list(self._sessions.items()) if c.startswith(prefix)]

    def find_orphans(self) -> dict[str, int]:
        """After a restart: queues of instances that are not configured any more, by name with their messages."""
        found: dict[str, int] = {}
        for client_id, session in list(self._sessions.items()):
            if not client_id.startswith(RESERVED) or session.spec is not None:
                continue
            session.subscriptions = None
            if not session.queued:
                self._end_session(session)
                continue
            name = client_id[len(RESERVED) :].rpartition("/")[0]
            found[name] = found.get(name, 0) + session.queued
        self._orphans.update(found)
        return found

    def lanes(self, name: str) -> list[Session]:
        """The sessions that feed an instance."""
        return [s for s in self.sessions(name) if s.client_id.rpartition("/")[2].isdigit()]

    def drop_queue(self, name: str) -> int:
        """Delete what queues for an instance; returns how many messages."""
        count = 0
        for session in self.sessions(name):
            count += session.queued if name in self._orphans else session.waiting
            session.drop_queue("queue_dropped")
            if name in self._orphans:
                self._end_session(session)
        self._orphans.discard(name)
        return count

    def drop_aged(self) -> None:
        """Give up what has queued longer than its instance's `max_age`."""
        for session in self._aging:
            oldest = self.core.clock() - session.spec.max_age * 1000
            while session.waiting and 0 < session.oldest_queued_ms() < oldest and session.drop_oldest("too_old"):
                pass

    def _clear(self, session: Session) -> None:
        """End the session's subscriptions."""
        for subscription in session.subscriptions or ():
            self.router.remove(subscription)
            subscription.group = None  # the lanes and their subscriptions keep each other
        if session.subscriptions is not None:
            session.subscriptions.clear()

    def _subscribe(
        self, lanes: list[Session], filter: bytes, qos: int, spec: Any, order_key: Callable[[Message], str] | None
    ) -> Lanes | None:
        """Subscribe every lane; what they are to the router is returned if they are several."""
        members = [Subscription(s, filter, qos, False, spec.retain_as_published, 0) for s in lanes]
        group: Lanes | None = None
        if spec.lanes > 1 and order_key is not None:
            group = Lanes(members, order_key, self._subscriptions.rights.may_receive)
            for member in members:
                member.group = group
        self.router.add(members[0])
        for session, member in zip(lanes, members, strict=True):
            if session.subscriptions is None:
                session.subscriptions = []
            session.subscriptions.append(member)
        return group

    def _offer_retained(self, lanes: list[Session], group: Lanes | None, filter: bytes, qos: int, spec: Any) -> None:
        for message, level, idents in self._subscriptions.retained_for(lanes[0], filter, qos, None):
            lane: Any = lanes[0] if group is None else group.pick(message).receiver
            level = max(level, 1) if spec.upgrade_qos and qos else level
            lane.offer(message, level, True, idents, None, None)

    def _keep_dead_letters(self, name: str, spec: Any) -> None:
        principal = InternalPrincipal(f"{RESERVED}{name}/dlq", f"{RESERVED}{name}", f"{name}/dlq")
        session = self._ensure_session(f"{RESERVED}{name}/dlq", spec, principal, True)
        if not session.subscriptions:
            subscription = Subscription(session, b"$dlq/" + name.encode(), 1, False, True, 0)
            session.subscriptions = [subscription]
            self.router.add(subscription)

    def _ensure_session(self, client_id: str, spec: Any, principal: Any, durable: bool) -> Session:
        session = self._sessions.get(client_id)
        if session is None:
            session = Session(client_id, self.core)
            self._sessions[client_id] = session
            session.window = 65535
        session.spec = spec
        session.owner = principal.username
        session.principal = principal
        session.origin = principal.origin
        session.persistent = True
        session.special = True
        session.durable = durable
        session.expiry = float(NEVER)
        if self.core.journal is not None and session.spool is None:
            session.spool = self.core.journal.open(session)
            session.stored = True
        return session
