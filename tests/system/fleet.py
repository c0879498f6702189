"""Many sessions that are away, made and emptied by a process of its own: `python -m tests.system.fleet --help`.

Session i has a subscription to ``fleet/<i // group>``; what is published there waits for `group` of them. Plain
sockets: a crowd of client objects would cost more than the broker does.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from broker.client.connection import Connection, Handler
from broker.mqtt import packets
from broker.mqtt.framing import FrameReader
from broker.mqtt.properties import Properties
from tests.broker import ROOT
from tests.servers import PATIENCE

_AT_ONCE = 100
_WINDOW = 500


class Flood(Handler):
    """Publishes as fast as the answers come; counts them by code."""

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self._flying = 0
        self._ident = 0
        self._moved = asyncio.Event()

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        self.codes[code] += 1
        self._flying -= 1
        self._moved.set()

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        self._moved.set()

    async def run(self, to: str, messages: Iterable[tuple[str, bytes]], *, retain: bool = False) -> Counter[int]:
        """Returns how often each code was the answer; raises ConnectionError when the connection ends."""
        conn = await Connection.connect(to, client_id="flood", handler=self)
        window = min(_WINDOW, conn.receive_maximum)
        left = iter(messages)
        while True:
            for topic, payload in islice(left, window - self._flying):
                self._ident = self._ident % 60_000 + 1
                self._flying += 1
                conn.publish(topic, payload, 1, retain, packet_id=self._ident)
            if not self._flying:
                break
            self._moved.clear()
            await self._moved.wait()
            if not conn.open:
                raise ConnectionError("the broker ended the connection")
        await conn.disconnect()
        return self.codes


def topics(sessions: int, group: int, messages: int) -> Iterator[tuple[str, bytes]]:
    """What gives every session `messages` messages."""
    for number in range(messages):
        for place in range(0, sessions, group):
            yield f"fleet/{place // group}", b"fleet|%d|" % number + b"x" * 50


def _connect(number: int, clean: bool) -> bytes:
    properties = Properties()
    properties.session_expiry_interval = 7_200
    return packets.encode_connect(
        packets.Connect(
            version=5, clean_start=clean, keep_alive=0, client_id=f"fleet-{number}", properties=properties
        )
    )  # fmt: skip


def _dial(port: int) -> socket.socket:
    one = socket.socket()
    one.settimeout(30 * PATIENCE)
    one.connect(("127.0.0.1", port))
    return one


def _until(one: socket.socket, frames: FrameReader, kinds: dict[int, int]) -> None:
    """Read until so many packets of each kind have come; a PUBLISH of QoS 1 is acknowledged."""
    while any(count > 0 for count in kinds.values()):
        data = one.recv(65_536)
        if not data:
            raise ConnectionError("the broker ended the connection")
        acks = []
        for first, body in frames.feed(data):
            kinds[first >> 4] = kinds.get(first >> 4, 0) - 1
            if first >> 4 == 3:
                acks.append(packets.encode_ack(4, packets.decode_publish(first, body, 5).packet_id, 5, 0))
        if acks:
            one.sendall(b"".join(acks))


def make(port: int, sessions: int, group: int) -> None:
    """Make the sessions and leave them."""
    for first in range(0, sessions, _AT_ONCE):
        crowd = []
        for number in range(first, min(first + _AT_ONCE, sessions)):
            one = _dial(port)
            subscribe = packets.encode_subscribe(1, 5, [(b"fleet/%d" % (number // group), 1)])
            one.sendall(_connect(number, True) + subscribe)
            crowd.append(one)
        for one in crowd:
            _until(one, FrameReader(1 << 20), {2: 1, 9: 1})
            one.sendall(packets.encode_disconnect(5, 0))
        for one in crowd:
            one.close()


def drain(port: int, sessions: int, messages: int) -> None:
    """Come back as each of them, take and acknowledge what waits."""
    for first in range(0, sessions, _AT_ONCE):
        crowd = []
        for number in range(first, min(first + _AT_ONCE, sessions)):
            one = _dial(port)
            one.sendall(_connect(number, False))
            crowd.append(one)
        for one in crowd:
            _until(one, FrameReader(1 << 20), {2: 1, 3: messages})
            one.sendall(packets.encode_disconnect(5, 0))
        for one in crowd:
            one.close()


def start(what: str, port: int, sessions: int, group: int, messages: int) -> subprocess.Popen[str]:
    """One of the verbs in a process of its own."""
    command = [sys.executable, "-m", "tests.system.fleet", what, str(port), str(sessions), str(group), str(messages)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def main() -> int:
    """Do it and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "fill", "drain"])
    for name in ("port", "sessions", "group", "messages"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    began = time.monotonic()
    if given.what == "make":
        make(given.port, given.sessions, given.group)
    elif given.what == "fill":
        to = f"mqtt://127.0.0.1:{given.port}"
        codes = asyncio.run(Flood().run(to, topics(given.sessions, given.group, given.messages)))
        if set(codes) != {0}:
            print(codes)
            return 1
    else:
        drain(given.port, given.sessions, given.messages)
    print(f"{given.what}: {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
