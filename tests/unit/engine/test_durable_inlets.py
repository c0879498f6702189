"""What bridges bring in at QoS 2: which packet identifiers are known again, whatever becomes of the connection."""

from __future__ import annotations

import pytest

from tests.unit.engine.harness import Client, connect_packet
from tests.unit.engine.parts import PUBREC, ack, publish
from tests.unit.engine.stores import StoredBench
from tests.unit.engine.test_instances import spec, worker
from tests.unit.engine.test_journal import got, resume, subscribed


def begun_anew(bench: StoredBench, name: str) -> Client:
    """A worker's connection that wants nothing of what was before; CONNACK is still to be taken."""
    client = bench.socket(privileged=True)
    client.version = 5
    return client.send(connect_packet(f"isthmus/{name}", 5, clean=True, receive_maximum=65535))


@pytest.mark.parametrize("writing", [False, True])
def test_b03_a_session_begun_anew_knows_no_identifier_of_a_message_that_was_not_on_disk_yet(writing: bool) -> None:
    """A crash must not bring the old meaning of the identifier back: the new message would be a repetition."""
    bench = StoredBench()
    bench.engine.instances.ensure("x", spec(("out/#", 2)))
    subscribed(bench, "s", "t", qos=2).drop()
    bench.commit()
    old = worker(bench, "x/in")
    if not writing:
        bench.client("p").publish("out/1", b"first", 1)  # its commit is under way: what follows waits for the next
    old.publish("t", b"old", 2, ident=7)
    old.drop()
    begun_anew(bench, "x/in")
    bench.commit()
    bench = bench.restart()
    bench.engine.instances.ensure("x", spec(("out/#", 2)))
    bench.commit()
    inlet = worker(bench, "x/in")
    inlet.take()
    inlet.publish("t", b"new", 2, ident=7)
    bench.commit()
    assert inlet.bytes() == ack(PUBREC, 7)
    assert [payload for payload, _, _ in got(resume(bench, "s"))] == [b"old", b"new"]


@pytest.mark.parametrize("lost", [False, True])
def test_d02_a_late_commit_does_not_make_what_a_bridge_brings_in_new(lost: bool) -> None:
    """The worker hears 0x83, cuts its link, and the remote sends the message again: once, whatever became of it."""
    bench = StoredBench()
    bench.engine.instances.ensure("x", spec(("out/#", 2)))
    subscribed(bench, "s", "t", qos=2).drop()
    inlet = worker(bench, "x/in")
    bench.commit()
    inlet.take()
    inlet.publish("t", b"m", 2, ident=7)
    if lost:
        bench.store.fail()
        bench.settle()
        bench.store.make_space()
        assert inlet.take()[-1].code == 0x97
    else:
        bench.pass_time(31)
        assert inlet.bytes() == ack(PUBREC, 7, 0x83)
    inlet.drop()
    again = worker(bench, "x/in")
    again.send(publish("t", b"m", 2, 7, 5, dup=True))
    bench.pass_time(2)
    bench.commit()
    assert again.bytes().endswith(ack(PUBREC, 7))
    assert [payload for payload, _, _ in got(resume(bench, "s"))] == [b"m"]
