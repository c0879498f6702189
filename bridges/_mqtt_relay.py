"""One direction of a bridge: messages from a source broker to a target broker under the same packet identifiers.

Theory of operation
===================
The source's session (our durable session on the way out, the remote's session on the way in) hands out packet
identifiers. The relay uses the same identifier towards the target and passes every acknowledgement on, so the handshake
runs between the two brokers, and what it has reached is kept by them alone: the source remembers which messages are not
acknowledged (QoS 2: whether PUBREC came), the target remembers which QoS 2 identifiers it has taken and not released.
When either connection ends, `link` cuts the others too: a source repeats what is open only on a new connection
[MQTT-4.4.0-1]. The relay is then thrown away and a new one starts empty. A crash of the process is the same event.

QoS 1, a cut anywhere: the source repeats PUBLISH with DUP under the same identifier; at least once.

QoS 2, `S` source, `T` target, `N` the identifier; what was lost, what happens on the new connections:

    S -PUBLISH-> relay -PUBLISH-> T   S repeats PUBLISH N. T does not know N: takes it. T knows N: answers PUBREC alone.
    S <-PUBREC-- relay <-PUBREC-- T   the same; T knows N, the message is not taken twice.
    S -PUBREL--> relay -PUBREL--> T   S repeats PUBREL N. T knows N: frees it. T does not: "not found", done as well.
    S <-PUBCOMP- relay <-PUBCOMP- T   S repeats PUBREL N; T has freed N and answers "not found"; S is told success.

Only after PUBCOMP does S use N again, and then T has freed N, so N never means two messages to T. Nothing depends on
what the relay remembers. Within one connection it remembers, per identifier, what was sent (to send it again when the
target answers "quota exceeded": a refusal that passes by itself must not lose a message) and which handshakes it ends
itself.

There are sources that use N while it is open: mosquitto up to 2.0.12 keeps to no window, and with more than 65 535
messages in flight gives N to a second one. It takes every answer for that of the older message, and T would take the
second for a repetition. So what comes under an open identifier waits here, and for the sake of order everything behind
it, until S has read our last answer to the first: it says so by its answer to a ping. A cut before that finds only the
first at T.

A handshake is not one to one when both sides cannot speak the same QoS or the message does not cross at all:

* The line or the target takes QoS 1 of a QoS 2 message: PUBACK N becomes PUBREC N towards S, and S's PUBREL N is
  answered here. After a cut S repeats PUBLISH N (sent again at QoS 1, at least once, as configured) or PUBREL N, which
  the new relay passes to T, which does not know N and says so: done.
* Our own broker says 0x83: it has not got a message to disk yet, or never will. Nobody may acknowledge that, so the
  link is cut; what S sends again is known to the broker if it is taken after all.
* QoS 0 of a QoS 1 or 2 message, or a message that is refused, too large, unmapped or in a loop: acknowledged here,
  counted, reported. So is what this bridge itself brought to a foreign broker and gets back, but for the report. After
  a cut S may repeat it and gets the same answer; no reconnect can loop on it.

When the two sessions do not belong together (another server after a fail-over, one of the sides lost its session), T
may still hold N for some older message, and would drop the new one as a repetition. So before the first message
crosses, T's identifiers are freed: on the way in by beginning the inlet's session anew, which holds nothing else; on
the way out, where the remote session holds our subscriptions and their messages, by a PUBREL for every identifier.
Such a change is at least once: what the former server took and had not released may be taken again by the next.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from bridges._mqtt_path import Loops, carry, is_marked
from bridges._mqtt_topics import Routes
from broker.client.connection import Connection
from broker.client.errors import reason
from broker.mqtt.errors import ProtocolError
from broker.mqtt.packets import Publish, encode_publish

_PUBACK, _PUBREC, _PUBREL, _PUBCOMP = 4, 5, 6, 7
_NOT_KEPT, _IN_USE, _QUOTA_EXCEEDED = 0x83, 0x91, 0x97
_V5 = 5


class Target:
    """A connection that takes messages, and what it said it can take."""

    __slots__ = ("conn", "largest", "qos", "retain", "window")

    def __init__(self, conn: Connection, window: int) -> None:
        properties = conn.connack.properties
        self.conn = conn
        self.window = min(window, conn.receive_maximum)
        self.largest = conn.maximum_packet_size
        self.qos = 2
        self.retain = True
        if properties is not None:
            self.qos = 2 if properties.maximum_qos is None else properties.maximum_qos
            self.retain = properties.retain_available != 0


class _Flight:
    """A message the target has not acknowledged. ``raw`` is empty once it has taken it (QoS 2)."""

    __slots__ = ("qos", "raw", "sent")

    def __init__(self, raw: bytes, qos: int, sent: float) -> None:
        self.raw = raw
        self.qos = qos
        self.sent = sent


class Relay:
    """Carries messages to `target` and answers to their source. Thrown away with its connections."""

    def __init__(
        self,
        routes: Routes,
        target: Target,
        *,
        node: str,
        outward: bool,
        counts: Counter[str],
        retain: bool = True,
        origin: str = "",
        refused: Callable[[str, str], None],
        not_kept: Callable[[], None] | None = None,
    ) -> None:
        self._routes = routes
        self._target = target
        self._source: Connection | None = None
        self._node = node
        self._outward = outward
        self._origin = origin
        self._retain = retain and target.retain
        self._counts = counts
        self._refused = refused
        self._not_kept = not_kept
        self._loop = asyncio.get_running_loop()
        self._flights: dict[int, _Flight] = {}
        self._waiting: deque[tuple[int, _Flight]] = deque()  # beyond the window
        self._busy: dict[int, int] = {}  # identifiers that are open at the source, and a digest of their messages
        self._behind: deque[Publish] = deque()  # from the first on whose identifier is busy
        self._answered: list[int] = []  # busy until the source is known to have read that they are free
        self._asking: asyncio.Future[float] | None = None
        self._moved = 0.0  # when the source last did something about what others wait for
        self._ended: set[int] = set()  # QoS 2 identifiers whose handshake with the source is ended here
        self._lowered: set[int] = set()  # QoS 2 at the source, QoS 1 at the target
        self._freeing: set[int] = set()  # PUBREL sent by us, its PUBCOMP is not the source's
        self._held: deque[tuple[int, _Flight]] = deque()
        self._hold = 0.0
        self._retry: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Forget everything; the source will repeat it."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        self._held.clear()
        self._waiting.clear()
        self._flights.clear()
        self._behind.clear()

    @property
    def open(self) -> int:
        """Messages taken from the source and not acknowledged to it."""
        return len(self._flights) + len(self._waiting) + len(self._held) + len(self._behind)

    def oldest(self) -> float | None:
        """Loop time at which the target was sent what it has owed an answer to for longest."""
        for flight in self._flights.values():
            return flight.sent
        return None

    def stalled(self) -> float | None:
        """Loop time since when the source has done nothing about an identifier it has used twice; None: nothing waits
        for that."""
        return self._moved if self._behind else None

    # from the source

    def on_publish(self, source: Connection, publish: Publish) -> None:
        """Carry one message, or acknowledge and count it when it does not cross."""
        self._source = source
        packet_id = publish.packet_id
        if packet_id in self._busy:
            if publish.dup and self._busy[packet_id] == _digest(publish):
                return  # repeated on a live connection, as some brokers do; the target has it and will answer
        elif not self._behind:
            self._carry(publish)
            return
        if not self._behind:
            self._moved = self._loop.time()
        self._behind.append(publish)

    def _carry(self, publish: Publish) -> None:
        if publish.qos:
            self._busy[publish.packet_id] = _digest(publish)
        if self._origin and self._outward and is_marked(publish, self._origin):
            self._counts["returned"] += 1
            self._acknowledge(publish.packet_id, publish.qos)
            return
        crossing = self._routes.find(publish.topic)
        if crossing is None:
            self._drop(publish, "unmapped")
            return
        target = self._target
        conn = target.conn
        qos = min(publish.qos, crossing.qos, target.qos)
        try:
            raw = self._encode(publish, crossing.topic, qos)
        except Loops:
            self._drop(publish, "loop")
            return
        except ProtocolError as error:
            self._drop(publish, "invalid", str(error))
            return
        if len(raw) > target.largest:  # [MQTT-3.1.2-24]
            self._drop(publish, "too_large", f"{len(raw)} bytes, the other side takes {target.largest}")
            return
        if qos == 0:
            if publish.qos == 0 and conn.congested:
                self._counts["dropped.congested"] += 1
                return
            conn.send(raw)
            self._counts["messages"] += 1
            self._acknowledge(publish.packet_id, publish.qos)
            return
        if publish.qos > qos:
            self._lowered.add(publish.packet_id)
        self._send(publish.packet_id, _Flight(raw, qos, 0.0))

    def on_release(self, source: Connection, packet_id: int) -> None:
        """PUBREL from the source."""
        self._source = source
        if self._behind:
            self._moved = self._loop.time()
        if packet_id in self._ended:
            self._ended.discard(packet_id)
            self._to_source(_PUBCOMP, packet_id)
            return
        flight = self._flights.get(packet_id)
        if flight is None:
            self._busy[packet_id] = 0
            self._flights[packet_id] = _Flight(b"", 2, self._loop.time())  # a handshake of the connection before
        else:
            flight.sent = self._loop.time()
        self._target.conn.ack(_PUBREL, packet_id)

    # from the target

    def on_answer(self, packet_type: int, packet_id: int, code: int) -> None:
        """PUBACK, PUBREC or PUBCOMP from the target."""
        if packet_type == _PUBCOMP and packet_id in self._freeing:
            self._freeing.discard(packet_id)
            return
        flight = self._flights.get(packet_id)
        if flight is None:
            return  # of an exchange this connection knows nothing about; the source would not know it either
        if code >= 0x80 and packet_type != _PUBCOMP:
            self._on_refusal(packet_id, flight, code)
        elif packet_type == _PUBREC and flight.qos == 2:
            self._freeing.discard(packet_id)  # answers come in order: a PUBCOMP still missing will never come
            if flight.raw:
                self._taken()
                flight.raw = b""
            flight.sent = self._loop.time()
            self._to_source(_PUBREC, packet_id)
        elif packet_type == _PUBCOMP and flight.qos == 2:
            del self._flights[packet_id]
            self._to_source(_PUBCOMP, packet_id)
            self._fill()
        elif packet_type == _PUBACK and flight.qos == 1:
            del self._flights[packet_id]
            self._taken()
            self._end(packet_id, 2 if packet_id in self._lowered else 1)
            self._fill()

    # private

    def _encode(self, publish: Publish, topic: bytes, qos: int) -> bytes:
        conn = self._target.conn
        properties = b""
        if conn.version == _V5:
            properties = carry(publish, self._node, self._outward, self._origin)
        retain = publish.retain and self._retain
        if retain != publish.retain:
            self._counts["retain_cleared"] += 1
        return encode_publish(
            topic, publish.payload, qos, retain, publish.dup, publish.packet_id, conn.version, properties
        )

    def _send(self, packet_id: int, flight: _Flight) -> None:
        if len(self._flights) >= self._target.window:  # [MQTT-3.3.4-9]
            self._waiting.append((packet_id, flight))
            return
        conn = self._target.conn
        flight.sent = self._loop.time()
        self._flights[packet_id] = flight
        conn.send(flight.raw)

    def _fill(self) -> None:
        while self._waiting and len(self._flights) < self._target.window:
            self._send(*self._waiting.popleft())

    def _taken(self) -> None:
        self._counts["messages"] += 1
        self._hold = 0.0

    def _on_refusal(self, packet_id: int, flight: _Flight, code: int) -> None:
        if not flight.raw:
            return  # taken before; only PUBREL is open
        if code == _NOT_KEPT and self._not_kept is not None:
            self._not_kept()
            return
        del self._flights[packet_id]
        if code in (_QUOTA_EXCEEDED, _IN_USE):
            flight.raw = bytes((flight.raw[0] & 0xF7,)) + flight.raw[1:]  # not a repetition: it was not taken
            self._held.append((packet_id, flight))
            self._counts["retried"] += 1
            if code == _IN_USE and flight.qos == 2:
                self._freeing.add(packet_id)
                self._target.conn.ack(_PUBREL, packet_id)
            if self._retry is None:
                self._hold = min(30.0, self._hold * 2 or 0.5)
                self._retry = self._loop.call_later(self._hold, self._send_held)
        else:
            self._counts["dropped.refused"] += 1
            self._refused("refused", reason(code))
            self._end(packet_id, 2 if flight.qos == 2 or packet_id in self._lowered else 1)
        self._fill()

    def _send_held(self) -> None:
        self._retry = None
        held, self._held = self._held, deque()
        for packet_id, flight in held:
            self._send(packet_id, flight)

    def _drop(self, publish: Publish, why: str, detail: str = "") -> None:
        self._counts[f"dropped.{why}"] += 1
        self._refused(why, detail or publish.topic.decode("utf-8", "replace"))
        self._acknowledge(publish.packet_id, publish.qos)

    def _acknowledge(self, packet_id: int, qos: int) -> None:
        if qos:
            self._end(packet_id, qos)

    def _end(self, packet_id: int, qos: int) -> None:
        """The source may forget the message; a QoS 2 handshake is finished between it and us."""
        self._lowered.discard(packet_id)
        if qos == 1:
            self._to_source(_PUBACK, packet_id)
        else:
            self._ended.add(packet_id)
            self._to_source(_PUBREC, packet_id)

    def _to_source(self, packet_type: int, packet_id: int) -> None:
        if self._source is None:
            return
        self._source.ack(packet_type, packet_id)
        if packet_type == _PUBREC:
            return
        if self._behind:
            self._answered.append(packet_id)
            self._ask(self._source)
        else:
            self._busy.pop(packet_id, None)

    def _ask(self, source: Connection) -> None:
        """Free what is answered as soon as the source has read the answers."""
        if self._asking is not None:
            return
        answered, self._answered = self._answered, []
        asking = self._asking = asyncio.ensure_future(source.ping())

        def heard(asking: asyncio.Future[float]) -> None:
            if asking.cancelled() or asking.exception() is not None:
                return  # the connection is lost, and with it this relay
            self._asking = None
            self._moved = self._loop.time()
            for packet_id in answered:
                self._busy.pop(packet_id, None)
            while self._behind and self._behind[0].packet_id not in self._busy:
                self._carry(self._behind.popleft())
            if self._answered:
                self._ask(source)

        asking.add_done_callback(heard)


def _digest(publish: Publish) -> int:
    return hash((publish.topic, publish.payload))
