"""OpenLDAP's slapd with people and groups."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from tests.servers.authority import Certificates
from tests.servers.containers import Container, docker_answers
from tests.servers.processes import Absent, Server, accepts, folder, free_port, program

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
class Slapd(Server):
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
    what: ClassVar[str] = "slapd"

    def answers(self) -> bool:
        return accepts(self.port)

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
            container = Container("slapd", SLAPD_PORT=str(ports[0]))
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
        with directory._running([binary, "-f", str(conf), "-h", urls, "-d", "0"], where / "log"):
            if not empty:
                fill(directory)
            yield directory
