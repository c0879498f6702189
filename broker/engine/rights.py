"""What a principal may do, as the gate says; only for a client's own PUBLISH the gate is asked elsewhere (`_entry`)."""

from typing import Any

from broker.engine.core import Core


class Rights:
    """`gate` decides about devices; the broker itself and its workers are privileged and may do everything."""

    def __init__(self, gate: Any, core: Core) -> None:
        self.gate = gate
        self.core = core

    def may_publish(self, principal: Any, topic: str, qos: int, retain: bool) -> bool:
        """Whether a packet other than a client's PUBLISH may be published: a will, or what was retained before."""
        if principal.privileged or self.gate.may_publish(principal, topic):
            return True
        return bool(self.gate.publishable(principal, topic) >> (qos << 1 | int(retain)) & 1)

    def may_subscribe(self, principal: Any, filter: bytes, qos: int) -> bool:
        """Whether the whole filter, without `$share`, is covered with this QoS."""
        return bool(principal.privileged or self.gate.may_subscribe(principal, filter.decode(), qos))

    def may_receive(self, principal: Any, topic: str) -> int:
        """Whether messages of this topic go there; a gate that fails says no."""
        if principal.privileged:
            return 1
        try:
            answer: int = self.gate.may_receive(principal, topic)
        except Exception as error:  # the publisher is not to suffer from it
            self.core.failed(error, "the right to receive could not be decided; denied")
            return 0
        return answer
