"""The `topics` lines of a bridge: which messages cross it, in which direction, and under which name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from broker.mqtt.errors import ProtocolError
from broker.mqtt.text import check_text

_KNOWN = 20_000  # topics whose route is remembered; then it starts afresh


class TopicLine(BaseModel):
    """One `[[bridges.NAME.topics]]`: a set of topics that crosses the bridge."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    filter: str
    """MQTT topic filter, without the prefixes. Empty: the prefixes are two whole topics, one becomes the other."""
    direction: Literal["out", "in", "both"] = "out"
    """``out``: from here to the remote broker; ``in``: from there to here; ``both``."""
    qos: int = Field(default=0, ge=0, le=2)
    """Highest QoS of the crossing; a message keeps its own when that is lower. With 0 nothing waits while the link is
    down."""
    local_prefix: str = ""
    """Stands before `filter` on our side; taken off on the way out, put on on the way in."""
    remote_prefix: str = ""
    """Stands before `filter` on the remote side; put on on the way out, taken off on the way in."""

    @model_validator(mode="after")
    def _check(self) -> TopicLine:
        for key in ("local_prefix", "remote_prefix"):
            prefix: str = getattr(self, key)
            if "+" in prefix or "#" in prefix:
                raise ValueError(f"{key} {prefix!r} holds a wildcard; wildcards belong into filter")
        if not self.filter and not (self.local_prefix and self.remote_prefix):
            raise ValueError("an empty filter renames one topic and needs local_prefix and remote_prefix")
        for side in (self.local, self.remote):
            if side.startswith("$share/"):
                raise ValueError(f"{side!r} is a shared subscription; a bridge takes whole topics")
            problem = filter_problem(side)
            if problem:
                raise ValueError(f"{side!r} {problem}")
        return self

    @property
    def local(self) -> str:
        """The filter on our side."""
        return self.local_prefix + self.filter

    @property
    def remote(self) -> str:
        """The filter on the remote side."""
        return self.remote_prefix + self.filter

    @property
    def out(self) -> bool:
        """Whether messages leave by this line."""
        return self.direction != "in"

    @property
    def into(self) -> bool:
        """Whether messages enter by this line."""
        return self.direction != "out"


def filter_problem(text: str) -> str | None:
    """What is wrong with a topic filter, None when nothing is."""
    if not text or len(text.encode()) > 65_535:
        return "is empty or too long for a topic filter"
    if "\0" in text:
        return "holds a NUL"
    levels = text.split("/")
    if any("#" in level and level != "#" for level in levels) or "#" in levels[:-1]:  # [MQTT-4.7.1-1]
        return "uses # other than as its whole last level"
    if any("+" in level and level != "+" for level in levels):  # [MQTT-4.7.1-2]
        return "uses + other than as a whole level"
    return None


def matches(levels: Sequence[str], topic: str) -> bool:
    """Whether a filter, split at its slashes, covers ``topic``."""
    if topic.startswith("$") and levels[0] in ("+", "#"):  # [MQTT-4.7.2-1]
        return False
    parts = topic.split("/")
    for position, level in enumerate(levels):
        if level == "#":
            return True
        if position >= len(parts) or level not in ("+", parts[position]):
            return False
    return len(parts) == len(levels)


class Crossing:
    """Where a message goes and at which QoS at most."""

    __slots__ = ("qos", "topic")

    def __init__(self, topic: bytes, qos: int) -> None:
        self.topic = topic
        self.qos = qos


class Routes:
    """The lines of one direction: the first that covers a topic decides its new name.

    A new name starts with ``$`` only if the line's own filter on that side does, so no message reaches ``$CONTROL/…``
    or ``$SYS/…`` by having a prefix taken off.
    """

    __slots__ = ("_known", "_lines")

    def __init__(self, lines: Sequence[TopicLine], outward: bool) -> None:
        self._lines = [
            (line.local.split("/"), line.local_prefix, line.remote_prefix, line.remote.startswith("$"), line.qos)
            if outward
            else (line.remote.split("/"), line.remote_prefix, line.local_prefix, line.local.startswith("$"), line.qos)
            for line in lines
            if (line.out if outward else line.into)
        ]
        self._known: dict[bytes, Crossing | None] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def find(self, topic: bytes) -> Crossing | None:
        """The crossing of ``topic``; None when no line covers it or its new name is not a topic."""
        try:
            return self._known[topic]
        except KeyError:
            pass
        if len(self._known) >= _KNOWN:
            self._known.clear()
        crossing = self._known[topic] = self._resolve(topic)
        return crossing

    def _resolve(self, topic: bytes) -> Crossing | None:
        text = topic.decode()
        for levels, away, on, may_be_system, qos in self._lines:
            if text.startswith(away) and matches(levels, text):
                renamed = on + text[len(away) :]
                encoded = renamed.encode()
                if not encoded or len(encoded) > 65_535 or (renamed.startswith("$") and not may_be_system):
                    return None
                try:
                    check_text(encoded)
                except ProtocolError:
                    return None  # a strict broker would close the connection because of it
                return Crossing(encoded, qos)
        return None
