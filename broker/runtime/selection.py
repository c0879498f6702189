"""Hands a sink only the records its `where` takes, and under its `idempotency_key`."""

from __future__ import annotations

from collections.abc import Sequence

from broker.extend.condition import Condition, Unclear
from broker.extend.idempotency import Key
from broker.extend.sink import BatchFailed, Record, Sink


class Selection:
    """A sink in front of a sink. What is passed over counts as stored; what cannot be judged as refused."""

    def __init__(self, sink: Sink, where: Condition) -> None:
        self._sink = sink
        self._where = where

    async def write(self, batch: Sequence[Record]) -> None:
        where = self._where
        chosen: list[int] = []
        failed: dict[int, str] = {}
        for position, record in enumerate(batch):
            try:
                if where(record):
                    chosen.append(position)
            except Unclear as error:
                failed[position] = f"where: {error}"
        await _hand_on(self._sink, batch if len(chosen) == len(batch) else [batch[i] for i in chosen], chosen, failed)

    async def check(self) -> None:
        await self._sink.check()

    async def close(self) -> None:
        await self._sink.close()


class Keyed:
    """A sink in front of a sink, which gets records whose `msgid` is their key. A record without one is refused: stored
    under its message id it would be there twice after a repetition."""

    def __init__(self, sink: Sink, key: Key) -> None:
        self._sink = sink
        self._key = key

    async def write(self, batch: Sequence[Record]) -> None:
        key = self._key
        chosen: list[int] = []
        keyed: list[Record] = []
        failed: dict[int, str] = {}
        for position, record in enumerate(batch):
            other = record.keyed
            if other is None:
                try:
                    other = record.keyed = record.under(key(record))
                except (LookupError, ValueError, TypeError) as error:
                    failed[position] = f"idempotency_key: {error}"
                    continue
            chosen.append(position)
            keyed.append(other)
        await _hand_on(self._sink, keyed, chosen, failed)

    async def check(self) -> None:
        await self._sink.check()

    async def close(self) -> None:
        await self._sink.close()


async def _hand_on(sink: Sink, batch: Sequence[Record], positions: Sequence[int], failed: dict[int, str]) -> None:
    """Write these, which stand at `positions`, and refuse what failed before and what the sink refuses."""
    if batch:
        try:
            await sink.write(batch)
        except BatchFailed as error:
            failed.update((positions[position], reason) for position, reason in error.failed.items())
    if failed:
        raise BatchFailed(failed)
