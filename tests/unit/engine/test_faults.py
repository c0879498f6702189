"""R-19: an error inside the engine or its gate ends one connection; everything else goes on and it is counted."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from broker import engine as room
from broker.app import Broker as Application
from broker.engine.receiver import Hold, Receiver, Subscription
from broker.mqtt import packets
from broker.mqtt.packets import Will
from tests.build import compiled
from tests.unit.engine.harness import Bench, Client, Gate, Link, connect_packet
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack, closed_with, payloads, publish
from tests.unit.engine.stores import StoredBench
from tests.unit.engine.test_journal import subscribed


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
        self.gate = self.engine.rights.gate = Broken()
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


# everything in turn ---------------------------------------------------------------------------------------------------


def _classes() -> Iterator[type]:
    """Every class of the room."""
    for found in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{found.name}")
        for item in vars(module).values():
            if inspect.isclass(item) and item.__module__ == module.__name__:
                yield item


GUARDS = {
    "Channel.feed", "Channel._guard", "Channel.crash", "Channel.lost", "Channel._end", "Inbox._flush_acks",
    "Outbox.drop_unsent", "Outbox.flush", "Flusher.flush", "Flusher.run", "Flusher.after_read", "Engine.closed",
    "Engine.end_session", "Engine.tick", "Engine._try", "Core.set_clock", "Timers.run", "Wheel.due", "Wheel.remove",
}  # fmt: skip
"""What contains the errors of all others, what ends connections and sessions, and what the loop calls for everybody:
nothing stands behind these."""
METHODS = [
    pytest.param(owner, name, id=f"{owner.__name__}.{name}")
    for owner in _classes()
    for name, item in vars(owner).items()
    if inspect.isfunction(item) and not name.startswith("__") and f"{owner.__name__}.{name}" not in GUARDS
]


def _life(bench: Bench, version: int) -> tuple[Client, list[Callable[[], object]]]:
    """A client, and everything it does from its CONNECT to the end of its session."""
    client = bench.socket()
    client.version = version
    expiry: dict[str, Any] = {"session_expiry_interval": 60} if version == 5 else {}
    will = Will(b"v/will", b"gone", 1, True, None)
    subscribe = packets.encode_subscribe(1, version, [(b"v/#", 2), (b"$share/g/v/+", 1)])
    released: list[int] = []

    def acknowledge() -> None:
        for packet in client.take():
            if isinstance(packet, packets.Publish) and packet.qos == 1:
                client.send(ack(PUBACK, packet.packet_id))
            elif isinstance(packet, packets.Publish) and packet.qos == 2:
                released.append(packet.packet_id)
                client.send(ack(PUBREC, packet.packet_id))

    return client, [
        lambda: client.send(connect_packet("v", version, False, will=will, **expiry)),
        lambda: client.send(subscribe),
        lambda: client.send(publish("v/0", b"m", 0, 1, version)),
        lambda: client.send(publish("v/1", b"m", 1, 1, version, retain=True)),
        lambda: client.send(publish("v/2", b"m", 2, 2, version)),
        lambda: client.send(ack(PUBREL, 2)),
        acknowledge,
        lambda: client.send(*(ack(PUBCOMP, ident) for ident in released)),
        lambda: client.send(b"\xc0\x00"),
        lambda: client.send(subscribe),
        lambda: client.send(packets.encode_unsubscribe(9, version, [b"v/#", b"$share/g/v/+"])),
        client.drop,
        lambda: bench.pass_time(8000, 100),
    ]


@pytest.mark.skipif(bool(compiled()[0]), reason="the methods of compiled classes cannot be replaced")
@pytest.mark.parametrize(("owner", "name"), METHODS)
@pytest.mark.parametrize("version", [4, 5])
def test_r19_whatever_fails_at_whatever_moment_ends_one_client_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, owner: type, name: str, version: int
) -> None:
    """The method raises once, during each step of a client's life in turn. The client may end, nobody else hears of it,
    it is counted, nothing of the client stays, and it may come back."""
    caplog.set_level(logging.CRITICAL, "broker.engine")
    whole = vars(owner)[name]
    steps = 1
    at = 0
    while at < steps:
        bench = Faulty()
        client, life = _life(bench, version)
        steps = len(life)
        armed = False
        fired = False

        def faulty(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal armed, fired
            if armed:
                armed, fired = False, True
                raise RuntimeError(f"injected into {name}")
            return whole(self, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, faulty)
            for number, step in enumerate(life[: at + 1]):
                armed = number == at
                step()
            armed = False
        at += 1
        if not fired:
            continue
        assert errors(bench) >= 1, f"step {at}: not counted"
        assert bench.sings(), f"step {at}"
        assert client.closed or client.link.closed or at > 11, f"step {at}: it lives on"
        client.drop()
        bench.pass_time(8000, 100)
        assert set(bench.engine.sessions) == {"canary", "singer"}, f"step {at}"
        assert bench.engine.connected == 2, f"step {at}"
        assert bench.engine.router.count == 1, f"step {at}"
        assert not bench.engine.groups, f"step {at}"
        assert bench.client("v", version=version).connack.code == 0, f"step {at}"


class Torn(Link):
    """A transport that fails to take bytes."""

    def write(self, data: bytes) -> None:
        raise OSError("injected")


@pytest.mark.parametrize("version", [4, 5])
def test_r19_a_transport_that_fails_keeps_no_bytes_from_those_after_it(bench: Faulty, version: int) -> None:
    others = [bench.client(f"s{n}", version=version) for n in range(5)]
    for client in others:
        client.subscribe("t", qos=1)
    torn = others[2]
    torn.link = torn.channel.link = Torn()
    p = bench.client("p")
    for qos in (0, 1):
        p.publish("t", b"m", qos)
    assert p.bytes() == ack(PUBACK, 1)
    for client in others:
        if client is not torn:
            assert payloads(client) == [b"m", b"m"]
    assert torn.link.closed
    assert "s2" not in bench.engine.sessions
    assert errors(bench) == 1
    assert bench.sings()


def test_r19_a_transport_that_fills_up_with_our_last_word_does_not_stop_the_clock(bench: Faulty) -> None:
    """A WebSocket's close frame is sent when the channel is closed already."""
    client = bench.client("c")
    client.send(b"\xe0\x00")
    assert client.closed
    client.channel.pause_writing()
    idle = bench.client("idle", keep_alive=1)
    bench.pass_time(100)
    assert idle.closed
    assert not bench.engine.core.stalled
    client.channel.resume_writing()
    assert bench.sings()


def test_r19_an_error_in_one_of_those_that_are_closed_late_does_not_keep_the_others(bench: Faulty) -> None:
    class Stuck(Link):
        def get_write_buffer_size(self) -> int:
            return 1

        def abort(self) -> None:
            raise OSError("injected")

    clients = [bench.client(f"c{n}") for n in range(3)]
    for client in clients[:2]:
        client.link = client.channel.link = Stuck()
    last = clients[2].link = clients[2].channel.link = Link()
    last.get_write_buffer_size = lambda: 1  # type: ignore[method-assign]
    for client in clients:
        client.send(b"\xe0\x00")
    last.closed = False
    bench.pass_time(10)
    assert last.closed
    assert errors(bench) == 2
    assert bench.sings()


def test_r19_an_answer_that_waits_for_the_disk_and_fails_keeps_no_other_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "broker.engine")
    bench = StoredBench()
    subscribed(bench, "s", "t").drop()
    bench.commit()
    victim, other = bench.client("v"), bench.client("o")

    def failing(written: bool) -> None:
        raise RuntimeError("injected")

    bench.journal.after(failing)
    victim.publish("t", b"1", 1)
    other.publish("t", b"2", 1)
    bench.commit()
    assert victim.bytes() == other.bytes() == ack(PUBACK, 1)
    assert errors(bench) == 1
    bench.journal.after(failing)
    other.publish("t", b"3", 1)
    bench.store.fail(True)
    bench.settle()
    assert other.closed
    assert errors(bench) == 2


def test_r19_a_tick_that_fails_is_not_the_last_one() -> None:
    later: list[Any] = []

    def broken(now: float, wall_ms: int) -> None:
        raise RuntimeError("injected")

    loop = SimpleNamespace(time=lambda: 1.0, call_later=lambda seconds, action: later.append((seconds, action)))
    application = SimpleNamespace(_loop=loop, engine=SimpleNamespace(tick=broken), _ticker=None, _tick=object())
    with pytest.raises(RuntimeError):
        Application._tick(application)  # type: ignore[arg-type]
    assert [action for _, action in later] == [application._tick]


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
