"""Reads rights as EMQ, EMQX and their relatives store them: access numbers, lists of topics, records."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from broker.access.rules import split_filter, within
from broker.config.template import Template
from broker.extend.auth import Action, Client, Rule, note
from broker.runtime.logs import limited

logger = logging.getLogger(__name__)

MAX_RULES = 1_000
"""Rules of one client; a list that is longer is refused."""
_NUMBERS: Mapping[str, Action] = {"1": "subscribe", "2": "publish", "3": "all"}
_ACTIONS: Mapping[str, Action] = {
    "publish": "publish", "subscribe": "subscribe", "all": "all", "pubsub": "all", "pub": "publish", "sub": "subscribe",
}  # fmt: skip
_KNOWN = frozenset(
    {"permission", "action", "topic", "topics", "qos", "retain", "ipaddress", "ipaddr", "username", "clientid", "group"}
)
_left_out = limited(logger, "a stored rule was left out")


class TooManyRules(ValueError):
    """A client has more rules than are looked at."""

    def __init__(self) -> None:
        super().__init__(f"has more than {MAX_RULES} rules")


class BadRule(ValueError):
    """A stored rule cannot be understood."""


def truth(value: object) -> bool:
    """Whether a stored flag says yes: true, the number 1, the texts ``1`` and ``true``. Anything else says no."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.lower() in ("1", "true")
    return value is True or (type(value) is int and value == 1)


def number_rule(topic: object, access: object, source: str) -> list[Rule]:
    """EMQ's form: a topic filter and 1 (subscribe), 2 (publish) or 3 (both)."""
    return _kept(lambda: [one_rule(True, _number(access), topic, source)], source)


def action_rules(topic: object, access: object, source: str) -> list[Rule]:
    """EMQX's form in Redis: a topic filter and ``publish``, ``subscribe``, ``all``, or EMQ's numbers."""
    return _kept(lambda: [one_rule(True, _action(access), topic, source)], source)


def topic_rules(topics: object, action: Action, source: str) -> list[Rule]:
    """Topic filters that are all allowed for one action; None: there are none."""
    if topics is None:
        return []
    if not isinstance(topics, (list, tuple, set, frozenset)):
        topics = [topics]

    def rules(topic: object) -> list[Rule]:
        return _kept(lambda: [one_rule(True, action, topic, source)], source)

    return bounded(rule for topic in topics for rule in rules(topic))


def record_rules(record: object, client: Client, source: str) -> list[Rule]:
    """EMQX 5's form: ``permission``, ``action``, ``topic`` or ``topics``, maybe ``qos``, ``retain``, ``ipaddress``,
    ``username``, ``clientid``, ``group``. Of a denial that cannot be understood everything is denied."""
    if isinstance(record, Mapping) and not _concerns(record, client):
        return []
    return _kept(lambda: _record(record, source), source)


def claim_rules(claim: object, client: Client, source: str) -> list[Rule]:
    """The forms an ``acl`` has in a token or an answer: a list of records, or lists of topics ``pub``, ``sub`` and
    ``all``. None: there are none."""
    if claim is None:
        return []
    if isinstance(claim, Mapping) and not {"permission", "topic", "topics"} & claim.keys():
        wrong = claim.keys() - _ACTIONS.keys()
        if wrong:
            _left_out.warning("%s: %r is no action; there are pub, sub and all", source, sorted(map(str, wrong))[0])
        return bounded(
            rule for name in claim if name in _ACTIONS for rule in topic_rules(claim[name], _ACTIONS[name], source)
        )
    records = claim if isinstance(claim, list) else [claim]
    return bounded(rule for record in records for rule in record_rules(record, client, source))


def strict_rules(records: Iterable[Mapping[str, Any]], source: str) -> list[Rule]:
    """Records as an operator writes them: rules for every client, with conditions on user, client and address. Raises
    ValueError for anything that is not understood."""
    found = []
    for number, record in enumerate(records, 1):
        try:
            who = {name: record.get(name) for name in ("username", "clientid")}
            user, client = (None if name in (None, "$all") else _text(name) for name in who.values())
            address = record.get("ipaddress", record.get("ipaddr"))
            if address == [] or record.get("topics", record.get("topic")) in (None, []):
                raise BadRule("topics and ipaddress name at least one")
            when = None if address is None else within(*_texts(address))
            rules = _record(record, f"{source} {number}", strict=True)
        except ValueError as error:
            raise ValueError(f"{source} {number}: {error}") from None
        found += [replace(rule, user=user, client=client, when=when) for rule in rules]
    return found


def groups_of(value: object) -> frozenset[str]:
    """The groups in a list of texts, or in one text with commas between them; none in anything else."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        return frozenset()
    return frozenset(name.strip() for name in names) - {""}


def bounded(rules: Iterable[Rule]) -> list[Rule]:
    """The rules as a list. Raises TooManyRules."""
    found: list[Rule] = []
    for rule in rules:
        found.append(rule)
        if len(found) > MAX_RULES:
            raise TooManyRules
    return found


def _kept(read: Callable[[], list[Rule]], source: str) -> list[Rule]:
    """What could be read: a permission that cannot be is left out."""
    try:
        return read()
    except _BadDenial as error:
        _left_out.warning("%s: a denial cannot be understood, everything is denied: %s", source, error)
        note(f"{source}: a denial cannot be understood, everything is denied: {error}")
        return [Rule(False, "all", None, source=source)]
    except ValueError as error:
        _left_out.warning("%s: a rule is left out: %s", source, error)
        note(f"{source}: a rule is left out: {error}")
        return []


class _BadDenial(BadRule):
    """A rule that denies, and nobody knows what."""


def _record(record: object, source: str, *, strict: bool = False) -> list[Rule]:
    if not isinstance(record, Mapping):
        raise _BadDenial(f"{type(record).__name__} is no rule")  # it may have been meant as a denial
    permission = _text(record.get("permission"))
    if permission not in ("allow", "deny"):
        raise _BadDenial(f"permission is allow or deny, not {permission[:40]!r}")
    allow = permission == "allow"
    try:
        action = _action(record.get("action", "all"))
        unknown = [str(name) for name in record if name not in _KNOWN and not str(name).startswith("_")]
        if unknown and (allow or strict):
            raise BadRule(f"{unknown[0]!r} is not known here, so nobody knows when the rule is to apply")
        qos, retain = _qos(record.get("qos")), _retain(record.get("retain"))
        group = record.get("group")
        group = None if group is None else _text(group)
        topics = record.get("topics", record.get("topic"))
        if not isinstance(topics, (list, tuple)):
            topics = [topics]
        return [one_rule(allow, action, topic, source, group, qos, retain) for topic in topics]
    except ValueError as error:
        raise (BadRule if allow else _BadDenial)(str(error)) from None


def _concerns(record: Mapping[Any, Any], client: Client) -> bool:
    """Whether the record's conditions hold; one that cannot be understood holds for a denial only."""
    deny = record.get("permission") == "deny"
    for key, value in (("username", client.username), ("clientid", client.clientid)):
        wanted = record.get(key)
        if wanted is None or wanted in (value, "$all"):
            continue
        if isinstance(wanted, str) or not deny:
            return False
    address = record.get("ipaddress", record.get("ipaddr"))
    if address is None:
        return True
    try:
        return within(_text(address))(client)
    except ValueError:
        return deny


def one_rule(
    allow: bool,
    action: Action,
    topic: object,
    source: str,
    group: str | None = None,
    qos: frozenset[int] | None = None,
    retain: bool | None = None,
) -> Rule:
    """A rule for a topic filter, or as text for what follows ``eq``. ValueError."""
    if type(topic) is int:
        raise BadRule("a number stands where a topic filter belongs")
    text = _text(topic)
    exact = text.startswith("eq ")
    filter = _filter(text.removeprefix("eq ").strip() if exact else text, exact)
    return Rule(allow, action, filter, exact, source=source, group=group, qos=qos, retain=retain)


@functools.lru_cache(maxsize=16_384)
def _filter(text: str, exact: bool) -> Template:
    """The same for all who have the rule. ValueError."""
    filter = Template.parse(text, percent=True)
    split_filter(filter, exact=exact)
    return filter


def _number(value: object) -> Action:
    text = _text(value)
    if text not in _NUMBERS:
        raise BadRule(f"access is 1 (subscribe), 2 (publish) or 3 (both), not {text[:40]!r}")
    return _NUMBERS[text]


def _action(value: object) -> Action:
    text = _text(value)
    if text in _NUMBERS:
        return _NUMBERS[text]
    if text not in _ACTIONS:
        raise BadRule(f"the action is publish, subscribe or all, not {text[:40]!r}")
    return _ACTIONS[text]


def _qos(value: object) -> frozenset[int] | None:
    """A list of QoS, a number, or numbers in a text; None: every QoS."""
    if value is None or value == "all":
        return None
    values = value if isinstance(value, (list, tuple)) else _text(value).split(",")
    levels = {_text(one).strip() for one in values}
    if not levels or not levels <= {"0", "1", "2"}:
        raise BadRule(f"qos is a list of 0, 1 and 2, not {str(value)[:40]!r}")
    return None if len(levels) == 3 else frozenset(map(int, levels))


def _retain(value: object) -> bool | None:
    """None: retained or not."""
    if value is None or isinstance(value, bool):
        return value
    text = _text(value).lower()
    if text not in ("0", "1", "true", "false", "all"):
        raise BadRule(f"retain is true, false or all, not {text[:40]!r}")
    return None if text == "all" else text in ("1", "true")


def _texts(value: object) -> list[str]:
    return [_text(one) for one in value] if isinstance(value, (list, tuple)) else [_text(value)]


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise BadRule(f"{type(value).__name__} stands where a text belongs")
