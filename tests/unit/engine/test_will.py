"""Wills: published once, late or never, as the end of the connection was."""  # P-59

from __future__ import annotations

import pytest

from broker.mqtt import packets
from broker.mqtt.packets import Will
from broker.mqtt.properties import Properties
from tests.unit.engine.harness import Bench, Client, props
from tests.unit.engine.parts import payloads, resume


class Watched(Bench):
    """A bench with a subscriber to `will` and the time each will came."""

    def __init__(self) -> None:
        super().__init__()
        self.watcher = self.client("watcher", version=5)
        self.watcher.subscribe(("will", 0x08 | 1))

    def with_will(self, client_id: str = "c", expiry: int = 0, **will: int) -> Client:
        """An MQTT 5 client whose will has these properties."""
        properties: Properties | None = props(**will) if will else None
        return self.client(
            client_id,
            version=5,
            clean=False,
            will=Will(b"will", b"gone", 1, False, properties),
            session_expiry_interval=expiry,
        )

    def came(self) -> int:
        """How many wills since the last look."""
        return len(payloads(self.watcher))


@pytest.fixture
def bench() -> Watched:
    return Watched()


def test_p59_an_abrupt_end_publishes_the_will_once(bench: Watched) -> None:
    for client in (bench.with_will(), bench.client("d", will=Will(b"will", b"gone", 0, False, None))):
        client.drop()
        assert bench.came() == 1
        bench.pass_time(30)
        assert bench.came() == 0


def test_p59_a_disconnect_0_forgets_the_will_and_a_disconnect_4_publishes_it(bench: Watched) -> None:
    for code, wills in ((0x00, 0), (0x04, 1)):
        client = bench.with_will(expiry=10)
        client.send(packets.encode_disconnect(5, code))
        assert client.closed
        assert bench.came() == wills
        bench.pass_time(30)
        assert bench.came() == 0
    four = bench.client("d", will=Will(b"will", b"gone", 0, False, None))
    four.send(b"\xe0\x00")
    assert bench.came() == 0


@pytest.mark.parametrize("reason", ["keep-alive", "protocol error", "kick", "stall"])
def test_p59_every_end_the_broker_decides_publishes_the_will(bench: Watched, reason: str) -> None:
    client = bench.client("c", version=5, keep_alive=1, will=Will(b"will", b"gone", 0, False, None))
    if reason == "keep-alive":
        bench.pass_time(4)
    elif reason == "kick":
        assert bench.engine.kick("c")
    elif reason == "stall":
        bench.engine.configure(type(bench.engine.core.limits)(stall_timeout=0.5))
        client.channel.pause_writing()
        bench.pass_time(1)
    else:
        client.send(b"\xff\x00")
    bench.settle()
    assert client.closed
    assert bench.came() == 1


@pytest.mark.parametrize("clean", [True, False])
def test_p59_a_take_over_publishes_a_will_without_delay(bench: Watched, clean: bool) -> None:
    bench.with_will(expiry=60)
    bench.client("c", version=5, clean=clean, session_expiry_interval=60)
    assert bench.came() == 1


def test_p59_a_will_delay_is_kept(bench: Watched) -> None:
    bench.with_will(expiry=60, will_delay_interval=5).drop()
    bench.pass_time(4.5)
    assert bench.came() == 0
    bench.pass_time(1)
    assert bench.came() == 1
    bench.pass_time(100)
    assert bench.came() == 0


def test_p59_a_will_delay_ends_with_the_session(bench: Watched) -> None:
    bench.with_will(expiry=0, will_delay_interval=5).drop()
    assert bench.came() == 1
    bench.with_will(expiry=3, will_delay_interval=50).drop()
    bench.pass_time(2.5)
    assert bench.came() == 0
    bench.pass_time(1)
    assert bench.came() == 1
    bench.with_will(expiry=60, will_delay_interval=50).drop()
    bench.client("c", version=5, clean=True)
    assert bench.came() == 1, "a clean start ends the session"
    bench.pass_time(100)
    assert bench.came() == 0


@pytest.mark.parametrize("taken_over", [False, True])
def test_p59_coming_back_in_time_cancels_a_delayed_will(bench: Watched, taken_over: bool) -> None:
    client = bench.with_will(expiry=60, will_delay_interval=5)
    if not taken_over:
        client.drop()
        bench.pass_time(3)
    again = resume(bench, "c", 5, session_expiry_interval=60)
    assert again.take()[0].session_present
    bench.pass_time(30)
    assert bench.came() == 0
    again.drop()
    bench.pass_time(30)
    assert bench.came() == 0, "the new connection brought no will"


def test_p59_each_connection_has_its_own_will(bench: Watched) -> None:
    bench.with_will(expiry=60)
    bench.client("c", version=5, clean=False, session_expiry_interval=60, will=Will(b"will", b"second", 0, False, None))
    bench.watcher.take()
    bench.engine.sessions["c"].channel.lost(None)
    bench.settle()
    assert payloads(bench.watcher) == [b"second"]


def test_a_will_is_a_message_like_any_other(bench: Watched) -> None:
    forward = props(
        payload_format_indicator=1, content_type="t", response_topic="r", correlation_data=b"c",
        message_expiry_interval=30, user_properties=[("k", "v")],
    )  # fmt: skip
    will = Will(b"will", b"gone", 1, True, forward)
    bench.client("c", version=5, will=will).drop()
    (m,) = bench.watcher.take()
    assert (m.payload, m.qos, m.retain) == (b"gone", 1, True)
    assert m.properties.user_properties == [("k", "v")]
    assert (m.properties.content_type, m.properties.response_topic, m.properties.correlation_data) == ("t", "r", b"c")
    assert m.properties.message_expiry_interval == 30
    bench.pass_time(10)
    s = bench.client("s", version=5)
    s.subscribe("will")
    assert s.after_suback[0].properties.message_expiry_interval == 20


def test_the_expiry_of_a_will_begins_when_it_is_published(bench: Watched) -> None:
    bench.with_will(expiry=60, will_delay_interval=20, message_expiry_interval=10).drop()
    bench.pass_time(21)
    (m,) = bench.watcher.take()
    assert m.properties.message_expiry_interval == 10
    bench.with_will("d", message_expiry_interval=0).drop()
    assert bench.came() == 0


def test_a_retained_will_without_payload_clears(bench: Watched) -> None:
    bench.client("p").publish("will", b"m", retain=True)
    bench.client("c", will=Will(b"will", b"", 0, True, None)).drop()
    assert payloads(bench.watcher) == [b"m", b""]
    assert bench.engine.retained_store.count == 0


def test_a_client_does_not_hear_its_own_will_after_it_is_gone(bench: Watched) -> None:
    client = bench.client(
        "c", version=5, clean=False, session_expiry_interval=60, will=Will(b"own", b"x", 1, False, None)
    )
    client.subscribe(("own", 4 | 1))
    other = bench.client(
        "d", version=5, clean=False, session_expiry_interval=60, will=Will(b"own", b"y", 1, False, None)
    )
    other.subscribe(("own", 1))
    client.drop()
    other.drop()
    assert [m.payload for m in resume(bench, "c", 5).take()[1:]] == [b"y"]
    assert [m.payload for m in resume(bench, "d", 5).take()[1:]] == [b"x", b"y"]


def test_p60_many_wills_at_once_are_each_published_once(bench: Watched) -> None:
    clients = [bench.client(f"c{n}", will=Will(b"will", b"%05d" % n * 3000, 0, False, None)) for n in range(300)]
    for client in clients:
        client.channel.lost(None)
    bench.settle()
    got = payloads(bench.watcher)
    assert sorted(payload[:5] for payload in got) == [b"%05d" % n for n in range(300)]
    assert len(bench.engine.sessions) == 1
