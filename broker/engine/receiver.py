"""What everything that receives has in common, and how a subscription addresses it.

`deliver` is the one verb: it answers DONE, LATER (the publisher's acknowledgement is held until the receiver releases
the hold it was given) or REFUSED. The router has no special cases.
"""

from typing import Any

from broker.engine.message import Message
from broker.engine.outbox import Outbox

DONE = 0
LATER = 1
REFUSED = 2


class Hold:
    """Keeps one acknowledgement of a publisher back until as many releases as LATERs have come."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.count = 0
        self.code = 0
        self.done = False

    def release(self) -> None:
        """One receiver has the message safe."""
        self.count -= 1
        if self.count <= 0 and self.owner is not None and self.done:
            owner = self.owner
            self.owner = None
            owner.on_released()

    def fail(self, code: int) -> None:
        """The acknowledgement is sent now, with this reason code."""
        self.code = code
        self.count = 1
        self.release()


class Receiver:
    """Base of sessions and of anything else a route may lead to."""

    def __init__(self) -> None:
        self.client_id = ""
        self.outbox: Outbox | None = None
        self.v5 = False
        self.special = False
        self.durable = False
        """It may refuse, and is asked before anybody gets the message."""
        self.stored = False
        """What it must get at QoS 1 and 2 survives a restart."""
        self.max_packet = 268_435_460
        self.origin: str | None = None
        self.principal: Any = None

    def deliver(self, message: Message, target: Any, hold: Hold | None) -> int:
        """Take one message; never waits."""
        raise NotImplementedError

    def refuses(self, size: int) -> int:
        """Asked of every durable receiver before any gets the message: DONE (there is room), REFUSED, or LATER
        (the publisher waits: `block`)."""
        return DONE

    def has_room(self, size: int) -> bool:
        """Whether a message from another receiver's queue may come here now."""
        return True


class Subscription:
    """One filter of one receiver. `group` is set for `$share` and for the lanes of an instance."""

    def __init__(
        self, receiver: Receiver, filter: bytes, qos: int, no_local: bool, rap: bool, ident: int, group: Any = None
    ) -> None:
        self.receiver = receiver
        self.filter = filter
        self.qos = qos
        self.no_local = no_local
        self.rap = rap
        self.ident = ident
        self.group = group


def filter_of(subscription: Subscription) -> bytes:
    """The filter as the client wrote it."""
    group = subscription.group
    name: bytes | None = getattr(group, "name", None)
    return subscription.filter if name is None else b"$share/" + name + b"/" + subscription.filter


class Target:
    """A receiver of one route: overlapping subscriptions merged into one copy at the highest QoS with every
    subscription identifier."""  # [MQTT-3.3.4-2]

    def __init__(self, receiver: Receiver, qos: int, no_local: bool, rap: bool, idents: tuple[int, ...] | None) -> None:
        self.receiver = receiver
        self.qos = qos
        self.no_local = no_local
        self.rap = rap
        self.idents = idents
        self.group: Any = None
