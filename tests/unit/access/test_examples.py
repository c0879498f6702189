"""The shipped examples of sources that need no server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from broker.access.gate import AccessGate
from broker.config.settings import load_settings
from tests.unit.access.doubles import Login

ROOT = Path(__file__).resolve().parent.parent.parent.parent


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A folder with what the examples name."""
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "panel").write_text("p1")
    (tmp_path / "secrets" / "sensor-1").write_text("s1")
    return tmp_path


async def test_the_example_of_a_static_table(conf: Path) -> None:
    shutil.copy(ROOT / "conf.d" / "28-auth-static.toml.example", conf / "conf.d" / "28.toml")
    gate = AccessGate(load_settings(conf / "conf.d"))
    await gate.open()
    sensor = (await Login(gate)("any", b"s1", "sensor-1")).principal
    assert gate.may_publish(sensor, "telemetry/sensor-1/x") == 1
    assert gate.may_publish(sensor, "telemetry/sensor-2/x") == 0
    assert [gate.may_subscribe(sensor, "status/#", qos) for qos in (0, 1, 2)] == [1, 1, 0]
    assert gate.may_subscribe(sensor, "$SYS/broker/uptime", 0) == 1
    await gate.close()


async def test_the_example_of_an_address_table(conf: Path) -> None:
    shutil.copy(ROOT / "conf.d" / "28-auth-address.toml.example", conf / "conf.d" / "28.toml")
    gate = AccessGate(load_settings(conf / "conf.d"))
    await gate.open()
    assert (await Login(gate)("u", b"x")).code == 0x86, "its address is allowed, nobody knows the user"
    await gate.close()


async def test_the_example_of_certificates(conf: Path) -> None:
    shutil.copy(ROOT / "conf.d" / "29-auth-certificate.toml.example", conf / "conf.d" / "29.toml")
    gate = AccessGate(load_settings(conf / "conf.d"))
    await gate.open()
    shown = {"username": "cam7", "cert_common_name": "cam7", "cert_subject": "CN=cam7,OU=devices,O=Example"}
    camera = (await Login(gate)(None, None, "c", **shown)).principal
    assert gate.may_publish(camera, "telemetry/cam7/x") == 1
    assert gate.may_subscribe(camera, "commands/cam8/#", 0) == 0
    assert camera.groups == {"devices"}
    await gate.close()
