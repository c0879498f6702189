"""Gates for the tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from broker.access.gate import AccessGate
from tests.unit.access.doubles import Login, settings


@pytest.fixture
async def login() -> AsyncIterator[Callable[..., Awaitable[Login]]]:
    """`log = await login(instance("a", Fake(…)), no_match="allow")`, then `channel = await log("user", b"pw")`."""
    gates: list[AccessGate] = []

    async def make(*instances: Any, **access: Any) -> Login:
        gate = AccessGate(settings(*instances, **access))
        gates.append(gate)
        await gate.open()
        return Login(gate)

    yield make
    for gate in gates:
        await gate.close()
