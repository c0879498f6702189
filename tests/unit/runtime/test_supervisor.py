"""Worker processes: started, spread, killed, parked. The processes are real, the broker keeps sessions only."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import sinks
from broker.config.settings import Instance, restore
from broker.runtime.busy import BusyPage
from broker.runtime.supervisor import Supervisor
from tests.unit.runtime.fakes import FakeBroker, fake_broker, until

SINK_CODE = '''
import asyncio, os, signal, time
from broker.extend.registry import Backend
from broker.extend.sink import SinkConfig
class Config(SinkConfig):
    out: str
    """A file that gets every payload."""
    slow: float = 0.0
class Sink:
    def __init__(self, config):
        self._config = config
    async def write(self, batch):
        open(self._config.out + ".entered", "wb").close()
        for record in batch:
            if record.payload == b"abort":
                os.abort()
            if record.payload == b"exit":
                os._exit(7)
            if record.payload == b"block":
                time.sleep(60)
        if self._config.slow:
            await asyncio.sleep(self._config.slow)
        with open(self._config.out, "ab") as out:
            out.write(b"".join(record.payload + b"\\n" for record in batch))
    async def check(self): pass
    async def close(self): pass
async def open_sink(config):
    return Sink(config)
BACKEND = Backend("sinks.scribe", Config, open_sink)
'''


@pytest.fixture(autouse=True)
def _kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sinks.scribe`, here and in every worker."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    (folder / "scribe.py").write_text(SINK_CODE)
    (folder / "sitecustomize.py").write_text(f"import sinks\nsinks.__path__.append({str(folder)!r})\n")
    monkeypatch.setattr(sinks, "__path__", [*sinks.__path__, str(folder)])
    monkeypatch.setenv("PYTHONPATH", str(folder))


class Rig:
    def __init__(self, broker: FakeBroker, tmp_path: Path) -> None:
        self.broker = broker
        self.folder = tmp_path
        self.alarms: list[tuple[str, str]] = []
        self.supervisor = Supervisor(
            broker.path, "n1", "json", "info", on_alarm=lambda key, text: self.alarms.append((key, text))
        )

    def instance(self, name: str, **raw: Any) -> Instance:
        out = str(self.folder / f"{name}.out")
        return restore("sinks", name, {"kind": "scribe", "filters": ["#"], "out": out, **raw}, self.folder)

    async def apply(self, *instances: Instance, processes: int = 1) -> None:
        await self.supervisor.apply({i.name: i for i in instances}, {}, processes, self.folder)

    def status(self, name: str) -> dict[str, Any]:
        return self.supervisor.status()["sinks"][name]

    async def running(self, *names: str) -> None:
        await until(lambda: all(self.status(name)["state"] == "running" for name in names), 20)

    def written(self, name: str) -> list[bytes]:
        try:
            return (self.folder / f"{name}.out").read_bytes().split()
        except FileNotFoundError:
            return []

    def deliver(self, name: str, payload: bytes) -> None:
        self.broker.deliver(f"isthmus/{name}/0", "a", payload)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with fake_broker(tmp_path / "internal.sock") as broker:
        rig = Rig(broker, tmp_path)
        try:
            yield rig
        finally:
            await rig.supervisor.close(1)


async def test_a_worker_runs_what_it_is_given_and_tells_how_it_goes(rig: Rig) -> None:
    await rig.apply(rig.instance("a"))
    assert rig.status("a")["state"] == "connecting"
    await rig.running("a")
    rig.deliver("a", b"1")
    await rig.broker.until_answered("isthmus/a/0")
    assert rig.written("a") == [b"1"]
    await until(lambda: rig.status("a")["acked"] == 1, 10)  # it tells every second
    assert rig.status("a")["worker"] == "1"
    assert rig.status("a")["pid"] == rig.supervisor.pids()["1"] != os.getpid()


async def test_without_processes_the_broker_runs_them_itself(rig: Rig) -> None:
    await rig.apply(rig.instance("a", worker="special"), processes=0)
    await rig.running("a")
    assert rig.status("a")["pid"] == os.getpid()
    assert rig.supervisor.pids() == {}
    rig.deliver("a", b"1")
    await rig.broker.until_answered("isthmus/a/0")
    await rig.supervisor.pause("a")
    assert rig.status("a")["state"] == "paused"
    await rig.apply(rig.instance("a"), processes=1)
    await until(lambda: rig.status("a")["pid"] != os.getpid() and rig.supervisor.pids() != {}, 5)
    await until(lambda: rig.status("a").get("in_flight") == 0, 10)
    assert rig.status("a")["state"] == "paused", "a pause outlives the move"


async def test_instances_are_spread_over_processes_and_named_workers(rig: Rig) -> None:
    instances = [rig.instance("a"), rig.instance("b"), rig.instance("c", worker="own")]
    await rig.apply(*instances, processes=2)
    await rig.running("a", "b", "c")
    pids = rig.supervisor.pids()
    assert set(pids) == {"1", "2", "own"}
    assert {rig.status(n)["worker"] for n in "ab"} == {"1", "2"}
    assert rig.status("c")["pid"] == pids["own"]
    await rig.apply(*instances[1:], processes=2)
    assert rig.supervisor.pids()[rig.status("b")["worker"]] == pids[rig.status("b")["worker"]]
    assert len(rig.supervisor.pids()) == 2, "a worker without instances ends"


async def test_applying_touches_only_what_differs(rig: Rig) -> None:
    await rig.apply(rig.instance("a"), rig.instance("b"))
    await rig.running("a", "b")
    pid = rig.status("a")["pid"]
    for slow in range(1, 4):
        await rig.apply(rig.instance("a"), rig.instance("b", slow=slow / 1000))
        await rig.broker.until_attached("isthmus/b/0", times=slow + 1)
    await rig.running("a", "b")
    assert rig.status("a")["pid"] == pid
    assert rig.broker.session("isthmus/a/0").connects == 1


async def test_b17_a_killed_worker_is_attached_again_within_two_seconds_and_nothing_is_missing(
    rig: Rig,
) -> None:  # B-17, S-02
    await rig.apply(rig.instance("a"))
    await rig.running("a")
    sent = 0
    for times in range(2, 6):  # more than an instance may cause: a kill from outside is nobody's fault
        pid = rig.status("a")["pid"]
        for _ in range(50):
            rig.deliver("a", str(sent).encode())
            sent += 1
        os.kill(pid, signal.SIGKILL)
        rig.deliver("a", str(sent).encode())
        sent += 1
        await rig.broker.until_attached("isthmus/a/0", times)
        await rig.broker.until_answered("isthmus/a/0")
        await rig.running("a")
        await asyncio.sleep(1.1)  # it counts as steady after a second
    assert {int(p) for p in rig.written("a")} == set(range(sent))
    await until(lambda: rig.status("a")["acked"] > 51, 10)  # more than the last worker alone
    assert rig.alarms == []


async def test_what_was_counted_by_reason_goes_on_over_a_restart(rig: Rig) -> None:
    await rig.apply(rig.instance("a"))
    await rig.running("a")
    for count in (2, 3):
        report = {"state": "running", "retried": count, "retries": {"unreachable": 1, "refused": count - 1}}
        rig.supervisor._reports["sinks.a"]["1"] = report
        rig.supervisor._keep_count("sinks.a", "1")
    entry = rig.status("a")
    assert (entry["retried"], entry["retries"]) == (5, {"unreachable": 2, "refused": 3})


async def test_the_first_restart_comes_at_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.apply(rig.instance("a"))
    await rig.running("a")
    os.kill(rig.status("a")["pid"], signal.SIGKILL)
    await rig.broker.until_attached("isthmus/a/0", 2)
    assert "it starts again in 0.0 s" in caplog.text


@pytest.mark.timeout(150)
@pytest.mark.parametrize("poison", [b"abort", b"exit"])
async def test_an_instance_that_kills_its_worker_is_parked_and_its_neighbours_go_on(rig: Rig, poison: bytes) -> None:
    await rig.apply(rig.instance("bad"), rig.instance("good"))
    await rig.running("bad", "good")
    rig.deliver("bad", poison)
    await until(lambda: rig.status("bad")["state"] == "parked", 60)
    assert [key for key, _ in rig.alarms] == ["sinks.bad"]
    assert "SIGABRT" in rig.status("bad")["alarm"] or "exit code 7" in rig.status("bad")["alarm"]
    await rig.running("good")
    assert rig.broker.session("isthmus/bad/0").connects == 4, "more than three deaths within a minute"
    for i in range(10):
        rig.deliver("good", str(i).encode())
    await rig.broker.until_answered("isthmus/good/0")
    pid = rig.status("good")["pid"]
    rig.broker.session("isthmus/bad/0").unanswered.clear()
    rig.deliver("bad", b"fine")
    await rig.supervisor.resume("bad")
    await rig.running("bad", "good")
    await rig.broker.until_answered("isthmus/bad/0")
    assert rig.written("bad") == [b"fine"]
    assert rig.status("good")["pid"] == pid, "bringing it back disturbs nobody"


@pytest.mark.timeout(150)
async def test_a_change_brings_a_parked_instance_back_even_when_it_was_alone(rig: Rig) -> None:
    await rig.apply(rig.instance("bad"))
    await rig.running("bad")
    rig.deliver("bad", b"abort")
    await until(lambda: rig.status("bad")["state"] == "parked", 60)
    await until(lambda: rig.supervisor.pids() == {}, 15)
    rig.broker.session("isthmus/bad/0").unanswered.clear()
    await rig.apply(rig.instance("bad", slow=0.001))
    await rig.running("bad")


async def test_a_worker_that_hangs_is_killed_and_started_again(rig: Rig) -> None:
    await rig.apply(rig.instance("a"))
    await rig.running("a")
    reports = rig.supervisor._reports["sinks.a"]
    told = reports["1"]
    rig.supervisor._workers["1"]._silent = 3.0  # from its next report on: it may take its time to start
    await until(lambda: reports["1"] is not told)
    pid = rig.status("a")["pid"]
    rig.deliver("a", b"block")
    await until(lambda: rig.status("a")["pid"] not in (pid, None), 15)
    rig.broker.session("isthmus/a/0").unanswered.clear()


async def test_s22_closing_lets_the_worker_finish_what_it_received(rig: Rig) -> None:  # S-22
    await rig.apply(rig.instance("a", slow=0.4, batch={"max_records": 50}))
    await rig.running("a")
    for i in range(500):
        rig.deliver("a", str(i).encode())
    await until(lambda: rig.status("a")["acked"] + rig.status("a")["in_flight"] == 500)
    assert len(rig.written("a")) < 500
    pid = rig.status("a")["pid"]
    await rig.supervisor.close(10)
    assert len(rig.written("a")) == 500
    await rig.broker.until(lambda: not rig.broker.session("isthmus/a/0").unanswered)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_s02_a_worker_whose_broker_is_gone_gives_up_the_write_under_way(rig: Rig) -> None:
    """Another worker writes it, and what came after it, as soon as the broker is back."""
    await rig.apply(rig.instance("a", slow=3.0))
    await rig.running("a")
    pid = rig.status("a")["pid"]
    rig.deliver("a", b"1")
    await until((rig.folder / "a.out.entered").exists, 5)
    worker = rig.supervisor._workers["1"]
    assert worker._channel is not None
    worker._closing = True  # keep the supervisor from starting another one
    worker._channel._writer.transport.abort()
    await until(lambda: not alive(pid), 10)
    assert rig.written("a") == []


async def test_sigterm_to_a_worker_alone_is_survived(rig: Rig) -> None:
    await rig.apply(rig.instance("a"))
    await rig.running("a")
    os.kill(rig.status("a")["pid"], signal.SIGTERM)
    await rig.broker.until_attached("isthmus/a/0", 2)
    rig.deliver("a", b"1")
    await rig.broker.until_answered("isthmus/a/0")
    assert rig.alarms == []


async def test_pause_and_resume_reach_the_worker_and_outlive_it(rig: Rig) -> None:
    await rig.apply(rig.instance("a"))
    await rig.running("a")
    await rig.supervisor.pause("a")
    rig.deliver("a", b"1")
    await until(lambda: rig.status("a")["in_flight"] == 1, 5)
    assert rig.status("a")["state"] == "paused"
    assert rig.written("a") == []
    os.kill(rig.status("a")["pid"], signal.SIGKILL)
    await rig.broker.until_attached("isthmus/a/0", 2)
    await until(lambda: rig.status("a").get("in_flight") == 1, 5)
    assert rig.status("a")["state"] == "paused"
    await rig.supervisor.resume("sinks.a")
    await rig.broker.until_answered("isthmus/a/0")
    await rig.running("a")
    with pytest.raises(LookupError, match="no sink or bridge"):
        await rig.supervisor.pause("nobody")


async def test_log_lines_of_a_worker_carry_the_instance_and_no_secret_is_on_its_command_line(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    await rig.apply(rig.instance("a"), rig.instance("b", lanes=1, worker="x"))
    await rig.running("a", "b")
    assert b"broker.runtime.worker" in command_line(rig.status("a")["pid"])
    assert b"a.out" not in command_line(rig.status("a")["pid"])
    (rig.folder / "a.out").mkdir()  # the next write fails
    rig.deliver("a", b"1")
    await until(lambda: rig.status("a")["state"] == "retrying", 5)
    assert "a.out" in rig.status("a")["last_error"]
    captured = capfd.readouterr()
    assert captured.out == "", "standard output belongs to the broker"
    lines = [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]
    assert any(line.get("instance") == "sinks.a" and "retrying" in line["event"] for line in lines)
    rig.broker.session("isthmus/a/0").unanswered.clear()


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_the_page_names_the_slot_that_was_entered_last_and_not_left() -> None:
    page = BusyPage.create()
    first, second = page.marker(3), page.marker(7)
    assert page.last() is None
    with first:
        with second, second:
            assert page.last() == 7
        assert page.last() == 3
    assert page.last() is None
    second.__enter__()
    page.clear()
    assert page.last() is None
    with page.marker(None), page.marker(1 << 20):
        assert page.last() is None
    page.close()


async def test_the_lanes_of_a_sink_are_spread_over_the_processes(rig: Rig) -> None:
    await rig.apply(rig.instance("a", lanes=5), rig.instance("b"), processes=2)
    await rig.running("a", "b")
    pids = rig.supervisor.pids()
    assert rig.status("a")["worker"] == "1,2"
    assert rig.status("a")["pid"] == [pids["1"], pids["2"]]
    assert rig.status("a")["lanes"] == 5
    for lane in range(5):
        rig.broker.deliver(f"isthmus/a/{lane}", "a", str(lane).encode())
        await rig.broker.until_answered(f"isthmus/a/{lane}")
    await until(lambda: rig.status("a")["acked"] == 5, 5)
    assert sorted(rig.written("a")) == [b"0", b"1", b"2", b"3", b"4"]
    assert [rig.broker.session(f"isthmus/a/{lane}").connects for lane in range(5)] == [1] * 5, "each in one worker"


async def test_a_death_touches_only_the_lanes_of_its_worker(rig: Rig) -> None:
    await rig.apply(rig.instance("a", lanes=4), processes=2)
    await rig.running("a")
    victim = rig.supervisor.pids()["1"]
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    await until(lambda: rig.status("a")["state"] == "connecting", 5)
    await rig.running("a")
    assert [rig.broker.session(f"isthmus/a/{lane}").connects for lane in range(4)] == [2, 1, 2, 1]


async def test_lanes_that_move_are_never_in_two_workers(rig: Rig) -> None:
    instance = rig.instance("a", lanes=4)
    await rig.apply(instance, processes=2)
    await rig.running("a")
    await rig.apply(instance, processes=3)
    await until(lambda: rig.status("a")["worker"] == "1,2,3" and rig.status("a")["state"] == "running", 20)
    await rig.apply(instance, processes=1)
    await until(lambda: rig.status("a")["worker"] == "1" and rig.status("a")["state"] == "running", 20)
    await until(lambda: rig.status("a")["lanes"] == 4, 5)
    connects = [rig.broker.session(f"isthmus/a/{lane}").connects for lane in range(4)]
    assert max(connects) <= 3, f"no two workers took a lane from each other in turns: {connects}"


async def test_the_lanes_of_a_destination_with_one_writer_stay_together(rig: Rig) -> None:
    instance = rig.instance("a", lanes=4)
    alone = dataclasses.replace(instance, backend=dataclasses.replace(instance.backend, one_process=True))
    await rig.apply(alone, processes=2)
    await rig.running("a")
    assert rig.status("a")["worker"] == "1"
    assert rig.status("a")["lanes"] == 4


async def test_a_pause_holds_every_part_of_a_sink(rig: Rig) -> None:
    await rig.apply(rig.instance("a", lanes=2), processes=2)
    await rig.running("a")
    await rig.supervisor.pause("a")
    for lane in (0, 1):
        rig.broker.deliver(f"isthmus/a/{lane}", "a", b"x")
    await until(lambda: rig.status("a").get("in_flight") == 2, 10)
    assert rig.written("a") == []
    await rig.supervisor.resume("a")
    await until(lambda: rig.status("a")["acked"] == 2, 10)
