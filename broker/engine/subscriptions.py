"""SUBSCRIBE, UNSUBSCRIBE, and whatever else begins or ends a subscription. MQTT 5 sections 3.8 and 3.10.

A subscription counts at once. Where it must survive a restart it is acknowledged when it is on disk; if it cannot be
written, the acknowledged one it has replaced counts again.
"""

from collections.abc import Sequence
from typing import Any

from broker.engine import records, topics
from broker.engine.channel import Channel
from broker.engine.core import Core
from broker.engine.groups import ShareGroup
from broker.engine.inbox import CLOSED, LIVE
from broker.engine.legacy import Legacies
from broker.engine.message import Message
from broker.engine.owed import Owed
from broker.engine.receiver import Subscription, filter_of
from broker.engine.retained import Retained
from broker.engine.rights import Rights
from broker.engine.router import Router
from broker.engine.session import Session
from broker.mqtt import packets
from broker.mqtt.errors import ProtocolError
from broker.mqtt.properties import Properties


class Subscriptions:
    """Of one engine, whose `sessions` and `groups` by (name, filter) these are."""

    def __init__(
        self,
        core: Core,
        rights: Rights,
        router: Router,
        retained: Retained,
        legacies: Legacies,
        sessions: dict[str, Session],
        groups: dict[tuple[bytes, bytes], ShareGroup],
    ) -> None:
        self.core = core
        self.rights = rights
        self.router = router
        self.retained = retained
        self.legacies = legacies
        self.sessions = sessions
        self.groups = groups
        self._unwritten: dict[Subscription, Subscription | None] = {}
        """Subscriptions not on disk yet, and the acknowledged ones they have replaced."""
        self.owed = Owed(core, self)

    def subscribe(self, channel: Channel, session: Session, packet: Any) -> tuple[list[int], list[Any]]:
        """Handle SUBSCRIBE: the codes for SUBACK and the retained messages to send after it."""
        props: Properties | None = packet.properties
        ident = props.subscription_identifiers[0] if props is not None and props.subscription_identifiers else 0
        codes: list[int] = []
        retained: list[Any] = []
        known = _by_filter(session)
        limit = self.core.limits.max_subscriptions if session.spec is None else len(packet.filters)
        older = {f: known.get(f) for f, _ in packet.filters[:limit]} if session.spool is not None else {}
        for filter, options in packet.filters[:limit]:
            code, sent = self._subscribe_one(channel, session, filter, options, ident, known)
            if channel.state == CLOSED:  # for what was denied; there is no SUBACK to wait for the disk
                older = {}
                break
            codes.append(code)
            retained.extend(sent)
        else:  # a megabyte of filters more than a client may have is not worth a look at each
            codes += [0x97 if channel.v5 else 0x80] * (len(packet.filters) - len(codes))
        for filter, before in older.items():
            made = known.get(filter)
            if made is not None and made is not before:
                self._unwritten[made] = before
        if self.core.observer is not None:
            self.core.observer.subscribed(session, packet.filters[: len(codes)], codes)
        return codes, retained

    def _settle(self, session: Session, made: list[tuple[bytes, Subscription]], written: bool) -> None:
        """New subscriptions are on disk, or never will be: then the acknowledged ones they replaced count again."""
        for filter, new in made:
            if new not in self._unwritten:
                continue
            older = self._unwritten.pop(new)
            if written:
                continue
            for later, before in self._unwritten.items():
                if before is new:
                    self._unwritten[later] = older
            if self.sessions.get(session.client_id) is not session or self._find(session, filter) is not new:
                continue
            if older is None:
                self.unsubscribe(session, [filter])
                continue
            self.drop(new)
            if session.subscriptions is not None:
                session.subscriptions.remove(new)
            self.restore(session, filter, older.qos, older.no_local, older.rap, older.ident)
            self._note(session, filter, older)

    def _note(self, session: Session, filter: bytes, made: Subscription, owed: int = 0) -> None:
        """The journal learns of a subscription, and up to which moment it is owed retained messages, if any."""
        if session.spool is None:
            return
        fields: dict[str, Any] = {"sub": [filter.decode(), made.qos, bool(made.no_local), bool(made.rap), made.ident]}
        if owed:
            fields["owed"] = owed
        self.core.journal.note(records.encode_json(records.SUBSCRIBED, session.spool.number, fields))

    def paid(self, session: Session, filter: bytes) -> None:
        """A subscription is owed no retained messages any more."""
        found = self._find(session, filter)
        if found is not None:
            self._note(session, filter, found)

    def _subscribe_one(
        self,
        channel: Channel,
        session: Session,
        filter: bytes,
        options: int,
        ident: int,
        known: dict[bytes, Subscription],
    ) -> tuple[int, list[Any]]:
        """`known` holds the session's subscriptions by their filters, and is kept up."""
        limits = self.core.limits
        v5 = channel.v5
        qos = options & 3
        no_local = bool(options & 4)
        rap = bool(options & 8)
        handling = options >> 4 & 3
        if channel.bridge:  # the bit of a private bridge stands for what MQTT 5 has options for
            rap = True
            no_local = not filter.startswith(b"$share/")
            handling = 1
        key: tuple[bytes, bytes] | None = None
        target = filter
        if filter.startswith(b"$share/") or filter == b"$share":
            parts = topics.split_share(filter)
            if parts is None:
                return (0x8F if v5 else 0x80), []
            if no_local:
                raise ProtocolError(0x82, "No Local on a shared subscription")  # [MQTT-3.8.3-4]
            key = parts
            target = parts[1]
        if not topics.valid_filter(target):
            if not v5:
                raise ProtocolError(0x81, "a topic filter is not valid")
            return 0x8F, []
        if topics.levels(target) > limits.max_topic_levels or len(target) > limits.max_topic_length:
            return (0x8F if v5 else 0x80), []
        old = known.get(filter)
        if old is None and len(session.subscriptions or ()) >= limits.max_subscriptions and session.spec is None:
            return (0x97 if v5 else 0x80), []
        if not self.rights.may_subscribe(channel.principal, target, qos):
            self.core.count("subscribe_denied")
            channel.denied()
            return (0x87 if v5 else 0x80), []
        if session.spool is not None and self.core.journal.refusing:
            return (0x97 if v5 else 0x80), []
        if old is not None:
            self.drop(old)  # [MQTT-3.8.4-3]
            if session.subscriptions is not None:
                session.subscriptions.remove(old)
        made = known[filter] = self._add(session, target, key, qos, no_local, rap, ident)
        retained: list[Any] = []
        if key is None and handling != 2 and (handling == 0 or old is None):  # [MQTT-3.3.1-10] [MQTT-3.3.1-11]
            retained = self.retained_for(session, target, qos, (ident,) if ident else None)
        if session.spool is not None:
            owes = _any_to_keep(retained)
            self._note(session, filter, made, self.owed.promise(session, filter) if owes else 0)
        return qos, retained

    def _add(
        self,
        session: Session,
        filter: bytes,
        key: tuple[bytes, bytes] | None,
        qos: int,
        no_local: bool,
        rap: bool,
        ident: int,
    ) -> Subscription:
        """Make a subscription effective; `key` is (group, filter) of a shared one."""
        group: ShareGroup | None = None
        if key is not None:
            group = self.groups.get(key)
            if group is None:
                group = self.groups[key] = ShareGroup(
                    key[0], key[1], self.core.limits.shared_strategy, self.rights.may_receive
                )
                group.entry = Subscription(session, filter, 0, False, False, 0, group)
                self.router.add(group.entry)
        subscription = Subscription(session, filter, qos, no_local, rap, ident, group)
        if session.subscriptions is None:
            session.subscriptions = [subscription]
        else:
            session.subscriptions.append(subscription)
        if group is None:
            self.router.add(subscription)
        else:
            group.join(subscription)
            self.router.touch(filter)
        return subscription

    def restore(self, session: Session, filter: bytes, qos: int, no_local: bool, rap: bool, ident: int) -> None:
        """Give an imported session back a subscription as `filter_of` names it."""
        key = topics.split_share(filter) if filter.startswith(b"$share/") else None
        self._add(session, key[1] if key is not None else filter, key, qos, no_local, rap, ident)

    def remember(self, session: Session, filter: bytes, qos: int, rap: bool) -> None:
        """A subscription an instance had before a restart: known, and effective once its configuration is applied."""
        if session.subscriptions is None:
            session.subscriptions = []
        session.subscriptions.append(Subscription(session, filter, qos, False, rap, 0))

    def retained_for(self, session: Session, filter: bytes, qos: int, idents: Any) -> list[Any]:
        """What a new subscription gets: (message, its QoS, identifiers), of those the session has a right to."""
        found: list[Any] = []
        if not self.retained.count:
            return found
        principal = session.principal
        check_source = self.core.limits.check_retain_source
        for message in self.retained.matching(filter, self.core.now):
            if session.origin is not None and message.origin is not None and message.origin.instance == session.origin:
                continue
            name = message.topic.decode()
            if principal is not None and not self.rights.may_receive(principal, name):
                continue
            source = message.origin.principal if check_source and message.origin is not None else None
            if source is not None and not self.rights.may_publish(source, name, message.qos, True):
                continue
            found.append((message, min(message.qos, qos), idents))
        return found

    def retained_of(self, session: Session, filter: bytes) -> list[Any]:
        """The same for a subscription it has; none when it has no such."""
        found = self._find(session, filter)
        if found is None:
            return []
        return self.retained_for(session, found.filter, found.qos, (found.ident,) if found.ident else None)

    def _find(self, session: Session, filter: bytes) -> Subscription | None:
        for subscription in session.subscriptions or ():
            if filter_of(subscription) == filter:
                return subscription
        return None

    def drop(self, subscription: Subscription) -> None:
        """Take a subscription out of the router or its group; the session's list is the caller's."""
        group = subscription.group
        if group is None:
            self.router.remove(subscription)
            return
        if not isinstance(group, ShareGroup):
            return
        group.leave(subscription.receiver)
        self.router.touch(subscription.filter)
        if not group.members:
            self.groups.pop((group.name, group.filter), None)
            if group.entry is not None:
                self.router.remove(group.entry)
                group.entry = None  # or the two keep each other, and the session that founded the group

    def unsubscribe(self, session: Session, filters: Sequence[bytes]) -> list[int]:
        """Handle UNSUBSCRIBE: one code per filter. What is in flight finishes, what only queues is dropped."""
        codes = []
        changed = False
        stays: list[bytes] = []
        known = _by_filter(session)
        for filter in filters:
            found = known.pop(filter, None)
            if found is None or session.subscriptions is None:
                codes.append(0x11)
                continue
            group = found.group
            self.drop(found)
            session.subscriptions.remove(found)  # afterwards: what could not be dropped is tried again with the session
            if session.spool is not None:
                self.core.journal.note(records.encode_session(records.UNSUBSCRIBED, session.spool.number, filter))
            codes.append(0)
            changed = True
            if isinstance(group, ShareGroup):
                session.left_share = True
            if isinstance(group, ShareGroup) and group.members:
                if session.spool is not None and self.core.journal.refusing:  # where it is it is safe
                    stays.append(found.filter)
                else:
                    self.legacies.hand_on(session, session.take_queued(group))
        if not session.subscriptions:
            session.subscriptions = None
        if changed:
            kept = stays + [s.filter for s in session.subscriptions or ()]
            session.purge(lambda topic: any(topics.matches(f, topic) for f in kept), "unsubscribed")
        if changed and self.core.observer is not None:
            self.core.observer.unsubscribed(session, [f for f, code in zip(filters, codes, strict=True) if not code])
        return codes

    def when_subscribed(
        self, channel: Channel, session: Session, subscribe: Any, codes: list[int], retained: list[Any]
    ) -> None:
        """Answer SUBSCRIBE once the subscriptions are on disk."""
        made = []
        for filter in {filter for (filter, _), code in zip(subscribe.filters, codes, strict=True) if code < 0x80}:
            found = self._find(session, filter)
            if found is not None:
                made.append((filter, found))

        def answer(written: bool) -> None:
            granted = codes
            self._settle(session, made, written)
            if not written:
                granted = [0x97 if channel.v5 else 0x80] * len(codes)
            if channel.state == LIVE:
                channel.subscribed(session, subscribe.packet_id, granted, retained if written else [])
            self.owed.answered(session, [filter for filter, _ in made])

        self.core.journal.after(answer)

    def when_unsubscribed(self, channel: Channel, packet_id: int, codes: list[int]) -> None:
        """Answer UNSUBSCRIBE once it is on disk."""

        def answer(written: bool) -> None:
            if not written and not channel.v5:  # its UNSUBACK can only say yes
                channel._end()
                return
            said = codes if written else [0x83] * len(codes)
            channel.push_live(packets.encode_unsuback(packet_id, channel.version, said))  # [MQTT-3.10.4-4]

        self.core.journal.after(answer)

    def check(self, session: Session) -> None:
        """End the subscriptions and withhold the queued messages that the session's principal has no right to."""
        principal = session.principal
        if principal is None or principal.privileged:
            return
        for subscription in list(session.subscriptions or ()):
            wanted = subscription.filter
            if not self.rights.may_subscribe(principal, wanted, subscription.qos) and session.subscriptions:
                filter = filter_of(subscription)
                session.subscriptions.remove(subscription)
                self.drop(subscription)
                if session.spool is not None:
                    self.core.journal.note(records.encode_session(records.UNSUBSCRIBED, session.spool.number, filter))
                self.core.count("subscription_revoked")
                if self.core.observer is not None:
                    self.core.observer.unsubscribed(session, [filter])
        session.purge(lambda topic: self.rights.may_receive(principal, topic.decode()))

    def withholds(self, session: Session, message: Message) -> str:
        """Why a device does not get a message that waited on disk: its rights or subscriptions have changed."""
        principal = session.principal
        if session.spec is not None or principal is None or principal.privileged:
            return ""
        if not self.rights.may_receive(principal, message.topic.decode()):
            return "unauthorized"
        for subscription in session.subscriptions or ():
            if topics.matches(subscription.filter, message.topic):
                return ""
        return "unsubscribed"


def _by_filter(session: Session) -> dict[bytes, Subscription]:
    return {filter_of(subscription): subscription for subscription in session.subscriptions or ()}


def _any_to_keep(retained: list[Any]) -> bool:
    """Whether some of what a subscription gets is of QoS 1 or 2."""
    return any(entry[1] for entry in retained)
