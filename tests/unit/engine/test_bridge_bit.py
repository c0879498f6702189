"""A broker of 3.x that announces itself as a bridge: what MQTT 5 has subscription options for."""

from __future__ import annotations

import pytest

from broker.engine.listener import ListenerInfo
from tests.unit.engine.harness import Bench, Client, connect_packet


@pytest.mark.parametrize("version", [3, 4])
def test_a_bridge_gets_nothing_of_its_own_back_and_keeps_the_retain_flag(version: int) -> None:
    bench = Bench()
    bench.listener = ListenerInfo("tcp", bridge_bit=True)
    packet = bytearray(connect_packet("b", version))
    name = packet.index(b"MQ")
    packet[name + (6 if version == 3 else 4)] |= 0x80
    bridge = Client(bench, bench.listener)
    bridge.version = version
    bridge.send(bytes(packet))
    (connack,) = bridge.take()
    assert connack.code == 0
    other = bench.client("p")
    other.publish("t", b"kept", retain=True)
    assert bridge.subscribe("t") == [0]
    assert [(m.payload, m.retain) for m in bridge.after_suback] == [(b"kept", True)]
    assert bridge.subscribe("t") == [0]
    assert bridge.after_suback == [], "a filter it already has brings no retained messages again"
    bridge.publish("t", b"own")
    assert bridge.take() == []
    other.publish("t", b"live", retain=True)
    assert [(m.payload, m.retain) for m in bridge.take()] == [(b"live", True)]
