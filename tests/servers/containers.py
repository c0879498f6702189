"""Services of `compose/`, where a container engine answers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.servers.processes import Absent, program

COMPOSE = Path(__file__).resolve().parent.parent.parent / "compose"


def docker_answers() -> bool:
    """Whether a Docker engine and its `compose` are there to start containers."""
    docker = program("docker")
    if docker is None:
        return False
    try:
        asked = (["info"], ["compose", "version"])
        return all(subprocess.run([docker, *a], capture_output=True, timeout=10).returncode == 0 for a in asked)
    except (OSError, subprocess.TimeoutExpired):
        return False


class Container:
    """One service of `compose/<service>.yaml`, started and stopped through `docker compose`."""

    def __init__(self, service: str, **environment: str):
        self.environment = {**os.environ, **environment}
        self.command = ["docker", "compose", "-p", f"isthmus-test-{os.getpid()}-{service}", "-f",
                        str(COMPOSE / f"{service}.yaml")]  # fmt: skip
        done = self.run("up", "--detach", "--wait")
        if done.returncode:
            self.run("down", "--volumes")
            raise Absent(f"docker compose could not start {service}: {done.stderr.strip()[-500:]}")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *arguments], env=self.environment, capture_output=True, text=True)

    def stop(self) -> None:
        self.run("stop")

    def start(self) -> None:
        self.run("start", "--wait")

    def remove(self) -> None:
        self.run("down", "--volumes")
