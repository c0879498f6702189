"""The stored side of one session: its order, what of it is acknowledged, and what waits on disk.

Every message a persistent session must get has a sequence number, and its packet identifier follows from it: after a
crash a message has the identifier it had before, so a QoS 2 receiver recognises it and nothing has to be written when
a message is sent. A message waits in one of four places, oldest first: `session.queue` (in memory), being `loading`,
`backlog` (on disk), `tail` (in memory until it is on disk).
"""

from collections import deque
from time import thread_time
from typing import Any

from broker.engine.backlog import Backlog
from broker.engine.inflight import FREE, RELEASED, SENT, Inflight
from broker.engine.message import Message

OPEN = 0
"""Only in memory."""
WRITING = 1
STORED = 2
GONE = 3
"""Acknowledged by everybody before it was written."""
FAILED = 4
"""Could not be written; its publisher was told."""

IN_MEMORY = 512
"""Messages of one session that may wait in memory besides those in flight; the rest is read back when it is time."""
LOAD = 256
"""Messages read back at once."""
IN_MEMORY_BYTES = 1 << 20
"""Bytes of a session's waiting messages, by the size of the newest, after which they are left on disk; and bytes read
back at once."""


class Pending:
    """One message on its way to disk, shared by all that must keep it. The first taker stands in the object itself."""

    def __init__(self, message: Message | None) -> None:
        self.message = message
        self.spool: Spool | None = None
        self.seq = 0
        self.qos = 0
        self.retain = False
        self.idents: Any = None
        self.group = 0
        """The mark of the `$share` group it came through, 0 for none."""
        self.more: list[Any] | None = None
        """Further takers as tuples (spool, seq, qos, retain, idents, group)."""
        self.left = 0
        """Takers that have not acknowledged."""
        self.hold: Any = None
        self.publisher: Spool | None = None
        """The session whose QoS 2 identifier is kept with the message."""
        self.publisher_ident = 0
        self.retained = False
        self.replaces: Message | None = None
        """The retained message on disk whose place this one takes as soon as it is there too."""
        self.moved: list[tuple[Spool, int]] | None = None
        """(spool, seq) of sessions that give their copy up once this one is on disk, because a `$share` member is gone.
        The record names them too, so that no crash comes between."""
        self.urgent = False
        self.state = OPEN
        self.position = 0

    def add(self, spool: "Spool", seq: int, qos: int, retain: bool, idents: Any, group: int) -> None:
        """One more session must get the message."""
        self.left += 1
        if self.spool is None and self.more is None:
            self.spool = spool
            self.seq = seq
            self.qos = qos
            self.retain = retain
            self.idents = idents
            self.group = group
        else:
            if self.more is None:
                self.more = []
            self.more.append((spool, seq, qos, retain, idents, group))

    def drop(self, spool: "Spool", seq: int) -> None:
        """This session does not need it any more."""
        if self.spool is spool and self.seq == seq:
            self.spool = None
            if self.more is None:
                self.more = []  # the place of the first taker is not given again
        elif self.more is not None:
            for i in range(len(self.more)):
                entry = self.more[i]
                if entry[0] is spool and entry[1] == seq:
                    del self.more[i]
                    break
            else:
                return
        else:
            return
        self.left -= 1

    def takers(self) -> list[Any]:
        """(spool, seq, qos, retain, idents, group) of everybody who has not acknowledged."""
        found: list[Any] = []
        if self.spool is not None:
            found.append((self.spool, self.seq, self.qos, self.retain, self.idents, self.group))
        if self.more:
            found.extend(self.more)
        return found


def stored_at(position: int) -> Pending:
    """A message that is on disk already."""
    pending = Pending(None)
    pending.state = STORED
    pending.position = position
    return pending


class Spool:
    """`number` names the session in the journal. `floor` and `sent`: everything below `floor` is done, everything below
    `sent` has left the queue."""

    def __init__(self, session: Any, journal: Any, number: int) -> None:
        self.session = session
        self.journal = journal
        self.number = number
        self.next_seq = 1
        self.sent = 1
        self.floor = 1
        self.again_below = 0
        """Messages below this number may have been sent before the last crash: they carry DUP."""
        self.held_below = 0
        """Of QoS 2 only those below this number may have been."""
        self.backlog: Any = None
        self.tail: Any = None
        self.loading: list[Any] | None = None
        self.holds: dict[int, Any] | None = None
        """Holds of messages that wait on disk, of an instance whose publishers are told when it has them."""
        self.done: list[int] | None = None
        """Acknowledged out of order and not yet recorded."""
        self.gone: set[int] | None = None
        """Taken out of the middle of the queue."""
        self.marks: set[int] | None = None
        """QoS 2 identifiers of this client's messages that are on disk."""
        self.marking: dict[int, Pending] | None = None
        """Those of messages on their way there."""
        self.dirty = False
        self.paused = False
        """What comes next is read back when the journal's pace allows."""
        self.segment = 0
        """Where the session's last snapshot is; 0 before the first."""
        self.over = False
        """The session has ended, and what it left waits to be given to others (`legacy.py`)."""

    # what is finished -----------------------------------------------------------------------------------------

    def finish(self, seq: int, pending: Pending | None, inflight: Inflight | None) -> None:
        """A message of this session needs no keeping: acknowledged, dropped or expired."""
        if pending is not None:
            state = pending.state
            if state == OPEN:
                pending.drop(self, seq)
                if pending.left == 0:
                    self.journal.settled(pending)
            elif state == WRITING:
                pending.drop(self, seq)
                self.note(seq)
            elif state == STORED:
                self.journal.free(pending.position)
                self.note(seq)
        if seq >= self.sent:
            self.skip(seq)
        elif seq == self.floor:
            self.advance(inflight)

    def note(self, seq: int) -> None:
        """The journal is to learn that this number is done."""
        if self.done is None:
            self.done = [seq]
        else:
            self.done.append(seq)
        if not self.dirty:
            self.dirty = True
            self.journal.touch(self)

    def advance(self, inflight: Inflight | None) -> None:
        """Move the floor over everything done."""
        floor = self.floor
        sent = self.sent
        while floor < sent and (inflight is None or inflight.state((floor - 1) % 65535 + 1) == FREE):
            floor += 1
        self.floor = floor
        if self.gone is not None:
            self.gone = {seq for seq in self.gone if seq >= sent} or None

    def passed(self, seq: int, inflight: Inflight | None) -> None:
        """The queue is past this number: what comes next is above it."""
        if seq >= self.sent:
            self.sent = seq + 1
            self.advance(inflight)

    def completed(self, seq: int, inflight: Inflight | None) -> None:
        """QoS 2: PUBCOMP came for a message whose place was freed at PUBREC."""
        self.note(seq)
        if seq >= self.sent:
            self.skip(seq)
        elif seq == self.floor:
            self.advance(inflight)

    def gave(self, seq: int) -> None:
        """Another session keeps what is in flight here (`Pending.moved`). A client that is back has it once more."""
        session = self.session
        inflight = session.inflight
        if session.spool is not self or session.outbox is not None or inflight is None:
            return
        if not self.floor <= seq < self.sent:
            return
        ident = (seq - 1) % 65535 + 1
        if inflight.state(ident) != SENT:
            return
        pending = inflight.stored_of(ident)
        inflight.remove(ident)
        self.finish(seq, pending, inflight)

    def skip(self, seq: int) -> None:
        """A number that will not be sent, somewhere in what waits."""
        if self.gone is None:
            self.gone = set()
        self.gone.add(seq)
        self.close_gap()

    def close_gap(self) -> None:
        """Where nothing waits any more, what was taken out of the middle is behind us."""
        if not self.session.queue and not self.waiting:
            self.sent = self.next_seq
            self.gone = None
            self.advance(self.session.inflight)

    def finish_place(self, seq: int, position: int) -> None:
        """As `finish`, of a message that waited on disk."""
        self.journal.free(position)
        self.note(seq)
        if seq >= self.sent:
            self.skip(seq)
        if self.holds is not None:
            hold = self.holds.pop(seq, None)
            if hold is not None:
                hold.release()

    def place(self, entry: Any) -> Any:
        """What is kept of a queue entry whose message is on disk."""
        if entry[4] is not None:
            if self.holds is None:
                self.holds = {}
            self.holds[entry[6]] = entry[4]
        return entry[6], entry[7].position, entry[0].size, (entry[0].clock_ms + 999) // 1000

    # what waits -----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Messages that are not in `session.queue` and not in flight."""
        count = 0
        if self.backlog is not None:
            count += len(self.backlog)
        if self.tail is not None:
            count += len(self.tail)
        if self.loading is not None:
            count += len(self.loading)
        return count

    def waiting_on_disk(self) -> list[Any]:
        """Every entry that is read back or not yet, oldest first; what waits is left as it is."""
        found = list(self.loading or ())
        if self.backlog is not None:
            entries = self.backlog.take(len(self.backlog))
            self.backlog.push_front(entries)
            found.extend(entries)
        return found

    def put_aside(self, entry: Any) -> None:
        """Keep a queue entry until it is on disk, then only its place."""
        if self.tail is None:
            self.tail = deque()
        self.tail.append(entry)

    def settle(self) -> None:
        """Something was written: what is on disk needs no memory, unless its turn is near."""
        session = self.session
        while tail := self.tail:  # whoever is told of a discarded one may go on publishing
            entry = tail[0]
            pending = entry[7]
            if pending.state == FAILED:
                tail.popleft()
                session.discard(entry, "store_failed")
                continue
            if pending.state != STORED:
                break
            near = session.outbox is not None and self.backlog is None and self.loading is None
            count = len(tail) + (len(session.queue) if session.queue is not None else 0)
            if near and count <= IN_MEMORY and count * entry[0].size <= IN_MEMORY_BYTES:
                break
            tail.popleft()
            self._to_backlog().append(*self.place(entry))
        if not self.tail:
            self.tail = None
        if session.outbox is not None:
            session.drain()

    def _to_backlog(self) -> Any:
        if self.backlog is None:
            self.backlog = Backlog(self.journal.scratch)
        return self.backlog

    def refill(self) -> bool:
        """The queue in memory has run short: True when there is more of it now, False when there is none or it is
        being read."""
        if self.loading is not None or self.paused:
            return False
        if self.backlog is not None:
            if self.journal.pace.admits(self):
                self.load()
            else:
                self.paused = True
            return False
        tail = self.tail
        if not tail:
            return False
        session = self.session
        if session.queue is None:
            session.queue = deque()
        for _ in range(min(len(tail), LOAD)):
            session.queue.append(tail.popleft())
        if not tail:
            self.tail = None
        return True

    def go_on(self) -> int:
        """The pace allows to read on; how many messages that are."""
        self.paused = False
        if self.session.outbox is None or self.session.spool is not self or self.backlog is None or self.loading:
            return 0
        self.load()
        return len(self.loading or ())

    def pause(self) -> None:
        """Nothing of what waits is sent until everything noted so far is on disk, or turned out not to get there."""
        self.paused = True
        self.journal.after(lambda written: self._resume())

    def _resume(self) -> None:
        self.paused = False
        if self.session.spool is self and self.session.outbox is not None:
            self.session.drain()

    def load(self) -> None:
        """Read the next messages back from disk."""
        taken = self.backlog.take(LOAD, IN_MEMORY_BYTES)
        if not len(self.backlog):
            self.backlog.close()
            self.backlog = None
        if taken:
            self.loading = taken
            self.journal.load(self, taken, self.loaded)

    def loaded(self, taken: list[Any], messages: list[Any]) -> None:
        """`messages` are (message, taker) for each of the entries that were asked for; None for one that cannot be
        read."""
        if self.loading is not taken:  # given up or put back meanwhile
            return
        began = thread_time()
        self.loading = None
        session = self.session
        queue = session.queue
        if queue is None:
            queue = session.queue = deque()
        given_up = []
        for entry, found in zip(taken, messages, strict=True):
            seq, position, size, _ = entry
            reason = "unreadable" if found is None else session.outdated(found[0])
            if reason:
                session.queue_bytes -= size
                given_up.append((seq, position, reason, found))
                continue
            message, taker = found
            hold = self.holds.pop(seq, None) if self.holds is not None else None
            group = session.group_of(taker.group) if taker.group else None
            queue.append((message, taker.qos, taker.retain, taker.idents, hold, group, seq, stored_at(position)))
        # only now: a message passed on may free a publisher, whose next one comes behind these
        for seq, position, reason, found in given_up:
            if reason != "unsubscribed" or not self.journal.pass_on(self, seq, *found):
                session.count_drop(reason)
            self.finish_place(seq, position)
        session.drain()
        self.journal.pace.handled(len(taken), thread_time() - began)

    def fold(self) -> None:
        """The connection is gone: what was read back or is written already needs no memory."""
        session = self.session
        if self.loading is not None:
            self._to_backlog().push_front(self.loading)
            self.loading = None
        queue = session.queue
        if not queue:
            return
        front = []
        kept: Any = deque()
        aside: Any = deque()
        for entry in queue:
            pending = entry[7]
            if pending is None:
                kept.append(entry)
            elif pending.state == STORED and not aside:
                front.append(self.place(entry))
            else:
                aside.append(entry)
        if front:
            self._to_backlog().push_front(front)
        if aside:
            if self.tail is not None:
                aside.extend(self.tail)
            self.tail = aside
        session.queue = kept if kept else None

    def drop_oldest(self, reason: str) -> bool:
        """Give up the oldest message that waits; False when none does."""
        session = self.session
        if session.queue:
            entry = session.queue.popleft()
            if entry[7] is not None:
                self.passed(entry[6], session.inflight)
            session.discard(entry, reason)
            return True
        # what is being read back is given up as well: while a disk is slow, a queue keeps to its quota too
        waiting = self.loading or (self.backlog.take(1) if self.backlog is not None else None)
        if waiting:
            seq, position, size, _ = waiting.pop(0)
            session.queue_bytes -= size
            session.count_drop(reason)
            self.passed(seq, session.inflight)
            self.finish_place(seq, position)
            return True
        if self.tail:
            entry = self.tail.popleft()
            self.passed(entry[6], session.inflight)
            session.discard(entry, reason)
            return True
        return False

    def forget_all(self, reason: str = "") -> None:
        """Give up everything that waits; `reason` counts it. The caller has a snapshot taken, or ends the session."""
        session = self.session
        count = 0
        waiting = self.loading
        while True:
            for _, position, size, _ in waiting or ():
                session.queue_bytes -= size
                self.journal.free(position)
                count += 1
            waiting = self.backlog.take(4096) if self.backlog is not None else None
            if not waiting:
                break
        self.loading = None
        if self.backlog is not None:
            self.backlog.close()
            self.backlog = None
        if reason and count:
            session.count_drop(reason, count)
        given_up = [*(session.queue or ()), *(self.tail or ())]
        holds = list((self.holds or {}).values())
        self.holds = None
        session.queue = None
        self.tail = None
        self.sent = self.next_seq
        self.gone = None
        for entry in given_up:  # whoever is told may publish to this very session
            session.discard(entry, reason)
        for hold in holds:
            hold.release()
        self.advance(session.inflight)

    # for the journal ------------------------------------------------------------------------------------------

    def alive(self, seq: int, position: int) -> bool:
        """Whether the record at this position is what keeps this message for the session."""
        if seq < self.floor:
            return False
        inflight = self.session.inflight
        if inflight is not None and inflight.count:
            ident = (seq - 1) % 65535 + 1
            if inflight.state(ident) not in (FREE, RELEASED) and seq < self.sent:
                pending = inflight.stored_of(ident)
                return pending is not None and pending.position == position
        if seq < self.sent:
            return False
        for entry in self.session.queue or ():
            if entry[6] == seq and entry[7] is not None:
                return bool(entry[7].position == position)
        if self.loading is not None:
            for entry in self.loading:
                if entry[0] == seq:
                    return bool(entry[1] == position)
        if self.backlog is not None and self.backlog.place_of(seq) == position:
            return True
        for entry in self.tail or ():
            if entry[6] == seq:
                return bool(entry[7].position == position)
        return False

    def relocate(self, seq: int, position: int) -> None:
        """The record of a message that is `alive` was copied."""
        inflight = self.session.inflight
        if inflight is not None and seq < self.sent:
            inflight.stored_of((seq - 1) % 65535 + 1).position = position
            return
        for entry in self.session.queue or ():
            if entry[6] == seq and entry[7] is not None:
                entry[7].position = position
                return
        if self.loading is not None:
            for i, entry in enumerate(self.loading):
                if entry[0] == seq:
                    self.loading[i] = (seq, position, entry[2], entry[3])
                    return
        if self.backlog is not None and self.backlog.relocate(seq, position):
            return
        for entry in self.tail or ():
            if entry[6] == seq:
                entry[7].position = position
                return

    def open_numbers(self) -> tuple[list[int], list[int]]:
        """(sent and not acknowledged, released) for a snapshot."""
        inflight = self.session.inflight
        unacknowledged: list[int] = []
        released: list[int] = []
        if inflight is not None and inflight.count:
            first = (self.floor - 1) % 65535 + 1
            for ident, state, _, _, _ in inflight.entries():
                seq = self.floor + (ident - first) % 65535
                (released if state == RELEASED else unacknowledged).append(seq)
        return unacknowledged, released
