"""What is there, and installing the rest."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.servers.active_directory import SAMBA_PACKAGES, samba, samba_tree, samba_version
from tests.servers.apache_kafka import KAFKA_HOME, KAFKA_POM, KAFKA_VERSION, kafka, kafka_home, prepare_kafka
from tests.servers.eclipse_mosquitto import mosquitto
from tests.servers.openldap import GROUPS, PEOPLE, Slapd, fill, slapd
from tests.servers.processes import Absent, program, required

PACKAGES = {
    "slapd": "slapd",
    "ldapsearch": "ldap-utils",
    "mosquitto": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "postgres": "postgresql",
    "mariadbd": "mariadb-server",
    "redis-server": "redis-server",
    "javac": "default-jdk-headless",
}
SERVICES: dict[str, Callable[[], Any]] = {"slapd": slapd, "samba": samba, "kafka": kafka, "mosquitto": mosquitto}


def install_packages() -> bool:
    """Debian packages of the servers, Java and Maven; True when everything is there afterwards."""
    wanted = [package for tool, package in PACKAGES.items() if program(tool) is None]
    if not any(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")):
        wanted.append("libfaketime")
    if program("java") is None:
        wanted.append("default-jre-headless")
    if program("mvn") is None and not any((KAFKA_HOME / "libs").glob("kafka_2.13-*.jar")):
        wanted.append("maven")
    if not wanted:
        print("servers: the programs from Debian packages are here")
        return True
    return _install(wanted)


def _install(wanted: Sequence[str]) -> bool:
    command = f"apt-get install -y --no-install-recommends {' '.join(wanted)}"
    apt = program("apt-get")
    if apt is None or os.geteuid() != 0:
        print(f"servers: missing here: {', '.join(wanted)}. On Debian or Ubuntu this installs them:")
        print(f"\n    sudo {command}\n")
        return False
    print(f"servers: installing {', '.join(wanted)} (nothing is started: policy-rc.d says no meanwhile)", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with no_daemons():
        subprocess.run([apt, "update", "-qq"], check=False, env=environment)
        done = subprocess.run(
            [apt, "-qq", "-o", "DPkg::Lock::Timeout=300", *command.split()[1:]],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
    if done.returncode:
        print(f"servers: {command} failed with {done.returncode}")
    return done.returncode == 0


def install_samba() -> bool:
    """The packages of a Samba domain controller, and the domain the tests use. True when it is there."""
    try:
        samba_version()
    except Absent:
        if not _install(SAMBA_PACKAGES):
            return False
    try:
        print(f"servers: the Samba domain is in {samba_tree(samba_version())}")
    except Absent as error:
        print(f"servers: {error}")
        return False
    return True


@contextlib.contextmanager
def no_daemons(policy: Path = Path("/usr/sbin/policy-rc.d")) -> Iterator[None]:
    """While this lasts, packages start nothing; a policy that was there before stays as it was."""
    before = policy.read_bytes() if policy.exists() else None
    if before is None:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if before is None:
            policy.unlink(missing_ok=True)


def install_kafka() -> bool:
    """Apache Kafka's published jars, by Maven, into the cache; then the start archive. True when it is there."""
    if os.environ.get("TEST_KAFKA"):
        print("servers: Kafka is at TEST_KAFKA")
        return True
    if not any((KAFKA_HOME / "libs").glob("kafka_2.13-*.jar")):
        maven = program("mvn")
        if maven is None:
            print("servers: Apache Kafka needs Maven: apt-get install maven, then make servers again")
            return False
        print(f"servers: fetching Apache Kafka {KAFKA_VERSION} into {KAFKA_HOME} (46 jars, 42 MB)", flush=True)
        KAFKA_HOME.mkdir(parents=True, exist_ok=True)
        (KAFKA_HOME / "pom.xml").write_text(KAFKA_POM)
        command = [
            maven,
            "-q",
            "-B",
            "dependency:copy-dependencies",
            "-DoutputDirectory=libs",
            "-DincludeScope=runtime",
        ]
        if subprocess.run(command, cwd=KAFKA_HOME).returncode:
            print("servers: Maven could not fetch Apache Kafka")
            return False
    if not (KAFKA_HOME / "kafka.jsa").exists():
        print("servers: preparing Kafka's start archive, once", flush=True)
        prepare_kafka(kafka_home())
    print(f"servers: Apache Kafka {KAFKA_VERSION} is in {KAFKA_HOME}")
    return True


def main(arguments: Sequence[str]) -> int:
    """`install`, `install samba`, `list` or `fill URL`."""
    if list(arguments) == ["install"]:
        packages = install_packages()
        from tests.nosql_servers import install_mongodb  # it uses this module

        absent = set() if packages else {"slapd", "mosquitto", "postgresql", "mariadb", "redis"}
        absent |= set() if install_kafka() else {"kafka"}
        absent |= set() if install_mongodb() else {"mongodb"}
        missing = absent & required()
        if missing:
            print(f"servers: REQUIRE names {', '.join(sorted(missing))}, which cannot be had here", file=sys.stderr)
        return 1 if missing else 0
    if list(arguments) == ["install", "samba"]:
        return 0 if install_samba() else 1
    if list(arguments) == ["list"]:
        for name, start in SERVICES.items():
            began = time.monotonic()
            try:
                with start() as server:
                    where = getattr(server, "url", None) or getattr(server, "bootstrap", "")
                    print(f"{name:10} ok      {time.monotonic() - began:5.2f} s  {where}")
            except Absent as error:
                print(f"{name:10} absent  {error}")
        return 0
    match list(arguments):
        case ["fill", url]:
            parts = urlsplit(url)
            fill(Slapd(url=url, host=parts.hostname or "127.0.0.1", port=parts.port or 389))
            print(f"people: {', '.join(PEOPLE)}; groups: {', '.join(GROUPS)}")
            return 0
    print("usage: python -m tests.servers install [samba] | list | fill LDAP-URL", file=sys.stderr)
    return 2
