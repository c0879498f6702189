"""The image's way of running, without an engine: what the Dockerfile copies is built, installed and run by nobody."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import build
from tests.clients import Device, Refused
from tests.servers import Process, program
from tests.unit.test_compose import ROOT, copied, instructions, sent

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or program("setpriv") is None,
    reason="to become nobody takes root and setpriv",
)
NOBODY = 65534
BECOME = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]


@pytest.fixture(scope="module")
def python() -> tuple[str, str]:
    """An interpreter that nobody can start, also from a process that is nobody already, and where its packages lie."""
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    for candidate in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        ask = [*BECOME, "/bin/sh", "-c", 'exec "$0" -c "import pydantic"', candidate]
        if subprocess.run(ask, env={"PYTHONPATH": packages}, capture_output=True).returncode == 0:
            return candidate, packages
    pytest.skip("nobody cannot read this Python")


@pytest.fixture
def home() -> Iterator[Path]:
    """`/isthmus` of the image: conf.d is root's, data is nobody's, the package lies in `site`."""
    build.need_setuptools()
    folder = Path(tempfile.mkdtemp(prefix="isthmus-image-"))  # not under pytest's own, which nobody can enter
    folder.chmod(0o755)
    try:
        source = folder / "source"
        for name in copied():
            for path in [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*")):
                relative = path.relative_to(ROOT)
                if path.is_file() and sent(str(relative)):
                    (source / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, source / relative)
        code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(folder)!r}))"
        environment = {**os.environ, "ISTHMUS_COMPILE": "never"}
        subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder / "site")
        (source / "conf.d").rename(folder / "conf.d")
        shutil.rmtree(source)
        (folder / "data").mkdir(mode=0o700)
        os.chown(folder / "data", NOBODY, NOBODY)
        yield folder
    finally:
        shutil.rmtree(folder)


def command(instruction: str) -> list[str]:
    """The arguments behind ENTRYPOINT that an instruction of the Dockerfile gives."""
    (found,) = [rest for word, rest in instructions() if word == instruction]
    arguments: list[str] = json.loads("[" + found.partition("[")[2])
    return arguments[1:] if instruction == "HEALTHCHECK" else arguments


def written(home: Path, after: float) -> list[str]:
    """What lies outside of data and is younger."""
    return [
        str(path.relative_to(home))
        for path in home.rglob("*")
        if home / "data" not in path.parents and path != home / "data" and path.lstat().st_mtime > after
    ]


def stored(home: Path) -> list[str]:
    """Payloads in the table that the shipped sink writes."""
    path = home / "data" / "telemetry.db"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        try:
            return [row[0] for row in db.execute("select payload from messages")]
        except sqlite3.OperationalError:  # not made yet
            return []


def test_nobody_runs_it_and_writes_nothing_but_its_data(home: Path, python: tuple[str, str]) -> None:
    interpreter, packages = python
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{home / 'site'}{os.pathsep}{packages}"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    isthmus = [*BECOME, interpreter, "-m", "broker"]
    before = max(path.lstat().st_mtime for path in home.rglob("*"))
    log = home / "data" / "log"
    log.touch()
    os.chown(log, NOBODY, NOBODY)
    broker = Process(
        [*isthmus, *command("CMD"), "--set", "listeners.tcp.bind=127.0.0.1:0"], log, env=environment, cwd=home
    )
    try:
        broker.wait_until(lambda: "ready " in log.read_text(), 30, "the image's command")
        (ready,) = [line for line in log.read_text().splitlines() if line.startswith("ready ")]
        owners = {
            line.split()[1]
            for line in Path(f"/proc/{broker.pid}/status").read_text().splitlines()
            if line[:4] == "Uid:"
        }
        assert owners == {str(NOBODY)}
        health = subprocess.run(
            [*isthmus, *command("HEALTHCHECK")], env=environment, cwd=home, capture_output=True, text=True, timeout=30
        )
        assert health.returncode == 0, health.stderr
        assert json.loads(health.stdout)["name"] == "isthmus-1"
        port = int(ready.partition("tcp=")[2].split()[0].rpartition(":")[2])
        password = (home / "data" / "demo-password").read_text().strip()
        with Device(port, "demo", password) as device:
            device.publish("telemetry/demo/room", "21.5", qos=1)
        with pytest.raises(Refused):
            Device(port, "demo", "wrong").connect()
        broker.wait_until(lambda: stored(home) == ["21.5"], 15, "the worker, which is nobody too")
    finally:
        code = broker.stop()
    assert code == 0, broker.tail()
    assert written(home, before) == []
    assert {(path.stat().st_uid) for path in (home / "data").rglob("*")} == {NOBODY}
    down = subprocess.run(
        [*isthmus, *command("HEALTHCHECK")], env=environment, cwd=home, capture_output=True, timeout=30
    )
    assert down.returncode == 4, "a broker that is not there is not healthy"
