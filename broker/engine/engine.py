"""The whole of one broker's protocol state: sessions by client id, subscriptions, retained messages, wills, timers.

One object per broker, no module-level state. `tick` is called four times a second; everything else happens inside
`Channel.feed`.
"""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from broker.engine import records, topics
from broker.engine.channel import AUTHENTICATING, CLOSED, LIVE, Channel
from broker.engine.core import Core, Limits
from broker.engine.gate import InternalPrincipal
from broker.engine.groups import Lanes, ShareGroup
from broker.engine.journal import Journal
from broker.engine.legacy import Legacies
from broker.engine.listener import ListenerInfo
from broker.engine.message import Message
from broker.engine.observer import Observer
from broker.engine.receiver import DONE, Hold, Subscription
from broker.engine.retained import Retained
from broker.engine.router import Route, Router
from broker.engine.session import NEVER, Session, filter_of
from broker.engine.spool import Spool
from broker.engine.timers import Timers, Wheel
from broker.mqtt import packets
from broker.mqtt.errors import ProtocolError
from broker.mqtt.properties import Properties

log = logging.getLogger(__name__)

LAST_WORD = 0.5
"""Seconds a peer has to read the reason of its disconnection before the socket is closed."""
LINGER = 4.0
"""Seconds a closed connection has to send what is left before it is cut."""
RESERVED = "isthmus/"
"""Client ids of workers; nobody else may use them."""

Report = Callable[[str, str], None]


def _quiet(category: str, text: str) -> None:
    log.info("%s: %s", category, text)


class Engine:
    """`gate` decides rights, `call_soon(callback)` runs a callback at the end of the loop's tick, `clock()` is
    monotonic seconds."""

    def __init__(
        self,
        gate: Any,
        call_soon: Callable[[Callable[[], None]], Any],
        *,
        clock: Callable[[], float],
        wall_ms: int,
        limits: Limits | None = None,
        node: str = "isthmus-1",
        node_id: int = 1,
        boot: int = 1,
        report: Report = _quiet,
    ) -> None:
        now = clock()
        self.gate = gate
        self.clock = clock
        self.core = Core(call_soon, now, wall_ms, node, node_id, boot)
        self.report = report
        self.sessions: dict[str, Session] = {}
        self.groups: dict[tuple[bytes, bytes], ShareGroup] = {}
        self.legacies = Legacies(self)
        self.holding: set[Channel] = set()
        self.router = Router(self._may_receive, 64 << 20)
        self.retained_store = Retained(1, 1)
        self.wheel = Wheel(now)
        self.timers = Timers()
        self.connected = 0
        self.pressure = 0
        """How short memory is; see `press`."""
        self._turns = 0
        self._hushed: list[Channel] = []
        """Connections that are not read because memory is short."""
        self._aging: list[Session] = []
        """Sessions of instances whose messages have a `max_age`."""
        self._claims: dict[str, Channel] = {}
        """Connections that get their session, and CONNACK, when what CONNACK says is on disk."""
        self._unwritten: dict[Subscription, Subscription | None] = {}
        """Subscriptions not on disk yet, and the acknowledged ones they have replaced."""
        self._takeovers: dict[str, tuple[int, int]] = {}
        self._orphans: set[str] = set()
        """Instances removed from the configuration whose queues are still here."""
        self._half_closed: deque[tuple[float, Any]] = deque()
        self._lingering: deque[tuple[float, Any]] = deque()
        """Closed links that still had something to send, and when they are cut."""
        self._next_sweep = now + 60.0
        self._next_look = now + 1.0
        self.core.withholds = self._withholds
        self.on_connected: Callable[[Channel], None] | None = None
        self.on_disconnected: Callable[[Channel], None] | None = None
        self.observer: Observer | None = None
        self.on_denied: Callable[[Channel], None] | None = None
        """Called for each PUBLISH and each filter that was refused for want of a right; may disconnect the client, or
        `hold_back`."""
        self.configure(limits or Limits())

    def configure(self, limits: Limits) -> None:
        """Put new limits in force; connections keep what they were told at CONNECT."""
        self.core.limits = limits
        self.core.flusher.limit = max(1 << 20, 4 * limits.max_packet_size)
        self.router.cache_bytes = limits.route_cache_bytes
        self.retained_store.max_messages = limits.max_retained_messages
        self.retained_store.max_bytes = limits.max_retained_bytes
        self.retained_store.limit_clients(limits.max_retained_per_client)

    def _may_publish(self, principal: Any, topic: str, qos: int, retain: bool) -> bool:
        """Whether a packet other than a client's PUBLISH may be published: a will, or what was retained before."""
        if principal.privileged or self.gate.may_publish(principal, topic):
            return True
        return bool(self.gate.publishable(principal, topic) >> (qos << 1 | int(retain)) & 1)

    def _may_receive(self, principal: Any, topic: str) -> int:
        if principal.privileged:
            return 1
        try:
            answer: int = self.gate.may_receive(principal, topic)
        except Exception as error:  # the publisher is not to suffer from it
            self._failed(error, "the right to receive could not be decided; denied")
            return 0
        return answer

    # connections ----------------------------------------------------------------------------------------------

    def open_channel(self, link: Any, listener: ListenerInfo, peer: str, *, accepted_at: float = 0.0) -> Channel:
        """A connection was made. `accepted_at` is the loop's time of accept, from which the deadline counts."""
        channel = Channel(self, self.core, self.router, link, listener, peer, accepted_at or self.core.now)
        self.wheel.put(channel, channel.deadline)
        return channel

    def attach(self, channel: Channel, connect: Any, principal: Any) -> None:
        """Give an authenticated channel its session and answer CONNACK. MQTT 5 section 3.1.4."""
        core = self.core
        limits = core.limits
        props: Properties | None = connect.properties
        v5 = channel.v5
        client_id: str = connect.client_id
        assigned = not client_id
        if assigned:
            client_id = principal.clientid = f"auto-{uuid.uuid4().hex}"  # [MQTT-3.1.3-6]
            principal.clientid = client_id
        if client_id.startswith(RESERVED) and not principal.privileged:
            channel.refuse(0x85)
            return
        session = self.sessions.get(client_id)
        shared = limits.shared_client_ids or principal.privileged
        if session is not None and not shared and session.owner != principal.username:
            self.report("client_id_taken", f"client id {client_id!r} belongs to another user; {channel.peer} refused")
            channel.refuse(0x85)
            return
        will = connect.will
        if will is not None and not self._may_will(channel, principal, will):
            return
        older = self._claims.get(client_id) or (session.channel if session is not None else None)
        if older is not None:
            if not self._may_take_over(client_id):
                channel.refuse(0x9F)
                return
            if client_id in self._claims:
                older._end()  # before CONNACK nothing can be said [MQTT-3.14.0-1]
            else:
                older.disconnect(0x8E)  # [MQTT-3.1.4-3]
            session = self.sessions.get(client_id)
        if session is not None and session.ends_at and session.ends_at <= core.now:
            self.end_session(session)
            session = None
        anew = False
        """Something on disk must be gone before the client hears that its session is new."""
        if session is not None and connect.clean_start and session.spec is None:  # [MQTT-3.1.2-4]
            anew = session.spool is not None
            self.end_session(session)
            session = None
        present = session is not None
        if session is not None and connect.clean_start and not session.durable:
            session.begin_anew()
            present = False
            anew = True
        if session is None:
            session = Session(client_id, core)
            session.owner = principal.username
            self.sessions[client_id] = session
        self._cancel(session)
        if v5:
            wanted = props.session_expiry_interval if props is not None else None
            expiry = float(wanted or 0)
        else:
            wanted = None
            expiry = 0.0 if connect.clean_start else limits.session_expiry
        if session.spec is not None:
            expiry = float(NEVER)
        elif expiry > limits.session_expiry and not principal.privileged:
            expiry = limits.session_expiry
        journal = core.journal
        if journal is not None and expiry > 0 and not present and session.spool is None and journal.refusing:
            del self.sessions[client_id]
            channel.refuse(0x97)
            return
        session.expiry = expiry
        session.persistent = expiry > 0
        session.ends_at = 0.0
        keep_alive = connect.keep_alive
        server_keep_alive = None
        longest = 65535 if principal.privileged else limits.max_keepalive
        if longest < 65535 and (keep_alive == 0 or keep_alive > longest):
            server_keep_alive = keep_alive = int(longest)  # [MQTT-3.2.2-21]
        channel.keep_alive = keep_alive * 1.5  # [MQTT-3.1.2-22]
        session.window = 65535 if principal.privileged else limits.max_inflight
        session.max_packet = 268_435_460
        alias_out = 0
        if props is not None:
            if props.receive_maximum is not None:
                session.window = props.receive_maximum  # [MQTT-3.3.4-9]
            if props.maximum_packet_size is not None:
                session.max_packet = props.maximum_packet_size
            if props.topic_alias_maximum is not None:
                alias_out = min(props.topic_alias_maximum, limits.topic_alias_maximum)
        session.alias_maximum = alias_out
        session.principal = principal
        if session.spec is None:  # an instance's session has its own since it was made: `isthmus/x/dlq` is not x
            session.origin = principal.origin
        session.special = alias_out > 0 or principal.privileged
        if present:
            session.rights = None
            for subscription in session.subscriptions or ():
                self.router.touch(subscription.filter)
            self._check_subscriptions(session)
        channel.principal = principal
        channel.receive_maximum = limits.receive_maximum if not principal.privileged else 65535
        channel.alias_maximum = limits.topic_alias_maximum if v5 else 0
        channel.session = session
        if will is not None:
            channel._make_origin()
            expires = 0.0
            forward = b""
            if will.properties is not None:
                forward = will.properties.forward
                session.will_delay = float(will.properties.will_delay_interval or 0)
                if will.properties.message_expiry_interval is not None:
                    expires = float(will.properties.message_expiry_interval) or -1.0  # 0.0 would be for ever
            session.will = Message(will.topic, will.payload, will.qos, will.retain, forward, expires, channel.origin)
            if journal is not None and (session.persistent or session.spool is not None):
                session.will_terms = self._will_terms(session)
        channel.state = LIVE
        self.connected += 1
        if self.observer is not None and not present:
            self.observer.session_created(channel)
        if keep_alive:
            self.wheel.put(channel, core.now + channel.keep_alive)
        else:
            self.wheel.remove(channel)
        answer = self._connack_properties(
            channel, connect, client_id if assigned else None, wanted, expiry, server_keep_alive
        )
        connack = packets.encode_connack(channel.version, present, 0, answer)
        if journal is not None and session.persistent:
            self._survive(session, journal, anew)
            anew = anew or (present and session.spool is not None and session.spool.segment == 0)
        if journal is not None and (anew or (not present and client_id in journal.ending)):
            self._claims[client_id] = channel
            session.claimed = True
            journal.after(lambda written: self._welcome_later(channel, session, connack, written))
            return
        if session.spool is not None and not session.persistent:  # it ends with its connection, a crash included
            self._note_life(session, True)
        self._welcome(channel, session, connack)

    def _survive(self, session: Session, journal: Journal, anew: bool) -> None:
        """A client with a persistent session has connected: the journal learns of it."""
        session.stored = True
        session.durable = session.durable or (session.spec is None and self.core.limits.queue_overflow == "reject")
        if session.spool is None:
            session.spool = journal.open(session)
        elif anew:
            session.spool.marks = session.spool.marking = None
            journal.snapshot(session.spool)
        else:
            self._note_life(session, True)

    def _welcome(self, channel: Channel, session: Session, connack: bytes) -> None:
        """CONNACK, and what waits for the client."""
        session.attach(channel, channel.v5)
        if len(connack) > session.max_packet:  # [MQTT-3.1.2-24]
            self.report(
                "packet_limit",
                f"client {session.client_id!r} from {channel.peer} takes packets of {session.max_packet} bytes only",
            )
            channel._abort("packet_limit")
            return
        channel.push(connack)  # [MQTT-3.2.2-2]
        session.resume()
        if self.on_connected is not None:
            self.on_connected(channel)
        if self.observer is not None:
            self.observer.connected(channel)

    def _welcome_later(self, channel: Channel, session: Session, connack: bytes, written: bool) -> None:
        """As `_welcome`, after what CONNACK says is on disk; meanwhile the client may have gone or come again."""
        if self._claims.get(session.client_id) is not channel:
            return
        if not written:
            channel._end()
            return
        del self._claims[session.client_id]
        session.claimed = False
        self._welcome(channel, session, connack)
        channel.resume_parse()

    def _connack_properties(
        self,
        channel: Channel,
        connect: Any,
        assigned: str | None,
        wanted: int | None,
        expiry: float,
        keep_alive: int | None,
    ) -> Properties | None:
        if not channel.v5:
            return None
        limits = self.core.limits
        answer = Properties()
        answer.receive_maximum = channel.receive_maximum if channel.receive_maximum != 65535 else None
        answer.maximum_packet_size = channel.max_packet
        answer.topic_alias_maximum = limits.topic_alias_maximum or None
        answer.assigned_client_identifier = assigned
        if wanted is not None and float(wanted) != expiry:
            answer.session_expiry_interval = int(min(expiry, NEVER))
        answer.server_keep_alive = keep_alive
        return answer

    def _may_take_over(self, client_id: str) -> bool:
        second = int(self.core.now)
        at, count = self._takeovers.get(client_id, (second, 0))
        count = count + 1 if at == second else 1
        self._takeovers[client_id] = (second, count)
        if count > self.core.limits.takeover_rate > 0:
            self.core.count("takeover_refused")
            return False
        return True

    def _may_will(self, channel: Channel, principal: Any, will: Any) -> bool:
        if will.topic[0] == 36 and not principal.privileged:
            channel.refuse(0x87)
            return False
        if not self._may_publish(principal, will.topic.decode(), will.qos, will.retain):
            self.core.drop("unauthorized")
            channel.refuse(0x87)
            return False
        return True

    def closed(self, channel: Channel, state: int, why: int | str = "") -> None:
        """A channel ended: detach its session, publish or schedule the will, start the session's expiry."""
        self.core.now = self.clock()
        self.holding.discard(channel)
        self.core.stalled.discard(channel)
        self.wheel.remove(channel)
        if state == AUTHENTICATING:
            self.gate.cancel(channel)
        session = channel.session
        if session is not None and self._claims.get(session.client_id) is channel:  # its session has learnt all of it
            del self._claims[session.client_id]
            session.claimed = False
            session.attach(channel, channel.v5)
        if session is None or session.channel is not channel:
            return
        self.connected -= 1
        session.detach()
        if self.observer is not None:
            self.observer.disconnected(channel, why)
        if channel.graceful:
            session.will = None  # [MQTT-3.14.4-3]
        journal = self.core.journal
        # while nothing can be stored once more, what is on disk stays where it is
        stays = session.spool is not None and session.persistent and journal.refusing
        if not stays:
            self._pass_on(session, session.take_shared())
        if session.will is not None:
            delay = min(session.will_delay, session.expiry) if session.persistent else 0.0
            if delay > 0:
                self._timer(session, "will", self.core.now + delay, lambda: self._will_is_due(session))
            else:
                self.publish_will(session)
        if not session.persistent:
            self.end_session(session)
        else:
            self.start_expiry(session)
            if session.will is not None and session.spool is not None and session.will.origin.principal is not None:
                session.will_terms = self._will_terms(session)  # it may have been revoked
            self._note_life(session, False)
        if self.on_disconnected is not None:
            self.on_disconnected(channel)

    def _pass_on(self, session: Session, entries: list[Any]) -> None:
        """Other members of a group get what this one has not acknowledged."""
        for entry in entries:
            entry[5].again(entry[0], entry[4])
            if entry[7] is not None:
                self.core.journal.hurry(entry[0])
                session.moved(entry)

    def _note_life(self, session: Session, connected: bool) -> None:
        """The journal learns what has become of the session's connection, expiry and will."""
        journal = self.core.journal
        if session.spool is not None:
            journal.note(records.encode_json(records.LIFE, session.spool.number, session.life(journal, connected)))

    def half_close(self, link: Any) -> bool:
        """Close our half of the connection now and the rest after a moment; False when the link cannot do that."""
        can = getattr(link, "can_write_eof", None)
        if can is None or not can():
            return False
        try:
            link.write_eof()
        except (OSError, RuntimeError):  # the peer was faster
            return False
        self._half_closed.append((self.core.now + LAST_WORD, link))
        return True

    def close(self, link: Any) -> None:
        """Close a connection; one that cannot send what is left, because the peer does not read, is cut in a while."""
        link.close()
        if link.get_write_buffer_size() > 0:
            self._lingering.append((self.core.now + LINGER, link))

    def links(self) -> list[Any]:
        """Every link that may still be open: of sessions, before login, and closed with something left to send."""
        channels = [s.channel for s in self.sessions.values() if s.channel is not None]
        channels.extend(self._claims.values())
        channels.extend(self.wheel.channels())
        links = [channel.link for channel in channels if channel.link is not None]
        return links + [link for _, link in (*self._half_closed, *self._lingering)]

    def _timer(self, session: Session, name: str, when: float, action: Callable[[], None]) -> None:
        if session.timers is None:
            session.timers = {}
        old = session.timers.get(name)
        if old is not None:
            old.cancel()
        session.timers[name] = self.timers.at(when, action)

    def _cancel(self, session: Session) -> None:
        for timer in (session.timers or {}).values():
            timer.cancel()
        session.timers = None
        session.will = session.will_terms = None
        session.will_delay = 0.0

    def set_expiry(self, session: Session, seconds: int) -> None:
        """DISCONNECT changed the session's expiry; those of instances live as long as they are configured."""
        if session.spec is not None:
            return
        session.expiry = min(float(seconds), self.core.limits.session_expiry)
        session.persistent = session.expiry > 0

    def publish_will(self, session: Session) -> None:
        """Publish the session's will if its user still may. [MQTT-3.1.2-8]"""
        will = session.will
        session.will = None
        if will is None:
            return
        if will.expires:
            will.expires += self.core.now
        try:
            if self._may_publish_will(session, will):
                self.publish(will, session)
            else:
                self.core.drop("unauthorized")
                self.report("will_withheld", f"client {session.client_id!r} has no right to its will; not published")
        except Exception as error:
            self._failed(error, f"the will of client {session.client_id!r} could not be published")

    def _may_publish_will(self, session: Session, will: Message) -> bool:
        origin = will.origin
        topic = will.topic.decode()
        if origin is not None and origin.principal is not None:
            return self._may_publish(origin.principal, topic, will.qos, will.retain)
        if origin is None or session.will_terms is None:  # its owner connected before a restart
            return False
        who = (origin.client_id, origin.username, origin.peerhost)
        return bool(self.gate.may_publish_will(*who, session.will_terms, topic, will.qos, will.retain))

    def _will_terms(self, session: Session) -> dict[str, Any] | None:
        """What a restart needs to judge the will; None when it may not be published as things are."""
        will = session.will
        who = will.origin.principal
        if not self._may_publish(who, will.topic.decode(), will.qos, will.retain):
            return None
        terms: dict[str, Any] = self.gate.will_terms(who, will.topic.decode(), will.qos, will.retain)
        return terms

    def _will_is_due(self, session: Session) -> None:
        self.publish_will(session)
        self._note_life(session, False)  # a restart is not to publish it again

    def end_session(self, session: Session, gives: bool = True) -> None:
        """Forget a session with everything it holds; a will still waiting is published now. [MQTT-3.1.2-23] `gives`:
        other members of its `$share` groups get what it has not acknowledged."""
        if self.sessions.get(session.client_id) is not session:
            return
        del self.sessions[session.client_id]
        claim = self._claims.pop(session.client_id, None)
        if claim is not None:
            self.connected -= 1
            claim._end()
        will = session.will
        for timer in (session.timers or {}).values():
            timer.cancel()
        session.timers = None
        groups = [s.group for s in session.subscriptions or () if isinstance(s.group, ShareGroup)]
        for subscription in session.subscriptions or ():
            self._drop_subscription(subscription)
        session.subscriptions = None
        leaves = gives and (session.left_share or any(group.members for group in groups))
        if leaves:
            self._pass_on(session, session.take_shared(over=True))
        for entry in session.queue or ():
            if entry[4] is not None and entry[7] is None:
                entry[4].release()
        if session.inflight is not None:
            for entry in session.inflight.entries():
                if entry[4] is not None and entry[4][0] is not None:
                    entry[4][0].release()
        if session.spool is not None:
            self._forget_spool(session, session.spool, leaves)
        session.queue = None
        session.queue_bytes = 0
        session.inflight = None
        session.resend = None
        session.rights = None
        if session.blocked is not None:
            session.unblock()
        if will is not None:
            self.publish_will(session)
        if self.observer is not None:
            self.observer.session_terminated(session)

    def _forget_spool(self, session: Session, spool: Spool, leaves: bool) -> None:
        """Its messages are given up, but for those on disk of a session that `leaves` some to others."""
        if leaves:
            spool.fold()
        on_disk, spool.backlog = (spool.backlog, None) if leaves and spool.backlog else (None, spool.backlog)
        spool.forget_all()
        inflight = session.inflight
        if inflight is not None:
            # all numbers before the first is done: they are counted from the floor, which moves then
            kept = [(session._seq_of(entry[0]), inflight.stored_of(entry[0])) for entry in inflight.entries()]
            for seq, pending in kept:
                if pending is not None:
                    spool.finish(seq, pending, None)
        if on_disk is not None:
            spool.backlog = on_disk
            spool.floor = spool.sent = on_disk.first()[0]
            self.core.journal.leave(spool)
            self.legacies.add(session)
            return
        session.spool = None
        session.stored = False
        self.core.journal.end(spool)

    # publishing -----------------------------------------------------------------------------------------------

    def publish(self, message: Message, publisher: Any = None) -> int:
        """Route a message of the broker itself (a will, $SYS, a REST call). Returns the number of receivers."""
        entry = self.router.entry(message.topic)
        route = entry.route or self.router.fill(entry)
        if message.expires and message.expires <= self.core.now:
            return 0
        if message.retain:
            self.retain(message, None)
        if route.guarded and self.router.room(route, message) != DONE:
            self.core.drop("queue_full")
            return 0
        return self.router.publish(route, message, publisher, None)

    def retain(self, message: Message, hold: Hold | None) -> bool:
        """Store or clear (empty payload) the retained message of a topic; False when a limit forbids it. `hold` waits
        until that survives a restart."""
        journal = self.core.journal
        old = self.retained_store.get(message.topic) if journal is not None else None
        if not message.payload:
            self.retained_store.clear(message.topic)  # [MQTT-3.3.1-6]
            if old is not None:
                journal.unretain(old, hold)
            elif hold is not None and journal is not None and not journal.idle:  # a clear may be on its way to disk
                journal.wait(hold)
            return True
        if self.retained_store.over_quota(message):
            self.core.drop("retained_quota")
            self.report(
                "retained_quota", f"client {message.origin.client_id!r} has as many retained messages as one may have"
            )
            return False
        if self.retained_store.store(message):  # [MQTT-3.3.1-5]
            if journal is not None:
                journal.retain(message, old, hold)
            return True
        self.core.drop("retained_full")
        return False

    def wait_for_room(self, channel: Channel, route: Route, message: Message) -> None:
        """A publisher into a queue with `overflow = "block"`: its channel goes on when the queue has room."""
        for target in route.targets:
            receiver = target.receiver
            if receiver.durable and receiver.refuses(message.size) != DONE and isinstance(receiver, Session):
                if receiver.blocked is None:
                    receiver.blocked = []
                receiver.blocked.append(channel)
                return
        for group in route.groups:
            if group.durable and group.refuses(message) != DONE:
                lane = group.pick(message).receiver
                if lane.blocked is None:
                    lane.blocked = []
                lane.blocked.append(channel)
                return
        channel.core.flusher.call_soon(channel.resume_parse)

    # subscriptions --------------------------------------------------------------------------------------------

    def subscribe(self, channel: Channel, session: Session, packet: Any) -> tuple[list[int], list[Any]]:
        """Handle SUBSCRIBE: the codes for SUBACK and the retained messages to send after it."""
        props: Properties | None = packet.properties
        ident = props.subscription_identifiers[0] if props is not None and props.subscription_identifiers else 0
        codes: list[int] = []
        retained: list[Any] = []
        older = {f: self._find(session, f) for f, _ in packet.filters} if session.spool is not None else {}
        for filter, options in packet.filters:
            code, sent = self._subscribe_one(channel, session, filter, options, ident)
            if channel.state == CLOSED:  # for what was denied; there is no SUBACK to wait for the disk
                older = {}
                break
            codes.append(code)
            retained.extend(sent)
        for filter, before in older.items():
            made = self._find(session, filter)
            if made is not None and made is not before:
                self._unwritten[made] = before
        if self.observer is not None:
            self.observer.subscribed(session, packet.filters[: len(codes)], codes)
        return codes, retained

    def _settle_subscriptions(self, session: Session, made: list[tuple[bytes, Subscription]], written: bool) -> None:
        """New subscriptions are on disk, or never will be: then the acknowledged ones they replaced count again."""
        for filter, new in made:
            if new not in self._unwritten:
                continue
            older = self._unwritten.pop(new)
            if written:
                continue
            for later, before in self._unwritten.items():
                if before is new:
                    self._unwritten[later] = older
            if self.sessions.get(session.client_id) is not session or self._find(session, filter) is not new:
                continue
            if older is None:
                self.unsubscribe(session, [filter])
                continue
            self._drop_subscription(new)
            if session.subscriptions is not None:
                session.subscriptions.remove(new)
            self.restore_subscription(session, filter, older.qos, older.no_local, older.rap, older.ident)
            self._note_subscription(session, filter, older)

    def _note_subscription(self, session: Session, filter: bytes, made: Subscription) -> None:
        if session.spool is not None:
            fields = {"sub": [filter.decode(), made.qos, bool(made.no_local), bool(made.rap), made.ident]}
            self.core.journal.note(records.encode_json(records.SUBSCRIBED, session.spool.number, fields))

    def _subscribe_one(
        self, channel: Channel, session: Session, filter: bytes, options: int, ident: int
    ) -> tuple[int, list[Any]]:
        limits = self.core.limits
        v5 = channel.v5
        qos = options & 3
        no_local = bool(options & 4)
        rap = bool(options & 8)
        handling = options >> 4 & 3
        if channel.bridge:  # the bit of a private bridge stands for what MQTT 5 has options for
            rap = True
            no_local = not filter.startswith(b"$share/")
            handling = 1
        key: tuple[bytes, bytes] | None = None
        target = filter
        if filter.startswith(b"$share/") or filter == b"$share":
            parts = topics.split_share(filter)
            if parts is None:
                return (0x8F if v5 else 0x80), []
            if no_local:
                raise ProtocolError(0x82, "No Local on a shared subscription")  # [MQTT-3.8.3-4]
            key = parts
            target = parts[1]
        if not topics.valid_filter(target):
            if not v5:
                raise ProtocolError(0x81, "a topic filter is not valid")
            return 0x8F, []
        if topics.levels(target) > limits.max_topic_levels or len(target) > limits.max_topic_length:
            return (0x8F if v5 else 0x80), []
        if not channel.principal.privileged and not self.gate.may_subscribe(channel.principal, target.decode(), qos):
            self.core.count("subscribe_denied")
            if self.on_denied is not None:
                self.on_denied(channel)
            return (0x87 if v5 else 0x80), []
        if session.spool is not None and self.core.journal.refusing:
            return (0x97 if v5 else 0x80), []
        old = self._find(session, filter)
        if old is None and len(session.subscriptions or ()) >= limits.max_subscriptions and session.spec is None:
            return (0x97 if v5 else 0x80), []
        if old is not None:
            self._drop_subscription(old)  # [MQTT-3.8.4-3]
            if session.subscriptions is not None:
                session.subscriptions.remove(old)
        made = self._add_subscription(session, target, key, qos, no_local, rap, ident)
        self._note_subscription(session, filter, made)
        if key is not None:
            return qos, []
        if handling == 2 or (handling == 1 and old is not None):  # [MQTT-3.3.1-10] [MQTT-3.3.1-11]
            return qos, []
        return qos, self._retained_for(session, target, qos, (ident,) if ident else None)

    def _add_subscription(
        self,
        session: Session,
        filter: bytes,
        key: tuple[bytes, bytes] | None,
        qos: int,
        no_local: bool,
        rap: bool,
        ident: int,
    ) -> Subscription:
        """Make a subscription effective; `key` is (group, filter) of a shared one."""
        group: ShareGroup | None = None
        if key is not None:
            group = self.groups.get(key)
            if group is None:
                group = self.groups[key] = ShareGroup(
                    key[0], key[1], self.core.limits.shared_strategy, self._may_receive
                )
                group.entry = Subscription(session, filter, 0, False, False, 0, group)
                self.router.add(group.entry)
        subscription = Subscription(session, filter, qos, no_local, rap, ident, group)
        if session.subscriptions is None:
            session.subscriptions = [subscription]
        else:
            session.subscriptions.append(subscription)
        if group is None:
            self.router.add(subscription)
        else:
            group.join(subscription)
            self.router.touch(filter)
        return subscription

    def restore_subscription(
        self, session: Session, filter: bytes, qos: int, no_local: bool, rap: bool, ident: int
    ) -> None:
        """Give an imported session back a subscription as `filter_of` names it."""
        key = topics.split_share(filter) if filter.startswith(b"$share/") else None
        self._add_subscription(session, key[1] if key is not None else filter, key, qos, no_local, rap, ident)

    def remember_subscription(self, session: Session, filter: bytes, qos: int, rap: bool) -> None:
        """A subscription an instance had before a restart: known, and effective once its configuration is applied."""
        if session.subscriptions is None:
            session.subscriptions = []
        session.subscriptions.append(Subscription(session, filter, qos, False, rap, 0))

    def continue_session(self, session: Session, will: tuple[Message, float, float] | None) -> None:
        """After a restart: the session's expiry and its will go on. `will` is (message, delay, when it is due or 0)."""
        now = self.core.now
        if session.ends_at:
            ends = session.ends_at
            self._timer(session, "expiry", ends, lambda: self.end_session(session))
        if will is None:
            return
        session.will, delay, due = will
        if due == 0:  # its client was connected when the broker ended
            due = now + (min(delay, session.expiry) if session.persistent else 0.0)
        self._timer(session, "will", due, lambda: self._will_is_due(session))

    def start_expiry(self, session: Session) -> None:
        """A session without a connection lives for its expiry from now on."""
        if session.expiry < NEVER and session.spec is None:
            session.ends_at = self.core.now + session.expiry
            self._timer(session, "expiry", session.ends_at, lambda: self.end_session(session))

    def _retained_for(self, session: Session, filter: bytes, qos: int, idents: Any) -> list[Any]:
        found: list[Any] = []
        if not self.retained_store.count:
            return found
        principal = session.principal
        check_source = self.core.limits.check_retain_source
        for message in self.retained_store.matching(filter, self.core.now):
            if session.origin is not None and message.origin is not None and message.origin.instance == session.origin:
                continue
            name = message.topic.decode()
            if principal is not None and not self._may_receive(principal, name):
                continue
            source = message.origin.principal if check_source and message.origin is not None else None
            if source is not None and not self._may_publish(source, name, message.qos, True):
                continue
            found.append((message, min(message.qos, qos), idents))
        return found

    def _find(self, session: Session, filter: bytes) -> Subscription | None:
        for subscription in session.subscriptions or ():
            if filter_of(subscription) == filter:
                return subscription
        return None

    def _drop_subscription(self, subscription: Subscription) -> None:
        group = subscription.group
        if group is None:
            self.router.remove(subscription)
            return
        if not isinstance(group, ShareGroup):
            return
        group.leave(subscription.receiver)
        self.router.touch(subscription.filter)
        if not group.members:
            self.groups.pop((group.name, group.filter), None)
            if group.entry is not None:
                self.router.remove(group.entry)
                group.entry = None  # or the two keep each other, and the session that founded the group

    def unsubscribe(self, session: Session, filters: Sequence[bytes]) -> list[int]:
        """Handle UNSUBSCRIBE: one code per filter. What is in flight finishes, what only queues is dropped."""
        codes = []
        changed = False
        stays: list[bytes] = []
        for filter in filters:
            found = self._find(session, filter)
            if found is None or session.subscriptions is None:
                codes.append(0x11)
                continue
            session.subscriptions.remove(found)
            group = found.group
            self._drop_subscription(found)
            if session.spool is not None:
                self.core.journal.note(records.encode_session(records.UNSUBSCRIBED, session.spool.number, filter))
            codes.append(0)
            changed = True
            if isinstance(group, ShareGroup):
                session.left_share = True
            if isinstance(group, ShareGroup) and group.members:
                if session.spool is not None and self.core.journal.refusing:  # where it is it is safe
                    stays.append(found.filter)
                else:
                    self._pass_on(session, session.take_queued(group))
        if not session.subscriptions:
            session.subscriptions = None
        if changed:
            kept = stays + [s.filter for s in session.subscriptions or ()]
            session.purge(lambda topic: any(topics.matches(f, topic) for f in kept), "unsubscribed")
        if changed and self.observer is not None:
            self.observer.unsubscribed(session, [f for f, code in zip(filters, codes, strict=True) if not code])
        return codes

    def when_subscribed(
        self, channel: Channel, session: Session, subscribe: Any, codes: list[int], retained: list[Any]
    ) -> None:
        """Answer SUBSCRIBE once the subscriptions are on disk."""
        made = []
        for filter in {filter for (filter, _), code in zip(subscribe.filters, codes, strict=True) if code < 0x80}:
            found = self._find(session, filter)
            if found is not None:
                made.append((filter, found))

        def answer(written: bool) -> None:
            granted = codes
            self._settle_subscriptions(session, made, written)
            if not written:
                granted = [0x97 if channel.v5 else 0x80] * len(codes)
            if channel.state == LIVE:
                channel.subscribed(session, subscribe.packet_id, granted, retained if written else [])

        self.core.journal.after(answer)

    def when_unsubscribed(self, channel: Channel, packet_id: int, codes: list[int]) -> None:
        """Answer UNSUBSCRIBE once it is on disk."""

        def answer(written: bool) -> None:
            if not written and not channel.v5:  # its UNSUBACK can only say yes
                channel._end()
                return
            said = codes if written else [0x83] * len(codes)
            channel.push_live(packets.encode_unsuback(packet_id, channel.version, said))  # [MQTT-3.10.4-4]

        self.core.journal.after(answer)

    # rights ---------------------------------------------------------------------------------------------------

    def rights_changed(self, client_id: str | None = None) -> None:
        """Forget cached rights of one session (None: of all) and end subscriptions that are no longer allowed."""
        if client_id is None:
            sessions = list(self.sessions.values())
            self.router.forget_all()
        else:
            session = self.sessions.get(client_id)
            sessions = [session] if session is not None else []
            for session in sessions:
                self.router.forget(session)
        for session in sessions:
            session.rights = None
            if session.channel is not None:
                session.channel.memo_entry = None
            self._check_subscriptions(session)
            self._check_will(session)

    def _check_will(self, session: Session) -> None:
        """The journal is to know whether the owner of a will may publish it: a crash may come next."""
        will = session.will
        if will is None or session.spool is None or will.origin.principal is None:
            return
        terms = self._will_terms(session)
        if terms != session.will_terms:
            session.will_terms = terms
            self._note_life(session, session.channel is not None or bool(session.claimed))

    def _check_subscriptions(self, session: Session) -> None:
        """End the subscriptions and withhold the queued messages that the session's principal has no right to."""
        principal = session.principal
        if principal is None or principal.privileged:
            return
        for subscription in list(session.subscriptions or ()):
            wanted = subscription.filter.decode()
            if not self.gate.may_subscribe(principal, wanted, subscription.qos) and session.subscriptions:
                filter = filter_of(subscription)
                session.subscriptions.remove(subscription)
                self._drop_subscription(subscription)
                if session.spool is not None:
                    self.core.journal.note(records.encode_session(records.UNSUBSCRIBED, session.spool.number, filter))
                self.core.count("subscription_revoked")
                if self.observer is not None:
                    self.observer.unsubscribed(session, [filter])
        session.purge(lambda topic: self._may_receive(principal, topic.decode()))

    def clients(self) -> list[Channel]:
        """The connections of devices: every one that was accepted and is not a worker's."""
        found = [s.channel for s in self.sessions.values() if s.channel is not None]
        found.extend(self._claims.values())
        return [c for c in found if not c.listener.privileged]

    def kick(self, client_id: str, code: int = 0x98) -> bool:
        """Close a client's connection; False when it has none."""
        session = self.sessions.get(client_id)
        channel = self._claims.get(client_id) or (session.channel if session is not None else None)
        if channel is None:
            return False
        channel.disconnect(code)
        return True

    def awaits_welcome(self, channel: Channel) -> bool:
        """Whether its CONNACK waits for the disk."""
        return self._claims.get(channel.client_id) is channel

    def hold_back(self, channel: Channel, seconds: float) -> None:
        """Handle nothing more of what this client sends for a while."""
        if channel.state == LIVE:
            channel.suspended = True
            channel.held_until = self.core.now + seconds
            self.timers.at(channel.held_until, channel.resume_parse)

    # time -----------------------------------------------------------------------------------------------------

    def tick(self, now: float, wall_ms: int) -> None:
        """Advance the clock: keep-alives, deadlines, delayed wills, expiries. Called about four times a second."""
        core = self.core
        core.set_clock(now, wall_ms)
        for channel in self.wheel.due(now):
            try:
                self._look_at(channel, now)
            except Exception as error:
                self._failed(error)
        while self._half_closed and self._half_closed[0][0] <= now:
            self.close(self._half_closed.popleft()[1])
        while self._lingering and self._lingering[0][0] <= now:
            self._lingering.popleft()[1].abort()
        too_much = 2 * core.flusher.limit
        for channel in list(core.stalled):
            # what a transport sends by itself, such as answers to TLS key updates, no outbox counts
            if channel.deadline <= now or channel.link.get_write_buffer_size() > too_much:
                core.count("stalled")
                self.report("stalled", f"client {channel.client_id!r} from {channel.peer} reads nothing; closed")
                channel.disconnect(0x83)
        for channel in list(self.holding):
            try:
                self._look_at_held(channel, now)
            except Exception as error:
                self._failed(error)
        self.timers.run(now, self._failed)
        if core.journal is not None:
            core.journal.pace.look(now)
            try:
                self.legacies.go_on()
            except Exception as error:
                self._failed(error, "what ended sessions left on disk cannot be given to others until a restart")
        if now >= self._next_look:
            self._next_look = now + 1.0
            for session in self._aging:
                self._drop_aged(session)
        if now >= self._next_sweep:
            self._next_sweep = now + 60.0
            self.retained_store.expire(now)
            second = int(now)
            self._takeovers = {k: v for k, v in self._takeovers.items() if v[0] >= second - 1}

    def press(self, level: int) -> None:
        """Called some twenty times a second while memory is short. 1: clients that publish are read a quarter of the
        time; 2: a sixteenth of it, and new clients are refused with 0x89. Subscribers are read always: they free
        memory."""
        self.pressure = level
        self._turns += 1
        if level and self._turns % (4 if level == 1 else 16):
            for channel in self.clients():
                if channel.origin is not None and not channel.paused:
                    channel.paused = True
                    channel.link.pause_reading()
                    self._hushed.append(channel)
            return
        hushed, self._hushed = self._hushed, []
        for channel in hushed:
            if channel.state == LIVE and channel.paused and not channel.suspended and not channel.congested:
                channel.paused = False
                channel.link.resume_reading()

    def _drop_aged(self, session: Session) -> None:
        """Give up what has queued for an instance longer than its `max_age`."""
        oldest = self.core.clock() - session.spec.max_age * 1000
        while session.waiting and 0 < session.oldest_queued_ms() < oldest and session.drop_oldest("too_old"):
            pass

    def _withholds(self, session: Session, message: Message) -> str:
        """Why a device does not get a message that waited on disk: its rights or subscriptions have changed."""
        principal = session.principal
        if session.spec is not None or principal is None or principal.privileged:
            return ""
        if not self._may_receive(principal, message.topic.decode()):
            return "unauthorized"
        for subscription in session.subscriptions or ():
            if topics.matches(subscription.filter, message.topic):
                return ""
        return "unsubscribed"

    def use_journal(self, journal: Journal) -> None:
        """From now on sessions and retained messages survive a restart."""
        self.core.journal = journal
        journal.retained = self.retained_store
        journal.heirs = self.legacies.give
        self.retained_store.removed = journal.retained_expired

    def _failed(self, error: Exception, text: str = "a timer of the engine failed; the others go on") -> None:
        log.error("%s", text, exc_info=error)
        self.core.count("internal_error")

    def _look_at(self, channel: Channel, now: float) -> None:
        if channel.state != LIVE:
            if now >= channel.deadline:
                self.core.count("connect_timeout")
                channel.refuse_late()
            else:
                self.wheel.put(channel, channel.deadline)
            return
        if channel.suspended or channel.paused:
            channel.last_read = now
        due = channel.last_read + channel.keep_alive
        if now >= due:
            self.core.count("keep_alive_timeout")
            channel.disconnect(0x8D)  # [MQTT-3.1.2-22]
        else:
            self.wheel.put(channel, due)

    def _look_at_held(self, channel: Channel, now: float) -> None:
        held = channel.held
        while held:
            _, hold, since = held[0]
            if hold is None or hold.owner is None or since + self.core.limits.ack_timeout > now:
                return
            self.core.count("ack_timeout")
            hold.fail(0x83)
            held = channel.held

    # instances ------------------------------------------------------------------------------------------------

    def ensure_instance(
        self, name: str, spec: Any, order_key: Callable[[Message], str] | None = None, dead_letters: Any = None
    ) -> None:
        """Create or change the durable sessions of a sink or bridge: before anything can be published to them.

        `dead_letters` is the spec of the session that keeps `$dlq/<name>`, for sinks.
        """
        principal = InternalPrincipal(f"{RESERVED}{name}", f"{RESERVED}{name}", name)
        known = f"{RESERVED}{name}/0" in self.sessions
        lanes = [self._ensure_session(f"{RESERVED}{name}/{n}", spec, principal, True) for n in range(spec.lanes)]
        before = {subscription.filter for session in lanes for subscription in session.subscriptions or ()}
        self._orphans.discard(name)
        self._ensure_session(f"{RESERVED}{name}/in", spec, principal, False)
        wanted = {f.encode(): qos for f, qos in spec.filters}
        for session in lanes:
            for subscription in list(session.subscriptions or ()):
                self._remove_lane_subscription(session, subscription)
        n = spec.lanes
        while f"{RESERVED}{name}/{n}" in self.sessions:
            extra = self.sessions[f"{RESERVED}{name}/{n}"]
            for subscription in list(extra.subscriptions or ()):
                self._remove_lane_subscription(extra, subscription)
            extra.spec = spec
            n += 1
        for filter, qos in wanted.items():
            members = [Subscription(s, filter, qos, False, spec.retain_as_published, 0) for s in lanes]
            group: Lanes | None = None
            if spec.lanes > 1 and order_key is not None:
                group = Lanes(members, order_key, self._may_receive)
                for member in members:
                    member.group = group
                self.router.add(members[0])
            else:
                self.router.add(members[0])
            for session, member in zip(lanes, members, strict=True):
                if session.subscriptions is None:
                    session.subscriptions = []
                session.subscriptions.append(member)
            if (spec.retained == "always" and filter not in before) or (spec.retained == "new" and not known):
                for message, level, idents in self._retained_for(lanes[0], filter, qos, None):
                    lane: Any = lanes[0] if group is None else group.pick(message).receiver
                    level = max(level, 1) if spec.upgrade_qos and qos else level
                    lane.offer(message, level, True, idents, None, None)
        if dead_letters is not None:
            keeper = InternalPrincipal(f"{RESERVED}{name}/dlq", f"{RESERVED}{name}", f"{name}/dlq")
            session = self._ensure_session(f"{RESERVED}{name}/dlq", dead_letters, keeper, True)
            if not session.subscriptions:
                subscription = Subscription(session, b"$dlq/" + name.encode(), 1, False, True, 0)
                session.subscriptions = [subscription]
                self.router.add(subscription)
        self.router.forget_all()
        if self.core.journal is not None:
            for session in self.instance_sessions(name):
                if session.spool is not None:
                    self.core.journal.snapshot(session.spool)
        self._aging = [s for s in self._aging if s not in lanes]
        if spec.max_age:
            self._aging.extend(lanes)
        for session in lanes:
            if session.blocked is not None:
                session.unblock()  # the limits or what they do may have changed

    def _remove_lane_subscription(self, session: Session, subscription: Subscription) -> None:
        if session.subscriptions is not None:
            session.subscriptions.remove(subscription)
        self.router.remove(subscription)
        subscription.group = None  # the lanes and their subscriptions keep each other

    def _ensure_session(self, client_id: str, spec: Any, principal: Any, durable: bool) -> Session:
        session = self.sessions.get(client_id)
        if session is None:
            session = Session(client_id, self.core)
            self.sessions[client_id] = session
            session.window = 65535
        session.spec = spec
        session.owner = principal.username
        session.principal = principal
        session.origin = principal.origin
        session.persistent = True
        session.special = True
        session.durable = durable
        session.expiry = float(NEVER)
        if self.core.journal is not None and session.spool is None:
            session.spool = self.core.journal.open(session)
            session.stored = True
        return session

    def mute_instance(self, name: str) -> None:
        """End the subscriptions of an instance; its worker may finish what it has received."""
        for session in self.instance_sessions(name):
            for subscription in list(session.subscriptions or ()):
                self._remove_lane_subscription(session, subscription)
            if session.spool is not None:
                self.core.journal.snapshot(session.spool)
        self.router.forget_all()

    def remove_instance(self, name: str) -> int:
        """Cut an instance off; returns how many messages stay behind as an orphan queue."""
        self.mute_instance(name)
        left = 0
        for session in self.instance_sessions(name):
            if session.channel is not None:
                session.channel.disconnect(0x98)
            left += session.queued
            if not session.queued:
                self.end_session(session)
            elif session.blocked is not None:
                session.unblock()
        self._orphans.add(name)
        return left

    def instance_sessions(self, name: str) -> list[Session]:
        """The lanes (and the publishing session) of an instance."""
        prefix = f"{RESERVED}{name}/"
        return [s for c, s in list(self.sessions.items()) if c.startswith(prefix)]

    def find_orphans(self) -> dict[str, int]:
        """After a restart: queues of instances that are not configured any more, by name with their messages."""
        found: dict[str, int] = {}
        for client_id, session in list(self.sessions.items()):
            if not client_id.startswith(RESERVED) or session.spec is not None:
                continue
            session.subscriptions = None
            if not session.queued:
                self.end_session(session)
                continue
            name = client_id[len(RESERVED) :].rpartition("/")[0]
            found[name] = found.get(name, 0) + session.queued
        self._orphans.update(found)
        return found

    def lanes(self, name: str) -> list[Session]:
        """The sessions that feed an instance."""
        return [s for s in self.instance_sessions(name) if s.client_id.rpartition("/")[2].isdigit()]

    def drop_queue(self, name: str) -> int:
        """Delete what queues for an instance; returns how many messages."""
        count = 0
        for session in self.instance_sessions(name):
            count += session.queued if name in self._orphans else session.waiting
            session.drop_queue("queue_dropped")
            if name in self._orphans:
                self.end_session(session)
        self._orphans.discard(name)
        return count
