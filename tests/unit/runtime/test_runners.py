"""Sinks and bridges from opening to closing, and the host that changes only what differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import bridges
import sinks
from broker.client.connection import Handler
from broker.extend.bridge import BridgeConfig, Local
from broker.extend.registry import Backend
from broker.extend.session import SessionSpec
from broker.extend.sink import Fatal, NotConnected, SinkConfig
from broker.runtime import bridge_runner, sink_runner
from broker.runtime.assignment import Assignment
from broker.runtime.attach import Internal
from broker.runtime.backoff import Backoff
from broker.runtime.bridge_runner import BridgeRunner
from broker.runtime.host import Host
from broker.runtime.sink_runner import SinkRunner
from tests.unit.runtime.fakes import FakeBroker, FakeSink, fake_broker, until

FILTERS: dict[str, Any] = {"filters": ["#"]}


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[FakeBroker]:
    async with fake_broker(tmp_path / "internal.sock") as running:
        yield running


def sink_runner_for(broker: FakeBroker, open_sink: Callable[[Any], Awaitable[Any]], **config: Any) -> SinkRunner:
    model = SinkConfig(**{**FILTERS, **config})
    model.named("store")
    return SinkRunner(Backend("sinks.fake", SinkConfig, open_sink), model, Internal(broker.url), probe_every=0.01)


async def test_each_lane_has_a_session_and_they_write_side_by_side(broker: FakeBroker) -> None:
    sink = FakeSink()
    sink.hold = asyncio.Event()

    async def open_sink(config: Any) -> FakeSink:
        return sink

    runner = sink_runner_for(broker, open_sink, lanes=3)
    for lane in range(3):
        broker.deliver(f"isthmus/store/{lane}", "a", str(lane).encode())
    runner.start()
    await until(lambda: runner.status()["in_flight"] == 3)
    assert runner.status()["state"] == "running"
    sink.hold.set()
    for lane in range(3):
        await broker.until_answered(f"isthmus/store/{lane}")
    status = runner.status()
    assert (status["acked"], status["retried"], status["dead"], status["lanes"]) == (3, 0, 0, 3)
    assert status["retries"] == {}
    await runner.close(1)
    assert sink.closed
    assert all(session.writer is None for session in broker.sessions.values())


async def test_lanes_attach_once_the_sink_is_open_and_opening_is_tried_again(broker: FakeBroker) -> None:
    sink = FakeSink()
    outcomes: list[Exception] = [NotConnected("later"), Fatal("no such table"), RuntimeError("odd")]
    alarms: list[str] = []
    states: list[str] = []

    async def open_sink(config: Any) -> FakeSink:
        states.append(runner.status()["state"])
        if outcomes:
            raise outcomes.pop(0)
        return sink

    runner = sink_runner_for(broker, open_sink)
    runner._alarm = alarms.append
    runner.start()
    await until(lambda: len(states) == 3)
    assert broker.ids_in_order == []
    runner.resume()  # does not wait for the next try
    await broker.until_attached("isthmus/store/0")
    assert states == ["connecting", "retrying", "paused", "retrying"]
    assert alarms == ["no such table"]
    await until(lambda: runner.status()["state"] == "running" and runner.status()["last_error"] is None)
    await runner.close(1)


async def test_a_paused_sink_stays_attached_and_takes_nothing(broker: FakeBroker) -> None:
    sink = FakeSink()

    async def open_sink(config: Any) -> FakeSink:
        return sink

    runner = sink_runner_for(broker, open_sink)
    runner.start()
    await broker.until_attached("isthmus/store/0")
    runner.pause()
    broker.deliver("isthmus/store/0", "a", b"1")
    await until(lambda: runner.status()["in_flight"] == 1)
    assert runner.status()["state"] == "paused"
    assert sink.stored == []
    runner.resume()
    await broker.until_answered("isthmus/store/0")
    assert runner.status()["state"] == "running"
    await runner.close(1)


class Restart(BaseModel):
    base: float = 0.01
    cap: float = 0.05


class FakeBridgeConfig(BridgeConfig):
    restart: Restart = Restart()

    def session(self) -> SessionSpec:
        return SessionSpec(filters=(("#", 1),))


class FakeBridge:
    def __init__(self) -> None:
        self.runs = 0
        self.closed = False
        self.lost = asyncio.Event()
        self.error: Exception = ConnectionError("remote went")

    async def run(self, local: Local) -> None:
        self.runs += 1
        await local.receive(Handler())
        await local.publish(Handler())
        local.report(state="connected", last_error=None, sent=self.runs)
        self.lost.clear()
        await self.lost.wait()
        raise self.error

    async def check(self) -> None: ...

    async def close(self) -> None:
        self.closed = True


def bridge_runner_for(broker: FakeBroker, bridge: FakeBridge) -> BridgeRunner:
    async def open_bridge(config: Any) -> FakeBridge:
        return bridge

    config = FakeBridgeConfig()
    config.named("hq")
    return BridgeRunner(Backend("bridges.fake", FakeBridgeConfig, open_bridge), config, Internal(broker.url), "n1")


async def test_a_bridge_is_given_its_two_connections_and_run_again_after_a_loss(broker: FakeBroker) -> None:
    bridge = FakeBridge()
    runner = bridge_runner_for(broker, bridge)
    runner.start()
    await until(lambda: runner.status()["state"] == "running")
    assert broker.ids_in_order == ["isthmus/hq/0", "isthmus/hq/in"]
    assert runner.node == "n1"
    assert runner.status()["sent"] == 1
    bridge.lost.set()
    await until(lambda: runner.status().get("sent") == 2)
    assert broker.session("isthmus/hq/0").connects == 2
    await runner.close(1)
    assert bridge.closed
    await broker.until(lambda: all(session.writer is None for session in broker.sessions.values()))


async def test_a_bridge_that_is_down_says_why_and_waits_longer_each_time(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_runner, "Backoff", lambda base, cap: Backoff(base, cap, lambda low, high: high))
    bridge = FakeBridge()
    bridge.error = RuntimeError("a defect")
    runner = bridge_runner_for(broker, bridge)
    runner.start()
    for run in (1, 2):
        await until(lambda run=run: bridge.runs == run and runner.status()["state"] == "running")
        bridge.lost.set()
        await until(lambda: runner.status()["state"] == "retrying")
        assert runner.status()["last_error"] == "a defect"
    await runner.close(1)


async def test_a_paused_bridge_leaves_both_sides_and_comes_back(broker: FakeBroker) -> None:
    bridge = FakeBridge()
    runner = bridge_runner_for(broker, bridge)
    runner.start()
    await until(lambda: runner.status()["state"] == "running")
    await runner.pause()
    assert runner.status()["state"] == "paused"
    await broker.until(lambda: all(session.writer is None for session in broker.sessions.values()))
    runner.resume()
    await until(lambda: runner.status()["state"] == "running" and bridge.runs == 2)
    await runner.close(1)


# the host

SINK_CODE = """
from broker.extend.registry import Backend
from broker.extend.sink import SinkConfig
class Config(SinkConfig):
    mark: str = ""
class Sink:
    async def write(self, batch): pass
    async def check(self): pass
    async def close(self): pass
async def open_sink(config):
    return Sink()
BACKEND = Backend("sinks.hosted", Config, open_sink)
"""


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kinds"
    folder.mkdir()
    (folder / "hosted.py").write_text(SINK_CODE)
    (folder / "needy.py").write_text("import a_driver_that_is_not_there\n")
    monkeypatch.setattr(sinks, "__path__", [*sinks.__path__, str(folder)])
    monkeypatch.setattr(bridges, "__path__", list(bridges.__path__))
    return folder


def assignment(name: str, kind: str = "hosted", **raw: Any) -> Assignment:
    return Assignment("sinks", name, kind, "/", {"kind": kind, **FILTERS, **raw})


async def test_b18_only_what_differs_is_closed_and_opened(broker: FakeBroker, kinds: Path) -> None:  # B-18
    host = Host(Internal(broker.url), "n1")
    await host.apply([assignment("a"), assignment("b"), assignment("c")])
    for name in "abc":
        await broker.until_attached(f"isthmus/{name}/0")
    await host.apply([assignment("a"), assignment("b", mark="changed"), assignment("d")])
    await broker.until_attached("isthmus/b/0", times=2)
    await broker.until_attached("isthmus/d/0")
    assert broker.session("isthmus/a/0").connects == 1
    assert broker.session("isthmus/a/0").writer is not None
    await broker.until(lambda: broker.session("isthmus/c/0").writer is None)
    assert set(host.status()) == {"sinks.a", "sinks.b", "sinks.d"}
    await host.close(1)


async def test_an_instance_that_cannot_run_says_why_and_the_others_run(broker: FakeBroker, kinds: Path) -> None:
    alarms: list[tuple[str, str]] = []
    host = Host(Internal(broker.url), "n1", alarm=lambda key, text: alarms.append((key, text)))
    await host.apply([assignment("bad", kind="needy"), assignment("worse", colour="red"), assignment("good")])
    await broker.until_attached("isthmus/good/0")
    status = host.status()
    assert status["sinks.bad"]["state"] == "fatal"
    assert "a_driver_that_is_not_there" in status["sinks.bad"]["last_error"]
    assert status["sinks.worse"]["state"] == "fatal"
    assert "colour" in status["sinks.worse"]["last_error"]
    assert status["sinks.good"]["state"] in ("running", "connecting")
    assert {key for key, _ in alarms} == {"sinks.bad", "sinks.worse"}
    await host.close(1)


async def test_an_instance_that_was_paused_before_a_restart_starts_paused(broker: FakeBroker, kinds: Path) -> None:
    host = Host(Internal(broker.url), "n1")
    await host.apply([assignment("a")], paused=["sinks.a"])
    assert host.status()["sinks.a"]["state"] == "paused"
    with pytest.raises(LookupError):
        await host.pause("sinks.z")
    await host.resume("sinks.a")
    await until(lambda: host.status()["sinks.a"]["state"] == "running")
    await host.close(1)


async def test_a_sink_that_does_not_close_is_left_behind_in_bounded_time(
    broker: FakeBroker, kinds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_runner, "_CLOSE_WITHIN", 0.05)
    code = SINK_CODE.replace("async def close(self): pass", "async def close(self): await asyncio.Event().wait()")
    (kinds / "stuck.py").write_text("import asyncio\n" + code)
    host = Host(Internal(broker.url), "n1")
    await host.apply([assignment("a", kind="stuck")])
    await broker.until_attached("isthmus/a/0")
    async with asyncio.timeout(4):
        await host.apply([])
    assert host.status() == {}
