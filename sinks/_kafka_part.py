"""What is sent to one partition at once, and how that ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from broker.extend.sink import Fatal, NotConnected, Record
from sinks._kafka_errors import Verdict, describe, verdict

Place = tuple[str, int]


class Part:
    """What one write sends to one partition at once, and how that ended."""

    __slots__ = ("append", "batch", "full", "future", "place", "positions", "producer", "records", "size")

    def __init__(self, producer: AIOKafkaProducer, place: Place) -> None:
        self.producer = producer
        self.place = place
        self.batch = producer.create_batch()
        self.append = self.batch.append
        self.full = False
        self.positions: list[int] = []
        self.records: list[Record] = []
        """Filled for a part that outlives its write, so that its records can be told by identity."""
        self.size = 0
        self.future: asyncio.Future[Any]

    async def send(self) -> None:
        """Hand the batch to the driver; `future` is its answer."""
        self.size = self.batch.size()
        self.batch.close()
        topic, partition = self.place
        self.future = await self.producer.send_batch(self.batch, topic, partition=partition)
        self.future.add_done_callback(_retrieve)

    @property
    def answered(self) -> bool:
        return self.future.done()

    @property
    def offset(self) -> int:
        """Where a stored part begins; -1 if Kafka had it already and does not tell."""
        return int(getattr(self.future.result(), "offset", -1))

    @property
    def error(self) -> BaseException | None:
        """How an answered part failed; None when it is stored."""
        return asyncio.CancelledError() if self.future.cancelled() else self.future.exception()

    @property
    def refused(self) -> str | None:
        """Why its only record can never be stored; None otherwise."""
        if not self.answered or len(self.positions) != 1:
            return None
        error = self.error
        if error is None or verdict(error) is not Verdict.POISON:
            return None
        return f"Kafka topic {self.place[0]}: {describe(error)}"

    @property
    def settled(self) -> bool:
        """Whether sending its records again would be wrong: stored, refused, or nobody knows yet."""
        return not self.answered or self.error is None or self.refused is not None


def _retrieve(future: asyncio.Future[Any]) -> None:
    """So that an answer nobody waits for any more is not reported as forgotten."""
    with suppress(asyncio.CancelledError):
        future.exception()


def verdicts(bad: Iterable[Part]) -> set[Verdict]:
    """What the errors of these say."""
    return {verdict(error) for part in bad if (error := part.error) is not None}


def outcome(bad: Sequence[Part]) -> Exception:
    """What the worst of these errors means for the whole transaction."""
    worst = min(bad, key=lambda part: verdicts([part]) != {Verdict.FATAL})
    kind = Fatal if verdicts([worst]) == {Verdict.FATAL} else NotConnected
    return kind(f"Kafka topic {worst.place[0]}: {describe(worst.error or KafkaError())}")
