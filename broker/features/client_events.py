"""What becomes of clients, as messages on `$events/…`: routed, queued and stored like what a device publishes.

A message carries its client's id, user name and address, so that a sink's `${clientid}` is the client's and its events
stay in order. It says who and why and never what a client proved itself with.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from broker.engine.engine import Engine
from broker.engine.inbox import LIVE
from broker.engine.instances import RESERVED
from broker.engine.message import Message, Origin
from broker.mqtt.codes import V31, ReasonCode

log = logging.getLogger(__name__)

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_TELL_EVERY = 1.0
_MOST_LOSERS = 1_000  # clients and reasons in one report; what others lost is one event without a client
_NAMES = {int(code): code.name.lower() for code in ReasonCode} | {0: "normal_disconnection"}


class ClientEvents:
    """The engine's observer. `watch` says which events there are; with none the engine is not observed at all."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wanted: frozenset[str] = frozenset()
        self._since: dict[Any, int | None] = {}
        """Welcomed connections and when that was: each gets one event at its end."""
        self._lost: dict[tuple[Any, str], int] = {}
        """Messages dropped since the last report, by the session whose they were and the reason."""
        self._telling = False

    def watch(self, events: Iterable[str]) -> None:
        """From now on publish exactly these events."""
        engine = self._engine
        self._wanted = frozenset(events)
        if not self._wanted:
            self._since = {}
        elif engine.core.observer is not self:  # nobody noted when those came that are here already
            self._since = dict.fromkeys(engine.clients())
        engine.core.observer = self if self._wanted else None
        if "message_dropped" in self._wanted:
            engine.core.on_drop = self.dropped
        elif engine.core.on_drop is not None:
            engine.core.on_drop = None

    # the engine tells -----------------------------------------------------------------------------------------

    def session_created(self, channel: Any) -> None:
        """A client without a past."""
        if "session_created" in self._wanted and not channel.listener.privileged:
            self._publish("session_created", channel.session, channel, {})

    def connected(self, channel: Any) -> None:
        """Not before CONNACK: who was refused has not been here."""
        if channel.listener.privileged or channel.state != LIVE:
            return
        session = channel.session
        now = self._since[channel] = self._engine.core.wall_ms
        if "client_connected" in self._wanted:
            fields = {
                **_protocol(channel), "listener": channel.listener.name, "keepalive": round(channel.keep_alive / 1.5),
                "expiry_interval": int(session.expiry), "connected_at": now,
            }  # fmt: skip
            self._publish("client_connected", session, channel, fields)

    def disconnected(self, channel: Any, why: int | str) -> None:
        """Once for each connection that was welcomed."""
        if channel not in self._since:
            return
        since = self._since.pop(channel)
        if "client_disconnected" in self._wanted:
            name, code = (why or "connection_closed", None) if isinstance(why, str) else (_NAMES.get(why, ""), why)
            fields = {
                **_protocol(channel), "reason": name, "reason_code": code,
                "connected_at": since, "disconnected_at": self._engine.core.wall_ms,
            }  # fmt: skip
            self._publish("client_disconnected", channel.session, channel, fields)

    def session_terminated(self, session: Any) -> None:
        """Its connection is long gone, or about to be."""
        if "session_terminated" in self._wanted and not _is_internal(session):
            self._publish("session_terminated", session, session.channel, {})

    def subscribed(self, session: Any, filters: Sequence[tuple[bytes, int]], codes: Sequence[int]) -> None:
        """One event for each filter that was granted."""
        if "session_subscribed" in self._wanted and not _is_internal(session):
            for (filter, _), code in zip(filters, codes, strict=True):
                if code < 0x80:
                    fields = {"topic": filter.decode(), "qos": code}
                    self._publish("session_subscribed", session, session.channel, fields)

    def unsubscribed(self, session: Any, filters: Iterable[bytes]) -> None:
        """One event for each filter."""
        if "session_unsubscribed" in self._wanted and not _is_internal(session):
            for filter in filters:
                self._publish("session_unsubscribed", session, session.channel, {"topic": filter.decode()})

    def dropped(self, reason: str, count: int, session: Any) -> None:
        """Told once a second: whoever is too slow loses thousands, and each event may be one more to lose."""
        if self._telling:  # it was an event
            return
        if not self._lost:
            self._engine.timers.at(self._engine.core.now + _TELL_EVERY, self._tell_lost)
        key = (session, reason)
        if key not in self._lost and len(self._lost) >= _MOST_LOSERS:
            key = (None, reason)
        self._lost[key] = self._lost.get(key, 0) + count

    def _tell_lost(self) -> None:
        lost, self._lost = self._lost, {}
        self._telling = True
        try:
            for (session, reason), count in lost.items():
                if "message_dropped" in self._wanted:
                    channel = session.channel if session is not None else None
                    self._publish("message_dropped", session, channel, {"reason": reason, "count": count})
        finally:
            self._telling = False

    def _publish(self, event: str, session: Any, channel: Any, fields: dict[str, Any]) -> None:
        engine, core = self._engine, self._engine.core
        host = channel.peerhost if channel is not None else ""
        name, owner = (session.client_id, session.owner) if session is not None else ("", None)
        who = {"clientid": name or None, "username": owner, "ipaddress": host or None}
        payload = _encode({"event": event, **who, **fields, "ts": core.wall_ms, "node": core.node})
        origin = Origin(name, owner, host, None, None, core.node)
        try:
            engine.publish(Message(f"$events/{event}".encode(), payload.encode(), 1, False, b"", 0.0, origin))
        except Exception:
            log.exception("the event %s of client %r could not be published", event, name)
            core.count("internal_error")


def _protocol(channel: Any) -> dict[str, Any]:
    return {"proto_name": "MQIsdp" if channel.version == V31 else "MQTT", "proto_ver": channel.version}


def _is_internal(session: Any) -> bool:
    """A worker's, or that of an operator's command."""
    if session.spec is not None or session.client_id.startswith(RESERVED):
        return True
    return session.principal is not None and bool(session.principal.privileged)
