"""Starts from a broker on a rebuilt folder, behaves as the clients of `load.py` would, and says what is missing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from broker.client.connection import Connection, Handler
from broker.client.session import Publisher
from broker.mqtt.codes import PacketType
from broker.mqtt.packets import Publish
from tests.ledger import read_stamp, stamp
from tests.power.load import (
    AWAY,
    FENCE,
    PUBLISHERS,
    SHELVES,
    SUBSCRIBERS,
    TOGGLER,
    TOGGLES,
    Name,
    Notes,
    Setting,
    connect,
    shelf,
    toggle,
    topic,
)
from tests.servers import PATIENCE

_FENCE_STREAM = "fence"
_QUIET = 2.0 * PATIENCE
"""Seconds without a message after which nothing more is expected, where the fence did not come."""
_SETTLE = 0.05


@dataclass
class Finding:
    """What one state lacks. `lost` counts messages per subscriber: one message missing at two is two."""

    promises: int = 0
    """Acknowledgements that had arrived before the cut."""
    due: int = 0
    """Deliveries that had been promised and not made."""
    lost: int = 0
    sessions: int = 0
    retained: int = 0
    subscriptions: int = 0
    repeated: int = 0
    """QoS 2 messages that came twice."""
    reordered: int = 0
    refused: str = ""
    """Why the broker did not start."""
    texts: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return self.lost + self.sessions + self.retained + self.subscriptions + self.repeated + self.reordered

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.failures or self.refused)

    def __str__(self) -> str:
        names = ("lost", "sessions", "retained", "subscriptions", "repeated", "reordered")
        counts = ", ".join(f"{getattr(self, n)} {n}" for n in names if getattr(self, n))
        what = f"did not start: {self.refused}" if self.refused else counts or "nothing missing"
        return f"{what} ({self.due} deliveries due, {self.promises} promises)" + "".join(
            f"\n    {text}" for text in self.texts[:8]
        )

    def say(self, kind: str, count: int, text: str) -> None:
        setattr(self, kind, getattr(self, kind) + count)
        self.texts.append(f"{kind}: {text}")


class _Returning(Handler):
    """A subscriber that comes back; `unreleased` are the QoS 2 identifiers it still holds."""

    receive_maximum = 1_000

    def __init__(self, unreleased: Iterable[int] = ()) -> None:
        self.names: list[Name] = []
        self.topics: list[str] = []
        self.fenced = False
        self.heard = time.monotonic()
        self._unreleased = set(unreleased)

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        self.heard = time.monotonic()
        if publish.qos == 2 and publish.packet_id in self._unreleased:
            conn.ack(PacketType.PUBREC, publish.packet_id)
            return
        name = read_stamp(publish.payload)
        self.topics.append(publish.topic.decode())
        if name[0] == _FENCE_STREAM:
            self.fenced = True
        else:
            self.names.append(name)
        if publish.qos == 2:
            self._unreleased.add(publish.packet_id)
        if publish.qos:
            conn.ack(PacketType.PUBREC if publish.qos == 2 else PacketType.PUBACK, publish.packet_id)

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == PacketType.PUBREL:
            self._unreleased.discard(packet_id)
            conn.ack(PacketType.PUBCOMP, packet_id)


class _Resuming(Handler):
    """A QoS 2 publisher that comes back and finishes what it had begun."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.refused: list[int] = []

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        if packet_type == PacketType.PUBREC and code < 0x80:
            conn.ack(PacketType.PUBREL, packet_id)
            return
        if packet_type == PacketType.PUBREC:
            self.refused.append(code)
        self.open.discard(packet_id)  # PUBCOMP also says "unknown identifier" where it was released before the cut


async def verify(url: str, notes: Notes, cut: int, window: int = 0) -> Finding:
    """Compare the broker there with what had been promised before that time, by `window` ns: what is younger may be
    lost, and then QoS 2 is not exactly once."""
    safe = cut - window
    finding = Finding(promises=notes.promises(safe))
    async with asyncio.timeout(40 * PATIENCE):
        resumed = await asyncio.gather(
            *(_resume(url, notes, cut, safe, stream, finding) for stream, qos in PUBLISHERS.items() if qos == 2)
        )
        probe = await Publisher.connect(url, client_id="probe")
        returned = {name: await _return(url, notes, cut, safe, name, finding) for name in (*SUBSCRIBERS, TOGGLER)}
        for n in range(TOGGLES):
            await probe.publish(toggle(n), stamp("toggle", n + 1))
        await probe.publish(FENCE, stamp(_FENCE_STREAM, 1))
        for conn, client in returned.values():
            await _finished(conn, client)
        await _check_retained(url, notes, cut, safe, finding)
    promised = {name for name, m in notes.messages.items() if 0 < m.promised < safe}
    if not window:  # else the identifier of one that was lost may be another message's, which its receiver takes for it
        promised |= {name for names in resumed for name in names}
    for name in SUBSCRIBERS:
        _check_messages(notes, cut, safe, name, promised, returned[name][1], finding)
    _check_subscriptions(notes, cut, safe, returned[TOGGLER][1], finding)
    for conn, _ in returned.values():
        conn.abort()
    await probe.conn.disconnect()
    return finding


async def _return(
    url: str, notes: Notes, cut: int, safe: int, name: str, finding: Finding
) -> tuple[Connection, _Returning]:
    receipts = [r for r in notes.receipts.get(name, ()) if r.qos == 2 and r.received < cut]
    client = _Returning(r.packet_id for r in receipts if not _past(r.released, cut))
    conn = await connect(url, name, client)
    _check_session(notes, safe, name, conn, finding)
    return conn, client


def _past(at: int, cut: int) -> bool:
    return 0 < at < cut


def _check_session(notes: Notes, cut: int, name: str, conn: Connection, finding: Finding) -> None:
    if _past(notes.sessions.get(name, 0), cut) and not conn.session_present:
        finding.say("sessions", 1, f"{name} is gone")


async def _resume(url: str, notes: Notes, cut: int, safe: int, stream: str, finding: Finding) -> list[Name]:
    """The messages whose handshake was finished now, none where the session had not been promised."""
    begun = [
        (name, m) for name, m in sorted(notes.messages.items())
        if name[0] == stream and m.sent < cut and not m.refused and not _past(m.completed, cut)
    ]  # fmt: skip
    client = _Resuming()
    conn = await connect(url, stream, client)
    _check_session(notes, safe, stream, conn, finding)
    for name, message in begun:
        client.open.add(message.packet_id)
        if _past(message.promised, cut):
            conn.ack(PacketType.PUBREL, message.packet_id)
        else:
            payload = stamp(*name, message.size)
            conn.publish(topic(stream), payload, 2, packet_id=message.packet_id, dup=True)
    while client.open:
        await conn.ping()
        await asyncio.sleep(0.005)
    await conn.disconnect()
    if client.refused:
        raise RuntimeError(f"{stream}: the broker refused what it was sent again: {client.refused}")
    return [name for name, _ in begun]


async def _finished(conn: Connection, client: _Returning) -> None:
    """Until the fence has come, or nothing has for a while; a new session has no subscription to wait for."""
    while conn.session_present and not client.fenced and time.monotonic() - client.heard < _QUIET:
        await conn.ping()
        await asyncio.sleep(0.005)
    await conn.ping()


# --- comparing -------------------------------------------------------------------------------------------------------


def _check_messages(
    notes: Notes, cut: int, safe: int, subscriber: str, promised: set[Name], client: _Returning, finding: Finding
) -> None:
    before = [r for r in notes.receipts.get(subscriber, ()) if r.received < cut]
    there = {r.name for r in before}
    due = promised - there if _past(notes.sessions.get(subscriber, 0), safe) else set()
    after = Counter(client.names)
    finding.due += len(due)
    lost = sorted(due - after.keys())
    if lost:
        finding.say("lost", len(lost), f"{len(lost)} of {len(due)} for {subscriber}, first {lost[0]}, last {lost[-1]}")
    if SUBSCRIBERS[subscriber] == 2 and safe == cut:
        twice = [n for n, count in after.items() if PUBLISHERS[n[0]] == 2 and (count > 1 or n in there)]
        if twice:
            finding.say("repeated", len(twice), f"{len(twice)} for {subscriber}, first {min(twice)}")
    strangers = [n for n in after if n not in notes.messages or notes.messages[n].sent >= cut]
    if strangers:
        raise RuntimeError(f"{subscriber} got {strangers[0]}, which was not sent before the cut: the rig is wrong")
    if subscriber in AWAY and safe == cut:  # else what was lost may be sent again
        _check_order(client.names, subscriber, finding)


def _check_order(names: list[Name], subscriber: str, finding: Finding) -> None:
    highest: dict[str, int] = {}
    seen: set[Name] = set()
    wrong = []
    for stream, number in names:
        if (stream, number) not in seen and number < highest.get(stream, 0):
            wrong.append((stream, number))
        seen.add((stream, number))
        highest[stream] = max(number, highest.get(stream, 0))
    if wrong:
        finding.say("reordered", len(wrong), f"{len(wrong)} for {subscriber}, first {wrong[0]}")


def _allowed(changes: list[Setting], cut: int, safe: int) -> set[int]:
    """The last value that is safe, and whatever was asked for after it."""
    known = [0, *(s.value for s in changes if s.sent < cut)]
    last = max((n for n, s in enumerate(changes, 1) if _past(s.promised, safe)), default=0)
    return set(known[last:])


async def _check_retained(url: str, notes: Notes, cut: int, safe: int, finding: Finding) -> None:
    client = _Returning()
    conn = await Connection.connect(url, client_id="reader", handler=client)
    assert await conn.subscribe([("retained/#", 1)]) == [1]
    allowed = {name: _allowed(notes.retained.get(name, []), cut, safe) for name in map(shelf, range(1, SHELVES + 1))}
    await conn.ping()
    await asyncio.sleep(_SETTLE)
    while any(0 not in values and name not in client.topics for name, values in allowed.items()):
        if time.monotonic() - client.heard > _QUIET:
            break
        await conn.ping()
        await asyncio.sleep(0.005)
    found = dict(client.names)
    for name, values in allowed.items():
        if found.get(name, 0) not in values:
            finding.say("retained", 1, f"{name} holds {found.get(name, 0)}, not one of {sorted(values)}")
    await conn.disconnect()


def _check_subscriptions(notes: Notes, cut: int, safe: int, client: _Returning, finding: Finding) -> None:
    if not _past(notes.sessions.get(TOGGLER, 0), safe):
        return
    for name in map(toggle, range(TOGGLES)):
        allowed = _allowed(notes.subscriptions.get(name, []), cut, safe)
        present = int(name in client.topics)
        if present not in allowed:
            finding.say("subscriptions", 1, f"{name} is {'still' if present else 'not'} there")
