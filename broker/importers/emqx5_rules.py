"""Reads the rules of EMQX 5: which messages reach which action. Only rules that select whole messages by topic."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from broker.importers.findings import Findings
from broker.importers.source import Node

_SELECT = re.compile(r'\s*select\s+\*\s+from\s+("[^"]+"(?:\s*,\s*"[^"]+")*)\s*;?\s*', re.IGNORECASE)

_INNER = ("$bridges/", "$source/", "$sources/", "$events/")
"""What rules read from that no client publishes."""
UNCHANGED = ("${qos}", "${retain}", "${flags.retain}", "")
"""What may be written for QoS and retain flag of a message that keeps its own."""
OWN_FLAGS = "messages keep their own QoS and retain flag"

NO_TOPIC = "no rule SELECT * FROM topics and no local topic says which messages go there"


@dataclass(slots=True)
class Rules:
    """Which messages reach which action."""

    filters: dict[str, list[str]] = field(default_factory=dict)
    """``mqtt:NAME`` -> topic filters."""
    into: dict[str, str] = field(default_factory=dict)
    """``mqtt:NAME`` of a source -> the template of the topic its messages get here."""
    nodes: dict[str, list[Node]] = field(default_factory=dict)
    republished: dict[int, str] = field(default_factory=dict)
    """The source that a republishing action brings in, by the action."""
    reached: dict[int, tuple[Node, set[str]]] = field(default_factory=dict)
    """Rules that have an equivalent, and what of theirs has."""

    def carried(self, key: str) -> None:
        """What feeds this action or source has its equivalent."""
        for node in self.nodes.get(key, ()):
            self.reached.setdefault(id(node), (node, set()))[1].add(key)

    def finish(self, found: Findings) -> None:
        """Say what rules do besides, when all bridges and sinks are made."""
        for node, keys in self.reached.values():
            node.use()
            actions = node.children["actions"]
            names = list(map(str, actions.value)) if isinstance(actions.value, list) else []
            for item in actions.items:
                fed = any(self.republished.get(id(item)) == key for key in keys)
                names += [] if fed else [item.text("function", "a function")]
                for one in (item.at("args.qos"), item.at("args.retain")) if fed else ():
                    if one is not None and one.value not in UNCHANGED:
                        found.lose(one, OWN_FLAGS)
            left = [name for name in names if name not in keys]
            if left:
                found.lose(actions, f"of its actions there is no equivalent of {', '.join(left)}")


def read_rules(root: Node) -> Rules:
    """The rules that are enabled and can be carried over."""
    rules = Rules()
    for node in root.below("rule_engine.rules").values():
        sql, actions = node.at("sql"), node.at("actions")
        match = _SELECT.fullmatch(sql.as_text()) if sql is not None and sql.value is not None else None
        enabled = node.at("enable")
        if match is None or actions is None or (enabled is not None and not enabled.as_truth()):
            continue
        topics = re.findall(r'"([^"]+)"', match[1])
        own = any(topic.startswith(_INNER) for topic in topics)
        for action in actions.value if isinstance(actions.value, list) and not own else []:
            rules.filters.setdefault(str(action), []).extend(topics)
            rules.nodes.setdefault(str(action), []).append(node)
        for item in actions.items:
            target = item.at("args.topic")
            payload = item.at("args.payload")
            direct = payload is None or payload.value in ("", "${payload}")
            if item.text("function") != "republish" or target is None or not direct:
                continue
            for topic in topics:
                source = re.fullmatch(r"\$(?:bridges|source|sources)/(.+)", topic)
                if source:
                    rules.into[source[1]] = target.as_text()
                    rules.nodes.setdefault(source[1], []).append(node)
                    rules.republished[id(item)] = source[1]
    return rules
