"""Bridges over which messages could run in a circle are named before one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker.config.loops import intersection
from broker.config.settings import Settings

LISTENER = '[access]\nallow_anonymous = true\n[listeners.tcp]\nbind = "127.0.0.1:1883"\n'

Load = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _backends() -> None:
    """The real bridge, not the double of this folder's other tests."""


def bridge(name: str, server: str, *lines: str, more: str = "") -> str:
    """A bridge whose lines are ``DIRECTION FILTER LOCAL_PREFIX REMOTE_PREFIX``; - is an empty prefix."""
    text = f'[bridges.{name}]\nkind = "mqtt"\nservers = ["{server}"]\n{more}\n'
    for line in lines:
        direction, topics, local, remote = ("" if part == "-" else part for part in line.split())
        text += f'[[bridges.{name}.topics]]\ndirection = "{direction}"\nfilter = "{topics}"\n'
        text += f'local_prefix = "{local}"\nremote_prefix = "{remote}"\n'
    return text


def circles(load: Load, *bridges: str) -> list[str]:
    """The warnings, without where they stand."""
    return [warning.partition(": ")[2] for warning in load(a=LISTENER + "".join(bridges)).warnings]


HQ = "mqtt://hq.example"


@pytest.mark.parametrize(
    "lines",
    [
        ("both a/# - -",),
        ("out a/# - r/", "in b/# - r/"),
        ("out a/# - r/", "in # - r/"),
        ("both # - r/",),
    ],
)
def test_one_bridge_alone_makes_no_circle(load: Load, lines: tuple[str, ...]) -> None:
    """B-06: the other broker returns nothing to it, and what came in over it does not go out over it."""
    assert circles(load, bridge("hq", HQ, *lines)) == []


def test_b06_what_one_bridge_sends_and_another_brings_back_runs_in_a_circle(load: Load) -> None:
    found = circles(load, bridge("hq", HQ, "out a/# - r/"), bridge("other", f"{HQ}:1883", "in # - r/"))
    assert found == [
        "bridges.hq: messages may run in a circle: what it sends as r/a/# comes back over bridges.other as a/# and is "
        'sent again; protocol = "5" on all of them ends that, older versions cannot'
    ]


def test_b06_topics_that_grow_on_their_way_are_a_circle_too(load: Load) -> None:
    (found,) = circles(load, bridge("hq", HQ, "out # - -"), bridge("other", HQ, "in # far/ -"))
    assert "comes back over bridges.other as far/# and is sent again" in found


def test_b06_a_ring_over_two_other_brokers_is_found(load: Load) -> None:
    """hq brings a/ back as b/, which goes to the plant and comes back as a/."""
    ring = (
        bridge("hq-out", HQ, "out # a/ x/"),
        bridge("hq-in", HQ, "in # b/ x/"),
        bridge("plant-out", "mqtt://plant", "out # b/ y/"),
        bridge("plant-in", "mqtt://plant", "in # a/ y/"),
    )
    (found,) = circles(load, *ring)
    assert found.startswith("bridges.hq-out: ")
    assert "over bridges.hq-in and bridges.plant-out and bridges.plant-in as a/#" in found
    assert circles(load, *ring[:3]) == []


@pytest.mark.parametrize(
    "bridges",
    [
        (bridge("hq", HQ, "out a/# - -"), bridge("other", HQ, "in b/# - -")),
        (bridge("hq", HQ, "out a/# - r/"), bridge("other", HQ, "in a/# - s/")),
        (bridge("hq", HQ, "out # a/ -"), bridge("other", HQ, "in # b/ -")),
        (bridge("hq", HQ, "out a/# - -"), bridge("other", "mqtt://plant", "in a/# - -")),
        (bridge("hq", HQ, "out a/# - -"), bridge("other", f"{HQ}:1884", "in a/# - -")),
        (bridge("hq", HQ, "out a/# - -"), bridge("other", HQ, "out a/# - -")),
        (bridge("hq", HQ, "out # - -"), bridge("other", HQ, "in $SYS/# - -")),
    ],
)
def test_bridges_that_share_no_topic_or_no_broker_are_not_warned_about(load: Load, bridges: tuple[str, ...]) -> None:
    assert circles(load, *bridges) == []


def test_links_of_mqtt_5_end_a_circle_by_themselves(load: Load) -> None:
    def pair(one: str, other: str) -> list[str]:
        first = bridge("hq", HQ, "out a/# - -", more=f'protocol = "{one}"')
        return circles(load, first, bridge("other", HQ, "in a/# - -", more=f'protocol = "{other}"'))

    assert pair("5", "5") == []
    assert len(pair("5", "auto")) == len(pair("3.1.1", "5")) == 1


def test_a_bridge_to_this_broker_itself_is_named(load: Load) -> None:
    (found,) = circles(load, bridge("self", "mqtt://localhost:1883", "out a/# - b/"))
    assert found.startswith("bridges.self: port 1883 of 127.0.0.1 is this broker's own listeners.tcp")
    assert circles(load, bridge("self", "mqtt://localhost:1884", "out a/# - b/")) == []


def test_a_3x_peer_that_is_not_told_of_the_bridge_sends_everything_back(load: Load) -> None:
    hidden = 'protocol = "3.1.1"\ntry_private = false'
    (found,) = circles(load, bridge("hq", HQ, "both a/# - r/", more=hidden))
    assert found == "bridges.hq: what it sends as r/a/# comes back to it: try_private = false hides that it is a bridge"
    assert circles(load, bridge("hq", HQ, "out a/# - r/", "in b/# - r/", more=hidden)) == []


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("a/b", "a/b", "a/b"),
        ("a/+", "+/b", "a/b"),
        ("a/#", "a/b/+", "a/b/+"),
        ("#", "a/+/c", "a/+/c"),
        ("a/#", "a", "a"),
        ("a/#", "+/#", "a/#"),
        ("+", "a/b", None),
        ("a/b", "a/c", None),
        ("a", "a/b", None),
        ("#", "$SYS/x", None),
        ("+/x", "$SYS/x", None),
        ("$SYS/#", "$SYS/x", "$SYS/x"),
    ],
)
def test_the_intersection_of_two_filters(one: str, other: str, both: str | None) -> None:
    assert (intersection(one, other), intersection(other, one)) == (both, both)
