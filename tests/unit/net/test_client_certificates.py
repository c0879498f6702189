"""Client certificates that were revoked."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from pydantic import ValidationError

from broker.config import certificates
from broker.net.errors import ListenError
from tests.unit.net.fakes import CONNECT, Authority, Pair, config


def revoke(authority: Authority, path: Path, *pairs: Pair, days: float = 1) -> Path:
    """The authority's list of these certificates, good for so many days."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority._name)
        .last_update(now - datetime.timedelta(days=2))
        .next_update(now + datetime.timedelta(days=days))
    )
    for pair in pairs:
        serial = x509.load_pem_x509_certificate(pair.certificate.read_bytes()).serial_number
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        )
    path.write_bytes(builder.sign(authority._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def pairs(authority: Authority) -> tuple[Pair, Pair, Pair]:
    """The server's certificate and those of two clients."""
    return authority.issue(), authority.issue("good"), authority.issue("stolen")


def table(authority: Authority, pair: Pair, crl: Path, **more: Any) -> Any:
    return config(
        "tls", certificate=str(pair.certificate), key=str(pair.key), client_ca=str(authority.ca), client_crl=str(crl),
        username_from="cn", **more,
    )  # fmt: skip


async def let_in(connect: Any, listener: Any, context: ssl.SSLContext) -> bool:
    """Whether somebody with this certificate is answered. With TLS 1.3 the server judges after the client is done."""
    async with asyncio.timeout(5):
        try:
            client = await connect(listener, ssl=context, server_hostname="localhost")
            await client.send(CONNECT)
            return bool(await client.reader.read(4))
        except (ssl.SSLError, ConnectionError):
            return False


async def test_a_revoked_certificate_is_refused_from_the_next_reload(
    listeners: Any, connect: Any, engine: Any, authority: Authority, pairs: tuple[Pair, Pair, Pair], tmp_path: Path
) -> None:
    server, good, stolen = pairs
    engine.reply = b"\x20\x02\x00\x00"
    crl = revoke(authority, tmp_path / "crl.pem")
    listener = await listeners.open("devices", table(authority, server, crl))
    resumed = authority.client(stolen)  # keeps its session tickets from here on
    assert await let_in(connect, listener, authority.client(good))
    assert await let_in(connect, listener, resumed)
    revoke(authority, crl, stolen)
    await listeners.apply({"devices": listener.config})
    assert not await let_in(connect, listener, authority.client(stolen))
    assert not await let_in(connect, listener, resumed)
    assert "revoked" in await engine.reported("tls")
    assert await let_in(connect, listener, authority.client(good))
    crl.write_text("-----BEGIN X509 CRL-----\nbroken\n-----END X509 CRL-----\n")
    await listeners.apply({"devices": listener.config})
    assert "client_crl" in listeners.status()["devices"]["alarm"]
    assert not await let_in(connect, listener, authority.client(stolen)), "the old list is still in force"
    assert await let_in(connect, listener, authority.client(good))


async def test_a_list_that_has_passed_its_date_lets_nobody_in(
    listeners: Any, connect: Any, engine: Any, authority: Authority, pairs: tuple[Pair, Pair, Pair], tmp_path: Path
) -> None:
    server, good, _ = pairs
    engine.reply = b"\x20\x02\x00\x00"
    crl = revoke(authority, tmp_path / "crl.pem", days=-1)
    listener = await listeners.open("devices", table(authority, server, crl))
    assert not await let_in(connect, listener, authority.client(good))
    assert "CRL has expired" in await engine.reported("tls")


async def test_files_that_hold_no_list_are_named(
    listeners: Any, authority: Authority, pairs: tuple[Pair, Pair, Pair], tmp_path: Path
) -> None:
    for path in (authority.ca, pairs[0].key, tmp_path / "missing"):
        wrong = table(authority, pairs[0], path)
        with pytest.raises(ListenError, match=r"listeners\.devices: client_crl "):
            await listeners.open("devices", wrong)
        assert [field for field, _ in certificates.problems(wrong)] == ["client_crl"]
    with pytest.raises(ValidationError, match="client_crl needs client_ca"):
        config("tls", certificate="x", key="y", client_crl="z")
