"""Group commit: what the `Intake` has gathered is handed to the store, many records at a time, and read back from it.

Theory of operation. A commit starts at the end of the loop's tick as soon as the one before is done. When the store
says it is on disk, its holds are released in bulk, replies that waited (SUBACK, PUBCOMP, PUBREL) are sent and queues
are drained.

Space. Records are never changed; a segment is dropped from the front once nothing in it is alive. `live` counts what is
alive in each segment; when too much of the journal is dead, the oldest segment is copied forward (`compaction.py`).
"""

import logging
from collections.abc import Callable
from typing import IO, Any

from broker.engine import records
from broker.engine.compaction import Compaction
from broker.engine.core import Core
from broker.engine.intake import Commit, Intake
from broker.engine.message import Message, Origin
from broker.engine.pace import Pace
from broker.engine.spool import FAILED, OPEN, STORED, WRITING, Pending, Spool, stored_at

log = logging.getLogger(__name__)

FRAME = 262_144
"""Bytes after which a frame is closed."""
RETRY = 1.0
"""Seconds between two attempts to write while the disk is full."""


class Journal(Intake):
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
        super().__init__(core, store, call_later, clock_ms)
        self.scratch = scratch
        self.lost = 0
        """Queue entries the store could not bring back at start."""
        self.loads = 0
        """Reads that are under way: no segment is dropped meanwhile."""
        self.compaction = Compaction(self)
        self.pace = Pace(core, call_later)
        self.origins: dict[bytes, Origin] = {}
        self._origin_bytes: dict[int, tuple[Origin, bytes]] = {}
        self._number = 0
        self._resting = False
        """The disk was full a moment ago."""
        store.owner = self

    # commits --------------------------------------------------------------------------------------------------

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

    # what became of them --------------------------------------------------------------------------------------

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
        self._tell(commit.callbacks, True)
        for owner in owners:
            try:
                owner.on_released()
            except Exception as error:
                owner.crash(error)
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
        self._tell(commit.callbacks, False)
        for spool in affected:
            spool.settle()

    def _tell(self, callbacks: list[Callable[[bool], None]], written: bool) -> None:
        """What fails in one that waited for this commit keeps no other waiting."""
        for callback in callbacks:
            try:
                callback(written)
            except Exception as error:
                self.core.failed(error, "an answer that waited for the disk could not be given; the others are")

    # records --------------------------------------------------------------------------------------------------

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
        elif self.owed is not None:
            fields |= self.owed(session)
        return records.encode_json(records.META, spool.number, fields)

    # reading back ---------------------------------------------------------------------------------------------

    def load(self, spool: Spool, entries: list[Any], loaded: Callable[[list[Any], list[Any]], None]) -> None:
        """Read the messages of these backlog entries: `loaded` gets the entries and what `_read` says of each. The
        oldest may be taken out of the list meanwhile: they are left out of both."""
        self.loads += 1

        def done(found: list[bytes | None]) -> None:
            self.loads -= 1
            messages = []
            clock = self.clock_ms()
            for entry, record in zip(entries, found[len(found) - len(entries) :], strict=True):
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


def _let_go(hold: Any) -> bool:
    """Take one reason off a hold; True when its owner is to look."""
    hold.count -= 1
    return hold.count <= 0 and hold.owner is not None and hold.done


def restored(message: Message, position: int) -> None:
    """A retained message that came back from disk."""
    message.kept = stored_at(position)
