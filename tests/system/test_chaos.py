"""A few rounds of `make chaos`: whatever is killed, what was acknowledged arrives, and at QoS 2 once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.harness import MOSQUITTO, Plan, run
from tests.servers import Kafka, Mosquitto

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_d01_d02_kills_at_random_moments_lose_and_repeat_nothing(
    kafka: Kafka, start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    """D-01, D-02: devices, a Kafka sink, an SQLite sink and a bridge under load; broker and worker die by SIGKILL."""
    far = start_mosquitto(extra=MOSQUITTO, verbose=False)
    report = await run(Plan(rounds=6, seed=random.SystemRandom().randrange(1 << 32)), tmp_path, kafka, far, print)
    print("\n".join(report.lines()))
    record_property("acknowledged", report.total)
    assert report.problems() == [], f"seed {report.seed}; the ledger and the broker's log are in {tmp_path}"
    assert report.total >= 1_000
    assert report.kills["broker"] >= 1
    assert report.kills["worker"] >= 1
