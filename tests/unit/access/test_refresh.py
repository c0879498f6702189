"""Rights that are read again and logins that end, of clients that stay, leave, come back and are cut meanwhile."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import pytest

from broker.access import refresh
from broker.config.template import Template
from broker.extend.auth import BackendUnavailable, Client, Grant, Rule
from tests.unit.access.doubles import Channel, Fake, Login, instance, settings

DOWN = BackendUnavailable("connection refused")
FOREVER = 30 * 365 * 86_400.0


def rule(topic: str, allow: bool = True, group: str | None = None) -> Rule:
    return Rule(allow, "all", Template(topic), group=group)


class Directory(Fake):
    """Knows the rights of users without their passwords."""

    known: Any = None

    async def rules(self, client: Client) -> Any:
        answer = self.known(client) if callable(self.known) else self.known
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Common(Fake):
    """Has rules for everybody."""

    common_rules = (rule("a/secret", False, "guests"), rule("b", True, "guests"), rule("a/#"))


class Connected:
    """Who is connected, as the application knows it, and who was told to go."""

    def __init__(self, log: Login) -> None:
        self.here: set[Any] = set()
        self.kicked: list[tuple[str, int]] = []
        self.times: list[float] = []
        log.gate.kick = self.kick
        log.gate.present = self.here.__contains__

    def kick(self, clientid: str, code: int) -> None:
        self.kicked.append((clientid, code))
        self.times.append(time.time())


async def test_z31_an_outage_takes_no_group_away(login: Any) -> None:
    """A denial for a group goes on, and so does a permission; when the backend is back it is asked again."""
    backend = Directory(Grant(groups=frozenset({"guests"})))
    backend.known = DOWN
    log = await login(instance("one", backend, refresh=0.001), instance("rules", Common(backend.answer)))
    who = (await log()).principal
    for _ in range(2):
        assert [log.gate.may_publish(who, topic) for topic in ("a/secret", "b", "a/x")] == [0, 1, 1]
        await log.gate._refresher.run_due()
    backend.known = Grant()
    await log.gate._refresher.run_due()
    assert [log.gate.may_publish(who, topic) for topic in ("a/secret", "b", "a/x")] == [1, 0, 1]


async def test_who_has_the_client_id_now_is_not_disconnected_for_who_had_it(login: Any) -> None:
    """The principal of a connection that is gone lives on in the messages it left."""
    backend = Directory(Grant(rules=(rule("a"),)))
    log = await login(instance("one", backend, refresh=0.001))
    connected = Connected(log)
    left, stays = (await log("left")).principal, (await log("stays", b"p", "d")).principal
    connected.here.add(stays)
    await log.gate._refresher.run_due()
    assert connected.kicked == [("d", 0x87)]
    assert not log.gate.may_publish(left, "a"), "what it left behind is judged by what it may now"


async def test_the_end_of_a_login_is_not_that_of_the_next_with_its_client_id(login: Any) -> None:
    soon = time.time() + 0.05
    log = await login(instance("one", Fake(lambda client, password: Grant(expires_at=soon))))
    connected = Connected(log)
    left, stays = (await log("left")).principal, (await log("stays", b"p", "d")).principal
    connected.here.add(stays)
    async with asyncio.timeout(5):
        while not connected.kicked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert connected.kicked == [("d", 0x87)]
    assert left.expires_at == soon


async def test_a_client_that_left_leaves_no_timer(login: Any) -> None:
    log = await login(instance("one", Fake(Grant(expires_at=time.time() + FOREVER))))
    kept = await log()
    timers = log.gate._refresher._timers
    handles: list[asyncio.TimerHandle] = []
    for n in range(50):
        left = await log(f"u{n}")
        handles += list(timers.values())[1:]
        del left
    gc.collect()
    await asyncio.sleep(0.01)
    assert len(handles) >= 50
    assert all(handle.cancelled() for handle in handles)
    assert len(timers) == 1
    assert next(iter(timers))() is kept.principal
    await log.gate.close()
    assert not timers


async def test_an_end_that_is_further_than_a_timer_reaches_is_waited_for(
    login: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "LONGEST", 0.02)
    end = time.time() + 0.2
    log = await login(instance("one", Fake(Grant(expires_at=end))))
    connected = Connected(log)
    connected.here.add((await log()).principal)
    async with asyncio.timeout(5):
        while not connected.kicked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert connected.times[0] >= end


async def test_another_end_counts_from_when_it_is_read(login: Any) -> None:
    """Put off, put forward, set where there was none; a backend that does not say it again changes nothing."""
    now = time.time()
    backend = Directory(lambda client, password: Grant(expires_at={"none": None}.get(client.username, now + 1.0)))
    ends = {"later": now + FOREVER, "none": now + 0.5, "silent": None}
    backend.known = lambda client: Grant(expires_at=ends[client.username])
    log = await login(instance("one", backend, refresh=0.001))
    connected = Connected(log)
    channels = {name: await log(name, b"p", name) for name in ends}
    connected.here.update(channel.principal for channel in channels.values())
    await log.gate._refresher.run_due()
    assert [channel.principal.expires_at for channel in channels.values()] == [now + FOREVER, now + 0.5, now + 1.0]
    assert len(log.gate._refresher._timers) == 3, "one each, the earlier ones are gone"
    async with asyncio.timeout(5):
        while len(connected.kicked) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert connected.kicked == [("none", 0x87), ("silent", 0x87)]
    assert connected.times[0] >= now + 0.5
    assert connected.times[1] >= now + 1.0
    assert log.gate.apply(channels["silent"].principal, Grant(expires_at=now + FOREVER)) is True


async def test_z14_who_was_disconnected_meanwhile_is_given_nothing(login: Any) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def known(client: Client) -> Grant:
        asked.set()
        await go.wait()
        return Grant(rules=(rule("a"),), superuser=True)

    backend = Directory(Grant(rules=(rule("a"),)))
    backend.known = known
    log = await login(instance("one", backend, refresh=0.001))
    channel: Channel = await log()
    reading = asyncio.create_task(log.gate._refresher.run_due())
    async with asyncio.timeout(5):
        await asked.wait()
        log.gate.revoke(channel)
        go.set()
        await reading
    assert not log.gate.may_publish(channel.principal, "a")
    assert not log.gate._refresher._queues, "nor is it asked about again"


async def test_z14_an_answer_of_a_backend_that_was_replaced_meanwhile_does_not_count(login: Any) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def known(client: Client) -> Grant:
        asked.set()
        await go.wait()
        return Grant(rules=(rule("a"),))

    old, new = Directory(Grant()), Directory(Grant())
    old.known, new.known = known, Grant(rules=(rule("b"),))
    log = await login(instance("one", old, refresh=0.001))
    who = (await log()).principal
    reading = asyncio.create_task(log.gate._refresher.run_due())
    async with asyncio.timeout(5):
        await asked.wait()
        await log.gate.replace(settings(instance("one", new, refresh=60)))
        go.set()
        await reading
    assert not log.gate.may_publish(who, "a")
    await log.gate._refresher.run_due()
    assert log.gate.may_publish(who, "b")
    assert sum(map(len, log.gate._refresher._queues.values())) == 1, "it is due once, not twice"
