"""What keeps the journal: appends what must survive a restart and gives it back. It knows no record's meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class StoreError(Exception):
    """A commit that is not on disk, in words for the operator."""

    def __init__(self, text: str, *, full: bool = False) -> None:
        super().__init__(text)
        self.full = full
        """There was no space: what is tried later may succeed. Otherwise the store takes nothing until a restart."""


class BackupFailed(Exception):
    """A backup that was not made, in words for the operator; nothing of it is kept."""


class StoreOwner(Protocol):
    """Who hears how commits ended. Called on the event loop's thread, in the order the commits were handed over."""

    def written(self, number: int, places: list[tuple[int, int]]) -> None:
        """The commit is as safe as the durability in force promises; one (segment, offset of the body) per frame."""

    def failed(self, number: int, error: StoreError) -> None:
        """Nothing of the commit counts as written, and nothing of it may be acknowledged."""


class Store(Protocol):
    """An append-only journal in segments, cut off at the front only. Used on the event loop's thread; none of it blocks
    but `fetch` and `close`. A position is ``segment << 32 | offset of the record in the segment``."""

    owner: StoreOwner
    """Set before the first `write`."""
    refusing: str
    """Why new messages that must be kept are refused now: "" (they are not), "full" or "failed" (until a restart)."""

    def write(self, number: int, frames: list[tuple[bytes, int]], clock_ms: int) -> None:
        """Append these (body, queue entries in it) as one commit; ends in `written` or `failed`, in order."""

    def read(self, positions: Sequence[int], done: Callable[[list[bytes | None]], None]) -> None:
        """Read whole records, their kind and length included; None for one that cannot be read. Ascending positions are
        read in large blocks."""

    def fetch(self, positions: Sequence[int]) -> list[bytes | None]:
        """As `read`, waiting for the disk: for what is done once, such as moving a session elsewhere. Raises
        TimeoutError."""

    def read_segment(self, segment: int, done: Callable[[list[tuple[int, bytes]]], None]) -> None:
        """Every (position, record) of a segment that is no longer written; what is damaged in it is left out. None of
        one that cannot be read, which `drop` then keeps: a restart may read it."""

    def drop(self, segment: int) -> None:
        """Delete the oldest segment after the commits handed over so far. `sizes` no longer names it, until it turns
        out that one of those commits failed: then it stays. Again is nothing. Raises ValueError for the segment being
        written."""

    def sizes(self) -> dict[int, int]:
        """Bytes of each segment; the highest is being written."""

    def close(self) -> None:
        """Finish what was handed over, make it durable and let go of the files. Blocks up to five seconds."""
