"""A time series collection of MongoDB: is it there, and make it."""

from __future__ import annotations

from typing import Any

from broker.connectors.mongodb import MongoPool
from broker.extend.sink import Fatal
from sinks._mongodb_errors import asked


async def is_there(pool: MongoPool, collection: str) -> bool:
    """Raises Fatal when a collection of this name is no time series."""
    answer = await asked(pool.command({"listCollections": 1, "filter": {"name": collection}}))
    found = answer["cursor"]["firstBatch"]
    if found and found[0].get("type") != "timeseries":
        raise Fatal(f"collection {collection} is there and no time series: choose another, or another mode")
    return bool(found)


async def make(pool: MongoPool, collection: str, time_field: str, meta_field: str, expire: float) -> None:
    """`meta_field` may be empty: none; `expire`: seconds MongoDB keeps a document, 0 for ever."""
    series = {"timeField": time_field, **({"metaField": meta_field} if meta_field else {})}
    command: dict[str, Any] = {"create": collection, "timeseries": series}
    if expire:
        command["expireAfterSeconds"] = int(expire)
    await asked(pool.command(command))
