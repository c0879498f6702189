"""Sinks in a running broker: ten side by side, a stop and a change with much on the way, what the counters say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web

from broker.client.session import NotTaken, Publisher
from broker.mqtt.properties import Properties, encode_properties
from tests.broker import Broker, broker
from tests.integration.http_service import Service, service
from tests.ledger import Ledger
from tests.proxy import Proxy
from tests.servers import PATIENCE, free_port
from tests.system import resilience
from tests.system.canary import canary_apart
from tests.system.durability import ROOM, says, store_bytes
from tests.system.resilience import SOAK, Stream, command, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

IN_HAND = 32 << 20
"""Bytes a worker is given before it has acknowledged any."""
SEGMENT = 16 << 20
TICK = 500
"""Milliseconds that the broker's clock is behind at most: it looks a few times a second."""

SINK = """
[sinks.{name}]
kind = "http"
url = "http://127.0.0.1:{port}/"
format = "array"
body = "${{.}}"
filters = ["telemetry/#"]
timeout = "10s"
{more}
"""


def received(http: Service) -> list[bytes]:
    """Payloads of everything the service was sent, in order."""
    return [envelope["payload"].encode() for seen in http.seen for envelope in json.loads(seen.body or b"[]")]


async def entry(running: Broker, name: str = "store") -> dict[str, Any]:
    found: dict[str, Any] = (await command(running, "status"))["sinks"][name]
    return found


async def until(running: Broker, holds: Any, what: str, seconds: float = 30) -> dict[str, Any]:
    """Until the sink's status is so; answers it."""

    async def look() -> dict[str, Any] | None:
        found = await entry(running)
        return found if holds(found) else None

    found: dict[str, Any] = await eventually(look, what, seconds, 0.05)
    return found


@contextlib.asynccontextmanager
async def streaming(running: Broker, ledgers: list[Ledger], rate: float = 0) -> AsyncIterator[Stream]:
    stream = await Stream(ledgers, "device", "telemetry/device/x", rate).open(resilience.url(running))
    try:
        yield stream
    finally:
        stream.conn.abort()


async def push(stream: Stream, count: int) -> None:
    """So many as fast as they are acknowledged."""
    goal = stream.sent + count
    while stream.sent < goal and not stream.lost:
        while stream.sent < goal and stream.send():
            pass
        await asyncio.sleep(0.002)
    await stream.settle(60)


async def test_s30_one_dead_and_one_slow_sink_hold_up_neither_eight_healthy_ones_nor_the_canary(tmp_path: Path) -> None:
    """S-30: all ten in one worker process; the healthy ones are no more than a second behind."""
    rate, seconds = 300.0, 20.0 if SOAK else 6.0

    async def slowly(request: web.Request, body: bytes) -> web.Response:
        await asyncio.sleep(0.5)
        return web.Response(status=204)

    async with service(slowly) as slow, Proxy("127.0.0.1", slow.port) as dead:
        dead.black_hole = True
        fragments = {
            "00-broker.toml": ROOM,
            "31-dead.toml": SINK.replace('"10s"', '"1s"').format(name="dead", port=dead.port, more=""),
            "32-slow.toml": SINK.format(name="slow", port=slow.port, more="batch = { max_records = 10 }"),
        }
        for number in range(8):
            text = resilience.STORE.replace("sinks.store", f"sinks.well-{number}")
            fragments[f"4{number}-well.toml"] = text.replace("telemetry.db", f"well-{number}.db")
        with broker(tmp_path, fragments) as running:
            for number in range(8):
                await asyncio.to_thread(resilience.wait_running, running, "sinks", f"well-{number}")
            async with streaming(running, [ledger := Ledger()], rate) as stream:
                await stream.run(1)
                behind: list[int] = []

                async def watch() -> None:
                    for _ in range(int(seconds * 2)):
                        await asyncio.sleep(0.5)
                        sinks = (await command(running, "status"))["sinks"]
                        behind.append(max(sinks[f"well-{number}"]["queued"] for number in range(8)))

                async with canary_apart(resilience.url(running)) as canary:
                    await asyncio.gather(stream.run(seconds), watch())
                await stream.settle()
                sinks = (await command(running, "status"))["sinks"]
                print(f"{stream.acknowledged} messages; healthy ones at most {max(behind)} behind, {dead.counts}")
                print(f"slow {sinks['slow']['queued']}, dead {sinks['dead']['queued']} queued")
                print(f"canary: {len(canary.trips)} trips, slowest {canary.slowest * 1000:.1f} ms")
                assert stream.acknowledged >= rate * seconds * 0.9
                assert dead.counts.swallowed > 0
                assert sinks["dead"]["queued"] == stream.acknowledged
                assert sinks["slow"]["queued"] > stream.acknowledged / 2
                # one that waits for the dead or the slow one is further behind at nearly every look
                behind.sort()
                assert behind[-3] <= rate * PATIENCE
                assert behind[-1] <= 3 * rate * PATIENCE
                canary.check()
                for number in range(8):
                    assert sinks[f"well-{number}"]["state"] == "running"

                async def all_stored() -> bool:
                    sinks = (await command(running, "status"))["sinks"]
                    return all(sinks[f"well-{number}"]["acked"] == stream.acknowledged for number in range(8))

                await eventually(all_stored, "every healthy sink's last message", 10)
            resilience.fill(ledger, stored(tmp_path / "well-7.db"))
            ledger.check()


def stored(path: Path) -> list[bytes]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("select cast(payload as blob) from messages order by rowid")]


class Burst:
    """Numbered messages to a sink's queue: which the broker answered for, which it refused."""

    def __init__(self, publisher: Publisher, size: int) -> None:
        self.publisher = publisher
        self.size = size
        self.promised: list[int] = []
        self.refused: list[int] = []

    async def send(self, numbers: range) -> None:
        """All of them, in this order, as far as the broker's window lets them."""
        await asyncio.gather(*map(self._one, numbers))

    async def _one(self, number: int) -> None:
        try:
            await self.publisher.publish("telemetry/x", b"%0*d" % (self.size, number), 1)
        except NotTaken:
            self.refused.append(number)
        else:
            self.promised.append(number)


def numbers(http: Service) -> list[int]:
    return [int(payload[-9:]) for payload in received(http)]


@pytest.mark.parametrize("overflow", ["block", "reject", "drop_oldest", "drop_newest"])
async def test_s05_a_full_queue_does_what_it_is_told_and_never_holds_more_than_its_quota(
    tmp_path: Path, overflow: str
) -> None:
    """S-05: the publisher waits or is refused, or messages are dropped and counted; beside the quota the store holds
    what the worker has in its hands and a segment."""
    quota, size, count = 4_000_000, 64_000, 900
    port = free_port()
    more = f'batch = {{ max_records = 20 }}\nqueue = {{ max_bytes = {quota}, overflow = "{overflow}" }}'
    with broker(
        tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": SINK.format(name="store", port=port, more=more)}
    ) as running:
        publisher = await Publisher.connect(resilience.url(running), client_id="device")
        burst = Burst(publisher, size)
        promised, refused = burst.promised, burst.refused
        # a worker that still takes messages makes room amid the burst: its hands are full before that
        in_hand = IN_HAND // size + 1
        for first in range(0, in_hand, 50):
            await burst.send(range(first, min(first + 50, in_hand)))
            await until(running, lambda sink: sink["queued_bytes"] == 0, "the way to the worker", 60)
        await until(running, lambda sink: sink.get("in_flight") == in_hand, "the worker's having them", 60)
        publishing = asyncio.ensure_future(burst.send(range(in_hand, count)))
        most = 0

        async def full() -> bool:
            nonlocal most
            most = max(most, (await entry(running))["queued_bytes"])
            return publishing.done() or (overflow == "block" and most > quota - 2 * size)

        await eventually(full, "the end of the queue's room", 60, 0.02)
        if overflow == "block":
            await eventually(lambda: len(promised) >= in_hand + quota // size, "the answer for the last that has room")
        await asyncio.sleep(0.5)
        status = await entry(running)
        assert quota - 2 * size < status["queued_bytes"] <= quota
        assert most <= quota
        assert store_bytes(running) <= quota + IN_HAND + SEGMENT
        lost = status["dropped"].get("queue_full", 0)
        held = status["queued"]
        assert held == in_hand + quota // size
        if overflow == "block":
            assert not publishing.done()
            assert (refused, lost, status["refused"]) == ([], 0, 0)
            assert "its queue is full" not in running.log()
            assert len(promised) == held
        else:
            assert len(promised) == count - len(refused)
            assert len(refused) == (count - held if overflow == "reject" else 0)
            assert lost == (0 if overflow == "reject" else count - held)
            assert lost + len(refused) > 0
            total = (await command(running, "status"))["messages"]["dropped"]
            assert total == {"queue_full": lost + len(refused)}
            assert status["refused"] == len(refused)
            await asyncio.to_thread(says, running, "sinks.store: its queue is full")
        async with service(lambda request, body: web.Response(status=204), port=port) as http:
            await asyncio.wait_for(publishing, 60 * PATIENCE)
            await until(running, lambda sink: sink["queued"] == 0, "the end of the queue", 60)
            got = numbers(http)
        await publisher.disconnect()
        print(f"{overflow}: {len(got)} stored, {lost} dropped, {len(refused)} refused, at most {most} bytes queued")
        if overflow == "block":
            assert got == list(range(count))
        elif overflow == "drop_oldest":
            assert got == [*range(in_hand), *range(count - held + in_hand, count)]
        else:
            assert got == list(range(held))


@pytest.mark.parametrize("overflow", ["reject", "drop_oldest", "drop_newest"])
async def test_s05_a_queue_that_has_room_again_amid_a_burst_takes_messages_again(tmp_path: Path, overflow: str) -> None:
    """S-05: the worker stands still while the queue fills and goes on while messages still come: what is stored is what
    was promised and not counted as dropped, in its order."""
    quota, size, count = 1_000_000, 16_000, 900
    more = f'queue = {{ max_bytes = {quota}, overflow = "{overflow}" }}'
    async with service(lambda request, body: web.Response(status=204)) as http:
        sink = SINK.format(name="store", port=http.port, more=more)
        with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": sink}) as running:
            await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
            worker = (await entry(running))["pid"]
            publisher = await Publisher.connect(resilience.url(running), client_id="device")
            burst = Burst(publisher, size)
            most = 0
            os.kill(worker, signal.SIGSTOP)
            try:
                await burst.send(range(count))
                most = (await entry(running))["queued_bytes"]
                last = asyncio.ensure_future(burst.send(range(count, 2 * count)))
                await eventually(lambda: len(burst.promised) + len(burst.refused) > count, "an answer", 30, 0.001)
            finally:
                os.kill(worker, signal.SIGCONT)
            await last
            status = await until(running, lambda sink: sink["queued"] == 0, "the end of the queue", 60)
            await burst.send(range(2 * count, 2 * count + 10))
            await until(running, lambda sink: sink["queued"] == 0, "those behind it")
            await publisher.disconnect()
            lost = status["dropped"].get("queue_full", 0)
            got = numbers(http)
    print(f"{overflow}: {len(got)} stored, {lost} dropped, {len(burst.refused)} refused")
    room = quota // (size + 100)
    assert quota - 2 * size < most <= quota
    assert got == sorted(set(got)), "in their order, once"
    assert got[-10:] == list(range(2 * count, 2 * count + 10)), "it takes messages again"
    assert len(got) == 2 * count + 10 - lost - len(burst.refused)
    assert sorted([*burst.promised, *burst.refused]) == list(range(2 * count + 10))
    assert lost + len(burst.refused) >= count // 2
    if overflow == "reject":
        assert (got, lost) == (sorted(burst.promised), 0)
    elif overflow == "drop_newest":
        assert (got[:room], burst.refused) == (list(range(room)), [])
    else:
        assert (got[-room - 10 : -10], burst.refused) == (list(range(2 * count - room, 2 * count)), [])


async def test_s26_what_comes_with_a_message_is_carried_and_its_id_is_the_same_each_time(tmp_path: Path) -> None:
    """S-26: QoS, retain, user properties, content type, time and id, over answers of 503 and a killed worker."""
    times: dict[str, list[dict[str, Any]]] = {}
    well = False

    async def answer(request: web.Request, body: bytes) -> web.Response:
        for envelope in json.loads(body):
            times.setdefault(envelope["payload"], []).append(envelope)
        return web.Response(status=204 if well else 503)

    said = Properties()
    said.user_properties = [("site", "north"), ("site", "\u00fc")]
    said.content_type, said.response_topic, said.correlation_data = "text/plain", "answers/1", b"\x00\xff"
    async with service(answer) as http:
        # one batch: none is sent before those in front of it are taken
        more = 'batch = { max_records = 3, linger = "20s" }'
        with broker(
            tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": SINK.format(name="store", port=http.port, more=more)}
        ) as running:
            await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
            publisher = await Publisher.connect(resilience.url(running), client_id="device")
            began = int(time.time() * 1000)
            for number, (qos, retain) in enumerate([(0, False), (1, True), (2, False)]):
                block = encode_properties(said)[1:]  # without its length, which is one byte
                await publisher.publish("telemetry/x", b"%d" % number, qos, retain, block)

            async def came(often: int) -> None:
                await eventually(lambda: len(times) == 3 and min(map(len, times.values())) >= often, "them", 30, 0.05)

            await came(2)
            os.kill((await entry(running))["pid"], signal.SIGKILL)
            times_before = {payload: len(seen) for payload, seen in times.items()}
            await eventually(
                lambda: all(len(times[payload]) > before for payload, before in times_before.items()), "them", 30, 0.05
            )
            well = True
            await until(running, lambda sink: sink["queued"] == 0, "the end of the queue")
            await publisher.disconnect()
    ended = int(time.time() * 1000)
    ids = set()
    for payload, seen in times.items():
        assert all(envelope == seen[0] for envelope in seen), "the same each time"
        first = seen[0]
        ids.add(first["msgid"])
        assert (first["topic"], first["clientid"], first["peerhost"]) == ("telemetry/x", "device", "127.0.0.1")
        assert (first["qos"], first["retain"]) == (int(payload), payload == "1")
        assert began - TICK <= first["ts"] <= ended
        assert (first["content_type"], first["response_topic"]) == ("text/plain", "answers/1")
        assert first["correlation_data_base64"] == "AP8="
        assert (len(first["msgid"]), set(first["msgid"]) <= set("0123456789abcdef")) == (32, True)
        assert first["user_properties"] == [["site", "north"], ["site", "\u00fc"]]
    assert len(ids) == 3


async def test_s22_a_stop_with_ten_thousand_in_flight_writes_until_its_deadline_and_loses_none(tmp_path: Path) -> None:
    """S-22: the service takes a tenth of a second for a hundred; what is not written is in the queue."""
    pause = 0.1

    async def answer(request: web.Request, body: bytes) -> web.Response:
        await asyncio.sleep(pause)
        return web.Response(status=204)

    async with service(answer) as http:
        sink = SINK.format(name="store", port=http.port, more="batch = { max_records = 100 }")
        with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": sink}) as running:
            await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
            ledger = Ledger()
            async with streaming(running, [ledger]) as stream:
                await command(running, "sinks.pause", name="store")
                await push(stream, 11_000)
                status = await until(running, lambda sink: sink["in_flight"] >= 10_000, "ten thousand in flight")
                await command(running, "sinks.resume", name="store")
                await eventually(lambda: http.seen, "the first request")
                before = len(received(http))
                began = time.monotonic()
                code = await asyncio.to_thread(running.stop, signal.SIGTERM, 30.0)
            took = time.monotonic() - began
            after = len(received(http))
            print(f"{status['in_flight']} in flight; stopped in {took:.1f} s, {after - before} written meanwhile")
            assert code == 0 or "not everything could be stopped in time" in running.log()
            assert took <= 10 * PATIENCE
            assert after - before >= 500, "it wrote on until the deadline"
            assert "messages for store wait in the store" in running.log()
            pause = 0.0
            running.start()
            await until(running, lambda sink: sink["queued"] == 0, "the rest")
            for payload in received(http):
                ledger.arrived(payload)
            report = ledger.check(duplicates_allowed=True, redelivery=True)
            print(f"{report.duplicates} twice")
            assert report.duplicates <= 100, "a batch at most"


async def test_s23_target_credentials_and_batch_change_while_ten_thousand_are_queued(tmp_path: Path) -> None:
    """S-23: each by a reload; the queue stays and the sink resumes."""
    async with service(lambda request, body: _judge(request)) as http:
        nobody = free_port()
        sink = SINK.format(name="store", port=nobody, more='headers = { Authorization = "Bearer old" }')
        with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": sink}) as running:
            ledger = Ledger()
            async with streaming(running, [ledger]) as stream:
                await push(stream, 10_000)
            await until(running, lambda sink: sink["queued"] == 10_000 and sink["state"] == "retrying", "the outage")

            async def changed(text: str) -> int:
                running.write("30-sink.toml", text)
                done = await asyncio.to_thread(running.reload)
                assert (done.returncode, "changed: sinks.store" in done.stdout) == (0, True), done.stdout + done.stderr
                status = await command(running, "status")
                assert status["orphans"] == []
                return status["sinks"]["store"]["queued"]  # type: ignore[no-any-return]

            sink = sink.replace('"10s"', '"20s"') + "batch = { max_records = 50 }\n"
            assert await changed(sink) == 10_000
            sink = sink.replace(f":{nobody}/", f":{http.port}/")
            assert await changed(sink) == 10_000
            await until(running, lambda sink: sink["state"] == "paused", "the refusal of the credentials")
            assert received(http)
            http.seen.clear()
            sink = sink.replace("Bearer old", "Bearer new")
            await changed(sink)
            status = await until(running, lambda sink: sink["queued"] == 0, "the whole queue", 60)
            assert (status["acked"], status["dropped"]) == (10_000, {})
            assert max(len(json.loads(seen.body)) for seen in http.seen) == 50
            for payload in received(http):
                ledger.arrived(payload)
            ledger.check()


def _judge(request: web.Request) -> web.Response:
    return web.Response(status=204 if request.headers["Authorization"] == "Bearer new" else 401)


async def test_s24_the_queue_of_a_deleted_sink_is_kept_counted_and_dropped_only_on_request(tmp_path: Path) -> None:
    """S-24: also over a kill and a further reload."""
    sink = SINK.format(name="store", port=free_port(), more="")
    with broker(tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": sink}) as running:
        async with streaming(running, [Ledger()]) as stream:
            await push(stream, 500)
        (running.conf / "30-sink.toml").unlink()
        done = await asyncio.to_thread(running.reload)
        assert "removed: sinks.store" in done.stdout
        assert "orphan: 500 messages of store are kept; isthmus queues drop store deletes them" in done.stderr
        await asyncio.to_thread(running.stop, signal.SIGKILL)
        running.start()
        assert (await asyncio.to_thread(running.reload)).returncode == 0
        status = await command(running, "status")
        assert [(q["name"], q["queued"]) for q in status["orphans"]] == [("store", 500)]
        dropped = await asyncio.to_thread(running.isthmus, "queues", "drop", "store")
        assert (dropped.returncode, dropped.stdout) == (0, "500 messages deleted\n")
        assert (await command(running, "status"))["orphans"] == []


async def test_s27_the_counters_account_for_every_message(tmp_path: Path) -> None:
    """S-27: matched is stored, passed over, dead-lettered, dropped, queued or in flight, at every look; with a slow
    service, poison, an overflow that drops and a worker that is killed."""
    pause = 0.02

    async def answer(request: web.Request, body: bytes) -> web.Response:
        await asyncio.sleep(pause)
        return web.Response(status=422 if b"poison" in body else 204)

    async with service(answer) as http:
        more = 'batch = { max_records = 20 }\nqueue = { max_bytes = "2MB", overflow = "drop_oldest" }'
        with broker(
            tmp_path, {"00-broker.toml": ROOM, "30-sink.toml": SINK.format(name="store", port=http.port, more=more)}
        ) as running:
            await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
            publisher = await Publisher.connect(resilience.url(running), client_id="device")
            matched = 0

            async def publish(count: int, size: int = 1) -> None:
                nonlocal matched
                payloads = [b"poison" if n % 50 == 7 else b"%0*d" % (size, n) for n in range(count)]
                await asyncio.gather(*(publisher.publish("telemetry/x", payload, 1) for payload in payloads))
                matched += count

            async def balance() -> dict[str, Any]:
                status = await entry(running)
                assert matched == status["acked"] + sum(status["dropped"].values()) + status["queued"], status
                return status

            for _ in range(5):
                await publish(400)
                await balance()
            worker = (await entry(running))["pid"]
            os.kill(worker, signal.SIGKILL)
            for _ in range(5):
                await publish(400)
                await balance()
            pause = 0.5
            for _ in range(4):  # 50 MB: more than a worker is given at once
                await publish(200, 64_000)
                await balance()
            status = await entry(running)
            assert sum(status["dropped"].values()) > 0, "the queue was never full"
            pause = 0.0
            await until(running, lambda sink: sink["queued"] == 0, "the end of the queue", 60)
            await publish(100)
            status = await until(running, lambda sink: sink["queued"] == 0, "the last ones")
            await balance()
            letters = len(await command(running, "deadletter.list", name="store", limit=100_000))
            assert letters == status["dead_letters"] > 0
            print(f"{matched} matched, {status['acked']} acknowledged, {letters} dead letters, {status['dropped']}")
            there = len(set(_ids(http)))
            assert there == status["acked"] - letters, "what is acknowledged is stored or a dead letter"
            await publisher.disconnect()


def _ids(http: Service) -> list[str]:
    """Of what the service took; it refuses what holds poison whole."""
    return [e["msgid"] for seen in http.seen if b"poison" not in seen.body for e in json.loads(seen.body)]
