"""Client events through a whole broker: into a sink and past a kill, to those only who have a right to them."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.broker import broker
from tests.clients import Device, Refused
from tests.fragments import shipped

pytestmark = pytest.mark.timeout(120)

PASSWORD = "dev-password-nobody-may-read"
PEOPLE = f"""
[listeners.tcp]
bind = "127.0.0.1:0"
[auth.people]
kind = "static"
[auth.people.users.dev]
password = "{PASSWORD}"
publish = ["a/#"]
subscribe = ["#"]
[auth.people.users.watcher]
password = "watcher-pw"
subscribe = ["$events/#"]
[auth.people.users.root]
password = "root-pw"
superuser = true
"""
SINK = """
[sinks.life]
kind = "sqlite"
filters = ["$events/#"]
path = "life.db"
columns = { msgid = "${msgid}", clientid = "${clientid}", topic = "${topic}", payload = "${payload}" }
"""


def stored(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """What the sink has, in the order in which the broker took it."""
    with closing(sqlite3.connect(path)) as db:
        try:
            rows = db.execute("SELECT clientid, topic, payload FROM messages ORDER BY msgid").fetchall()
        except sqlite3.OperationalError:  # there is no table yet
            return []
    return [(client, topic, json.loads(payload)) for client, topic, payload in rows]


def wait_for(path: Path, enough: Callable[[list[Any]], bool], seconds: float = 15) -> list[Any]:
    deadline = time.monotonic() + seconds
    while not enough(found := stored(path)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_the_life_of_clients_goes_into_a_sink_in_order_and_survives_a_kill(tmp_path: Path) -> None:
    fragments = {"10.toml": PEOPLE, "50-events.toml": shipped("50-events.toml"), "60.toml": SINK}
    with broker(tmp_path, fragments) as running:
        with Device(running.port, "dev", PASSWORD, client_id="d1") as device:
            device.subscribe("a/#", 1)
            device.publish("a/b", b"x", 1)
            assert device.receive().topic == "a/b"
            device.paho.unsubscribe("a/#")
            device.publish("a/b", b"x", 1)  # answered after UNSUBSCRIBE was handled
        with pytest.raises(Refused), Device(running.port, "dev", "wrong", client_id="d2"):
            pass
        with Device(running.port, "dev", PASSWORD, client_id="d3"):
            wait_for(tmp_path / "life.db", lambda found: len(found) >= 5)
            running.stop(signal.SIGKILL)
        running.start()
        with Device(running.port, "dev", PASSWORD, client_id="d4", version=4):
            pass
        found = wait_for(tmp_path / "life.db", lambda found: len(found) >= 7)
        assert running.stop() == 0
    assert [(client, topic.removeprefix("$events/")) for client, topic, _ in found] == [
        ("d1", "client_connected"), ("d1", "session_subscribed"), ("d1", "session_unsubscribed"),
        ("d1", "client_disconnected"), ("d3", "client_connected"),
        ("d4", "client_connected"), ("d4", "client_disconnected"),
    ]  # fmt: skip
    assert [said["reason"] for _, topic, said in found if topic.endswith("disconnected")] == [
        "normal_disconnection"
    ] * 2
    assert found[1][2]["topic"] == "a/#"
    assert {said["username"] for *_, said in found} == {"dev"}
    assert PASSWORD not in json.dumps(found)
    assert PASSWORD.encode() not in (tmp_path / "life.db").read_bytes()


def test_a_stop_is_the_reason_of_who_was_there(tmp_path: Path) -> None:
    """What is said while the broker stops waits in the queue until the next start."""
    fragments = {"10.toml": PEOPLE, "50-events.toml": shipped("50-events.toml"), "60.toml": SINK}
    with broker(tmp_path, fragments) as running:
        with Device(running.port, "dev", PASSWORD, client_id="d1"):
            wait_for(tmp_path / "life.db", lambda found: len(found) >= 1)
            assert running.stop() == 0
        running.start()
        *_, (client, topic, said) = wait_for(tmp_path / "life.db", lambda found: len(found) >= 2)
        assert (client, topic, said["reason"]) == ("d1", "$events/client_disconnected", "server_shutting_down")


def test_p61_only_a_rule_that_names_the_topic_lets_a_client_listen_and_none_speak(tmp_path: Path) -> None:
    with (
        broker(tmp_path, {"10.toml": PEOPLE, "50-events.toml": shipped("50-events.toml")}) as running,
        Device(running.port, "watcher", "watcher-pw") as watcher,
        Device(running.port, "dev", PASSWORD, client_id="d1") as device,
    ):
        watcher.subscribe("$events/client_connected", 1)
        device.subscribe("#", 1)
        for filter in ("$events/#", "$events/client_connected", "$share/g/$events/#", "$dlq/life"):
            with pytest.raises(Refused):
                device.subscribe(filter, 1)
        with pytest.raises(Refused):
            device.publish("$events/client_connected", b"forged", 1)
        with Device(running.port, "root", "root-pw") as root, pytest.raises(Refused):
            root.publish("$events/client_connected", b"forged", 1)
        assert json.loads(watcher.receive().payload)["username"] == "root"
        assert device.messages.empty()


def test_nobody_is_let_in_by_default(tmp_path: Path) -> None:
    """`no_match = "allow"` is about devices' topics; what others published stands in `$dlq` and `$events`."""
    open_house = '[access]\nallow_anonymous = true\nno_match = "allow"\n[listeners.tcp]\nbind = "127.0.0.1:0"\n'
    with (
        broker(
            tmp_path, {"10.toml": open_house, "50-events.toml": shipped("50-events.toml"), "60.toml": SINK}
        ) as running,
        Device(running.port) as device,
    ):
        device.subscribe("#", 1)
        for filter in ("$events/#", "$dlq/life", "$share/g/$dlq/+"):
            with pytest.raises(Refused):
                device.subscribe(filter, 1)


def test_a_reload_begins_and_ends_it(tmp_path: Path) -> None:
    with broker(tmp_path, {"10.toml": PEOPLE, "60.toml": SINK}) as running:
        with Device(running.port, "dev", PASSWORD, client_id="before"):
            running.write("50-events.toml", '[events]\npublish = ["client_disconnected"]\n')
            assert running.isthmus("reload").returncode == 0
        assert wait_for(tmp_path / "life.db", lambda found: len(found) >= 1)[0][0] == "before"
        (running.conf / "50-events.toml").unlink()
        assert running.isthmus("reload").returncode == 0
        with Device(running.port, "dev", PASSWORD, client_id="after"):
            pass
        time.sleep(0.5)
        assert [client for client, *_ in stored(tmp_path / "life.db")] == ["before"]
