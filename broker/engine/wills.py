"""Wills: who may leave one, when it is published, and what a restart needs to judge it. MQTT 5 section 3.1.2.5."""

from collections.abc import Callable
from typing import Any

from broker.engine.channel import Channel
from broker.engine.core import Core
from broker.engine.message import Message
from broker.engine.rights import Rights
from broker.engine.session import Session


class Wills:
    """Of one engine's sessions. `publish(message, session)` routes a message, `report(category, text)` tells the
    operator. The timer of a delayed will is the engine's."""

    def __init__(
        self,
        core: Core,
        rights: Rights,
        publish: Callable[[Message, Session], int],
        report: Callable[[str, str], None],
    ) -> None:
        self.core = core
        self.rights = rights
        self._publish = publish
        self._report = report

    def may_leave(self, principal: Any, will: Any) -> bool:
        """Whether this client may connect with this will."""
        if will.topic[0] == 36 and not principal.privileged:
            return False
        if not self.rights.may_publish(principal, will.topic.decode(), will.qos, will.retain):
            self.core.drop("unauthorized")
            return False
        return True

    def keep(self, channel: Channel, session: Session, will: Any) -> None:
        """The will of a client that has connected."""
        channel.make_origin()
        expires = 0.0
        forward = b""
        if will.properties is not None:
            forward = will.properties.forward
            session.will_delay = float(will.properties.will_delay_interval or 0)
            if will.properties.message_expiry_interval is not None:
                expires = float(will.properties.message_expiry_interval) or -1.0  # 0.0 would be for ever
        session.will = Message(will.topic, will.payload, will.qos, will.retain, forward, expires, channel.origin)
        if self.core.journal is not None and (session.persistent or session.spool is not None):
            session.will_terms = self._terms(session)

    def renew(self, session: Session) -> bool:
        """Ask anew what a restart needs; True when that has changed and the journal is to learn of it."""
        will = session.will
        if will is None or session.spool is None or will.origin.principal is None:
            return False
        terms = self._terms(session)
        if terms == session.will_terms:
            return False
        session.will_terms = terms
        return True

    def publish(self, session: Session) -> None:
        """Publish the session's will if its user still may. [MQTT-3.1.2-8]"""
        will = session.will
        session.will = None
        if will is None:
            return
        if will.expires:
            will.expires += self.core.now
        try:
            if self._may_publish(session, will):
                self._publish(will, session)
            else:
                self.core.drop("unauthorized", 1, session)
                self._report("will_withheld", f"client {session.client_id!r} has no right to its will; not published")
        except Exception as error:
            self.core.failed(error, f"the will of client {session.client_id!r} could not be published")

    def is_due(self, session: Session) -> None:
        """The delay of a will is over."""
        self.publish(session)
        session.note_life(False)  # a restart is not to publish it again

    def _may_publish(self, session: Session, will: Message) -> bool:
        origin = will.origin
        topic = will.topic.decode()
        if origin is not None and origin.principal is not None:
            return self.rights.may_publish(origin.principal, topic, will.qos, will.retain)
        if origin is None or session.will_terms is None:  # its owner connected before a restart
            return False
        who = (origin.client_id, origin.username, origin.peerhost)
        return bool(self.rights.gate.may_publish_will(*who, session.will_terms, topic, will.qos, will.retain))

    def _terms(self, session: Session) -> dict[str, Any] | None:
        """What a restart needs to judge the will; None when it may not be published as things are."""
        will = session.will
        who = will.origin.principal
        if not self.rights.may_publish(who, will.topic.decode(), will.qos, will.retain):
            return None
        terms: dict[str, Any] = self.rights.gate.will_terms(who, will.topic.decode(), will.qos, will.retain)
        return terms
