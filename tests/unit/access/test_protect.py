"""Lock-out, flapping detection, rates and quotas: who is refused, for how long, and what it costs to remember."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from broker.access import protect
from broker.access.chain import Decision
from broker.access.protect import TRACKED, Jail, Protection, Rate
from broker.config.models import AccessConfig
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Verdict
from broker.runtime.logs import Limited
from tests.unit.access.doubles import Channel, Fake, instance, settings
from tests.unit.access.test_bans import Clock

A, B = "10.0.0.1", "10.0.0.2"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def protection(clock: Clock, **access: Any) -> Protection:
    made = Protection(clock)
    made.configure(AccessConfig.model_validate(access))
    return made


def code(answer: Decision | None) -> int:
    return answer.code if answer is not None else 0


def connection(made: Protection, clientid: str, username: str | None = "u", host: str = A) -> Any:
    """A client that logs in as the gate lets it: the channel, or the code it is refused with."""
    refusal = made.before(clientid, username, host) or made.after(clientid, username, host)
    if refusal is not None:
        return refusal.code
    principal = SimpleNamespace(clientid=clientid, username=username, privileged=False)
    channel = SimpleNamespace(
        peerhost=host, peer=f"{host}:1", principal=principal, session=object(), link=object(),
    )  # fmt: skip
    made.admitted(principal, channel)
    return channel


def leave(made: Protection, channel: Any) -> None:
    channel.link = None
    made.disconnected(channel)


# --- lock-out --------------------------------------------------------------------------------------------------------


def test_a51_five_failures_in_five_minutes_lock_a_user_out_from_there_for_ten(clock: Clock) -> None:
    made = protection(clock)
    for _ in range(4):
        made.failed("alice", A)
        clock.now += 70
    assert code(made.before("c", "alice", A)) == 0
    made.failed("alice", A)
    assert code(made.before("c", "alice", A)) == 0x8A
    assert code(made.before("c", "alice", B)) == 0, "other addresses still work"
    assert code(made.before("c", "bob", A)) == 0, "other users still work"
    clock.now += 599
    assert code(made.before("c", "alice", A)) == 0x8A
    clock.now += 2
    assert code(made.before("c", "alice", A)) == 0
    assert made.status()["locked_out"] == 0


def test_a51_failures_that_are_older_do_not_count(clock: Clock) -> None:
    made = protection(clock)
    for _ in range(40):
        made.failed("alice", A)
        clock.now += 76
    assert code(made.before("c", "alice", A)) == 0


def test_attempts_during_a_lock_out_do_not_make_it_longer(clock: Clock) -> None:
    made = protection(clock)
    for _ in range(60):
        made.failed("alice", A)
        clock.now += 10
    assert code(made.before("c", "alice", A)) == 0x8A
    clock.now += 41
    assert code(made.before("c", "alice", A)) == 0


def test_a_right_password_starts_the_count_again(clock: Clock) -> None:
    made = protection(clock)
    for _ in range(5):
        for _ in range(4):
            made.failed("alice", A)
        assert not isinstance(connection(made, "c", "alice"), int)
    assert made.status()["lockouts"] == 0


def test_whole_addresses_and_users_are_locked_out_when_that_is_wanted(clock: Clock) -> None:
    made = protection(clock, lockout={"max_failures_per_address": 8, "max_failures_per_user": 6})
    for number in range(8):
        made.failed(f"u{number}", A)
    assert code(made.before("c", "u9", A)) == 0x8A
    assert code(made.before("c", None, A)) == 0x8A, "anonymous clients too"
    assert code(made.before("c", "u9", B)) == 0
    for number in range(6):
        made.failed("alice", f"10.0.1.{number}")
    assert code(made.before("c", "alice", B)) == 0x8A
    assert {(row["user"], row["address"]) for row in made.locked()} == {(None, A), ("alice", None)}


def test_an_ipv6_address_counts_as_its_network_and_a_mapped_one_as_ipv4(clock: Clock) -> None:
    made = protection(clock)
    for number in range(5):
        made.failed("alice", f"2001:db8::{number}")
        made.failed("bob", "::ffff:10.0.0.1" if number % 2 else A)
    assert code(made.before("c", "alice", "2001:db8::ffff:1")) == 0x8A
    assert code(made.before("c", "alice", "2001:db8:0:1::1")) == 0
    assert code(made.before("c", "bob", A)) == 0x8A


def test_nothing_is_counted_by_exempt_addresses_nor_by_unix_sockets(clock: Clock) -> None:
    made = protection(
        clock,
        exempt=("10.0.0.0/30",),
        lockout={"max_failures_per_address": 5},
        quota={"max_connections_per_address": 1, "connect_rate_per_address": 1},
    )
    for host in (A, "unix"):
        for _ in range(20):
            made.failed("alice", host)
        assert [type(connection(made, f"c{n}", "alice", host)) for n in range(20)] == [SimpleNamespace] * 20
    made.bans.add("address", A)
    assert code(made.before("c", "alice", A)) == 0x8A, "a ban counts"


def test_an_operator_ends_a_lock_out(clock: Clock) -> None:
    made = protection(clock, lockout={"max_failures_per_address": 5}, flapping_detect={"enable": True, "max_count": 1})
    for _ in range(5):
        made.failed("alice", A)
    leave(made, connection(made, "c1", "bob", B))
    assert made.release("user", "alice") == 1
    assert code(made.before("c", "alice", A)) == 0x8A, "the address still is"
    assert made.release("address", A) == 1
    assert code(made.before("c", "alice", A)) == 0
    assert code(made.before("c1", "bob", B)) == 0x8A
    assert made.release("client", "c1") == 1
    assert code(made.before("c1", "bob", B)) == 0
    assert [made.release(kind, "x") for kind in ("client", "user", "address")] == [0, 0, 0]


# --- flapping --------------------------------------------------------------------------------------------------------


def test_a_client_that_comes_and_goes_is_refused_for_a_while(clock: Clock) -> None:
    made = protection(clock, flapping_detect={"enable": True})
    for _ in range(15):
        channel = connection(made, "c1", "alice")
        assert not isinstance(channel, int)
        leave(made, channel)
        clock.now += 3
    assert connection(made, "c1", "alice") == 0x8A
    assert not isinstance(connection(made, "c2", "alice"), int)
    assert not isinstance(connection(made, "c1", "bob"), int), "another user cannot bring it about, nor suffers from it"
    status = made.status()
    assert (status["flapping"], status["flapping_bans"], status["refused"]) == (1, 1, {"flapping": 1})
    clock.now += 300
    assert not isinstance(connection(made, "c1", "alice"), int)


def test_flapping_is_off_by_default_and_slow_clients_do_not_flap(clock: Clock) -> None:
    for access, pause in (({}, 0), ({"flapping_detect": {"enable": True}}, 4.4)):
        made = protection(clock, **access)
        for _ in range(100):
            leave(made, connection(made, "c1"))
            clock.now += pause
        assert not isinstance(connection(made, "c1"), int)


# --- quotas and rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quota", "by"), [("max_connections_per_user", "u"), ("max_connections_per_address", A)])
def test_connections_of_one_user_and_one_address_are_limited(clock: Clock, quota: str, by: str) -> None:
    made = protection(clock, quota={quota: 3})
    channels = [connection(made, f"c{number}") for number in range(3)]
    assert connection(made, "c3") == 0x97
    again = connection(made, "c1")
    assert not isinstance(again, int), "who takes over its own connection is not one more"
    leave(made, channels[1])
    assert connection(made, "c3") == 0x97, "the end of the connection that was taken over frees no place"
    leave(made, channels[0])
    assert not isinstance(connection(made, "c3"), int)
    assert connection(made, "c4") == 0x97
    other = ("v", A) if by == "u" else ("u", B)
    assert not isinstance(connection(made, "c5", *other), int)
    assert made.status()["refused"] == {quota: 3}


def test_a_connection_whose_end_nobody_told_is_noticed(clock: Clock) -> None:
    made = protection(clock, quota={"max_connections_per_user": 1})
    connection(made, "c1").link = None
    assert not isinstance(connection(made, "c2"), int)


def test_who_was_refused_by_the_engine_takes_no_place(clock: Clock) -> None:
    made = protection(clock, quota={"max_connections_per_user": 1})
    principal: Any = SimpleNamespace(clientid="c1", username="u", privileged=False)
    made.admitted(principal, SimpleNamespace(session=None, link=object(), peerhost=A))
    assert not isinstance(connection(made, "c2"), int)


def test_connects_a_second_are_limited_by_address_and_by_user(clock: Clock) -> None:
    made = protection(clock, quota={"connect_rate_per_address": 2, "connect_rate_per_user": 1, "rate_window": 10})
    answers = [code(made.before("c", "u", A)) for _ in range(25)]
    assert answers == [0] * 20 + [0x9F] * 5
    assert code(made.before("c", "u", B)) == 0
    clock.now += 2
    assert [code(made.before("c", "u", A)) for _ in range(5)] == [0] * 4 + [0x9F]
    assert [code(made.after("c", "u", A)) for _ in range(11)] == [0] * 10 + [0x9F]
    assert code(made.after("c", "v", A)) == 0
    assert made.status()["refused"] == {"connect_rate_per_address": 6, "connect_rate_per_user": 1}


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_without_bans_and_limits_the_gate_looks_no_further_than_two_attributes(clock: Clock) -> None:
    made = protection(clock)
    assert (made.armed, made.counts) == (False, False)
    made.failed("alice", A)
    assert (made.armed, made.counts) == (False, True)
    for _ in range(4):
        made.failed("alice", A)
    assert made.armed
    clock.now += 601
    made.status()
    assert (made.armed, made.counts) == (False, False)
    made.bans.add("client", "c", seconds=1)
    assert made.armed
    clock.now += 3
    made.before("d", None, A)
    assert not made.armed, "the last ban has ended"


def test_what_is_remembered_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TRACKED <= 100_000
    monkeypatch.setattr(protect, "TRACKED", 100)
    made = protection(
        clock,
        lockout={"max_failures": 2, "max_failures_per_address": 2, "max_failures_per_user": 2},
        flapping_detect={"enable": True, "max_count": 2},
        quota={"connect_rate_per_address": 1, "connect_rate_per_user": 1},
    )
    for number in range(1_000):
        host = f"10.0.{number >> 8}.{number & 255}"
        for _ in range(1 + number % 2):
            made.failed(f"u{number}", host)
            principal = SimpleNamespace(clientid=f"c{number}", username=f"u{number}", privileged=False)
            made.denied(principal, f"{host}:1")
            leave(made, SimpleNamespace(principal=principal, peer="", peerhost=host))
        made.before(f"c{number}", f"x{number}", host)
        made.after(f"c{number}", f"x{number}", host)
    sizes = [
        len(table)
        for part in vars(made).values()
        if isinstance(part, (Jail, Rate))
        for table in vars(part).values()
        if isinstance(table, dict)
    ]
    assert len(sizes) == 13
    assert min(sizes) >= 99
    assert max(sizes) == 100


def test_a_long_name_is_not_remembered(clock: Clock) -> None:
    jail = Jail(clock)
    jail.configure(1, 60, 60)
    assert not jail.note(("x" * 257, A))
    assert jail.note(("x" * 256, A))


def test_a_reload_that_changes_nothing_here_keeps_what_was_counted(clock: Clock) -> None:
    made = protection(clock)
    for _ in range(5):
        made.failed("alice", A)
    made.configure(AccessConfig(no_match="allow"))
    assert code(made.before("c", "alice", A)) == 0x8A
    made.configure(AccessConfig.model_validate({"lockout": {"max_failures": 0}}))
    assert code(made.before("c", "alice", A)) == 0
    assert not made.armed


def test_a_token_given_as_a_user_name_is_not_shown(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    made = protection(clock)
    made._jailed = Limited(logging.getLogger("protect"), "refused for a while")  # none of the lines of other tests
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            made.failed("eyJhbGciOiJIUzI1NiJ9", A)
    assert "(a token)" in caplog.text
    assert "eyJ" not in caplog.text + str(made.locked())


# --- in the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        (Verdict.DENY, True), (Verdict.IGNORE, True), (BackendUnavailable("down"), False),
        (Refusal("expired"), False), (Refusal("no", authorized=False), False),
    ],
)  # fmt: skip
async def test_only_guesses_count(login: Any, answer: Any, counts: bool) -> None:
    """A-51: a wrong password and an unknown user; not an expired token, and never the failure of a backend."""
    fake = Fake(answer)
    log = await login(instance("one", fake, cache_ttl=0, negative_cache_ttl=0))
    codes = [(await log("alice", b"x")).code for _ in range(7)]
    assert (0x8A in codes) == counts
    if counts:
        assert len(fake.calls) == 5, "the backend is spared"
        fake.answer = Verdict.ALLOW
        assert (await log("alice", b"right")).code == 0x8A
        assert (await log("bob", b"right")).code == 0
        assert log.gate.counters["refused_banned"] == 3


async def test_a_missing_password_is_no_guess(login: Any) -> None:
    log = await login(instance("one", Fake(Verdict.ALLOW)))
    assert [log.start("alice", None).code for _ in range(7)] == [0x86] * 7
    assert (await log("alice", b"right")).code == 0


async def test_a51_remembered_refusals_count_too(login: Any) -> None:
    fake = Fake(Verdict.DENY)
    log = await login(instance("one", fake))
    assert [(await log("alice", b"x")).code for _ in range(6)] == [0x86] * 5 + [0x8A]
    assert len(fake.calls) == 1


async def test_a51_guesses_that_were_under_way_tell_nothing(login: Any) -> None:
    """Twenty guesses at once: when the fifth has failed, the right one among the others is refused as well."""

    def answer(client: Client, password: bytes) -> Verdict:
        return Verdict.ALLOW if password == b"19" else Verdict.DENY

    log = await login(instance("one", Fake(answer)))
    channels = [log.start("alice", b"%d" % number) for number in range(20)]
    for channel in channels:
        await channel.answered.wait()
    assert channels[19].code == 0x8A


async def test_the_name_a_backend_gives_is_the_one_that_counts(login: Any) -> None:
    log = await login(instance("one", Fake(Grant(username="real"))), quota={"connect_rate_per_user": 0.1})
    log.gate.protection.bans.add("user", "real")
    assert (await log("claimed", b"p")).code == 0x8A
    log.gate.protection.bans.remove("user", "real")
    made = Live(log)
    assert await made("a", b"1") == 0
    assert await made("b", b"2") == 0x9F


async def test_a_reload_puts_limits_into_force(login: Any) -> None:
    log = await login(instance("one", Fake(Verdict.ALLOW)))
    made = Live(log)
    assert [await made("u", b"p", f"c{number}") for number in range(3)] == [0, 0, 0]
    one = instance("one", Fake(Verdict.ALLOW))
    await log.gate.replace(settings(one, quota={"max_connections_per_user": 2}))
    assert [await made("u", b"p", f"d{number}") for number in range(3)] == [0, 0, 0x97]
    assert await made("u", b"p", "d0") == 0, "the same client again"


class Live:
    """Logs in through the gate with channels that the engine has taken."""

    def __init__(self, log: Any) -> None:
        self._gate = log.gate

    async def __call__(self, username: str, password: bytes, clientid: str = "c") -> int | None:
        channel: Any = Channel()
        channel.session = channel.link = object()
        connect = SimpleNamespace(client_id=clientid, username=username, password=password)
        self._gate.authenticate(channel, connect)
        await channel.answered.wait()
        code: int | None = channel.code
        return code


def test_z25_a_denial_costs_the_connection_only_where_that_is_wanted(clock: Clock) -> None:
    who = SimpleNamespace(clientid="c", username="u")
    assert protection(clock).denied(who, "") == 0
    made = protection(clock, deny_action="disconnect")
    assert made.denied(who, "") == 0x87
    assert made.status()["denied_disconnects"] == 1


@pytest.mark.parametrize(("action", "verdict"), [("throttle", None), ("disconnect", 0x96)])
def test_z24_denials_are_counted_by_client_and_second(clock: Clock, action: str, verdict: int | None) -> None:
    one, other = SimpleNamespace(clientid="a", username="u"), SimpleNamespace(clientid="b", username="u")
    made = protection(clock, deny_rate=3, deny_rate_action=action)
    assert [made.denied(one, "") for _ in range(4)] == [0, 0, 0, verdict]
    made.configure(AccessConfig.model_validate({"deny_rate": 3, "deny_rate_action": action, "no_match": "allow"}))
    assert made.denied(one, "") == verdict, "a reload forgets nothing"
    assert made.denied(other, "") == 0
    clock.now += 1.0
    assert [made.denied(one, "") for _ in range(4)] == [0, 0, 0, verdict]
    made.configure(AccessConfig(deny_rate=0))
    assert {made.denied(one, "") for _ in range(5_000)} == {0}


def test_z24_many_client_ids_are_no_way_around_the_limit(clock: Clock) -> None:
    """Z-24: one user, and one address, may cause ten clients' worth of denials; others go on as before."""
    made = protection(clock, deny_rate=3, exempt=("10.0.9.0/24",))

    def denied(number: int, user: str | None, host: str) -> int | None:
        return made.denied(SimpleNamespace(clientid=f"c{number}", username=user), f"{host}:1")

    for user, hosts in (("u", [f"10.0.1.{n}" for n in range(31)]), (None, [A] * 31)):
        assert [denied(n, user, host) for n, host in enumerate(hosts)] == [0] * 30 + [None]
    assert denied(40, "v", B) == 0
    assert denied(41, "v", A) is None
    assert {denied(n, None, "10.0.9.1") for n in range(100)} == {0}, "it stands for many"
    clock.now += 1.0
    assert denied(42, "u", A) == 0
