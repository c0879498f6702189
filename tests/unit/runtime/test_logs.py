"""Log lines: text or JSON, never steered by outsiders, never a flood."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from broker.runtime import logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_hold_level_logger_time_message_and_extras() -> None:
    out = io.StringIO()
    logs.configure("json", "info", out)
    logging.getLogger("broker.x").warning("hello %s", "there", extra={"client": "c1"})
    line = json.loads(out.getvalue())
    assert {k: line[k] for k in ("event", "level", "logger", "client")} == {
        "event": "hello there", "level": "warning", "logger": "broker.x", "client": "c1"
    }  # fmt: skip
    assert line["timestamp"].endswith("Z")


def test_an_exception_is_logged_with_its_traceback() -> None:
    for form in ("json", "text"):
        out = io.StringIO()
        logs.configure(form, "info", out)
        try:
            raise RuntimeError("oops")
        except RuntimeError:
            logging.getLogger("broker.x").exception("failed")
        assert "RuntimeError: oops" in out.getvalue()


def test_configuring_twice_never_writes_a_line_twice() -> None:
    out = io.StringIO()
    for _ in range(3):
        logs.configure("text", "info", out)
    logging.getLogger("broker.x").info("once")
    assert out.getvalue().count("once") == 1


def test_the_level_is_obeyed() -> None:
    out = io.StringIO()
    logs.configure("text", "warning", out)
    logging.getLogger("broker.x").info("quiet")
    logging.getLogger("broker.x").error("loud")
    assert ("quiet" in out.getvalue(), "loud" in out.getvalue()) == (False, True)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_client_id_cannot_start_a_line_or_steer_the_terminal(form: str) -> None:
    out = io.StringIO()
    logs.configure(form, "info", out)
    logging.getLogger("broker.x").info("client %s", "a\nfake line\x1b[2J", extra={"user": "b\r\nfake"})
    assert len(out.getvalue().splitlines()) == 1
    assert "\x1b[2J" not in out.getvalue()


def test_r12_ten_lines_a_second_then_one_that_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    now = [5.0]
    caplog.set_level(logging.INFO)
    voice = logs.Limited(logging.getLogger("broker.x"), "refused connections", clock=lambda: now[0])
    for number in range(1000):
        voice.warning("refused %d", number)
    assert len(caplog.records) == 10
    now[0] = 6.0
    voice.info("refused again")
    assert [r.getMessage() for r in caplog.records[10:]] == [
        "990 more lines like this: refused connections",
        "refused again",
    ]
    assert caplog.records[10].levelno == logging.WARNING


async def test_r12_the_summary_comes_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    said = asyncio.Event()
    logger = logging.getLogger("broker.x")
    handler = logging.Handler()
    handler.emit = lambda record: said.set() if "more lines like this" in record.getMessage() else None  # type: ignore
    logger.addHandler(handler)
    try:
        voice = logs.Limited(logger, "lost peers", per_second=1, clock=lambda: 5.0)
        for _ in range(3):
            voice.warning("lost")
        async with asyncio.timeout(5):
            await said.wait()
    finally:
        logger.removeHandler(handler)
    assert caplog.messages == ["lost", "2 more lines like this: lost peers"]


def test_a_voice_is_shared_by_category(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("broker.shared")
    assert logs.limited(logger, "one") is logs.limited(logger, "one")
    assert logs.limited(logger, "one") is not logs.limited(logger, "two")
    logs.limited(logger, "three", "said 100% at once")
    assert caplog.messages == ["said 100% at once"]
