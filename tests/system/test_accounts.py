"""Accounts, bans and lock-outs as an operator meets them: on the command line, while a broker runs and without one."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.client.connection import Connection
from broker.client.errors import Refused as ConnectionRefused
from broker.client.session import Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish, Will
from tests.broker import Broker, broker
from tests.clients import Device, Refused
from tests.servers import PATIENCE
from tests.system.resilience import command, eventually

FILE = """
[access]
no_match = "allow"
[auth.accounts]
kind = "file"
passwords = "data/passwords"
rules = "acl.conf"
[listeners.tcp]
bind = "127.0.0.1:0"
"""
SQLITE = """
[access]
no_match = "allow"
[auth.local]
kind = "sqlite"
path = "data/users.db"
create = true
watch = 0
[listeners.tcp]
bind = "127.0.0.1:0"
"""
RULES = "user alice\ntopic readwrite a/#\n"


class Session(Publisher):
    """A client with a will; notes what it gets, and how and when its connection ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = 0.0
        self.told: int | None = None
        self.got: list[str] = []

    @classmethod
    async def login(cls, to: str, username: str, client_id: str, **more: Any) -> Session:
        session = cls()
        will = Will(b"a/will", client_id.encode(), 1)
        session.attach(
            await Connection.connect(
                to, client_id=client_id, handler=session, username=username, password=b"pw", will=will, **more
            )
        )
        return session

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        if publish.qos:
            conn.ack(PacketType.PUBACK, publish.packet_id)
        self.got.append(publish.topic.decode())

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self.ended = time.monotonic()
        self.told = getattr(exc, "code", None)
        super().on_lost(conn, exc)


def prepared(where: Path, text: str = FILE, more: str = "") -> dict[str, str]:
    (where / "acl.conf").write_text(RULES)
    return {"10.toml": text + more}


def done(running: Broker, *arguments: str, stdin: str | None = None) -> str:
    result = running.isthmus(*arguments, stdin=stdin)
    assert result.returncode == 0, (arguments, result.stdout, result.stderr)
    return result.stdout


def logs_in(port: int, name: str, password: str, **more: Any) -> bool:
    try:
        with Device(port, name, password, **more):
            return True
    except Refused:
        return False


def until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.mark.parametrize("text", [FILE, SQLITE], ids=["file", "sqlite"])
def test_accounts_are_edited_while_the_broker_runs(tmp_path: Path, text: str) -> None:
    """A-46: a change takes effect at once, for who logs in and who is connected."""
    fragments = prepared(tmp_path, text)
    running = Broker(tmp_path)
    for name, fragment in fragments.items():
        running.write(name, fragment)
    assert "no broker is running" in done(running, "user", "add", "alice", stdin="one\n")
    with broker(tmp_path, fragments) as running:
        port = running.port
        assert logs_in(port, "alice", "one")
        assert running.isthmus("user", "add", "alice", stdin="x\n").returncode == 1, "there is one already"
        done(running, "user", "add", "bob", stdin="bob-pw\n")
        assert logs_in(port, "bob", "bob-pw")
        with Device(port, "alice", "one", client_id="stays") as stays:
            assert logs_in(port, "alice", "one"), "a verdict that may be remembered"
            done(running, "user", "passwd", "alice", stdin="two\n")
            assert not logs_in(port, "alice", "one")
            assert logs_in(port, "alice", "two")
            assert not stays.disconnects
            assert "1 clients disconnected" in done(running, "user", "passwd", "alice", "--disconnect", stdin="3\n")
            until(lambda: stays.disconnects)
        with Device(port, "bob", "bob-pw") as bob:
            done(running, "user", "del", "bob")
            until(lambda: bob.disconnects)
        assert not logs_in(port, "bob", "bob-pw")
        listed = json.loads(done(running, "user", "list", "--json"))
        assert listed == [{"name": "alice", "password": "argon2", "superuser": False}]
        assert running.isthmus("user", "del", "bob").returncode == 1
        assert running.isthmus("user", "add", "carol", stdin="\n").returncode == 1, "an empty password"
        log = running.log()
    assert "bob-pw" not in log
    assert "$argon2" not in log


def test_the_first_account_may_come_before_the_first_run(tmp_path: Path) -> None:
    running = Broker(tmp_path)
    running.write("10.toml", FILE.replace('"acl.conf"', '"data/acl.conf"').replace('no_match = "allow"', ""))
    done(running, "user", "add", "alice", stdin="pw\n")
    assert (tmp_path / "data/passwords").stat().st_mode & 0o777 == 0o600
    running.start()
    try:
        assert not (tmp_path / "data/demo-password").exists()
        with Device(running.port, "alice", "pw") as alice:
            alice.subscribe("telemetry/alice/#")
            alice.publish("telemetry/alice/x", b"1")
            assert alice.receive().payload == b"1"
    finally:
        running.stop()


def test_which_accounts_are_meant_must_be_clear(tmp_path: Path) -> None:
    running = Broker(tmp_path)
    (tmp_path / "acl.conf").write_text(RULES)
    running.write("10.toml", FILE)
    running.write("11.toml", SQLITE.partition("[listeners")[0].replace('[access]\nno_match = "allow"\n', ""))
    both = running.isthmus("user", "list")
    assert (both.returncode, "--instance" in both.stderr) == (2, True)
    done(running, "user", "add", "alice", "--instance", "local", stdin="pw\n")
    assert json.loads(done(running, "user", "list", "--instance", "accounts", "--json")) == []
    with sqlite3.connect(tmp_path / "data/users.db") as connection:
        assert connection.execute("select username, is_superuser from mqtt_user").fetchall() == [("alice", 0)]
    assert running.isthmus("user", "list", "--instance", "nobody").returncode == 2


def test_a_change_the_running_broker_cannot_take_is_said(tmp_path: Path) -> None:
    with broker(tmp_path, prepared(tmp_path)) as running:
        running.write("20.toml", '[auth.late]\nkind = "file"\npasswords = "late"\n')
        result = running.isthmus("user", "add", "x", "--instance", "late", stdin="pw\n")
        assert result.returncode == 1
        assert "isthmus reload" in result.stderr
        assert (tmp_path / "late").read_text().startswith("x:$argon2id$")


def test_bans_disconnect_refuse_and_survive_a_restart(tmp_path: Path) -> None:
    """A ban hits who is connected, whoever comes (0x8A, 3.x: 5) before any backend, and the will of who it hits."""
    running = Broker(tmp_path)
    for name, text in prepared(tmp_path).items():
        running.write(name, text)
    for user in ("alice", "bob"):
        done(running, "user", "add", user, stdin="pw\n")
    result = running.isthmus("ban", "add", "--user", "bob")
    assert result.returncode == 4
    assert "no broker is running" in result.stderr
    running.start()
    try:
        port = running.port
        with Device(port, "alice", "pw") as alice, Device(port, "bob", "pw", client_id="b1") as bob:
            alice.subscribe("a/#")
            assert "1 clients disconnected" in done(running, "ban", "add", "--client", "b1", "--reason", "noisy")
            until(lambda: bob.disconnects)
            calls = running.status()["auth"]["accounts"]["calls"]
            for version, words in ((5, "Banned"), (4, "ot authorized")):
                with pytest.raises(Refused, match=words), Device(port, "bob", "pw", client_id="b1", version=version):
                    pass
            assert running.status()["auth"]["accounts"]["calls"] == calls, "no backend is asked"
            assert not alice.disconnects
        assert logs_in(port, "bob", "pw", client_id="b2")
        done(running, "ban", "add", "--user", "bob")
        done(running, "ban", "add", "--address", "10.0.0.0/8", "--for", "1h")
        done(running, "ban", "add", "--address", "::1", "--for", "1s")
        assert not logs_in(port, "bob", "pw", client_id="b2")
        until(lambda: running.status()["access"]["bans"] == 3)
        assert running.status()["access"]["refused"]["banned"] >= 3
        assert running.isthmus("ban", "add", "--address", "10.0.0.1/8").returncode == 1
        assert running.isthmus("ban", "add", "--user", "x", "--for", "soon").returncode == 2
        assert running.isthmus("ban", "add").returncode == 2
        running.stop()
        running.start()
        rows = json.loads(done(running, "ban", "list", "--json"))
        assert [row.get("client") or row.get("user") or row.get("address") for row in rows] == [
            "b1", "bob", "10.0.0.0/8",
        ]  # fmt: skip
        assert rows[0]["reason"] == "noisy"
        assert 3_500 < rows[2]["left_s"] <= 3_600
        port = running.port
        assert not logs_in(port, "bob", "pw", client_id="b2")
        done(running, "ban", "del", "--user", "bob")
        assert logs_in(port, "bob", "pw", client_id="b2")
        assert not logs_in(port, "bob", "pw", client_id="b1")
        assert running.isthmus("ban", "del", "--user", "bob").returncode == 1
        done(running, "ban", "add", "--address", "127.0.0.0/8")
        assert not logs_in(port, "alice", "pw")
        done(running, "ban", "del", "--address", "127.0.0.0/8")
        running.stop()
        running.start()
        assert logs_in(running.port, "bob", "pw", client_id="b2"), "a ban that was lifted is lifted for good"
    finally:
        running.stop()


def test_a_banned_clients_will_is_not_published(tmp_path: Path) -> None:
    """Z-12: not at the ban, and neither when its delay is over."""
    running = Broker(tmp_path)
    for name, text in prepared(tmp_path).items():
        running.write(name, text)
    for user in ("alice", "bob"):
        done(running, "user", "add", user, stdin="pw\n")
    (tmp_path / "acl.conf").write_text("topic readwrite a/#\n")
    running.start()
    try:
        port = running.port
        with Device(port, "alice", "pw") as alice:
            alice.subscribe("a/#")
            gone = Device(port, "bob", "pw", client_id="b1")
            gone.paho.will_set("a/will", b"dead", 1)
            gone.connect()
            done(running, "ban", "add", "--client", "b1")
            until(lambda: gone.disconnects)
            gone.paho.loop_stop()
            other = Device(port, "bob", "pw", client_id="b2")
            other.paho.will_set("a/will", b"kicked", 1)
            other.connect()
            done(running, "clients", "kick", "b2")
            assert alice.receive().payload == b"kicked", "the one that was only kicked"
            other.paho.loop_stop()
    finally:
        running.stop()


def test_z33_a_ban_by_user_name_ends_every_session_of_that_user_at_once(tmp_path: Path) -> None:
    """Z-33: whatever the protocol version and the way in; MQTT 5 is told, and none of the wills is published (Z-12)."""
    running = Broker(tmp_path)
    for name, text in prepared(tmp_path, FILE + '[listeners.ws]\nbind = "127.0.0.1:0"\n').items():
        running.write(name, text)
    for user in ("alice", "bob"):
        done(running, "user", "add", user, stdin="pw\n")
    (tmp_path / "acl.conf").write_text("topic readwrite a/#\n")
    running.start()

    async def main() -> None:
        tcp, ws = f"mqtt://{running.ready['tcp']}", f"ws://{running.ready['ws']}/mqtt"
        watch = await Session.login(tcp, "alice", "watch")
        assert await watch.conn.subscribe([("a/#", 1)]) == [1]
        sessions = [
            await Session.login(tcp, "bob", "five", session_expiry=600),
            await Session.login(tcp, "bob", "four", version=4, clean_start=False),
            await Session.login(ws, "bob", "web"),
        ]
        began = time.monotonic()
        answer = await command(running, "ban.add", kind="user", name="bob")
        await eventually(lambda: all(session.ended for session in sessions), "the end of all three")
        assert answer["disconnected"] == 3
        assert max(session.ended for session in sessions) - began <= 3.0 * PATIENCE
        assert [session.told for session in sessions] == [0x98, None, 0x98]
        with pytest.raises(ConnectionRefused) as refused:
            await Session.login(tcp, "bob", "five")
        assert refused.value.code == 0x8A
        await watch.publish("a/still", b"")
        await eventually(lambda: watch.got, "her own message")
        assert watch.got == ["a/still"]
        assert not watch.ended
        await watch.disconnect()

    try:
        asyncio.run(main())
    finally:
        running.stop()


def test_a51_wrong_passwords_lock_one_user_out_from_one_address(tmp_path: Path) -> None:
    """A-51: five in five minutes, then 0x8A for the right one too; other users and other addresses still work."""
    running = Broker(tmp_path)
    for name, text in prepared(tmp_path).items():
        running.write(name, text)
    for user in ("alice", "bob"):
        done(running, "user", "add", user, stdin="pw\n")
    running.start()
    try:
        port = running.port
        assert [asyncio.run(connect(port, "alice", "wrong")) for _ in range(6)] == [0x86] * 5 + [0x8A]
        assert asyncio.run(connect(port, "alice", "pw")) == 0x8A
        assert asyncio.run(connect(port, "alice", "pw", "127.0.0.2")) == 0
        assert asyncio.run(connect(port, "bob", "pw")) == 0
        access = running.status()["access"]
        assert (access["locked_out"], access["lockouts"], access["refused"]) == (1, 1, {"locked_out": 2})
        (row,) = json.loads(done(running, "ban", "list", "--json"))
        assert (row["user"], row["address"], row["by"]) == ("alice", "127.0.0.1", "lockout")
        assert 590 < row["left_s"] <= 600
        assert "'alice' from 127.0.0.1 is refused for 600 s" in running.log()
        done(running, "ban", "del", "--user", "alice")
        assert asyncio.run(connect(port, "alice", "pw")) == 0
    finally:
        running.stop()


def test_access_flush_makes_the_broker_ask_again(tmp_path: Path) -> None:
    """A-46: somebody else changed the table; a flush reaches who is connected and who logs in."""
    running = Broker(tmp_path)
    for name, text in prepared(tmp_path, SQLITE.replace('no_match = "allow"', 'cache_ttl = "1h"')).items():
        running.write(name, text)
    for user in ("alice", "bob"):
        done(running, "user", "add", user, stdin="pw\n")
    running.start()
    try:
        with (
            sqlite3.connect(tmp_path / "data/users.db", isolation_level=None) as table,
            Device(running.port, "alice", "pw", client_id="c1") as alice,
            Device(running.port, "bob", "pw", client_id="c2") as bob,
        ):
            table.execute("insert into mqtt_acl (username, access, topic) values ('alice', 3, 'a/#')")
            with pytest.raises(Refused):
                alice.subscribe("a/b")
            done(running, "access", "flush", "--client", "c1")
            until(lambda: subscribes(alice, "a/b"))
            table.execute("delete from mqtt_user where username = 'bob'")
            assert "1 verdicts" in done(running, "access", "flush", "--user", "bob")
            until(lambda: bob.disconnects)
            assert not alice.disconnects
            table.execute("delete from mqtt_user")
            done(running, "access", "flush", "--all")
            until(lambda: alice.disconnects)
        assert running.isthmus("access", "flush").returncode == 2
        assert running.isthmus("access", "flush", "--client", "nobody").returncode == 1
    finally:
        running.stop()


def subscribes(device: Device, filter: str) -> bool:
    try:
        device.subscribe(filter)
    except Refused:
        return False
    return True


async def connect(port: int, username: str, password: str, source: str = "127.0.0.1") -> int:
    """The reason code of an MQTT 5 CONNECT that comes from this address."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    body = b"\x00\x04MQTT\x05\xc2\x00\x3c\x00"
    for text in ("c-" + username, username, password):
        body += len(text).to_bytes(2, "big") + text.encode()
    writer.write(bytes((0x10, len(body))) + body)
    try:
        async with asyncio.timeout(10):
            answer = await reader.readexactly(4)
    finally:
        writer.close()
    return answer[3]
