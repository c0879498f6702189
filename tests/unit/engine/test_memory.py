"""What a connection leaves behind: nothing, and without the garbage collector, which knows no channels and sessions."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from broker.mqtt.packets import Will
from tests.unit.engine.harness import Bench, Gate
from tests.unit.engine.parts import PUBACK, ack


class Watching(Gate):
    """Keeps a weak reference to every principal: a channel or a session that stays keeps its principal."""

    def __init__(self) -> None:
        super().__init__()
        self.principals: weakref.WeakSet[Any] = weakref.WeakSet()

    def answer(self, channel: Any, connect: Any) -> None:
        super().answer(channel, connect)
        if channel.principal is not None:
            self.principals.add(channel.principal)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(session_expiry=10.0)
    bench.gate = bench.engine.rights.gate = Watching()
    gc.collect()
    gc.disable()
    yield bench
    gc.enable()


def left(bench: Bench) -> int:
    assert isinstance(bench.gate, Watching)
    assert not bench.engine.sessions
    return len(bench.gate.principals)


@pytest.mark.parametrize("version", [4, 5])
def test_a_thousand_connections_leave_no_objects(bench: Bench, version: int) -> None:
    will = Will(b"gone", b"x", 1, False, None)
    for i in range(1000):
        client = bench.client(f"c{i}", version=version, will=will)
        client.subscribe(f"own/{i}", ("all/+", 1), "$share/g/shared/#")
        client.publish(f"own/{i}", qos=1)
        client.publish("all/x", qos=2, ident=2)
        client.send(ack(PUBACK, 1))
        if i % 2:
            client.drop()
        else:
            client.channel.disconnect(0x98)
    del client
    bench.pass_time(1)
    assert left(bench) == 0


def test_sessions_that_expired_leave_no_objects(bench: Bench) -> None:
    for i in range(100):
        client = bench.client(f"c{i}", clean=False)
        client.subscribe(("all/+", 1))
        client.publish("all/x", qos=1)
        client.drop()
    for i in range(100):
        bench.client(f"c{i}", clean=False).drop()
    del client
    assert len(bench.engine.sessions) == 100
    bench.pass_time(12)
    assert left(bench) == 0


def test_connections_that_end_in_the_middle_leave_no_objects(bench: Bench) -> None:
    for i in range(100):
        client = bench.client(f"c{i}")
        client.subscribe("t")
        client.channel.pause_writing()
        bench.client(f"p{i}").publish("t", b"x" * 100).drop()
        client.send(b"\x30\xff\x01half a packet")
        if i % 2:
            client.channel.eof_received()
        client.channel.connection_lost(None)
        bench.client("same")
    bench.engine.sessions["same"].channel.connection_lost(None)
    del client
    bench.pass_time(1)
    assert left(bench) == 0


def test_a_principal_that_is_kept_would_be_seen(bench: Bench) -> None:
    client = bench.client("c")
    client.drop()
    assert left(bench) == 1, "the channel the test holds keeps it"
    del client
    assert left(bench) == 0
