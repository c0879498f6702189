"""What an import printed and wrote, and the verdict of the real `check` on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from broker.cli.main import program
from tests import servers

LOST = "not carried over: "


@dataclass
class Imported:
    """What an import printed and wrote."""

    code: int
    stdout: str
    stderr: str
    conf: Path
    source: Path
    values: dict[str, Any] = field(default_factory=dict)
    """All fragments merged, as plain values."""

    @property
    def lost(self) -> list[str]:
        """``LINE: KEY: REASON`` of each setting that was not carried over; ``FILE:LINE`` when in another file."""
        rows = [row.removeprefix(LOST) for row in self.stdout.splitlines() if row.startswith(LOST)]
        return [row.removeprefix(f"{self.source}:") for row in rows]

    @property
    def lost_at(self) -> list[list[str]]:
        """Line and key of each of them."""
        return [row.split(": ")[:2] for row in self.lost]

    @property
    def lost_keys(self) -> list[str]:
        """The key of each of them."""
        return [key for _, key in self.lost_at]

    def sound(self) -> Path:
        """The import succeeded and `check` accepts what it wrote. The folder of the source."""
        assert self.code == 0, self.stderr
        assert self.check() == (0, "")
        return self.source.parent

    def refused(self, text: str) -> None:
        """Nothing was written, and this is why: ``LINE: TEXT``."""
        assert (self.code, self.stdout, self.stderr) == (2, "", f"{self.source}:{text}\n")
        assert not self.conf.exists()

    def hides(self, word: str, *names: str) -> None:
        """This secret stands in these fragments alone, which only their owner may read, and is not printed."""
        assert {name for name, text in self.written.items() if word in text} == set(names)
        assert {self.mode(name) for name in names} == {0o600}
        assert word not in self.stdout + self.stderr

    @property
    def written(self) -> dict[str, str]:
        """Text by name of each fragment."""
        return {path.name: path.read_text() for path in sorted(self.conf.glob("*.toml"))}

    def at(self, path: str) -> Any:
        """A value by its dotted name; None when there is none."""
        here: Any = self.values
        for part in path.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def check(self) -> tuple[int, str]:
        """Exit code and errors of `isthmus check`; without the warnings."""
        result = CliRunner().invoke(program, ["check", "--conf", str(self.conf)])
        return result.exit_code, "".join(r for r in result.stderr.splitlines(True) if not r.startswith("warning: "))

    def mode(self, name: str) -> int:
        """Permissions of a fragment."""
        return (self.conf / name).stat().st_mode & 0o777


Import = Callable[..., Imported]


def invoke(kind: str, source: Path, folder: Path, *more: str) -> Result:
    """`isthmus import` of a file that is there."""
    return CliRunner().invoke(program, ["import", kind, str(source), "--out", str(folder), *more])


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def number_of(text: str, pattern: str) -> int:
    """The number of the first line of a text that this pattern finds."""
    return next(number for number, row in enumerate(text.splitlines(), 1) if re.search(pattern, row))


PASSWORDS = (
    "alice:$7$101$MDEyMzQ1Njc4OWFi$"
    "1Z31ImhXvrw0+t9IL2azZBNrJJ6fts9PYzq6TG2fU0uo3cCOXe6pRg7jQyXcssfiN3qm9ek1g4g6hDSsnIdFmQ==\n"
)
"""As mosquitto_passwd writes it, with the password alice-pw."""
RULES = """\
topic read announcements/#
user alice
topic readwrite telemetry/alice/#
topic deny telemetry/alice/secret
pattern read commands/%u/#
"""

LISTENER = "listener 1883 127.0.0.1\n"
BRIDGE = f"{LISTENER}connection b\naddress 127.0.0.1:1884\ntopic a/#\n"
"""The least a mosquitto.conf needs."""


EMQX_BROKER = {"name": "emqx-10.20.0.5", "data": "data", "durability": "flush"}
"""What `node.name = emqx@10.20.0.5` becomes, and what is always written."""
EMQX5 = 'listeners.tcp.default.bind = "127.0.0.1:1883"\nlisteners.ws.default.enable = false\n'
"""The least an emqx.conf of EMQX 5 needs."""


def tls_files(certs: servers.Certificates, folder: str) -> dict[str, str]:
    """Certificates for the files that are written beside a source."""
    named = {"ca.pem": certs.ca, "server.pem": certs.server, "server.key": certs.server_key}
    return {f"{folder}{name}": path.read_text() for name, path in named.items()}
