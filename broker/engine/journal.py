"""Group commit: what must survive a restart is gathered here and handed to the store many records at a time.

Theory of operation. A message somebody must keep becomes a `Pending`. If it has been sent to an online client it rests
for one to two `LINGER`s first: what everybody acknowledges meanwhile is never written, and its publisher has the
acknowledgement already. Everything else goes out with the next commit, which starts at the end of the loop's tick as
soon as the one before is done. When the store says a commit is on disk, its holds are released in bulk, replies that
waited (SUBACK, PUBCOMP, PUBREL) are sent and queues are drained.

Space. Records are never changed; a segment is dropped from the front once nothing in it is alive. `live` counts what is
alive in each segment; when too much of the journal is dead, the oldest segment is copied forward (`compaction.py`).
"""

import logging
from collections.abc import Callable
from typing import IO, Any

from broker.engine import records
from broker.engine.compaction import Compaction
from broker.engine.core import Core
from broker.engine.message import Message, Origin
from broker.engine.pace import Pace
from broker.engine.spool import FAILED, GONE, OPEN, STORED, WRITING, Pending, Spool, stored_at

log = logging.getLogger(__name__)

LINGER = 0.0025
"""Seconds; a message sent to an online client is written if it is still unacknowledged after one to two of them."""
FRAME = 262_144
"""Bytes after which a frame is closed."""
RETRY = 1.0
"""Seconds between two attempts to write while the disk is full."""


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


class Journal:
    """The engine's side of the store. `call_later(seconds, callback)` and `scratch()` (a temporary file) are given.

    `clock_ms` is the store's clock now: it goes on from where the last run ended, by the time that has passed.
    """

    def __init__(
        self,
        core: Core,
        store: Any,
        call_later: Callable[[float, Callable[[], None]], Any],
        scratch: Callable[[], IO[bytes]],
        clock_ms: int = 1,
    ) -> None:
        self.core = core
        self.store = store
        self.call_later = call_later
        self.scratch = scratch
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
        self.lost = 0
        """Queue entries the store could not bring back at start."""
        self._value_segments: dict[bytes, int] = {}
        self._origin_clock = clock_ms
        self._origin_now = core.now
        core.clock_base = clock_ms - core.now * 1000
        self._number = 0
        self._hot: list[Pending] = []
        self._young: list[Pending] = []
        self._old: list[Pending] = []
        self._dirty: list[Spool] = []
        self._notes: list[Any] = []
        """Records to write first: bytes, or a Spool whose snapshot is due, or (key,) of a table entry."""
        self._ends: list[tuple[str, bytes]] = []
        """Sessions that are over. Written last: what moved from them to others is stored before it is forgotten."""
        self.ending: dict[str, int] = {}
        """Client ids whose session is over, but not on disk yet."""
        self._copies: list[Any] = []
        self._freed: dict[Spool, list[int]] = {}
        self._next = Commit()
        self._outstanding: dict[int, Commit] = {}
        self._scheduled = False
        self._ticking = False
        self._resting = False
        """The disk was full a moment ago."""
        self.loads = 0
        """Reads that are under way: no segment is dropped meanwhile."""
        self.compaction = Compaction(self)
        self.pace = Pace(core, call_later)
        self.origins: dict[bytes, Origin] = {}
        self._origin_bytes: dict[int, tuple[Origin, bytes]] = {}
        store.owner = self

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
        """Nobody needs this unwritten message any more."""
        if pending.retained:
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
        if taker.qos == 2 and seq < spool.again_below:
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

    def copy(self, takers: list[Any], retained: Message | None, position: int, message: Message) -> None:
        """Write the message again for what still needs the record at this position."""
        lines = [records.encode_taker(taker[0].number, *taker[1:]) for taker in takers]
        record = records.encode_put(
            message,
            retained is not None,
            self.to_clock(message.expires),
            0,
            0,
            len(takers),
            b"".join(lines),
            self._origin_of(message),
        )
        self._copies.append((takers, retained, position, record))

    def rewrite_value(self, key: bytes) -> None:
        """Write a table entry again."""
        self._notes.append((key,))

    def values_in(self, segment: int) -> list[bytes]:
        """Keys of the table entries that stand in a segment."""
        return [key for key, where in self._value_segments.items() if where == segment]

    def touch(self, spool: Spool) -> None:
        """The session has acknowledgements to record."""
        self._dirty.append(spool)
        self._tick_soon()

    def _tick_soon(self) -> None:
        if not self._ticking:
            self._ticking = True
            self.call_later(LINGER, self._tick)

    # accounts of space ----------------------------------------------------------------------------------------

    def free(self, position: int) -> None:
        """One use of the record at this position is over."""
        self._less(position >> 32)

    def _less(self, segment: int) -> None:
        left = self.live.get(segment, 0) - 1
        if left < 0:
            return  # of a segment that was dropped meanwhile
        self.live[segment] = left

    # commits --------------------------------------------------------------------------------------------------

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

    def _commit(self) -> None:
        self._scheduled = False
        if self._outstanding:
            return
        if self.store.refusing == "failed":
            self._refuse()
            return
        if self._resting:
            return
        commit = self._next
        parts: list[bytes] = []
        frames: list[tuple[bytes, int]] = []
        size = 0
        entries = 0
        left: list[Spool] = []
        if self._notes:
            notes = self._notes
            self._notes = []
            for note in notes:
                if isinstance(note, bytes):
                    record = note
                    commit.notes.append(record)
                elif isinstance(note, Spool):
                    if self.spools.get(note.number) is not note:
                        continue
                    if note.over:
                        left.append(note)
                        continue
                    record = self._snapshot_of(note)
                    commit.snapshots.append((note, len(frames)))
                else:
                    record = records.encode_value(note[0], self.values.get(note[0], b""))
                    commit.values.append((note[0], len(frames)))
                parts.append(record)
                size += len(record)
                if size >= FRAME:
                    frames.append((b"".join(parts), 0))
                    parts = []
                    size = 0
        # before the messages: one of them may have such an identifier already
        for spool, idents in self._freed.items():
            commit.notes.append(records.encode_freed(spool.number, idents))
            parts.append(commit.notes[-1])
            size += len(parts[-1])
        self._freed = {}
        # before the messages: one of them may take the place of a retained one that is copied
        for takers, retained, position, record in self._copies:
            if retained is not None and (retained.kept is None or retained.kept.position != position):
                # replaced or cleared since: this record comes behind the one that says so
                retained = None
                at = records.HEADER
                record = record[:at] + bytes((record[at] & ~records.RETAINED,)) + record[at + 1 :]
            commit.copies.append((takers, retained, position, len(frames), size))
            parts.append(record)
            size += len(record)
            if size >= FRAME:
                frames.append((b"".join(parts), 0))
                parts = []
                size = 0
        self._copies = []
        hot = self._hot
        self._hot = []
        for pending in hot:
            if pending.state != OPEN or pending.message is None:
                continue
            record = self._encode(pending)
            pending.state = WRITING
            commit.items.append((pending, len(frames), size))
            parts.append(record)
            size += len(record)
            entries += pending.left
            if size >= FRAME:
                frames.append((b"".join(parts), entries))
                parts = []
                size = entries = 0
        # last: a message that went from one session to another is stored before it is forgotten where it was
        for spool in self._dirty:
            spool.dirty = False
            done = spool.done
            spool.done = None
            if done is not None and self.spools.get(spool.number) is spool:
                floor = spool.floor
                commit.notes.append(records.encode_acked(spool.number, floor, [seq for seq in done if seq >= floor]))
                parts.append(commit.notes[-1])
        self._dirty = []
        for spool in left:  # it forgets what others have got in this commit
            commit.snapshots.append((spool, len(frames)))
            parts.append(self._snapshot_of(spool))
        commit.ends = self._ends
        parts.extend([record for _, record in self._ends])
        self._ends = []
        if parts:
            frames.append((b"".join(parts), entries))
        if not frames and not commit.replies and not commit.callbacks and not commit.holds:
            return
        self._next = Commit()
        self._number += 1
        self._outstanding[self._number] = commit
        if frames:
            self.store.write(self._number, frames, self.clock_ms())
            self.compaction.tidy()
        else:
            self.written(self._number, [])

    def _refuse(self) -> None:
        """The store takes nothing until a restart."""
        commit = self._next
        self._next = Commit()
        for pending in self._hot:
            if pending.state == OPEN:
                commit.items.append((pending, 0, 0))
        self._hot = []
        self._notes = []
        self._ends = []
        self._freed = {}
        self._fail(commit, 0x83)

    def _encode(self, pending: Pending) -> bytes:
        message = pending.message
        assert message is not None
        takers = b""
        count = 0
        if pending.spool is not None:
            count = 1
            takers = records.encode_taker(
                pending.spool.number, pending.seq, pending.qos, pending.retain, pending.idents, pending.group
            )
        if pending.more:
            count += len(pending.more)
            takers += b"".join(
                [
                    records.encode_taker(spool.number, seq, qos, retain, idents, group)
                    for spool, seq, qos, retain, idents, group in pending.more
                ]
            )
        if pending.moved:
            count += len(pending.moved)
            takers += b"".join([records.encode_moved(spool.number, seq) for spool, seq in pending.moved])
        publisher = pending.publisher
        return records.encode_put(
            message,
            pending.retained,
            self.to_clock(message.expires),
            publisher.number if publisher is not None else 0,
            pending.publisher_ident,
            count,
            takers,
            self._origin_of(message),
        )

    def _origin_of(self, message: Message) -> bytes:
        origin = message.origin
        if origin is None:
            return b""
        known = self._origin_bytes.get(id(origin))
        if known is not None and known[0] is origin:
            return known[1]
        raw = records.encode_origin(origin)
        if len(self._origin_bytes) > 4096:
            self._origin_bytes.clear()
        self._origin_bytes[id(origin)] = (origin, raw)
        return raw

    def _snapshot_of(self, spool: Spool) -> bytes:
        session = spool.session
        unacknowledged, released = spool.open_numbers()
        fields = session.snapshot(self)
        fields["n"] = spool.next_seq
        fields["f"] = spool.floor
        fields["s"] = spool.sent
        fields["open"] = unacknowledged
        fields["rel"] = released
        fields["gone"] = sorted(spool.gone) if spool.gone else []
        fields["marks"] = sorted(spool.marks) if spool.marks else []
        if spool.over:
            fields["over"] = True
        return records.encode_json(records.META, spool.number, fields)

    def written(self, number: int, places: list[tuple[int, int]]) -> None:
        """The store: this commit is as safe as `durability` says; where each of its frames begins."""
        commit = self._outstanding.pop(number)
        bases = [segment << 32 | offset for segment, offset in places]
        live = self.live
        for segment, _ in places:
            live.setdefault(segment, 0)
        owners: dict[Any, None] = {}
        affected: dict[Spool, None] = {}
        for pending, frame, offset in commit.items:
            position = bases[frame] + offset
            pending.position = position
            pending.state = STORED
            pending.message = None
            alive = pending.left
            if pending.retained:
                alive += 1
            live[position >> 32] += alive
            if pending.replaces is not None:
                older = pending.replaces
                pending.replaces = None
                self.drop_retained(older)
            if pending.moved is not None:
                self._given(pending)
            hold = pending.hold
            if hold is not None:
                pending.hold = None
                if _let_go(hold):
                    owners[hold.owner] = None
                    hold.owner = None
            publisher = pending.publisher
            if publisher is not None:
                pending.publisher = None
                if publisher.marking is not None and publisher.marking.pop(pending.publisher_ident, None) is pending:
                    if publisher.marks is None:
                        publisher.marks = set()
                    publisher.marks.add(pending.publisher_ident)
            spool = pending.spool
            if spool is not None and (spool.tail is not None or spool.session.queue is not None):
                affected[spool] = None
            if pending.more:
                for entry in pending.more:
                    if entry[0].tail is not None or entry[0].session.queue is not None:
                        affected[entry[0]] = None
        for spool, frame in commit.snapshots:
            if self.spools.get(spool.number) is spool:
                if spool.segment:
                    self._less(spool.segment)
                spool.segment = bases[frame] >> 32
                live[spool.segment] += 1
        for client_id, _ in commit.ends:
            self._ended(client_id)
        for key, frame in commit.values:
            before = self._value_segments.pop(key, 0)
            if before:
                self._less(before)
            if key in self.values:
                self._value_segments[key] = bases[frame] >> 32
                live[bases[frame] >> 32] += 1
        for takers, message, old, frame, offset in commit.copies:
            self.compaction.copied(takers, message, old, bases[frame] + offset)
        for hold in commit.holds:
            if _let_go(hold):
                owners[hold.owner] = None
                hold.owner = None
        for channel, data in commit.replies.items():
            channel.push_live(bytes(data))
        for callback in commit.callbacks:
            callback(True)
        for owner in owners:
            owner.on_released()
        for spool in affected:
            spool.settle()
        if self.due:
            self.wake()
        else:
            self.compaction.tidy()

    def failed(self, number: int, error: Any) -> None:
        """The store: this commit could not be written, nothing of it is acknowledged. What is not a message is written
        when there is space again; after any other error the store is read-only."""
        commit = self._outstanding.pop(number)
        if error.full:
            again: list[Any] = [spool for spool, _ in commit.snapshots]
            again.extend((key,) for key, _ in commit.values)
            self._notes = again + commit.notes + self._notes
            self._ends = commit.ends + self._ends
            for channel, data in commit.replies.items():
                waiting = self._next.replies.get(channel)
                self._next.replies[channel] = data if waiting is None else data + waiting
            commit.replies = {}
            for item in commit.items:
                if item[0].moved is not None:  # acknowledged long ago: tried again
                    item[0].state = OPEN
                    self._hot.append(item[0])
            commit.items = [item for item in commit.items if item[0].state != OPEN]
        self._fail(commit, 0x97 if error.full else 0x83)
        if commit.copies:
            self.compaction.failed = True
        if error.full:
            self._resting = True
            self.call_later(RETRY, self._rested)
        else:
            self.wake()

    def _rested(self) -> None:
        self._resting = False
        self.wake()

    def _fail(self, commit: Commit, code: int) -> None:
        affected: dict[Spool, None] = {}
        for pending, _, _ in commit.items:
            pending.state = FAILED
            pending.moved = None
            if pending.retained:
                self._put_back(pending)
            hold = pending.hold
            pending.hold = None
            for taker in pending.takers():
                affected[taker[0]] = None
            pending.message = None
            publisher = pending.publisher
            if publisher is not None:
                self.unmark(publisher, pending.publisher_ident)
                publisher.session.forget(pending.publisher_ident)  # sent again, it is a new message
            if hold is not None:
                hold.fail(code)
        self.core.count("store_failed", max(1, len(commit.items)))
        for hold in commit.holds:
            hold.fail(code)
        for callback in commit.callbacks:
            callback(False)
        for spool in affected:
            spool.settle()

    # reading back ---------------------------------------------------------------------------------------------

    def load(self, spool: Spool, entries: list[Any], loaded: Callable[[list[Any], list[Any]], None]) -> None:
        """Read the messages of these backlog entries: `loaded` gets the entries and what `_read` says of each."""
        self.loads += 1

        def done(found: list[bytes | None]) -> None:
            self.loads -= 1
            messages = []
            clock = self.clock_ms()
            for entry, record in zip(entries, found, strict=True):
                messages.append(self._read(spool, entry, record, clock))
            loaded(entries, messages)
            if not self.loads:
                self.compaction.tidy()

        self.store.read([entry[1] for entry in entries], done)

    def fetch(self, spool: Spool, entries: list[Any]) -> list[Any]:
        """(message, taker) of these backlog entries, read at once; those that cannot be read are left out."""
        clock = self.clock_ms()
        records_found = self.store.fetch([entry[1] for entry in entries])
        found = [self._read(spool, e, record, clock) for e, record in zip(entries, records_found, strict=True)]
        return [pair for pair in found if pair is not None]

    def _read(self, spool: Spool, entry: Any, record: bytes | None, clock: int) -> Any:
        """(message, taker), None when the record is not what it should be."""
        try:
            if record is None or record[0] != records.PUT:
                raise records.RecordError("it is not there")
            payload = record[records.HEADER :]
            for taker in records.decode_takers(payload):
                if taker.session == spool.number and taker.seq == entry[0]:
                    return records.decode_message(payload, self.core.now, clock, self.origins), taker
            raise records.RecordError("it is another message")
        except records.RecordError as error:
            log.error(
                "a message for client %r cannot be read back from segment %d of the store: %s; it is lost",
                spool.session.client_id,
                entry[1] >> 32,
                error,
            )
            return None

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


def _let_go(hold: Any) -> bool:
    """Take one reason off a hold; True when its owner is to look."""
    hold.count -= 1
    return hold.count <= 0 and hold.owner is not None and hold.done


def restored(message: Message, position: int) -> None:
    """A retained message that came back from disk."""
    message.kept = stored_at(position)
