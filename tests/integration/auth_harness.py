"""What every auth backend that asks another system has to stand, whatever that system is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from broker.access.gate import AccessGate
from broker.extend.auth import BackendUnavailable, Client, Grant, Verdict
from broker.extend.registry import Backend
from tests.clock import clock
from tests.proxy import Proxy
from tests.servers import PATIENCE
from tests.unit.access.doubles import Login, settings

ROOT = Path(__file__).resolve().parents[2]

LOGINS = 10_000 if os.environ.get("ISTHMUS_SOAK") == "1" else 500
"""Logins that are cancelled, refused and let in at the same time (A-42)."""
PEOPLE = {f"dev{number}": f"pw-{number}".encode() for number in range(20)}
"""Who is in every store of these tests; each may publish to ``own/NAME/#``."""


def digest(password: bytes, salt: str = "") -> str:
    """As EMQ's relatives store it."""
    return hashlib.sha256(salt.encode() + password).hexdigest()


def instance(backend: Backend, raw: Mapping[str, Any], name: str = "") -> SimpleNamespace:
    """An `[auth.*]` table as the configuration gives it."""
    kind = backend.name.partition(".")[2]
    name = name or kind
    config = backend.config.model_validate(dict(raw)).named(name)
    return SimpleNamespace(
        name=name, kind=kind, enabled=True, raw=dict(raw), origin=f"conf.d/{name}.toml:1", fingerprint="",
        config=config, backend=backend,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def logins(*instances: SimpleNamespace, **access: Any) -> AsyncIterator[Login]:
    """`async with logins(instance(BACKEND, {…})) as log:` an access gate in front of real backends."""
    gate = AccessGate(settings(*instances, **{"lockout": {"max_failures": 0}, **access}))
    await gate.open()
    try:
        yield Login(gate)
    finally:
        await gate.close()


@contextlib.asynccontextmanager
async def opened(backend: Backend, raw: Mapping[str, Any]) -> AsyncIterator[Any]:
    """One backend by itself, without the gate's cache, breaker and deadline."""
    config = backend.config.model_validate(dict(raw)).named(backend.name.partition(".")[2])
    made = await backend.open(config)
    try:
        yield made
    finally:
        await made.close()


def isthmus(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command line, in a folder with a `conf.d`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ISTHMUS__")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments, "--conf", "conf.d"],
        cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip


def example(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """The shipped example as the only fragment of `folder`, with texts replaced."""
    text = (ROOT / "conf.d" / f"{name}.toml.example").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "conf.d").mkdir(exist_ok=True)
    (folder / "conf.d" / f"{name}.toml").write_text(text)
    return folder


def allowed(answer: object) -> bool:
    return answer is Verdict.ALLOW or isinstance(answer, Grant)


async def outage_and_return(log: Login, proxy: Proxy, username: str, password: bytes, name: str) -> None:
    """A backend that goes away and comes back: first denial, denials with the breaker open, recovery (A-39)."""
    before = await recovers(log, username, password, name)
    await proxy.down()
    began = clock()
    assert (await log(username, password, "down")).code == 0x88
    assert clock() - began < 3.0
    for number in range(5):
        await log(username, password, f"down-{number}")
    assert log.gate.status()[name]["state"] == "open"
    calls, times = log.gate.status()[name]["calls"], []
    for number in range(20):
        began = time.monotonic()
        assert (await log(username, password, f"open-{number}")).code == 0x88
        times.append(time.monotonic() - began)
    assert log.gate.status()[name]["calls"] == calls, "the backend is left alone"
    assert statistics.median(times) < 0.010 * PATIENCE
    assert (await log(username, password, before)).code == 0, "what is cached stays good"
    await proxy.up()
    await recovers(log, username, password, name)


_numbers = itertools.count(1)


async def recovers(log: Login, username: str, password: bytes, name: str) -> str:
    """Logs in, each time as a client the cache does not know, until it succeeds: within ten seconds, and another pause
    of the breaker for a probe that fails. Answers as which client."""
    began, errors = clock(), log.gate.status()[name]["errors"]
    while (await log(username, password, client := f"back-{next(_numbers)}")).code:
        status = log.gate.status()[name]
        seconds = min(10 + 6 * (status["errors"] - errors), 25)
        assert clock() - began < seconds * PATIENCE, status
        await asyncio.sleep(0.1)
    assert log.gate.status()[name]["state"] == "ok"
    return client


async def black_hole(log: Login, proxy: Proxy, username: str, password: bytes, name: str) -> None:
    """Connections stay open and nothing comes back (A-41): denied in time, no call is left, and it recovers."""
    await recovers(log, username, password, name)
    proxy.black_hole = True
    began = clock()
    codes = await asyncio.gather(*(log(username, password, f"hole-{number}") for number in range(3)))
    assert {channel.code for channel in codes} == {0x88}
    assert clock() - began < 3.0
    assert proxy.counts.swallowed > 0, "the fault happened"
    proxy.black_hole = False
    await proxy.cut()
    await recovers(log, username, password, name)
    assert log.gate.status()[name]["running"] == 0


async def cancelled_and_interleaved(
    backend: Any,
    people: Mapping[str, bytes],
    right: Callable[[str, Any], bool],
    *,
    count: int,
    at_once: int = 25,
    seed: int = 42,
) -> tuple[int, int]:
    """`count` logins, a third cancelled at a random point, a third with a wrong password (A-42). `right` tells whether
    a permission is this user's own. Returns how many were judged and how many were cancelled; no verdict is wrong."""
    dice = random.Random(seed)
    names = list(people)
    judged = cancelled = 0

    async def one(number: int) -> None:
        nonlocal judged, cancelled
        name, kind = dice.choice(names), number % 3
        password = people[name] if kind else people[name] + b"x"
        task = asyncio.create_task(backend.authenticate(Client(f"c{number}", name, "127.0.0.1"), password))
        if kind == 2:
            await asyncio.sleep(dice.random() * 0.004)
            task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError:
            cancelled += 1
            return
        judged += 1
        if kind:
            assert allowed(answer), (name, answer)
            assert right(name, answer), (name, answer)
        else:
            assert not allowed(answer), (name, answer)

    for start in range(0, count, at_once):
        await asyncio.gather(*(one(number) for number in range(start, min(count, start + at_once))))
    return judged, cancelled


async def unavailable(backend: Any, username: str, password: bytes, seconds: float) -> float:
    """How long the backend takes to say that it cannot answer; it must say so in time."""
    began = time.monotonic()
    try:
        answer = await backend.authenticate(Client("c", username, "127.0.0.1"), password)
    except BackendUnavailable:
        took = time.monotonic() - began
        assert took < seconds
        return took
    raise AssertionError(f"answered with {answer}")


def only_own(name: str, answer: Grant) -> bool:
    """Whether the permissions are this user's own."""
    return f"own/{name}/#" in {rule.filter.text for rule in answer.rules if rule.filter is not None}


class NetworkSuite:
    """What every backend does over a network that fails; needs a fixture `server` that has a port."""

    backend: ClassVar[Backend]
    table: ClassVar[Callable[..., dict[str, Any]]]
    """The table for what has a port."""

    @property
    def name(self) -> str:
        return self.backend.name.partition(".")[2]

    async def test_a39_outage_and_return(self, server: Any, start_proxy: Any) -> None:
        proxy = await start_proxy(server.port)
        async with logins(instance(self.backend, self.table(proxy, timeout=1))) as log:
            await outage_and_return(log, proxy, "dev1", b"pw-1", self.name)

    async def test_a41_a_black_hole(self, server: Any, start_proxy: Any) -> None:
        proxy = await start_proxy(server.port)
        async with logins(instance(self.backend, self.table(proxy, timeout=1))) as log:
            await black_hole(log, proxy, "dev1", b"pw-1", self.name)

    async def test_a42_cancelled_and_interleaved_logins(self, server: Any, start_proxy: Any) -> None:
        proxy = await start_proxy(server.port)
        proxy.delay = 0.001
        async with opened(self.backend, self.table(proxy, pool=8, timeout=10)) as backend:
            judged, cancelled = await cancelled_and_interleaved(backend, PEOPLE, only_own, count=LOGINS)
        assert cancelled > LOGINS / 10
        assert judged > LOGINS * 0.6

    def on_the_command_line(
        self, folder: Path, example_name: str, old: str, new: str, dead: str, says: str, *secrets: str
    ) -> None:
        """The shipped example with the address `old` replaced: checked, asked about dev1, and about nobody there."""
        example(folder, example_name, (old, new))
        assert isthmus(folder, "check", "--connect").returncode == 0
        ask = ("auth", "test", "--user", "dev1", "--client", "c1", "--publish")
        right = isthmus(folder, *ask, "own/dev1/x", stdin="pw-1\n")
        assert right.returncode == 0, right.stdout + right.stderr
        assert says in right.stdout
        assert isthmus(folder, *ask, "own/dev2/x", stdin="pw-1\n").returncode == 1
        wrong = isthmus(folder, *ask, "own/dev1/x", stdin="pw-2\n")
        assert wrong.returncode == 1
        for told in (right, wrong):
            assert not {"pw-1", "pw-2", *secrets} & set(told.stdout.split())
        example(folder, example_name, (old, dead))
        down = isthmus(folder, "check", "--connect")
        assert down.returncode != 0
        assert f"auth.{self.name}" in down.stdout + down.stderr
