"""The disk fails, fills up, hangs or lies in ruins: what was acknowledged stays, what cannot be kept is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.client.errors import Refused
from broker.store.opening import SEGMENT_BYTES
from tests.broker import Broker, broker
from tests.ledger import Ledger
from tests.power.record import Event, Kind, Shim
from tests.power.rounds import Machine
from tests.servers import PATIENCE
from tests.system import resilience
from tests.system.durability import (
    MB,
    ROOM,
    Ballast,
    Sender,
    faulty,
    fetch,
    intact,
    keep,
    machine,
    offer,
    recovered,
    refused_start,
    says,
    says_live,
    small_disk,
)
from tests.system.resilience import SOAK, STORE, Stream, ask, eventually, url

pytestmark = pytest.mark.timeout(900 if SOAK else 180)

CANNOT_WRITE = "the store cannot write any more"
NO_SPACE = "no space left on the disk"
AGAIN = "there is space on the disk again"


# --- a disk with errors ----------------------------------------------------------------------------------------------


def writes_after_fault(events: list[Event]) -> list[Event]:
    """What was written to or synced in the store's files after the first fault."""
    fault = next(event.sequence for event in events if event.kind is Kind.FAULT)
    kinds = (Kind.WRITE, Kind.SYNC_WRITE, Kind.SYNC)
    begun = [e for e in events if e.kind in kinds and e.sequence > fault and e.path.startswith("data/store/0")]
    failed = {e.reference for e in events if e.kind is Kind.DONE and e.result < 0}
    return [event for event in begun if event.sequence not in failed]


def flushed(shim: Shim) -> bool:
    """Whether nothing written to the store waits for its sync."""
    last = [event for event in shim.events() if event.path.startswith("data/store/0")][-1]
    return last.kind is Kind.DONE


FLUSHES = [("flush", "late write 1 .log"), ("interval", "eio fdatasync 1 .log")]


@pytest.mark.parametrize(("mode", "fault"), [*FLUSHES, ("flush", "eio write 1 .log")] if SOAK else FLUSHES)
async def test_d05_after_one_error_of_the_disk_nothing_more_is_acknowledged_and_nothing_is_tried_again(
    tmp_path: Path, mode: str, fault: str
) -> None:
    """D-05: one error, although the next call would succeed; what was acknowledged before is given out and stays."""
    ledger = Ledger()
    with faulty(tmp_path, f'{ROOM}[broker]\ndurability = "{mode}"\n') as (running, shim):
        to = url(running)
        await keep(to, "kept", "data/#")
        sender = await Sender(ledger, "before", "data/x").open(to)
        await sender.many(300)
        await eventually(lambda: flushed(shim), "the disk to have them")
        shim.inject(fault)
        first = await offer(to, "data/x")
        assert first == 0 if mode == "interval" else first == 0x83  # the interval is the promise there
        await asyncio.to_thread(says, running, CANNOT_WRITE)
        for version, qos, answer in ((5, 1, 0x97), (5, 2, 0x97), (4, 1, None), (4, 2, None), (5, 1, 0x97)):
            assert await offer(to, "data/x", qos, version) == answer
        with pytest.raises(Refused) as refused:
            await keep(to, "new", "data/#")
        assert refused.value.code == 0x97
        assert await says_live(to) < 1 * PATIENCE
        aside = Ledger()
        came = await fetch(to, "kept", aside, least=32, acknowledge=False, quiet=0.5)
        assert came >= 32, "the store can be read no more"
        await asyncio.sleep(0.5)
        assert running.log().count(CANNOT_WRITE) == 1
        assert "restart: check the disk" in running.log()
        assert shim.injected() == 1
        assert ask(running, "status")["store"]["refusing"] == "failed"
        sender.close()
        assert running.stop() == 1
        events = shim.events()
        assert not writes_after_fault(events), "something was written after the error"
        shim.inject()
        intact(running)
        running.start()
        await fetch(url(running), "kept", ledger)
        assert await offer(url(running), "data/x") == 0
    report = ledger.compare(redelivery=True)
    assert not report.lost, report.problem()
    assert report.acknowledged == 300


async def test_a_disk_that_has_become_read_only_is_an_error_and_no_start_is_made_on_it(tmp_path: Path) -> None:
    """As a kernel leaves a file system whose disk fails: reading goes on, nothing is acknowledged, nothing changed."""
    ledger = Ledger()
    calls = ("write", "open", "rename", "unlink", "ftruncate", "mkdir")
    read_only = [f"erofs {call} 1! data/store" for call in calls]
    with faulty(tmp_path) as (running, shim):
        await keep(url(running), "kept", "data/#")
        sender = await Sender(ledger, "device", "data/x").open(url(running))
        await sender.many(100)
        shim.inject(*read_only)
        assert await offer(url(running), "data/x") == 0x83
        await asyncio.to_thread(says, running, CANNOT_WRITE)
        assert "Read-only file system" in running.log()
        assert [await offer(url(running), "data/x", qos) for qos in (1, 2)] == [0x97, 0x97]
        assert await says_live(url(running)) < 1 * PATIENCE
        aside = Ledger()
        came = await fetch(url(running), "kept", aside, least=100, acknowledge=False, quiet=0.5)
        assert came == 100, "it can be read no more"
        sender.close()
        assert running.stop() == 1
        before = {path: path.stat().st_mtime_ns for path in (running.data / "store").iterdir()}
        assert "Read-only file system" in refused_start(running)
        assert {path: path.stat().st_mtime_ns for path in (running.data / "store").iterdir()} == before
        shim.inject()
        intact(running)
        running.start()
        await fetch(url(running), "kept", ledger)
    report = ledger.compare(redelivery=True)
    assert not report.lost, report.problem()
    assert report.acknowledged == 100


# --- a full disk -----------------------------------------------------------------------------------------------------


async def check_full(to: str) -> None:
    """QoS 1 and 2 are refused, 3.x gets no acknowledgement, QoS 0 flows."""
    assert [await offer(to, "data/x", qos) for qos in (1, 2)] == [0x97, 0x97]
    assert [await offer(to, "data/x", qos, version=4) for qos in (1, 2)] == [None, None]
    assert await says_live(to) < 1 * PATIENCE
    with pytest.raises(Refused) as refused:
        await keep(to, "another", "data/#")
    assert refused.value.code == 0x97


async def test_d06_without_space_at_any_call_messages_are_refused_until_there_is_some(tmp_path: Path) -> None:
    """D-06: each call that writes meets a full disk, those that begin a segment too; nothing is lost."""
    ledger = Ledger()
    with faulty(tmp_path) as (running, shim):
        to = url(running)
        await keep(to, "kept", "data/#")
        sender = await Sender(ledger, "big", "data/x", size=MB).open(to)
        met = 0
        for call in ("write", "open", "rename", "fsync"):
            before, noted = shim.injected(), running.log().count(NO_SPACE)
            shim.inject(f"enospc {call} 1! store/")
            for _ in range(SEGMENT_BYTES // MB + 5):  # so that a segment ends
                if not await sender.send():
                    break
            assert sender.refused[met:] == [0x97], f"{call} was never reached"
            met += 1
            assert shim.injected() > before
            await asyncio.to_thread(says, running, NO_SPACE)
            await check_full(to)
            shim.inject()
            await recovered(to, "data/x")
            if call != "rename":  # the broker's own look for space, every second, has no use for it
                assert running.log().count(NO_SPACE) == noted + 1
        assert running.log().count(NO_SPACE) == running.log().count(AGAIN) >= met
        assert len(list((running.data / "store").glob("*.log"))) >= 3
        sender.close()
        assert running.stop() == 0
        intact(running)
        running.start()
        await fetch(url(running), "kept", ledger)
    report = ledger.compare(redelivery=True)
    assert not report.lost, report.problem()
    assert not report.duplicates


def test_d06_a_start_on_a_full_disk_is_refused_and_the_next_one_works(tmp_path: Path) -> None:
    """D-06: the n-th call of a first start finds no space, for every call and n (a few in the short form)."""
    with faulty(tmp_path) as (running, shim):
        assert running.stop() == 0
        for call in ("open", "rename", "mkdir", "write", "fsync")[: 5 if SOAK else 2]:
            refused = 0
            for n in range(1, 40 if SOAK else 2):
                shutil.rmtree(running.data)
                shim.inject(f"enospc {call} {n}! data/store")
                before = shim.injected()
                try:
                    done = running.isthmus("run", seconds=5 if SOAK else 20)
                except subprocess.TimeoutExpired:  # it runs, because there was no n-th call
                    done = None
                if shim.injected() == before:  # there was no n-th call
                    break
                assert done is not None
                assert done.returncode == 1, done.stderr
                assert "No space left on device" in done.stderr
                refused += 1
                shim.inject()
                running.start()
                assert running.stop() == 0
            assert refused, f"{call} was never reached"


async def test_d06_a_disk_that_really_is_full(tmp_path: Path) -> None:
    """D-06: a small file system; no limit keeps the store away from its end."""
    ledger = Ledger()
    with small_disk(tmp_path, 48 << 20) as disk, machine(tmp_path, ROOM + "[store]\nmin_free = 0\n") as running:
        to = url(running)
        await keep(to, "kept", "data/#")
        ballast = Ballast(disk)
        ballast.leave(8 << 20)
        sender = await Sender(ledger, "device", "data/x", size=100_000).open(to)
        for _ in range(200):
            if not await sender.send():
                break
        assert sender.refused == [0x97]
        assert ledger.acknowledged_count > 60
        await asyncio.to_thread(says, running, NO_SPACE)
        await check_full(to)
        ballast.drop()
        await recovered(to, "data/x")
        await asyncio.to_thread(says, running, AGAIN)
        await sender.many(50)
        sender.close()
        assert running.stop() == 0
        intact(running)
        running.start()
        await fetch(url(running), "kept", ledger)
        report = ledger.compare(redelivery=True)
        assert not report.lost, report.problem()
        assert not report.duplicates


async def test_d06_a_broker_starts_on_a_full_disk_and_gives_out_what_it_has(tmp_path: Path) -> None:
    """D-06: and what its clients acknowledge then is not delivered again later."""
    ledger = Ledger()
    with small_disk(tmp_path, 48 << 20) as disk, machine(tmp_path, ROOM + "[store]\nmin_free = 0\n") as running:
        await keep(url(running), "kept", "data/#")
        sender = await Sender(ledger, "device", "data/x").open(url(running))
        await sender.many(500)
        sender.close()
        running.stop(signal.SIGKILL)
        ballast = Ballast(disk)
        ballast.leave(3 << 20)  # what a start itself writes fits in
        running.start()
        ballast.leave(0)
        await fetch(url(running), "kept", ledger)
        ballast.drop()
        await recovered(url(running), "data/x")
        assert running.stop() == 0
        running.start()
        await fetch(url(running), "kept", ledger)
    ledger.check(duplicates_allowed=True)


async def check_thresholds(running: Machine, fill: Callable[[float], None]) -> None:
    """A warning above 85 %, an alarm and refusals above 95 %, and the way back."""
    to = url(running)
    await keep(to, "kept", "data/#")
    low = "below"
    fill(0.80)
    await asyncio.sleep(1.5 * PATIENCE)
    assert "MiB left" not in running.log()
    fill(0.88)
    await asyncio.to_thread(says, running, "below")
    warnings = [line for line in running.log().splitlines() if "MiB left" in line]
    assert len(warnings) == 1
    assert re.search(r"WARN|warning", warnings[0]), warnings
    assert low in warnings[0]
    assert await offer(to, "data/x") == 0
    fill(0.965)
    await asyncio.to_thread(says, running, "make space, or lower")
    await check_full(to)
    assert ask(running, "status")["store"]["refusing"] == "full"
    ledger = Ledger()
    assert await fetch(to, "kept", ledger, least=1) == 1, "what is there is given out"
    fill(0.80)
    await recovered(to, "data/x")
    await asyncio.to_thread(says, running, "are enough")
    assert sum("MiB left" in line for line in running.log().splitlines()) == 3


@pytest.mark.slow
async def test_d07_a_disk_that_fills_is_announced_before_it_is_full(tmp_path: Path) -> None:
    """D-07: on a small file system, where a twentieth is the limit."""
    with small_disk(tmp_path, 96 << 20) as disk, machine(tmp_path) as running:
        await check_thresholds(running, Ballast(disk).fill)


async def test_d07_a_large_disk_is_short_of_space_below_the_configured_bytes(tmp_path: Path) -> None:
    """D-07: `store.min_free` where it is less than a twentieth."""
    limit = 100 << 20
    with faulty(tmp_path, f"{ROOM}[store]\nmin_free = {limit}\n") as (running, shim):

        def fill(share: float) -> None:
            shim.inject(f"free {round((1 - share) * 20 * limit)}")

        await check_thresholds(running, fill)


# --- a store in ruins ------------------------------------------------------------------------------------------------


PAGE = 4096
SIZE = 500_000
COUNT = (5 * SEGMENT_BYTES // 2) // SIZE
"""So many messages of that size fill two segments and a half."""


def flip(path: Path, at: int) -> None:
    """Invert one page."""
    with path.open("r+b") as file:
        file.seek(at)
        page = file.read(PAGE)
        file.seek(at)
        file.write(bytes(byte ^ 0xFF for byte in page))


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def zero(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


HARMS: dict[str, tuple[int, Callable[[Path], None]]] = {
    "all zeros": (1, zero),
    "zero length": (2, lambda path: cut(path, 0)),
    "a flipped page in the middle": (1, lambda path: flip(path, SEGMENT_BYTES // 3)),
    "a flipped page of the newest": (3, lambda path: flip(path, MB)),
    "a cut tail": (2, lambda path: cut(path, path.stat().st_size - 5)),
    "a cut tail of the newest after a clean stop": (3, lambda path: cut(path, path.stat().st_size - 5)),
    "the first is missing": (1, Path.unlink),
    "a middle one is missing": (2, Path.unlink),
    "the newest is missing": (3, Path.unlink),
}
"""Name -> segment, what happens to it."""


async def test_d08_a_damaged_store_is_not_started_and_its_loss_is_counted(tmp_path: Path) -> None:
    """D-08, S-04: for each damage: refused with the file that is meant and a way out, nothing changed; accepted, the
    rest is there. The short form does one of each kind."""
    whole = tmp_path / "whole"
    original = Ledger()
    with machine(tmp_path) as running:
        await keep(url(running), "kept", "data/#")
        sender = await Sender(original, "device", "data/x", size=SIZE).open(url(running))
        await sender.many(COUNT, window=8)
        sender.close()
        assert running.stop() == 0
        shutil.copytree(running.data, whole)
        assert len(list((whole / "store").glob("*.log"))) == 3
        for name, (number, harm) in HARMS.items() if SOAK else list(HARMS.items())[2:8:2]:
            shutil.rmtree(running.data)
            shutil.copytree(whole, running.data)
            path = running.data / "store" / f"{number:08d}.log"
            harm(path)
            before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in (running.data / "store").iterdir()}
            said = refused_start(running)
            assert str(path) in said, f"{name}: {said}"
            assert "isthmus run --accept-loss" in said, f"{name}: {said}"
            assert "isthmus store check" in said
            after = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in (running.data / "store").iterdir()}
            assert after == before, f"{name}: a refused start changed something"

            running.options = ["--accept-loss"]
            running.start()
            running.options = []
            counted = int(re.findall(r"store: sessions=\d+ queued=\d+ retained=\d+ lost=(\d+)", running.log())[-1])
            ledger = Ledger()
            for _ in range(COUNT):
                ledger.next("device")
            known = "flipped" in name or "tail" in name
            try:
                await fetch(url(running), "kept", ledger, least=COUNT - counted if known else 0, quiet=0.4)
            except AssertionError:
                assert number == 1, "only the first segment has the session"
                there = 0
            else:
                there = ledger.compare().arrived
            print(f"{name}: {COUNT - there} of {COUNT} messages lost, {counted} counted")
            assert counted > 0, f"{name}: nothing was counted"
            assert there < COUNT, f"{name}: nothing was lost"
            if known:
                assert COUNT - there == counted, f"{name}: the damage is known"
            assert running.stop() == 0
            intact(running)


def test_d08_a_store_without_any_segment_is_not_an_empty_one(tmp_path: Path) -> None:
    """D-08: never a silent empty start, also when all that is left is one of the small files."""
    with machine(tmp_path) as running:
        assert running.stop() == 0
        store = running.data / "store"
        names = sorted(path.name for path in store.iterdir())
        assert names == ["00000001.log", "closed", "format", "range"]
        for survivor in ("closed", "format", "range"):
            saved = {path: path.read_bytes() for path in store.iterdir()}
            for path in saved:
                if path.name != survivor:
                    path.unlink()
            said = refused_start(running)
            assert str(store) in said
            assert "--accept-loss" in said
            for path, data in saved.items():
                path.write_bytes(data)
        running.start()


def test_d09_a_store_of_a_later_release_is_refused_and_left_alone(tmp_path: Path) -> None:
    """D-09: by `run`, also where a loss would be accepted, and by `store check`."""
    with machine(tmp_path) as running:
        assert running.stop() == 0
        known = running.data / "store" / "format"
        text = known.read_text()
        later = re.sub(r'"version": \d+', '"version": 99', text)
        assert later != text
        known.write_text(later)
        before = {p: p.read_bytes() for p in (running.data / "store").iterdir()}
        for options in ((), ("--accept-loss",)):
            said = refused_start(running, *options)
            assert "version 99" in said
            assert str(known) in said
        done = running.isthmus("store", "check")
        assert done.returncode == 1
        assert "version 99" in done.stderr
        assert {p: p.read_bytes() for p in (running.data / "store").iterdir()} == before
        known.write_text(text)
        running.start()


def test_d10_nobody_else_may_read_what_is_in_the_data_folder(tmp_path: Path) -> None:
    """D-10: under umask 000, with everything a broker makes: a sink's queue, retained messages, a backup."""
    unmasked = ["/bin/sh", "-c", 'umask 000; exec "$@"', "sh"]
    with machine(tmp_path, ROOM, start=False, wrapper=unmasked) as running:
        running.write("30-sink.toml", STORE)
        running.start()
        resilience.wait_running(running, "sinks", "store")
        asyncio.run(keep(url(running), "kept", "data/#"))
        assert asyncio.run(offer(url(running), "data/x")) == 0
        copy = running.where / "copy"
        assert running.isthmus("store", "backup", str(copy)).returncode == 0
        found = [running.data, *running.data.rglob("*"), copy, *copy.rglob("*")]
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in found}
        kinds = {path: stat.S_IFMT(path.stat().st_mode) for path in found}
        assert {stat.S_IFREG, stat.S_IFDIR, stat.S_IFSOCK} == set(kinds.values())
        wrong = {
            str(path): oct(mode)
            for path, mode in modes.items()
            if mode != (0o700 if kinds[path] == stat.S_IFDIR else 0o600)
        }
        assert not wrong


# --- a copy, a second broker -----------------------------------------------------------------------------------------


async def test_d20_a_backup_under_load_has_everything_acknowledged_before_it(tmp_path: Path) -> None:
    """D-20: restored elsewhere; the load goes on meanwhile, nothing is lost in the original either."""
    original, copied = Ledger(), Ledger()
    elsewhere = Broker(tmp_path / "elsewhere")
    elsewhere.write("00-broker.toml", ROOM)
    with machine(tmp_path) as running:
        to = url(running)
        await keep(to, "kept", "data/#")
        sender = await Sender(original, "big", "data/big", size=MB).open(to)
        big = SEGMENT_BYTES // MB + 2  # so that one segment is closed
        await sender.many(big, window=8)
        stream = await Stream([original, copied], "device", "data/x", 500).open(to)
        load = asyncio.create_task(stream.run(60))
        await asyncio.sleep(1)
        promised = {name: set(numbers) for name, numbers in copied._acknowledged.items()}
        done = await asyncio.to_thread(running.isthmus, "store", "backup", str(elsewhere.data))
        assert done.returncode == 0, done.stderr
        print(done.stdout.strip())
        assert "2 segments (1 shared)" in done.stdout
        before = stream.acknowledged
        await eventually(lambda: stream.acknowledged > before + 50, "more of the load")
        again = await asyncio.to_thread(running.isthmus, "store", "backup", str(elsewhere.data))
        assert again.returncode == 1
        assert "something in this folder" in again.stderr
        load.cancel()
        await stream.settle()
        stream.conn.abort()
        sender.close()

        intact(elsewhere)
        elsewhere.start()
        try:
            for _ in range(big):
                copied.next("big")
            copied._acknowledged["device"] = promised["device"]
            await fetch(url(elsewhere), "kept", copied)
            report = copied.compare(redelivery=True)
            print(report.acknowledged, "acknowledged before,", report.arrived, "in the copy")
            assert report.acknowledged > 150
            assert not report.problem(), report.problem()
            assert report.arrived < stream.acknowledged + big, "the copy was made at the end"
            assert await offer(url(elsewhere), "data/x") == 0
        finally:
            assert elsewhere.stop() == 0
        await fetch(to, "kept", original)
        original.check(redelivery=True)
        assert running.stop() == 0
        done = running.isthmus("store", "backup", str(tmp_path / "late"))
        assert done.returncode == 4, "there is no broker to ask"


async def test_d21_a_second_broker_is_refused_and_a_killed_one_leaves_no_obstacle(tmp_path: Path) -> None:
    """D-21: the first does not notice; the lock's file stays behind after a kill and means nothing."""
    ledger = Ledger()
    with machine(tmp_path) as running:
        await keep(url(running), "kept", "data/#")
        sender = await Sender(ledger, "device", "data/x").open(url(running))
        await sender.many(50)
        said = refused_start(running)
        assert "another broker uses this data folder" in said
        assert running.isthmus("store", "check").returncode == 1
        await sender.many(50)
        sender.close()
        running.stop(signal.SIGKILL)
        assert (running.data / "isthmus.lock").exists()
        assert (running.data / "control.sock").exists()
        running.start()
        await fetch(url(running), "kept", ledger)
    ledger.check(redelivery=True)


# --- stopping --------------------------------------------------------------------------------------------------------


async def test_r15_a_stop_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    """R-15: the deadline holds, the exit code says that something is missing, and nothing acknowledged is."""
    ledger = Ledger()
    with faulty(tmp_path) as (running, shim):
        to = url(running)
        await keep(to, "kept", "data/#")
        sender = await Sender(ledger, "device", "data/x").open(to)
        await sender.many(300)
        shim.inject("stall write 1! 600 .log")
        stuck = [asyncio.create_task(sender.send()) for _ in range(20)]
        await asyncio.sleep(1)
        assert shim.injected() >= 1
        assert not any(task.done() for task in stuck), "something was acknowledged that is not on disk"
        assert await says_live(to) < 1 * PATIENCE
        began = time.monotonic()
        code = await asyncio.to_thread(running.stop, signal.SIGTERM, 30)
        took = time.monotonic() - began
        print(f"stopped in {took:.1f} s with code {code}")
        assert code == 1
        assert took <= 10.5 * PATIENCE
        assert "the disk did not take everything" in running.log()
        for task in stuck:
            with pytest.raises(ConnectionError):
                await task
        shim.inject()
        intact(running)
        running.start()
        await fetch(url(running), "kept", ledger)
    report = ledger.compare(redelivery=True)
    assert not report.lost, report.problem()
    assert report.acknowledged == 300


@pytest.mark.slow
async def test_r15_a_stop_does_not_wait_for_a_worker_that_hangs(tmp_path: Path) -> None:
    """R-15: what its sink has not taken is there after the next start."""
    ledger = Ledger()
    with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": STORE}) as running:
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
        await keep(url(running), "kept", "telemetry/#")
        worker = next(pid for pid in running.pids() if pid != running.pid)
        os.kill(worker, signal.SIGSTOP)
        try:
            sender = await Sender(ledger, "device", "telemetry/x").open(url(running))
            await sender.many(300)
            sender.close()
            began = time.monotonic()
            code = await asyncio.to_thread(running.stop, signal.SIGTERM, 30)
            took = time.monotonic() - began
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        print(f"stopped in {took:.1f} s with code {code}")
        assert took <= 10.5 * PATIENCE
        intact(running)
        running.start()
        await fetch(url(running), "kept", ledger)
        ledger.check(redelivery=True)
        await asyncio.to_thread(
            resilience.until, lambda: resilience.row_count(running) >= 300, "everything in the sink", 20
        )
