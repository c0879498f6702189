"""The whole of one broker's protocol state, and the life of its connections and sessions: CONNECT, take-over, the end.

One object per broker, no module-level state. `tick` is called four times a second; everything else happens inside
`Channel.feed`. Subscriptions, wills and the sessions of sinks and bridges have modules of their own.
"""

import logging
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from broker.engine.channel import Channel
from broker.engine.core import Core, Limits
from broker.engine.groups import ShareGroup
from broker.engine.inbox import AUTHENTICATING, LIVE
from broker.engine.instances import RESERVED, Instances
from broker.engine.journal import Journal
from broker.engine.legacy import Legacies
from broker.engine.listener import ListenerInfo
from broker.engine.message import Message
from broker.engine.pressure import Pressure
from broker.engine.receiver import DONE, Hold
from broker.engine.retained import Retained
from broker.engine.rights import Rights
from broker.engine.router import Route, Router
from broker.engine.session import NEVER, Session
from broker.engine.subscriptions import Subscriptions
from broker.engine.timers import Timers, Wheel
from broker.engine.wills import Wills
from broker.mqtt.connect import encode_connack
from broker.mqtt.properties import Properties

log = logging.getLogger(__name__)

LAST_WORD = 0.5
"""Seconds a peer has to read the reason of its disconnection before the socket is closed."""
LINGER = 4.0
"""Seconds a closed connection has to send what is left before it is cut."""

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
        self.clock = clock
        self.core = Core(call_soon, now, wall_ms, node, node_id, boot)
        self.report = report
        self.rights = Rights(gate, self.core)
        self.sessions: dict[str, Session] = {}
        self.groups: dict[tuple[bytes, bytes], ShareGroup] = {}
        self.legacies = Legacies(self.core, self.groups)
        self.holding: set[Channel] = set()
        self.router = Router(self.rights.may_receive, 64 << 20)
        self.retained_store = Retained(1, 1)
        self.subscriptions = Subscriptions(
            self.core, self.rights, self.router, self.retained_store, self.legacies, self.sessions, self.groups
        )
        self.wills = Wills(self.core, self.rights, self.publish, report)
        self.instances = Instances(self.core, self.router, self.subscriptions, self.sessions, self.end_session)
        self.wheel = Wheel(now)
        self.timers = Timers()
        self.connected = 0
        self.pressure = Pressure(self.core, self.clients, call_soon)
        self._claims: dict[str, Channel] = {}
        """Connections that get their session, and CONNACK, when what CONNACK says is on disk."""
        self._takeovers: dict[str, tuple[int, int]] = {}
        self._half_closed: deque[tuple[float, Any]] = deque()
        self._lingering: deque[tuple[float, Any]] = deque()
        """Closed links that still had something to send, and when they are cut."""
        self._next_sweep = now + 60.0
        self._next_look = now + 1.0
        self.core.withholds = self.subscriptions.withholds
        self.on_connected: Callable[[Channel], None] | None = None
        self.on_disconnected: Callable[[Channel], None] | None = None
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

    # connections ----------------------------------------------------------------------------------------------

    def open_channel(self, link: Any, listener: ListenerInfo, peer: str, *, accepted_at: float = 0.0) -> Channel:
        """A connection was made. `accepted_at` is the loop's time of accept, from which the deadline counts."""
        channel = Channel(self, self.core, self.router, link, listener, peer, accepted_at or self.core.now)
        self.wheel.put(channel, channel.deadline)
        return channel

    def attach(self, channel: Channel, connect: Any, principal: Any) -> None:
        """Give an authenticated channel its session and answer CONNACK. MQTT 5 section 3.1.4."""
        core = self.core
        client_id: str = connect.client_id
        if not client_id:
            client_id = principal.clientid = f"auto-{uuid.uuid4().hex}"  # [MQTT-3.1.3-6]
        code = self._admit(channel, client_id, connect, principal)
        if code:
            channel.refuse(code)
            return
        session, present, anew = self._session_of(client_id, connect.clean_start, principal)
        expiry = self._expiry_of(session, connect, principal)
        journal = core.journal
        if journal is not None and expiry > 0 and not present and session.spool is None and journal.refusing:
            del self.sessions[client_id]
            channel.refuse(0x97)
            return
        session.expiry = expiry
        session.persistent = expiry > 0
        session.ends_at = 0.0
        keep_alive = self._agree(channel, session, connect, principal)
        if present:
            session.rights = None
            for subscription in session.subscriptions or ():
                self.router.touch(subscription.filter)
            self.subscriptions.check(session)
        channel.session = session
        if connect.will is not None:
            self.wills.keep(channel, session, connect.will)
        channel.state = LIVE
        self.connected += 1
        if core.observer is not None and not present:
            core.observer.session_created(channel)
        if channel.keep_alive:
            self.wheel.put(channel, core.now + channel.keep_alive)
        else:
            self.wheel.remove(channel)
        answer = self._connack_properties(channel, session, connect, keep_alive) if channel.v5 else None
        connack = encode_connack(channel.version, present, 0, answer)
        if journal is not None and session.persistent:
            self._survive(session, journal, anew)
            anew = anew or (present and session.spool is not None and session.spool.segment == 0)
        if journal is not None and (anew or (not present and client_id in journal.ending)):
            self._claims[client_id] = channel
            session.claimed = True
            journal.after(partial(self._welcome_later, channel, session, connack))
            return
        if session.spool is not None and not session.persistent:  # it ends with its connection, a crash included
            session.note_life(True)
        self._welcome(channel, session, connack)

    def _admit(self, channel: Channel, client_id: str, connect: Any, principal: Any) -> int:
        """0 when this client gets in, and then nobody else is connected with its id; else a reason code."""
        if client_id.startswith(RESERVED) and not principal.privileged:
            return 0x85
        core = self.core
        session = self.sessions.get(client_id)
        stranger = session is not None and session.owner != principal.username
        if stranger and not (core.limits.shared_client_ids or principal.privileged):
            self.report("client_id_taken", f"client id {client_id!r} belongs to another user; {channel.peer} refused")
            return 0x85
        if connect.will is not None and not self.wills.may_leave(principal, connect.will):
            return 0x87
        strict = core.limits.max_keepalive_policy == "refuse" and not channel.v5
        if strict and connect.keep_alive != self._keep_alive_of(connect, principal):
            return 0x85
        older = self._claims.get(client_id) or (session.channel if session is not None else None)
        if older is not None:
            if not self._may_take_over(client_id):
                return 0x9F
            if client_id in self._claims:
                older._end()  # before CONNACK nothing can be said [MQTT-3.14.0-1]
            else:
                older.disconnect(0x8E)  # [MQTT-3.1.4-3]
        return 0

    def _session_of(self, client_id: str, clean_start: bool, principal: Any) -> tuple[Session, bool, bool]:
        """The session, whether it was there before, and whether something on disk must be gone before the client hears
        that it is new."""
        session = self.sessions.get(client_id)
        if session is not None and session.ends_at and session.ends_at <= self.core.now:
            self.end_session(session)
            session = None
        anew = False
        if session is not None and clean_start and session.spec is None:  # [MQTT-3.1.2-4]
            anew = session.spool is not None
            self.end_session(session)
            session = None
        if session is None:
            session = self.sessions[client_id] = Session(client_id, self.core)
            session.owner = principal.username
            return session, False, anew
        self._cancel(session)
        if clean_start and not session.durable:
            session.begin_anew()
            return session, False, True
        return session, True, anew

    def _expiry_of(self, session: Session, connect: Any, principal: Any) -> float:
        """Seconds the session outlives its connection."""
        if session.spec is not None:
            return float(NEVER)
        longest = self.core.limits.session_expiry
        if connect.version == 5:
            wanted = connect.properties.session_expiry_interval if connect.properties is not None else None
            expiry = float(wanted or 0)
        else:
            expiry = 0.0 if connect.clean_start else longest
        return longest if expiry > longest and not principal.privileged else expiry

    def _keep_alive_of(self, connect: Any, principal: Any) -> int:
        """Seconds, 0 for no end: what the client asks for, or the longest it may."""
        asked: int = connect.keep_alive
        longest = self.core.limits.max_keepalive
        if longest < 65535 and (asked == 0 or asked > longest) and not principal.privileged:
            return int(longest)
        return asked

    def _agree(self, channel: Channel, session: Session, connect: Any, principal: Any) -> int | None:
        """Put in force what CONNECT wants, within our limits; returns the keep-alive the client is to take instead."""
        limits = self.core.limits
        props: Properties | None = connect.properties
        keep_alive = self._keep_alive_of(connect, principal)
        server_keep_alive = keep_alive if keep_alive != connect.keep_alive else None  # [MQTT-3.2.2-21]
        channel.keep_alive = keep_alive * 1.5  # [MQTT-3.1.2-22]
        privileged: bool = principal.privileged
        session.window = 65535 if privileged else limits.max_inflight
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
        session.special = alias_out > 0 or privileged
        channel.principal = principal
        channel.receive_maximum = 65535 if privileged else limits.receive_maximum
        channel.alias_maximum = limits.topic_alias_maximum if channel.v5 else 0
        return server_keep_alive

    def _survive(self, session: Session, journal: Journal, anew: bool) -> None:
        """A client with a persistent session has connected: the journal learns of it."""
        session.stored = True
        session.durable = session.durable or (session.spec is None and self.core.limits.queue_overflow == "reject")
        if session.spool is None:
            session.spool = journal.open(session)
        elif anew:
            journal.unmark_all(session.spool)
        else:
            session.note_life(True)
            if session.spool.waiting:  # sent before that is on disk, a crash would repeat it without DUP
                session.spool.pause()

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
        if self.core.observer is not None:
            self.core.observer.connected(channel)

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
        self, channel: Channel, session: Session, connect: Any, keep_alive: int | None
    ) -> Properties:
        wanted = connect.properties.session_expiry_interval if connect.properties is not None else None
        answer = Properties()
        answer.receive_maximum = channel.receive_maximum if channel.receive_maximum != 65535 else None
        answer.maximum_packet_size = channel.max_packet
        answer.topic_alias_maximum = self.core.limits.topic_alias_maximum or None
        answer.assigned_client_identifier = session.client_id if not connect.client_id else None
        if wanted is not None and float(wanted) != session.expiry:
            answer.session_expiry_interval = int(min(session.expiry, NEVER))
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

    def closed(self, channel: Channel, state: int, why: int | str = "") -> None:
        """A channel ended: detach its session, publish or schedule the will, start the session's expiry."""
        core = self.core
        core.now = self.clock()
        self.holding.discard(channel)
        core.stalled.discard(channel)
        self.wheel.remove(channel)
        if state == AUTHENTICATING:
            self.rights.gate.cancel(channel)
        session = channel.session
        if session is not None and self._claims.get(session.client_id) is channel:  # its session has learnt all of it
            del self._claims[session.client_id]
            session.claimed = False
            session.attach(channel, channel.v5)
        if session is None or session.channel is not channel:
            if state == LIVE and session is not None and self.sessions.get(session.client_id) is session:
                self.connected -= 1  # its welcome failed half-way
            return
        self.connected -= 1
        try:
            self._let_go(channel, session, why)
        except Exception:
            session.outbox = None
            self.abandon(session.client_id)
            raise

    def abandon(self, client_id: str) -> None:
        """Something failed while a connection got or left its session, which is not to stay for ever because of it."""
        session = self.sessions.get(client_id)
        if session is None or session.outbox is not None or session.claimed or session.spec is not None:
            return
        if not session.persistent:
            self.end_session(session)
        elif "expiry" not in (session.timers or ()):
            self.start_expiry(session)

    def _let_go(self, channel: Channel, session: Session, why: int | str) -> None:
        core = self.core
        session.detach()
        self.subscriptions.owed.hung_up(session)
        if core.observer is not None:
            core.observer.disconnected(channel, why)
        if channel.graceful:
            session.will = None  # [MQTT-3.14.4-3]
        journal = core.journal
        # while nothing can be stored once more, what is on disk stays where it is
        stays = session.spool is not None and session.persistent and journal.refusing
        taken = [] if stays else session.take_shared()
        if taken:
            self.legacies.hand_on(session, taken)
        if session.will is not None:
            delay = min(session.will_delay, session.expiry) if session.persistent else 0.0
            if delay > 0:
                self._timer(session, "will", core.now + delay, lambda: self.wills.is_due(session))
            else:
                self.wills.publish(session)
        if not session.persistent:
            self.end_session(session)
        else:
            self.start_expiry(session)
            self.wills.renew(session)  # it may have been revoked
            session.note_life(False)
        if self.on_disconnected is not None:
            self.on_disconnected(channel)

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

    # sessions -------------------------------------------------------------------------------------------------

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
        self.subscriptions.owed.forget(session)
        groups = [s.group for s in session.subscriptions or () if isinstance(s.group, ShareGroup)]
        for subscription in session.subscriptions or ():
            self.subscriptions.drop(subscription)
        session.subscriptions = None
        leaves = gives and (session.left_share or any(group.members for group in groups))
        if leaves:
            self.legacies.hand_on(session, session.take_shared(over=True))
        for entry in session.queue or ():
            if entry[4] is not None and entry[7] is None:
                entry[4].release()
        if session.inflight is not None:
            for entry in session.inflight.entries():
                if entry[4] is not None and entry[4][0] is not None:
                    entry[4][0].release()
        if session.spool is not None:
            self.legacies.give_up(session, session.spool, leaves)
        session.queue = None
        session.queue_bytes = 0
        session.inflight = None
        session.resend = None
        session.rights = None
        if session.blocked is not None:
            session.unblock()
        if will is not None:
            self.wills.publish(session)
        if self.core.observer is not None:
            self.core.observer.session_terminated(session)

    def set_expiry(self, session: Session, seconds: int) -> None:
        """DISCONNECT changed the session's expiry; those of instances live as long as they are configured."""
        if session.spec is not None:
            return
        session.expiry = min(float(seconds), self.core.limits.session_expiry)
        session.persistent = session.expiry > 0

    def start_expiry(self, session: Session) -> None:
        """A session without a connection lives for its expiry from now on."""
        if session.expiry < NEVER and session.spec is None:
            session.ends_at = self.core.now + session.expiry
            self._timer(session, "expiry", session.ends_at, lambda: self.end_session(session))

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
        self._timer(session, "will", due, lambda: self.wills.is_due(session))

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
            self.core.drop("queue_full", 1, publisher)
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

    # clients and their rights -----------------------------------------------------------------------------------

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
            self.subscriptions.check(session)
            if self.wills.renew(session):  # a crash may come next
                session.note_life(session.channel is not None or bool(session.claimed))

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
            self._try(self._look_at, channel, now)
        while self._half_closed and self._half_closed[0][0] <= now:
            self._try(self.close, self._half_closed.popleft()[1])
        while self._lingering and self._lingering[0][0] <= now:
            self._try(self._lingering.popleft()[1].abort)
        for channel in list(core.stalled):
            self._try(self._look_at_stalled, channel, now)
        for channel in list(self.holding):
            self._try(self._look_at_held, channel, now)
        self.timers.run(now, self._failed)
        if core.journal is not None:
            self._try(core.journal.pace.look, now)
            self._try(self.subscriptions.owed.look)
            try:
                self.legacies.go_on()
            except Exception as error:
                self.core.failed(error, "what ended sessions left on disk cannot be given to others until a restart")
        if now >= self._next_look:
            self._next_look = now + 1.0
            self._try(self.instances.drop_aged)
        if now >= self._next_sweep:
            self._next_sweep = now + 60.0
            self._try(self.retained_store.expire, now)
            second = int(now)
            self._takeovers = {k: v for k, v in self._takeovers.items() if v[0] >= second - 1}

    def _try(self, action: Callable[..., Any], *arguments: Any) -> None:
        """One of several that are due: what fails in it keeps nobody else waiting."""
        try:
            action(*arguments)
        except Exception as error:
            self._failed(error)

    def _look_at_stalled(self, channel: Channel, now: float) -> None:
        # what a transport sends by itself, such as answers to TLS key updates, no outbox counts
        too_much = 2 * self.core.flusher.limit
        if channel.deadline <= now or channel.link.get_write_buffer_size() > too_much:
            self.core.count("stalled")
            self.report("stalled", f"client {channel.client_id!r} from {channel.peer} reads nothing; closed")
            link = channel.link
            channel.disconnect(0x83)
            link.abort()  # its last word would wait behind all that was not read, and TLS go on to answer meanwhile

    def _failed(self, error: Exception) -> None:
        self.core.failed(error, "a timer of the engine failed; the others go on")

    def use_journal(self, journal: Journal) -> None:
        """From now on sessions and retained messages survive a restart."""
        self.core.journal = journal
        journal.retained = self.retained_store
        journal.heirs = self.legacies.give
        journal.owed = self.subscriptions.owed.fields
        self.retained_store.removed = journal.retained_expired

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
