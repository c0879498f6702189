"""Whose a session is: the client id alone names it, and it belongs to the user who made it."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from tests.unit.engine.harness import Bench
from tests.unit.engine.parts import payloads, resume


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("there", [True, False], ids=["connected", "away"])
def test_z18_another_user_gets_nothing_by_a_client_id(bench: Bench, version: int, clean: bool, there: bool) -> None:
    """Z-18: no message of the queue, no eviction, no end of the session, with a clean start and without."""
    more: dict[str, Any] = {"session_expiry_interval": 600} if version == 5 else {}
    ann = bench.client("device", version=version, clean=False, username="ann", **more)
    ann.subscribe("private/#", qos=1)
    sender = bench.client("sender", version=5, username="ann")
    if not there:
        ann.drop()
        sender.publish("private/a", b"queued", qos=1)
    bob = bench.client("device", version=version, clean=clean, username="bob", **more)
    assert bob.connack.code == (0x85 if version == 5 else 2)
    assert bob.closed
    assert not bob.take()
    if there:
        assert not ann.closed
        sender.publish("private/a", b"live", qos=1)
        assert payloads(ann) == [b"live"]
    else:
        connack, queued = resume(bench, "device", version, username="ann", **more).take()
        assert connack.session_present
        assert queued.payload == b"queued"
    nobody = bench.client("device", version=version, clean=clean, **more)
    assert nobody.connack.code == (0x85 if version == 5 else 2), "an anonymous client is another user too"


def test_z19_client_ids_with_the_same_short_hash_are_two_sessions(bench: Bench) -> None:
    """Z-19: sessions are kept by the whole client id; here are two with the same CRC-32."""
    first, second = "plumless", "buckeroo"
    assert zlib.crc32(first.encode()) == zlib.crc32(second.encode())
    one = bench.client(first, version=5, username="ann", session_expiry_interval=600)
    two = bench.client(second, version=5, username="bob", session_expiry_interval=600)
    assert (one.connack.code, two.connack.code) == (0, 0)
    assert not one.closed
    one.subscribe("a", qos=1)
    assert bench.engine.sessions[first] is not bench.engine.sessions[second]
    bench.client("sender", username="ann").publish("a", b"x", qos=1)
    assert payloads(one) == [b"x"]
    assert not two.take()
