"""Compares what was acknowledged with what arrived: lost, twice, out of order.

Senders stamp every message with (stream, number); numbers of a stream rise by one from 1. A stream is whatever must
keep its order: a publisher and topic.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field


def stamp(stream: str, number: int, size: int = 0) -> bytes:
    """A payload that carries its place: `stream|number|`, filled up to `size` bytes."""
    if "|" in stream:
        raise ValueError("a stream's name holds no |")
    head = f"{stream}|{number}|".encode()
    return head + b"x" * max(0, size - len(head))


def read_stamp(payload: bytes) -> tuple[str, int]:
    """The reverse of `stamp`; raises ValueError for a payload that is not one."""
    stream, number, _ = payload.split(b"|", 2)
    return stream.decode(), int(number)


@dataclass
class Report:
    """What a comparison found; an empty string from `problem` is a pass."""

    acknowledged: int = 0
    arrived: int = 0
    unacknowledged: int = 0
    """Sent, never acknowledged: may have arrived or not."""
    lost: list[tuple[str, int]] = field(default_factory=list)
    duplicates: int = 0
    reordered: list[tuple[str, int, int]] = field(default_factory=list)
    """Stream, the number that came too late, the highest before it."""
    strangers: int = 0
    """Arrived but never sent."""

    def problem(self, *, duplicates_allowed: bool = False) -> str:
        """What is wrong, in one line. Nothing acknowledged at all is always wrong: it would prove nothing."""
        found = []
        if not self.acknowledged:
            found.append("nothing was acknowledged, so nothing was tested")
        if self.lost:
            found.append(f"{len(self.lost)} acknowledged messages lost, first {self.lost[0]}")
        if self.duplicates and not duplicates_allowed:
            found.append(f"{self.duplicates} arrived more than once")
        if self.reordered:
            found.append(f"{len(self.reordered)} out of order, first {self.reordered[0]}")
        if self.strangers:
            found.append(f"{self.strangers} arrived that nobody sent")
        return "; ".join(found)


class Ledger:
    """Filled by the test while it runs, compared at the end."""

    def __init__(self) -> None:
        self._sent: dict[str, int] = defaultdict(int)
        self._acknowledged: dict[str, set[int]] = defaultdict(set)
        self._arrived: list[tuple[str, int]] = []

    def next(self, stream: str, size: int = 0) -> tuple[int, bytes]:
        """The next number of the stream and its payload."""
        self._sent[stream] += 1
        number = self._sent[stream]
        return number, stamp(stream, number, size)

    def acknowledged(self, stream: str, number: int) -> None:
        """The broker promised this message."""
        if not 0 < number <= self._sent[stream]:
            raise ValueError(f"{stream}|{number} was never sent")
        self._acknowledged[stream].add(number)

    def arrived(self, payload: bytes) -> None:
        """A message came out at the other end, in this order."""
        self._arrived.append(read_stamp(payload))

    @property
    def acknowledged_count(self) -> int:
        return sum(map(len, self._acknowledged.values()))

    def missing(self) -> int:
        """Acknowledged messages that have not arrived yet: wait until 0."""
        there = set(self._arrived)
        return sum((stream, n) not in there for stream, numbers in self._acknowledged.items() for n in numbers)

    def compare(self, *, redelivery: bool = False) -> Report:
        """Duplicates never count as out of order; with `redelivery` neither does anything behind a repeated number,
        as when a session resends all that was unacknowledged."""
        report = Report(acknowledged=self.acknowledged_count, arrived=len(self._arrived))
        report.unacknowledged = sum(self._sent.values()) - report.acknowledged
        counts = Counter(self._arrived)
        report.duplicates = sum(n - 1 for n in counts.values())
        report.strangers = sum(not 0 < number <= self._sent.get(stream, 0) for stream, number in counts)
        report.lost = sorted(
            (stream, n) for stream, numbers in self._acknowledged.items() for n in numbers if (stream, n) not in counts
        )
        highest: dict[str, int] = defaultdict(int)
        seen: set[tuple[str, int]] = set()
        for stream, number in self._arrived:
            if (stream, number) in seen:
                if redelivery:
                    highest[stream] = min(highest[stream], number)
                continue
            seen.add((stream, number))
            if number < highest[stream]:
                report.reordered.append((stream, number, highest[stream]))
            highest[stream] = max(highest[stream], number)
        return report

    def check(self, *, duplicates_allowed: bool = False, redelivery: bool = False) -> Report:
        """Compare and raise AssertionError with the finding; returns the report for its figures."""
        report = self.compare(redelivery=redelivery)
        problem = report.problem(duplicates_allowed=duplicates_allowed)
        assert not problem, f"{problem} ({report.acknowledged} acknowledged, {report.arrived} arrived)"
        return report
