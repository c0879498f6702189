"""Sinks as an operator sees and holds them: status, pause and resume, placement in named workers, lanes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import broker as brokers
from tests.broker import Broker
from tests.clients import Device
from tests.system.resilience import until

BASE = """
[access]
allow_anonymous = true
no_match = "allow"
[listeners.tcp]
bind = "127.0.0.1:0"
[workers]
processes = 2
"""
SINK = """
[sinks.{name}]
kind = "sqlite"
path = "{name}.db"
filters = ["{topics}"]
columns = {{ msgid = "${{msgid}}", payload = "${{payload}}" }}
"""


def sink(name: str, topics: str = "t/#", more: str = "") -> str:
    return SINK.format(name=name, topics=topics) + more


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """`start(a=…)`: a running broker whose fragments are 00-base.toml and these."""
    with brokers.starting(tmp_path, BASE) as start:
        yield start


def rows(broker: Broker, name: str) -> list[str]:
    with contextlib.closing(sqlite3.connect(broker.where / f"{name}.db", timeout=10)) as db:
        try:
            return [row[0] for row in db.execute("select payload from messages order by rowid")]
        except sqlite3.OperationalError:  # not made yet
            return []


def shown(broker: Broker, name: str) -> dict[str, Any]:
    done = broker.isthmus("sinks", "show", name, "--json")
    assert done.returncode == 0, done.stderr
    entry: dict[str, Any] = json.loads(done.stdout)
    return entry


def test_status_tells_state_lag_age_throughput_losses_and_where_it_was_configured(
    start: Callable[..., Broker], tmp_path: Path
) -> None:
    """What came is stored, refused, dropped or queued, and each is counted. S-27"""
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as db:
        db.execute("create table messages (msgid text primary key, payload text check (payload <> 'bad'))")
    broker = start(sinks="# one line above" + sink("store"))
    broker.wait_for("sinks", "store", "running")
    with Device(broker.port) as device:
        for number in range(40):
            device.publish("t/a", f"{number}", qos=1)
        device.publish("t/a", "bad", qos=1)
        until(lambda: len(rows(broker, "store")) == 40, "the good ones are stored")
        entry = until(
            lambda: (e := shown(broker, "store"))["per_second"] and e["dead"] and not e["queued"] and e, "throughput"
        )
        assert entry["name"] == "store"
        assert entry["state"] == "running"
        assert entry["attached"] is True
        assert 0 < entry["per_second"] <= 41
        assert (entry["acked"], entry["dead"], entry["dead_letters"]) == (41, 1, 1)
        assert (entry["queued"], entry["queued_bytes"], entry["oldest_s"]) == (0, 0, 0.0)
        assert entry["configured"] == "conf.d/sinks.toml:2"

        assert broker.isthmus("sinks", "pause", "store").returncode == 0
        device.publish("t/a", "kept", qos=1)
        entry = until(lambda: (e := shown(broker, "store"))["oldest_s"] > 0 and e, "it queues")
        assert (entry["state"], entry["queued"], entry["acked"]) == ("paused", 1, 41)
        assert broker.isthmus("sinks", "resume", "store").returncode == 0
        until(lambda: rows(broker, "store")[-1:] == ["kept"], "it goes on")
        until(lambda: shown(broker, "store")["acked"] == 42, "what was kept is counted too")

    status = broker.status()["sinks"]["store"]
    assert set(status) | {"name"} == set(shown(broker, "store"))
    listed = broker.isthmus("sinks", "list").stdout
    for text in ("per second", "conf.d/sinks.toml:2", "running"):
        assert text in listed
    assert broker.isthmus("sinks", "show", "nobody").returncode == 1
    assert broker.isthmus("sinks", "pause", "nobody").returncode == 1


def test_the_last_error_and_the_retries_are_told_while_a_destination_refuses(start: Callable[..., Broker]) -> None:
    broker = start(sinks=sink("store"))
    broker.wait_for("sinks", "store", "running")
    with Device(broker.port) as device:
        device.publish("t/a", "1", qos=1)
        until(lambda: rows(broker, "store"), "it works")
        with contextlib.closing(sqlite3.connect(broker.where / "store.db", isolation_level=None)) as other:
            other.execute("begin immediate")
            device.publish("t/a", "2", qos=1)
            entry = until(lambda: (e := shown(broker, "store"))["retried"] and e, "it is locked", 30)
            assert entry["state"] == "retrying"
            assert "locked" in entry["last_error"]
            assert entry["queued"] == 1
            other.execute("commit")
        until(lambda: rows(broker, "store") == ["1", "2"], "it goes on", 40)
        entry = until(lambda: (e := shown(broker, "store"))["state"] == "running" and e, "it says so")
        assert entry["last_error"] is None
        assert entry["retried"] >= 1
        assert entry["retries"] == {"unreachable": entry["retried"]}


def test_a_bridge_without_its_peer_tells_what_queues_and_what_was_dropped(start: Callable[..., Broker]) -> None:
    broker = start(
        bridge='[bridges.hq]\nkind = "mqtt"\nservers = ["mqtt://127.0.0.1:1"]\n'
        'queue = { max_bytes = "1KB", overflow = "drop_newest" }\n'
        '[[bridges.hq.topics]]\nfilter = "t/#"\nqos = 1\n'
    )
    with Device(broker.port) as device:
        device.publish("t/a", "kept", qos=1)
        device.publish("t/a", "x" * 2_000, qos=1)

    def told() -> dict[str, Any] | None:
        entry: dict[str, Any] = json.loads(broker.isthmus("bridges", "show", "hq", "--json").stdout)
        return entry if entry["last_error"] and entry["dropped"] else None

    entry = until(told, "its error is told")
    assert (entry["state"], entry["queued"], entry["dropped"]) == ("retrying", 1, {"queue_full": 1})
    assert 0 < entry["queued_bytes"] <= 1024
    assert entry["oldest_s"] >= 0
    assert entry["configured"] == "conf.d/bridge.toml:1"
    assert '{"queue_full": 1}' in broker.isthmus("bridges", "list").stdout


def test_instances_run_in_the_workers_they_name(start: Callable[..., Broker]) -> None:
    """A worker of its own is nobody else's trouble: killing it touches no other instance."""
    broker = start(
        pool=sink("a") + sink("b"), own=sink("c", more='worker = "edge"\n') + sink("d", more='worker = "edge"\n')
    )
    for name in "abcd":
        broker.wait_for("sinks", name, "running")
    status = broker.status()
    workers = {name: entry["worker"] for name, entry in status["sinks"].items()}
    assert {workers["a"], workers["b"]} == {"1", "2"}
    assert (workers["c"], workers["d"]) == ("edge", "edge")
    pids = status["workers"]
    assert len(set(pids.values())) == 3
    assert set(pids.values()) <= set(broker.pids())

    os.kill(pids["edge"], signal.SIGKILL)
    until(lambda: broker.status()["workers"]["edge"] not in (None, pids["edge"]), "the named worker is back")
    assert {name: broker.status()["workers"][name] for name in "12"} == {name: pids[name] for name in "12"}
    with Device(broker.port) as device:
        device.publish("t/a", "x", qos=1)
    for name in "abcd":
        until(lambda name=name: rows(broker, name) == ["x"], f"{name} has it")

    broker.write("own.toml", sink("c", more='worker = "edge"\n') + sink("d", more='worker = "other"\n'))
    assert "changed: sinks.d" in broker.reload().stdout
    broker.wait_for("sinks", "d", "running")
    moved = broker.status()
    assert (moved["sinks"]["d"]["worker"], moved["sinks"]["c"]["worker"]) == ("other", "edge")
    assert moved["workers"]["other"] not in (None, moved["workers"]["edge"])


def test_lanes_share_the_work_and_keep_the_order_of_each_key(start: Callable[..., Broker]) -> None:
    broker = start(sinks=sink("store", more='lanes = 4\norder_key = "${topic}"\n'))
    broker.wait_for("sinks", "store", "running")
    assert shown(broker, "store")["lanes"] == 4
    with Device(broker.port) as device:
        for number in range(50):
            for key in "abcdefgh":
                device.publish(f"t/{key}", f"{key}{number}", qos=1)
    stored = until(lambda: len(found := rows(broker, "store")) == 400 and found, "all are stored")
    for key in "abcdefgh":
        assert [row for row in stored if row[0] == key] == [f"{key}{number}" for number in range(50)]
