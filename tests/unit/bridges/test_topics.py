"""Topic lines: matching and renaming."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bridges._mqtt_topics import Routes, matches
from tests.unit.bridges.fakes import line


@pytest.mark.parametrize(
    ("filter", "topic", "covered"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("+/+", "/", True),
    ],
)
def test_filters_cover_what_mqtt_says(filter: str, topic: str, covered: bool) -> None:
    assert matches(filter.split("/"), topic) is covered


def name(routes: Routes, topic: str) -> str | None:
    found = routes.find(topic.encode())
    return found.topic.decode() if found else None


def test_prefixes_are_exchanged_both_ways() -> None:
    lines = (line("t/#", direction="both", local_prefix="here/", remote_prefix="there/"),)
    assert name(Routes(lines, outward=True), "here/t/1") == "there/t/1"
    assert name(Routes(lines, outward=False), "there/t/1") == "here/t/1"
    assert name(Routes(lines, outward=True), "t/1") is None


def test_an_empty_filter_renames_one_topic() -> None:
    lines = (line("", local_prefix="a/b", remote_prefix="c"),)
    assert name(Routes(lines, outward=True), "a/b") == "c"
    assert name(Routes(lines, outward=True), "a/b/c") is None


def test_the_first_line_decides() -> None:
    routes = Routes((line("a/#", 1, remote_prefix="one/"), line("#", 2, remote_prefix="two/")), outward=True)
    assert name(routes, "a/x") == "one/a/x"
    assert name(routes, "b") == "two/b"
    found = routes.find(b"a/x")
    assert found is not None
    assert found.qos == 1


def test_lines_of_the_other_direction_do_not_count() -> None:
    assert not Routes((line("a", direction="in"),), outward=True)
    assert Routes((line("a", direction="in"),), outward=False)


def test_b08_no_prefix_leads_into_system_topics() -> None:
    routes = Routes((line("#", direction="in", remote_prefix="x/"),), outward=False)
    assert name(routes, "x/$CONTROL/dynamic-security/v1") is None
    assert name(routes, "x/") is None
    assert name(routes, "x/a") == "a"
    asked = Routes((line("$SYS/#", direction="in", local_prefix="far/"),), outward=False)
    assert name(asked, "$SYS/uptime") == "far/$SYS/uptime"


def test_b08_a_name_that_gets_too_long_does_not_cross() -> None:
    routes = Routes((line("#", remote_prefix="p" * 100 + "/"),), outward=True)
    assert name(routes, "a" * 65_500) is None
    assert name(routes, "a" * 65_000) is not None


def test_a_name_a_strict_broker_refuses_does_not_cross() -> None:
    routes = Routes((line("#"),), outward=True)
    assert name(routes, "a\x01") is None


def test_the_memory_of_routes_is_bounded() -> None:
    routes = Routes((line("#"),), outward=True)
    for number in range(20_010):
        routes.find(b"t/%d" % number)
    assert len(routes._known) <= 20_000
    assert name(routes, "t/1") == "t/1"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"filter": "a/#/b"}, "last level"),
        ({"filter": "a+"}, "whole level"),
        ({"filter": "a", "local_prefix": "+/"}, "wildcard"),
        ({"filter": ""}, "local_prefix and remote_prefix"),
        ({"filter": "$share/g/a"}, "shared"),
        ({"filter": "a", "qos": 3}, "less than or equal to 2"),
    ],
)
def test_a_line_that_cannot_work_is_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        line(**{"qos": 1, **keys})  # type: ignore[arg-type]
