"""A listener's own word on anonymous clients wins over `[access]`; an empty list of backends refuses everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.broker import broker
from tests.clients import Device, Refused

CONFIGURATION = """
[access]
allow_anonymous = {general}
no_match = "allow"
[listeners.general]
kind = "tcp"
bind = "127.0.0.1:0"
[listeners.closed]
kind = "tcp"
bind = "127.0.0.1:0"
allow_anonymous = false
[listeners.open]
kind = "tcp"
bind = "127.0.0.1:0"
allow_anonymous = true
[listeners.nobody]
kind = "tcp"
bind = "127.0.0.1:0"
auth = []
"""


def test_each_listener_decides_about_anonymous_clients_itself(tmp_path: Path) -> None:
    for general, wanted in (("true", {"general", "open"}), ("false", {"open"})):
        where = tmp_path / general
        where.mkdir()
        with broker(where, {"00-broker.toml": CONFIGURATION.format(general=general)}) as running:
            for name in ("general", "closed", "open", "nobody"):
                port = int(running.ready[name].rpartition(":")[2])
                if name in wanted:
                    with Device(port, client_id=name, version=5):
                        pass
                else:
                    with pytest.raises(Refused, match="ot authorized"), Device(port, client_id=name, version=5):
                        pass
