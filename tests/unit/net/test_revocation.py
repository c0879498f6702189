"""What revocation lists and certificates say, and whose connections end for it."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from broker.net.der import listed, named
from broker.net.revocation import _read, end_revoked
from tests.unit.net.fakes import Authority, Pair
from tests.unit.net.test_client_certificates import revoke


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


def test_a_list_names_issuer_and_number(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = Authority(tmp_path / "a"), Authority(tmp_path / "b")
    good, bad, worse, foreign = one.issue("good"), one.issue("bad"), one.issue("worse"), other.issue("foreign")
    assert _read(revoke(one, tmp_path / "none.pem")) == frozenset()
    path = revoke(one, tmp_path / "crl.pem", bad, worse)
    found = _read(path)
    assert found == {named(der(bad)), named(der(worse))}
    assert named(der(good)) not in found
    path.write_text(path.read_text() + revoke(other, tmp_path / "other.pem", foreign).read_text())
    assert _read(path) == {*found, named(der(foreign))}, "a file may hold several lists"
    serial = x509.load_der_x509_certificate(der(bad)).serial_number
    assert int.from_bytes(named(der(bad))[1], "big") == serial


@pytest.mark.parametrize("data", [b"", b"\x30", b"\x30\x03abc", b"\x02\x01\x01", b"\x30\x82\xff\xff" + b"\x30" * 20])
def test_what_is_neither_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        named(data)
    with pytest.raises(ValueError, match=r".+"):
        list(listed(data))


async def test_only_connections_of_that_listener_with_a_listed_certificate_end(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    good, bad = authority.issue("good"), authority.issue("bad")

    def channel(listener: Any, shown: bytes | None) -> Any:
        tls = SimpleNamespace(getpeercert=lambda binary: shown)
        link = SimpleNamespace(get_extra_info=lambda name: {"ssl_object": tls}.get(name))
        return SimpleNamespace(listener=listener, link=link)

    one, other = SimpleNamespace(name="one"), SimpleNamespace(name="other")
    channels = [channel(one, der(good)), channel(one, der(bad)), channel(other, der(bad)), channel(one, None)]
    plain = channel(one, None)
    plain.link.get_extra_info = lambda name: None
    late = channel(one, der(bad))
    engine = SimpleNamespace(clients=lambda: [*channels, plain])
    ended: list[Any] = []

    def end(found: Any) -> None:
        ended.append(found)
        channels.remove(found)
        if found is not late:
            channels.append(late)  # its hand-shake was under way

    await end_revoked(engine, one, revoke(authority, tmp_path / "crl.pem", bad), end, 0.01)
    assert len(ended) == 2
    assert ended[1] is late
    ended.clear()
    channels.append(late)
    await end_revoked(engine, one, tmp_path / "missing.pem", end, 0.01)
    assert not ended
