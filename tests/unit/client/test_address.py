"""Broker URLs."""

from __future__ import annotations

import pytest

from broker.client.address import parse, split_login


@pytest.mark.parametrize(
    ("url", "text", "secure"),
    [
        ("mqtt://broker", "mqtt://broker:1883", False),
        ("broker:1884", "mqtt://broker:1884", False),
        ("tcp://broker", "mqtt://broker:1883", False),
        ("mqtts://[::1]", "mqtts://[::1]:8883", True),
        ("ssl://broker:1", "mqtts://broker:1", True),
        ("ws://broker/mqtt?x=1", "ws://broker:80/mqtt?x=1", False),
        ("wss://broker/mqtt", "wss://broker:443/mqtt", True),
        ("unix:///run/broker.sock", "unix:///run/broker.sock", False),
    ],
)
def test_every_known_form_is_understood(url: str, text: str, secure: bool) -> None:
    address = parse(url)
    assert (str(address), address.secure) == (text, secure)


@pytest.mark.parametrize("url", ["http://broker", "mqtt://", "unix://", "mqtt://broker:99999", "mqtt://broker:x"])
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError) as caught:
        parse("mqtt://user:hunter2@broker")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "bare", "username", "password"),
    [
        ("mqtt://broker:1884", "mqtt://broker:1884", None, None),
        ("mqtts://u:p%40ss@broker", "mqtts://broker", "u", "p@ss"),
        ("u@broker", "mqtt://broker", "u", None),
        ("ws://u:p@[::1]:8083/mqtt?x=1", "ws://[::1]:8083/mqtt?x=1", "u", "p"),
        ("unix:///run/broker.sock", "unix:///run/broker.sock", None, None),
    ],
)
def test_a_login_in_a_url_is_taken_out_where_people_may_write_it(
    url: str, bare: str, username: str | None, password: str | None
) -> None:
    assert split_login(url) == (bare, username, password)
