"""What a reload would touch: the instances, listeners and sections that are not the same in two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from broker.config.settings import Settings


@dataclass(slots=True)
class Difference:
    """Whole names such as ``sinks.kafka``, ``listeners.tcp`` or ``limits``."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether both configurations are the same."""
        return not (self.added or self.removed or self.changed)


def diff(old: Settings, new: Settings) -> Difference:
    """Compare by content: the tables' values, secrets included, and the files they read at opening."""
    return compare(old.fingerprints, new.fingerprints)


def compare(old: Mapping[str, str], new: Mapping[str, str]) -> Difference:
    """Compare the `fingerprints` of two Settings."""
    result = Difference()
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before is None:
            result.added.append(name)
        elif after is None:
            result.removed.append(name)
        else:
            (result.unchanged if before == after else result.changed).append(name)
    return result
