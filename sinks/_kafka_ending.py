"""Producers and consumers of the driver on their way out: their connections are closed whatever becomes of them."""

from __future__ import annotations

import asyncio
import logging

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError

_log = logging.getLogger("sinks.kafka")

_FLUSH, _ABANDON = 2.0, 1.0  # close() takes _FLUSH + 2 * _ABANDON seconds at most


class Ending:
    """Ends them in tasks of their own, so that what the driver raises there is nobody else's cancellation or error."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], AIOKafkaProducer | AIOKafkaConsumer] = {}

    def end(self, producer: AIOKafkaProducer) -> None:
        """What it still holds is sent, then it ends; returns at once."""
        self._start(producer)

    async def leave(self, consumer: AIOKafkaConsumer) -> None:
        """Returns when it has ended, which takes a second at most while somebody waits for it."""
        await asyncio.wait([self._start(consumer)], timeout=_ABANDON)

    async def close(self) -> None:
        """What is on its way gets two seconds, then it is abandoned: the queue it came from still has it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_FLUSH)
        for ending in self._tasks.values():  # there is no public way to make it give up
            if isinstance(ending, AIOKafkaProducer):
                ending._message_accumulator.fail_all(KafkaError("closed"))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_ABANDON)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_ABANDON)

    def _start(self, ending: AIOKafkaProducer | AIOKafkaConsumer) -> asyncio.Task[None]:
        task = asyncio.create_task(_stop(ending))
        self._tasks[task] = ending
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        ending = self._tasks.pop(task)
        if not task.cancelled() and task.exception() is not None:
            _log.debug("a %s did not end well: %s", type(ending).__name__, task.exception())


async def _stop(ending: AIOKafkaProducer | AIOKafkaConsumer) -> None:
    """The driver's own end stops half way when the producer was fenced, or the consumer was waiting to try again."""
    client = ending.client if isinstance(ending, AIOKafkaProducer) else ending._client
    try:
        await ending.stop()
    finally:
        await client.close()
        transactions = getattr(ending, "_txn_manager", None)
        waiter = transactions and transactions.wait_for_transaction_end()
        if waiter is not None and waiter.done() and not waiter.cancelled():
            waiter.exception()  # else it is reported as forgotten, by whoever collects the garbage
