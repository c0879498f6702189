"""How much space the disk has, and when that is too little."""

from __future__ import annotations

import logging
import os
from enum import IntEnum
from pathlib import Path

log = logging.getLogger(__name__)

SHARE = 20
"""The limit is at most one part in so many of the disk: 5 %."""
EARLY = 3
"""So many times the limit are worth a warning."""


class Space(IntEnum):
    """What is left, by what follows from it."""

    PLENTY = 0
    LOW = 1
    SHORT = 2
    """Below the limit: new messages that must be kept are refused."""


class DiskWatch:
    """Looks at free space and says once when its class changes (D-07)."""

    def __init__(self, folder: Path, min_free: int) -> None:
        self._folder = folder
        self._min_free = min_free
        self.space = Space.PLENTY

    def look(self) -> Space:
        """The class of free space now; as it was where the disk does not answer."""
        try:
            stat = os.statvfs(self._folder)
        except OSError:
            return self.space
        free = stat.f_bavail * stat.f_frsize
        limit = min(self._min_free, stat.f_blocks * stat.f_frsize // SHARE)
        space = Space.SHORT if free < limit else Space.LOW if free < EARLY * limit else Space.PLENTY
        if space is not self.space:
            self._say(space, free, limit)
            self.space = space
        return space

    def _say(self, space: Space, free: int, limit: int) -> None:
        megabytes = (self._folder, free >> 20, limit >> 20)
        if space is Space.SHORT:
            log.error(
                "%s: the disk has %d MiB left, below %d: new messages that must be kept are refused until there is "
                "more; make space, or lower broker.min_free",
                *megabytes,
            )
        elif self.space is Space.SHORT:
            log.warning("%s: the disk has %d MiB left, %d are enough: messages are taken again", *megabytes)
        elif space is Space.LOW:
            log.warning("%s: the disk has %d MiB left; below %d new messages that must be kept are refused", *megabytes)
        else:
            log.info("%s: the disk has %d MiB left; %d are enough", *megabytes)
