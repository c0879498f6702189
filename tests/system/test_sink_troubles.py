"""A sink in trouble that is nobody else's: nothing but poison, a target that crawls, a disk without space, a secret."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web

from broker.client.session import NotTaken, Publisher
from tests.broker import Broker, broker
from tests.integration.http_service import service
from tests.ledger import Ledger, stamp
from tests.servers import PATIENCE
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.durability import ROOM, Sender, faulty, intact, says_live
from tests.system.resilience import SLOWEST, SOAK, STORE, Stream, command, eventually, rss, url

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 if SOAK else 240)]

IN_HAND = 32 << 20
"""Bytes a worker is given before it has acknowledged any."""
LETTERS = 256 << 20
"""Bytes of dead letters that a sink keeps."""


async def sink(running: Broker, name: str = "store") -> dict[str, Any]:
    found: dict[str, Any] = (await command(running, "status"))["sinks"][name]
    return found


# --- S-08 ------------------------------------------------------------------------------------------------------------


REFUSING = """
[sinks.poisoned]
kind = "sqlite"
path = "poisoned.db"
filters = ["telemetry/#", "large/#"]
"""


def refuse_all(path: Path, rule: str = "check (payload = 'cured')") -> None:
    """A table in which nothing has a place."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(
            f"create table messages (msgid text primary key, time, clientid, username, topic, payload blob {rule})"
        )


async def test_s08_nothing_but_poison_slows_no_other_sink_and_fills_the_dead_letters_up_to_their_quota(
    tmp_path: Path,
) -> None:
    """S-08: both in one worker. What has no place among the dead letters stays in the queue; when there is room it
    goes on by itself."""
    rate, seconds, size = 1_000.0, 20.0 if SOAK else 5.0, 900_000
    refuse_all(tmp_path / "poisoned.db")
    fragments = {"00-broker.toml": ROOM, "30-store.toml": STORE, "31-poisoned.toml": REFUSING}
    with broker(tmp_path, fragments) as running:
        for name in ("store", "poisoned"):
            await asyncio.to_thread(resilience.wait_running, running, "sinks", name)
        ledger = Ledger()
        stream = await Stream([ledger], "device", "telemetry/device/x", rate).open(url(running))
        await stream.run(1)
        behind: list[int] = []

        async def watch(seconds: float) -> None:
            for _ in range(int(seconds * 4)):
                await asyncio.sleep(0.25)
                behind.append((await sink(running))["queued"])

        async with canary_apart(url(running)) as before:
            await asyncio.gather(stream.run(seconds), watch(seconds))
        await stream.settle()
        small = stream.acknowledged
        assert small >= rate * seconds * 0.9

        async def buried() -> bool:
            return (await sink(running, "poisoned"))["dead_letters"] == small

        await eventually(buried, "every record among the dead letters", 60, 0.2)
        assert (await sink(running, "poisoned"))["dropped"] == {}

        # and now more than the dead letters may hold
        publisher = await Publisher.connect(url(running), client_id="large")
        large = LETTERS // size + 40
        for _ in range(0, large, 10):
            await asyncio.gather(*(publisher.publish("large/x", bytes(size), 1) for _ in range(10)))
        large = -(-large // 10) * 10

        async def full() -> dict[str, Any] | None:
            found = await sink(running, "poisoned")
            return found if found["state"] == "retrying" and "dead letters" in found["last_error"] else None

        found = await eventually(full, "the dead letters to be full", 60, 0.2)
        await stream.run(1)
        async with canary_apart(url(running)) as full_now:
            await asyncio.gather(stream.run(2), watch(2))
        await stream.settle()
        queues = {queue["name"]: queue for queue in await command(running, "queues.list")}
        letters = queues["poisoned/dlq"]
        print(f"{letters['queued']} letters of {letters['bytes']} bytes; {found['last_error']}")
        assert LETTERS - 2 * size < letters["bytes"] <= LETTERS
        found = await sink(running, "poisoned")
        # letters that had a place beside one that has none are in both
        assert found["queued"] + found["dead_letters"] >= stream.acknowledged + large, "nothing is lost"
        assert found["queued"] >= 40

        kept = letters["queued"]
        purged = await command(running, "deadletter.purge", name="poisoned")
        assert purged["purged"] >= kept, "letters larger than one read"

        async def gone_on() -> bool:
            now = await sink(running, "poisoned")
            return now["queued"] == 0 and now["state"] == "running"

        await eventually(gone_on, "the rest among the dead letters", 60, 0.2)
        await publisher.disconnect()
        slowest = max(before.slowest, full_now.slowest)
        print(f"the other sink at most {max(behind)} behind, canary at most {slowest * 1000:.1f} ms")
        # one that waits for the other is further behind at every look
        behind.sort()
        assert behind[-3] <= rate * PATIENCE, "more than a second behind"
        assert behind[-1] <= 3 * rate * PATIENCE, "more than three seconds behind"
        before.check()
        full_now.check()

        async def stored() -> bool:
            return (await sink(running))["queued"] == 0

        await eventually(stored, "everything in the other sink", 20)
        resilience.fill(ledger, resilience.rows(running))
        ledger.check()
        stream.conn.abort()


# --- S-17 ------------------------------------------------------------------------------------------------------------


CRAWLING = """
[sinks.store]
kind = "http"
url = "http://127.0.0.1:{port}/"
body = "${{payload}}"
content_type = "text/plain"
filters = ["telemetry/#"]
timeout = "10s"
"""


async def latencies(publisher: Publisher, seconds: float) -> list[float]:
    """How long each acknowledgement took, fifty a second."""
    found = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        await publisher.publish("telemetry/x", b"small", 1)
        found.append(time.monotonic() - began)
        await asyncio.sleep(0.02)
    return sorted(found)


async def test_s17_a_target_that_takes_one_message_a_second_is_waited_for_by_no_publisher(tmp_path: Path) -> None:
    """S-17: what is under way is bounded, the queue grows, acknowledgements take as long as ever."""
    size, count, pause = 64_000, 1_000, 0.0

    async def answer(request: web.Request, body: bytes) -> web.Response:
        await asyncio.sleep(pause)
        return web.Response(status=204)

    async with service(answer) as http:
        fragments = {"00-broker.toml": ROOM, "30-sink.toml": CRAWLING.format(port=http.port)}
        with broker(tmp_path, fragments) as running:
            await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
            publisher = await Publisher.connect(url(running), client_id="device")
            before = await latencies(publisher, 3)

            async def empty() -> bool:
                return (await sink(running))["queued"] == 0

            await eventually(empty, "the end of the queue")
            pause = 1.0
            worker = (await sink(running))["pid"]
            memory = rss(worker)
            for _ in range(0, count, 50):
                await asyncio.gather(*(publisher.publish("telemetry/x", bytes(size), 1) for _ in range(50)))
            await asyncio.sleep(1)
            seen, first, began = len(http.seen), await sink(running), time.monotonic()
            meanwhile = await latencies(publisher, 12 if SOAK else 6)
            taken, last, took = len(http.seen) - seen, await sink(running), time.monotonic() - began
            median = before[len(before) // 2], meanwhile[len(meanwhile) // 2]
            print(f"median {median[0] * 1e3:.2f} ms, then {median[1] * 1e3:.2f} ms; {taken} taken in {took:.1f} s")
            print(f"{last['in_flight']} in flight, {last['queued']} queued, worker +{(rss(worker) - memory) >> 20} MiB")
            assert 0 < taken <= took + 1
            assert last["queued"] >= first["queued"] + len(meanwhile) - taken - 1, "the queue grows"
            assert last["queued"] >= count - 30
            assert 0 < last["in_flight"] < last["queued"]
            assert first["in_flight"] * size <= IN_HAND + size
            assert rss(worker) - memory <= 2 * IN_HAND
            assert median[1] <= 2 * median[0] + 0.002 * PATIENCE
            # whoever waits for the target waits a second; a flush of the disk may be slow now and then
            assert meanwhile[int(0.95 * len(meanwhile))] <= SLOWEST
            assert meanwhile[-1] < pause * PATIENCE
            assert last["dropped"] == {}
            pause = 0.0
            await eventually(empty, "the end of the queue", 60, 0.2)
            assert len(http.seen) == count + len(before) + len(meanwhile)
            await publisher.disconnect()


# --- S-06 ------------------------------------------------------------------------------------------------------------


async def prepared(running: Broker, sender: Sender) -> None:
    """A sink that has stored something and, paused, has something to store."""
    await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
    await sender.open(url(running))
    await sender.many(300)
    await eventually(lambda: resilience.row_count(running) == 300, "the first rows")
    await command(running, "sinks.pause", name="store")
    await sender.many(300)


async def test_s06_a_store_without_space_is_survived_by_its_sink_which_goes_on_alone(tmp_path: Path) -> None:
    """S-06: what cannot be kept is refused, QoS 0 flows, and what is there is stored though its acknowledgement cannot
    be written; with space again everything goes on without anybody."""
    ledger = Ledger()
    with faulty(tmp_path, ROOM + STORE) as (running, shim):
        sender = Sender(ledger, "device", "telemetry/x")
        await prepared(running, sender)
        shim.inject("enospc write 1! store/")
        for _ in range(50):
            if not await sender.send():
                break
        assert sender.refused == [0x97]
        assert (await command(running, "status"))["store"]["refusing"] == "full"
        await command(running, "sinks.resume", name="store")
        await eventually(lambda: resilience.row_count(running) >= 600, "what was kept, in the sink")
        assert await says_live(url(running)) < 1 * PATIENCE
        assert not await sender.send()
        shim.inject()
        await eventually(sender.send, "messages taken again", 10, 0.2)
        await sender.many(300)

        async def well() -> bool:
            found = await sink(running)
            return found["queued"] == 0 and found["state"] == "running"

        await eventually(well, "the sink to go on")
        assert not (await command(running, "status"))["store"]["refusing"]
        resilience.fill(ledger, resilience.rows(running))
        assert ledger.check().acknowledged >= 900
        sender.close()


READ_ONLY = [f"erofs {call} 1! data/store" for call in ("write", "open", "rename", "unlink", "ftruncate", "mkdir")]


@pytest.mark.parametrize("faults", [["eio write 1 .log"], READ_ONLY], ids=["an error", "read only"])
async def test_s06_after_an_error_of_the_disk_the_sink_gets_everything_at_the_next_start(
    tmp_path: Path, faults: list[str]
) -> None:
    """S-06: by D-05 nobody believes a disk again that has failed, so this one does not end without a restart; until
    then QoS 0 flows, and the sink is given what there is."""
    ledger = Ledger()
    with faulty(tmp_path, ROOM + STORE) as (running, shim):
        sender = Sender(ledger, "device", "telemetry/x")
        await prepared(running, sender)
        shim.inject(*faults)
        assert not await sender.send()
        assert (await command(running, "status"))["store"]["refusing"] == "failed"
        await command(running, "sinks.resume", name="store")
        await eventually(lambda: resilience.row_count(running) >= 600, "what was kept, in the sink")
        assert await says_live(url(running)) < 1 * PATIENCE
        assert not await sender.send()
        sender.close()
        assert running.stop() == 1
        shim.inject()
        intact(running)
        running.start()
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
        await sender.open(url(running))
        await sender.many(300)

        async def empty() -> bool:
            return (await sink(running))["queued"] == 0

        await eventually(empty, "the end of the queue")
        resilience.fill(ledger, resilience.rows(running))
        assert ledger.check().acknowledged == 900
        sender.close()


# --- S-21 ------------------------------------------------------------------------------------------------------------


SECRET = "not-to-be-seen-0815"
SECRETIVE = f"""
[sinks.store]
kind = "http"
url = "http://127.0.0.1:{{port}}/"
headers = {{{{ Authorization = "Bearer {SECRET}" }}}}
filters = ["telemetry/#"]
"""


async def test_s21_a_secret_that_the_target_repeats_is_shown_nowhere(tmp_path: Path) -> None:
    """S-21: refused credentials, an outage and a refused record, each told with the header that was sent."""
    status = 401

    def answer(request: web.Request, body: bytes) -> web.Response:
        return web.Response(status=status, text=f"the token {request.headers['Authorization']} is wrong, {SECRET}")

    shown = ""
    async with service(answer) as http:
        fragments = {"00-broker.toml": ROOM, "30-sink.toml": SECRETIVE.format(port=http.port)}
        with broker(tmp_path, fragments) as running:
            publisher = await Publisher.connect(url(running), client_id="device")
            for code, state in ((401, "paused"), (503, "retrying"), (422, "running")):
                status = code
                await command(running, "sinks.resume", name="store")
                with contextlib.suppress(NotTaken):
                    await publisher.publish("telemetry/x", stamp("device", code), 1)

                async def told(state: str = state, code: int = code) -> bool:
                    found = await sink(running)
                    return found["state"] == state and (code == 422 or str(code) in (found["last_error"] or ""))

                await eventually(told, f"the sink {state}", 20, 0.05)
                shown += json.dumps(await command(running, "status"))

            async def buried() -> bool:
                return (await sink(running))["dead_letters"] == 3

            await eventually(buried, "the dead letters", 60, 0.1)
            letters = await command(running, "deadletter.list", name="store")
            shown += json.dumps(letters)
            assert all("422" in letter["error"] for letter in letters)
            for words in (
                "sinks show store", "sinks list", "config show", "status", "deadletter list store",
                f"deadletter show store {letters[0]['id']}",
            ):  # fmt: skip
                done = await asyncio.to_thread(running.isthmus, *words.split())
                assert done.returncode == 0, done.stderr
                shown += done.stdout + done.stderr
            await publisher.disconnect()
            shown += running.log()
    assert http.seen[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert "***" in shown
    assert SECRET not in shown
