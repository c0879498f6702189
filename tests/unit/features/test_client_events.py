"""Client events: which there are, in which order, what they say, and that nobody pays for them who did not ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from broker.engine.engine import Engine
from broker.engine.message import Message
from broker.extend.session import SessionSpec
from broker.features.client_events import ClientEvents
from broker.mqtt import packets
from broker.mqtt.packets import Will
from tests.unit.engine.harness import Bench, connect_packet
from tests.unit.engine.parts import resume

ALL = (
    "client_connected", "client_disconnected", "session_created", "session_terminated",
    "session_subscribed", "session_unsubscribed", "message_dropped",
)  # fmt: skip
SECRET = b"a-password-nobody-may-read"


class Watched(Bench):
    """A bench with a privileged client that hears every event."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self.events = ClientEvents(self.engine)
        self.events.watch(ALL)
        self.ear = self.client("ear", version=5, privileged=True)
        self.ear.subscribe("$events/#", qos=0)

    def heard(self) -> list[dict[str, Any]]:
        """The events since the last look."""
        found = []
        self.settle()
        for packet in self.ear.take():
            said = json.loads(packet.payload)
            assert packet.topic == f"$events/{said['event']}".encode()
            found.append(said)
        return found

    def names(self) -> list[str]:
        return [said["event"] for said in self.heard()]


class Instead:
    """The engine, with another way to publish."""

    def __init__(self, engine: Any, publish: Callable[[Message], int]) -> None:
        self._engine = engine
        self.publish = publish

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.fixture
def bench() -> Watched:
    return Watched()


def test_a_life_in_order(bench: Watched) -> None:
    client = bench.client("dev", version=5, username="alice", password=SECRET, keep_alive=60)
    assert client.subscribe("a/#", ("$share/g/b", 1), qos=1) == [1, 1]
    client.send(packets.encode_unsubscribe(2, 5, [b"a/#", b"nothing"]))
    client.take()
    client.send(packets.encode_disconnect(5, 0))
    heard = bench.heard()
    assert [said["event"] for said in heard] == [
        "session_created", "client_connected", "session_subscribed", "session_subscribed", "session_unsubscribed",
        "client_disconnected", "session_terminated",
    ]  # fmt: skip
    assert all((said["clientid"], said["username"], said["node"]) == ("dev", "alice", "isthmus-1") for said in heard)
    assert heard[1] == {
        "event": "client_connected", "clientid": "dev", "username": "alice", "ipaddress": "127.0.0.1",
        "proto_name": "MQTT", "proto_ver": 5, "listener": "tcp", "keepalive": 60, "expiry_interval": 0,
        "connected_at": 1_700_000_000_000, "ts": 1_700_000_000_000, "node": "isthmus-1",
    }  # fmt: skip
    assert [(said["topic"], said["qos"]) for said in heard[2:4]] == [("a/#", 1), ("$share/g/b", 1)]
    assert heard[4]["topic"] == "a/#"
    assert (heard[5]["reason"], heard[5]["reason_code"]) == ("normal_disconnection", 0)
    assert heard[5]["disconnected_at"] >= heard[5]["connected_at"] == 1_700_000_000_000
    assert SECRET.decode() not in json.dumps(heard)


ENDS = {
    "connection_closed": (None, lambda bench, client: client.drop()),
    "administrative_action": (0x98, lambda bench, client: bench.engine.kick("dev")),
    "keep_alive_timeout": (0x8D, lambda bench, client: bench.pass_time(20)),
    "session_taken_over": (0x8E, lambda bench, client: bench.client("dev", version=client.version)),
    "malformed_packet": (0x81, lambda bench, client: client.send(b"\xff\x00")),
    "normal_disconnection": (0, lambda bench, client: client.send(b"\xe0\x00")),
    "disconnect_with_will": (4, lambda bench, client: client.send(packets.encode_disconnect(5, 4))),
}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("reason", ENDS)
def test_the_reason_of_the_end_is_told_once(bench: Watched, version: int, reason: str) -> None:
    version = 5 if reason == "disconnect_with_will" else version  # before MQTT 5 there was one DISCONNECT
    code, end = ENDS[reason]
    client = bench.client("dev", version=version, keep_alive=10)
    bench.heard()
    end(bench, client)
    client.drop()
    [said] = [said for said in bench.heard() if said["event"] == "client_disconnected"]
    assert (said["reason"], said["reason_code"], said["proto_ver"]) == (reason, code, version)


def test_a_takeover_is_the_end_of_one_and_the_beginning_of_another(bench: Watched) -> None:
    bench.client("dev", version=5, clean=False, session_expiry_interval=100)
    bench.heard()
    resume(bench, "dev", 5, session_expiry_interval=100)
    assert bench.names() == ["client_disconnected", "client_connected"]


def test_a_session_that_waits_is_terminated_when_it_expires(bench: Watched) -> None:
    client = bench.client("dev", version=5, session_expiry_interval=10)
    bench.heard()
    client.drop()
    assert bench.names() == ["client_disconnected"]
    bench.pass_time(11)
    [said] = bench.heard()
    assert (said["event"], said["clientid"], said["ipaddress"]) == ("session_terminated", "dev", None)


def test_who_was_refused_has_not_been_here(bench: Watched) -> None:
    bench.gate.refuse["eve"] = 0x87
    assert bench.client("dev", version=5, username="eve").connack.code == 0x87
    assert bench.client("dev", version=5, will=Will(b"$x", b"", 0, False, None)).connack.code == 0x87
    client = bench.client("ok", version=5)
    bench.gate.deny_subscribe.add((None, "secret"))
    assert client.subscribe("secret", "open") == [0x87, 0]
    assert [(said["event"], said.get("topic")) for said in bench.heard()] == [
        ("session_created", None), ("client_connected", None), ("session_subscribed", "open"),
    ]  # fmt: skip


def test_a_right_that_was_taken_away_ends_the_subscription(bench: Watched) -> None:
    bench.client("dev", username="alice").subscribe("a")
    bench.heard()
    bench.gate.deny_subscribe.add(("alice", "a"))
    bench.engine.rights_changed("dev")
    assert [(said["event"], said["topic"]) for said in bench.heard()] == [("session_unsubscribed", "a")]


def test_workers_and_what_they_do_is_nobodys_business(bench: Watched) -> None:
    bench.engine.instances.ensure("store", SessionSpec(filters=(("a/#", 2),)), None)
    worker = bench.client("isthmus/store/0", version=5, clean=False, privileged=True)
    worker.drop()
    helper = bench.client("isthmus/store/watch", version=5, privileged=True)
    helper.subscribe("x")
    helper.drop()
    bench.engine.instances.remove("store")
    assert bench.names() == []


def test_only_what_was_asked_for_is_published(bench: Watched) -> None:
    bench.events.watch(["session_subscribed"])
    client = bench.client("dev")
    client.subscribe("a")
    client.drop()
    assert bench.names() == ["session_subscribed"]


def test_when_nothing_is_watched_the_engine_tells_nobody(bench: Watched) -> None:
    client = bench.client("dev")
    bench.events.watch([])
    assert bench.engine.core.observer is None
    bench.heard()
    client.drop()
    bench.client("other").subscribe("a")
    assert bench.names() == []


def test_clients_that_were_here_before_get_their_end(bench: Watched) -> None:
    bench.events.watch([])
    client = bench.client("dev")
    bench.heard()
    bench.events.watch(["client_connected", "client_disconnected"])
    client.drop()
    [said] = bench.heard()
    assert (said["event"], said["connected_at"]) == ("client_disconnected", None)


def test_the_events_of_a_client_carry_its_names(bench: Watched) -> None:
    """Rules, keys and lanes of a sink go by who the client is."""
    seen: list[Message] = []

    def publish(message: Message) -> int:
        seen.append(message)
        return bench.engine.publish(message)

    bench.events._engine = cast(Engine, Instead(bench.engine, publish))
    bench.client("dev", username="alice", version=5, session_expiry_interval=9).drop()
    assert {(m.origin.client_id, m.origin.username, m.origin.peerhost) for m in seen} == {("dev", "alice", "127.0.0.1")}
    assert {(m.qos, m.retain) for m in seen} == {(1, False)}


def test_an_event_that_cannot_be_published_harms_nobody(bench: Watched, caplog: pytest.LogCaptureFixture) -> None:
    def broken(message: Message) -> int:
        raise RuntimeError("injected")

    bench.events._engine = cast(Engine, Instead(bench.engine, broken))
    client = bench.client("dev")
    assert client.connack.code == 0
    assert client.subscribe("a") == [0]
    client.drop()
    assert "dev" not in bench.engine.sessions
    assert bench.engine.core.events["internal_error"] == 5
    assert "client_connected of client 'dev'" in caplog.text


def test_everything_said_is_text_whatever_a_client_is_called(bench: Watched) -> None:
    name = 'dev"\\\u2028é日本'
    bench.client(name, username="ünï").drop()
    heard = bench.heard()
    assert {(said["clientid"], said["username"]) for said in heard} == {(name, "ünï")}


def test_nothing_is_remembered_of_who_has_left(bench: Watched) -> None:
    for number in range(100):
        bench.client(f"dev-{number}").drop()
    late = bench.socket()
    late.send(connect_packet("late"))
    late.drop()
    assert not bench.events._since


def lost(bench: Watched) -> list[tuple[str | None, str, int]]:
    """What the next report says."""
    bench.pass_time(1.5)
    heard = [said for said in bench.heard() if said["event"] == "message_dropped"]
    return sorted((said["clientid"] or "", said["reason"], said["count"]) for said in heard)


def test_what_is_dropped_is_told_once_a_second_by_client_and_reason(bench: Watched) -> None:
    bench.engine.core.limits.max_queued_messages = 2
    away = bench.client("away", version=5, clean=False, session_expiry_interval=1000)
    away.subscribe("t/#", qos=1)
    away.drop()
    publisher = bench.client("pub", version=5)
    for number in range(5):
        publisher.publish("t/1", b"%d" % number, qos=1)
    assert lost(bench) == [("away", "queue_full", 3)]
    assert lost(bench) == []
    publisher.publish("t/1", b"", qos=1)
    assert lost(bench) == [("away", "queue_full", 1)]


def test_a_refused_message_is_its_publishers(bench: Watched) -> None:
    bench.gate.deny_publish.add(("alice", "secret"))
    publisher = bench.client("pub", version=5, username="alice")
    publisher.publish("secret", b"", qos=1)
    assert lost(bench) == [("pub", "unauthorized", 1)]


def test_an_event_that_is_dropped_makes_no_event(bench: Watched) -> None:
    """Else the queue of whoever hears them would never be told of anything else."""
    bench.engine.core.limits.max_queued_messages = 1
    ear = bench.client("late", version=5, clean=False, privileged=True, session_expiry_interval=1000)
    ear.subscribe("$events/#", "t", qos=1)
    ear.drop()
    publisher = bench.client("pub", version=5)
    for _ in range(3):
        publisher.publish("t", b"", qos=1)
    first = lost(bench)
    assert [said for said in first if said[0] == "late"]
    assert lost(bench) == []


def test_many_losers_are_one_report_of_bounded_size(bench: Watched) -> None:
    for number in range(3000):
        bench.engine.core.drop("too_large", 2, type("Session", (), {
            "client_id": f"dev-{number}", "owner": None, "channel": None, "spec": None, "principal": None,
        })())  # fmt: skip
    told = lost(bench)
    assert len(told) == 1001
    assert told[0] == ("", "too_large", 4000)


def test_who_does_not_ask_is_told_nothing(bench: Watched) -> None:
    bench.events.watch(["client_connected"])
    assert bench.engine.core.on_drop is None
    bench.engine.core.drop("too_large", 1, None)
    assert lost(bench) == []
