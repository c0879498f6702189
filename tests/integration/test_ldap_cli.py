"""What `isthmus check --connect` and `isthmus auth test` say about a directory that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import Slapd


def isthmus(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ISTHMUS__")} | {
        "PYTHONPATH": str(root), "RES_OPTIONS": "timeout:1 attempts:1",  # of a name server that does not answer
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments, "--conf", "conf.d"],
        cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip


@pytest.fixture
def configure(root: Path, tmp_path: Path, slapd: Slapd) -> Callable[..., Path]:
    """The shipped example with the address and password of the directory; `configure((old, new))` changes it."""

    def write(*changes: tuple[str, str]) -> Path:
        text = (root / "conf.d" / "20-auth-ldap.toml.example").read_text()
        known = (("ldap://127.0.0.1:389", slapd.url), ("${file:secrets/ldap}", slapd.admin_password))
        for old, new in (*known, *changes):
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "conf.d").mkdir()
        (tmp_path / "conf.d" / "20-auth-ldap.toml").write_text(text)
        return tmp_path

    return write


def test_a_directory_that_can_be_used(configure: Callable[..., Path]) -> None:
    folder = configure()
    assert isthmus(folder, "check", "--connect").returncode == 0
    ask = ("auth", "test", "--user", "alice", "--client", "c1", "--publish")
    assert isthmus(folder, *ask, "telemetry/alice/t", stdin="alice-pw\n").returncode == 0
    assert isthmus(folder, *ask, "telemetry/bob/t", stdin="alice-pw\n").returncode == 1
    refused = isthmus(folder, *ask, "telemetry/alice/t", stdin="wrong\n")
    assert refused.returncode == 1
    assert "uid=alice,ou=people,dc=example,dc=com: wrong password (result 49)" in refused.stdout
    unknown = isthmus(folder, "auth", "test", "--user", "nobody", "--client", "c1", stdin="x\n")
    assert unknown.returncode == 1
    assert "(uid=nobody) finds nothing below ou=people,dc=example,dc=com" in unknown.stdout


@pytest.mark.parametrize(
    ("what", "say"),
    [
        ("down", "is the directory running, and is `servers` right?"),
        ("password", "the service account 'cn=admin,dc=example,dc=com' may not log in: wrong password"),
        ("base", "there is no entry 'ou=poeple,dc=example,dc=com'"),
        ("suffix", "there is no entry 'ou=people,dc=example,dc=org'"),
        ("tls", "StartTLS was refused"),
        ("ldaps", "does this port speak ldaps://"),
        ("name", "the host name is not known; correct `servers`"),
    ],
)
def test_a_directory_that_cannot_be_used(
    configure: Callable[..., Path], slapd: Slapd, free_port: Callable[[], int], what: str, say: str
) -> None:
    """Exit code 3; the instance, the server and what to do; no password."""
    down = f"ldap://127.0.0.1:{free_port()}"
    changes = {
        "down": (slapd.url, down),
        "password": ('"admin-pw"', '"not-this-one"'),
        "base": ("ou=people,", "ou=poeple,"),
        "suffix": ("ou=people,dc=example,dc=com", "ou=people,dc=example,dc=org"),
        "tls": ('tls = "none"', 'tls = "starttls"'),
        "ldaps": ('"ldap://', '"ldaps://'),
        "name": (slapd.url, "ldaps://directory.invalid"),
    }
    advice = {"password": "correct bind_dn or bind_password", "base": "correct base_dn", "suffix": "correct base_dn"}
    places = {"down": down, "ldaps": slapd.url.replace("ldap:", "ldaps:"), "name": "ldaps://directory.invalid:636"}
    folder = configure(changes[what])
    for arguments in (("check", "--connect"), ("auth", "test", "--user", "alice", "--client", "c1")):
        done = isthmus(folder, *arguments, stdin="alice-pw\n")
        assert done.returncode == 3, done.stdout + done.stderr
        line = next(line for line in done.stdout.splitlines() if say in line)
        assert line.startswith("auth.ldap")
        assert places.get(what, slapd.url) in line
        assert advice.get(what, "") in line
        assert "not-this-one" not in done.stdout + done.stderr
        assert "alice-pw" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
