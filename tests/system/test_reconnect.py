"""Everybody comes back at once after a restart of the broker, and the directory is not trampled down."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
from aiohttp import web

from broker.mqtt import packets
from tests import servers
from tests.broker import Broker
from tests.integration.fake_ldap import FakeLdap
from tests.integration.http_service import service
from tests.servers import PATIENCE
from tests.system.canary import canary_apart
from tests.system.resilience import SLOWEST, SOAK

pytestmark = pytest.mark.timeout(180)

RATE = 10_000 / 30
"""Clients a second: 10 000 of them are back within half a minute."""
LATENCY = 0.01
"""Seconds the stand-in of a directory takes for each answer."""
MOST = 64
"""Calls a directory may see at the same time."""

FRAGMENT = """
[access]
no_match = "allow"
[auth.ldap]
servers = ["{url}"]
tls = "none"
bind_dn = "{admin}"
bind_password = "{password}"
base_dn = "{base}"
timeout = "10s"
[listeners.tcp]
bind = "127.0.0.1:0"
"""

BIND, UNBIND, SEARCH, ABANDON = 0x60, 0x42, 0x63, 0x50
ANSWERS = (0x61, 0x65)
"""The end of a bind and of a search."""


class Device(asyncio.Protocol):
    """One connection of a client. `connack` has its reason code, `ended` that it is over."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.connack: asyncio.Future[int] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data[0] == 0x20 and not self.connack.done():
            self.connack.set_result(data[3])

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)
        if not self.connack.done():
            self.connack.set_result(-1)


@dataclass
class Crowd:
    """Clients that stay connected: whoever loses its connection tries again until it is let in."""

    port: int
    size: int
    spread: float
    """Seconds over which they come back."""
    refused: Counter[int] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    """Seconds from each CONNECT that was accepted to its CONNACK."""
    devices: list[Device] = field(default_factory=list)

    async def come(self) -> float:
        """All of them, over `spread` seconds; returns how long it took until the last one was in."""
        self.refused.clear()
        self.waits.clear()
        began = time.monotonic()
        self.devices = await asyncio.gather(*(self._one(number) for number in range(self.size)))
        return time.monotonic() - began

    async def gone(self) -> None:
        """Until the broker has left every one of them."""
        async with asyncio.timeout(30):
            await asyncio.gather(*(device.ended for device in self.devices))

    def leave(self) -> None:
        for device in self.devices:
            device.transport.abort()

    async def attempt(self, number: int) -> int:
        """One client that tries once; the reason code of its CONNACK."""
        await asyncio.sleep(self.spread * number / self.size)
        device, code = await self._connect(number)
        self.devices.append(device)
        return code

    async def _connect(self, number: int) -> tuple[Device, int]:
        packet = packets.encode_connect(
            packets.Connect(
                version=5, clean_start=False, keep_alive=0, client_id=f"c{number}", username=f"u{number}",
                password=b"pw-%d" % number,
            )
        )  # fmt: skip
        _, device = await asyncio.get_running_loop().create_connection(Device, "127.0.0.1", self.port)
        began = time.monotonic()
        device.transport.write(packet)
        code = await device.connack
        if code == 0:
            self.waits.append(time.monotonic() - began)
        return device, code

    async def _one(self, number: int) -> Device:
        await asyncio.sleep(self.spread * number / self.size)
        while True:
            with contextlib.suppress(OSError):
                device, code = await self._connect(number)
                if code == 0:
                    return device
                self.refused[code] += 1
                device.transport.abort()
            await asyncio.sleep(random.uniform(0.2, 1.0))

    def slowest(self, share: float) -> float:
        """Milliseconds within which this share of the accepted CONNECTs was answered."""
        return sorted(self.waits)[int(share * (len(self.waits) - 1))] * 1000


class Counting:
    """Stands before a directory and counts the requests it has not answered yet."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.busy = self.most = self.requests = 0
        self.connections = 0
        self.most_connections = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Counting]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting = 0

        def note(tag: int) -> None:
            nonlocal waiting
            if tag in (BIND, SEARCH):
                waiting += 1
                self.busy += 1
                self.requests += 1
                self.most = max(self.most, self.busy)
            elif tag in ANSWERS:
                waiting -= 1
                self.busy -= 1

        self.connections += 1
        self.most_connections = max(self.most_connections, self.connections)
        try:
            up, down = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                ways = [asyncio.create_task(_pass_on(*way, note)) for way in ((reader, down), (up, writer))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            finally:
                down.close()
        finally:
            self.busy -= waiting
            self.connections -= 1
            writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[int], None]) -> None:
    """Hand on whole LDAP messages, telling the tag of each operation. RFC 4511 4.1.1."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readexactly(2)
            length = head[1]
            if length & 0x80:
                more = await reader.readexactly(length & 0x7F)
                head += more
                length = int.from_bytes(more, "big")
            body = await reader.readexactly(length)
            assert head[0] == 0x30
            assert body[0] == 0x02
            note(body[2 + body[1]])
            writer.write(head + body)


def people(directory: servers.Slapd, count: int) -> None:
    """Users ``u0`` to ``u<count>``, each with a password of its own."""
    connection = directory.connect()
    try:
        for number in range(count):
            name = f"u{number}"
            assert connection.add(
                f"uid={name},{directory.people_dn}", ["inetOrgPerson"],
                {"uid": name, "cn": name, "sn": name, "userPassword": f"pw-{number}"},
            ), connection.result  # fmt: skip
    finally:
        connection.unbind()


@contextlib.asynccontextmanager
async def running(where: Path, fragment: str) -> AsyncIterator[Broker]:
    broker = Broker(where)
    broker.write("10.toml", fragment)
    await asyncio.to_thread(broker.start)
    try:
        yield broker
    finally:
        await asyncio.to_thread(broker.stop)


async def restart(broker: Broker, crowd: Crowd, how: signal.Signals) -> None:
    await asyncio.to_thread(broker.stop, how)
    await crowd.gone()
    await asyncio.to_thread(broker.start)
    crowd.port = broker.port


async def come_back(broker: Broker, crowd: Crowd) -> dict[str, Any]:
    """Everybody comes back, in twice the time over which they come and 5 s. Returns the broker's status then."""
    async with asyncio.timeout((2 * crowd.spread + 5) * PATIENCE):
        took = await crowd.come()
    print(
        f"{crowd.size} clients back after {took:.1f} s; CONNACK p50 {crowd.slowest(0.5):.0f} ms, "
        f"p99 {crowd.slowest(0.99):.0f} ms, slowest {crowd.slowest(1):.0f} ms; refusals {dict(crowd.refused)}"
    )
    status: dict[str, Any] = await asyncio.to_thread(broker.status)
    assert status["clients"] == crowd.size
    assert set(crowd.refused) <= {0x89}, "busy is the only reason to wait"
    assert status["auth"]["ldap"]["state"] == "ok"
    assert status["auth"]["ldap"]["errors"] == 0
    return status


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_r18_a_crowd_is_back_in_time_and_slapd_sees_64_calls_at_most(
    tmp_path: Path, start_slapd: Callable[..., servers.Slapd], record_property: Callable[[str, Any], None]
) -> None:
    """R-18: 10 000 clients in 30 s in the long form, as many a second in the short one."""
    size = 10_000 if SOAK else 1_000
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < size + 200:
        pytest.skip(f"{size} connections need more descriptors than this account may have")
    directory = await asyncio.to_thread(start_slapd)
    await asyncio.to_thread(people, directory, size)
    async with Counting(directory.port).open() as counting:
        fragment = FRAGMENT.format(
            url=f"ldap://127.0.0.1:{counting.port}",
            admin=directory.admin_dn,
            password=directory.admin_password,
            base=directory.people_dn,
        )
        async with running(tmp_path, fragment + "max_connections = 20000\n") as broker:
            crowd = Crowd(broker.port, size, size / RATE)
            await come_back(broker, crowd)
            await restart(broker, crowd, signal.SIGKILL)
            counting.most = counting.most_connections = counting.requests = 0
            status = await come_back(broker, crowd)
            crowd.leave()
    print(f"{counting.requests} requests, {counting.most} at once over {counting.most_connections} connections")
    record_property("calls_at_once", counting.most)
    assert status["auth"]["ldap"]["calls"] == size
    assert counting.requests >= 2 * size, "each was looked up and bound"
    assert 1 < counting.most <= MOST
    assert counting.most_connections <= 2 * MOST


async def test_a40_a_thousand_at_once_and_a_service_that_takes_two_seconds(tmp_path: Path) -> None:
    """A-40: it sees 64 calls at a time, some wait, the rest is told to come back; who is connected feels nothing."""

    async def slow(request: web.Request, body: bytes) -> web.StreamResponse:
        await asyncio.sleep(2.0)
        return web.json_response({"result": "allow"})

    fragment = (  # nobody waits for longer than 5 s: calls begin after 0, 2 and 4 s
        '[access]\nno_match = "allow"\n[listeners.tcp]\nbind = "127.0.0.1:0"\n'
        '[auth.people]\nkind = "static"\n[auth.people.users.canary]\npassword = "pw"\n'
        '[auth.web]\nkind = "http"\nurl = "{url}/"\npool = 64\ntimeout = "5s"\n'
    )
    async with service(slow) as web_service, running(tmp_path, fragment.format(url=web_service.url)) as broker:
        to = f"mqtt://127.0.0.1:{broker.port}"
        async with canary_apart(to, username="canary", password="pw") as canary:
            crowd = Crowd(broker.port, 1_000, 0.2)
            codes = Counter(await asyncio.gather(*(crowd.attempt(number) for number in range(1_000))))
            status = await asyncio.to_thread(broker.status)
        crowd.leave()
    print(f"{dict(codes)}, {web_service.most} calls at once, canary {canary.slowest * 1000:.0f} ms")
    assert set(codes) == {0, 0x89}
    assert 64 <= codes[0] <= 64 * 3
    assert codes.total() == 1_000
    assert web_service.most == 64
    assert status["auth"]["web"]["waiting"] == status["auth"]["web"]["running"] == 0
    assert canary.lost == 0
    canary.check(1.0 * PATIENCE)
    assert quantiles(canary.trips, n=10)[-1] <= SLOWEST, "nine of ten"


async def test_r18_a_directory_that_takes_its_time_sees_64_calls_at_most(tmp_path: Path) -> None:
    """R-18 where each answer takes as long as over a network: calls do pile up."""
    busy = most = 0

    async def before(kind: str) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(LATENCY)
        busy -= 1

    async with FakeLdap() as directory:
        directory.before = before
        fragment = FRAGMENT.format(url=directory.url, admin="cn=svc", password="svc-pw", base="dc=x")
        async with running(tmp_path, fragment.replace("[listeners", "exact_name = false\n[listeners")) as broker:
            crowd = Crowd(broker.port, 1_000, 1_000 / RATE)
            await come_back(broker, crowd)
            assert 1 < most <= MOST
            assert directory.open <= MOST
            crowd.leave()
