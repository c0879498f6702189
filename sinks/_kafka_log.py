"""What the Kafka driver says, in our log: without requests, which hold passwords, and without repeating itself."""

from __future__ import annotations

import logging
import time

_log = logging.getLogger("sinks.kafka")

_REPEAT_EVERY = 60.0


class Driver(logging.Handler):
    """Passes on what the driver says, each kind of line once a minute: it repeats itself ten times a second."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[str, tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        at, unsaid = self._said.get(record.msg, (-_REPEAT_EVERY, 0))
        now = time.monotonic()
        if now - at < _REPEAT_EVERY:
            self._said[record.msg] = (at, unsaid + 1)
            return
        self._said[record.msg] = (now, 0)
        more = f" ({unsaid} more like this before)" if unsaid else ""
        _log.log(record.levelno, "%s%s", record.getMessage(), more, exc_info=record.exc_info)


def install() -> None:
    """Take over the driver's log; once is enough."""
    driver = logging.getLogger("aiokafka")
    if not any(type(handler).__name__ == Driver.__name__ for handler in driver.handlers):
        driver.setLevel(logging.WARNING)  # below that it writes requests, and with them passwords
        driver.propagate = False
        driver.addHandler(Driver())
