"""The main job as a user does it: start, drop fragments, log in from the directory, find every message at its ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import aiomqtt
import pytest

from tests import fragments, servers
from tests.broker import Broker
from tests.clients import Device, Refused
from tests.ledger import Ledger, read_stamp
from tests.system.resilience import until

pytestmark = pytest.mark.timeout(180)
StartMosquitto = Callable[..., servers.Mosquitto]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    running = Broker(tmp_path)
    running.write("00-broker.toml", fragments.base())
    yield running
    if running._process is not None:
        running.stop()


def rows(broker: Broker) -> list[tuple[str, str, str, bytes]]:
    """What the SQLite sink holds: client id, user name, topic, payload."""
    path = broker.data / "telemetry.db"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        try:
            return db.execute(
                "select clientid, username, topic, cast(payload as blob) from messages order by rowid"
            ).fetchall()
        except sqlite3.OperationalError:
            return []


def reload(broker: Broker, name: str, text: str) -> dict[str, str]:
    """Drop a fragment, reload, return the four lines."""
    broker.write(name, text)
    done = broker.reload()
    assert done.returncode == 0, done.stderr + broker.process.tail()
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert list(lines) == ["added", "removed", "changed", "unchanged"]
    return {key: value.strip() for key, value in lines.items()}


def workers(broker: Broker) -> set[int]:
    return set(broker.pids()) - {broker.pid}


def bridge_ports(peer: servers.Mosquitto) -> list[str]:
    """The local ports the bridge connected from, by mosquitto's log."""
    return re.findall(r"New client connected from 127\.0\.0\.1:(\d+) as region-1 ", peer.log())


def test_fragments_dropped_one_by_one_bring_the_main_job_up(
    broker: Broker, slapd: servers.Slapd, kafka: servers.Kafka, start_mosquitto: StartMosquitto
) -> None:
    peer = start_mosquitto(username="region-1", password="hq-pw")
    asyncio.run(kafka.create_topic("main-job"))
    broker.start()

    # nobody gets in before there is somebody to ask
    with pytest.raises(Refused):
        Device(broker.port, "alice", "alice-pw").connect()

    assert (
        reload(broker, "20-auth-ldap.toml", fragments.ldap(slapd.url, broker.where, slapd.admin_password))["added"]
        == "auth.ldap"
    )
    with contextlib.ExitStack() as stack:
        alice = stack.enter_context(Device(broker.port, "alice", "alice-pw", client_id="alice-1"))
        bob = stack.enter_context(Device(broker.port, "bob", "bob-pw", client_id="bob-1", version=4))
        carol = stack.enter_context(Device(broker.port, "carol", "carol-pw", client_id="carol-1"))
        dave = stack.enter_context(Device(broker.port, "dave", "dave-pw", client_id="dave-1"))
        bob.subscribe("telemetry/#")
        carol.subscribe("telemetry/#")  # an operator through a group in the group
        alice.subscribe("commands/alice/#")
        with pytest.raises(Refused, match="ot authorized"):
            dave.publish("telemetry/dave/x", b"no group, no right")
        with pytest.raises(Refused, match="ot authorized"):
            alice.subscribe("telemetry/#")

        added = reload(broker, "30-sink-kafka.toml", fragments.kafka(kafka.bootstrap, "main-job"))
        assert (added["added"], added["changed"], added["removed"]) == ("sinks.kafka", "", "")
        # acknowledged before the sink's worker may even be there: the queue is the broker's
        alice.publish("telemetry/alice/temperature", b"1")
        assert reload(broker, "31-sink-sqlite.toml", fragments.sqlite())["added"] == "sinks.sqlite"
        broker.wait_for("sinks", "sqlite", "running")
        broker.wait_for("sinks", "kafka", "running")
        before = workers(broker)
        assert (
            reload(broker, "40-bridge-hq.toml", fragments.bridge(peer.url, broker.where, "hq-pw"))["added"]
            == "bridges.hq"
        )
        broker.wait_for("bridges", "hq", "running")
        assert before <= workers(broker)
        ports = until(lambda: bridge_ports(peer), "the bridge at headquarters")

        headquarters = stack.enter_context(Device(peer.port, "region-1", "hq-pw", client_id="hq-desk", version=4))
        headquarters.subscribe("region-1/telemetry/#")
        alice.publish("telemetry/alice/temperature", b"2", qos=2)
        bob.publish("commands/alice/led", b"from bob")
        assert alice.receive().payload == b"from bob"
        headquarters.publish("region-1/commands/alice/led", b"from headquarters")
        assert alice.receive().payload == b"from headquarters"
        arrived = until(lambda: [headquarters.receive()], "the reading at headquarters")
        assert [(m.topic, m.payload) for m in arrived] == [("region-1/telemetry/alice/temperature", b"2")]
        until(lambda: len(rows(broker)) >= 1, "the row")
        assert rows(broker) == [("alice-1", "alice", "telemetry/alice/temperature", b"2")]

        # a broken fragment changes nothing and says where it is broken
        broker.write("50-broken.toml", '[sinks.kafka]\nserverz = ["127.0.0.1:1"]\n')
        refused = broker.reload()
        assert refused.returncode == 2
        assert re.search(
            r"50-broken\.toml:2: sinks\.kafka\.serverz: unknown key, did you mean servers\?",
            refused.stdout + refused.stderr,
        )
        assert broker.isthmus("check").returncode == 2
        alice.publish("telemetry/alice/temperature", b"3")
        until(lambda: len(rows(broker)) == 2, "the row after the refused reload")
        assert headquarters.receive().payload == b"3"
        (broker.conf / "50-broken.toml").unlink()
        assert reload(broker, "00-broker.toml", fragments.base())["added"] == ""

        # every reload left alone what it did not name
        assert bridge_ports(peer) == ports
        assert before <= workers(broker)
        assert [d.disconnects for d in (alice, bob, carol, dave)] == [[], [], [], []]
        assert [bob.receive().payload for _ in range(3)] == [b"1", b"2", b"3"]
        assert [carol.receive().payload for _ in range(3)] == [b"1", b"2", b"3"]
    records = asyncio.run(kafka.read("main-job", 3))
    assert [(r.key, r.value) for r in records] == [(b"alice-1", b"1"), (b"alice-1", b"2"), (b"alice-1", b"3")]
    status = broker.status()
    assert {name: s["state"] for name, s in status["sinks"].items()} == {"kafka": "running", "sqlite": "running"}
    assert status["sinks"]["kafka"]["acked"] == 3
    assert broker.stop() == 0, broker.process.tail()


async def test_every_acknowledged_message_reaches_kafka_sqlite_and_the_peer(
    broker: Broker, slapd: servers.Slapd, kafka: servers.Kafka, start_mosquitto: StartMosquitto
) -> None:
    """An independent asynchronous client publishes at QoS 1 and 2; each end has each message once and in order."""
    peer = start_mosquitto(username="region-1", password="hq-pw", extra="max_queued_messages 0")
    await kafka.create_topic("main-job-stream")
    broker.write("20-auth-ldap.toml", fragments.ldap(slapd.url, broker.where, slapd.admin_password))
    broker.write("30-sink-kafka.toml", fragments.kafka(kafka.bootstrap, "main-job-stream"))
    broker.write("31-sink-sqlite.toml", fragments.sqlite())
    broker.write("40-bridge-hq.toml", fragments.bridge(peer.url, broker.where, "hq-pw"))
    await asyncio.to_thread(broker.start)
    ledgers = {end: Ledger() for end in ("kafka", "sqlite", "peer")}
    count = 300

    async def publish(client: aiomqtt.Client, qos: int) -> None:
        stream = f"qos{qos}"
        for _ in range(count):
            numbers = [ledger.next(stream, 64) for ledger in ledgers.values()]
            await client.publish(f"telemetry/alice/{stream}", numbers[0][1], qos=qos)
            for ledger in ledgers.values():
                ledger.acknowledged(stream, numbers[0][0])

    login = {"username": "region-1", "password": "hq-pw"}
    async with aiomqtt.Client("127.0.0.1", peer.port, **login, identifier="hq-reader") as reader:
        await reader.subscribe("region-1/telemetry/#", qos=2)
        async with (
            aiomqtt.Client(
                "127.0.0.1", broker.port, username="alice", password="alice-pw", identifier="alice-q1"
            ) as one,
            aiomqtt.Client(
                "127.0.0.1", broker.port, username="alice", password="alice-pw", identifier="alice-q2"
            ) as two,
        ):
            await asyncio.gather(publish(one, 1), publish(two, 2))
        async with asyncio.timeout(30):
            async for message in reader.messages:
                assert isinstance(message.payload, bytes)
                ledgers["peer"].arrived(message.payload)
                if not ledgers["peer"].missing():
                    break
    for record in await kafka.read("main-job-stream", 2 * count, 30):
        ledgers["kafka"].arrived(record.value)
        assert read_stamp(record.value)[0] in ("qos1", "qos2")
    await asyncio.to_thread(until, lambda: len(rows(broker)) >= 2 * count, "the rows")
    for _, _, _, payload in rows(broker):
        ledgers["sqlite"].arrived(payload)
    for ledger in ledgers.values():
        assert ledger.check().arrived == 2 * count
    assert await asyncio.to_thread(broker.stop) == 0


def test_the_demo_shows_every_hop(
    capfd: pytest.CaptureFixture[str], slapd: servers.Slapd, kafka: servers.Kafka, mosquitto: servers.Mosquitto
) -> None:
    from tests.system import demo

    assert demo.main() == 0, capfd.readouterr().err
    shown = capfd.readouterr().out.splitlines()
    marks = [line.split()[0] for line in shown if line.startswith(" ")]
    assert len(marks) >= 15
    assert set(marks) == {"✓"}
    assert shown[-1].startswith("Every hop is there")


def test_status_is_one_json_object_with_the_promised_keys(broker: Broker) -> None:
    broker.start()
    status = broker.status()
    promised = {
        "name",
        "version",
        "uptime_s",
        "clients",
        "sessions",
        "messages",
        "listeners",
        "auth",
        "sinks",
        "bridges",
    }
    assert promised <= set(status)
    assert {"in", "out", "dropped"} <= set(status["messages"])
    assert json.loads(broker.isthmus("status", "--json").stdout)["name"] == "isthmus-1"
