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

import asyncio
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("ISTHMUS_TEST_CACHE", "~/.cache/isthmus-tests")).expanduser()
KAFKA_VERSION = "4.3.1"
KAFKA_HOME = CACHE / f"kafka-{KAFKA_VERSION}"
PATIENCE = float(os.environ.get("ISTHMUS_TEST_PATIENCE", "1"))
"""Every start timeout is multiplied by this; a loaded machine may want 4."""


class Absent(Exception):
    """The service can neither be found nor started here; the message says why and what to do."""


class NotOurs(Absent):
    """The server was given by address: it cannot be stopped or configured by a test."""


# --- processes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _die_with_parent() -> None:
    """In the child: a killed test run leaves nothing behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Process:
    """A child whose output goes to a file; stopped by its own pid and nothing else."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ):
        self.command = [str(c) for c in command]
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_until(self, answers: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll `answers` until it says yes; raises RuntimeError with the end of the log when the process dies first."""
        deadline = time.monotonic() + seconds * PATIENCE
        while True:
            if answers():
                return
            if self.popen.poll() is not None:
                raise RuntimeError(f"{what} ended with {self.popen.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{what} did not answer within {seconds * PATIENCE:.0f} s:\n{self.tail()}")
            time.sleep(0.01)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 15) -> int:
        """Send the signal, wait, kill if it does not end; returns the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(how)
            try:
                self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait(10)
        return self.popen.returncode

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens there."""
    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex((host, port)) == 0


def program(name: str) -> str | None:
    """Path of a program, also where an ordinary user's PATH does not look."""
    folders = [os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"]
    folders += sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return shutil.which(name, path=":".join(folders))


@contextlib.contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """A temporary folder, removed whatever happens."""
    path = Path(tempfile.mkdtemp(prefix=f"isthmus-{prefix}-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# --- certificates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """An authority of our own and what it signed; every path is a PEM file."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    stranger_ca: Path
    """A second authority that signed none of them."""


def certificates(where: Path, client_name: str = "device-1", host: str = "::1") -> Certificates:
    """An authority, a server certificate for localhost, 127.0.0.1 and `host` (an address), a client certificate; needs
    `openssl`."""
    openssl = program("openssl")
    if openssl is None:
        raise Absent("the program openssl is not installed: apt-get install openssl")
    where.mkdir(parents=True, exist_ok=True)

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], check=True, capture_output=True, cwd=where)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for ca in ("ca", "stranger"):
        usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        run(
            "req",
            "-x509",
            *new_key,
            "-keyout",
            f"{ca}.key",
            "-out",
            f"{ca}.pem",
            "-days",
            "30",
            "-subj",
            f"/CN={ca}",
            *usage,
        )
    for name, subject, extension in (
        (
            "server",
            "/CN=localhost",
            f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{host}\nextendedKeyUsage=serverAuth",
        ),
        ("client", f"/O=isthmus/CN={client_name}", f"subjectAltName=DNS:{client_name}\nextendedKeyUsage=clientAuth"),
    ):
        (where / f"{name}.ext").write_text(extension + "\n")
        run("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30",
            "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
    for key in where.glob("*.key"):
        key.chmod(0o600)
    return Certificates(
        where / "ca.pem", where / "server.pem", where / "server.key", where / "client.pem", where / "client.key",
        where / "stranger.pem",
    )  # fmt: skip


# --- containers ------------------------------------------------------------------------------------------------------


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
                        str(HERE.parent / "compose" / f"{service}.yaml")]  # fmt: skip
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


# --- slapd -----------------------------------------------------------------------------------------------------------

BASE_DN = "dc=example,dc=com"
ADMIN_DN = f"cn=admin,{BASE_DN}"
ADMIN_PASSWORD = "admin-pw"
PEOPLE = {"alice": "alice-pw", "bob": "bob-pw", "carol": "carol-pw", "dave": "dave-pw"}
"""User names and passwords. alice is in sensors; bob in operators; carol in night-shift, which is itself a member of
operators; dave is in no group."""
GROUPS: dict[str, list[str]] = {
    "sensors": [f"uid=alice,ou=people,{BASE_DN}"],
    "night-shift": [f"uid=carol,ou=people,{BASE_DN}"],
    "operators": [f"uid=bob,ou=people,{BASE_DN}", f"cn=night-shift,ou=groups,{BASE_DN}"],
}


@dataclass
class Slapd:
    """An OpenLDAP directory with the people and groups above; `memberOf` is kept by its overlay."""

    url: str
    host: str = "127.0.0.1"
    port: int = 389
    ldaps_url: str | None = None
    """Only with certificates; StartTLS then works on `url`."""
    ca: Path | None = None
    base_dn: str = BASE_DN
    people_dn: str = f"ou=people,{BASE_DN}"
    groups_dn: str = f"ou=groups,{BASE_DN}"
    admin_dn: str = ADMIN_DN
    admin_password: str = ADMIN_PASSWORD
    passwords: dict[str, str] = field(default_factory=lambda: dict(PEOPLE))
    _command: list[str] = field(default_factory=list)
    _log: Path | None = None
    _process: Process | None = None

    @property
    def pid(self) -> int:
        return self._ours().pid

    def _ours(self) -> Process:
        if self._process is None:
            raise NotOurs("this directory was not started by the tests and cannot be stopped")
        return self._process

    def stop(self) -> None:
        """End the server; the data stays and `start` brings it back on the same port."""
        self._ours().stop()

    def start(self) -> None:
        self._ours()
        assert self._log is not None
        self._process = Process(self._command, self._log)
        self._process.wait_until(lambda: accepts(self.port), 10, "slapd")

    def freeze(self) -> None:
        """Accept connections but never answer, until `thaw`."""
        os.kill(self._ours().pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._ours().pid, signal.SIGCONT)

    def connect(self) -> Any:
        """A bound ldap3 connection as the administrator, to change the directory under a running broker."""
        import ldap3

        return ldap3.Connection(
            ldap3.Server(self.url, connect_timeout=5), self.admin_dn, self.admin_password, auto_bind=True
        )


def slapd_conf(where: Path, certs: Certificates | None, extra: str, schema: Path, modules: str) -> str:
    """The configuration file; `extra` goes before the database."""
    lines = [f"modulepath {modules}", "moduleload back_mdb", "moduleload memberof"]
    lines += [f"include {schema / name}.schema" for name in ("core", "cosine", "inetorgperson")]
    lines += [f"pidfile {where}/pid", "sizelimit unlimited", "threads 4"]
    if certs is not None:
        lines += [
            f"TLSCACertificateFile {certs.ca}",
            f"TLSCertificateFile {certs.server}",
            f"TLSCertificateKeyFile {certs.server_key}",
        ]
    lines += [extra] if extra else []
    lines += [
        "database mdb", f'suffix "{BASE_DN}"', f'rootdn "{ADMIN_DN}"', f"rootpw {ADMIN_PASSWORD}",
        f"directory {where}/db", "maxsize 67108864", "dbnosync", "index objectClass,uid,member,memberOf eq",
        "overlay memberof", "memberof-group-oc groupOfNames", "memberof-member-ad member",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def fill(directory: Slapd) -> None:
    """Add the people and groups online, so that the memberOf overlay sees them."""
    with contextlib.closing(Unbind(directory.connect())) as bound:
        add = bound.connection.add

        def must(dn: str, classes: list[str], attributes: dict[str, Any]) -> None:
            if not add(dn, classes, attributes) and bound.connection.result["description"] != "entryAlreadyExists":
                raise RuntimeError(f"slapd refuses {dn}: {bound.connection.result}")

        must(BASE_DN, ["dcObject", "organization"], {"dc": "example", "o": "Example"})
        for unit in ("people", "groups"):
            must(f"ou={unit},{BASE_DN}", ["organizationalUnit"], {"ou": unit})
        for number, (name, password) in enumerate(PEOPLE.items(), 1):
            must(
                f"uid={name},ou=people,{BASE_DN}",
                ["inetOrgPerson"],
                {"uid": name, "cn": name.title(), "sn": name.title(), "userPassword": password,
                 "departmentNumber": f"line-{number}", "mail": f"{name}@example.com"},
            )  # fmt: skip
        for name, members in GROUPS.items():
            must(f"cn={name},ou=groups,{BASE_DN}", ["groupOfNames"], {"cn": name, "member": members})


@dataclass
class Unbind:
    """`contextlib.closing` for an ldap3 connection."""

    connection: Any

    def close(self) -> None:
        self.connection.unbind()


@contextlib.contextmanager
def slapd(*, tls: Certificates | None = None, extra: str = "", empty: bool = False) -> Iterator[Slapd]:
    """An OpenLDAP server with the example people.

    `tls` switches StartTLS and LDAPS on; `extra` is put into slapd.conf (`allow bind_anon_dn` makes it answer an empty
    password with success); `empty` leaves the people out.
    """
    given = os.environ.get("TEST_SLAPD")
    if given and not tls and not extra:
        parts = urlsplit(given)
        directory = Slapd(url=given, host=parts.hostname or "127.0.0.1", port=parts.port or 389)
        if not empty:
            fill(directory)
        yield directory
        return
    binary = program("slapd")
    with folder("slapd") as where:
        (where / "db").mkdir()
        ports = [free_port(), free_port()]
        directory = Slapd(url=f"ldap://127.0.0.1:{ports[0]}", port=ports[0], ca=tls.ca if tls else None)
        if binary is None:
            if tls or extra or not docker_answers():
                raise Absent("slapd is not installed (make servers), TEST_SLAPD is not set, no Docker engine answers")
            container = Container("slapd", PORT=str(ports[0]))
            try:
                if not empty:
                    fill(directory)
                yield directory
            finally:
                container.remove()
            return
        schema = next((p for p in (Path("/etc/ldap/schema"), Path("/etc/openldap/schema")) if p.is_dir()), None)
        modules = next((p for p in Path("/usr").glob("lib*/**/back_mdb.so")), None)
        if schema is None or modules is None:
            raise Absent(f"{binary} is there but its schema files or its module back_mdb are not")
        conf = where / "slapd.conf"
        conf.write_text(slapd_conf(where, tls, extra, schema, str(modules.parent)))
        urls = directory.url + (f" ldaps://127.0.0.1:{ports[1]}" if tls else "")
        directory.ldaps_url = f"ldaps://127.0.0.1:{ports[1]}" if tls else None
        directory._command = [binary, "-f", str(conf), "-h", urls, "-d", "0"]
        directory._log = where / "log"
        directory._process = Process(directory._command, directory._log)
        try:
            directory._process.wait_until(lambda: accepts(directory.port), 10, "slapd")
            if not empty:
                fill(directory)
            yield directory
        finally:
            with contextlib.suppress(ProcessLookupError):
                directory.thaw()
            directory._process.stop()


# --- samba -----------------------------------------------------------------------------------------------------------

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


def _samba_tree(version: str) -> Path:
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
    tree = _samba_tree(samba_version())
    with _own_address() as host, folder("samba") as where:
        with tarfile.open(tree) as packed:
            packed.extractall(where)
        directory = _start_samba(where, host)
        assert directory._process is not None
        try:
            yield directory
        finally:
            directory._process.stop()


# --- mosquitto -------------------------------------------------------------------------------------------------------


@dataclass
class Mosquitto:
    """A mosquitto broker with its own configuration file."""

    port: int
    url: str
    host: str = "127.0.0.1"
    username: str | None = None
    password: str | None = None
    tls_port: int | None = None
    _command: list[str] = field(default_factory=list)
    _log: Path | None = None
    _process: Process | None = None

    @property
    def pid(self) -> int:
        return self._ours().pid

    def _ours(self) -> Process:
        if self._process is None:
            raise NotOurs("this mosquitto was not started by the tests and cannot be stopped")
        return self._process

    def log(self) -> str:
        """Everything it printed so far (it runs with -v)."""
        self._ours()
        assert self._log is not None
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """End it; `start` brings it back on the same port (sessions survive with `persistence`)."""
        self._ours().stop()

    def kill(self) -> None:
        self._ours().kill()

    def start(self) -> None:
        self._ours()
        assert self._log is not None
        self._process = Process(self._command, self._log)
        self._process.wait_until(lambda: accepts(self.port), 10, "mosquitto")


@contextlib.contextmanager
def mosquitto(
    *,
    port: int | None = None,
    username: str | None = None,
    password: str | None = None,
    connection: str = "",
    extra: str = "",
    tls: Certificates | None = None,
    persistence: bool = False,
    verbose: bool = True,
) -> Iterator[Mosquitto]:
    """A mosquitto on a free port.

    `username`/`password` are then required of every client; `connection` holds whole `connection NAME` blocks for its
    bridges (appended last); `extra` holds global options; `tls` adds a TLS listener; `persistence` keeps sessions
    over `stop` and `start`.
    """
    given = os.environ.get("TEST_MOSQUITTO")
    if given and not any((port, username, connection, extra, tls, persistence)):
        parts = urlsplit(given)
        yield Mosquitto(parts.port or 1883, given, parts.hostname or "127.0.0.1", parts.username, parts.password)
        return
    binary = program("mosquitto")
    port = port or free_port()
    server = Mosquitto(port, f"mqtt://127.0.0.1:{port}", username=username, password=password)
    if binary is None:
        if any((username, connection, extra, tls, persistence)) or not docker_answers():
            raise Absent("mosquitto is not installed (make servers), TEST_MOSQUITTO unset, no Docker engine answers")
        container = Container("mosquitto", PORT=str(port))
        try:
            yield server
        finally:
            container.remove()
        return
    with folder("mosquitto") as where:
        lines = ["per_listener_settings false", "log_type all", "connection_messages true"]
        if os.geteuid() == 0:
            lines.append("user root")  # else it gives up the rights to read its own folder
        if username is not None:
            tool = program("mosquitto_passwd")
            assert tool is not None, "mosquitto_passwd is missing beside mosquitto"
            subprocess.run(
                [tool, "-b", "-c", where / "passwords", username, password or ""], check=True, capture_output=True
            )
            lines += ["allow_anonymous false", f"password_file {where}/passwords"]
        else:
            lines.append("allow_anonymous true")
        if persistence:
            lines += ["persistence true", f"persistence_location {where}/", "autosave_interval 1"]
        lines += [extra] if extra else []
        lines.append(f"listener {port} 127.0.0.1")
        if tls is not None:
            server.tls_port = free_port()
            lines += [f"listener {server.tls_port} 127.0.0.1", f"cafile {tls.ca}", f"certfile {tls.server}",
                      f"keyfile {tls.server_key}"]  # fmt: skip
        lines += [connection] if connection else []
        conf = where / "mosquitto.conf"
        conf.write_text("\n".join(lines) + "\n")
        server._command = [binary, "-c", str(conf), *(["-v"] if verbose else [])]
        server._log = where / "log"
        server._process = Process(server._command, server._log)
        try:
            server._process.wait_until(lambda: accepts(port), 10, "mosquitto")
            yield server
        finally:
            server._process.stop()


# --- Apache Kafka ----------------------------------------------------------------------------------------------------

KAFKA_POM = f"""<project><modelVersion>4.0.0</modelVersion>
 <groupId>test</groupId><artifactId>kafka-run</artifactId><version>1</version><dependencies>
 <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version></dependency>
 <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
</dependencies></project>
"""
KAFKA_USER, KAFKA_PASSWORD = "alice", "alice-pw"
"""SASL PLAIN; the SCRAM user is bob with bob-pw."""
SCRAM_USER, SCRAM_PASSWORD = "bob", "bob-pw"


@dataclass
class Kafka:
    """One Kafka broker in KRaft mode, auto-creation of topics off."""

    bootstrap: str
    listeners: dict[str, str] = field(default_factory=dict)
    """Further listeners when asked for: SASL (plain text), TLS, SASLSSL, MTLS -> host:port."""
    certs: Certificates | None = None
    user: str = KAFKA_USER
    password: str = KAFKA_PASSWORD
    scram_user: str = SCRAM_USER
    scram_password: str = SCRAM_PASSWORD
    _command: list[str] = field(default_factory=list)
    _log: Path | None = None
    _process: Process | None = None

    @property
    def port(self) -> int:
        return int(self.bootstrap.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self._ours().pid

    def _ours(self) -> Process:
        if self._process is None:
            raise NotOurs("this Kafka was not started by the tests and cannot be stopped")
        return self._process

    def stop(self) -> None:
        self._ours().stop(seconds=20)

    def kill(self) -> None:
        """SIGKILL; what it acknowledged is still in the page cache."""
        self._ours().kill()

    def freeze(self) -> None:
        """Accept connections but never answer, until `thaw`."""
        os.kill(self._ours().pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._ours().pid, signal.SIGCONT)

    def start(self) -> None:
        """Again on the same ports and data (2-4 s: the old registration must expire first)."""
        self._ours()
        assert self._log is not None
        self._process = Process(self._command, self._log)
        self._process.wait_until(lambda: accepts(self.port) and _kafka_answers(self.bootstrap), 60, "Kafka")

    async def create_topic(self, name: str, partitions: int = 1, configs: Mapping[str, str] | None = None) -> None:
        """Create a topic; an existing one is left alone."""
        from aiokafka.admin import AIOKafkaAdminClient, NewTopic
        from aiokafka.errors import TopicAlreadyExistsError

        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            with contextlib.suppress(TopicAlreadyExistsError):
                answer = await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=dict(configs or {}))])
                for topic, code, *rest in answer.topic_errors:
                    if code not in (0, 36):
                        raise RuntimeError(f"Kafka refuses topic {topic}: error {code} {rest}")
            deadline = time.monotonic() + 15 * PATIENCE
            while not _led(await admin.describe_topics([name])):  # created is not yet known to be led
                if time.monotonic() > deadline:
                    raise RuntimeError(f"Kafka created topic {name} but shows no leader for it")
                await asyncio.sleep(0.02)
        finally:
            await admin.close()

    async def delete_topic(self, name: str) -> None:
        from aiokafka.admin import AIOKafkaAdminClient

        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            await admin.delete_topics([name])
        finally:
            await admin.close()

    async def read(self, topic: str, count: int, seconds: float = 15, *, committed: bool = False) -> list[Any]:
        """At least `count` records of the topic from its beginning, in partition order; fewer when the time is up."""
        from aiokafka import AIOKafkaConsumer

        consumer = AIOKafkaConsumer(
            topic,
            bootstrap_servers=self.bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed" if committed else "read_uncommitted",
        )
        await consumer.start()
        records: list[Any] = []
        try:
            deadline = time.monotonic() + seconds
            while len(records) < count and time.monotonic() < deadline:
                for batch in (await consumer.getmany(timeout_ms=100, max_records=10_000)).values():
                    records += batch
        finally:
            await consumer.stop()
        return records


def _led(described: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every partition of the topics has a leader."""
    return all(
        not topic["error_code"] and topic["partitions"] and all(not p["error_code"] for p in topic["partitions"])
        for topic in described
    )


def _kafka_answers(bootstrap: str) -> bool:
    """Whether the broker answers ApiVersions v0, which every release understands."""
    host, _, port = bootstrap.rpartition(":")
    request = b"\x00\x12\x00\x00\x00\x00\x00\x01\xff\xff"
    try:
        with socket.create_connection((host, int(port)), 2) as s:
            s.sendall(len(request).to_bytes(4, "big") + request)
            return len(s.recv(64)) >= 10
    except OSError:
        return False


def kafka_home() -> Path:
    """Where jars, start archive and formatted folder are kept; made by `install_kafka` on first use."""
    if not any((KAFKA_HOME / "libs").glob("kafka_2.13-*.jar")):
        raise Absent(f"Apache Kafka is not in {KAFKA_HOME} (make servers), TEST_KAFKA is not set")
    if program("java") is None:
        raise Absent("Apache Kafka needs Java 17: apt-get install default-jre-headless")
    return KAFKA_HOME


def _java(home: Path, heap: str = "384m") -> list[str]:
    java = program("java")
    assert java is not None
    # the class path string is part of the archive's identity: never change one without the other
    return [java, f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{home}/libs/*"]  # fmt: skip


def _kafka_properties(
    where: Path, port: int, controller: int, more: Mapping[str, int], certs: Certificates | None, proxy: int | None
) -> str:
    protocols = {"SASL": "SASL_PLAINTEXT", "TLS": "SSL", "SASLSSL": "SASL_SSL", "MTLS": "SSL", "PROXIED": "PLAINTEXT"}
    client = {"PLAINTEXT": port, **more}
    addresses = ",".join(f"{name}://127.0.0.1:{p}" for name, p in client.items())
    seen = {**client, "PROXIED": proxy} if proxy is not None else client
    advertised = ",".join(f"{name}://127.0.0.1:{p}" for name, p in seen.items())
    lines = [
        "process.roles=broker,controller", "node.id=1",
        f"listeners={addresses},CONTROLLER://127.0.0.1:{controller}", f"advertised.listeners={advertised}",
        "controller.listener.names=CONTROLLER", f"controller.quorum.voters=1@127.0.0.1:{controller}",
        "inter.broker.listener.name=PLAINTEXT",
        "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"
        + "".join(f",{name}:{protocols[name]}" for name in more),
        f"log.dirs={where}/data", "offsets.topic.replication.factor=1", "offsets.topic.num.partitions=4",
        "transaction.state.log.replication.factor=1", "transaction.state.log.min.isr=1",
        "transaction.state.log.num.partitions=4", "share.coordinator.state.topic.replication.factor=1",
        "share.coordinator.state.topic.min.isr=1", "group.initial.rebalance.delay.ms=0",
        "auto.create.topics.enable=false", "num.partitions=3", "log.cleaner.dedupe.buffer.size=8388608",
        "controlled.shutdown.enable=false", "broker.session.timeout.ms=1500", "broker.heartbeat.interval.ms=200",
    ]  # fmt: skip
    if any(name.startswith("SASL") for name in more):
        lines.append("sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512")
        modules = "org.apache.kafka.common.security"
        for name in (n.lower() for n in more if n.startswith("SASL")):
            plain = f'{modules}.plain.PlainLoginModule required user_{KAFKA_USER}="{KAFKA_PASSWORD}";'
            lines.append(f"listener.name.{name}.plain.sasl.jaas.config={plain}")
            for scram in ("scram-sha-256", "scram-sha-512"):
                lines.append(
                    f"listener.name.{name}.{scram}.sasl.jaas.config={modules}.scram.ScramLoginModule required;"
                )
    if certs is not None:
        bundle = where / "bundle.pem"
        bundle.write_text(certs.server_key.read_text() + certs.server.read_text() + certs.ca.read_text())
        lines += ["ssl.keystore.type=PEM", f"ssl.keystore.location={bundle}", "ssl.truststore.type=PEM",
                  f"ssl.truststore.location={certs.ca}", "listener.name.mtls.ssl.client.auth=required"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _prepare_kafka(home: Path) -> None:
    """Once for each machine: a formatted folder to copy and a class archive that halves the start."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        formatted = home / "formatted"
        if not formatted.is_dir():
            with folder("kafka-format") as where:
                (where / "server.properties").write_text(
                    _kafka_properties(where, free_port(), free_port(), {}, None, None)
                )
                cluster = "A" + base64.urlsafe_b64encode(os.urandom(16)).decode()[1:22]
                users = [
                    f"{mechanism}=[name={SCRAM_USER},password={SCRAM_PASSWORD}]"
                    for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
                ]
                subprocess.run(
                    [*_java(home), "kafka.tools.StorageTool", "format", "-t", cluster, "-c",
                     str(where / "server.properties"), *(a for u in users for a in ("-S", u))],
                    check=True, capture_output=True, timeout=120,
                )  # fmt: skip
                staged = home / "formatted.new"
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(where / "data", staged)
                staged.rename(formatted)
        archive = home / "kafka.jsa"
        if not archive.exists():
            with folder("kafka-archive") as where:
                port = free_port()
                process = _start_kafka(home, where, port, {}, None, None, [f"-XX:ArchiveClassesAtExit={archive}.new"])
                process.stop(seconds=60)
                staged = archive.with_name("kafka.jsa.new")
                if staged.exists():
                    staged.rename(archive)
                else:
                    archive.touch()  # this Java makes none; do not try again


def _start_kafka(
    home: Path,
    where: Path,
    port: int,
    more: Mapping[str, int],
    certs: Certificates | None,
    proxy: int | None,
    options: Sequence[str],
) -> Process:
    shutil.copytree(home / "formatted", where / "data")
    controller = next(p for p in iter(free_port, None) if p != port and p not in more.values())
    (where / "server.properties").write_text(_kafka_properties(where, port, controller, more, certs, proxy))
    java, *rest = _java(home)
    process = Process([java, *options, *rest, "kafka.Kafka", where / "server.properties"], where / "log")
    process.wait_until(lambda: accepts(port) and _kafka_answers(f"127.0.0.1:{port}"), 40, "Kafka")
    return process


@contextlib.contextmanager
def kafka(
    *, listeners: Sequence[str] = (), tls: Certificates | None = None, proxy: int | None = None, port: int | None = None
) -> Iterator[Kafka]:
    """An empty Kafka, up in 1-3 s, on this port or a free one.

    `listeners` adds SASL, TLS, SASLSSL, MTLS (the last three need `tls`). Clients follow the addresses a broker
    advertises, past any proxy: with `proxy`, a port, a listener PROXIED is added that advertises that port instead.
    """
    if proxy is not None:
        listeners = [*listeners, "PROXIED"]
    given = os.environ.get("TEST_KAFKA")
    if given and not listeners:
        yield Kafka(given)
        return
    try:
        home = kafka_home()
    except Absent:
        if listeners or not docker_answers():
            raise
        port = free_port()
        container = Container("kafka", PORT=str(port))
        try:
            yield Kafka(f"127.0.0.1:{port}")
        finally:
            container.remove()
        return
    _prepare_kafka(home)
    archive = home / "kafka.jsa"
    options = [f"-XX:SharedArchiveFile={archive}", "-Xshare:auto"] if archive.stat().st_size else []
    with folder("kafka") as where:
        port, more = port or free_port(), {name: free_port() for name in listeners}
        process = _start_kafka(home, where, port, more, tls, proxy, options)
        server = Kafka(
            f"127.0.0.1:{port}",
            {name: f"127.0.0.1:{p}" for name, p in more.items()},
            tls,
            _command=process.command,
            _log=where / "log",
            _process=process,
        )
        try:
            yield server
        finally:
            assert server._process is not None
            with contextlib.suppress(ProcessLookupError):
                server.thaw()
            server._process.kill()  # its data goes with the folder


# --- what is there, and installing the rest --------------------------------------------------------------------------

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


def required() -> set[str]:
    """The services whose absence is a failure: REQUIRE=slapd,kafka."""
    return {name.strip() for name in os.environ.get("REQUIRE", "").split(",") if name.strip()}


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
        print(f"servers: the Samba domain is in {_samba_tree(samba_version())}")
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
        _prepare_kafka(kafka_home())
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
