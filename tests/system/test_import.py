"""A broker that runs on what was imported from mosquitto lets in whom mosquitto let in, and denies what it denied."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.broker import Broker
from tests.clients import Device, Refused
from tests.servers import Mosquitto, Process, accepts, free_port, program

RULES = """\
user alice
topic readwrite telemetry/alice/#
topic read commands/alice/#
"""


@pytest.fixture
def passwords(tmp_path: Path) -> Path:
    """mosquitto's own file, made by its own tool."""
    tool = program("mosquitto_passwd")
    if tool is None:
        pytest.skip("the program mosquitto_passwd is not installed")
    path = tmp_path / "etc" / "passwd"
    path.parent.mkdir()
    subprocess.run([tool, "-b", "-c", path, "alice", "alice-pw"], check=True, capture_output=True)
    return path


def test_the_broker_runs_on_an_imported_mosquitto_conf(
    tmp_path: Path, passwords: Path, start_mosquitto: Callable[..., Mosquitto]
) -> None:
    remote = start_mosquitto(username="plant", password="hq-s3cret")
    first, second = free_port(), free_port()
    source = passwords.with_name("mosquitto.conf")
    source.write_text(
        f"listener {first} 127.0.0.1\nlistener {second} 127.0.0.1\nprotocol websockets\n"
        "allow_anonymous false\npassword_file passwd\nacl_file rules\n"
        f"connection hq\naddress 127.0.0.1:{remote.port}\nremote_username plant\nremote_password hq-s3cret\n"
        'topic telemetry/# out 1 "" plant/\ntopic commands/# in 1\n'
    )
    source.with_name("rules").write_text(RULES)
    running = Broker(tmp_path)
    running.conf.rmdir()
    done = running.isthmus("import", "mosquitto", str(source), "--out", str(running.conf))
    assert (done.returncode, done.stderr) == (0, "")
    assert "s3cret" not in done.stdout
    assert running.isthmus("check").returncode == 0
    running.start()
    try:
        assert running.ready["tcp"] == f"127.0.0.1:{first}"
        assert running.ready["ws"] == f"127.0.0.1:{second}"
        running.wait_for("bridges", "hq", "running")
        with (
            Device(remote.port, "plant", "hq-s3cret") as far,
            Device(first, "alice", "alice-pw") as alice,
        ):
            far.subscribe("plant/#")
            alice.subscribe("commands/alice/#")
            alice.publish("telemetry/alice/room", "21.5")
            arrived = far.receive()
            assert (arrived.topic, arrived.payload) == ("plant/telemetry/alice/room", b"21.5")
            far.publish("commands/alice/blink", "1")
            assert alice.receive().topic == "commands/alice/blink"
            for topic in ("telemetry/bob/room", "commands/alice/x"):
                with pytest.raises(Refused, match="ot authorized"):
                    alice.publish(topic, "1")
            with pytest.raises(Refused, match="ot authorized"):
                alice.subscribe("#")
        for name, password in (("alice", "wrong"), ("bob", "alice-pw"), (None, None)):
            with pytest.raises(Refused), Device(first, name, password):
                pass
    finally:
        running.stop()


def decisions(port: int) -> dict[str, bool]:
    """What a broker lets these clients do."""
    found: dict[str, bool] = {}

    def ask(what: str, question: Callable[[], object]) -> None:
        try:
            question()
            found[what] = True
        except Refused:
            found[what] = False

    for name, password in (("alice", "alice-pw"), ("alice", "wrong"), ("bob", "alice-pw"), (None, None)):
        device = Device(port, name, password)
        ask(f"login {name} {password}", device.connect)
        device.close()
    with Device(port, "alice", "alice-pw") as alice:
        for topic in ("telemetry/alice/room", "telemetry/alice/secret", "telemetry/bob/room", "commands/alice/x"):
            ask(f"publish {topic}", partial(alice.publish, topic, "1"))
    return found


def test_the_imported_broker_decides_as_mosquitto_did(tmp_path: Path, passwords: Path) -> None:
    binary = program("mosquitto")
    if binary is None:
        pytest.skip("the program mosquitto is not installed")
    port = free_port()
    source = passwords.with_name("mosquitto.conf")
    root = "user root\n" if os.geteuid() == 0 else ""  # else it gives up the rights to read its own files
    source.write_text(f"{root}listener {port} 127.0.0.1\npassword_file passwd\nacl_file rules\n")
    rules = f"{RULES}topic deny telemetry/alice/secret\npattern read commands/%u/#\n"
    source.with_name("rules").write_text(rules)
    mosquitto = Process([binary, "-c", source], tmp_path / "mosquitto.log", cwd=source.parent)
    try:
        mosquitto.wait_until(lambda: accepts(port), 10, "mosquitto")
        wanted = decisions(port)
    finally:
        mosquitto.stop()
    assert wanted["login alice alice-pw"]
    assert list(wanted.values()).count(True) == 2, wanted
    running = Broker(tmp_path)
    running.conf.rmdir()
    done = running.isthmus("import", "mosquitto", str(source), "--out", str(running.conf))
    assert done.returncode == 0, done.stderr
    running.start()
    try:
        assert decisions(port) == wanted
    finally:
        running.stop()
