"""Which rule decides."""

from __future__ import annotations

import time

import pytest

from broker.access.gate import AccessGate
from broker.access.principal import Principal
from broker.access.rules import PUBLISH, SUBSCRIBE, RuleSet, split_filter, without_share
from broker.config.template import Template
from broker.extend.auth import Rule


def rule(text: str, *, exact: bool = False, **more: object) -> Rule:
    """``allow publish a/#``"""
    verdict, action, topic = text.split(" ", 2)
    return Rule(verdict == "allow", action, Template.parse(topic, percent=True), exact, **more)  # type: ignore[arg-type]


def decide(
    rules: list[Rule], action: int, topic: str, clientid: str = "c1", username: str | None = "u1", **more: object
) -> bool | None:
    subject = Principal(clientid, username, **more)  # type: ignore[arg-type]
    found = RuleSet(rules).find(action, topic, topic.split("/"), subject)
    return None if found is None else bool(found.allow)


def test_z01_nothing_matches() -> None:
    """Z-01: and then it is denied."""
    assert decide([rule("allow publish a/b")], PUBLISH, "a/c") is None
    assert decide([], SUBSCRIBE, "a") is None


def test_the_first_rule_that_matches_decides_whatever_its_shape() -> None:
    rules = [rule("deny publish a/+/c"), rule("allow publish a/#"), rule("deny publish a/b/d"), rule("deny all #")]
    assert decide(rules, PUBLISH, "a/x/c") is False
    assert decide(rules, PUBLISH, "a/b/d") is True
    assert decide(rules, PUBLISH, "a") is True
    assert decide(rules, PUBLISH, "b") is False
    assert decide(rules, SUBSCRIBE, "a/b") is False


@pytest.mark.parametrize(
    ("filter", "topic", "matches"),
    [
        ("#", "a/b", True), ("#", "$SYS/x", False), ("+/x", "$SYS/x", False), ("$SYS/#", "$SYS/x", True),
        ("a/+", "a/", True), ("a/+", "a", False), ("+", "", True), ("a//b", "a//b", True), ("+/+", "/a", True),
        ("a/#", "a", True), ("a/+/#", "a", False), ("a/+/#", "a/b", True), ("a", "a/", False),
    ],
)  # fmt: skip
def test_filters_match_as_mqtt_says(filter: str, topic: str, matches: bool) -> None:
    assert (decide([rule(f"allow publish {filter}")], PUBLISH, topic) is True) is matches


@pytest.mark.parametrize(
    ("wanted", "granted"), [("a/#", False), ("#", False), ("+/b", False), ("+/+", False), ("a/b", True), ("a/+", True)]
)
def test_z08_a_subscription_needs_a_rule_that_contains_it(wanted: str, granted: bool) -> None:
    """Z-08: containing is more than matching."""
    assert (decide([rule("allow subscribe a/+")], SUBSCRIBE, wanted) is True) is granted


@pytest.mark.parametrize(
    ("rule_filter", "wanted", "contained"),
    [
        ("#", "#", True), ("#", "+/x", True), ("#", "$SYS/#", False), ("$SYS/#", "$SYS/+/x", True),
        ("a/#", "a/#", True),
        ("a/#", "a", True), ("a/+/#", "a/#", False), ("+/b", "a/b", True), ("+/b", "+/+", False), ("+", "#", False),
        ("a/${username}/#", "a/+/#", False), ("a/${username}/#", "a/u1/#", True), ("a/${username}/#", "a/u2/#", False),
    ],
)  # fmt: skip
def test_containment(rule_filter: str, wanted: str, contained: bool) -> None:
    assert (decide([rule(f"allow subscribe {rule_filter}")], SUBSCRIBE, wanted) is True) is contained


@pytest.mark.parametrize("identity", ["+", "#", "a/+", "a/#", "/", "", "a\0b", "a/b"])
def test_z03_an_identity_with_wildcards_makes_the_rule_not_apply(identity: str) -> None:
    """Z-03: on every path, and it is told."""
    told: list[tuple[str, str]] = []

    def audit(principal: Principal, name: str, value: str) -> None:
        told.append((name, value))

    for filter in ("dev/%c/#", "dev/x-${clientid}/y"):
        for topic in (
            f"dev/{identity}/x",
            "dev/anything/x",
            "dev/#",
            "dev/+/x",
            f"dev/{identity}/#",
            f"dev/x-{identity}/y",
        ):
            for action in (PUBLISH, SUBSCRIBE):
                assert decide([rule(f"allow all {filter}")], action, topic, clientid=identity, audit=audit) is None
                filter_by_name = filter.replace("%c", "%u").replace("clientid", "username")
                assert (
                    decide([rule(f"allow all {filter_by_name}")], action, topic, username=identity, audit=audit) is None
                )
    assert (("clientid", identity) in told) is bool(identity)


def test_a_value_cannot_reach_system_topics() -> None:
    assert decide([rule("allow subscribe ${username}/#")], SUBSCRIBE, "$SYS/#", username="$SYS") is None
    assert decide([rule("allow subscribe a/${username}")], SUBSCRIBE, "a/$SYS", username="$SYS") is True


@pytest.mark.parametrize("identity", [".*", "a|b", "(", "(a*)*$", "\\", "[", "a.c"])
def test_z04_values_are_literals_and_matching_takes_linear_time(identity: str) -> None:
    """Z-04: nothing in them is a pattern."""
    rules = [rule("allow publish dev/${clientid}/x")]
    assert decide(rules, PUBLISH, f"dev/{identity}/x", clientid=identity) is True
    for other in ("abc", "a", "b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"):
        assert decide(rules, PUBLISH, f"dev/{other}/x", clientid=identity) is None


def test_z04_many_levels_and_wildcards_stay_cheap() -> None:
    rules = [rule("deny publish " + "/".join("+" if at != n else "x" for at in range(60)) + "/end") for n in range(60)]
    subject = Principal("c", "u")
    compiled = RuleSet(rules)
    parts = ["a"] * 127
    began = time.process_time()
    for _ in range(10):
        assert compiled.find(PUBLISH, "/".join(parts), parts, subject) is None
    assert time.process_time() - began < 1


def test_z05_a_rule_with_user_name_does_not_apply_to_anonymous_clients() -> None:
    """Z-05: and nothing is raised."""
    rules = [rule("allow publish a/${username}"), rule("allow publish b", user="u1")]
    for topic in ("a/", "a/None", "a/u1", "b"):
        assert decide(rules, PUBLISH, topic, username=None) is None


@pytest.mark.parametrize("name", ["${clientid}", "%c", "%u"])
def test_z06_values_are_not_expanded_again(name: str) -> None:
    """Z-06: a name that looks like a placeholder is a name."""
    rules = [rule("allow publish a/${username}")]
    assert decide(rules, PUBLISH, "a/c1", username=name) is None
    assert decide(rules, PUBLISH, f"a/{name}", username=name) is True


def test_eq_means_the_text_itself() -> None:
    rules = [rule("deny subscribe #", exact=True), rule("allow subscribe #"), rule("deny publish a/+", exact=True)]
    assert decide(rules, SUBSCRIBE, "#") is False
    assert decide(rules, SUBSCRIBE, "a/#") is True
    assert decide(rules, PUBLISH, "a/b") is None
    mine = [rule("allow subscribe ${username}/+", exact=True)]
    assert decide(mine, SUBSCRIBE, "u1/+") is True
    assert decide(mine, SUBSCRIBE, "u1/x") is None


def test_conditions_on_user_client_and_address() -> None:
    rules = [
        rule("deny publish a", user="u1", client="c2"),
        rule("allow publish a", user="u1"),
        rule("deny publish b", client="c1"),
        rule("allow publish #", when=lambda who: who.peerhost == "10.0.0.1"),
    ]
    assert decide(rules, PUBLISH, "a") is True
    assert decide(rules, PUBLISH, "a", clientid="c2") is False
    assert decide(rules, PUBLISH, "b", peer="10.0.0.1:9") is False
    assert decide(rules, PUBLISH, "b", clientid="c3", peer="10.0.0.1:9") is True
    assert decide(rules, PUBLISH, "b", clientid="c3", peer="10.0.0.2:9") is None


def test_attributes_and_certificate_stand_in_topics() -> None:
    rules = [rule("allow publish ${attr.Line}/x"), rule("allow publish by/${cert_common_name}")]
    assert decide(rules, PUBLISH, "7/x", attributes={"line": "7"}) is True
    assert decide(rules, PUBLISH, "7/x") is None
    assert decide(rules, PUBLISH, "by/d1", certificate={"cert_common_name": "d1"}) is True


@pytest.mark.parametrize(
    "filter", ["ie#", "a/#/b", "a+/b", "a/b+", "${nonsense}/x", "a/${payload.x}", "dev/${clientid}+"]
)
def test_a_filter_that_is_none_is_refused_with_its_place(filter: str) -> None:
    with pytest.raises(ValueError, match=r"acl\.conf:3: "):
        RuleSet([rule(f"allow publish {filter}", source="acl.conf:3")])


def test_an_empty_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        split_filter(Template.parse(""))


def test_z10_a_shared_subscription_is_decided_by_its_filter() -> None:
    """Z-10: whatever the group."""
    assert without_share("$share/g/a/#") == "a/#"
    assert without_share("$sharex/g/a") == "$sharex/g/a"
    gate = AccessGate()
    principal = Principal("c", "u")
    principal.generation = gate.generation
    principal.sources = (RuleSet([rule("deny subscribe denied"), rule("allow subscribe #")]),)
    assert gate.may_subscribe(principal, "$share/g/denied") == 0
    assert gate.may_subscribe(principal, "$share/g/allowed") == 1


def test_z09_a_denied_topic_inside_a_granted_filter_is_never_received() -> None:
    """Z-09: although the filter was granted."""
    gate = AccessGate()
    principal = Principal("c", "u")
    principal.generation = gate.generation
    principal.sources = (
        RuleSet([rule("deny subscribe a/secret"), rule("deny subscribe +/secret/#"), rule("allow subscribe a/#")]),
    )
    assert gate.may_subscribe(principal, "a/#") == 1
    assert gate.may_receive(principal, "a/open") == 1
    assert gate.may_receive(principal, "a/secret") == 0
    assert gate.may_receive(principal, "a/secret/deeper") == 0
    assert gate.may_subscribe(principal, "a/secret") == 0


def test_order_is_kept_between_rules_of_one_user_and_rules_of_all() -> None:
    rules = [
        rule("allow publish a", user="u1"),
        rule("deny publish a"),
        rule("allow publish b"),
        rule("deny publish b", user="u1"),
    ]
    assert decide(rules, PUBLISH, "a") is True
    assert decide(rules, PUBLISH, "a", username="u2") is False
    assert decide(rules, PUBLISH, "b") is True


def test_many_placeholders_at_one_level() -> None:
    rules = [rule(f"allow publish d{n}-${{clientid}}/x") for n in range(50)]
    assert decide(rules, PUBLISH, "d49-c1/x") is True
    assert decide(rules, PUBLISH, "d50-c1/x") is None
    assert decide(rules, PUBLISH, "d1-c2/x") is None
    assert decide(rules, PUBLISH, "d1-#/x", clientid="#") is None


def test_the_cost_of_a_miss_does_not_grow_with_the_number_of_rules() -> None:
    subject = Principal("c1", "u1")
    parts = ["plant", "7", "u1", "other", "temperature"]
    topic = "/".join(parts)

    def best(count: int) -> float:
        compiled = RuleSet([rule(f"allow publish plant/{n}/${{username}}/${{clientid}}/#") for n in range(count)])
        return min(_time(compiled, topic, parts, subject) for _ in range(5))

    assert best(1_000) < 10 * best(10)  # going through them one by one would cost 100 times as much


def _time(compiled: RuleSet, topic: str, parts: list[str], subject: Principal) -> float:
    began = time.perf_counter()
    for _ in range(200):
        assert compiled.find(PUBLISH, topic, parts, subject) is None
    return (time.perf_counter() - began) / 200
