"""What a transactional sink has stored: noted in a Kafka topic by the same transactions, read back at a start."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from broker.extend.sink import NotConnected
from sinks._kafka_client import Cluster
from sinks._kafka_errors import describe
from sinks._kafka_part import Part

_PARTITION = 0  # whatever their number becomes, the notes stay where they are
_FORMAT = b"\x01"
_ID = 16  # bytes of a message id
_FIRST_LOOK = 64  # notes from the end; the newest of ours is nearly always among them


class Notes:
    """The notes of one transactional id: records with its name as key, of which the newest counts."""

    def __init__(self, cluster: Cluster, topic: str, name: str, timeout: float) -> None:
        self.topic = topic
        self._cluster = cluster
        self._key = name.encode()
        self._timeout = timeout

    async def part(self, producer: AIOKafkaProducer, ids: Sequence[str]) -> Part:
        """A note that these messages are stored, to be sent in their transaction."""
        await self._cluster.partitions(producer, self.topic)
        part = Part(producer, (self.topic, _PARTITION))
        part.append(timestamp=None, key=self._key, value=encode(ids), headers=[])
        return part

    async def read(self, producer: AIOKafkaProducer) -> list[str]:
        """The ids of the newest note. Called once `producer` is ready: what it had left open has been decided then."""
        await self._cluster.partitions(producer, self.topic)
        place = TopicPartition(self.topic, _PARTITION)
        consumer = self._cluster.consumer()
        try:
            async with asyncio.timeout(self._timeout):
                await consumer.start()
                return await self._newest(consumer, place)
        except (KafkaError, OSError, TimeoutError) as error:
            raise NotConnected(f"Kafka topic {self.topic} cannot be read: {describe(error)}") from error
        finally:
            await consumer.stop()

    async def _newest(self, consumer: AIOKafkaConsumer, place: TopicPartition) -> list[str]:
        consumer.assign([place])
        first = (await consumer.beginning_offsets([place]))[place]
        end = (await consumer.end_offsets([place]))[place]
        look = _FIRST_LOOK
        while True:
            start = max(first, end - look)
            found: bytes | None = None
            consumer.seek(place, start)
            while await consumer.position(place) < end:
                for record in (await consumer.getmany(place, timeout_ms=100)).get(place, ()):
                    if record.key == self._key:
                        found = record.value
            if found is not None or start == first:
                return decode(found) if found is not None else []
            look *= 16


def encode(ids: Sequence[str]) -> bytes:
    """Ids as bytes, first bytes first: they have most digits in common, so that compression leaves little of them."""
    raw = bytes.fromhex("".join(ids))
    return _FORMAT + b"".join(raw[column::_ID] for column in range(_ID))


def decode(note: bytes) -> list[str]:
    """The inverse of `encode`; nothing of what was written by somebody else."""
    count, rest = divmod(len(note) - 1, _ID)
    if note[:1] != _FORMAT or rest:
        return []
    columns = [note[1 + column * count : 1 + (column + 1) * count] for column in range(_ID)]
    return [bytes(row).hex() for row in zip(*columns, strict=True)]
