"""The state of one client id: subscriptions, in-flight window, queue, QoS 2 identifiers. It outlives connections.

A session has an outbox while a connection is attached. QoS 1 and 2 go straight into the in-flight window while there
is room and nothing queues before them; otherwise they queue (`Queue`). Containers are None until first use. A session
that survives a restart has a `Spool`: its messages have sequence numbers and go through the journal.
"""

from base64 import b64encode
from collections import deque
from typing import Any

from broker.engine import records
from broker.engine.core import Core
from broker.engine.inflight import FREE, IDENTIFIERS, PUBLISHED, RELEASED, SENT, Inflight
from broker.engine.journal import Journal
from broker.engine.message import Message, convert_packet, encode_head
from broker.engine.outbox import Outbox
from broker.engine.queue import Queue
from broker.engine.receiver import DONE, LATER, REFUSED, Hold, Target, filter_of
from broker.engine.spool import FAILED, IN_MEMORY, IN_MEMORY_BYTES, LOAD, STORED, Pending, Spool
from broker.mqtt.framing import encode_length

ACK_OK = 0
ACK_UNKNOWN = 1
ACK_WRONG = 2
ACK_LATER = 3
"""The answer follows when it is safe to give it."""

IN_FLIGHT_BYTES = 32 << 20
"""Bytes in flight to one client, by the size of the next message: a worker may have 65 535, but not of a megabyte."""
NEVER = 0xFFFFFFFF
"""A Session Expiry Interval that does not expire."""


class Session(Queue):
    """`window` is how many QoS 1 and 2 messages may be unacknowledged towards the client."""

    def __init__(self, client_id: str, core: Core) -> None:
        Queue.__init__(self, core)  # not super(): see Channel
        self.client_id = client_id
        self.owner: str | None = None
        self.window = 32
        self.received: bytearray | None = None
        self.received_count = 0
        self.expiry = 0.0
        self.ends_at = 0.0
        self.rights: dict[bytes, Any] | None = None
        self.rights_bytes = 0
        self.resend: Any = None
        """Identifiers in flight that this connection has not been sent yet: the window of a resuming client."""
        self.alias_maximum = 0
        self.aliases: dict[bytes, int] | None = None
        self.encoded5 = False
        self.claimed = False
        """Accepted, but CONNACK waits for the disk: there is no outbox yet."""
        self.will: Any = None
        self.will_delay = 0.0
        self.will_terms: dict[str, Any] | None = None
        """What the gate is to be told of the will's owner after a restart; None where the owner may not publish it."""
        self.timers: dict[str, Any] | None = None
        self.created = core.now
        self.acked = 0

    # deliveries -----------------------------------------------------------------------------------------------

    def deliver(self, message: Message, target: Target, hold: Hold | None) -> int:
        """Take one message at the lower of its QoS and the subscription's."""
        qos = message.qos if message.qos < target.qos else target.qos  # [MQTT-3.8.4-8]
        if qos == 0 and self.spec is not None and self.spec.upgrade_qos and target.qos > 0:
            qos = 1
        if (qos == 0 or self.spool is None) and (self.spec is None or self.spec.ack != "delivered"):
            hold = None
        return self.offer(message, qos, message.retain and target.rap, target.idents, hold, target.group)

    def offer(self, message: Message, qos: int, retain: bool, idents: Any, hold: Hold | None, group: Any) -> int:
        """Send or queue one message at this QoS with these extras."""
        box = self.outbox
        if qos == 0:
            if box is None:
                if self.persistent:
                    return self._enqueue(message, qos, retain, idents, hold, group)
                self.core.drop("offline", 1, self)
                return DONE
            if message.expires != 0 and message.expires <= self.core.now:
                self.core.drop("expired", 1, self)
                return DONE
            if retain or idents is not None or self.special or message.expires != 0:
                packet = self._encode0(message, retain, idents)
            else:
                packet = message.publish0(self.v5)
            if len(packet) > self.max_packet:  # [MQTT-3.1.2-24]
                self.core.drop("too_large", 1, self)
            elif box.offer(packet):
                self.core.sent += 1
            else:
                self.core.drop("slow_receiver", 1, self)
            return DONE
        if self.spool is not None:
            return self._keep(self.spool, message, qos, retain, idents, hold, group)
        if (
            box is None
            or box.congested
            or self.queue
            or (self.inflight is not None and self.inflight.count >= self.window)
        ):
            return self._enqueue(message, qos, retain, idents, hold, group)
        return self._send(box, message, qos, retain, idents, hold, group, 0, None)

    def _keep(
        self, spool: Spool, message: Message, qos: int, retain: bool, idents: Any, hold: Hold | None, group: Any
    ) -> int:
        """As `offer`, for QoS 1 and 2 and a session that survives a restart. QoS 1 is sent at once where nothing waits;
        QoS 2 only when it is on disk: else a crash would send it again under another packet identifier."""
        box = self.outbox
        inflight = self.inflight
        seq = spool.next_seq
        direct = (
            qos == 1
            and box is not None
            and not box.congested
            and self.queue is None
            and self.resend is None
            and spool.backlog is None
            and spool.tail is None
            and spool.loading is None
            and (
                inflight is None
                or (
                    inflight.count < self.window
                    and inflight.count * message.size <= IN_FLIGHT_BYTES
                    and inflight.state((seq - 1) % 65535 + 1) == FREE
                )
            )
        )
        if message.expires != 0 and message.expires <= self.core.now:
            self.core.drop("expired", 1, self)
            return DONE
        journal = self.core.journal
        if journal.refusing:
            self.count_drop("store_refuses")
            return REFUSED
        size = message.size
        if not direct:
            said = self._admit(qos, size)
            if said != LATER:
                return said
            seq = spool.next_seq  # making room may have let another publisher go on
        safe = hold
        if self.spec is not None and self.spec.ack != "spool":
            safe = None
            if self.spec.ack == "accept":
                hold = None
        else:
            hold = None
        spool.next_seq = seq + 1
        mark = group.mark if group is not None else 0
        pending = journal.take(message, spool, seq, qos, retain, idents, mark, safe, not direct)
        if direct and box is not None:
            self._send(box, message, qos, retain, idents, hold, group, seq, pending)
        else:
            if hold is not None:
                hold.count += 1
            entry = (message, qos, retain, idents, hold, group, seq, pending)
            self.queue_bytes += size
            queue = self.queue
            if (
                box is None
                or spool.backlog is not None
                or spool.tail is not None
                or spool.loading is not None
                or (queue is not None and (len(queue) >= IN_MEMORY or len(queue) * size > IN_MEMORY_BYTES))
            ):
                spool.put_aside(entry)
            else:
                if queue is None:
                    queue = self.queue = deque()
                queue.append(entry)
        return LATER if safe is not None or hold is not None else DONE

    def _send(
        self,
        box: Outbox,
        message: Message,
        qos: int,
        retain: bool,
        idents: Any,
        hold: Hold | None,
        group: Any,
        seq: int,
        pending: Pending | None,
    ) -> int:
        """Put a message in flight; `seq` and `pending` are those of a stored one."""
        spool = self.spool
        if message.expires != 0 and message.expires <= self.core.now:
            self.core.drop("expired", 1, self)
            if pending is not None and spool is not None:
                spool.passed(seq, self.inflight)
                spool.finish(seq, pending, self.inflight)
            return DONE
        inflight = self.inflight
        if inflight is None:
            inflight = self.inflight = Inflight()
        if retain or idents is not None or self.special or message.expires != 0:
            head, body = self._encode(message, qos, retain, idents)
        else:
            head = message.head(self.v5, qos)
            body = message.body(self.v5)
        if len(head) + len(body) + 2 > self.max_packet:  # [MQTT-3.1.2-24]
            self.core.drop("too_large", 1, self)
            if pending is not None and spool is not None:
                spool.passed(seq, inflight)
                spool.finish(seq, pending, inflight)
            return DONE
        if pending is not None and spool is not None:
            ident = (seq - 1) % 65535 + 1
            inflight.put(ident, SENT if qos == 1 else PUBLISHED, head, body)
            inflight.next_id = ident + 1 if ident < 65535 else 1
            inflight.keep(ident, pending)
            spool.passed(seq, inflight)
        else:
            ident = inflight.add(head, body, qos)
        if self.alias_maximum and self.v5:
            # only this transmission uses the alias: it does not outlive the connection, the message in flight may
            topic, alias = self._alias(message.topic)
            if alias:
                body = message.body_with(alias + self._extra(message, idents))
                head = encode_head(topic, head[0], len(body) + 2)
        if hold is not None or group is not None:
            if hold is not None:
                hold.count += 1
            inflight.attach(ident, (hold, group, message, qos, retain, idents))
        if pending is not None and spool is not None and seq < spool.again_below:
            head = bytes((head[0] | 8,)) + head[1:]  # [MQTT-3.3.1-1]
        box.push_parts(head, IDENTIFIERS[ident], body)
        self.core.sent += 1
        return LATER if hold is not None else DONE

    def life(self, journal: Journal, connected: bool) -> dict[str, Any]:
        """What changes when a connection comes or goes, as the journal keeps it."""
        will = self.will
        spool = self.spool
        return {
            "on": connected,
            "a": 0 if connected or spool is None else max(spool.sent, spool.again_below),
            "x": 0 if connected else journal.to_clock(self.ends_at),
            "e": self.expiry,
            "w": self.window,
            "v5": bool(self.v5),
            "will": None if will is None else will_fields(self, journal.to_clock(self.will_at())),
        }

    def note_life(self, connected: bool) -> None:
        """The journal learns what has become of the connection, the expiry and the will."""
        if self.spool is not None:
            journal = self.core.journal
            journal.note(records.encode_json(records.LIFE, self.spool.number, self.life(journal, connected)))

    def will_at(self) -> float:
        """When a will that waits is published; 0 when none does."""
        timer = (self.timers or {}).get("will")
        return float(timer.when) if timer is not None else 0.0

    def snapshot(self, journal: Journal) -> dict[str, Any]:
        """The session as the journal keeps it, but for its sequence numbers."""
        fields: dict[str, Any] = {"c": self.client_id, "o": self.owner, "k": self.created}
        fields.update(self.life(journal, self.outbox is not None or bool(self.claimed)))
        if self.left_share:
            fields["ls"] = True
        fields["subs"] = [
            [filter_of(s).decode(), s.qos, bool(s.no_local), bool(s.rap), s.ident] for s in self.subscriptions or ()
        ]
        return fields

    def oldest_ms(self) -> int:
        """When the oldest unacknowledged message of an instance came, milliseconds since 1970; 0 when there is none."""
        inflight = self.inflight
        body = inflight.first_body() if inflight is not None and inflight.count else None
        if body is not None:
            at = body.find(b'"t":')
            if at >= 0:
                return int(body[at + 4 : body.find(b",", at)])
        queued = self.oldest_queued_ms()
        return self.core.wall_ms - (self.core.clock() - queued) if queued else 0

    def drain(self) -> None:
        """Move what queues into the in-flight window, as far as the client takes it."""
        box = self.outbox
        if box is None:
            return
        if self.resend is not None:
            self._send_again(box)
            if self.resend is not None:
                return
        spool = self.spool
        oldest = self._oldest_kept() if self.queue is not None else 0
        while True:
            # whoever is told that a message is safe or given up goes on at once, and may be this very client
            while (queue := self.queue) and not box.congested:
                entry = queue[0]
                if entry[1] > 0 and not self._may_go(entry):
                    break
                queue.popleft()
                message, qos, retain, idents, hold, group, seq, pending = entry
                if pending is not None and pending.state == FAILED:
                    self.discard(entry, "store_failed")
                    continue
                if 0 < message.clock_ms < oldest:
                    if pending is not None and spool is not None:
                        spool.passed(seq, self.inflight)
                    self.discard(entry, "too_old")
                    continue
                self.queue_bytes -= message.size
                if qos == 0:
                    self.offer(message, 0, retain, idents, None, group)
                    if hold is not None:
                        hold.release()
                elif self._send(box, message, qos, retain, idents, hold, group, seq, pending) == DONE:
                    if hold is not None:
                        hold.release()
                elif hold is not None:
                    hold.count -= 1
            if self.outbox is not box:
                return
            if spool is None or box.congested or (queue and len(queue) >= LOAD):
                break
            if spool.backlog is None and queue:
                break
            if not spool.refill():
                break
            oldest = self._oldest_kept()
        if not self.queue:
            self.queue = None
            if spool is not None and spool.sent < spool.next_seq:
                spool.close_gap()
            if self.retained is not None:
                self._send_retained(box)
        if self.blocked is not None and self.spec is not None and self.queue_bytes < self.spec.max_bytes:
            self.unblock()

    def _may_go(self, entry: Any) -> bool:
        """Whether the window takes this queue entry now."""
        inflight = self.inflight
        if inflight is not None and inflight.count >= self.window:
            return False
        if inflight is not None and inflight.count * entry[0].size > IN_FLIGHT_BYTES:
            return False
        pending = entry[7]
        if pending is None or pending.state == FAILED:
            return True
        if entry[1] == 2 and pending.state != STORED:
            return False
        return inflight is None or inflight.state((entry[6] - 1) % 65535 + 1) == FREE

    def _send_retained(self, box: Any) -> None:
        """Retained messages of new subscriptions, at the pace the client takes them."""
        retained = self.retained
        store = box.engine.retained_store
        while retained and not box.congested:
            if self.inflight is not None and self.inflight.count >= self.window:
                return
            if self.spool is not None and self.core.journal.refusing:
                return
            message, qos, idents = retained.popleft()
            if store.get(message.topic) is message:  # else a newer one has gone to the subscription itself
                self.offer(message, qos, True, idents, None, None)
        if not retained:
            self.retained = None

    # encodings ------------------------------------------------------------------------------------------------

    def _extra(self, message: Message, idents: Any) -> bytes:
        extra = b""
        if message.expires != 0:
            left = int(message.expires - self.core.now)
            extra = b"\x02" + (left if left > 0 else 0).to_bytes(4, "big")  # [MQTT-3.3.2-6]
        if idents is not None:
            for ident in idents:
                extra += b"\x0b" + encode_length(ident)
        if self.spec is not None or self.origin is not None:
            self.core.stamp(message)
            extra += message.metadata()
        return extra

    def _encode(self, message: Message, qos: int, retain: bool, idents: Any) -> tuple[bytes, bytes]:
        """Head and body of a PUBLISH with extras for this receiver."""
        first = 0x30 | qos << 1 | (1 if retain else 0)
        if not self.v5:
            return encode_head(message.topic, first, len(message.payload) + 2), message.payload
        body = message.body_with(self._extra(message, idents))
        return encode_head(message.topic, first, len(body) + 2), body

    def _encode0(self, message: Message, retain: bool, idents: Any) -> bytes:
        first = 0x31 if retain else 0x30
        if not self.v5:
            return encode_head(message.topic, first, len(message.payload)) + message.payload
        topic, alias = self._alias(message.topic) if self.alias_maximum else (message.topic, b"")
        body = message.body_with(alias + self._extra(message, idents))
        return encode_head(topic, first, len(body)) + body

    def _alias(self, topic: bytes) -> tuple[bytes, bytes]:
        """The topic name and the Topic Alias property to send; without one when all aliases are taken."""
        aliases = self.aliases
        if aliases is None:
            aliases = self.aliases = {}
        alias = aliases.get(topic, 0)
        if alias:
            return b"", b"\x23" + alias.to_bytes(2, "big")
        if len(aliases) >= self.alias_maximum:  # [MQTT-3.1.2-26]
            return topic, b""
        aliases[topic] = len(aliases) + 1
        return topic, b"\x23" + len(aliases).to_bytes(2, "big")  # [MQTT-3.3.2-9]

    # acknowledgements of the client ---------------------------------------------------------------------------

    def on_puback(self, ident: int) -> int:
        """Complete a QoS 1 delivery."""
        inflight = self.inflight
        if inflight is None:
            return ACK_UNKNOWN
        state = inflight.state(ident)
        if state == FREE:
            return ACK_UNKNOWN
        if state != SENT:
            return ACK_WRONG
        pending = inflight.stored_of(ident)
        ref = inflight.remove(ident)
        self.acked += 1
        if pending is not None and self.spool is not None:
            self.spool.finish(self._seq_of(ident), pending, inflight)
        if ref is not None and ref[0] is not None:
            ref[0].release()
        if self._more():
            self.drain()
        return ACK_OK

    def _more(self) -> bool:
        """Whether something waits for room in the window."""
        return (
            self.queue is not None
            or self.retained is not None
            or self.resend is not None
            or (self.spool is not None and (self.spool.backlog is not None or self.spool.tail is not None))
        )

    def on_pubrec(self, ident: int, code: int) -> int:
        """QoS 2: the client has the message (or, from 0x80, refuses it)."""
        inflight = self.inflight
        state = FREE if inflight is None else inflight.state(ident)
        if inflight is None or state == FREE:
            return ACK_UNKNOWN
        if state == SENT:
            return ACK_WRONG
        pending = inflight.stored_of(ident)
        spool = self.spool
        if code >= 0x80:
            ref = inflight.remove(ident)
            if spool is not None:
                seq = self._seq_of(ident)
                if pending is not None:
                    spool.finish(seq, pending, inflight)
                else:
                    spool.completed(seq, inflight)
            if ref is not None and ref[0] is not None:
                ref[0].release()
            self.drain()
            return ACK_UNKNOWN if state == RELEASED else ACK_OK
        if state == PUBLISHED:
            if inflight.refs is not None:
                ref = inflight.refs[ident & inflight.mask]
                if ref is not None:
                    if ref[0] is not None:
                        ref[0].release()
                    inflight.refs[ident & inflight.mask] = None
            inflight.release(ident)
        if spool is not None:
            reply = b"\x62\x02" + IDENTIFIERS[ident]
            if pending is not None:
                self.core.journal.released(spool, self._seq_of(ident), pending, self.outbox, reply)
            else:
                self.core.journal.reply(self.outbox, reply)
            return ACK_LATER
        return ACK_OK

    def on_pubcomp(self, ident: int) -> int:
        """QoS 2 completed."""
        inflight = self.inflight
        if inflight is None:
            return ACK_UNKNOWN
        state = inflight.state(ident)
        if state == FREE:
            return ACK_UNKNOWN
        if state != RELEASED:
            return ACK_WRONG
        inflight.remove(ident)
        self.acked += 1
        if self.spool is not None:
            self.spool.completed(self._seq_of(ident), inflight)
        if self._more():
            self.drain()
        return ACK_OK

    # QoS 2 from the client ------------------------------------------------------------------------------------

    def seen(self, ident: int) -> bool:
        """Whether this packet identifier is a QoS 2 message already taken and not yet released."""
        received = self.received
        return received is not None and received[ident >> 3] & (1 << (ident & 7)) != 0

    def remember(self, ident: int) -> None:
        """The QoS 2 message with this identifier has been taken."""  # [MQTT-4.3.3-9]
        if self.received is None:
            self.received = bytearray(8192)
        if not self.received[ident >> 3] & (1 << (ident & 7)):
            self.received[ident >> 3] |= 1 << (ident & 7)
            self.received_count += 1

    def forget(self, ident: int) -> bool:
        """PUBREL came; False when the identifier was not known."""
        if not self.seen(ident) or self.received is None:
            return False
        self.received[ident >> 3] &= 255 ^ (1 << (ident & 7))
        self.received_count -= 1
        return True

    # connections ----------------------------------------------------------------------------------------------

    @property
    def channel(self) -> Any:
        """The connection, which is also the outbox; None while there is none."""
        return self.outbox

    def attach(self, channel: Any, v5: bool) -> None:
        """A connection takes the session over."""
        self.outbox = channel
        self.v5 = v5
        self.aliases = None

    def begin_anew(self) -> None:
        """A worker's publishing session starts without the identifiers of the one before."""
        self.received = None
        self.received_count = 0
        self.inflight = None

    def detach(self) -> None:
        """The connection is gone."""
        self.outbox = None
        self.aliases = None
        self.resend = None
        if self.spool is not None:
            self.spool.fold()
        if self.retained is not None and self.spool is not None:  # `owed.py` sees to it that a restart keeps them
            self.retained = deque(entry for entry in self.retained if entry[1]) or None
            return
        if self.retained is not None and self.persistent:
            self.queue_retained()
        self.retained = None

    def queue_retained(self) -> None:
        """Let the retained messages of new subscriptions queue with the others."""
        for message, qos, idents in self.retained or ():
            if qos:
                self.offer(message, qos, True, idents, None, None)

    def resume(self) -> None:
        """Send again what was in flight, in its order, then what queues. [MQTT-4.4.0-1] [MQTT-4.6.0-1]"""
        box = self.outbox
        inflight = self.inflight
        if box is None:
            return
        if inflight is not None and inflight.count:
            convert = self.encoded5 != self.v5
            again: Any = deque()
            for ident, state, head, body, ref in inflight.entries():
                if state == RELEASED:
                    if self.spool is not None:  # its release may not be on disk yet
                        self.core.journal.reply(box, b"\x62\x02" + IDENTIFIERS[ident])
                    else:
                        box.push(b"\x62\x02" + IDENTIFIERS[ident])
                    continue
                if convert:
                    head, body = convert_packet(head, body, self.v5)
                    inflight.heads[ident & inflight.mask] = head
                    inflight.bodies[ident & inflight.mask] = body
                if len(head) + len(body) + 2 > self.max_packet:  # [MQTT-3.1.2-24]
                    pending = inflight.stored_of(ident)
                    inflight.remove(ident)
                    self.count_drop("too_large")
                    if pending is not None and self.spool is not None:
                        self.spool.finish(self._seq_of(ident), pending, inflight)
                    if ref is not None and ref[0] is not None:
                        ref[0].release()
                    continue
                again.append(ident)
            self.resend = again if again else None
        self.encoded5 = self.v5
        self.drain()

    def _send_again(self, box: Outbox) -> None:
        """What was in flight, at the pace and within the window of the new connection. [MQTT-3.3.4-9]"""
        inflight = self.inflight
        resend = self.resend
        while resend and inflight is not None and not box.congested:
            if inflight.count - len(resend) >= self.window:
                return
            ident = resend.popleft()
            if inflight.state(ident) == FREE:
                continue
            head = inflight.heads[ident & inflight.mask]
            body = inflight.bodies[ident & inflight.mask]
            if head is None:
                continue
            box.push_parts(bytes((head[0] | 8,)) + head[1:], IDENTIFIERS[ident], body)  # [MQTT-3.3.1-1]
            self.core.sent += 1
        if not resend:
            self.resend = None


def will_fields(session: Session, at_ms: int) -> dict[str, Any]:
    """A will as the journal keeps it: `at_ms` is when it is due on the store's clock, 0 while the client is there."""
    will: Message = session.will
    return {
        "topic": will.topic.decode(),
        "payload": b64encode(will.payload).decode(),
        "qos": will.qos,
        "retain": bool(will.retain),
        "properties": b64encode(will.properties).decode(),
        "expires": will.expires,
        "delay": session.will_delay,
        "at": at_ms,
        "terms": session.will_terms,
        "origin": will.origin.prefix() + "}" if will.origin is not None else "",
    }
