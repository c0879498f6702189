"""Transactions of ours that a partition has no end of, though Kafka's coordinator believes that they have ended.

Theory of operation. A commit is answered when it is decided; the end is written into each partition afterwards. While a
partition has no leader - it has no other replica and its broker starts again - Kafka takes it for deleted and leaves
the end out, for ever. Who reads what is committed waits at that place, and the next end of ours there, whichever it is,
decides about what stood open. So we ask each partition ourselves (DescribeProducers, KIP-664), before a batch counts as
stored and before a new producer writes there, and end what is open with a transaction of no records.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import IncompatibleBrokerVersion, KafkaError, TopicAuthorizationFailedError, for_code

from sinks._kafka_describe import DescribeProducers
from sinks._kafka_notes import Notes
from sinks._kafka_part import Place

_log = logging.getLogger("sinks.kafka")

_LOOK_AGAIN = (0.001, 0.1)  # seconds between two looks, first and longest


class Unfinished:
    """Looks at partitions on behalf of one sink. Where Kafka does not tell (before 2.8, or no right to read the topic)
    nothing is taken for open. Raises the driver's errors."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._sound: set[Place] = set()
        """Partitions that hold nothing of an earlier producer without its end."""
        self._silent: set[str] = set()

    async def finish(self, producer: AIOKafkaProducer) -> None:
        """For a new producer: the last transaction that wrote a note ends where it has no end as it did elsewhere."""
        self._sound = set()
        last = await self._notes.last(producer)
        if last is None:
            return
        places = last[0].places | {self._notes.place: last[1]}
        found = await self._find(producer, places)
        of_last = [place for place, since in found.items() if places[place] < 0 or since <= places[place]]
        if of_last:  # all its records are there, the note was the last
            known = {place: at for place, at in places.items() if place not in of_last and at >= 0}
            await self._end(producer, of_last, await self._notes.committed(producer, known))

    async def make_sound(self, producer: AIOKafkaProducer, topics: Mapping[str, int]) -> None:
        """Before topics with so many partitions are written to: what is open there has no note, it was not to be."""
        places = {self._notes.place, *((topic, number) for topic, count in topics.items() for number in range(count))}
        if places <= self._sound:
            return
        found = await self._find(producer, places - self._sound)
        if found:
            await self._end(producer, found, False)
        self._sound |= places

    async def settled(self, producer: AIOKafkaProducer, places: Collection[Place]) -> None:
        """Until each of these has the end of our transaction; whoever calls has to bound it."""
        wait, longest = _LOOK_AGAIN
        while places := await self._find(producer, places):
            await asyncio.sleep(wait)
            wait = min(2 * wait, longest)

    async def _end(self, producer: AIOKafkaProducer, places: Collection[Place], commit: bool) -> None:
        """End what is open in these."""
        _log.warning(
            "Kafka has lost the end of a transaction in %s: it is %s now",
            ", ".join(f"{topic}-{number}" for topic, number in places), "committed" if commit else "aborted",
        )  # fmt: skip
        await producer.begin_transaction()
        for place in places:
            producer._txn_manager.maybe_add_partition_to_txn(TopicPartition(*place))
        await (producer.commit_transaction() if commit else producer.abort_transaction())
        await self.settled(producer, places)

    async def _find(self, producer: AIOKafkaProducer, places: Collection[Place]) -> dict[Place, int]:
        """Those in which a transaction of this producer's id has begun and not ended, and at which offset it began."""
        by_leader = await self._led(producer, [place for place in places if place[0] not in self._silent])
        found: dict[Place, int] = {}
        for leader, some in by_leader.items():
            try:
                answer = await producer.client.send(leader, DescribeProducers(some))
            except IncompatibleBrokerVersion as error:
                self._hush({topic for topic, _ in some}, error)
                continue
            found.update(self._open(answer, producer._txn_manager.producer_id))
        return found

    async def _led(self, producer: AIOKafkaProducer, places: Collection[Place]) -> dict[int, list[Place]]:
        """By the node that leads them; without those of topics that are no more."""
        client = producer.client
        if any(client.cluster.partitions_for_topic(topic) is None for topic, _ in places):
            for topic in {topic for topic, _ in places}:
                client.add_topic(topic)
            await client.force_metadata_update()
        by_leader: dict[int, list[Place]] = {}
        for place in places:
            if place[1] in (client.cluster.partitions_for_topic(place[0]) or ()):
                leader = client.cluster.leader_for_partition(TopicPartition(*place))
                if leader is None or leader == -1:
                    await client.force_metadata_update()
                    raise KafkaError(f"partition {place[1]} of topic {place[0]} has no leader")
                by_leader.setdefault(leader, []).append(place)
        return by_leader

    def _open(self, answer: Any, ours: int) -> Iterable[tuple[Place, int]]:
        for topic, partitions, _ in answer.topics:
            for number, code, _, producers, _ in partitions:
                error = for_code(code)
                if error is TopicAuthorizationFailedError:
                    self._hush({topic}, error())
                elif code:
                    raise error()
                else:
                    for producer_id, *_, since, _ in producers:
                        if producer_id == ours and since >= 0:
                            yield (topic, number), since

    def _hush(self, topics: set[str], error: KafkaError) -> None:
        for topic in topics - self._silent:
            _log.warning("Kafka does not tell whether transactions in topic %s have ended: %s", topic, error)
        self._silent |= topics
