"""Space on disk: dead segments are dropped from the front. When too much of the journal is dead, what lives in the
oldest segment is copied to the end."""

import logging
from typing import Any

from broker.engine import records
from broker.engine.message import Message
from broker.engine.spool import Spool, stored_at

log = logging.getLogger(__name__)

KEEP = 128 << 20
"""Bytes of journal that are never worth copying."""
SLICE = 400
"""Records looked at in one go: the next go is after the next commit."""


class Compaction:
    """Of one journal. The journal never holds more than twice what lives in it and `KEEP`."""

    def __init__(self, journal: Any) -> None:
        self.journal = journal
        self.failed = False
        """Something copied could not be written: its segment stays."""
        self._copied = False
        """What lived in the segment is on disk once more: it can go."""
        self._segment = 0
        """The segment being copied, 0 for none."""
        self._work: list[Any] = []
        """What is left to look at in it: spools, table keys, (position, record)."""

    def tidy(self) -> None:
        """Drop what is dead, begin to copy when that is worth it. Only while everything is handed over to the store:
        what made a record dead (a newer one, a copy for another session) may still be on its way there."""
        journal = self.journal
        if journal.due or journal.loads:  # whoever reads does so by the old positions
            return
        if self._copied:
            journal.live.pop(self._segment, None)  # it goes below, behind an older one whose going failed
            self._segment = 0
            self._copied = False
        if self._segment:
            return
        sizes: dict[int, int] = journal.store.sizes()
        if len(sizes) < 2:
            return
        live = journal.live
        for segment in sorted(sizes)[:-1]:
            if live.get(segment, 0) > 0:
                break
            live.pop(segment, None)
            del sizes[segment]
            journal.store.drop(segment)
        total = sum(sizes.values())
        if len(sizes) > 1 and total > KEEP and total > 2 * self._needed(sizes) + KEEP:
            self._begin(min(sizes))

    def _needed(self, sizes: dict[int, int]) -> float:
        """Bytes that live, at most: sizes of single records are not kept, the densest segment tells the average."""
        live = self.journal.live
        densest = max(live.get(segment, 0) / size for segment, size in sizes.items() if size)
        return min(sum(live.values()) / densest, sum(sizes.values())) if densest else 0.0

    def _begin(self, segment: int) -> None:
        journal = self.journal
        self._segment = segment
        self.failed = False
        log.debug("copying what is alive in segment %d of the store", segment)
        self._work = [spool for spool in journal.spools.values() if spool.segment == segment]
        self._work.extend(journal.values_in(segment))
        if len(self._work) == journal.live.get(segment, 0):  # no message in it is alive
            self._go_on(True)
        else:
            journal.store.read_segment(segment, self._read)

    def _read(self, found: list[tuple[int, bytes]]) -> None:
        self._work.extend(pair for pair in found if pair[1][0] == records.PUT)
        self._work.reverse()
        self._go_on(True)

    def _go_on(self, written: bool) -> None:
        """Look at the next slice; a commit takes what was copied, then comes the next."""
        journal = self.journal
        if not written:
            self.failed = True
        if self.failed:
            self._segment = 0
            self._work = []
            return
        for _ in range(min(SLICE, len(self._work))):
            item = self._work.pop()
            if isinstance(item, Spool):
                if journal.spools.get(item.number) is item and item.segment == self._segment:
                    journal.snapshot(item)
            elif isinstance(item, bytes):
                journal.rewrite_value(item)
            else:
                try:
                    self._look_at(*item)
                except records.RecordError as error:
                    log.error("store segment %d: a record makes no sense and is left out: %s", item[0] >> 32, error)
        journal.after(self._go_on if self._work else self._done)

    def _look_at(self, position: int, record: bytes) -> None:
        journal = self.journal
        payload = record[records.HEADER :]
        takers = []
        for taker in records.decode_takers(payload):
            spool = journal.spools.get(taker.session)
            if spool is not None and spool.alive(taker.seq, position):
                takers.append((spool, taker.seq, taker.qos, taker.retain, taker.idents, taker.group))
        retained: Message | None = None
        if payload[0] & records.RETAINED:
            retained = journal.kept_at(records.put_topic(payload)[0], position)
        if takers or retained is not None:
            message = records.decode_message(payload, journal.core.now, journal.clock_ms(), journal.origins)
            journal.copy(takers, retained, position, message)

    def copied(self, takers: list[Any], retained: Message | None, old: int, position: int) -> None:
        """A copy is on disk: whoever still needs the record finds it there from now on."""
        journal = self.journal
        # all are asked before the first is told: in flight, they share one record
        alive = [t for t in takers if journal.spools.get(t[0].number) is t[0] and t[0].alive(t[1], old)]
        kept = retained is not None and retained.kept is not None and retained.kept.position == old
        for spool, seq, *_ in alive:
            spool.relocate(seq, position)
        if kept and retained is not None:
            retained.kept = stored_at(position)
        journal.live[position >> 32] += len(alive) + kept

    def _done(self, written: bool) -> None:
        if self.failed or not written:
            self._segment = 0
        else:
            self._copied = True
