"""What of the driver's log reaches ours."""

from __future__ import annotations

import logging

import pytest

from sinks import _kafka_log


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    logger = logging.Logger("aiokafka.client")
    logger.addHandler(_kafka_log.Driver())
    return logger


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sinks.kafka"]


def test_the_same_line_comes_once_a_minute_with_how_often_it_was_said(
    driver: logging.Logger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for node in range(1000):
        driver.error("Unable connect to node with id %s: %s", node, "refused")
    driver.error("Unable to update metadata from %s", [1])
    assert ours(caplog) == ["Unable connect to node with id 0: refused", "Unable to update metadata from [1]"]
    monkeypatch.setattr(_kafka_log, "_REPEAT_EVERY", 0.0)
    driver.error("Unable connect to node with id %s: %s", 7, "refused")
    assert ours(caplog)[2:] == ["Unable connect to node with id 7: refused (999 more like this before)"]


def test_requests_are_never_logged_because_they_hold_passwords(caplog: pytest.LogCaptureFixture):
    _kafka_log.install()
    _kafka_log.install()
    caplog.set_level(logging.DEBUG)
    logging.getLogger("aiokafka.conn").debug("Request %s", "SaslAuthenticateRequest(b'\\x00alice\\x00secret-word')")
    assert "secret-word" not in caplog.text
    ours = [h for h in logging.getLogger("aiokafka").handlers if isinstance(h, _kafka_log.Driver)]
    assert len(ours) == 1
