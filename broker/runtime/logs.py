"""How log lines look, and how many of one kind there may be. Code logs with `logging.getLogger(__name__)`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import structlog

PER_SECOND = 10
"""Lines of one category a second; the rest is summed up in one line (R-12)."""


_OWN = "isthmus"
"""Marks our handler, so that configuring twice never writes a line twice."""


def configure(format: str = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Send the log lines of every logger to `stream` (standard error) as text or as one JSON object a line.

    `level` is debug, info, warning or error. May be called again to change either.
    """
    stream = stream or sys.stderr
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        _own_fields,
    ]
    last: list[Any]
    if format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        last = [_escape, structlog.dev.ConsoleRenderer(colors=_is_terminal(stream), exception_formatter=plain)]
    handler = logging.StreamHandler(stream)
    handler.set_name(_OWN)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == _OWN]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for chatty in ("asyncio", "aiokafka", "ldap3"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _own_fields(logger: object, name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Without what other handlers of the same record leave on it; `logging` allows no extras of these names."""
    event.pop("message", None)
    event.pop("asctime", None)
    return event


def _escape(logger: object, name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Client ids and user names come from outside: none of them may start a line of its own or steer a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and key != "exception" and not value.isprintable():
            event[key] = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    return event


class Limited:
    """Lets through `PER_SECOND` lines a second and then says how many more there were."""

    def __init__(
        self,
        logger: logging.Logger,
        category: str,
        per_second: int = PER_SECOND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._category = category
        self._per_second = per_second
        self._clock = clock
        self._second = -1
        self._count = 0
        self._left_out = 0
        self._level = logging.INFO
        self._timer: asyncio.TimerHandle | None = None

    def log(self, level: int, message: str, *arguments: object, **options: Any) -> None:
        """As `logging.Logger.log`, when the category still has room in this second."""
        if not self._logger.isEnabledFor(level):
            return
        second = int(self._clock())
        if second != self._second:
            self.flush()
            self._second = second
            self._count = 0
        self._count += 1
        if self._count <= self._per_second:
            self._logger.log(level, message, *arguments, stacklevel=3, **options)
            return
        self._left_out += 1
        self._level = max(self._level, level)
        if self._timer is None:
            with contextlib.suppress(RuntimeError):  # without a running loop the next line does it
                self._timer = asyncio.get_running_loop().call_later(1.0, self.flush)

    def flush(self) -> None:
        """Say how many lines were left out, if any were. Happens by itself a second later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left_out, self._left_out = self._left_out, 0
        if left_out:
            self._logger.log(self._level, "%d more lines like this: %s", left_out, self._category)
            self._level = logging.INFO

    def debug(self, message: str, *arguments: object, **options: Any) -> None:
        """One line at level debug."""
        self.log(logging.DEBUG, message, *arguments, **options)

    def info(self, message: str, *arguments: object, **options: Any) -> None:
        """One line at level info."""
        self.log(logging.INFO, message, *arguments, **options)

    def warning(self, message: str, *arguments: object, **options: Any) -> None:
        """One line at level warning."""
        self.log(logging.WARNING, message, *arguments, **options)

    def error(self, message: str, *arguments: object, **options: Any) -> None:
        """One line at level error."""
        self.log(logging.ERROR, message, *arguments, **options)


_voices: dict[tuple[str, str], Limited] = {}
"""The limit belongs to the log, and a process has one log, however many brokers it runs."""


def limited(logger: logging.Logger, category: str, text: str | None = None) -> Limited:
    """The limited voice of `logger` for lines that outsiders can cause, such as refused connections.

    `category` is a fixed word that names the lines in the summary. With `text`, logs it as a warning at once.
    """
    voice = _voices.setdefault((logger.name, category), Limited(logger, category))
    if text is not None:
        voice.log(logging.WARNING, "%s", text)
    return voice
