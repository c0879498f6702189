"""`isthmus worker --broker`: our sinks and bridges beside a real mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import io
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import sinks
from broker.client.connection import Handler, connect
from broker.client.session import Publisher
from broker.config.settings import Settings, load_settings
from broker.mqtt.packets import Publish
from broker.mqtt.properties import user_property
from broker.runtime import foreign
from broker.runtime.adapt import adapt
from broker.runtime.footprint import Footprint
from tests.servers import Certificates, Mosquitto

SQLITE = """
[sinks.store]
kind = "sqlite"
path = "telemetry.db"
filters = ["telemetry/#"]
"""


def settings(tmp_path: Path, text: str) -> Settings:
    folder = tmp_path / "conf.d"
    folder.mkdir(exist_ok=True)
    (folder / "30-test.toml").write_text(text)
    return load_settings(folder)


def rows(tmp_path: Path, what: str = "payload") -> list[Any]:
    if not (tmp_path / "telemetry.db").exists():
        return []
    with contextlib.closing(sqlite3.connect(tmp_path / "telemetry.db")) as db:
        try:
            return [row[0] for row in db.execute(f"select {what} from messages order by rowid")]
        except sqlite3.OperationalError:
            return []


async def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def working(config: Settings, url: str, only: Sequence[str] = ()) -> AsyncIterator[str]:
    """A worker in this process, from its line `ready` on."""
    instances = foreign.select(config, only)
    assignments = [adapt(i, config) for i in instances]
    names = [i.name for i in instances if i.room == "sinks"]
    attach = foreign.Foreign(url, sinks=names, footprint=Footprint(config.broker.data, url))
    stop, out = asyncio.Event(), io.StringIO()
    job = asyncio.create_task(foreign.work(config, attach, assignments, instances, stop, out))
    try:
        await until(lambda: bool(out.getvalue()) or job.done())
        yield out.getvalue()
    finally:
        stop.set()
        assert await asyncio.wait_for(job, 15) == 0


async def test_messages_of_every_qos_reach_the_sink_once(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with working(settings(tmp_path, SQLITE), mosquitto.url) as line:
        assert line == "ready sinks=store bridges=\n"
        publisher = await Publisher.connect(mosquitto.url, client_id="dev")
        await until(lambda: "isthmus/store/0" in mosquitto.log())
        for i in range(300):
            await publisher.publish("telemetry/a", str(i).encode(), qos=1 + i % 2)
        await until(lambda: len(rows(tmp_path)) >= 300)
        assert [int(p) for p in rows(tmp_path)] == list(range(300))
        await publisher.publish("telemetry/a", b"zero", qos=0)
        await until(lambda: rows(tmp_path)[-1] == "zero")
        await publisher.disconnect()


async def test_what_comes_after_ready_and_before_the_sink_is_open_is_queued(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    config = settings(tmp_path, SQLITE)
    instance = config.sinks["store"]
    await foreign.Foreign(mosquitto.url, sinks=["store"]).prepare("store", instance.config.session())  # type: ignore[attr-defined]
    publisher = await Publisher.connect(mosquitto.url, client_id="dev")
    await publisher.publish("telemetry/a", b"early", qos=1)
    await publisher.disconnect()
    async with working(config, mosquitto.url):
        await until(lambda: rows(tmp_path) == ["early"])


async def test_the_metadata_a_publisher_forges_is_not_believed(mosquitto: Mosquitto, tmp_path: Path) -> None:
    config = settings(tmp_path, SQLITE + 'columns = { topic = "${topic}", payload = "${.}" }\n')
    forged = user_property("$isthmus", '{"c":"root","u":"root","a":"","t":1,"i":"00","q":1,"r":0,"n":"n"}')
    async with working(config, mosquitto.url):
        publisher = await Publisher.connect(mosquitto.url, client_id="dev")
        await publisher.publish("telemetry/a", b"x", 1, False, forged)
        await until(lambda: len(rows(tmp_path)) == 1)
        assert "root" not in rows(tmp_path)[0]
        assert "$isthmus" not in rows(tmp_path)[0]
        await publisher.disconnect()


async def test_an_outage_of_the_broker_loses_nothing(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    # mosquitto 2.0 sends more than its window of 20, and after a restart publishes again whatever was beyond it, even
    # what it has released: none is beyond this one. What was on its way at two restarts it publishes again as well.
    broker = start_mosquitto(persistence=True, extra="max_inflight_messages 1000")
    async with working(settings(tmp_path, SQLITE), broker.url):
        for round_ in range(2):
            publisher = await Publisher.connect(broker.url, client_id="dev")
            for i in range(100):
                await publisher.publish("telemetry/a", str(round_ * 100 + i).encode(), qos=2)
            await publisher.disconnect()
            await asyncio.to_thread(broker.stop)
            await asyncio.to_thread(broker.start)
            await until(lambda: len(rows(tmp_path)) >= 100 * (round_ + 1))  # noqa: B023
        assert sorted(int(p) for p in rows(tmp_path)) == list(range(200))


async def test_lanes_share_the_subscription(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with working(settings(tmp_path, SQLITE + "lanes = 3\n"), mosquitto.url):
        publisher = await Publisher.connect(mosquitto.url, client_id="dev")
        for i in range(60):
            await publisher.publish("telemetry/a", str(i).encode(), qos=1)
        await until(lambda: len(rows(tmp_path)) >= 60)
        assert sorted(int(p) for p in rows(tmp_path)) == list(range(60))
        await publisher.disconnect()


REFUSING = """
from broker.extend.registry import Backend
from broker.extend.sink import BatchFailed, SinkConfig
class Sink:
    async def write(self, batch):
        raise BatchFailed({i: "cannot be stored" for i, _ in enumerate(batch)})
    async def check(self): pass
    async def close(self): pass
async def open_sink(config):
    return Sink()
BACKEND = Backend("sinks.refusing", SinkConfig, open_sink)
"""


class Collect(Handler):
    def __init__(self) -> None:
        self.got: list[Publish] = []

    def on_publish(self, conn: Any, publish: Publish) -> None:
        self.got.append(publish)
        conn.ack(4, publish.packet_id)


async def test_s07_dead_letters_wait_in_a_session_of_their_own(
    mosquitto: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # S-07
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "refusing.py").write_text(REFUSING)
    monkeypatch.setattr(sinks, "__path__", [*sinks.__path__, str(tmp_path / "kinds")])
    config = settings(tmp_path, '[sinks.refusing]\nfilters = ["telemetry/#"]\n')
    async with working(config, mosquitto.url):
        publisher = await Publisher.connect(mosquitto.url, client_id="dev")
        for i in range(5):
            await publisher.publish("telemetry/a", str(i).encode(), qos=1)
        await publisher.disconnect()
        await until(lambda: mosquitto.log().count("Sending PUBACK to isthmus/refusing/in") == 5)
        await until(lambda: mosquitto.log().count("Received PUBACK from isthmus/refusing/0") == 5
                    or mosquitto.log().count("Received PUBREC from isthmus/refusing/0") == 5)  # fmt: skip
    reader = Collect()
    conn = await connect(
        mosquitto.url, client_id="isthmus/refusing/dlq", handler=reader, clean_start=False, session_expiry=3600
    )
    await until(lambda: len(reader.got) == 5)
    await conn.disconnect()
    letter = reader.got[0]
    assert letter.topic == b"$dlq/refusing"
    assert letter.payload == b"0"
    pairs = dict((letter.properties and letter.properties.user_properties) or ())
    assert pairs["error"] == "cannot be stored"
    assert pairs["topic"] == "telemetry/a"


async def test_a_bridge_runs_beside_a_foreign_broker(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    near, far = start_mosquitto(), start_mosquitto()
    config = settings(
        tmp_path,
        f"""
        [bridges.hq]
        kind = "mqtt"
        servers = ["{far.url}"]
        [[bridges.hq.topics]]
        filter = "telemetry/#"
        direction = "out"
        qos = 1
        remote_prefix = "region/"
        """,
    )
    reader = Collect()
    conn = await connect(far.url, client_id="reader", handler=reader)
    await conn.subscribe([("region/#", 1)])
    async with working(config, near.url) as line:
        assert line == "ready sinks= bridges=hq\n"
        publisher = await Publisher.connect(near.url, client_id="dev")
        for i in range(20):
            await publisher.publish("telemetry/a", str(i).encode(), qos=1)
        await until(lambda: len(reader.got) == 20)
        assert {p.topic for p in reader.got} == {b"region/telemetry/a"}
        await publisher.disconnect()
    await conn.disconnect()


def test_a_broker_that_is_never_reached_is_exit_code_3(
    tmp_path: Path, free_port: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, SQLITE)
    assert foreign.serve(config, f"mqtt://127.0.0.1:{free_port()}", connect_within=0.5) == 3
    assert capsys.readouterr().out == ""


def test_templates_that_need_what_only_we_know_are_refused_with_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SQLITE + 'columns = { who = "${username}", topic = "${topic}" }\n'
    assert foreign.serve(settings(tmp_path, text), "mqtt://127.0.0.1:1") == 2
    error = capsys.readouterr().err
    assert "30-test.toml:" in error
    assert "sinks.store.columns.who" in error
    assert "${username}" in error


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_b06_a_bridge_in_both_directions_shows_each_message_once_on_each_side(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, protocol: str
) -> None:
    """Beside Isthmus the origin of a message keeps it from going back; here the mark does."""
    near, far = start_mosquitto(), start_mosquitto()
    config = settings(
        tmp_path,
        f"""
        [bridges.hq]
        kind = "mqtt"
        servers = ["{far.url}"]
        protocol = "{protocol}"
        topics = [{{ filter = "a/#", direction = "both", qos = 2, remote_prefix = "x/" }}]
        """,
    )
    here, there = Collect(), Collect()
    at_near = await connect(near.url, client_id="here", handler=here)
    at_far = await connect(far.url, client_id="there", handler=there)
    await at_near.subscribe([("a/#", 1)])
    await at_far.subscribe([("x/#", 1)])
    async with working(config, near.url):
        await until(lambda: "Sending SUBACK to isthmus-1.hq" in far.log())
        ours = await Publisher.connect(near.url, client_id="ours")
        theirs = await Publisher.connect(far.url, client_id="theirs")
        for qos in (1, 2):
            await ours.publish("a/o", str(qos).encode(), qos)
            await theirs.publish("x/a/t", str(qos).encode(), qos)
        await until(lambda: len(here.got) >= 4 and len(there.got) >= 4)
        await asyncio.sleep(0.5)  # long enough for several turns
        for reader, prefix in ((here, b""), (there, b"x/")):
            assert sorted((p.topic, p.payload) for p in reader.got) == [
                (prefix + b"a/o", b"1"), (prefix + b"a/o", b"2"), (prefix + b"a/t", b"1"), (prefix + b"a/t", b"2"),
            ]  # fmt: skip
        marked = [
            p for p in there.got if "x-bridge-origin" in dict((p.properties and p.properties.user_properties) or ())
        ]
        assert not marked, "the mark stays on this side"
        await ours.disconnect()
        await theirs.disconnect()
    await at_near.disconnect()
    await at_far.disconnect()


async def test_retained_messages_come_once_also_those_of_qos_0(mosquitto: Mosquitto, tmp_path: Path) -> None:
    publisher = await Publisher.connect(mosquitto.url, client_id="dev")
    await publisher.publish("telemetry/a", b"zero", 0, True)
    await publisher.publish("telemetry/b", b"one", 1, True)
    config = settings(tmp_path, SQLITE + "retained = true\n")
    async with working(config, mosquitto.url):
        await until(lambda: sorted(rows(tmp_path)) == ["one", "zero"])
    async with working(config, mosquitto.url):
        await publisher.publish("telemetry/c", b"live", 1)
        await until(lambda: "live" in rows(tmp_path))
    assert sorted(rows(tmp_path)) == ["live", "one", "zero"]
    await publisher.disconnect()


async def test_a_filter_that_was_taken_out_feeds_the_sink_no_more(mosquitto: Mosquitto, tmp_path: Path) -> None:
    both = SQLITE.replace('["telemetry/#"]', '["telemetry/#", "old/#"]')
    async with working(settings(tmp_path, both), mosquitto.url):
        pass
    publisher = await Publisher.connect(mosquitto.url, client_id="dev")
    await publisher.publish("old/a", b"queued before the change", 1)
    async with working(settings(tmp_path, SQLITE), mosquitto.url):
        await publisher.publish("old/a", b"after", 1)
        await publisher.publish("telemetry/a", b"new", 1)
        await until(lambda: "new" in rows(tmp_path))
        assert rows(tmp_path) == ["queued before the change", "new"]
    await publisher.disconnect()


async def test_a_lane_that_is_no_more_is_emptied_and_takes_nothing_more(mosquitto: Mosquitto, tmp_path: Path) -> None:
    config = settings(tmp_path, SQLITE + "lanes = 3\n")
    async with working(config, mosquitto.url):
        pass
    publisher = await Publisher.connect(mosquitto.url, client_id="dev")
    for i in range(30):
        await publisher.publish("telemetry/a", str(i).encode(), 1)  # the broker spreads them over three sessions
    config = settings(tmp_path, SQLITE)
    async with working(config, mosquitto.url):
        await until(lambda: len(rows(tmp_path)) >= 30)
        for i in range(30, 60):
            await publisher.publish("telemetry/a", str(i).encode(), 1)
        await until(lambda: len(rows(tmp_path)) >= 60)
        await asyncio.sleep(0.3)
        assert sorted(int(p) for p in rows(tmp_path)) == list(range(60))
    async with working(config, mosquitto.url):
        pass
    assert Footprint(config.broker.data, mosquitto.url).of("store") == {"0": ["telemetry/#"]}
    await publisher.disconnect()


async def test_an_instance_whose_table_is_gone_takes_nothing_more(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with working(settings(tmp_path, SQLITE + SQLITE.replace("store", "other")), mosquitto.url):
        pass
    config = settings(tmp_path, SQLITE)
    footprint = Footprint(config.broker.data, mosquitto.url)
    assert footprint.instances() == ["other", "store"]
    async with working(config, mosquitto.url):
        await until(lambda: footprint.instances() == ["store"])
    probe = await connect(mosquitto.url, client_id="isthmus/other/0", handler=Handler(), clean_start=False)
    assert not probe.session_present, "nothing queued in it, so it is gone"
    await probe.disconnect()


def start_worker(root: Path, tmp_path: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "broker", "--conf", str(tmp_path / "conf.d"), "worker", *arguments],
        cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], how: signal.Signals | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    if how is not None:
        process.send_signal(how)
    try:
        out, err = process.communicate(timeout=50)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def test_b10_the_command_shows_its_certificate_and_verifies_the_brokers(
    start_mosquitto: Callable[..., Mosquitto], certs: Certificates, tmp_path: Path, root: Path
) -> None:
    broker = start_mosquitto(tls=certs, tls_extra="require_certificate true\nuse_identity_as_username true")
    settings(tmp_path, SQLITE)
    url = ("--broker", f"mqtts://localhost:{broker.tls_port}")
    mine = ("--certificate", str(certs.client), "--key", str(certs.client_key))
    worker = start_worker(root, tmp_path, *url, *mine, "--ca", str(certs.ca))
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready sinks=store bridges=\n", ended(worker, signal.SIGTERM)
    assert ended(worker, signal.SIGTERM)[0] == 0
    assert "device-1" in broker.log(), "it came as who the certificate says"
    for arguments, ready in ((("--ca", str(certs.stranger_ca)), False), ((), False), (("--insecure",), True)):
        worker = start_worker(root, tmp_path, *url, *mine, *arguments)
        assert worker.stdout is not None
        assert worker.stderr is not None
        if ready:
            assert worker.stdout.readline().startswith("ready ")
        else:
            assert "certificate" in next(line for line in worker.stderr if "cannot attach" in line)
        code, out, _ = ended(worker, signal.SIGTERM)
        assert (code, out) == (0, ""), arguments


def test_a_password_crosses_no_network_in_the_clear_unless_somebody_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, SQLITE)
    assert foreign.serve(config, "mqtt://192.0.2.1", username="u", password="hunter2") == 2
    error = capsys.readouterr().err
    assert "--insecure" in error
    assert "hunter2" not in error
    assert foreign.serve(config, "ws://broker.example/mqtt", password="hunter2") == 2


def test_an_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert foreign.serve(settings(tmp_path, SQLITE), "mqtt://127.0.0.1:1", ["stroe"]) == 2
    assert "stroe" in capsys.readouterr().err


def test_the_command_serves_until_sigterm(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, root: Path
) -> None:
    broker = start_mosquitto(username="w", password="geheim")
    settings(tmp_path, SQLITE)
    process = subprocess.Popen(
        [sys.executable, "-m", "broker", "--conf", str(tmp_path / "conf.d"), "worker", "--broker", broker.url,
         "--username", "w", "--password-stdin"],
        cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write("geheim\n")
        process.stdin.close()
        assert process.stdout.readline() == "ready sinks=store bridges=\n", process.stderr.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert "geheim" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
