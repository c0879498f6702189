"""Bans: what they hit, how long, and that the store has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from broker.access.bans import MOST, BanError, Bans
from broker.extend.auth import Client, Verdict
from tests.unit.access.doubles import Fake, instance


class Clock:
    """Monotonic seconds, moved by the test."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """The store's key-value table; `at` is its clock in seconds."""

    def __init__(self, at: float = 50.0, *, broken: bool = False) -> None:
        self.values: dict[bytes, bytes] = {}
        self.at = at
        self.broken = broken

    def put_value(self, key: bytes, value: bytes, callback: Callable[[bool], None] | None = None) -> None:
        if value:
            self.values[key] = value
        else:
            self.values.pop(key, None)
        if callback is not None:
            callback(not self.broken)

    def clock_ms(self) -> int:
        return int(self.at * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bans(clock: Clock) -> Bans:
    return Bans(clock)


@pytest.mark.parametrize(
    ("kind", "name", "hit", "missed"),
    [
        ("client", "c1", ("c1", "u", "1.2.3.4"), ("C1", "c1", "1.2.3.4")),
        ("user", "alice", ("c", "alice", "1.2.3.4"), ("alice", None, "1.2.3.4")),
        ("address", "1.2.3.4", ("c", None, "1.2.3.4"), ("c", None, "1.2.3.5")),
        ("address", "1.2.3.4", ("c", None, "::ffff:1.2.3.4"), ("c", None, "::1.2.3.4")),
        ("address", "10.1.0.0/16", ("c", "u", "10.1.255.255"), ("c", "u", "10.2.0.0")),
        ("address", "::ffff:10.1.0.0/112", ("c", "u", "10.1.255.255"), ("c", "u", "10.2.0.0")),
        ("address", "2001:db8::/32", ("c", "u", "2001:db8:1::2"), ("c", "u", "2001:db9::1")),
        ("address", "fe80::1", ("c", "u", "fe80::1%eth0"), ("c", "u", "fe80::2%eth0")),
        ("address", "1.2.3.4", ("c", "u", "1.2.3.4"), ("c", "1.2.3.4", "unix")),
    ],
)  # fmt: skip
def test_a_ban_hits_what_it_names_and_nobody_else(
    bans: Bans, kind: Any, name: str, hit: tuple[Any, ...], missed: tuple[Any, ...]
) -> None:
    assert bans.find(*hit) is None
    bans.add(kind, name)
    assert bans.find(*hit) is not None
    assert bans.find(*missed) is None
    assert bans.remove(kind, name) is not None
    assert bans.find(*hit) is None
    assert bans.remove(kind, name) is None


def test_the_narrower_and_the_wider_network_are_two_bans(bans: Bans) -> None:
    bans.add("address", "10.0.0.0/8")
    bans.add("address", "10.1.0.0/16")
    bans.remove("address", "10.1.0.0/16")
    assert bans.find("c", None, "10.1.2.3") is not None
    bans.remove("address", "10.0.0.0/8")
    assert bans.find("c", None, "10.1.2.3") is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("address", "10.0.0.1/8"), ("address", "0.0.0.0/0"), ("address", "::/0"), ("address", "example.com"),
        ("address", "1.2.3"), ("client", ""), ("user", "x" * 4_097), ("user", "\udcff"),
    ],
)  # fmt: skip
def test_what_cannot_be_banned_is_said(bans: Bans, kind: Any, name: str) -> None:
    with pytest.raises(BanError):
        bans.add(kind, name)
    assert not bans.list()


def test_a_ban_ends_by_itself_and_leaves_the_store(bans: Bans, clock: Clock) -> None:
    table = Table()
    bans.keep(table)
    bans.add("client", "c1", seconds=10)
    bans.add("user", "alice", seconds=20)
    bans.add("address", "1.2.3.4")
    clock.now += 9.9
    assert bans.find("c1", None, "9.9.9.9") is not None
    clock.now += 0.1
    assert bans.find("c1", None, "9.9.9.9") is None
    assert bans.find("c1", "alice", "9.9.9.9") is not None, "the one that ended does not hide the other"
    clock.now += 11
    assert [ban.name for ban in bans.list()] == ["1.2.3.4"]
    assert list(table.values) == [b"ban/address/1.2.3.4"]


def test_a_restart_keeps_bans_and_what_is_left_of_their_time(bans: Bans, clock: Clock) -> None:
    """D-17: the time left counts on the store's clock, whatever the wall clock does."""
    table = Table()
    bans.keep(table)
    bans.add("client", "c/1", seconds=60, reason="noisy")
    bans.add("user", "alice", seconds=600)
    bans.add("address", "10.0.0.0/8")
    later = Clock()
    later.now = 5.0
    table.at += 100
    restarted = Bans(later)
    restarted.keep(table)
    assert {(ban.kind, ban.name, ban.reason) for ban in restarted.list()} == {
        ("user", "alice", ""), ("address", "10.0.0.0/8", ""),
    }  # fmt: skip
    assert b"ban/client/c/1" not in table.values, "it ended while the broker was down"
    later.now += 499
    assert restarted.find("c", "alice", "9.9.9.9") is not None
    later.now += 2
    assert restarted.find("c", "alice", "9.9.9.9") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"ban/client/x", b"{"), (b"ban/client/x", b"[]"), (b"ban/planet/x", b'{"until":0,"since":0,"reason":""}'),
        (b"ban/address/10.0.0.1/8", b'{"until":0,"since":0,"reason":""}'), (b"ban/client/x", b'{"until":0}'),
    ],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_left_out_with_a_line_in_the_log(
    bans: Bans, key: bytes, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    table = Table()
    table.values = {key: value, b"other": b"x", b"ban/user/good": b'{"until":0,"since":0,"reason":""}'}
    bans.keep(table)
    assert [ban.name for ban in bans.list()] == ["good"]
    assert "cannot be read" in caplog.text


def test_who_asks_hears_whether_it_was_stored(bans: Bans) -> None:
    heard: list[bool] = []
    bans.add("client", "a", stored=heard.append)
    assert heard == [False], "there is no store"
    bans.keep(Table())
    bans.add("client", "b", stored=heard.append)
    bans.remove("client", "b", heard.append)
    bans.keep(Table(broken=True))
    bans.add("client", "c", stored=heard.append)
    assert heard == [False, True, True, False]


def test_the_number_of_bans_is_bounded(bans: Bans, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST <= 1_000_000
    monkeypatch.setattr("broker.access.bans.MOST", 2)
    bans.add("client", "a")
    bans.add("client", "b")
    with pytest.raises(BanError, match="already"):
        bans.add("client", "c")
    bans.add("client", "a", seconds=5, reason="again")
    assert [ban.reason for ban in bans.list()] == ["", "again"]


def test_the_record_holds_what_an_operator_wrote(bans: Bans) -> None:
    table = Table(at=50)
    bans.keep(table)
    bans.add("user", "ö", seconds=1.5, reason="why")
    value = json.loads(table.values["ban/user/ö".encode()])
    assert (value["until"], value["reason"]) == (51_500, "why")
    with pytest.raises(BanError):
        bans.add("user", "x", reason="two\nlines")


async def test_a_ban_refuses_before_any_backend_is_asked(login: Any) -> None:
    fake = Fake(Verdict.ALLOW)
    log = await login(instance("one", fake), allow_anonymous=True)
    bans = log.gate.protection.bans
    bans.add("address", "127.0.0.0/8", reason="tests")
    assert log.start("u", b"p").code == 0x8A
    assert log.start(None, None).code == 0x8A
    assert log.start(username="proved").code == 0x8A, "a certificate does not help"
    assert not fake.calls
    assert log.start("u", b"p", "isthmus/x/0", privileged=True).code == 0, "workers are not clients"
    bans.remove("address", "127.0.0.0/8")
    assert (await log()).code == 0
    assert log.gate.counters["refused_banned"] == 3


async def test_a_ban_that_comes_while_a_backend_is_asked_counts(login: Any) -> None:
    def late(client: Client, password: bytes) -> Verdict:
        log.gate.protection.bans.add("user", "u")
        return Verdict.ALLOW

    log = await login(instance("one", Fake(late)))
    assert (await log("u", b"p")).code == 0x8A


async def test_z12_who_is_banned_may_publish_nothing_more_not_even_a_will(login: Any) -> None:
    log = await login(instance("one", Fake(Verdict.ALLOW)), no_match="allow")
    principal = (await log("u", b"p", "c1")).principal
    assert log.gate.may_publish(principal, "a") == 1
    log.gate.protection.bans.add("client", "c1")
    assert log.gate.may_publish(principal, "a") == 0
    log.gate.protection.bans.remove("client", "c1")
    assert log.gate.may_publish(principal, "a") == 1
