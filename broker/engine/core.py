"""What every part of one broker's engine shares: clock, limits, counters, message identifiers, the observer. Knows no
room above."""

import logging
from collections.abc import Callable
from typing import Any

from broker.engine.observer import Observer
from broker.engine.outbox import Flusher

log = logging.getLogger(__name__)


UNLIMITED = 1 << 62


class Limits:
    """The `[limits]` table, plus what a listener may narrow. Sizes in bytes, durations in seconds."""

    def __init__(self, **values: Any) -> None:
        self.max_packet_size = 1 << 20
        self.receive_maximum = 1024
        self.max_inflight = 32
        self.max_queued_messages = 1000
        self.max_queued_bytes = 0
        self.max_queued_age = 0.0
        self.queue_overflow = "drop_oldest"
        self.session_expiry = 7200.0
        self.connect_timeout = 10.0
        self.max_topic_levels = 128
        self.max_topic_length = 4096
        self.max_clientid_length = 256
        self.max_subscriptions = 1000
        self.max_user_properties = 64
        self.max_keepalive = 72000.0
        self.max_keepalive_policy = "enforce"
        self.topic_alias_maximum = 16
        self.max_retained_messages = 1_000_000
        self.max_retained_bytes = 1 << 30
        self.max_retained_per_client = 0
        self.stall_timeout = 60.0
        self.takeover_rate = 10
        self.ack_timeout = 30.0
        self.route_cache_bytes = 64 << 20
        self.shared_client_ids = False
        self.shared_strategy = "round_robin"
        self.check_retain_source = True
        self.receive_maximum_policy = "enforce"
        self.strict = True
        for name, value in values.items():
            if not hasattr(self, name):
                raise AttributeError(f"no limit is called {name!r}")
            setattr(self, name, value)


class Core:
    """Clock, counters and the flusher of one broker."""

    def __init__(
        self,
        call_soon: Callable[[Callable[[], None]], Any],
        now: float,
        wall_ms: int,
        node: str,
        node_id: int,
        boot: int,
    ) -> None:
        self.flusher = Flusher(call_soon)
        self.limits = Limits()
        self.now = now
        self.wall_ms = wall_ms
        self.node = node
        self.received = 0
        self.sent = 0
        self.received_bytes = 0
        self.dropped: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        """Messages that the queue of a sink or bridge refused to their publishers, by its client id."""
        self.on_drop: Callable[[str, int, Any], None] | None = None
        """Told of every dropped message by reason, number and the session that loses it or published it, if any."""
        self.events: dict[str, int] = {}
        self.stalled: set[Any] = set()
        self.room = UNLIMITED
        """Bytes that may be read before somebody looks at memory again: see `pressure.Pressure`."""
        self.journal: Any = None
        """What makes sessions survive a restart; None where nothing does."""
        self.withholds: Callable[[Any, Any], str] | None = None
        """Why a session does not get a message that waited on disk; empty when it does."""
        self.observer: Observer | None = None
        self.clock_base = 1.0
        """Milliseconds to add to `now` for `clock`: the journal sets it."""
        self._sequence = 0
        self._tail = f"{node_id & 0xFFFF:04x}{boot & 0xFFFF:04x}"

    def drop(self, reason: str, count: int = 1, session: Any = None) -> None:
        """Count messages that reach nobody, by reason; `session` is whose they are, where that is known."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        if self.on_drop is not None:
            self.on_drop(reason, count, session)

    def count(self, event: str, count: int = 1) -> None:
        """Count something worth knowing that is not a message."""
        self.events[event] = self.events.get(event, 0) + count

    def failed(self, error: Exception, text: str) -> None:
        """Something of ours went wrong and ends nobody's connection: `text` is for the log."""
        log.error("%s", text, exc_info=error)
        self.count("internal_error")

    def stamp(self, message: Any) -> None:
        """Give a message its identifier (sortable by time) and its time of arrival, once."""
        if message.clock_ms == 0:
            message.clock_ms = self.clock()
        if not message.ident:
            self._sequence += 1
            message.time_ms = self.wall_ms
            message.ident = f"{self.wall_ms & 0xFFFFFFFFFFFF:012x}{self._tail}{self._sequence & 0xFFFFFFFFFFFF:012x}"

    def clock(self) -> int:
        """Milliseconds by which ages count, over restarts too where there is a journal: no jump of the wall clock moves
        them. Never 0."""
        return max(1, int(self.clock_base + self.now * 1000))

    def set_clock(self, now: float, wall_ms: int) -> None:
        """Advance the engine's clock (monotonic seconds); the wall clock in identifiers never goes back."""
        self.now = now
        if wall_ms > self.wall_ms:
            self.wall_ms = wall_ms
