"""Our client against mosquitto, and the load generator built on it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.client import load
from broker.client.connection import Handler, connect
from broker.client.errors import Refused, Unreachable
from broker.client.session import Publisher
from tests.integration.bridge_harness import Receiver, until
from tests.servers import Certificates, Mosquitto, accepts, free_port

UNLIMITED = "max_queued_messages 0\nmax_inflight_messages 0"


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("transport", ["mqtt", "mqtts", "ws", "unix"])
async def test_every_version_speaks_over_every_transport(
    start_mosquitto: Callable[..., Mosquitto], certs: Certificates, tmp_path: Path, version: int, transport: str
) -> None:
    import ssl

    port = free_port()
    more = f"listener {port} 127.0.0.1\nprotocol websockets\nlistener 0 {tmp_path}/m.sock\n"
    server = start_mosquitto(tls=certs, extra=UNLIMITED, connection=more)
    await until(lambda: accepts(port) and (tmp_path / "m.sock").exists(), "its other listeners are open")
    urls = {
        "mqtt": server.url,
        "mqtts": f"mqtts://localhost:{server.tls_port}",
        "ws": f"ws://127.0.0.1:{port}/mqtt",
        "unix": f"unix://{tmp_path}/m.sock",
    }
    tls = ssl.create_default_context(cafile=str(certs.ca)) if transport == "mqtts" else None
    receiver = Receiver()
    conn = await connect(urls[transport], client_id="r", handler=receiver, version=version, tls=tls)
    assert await conn.subscribe([("a/#", 2), ("b", 1)]) == [2, 1]
    publisher = await Publisher.connect(urls[transport], client_id="s", version=version, tls=tls)
    for qos in (0, 1, 2):
        await publisher.publish("a/x", b"%d" % qos, qos)
    large = b"x" * (20_000 if transport == "ws" else 300_000)  # mosquitto writes 4 kB of WebSocket every 100 ms
    await publisher.publish("a/large", large, 1)
    await until(lambda: len(receiver.messages) == 4, "all four")
    assert [m.qos for m in receiver.messages] == [0, 1, 2, 1]
    assert receiver.messages[3].payload == large
    assert await conn.ping() < 5
    await publisher.disconnect()
    await conn.disconnect()


async def test_a_wrong_password_a_dead_port_and_an_untrusted_certificate_are_told_apart(
    start_mosquitto: Callable[..., Mosquitto], certs: Certificates
) -> None:
    server = start_mosquitto(username="u", password="p", tls=certs)
    with pytest.raises(Refused) as refused:
        await connect(server.url, client_id="x", handler=Handler(), username="u", password="no")
    assert refused.value.code == 0x87
    with pytest.raises(Unreachable, match=r"refused|Connect call failed"):
        await connect(f"mqtt://127.0.0.1:{free_port()}", client_id="x", handler=Handler())
    with pytest.raises(Unreachable, match="not trusted"):
        await connect(f"mqtts://localhost:{server.tls_port}", client_id="x", handler=Handler())


@pytest.mark.parametrize("shape", ["publish", "subscribe", "fanout", "latency"])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_load_counts_everything_and_loses_nothing(
    start_mosquitto: Callable[..., Mosquitto], shape: load.Shape, qos: int
) -> None:
    server = start_mosquitto(extra=UNLIMITED, verbose=False)
    seconds, rate = (1, 200) if shape == "latency" else (0.2, 0)
    wanted = load.Load(shape, seconds, clients=3, qos=qos, window=50, rate=rate)
    seen: list[float] = []
    result = await load.put(wanted, server.url, lambda share, count: seen.append(share))
    assert (result.lost, result.failed) == (0, 0)
    assert result.sent > 20
    assert result.received == result.sent * {"publish": 0, "subscribe": 1, "fanout": 3, "latency": 1}[shape]
    assert seen
    figures = result.figures()
    assert ("p99_ms" in figures) is (shape == "latency")
    if shape == "latency":
        assert result.sent <= 210
        assert 0 < figures["p50_ms"] <= figures["max_ms"]


async def test_a_lost_message_is_counted(mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_PATIENCE", 2)
    real = load._Subscriber.on_publish
    skipped: list[int] = []

    def forgetful(self: load._Subscriber, conn: object, publish: object) -> None:
        if not skipped:
            skipped.append(1)
        else:
            real(self, conn, publish)  # type: ignore[arg-type]

    monkeypatch.setattr(load._Subscriber, "on_publish", forgetful)
    result = await load.put(load.Load("subscribe", 0.1, clients=1, qos=0, window=10), mosquitto.url)
    assert result.lost == 1


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "broker", "bench", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


async def test_the_command_prints_a_table_and_tells_by_its_exit_code(mosquitto: Mosquitto) -> None:
    run = asyncio.to_thread
    url = ("--url", mosquitto.url, "--seconds", "0.2")
    done = await run(bench, "subscribe", *url, "--clients", "2", "--qos", "1", "--size", "32", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["received"] == figures["sent"] > 0
    assert figures["lost"] == 0
    table = await run(bench, "connect", *url, "--clients", "2")
    assert table.returncode == 0, table.stderr
    assert "p99" in table.stdout
    gone = await run(bench, "publish", "--url", f"mqtt://127.0.0.1:{free_port()}", "--seconds", "0.2")
    assert gone.returncode == 3
    wrong = await run(bench, "publish", "--url", "http://x", "--seconds", "0.2")
    assert wrong.returncode == 2
    assert "unknown scheme" in wrong.stderr
