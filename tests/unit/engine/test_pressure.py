"""R-06: what the engine does while memory is short, and that nobody is read without end in one turn of the loop."""

from __future__ import annotations

from broker.engine.channel import READ_AT_ONCE
from broker.mqtt import packets
from tests.unit.engine.harness import Bench, Client

MUCH = packets.encode_publish(b"t", bytes(READ_AT_ONCE), 0, False, False, 0, 4, b"")


def loud(bench: Bench, name: str) -> Client:
    """A client that has published: only those are held back."""
    client = bench.client(name)
    client.publish("t", b"1", qos=1)
    return client


def test_r06_publishers_are_read_as_far_as_there_is_room_and_newcomers_refused() -> None:
    bench = Bench()
    first, second = loud(bench, "p1"), loud(bench, "p2")
    subscriber = bench.client("s")
    subscriber.subscribe("#", qos=1)
    pressure = bench.engine.pressure
    pressure.press(1, 1000)
    first.publish("t", bytes(600), qos=1)
    assert first.link.reading, "there was room at once"
    first.publish("t", bytes(600), qos=1)
    assert not first.link.reading, "the room is used up"
    second.publish("t", b"2", qos=1)
    assert not second.link.reading, "for everybody"
    subscriber.send(b"\xc0\0")
    assert subscriber.link.reading, "who only receives frees memory"
    pressure.press(1, 1000)
    assert first.link.reading
    assert second.link.reading
    pressure.press(2, 0)
    assert bench.client("late", version=5).connack.code == 0x89
    first.publish("t", b"3", qos=1)
    for _ in range(40):
        pressure.press(2, 0)
        second.publish("t", b"4", qos=1)
    assert not (first.link.reading and second.link.reading), "one at most had its turn"
    pressure.press(0, 1 << 40)
    assert first.link.reading
    assert second.link.reading
    assert bench.client("later", version=5).connack.code == 0


def test_r06_the_line_moves_on_in_the_order_of_waiting_while_there_is_room() -> None:
    bench = Bench()
    crowd = [loud(bench, f"p{n}") for n in range(20)]
    pressure = bench.engine.pressure
    pressure.press(1, 100_000)
    assert [client.link.reading for client in crowd] == [True] * 8 + [False] * 12
    bench.settle()
    assert all(client.link.reading for client in crowd)


def test_a_connection_that_was_read_enough_waits_for_the_next_turn_of_the_loop() -> None:
    bench = Bench()
    publisher = loud(bench, "p")
    publisher.channel.feed(MUCH)
    assert not publisher.link.reading
    bench.settle()
    assert publisher.link.reading


def test_r06_who_rests_is_held_back_like_the_others() -> None:
    bench = Bench()
    publisher = loud(bench, "p")
    bench.engine.pressure.press(1, 1000)
    assert publisher.link.reading
    publisher.channel.feed(MUCH)
    bench.settle()
    assert not publisher.link.reading


def test_r06_memory_is_looked_at_as_soon_as_the_room_is_used_up() -> None:
    bench = Bench()
    publisher = loud(bench, "p")
    pressure = bench.engine.pressure
    looks = []

    def look() -> None:
        looks.append(1)
        pressure.press(1, 0)

    pressure.look = look
    pressure.press(0, 1000)
    publisher.publish("t", bytes(600), qos=1)
    assert not looks
    publisher.publish("t", bytes(600), qos=1)
    assert looks == [1]
    publisher.publish("t", bytes(600), qos=1)
    assert not publisher.link.reading
    assert looks == [1]
