"""Reads a file of rules, written in EMQ's tuples or in mosquitto's acl_file syntax; told apart by the first line that
is no comment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from broker.access.emq_rules import read_tuples
from broker.access.rules import RuleSet, split_filter
from broker.access.text_file import FileError, read_lines, read_text
from broker.config.template import Template
from broker.extend.auth import Action, Rule

_ACCESS: dict[str, tuple[bool, Action]] = {
    "read": (True, "subscribe"),
    "write": (True, "publish"),
    "readwrite": (True, "all"),
    "deny": (False, "all"),
}


def read_rules(path: Path) -> list[Rule]:
    """The rules of a file, in order. Raises FileError with the line of the first thing that cannot be understood.

    A file without any rule denies everything.
    """
    rules = read_tuples(path, read_text(path)) if _syntax(path) == "emq" else _read_mosquitto(path)
    if not rules:
        rules = [Rule(False, "all", source=f"{path.name} (no rules)")]
    try:
        RuleSet(rules)
    except ValueError as error:
        raise FileError(path, 0, str(error)) from None
    return rules


def _syntax(path: Path) -> Literal["emq", "mosquitto"]:
    for _, line in read_lines(path):
        text = line.strip()
        if text and not text.startswith(("%", "#")):
            return "emq" if text.startswith("{") else "mosquitto"
    return "mosquitto"


def _read_mosquitto(path: Path) -> list[Rule]:
    """mosquitto's order: within a user's rules, then within the patterns, denials come first."""
    own: list[Rule] = []
    patterns: list[Rule] = []
    user: str | None = None
    for number, line in read_lines(path):
        text = line.strip()
        if not text or text.startswith(("#", "%")):
            continue
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        if word == "user":
            if not rest:
                raise FileError(path, number, "user: the user name is missing")
            user = rest
        elif word in ("topic", "pattern"):
            (own if word == "topic" else patterns).append(_mosquitto_rule(path, number, word, rest, user))
        else:
            raise FileError(path, number, f"{word!r} is not understood; write user, topic or pattern")
    return _denials_first(own) + _denials_first(patterns)


def _mosquitto_rule(path: Path, number: int, word: str, rest: str, user: str | None) -> Rule:
    access, _, topic = rest.partition(" ")
    if access not in _ACCESS or not topic.strip():
        access, topic = "readwrite", rest
    topic = topic.strip()
    allow, action = _ACCESS[access]
    source = f"{path.name}:{number}"
    try:
        filter = Template.parse(_plain(topic), percent=word == "pattern")
        split_filter(filter)
    except ValueError as error:
        raise FileError(path, number, str(error)) from None
    if word == "pattern":
        return Rule(allow, action, filter, source=source)
    if user is None:  # before the first `user` line: clients without a user name
        return Rule(allow, action, filter, when=_anonymous, source=source)
    return Rule(allow, action, filter, user=user, source=source)


def _plain(topic: str) -> str:
    return topic.replace("${", "$${")


def _anonymous(who: object) -> bool:
    return getattr(who, "username", None) is None


def _denials_first(rules: list[Rule]) -> list[Rule]:
    return [rule for rule in rules if not rule.allow] + [rule for rule in rules if rule.allow]
