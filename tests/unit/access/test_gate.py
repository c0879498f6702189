"""Who is let in: the chain, its caches, its breaker, and what happens when backends misbehave."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from broker.access.breaker import PAUSE, THRESHOLD
from broker.access.bulkhead import Busy
from broker.access.cache import Cache
from broker.access.gate import AccessError, AccessGate
from broker.config.problems import ConfigError
from broker.config.settings import load_settings
from broker.config.template import Template
from broker.extend.auth import BackendUnavailable, Client, Grant, Refusal, Rule, Verdict
from tests.clock import clock
from tests.unit.access.doubles import Channel, Fake, Login, instance, settings

ALLOW, DENY, IGNORE = Verdict.ALLOW, Verdict.DENY, Verdict.IGNORE
DOWN = BackendUnavailable("connection refused")


def allow(topic: str, action: Any = "all") -> Rule:
    return Rule(True, action, Template.parse(topic, percent=True))


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "code", "asked"),
    [
        ([IGNORE, IGNORE, IGNORE], 0x86, 3), ([IGNORE, DENY, ALLOW], 0x86, 2), ([ALLOW, DENY], 0, 1),
        ([IGNORE, Grant()], 0, 2), ([Refusal("no group", authorized=False)], 0x87, 1), ([Refusal("locked")], 0x86, 1),
    ],
)  # fmt: skip
async def test_a37_the_first_that_knows_the_user_decides(login: Any, answers: list[Any], code: int, asked: int) -> None:
    """A-37: and when none knows it, it is refused."""
    fakes = [Fake(answer) for answer in answers]
    log = await login(*(instance(f"b{n}", fake) for n, fake in enumerate(fakes)))
    assert (await log()).code == code
    assert sum(len(fake.calls) for fake in fakes) == asked


async def test_a37_the_order_is_as_configured(login: Any) -> None:
    first, second = Fake(DENY), Fake(ALLOW)
    log = await login(instance("one", first), instance("two", second), order=("two", "one"))
    assert (await log()).code == 0
    assert not first.calls
    assert (await log(auth=("one",))).code == 0x86, "a listener names its own"


async def test_a02_an_empty_list_refuses_everybody(login: Any) -> None:
    """A-02: nobody is asked, and nobody gets in."""
    fake = Fake(ALLOW)
    log = await login(instance("one", fake), order=())
    assert (await log()).code == 0x87
    log = await login(instance("one", fake))
    assert (await log(auth=())).code == 0x87
    assert not fake.calls
    log = await login()
    assert (await log()).code == 0x87
    assert (await log(None, None)).code == 0x87


async def test_a03_a_backend_that_cannot_be_opened_names_itself_and_leaves_the_old_ones(login: Any) -> None:
    """A-03: with the place where it is written; what was in force stays."""
    old = Fake(ALLOW)
    log = await login(instance("old", old))
    other = Fake(ALLOW)
    broken = settings(instance("other", other), instance("broken", ValueError("passwords:3: a blank line")))
    with pytest.raises(AccessError, match=r"conf\.d/broken\.toml:1: auth\.broken: passwords:3: a blank line"):
        await log.gate.replace(broken)
    assert other.closed
    assert not old.closed
    assert (await log()).code == 0


@pytest.mark.parametrize(
    ("username", "password", "code"),
    [(None, None, 0x87), (None, b"p", 0x86), ("u", None, 0x86), ("", b"p", 0x86), ("", None, 0x86)],
)
async def test_a06_without_credentials_no_backend_is_asked(
    login: Any, username: str | None, password: bytes | None, code: int
) -> None:
    """A-06: and nothing is raised."""
    fake = Fake(ALLOW)
    log = await login(instance("one", fake))
    assert log.start(username, password).code == code, "at once"
    assert not fake.calls


async def test_anonymous_clients_are_let_in_at_once_when_allowed(login: Any) -> None:
    fake = Fake(DENY)
    log = await login(instance("one", fake), allow_anonymous=True)
    channel = log.start(None, None)
    assert channel.code == 0
    assert channel.principal.username is None
    assert (await log("u", b"p")).code == 0x86, "who gives a name must prove it"
    assert log.start("u", None).code == 0x86
    assert log.gate.may_publish(channel.principal, "a") == 0


# --- errors ----------------------------------------------------------------------------------------------------------


async def hang(client: Client, password: bytes) -> Verdict:
    await asyncio.Event().wait()
    return ALLOW


async def stubborn(client: Client, password: bytes) -> Verdict:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(0.05)
    return ALLOW


@pytest.mark.parametrize("answer", [DOWN, RuntimeError("secret-dsn"), "yes", True, None, hang, stubborn])
async def test_a38_an_error_is_0x88_and_never_cached(login: Any, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A-38: whatever the backend raises or answers."""
    fake = Fake(answer)
    log = await login(instance("one", fake, timeout=0.1))
    assert (await log()).code == 0x88
    assert log.gate.status()["one"]["state"] == "failing"
    assert "secret-dsn" not in str(log.gate.status())
    fake.answer = ALLOW
    assert (await log()).code == 0
    assert len(fake.calls) == 2
    assert log.gate.status()["one"]["state"] == "ok"


async def test_on_error_ignore_asks_the_next(login: Any) -> None:
    down, second = Fake(DOWN), Fake(ALLOW)
    log = await login(instance("down", down, on_error="ignore"), instance("second", second))
    assert (await log()).code == 0
    second.answer = IGNORE
    assert (await log("other")).code == 0x88, "somebody who might have known the user could not be asked"
    log = await login(instance("down", down), instance("second", Fake(ALLOW)), on_error="ignore")
    assert (await log()).code == 0, "the general switch"
    log = await login(instance("down", down, on_error="deny"), instance("second", Fake(ALLOW)), on_error="ignore")
    assert (await log()).code == 0x88, "the backend's own counts more"


async def test_a39_the_breaker_opens_answers_at_once_probes_and_recovers(login: Any) -> None:
    """A-39: after five failures, each five seconds, with one call."""
    fake = Fake(DOWN)
    log = await login(instance("one", fake))
    guard = log.gate.guard("one")
    now = 1000.0
    guard.breaker._clock = lambda: now
    for n in range(THRESHOLD):
        assert (await log(f"u{n}")).code == 0x88
    assert log.gate.status()["one"]["state"] == "open"
    assert "connection refused" in log.gate.status()["one"]["last_error"]
    began = time.process_time()
    for n in range(100):
        assert (await log(f"v{n}")).code == 0x88
    assert time.process_time() - began < 1, "not 10 ms each"
    assert len(fake.calls) == THRESHOLD
    now += PAUSE * 1.2
    assert (await log("probe")).code == 0x88
    assert len(fake.calls) == THRESHOLD + 1, "one probe"
    assert (await log("again")).code == 0x88
    assert len(fake.calls) == THRESHOLD + 1, "open again"
    now += PAUSE * 1.2
    fake.answer = ALLOW
    assert (await log("probe")).code == 0
    assert log.gate.status()["one"]["state"] == "ok"


async def test_a39_who_had_to_queue_does_not_wait_twice(login: Any) -> None:
    """A-39: a hanging backend with a queue before it: what is asked after its first failure is answered when it is
    given up, not one deadline later; and who was asked before keeps its own deadline."""
    fake = Fake(hang)
    log = await login(instance("one", fake, timeout=2, max_concurrent=8))
    began = clock()
    ended: list[float] = []

    async def attempt(number: int) -> int | None:
        await asyncio.sleep(0 if number < 8 else 0.5)  # the backend is given up long before these have waited enough
        at = clock()
        code = (await log(f"u{number}")).code
        ended.append(clock() - at)
        return code

    codes = await asyncio.gather(*(attempt(number) for number in range(30)))
    assert set(codes) == {0x88}
    assert max(ended) <= 3, "not 4"
    assert clock() - began <= 3.3
    assert log.gate.status()["one"]["state"] == "open"
    await asyncio.sleep(0)
    assert log.gate.status()["one"]["running"] == log.gate.status()["one"]["waiting"] == 0


async def test_a39_only_one_probe_at_a_time(login: Any) -> None:
    fake = Fake(DOWN)
    log = await login(instance("one", fake))
    guard = log.gate.guard("one")
    now = 0.0
    guard.breaker._clock = lambda: now
    for n in range(THRESHOLD):
        await log(f"u{n}")
    now += PAUSE * 1.2
    release = asyncio.Event()

    async def slow(client: Client, password: bytes) -> Verdict:
        await release.wait()
        return ALLOW

    fake.answer = slow
    probe = log.start("probe")
    await asyncio.sleep(0)
    assert {(await log(f"v{n}")).code for n in range(10)} == {0x88}
    log.gate.cancel(probe)
    await asyncio.sleep(0.01)
    second = log.start("second")
    await asyncio.sleep(0.01)
    release.set()
    await second.answered.wait()
    assert second.code == 0, "the probe of a client that left does not block the next"


async def test_a40_calls_are_limited_and_the_rest_is_told_busy(login: Any) -> None:
    """A-40: 64 at a time, four times as many wait."""
    release = asyncio.Event()

    async def slow(client: Client, password: bytes) -> Verdict:
        await release.wait()
        return ALLOW

    fake = Fake(slow)
    log = await login(instance("one", fake))
    channels = [log.start(f"u{n}") for n in range(1000)]
    async with asyncio.timeout(10):
        while sum(channel.code == 0x89 for channel in channels) < 1000 - 64 - 256:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    status = log.gate.status()["one"]
    assert (fake.most, status["running"], status["waiting"]) == (64, 64, 256)
    assert sum(channel.code == 0x89 for channel in channels) == 1000 - 64 - 256
    assert log.start("u5", None).code == 0x86, "others are answered"
    release.set()
    await asyncio.gather(*(channel.answered.wait() for channel in channels))
    assert sum(channel.code == 0 for channel in channels) == 64 + 256
    assert fake.most == 64


async def test_a40_a_backend_that_says_busy_is_not_taken_for_broken(login: Any) -> None:
    busy = Fake(Busy("too much to do"))
    log = await login(instance("one", busy))
    assert [(await log("u", b"p", f"c{n}")).code for n in range(2 * THRESHOLD)] == [0x89] * 2 * THRESHOLD
    assert len(busy.calls) == 2 * THRESHOLD, "it is asked each time"
    assert log.gate.status()["one"]["state"] == "ok"


async def test_a40_waiting_is_bounded_in_time(login: Any) -> None:
    fake = Fake(stubborn)
    log = await login(instance("one", fake, timeout=0.05, max_concurrent=1))
    first, second = log.start("a"), log.start("b")
    await asyncio.gather(first.answered.wait(), second.answered.wait())
    assert (first.code, second.code) == (0x88, 0x89)


async def test_a41_clients_that_leave_take_their_calls_with_them(login: Any) -> None:
    """A-41: a thousand of them."""
    fake = Fake(hang)
    log = await login(instance("one", fake))
    await asyncio.sleep(0)
    before = len(asyncio.all_tasks())
    channels = [log.start(f"u{n}") for n in range(1000)]
    await asyncio.sleep(0.02)
    for channel in channels:
        log.gate.cancel(channel)
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 (nothing tells when a task is gone)
            await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    assert fake.running == 0
    assert fake.cancelled == len(fake.calls)
    status = log.gate.status()["one"]
    assert (status["running"], status["waiting"]) == (0, 0)
    answered = [channel for channel in channels if channel.code is not None]
    assert all(channel.code == 0x89 for channel in answered)
    assert not log.gate._pending


async def test_a38_who_answers_too_late_is_not_believed(login: Any) -> None:
    """A-38: the answer of a backend that was given up is neither told nor remembered, and its place is free again."""
    fake = Fake(stubborn)
    log = await login(instance("one", fake, timeout=0.05))
    assert (await log()).code == 0x88
    guard = log.gate.guard("one")
    assert guard.status()["running"] == 1, "it is not over yet"
    async with asyncio.timeout(5):
        while guard.status()["running"]:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)
    assert len(guard.cache) == 0
    assert log.start().code is None, "asked again"


async def test_a38_a_backend_that_answers_nonsense_is_left_alone_like_one_that_fails(login: Any) -> None:
    fake = Fake("yes")
    log = await login(instance("one", fake))
    assert {(await log(f"u{number}")).code for number in range(THRESHOLD + 3)} == {0x88}
    assert len(fake.calls) == THRESHOLD
    assert log.gate.status()["one"]["state"] == "open"


async def test_a_backend_that_needs_nobody_answers_before_the_call_returns(login: Any) -> None:
    """`at_once`: without a task, remembered like any verdict; where it cannot, or fails, `authenticate` decides."""

    class Quick(Fake):
        ways: Any = None

        def at_once(self, client: Client, password: bytes) -> Any:
            if isinstance(self.ways, Exception):
                raise self.ways
            return self.ways

    quick = Quick(DENY)
    log = await login(instance("first", Fake(IGNORE)), instance("quick", quick))
    first = log.start()
    assert first.code is None, "the first has to be asked"
    await first.answered.wait()
    log = await login(instance("quick", quick))
    calls = len(quick.calls)
    quick.ways = Grant(superuser=True)
    channel = log.start("u", b"1")
    assert (channel.code, channel.principal.superuser) == (0, True)
    quick.ways = Refusal("no")
    assert log.start("u", b"2").code == 0x86
    quick.ways = ValueError("broken")
    assert log.start("u", b"1").code == 0, "from the cache"
    assert log.start("u", b"2").code == 0x86
    assert len(quick.calls) == calls
    assert log.gate.status()["quick"]["calls"] == 2
    quick.ways = None
    assert (await log("u", b"3")).code == 0x86, "as `authenticate` says"
    quick.ways = IGNORE
    assert (await log("u", b"4")).code == 0x86
    assert len(quick.calls) == calls + 1
    assert log.start("u", b"4").code is None, "nobody knows the user: the time of a check is spent first"


async def test_one_call_serves_all_who_ask_the_same_at_once(login: Any) -> None:
    release = asyncio.Event()

    async def slow(client: Client, password: bytes) -> Verdict:
        await release.wait()
        return ALLOW

    fake = Fake(slow)
    log = await login(instance("one", fake))
    channels = [log.start("u", b"p", "c") for _ in range(50)]
    other = log.start("u", b"q", "c")
    await asyncio.sleep(0.01)
    for channel in channels[:30]:
        log.gate.cancel(channel)
    release.set()
    await asyncio.gather(*(channel.answered.wait() for channel in [*channels[30:], other]))
    assert len(fake.calls) == 2
    assert {channel.code for channel in channels[30:]} == {0}
    assert {channel.code for channel in channels[:30]} == {None}, "nobody answers a connection that is gone"


async def test_an_answer_is_never_given_twice_nor_to_another(login: Any) -> None:
    """A-42: logins cancelled at every point, mixed with others; each verdict belongs to its own request."""

    async def mirror(client: Client, password: bytes) -> Verdict:
        for _ in range(int(client.clientid) % 5):
            await asyncio.sleep(0)
        return ALLOW if password == (client.username or "").encode() else DENY

    fake = Fake(mirror)
    log = await login(instance("one", fake))
    kept: list[tuple[Channel, int]] = []
    for n in range(2000):
        name = f"user{n}"
        good = n % 3 != 0
        channel = log.start(name, name.encode() if good else b"user1", str(n))
        if n % 2:
            for _ in range(n % 7):
                await asyncio.sleep(0)
            log.gate.cancel(channel)
        else:
            kept.append((channel, 0 if good else 0x86))
        if n % 50 == 0:
            await asyncio.sleep(0.005)
    await asyncio.gather(*(channel.answered.wait() for channel, _ in kept))
    assert [channel.code for channel, _ in kept if channel.code != 0x89] == [
        code for channel, code in kept if channel.code != 0x89
    ]


# --- passwords in the clear ------------------------------------------------------------------------------------------

CLEAR = """
[listeners.field]
kind = "tcp"
bind = "0.0.0.0:1883"
{allow}
[listeners.here]
kind = "tcp"
bind = "127.0.0.1:1884"
[listeners.local]
kind = "unix"
path = "mqtt.sock"
"""
PERSON = '[auth.people]\nkind = "static"\n[auth.people.users.u]\npassword = "hush-pw"\n'


async def test_a57_a_password_in_the_clear_is_told_once_with_the_listeners_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A-57: nobody starts such a listener without saying so; who did is told when the first password really comes that
    way. Listeners on this machine are silent, and so are clients without a password."""
    (tmp_path / "00.toml").write_text(PERSON + CLEAR.format(allow=""))
    with pytest.raises(ConfigError, match=r"listeners\.field\.bind: passwords would cross the network in the clear"):
        load_settings(tmp_path, environ={})
    (tmp_path / "00.toml").write_text(PERSON + CLEAR.format(allow="allow_cleartext = true"))
    gate = AccessGate(load_settings(tmp_path, environ={}))
    await gate.open()
    log = Login(gate)

    async def told(listener: str, *credentials: Any) -> list[str]:
        caplog.clear()
        channel = Channel()
        channel.listener.name = listener
        username, password = credentials
        gate.authenticate(channel, SimpleNamespace(client_id="c", username=username, password=password))
        await channel.answered.wait()
        return [record.getMessage() for record in caplog.records if "in the clear" in record.getMessage()]

    for listener in ("here", "local"):
        assert await told(listener, "u", b"hush-pw") == []
    assert await told("field", None, None) == []
    (line,) = await told("field", "u", b"hush-pw")
    assert line.startswith("listener field: passwords cross the network in the clear")
    assert "hush" not in caplog.text
    assert await told("field", "u", b"hush-pw") == [], "once"
    await gate.replace(load_settings(tmp_path, environ={}))
    assert len(await told("field", "u", b"other")) == 1, "and once after each reload"
    assert (await log("u", b"hush-pw")).code == 0
    await gate.close()


async def test_a57_where_nobody_decides_a_password_in_the_clear_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A-57: a listener for anonymous clients needs no `allow_cleartext`; a password that comes there is no login."""
    text = CLEAR.format(allow="auth = []\nallow_anonymous = true")
    (tmp_path / "00.toml").write_text(PERSON + text)
    gate = AccessGate(load_settings(tmp_path, environ={}))
    await gate.open()
    for credentials, code in (((None, None), 0), (("u", b"hush-pw"), 0x87)):
        channel = Channel(auth=())
        channel.listener.name, channel.listener.attributes = "field", {"allow_anonymous": True}
        username, password = credentials
        gate.authenticate(channel, SimpleNamespace(client_id="c", username=username, password=password))
        assert channel.code == code
    assert "listener field: passwords cross" in caplog.text
    assert "hush" not in caplog.text
    await gate.close()


# --- caches ----------------------------------------------------------------------------------------------------------


async def test_a_cached_verdict_is_given_at_once_until_it_is_too_old(login: Any) -> None:
    fake = Fake(ALLOW)
    log = await login(instance("one", fake))
    now = 0.0
    log.gate.guard("one").cache._clock = lambda: now
    await log()
    for _ in range(3):
        assert log.start().code == 0
    assert log.start("u", b"p", "other").code is None, "another client id"
    now += 53
    assert log.start().code == 0
    now += 14
    assert log.start().code is None, "not extended by being used"
    assert log.gate.counters["accepted"] == 5


async def test_a43_a44_a_wrong_password_never_meets_a_cached_success(login: Any) -> None:
    """A-43, A-44: nor does a right one meet the refusal of a wrong one; errors are not remembered."""

    def judge(client: Client, password: bytes) -> Verdict:
        return ALLOW if password == b"right" else DENY

    fake = Fake(judge)
    log = await login(instance("one", fake))
    name = "n" * 60
    assert (await log(name, b"wrong")).code == 0x86
    assert (await log(name, b"right")).code == 0, "right after the wrong one"
    assert (await log(name, b"wrong2")).code == 0x86
    assert log.start(name, b"wrong").code == 0x86, "cached"
    fake.answer = DOWN
    assert (await log(name, b"wrong3")).code == 0x88
    fake.answer = judge
    assert (await log(name, b"wrong3")).code == 0x86
    now = time.monotonic() + 5.1
    log.gate.guard("one").cache._clock = lambda: now
    calls = len(fake.calls)
    assert (await log(name, b"wrong")).code == 0x86
    assert len(fake.calls) == calls + 1, "a refusal is remembered for five seconds"


def test_a43_the_key_is_a_keyed_digest_over_length_prefixed_fields() -> None:
    """A-43: however the text is cut, no two logins share one."""
    cache = Cache(60, 5)
    keys = {
        cache.key(Client(clientid, username, listener=listener), password)
        for listener in ("", "t")
        for username in ("a", "ab", "", None)
        for clientid in ("b", "", "bc")
        for password in (b"c", b"", b"bc")
    }
    assert len(keys) == 2 * 4 * 3 * 3
    client = Client("c", "u", "10.0.0.1", certificate={"cert_common_name": "x"})
    assert cache.key(client, b"p") != Cache(60, 5).key(client, b"p"), "another secret in each"
    assert cache.key(client, b"p") != cache.key(Client("c", "u", "10.0.0.1"), b"p")
    elsewhere = Client("c", "u", "10.0.0.2", certificate={"cert_common_name": "x"})
    assert cache.key(client, b"p") == cache.key(elsewhere, b"p")
    assert cache.key(client, b"p", by_address=True) != cache.key(elsewhere, b"p", by_address=True)


def test_a_positive_verdict_lives_sixty_seconds_give_or_take_a_tenth() -> None:
    now = 0.0
    cache = Cache(60, 5, clock=lambda: now)
    lives = []
    for n in range(200):
        cache.put(bytes([n]), ALLOW, "u")
        lives.append(cache._entries[bytes([n])].expires)
    assert 54 <= min(lives) < 57
    assert 63 < max(lives) <= 66
    assert cache.purge("other") == 0
    assert cache.purge("u") == 200


def test_a_login_that_expires_is_not_cached_longer() -> None:
    cache = Cache(60, 5, clock=lambda: 0.0)
    cache.put(b"k", Grant(expires_at=time.time() + 10), "u")
    assert 9 < cache._entries[b"k"].expires <= 10
    cache.put(b"k", Grant(expires_at=time.time() - 1), "u")
    assert len(cache) == 0


async def test_a45_stale_if_error(login: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A-45: within its limit, with a line in the log."""
    fake = Fake(ALLOW)
    log = await login(instance("one", fake, stale_if_error=300))
    now = 0.0
    guard = log.gate.guard("one")
    guard.cache._clock = guard.breaker._clock = lambda: now
    await log()
    fake.answer = DOWN
    now = 240
    with caplog.at_level(logging.WARNING):
        assert (await log()).code == 0
    assert "let in on an earlier login" in caplog.text
    assert (await log("u", b"wrong")).code == 0x88
    now = 360
    caplog.clear()
    assert (await log()).code == 0x88
    assert "let in" not in caplog.text


async def test_a46_a_purge_makes_the_next_login_ask(login: Any) -> None:
    fake = Fake(ALLOW)
    log = await login(instance("one", fake))
    await log()
    fake.answer = DENY
    assert log.start().code == 0
    assert log.gate.purge("u") == 1
    assert (await log()).code == 0x86


async def test_unknown_users_cost_the_time_of_a_password_check(login: Any) -> None:
    burned: list[bytes] = []

    class Burning(Fake):
        async def burn(self, password: bytes) -> None:
            burned.append(password)

    log = await login(instance("one", Burning(IGNORE)), instance("two", Fake(IGNORE)))
    assert (await log()).code == 0x86
    assert burned == [b"p"]
    log = await login(instance("one", Burning(IGNORE)), instance("two", Fake(DENY)))
    await log()
    assert len(burned) == 1, "somebody else knew the user"


@pytest.mark.parametrize("error", [Busy("too many passwords"), BackendUnavailable("no answer")])
@pytest.mark.parametrize("on_error", ["deny", "ignore"])
async def test_under_load_an_unknown_user_is_told_what_a_known_one_is(
    login: Any, error: Exception, on_error: str
) -> None:
    class Loaded(Fake):
        async def burn(self, password: bytes) -> None:
            raise error

    def answer(client: Client, password: bytes) -> Any:
        return error if client.username == "known" else IGNORE

    log = await login(instance("one", Loaded(answer), on_error=on_error), instance("two", Fake(IGNORE)))
    known, unknown = [(await log(name)).code for name in ("known", "unknown")]
    assert known == unknown == (0x89 if isinstance(error, Busy) else 0x88)


# --- certificates and workers ----------------------------------------------------------------------------------------


class Directory(Fake):
    """Knows the rights of users without their passwords."""

    known: Any = None

    async def rules(self, client: Client) -> Any:
        return self.known(client) if callable(self.known) else self.known


async def test_a_certificate_names_the_user_and_the_backend_must_know_it(login: Any) -> None:
    fake = Directory(DENY)
    log = await login(instance("one", fake))
    channel = await log(None, None, username="dev1", cert_common_name="dev1")
    assert channel.code == 0x87
    fake.known = [allow("d/${cert_common_name}")]
    channel = await log("liar", None, username="dev1", cert_common_name="dev1")
    assert channel.code == 0
    assert channel.principal.username == "dev1"
    assert log.gate.may_publish(channel.principal, "d/dev1") == 1
    assert log.gate.may_publish(channel.principal, "d/liar") == 0
    assert (await log("dev1", b"p", username="dev1")).code == 0x86, "a password, when given, is checked too"
    fake.known = DOWN
    fake.known = lambda client: (_ for _ in ()).throw(DOWN)
    assert (await log(None, None, username="dev1")).code == 0x88


async def test_a_certificate_is_enough_where_no_backend_can_tell(login: Any) -> None:
    log = await login(instance("one", Fake(DENY)))
    assert (await log(None, None, username="dev1")).code == 0
    assert (await log(None, None, auth=(), username="dev1")).code == 0x87
    log = await login()
    assert (await log(None, None, username="dev1")).code == 0


async def test_workers_come_in_by_the_internal_listener_only(login: Any) -> None:
    log = await login(allow_anonymous=True)
    channel = log.start(None, None, "isthmus/kafka/0", privileged=True)
    assert (channel.principal.privileged, channel.principal.origin) == (True, "kafka")
    assert log.gate.may_receive(channel.principal, "anything") == 1
    channel = log.start(None, None, "isthmus/kafka/0")
    assert not channel.principal.privileged
    assert channel.principal.origin is None


# --- rights and reload -----------------------------------------------------------------------------------------------


class WithRules(Fake):
    def __init__(self, answer: Any, rules: list[Rule]) -> None:
        super().__init__(answer)
        self.common_rules = rules


async def test_rules_of_the_user_and_of_files_in_chain_order(login: Any) -> None:
    mine = Grant(rules=(allow("own/#"), Rule(False, "all", Template("shared/x"))))
    log = await login(
        instance("files", WithRules(IGNORE, [allow("shared/#"), Rule(False, "all", Template("own/secret"))])),
        instance("ldap", Fake(mine)),
    )
    who = (await log()).principal
    gate = log.gate
    assert [gate.may_publish(who, t) for t in ("own/a", "own/secret", "shared/x", "other")] == [1, 0, 1, 0]
    log = await login(instance("ldap", Fake(mine)), instance("files", WithRules(IGNORE, [allow("shared/#")])))
    who = (await log()).principal
    assert [log.gate.may_publish(who, t) for t in ("own/secret", "shared/x", "shared/y")] == [1, 0, 1]
    who = (await log(auth=("ldap",))).principal
    assert log.gate.may_publish(who, "shared/y") == 0, "a listener's own list is about rules too"


async def test_clients_with_nothing_of_their_own_share_what_they_are_given(login: Any) -> None:
    log = await login(instance("files", WithRules(ALLOW, [allow("shared/#")])), allow_anonymous=True)
    first, second = [(await log("u", b"p", clientid)).principal for clientid in ("c1", "c2")]
    assert first.standing is second.standing
    assert (await log("u", b"p", "c3", auth=("files",))).principal.standing is not first.standing
    nobody = (await log(None, None, "c4")).principal
    assert nobody.standing is not first.standing
    assert (first.backend, nobody.backend) == ("files", None)
    proved = (await log("u", b"p", "c5", cert_common_name="sensor")).principal
    assert proved.value("cert_common_name") == "sensor"
    assert first.value("cert_common_name") is None


async def test_z14_new_rights_of_one_client_are_not_its_neighbours(login: Any) -> None:
    log = await login(instance("one", Fake(ALLOW)))
    first, second = [(await log("u", b"p", clientid)).principal for clientid in ("c1", "c2")]
    assert first.standing is second.standing
    assert log.gate.apply(first, Grant(superuser=True, rules=(allow("own/#"),), attributes={"Site": "n"}))
    assert (first.superuser, first.value("attr.site")) == (True, "n")
    assert (second.superuser, second.value("attr.site"), second.own_rules) == (False, None, ())
    assert log.gate.may_publish(second, "own/x") == 0
    assert first.backend == second.backend == "one"


async def test_z14_a_listener_that_names_fewer_backends_has_fewer_rules(login: Any) -> None:
    log = await login(
        instance("one", WithRules(ALLOW, [allow("a/#")])), instance("two", WithRules(IGNORE, [allow("b/#")]))
    )
    everywhere = (await log("u", b"p", "c1")).principal
    narrow = (await log("u", b"p", "c2", auth=("one",))).principal
    for _ in range(2):  # the second time from what is remembered
        assert [log.gate.may_publish(everywhere, t) for t in ("a/x", "b/x")] == [1, 1]
        assert [log.gate.may_publish(narrow, t) for t in ("a/x", "b/x")] == [1, 0]
        everywhere.forget()
        narrow.forget()


async def test_no_match_and_superusers(login: Any) -> None:
    log = await login(instance("one", WithRules(ALLOW, [Rule(False, "all", Template("no/#"))])), no_match="allow")
    who = (await log()).principal
    assert (log.gate.may_publish(who, "any"), log.gate.may_publish(who, "no/x")) == (1, 0)
    log = await login(instance("one", WithRules(Grant(superuser=True), [Rule(False, "all", None)])))
    who = (await log()).principal
    assert log.gate.may_subscribe(who, "#") == 1


async def test_z03_unsafe_identities_are_counted_and_logged(login: Any, caplog: pytest.LogCaptureFixture) -> None:
    log = await login(instance("one", WithRules(ALLOW, [allow("dev/%c/#")])))
    who = (await log("u", b"p", "#")).principal
    assert log.gate.may_publish(who, "dev/#/x") == 0
    assert log.gate.may_subscribe(who, "dev/#") == 0
    assert log.gate.counters["unsafe_identity"] == 1, "once a session"
    assert "may not stand in a topic" in caplog.text


async def test_a_client_id_that_the_server_assigns_counts_in_rules(login: Any) -> None:
    log = await login(instance("one", WithRules(ALLOW, [allow("dev/%c/#")])))
    who = (await log("u", b"p", "")).principal
    assert log.gate.may_publish(who, "dev//x") == 0
    who.clientid = "auto-1"
    assert log.gate.may_publish(who, "dev/auto-1/x") == 1


async def test_z14_a_reload_changes_the_rules_of_live_sessions(login: Any) -> None:
    first = WithRules(ALLOW, [allow("a/#")])
    log = await login(instance("one", first))
    who = (await log()).principal
    told: list[Any] = []
    log.gate.rights_changed = told.append
    assert log.gate.may_receive(who, "a/x") == 1
    second = WithRules(ALLOW, [allow("b/#")])
    await log.gate.replace(settings(instance("one", second, cache_ttl=1)))
    assert told == [None]
    assert (log.gate.may_receive(who, "a/x"), log.gate.may_receive(who, "b/x")) == (0, 1)
    async with asyncio.timeout(2):
        await first.has_closed.wait()


async def test_c08_a_reload_that_fails_keeps_the_old_rules(login: Any) -> None:
    log = await login(instance("one", WithRules(ALLOW, [allow("a/#")])))
    who = (await log()).principal
    with pytest.raises(AccessError, match=r"acl\.conf:3"):
        await log.gate.replace(settings(instance("one", ValueError("acl.conf:3: 'ie#' is not a topic filter"), pool=3)))
    assert log.gate.may_receive(who, "a/x") == 1


async def test_an_unchanged_backend_stays_open_over_a_reload(login: Any) -> None:
    fake = Fake(ALLOW)
    log = await login(instance("one", fake))
    await log()
    await log.gate.replace(settings(instance("one", Fake(DENY)), allow_anonymous=True))
    assert log.start().code == 0, "and so does its cache"
    assert log.start(None, None).code == 0
    await log.gate.replace(settings(instance("one", Fake(DENY)), timeout=1))
    assert (await log()).code == 0x86


async def test_a_removed_backend_takes_the_rights_it_gave_with_it(login: Any) -> None:
    log = await login(instance("one", Fake(Grant(rules=(allow("a"),)))), instance("two", Fake(ALLOW)))
    who = (await log()).principal
    assert log.gate.may_publish(who, "a") == 1
    await log.gate.replace(settings(instance("two", Fake(ALLOW))))
    assert log.gate.may_publish(who, "a") == 0


async def test_a_login_under_way_is_judged_by_what_a_reload_put_in_force(login: Any) -> None:
    asked = asyncio.Event()
    go = asyncio.Event()

    async def slow(client: Client, password: bytes) -> Verdict:
        asked.set()
        await go.wait()
        return ALLOW

    old, new = instance("old", Fake(slow)), Fake(DENY)
    log = await login(old)
    channel = log.start()
    await asked.wait()
    await log.gate.replace(settings(old, instance("new", new), order=("new",)))
    go.set()
    await channel.answered.wait()
    assert channel.code == 0x86
    assert new.calls == [("u", b"p")]


async def test_after_a_reload_those_are_disconnected_who_would_be_refused(login: Any) -> None:
    one, two = instance("one", Fake(ALLOW)), instance("two", Fake(ALLOW))
    log = await login(one, two, allow_anonymous=True)
    by_one, by_two, nobody = await log(), await log(auth=("two",)), log.start(None, None)
    worker = log.start(privileged=True)
    everybody = [by_one, by_two, nobody, worker]
    assert await log.gate.recheck(everybody) == 0
    await log.gate.replace(settings(one))
    assert await log.gate.recheck(everybody) == 2
    assert [channel.told for channel in everybody] == [None, 0x87, 0x87, None]
    assert not log.gate.may_publish(by_two.principal, "a"), "its will neither"
    assert await log.gate.recheck(everybody) == 0, "once each"
    assert log.gate.counters["revoked"] == 2


def proved(log: Login, username: str, **more: Any) -> Any:
    """A login by certificate."""
    return log(None, None, f"c-{username}", username=username, **more)


async def test_after_a_reload_certificates_are_judged_as_at_a_login(login: Any) -> None:
    """A backend that was added must know their users and gives them their rights; an empty order refuses them."""
    fake = Directory(IGNORE)
    fake.known = lambda client: {"dev": Grant(rules=(allow("own"),)), "locked": Refusal("locked")}.get(client.username)
    one, two = instance("one", Fake(ALLOW)), instance("two", fake, refresh=60)
    log = await login(one)
    names = ("dev", "locked", "stranger")
    everybody = [await proved(log, name) for name in names]
    narrow = await proved(log, "stranger", auth=("one",))
    assert [channel.code for channel in everybody] == [0, 0, 0]
    assert await log.gate.recheck([*everybody, narrow]) == 0
    told: list[Any] = []
    log.gate.rights_changed = told.append
    await log.gate.replace(settings(one, two))
    assert await log.gate.recheck([*everybody, narrow]) == 2
    assert [channel.told for channel in (*everybody, narrow)] == [None, 0x87, 0x87, None]
    assert [(await proved(log, name)).code for name in names] == [0, 0x86, 0x87], "as a login is"
    dev = everybody[0].principal
    assert (dev.backend, log.gate.may_publish(dev, "own"), told) == ("two", 1, [None, "c-dev"])
    fake.known = None
    await log.gate.replace(settings(one, instance("two", fake, refresh=0.001)))
    log.gate.kick = lambda clientid, code: told.append((clientid, code))
    await log.gate._refresher.run_due()
    assert ("c-dev", 0x87) in told, "and like others they lose what they were given"


async def test_after_a_reload_an_empty_order_refuses_certificates_and_a_failure_does_what_it_does_at_a_login(
    login: Any,
) -> None:
    down = Directory(IGNORE)
    down.known = lambda client: (_ for _ in ()).throw(DOWN)
    log = await login(instance("one", Fake(ALLOW)))
    channel, other = await proved(log, "dev"), await proved(log, "other", auth=("one",))
    await log.gate.replace(settings(instance("one", Fake(ALLOW)), order=()))
    assert await log.gate.recheck([channel, other]) == 1
    assert (channel.told, other.told) == (0x87, None)
    await log.gate.replace(settings(instance("one", down, cache_ttl=1)))
    assert await log.gate.recheck([other]) == 1
    assert (await proved(log, "other")).code == 0x88


async def test_after_a_reload_cookies_of_anonymous_clients_are_looked_at(login: Any) -> None:
    class Cookies(Fake):
        without_password = True

    reader = Cookies(lambda client, password: Grant() if client.certificate["ws_cookie"] == "good" else IGNORE)
    log = await login(allow_anonymous=True)
    good, bad = [await log(None, None, cookie, ws_cookie=cookie) for cookie in ("good", "bad")]
    nobody = await log(None, None, "n")
    await log.gate.replace(settings(instance("cookies", reader), allow_anonymous=True))
    assert await log.gate.recheck([good, bad, nobody]) == 1
    assert [channel.told for channel in (good, bad, nobody)] == [None, 0x87, None]
    assert good.principal.backend == "cookies"
    assert (await log(None, None, "x", ws_cookie="bad")).code == 0x86


async def test_rights_are_read_again_after_a_while_and_after_a_reload(login: Any) -> None:
    fake = Directory(Grant(rules=(allow("a"),)))
    fake.known = Grant(rules=(allow("b"),))
    log = await login(instance("one", fake, refresh=0.001))
    who = (await log()).principal
    told: list[Any] = []
    kicked: list[Any] = []
    log.gate.rights_changed = told.append
    log.gate.kick = lambda clientid, code: kicked.append((clientid, code))
    await asyncio.sleep(0.002)
    await log.gate._refresher.run_due()
    assert told == ["c"]
    assert (log.gate.may_publish(who, "a"), log.gate.may_publish(who, "b")) == (0, 1)
    fake.known = lambda client: (_ for _ in ()).throw(DOWN)
    await asyncio.sleep(0.002)
    await log.gate._refresher.run_due()
    assert log.gate.may_publish(who, "b") == 1, "an error takes nothing away"
    again = Directory(ALLOW)
    again.known = None
    await log.gate.replace(settings(instance("one", again, refresh=0)))
    await log.gate._refresher.run_due()
    assert kicked == [("c", 0x87)]
    assert log.gate.may_publish(who, "b") == 0


async def test_clients_that_left_are_not_remembered(login: Any) -> None:
    fake = Directory(Grant(rules=(allow("a"),)))
    log = await login(instance("one", fake))
    for n in range(20):
        await log(f"u{n}")
    gc.collect()
    assert sum(map(len, log.gate._refresher._live.values())) == 0


async def test_an_expired_login_has_no_rights_and_is_disconnected(login: Any) -> None:
    log = await login(instance("one", Fake(Grant(rules=(allow("a"),), expires_at=time.time() + 1.0))))
    kicked = asyncio.Event()
    log.gate.kick = lambda clientid, code: kicked.set()
    who = (await log()).principal
    assert log.gate.may_publish(who, "a") == 1
    async with asyncio.timeout(5):
        await kicked.wait()
    await asyncio.sleep(0.01)
    assert log.gate.may_publish(who, "a") == 0


async def test_rules_of_a_backend_that_are_not_valid_deny_everything(login: Any) -> None:
    log = await login(instance("one", Fake(Grant(rules=(allow("a"), allow("ie#"))))), no_match="allow")
    who = (await log()).principal
    assert log.gate.may_publish(who, "a") == 0


async def test_closing_ends_pending_logins(login: Any) -> None:
    fake = Fake(hang)
    gate = AccessGate(settings(instance("one", fake)))
    await gate.open()
    channel = Login(gate).start()
    await asyncio.sleep(0.01)
    await gate.close()
    assert channel.code is None
    assert fake.running == 0
    assert fake.closed


async def test_what_needs_no_backend_is_answered_before_the_call_returns(login: Any) -> None:
    log = await login(instance("one", Fake(ALLOW)), allow_anonymous=True)
    await log()
    assert [log.start(None, None).code for _ in range(100)] == [0] * 100
    assert log.start().code == 0, "the second login comes from the cache"
