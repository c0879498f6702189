"""What was promised, what came out where, and what is wrong with that. Knows no network and no process.

A stream is one publisher's messages to one topic, numbered from 1 (`tests.ledger.stamp`). A path is a place where
messages come out: a subscriber, a table, a Kafka topic. Every stream is due on the paths it was announced with.
"""

from __future__ import annotations

import enum
import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from tests.ledger import read_stamp, stamp

_MOST_COPIES = 255


class Copies(enum.Enum):
    """How often a message may come out of a path."""

    ANY = "at least once"
    ONCE = "once what was published at QoS 2, the rest at least once"
    AS_SENT = "once what was published at QoS 2, the rest at most as often as its publisher sent it"
    LATEST = "the last of every stream, once"


class Stream:
    """One publisher's messages to one topic."""

    __slots__ = ("acknowledged", "kind", "name", "paths", "qos", "sent")

    def __init__(self, name: str, qos: int, paths: tuple[str, ...], kind: str) -> None:
        self.name = name
        self.qos = qos
        self.paths = paths
        self.kind = kind
        """Under what its acknowledgements are counted."""
        self.sent = bytearray()
        """How often each number was sent."""
        self.acknowledged = array("H")
        """The round in which each number was acknowledged, from 1; 0: it was not."""


class Missing(NamedTuple):
    """An acknowledged message that did not come out."""

    stream: str
    number: int
    round: int
    """In which it was acknowledged."""


class Late(NamedTuple):
    """A message that came out for the first time behind a later one of its stream."""

    stream: str
    number: int
    highest: int


class Repeat(NamedTuple):
    """A message that came out more often than it may."""

    stream: str
    number: int
    copies: int


@dataclass
class PathReport:
    """What came out of one path."""

    received: int = 0
    """Every copy counts."""
    extra: int = 0
    """Copies beyond the first, allowed or not."""
    lost: list[Missing] = field(default_factory=list)
    repeated: list[Repeat] = field(default_factory=list)
    late: list[Late] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    """What nobody sent, or not to here."""

    def problems(self) -> list[str]:
        found = []
        if self.lost:
            found.append(f"{len(self.lost)} acknowledged messages lost, first {_spell(self.lost[0])}")
        if self.repeated:
            found.append(f"{len(self.repeated)} came out too often, first {_spell(self.repeated[0])}")
        if self.late:
            found.append(f"{len(self.late)} out of order, first {_spell(self.late[0])}")
        if self.strangers:
            found.append(f"{len(self.strangers)} that nobody sent there, first {self.strangers[0]}")
        return found


class Books:
    """Filled by everybody while a run lasts. With `lines`, each entry is also written there, for who looks into a
    failure: ``ack STREAM NUMBER``, ``got PATH STREAM NUMBER`` and what `note` is told, in the order of events."""

    def __init__(self, lines: BinaryIO | None = None) -> None:
        self.round = 1
        self.acknowledged: Counter[str] = Counter()
        """By kind of stream."""
        self.received = 0
        self.streams: dict[str, Stream] = {}
        """By name."""
        self._lines = lines
        self._paths: dict[str, Copies] = {}
        self._counts: dict[str, dict[str, bytearray]] = {}
        self._highest: dict[str, dict[str, int]] = {}
        self._late: dict[str, list[Late]] = defaultdict(list)
        self._strangers: dict[str, list[str]] = defaultdict(list)

    def path(self, name: str, copies: Copies) -> None:
        """Announce a place where messages come out."""
        self._paths[name] = copies
        self._counts[name] = {}
        self._highest[name] = {}

    def stream(self, name: str, qos: int, paths: Sequence[str], kind: str) -> Stream:
        """Announce a stream and where its messages must come out."""
        unknown = [path for path in paths if path not in self._paths]
        if unknown or name in self.streams:
            raise ValueError(f"stream {name} is announced twice or to unknown paths {unknown}")
        stream = self.streams[name] = Stream(name, qos, tuple(paths), kind)
        self.acknowledged[kind] += 0
        for path in paths:
            self._counts[path][name] = bytearray()
            self._highest[path][name] = 0
        return stream

    def next(self, stream: Stream, size: int = 0) -> tuple[int, bytes]:
        """The stream's next number and its payload; `sent` is to follow."""
        stream.sent.append(0)
        stream.acknowledged.append(0)
        number = len(stream.sent)
        return number, stamp(stream.name, number, size)

    def sent(self, stream: Stream, number: int) -> None:
        """The message leaves its publisher, for the first time or again."""
        stream.sent[number - 1] = min(stream.sent[number - 1] + 1, _MOST_COPIES)

    def promised(self, stream: Stream, number: int) -> None:
        """Somebody answered for the message: PUBACK or PUBREC."""
        if not 0 < number <= len(stream.sent) or not stream.sent[number - 1]:
            raise ValueError(f"{stream.name}|{number} was never sent")
        if stream.acknowledged[number - 1]:
            return
        stream.acknowledged[number - 1] = self.round
        self.acknowledged[stream.kind] += 1
        if self._lines is not None:
            self._lines.write(b"ack\t%b\t%d\n" % (stream.name.encode(), number))

    def arrived(self, path: str, payload: bytes) -> None:
        """A message came out of the path, in this order."""
        self.received += 1
        try:
            name, number = read_stamp(payload)
        except ValueError:
            self._strangers[path].append(repr(payload[:40]))
            return
        if self._lines is not None:
            self._lines.write(b"got\t%b\t%b\t%d\n" % (path.encode(), name.encode(), number))
        counts = self._counts[path].get(name)
        if counts is None or not 0 < number <= len(self.streams[name].sent):
            self._strangers[path].append(f"{name}|{number}")
            return
        if number > len(counts):
            counts.extend(bytes(number - len(counts)))
        before = counts[number - 1]
        counts[number - 1] = min(before + 1, _MOST_COPIES)
        highest = self._highest[path]
        if number > highest[name]:
            highest[name] = number
        elif not before:
            self._late[path].append(Late(name, number, highest[name]))

    def note(self, text: str) -> None:
        """A line for who reads the record: a kill, a start."""
        if self._lines is not None:
            self._lines.write(f"{text}\n".encode())

    def behind(self, path: str, stream: str) -> int:
        """Messages between the last one sent and the highest that has come out of a path."""
        return len(self.streams[stream].sent) - self._highest[path][stream]

    def times_sent(self, stream: str, number: int) -> int:
        """How often a message was sent; 0 for one that never was."""
        there = self.streams.get(stream)
        return there.sent[number - 1] if there is not None and 0 < number <= len(there.sent) else 0

    def qos(self, stream: str) -> int:
        """At which QoS a stream is published; 0 for one nobody announced."""
        there = self.streams.get(stream)
        return there.qos if there is not None else 0

    def missing(self, paths: Iterable[str]) -> int:
        """Acknowledged messages that have not come out of these paths yet."""
        return sum(len(self._lost(path)) for path in paths)

    def compare(self) -> dict[str, PathReport]:
        """What came of every path's messages."""
        return {path: self._compare(path, copies) for path, copies in self._paths.items()}

    def _lost(self, path: str) -> list[Missing]:
        found = []
        for name, counts in self._counts[path].items():
            acknowledged = self.streams[name].acknowledged
            padded = counts.ljust(len(acknowledged), b"\0")
            lost = [
                Missing(name, number, round_)
                for number, (round_, copies) in enumerate(zip(acknowledged, padded, strict=True), 1)
                if round_ and not copies
            ]
            if self._paths[path] is Copies.LATEST:
                # a later one may have taken its place
                lost = [missing for missing in lost[-1:] if missing.number > self._highest[path][name]]
            found += lost
        return found

    def _compare(self, path: str, copies: Copies) -> PathReport:
        report = PathReport(lost=self._lost(path), late=self._late[path], strangers=self._strangers[path])
        report.received = len(report.strangers)
        for name, counts in self._counts[path].items():
            stream = self.streams[name]
            report.received += sum(counts)
            for number, count in enumerate(counts, 1):
                if count > 1:
                    report.extra += count - 1
                    if count > _allowed(copies, stream, number):
                        report.repeated.append(Repeat(name, number, count))
        return report


def _allowed(copies: Copies, stream: Stream, number: int) -> int:
    if copies is Copies.ANY:
        return _MOST_COPIES
    if stream.qos == 2 or copies is Copies.LATEST:
        return 1
    return _MOST_COPIES if copies is Copies.ONCE else stream.sent[number - 1]


# --- Kafka -----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A record of a Kafka topic whose timestamps are the time of the append, one for each batch."""

    partition: int
    appended: int
    """Milliseconds since 1970."""
    msgid: str
    """Empty when the header is missing."""
    stream: str
    number: int


@dataclass
class KafkaReport:
    """What was stored more than once, and whether kills explain it."""

    records: int = 0
    repeated: int = 0
    """Records whose message id was in their partition before."""
    batches: int = 0
    """Batches that were stored again, whole or in part."""
    unexplained: list[str] = field(default_factory=list)
    """Batches stored again for which no kill of their own is left."""
    identities: list[str] = field(default_factory=list)
    """Messages without id, in two partitions, or under more ids than their publisher sent them."""

    def problems(self) -> list[str]:
        found = []
        if self.unexplained:
            found.append(
                f"{len(self.unexplained)} batches stored twice beyond one per partition and kill, "
                f"first {self.unexplained[0]}"
            )
        if self.identities:
            found.append(f"{len(self.identities)} messages with wrong ids, first {self.identities[0]}")
        return found


def compare_kafka(records: Iterable[Stored], kills: Sequence[float], books: Books, slack: float = 500) -> KafkaReport:
    """Records in the order of each partition's offsets, kills in milliseconds since 1970.

    A batch may be stored again when a kill came between its append and the repetition, one batch of each partition for
    each kill. A request that was on its way is appended up to ``slack`` milliseconds after the kill.
    """
    report = KafkaReport()
    last: dict[str, Stored] = {}
    again: dict[int, dict[int, int]] = defaultdict(dict)  # partition: when the batch was stored: when first repeated
    identities: dict[tuple[str, int], set[str]] = defaultdict(set)
    for record in records:
        report.records += 1
        if not record.msgid:
            report.identities.append(f"{record.stream}|{record.number} has none")
            continue
        identities[record.stream, record.number].add(record.msgid)
        before = last.get(record.msgid)
        last[record.msgid] = record
        if before is None:
            continue
        if (before.stream, before.number) != (record.stream, record.number):
            report.identities.append(f"{before.stream}|{before.number} and {record.stream}|{record.number} share one")
        elif before.partition != record.partition:
            report.identities.append(f"{record.stream}|{record.number} is in two partitions")
        report.repeated += 1
        again[record.partition].setdefault(before.appended, record.appended)
    for (stream, number), ids in identities.items():
        if len(ids) > (1 if books.qos(stream) == 2 else books.times_sent(stream, number)):
            report.identities.append(f"{stream}|{number} has {len(ids)}")
    for partition, batches in sorted(again.items()):
        report.batches += len(batches)
        for stored in _without_kill([(s - slack, e, s) for s, e in batches.items()], sorted(kills)):
            report.unexplained.append(f"partition {partition}, appended at {stored}")
    return report


def _without_kill(batches: list[tuple[float, float, int]], kills: Sequence[float]) -> list[int]:
    """Give each batch (from, until, when stored) a kill of its own in that time; answers those that get none."""
    left = sorted(batches, reverse=True)
    waiting: list[tuple[float, int]] = []
    without: list[int] = []
    for kill in kills:
        while left and left[-1][0] <= kill:
            _, until, stored = left.pop()
            heapq.heappush(waiting, (until, stored))
        while waiting and waiting[0][0] < kill:
            without.append(heapq.heappop(waiting)[1])
        if waiting:
            heapq.heappop(waiting)  # the one that can wait least
    return sorted([*without, *(stored for _, stored in waiting), *(stored for _, _, stored in left)])


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """One run. It passes when `problems` is empty."""

    seed: int
    rounds: int
    acknowledged: dict[str, int]
    """By kind; each kind must have some."""
    elsewhere: str
    """The kind that another broker acknowledged; not part of `total`."""
    kills: dict[str, int]
    """Processes seen to die by our signal, by what they were."""
    paths: dict[str, PathReport]
    kafka: KafkaReport
    refused: int = 0
    """Messages answered with a reason of 0x80 or more."""
    sessions_lost: dict[str, int] = field(default_factory=dict)
    """Session Present was 0 where a session had been; by whose it was."""
    left_behind: list[str] = field(default_factory=list)
    """Workers that outlived their broker."""
    unfinished: list[str] = field(default_factory=list)
    """What had not come to rest when the patience was over."""
    defects: list[str] = field(default_factory=list)
    """Log lines of the broker and its workers that came with a traceback."""
    errors: list[str] = field(default_factory=list)
    """What broke a rule of MQTT or of the run."""
    seconds: float = 0.0
    slowest_ready: float = 0.0
    """Seconds from the start of the process to its `ready` line."""

    @property
    def total(self) -> int:
        """What the broker under fire acknowledged."""
        return sum(n for kind, n in self.acknowledged.items() if kind != self.elsewhere)

    @property
    def lost(self) -> int:
        return sum(len(path.lost) for path in self.paths.values())

    def problems(self) -> list[str]:
        """One line each. A run that saw no acknowledgement or no kill has proved nothing and fails."""
        found = [f"no message was acknowledged: {kind}" for kind, n in self.acknowledged.items() if not n]
        if not self.acknowledged:
            found.append("no message was acknowledged")
        if not sum(self.kills.values()):
            found.append("no kill was seen")
        for name, path in self.paths.items():
            found += [f"{name}: {text}" for text in path.problems()]
        found += [f"Kafka: {text}" for text in self.kafka.problems()]
        if self.refused:
            found.append(f"{self.refused} messages were refused")
        found += [f"{n} sessions of {whose} were lost" for whose, n in self.sessions_lost.items() if n]
        found += [f"left behind: {text}" for text in self.left_behind]
        found += [f"not at rest: {text}" for text in self.unfinished]
        if self.defects:
            found.append(f"{len(self.defects)} tracebacks in the log, first: {self.defects[0]}")
        return found + self.errors

    def lines(self) -> list[str]:
        """For people."""
        kills = ", ".join(f"{n} {what}" for what, n in sorted(self.kills.items())) or "none"
        out = [f"acknowledged  {self.total:>9,}  in {self.seconds:.0f} s, {self.total / max(self.seconds, 1):,.0f}/s"]
        out += [
            f"              {n:>9,}  {kind}{', not in the sum' if kind == self.elsewhere else ''}"
            for kind, n in self.acknowledged.items()
        ]
        out.append(f"kills seen    {sum(self.kills.values()):>9,}  ({kills})")
        out.append(f"slowest ready {self.slowest_ready:>9.2f}  s")
        out.append(f"lost          {self.lost:>9,}")
        out.append(f"{'path':22} {'received':>9} {'lost':>7} {'extra':>7} {'too often':>9} {'late':>6}")
        for name, path in self.paths.items():
            out.append(
                f"{name:22} {path.received:>9,} {len(path.lost):>7,} {path.extra:>7,} {len(path.repeated):>9,} "
                f"{len(path.late):>6,}"
            )
        out.append(f"Kafka: {self.kafka.repeated:,} records in {self.kafka.batches:,} batches stored again")
        out += [f"FAILED: {text}" for text in self.problems()]
        return out


def _spell(found: Missing | Late | Repeat) -> str:
    stream, number, third = found
    return f"{stream}|{number} ({type(found)._fields[2]} {third})"
