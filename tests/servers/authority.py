"""Certificates of an authority of our own, made with `openssl`."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.servers.processes import Absent, program


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
