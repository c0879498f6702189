"""The gate on the will of a client that connected before a restart: it knows the terms and its own rules."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from broker.access.bans import Kind
from broker.config.template import Template
from broker.extend.auth import Grant, Rule, Verdict
from tests.unit.access.doubles import Fake, instance, settings

WHO = ("c", "u", "127.0.0.1")


def rule(topic: str, allow: bool = True) -> Rule:
    return Rule(allow, "publish", Template.parse(topic, percent=True))


class File(Fake):
    """A backend with rules for everybody."""

    def __init__(self, *rules: Rule) -> None:
        super().__init__(Verdict.IGNORE)
        self.common_rules = rules


async def terms(log: Any, topic: str = "a") -> dict[str, Any]:
    """As they come back from disk."""
    who = (await log()).principal
    found: dict[str, Any] = json.loads(json.dumps(log.gate.will_terms(who, topic, 1, False)))
    return found


def judged(log: Any, kept: dict[str, Any], topic: str = "a", qos: int = 1, retain: bool = False) -> int:
    answer: int = log.gate.may_publish_will(*WHO, kept, topic, qos, retain)
    return answer


GIVEN = Grant(rules=(rule("a"),))


async def test_z12_rights_of_a_backend_last_as_long_as_the_backend(login: Any) -> None:
    log = await login(instance("one", Fake(GIVEN)), instance("two", Fake(Verdict.ALLOW)))
    kept = await terms(log)
    assert judged(log, kept) == 1
    await log.gate.replace(settings(instance("two", Fake(Verdict.ALLOW))))
    assert judged(log, kept) == 0


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ([rule("a")], [rule("a")], 1), ([rule("a")], [rule("b")], 0), ([rule("a")], [rule("a", False), rule("a")], 0),
        ([rule("b")], [rule("b")], 1), ([rule("#", False)], [rule("#", False)], 1), ([rule("b")], [rule("a")], 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", [GIVEN, Grant()])
async def test_z12_a_rule_that_was_taken_away_counts(
    login: Any, before: list[Rule], after: list[Rule], allowed: int, given: Grant
) -> None:
    """Rules of files decide again where they decided; where the backend's own were needed, what was said stands."""
    log = await login(instance("one", Fake(given)), instance("rules", File(*before)), allow_anonymous=False)
    kept = await terms(log)
    await log.gate.replace(settings(instance("one", Fake(given)), instance("rules", File(*after), cache_ttl=1)))
    assert judged(log, kept) == allowed


@pytest.mark.parametrize(("kind", "name"), [("client", "c"), ("user", "u"), ("address", "127.0.0.0/24")])
@pytest.mark.parametrize("superuser", [False, True])
async def test_z12_a_ban_withholds_the_will(login: Any, kind: Kind, name: str, superuser: bool) -> None:
    log = await login(instance("one", Fake(Grant(superuser=superuser, rules=(rule("a"),)))))
    kept = await terms(log)
    assert judged(log, kept) == 1
    log.gate.protection.bans.add(kind, name)
    assert judged(log, kept) == 0
    log.gate.protection.bans.remove(kind, name)
    assert judged(log, kept) == 1


async def test_z12_a_login_that_expired_takes_its_will_with_it(login: Any) -> None:
    log = await login(instance("one", Fake(Grant(rules=(rule("a"),), expires_at=time.time() + 1000))))
    kept = await terms(log)
    assert judged(log, kept) == 1
    assert judged(log, {**kept, "until": time.time() - 1}) == 0


async def test_z12_a_superusers_will_ends_with_its_login_too(login: Any) -> None:
    """While the broker runs, and after a restart."""
    log = await login(instance("one", Fake(Grant(superuser=True, expires_at=time.time() + 1000))))
    who = (await log()).principal
    kept = await terms(log)
    assert (log.gate.may_publish(who, "a"), judged(log, kept)) == (1, 1)
    log.gate.apply(who, Grant(superuser=True, expires_at=time.time() - 1))
    ended = json.loads(json.dumps(log.gate.will_terms(who, "a", 1, False)))
    assert (log.gate.may_publish(who, "a"), log.gate.publishable(who, "a"), judged(log, ended)) == (0, 0, 0)
    assert (log.gate.may_subscribe(who, "a"), log.gate.may_receive(who, "a")) == (0, 0)
    assert judged(log, {"backend": "one", "superuser": True}) == 1, "as written before ends were"


async def test_the_rules_of_the_clients_own_listener_decide(login: Any) -> None:
    log = await login(instance("one", Fake(Verdict.ALLOW)), instance("rules", File(rule("a"))), no_match="deny")
    who = (await log(auth=("one",))).principal
    assert log.gate.will_terms(who, "a", 1, False)["common"] is False
    who = (await log()).principal
    assert log.gate.will_terms(who, "a", 1, False)["common"] is True
