"""Which deliveries of one durable session were stored, and how each is acknowledged. No sockets, no tasks.

Theory of operation. A delivery passes through: received, being written, stored, acknowledged. While one connection
lasts that is all. When the connection is lost before the acknowledgement, the broker delivers the message again, with
the same packet id and DUP [MQTT-4.4.0-1]; as long as its packet id was never acknowledged it cannot mean another
message. So what was being written stays in `_writing`, what was stored meanwhile in `_stored` (QoS 1) or `_recorded`
(QoS 2), and a second delivery of those is acknowledged, not written again. An acknowledgement that was sent and lost is
not remembered: the packet id may be in use again by then, and a duplicate is better than a loss. For QoS 2 it may be
remembered until PUBREL, because the id stays in use until PUBCOMP.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

from broker.mqtt.packets import Publish

_PUBACK = 0x40020000
_PUBREC = 0x50020000
_PUBCOMP = 0x70020000
_SWAP = sys.byteorder == "little"


class Sender(Protocol):
    """What receipts need of a connection."""

    def send(self, raw: bytes) -> None: ...


def _encode(words: Iterable[int]) -> bytes:
    """Short acknowledgements (no reason code: success), four bytes each, the same in MQTT 3 and 5."""
    packed = array("I", words)
    if _SWAP:
        packed.byteswap()
    return packed.tobytes()


class Receipts:
    """Acknowledges the deliveries of one session, over as many connections as it takes.

    A batch is acknowledged in the order it was received, in one write.
    """

    __slots__ = ("_again", "_complete", "_recorded", "_sender", "_stored", "_writing", "acknowledged", "epoch")

    def __init__(self) -> None:
        self._sender: Sender | None = None
        self.epoch = 0
        """Number of the connection; a batch is stored under the epoch it was received in."""
        self.acknowledged = 0
        """Deliveries acknowledged since the start."""
        self._recorded: set[int] = set()
        self._writing: dict[int, Publish] = {}
        self._stored: dict[int, Publish] = {}
        self._again: set[int] = set()
        self._complete: list[int] = []

    def attach(self, sender: Sender, session_present: bool) -> None:
        """A connection stands. Without a present session nothing known before means anything."""
        self._sender = sender
        self.epoch += 1
        self._again.clear()
        self._complete.clear()
        if not session_present:
            self._recorded.clear()
            self._writing.clear()
            self._stored.clear()

    def lost(self, writing: Sequence[Publish], epoch: int) -> None:
        """The connection is gone while `writing`, received in `epoch`, is with the sink and not acknowledged."""
        self._sender = None
        self._again.clear()
        self._complete.clear()
        if epoch == self.epoch:  # one that outlived a connection before is in `_writing` as far as it still counts
            self._writing = {publish.packet_id: publish for publish in writing if publish.qos}

    def seen(self, publish: Publish) -> bool:
        """Whether this delivery must not be written (again); answers it when it is already stored."""
        packet_id = publish.packet_id
        if publish.qos == 0:
            return False
        if publish.qos == 2 and packet_id in self._recorded:
            self._send((_PUBREC | packet_id,))  # [MQTT-4.3.3-10]
            return True
        if packet_id in self._stored:
            del self._stored[packet_id]
            if publish.dup:
                self._send((_PUBACK | packet_id,))
                self.acknowledged += 1
            return publish.dup
        if packet_id in self._writing:
            if publish.dup:
                self._again.add(packet_id)
            else:
                del self._writing[packet_id]
            return publish.dup
        return False

    @property
    def watching(self) -> bool:
        """Whether `seen` can be true for anything at all: asked once per packet."""
        return bool(self._recorded or self._stored or self._writing)

    def stored(self, batch: Sequence[Publish], epoch: int) -> None:
        """These are safe (or in the dead letters). Acknowledge them, or remember them for their next delivery."""
        if epoch == self.epoch and self._sender is not None:
            self._acknowledge(batch)
            return
        now = []
        for publish in batch:
            packet_id = publish.packet_id
            if self._writing.get(packet_id) is not publish:
                continue  # QoS 0, a session that is no more, or an id that has a new meaning
            del self._writing[packet_id]
            if packet_id in self._again:
                self._again.discard(packet_id)
                now.append(publish)
            elif publish.qos == 2:
                self._recorded.add(packet_id)
            else:
                self._stored[packet_id] = publish
        self._acknowledge(now)

    def on_pubrel(self, packet_id: int) -> None:
        """The broker released a QoS 2 id: it is free once we complete it, known to us or not."""
        self._recorded.discard(packet_id)
        self._complete.append(packet_id)

    def flush(self) -> None:
        """Answer the PUBRELs of one read in one write."""
        if self._complete:
            released, self._complete = self._complete, []
            self._send([_PUBCOMP | packet_id for packet_id in released])  # [MQTT-4.3.3-11]

    def _acknowledge(self, batch: Sequence[Publish]) -> None:
        words = [_PUBACK | p.packet_id for p in batch if p.qos == 1]
        if len(words) != len(batch):
            self._recorded.update(p.packet_id for p in batch if p.qos == 2)
            words = [(_PUBACK if p.qos == 1 else _PUBREC) | p.packet_id for p in batch if p.qos]
        self.acknowledged += len(words)
        self._send(words)

    def _send(self, words: Sequence[int]) -> None:
        if words and self._sender is not None:
            self._sender.send(_encode(words))
