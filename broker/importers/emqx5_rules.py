"""Reads the rules of EMQX 5: which messages reach which action. Only rules that select whole messages by topic."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from broker.importers.source import Node

_SELECT = re.compile(r'\s*select\s+\*\s+from\s+("[^"]+"(?:\s*,\s*"[^"]+")*)\s*;?\s*', re.IGNORECASE)

NO_TOPIC = "no rule SELECT * FROM topics and no local topic says which messages go there"


@dataclass(slots=True)
class Rules:
    """Which messages reach which action."""

    filters: dict[str, list[str]] = field(default_factory=dict)
    """``mqtt:NAME`` -> topic filters."""
    into: dict[str, str] = field(default_factory=dict)
    """``mqtt:NAME`` of a source -> the template of the topic its messages get here."""
    nodes: dict[str, list[Node]] = field(default_factory=dict)

    def carried(self, key: str) -> None:
        """What feeds this action or source has its equivalent."""
        for node in self.nodes.get(key, ()):
            node.use()


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
        for action in actions.value if isinstance(actions.value, list) else []:
            rules.filters.setdefault(str(action), []).extend(topics)
            rules.nodes.setdefault(str(action), []).append(node)
        for item in actions.items:
            target = item.at("args.topic")
            if item.at("function") is None or item.text("function") != "republish" or target is None:
                continue
            for topic in topics:
                source = re.fullmatch(r"\$(?:bridges|source|sources)/(.+)", topic)
                if source:
                    rules.into[source[1]] = target.as_text()
                    rules.nodes.setdefault(source[1], []).append(node)
    return rules
