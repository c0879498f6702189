"""A batch as one Kafka transaction: its records, and the note that they are stored, become visible together or never.

Theory of operation. Whoever opens a producer with our transactional id ends what an earlier one has left open: Kafka
first finishes what was being committed, aborts the rest and refuses everything the earlier one may still send. So
after every doubt - no answer to a commit, a failed record, a crash - the way is the same: a new producer, and then the
newest note, which says what of the batch that comes again is stored. A note holds the message ids of this write and of
the one before it: the broker has every acknowledgement but the last write's on disk. A batch counts as stored when each
partition has the end of its transaction; what a predecessor's lacks is written first (`Unfinished` says why).

A refused record fails its transaction. The records are then cut in halves, each a transaction of its own, in order.

Of records with the same id, which an `idempotency_key` gives to repetitions, the first is sent; the others count as
stored when it is, and take its place when it is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalOperation, KafkaError, ProducerFenced

from broker.extend.sink import BatchFailed, Fatal, NotConnected, Record
from sinks._kafka_client import Cluster
from sinks._kafka_delivery import Delivery
from sinks._kafka_errors import TOO_LARGE, Verdict, describe, verdict
from sinks._kafka_layout import Layout
from sinks._kafka_notes import Note, Notes
from sinks._kafka_part import Part, Place, outcome, verdicts
from sinks._kafka_unfinished import Unfinished

_RESENDS = 3  # through a new producer each time
_ABORT_WITHIN = 2.0  # seconds; the next producer aborts what we could not
_SETTLED_WITHIN = 5.0  # seconds; the next producer writes the ends that Kafka has lost
_SPENT = (
    "Kafka let another producer take our place again and again: each sink of each broker needs a `transactional_id` of "
    "its own, and a transaction less than `transaction_timeout`"
)


class _Spent(Exception):
    """The producer can do no more; the records are not to blame."""


class Transactions:
    """Writes batches, one at a time."""

    def __init__(self, cluster: Cluster, layout: Layout, notes: Notes, timeout: float) -> None:
        self._cluster = cluster
        self._layout = layout
        self._notes = notes
        self._timeout = timeout
        self._unfinished = Unfinished(notes)
        self._producer: AIOKafkaProducer | None = None
        """The one whose notes we know: while it lasts nobody else writes any."""
        self._before: list[str] = []
        self._now: list[str] = []
        """Message ids that the next note has to hold: of the write before, and of this one."""
        self._advanced = False
        """Whether the last write stored anything new: until then more of what came before it may come again."""
        self._stored: frozenset[str] = frozenset()

    async def write(self, batch: Sequence[Record]) -> None:
        """As `Sink.write`. What the newest note holds is not sent again."""
        delivery = Delivery(self._cluster, self._layout, batch, self._timeout)
        self._before = self._now if self._advanced else [*self._before, *self._now]
        self._advanced = False
        self._begin(batch)
        groups = [list(range(len(batch)))]
        spent = 0
        while groups:
            producer = await self._open(batch)
            left = [p for p in groups.pop() if p not in delivery.failed and batch[p].msgid not in self._stored]
            todo = _first_of_each(batch, left)
            if not todo:
                continue
            try:
                bad = await self._transact(producer, delivery, todo)
                if bad:
                    groups += self._take_apart(bad, todo, left, delivery)
                    await self._forsake(producer)
                elif len(todo) < len(left):
                    groups.append(left)  # the first of some may have been refused before anything was sent
            except _Spent:
                await self._forsake(producer)
                spent += 1
                if spent > _RESENDS:
                    raise Fatal(_SPENT) from None
                groups.append(left)
            except asyncio.CancelledError:
                self._cluster.discard(producer)
                raise
            except BaseException:
                await self._forsake(producer)
                raise
        if delivery.failed:
            raise BatchFailed(delivery.failed)

    async def _open(self, batch: Sequence[Record]) -> AIOKafkaProducer:
        producer = await self._cluster.producer()
        if producer is not self._producer:
            try:
                async with asyncio.timeout(self._timeout):
                    await self._unfinished.finish(producer)
                self._before = await self._notes.read(producer)
            except (KafkaError, TimeoutError, AssertionError) as error:  # the last: the driver's transaction is over
                self._cluster.discard(producer)
                raise NotConnected(f"Kafka's last transaction could not be ended: {describe(error)}") from error
            self._begin(batch)
            self._producer = producer
        return producer

    def _begin(self, batch: Sequence[Record]) -> None:
        """Divide what is known to be stored into what this batch holds and the rest."""
        known = frozenset(self._before)
        self._now = [ident for ident in dict.fromkeys(record.msgid for record in batch) if ident in known]
        mine = frozenset(self._now)
        self._before = [ident for ident in self._before if ident not in mine]
        self._stored = known

    async def _transact(self, producer: AIOKafkaProducer, delivery: Delivery, todo: Sequence[int]) -> list[Part]:
        """One transaction. It is committed unless parts of it are answered, which failed."""
        try:
            topics = await delivery.topics(producer, todo)
            async with asyncio.timeout(self._timeout):
                await self._unfinished.make_sound(producer, topics)
                await producer.begin_transaction()
            left, stored = todo, dict[Place, int]()
            while left:
                parts, later = delivery.lay_out(producer, left, topics)
                if bad := await self._hand_over(delivery, parts):
                    return bad
                for part in parts:
                    stored.setdefault(part.place, part.offset)
                left = sorted(later)
            ids = [ident for p in todo if p not in delivery.failed and (ident := delivery.batch[p].msgid) is not None]
            note = await self._notes.part(producer, Note([*self._before, *self._now, *ids], stored))
            if bad := await self._hand_over(delivery, [note]):
                raise outcome(bad)
            async with asyncio.timeout(self._timeout):
                await producer.commit_transaction()
            async with asyncio.timeout(_SETTLED_WITHIN):
                await self._unfinished.settled(producer, [*stored, self._notes.place])
        except ProducerFenced as error:
            raise _Spent from error
        except (KafkaError, TimeoutError, AssertionError) as error:  # the last: the driver's transaction is over
            kind = Fatal if verdict(error) is Verdict.FATAL else NotConnected
            raise kind(f"Kafka's transaction did not end well: {describe(error)}") from error
        self._now += ids
        self._advanced = True
        self._stored = frozenset((*self._before, *self._now))
        return []

    async def _hand_over(self, delivery: Delivery, parts: list[Part]) -> list[Part]:
        """Send and await; answers those that failed."""
        handed = await delivery.send(parts)
        await delivery.wait(handed)
        bad = [part for part in handed if part.error is not None]
        if len(handed) < len(parts) or Verdict.RESEND in verdicts(bad):
            raise _Spent
        return bad

    def _take_apart(self, bad: list[Part], todo: list[int], left: list[int], delivery: Delivery) -> list[list[int]]:
        """What of `left` is to be tried next, the last group first. Raises what is not the fault of a record."""
        if verdicts(bad) != {Verdict.POISON}:
            raise outcome(bad)
        refused = {part.positions[0]: reason for part in bad if (reason := part.refused) is not None}
        delivery.failed.update(refused)
        if refused or all(self._narrow(part) for part in bad):
            return [left]
        middle = left.index(todo[len(todo) // 2])
        return [left[middle:], left[:middle]]

    def _narrow(self, part: Part) -> bool:
        """Whether the batch may be what is too large, and not a record in it: the topic gets smaller ones then."""
        topic, limits = part.place[0], self._layout.limits
        if not isinstance(part.error, TOO_LARGE) or 4 * part.size > 7 * limits.get(topic, part.size):
            return False
        limits[topic] = part.size // 2
        return True

    async def _forsake(self, producer: AIOKafkaProducer) -> None:
        """The producer's transaction is not to be; readers of what is committed wait for its end."""
        with suppress(KafkaError, TimeoutError, IllegalOperation, AssertionError):
            async with asyncio.timeout(_ABORT_WITHIN):
                await producer.abort_transaction()
        self._cluster.discard(producer)


def _first_of_each(batch: Sequence[Record], positions: list[int]) -> list[int]:
    """Without those whose id one before them has."""
    first: dict[str | int, int] = {}
    for position in positions:
        first.setdefault(batch[position].msgid or position, position)
    return list(first.values())
