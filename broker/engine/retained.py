"""Retained messages: one per topic, found again by filter. MQTT 5 section 3.3.1.3."""

from collections.abc import Callable
from typing import Any

from broker.engine.message import Message

FIXED = 300
"""Bytes one retained message costs besides topic, payload and properties."""


class _Node:
    __slots__ = ("children", "message")

    def __init__(self) -> None:
        self.children: dict[bytes, _Node] | None = None
        self.message: Message | None = None


class Retained:
    """The store of retained messages, bounded in number and bytes."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.count = 0
        self.bytes = 0
        self.removed: Callable[[Message], None] | None = None
        """Told of each message that expired."""
        self.max_per_client = 0
        self._owned: dict[str, int] | None = None
        """How many each client has left here; None while nobody asks."""
        self._root = _Node()

    def limit_clients(self, most: int) -> None:
        """How many messages of one client are kept from now on, 0 for no limit; what is here stays."""
        self.max_per_client = most
        if not most:
            self._owned = None
        elif self._owned is None:
            self._owned = {}
            for message in self.all():
                self._count(message, 1)

    def over_quota(self, message: Message) -> bool:
        """Whether the message is one too many of its client; never one of the broker itself, a sink or a bridge."""
        owner = _owner(message)
        if self._owned is None or owner is None or self._owned.get(owner, 0) < self.max_per_client:
            return False
        old = self.get(message.topic)
        return old is None or _owner(old) != owner

    def _count(self, message: Message, by: int) -> None:
        owner = _owner(message)
        if self._owned is None or owner is None:
            return
        count = self._owned.get(owner, 0) + by
        if count > 0:
            self._owned[owner] = count
        else:
            self._owned.pop(owner, None)

    def store(self, message: Message) -> bool:
        """Keep the message in place of the topic's older one; False when a limit forbids it."""
        size = message.size + FIXED
        old = self.get(message.topic)
        freed = old.size + FIXED if old is not None else 0
        if old is None and self.count >= self.max_messages:
            return False
        if self.bytes - freed + size > self.max_bytes:
            return False
        self.put(message)
        return True

    def put(self, message: Message) -> None:
        """As `store`, whatever the limits say: for a message that was here before."""
        size = message.size + FIXED
        old = self.get(message.topic)
        freed = old.size + FIXED if old is not None else 0
        node = self._root
        for level in message.topic.split(b"/"):
            if node.children is None:
                node.children = {}
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node()
            node = child
        if old is not None:
            self._count(old, -1)
        self._count(message, 1)
        node.message = message
        self.count += 0 if old is not None else 1
        self.bytes += size - freed

    def get(self, topic: bytes) -> Message | None:
        """The topic's retained message."""
        node: _Node | None = self._root
        for level in topic.split(b"/"):
            if node is None or node.children is None:
                return None
            node = node.children.get(level)
        return node.message if node is not None else None

    def clear(self, topic: bytes) -> bool:
        """Remove the topic's retained message and the levels only it needed."""  # [MQTT-3.3.1-6]
        node = self._root
        path: list[tuple[_Node, bytes]] = []
        for level in topic.split(b"/"):
            child = node.children.get(level) if node.children is not None else None
            if child is None:
                return False
            path.append((node, level))
            node = child
        if node.message is None:
            return False
        self.count -= 1
        self.bytes -= node.message.size + FIXED
        self._count(node.message, -1)
        node.message = None
        while path and node.message is None and not node.children:
            node, level = path.pop()
            if node.children is not None:
                del node.children[level]
                if not node.children:
                    node.children = None
        return True

    def matching(self, filter: bytes, now: float) -> list[Message]:
        """The unexpired messages a filter covers, in no particular order; expired ones on the way are removed."""
        found: list[Message] = []
        stale: list[bytes] = []
        parts = filter.split(b"/")
        stack: list[tuple[_Node, int]] = [(self._root, 0)]
        while stack:
            node, level = stack.pop()
            if level == len(parts) or parts[level] == b"#":
                self._take(node, now, found, stale)
                if level == len(parts):
                    continue
            children = node.children
            part = parts[level]
            if part == b"#":
                for name, child in (children or {}).items():
                    if level or not name.startswith(b"$"):  # [MQTT-4.7.2-1]
                        stack.append((child, level))
            elif part == b"+":
                for name, child in (children or {}).items():
                    if level or not name.startswith(b"$"):
                        stack.append((child, level + 1))
            elif children is not None and part in children:
                stack.append((children[part], level + 1))
        for topic in stale:
            message = self.get(topic)
            self.clear(topic)
            if message is not None and self.removed is not None:
                self.removed(message)
        return found

    def _take(self, node: _Node, now: float, found: list[Message], stale: list[bytes]) -> None:
        message = node.message
        if message is None:
            return
        if message.expires and message.expires <= now:
            stale.append(message.topic)
        else:
            found.append(message)

    def expire(self, now: float) -> int:
        """Remove every expired message; returns how many."""
        before = self.count
        self.matching(b"#", now)
        return before - self.count

    def all(self) -> list[Any]:
        """Every message, those of `$` topics included."""
        found: list[Any] = []
        stack = [self._root]
        while stack:
            node = stack.pop()
            if node.message is not None:
                found.append(node.message)
            stack.extend((node.children or {}).values())
        return found


def _owner(message: Message) -> str | None:
    """The client a message counts for."""
    origin = message.origin
    return origin.client_id if origin is not None and origin.instance is None else None
