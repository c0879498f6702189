"""Retained messages that subscriptions of persistent sessions have been promised and their clients not been sent yet.

SUBACK promises them, and they follow as fast as the client takes them. The record of the subscription therefore says up
to which moment they are owed, and a later one, once all of them are in flight or queue on disk, that none are. Between
the two a restart finds again what is still owed: what the filter covers and was there before the subscription, but for
what the session has had since.
"""

from collections import deque
from typing import Any

from broker.engine.core import Core
from broker.engine.message import Message
from broker.engine.session import Session


class Debt:
    """A subscription whose retained messages have not all been sent: those that came up to a moment of the store's
    clock. Of what a restart finds, `left` names the topics a snapshot has left over, `had` the messages since."""

    def __init__(self, until: int, left: set[bytes] | None = None) -> None:
        self.until = until
        self.left = left
        self.had: set[bytes] = set()
        self.answered = False
        """SUBACK was sent, or never will be."""

    def covers(self, message: Message) -> bool:
        """Whether a retained message that the filter matches is owed still."""
        if message.clock_ms > self.until or bytes.fromhex(message.ident) in self.had:
            return False
        return self.left is None or message.topic in self.left


class Owed:
    """Of one engine. `look` is called with every tick."""

    def __init__(self, core: Core, subscriptions: Any) -> None:
        self.core = core
        self.subscriptions = subscriptions
        self._debts: dict[Session, dict[bytes, Debt]] = {}
        self._asked = False
        """A commit is on its way after which what was paid needs no record."""

    def promise(self, session: Session, filter: bytes) -> int:
        """A subscription's retained messages are to be sent after SUBACK; returns the moment its record is to name."""
        debt = Debt(self.core.clock())
        self._debts.setdefault(session, {})[filter] = debt
        return debt.until

    def answered(self, session: Session, filters: list[bytes]) -> None:
        """SUBACK was sent for these subscriptions: what was promised is in `session.retained`."""
        debts = self._debts.get(session, {})
        for filter in filters:
            if filter in debts:
                debts[filter].answered = True

    def hung_up(self, session: Session) -> None:
        """The connection is gone: a SUBACK not sent yet will never be, and promises nothing."""
        for debt in self._debts.get(session, {}).values():
            debt.answered = True

    def forget(self, session: Session) -> None:
        """The session is over."""
        self._debts.pop(session, None)

    def look(self) -> None:
        """Send on what a full disk has held up. When all of a session's are sent or queue, they are on disk after the
        next commit: then nothing is owed."""
        for session in self._debts:
            if session.retained is not None:
                session.drain()
        if self._asked or not self._debts:
            return
        paid = [
            (session, filter, debt)
            for session, debts in self._debts.items()
            if session.retained is None
            for filter, debt in debts.items()
            if debt.answered
        ]
        if paid:
            self._asked = True
            self.core.journal.flush()
            self.core.journal.after(lambda written: self._paid(paid, written))

    def _paid(self, paid: list[tuple[Session, bytes, Debt]], written: bool) -> None:
        self._asked = False
        if not written:
            return
        for session, filter, debt in paid:
            debts = self._debts.get(session, {})
            if debts.get(filter) is debt:  # else the client has subscribed again
                del debts[filter]
                if not debts:
                    del self._debts[session]
                self.subscriptions.paid(session, filter)

    def fields(self, session: Session) -> dict[str, Any]:
        """What a snapshot of this session says: the filters, and which of their topics are left."""
        debts = self._debts.get(session)
        if debts is None:
            return {}
        owed = [[filter.decode(), debt.until] for filter, debt in debts.items()]
        if not all(debt.answered for debt in debts.values()):
            return {"owed": owed}
        return {"owed": owed, "left": [topic.decode() for topic in _left(session)]}

    def restore(self, session: Session, debts: dict[str, Debt]) -> None:
        """After a restart. Whether the client may have them is asked when it is back, as with all it has queued."""
        retained: deque[tuple[Message, int, Any]] = deque()
        for filter, debt in debts.items():
            raw = filter.encode()
            for entry in self.subscriptions.retained_of(session, raw):
                if entry[1] and debt.covers(entry[0]):
                    retained.append(entry)
            debt.answered = True
            self._debts.setdefault(session, {})[raw] = debt
        session.retained = retained or None


def _left(session: Session) -> list[bytes]:
    """Topics of what is still to be sent, and of what was sent or queues but is not on disk."""
    left = [message.topic for message, qos, _ in session.retained or () if qos]
    inflight, spool = session.inflight, session.spool
    if inflight is not None:
        pendings = [inflight.stored_of(entry[0]) for entry in inflight.entries()]
        left += [pending.message.topic for pending in pendings if pending is not None and pending.message is not None]
    for entry in (*(session.queue or ()), *((spool.tail if spool is not None else None) or ())):
        if entry[7] is not None and entry[7].message is not None:
            left.append(entry[0].topic)
    return left
