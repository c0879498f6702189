"""A reload takes away what let a client in: it is disconnected, the others are not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.admin.control import CommandFailed
from broker.client.connection import Connection
from broker.client.session import Publisher
from broker.mqtt.packets import Publish, Will
from tests.broker import Broker, broker
from tests.servers import PATIENCE
from tests.system.resilience import ask, command, eventually
from tests.unit.net.fakes import Authority, Pair
from tests.unit.net.test_client_certificates import revoke

pytestmark = pytest.mark.timeout(120)

SOON = 5.0
"""Seconds within which a reload must have had its effect."""

BASE = """
[listeners.tcp]
bind = "127.0.0.1:0"
[auth.people]
kind = "static"
[auth.people.users.dev]
password = "pw"
publish = ["a/#"]
subscribe = ["a/#"]
[auth.people.users.watch]
password = "pw"
superuser = true
"""
OTHERS = """
[auth.others]
kind = "static"
[auth.others.users.guest]
password = "pw"
publish = ["a/#"]
"""


class Client(Publisher):
    """Notes how and when its connection ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = 0.0
        self.told: int | None = None
        self.got: list[str] = []

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.got.append(publish.topic.decode())

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended = time.monotonic()
        self.told = getattr(exc, "code", None)
        super().on_lost(conn, exc)


@asynccontextmanager
async def logged_in(
    running: Broker, username: str | None, client_id: str, bind: str | None = None
) -> AsyncIterator[Client]:
    client = Client()
    client.attach(
        await Connection.connect(
            f"mqtt://{running.ready['tcp']}", client_id=client_id, handler=client, username=username, bind=bind,
            password=None if username is None else b"pw", will=None if username is None else Will(b"a/will", b"gone"),
        )
    )  # fmt: skip
    try:
        yield client
    finally:
        await client.disconnect()


async def reload(running: Broker, fragments: Mapping[str, str]) -> float:
    """Reload with these fragments; when that began."""
    for name, text in fragments.items():
        running.write(name, text)
    began = time.monotonic()
    await command(running, "reload")
    return began


async def cut(client: Client, began: float) -> None:
    """The client hears 0x87 soon after."""
    await eventually(lambda: client.ended, "the end of the connection")
    assert client.told == 0x87
    assert client.ended - began <= SOON * PATIENCE


def test_who_comes_from_where_nobody_may_come_from_any_more_is_cut(tmp_path: Path) -> None:
    """Its will is not published either."""

    async def main(running: Broker) -> None:
        async with (
            logged_in(running, "watch", "w") as watch,
            logged_in(running, "dev", "near") as near,
            logged_in(running, "dev", "far", "127.0.0.2") as far,
        ):
            await watch.conn.subscribe([("a/#", 0)])
            await cut(far, await reload(running, {"10.toml": '[auth.address]\ndeny = ["127.0.0.2"]\n'}))
            await near.publish("a/x", b"")
            await eventually(lambda: watch.got, "a message")
            assert watch.got == ["a/x"]
            await cut(near, await reload(running, {"10.toml": '[auth.address]\nallow = ["127.0.0.3"]\n'}))
            await eventually(lambda: watch.ended, "the end of the last connection")

    with broker(tmp_path, {"00.toml": BASE}) as running:
        asyncio.run(main(running))
        assert "127.0.0.2 (deny)" in running.log()


def test_who_came_through_what_is_not_asked_any_more_is_cut(tmp_path: Path) -> None:
    async def main(running: Broker) -> None:
        async with (
            logged_in(running, "dev", "d") as dev,
            logged_in(running, "guest", "g") as guest,
            logged_in(running, None, "n") as nobody,
        ):
            await cut(nobody, await reload(running, {"20.toml": "[access]\nallow_anonymous = false\n"}))
            assert not dev.ended
            assert not guest.ended
            order = '[access]\norder = ["people"]\n'
            await cut(guest, await reload(running, {"20.toml": order}))
            assert await dev.publish("a/x", b"") in (0, 0x10)

    with broker(
        tmp_path, {"00.toml": BASE, "10.toml": OTHERS, "20.toml": "[access]\nallow_anonymous = true\n"}
    ) as running:
        asyncio.run(main(running))


def test_what_a_listener_names_anew_counts_for_who_is_connected(tmp_path: Path) -> None:
    """Rules of a source that is added to the listener's list reach who came in before."""
    rules = '[auth.rules]\nkind = "file"\nrules = "acl"\n'
    (tmp_path / "acl").write_text("user dev\ntopic deny a/secret\n")

    async def main(running: Broker) -> None:
        async with logged_in(running, "dev", "d") as dev:
            assert await dev.conn.subscribe([("a/secret", 0)]) == [0]
            listener = BASE.replace("[auth.people]", 'auth = ["rules", "people"]\n[auth.people]', 1)
            await reload(running, {"00.toml": listener})
            assert await dev.conn.subscribe([("a/secret", 0)]) == [0x87]
            assert not dev.ended

    first = BASE.replace("[auth.people]", 'auth = ["people"]\n[auth.people]', 1)
    with broker(tmp_path, {"00.toml": first, "10.toml": rules}) as running:
        asyncio.run(main(running))


def test_a_reload_that_is_refused_cuts_nobody(tmp_path: Path) -> None:
    async def main(running: Broker) -> None:
        async with logged_in(running, "dev", "d") as dev:
            taken = f'[listeners.second]\nkind = "tcp"\nbind = "{running.ready["tcp"]}"\n'
            done = await asyncio.to_thread(
                lambda: (
                    running.write("10.toml", '[auth.address]\ndeny = ["127.0.0.1"]\n' + taken),
                    running.reload(),
                )[1]
            )
            assert done.returncode != 0
            assert await dev.publish("a/x", b"") in (0, 0x10)
            assert not dev.ended

    with broker(tmp_path, {"00.toml": BASE}) as running:
        asyncio.run(main(running))


@pytest.mark.parametrize("kind", ["tls", "wss"])
def test_who_shows_a_certificate_that_is_revoked_is_cut(tmp_path: Path, kind: str) -> None:
    authority = Authority(tmp_path)
    server, good, stolen = authority.issue(), authority.issue("good"), authority.issue("stolen")
    crl = revoke(authority, tmp_path / "crl.pem")
    table = (
        f'[listeners.devices]\nkind = "{kind}"\nbind = "127.0.0.1:0"\ncertificate = "{server.certificate}"\n'
        f'key = "{server.key}"\nclient_ca = "{authority.ca}"\nclient_crl = "{crl}"\nusername_from = "cn"\n'
        '[access]\nno_match = "allow"\n'
    )

    async def connect(running: Broker, pair: Pair) -> Client:
        client = Client()
        scheme, path = ("mqtts", "") if kind == "tls" else ("wss", "/mqtt")
        client.attach(
            await Connection.connect(
                f"{scheme}://localhost:{running.ready['devices'].rpartition(':')[2]}{path}", handler=client,
                client_id=pair.certificate.stem, tls=authority.client(pair), will=Will(b"a/will", b"gone"),
            )
        )  # fmt: skip
        return client

    async def main(running: Broker) -> None:
        clients = [await connect(running, pair) for pair in (good, stolen)]
        assert await clients[0].conn.subscribe([("a/#", 0)]) == [0]
        revoke(authority, crl, stolen)
        await cut(clients[1], await reload(running, {}))
        with pytest.raises(ConnectionError):
            await connect(running, stolen)
        await clients[0].publish("a/x", b"")
        await eventually(lambda: clients[0].got, "its own message")
        assert clients[0].got == ["a/x"], "no will"
        crl.write_text("-----BEGIN X509 CRL-----\nbroken\n-----END X509 CRL-----\n")
        with pytest.raises(CommandFailed, match="client_crl"):
            await reload(running, {})
        assert "client_crl" in ask(running, "status")["listeners"]["devices"]["alarm"]
        assert not clients[0].ended
        await clients[0].disconnect()

    with broker(tmp_path / "broker", {"00.toml": table}) as running:
        asyncio.run(main(running))
        assert "its certificate was revoked" in running.log()
