"""What must survive a restart, from when the engine says so until the next commit takes it.

A message somebody must keep becomes a `Pending`. If it has been sent to an online client it rests for one to two
`LINGER`s first: what everybody acknowledges meanwhile is never written, and its publisher has the acknowledgement
already. All else is for the next commit: records of sessions, entries of the key-value table, replies and holds that
wait for what was noted before them.
"""

from collections.abc import Callable
from typing import Any

from broker.engine import records
from broker.engine.core import Core
from broker.engine.message import Message
from broker.engine.spool import GONE, OPEN, STORED, WRITING, Pending, Spool

LINGER = 0.0025
"""Seconds; a message sent to an online client is written if it is still unacknowledged after one to two of them."""


class Commit:
    """What waits for one write."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        """(pending, frame, offset in its body)"""
        self.snapshots: list[tuple[Spool, int]] = []
        self.values: list[tuple[bytes, int]] = []
        self.copies: list[Any] = []
        """(takers, retained message, old position, frame, offset)"""
        self.replies: dict[Any, bytearray] = {}
        self.callbacks: list[Callable[[bool], None]] = []
        self.holds: list[Any] = []
        self.notes: list[bytes] = []
        """Records that are not messages: written again after the disk was full."""
        self.ends: list[tuple[str, bytes]] = []


class Intake:
    """The side of the journal that the engine speaks to. `call_later(seconds, callback)` is given.

    `clock_ms` is the store's clock now: it goes on from where the last run ended, by the time that has passed.
    """

    def __init__(
        self, core: Core, store: Any, call_later: Callable[[float, Callable[[], None]], Any], clock_ms: int
    ) -> None:
        self.core = core
        self.store = store
        self.call_later = call_later
        self.spools: dict[int, Spool] = {}
        self.values: dict[bytes, bytes] = {}
        """The key-value table."""
        self.live: dict[int, int] = {}
        """Records alive in each segment."""
        self.next_number = 1
        self.retained: Any = None
        """The store of retained messages."""
        self.heirs: Callable[[Message, int], bool] | None = None
        """Gives a message to a member of the `$share` group with this mark; False when none takes it."""
        self.owed: Callable[[Any], dict[str, Any]] | None = None
        """What a session's snapshot is to say of the retained messages it is owed."""
        self.ending: dict[str, int] = {}
        """Client ids whose session is over, but not on disk yet."""
        self._value_segments: dict[bytes, int] = {}
        self._origin_clock = clock_ms
        self._origin_now = core.now
        core.clock_base = clock_ms - core.now * 1000
        self._hot: list[Pending] = []
        self._young: list[Pending] = []
        self._old: list[Pending] = []
        self._dirty: list[Spool] = []
        self._notes: list[Any] = []
        """Records to write first: bytes, or a Spool whose snapshot is due, or (key,) of a table entry."""
        self._ends: list[tuple[str, bytes]] = []
        """Sessions that are over. Written last: what moved from them to others is stored before it is forgotten."""
        self._copies: list[Any] = []
        self._freed: dict[Spool, list[int]] = {}
        self._next = Commit()
        self._outstanding: dict[int, Commit] = {}
        self._scheduled = False
        self._ticking = False

    def _commit(self) -> None:
        raise NotImplementedError

    # clock ----------------------------------------------------------------------------------------------------

    def clock_ms(self) -> int:
        """The store's clock, milliseconds."""
        return self._origin_clock + int((self.core.now - self._origin_now) * 1000)

    def to_clock(self, when: float) -> int:
        """A moment of the engine's clock on the store's; 0 stays 0 (never)."""
        if when == 0:
            return 0
        return max(1, self._origin_clock + int((when - self._origin_now) * 1000))

    def from_clock(self, clock_ms: int) -> float:
        """The reverse of `to_clock`."""
        if clock_ms == 0:
            return 0.0
        return self._origin_now + (clock_ms - self._origin_clock) / 1000.0

    @property
    def refusing(self) -> str:
        """Why nothing more can be kept at present; empty when it can."""
        reason: str = self.store.refusing
        return reason

    # messages -------------------------------------------------------------------------------------------------

    def take(
        self,
        message: Message,
        spool: Spool,
        seq: int,
        qos: int,
        retain: bool,
        idents: Any,
        group: int,
        hold: Any,
        urgent: bool,
    ) -> Pending:
        """This session must get the message, through the `$share` group with this mark if not 0. `hold` is released
        when it is on disk or need not be."""
        pending: Pending | None = message.pending
        if pending is None or pending.state != OPEN:
            if message.clock_ms == 0:
                self.core.stamp(message)
            pending = message.pending = Pending(message)
            self._enter(pending, urgent)
        elif urgent and not pending.urgent:
            self._hurry(pending)
        pending.add(spool, seq, qos, retain, idents, group)
        if hold is not None and pending.hold is None:
            pending.hold = hold
            hold.count += 1
        return pending

    def _enter(self, pending: Pending, urgent: bool) -> None:
        if urgent:
            pending.urgent = True
            self._hot.append(pending)
            self.wake()
        else:
            self._young.append(pending)
            self._tick_soon()

    def _hurry(self, pending: Pending) -> None:
        pending.urgent = True
        self._hot.append(pending)
        self.wake()

    def hurry(self, message: Message) -> None:
        """The message goes out with the next commit."""
        pending: Pending | None = message.pending
        if pending is not None and pending.state == OPEN and not pending.urgent:
            self._hurry(pending)

    def settled(self, pending: Pending) -> None:
        """Nobody needs this unwritten message any more; its record may still have to say that it was taken: sent again
        after a crash, it would count as new, and as later than what came behind it."""
        if pending.retained or pending.publisher is not None:
            return
        pending.state = GONE
        pending.message = None
        if pending.moved is not None:
            self._given(pending)
        hold = pending.hold
        if hold is not None:
            pending.hold = None
            hold.release()

    def _given(self, pending: Pending) -> None:
        """What moved to other sessions is safe there: those that had it before may forget it."""
        moved = pending.moved
        pending.moved = None
        for spool, seq in moved or ():
            spool.gave(seq)

    def retain(self, message: Message, old: Message | None, hold: Any) -> None:
        """The message is its topic's retained one now, in place of `old`, which is kept until this one is on disk."""
        pending: Pending | None = message.pending
        if pending is None or pending.state != OPEN:
            if message.clock_ms == 0:
                self.core.stamp(message)
            pending = message.pending = Pending(message)
            # the record of the old one may go as soon as everything urgent is handed over
            self._enter(pending, hold is not None or old is not None)
        pending.retained = True
        message.kept = pending
        if hold is not None and pending.hold is None:
            pending.hold = hold
            hold.count += 1
        if old is not None:
            pending.replaces = self._superseded(old)

    def _superseded(self, old: Message) -> Message | None:
        """What stays on disk until the successor of `old` is there: itself, or what it was to replace."""
        pending: Pending | None = old.kept
        if pending is None or pending.state != OPEN:
            return old
        before = pending.replaces
        pending.replaces = None
        self.drop_retained(old)
        return before

    def _put_back(self, pending: Pending) -> None:
        """A topic's retained message could not be written: the one before it counts again."""
        message = pending.message
        before = pending.replaces
        pending.retained = False
        pending.replaces = None
        assert message is not None
        message.kept = None
        current = self.retained.get(message.topic)
        if current is message:
            self.retained.clear(message.topic)
            if before is not None:
                self.retained.put(before)
        elif current is not None and current.kept is not None and current.kept.replaces is message:
            current.kept.replaces = before

    def kept_at(self, topic: bytes, position: int) -> Message | None:
        """The retained message of a topic, or the one it is about to replace, whose record is at this position."""
        message: Message | None = self.retained.get(topic) if self.retained is not None else None
        while message is not None and message.kept is not None:
            if message.kept.state == STORED and message.kept.position == position:
                return message
            message = message.kept.replaces
        return None

    def unretain(self, old: Message, hold: Any) -> None:
        """The retained message was removed; `hold` waits until that is on disk."""
        self.drop_retained(old)
        self.note(records.encode_cleared(old.topic), hold is not None)
        if hold is not None:
            hold.count += 1
            self._next.holds.append(hold)

    def drop_retained(self, old: Message) -> None:
        """The message is not its topic's retained one any more."""
        pending: Pending | None = old.kept
        old.kept = None
        if pending is None:
            return
        pending.retained = False
        before = pending.replaces
        if before is not None:
            pending.replaces = None
            self.drop_retained(before)
        if pending.state == STORED:
            self.free(pending.position)
        elif pending.state == OPEN:
            if pending.hold is not None:  # it is safe when what took its place is
                pending.hold.count += 1
                self._next.holds.append(pending.hold)
            if pending.left == 0:
                self.settled(pending)

    def retained_expired(self, old: Message) -> None:
        """The retained message has expired."""
        if old.kept is not None and old.kept.replaces is not None:  # or a restart would find the one before
            self.note(records.encode_cleared(old.topic))
        self.drop_retained(old)

    def mark(self, message: Message, spool: Spool, ident: int) -> None:
        """The publisher's QoS 2 identifier is kept in one record with the message, if that is written at all."""
        pending: Pending | None = message.pending
        if pending is not None and pending.state == OPEN:
            pending.publisher = spool
            pending.publisher_ident = ident
            if spool.marking is None:
                spool.marking = {}
            spool.marking[ident] = pending

    def unmark(self, spool: Spool, ident: int) -> bool:
        """The identifier may carry another message next: True when a record must say so first, and will."""
        pending = spool.marking.pop(ident, None) if spool.marking is not None else None
        if pending is not None:
            pending.publisher = None
            if pending.state != WRITING:
                return False
        elif spool.marks is not None and ident in spool.marks:
            spool.marks.discard(ident)
        else:
            return False
        self._freed.setdefault(spool, []).append(ident)
        self._tick_soon()
        return True

    def unmark_all(self, spool: Spool) -> None:
        """The publisher begins anew: none of its identifiers means anything, nor does that of a message on its way to
        disk, whose record comes behind this snapshot."""
        for pending in (spool.marking or {}).values():
            pending.publisher = None
        spool.marks = spool.marking = None
        self.snapshot(spool)

    def released(self, spool: Spool, seq: int, pending: Pending, channel: Any, reply: bytes) -> None:
        """PUBREC came: PUBREL leaves when that is on disk."""
        if pending.state == STORED:
            self.free(pending.position)
        elif pending.state == OPEN or pending.state == WRITING:  # of an imported session
            pending.drop(spool, seq)
            if pending.state == OPEN and pending.left == 0:
                self.settled(pending)
        self._notes.append(records.encode_released(spool.number, seq))
        self.reply(channel, reply)

    # replies --------------------------------------------------------------------------------------------------

    def reply(self, channel: Any, data: bytes) -> None:
        """Send these bytes once everything noted so far is on disk."""
        replies = self._next.replies
        waiting = replies.get(channel)
        if waiting is None:
            replies[channel] = bytearray(data)
        else:
            waiting += data
        self.wake()

    def after(self, callback: Callable[[bool], None]) -> None:
        """Call back once everything noted so far is on disk (True) or could not be written (False)."""
        self._next.callbacks.append(callback)
        self.wake()

    def wait(self, hold: Any) -> None:
        """Release the hold once everything taken so far is on disk."""
        hold.count += 1
        self._next.holds.append(hold)
        for pending in (*self._young, *self._old):
            if pending.state == OPEN and not pending.urgent:
                self._hurry(pending)
        self.wake()

    # sessions -------------------------------------------------------------------------------------------------

    def open(self, session: Any) -> Spool:
        """A session that is to survive."""
        spool = Spool(session, self, self.next_number)
        self.next_number += 1
        self.spools[spool.number] = spool
        self.snapshot(spool)
        return spool

    def leave(self, spool: Spool) -> None:
        """The session is over, but what it had on disk is kept until it has been given to others."""
        spool.over = True
        self.snapshot(spool)
        client_id = spool.session.client_id
        self.ending[client_id] = self.ending.get(client_id, 0) + 1
        self.after(lambda written: self._left(client_id, written))

    def _left(self, client_id: str, written: bool) -> None:
        if written or self.store.refusing == "failed":
            self._ended(client_id)
        else:
            self.after(lambda written: self._left(client_id, written))

    def _ended(self, client_id: str) -> None:
        left = self.ending.pop(client_id) - 1
        if left:
            self.ending[client_id] = left

    def pass_on(self, spool: Spool, seq: int, message: Message, taker: Any) -> bool:
        """Give a message that was read back to another member of the `$share` group it came through. False when there
        is none that takes it, or QoS 2 may have been sent; else the session's own copy may be forgotten at once: one
        record says both."""
        if taker.qos == 2 and seq < spool.held_below:
            return False
        if not taker.group or self.heirs is None or not self.heirs(message, taker.group):
            return False
        self.moves(message, spool, seq)
        return True

    def moves(self, message: Message, spool: Spool, seq: int) -> None:
        """What other sessions have just taken was this one's before."""
        self.hurry(message)
        copy: Pending | None = message.pending
        if copy is not None and copy.state == OPEN:
            if copy.moved is None:
                copy.moved = []
            copy.moved.append((spool, seq))

    def snapshot(self, spool: Spool) -> None:
        """Write the session as a whole."""
        self._notes.append(spool)
        self.touch(spool)

    def note(self, record: bytes, soon: bool = False) -> None:
        """Write a record with the next commit."""
        self._notes.append(record)
        if soon:
            self.wake()
        else:
            self._tick_soon()

    def end(self, spool: Spool) -> None:
        """The session is over; the caller has given up what it held."""
        if self.spools.pop(spool.number, None) is None:
            return
        if spool.segment:
            self._less(spool.segment)
            spool.segment = 0
        self._freed.pop(spool, None)
        client_id = spool.session.client_id
        self.ending[client_id] = self.ending.get(client_id, 0) + 1
        self._ends.append((client_id, records.encode_session(records.END, spool.number)))
        self._tick_soon()

    # the key-value table --------------------------------------------------------------------------------------

    def put_value(self, key: bytes, value: bytes, callback: Callable[[bool], None] | None = None) -> None:
        """Set an entry of the key-value table; an empty value removes it. `callback` hears when it is on disk."""
        if value:
            self.values[key] = value
        else:
            self.values.pop(key, None)
        self._notes.append((key,))
        if callback is not None:
            self.after(callback)
        else:
            self.wake()

    def adopt_value(self, key: bytes, value: bytes, position: int) -> None:
        """An entry of the table that came back from disk."""
        segment = position >> 32
        self.values[key] = value
        self._value_segments[key] = segment
        self.live[segment] = self.live.get(segment, 0) + 1

    def rewrite_value(self, key: bytes) -> None:
        """Write a table entry again."""
        self._notes.append((key,))

    def values_in(self, segment: int) -> list[bytes]:
        """Keys of the table entries that stand in a segment."""
        return [key for key, where in self._value_segments.items() if where == segment]

    # accounts of space ----------------------------------------------------------------------------------------

    def free(self, position: int) -> None:
        """One use of the record at this position is over."""
        self._less(position >> 32)

    def _less(self, segment: int) -> None:
        left = self.live.get(segment, 0) - 1
        if left < 0:
            return  # of a segment that was dropped meanwhile
        self.live[segment] = left

    # the next commit ------------------------------------------------------------------------------------------

    def touch(self, spool: Spool) -> None:
        """The session has acknowledgements to record."""
        self._dirty.append(spool)
        self._tick_soon()

    def _tick_soon(self) -> None:
        if not self._ticking:
            self._ticking = True
            self.call_later(LINGER, self._tick)

    def wake(self) -> None:
        """A commit at the end of this tick, unless one is on its way."""
        if not self._scheduled and not self._outstanding:
            self._scheduled = True
            self.core.flusher.call_soon(self._commit)

    def _tick(self) -> None:
        self._ticking = False
        for pending in self._old:
            if pending.state == OPEN and not pending.urgent:
                pending.urgent = True
                self._hot.append(pending)
        self._old = self._young
        self._young = []
        if self.due:
            self.wake()
        if self._old:
            self._ticking = True
            self.call_later(LINGER, self._tick)

    # a look inside --------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written."""
        return not (self._young or self._old or self._outstanding or self.due)

    @property
    def due(self) -> bool:
        """Whether there is something for the next commit."""
        after = self._next
        return bool(
            self._hot
            or self._notes
            or self._ends
            or self._dirty
            or self._freed
            or self._copies
            or after.replies
            or after.callbacks
            or after.holds
        )

    def flush(self) -> None:
        """Everything taken so far goes out with the next commit."""
        for pending in (*self._young, *self._old):
            if pending.state == OPEN and not pending.urgent:
                self._hurry(pending)
        self.wake()
