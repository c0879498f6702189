"""Stopping is bounded, tells the clients, and loses nothing the sinks could still take."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.client.connection import Connection, Handler
from broker.client.errors import Disconnected
from broker.mqtt import packets
from tests import servers
from tests.broker import Broker, broker
from tests.clock import clock
from tests.ledger import Ledger
from tests.servers import PATIENCE
from tests.system import resilience
from tests.system.resilience import OPEN, SOAK, STORE, Stream, fill, until

pytestmark = pytest.mark.timeout(120)

CLIENTS = 5_000 if SOAK else 500


class Bystander(Handler):
    """Remembers how its connection ended."""

    def __init__(self) -> None:
        self.ended: Exception | None = None
        self.conn: Connection

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended = exc


async def test_r14_sigterm_tells_everybody_stores_what_was_promised_and_ends_within_ten_seconds(tmp_path: Path) -> None:
    with broker(tmp_path, {"00-broker.toml": OPEN, "30-sink.toml": STORE}) as running:
        await asyncio.to_thread(resilience.wait_running, running, "sinks", "store")
        to = resilience.url(running)
        crowd = [Bystander() for _ in range(CLIENTS)]
        for number, one in enumerate(crowd):
            one.conn = await Connection.connect(to, client_id=f"c{number}", handler=one)
        ledger = Ledger()
        stream = await Stream([ledger], "device", "telemetry/x", 5_000).open(to)
        load = asyncio.create_task(stream.run(30))
        await asyncio.sleep(1)
        began = time.monotonic()
        code = await asyncio.to_thread(running.stop)
        took = time.monotonic() - began
        await load
        print(f"{CLIENTS} clients: stopped in {took:.2f} s, {stream.acknowledged} messages acknowledged")
        assert code == 0
        assert took <= 10 * PATIENCE
        assert all(isinstance(one.ended, Disconnected) and one.ended.code == 0x8B for one in crowd), crowd[0].ended
        assert stream.lost
        assert stream.acknowledged > 500
        # everything the broker promised is on its way: what the worker had no time for waits in the store
        running.start()
        queue = "isthmus sinks: the queue of store"
        await asyncio.to_thread(
            until, lambda: resilience.ask(running, "status")["sinks"]["store"]["queued"] == 0, queue, 20
        )
        fill(ledger, resilience.rows(running))
        ledger.check()


def test_a_stop_is_bounded_when_kafka_never_answers(tmp_path: Path, start_kafka: Callable[..., servers.Kafka]) -> None:
    kafka = start_kafka()
    asyncio.run(kafka.create_topic("stop"))
    sink = f'[sinks.kafka]\nservers = ["{kafka.bootstrap}"]\nfilters = ["telemetry/#"]\ntopic = "stop"\n'
    with broker(tmp_path, {"00-broker.toml": OPEN, "30-sink.toml": sink}) as running:
        resilience.wait_running(running, "sinks", "kafka")
        with stuck(running.port) as device:
            device.sendall(packets.encode_publish(b"telemetry/x", b"1", 1, False, False, 1, 5))
            assert device.recv(100)[:1] == b"\x40"
            until(lambda: resilience.ask(running, "status")["sinks"]["kafka"]["acked"] == 1, "the first record")
            kafka.freeze()
            device.sendall(packets.encode_publish(b"telemetry/x", b"2", 1, False, False, 2, 5))
            assert device.recv(100)[:1] == b"\x40"
            time.sleep(0.3)  # so that the record is on its way
            began = time.monotonic()
            code = running.stop(seconds=20)
            took = time.monotonic() - began
            print(f"stopped in {took:.2f} s with code {code}")
            assert took <= 10.5 * PATIENCE
            assert code in (0, 1)
            assert "1 messages for kafka wait in the store" in running.log()
            assert not leftovers(running), "a worker outlived its broker"


def leftovers(running: Broker) -> list[int]:
    """Processes that still have this broker's socket path on their command line or as their folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                here = os.readlink(entry / "cwd") == str(running.where)
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if here and b"broker" in command:
                found.append(int(entry.name))
    return found


def stuck(port: int) -> socket.socket:
    """A logged-in client with the smallest buffer there is."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    one.settimeout(10)
    one.connect(("127.0.0.1", port))
    one.sendall(packets.encode_connect(packets.Connect(version=5, clean_start=True, keep_alive=0, client_id="stuck")))
    assert one.recv(100)[3] == 0
    return one


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running, stuck(running.port) as deaf, socket.socket() as loud:
        # somebody who does not read what he is owed holds up the first stop
        deaf.sendall(packets.encode_subscribe(1, 5, [(b"data/#", 0)]))
        assert deaf.recv(100)[:1] == b"\x90"
        loud.connect(("127.0.0.1", running.port))
        connect = packets.Connect(version=5, clean_start=True, keep_alive=0, client_id="loud")
        loud.sendall(packets.encode_connect(connect))
        for _ in range(200):
            loud.sendall(packets.encode_publish(b"data/x", bytes(65_536), 0, False, False, 0, 5))
        loud.sendall(packets.encode_pingreq())
        select.select([loud], [], [], 10)
        process = running.process.popen
        process.send_signal(signal.SIGTERM)
        until(lambda: not servers.accepts(running.port), "it stopped accepting", 5)
        time.sleep(0.3)
        assert process.poll() is None, "the first stop was over before the second signal: nothing was tested"
        began = clock()
        process.send_signal(signal.SIGTERM)
        code = process.wait(5 * PATIENCE)
        took = clock() - began
        print(f"the second signal took {took * 1000:.0f} ms, exit code {code}")
        assert took <= 3.0 * PATIENCE, "the first alone takes six"
        assert code == 1


def test_after_a_kill_it_starts_again_in_the_same_folder(tmp_path: Path) -> None:
    """Locks, sockets and workers of a broker that was killed are no obstacle."""
    running = Broker(tmp_path)
    running.write("00-broker.toml", OPEN)
    running.write("30-sink.toml", STORE)
    running.start()
    resilience.wait_running(running, "sinks", "store")
    running.stop(signal.SIGKILL)
    until(lambda: not leftovers(running), "the orphaned worker's end", 10, 0.1)
    try:
        running.start()
        resilience.wait_running(running, "sinks", "store")
    finally:
        assert running.stop() == 0
