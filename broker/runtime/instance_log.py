"""Puts the instance's name on every log line that is written while its code runs, also by its driver."""

from __future__ import annotations

import logging
from contextvars import ContextVar

_current: ContextVar[str | None] = ContextVar("isthmus_instance", default=None)


def speak_for(key: str) -> None:
    """Log lines of this task, and of every task and callback it starts, carry ``instance=sinks.kafka``."""
    _current.set(key)


class InstanceNames(logging.Filter):
    """Lets every record through, named."""

    def filter(self, record: logging.LogRecord) -> bool:
        key = _current.get()
        if key is not None and not hasattr(record, "instance"):
            record.instance = key
        return True


def install() -> None:
    """Name instances in what the handlers of the root logger write. Call it after `logs.configure`."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(f, InstanceNames) for f in handler.filters):
            handler.addFilter(InstanceNames())
