"""The driver's producers and consumers end, and their connections with them, however badly the driver takes it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import ProducerFenced

from sinks._kafka_ending import Ending


class Closings:
    """Counts how often the connections of one of the driver's objects were closed."""

    def __init__(self, client: Any) -> None:
        self.count = 0
        self._close = client.close
        client.close = self.close

    async def close(self) -> None:
        self.count += 1
        await self._close()


def stopping(ending: Any, how: Callable[[], Any]) -> Closings:
    """Let its `stop` do this, after which the driver believes it is closed."""
    closings = Closings(ending.client if isinstance(ending, AIOKafkaProducer) else ending._client)

    async def stop() -> None:
        ending._closed = True
        await how()

    ending.stop = stop
    return closings


async def fail() -> None:
    raise ProducerFenced


async def test_a_fenced_producer_leaves_no_connection_and_no_forgotten_error():
    """The driver ends half way: its sender raises what the coordinator had said to the last request."""
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", transactional_id="t")
    closings = stopping(producer, fail)
    producer._txn_manager.set_pid_and_epoch(1, 1)
    producer._txn_manager.begin_transaction()
    producer._txn_manager.fatal_error(ProducerFenced())
    heard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    ending = Ending()
    ending.end(producer)
    await ending.close()
    assert closings.count == 1
    del producer
    gc.collect()
    assert heard == []


async def test_a_consumer_that_cancels_itself_cancels_nobody_else():
    """One that is stopped while it waits for its next try raises CancelledError out of its own stop."""
    consumer = AIOKafkaConsumer(bootstrap_servers="127.0.0.1:1")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    closings = stopping(consumer, cancelled)
    await Ending().leave(consumer)
    assert closings.count == 1


async def test_one_that_hangs_is_given_up_within_the_bound():
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", transactional_id="t")
    closings = stopping(producer, asyncio.Event().wait)
    ending = Ending()
    ending.end(producer)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await ending.close()
    assert 2.3 <= loop.time() - began < 10  # 3 s; without the bound it never returns
    assert closings.count == 1
