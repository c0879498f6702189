"""Rules for some QoS, for retained messages, for groups: alone, compiled, and through the gate."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from auth._acl import groups_of, record_rules, strict_rules, truth
from broker.access.acl_file import read_rules
from broker.access.explain import explain
from broker.access.principal import Principal
from broker.access.rules import EVERY, PUBLISH, SUBSCRIBE, SUBSCRIPTIONS, RuleSet, allowed
from broker.config.template import Template
from broker.extend.auth import Client, Grant, Rule, Verdict
from tests.servers import PATIENCE
from tests.unit.access.doubles import Fake, instance, settings

QOS0, QOS0_RETAINED, QOS1, QOS1_RETAINED, QOS2, QOS2_RETAINED = (1 << bit for bit in range(6))
ME = Client("c", "u", "10.1.2.3")


def rule(text: str, **more: Any) -> Rule:
    """``allow publish a/#``"""
    verdict, action, topic = text.split(" ", 2)
    return Rule(verdict == "allow", action, Template(topic), **more)  # type: ignore[arg-type]


def may(rules: list[Rule], action: int, topic: str, *, no_match: int = 0, **who: Any) -> int:
    packets = EVERY if action == PUBLISH else SUBSCRIPTIONS
    return allowed([RuleSet(rules)], action, topic, topic.split("/"), Principal("c", "u", **who), packets, no_match)


def test_a_permission_for_some_qos_holds_for_these_only() -> None:
    rules = [rule("allow publish a", qos=frozenset({0, 1})), rule("allow publish b", retain=False)]
    assert may(rules, PUBLISH, "a") == QOS0 | QOS0_RETAINED | QOS1 | QOS1_RETAINED
    assert may(rules, PUBLISH, "b") == QOS0 | QOS1 | QOS2
    assert may(rules, PUBLISH, "a", no_match=1) == EVERY


def test_a_denial_for_some_packets_leaves_the_others_to_the_rules_behind_it() -> None:
    rules = [rule("deny publish a/#", retain=True, qos=frozenset({2})), rule("allow publish a/#")]
    assert may(rules, PUBLISH, "a/b") == EVERY & ~QOS2_RETAINED
    assert may([*rules, rule("deny publish #")], PUBLISH, "a/b") == EVERY & ~QOS2_RETAINED


def test_retain_has_no_meaning_for_subscriptions() -> None:
    rules = [rule("allow all a", retain=True), rule("allow all b", retain=False, qos=frozenset({1}))]
    assert may(rules, SUBSCRIBE, "a") == SUBSCRIPTIONS
    assert may(rules, SUBSCRIBE, "b") == QOS1
    assert may(rules, PUBLISH, "a") == QOS0_RETAINED | QOS1_RETAINED | QOS2_RETAINED


def test_rules_of_a_group_apply_to_its_members() -> None:
    rules = [
        rule("deny publish a/secret", group="guests"),
        rule("allow publish a/#", group="operators"),
        rule("allow publish b", group="operators", user="u"),
        rule("allow publish c", group="operators", user="other"),
        rule("allow publish d", group="operators", client="c"),
    ]
    operator = {"groups": frozenset({"operators", "others"})}
    for topic, can in (("a/x", 1), ("a/secret", 1), ("b", 1), ("c", 0), ("d", 1)):
        assert bool(may(rules, PUBLISH, topic, **operator)) is bool(can), topic
        assert may(rules, PUBLISH, topic) == 0, topic
    assert may(rules, PUBLISH, "a/secret", groups=frozenset({"operators", "guests"})) == 0, "the first rule decides"


def test_compiled_rules_say_what_reading_them_one_by_one_says() -> None:
    """Whatever the order and the shape: each kind of packet is decided by the first rule that concerns it."""
    choice = random.Random(5)
    filters = ["#", "a/#", "a/b", "+/b", "a/+", "a/${username}"]
    for _ in range(400):
        rules = [
            Rule(
                choice.random() < 0.5, choice.choice(("publish", "subscribe", "all")),
                None if choice.random() < 0.1 else Template(choice.choice(filters)),
                user=choice.choice((None, None, "u", "v")), client=choice.choice((None, None, "c", "d")),
                group=choice.choice((None, None, "g", "h")),
                qos=choice.choice((None, None, frozenset({0}), frozenset({1, 2}), frozenset({0, 2}))),
                retain=choice.choice((None, None, True, False)),
            )
            for _ in range(choice.randrange(1, 8))
        ]  # fmt: skip
        who = Principal("c", "u", groups=frozenset({"g"}))
        for action, topic in ((PUBLISH, "a/b"), (PUBLISH, "a/u"), (SUBSCRIBE, "a/+"), (SUBSCRIBE, "a/b")):
            packets = EVERY if action == PUBLISH else SUBSCRIPTIONS
            parts = topic.split("/")
            found = allowed([RuleSet(rules[:3]), RuleSet(rules[3:])], action, topic, parts, who, packets, 0)
            assert found == _one_by_one(rules, action, topic, who, packets), rules


def _one_by_one(rules: list[Rule], action: int, topic: str, who: Principal, packets: int) -> int:
    answer = 0
    for bit in range(6):
        if not packets >> bit & 1:
            continue
        for one in rules:
            if one.action not in ("all", ("publish", "subscribe")[action]):
                continue
            if one.qos is not None and bit >> 1 not in one.qos:
                continue
            if action == PUBLISH and one.retain is not None and one.retain is not bool(bit & 1):
                continue
            if one.user not in (None, who.username) or one.client not in (None, who.clientid):
                continue
            if one.group is not None and one.group not in who.groups:
                continue
            if RuleSet([Rule(True, "all", one.filter)]).find(action, topic, topic.split("/"), who) is not None:
                answer |= one.allow << bit
                break
    return answer


async def test_the_gate_tells_which_packets_may_be_published(login: Any) -> None:
    """Z-29: publishing is allowed, retaining is not."""
    grant = Grant(rules=(rule("deny publish a", retain=True), rule("allow all #", qos=frozenset({0, 1}))))
    log = await login(instance("one", Fake(grant)))
    who = (await log("u")).principal
    assert log.gate.may_publish(who, "a") == 0, "not everything"
    assert log.gate.publishable(who, "a") == QOS0 | QOS1
    assert log.gate.publishable(who, "b") == QOS0 | QOS0_RETAINED | QOS1 | QOS1_RETAINED
    assert [log.gate.may_subscribe(who, "a/#", qos) for qos in (0, 1, 2, None)] == [1, 1, 0, 0]
    assert log.gate.may_receive(who, "a/b") == 1, "the QoS was judged when it subscribed"


async def test_a_superuser_and_rules_without_conditions_need_no_second_question(login: Any) -> None:
    log = await login(
        instance("one", Fake(lambda client, _: Grant(client.username == "root", rules=(rule("allow all a"),))))
    )
    root, user = (await log("root")).principal, (await log("u")).principal
    assert (log.gate.may_publish(root, "x"), log.gate.publishable(root, "x")) == (1, EVERY)
    assert (log.gate.may_publish(user, "a"), log.gate.publishable(user, "a")) == (1, EVERY)
    assert (log.gate.may_publish(user, "x"), log.gate.publishable(user, "x")) == (0, 0)
    assert log.gate.may_subscribe(root, "x", 2) == 1


async def test_groups_come_from_one_backend_and_their_rules_from_another(login: Any) -> None:
    class Rules(Fake):
        common_rules = (rule("allow publish a", group="operators"),)

    def answer(client: Client, _: bytes) -> Grant:
        return Grant(groups=frozenset({"operators"} if client.username == "op" else ()))

    log = await login(instance("rules", Rules(Verdict.IGNORE)), instance("people", Fake(answer)))
    operator, other = (await log("op")).principal, (await log("u")).principal
    assert (log.gate.may_publish(operator, "a"), log.gate.may_publish(other, "a")) == (1, 0)
    assert log.gate.apply(operator, Grant()) is True, "it left the group"
    assert log.gate.may_publish(operator, "a") == 0


async def test_z31_rights_that_cannot_be_read_deny_in_time_and_stop_nobody_else(login: Any) -> None:
    """A certificate's rights that never come end in a refusal; rights that cannot be read again stay what they were."""

    class Hangs(Fake):
        ways: ClassVar[list[Any]] = []

        async def rules(self, client: Client) -> Grant:
            if client.username == "slow":
                await asyncio.sleep(60)
            if self.ways:
                raise self.ways[-1]
            return Grant(rules=(rule("allow publish a"),))

    backend = Hangs(Grant(rules=(rule("allow publish a"),)))
    log = await login(instance("one", backend, timeout=2, refresh=0.001))
    began = time.monotonic()
    slow = asyncio.create_task(log(None, None, "s", username="slow"))
    user = (await log("u")).principal
    assert not slow.done(), "others do not wait"
    assert (await slow).code == 0x88
    assert time.monotonic() - began < 5, "not a minute"
    backend.ways.append(ValueError("injected"))
    await log.gate._refresher.run_due()
    assert (log.gate.may_publish(user, "a"), log.gate.may_publish(user, "b")) == (1, 0)
    assert (await log(None, None, "t", username="other")).code == 0x88


async def test_z31_a_condition_that_raises_denies_and_the_session_goes_on(
    login: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Z-31: on every path; whom the condition does not concern feels nothing, and neither do rules without it."""

    def broken(who: Any) -> bool:
        raise ZeroDivisionError("injected")

    rules = (
        Rule(True, "all", Template("fine/#")),
        Rule(True, "all", Template("odd/#"), when=broken),
        Rule(True, "all", Template("behind/#")),
    )
    log = await login(instance("one", Fake(Grant(rules=rules))), no_match="allow")
    may, user = log.gate, (await log("u", b"secret-pw")).principal
    for topic, answer in (("fine/x", 1), ("behind/x", 1), ("odd/x", 0)):
        assert (may.may_publish(user, topic), may.may_subscribe(user, topic), may.may_receive(user, topic)) == (
            (answer,) * 3
        ), topic
        assert bool(may.publishable(user, topic)) is bool(answer)
        assert may.will_terms(user, topic, 1, False)["common"] is True, "nobody else has a rule about it"
    assert may.counters["undecided"] == 4
    assert "ZeroDivisionError" in caplog.text
    assert "secret-pw" not in caplog.text


@pytest.mark.parametrize("way", ["raises", pytest.param("hangs", marks=pytest.mark.slow)])
async def test_z31_with_the_deadline_as_it_is_shipped(login: Any, way: str) -> None:
    """Z-31: denied within 3 s, and others are served meanwhile."""

    class Backend(Fake):
        async def rules(self, client: Client) -> Grant:
            if client.username != "slow":
                return Grant(rules=(rule("allow publish a"),))
            if way == "raises":
                raise RuntimeError("injected")
            await asyncio.Event().wait()
            raise AssertionError

    people = Fake(Grant(rules=(rule("allow publish b"),)))
    log = await login(instance("one", Backend(Verdict.IGNORE)), instance("people", people))
    there = (await log(None, None, "t", username="other")).principal
    began = time.monotonic()
    slow = [log.start(None, None, f"s{n}", username="slow") for n in range(20)]
    rounds: list[float] = []
    while len(rounds) < 10 or not all(channel.answered.is_set() for channel in slow):
        before = time.monotonic()
        assert (log.gate.may_publish(there, "a"), log.gate.may_publish(there, "b")) == (1, 0)
        assert (await log("u", b"p", "u", auth=("people",))).code == 0, "whom it does not concern"
        rounds.append(time.monotonic() - before)
        await asyncio.sleep(0.05)
        assert time.monotonic() - began < 5, "a second deadline would make it 6"
    assert statistics.median(rounds) < 0.1 * PATIENCE
    assert max(rounds) < 2.5, "nobody waits for the slow ones, which take 3"
    assert {channel.code for channel in slow} == {0x88}
    assert log.gate.may_publish(there, "a") == 1


# --- where they are written ------------------------------------------------------------------------------------------


def test_emq_tuples_have_conditions_on_the_action(tmp_path: Path) -> None:
    path = tmp_path / "acl.conf"
    path.write_text(
        '{allow, all, {publish, [{qos, [0, 1]}, {retain, false}]}, ["a"]}.\n'
        '{allow, all, {subscribe, [{qos, 0}]}, ["a"]}.\n'
        '{allow, {group, "operators"}, {all, [{retain, all}]}, ["b"]}.\n'
        '{allow, {\'and\', [{group, "operators"}, {client, "c"}]}, publish, ["c"]}.\n'
    )
    rules = read_rules(path)
    assert may(rules, PUBLISH, "a") == QOS0 | QOS1
    assert may(rules, SUBSCRIBE, "a") == QOS0
    assert may(rules, PUBLISH, "b") == may(rules, PUBLISH, "c") == 0
    assert may(rules, PUBLISH, "b", groups=frozenset({"operators"})) == EVERY
    assert may(rules, PUBLISH, "c", groups=frozenset({"operators"})) == EVERY


@pytest.mark.parametrize(
    ("record", "publish", "subscribe"),
    [
        ({"qos": [0, 1]}, QOS0 | QOS0_RETAINED | QOS1 | QOS1_RETAINED, QOS0 | QOS1),
        ({"qos": "1"}, QOS1 | QOS1_RETAINED, QOS1),
        ({"qos": 2}, QOS2 | QOS2_RETAINED, QOS2),
        ({"qos": "0,1,2", "retain": "all"}, EVERY, SUBSCRIPTIONS),
        ({"retain": 0}, QOS0 | QOS1 | QOS2, SUBSCRIPTIONS),
        ({"retain": "1"}, QOS0_RETAINED | QOS1_RETAINED | QOS2_RETAINED, SUBSCRIPTIONS),
        ({"retain": False, "qos": b"0"}, QOS0, QOS0),
        ({"group": "g"}, 0, 0),
        ({"qos": "3"}, 0, 0),
        ({"qos": []}, 0, 0),
        ({"retain": "maybe"}, 0, 0),
        ({"when": "monday"}, 0, 0),
        ({"ipaddress": "10.0.0.0/8"}, EVERY, SUBSCRIPTIONS),
        ({"ipaddress": "11.0.0.0/8"}, 0, 0),
    ],
)
def test_stored_permissions_hold_for_what_they_say(record: dict[str, Any], publish: int, subscribe: int) -> None:
    rules = record_rules({"permission": "allow", "action": "all", "topic": "a", **record}, ME, "row 1")
    assert may(rules, PUBLISH, "a") == publish
    assert may(rules, SUBSCRIBE, "a") == subscribe


def test_a_stored_denial_for_some_qos_denies_these_and_one_that_is_not_understood_everything() -> None:
    denied = record_rules({"permission": "deny", "action": "publish", "topic": "a", "qos": [2]}, ME, "row 1")
    assert may([*denied, rule("allow publish #")], PUBLISH, "a") == EVERY & ~QOS2 & ~QOS2_RETAINED
    broken = record_rules({"permission": "deny", "action": "publish", "topic": "a", "qos": "x"}, ME, "row 1")
    assert may([*broken, rule("allow publish #")], PUBLISH, "b") == 0


@pytest.mark.parametrize(
    ("record", "say"),
    [
        ({"permission": "allow", "topics": ["a"], "clientId": "x"}, "clientId"),
        ({"permission": "deny", "topics": ["a"], "clientId": "x"}, "clientId"),
        ({"permission": "permit", "topics": ["a"]}, "permit"),
        ({"permission": "allow", "topics": ["a/#/b"]}, "last level"),
        ({"permission": "allow", "topics": ["a"], "ipaddress": "10.0.0.300"}, "10.0.0.300"),
        ({"permission": "allow", "topics": ["a"], "ipaddress": []}, "ipaddress"),
        ({"permission": "deny", "topics": []}, "topics"),
        ({"permission": "allow", "topics": ["a"], "username": 7.5}, "float"),
    ],
)
def test_a_rule_in_the_configuration_that_is_not_understood_is_an_error(record: dict[str, Any], say: str) -> None:
    with pytest.raises(ValueError, match=r"^rules 2: .*" + say):
        strict_rules([{"permission": "allow", "topics": ["ok"]}, record], "rules")


@pytest.mark.parametrize("value", ["false", "0", " ", "", 0, None, [], {}, "yes", 2, 1.0, b"false", "t"])
def test_z22_only_one_and_true_make_a_superuser(value: object) -> None:
    """Z-22: no other text, number or list is true."""
    assert truth(value) is False


@pytest.mark.parametrize(
    ("value", "groups"),
    [
        ("a,b", {"a", "b"}), (b" a , b,", {"a", "b"}), (["a", "b"], {"a", "b"}), ("", set()), (None, set()), (7, set()),
        (["a", 7], set()), ({"a": 1}, set()),
    ],
)  # fmt: skip
def test_groups_are_names(value: object, groups: set[str]) -> None:
    assert groups_of(value) == groups


# --- how it is explained ---------------------------------------------------------------------------------------------


async def test_the_explanation_names_the_packets_a_rule_concerns() -> None:
    rules = (rule("deny publish a", retain=True, source="r1"), rule("allow publish a", qos=frozenset({0}), source="r2"))
    table = settings(instance("one", Fake(Grant(rules=rules))))

    async def ask(**more: Any) -> tuple[list[str], str]:
        told = await explain(table, username="u", password=b"p", clientid="c", publish="a", **more)
        return list(told.lines[3:]), told.verdict

    lines, verdict = await ask()
    assert verdict == "deny"
    assert lines == [
        "auth.one: r1: deny publish a retained: applies",
        "auth.one: r2: allow publish a at QoS 0: applies",
        "publish to a: deny, no rule applies to QoS 1 not retained, QoS 2 not retained and [access] no_match is deny",
    ]
    lines, verdict = await ask(qos=0, retain=False)
    assert verdict == "allow"
    assert lines[-1] == "publish to a: allow"
    lines, verdict = await ask(qos=0)
    assert verdict == "deny"
    assert lines[-1] == "publish to a: deny, allowed is QoS 0 not retained"
