"""The state of one client id: subscriptions, in-flight window, queue, QoS 2 identifiers. It outlives connections.

A session has an outbox while a connection is attached. QoS 1 and 2 go straight into the in-flight window while there
is room and nothing queues before them; otherwise they queue. Containers are None until first use.

A session that survives a restart has a `Spool`: its messages have sequence numbers and go through the journal. A queue
entry is (message, qos, retain, identifiers, hold, group, sequence number, record); the last two are 0 and None
without a spool and at QoS 0.
"""

from base64 import b64encode
from collections import deque
from typing import Any

from broker.engine.core import Core
from broker.engine.inflight import FREE, IDENTIFIERS, PUBLISHED, RELEASED, SENT, Inflight
from broker.engine.journal import Journal
from broker.engine.message import Message, encode_head
from broker.engine.outbox import Outbox
from broker.engine.receiver import DONE, LATER, REFUSED, Hold, Receiver, Subscription, Target
from broker.engine.spool import FAILED, IN_MEMORY, IN_MEMORY_BYTES, LOAD, OPEN, STORED, WRITING, Pending, Spool
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
        self.claimed = False
        """Accepted, but CONNACK waits for the disk: there is no outbox yet."""
        self.left_share = False
        """It has left a `$share` group and may still have messages of it on disk."""
        self.spec: Any = None
        self.spool: Spool | None = None
        """Set for a session that survives a restart."""
        self.blocked: list[Any] | None = None
        self.retained: Any = None
        self.will: Any = None
        self.will_delay = 0.0
        self.will_terms: dict[str, Any] | None = None
        """What the gate is to be told of the will's owner after a restart; None where the owner may not publish it."""
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
            self.core.drop("expired")
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

    def _admit(self, qos: int, size: int) -> int:
        """LATER when one more message may wait, having made room for it where the policy says so."""
        spec = self.spec
        limits = self.core.limits
        if spec is not None:
            if self.queue_bytes + size > spec.max_bytes:
                if spec.overflow != "drop_oldest":
                    self.count_drop("queue_full")
                    return REFUSED
                while self.queue_bytes + size > spec.max_bytes and self.drop_oldest("queue_full"):
                    pass
            return LATER
        if limits.max_queued_messages <= 0:
            self.count_drop("queue_full")
            return DONE
        while self.waiting >= limits.max_queued_messages or (
            limits.max_queued_bytes and self.queue_bytes + size > limits.max_queued_bytes
        ):
            if limits.queue_overflow == "drop_newest" or not self.make_room(qos):
                self.count_drop("queue_full")
                return DONE
        return LATER

    @property
    def waiting(self) -> int:
        """Messages that queue, in memory and on disk."""
        count = len(self.queue) if self.queue is not None else 0
        return count + self.spool.waiting if self.spool is not None else count

    def drop_oldest(self, reason: str) -> bool:
        """Give up the oldest message that queues; False when none does."""
        if self.spool is not None:
            return self.spool.drop_oldest(reason)
        if not self.queue:
            return False
        self.discard(self.queue.popleft(), reason)
        return True

    def make_room(self, qos: int) -> bool:
        """QoS 0 goes first, then the oldest. False when the newcomer is the one to go."""
        queue = self.queue
        for i, entry in enumerate(queue or ()):
            if entry[1] == 0:
                del queue[i]
                self.discard(entry, "queue_full")
                return True
        return qos > 0 and self.drop_oldest("queue_full")

    def refuses(self, size: int) -> int:
        """Whether the queue has no room for a message of this size, and its policy is to say so."""
        spec = self.spec
        if spec is None:
            limits = self.core.limits
            full = self.waiting >= limits.max_queued_messages or (
                limits.max_queued_bytes and self.queue_bytes + size > limits.max_queued_bytes
            )
            return REFUSED if full and self.durable else DONE
        if spec.overflow == "drop_oldest" or spec.overflow == "drop_newest":
            return DONE
        if self.queue_bytes + size <= spec.max_bytes:
            return DONE
        return LATER if spec.overflow == "block" and size <= spec.max_bytes else REFUSED

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
            self.core.drop("expired")
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
            self.core.drop("too_large")
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
                    self.count_drop("queue_full")
                    return REFUSED
                while queue and self.queue_bytes + size > spec.max_bytes:
                    self.discard(queue.popleft(), "queue_full")
        elif self._admit(qos, size) != LATER:
            return DONE
        elif self.core.limits.max_queued_age:
            self.core.stamp(message)
        if hold is not None:
            hold.count += 1
        queue.append((message, qos, retain, idents, hold, group, 0, None))
        self.queue_bytes += size
        return LATER if hold is not None else DONE

    def discard(self, entry: Any, reason: str) -> None:
        """Give up an entry that was taken out of the queue; `reason` counts it."""
        self.queue_bytes -= entry[0].size
        if reason:
            self.count_drop(reason)
        if entry[4] is not None:
            if reason == "store_failed":
                entry[4].fail(0x97)
            else:
                entry[4].release()
        if entry[7] is not None and self.spool is not None:
            self.spool.finish(entry[6], entry[7], self.inflight)

    def count_drop(self, reason: str, count: int = 1) -> None:
        """Messages that this session does not get."""
        self.core.drop(reason, count)
        if self.spec is not None:
            if self.dropped is None:
                self.dropped = {}
            self.dropped[reason] = self.dropped.get(reason, 0) + count

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

    def oldest_queued_ms(self) -> int:
        """When the oldest message that queues came, milliseconds of `Core.clock`; 0 when none does."""
        if self.queue:
            return int(self.queue[0][0].clock_ms)
        spool = self.spool
        if spool is None:
            return 0
        if spool.loading:
            return int(spool.loading[0][3]) * 1000
        first = spool.backlog.first() if spool.backlog is not None else None
        if first is not None:
            return int(first[3]) * 1000
        return int(spool.tail[0][0].clock_ms) if spool.tail else 0

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

    def _oldest_kept(self) -> int:
        """Messages that came before this, by `Core.clock`, have waited too long; not above 0 where none has."""
        age = self.spec.max_age if self.spec is not None else self.core.limits.max_queued_age
        return int(self.core.clock() - age * 1000) if age else 0

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

    def _seq_of(self, ident: int) -> int:
        """The sequence number of what is in flight under this packet identifier."""
        spool = self.spool
        assert spool is not None
        return spool.floor + (ident - (spool.floor - 1) % 65535 - 1 + 65535) % 65535

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
        if self.retained is not None and self.persistent:
            for message, qos, idents in self.retained:
                if qos:
                    self.offer(message, qos, True, idents, None, None)
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

    def take_shared(self, over: bool = False) -> list[Any]:
        """What was sent or queued through a shared subscription and another connected member may have: QoS 1 in flight
        and what queues in memory. QoS 2 already sent waits for this client [MQTT-4.8.2-4], and so does what queues on
        disk. It is removed, but for what is in flight and stored: that waits for `moved`.

        When the session is `over`, any member will do, and what is on disk and still in memory is taken too."""
        taken = []
        inflight = self.inflight
        if inflight is not None and inflight.refs is not None:
            for ident, state, _, _, ref in inflight.entries():
                if ref is not None and ref[1] is not None and state == SENT and self._leaves(ref[1], ref[2], over):
                    pending = inflight.stored_of(ident)
                    seq = self._seq_of(ident) if pending is not None else 0
                    if pending is None:
                        inflight.remove(ident)
                    taken.append((ref[2], ref[3], ref[4], ref[5], ref[0], ref[1], seq, pending))
        self.queue = self._without_shared(self.queue, taken, over)
        if self.spool is not None:
            self.spool.tail = self._without_shared(self.spool.tail, taken, over)
        return taken

    def _leaves(self, group: Any, message: Message, over: bool) -> bool:
        return bool(group.members) if over else bool(group.elsewhere(self, message))

    def group_of(self, mark: int) -> Any:
        """The `$share` group with this mark, if the session is a member."""
        for subscription in self.subscriptions or ():
            if subscription.group is not None and subscription.group.mark == mark:
                return subscription.group
        return None

    def has_room(self, size: int) -> bool:
        """As `Receiver.has_room`: half of the queue is left to live messages."""
        limits = self.core.limits
        if self.outbox is None:
            if not self.persistent or limits.max_queued_messages == 0:
                return False
        elif self.outbox.congested:
            return False
        full = limits.max_queued_bytes and 2 * (self.queue_bytes + size) > limits.max_queued_bytes
        return self.waiting <= limits.max_queued_messages // 2 and not full

    def take_queued(self, group: Any) -> list[Any]:
        """Remove and return what queues in memory through a group that the session has left."""
        taken: list[Any] = []
        self.queue = _without(self.queue, group, taken)
        if self.spool is not None:
            self.spool.tail = _without(self.spool.tail, group, taken)
        for entry in taken:
            self.queue_bytes -= entry[0].size
        return taken

    def _without_shared(self, queue: Any, taken: list[Any], over: bool) -> Any:
        if queue is None:
            return None
        kept: Any = deque()
        for entry in queue:
            on_disk = not over and entry[7] is not None and entry[7].state != OPEN
            if entry[5] is None or on_disk or not self._leaves(entry[5], entry[0], over):
                kept.append(entry)
            else:
                self.queue_bytes -= entry[0].size
                taken.append(entry)
        return kept if kept else None

    def moved(self, entry: Any) -> None:
        """Another member of the group has what `take_shared` returned."""
        message, seq, pending = entry[0], entry[6], entry[7]
        spool = self.spool
        if pending is None or spool is None:
            return
        copy = message.pending
        in_flight = self.inflight is not None and self.inflight.stored_of((seq - 1) % 65535 + 1) is pending
        if (pending.state == STORED or pending.state == WRITING) and copy is not None and copy.state == OPEN:
            self.core.journal.moves(message, spool, seq)
            if in_flight:
                if self.inflight is not None:
                    self.inflight.attach((seq - 1) % 65535 + 1, None)  # it moves once
                return
        if in_flight:
            spool.gave(seq)
        else:
            spool.finish(seq, pending, self.inflight)

    def purge(self, filter_topics: Any, reason: str = "unauthorized") -> None:
        """Drop queued messages whose topic `filter_topics(topic)` rejects; what is in flight finishes."""
        if self.retained is not None:
            self.retained = deque(entry for entry in self.retained if filter_topics(entry[0].topic)) or None
        given_up: list[Any] = []
        self.queue = _purged(self.queue, filter_topics, given_up)
        if self.spool is not None:
            self.spool.tail = _purged(self.spool.tail, filter_topics, given_up)
        for entry in given_up:  # whoever is told may publish to this very session
            self.discard(entry, reason)
        if self.blocked is not None:
            self.unblock()

    def drop_queue(self, reason: str) -> None:
        """Give up everything that queues; what is in flight finishes."""
        if self.spool is not None:
            self.spool.forget_all(reason)
            self.core.journal.snapshot(self.spool)
        else:
            self.purge(lambda topic: False, reason)
        if self.blocked is not None:
            self.unblock()

    def outdated(self, message: Message) -> str:
        """Why a message that comes back from disk is not delivered any more; empty when it is."""
        if message.expires != 0 and message.expires <= self.core.now:
            return "expired"
        if message.clock_ms < self._oldest_kept():
            return "too_old"
        withheld: str = self.core.withholds(self, message) if self.core.withholds is not None else ""
        return withheld

    @property
    def queued(self) -> int:
        """Messages waiting, those in flight included."""
        return self.waiting + (self.inflight.count if self.inflight else 0)


def _purged(queue: Any, filter_topics: Any, given_up: list[Any]) -> Any:
    """What stays of a queue; the rest is added to `given_up`."""
    if queue is None:
        return None
    kept: Any = deque()
    for entry in queue:
        (kept if filter_topics(entry[0].topic) else given_up).append(entry)
    return kept if kept else None


def _without(queue: Any, group: Any, taken: list[Any]) -> Any:
    if queue is None:
        return None
    kept: Any = deque()
    for entry in queue:
        (taken if entry[5] is group else kept).append(entry)
    return kept if kept else None


def filter_of(subscription: Subscription) -> bytes:
    """The filter as the client wrote it."""
    group = subscription.group
    name: bytes | None = getattr(group, "name", None)
    return subscription.filter if name is None else b"$share/" + name + b"/" + subscription.filter


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


def split_head(head: bytes) -> bytes:
    """The topic of the first piece of a PUBLISH."""
    at = 1
    while head[at] & 128:
        at += 1
    return head[at + 3 :]


def split_body(body: bytes) -> tuple[bytes, bytes]:
    """(properties, payload) of the second piece of an MQTT 5 PUBLISH."""
    size = 0
    shift = 0
    at = 0
    while True:
        byte = body[at]
        at += 1
        size |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return body[at : at + size], body[at + size :]


def convert_packet(head: bytes, body: bytes, v5: bool) -> tuple[bytes, bytes]:
    """The two pieces of a PUBLISH for the other protocol version: a client may come back with another one."""
    body = b"\x00" + body if v5 else split_body(body)[1]
    return encode_head(split_head(head), head[0], len(body) + 2), body
