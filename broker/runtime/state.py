"""The states of an instance as `status` shows them, and the words for an error that reaches an operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from broker.config.types import MASK, Secret

_LONGEST = 500


class State(StrEnum):
    """Where an instance stands, best first: a sink shows the worst of its lanes."""

    RUNNING = "running"
    CONNECTING = "connecting"
    """Not attached to the broker, or the destination was not opened yet."""
    RETRYING = "retrying"
    """The destination does not take records; the same batch is sent again."""
    PAUSED = "paused"
    """An operator paused it, or the destination refuses its configuration and is probed."""
    FATAL = "fatal"
    """It cannot run as configured: unknown kind, missing driver, invalid values. Only a change helps."""
    PARKED = "parked"
    """It killed its worker too often; `resume` or a change starts it again."""


_RANK = {state: rank for rank, state in enumerate(State)}


def worst(states: Iterable[State]) -> State:
    """The one of `states` an operator should see; RUNNING when there is none."""
    return max(states, key=_RANK.__getitem__, default=State.RUNNING)


def joined(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several parts of one instance report, as one: the worst state, what is counted added up, of anything else
    what the first says that says something."""
    if len(reports) == 1:
        return dict(reports[0])
    whole = added(reports)
    if states := [State(report["state"]) for report in reports if "state" in report]:
        whole["state"] = worst(states).value
    return whole


def added(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers and tables of numbers are added up; of anything else the first that is not None counts."""
    total: dict[str, Any] = {}
    for report in reports:
        for key, value in report.items():
            before = total.get(key)
            if before is None:
                total[key] = value
            elif isinstance(value, Mapping) and isinstance(before, Mapping):
                total[key] = added((before, value))
            elif isinstance(value, int) and isinstance(before, int):
                total[key] = before + value
    return total


class Describer:
    """Puts an exception into words without the secrets of one configuration."""

    __slots__ = ("_secrets",)

    def __init__(self, config: BaseModel | None = None) -> None:
        found: set[str] = set()
        if config is not None:
            _collect(config, found)
        self._secrets = sorted(found, key=len, reverse=True)

    def __call__(self, error: BaseException | str) -> str:
        """One line, 500 characters at most; the class's name stands in for an empty message."""
        text = error if isinstance(error, str) else (str(error) or type(error).__name__)
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        text = " ".join(text.split())
        return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _collect(value: object, found: set[str]) -> None:
    if isinstance(value, Secret):
        if value:
            found.add(value.reveal())
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            _collect(getattr(value, name), found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _collect(item, found)
