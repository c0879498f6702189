"""A recording engine, an authority that signs certificates, and a raw client."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker.config.listeners import KINDS, ListenerConfig

CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00"


async def until(condition: Callable[[], bool], within: float = 5.0) -> None:
    """For what announces itself to nobody; fails when it does not come true."""
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Channel:
    """Records what net tells it; `reply` is written back after each read."""

    def __init__(self, engine: Engine, link: Any, listener: Any, peer: str, accepted_at: float) -> None:
        self.engine = engine
        self.link = link
        self.listener = listener
        self.peer = peer
        self.accepted_at = accepted_at
        self.identity: dict[str, str] | None = None
        self.reads: list[bytes] = []
        self.calls: list[str] = []
        self.gone: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Event()

    @property
    def received(self) -> bytes:
        return b"".join(self.reads)

    def feed(self, data: bytes) -> None:
        assert type(data) is bytes
        self.reads.append(data)
        self.changed.set()
        if self.engine.reply is not None:
            self.link.write(self.engine.reply)

    data_received = feed

    def lost(self, exc: Exception | None) -> None:
        self.gone.set_result(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.listener.on_lost()
        self.lost(exc)

    def eof_received(self) -> None:
        self.calls.append("eof_received")

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")
        self.changed.set()

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Engine:
    """`channels` in the order they were opened; `reports` are (category, text)."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        limits = SimpleNamespace(connect_timeout=10.0, max_packet_size=1 << 20)
        self.core = SimpleNamespace(limits=limits, count=lambda event: self.events.update((event,)))
        self.channels: list[Channel] = []
        self.reports: list[tuple[str, str]] = []
        self.reply: bytes | None = None
        self._opened = asyncio.Event()
        self._reported = asyncio.Event()

    def open_channel(self, link: Any, listener: Any, peer: str, *, accepted_at: float = 0.0) -> Channel:
        channel = Channel(self, link, listener, peer, accepted_at)
        self.channels.append(channel)
        self._opened.set()
        return channel

    def links(self) -> list[Any]:
        return [channel.link for channel in self.channels if not channel.gone.done()]

    def report(self, category: str, text: str) -> None:
        self.reports.append((category, text))
        self._reported.set()

    async def channel(self, number: int = 0) -> Channel:
        """The channel with this number, as soon as it is there."""
        async with asyncio.timeout(5):
            while len(self.channels) <= number:
                self._opened.clear()
                await self._opened.wait()
        return self.channels[number]

    async def reported(self, category: str) -> str:
        """The first report of this category, as soon as it is there."""
        async with asyncio.timeout(5):
            while True:
                for found, text in self.reports:
                    if found == category:
                        return text
                self._reported.clear()
                await self._reported.wait()


def config(kind: str, **values: Any) -> ListenerConfig:
    """A validated listener table; network kinds bind to a free loopback port unless told otherwise."""
    if kind != "unix":
        values.setdefault("bind", "127.0.0.1:0")
    return KINDS[kind].model_validate({"kind": kind, **values})


@dataclass
class Pair:
    """PEM files of a certificate and its key."""

    certificate: Path
    key: Path


@dataclass
class Authority:
    """Signs certificates for tests; `ca` is its PEM file."""

    where: Path
    _key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    _serial: int = 0

    def __post_init__(self) -> None:
        self.ca = self.where / "ca.pem"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        now = datetime.datetime.now(datetime.UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, common_name: str = "localhost", *, days: tuple[float, float] = (-1, 1), organization: str | None = None
    ) -> Pair:
        """A certificate valid from and until so many days from now."""
        self._serial += 1
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        if organization is not None:
            names.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(names))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
                ),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        pair = Pair(self.where / f"{self._serial}.pem", self.where / f"{self._serial}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def client(self, pair: Pair | None = None) -> ssl.SSLContext:
        """What a client that trusts this authority uses, with a certificate of its own or without."""
        context = ssl.create_default_context(cafile=self.ca)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        return context


@dataclass
class Client:
    """A raw client of a listener."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def closed(self, within: float = 5.0) -> bytes:
        """Everything until the server closes; fails when it does not within that time."""
        rest = b""
        async with asyncio.timeout(within):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while data := await self.reader.read(65536):
                    rest += data
        return rest
