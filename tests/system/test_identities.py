"""Whose a session is, and how long a login lasts, over real connections and a restart."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection
from broker.client.errors import Refused
from broker.client.session import NotTaken, Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests.broker import Broker, broker
from tests.servers import PATIENCE
from tests.system.resilience import command, eventually, url

pytestmark = pytest.mark.timeout(120)

USERS = """
[access]
no_match = "allow"
[listeners.tcp]
bind = "127.0.0.1:0"
[auth.people]
kind = "static"
[auth.people.users.ann]
password = "anns-pw"
[auth.people.users.bob]
password = "bobs-pw"
"""
SECRET = "a secret of tokens that only tests know"


class Session(Publisher):
    """A client that notes what it gets, and when and how its connection ended."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[bytes] = []
        self.ended = 0.0
        self.told: int | None = None

    @classmethod
    async def login(cls, to: str, username: str, client_id: str, password: str = "", **more: Any) -> Session:
        session = cls()
        options = {"username": username, "password": password or f"{username}s-pw", **more}
        session.attach(await Connection.connect(to, client_id=client_id, handler=session, **options))
        return session

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        if publish.qos:
            conn.ack(PacketType.PUBACK, publish.packet_id)
        self.got.append(publish.payload)

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended, self.told = time.time(), getattr(exc, "code", None)
        super().on_lost(conn, exc)


def lasting(version: int, clean: bool = False) -> dict[str, Any]:
    """A session that is kept, in the words of each version."""
    return {"version": version, "clean_start": clean} | ({"session_expiry": 600} if version == 5 else {})


@pytest.mark.parametrize("version", [4, 5])
async def test_z18_nobody_comes_by_another_users_session(tmp_path: Path, version: int) -> None:
    """Z-18: with her client id, clean or persistent, while she is connected, while she is away, and after a crash: he
    is told that the name is taken (0x85, 3.1.1: 2), she is not disconnected, and her queue is hers alone."""
    taken = 0x85  # 2 in 3.1.1, which our client translates
    running = Broker(tmp_path)
    running.write("00.toml", USERS)
    await asyncio.to_thread(running.start)
    try:

        async def he_is_refused(where: str) -> None:
            for clean in (True, False):
                with pytest.raises(Refused) as refused:
                    await Session.login(where, "bob", "device", **lasting(version, clean))
                assert refused.value.code == taken

        to = url(running)
        ann = await Session.login(to, "ann", "device", **lasting(version))
        assert await ann.conn.subscribe([("private/#", 1)]) == [1]
        sender = await Session.login(to, "bob", "sender")
        await he_is_refused(to)
        await sender.publish("private/live", b"live")
        await eventually(lambda: ann.got == [b"live"], "what is hers")
        assert not ann.ended
        ann.conn.abort()
        await eventually(lambda: ann.ended, "her absence")
        await sender.publish("private/queued", b"queued")
        await he_is_refused(to)
        sender.conn.abort()
        await asyncio.to_thread(running.stop, signal.SIGKILL)
        await asyncio.to_thread(running.start)
        to = url(running)
        await he_is_refused(to)
        again = await Session.login(to, "ann", "device", **lasting(version))
        await eventually(lambda: again.got, "her queue")
        assert again.got == [b"queued"]
        assert (await command(running, "status"))["clients"] == 1
        assert "s-pw" not in running.log()
        await again.disconnect()
    finally:
        await asyncio.to_thread(running.stop)


async def test_z18_unless_client_ids_are_shared(tmp_path: Path) -> None:
    """Z-18: with `shared_client_ids` the name alone counts: whoever comes takes the connection over."""
    with broker(tmp_path, {"00.toml": USERS + "[limits]\nshared_client_ids = true\n"}) as running:
        ann = await Session.login(url(running), "ann", "device", **lasting(5))
        bob = await Session.login(url(running), "bob", "device", **lasting(5))
        await eventually(lambda: ann.ended, "the end of hers")
        assert ann.told == 0x8E
        assert not bob.ended
        await bob.disconnect()


def token(expires: float, **claims: Any) -> str:
    def text(part: dict[str, Any]) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")

    signed = text({"alg": "HS256"}) + b"." + text({"sub": "ann", "exp": expires, **claims})
    signature = hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.mark.parametrize("version", [4, 5])
async def test_a33_who_came_with_a_token_is_disconnected_when_it_ends(tmp_path: Path, version: int) -> None:
    """A-33: 0x87 within 5 s of the end, whether the verdict was fresh or remembered; until then it has its rights, and
    the token is in no log."""
    fragment = (
        f'[listeners.tcp]\nbind = "127.0.0.1:0"\n[auth.jwt]\nsecret = "{SECRET}"\nleeway = 0\n'
        '[auth.people]\nkind = "static"\n[auth.people.users.bob]\npassword = "bobs-pw"\npublish = ["#"]\n'
    )
    with broker(tmp_path, {"00.toml": fragment}) as running:
        to = url(running)
        ends = time.time() + 6
        presented = token(ends, acl={"all": ["a/${username}"]})
        first = await Session.login(to, "ann", "device", presented, version=version)
        calls = (await command(running, "status"))["auth"]["jwt"]["calls"]
        fresh = await Session.login(to, "ann", "device", presented, version=version)
        await eventually(lambda: first.ended, "the end of the connection that was taken over")
        assert (await command(running, "status"))["auth"]["jwt"]["calls"] == calls == 1, "the second was remembered"
        other = await Session.login(to, "ann", "other", presented, version=version)
        bob = await Session.login(to, "bob", "bob")
        assert await fresh.conn.subscribe([("a/ann", 1)]) == [1]
        await fresh.publish("a/ann", b"mine")
        await eventually(lambda: fresh.got == [b"mine"], "its own message")
        assert time.time() < ends
        await eventually(lambda: fresh.ended and other.ended, "the end of both", 12)
        for one in (fresh, other):
            assert 0 <= one.ended - ends <= 5 * PATIENCE
            assert one.told == (0x87 if version == 5 else None)
        with pytest.raises(Refused):
            await Session.login(to, "ann", "device", presented, version=version)
        assert not bob.ended
        await bob.publish("a/x", b"")
        assert presented not in running.log()
        assert presented.rpartition(".")[2] not in running.log()
        await bob.disconnect()


async def test_a33_a_token_without_rights_gives_none(tmp_path: Path) -> None:
    """A-33, Z-01: signed and good, and nothing in it says what its bearer may do."""
    fragment = f'[listeners.tcp]\nbind = "127.0.0.1:0"\n[auth.jwt]\nsecret = "{SECRET}"\n'
    with broker(tmp_path, {"00.toml": fragment}) as running:
        ann = await Session.login(url(running), "ann", "device", token(time.time() + 60))
        with pytest.raises(NotTaken) as refused:
            await ann.publish("a", b"")
        assert refused.value.code == 0x87
        assert await ann.conn.subscribe([("a", 0)]) == [0x87]
        await ann.disconnect()
