"""What waits for one client: how much may, what goes first when it is too much, and what leaves it unsent.

A queue entry is (message, qos, retain, identifiers, hold, group, sequence number, record); the last two are 0 and None
without a spool and at QoS 0. What waits on disk is the spool's.
"""

from collections import deque
from typing import Any

from broker.engine.core import Core
from broker.engine.inflight import SENT, Inflight
from broker.engine.message import Message
from broker.engine.receiver import DONE, LATER, REFUSED, Hold, Receiver, Subscription
from broker.engine.spool import OPEN, STORED, WRITING, Spool


class Queue(Receiver):
    """The waiting side of a session, which sends what leaves it in its order."""

    def __init__(self, core: Core) -> None:
        Receiver.__init__(self)  # not super(): see Channel
        self.core = core
        self.subscriptions: list[Subscription] | None = None
        self.inflight: Inflight | None = None
        self.queue: Any = None
        self.queue_bytes = 0
        self.persistent = False
        self.left_share = False
        """It has left a `$share` group and may still have messages of it on disk."""
        self.spec: Any = None
        self.spool: Spool | None = None
        """Set for a session that survives a restart."""
        self.blocked: list[Any] | None = None
        """Channels whose next message waits for room here."""
        self.retained: Any = None
        """Retained messages of new subscriptions: they go when nothing else waits."""
        self.dropped: dict[str, int] | None = None

    # room -------------------------------------------------------------------------------------------------------

    def refuses(self, size: int) -> int:
        """Whether the queue has no room for a message of this size, and its policy is to say so."""
        spec = self.spec
        if spec is None:
            limits = self.core.limits
            full = self.waiting >= limits.max_queued_messages or (
                limits.max_queued_bytes and self.queue_bytes + size > limits.max_queued_bytes
            )
            return REFUSED if full and self.durable else DONE
        if spec.overflow == "drop_oldest" or spec.overflow == "drop_newest":
            return DONE
        if self.queue_bytes + size <= spec.max_bytes:
            return DONE
        if spec.overflow == "block" and size <= spec.max_bytes:
            return LATER
        self.core.refused[self.client_id] = self.core.refused.get(self.client_id, 0) + 1
        return REFUSED

    def has_room(self, size: int) -> bool:
        """As `Receiver.has_room`: half of the queue is left to live messages."""
        limits = self.core.limits
        if self.outbox is None:
            if not self.persistent or limits.max_queued_messages == 0:
                return False
        elif self.outbox.congested:
            return False
        full = limits.max_queued_bytes and 2 * (self.queue_bytes + size) > limits.max_queued_bytes
        return self.waiting <= limits.max_queued_messages // 2 and not full

    def _admit(self, qos: int, size: int) -> int:
        """LATER when one more message may wait, having made room for it where the policy says so."""
        spec = self.spec
        limits = self.core.limits
        if spec is not None:
            if self.queue_bytes + size > spec.max_bytes:
                if spec.overflow != "drop_oldest":
                    self.count_drop("queue_full")
                    return REFUSED
                while self.queue_bytes + size > spec.max_bytes and self.drop_oldest("queue_full"):
                    pass
            return LATER
        if limits.max_queued_messages <= 0:
            self.count_drop("queue_full")
            return DONE
        while self.waiting >= limits.max_queued_messages or (
            limits.max_queued_bytes and self.queue_bytes + size > limits.max_queued_bytes
        ):
            if limits.queue_overflow == "drop_newest" or not self.make_room(qos):
                self.count_drop("queue_full")
                return DONE
        return LATER

    @property
    def waiting(self) -> int:
        """Messages that queue, in memory and on disk."""
        count = len(self.queue) if self.queue is not None else 0
        return count + self.spool.waiting if self.spool is not None else count

    def drop_oldest(self, reason: str) -> bool:
        """Give up the oldest message that queues; False when none does."""
        if self.spool is not None:
            return self.spool.drop_oldest(reason)
        if not self.queue:
            return False
        self.discard(self.queue.popleft(), reason)
        return True

    def make_room(self, qos: int) -> bool:
        """QoS 0 goes first, then the oldest. False when the newcomer is the one to go."""
        queue = self.queue
        for i, entry in enumerate(queue or ()):
            if entry[1] == 0:
                del queue[i]
                self.discard(entry, "queue_full")
                return True
        return qos > 0 and self.drop_oldest("queue_full")

    def _enqueue(self, message: Message, qos: int, retain: bool, idents: Any, hold: Hold | None, group: Any) -> int:
        queue = self.queue
        if queue is None:
            queue = self.queue = deque()
        size = message.size
        spec = self.spec
        if spec is not None:
            self.core.stamp(message)
            if self.queue_bytes + size > spec.max_bytes:
                if spec.overflow != "drop_oldest":
                    self.count_drop("queue_full")
                    return REFUSED
                while queue and self.queue_bytes + size > spec.max_bytes:
                    self.discard(queue.popleft(), "queue_full")
        elif self._admit(qos, size) != LATER:
            return DONE
        elif self.core.limits.max_queued_age:
            self.core.stamp(message)
        if hold is not None:
            hold.count += 1
        queue.append((message, qos, retain, idents, hold, group, 0, None))
        self.queue_bytes += size
        return LATER if hold is not None else DONE

    def unblock(self) -> None:
        """Let the publishers go on that wait for room."""
        waiting = self.blocked
        self.blocked = None
        for channel in waiting or ():
            channel.resume_parse()

    # what is given up -------------------------------------------------------------------------------------------

    def discard(self, entry: Any, reason: str) -> None:
        """Give up an entry that was taken out of the queue; `reason` counts it."""
        self.queue_bytes -= entry[0].size
        if reason:
            self.count_drop(reason)
        if entry[4] is not None:
            if reason == "store_failed":
                entry[4].fail(0x97)
            else:
                entry[4].release()
        if entry[7] is not None and self.spool is not None:
            self.spool.finish(entry[6], entry[7], self.inflight)

    def count_drop(self, reason: str, count: int = 1) -> None:
        """Messages that this session does not get."""
        self.core.drop(reason, count, self)
        if self.spec is not None:
            if self.dropped is None:
                self.dropped = {}
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def purge(self, filter_topics: Any, reason: str = "unauthorized") -> None:
        """Drop queued messages whose topic `filter_topics(topic)` rejects; what is in flight finishes."""
        if self.retained is not None:
            self.retained = deque(entry for entry in self.retained if filter_topics(entry[0].topic)) or None
        given_up: list[Any] = []
        self.queue = _purged(self.queue, filter_topics, given_up)
        if self.spool is not None:
            self.spool.tail = _purged(self.spool.tail, filter_topics, given_up)
        for entry in given_up:  # whoever is told may publish to this very session
            self.discard(entry, reason)
        if self.blocked is not None:
            self.unblock()

    def drop_queue(self, reason: str) -> None:
        """Give up everything that queues; what is in flight finishes."""
        if self.spool is not None:
            self.spool.forget_all(reason)
            self.core.journal.snapshot(self.spool)
        else:
            self.purge(lambda topic: False, reason)
        if self.blocked is not None:
            self.unblock()

    def outdated(self, message: Message) -> str:
        """Why a message that comes back from disk is not delivered any more; empty when it is."""
        if message.expires != 0 and message.expires <= self.core.now:
            return "expired"
        if message.clock_ms < self._oldest_kept():
            return "too_old"
        withheld: str = self.core.withholds(self, message) if self.core.withholds is not None else ""
        return withheld

    def _oldest_kept(self) -> int:
        """Messages that came before this, by `Core.clock`, have waited too long; not above 0 where none has."""
        age = self.spec.max_age if self.spec is not None else self.core.limits.max_queued_age
        return int(self.core.clock() - age * 1000) if age else 0

    # a look inside ----------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Messages waiting, those in flight included."""
        return self.waiting + (self.inflight.count if self.inflight else 0)

    def oldest_queued_ms(self) -> int:
        """When the oldest message that queues came, milliseconds of `Core.clock`; 0 when none does."""
        if self.queue:
            return int(self.queue[0][0].clock_ms)
        spool = self.spool
        if spool is None:
            return 0
        if spool.loading:
            return int(spool.loading[0][3]) * 1000
        first = spool.backlog.first() if spool.backlog is not None else None
        if first is not None:
            return int(first[3]) * 1000
        return int(spool.tail[0][0].clock_ms) if spool.tail else 0

    # `$share` groups --------------------------------------------------------------------------------------------

    def take_shared(self, over: bool = False) -> list[Any]:
        """What was sent or queued through a shared subscription and another connected member may have: QoS 1 in flight
        and what queues in memory. QoS 2 already sent waits for this client [MQTT-4.8.2-4], and so does what queues on
        disk. It is removed, but for what is in flight and stored: that waits for `moved`.

        When the session is `over`, any member will do, and what is on disk and still in memory is taken too."""
        taken = []
        inflight = self.inflight
        if inflight is not None and inflight.refs is not None:
            for ident, state, _, _, ref in inflight.entries():
                if ref is not None and ref[1] is not None and state == SENT and self._leaves(ref[1], ref[2], over):
                    pending = inflight.stored_of(ident)
                    seq = self._seq_of(ident) if pending is not None else 0
                    if pending is None:
                        inflight.remove(ident)
                    taken.append((ref[2], ref[3], ref[4], ref[5], ref[0], ref[1], seq, pending))
        self.queue = self._without_shared(self.queue, taken, over)
        if self.spool is not None:
            self.spool.tail = self._without_shared(self.spool.tail, taken, over)
        return taken

    def _seq_of(self, ident: int) -> int:
        """The sequence number of what is in flight under this packet identifier."""
        spool = self.spool
        assert spool is not None
        return spool.floor + (ident - (spool.floor - 1) % 65535 - 1 + 65535) % 65535

    def _leaves(self, group: Any, message: Message, over: bool) -> bool:
        return bool(group.members) if over else bool(group.elsewhere(self, message))

    def group_of(self, mark: int) -> Any:
        """The `$share` group with this mark, if the session is a member."""
        for subscription in self.subscriptions or ():
            if subscription.group is not None and subscription.group.mark == mark:
                return subscription.group
        return None

    def take_queued(self, group: Any) -> list[Any]:
        """Remove and return what queues in memory through a group that the session has left."""
        taken: list[Any] = []
        self.queue = _without(self.queue, group, taken)
        if self.spool is not None:
            self.spool.tail = _without(self.spool.tail, group, taken)
        for entry in taken:
            self.queue_bytes -= entry[0].size
        return taken

    def _without_shared(self, queue: Any, taken: list[Any], over: bool) -> Any:
        if queue is None:
            return None
        kept: Any = deque()
        for entry in queue:
            on_disk = not over and entry[7] is not None and entry[7].state != OPEN
            if entry[5] is None or on_disk or not self._leaves(entry[5], entry[0], over):
                kept.append(entry)
            else:
                self.queue_bytes -= entry[0].size
                taken.append(entry)
        return kept if kept else None

    def moved(self, entry: Any) -> None:
        """Another member of the group has what `take_shared` returned."""
        message, seq, pending = entry[0], entry[6], entry[7]
        spool = self.spool
        if pending is None or spool is None:
            return
        copy = message.pending
        in_flight = self.inflight is not None and self.inflight.stored_of((seq - 1) % 65535 + 1) is pending
        if (pending.state == STORED or pending.state == WRITING) and copy is not None and copy.state == OPEN:
            self.core.journal.moves(message, spool, seq)
            if in_flight:
                if self.inflight is not None:
                    self.inflight.attach((seq - 1) % 65535 + 1, None)  # it moves once
                return
        if in_flight:
            spool.gave(seq)
        else:
            spool.finish(seq, pending, self.inflight)


def _purged(queue: Any, filter_topics: Any, given_up: list[Any]) -> Any:
    """What stays of a queue; the rest is added to `given_up`."""
    if queue is None:
        return None
    kept: Any = deque()
    for entry in queue:
        (kept if filter_topics(entry[0].topic) else given_up).append(entry)
    return kept if kept else None


def _without(queue: Any, group: Any, taken: list[Any]) -> Any:
    if queue is None:
        return None
    kept: Any = deque()
    for entry in queue:
        (taken if entry[5] is group else kept).append(entry)
    return kept if kept else None
