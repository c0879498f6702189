"""New documents of a MongoDB collection, in the quickest way that stores each once."""

from __future__ import annotations

from typing import Any

from broker.connectors.mongodb import MongoPool
from broker.extend.sink import NotConnected
from sinks._mongodb_errors import asked


class Inserts:
    """`recognised`: the documents have an ``_id`` of ours, so what is sent again is known to the server. Otherwise the
    driver sends them, and again after an error, under a number that a replica set knows."""

    def __init__(self, pool: MongoPool, collection: str, *, recognised: bool) -> None:
        self._pool = pool
        self._collection = collection
        self._recognised = recognised
        self._split = False

    async def send(self, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the server says about each that it refused; raises as `asked` does."""
        if self._split or not self._recognised:
            errors = await asked(self._pool.insert(self._collection, documents))
            self._split = False
            return errors
        try:
            return await asked(self._pool.insert_at_once(self._collection, documents))
        except NotConnected:
            self._split = True  # it may have been more than a server takes in one command
            raise
