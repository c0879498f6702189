"""The program as a process: `run` from nothing, reload, signals, exit codes, and what `check` leaves behind."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
CONNECT = bytes.fromhex(
    "100e00044d5154540402003c000263"
)  # 3.1.1, clean session, keep alive 60, client id c + one digit
PING, PONG = b"\xc0\x00", b"\xd0\x00"
ANYBODY = '[access]\nallow_anonymous = true\n[listeners.tcp]\nbind = "127.0.0.1:0"\n[workers]\nprocesses = 0\n'


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ISTHMUS__")}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def isthmus(*arguments: str, cwd: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        cwd=cwd, env=environment(**env), input=stdin, capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip


class Running:
    """`isthmus run` until the test ends."""

    def __init__(self, cwd: Path, *arguments: str) -> None:
        self.cwd = cwd
        self.log = (cwd / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "broker", "run", *arguments],
            cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        self.ready = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 30)
        line = self.process.stdout.readline() if readable else ""
        assert line.startswith("ready "), f"no ready line: {self.errors()}"
        return line.rstrip("\n")

    def errors(self) -> str:
        return (self.cwd / "stderr.txt").read_text()

    def port(self, name: str = "tcp") -> int:
        match = re.search(rf"\b{name}=127\.0\.0\.1:(\d+)", self.ready)
        assert match, self.ready
        return int(match[1])

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
        assert self.process.stdout is not None
        self.rest = self.process.stdout.read()
        self.process.stdout.close()
        self.log.close()
        return self.process.wait(5)


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Running] = []

    def run(cwd: Path, *arguments: str) -> Running:
        running.append(Running(cwd, *arguments))
        return running[-1]

    yield run
    for one in running:
        if not one.log.closed:
            one.stop()


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    (folder / "00.toml").write_text(ANYBODY)
    return folder


Connect = Callable[..., socket.socket]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """A client whose CONNECT was accepted, closed with the test."""
    with ExitStack() as stack:

        def run(port: int, number: int = 1) -> socket.socket:
            client = stack.enter_context(closing(socket.create_connection(("127.0.0.1", port), 5)))
            client.settimeout(5)
            client.sendall(CONNECT + b"%d" % number)
            assert client.recv(4) == b"\x20\x02\x00\x00"
            return client

        yield run


def alive(client: socket.socket) -> bool:
    client.sendall(PING)
    return client.recv(2) == PONG


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(look: Callable[[], T], good: Callable[[T], bool]) -> T:
    deadline = time.monotonic() + 15
    while not good(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def test_run_in_an_empty_folder_makes_a_user_whose_printed_lines_work(
    tmp_path: Path, start: Start, connect: Connect
) -> None:
    port = free_port()
    broker = start(tmp_path, "--set", f"listeners.tcp.bind=127.0.0.1:{port}")
    assert broker.ready == f"ready tcp=127.0.0.1:{port} control={tmp_path}/data/control.sock"
    data = tmp_path / "data"
    assert (data / "demo-password").stat().st_mode & 0o777 == 0o600
    printed = _wait(
        lambda: re.findall(r"^  ((?:mosquitto_pub|python3 -c) .*)$", broker.errors(), re.M), lambda x: len(x) == 2
    )
    publish, look = printed
    if shutil.which("mosquitto_pub") is None:
        pytest.skip("mosquitto_pub is not installed")
    subprocess.run(publish, shell=True, check=True, timeout=20, cwd="/")

    def rows() -> list[str]:
        done = subprocess.run(look, shell=True, capture_output=True, text=True, timeout=20, cwd="/", check=False)
        lines = done.stdout.splitlines() if done.returncode == 0 else []
        return list(filter(None, lines))  # of an empty table it prints an empty line

    (row,) = _wait(rows, bool)
    assert "'demo', 'telemetry/demo/room', " in row
    assert broker.stop() == 0
    assert broker.rest == "", "standard output has one line only"
    with closing(sqlite3.connect(data / "telemetry.db")) as db:
        assert db.execute("select count(*) from messages").fetchone() == (1,)


def test_the_second_start_makes_nothing_new(tmp_path: Path, start: Start) -> None:
    shutil.copytree(ROOT / "conf.d", tmp_path / "conf.d")
    arguments = ("--set", "listeners.tcp.bind=127.0.0.1:0")
    assert start(tmp_path, *arguments).stop() == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*pass*")}
    second = start(tmp_path, *arguments)
    assert second.stop() == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*pass*")} == before
    assert "first start" not in second.errors()


# verdicts and exit codes


def test_c15_check_has_no_side_effects_and_says_what_run_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf.d", tmp_path / "conf.d")

    def everything() -> list[tuple[str, int]]:
        return sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))

    before = everything()
    assert isthmus("check", cwd=tmp_path).returncode == 0
    assert isthmus("check", "--connect", cwd=tmp_path).returncode == 0
    (tmp_path / "conf.d" / "50.toml").write_text("[limits]\nmax_inflihgt = 1\n")
    check, run = isthmus("check", cwd=tmp_path), isthmus("run", cwd=tmp_path)
    assert (check.returncode, run.returncode) == (2, 2)  # C-03
    assert (
        check.stderr == run.stderr == "conf.d/50.toml:2: limits.max_inflihgt: unknown key, did you mean max_inflight?\n"
    )
    assert run.stdout == ""
    (tmp_path / "conf.d" / "50.toml").unlink()
    assert [entry for entry in everything() if not entry[0].endswith("/conf.d")] == [
        entry for entry in before if not entry[0].endswith("/conf.d")
    ]


def test_a03_a_missing_driver_is_one_sentence_that_names_the_extra(tmp_path: Path, conf: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['ldap3'] = None\n")
    (conf / "20.toml").write_text('[auth.ldap]\nservers = ["ldaps://127.0.0.1"]\n')
    result = isthmus("run", cwd=tmp_path, PYTHONPATH=f"{tmp_path}/site:{ROOT}")
    assert result.returncode == 2
    assert result.stderr.startswith("conf.d/20.toml:1: auth.ldap.kind: auth.ldap needs the package 'ldap3")
    assert "pip install 'isthmus[ldap]'" in result.stderr


def test_a_taken_port_is_2_with_file_line_and_key(tmp_path: Path, conf: Path) -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (conf / "00.toml").write_text(ANYBODY.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        result = isthmus("run", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(rf"^conf\.d/00\.toml:4: listeners\.tcp\.bind: .*{port}", result.stderr, re.M), result.stderr


def test_a_data_folder_in_use_is_1(tmp_path: Path, conf: Path, start: Start, connect: Connect) -> None:
    broker = start(tmp_path)
    result = isthmus("run", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert str(tmp_path / "data") in result.stderr or "data folder" in result.stderr
    assert alive(connect(broker.port()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(
    tmp_path: Path, conf: Path, start: Start, connect: Connect, number: signal.Signals
) -> None:
    broker = start(tmp_path)
    client = connect(broker.port())
    broker.process.send_signal(number)
    assert client.recv(1) == b""
    assert broker.process.wait(12) == 0
    assert isthmus("status", cwd=tmp_path).returncode == 4


# a running broker


def test_c02_a_broken_fragment_changes_nothing_and_is_named(
    tmp_path: Path, conf: Path, start: Start, connect: Connect
) -> None:
    broker = start(tmp_path)
    client = connect(broker.port())
    for number in range(9):
        (conf / f"1{number}.toml").write_text(f"[limits]\nmax_inflight = {number + 1}\n" if number == 8 else "")
    (conf / "20.toml").write_text("[listeners.tcp]\nmax_conections = 5\n")
    result = isthmus("reload", cwd=tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr == "conf.d/20.toml:2: listeners.tcp.max_conections: unknown key, did you mean max_connections?\n"
    )
    assert alive(client)
    (conf / "20.toml").unlink()
    good = isthmus("reload", cwd=tmp_path)
    assert good.returncode == 0
    assert good.stdout.splitlines()[2] == "changed: limits"
    assert alive(client)


def test_c21_a_listener_comes_and_goes_with_its_fragment(
    tmp_path: Path, conf: Path, start: Start, connect: Connect
) -> None:
    broker = start(tmp_path)
    client = connect(broker.port())
    port = free_port()
    (conf / "05.toml").write_text(f'[listeners.second]\nkind = "tcp"\nbind = "127.0.0.1:{port}"\n')
    added = isthmus("reload", cwd=tmp_path)
    assert added.stdout.splitlines()[0] == "added: listeners.second"
    assert alive(connect(port, 2))
    (conf / "05.toml").unlink()
    assert isthmus("config", "diff", cwd=tmp_path).stdout == "removed: listeners.second\n"
    removed = isthmus("reload", cwd=tmp_path)
    assert removed.stdout.splitlines()[1] == "removed: listeners.second"
    with pytest.raises(ConnectionRefusedError):
        connect(port, 3)
    assert alive(client)


def test_a_hangup_signal_reloads(tmp_path: Path, conf: Path, start: Start) -> None:
    broker = start(tmp_path)
    (conf / "05.toml").write_text("[limits]\nmax_inflight = 7\n")
    assert isthmus("config", "diff", cwd=tmp_path).returncode == 1
    broker.process.send_signal(signal.SIGHUP)
    _wait(lambda: isthmus("config", "diff", cwd=tmp_path).returncode, lambda code: code == 0)


def test_clients_are_listed_shown_and_kicked(tmp_path: Path, conf: Path, start: Start, connect: Connect) -> None:
    broker = start(tmp_path)
    client = connect(broker.port())
    (row,) = json.loads(isthmus("clients", "list", "--json", cwd=tmp_path).stdout)
    assert (row["clientid"], row["connected"], row["listener"]) == ("c1", True, "tcp")
    assert "c1" in isthmus("clients", "list", cwd=tmp_path).stdout
    assert isthmus("clients", "show", "c1", cwd=tmp_path).returncode == 0
    assert isthmus("clients", "kick", "c1", cwd=tmp_path).returncode == 0
    assert client.recv(1) == b""
    assert isthmus("clients", "show", "nobody", cwd=tmp_path).returncode == 1
    status = json.loads(isthmus("status", "--json", cwd=tmp_path).stdout)
    assert {
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
    } <= set(status)


def test_auth_test_needs_no_running_broker(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    hashed = isthmus("hash", cwd=tmp_path, stdin="secret\n").stdout.strip()
    (tmp_path / "users").write_text(f"bob:{hashed}\n")
    (tmp_path / "rules").write_text("user bob\ntopic readwrite t/bob/#\n")
    (tmp_path / "conf.d" / "10.toml").write_text(
        '[auth.accounts]\nkind = "file"\npasswords = "users"\nrules = "rules"\n'
    )

    def test(password: str, *more: str) -> tuple[int, str]:
        result = isthmus("auth", "test", "--user", "bob", "--client", "c", *more, cwd=tmp_path, stdin=password + "\n")
        assert password not in result.stdout
        return result.returncode, result.stdout.splitlines()[-1]

    assert test("secret") == (0, "allow")
    assert test("wrong") == (1, "deny")
    assert test("secret", "--publish", "t/bob/x") == (0, "allow")
    assert test("secret", "--subscribe", "t/alice/x") == (1, "deny")
