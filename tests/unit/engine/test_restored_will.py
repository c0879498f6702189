"""Wills whose owners connected before a restart: published like any other, to the rights of their owners."""

from __future__ import annotations

from typing import Any

import pytest

from broker.engine import records
from broker.mqtt.packets import Will
from tests.unit.engine.harness import Client, props
from tests.unit.engine.stores import StoredBench
from tests.unit.engine.test_journal import got, resume, subscribed


@pytest.fixture
def bench() -> StoredBench:
    """With a watcher that is away and keeps every will."""
    bench = StoredBench()
    subscribed(bench, "w", "gone", qos=1).drop()
    return bench


def with_will(bench: StoredBench, client_id: str = "s", delay: int = 0) -> Client:
    forward = props(will_delay_interval=delay) if delay else None
    will = Will(topic=b"gone", payload=client_id.encode(), qos=1, properties=forward)
    client = bench.client(client_id, version=5, clean=False, username="ann", will=will, session_expiry_interval=1000)
    bench.commit()
    return client


def came(bench: StoredBench) -> list[bytes]:
    """What the watcher finds after two minutes."""
    bench.pass_time(120, 1)
    bench.commit()
    return [m[0] for m in got(resume(bench, "w"))]


@pytest.mark.parametrize("delay", [0, 60])
@pytest.mark.parametrize("dropped", [False, True])
def test_z12_the_gate_is_asked_when_the_will_is_due(bench: StoredBench, delay: int, dropped: bool) -> None:
    """The client is connected, or waits for its delay, when the broker dies."""
    client = with_will(bench, delay=delay)
    if dropped and delay:
        client.drop()
        bench.commit()
    again = bench.restart(down=5)
    again.gate.deny_publish.add(("ann", "gone"))
    assert came(again) == []
    assert again.engine.core.dropped["unauthorized"] == 1
    assert [text for category, text in again.reports if category == "will_withheld"]
    assert came(bench.restart(down=5)) == [b"s"], "its right was not taken away"


def test_z12_a_will_stays_withheld_over_further_restarts(bench: StoredBench) -> None:
    with_will(bench)
    again = bench.restart()
    again.gate.deny_publish.add(("ann", "gone"))
    again.pass_time(1)
    again.commit()
    assert came(again.restart()) == []


def test_z12_terms_survive_a_second_crash_before_the_will_is_due(bench: StoredBench) -> None:
    with_will(bench, delay=60)
    again = bench.restart()
    again.pass_time(10)
    again.commit()
    assert came(again.restart()) == [b"s"]


def test_z12_a_right_lost_before_the_crash_is_known_after_it(bench: StoredBench) -> None:
    """Rights from a backend cannot be asked for again: the journal has the last word that was heard."""
    with_will(bench)
    bench.gate.deny_publish.add(("ann", "gone"))
    bench.engine.rights_changed("s")
    bench.commit()
    assert came(bench.restart()) == []
    bench.gate.deny_publish.clear()
    bench.engine.rights_changed(None)
    bench.commit()
    assert came(bench.restart()) == [b"s"]


def test_z12_a_will_nothing_is_known_about_is_not_published(bench: StoredBench) -> None:
    """As a store written by an older release has it."""
    client = with_will(bench, delay=60)
    client.drop()
    spool = bench.engine.sessions["s"].spool
    fields: dict[str, Any] = bench.engine.sessions["s"].life(bench.journal, False)
    del fields["will"]["terms"]
    bench.journal.note(records.encode_json(records.LIFE, spool.number, fields))
    bench.commit()
    again = bench.restart()
    assert came(again) == []
    assert again.engine.core.dropped["unauthorized"] == 1


def test_z12_the_will_of_a_session_that_ended_meanwhile_is_judged_too(bench: StoredBench) -> None:
    with_will(bench, "a").drop()  # published at once: it is no part of this
    with_will(bench, "s", delay=900).drop()
    bench.commit()
    again = bench.restart(down=2000)
    again.gate.deny_publish.add(("ann", "gone"))
    assert came(again) == [b"a"]
    assert "s" not in again.engine.sessions
    assert came(bench.restart(down=2000)) == [b"a", b"s"]


def test_a_session_begun_anew_expires_after_a_crash(bench: StoredBench) -> None:
    """D-14: its CONNACK waited for the record that says so."""
    with_will(bench).drop()
    bench.client("s", version=5, clean=True, username="ann", session_expiry_interval=60)
    bench.commit()
    again = bench.restart()
    again.pass_time(59, 1)
    assert "s" in again.engine.sessions
    again.pass_time(2, 1)
    assert "s" not in again.engine.sessions
