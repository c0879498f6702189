"""What Redis says when it refuses a command."""

from __future__ import annotations

from typing import Any

from redis import exceptions

from broker.extend.sink import Fatal, NotConnected

_LATER = (
    exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ClusterError, exceptions.AskError,
    exceptions.TryAgainError, exceptions.ReadOnlyError, exceptions.OutOfMemoryError,
)  # fmt: skip
_LATER_WORDS = {"OOM", "MISCONF", "BUSY", "MASTERDOWN", "NOREPLICAS", "LOADING", "UNBLOCKED"}
_FATAL = (exceptions.NoPermissionError, exceptions.AuthorizationError, exceptions.AuthenticationWrongNumberOfArgsError)


def verdict(error: Exception) -> type[NotConnected | Fatal] | None:
    """What follows from a refused command; None when the record is to blame."""
    if isinstance(error, _FATAL) or "unknown command" in str(error).lower():
        return Fatal
    if isinstance(error, _LATER) or str(error).partition(" ")[0] in _LATER_WORDS:
        return NotConnected
    return None


def text_of(value: Any) -> str:
    """What Redis said, on one line of a log and not more than a hundred characters."""
    return ascii(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)[1:-1][:100]
