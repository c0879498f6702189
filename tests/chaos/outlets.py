"""What the sinks stored: rows of the SQLite table, records of the Kafka topic. Reads only."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.chaos.ledger import Stored
from tests.ledger import read_stamp
from tests.servers import PATIENCE

PARTITIONS = 3
LOG_APPEND_TIME = {"message.timestamp.type": "LogAppendTime"}
"""Configuration of a topic whose timestamps tell the batches apart."""
_SILENCE = 20.0 * PATIENCE


def rows(path: Path) -> Iterator[bytes]:
    """Payloads of the table, in the order in which they were stored; none without the file or the table."""
    if not path.exists():
        return
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        if db.execute("select 1 from sqlite_master where name = 'messages'").fetchone():
            for (payload,) in db.execute("select cast(payload as blob) from messages order by rowid"):
                yield payload


async def records(bootstrap: str, topic: str) -> AsyncIterator[tuple[bytes, Stored]]:
    """Value and place of every record that is in the topic now, each partition in the order of its offsets."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        places = [TopicPartition(topic, n) for n in range(PARTITIONS)]
        consumer.assign(places)
        ends = {place: end for place, end in (await consumer.end_offsets(places)).items() if end}
        while ends:
            async with asyncio.timeout(_SILENCE):
                found: dict[Any, Any] = {}
                while not found:
                    found = await consumer.getmany(*ends, timeout_ms=500, max_records=5_000)
            for place, batch in found.items():
                for record in batch:
                    if record.offset >= ends[place]:
                        break
                    yield record.value, _stored(record)
                if await consumer.position(place) >= ends[place]:
                    del ends[place]
    finally:
        await consumer.stop()


def _stored(record: Any) -> Stored:
    msgid = next((value.decode() for name, value in record.headers if name == "mqtt-msgid"), "")
    try:
        stream, number = read_stamp(record.value)
    except ValueError:
        stream, number = repr(record.value[:40]), 0
    return Stored(record.partition, record.timestamp, msgid, stream, number)
