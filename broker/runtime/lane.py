"""One lane of a sink: a durable session whose messages are acknowledged when the destination has stored them.

Theory of operation. The receive connection is never paused: what arrives is appended to a list, and one task takes
batches from it, writes them and acknowledges each with one write. Memory is bounded by the broker's window: 65 535
unacknowledged messages a lane (its Receive Maximum), none larger than the broker's largest packet; QoS 0 messages,
which only a foreign broker sends, have no window and are dropped and counted above 64 MB.

When the connection is lost, what waits is forgotten (the broker delivers it again) and what is being written is
finished; `receipts` says how that is acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from broker.client.connection import Connection, Handler
from broker.extend.sink import Batch
from broker.mqtt.packets import Publish
from broker.runtime.backoff import Backoff, FullJitter
from broker.runtime.dead_letters import Graveyard, Refused
from broker.runtime.receipts import Receipts
from broker.runtime.records import records
from broker.runtime.state import Describer, State
from broker.runtime.writer import Writer

_log = logging.getLogger(__name__)

_PUBREL = 6
_MOST_UNWINDOWED = 64 << 20
_STEADY = 1.0  # a connection that lasted this many seconds was a good one


class Lane(Handler):
    """Receives, batches, writes through its `Writer`, acknowledges. `start` once, `close` once."""

    def __init__(
        self,
        number: int,
        *,
        attach: Callable[[Handler], Awaitable[Connection]],
        writer: Writer,
        graveyard: Graveyard,
        batch: Batch,
        trusted: bool = True,
        in_order: bool = False,
        longest_wait: float = 1.0,
        describe: Describer | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.number = number
        self.writer = writer
        self.acked = 0
        """Records the destination has confirmed."""
        self.dead = 0
        """Records that are in the dead letters."""
        self.dropped = 0
        """QoS 0 messages that did not fit into memory."""
        self._attach_to_broker = attach
        self._graveyard = graveyard
        self._max_records = batch.max_records
        self._max_bytes = batch.max_bytes
        self._linger = batch.linger
        self._trusted = self.brief = trusted
        self._in_order = in_order
        self._longest_wait = longest_wait
        self._describe = describe or Describer()
        self._changed = changed
        self._conn: Connection | None = None
        self._receipts = Receipts()
        self._waiting: list[Publish] = []
        self._size = 0
        self._outstanding: list[Publish] = []
        self._epoch = 0
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._idle = asyncio.Event()
        self._lost = asyncio.Event()
        self._closing = False
        self._link_error: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # what an operator sees

    @property
    def state(self) -> State:
        if self.writer.trouble is not None:
            return self.writer.trouble
        return State.RUNNING if self._conn is not None else State.CONNECTING

    @property
    def last_error(self) -> str | None:
        return self.writer.last_error or self._link_error

    @property
    def in_flight(self) -> int:
        """Messages received and not acknowledged."""
        return len(self._waiting) + len(self._outstanding)

    # life

    def start(self) -> None:
        """Attach and write until `close`."""
        self._tasks = [asyncio.create_task(self._stay_attached()), asyncio.create_task(self._work())]

    async def close(self, drain: float) -> None:
        """Write what was received, for ``drain`` seconds at most, then leave. The rest stays in the broker's queue."""
        self._closing = True
        if drain > 0 and self._tasks and self.writer.open:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._conn is not None:
            await self._conn.disconnect()

    # broker.client.connection.Handler

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        if conn is not self._conn:
            self._attached(conn)  # deliveries may come in the same read as CONNACK
        if self._receipts.watching and self._receipts.seen(publish):
            return
        if self._closing:
            return
        if not publish.qos and self._size > _MOST_UNWINDOWED:
            self.dropped += 1
            return
        self._waiting.append(publish)
        self._size += len(publish.topic) + len(publish.payload)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == _PUBREL:
            if conn is not self._conn:
                self._attached(conn)
            self._receipts.on_pubrel(packet_id)

    def on_batch_end(self, conn: Connection) -> None:
        self._receipts.flush()
        if self._waiting:
            self._idle.clear()
            self._arrived.set()
            if self._is_full():
                self._full.set()

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        if conn is not self._conn:
            return
        self._conn = None
        self._receipts.lost(self._outstanding, self._epoch)
        self._waiting.clear()
        self._size = 0
        self._link_error = f"lost the broker: {self._describe(exc or 'closed')}"
        self._lost.set()
        self._changed()

    # attaching

    async def _stay_attached(self) -> None:
        loop = asyncio.get_running_loop()
        wait = Backoff(0.1, self._longest_wait)
        while True:
            self._lost.clear()
            began = loop.time()
            try:
                conn = await self._attach_to_broker(self)
            except (OSError, TimeoutError, ValueError) as error:
                self._link_error = f"cannot attach to the broker: {self._describe(error)}"
                self._changed()
            else:
                if conn.open:
                    self._attached(conn)
                    await self._lost.wait()
                if loop.time() - began > _STEADY:
                    wait.reset()
            await asyncio.sleep(wait.next())

    def _attached(self, conn: Connection) -> None:
        if conn is self._conn:
            return
        self._conn = conn
        self._link_error = None
        self._receipts.attach(conn, conn.session_present)
        self._changed()

    # writing

    async def _work(self) -> None:
        while True:
            try:
                await self._deliver(await self._gather())
            except Exception:
                _log.exception("the lane failed; it attaches again and the broker delivers what is not acknowledged")
                self._outstanding = []
                if self._conn is not None:
                    self._conn.abort()
                self._receipts.lost((), self._receipts.epoch)  # what outlived a connection is not being written either
                await asyncio.sleep(1.0)

    async def _gather(self) -> list[Publish]:
        """The next batch: as many as the limits allow, or what has come when the linger time is over."""
        while True:
            while not self._waiting:
                self._idle.set()
                self._arrived.clear()
                await self._arrived.wait()
            if self._linger and not self._closing and not self._is_full():
                self._full.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._linger):
                        await self._full.wait()
            await self.writer.opened()
            batch = self._take()
            if batch:
                return batch

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._max_records or self._size >= self._max_bytes

    def _take(self) -> list[Publish]:
        waiting = self._waiting
        if len(waiting) <= self._max_records and self._size <= self._max_bytes:
            self._waiting, self._size = [], 0
            return waiting
        size = count = 0
        for publish in waiting[: self._max_records]:
            more = len(publish.topic) + len(publish.payload)
            if count and size + more > self._max_bytes:
                break
            size += more
            count += 1
        self._size -= size
        batch = waiting[:count]
        del waiting[:count]  # the rest is moved, not copied
        return batch

    async def _deliver(self, batch: list[Publish]) -> None:
        self._outstanding, self._epoch = batch, self._receipts.epoch
        refused = await self.writer.write(records(batch, self._trusted))
        if not refused:
            self._settle(batch, batch, 0)
            await self._recorded()
            return
        good = [publish for i, publish in enumerate(batch) if i not in refused]
        bad = [publish for i, publish in enumerate(batch) if i in refused]
        letters = [Refused(batch[i], *refused[i]) for i in sorted(refused)]
        if not self._in_order:
            self._settle(good, good, 0)
            self._outstanding = bad
        await self._bury(letters)
        if self._in_order:
            self._settle(batch, good, len(bad))
        else:
            self._settle(bad, (), len(bad))
        await self._recorded()

    async def _recorded(self) -> None:
        """Until our broker has the acknowledgements on disk, which it says by its answer to a ping: a crash then sends
        one batch again at most."""
        conn = self._conn
        if self._trusted and conn is not None:
            with suppress(OSError):
                await conn.ping()

    def _settle(self, answered: list[Publish], stored: list[Publish] | tuple[()], dead: int) -> None:
        self._outstanding = []
        self.acked += len(stored)
        self.dead += dead
        self._receipts.stored(answered, self._epoch)

    async def _bury(self, letters: list[Refused]) -> None:
        """Until each is kept by somebody: the original is acknowledged after that only."""
        _log.warning("%d records go to the dead letters, the first: %s", len(letters), letters[0].error)
        wait = FullJitter()
        while True:
            try:
                await self._graveyard.bury(letters)
            except (OSError, TimeoutError) as error:
                self.writer.stumble(State.RETRYING, f"dead letters: {self._describe(error)}", "dead_letters")
                await self.writer.nap(wait.next())
            else:
                self.writer.recover()
                return
