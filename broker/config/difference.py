"""What a reload would touch: the instances, listeners and sections that are not the same in two configurations."""

from __future__ import annotations

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
    """Compare by content: the table's values, secrets included, and the files it reads at opening."""
    result = Difference()
    for name in sorted({*old.fingerprints, *new.fingerprints}):
        before, after = old.fingerprints.get(name), new.fingerprints.get(name)
        if before is None:
            result.added.append(name)
        elif after is None:
            result.removed.append(name)
        else:
            (result.unchanged if before == after else result.changed).append(name)
    return result
