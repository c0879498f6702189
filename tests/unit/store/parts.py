"""What the store's tests share: records, an owner that remembers, a store without a running loop, states of a kill."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.engine import records
from broker.extend.store import StoreError
from broker.store.journal import FileStore
from broker.store.opening import Found, Recovered, open_store

SMALL = 4096
"""Bytes of a segment in tests that need several."""


def record(payload: bytes, kind: int = records.CLEARED) -> bytes:
    """A record; of this kind any payload makes sense."""
    return bytes([kind]) + len(payload).to_bytes(4, "little") + payload


class Owner:
    """Hears how commits ended; `log` has them in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.places: dict[int, list[tuple[int, int]]] = {}
        self.errors: dict[int, StoreError] = {}

    def written(self, number: int, places: list[tuple[int, int]]) -> None:
        self.log.append(("written", number))
        self.places[number] = places

    def failed(self, number: int, error: StoreError) -> None:
        self.log.append(("failed", number))
        self.errors[number] = error


def open_it(folder: Path, loop: asyncio.AbstractEventLoop, **options: Any) -> tuple[FileStore, Recovered]:
    chosen = {"durability": "flush", "interval": 0.05, "min_free": 0, "segment_bytes": SMALL, **options}
    return open_store(folder, loop=loop, **chosen)


class Run:
    """One life of a store, from opening to `close`, with everything that happened in it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.owner = Owner()
        try:
            self.store, self.recovered = open_it(folder, self.loop, **options)
            self.store.owner = self.owner
            self.frames: list[Found] = list(self.recovered.frames())
        except BaseException:
            self.loop.close()
            raise
        self._numbers = 0

    @property
    def bodies(self) -> list[bytes]:
        return [frame[2] for frame in self.frames]

    def write(self, *bodies: bytes, entries: int = 1, clock_ms: int = 0) -> int:
        """One commit with a frame per body; returns its number."""
        self._numbers += 1
        self.store.write(self._numbers, [(body, entries) for body in bodies], clock_ms)
        return self._numbers

    def wait(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Run the loop until it is so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never became so"
            self.loop.run_until_complete(asyncio.sleep(0.002))

    def settle(self) -> None:
        """Every commit so far has ended."""
        self.wait(lambda: len(self.owner.log) == self._numbers)

    def close(self) -> None:
        self.store.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Run]:
    run = Run(folder, **options)
    try:
        yield run
    finally:
        run.close()


def fill(folder: Path, *bodies: bytes, entries: int = 1, **options: Any) -> dict[int, list[tuple[int, int]]]:
    """Write every body as a commit of its own and kill the broker: nothing says that it stopped cleanly."""
    with running(folder, **options) as run:
        for body in bodies:
            run.write(body, entries=entries)
    assert [kind for kind, _ in run.owner.log] == ["written"] * len(bodies)
    (folder / "closed").unlink()
    return run.owner.places


def bodies_in(folder: Path, **options: Any) -> list[bytes]:
    """What a start finds."""
    with running(folder, **options) as run:
        return run.bodies


CHANGES = (
    "chmod", "fdatasync", "fsync", "ftruncate", "mkdir", "open", "pwrite", "remove", "rename", "replace", "rmdir",
    "unlink", "write",
)  # fmt: skip


class Kills:
    """Keeps the state of a folder before each call that could change something: what a kill there leaves behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watched: Path, states: Path) -> None:
        self.states: list[Path] = []
        self._watched = watched
        self._into = states
        self._busy = False
        states.mkdir()
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._before(getattr(os, name)))

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not self._busy:
                self._busy = True
                state = self._into / f"{len(self.states):03d}"
                shutil.copytree(self._watched, state)
                self.states.append(state)
                self._busy = False
            return function(*arguments, **keywords)

        return call

    def stop(self) -> list[Path]:
        """The states so far; nothing is kept from here on."""
        self._busy = True
        return self.states
