"""Compiled access rules: which rule decides about a topic or a subscription.

Theory of operation. A list of rules becomes one index per action, shared by all clients it applies to: a trie over
topic levels whose edges are literal levels, `+`, or levels with placeholders; the latter are filled in once per client
and remembered there. Walking it with a topic name finds the rules that match. Walking it with a topic *filter* finds
the rules that contain it, because `+` in the filter only follows `+` edges and `#` follows none. Of the rules found,
the first in order decides. No regular expressions; the cost is bounded by depth times the rules that share a prefix.

A rule for some QoS or for retained messages only has a mask of the packets it concerns, and whoever asks says which
packets are meant. The first rule that concerns any packet decides about all of them unless its mask is smaller; only
then does each kind of packet have to be asked about.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Sequence
from typing import Protocol

from broker.config.template import Placeholder, Template
from broker.extend.auth import Identity, Rule

PUBLISH = 0
SUBSCRIBE = 1

EVERY = 0b111111
"""All packets of a topic: bit ``qos << 1 | retain`` stands for one kind of them."""
SUBSCRIPTIONS = 0b010101
"""The bits that stand for subscriptions, which are never retained."""

NAMES = frozenset({"clientid", "username", "peerhost", "cert_common_name", "cert_subject", "cert_san"})
_UNSAFE = frozenset("+#/\0")
_MANY = 8


class Subject(Identity, Protocol):
    """Whom the rules are applied to; `rendered` belongs to this module."""

    rendered: dict[object, object] | None

    @property
    def groups(self) -> frozenset[str]:
        """Whose member it is."""

    def value(self, name: str) -> str | None:
        """The value of a placeholder; None when there is none."""

    def unsafe(self, name: str, value: str) -> None:
        """Told once that a value could not be used in a topic."""


class Compiled:
    """A rule with its place in the order."""

    __slots__ = ("allow", "index", "mask", "rule", "when")

    def __init__(self, index: int, rule: Rule, action: int) -> None:
        self.index = index
        self.allow = int(rule.allow)
        self.rule = rule
        self.when = _when(rule)
        self.mask = _mask(rule.qos, rule.retain if action == PUBLISH else None)


class _Level:
    """A level with placeholders in it."""

    __slots__ = ("first", "segments", "text")

    def __init__(self, segments: tuple[str | Placeholder, ...], first: bool) -> None:
        self.segments = segments
        self.first = first
        """At the start of a topic a value must not make the level begin with `$`."""
        self.text = ("^" if first else "") + "".join(map(str, segments))


class _Node:
    __slots__ = ("children", "ends", "hashes", "levels", "plus")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.plus: _Node | None = None
        self.levels: list[tuple[_Level, _Node]] | None = None
        self.hashes: list[Compiled] | None = None
        self.ends: list[Compiled] | None = None


class _Index:
    """The rules of one action that share a condition on the user name or client id."""

    __slots__ = ("always", "exact", "exact_levels", "root")

    def __init__(self) -> None:
        self.root = _Node()
        self.exact: dict[str, list[Compiled]] = {}
        self.exact_levels: list[tuple[list[str | _Level], Compiled]] = []
        self.always: list[Compiled] = []

    def add(self, compiled: Compiled) -> None:
        rule = compiled.rule
        if rule.filter is None:
            self.always.append(compiled)
            return
        parts = split_filter(rule.filter, exact=rule.exact)
        if rule.exact:
            if any(isinstance(part, _Level) for part in parts):
                self.exact_levels.append((parts, compiled))
            else:
                self.exact.setdefault("/".join(map(str, parts)), []).append(compiled)
            return
        node = self.root
        for part in parts:
            if part == "#":
                node.hashes = [*(node.hashes or ()), compiled]
                return
            node = _child(node, part)
        node.ends = [*(node.ends or ()), compiled]

    def find(
        self, topic: str, parts: list[str], subject: Subject, packets: int, best: Compiled | None
    ) -> Compiled | None:
        if self.always:
            best = _pick(self.always, subject, packets, best)
        if self.exact:
            found = self.exact.get(topic)
            if found is not None:
                best = _pick(found, subject, packets, best)
        for levels, compiled in self.exact_levels:
            if _fill(levels, subject) == topic:
                best = _pick([compiled], subject, packets, best)
        count = len(parts)
        system = topic[:1] == "$"  # root wildcards never reach `$` topics [MQTT-4.7.2-1]
        aside: list[tuple[_Node, int]] = []  # where the walk goes on when it has reached an end
        node, at = self.root, 0
        while True:
            root = system and at == 0
            if node.hashes is not None and not root:
                best = _pick(node.hashes, subject, packets, best)
            following: _Node | None = None
            if at == count:
                if node.ends is not None:
                    best = _pick(node.ends, subject, packets, best)
            else:
                part = parts[at]
                at += 1
                following = node.children.get(part)
                if node.plus is not None and part != "#" and not root:
                    aside.append((node.plus, at))
                if node.levels is not None:
                    if len(node.levels) <= _MANY:
                        for level, child in node.levels:
                            if _render(level, subject) == part:
                                aside.append((child, at))
                    else:
                        for child in _rendered_children(node, subject).get(part, ()):
                            aside.append((child, at))
            if following is not None:
                node = following
            elif aside:
                node, at = aside.pop()
            else:
                return best


class RuleSet:
    """A list of rules, compiled. Raises ValueError (naming the rule's source) when a filter is not valid."""

    __slots__ = ("clients", "common", "count", "groups", "users")

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.count = len(rules)
        self.common = (_Index(), _Index())
        self.users: tuple[dict[str, _Index], dict[str, _Index]] = ({}, {})
        self.clients: tuple[dict[str, _Index], dict[str, _Index]] = ({}, {})
        self.groups: tuple[dict[str, _Index], dict[str, _Index]] = ({}, {})
        for number, rule in enumerate(rules):
            try:
                if rule.action != "subscribe":
                    self._add(PUBLISH, Compiled(number, rule, PUBLISH))
                if rule.action != "publish":
                    self._add(SUBSCRIBE, Compiled(number, rule, SUBSCRIBE))
            except ValueError as error:
                raise ValueError(f"{rule.source}: {error}" if rule.source else str(error)) from None

    def _add(self, action: int, compiled: Compiled) -> None:
        rule = compiled.rule
        if rule.user is not None:
            self.users[action].setdefault(rule.user, _Index()).add(compiled)
        elif rule.client is not None:
            self.clients[action].setdefault(rule.client, _Index()).add(compiled)
        elif rule.group is not None:
            self.groups[action].setdefault(rule.group, _Index()).add(compiled)
        else:
            self.common[action].add(compiled)

    def find(
        self, action: int, topic: str, parts: list[str], subject: Subject, packets: int = EVERY
    ) -> Compiled | None:
        """The first rule that applies to any of these packets, or None. `topic` is a topic name, or the filter of a
        subscription without its ``$share/group/``; `parts` is it split at each slash."""
        best = self.common[action].find(topic, parts, subject, packets, None)
        users = self.users[action]
        if users and subject.username is not None:
            index = users.get(subject.username)
            if index is not None:
                best = index.find(topic, parts, subject, packets, best)
        clients = self.clients[action]
        if clients:
            index = clients.get(subject.clientid)
            if index is not None:
                best = index.find(topic, parts, subject, packets, best)
        groups = self.groups[action]
        if groups:
            for group in subject.groups:
                index = groups.get(group)
                if index is not None:
                    best = index.find(topic, parts, subject, packets, best)
        return best


def allowed(
    sources: Sequence[RuleSet], action: int, topic: str, parts: list[str], subject: Subject, packets: int, no_match: int
) -> int:
    """Which of these packets the sources allow, the first that has a rule for a packet deciding about it; `no_match` is
    what holds where none has. One walk unless there are rules for some packets only."""
    answer = 0
    for rules in sources:
        found = rules.find(action, topic, parts, subject, packets)
        while found is not None:
            if found.allow:
                answer |= packets & found.mask
            packets &= ~found.mask
            if not packets:
                return answer
            found = rules.find(action, topic, parts, subject, packets)
    return answer | packets if no_match else answer


def without_share(filter: str) -> str:
    """``$share/group/a/#`` is decided as ``a/#``."""
    if not filter.startswith("$share/"):
        return filter
    parts = filter.split("/", 2)
    return parts[2] if len(parts) == 3 else filter


def split_filter(filter: Template, *, exact: bool = False) -> list[str | _Level]:
    """The levels of a rule's filter; ValueError when it is not a topic filter or has an unknown placeholder."""
    levels: list[list[str | Placeholder]] = [[]]
    for segment in filter.segments:
        if isinstance(segment, Placeholder):
            name = segment.name
            if name not in NAMES and not (name.startswith("attr.") and len(name) > 5):
                raise ValueError(
                    f"{filter.text!r}: ${{{name}}} is not known here; there are ${{clientid}}, ${{username}}, "
                    "${peerhost}, ${cert_common_name} and ${attr.NAME}"
                )
            levels[-1].append(segment)
            continue
        head, *tail = segment.split("/")
        if head:
            levels[-1].append(head)
        levels.extend([part] if part else [] for part in tail)
    if not filter.segments:
        raise ValueError("an empty text is not a topic filter")
    parts: list[str | _Level] = []
    for at, level in enumerate(levels):
        literal = "".join(s for s in level if isinstance(s, str))
        if "\0" in literal:
            raise ValueError(f"{filter.text!r} holds a NUL character")
        wild = not exact and ("#" in literal or "+" in literal)
        if wild and (len(level) > 1 or literal not in ("+", "#")):
            raise ValueError(f"{filter.text!r} is not a topic filter: a wildcard must stand alone in its level")
        if wild and literal == "#" and at != len(levels) - 1:
            raise ValueError(f"{filter.text!r} is not a topic filter: # must be the last level")
        parts.append(literal if all(isinstance(s, str) for s in level) else _Level(tuple(level), at == 0))
    return parts


def _child(node: _Node, part: str | _Level) -> _Node:
    if isinstance(part, _Level):
        if node.levels is None:
            node.levels = []
        for level, child in node.levels:
            if level.text == part.text:
                return child
        child = _Node()
        node.levels.append((part, child))
        return child
    if part == "+":
        if node.plus is None:
            node.plus = _Node()
        return node.plus
    return node.children.setdefault(part, _Node())


def _pick(candidates: list[Compiled], subject: Subject, packets: int, best: Compiled | None) -> Compiled | None:
    """The earliest of the candidates, in order, that applies and comes before `best`."""
    for compiled in candidates:
        if best is not None and compiled.index >= best.index:
            return best
        if compiled.mask & packets and (compiled.when is None or compiled.when(subject)):
            return compiled
    return best


def _render(level: _Level, subject: Subject) -> str | None:
    """The level with the client's values, filled in once; None when a value is missing or may not stand in a topic."""
    memo = subject.rendered
    if memo is None:
        memo = subject.rendered = {}
    try:
        return memo[level.text]  # type: ignore[return-value]
    except KeyError:
        text = memo[level.text] = _substitute(level, subject)
        return text


def _substitute(level: _Level, subject: Subject) -> str | None:
    text = ""
    for segment in level.segments:
        if isinstance(segment, str):
            text += segment
            continue
        value = subject.value(segment.name)
        if not value:
            return None
        if not _UNSAFE.isdisjoint(value) or (level.first and not text and value.startswith("$")):
            subject.unsafe(segment.name, value)
            return None
        text += value
    return text


def _rendered_children(node: _Node, subject: Subject) -> dict[str, list[_Node]]:
    memo = subject.rendered
    if memo is None:
        memo = subject.rendered = {}
    found = memo.get(node)
    if found is None:
        index: dict[str, list[_Node]] = {}
        for level, child in node.levels or ():
            text = _substitute(level, subject)
            if text is not None:
                index.setdefault(text, []).append(child)
        found = memo[node] = index
    return found  # type: ignore[return-value]


def _fill(levels: list[str | _Level], subject: Subject) -> str | None:
    parts = [part if isinstance(part, str) else _render(part, subject) for part in levels]
    return None if None in parts else "/".join(parts)  # type: ignore[arg-type]


def _mask(qos: frozenset[int] | None, retain: bool | None) -> int:
    kinds = 0b11 if retain is None else 0b10 if retain else 0b01
    mask = 0
    for one in (0, 1, 2) if qos is None else qos:
        mask |= kinds << (one << 1)
    return mask


def _when(rule: Rule) -> Callable[[Subject], bool] | None:
    """The conditions besides the one the rule is looked up by."""
    user, client, group, when = rule.user, rule.client, rule.group, rule.when
    if user is None or client is None:
        client = None
    if user is None and rule.client is None:
        group = None
    if client is None and group is None:
        return when
    return lambda who: (
        (client is None or who.clientid == client)
        and (group is None or group in who.groups)
        and (when is None or when(who))
    )


@functools.lru_cache(maxsize=4_096)
def within(*networks: str) -> Callable[[Identity], bool]:
    """The condition "the address lies in one of these networks"; the same function for the same texts. ValueError."""
    found = [ipaddress.ip_network(text, strict=False) for text in networks]

    def condition(who: Identity) -> bool:
        try:
            address = ipaddress.ip_address(who.peerhost.strip("[]").partition("%")[0])
        except ValueError:
            return False  # a Unix socket has no address
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in found)

    return condition
