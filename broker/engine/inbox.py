"""What a client publishes, and the acknowledgements of both directions. MQTT 5 sections 3.3 to 3.7 and 4.3.

Theory of operation. Consecutive QoS 0 packets with the same route go out as one slice of the read (a *run*). All else
becomes a `Message`. Acknowledgements of one read are collected and written once; while one waits for something to be
safe (a *hold*), those behind it wait too. A topic's `Entry` says what this client may publish there and is kept with
the session. How packets are framed and how a connection begins and ends is the business of `Channel`.
"""

from collections import deque
from typing import Any

from broker.engine import topics
from broker.engine.core import Core
from broker.engine.message import METADATA, Message, Origin
from broker.engine.outbox import Outbox
from broker.engine.receiver import DONE, LATER, Hold
from broker.engine.router import Entry, Route, Router
from broker.engine.session import ACK_LATER, ACK_OK, ACK_UNKNOWN, ACK_WRONG, Session
from broker.engine.spool import GONE
from broker.mqtt.errors import ProtocolError
from broker.mqtt.properties import Properties, decode_properties, encode_properties
from broker.mqtt.text import check_text

NEW = 0
AUTHENTICATING = 1
LIVE = 2
CLOSED = 3

CONTINUE = 0
STOP = 1
SUSPEND = 2

PARTLY = 0x200
"""In an entry's code: the six bits below it tell which packets may be published, bit ``qos << 1 | retain``."""

PUBLISH_TYPE = 3
RIGHTS_PER_SESSION = 131_072
"""Topics a session's dictionary of rights may hold before it is started anew."""
RIGHTS_BYTES = 16 << 20
"""Bytes of topics it may hold."""


class Inbox(Outbox):
    """The publishing side of one connection, which is its outbox too. `Channel` is the rest of it."""

    def __init__(self, engine: Any, core: Core, router: Router, link: Any, peer: str) -> None:
        Outbox.__init__(self, link, core.flusher)  # not super(): see Channel
        self.engine = engine
        self.core = core
        self.router = router
        self.peer = peer
        self.session: Session | None = None
        self.principal: Any = None
        self.origin: Any = None
        self.state = NEW
        self.version = 4
        self.v5 = False
        self.suspended = False
        self.receive_maximum = 65535
        self.alias_maximum = 0
        self.aliases: dict[int, bytes] | None = None
        self.acks: bytearray | None = None
        self.held: Any = None
        self.memo: bytes = b""
        self.memo_entry: Entry | None = None
        self.unanswered = 0
        """QoS 1 messages of this connection whose PUBACK has not left yet."""
        self.unreleased = 0
        """QoS 2 messages of this connection whose PUBREL has not come yet."""

    @property
    def peerhost(self) -> str:
        """The peer's address without its port."""
        host, colon, _ = self.peer.rpartition(":")
        return host if colon else self.peer

    def make_origin(self) -> None:
        """Made with the first message: a client that only subscribes needs none."""
        assert self.session is not None
        principal = self.principal
        self.origin = Origin(
            self.session.client_id, principal.username, self.peerhost, principal.origin, principal, self.core.node
        )

    # what the connection does ---------------------------------------------------------------------------------

    def resume_parse(self) -> None:
        """Go on with what was kept while the channel was suspended."""
        raise NotImplementedError

    def _end(self, last_word: bool = False, why: int | str = "") -> None:
        raise NotImplementedError

    def _abort(self, reason: str) -> None:
        """Close without a word."""
        self.core.count(reason)
        self._end(False, reason)

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
        elif not self.engine.rights.gate.may_publish(self.principal, topic.decode()):
            some = self.engine.rights.gate.publishable(self.principal, topic.decode())
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
                    core.drop("slow_receiver", count, receiver)
            else:
                if other is None:
                    other = self._messages(data, start, end)
                for message in other:
                    receiver.deliver(message, target, None)

    def _messages(self, data: bytes, start: int, end: int) -> list[Any]:
        """The packets of a run as messages."""
        if self.origin is None:
            self.make_origin()
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
            self.core.drop("queue_full", 1, self.session)
            return
        self.router.publish(route, message, self.session, None)

    def _on_restricted(self, data: bytes, start: int, end: int, entry: Entry) -> int:
        """A plain QoS 0 packet to a topic where this client may not publish everything; STOP when that was its end."""
        if entry.code >= PARTLY and entry.code & 1:  # at QoS 0 and not retained it may be published
            shared = self.router.entry(entry.topic)
            route = shared.route
            if route is None:
                route = self.router.fill(shared)
            self._deliver_run(data, start, end, 1, end - start, route)
            return CONTINUE
        if 0xFF < entry.code < PARTLY:
            raise ProtocolError(entry.code & 0xFF, "the topic name is not valid")
        self.core.received += 1
        self.core.drop("invalid_topic" if entry.code == 0x90 else "unauthorized", 1, self.session)
        if entry.code != 0x90:
            self.denied()
        return STOP if self.state == CLOSED else CONTINUE

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
            entry = self._entry_of_alias(alias, p[at + 2 : topic_end])
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
            forward = _forwarded(props)
            if props.message_expiry_interval is not None:
                expires = self.engine.clock() + props.message_expiry_interval
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
            self._exceed()
        elif qos and not self.v5 and self.held is not None and len(self.held) >= core.limits.receive_maximum:
            self.suspended = True  # 3.x knows no Receive Maximum: it is not read until acknowledgements are released
            return SUSPEND
        if code == 0 and props is not None and props.payload_format_indicator == 1 and not _is_text(p[off:end]):
            code = 0x99
        if code:
            return self._reject(code, qos, ident)
        if self.origin is None:
            self.make_origin()
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
            # a bridge would send it again and again, and who is subscribed get it each time
            code = 0 if self.principal.privileged else 0x97
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

    def _entry_of_alias(self, alias: int, topic: bytes) -> Entry:
        """The entry of a PUBLISH with a Topic Alias, which `topic`, if not empty, gives its meaning."""
        if alias > self.alias_maximum:
            raise ProtocolError(0x94, "a topic alias above the maximum")  # [MQTT-3.2.2-18]
        if self.aliases is None:
            self.aliases = {}
        if topic:
            entry = self._entry(topic)
            self.aliases[alias] = entry.topic
            return entry
        known = self.aliases.get(alias)
        if known is None:
            raise ProtocolError(0x82, "an unknown topic alias")
        return self._entry(known)

    def _exceed(self) -> None:
        """The client does not keep to its Receive Maximum."""
        if self.core.limits.receive_maximum_policy != "warn":
            raise ProtocolError(0x93, "more unacknowledged messages than the Receive Maximum")  # [MQTT-3.3.4-7]
        assert self.session is not None
        self.core.count("receive_maximum_exceeded")
        self.engine.report(
            "receive_maximum", f"client {self.session.client_id!r} from {self.peer}: beyond Receive Maximum"
        )

    def _reject(self, code: int, qos: int, ident: int) -> int:
        """A message that may not be published; STOP when that was the connection's end."""
        self.core.received += 1
        reason = "unauthorized" if code == 0x87 else "invalid_topic" if code == 0x90 else "invalid_payload"
        self.core.drop(reason, 1, self.session)
        if code == 0x87:
            self.denied()
            if self.state == CLOSED:
                return STOP
        if qos:
            self._acknowledge(0x40 if qos == 1 else 0x50, ident, code if self.v5 else 0)
        return CONTINUE

    def denied(self) -> None:
        """A PUBLISH or a filter was refused for want of a right: who watches that may end or hold this connection."""
        if self.engine.on_denied is not None:
            self.engine.on_denied(self)

    def _refuse_publish(self, reason: str, qos: int, ident: int) -> int:
        """A message that must be kept cannot be: MQTT 5 says so, 3.x gets no acknowledgement and is closed."""
        self.core.received += 1
        self.core.drop(reason, 1, self.session)
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

    # our acknowledgements -------------------------------------------------------------------------------------

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
                if packet[0] == 0x50 and not (hold.code == 0x83 and self.principal.privileged):
                    # else a bridge has it sent again: as for 3.x, whether that is known is not for us to say
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

    # the client's acknowledgements ----------------------------------------------------------------------------

    def _on_ack(self, session: Session, first: int, ident: int) -> None:
        """An acknowledgement in its short form."""
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

    def _on_long_ack(self, session: Session, kind: int, ident: int, code: int) -> None:
        """An acknowledgement with a reason code."""
        if kind == 6:
            self._on_pubrel(session, ident)
        elif kind == 5:
            self._on_pubrec(session, ident, code)
        else:
            said = session.on_puback(ident) if kind == 4 else session.on_pubcomp(ident)
            if said == ACK_WRONG:
                raise ProtocolError(0x82, "an acknowledgement of the wrong kind")
            if said == ACK_UNKNOWN:
                self.core.count("unknown_ack")

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


def _forwarded(props: Properties) -> bytes:
    """The properties that are passed on. Raises ProtocolError for those only a server may send."""
    if props.subscription_identifiers is not None:
        raise ProtocolError(0x82, "a subscription identifier from a client")  # [MQTT-3.3.4-6]
    if props.response_topic is not None and topics.is_wild(props.response_topic.encode()):
        raise ProtocolError(0x82, "a response topic with a wildcard")  # [MQTT-3.3.2-14]
    if props.user_properties and b"$isthmus" in props.forward:
        return _without_metadata(props)
    return props.forward


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
