"""One connection's side of the protocol: framing, state, and every packet a client may send.

Theory of operation. `feed` is called once per read and handles every packet in it before it returns. Consecutive QoS 0
packets with the same route go out as one slice of the read (a *run*). Acknowledgements of one read are collected and
written once. A packet that cannot be decided yet (CONNECT while a backend thinks, a publish into a blocking queue)
*suspends* the channel: the rest of the bytes is kept, reading pauses at 64 KiB, and `resume_parse` goes on there.
No sockets: `link` is anything with a transport's methods.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from broker.engine import topics
from broker.engine.core import Core
from broker.engine.listener import ListenerInfo
from broker.engine.message import METADATA, Message, Origin
from broker.engine.outbox import Outbox
from broker.engine.receiver import DONE, LATER, Hold
from broker.engine.router import Entry, Route, Router
from broker.engine.session import ACK_LATER, ACK_OK, ACK_UNKNOWN, ACK_WRONG, Session
from broker.engine.spool import GONE
from broker.mqtt import packets
from broker.mqtt.codes import connack_v3
from broker.mqtt.errors import ProtocolError
from broker.mqtt.properties import Properties, decode_properties, encode_properties
from broker.mqtt.text import check_text

log = logging.getLogger(__name__)

NEW = 0
AUTHENTICATING = 1
LIVE = 2
CLOSED = 3

BEFORE_LOGIN = 65_536
"""Largest packet before login: RabbitMQ's figure; nothing larger is a CONNECT worth reading."""

WORKER_EXTRA = 65_536
"""What a worker may send beyond the limit of devices: a dead letter is its original and the reason."""

CONTINUE = 0
PARTLY = 0x200
"""In an entry's code: the six bits below it tell which packets may be published, bit ``qos << 1 | retain``."""
STOP = 1
SUSPEND = 2

PUBLISH_TYPE = 3
RIGHTS_PER_SESSION = 131_072
"""Topics a session's dictionary of rights may hold before it is started anew."""
RIGHTS_BYTES = 16 << 20
"""Bytes of topics it may hold."""


class Channel(Outbox):
    """The protocol state of one connection: an outbox, and the protocol of its transport from the first read on."""

    def __init__(
        self, engine: Any, core: Core, router: Router, link: Any, listener: ListenerInfo, peer: str, accepted_at: float
    ) -> None:
        super().__init__(link, core.flusher)
        self.engine = engine
        self.core = core
        self.router = router
        self.listener = listener
        self.peer = peer
        self.identity: dict[str, str] | None = None
        self.session: Session | None = None
        self.principal: Any = None
        self.origin: Any = None
        self.connect: Any = None
        self.state = NEW
        self.version = 4
        self.v5 = False
        self.parsing = False
        self.suspended = False
        self.held_until = 0.0
        self.paused = False
        self.pieces: list[bytes] | None = None
        self.have = 0
        self.need = 0
        self.last_read = core.now
        self.deadline = accepted_at + core.limits.connect_timeout
        self.keep_alive = 0.0
        self.max_packet = listener.max_packet_size or core.limits.max_packet_size
        if listener.privileged:
            self.max_packet += WORKER_EXTRA
        self.receive_maximum = 65535
        self.alias_maximum = 0
        self.aliases: dict[int, bytes] | None = None
        self.acks: bytearray | None = None
        self.held: Any = None
        self.memo: bytes = b""
        self.memo_entry: Entry | None = None
        self.graceful = False
        self.bridge = False
        self.bucket = -1
        self.unanswered = 0
        """QoS 1 messages of this connection whose PUBACK has not left yet."""
        self.unreleased = 0
        """QoS 2 messages of this connection whose PUBREL has not come yet."""

    @property
    def peerhost(self) -> str:
        """The peer's address without its port."""
        host, colon, _ = self.peer.rpartition(":")
        return host if colon else self.peer

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
        if self.pieces is not None:
            self.pieces.append(data)
            self.have += len(data)
            if self.suspended:
                if self.have > BEFORE_LOGIN and not self.paused:
                    self.paused = True
                    self.link.pause_reading()
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
            if self.have > BEFORE_LOGIN and not self.paused:
                self.paused = True
                self.link.pause_reading()
            return
        self.last_read = self.core.now
        self._guard(data)
        self.flusher.after_read()

    def _guard(self, data: bytes) -> None:
        self.parsing = True
        try:
            self._parse(data)
        except ProtocolError as error:
            self.fail(error)
        except Exception:
            log.exception(
                "internal error while serving client %r from %s; its connection is closed", self.client_id, self.peer
            )
            self.core.count("internal_error")
            self.disconnect(0x83)
        finally:
            self.parsing = False

    @property
    def client_id(self) -> str:
        """The client id, once known."""
        if self.session is not None:
            return self.session.client_id
        return self.connect.client_id if self.connect is not None else ""

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
                size = size & 127
                shift = 7
                while True:
                    if at >= n:
                        at = 0
                        break
                    byte = p[at]
                    at += 1
                    size |= (byte & 127) << shift
                    if byte < 128:
                        if byte == 0:
                            error = "a length is not encoded in the fewest bytes"  # [MQTT-1.5.5-1]
                        break
                    shift += 7
                    if shift > 21:
                        error = "a length has more than four bytes"
                        break
                if error is not None:
                    break
                if at == 0:
                    if self.state != LIVE and kind != 1:
                        self._not_mqtt(p[i:n])
                        return
                    break
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
                    elif entry.code >= PARTLY and entry.code & 1:  # at QoS 0 and not retained it may be published
                        if run_count and run_route is not None:
                            self._deliver_run(data, run_start, run_end, run_count, largest, run_route)
                            run_count = 0
                        shared = self.router.entry(entry.topic)
                        route = shared.route
                        if route is None:
                            route = self.router.fill(shared)
                        self._deliver_run(data, i, end, 1, end - i, route)
                    elif 0xFF < entry.code < PARTLY:
                        error = "the topic name is not valid"
                        code = entry.code & 0xFF
                        break
                    else:
                        if run_count and run_route is not None:  # a run is one slice: what is denied must not lie in it
                            self._deliver_run(data, run_start, run_end, run_count, largest, run_route)
                            run_count = 0
                        self.core.received += 1
                        self.core.drop("invalid_topic" if entry.code == 0x90 else "unauthorized")
                        if entry.code != 0x90 and self.engine.on_denied is not None:
                            self.engine.on_denied(self)
                            if self.state == CLOSED:
                                return
                            if self.suspended:
                                i = end
                                break
                    i = end
                    continue
            if run_count and run_route is not None:
                self._deliver_run(data, run_start, run_end, run_count, largest, run_route)
                run_count = 0
            if session is not None and size == 2 and 4 <= kind <= 7:
                ident = p[at] << 8 | p[at + 1]
                if first == 0x40:
                    said = session.on_puback(ident)
                    if said == ACK_WRONG:
                        raise ProtocolError(0x82, "PUBACK answers a QoS 2 message")
                    if said == ACK_UNKNOWN:
                        self._unknown(ident)
                elif first == 0x62:
                    self._on_pubrel(session, ident)
                elif first == 0x50:
                    self._on_pubrec(session, ident, 0)
                elif first == 0x70:
                    said = session.on_pubcomp(ident)
                    if said == ACK_WRONG:
                        raise ProtocolError(0x82, "PUBCOMP answers a message that was not released")
                    if said == ACK_UNKNOWN:
                        self._unknown(ident)
                elif first == 0x6A and self.version == 3:
                    self._on_pubrel(session, ident)  # 3.1 lets PUBREL be repeated with DUP
                else:
                    raise ProtocolError(0x81, "reserved bits of the fixed header are set")  # [MQTT-2.1.3-1]
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
            if self.suspended and self.have > BEFORE_LOGIN and not self.paused:
                self.paused = True
                self.link.pause_reading()
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

    def _make_origin(self) -> None:
        """Made with the first message: a client that only subscribes needs none."""
        assert self.session is not None
        principal = self.principal
        self.origin = Origin(
            self.session.client_id, principal.username, self.peerhost, principal.origin, principal, self.core.node
        )

    # publishing -----------------------------------------------------------------------------------------------

    def _entry(self, topic: bytes) -> Entry:
        """The topic's cache entry if this client may publish there, else an entry whose code says why not.

        A code above 0xFF: the name breaks a rule of MQTT and the connection ends with the code's lower byte. From
        PARTLY on: some packets may be published there, and which these are.
        """
        session = self.session
        assert session is not None
        rights = session.rights
        if rights is None:
            rights = session.rights = {}
        entry: Entry | None = rights.get(topic)
        if entry is not None and entry.live:
            return entry
        limits = self.core.limits
        try:
            check_text(topic, limits.strict)
        except ProtocolError as wrong:
            return Entry(topic, 0x100 | wrong.code)
        if not topics.valid_name(topic):
            return Entry(topic, 0x190)  # [MQTT-3.3.2-2]
        if len(topic) > limits.max_topic_length or topics.levels(topic) > limits.max_topic_levels:
            return Entry(topic, 0x90)
        code = 0
        if topic[0] == 36 and not self.principal.privileged:
            code = 0x87
        elif not self.engine.gate.may_publish(self.principal, topic.decode()):
            some = self.engine.gate.publishable(self.principal, topic.decode())
            code = PARTLY | some if some else 0x87
        entry = self.router.entry(topic) if code == 0 else Entry(topic, code)
        session.rights_bytes += len(topic)
        if len(rights) >= RIGHTS_PER_SESSION or session.rights_bytes > RIGHTS_BYTES:
            rights.clear()
            session.rights_bytes = len(topic)
        rights[entry.topic] = entry
        return entry

    def _deliver_run(self, data: bytes, start: int, end: int, count: int, largest: int, route: Route) -> None:
        """Consecutive QoS 0 packets with one route: every receiver of the same version gets the same slice."""
        core = self.core
        core.received += count
        session = self.session
        v5 = self.v5
        if not route.simple:
            for message in self._messages(data, start, end):
                self._hand_over(route, message)
            return
        p = data
        piece: bytes | None = None
        other: list[Any] | None = None
        for target in route.targets:
            receiver = target.receiver
            if target.no_local and receiver is session:  # [MQTT-3.8.3-3]
                continue
            box = receiver.outbox
            if box is not None and receiver.v5 == v5 and largest <= receiver.max_packet:
                if piece is None:
                    piece = data if start == 0 and end == len(data) else p[start:end]
                if box.offer(piece):
                    core.sent += count
                else:
                    core.drop("slow_receiver", count)
            else:
                if other is None:
                    other = self._messages(data, start, end)
                for message in other:
                    receiver.deliver(message, target, None)

    def _messages(self, data: bytes, start: int, end: int) -> list[Any]:
        """The packets of a run as messages."""
        if self.origin is None:
            self._make_origin()
        found = []
        p = data
        i = start
        while i < end:
            at = i + 1
            size = 0
            shift = 0
            while True:
                byte = p[at]
                at += 1
                size |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            topic_end = at + 2 + (p[at] << 8 | p[at + 1])
            stop = at + size
            message = Message(
                p[at + 2 : topic_end], p[topic_end + (1 if self.v5 else 0) : stop], 0, False, b"", 0.0, self.origin
            )
            found.append(message)
            i = stop
        return found

    def _hand_over(self, route: Route, message: Message) -> None:
        """A QoS 0 message towards receivers that need more than a slice."""
        if route.guarded and self.router.room(route, message) != DONE:
            self.core.drop("queue_full")
            return
        self.router.publish(route, message, self.session, None)

    def _on_publish(self, data: bytes, first: int, start: int, at: int, end: int) -> int:
        """Every PUBLISH that is not a plain QoS 0 one."""
        p = data
        session = self.session
        core = self.core
        assert session is not None
        qos = (first >> 1) & 3
        if qos == 3:
            raise ProtocolError(0x81, "QoS 3")  # [MQTT-3.3.1-4]
        if qos == 0 and first & 8:
            raise ProtocolError(0x81, "DUP at QoS 0")  # [MQTT-3.3.1-2]
        off = at + 2
        if off > end:
            raise ProtocolError(0x81, "a PUBLISH without a topic name")
        length = p[at] << 8 | p[at + 1]
        off += length
        if off > end:
            raise ProtocolError(0x81, "the topic name is longer than its packet")
        topic_end = off
        ident = 0
        if qos:
            off += 2
            if off > end:
                raise ProtocolError(0x81, "the packet ends before its packet identifier")
            ident = p[topic_end] << 8 | p[topic_end + 1]
            if ident == 0:
                raise ProtocolError(0x82, "packet identifier 0")  # [MQTT-2.2.1-3]
        props: Properties | None = None
        body_at = off
        if self.v5:
            if off >= end:
                raise ProtocolError(0x81, "the packet ends before its properties")
            if p[off] == 0:
                off += 1
            else:
                props, off = decode_properties(
                    data, off, end, PUBLISH_TYPE, core.limits.max_user_properties, core.limits.strict
                )
        alias = props.topic_alias if props is not None else None
        entry: Entry | None = None
        if alias is not None:
            if alias > self.alias_maximum:
                raise ProtocolError(0x94, "a topic alias above the maximum")  # [MQTT-3.2.2-18]
            if self.aliases is None:
                self.aliases = {}
            if length:
                entry = self._entry(p[at + 2 : topic_end])
                self.aliases[alias] = entry.topic
            else:
                known = self.aliases.get(alias)
                if known is None:
                    raise ProtocolError(0x82, "an unknown topic alias")
                entry = self._entry(known)
        elif length == 0:
            raise ProtocolError(0x82 if self.v5 else 0x81, "an empty topic name")
        else:
            entry = self.memo_entry
            if entry is None or length != len(self.memo) or not data.startswith(self.memo, at + 2) or not entry.live:
                entry = self._entry(p[at + 2 : topic_end])
                self.memo_entry = entry
                self.memo = entry.topic
        if 0xFF < entry.code < PARTLY:
            raise ProtocolError(entry.code & 0xFF, "the topic name is not valid")
        expires = 0.0
        forward = b""
        if props is not None:
            if props.subscription_identifiers is not None:
                raise ProtocolError(0x82, "a subscription identifier from a client")  # [MQTT-3.3.4-6]
            if props.response_topic is not None and topics.is_wild(props.response_topic.encode()):
                raise ProtocolError(0x82, "a response topic with a wildcard")  # [MQTT-3.3.2-14]
            if props.message_expiry_interval is not None:
                expires = self.engine.clock() + props.message_expiry_interval
            forward = props.forward
            if props.user_properties and b"$isthmus" in forward:
                forward = _without_metadata(props)
        code = entry.code
        retain = first & 1 == 1
        unkept = False
        if code >= PARTLY:
            kinds = code >> (qos << 1) & 3
            if retain and kinds == 1:  # it may be published, not retained: who is there now gets it
                retain = False
                unkept = True
            code = 0 if kinds >> int(retain) & 1 else 0x87
            if code == 0:
                entry = self.router.entry(entry.topic)
        if qos == 2 and session.seen(ident):
            self._repeat(session, ident)
            return CONTINUE
        if qos and self.v5 and self.unanswered + self.unreleased >= self.receive_maximum:
            if core.limits.receive_maximum_policy != "warn":
                raise ProtocolError(0x93, "more unacknowledged messages than the Receive Maximum")  # [MQTT-3.3.4-7]
            core.count("receive_maximum_exceeded")
            self.engine.report("receive_maximum", f"client {self.client_id!r} from {self.peer}: beyond Receive Maximum")
        elif qos and not self.v5 and self.held is not None and len(self.held) >= core.limits.receive_maximum:
            self.suspended = True  # 3.x knows no Receive Maximum: it is not read until acknowledgements are released
            return SUSPEND
        if code == 0 and props is not None and props.payload_format_indicator == 1 and not _is_text(p[off:end]):
            code = 0x99
        if code:
            core.received += 1
            core.drop("unauthorized" if code == 0x87 else "invalid_topic" if code == 0x90 else "invalid_payload")
            if code == 0x87 and self.engine.on_denied is not None:
                self.engine.on_denied(self)
                if self.state == CLOSED:
                    return STOP
            if qos:
                self._acknowledge(0x40 if qos == 1 else 0x50, ident, code if self.v5 else 0)
            return CONTINUE
        if self.origin is None:
            self._make_origin()
        message = Message(entry.topic, p[off:end], qos, retain, forward, expires, self.origin)
        if qos and first & 9 == 0 and props is None and alias is None:
            if self.v5:
                message.head5 = p[start:topic_end]
                message.body5 = p[body_at:end]
            else:
                message.head4 = p[start:topic_end]
        route = entry.route
        if route is None:
            route = self.router.fill(entry)
        if route.guarded:
            said = self.router.room(route, message)
            if said == LATER and qos:
                self.suspended = True
                self.engine.wait_for_room(self, route, message)
                return SUSPEND
            if said != DONE:
                return self._refuse_publish("queue_full", qos, ident)
        hold = None
        if qos and (route.holding or message.retain):
            if core.journal is not None and core.journal.refusing:
                return self._refuse_publish("store_refuses", qos, ident)
            hold = Hold(self)
        core.received += 1
        if message.retain and not self.engine.retain(message, hold):
            code = 0x97
        elif unkept:
            core.count("retain_denied")
            code = 0x87
        count = self.router.publish(route, message, session, hold)
        if qos == 0:
            return CONTINUE
        if code and self.v5:
            self._acknowledge(0x40 if qos == 1 else 0x50, ident, code)
            return CONTINUE
        if qos == 2:
            session.remember(ident)
            self.unreleased += 1
            if session.spool is not None:
                core.journal.mark(message, session.spool, ident)
        if hold is not None and hold.count > 0:
            self._hold(0x40 if qos == 1 else 0x50, ident, hold)
        elif count == 0 and self.v5:
            self._acknowledge(0x40 if qos == 1 else 0x50, ident, 0x10)
        elif self.held is None:
            acks = self.acks
            if acks is None:
                acks = self.acks = bytearray()
            if qos == 1:
                self.unanswered += 1
            acks.append(0x40 if qos == 1 else 0x50)
            acks.append(2)
            acks.append(ident >> 8)
            acks.append(ident & 255)
        else:
            self._acknowledge(0x40 if qos == 1 else 0x50, ident, 0)
        return CONTINUE

    def _refuse_publish(self, reason: str, qos: int, ident: int) -> int:
        """A message that must be kept cannot be: MQTT 5 says so, 3.x gets no acknowledgement and is closed."""
        self.core.received += 1
        self.core.drop(reason)
        if qos:
            if not self.v5:
                self._abort(reason)
                return STOP
            self._acknowledge(0x40 if qos == 1 else 0x50, ident, 0x97)
        return CONTINUE

    def _repeat(self, session: Session, ident: int) -> None:
        """A QoS 2 message that has been taken already: PUBREC again, as soon as it is safe."""
        spool = session.spool
        journal = self.core.journal
        if spool is None or (spool.marks is not None and ident in spool.marks) or journal.idle:
            self._acknowledge(0x50, ident, 0)
            return
        hold = Hold(self)
        pending = spool.marking.get(ident) if spool.marking is not None else None
        if pending is None:
            journal.wait(hold)
        elif pending.state == GONE:
            self._acknowledge(0x50, ident, 0)
            return
        elif pending.hold is not None and pending.hold.owner is self:
            hold = pending.hold
        else:  # it may yet fail: who asks now is told, the connection it came from has ended
            pending.hold = hold
            hold.count += 1
        self._hold(0x50, ident, hold)

    # acknowledgements -----------------------------------------------------------------------------------------

    def _acknowledge(self, first: int, ident: int, code: int) -> None:
        """PUBACK or PUBREC, behind those that are held. [MQTT-4.6.0-2] [MQTT-4.6.0-3]"""
        if first == 0x40:
            self.unanswered += 1
        if code:
            packet = bytes((first, 3, ident >> 8, ident & 255, code))
        else:
            packet = bytes((first, 2, ident >> 8, ident & 255))
        if self.held is not None:
            self.held.append((packet, None, 0.0))
            return
        if self.acks is None:
            self.acks = bytearray()
        self.acks += packet

    def _hold(self, first: int, ident: int, hold: Hold) -> None:
        if self.held is None:
            self._flush_acks()
            self.held = deque()
            self.engine.holding.add(self)
        if first == 0x40:
            self.unanswered += 1
        hold.done = True
        self.held.append((bytes((first, 2, ident >> 8, ident & 255)), hold, self.core.now))

    def on_released(self) -> None:
        """Send what is at the head of the held acknowledgements and waits for nothing any more."""
        held = self.held
        if held is None or self.state != LIVE:
            return
        out = []
        while held:
            packet, hold, _ = held[0]
            if hold is not None and hold.owner is not None:
                break
            held.popleft()
            if packet[0] == 0x40:
                self.unanswered -= 1
            if hold is not None and hold.code:
                if not self.v5:  # it will send the message again: whether that is known is not for us to say
                    self._end()
                    return
                if packet[0] == 0x50:
                    self._free(packet)
                packet = bytes((packet[0], 3, packet[2], packet[3], hold.code))
            out.append(packet)
        if not held:
            self.held = None
            self.engine.holding.discard(self)
        if out:
            self.push(b"".join(out))
        if self.suspended and (self.held is None or len(self.held) < self.core.limits.receive_maximum):
            self.resume_parse()

    def _free(self, pubrec: bytes) -> None:
        """A failed PUBREC frees the identifier."""
        session = self.session
        if session is None:
            return
        ident = pubrec[2] << 8 | pubrec[3]
        session.forget(ident)
        if self.unreleased:
            self.unreleased -= 1
        if session.spool is not None:
            self.core.journal.unmark(session.spool, ident)

    def _flush_acks(self) -> None:
        acks = self.acks
        if acks:
            self.push(bytes(acks))
            self.acks = None
        if self.held is None:
            self.unanswered = 0

    def _unknown(self, ident: int) -> None:
        if ident == 0:
            raise ProtocolError(0x82, "packet identifier 0")  # [MQTT-2.2.1-3]
        self.core.count("unknown_ack")

    def _forget(self, session: Session, ident: int) -> bool:
        if not session.forget(ident):
            return False
        if self.unreleased:
            self.unreleased -= 1
        return True

    def _reply(self, first: int, ident: int, code: int) -> None:
        if self.acks is None:
            self.acks = bytearray()
        if code and self.v5:
            self.acks += bytes((first, 3, ident >> 8, ident & 255, code))
        else:
            self.acks += bytes((first, 2, ident >> 8, ident & 255))

    def _on_pubrel(self, session: Session, ident: int) -> None:
        if ident == 0:
            raise ProtocolError(0x82, "packet identifier 0")  # [MQTT-2.2.1-3]
        known = self._forget(session, ident)
        spool = session.spool
        if spool is not None:
            journal = self.core.journal
            if journal.unmark(spool, ident) or not (known or journal.idle):
                # the identifier may carry another message next: it must not be remembered beyond a crash
                code = b"" if known or not self.v5 else b"\x92"
                journal.reply(self, bytes((0x70, 2 + len(code), ident >> 8, ident & 255)) + code)
                return
        self._reply(0x70, ident, 0 if known else 0x92)

    def _on_pubrec(self, session: Session, ident: int, code: int) -> None:
        said = session.on_pubrec(ident, code)
        if said == ACK_WRONG:
            raise ProtocolError(0x82, "PUBREC answers a QoS 1 message")
        if ident == 0:
            raise ProtocolError(0x82, "packet identifier 0")  # [MQTT-2.2.1-3]
        if code < 0x80 and said != ACK_LATER:
            self._reply(0x62, ident, 0 if said == ACK_OK else 0x92)

    # the other packets ----------------------------------------------------------------------------------------

    def _on_packet(self, kind: int, first: int, body: bytes) -> None:
        packets.check_flags(first, self.version)
        limits = self.core.limits
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
            if body:
                raise ProtocolError(0x81, "a PINGREQ with a body")
            if self.listener.privileged and session.spool is not None and not self.core.journal.refusing:
                # a worker asks whether what it acknowledged is on disk
                self.core.journal.reply(self, b"\xd0\x00")
            else:
                self.push(b"\xd0\x00")  # [MQTT-3.12.4-1]
        elif kind == 8:
            subscribe = packets.decode_subscribe(body, self.version, limits.strict, limits.max_user_properties)
            self._flush_acks()
            codes, retained = self.engine.subscribe(self, session, subscribe)
            if self.state == CLOSED:
                return
            if session.spool is not None:
                self.engine.when_subscribed(self, session, subscribe, codes, retained)
            else:
                self.subscribed(session, subscribe.packet_id, codes, retained)
        elif kind == 10:
            unsubscribe = packets.decode_unsubscribe(body, self.version, limits.strict, limits.max_user_properties)
            codes = self.engine.unsubscribe(session, unsubscribe.filters)
            if session.spool is not None:
                self.engine.when_unsubscribed(self, unsubscribe.packet_id, codes)
            else:
                self.push(packets.encode_unsuback(unsubscribe.packet_id, self.version, codes))  # [MQTT-3.10.4-4]
        elif 4 <= kind <= 7:
            ack = packets.decode_ack(body, self.version, kind, limits.strict)
            if kind == 6:
                self._on_pubrel(session, ack.packet_id)
            elif kind == 5:
                self._on_pubrec(session, ack.packet_id, ack.code)
            else:
                said = session.on_puback(ack.packet_id) if kind == 4 else session.on_pubcomp(ack.packet_id)
                if said == ACK_WRONG:
                    raise ProtocolError(0x82, "an acknowledgement of the wrong kind")
                if said == ACK_UNKNOWN:
                    self.core.count("unknown_ack")
        elif kind == 14:
            self._on_disconnect(session, packets.decode_disconnect(body, self.version, limits.strict))
        elif kind == 15 and self.v5:
            packets.decode_auth(body, self.version)
            raise ProtocolError(0x82, "AUTH without an authentication method")  # [MQTT-4.12.0-7]
        else:
            raise ProtocolError(0x82, "a packet only servers send")

    def subscribed(self, session: Session, packet_id: int, codes: list[int], retained: list[Any]) -> None:
        """Answer SUBSCRIBE and begin to send the retained messages."""
        self.push(packets.encode_suback(packet_id, self.version, codes))  # [MQTT-3.8.4-1]
        if retained:
            session.retained = deque(retained) if session.retained is None else session.retained + deque(retained)
            session.drain()

    def push_live(self, data: bytes) -> None:
        """Send bytes that had to wait, if the connection is still there."""
        if self.state == LIVE:
            self.push(data)

    def _on_connect(self, body: bytes) -> None:
        limits = self.core.limits
        connect = packets.decode_connect(body, limits.strict, limits.max_user_properties)
        self.connect = connect
        self.version = connect.version
        self.v5 = connect.version == 5
        self.bridge = connect.bridge
        if connect.bridge and not self.listener.bridge_bit:
            self.refuse(0x84)
            return
        if self.engine.pressure > 1 and not self.listener.privileged:
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
        self.engine.gate.authenticate(self, connect)

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
            return
        self.connect = None
        if self.state == LIVE and self.session is not None and self.session.channel is self:
            self.resume_parse()

    def refuse(self, code: int) -> None:
        """The gate's no, with an MQTT 5 reason code."""
        if self.state == CLOSED or self.state == LIVE:
            return
        self.core.count("connect_refused")
        self.push(packets.encode_connack(self.version, False, code if self.v5 else connack_v3(code)))
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
                self.push(packets.encode_connack(5, False, error.code))
            elif error.code == 0x84:
                self.push(packets.encode_connack(version, False, 1))  # [MQTT-3.1.2-2]
            self._end(version == 5)
        else:
            self.disconnect(error.code)

    def disconnect(self, code: int) -> None:
        """The server ends the connection; MQTT 5 clients are told why. The will is published."""
        if self.state == CLOSED:
            return
        if self.v5 and self.state == LIVE and not self.engine.awaits_welcome(self):  # [MQTT-3.2.0-1]
            self._flush_acks()
            self.push(packets.encode_disconnect(5, code))  # [MQTT-4.13.1-1]
            self._end(True, code)
            return
        self._end(False, code)

    def _abort(self, reason: str) -> None:
        """Close without a word."""
        self.core.count(reason)
        self._end(False, reason)

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


def _without_metadata(props: Properties) -> bytes:
    """What is passed on, less the property only we may set."""
    kept = Properties()
    kept.payload_format_indicator = props.payload_format_indicator
    kept.content_type = props.content_type
    kept.response_topic = props.response_topic
    kept.correlation_data = props.correlation_data
    kept.user_properties = [pair for pair in props.user_properties or [] if pair[0] != METADATA] or None
    block = encode_properties(kept)
    skip = 0
    while block[skip] & 128:
        skip += 1
    return block[skip + 1 :]


def _is_text(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True
