"""A worker process: ``python -m broker.runtime.worker CHANNEL BUSY``, two descriptors inherited from the broker.

It runs the instances the broker hands it and reads no configuration files. It ends when told to or on SIGTERM, after
what is under way was written, for a bounded time; and at once when the broker is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from typing import Any

from broker.runtime import instance_log, logs
from broker.runtime.assignment import Assignment
from broker.runtime.attach import Internal
from broker.runtime.busy import BusyPage, Marker
from broker.runtime.channel import Channel
from broker.runtime.host import Host

DRAIN = 4.0
"""Seconds to write what was received before leaving, unless the broker says otherwise. The broker's own stop waits six
for its workers, and their end takes a moment."""
_ORPHAN_DRAIN = 0.0
"""The broker is gone: acknowledgements reach nobody, and the next broker's worker writes all of it again. What this one
still writes is stored twice, or even behind that."""
_REPORT_EVERY = 1.0
_REPORT_APART = 0.02


class Worker:
    """Obeys the channel, reports on it."""

    def __init__(self, channel: Channel, page: BusyPage, hello: dict[str, Any]) -> None:
        self._channel = channel
        self._page = page
        self._slots: dict[str, int] = {}
        self._news = asyncio.Event()
        self._drain = _ORPHAN_DRAIN
        self._host = Host(
            Internal(hello["internal"]), hello["node"], changed=self._news.set, alarm=self._alarm, marker=self._marker
        )

    async def run(self) -> None:
        """Until the broker says stop, is gone, or SIGTERM."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate, stop)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C reaches the whole group; the broker tells us
        obey = asyncio.create_task(self._obey())
        report = asyncio.create_task(self._report())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((obey, stopped), return_when=asyncio.FIRST_COMPLETED)
            await self._host.close(self._drain)
            if obey.done():
                obey.result()  # a defect of ours ends the process with its traceback
        finally:
            for task in (obey, report, stopped):
                task.cancel()
            await asyncio.gather(obey, report, stopped, return_exceptions=True)
        await self._channel.flush()
        self._channel.close()

    def _terminate(self, stop: asyncio.Event) -> None:
        self._drain = DRAIN
        stop.set()

    async def _obey(self) -> None:
        while (message := await self._channel.receive()) is not None:
            if "stop" in message:
                self._drain = float(message["stop"])
                return
            if "apply" in message:
                await self._apply(message["apply"])
            with contextlib.suppress(LookupError):  # an instance that went meanwhile
                if "pause" in message:
                    await self._host.pause(message["pause"])
                elif "resume" in message:
                    await self._host.resume(message["resume"])

    async def _apply(self, order: dict[str, Any]) -> None:
        self._slots = order["slots"]
        instances = [Assignment.from_json(value) for value in order["instances"].values()]
        await self._host.apply(instances, order["paused"])
        self._channel.send({"applied": order["number"]})

    async def _report(self) -> None:
        while True:
            self._news.clear()
            self._channel.send({"status": self._host.status()})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_EVERY):
                    await self._news.wait()
            await asyncio.sleep(_REPORT_APART)  # several changes at once are one report

    def _alarm(self, key: str, text: str) -> None:
        self._channel.send({"alarm": {"instance": key, "text": text}})

    def _marker(self, key: str) -> Marker:
        return self._page.marker(self._slots.get(key))


async def main(channel_fileno: int, busy_fileno: int) -> None:
    """Serve until told to stop."""
    for fileno in (channel_fileno, busy_fileno):
        os.set_inheritable(fileno, False)
    channel = await Channel.over(socket.socket(fileno=channel_fileno))
    message = await channel.receive()
    if message is None:
        return
    hello = message["hello"]
    logs.configure(hello["log_format"], hello["log_level"])
    instance_log.install()
    await Worker(channel, BusyPage(busy_fileno), hello).run()


def run() -> None:
    """The entry of the process; on uvloop where there is one."""
    channel_fileno, busy_fileno = int(sys.argv[1]), int(sys.argv[2])
    gc.set_threshold(100_000, 50, 100)  # records form no cycles: looking for some costs a third of a message
    try:
        import uvloop
    except ImportError:
        asyncio.run(main(channel_fileno, busy_fileno))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(channel_fileno, busy_fileno))


if __name__ == "__main__":
    run()
