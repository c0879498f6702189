"""What a client certificate's names become: one mapping, and never a wider identity than the certificate gives."""

from __future__ import annotations

from typing import Any

import pytest

from broker.access.principal import Principal
from broker.access.rules import SUBSCRIBE, RuleSet
from broker.config.template import Template
from broker.extend.auth import Rule
from broker.net.tls import UnusableName, identity


def subject(*names: str, kind: str = "commonName") -> dict[str, Any]:
    return {"subject": ((("countryName", "DE"),), *(((kind, name),) for name in names))}


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a\x1bb", "a\x7fb", "a\u202eb", "a\udcffb", "a\u0085b"])
@pytest.mark.parametrize("source", ["cn", "dn", "san", "off"])
def test_a52_names_with_control_characters_end_the_connection(name: str, source: str) -> None:
    """A-52: NUL, control bytes, what is not UTF-8."""
    with pytest.raises(UnusableName):
        identity(subject(name), source)
    with pytest.raises(UnusableName):
        identity({**subject("device"), "subjectAltName": (("DNS", name),)}, source)


@pytest.mark.parametrize("certificate", [subject(""), subject(), {"subject": ()}, {}, None])
def test_a52_an_empty_name_names_nobody(certificate: Any) -> None:
    """A-52: an empty or missing CN gives no user name, so the client has proved nothing by it."""
    assert "username" not in identity(certificate, "cn")
    assert "username" not in identity(certificate, "san")


def test_a52_of_two_names_one_counts_and_it_is_always_the_same() -> None:
    """A-52: the last CN, which is the most specific one, and the first alternative name; the order of the other parts
    of the subject changes nothing."""
    assert identity(subject("outer", "device"), "cn")["username"] == "device"
    reordered = {"subject": ((("commonName", "device"),), (("countryName", "DE"),))}
    assert identity(reordered, "cn") == {**identity(subject("device"), "cn"), "cert_subject": "C=DE,CN=device"}
    several = {**subject("x"), "subjectAltName": (("DNS", "one"), ("DNS", "two"))}
    assert identity(several, "san")["username"] == "one"


@pytest.mark.parametrize("name", ["+", "#", "a/b", "device/#", "/"])
def test_a52_a_name_with_wildcards_or_levels_makes_no_rule_wider(name: str) -> None:
    """A-52: it may log in, but a rule with its name in it does not apply."""
    username = identity(subject(name), "cn")["username"]
    assert username == name
    rules = RuleSet([Rule(True, "all", Template.parse("devices/${username}/x"))])
    plain = ["devices", "a", "x"]
    assert rules.find(SUBSCRIBE, "devices/a/x", plain, Principal("c", "a")) is not None
    for topic in ("devices/a/x", f"devices/{name}/x", "devices/b/b/x"):
        assert rules.find(SUBSCRIBE, topic, topic.split("/"), Principal("c", username)) is None
