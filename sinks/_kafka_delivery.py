"""One write into Kafka: records laid out into batches, sent, awaited, taken apart where they are refused.

Theory of operation. A delivery goes in rounds: each sends at most one batch to each partition and waits for all.
Records that did not fit, and those of a batch that has to be taken apart, are left for the next round in their order,
and a partition takes no later record before them; so order is kept. A batch that failed leaves a hole in the sequence
numbers of its producer, which Kafka would answer with "out of order" from then on; so that producer is replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalOperation, KafkaError

from broker.extend.sink import Fatal, NotConnected, Record
from sinks._kafka_client import Cluster
from sinks._kafka_errors import TOO_LARGE, Verdict, describe, verdict
from sinks._kafka_layout import Layout
from sinks._kafka_part import Part, Place

_RESENDS = 8  # through a new producer each time; another lane's refused record costs one, too
_LOOK_EVERY = 1.0  # seconds between two looks whether a cluster that owes us answers is there at all
_LOOK_WITHIN = 8.0  # seconds it has to say that it is, however long the answers may take


class Delivery:
    """Stores the records of one batch. `failed` and `sent` say what became of them, also after an exception."""

    def __init__(self, cluster: Cluster, layout: Layout, batch: Sequence[Record], timeout: float) -> None:
        self.batch = batch
        self.failed: dict[int, str] = {}
        """Position -> why that record can never be stored."""
        self.sent: list[Part] = []
        """Everything that was handed to a producer."""
        self._cluster = cluster
        self._layout = layout
        self._timeout = timeout
        self._rooms: dict[Place, int] = {}  # records a partition gets at once while a refused one is looked for
        self._resent = 0

    async def run(self, todo: Sequence[int]) -> None:
        """Until each record is stored or in `failed`. Raises NotConnected or Fatal."""
        while todo:
            producer = await self._cluster.producer()
            topics = await self.topics(producer, todo)
            parts, left = self.lay_out(producer, todo, topics)
            handed = await self.send(parts)
            left += (position for part in parts[len(handed) :] for position in part.positions)
            await self.wait(handed)
            left += self._judge(handed)
            todo = sorted(left)
            if self._resent > _RESENDS:
                raise NotConnected("Kafka takes our batches out of order again and again")

    async def wait(self, parts: Sequence[Part]) -> None:
        """Until all have an answer. NotConnected when that takes too long or no broker can be reached."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        waiting = {part.future: part for part in parts if not part.answered}
        while waiting:
            left = deadline - loop.time()
            if left <= 0:
                raise NotConnected(f"Kafka has not answered for {self._timeout:g} s; the records are on their way")
            done, _ = await asyncio.wait(waiting, timeout=min(_LOOK_EVERY, left))
            for future in done:
                del waiting[future]
            if waiting and not done and (left := deadline - loop.time()) > 0:
                await self._cluster.look(next(iter(waiting.values())).producer, min(left, _LOOK_WITHIN))

    async def topics(self, producer: AIOKafkaProducer, todo: Iterable[int]) -> dict[str, int]:
        """Number of partitions of every topic this round needs."""
        static, topic_of, fixed = self._layout.topic, self._layout.topic_of, self._layout.fixed
        if static is not None:
            named = {static}
        else:
            named = {str(topic_of(self.batch[position])) for position in todo} & self._layout.allowed
        counts = {topic: await self._cluster.partitions(producer, topic) for topic in sorted(named)}
        for topic, partitions in counts.items():
            if fixed is not None and fixed >= partitions:
                raise Fatal(f"`partition = {fixed}`: Kafka topic {topic} has {partitions} partitions, the first is 0")
        return counts

    def lay_out(
        self, producer: AIOKafkaProducer, todo: Iterable[int], topics: dict[str, int]
    ) -> tuple[list[Part], list[int]]:
        """Append each record to the batch of its partition. Answers the batches and what did not fit."""
        layout, batch = self._layout, self.batch
        static, topic_of, partition_of = layout.topic, layout.topic_of, layout.partitioner.for_round()
        key_of, value_of, timestamp_of, headers_of = layout.key, layout.value, layout.timestamp, layout.headers
        limited = bool(self._rooms or layout.limits)
        parts: dict[Place, Part] = {}
        by_key: dict[bytes | None, Part] = {}  # devices send often: their partition is looked for once
        keyed = static is not None and layout.partitioner.keyed
        left: list[int] = []
        for position in todo:
            record = batch[position]
            try:
                topic = static if static is not None else str(topic_of(record))
                partitions = topics.get(topic)
                if partitions is None:
                    self.failed[position] = f"Kafka topic {topic!r} is not among `allowed_topics`"
                    continue
                key, value = key_of(record), value_of(record)
                timestamp, headers = timestamp_of(record), headers_of(record)
            except (LookupError, TypeError, ValueError) as error:
                self.failed[position] = f"cannot be rendered for Kafka: {error}"
                continue
            part = by_key.get(key)
            if part is None:
                place = (topic, partition_of(record, key, partitions))
                part = parts.get(place)
                if part is None:
                    part = parts[place] = Part(producer, place)
                if keyed and key is not None:
                    by_key[key] = part
            if part.full:
                left.append(position)
                continue
            if part.append(timestamp=timestamp, key=key, value=value, headers=headers) is None:
                part.full = True
                left.append(position)
                continue
            part.positions.append(position)
            if limited:
                part.full = self._is_full(part)
        return list(parts.values()), left

    def _is_full(self, part: Part) -> bool:
        room, limit = self._rooms.get(part.place), self._layout.limits.get(part.place[0])
        return (room is not None and len(part.positions) >= room) or (limit is not None and part.batch.size() >= limit)

    async def send(self, parts: list[Part]) -> list[Part]:
        """Hand over in order; stops at a producer that is spent. Answers those handed over."""
        handed: list[Part] = []
        try:
            async with asyncio.timeout(self._timeout):
                for part in parts:
                    await part.send()
                    handed.append(part)
                    self.sent.append(part)
        except (KafkaError, IllegalOperation, TimeoutError, AssertionError) as error:  # last: a partition is no more
            judged = verdict(error)
            if judged is not Verdict.RESEND:
                kind = Fatal if judged is Verdict.FATAL else NotConnected
                raise kind(f"Kafka takes no batch: {describe(error)}") from error
            self._cluster.discard(part.producer)
            self._resent += 1
        return handed

    def _judge(self, parts: Iterable[Part]) -> list[int]:
        """What is to be sent again of answered parts, in smaller batches where a record is refused."""
        again: list[int] = []
        resend = False
        trouble: Exception | None = None
        for part in parts:
            error = part.error
            if error is None:
                if part.place in self._rooms:
                    self._rooms[part.place] *= 2
                continue
            self._cluster.discard(part.producer)
            judged = verdict(error)
            if judged is Verdict.FATAL:
                trouble = Fatal(f"Kafka topic {part.place[0]}: {describe(error)}")
            elif judged is Verdict.RETRY:
                trouble = trouble or NotConnected(f"Kafka topic {part.place[0]}: {describe(error)}")
            elif part.refused is not None:
                self.failed[part.positions[0]] = part.refused
            else:
                again += part.positions
                if judged is Verdict.RESEND:
                    resend = True
                    continue
                self._rooms[part.place] = len(part.positions) // 2
                if isinstance(error, TOO_LARGE):
                    self._layout.limits[part.place[0]] = part.size // 2
        self._resent += resend
        if trouble is not None:
            raise trouble
        return again
