"""Hands a sink only the records its `where` takes."""

from __future__ import annotations

from collections.abc import Sequence

from broker.extend.condition import Condition, Unclear
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
        if chosen:
            try:
                await self._sink.write(batch if len(chosen) == len(batch) else [batch[i] for i in chosen])
            except BatchFailed as error:
                failed.update((chosen[position], reason) for position, reason in error.failed.items())
        if failed:
            raise BatchFailed(failed)

    async def check(self) -> None:
        await self._sink.check()

    async def close(self) -> None:
        await self._sink.close()
