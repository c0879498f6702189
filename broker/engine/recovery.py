"""What the journal says at start, made into sessions and retained messages again.

Records are read in the order in which they were written and each is small news: later ones win. A record that cannot be
what it says is left out alone, counted and named in the log; everything else is loaded.

A session whose client was connected at the end lives for its whole expiry from the start on: nobody wrote down when the
broker died, and a session kept for too long loses nothing.
"""

import logging
from array import array
from base64 import b64decode
from collections.abc import Callable, Iterable
from operator import lt
from typing import Any

from broker.engine import records
from broker.engine.backlog import Backlog
from broker.engine.inflight import FREE, RELEASED, Inflight
from broker.engine.journal import Journal, restored
from broker.engine.message import Message, Origin
from broker.engine.owed import Debt
from broker.engine.records import (
    CLOCKED,
    HEADER,
    LAST_SEQ,
    PUT,
    PUT_FIXED,
    RETAINED,
    TAKER_GROUP,
    TAKER_IDENTS,
    TAKER_MOVED,
    number_at,
)
from broker.engine.session import NEVER, Session
from broker.engine.spool import Spool
from broker.engine.topics import split_share, valid_filter, valid_name

log = logging.getLogger(__name__)

IDENTIFIERS = 65_535
TAKER = 13
"""Bytes of a receiver in a PUT, without its extras."""
REPORTED = 10
"""Bad records named in the log one by one."""


class Found:
    """One session while records are read. `entries` holds (sequence number, position, size << 32 | time) of every
    message it was ever to get, as numbers: a queue may be longer than what fits into memory as objects."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] | None = None
        self.subscriptions: dict[str, list[Any]] = {}
        self.entries = array("Q")
        self.floor = 1
        self.done: set[int] = set()
        self.released: set[int] = set()
        self.marks: set[int] = set()
        self.next_seq = 1
        self.segment = 0
        self.over = False
        """It had ended, and its messages were being given to others."""
        self.left_share = False
        self.owed: dict[str, Debt] | None = None

    def owe(self, filter: str, debt: Debt | None) -> None:
        """Retained messages are owed for this subscription, or no more."""
        if debt is not None:
            if self.owed is None:
                self.owed = {}
            self.owed[filter] = debt
        elif self.owed is not None:
            self.owed.pop(filter, None)

    def alive(self) -> "array[int]":
        """The entries nobody has acknowledged, ascending; of one that was copied, the newest place."""
        entries, floor, done, released = self.entries, self.floor, self.done, self.released
        seqs = entries[::3]
        if seqs and seqs[0] >= floor and not done and not released and all(map(lt, seqs, seqs[1:])):
            return entries
        kept = array("Q")
        last = 0
        ascending = True
        for at in range(0, len(entries), 3):
            seq = entries[at]
            if seq < floor or seq in done or seq in released:
                continue
            if seq <= last:
                ascending = False
            last = seq
            kept.extend(entries[at : at + 3])
        if ascending:
            return kept
        newest = {kept[at]: at for at in range(0, len(kept), 3)}
        found = array("Q")
        for seq in sorted(newest):
            at = newest[seq]
            found.extend(kept[at : at + 3])
        return found


class Recovery:
    """Feed it every frame of the journal, then `install` what it has found."""

    def __init__(self) -> None:
        self.sessions: dict[int, Found] = {}
        self.ended: set[int] = set()
        self.retained: dict[bytes, tuple[int, bytes]] = {}
        self.values: dict[bytes, tuple[int, bytes]] = {}
        self.highest = 0
        self.bad = 0
        """Records that made no sense."""
        self.queued = 0

    def read(self, segment: int, offset: int, body: bytes) -> None:
        """One frame: where its body begins, and the body."""
        base = segment << 32 | offset
        at = 0
        end = len(body)
        while at < end:
            size = HEADER
            if at + size <= end:
                size += number_at(body, at + 1, 4)
            if at + size > end:
                self._reject(base + at, 0, records.RecordError("a record is cut off or longer than its frame"))
                return
            kind = body[at]
            try:
                self._one(base + at, kind, body[at + HEADER : at + size])
            except (KeyError, OverflowError, TypeError, ValueError) as error:  # RecordError is a ValueError
                self._reject(base + at, kind, error)
            at += size

    def _reject(self, position: int, kind: int, error: Exception) -> None:
        self.bad += 1
        if self.bad <= REPORTED:
            log.error(
                "store segment %d, offset %d: a record of kind %s makes no sense and is left out: %s",
                position >> 32,
                position & 0xFFFFFFFF,
                records.KINDS.get(kind, kind),
                error,
            )

    def _session(self, number: int) -> Found:
        found = self.sessions.get(number)
        if found is None:
            if number == 0:
                raise records.RecordError("session 0")
            found = self.sessions[number] = Found()
            self.highest = max(self.highest, number)
        return found

    def _one(self, position: int, kind: int, payload: bytes) -> None:
        if kind == PUT:
            self._put(position, payload)
        elif kind == records.ACKED:
            number, floor, seqs = records.decode_acked(payload)
            found = self._session(number)
            found.floor = max(found.floor, floor)
            for seq in seqs:
                found.released.discard(seq)
                found.done.add(seq)
                if seq >= found.next_seq:  # its message may never have been written, no other may get its number
                    found.next_seq = seq + 1
        elif kind == records.RELEASED:
            number, seq = records.decode_released(payload)
            found = self._session(number)
            found.released.add(seq)
        elif kind == records.META:
            self._snapshot(position, payload)
        elif kind == records.LIFE:
            number, fields = records.decode_json(payload)
            found = self._session(number)
            life = _life(fields)
            if found.fields is not None:
                found.fields.update(life)
        elif kind == records.SUBSCRIBED:
            number, fields = records.decode_json(payload)
            subscription = _subscription(fields["sub"])
            until = _moment(fields.get("owed", 0))
            found = self._session(number)
            found.subscriptions[subscription[0]] = subscription
            found.owe(subscription[0], Debt(until) if until else None)
        elif kind == records.UNSUBSCRIBED:
            found = self._session(records.decode_session(payload))
            filter = payload[4:].decode()
            found.subscriptions.pop(filter, None)
            found.owe(filter, None)
            if filter.startswith("$share/"):
                found.left_share = True
        elif kind == records.FREED:
            number, idents = records.decode_freed(payload)
            self._session(number).marks.difference_update(idents)
        elif kind == records.END:
            number = records.decode_session(payload)
            self.highest = max(self.highest, number)
            self.sessions.pop(number, None)
            self.ended.add(number)
        elif kind == records.CLEARED:
            self.retained.pop(payload, None)
        elif kind == records.VALUE:
            key, value = records.decode_value(payload)
            if value:
                self.values[key] = (position, value)
            else:
                self.values.pop(key, None)
        else:
            raise records.RecordError(f"kind {kind} is not known")

    def _put(self, position: int, payload: bytes) -> None:
        """One message: who must get it, and what it means for its publisher and its topic. There may be millions of
        them, so they are not made objects: see `records.encode_put` for what is where."""
        data = payload
        end = len(payload)
        at = start = PUT_FIXED
        if end < start:
            raise records.RecordError("a message cannot be read: it is too short")
        count = number_at(data, 40, 2)
        for _ in range(count):  # before anything is believed
            if at + TAKER > end:
                raise records.RecordError("the receivers of a message cannot be read")
            bits = data[at + 12]
            if number_at(data, at + 4, 8) > LAST_SEQ:
                raise records.RecordError("an impossible sequence number")
            at += TAKER
            if bits & TAKER_IDENTS:
                at += 1 + 4 * (data[at] if at < end else 0)
            if bits & TAKER_GROUP:
                at += 4
        length = number_at(data, 42, 2)
        size = end - at - number_at(data, 44, 4)
        if size < length:
            raise records.RecordError("a topic does not fit its record")
        flags = data[0]
        clock_ms = number_at(data, 2, 8) if flags & CLOCKED else 0
        both = size << 32 | (clock_ms + 999) // 1000 & 0xFFFFFFFF
        after = at
        at = start
        for _ in range(count):
            number = number_at(data, at, 4)
            seq = number_at(data, at + 4, 8)
            bits = data[at + 12]
            at += TAKER
            if bits & TAKER_IDENTS:
                at += 1 + 4 * data[at]
            if bits & TAKER_GROUP:
                at += 4
            if number in self.ended:
                continue
            found = self._session(number)
            if seq >= found.next_seq:
                found.next_seq = seq + 1
            if found.owed:
                for debt in found.owed.values():
                    debt.had.add(records.put_ident(payload))
            if bits & TAKER_MOVED:
                found.done.add(seq)
            elif seq >= found.floor and seq not in found.done and seq not in found.released:
                found.entries.extend((seq, position, both))
        publisher = number_at(data, 18, 4)
        if publisher and publisher not in self.ended:
            self._session(publisher).marks.add(number_at(data, 22, 2))
        if flags & RETAINED:
            self.retained[payload[after : after + length]] = (position, payload)

    def _snapshot(self, position: int, payload: bytes) -> None:
        number, fields = records.decode_json(payload)
        if not isinstance(fields["c"], str) or not fields["c"]:
            raise records.RecordError("a session without its client id")
        if fields["o"] is not None and not isinstance(fields["o"], str):
            raise records.RecordError("a session whose owner is not a name")
        _life(fields)
        floor, sent, next_seq = fields["f"], fields["s"], fields["n"]
        _numbers([floor, sent, next_seq])
        if sent < floor or sent - floor > IDENTIFIERS:
            raise records.RecordError("a session with impossible sequence numbers")
        unacknowledged = _numbers(fields["open"])
        gone = _numbers(fields["gone"])
        released = _numbers(fields["rel"])
        marks = _numbers(fields["marks"], IDENTIFIERS)
        subscriptions = {entry[0]: _subscription(entry) for entry in fields["subs"]}
        owed = _debts(fields)
        found = self._session(number)
        # a message whose first copy was dropped with its segment may come again behind this record: it says who is done
        done = {seq for seq in range(floor, sent) if seq not in unacknowledged and seq not in released}
        found.done = gone | done | {seq for seq in found.done if seq >= sent}
        found.released = released
        found.marks = marks
        found.floor = floor
        found.next_seq = max(found.next_seq, next_seq)
        found.subscriptions = subscriptions
        found.fields = fields
        found.segment = position >> 32
        found.over = bool(fields.get("over"))
        found.left_share = bool(fields.get("ls"))
        found.owed = owed

    # putting it in place --------------------------------------------------------------------------------------

    def install(self, engine: Any, journal: Journal) -> None:
        """Make the sessions, queues, retained messages and table entries effective. Retained messages that expired
        meanwhile are not; sessions that did end with the first tick, when the gate can judge their wills."""
        journal.next_number = self.highest + 1
        live = journal.live
        for key, (position, value) in self.values.items():
            journal.adopt_value(key, value, position)
        clock = journal.clock_ms()
        live_ones = sorted((n, f.fields) for n, f in self.sessions.items() if f.fields is not None and not f.over)
        newest = {fields["c"]: number for number, fields in live_ones}
        for number, found in self.sessions.items():
            fields = found.fields
            if fields is None:
                lost = len(found.alive()) // 3
                if lost or found.subscriptions:
                    self._reject(0, records.META, records.RecordError(f"session {number} has no snapshot"))
                    self.bad += max(0, lost - 1)  # it counted one
                continue
            if found.over:
                self._install_legacy(engine, journal, number, found)
                continue
            if newest[fields["c"]] != number:  # its end is the one record the crash took
                journal.note(records.encode_session(records.END, number))
                continue
            self._install_session(engine, journal, number, found, clock)
        origins: dict[bytes, Origin] = {}
        for position, payload in self.retained.values():
            try:
                message = records.decode_message(payload, engine.core.now, clock, origins)
            except records.RecordError as error:
                self._reject(position, records.PUT, error)
                continue
            if message.expires != 0 and message.expires <= engine.core.now:
                continue
            message.retain = True
            if engine.retained_store.store(message):
                restored(message, position)
                live[position >> 32] = live.get(position >> 32, 0) + 1
            else:
                engine.core.drop("retained_full")
        for number, found in self.sessions.items():
            if found.owed and number in journal.spools and not found.over:
                engine.subscriptions.owed.restore(journal.spools[number].session, found.owed)

    def _install_session(self, engine: Any, journal: Journal, number: int, found: Found, clock: int) -> None:
        fields = found.fields
        assert fields is not None
        ends = int(fields["x"])
        expiry = float(fields["e"])
        if fields["on"]:  # the connection ended with the broker
            ends = int(clock + expiry * 1000) if expiry < NEVER else 0
        session = Session(fields["c"], engine.core)
        spool = Spool(session, journal, number)
        journal.spools[number] = spool
        spool.segment = found.segment
        journal.live[found.segment] = journal.live.get(found.segment, 0) + 1
        session.spool = spool
        session.stored = True
        session.persistent = True
        session.owner = fields["o"]
        session.expiry = expiry
        session.window = int(fields["w"])
        session.encoded5 = session.v5 = bool(fields["v5"])
        session.left_share = found.left_share
        engine.sessions[session.client_id] = session
        self._restore_queue(journal, session, spool, found)
        if found.marks:
            spool.marks = set(found.marks)
            for ident in found.marks:
                session.remember(ident)
        worker = session.client_id.startswith("isthmus/")
        session.durable = not worker and engine.core.limits.queue_overflow == "reject"
        for filter, qos, no_local, rap, ident in found.subscriptions.values():
            raw = filter.encode()
            if worker:  # made effective when the configuration is applied
                engine.subscriptions.remember(session, raw, qos, rap)
            elif not raw.startswith(b"$share/") or split_share(raw) is not None:
                engine.subscriptions.restore(session, raw, qos, no_local, rap, ident)
        if ends:
            session.ends_at = journal.from_clock(ends)
        if fields["will"] is not None:
            session.will_terms = fields["will"].get("terms")
        engine.continue_session(session, _will(fields["will"], journal))
        if fields["on"]:  # or the next restart would let its expiry and its will begin once more
            journal.note(records.encode_json(records.LIFE, number, session.life(journal, False)))

    def _install_legacy(self, engine: Any, journal: Journal, number: int, found: Found) -> None:
        """What an ended session left behind goes on to be given away."""
        fields = found.fields
        assert fields is not None
        session = Session(fields["c"], engine.core)
        session.window = int(fields["w"])
        spool = session.spool = Spool(session, journal, number)
        journal.spools[number] = spool
        spool.over = True
        spool.segment = found.segment
        journal.live[found.segment] = journal.live.get(found.segment, 0) + 1
        self._restore_queue(journal, session, spool, found)
        engine.legacies.add(session)

    def _restore_queue(self, journal: Journal, session: Session, spool: Spool, found: Found) -> None:
        floor = found.floor
        alive = found.alive()
        released = sorted(seq for seq in found.released if seq >= floor)
        newest = max(alive[-3] if alive else 0, released[-1] if released else 0)
        spool.next_seq = max(found.next_seq, floor, newest + 1)
        spool.floor = spool.sent = min(list(alive[:1]) + released[:1] + [spool.next_seq])
        # nobody knows which of these the client has got already: what it acknowledged last may not be on disk. Of QoS 2
        # it has at most as many as its window takes, because PUBREL waits for the disk
        spool.again_below = spool.next_seq if alive else 0
        spool.held_below = alive[3 * (min(len(alive) // 3, session.window) - 1)] + 1 if alive else 0
        assert found.fields is not None
        if not found.fields["on"]:  # what came when the client was gone it has not got
            spool.again_below = min(spool.again_below, found.fields.get("a", spool.again_below))
            spool.held_below = min(spool.held_below, spool.again_below)
        if released:
            inflight = session.inflight = Inflight()
            for seq in released:
                if inflight.state((seq - 1) % 65535 + 1) == FREE:
                    inflight.put((seq - 1) % 65535 + 1, RELEASED, b"", b"")
            inflight.next_id = released[-1] % 65535 + 1  # their order is told by it, and much more may wait behind them
            if not alive:
                spool.sent = spool.next_seq
        if alive:
            session.queue_bytes += _weigh(alive, journal.live, journal.clock_ms() // 1000 + 1)
            self.queued += len(alive) // 3
            spool.backlog = Backlog(journal.scratch)
            spool.backlog.fill(alive)
        found.entries = array("Q")


def _weigh(alive: "array[int]", live: dict[int, int], now: int) -> int:
    """The bytes of these messages. Their records are counted in `live`; those without a time of arrival get `now`: they
    are of an older release, and their age counts from now on."""
    size = count = 0
    segment = alive[1] >> 32
    for at in range(1, len(alive), 3):
        here = alive[at] >> 32
        if here != segment:
            live[segment] = live.get(segment, 0) + count
            segment, count = here, 0
        count += 1
        both = alive[at + 1]
        size += both >> 32
        if not both & 0xFFFFFFFF:
            alive[at + 1] = both | now
    live[segment] = live.get(segment, 0) + count
    return size


def _will(fields: dict[str, Any] | None, journal: Journal) -> tuple[Message, float, float] | None:
    """(will, its delay, when it is due on the engine's clock or 0)."""
    if fields is None:
        return None
    return _will_message(fields), float(fields["delay"]), journal.from_clock(int(fields["at"]))


def _will_message(fields: dict[str, Any]) -> Message:
    origin = records.decode_origin(fields["origin"].encode()) if fields["origin"] else None
    return Message(
        fields["topic"].encode(),
        b64decode(fields["payload"]),
        int(fields["qos"]),
        bool(fields["retain"]),
        b64decode(fields["properties"]),
        float(fields["expires"]),
        origin,
    )


def _life(fields: dict[str, Any]) -> dict[str, Any]:
    """What a LIFE record says and a snapshot repeats, checked. Raises RecordError."""
    ends, expiry, window, will = fields["x"], fields["e"], fields["w"], fields["will"]
    if not isinstance(ends, int) or not isinstance(expiry, int | float) or not isinstance(window, int):
        raise records.RecordError("a connection whose numbers are none")
    if type(fields.get("a", 0)) is not int:
        raise records.RecordError("a connection that ended nowhere")
    if ends < 0 or expiry < 0 or window < 1:
        raise records.RecordError("a connection with impossible numbers")
    if will is not None:
        message = _will_message(will)
        if not valid_name(message.topic) or message.qos not in (0, 1, 2):
            raise records.RecordError("a will that cannot be published")
        if not isinstance(will["delay"], int | float) or not isinstance(will["at"], int):
            raise records.RecordError("a will that is due at no time")
        if not isinstance(will.get("terms"), dict | None):
            raise records.RecordError("a will whose owner is unknown")
    life = {"on": bool(fields["on"]), "x": ends, "e": expiry, "w": window, "v5": bool(fields["v5"]), "will": will}
    return life | {"a": fields["a"]} if "a" in fields else life


def _numbers(found: Any, highest: int = records.LAST_SEQ) -> set[int]:
    """Sequence numbers or packet identifiers, checked. Raises RecordError."""
    if not isinstance(found, list) or not all(type(n) is int and 0 < n <= highest for n in found):
        raise records.RecordError("a session with impossible numbers")
    return set(found)


def _moment(found: Any) -> int:
    """A moment of the store's clock, 0 for none, checked. Raises RecordError."""
    if type(found) is not int or found < 0:
        raise records.RecordError("a subscription of no time")
    return found


def _debts(fields: dict[str, Any]) -> dict[str, Debt] | None:
    """Subscriptions whose retained messages had not all been sent, checked. Raises RecordError."""
    if "owed" not in fields:
        return None
    left = {topic.encode() for topic in fields["left"]} if "left" in fields else None
    return {filter: Debt(_moment(until), left) for filter, until in fields["owed"]}


def _subscription(found: Any) -> list[Any]:
    """[filter, QoS, No Local, Retain As Published, identifier], checked. Raises RecordError."""
    filter, qos, _, _, ident = found
    if not isinstance(filter, str) or qos not in (0, 1, 2) or type(ident) is not int or not 0 <= ident < 1 << 28:
        raise records.RecordError("an impossible subscription")
    raw = filter.encode()
    parts = split_share(raw) if raw.startswith(b"$share/") else (b"", raw)
    if parts is None or not valid_filter(parts[1]):
        raise records.RecordError("a subscription to an impossible filter")
    return list(found)


def recover(frames: Iterable[tuple[int, int, bytes]], progress: Callable[[int], None] | None = None) -> Recovery:
    """Read every (segment, offset of the body, body); `progress` hears the bytes read so far."""
    recovery = Recovery()
    done = 0
    for segment, offset, body in frames:
        recovery.read(segment, offset, body)
        if progress is not None:
            done += len(body)
            progress(done)
    return recovery
