"""Samba as a domain controller that speaks as Active Directory does."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers.authority import Certificates, certificates
from tests.servers.openldap import Unbind
from tests.servers.processes import CACHE, PATIENCE, Absent, Process, accepts, folder, program

SAMBA_PACKAGES = (
    "samba-ad-dc", "samba-ad-provision", "samba-dsdb-modules", "samba-vfs-modules", "winbind", "samba", "smbclient",
)  # fmt: skip
AD_BASE_DN = "DC=test,DC=lan"
AD_ADMIN_PASSWORD = "Adm1n-pw"
AD_LOCKOUT = 5
"""Wrong passwords after which the directory locks an account."""
AD_PEOPLE: dict[str, dict[str, Any]] = {
    "svc-mqtt": {},
    "alice": {"departmentNumber": "line-1"},
    "bob": {},
    "carol": {},
    "dave": {},
    "disabled": {"userAccountControl": 514},
    "expired": {"accountExpires": 130_000_000_000_000_000},
    "renew": {"pwdLastSet": 0},
    "victim": {},
}
"""Logon names; the password is the name and ``-pw``. `disabled` and `expired` accounts say what they are, `renew` must
change the password first; `victim` is there to be locked."""
AD_GROUPS: dict[str, list[str]] = {
    "sensors": ["alice"],
    "night-shift": ["carol"],
    "operators": ["bob", "night-shift"],
    "staff": ["operators"],
    "auditors": [],
}
"""Members, users or groups: carol is in staff by three levels, dave in no group but Domain Users."""


@dataclass
class Samba:
    """A Samba domain controller of the domain test.lan. It refuses passwords on connections without TLS."""

    host: str
    ca: Path
    """The authority that signed its certificate, which names `host`."""
    stranger_ca: Path
    base_dn: str = AD_BASE_DN
    people_dn: str = f"CN=Users,{AD_BASE_DN}"
    groups_dn: str = f"OU=Groups,{AD_BASE_DN}"
    service_dn: str = f"CN=svc-mqtt,CN=Users,{AD_BASE_DN}"
    service_password: str = "svc-mqtt-pw"
    domain: str = "test.lan"
    _process: Process | None = None

    @property
    def url(self) -> str:
        return f"ldap://{self.host}:389"

    @property
    def ldaps_url(self) -> str:
        return f"ldaps://{self.host}:636"

    def connect(self) -> Any:
        """A bound ldap3 connection as the administrator."""
        import ldap3

        server = ldap3.Server(self.host, 636, use_ssl=True, get_info=ldap3.NONE, connect_timeout=5)
        return ldap3.Connection(server, f"Administrator@{self.domain}", AD_ADMIN_PASSWORD, auto_bind=True)


def samba_version() -> str:
    """The version of the packages; Absent, with the reason, where they cannot be used."""
    if os.geteuid() != 0:
        raise Absent("a Samba domain controller needs root, to own its files and to listen on port 389")
    missing = [name for name in ("samba", "samba-tool", "openssl") if program(name) is None]
    if not missing and not Path("/usr/share/samba/setup/provision.ldif").exists():
        missing = ["samba-ad-provision"]
    if missing:
        raise Absent(f"{', '.join(missing)} not installed: python -m tests.servers install samba")
    return subprocess.run(["samba", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


def _samba_conf(where: Path, host: str, certs: Certificates) -> str:
    lines = [
        "[global]", "workgroup = TEST", "realm = TEST.LAN", "netbios name = DC1",
        "server role = active directory domain controller", "server services = ldap", "dns update command = /bin/true",
        f"interfaces = {host}/8", "bind interfaces only = yes", f"pid directory = {where}", f"log file = {where}/log",
        f"lock directory = {where}", f"state directory = {where}/state", f"cache directory = {where}/cache",
        f"private dir = {where}/private", f"binddns dir = {where}/bind-dns", "vfs objects =",
        f"ncalrpc dir = {where}/ncalrpc", f"winbindd socket directory = {where}/winbindd",
        f"posix:eadb = {where}/eadb.tdb", "tls enabled = yes", f"tls keyfile = {certs.server_key}",
        f"tls certfile = {certs.server}", f"tls cafile = {certs.ca}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _start_samba(where: Path, host: str) -> Samba:
    certs = certificates(where / "tls", host=host)
    (where / "etc").mkdir(exist_ok=True)
    conf = where / "etc" / "smb.conf"
    conf.write_text(_samba_conf(where, host, certs))
    binary = program("samba")
    assert binary is not None
    command = [binary, "-s", str(conf), "-F", "-M", "single", "--no-process-group", "-d", "0"]
    process = Process(command, where / "output")
    process.wait_until(lambda: accepts(389, host) and accepts(636, host), 20, "Samba")
    return Samba(host, certs.ca, certs.stranger_ca, _process=process)


def _fill_samba(directory: Samba) -> None:
    """The people and groups, and rules under which short passwords are allowed and locking can be seen."""
    with contextlib.closing(Unbind(directory.connect())) as bound:
        connection = bound.connection

        def must(done: bool) -> None:
            if not done:
                raise RuntimeError(f"Samba refuses: {connection.result}")

        def change(dn: str, **values: Any) -> None:
            must(connection.modify(dn, {name: [("MODIFY_REPLACE", [str(value)])] for name, value in values.items()}))

        change(
            AD_BASE_DN, pwdProperties=0, minPwdLength=4, minPwdAge=0, maxPwdAge=-0x8000000000000000,
            pwdHistoryLength=0, lockoutThreshold=AD_LOCKOUT,
        )  # fmt: skip
        for name, more in AD_PEOPLE.items():
            dn = f"CN={name},{directory.people_dn}"
            secret = f'"{name}-pw"'.encode("utf-16-le")
            must(connection.add(dn, ["user"], {
                "sAMAccountName": name, "userPrincipalName": f"{name}@{directory.domain}", "unicodePwd": secret,
                "userAccountControl": "512",
            }))  # fmt: skip
            if more:
                change(dn, **more)
        must(connection.add(directory.groups_dn, ["organizationalUnit"]))
        for name, members in AD_GROUPS.items():
            places = [f"CN={m},{directory.groups_dn if m in AD_GROUPS else directory.people_dn}" for m in members]
            attributes = {"sAMAccountName": name, **({"member": places} if places else {})}
            must(connection.add(f"CN={name},{directory.groups_dn}", ["group"], attributes))


def samba_tree(version: str) -> Path:
    """A tarball of the provisioned and filled domain; made once for each version of the packages and of the people."""
    content = hashlib.sha256(repr((AD_PEOPLE, AD_GROUPS, AD_LOCKOUT, AD_ADMIN_PASSWORD)).encode()).hexdigest()[:8]
    tree = CACHE / f"samba-{version}-{content}.tar.gz"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "samba.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tree.exists():
            return tree
        with folder("samba-provision") as where:
            done = subprocess.run(
                ["samba-tool", "domain", "provision", f"--targetdir={where}", "--realm=TEST.LAN", "--domain=TEST",
                 f"--adminpass={AD_ADMIN_PASSWORD}", "--server-role=dc", "--dns-backend=NONE", "--host-name=dc1",
                 "--host-ip=127.0.0.1", "--option=vfs objects=", f"--option=posix:eadb={where}/eadb.tdb"],
                capture_output=True, text=True, timeout=120 * PATIENCE,
            )  # fmt: skip
            if done.returncode:
                raise Absent(f"samba-tool could not provision a domain: {done.stderr.strip()[-500:]}")
            with _own_address() as host:
                directory = _start_samba(where, host)
                assert directory._process is not None
                try:
                    _fill_samba(directory)
                finally:
                    directory._process.stop()
            staged = tree.with_suffix(".new")
            with tarfile.open(staged, "w:gz", compresslevel=1) as packed:
                for name in ("private", "state", "cache", "eadb.tdb"):
                    if (where / name).exists():
                        packed.add(where / name, name)
            staged.rename(tree)
    return tree


@contextlib.contextmanager
def _own_address() -> Iterator[str]:
    """A loopback address nobody else uses while this lasts: the ports of a domain controller are fixed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for number in range(2, 250):
        host = f"127.77.0.{number}"
        with (CACHE / f"{host}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if not accepts(389, host):
                yield host
                return
    raise Absent("every address from 127.77.0.2 to 127.77.0.249 is in use")


@contextlib.contextmanager
def samba() -> Iterator[Samba]:
    """A domain controller with the people and groups above, on an address of its own, up in about a second."""
    tree = samba_tree(samba_version())
    with _own_address() as host, folder("samba") as where:
        with tarfile.open(tree) as packed:
            packed.extractall(where)
        directory = _start_samba(where, host)
        assert directory._process is not None
        try:
            yield directory
        finally:
            directory._process.stop()
