"""EMQ's acl.conf: Erlang tuples such as ``{allow, {user, "dashboard"}, subscribe, ["$SYS/#"]}.``"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker.access.rules import split_filter, within
from broker.access.text_file import FileError
from broker.config.template import Template
from broker.extend.auth import Action, Identity, Rule

Condition = Callable[[Identity], bool]

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|%[^\n]*)|(?P<mark><<|>>|[{}\[\],.])|(?P<string>"(?:[^"\\]|\\.)*")"""
    r"""|(?P<quoted>'(?:[^'\\\n]|\\.)*')|(?P<atom>[a-z][A-Za-z0-9_@]*)|(?P<number>-?\d+)""",
    re.DOTALL,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "s": " ", "0": "\0"}
_ACTIONS: dict[str, Action] = {"publish": "publish", "subscribe": "subscribe", "pubsub": "all", "all": "all"}
_LITERAL = re.compile(r"\^([A-Za-z0-9_@-]+)\$")
"""A regular expression that one text matches."""
_DEPTH = 16
_WHO = "WHO is all, {user, …}, {client, …}, {group, …}, {ipaddr, …}, {'and', […]} or {'or', […]}"


class _Atom(str):
    """A bare word, as opposed to a string."""

    __slots__ = ()


class _Tuple(list[Any]):
    """``{a, b}``, as opposed to ``[a, b]``."""

    __slots__ = ()


def read_tuples(path: Path, text: str) -> list[Rule]:
    """The rules of an acl.conf, in order; FileError with the line of the first one that is not understood."""
    parser = _Parser(path, text)
    rules = []
    while not parser.at_end():
        line = parser.line
        term = parser.term()
        parser.expect(".")
        try:
            rules.extend(_rules(term, f"{path.name}:{line}"))
        except ValueError as error:
            raise FileError(path, line, str(error)) from None
    return rules


class _Parser:
    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.tokens: list[tuple[str, str, int]] = []
        position, line = 0, 1
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise FileError(path, line, f"{text[position : position + 12].splitlines()[0]!r} is not understood")
            if match.lastgroup != "space":
                self.tokens.append((match.lastgroup or "", match[0], line))
            line += match[0].count("\n")
            position = match.end()
        self.end = line
        self.at = 0

    @property
    def line(self) -> int:
        return self.tokens[self.at][2] if self.at < len(self.tokens) else self.end

    def at_end(self) -> bool:
        return self.at >= len(self.tokens)

    def next(self) -> tuple[str, str, int]:
        if self.at_end():
            raise FileError(self.path, self.end, "the file ends in the middle of a rule; a rule ends with a full stop")
        token = self.tokens[self.at]
        self.at += 1
        return token

    def expect(self, mark: str) -> None:
        kind, text, line = self.next()
        if kind != "mark" or text != mark:
            raise FileError(self.path, line, f"expected {mark!r} before {text[:20]!r}")

    def term(self, depth: int = 0) -> Any:
        kind, text, line = self.next()
        if depth > _DEPTH:
            raise FileError(self.path, line, "nested too deeply")
        if kind == "string":
            return _unescape(text)
        if kind == "atom":
            return _Atom(text)
        if kind == "quoted":
            return _Atom(_unescape(text))
        if kind == "number":
            return int(text) if len(text) < 20 else 0
        if text == "<<":
            inner = self.term(depth + 1)
            self.expect(">>")
            return inner
        if text == "{":
            return _Tuple(self._items("}", depth))
        if text == "[":
            return self._items("]", depth)
        raise FileError(self.path, line, f"{text!r} is out of place")

    def _items(self, end: str, depth: int) -> list[Any]:
        items: list[Any] = []
        if not self.at_end() and self.tokens[self.at][1] == end:
            self.at += 1
            return items
        while True:
            items.append(self.term(depth + 1))
            kind, text, line = self.next()
            if kind == "mark" and text == end:
                return items
            if kind != "mark" or text != ",":
                raise FileError(self.path, line, f"expected ',' or {end!r} before {text[:20]!r}")


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), text[1:-1], flags=re.DOTALL)


def _rules(term: Any, source: str) -> list[Rule]:
    if not isinstance(term, _Tuple) or not 2 <= len(term) <= 4:
        raise ValueError("a rule is {allow|deny, WHO}. or {allow|deny, WHO, publish|subscribe|pubsub, [TOPICS]}.")
    if term[0] not in ("allow", "deny") or not isinstance(term[0], _Atom):
        raise ValueError(f"a rule begins with allow or deny, not {_show(term[0])}")
    allow = term[0] == "allow"
    user, client, group, when = _who(term[1])
    action, qos, retain = _action(term[2]) if len(term) >= 3 else ("all", None, None)

    def rule(filter: Template | None, exact: bool = False) -> Rule:
        return Rule(allow, action, filter, exact, user, client, when, source, group, qos, retain)

    if len(term) < 4 or (isinstance(term[3], _Atom) and term[3] == "all"):
        return [rule(None)]
    if not isinstance(term[3], list) or isinstance(term[3], _Tuple) or not term[3]:
        raise ValueError('topics are a list of filters, e.g. ["a/#", {eq, "#"}]')
    rules = []
    for topic in term[3]:
        exact = isinstance(topic, _Tuple) and len(topic) == 2 and topic[0] == "eq"
        text = topic[1] if exact else topic
        if not isinstance(text, str) or isinstance(text, _Atom):
            raise ValueError(f'a topic is a text or {{eq, "TEXT"}}, not {_show(topic)}')
        filter = Template.parse(text, percent=True)
        split_filter(filter, exact=exact)
        rules.append(rule(filter, exact))
    return rules


def _action(term: Any) -> tuple[Action, frozenset[int] | None, bool | None]:
    """``publish``, or ``{publish, [{qos, [0, 1]}, {retain, false}]}``."""
    conditions: Any = []
    if isinstance(term, _Tuple) and len(term) == 2 and type(term[1]) is list:
        term, conditions = term
    if not isinstance(term, _Atom) or term not in _ACTIONS:
        raise ValueError(
            f"the action is publish, subscribe, pubsub or all, or {{publish, [{{qos, 0}}, {{retain, false}}]}}, "
            f"not {_show(term)}"
        )
    qos: frozenset[int] | None = None
    retain: bool | None = None
    for condition in conditions:
        kind, value = condition if isinstance(condition, _Tuple) and len(condition) == 2 else (None, None)
        levels: list[Any] = value if type(value) is list else [value]
        if kind == "qos" and levels and all(type(one) is int and 0 <= one <= 2 for one in levels):
            qos = frozenset(levels)
        elif kind == "retain" and isinstance(value, _Atom) and value in ("true", "false", "all"):
            retain = None if value == "all" else value == "true"
        else:
            raise ValueError(
                f"an action's conditions are {{qos, 0}}, {{qos, [0, 1]}} and {{retain, true}}, not {_show(condition)}"
            )
    return _ACTIONS[term], qos, retain


def _who(term: Any) -> tuple[str | None, str | None, str | None, Condition | None]:
    """User name, client id, group, condition: the first three are kept apart because rules are looked up by them."""
    term = _literal(term)
    if isinstance(term, _Tuple) and len(term) == 2 and isinstance(term[1], str) and not isinstance(term[1], _Atom):
        if term[0] in ("user", "username"):
            return _name(term[1]), None, None, None
        if term[0] in ("client", "clientid"):
            return None, _name(term[1]), None, None
        if term[0] == "group":
            return None, None, _name(term[1]), None
    return None, None, None, _condition(term)


def _literal(term: Any) -> Any:
    """``{username, {re, "^dashboard$"}}``, as EMQX 5's own acl.conf has it, names one user."""
    inner = term[1] if isinstance(term, _Tuple) and len(term) == 2 else None
    if isinstance(inner, _Tuple) and len(inner) == 2 and inner[0] == "re" and isinstance(inner[1], str):
        match = _LITERAL.fullmatch(inner[1])
        return _Tuple([term[0], match[1]]) if match else term
    return term


def _name(text: str) -> str:
    if not text:
        raise ValueError("the name is empty")
    if "%" in text or "${" in text:
        raise ValueError(f"{text!r}: there are no placeholders in WHO, only in topics")
    return text


def _condition(term: Any) -> Condition | None:
    """None: everybody."""
    term = _literal(term)
    if isinstance(term, _Atom) and term == "all":
        return None
    if not isinstance(term, _Tuple) or len(term) < 2 or not isinstance(term[0], _Atom):
        raise ValueError(f"{_show(term)} is not understood; {_WHO}")
    kind = str(term[0])
    if kind in ("and", "or"):
        inner = term[1:] if len(term) > 2 or not isinstance(term[1], list) or isinstance(term[1], _Tuple) else term[1]
        if not inner:
            raise ValueError(f"{kind} needs at least one condition")
        return _combine(kind, [_condition(one) for one in inner])
    if len(term) != 2:
        raise ValueError(f"{_show(term)} is not understood")
    value = term[1]
    if kind in ("user", "username", "client", "clientid", "group"):
        if isinstance(value, _Atom) and value == "all" and kind != "group":
            return None
        if isinstance(value, _Tuple):
            raise ValueError("regular expressions are not supported; name the users, or use a placeholder in the topic")
        if not isinstance(value, str) or isinstance(value, _Atom):
            raise ValueError(f"{_show(value)} is not a name in quotes")
        name = _name(value)
        if kind == "group":
            return lambda who: name in getattr(who, "groups", ())
        return _equals("username" if kind.startswith("user") else "clientid", name)
    if kind in ("ipaddr", "ipaddrs"):
        values = value if isinstance(value, list) and not isinstance(value, _Tuple) else [value]
        return _within(values)
    raise ValueError(f"{kind} is not understood; {_WHO}")


def _within(values: list[Any]) -> Condition:
    for value in values:
        if not isinstance(value, str) or isinstance(value, _Atom):
            raise ValueError(f"{_show(value)} is not an address in quotes")
        try:
            within(value)
        except ValueError:
            raise ValueError(f'{value!r} is not an address such as "127.0.0.1" or "10.0.0.0/8"') from None
    return within(*values)


def _equals(attribute: str, value: str) -> Condition:
    return lambda who: getattr(who, attribute) == value


def _combine(kind: str, conditions: list[Condition | None]) -> Condition | None:
    real = [condition for condition in conditions if condition is not None]
    if kind == "or" and len(real) < len(conditions):
        return None  # one of them is everybody
    if not real:
        return None
    quantifier = all if kind == "and" else any
    return lambda who: quantifier(condition(who) for condition in real)


def _show(term: Any) -> str:
    return repr(str(term))[:60]
