"""The connection to one Kafka cluster: a producer that is replaced when it failed, topics and their partitions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.metadata import MetadataRequest

from broker.extend.sink import Fatal, NotConnected
from sinks import _kafka_connection, _kafka_log
from sinks._kafka_diagnosis import Diagnosis
from sinks._kafka_ending import Ending
from sinks._kafka_errors import Verdict, about_topic, describe, verdict
from sinks._kafka_security import Sasl, Tls, driver_options, token_provider

_log = logging.getLogger("sinks.kafka")

_METADATA_EVERY_MS = 60_000
_MISSING_FOR = 30.0  # seconds until a missing topic is a mistake and not a topic about to be made
_LEADERLESS = 120.0  # seconds a batch waits for a leader: given up, what may be stored would be sent as something new
_SILENT = 12.0  # seconds after which a connection that answers nothing is replaced, however patient we are told to be

_kafka_connection.install()
_kafka_log.install()


class Cluster:
    """Opens a producer when one is asked for; at most one is current, discarded ones end by themselves."""

    def __init__(
        self, servers: list[str], sasl: Sasl | None, tls: Tls | None, timeout: float, **producer_options: Any
    ) -> None:
        self._servers = servers
        tokens = token_provider(sasl)
        self._security = partial(driver_options, sasl, tls, tokens)
        self._hears_no = tokens is None
        """Whether the driver notices that it is not let in: it takes a token that is refused for a good one."""
        self._diagnosis = Diagnosis(servers, self._security, timeout)
        self._timeout = timeout
        self._request_ms = int(min(timeout, _SILENT) * 1000)
        self._options = producer_options
        self._opening = asyncio.Lock()
        self._producer: AIOKafkaProducer | None = None
        self._ending = Ending()
        self._partitions: dict[str, int] = {}
        self._missing: dict[str, float] = {}

    async def producer(self) -> AIOKafkaProducer:
        """The current one, connected. Raises NotConnected or Fatal."""
        if self._producer is not None:
            return self._producer
        async with self._opening:
            if self._producer is None:
                self._producer = await self._open()
            return self._producer

    @asynccontextmanager
    async def consumer(self, committed: bool) -> AsyncIterator[AIOKafkaConsumer]:
        """One that reads what is committed, or everything, from where it is told to."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._servers, isolation_level="read_committed" if committed else "read_uncommitted",
            enable_auto_commit=False, auto_offset_reset="none", request_timeout_ms=self._request_ms,
            **self._security(),
        )  # fmt: skip
        try:
            await consumer.start()
            yield consumer
        finally:
            await self._ending.leave(consumer)

    def discard(self, producer: AIOKafkaProducer) -> None:
        """A batch of it failed, so its sequence numbers have a hole: what it still holds is finished, then it ends."""
        if self._producer is producer:
            self._producer = None
            self._ending.end(producer)

    async def partitions(self, producer: AIOKafkaProducer, topic: str) -> int:
        """How many partitions the topic has. Raises NotConnected, or Fatal when it is not ours or missing for long."""
        known = producer.client.cluster.partitions_for_topic(topic) or await self._look_up(producer, topic)
        count = max(known) + 1
        before = self._partitions.get(topic)
        if before != count:
            self._partitions[topic] = count
            self._missing.pop(topic, None)
            if before is not None:
                _log.warning("topic %s now has %d partitions, it had %d: keys move to others", topic, count, before)
        return count

    async def look(self, producer: AIOKafkaProducer, timeout: float) -> None:
        """Ask the cluster for its layout anew. NotConnected or Fatal when no broker answers."""
        try:
            async with asyncio.timeout(timeout):
                answered = await producer.client.force_metadata_update()
        except TimeoutError as error:
            raise NotConnected(f"Kafka at {', '.join(self._servers)} does not answer") from error
        if not answered:
            raise await self._diagnosis.reason(None)

    async def check(self, *topics: str) -> None:
        """One round trip; a topic that is missing is Fatal at once. No transactional producer is opened for that: it
        would end the one of the sink that runs."""
        own = None
        if self._producer is None and self._options.get("transactional_id"):
            await self._let_in()
            own = AIOKafkaClient(bootstrap_servers=self._servers, **self._security())
        client = own or (await self.producer()).client
        try:
            async with asyncio.timeout(self._timeout):
                if own is not None:
                    await own.bootstrap()
                answers = await _ask_about(client, topics)
        except (KafkaError, OSError, TimeoutError) as error:
            raise await self._diagnosis.reason(error) from error
        finally:
            if own is not None:
                await own.close()
        for topic in topics:
            if reason := about_topic(topic, answers.get(topic)):
                raise reason

    async def close(self) -> None:
        """Within four seconds."""
        if self._producer is not None:
            self.discard(self._producer)
        await self._ending.close()

    async def _look_up(self, producer: AIOKafkaProducer, topic: str) -> set[int]:
        client = producer.client
        client.add_topic(topic)
        for _ in range(2):  # an update that was under way did not ask for this topic
            await self.look(producer, self._timeout)
            if topic in client.cluster.unauthorized_topics:
                raise Fatal(f"Kafka does not let us write to topic {topic!r}: allow it")
            known: set[int] | None = client.cluster.partitions_for_topic(topic)
            if known:
                return known
        now = time.monotonic()
        if now - self._missing.setdefault(topic, now) > _MISSING_FOR:
            raise Fatal(f"Kafka has no topic {topic!r}: create it")
        raise NotConnected(f"Kafka has no topic {topic!r} yet")

    async def _let_in(self) -> None:
        if not self._hears_no and isinstance(refusal := await self._diagnosis.refusal(), Fatal):
            raise refusal

    async def _open(self) -> AIOKafkaProducer:
        await self._let_in()
        security = self._security()
        try:
            producer = AIOKafkaProducer(
                bootstrap_servers=self._servers, linger_ms=0,
                request_timeout_ms=self._request_ms, metadata_max_age_ms=_METADATA_EVERY_MS,
                **self._options, **security,
            )  # fmt: skip
        except RuntimeError as error:  # a compression whose library is not installed
            raise Fatal(f"{error}: pip install 'isthmus[kafka]'") from error
        if self._options.get("enable_idempotence"):  # the driver's limit is a request's; there is no public way
            producer._message_accumulator._batch_ttl = max(_LEADERLESS, self._timeout)
        try:
            async with asyncio.timeout(self._timeout):
                await producer.start()
        except (KafkaError, OSError, TimeoutError, ValueError, AssertionError) as error:
            await producer.stop()
            if verdict(error) is Verdict.FATAL:
                raise Fatal(f"Kafka does not let us write: {describe(error)}") from error
            if isinstance(error, AssertionError):  # the cluster names no broker: its only one is just back
                raise await self._diagnosis.reason(None) from error
            raise await self._diagnosis.reason(error) from error
        except BaseException:
            await producer.stop()
            raise
        return producer


async def _ask_about(client: AIOKafkaClient, topics: Iterable[str]) -> dict[str, type[KafkaError]]:
    """What the cluster says of each of these topics, and of no other: there may be very many. None is made by that.
    KafkaError when no broker answers."""
    question = MetadataRequest(list(topics), allow_auto_topic_creation=False)
    trouble: KafkaError = KafkaError("no broker answers")
    for broker in client.cluster.brokers():
        try:
            answer = await client.send(broker.nodeId, question)
        except KafkaError as error:
            trouble = error
        else:
            return {topic: for_code(code) for code, topic, *_ in answer.topics}
    raise trouble
