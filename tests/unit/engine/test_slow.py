"""Receivers that do not read: what is dropped, what waits, when they are cut; and one payload for many."""

from __future__ import annotations

import os
import time
import timeit
from collections.abc import Callable
from itertools import pairwise

import pytest

from broker.engine import topics
from broker.engine.receiver import Receiver, Subscription
from broker.engine.router import Router
from tests.unit.engine.harness import Bench, Client
from tests.unit.engine.parts import PUBACK, Slow, ack, payloads, publish

speed = pytest.mark.skipif(os.environ.get("ISTHMUS_SOAK") != "1", reason="about speed: make soak")


@pytest.fixture
def bench() -> Bench:
    return Bench(max_packet_size=10_000, stall_timeout=10)


def slow_client(bench: Bench, name: str, **options: int) -> Client:
    client = bench.client(name, **options)  # type: ignore[arg-type]
    client.subscribe("t", qos=1)
    client.channel.pause_writing()
    return client


@pytest.mark.parametrize("version", [4, 5])
def test_qos_0_is_kept_up_to_the_limit_then_dropped_and_counted(bench: Bench, version: int) -> None:
    s = slow_client(bench, "s", version=version)
    p = bench.client("p", version=version)
    frame = publish("t", b"x" * 9000, version=version)
    fits = (1 << 20) // len(frame)
    for _ in range(fits + 50):
        p.send(frame)
    assert not s.bytes()
    assert bench.engine.core.dropped == {"slow_receiver": 50}
    assert s.channel.size <= 1 << 20
    s.channel.resume_writing()
    bench.settle()
    assert len(payloads(s)) == fits
    p.send(frame)
    assert len(payloads(s)) == 1


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("glued", [False, True])
def test_r04_many_small_writes_are_bounded_as_large_ones_are(bench: Bench, qos: int, glued: bool) -> None:
    """Small packets of changing topics, so that no two leave in one piece; what Python adds to each counts too."""
    s = bench.client("s")
    s.subscribe("t/#", qos=qos)
    link = s.link = s.channel.link = Slow()
    s.read = 0
    p = bench.client("p")
    read = [publish(f"t/{i % 2}", b"%02d" % i, qos, i + 1) for i in range(100)]
    p.send(*([b"".join(read)] if glued else read))
    assert link.writes, "it was not slow yet"
    link.writes.clear()
    s.channel.pause_writing()
    rounds = 300 if qos else 2_000
    for _ in range(rounds):
        p.send(*([b"".join(read)] if glued else read))
        p.link.written.clear()
        p.read = 0
    assert not link.writes
    assert s.channel.size <= 1 << 20
    assert s.channel.more is None or len(s.channel.more) <= (1 << 20) // len(read[0])
    session = bench.engine.sessions["s"]
    assert session.queued <= 1000 + 32
    lost = bench.engine.core.dropped
    assert set(lost) == {"slow_receiver" if qos == 0 else "queue_full"}
    assert sum(lost.values()) > rounds * 100 * 0.4


def test_a_run_for_a_slow_receiver_is_dropped_as_a_whole_and_others_get_it(bench: Bench) -> None:
    slow = slow_client(bench, "slow")
    good = bench.client("good")
    good.subscribe("t")
    p = bench.client("p")
    for _ in range(13):
        p.send(publish("t", b"x" * 9000) * 10)
    assert len(payloads(good)) == 130
    assert bench.engine.core.dropped["slow_receiver"] == 20
    assert slow.channel.size <= 1 << 20


def test_qos_1_waits_in_the_queue_while_the_transport_is_full(bench: Bench) -> None:
    s = slow_client(bench, "s", clean=False)
    p = bench.client("p")
    for i in range(10):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    assert len(p.take()) == 10
    assert not s.bytes()
    assert s.channel.size == 0
    assert bench.engine.sessions["s"].queued == 10
    s.channel.resume_writing()
    bench.settle()
    got = s.take()
    assert [m.payload for m in got] == [b"%d" % i for i in range(10)]
    assert not any(m.dup for m in got)


def test_the_queue_of_a_slow_receiver_is_bounded() -> None:
    bench = Bench(max_queued_messages=5)
    s = slow_client(bench, "s")
    p = bench.client("p")
    for i in range(12):
        p.publish("t", b"%d" % i, 1, ident=i + 1)
    assert bench.engine.core.dropped == {"queue_full": 7}
    s.channel.resume_writing()
    bench.settle()
    assert payloads(s) == [b"%d" % i for i in range(7, 12)]


def test_a_receiver_that_reads_nothing_is_cut_after_the_stall_timeout(bench: Bench) -> None:
    s = slow_client(bench, "s", version=5, session_expiry_interval=60)
    quick = slow_client(bench, "quick")
    bench.pass_time(9)
    assert not s.closed
    quick.channel.resume_writing()
    quick.channel.pause_writing()
    bench.pass_time(2)
    assert s.closed
    assert not quick.closed
    quick.channel.resume_writing()
    bench.pass_time(30)
    assert not quick.closed
    assert bench.engine.core.events["stalled"] == 1
    assert not bench.engine.core.stalled
    assert bench.engine.sessions["s"].channel is None


def test_a_client_that_asks_much_and_reads_nothing_is_not_read_either(bench: Bench) -> None:
    s = bench.client("s")
    s.channel.pause_writing()
    pings = b"\xc0\x00" * 10_000
    for _ in range(100):
        s.send(pings)
        if not s.link.reading:
            break
    assert not s.link.reading
    assert s.channel.size < (1 << 20) + 20_000
    s.channel.resume_writing()
    bench.settle()
    assert s.link.reading
    assert s.channel.size == 0


def test_acknowledgements_of_a_slow_receiver_still_count(bench: Bench) -> None:
    s = bench.client("s", version=5, receive_maximum=2)
    s.subscribe("t", qos=1)
    p = bench.client("p")
    for i in range(4):
        p.publish("t", b"%d" % i, 1)
    one, two = s.take()
    s.channel.pause_writing()
    s.send(ack(PUBACK, one.packet_id), ack(PUBACK, two.packet_id))
    assert bench.engine.sessions["s"].queued == 2
    assert not s.bytes()
    s.channel.resume_writing()
    bench.settle()
    assert payloads(s) == [b"2", b"3"]


def test_r11_one_payload_is_shared_by_all_receivers(bench: Bench) -> None:
    clients = []
    for i in range(300):
        client = bench.client(f"s{i}")
        client.subscribe("t")
        client.link = client.channel.link = Slow()
        client.read = 0
        clients.append(client)
    bench.client("p").publish("t", b"x" * 1024)
    assert len({id(client.link.writes[0]) for client in clients}) == 1  # type: ignore[attr-defined]
    for client in clients:
        assert len(client.take()) == 1
        client.subscribe("u", qos=1)
    bench.client("q").publish("u", b"y" * 1024, 1)
    bodies = [entry[3] for client in clients for entry in client.channel.session.inflight.entries()]
    heads = [entry[2] for client in clients for entry in client.channel.session.inflight.entries()]
    assert len(bodies) == 300
    assert len({id(body) for body in bodies}) == 1
    assert len({id(head) for head in heads}) == 1


def _matching_time(router: Router, topic: bytes) -> float:
    best = 9.0
    for _ in range(5):
        started = time.perf_counter()
        router.matching(topic)
        best = min(best, time.perf_counter() - started)
    return best


def test_r09_matching_grows_with_the_number_of_filters_and_no_faster() -> None:
    """Alternating `+` and literals: every filter of this kind of a depth, and a topic that meets them all."""
    times = []
    for depth in (6, 12):
        router = Router(lambda who, topic: 1, 1 << 20)
        for n in range(2**depth):
            filter = b"/".join(b"+" if n >> level & 1 else b"a" for level in range(depth))
            router.add(Subscription(Receiver(), filter, 0, False, False, 0))
        topic = b"/".join([b"a"] * depth)
        assert len(router.matching(topic)) == 2**depth
        times.append(_matching_time(router, topic))
    assert times[1] < times[0] * 64 * 12  # 64 times the filters: linear is 64, quadratic 4 096, the rest a busy machine


def _worst(count: int, depth: int) -> tuple[Router, bytes]:
    """So many filters of alternating `+` and literals, and the topic that meets them all."""
    router = Router(lambda who, topic: 1, 1 << 20)
    for n in range(count):
        filter = b"/".join(b"+" if n >> level & 1 else b"a" for level in range(depth))
        router.add(Subscription(Receiver(), filter, 0, False, False, 0))
    return router, b"/".join([b"a"] * depth)


@speed
@pytest.mark.slow
def test_r09_twice_the_filters_take_at_most_two_and_a_half_times_as_long() -> None:
    """As long as they fit into a processor's cache: beyond it each step waits for memory, whatever the algorithm."""
    times = []
    for depth in range(5, 12):
        router, topic = _worst(2**depth, depth)
        assert len(router.matching(topic)) == 2**depth
        times.append(_best(lambda r=router, t=topic: r.matching(t)))
    print("R-09, filters: " + ", ".join(f"{2**depth}: {t * 1e6:.1f} µs" for depth, t in enumerate(times, 5)))
    for less, more in pairwise(times):
        assert more <= 2.5 * less


@speed
@pytest.mark.slow
def test_r09_twice_the_levels_take_at_most_two_and_a_half_times_as_long() -> None:
    """Filters that fit until their last level: one by one, and all that the tree may hold of them."""
    alone, together = [], []
    for depth in (16, 32, 64, 128):
        topic = b"/".join([b"a"] * depth)
        filter = b"/".join(b"+" if i % 2 else b"a" for i in range(depth - 1)) + b"/b"
        alone.append(_best(lambda f=filter, t=topic: topics.matches(f, t)))
        router = Router(lambda who, topic: 1, 1 << 20)
        for n in range(16):
            literal = [b"+" if n >> level & 1 else b"a" for level in range(4)]
            rest = [b"+" if i % 2 else b"a" for i in range(depth - 5)]
            router.add(Subscription(Receiver(), b"/".join([*literal, *rest, b"b"]), 0, False, False, 0))
        assert not router.matching(topic)
        together.append(_best(lambda r=router, t=topic: r.matching(t)))
    print(f"R-09, levels: {[f'{t * 1e6:.1f} µs' for t in alone]}, {[f'{t * 1e6:.1f} µs' for t in together]}")
    for times in (alone, together):
        for less, more in pairwise(times):
            assert more <= 2.5 * less


def _best(action: Callable[[], object]) -> float:
    """Seconds one of them takes where nothing comes between."""
    return min(timeit.repeat(action, repeat=100, number=20)) / 20


def test_r09_a_deep_topic_against_a_deep_filter_takes_linear_time() -> None:
    def best(depth: int) -> float:
        filter = b"/".join(b"+" if i % 2 else b"a" for i in range(depth - 1)) + b"/b"
        topic = b"/".join([b"a"] * depth)
        shortest = 9.0
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(200):
                assert not topics.matches(filter, topic)
            shortest = min(shortest, time.perf_counter() - started)
        return shortest

    assert best(2048) < best(64) * 32 * 8  # linear is 32, quadratic 1 024, the rest a busy machine


def _overlapping() -> tuple[Router, bytes]:
    """Ten thousand filters with wildcards, and a topic of 128 levels that meets them all."""
    router = Router(lambda who, topic: 1, 1 << 20)
    receiver = Receiver()
    for n in range(10_000):
        literal = b"/".join(b"+" if n >> level & 1 else b"a" for level in range(14))
        router.add(Subscription(receiver, literal + b"/#", 0, False, False, 0))
    return router, b"/".join([b"a"] * 128)


def test_r08_ten_thousand_overlapping_wildcards_are_all_found() -> None:
    router, topic = _overlapping()
    found = router.matching(topic)
    assert len(set(found)) == 10_000
    for subscription in found[:20]:
        router.remove(subscription)
    assert router.count == 9_980
    assert router.matching(topic) == found[20:]
    assert not router.matching(b"$" + topic)


@speed
@pytest.mark.slow
def test_r08_ten_thousand_overlapping_wildcards_are_matched_in_five_milliseconds() -> None:
    router, topic = _overlapping()
    took = min(timeit.repeat(lambda: router.matching(topic), repeat=100, number=1))
    print(f"R-08: {took * 1e3:.2f} ms")
    assert took <= 0.005


def test_the_route_cache_is_bounded_and_sessions_notice_when_it_starts_anew() -> None:
    bench = Bench(route_cache_bytes=20_000)
    s = bench.client("s")
    s.subscribe("#")
    p = bench.client("p")
    for _ in range(3):
        for i in range(200):
            p.publish(f"t/{i}", b"m")
        assert bench.engine.router.cached <= 20_000
    assert len(payloads(s)) == 600
    assert len(bench.engine.router.entries) < 60


def test_p68_what_a_transport_piles_up_by_itself_ends_the_connection_before_the_stall_timeout() -> None:
    bench = Bench(stall_timeout=1000)
    client = bench.client("c")
    link = Slow()
    client.link = client.channel.link = link
    client.channel.pause_writing()
    bench.pass_time(1)
    assert not link.closed
    link.get_write_buffer_size = lambda: 64 << 20  # type: ignore[method-assign]
    bench.pass_time(1)
    assert link.aborted, "a transport that goes on to answer until all is flushed would never end"
    assert bench.engine.core.events["stalled"] == 1
