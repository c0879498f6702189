"""Dead letters of a sink: listed, shown, replayed into the sink's own queue, purged.

They wait in the durable session ``isthmus/<sink>/dlq``. This attaches to it as a client of the internal listener and
reads; what is not acknowledged stays where it is, in its order. A replayed message goes to the lanes of its sink and to
nobody else, with the id, time and publisher it had, so a target that knows the message stores it once.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson

from broker.admin.control import CommandFailed
from broker.client.connection import Connection, Handler, connect
from broker.engine.instances import RESERVED
from broker.engine.message import METADATA, Message, Origin
from broker.engine.receiver import DONE, REFUSED
from broker.engine.session import Session
from broker.engine.spool import FAILED, OPEN, WRITING
from broker.mqtt.packets import Publish
from broker.mqtt.properties import Properties, encode_properties

_PUBACK = 4
_FOREVER = 0xFFFFFFFF
_AT_ONCE = 500
"""Letters read before the first of them is acknowledged."""
_MOST = 65_535
"""Letters that can be looked through for one id: the window of a session."""
_PATIENCE = 10.0
"""Seconds without a letter, or for the store to take one, after which that is an error."""
_OURS = ("error", "sink", "attempts", "topic", "metadata", "truncated")
"""The properties a worker puts before those of the publisher."""


class Letter:
    """One dead letter as it was delivered."""

    def __init__(self, publish: Publish) -> None:
        self.publish = publish
        pairs = (publish.properties.user_properties if publish.properties is not None else None) or []
        self.ours: dict[str, str] = {}
        self.theirs: list[tuple[str, str]] = []
        for key, value in pairs:
            if key == METADATA:
                self._kept = _metadata(value)
            elif key in _OURS and key not in self.ours and not self.theirs:
                self.ours[key] = value
            else:
                self.theirs.append((key, value))
        self.published: dict[str, Any] = _metadata(self.ours.get("metadata", ""))
        """Who published the message, and when, in the broker's words; empty where nobody vouched for it."""

    _kept: dict[str, Any] = {}  # noqa: RUF012 (the default of an attribute)

    @property
    def id(self) -> str:
        """The message's id, which its record had; the letter's own where the message had none."""
        return str(self.published.get("i") or self._kept.get("i") or "")

    def row(self) -> dict[str, Any]:
        """What `list` shows."""
        return {
            "id": self.id,
            "time": self._kept.get("t"),
            "topic": self.ours.get("topic", ""),
            "clientid": self.published.get("c"),
            "attempts": int(self.ours.get("attempts", "0")),
            "bytes": len(self.publish.payload),
            "error": self.ours.get("error", ""),
        }

    def whole(self) -> dict[str, Any]:
        """What `show` shows."""
        found = self.row() | {"username": self.published.get("u"), "published": self.published.get("t")}
        try:
            found["payload"] = self.publish.payload.decode()
        except UnicodeDecodeError:
            found["payload_base64"] = b64encode(self.publish.payload).decode()
        if "truncated" in self.ours:
            found["truncated"] = int(self.ours["truncated"])
        if self.theirs:
            found["user_properties"] = self.theirs
        return found

    def message(self) -> Message:
        """The message as it was published. ValueError when not all of it is here."""
        if "truncated" in self.ours:
            raise ValueError(f"letter {self.id} is cut: the message had {self.ours['truncated']} bytes")
        who = self.published
        sent = self.publish.properties
        kept = Properties()
        if sent is not None:
            kept.payload_format_indicator = sent.payload_format_indicator
            kept.content_type = sent.content_type
            kept.response_topic = sent.response_topic
            kept.correlation_data = sent.correlation_data
        kept.user_properties = self.theirs or None
        origin = None
        if who:
            origin = Origin(who["c"], who["u"], who["a"], who.get("o"), None, who["n"])
        message = Message(
            self.ours["topic"].encode(), self.publish.payload, int(who.get("q", 1)), bool(who.get("r")),
            _without_length(encode_properties(kept)), 0.0, origin,
        )  # fmt: skip
        if who.get("i"):
            message.ident, message.time_ms = str(who["i"]), int(who["t"])
        return message


class _Full(Exception):
    """The sink's queue takes no more."""


class _Reader(Handler):
    """Collects what is delivered."""

    def __init__(self) -> None:
        self.open = 0
        """Letters taken and not settled."""
        self._arrived: list[Publish] = []
        self._more = asyncio.Event()
        self._conn: Connection

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self._conn = conn
        self._arrived.append(publish)

    def on_batch_end(self, conn: Connection) -> None:
        if self._arrived:  # a read may end in the middle of a large letter
            self._more.set()

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self._more.set()

    async def take(self) -> list[Letter]:
        """What has arrived, at least one; empty when nothing does any more."""
        if not self._arrived:
            self._more.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await self._more.wait()
        arrived, self._arrived = self._arrived, []
        self.open += len(arrived)
        return [Letter(publish) for publish in arrived]

    def settle(self, letter: Letter) -> None:
        """It goes."""
        self._conn.ack(_PUBACK, letter.publish.packet_id)
        self.open -= 1


class DeadLetters:
    """One command at a time. `broker` is the application's `Broker`."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        self._busy = asyncio.Lock()

    async def listing(self, name: str, limit: int = 100) -> list[dict[str, Any]]:
        """The oldest letters of a sink."""
        limit = max(1, min(limit, _MOST))
        async with self._read(name, limit) as (_, batches):
            return [letter.row() async for letters in batches for letter in letters][:limit]

    async def show(self, name: str, id: str) -> dict[str, Any]:
        """One letter, with its payload."""
        async with self._read(name, _MOST) as (_, batches):
            async for letters in batches:
                for letter in letters:
                    if letter.id == id:
                        return letter.whole()
        raise CommandFailed(f"no dead letter of {name} has the id {id}")

    async def replay(self, name: str, ids: Collection[str] = ()) -> dict[str, Any]:
        """Put letters (all, or these) back into the sink's queue. One that fails again comes back behind the last, and
        this command does not look there."""
        if name not in self._broker.settings.sinks:
            raise CommandFailed(f"no sink is called {name!r}; without its fragment there is no queue to go back to")
        done, problem = 0, ""
        async with self._read(name, _MOST if ids else _AT_ONCE) as (reader, batches):
            async for letters in batches:
                offered = []
                try:
                    for letter in letters:
                        if ids and letter.id not in ids:
                            continue
                        try:
                            offered.append((letter, self._requeue(name, letter.message())))
                        except ValueError as error:
                            problem = str(error)
                except _Full as error:
                    problem = str(error)
                    break
                finally:
                    stored = [letter for letter, message in offered if await _stored(message)]
                    for letter in stored:
                        reader.settle(letter)
                    done += len(stored)
        return {"replayed": done, "left": self._session(name).queued, "problem": problem}

    async def purge(self, name: str, ids: Collection[str] = ()) -> dict[str, Any]:
        """Delete letters (all, or these)."""
        done = 0
        async with self._read(name, _MOST if ids else _AT_ONCE) as (reader, batches):
            async for letters in batches:
                for letter in letters:
                    if not ids or letter.id in ids:
                        reader.settle(letter)
                        done += 1
        return {"purged": done, "left": self._session(name).queued}

    def _session(self, name: str) -> Session:
        session: Session | None = self._broker.engine.sessions.get(f"{RESERVED}{name}/dlq")
        if session is None:
            raise CommandFailed(f"no sink is called {name!r}, and no dead letters of one are left")
        return session

    @asynccontextmanager
    async def _read(self, name: str, window: int) -> AsyncIterator[tuple[_Reader, AsyncIterator[list[Letter]]]]:
        """The letters that are there now, at most `window` of them unsettled at once, and who settles them."""
        async with self._busy:
            session = self._session(name)
            reader = _Reader()
            conn = await connect(
                f"unix://{self._broker.internal.absolute()}", client_id=session.client_id, handler=reader,
                clean_start=False, session_expiry=_FOREVER, receive_maximum=window, timeout=_PATIENCE,
            )  # fmt: skip
            session.origin = f"{name}/dlq"  # not the sink's own, which would never get what the sink sends
            try:
                yield reader, _batches(reader, session.queued, window)
                await conn.ping()  # answered when the acknowledgements are on disk
            finally:
                await conn.disconnect()

    def _requeue(self, name: str, message: Message) -> Message:
        """Give a message to its lane. Raises _Full."""
        lanes = [session for session in self._broker.engine.instances.lanes(name) if session.subscriptions]
        if not lanes:
            raise _Full(f"{name} has no queue")
        group = lanes[0].subscriptions[0].group
        lane = lanes[0] if group is None else group.pick(message).receiver
        if lane.refuses(message.size) != DONE or lane.offer(
            message, max(message.qos, 1), message.retain, None, None, None
        ) == REFUSED:  # fmt: skip
            raise _Full(f"the queue of {name} takes no more")
        return message


async def _batches(reader: _Reader, count: int, window: int) -> AsyncIterator[list[Letter]]:
    while count > 0 and reader.open < window:
        letters = (await reader.take())[:count]
        if not letters:
            return
        count -= len(letters)
        yield letters


async def _stored(message: Message) -> bool:
    """Wait until the message is on disk, or needs not be."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _PATIENCE
    while message.pending is not None and message.pending.state in (OPEN, WRITING):
        if loop.time() > end:
            return False
        await asyncio.sleep(0.002)
    return message.pending is None or message.pending.state != FAILED


def _metadata(text: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _without_length(block: bytes) -> bytes:
    start = 1
    while block[start - 1] & 0x80:
        start += 1
    return block[start:]
