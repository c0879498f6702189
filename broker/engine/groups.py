"""Several receivers that share one subscription: `$share` groups and the lanes of an instance."""

from typing import Any

from broker.engine.message import Message
from broker.engine.receiver import DONE, LATER, REFUSED, Hold, Subscription, Target


class ShareGroup:
    """`$share/name/filter`: each message goes to one member. MQTT 5 section 4.8.2."""

    durable = False

    def __init__(self, name: bytes, filter: bytes, strategy: str, may_receive: Any) -> None:
        self.name = name
        self.filter = filter
        self.mark = stable_hash(f"{name.decode()}/{filter.decode()}") or 1
        """Names the group in records; the name of a group has no slash."""
        self.strategy = strategy
        self.may_receive = may_receive
        self.members: list[Subscription] = []
        self.entry: Subscription | None = None
        """What the router holds for the whole group."""
        self._next = 0

    def join(self, subscription: Subscription) -> None:
        """Add a member, replacing its older subscription to this group."""
        self.leave(subscription.receiver)
        self.members.append(subscription)

    def leave(self, receiver: Any) -> None:
        """Remove a member."""
        self.members = [m for m in self.members if m.receiver is not receiver]

    def refuses(self, message: Message) -> int:
        """`$share` groups never refuse."""
        return DONE

    def publish(self, message: Message, publisher: Any, hold: Hold | None) -> bool:
        """Give the message to one member: a connected one in turn (or by hash of the publisher), else a durable one."""
        members = self.members
        n = len(members)
        if n == 0:
            return False
        if self.strategy == "hash" and message.origin is not None:
            start = hash(message.origin.client_id) % n
        else:
            start = self._next % n
            self._next = start + 1
        name = message.topic.decode()
        fallback = None
        for i in range(n):
            member = members[(start + i) % n]
            receiver = member.receiver
            if receiver.principal is not None and not self.may_receive(receiver.principal, name):
                continue
            if receiver.outbox is not None and not receiver.outbox.congested:
                self._next = (start + i) % n + 1
                return self._give(member, message, hold)
            if fallback is None or (fallback.receiver.outbox is None and receiver.outbox is not None):
                fallback = member
        return fallback is not None and self._give(fallback, message, hold)

    def _give(self, member: Subscription, message: Message, hold: Hold | None) -> bool:
        idents = (member.ident,) if member.ident else None
        target = Target(member.receiver, member.qos, False, member.rap, idents)
        target.group = self
        return member.receiver.deliver(message, target, hold) != REFUSED

    def elsewhere(self, but: Any, message: Message) -> bool:
        """Whether another connected member may have this message."""
        name = message.topic.decode()
        for member in self.members:
            receiver = member.receiver
            if receiver is but or receiver.outbox is None:
                continue
            if receiver.principal is None or self.may_receive(receiver.principal, name):
                return True
        return False

    def with_room(self, message: Message) -> Subscription | None:
        """A member that may have a message from another one's queue and has room for it, connected ones first; None
        when there is none at present. Raises LookupError when no member may have it."""
        name = message.topic.decode()
        n = len(self.members)
        self._next += 1
        allowed = False
        fallback = None
        for i in range(n):
            member = self.members[(self._next + i) % n]
            receiver = member.receiver
            room = receiver.has_room(message.size)
            if (allowed and not room) or (fallback is not None and receiver.outbox is None):
                continue
            if receiver.principal is not None and not self.may_receive(receiver.principal, name):
                continue
            allowed = True
            if room and receiver.outbox is not None:
                return member
            if room:
                fallback = member
        if not allowed:
            raise LookupError(name)
        return fallback

    def give(self, member: Subscription, message: Message) -> bool:
        """Give this member a message that `with_room` has found it for; False when it refuses after all."""
        return self._give(member, message, None)

    def again(self, message: Message, hold: Hold | None) -> None:
        """Give what a gone member had not acknowledged to another one."""
        self.publish(message, None, hold)
        if hold is not None:
            hold.release()


class Lanes:
    """The lanes of one instance: a message goes to lane hash(order_key) mod lanes, so order is kept per key."""

    durable = True
    mark = 0

    def __init__(self, members: list[Subscription], key: Any, may_receive: Any) -> None:
        self.members = members
        self.key = key
        self.may_receive = may_receive

    def pick(self, message: Message) -> Subscription:
        """The lane of a message."""
        return self.members[stable_hash(self.key(message)) % len(self.members)]

    def refuses(self, message: Message) -> int:
        """Whether the message's own lane has no room."""
        return self.pick(message).receiver.refuses(message.size)

    def publish(self, message: Message, publisher: Any, hold: Hold | None) -> bool:
        """Give the message to its lane."""
        member = self.pick(message)
        receiver = member.receiver
        instance = message.origin.instance if message.origin is not None else None
        if instance is not None and instance == receiver.origin:
            return False
        target = Target(receiver, member.qos, False, member.rap, None)
        return receiver.deliver(message, target, hold) in (DONE, LATER)


def stable_hash(text: str) -> int:
    """The same in every process and release (FNV-1a, 32 bits)."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value
