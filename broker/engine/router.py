"""From topic to receivers: subscriptions in a dictionary and a tree of wildcards, and a cache in front of both.

An `Entry` is one cached topic; a `Route` is a set of receivers, the same object for every topic that leads to the same
ones. A change of a filter empties only the entries it touches; the next message fills them again, and only then are the
tree walked and the receivers' rights asked.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from broker.engine import topics
from broker.engine.message import Message
from broker.engine.receiver import DONE, LATER, REFUSED, Hold, Receiver, Subscription, Target

ENTRY_OVERHEAD = 400
"""Bytes an entry costs besides its topic: itself, two dictionaries' places, the index."""


class Node:
    """One level of the tree of wildcard filters."""

    def __init__(self) -> None:
        self.children: dict[bytes, Node] | None = None
        self.plus: Node | None = None
        self.here: list[Subscription] | None = None
        self.below: list[Subscription] | None = None
        """Filters that end here with `#`."""


class Route:
    """Where messages of some topics go."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.groups: list[Any] = []
        self.simple = True
        """Every receiver takes packets as they are: no identifiers, groups, durable or special receivers."""
        self.holding = False
        self.guarded = False
        """Some receiver may refuse."""


class Entry:
    """A topic somebody published to. `code` is 0, or says what its publisher is refused and why."""

    def __init__(self, topic: bytes, code: int) -> None:
        self.topic = topic
        self.code = code
        self.route: Route | None = None
        self.live = True


class Router:
    """All subscriptions of one broker. `may_receive(principal, topic)` is asked when an entry is filled."""

    def __init__(self, may_receive: Callable[[Any, str], int], cache_bytes: int) -> None:
        self.may_receive = may_receive
        self.cache_bytes = cache_bytes
        self.exact: dict[bytes, Any] = {}
        """Filters without wildcards: one Subscription, or a list of several."""
        self.root = Node()
        self.entries: dict[bytes, Entry] = {}
        self.index: dict[bytes, dict[bytes, list[Entry]]] = {}
        self.cached = 0
        self.count = 0
        self.routes: Any = WeakValueDictionary()

    # subscriptions --------------------------------------------------------------------------------------------

    def add(self, subscription: Subscription) -> None:
        """Make a subscription effective. The caller removes an older one of the same receiver and filter first."""
        filter = subscription.filter
        if topics.is_wild(filter):
            node = self.root
            parts = filter.split(b"/")
            multi = parts[-1] == b"#"
            for part in parts[:-1] if multi else parts:
                if part == b"+":
                    if node.plus is None:
                        node.plus = Node()
                    node = node.plus
                else:
                    if node.children is None:
                        node.children = {}
                    child = node.children.get(part)
                    if child is None:
                        child = node.children[part] = Node()
                    node = child
            if multi:
                if node.below is None:
                    node.below = []
                node.below.append(subscription)
            else:
                if node.here is None:
                    node.here = []
                node.here.append(subscription)
        else:
            found = self.exact.get(filter)
            if found is None:
                self.exact[filter] = subscription
            elif isinstance(found, list):
                found.append(subscription)
            else:
                self.exact[filter] = [found, subscription]
        self.count += 1
        self.touch(filter)

    def remove(self, subscription: Subscription) -> None:
        """End a subscription and prune what only it needed."""
        filter = subscription.filter
        if topics.is_wild(filter):
            parts = filter.split(b"/")
            if self._prune(self.root, parts, 0, subscription):
                self.count -= 1
        else:
            found = self.exact.get(filter)
            if found is subscription:
                del self.exact[filter]
                self.count -= 1
            elif isinstance(found, list) and subscription in found:
                found.remove(subscription)
                self.count -= 1
                if len(found) == 1:
                    self.exact[filter] = found[0]
        self.touch(filter)

    def _prune(self, node: Node, parts: list[bytes], level: int, subscription: Subscription) -> bool:
        """Follow the filter iteratively, drop the subscription, then the nodes left empty on the way back."""
        path: list[tuple[Node, bytes]] = []
        multi = parts[-1] == b"#"
        for part in parts[:-1] if multi else parts:
            path.append((node, part))
            child = node.plus if part == b"+" else (node.children.get(part) if node.children is not None else None)
            if child is None:
                return False
            node = child
        held = node.below if multi else node.here
        if held is None or subscription not in held:
            return False
        held.remove(subscription)
        if not held:
            if multi:
                node.below = None
            else:
                node.here = None
        while path and node.here is None and node.below is None and node.plus is None and not node.children:
            node, part = path.pop()
            if part == b"+":
                node.plus = None
            elif node.children is not None:
                del node.children[part]
                if not node.children:
                    node.children = None
        return True

    def touch(self, filter: bytes) -> None:
        """Empty the cached entries a filter covers."""
        if not self.entries:
            return
        if not topics.is_wild(filter):
            entry = self.entries.get(filter)
            if entry is not None:
                entry.route = None
            return
        parts = filter.split(b"/", 2)
        first = parts[0]
        if first == b"+" or first == b"#":
            firsts = list(self.index.values())
        else:
            bucket = self.index.get(first)
            firsts = [bucket] if bucket is not None else []
        second = parts[1] if len(parts) > 1 else b"#"
        for seconds in firsts:
            if second == b"+" or second == b"#":
                lists = list(seconds.values())
            else:
                held = seconds.get(second)
                lists = [held] if held is not None else []
            for entries in lists:
                for entry in entries:
                    if entry.route is not None and topics.matches(filter, entry.topic):
                        entry.route = None

    def forget(self, receiver: Receiver) -> None:
        """Empty the entries that lead to this receiver: its rights have changed."""
        for entry in self.entries.values():
            route = entry.route
            if route is not None and (route.groups or any(t.receiver is receiver for t in route.targets)):
                entry.route = None

    def forget_all(self) -> None:
        """Empty every entry."""
        for entry in self.entries.values():
            entry.route = None

    # topics ---------------------------------------------------------------------------------------------------

    def entry(self, topic: bytes) -> Entry:
        """The cached entry of a valid topic name, made on first use."""
        entry = self.entries.get(topic)
        if entry is None:
            cost = len(topic) + ENTRY_OVERHEAD
            if self.cached + cost > self.cache_bytes:
                self._evict()
            self.cached += cost
            entry = Entry(topic, 0)
            self.entries[topic] = entry
            parts = topic.split(b"/", 2)
            second = parts[1] if len(parts) > 1 else b""
            self.index.setdefault(parts[0], {}).setdefault(second, []).append(entry)
        return entry

    def _evict(self) -> None:
        """The cache is full: start it anew. Sessions notice by `live`."""
        for entry in self.entries.values():
            entry.live = False
            entry.route = None
        self.entries = {}
        self.index = {}
        self.cached = 0

    def matching(self, topic: bytes) -> list[Subscription]:
        """Every subscription whose filter covers the topic."""
        found: list[Subscription] = []
        exact = self.exact.get(topic)
        if isinstance(exact, list):
            found.extend(exact)
        elif exact is not None:
            found.append(exact)
        parts = topic.split(b"/")
        last = len(parts)
        system = topic.startswith(b"$")
        nodes = [self.root]
        for level in range(last + 1):
            below: list[Node] = []
            part = parts[level] if level < last else b""
            for node in nodes:
                hidden = system and level == 0  # [MQTT-4.7.2-1]
                if node.below is not None and not hidden:
                    found.extend(node.below)
                if level == last:
                    if node.here is not None:
                        found.extend(node.here)
                    continue
                if node.plus is not None and not hidden:
                    below.append(node.plus)
                if node.children is not None:
                    child = node.children.get(part)
                    if child is not None:
                        below.append(child)
            if not below:
                break
            nodes = below
        return found

    def fill(self, entry: Entry) -> Route:
        """Find the receivers of an entry's topic, ask their rights, and share the route with equal ones."""
        name = entry.topic.decode()
        merged: dict[Receiver, Target] = {}
        groups: list[Any] = []
        for subscription in self.matching(entry.topic):
            if subscription.group is not None:
                if subscription.group not in groups:
                    groups.append(subscription.group)
                continue
            receiver = subscription.receiver
            target = merged.get(receiver)
            idents = (subscription.ident,) if subscription.ident else None
            if target is None:
                if receiver.principal is not None and not self.may_receive(receiver.principal, name):
                    continue
                merged[receiver] = Target(receiver, subscription.qos, subscription.no_local, subscription.rap, idents)
            else:
                target.qos = max(target.qos, subscription.qos)
                target.no_local = target.no_local and subscription.no_local
                target.rap = target.rap or subscription.rap
                if idents is not None:
                    target.idents = idents if target.idents is None else target.idents + idents
        key = tuple(
            [
                (id(t.receiver), t.qos, t.no_local, t.rap, t.idents, t.receiver.special, t.receiver.stored)
                for t in merged.values()
            ]
            + [id(g) for g in groups]
        )
        route: Route | None = self.routes.get(key)
        if route is None:
            route = Route()
            route.targets = list(merged.values())
            route.groups = groups
            for target in route.targets:
                receiver = target.receiver
                if target.idents is not None or receiver.special or receiver.durable:
                    route.simple = False
                if receiver.durable:
                    route.guarded = True
                    route.holding = True
                elif receiver.stored:
                    route.holding = True
            if groups:
                route.simple = False
                route.holding = True
                for group in groups:
                    if group.durable:
                        route.guarded = True
            self.routes[key] = route
        entry.route = route
        return route

    # messages -------------------------------------------------------------------------------------------------

    def room(self, route: Route, message: Message) -> int:
        """Asks every durable receiver before any gets the message: DONE, REFUSED, or LATER (wait and try again)."""
        answer = DONE
        size = message.size
        for target in route.targets:
            if target.receiver.durable:
                said = target.receiver.refuses(size)
                if said == REFUSED:
                    return REFUSED
                if said == LATER:
                    answer = LATER
        for group in route.groups:
            if group.durable:
                said = group.refuses(message)
                if said == REFUSED:
                    return REFUSED
                if said == LATER:
                    answer = LATER
        return answer

    def publish(self, route: Route, message: Message, publisher: Any, hold: Hold | None) -> int:
        """Hand the message to every receiver of the route; returns how many it was meant for."""
        count = 0
        origin = message.origin.instance if message.origin is not None else None
        for target in route.targets:
            receiver = target.receiver
            if target.no_local and receiver is publisher:  # [MQTT-3.8.3-3]
                continue
            if origin is not None and receiver.origin == origin:
                continue
            count += 1
            if receiver.deliver(message, target, hold) == REFUSED and receiver.client_id:
                count -= 1
        for group in route.groups:
            if group.publish(message, publisher, hold):
                count += 1
        return count
