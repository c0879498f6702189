"""Which server, in which version, as whom."""

from __future__ import annotations

from typing import Any

import pytest

from bridges._mqtt_remote import Remote
from broker.client.errors import NoAnswer, Refused, TimedOut, Unreachable
from broker.mqtt.packets import Will

URL = "mqtt://far:1883"
WILL = Will(b"state", b"0", 1, True)


class Server:
    """Answers each CONNECT as the test says; keeps what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[tuple[int, bool], str, Will | None]] = []

    async def __call__(self, url: str, dialect: tuple[int, bool], client_id: str, will: Will | None) -> Any:
        self.asked.append((dialect, client_id, will))
        error = self.answer(dialect, client_id, will)
        if error is not None:
            raise error
        return "connected"

    @property
    def dialects(self) -> list[tuple[int, bool]]:
        return [dialect for dialect, _, _ in self.asked]


def remote(protocol: Any = "auto", try_private: bool = True, client_id: str = "region-1") -> Remote:
    return Remote((URL,), protocol, try_private, client_id)


async def test_auto_begins_with_version_5() -> None:
    server = Server(lambda *_: None)
    assert await remote().open(server, URL, None) == "connected"
    assert server.dialects == [(5, False)]


async def test_b07_a_refused_version_goes_down_and_is_remembered() -> None:
    far = remote()
    server = Server(lambda dialect, *_: Refused(1, 4) if dialect[0] == 5 else None)
    await far.open(server, URL, None)
    await far.open(server, URL, None)
    assert server.dialects == [(5, False), (4, True), (4, True)]


async def test_the_private_bit_is_given_up_after_a_refusal_and_after_a_silent_close() -> None:
    for error in (Refused(1, 4), NoAnswer("closed")):
        server = Server(lambda dialect, *_, error=error: error if dialect[1] else None)
        await remote("3.1.1").open(server, URL, None)
        assert server.dialects[0] == (4, True)
        assert server.dialects[-1] == (4, False)


async def test_one_broken_link_does_not_cost_a_version() -> None:
    failures = [NoAnswer("cut")]
    server = Server(lambda *_: failures.pop() if failures else None)
    await remote().open(server, URL, None)
    assert server.dialects == [(5, False), (5, False)]


async def test_a_remembered_version_is_not_given_up_by_a_silent_close() -> None:
    far = remote()
    await far.open(Server(lambda *_: None), URL, None)
    server = Server(lambda *_: NoAnswer("closed"))
    with pytest.raises(NoAnswer):
        await far.open(server, URL, None)
    assert server.dialects == [(5, False)]


async def test_another_server_at_a_remembered_address_is_asked_afresh() -> None:
    far = remote()
    await far.open(Server(lambda *_: None), URL, None)
    server = Server(lambda dialect, *_: Refused(0x84, 5) if dialect[0] == 5 else None)
    await far.open(server, URL, None)
    assert server.dialects == [(5, False), (5, False), (4, True)]


async def test_silence_is_not_waited_for_twice() -> None:
    server = Server(lambda *_: TimedOut("silent"))
    with pytest.raises(TimedOut):
        await remote("3.1.1").open(server, URL, None)
    assert server.dialects == [(4, True), (4, False)]


@pytest.mark.parametrize("error", [Refused(0x86, 5), Unreachable("down")])
async def test_other_failures_end_the_attempt_at_once(error: Exception) -> None:
    server = Server(lambda *_: error)
    with pytest.raises(type(error)):
        await remote().open(server, URL, None)
    assert len(server.asked) == 1


async def test_without_try_private_the_bit_is_never_sent() -> None:
    server = Server(lambda *_: Refused(0x84, 5))
    with pytest.raises(Refused):
        await remote(try_private=False).open(server, URL, None)
    assert server.dialects == [(5, False), (4, False), (3, False)]


async def test_b07_long_names_are_shortened_uniquely_where_they_must_be() -> None:
    long = "a-node-with-a-long-name.headquarters"
    server = Server(lambda dialect, name, *_: Refused(2, 4) if len(name) > 23 else None)
    far = remote("3.1.1", client_id=long)
    await far.open(server, URL, None)
    short = server.asked[-1][1]
    assert server.asked[0][1] == long
    assert len(short) <= 23
    other = remote("3.1", client_id=long + "2").client_id(URL, 3)
    assert other != short
    assert len(other) <= 23
    assert remote("3.1", client_id="short").client_id(URL, 3) == "short"


@pytest.mark.parametrize(
    ("code", "qos", "retain", "offered"), [(0x9A, 1, False, True), (0x9B, 0, True, True), (0x90, 0, False, False)]
)
async def test_b15_a_will_the_server_cannot_take_is_offered_differently(
    code: int, qos: int, retain: bool, offered: bool
) -> None:
    first = [Refused(code, 5)]
    server = Server(lambda *_: first.pop() if first else None)
    far = remote("5")
    await far.open(server, URL, WILL)
    will = server.asked[-1][2]
    assert (will is not None) is offered
    if will is not None:
        assert (will.qos, will.retain) == (qos, retain)
    assert far.manner(URL).notify is offered
