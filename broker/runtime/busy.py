"""A page shared by the broker and one worker: which instance the worker was busy with when it died.

Each instance has a slot of eight bytes: zero while the worker is outside its code, else the number of the entry, which
only grows. A crash belongs to the instance that was entered last and not left. Writing costs no system call.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress

SLOTS = 4096
_WIDTH = 8


class BusyPage:
    """Both ends of the page: the broker creates it and reads `last`, the worker opens it and marks."""

    __slots__ = ("_entries", "_page", "fileno")

    def __init__(self, fileno: int) -> None:
        self.fileno = fileno
        self._page = mmap.mmap(fileno, SLOTS * _WIDTH)
        self._entries = 0

    @classmethod
    def create(cls) -> BusyPage:
        """An empty page without a name in the file system."""
        if hasattr(os, "memfd_create"):
            fileno = os.memfd_create("isthmus-busy")
        else:  # pragma: no cover - systems without memfd
            fileno, path = tempfile.mkstemp(prefix="isthmus-busy-")
            os.unlink(path)
        os.ftruncate(fileno, SLOTS * _WIDTH)
        return cls(fileno)

    def clear(self) -> None:
        """Forget everything: a new worker starts."""
        self._page[:] = bytes(SLOTS * _WIDTH)

    def last(self) -> int | None:
        """The slot entered last and not left, or None."""
        entries = memoryview(self._page).cast("Q")
        try:
            newest = max(entries)
            return list(entries).index(newest) if newest else None
        finally:
            entries.release()

    def marker(self, slot: int | None) -> Marker:
        """What the code of one instance calls around itself; without a slot it marks nothing."""
        if slot is None or not 0 <= slot < SLOTS:
            return Marker(None)
        return Marker(lambda busy: self._mark(slot, busy))

    def close(self) -> None:
        """Give back the page and its descriptor."""
        self._page.close()
        with suppress(OSError):
            os.close(self.fileno)

    def _mark(self, slot: int, busy: bool) -> None:
        if busy:
            self._entries += 1
        value = self._entries if busy else 0
        self._page[slot * _WIDTH : slot * _WIDTH + _WIDTH] = value.to_bytes(_WIDTH, "little")


class Marker:
    """Counts how often one instance's code is entered at once and marks its slot while it is."""

    __slots__ = ("_inside", "_mark")

    def __init__(self, mark: Callable[[bool], None] | None = None) -> None:
        self._mark = mark
        self._inside = 0

    def __enter__(self) -> None:
        self._inside += 1
        if self._mark is not None:
            self._mark(True)

    def __exit__(self, *error: object) -> None:
        self._inside -= 1
        if not self._inside and self._mark is not None:
            self._mark(False)
