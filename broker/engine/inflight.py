"""Messages sent at QoS 1 and 2 and not yet completed: no object per message.

A slot is `packet identifier & mask` in rings that double when full: the state and the identifier's bytes in byte
arrays, the two shared pieces of the packet in lists. Identifiers are taken in order, so their distance from the next
one gives the order of sending.
"""

from typing import Any

FREE = 0
SENT = 1
"""QoS 1, waiting for PUBACK."""
PUBLISHED = 2
"""QoS 2, waiting for PUBREC."""
RELEASED = 3
"""QoS 2, PUBREL sent, waiting for PUBCOMP."""

IDENTIFIERS = tuple(i.to_bytes(2, "big") for i in range(65536))
"""Ready two-byte packet identifiers."""


class Inflight:
    """The in-flight window of one session."""

    def __init__(self) -> None:
        self.count = 0
        self.mask = 15
        self.next_id = 1
        self.states = bytearray(16)
        self.high = bytearray(16)
        self.low = bytearray(16)
        self.heads: list[Any] = [None] * 16
        self.bodies: list[Any] = [None] * 16
        self.refs: list[Any] | None = None
        self.stored: list[Any] | None = None
        """Of sessions that survive a restart: the record of each message on its way to, or on, the disk."""

    def add(self, head: bytes, body: bytes, qos: int) -> int:
        """Take the next packet identifier for this message. The caller keeps `count` below 65 535."""
        if self.count > self.mask - (self.mask >> 2):
            self._grow()
        ident = self.next_id
        while self.states[ident & self.mask] != 0:
            ident = ident + 1 if ident < 65535 else 1
        self.next_id = ident + 1 if ident < 65535 else 1
        slot = ident & self.mask
        self.states[slot] = SENT if qos == 1 else PUBLISHED
        self.high[slot] = ident >> 8
        self.low[slot] = ident & 255
        self.heads[slot] = head
        self.bodies[slot] = body
        self.count += 1
        return ident

    def put(self, ident: int, state: int, head: bytes, body: bytes, ref: Any = None) -> None:
        """Restore an entry of an exported session under its own identifier."""
        while self.states[ident & self.mask] != 0:
            self._grow()
        slot = ident & self.mask
        self.states[slot] = state
        self.high[slot] = ident >> 8
        self.low[slot] = ident & 255
        self.heads[slot] = head
        self.bodies[slot] = body
        self.count += 1
        if ref is not None:
            self.attach(ident, ref)

    def keep(self, ident: int, pending: Any) -> None:
        """The message in flight under this identifier must survive a restart."""
        if self.stored is None:
            self.stored = [None] * (self.mask + 1)
        self.stored[ident & self.mask] = pending

    def stored_of(self, ident: int) -> Any:
        """What `keep` was given, None for nothing."""
        return self.stored[ident & self.mask] if self.stored is not None else None

    def state(self, ident: int) -> int:
        """FREE when the identifier is not in flight."""
        slot = ident & self.mask
        if self.high[slot] == ident >> 8 and self.low[slot] == ident & 255:
            return self.states[slot]
        return FREE

    def release(self, ident: int) -> None:
        """PUBREC came: only the identifier is kept."""
        slot = ident & self.mask
        self.states[slot] = RELEASED
        self.heads[slot] = None
        self.bodies[slot] = None
        if self.stored is not None:
            self.stored[slot] = None

    def remove(self, ident: int) -> Any:
        """Free the slot; returns what was attached to it."""
        slot = ident & self.mask
        self.states[slot] = FREE
        self.heads[slot] = None
        self.bodies[slot] = None
        self.count -= 1
        if self.stored is not None:
            self.stored[slot] = None
        if self.refs is None:
            return None
        ref = self.refs[slot]
        self.refs[slot] = None
        return ref

    def attach(self, ident: int, ref: Any) -> None:
        """Keep an object (a hold, a shared delivery) with the message in flight."""
        if self.refs is None:
            self.refs = [None] * (self.mask + 1)
        self.refs[ident & self.mask] = ref

    def entries(self) -> list[tuple[int, int, Any, Any, Any]]:
        """(identifier, state, head, body, attached) in the order of sending."""
        found = []
        for slot in range(self.mask + 1):
            if self.states[slot]:
                ident = self.high[slot] << 8 | self.low[slot]
                ref = self.refs[slot] if self.refs is not None else None
                found.append((ident, self.states[slot], self.heads[slot], self.bodies[slot], ref))
        found.sort(key=self._age)
        return found

    def first_body(self) -> bytes | None:
        """The body of what was sent first of all that is here with one; makes no list of a window of thousands."""
        found = -1
        least = 65535
        for slot in range(self.mask + 1):
            if self.states[slot] and self.bodies[slot]:
                age = ((self.high[slot] << 8 | self.low[slot]) - self.next_id + 65535) % 65535
                if age < least:
                    least = age
                    found = slot
        return self.bodies[found] if found >= 0 else None

    def _age(self, entry: tuple[int, int, Any, Any, Any]) -> int:
        return (entry[0] - self.next_id) % 65535

    def _grow(self) -> None:
        old = self.entries()
        stored = self.stored
        kept = [stored[entry[0] & self.mask] if stored is not None else None for entry in old]
        size = (self.mask + 1) * 2
        if size > 65536:
            size = 65536
        while True:
            self.mask = size - 1
            slots = {entry[0] & self.mask for entry in old}
            if len(slots) == len(old) or size == 65536:
                break
            size *= 2
        self.states = bytearray(size)
        self.high = bytearray(size)
        self.low = bytearray(size)
        self.heads = [None] * size
        self.bodies = [None] * size
        refs = self.refs
        self.refs = None
        self.stored = None
        self.count = 0
        for (ident, state, head, body, ref), pending in zip(old, kept, strict=True):
            self.put(ident, state, head, body, ref if refs is not None else None)
            if pending is not None:
                self.keep(ident, pending)
