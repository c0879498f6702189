"""Counts the Python-level calls that 1 000 QoS 0 messages cause between two sockets, as `sys.setprofile` sees them.

What is compiled is not seen; what runs once for each read may be, what runs once for each packet must not be.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from broker.engine.engine import Engine
from broker.engine.gate import OpenGate
from broker.engine.listener import ListenerInfo
from broker.mqtt.packets import encode_publish

MESSAGES = 1000
SCAFFOLD = ("benchmarks/calls.py", "threading.py", "asyncio/locks.py", "asyncio/mixins.py")
"""Not caused by messages: how this file learns that they arrived."""


def _connect(client_id: bytes) -> bytes:
    body = b"\x00\x04MQTT\x04\x02\x00\x00" + len(client_id).to_bytes(2, "big") + client_id
    return bytes([0x10, len(body)]) + body


class _Forward(asyncio.Protocol):
    """A listener's connection without the listener: after the first read the channel is fed directly."""

    def __init__(self, engine: Engine, listener: ListenerInfo) -> None:
        self.engine, self.listener = engine, listener

    def connection_made(self, transport: Any) -> None:
        self.channel = self.engine.open_channel(transport, self.listener, "127.0.0.1:1")
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data_received = self.channel.feed  # type: ignore[method-assign]
        self.transport.set_protocol(self)  # uvloop keeps the bound method
        self.channel.feed(data)

    def pause_writing(self) -> None:
        self.channel.pause_writing()

    def resume_writing(self) -> None:
        self.channel.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.channel.lost(exc)


def _read(sock: socket.socket, count: int) -> int:
    """Bytes read until `count` have come or the peer ends."""
    got = 0
    while got < count:
        data = sock.recv(65536)
        if not data:
            break
        got += len(data)
    return got


def profile() -> collections.Counter[str]:
    """Calls by function, while 1 000 messages of 64 bytes go from one client to another."""
    new_loop: Any = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        import uvloop

        new_loop = uvloop.new_event_loop
    calls: collections.Counter[str] = collections.Counter()

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not frame.f_code.co_filename.endswith(SCAFFOLD):
            calls[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1

    async def run() -> None:
        loop = asyncio.get_running_loop()
        engine = Engine(OpenGate(), loop.call_soon, clock=loop.time, wall_ms=int(time.time() * 1000))
        info = ListenerInfo("tcp", kind="tcp")
        server = await loop.create_server(lambda: _Forward(engine, info), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        packet = encode_publish(b"bench/1/telemetry", b"x" * 64, 0, False, False, 0, 4)
        ready, go, counted = threading.Event(), threading.Event(), threading.Event()
        failure: list[BaseException] = []

        def clients() -> None:
            try:
                with (
                    socket.create_connection(("127.0.0.1", port), 10) as receiver,
                    socket.create_connection(("127.0.0.1", port), 10) as sender,
                ):
                    receiver.sendall(_connect(b"receiver") + b"\x82\x16\x00\x01\x00\x11bench/1/telemetry\x00")
                    sender.sendall(_connect(b"sender") + packet)
                    _read(receiver, 4 + 5)
                    _read(sender, 4)
                    sender.sendall(packet * 3)  # fills the caches
                    receiver.settimeout(0.5)
                    try:
                        while receiver.recv(65536):
                            pass
                    except TimeoutError:
                        receiver.settimeout(10)
                    ready.set()
                    go.wait(10)
                    sender.sendall(packet * MESSAGES)
                    if _read(receiver, len(packet) * MESSAGES) != len(packet) * MESSAGES:
                        raise RuntimeError("the messages did not arrive")
                    loop.call_soon_threadsafe(finished.set)
                    counted.wait(10)
            except BaseException as error:
                failure.append(error)
            finally:
                ready.set()
                loop.call_soon_threadsafe(finished.set)

        finished = asyncio.Event()
        thread = threading.Thread(target=clients)
        thread.start()
        await asyncio.to_thread(ready.wait, 30)
        calls.clear()
        sys.setprofile(on_event)
        go.set()
        await finished.wait()
        sys.setprofile(None)
        counted.set()
        await asyncio.to_thread(thread.join, 10)
        server.close()
        if failure:
            raise failure[0]

    loop = new_loop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return calls


def count() -> int:
    """How many calls in all; the best of three, as the kernel may cut the stream into more reads."""
    return min(profile().total() for _ in range(3))


if __name__ == "__main__":
    for name, number in profile().most_common(20):
        print(f"{number:6}  {name}")
    print(f"{count():6}  in all, best of three")
