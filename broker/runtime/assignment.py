"""What a worker is told about one instance: plain values that cross a process boundary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.config.settings import Instance


@dataclass(frozen=True, slots=True)
class Assignment:
    """One sink or bridge to run. Two equal assignments are the same instance, unchanged."""

    room: str
    """``sinks`` or ``bridges``."""
    name: str
    kind: str
    base: str
    """Folder against which relative paths of `raw` are resolved."""
    raw: dict[str, Any]
    """The table as it was applied, secrets in clear: never logged, never put on a command line."""
    fingerprint: str = ""
    """Also differs when a file that the table names was changed, such as a certificate."""
    lanes: int = 0
    """Lanes the broker has for it: more than configured when some of a time before may still hold messages."""
    share: tuple[int, ...] = ()
    """The lanes that one of several workers runs; empty: all of them."""

    def __repr__(self) -> str:
        return f"Assignment({self.key}, kind={self.kind})"

    @property
    def key(self) -> str:
        """``sinks.kafka``: unique among all instances."""
        return f"{self.room}.{self.name}"

    @classmethod
    def of(cls, instance: Instance, base: Path, lanes: int = 0) -> Assignment:
        """What a worker needs to know of a loaded instance."""
        return cls(instance.room, instance.name, instance.kind, str(base), instance.raw, instance.fingerprint, lanes)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes on the other side."""
        return {field: getattr(self, field) for field in self.__slots__}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Assignment:
        """The inverse of `to_json`."""
        return cls(**{**value, "share": tuple(value["share"])})
