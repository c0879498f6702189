"""Rebuilds a folder as it could look after the power was cut at some point of the shim's log. No broker, no clock.

The disk assumed here keeps no promise beyond POSIX:

- What a sync covered before it returned is there: a file's data and size after fsync, fdatasync or a write on an
  O_DSYNC descriptor (of that write, with the size it saw); a folder's entries after fsync of it, one level only.
- Everything else may be there or not, independently: each 512-byte sector of a file holds any one of the contents it
  had since it was synced; the size is any size the file had since, also a sector's end in between; what grew and was
  not written is zeros.
- Entries come and go independently too, but on one name in order; a rename is done or not done, also across folders,
  where a sync of either settles it. Syncing a file does not settle its name.
- What a failed sync covered is not settled by a later successful one: the kernel has forgotten that it is unwritten.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.power.record import Event, Flag, Kind

SECTOR = 512


class Unfollowable(Exception):
    """The log holds something that this model cannot follow."""


class Fate(Protocol):
    """Decides what of the unsynced survives."""

    def keeps(self) -> bool:
        """Whether one change of a folder's entries got to the disk."""

    def pick(self, count: int) -> int:
        """Which of so many states, oldest first, one sector or size has."""


class Chance:
    """By seed. A quarter of the seeds loses everything unsynced, a quarter keeps it, the rest tears."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._share = (0.0, 1.0, 0.5, self._random.random())[seed % 4]

    def keeps(self) -> bool:
        return self._random.random() < self._share

    def pick(self, count: int) -> int:
        if self._share in (0.0, 1.0):
            return (count - 1) * int(self._share)
        return self._random.randrange(count)


class Everything:
    """Nothing is lost: the folder as the broker sees it."""

    def keeps(self) -> bool:
        return True

    def pick(self, count: int) -> int:
        return count - 1


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Change:
    """An unsynced change of one file: data at an offset, or a new size when `data` is None."""

    number: int
    offset: int
    data: bytes | None
    size: int
    """Of the file afterwards."""
    shrinks: bool = False
    forsaken: bool = False
    """Covered by a sync that failed."""

    @property
    def end(self) -> int:
        return self.offset + len(self.data or b"")

    def part(self, start: int, end: int) -> _Change | None:
        """The piece between these offsets."""
        assert self.data is not None
        start, end = max(start, self.offset), min(end, self.end)
        if start >= end:
            return None
        data = self.data[start - self.offset : end - self.offset]
        return _Change(self.number, start, data, self.size, False, self.forsaken)

    def sectors(self) -> range:
        return range(self.offset // SECTOR, (self.end - 1) // SECTOR + 1)


class File:
    """What is on the disk for certain, and the changes since."""

    def __init__(self, content: bytes = b"", mode: int = 0o600) -> None:
        self.mode = mode
        self.size = len(content)
        """As the broker sees it."""
        self._base = bytearray(content)
        self._base_size = len(content)
        self._settled = 0  # number of the last change whose size is on the disk
        self._pending: list[_Change] = []
        self._count = 0

    def write(self, offset: int, data: bytes) -> int:
        """Returns the number of the change."""
        self.size = max(self.size, offset + len(data))
        return self._add(_Change(0, offset, data, self.size))

    def resize(self, size: int) -> int:
        shrinks, self.size = size < self.size, size
        return self._add(_Change(0, 0, None, size, shrinks))

    def _add(self, change: _Change) -> int:
        self._count += 1
        change.number = self._count
        self._pending.append(change)
        return self._count

    @property
    def last(self) -> int:
        """Number of the newest change."""
        return self._count

    def forsake(self, upto: int, only: int = 0) -> None:
        """A sync of the changes up to this one failed; with `only`, the sync of that one write."""
        for change in self._pending:
            if change.number <= upto and only in (0, change.number) and change.data is not None:
                change.forsaken = True

    def settle(self, upto: int, start: int = 0, end: int | None = None) -> None:
        """The changes up to this one are on the disk: the size, and the data in the sectors of this range."""
        if end is None:
            end = max([self.size, *(change.end for change in self._pending)], default=0)
        first, last = start // SECTOR, -(-end // SECTOR)
        # a sector goes to the disk as a whole, so a new write into it saves what a failed sync left behind there
        fresh = {
            sector
            for change in self._pending
            if change.data and change.number <= upto and not change.forsaken
            for sector in change.sectors()
            if first <= sector < last
        }
        left: list[_Change] = []
        for change in self._pending:
            if change.number > upto:
                left.append(change)
                continue
            self._base_size = change.size if change.number > self._settled else self._base_size
            if change.data is None:
                if change.shrinks:
                    del self._base[change.size :]
                    left = [part for old in left if (part := _clipped(old, change.size))]
                continue
            for sector, piece in _by_sector(change, first, last):
                if sector is None or (change.forsaken and sector not in fresh):
                    left.append(piece)
                else:
                    _put(self._base, piece)
        self._settled = max(self._settled, upto)
        self._pending = left

    def after(self, fate: Fate) -> bytes:
        """Its content after the cut."""
        sizes = [change for change in self._pending if change.number > self._settled]
        chosen = fate.pick(len(sizes) + 1)
        kept = sizes[chosen - 1].number if chosen else self._settled
        size = self._size(sizes, chosen, fate)
        content = bytearray(self._base)
        pieces = []
        for change in self._pending:
            if change.data is not None:
                pieces.append(change)
            elif change.shrinks and change.number <= kept:
                del content[change.size :]
                pieces = [part for old in pieces if (part := _clipped(old, change.size))]
        # behind a cut that was not done, the disk has no room yet for what was written after it
        for cut in [c for c in self._pending if c.data is None and c.shrinks and c.number > kept]:
            pieces = [part for p in pieces if (part := p if p.number < cut.number else _clipped(p, cut.size))]
        versions: dict[int, list[_Change]] = {}
        for change in pieces:
            for sector in change.sectors():
                versions.setdefault(sector, []).append(change)
        for sector, changes in versions.items():
            for change in changes[: fate.pick(len(changes) + 1)]:
                piece = change.part(sector * SECTOR, (sector + 1) * SECTOR)
                if piece:
                    _put(content, piece)
        return bytes(content[:size]) + bytes(max(0, size - len(content)))

    def _size(self, changes: list[_Change], chosen: int, fate: Fate) -> int:
        sizes = [self._base_size, *(change.size for change in changes)]
        size = sizes[chosen]
        if chosen and size > sizes[chosen - 1] and changes[chosen - 1].data is not None:
            # a file grows sector by sector
            steps = range(sizes[chosen - 1] // SECTOR + 1, -(-size // SECTOR))
            step = fate.pick(len(steps) + 1)
            return steps[step] * SECTOR if step < len(steps) else size
        return size


def _clipped(change: _Change, size: int) -> _Change | None:
    return change if change.data is None else change.part(0, size)


def _put(content: bytearray, piece: _Change) -> None:
    assert piece.data is not None
    if piece.offset > len(content):
        content.extend(bytes(piece.offset - len(content)))
    content[piece.offset : piece.end] = piece.data


def _by_sector(change: _Change, first: int, last: int) -> Iterator[tuple[int | None, _Change]]:
    """Its pieces: one per sector inside the range; with None what lies before and behind it."""
    if not change.forsaken:  # no need to look at single sectors
        middle = change.part(first * SECTOR, last * SECTOR)
        if middle:
            yield first, middle
    else:
        for sector in change.sectors():
            piece = change.part(sector * SECTOR, (sector + 1) * SECTOR)
            if piece:
                yield (sector if first <= sector < last else None), piece
        return
    for outside in (change.part(0, first * SECTOR), change.part(last * SECTOR, change.end)):
        if outside:
            yield None, outside


# --- folders ---------------------------------------------------------------------------------------------------------


class Folder:
    """`entries` is what the broker sees, `base` what is on the disk for certain."""

    def __init__(self, mode: int = 0o700) -> None:
        self.mode = mode
        self.entries: dict[str, Node] = {}
        self.base: dict[str, Node] = {}


Node = File | Folder


@dataclass(slots=True)
class _Move:
    """An unsynced change of entries, done as a whole or not at all."""

    number: int
    changes: list[tuple[Folder, str, Node | None]]
    settled: bool = False

    def apply(self, view: dict[Folder, dict[str, Node]]) -> None:
        for folder, name, node in self.changes:
            entries = view.setdefault(folder, dict(folder.base))
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Begun:
    """A sync that has not returned."""

    node: Node
    upto: int
    start: int = 0
    end: int | None = None


@dataclass
class Replay:
    """`Replay(events).advance(k)` stands where the first k records have happened and the next has not."""

    events: Sequence[Event]
    initial: Path | None = None
    """The folder as it was when the log began, all of it on the disk; None: empty."""
    lie: bool = False
    """Believe no sync: what a disk that only pretends would leave."""
    at: int = 0
    root: Folder = field(default_factory=Folder)
    _nodes: dict[int, Node] = field(default_factory=dict)  # by inode
    _moves: list[_Move] = field(default_factory=list)
    _number: int = 0
    _begun: dict[int, _Begun] = field(default_factory=dict)
    _ends: dict[int, Event] = field(default_factory=dict)  # DONE by what it ends

    def __post_init__(self) -> None:
        self._ends = {event.reference: event for event in self.events if event.kind is Kind.DONE}
        if self.initial is not None:
            self.root = _scanned(self.initial)

    def advance(self, cut: int) -> Replay:
        """Go forward to that point; it cannot go back."""
        if not self.at <= cut <= len(self.events):
            raise ValueError(f"from {self.at} to {cut} of {len(self.events)}")
        while self.at < cut:
            self._apply(self.events[self.at])
            self.at += 1
        return self

    def rebuild(self, where: Path, fate: Fate) -> None:
        """Write one state that a cut here could leave into a new folder."""
        where.parent.mkdir(parents=True, exist_ok=True)
        view: dict[Folder, dict[str, Node]] = {}
        dropped: set[tuple[int, str]] = set()
        for move in self._moves:
            names = {(id(folder), name) for folder, name, _ in move.changes}
            if move.settled or (not names & dropped and fate.keeps()):
                move.apply(view)
            else:
                dropped |= names
        _write(self.root, where, view, fate)

    # events

    def _apply(self, event: Event) -> None:
        match event.kind:
            case Kind.OPEN:
                self._on_open(event)
            case Kind.WRITE:
                self._file(event).write(event.offset, event.data[: event.result])
            case Kind.SYNC_WRITE:
                self._on_sync_write(event)
            case Kind.TRUNCATE:
                file = self._file(event)
                if event.offset != file.size:
                    file.resize(event.offset)
            case Kind.SYNC:
                node = self._node(event)
                self._begun[event.sequence] = _Begun(node, node.last if isinstance(node, File) else self._number)
            case Kind.DONE:
                self._on_done(event)
            case Kind.RENAME:
                self._on_rename(event)
            case Kind.LINK:
                folder, name = self._place(event.target)
                self._move([(folder, name, self._lookup(event.path))])
            case Kind.UNLINK:
                folder, name = self._place(event.path)
                if name in folder.entries:  # sockets and the like were never followed
                    self._move([(folder, name, None)])
            case Kind.MKDIR:
                folder, name = self._place(event.path)
                node = self._nodes[event.inode] = Folder(event.mode)
                self._move([(folder, name, node)])
            case Kind.MAP:
                raise Unfollowable(f"{event.path} is mapped for writing")

    def _on_open(self, event: Event) -> None:
        if event.flags & Flag.CREATED and not event.flags & Flag.FOLDER:
            folder, name = self._place(event.path)
            self._nodes[event.inode] = File(mode=event.mode)
            self._move([(folder, name, self._nodes[event.inode])])
            return
        node = self._nodes[event.inode] = self._lookup(event.path)
        if event.flags & Flag.EMPTIED and isinstance(node, File) and node.size:
            node.resize(0)

    def _on_sync_write(self, event: Event) -> None:
        file, end = self._file(event), self._ends.get(event.sequence)
        data, offset = event.data, event.offset
        if end is not None:
            written = len(data) if end.flags & Flag.EMPTIED else max(0, end.result)
            data, offset = data[:written], end.offset
        if data:
            number = file.write(offset, data)
            self._begun[event.sequence] = _Begun(file, number, offset, offset + len(data))

    def _on_done(self, event: Event) -> None:
        begun = self._begun.pop(event.reference, None)
        if begun is None or self.lie or event.flags & Flag.LIE:
            return
        node = begun.node
        if isinstance(node, Folder):
            if event.result >= 0:
                self._settle_entries(node, begun.upto)
        elif event.result >= 0:
            node.settle(begun.upto, begun.start, begun.end)
        else:
            node.forsake(begun.upto, only=0 if begun.end is None else begun.upto)

    def _settle_entries(self, folder: Folder, upto: int) -> None:
        for move in self._moves:
            if move.number <= upto and any(changed is folder for changed, _, _ in move.changes):
                move.settled = True
        # earlier changes of the same names happened before: they are part of it
        needed: set[tuple[int, str]] = set()
        for move in reversed(self._moves):
            names = {(id(changed), name) for changed, name, _ in move.changes}
            move.settled = move.settled or bool(names & needed)
            needed |= names if move.settled else set()
        while self._moves and self._moves[0].settled:
            view: dict[Folder, dict[str, Node]] = {}
            self._moves.pop(0).apply(view)
            for changed, entries in view.items():
                changed.base = entries

    def _on_rename(self, event: Event) -> None:
        old, new = self._place(event.path), self._place(event.target)
        node = self._lookup(event.path)
        if old != new:
            self._move([(*old, None), (*new, node)])

    def _move(self, changes: list[tuple[Folder, str, Node | None]]) -> None:
        self._number += 1
        for folder, name, node in changes:
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node
        self._moves.append(_Move(self._number, changes))

    # names

    def _place(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self._lookup(parent)
        if not isinstance(folder, Folder):
            raise Unfollowable(f"{parent} is no folder")
        return folder, name

    def _lookup(self, path: str) -> Node:
        node: Node = self.root
        for name in path.split("/") if path else ():
            if not isinstance(node, Folder) or name not in node.entries:
                raise Unfollowable(f"{path} was there before the log began, or came by a way that is not followed")
            node = node.entries[name]
        return node

    def _node(self, event: Event) -> Node:
        try:
            return self._nodes[event.inode]
        except KeyError:
            raise Unfollowable(f"{event.path}: opened before the log began") from None

    def _file(self, event: Event) -> File:
        node = self._node(event)
        assert isinstance(node, File)
        return node


def _scanned(where: Path) -> Folder:
    folder = Folder(where.stat().st_mode & 0o7777)
    for path in where.iterdir():
        if path.is_symlink():
            raise Unfollowable(f"{path} is a symbolic link")
        if path.is_dir():
            folder.base[path.name] = _scanned(path)
        elif path.is_file():
            folder.base[path.name] = File(path.read_bytes(), path.stat().st_mode & 0o7777)
    folder.entries = dict(folder.base)
    return folder


def _write(folder: Folder, where: Path, view: dict[Folder, dict[str, Node]], fate: Fate) -> None:
    where.mkdir(mode=folder.mode)
    for name, node in view.get(folder, folder.base).items():
        if isinstance(node, Folder):
            _write(node, where / name, view, fate)
        else:
            descriptor = os.open(where / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, node.mode)
            with open(descriptor, "wb") as file:
                file.write(node.after(fate))
