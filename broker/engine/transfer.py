"""A session as a value: exported whole from one engine and imported by another, also in the middle of QoS 2."""

from __future__ import annotations

from collections import deque
from typing import Any

from broker.engine.core import Core
from broker.engine.inflight import RELEASED, SENT, Inflight
from broker.engine.message import Message, Origin, split_body, split_head
from broker.engine.receiver import filter_of
from broker.engine.session import Session

FORMAT = 1


def export_session(engine: Any, client_id: str) -> dict[str, Any]:
    """The whole state of a session; its connection is closed and the session leaves this engine.

    Raises KeyError when there is no such session. Times are remaining seconds, so clocks need not agree.
    """
    session: Session = engine.sessions[client_id]
    if session.channel is not None:
        session.channel.disconnect(0x9D)
        if client_id not in engine.sessions:
            raise KeyError(f"the session of {client_id!r} ended with its connection")
    session.queue_retained()
    inflight = session.inflight
    state = {
        "format": FORMAT,
        "client_id": client_id,
        "owner": session.owner,
        "expiry": session.expiry,
        "window": session.window,
        "encoded5": session.encoded5,
        "subscriptions": [(filter_of(s), s.qos, s.no_local, s.rap, s.ident) for s in session.subscriptions or ()],
        "next_id": inflight.next_id if inflight is not None else 1,
        "inflight": [entry[:4] for entry in inflight.entries()] if inflight is not None else [],
        "received": bytes(session.received) if session.received is not None else b"",
        "queue": [
            (_message(message, engine.core), qos, retain, idents) for message, qos, retain, idents in _queue(session)
        ],
    }
    session.will = None
    engine.end_session(session, False)
    return state


def import_session(engine: Any, state: dict[str, Any]) -> Session:
    """Take over an exported session. Raises ValueError for an unknown format or a client id already here."""
    if state.get("format") != FORMAT:
        raise ValueError(f"a session of format {state.get('format')!r} cannot be imported")
    client_id = state["client_id"]
    if client_id in engine.sessions:
        raise ValueError(f"there is already a session of {client_id!r}")
    core = engine.core
    session = Session(client_id, core)
    session.owner = state["owner"]
    session.expiry = state["expiry"]
    session.persistent = True
    session.window = state["window"]
    session.encoded5 = state["encoded5"]
    engine.sessions[client_id] = session
    for filter, qos, no_local, rap, ident in state["subscriptions"]:
        engine.subscriptions.restore(session, filter, qos, no_local, rap, ident)
    if state["received"]:
        session.received = bytearray(state["received"])
        session.received_count = sum(byte.bit_count() for byte in session.received)
    queue = [(_restored(fields, core), qos, retain, idents) for fields, qos, retain, idents in state["queue"]]
    if core.journal is not None:
        _store(session, core.journal, state, queue)
        engine.start_expiry(session)
        return session
    if state["inflight"]:
        inflight = session.inflight = Inflight()
        for ident, step, head, body in state["inflight"]:
            inflight.put(ident, step, head, body)
        inflight.next_id = state["next_id"]
    if queue:
        session.queue = deque()
        for message, qos, retain, idents in queue:
            session.queue.append((message, qos, retain, idents, None, None, 0, None))
            session.queue_bytes += message.size
    engine.start_expiry(session)
    return session


def _queue(session: Session) -> list[tuple[Message, int, bool, Any]]:
    """Everything that queues, oldest first, what is on disk included."""
    spool = session.spool
    found = [entry[:4] for entry in session.queue or ()]
    if spool is not None:
        for message, taker in spool.journal.fetch(spool, spool.waiting_on_disk()):
            found.append((message, taker.qos, taker.retain, taker.idents))
        found.extend(entry[:4] for entry in spool.tail or ())
    return found


def _store(session: Session, journal: Any, state: dict[str, Any], queue: list[tuple[Message, int, bool, Any]]) -> None:
    """Put an imported session on disk. Its packet identifiers stay, so its sequence numbers begin where they do."""
    spool = session.spool = journal.open(session)
    session.stored = True
    if session.received is not None:
        spool.marks = {ident for ident in range(1, 65536) if session.seen(ident)}
    first = state["inflight"][0][0] if state["inflight"] else state["next_id"]
    spool.floor = spool.sent = first
    spool.next_seq = first + (state["next_id"] - first) % 65535
    if state["inflight"]:
        inflight = session.inflight = Inflight()
        for ident, step, head, body in state["inflight"]:
            inflight.put(ident, step, head, body)
            if step != RELEASED:
                message = _of_packet(head, body, state["encoded5"])
                qos = 1 if step == SENT else 2
                seq = first + (ident - first) % 65535
                inflight.keep(ident, journal.take(message, spool, seq, qos, bool(head[0] & 1), None, 0, None, True))
        inflight.next_id = state["next_id"]
        spool.sent = spool.next_seq
    for message, qos, retain, idents in queue:
        session.offer(message, qos, retain, idents, None, None)


def _of_packet(head: bytes, body: bytes, v5: bool) -> Message:
    """The message of a PUBLISH in its two pieces."""
    properties, payload = split_body(body) if v5 else (b"", body)
    return Message(split_head(head), payload, (head[0] >> 1) & 3, bool(head[0] & 1), properties, 0.0, None)


def _message(message: Message, core: Core) -> dict[str, Any]:
    origin = message.origin
    return {
        "topic": message.topic,
        "payload": message.payload,
        "qos": message.qos,
        "retain": message.retain,
        "properties": message.properties,
        "expires_in": message.expires - core.now if message.expires else None,
        "ident": message.ident,
        "time_ms": message.time_ms,
        "age_ms": core.clock() - message.clock_ms if message.clock_ms else 0,
        "origin": (origin.client_id, origin.username, origin.peerhost, origin.instance, origin.node)
        if origin
        else None,
    }


def _restored(fields: dict[str, Any], core: Core) -> Message:
    expires = core.now + fields["expires_in"] if fields["expires_in"] is not None else 0.0
    origin = None
    if fields["origin"] is not None:
        client_id, username, peerhost, instance, node = fields["origin"]
        origin = Origin(client_id, username, peerhost, instance, None, node)
    message = Message(
        fields["topic"], fields["payload"], fields["qos"], fields["retain"], fields["properties"], expires, origin
    )
    message.ident = fields["ident"]
    message.time_ms = fields["time_ms"]
    message.clock_ms = max(1, core.clock() - fields["age_ms"])
    return message
