"""C-05: a reload while no descriptor is free fails and the old rules stay in force."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.broker import Broker, broker
from tests.clients import Device, Refused
from tests.servers import PATIENCE

CONFIGURATION = """
[access]
allow_anonymous = true
[auth.rules]
kind = "file"
rules = "acl.conf"
[listeners.tcp]
bind = "127.0.0.1:0"
"""


def logged(running: Broker, text: str, seconds: float = 10) -> str:
    """The log once it holds the text."""
    end = time.monotonic() + seconds * PATIENCE
    while text not in (log := running.log()):
        assert time.monotonic() < end, f"{text!r} is not in the log:\n{log}"
        time.sleep(0.05)
    return log


def test_c05_a_reload_without_free_descriptors_fails_and_the_old_rules_stay(tmp_path: Path) -> None:
    acl = tmp_path / "acl.conf"
    acl.write_text('{allow, all, all, ["open/#"]}.\n')
    with (
        broker(tmp_path, {"00-broker.toml": CONFIGURATION}) as running,
        Device(running.port, client_id="c", version=5) as device,
    ):
        device.publish("open/x", b"1", qos=1)
        acl.write_text('{allow, all, all, ["#"]}.\n')
        soft, hard = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
        used = {int(fd) for fd in os.listdir(f"/proc/{running.pid}/fd")}
        lowest_free = next(fd for fd in range(len(used) + 1) if fd not in used)
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
        os.kill(running.pid, signal.SIGHUP)
        log = logged(running, "reload refused")
        assert "Too many open files" in log
        with pytest.raises(Refused, match="ot authorized"):
            device.publish("closed/x", b"2", qos=1)
        device.publish("open/x", b"3", qos=1)
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert running.reload().returncode == 0
        device.publish("closed/x", b"4", qos=1)
