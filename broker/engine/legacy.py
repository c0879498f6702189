"""What members of `$share` groups leave behind goes to the other members: at once what is in memory, and when a session
ends also what is on disk.

What is on disk is read back first, a batch at a time and one session after the other, as only the records say which
message came through which group. Nothing waits for it: the client may long be here again with a new session. A message
is given away and given up in one record (`records.TAKER_MOVED`), so that a crash leaves it in one place. QoS 1 goes to
another member even if it may have been sent, QoS 2 only if it never was [MQTT-4.8.2-5]. What came through no group is
dropped, as the session is over; so is what no member is left for.
"""

from collections import deque
from typing import Any

from broker.engine.core import Core
from broker.engine.groups import ShareGroup
from broker.engine.message import Message
from broker.engine.session import Session
from broker.engine.spool import IN_MEMORY_BYTES, LOAD, Spool
from broker.engine.topics import matches


class Legacies:
    """Of one engine, whose `groups` these are. `go_on` is called with every tick; one batch is on its way at most."""

    def __init__(self, core: Core, groups: dict[tuple[bytes, bytes], ShareGroup]) -> None:
        self.core = core
        self.groups = groups
        self.sessions: deque[Session] = deque()
        """Ended sessions with something on disk; the first is being read, and goes behind the others when nobody has
        room for what is next."""
        self._busy = False
        self._by_mark: dict[int, ShareGroup] = {}

    def hand_on(self, session: Session, entries: list[Any]) -> None:
        """Others get at once what this session had in memory: what `Session.take_shared` returned."""
        for entry in entries:
            entry[5].again(entry[0], entry[4])
            if entry[7] is not None:
                self.core.journal.hurry(entry[0])
                session.moved(entry)

    def give_up(self, session: Session, spool: Spool, leaves: bool) -> None:
        """The session is over: its messages are given up, but for those on disk if it `leaves` some to others."""
        if leaves:
            spool.fold()
        on_disk, spool.backlog = (spool.backlog, None) if leaves and spool.backlog else (None, spool.backlog)
        spool.forget_all()
        inflight = session.inflight
        if inflight is not None:
            # all numbers before the first is done: they are counted from the floor, which moves then
            kept = [(session._seq_of(entry[0]), inflight.stored_of(entry[0])) for entry in inflight.entries()]
            for seq, pending in kept:
                if pending is not None:
                    spool.finish(seq, pending, None)
        if on_disk is not None:
            spool.backlog = on_disk
            spool.floor = spool.sent = on_disk.first()[0]
            self.core.journal.leave(spool)
            self.add(session)
            return
        session.spool = None
        session.stored = False
        self.core.journal.end(spool)

    def add(self, session: Session) -> None:
        """The session is over; its spool says so on disk and holds nothing but its backlog."""
        self.sessions.append(session)

    def go_on(self) -> None:
        """Read the next batch, unless one is on its way or nothing can be written."""
        journal = self.core.journal
        if self._busy or not self.sessions or journal.refusing:
            return
        spool = self.sessions[0].spool
        assert spool is not None
        taken = spool.backlog.take(LOAD, IN_MEMORY_BYTES) if spool.backlog is not None else []
        self._busy = True
        if taken:
            spool.loading = taken
            journal.load(spool, taken, self._loaded)
            return
        if spool.backlog is not None:
            spool.backlog.close()
            spool.backlog = None
        journal.end(spool)
        session = self.sessions.popleft()
        session.spool = None
        session.stored = False
        self._by_mark = {}
        journal.after(self._written)

    def _loaded(self, taken: list[Any], messages: list[Any]) -> None:
        session = self.sessions[0]
        spool = session.spool
        assert spool is not None
        entries, spool.loading = spool.loading or [], None  # they may have moved while they were read
        self._by_mark = {group.mark: group for group in self.groups.values()}
        for i, (entry, found) in enumerate(zip(entries, messages, strict=True)):
            seq, position = entry[:2]
            if found is not None and not self._pass_on(session, seq, *found):
                spool.backlog.push_front(entries[i:])
                self.sessions.rotate(-1)
                self._busy = False
                return
            spool.passed(seq, None)
            spool.finish_place(seq, position)
        self.core.journal.after(self._written)

    def _written(self, written: bool) -> None:
        self._busy = False
        if written and not self.core.journal.pace.rate:  # else one batch a tick
            self.go_on()

    def _pass_on(self, session: Session, seq: int, message: Message, taker: Any) -> bool:
        """False when the members have no room at present."""
        core = self.core
        spool = session.spool
        assert spool is not None
        if not taker.group or (taker.qos == 2 and seq < spool.held_below):
            return True
        if message.expires != 0 and message.expires <= core.now:
            core.drop("expired", 1, session)
            return True
        age = core.limits.max_queued_age
        if age and message.clock_ms < core.clock() - age * 1000:
            core.drop("too_old", 1, session)
            return True
        group = self._find(taker.group, message)
        if group is None:
            core.drop("no_member", 1, session)
            return True
        try:
            member = group.with_room(message)
        except LookupError:
            core.drop("unauthorized", 1, session)
            return True
        if member is None:
            return False
        if not group.give(member, message):
            return False
        core.journal.moves(message, spool, seq)
        return True

    def give(self, message: Message, mark: int) -> bool:
        """Give a message to a member of this group at once; False when there is none that may have it."""
        group = self._find(mark, message)
        return group is not None and group.publish(message, None, None)

    def _find(self, mark: int, message: Message) -> ShareGroup | None:
        """The group with this mark that this message belongs to; two may share a mark, it has 32 bits."""
        group = self._by_mark.get(mark)
        if group is None or not group.members:
            self._by_mark = {group.mark: group for group in self.groups.values()}
            group = self._by_mark.get(mark)
        return group if group is not None and matches(group.filter, message.topic) else None
