"""The state of one client id: subscriptions, in-flight window, queue, QoS 2 identifiers. It outlives connections.

A session has an outbox while a connection is attached. QoS 1 and 2 go straight into the in-flight window while there
is room and nothing queues before them; otherwise they queue. Containers are None until first use.
"""

from collections import deque
from typing import Any

from broker.engine.core import Core
from broker.engine.inflight import FREE, IDENTIFIERS, PUBLISHED, RELEASED, SENT, Inflight
from broker.engine.message import Message, encode_head
from broker.engine.outbox import Outbox
from broker.engine.receiver import DONE, LATER, REFUSED, Hold, Receiver, Subscription, Target
from broker.mqtt.framing import encode_length

ACK_OK = 0
ACK_UNKNOWN = 1
ACK_WRONG = 2

NEVER = 0xFFFFFFFF
"""A Session Expiry Interval that does not expire."""


class Session(Receiver):
    """`window` is how many QoS 1 and 2 messages may be unacknowledged towards the client."""

    def __init__(self, client_id: str, core: Core) -> None:
        super().__init__()
        self.client_id = client_id
        self.core = core
        self.owner: str | None = None
        self.subscriptions: list[Subscription] | None = None
        self.inflight: Inflight | None = None
        self.queue: Any = None
        self.queue_bytes = 0
        self.window = 32
        self.received: bytearray | None = None
        self.received_count = 0
        self.persistent = False
        self.expiry = 0.0
        self.ends_at = 0.0
        self.rights: dict[bytes, Any] | None = None
        self.rights_bytes = 0
        self.resend: Any = None
        """Identifiers in flight that this connection has not been sent yet: the window of a resuming client."""
        self.alias_maximum = 0
        self.aliases: dict[bytes, int] | None = None
        self.encoded5 = False
        self.spec: Any = None
        self.blocked: list[Any] | None = None
        self.retained: Any = None
        self.will: Any = None
        self.will_delay = 0.0
        self.timers: dict[str, Any] | None = None
        self.created = core.now
        self.acked = 0
        self.dropped: dict[str, int] | None = None

    # deliveries -----------------------------------------------------------------------------------------------

    def deliver(self, message: Message, target: Target, hold: Hold | None) -> int:
        """Take one message at the lower of its QoS and the subscription's."""
        qos = message.qos if message.qos < target.qos else target.qos  # [MQTT-3.8.4-8]
        if qos == 0 and self.spec is not None and self.spec.upgrade_qos and target.qos > 0:
            qos = 1
        if hold is not None and (self.spec is None or self.spec.ack != "delivered"):
            hold = None
        return self.offer(message, qos, message.retain and target.rap, target.idents, hold, target.group)

    def offer(self, message: Message, qos: int, retain: bool, idents: Any, hold: Hold | None, group: Any) -> int:
        """Send or queue one message at this QoS with these extras."""
        box = self.outbox
        if qos == 0:
            if box is None:
                if self.persistent:
                    return self._enqueue(message, qos, retain, idents, hold, group)
                self.core.drop("offline")
                return DONE
            if message.expires != 0 and message.expires <= self.core.now:
                self.core.drop("expired")
                return DONE
            if retain or idents is not None or self.special or message.expires != 0:
                packet = self._encode0(message, retain, idents)
            else:
                packet = message.publish0(self.v5)
            if len(packet) > self.max_packet:  # [MQTT-3.1.2-24]
                self.core.drop("too_large")
            elif box.offer(packet):
                self.core.sent += 1
            else:
                self.core.drop("slow_receiver")
            return DONE
        if (
            box is None
            or box.congested
            or self.queue
            or (self.inflight is not None and self.inflight.count >= self.window)
        ):
            return self._enqueue(message, qos, retain, idents, hold, group)
        return self._send(box, message, qos, retain, idents, hold, group)

    def refuses(self, size: int) -> int:
        """Whether the queue of an instance has no room for a message of this size."""
        spec = self.spec
        if spec is None or spec.overflow == "drop_oldest" or spec.overflow == "drop_newest":
            return DONE
        if self.queue_bytes + size <= spec.max_bytes:
            return DONE
        return LATER if spec.overflow == "block" and size <= spec.max_bytes else REFUSED

    def _send(
        self, box: Outbox, message: Message, qos: int, retain: bool, idents: Any, hold: Hold | None, group: Any
    ) -> int:
        if message.expires != 0 and message.expires <= self.core.now:
            self.core.drop("expired")
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
            self.core.drop("too_large")
            return DONE
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
        box.push_parts(head, IDENTIFIERS[ident], body)
        self.core.sent += 1
        return LATER if hold is not None else DONE

    def _enqueue(self, message: Message, qos: int, retain: bool, idents: Any, hold: Hold | None, group: Any) -> int:
        queue = self.queue
        if queue is None:
            queue = self.queue = deque()
        size = message.size
        spec = self.spec
        if spec is not None:
            self.core.stamp(message)
            if self.queue_bytes + size > spec.max_bytes:
                if spec.overflow != "drop_oldest":
                    self._count_drop("queue_full")
                    return REFUSED
                while queue and self.queue_bytes + size > spec.max_bytes:
                    self._discard(queue.popleft(), "queue_full")
        elif len(queue) >= self.core.limits.max_queued_messages and not self._make_room(queue, qos):
            self.core.drop("queue_full")
            return DONE
        if hold is not None:
            hold.count += 1
        queue.append((message, qos, retain, idents, hold, group))
        self.queue_bytes += size
        return LATER if hold is not None else DONE

    def _make_room(self, queue: Any, qos: int) -> bool:
        """QoS 0 goes first, then the oldest. False when the newcomer is the one to go."""
        if self.core.limits.max_queued_messages <= 0:
            return False
        for i, entry in enumerate(queue):
            if entry[1] == 0:
                del queue[i]
                self._discard(entry, "queue_full")
                return True
        if qos == 0:
            return False
        self._discard(queue.popleft(), "queue_full")
        return True

    def _discard(self, entry: Any, reason: str) -> None:
        self.queue_bytes -= entry[0].size
        if reason:
            self._count_drop(reason)
        if entry[4] is not None:
            entry[4].release()

    def _count_drop(self, reason: str) -> None:
        self.core.drop(reason)
        if self.spec is not None:
            if self.dropped is None:
                self.dropped = {}
            self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def oldest_ms(self) -> int:
        """When the oldest unacknowledged message of an instance came, milliseconds since 1970; 0 when there is none."""
        inflight = self.inflight
        if inflight is not None and inflight.count:
            for entry in inflight.entries():
                body = entry[3]
                at = body.find(b'"t":') if body is not None else -1
                if at >= 0:
                    return int(body[at + 4 : body.find(b",", at)])
        if self.queue:
            return int(self.queue[0][0].time_ms)
        return 0

    def drain(self) -> None:
        """Move what queues into the in-flight window, as far as the client takes it."""
        box = self.outbox
        queue = self.queue
        if box is None:
            return
        if self.resend is not None:
            self._send_again(box)
            if self.resend is not None:
                return
        while queue and not box.congested:
            entry = queue[0]
            if entry[1] > 0 and self.inflight is not None and self.inflight.count >= self.window:
                break
            queue.popleft()
            message, qos, retain, idents, hold, group = entry
            self.queue_bytes -= message.size
            if qos == 0:
                self.offer(message, 0, retain, idents, None, group)
            else:
                if self._send(box, message, qos, retain, idents, hold, group) == DONE:
                    if hold is not None:
                        hold.release()
                elif hold is not None:
                    hold.count -= 1
        if not queue:
            self.queue = None
            if self.retained is not None:
                self._send_retained(box)
        if self.blocked is not None and self.spec is not None and self.queue_bytes < self.spec.max_bytes:
            self.unblock()

    def unblock(self) -> None:
        """Let the publishers go on that wait for room."""
        waiting = self.blocked
        self.blocked = None
        for channel in waiting or ():
            channel.resume_parse()

    def _send_retained(self, box: Any) -> None:
        """Retained messages of new subscriptions, at the pace the client takes them."""
        retained = self.retained
        store = box.engine.retained_store
        while retained and not box.congested:
            if self.inflight is not None and self.inflight.count >= self.window:
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
        ref = inflight.remove(ident)
        self.acked += 1
        if ref is not None and ref[0] is not None:
            ref[0].release()
        if self.queue is not None or self.retained is not None or self.resend is not None:
            self.drain()
        return ACK_OK

    def on_pubrec(self, ident: int, code: int) -> int:
        """QoS 2: the client has the message (or, from 0x80, refuses it)."""
        inflight = self.inflight
        state = FREE if inflight is None else inflight.state(ident)
        if inflight is None or state == FREE:
            return ACK_UNKNOWN
        if state == SENT:
            return ACK_WRONG
        if code >= 0x80:
            ref = inflight.remove(ident)
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
        if self.queue is not None or self.retained is not None or self.resend is not None:
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
        if self.retained is not None and self.persistent:
            for message, qos, idents in self.retained:
                if qos:
                    self._enqueue(message, qos, True, idents, None, None)
        self.retained = None

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
                    box.push(b"\x62\x02" + IDENTIFIERS[ident])
                    continue
                if convert:
                    head, body = convert_packet(head, body, self.v5)
                    inflight.heads[ident & inflight.mask] = head
                    inflight.bodies[ident & inflight.mask] = body
                if len(head) + len(body) + 2 > self.max_packet:  # [MQTT-3.1.2-24]
                    inflight.remove(ident)
                    self._count_drop("too_large")
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

    def take_shared(self) -> list[Any]:
        """Remove and return what was sent or queued through a shared subscription and another connected member may
        have: QoS 1 in flight and everything queued; QoS 2 already sent waits for this client. [MQTT-4.8.2-4]"""
        taken = []
        inflight = self.inflight
        if inflight is not None and inflight.refs is not None:
            for ident, state, _, _, ref in inflight.entries():
                if ref is not None and ref[1] is not None and state == SENT and ref[1].elsewhere(self, ref[2]):
                    inflight.remove(ident)
                    taken.append((ref[2], ref[3], ref[4], ref[5], ref[0], ref[1]))
        if self.queue is not None:
            kept: Any = deque()
            for entry in self.queue:
                if entry[5] is None or not entry[5].elsewhere(self, entry[0]):
                    kept.append(entry)
                else:
                    self.queue_bytes -= entry[0].size
                    taken.append(entry)
            self.queue = kept if kept else None
        return taken

    def purge(self, filter_topics: Any, reason: str = "unauthorized") -> None:
        """Drop queued messages whose topic `filter_topics(topic)` rejects; what is in flight finishes."""
        if self.retained is not None:
            self.retained = deque(entry for entry in self.retained if filter_topics(entry[0].topic)) or None
        if self.queue is None:
            return
        kept: Any = deque()
        for entry in self.queue:
            if filter_topics(entry[0].topic):
                kept.append(entry)
            else:
                self._discard(entry, reason)
        self.queue = kept if kept else None
        if self.blocked is not None:
            self.unblock()

    @property
    def queued(self) -> int:
        """Messages waiting, those in flight included."""
        return (len(self.queue) if self.queue is not None else 0) + (self.inflight.count if self.inflight else 0)


def convert_packet(head: bytes, body: bytes, v5: bool) -> tuple[bytes, bytes]:
    """The two pieces of a PUBLISH for the other protocol version: a client may come back with another one."""
    at = 1
    while head[at] & 128:
        at += 1
    topic = head[at + 3 :]
    if v5:
        body = b"\x00" + body
    else:
        size = 0
        shift = 0
        skip = 0
        while True:
            byte = body[skip]
            skip += 1
            size |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                break
        body = body[skip + size :]
    return encode_head(topic, head[0], len(body) + 2), body
