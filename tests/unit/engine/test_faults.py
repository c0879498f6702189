"""R-19: an error inside the engine or its gate ends one connection; everything else goes on and it is counted."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from broker.engine.receiver import Hold, Receiver, Subscription
from broker.mqtt.packets import Will
from tests.unit.engine.harness import Bench, Client, Gate, connect_packet
from tests.unit.engine.parts import PUBACK, ack, closed_with, payloads, publish


class Broken(Gate):
    """Raises wherever a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.raises: set[str] = set()

    def _check(self, name: str) -> None:
        if name in self.raises:
            raise RuntimeError(f"injected into {name}")

    def authenticate(self, channel: Any, connect: Any) -> None:
        if connect.client_id != "canary":
            self._check("authenticate")
        super().authenticate(channel, connect)

    def cancel(self, channel: Any) -> None:
        self._check("cancel")
        super().cancel(channel)

    def may_publish(self, principal: Any, topic: str) -> int:
        if topic.startswith("t"):
            self._check("may_publish")
        return super().may_publish(principal, topic)

    def may_subscribe(self, principal: Any, filter: str, qos: int) -> int:
        self._check("may_subscribe")
        return super().may_subscribe(principal, filter, qos)

    def may_receive(self, principal: Any, topic: str) -> int:
        if topic.startswith("t"):
            self._check("may_receive")
        return super().may_receive(principal, topic)


class Faulty(Bench):
    """A bench whose gate may break, with two clients that must never notice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = self.engine.gate = Broken()
        self.canary = self.client("canary")
        self.canary.subscribe("canary", qos=1)
        self.singer = self.client("singer")

    def sings(self) -> bool:
        """Whether the canary still hears what is sung."""
        self.singer.publish("canary", b"la", 1)
        assert self.singer.bytes() == ack(PUBACK, 1)
        (m,) = self.canary.take()
        self.canary.send(ack(PUBACK, m.packet_id))
        return True


@pytest.fixture
def bench(caplog: pytest.LogCaptureFixture) -> Faulty:
    caplog.set_level(logging.CRITICAL, "broker.engine")
    return Faulty()


def fails(bench: Faulty, name: str) -> Broken:
    assert isinstance(bench.gate, Broken)
    bench.gate.raises = {name} if name else set()
    return bench.gate


def errors(bench: Bench) -> int:
    return bench.engine.core.events.get("internal_error", 0)


@pytest.mark.parametrize("version", [4, 5])
def test_r19_an_error_of_the_gate_at_connect_ends_that_connection(bench: Faulty, version: int) -> None:
    fails(bench, "authenticate")
    client = bench.client("c", version=version)
    assert client.closed
    assert errors(bench) == 1
    assert bench.sings()
    fails(bench, "")
    assert bench.client("c").connack.code == 0


@pytest.mark.parametrize("late", [False, True])
def test_r19_an_error_while_a_session_is_attached_ends_that_connection(bench: Faulty, late: bool) -> None:
    gate = fails(bench, "may_publish")
    if late:
        gate.slow.add("c")
    client = bench.client("c", version=5, will=Will(b"t", b"x", 0, False, None))
    if late:
        gate.answer(*gate.pending.pop("c"))
        bench.settle()
    assert client.closed
    assert errors(bench) == 1
    assert "c" not in bench.engine.sessions
    assert bench.sings()


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_r19_an_error_while_publishing_ends_that_connection(bench: Faulty, qos: int) -> None:
    client = bench.client("c", version=5)
    fails(bench, "may_publish")
    client.publish("t", qos=qos)
    assert closed_with(client, 0x83)
    assert errors(bench) == 1
    assert bench.sings()


def test_r19_an_error_while_subscribing_ends_that_connection(bench: Faulty) -> None:
    client = bench.client("c", version=5)
    fails(bench, "may_subscribe")
    client.send(b"\x82\x07\x00\x01\x00\x00\x01t\x00")
    assert closed_with(client, 0x83)
    assert bench.sings()
    assert bench.engine.router.count == 1


def test_r19_a_right_to_receive_that_cannot_be_decided_is_denied_and_the_publisher_unharmed(bench: Faulty) -> None:
    s, p = bench.client("s"), bench.client("p", version=5)
    s.subscribe("t", qos=1)
    fails(bench, "may_receive")
    p.publish("t").publish("t", b"m", 1)
    assert p.bytes() == ack(PUBACK, 1, 0x10)
    assert not s.take()
    assert errors(bench) == 1
    fails(bench, "")
    bench.engine.rights_changed()
    p.publish("t", b"m", 1)
    assert payloads(s) == [b"m"]


@pytest.mark.parametrize("delay", [False, True])
def test_r19_an_error_while_a_will_is_published_leaves_nothing_behind(bench: Faulty, delay: bool) -> None:
    client = bench.client("c", will=Will(b"t", b"x", 0, False, None), clean=not delay)
    fails(bench, "may_publish")
    client.drop()
    assert errors(bench) == 1
    assert ("c" in bench.engine.sessions) == delay
    assert bench.sings()
    bench.pass_time(8000, 100)
    assert "c" not in bench.engine.sessions


def test_r19_an_error_while_a_pending_login_is_cancelled_is_contained(bench: Faulty) -> None:
    fails(bench, "cancel").slow.add("c")
    client = bench.socket()
    client.send(connect_packet("c"))
    client.drop()
    assert errors(bench) == 1
    assert not bench.engine.wheel.buckets
    other = bench.socket()
    other.send(connect_packet("c"))
    bench.pass_time(11)
    assert other.closed, "the deadline holds all the same"
    assert bench.sings()


def test_r19_an_error_in_a_timer_does_not_stop_the_others(bench: Faulty) -> None:
    ran = []

    def broken() -> None:
        raise RuntimeError("injected")

    bench.engine.timers.at(bench.now + 1, broken)
    bench.engine.timers.at(bench.now + 1, lambda: ran.append(1))
    idle = bench.client("idle", keep_alive=1)
    bench.pass_time(4)
    assert ran == [1]
    assert idle.closed
    assert errors(bench) == 1


def test_r19_an_error_when_the_application_is_told_ends_nothing_else(bench: Faulty) -> None:
    def broken(channel: Any) -> None:
        raise RuntimeError("injected")

    bench.engine.on_disconnected = broken
    client = bench.client("c", will=Will(b"canary", b"will", 0, False, None))
    client.send(b"\xff\x00")
    assert client.closed
    assert payloads(bench.canary) == [b"will"]
    assert "c" not in bench.engine.sessions
    bench.engine.on_disconnected = None
    bench.engine.on_connected = broken
    assert bench.client("d").closed
    bench.engine.on_connected = None
    assert bench.sings()


def test_r19_one_connection_of_many_that_are_due_may_fail(bench: Faulty) -> None:
    idle = [bench.client(f"i{n}", keep_alive=1, will=Will(b"t", b"x", 0, False, None)) for n in range(5)]
    fails(bench, "may_publish")
    bench.pass_time(4)
    assert all(client.closed for client in idle)
    assert bench.engine.connected == 2
    assert bench.sings()


class Explosive(Receiver):
    def deliver(self, message: Any, target: Any, hold: Hold | None) -> int:
        raise RuntimeError("injected")


@pytest.mark.parametrize("version", [4, 5])
def test_r19_a_receiver_that_raises_ends_the_connection_that_published_and_no_other(
    bench: Faulty, version: int
) -> None:
    bench.engine.router.add(Subscription(Explosive(), b"t", 2, False, False, 0))
    p = bench.client("p", version=version)
    p.publish("t", b"m", 1)
    assert closed_with(p, 0x83)
    assert errors(bench) == 1
    assert bench.sings()


def test_errors_of_peers_are_reported_with_who_and_why_and_no_payload(bench: Faulty) -> None:
    client: Client = bench.client("c", username="u", password=b"hunter2")
    client.send(publish("a/#", b"secret payload", 1))
    category, text = bench.reports[-1]
    assert category == "protocol_error"
    assert "'c'" in text
    assert "127.0.0.1:50000" in text
    assert "0x90" in text
    assert "secret" not in text
    assert "hunter2" not in text
