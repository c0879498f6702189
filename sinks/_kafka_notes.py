"""What a transactional sink has stored: noted in a Kafka topic by the same transactions, read back at a start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from broker.extend.sink import NotConnected
from sinks._kafka_client import Cluster
from sinks._kafka_errors import describe
from sinks._kafka_part import Part, Place

_PARTITION = 0  # whatever their number becomes, the notes stay where they are
_FORMAT = b"\x02"
_LENGTH = 4
_ID = 16  # bytes of a message id
_FIRST_LOOK = 64  # notes from the end; the newest of ours is nearly always among them


@dataclass(frozen=True)
class Note:
    """What one transaction left behind."""

    ids: list[str] = field(default_factory=list)
    """Message ids that are stored: of this transaction and of the write before."""
    places: dict[Place, int] = field(default_factory=dict)
    """Partitions it wrote to, and the offset of its first record in each."""


class Notes:
    """The notes of one transactional id: records with its name as key, of which the newest counts."""

    def __init__(self, cluster: Cluster, topic: str, name: str, timeout: float) -> None:
        self.topic = topic
        self.place: Place = (topic, _PARTITION)
        self._cluster = cluster
        self._key = name.encode()
        self._timeout = timeout

    async def part(self, producer: AIOKafkaProducer, note: Note) -> Part:
        """A note, to be sent in the transaction it is about."""
        await self._cluster.partitions(producer, self.topic)
        part = Part(producer, self.place)
        part.append(timestamp=None, key=self._key, value=encode(note), headers=[])
        return part

    async def read(self, producer: AIOKafkaProducer) -> list[str]:
        """The ids of the newest note. Called once `producer` is ready: what it had left open has been decided then."""
        async with self._reading(producer) as consumer:
            return (await self._newest(consumer, TopicPartition(*self.place))).ids

    async def last(self, producer: AIOKafkaProducer) -> tuple[Note, int] | None:
        """The note that was written last and its offset, whatever became of its transaction."""
        place = TopicPartition(*self.place)
        async with self._reading(producer, committed=False) as consumer:
            first, end = await _ends(consumer, place)
            look = _FIRST_LOOK
            while True:
                start = max(first, end - look)
                found: tuple[Note, int] | None = None
                consumer.seek(place, start)
                while await consumer.position(place) < end:
                    for record in (await consumer.getmany(place, timeout_ms=100)).get(place, ()):
                        if record.key == self._key:
                            found = decode(record.value), record.offset
                if found is not None or start == first:
                    return found
                look *= 16

    async def committed(self, producer: AIOKafkaProducer, places: Mapping[Place, int]) -> bool:
        """Whether the records at these offsets, of one decided transaction, are; yes where none is left to say so."""
        async with self._reading(producer) as consumer:
            for (topic, number), offset in places.items():
                place = TopicPartition(topic, number)
                consumer.assign([place])
                consumer.seek(place, offset)
                with suppress(OffsetOutOfRangeError):  # deleted since
                    while await consumer.position(place) <= offset:
                        for record in (await consumer.getmany(place, timeout_ms=100)).get(place, ()):
                            return bool(record.offset == offset)
                    return False
        return True

    @asynccontextmanager
    async def _reading(self, producer: AIOKafkaProducer, *, committed: bool = True) -> AsyncIterator[AIOKafkaConsumer]:
        await self._cluster.partitions(producer, self.topic)
        try:
            async with asyncio.timeout(self._timeout), self._cluster.consumer(committed) as consumer:
                yield consumer
        except TimeoutError as error:
            slow = "Kafka is slow, or another sink's transaction is open"
            raise NotConnected(f"Kafka topic {self.topic} cannot be read to its end: {slow}") from error
        except (KafkaError, OSError) as error:
            raise NotConnected(f"Kafka topic {self.topic} cannot be read: {describe(error)}") from error

    async def _newest(self, consumer: AIOKafkaConsumer, place: TopicPartition) -> Note:
        first, stable = await _ends(consumer, place)
        look = _FIRST_LOOK
        while True:
            start = max(first, stable - look)
            consumer.seek(place, start)
            found = await self._last(consumer, place)
            if found is not None or start == first:
                return decode(found) if found is not None else Note()
            look *= 16

    async def _last(self, consumer: AIOKafkaConsumer, place: TopicPartition) -> bytes | None:
        """Our newest note from where the consumer is up to the end of the log. What is stable ends earlier, where the
        transaction of another sink is open, and our newest note may be behind that."""
        found: bytes | None = None
        end: int | None = None
        while end is None or await consumer.position(place) < end:
            for record in (await consumer.getmany(place, timeout_ms=100)).get(place, ()):
                if record.key == self._key:
                    found = record.value
            if end is None:
                end = consumer.highwater(place)
        return found


async def _ends(consumer: AIOKafkaConsumer, place: TopicPartition) -> tuple[int, int]:
    """Where the consumer can begin to read, and where it has to stop."""
    consumer.assign([place])
    consumer.seek(place, 0)  # at once: else the consumer looks for a place by itself
    first: int = (await consumer.beginning_offsets([place]))[place]
    end: int = (await consumer.end_offsets([place]))[place]
    return first, end


def encode(note: Note) -> bytes:
    """As bytes; of the ids first bytes first: they have most digits in common, so that compression leaves little."""
    places = json.dumps([[*place, offset] for place, offset in note.places.items()]).encode()
    raw = bytes.fromhex("".join(note.ids))
    columns = b"".join(raw[column::_ID] for column in range(_ID))
    return _FORMAT + len(places).to_bytes(_LENGTH, "big") + places + columns


def decode(value: bytes) -> Note:
    """The inverse of `encode`; an empty one of what was written by somebody else."""
    begin = 1 + _LENGTH + int.from_bytes(value[1 : 1 + _LENGTH], "big")
    count, rest = divmod(len(value) - begin, _ID)
    if value[:1] != _FORMAT or count < 0 or rest:
        return Note()
    try:
        places = {(topic, number): offset for topic, number, offset in json.loads(value[1 + _LENGTH : begin])}
    except (ValueError, TypeError):
        return Note()
    columns = [value[begin + column * count : begin + (column + 1) * count] for column in range(_ID)]
    return Note([bytes(row).hex() for row in zip(*columns, strict=True)], places)
