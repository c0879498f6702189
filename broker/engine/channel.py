"""One connection's side of the protocol: framing, its states, and every packet a client may send but PUBLISH.

Theory of operation. `feed` is called once per read and handles every packet in it before it returns; what a client
publishes and acknowledges is handled by the `Inbox` the channel is. A packet that cannot be decided yet (CONNECT while
a backend thinks, a publish into a blocking queue) *suspends* the channel: the rest of the bytes is kept, reading pauses
at 64 KiB, and `resume_parse` goes on there. No sockets: `link` is anything with a transport's methods.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from broker.engine import topics
from broker.engine.core import Core
from broker.engine.inbox import AUTHENTICATING, CLOSED, LIVE, NEW, STOP, SUSPEND, Inbox
from broker.engine.listener import ListenerInfo
from broker.engine.router import Route, Router
from broker.engine.session import Session
from broker.mqtt.codes import connack_v3
from broker.mqtt.connect import decode_connect, encode_connack
from broker.mqtt.control import check_flags, decode_auth, decode_disconnect, encode_disconnect
from broker.mqtt.errors import ProtocolError
from broker.mqtt.publish import decode_ack
from broker.mqtt.subscribe import decode_subscribe, decode_unsubscribe, encode_suback, encode_unsuback

log = logging.getLogger(__name__)

BEFORE_LOGIN = 65_536
"""Largest packet before login: RabbitMQ's figure; nothing larger is a CONNECT worth reading."""

WORKER_EXTRA = 65_536
"""What a worker may send beyond the limit of devices: a dead letter is its original and the reason."""

READ_AT_ONCE = 262_144
"""Bytes after which a connection waits for the next turn of the loop: a transport reads up to 8 MiB in one."""

INCOMPLETE = -1
NOT_SHORTEST = -2
TOO_LONG = -3


class Channel(Inbox):
    """The protocol state of one connection, and the protocol of its transport from the first read on."""

    def __init__(
        self, engine: Any, core: Core, router: Router, link: Any, listener: ListenerInfo, peer: str, accepted_at: float
    ) -> None:
        Inbox.__init__(self, engine, core, router, link, peer)  # super() costs each connection 0.1 µs more
        self.listener = listener
        self.identity: dict[str, str] | None = None
        self.connect: Any = None
        self.parsing = False
        self.held_until = 0.0
        self.paused = False
        self.resting = False
        self.taken = 0
        self.pieces: list[bytes] | None = None
        self.have = 0
        self.need = 0
        self.last_read = core.now
        self.deadline = accepted_at + core.limits.connect_timeout
        self.keep_alive = 0.0
        self.max_packet = listener.max_packet_size or core.limits.max_packet_size
        if listener.privileged:
            self.max_packet += WORKER_EXTRA
        self.graceful = False
        self.bridge = False
        self.bucket = -1

    @property
    def client_id(self) -> str:
        """The client id, once known."""
        if self.session is not None:
            return self.session.client_id
        return self.connect.client_id if self.connect is not None else ""

    # what the transport calls ---------------------------------------------------------------------------------

    @property
    def data_received(self) -> Callable[[bytes], None]:
        """The channel itself, which can be called: a bound method would cost each connection 64 bytes more."""
        return self

    def __call__(self, data: bytes) -> None:
        self.feed(data)

    def eof_received(self) -> None:
        """The peer sends nothing more: it gets what has been said, and that is the end."""
        self._end()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self.lost(error)
        self.listener.on_lost()

    # bytes in -------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Handle the bytes of one read."""
        if self.state == CLOSED:
            return
        self.taken += len(data)
        if self.taken >= READ_AT_ONCE:
            self._rest()
        self.core.room -= len(data)
        if self.core.room < 0:
            self.engine.pressure.heard(self)
        if self.pieces is not None:
            self.pieces.append(data)
            self.have += len(data)
            if self.suspended:
                self._read_ahead()
                return
            if self.have < self.need:
                self.last_read = self.core.now
                return
            data = b"".join(self.pieces)
            self.pieces = None
        elif self.suspended:
            self.pieces = [data]
            self.have = len(data)
            self.need = 0
            self._read_ahead()
            return
        self.last_read = self.core.now
        self._guard(data)
        self.flusher.after_read()

    def _rest(self) -> None:
        """Enough was read in one go: the others have their turn, and timers theirs, before reading goes on."""
        self.taken = 0
        if self.state == LIVE and not self.paused:
            self.paused = self.resting = True
            self.link.pause_reading()
            self.flusher.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self.resting:
            self.resting = False
            if self.paused and not self.suspended and not self.congested and self.state == LIVE:
                self.paused = False
                self.link.resume_reading()

    def _read_ahead(self) -> None:
        """While the channel is suspended not more than this is read."""
        if self.have > BEFORE_LOGIN and not self.paused:
            self.paused = True
            self.link.pause_reading()

    def _guard(self, data: bytes) -> None:
        self.parsing = True
        try:
            self._parse(data)
        except ProtocolError as error:
            self.fail(error)
        except Exception as error:
            self.crash(error)
        finally:
            self.parsing = False

    def crash(self, error: Exception) -> None:
        """An error of ours while this client was served: it is logged and counted, and this connection ends."""
        self.core.failed(
            error, f"internal error while serving client {self.client_id!r} from {self.peer}; its connection is closed"
        )
        self.disconnect(0x83)

    def broken(self, error: Exception) -> None:
        """The transport failed to take bytes. The connection ends when the loop comes to it: now somebody else's packet
        may be on its way to many."""
        if not self.congested:
            self.congested = True  # nothing more is handed to it
            self.flusher.call_soon(lambda: self.crash(error))

    def _parse(self, data: bytes) -> None:
        p = data
        n = len(data)
        i = 0
        end = 0
        v5 = self.v5
        session = self.session
        route: Route | None = None
        run_route: Route | None = None
        run_start = 0
        run_end = 0
        run_count = 0
        largest = 0
        error: str | None = None
        code = 0x81
        while i < n:
            first = p[i]
            kind = first >> 4
            end = 0
            if i + 1 >= n:
                break
            at = i + 2
            size = p[i + 1]
            if size > 127:
                found = _remaining_length(p, i + 1, n)
                if found == INCOMPLETE:
                    if self.state != LIVE and kind != 1:
                        self._not_mqtt(p[i:n])
                        return
                    break
                if found < 0:
                    error = (
                        "a length is not encoded in the fewest bytes"  # [MQTT-1.5.5-1]
                        if found == NOT_SHORTEST
                        else "a length has more than four bytes"
                    )
                    break
                at = i + 1 + (found & 7)
                size = found >> 3
            if self.state != LIVE:
                if kind != 1 or first == 0x16:  # [MQTT-3.1.0-1]; a TLS hand-shake begins like that
                    self._not_mqtt(p[i:n])
                    return
                if size > BEFORE_LOGIN:
                    self._abort("connect_too_large")
                    return
            elif size + at - i > self.max_packet:
                error = "the packet is larger than the server's maximum"
                code = 0x95
                break
            end = at + size
            if end > n:
                break
            if first == 0x30 and size > 1:
                topic_at = at + 2
                length = p[at] << 8 | p[at + 1]
                topic_end = topic_at + length
                if topic_end > end:
                    error = "the topic name is longer than its packet"
                    break
                if length and (not v5 or (topic_end < end and p[topic_end] == 0)):
                    entry = self.memo_entry
                    if (
                        entry is None
                        or length != len(self.memo)
                        or not data.startswith(self.memo, topic_at)
                        or not entry.live
                    ):
                        entry = self._entry(p[topic_at:topic_end])
                        self.memo_entry = entry
                        self.memo = entry.topic
                    if entry.code == 0:
                        route = entry.route
                        if route is None:
                            route = self.router.fill(entry)
                        if run_count and route is run_route:
                            run_end = end
                            run_count += 1
                            if end - i > largest:
                                largest = end - i
                        else:
                            if run_count and run_route is not None:
                                self._deliver_run(data, run_start, run_end, run_count, largest, run_route)
                            run_route = route
                            run_start = i
                            run_end = end
                            run_count = 1
                            largest = end - i
                        i = end
                        continue
                    if run_count and run_route is not None:  # a run is one slice: what is denied must not lie in it
                        self._deliver_run(data, run_start, run_end, run_count, largest, run_route)
                        run_count = 0
                    if self._on_restricted(data, i, end, entry) == STOP:
                        return
                    i = end
                    if self.suspended:
                        break
                    continue
            if run_count and run_route is not None:
                self._deliver_run(data, run_start, run_end, run_count, largest, run_route)
                run_count = 0
            if session is not None and size == 2 and 4 <= kind <= 7:
                self._on_ack(session, first, p[at] << 8 | p[at + 1])
            elif kind == 3 and session is not None:
                said = self._on_publish(data, first, i, at, end)
                if said == STOP:
                    return
                if said == SUSPEND:
                    end = i
                    break
                if self.suspended:  # after a denial: this packet is done with
                    i = end
                    break
            else:
                self._on_packet(kind, first, p[at:end])
                if self.state == CLOSED:
                    return
                v5 = self.v5
                session = self.session
                if self.suspended:
                    i = end
                    break
            i = end
        if run_count and run_route is not None:
            self._deliver_run(data, run_start, run_end, run_count, largest, run_route)
        if error is not None:
            raise ProtocolError(code, error)
        if i < n:
            rest = p[i:n] if i else data
            self.pieces = [rest]
            self.have = n - i
            self.need = end - i if end > i else 0
            if self.suspended:
                self._read_ahead()
        if self.acks:
            self._flush_acks()
        if self.congested and self.size > self.flusher.limit and not self.paused and self.link is not None:
            self.paused = True
            self.link.pause_reading()

    def resume_parse(self) -> None:
        """Go on with what was kept while the channel was suspended; not before `held_until`."""
        if self.state == CLOSED or not self.suspended or self.held_until > self.core.now:
            return
        self.suspended = False
        self.last_read = self.core.now
        if self.parsing:
            return
        if self.pieces is not None:
            data = b"".join(self.pieces)
            self.pieces = None
            self._guard(data)
            if self.state == CLOSED:
                return
        if self.paused and not self.suspended:
            self.paused = False
            self.link.resume_reading()
        self.flusher.after_read()

    # the other packets ----------------------------------------------------------------------------------------

    def _on_packet(self, kind: int, first: int, body: bytes) -> None:
        check_flags(first, self.version)
        if kind == 1:
            if self.state != NEW:
                raise ProtocolError(0x82, "a second CONNECT")  # [MQTT-3.1.0-2]
            self._on_connect(body)
            return
        session = self.session
        if session is None:
            self._not_mqtt(b"")
            return
        if kind == 12:
            self._on_pingreq(session, body)
        elif kind == 8:
            self._on_subscribe(session, body)
        elif kind == 10:
            self._on_unsubscribe(session, body)
        elif 4 <= kind <= 7:
            ack = decode_ack(body, self.version, kind, self.core.limits.strict)
            self._on_long_ack(session, kind, ack.packet_id, ack.code)
        elif kind == 14:
            self._on_disconnect(session, decode_disconnect(body, self.version, self.core.limits.strict))
        elif kind == 15 and self.v5:
            decode_auth(body, self.version)
            raise ProtocolError(0x82, "AUTH without an authentication method")  # [MQTT-4.12.0-7]
        else:
            raise ProtocolError(0x82, "a packet only servers send")

    def _on_pingreq(self, session: Session, body: bytes) -> None:
        if body:
            raise ProtocolError(0x81, "a PINGREQ with a body")
        if self.listener.privileged and session.spool is not None and not self.core.journal.refusing:
            # a worker asks whether what it acknowledged is on disk
            self.core.journal.reply(self, b"\xd0\x00")
        else:
            self.push(b"\xd0\x00")  # [MQTT-3.12.4-1]

    def _on_subscribe(self, session: Session, body: bytes) -> None:
        limits = self.core.limits
        subscribe = decode_subscribe(body, self.version, limits.strict, limits.max_user_properties)
        self._flush_acks()
        subscriptions = self.engine.subscriptions
        codes, retained = subscriptions.subscribe(self, session, subscribe)
        if self.state == CLOSED:
            return
        if session.spool is not None:
            subscriptions.when_subscribed(self, session, subscribe, codes, retained)
        else:
            self.subscribed(session, subscribe.packet_id, codes, retained)

    def _on_unsubscribe(self, session: Session, body: bytes) -> None:
        limits = self.core.limits
        unsubscribe = decode_unsubscribe(body, self.version, limits.strict, limits.max_user_properties)
        subscriptions = self.engine.subscriptions
        codes = subscriptions.unsubscribe(session, unsubscribe.filters)
        if session.spool is not None:
            subscriptions.when_unsubscribed(self, unsubscribe.packet_id, codes)
        else:
            self.push(encode_unsuback(unsubscribe.packet_id, self.version, codes))  # [MQTT-3.10.4-4]

    def subscribed(self, session: Session, packet_id: int, codes: list[int], retained: list[Any]) -> None:
        """Answer SUBSCRIBE and begin to send the retained messages."""
        self.push(encode_suback(packet_id, self.version, codes))  # [MQTT-3.8.4-1]
        if retained:
            session.retained = deque(retained) if session.retained is None else session.retained + deque(retained)
            session.drain()

    def push_live(self, data: bytes) -> None:
        """Send bytes that had to wait, if the connection is still there."""
        if self.state == LIVE:
            self.push(data)

    def _on_connect(self, body: bytes) -> None:
        limits = self.core.limits
        connect = decode_connect(body, limits.strict, limits.max_user_properties)
        self.connect = connect
        self.version = connect.version
        self.v5 = connect.version == 5
        self.bridge = connect.bridge
        if connect.bridge and not self.listener.bridge_bit:
            self.refuse(0x84)
            return
        if self.engine.pressure.level > 1 and not self.listener.privileged:
            self.refuse(0x89)
            return
        if len(connect.client_id) > limits.max_clientid_length:
            self.refuse(0x85)
            return
        if not connect.client_id and (connect.version == 3 or (connect.version == 4 and not connect.clean_start)):
            self.refuse(0x85)  # [MQTT-3.1.3-8]
            return
        if connect.properties is not None and connect.properties.authentication_method is not None:
            self.refuse(0x8C)  # [MQTT-4.12.0-1]
            return
        will = connect.will
        if will is not None:
            name = will.topic
            if not topics.valid_name(name) or topics.levels(name) > limits.max_topic_levels:
                self.refuse(0x90)
                return
            if len(name) > limits.max_topic_length:
                self.refuse(0x90)
                return
        self.state = AUTHENTICATING
        self.suspended = True
        self.engine.rights.gate.authenticate(self, connect)

    def accept(self, principal: Any) -> None:
        """The gate's yes: attach the session and answer CONNACK."""
        if self.state != AUTHENTICATING:
            return
        try:
            self.engine.attach(self, self.connect, principal)
        except Exception:
            log.exception(
                "internal error while client %r from %s connects; its connection is closed", self.client_id, self.peer
            )
            self.core.count("internal_error")
            self._end()
            self.engine.abandon(principal.clientid)
            return
        self.connect = None
        if self.state == LIVE and self.session is not None and self.session.channel is self:
            self.resume_parse()

    def refuse(self, code: int) -> None:
        """The gate's no, with an MQTT 5 reason code."""
        if self.state == CLOSED or self.state == LIVE:
            return
        self.core.count("connect_refused")
        self.push(encode_connack(self.version, False, code if self.v5 else connack_v3(code)))
        self._end(True)

    def refuse_late(self) -> None:
        """The absolute deadline of CONNECT passed; only a client that has been understood gets an answer."""
        if self.state == AUTHENTICATING:
            self.refuse(0x88)
        else:
            self._end()

    def _on_disconnect(self, session: Session, packet: Any) -> None:
        props = packet.properties
        if props is not None and props.session_expiry_interval is not None:
            if props.session_expiry_interval and not session.persistent:
                raise ProtocolError(0x82, "a session expiry where CONNECT had none")  # [MQTT-3.1.2-25]
            self.engine.set_expiry(session, props.session_expiry_interval)
        self.graceful = packet.code == 0  # [MQTT-3.14.4-3]
        self._end(False, packet.code)

    # ends -----------------------------------------------------------------------------------------------------

    def fail(self, error: ProtocolError) -> None:
        """The peer broke a rule: answer as its version wants and close."""
        self.engine.report(
            "protocol_error", f"client {self.client_id!r} from {self.peer}: {error} (0x{error.code:02x})"
        )
        self.core.count("protocol_error")
        if self.state == NEW or self.state == AUTHENTICATING:
            version = error.version if self.connect is None else self.version
            if version == 5:
                self.push(encode_connack(5, False, error.code))
            elif error.code == 0x84:
                self.push(encode_connack(version, False, 1))  # [MQTT-3.1.2-2]
            self._end(version == 5)
        else:
            self.disconnect(error.code)

    def disconnect(self, code: int) -> None:
        """The server ends the connection; MQTT 5 clients are told why. The will is published."""
        if self.state == CLOSED:
            return
        if self.v5 and self.state == LIVE and not self.engine.awaits_welcome(self):  # [MQTT-3.2.0-1]
            self._flush_acks()
            self.push(encode_disconnect(5, code))  # [MQTT-4.13.1-1]
            self._end(True, code)
            return
        self._end(False, code)

    def _not_mqtt(self, data: bytes) -> None:
        """The peer's first bytes are something else: one line that says what, and close without a word."""
        speech = self.listener.speech(data) or "does not speak MQTT"
        self.engine.report("not_mqtt", f"{self.peer} {speech}, listener {self.listener.name!r}; closed")
        self._abort("not_mqtt")

    def _end(self, last_word: bool = False, why: int | str = "") -> None:
        """`last_word`: something was just said that the peer should get to read. Closing a socket with unread input
        resets it, and the reset overtakes what was said; so only our half is closed now, the rest a moment later."""
        if self.state == CLOSED:
            return
        if last_word:
            self._go_on()
        self._flush_acks()
        self.flush()
        state = self.state
        self.state = CLOSED
        link = self.link
        try:
            self.engine.closed(self, state, why)
        except Exception:
            log.exception("internal error after the connection of client %r from %s ended", self.client_id, self.peer)
            self.core.count("internal_error")
        self.drop_unsent()
        self.link = None
        self.pieces = None
        self.memo_entry = None
        if self.held is not None:
            for _, hold, _ in self.held:
                if hold is not None:
                    hold.owner = None
            self.held = None
        if link is None:
            return
        if last_word and not self.paused and not self.congested and self.engine.half_close(link):
            return
        self.engine.close(link)

    def lost(self, error: Exception | None = None) -> None:
        """The connection is gone."""
        self.link = None
        self._end()

    def pause_writing(self) -> None:
        """The transport has enough for now."""
        if self.state == CLOSED:  # of our last word (a close frame, an alert of TLS); what does not leave is cut
            return
        self.congested = True
        self.core.stalled.add(self)
        self.deadline = self.core.now + self.core.limits.stall_timeout

    def resume_writing(self) -> None:
        """The transport takes bytes again."""
        self.core.stalled.discard(self)
        if self.state == CLOSED:
            return
        self.congested = False
        self.flush()
        if self.session is not None and not self.congested:
            self.session.drain()
        if self.paused and not self.suspended and not self.congested:
            self.paused = False
            self.link.resume_reading()


def _remaining_length(p: bytes, at: int, n: int) -> int:
    """The length that begins at `at`, times eight, plus the bytes it takes; less than 0 when it is none."""
    size = 0
    for used in range(4):
        if at + used >= n:
            return INCOMPLETE
        byte = p[at + used]
        size |= (byte & 127) << 7 * used
        if byte < 128:
            return NOT_SHORTEST if byte == 0 and used else size << 3 | used + 1
    return TOO_LONG
