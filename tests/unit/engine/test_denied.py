"""What follows when a client tries what it has no right to."""

from __future__ import annotations

import json

import pytest

from broker.engine.session import NEVER
from broker.features.client_events import ClientEvents
from broker.mqtt import packets
from tests.unit.engine.harness import Bench, connect_packet
from tests.unit.engine.parts import PUBACK, ack, payloads, publish
from tests.unit.engine.stores import StoredBench
from tests.unit.engine.test_journal import resume, subscribed


@pytest.fixture
def bench() -> StoredBench:
    bench = StoredBench()
    bench.gate.deny_publish.add((None, "no"))
    bench.gate.deny_subscribe.add((None, "no"))
    return bench


def test_z25_what_is_denied_does_not_travel_between_what_is_allowed() -> None:
    """QoS 0 messages of one read and one route are one slice."""
    bench = Bench()
    bench.gate.deny_publish.add((None, "t/no"))
    watcher = bench.client("w")
    watcher.subscribe("t/#", qos=0)
    p = bench.client("p")
    p.send(publish("t/a", b"1") + publish("t/no", b"2") + publish("t/a", b"3") + publish("t/no", b"4"))
    assert payloads(watcher) == [b"1", b"3"]


def test_z24_nothing_ends_the_time_for_which_a_client_is_held_back(bench: StoredBench) -> None:
    """Least of all the acknowledgement of what it published before."""
    bench.engine.on_denied = lambda channel: bench.engine.hold_back(channel, 1.0)
    s = subscribed(bench, "s", "t")
    s.drop()
    p = bench.client("p")
    p.send(publish("t", b"1", 1, 1) + publish("no", b"x") + publish("t", b"2", 1, 2))
    bench.commit()
    assert p.bytes() == ack(PUBACK, 1)
    bench.pass_time(0.75)
    bench.commit()
    assert p.bytes() == b""
    bench.pass_time(0.5)
    bench.commit()
    assert p.bytes() == ack(PUBACK, 2)


def test_z25_a_subscribe_that_ends_the_connection_leaves_nothing_half_done(bench: StoredBench) -> None:
    events = ClientEvents(bench.engine)
    events.watch(("session_subscribed",))
    ear = bench.client("ear", version=5, privileged=True)
    ear.subscribe("$events/#", qos=0)
    bench.engine.on_denied = lambda channel: channel.disconnect(0x87)
    s = bench.client("s", version=5, clean=False, session_expiry_interval=100)
    bench.commit()
    s.take()
    s.send(packets.encode_subscribe(1, 5, [(b"yes", 1), (b"no", 1), (b"also", 1)]))
    bench.commit()
    (told,) = s.take()
    assert told.code == 0x87
    assert not bench.engine.subscriptions._unwritten
    assert "internal_error" not in bench.engine.core.events
    assert [json.loads(m.payload)["topic"] for m in ear.take()] == ["yes"]


def test_a_client_whose_connack_waits_is_kicked_without_a_word(bench: StoredBench) -> None:
    subscribed(bench, "s", "t").drop()
    client = bench.socket().send(connect_packet("s", 5, True, session_expiry_interval=100))
    assert client.bytes() == b""
    assert len(bench.engine.clients()) == 1
    assert bench.engine.kick("s")
    bench.commit()
    assert client.bytes() == b""
    assert client.closed
    assert not bench.engine.kick("s")


def test_a_session_that_never_expires_is_not_taken_for_connected_after_a_restart() -> None:
    bench = StoredBench(session_expiry=NEVER)
    s = subscribed(bench, "s", "t", version=5, session_expiry_interval=0xFFFFFFFF)
    s.drop()
    bench.client("p").publish("t", b"m", 1)
    bench.commit()
    bench.journal.snapshot(bench.engine.sessions["s"].spool)
    bench.commit()
    again = resume(bench.restart(), "s", 5)
    (got,) = [packet for packet in again.take() if hasattr(packet, "payload")]
    assert (got.payload, got.dup) == (b"m", False)
