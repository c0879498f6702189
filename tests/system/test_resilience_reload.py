"""Reloading changes what differs and nothing else, however often it happens and whatever flows meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.broker import Broker, broker
from tests.clients import Device, Refused
from tests.ledger import Ledger
from tests.system import resilience
from tests.system.resilience import OPEN, SOAK, STORE, Listening, Stream, ask, command, eventually, fill, until

RELOADS = 1_000 if SOAK else 100

BRIDGE = """
[bridges.hq]
kind = "mqtt"
servers = ["{url}"]
clientid = "region-1"
[[bridges.hq.topics]]
filter = "telemetry/#"
direction = "out"
qos = 1
"""


def bridge_ports(peer: servers.Mosquitto) -> list[str]:
    """The local ports the bridge connected from, by mosquitto's log."""
    return re.findall(r"New client connected from 127\.0\.0\.1:(\d+) as region-1 ", peer.log())


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_c19_reloads_under_load_drop_no_client_lose_no_message_and_touch_no_worker(
    tmp_path: Path, mosquitto: servers.Mosquitto, record_property: Callable[[str, Any], None]
) -> None:
    fragments = {
        "00-broker.toml": OPEN,
        "30-sink.toml": STORE,
        "40-bridge.toml": BRIDGE.format(url=mosquitto.url),
    }
    with broker(tmp_path, fragments) as running:
        for room, name in (("sinks", "store"), ("bridges", "hq")):
            await asyncio.to_thread(resilience.wait_running, running, room, name)
        to = resilience.url(running)
        seen, seen0, stored, remote = Ledger(), Ledger(), Ledger(), Ledger()
        peer = await Listening.open(remote, mosquitto.url, "telemetry/one", "peer", version=4)
        one = await Stream([seen, stored, remote], "one", "telemetry/one", 500).open(to)
        zero = await Stream([seen0], "zero", "live/zero", 500, qos=0).open(to)
        listening = await Listening.open(seen, to, "telemetry/one", "listening")
        listening0 = await Listening.open(seen0, to, "live/#", "listening0", qos=0)
        clients = [one, zero, listening, listening0, peer]
        ports = [client.conn.local_address for client in clients]
        remote_ports = bridge_ports(mosquitto)
        assert len(remote_ports) == 1
        workers = (await command(running, "status"))["workers"]
        loads = [asyncio.create_task(stream.run(600)) for stream in (one, zero)]
        await asyncio.sleep(0.5)

        async def reload_once(number: int) -> dict[str, list[str]]:
            running.write("05-limits.toml", f"[limits]\nmax_queued_messages = {100_000 + number}\n")
            extra = running.conf / "06-extra.toml"
            if number % 3 == 1:
                extra.write_text('[listeners.extra]\nkind = "tcp"\nbind = "127.0.0.1:0"\n')
            else:
                extra.unlink(missing_ok=True)
            if number % 5 == 4:
                extra.with_name("07-rules.toml").write_text("[access]\nno_match = 'allow'\ncache_ttl = '61s'\n")
            else:
                extra.with_name("07-rules.toml").unlink(missing_ok=True)
            change: dict[str, list[str]] = await command(running, "reload")
            return change

        changed: set[str] = set()
        began = asyncio.get_running_loop().time()
        memory, files = 0, 0
        for number in range(1, RELOADS + 1):
            change = await reload_once(number)
            assert "limits" in change["changed"] + change["added"]
            changed |= {*change["added"], *change["changed"], *change["removed"]}
            await asyncio.sleep(0.03)
            if number == RELOADS // 5 // 15 * 15:
                memory, files = resilience.rss(running.pid), resilience.descriptors(running.pid)
        took = asyncio.get_running_loop().time() - began
        assert changed == {"limits", "access", "listeners.extra"}
        await asyncio.sleep(0.5)
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        for stream in (one, zero):
            await stream.settle()
        print(f"{RELOADS} reloads in {took:.1f} s; {one.sent} messages at QoS 1, {zero.sent} at QoS 0")
        record_property("reloads", RELOADS)

        # nobody noticed
        assert [client.lost for client in clients] == [[], [], [], [], []]
        assert [client.conn.local_address for client in clients] == ports
        assert (await command(running, "status"))["workers"] == workers
        await eventually(lambda: not seen.missing() and not seen0.missing(), "every message at the subscribers")
        await eventually(lambda: not remote.missing(), "every message at the peer")
        await eventually(lambda: resilience.row_count(running) >= one.acknowledged, "every row")
        fill(stored, resilience.rows(running))
        for ledger in (seen, seen0, stored, remote):
            ledger.check()
        assert bridge_ports(mosquitto) == remote_ports
        growth = resilience.rss(running.pid) - memory
        print(f"memory {growth / 1e6:+.1f} MB, descriptors {resilience.descriptors(running.pid) - files:+d}")
        assert growth <= 24 << 20
        assert resilience.descriptors(running.pid) <= files + 2 + 8  # one listener more, which has eight sockets
        for client in clients:
            client.conn.abort()


def test_a_changed_fragment_touches_only_its_own_instance(tmp_path: Path, mosquitto: servers.Mosquitto) -> None:
    fragments = {
        "00-broker.toml": OPEN,
        "30-sink.toml": STORE,
        "31-other.toml": STORE.replace("store", "other").replace("telemetry.db", "other.db"),
        "40-bridge.toml": BRIDGE.format(url=mosquitto.url),
    }
    with broker(tmp_path, fragments) as running, Device(running.port, client_id="device") as device:
        for room, name in (("sinks", "store"), ("sinks", "other"), ("bridges", "hq")):
            resilience.wait_running(running, room, name)
        device.publish("telemetry/x", b"1")
        until(lambda: ask(running, "status")["sinks"]["store"]["acked"] == 1, "the first row")
        before, ports = ask(running, "status"), bridge_ports(mosquitto)
        running.write("31-other.toml", fragments["31-other.toml"] + "batch = { max_records = 7 }\n")
        done = running.reload()
        assert done.returncode == 0
        lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
        assert lines["changed"].strip() == "sinks.other"
        assert (lines["added"].strip(), lines["removed"].strip()) == ("", "")
        resilience.wait_running(running, "sinks", "other")
        device.publish("telemetry/x", b"2")
        until(lambda: ask(running, "status")["sinks"]["store"]["acked"] == 2, "the second row")
        assert resilience.row_count(running) == 2
        after = ask(running, "status")
        assert after["workers"] == before["workers"]
        assert bridge_ports(mosquitto) == ports
        assert device.disconnects == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("30-sink.toml", STORE + 'tabel = "x"\n', r"30-sink\.toml:6: sinks\.store\.tabel: .*did you mean table"),
        ("50-broken.toml", "[limits]\nmax_inflight = [\n", r"50-broken\.toml:[23]: "),
        ("50-broken.toml", "\n[limits]\nmax_inflight = -1\n", r"50-broken\.toml:3: limits\.max_inflight: "),
        ("50-broken.toml", '[sinks.x]\nkind = "kafak"\n', r"50-broken\.toml:2: sinks\.x\.kind: .*kafka"),
        (
            "50-broken.toml",
            '[listeners.second]\nkind = "tcp"\nbind = "192.0.2.1:1"\nallow_cleartext = true\n',
            r"50-broken\.toml:3: listeners\.second\.bind: ",
        ),
        (
            "50-broken.toml",
            '[auth.people]\nkind = "file"\npasswords = "nowhere"\n',
            r"50-broken\.toml:\d: auth\.people\b.*nowhere",
        ),
        ("50-broken.toml", '[broker]\nname = "other"\n', r"50-broken\.toml:2: broker\.name: needs a restart"),
    ],
    ids=["unknown-key", "syntax", "range", "kind", "address", "missing-file", "restart"],
)
def test_a_broken_fragment_changes_nothing_and_says_where(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with (
        broker(tmp_path, {"00-broker.toml": OPEN, "30-sink.toml": STORE}) as running,
        Device(running.port, client_id="device") as device,
    ):
        resilience.wait_running(running, "sinks", "store")
        before = ask(running, "status")
        # a good change beside the broken one must not slip in
        running.write("06-extra.toml", '[listeners.extra]\nkind = "tcp"\nbind = "127.0.0.1:0"\n')
        running.write(name, text)
        done = running.reload()
        assert done.returncode == 2
        assert re.search(problem, done.stdout + done.stderr), done.stderr
        device.publish("telemetry/x", b"1")
        until(lambda: resilience.row_count(running) == 1, "the row")
        after = ask(running, "status")
        assert after["workers"] == before["workers"]
        assert list(after["listeners"]) == ["tcp"]
        assert device.disconnects == []
        # and when it is repaired, the good change comes
        (running.conf / "50-broken.toml").unlink(missing_ok=True)
        running.write("30-sink.toml", STORE)
        assert running.reload().stdout.splitlines()[0] == "added: listeners.extra"


def test_c19_ten_signals_in_a_tenth_of_a_second_are_few_reloads_and_the_last_state_counts(tmp_path: Path) -> None:
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running, Device(running.port, client_id="device") as device:
        for number in range(10):
            running.write("05-limits.toml", f"[limits]\nmax_queued_messages = {100 + number}\n")
            os.kill(running.pid, signal.SIGHUP)
        until(lambda: running.isthmus("config", "diff").returncode == 0, "the last state in force", 10, 0.1)
        reloads = running.log().count("configuration reloaded")
        assert 1 <= reloads < 10
        device.publish("x", b"y")
        assert device.disconnects == []


def test_a_signal_while_a_reload_runs_is_not_forgotten(tmp_path: Path) -> None:
    """The files may have changed after the running reload had read them."""
    with broker(tmp_path, {"00-broker.toml": OPEN}) as running:
        for number in range(12):
            running.write("05-limits.toml", f"[limits]\nmax_queued_messages = {100_000 + number}\n")
            os.kill(running.pid, signal.SIGHUP)
            running.write("05-limits.toml", f"[limits]\nmax_queued_messages = {2_000 + number}\n")
            os.kill(running.pid, signal.SIGHUP)
            until(lambda: running.isthmus("config", "diff").returncode == 0, "the second state", 5, 0.1)


def accounts(running: Broker, *people: str) -> None:
    """A file of users with a password that is their name."""
    lines = []
    for name in people:
        done = running.isthmus("hash", stdin=f"{name}\n")
        lines.append(f"{name}:{done.stdout.strip()}\n")
    (running.where / "users").write_text("".join(lines))


PEOPLE = '[auth.people]\nkind = "file"\npasswords = "users"\n'
CLOSED = OPEN.replace("allow_anonymous = true", "allow_anonymous = false")


def test_c21_deleting_a_fragment_removes_listener_users_bridge_and_sink(
    tmp_path: Path, mosquitto: servers.Mosquitto
) -> None:
    running = Broker(tmp_path)
    accounts(running, "alice")
    with broker(
        tmp_path,
        {
            "00-broker.toml": CLOSED,
            "01-extra.toml": '[listeners.extra]\nkind = "tcp"\nbind = "127.0.0.1:0"\n',
            "10-people.toml": PEOPLE,
            "30-sink.toml": STORE,
            "40-bridge.toml": BRIDGE.format(url=mosquitto.url),
        },
    ) as running:
        resilience.wait_running(running, "sinks", "store")
        resilience.wait_running(running, "bridges", "hq")
        extra = int(running.ready["extra"].rpartition(":")[2])
        with Device(extra, "alice", "alice", client_id="device") as device:
            device.publish("telemetry/x", b"1")
            until(lambda: resilience.row_count(running) == 1, "the row")
            # the sink is held, so that something is left in its queue
            assert running.isthmus("sinks", "pause", "store").returncode == 0
            device.publish("telemetry/x", b"2")

            def gone(name: str) -> str:
                (running.conf / name).unlink()
                done = running.reload()
                assert done.returncode == 0, done.stderr
                return next(line for line in done.stdout.splitlines() if line.startswith("removed:"))

            assert gone("01-extra.toml") == "removed: listeners.extra"
            assert not servers.accepts(extra)
            device.publish("telemetry/x", b"3")  # who was let in stays

            assert gone("40-bridge.toml") == "removed: bridges.hq"
            until(lambda: "DISCONNECT from region-1" in mosquitto.log(), "the bridge's end")
            assert ask(running, "status")["bridges"] == {}

            assert gone("30-sink.toml") == "removed: sinks.store"
            status = ask(running, "status")
            assert status["sinks"] == {}
            assert [(q["name"], q["queued"]) for q in status["orphans"]] == [("store", 2)]
            device.publish("telemetry/x", b"4")  # nobody subscribes any more
            queues = json.loads(running.isthmus("queues", "list", "--json").stdout)
            assert [(q["name"], q["queued"], q["orphan"]) for q in queues] == [("store", 2, True)]

            # the orphan is the sink's again when its fragment comes back
            running.write("30-sink.toml", STORE)
            assert running.reload().returncode == 0
            until(lambda: resilience.row_count(running) == 3, "the rows that waited")
            assert sorted(resilience.rows(running)) == [b"1", b"2", b"3"]
            assert ask(running, "status")["orphans"] == []

            assert gone("30-sink.toml") == "removed: sinks.store"
            assert ask(running, "status")["orphans"] == []
            assert device.disconnects == []
        assert gone("10-people.toml") == "removed: auth.people"
        with pytest.raises(Refused):
            Device(running.port, "alice", "alice").connect()


def test_c21_a_user_deleted_from_the_file_cannot_log_in_after_a_reload(tmp_path: Path) -> None:
    accounts(Broker(tmp_path), "alice", "bob")
    with (
        broker(tmp_path, {"00-broker.toml": CLOSED, "10-people.toml": PEOPLE}) as running,
        Device(running.port, "alice", "alice"),
        Device(running.port, "bob", "bob") as bob,
    ):
        accounts(running, "bob")
        assert running.reload().returncode == 0
        with pytest.raises(Refused):
            Device(running.port, "alice", "alice").connect()
        bob.publish("x", b"y")
        assert bob.disconnects == []


def test_an_orphan_is_deleted_only_on_request(tmp_path: Path) -> None:
    with (
        broker(tmp_path, {"00-broker.toml": OPEN, "30-sink.toml": STORE}) as running,
        Device(running.port, client_id="device") as device,
    ):
        resilience.wait_running(running, "sinks", "store")
        assert running.isthmus("sinks", "pause", "store").returncode == 0
        device.publish("telemetry/x", b"1")
        (running.conf / "30-sink.toml").unlink()
        done = running.reload()
        assert "orphan" in done.stderr
        assert "queues drop store" in done.stderr
        dropped = running.isthmus("queues", "drop", "store")
        assert (dropped.returncode, dropped.stdout) == (0, "1 messages deleted\n")
        assert ask(running, "status")["orphans"] == []
        assert running.isthmus("queues", "drop", "store").returncode != 0
