"""The picture of compose/compose.yaml without containers: its own files on real servers, from a device to every end."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import servers, sql_servers
from tests.broker import Broker
from tests.clients import Device, Refused
from tests.servers import program
from tests.system.resilience import until
from tests.unit.test_compose import COMPOSE, whole

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[sql_servers.SqlServer]:
    with sql_servers.or_skip("postgresql", sql_servers.postgresql) as server:
        yield server


def fill(directory: servers.Slapd) -> int:
    """What the service `people` runs, with the address of this directory; its exit code."""
    ldapadd = program("ldapadd")
    if ldapadd is None:
        pytest.skip("the program ldapadd is not installed: apt-get install ldap-utils")
    line = whole()["people"]["command"][-1].replace("$$", "$").replace("ldapadd", ldapadd, 1)
    line = line.replace("ldap://slapd", directory.url).replace("/people.ldif", str(COMPOSE / "people.ldif"))
    return subprocess.run(["/bin/sh", "-c", line], capture_output=True, timeout=30).returncode


def test_a_device_reaches_every_end_of_the_picture(
    tmp_path: Path,
    start_slapd: Callable[..., servers.Slapd],
    kafka: servers.Kafka,
    postgresql: sql_servers.SqlServer,
    mosquitto: servers.Mosquitto,
) -> None:
    directory = start_slapd(empty=True)
    assert fill(directory) == 0
    assert fill(directory) == 0, "a second start finds everybody there"
    table = (COMPOSE / "readings.sql").read_text("utf-8")
    database = asyncio.run(postgresql.create(re.sub(r"^--.*$", "", table, flags=re.MULTILINE)))
    asyncio.run(kafka.create_topic("picture"))
    moved = {
        '"*:1883"': '"127.0.0.1:0"',
        "ldap://slapd:389": directory.url,
        "kafka:9095": kafka.bootstrap,
        'topic = "telemetry"': 'topic = "picture"',
        "postgresql://mqtt@postgresql:5432/plant": postgresql.dsn(database),
        "mosquitto:1883": f"127.0.0.1:{mosquitto.port}",
    }
    environment = {**whole()["broker"]["environment"], "POSTGRESQL_PASSWORD": postgresql.password}
    broker = Broker(tmp_path, environment=environment)
    for path in (COMPOSE / "conf.d").glob("*.toml"):
        text = path.read_text("utf-8")
        for old, new in moved.items():
            text = text.replace(old, new)
        broker.write(path.name, text)
    assert broker.isthmus("check", "--connect", "--strict").returncode == 0
    try:
        broker.start()
        for room, name in (("sinks", "kafka"), ("sinks", "readings"), ("bridges", "hq")):
            broker.wait_for(room, name, "running")
        with Device(mosquitto.port) as far, Device(broker.port, "alice", "alice-pw", client_id="d1") as alice:
            far.subscribe("region-1/telemetry/#", 1)
            alice.subscribe("commands/alice/#", 1)
            alice.publish("telemetry/alice/room", '{"value": 21.5, "unit": "C"}', qos=1)
            arrived = far.receive()
            assert (arrived.topic, arrived.payload) == (
                "region-1/telemetry/alice/room",
                b'{"value": 21.5, "unit": "C"}',
            )
            far.publish("region-1/commands/alice/led", "on", qos=1)
            assert alice.receive().topic == "commands/alice/led"
            with pytest.raises(Refused):
                alice.publish("telemetry/carol/room", "{}", qos=1)
        (record,) = asyncio.run(kafka.read("picture", 1))
        assert record.key == b"d1"
        statement = "select device, topic, value, unit from readings"
        rows = until(lambda: asyncio.run(postgresql.execute(statement, database=database)), "a row in readings", 20)
        assert [tuple(row) for row in rows] == [("d1", "telemetry/alice/room", 21.5, "C")]
        with pytest.raises(Refused):
            Device(broker.port, "alice", "wrong").connect()
    finally:
        if broker._process is not None:
            assert broker.stop() == 0
