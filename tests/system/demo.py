"""The main job, hop by hop, on real servers: `make demo`.

A directory, a Kafka, a mosquitto and the broker are started on free loopback ports, the broker with the shipped
example fragments. One line per hop with a tick and its time; exit code 1 at the first hop that is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests import fragments, servers
from tests.broker import Broker
from tests.clients import Device, Refused

T = TypeVar("T")
LIMIT = 15.0
"""Seconds a hop may take."""


class Missing(Exception):
    """A hop did not happen."""


def expect(right: bool, seen: object) -> None:
    """Raises Missing with what was seen instead."""
    if not right:
        raise Missing(f"seen instead: {seen}")


def say(mark: str, text: str, seconds: float) -> None:
    print(f" {mark} {text:76} {seconds * 1000:8.1f} ms", flush=True)


@contextlib.contextmanager
def hop(text: str) -> Iterator[None]:
    """Times one hop and prints its line; whatever goes wrong inside is the demo's end."""
    began = time.monotonic()
    try:
        yield
    except (Refused, OSError, RuntimeError, ValueError, Missing) as error:
        say("✗", text, time.monotonic() - began)
        raise Missing(f"{text}: {error or type(error).__name__}") from error
    say("✓", text, time.monotonic() - began)


def until(look: Callable[[], T | None], what: str, seconds: float = LIMIT) -> T:
    """The first answer of `look` that is not None."""
    deadline = time.monotonic() + seconds * servers.PATIENCE
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(0.01)
    raise Missing(f"{what} not there after {seconds:g} s")


def start(stack: contextlib.ExitStack, what: str, service: contextlib.AbstractContextManager[T]) -> T:
    with hop(f"start {what}"):
        return stack.enter_context(service)


def row(path: Path, payload: bytes) -> tuple[Any, ...] | None:
    """The row of the SQLite sink with that payload."""
    if not path.exists():
        return None
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db,
    ):
        found: tuple[Any, ...] | None = db.execute(
            "select clientid, username, topic from messages where cast(payload as blob) = ?", (payload,)
        ).fetchone()
        return found
    return None


def run(stack: contextlib.ExitStack, where: Path) -> None:
    """Every hop in order."""
    slapd = start(stack, "slapd with the people alice (sensors) and bob (operators)", servers.slapd())
    kafka = start(stack, "Apache Kafka in KRaft mode", servers.kafka(restarts=False))
    peer = start(stack, "mosquitto, headquarters", servers.mosquitto(username="region-1", password="hq-pw"))
    with hop("create the Kafka topic telemetry"):
        asyncio.run(kafka.create_topic("telemetry", 3))
    broker = Broker(where)
    broker.write("00-broker.toml", fragments.base())
    broker.write("20-auth-ldap.toml", fragments.ldap(slapd.url, where, slapd.admin_password))
    broker.write("30-sink-kafka.toml", fragments.kafka(kafka.bootstrap))
    broker.write("31-sink-sqlite.toml", fragments.sqlite())
    broker.write("40-bridge-hq.toml", fragments.bridge(peer.url, where, "hq-pw"))
    stack.callback(lambda: broker._process and broker.stop())
    try:
        with hop("start isthmus with five fragments in conf.d"):
            broker.start()
        hops(stack, broker, kafka, peer)
    except Missing:
        if broker._process is not None:
            print(f"\nthe end of the broker's log:\n{broker.process.tail(40)}", file=sys.stderr)
        raise


def hops(stack: contextlib.ExitStack, broker: Broker, kafka: servers.Kafka, peer: servers.Mosquitto) -> None:
    payload = b'{"value": 21.5}'
    with hop("mosquitto: a subscriber at headquarters"):
        headquarters = stack.enter_context(Device(peer.port, "region-1", "hq-pw", client_id="headquarters", version=4))
        headquarters.subscribe("region-1/telemetry/#")
    with hop("LDAP: alice's wrong password is refused"):
        try:
            Device(broker.port, "alice", "not-hers").connect()
            raise Missing("the broker let her in")
        except Refused as refused:
            expect(any(word in refused.reason.lower() for word in ("not authorized", "user name or password")), refused)
    with hop("LDAP: alice logs in by search and bind"):
        alice = stack.enter_context(Device(broker.port, "alice", "alice-pw", client_id="alice-sensor"))
    with hop("LDAP: bob logs in over MQTT 3.1.1 and may read telemetry/#, as an operator"):
        bob = stack.enter_context(Device(broker.port, "bob", "bob-pw", client_id="bob-desk", version=4))
        bob.subscribe("telemetry/#")
    with hop("rights: alice may not write another's telemetry"):
        try:
            alice.publish("telemetry/bob/temperature", payload)
            raise Missing("the broker took it")
        except Refused as refused:
            expect("ot authorized" in refused.reason, refused)
    with hop("publish: telemetry/alice/temperature at QoS 1 is acknowledged"):
        alice.publish("telemetry/alice/temperature", payload)
    with hop("subscriber: bob has it"):
        message = bob.receive(LIMIT)
        expect(message.payload == payload, message.payload)
    with hop("Kafka: the record is in topic telemetry, keyed by the client id"):
        records = asyncio.run(kafka.read("telemetry", 1, LIMIT))
        expect([(r.key, r.value) for r in records] == [(b"alice-sensor", payload)], records)
    with hop("SQLite: the row is in data/telemetry.db"):
        found = until(lambda: row(broker.data / "telemetry.db", payload), "the row")
        expect(found == ("alice-sensor", "alice", "telemetry/alice/temperature"), found)
    with hop("bridge out: mosquitto has region-1/telemetry/alice/temperature"):
        message = headquarters.receive(LIMIT)
        expect((message.topic, message.payload) == ("region-1/telemetry/alice/temperature", payload), message.topic)
    with hop("bridge in: a command published at headquarters reaches alice"):
        alice.subscribe("commands/alice/#")
        headquarters.publish("region-1/commands/alice/led", b"on")
        message = alice.receive(LIMIT)
        expect((message.topic, message.payload) == ("commands/alice/led", b"on"), message.topic)
    with hop("stop: isthmus drains and exits with 0"):
        code = broker.stop()
        expect(code == 0, f"exit code {code}")


def main() -> int:
    began = time.monotonic()
    with servers.folder("demo") as where, contextlib.ExitStack() as stack:
        try:
            run(stack, where)
        except servers.Absent as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
        except Missing as error:
            print(f"\ndemo: {error}", file=sys.stderr)
            return 1
    print(f"\nEvery hop is there, in {time.monotonic() - began:.1f} s.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
