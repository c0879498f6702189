"""Starts the real servers the tests and the demo speak to: slapd, Samba, Apache Kafka, mosquitto. Loopback only.

Each of `slapd()`, `kafka()` and `mosquitto()` is a plain context manager that yields a running server. It is found in
this order: an address in the environment (TEST_SLAPD, TEST_KAFKA, TEST_MOSQUITTO), a program on this machine, a
container from `compose/` if a Docker engine answers. Where there is none, `Absent` says why; the fixtures in
`conftest.py` turn that into a skip, or into a failure for the services named in REQUIRE. `samba()`, a domain controller
that speaks as Active Directory does, needs root and packages of its own: `python -m tests.servers install samba`.

`python -m tests.servers install` installs what is missing where it may; `python -m tests.servers list` shows what is
found.
"""

from __future__ import annotations

from tests.servers.active_directory import AD_LOCKOUT, Samba, samba
from tests.servers.apache_kafka import KAFKA_VERSION, Kafka, kafka, kafka_cluster
from tests.servers.authority import Certificates, certificates
from tests.servers.eclipse_mosquitto import Mosquitto, mosquitto
from tests.servers.install import main
from tests.servers.openldap import GROUPS, PEOPLE, Slapd, fill, slapd
from tests.servers.processes import (
    CACHE,
    PATIENCE,
    Absent,
    NotOurs,
    Process,
    accepts,
    folder,
    free_port,
    program,
    required,
)

__all__ = [
    "AD_LOCKOUT",
    "CACHE",
    "GROUPS",
    "KAFKA_VERSION",
    "PATIENCE",
    "PEOPLE",
    "Absent",
    "Certificates",
    "Kafka",
    "Mosquitto",
    "NotOurs",
    "Process",
    "Samba",
    "Slapd",
    "accepts",
    "certificates",
    "fill",
    "folder",
    "free_port",
    "kafka",
    "kafka_cluster",
    "main",
    "mosquitto",
    "program",
    "required",
    "samba",
    "slapd",
]
