"""Messages become documents of a MongoDB collection: one for each message, or the latest for each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from pymongo import UpdateOne

from broker.config.template import Template
from broker.config.types import Duration
from broker.connectors import mongodb
from broker.extend.record import RecordTemplate
from broker.extend.registry import Backend
from broker.extend.sink import Fatal, NotConnected, Record, SinkConfig
from sinks import _mongodb_series as series
from sinks._mongodb_documents import UNFIT, Documents, encoded
from sinks._mongodb_errors import AGAIN, DUPLICATE, asked, pattern
from sinks._mongodb_inserts import Inserts
from sinks._progress import Progress, Work

_NONE = "is no document for MongoDB"


class MongodbConfig(mongodb.MongoServer, SinkConfig):
    """`[sinks.mongodb]`"""

    collection: str = Field(default="messages", min_length=1, max_length=120, pattern=r"^[^$\x00]+$")
    """Name of the collection."""
    mode: Literal["insert", "upsert", "time_series"] = "insert"
    """insert: a document for each message, but none where its ``_id`` is there: with ``${msgid}`` a message is stored
    once | upsert: the latest `fields` for each value of `upsert_by` | time_series: as insert, into a time series
    collection, where MongoDB cannot tell whether a document is there: one may be stored twice after a crash."""
    fields: dict[str, RecordTemplate] = Field(
        min_length=1,
        default={
            name: Template(f"${{{value}}}")
            for name, value in {"_id": "msgid", "time": "ts", "clientid": "clientid", "username": "username",
                                "topic": "topic", "payload": "payload"}.items()
        },
    )  # fmt: skip
    """Field -> template of its value. A template that is one placeholder keeps the kind of its value: numbers, lists,
    objects; bytes are text where they are UTF-8, else binary. A missing value is null."""
    dates: tuple[str, ...] = ("time",)
    """Fields that are stored as dates: milliseconds since 1970, or a text such as ``2026-11-21T08:00:00Z``."""
    documents: tuple[str, ...] = ()
    """Fields whose text is JSON and stored as what it says, e.g. ``payload``; a record with other text is a dead
    letter."""
    upsert_by: tuple[str, ...] = ()
    """With upsert: the fields that tell which document is meant, e.g. ``clientid``; put an index on them."""
    time_field: str = "time"
    """With time_series: the field with the time, one of `dates`."""
    meta_field: str = "clientid"
    """With time_series: the field that tells series apart; empty: none."""
    expire: Duration = 0.0
    """With time_series: seconds MongoDB keeps a document, set when the collection is made; 0 for ever."""
    timeout: Duration = Field(default=10.0, ge=0.1)
    """Seconds MongoDB has for one batch."""

    @model_validator(mode="after")
    def _check_fields(self) -> MongodbConfig:
        for name in self.fields:
            if not name or name.startswith("$") or set(name) & {".", "\0"}:
                raise ValueError(f"fields: {name!r} is no name of a field")
        if (self.mode == "upsert") != bool(self.upsert_by):
            raise ValueError('upsert_by and mode = "upsert" belong together')
        if self.mode == "upsert" and not set(self.upsert_by) < set(self.fields):
            raise ValueError("upsert_by names some of fields, not all")
        if self.mode == "upsert" and "_id" in self.fields and "_id" not in self.upsert_by:
            raise ValueError("upsert cannot change _id: leave it out of fields, or name it in upsert_by")
        if self.mode == "time_series" and not {self.time_field, self.meta_field} - {""} <= set(self.fields):
            raise ValueError("time_series needs time_field and meta_field among fields")
        if self.mode == "time_series" and self.time_field not in self.dates:
            raise ValueError("time_field must be one of dates")
        return self

    def idempotency_problem(self) -> str | None:
        if self.mode == "time_series":
            return "MongoDB cannot tell what is in a time series collection already"
        names = self.upsert_by if self.mode == "upsert" else ("_id",)
        if any("msgid" in self.fields[name].names for name in names if name in self.fields):
            return None
        return f"{' and '.join(names)} of fields should hold `${{msgid}}`, which it takes the place of"


class Mongodb:
    """One unordered bulk write for a batch, confirmed by a majority of the replica set."""

    def __init__(self, config: MongodbConfig, pool: mongodb.MongoPool) -> None:
        self._config = config
        self._pool = pool
        self._documents = Documents(config.fields, dates=config.dates, documents=config.documents)
        self._ready = config.mode != "time_series"
        recognised = config.mode == "insert" and "_id" in config.fields
        self._inserts = Inserts(pool, config.collection, recognised=recognised)
        self._progress = Progress()

    async def write(self, batch: Sequence[Record]) -> None:
        with self._progress.of(batch) as work:
            if not self._ready:
                await self._make_series()
            await (self._upsert(work) if self._config.mode == "upsert" else self._insert(work))

    async def check(self) -> None:
        if self._config.mode == "time_series":
            await series.is_there(self._pool, self._config.collection)
        else:
            await asked(self._pool.ping())

    async def close(self) -> None:
        await self._pool.close()

    async def _make_series(self) -> None:
        config = self._config
        if not await series.is_there(self._pool, config.collection):
            await series.make(self._pool, config.collection, config.time_field, config.meta_field, config.expire)
        self._ready = True

    async def _insert(self, work: Work) -> None:
        positions, documents = [], []
        for position in work.todo:
            try:
                documents.append(self._documents.values(work.batch[position]))
            except (LookupError, TypeError, ValueError) as error:
                work.refuse(position, f"{_NONE}: {error}")
            else:
                positions.append(position)
        try:
            await self._store(work, positions, documents)
        except UNFIT:  # the driver encodes them all at once: which was it?
            fit = []
            for position, document in zip(positions, documents, strict=True):
                try:
                    encoded(document)
                except ValueError as error:
                    work.refuse(position, f"{_NONE}: {error}")
                else:
                    fit.append((position, document))
            if len(fit) == len(positions):
                raise
            await self._store(work, [position for position, _ in fit], [document for _, document in fit])

    async def _upsert(self, work: Work) -> None:
        writes: dict[int, UpdateOne] = {}
        waiting: dict[bytes, list[int]] = {}  # by the document that is meant, the newest last
        for position in work.todo:
            try:
                key, writes[position] = self._documents.update(work.batch[position], self._config.upsert_by)
            except (LookupError, TypeError, ValueError) as error:
                work.refuse(position, f"{_NONE}: {error}")
            else:
                waiting.setdefault(key, []).append(position)
        while waiting:  # once, but where the newest was refused: then the one before it
            newest = [positions.pop() for positions in waiting.values()]
            refused = await self._store(work, newest, [writes[position] for position in newest])
            for position, older in zip(newest, waiting.values(), strict=True):
                if position not in refused:
                    work.stored(older)
                    older.clear()
            waiting = {key: positions for key, positions in waiting.items() if positions}

    async def _store(self, work: Work, positions: list[int], writes: list[Any]) -> set[int]:
        """One bulk write. Answers the positions that were refused; raises for what is to come again."""
        if not writes:
            return set()
        if self._config.mode == "upsert":
            errors = await asked(self._pool.write(self._config.collection, writes))
        else:
            errors = await self._inserts.send(writes)
        failed = {positions[error["index"]]: error for error in errors if not self._is_stored(error)}
        work.stored([position for position in positions if position not in failed])
        trouble: Exception | None = None
        for position, error in failed.items():
            code, text = error.get("code", 0), f"MongoDB: {error.get('errmsg')} (code {error.get('code')})"
            if code in mongodb.REJECTED:
                trouble = Fatal(text)
            elif code in AGAIN or (code in DUPLICATE and set(pattern(error)) <= set(self._config.upsert_by)):
                trouble = trouble or NotConnected(text)
            else:
                work.refuse(position, text)
        if trouble is not None:
            raise trouble
        return set(failed)

    def _is_stored(self, error: Mapping[str, Any]) -> bool:
        """Whether it says that a document with this `_id` is there: it came before."""
        return self._config.mode != "upsert" and error.get("code") in DUPLICATE and pattern(error) == ["_id"]


async def open_mongodb(config: MongodbConfig) -> Mongodb:
    return Mongodb(config, mongodb.MongoPool(config, size=config.lanes, timeout=config.timeout))


BACKEND = Backend("sinks.mongodb", MongodbConfig, open_mongodb, extra="mongodb")
