"""Stand-ins for the engine's channel and for backends that behave as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from broker.access.gate import AccessGate
from broker.config.models import AccessConfig
from broker.extend.auth import Answer, AuthConfig, Client
from broker.extend.registry import Backend


class Fake:
    """A backend whose answers are a function; counts how many calls run at once."""

    def __init__(self, answer: Callable[[Client, bytes], Any] | Any) -> None:
        self.answer = answer
        self.calls: list[tuple[str | None, bytes]] = []
        self.running = 0
        self.most = 0
        self.cancelled = 0
        self.has_closed = asyncio.Event()

    async def authenticate(self, client: Client, password: bytes) -> Answer:
        self.calls.append((client.username, password))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            answer = self.answer(client, password) if callable(self.answer) else self.answer
            if asyncio.iscoroutine(answer):
                answer = await answer
            if isinstance(answer, BaseException):
                raise answer
            return answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    @property
    def closed(self) -> bool:
        return self.has_closed.is_set()

    async def check(self) -> None: ...

    async def close(self) -> None:
        self.has_closed.set()


def instance(name: str, backend: Any, **options: Any) -> SimpleNamespace:
    """A table as the configuration would give it; `backend` may be an exception to raise at opening."""

    async def opened(config: AuthConfig) -> Any:
        if isinstance(backend, BaseException):
            raise backend
        return backend

    config = AuthConfig.model_validate(options).named(name)
    return SimpleNamespace(
        name=name, kind="fake", enabled=True, raw=options, origin=f"conf.d/{name}.toml:1", config=config,
        backend=Backend("auth.fake", AuthConfig, opened), fingerprint="",
    )  # fmt: skip


def settings(*instances: Any, **access: Any) -> SimpleNamespace:
    return SimpleNamespace(access=AccessConfig(**access), auth={one.name: one for one in instances})


class Channel:
    """What the gate sees of a connection."""

    def __init__(self, *, auth: tuple[str, ...] | None = None, privileged: bool = False, **identity: str) -> None:
        self.listener = SimpleNamespace(name="tcp", auth=auth, privileged=privileged, attributes={})
        self.peer = "127.0.0.1:5000"
        self.peerhost = "127.0.0.1"
        self.identity = identity or None
        self.answered = asyncio.Event()
        self.principal: Any = None
        self.code: int | None = None
        self.told: int | None = None

    def accept(self, principal: Any) -> None:
        assert self.code is None, "answered twice"
        self.principal, self.code = principal, 0
        self.answered.set()

    def refuse(self, code: int) -> None:
        assert self.code is None, "answered twice"
        self.code = code
        self.answered.set()

    def disconnect(self, code: int) -> None:
        self.told = code


class Login:
    """Logs a client in through a gate."""

    def __init__(self, gate: AccessGate) -> None:
        self.gate = gate

    def start(
        self, username: str | None = "u", password: bytes | None = b"p", clientid: str = "c", /, **more: Any
    ) -> Channel:
        channel = Channel(**more)
        self.gate.authenticate(channel, SimpleNamespace(client_id=clientid, username=username, password=password))
        return channel

    async def __call__(self, *arguments: Any, **more: Any) -> Channel:
        channel = self.start(*arguments, **more)
        async with asyncio.timeout(10):
            await channel.answered.wait()
        return channel
