"""A canary in a process of its own: what delays it is the broker, never a test that plays a crowd or a server itself.

`python -m tests.system.canary` reads one line of JSON, prints `singing` and goes on until its input ends; then it
prints how long every round trip took and how often it lost its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from tests.servers import PATIENCE
from tests.system.resilience import Canary, Trips


@dataclass
class Song(Trips):
    """What the canary tells at its end; nothing before."""

    trips: list[float] = field(default_factory=list)
    lost: int = 0


@contextlib.asynccontextmanager
async def canary_apart(to: str, every: float = 0.05, **options: str) -> AsyncIterator[Song]:
    """A canary at work until the block ends, one round trip each `every` seconds. `options` are those of a connection,
    `password` as text. Fails when a round trip takes ten seconds or the canary gets no connection."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.system.canary",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    song = Song()
    try:
        process.stdin.write(json.dumps({"to": to, "every": every, **options}).encode() + b"\n")
        async with asyncio.timeout(15 * PATIENCE):
            assert await process.stdout.readline() == b"singing\n", "the canary got no connection"
        yield song
        process.stdin.close()
        async with asyncio.timeout(15 * PATIENCE):
            last = await process.stdout.read()
        assert last, "the canary gave up"
        told = json.loads(last)
        song.trips, song.lost = told["trips"], told["lost"]
    finally:
        process.stdin.close()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()


async def sing(to: str, every: float, **options: Any) -> None:
    """Round trips until standard input ends."""
    password = options.pop("password", None)
    if password is not None:
        options["password"] = password.encode()
    canary = await Canary.open(to, **options)
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print("singing", flush=True)
    while not over.done():
        await canary.sing(every, every)
    lost = canary.lost
    await canary.disconnect()
    print(json.dumps({"trips": canary.trips, "lost": lost}))


if __name__ == "__main__":
    asyncio.run(sing(**json.loads(sys.stdin.readline())))
