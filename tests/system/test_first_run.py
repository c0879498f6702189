"""What a newcomer does first: the shipped fragments, the line that publishes, the line that shows the row."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests import servers
from tests.build import copy_pure, need_setuptools
from tests.servers import Process


def wait_for_hints(log: Path, process: Process) -> tuple[str, str]:
    """The two commands the first start prints: publish, and show the row."""

    def commands() -> list[str]:
        return [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("  ")]

    process.wait_until(lambda: len(commands()) >= 2, 30, "isthmus run")
    publish, show = commands()[:2]
    assert publish.startswith("mosquitto_pub ")
    assert show.startswith("python3 ")
    return publish, show


def try_both_lines(publish: str, show: str, where: Path) -> None:
    sent = subprocess.run(["/bin/sh", "-c", publish], capture_output=True, text=True, timeout=20, cwd=where)
    assert sent.returncode == 0, sent.stderr
    deadline = time.monotonic() + 15
    seen = ""
    while "telemetry/demo/" not in seen and time.monotonic() < deadline:
        shown = subprocess.run(["/bin/sh", "-c", show], capture_output=True, text=True, timeout=20, cwd=where)
        seen = shown.stdout
        time.sleep(0.1)
    assert "telemetry/demo/" in seen
    assert "21.5" in seen


@pytest.fixture
def clients() -> None:
    if servers.program("mosquitto_pub") is None:
        if "mosquitto" in servers.required():
            pytest.fail("REQUIRE names mosquitto: mosquitto_pub is not installed", pytrace=False)
        pytest.skip("mosquitto_pub is not installed (make servers)")


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("clients")
def test_both_lines_of_the_first_start_work_as_they_stand(tmp_path: Path, root: Path) -> None:
    shutil.copytree(root / "conf.d", tmp_path / "conf.d")
    port = servers.free_port()
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "broker", "run", "--set", f"listeners.tcp.bind=127.0.0.1:{port}"]
    process = Process(command, tmp_path / "log", env=environment, cwd=tmp_path)
    try:
        publish, show = wait_for_hints(tmp_path / "log", process)
        try_both_lines(publish, show, tmp_path)
        assert stat.S_IMODE((tmp_path / "data" / "demo-password").stat().st_mode) == 0o600
        refused = publish.replace("telemetry/demo/room", "telemetry/other/room").replace("-q 1", "-q 1 -V 5")
        denied = subprocess.run(["/bin/sh", "-c", refused], capture_output=True, text=True, timeout=20, cwd=tmp_path)
        assert "Not authorized" in denied.stdout + denied.stderr
    finally:
        assert process.stop() == 0, process.tail()


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("clients")
def test_the_wheel_runs_from_an_empty_folder(tmp_path: Path) -> None:
    """Installed without the checkout in sight; its dependencies are those of the running Python."""
    pytest.importorskip("pip")
    need_setuptools()
    tree, site, empty = tmp_path / "tree", tmp_path / "site", tmp_path / "empty"
    tree.mkdir()
    empty.mkdir()
    copy_pure(tree)
    environment = {**os.environ, "ISTHMUS_COMPILE": "never"}
    options = ["--no-deps", "--no-build-isolation", "--quiet"]
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", *options, "--wheel-dir", str(tmp_path), str(tree)]
    made = subprocess.run(build, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("isthmus-*.whl")
    assert zipfile.ZipFile(wheel).testzip() is None
    install = [*pip, "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    port = servers.free_port()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [str(site / "bin" / "isthmus"), "run", "--set", f"listeners.tcp.bind=127.0.0.1:{port}"]
    process = Process(command, tmp_path / "log", env=environment, cwd=empty)
    try:
        publish, show = wait_for_hints(tmp_path / "log", process)
        try_both_lines(publish, show, empty)
        assert (empty / "data" / "demo-password").exists()
    finally:
        assert process.stop() == 0, process.tail()
