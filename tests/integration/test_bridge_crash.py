"""The whole installation: our broker, its worker process with the bridge, mosquitto behind a link that is cut."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bridge_harness import receiver, sender, stream, until
from tests.ledger import Ledger
from tests.servers import Mosquitto

CONFIGURATION = """
[listeners.tcp]
kind = "tcp"
bind = "127.0.0.1:0"
[access]
allow_anonymous = true
no_match = "allow"
[bridges.hq]
kind = "mqtt"
servers = ["mqtt://127.0.0.1:{port}"]
protocol = "{protocol}"
clientid = "region-1"
restart = {{ base = "50ms", cap = "100ms" }}
topics = [
    {{ filter = "up/#", direction = "out", qos = 2 }},
    {{ filter = "down/#", direction = "in", qos = 2 }},
]
"""


class Installation:
    """`isthmus run` as a process."""

    def __init__(self, folder: Path, configuration: str) -> None:
        (folder / "conf.d").mkdir()
        (folder / "conf.d" / "00.toml").write_text(configuration)
        self._where = ("--conf", str(folder / "conf.d"), "--data", str(folder / "data"))
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "broker", "run", *self._where], stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    async def url(self) -> str:
        assert self._process.stdout is not None
        ready = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), 20)
        return "mqtt://" + ready.split("tcp=")[1].split()[0]

    async def bridge(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "broker", "bridges", "show", "hq", "--json", *self._where]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=20, check=False)
        status: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return status

    async def joined(self) -> dict[str, Any]:
        """The bridge's status once it is connected."""
        async with asyncio.timeout(20):
            while (status := await self.bridge()).get("state") != "running":  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return status

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._log.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_b03_b17_qos_2_survives_cut_links_and_killed_workers(
    start_mosquitto: Callable[..., Mosquitto], start_proxy: Callable[[int], Any], tmp_path: Path, protocol: str
) -> None:
    far = start_mosquitto(extra="max_queued_messages 0\nmax_inflight_messages 0", verbose=False)
    proxy = await start_proxy(far.port)
    installation = Installation(tmp_path, CONFIGURATION.format(port=proxy.port, protocol=protocol))
    chance = random.Random(3)
    up, down = Ledger(), Ledger()
    faults = 0
    try:
        near = await installation.url()
        status = await installation.joined()
        assert status["protocol"] == protocol
        async with (
            receiver(far.url, "up/#", ledger=up),
            receiver(near, "down/#", ledger=down),
            sender(near) as near_sender,
            sender(far.url) as far_sender,
        ):

            async def pace() -> bool:
                await asyncio.sleep(0.003)
                return faults < 10

            async def trouble() -> None:
                nonlocal faults, status
                while faults < 10:
                    await asyncio.sleep(chance.uniform(0.1, 0.4))
                    if faults in (3, 7):
                        os.kill(status["pid"], signal.SIGKILL)
                        killed, status = status["pid"], await installation.joined()
                        while status["pid"] == killed:
                            status = await installation.joined()
                    elif faults % 2:
                        await proxy.reset()
                    else:
                        proxy.cut_after(chance.randint(1, 600), chance.choice(("up", "down")))
                    faults += 1

            await asyncio.gather(
                stream(near_sender, up, "up", "up/x", 2, pace),
                stream(far_sender, down, "down", "down/x", 2, pace),
                trouble(),
            )
            await until(lambda: not up.missing() and not down.missing(), "everything arrives", 20)
        assert proxy.counts.cut + proxy.counts.reset >= 4
    finally:
        installation.stop()
    assert up.check().arrived > 100
    assert down.check().arrived > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.environ.get("ISTHMUS_SOAK") != "1", reason="minutes long: make soak")
async def test_b03_a_stream_of_100_000_at_qos_2_crosses_both_ways_once_while_both_links_are_cut(
    start_mosquitto: Callable[..., Mosquitto], start_proxy: Callable[[int], Any], tmp_path: Path
) -> None:
    far = start_mosquitto(extra="max_queued_messages 0\nmax_inflight_messages 0", verbose=False)
    proxy = await start_proxy(far.port)
    limits = "[limits]\nmax_queued_messages = 1_000_000\nmax_inflight = 1_000\n"
    installation = Installation(tmp_path, limits + CONFIGURATION.format(port=proxy.port, protocol="5"))
    chance = random.Random(5)
    up, down = Ledger(), Ledger()
    done = False
    cuts = kills = 0
    wanted = 100_000
    try:
        near = await installation.url()
        status = await installation.joined()
        async with (
            receiver(far.url, "up/#", ledger=up),
            receiver(near, "down/#", ledger=down),
            sender(near) as near_sender,
            sender(far.url) as far_sender,
        ):

            def counted() -> Callable[[], Any]:
                sent = 0

                async def pace() -> bool:
                    nonlocal sent
                    sent += 1
                    if sent % 50 == 0:
                        await asyncio.sleep(0.05)
                    return sent <= wanted

                return pace

            async def streams() -> None:
                nonlocal done
                await asyncio.gather(
                    stream(near_sender, up, "up", "up/x", 2, counted()),
                    stream(far_sender, down, "down", "down/x", 2, counted()),
                )
                done = True

            async def trouble() -> None:
                nonlocal status, cuts, kills
                while not done:
                    await asyncio.sleep(chance.uniform(0.5, 3.0))
                    if chance.random() < 0.2:
                        os.kill(status["pid"], signal.SIGKILL)
                        kills += 1
                        killed = status["pid"]
                        while status["pid"] == killed:
                            status = await installation.joined()
                    elif chance.random() < 0.5:
                        await proxy.reset()
                        cuts += 1
                    else:
                        proxy.cut_after(chance.randint(1, 60_000), chance.choice(("up", "down")))
                        cuts += 1

            await asyncio.gather(streams(), trouble())
            await until(lambda: not up.missing() and not down.missing(), "everything arrives", 120)
    finally:
        installation.stop()
    print(f"remote link cut {cuts} times, worker and with it the local link killed {kills} times")
    assert cuts > 10
    assert kills > 3
    assert up.check().arrived >= wanted
    assert down.check().arrived >= wanted
